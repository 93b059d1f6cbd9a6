"""Direct Preference Optimization."""

from __future__ import annotations

from .base import (
    LossOutput,
    PairedLogps,
    check_beta,
    check_label_smoothing,
    check_loss_type,
    hinge,
    paired_log_ratios,
    smoothed_log_sigmoid,
)
from .ipo import ipo_from_log_ratios

LOSS_TYPES = ("sigmoid", "hinge", "ipo")
SMOOTHED_LOSS_TYPES = ("sigmoid", "ipo")


def dpo_loss(
    logps: PairedLogps,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    reference_free: bool = False,
) -> LossOutput:
    """DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7) and its close relatives, one loss a pair.

    With the log-ratios c = log pi(y_c|x) - log ref(y_c|x) and r likewise for the rejected completion,
    summed over tokens (nats), z = c - r and e = label_smoothing:

    * sigmoid: -(1 - e) log sigmoid(beta z) - e log sigmoid(-beta z); e = 0 is DPO, e > 0 is conservative
      DPO (Mitchell 2023, "A note on DPO with noisy preferences", eq. 3), whose optimum is
      beta z = log((1 - e)/e).
    * hinge: max(0, 1 - beta z), SLiC's ranking loss (arXiv:2305.10425) on log-ratios as in statistical
      rejection sampling (arXiv:2309.06657, "hinge-norm").
    * ipo: ipo_loss with its defaults (arXiv:2310.12036, eq. 17; per-token log-ratios).

    reference_free takes the reference as uniform: c and r are the policy's log-probs alone, and a reference
    that is given is left out. At pi = ref the losses are ln 2, 1 and 1/(4 beta^2).

    Rewards: beta times the log-ratio that the loss uses (summed; per token for ipo), detached.
    Gradient flows through the policy only. Shapes [n] throughout; dtype that of `total`, halves raised to
    float32.
    Raises ValueError: unknown loss_type, beta not above 0, label_smoothing outside [0, 0.5] or with hinge,
    reference missing.
    """
    check_loss_type("dpo_loss", loss_type, LOSS_TYPES)
    where = f"dpo_loss(loss_type={loss_type!r})"
    check_beta(where, beta)
    check_label_smoothing(where, label_smoothing, legal=loss_type in SMOOTHED_LOSS_TYPES)
    chosen, rejected = paired_log_ratios(logps, reference_free=reference_free, where=where)
    if loss_type == "ipo":
        return ipo_from_log_ratios(
            logps, chosen, rejected, beta=beta, length_normalize=True, label_smoothing=label_smoothing
        )
    logit = beta * (chosen - rejected)
    losses = hinge(logit) if loss_type == "hinge" else smoothed_log_sigmoid(logit, label_smoothing)
    return LossOutput(losses, beta * chosen.detach(), beta * rejected.detach())
