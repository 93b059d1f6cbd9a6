"""A cached reference says what the live one says, is loaded only for what is missing, and is never stale."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ds_align.models.quantized import dequantize, quantize
from tests.distributed.launching import launch
from tests.distributed.plain_loop import completion_logp
from tests.distributed.tiny import pairs

pytestmark = pytest.mark.distributed

CASES = (
    *("dpo", "dpo lr", "ipo", "kto", "cut", "overlap", "lora", "own", "short"),
    *("eight bits", "four bits", "damaged", "other weights"),
)
# What the first of the two cached runs had to score, of its rows.
SCORED = {
    "dpo": (21, 21),
    "dpo lr": (0, 21),
    "ipo": (0, 21),
    "overlap": (4, 15),
    "lora": (21, 21),
    "own": (0, 21),
    "short": (8, 8),
    "eight bits": (21, 21),
    "four bits": (21, 21),
    "other weights": (21, 21),
}


@pytest.fixture(scope="module")
def results(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("cache")
    launch("cache.py", models, folder, num_ranks=2, timeout=500).check()
    return torch.load(folder / "results.pt")


def scored_rows(run: dict) -> tuple[int, int]:
    """(scored, needed) as the run said it before training."""
    (line,) = [text for text in run["messages"] if re.match(r"reference cache: .*\d+ rows", text)]
    if match := re.match(r"reference cache: (\d+) of (\d+) rows were scored", line):
        return int(match[1]), int(match[2])
    return 0, int(re.match(r"reference cache: all (\d+) rows are in", line)[1])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("which", ["first", "second"])
def test_a_cached_run_equals_the_live_one(results: dict, case: str, which: str) -> None:
    live, cached = results[f"{case} live"], results[f"{case} {which}"]
    assert cached["kind"] == "cache"
    assert cached["losses"] == pytest.approx(live["losses"], rel=1e-5, abs=1e-5)
    for name, weight in live["weights"].items():
        torch.testing.assert_close(cached["weights"][name], weight, rtol=1e-5, atol=2e-6)
    for part in ("evaluation", "other"):
        numbers = {
            name: value
            for name, value in live[part].items()
            if isinstance(value, float) and name not in ("eval_runtime", "eval_samples_per_second")
        }
        found = {name: cached[part][name] for name in numbers}
        # A margin near 0 may fall on either side in another order of sums.
        assert found == pytest.approx(numbers, rel=1e-3, abs=1e-4), part


@pytest.mark.parametrize("case", [*CASES, "bfloat16"])
def test_the_second_run_loads_no_reference_and_repeats_the_first_bit_for_bit(
    results: dict, case: str
) -> None:
    first, second = results[f"{case} first"], results[f"{case} second"]
    assert second["loads"] == second["loads_with_evaluation"] == second["loads_with_other"] == 0
    assert scored_rows(second)[0] == 0
    assert second["losses"] == first["losses"]
    for name, weight in first["weights"].items():
        assert torch.equal(second["weights"][name], weight), name


@pytest.mark.parametrize("case", SCORED)
def test_only_what_is_missing_is_scored(results: dict, case: str) -> None:
    assert scored_rows(results[f"{case} first"]) == SCORED[case]


def test_a_reference_is_loaded_where_and_only_where_something_is_missing(results: dict) -> None:
    assert results["dpo first"]["loads"] == 1
    assert results["dpo lr first"]["loads_with_other"] == 0
    assert results["ipo first"]["loads_with_other"] == 0
    assert results["own first"]["loads_with_other"] == 0
    # The policy's own model, its adapters off: no second model at all.
    assert results["lora first"]["loads_with_other"] == 0
    # Evaluation on rows that were not there at the start.
    assert results["dpo first"]["loads_with_other"] == 2
    # One step of eight rows, then the evaluation of all of them.
    assert results["short first"]["loads"] == 1
    assert results["short first"]["loads_with_evaluation"] == 2


def test_a_cache_takes_its_time_before_the_steps_and_none_inside_of_them(results: dict) -> None:
    live, first, second = (results[f"dpo {which}"] for which in ("live", "first", "second"))
    assert live["cache_seconds"] == 0.0
    assert all(seconds > 0 for seconds in live["step_seconds"])
    assert first["step_seconds"] == second["step_seconds"] == [0.0] * len(live["step_seconds"])
    assert first["cache_seconds"] > second["cache_seconds"] > 0


def test_kto_shares_the_pairs_and_adds_its_mismatched_completions(results: dict) -> None:
    scored, needed = scored_rows(results["kto first"])
    assert needed == 42
    # Every row of KTO has a y' that no pair has.
    assert scored == 42
    assert results["kto first"]["loads"] == 1


def test_another_truncation_scores_the_rows_that_it_changes_and_no_other(results: dict) -> None:
    scored, needed = scored_rows(results["cut first"])
    assert needed == 21
    assert 0 < scored < 10


def test_another_precision_is_another_reference(results: dict) -> None:
    assert scored_rows(results["bfloat16 first"]) == (21, 21)
    live = results["bfloat16 live"]["losses"]
    # bfloat16 rounds each layer's sums to 8 bits, in another order in each pack.
    assert results["bfloat16 first"]["losses"] == pytest.approx(live, rel=0.05)


def test_damaged_rows_are_named_and_scored_again(results: dict) -> None:
    first, second = results["damaged first"], results["damaged second"]
    assert any("damaged and count as missing" in text for text in first["messages"])
    assert 0 < scored_rows(first)[0] < 21
    assert not any("damaged" in text for text in second["messages"])


def test_precompute_leaves_nothing_to_score(results: dict) -> None:
    assert results["precompute"]["loads"] == 1
    assert results["precomputed"]["loads"] == 0
    assert scored_rows(results["precomputed"]) == (0, 21)


@pytest.mark.parametrize(("case", "bits"), [("eight bits", 8), ("four bits", 4)])
def test_a_reference_in_few_bits_is_the_model_with_its_weights_rounded(
    results: dict, models: Path, case: str, bits: int
) -> None:
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32)
        for name in ("policy", "reference")
    )
    exact = first_loss(policy, reference)
    for module in reference.modules():
        if type(module) is torch.nn.Linear and module is not reference.get_output_embeddings():
            shape = tuple(module.weight.shape)
            module.weight.data = dequantize(quantize(module.weight, bits), shape, bits, torch.float32)
    expected = first_loss(policy, reference)
    assert results[f"{case} live"]["losses"][0] == pytest.approx(expected, rel=1e-5)
    assert abs(expected - exact) > 1e-4


def first_loss(policy: torch.nn.Module, reference: torch.nn.Module) -> float:
    """Summed DPO loss of the first global batch, beta 0.1."""
    total = 0.0
    with torch.no_grad():
        for row in pairs(21)[:8]:
            gaps = [
                completion_logp(policy, row["prompt_ids"], row[field])
                - completion_logp(reference, row["prompt_ids"], row[field])
                for field in ("chosen_ids", "rejected_ids")
            ]
            total -= torch.nn.functional.logsigmoid(0.1 * (gaps[0] - gaps[1])).item()
    return total
