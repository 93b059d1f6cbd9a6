"""Token log-probabilities without the [tokens, vocabulary] matrix: public functions, choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .collision import linear_log_collision, log_collision

__all__ = ["backend", "linear_log_collision", "linear_logprob", "log_collision", "logprob_gather"]

IMPLEMENTATIONS = ("auto", "native", "torch")


def backend() -> str:
    """Name of the implementation that impl="auto" takes: "torch", the plain PyTorch one."""
    return "torch"


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Log-probability of each label under the LM head, log_softmax(logits(hidden))[label], tile by tile.

    logits = softcap(scale * (hidden @ weight.T + bias)), softcap(z) = cap * tanh(z / cap).

    hidden [tokens, H], weight [V, H], bias [V]: float32, bfloat16, float16 or float64; labels [tokens]
    integers. Returns [tokens] nats in float32, or in float64 where hidden or weight is float64. A label
    below 0 is ignored: log-probability 0, gradient 0. Gradients (in their tensor's dtype, accumulated in
    float32) for hidden, weight and bias, for those alone that require them; not differentiable twice.

    No tensor of more than one tile (tokens x vocabulary) exists in forward or backward. With a trainable head
    the backward computes the logits again (4 matrix products in all); with a frozen one the forward already
    makes the gradient (2 products, and the backward does not read the weight). Zero tokens give an empty
    result that is attached to the graph, with zero gradients.

    impl: "auto" and "torch" take the plain PyTorch implementation; "native" asks for the compiled extension.
    Raises ValueError: shapes or dtypes that do not fit, softcap not above 0, unknown impl, or, on the CPU
    only, a label of V or more. On an accelerator that check would cost a synchronisation: such a label yields
    NaN there.
    Raises RuntimeError: impl="native", as the compiled extension is not there.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"linear_logprob: impl={impl!r}; expected one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "native":
        raise RuntimeError(
            "linear_logprob: impl='native' needs the compiled extension ds_align._C, which is not there; "
            "use impl='auto' or impl='torch'"
        )
    _check_head(hidden, weight, bias, softcap)
    _check_labels("linear_logprob", labels, num_tokens=hidden.shape[0], vocabulary=weight.shape[0])
    return reference.linear_logprob(hidden, weight, labels, bias, softcap, scale=scale)


def logprob_gather(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label from logits that are already there: log_softmax(logits)[label].

    logits [tokens, V], any floating dtype; labels [tokens] integers, below 0 = ignored (log-probability 0,
    gradient 0). Returns [tokens] nats in float32 (float64 for float64 logits). Beside the logits, only
    tiles are allocated, never a float32 copy of bfloat16 logits; the backward adds their gradient, in their
    dtype. Not differentiable twice. Zero tokens give an empty result that is attached to the graph.

    Raises ValueError: shapes or dtypes that do not fit, or, on the CPU only, a label of V or more
    (NaN elsewhere).
    """
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(
            f"logprob_gather: logits is {logits.dtype} {tuple(logits.shape)}; expected floating [tokens, V], "
            "flatten leading dimensions first"
        )
    _check_labels("logprob_gather", labels, num_tokens=logits.shape[0], vocabulary=logits.shape[1])
    return reference.logprob_gather(logits, labels)


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_logprob: hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not fit; "
            "expected [tokens, H] and [V, H]"
        )
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise ValueError(
            f"linear_logprob: hidden is {hidden.dtype}, weight {weight.dtype}; expected floating dtypes"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear_logprob: bias has shape {tuple(bias.shape)}; expected ({weight.shape[0]},)")
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"linear_logprob: softcap={softcap}; expected a number greater than 0, or None")


def _check_labels(where: str, labels: Tensor, *, num_tokens: int, vocabulary: int) -> None:
    if labels.shape != (num_tokens,) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"{where}: labels is {labels.dtype} {tuple(labels.shape)}; expected integers ({num_tokens},)"
        )
    if labels.device.type != "cpu" or num_tokens == 0:
        return
    largest = int(labels.max())
    if largest >= vocabulary:
        raise ValueError(
            f"{where}: label {largest} is outside the vocabulary; expected 0 to {vocabulary - 1}"
        )
