"""Quotas by largest remainder, exact in rational numbers, and the rows that fill them."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from ds_align.config.dialects import DIALECTS, shares_problem
from ds_align.data.quotas import largest_total
from ds_align.data.quotas import quotas as whole_quotas
from ds_align.errors import DataError

# Parts the draws of this room from those that other rooms make with the same seed.
_STREAM = 0xD1A1


def exact_shares(shares: Mapping[str, float]) -> dict[str, Fraction]:
    """The shares as written (0.1 is 1/10) in the order of DIALECTS, made to sum to 1. Raises DataError."""
    problem = shares_problem(shares)
    if problem is not None:
        raise DataError(f"target_distribution: {problem}")
    written = {label: Fraction(repr(float(shares[label]))) for label in DIALECTS if shares.get(label)}
    total = sum(written.values())
    return {label: share / total for label, share in written.items()}


def quotas(size: int, shares: Mapping[str, Fraction]) -> dict[str, int]:
    """Whole numbers that sum to `size`, by largest remainder."""
    return dict(zip(shares, whole_quotas([*shares.values()], size), strict=True))


def fits(wanted: Mapping[str, int], found: Mapping[str, int]) -> bool:
    """Whether each label has as many rows as wanted."""
    return all(number <= found.get(label, 0) for label, number in wanted.items())


def largest_quotas(found: Mapping[str, int], shares: Mapping[str, Fraction]) -> dict[str, int]:
    """Quotas of the largest size that `found` rows of each label can fill without a row twice."""
    return quotas(largest_total([*shares.values()], [found[label] for label in shares]), shares)


def draw(labels: np.ndarray, wanted: Mapping[str, int], seed: int) -> np.ndarray:
    """Row numbers, in file order, that hold the wanted number of each label; int64.

    labels: the label of each row as its number in DIALECTS. A label with fewer rows than wanted has each of
    them floor(wanted/rows) times, and as many once more as are missing.
    """
    drawn = []
    for label, number in wanted.items():
        index = DIALECTS.index(label)
        rows = np.flatnonzero(labels == index)
        if not number:
            continue
        times, rest = divmod(number, len(rows))
        order = np.random.default_rng([seed, _STREAM, index]).permutation(rows)
        drawn += [np.tile(rows, times), order[:rest]]
    return np.sort(np.concatenate(drawn)) if drawn else np.zeros(0, np.int64)
