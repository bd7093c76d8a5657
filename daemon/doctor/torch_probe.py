"""Does torch load, and can it use the GPUs? Asked of a process of its own, with a time limit: a broken torch
or driver may hang or crash whoever imports it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass

from daemon.doctor.driver import Driver
from daemon.doctor.finding import Finding, failed, passed, warned

LIMIT_S = 20.0

_PROGRAM = """
import json, torch
told = {"version": torch.__version__, "built_for": torch.version.cuda, "n_gpus": 0, "trouble": ""}
try:
    if torch.version.cuda and torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            assert float(torch.ones(8, device=f"cuda:{i}").sum()) == 8.0
            told["n_gpus"] += 1
    elif torch.version.cuda:
        torch.cuda.init()
except Exception as error:
    told["trouble"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
print(json.dumps(told))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Torch:
    """What torch told. `failure` is why it told nothing; `trouble` why it cannot use a GPU."""

    version: str = ""
    built_for: str | None = None
    """The CUDA version that this torch was built for; None for a CPU build."""
    n_gpus: int = 0
    trouble: str = ""
    failure: str = ""


def probe_torch(limit_s: float = LIMIT_S) -> Torch:
    """Import torch in a fresh process. Blocks for seconds."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_s,
            check=False,
            env=os.environ | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
        )
        if done.returncode == 0:
            return Torch(**json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return Torch(failure=f"it did not load within {limit_s:.0f} s")
    except (OSError, ValueError, TypeError, IndexError) as error:
        return Torch(failure=str(error))
    if done.returncode < 0:
        return Torch(failure=f"its process was killed by signal {-done.returncode}")
    return Torch(failure=(done.stderr.strip().splitlines() or ["it said nothing"])[-1][:300])


def check_torch(torch: Torch, driver: Driver, devices: tuple[str, ...]) -> Finding:
    """`devices` are those of --device: who asked for CPUs alone does not need CUDA."""
    if torch.failure:
        return failed("torch", f"torch does not load: {torch.failure}", "reinstall it: make setup, or pip")
    wants_gpu = any(name != "cpu" for name in devices)
    if driver.n_gpus and wants_gpu and torch.n_gpus < driver.n_gpus:
        reason = torch.trouble or (
            f"it sees {torch.n_gpus} of {driver.n_gpus} GPUs" if torch.built_for else "it is built for CPUs"
        )
        return failed(
            "torch",
            f"torch {torch.version} cannot use the GPUs: {reason}",
            "install a torch built for CUDA that this driver supports, or say --device cpu",
        )
    if torch.n_gpus:
        return passed("torch", f"{torch.version}, computes on {torch.n_gpus} GPUs")
    if driver.n_gpus:
        return warned(
            "torch", f"{torch.version}; the GPUs are not used", "leave --device cpu out to use them"
        )
    return passed("torch", f"{torch.version}, loads; for CPUs here")
