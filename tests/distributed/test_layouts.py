"""The same global batch gives the same loss and gradient for any packs, micro-batches, ranks and ZeRO stage.

The measure is a loop in plain PyTorch, one sequence at a time, that shares only the loss functions.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.launching import launch
from tests.distributed.plain_loop import PlainLoop, completion_logp
from tests.distributed.programs.layouts import CASES, EVERYWHERE, FEWER, GLOBAL_BATCH
from tests.distributed.tiny import pairs, unpaired

pytestmark = pytest.mark.distributed

METHODS = EVERYWHERE
LAYOUTS = ("one_pack", "micro_batches", "not_shared", "padded", "zero0", "zero1", "zero2", "zero3")
RUNS = [(name, layout) for name in CASES for layout in LAYOUTS if name in EVERYWHERE or layout in FEWER]


@pytest.fixture(scope="module")
def results(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """(case, layout) -> what the real engine gave, from one process and from two."""
    folder = tmp_path_factory.mktemp("layouts")
    launch("layouts.py", models, folder / "one.pt", "one_rank", num_ranks=1).check()
    launch("layouts.py", models, folder / "two.pt", "two_ranks", num_ranks=2).check()
    return {**torch.load(folder / "one.pt"), **torch.load(folder / "two.pt")}


@pytest.fixture(scope="module")
def expected(models: Path) -> dict:
    """case -> losses and weights of the plain loop."""
    return {name: PlainLoop(name, models).run() for name in CASES}


def largest_difference(first: dict, second: dict) -> float:
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.mark.parametrize(("method", "layout"), RUNS)
def test_losses_equal_plain_pytorch(results, expected, method, layout):
    assert results[method, layout]["losses"] == pytest.approx(expected[method]["losses"], abs=1e-6, rel=1e-6)


@pytest.mark.parametrize(("method", "layout"), RUNS)
def test_parameters_equal_plain_pytorch(results, expected, method, layout):
    found = results[method, layout]
    assert largest_difference(found["weights"], expected[method]["weights"]) < 1e-6
    # Four steps moved the weights thousands of times further than that, so a wrong scale would show.
    assert largest_difference(found["weights"], found["start"]) > 2e-3


@pytest.mark.parametrize(("method", "layout"), [run for run in RUNS if run[1] != "one_pack"])
def test_gradients_equal_one_pack(results, method, layout):
    """With plain SGD the way that the weights went is the sum of the gradients: 1e-5 relative."""
    found, pack = results[method, layout], results[method, "one_pack"]
    way = torch.cat([(pack["weights"][name] - pack["start"][name]).flatten() for name in pack["start"]])
    other = torch.cat([(found["weights"][name] - found["start"][name]).flatten() for name in pack["start"]])
    assert ((way - other).norm() / way.norm()).item() < 1e-5


@pytest.fixture(scope="module")
def single_logps(models: Path) -> dict:
    """field -> log-probs of the starting model, each sequence alone in its row."""
    model = AutoModelForCausalLM.from_pretrained(models / "policy", dtype=torch.float32)
    with torch.no_grad():
        return {
            field: [
                completion_logp(model, row["prompt_ids"], row[field]).item() for row in rows[:GLOBAL_BATCH]
            ]
            for field, rows in (("chosen_ids", pairs()), ("completion_ids", unpaired()))
        }


@pytest.mark.parametrize(("method", "layout"), [(name, layout) for name in METHODS for layout in LAYOUTS])
def test_log_probs_equal_single_sequences(results, single_logps, method, layout):
    single = single_logps["completion_ids" if method == "kto" else "chosen_ids"]
    found = results[method, layout]["logps"]
    if layout in ("one_pack", "micro_batches", "not_shared", "padded"):
        assert sorted(found) == list(range(GLOBAL_BATCH)), "one rank scores every row of the first batch"
    assert found
    for number, total in found.items():
        assert total == pytest.approx(single[number], abs=1e-5, rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_layouts_are_what_they_say(results, method):
    def of(name: str, key: str):
        return results[method, name][key]

    assert of("one_pack", "micro_batches") == [1, 1, 1, 1]
    assert min(of("micro_batches", "micro_batches")) >= 4
    assert [of(name, "layout") for name in LAYOUTS[:4]] == ["shared", "shared", "plain", "padded"]
    for stage in range(4):
        assert of(f"zero{stage}", "zero_stage") == stage
        counts = of(f"zero{stage}", "preferences_by_rank")
        assert [sum(count) for count in counts] == [6, 6, 6, 5]
        assert any(first != second for first, second in counts), "the ranks' rows are uneven"
        # KTO's rows have one completion: here a rank's part of a step fits into one pack.
        assert max(of(f"zero{stage}", "micro_batches")) >= (1 if method == "kto" else 2)


@pytest.mark.parametrize("name", ["dpo", "ipo", "cpo", "simpo", "aot", "bco", "mixture", "ld_wpo", "moe"])
def test_only_coupled_losses_score_a_step_twice_and_only_with_several_micro_batches(results, name):
    coupled = name in ("aot", "bco", "mixture", "moe")
    for layout in FEWER:
        run = results[name, layout]
        for forwards, micro_batches in zip(run["forwards"], run["micro_batches"], strict=True):
            assert forwards == micro_batches * (2 if coupled and micro_batches > 1 else 1)


@pytest.mark.parametrize("name", ["bco", "mixture"])
def test_the_running_mean_is_that_of_the_global_batches(results, name):
    states = [results[name, layout]["state"] for layout in FEWER]
    assert [state["count"] for state in states] == [4, 4, 4]
    assert states[0]["mean"] == pytest.approx(states[1]["mean"], rel=1e-5)
    assert states[0]["mean"] == pytest.approx(states[2]["mean"], rel=1e-5)
    assert abs(states[0]["mean"]) > 1e-3


def test_kto_reference_point_is_at_work(results):
    assert max(results["kto", "zero3"]["kl"]) > 0.1
