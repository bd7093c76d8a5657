"""The rendezvous node: a stable address with a DHT and a relay, no model and no part in plans."""
