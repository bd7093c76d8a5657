"""`hexmesh doctor`: looks at this host and says what would keep a daemon from taking part."""
