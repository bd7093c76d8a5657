"""What steps say of the figures that plans are made from, told to the mesh now and then.

Of this node's devices those say something that ran on them, of ways those that it drove.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from daemon.pipeline import StepTrace
from hexmesh.calibration import Factors, Fit, Trip, WayFit, work_of
from hexmesh.cluster import Link
from hexmesh.membership.records import DeviceFacts
from hexmesh.model_spec import ModelSpec
from hexmesh.plan import DTYPE_BYTES, DtypeName, Stage
from hexmesh.wire.data import Row

log = logging.getLogger("hexmesh.calibration")

EVERY = 8
"""One step in so many is looked at: that costs some 50 us."""
TELL_S = 60.0
"""A fit is made so often at most, and the first one after as long."""
NEWS, WAY_NEWS_S = 0.1, 2e-4
"""What has changed by less is not told."""


@dataclass(slots=True)
class _Known:
    """Of one device."""

    fit: Fit
    told: Factors | None = None


class Calibrator:
    """Owner of the fits of this node's devices and of the ways that its steps take."""

    def __init__(
        self,
        spec: ModelSpec,
        dtype: DtypeName,
        *,
        group: asyncio.TaskGroup,
        links: Callable[[], Mapping[tuple[str, str], Link]],
        on_news: Callable[[], None],
    ) -> None:
        self._spec = spec
        self._dtype = dtype
        self._group = group
        self._links = links
        self._on_news = on_news
        self.way_s: float | None = None
        """As told: what a way takes beside its link."""
        self._ways = WayFit()
        self._known: dict[int, _Known] = {}
        self._n_steps = 0
        self._looked_s = time.monotonic()

    def measured(self, devices: Iterable[DeviceFacts]) -> None:
        """The figures that corrections are of; what was known for others is void."""
        self._known = {facts.device.index: _Known(Fit(facts.device)) for facts in devices}

    def timed(self, stage: Stage, rows: Sequence[Row], seconds: float) -> None:
        """A step of those rows took so long on a stage here. Stages over several devices are left out."""
        self._n_steps += 1
        known = self._known.get(stage.devices[0])
        if self._n_steps % EVERY or known is None or len(stage.devices) > 1:
            return
        known.fit.observe(work_of(self._spec, self._dtype, stage.start, stage.stop, rows), seconds)
        self._look_if_due()

    def travelled(self, trace: StepTrace) -> None:
        """A step that this node drove was answered."""
        payload_bytes = trace.n_tokens * self._spec.hidden_size * DTYPE_BYTES[self._dtype]
        trip = Trip([stage.node for stage in trace.replica.stages], payload_bytes, trace.transit_s)
        queue_s = sum(trace.queue_seconds)
        self._ways.observe(trip, n_rows=trace.n_rows, n_tokens=trace.n_tokens, queue_s=queue_s)
        self._look_if_due()

    def _look_if_due(self) -> None:
        if time.monotonic() - self._looked_s >= TELL_S:
            self._looked_s = time.monotonic()
            self._group.create_task(self._look(), name="calibrate")

    def corrected(self, devices: Iterable[DeviceFacts]) -> tuple[DeviceFacts, ...]:
        """The devices with what is known of them."""
        told = {index: known.told for index, known in self._known.items()}
        return tuple(
            msgspec.structs.replace(facts, factors=told.get(facts.device.index)) for facts in devices
        )

    async def _look(self) -> None:
        """Fit anew, beside the loop, and tell the mesh if something changed."""
        is_news = self._look_at_ways()
        for index, known in self._known.items():
            found = await asyncio.to_thread(known.fit.copy().factors)
            if found is not None and found.differs(known.told, NEWS):
                log.info(
                    "device %d reaches flops=%.2f bytes=%.2f of what was measured; "
                    "launch_s=%.6f step_s=%.5f row_s=%.6f",
                    index,
                    found.flops,
                    found.bytes,
                    found.launch_s,
                    found.step_s,
                    found.row_s,
                )
                known.told, is_news = found, True
        if is_news:
            self._on_news()

    def _look_at_ways(self) -> bool:
        """Whether there is news."""
        found, told = self._ways.way_s(self._links()), self.way_s
        if found is None or (told is not None and abs(found - told) <= max(NEWS * told, WAY_NEWS_S)):
            return False
        log.info("a way takes %.5f s beside its link", found)
        self.way_s = found
        return True
