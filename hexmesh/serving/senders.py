"""Who may send which message of the data plane: a member speaks for its own part of a plan alone.

The connection proves who the sender is, and the plan says what its part is. So a member can spoil only the
replicas that it holds a stage of, and only the sequences that entered at its own gateway.
"""

from __future__ import annotations

from hexmesh.ids import short
from hexmesh.plan import Plan, Replica
from hexmesh.wire.data import (
    Generate,
    GenerateCancel,
    ReplicaIdle,
    ReplicaStats,
    Step,
    StepRefused,
    StepResult,
)

Judged = Step | StepResult | StepRefused | ReplicaIdle | ReplicaStats | Generate | GenerateCancel
"""Answers to a gateway are judged there: it alone knows which driver it asked."""


def sender_fault(src: str, message: Judged, plan: Plan | None) -> str | None:
    """Why `src` may not send this, in words; None if it may.

    `plan` is that of the message's epoch. Without one nothing is known of who may speak, and nothing of ours is
    in that epoch that could be spoilt.
    """
    if isinstance(message, (Generate, GenerateCancel)):
        return None if message.sequence.startswith(f"{src}/") else "it names a sequence of another gateway"
    if plan is None:
        return None
    replica = next((one for one in plan.replicas if one.id == message.replica), None)
    if replica is None:
        return f"it names replica {message.replica[:40]!r}, which its epoch does not have"
    match message:
        case Step():
            return _step_fault(src, message, replica)
        case StepResult():
            return _unless(src, replica.stages[-1].node, "results come from the last stage")
        case StepRefused():
            return _refusal_fault(src, message, replica)
        case ReplicaIdle() | ReplicaStats():
            return _unless(src, replica.driver, "word of a replica comes from its driver")


def _step_fault(src: str, step: Step, replica: Replica) -> str | None:
    if not 0 <= step.stage < len(replica.stages):
        return f"replica {replica.id} has no stage {step.stage}"
    if step.driver != replica.driver:
        return "a step names another driver than the plan"
    before = replica.driver if step.stage == 0 else replica.stages[step.stage - 1].node
    return _unless(src, before, f"steps for stage {step.stage} come from the one before")


def _refusal_fault(src: str, refusal: StepRefused, replica: Replica) -> str | None:
    if not 0 <= refusal.stage < len(replica.stages):
        return f"replica {replica.id} has no stage {refusal.stage}"
    return _unless(
        src, replica.stages[refusal.stage].node, f"stage {refusal.stage} alone may refuse for itself"
    )


def _unless(src: str, expected: str, rule: str) -> str | None:
    return None if src == expected else f"{rule}, which is node {short(expected)}"
