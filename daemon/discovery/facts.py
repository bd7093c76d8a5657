"""Keeps this node's signed record fresh: a new one every 20 s, and at once when something changed."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import msgspec

from daemon.trust.attestor import Attestor
from hexmesh.errors import Refused
from hexmesh.membership.records import LIFETIME_S, MAX_LIFETIME_S, REFRESH_S, NodeRecord, sign_record

log = logging.getLogger("hexmesh.facts")

DEBOUNCE_S = 0.2
_LEAST_STEP_S = 0.001
_CLOCK_SLACK_S = 10.0


class RecordStamp(msgspec.Struct, frozen=True, kw_only=True):
    """What orders a node's records: both figures grow from record to record."""

    sequence: int
    expires_at_unix_s: float


class RecordClock:
    """Stamps this node's records. Owns the file that makes stamps grow across restarts.

    The DHT refuses an expiration that is not later than the last. A lost file does no harm, for stamps start
    from the wall clock; the file matters when the clock went back.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = self._read()

    def next(self, now_unix_s: float) -> RecordStamp:
        """The next stamp, written down before it is used. Writes a small file: call it off the event loop."""
        expires_at_unix_s = max(now_unix_s + LIFETIME_S, self._last.expires_at_unix_s + _LEAST_STEP_S)
        if expires_at_unix_s > now_unix_s + MAX_LIFETIME_S - _CLOCK_SLACK_S:
            # The clock was far ahead once. Others refuse such an expiration now, as they forgot the old one.
            expires_at_unix_s = now_unix_s + LIFETIME_S
        stamp = RecordStamp(
            sequence=max(int(now_unix_s * 1000), self._last.sequence + 1),
            expires_at_unix_s=expires_at_unix_s,
        )
        self._write(stamp)
        self._last = stamp
        return stamp

    def _read(self) -> RecordStamp:
        with suppress(FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
            return msgspec.json.decode(self._path.read_bytes(), type=RecordStamp)
        return RecordStamp(sequence=0, expires_at_unix_s=0.0)

    def _write(self, stamp: RecordStamp) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        draft.write_bytes(msgspec.json.encode(stamp))
        draft.replace(self._path)


class FactsPublisher:
    """Describes this node, signs the record and hands it to `publish` (the directory, peers, the DHT).

    `describe(stamp, now_unix_s)` makes the record and must take the stamp's sequence over.
    """

    def __init__(
        self,
        *,
        describe: Callable[[RecordStamp, float], NodeRecord],
        attestor: Attestor,
        clock: RecordClock,
        publish: Callable[[bytes], None],
        now_unix_s: Callable[[], float] = time.time,
    ) -> None:
        self._describe = describe
        self._attestor = attestor
        self._clock = clock
        self._publish = publish
        self._now_unix_s = now_unix_s
        self._changed = asyncio.Event()
        self._one_at_a_time = asyncio.Lock()
        self.latest: bytes | None = None
        """The last record that was published: what a peer that has just connected is sent."""

    def touch(self) -> None:
        """Something about this node changed: publish soon, several changes together."""
        self._changed.set()

    async def publish_now(self) -> bytes:
        """Make, sign and publish a record at once."""
        async with self._one_at_a_time:
            return await self._publish_next()

    async def _publish_next(self) -> bytes:
        now_unix_s = self._now_unix_s()
        stamp = await asyncio.to_thread(self._clock.next, now_unix_s)
        record = self._describe(stamp, now_unix_s)
        signed = sign_record(
            record,
            expires_at_unix_s=stamp.expires_at_unix_s,
            chain=self._attestor.chain,
            sign=self._attestor.sign,
        )
        self.latest = signed
        self._publish(signed)
        log.debug("record published sequence=%d bytes=%d", stamp.sequence, len(signed))
        return signed

    async def run(self) -> NoReturn:
        """Publish now, every 20 s, and after changes."""
        while True:
            self._changed.clear()
            try:
                await self.publish_now()
            except Refused as error:
                log.error("own record not published reason=%s", error.message)
            with suppress(TimeoutError):
                async with asyncio.timeout(REFRESH_S):
                    await self._changed.wait()
                    await asyncio.sleep(DEBOUNCE_S)
