"""`hexmesh wait`: for scripts that go on when the mesh can serve."""

from __future__ import annotations

import time

import click

from daemon.terminal.client import Client
from daemon.verbs.options import Duration, client_of, daemon_flags, flag
from hexmesh.errors import Lost, NotReady

_POLL_S = 0.2
_ASK_TIMEOUT_S = 5.0


@click.command()
@flag(
    "--ready",
    "Wait until this peer can answer a request. Implied when nothing else is asked.",
    verb="wait",
    is_flag=True,
)
@flag("--nodes", "Wait until N nodes are alive.", verb="wait", type=click.IntRange(min=1), metavar="N")
@flag("--plan-id", "Wait until this plan runs.", verb="wait", metavar="ID")
@flag("--timeout", "Give up after this time.", verb="wait", type=Duration(), default="60s", show_default=True)
@daemon_flags
def wait(
    ready: bool,
    nodes: int | None,
    plan_id: str | None,
    timeout: float,
    url: str | None,
    state_dir: str | None,
    api_key_file: str | None,
) -> None:
    """Wait for the mesh; exit 3 and name the blocker when time is up."""
    wants_ready = ready or (nodes is None and plan_id is None)
    deadline_s = time.monotonic() + timeout
    shown: NotReady | None = None
    while True:
        # The daemon may start only now and pick its port, so its address is looked up each time.
        client = client_of(url, state_dir, api_key_file)
        left_s = deadline_s - time.monotonic()
        blocker = find_blocker(
            client,
            wants_ready=wants_ready,
            n_nodes=nodes,
            plan_id=plan_id,
            timeout_s=min(_ASK_TIMEOUT_S, max(left_s, 0.1)),
        )
        if blocker is None:
            return
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise NotReady(
                f"gave up after {timeout:g} s: {blocker.message}",
                code=blocker.code,
                next_step=blocker.next_step,
            )
        if shown is None or shown.message != blocker.message:
            click.echo(f"waiting: {blocker.message}", err=True)
            shown = blocker
        time.sleep(min(_POLL_S, left_s))


def find_blocker(
    client: Client, *, wants_ready: bool, n_nodes: int | None, plan_id: str | None, timeout_s: float
) -> NotReady | None:
    """What stands in the way now, or None. A refusal (a wrong key) is raised: waiting cannot cure it."""
    try:
        if wants_ready:
            answer = client.get_json("/ready", also_ok=(503,), timeout_s=timeout_s)
            if answer.get("ready") is not True:
                return blocker_of(answer)
        if n_nodes is None and plan_id is None:
            return None
        status = client.get_json("/admin/status", timeout_s=timeout_s)
    except Lost as error:
        return NotReady(error.message, code=error.code, next_step=error.next_step)
    except NotReady as error:
        return error
    if n_nodes is not None and status["nodes_alive"] < n_nodes:
        return NotReady(
            f"{status['nodes_alive']} of {n_nodes} nodes are alive",
            code="too_few_nodes",
            next_step="let more nodes join (`hexmesh token create` prints how)",
        )
    if plan_id is not None and status["plan_id"] != plan_id:
        return NotReady(
            f"plan {status['plan_id'] or 'none'} runs, not {plan_id}",
            code="other_plan",
            next_step="see `hexmesh plan`",
        )
    return None


def blocker_of(readiness: dict[str, object]) -> NotReady:
    """The blocker that `/ready` names."""
    blocker = readiness.get("blocker")
    said = blocker if isinstance(blocker, dict) else {}
    return NotReady(
        str(said.get("message") or "the mesh is not ready"),
        code=str(said.get("code") or ""),
        next_step=str(said.get("next_step") or "see `hexmesh status`"),
    )
