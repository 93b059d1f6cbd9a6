"""What every plan must keep, over many random global batches, and single cases worked out by hand."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from ds_align.batch import Layout, Pair, Unpaired
from ds_align.packing import PreferenceTable, StepPlan, epoch_order, global_batch_rows, plan_step


def random_ids(generator: np.random.Generator, longest: int) -> np.ndarray:
    return generator.integers(0, 1000, generator.integers(1, longest + 1), dtype=np.int32)


def random_pairs(generator: np.random.Generator, count: int) -> list[Pair]:
    """Pairs of few prompts with few completions each, so that both are shared often."""
    prompts = [random_ids(generator, 40) for _ in range(max(1, count // 3))]
    answers = [[random_ids(generator, 60) for _ in range(4)] for _ in prompts]
    pairs = []
    for _ in range(count):
        number = generator.integers(len(prompts))
        chosen, rejected = generator.permutation(4)[:2]
        pairs.append(Pair(prompts[number], answers[number][chosen], answers[number][rejected]))
    return pairs


def random_unpaired(generator: np.random.Generator, count: int) -> list[Unpaired]:
    rows = []
    for pair in random_pairs(generator, count):
        kl_ids = None if generator.random() < 0.2 else random_ids(generator, 60)
        rows.append(Unpaired(pair.prompt_ids, pair.chosen_ids, bool(generator.random() < 0.5), kl_ids))
    return rows


def plan_of(
    table: PreferenceTable,
    world_size: int,
    layout: Layout,
    pack_tokens: int = 200,
    group_tokens: int | None = None,
) -> StepPlan:
    return plan_step(
        table,
        world_size=world_size,
        layout=layout,
        pack_tokens=pack_tokens,
        reference_tokens=3 * pack_tokens,
        needs_reference=True,
        group_tokens=group_tokens,
    )


def random_plans(make, repeats: int = 60):
    """(table, plan, world size, layout, limit) of random batches; some limits are below a single row."""
    for seed in range(repeats):
        generator = np.random.default_rng(seed)
        rows = make(generator, int(generator.integers(1, 40)))
        table = PreferenceTable.from_preferences(rows)
        world_size = int(generator.integers(1, 6))
        layout = list(Layout)[seed % 3]
        limit = int(generator.integers(30, 400))
        yield table, plan_of(table, world_size, layout, limit), world_size, layout, limit


def preferences_of(packs) -> list[int]:
    return [number for pack in packs for group in pack for number in group.preferences]


def units_of(packs) -> list[int]:
    return [unit for pack in packs for group in pack for unit in group.units]


@pytest.mark.parametrize("make", [random_pairs, random_unpaired])
def test_every_preference_is_trained_exactly_once(make) -> None:
    for table, plan, world_size, _, _ in random_plans(make):
        assert len(plan.train) == world_size
        found = [number for packs in plan.train for number in preferences_of(packs)]
        assert sorted(found) == list(range(len(table.members)))
        for packs in plan.train:
            for group in (group for pack in packs for group in pack):
                needed = {unit for number in group.preferences for unit in table.members[number]}
                assert needed == set(group.units) and len(needed) == len(group.units)
                assert {table.prompt_of[unit] for unit in group.units} == {group.prompt}


@pytest.mark.parametrize("make", [random_pairs, random_unpaired])
def test_every_rank_has_as_many_packs(make) -> None:
    num_dummies = 0
    for _, plan, world_size, _, _ in random_plans(make):
        for kind in (plan.train, plan.reference, plan.kl):
            assert len(kind) == world_size
            assert len({len(packs) for packs in kind}) == 1
        assert len(plan.train[0]) >= 1
        # No step of nothing but dummies, which would be wasted on every rank.
        assert all(any(packs) for packs in zip(*plan.train, strict=True))
        num_dummies += sum(pack == () for packs in plan.train for pack in packs)
    assert num_dummies > 0


def tokens_by_hand(table: PreferenceTable, group, layout: Layout) -> int:
    completions = sum(len(table.completions[unit]) for unit in group.units)
    copies = 1 if layout is Layout.SHARED else len(group.units)
    return completions + copies * len(table.prompts[group.prompt])


def computed_by_hand(table: PreferenceTable, pack, layout: Layout) -> int:
    """Tokens that a pack computes; of padded rows with their padding."""
    if layout is not Layout.PADDED:
        return sum(tokens_by_hand(table, group, layout) for group in pack)
    rows = [(group.prompt, unit) for group in pack for unit in group.units]
    lengths = [len(table.prompts[prompt]) + len(table.completions[unit]) for prompt, unit in rows]
    return len(lengths) * max(lengths, default=0)


@pytest.mark.parametrize("make", [random_pairs, random_unpaired])
def test_packs_keep_to_the_limit_unless_one_preference_is_larger(make) -> None:
    seen_oversized = 0
    for table, plan, _, layout, limit in random_plans(make):
        oversized = 0
        for pack in (pack for packs in plan.train for pack in packs):
            tokens = [tokens_by_hand(table, group, layout) for group in pack]
            assert tokens == [group.num_tokens for group in pack]
            if computed_by_hand(table, pack, layout) > limit:
                assert len(pack) == 1 and len(pack[0].preferences) == 1
                oversized += 1
        assert plan.num_oversized == oversized
        seen_oversized += oversized
        for pack in (pack for packs in plan.reference + plan.kl for pack in packs):
            assert computed_by_hand(table, pack, layout) <= 3 * limit or len(pack[0].units) == len(pack) == 1
    assert seen_oversized > 0


@pytest.mark.parametrize("make", [random_pairs, random_unpaired])
def test_the_reference_scores_what_its_own_rank_needs(make) -> None:
    for table, plan, _, _, _ in random_plans(make):
        for train, reference, kl in zip(plan.train, plan.reference, plan.kl, strict=True):
            mismatched = {table.kl_units[number] for number in preferences_of(train)} - {-1}
            assert Counter(units_of(kl)) == Counter(mismatched)
            assert Counter(units_of(reference)) == Counter(set(units_of(train)) | mismatched)
            assert preferences_of(reference) == preferences_of(kl) == []


def test_without_a_reference_nothing_is_scored() -> None:
    table = PreferenceTable.from_preferences(random_pairs(np.random.default_rng(0), 9))
    plan = plan_step(
        table,
        world_size=2,
        layout=Layout.SHARED,
        pack_tokens=100,
        reference_tokens=100,
        needs_reference=False,
    )
    assert plan.reference == plan.kl == [[], []]


def test_the_plan_is_a_function_of_its_input() -> None:
    first = [plan for _, plan, *_ in random_plans(random_unpaired, 10)]
    assert first == [plan for _, plan, *_ in random_plans(random_unpaired, 10)]


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def test_the_table_numbers_completions_under_their_prompt() -> None:
    # The same ids under another prompt are another unit; the same under the same prompt are one.
    pairs = [
        Pair(ids(1), ids(7, 7), ids(8)),
        Pair(ids(2), ids(7, 7), ids(9)),
        Pair(ids(1), ids(8), ids(7, 7)),
        Pair(ids(1), ids(8), ids(6)),
    ]
    table = PreferenceTable.from_preferences(pairs)
    assert table.members == [(0, 1), (2, 3), (1, 0), (1, 4)]
    assert table.prompt_of == [0, 0, 1, 1, 0]
    assert table.kl_units == [-1] * 4 and table.desirable is None


def test_the_table_of_unpaired_rows() -> None:
    rows = [
        Unpaired(ids(1), ids(5), True, ids(6)),
        Unpaired(ids(1), ids(6), False, None),
        Unpaired(ids(2), ids(6), False, ids(5)),
    ]
    table = PreferenceTable.from_preferences(rows)
    assert table.members == [(0,), (1,), (2,)]
    assert table.kl_units == [1, -1, 3]
    assert table.prompt_of == [0, 0, 1, 1]
    assert table.desirable == [True, False, False]
    assert PreferenceTable.from_preferences(rows, kl_from_own=True).kl_units == [0, 1, 2]


def test_a_prompt_with_more_pairs_than_a_pack_holds_is_split() -> None:
    # Prompt 10, completions 20 each: a pair has 10 + 2*20 = 50 tokens, two pairs 90, three 130.
    prompt = np.zeros(10, dtype=np.int32)
    answers = [np.full(20, number, dtype=np.int32) for number in range(6)]
    pairs = [Pair(prompt, answers[2 * number], answers[2 * number + 1]) for number in range(3)]
    plan = plan_of(PreferenceTable.from_preferences(pairs), 1, Layout.SHARED, pack_tokens=100)
    groups = [group for pack in plan.train[0] for group in pack]
    assert [(group.preferences, group.num_tokens) for group in groups] == [((0, 1), 90), ((2,), 50)]
    # A copy of the prompt for each: 60 tokens a pair, so that no two fit.
    plan = plan_of(PreferenceTable.from_preferences(pairs), 1, Layout.PLAIN, pack_tokens=100)
    assert [group.num_tokens for pack in plan.train[0] for group in pack] == [60, 60, 60]
    # Three ranks: one pair each, although one pack would hold all.
    plan = plan_of(PreferenceTable.from_preferences(pairs), 3, Layout.SHARED, pack_tokens=1000)
    assert plan.rank_tokens == [50, 50, 50] and plan.rank_imbalance == 1.0


def test_a_prompt_stays_whole_up_to_the_tokens_of_a_group() -> None:
    # Four answers of 20 tokens in all six pairs: 10 + 4 * 20 = 90 tokens whole; cut, answers repeat.
    prompt = np.zeros(10, dtype=np.int32)
    answers = [np.full(20, number, dtype=np.int32) for number in range(4)]
    pairs = [Pair(prompt, one, other) for one, other in itertools.combinations(answers, 2)]
    table = PreferenceTable.from_preferences(pairs)

    def plan(group_tokens: int | None) -> StepPlan:
        return plan_of(table, 1, Layout.SHARED, pack_tokens=70, group_tokens=group_tokens)

    whole, cut = plan(90), plan(None)
    assert [[group.num_tokens for group in pack] for pack in whole.train[0]] == [[90]]
    assert (whole.rank_tokens, whole.num_oversized) == ([90], 0)
    assert plan(89).rank_tokens == cut.rank_tokens
    assert cut.rank_tokens[0] > 90
    # A smaller limit than the pack's own changes nothing, and packs of several prompts keep to the pack's.
    assert plan(10).train == cut.train
    other = np.ones(10, dtype=np.int32)
    both = PreferenceTable.from_preferences([*pairs, Pair(other, answers[0], answers[1])])
    packs = plan_of(both, 1, Layout.SHARED, pack_tokens=70, group_tokens=200).train[0]
    assert sorted(sum(group.num_tokens for group in pack) for pack in packs) == [50, 90]


def test_more_ranks_than_preferences_get_dummies() -> None:
    table = PreferenceTable.from_preferences([Pair(ids(1), ids(2), ids(3))])
    plan = plan_of(table, 3, Layout.SHARED)
    assert [len(packs) for packs in plan.train] == [1, 1, 1]
    assert [pack for packs in plan.train for pack in packs][1:] == [(), ()]
    assert plan.rank_tokens == [3, 0, 0] and plan.rank_imbalance == 3.0


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_many_equal_rows_are_spread_evenly(world_size: int) -> None:
    pairs = [Pair(ids(n), ids(n, 1, 1), ids(n, 2)) for n in range(64)]
    plan = plan_of(PreferenceTable.from_preferences(pairs), world_size, Layout.SHARED)
    counts = [len(preferences_of(packs)) for packs in plan.train]
    assert max(counts) - min(counts) <= 1
    assert plan.rank_imbalance <= 1 + world_size / 64


def test_the_imbalance_of_random_rows_is_small() -> None:
    generator = np.random.default_rng(3)
    pairs = [Pair(*(random_ids(generator, 60) for _ in range(3))) for _ in range(128)]
    plan = plan_of(PreferenceTable.from_preferences(pairs), 4, Layout.SHARED)
    assert plan.rank_imbalance < 1.01


def test_an_epoch_is_a_permutation_by_seed_and_epoch() -> None:
    orders = {
        (seed, epoch): epoch_order(50, seed=seed, epoch=epoch, sampling="random")
        for seed in (1, 2)
        for epoch in (0, 1)
    }
    for order in orders.values():
        assert sorted(order) == list(range(50))
    assert len({order.tobytes() for order in orders.values()}) == 4
    again = epoch_order(50, seed=2, epoch=1, sampling="random")
    assert np.array_equal(again, orders[2, 1])
    sequential = epoch_order(50, seed=2, epoch=1, sampling="sequential")
    assert np.array_equal(sequential, np.arange(50))


def test_global_batches_drop_nothing() -> None:
    order = epoch_order(23, seed=0, epoch=0, sampling="random")
    batches = global_batch_rows(order, 5)
    assert [len(rows) for rows in batches] == [5, 5, 5, 5, 3]
    assert np.array_equal(np.concatenate(batches), order)
    assert [len(rows) for rows in global_batch_rows(order[:4], 5)] == [4]
