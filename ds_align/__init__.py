"""ds_align: language models trained from preferences (DPO, IPO, KTO, CPO, SimPO) on DeepSpeed.

Importing this package loads no other package: each name is loaded at its first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ds_align.errors import CheckpointError, ConfigError, DataError, DsAlignError, NonFiniteError

if TYPE_CHECKING:
    from ds_align.arabic import ArabicDialectDatasetProcessor
    from ds_align.config import (
        BaseConfig,
        CPOConfig,
        DPOConfig,
        IPOConfig,
        KTOConfig,
        SimPOConfig,
    )
    from ds_align.config.custom import method
    from ds_align.engine import AlignEngine
    from ds_align.trainer import DPOTrainer, PreferenceTrainer, SimPOTrainer, Trainer, TrainOutput

__version__ = "0.1.0"

_LAZY = {
    "AlignEngine": "ds_align.engine",
    "ArabicDialectDatasetProcessor": "ds_align.arabic",
    "BaseConfig": "ds_align.config",
    "CPOConfig": "ds_align.config",
    "DPOConfig": "ds_align.config",
    "IPOConfig": "ds_align.config",
    "KTOConfig": "ds_align.config",
    "SimPOConfig": "ds_align.config",
    "method": "ds_align.config.custom",
    "DPOTrainer": "ds_align.trainer",
    "PreferenceTrainer": "ds_align.trainer",
    "SimPOTrainer": "ds_align.trainer",
    "TrainOutput": "ds_align.trainer",
    "Trainer": "ds_align.trainer",
}

__all__ = [
    "AlignEngine",
    "ArabicDialectDatasetProcessor",
    "BaseConfig",
    "CPOConfig",
    "CheckpointError",
    "ConfigError",
    "DPOConfig",
    "DPOTrainer",
    "DataError",
    "DsAlignError",
    "IPOConfig",
    "KTOConfig",
    "NonFiniteError",
    "PreferenceTrainer",
    "SimPOConfig",
    "SimPOTrainer",
    "TrainOutput",
    "Trainer",
    "method",
]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'ds_align' has no attribute {name!r}")
