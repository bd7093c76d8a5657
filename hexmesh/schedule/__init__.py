"""The search for plans: layout of one group by dynamic programming, its certificate and its explanation."""
