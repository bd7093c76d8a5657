"""What a model is to the planner: exact parameter counts, KV bytes and FLOPs, from its config.json alone."""

from hexmesh.model_spec.spec import LayerSpec, ModelSpec, model_spec_from_config, supported_model_types

__all__ = ["LayerSpec", "ModelSpec", "model_spec_from_config", "supported_model_types"]
