"""Long prompts between short ones: how long a short one waits behind a long one, and what decoding streams feel of it.

Two stages of one thread. A prompt of 3,000 tokens takes seconds to prefill; a scheduler that lets it have the machine
to itself shows here as a long first token of whoever comes next, and as gaps in everybody's stream.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from daemon.terminal.local_mesh import LocalMesh
from tools.bench.pipeline_mesh import Bench, driver_of, pipeline_of
from tools.bench.report import progress
from tools.bench.streams import Crowd, Stream, dial, greedy, percentile

LONG_TOKENS, SHORT_TOKENS = 3000, 16
N_DECODING, OUTPUT_TOKENS = 32, 300
SETTLED_AT = 6
HEAD_START_S = 0.3
"""Of the long prompt before the short one."""
QUIET_S = 3.0


def under_load(bench: Bench) -> None:
    """First tokens and gaps, a round each of everything."""
    first_ms: dict[str, list[float]] = {}
    gaps_s: dict[str, list[float]] = {"quiet": [], "while long prompts come": []}
    with pipeline_of(bench, 2, 1) as mesh:
        for number in range(bench.n_rounds):
            for name, stream in {**on_idle_mesh(bench, mesh), **among_decoding(bench, mesh, gaps_s)}.items():
                first_ms.setdefault(name, []).append(1e3 * stream.first_token_s)
            progress(f"  round {number + 1}: " + ", ".join(f"{one[-1]:.0f}" for one in first_ms.values()))
    for name, samples in first_ms.items():
        bench.report.add(f"first token, {name}", samples, "ms")
    behind, ahead = first_ms["short, 0.3 s behind long"], first_ms["long, with a short one behind"]
    bench.report.add(
        "a short prompt's wait behind a long one",
        [one / other for one, other in zip(behind, ahead, strict=True)],
        "of the long one's",
    )
    for name, gaps in gaps_s.items():
        for percent in (50, 99):
            bench.report.add(
                f"gap p{percent} of {N_DECODING} streams, {name}", 1e3 * percentile(gaps, percent), "ms"
            )
        bench.report.add(f"longest gap, {name}", 1e3 * max(gaps), "ms")


def on_idle_mesh(bench: Bench, mesh: LocalMesh) -> dict[str, Stream]:
    """A short prompt alone, a long one alone, and a short one that comes while a long one is prefilled."""
    crowd = Crowd()
    short = send(bench, mesh, crowd, SHORT_TOKENS)
    crowd.run()
    alone = send(bench, mesh, crowd, LONG_TOKENS)
    crowd.run()
    ahead = send(bench, mesh, crowd, LONG_TOKENS)
    run_for(crowd, HEAD_START_S)
    behind = send(bench, mesh, crowd, SHORT_TOKENS)
    crowd.run()
    return {
        "short": short,
        "long": alone,
        "long, with a short one behind": ahead,
        "short, 0.3 s behind long": behind,
    }


def among_decoding(bench: Bench, mesh: LocalMesh, gaps_s: dict[str, list[float]]) -> dict[str, Stream]:
    """The same beside 32 streams that decode: their gaps before anything comes, and while two long prompts do."""
    crowd = Crowd()
    streams = [send(bench, mesh, crowd, SHORT_TOKENS, OUTPUT_TOKENS) for _ in range(N_DECODING)]
    crowd.run(until=lambda: all(len(one.times_s) >= SETTLED_AT for one in streams))
    quiet_s = time.monotonic()
    run_for(crowd, QUIET_S)
    short = send(bench, mesh, crowd, SHORT_TOKENS, 1)
    crowd.run(until=lambda: short.is_over)
    loaded_s = time.monotonic()
    long = []
    for _ in range(2):
        long.append(send(bench, mesh, crowd, LONG_TOKENS, 1))
        crowd.run(until=lambda: long[-1].is_over)
    over_s = time.monotonic()
    if any(one.is_over for one in streams):
        bench.report.notes.append("some of the decoding streams ended before the long prompts were through")
    crowd.abandon()
    gaps_s["quiet"] += gaps_between(streams, quiet_s, quiet_s + QUIET_S)
    gaps_s["while long prompts come"] += gaps_between(streams, loaded_s, over_s)
    return {f"short, beside {N_DECODING} streams": short, f"long, beside {N_DECODING} streams": long[0]}


def send(bench: Bench, mesh: LocalMesh, crowd: Crowd, n_tokens: int, max_tokens: int = 4) -> Stream:
    (prompt,) = bench.prompts(1, n_tokens)
    return crowd.send(dial(driver_of(mesh).url), greedy(prompt, max_tokens))


def run_for(crowd: Crowd, seconds: float) -> None:
    """Read for so long."""
    stop_s = time.monotonic() + seconds
    crowd.run(until=lambda: time.monotonic() >= stop_s)


def gaps_between(streams: Sequence[Stream], start_s: float, stop_s: float) -> list[float]:
    """Of all streams, those that end within the time."""
    return [
        gap
        for one in streams
        for gap, at_s in zip(one.gaps_s, one.times_s[1:], strict=True)
        if start_s < at_s <= stop_s
    ]
