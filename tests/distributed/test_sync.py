"""A reference that moves towards the policy, offloaded and partitioned, against plain PyTorch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ds_align.losses import Logps, PairedLogps, dpo_loss
from tests.distributed.launching import launch
from tests.distributed.plain_loop import completion_logp
from tests.distributed.programs.sync import ALPHA, EVERY, GLOBAL_BATCH
from tests.distributed.tiny import pairs

pytestmark = pytest.mark.distributed
CASES = ("zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def results(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("sync")
    launch("sync.py", models, folder / "one.pt", "one_rank", num_ranks=1).check()
    launch("sync.py", models, folder / "two.pt", "two_ranks", num_ranks=2).check()
    return {**torch.load(folder / "one.pt"), **torch.load(folder / "two.pt")}


def plain_losses(models: Path) -> list[float]:
    """Losses of the same steps; the reference is mixed after every second one."""
    policy = AutoModelForCausalLM.from_pretrained(models / "policy", dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(models / "reference", dtype=torch.float32)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.02)
    rows, losses = pairs(20), []

    def score(model: torch.nn.Module, part: list[dict]) -> list[Logps]:
        return [
            Logps(
                torch.stack([completion_logp(model, row["prompt_ids"], row[field]) for row in part]),
                torch.tensor([len(row[field]) for row in part]),
            )
            for field in ("chosen_ids", "rejected_ids")
        ]

    for step in range(1, 6):
        part = rows[(step - 1) * GLOBAL_BATCH : step * GLOBAL_BATCH]
        with torch.no_grad():
            kept = score(reference, part)
        loss = dpo_loss(PairedLogps(*score(policy, part), *kept)).losses.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % EVERY == 0:
            with torch.no_grad():
                for old, new in zip(reference.parameters(), policy.parameters(), strict=True):
                    old.mul_(1 - ALPHA).add_(new, alpha=ALPHA)
    return losses


@pytest.mark.parametrize("case", CASES)
def test_losses_equal_plain_pytorch(results, models, case):
    assert results[case]["losses"] == pytest.approx(plain_losses(models), abs=2e-6, rel=2e-6)


@pytest.mark.parametrize("case", [*CASES, "bfloat16"])
def test_the_reference_is_the_mixture_and_changes_at_no_other_step(results, case):
    run = results[case]
    for step in range(1, 6):
        before, after = run["references"][step - 1], run["references"][step]
        for name, policy in run["policies"][step - 1].items():
            if step % EVERY:
                assert torch.equal(after[name], before[name])
                continue
            mixture = ALPHA * policy.float() + (1 - ALPHA) * before[name].float()
            tolerance = 8e-3 if case == "bfloat16" else 1e-6
            torch.testing.assert_close(after[name].float(), mixture, rtol=tolerance, atol=1e-6)
        moved = [not torch.equal(after[name], before[name]) for name in after]
        assert any(moved) is (step % EVERY == 0)


@pytest.mark.parametrize("step", [1, 2, 4])
def test_an_evaluation_asks_the_reference_of_that_moment(results, models, step):
    run = results["zero3"]

    def mean_logp(weights: dict) -> float:
        model = AutoModelForCausalLM.from_pretrained(models / "policy", dtype=torch.float32)
        model.load_state_dict(weights, strict=False)
        with torch.no_grad():
            found = [completion_logp(model, row["prompt_ids"], row["chosen_ids"]) for row in pairs(20)]
        return torch.stack(found).mean().item()

    expected = 0.1 * (mean_logp(run["policies"][step - 1]) - mean_logp(run["references"][step]))
    assert run["evaluations"][step - 1] == pytest.approx(expected, abs=1e-5)
    # The reference before the move at steps 2 and 4 would have given another number.
    stale = 0.1 * (mean_logp(run["policies"][step - 1]) - mean_logp(run["references"][step - 1]))
    assert (abs(stale - expected) > 1e-3) is (step % EVERY == 0)


@pytest.mark.parametrize("case", [*CASES, "bfloat16"])
def test_partitions_are_saved_and_restored(results, case):
    run = results[case]
    assert not any(weight.any() for weight in run["zeros"].values())
    for name, weight in run["restored"].items():
        assert torch.equal(weight, run["references"][-1][name])
