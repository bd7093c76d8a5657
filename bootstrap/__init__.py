"""The rendezvous node for peers that cannot be dialled. Not built yet: every node of a mesh must be reachable."""
