"""The public functions as torch operators, opaque to torch.compile: shapes for tracing, and gradients.

ds_align::linear_score            log-probs under a head, gradients by recomputed or kept logits
ds_align::linear_score_frozen     log-probs and d logprob / d hidden; no gradient of its own
ds_align::scale_back              the log-probs of linear_score_frozen, attached to hidden
ds_align::gather_score            log-probs of given logits
Their backward operators have no gradient: differentiating twice is an error.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import native, reference, tile_loop
from .reference import LogitMap, label_logprobs


def _row_kernels(use_native: bool) -> ModuleType:
    return native if use_native else reference


def _problem(
    hidden: Tensor, weight: Tensor, labels: Tensor, logit_map: LogitMap, *, use_native: bool
) -> tile_loop.Problem:
    return tile_loop.Problem(hidden, weight, labels, logit_map, _row_kernels(use_native))


def check_label_range(where: str, labels: Tensor, vocabulary: int) -> None:
    """Raises ValueError for a label beyond the vocabulary; only on CPUs, elsewhere it would synchronise."""
    if labels.device.type == "cpu" and labels.numel() and int(labels.max()) >= vocabulary:
        raise ValueError(
            f"{where}: label {int(labels.max())} is outside the vocabulary; expected 0 to {vocabulary - 1}"
        )


@torch.library.custom_op("ds_align::linear_score", mutates_args=())
def linear_score(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    softcap: float,
    statistics: int,
    num_kept: int,
    use_native: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs [tokens], state, raw logits [num_kept] for the backward)."""
    check_label_range("linear_logprob", labels, weight.shape[0])
    problem = _problem(hidden, weight, labels, LogitMap(bias, scale, softcap), use_native=use_native)
    # Autocast would round the products to half precision.
    with torch.autocast(hidden.device.type, enabled=False):
        state, kept = tile_loop.score(problem, statistics=statistics, num_kept=num_kept)
    return label_logprobs(state, labels), state, kept


@linear_score.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    softcap: float,
    statistics: int,
    num_kept: int,
    use_native: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, num_tokens = reference.accumulation_dtype(hidden, weight), hidden.shape[0]
    return (
        hidden.new_empty(num_tokens, dtype=dtype),
        hidden.new_empty((reference.NUM_STATE_ROWS, num_tokens), dtype=dtype),
        hidden.new_empty(num_kept, dtype=dtype),
    )


@torch.library.custom_op("ds_align::linear_score_backward", mutates_args=())
def linear_score_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    state: Tensor,
    kept: Tensor,
    scale: float,
    softcap: float,
    wanted: list[bool],
    use_native: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; an empty tensor for one that is not wanted."""
    problem = _problem(hidden, weight, labels, LogitMap(bias, scale, softcap), use_native=use_native)
    with torch.autocast(hidden.device.type, enabled=False):
        backward = tile_loop.Backward(problem, state, kept, grad.contiguous(), problem.new_space())
        result = backward.gradients((wanted[0], wanted[1], wanted[2]))
    return result.hidden.to(hidden.dtype), result.weight, result.bias


@linear_score_backward.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    state: Tensor,
    kept: Tensor,
    scale: float,
    softcap: float,
    wanted: list[bool],
    use_native: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if wanted[0] else (0,)),
        weight.new_empty(weight.shape if wanted[1] else (0,)),
        bias.new_empty(bias.shape) if bias is not None and wanted[2] else hidden.new_empty(0),
    )


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, bias, labels, ctx.scale, ctx.softcap, _, _, ctx.use_native = inputs
    _, state, kept = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(state, kept)
    # The parameter itself, never a view or a cast: under ZeRO-3 its storage is emptied after the forward
    # and gathered again before the backward.
    ctx.save_for_backward(hidden, weight, bias, labels, state, kept)


def _linear_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    wanted = list(ctx.needs_input_grad[:3])
    found = linear_score_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.softcap, wanted, ctx.use_native)
    return *(result if want else None for result, want in zip(found, wanted, strict=True)), *(None,) * 6


linear_score.register_autograd(_linear_backward, setup_context=_save_linear)


@torch.library.custom_op("ds_align::linear_score_frozen", mutates_args=())
def linear_score_frozen(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    softcap: float,
    statistics: int,
    use_native: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs [tokens], state, d logprob / d hidden [tokens, H] in the accumulation dtype)."""
    check_label_range("linear_logprob", labels, weight.shape[0])
    problem = _problem(hidden, weight, labels, LogitMap(bias, scale, softcap), use_native=use_native)
    with torch.autocast(hidden.device.type, enabled=False):
        state, derivative = tile_loop.score_with_derivative(problem, statistics=statistics)
    return label_logprobs(state, labels), state, derivative


@linear_score_frozen.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    softcap: float,
    statistics: int,
    use_native: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, num_tokens = reference.accumulation_dtype(hidden, weight), hidden.shape[0]
    return (
        hidden.new_empty(num_tokens, dtype=dtype),
        hidden.new_empty((reference.NUM_STATE_ROWS, num_tokens), dtype=dtype),
        hidden.new_empty(hidden.shape, dtype=dtype),
    )


@torch.library.custom_op("ds_align::scale_back", mutates_args=())
def scale_back(hidden: Tensor, logprobs: Tensor, derivative: Tensor) -> Tensor:
    """The log-probs, whose gradient by hidden is the derivative times what comes in."""
    return logprobs.clone()


@scale_back.register_fake
def _(hidden: Tensor, logprobs: Tensor, derivative: Tensor) -> Tensor:
    return torch.empty_like(logprobs)


@torch.library.custom_op("ds_align::scale_rows", mutates_args=())
def scale_rows(derivative: Tensor, grad: Tensor, like: Tensor) -> Tensor:
    """derivative * grad[:, None] in the dtype of `like`."""
    return (derivative * grad.unsqueeze(1)).to(like.dtype)


@scale_rows.register_fake
def _(derivative: Tensor, grad: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(derivative, dtype=like.dtype)


def _save_derivative(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    hidden, _, derivative = inputs
    # Of hidden the dtype alone is needed, and no more is kept.
    ctx.save_for_backward(derivative, hidden.new_empty(0))


def _scale_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    derivative, like = ctx.saved_tensors
    return scale_rows(derivative, grad, like), None, None


scale_back.register_autograd(_scale_backward, setup_context=_save_derivative)


@torch.library.custom_op("ds_align::gather_score", mutates_args=())
def gather_score(
    logits: Tensor, labels: Tensor, statistics: int, reuse_logits: bool, use_native: bool
) -> tuple[Tensor, Tensor]:
    """(logprobs [tokens], state)."""
    check_label_range("logprob_gather", labels, logits.shape[1])
    state = tile_loop.score_logits(logits, labels, _row_kernels(use_native), statistics=statistics)
    return label_logprobs(state, labels), state


@gather_score.register_fake
def _(
    logits: Tensor, labels: Tensor, statistics: int, reuse_logits: bool, use_native: bool
) -> tuple[Tensor, Tensor]:
    dtype, num_tokens = reference.accumulation_dtype(logits), logits.shape[0]
    return (
        logits.new_empty(num_tokens, dtype=dtype),
        logits.new_empty((reference.NUM_STATE_ROWS, num_tokens), dtype=dtype),
    )


@torch.library.custom_op("ds_align::gather_score_backward", mutates_args=())
def gather_score_backward(
    grad: Tensor, logits: Tensor, labels: Tensor, state: Tensor, use_native: bool
) -> Tensor:
    """The gradient of the logits, in their dtype."""
    out = logits.new_empty(logits.shape)
    tile_loop.write_logit_gradient_(
        out, logits, labels, state, grad=grad.contiguous(), row_kernels=_row_kernels(use_native)
    )
    return out


@gather_score_backward.register_fake
def _(grad: Tensor, logits: Tensor, labels: Tensor, state: Tensor, use_native: bool) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.custom_op("ds_align::gather_score_backward_", mutates_args=("logits",))
def gather_score_backward_(
    grad: Tensor, logits: Tensor, labels: Tensor, state: Tensor, use_native: bool
) -> None:
    """Writes the gradient of the logits over them."""
    tile_loop.write_logit_gradient_(
        logits, logits, labels, state, grad=grad.contiguous(), row_kernels=_row_kernels(use_native)
    )


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, labels, _, ctx.reuse_logits, ctx.use_native = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, labels, output[1])


def _gather_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    logits, labels, state = ctx.saved_tensors
    if not ctx.reuse_logits:
        return gather_score_backward(grad, logits, labels, state, ctx.use_native), *(None,) * 4
    ours = logits.detach()
    gather_score_backward_(grad, ours, labels, state, ctx.use_native)
    return ours, *(None,) * 4


gather_score.register_autograd(_gather_backward, setup_context=_save_gather)
