"""The HTTP surface: OpenAI-compatible routes, plain generation, admin reads, metrics."""
