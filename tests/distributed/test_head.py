"""The LM head under ZeRO-3: gathered in a backward only where it trains, right in every mode, exact at 0."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.distributed.launching import launch
from tests.distributed.plain_dpo import dpo_steps
from tests.distributed.programs.head import CASES, GLOBAL_BATCH, LORA, NUM_ROWS, Case
from tests.distributed.tiny import VOCABULARY, pairs

pytestmark = pytest.mark.distributed

EXACT = [name for name in CASES if "bfloat16" not in name]
ONE_PACK = [name for name, case in CASES.items() if case.settings.get("pack_max_tokens")]
MANY_PACKS = [name for name in CASES if name not in ONE_PACK]


@pytest.fixture(scope="module")
def results(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("head") / "head.pt"
    launch("head.py", models, out, num_ranks=2).check()
    return torch.load(out)


@pytest.fixture(scope="module")
def expected(results: dict, models: Path) -> dict:
    """(model, what trains) -> losses and last weights of the plain loop."""
    # Cases that differ in packs, budget or checkpointing alone share a loop.
    first = {what_trains(CASES[name]): name for name in reversed(EXACT)}
    return {trains: plain_run(CASES[name], models, results[name]) for trains, name in first.items()}


def what_trains(case: Case) -> tuple:
    return case.model, case.head, "use_lora" in case.settings


def plain_run(case: Case, models: Path, found: dict) -> dict:
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(models / case.model, dtype=torch.float32) for _ in range(2)
    )
    prefix = ""
    if "use_lora" in case.settings:
        targets = case.settings.get("lora_target_modules", "all-linear")
        lora = LoraConfig(r=LORA["lora_r"], lora_alpha=LORA["lora_alpha"], target_modules=targets)
        lora.task_type, prefix = "CAUSAL_LM", "base_model.model."
        policy = get_peft_model(policy, lora)
        start = {prefix + name: weight for name, weight in found["start"].items()}
        assert not policy.load_state_dict(start, strict=False).unexpected_keys
    if case.head == "frozen":
        # peft has frozen it already; tied embeddings have no name of their own.
        policy.get_output_embeddings().weight.requires_grad_(False)
    rows = pairs(NUM_ROWS)
    batches = [rows[first : first + GLOBAL_BATCH] for first in range(0, NUM_ROWS, GLOBAL_BATCH)]
    steps = dpo_steps(policy.eval(), reference.eval(), batches, learning_rate=case.learning_rate)
    end = {name: weight.detach() for name, weight in policy.named_parameters() if weight.requires_grad}
    return {
        "losses": [step.loss for step in steps],
        "end": {name.removeprefix(prefix): weight for name, weight in end.items()},
    }


@pytest.mark.parametrize("name", CASES)
def test_the_head_is_gathered_in_the_backward_only_where_it_trains_or_is_adapted(results, name):
    """Once for each use in a forward: tied embeddings are used twice, at the bottom and as the head.

    An adapted head's logits are a matrix product with a gradient, so its frozen weight is gathered.
    """
    case = CASES[name]
    uses = 2 if case.model == "policy" else 1
    for rank in results[name]["ranks"]:
        assert rank["head_trains"] is (case.head == "trained")
        for step in rank["steps"]:
            scoring = step["reference_passes"] if rank["reference"] == "adapters_off" else 0
            assert step["gathers"]["head"] == {
                "forward": uses * (step["micro_batches"] + scoring),
                "backward": 0 if case.head == "frozen" else uses * step["micro_batches"],
            }


@pytest.mark.parametrize("name", CASES)
def test_the_counter_sees_gathers_of_a_backward(results, name):
    """A layer's weight is gathered in every backward, frozen or not; checkpoints are computed again first."""
    times = 2 if CASES[name].settings.get("gradient_checkpointing") else 1
    for rank in results[name]["ranks"]:
        for step in rank["steps"]:
            assert step["gathers"]["layer"]["backward"] == times * step["micro_batches"]


@pytest.mark.parametrize("name", CASES)
def test_policy_and_reference_are_scored_by_the_same_operator(results, name):
    head = CASES[name].head
    for rank in results[name]["ranks"]:
        if head == "adapted":
            assert not rank["fused"]
            assert set(map(tuple, rank["operators"].values())) == {("gather_score",)}
            continue
        assert rank["fused"]
        trained = ["linear_score_frozen", "scale_back"] if head == "frozen" else ["linear_score"]
        assert rank["operators"] == {
            "trained": trained,
            "scored": ["linear_score"],
            "reference": ["linear_score"],
        }


@pytest.mark.parametrize("name", CASES)
def test_logits_are_kept_within_the_budget_and_only_for_a_trained_head(results, name):
    case = CASES[name]
    keeps = case.head == "trained" and case.settings.get("logits_budget_mb", 0) > 0
    for rank in results[name]["ranks"]:
        every = rank["num_scored"] * VOCABULARY
        assert every > 0
        assert rank["num_kept"] == {"trained": every if keeps else 0, "scored": 0, "reference": 0}


@pytest.mark.parametrize("name", CASES)
def test_the_same_pack_has_the_same_log_probs_to_the_bit(results, name):
    for rank in results[name]["ranks"]:
        assert rank["same_bits"]
        assert rank["spread"] > 1.0


@pytest.mark.parametrize("name", ONE_PACK)
def test_every_log_ratio_of_the_first_step_is_exactly_zero(results, name):
    """Policy and reference see the same packs here, and with the log-ratios the margins are 0."""
    for rank in results[name]["ranks"]:
        first, second, _ = (step["log_ratios"] for step in rank["steps"])
        assert len(first) >= 2
        assert set(first) == {0.0}
        assert max(map(abs, second)) > 1e-2
    assert results[name]["losses"][0] == pytest.approx(math.log(2), abs=1e-15)


@pytest.mark.parametrize("name", MANY_PACKS)
def test_log_ratios_of_the_first_step_are_zero_but_for_rounding_in_other_packs(results, name):
    """The reference scores in one pack what the policy has in three: matrix products of other sizes."""
    for rank in results[name]["ranks"]:
        first, second, _ = (step["log_ratios"] for step in rank["steps"])
        assert max(map(abs, first)) < 3e-6
        assert max(map(abs, second)) > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_the_ranks_are_uneven_and_one_has_nothing_to_score_in_the_last_step(results, name):
    scored = [[step["scored"] for step in rank["steps"]] for rank in results[name]["ranks"]]
    # Rank 0 has the long pair, the other the three short ones, with as many micro-batches.
    assert [len(step) for step in scored[0]] == [len(step) for step in scored[1]]
    assert len(scored[0][0]) == (1 if name in ONE_PACK else 3)
    assert sum(scored[0][0]) > 2 * sum(scored[1][0])
    assert sorted(map(sum, (scored[0][2], scored[1][2]))) == [0, 31]


@pytest.mark.parametrize("name", EXACT)
def test_losses_equal_the_plain_loop(results, expected, name):
    found, plain = results[name]["losses"], expected[what_trains(CASES[name])]["losses"]
    assert found == pytest.approx(plain, abs=1e-6)
    assert abs(found[2] - found[0]) > 5e-4


@pytest.mark.parametrize("name", EXACT)
def test_gradients_equal_the_plain_loop(results, expected, name):
    """With plain SGD the way that the weights went is the sum of the gradients: 1e-5 relative."""
    found, end = results[name], expected[what_trains(CASES[name])]["end"]
    assert set(found["end"]) == set(end)
    wrong = torch.cat([(found["end"][weight] - end[weight]).flatten() for weight in end]).norm()
    way = torch.cat([(end[weight] - found["start"][weight]).flatten() for weight in end]).norm()
    print(f"{name}: {wrong / way:.1e} of a way of {way:.3f}")
    assert way > 1e-2
    assert (wrong / way).item() < 1e-5


@pytest.mark.parametrize("name", EXACT)
def test_all_that_should_train_moves(results, name):
    case, found = CASES[name], results[name]
    heads = [weight for weight in found["end"] if weight.startswith("lm_head")]
    # Tied embeddings go by the name of the embeddings.
    assert len(heads) == {"trained": 0 if case.model == "policy" else 1, "frozen": 0, "adapted": 2}[case.head]
    assert not any(torch.equal(end, found["start"][weight]) for weight, end in found["end"].items())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "use_lora" not in case.settings])
def test_the_reference_is_partitioned_on_the_cpu(results, name):
    for rank in results[name]["ranks"]:
        assert rank["reference_device"] == {"cpu"}
        assert rank["reference_offload"].endswith("cpu")
        assert rank["reference_whole"] == 0
        assert rank["reference_fused"]


@pytest.mark.parametrize("name", CASES)
def test_a_mixture_of_experts_runs_with_its_blocks_as_leaves(results, name):
    leaves = ["Qwen3MoeSparseMoeBlock"] * 2 if CASES[name].model == "moe" else []
    for rank in results[name]["ranks"]:
        assert rank["leaves"] == leaves
