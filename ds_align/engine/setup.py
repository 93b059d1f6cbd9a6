"""What is known of a run before a model loads: its models, tokenizer and DeepSpeed configs, checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ds_align import distributed
from ds_align.batch import Layout
from ds_align.config import (
    METHODS,
    BaseConfig,
    derive_reference_config,
    resolve_policy_config,
    resolved_precision,
)
from ds_align.config.schema import changed
from ds_align.engine.init import check_ds_config, check_precision
from ds_align.engine.nvme import check_nvme, largest_partition
from ds_align.errors import ConfigError
from ds_align.models import (
    AdapterDirectory,
    AdapterPlan,
    ModelSource,
    choose_layout,
    is_adapter_directory,
    load_tokenizer,
    num_experts,
)
from ds_align.models.adapters import new_settings, plan_new, plan_trained
from ds_align.rehearsal import rehearse


@dataclass(frozen=True, slots=True)
class Setup:
    """What is known before a model loads; reference_is_policy: the reference is the policy, adapters off."""

    source: ModelSource
    reference_source: ModelSource
    tokenizer: object
    ds_config: dict
    reference_ds_config: dict | None
    layout: Layout
    messages: tuple[str, ...]
    adapters: AdapterPlan | None = None
    reference_is_policy: bool = False


def check_setup(config: BaseConfig, device: torch.device) -> Setup:
    """Opens and checks models, tokenizer and both DeepSpeed configs; allocates nothing large."""
    rehearse(METHODS[config.method], config, device)
    adapter = _open_adapter(config)
    source, reference_source = _open_models(config, adapter)
    tokenizer = _open_tokenizer(config, source, adapter)
    adapters = _plan_adapters(config, source, adapter)
    hidden_size = source.config.get_text_config().hidden_size
    ds_config = resolve_policy_config(
        config, world_size=distributed.world_size(), hidden_size=hidden_size, device=device.type
    )
    needs_reference = METHODS[config.method].needs_reference(config)
    reference_is_policy = needs_reference and adapters is not None and config.ref_model_name is None
    reference_ds_config = None
    if needs_reference and not reference_is_policy:
        reference_ds_config = derive_reference_config(
            config,
            ds_config,
            hidden_size=reference_source.config.get_text_config().hidden_size,
            device=device.type,
            largest_partition=lambda: largest_partition(reference_source),
        )
    messages = _check_with_deepspeed(config, ds_config, source)
    if reference_ds_config is not None:
        messages += _check_with_deepspeed(config, reference_ds_config, reference_source, "ref_ds_config")
    _check_experts(config, source)
    layout, message = _common_layout(config, source, reference_source)
    messages += [message] if message else []
    if adapters is not None and adapters.wraps_head:
        messages.append(
            "the LM head has an adapter: log-probs are made from whole logits, which take far more memory; "
            "leave the head out of lora_target_modules to avoid that"
        )
    return Setup(
        source,
        reference_source,
        tokenizer,
        ds_config,
        reference_ds_config,
        layout,
        tuple(messages),
        adapters,
        reference_is_policy,
    )


def _check_with_deepspeed(
    config: BaseConfig, ds_config: dict, source: ModelSource, setting: str = "ds_config"
) -> list[str]:
    check_ds_config(ds_config, getattr(config, setting), setting)
    check_precision(resolved_precision(ds_config))
    return check_nvme(ds_config, setting, source)


def _check_experts(config: BaseConfig, source: ModelSource) -> None:
    if config.router_aux_loss_coef and not num_experts(source.config):
        raise ConfigError(
            f"router_aux_loss_coef={config.router_aux_loss_coef:g}: {source.path!r} is not a mixture of "
            "experts; leave it out"
        )


def _open_adapter(config: BaseConfig) -> AdapterDirectory | None:
    """The adapter to train on, where model_name_or_path is one."""
    if config.model_name_or_path is None:
        raise ConfigError("model_name_or_path is missing; give --model_name_or_path DIR (or a Hub id)")
    if not is_adapter_directory(config.model_name_or_path):
        return None
    adapter = AdapterDirectory.open(config.model_name_or_path)
    if changed(config, "lora_dropout"):
        # Not a part of the adapter's shape: unlike lora_r it may be another than it was trained with.
        adapter.settings.lora_dropout = config.lora_dropout
    _check_free(config, Path(adapter.base))
    return adapter


def _check_free(config: BaseConfig, base: Path) -> None:
    output = Path(config.resolved_output_dir)
    if base.is_dir() and output.is_dir() and output.samefile(base):
        raise ConfigError(
            f"output_dir={str(output)!r} is the directory of the adapter's base model; "
            "give another output_dir, or the base would be lost"
        )


def _open_models(config: BaseConfig, adapter: AdapterDirectory | None) -> tuple[ModelSource, ModelSource]:
    trust = config.trust_remote_code
    if adapter is None:
        source = ModelSource.open(config.model_name_or_path, trust_remote_code=trust)
    else:
        setting = f"base_model_name_or_path of {adapter.path / 'adapter_config.json'}"
        source = ModelSource.open(adapter.base, trust_remote_code=trust, setting=setting)
    reference = source
    if config.ref_model_name is not None:
        reference = ModelSource.open(config.ref_model_name, trust_remote_code=trust, setting="ref_model_name")
    vocabulary, other = (opened.config.get_text_config().vocab_size for opened in (source, reference))
    if vocabulary != other:
        raise ConfigError(
            f"ref_model_name={config.ref_model_name!r} has a vocabulary of {other} and the policy one of "
            f"{vocabulary}; both must score the same token ids"
        )
    return source, reference


def _open_tokenizer(config: BaseConfig, source: ModelSource, adapter: AdapterDirectory | None) -> object:
    """tokenizer_name, else the adapter's own, else that of the model."""
    beside = str(adapter.path) if adapter is not None and adapter.has_tokenizer else source.path
    name = config.tokenizer_name or beside
    tokenizer = load_tokenizer(name, trust_remote_code=config.trust_remote_code)
    vocabulary = source.config.get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise ConfigError(
            f"tokenizer {name!r} knows {len(tokenizer)} tokens and the model embeds {vocabulary}; "
            "give the model's own tokenizer"
        )
    return tokenizer


def _plan_adapters(
    config: BaseConfig, source: ModelSource, adapter: AdapterDirectory | None
) -> AdapterPlan | None:
    """The adapters of the run: those of the directory, new ones under use_lora, else none."""
    if adapter is None and not config.use_lora:
        return None
    if config.sync_ref_model:
        raise ConfigError(
            "sync_ref_model: the policy trains adapters, whose weights cannot be mixed into a reference; "
            "leave it out"
        )
    names = changed(config, "ref_ds_config", "ref_load_in_8bit", "ref_load_in_4bit")
    if names and config.ref_model_name is None:
        raise ConfigError(
            f"{', '.join(names)} without effect: the reference is the start of the adapters, not a second "
            "model; leave it out, or name a ref_model_name"
        )
    # Absolute, so that whoever loads the adapter later need not stand in this directory.
    base = str(Path(source.path).absolute()) if Path(source.path).is_dir() else source.path
    wanted = None
    if config.use_lora:
        wanted = new_settings(
            base,
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=config.lora_target_modules,
        )
    trust = config.trust_remote_code
    if adapter is None:
        return plan_new(source.config, wanted, seed=config.seed, trust_remote_code=trust)
    needs_start = METHODS[config.method].needs_reference(config) and config.ref_model_name is None
    plan = plan_trained(
        source.config, adapter, keeps_start=needs_start, wanted=wanted, trust_remote_code=trust
    )
    plan.settings.base_model_name_or_path = base
    return plan


def _common_layout(config: BaseConfig, *sources: ModelSource) -> tuple[Layout, str | None]:
    """The layout that policy and reference share: both must score the same batches."""
    found: tuple[Layout, str | None] = (Layout.PADDED, None)
    for source in sources:
        try:
            found = choose_layout(
                source.config,
                attn_implementation=config.attn_implementation,
                prefix_sharing=config.prefix_sharing,
                max_length=config.max_length,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if found[0] is Layout.PADDED:
            break
    return found
