"""The topology at a glance: who holds which layers, over which links, how full, how fast, and what limits it.

Made of text lines so that it reads the same in 80 columns, in a pipe and in a log. Colours come only on a
terminal and never carry meaning alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console, RenderableType
from rich.text import Text

from daemon.views import DeviceView, LinkView, NodeView, ReplicaView, StageView, TopologyView
from hexmesh.ids import short
from hexmesh.units import show_bit_rate, show_bytes, show_duration, show_flops

TOPOLOGY_COLUMNS = 100
"""Wider lines are harder to read, however wide the terminal."""

_LEAST_NAME_COLUMNS = 8
_NODE_COLOUR = {"alive": "green", "joining": "cyan", "suspect": "yellow", "failed": "red", "left": "dim"}


@dataclass(frozen=True, slots=True)
class Glyphs:
    """What lines between nodes are drawn with."""

    line: str
    arrow: str


UNICODE = Glyphs(line="─", arrow="→")
ASCII = Glyphs(line="-", arrow="->")


def new_console(stream: TextIO) -> Console:
    """A console on `stream`."""
    return Console(file=stream, highlight=False, emoji=False, markup=False)


def glyphs_for(console: Console) -> Glyphs:
    """Box characters where the output's encoding has them."""
    return UNICODE if console.encoding.lower().startswith("utf") else ASCII


def print_on(console: Console, shown: RenderableType) -> None:
    """Print without trailing blanks; what the output's encoding lacks becomes a question mark."""
    with console.capture() as capture:
        console.print(shown, crop=False)
    text = "".join(line.rstrip() + "\n" for line in capture.get().splitlines())
    console.file.write(text.encode(console.encoding, "replace").decode(console.encoding))
    console.file.flush()


def topology_view(view: TopologyView, *, width: int = 80, glyphs: Glyphs = UNICODE) -> RenderableType:
    """The whole picture of one mesh."""
    return Text("\n").join(TopologyLines(view, width, glyphs).all())


@dataclass(frozen=True, slots=True)
class TopologyLines:
    """Draws one topology line by line."""

    view: TopologyView
    width: int
    glyphs: Glyphs

    def all(self) -> Iterator[Text]:
        yield from self.header()
        for replica in self.view.replicas:
            yield Text()
            yield from self.replica(replica)
        yield from self.flows()
        for site in sorted({node.site for node in self.view.nodes}):
            yield Text()
            yield from self.site(site)
        yield from self.links_in_use()
        yield from self.findings()

    def header(self) -> Iterator[Text]:
        view = self.view
        coordinator = self.name(view.coordinator) if view.coordinator else "none"
        line = Text.assemble(
            ("mesh ", "dim"), (short(view.mesh_id), "bold"), ("  model ", "dim"), (view.model, "bold"),
            ("  term ", "dim"), str(view.term), ("  coordinator ", "dim"), coordinator,
        )  # fmt: skip
        yield line
        if view.plan_id is None:
            yield Text("no plan yet", "yellow")
            return
        age = f", {show_duration(view.plan_age_s)} old" if view.plan_age_s is not None else ""
        reason = f": {view.plan_reason}" if view.plan_reason else ""
        yield Text.assemble(("plan ", "dim"), view.plan_id, age, reason)

    def replica(self, replica: ReplicaView) -> Iterator[Text]:
        facts = [] if replica.is_whole else ["BROKEN"]
        facts += [f"predicted {_tokens_per_s(replica.predicted_tokens_per_s)}"]
        if replica.measured_tokens_per_s is not None:
            facts.append(f"measured {_tokens_per_s(replica.measured_tokens_per_s)}")
        if (free := kv_free_share(replica)) is not None:
            facts.append(f"KV free {free:.0%}")
        if replica.requests_running is not None:
            facts.append(f"run {replica.requests_running}")
        yield Text.assemble((f"PIPELINE {replica.id}", "bold"), f" {replica.role}  ", "  ".join(facts))
        yield from _wrapped(self.hops(replica), self.width)

    def hops(self, replica: ReplicaView) -> Iterator[str]:
        """`tokyo-1[0-3] ─0.3 ms, 9.4 Gbit/s→` for each stage; the last one without its arrow."""
        links = {(link.src, link.dst): link for link in self.view.links}
        for index, stage in enumerate(replica.stages):
            if index + 1 == len(replica.stages):
                yield self.stage(stage)
                return
            following = replica.stages[index + 1].node
            arrow = self.arrow(links.get((stage.node, following)), stage.node == following)
            yield f"{self.stage(stage)} {arrow}"

    def stage(self, stage: StageView) -> str:
        start, stop = stage.layers
        layers = f"{start}-{stop - 1}" if stop - start > 1 else f"{start}"
        parallel = f" TP{stage.tp}" if stage.tp > 1 else ""
        return f"{self.name(stage.node)}[{layers}{parallel}]"

    def arrow(self, link: LinkView | None, is_same_node: bool) -> str:
        line, head = self.glyphs.line, self.glyphs.arrow
        if is_same_node:
            return f"{line}here{head}"
        if link is None:
            return f"{line}{head}"
        return f"{line}{_link_facts(link, '/')}{head}"

    def flows(self) -> Iterator[Text]:
        """How requests are shared, where there is a choice, and which way KV goes from replica to replica."""
        flows = self.view.flows
        if len(flows) > 1 or any(flow.src != flow.dst for flow in flows):
            yield Text()
            for flow in flows:
                to = "" if flow.src == flow.dst else f" {self.glyphs.arrow} {flow.dst}"
                yield Text(f"  {'KV ' if to else ''}{flow.src}{to}  {flow.share:.0%} of requests")

    def site(self, site: str) -> Iterator[Text]:
        yield Text.assemble(("SITE ", "bold"), (site, "bold"))
        for node in self.view.nodes:
            if node.site == site:
                yield from self.node(node)

    def node(self, node: NodeView) -> Iterator[Text]:
        coordinates = "  coordinator" if node.id == self.view.coordinator else ""
        said = f", {node.availability}" if node.availability not in ("active", "left") else ""
        yield Text.assemble(
            f"  {node.name}  ", (node.state, _NODE_COLOUR[node.state]), (said, "yellow"), coordinates
        )
        for device in node.devices:
            yield Text(self.device(device))

    def device(self, device: DeviceView) -> str:
        columns = [_device_facts(other) for node in self.view.nodes for other in node.devices]
        widths = [max(len(facts[index]) for facts in columns) for index in range(3)]
        facts = "".join(
            f"  {fact:>{width}}" for fact, width in zip(_device_facts(device), widths, strict=True)
        )
        head = f"    {device.kind}:{device.index} "
        room = max(self.width - len(head) - len(facts), _LEAST_NAME_COLUMNS)
        return f"{head}{_cut(device.name, room):<{room}}{facts}"

    def links_in_use(self) -> Iterator[Text]:
        links = [link for link in self.view.links if link.in_use]
        if not links:
            return
        yield Text()
        yield Text("LINKS IN USE", "bold")
        pairs = [f"{self.name(link.src)} {self.glyphs.arrow} {self.name(link.dst)}" for link in links]
        widest = max(len(pair) for pair in pairs)
        for pair, link in zip(pairs, links, strict=True):
            yield Text(f"  {pair:<{widest}}  {_link_facts(link)}{_link_notes(link)}")

    def findings(self) -> Iterator[Text]:
        view = self.view
        if view.bottleneck is not None or view.unused:
            yield Text()
        if view.bottleneck is not None:
            busy = "" if view.bottleneck.utilisation is None else f", {view.bottleneck.utilisation:.0%} busy"
            yield Text.assemble(
                ("bottleneck ", "yellow"), f"{view.bottleneck.kind} {self.named(view.bottleneck.id)}{busy}"
            )
        for unused in view.unused:
            device = self.device_label(unused.node, unused.device)
            yield Text.assemble(("unused ", "yellow"), f"{self.name(unused.node)} {device}: {unused.reason}")

    def name(self, node_id: str) -> str:
        return next((node.name for node in self.view.nodes if node.id == node_id), short(node_id))

    def named(self, identifier: str) -> str:
        """`identifier` with the nodes' names for their ids."""
        for node in self.view.nodes:
            identifier = identifier.replace(node.id, node.name)
        return identifier

    def device_label(self, node_id: str, index: int) -> str:
        for node in self.view.nodes:
            for device in node.devices:
                if node.id == node_id and device.index == index:
                    return f"{device.kind}:{index}"
        return f"device {index}"


def kv_free_share(replica: ReplicaView) -> float | None:
    """Free share of the pool that limits the replica: its stages' smallest; None while any is unknown."""
    shares: list[float] = []
    for stage in replica.stages:
        if stage.kv_blocks_free is None or not stage.kv_blocks:
            return None
        shares.append(stage.kv_blocks_free / stage.kv_blocks)
    return min(shares, default=None)


def show_byte_rate(bytes_per_s: float) -> str:
    """A memory's rate for people, such as "9.8 GB/s"."""
    for unit, factor in (("TB/s", 1e12), ("GB/s", 1e9), ("MB/s", 1e6)):
        if bytes_per_s >= factor:
            return f"{bytes_per_s / factor:.1f} {unit}"
    return f"{bytes_per_s / 1e3:.1f} kB/s"


def used_of(used_bytes: int, budget_bytes: int) -> str:
    """Used and budget, with the unit once where it is the same: "6.1/8.0 MiB"."""
    used, used_unit = show_bytes(used_bytes).split()
    budget, budget_unit = show_bytes(budget_bytes).split()
    return f"{used}{'' if used_unit == budget_unit else f' {used_unit}'}/{budget} {budget_unit}"


def _tokens_per_s(rate: float) -> str:
    return f"{rate:.1f} tok/s"


def _device_facts(device: DeviceView) -> tuple[str, str, str]:
    flops = show_flops(device.flops_per_s) if device.flops_per_s is not None else "-"
    rate = show_byte_rate(device.bytes_per_s) if device.bytes_per_s is not None else "-"
    return used_of(device.used_bytes, device.budget_bytes), flops, rate


def _link_facts(link: LinkView, separator: str = ", ") -> str:
    facts: list[str] = []
    if link.rtt_p50_s is not None:
        facts.append(show_duration(link.rtt_p50_s))
    if link.bytes_per_s is not None:
        facts.append(("at least " if link.lower_bound else "") + show_bit_rate(link.bytes_per_s))
    return separator.join(facts) or "not measured"


def _link_notes(link: LinkView) -> str:
    notes: list[str] = []
    if link.rtt_p95_s is not None:
        notes.append(f"p95 {show_duration(link.rtt_p95_s)}")
    if link.relayed:
        notes.append("relayed")
    if link.age_s is not None:
        notes.append(f"{show_duration(link.age_s)} ago")
    return "".join(f"  {note}" for note in notes)


def _wrapped(words: Iterable[str], width: int) -> Iterator[Text]:
    """Lines of `words`, indented, broken only between them."""
    line = ""
    for word in words:
        if line and len(line) + 1 + len(word) > width:
            yield Text(line)
            line = ""
        line = f"{line} {word}" if line else f"  {word}"
    if line:
        yield Text(line)


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else text[: max(room - 2, 0)] + ".."
