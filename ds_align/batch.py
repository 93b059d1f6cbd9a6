"""The shapes that data takes on its way: a tokenized preference, a packed micro-batch, a global batch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import StrEnum

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt with a chosen and a rejected completion; each field int32 [num_tokens], never empty."""

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray


@dataclass(frozen=True, slots=True)
class Unpaired:
    """One prompt with a completion that is desirable or not.

    kl_ids is the fixed mismatched completion y' of KTO's z0 (None: the row is left out of the mean).
    """

    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    desirable: bool
    kl_ids: np.ndarray | None = None


class Layout(StrEnum):
    """How completions are laid out: shared prompts, a prompt copy each, or one padded row each."""

    SHARED = "shared"
    PLAIN = "plain"
    PADDED = "padded"


@dataclass(frozen=True, slots=True)
class Segment:
    """Queries [start, stop) of a pack and the key ranges that they see.

    Attention is causal, aligned at the bottom right: the last query sees every key.
    """

    query: tuple[int, int]
    keys: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One micro-batch: prompt groups laid out in one row (packed), or one completion a row (padded).

    input_ids, position_ids: int64 [rows, width]; rows = 1 when packed.
    attention_mask: int64 [rows, width] when padded, None when packed.
    token_weights: float32 [rows, width], the number of preferences' completions that each token belongs to (a
    shared prompt token to several, padding to none).
    segments: the attention plan when packed, None when padded.
    source_index: int64 [num_scored], positions in the flattened input whose hidden state predicts a label.
    labels: int64 [num_scored], the completion tokens.
    completion_index: int64 [num_scored], the batch's completion that each label belongs to.
    completion_lengths: int64 [num_completions], scored tokens.
    units: int64 [num_completions], the number of each completion in its global batch.
    members: int64 [num_preferences, k], completions of each preference: (chosen, rejected) or (completion,).
    positions: int64 [num_preferences], the place of each preference in its global batch.
    desirable: bool [num_preferences] for unpaired data, else None.
    rows: row numbers in the data set, one a preference.
    num_tokens: real tokens that are computed; num_unshared_tokens: the same with a prompt copy a completion;
    num_padded_tokens: what one padded row a completion would have computed.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    token_weights: torch.Tensor
    segments: tuple[Segment, ...] | None
    source_index: torch.Tensor
    labels: torch.Tensor
    completion_index: torch.Tensor
    completion_lengths: torch.Tensor
    units: torch.Tensor
    members: torch.Tensor
    positions: torch.Tensor
    desirable: torch.Tensor | None
    rows: tuple[int, ...]
    num_tokens: int
    num_unshared_tokens: int
    num_padded_tokens: int
    owner: GlobalBatch | None = None

    @property
    def num_completions(self) -> int:
        """Completions whose tokens are scored here; 0 in a dummy pack."""
        return self.completion_lengths.numel()

    @property
    def num_preferences(self) -> int:
        """Pairs or examples trained here; 0 in a dummy pack and in packs that are only scored."""
        return self.members.shape[0]

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on a device."""
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **moved)

    def pin_memory(self) -> PackedBatch:
        """The same batch with its tensors in pinned memory, from which a GPU reads while the CPU goes on."""
        pinned = {
            field.name: value.pin_memory()
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **pinned)


@dataclass(frozen=True, slots=True, eq=False)
class TokenScores:
    """What a model says of the scored tokens of a pack; each [num_scored].

    logps: label log-probs in nats, with gradient where it was asked for. mean_logits: mean logit over the
    vocabulary, detached. log_collision: log sum_v p_v^2, detached, None where it was not asked for.
    router_probabilities [E] with gradient, router_load [E + 1]: see models.router, None where not asked for.
    """

    logps: torch.Tensor
    mean_logits: torch.Tensor | None = None
    log_collision: torch.Tensor | None = None
    router_probabilities: torch.Tensor | None = None
    router_load: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class CoupledTerms:
    """A loss over a whole global batch, taken apart by preference; all detached.

    losses: float64 [n], their sum is that of the global batch. rewards: float64 [n, k], of the k completions
    of each preference. slopes: float64 [n, k], the derivative of the summed losses by their summed log-probs.
    """

    losses: torch.Tensor
    rewards: torch.Tensor
    slopes: torch.Tensor

    def part(self, places: torch.Tensor | slice) -> CoupledTerms:
        """The terms of some of the preferences."""
        return CoupledTerms(self.losses[places], self.rewards[places], self.slopes[places])


@dataclass(slots=True, eq=False)
class GlobalBatch:
    """One rank's part of an optimizer step, with the counts of the whole.

    micro_batches: the same number on every rank (dummies where a rank has less).
    reference_batches: this rank's completions in larger packs, for the reference.
    kl_batches: (x, y') of KTO, scored by the policy without gradient before it trains; empty otherwise.
    kl_units: int64 [num rows with a y' on this rank], units of y', one entry a row.
    num_preferences, num_chosen_tokens, num_kl: over all ranks.
    unit_lengths: int64 [num_units], tokens of each completion of the global batch.
    reference_logps: float32 [sum of unit_lengths], token log-probs of unit after unit, filled by the engine
    (NaN where another rank holds the unit).
    kl: KTO's z0, a scalar, filled by the engine.
    coupled: what a loss that couples the preferences says of each, filled by the engine.
    router_load: float64 [E + 1], that of models.router over the global batch, filled by the engine.
    rank_imbalance: cost of the fullest rank over the mean (see packing.CostModel).
    reference_seconds: what scoring reference_batches took by this rank's clock, filled by the engine.
    """

    step: int
    epoch: float
    micro_batches: list[PackedBatch]
    reference_batches: list[PackedBatch]
    kl_batches: list[PackedBatch]
    kl_units: torch.Tensor
    num_preferences: int
    num_chosen_tokens: int
    num_kl: int
    unit_lengths: torch.Tensor
    rank_imbalance: float = 1.0
    num_oversized: int = 0
    reference_logps: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    coupled: CoupledTerms | None = None
    router_load: torch.Tensor | None = None
    prepared: bool = False
    reference_seconds: float = 0.0

    def pin_memory(self) -> GlobalBatch:
        """Itself, its tensors and those of its packs in pinned memory."""
        for packs in (self.micro_batches, self.reference_batches, self.kl_batches):
            packs[:] = [pack.pin_memory() for pack in packs]
        self.kl_units = self.kl_units.pin_memory()
        self.unit_lengths = self.unit_lengths.pin_memory()
        if self.reference_logps is not None:
            self.reference_logps = self.reference_logps.pin_memory()
        return self

    @property
    def was_looked_at(self) -> bool:
        """Whether what a loss needs of the whole global batch is there."""
        return self.coupled is not None or self.router_load is not None

    @property
    def num_tokens(self) -> int:
        """Tokens of all distinct completions of the global batch."""
        return int(self.unit_lengths.sum())
