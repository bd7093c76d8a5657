"""The search for plans: which devices make which replicas, their layouts, the certificate and the explanation."""
