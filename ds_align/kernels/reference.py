"""Label log-probabilities in plain PyTorch, one tile of logits at a time: what faster kernels are held to.

The vocabulary is walked in the outer loop and the tokens in the inner one, so that a tile of the weight is
read, cast and (in the backward) accumulated once. Per token the forward keeps a running maximum, the sum of
exponentials relative to it, and the label's logit (online log-sum-exp).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows (tokens) and columns (vocabulary entries) of the largest block of logits that exists at a time."""

    tokens: int
    vocabulary: int


# On CPUs 256-512 tokens x 1024-4096 entries are equally fast; a GPU wants fewer, larger products, and
# 2048 x 4096 float32 numbers (33 MB) still fit its L2 cache.
CPU_TILE = Tile(512, 4096)
ACCELERATOR_TILE = Tile(2048, 4096)


@dataclass(frozen=True, slots=True)
class LogitMap:
    """What a model does to its head's output: softcap(scale * raw), softcap(z) = cap * tanh(z / cap)."""

    scale: float | None = None
    softcap: float | None = None

    def apply_(self, raw: Tensor) -> Tensor:
        """The logits, written over `raw`."""
        if self.scale is not None:
            raw.mul_(self.scale)
        if self.softcap is not None:
            raw.div_(self.softcap).tanh_().mul_(self.softcap)
        return raw

    def slope(self, logits: Tensor) -> Tensor | None:
        """d logits / d raw without the scale, from the logits: 1 - (logits / cap)^2; None where it is 1."""
        if self.softcap is None:
            return None
        return logits.div(self.softcap).square_().neg_().add_(1.0)

    def chain_(self, gradient: Tensor, slope: Tensor | None) -> Tensor:
        """Turns a gradient by logits into one by raw outputs, in place."""
        if slope is not None:
            gradient.mul_(slope)
        if self.scale is not None:
            gradient.mul_(self.scale)
        return gradient


class OnlineLogSumExp:
    """Running log-sum-exp and label logit of every token while the vocabulary passes by in tiles."""

    def __init__(self, labels: Tensor, dtype: torch.dtype) -> None:
        num_tokens = labels.shape[0]
        self.labels = labels
        self.maximum = torch.full((num_tokens,), -math.inf, dtype=dtype, device=labels.device)
        self.total = torch.zeros(num_tokens, dtype=dtype, device=labels.device)
        # NaN until its tile has been seen: a label beyond the vocabulary stays loud.
        self.label_logit = torch.full((num_tokens,), math.nan, dtype=dtype, device=labels.device)

    def update_(self, rows: slice, columns: slice, logits: Tensor) -> Tensor:
        """Takes in a tile. Overwrites `logits` with exp(logits - maximum) and returns the factor [rows] by
        which sums that were taken relative to the old maximum shrink.
        """
        column, inside = label_columns(self.labels[rows], columns)
        found = logits.gather(1, column).squeeze(1)
        self.label_logit[rows] = torch.where(inside, found, self.label_logit[rows])
        old = self.maximum[rows]
        new = torch.maximum(old, logits.amax(dim=1))
        # While all logits so far are -inf, (-inf) - (-inf) would be NaN;
        # relative to 0 their exponentials are 0.
        shift = new.masked_fill(new == -math.inf, 0.0)
        shrink = (old - shift).exp_()
        logits.sub_(shift.unsqueeze(1)).exp_()
        self.total[rows] = self.total[rows] * shrink + logits.sum(dim=1)
        self.maximum[rows] = new
        return shrink

    def finish_(self) -> Tensor:
        """Label log-probabilities [tokens]. Leaves maximum and total such that exp(logit - maximum) / total
        is the softmax of a scored token and 0 for an ignored one.
        """
        ignored = self.labels < 0
        # In this order: maximum + log(total) would lose the digits of log(total) to a large maximum.
        logprobs = (self.label_logit - self.maximum) - self.total.log()
        self.maximum.masked_fill_(ignored, math.inf)
        self.total.masked_fill_(ignored, 1.0)
        return logprobs.masked_fill_(ignored, 0.0)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """See ds_align.kernels.linear_logprob, which checks the inputs and chooses the implementation."""
    logit_map = LogitMap(scale, softcap)
    head_is_frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    if head_is_frozen and hidden.requires_grad and torch.is_grad_enabled():
        return _FrozenHeadLogprob.apply(hidden, weight, bias, labels, logit_map)
    return _LinearLogprob.apply(hidden, weight, bias, labels, logit_map)


def logprob_gather(logits: Tensor, labels: Tensor) -> Tensor:
    """See ds_align.kernels.logprob_gather, which checks the inputs."""
    return _LogprobGather.apply(logits, labels)


def _without_autocast(method: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a forward or backward outside autocast, which would round the products to half precision."""

    @functools.wraps(method)
    def wrapped(ctx: Any, first: Tensor, *rest: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return method(ctx, first, *rest)

    return wrapped


class _LinearLogprob(torch.autograd.Function):
    """Head with recompute: forward 1 product, backward 1 to 3, for the gradients that are asked for."""

    @staticmethod
    @_without_autocast
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, logit_map: LogitMap
    ) -> Tensor:
        online = OnlineLogSumExp(labels, accumulation_dtype(hidden, weight))
        for columns in vocabulary_tiles(weight):
            tile = HeadTile(weight, bias, columns, online.maximum.dtype)
            for rows in token_chunks(hidden):
                online.update_(rows, columns, logit_map.apply_(tile.raw_logits(hidden[rows])))
        logprobs = online.finish_()
        # The parameter itself, never a view or a cast: under ZeRO-3 its storage is emptied after the forward
        # and gathered again before the backward.
        ctx.save_for_backward(hidden, weight, bias, labels, online.maximum, online.total)
        ctx.logit_map = logit_map
        return logprobs

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, maximum, total = ctx.saved_tensors
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        dtype = total.dtype
        scaled = grad / total
        grad_hidden = torch.zeros_like(hidden, dtype=dtype) if want_hidden else None
        grad_weight = torch.empty_like(weight) if want_weight else None
        grad_bias = torch.empty_like(bias) if want_bias else None
        for columns in vocabulary_tiles(weight):
            tile = HeadTile(weight, bias, columns, dtype)
            sum_weight = torch.zeros_like(weight[columns], dtype=dtype) if want_weight else None
            sum_bias = torch.zeros_like(bias[columns], dtype=dtype) if want_bias else None
            for rows in token_chunks(hidden):
                chunk = hidden[rows]
                logits = ctx.logit_map.apply_(tile.raw_logits(chunk))
                slope = ctx.logit_map.slope(logits)
                logits.sub_(maximum[rows].unsqueeze(1)).exp_().mul_(-scaled[rows].unsqueeze(1))
                delta = ctx.logit_map.chain_(add_at_label_(logits, grad[rows], labels[rows], columns), slope)
                if want_bias:
                    sum_bias += delta.sum(dim=0)
                delta = delta.to(tile.operand_dtype(chunk))
                if want_hidden:
                    accumulate_product_(grad_hidden[rows], delta, tile.weight)
                if want_weight:
                    accumulate_product_(sum_weight, delta.t(), chunk)
            if want_weight:
                grad_weight[columns] = sum_weight
            if want_bias:
                grad_bias[columns] = sum_bias
        return (grad_hidden.to(hidden.dtype) if want_hidden else None), grad_weight, grad_bias, None, None


class _FrozenHeadLogprob(torch.autograd.Function):
    """Frozen head: the forward also makes d logprob / d hidden, the backward multiplies it by the incoming
    gradient.

    d logprob / d hidden = sum over v of (onehot - softmax)_v * slope_v * scale * weight_v, the softmax part
    of which is carried along relative to the running maximum, as the log-sum-exp is.
    """

    @staticmethod
    @_without_autocast
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, logit_map: LogitMap
    ) -> Tensor:
        dtype = accumulation_dtype(hidden, weight)
        online = OnlineLogSumExp(labels, dtype)
        expected = torch.zeros_like(hidden, dtype=dtype)
        label_slope = torch.zeros_like(online.total)
        for columns in vocabulary_tiles(weight):
            tile = HeadTile(weight, bias, columns, dtype)
            for rows in token_chunks(hidden):
                chunk = hidden[rows]
                logits = logit_map.apply_(tile.raw_logits(chunk))
                slope = logit_map.slope(logits)
                shrink = online.update_(rows, columns, logits)
                if slope is not None:
                    column, inside = label_columns(labels[rows], columns)
                    found = slope.gather(1, column).squeeze(1)
                    label_slope[rows] = torch.where(inside, found, label_slope[rows])
                    logits.mul_(slope)
                expected[rows] *= shrink.unsqueeze(1)
                accumulate_product_(expected[rows], logits.to(tile.operand_dtype(chunk)), tile.weight)
        logprobs = online.finish_()
        for rows in token_chunks(hidden):
            label_row = weight[labels[rows].clamp(0, weight.shape[0] - 1)].to(dtype)
            if logit_map.softcap is not None:
                label_row.mul_(label_slope[rows].unsqueeze(1))
            expected[rows] = label_row.sub_(expected[rows] / online.total[rows].unsqueeze(1))
        expected.masked_fill_((labels < 0).unsqueeze(1), 0.0)
        if logit_map.scale is not None:
            expected.mul_(logit_map.scale)
        ctx.save_for_backward(expected)
        ctx.hidden_dtype = hidden.dtype
        return logprobs

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (derivative,) = ctx.saved_tensors
        return (derivative * grad.unsqueeze(1)).to(ctx.hidden_dtype), None, None, None, None


class _LogprobGather(torch.autograd.Function):
    """Label log-probabilities of given logits; forward and backward each read them once or twice, tile
    by tile.
    """

    @staticmethod
    @_without_autocast
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        online = OnlineLogSumExp(labels, accumulation_dtype(logits))
        for rows, columns in logit_blocks(logits):
            # A copy even where the dtype is right already: the tile is overwritten.
            online.update_(rows, columns, logits[rows, columns].to(online.total.dtype, copy=True))
        logprobs = online.finish_()
        ctx.save_for_backward(logits, labels, online.maximum, online.total)
        return logprobs

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, maximum, total = ctx.saved_tensors
        scaled = grad / total
        grad_logits = torch.empty_like(logits)
        for rows, columns in logit_blocks(logits):
            tile = logits[rows, columns].to(total.dtype, copy=True)
            tile.sub_(maximum[rows].unsqueeze(1)).exp_().mul_(-scaled[rows].unsqueeze(1))
            grad_logits[rows, columns] = add_at_label_(tile, grad[rows], labels[rows], columns)
        return grad_logits, None


class HeadTile:
    """Some rows of the head, cast once for all the token chunks that pass by."""

    def __init__(self, weight: Tensor, bias: Tensor | None, columns: slice, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.weight = weight[columns] if _multiplies_into(weight, dtype) else weight[columns].to(dtype)
        self.bias = None if bias is None else bias[columns].to(dtype)

    def operand_dtype(self, chunk: Tensor) -> torch.dtype:
        """dtype in which a tile of gradients enters its products: the model's where the device sums in
        float32.
        """
        return chunk.dtype if chunk.dtype == self.weight.dtype else self.dtype

    def raw_logits(self, chunk: Tensor) -> Tensor:
        """chunk @ weight.T + bias in the accumulation dtype, a new tensor."""
        raw = product(chunk, self.weight.t(), self.dtype)
        return raw if self.bias is None else raw.add_(self.bias)


def accumulation_dtype(*operands: Tensor) -> torch.dtype:
    """float64 if any operand is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in operands) else torch.float32


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right, summed and returned in `dtype`; half-precision operands stay as they are where the
    device can.
    """
    if left.dtype == right.dtype and left.dtype != dtype and _multiplies_into(left, dtype):
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left.to(dtype), right.to(dtype))


def accumulate_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in total's dtype."""
    if left.dtype == right.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(product(left, right, total.dtype))


def label_columns(labels: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """(column [n, 1] of each label within a vocabulary tile, clamped into it; whether it is inside [n])."""
    column = labels.long() - columns.start
    width = columns.stop - columns.start
    return column.clamp(0, width - 1).unsqueeze(1), (column >= 0) & (column < width)


def add_at_label_(tile: Tensor, values: Tensor, labels: Tensor, columns: slice) -> Tensor:
    """Adds values[i] at token i's label where that label lies in this vocabulary tile; returns the tile."""
    column, inside = label_columns(labels, columns)
    return tile.scatter_add_(1, column, torch.where(inside, values, 0.0).unsqueeze(1))


def vocabulary_tiles(weight: Tensor) -> Iterator[slice]:
    """Slices over dim 0 of a head weight [V, H], one tile wide each."""
    return _slices(weight.shape[0], _tile_for(weight).vocabulary)


def token_chunks(hidden: Tensor) -> Iterator[slice]:
    """Slices over dim 0 of hidden states [tokens, H], one tile high each."""
    return _slices(hidden.shape[0], _tile_for(hidden).tokens)


def logit_blocks(logits: Tensor) -> Iterator[tuple[slice, slice]]:
    """(rows, columns) of each tile of logits [tokens, V]."""
    for rows in token_chunks(logits):
        for columns in _slices(logits.shape[1], _tile_for(logits).vocabulary):
            yield rows, columns


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _tile_for(tensor: Tensor) -> Tile:
    return CPU_TILE if tensor.device.type == "cpu" else ACCELERATOR_TILE


def _multiplies_into(operand: Tensor, dtype: torch.dtype) -> bool:
    if operand.dtype == dtype:
        return True
    return operand.is_cuda and operand.dtype in (torch.bfloat16, torch.float16) and _MM_HAS_OUT_DTYPE


# torch.mm(..., out_dtype=float32) exists for CUDA half-precision operands only.
_MM_HAS_OUT_DTYPE = "dtype" in torch.ops.aten.mm.overloads()
