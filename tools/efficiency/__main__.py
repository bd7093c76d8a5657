"""Fits, and writes hexmesh/catalogue/efficiency.toml and docs/benchmarks/efficiency.md."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from hexmesh.catalogue import DeviceEfficiency
from hexmesh.catalogue.efficiency import EfficiencyFile
from tools.efficiency.fit import Fit, Prediction, factors_by_name, fit
from tools.efficiency.measured import HERE, sources

ROOT = HERE.parents[1]
FACTORS = ROOT / "hexmesh" / "catalogue" / "efficiency.toml"
REPORT = ROOT / "docs" / "benchmarks" / "efficiency.md"
_UNITS = {
    "linear": "tokens",
    "prompt": "tokens",
    "decode": "sequences",
    "prefill": "tokens",
    "token": "tokens before it",
    "all_reduce": "bytes",
}
_TITLES = {
    "linear": "One layer's matrices (Vidur)",
    "prompt": "A whole layer, prompt (Helix)",
    "decode": "A whole layer, decode step (Helix)",
    "prefill": "End to end, prompt (Splitwise)",
    "token": "End to end, one output token (Splitwise)",
    "all_reduce": "All-reduce (Vidur)",
}
INTRODUCTION = """# Efficiency factors of the catalogue

What devices and links reach of their peak figures, fitted by least squares to published measurements of
Llama-2-70B in float16; `python -m tools.efficiency` makes this file and the factors anew. The formulas are
those of `hexmesh/roofline.py`; the fit minimises the logarithm of predicted over measured. A prediction is
memory or compute, whichever is longer: where both take about the same (256 tokens), it is too short.
"""
REMARKS = """
*pooled* is the geometric mean of the measured classes, for every class that nobody published such
measurements of: AMD, Intel, Apple, Ascend, CPUs and Blackwell. It is a guess; measure (`hexmesh join` does) or
write `measured` rates into the cluster file. Launches of ada, turing and volta are the mean of those that were
measured at several TP degrees. PCIe rests on one send between two A40 through the host; with a bridge or
peer-to-peer, say so in the cluster file (`fabric`).

The decode tables fit a context of {context} tokens, which their source does not tell. The framework of the
end-to-end runs adds {framework} ms to each pass; plans do not count it."""


def toml(factors: EfficiencyFile) -> str:
    """efficiency.toml for these factors."""
    lines = [
        "# Fitted by `python -m tools.efficiency` from tools/efficiency/measured.toml; residuals in",
        "# docs/benchmarks/efficiency.md. Not to be edited by hand: a test fits again and compares.",
        "",
        f"framework_step_s = {factors.framework_step_s:.4g}",
    ]
    for name, row in factors.device.items():
        shares = f"prefill = {row.prefill:.4g}\ndecode = {row.decode:.4g}\nlaunch_s = {row.launch_s:.4g}"
        lines.append(f"\n[device.{name}]\n{shares}\npoints = {row.points}\nrms = {row.rms:.3g}")
    for name, link in factors.link.items():
        shares = f"rate = {link.rate:.4g}\nstep_s = {link.step_s:.4g}"
        lines.append(f"\n[link.{name}]\n{shares}\npoints = {link.points}\nrms = {link.rms:.3g}")
    return "\n".join(lines) + "\n"


def report(found: Fit) -> str:
    """The document that shows factors and residuals."""
    return "\n".join([*_factors(found), *_residuals(found.predictions)]) + "\n"


def _factors(found: Fit) -> Iterator[str]:
    yield INTRODUCTION
    for name, source in sources().items():
        yield f"- {name}: [{source['title']}]({source['url']})"
    yield ""
    yield "| class | prefill, of peak FLOP/s | decode, of peak bytes/s | launch of a layer | points | rms residual |"
    yield "|---|---|---|---|---|---|"
    rows = factors_by_name(found.factors)
    for name, row in rows.items():
        tail = f"{row.points} | {row.rms * 100:.1f} % |" if row.points > 1 else f"{row.points} | - |"
        if isinstance(row, DeviceEfficiency):
            launch = f"{row.launch_s * 1e6:.0f} us"
            yield f"| {name} | {row.prefill:.3f} | {row.decode:.3f} | {launch} | {tail}"
    yield ""
    yield "| link class | of peak rate | step of a collective | points | rms residual |"
    yield "|---|---|---|---|---|"
    for name, row in rows.items():
        tail = f"{row.points} | {row.rms * 100:.1f} % |" if row.points > 1 else f"{row.points} | - |"
        if not isinstance(row, DeviceEfficiency):
            yield f"| {name} | {row.rate:.3f} | {row.step_s * 1e6:.1f} us | {tail}"
    yield REMARKS.format(
        context=f"{found.context_tokens:.0f}", framework=f"{found.factors.framework_step_s * 1e3:.1f}"
    )


def _residuals(predictions: tuple[Prediction, ...]) -> Iterator[str]:
    yield ""
    yield "## Residuals"
    order = list(_TITLES)
    by_kind = sorted(predictions, key=lambda one: order.index(one.point.kind))
    for kind, own in groupby(by_kind, key=lambda one: one.point.kind):
        yield ""
        yield f"### {_TITLES[kind]}"
        yield ""
        yield f"| device | TP | {_UNITS[kind]} | measured ms | predicted ms | ratio |"
        yield "|---|---|---|---|---|---|"
        for one in own:
            point = one.point
            yield (
                f"| {point.device} | {point.tp} | {point.amount} | {point.seconds * 1e3:.3f} "
                f"| {one.seconds * 1e3:.3f} | {one.ratio:.2f} |"
            )


def main() -> None:
    found = fit()
    FACTORS.write_text(toml(found.factors), encoding="utf-8")
    REPORT.write_text(report(found), encoding="utf-8")
    print(f"wrote {FACTORS} and {REPORT}")


if __name__ == "__main__":
    main()
