"""Fits the catalogue's efficiency factors to published measurements: `python -m tools.efficiency`."""
