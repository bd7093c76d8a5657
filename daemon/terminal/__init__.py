"""What a person at the terminal sees: tables, the demo, logs, and the client that asks a daemon."""
