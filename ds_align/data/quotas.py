"""Whole rows in given shares: the method of the largest remainder (Hamilton's), exact in rational numbers."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


def quotas(weights: Sequence[int | Fraction], total: int) -> list[int]:
    """Rows of each part, weight / sum(weights) of the total by largest remainder; their sum is the total.

    Each part gets the whole rows of its share; what is left goes, one row each, to the largest remainders, of
    equal ones to the larger weight, then to the first.
    """
    whole = sum(weights)
    shares = [divmod(weight * total, whole) for weight in weights]
    found = [int(rows) for rows, _ in shares]
    by_remainder = sorted(range(len(shares)), key=lambda part: (-shares[part][1], -weights[part]))
    for part in by_remainder[: total - sum(found)]:
        found[part] += 1
    return found


def largest_total(weights: Sequence[int | Fraction], limits: Sequence[int | None]) -> int:
    """The largest total whose quotas are within the limits (None: no limit); one limit at least."""
    whole = sum(weights)
    bounds = [
        (limit * whole // weight, (limit + 1) * whole // weight)
        for weight, limit in zip(weights, limits, strict=True)
        if limit is not None
    ]
    # Up to the first no share is above its limit, from the second on one is by a whole row. Between them a
    # total may fit where a smaller one does not: quotas do not only grow (the Alabama paradox).
    fits, fails = int(min(low for low, _ in bounds)), int(min(high for _, high in bounds))
    for total in range(fails, fits, -1):
        pairs = zip(quotas(weights, total), limits, strict=True)
        if all(limit is None or quota <= limit for quota, limit in pairs):
            return total
    return fits
