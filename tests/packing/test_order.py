"""Orders of an epoch that keep the rows of a prompt together."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from ds_align.batch import Layout, Pair
from ds_align.packing import PreferenceTable, epoch_order, global_batch_rows, plan_step


def keys_of(sizes, seed: int = 0) -> np.ndarray:
    """Prompt keys of groups of these sizes, their rows scattered over the file."""
    keys = np.repeat(np.arange(len(sizes)), sizes)
    return np.random.default_rng(seed).permutation(keys)


def grouped(keys: np.ndarray, batch_size: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return epoch_order(
        len(keys), seed=seed, epoch=epoch, sampling="random", prompt_keys=keys, batch_size=batch_size
    )


def steps_of_prompts(keys: np.ndarray, order: np.ndarray, batch_size: int) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    for step, rows in enumerate(global_batch_rows(order, batch_size)):
        for key in keys[rows].tolist():
            found.setdefault(key, set()).add(step)
    return found


def num_cuts(keys: np.ndarray, order: np.ndarray, batch_size: int) -> int:
    return sum(len(steps) - 1 for steps in steps_of_prompts(keys, order, batch_size).values())


@pytest.mark.parametrize("seed", range(40))
def test_an_epoch_holds_every_row_once(seed: int) -> None:
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 2 + seed, generator.integers(1, 60))
    keys = keys_of(sizes, seed)
    batch_size = int(generator.integers(1, 30))
    order = grouped(keys, batch_size, seed)
    assert np.array_equal(np.sort(order), np.arange(len(keys)))
    assert [len(rows) for rows in global_batch_rows(order, batch_size)][:-1] == [batch_size] * (
        (len(keys) - 1) // batch_size
    )
    # A prompt stands in the fewest steps that hold it, or lies across one border more.
    steps = steps_of_prompts(keys, order, batch_size)
    assert all(len(steps[key]) <= -(-size // batch_size) + 1 for key, size in enumerate(sizes))


def test_the_order_is_random_by_seed_and_epoch_and_by_nothing_else() -> None:
    keys = keys_of([3] * 20)
    orders = {(seed, epoch): grouped(keys, 6, seed, epoch) for seed in (1, 2) for epoch in (0, 1)}
    assert len({order.tobytes() for order in orders.values()}) == 4
    assert np.array_equal(grouped(keys, 6, 2, 1), orders[2, 1])
    # Each of 10 prompts is in the first step (of two prompts) in about a fifth of 500 epochs: 100 +- 9.
    keys = keys_of([3] * 10)
    first = Counter(key for epoch in range(500) for key in set(keys[grouped(keys, 6, 0, epoch)[:6]].tolist()))
    assert len(first) == 10 and set(first.values()) < set(range(65, 135))


def test_rows_within_a_prompt_are_shuffled() -> None:
    keys = np.zeros(4, dtype=np.int64)
    orders = {grouped(keys, 2, epoch=epoch).tobytes() for epoch in range(200)}
    assert len(orders) == 24


def test_without_prompts_that_return_it_is_the_plain_order() -> None:
    keys = np.random.default_rng(1).permutation(30)
    plain = epoch_order(30, seed=3, epoch=2, sampling="random")
    assert np.array_equal(grouped(keys, 4, 3, 2), plain)


@pytest.mark.parametrize(
    ("sizes", "batch_size", "cuts"),
    [
        ([6] * 8, 12, 0),
        ([6] * 8, 24, 0),
        # Of the borders at 8, 16, 24, 32 and 40 only 24 is a multiple of 6.
        ([6] * 8, 8, 4),
        # 5 is 2 + 3, and the four can be paired so.
        ([2, 2, 3, 3], 5, 0),
        # 10 rows take three steps of 4 at least.
        ([10], 4, 2),
        # The first two steps are the long prompt's own, its last two rows go with the others.
        ([10, 1, 1, 4], 4, 2),
        # The last step has 3 rows.
        ([5, 5, 3], 10, 0),
    ],
)
def test_few_groups_are_cut(sizes, batch_size, cuts) -> None:
    keys = keys_of(sizes)
    for seed in range(20):
        assert num_cuts(keys, grouped(keys, batch_size, seed), batch_size) == cuts


def test_no_more_groups_are_cut_than_in_the_best_order_of_all() -> None:
    """All orders of few groups, tried out; the greedy filling may miss the best by one border."""
    worse = 0
    for seed in range(60):
        generator = np.random.default_rng(seed)
        sizes = generator.integers(1, 7, 6).tolist()
        batch_size = int(generator.integers(max(sizes), 12))
        borders = set(range(batch_size, sum(sizes), batch_size))
        best = min(len(borders - set(np.cumsum(order).tolist())) for order in set(permutations(sizes)))
        keys = keys_of(sizes, seed)
        found = num_cuts(keys, grouped(keys, batch_size, seed), batch_size)
        assert best <= found <= best + 1
        worse += found > best
    assert worse <= 6


def test_data_of_many_sizes_leave_no_group_cut() -> None:
    keys = keys_of(np.random.default_rng(0).integers(1, 7, 2000))
    steps = steps_of_prompts(keys, grouped(keys, 64), 64)
    assert all(len(found) == 1 for found in steps.values())
    plain = steps_of_prompts(keys, epoch_order(len(keys), seed=0, epoch=0, sampling="random"), 64)
    assert sum(len(found) == 1 for found in plain.values()) < 0.25 * len(plain)


def ranked_pairs() -> tuple[list[Pair], np.ndarray]:
    """8 prompts with 4 ranked completions each: all 6 pairs of them, scattered."""
    generator = np.random.default_rng(5)

    def ids(length: int) -> np.ndarray:
        return generator.integers(0, 1000, length, dtype=np.int32)

    pairs, keys = [], []
    for key in range(8):
        prompt, answers = ids(100), [ids(50) for _ in range(4)]
        pairs += [Pair(prompt, answers[i], answers[j]) for i in range(4) for j in range(i + 1, 4)]
        keys += [key] * 6
    places = generator.permutation(48)
    return [pairs[place] for place in places], np.array(keys)[places]


def test_ranked_data_take_fewer_tokens() -> None:
    pairs, keys = ranked_pairs()

    def tokens(order: np.ndarray, world_size: int) -> int:
        total = 0
        for rows in global_batch_rows(order, 12):
            plan = plan_step(
                PreferenceTable.from_preferences([pairs[row] for row in rows]),
                world_size=world_size,
                layout=Layout.SHARED,
                pack_tokens=4096,
                reference_tokens=4096,
                needs_reference=False,
            )
            total += sum(plan.rank_tokens)
        return total

    # Two prompts a step, each of 100 + 4 * 50 tokens and computed once; as pairs they are 48 * 200.
    assert tokens(grouped(keys, 12), 1) == tokens(grouped(keys, 12), 2) == 8 * 300
    plain = epoch_order(48, seed=0, epoch=0, sampling="random")
    # By chance some pairs of a prompt meet in the plain order too.
    assert 2 * tokens(grouped(keys, 12), 1) < tokens(plain, 1) < 48 * 200
