"""Simple Preference Optimization."""

from __future__ import annotations

import math

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
) -> LossOutput:
    """SimPO (Meng et al. 2024, arXiv:2405.14734, eq. 6), one loss a pair, no reference.

    With the policy's mean log-probs a token pi_c/n_c and pi_r/n_r (nats a token), e = label_smoothing and

        u = beta (pi_c/n_c - pi_r/n_r) - gamma,   gamma = beta * gamma_beta_ratio

    * sigmoid (also called "simpo"): -(1 - e) log sigmoid(u) - e log sigmoid(-u); e = 0 is the paper's.
    * hinge: max(0, 1 - u).

    The optional NLL of the chosen completion is weighed by tokens over the global batch and is therefore
    added by the caller. A reference in `logps` is not looked at.

    Rewards: beta times the mean log-prob a token, detached; gamma is no part of them.
    Shapes [n] throughout; dtype that of `total`, halves raised to float32.
    Raises ValueError: unknown loss_type, beta not above 0, gamma_beta_ratio not finite, label_smoothing
    outside [0, 0.5] or with hinge.
    """
    check_loss_type("simpo_loss", loss_type, LOSS_TYPES)
    where = f"simpo_loss(loss_type={loss_type!r})"
    check_beta(where, beta)
    if not math.isfinite(gamma_beta_ratio):
        raise ValueError(f"{where}: gamma_beta_ratio={gamma_beta_ratio}; expected a finite number")
    check_label_smoothing(where, label_smoothing, legal=loss_type != "hinge")
    chosen = beta * mean_per_token(policy_total(logps.policy_chosen), logps.policy_chosen)
    rejected = beta * mean_per_token(policy_total(logps.policy_rejected), logps.policy_rejected)
    logit = chosen - rejected - beta * gamma_beta_ratio
    losses = hinge(logit) if loss_type == "hinge" else smoothed_log_sigmoid(logit, label_smoothing)
    return LossOutput(losses, chosen.detach(), rejected.detach())
