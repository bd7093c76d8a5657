"""Fuzz targets with atheris: `python -m tools.fuzz [--target NAME] [--seconds 60] [--corpus DIR] [--seed N]`.

Each target runs in a process of its own, with the coverage of our packages as its guide. A finding is printed with
its traceback, its input is kept beside the corpus, and the exit code is 1. `python -m tools.fuzz --target NAME
--input FILE` runs one input again.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = ("codec", "frames", "records", "tokens", "certificates", "plans", "http-bodies")
_DONE = re.compile(r"#(\d+)\s+DONE\s+cov: (\d+) ft: (\d+) corp: (\S+)")


def main() -> int:
    options = _options()
    if options.input is not None:
        from tools.fuzz.targets import targets

        targets()[options.target].read(options.input.read_bytes())
        return 0
    if options.inside:
        _fuzz(options)
    with tempfile.TemporaryDirectory(prefix="hexmesh-fuzz-") as folder:
        corpus = options.corpus or Path(folder)
        names = NAMES if options.target is None else (options.target,)
        return max(_run(name, corpus / name, options) for name in names)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz")
    parser.add_argument(
        "--target", choices=NAMES, help="one target; all of them, one after another, without it"
    )
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--corpus", type=Path, help="where inputs that reach something new are kept")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--input", type=Path, help="run this input alone")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options: argparse.Namespace = parser.parse_args()
    if (options.input is not None or options.inside) and options.target is None:
        parser.error("--input needs --target")
    return options


def _run(name: str, corpus: Path, options: argparse.Namespace) -> int:
    corpus.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tools.fuzz", "--inside", "--target", name, "--corpus", str(corpus)]
    command += ["--seconds", str(options.seconds), "--seed", str(options.seed)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=options.seconds + 120, check=False)
    done = _DONE.search(ran.stderr)
    if ran.returncode != 0 or done is None:
        print(f"{name}: FOUND SOMETHING\n{ran.stdout}\n{ran.stderr}")
        return 1
    n_runs, coverage, features, kept = done.groups()
    print(f"{name}: {n_runs} inputs, {coverage} edges, {features} features, corpus {kept}, nothing found")
    return 0


def _fuzz(options: argparse.Namespace) -> None:
    """Become the fuzzer; atheris ends the process."""
    import atheris

    with atheris.instrument_imports(include=["hexmesh", "daemon"]):
        from tools.fuzz.targets import targets

    target = targets()[options.target]
    for n, seed in enumerate(target.seeds):
        (options.corpus / f"seed-{n}").write_bytes(seed)
    artifacts = f"-artifact_prefix={options.corpus.parent}/{options.target}-"
    limits = [f"-max_total_time={options.seconds}", "-max_len=20000", "-rss_limit_mb=2048", "-timeout=10"]
    atheris.Setup(["fuzz", str(options.corpus), *limits, f"-seed={options.seed}", artifacts], target.read)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
