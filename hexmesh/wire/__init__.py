"""Message types, codec and sans-I/O framing: what travels between daemons and to workers."""
