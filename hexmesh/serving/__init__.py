"""Serving policy in pure Python: sequences, block tables, batches and the choice of replica."""
