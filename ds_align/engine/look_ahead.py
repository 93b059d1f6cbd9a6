"""What a loss must know of a whole global batch before its first backward, gathered in one sum over ranks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ds_align import distributed
from ds_align.batch import CoupledTerms, GlobalBatch, PackedBatch, TokenScores
from ds_align.objective import Objective

Scored = Sequence[tuple[PackedBatch, TokenScores]]


@dataclass(frozen=True, slots=True)
class LookAhead:
    """coupled: the terms of each global batch, None for a loss that does not couple. router_load: of all."""

    coupled: list[CoupledTerms | None]
    router_load: torch.Tensor | None

    def hand_to(self, batch: GlobalBatch, number: int = 0) -> None:
        """Gives the global batch with this number what its losses need."""
        batch.coupled = self.coupled[number]
        batch.router_load = self.router_load


def gather(
    objective: Objective,
    parts: Sequence[tuple[GlobalBatch, Scored]],
    *,
    device: torch.device,
    training: bool,
) -> LookAhead:
    """Looks at global batches together: their log-probs for a coupling loss, their routers' load.

    parts: each global batch with this rank's micro-batches and the policy's scores of them. training: a
    running mean that belongs to the loss moves on. Collective: every rank must call this.
    """
    tables = [_own_rows(objective, owner, scored, device) for owner, scored in parts]
    table = torch.cat(tables)
    loads = [scores.router_load for _, scored in parts for _, scores in scored if objective.router_weight]
    load = torch.stack(loads).sum(dim=0, dtype=torch.float64) if loads else table.new_zeros(0)
    whole = distributed.all_reduce_sum(torch.cat([table.flatten(), load]), device)
    router_load = whole[table.numel() :] if loads else None
    if not objective.coupled:
        return LookAhead([None] * len(parts), router_load)
    kl = parts[-1][0].kl
    terms = objective.couple(whole[: table.numel()].view_as(table), kl=kl, training=training)
    stops = itertools.accumulate(len(rows) for rows in tables)
    places = [slice(stop - len(rows), stop) for stop, rows in zip(stops, tables, strict=True)]
    return LookAhead([terms.part(place) for place in places], router_load)


def _own_rows(objective: Objective, owner: GlobalBatch, scored: Scored, device: torch.device) -> torch.Tensor:
    """The rows of this rank in the table of a global batch, float64; those of other ranks are 0."""
    columns = objective.num_columns if objective.coupled else 0
    table = torch.zeros(owner.num_preferences, columns, dtype=torch.float64, device=device)
    if columns:
        for batch, scores in scored:
            table[batch.positions] = objective.table(batch, scores, owner)
    return table
