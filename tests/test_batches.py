"""A data set as global batches: the same with and without a thread, from any step, for any rank."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
import time
from itertools import islice

import numpy as np
import pytest
import torch

from ds_align.batch import GlobalBatch, Layout, PackedBatch
from ds_align.batches import BatchPlanner
from ds_align.config import METHODS
from ds_align.data import PreferenceDataset, load_preferences
from ds_align.errors import ConfigError
from ds_align.packing import CostModel
from ds_align.packing.ahead import THREAD_NAME
from tests.distributed.tiny import pairs, unpaired

KINDS = [("dpo", layout) for layout in Layout] + [("kto", Layout.SHARED), ("simpo", Layout.PADDED)]


def data_of(method: str = "dpo", rows: list[dict] | None = None, **settings: object) -> PreferenceDataset:
    if rows is None:
        rows = unpaired() if method == "kto" else pairs()
    config = METHODS[method].config(**settings)
    return load_preferences(rows, tokenizer=None, inputs=METHODS[method].inputs, config=config)


def planner_of(
    method: str = "dpo",
    layout: Layout = Layout.SHARED,
    *,
    world_size: int = 1,
    rank: int = 0,
    device: str = "cpu",
    **settings: object,
) -> BatchPlanner:
    values = {
        "per_device_train_batch_size": 6 // world_size,
        "per_device_eval_batch_size": 4,
        "num_train_epochs": 2.0,
        "pack_max_tokens": 64,
    }
    config = METHODS[method].config(**(values | settings))
    cost = CostModel(per_label=0.1, per_key=1e-3)
    return BatchPlanner(config, layout, world_size=world_size, rank=rank, device=device, cost=cost)


def assert_same(first: object, second: object) -> None:
    """Every field equal, tensors bit for bit."""
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and torch.equal(first, second)
    elif isinstance(first, list):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    elif isinstance(first, GlobalBatch | PackedBatch):
        for field in dataclasses.fields(first):
            if field.name != "owner":
                assert_same(getattr(first, field.name), getattr(second, field.name))
    else:
        assert first == second


def test_ranks_are_balanced_by_the_cost_that_is_given() -> None:
    """One pair of 41 tokens and six of 9: by their tokens it needs company, by their squares it has none."""
    ids = list(range(2, 50))
    large = {"prompt_ids": [1], "chosen_ids": ids[:20], "rejected_ids": ids[20:40]}
    short = [{"prompt_ids": [90 + n], "chosen_ids": ids[:4], "rejected_ids": ids[4:8]} for n in range(6)]
    data = data_of(rows=[large, *short])
    config = METHODS["dpo"].config(per_device_train_batch_size=4, train_sampling_strategy="sequential")

    def rows_with_the_long_one(cost: CostModel | None) -> int:
        for rank in range(2):
            planner = BatchPlanner(config, Layout.SHARED, world_size=2, rank=rank, cost=cost)
            (batch,) = [planner.lay_out(data, range(7))]
            rows = [row for micro in batch.micro_batches for row in micro.rows]
            if 0 in rows:
                return len(rows)
        raise AssertionError("no rank has the long one")

    # Tokens: 41 + 6 x 9 = 95, so the long one takes one short one with it (50 and 45).
    assert rows_with_the_long_one(None) == 2
    assert rows_with_the_long_one(CostModel(per_key=1.0)) == 1


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


@pytest.mark.parametrize(("method", "layout"), KINDS)
def test_batches_made_ahead_are_those_that_are_not(method: str, layout: Layout) -> None:
    data = data_of(method)
    planner = planner_of(method, layout, world_size=2, rank=1)
    ahead = list(planner.batches(data))
    # 23 rows in batches of 6 are 4 steps, twice.
    assert len(ahead) == 8 and threads() == []
    plain = [
        planner.lay_out(data, rows, step=step, epoch=step / 4)
        for step, rows in enumerate(planner.rows_by_step(data), 1)
    ]
    assert_same(ahead, plain)
    for batch in ahead:
        assert all(micro.owner is batch for micro in batch.micro_batches)
    assert_same(list(planner.evaluation_batches(data)), list(planner.evaluation_batches(data)))


@pytest.mark.parametrize("start", [0, 1, 4, 6, 8])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_run_goes_on_at_any_step(start: int, grouped: bool) -> None:
    data, planner = data_of(), planner_of(group_by_prompt=grouped)
    assert_same(list(planner.batches(data, start)), list(planner.batches(data))[start:])


@pytest.mark.parametrize("method", ["dpo", "kto"])
@pytest.mark.parametrize("grouped", [False, True])
def test_the_ranks_share_each_step_and_an_epoch_holds_every_row_once(method: str, grouped: bool) -> None:
    data = data_of(method)
    settings = {"group_by_prompt": grouped}
    planners = [planner_of(method, world_size=3, rank=rank, **settings) for rank in range(3)]
    ranks = [list(planner.batches(data)) for planner in planners]
    one = list(planner_of(method, **settings).batches(data))
    epochs: list[list[int]] = [[], []]
    for step, parts in enumerate(zip(*ranks, strict=True)):
        rows = [row for batch in parts for micro in batch.micro_batches for row in micro.rows]
        # The order does not depend on the number of ranks.
        assert sorted(rows) == sorted(row for micro in one[step].micro_batches for row in micro.rows)
        assert len({len(batch.micro_batches) for batch in parts}) == 1
        assert len({batch.rank_imbalance for batch in parts}) == 1
        assert len(rows) == parts[0].num_preferences
        epochs[step // 4] += rows
    assert [sorted(rows) for rows in epochs] == [list(range(23))] * 2
    assert epochs[0] != epochs[1]


def test_an_evaluation_is_in_file_order() -> None:
    data, planner = data_of(), planner_of()
    batches = list(planner.evaluation_batches(data))
    found = [sorted(row for micro in batch.micro_batches for row in micro.rows) for batch in batches]
    assert [len(rows) for rows in found] == [4, 4, 4, 4, 4, 3]
    assert [row for rows in found for row in rows] == list(range(23))


def ranked() -> list[dict]:
    """8 prompts with 4 completions each, all 6 pairs of them; the pairs of a prompt far apart."""
    generator = np.random.default_rng(0)

    def ids(size: int) -> list[int]:
        return generator.integers(2, 96, size).tolist()

    prompts = [(ids(40), [ids(12) for _ in range(4)]) for _ in range(8)]
    return [
        {"prompt_ids": prompt, "chosen_ids": answers[i], "rejected_ids": answers[j]}
        for i in range(4)
        for j in range(i + 1, 4)
        for prompt, answers in prompts
    ]


def test_pairs_of_a_prompt_stand_in_one_step_and_one_pack() -> None:
    data = data_of(rows=ranked())
    settings = {"per_device_train_batch_size": 12, "num_train_epochs": 1.0, "pack_max_tokens": 100}

    def tokens(planner: BatchPlanner) -> list[int]:
        return [sum(micro.num_tokens for micro in batch.micro_batches) for batch in planner.batches(data)]

    # A step holds two prompts of 40 + 4 * 12 = 88 tokens, each in a pack of its own.
    grouped = planner_of(**settings, group_by_prompt=True)
    assert tokens(grouped) == [176] * 4
    for batch in grouped.batches(data):
        for micro in batch.micro_batches:
            assert len(set(data.prompt_keys[list(micro.rows)])) == 1 and len(micro.rows) == 6
    assert sum(tokens(planner_of(**settings))) > 2 * 4 * 176


def test_grouping_says_where_it_changes_nothing() -> None:
    rows = [{"prompt_ids": [n], "chosen_ids": [1], "rejected_ids": [2]} for n in range(4)]
    planner = planner_of(group_by_prompt=True)
    assert "no two of the 4 rows" in planner.messages(data_of(rows=rows))[0]
    assert planner.messages(data_of()) == [] == planner_of().messages(data_of(rows=rows))
    same = [list(each.rows_by_step(data_of(rows=rows))) for each in (planner, planner_of())]
    assert np.array_equal(same[0], same[1])


def test_grouping_a_file_in_its_own_order_is_refused() -> None:
    with pytest.raises(ConfigError, match="group_by_prompt has no meaning with train_sampling_strategy"):
        planner_of(group_by_prompt=True, train_sampling_strategy="sequential")


class BrokenData:
    """Rows of which one cannot be read."""

    def __init__(self, data: PreferenceDataset) -> None:
        self.data = data
        self.prompt_keys = data.prompt_keys

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> object:
        if row == 17:
            raise OSError("the disk is gone")
        return self.data[row]


def test_an_error_in_the_data_comes_where_the_batch_is_taken() -> None:
    planner = planner_of(train_sampling_strategy="sequential")
    batches = planner.batches(BrokenData(data_of()))
    assert [next(batches).step, next(batches).step] == [1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert threads() == []


def test_leaving_a_run_early_leaves_no_thread() -> None:
    data, planner = data_of(), planner_of()
    next(planner.batches(data))
    assert len(list(islice(planner.batches(data), 2))) == 2
    for _ in zip(range(2), planner.batches(data), strict=False):
        assert len(threads()) == 1
    for _ in planner.evaluation_batches(data):
        break
    assert threads() == []


def test_planning_touches_no_device() -> None:
    # For a GPU that is not there: whatever asked it would fail.
    planner, data = planner_of(device="cuda", pack_max_tokens="auto"), data_of()
    assert planner.pack_tokens == 16384 and planner.reference_tokens == 8 * 16384
    assert planner.group_tokens == 16384
    own = planner_of(pack_max_tokens="auto")
    assert (own.pack_tokens, own.group_tokens) == (512, 1024)
    # What a user names is never exceeded but by a single preference.
    named = planner_of(pack_max_tokens=300)
    assert (named.pack_tokens, named.group_tokens) == (300, 300)
    batch = planner.lay_out(data, range(6))
    assert batch.micro_batches[0].input_ids.device.type == batch.unit_lengths.device.type == "cpu"


def test_tools_plan_without_deepspeed() -> None:
    code = "import sys, ds_align.batches; print('deepspeed' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False"]


def test_the_step_does_not_wait_for_its_batch() -> None:
    """A slow data set beside a slow step: in turn the step waits for each batch, ahead for the first one."""

    class SlowData(BrokenData):
        def __getitem__(self, row: int) -> object:
            time.sleep(0.005)
            return self.data[row]

    data, planner = SlowData(data_of()), planner_of()
    batches, waits = planner.batches(data), []
    for _ in range(8):
        started = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - started)
        time.sleep(0.1)
    assert waits[0] > 0.03
    assert np.median(waits[1:]) < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_for_a_gpu_are_pinned() -> None:
    data = data_of("kto")
    plain = [planner_of("kto").lay_out(data, rows) for rows in planner_of("kto").rows_by_step(data)]
    for found, expected in zip(planner_of("kto", device="cuda").batches(data), plain, strict=True):
        for packs in ("micro_batches", "reference_batches", "kl_batches"):
            for pack, other in zip(getattr(found, packs), getattr(expected, packs), strict=True):
                assert pack.input_ids.is_pinned() and pack.labels.is_pinned()
                assert torch.equal(pack.to("cuda").input_ids.cpu(), other.input_ids)
        assert found.unit_lengths.is_pinned() and found.kl_units.is_pinned()
