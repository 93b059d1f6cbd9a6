"""Mixtures: exact shares, rows by a seeded permutation, one storage, and every row's source."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from ds_align import same_run
from ds_align.batch import Layout
from ds_align.batches import BatchPlanner
from ds_align.config import DPOConfig, KTOConfig
from ds_align.config.sources import MixturePart
from ds_align.data import load_mixture, load_preferences
from ds_align.data.mixture import choose_rows, interleaved
from ds_align.data.quotas import largest_total, quotas
from ds_align.errors import CheckpointError, ConfigError, DataError
from ds_align.packing import CostModel
from ds_align.splits import load_splits
from tests.data import formats


def ids(first: int, number: int) -> list[dict]:
    """Rows whose prompts tell them apart, whatever file they are in."""
    return [
        {"prompt_ids": [first, index], "chosen_ids": [index, 3], "rejected_ids": [index, 4]}
        for index in range(number)
    ]


@pytest.fixture
def mix(tmp_path):
    """Builds a config whose parts are files with so many rows; prompts of part i begin with 10 + i."""

    def build(*numbers: int, kind=DPOConfig, rows=None, parts=({}, {}, {}, {}), **settings):
        mixture = []
        for index, number in enumerate(numbers):
            content = ids(10 + index, number) if rows is None else rows[index]
            path = formats.write(tmp_path / f"part{index}", "a.jsonl", content)
            mixture.append({"path": str(path), "name": f"p{index}"} | parts[index])
        return kind(mixture=mixture, dataset_cache_dir=str(tmp_path / "tokens"), **settings)

    return build


def load(config):
    return load_mixture(config, None, "unpaired" if isinstance(config, KTOConfig) else "pairs")


def weighted(*weights) -> tuple[dict, ...]:
    return tuple({"weight": weight} for weight in weights)


def prompts(data) -> list[tuple]:
    return [tuple(row.prompt_ids.tolist()) for row in data]


def test_quotas_by_hand():
    # Shares of 7: 3.5, 2.1, 1.4; whole rows 3, 2, 1; the seventh to the remainder 0.5.
    assert quotas([5, 3, 2], 7) == [4, 2, 1]
    # Shares of 10: 3.33 each; the tenth to the first of three equal remainders.
    assert quotas([1, 1, 1], 10) == [4, 3, 3]
    assert quotas([1, 999], 10) == [0, 10]
    # The Alabama paradox: with 10 rows the third part has one more than with 11.
    assert (quotas([6, 6, 2], 10), quotas([6, 6, 2], 11)) == ([4, 4, 2], [5, 5, 1])


def by_rounds(weights: list[int], total: int) -> list[int]:
    """Hamilton's method told another way: one row at a time to whom the most of a row is owed."""
    shares = [Fraction(weight * total, sum(weights)) for weight in weights]
    given = [share.numerator // share.denominator for share in shares]
    served: set[int] = set()
    while sum(given) < total:
        owed = [(-1 if part in served else shares[part] - given[part]) for part in range(len(shares))]
        # Of equal ones the larger part, then the first.
        part = max(range(len(owed)), key=lambda part: (owed[part], weights[part], -part))
        given[part] += 1
        served.add(part)
    return given


@pytest.mark.parametrize("seed", range(60))
def test_quotas_are_hamiltons_and_within_a_row_of_the_share(seed):
    rng = random.Random(seed)
    weights = [rng.randint(1, 50) for _ in range(rng.randint(1, 6))]
    total = rng.randint(1, 500)
    found = quotas(weights, total)
    assert sum(found) == total
    assert found == by_rounds(weights, total)
    for quota, weight in zip(found, weights, strict=True):
        assert abs(quota - Fraction(weight * total, sum(weights))) < 1
    factor = rng.randint(2, 9)
    assert quotas([weight * factor for weight in weights], total) == found


@pytest.mark.parametrize("seed", range(60))
def test_the_largest_total_is_the_largest(seed):
    rng = random.Random(seed)
    weights = [rng.randint(1, 9) for _ in range(rng.randint(1, 4))]
    limits = [rng.choice([None, rng.randint(1, 12)]) for _ in weights[1:]] + [rng.randint(1, 12)]

    def fits(total: int) -> bool:
        parts = zip(by_rounds(weights, total), limits, strict=True)
        return all(limit is None or quota <= limit for quota, limit in parts)

    # No total above 13 * sum(weights) fits: the last part alone would have 13 rows or more.
    assert largest_total(weights, limits) == max(filter(fits, range(13 * sum(weights) + 1)))


def test_chosen_rows_repeat_only_when_all_were_taken():
    assert len(set(choose_rows(100, 60, most=100, seed=[1]).tolist())) == 60
    # 7 rows, 5 of them at most, 13 times: each of the five 2 or 3 times.
    taken = Counter(choose_rows(7, 13, most=5, seed=[1]).tolist())
    assert sorted(taken.values()) == [2, 2, 3, 3, 3]
    again = choose_rows(7, 13, most=5, seed=[1])
    assert again[:5].tolist() != again[5:10].tolist()
    assert set(again[:5].tolist()) == set(again[5:10].tolist())
    # A larger quota goes on where the smaller one ended.
    assert (
        choose_rows(100, 60, most=100, seed=[1])[:20].tolist()
        == choose_rows(100, 20, most=100, seed=[1]).tolist()
    )


def test_every_beginning_of_the_order_has_the_shares():
    counts = [50, 30, 7]
    order = interleaved(counts)
    assert sorted(order) == list(range(87))
    part = np.searchsorted(np.cumsum(counts), order, side="right")
    for end in range(1, 88):
        for number, count in enumerate(counts):
            share = count / 87
            # Up to a place t part p has round(t * count) rows: half a row off, and so is each other part.
            assert abs((part[:end] == number).sum() - end * share) <= 0.5 + 1.5 * share


def test_a_mixture_has_its_shares_rows_and_sources(mix):
    data = load(mix(100, 60, 30, parts=weighted(0.5, 0.3, 0.2)))
    # The third part has 30 rows. Of 152 rows its share is 30.4, and 76 and 45.6 are the others: 76, 46, 30.
    # Of 153 it is 30.6, and 76.5 and 45.9: 76, 46, 31.
    assert [(part.name, part.available, part.rows, part.share) for part in data.parts] == [
        ("p0", 100, 76, 0.5),
        ("p1", 60, 46, 46 / 152),
        ("p2", 30, 30, 30 / 152),
    ]
    assert len(data) == 152 == data.counts["rows"]
    assert len(set(prompts(data))) == 152
    assert [10 + source for source in data.sources] == [prompt[0] for prompt in prompts(data)]
    for row, prompt in zip(data, prompts(data), strict=True):
        assert row.chosen_ids.tolist() == [prompt[1], 3]
        assert row.rejected_ids.tolist() == [prompt[1], 4]
    assert data.completion_lengths.tolist() == [[2, 2]] * 152
    # Not the first rows of a file.
    assert {prompt[1] for prompt in prompts(data) if prompt[0] == 10} != set(range(76))
    assert "mixture part 'p1'" in data.notes[1]
    assert "46 rows, 30.26% of all, of 60 that are there" in data.notes[1]
    kept = data.select(np.flatnonzero(data.sources == 1))
    assert kept.sources.tolist() == [1] * 46


def test_the_seed_and_the_names_alone_choose_the_rows(mix):
    first = prompts(load(mix(40, 20)))
    assert prompts(load(mix(40, 20))) == first
    other = prompts(load(mix(40, 20, seed=7)))
    assert other != first
    # Part 1 is taken whole, part 0 by half: other rows, the same shares.
    assert Counter(prompt[0] for prompt in other) == Counter(prompt[0] for prompt in first)
    # Shares of 51: 30.6 and 20.4; without equal remainders the order of the parts says nothing.
    config = mix(40, 20, parts=weighted(3, 2))
    turned = load(DPOConfig(**(config.model_dump() | {"mixture": config.mixture[::-1]})))
    assert len(turned) == 51
    assert sorted(prompts(turned)) == sorted(prompts(load(config)))


def test_another_weight_tokenizes_nothing(mix):
    assert load(mix(40, 20)).num_processes == 1
    again = load(mix(40, 20, parts=weighted(3, 1)))
    assert again.num_processes == 0
    assert [part.rows for part in again.parts] == [40, 13]  # the largest total: 53 is 39.75 and 13.25


def test_more_rows_than_there_are_need_leave_to_repeat(mix):
    with pytest.raises(
        DataError, match="mixture part 'p1': its share of mixture_rows=60 is 30 rows, and it has"
    ):
        load(mix(40, 20, mixture_rows=60))
    parts = ({}, {"repeat": True})
    data = load(mix(40, 20, mixture_rows=60, parts=parts))
    assert [part.rows for part in data.parts] == [30, 30]
    assert data.parts[1].repeated == 10
    times = Counter(prompts(data))
    assert sorted(times.values()) == [1] * 40 + [2] * 10
    assert all(prompt[0] == 11 for prompt, number in times.items() if number == 2)
    # Without a number, the part that may not repeat says how many there are.
    assert len(load(mix(40, 20, parts=parts))) == 80
    # Where all may, none does. Of 41 rows each share is 20.5, and the first part gets the row that is left.
    assert [part.rows for part in load(mix(40, 20, parts=({"repeat": True},) * 2)).parts] == [21, 20]


def test_max_rows_bounds_the_different_rows(mix):
    data = load(mix(40, 20, parts=({"max_rows": 5}, {})))
    assert [part.rows for part in data.parts] == [5, 5]
    data = load(mix(40, 20, mixture_rows=30, parts=({"max_rows": 5, "repeat": True}, {})))
    assert Counter(Counter(prompt for prompt in prompts(data) if prompt[0] == 10).values()) == {3: 5}


def test_equal_prompts_of_two_parts_are_one(mix):
    data = load(mix(6, 6, rows=[ids(10, 6), ids(10, 6)]))
    assert len(data) == 12
    keys: dict[tuple, set] = {}
    for prompt, key in zip(prompts(data), data.prompt_keys.tolist(), strict=True):
        keys.setdefault(prompt, set()).add(key)
    assert [len(found) for found in keys.values()] == [1] * 6
    assert len(set.union(*keys.values())) == 6
    splits = load_splits(mix(6, 6, rows=[ids(10, 6), ids(10, 6)], eval_fraction=0.5), None)
    assert not set(prompts(splits.train)) & set(prompts(splits.evaluation))
    assert len(splits.train) == len(splits.evaluation) == 6


def test_a_row_keeps_the_mismatched_completion_of_its_part(mix):
    """A part with given y', one without, and one of pairs: y' and labels are those of the part alone."""
    singles = [
        {"prompt_ids": [20, index], "completion_ids": [index], "label": index % 2 == 0} for index in range(8)
    ]
    given = [
        row | {"prompt_ids": [30, 1], "kl_completion_ids": [50 + index]} for index, row in enumerate(singles)
    ]
    config = mix(8, 8, 4, kind=KTOConfig, rows=[singles, given, ids(40, 4)])
    data = load(config)
    expected = {}
    for part in config.mixture:
        for row in load_preferences(part["path"], tokenizer=None, inputs="unpaired", config=config):
            key = (*row.prompt_ids.tolist(), *row.completion_ids.tolist())
            expected[key] = (row.desirable, row.kl_ids.tolist())
    assert len(expected) == 8 + 8 + 8
    found = {
        (*row.prompt_ids.tolist(), *row.completion_ids.tolist()): (row.desirable, row.kl_ids.tolist())
        for row in data
    }
    assert found == expected
    assert data.kl_lengths.tolist() == [len(row.kl_ids) for row in data]


def test_parts_have_their_own_form_columns_and_split(bpe, tmp_path):
    rows = [{"prompt": f"the cat {index}", "chosen": " sat", "rejected": " dog"} for index in range(10)]
    renamed = [{"q": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in rows]
    text = formats.write(tmp_path, "splits.json", rows)
    table = formats.write(tmp_path, "a.csv.gz", renamed)
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    config = DPOConfig(
        mixture=[{"path": str(text), "split": "train[:40%]"}, {"path": str(table), "columns": columns}],
        dataset_cache_dir="none",
    )
    data = load_mixture(config, bpe(), "pairs")
    assert [part.name for part in data.parts] == ["splits", "a"]
    assert [part.available for part in data.parts] == [4, 10]
    whole = load_preferences(rows, tokenizer=bpe(), inputs="pairs", config=config)
    assert set(prompts(data)) <= set(prompts(whole))
    assert {tuple(row.chosen_ids.tolist()) for row in data} == {tuple(whole[0].chosen_ids.tolist())}


@pytest.mark.parametrize(
    ("part", "error", "message"),
    [
        ({"path": "nowhere.jsonl"}, DataError, "nowhere.jsonl: no such file"),
        ({"split": "test"}, DataError, "there is no split 'test'"),
        ({"columns": {"chosen": "x"}}, DataError, "column 'x' is missing"),
        ({"weight": 1e-3}, DataError, "weight=0.001 gives it none of 40 rows"),
        ({"weight": 1e-9}, ConfigError, "weight=1e-09 is less than 1/100000 of all weights"),
        ({"revision": "v1"}, DataError, "is no data set of the Hub"),
    ],
)
def test_errors_name_the_part(mix, part, error, message):
    rows = [ids(10, 40), [{"text": "a"}] if "columns" in part else ids(11, 4)]
    with pytest.raises(error, match=rf"^mixture part 'p1': .*{re.escape(message)}"):
        load(mix(40, 4, rows=rows, parts=({}, part)))


def rows_of_steps(config, data, world_size: int) -> list[list[int]]:
    """The rows of each step as all ranks together lay them out."""
    steps = []
    for rank in range(world_size):
        planner = BatchPlanner(
            config, Layout.SHARED, world_size=world_size, rank=rank, device="cpu", cost=CostModel(0.1, 1e-3)
        )
        for number, step in enumerate(planner.batches(data)):
            if rank == 0:
                steps.append([])
            steps[number] += [row for micro in step.micro_batches for row in micro.rows]
    return [sorted(rows) for rows in steps]


def test_one_rank_and_two_see_the_same_rows(mix, monkeypatch):
    found = []
    for world_size in (1, 2):
        config = mix(40, 20, parts=weighted(2, 1), per_device_train_batch_size=8 // world_size)
        ranks = []
        for rank in range(world_size):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("LOCAL_RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(world_size))
            ranks.append(load(config))
        assert len({data.digest() for data in ranks}) == 1
        found.append(
            (ranks[0].digest(), ranks[0].prompt_keys.tolist(), rows_of_steps(config, ranks[0], world_size))
        )
    assert found[0] == found[1]


def test_a_run_with_another_mixture_is_not_continued(mix):
    first = mix(40, 20)

    def facts(config) -> dict:
        data = load(config)
        return {"num_steps": 5, "train_rows": len(data), "train_data": data.digest()}

    state = {"facts": facts(first), "global_step": 1, **same_run.settings_of(first, 1)}
    assert same_run.check_facts(Path("x"), state, facts(mix(40, 20)), first) == []
    for other in (
        mix(40, 20, parts=weighted(2, 1.5)),
        mix(40, 20, mixture_rows=30),
        mix(40, 20, parts=({"max_rows": 19}, {})),
        mix(40, 20, parts=({"name": "q"}, {})),
        mix(40, 21),
    ):
        # The settings may be told in other words; the rows decide.
        assert same_run.check_settings(Path("x"), state, other, 1) == []
        with pytest.raises(CheckpointError, match="the training data are other rows"):
            same_run.check_facts(Path("x"), state, facts(other), other)


def test_the_config_of_a_mixture_survives_yaml_and_refuses_what_it_does_not_know(mix, tmp_path):
    config = mix(4, 2, parts=({"weight": 0.25, "columns": {"prompt": "q"}}, {"repeat": True}))
    config.to_yaml(tmp_path / "a.yaml")
    again = DPOConfig.from_yaml(tmp_path / "a.yaml")
    assert again == config
    assert json.loads(json.dumps(again.model_dump(mode="json")))["mixture"] == config.mixture
    assert again.mixture_parts[0].weight == 0.25
    assert MixturePart(path="org/name").title == "name"
    assert MixturePart(path="a/b.jsonl.gz").title == "b"
    for part, message in (
        ({"wieght": 1}, "part 1: unknown key 'wieght'; did you mean weight?"),
        ({"weight": 1}, "part 1: path is missing"),
        ({"path": "a", "weight": 0}, "part 1 (a): weight=0 is not valid; expected a number > 0"),
        ({"path": "a", "columns": {"text": "b"}}, "expected a mapping of prompt, chosen"),
        ({"path": "a", "max_rows": 0}, "max_rows=0 is not valid"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            DPOConfig(mixture=[part])
    with pytest.raises(ConfigError, match="2 parts have the name 'a'"):
        DPOConfig(mixture=[{"path": "x/a.csv"}, {"path": "y/a.jsonl"}])


def test_a_part_of_ranked_lists_joins_a_part_of_pairs(bpe, tmp_path) -> None:
    answers = [" sat", " ran", " lay", " ate"]
    rows = [{"question": f"p{n}", "texts": answers, "values": [4, 3, 2, 1]} for n in range(3)]
    pairs = [{"prompt": f"q{n}", "chosen": " sat", "rejected": " ran"} for n in range(6)]
    for name, content in (("lists", rows), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)), encoding="utf-8")
    columns = {"prompt": "question", "completions": "texts", "scores": "values"}
    for first in (0, 1):
        parts = [
            {"path": str(tmp_path / "lists.jsonl"), "columns": columns, "weight": 3},
            {"path": str(tmp_path / "pairs.jsonl"), "weight": 1},
        ]
        config = DPOConfig(
            mixture=parts[::-1] if first else parts,
            ranked_pairs="all",
            dataset_cache_dir=str(tmp_path / "tokens"),
        )
        tokenizer = bpe()
        data = load_mixture(config, tokenizer, "pairs")
        # 3 lists of 4 answers: 18 pairs, and 6 of the other part, a third of them.
        assert len(data) == 24
        texts = [
            tuple(
                tokenizer.decode(ids).removesuffix("<|im_end|>")
                for ids in (r.prompt_ids, r.chosen_ids, r.rejected_ids)
            )
            for r in data
        ]
        every = [(one, other) for i, one in enumerate(answers) for other in answers[i + 1 :]]
        expected = [(f"p{n}", *pair) for n in range(3) for pair in every]
        assert sorted(texts) == sorted(expected + [(f"q{n}", " sat", " ran") for n in range(6)])
        lengths = [[len(r.chosen_ids), len(r.rejected_ids)] for r in data]
        assert data.completion_lengths.tolist() == lengths
        assert any("3 ranked lists (question, texts, values) -> 18 pairs" in note for note in data.notes)


def text_of(tokenizer):
    return lambda ids: tokenizer.decode(ids).removesuffix("<|im_end|>")
