"""Who coordinates, who is leased to whom, and which plan a host obeys: pure state machines."""
