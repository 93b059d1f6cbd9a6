"""What is known of a run before a model loads: its models, tokenizer and DeepSpeed configs, checked."""

from __future__ import annotations

from dataclasses import dataclass

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
from ds_align.engine.init import check_ds_config, check_precision
from ds_align.errors import ConfigError
from ds_align.models import ModelSource, choose_layout, load_tokenizer


@dataclass(frozen=True, slots=True)
class Setup:
    """What is known before a model loads."""

    source: ModelSource
    reference_source: ModelSource
    tokenizer: object
    ds_config: dict
    reference_ds_config: dict | None
    layout: Layout
    messages: tuple[str, ...]


def check_setup(config: BaseConfig, device: torch.device) -> Setup:
    """Opens and checks models, tokenizer and both DeepSpeed configs; allocates nothing large."""
    source, reference_source, tokenizer = _open_models(config)
    hidden_size = source.config.get_text_config().hidden_size
    ds_config = resolve_policy_config(
        config, world_size=distributed.world_size(), hidden_size=hidden_size, device=device.type
    )
    reference_ds_config = None
    if METHODS[config.method].needs_reference(config):
        reference_ds_config = derive_reference_config(
            config,
            ds_config,
            hidden_size=reference_source.config.get_text_config().hidden_size,
            device=device.type,
        )
    check_ds_config(ds_config, config.ds_config, "ds_config")
    check_precision(resolved_precision(ds_config))
    if reference_ds_config is not None:
        check_ds_config(reference_ds_config, config.ref_ds_config, "ref_ds_config")
    layout, message = _common_layout(config, source, reference_source)
    return Setup(
        source,
        reference_source,
        tokenizer,
        ds_config,
        reference_ds_config,
        layout,
        (message,) if message else (),
    )


def _open_models(config: BaseConfig) -> tuple[ModelSource, ModelSource, object]:
    if config.model_name_or_path is None:
        raise ConfigError("model_name_or_path is missing; give --model_name_or_path DIR (or a Hub id)")
    trust = config.trust_remote_code
    source = ModelSource.open(config.model_name_or_path, trust_remote_code=trust)
    reference = source
    if config.ref_model_name is not None:
        reference = ModelSource.open(config.ref_model_name, trust_remote_code=trust, setting="ref_model_name")
    vocabulary, other = (opened.config.get_text_config().vocab_size for opened in (source, reference))
    if vocabulary != other:
        raise ConfigError(
            f"ref_model_name={config.ref_model_name!r} has a vocabulary of {other} and the policy one of "
            f"{vocabulary}; both must score the same token ids"
        )
    name = config.tokenizer_name or config.model_name_or_path
    tokenizer = load_tokenizer(name, trust_remote_code=trust)
    if len(tokenizer) > vocabulary:
        raise ConfigError(
            f"tokenizer {name!r} knows {len(tokenizer)} tokens and the model embeds {vocabulary}; "
            "give the model's own tokenizer"
        )
    return source, reference, tokenizer


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
