"""Stages of a model on a device: the only place that imports torch, transformers and safetensors.

This module itself imports none of them, so that importing a neighbour by name stays cheap.
"""
