"""Runs of the trainer on two ranks: what they record, save and measure, and other ways to the same result."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.distributed.launching import launch

pytestmark = pytest.mark.distributed

METHODS = ("dpo", "ipo", "kto", "cpo", "simpo")
LOGGED = {
    "step",
    "epoch",
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "grad_norm",
    "learning_rate",
    "pairs_per_second",
    "tokens_per_second",
    "step_time",
    "padding_fraction",
    "reference_time_fraction",
    "prompt_tokens_shared",
    "rank_imbalance",
    "peak_memory_gb",
}
LOGGED_BY_METHOD = {
    "kto": {"kl"},
    "cpo": {"nll_loss", "policy_accuracy"},
    "simpo": {"nll_loss", "policy_accuracy"},
}
SUMMARY = {
    "status",
    "method",
    "global_step",
    "training_loss",
    "world_size",
    "zero_stage",
    "backend",
    "reference",
    "reference_time_fraction",
    "reference_cache_seconds",
    "tokens_forward",
    "tokens_padded_equivalent",
    "peak_memory_gb",
    "metrics",
    "versions",
}
TIMES = ("eval_runtime", "eval_samples_per_second")


@pytest.fixture(scope="module")
def out(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where programs/runs.py left its records, from two ranks and from one."""
    folder = tmp_path_factory.mktemp("runs")
    launch("runs.py", models, folder, num_ranks=2).check()
    launch("runs.py", models, folder, num_ranks=1).check()
    return folder


@pytest.fixture(scope="module")
def facts(out: Path) -> dict:
    return json.loads((out / "runs-2.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def alone(out: Path) -> dict:
    return json.loads((out / "runs-1.json").read_text(encoding="utf-8"))


def metrics_of(out: Path, method: str) -> tuple[list[dict], list[dict]]:
    """(training lines, evaluation lines) of a run."""
    text = (out / method / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "eval_loss" in line]


@pytest.mark.parametrize("method", METHODS)
def test_metrics_have_their_names(out, method):
    training, evaluations = metrics_of(out, method)
    expected = LOGGED | LOGGED_BY_METHOD.get(method, set())
    # A KTO window without an undesirable row has no rewards/rejected; these windows have both.
    assert all(expected <= set(line) for line in training), expected - set(training[0])
    assert [line["step"] for line in training] == [1, 2, 4, 5]
    assert all(math.isfinite(value) for line in training for value in line.values())
    accuracy = {
        "kto": {"eval_desirable_accuracy", "eval_undesirable_accuracy", "eval_overall_accuracy"},
    }.get(method, {"eval_preference_accuracy", "eval_margin", "eval_confidence", "eval_policy_accuracy"})
    wanted = accuracy | {"eval_loss", "eval_runtime", "eval_samples_per_second"}
    assert all(wanted <= set(line) for line in evaluations), wanted - set(evaluations[0])


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_at_the_start_at_intervals_and_at_the_end(out, method):
    _, evaluations = metrics_of(out, method)
    assert [line["step"] for line in evaluations] == [0, 2, 4, 5]
    # The policy has moved between them.
    assert len({line["eval_loss"] for line in evaluations}) == 4
    assert all(line["eval_samples"] == 5 for line in evaluations)


@pytest.mark.parametrize("method", METHODS)
def test_the_summary_has_its_names(out, facts, method):
    summary = json.loads((out / method / "run_summary.json").read_text(encoding="utf-8"))
    assert set(summary) >= SUMMARY, SUMMARY - set(summary)
    assert summary["status"] == "completed"
    assert (summary["method"], summary["world_size"], summary["zero_stage"]) == (method, 2, 3)
    assert summary["reference"] == ("model" if method in ("dpo", "ipo", "kto") else "none")
    assert summary["global_step"] == facts["recorded"][method]["global_step"] == 5
    assert summary["training_loss"] == facts["recorded"][method]["training_loss"]
    training, _ = metrics_of(out, method)
    # Windows of 1, 1, 2 and 1 steps.
    by_step = sum(line["loss"] * weight for line, weight in zip(training, (1, 1, 2, 1), strict=True)) / 5
    assert summary["training_loss"] == pytest.approx(by_step, rel=1e-9)
    assert summary["metrics"]["train_loss"] == summary["training_loss"]


@pytest.mark.parametrize("method", METHODS)
def test_the_time_of_the_reference_is_a_share_of_the_time_of_the_steps(out, method):
    summary = json.loads((out / method / "run_summary.json").read_text(encoding="utf-8"))
    training, _ = metrics_of(out, method)
    seconds = [line["step_time"] * steps for line, steps in zip(training, (1, 1, 2, 1), strict=True)]
    reference = [line["reference_time_fraction"] * span for line, span in zip(training, seconds, strict=True)]
    assert summary["reference_time_fraction"] == pytest.approx(sum(reference) / sum(seconds), rel=1e-9)
    scored = all(0 < line["reference_time_fraction"] < 1 for line in training)
    assert scored == (method in ("dpo", "ipo", "kto"))
    assert scored or summary["reference_time_fraction"] == 0.0
    assert summary["reference_cache_seconds"] == 0.0


@pytest.mark.parametrize("method", METHODS)
def test_the_output_loads_and_equals_the_trained_weights(out, models, method):
    trained = torch.load(out / f"{method}.pt")
    loaded = dict(AutoModelForCausalLM.from_pretrained(out / method).named_parameters())
    assert set(loaded) == set(trained)
    assert all(torch.equal(loaded[name], trained[name]) for name in trained)
    start = dict(AutoModelForCausalLM.from_pretrained(models / "policy").named_parameters())
    assert any(not torch.equal(start[name], trained[name]) for name in trained)
    assert AutoTokenizer.from_pretrained(out / method).eos_token == "<eos>"
    metadata = json.loads((out / method / f"{method}_metadata.json").read_text(encoding="utf-8"))
    assert metadata["training_method"] == method


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_on_two_ranks_equals_one(facts, alone, method):
    two, one = (dict(found["evaluations"][method]) for found in (facts, alone))
    for name in TIMES:
        assert two.pop(name) > 0
        assert one.pop(name) > 0
    assert two["eval_samples"] == 13
    assert two.pop("eval_set", None) == one.pop("eval_set", None)
    assert two == pytest.approx(one, abs=1e-6, rel=1e-6)
    assert abs(two["eval_margin"]) > 1e-3


@pytest.mark.parametrize("model", ["tied", "untied"])
@pytest.mark.parametrize("variant", ["checkpointing", "offload"])
def test_the_same_numbers_another_way(facts, model, variant):
    plain, other = facts["variants"][model], facts["variants"][f"{model} {variant}"]
    assert other["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert other["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
    assert other["norm"] == pytest.approx(plain["norm"], rel=1e-6)
    assert plain["loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert plain["loss"][2] != pytest.approx(plain["loss"][0], rel=1e-2)


@pytest.mark.parametrize("variant", ["tied bfloat16", "tied bfloat16 zero0", "untied bfloat16"])
def test_bfloat16_stays_close(facts, variant):
    plain, other = facts["variants"][variant.split()[0]], facts["variants"][variant]
    assert other["dtype"] == "torch.bfloat16"
    assert other["finite"]
    assert other["loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    # Three bits of the mantissa of a loss of order 1; the weights themselves move by less than they round.
    assert other["loss"] == pytest.approx(plain["loss"], rel=0.15)
    assert other["grad_norm"] == pytest.approx(plain["grad_norm"], rel=0.1)


def test_a_tied_model_is_saved_once(facts):
    for name in ("tied", "untied"):
        assert "model.safetensors" in facts["variants"][name]["files"]
