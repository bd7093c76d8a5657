"""hexmesh acts: the per-host daemon, its HTTP surface and its command line."""
