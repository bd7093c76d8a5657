"""Coverage-guided fuzzing of everything that reads strangers' bytes: `python -m tools.fuzz --seconds 60`."""
