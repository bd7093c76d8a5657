"""Plans over a fleet: searches of several kinds behind one front door, one score and one certificate."""
