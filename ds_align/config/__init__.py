"""Settings: one flat, typed configuration a method; YAML, flags and DeepSpeed's JSON.

Importing this package needs pydantic and yaml only, so that help and validation are instant.
"""

from __future__ import annotations

from ds_align.config.base import BaseConfig
from ds_align.config.cli import parse_command_line
from ds_align.config.deepspeed import (
    derive_reference_config,
    resolve_policy_config,
    resolved_precision,
    zero_stage,
)
from ds_align.config.deepspeed_files import find_ds_config, read_ds_config
from ds_align.config.methods import (
    METHODS,
    CPOConfig,
    DPOConfig,
    IPOConfig,
    KTOConfig,
    MethodSpec,
    SimPOConfig,
)

__all__ = [
    "METHODS",
    "BaseConfig",
    "CPOConfig",
    "DPOConfig",
    "IPOConfig",
    "KTOConfig",
    "MethodSpec",
    "SimPOConfig",
    "derive_reference_config",
    "find_ds_config",
    "parse_command_line",
    "read_ds_config",
    "resolve_policy_config",
    "resolved_precision",
    "zero_stage",
]
