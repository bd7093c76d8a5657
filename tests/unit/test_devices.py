"""Which devices `--device` means, and how their figures are had: once, in turn, kept for a day."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from daemon.compute.devices import (
    FRESH_S,
    DeviceSpec,
    MeasurementCache,
    benchmark_turn,
    choose_devices,
    measure_devices,
)
from daemon.compute.inventory import Gpu, Inventory, _visible_indices, take_inventory
from hexmesh.cluster import Device
from hexmesh.errors import InvalidInput, NotReady
from hexmesh.membership.records import DeviceFacts
from hexmesh.wire.worker import DeviceMeasured

GIB = 2**30
CPU_HOST = Inventory(cpu_name="EPYC", n_cpus=8, available_bytes=10 * GIB, why_no_gpus="NVML says no")
GPU_HOST = Inventory(
    cpu_name="EPYC",
    n_cpus=8,
    available_bytes=10 * GIB,
    gpus=(Gpu(0, "H200", 141 * GIB, 140 * GIB), Gpu(1, "A100", 80 * GIB, 40 * GIB)),
)
NOW_S = 1.8e9


@pytest.fixture(autouse=True)
def own_lock_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def cpu(index: int = 0, n_threads: int = 8, budget_bytes: int = 8 * GIB) -> DeviceSpec:
    return DeviceSpec(
        index=index,
        kind="cpu",
        torch_name="cpu",
        name="EPYC",
        n_threads=n_threads,
        budget_bytes=budget_bytes,
    )


def gpu(index: int, gpu_index: int, name: str, budget_bytes: int) -> DeviceSpec:
    return DeviceSpec(
        index=index,
        kind="cuda",
        torch_name=f"cuda:{gpu_index}",
        name=name,
        n_threads=1,
        budget_bytes=budget_bytes,
    )


def test_auto_takes_the_cpu_where_there_is_no_gpu() -> None:
    assert choose_devices("auto", CPU_HOST) == (cpu(),)


def test_auto_takes_every_gpu() -> None:
    assert choose_devices("auto", GPU_HOST) == (
        gpu(0, 0, "H200", 126 * GIB),
        gpu(1, 1, "A100", 36 * GIB),
    )


def test_two_cpu_devices_share_threads_and_memory() -> None:
    assert choose_devices("cpu,cpu", CPU_HOST) == (cpu(0, 4, 4 * GIB), cpu(1, 4, 4 * GIB))


def test_a_mixture_is_counted_in_the_order_given() -> None:
    assert choose_devices(" cuda:1 , cpu", GPU_HOST) == (gpu(0, 1, "A100", 36 * GIB), cpu(1))


def test_flags_win() -> None:
    assert choose_devices("cpu,cpu", CPU_HOST, threads=3, memory_bytes=2**20) == (
        cpu(0, 3, 2**20),
        cpu(1, 3, 2**20),
    )


def test_more_devices_than_cpus_have_a_thread_each() -> None:
    assert [spec.n_threads for spec in choose_devices(",".join(["cpu"] * 9), CPU_HOST)] == [1] * 9


@pytest.mark.parametrize(
    ("text", "message", "next_step"),
    [
        ("gpu", "'gpu' in --device 'gpu' is no device", "auto, cpu, cuda:0, cuda:1"),
        ("", "'' in --device ''", "auto, cpu"),
        ("cpu,", "'' in --device 'cpu,'", "auto, cpu"),
        ("cuda", "'cuda'", "cuda:0"),
        ("cuda:-1", "'cuda:-1'", "cuda:0"),
        ("auto,cpu", "'auto'", "cpu"),
        ("cuda:7", "there is no cuda:7 here: 2 GPUs found", "cuda:0, cuda:1"),
        ("cuda:1,cuda:1", "names cuda:1 twice", "once"),
    ],
)
def test_a_wrong_name_is_answered_with_the_right_ones(text: str, message: str, next_step: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        choose_devices(text, GPU_HOST)
    assert message in caught.value.message
    assert next_step in caught.value.next_step


def test_why_there_is_no_gpu_is_said() -> None:
    with pytest.raises(InvalidInput, match="no cuda:0 here: NVML says no"):
        choose_devices("cuda:0", CPU_HOST)


@pytest.mark.parametrize("limits", [{"threads": 0}, {"memory_bytes": 0}, {"memory_bytes": 2**20 - 1}])
def test_limits_that_hold_nothing_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(InvalidInput):
        choose_devices("cpu", CPU_HOST, **limits)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("variable", "visible"),
    [(None, [0, 1, 2]), ("", []), ("2,0", [2, 0]), ("1,9,0", [1]), ("-1", []), ("GPU-abc", [])],
)
def test_visible_gpus_are_counted_as_cuda_counts(variable: str | None, visible: list[int]) -> None:
    assert _visible_indices(variable, 3) == visible


def test_this_host_has_a_cpu_and_memory() -> None:
    inventory = take_inventory()
    assert inventory.cpu_name
    assert 1 <= inventory.n_cpus <= (os.cpu_count() or 1)
    assert 0 < inventory.available_bytes < 2**50
    assert bool(inventory.gpus) != bool(inventory.why_no_gpus)


class Workers:
    """Measures by table and counts how often it was asked."""

    def __init__(self, flops_per_s: float = 1e11) -> None:
        self.flops_per_s = flops_per_s
        self.asked: list[int] = []

    async def measure(self, spec: DeviceSpec) -> DeviceMeasured:
        self.asked.append(spec.index)
        await asyncio.sleep(0)
        return DeviceMeasured(
            flops_per_s=self.flops_per_s,
            flops_spread=0.04,
            bytes_per_s=2e10,
            bytes_spread=0.05,
            total_bytes=GIB,
            name="as torch says",
        )


async def measured(
    specs: tuple[DeviceSpec, ...], workers: Workers, cache: MeasurementCache, now_s: float = NOW_S
) -> tuple[DeviceFacts, ...]:
    return await measure_devices(
        specs, dtype="float32", measure=workers.measure, cache=cache, now_unix_s=lambda: now_s
    )


async def test_figures_become_facts(tmp_path: Path) -> None:
    facts = await measured((cpu(),), Workers(), MeasurementCache(tmp_path / "devices.json"))
    assert facts == (
        DeviceFacts(
            device=Device(
                index=0, kind="cpu", name="EPYC", budget_bytes=8 * GIB, flops_per_s=1e11, bytes_per_s=2e10
            ),
            n_threads=8,
            flops_spread=0.04,
            bytes_spread=0.05,
            measured_at_unix_s=NOW_S,
        ),
    )


async def test_a_restart_within_a_day_measures_nothing(tmp_path: Path) -> None:
    path, workers = tmp_path / "state" / "devices.json", Workers()
    first = await measured((cpu(),), workers, MeasurementCache(path))
    second = await measured((cpu(budget_bytes=GIB),), workers, MeasurementCache(path), NOW_S + FRESH_S - 1)
    assert workers.asked == [0]
    assert second[0].measured_at_unix_s == first[0].measured_at_unix_s
    assert second[0].device.budget_bytes == GIB


@pytest.mark.parametrize("now_s", [NOW_S + FRESH_S, NOW_S - 1])
async def test_figures_of_another_day_are_measured_again(tmp_path: Path, now_s: float) -> None:
    path, workers = tmp_path / "devices.json", Workers()
    await measured((cpu(),), workers, MeasurementCache(path))
    assert (await measured((cpu(),), workers, MeasurementCache(path), now_s))[0].measured_at_unix_s == now_s
    assert workers.asked == [0, 0]


async def test_other_threads_are_another_device_and_twins_are_measured_once(tmp_path: Path) -> None:
    workers = Workers()
    specs = (cpu(0, 4), cpu(1, 4), cpu(2, 2))
    facts = await measured(specs, workers, MeasurementCache(tmp_path / "devices.json"))
    assert workers.asked == [0, 2]
    assert [one.device.index for one in facts] == [0, 1, 2]


@pytest.mark.parametrize("content", [b"", b"nonsense", b'{"a": 1}', b"\xff"])
async def test_a_spoilt_cache_counts_as_empty(tmp_path: Path, content: bytes) -> None:
    path, workers = tmp_path / "devices.json", Workers()
    path.write_bytes(content)
    await measured((cpu(),), workers, MeasurementCache(path))
    assert workers.asked == [0]


async def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    facts = await measured((cpu(),), Workers(), MeasurementCache(blocked / "devices.json"))
    assert len(facts) == 1


@pytest.mark.parametrize("flops_per_s", [0.0, float("nan"), float("inf")])
async def test_impossible_figures_are_refused(tmp_path: Path, flops_per_s: float) -> None:
    cache = MeasurementCache(tmp_path / "devices.json")
    with pytest.raises(NotReady, match="measuring cpu gave"):
        await measured((cpu(),), Workers(flops_per_s), cache)
    assert cache.fresh(cpu(), "float32", NOW_S) is None


async def test_benchmarks_take_turns(tmp_path: Path) -> None:
    order: list[str] = []

    async def bench(name: str) -> None:
        async with benchmark_turn(folder=tmp_path) as has_turn:
            order.append(f"{name} {has_turn}")
            await asyncio.sleep(0.03)
            order.append(name)

    await asyncio.gather(bench("a"), bench("b"))
    assert order == ["a True", "a", "b True", "b"]


async def test_the_wait_for_a_turn_is_bounded(tmp_path: Path) -> None:
    async with (
        benchmark_turn(folder=tmp_path),
        asyncio.timeout(1.0),
        benchmark_turn(folder=tmp_path, patience_s=0.05) as has_turn,
    ):
        assert not has_turn


HOLDER = """
import asyncio, sys
from pathlib import Path
from daemon.compute.devices import benchmark_turn

async def main():
    async with benchmark_turn(folder=Path(sys.argv[1])):
        print("mine", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_another_daemon_s_turn_ends_when_it_is_killed(tmp_path: Path) -> None:
    holder = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLDER, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert holder.stdout is not None
    async with asyncio.timeout(10.0):
        assert await holder.stdout.readline() == b"mine\n"
    async with benchmark_turn(folder=tmp_path, patience_s=0.1) as has_turn:
        assert not has_turn
    holder.kill()
    async with benchmark_turn(folder=tmp_path, patience_s=5.0) as has_turn:
        assert has_turn
    await holder.wait()


async def test_without_a_lock_file_measuring_goes_on(tmp_path: Path) -> None:
    async with benchmark_turn(folder=tmp_path / "missing") as has_turn:
        assert not has_turn
