"""Which divergence holds the policy near the reference: the reward as a function of the log-ratio."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")


def divergence_score(kind: str, log_ratio: Tensor, alpha: float) -> Tensor:
    """f'(u) at u = exp(log_ratio) = policy/reference [n]: f-DPO's reward over beta (arXiv:2309.16240).

    A reward is known up to a constant a prompt, which the difference of two completions cancels; the
    constants here make every kind 0 at policy = reference, with a slope of 1 in log_ratio (1/2 for js).

    * reverse_kl: log u, which is DPO.
    * forward_kl: 1 - 1/u.
    * js: log(2u/(1 + u)).
    * alpha: (1 - u^-alpha)/alpha, 0 < alpha < 1, the paper's form: alpha towards 0 is reverse_kl, towards 1
      forward_kl. TRL's f_alpha_divergence_coef is 1 - alpha.

    Nothing is clamped. forward_kl and alpha grow as exp(-log_ratio) and leave float64 about 709 nats (over
    alpha) below the reference, float32 about 88; the loss is infinite or NaN there.
    """
    if kind == "forward_kl":
        return -torch.expm1(-log_ratio)
    if kind == "js":
        return math.log(2.0) + F.logsigmoid(log_ratio)
    if kind == "alpha":
        return -torch.expm1(-alpha * log_ratio) / alpha
    return log_ratio


def check_divergence(where: str, kind: str, alpha: float) -> None:
    """ValueError unless `kind` is known and, for alpha, 0 < alpha < 1."""
    if kind not in DIVERGENCES:
        raise ValueError(f"{where}: f_divergence_type={kind!r}; expected one of {', '.join(DIVERGENCES)}")
    if kind == "alpha" and not 0.0 < alpha < 1.0:
        raise ValueError(
            f"{where}: f_alpha_divergence_coef={alpha}; expected a number between 0 (reverse_kl) and 1 "
            "(forward_kl)"
        )
