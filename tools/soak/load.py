"""Clients that stream from random nodes all the time, and judge every answer."""

from __future__ import annotations

import json
import random
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Literal, Self

from daemon.terminal.client import error_of_event
from daemon.terminal.local_mesh import LocalDaemon
from hexmesh.errors import HexmeshError, Lost

Verdict = Literal["exact", "refused", "failed", "gateway died", "wrong tokens", "ended without a word"]
ALLOWED: tuple[Verdict, ...] = ("exact", "refused", "failed", "gateway died")
"""`refused` and `failed` come with a reason; the last two verdicts break a promise, and so does a late end."""
PAUSE_S = 0.2
"""After a refusal, as a client with manners."""
DYING_S = 2.0


@dataclass(frozen=True, slots=True)
class Question:
    prompt: list[int]
    right_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one request ended."""

    verdict: Verdict
    said: str
    """The reason that the node gave, if it did not answer in full."""
    asked: str
    n_tokens: int
    took_s: float
    longest_gap_s: float
    """Between two tokens, or the request and its first one."""
    gap_began_s: float
    """When that was, on the monotonic clock."""


@dataclass(slots=True)
class Load:
    """Owner of the client threads; entered means that they run. Read `outcomes` after it is closed."""

    daemons: Callable[[], Sequence[LocalDaemon]]
    questions: Sequence[Question]
    n_clients: int
    seed: int
    outcomes: list[Outcome] = field(default_factory=list)
    _is_over: threading.Event = field(default_factory=threading.Event)
    _pool: ThreadPoolExecutor = field(init=False)
    _clients: list[Future[None]] = field(init=False)

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(self.n_clients, thread_name_prefix="client")
        self._clients = [self._pool.submit(self._ask_on, index) for index in range(self.n_clients)]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_over.set()
        for client in self._clients:
            client.result()
        self._pool.shutdown()

    def _ask_on(self, index: int) -> None:
        rng = random.Random(f"{self.seed}/{index}")
        while not self._is_over.is_set():
            daemon = rng.choice([one for one in self.daemons() if one.up])
            question = rng.choice(self.questions)
            n_tokens = rng.randint(1, len(question.right_tokens))
            outcome = ask(daemon, question, n_tokens)
            self.outcomes.append(outcome)
            if outcome.verdict != "exact":
                self._is_over.wait(PAUSE_S)


def ask(daemon: LocalDaemon, question: Question, n_tokens: int) -> Outcome:
    """Stream one answer and judge it. A node may break the connection only by dying."""
    body = {"prompt": question.prompt, "max_tokens": n_tokens, "ignore_eos": True, "stream": True}
    tokens: list[int] = []
    times_s = [time.monotonic()]
    end: dict[str, object] = {}
    said = ""
    verdict: Verdict
    try:
        for line in daemon.client.stream("/generate", body):
            event = json.loads(line)
            if event.get("token_id") is None:
                end = event
            else:
                tokens.append(event["token_id"])
                times_s.append(time.monotonic())
        if "error" in end:
            raise error_of_event(end)
        verdict = "exact" if end else "ended without a word"
    except Lost as lost:
        said = lost.message
        died = lost.code == "no_daemon" or ("error" not in end and _has_ended(daemon))
        verdict = "gateway died" if died else "failed" if "error" in end else "ended without a word"
    except HexmeshError as error:
        said = error.one_line()
        verdict = "failed" if tokens else "refused"
    whole = len(tokens) == n_tokens or verdict != "exact"
    if not whole or tokens != list(question.right_tokens[: len(tokens)]):
        verdict = "wrong tokens"
    times_s.append(time.monotonic())
    longest_gap_s, gap_began_s = max((after - before, before) for before, after in pairwise(times_s))
    return Outcome(
        verdict=verdict,
        said=said,
        asked=daemon.name,
        n_tokens=len(tokens),
        took_s=times_s[-1] - times_s[0],
        longest_gap_s=longest_gap_s,
        gap_began_s=gap_began_s,
    )


def _has_ended(daemon: LocalDaemon) -> bool:
    """Whether its process is gone; the connection's end may be seen a moment before the process's."""
    try:
        daemon.process.wait(timeout=DYING_S)
    except subprocess.TimeoutExpired:
        return False
    return True
