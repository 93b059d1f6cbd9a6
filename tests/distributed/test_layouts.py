"""The same global batch gives the same loss and gradient for any packs, micro-batches, ranks and ZeRO stage.

The measure is a loop in plain PyTorch, one sequence at a time, that shares only the loss functions.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ds_align.losses import (
    Logps,
    PairedLogps,
    UnpairedLogps,
    cpo_loss,
    dpo_loss,
    ipo_loss,
    kto_loss,
    simpo_loss,
)
from tests.distributed.launching import launch
from tests.distributed.tiny import pairs, unpaired

pytestmark = pytest.mark.distributed

METHODS = ("dpo", "ipo", "kto", "cpo", "simpo")
LOSSES = {"dpo": dpo_loss, "ipo": ipo_loss, "cpo": cpo_loss, "simpo": simpo_loss}
NLL_WEIGHT = {"cpo": 1.0, "simpo": 0.5}
LAYOUTS = ("one_pack", "micro_batches", "not_shared", "padded", "zero0", "zero1", "zero2", "zero3")
LEARNING_RATE = 0.02
GLOBAL_BATCH = 6


@pytest.fixture(scope="module")
def results(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """(method, layout) -> what the real engine gave, from one process and from two."""
    folder = tmp_path_factory.mktemp("layouts")
    launch("layouts.py", models, folder / "one.pt", "one_rank", num_ranks=1).check()
    launch("layouts.py", models, folder / "two.pt", "two_ranks", num_ranks=2).check()
    return {**torch.load(folder / "one.pt"), **torch.load(folder / "two.pt")}


@pytest.fixture(scope="module")
def expected(models: Path) -> dict:
    """method -> losses and weights of the plain loop."""
    return {method: plain_loop(method, models) for method in METHODS}


def completion_logp(model: torch.nn.Module, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """log p(completion | prompt), summed; the sequence stands alone in its row."""
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    labels = torch.tensor(completion)[:, None]
    return logits.double().log_softmax(-1).gather(1, labels).sum()


def plain_loop(method: str, models: Path) -> dict:
    policy = AutoModelForCausalLM.from_pretrained(models / "policy", dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(models / "reference", dtype=torch.float32)
    optimizer = torch.optim.SGD(policy.parameters(), lr=LEARNING_RATE)
    rows = unpaired() if method == "kto" else pairs()
    losses = []
    for start in range(0, len(rows), GLOBAL_BATCH):
        numbers = range(start, min(start + GLOBAL_BATCH, len(rows)))
        step_loss = kto_step if method == "kto" else paired_step
        loss = step_loss(method, policy, reference, rows, numbers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "weights": dict(policy.named_parameters())}


def paired_step(method, policy, reference, rows, numbers) -> torch.Tensor:
    def score(model, field: str) -> Logps:
        totals = [completion_logp(model, rows[n]["prompt_ids"], rows[n][field]) for n in numbers]
        return Logps(torch.stack(totals), torch.tensor([len(rows[n][field]) for n in numbers]))

    chosen, rejected = score(policy, "chosen_ids"), score(policy, "rejected_ids")
    kept = {}
    if method in ("dpo", "ipo"):
        with torch.no_grad():
            kept["reference_chosen"] = score(reference, "chosen_ids")
            kept["reference_rejected"] = score(reference, "rejected_ids")
    losses = LOSSES[method](PairedLogps(policy_chosen=chosen, policy_rejected=rejected, **kept)).losses
    nll_per_token = -chosen.total.sum() / chosen.length.sum()
    return losses.mean() + NLL_WEIGHT.get(method, 0.0) * nll_per_token


def mismatched(rows: list[dict], number: int) -> list[int]:
    """y' of a row: the completion of the next row in file order, cyclic, whose prompt differs."""
    count = len(rows)
    others = ((number + shift) % count for shift in range(1, count))
    return next(
        rows[n]["completion_ids"] for n in others if rows[n]["prompt_ids"] != rows[number]["prompt_ids"]
    )


def kto_step(_method, policy, reference, rows, numbers) -> torch.Tensor:
    with torch.no_grad():
        gaps = [
            completion_logp(policy, rows[n]["prompt_ids"], mismatched(rows, n))
            - completion_logp(reference, rows[n]["prompt_ids"], mismatched(rows, n))
            for n in numbers
        ]
        z0 = max(0.0, torch.stack(gaps).mean().item())

    def score(model) -> Logps:
        totals = [completion_logp(model, rows[n]["prompt_ids"], rows[n]["completion_ids"]) for n in numbers]
        return Logps(torch.stack(totals), torch.tensor([len(rows[n]["completion_ids"]) for n in numbers]))

    with torch.no_grad():
        kept = score(reference)
    labels = torch.tensor([rows[n]["label"] for n in numbers])
    return kto_loss(
        UnpairedLogps(policy=score(policy), reference=kept, desirable=labels, kl=z0)
    ).losses.mean()


def largest_difference(first: dict, second: dict) -> float:
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_losses_equal_plain_pytorch(results, expected, method, layout):
    assert results[method, layout]["losses"] == pytest.approx(expected[method]["losses"], abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_parameters_equal_plain_pytorch(results, expected, method, layout):
    found = results[method, layout]
    assert largest_difference(found["weights"], expected[method]["weights"]) < 1e-6
    # Four steps moved the weights thousands of times further than that, so a wrong scale would show.
    assert largest_difference(found["weights"], found["start"]) > 2e-3


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("method", METHODS)
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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
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


def test_kto_reference_point_is_at_work(results):
    assert max(results["kto", "zero3"]["kl"]) > 0.1
