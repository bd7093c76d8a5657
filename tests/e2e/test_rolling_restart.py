"""A mesh whose nodes are restarted one after the other, while openai clients keep every peer busy."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache

import pytest
from openai import OpenAI

from daemon.models.model_source import resolve_model
from daemon.terminal.demo_memory import memory_for_exactly
from daemon.terminal.local_mesh import LocalMesh
from hexmesh.model_spec import model_spec_from_config
from tests.e2e.asking import expected, reference, token_ids

NAMES = ("one", "two", "three", "four")
QUESTIONS = ("What is a KV cache?", "What is a lease?", "What is a stage?")
N_TOKENS = 150
PAUSE_S = 0.2
"""Between an answer and the next question: nodes that start need some of the processor too."""
MAX_RETRIES = 20
"""Of the openai client, which waits as Retry-After says: enough for as long as its own peer restarts."""


@dataclass
class Client:
    """Asks one peer again and again until told to stop, and checks every answer."""

    url: str
    is_over: threading.Event
    n_answers: int = 0
    wrong: list[str] = field(default_factory=list)

    def run(self) -> None:
        with OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=MAX_RETRIES) as client:
            while not self.is_over.is_set():
                question = QUESTIONS[self.n_answers % len(QUESTIONS)]
                pieces = client.completions.create(
                    model=resolve_model().name,
                    prompt=token_ids(question),
                    max_tokens=N_TOKENS,
                    temperature=0,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
                answer = "".join(piece.choices[0].text for piece in pieces if piece.choices)
                self.n_answers += 1
                if answer != expected_text(question):
                    self.wrong.append(answer)
                self.is_over.wait(PAUSE_S)


@cache
def expected_text(question: str) -> str:
    text: str = reference()[1].decode(expected(token_ids(question), N_TOKENS), skip_special_tokens=True)
    return text


@pytest.fixture
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    """Four nodes of which any two hold the model, each on an HTTP port that it has again after a restart."""
    with LocalMesh(tmp_path_factory.mktemp("mesh")) as mesh:
        mesh.found("one", *flags("one"))
        for name in NAMES[1:]:
            mesh.join(name, *flags(name))
        mesh.await_ready()
        yield mesh


@cache
def flags(name: str) -> tuple[str, ...]:
    budget = memory_for_exactly(model_spec_from_config(resolve_model().config), 2)
    settings = ("--device", "cpu", "--threads", "1", "--min-nodes", "4", "--memory", str(budget))
    return (*settings, "--http-port", str(free_port()))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_rolling_restart_under_load_fails_no_request(mesh: LocalMesh) -> None:
    for question in QUESTIONS:
        expected_text(question)
    is_over = threading.Event()
    clients = [Client(daemon.url, is_over) for daemon in mesh.daemons]
    with ThreadPoolExecutor(len(clients)) as pool:
        runs = [pool.submit(client.run) for client in clients]
        try:
            for name in NAMES:
                before = [client.n_answers for client in clients]
                daemon = next(one for one in mesh.daemons if one.name == name)
                daemon.terminate()
                assert daemon.process.wait(timeout=120) == 0
                mesh.await_up(mesh.start(name, *flags(name)))
                mesh.await_ready(timeout_s=120)
                await_answers(mesh, clients, before, runs)
        finally:
            is_over.set()
        for run in runs:
            run.result(timeout=120)
    assert [client.wrong for client in clients] == [[]] * 4
    members = mesh.daemons[0].get("/admin/members")
    assert sorted((one["name"], one["state"]) for one in members) == sorted((name, "alive") for name in NAMES)


def await_answers(
    mesh: LocalMesh, clients: list[Client], before: list[int], runs: list[Future[None]]
) -> None:
    """Wait until every client got another answer; raises what one failed with."""

    def have_all() -> bool | None:
        for run in runs:
            if run.done():
                run.result()
        return True if all(one.n_answers > n for one, n in zip(clients, before, strict=True)) else None

    mesh.await_value(have_all, timeout_s=120, what="every client to get another answer")
