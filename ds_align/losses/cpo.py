"""Contrastive Preference Optimization."""

from __future__ import annotations

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
    smoothed_squared,
)

LOSS_TYPES = ("sigmoid", "hinge", "ipo")


def cpo_loss(
    logps: PairedLogps,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    length_normalize: bool = True,
) -> LossOutput:
    """CPO's preference term (Xu et al. 2024, arXiv:2401.08417, eq. 3), one loss a pair, no reference.

    With the policy's log-probs pi_c and pi_r summed over tokens (nats), m = pi_c - pi_r, e = label_smoothing:

    * sigmoid: -(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m); e = 0 is the paper's.
    * hinge: max(0, 1 - beta m).
    * ipo: (d - 1/(2 beta))^2 with d = pi_c/n_c - pi_r/n_r (nats a token), or d = m with
      length_normalize=False. length_normalize belongs to this type alone: sigmoid and hinge compare sums.

    The paper's second term, NLL of the chosen completion, is weighed by tokens over the global batch and is
    therefore added by the caller. A reference in `logps` is not looked at.

    Rewards: beta times the summed log-prob, for every loss_type, detached.
    Shapes [n] throughout; dtype that of `total`, halves raised to float32.
    Raises ValueError: unknown loss_type, beta not above 0, label_smoothing outside [0, 0.5] or not with
    sigmoid.
    """
    check_loss_type("cpo_loss", loss_type, LOSS_TYPES)
    where = f"cpo_loss(loss_type={loss_type!r})"
    check_beta(where, beta)
    check_label_smoothing(where, label_smoothing, legal=loss_type == "sigmoid")
    chosen, rejected = policy_total(logps.policy_chosen), policy_total(logps.policy_rejected)
    gap = chosen - rejected
    if loss_type == "ipo" and length_normalize:
        gap = mean_per_token(chosen, logps.policy_chosen) - mean_per_token(rejected, logps.policy_rejected)
    if loss_type == "ipo":
        losses = smoothed_squared(gap, beta, 0.0)
    elif loss_type == "hinge":
        losses = hinge(beta * gap)
    else:
        losses = smoothed_log_sigmoid(beta * gap, label_smoothing)
    return LossOutput(losses, beta * chosen.detach(), beta * rejected.detach())
