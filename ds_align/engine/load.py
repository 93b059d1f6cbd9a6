"""The models of a run in memory: the policy, and the reference as it is to be had."""

from __future__ import annotations

import numpy as np
import torch

from ds_align import distributed
from ds_align.batches import BatchPlanner, num_steps
from ds_align.config import BaseConfig, resolved_precision
from ds_align.engine.cached_reference import CachedReference, open_cached_reference
from ds_align.engine.init import init_distributed
from ds_align.engine.policy import PolicyEngine
from ds_align.engine.reference import AdaptersOffReference, ReferenceEngine
from ds_align.engine.setup import Setup, check_setup
from ds_align.schedule import learning_rate_schedule
from ds_align.splits import Splits, load_splits

Reference = ReferenceEngine | AdaptersOffReference | CachedReference


def load_models(
    config: BaseConfig, setup: Setup, splits: Splits, device: torch.device
) -> tuple[PolicyEngine, Reference | None]:
    """Loads the policy and, where the loss has one that is not all in the cache, the reference.

    Collective: every rank must call this. Raises ConfigError, CheckpointError for a cache that cannot be
    written.
    """
    if setup.reference_is_policy:
        return _load_policy_as_reference(config, setup, splits, device)
    reference = None
    if config.ref_logps == "cache":
        reference = open_cached_reference(config, setup, device, lambda: _load_reference(config, setup))
        # Before the policy is there: the two models are not in memory together.
        _fill(reference, config, setup, splits)
    policy = _load_policy(config, setup, splits, device)
    if reference is None and setup.reference_ds_config is not None:
        reference = _load_reference(config, setup)
    return policy, reference


def _load_policy_as_reference(
    config: BaseConfig, setup: Setup, splits: Splits, device: torch.device
) -> tuple[PolicyEngine, Reference]:
    if config.ref_logps == "live":
        policy = _load_policy(config, setup, splits, device)
        return policy, AdaptersOffReference(policy)
    loaded: list[PolicyEngine] = []

    def policy_once() -> PolicyEngine:
        if not loaded:
            loaded.append(_load_policy(config, setup, splits, device))
        return loaded[0]

    cached = open_cached_reference(config, setup, device, lambda: AdaptersOffReference(policy_once()))
    _fill(cached, config, setup, splits)
    return policy_once(), cached


def precompute(config: BaseConfig) -> None:
    """Scores what the cache lacks of a run's training and evaluation data, and says what was done.

    Collective: every rank must call this. Raises what AlignEngine.from_config raises.
    """
    device = init_distributed()
    setup = distributed.agree(lambda: check_setup(config, device))
    splits = distributed.agree(lambda: load_splits(config, setup.tokenizer))

    def load() -> ReferenceEngine | AdaptersOffReference:
        if setup.reference_is_policy:
            return AdaptersOffReference(_load_policy(config, setup, splits, device))
        return _load_reference(config, setup)

    cached = open_cached_reference(config, setup, device, load)
    fill = cached.report_missing if config.dry_run else cached.fill
    for data in (splits.train, splits.evaluation):
        if data is not None:
            fill(data)
    if distributed.is_main():
        for message in [*setup.messages, *splits.messages, *cached.messages]:
            print(message, flush=True)


def _fill(cached: CachedReference, config: BaseConfig, setup: Setup, splits: Splits) -> None:
    """Scores what the run will ask for: of its training data the rows of its steps."""
    planner = BatchPlanner(config, setup.layout, world_size=distributed.world_size())
    wanted = None
    if planner.num_steps(len(splits.train)) * planner.global_batch_size < len(splits.train):
        wanted = np.sort(np.concatenate(list(planner.rows_by_step(splits.train))))
    # A dry run needs no reference to know what is missing, and writes nothing.
    fill = cached.report_missing if config.dry_run else cached.fill
    fill(splits.train, wanted)
    if splits.evaluation is not None:
        fill(splits.evaluation)


def _load_policy(config: BaseConfig, setup: Setup, splits: Splits, device: torch.device) -> PolicyEngine:
    # Whatever was loaded or scored before, the run draws the same numbers.
    torch.manual_seed(config.seed)
    steps = num_steps(config, len(splits.train), distributed.world_size())
    return PolicyEngine.from_config(
        config,
        setup.ds_config,
        setup.source,
        layout=setup.layout,
        dtype=resolved_precision(setup.ds_config),
        device=device,
        schedule=learning_rate_schedule(config, steps),
        adapters=setup.adapters,
    )


def _load_reference(config: BaseConfig, setup: Setup) -> ReferenceEngine:
    return ReferenceEngine.from_config(
        setup.reference_ds_config,
        setup.reference_source,
        layout=setup.layout,
        dtype=resolved_precision(setup.ds_config),
        attn_implementation=config.attn_implementation,
        bits=config.ref_bits,
    )
