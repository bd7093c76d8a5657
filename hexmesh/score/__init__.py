"""What a replica can do at best, in steady state: the analytic score that searches compare layouts by."""

from hexmesh.score.capacity import Capacities, Decode, Mixed, Prefill
from hexmesh.score.pipeline import Hop, Pipeline, Seat, pipeline_of

__all__ = ["Capacities", "Decode", "Hop", "Mixed", "Pipeline", "Prefill", "Seat", "pipeline_of"]
