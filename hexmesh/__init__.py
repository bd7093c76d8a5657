"""hexmesh decides: planning, coordination, serving policy and stage runtime, without sockets or clocks."""

__version__ = "0.1.0"
