"""Token log-probabilities without the [tokens, vocabulary] matrix: public functions, choice of backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import native, operators
from .checks import check_head, check_logits, checked_labels, has_own_places, refuse_forward_mode
from .collision import linear_log_collision, log_collision, log_collision_of
from .native import backend
from .reference import LOGIT_SUM, WITH_LOGIT_SUM, WITH_SQUARES, accumulation_dtype

__all__ = [
    "LabelScores",
    "attach_gradient",
    "backend",
    "linear_log_collision",
    "linear_logprob",
    "linear_scores",
    "log_collision",
    "logprob_gather",
]

BYTES_PER_MB = 2**20


@dataclass(frozen=True, slots=True)
class LabelScores:
    """Per token [tokens], in nats; all but logprobs is detached, and None where it was not asked for.

    mean_logits: mean of the logits over the vocabulary. log_collision: log sum_v p_v^2.
    derivative [tokens, H]: d logprob / d hidden, for attach_gradient.
    """

    logprobs: Tensor
    mean_logits: Tensor | None = None
    log_collision: Tensor | None = None
    derivative: Tensor | None = None


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    impl: str = "auto",
    *,
    logits_budget_mb: int = 0,
) -> Tensor:
    """Log-probability of each label under the LM head, log_softmax(logits(hidden))[label], tile by tile.

    logits = softcap(scale * (hidden @ weight.T + bias)), softcap(z) = cap * tanh(z / cap).

    hidden [tokens, H], weight [V, H], bias [V]: float32, bfloat16, float16 or float64; labels [tokens]
    integers. Returns [tokens] nats, never above 0, in float32, or in float64 where hidden or weight is
    float64. A label below 0 is ignored: log-probability 0, gradient 0. Gradients (in their tensor's dtype,
    accumulated in float32) for hidden, weight and bias, for those alone that require them; not differentiable
    twice.

    With a trainable head the backward computes the logits again (4 matrix products in all), but for those
    tiles that the forward kept: as many as fit logits_budget_mb, in units of 2^20 bytes, at 4 bytes a logit
    (8 in float64); 3 products where all do. With a frozen head the forward already makes the gradient (2
    products, and the backward does not read the weight). But for the kept logits, no tensor of more than one
    tile (tokens x vocabulary) exists. The log-probs are the same to the bit in all of these modes and without
    gradients. Zero tokens give an empty result that is attached to the graph, with zero gradients.

    impl: "torch" takes plain PyTorch; "native" the compiled extension; "auto" the extension where it is
    there, has kernels for the device and dtype, and the environment does not say DS_ALIGN_KERNELS=torch.
    Raises ValueError: shapes, dtypes or devices that do not fit, a softcap outside of 1e-30 to 1e30, a scale
    that is not finite, unknown impl, or, on the CPU only, a label of V or more. On an accelerator that check
    would cost a synchronisation: such a label yields NaN there.
    Raises RuntimeError: impl="native" where the extension is not there or has no kernels for this call.
    Raises NotImplementedError in forward-mode differentiation (torch.func.jvp).
    """
    return linear_scores(
        hidden,
        weight,
        labels,
        bias=bias,
        softcap=softcap,
        scale=scale,
        impl=impl,
        logits_budget_mb=logits_budget_mb,
    ).logprobs


def linear_scores(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    impl: str = "auto",
    logits_budget_mb: int = 0,
    with_mean_logits: bool = False,
    with_collision: bool = False,
    with_derivative: bool = False,
) -> LabelScores:
    """linear_logprob with more about each token's distribution from the same walk over the tiles.

    with_derivative: for a frozen head that must not be read in the backward. Nothing is attached to the graph
    here; attach_gradient does so, outside of the module that owns the head.
    """
    check_head("linear_logprob", hidden, weight, bias, softcap=softcap, scale=scale)
    refuse_forward_mode("linear_logprob", hidden, weight, bias)
    labels = checked_labels("linear_logprob", labels, hidden)
    if logits_budget_mb < 0:
        raise ValueError(f"linear_logprob: logits_budget_mb={logits_budget_mb}; expected 0 or more")
    dtype = accumulation_dtype(hidden, weight)
    use_native = native.is_taken(impl, hidden.device, dtype)
    statistics = with_mean_logits * WITH_LOGIT_SUM + with_collision * WITH_SQUARES
    numbers = (1.0 if scale is None else float(scale), 0.0 if softcap is None else float(softcap), statistics)
    trains_head = weight.requires_grad or (bias is not None and bias.requires_grad)
    wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or trains_head)
    derivative = None
    if with_derivative or (wants_gradient and not trains_head):
        with torch.no_grad():
            logprobs, state, derivative = operators.linear_score_frozen(
                hidden, weight, bias, labels, *numbers, use_native
            )
        if not with_derivative:
            logprobs, derivative = attach_gradient(hidden, logprobs, derivative), None
    else:
        affordable = logits_budget_mb * BYTES_PER_MB // dtype.itemsize if wants_gradient else 0
        num_kept = min(hidden.shape[0] * weight.shape[0], affordable)
        logprobs, state, _ = operators.linear_score(
            hidden, weight, bias, labels, *numbers, num_kept, use_native
        )
    mean_logits = state[LOGIT_SUM] / weight.shape[0] if with_mean_logits else None
    return LabelScores(logprobs, mean_logits, log_collision_of(state) if with_collision else None, derivative)


def attach_gradient(hidden: Tensor, logprobs: Tensor, derivative: Tensor) -> Tensor:
    """The log-probs as a function of hidden: in the backward its gradient is derivative * incoming gradient.

    logprobs [tokens] and derivative [tokens, H] come from linear_scores(with_derivative=True) for the same
    hidden [tokens, H]. Under ZeRO-3 the head is called without a graph, so that nothing gathers its weight
    again in the backward, and this is applied outside of it.
    """
    if derivative.shape != hidden.shape or logprobs.shape != hidden.shape[:1]:
        raise ValueError(
            f"attach_gradient: hidden {tuple(hidden.shape)}, logprobs {tuple(logprobs.shape)} and derivative "
            f"{tuple(derivative.shape)} do not fit; expected [tokens, H], [tokens] and [tokens, H]"
        )
    return operators.scale_back(hidden, logprobs, derivative)


def logprob_gather(
    logits: Tensor, labels: Tensor, impl: str = "auto", *, reuse_logits: bool = False
) -> Tensor:
    """Log-probability of each label from logits that are already there: log_softmax(logits)[label].

    logits [tokens, V], any floating dtype; labels [tokens] integers, below 0 = ignored (log-probability 0,
    gradient 0). Returns [tokens] nats, never above 0, in float32 (float64 for float64 logits). Beside the
    logits, only tiles are allocated, never a float32 copy of bfloat16 logits; the backward adds their
    gradient, in their dtype. Not differentiable twice. Zero tokens give an empty result that is attached to
    the graph.

    reuse_logits: the backward may write the gradient over the logits, which saves a matrix; nobody else may
    read them after it. An operation that kept them for its own backward makes torch raise a RuntimeError.
    impl: as in linear_logprob.
    Raises ValueError: shapes, dtypes or devices that do not fit, unknown impl, logits to be reused that are a
    leaf, or, on the CPU only, a label of V or more (NaN elsewhere).
    Raises NotImplementedError in forward-mode differentiation (torch.func.jvp).
    Raises RuntimeError: impl="native" where the extension is not there or has no kernels for this call.
    """
    check_logits("logprob_gather", logits)
    refuse_forward_mode("logprob_gather", logits)
    labels = checked_labels("logprob_gather", labels, logits)
    if reuse_logits and logits.is_leaf and logits.requires_grad:
        raise ValueError(
            "logprob_gather: reuse_logits=True would write the gradient over a leaf, whose values are the "
            "caller's; leave it out, or give logits that were computed"
        )
    use_native = native.is_taken(impl, logits.device, accumulation_dtype(logits))
    # Where two logits share a place (an expanded tensor), one place cannot hold their gradients.
    reuses = reuse_logits and has_own_places(logits)
    logprobs, _ = operators.gather_score(logits, labels, 0, reuses, use_native)
    return logprobs
