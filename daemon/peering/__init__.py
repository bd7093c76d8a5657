"""Connections between members: TLS, frames, who is up, and what links are measured to carry."""
