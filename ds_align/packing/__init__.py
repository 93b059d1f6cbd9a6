"""Global batches into packs: the order of rows, what stands where (plan), the tensors of it (pack)."""

from ds_align.packing.ahead import make_ahead
from ds_align.packing.cost import CostModel
from ds_align.packing.order import epoch_order, global_batch_rows
from ds_align.packing.pack import build_batch
from ds_align.packing.plan import StepPlan, plan_scoring, plan_step
from ds_align.packing.table import Group, PreferenceTable

__all__ = [
    "CostModel",
    "Group",
    "PreferenceTable",
    "StepPlan",
    "build_batch",
    "epoch_order",
    "global_batch_rows",
    "make_ahead",
    "plan_scoring",
    "plan_step",
]
