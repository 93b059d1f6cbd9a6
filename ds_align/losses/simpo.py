"""Simple Preference Optimization."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import (
    LossOutput,
    PairedLogps,
    check_beta,
    check_label_smoothing,
    check_loss_type,
    hinge,
    mean_per_token,
    policy_total,
    smoothed_log_sigmoid,
)

# "simpo" is the older name of the sigmoid form.
LOSS_TYPES = ("sigmoid", "hinge", "simpo")


def simpo_loss(
    logps: PairedLogps,
    *,
    beta: float = 2.0,
    gamma_beta_ratio: float = 0.5,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    alpha: float = 0.0,
) -> LossOutput:
    """SimPO (Meng et al. 2024, arXiv:2405.14734, eq. 6), one loss a pair, no reference.

    With the policy's mean log-probs a token m = pi/n (nats a token), e = label_smoothing and

        u = reward_c - reward_r - gamma,   reward = beta m,   gamma = beta * gamma_beta_ratio

    * sigmoid (also called "simpo"): -(1 - e) log sigmoid(u) - e log sigmoid(-u); e = 0 is the paper's.
    * hinge: max(0, 1 - u).

    alpha other than 0, with sigmoid, is AlphaPO (arXiv:2501.03884): reward = beta (1 - p^-alpha)/alpha with
    the mean probability a token p = exp(m); alpha towards 0 is SimPO. Nothing is clamped: for alpha > 0 the
    reward grows as exp(-alpha m).

    The optional NLL of the chosen completion is weighed by tokens over the global batch and is therefore
    added by the caller. A reference in `logps` is not looked at.

    Rewards: the ones above, detached; gamma is no part of them.
    Shapes [n] throughout; dtype that of `total`, halves raised to float32.
    Raises ValueError: unknown loss_type, beta not above 0, gamma_beta_ratio or alpha not finite,
    label_smoothing outside [0, 0.5], label_smoothing or alpha with hinge.
    """
    check_loss_type("simpo_loss", loss_type, LOSS_TYPES)
    where = f"simpo_loss(loss_type={loss_type!r})"
    check_beta(where, beta)
    for name, value in (("gamma_beta_ratio", gamma_beta_ratio), ("alpha", alpha)):
        if not math.isfinite(value):
            raise ValueError(f"{where}: {name}={value}; expected a finite number")
    check_label_smoothing(where, label_smoothing, legal=loss_type != "hinge")
    if alpha != 0.0 and loss_type == "hinge":
        raise ValueError(f"{where}: alpha={alpha} has no meaning for this loss; expected 0")
    chosen = beta * _shaped(mean_per_token(policy_total(logps.policy_chosen), logps.policy_chosen), alpha)
    rejected = beta * _shaped(
        mean_per_token(policy_total(logps.policy_rejected), logps.policy_rejected), alpha
    )
    logit = chosen - rejected - beta * gamma_beta_ratio
    losses = hinge(logit) if loss_type == "hinge" else smoothed_log_sigmoid(logit, label_smoothing)
    return LossOutput(losses, chosen.detach(), rejected.detach())


def _shaped(mean_logp: Tensor, alpha: float) -> Tensor:
    """(1 - exp(-alpha m))/alpha, and its limit m at alpha = 0."""
    return mean_logp if alpha == 0.0 else -torch.expm1(-alpha * mean_logp) / alpha
