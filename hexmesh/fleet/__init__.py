"""A fleet that somebody describes in a file, and the cluster that plans are made over.

The format is documented in docs/fleets/README.md, which a test holds to these structs.
"""

from hexmesh.fleet.change import Scenario, what_if
from hexmesh.fleet.expand import cluster_of
from hexmesh.fleet.file import Fleet, read_fleet
from hexmesh.fleet.snapshot import fleet_of
from hexmesh.fleet.write import write_fleet

__all__ = ["Fleet", "Scenario", "cluster_of", "fleet_of", "read_fleet", "what_if", "write_fleet"]
