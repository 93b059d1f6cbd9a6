"""Kahneman-Tversky Optimization."""

from __future__ import annotations

import math

import torch

from .base import LossOutput, UnpairedLogps, check_beta, check_loss_type, log_ratio

LOSS_TYPES = ("kto", "apo_zero_unpaired")


def kto_loss(
    logps: UnpairedLogps,
    *,
    beta: float = 0.1,
    loss_type: str = "kto",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossOutput:
    """KTO (Ethayarajh et al. 2024, arXiv:2402.01306), one loss an example.

    With rho = log pi(y|x) - log ref(y|x) summed over tokens and z0 = logps.kl, both in nats:

        desirable:   desirable_weight   (1 - sigmoid(beta (rho - z0)))
        undesirable: undesirable_weight (1 - sigmoid(beta (z0 - rho)))

    z0 is handed in because it is a mean over the global batch: max(0, mean of log pi(y'|x) - log ref(y'|x))
    over mismatched completions y'. It is a constant here: no gradient flows through it.

    Without a reference (logps.reference is None) rho = log pi(y|x), the paper's form for a uniform reference,
    whose z0 is the mean of log pi over the global batch, not clamped at 0.

    loss_type "apo_zero_unpaired" is APO-zero (arXiv:2408.06266, eq. 7) on single completions: the same with
    z0 = 0 whatever logps.kl is, desirable_weight (1 - sigmoid(beta rho)) and undesirable_weight
    sigmoid(beta rho). It needs a reference.

    At pi = ref and z0 = 0 every loss is half its weight. Rewards: beta rho, detached.
    Gradient flows through the policy only. Shapes [n] throughout; dtype that of `total`, halves raised to
    float32. Raises ValueError: unknown loss_type, beta not above 0, a weight that is negative or not finite,
    apo_zero_unpaired without a reference.
    """
    check_loss_type("kto_loss", loss_type, LOSS_TYPES)
    check_beta("kto_loss", beta)
    anchored = loss_type == "apo_zero_unpaired"
    if anchored and logps.reference is None:
        raise ValueError(
            "kto_loss(loss_type='apo_zero_unpaired'): reference missing; this loss compares each completion "
            "with the reference alone"
        )
    for name, weight in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
        if not (weight >= 0.0 and math.isfinite(weight)):
            raise ValueError(f"kto_loss: {name}={weight}; expected a finite number of at least 0")
    rho = log_ratio(logps.policy, logps.reference)
    kl = 0.0 if anchored else logps.kl
    z0 = torch.as_tensor(kl, dtype=rho.dtype, device=rho.device).detach().reshape(())
    desirable = logps.desirable.to(rho.dtype)
    sign = 2.0 * desirable - 1.0
    weight = desirable_weight * desirable + undesirable_weight * (1.0 - desirable)
    # 1 - sigmoid(x) is written sigmoid(-x): the difference would round to 0 long before the loss does.
    losses = weight * torch.sigmoid(-sign * beta * (rho - z0))
    return LossOutput(losses, rewards=beta * rho.detach())
