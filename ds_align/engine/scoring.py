"""Token log-probs of many completions by one model, without gradient, laid out unit after unit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from ds_align.batch import PackedBatch
from ds_align.objective import token_places


def score_units(
    batches: Sequence[PackedBatch],
    forward: Callable[[PackedBatch], torch.Tensor],
    unit_lengths: torch.Tensor,
    device: torch.device,
) -> torch.Tensor:
    """Token log-probs of unit after unit, float32 on device; NaN for units of no batch, so a mix-up shows.

    forward: a batch on the device to its token log-probs [num_scored]. unit_lengths: int64 [num_units].
    Collective under ZeRO-3: every rank must call this with as many batches.
    """
    num_tokens = int(unit_lengths.sum())
    lengths = unit_lengths.to(device, non_blocking=True)
    found = torch.full((num_tokens,), math.nan, device=device)
    for batch in batches:
        moved = batch.to(device)
        found[token_places(moved, lengths)] = forward(moved)
    return found
