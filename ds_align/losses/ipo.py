"""Identity Preference Optimization."""

from __future__ import annotations

from .base import (
    LossOutput,
    PairedLogps,
    check_beta,
    check_label_smoothing,
    mean_per_token,
    paired_log_ratios,
    smoothed_squared,
)


def ipo_loss(
    logps: PairedLogps, *, beta: float = 0.1, length_normalize: bool = True, label_smoothing: float = 0.0
) -> LossOutput:
    """Identity-PO (Azar et al. 2023, arXiv:2310.12036, eq. 17; beta is the paper's tau), one loss a pair.

    With log-ratios c and r against the reference (nats), their gap d and e = label_smoothing:

        (1 - e) (d - 1/(2 beta))^2 + e (d + 1/(2 beta))^2

    length_normalize=True: d = c/n_c - r/n_r, nats a token, so the target 1/(2 beta) does not depend on the
    completions' lengths (the authors' advice after publication). False: d = c - r, summed nats, as printed in
    the paper. At pi = ref the loss is 1/(4 beta^2); with a share p of correct labels the optimum is
    d = (2p - 1)/(2 beta).

    Rewards: beta times the log-ratio that the loss uses (per token or summed), detached.
    Gradient flows through the policy only. Shapes [n] throughout; dtype that of `total`, halves raised to
    float32. Raises ValueError: beta not above 0, label_smoothing outside [0, 0.5], reference missing.
    """
    check_beta("ipo_loss", beta)
    check_label_smoothing("ipo_loss", label_smoothing, legal=True)
    chosen, rejected = paired_log_ratios(logps, reference_free=False, where="ipo_loss")
    if length_normalize:
        chosen = mean_per_token(chosen, logps.policy_chosen)
        rejected = mean_per_token(rejected, logps.policy_rejected)
    losses = smoothed_squared(chosen - rejected, beta, label_smoothing)
    return LossOutput(losses, beta * chosen.detach(), beta * rejected.detach())
