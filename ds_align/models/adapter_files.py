"""Adapter directories as peft writes them: opened and checked; no model is needed."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ds_align.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

# What a LoRA adapter may say of itself besides peft's defaults. All else (DoRA, trained biases or heads,
# initial values that change the base) would need more than a second set of A and B to be a reference.
_SUPPORTED = frozenset(
    {"r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"}
    | {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights"}
    | {"task_type", "inference_mode", "base_model_name_or_path", "peft_type", "peft_version", "auto_mapping"}
)


@dataclass(frozen=True, slots=True)
class AdapterDirectory:
    """An adapter that peft saved: its settings, its weights as saved, and the base model that it names."""

    path: Path
    label: str
    settings: LoraConfig
    weights: dict[str, torch.Tensor]

    @property
    def base(self) -> str:
        """The base model: a directory (absolute, or relative to the working directory) or a Hub id."""
        return self.settings.base_model_name_or_path

    @classmethod
    def open(cls, path: str, *, setting: str = "model_name_or_path") -> AdapterDirectory:
        """Reads settings and weights (small) of an adapter directory.

        Raises ConfigError where it is broken, names no base, or is no plain LoRA adapter.
        """
        directory, label = Path(path), f"{setting}={path!r}"
        settings = _read_settings(directory / ADAPTER_CONFIG, label)
        return cls(directory, label, settings, _read_weights(directory, label))

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer lies beside the adapter."""
        return (self.path / "tokenizer_config.json").is_file()


def is_adapter_directory(path: str | Path) -> bool:
    """Whether a directory holds an adapter instead of a whole model."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


def _read_settings(file: Path, label: str) -> LoraConfig:
    from peft import LoraConfig

    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        kind = values.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{label}: {ADAPTER_CONFIG} cannot be read ({error}); copy the adapter again"
        ) from error
    if kind != "LORA":
        raise ConfigError(
            f"{label}: {ADAPTER_CONFIG} says peft_type {kind!r}; only LORA adapters can be trained on here; "
            "merge it into its base and give the whole model"
        )
    base = values.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{label}: {ADAPTER_CONFIG} names no base model; set base_model_name_or_path in it")
    defaults = LoraConfig()
    known = {name: value for name, value in values.items() if hasattr(defaults, name)}
    # A revision picks the base's version on the Hub; "main" is the one that loads anyway.
    known = {name: None if name == "revision" and value == "main" else value for name, value in known.items()}
    other = [name for name, value in values.items() if name not in known and value]
    settings = LoraConfig(**{name: value for name, value in known.items() if name != "runtime_config"})
    other += [
        name
        for name in known
        if name not in _SUPPORTED and getattr(settings, name) != getattr(defaults, name)
    ]
    if settings.init_lora_weights not in (True, False, "gaussian"):
        other.append("init_lora_weights")
    if other:
        named = ", ".join(f"{name}={values[name]!r}" for name in sorted(set(other)))
        raise ConfigError(
            f"{label}: {ADAPTER_CONFIG} has {named}, which is more than plain LoRA; "
            "merge the adapter into its base and give the whole model"
        )
    return settings


def _read_weights(directory: Path, label: str) -> dict[str, torch.Tensor]:
    from peft.utils.save_and_load import load_peft_weights
    from safetensors import SafetensorError

    present = [name for name in ADAPTER_WEIGHTS if (directory / name).is_file()]
    if not present:
        raise ConfigError(
            f"{label}: {ADAPTER_CONFIG} is there but no weights; "
            f"expected one of {', '.join(ADAPTER_WEIGHTS)}; copy the weights into the directory"
        )
    try:
        return load_peft_weights(str(directory), device="cpu")
    except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise ConfigError(
            f"{directory / present[0]}: not a whole file of weights ({' '.join(str(error).split())[:200]}); "
            "copy or download it again"
        ) from error
