"""What a lab looks like: hosts in sites, and the directed links between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from hexmesh.errors import InvalidInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One direction between two hosts."""

    latency_s: float = 0.0
    jitter_s: float = 0.0
    """Uniform extra latency up to this. Packets of a link stay in order."""
    rate_bytes_per_s: float | None = None
    """Of Ethernet frames, headers and gap included; None is unlimited."""
    loss: float = 0.0
    """Chance of each packet to vanish. Segmentation offload is off at the sender while it is not 0."""
    queue_s: float = 0.05
    """A packet that finds a longer backlog is dropped."""
    is_up: bool = True

    def __post_init__(self) -> None:
        if min(self.latency_s, self.jitter_s, self.queue_s) < 0:
            raise InvalidInput(f"a link cannot have negative times: {self}")
        if not 0 <= self.loss <= 1:
            raise InvalidInput(f"loss {self.loss} is not within 0 to 1")
        if self.rate_bytes_per_s is not None and self.rate_bytes_per_s <= 0:
            raise InvalidInput(f"a rate of {self.rate_bytes_per_s} bytes/s carries nothing; cut the link")


SAME_SITE = Link(latency_s=0.0001, rate_bytes_per_s=1.25e9)


@dataclass(frozen=True, slots=True)
class Topology:
    """Sites with their hosts, and links between sites or hosts; a host's own name beats its site's."""

    sites: Mapping[str, tuple[str, ...]]
    links: Mapping[tuple[str, str], Link]
    """From source to destination, each a host or a site. Both ways need two entries: see `both_ways`."""
    same_site: Link = SAME_SITE
    site_of: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        site_of = {host: site for site, hosts in self.sites.items() for host in hosts}
        if len(site_of) != sum(len(hosts) for hosts in self.sites.values()) or set(site_of) & set(self.sites):
            raise InvalidInput("every host and every site needs a name of its own")
        for end in {end for pair in self.links for end in pair} - set(site_of) - set(self.sites):
            raise InvalidInput(f"a link names {end!r}, which is neither a host nor a site")
        object.__setattr__(self, "site_of", site_of)
        for src, dst in self.pairs():
            self.link(src, dst)

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Every ordered pair of hosts."""
        return ((src, dst) for src in self.site_of for dst in self.site_of if src != dst)

    def link(self, src: str, dst: str) -> Link:
        """How `src` reaches `dst` at first. Raises InvalidInput when nothing says."""
        src_site, dst_site = self.site_of[src], self.site_of[dst]
        for pair in ((src, dst), (src, dst_site), (src_site, dst), (src_site, dst_site)):
            if pair in self.links:
                return self.links[pair]
        if src_site == dst_site:
            return self.same_site
        raise InvalidInput(f"no link leads from {src} ({src_site}) to {dst} ({dst_site})")

    def hosts_of(self, name: str) -> tuple[str, ...]:
        """The hosts of a site, or the host itself. Raises InvalidInput."""
        if name in self.site_of:
            return (name,)
        if name not in self.sites:
            raise InvalidInput(f"{name!r} is neither a host nor a site of this lab")
        return tuple(self.sites[name])


def both_ways(links: Mapping[tuple[str, str], Link]) -> dict[tuple[str, str], Link]:
    """`links`, and the same in the other direction."""
    return {(b, a): link for (a, b), link in links.items()} | dict(links)
