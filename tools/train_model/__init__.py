"""Makes the small model that ships with hexmesh, and the text that it learns from.

`python -m tools.train_model --out hexmesh/assets/model`; see docs/model.md.
"""
