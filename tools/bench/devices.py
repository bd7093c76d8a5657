"""What nodes measure of their devices, beside a plain GEMM and a plain copy of memory.

The planner divides by these figures, so they must be within 30 % of what torch gives without our code. The
two alternate, so that a noisy machine disturbs both.
Run: `python tools/bench/devices.py [--device cpu,cuda:0] [--dtype float32] [--threads N] [--quick] [--json]`.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hexmesh.errors import InvalidInput
from hexmesh.plan import DtypeName
from hexmesh.runtime.device import (
    DTYPES,
    device_name,
    measure_bandwidth,
    measure_flops,
    pick_device,
)
from tools.bench.report import Report, bench_arguments, print_report, progress

SIDE = {"cpu": 1536, "cuda": 8192}
COPY_BYTES = {"cpu": 512 * 2**20, "cuda": 4 * 2**30}
REFERENCE_S = 0.5
LOW, HIGH = 0.7, 1.3


def main() -> int:
    parser = bench_arguments(__doc__ or "")
    parser.add_argument("--device", default="auto", help="auto, or names such as cpu,cuda:0")
    parser.add_argument("--dtype", default=None, choices=sorted(DTYPES), help="default: all that matter")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    n_rounds = 3 if arguments.quick else 7
    report = Report(
        name="devices",
        method=(
            f"ratios are medians of {n_rounds} alternating rounds; references: torch.mm of another size, and "
            f"tensor.copy_ counted both ways; {torch.get_num_threads()} CPU threads"
        ),
    )
    try:
        for name in device_names(arguments.device):
            bench_device(report, name, dtypes_of(name, arguments.dtype), n_rounds)
    except InvalidInput as error:
        print(error.one_line(), file=sys.stderr)
        return error.exit_code
    print_report(report, "json" if arguments.json else "text")
    return 0 if all(figure.holds is not False for figure in report.figures.values()) else 1


def device_names(text: str) -> list[str]:
    """Every GPU and the CPU for "auto", else the names given."""
    if text != "auto":
        return [name.strip() for name in text.split(",")]
    return [*(f"cuda:{index}" for index in range(torch.cuda.device_count())), "cpu"]


def dtypes_of(device: str, wanted: DtypeName | None) -> list[DtypeName]:
    if wanted is not None:
        return [wanted]
    return ["float32"] if device == "cpu" else ["float32", "bfloat16"]


def bench_device(report: Report, name: str, dtypes: list[DtypeName], n_rounds: int) -> None:
    device = pick_device(name)
    report.notes.append(f"{name} is {device_name(device)}")
    for dtype in dtypes:
        progress(f"{name}: {dtype} GEMM")
        add_pair(
            report,
            f"{name} {dtype} GEMM",
            "FLOP/s",
            measured=lambda dtype=dtype: measure_flops(device, dtype).per_s,  # type: ignore[misc]
            reference=reference_gemm(device, dtype),
            n_rounds=n_rounds,
        )
    progress(f"{name}: memory")
    add_pair(
        report,
        f"{name} memory",
        "B/s",
        measured=lambda: measure_bandwidth(device).per_s,
        reference=reference_copy(device),
        n_rounds=n_rounds,
    )


def add_pair(
    report: Report,
    name: str,
    unit: str,
    *,
    measured: Callable[[], float],
    reference: Callable[[], float],
    n_rounds: int,
) -> None:
    """Both figures and their ratio, which the goals bound from both sides."""
    pairs = [(measured(), reference()) for _ in range(n_rounds)]
    ratio = statistics.median(ours / plain for ours, plain in pairs)
    report.add(f"{name}, measured", [ours for ours, _ in pairs], unit)
    report.add(f"{name}, reference", [plain for _, plain in pairs], unit)
    report.add(f"{name}, ratio", ratio, "", at_least=LOW)
    report.add(f"{name}, ratio above", ratio, "", at_most=HIGH)


def reference_gemm(device: torch.device, dtype: DtypeName) -> Callable[[], float]:
    side = SIDE[device.type]
    left, right = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(2))
    return lambda: 2.0 * side**3 * calls_per_s(lambda: torch.mm(left, right), device)


def reference_copy(device: torch.device) -> Callable[[], float]:
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.zeros_like(source)
    return lambda: 2.0 * source.nbytes * calls_per_s(lambda: target.copy_(source), device)


def calls_per_s(action: Callable[[], object], device: torch.device) -> float:
    """How often the action runs in a second: the best of five windows, warm."""
    action()
    synchronise(device)
    started_s = time.perf_counter()
    action()
    synchronise(device)
    n_calls = max(1, int(REFERENCE_S / 5 / (time.perf_counter() - started_s)))
    best_s = float("inf")
    for _ in range(5):
        started_s = time.perf_counter()
        for _ in range(n_calls):
            action()
        synchronise(device)
        best_s = min(best_s, time.perf_counter() - started_s)
    return n_calls / best_s


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
