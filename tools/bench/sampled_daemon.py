"""A daemon that samples itself: where its CPU time goes, by part, and what its steps took. For benches alone.

Started in place of `python -m daemon`. SIGUSR1 starts counting anew, SIGUSR2 writes the counts to the file that
BENCH_SAMPLES names. The timer counts the process's CPU time; each tick looks at the stack that runs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # beside this file `daemon` is a bench

from daemon.cli import main
from daemon.web.telemetry import Telemetry

TICK_S = 0.001

_PARTS = (
    ("daemon/web/detokenizer", "detokenising"),
    ("daemon/web/text", "detokenising"),
    ("daemon/web/telemetry", "telemetry"),
    ("prometheus_client/", "telemetry"),
    ("daemon/web/", "HTTP"),
    ("site-packages/aiohttp/", "HTTP"),
    ("daemon/gateway", "gateway"),
    ("daemon/flight", "gateway"),
    ("hexmesh/serving/", "batching"),
    ("daemon/pipeline", "batching"),
    ("daemon/drive", "batching"),
    ("daemon/compute/", "IPC"),
    ("daemon/stage", "IPC"),
    ("hexmesh/wire/", "IPC"),
    ("daemon/dispatch", "IPC"),
    ("daemon/peering/", "IPC"),
)

_samples: Counter[str] = Counter()
_steps: list[tuple[float, float]] = []
"""Round trip and compute of each step, in seconds."""
_lines: Counter[str] = Counter()
_part_of_file: dict[str, str | None] = {}


def _part_of(file: str) -> str | None:
    if file not in _part_of_file:
        _part_of_file[file] = next((part for piece, part in _PARTS if piece in file), None)
    return _part_of_file[file]


def _on_tick(number: int, frame: FrameType | None) -> None:
    """The innermost frame that belongs to a part names it; without one it is the event loop itself."""
    innermost = frame
    while frame is not None:
        part = _part_of(frame.f_code.co_filename)
        if part is not None:
            _samples[part] += 1
            break
        frame = frame.f_back
    else:
        _samples["event loop and the rest"] += 1
    if innermost is not None:
        code = innermost.f_code
        _lines[f"{code.co_filename}:{innermost.f_lineno} {code.co_qualname}"] += 1


def _observe_step(
    telemetry: Telemetry, replica: str, round_trip_s: float, stages_s: Iterable[float], transit_s: float
) -> None:
    _steps.append((round_trip_s, sum(stages_s)))


def _start(number: int, frame: FrameType | None) -> None:
    _samples.clear()
    _lines.clear()
    _steps.clear()
    signal.setitimer(signal.ITIMER_PROF, TICK_S, TICK_S)


def _write(number: int, frame: FrameType | None) -> None:
    signal.setitimer(signal.ITIMER_PROF, 0.0)
    file = Path(os.environ["BENCH_SAMPLES"])
    scratch = file.with_suffix(".part")
    scratch.write_text(
        json.dumps({"parts": _samples, "lines": dict(_lines.most_common(60)), "steps": _steps})
    )
    scratch.replace(file)


if __name__ == "__main__":
    if "BENCH_SAMPLES" in os.environ:
        Telemetry.observe_step = _observe_step  # type: ignore[method-assign, assignment]
        signal.signal(signal.SIGPROF, _on_tick)
        signal.signal(signal.SIGUSR1, _start)
        signal.signal(signal.SIGUSR2, _write)
    main()
