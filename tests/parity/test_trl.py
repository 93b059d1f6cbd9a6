"""The same model, data, order, optimizer and schedule here and in TRL give the same steps.

Both sides are the real trainers, each in a process of its own, on the CPU in float32. What TRL does in
another way is asserted too, so that a change on either side shows.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.distributed.launching import launch
from tests.distributed.tiny import write_model
from tests.parity.cases import CASES, COUPLED, HALVES, LONGEST_PROMPT, OTHERS, RUNS, WHOLES, ZOO

pytest.importorskip("trl", reason="TRL is not installed: pip install trl==1.16.0")
pytestmark = pytest.mark.slow

PROGRAMS = Path(__file__).resolve().parent / "programs"
RELATIVE = 1e-4
# Rewards and z0 are small differences of float32 sums of several hundred nats; mean logits nearly cancel.
ABSOLUTE = 1e-5
DIFFERENCES = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "kl",
    "logits/chosen",
    "logits/rejected",
)
ON_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}

STEP = ("loss", "grad_norm", "learning_rate")
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins")
LOGPS = ("logps/chosen", "logps/rejected")
LOGITS = ("logits/chosen", "logits/rejected")
# What each side logs under one name and means differently is left out here and asserted further down.
COMPARED = {
    "dpo": (*STEP, *REWARDS, *LOGPS),
    "ipo": (*STEP, *LOGPS),
    "kto": (*STEP, *REWARDS, *LOGPS),
    "cpo": (*STEP, *REWARDS, *LOGPS, "nll_loss"),
    "simpo": (*STEP, *REWARDS),
}
PER_RUN = {
    "dpo": (*COMPARED["dpo"], *LOGITS),
    "kto": (*COMPARED["kto"], *LOGITS, "kl"),
    "cpo ipo": (*STEP, "nll_loss"),
    "cpo simpo": (*COMPARED["simpo"], "nll_loss"),
}
PER_TYPE = {
    **dict.fromkeys(("type ipo", "type sigmoid_norm", "forward_kl", "js", "alpha"), (*STEP, *LOGPS)),
    **dict.fromkeys(("ld_alpha", "ld_alpha 0"), (*STEP, *REWARDS)),
}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """side -> name of a case -> its logged steps and token ids."""
    folder = tmp_path_factory.mktemp("parity")
    models = folder / "models"
    write_model(models / "policy", seed=0)
    write_model(models / "reference", seed=1)
    for side in ("ours", "theirs"):
        program, out = PROGRAMS / f"{side}.py", folder / f"{side}.json"
        launch(program, models, out, num_ranks=1, variables=ON_CPU).check()
    return {side: json.loads((folder / f"{side}.json").read_text()) for side in ("ours", "theirs")}


@pytest.fixture
def ours(both) -> dict:
    return both["ours"]


@pytest.fixture
def theirs(both) -> dict:
    return both["theirs"]


def near(expected: float) -> object:
    return pytest.approx(expected, rel=RELATIVE, abs=ABSOLUTE)


def series(run: dict, name: str) -> list[float | None]:
    return [step.get(name) for step in run["steps"]]


def assert_equal_steps(mine: dict, trl: dict, names: tuple[str, ...]) -> None:
    for name in names:
        assert None not in series(trl, name), f"TRL logs no {name}"
        allowed = ABSOLUTE if name in DIFFERENCES else 0.0
        assert series(mine, name) == pytest.approx(series(trl, name), rel=RELATIVE, abs=allowed), name


def only(run: dict) -> dict:
    """The one step of a run."""
    (step,) = run["steps"]
    return step


def test_no_case_hides_another():
    assert len(CASES) == sum(map(len, (RUNS, ZOO, HALVES, WHOLES, OTHERS)))


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("dpo cut", "long prompts")])
def test_token_ids_are_equal(ours, theirs, name):
    # Only KTO's own loss has a y'.
    columns = 2 if name == "kto apo_zero" else 3
    assert [row[:columns] for row in ours[name]["ids"]] == [row[:columns] for row in theirs[name]["ids"]]


def test_completions_are_cut_alike(ours, theirs):
    limit = LONGEST_PROMPT + 10
    cut = [
        [prompt, *[completion[: limit - len(prompt)] for completion in completions]]
        for prompt, *completions in theirs["dpo cut"]["ids"]
    ]
    assert ours["dpo cut"]["ids"] == cut
    assert cut != theirs["dpo cut"]["ids"]


@pytest.mark.parametrize("name", RUNS)
def test_five_steps_are_equal(ours, theirs, name):
    assert len(ours[name]["steps"]) == RUNS[name].steps
    assert_equal_steps(ours[name], theirs[name], PER_RUN.get(name, COMPARED[RUNS[name].method]))


def test_the_runs_are_worth_comparing(ours):
    """Clipping, the schedule, z0 and the moments of Adam all took part."""
    assert all(max(series(ours[name], "grad_norm")) > 1.0 for name in ("dpo", "ipo", "kto", "cpo", "simpo"))
    assert series(ours["dpo"], "learning_rate") == pytest.approx([0.0, 5e-4, 1e-3, 2e-3 / 3, 1e-3 / 3])
    assert max(series(ours["kto"], "kl")) > 0.1
    assert min(series(ours["kto"], "kl")) == 0.0
    losses = series(ours["dpo"], "loss")
    assert losses[0] == pytest.approx(math.log(2.0), rel=1e-6)
    assert abs(losses[-1] - losses[0]) > 0.02


@pytest.mark.parametrize("name", ZOO)
def test_one_step_of_a_loss_type_is_equal(ours, theirs, name):
    assert_equal_steps(ours[name], theirs[name], PER_TYPE.get(name, COMPARED["dpo"]))
    assert only(ours[name])["grad_norm"] > 0.05


@pytest.mark.parametrize("name", COUPLED)
def test_trl_takes_every_micro_batch_for_a_batch(ours, theirs, name):
    """KTO's z0, the NLL per token and AOT's sorting are of the global batch here, of a micro-batch in TRL.

    TRL's loss over two micro-batches is the mean of those of each alone; ours depends on no such cut.
    """
    halves, whole = f"{name} halves", f"{name} whole"
    assert_equal_steps(ours[halves], theirs[halves], ("loss", "grad_norm"))
    mean = sum(series(ours[halves], "loss")) / 2.0
    assert only(theirs[whole])["loss"] == pytest.approx(mean, rel=1e-5)
    assert abs(only(ours[whole])["loss"] - mean) > 1e-3 * mean


def test_nll_is_a_mean_over_the_tokens_of_the_global_batch(ours):
    # The preference terms average by pairs; the NLL of the two halves by their chosen tokens.
    losses, nll = series(ours["cpo halves"], "loss"), series(ours["cpo halves"], "nll_loss")
    lengths = [len(chosen) for _, chosen, _ in ours["cpo halves"]["ids"]]
    tokens = [sum(lengths[:2]), sum(lengths[2:4])]
    assert tokens[0] != tokens[1]
    preference = sum(loss - term for loss, term in zip(losses, nll, strict=True)) / 2.0
    per_token = sum(count * term for count, term in zip(tokens, nll, strict=True)) / sum(tokens)
    assert only(ours["cpo whole"])["nll_loss"] == pytest.approx(per_token, rel=1e-6)
    assert only(ours["cpo whole"])["loss"] == pytest.approx(preference + per_token, rel=1e-6)


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "sigmoid_norm"])
def test_trl_ignores_label_smoothing(ours, theirs, name):
    """TRL's DPO reads label_smoothing for robust, exo_pair and aot alone, and says nothing elsewhere.

    With margin = beta (c - r): -ls(-x) = -ls(x) + x, so the smoothed sigmoid is the plain one + e margin; and
    e (d + t)^2 - e (d - t)^2 = 4 e t d with t = 1/(2 beta), so the smoothed IPO is the plain one
    + 2 e margin / beta^2. Margins are per token for ipo and sigmoid_norm.
    """
    beta, smoothing = 0.05, 0.2
    plain, smoothed = only(ours[f"type {name}"]), only(ours[f"{name} smoothed"])
    factor = 2.0 / beta**2 if name == "ipo" else 1.0
    expected = plain["loss"] + factor * smoothing * plain["rewards/margins"]
    assert smoothed["loss"] == pytest.approx(expected, rel=1e-5)
    trl_smoothed, trl_plain = only(theirs[f"{name} smoothed"]), only(theirs[f"type {name}"])
    assert (trl_smoothed["loss"], trl_smoothed["grad_norm"]) == (trl_plain["loss"], trl_plain["grad_norm"])
    assert abs(trl_smoothed["loss"] - smoothed["loss"]) > 1e-3 * smoothed["loss"]


def test_trl_leaves_bco_unshifted(ours, theirs):
    """BCO (arXiv:2404.04656) shifts rewards by their running mean delta; TRL's bco_pair has no delta.

    One pair in its first step: delta is the mean of its two rewards.
    """
    mine, trl = only(ours["bco_pair"]), only(theirs["bco_pair"])
    chosen, rejected = mine["rewards/chosen"], mine["rewards/rejected"]
    assert (trl["rewards/chosen"], trl["rewards/rejected"]) == near((chosen, rejected))

    def loss(delta: float) -> float:
        return math.log1p(math.exp(delta - chosen)) + math.log1p(math.exp(rejected - delta))

    assert mine["loss"] == pytest.approx(loss((chosen + rejected) / 2.0), rel=1e-5)
    assert trl["loss"] == pytest.approx(loss(0.0), rel=1e-5)
    assert abs(mine["loss"] - trl["loss"]) > 1e-3


@pytest.mark.parametrize("name", ["type ipo", "type sigmoid_norm", "forward_kl", "js", "alpha"])
def test_trl_logs_summed_log_ratios_for_every_loss_type(ours, theirs, name):
    """Here a reward is beta times what the loss compares: per token for some, f'(u) under a divergence."""
    summed, mine, trl = only(ours["type sigmoid"]), only(ours[name]), only(theirs[name])
    for reward in ("rewards/chosen", "rewards/rejected"):
        assert trl[reward] == near(summed[reward])
        assert abs(mine[reward] - trl[reward]) > 1e-3


def test_trl_logs_log_probs_per_token_for_simpo(ours, theirs):
    """And so for CPO's ipo, rewards included; here logps are always sums, and CPO's reward is beta x sum."""
    for name, beta in (("simpo", 2.0), ("cpo ipo", 0.1)):
        mine, trl = ours[name]["steps"][0], theirs[name]["steps"][0]
        assert trl["logps/chosen"] == near(trl["rewards/chosen"] / beta)
        assert mine["logps/chosen"] < 4.0 * trl["logps/chosen"] < 0.0
    mine = ours["cpo ipo"]["steps"][0]
    assert mine["rewards/chosen"] == near(0.1 * mine["logps/chosen"])


def test_trl_logs_weighted_log_probs_under_ld_alpha(ours, theirs):
    mine, plain, trl = (only(run) for run in (ours["ld_alpha"], ours["type sigmoid"], theirs["ld_alpha"]))
    assert mine["logps/rejected"] == near(plain["logps/rejected"])
    assert trl["logps/rejected"] > plain["logps/rejected"] + 1.0


def test_trl_counts_a_tie_as_wrong(ours, theirs):
    """Policy = reference: every reward is 0, which is as good as a coin here and an error there."""
    assert ours["dpo"]["steps"][0]["rewards/accuracies"] == 0.5
    assert theirs["dpo"]["steps"][0]["rewards/accuracies"] == 0.0


def test_trl_drops_prompts_that_fill_the_length(ours, theirs):
    """Here such a prompt is cut to leave room for one token, and counted."""
    limit = LONGEST_PROMPT - 5
    mine, trl = ours["long prompts"]["ids"], theirs["long prompts"]["ids"]
    assert len(mine) == 20
    assert 0 < len(trl) < 20
    assert all(len(prompt) < limit for prompt, *_ in trl)
    assert max(len(prompt) for prompt, *_ in mine) == limit - 1
    assert min(len(completion) for _, *completions in mine for completion in completions) == 1
