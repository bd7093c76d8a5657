"""A greedy stream in whose middle something happens, and the longest gap between two of its tokens."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from daemon.terminal.local_mesh import LocalDaemon

QUESTION = "What is a KV cache?"
N_TOKENS = 300
AT_TOKEN = 60


@dataclass(slots=True)
class DisturbedStream:
    """One answer through one node; `disturb` is called once, at token `at_token`."""

    daemon: LocalDaemon
    n_tokens: int = N_TOKENS
    at_token: int = AT_TOKEN
    disturb: Callable[[], None] = lambda: None
    tokens: list[int] = field(default_factory=list)
    stall_s: float = 0.0
    disturbed_s: float = 0.0
    """When `disturb` returned, on the monotonic clock."""

    def run(self) -> Self:
        """Read the answer to its end. Raises what the client raises when it ends with an error."""
        body = {"prompt": QUESTION, "max_tokens": self.n_tokens, "ignore_eos": True, "stream": True}
        last_s = 0.0
        for line in self.daemon.client.stream("/generate", body):
            event = json.loads(line)
            if "error" in event:
                raise SystemExit(f"the stream ended with an error: {event['error']}")
            if event.get("token_id") is None:
                continue
            now_s = time.monotonic()
            if self.tokens:
                self.stall_s = max(self.stall_s, now_s - last_s)
            last_s = now_s
            self.tokens.append(event["token_id"])
            if len(self.tokens) == self.at_token:
                self.disturb()
                self.disturbed_s = time.monotonic()
        return self
