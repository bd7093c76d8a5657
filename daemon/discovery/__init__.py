"""How nodes learn of each other: signed records, over the DHT and over peer connections."""
