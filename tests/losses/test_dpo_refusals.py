"""Combinations with no defined meaning are refused by the loss itself, with the reason."""

from __future__ import annotations

import math

import pytest
import torch

from ds_align.losses import PairedLogps, dpo_loss, kto_loss, simpo_loss
from ds_align.losses.base import UnpairedLogps
from ds_align.losses.dpo_variants import VARIANTS
from tests.losses.batches import as_logps, random_pairs

BATCH = as_logps(random_pairs(3, seed=0))


def without(ability: str) -> list[str]:
    return [name for name, variant in VARIANTS.items() if not getattr(variant, ability)]


def refusal(**settings: object) -> str:
    with pytest.raises(ValueError) as error:
        dpo_loss(BATCH, **settings)
    return str(error.value)


@pytest.mark.parametrize("name", without("smoothing"))
def test_label_smoothing_where_it_has_no_meaning(name: str) -> None:
    for loss_type in (name, ["sigmoid", name] if name != "sigmoid" else name):
        message = refusal(loss_type=loss_type, label_smoothing=0.1)
        assert f"loss_type={name!r}" in message and "label_smoothing=0.1 has no meaning" in message


@pytest.mark.parametrize("name", without("divergence"))
def test_a_divergence_where_it_has_no_meaning(name: str) -> None:
    for loss_type in (name, ["sigmoid", name]):
        message = refusal(loss_type=loss_type, f_divergence_type="js")
        assert f"loss_type={name!r}): f_divergence_type='js' has no meaning" in message
        assert "defined for sigmoid, hinge, exo_pair, robust, discopop" in message


@pytest.mark.parametrize("name", [name for name, kind in VARIANTS.items() if kind.absolute or kind.sorts])
def test_reference_free_where_the_reference_matters(name: str) -> None:
    for loss_type in (name, ["hinge", name]):
        message = refusal(loss_type=loss_type, reference_free=True)
        assert f"loss_type={name!r}): reference_free has no meaning" in message


def test_reference_free_with_a_divergence_from_the_reference() -> None:
    message = refusal(reference_free=True, f_divergence_type="forward_kl")
    assert "f_divergence_type='forward_kl' is a divergence from the reference" in message


def test_robust_at_one_half_would_divide_by_zero() -> None:
    assert "expected a number below 0.5" in refusal(loss_type="robust", label_smoothing=0.5)
    assert dpo_loss(BATCH, loss_type="sigmoid", label_smoothing=0.5).losses.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"loss_type": "sft"}, "'sft' is the NLL of the chosen completions"),
        ({"loss_type": ["sigmoid", "sft"]}, "which the caller adds; leave it out here"),
        ({"loss_type": "simpo"}, "loss_type='simpo'; expected one of sigmoid, hinge, ipo, exo_pair"),
        ({"loss_type": ["sigmoid", "nca"]}, "loss_type='nca'; expected one of"),
        ({"loss_type": []}, "expected at least one type"),
        ({"loss_type": ["ipo", "ipo_loss"]}, "each named once"),
        ({"loss_weights": [1.0, 2.0]}, "loss_weights has 2 entries and loss_type 1"),
        (
            {"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0]},
            "loss_weights has 1 entries and loss_type 2",
        ),
        (
            {"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0, 0.0]},
            "expected finite numbers greater than 0",
        ),
        ({"loss_type": ["sigmoid"], "loss_weights": [math.nan]}, "expected finite numbers greater than 0"),
        ({"f_divergence_type": "kl"}, "expected one of reverse_kl, forward_kl, js, alpha"),
        ({"f_divergence_type": "alpha", "f_alpha_divergence_coef": 1.0}, "f_alpha_divergence_coef=1.0"),
        ({"f_divergence_type": "alpha", "f_alpha_divergence_coef": 0.0}, "f_alpha_divergence_coef=0.0"),
        ({"f_divergence_type": "alpha", "f_alpha_divergence_coef": math.nan}, "f_alpha_divergence_coef=nan"),
        ({"discopop_tau": 0.0}, "discopop_tau=0.0; expected a finite number greater than 0"),
        ({"discopop_tau": math.inf}, "discopop_tau=inf"),
        ({"bco_delta": math.nan}, "bco_delta=nan; expected a finite number"),
        ({"bco_delta": torch.zeros(2)}, "bco_delta has shape (2,); expected one number"),
    ],
)
def test_values_that_cannot_be(settings: dict[str, object], part: str) -> None:
    assert part in refusal(**settings)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_missing_reference_is_named(name: str) -> None:
    alone = PairedLogps(BATCH.policy_chosen, BATCH.policy_rejected)
    half = PairedLogps(BATCH.policy_chosen, BATCH.policy_rejected, BATCH.reference_chosen)
    with pytest.raises(ValueError, match=f"{name}'.: reference_chosen and reference_rejected missing"):
        dpo_loss(alone, loss_type=name)
    with pytest.raises(ValueError, match=": reference_rejected missing"):
        dpo_loss(half, loss_type=name)


def test_alphapo_with_hinge_and_with_no_number() -> None:
    with pytest.raises(ValueError, match="loss_type='hinge'.: alpha=0.5 has no meaning"):
        simpo_loss(BATCH, loss_type="hinge", alpha=0.5)
    with pytest.raises(ValueError, match="alpha=nan; expected a finite number"):
        simpo_loss(BATCH, alpha=math.nan)


def test_kto_forms() -> None:
    desirable = torch.tensor([True, False, True])
    alone = UnpairedLogps(policy=BATCH.policy_chosen, desirable=desirable)
    with pytest.raises(ValueError, match="apo_zero_unpaired'.: reference missing"):
        kto_loss(alone, loss_type="apo_zero_unpaired")
    with pytest.raises(ValueError, match="loss_type='bco'; expected one of kto, apo_zero_unpaired"):
        kto_loss(alone, loss_type="bco")
