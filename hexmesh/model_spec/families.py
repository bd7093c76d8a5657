"""All architectures that have formulas, by "model_type"."""

from __future__ import annotations

from hexmesh.model_spec.dense import DENSE
from hexmesh.model_spec.family import Family
from hexmesh.model_spec.sparse import SPARSE
from hexmesh.model_spec.ungated import UNGATED

FAMILIES: dict[str, Family] = {**DENSE, **SPARSE, **UNGATED}
