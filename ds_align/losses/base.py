"""What goes into a preference loss and what comes out, and the three curves that the methods share.

Everything here works on vectors with one entry a pair (or an example): nothing is averaged and nothing
communicates, so the caller alone decides how a global batch is weighed. Log-probabilities are natural
logarithms (nats), lengths are tokens.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True, eq=False)
class Logps:
    """Completion log-probabilities of n completions under one model.

    total: [n] log-probability summed over the completion's tokens, nats.
    length: [n] number of those tokens, at least 1; any integer or floating dtype.
    """

    total: Tensor
    length: Tensor

    def __post_init__(self) -> None:
        if self.total.shape != self.length.shape:
            raise ValueError(
                f"Logps: total has shape {tuple(self.total.shape)} and length {tuple(self.length.shape)}; "
                "both must be [n], one entry a completion"
            )
        if not self.total.is_floating_point():
            raise ValueError(f"Logps: total has dtype {self.total.dtype}; expected a floating dtype")


@dataclass(frozen=True, slots=True, eq=False)
class PairedLogps:
    """n preference pairs: chosen and rejected under the policy and, if there is one, the reference."""

    policy_chosen: Logps
    policy_rejected: Logps
    reference_chosen: Logps | None = None
    reference_rejected: Logps | None = None

    def __post_init__(self) -> None:
        for name in ("policy_rejected", "reference_chosen", "reference_rejected"):
            _check_same_shape("PairedLogps", self.policy_chosen, name, getattr(self, name))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class UnpairedLogps:
    """n completions that are desirable or not.

    desirable: [n] bool.
    kl: KTO's reference point z0 in nats, a float or a tensor with one element; the losses detach it.
    """

    policy: Logps
    reference: Logps | None = None
    desirable: Tensor
    kl: float | Tensor = 0.0

    def __post_init__(self) -> None:
        _check_same_shape("UnpairedLogps", self.policy, "reference", self.reference)
        if self.desirable.dtype != torch.bool or self.desirable.shape != self.policy.total.shape:
            raise ValueError(
                f"UnpairedLogps: desirable is {self.desirable.dtype} {tuple(self.desirable.shape)}; "
                f"expected torch.bool {tuple(self.policy.total.shape)}"
            )
        if isinstance(self.kl, Tensor) and self.kl.numel() != 1:
            raise ValueError(f"UnpairedLogps: kl has shape {tuple(self.kl.shape)}; expected one number")


@dataclass(frozen=True, slots=True, eq=False)
class LossOutput:
    """One loss and its implicit rewards an entry; rewards are detached, in nats times beta.

    losses: [n], attached to the policy's graph.
    chosen_rewards, rejected_rewards: [n] for pairs, None for unpaired examples.
    rewards: [n] for unpaired examples (KTO), None for pairs.
    """

    losses: Tensor
    chosen_rewards: Tensor | None = None
    rejected_rewards: Tensor | None = None
    rewards: Tensor | None = None


def policy_total(logps: Logps) -> Tensor:
    """Summed log-probabilities [n] in the dtype that losses compute in: bf16 and fp16 become float32."""
    half = logps.total.dtype in (torch.bfloat16, torch.float16)
    return logps.total.float() if half else logps.total


def mean_per_token(total: Tensor, logps: Logps) -> Tensor:
    """`total` divided by the completions' token counts, in total's dtype."""
    return total / logps.length.to(total.dtype)


def log_ratio(policy: Logps, reference: Logps | None) -> Tensor:
    """log policy(y|x) - log reference(y|x) [n], the reference a constant; log policy(y|x) without one."""
    if reference is None:
        return policy_total(policy)
    return policy_total(policy) - policy_total(reference).detach()


def paired_log_ratios(logps: PairedLogps, *, reference_free: bool, where: str) -> tuple[Tensor, Tensor]:
    """Log-ratios (chosen, rejected), [n] each, nats.

    reference_free leaves the reference out of the ratio, whether it is there or not.
    Raises ValueError if the reference is needed and absent; `where` names the loss in the message.
    """
    if reference_free:
        return policy_total(logps.policy_chosen), policy_total(logps.policy_rejected)
    missing = [name for name in ("reference_chosen", "reference_rejected") if getattr(logps, name) is None]
    if missing:
        raise ValueError(
            f"{where}: {' and '.join(missing)} missing; this loss needs the reference's log-probs of both"
        )
    return (
        log_ratio(logps.policy_chosen, logps.reference_chosen),
        log_ratio(logps.policy_rejected, logps.reference_rejected),
    )


def smoothed_log_sigmoid(logit: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigmoid(logit) - e log sigmoid(-logit): logistic loss, a share e of labels flipped."""
    if label_smoothing == 0.0:
        return -F.logsigmoid(logit)
    return -(1.0 - label_smoothing) * F.logsigmoid(logit) - label_smoothing * F.logsigmoid(-logit)


def hinge(logit: Tensor) -> Tensor:
    """max(0, 1 - logit)."""
    return F.relu(1.0 - logit)


def smoothed_squared(gap: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """(1 - e)(gap - t)^2 + e (gap + t)^2 with the target t = 1/(2 beta): IPO's, a share e of labels
    flipped.
    """
    target = 1.0 / (2.0 * beta)
    if label_smoothing == 0.0:
        return (gap - target).square()
    return (1.0 - label_smoothing) * (gap - target).square() + label_smoothing * (gap + target).square()


def check_beta(where: str, beta: float) -> None:
    """ValueError unless beta is finite and greater than 0."""
    if not (beta > 0.0 and math.isfinite(beta)):
        raise ValueError(f"{where}: beta={beta}; expected a finite number greater than 0")


def check_loss_type(where: str, loss_type: str, allowed: Collection[str]) -> None:
    """ValueError unless loss_type is one of `allowed`."""
    if loss_type not in allowed:
        raise ValueError(f"{where}: loss_type={loss_type!r}; expected one of {', '.join(allowed)}")


def check_label_smoothing(where: str, label_smoothing: float, *, legal: bool) -> None:
    """ValueError unless label_smoothing is within [0, 0.5], and 0 for a loss where it is not legal.

    Beyond one half the labels would be inverted: at 0.5 nothing can be learned from them.
    """
    if not legal and label_smoothing != 0.0:
        raise ValueError(
            f"{where}: label_smoothing={label_smoothing} has no meaning for this loss; expected 0"
        )
    if not 0.0 <= label_smoothing <= 0.5:
        raise ValueError(f"{where}: label_smoothing={label_smoothing}; expected a number from 0 to 0.5")


def _check_same_shape(where: str, first: Logps, name: str, other: Logps | None) -> None:
    if other is not None and other.total.shape != first.total.shape:
        raise ValueError(
            f"{where}: {name} has shape {tuple(other.total.shape)}; "
            f"expected {tuple(first.total.shape)}, as the policy's"
        )
