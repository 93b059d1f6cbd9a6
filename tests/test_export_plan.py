"""Sizes and shards of a saved model."""

from __future__ import annotations

import numpy as np
import pytest

from ds_align.config import DPOConfig
from ds_align.errors import ConfigError
from ds_align.export import parse_size, plan_shards


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("500MB", 500_000_000),
        ("5GB", 5_000_000_000),
        ("5GiB", 5 * 2**30),
        ("1 KB", 1000),
        ("2KiB", 2048),
        ("1.5MB", 1_500_000),
        ("1TB", 10**12),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected
    assert DPOConfig(max_shard_size=text).max_shard_size == text


@pytest.mark.parametrize("text", ["500", "MB", "0GB", "-1GB", "5 GB please", "1e3MB", "5XB"])
def test_what_is_no_size_is_refused_by_the_config(text: str) -> None:
    with pytest.raises(ConfigError, match="max_shard_size"):
        DPOConfig(max_shard_size=text)


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ([4, 4, 4], 12, ["abc"]),
        ([4, 4, 5], 12, ["ab", "c"]),
        # A weight larger than a shard stands alone, and nothing joins it.
        ([2, 20, 2, 3], 10, ["a", "b", "cd"]),
        ([20, 0, 1], 10, ["a", "bc"]),
        ([10, 10], 10, ["a", "b"]),
        ([1], 1, ["a"]),
    ],
)
def test_shards_by_hand(sizes: list[int], limit: int, expected: list[str]) -> None:
    names = dict(zip("abcd", sizes, strict=False))
    assert ["".join(shard) for shard in plan_shards(names, limit)] == expected


def test_every_weight_is_in_one_shard_in_order() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        sizes = {f"w{number}": int(generator.integers(1, 100)) for number in range(30)}
        limit = int(generator.integers(20, 300))
        shards = plan_shards(sizes, limit)
        assert [name for shard in shards for name in shard] == list(sizes)
        assert all(sum(sizes[name] for name in shard) <= limit or len(shard) == 1 for shard in shards)
        # No two neighbours would have fitted into one.
        heads = [sizes[shard[0]] for shard in shards[1:]]
        for shard, head in zip(shards, heads, strict=False):
            assert sum(sizes[name] for name in shard) + head > limit
