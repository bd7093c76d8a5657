"""A task group for services that run until they are told to stop."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from contextvars import Context
from typing import Any, TypeVar

T = TypeVar("T")


class ServiceGroup(asyncio.TaskGroup):
    """As a TaskGroup; `stop` cancels every task in it, so that leaving the block does not wait for ever.

    A task that fails still ends the block with its error: a service that dies is a bug, and must be seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self._running: set[asyncio.Task[Any]] = set()

    def create_task(
        self,
        coro: Generator[Any, None, T] | Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        context: Context | None = None,
    ) -> asyncio.Task[T]:
        task: asyncio.Task[T] = super().create_task(coro, name=name, context=context)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    def stop(self) -> None:
        """Cancel everything that runs."""
        for task in list(self._running):
            task.cancel()
