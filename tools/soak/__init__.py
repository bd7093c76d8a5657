"""Random kills, hangs and cuts against a mesh under load, and the search for what they leave behind."""
