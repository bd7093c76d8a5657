"""The fuzz targets in small: good inputs and damaged ones raise nothing; and the fuzzer itself runs."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tools.fuzz.__main__ import NAMES
from tools.fuzz.targets import Target, targets

TARGETS = targets()
N_DAMAGED = 300


def damaged(target: Target, rng: random.Random) -> bytes:
    data = bytearray(rng.choice(target.seeds))
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(data))
        match rng.randrange(3):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                del data[at + 1 :]
            case _:
                data[at:at] = rng.randbytes(rng.randrange(8))
    return bytes(data)


def test_every_target_can_be_named() -> None:
    assert tuple(TARGETS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_damaged_inputs_raise_nothing(name: str) -> None:
    target, rng = TARGETS[name], random.Random(1)
    for seed in target.seeds:
        target.read(seed)
    for _ in range(N_DAMAGED):
        target.read(damaged(target, rng))


def test_the_fuzzer_runs_and_says_what_it_did(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="no wheel of atheris for this platform")
    command = [sys.executable, "-m", "tools.fuzz", "--target", "frames", "--seconds", "1"]
    ran = subprocess.run(
        [*command, "--corpus", str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )

    assert ran.returncode == 0, ran.stdout
    assert "nothing found" in ran.stdout
    assert len(list((tmp_path / "frames").iterdir())) > 3
