"""A model's description (manifest, config, tokenizer) from members, for a node that has nothing but the model's id."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from daemon.models.cached_model import About, CachedModel
from daemon.models.weight_cache import WeightCache
from daemon.models.weight_fetch import STALL_S, read_blob
from daemon.peering.bulk import BulkSocket
from hexmesh.errors import HexmeshError, NotReady, Refused
from hexmesh.units import show_bytes
from hexmesh.weights.manifest import FileEntry, Manifest, decode_manifest
from hexmesh.wire.codec import BULK_QUESTIONS
from hexmesh.wire.frames import Buffer
from hexmesh.wire.peering import MemberAddress, ModelReference
from hexmesh.wire.weights import ANSWER_LIMITS, QUESTION_LIMITS, WantFile, WantManifest

log = logging.getLogger("hexmesh.weights")
progress_log = logging.getLogger("hexmesh.progress")

PATIENCE_S = 60.0
_PAUSE_S = 1.0
_ANSWER_S = 60.0


async def describe_from_peers(
    reference: ModelReference,
    cache: WeightCache,
    members: Sequence[MemberAddress],
    dial: Callable[[MemberAddress], Awaitable[BulkSocket]],
) -> None:
    """Put the model's description into the cache, checked against the model's id.

    Raises NotReady when nobody gives it within a minute.
    """
    deadline_s = time.monotonic() + PATIENCE_S
    troubles: dict[str, str] = {}
    while True:
        for member in members:
            try:
                sock = await dial(member)
                model = await asyncio.to_thread(_ask, sock, reference, cache)
            except NotReady:  # this node's own disk
                raise
            except HexmeshError as error:
                troubles[member.name] = error.message
                log.info("no description of the model from node=%s reason=%s", member.name, error.message)
            else:
                progress_log.info(
                    "got the description of %s (%s in %d tensors) from %s; weights come when they are needed",
                    reference.name,
                    show_bytes(model.manifest.weight_bytes),
                    len(model.manifest.tensors),
                    member.name,
                    extra={"event": "weights"},
                )
                return
        if not members or time.monotonic() >= deadline_s:
            said = "; ".join(f"{name}: {trouble}" for name, trouble in troubles.items()) or "none is known"
            raise NotReady(
                f"the mesh's model {reference.name} is not on this host, and no other node describes it ({said})",
                code="model_not_here",
                next_step="start a node that has the model, or name its folder here with --model",
            )
        await asyncio.sleep(_PAUSE_S)


def _ask(sock: BulkSocket, reference: ModelReference, cache: WeightCache) -> CachedModel:
    with sock:
        sock.prepare(ANSWER_LIMITS, STALL_S)
        question = WantManifest(model_id=reference.model_id)
        encoded = bytes(_answer(sock, BULK_QUESTIONS.frame(question, limits=QUESTION_LIMITS)))
        manifest: Manifest = decode_manifest(encoded, reference.model_id)
        files = {file.name: _file(sock, reference.model_id, file) for file in manifest.files}
    model = cache.model(reference.model_id, manifest)
    model.describe(encoded, About(name=reference.name, folder=None), files)
    return model


def _file(sock: BulkSocket, model_id: str, file: FileEntry) -> bytes:
    question = WantFile(model_id=model_id, name=file.name)
    data = bytes(_answer(sock, BULK_QUESTIONS.frame(question, limits=QUESTION_LIMITS)))
    if hashlib.sha256(data).digest() != file.digest:
        raise Refused(f"its {file.name} is not the model's", code="corrupt_range")
    return data


def _answer(sock: BulkSocket, question: list[Buffer]) -> memoryview:
    sock.send(question)
    return read_blob(sock.receive(time.monotonic() + _ANSWER_S))
