"""Status, members, links and requests as tables for people. Unknown is a dash."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from daemon.views import CertificateView, LinkView, MemberView, RequestView, StatusView, TokenView
from hexmesh.ids import short
from hexmesh.units import show_bit_rate, show_bytes, show_duration

_UNLIMITED_COLUMNS = 1000
_STATE_COLOUR = {"alive": "green", "joining": "cyan", "suspect": "yellow", "failed": "red", "left": "dim"}


def status_view(status: StatusView, names: Mapping[str, str]) -> RenderableType:
    """One peer and its mesh, a fact a line; `names` are the nodes' by id."""
    coordinator = status.coordinator
    blocks = status.kv_blocks
    facts: list[tuple[str, str | Text]] = [
        ("node", f"{status.name} ({short(status.node)})"),
        ("mesh", f"{short(status.mesh)}, {status.nodes_alive} nodes alive"),
        ("model", status.model),
        ("ready", Text("yes", "green") if status.ready else Text("no", "red")),
        ("coordinator", names.get(coordinator, short(coordinator)) if coordinator else "none"),
        ("plan", status.plan_id or "none"),
        *([("replicas", _whole(status))] if status.replicas > 1 else []),
        ("requests", f"{status.requests_running} running, {status.requests_waiting} waiting"),
        (
            "KV blocks",
            f"{blocks.free} free, {blocks.used} used, {blocks.cached} cached, {blocks.leased} leased",
        ),
    ]
    if (weights := status.weights) is not None:
        left = f", {show_duration(weights.left_s)} left" if weights.left_s is not None else ""
        fetched = f"{show_bytes(weights.fetched_bytes)} of {show_bytes(weights.needed_bytes)}"
        facts.append(("weights", f"{fetched} fetched, {show_bytes(weights.bytes_per_s)}/s{left}"))
    if status.certificate is not None:
        facts.append(("certificate", _certificate(status.certificate)))
    if status.blocker is not None:
        facts.append(("blocker", f"{status.blocker.message} ({status.blocker.code})"))
        facts.append(("next step", status.blocker.next_step))
    grid = Table.grid(padding=(0, 2))
    for name, fact in facts:
        grid.add_row(Text(name, "dim"), fact)
    return grid


def _whole(status: StatusView) -> str | Text:
    if status.replicas_whole == status.replicas:
        return f"{status.replicas}"
    return Text(f"{status.replicas_whole} of {status.replicas} are whole", "yellow")


def members_table(members: Iterable[MemberView]) -> RenderableType:
    """One node a row."""
    table = new_table("NAME", "ID", "ADDRESS", "SITE", "STATE", "ROLES", "AGE", "RTT", "VERSION")
    for member in members:
        table.add_row(
            member.name,
            short(member.id),
            member.address,
            member.site,
            _state(member),
            ",".join(member.roles) or "-",
            _seconds(member.age_s),
            _seconds(member.rtt_s),
            member.version,
        )
    return table


def _state(member: MemberView) -> Text:
    """The state, and where that is not all: what its operator said of it, and what its certificate lacks."""
    shown = Text(member.state, _STATE_COLOUR[member.state])
    if member.availability not in ("active", "left"):
        shown.append(f", {member.availability}", "yellow")
    if member.certificate not in (None, "valid"):
        shown.append(f", certificate: {member.certificate}", "yellow")
    return shown


def tokens_table(tokens: Iterable[TokenView], names: Mapping[str, str]) -> RenderableType:
    """One token a row; `names` are the nodes' by id."""
    table = new_table("ID", "USES LEFT", "EXPIRES IN", "BY")
    for token in tokens:
        by = names.get(token.issuer, short(token.issuer))
        table.add_row(token.id, f"{token.uses_left} of {token.uses}", show_duration(token.expires_s), by)
    return table


def links_table(links: Iterable[LinkView], names: Mapping[str, str]) -> RenderableType:
    """One direction of a link a row; `names` are the nodes' by id."""
    table = new_table("FROM", "TO", "RTT P50", "RTT P95", "RATE", "PATH", "AGE", "USED")
    for link in links:
        rate = "-" if link.bytes_per_s is None else show_bit_rate(link.bytes_per_s)
        table.add_row(
            names.get(link.src, short(link.src)),
            names.get(link.dst, short(link.dst)),
            _seconds(link.rtt_p50_s),
            _seconds(link.rtt_p95_s),
            f">= {rate}" if link.lower_bound else rate,
            "relayed" if link.relayed else "direct",
            _seconds(link.age_s),
            "yes" if link.in_use else "-",
        )
    return table


def requests_table(requests: Iterable[RequestView]) -> RenderableType:
    """One request a row."""
    table = new_table(
        "ID", "STATE", "REPLICA", "STAGE", "ROLE", "PROMPT", "OUTPUT", "AGE", "TRIES", "KV HANDOFF"
    )
    for request in requests:
        table.add_row(
            request.id,
            request.state,
            request.replica or "-",
            "-" if request.stage is None else str(request.stage),
            request.role,
            f"{request.prompt_tokens} tok",
            f"{request.output_tokens} tok",
            show_duration(request.age_s),
            str(request.attempts),
            request.kv_handoff or "-",
        )
    return table


class WholeTable(Table):
    """A table that a narrow terminal wraps rather than cuts: what it shows can be copied."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from super().__rich_console__(console, options.update(width=_UNLIMITED_COLUMNS))


def new_table(*columns: str) -> Table:
    """A table without rules: headers and rows, as wide as its cells."""
    table = WholeTable(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _certificate(certificate: CertificateView) -> Text:
    match certificate.state:
        case "valid":
            return Text(f"valid for {show_duration(certificate.expires_s)}, then renewed")
        case "grace":
            left = show_duration(max(0.0, certificate.refused_s))
            return Text(f"not renewed: refused in {left}; no issuer is reached", "red")
        case "expired":
            return Text("expired", "red")


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else show_duration(seconds)
