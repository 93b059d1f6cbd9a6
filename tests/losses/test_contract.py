"""What every loss promises: dtypes, gradients, empty packs, refusals, and an import that needs torch
alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from ds_align.losses import (
    Logps,
    LossOutput,
    PairedLogps,
    UnpairedLogps,
    cpo_loss,
    dpo_loss,
    ipo_loss,
    kto_loss,
    simpo_loss,
)

PAIRED: dict[str, Callable[[PairedLogps], LossOutput]] = {
    "dpo sigmoid": dpo_loss,
    "dpo smoothed": lambda pairs: dpo_loss(pairs, label_smoothing=0.1),
    "dpo hinge": lambda pairs: dpo_loss(pairs, loss_type="hinge"),
    "dpo ipo": lambda pairs: dpo_loss(pairs, loss_type="ipo"),
    "ipo": ipo_loss,
    "ipo sums": lambda pairs: ipo_loss(pairs, length_normalize=False),
    "cpo sigmoid": cpo_loss,
    "cpo hinge": lambda pairs: cpo_loss(pairs, loss_type="hinge"),
    "cpo ipo": lambda pairs: cpo_loss(pairs, loss_type="ipo"),
    "simpo": simpo_loss,
    "simpo hinge": lambda pairs: simpo_loss(pairs, loss_type="hinge"),
}
paired = pytest.mark.parametrize("loss", PAIRED.values(), ids=PAIRED.keys())


def totals(n: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (-3.0 * torch.rand(n, generator=generator, dtype=torch.float64) - 1.0).to(dtype).requires_grad_()


def pairs(n: int, dtype: torch.dtype = torch.float32, length_dtype: torch.dtype = torch.int64) -> PairedLogps:
    length = (torch.arange(n) % 5 + 1).to(length_dtype)
    return PairedLogps(*(Logps(totals(n, seed, dtype), length) for seed in range(4)))


def examples(n: int, dtype: torch.dtype = torch.float32, kl: float | torch.Tensor = 0.2) -> UnpairedLogps:
    length = torch.arange(n) + 1
    return UnpairedLogps(
        policy=Logps(totals(n, 0, dtype), length),
        reference=Logps(totals(n, 1, dtype), length),
        desirable=torch.arange(n) % 2 == 0,
        kl=kl,
    )


@paired
def test_gradient_raises_chosen_lowers_rejected_and_leaves_the_reference(loss: Callable) -> None:
    batch = pairs(6)
    output = loss(batch)
    assert output.losses.shape == output.chosen_rewards.shape == output.rejected_rewards.shape == (6,)
    assert not output.chosen_rewards.requires_grad and not output.rejected_rewards.requires_grad
    output.losses.sum().backward()
    assert (batch.policy_chosen.total.grad < 0).all()
    assert (batch.policy_rejected.total.grad > 0).all()
    assert batch.reference_chosen.total.grad is None and batch.reference_rejected.total.grad is None


def test_kto_gradient_raises_desirable_lowers_undesirable_and_leaves_the_rest() -> None:
    z0 = torch.tensor(0.3, requires_grad=True)
    batch = examples(6, kl=z0)
    output = kto_loss(batch)
    output.losses.sum().backward()
    assert (batch.policy.total.grad[batch.desirable] < 0).all()
    assert (batch.policy.total.grad[~batch.desirable] > 0).all()
    assert z0.grad is None and batch.reference.total.grad is None and not output.rewards.requires_grad


@paired
def test_gradcheck(loss: Callable) -> None:
    batch = pairs(4, torch.float64)

    def function(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        length = batch.policy_chosen.length
        policy = Logps(chosen, length), Logps(rejected, length)
        return loss(PairedLogps(*policy, batch.reference_chosen, batch.reference_rejected)).losses

    assert torch.autograd.gradcheck(function, (batch.policy_chosen.total, batch.policy_rejected.total))


@pytest.mark.parametrize("alpha", [-1.0, 0.25])
def test_gradcheck_of_alphapo(alpha: float) -> None:
    batch = pairs(4, torch.float64)

    def function(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        length = batch.policy_chosen.length
        policy = PairedLogps(Logps(chosen, length), Logps(rejected, length))
        return simpo_loss(policy, alpha=alpha, label_smoothing=0.1).losses

    assert torch.autograd.gradcheck(function, (batch.policy_chosen.total, batch.policy_rejected.total))


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_gradcheck_of_kto(loss_type: str) -> None:
    batch = examples(4, torch.float64)

    def function(total: torch.Tensor) -> torch.Tensor:
        policy = Logps(total, batch.policy.length)
        moved = UnpairedLogps(policy=policy, reference=batch.reference, desirable=batch.desirable, kl=0.2)
        return kto_loss(moved, loss_type=loss_type, undesirable_weight=1.5).losses

    assert torch.autograd.gradcheck(function, (batch.policy.total,))


@paired
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_raised_before_any_arithmetic(loss: Callable, dtype: torch.dtype) -> None:
    half = pairs(7, dtype)
    output = loss(half)
    assert output.losses.dtype == output.chosen_rewards.dtype == torch.float32
    columns = (half.policy_chosen, half.policy_rejected, half.reference_chosen, half.reference_rejected)
    raised = loss(PairedLogps(*(Logps(column.total.float(), column.length) for column in columns)))
    assert torch.equal(output.losses, raised.losses)


@paired
def test_float64_stays_and_length_may_have_any_dtype(loss: Callable) -> None:
    expected = loss(pairs(7, torch.float64)).losses
    assert expected.dtype == torch.float64
    for length_dtype in (torch.int32, torch.int16, torch.float32, torch.bfloat16, torch.float64):
        assert torch.equal(loss(pairs(7, torch.float64, length_dtype)).losses, expected)


def test_kto_dtypes() -> None:
    assert kto_loss(examples(4, torch.bfloat16)).losses.dtype == torch.float32
    expected = kto_loss(examples(4, torch.float64, kl=0.25)).losses
    assert expected.dtype == torch.float64
    for kl in (torch.tensor(0.25), torch.tensor([0.25], dtype=torch.bfloat16), torch.tensor(0.25).double()):
        result = kto_loss(examples(4, torch.float64, kl=kl)).losses
        assert result.dtype == torch.float64 and torch.equal(result, expected)


@paired
def test_an_empty_pack_stays_on_the_graph(loss: Callable) -> None:
    batch = pairs(0)
    output = loss(batch)
    assert output.losses.shape == (0,) and output.losses.grad_fn is not None
    output.losses.sum().backward()
    assert batch.policy_chosen.total.grad.shape == (0,)


def test_an_empty_pack_stays_on_the_graph_for_kto() -> None:
    batch = examples(0)
    kto_loss(batch).losses.sum().backward()
    assert batch.policy.total.grad.shape == (0,)


@paired
def test_far_log_probs_stay_finite(loss: Callable) -> None:
    length = torch.ones(2)
    chosen = torch.tensor([-1e4, -1.0], requires_grad=True)
    rejected = torch.tensor([-1.0, -1e4], requires_grad=True)
    zero = Logps(torch.zeros(2), length)
    output = loss(PairedLogps(Logps(chosen, length), Logps(rejected, length), zero, zero))
    output.losses.sum().backward()
    assert output.losses.isfinite().all() and chosen.grad.isfinite().all() and rejected.grad.isfinite().all()


def test_reference_free_needs_and_uses_no_reference() -> None:
    batch = pairs(5)
    alone = PairedLogps(batch.policy_chosen, batch.policy_rejected)
    for loss_type in ("sigmoid", "hinge", "ipo"):
        with_reference = dpo_loss(batch, loss_type=loss_type, reference_free=True)
        without = dpo_loss(alone, loss_type=loss_type, reference_free=True)
        assert torch.equal(with_reference.losses, without.losses)
        assert torch.equal(with_reference.chosen_rewards, without.chosen_rewards)


def test_dpo_of_type_ipo_is_ipo() -> None:
    batch = pairs(5)
    one, other = dpo_loss(batch, loss_type="ipo", label_smoothing=0.2), ipo_loss(batch, label_smoothing=0.2)
    assert torch.equal(one.losses, other.losses) and torch.equal(one.chosen_rewards, other.chosen_rewards)


def test_a_missing_reference_is_named() -> None:
    batch = pairs(3)
    alone = PairedLogps(batch.policy_chosen, batch.policy_rejected)
    half = PairedLogps(batch.policy_chosen, batch.policy_rejected, batch.reference_chosen)
    for loss in (dpo_loss, ipo_loss):
        with pytest.raises(ValueError, match="reference_chosen and reference_rejected missing"):
            loss(alone)
        with pytest.raises(ValueError, match=": reference_rejected missing"):
            loss(half)


@pytest.mark.parametrize("loss", [dpo_loss, cpo_loss, simpo_loss])
def test_an_unknown_loss_type_is_named_with_the_allowed_ones(loss: Callable) -> None:
    with pytest.raises(ValueError, match="loss_type='sigmiod'; expected one of sigmoid, hinge"):
        loss(pairs(2), loss_type="sigmiod")


@pytest.mark.parametrize("smoothing", [-0.1, 0.6, float("nan")])
@pytest.mark.parametrize("loss", [dpo_loss, ipo_loss, cpo_loss, simpo_loss])
def test_label_smoothing_outside_its_range_is_refused(loss: Callable, smoothing: float) -> None:
    with pytest.raises(ValueError, match="label_smoothing=.*expected a number from 0 to 0.5"):
        loss(pairs(2), label_smoothing=smoothing)


@pytest.mark.parametrize(
    ("loss", "loss_type"),
    [(dpo_loss, "hinge"), (cpo_loss, "hinge"), (cpo_loss, "ipo"), (simpo_loss, "hinge")],
)
def test_label_smoothing_where_it_has_no_meaning_is_refused(loss: Callable, loss_type: str) -> None:
    with pytest.raises(ValueError, match=f"loss_type='{loss_type}'.*label_smoothing=0.1 has no meaning"):
        loss(pairs(2), loss_type=loss_type, label_smoothing=0.1)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan"), float("inf")])
def test_a_beta_that_cannot_be_is_refused(beta: float) -> None:
    for loss in (dpo_loss, ipo_loss, cpo_loss, simpo_loss):
        with pytest.raises(ValueError, match="beta="):
            loss(pairs(2), beta=beta)
    with pytest.raises(ValueError, match="kto_loss: beta="):
        kto_loss(examples(2), beta=beta)


def test_kto_weights_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="desirable_weight=-1.0"):
        kto_loss(examples(2), desirable_weight=-1.0)
    with pytest.raises(ValueError, match="undesirable_weight=inf"):
        kto_loss(examples(2), undesirable_weight=float("inf"))


def test_shapes_that_would_broadcast_in_silence_are_refused() -> None:
    column, row = Logps(torch.zeros(3), torch.ones(3)), Logps(torch.zeros(1), torch.ones(1))
    with pytest.raises(ValueError, match="policy_rejected has shape"):
        PairedLogps(column, row)
    with pytest.raises(ValueError, match="total has shape"):
        Logps(torch.zeros(3), torch.ones(1))
    with pytest.raises(ValueError, match="floating dtype"):
        Logps(torch.zeros(3, dtype=torch.int64), torch.ones(3))
    with pytest.raises(ValueError, match="expected torch.bool"):
        UnpairedLogps(policy=column, desirable=torch.ones(3))
    with pytest.raises(ValueError, match="kl has shape"):
        UnpairedLogps(policy=column, desirable=torch.ones(3, dtype=torch.bool), kl=torch.zeros(3))


def test_import_needs_torch_alone() -> None:
    code = (
        "import sys, ds_align.losses; "
        "found = {'deepspeed', 'transformers', 'datasets', 'pydantic', 'peft'} & set(sys.modules); "
        "assert 'torch' in sys.modules and not found, found"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
