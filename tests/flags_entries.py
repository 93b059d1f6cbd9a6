"""What an entry of the table of settings is, and the run that every entry changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tests.distributed.tiny import ds_config, reference_ds_config

# WORK stands for the directory of the models and data that flags_program.py writes.
SHARED = {
    "model_name_or_path": "WORK/policy",
    "dataset_path": "WORK/pairs.jsonl",
    "ds_config": ds_config(1),
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "logging_steps": 1,
}
WITH_REFERENCE = {"ref_model_name": "WORK/reference", "ref_ds_config": reference_ds_config()}
NO_REFERENCE = {"ref_model_name": None, "ref_ds_config": None}
EXTRA = {
    "dpo": WITH_REFERENCE,
    "ipo": WITH_REFERENCE,
    "kto": WITH_REFERENCE | {"dataset_path": "WORK/unpaired.jsonl"},
    "cpo": {},
    "simpo": {},
}
TRAINING = "losses grad_norms weights"
ALIKE = "losses grad_norms learning_rates"
EVALUATED = {"eval_dataset_path": "WORK/heldout.jsonl"}


@dataclass(frozen=True)
class Effect:
    """`changes` on top of `base` must change the parts in `differs` and must not change those in `same`."""

    changes: dict
    differs: str = ""
    same: str = ""
    base: dict = field(default_factory=dict)
    method: str = "dpo"
    holds: Callable[[dict], bool] | None = None


@dataclass(frozen=True)
class Refused:
    """`changes` must end in an error that holds these words."""

    changes: dict
    words: str
    method: str = "dpo"


def settings_of(entry: Effect | Refused) -> tuple[str, dict]:
    """(method, settings) of the changed run."""
    return entry.method, {**unchanged(entry)[1], **entry.changes}


def unchanged(entry: Effect | Refused) -> tuple[str, dict]:
    """(method, settings) of the run that the changed one is held against."""
    return entry.method, {**SHARED, **EXTRA[entry.method], **getattr(entry, "base", {})}
