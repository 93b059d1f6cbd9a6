"""Quotas against a plain account of largest remainder, and the largest subset against trying all sizes."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ds_align.arabic.shares import draw, exact_shares, largest_quotas, quotas
from ds_align.config.dialects import DIALECTS
from ds_align.errors import DataError

FAST = settings(max_examples=150, deadline=None, database=None)


@st.composite
def distributions(draw_value: st.DrawFn) -> dict[str, float]:
    labels = draw_value(st.lists(st.sampled_from(DIALECTS), min_size=1, unique=True))
    parts = draw_value(st.lists(st.integers(1, 60), min_size=len(labels), max_size=len(labels)))
    return {label: part / sum(parts) for label, part in zip(labels, parts, strict=True)}


def plain_quotas(size: int, shares: dict[str, Fraction]) -> dict[str, int]:
    """Seats are given one by one, to the largest remainder that is left."""
    seats = {label: (size * share).numerator // (size * share).denominator for label, share in shares.items()}
    left = {label: size * shares[label] - seats[label] for label in shares}
    while sum(seats.values()) < size:
        winner = max(left, key=lambda label: (left[label], shares[label], -DIALECTS.index(label)))
        seats[winner] += 1
        left[winner] = Fraction(-1)
    return seats


def test_by_hand() -> None:
    shares = exact_shares({"msa": 0.3, "egy": 0.25, "glf": 0.25, "lev": 0.2})
    assert quotas(10, shares) == {"msa": 3, "egy": 3, "glf": 2, "lev": 2}  # 2.5 and 2.5: egy comes first
    # found 9, 30, 30, 30: 9/0.3 = 30 fits exactly, 7.5 + 7.5 make one 8; 31 needs 9.3 -> 9, 7.75 -> 8, 6.2.
    found = {"msa": 9, "egy": 30, "glf": 30, "lev": 30}
    assert largest_quotas(found, shares) == {"msa": 9, "egy": 8, "glf": 8, "lev": 6}


def test_shares_are_what_is_written() -> None:
    assert exact_shares({"egy": 0.1, "msa": 0.9}) == {"msa": Fraction(9, 10), "egy": Fraction(1, 10)}
    thirds = exact_shares({"egy": 0.333333, "msa": 0.333333, "lev": 0.333333})
    assert set(thirds.values()) == {Fraction(1, 3)}
    assert exact_shares({"egy": 1, "msa": 0}) == {"egy": Fraction(1)}


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ({"egy": 0.5, "msa": 0.4}, "the shares sum to 0.9, expected 1"),
        ({"egy": 0.5, "msa": 0.500002}, "sum to 1.000002"),
        ({}, "the shares sum to 0"),
        ({"egyp": 1.0}, "unknown dialect 'egyp'; did you mean egy"),
        ({"egy": 1.5, "msa": -0.5}, "share of msa is -0.5"),
        ({"egy": float("nan"), "msa": 1.0}, "share of egy is nan"),
        ({"egy": "half", "msa": 0.5}, "share of egy is 'half'"),
        ({"egy": True}, "share of egy is True"),
    ],
)
def test_what_is_no_distribution_is_refused(shares: dict, words: str) -> None:
    with pytest.raises(DataError, match=words):
        exact_shares(shares)


@given(distributions(), st.integers(0, 500))
@FAST
def test_quotas_are_those_of_largest_remainder(given_shares: dict[str, float], size: int) -> None:
    shares = exact_shares(given_shares)
    found = quotas(size, shares)
    assert found == plain_quotas(size, shares)
    assert sum(found.values()) == size
    assert all(abs(found[label] - size * share) < 1 for label, share in shares.items())


@given(distributions(), st.lists(st.integers(1, 40), min_size=6, max_size=6))
@FAST
def test_no_larger_size_meets_the_shares(given_shares: dict[str, float], numbers: list[int]) -> None:
    shares = exact_shares(given_shares)
    found = dict(zip(DIALECTS, numbers, strict=True))
    sizes = range(sum(numbers) + 1)
    fitting = [
        size
        for size in sizes
        if all(wanted <= found[label] for label, wanted in plain_quotas(size, shares).items())
    ]
    assert largest_quotas(found, shares) == plain_quotas(max(fitting), shares)


def test_a_larger_size_may_fit_where_a_smaller_does_not() -> None:
    """The Alabama paradox: with 6/14, 6/14 and 2/14, ten seats are 4, 4, 2 and eleven are 5, 5, 1."""
    shares = exact_shares({"msa": 6 / 14, "egy": 6 / 14, "glf": 2 / 14})
    assert list(quotas(10, shares).values()) == [4, 4, 2]
    assert list(quotas(11, shares).values()) == [5, 5, 1]
    found = {"msa": 5, "egy": 5, "glf": 1}
    assert largest_quotas(found, shares) == found


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.data(), st.integers(0, 5))
@FAST
def test_drawn_rows(labels: list[int], data: st.DataObject, seed: int) -> None:
    rows = np.asarray(labels)
    present = sorted(set(labels))
    wanted = {DIALECTS[index]: data.draw(st.integers(0, 80)) for index in present}
    assume(sum(wanted.values()))
    drawn = draw(rows, wanted, seed)
    assert drawn.tolist() == sorted(drawn.tolist()) == draw(rows, wanted, seed).tolist()
    for index in present:
        number, there = wanted[DIALECTS[index]], labels.count(index)
        times = np.bincount(drawn[rows[drawn] == index], minlength=len(labels))[rows == index]
        assert times.sum() == number
        # None twice before all were taken once.
        assert set(times.tolist()) <= {number // there, -(-number // there)}


def test_another_seed_draws_other_rows() -> None:
    rows = np.zeros(100, int)
    assert not np.array_equal(draw(rows, {"msa": 50}, 1), draw(rows, {"msa": 50}, 2))
