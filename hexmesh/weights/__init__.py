"""A model as what can be checked and fetched piece by piece: its manifest, and who fetches which piece from whom."""
