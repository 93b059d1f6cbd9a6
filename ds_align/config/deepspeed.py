"""DeepSpeed's JSON, made complete: keys checked, "auto" resolved, disagreement refused.

DeepSpeed itself ignores an unknown top-level key, takes a section's "auto" for its default (bf16 "auto"
is off) and clips at 1.0 where nothing is said; so everything is decided here. Nothing in this module
imports deepspeed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_align.config.base import BaseConfig
from ds_align.config.deepspeed_files import read_ds_config
from ds_align.config.deepspeed_keys import REFUSED_KEYS, SECTION_KEYS, TOP_LEVEL_KEYS
from ds_align.config.fields import Precision
from ds_align.config.schema import join_messages, nearest
from ds_align.errors import ConfigError

AUTO = "auto"
DEFAULT_REFERENCE = "zero_inference"
# DeepSpeed prints its own progress line every so many steps; the trainer has a better one.
NEVER_PRINT = 10**9
# The sizes that Hugging Face gives to "auto", from the width of the model.
BUCKET_RULES = {
    "reduce_bucket_size": lambda hidden: hidden * hidden,
    "stage3_prefetch_bucket_size": lambda hidden: 9 * hidden * hidden // 10,
    "stage3_param_persistence_threshold": lambda hidden: 10 * hidden,
}
PRECISION_SECTIONS = {"bf16": "bfloat16", "fp16": "float16"}


@dataclass(slots=True)
class _Draft:
    """A JSON on its way to being complete: where it came from, its values, and what is wrong with it."""

    source: str
    values: dict[str, Any]
    problems: list[str] = field(default_factory=list)

    def settle(self, section: dict[str, Any], key: str, value: Any, why: str, *, prefix: str = "") -> None:
        """Set `key` where it is absent or "auto"; an equal value stays, another one is a problem."""
        given = section.get(key, AUTO)
        if given == AUTO:
            section[key] = value
        elif given != value or isinstance(given, bool) != isinstance(value, bool):
            self.problems.append(
                f'{prefix}{key}={json.dumps(given)} is not {why}; set {json.dumps(value)}, "auto", '
                "or change the run's setting"
            )

    def raise_problems(self) -> None:
        """Raise ConfigError with every problem, each after the source's name."""
        if self.problems:
            raise ConfigError(join_messages(f"{self.source}: {problem}" for problem in self.problems))


def zero_stage(ds_values: Mapping[str, Any]) -> int:
    """Return the ZeRO stage of a DeepSpeed JSON; 0 where it says nothing."""
    return int(ds_values.get("zero_optimization", {}).get("stage", 0))


def resolved_precision(ds_values: Mapping[str, Any]) -> Precision:
    """Return the model's precision that a resolved DeepSpeed JSON asks for."""
    if ds_values.get("bf16", {}).get("enabled"):
        return "bfloat16"
    return "float16" if ds_values.get("fp16", {}).get("enabled") else "float32"


def resolve_policy_config(
    config: BaseConfig, *, world_size: int, hidden_size: int, device: str
) -> dict[str, Any]:
    """Return config.ds_config with every value decided, ready for deepspeed.initialize.

    world_size counts data-parallel ranks; hidden_size is the model's width, for the bucket sizes; device
    is "cpu" or "cuda". Batch, clipping and optimizer values come from `config`; ZeRO, offload and buckets
    from the JSON; precision from either. Gradient accumulation is the caller's: any number of forward and
    backward passes, then one engine.step(). With optim sgd there is no optimizer section: the caller
    passes torch.optim.SGD. Raises ConfigError with every unknown key, disagreement and unresolved "auto".
    """
    source, values = read_ds_config(config.ds_config)
    draft = _Draft(source, values)
    _check_keys(draft)
    # Sections are read below; a file whose structure is wrong cannot be judged further.
    draft.raise_problems()
    _settle_batch(draft, config, world_size)
    _settle_precision(draft, config, device)
    draft.settle(
        values, "gradient_clipping", float(config.max_grad_norm), f"max_grad_norm={config.max_grad_norm:g}"
    )
    _settle_optimizer(draft, config)
    _settle_zero(draft, hidden_size, device)
    _settle_accumulation(draft)
    _settle_reporting(draft)
    _check_nvme(draft)
    _check_no_auto(draft)
    draft.raise_problems()
    return values


def derive_reference_config(
    config: BaseConfig,
    policy_config: Mapping[str, Any],
    *,
    hidden_size: int,
    device: str,
    largest_partition: Callable[[], int] | None = None,
) -> dict[str, Any]:
    """Return the reference's DeepSpeed JSON: ZeRO stage 3 without an optimizer, parameters off the device.

    It comes from config.ref_ds_config, or the shipped zero_inference; precision and batch size are those
    of `policy_config`, which must be resolved. largest_partition: elements of a rank's part of the largest
    weight, for the buffers of NVMe; asked for only there. Raises ConfigError like resolve_policy_config.
    """
    source, values = read_ds_config(config.ref_ds_config or DEFAULT_REFERENCE, setting="ref_ds_config")
    draft = _Draft(source, values)
    _check_keys(draft)
    draft.raise_problems()
    if zero_stage(values) != 3:
        draft.problems.append(f"zero_optimization.stage={zero_stage(values)}; the reference needs stage 3")
    for key in ("optimizer", "gradient_clipping"):
        if values.get(key, AUTO) != AUTO:
            draft.problems.append(f"{key}: the reference is never trained; leave it out")
        values.pop(key, None)
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"):
        draft.settle(values, key, policy_config[key], f"the policy's {policy_config[key]}")
    for key in PRECISION_SECTIONS:
        section = _open_section(values, key)
        enabled = bool(policy_config.get(key, {}).get("enabled"))
        draft.settle(section, "enabled", enabled, "the policy's precision", prefix=f"{key}.")
    if "offload_optimizer" in values["zero_optimization"]:
        draft.problems.append(
            "zero_optimization.offload_optimizer: the reference has no optimizer; leave it out"
        )
    _settle_zero(draft, hidden_size, device)
    _settle_reporting(draft)
    _check_nvme(draft)
    offload = values["zero_optimization"].get("offload_param") or {}
    if largest_partition is not None and offload.get("buffer_size") == AUTO:
        offload["buffer_size"] = largest_partition()
    _check_no_auto(draft)
    draft.raise_problems()
    return values


def _open_section(values: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the section, made empty where it is absent or "auto" as a whole."""
    if values.get(key, AUTO) == AUTO:
        values[key] = {}
    return values[key]


def _check_keys(draft: _Draft) -> None:
    for key, value in draft.values.items():
        if key in REFUSED_KEYS:
            if value != AUTO:
                draft.problems.append(f"{key}: {REFUSED_KEYS[key]}")
        elif key not in TOP_LEVEL_KEYS:
            draft.problems.append(
                f"unknown key {key!r}, which DeepSpeed would ignore{nearest(key, TOP_LEVEL_KEYS)}"
            )
    for key in REFUSED_KEYS:
        draft.values.pop(key, None)
    for path, known in SECTION_KEYS.items():
        _check_section(draft, path, known)
    stage = draft.values.get("zero_optimization", {})
    stage = stage.get("stage", 0) if isinstance(stage, dict) else 0
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        draft.problems.append(f"zero_optimization.stage={json.dumps(stage)}; expected 0, 1, 2 or 3")


def _check_section(draft: _Draft, path: tuple[str, ...], known: frozenset[str]) -> None:
    section: Any = draft.values
    for name in path:
        # DeepSpeed takes null for an absent section inside zero_optimization, but not at the top.
        absent = AUTO if len(path) == 1 else None
        section = section.get(name, absent) if isinstance(section, dict) else None
    if (section is None and len(path) > 1) or (section == AUTO and len(path) == 1):
        return
    label = ".".join(path)
    if not isinstance(section, dict):
        draft.problems.append(f"{label}={json.dumps(section)}; expected an object")
        return
    for key in section:
        if key not in known:
            draft.problems.append(f"unknown key {label}.{key}{nearest(key, known)}")


def _settle_batch(draft: _Draft, config: BaseConfig, world_size: int) -> None:
    micro, steps = config.per_device_train_batch_size, config.gradient_accumulation_steps
    draft.settle(
        draft.values, "train_micro_batch_size_per_gpu", micro, f"per_device_train_batch_size={micro}"
    )
    draft.settle(
        draft.values, "gradient_accumulation_steps", steps, f"gradient_accumulation_steps={steps} of the run"
    )
    total = micro * steps * world_size
    given = draft.values.get("train_batch_size", AUTO)
    if given not in (AUTO, total):
        draft.problems.append(
            f"train_batch_size={json.dumps(given)} is not {micro} * {steps} * {world_size} = {total} "
            "(per_device_train_batch_size * gradient_accumulation_steps * ranks); "
            f'set {total}, "auto", or change a factor'
        )
    draft.values["train_batch_size"] = total


def _settle_precision(draft: _Draft, config: BaseConfig, device: str) -> None:
    """Fill bf16 and fp16: from config.dtype, else from what the JSON turns on, else from the device."""
    sections = {key: _open_section(draft.values, key) for key in PRECISION_SECTIONS}
    turned_on = [name for key, name in PRECISION_SECTIONS.items() if sections[key].get("enabled") is True]
    if len(turned_on) > 1:
        draft.problems.append("bf16.enabled and fp16.enabled are both true; turn one off")
        return
    wanted = config.dtype or (turned_on[0] if turned_on else _default_precision(sections, config, device))
    why = f"what dtype={wanted} asks for"
    for key, name in PRECISION_SECTIONS.items():
        draft.settle(sections[key], "enabled", wanted == name, why, prefix=f"{key}.")
    accumulated = draft.values.get("data_types", {}).get("grad_accum_dtype", AUTO)
    if accumulated not in (AUTO, "fp32", "bf16", "fp16"):
        draft.problems.append(
            f"data_types.grad_accum_dtype={json.dumps(accumulated)}; expected fp32, bf16 or fp16"
        )
    if wanted == "bfloat16" and zero_stage(draft.values) > 0:
        # Sums over many packs in bfloat16 lose the small gradients.
        types = draft.values.setdefault("data_types", {})
        types["grad_accum_dtype"] = (
            "fp32" if types.get("grad_accum_dtype", AUTO) == AUTO else types["grad_accum_dtype"]
        )
    elif "data_types" in draft.values and draft.values["data_types"].get("grad_accum_dtype") == AUTO:
        del draft.values["data_types"]["grad_accum_dtype"]


def _default_precision(
    sections: Mapping[str, Mapping[str, Any]], config: BaseConfig, device: str
) -> Precision:
    """Return the device's default, but float32 where the JSON turns bf16 off."""
    return "float32" if sections["bf16"].get("enabled") is False else config.resolved_dtype(device)


def _settle_optimizer(draft: _Draft, config: BaseConfig) -> None:
    values = draft.values
    offloaded = _offload_device(values, "offload_optimizer") != "none"
    wanted = _adam_section(config)
    if wanted is None:
        if values.pop("optimizer", AUTO) != AUTO:
            draft.problems.append(
                'optimizer: optim=sgd has no section; leave it out, set "auto", or change optim'
            )
        if offloaded:
            # DeepSpeed takes a client optimizer with offload only when told that it is meant.
            draft.settle(
                values, "zero_force_ds_cpu_optimizer", False, "what optim=sgd needs with offload_optimizer"
            )
        draft.settle(values, "zero_allow_untested_optimizer", True, "what optim=sgd needs")
        return
    if config.optim == "deepspeed_cpu_adam" and not offloaded:
        draft.problems.append(
            "optim=deepspeed_cpu_adam needs zero_optimization.offload_optimizer with device cpu or nvme; "
            "add it (as in zero3_offload) or set optim=adamw_torch"
        )
    section = _open_section(values, "optimizer")
    kind = section.get("type", AUTO)
    if kind not in (AUTO, wanted["type"]):
        draft.problems.append(
            f'optimizer.type={json.dumps(kind)} is not "AdamW", which optim={config.optim} means'
        )
    section["type"] = wanted["type"]
    params = _open_section(section, "params")
    for key in params:
        if key not in wanted["params"]:
            draft.problems.append(
                f"optimizer.params.{key}: the run's settings own the optimizer; leave it out"
            )
    for key, value in wanted["params"].items():
        draft.settle(params, key, value, f"the run's {json.dumps(value)}", prefix="optimizer.params.")


def _adam_section(config: BaseConfig) -> dict[str, Any] | None:
    """Return DeepSpeed's optimizer section for config.optim; None for sgd, which the caller builds."""
    if config.optim == "sgd":
        return None
    params: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": [config.adam_beta1, config.adam_beta2],
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.optim != "deepspeed_cpu_adam":
        params["torch_adam"] = True
    if config.optim == "adamw_torch_fused":
        params["fused"] = True
    return {"type": "AdamW", "params": params}


def _offload_device(values: Mapping[str, Any], name: str) -> str:
    return (values.get("zero_optimization", {}).get(name) or {}).get("device", "none")


def _settle_zero(draft: _Draft, hidden_size: int, device: str) -> None:
    """Resolve the sizes that depend on the model and the pinning that depends on the device."""
    zero = draft.values.setdefault("zero_optimization", {"stage": 0})
    for key, size in BUCKET_RULES.items():
        if zero.get(key) == AUTO:
            zero[key] = size(hidden_size)
    for name in ("offload_param", "offload_optimizer"):
        section = zero.get(name)
        # Pinned memory serves copies to a GPU only; on a CPU it is memory that cannot be paged out.
        if section is not None and section.get("pin_memory", AUTO) == AUTO:
            section["pin_memory"] = device != "cpu"
    if _offload_device(draft.values, "offload_param") != "none" and zero_stage(draft.values) != 3:
        draft.problems.append(
            f"zero_optimization.offload_param needs stage 3, found {zero_stage(draft.values)}"
        )
    if _offload_device(draft.values, "offload_optimizer") != "none" and zero_stage(draft.values) == 0:
        draft.problems.append("zero_optimization.offload_optimizer needs stage 1, 2 or 3, found 0")


def _settle_accumulation(draft: _Draft) -> None:
    """Hand the accumulation boundary to the caller, and refuse what that mode cannot do."""
    values, stage = draft.values, zero_stage(draft.values)
    draft.settle(values, "managed_gradient_accumulation", False, "what packed micro-batches need")
    if values["zero_optimization"].get("overlap_comm") is True and stage < 2:
        draft.problems.append(
            f"zero_optimization.overlap_comm=true needs stage 2 or 3 here, found {stage}; set false"
        )
    draft.settle(values, "gradient_allreduce_op", "mean", "the mean that the loss is scaled for")


def _settle_reporting(draft: _Draft) -> None:
    for key, value in (("steps_per_print", NEVER_PRINT), ("wall_clock_breakdown", False)):
        if draft.values.get(key, AUTO) == AUTO:
            draft.values[key] = value


def _check_nvme(draft: _Draft) -> None:
    """Refuse an nvme_path that cannot be written, which DeepSpeed finds out only after the model is built."""
    for name in ("offload_param", "offload_optimizer"):
        section = draft.values["zero_optimization"].get(name) or {}
        if section.get("device") != "nvme":
            continue
        path = section.get("nvme_path")
        label = f"zero_optimization.{name}.nvme_path"
        if not isinstance(path, str):
            draft.problems.append(f"{label} is missing; give a directory on a local NVMe disk")
        elif not Path(path).is_dir() or not os.access(path, os.W_OK):
            draft.problems.append(
                f"{label}={path!r} is no directory that can be written; make it or change the path"
            )


def _check_no_auto(draft: _Draft) -> None:
    for path in sorted(_auto_paths(draft.values)):
        draft.problems.append(f'{path}="auto" cannot be derived here; give a value or leave it out')


def _auto_paths(value: Any, path: str = "") -> set[str]:
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    else:
        return {path} if value == AUTO else set()
    return set().union(
        *(_auto_paths(child, f"{path}.{key}" if path else str(key)) for key, child in children)
    )
