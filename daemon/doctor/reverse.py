"""Do the others reach this host? Only they can tell, through this host's own daemon.

A node counts as alive exactly when it hears this one and this one hears it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from daemon.config import JoinOptions
from daemon.doctor.finding import Finding, failed, not_run, passed, warned
from daemon.runfile import Run
from daemon.terminal.client import Client, read_admin_key
from hexmesh.errors import HexmeshError, Refused

CHECK = "reverse reach"
_DEADLINE_S = 2.0


def check_reverse(
    options: JoinOptions, run: Run | None, reached: Collection[str], api_key: str | None = None
) -> Finding:
    """`reached` are the ids of the nodes whose peer port answered this host."""
    if run is None:
        return not_run(
            CHECK,
            "no daemon runs here: whether others reach this host is seen only with daemons on both sides",
            "hexmesh join, then hexmesh doctor again; or hexmesh doctor --peer THIS_HOST:PORT on another host",
        )
    client = Client(url=run.http_url, api_key=api_key or _own_key(options.state_dir))
    try:
        status = client.get_json("/admin/status", timeout_s=_DEADLINE_S)
        members = client.get_json("/admin/members", timeout_s=_DEADLINE_S)
        links = client.get_json("/admin/links", timeout_s=_DEADLINE_S)
        return judge(status["node"], members, links, reached, status.get("undialable_by", []))
    except Refused as error:
        return not_run(CHECK, error.message, "run this as the daemon's user, or set HEXMESH_API_KEY")
    except HexmeshError as error:
        return failed(CHECK, f"process {run.pid} runs and its HTTP fails: {error.message}", "see its log")
    except (KeyError, TypeError):
        return failed(CHECK, f"what answers at {run.http_url} is no hexmesh daemon", "see run.json")


def judge(
    own: str,
    members: list[dict[str, Any]],
    links: list[dict[str, Any]],
    reached: Collection[str],
    undialable_by: Sequence[str] = (),
) -> Finding:
    """What members and links, as the daemon here shows them, say of the way back to this node.

    `undialable_by`: members that told this node that they cannot dial it, and why.
    """
    others = [member for member in members if member["id"] != own and member["state"] != "left"]
    if not others:
        return not_run(
            CHECK, "this node is alone in its mesh: nobody can tell", "ask again once others joined"
        )
    port = next((member["address"].rpartition(":")[2] for member in members if member["id"] == own), "")
    one_way = [member["name"] for member in others if member["state"] != "alive" and member["id"] in reached]
    if one_way:
        return failed(
            CHECK,
            f"reached from here, and not both ways: {', '.join(one_way)}",
            f"let TCP port {port} and the DHT's into this host (firewall, NAT: --advertise); "
            "if that node has just started, wait",
        )
    alive = [member for member in others if member["state"] == "alive"]
    if not alive:
        return not_run(CHECK, "no other node is alive: nobody can tell", "see hexmesh members")
    if undialable_by:
        return warned(
            CHECK,
            f"cannot be dialled by {'; '.join(undialable_by)}: connections that this host dials, and relays where "
            "neither can, carry its traffic",
            f"let TCP port {port} into this host (firewall, NAT: --advertise IP:PORT)",
        )
    measured = {link["from"] for link in links if link["to"] == own}
    silent = [member["name"] for member in alive if member["id"] not in measured]
    if silent:
        return warned(
            CHECK,
            f"alive, and no link from there to here is measured: {', '.join(silent)}",
            "wait a minute and see hexmesh links",
        )
    return passed(CHECK, f"{len(alive)} of {len(others)} other nodes are alive, heard and hearing")


def _own_key(state_dir: Path) -> str | None:
    try:
        return read_admin_key(state_dir)
    except Refused:
        return None
