"""What must hold for every form of dpo_loss: gradients, symmetries, sorting, empty batches."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ds_align.config.dpo import LOSS_TYPES
from ds_align.losses import Logps, PairedLogps, dpo_loss
from ds_align.losses.divergence import DIVERGENCES
from ds_align.losses.dpo_variants import OLDER_NAMES, VARIANTS
from tests.losses.batches import as_logps, random_pairs
from tests.losses.reference import Pair

MIXTURE = ("aot", "sigmoid", "ipo")
each_type = pytest.mark.parametrize("loss_type", [*VARIANTS, MIXTURE], ids=str)
SORTING = [name for name, variant in VARIANTS.items() if variant.sorts]


def test_the_settings_know_the_same_forms_with_the_same_abilities() -> None:
    assert list(VARIANTS) == list(LOSS_TYPES)
    for name, variant in VARIANTS.items():
        settings = LOSS_TYPES[name]
        for ability in ("smoothing", "divergence", "absolute", "sorts", "shifts"):
            assert getattr(variant, ability) == getattr(settings, ability), (name, ability)
        assert settings.ld == (not variant.per_token), name
    assert set(OLDER_NAMES.values()) <= set(VARIANTS) and not set(OLDER_NAMES) & set(VARIANTS)


@each_type
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradcheck(loss_type: str, smoothing: float) -> None:
    names = MIXTURE if loss_type == MIXTURE else (loss_type,)
    if smoothing and not all(VARIANTS[name].smoothing for name in names):
        smoothing = 0.0
    batch = as_logps(random_pairs(5, seed=8), grad=True)

    def losses(chosen: Tensor, rejected: Tensor) -> Tensor:
        policy = Logps(chosen, batch.policy_chosen.length), Logps(rejected, batch.policy_rejected.length)
        pairs = PairedLogps(*policy, batch.reference_chosen, batch.reference_rejected)
        return dpo_loss(
            pairs,
            beta=0.3,
            loss_type=loss_type,
            label_smoothing=smoothing,
            discopop_tau=0.7,
            bco_delta=0.2,
        ).losses

    assert torch.autograd.gradcheck(losses, (batch.policy_chosen.total, batch.policy_rejected.total))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("loss_type", [name for name, variant in VARIANTS.items() if variant.divergence])
def test_gradcheck_of_divergences(loss_type: str, divergence: str) -> None:
    batch = as_logps(random_pairs(5, seed=9, spread=2.0), grad=True)

    def losses(chosen: Tensor, rejected: Tensor) -> Tensor:
        policy = Logps(chosen, batch.policy_chosen.length), Logps(rejected, batch.policy_rejected.length)
        pairs = PairedLogps(*policy, batch.reference_chosen, batch.reference_rejected)
        return dpo_loss(pairs, beta=0.3, loss_type=loss_type, f_divergence_type=divergence).losses

    assert torch.autograd.gradcheck(losses, (batch.policy_chosen.total, batch.policy_rejected.total))


@each_type
def test_no_gradient_reaches_the_reference_and_none_the_rewards(loss_type: str) -> None:
    batch = as_logps(random_pairs(6, seed=2), grad=True)
    output = dpo_loss(batch, loss_type=loss_type)
    assert not output.chosen_rewards.requires_grad and not output.rejected_rewards.requires_grad
    output.losses.sum().backward()
    assert batch.policy_chosen.total.grad.abs().sum() > 0 and batch.policy_rejected.total.grad.abs().sum() > 0
    assert batch.reference_chosen.total.grad is None and batch.reference_rejected.total.grad is None


@each_type
def test_swapping_chosen_and_rejected_negates_the_margin(loss_type: str) -> None:
    batch = as_logps(random_pairs(6, seed=5))
    swapped = PairedLogps(
        batch.policy_rejected, batch.policy_chosen, batch.reference_rejected, batch.reference_chosen
    )
    one, other = dpo_loss(batch, loss_type=loss_type), dpo_loss(swapped, loss_type=loss_type)
    assert torch.equal(one.chosen_rewards, other.rejected_rewards)
    assert torch.equal(
        one.chosen_rewards - one.rejected_rewards, -(other.chosen_rewards - other.rejected_rewards)
    )


@pytest.mark.parametrize("smoothing", [0.1, 0.3, 0.45])
def test_robust_is_unbiased_under_swapped_labels(smoothing: float) -> None:
    batch = as_logps(random_pairs(50, seed=1))
    swapped = PairedLogps(
        batch.policy_rejected, batch.policy_chosen, batch.reference_rejected, batch.reference_chosen
    )
    right, wrong = (
        dpo_loss(pairs, loss_type="robust", label_smoothing=smoothing).losses for pairs in (batch, swapped)
    )
    clean = dpo_loss(batch).losses
    torch.testing.assert_close((1 - smoothing) * right + smoothing * wrong, clean, rtol=1e-12, atol=1e-12)


def test_without_smoothing_robust_is_sigmoid() -> None:
    batch = as_logps(random_pairs(20, seed=1))
    assert torch.equal(dpo_loss(batch, loss_type="robust").losses, dpo_loss(batch).losses)


@pytest.mark.parametrize("smoothing", [0.05, 0.3])
def test_exo_is_least_where_the_policy_has_the_labels_odds(smoothing: float) -> None:
    # beta z = log((1 - e)/e): the two distributions agree, their KL divergence is 0 and its slope too.
    odds = math.log((1 - smoothing) / smoothing)
    batch = as_logps([Pair(odds, 0.0, 0.0, 0.0)], grad=True)
    losses = dpo_loss(batch, beta=1.0, loss_type="exo_pair", label_smoothing=smoothing).losses
    losses.sum().backward()
    assert abs(losses.item()) < 1e-15 and abs(batch.policy_chosen.total.grad.item()) < 1e-15


def test_nca_holds_the_chosen_reward_at_log_2() -> None:
    batch = as_logps([Pair(math.log(2.0), -3.0, 0.0, 0.0)], grad=True)
    dpo_loss(batch, beta=1.0, loss_type="nca_pair").losses.sum().backward()
    assert abs(batch.policy_chosen.total.grad.item()) < 1e-15
    assert batch.policy_rejected.total.grad.item() > 0


def test_bco_moves_nothing_when_both_rewards_and_delta_shift_together() -> None:
    pairs = random_pairs(10, seed=13)
    shifted = [replace(pair, pi_c=pair.pi_c + 3.0, pi_r=pair.pi_r + 3.0) for pair in pairs]
    one = dpo_loss(as_logps(pairs), loss_type="bco_pair", bco_delta=0.2).losses
    other = dpo_loss(as_logps(shifted), loss_type="bco_pair", bco_delta=0.2 + 0.1 * 3.0).losses
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss_type", SORTING)
def test_sorting_forms_follow_their_rows(loss_type: str) -> None:
    pairs, order = random_pairs(12, seed=7), list(range(12))
    random.Random(0).shuffle(order)
    losses = dpo_loss(as_logps(pairs), loss_type=loss_type).losses
    moved = dpo_loss(as_logps([pairs[row] for row in order]), loss_type=loss_type).losses
    assert torch.equal(moved, losses[order])


def test_aot_unpaired_does_not_look_at_the_pairing() -> None:
    pairs, order = random_pairs(12, seed=7), list(range(12))
    random.Random(1).shuffle(order)
    mixed = [
        replace(pair, pi_r=pairs[row].pi_r, ref_r=pairs[row].ref_r, n_r=pairs[row].n_r)
        for pair, row in zip(pairs, order, strict=True)
    ]
    losses = {}
    for name in ("aot_unpaired", "sigmoid"):
        losses[name] = [dpo_loss(as_logps(rows), loss_type=name).losses for rows in (pairs, mixed)]
    assert torch.equal(*losses["aot_unpaired"])
    assert not torch.equal(*losses["sigmoid"])


@pytest.mark.parametrize("loss_type", SORTING)
def test_sorting_depends_on_the_rest_of_the_batch(loss_type: str) -> None:
    pairs = random_pairs(40, seed=7)
    whole = dpo_loss(as_logps(pairs), loss_type=loss_type).losses
    halves = [dpo_loss(as_logps(rows), loss_type=loss_type).losses for rows in (pairs[:20], pairs[20:])]
    assert not torch.allclose(whole, torch.cat(halves))


@each_type
def test_an_empty_batch_stays_on_the_graph(loss_type: str) -> None:
    batch = as_logps([], torch.float32, grad=True)
    output = dpo_loss(batch, loss_type=loss_type)
    assert output.losses.shape == output.chosen_rewards.shape == (0,)
    output.losses.sum().backward()
    assert batch.policy_chosen.total.grad.shape == batch.policy_rejected.total.grad.shape == (0,)


@each_type
def test_half_precision_is_raised_before_any_arithmetic(loss_type: str) -> None:
    half = as_logps(random_pairs(9, seed=10), torch.bfloat16)
    columns = (half.policy_chosen, half.policy_rejected, half.reference_chosen, half.reference_rejected)
    raised = PairedLogps(*(Logps(column.total.float(), column.length) for column in columns))
    output, expected = (
        dpo_loss(pairs, loss_type=loss_type, bco_delta=torch.tensor(0.1)) for pairs in (half, raised)
    )
    assert output.losses.dtype == output.chosen_rewards.dtype == torch.float32
    assert torch.equal(output.losses, expected.losses)


@each_type
def test_float64_stays_whatever_the_length_is(loss_type: str) -> None:
    batch = as_logps(random_pairs(9, seed=10))
    expected = dpo_loss(batch, loss_type=loss_type, bco_delta=torch.tensor(0.1)).losses
    assert expected.dtype == torch.float64
    columns = (batch.policy_chosen, batch.policy_rejected, batch.reference_chosen, batch.reference_rejected)
    for dtype in (torch.int16, torch.bfloat16, torch.float64):
        other = PairedLogps(*(Logps(column.total, column.length.to(dtype)) for column in columns))
        losses = dpo_loss(other, loss_type=loss_type, bco_delta=torch.tensor(0.1)).losses
        assert torch.equal(losses, expected)


def test_alpha_runs_from_reverse_kl_to_forward_kl() -> None:
    batch = as_logps(random_pairs(10, seed=14, spread=2.0))
    ends = {kind: dpo_loss(batch, f_divergence_type=kind).losses for kind in ("reverse_kl", "forward_kl")}
    for kind, coefficient in (("reverse_kl", 1e-9), ("forward_kl", 1 - 1e-9)):
        near = dpo_loss(batch, f_divergence_type="alpha", f_alpha_divergence_coef=coefficient).losses
        torch.testing.assert_close(near, ends[kind], rtol=1e-7, atol=1e-7)
