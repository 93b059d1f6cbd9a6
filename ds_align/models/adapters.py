"""LoRA adapters (arXiv:2106.09685) in a Hugging Face model: checked without weights, attached, switched.

An adapted layer computes W x + (lora_alpha / r) B A x with W frozen. The adapted layers take the places of
the model's own linear layers and the model keeps its class, so that all that works on a model still does.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ds_align.errors import ConfigError
from ds_align.models.adapter_files import AdapterDirectory

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

POLICY = "default"
REFERENCE = "reference"


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """Which adapters a model gets.

    settings: peft's, with base_model_name_or_path; its target modules are settled. weights: the values to
    start from, by saved name; None: new adapters, A drawn from seed and B zero. keeps_start: whether a frozen
    copy of the starting adapters stays in the model as the reference. wraps_head: whether the LM head has
    an adapter.
    """

    settings: LoraConfig
    seed: int
    weights: dict[str, torch.Tensor] | None
    keeps_start: bool
    wraps_head: bool


def new_settings(
    base: str, *, r: int, lora_alpha: float, lora_dropout: float, target_modules: Sequence[str] | None
) -> LoraConfig:
    """peft's settings of new adapters; target_modules None: every linear layer but the LM head."""
    from peft import LoraConfig

    every = target_modules is None or list(target_modules) == ["all-linear"]
    return LoraConfig(
        r=r,
        lora_alpha=int(lora_alpha) if float(lora_alpha).is_integer() else lora_alpha,
        lora_dropout=lora_dropout,
        target_modules="all-linear" if every else list(target_modules),
        task_type="CAUSAL_LM",
        bias="none",
        base_model_name_or_path=base,
    )


def plan_new(config: Any, settings: LoraConfig, *, seed: int, trust_remote_code: bool = False) -> AdapterPlan:
    """The plan of new adapters. config: the base's transformers config; no weight is read.

    Raises ConfigError for a target that is no linear layer of the model.
    """
    model = _empty_model(config, trust_remote_code=trust_remote_code)
    if not isinstance(settings.target_modules, str):
        _check_targets(model, sorted(settings.target_modules))
    settled = _inject_empty(model, settings)
    return AdapterPlan(settled, seed, None, keeps_start=False, wraps_head=_wraps_head(model))


def plan_trained(
    config: Any,
    adapter: AdapterDirectory,
    *,
    keeps_start: bool,
    wanted: LoraConfig | None = None,
    trust_remote_code: bool = False,
) -> AdapterPlan:
    """The plan of adapters that start as those of a directory.

    wanted: settings that the run gives as well. Raises ConfigError where the weights do not fit the base
    and where wanted says another thing than the directory.
    """
    model = _empty_model(config, trust_remote_code=trust_remote_code)
    try:
        settled = _inject_empty(model, adapter.settings)
    except ValueError as error:
        raise ConfigError(
            f"{adapter.label}: the adapter does not fit its base {adapter.base!r} "
            f"({' '.join(str(error).split())[:200]}); give the base that it was trained on"
        ) from error
    strange = [n for n in _adapted_names(model) if not _is_linear(model.get_submodule(n).get_base_layer())]
    if strange:
        raise ConfigError(
            f"{adapter.label}: the adapter changes {strange[0]}, which is no linear layer; "
            "merge the adapter into its base and give the whole model"
        )
    _check_weights(model, adapter)
    if wanted is not None:
        other = _empty_model(config, trust_remote_code=trust_remote_code)
        _inject_empty(other, wanted)
        _check_agreement(adapter, wanted, (_adapted_names(model), _adapted_names(other)))
    return AdapterPlan(settled, 0, adapter.weights, keeps_start=keeps_start, wraps_head=_wraps_head(model))


def attach(model: nn.Module, plan: AdapterPlan) -> None:
    """Freezes a model and puts the planned adapters into it, in the model's precision.

    The values do not depend on rank, world size or ZeRO stage. The base's weights may be partitioned; the
    adapters are whole until an engine partitions them.
    """
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    for name in (POLICY, REFERENCE) if plan.keeps_start else (POLICY,):
        _inject(model, plan.settings, name)
    generator = torch.Generator().manual_seed(plan.seed)
    for name, parameter in model.named_parameters():
        owner = _adapter_of(name)
        parameter.requires_grad_(owner == POLICY)
        if owner is None:
            continue
        parameter.data = _start_value(name, parameter.shape, plan, generator).to(parameter.device, dtype)
    for layer in adapted_layers(model):
        # peft's set_adapter would turn requires_grad on again.
        layer._active_adapter = [POLICY]  # noqa: SLF001


def adapted_layers(model: nn.Module) -> list[LoraLayer]:
    """The model's layers that have adapters."""
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


@contextlib.contextmanager
def reference_adapters(model: nn.Module) -> Iterator[None]:
    """While open, the model is the reference: its adapters' kept start where there is one, else adapters off.

    Only the way through the layers changes, no parameter and no requires_grad: ZeRO counts on both.
    """
    layers = adapted_layers(model)
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]  # noqa: SLF001
    try:
        for layer in layers:
            # peft's own switches change requires_grad.
            if REFERENCE in layer.lora_A:
                layer._active_adapter = [REFERENCE]  # noqa: SLF001
            else:
                layer._disable_adapters = True  # noqa: SLF001
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled  # noqa: SLF001


def saved_name(name: str) -> str:
    """The name under which peft saves and loads a parameter of an adapter."""
    return "base_model.model." + re.sub(rf"\.({POLICY}|{REFERENCE})\.weight$", ".weight", name)


def write_settings(settings: LoraConfig, directory: Path) -> None:
    """Writes adapter_config.json."""
    settings = copy.deepcopy(settings)
    settings.inference_mode = True
    settings.save_pretrained(str(directory))


def _adapter_of(name: str) -> str | None:
    """Which adapter a parameter belongs to; None for the base's own."""
    found = re.search(rf"\.lora_[AB]\.({POLICY}|{REFERENCE})\.weight$", name)
    return found[1] if found else None


def _start_value(name: str, shape: torch.Size, plan: AdapterPlan, generator: torch.Generator) -> torch.Tensor:
    """The float32 value that a parameter starts with, on the CPU."""
    if plan.weights is not None:
        return plan.weights[saved_name(name)].clone()
    value = torch.zeros(shape)
    if ".lora_A." in name:
        # The bound of nn.Linear's own start: uniform within 1 / sqrt(in_features).
        nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
    return value


def _inject(model: nn.Module, settings: LoraConfig, name: str) -> LoraConfig:
    """Adds adapters of one name; returns the settings with the target modules that peft settled on."""
    from peft import inject_adapter_in_model

    settings = copy.deepcopy(settings)
    # The values are set afterwards, and some of peft's ways to draw them would change the base.
    settings.init_lora_weights, settings.inference_mode = True, False
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        inject_adapter_in_model(settings, model, adapter_name=name)
    if not isinstance(settings.target_modules, str):
        settings.target_modules = sorted(settings.target_modules)
    return settings


def _inject_empty(model: nn.Module, settings: LoraConfig) -> LoraConfig:
    with torch.device("meta"):
        return _inject(model, settings, POLICY)


def _empty_model(config: Any, *, trust_remote_code: bool) -> nn.Module:
    """The architecture without memory for its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    linear = [name for name, module in model.named_modules() if _is_linear(module)]
    for target in targets:
        found = [name for name, _ in model.named_modules() if name == target or name.endswith(f".{target}")]
        if not found or not set(found) <= set(linear):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ConfigError(
                f"lora_target_modules: {target!r} names no linear layer of the model, whose linear layers "
                f"are {known}; name some of these, or leave it out for all but the head"
            )


def _wraps_head(model: nn.Module) -> bool:
    return any(layer is model.get_output_embeddings() for layer in adapted_layers(model))


def _adapted_names(model: nn.Module) -> list[str]:
    layers = set(adapted_layers(model))
    return sorted(name for name, module in model.named_modules() if module in layers)


def _check_weights(model: nn.Module, adapter: AdapterDirectory) -> None:
    """Every adapter parameter of an empty model must be in the file, in its shape, and nothing else."""
    expected = {saved_name(n): tuple(p.shape) for n, p in model.named_parameters() if ".lora_" in n}
    found = {name: tuple(weight.shape) for name, weight in adapter.weights.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise ConfigError(
            f"{adapter.label}: {len(wrong)} weights of the adapter do not fit its base {adapter.base!r} "
            f"({name}: expected shape {expected.get(name, 'none')}, found {found.get(name, 'none')}); "
            "give the base that it was trained on, in the adapter's own files"
        )


def _check_agreement(
    adapter: AdapterDirectory, wanted: LoraConfig, adapted: tuple[list[str], list[str]]
) -> None:
    """Raises ConfigError where the run's lora_* values are not the adapter's."""
    pairs = {
        "lora_r": (adapter.settings.r, wanted.r),
        "lora_alpha": (adapter.settings.lora_alpha, wanted.lora_alpha),
    }
    other = [f"{name}={mine} (the adapter's: {its})" for name, (its, mine) in pairs.items() if its != mine]
    if adapted[0] != adapted[1]:
        names = [sorted({name.rpartition(".")[2] for name in part}) for part in adapted]
        other.append(f"lora_target_modules={','.join(names[1])} (the adapter's: {','.join(names[0])})")
    if other:
        raise ConfigError(
            f"{adapter.label}: this run says {', '.join(other)}; the adapter's shape is fixed: "
            "leave out use_lora and the lora_* settings, or give the adapter's values"
        )
