"""Does the NVIDIA driver answer, where there is one?"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from daemon.doctor.finding import Finding, failed, passed, warned

_NVIDIA = "0x10de"
_DISPLAY_CLASS = "0x03"


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """What NVML and the PCI bus say. `trouble` is NVML's error, empty where it answers."""

    version: str = ""
    n_gpus: int = 0
    has_library: bool = False
    has_hardware: bool = False
    trouble: str = ""


def look_at_driver() -> Driver:
    """Ask NVML. Takes some milliseconds, more where there are GPUs."""
    import pynvml

    has_hardware = _has_hardware()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        missing = error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
        return Driver(has_library=not missing, has_hardware=has_hardware, trouble=str(error))
    try:
        return Driver(
            version=str(pynvml.nvmlSystemGetDriverVersion()),
            n_gpus=int(pynvml.nvmlDeviceGetCount()),
            has_library=True,
            has_hardware=has_hardware,
        )
    except pynvml.NVMLError as error:
        return Driver(has_library=True, has_hardware=has_hardware, trouble=str(error))
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def check_driver(driver: Driver) -> Finding:
    if not driver.trouble and driver.n_gpus:
        return passed("driver", f"NVIDIA driver {driver.version}, {driver.n_gpus} GPUs")
    if not driver.trouble:
        return passed("driver", f"no GPU; NVIDIA driver {driver.version} is installed")
    if not driver.has_library and driver.has_hardware:
        return warned("driver", "an NVIDIA GPU is built in and has no driver", "install NVIDIA's driver")
    if not driver.has_hardware:
        return passed("driver", "no GPU")
    return failed(
        "driver",
        f"the NVIDIA driver does not answer: {driver.trouble}",
        "see nvidia-smi; after an update of the driver, reboot or reload its modules",
    )


def _has_hardware() -> bool:
    for device in Path("/sys/bus/pci/devices").glob("*"):
        with suppress(OSError):
            is_display = (device / "class").read_text().startswith(_DISPLAY_CLASS)
            if is_display and (device / "vendor").read_text().strip() == _NVIDIA:
                return True
    return Path("/proc/driver/nvidia/gpus").is_dir() and any(Path("/proc/driver/nvidia/gpus").iterdir())
