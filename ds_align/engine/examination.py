"""The doctor's checks inside of a run: its facts gathered over the ranks, and the models' first scores."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from ds_align import distributed
from ds_align.batches import num_steps
from ds_align.config import BaseConfig
from ds_align.doctor import (
    OF_MODELS,
    Facts,
    Finding,
    FirstScores,
    as_warnings_where_legal,
    error_of,
    examine,
)
from ds_align.doctor.machine import look_at_machine
from ds_align.doctor.tokens import template_closes_turns
from ds_align.engine.setup import Setup
from ds_align.objective import token_places
from ds_align.splits import Splits
from ds_align.versions import versions

if TYPE_CHECKING:
    from ds_align.batch import GlobalBatch, PackedBatch
    from ds_align.engine.align_engine import AlignEngine

# Of each rank, at the start of training.
_START_ROWS = 8


def gather_facts(
    config: BaseConfig, splits: Splits | None, tokenizer: object, setup: Setup | None, device: torch.device
) -> Facts:
    """What is known before a model loads. Collective: every rank must call this."""
    ranks = distributed.world_size()
    steps = None if splits is None else num_steps(config, len(splits.train), ranks)
    machine = look_at_machine(
        config,
        versions=tuple(distributed.gather_objects(versions())),
        device=device,
        source=None if setup is None else setup.source,
        ds_config=None if setup is None else setup.ds_config,
        num_steps=steps,
    )
    return Facts(
        config,
        world_size=ranks,
        num_steps=steps,
        train=None if splits is None else splits.train,
        evaluation=None if splits is None else splits.evaluation,
        eval_set=None if splits is None else splits.eval_set,
        tokenizer=tokenizer,
        template_closes_turns=template_closes_turns(tokenizer, config.chat_template),
        machine=machine,
    )


def examine_start(
    config: BaseConfig, setup: Setup, splits: Splits, device: torch.device
) -> tuple[Finding, ...]:
    """The checks that need no model, as a run takes them at its start; nothing where doctor is off.

    Collective: every rank must call this. Raises DataError or ConfigError, on every rank alike, for what
    cannot be meant, unless doctor is warn.
    """
    if config.doctor == "off":
        return ()
    facts = replace(gather_facts(config, splits, setup.tokenizer, setup, device), at_start=True)
    findings = _on_main(facts, [check for check in range(1, 16) if check not in OF_MODELS])
    _stop(config, findings)
    return findings


def examine_models(engine: AlignEngine) -> tuple[Finding, ...]:
    """The checks of the models' first scores; nothing where they are not asked for.

    Collective: every rank must call this. Raises as examine_start does.
    """
    config = engine.config
    if config.doctor == "off" or not config.doctor_models:
        return ()
    size = min(engine.global_batch_size, _START_ROWS * engine.world_size)
    # Of the first step: what a cache holds is what the run asks for.
    first = next(iter(engine.planner.rows_by_step(engine.train_data)))[:size]
    facts = Facts(config, scores=first_scores(engine, np.asarray(first)))
    findings = _on_main(facts, OF_MODELS)
    _stop(config, findings)
    return findings


def _on_main(facts: Facts, ids: list[int] | tuple[int, ...]) -> tuple[Finding, ...]:
    """Rank 0's findings on every rank. Collective."""

    def look() -> tuple[Finding, ...]:
        findings, _ = examine(facts, ids)
        return tuple(as_warnings_where_legal(findings, facts))

    return distributed.broadcast_object(look() if distributed.is_main() else ())


def _stop(config: BaseConfig, findings: tuple[Finding, ...]) -> None:
    error = error_of(findings)
    if error is not None and config.doctor == "error":
        raise error


def first_scores(engine: AlignEngine, rows: np.ndarray) -> FirstScores:
    """Policy and reference on these rows of the training data, without gradient.

    Costs one forward of each. Collective: every rank must call this.
    """
    batch = engine.lay_out(engine.train_data, rows)
    # KTO's z0 is not asked for here.
    batch.kl = torch.zeros((), dtype=torch.float64, device=engine.device)
    engine.prepare(batch, training=False)
    sums = torch.zeros(5, dtype=torch.float64)
    largest = 0.0
    with_loss = _starts_at_ln2(engine)
    for packed in batch.micro_batches:
        found, high = _score_pack(engine, batch, packed.to(engine.device), with_loss=with_loss)
        sums += found
        largest = max(largest, high)
    sums = distributed.all_reduce_sum(sums, engine.device).cpu()
    largest = distributed.all_reduce_max(largest, engine.device)
    num_tokens, differences, chosen_tokens, chosen, losses = sums.tolist()
    compared = engine.reference is not None
    precision = next(engine.policy.module.parameters()).dtype
    return FirstScores(
        num_preferences=len(rows),
        num_tokens=int(num_tokens),
        precision=str(precision).removeprefix("torch."),
        mean_difference=differences / max(1.0, num_tokens) if compared else None,
        max_difference=largest if compared else None,
        chosen_logp=chosen / chosen_tokens if chosen_tokens else None,
        loss=losses / len(rows) if with_loss else None,
        same_weights=_same_weights(engine.config),
    )


def _score_pack(
    engine: AlignEngine, batch: GlobalBatch, packed: PackedBatch, *, with_loss: bool
) -> tuple[torch.Tensor, float]:
    """[tokens, sum of differences, chosen tokens, their log-probs, losses] and the largest difference."""
    scores = engine.policy.forward(packed, grad=False)
    logps, largest = scores.logps.double(), 0.0
    sums = torch.zeros(5, dtype=torch.float64)
    sums[0] = logps.numel()
    basis = logps
    if batch.reference_logps is not None:
        lengths = batch.unit_lengths.to(engine.device)
        basis = batch.reference_logps[token_places(packed, lengths)].double()
        gaps = (logps - basis).abs()
        sums[1] = gaps.sum().cpu()
        largest = float(gaps.max()) if gaps.numel() else 0.0
    members = packed.members[:, 0]
    chosen = torch.zeros(packed.num_completions, dtype=torch.bool, device=engine.device)
    chosen[members if packed.desirable is None else members[packed.desirable]] = True
    of_chosen = chosen[packed.completion_index]
    sums[2], sums[3] = of_chosen.sum().cpu(), basis[of_chosen].sum().cpu()
    if with_loss and packed.num_preferences:
        sums[4] = engine.objective(packed, scores, batch).losses.detach().double().sum().cpu()
    return sums, largest


def _starts_at_ln2(engine: AlignEngine) -> bool:
    """Whether the loss of a policy that equals its reference is ln 2: plain DPO, without further terms."""
    config = engine.config
    plain = config.method == "dpo" and config.loss_types == ["sigmoid"] and not config.nll_weight
    extras = engine.objective.needs_collision or engine.objective.looks_ahead
    weighted = list(config.preference_weights) != [1.0] if plain else True
    return plain and not extras and not weighted and _same_weights(config) and engine.reference is not None


def _same_weights(config: BaseConfig) -> bool:
    """Whether the reference was made from the policy's own weights, and from all of their bits."""
    other = config.ref_model_name not in (None, config.model_name_or_path)
    return not other and config.ref_bits is None
