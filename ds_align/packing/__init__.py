"""Global batches into packs: what stands where (plan), and the tensors of it (pack)."""

from ds_align.packing.pack import build_batch
from ds_align.packing.plan import (
    Group,
    PreferenceTable,
    StepPlan,
    epoch_order,
    global_batch_rows,
    plan_step,
)

__all__ = [
    "Group",
    "PreferenceTable",
    "StepPlan",
    "build_batch",
    "epoch_order",
    "global_batch_rows",
    "plan_step",
]
