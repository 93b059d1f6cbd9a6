"""The only room that imports DeepSpeed: the policy, the reference, and both as one engine."""

from ds_align.engine.align_engine import AlignEngine
from ds_align.engine.policy import PolicyEngine, StepResult
from ds_align.engine.reference import ReferenceEngine

__all__ = ["AlignEngine", "PolicyEngine", "ReferenceEngine", "StepResult"]
