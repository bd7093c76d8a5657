"""One search a file, each after its source."""
