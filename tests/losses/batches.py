"""Batches of pairs for the tests of the losses."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from ds_align.losses import Logps, PairedLogps
from tests.losses.reference import Pair


def random_pairs(n: int, seed: int, *, spread: float = 6.0) -> list[Pair]:
    """Pairs whose log-ratios are within `spread` nats of 0."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        ref_c, ref_r = rng.uniform(-40, -8), rng.uniform(-40, -8)
        pi_c, pi_r = ref_c + rng.uniform(-spread, spread), ref_r + rng.uniform(-spread, spread)
        rows.append(Pair(pi_c, pi_r, ref_c, ref_r, rng.randint(1, 30), rng.randint(1, 30)))
    return rows


def as_logps(pairs: Sequence[Pair], dtype: torch.dtype = torch.float64, *, grad: bool = False) -> PairedLogps:
    """The pairs as tensors; with grad, all four totals are leaves that ask for a gradient."""

    def column(total: str, length: str) -> Logps:
        values = torch.tensor([getattr(pair, total) for pair in pairs], dtype=dtype, requires_grad=grad)
        return Logps(values, torch.tensor([getattr(pair, length) for pair in pairs], dtype=torch.int64))

    return PairedLogps(
        column("pi_c", "n_c"), column("pi_r", "n_r"), column("ref_c", "n_c"), column("ref_r", "n_r")
    )
