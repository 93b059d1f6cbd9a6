"""Direct Preference Optimization and its relatives."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import (
    LossOutput,
    PairedLogps,
    check_beta,
    check_label_smoothing,
    check_loss_type,
    paired_log_ratios,
    policy_total,
)
from .divergence import check_divergence, divergence_score
from .dpo_variants import OLDER_NAMES, VARIANTS, PairTerms


def dpo_loss(
    logps: PairedLogps,
    *,
    beta: float = 0.1,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    reference_free: bool = False,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
    bco_delta: float | Tensor = 0.0,
) -> LossOutput:
    """DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7) and its relatives, one loss a pair.

    loss_type names a form of dpo_variants.VARIANTS, where the formulas and papers are, or several: the loss
    is then the sum of weight * form, weights 1 each when loss_weights is None. ipo_loss and aot_pair are
    older names of ipo and aot_unpaired. aot and aot_unpaired compare sorted rows: `logps` must be the whole
    global batch. reference_free takes the reference as uniform: the log-ratios are the policy's log-probs, a
    reference that is given is left out. f_divergence_type with f_alpha_divergence_coef is f-DPO, see
    divergence_score. discopop_tau is looked at by discopop alone, bco_delta (a float or a tensor with one
    element, a constant here) by bco_pair.

    Rewards: beta times the log-ratio that the loss uses (summed; per token for ipo and sigmoid_norm; f'(u)
    under another divergence), of several forms that of the first. Detached.
    Gradient flows through the policy only. Shapes [n] throughout; dtype that of `total`, halves raised to
    float32.
    Raises ValueError: an unknown loss_type, one named twice, weights that do not match, a parameter out of
    its range, reference missing; label_smoothing, f_divergence_type or reference_free with a form that gives
    it no meaning.
    """
    forms = _weighted_forms(loss_type, loss_weights)
    check_beta("dpo_loss", beta)
    check_divergence("dpo_loss", f_divergence_type, f_alpha_divergence_coef)
    _check_constants(discopop_tau, bco_delta)
    for name in forms:
        _check_form(name, label_smoothing, f_divergence_type, reference_free=reference_free)
    where = f"dpo_loss(loss_type={' + '.join(forms)!r})"
    chosen, rejected = paired_log_ratios(logps, reference_free=reference_free, where=where)
    terms = PairTerms(
        beta=beta,
        chosen=chosen,
        rejected=rejected,
        chosen_score=divergence_score(f_divergence_type, chosen, f_alpha_divergence_coef),
        rejected_score=divergence_score(f_divergence_type, rejected, f_alpha_divergence_coef),
        policy_gap=policy_total(logps.policy_chosen) - policy_total(logps.policy_rejected),
        reference_gap=_reference_gap(logps, like=chosen, reference_free=reference_free),
        chosen_length=logps.policy_chosen.length.to(chosen.dtype),
        rejected_length=logps.policy_rejected.length.to(chosen.dtype),
        label_smoothing=label_smoothing,
        tau=discopop_tau,
        delta=bco_delta.detach().reshape(()) if isinstance(bco_delta, Tensor) else bco_delta,
    )
    losses = torch.zeros_like(chosen)
    for name, weight in forms.items():
        losses = losses + weight * VARIANTS[name].losses(terms)
    chosen_ratio, rejected_ratio = terms.chosen_score, terms.rejected_score
    if VARIANTS[next(iter(forms))].per_token:
        chosen_ratio, rejected_ratio = terms.chosen_per_token, terms.rejected_per_token
    return LossOutput(losses, beta * chosen_ratio.detach(), beta * rejected_ratio.detach())


def _reference_gap(logps: PairedLogps, *, like: Tensor, reference_free: bool) -> Tensor:
    """log ref(y_c|x) - log ref(y_r|x) [n], detached; 0 under a uniform reference."""
    if reference_free or logps.reference_chosen is None or logps.reference_rejected is None:
        return torch.zeros_like(like)
    return (policy_total(logps.reference_chosen) - policy_total(logps.reference_rejected)).detach()


def _weighted_forms(loss_type: str | Sequence[str], weights: Sequence[float] | None) -> dict[str, float]:
    """The weight of each form under its current name, in the order given."""
    given = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    if "sft" in given:
        raise ValueError(
            "dpo_loss: loss_type='sft' is the NLL of the chosen completions, a mean over the tokens of the "
            "global batch, which the caller adds; leave it out here"
        )
    names = [OLDER_NAMES.get(name, name) for name in given]
    for name in names:
        check_loss_type("dpo_loss", name, VARIANTS)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"dpo_loss: loss_type={loss_type!r}; expected at least one type, each named once")
    values = [1.0] * len(names) if weights is None else list(weights)
    if len(values) != len(names):
        raise ValueError(
            f"dpo_loss: loss_weights has {len(values)} entries and loss_type {len(names)}; give one for each"
        )
    if not all(value > 0.0 and math.isfinite(value) for value in values):
        raise ValueError(f"dpo_loss: loss_weights={values}; expected finite numbers greater than 0")
    return dict(zip(names, values, strict=True))


def _check_constants(tau: float, delta: float | Tensor) -> None:
    if not (tau > 0.0 and math.isfinite(tau)):
        raise ValueError(f"dpo_loss: discopop_tau={tau}; expected a finite number greater than 0")
    if isinstance(delta, Tensor):
        if delta.numel() != 1:
            raise ValueError(f"dpo_loss: bco_delta has shape {tuple(delta.shape)}; expected one number")
    elif not math.isfinite(delta):
        raise ValueError(f"dpo_loss: bco_delta={delta}; expected a finite number")


def _check_form(name: str, label_smoothing: float, divergence: str, *, reference_free: bool) -> None:
    where, variant = f"dpo_loss(loss_type={name!r})", VARIANTS[name]
    check_label_smoothing(where, label_smoothing, legal=variant.smoothing)
    if variant.unbiased and label_smoothing >= 0.5:
        raise ValueError(
            f"{where}: label_smoothing={label_smoothing}; it divides by 1 - 2 label_smoothing, so expected a "
            "number below 0.5"
        )
    if divergence != "reverse_kl" and not variant.divergence:
        legal = [other for other, kind in VARIANTS.items() if kind.divergence]
        raise ValueError(
            f"{where}: f_divergence_type={divergence!r} has no meaning for this loss; it is defined for "
            f"{', '.join(legal)}"
        )
    if reference_free and divergence != "reverse_kl":
        raise ValueError(
            f"{where}: f_divergence_type={divergence!r} is a divergence from the reference, and "
            "reference_free leaves that out; drop one of the two"
        )
    if reference_free and (variant.absolute or variant.sorts):
        raise ValueError(
            f"{where}: reference_free has no meaning for this loss, which needs more of the reference than "
            "one difference"
        )
