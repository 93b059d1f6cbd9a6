"""The tile and what is done with one, in plain PyTorch: the row kernels that faster ones are held to.

A tile is a block of raw logits, tokens x consecutive vocabulary entries. Per token the state keeps a running
maximum, the sum of exponentials relative to it, and the label's logit (online log-sum-exp); its rows are
those of csrc/logprob.h.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Rows of the state, and bits of `statistics`: what beside the log-sum-exp is taken along.
MAXIMUM, TOTAL, LABEL_LOGIT, LABEL_SLOPE, SQUARES, LOGIT_SUM, SHRINK = range(7)
NUM_STATE_ROWS = 7
WITH_SQUARES, WITH_LOGIT_SUM = 1, 2


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows (tokens) and columns (vocabulary entries) of the largest block of logits that exists at a time."""

    tokens: int
    vocabulary: int


# On CPUs products of 512 tokens x 512-1024 entries are 4 % faster than wider ones, whose results leave the
# cache; a GPU wants fewer, larger products, and 2048 x 4096 float32 numbers (33 MB) still fit its L2 cache.
CPU_TILE = Tile(512, 1024)
ACCELERATOR_TILE = Tile(2048, 4096)


@dataclass(frozen=True, slots=True)
class LogitMap:
    """What a model does to hidden @ weight.T: softcap(scale * (raw + bias)), softcap(z) = cap * tanh(z /
    cap).
    """

    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0  # 0: none

    def at(self, columns: slice, dtype: torch.dtype) -> LogitMap:
        """The map of some vocabulary entries, its bias in the accumulation dtype."""
        return self if self.bias is None else replace(self, bias=self.bias[columns].to(dtype).contiguous())

    def apply_(self, raw: Tensor) -> Tensor:
        """The logits, written over `raw`."""
        if self.bias is not None:
            raw.add_(self.bias)
        if self.scale != 1.0:
            raw.mul_(self.scale)
        if self.softcap:
            raw.div_(self.softcap).tanh_().mul_(self.softcap)
        return raw

    def slope(self, logits: Tensor) -> Tensor | None:
        """d logits / d raw, from the logits; None where it is the scale alone."""
        if not self.softcap:
            return None
        return logits.div(self.softcap).square_().neg_().add_(1.0).mul_(self.scale)

    def chain_(self, gradient: Tensor, slope: Tensor | None) -> Tensor:
        """Turns a gradient by logits into one by raw outputs, in place."""
        if slope is not None:
            return gradient.mul_(slope)
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


def new_state(num_tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """State [rows above, tokens] before the first tile."""
    state = torch.zeros(NUM_STATE_ROWS, num_tokens, dtype=dtype, device=device)
    state[MAXIMUM] = -math.inf
    # NaN until its tile has been seen: a label beyond the vocabulary stays loud.
    state[LABEL_LOGIT] = math.nan
    return state


def label_logprobs(state: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label, from the state after the last tile; 0 where it is ignored."""
    # In this order: maximum + log(total) would lose the digits of log(total) to a large maximum.
    logprobs = (state[LABEL_LOGIT] - state[MAXIMUM]) - state[TOTAL].log()
    return logprobs.masked_fill_(labels < 0, 0.0)


def tile_lse_(
    logits: Tensor,
    labels: Tensor,
    first: int,
    state: Tensor,
    logit_map: LogitMap,
    *,
    weights: Tensor | None = None,
    statistics: int = 0,
    disposable: bool = False,
) -> None:
    """Takes a tile of raw logits [n, w], vocabulary entries first to first + w, into the state [rows, n].

    weights [n, w]: gets exp(logit - maximum) * d logit / d raw, relative to the maximum after this tile; may
    be the tile itself. disposable: the tile may be overwritten. Otherwise it is left as it is.
    """
    # A copy even where the dtype is right already: what follows works in place.
    values = logits if disposable else logits.to(state.dtype, copy=True)
    logit_map.apply_(values)
    column, inside = label_columns(labels, first, values.shape[1])
    found = values.gather(1, column).squeeze(1)
    state[LABEL_LOGIT] = torch.where(inside, found, state[LABEL_LOGIT])
    if statistics & WITH_LOGIT_SUM:
        state[LOGIT_SUM] += values.sum(dim=1)
    slope = None if weights is None else logit_map.slope(values)
    old = state[MAXIMUM]
    new = torch.maximum(old, values.amax(dim=1))
    # While all logits so far are -inf, (-inf) - (-inf) would be NaN; relative to 0 their exponentials are 0.
    shift = new.masked_fill(new == -math.inf, 0.0)
    shrink = (old - shift).exp_()
    values.sub_(shift.unsqueeze(1)).exp_()
    state[TOTAL] = state[TOTAL] * shrink + values.sum(dim=1)
    state[SHRINK] = shrink
    state[MAXIMUM] = new
    if statistics & WITH_SQUARES:
        state[SQUARES] = state[SQUARES] * shrink.square() + torch.linalg.vecdot(values, values)
    if weights is not None:
        steepness = logit_map.scale if slope is None else slope.gather(1, column).squeeze(1)
        state[LABEL_SLOPE] = torch.where(inside, steepness, state[LABEL_SLOPE])
        values = logit_map.chain_(values, slope)
        if weights is not values:
            weights.copy_(values)


def tile_grad_(
    logits: Tensor,
    labels: Tensor,
    first: int,
    state: Tensor,
    logit_map: LogitMap,
    *,
    grad: Tensor,
    out: Tensor,
) -> None:
    """out = grad * (onehot(label) - softmax) * d logit / d raw for a tile of raw logits, by a finished state.

    grad [n]; out [n, w] may be the tile itself. Ignored labels give rows of 0.
    """
    ignored = labels < 0
    values = logits if out is logits and out.dtype == state.dtype else logits.to(state.dtype, copy=True)
    logit_map.apply_(values)
    slope = logit_map.slope(values)
    # Relative to inf every exponential is 0.
    values.sub_(state[MAXIMUM].masked_fill(ignored, math.inf).unsqueeze(1)).exp_()
    values.mul_((-grad / state[TOTAL]).masked_fill_(ignored, 0.0).unsqueeze(1))
    column, inside = label_columns(labels, first, values.shape[1])
    values.scatter_add_(1, column, torch.where(inside, grad, 0.0).unsqueeze(1))
    values = logit_map.chain_(values, slope)
    if out is not values:
        out.copy_(values)


class HeadTile:
    """Some rows of the head, cast once for all the token chunks that pass by."""

    def __init__(self, weight: Tensor, logit_map: LogitMap, columns: slice, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.columns = columns
        self.weight = weight[columns] if _multiplies_into(weight, dtype) else weight[columns].to(dtype)
        self.logit_map = logit_map.at(columns, dtype)

    def operand(self, chunk: Tensor) -> Tensor:
        """Token states [n, H] as they enter this tile's products: as they are where the device sums half
        precision in float32, else in the accumulation dtype. Tiles of gradients enter in the same dtype.
        """
        return chunk if chunk.dtype == self.weight.dtype else chunk.to(self.dtype)

    def raw_logits(self, operand: Tensor, space: Tensor) -> Tensor:
        """operand @ weight.T [n, w] in the accumulation dtype, at the start of `space` (flat)."""
        shape = (operand.shape[0], self.weight.shape[0])
        out = space[: shape[0] * shape[1]].view(shape)
        return product(operand, self.weight.t(), out)


def accumulation_dtype(*operands: Tensor) -> torch.dtype:
    """float64 if any operand is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in operands) else torch.float32


def product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """out = left @ right, summed in out's dtype; half-precision operands stay as they are where the device
    can.
    """
    if left.dtype == right.dtype != out.dtype and _multiplies_into(left, out.dtype):
        return torch.ops.aten.mm.dtype_out(left, right, out.dtype, out=out)
    return torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)


def accumulate_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in total's dtype."""
    if left.dtype == right.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(product(left, right, torch.empty_like(total)))


def label_columns(labels: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """(column [n, 1] of each label within a vocabulary tile, clamped into it; whether it is inside [n])."""
    column = labels - first
    return column.clamp(0, width - 1).unsqueeze(1), (column >= 0) & (column < width)


def vocabulary_tiles(weight: Tensor) -> Iterator[slice]:
    """Slices over dim 0 of a head weight [V, H], one tile wide each."""
    return _slices(weight.shape[0], _tile_for(weight).vocabulary)


def token_chunks(hidden: Tensor) -> Iterator[slice]:
    """Slices over dim 0 of hidden states [tokens, H], one tile high each."""
    return _slices(hidden.shape[0], _tile_for(hidden).tokens)


def tile_elements(hidden: Tensor, weight: Tensor) -> int:
    """Elements of the largest tile that occurs."""
    tile = _tile_for(weight)
    return min(tile.tokens, hidden.shape[0]) * min(tile.vocabulary, weight.shape[0])


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


# It exists for CUDA half-precision operands only.
_MM_HAS_OUT_DTYPE = "dtype_out" in torch.ops.aten.mm.overloads()
