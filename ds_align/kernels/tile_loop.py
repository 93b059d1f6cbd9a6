"""The walk over tiles: token log-probs under a head, their gradients, and the same for given logits.

The vocabulary is walked in the outer loop and the tokens in the inner one, so that a tile of the weight is
read, cast and (in the backward) accumulated once. The matrix products are PyTorch's; what is done to a tile
of logits is a module of row kernels, `reference` or `native`. The forward makes the very same products with
the same tiles in every mode: its log-probs are bit-equal with and without gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from .reference import (
    LABEL_SLOPE,
    SHRINK,
    TOTAL,
    HeadTile,
    LogitMap,
    accumulate_product_,
    accumulation_dtype,
    new_state,
    product,
    tile_elements,
    token_chunks,
    vocabulary_tiles,
)


@dataclass(frozen=True, slots=True)
class Problem:
    """One call: hidden [tokens, H], weight [V, H], labels [tokens] int64, and the row kernels that do it."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    logit_map: LogitMap
    row_kernels: ModuleType

    @property
    def dtype(self) -> torch.dtype:
        """In which sums are taken and tiles of logits are held."""
        return accumulation_dtype(self.hidden, self.weight)

    def new_state(self) -> Tensor:
        """The state of every token before the first tile."""
        return new_state(self.hidden.shape[0], self.dtype, self.hidden.device)

    def new_space(self) -> Tensor:
        """Room for one tile of logits, flat."""
        return self.hidden.new_empty(tile_elements(self.hidden, self.weight), dtype=self.dtype)

    def head_tiles(self) -> Iterator[HeadTile]:
        """The head, tile by tile."""
        for columns in vocabulary_tiles(self.weight):
            yield HeadTile(self.weight, self.logit_map, columns, self.dtype)

    def kept_tile(self, kept: Tensor, rows: slice, columns: slice) -> Tensor | None:
        """The place of a tile among the kept logits, flat, one contiguous tile after the other; None for one
        that is beyond their end.
        """
        width = columns.stop - columns.start
        start = self.hidden.shape[0] * columns.start + rows.start * width
        end = start + (rows.stop - rows.start) * width
        return kept[start:end] if end <= kept.shape[0] else None


def score(problem: Problem, *, statistics: int = 0, num_kept: int = 0) -> tuple[Tensor, Tensor]:
    """(state [rows, tokens], raw logits [num_kept]): one product; as many tiles are kept as fit num_kept
    numbers.
    """
    labels, state, space = problem.labels, problem.new_state(), problem.new_space()
    kept = problem.hidden.new_empty(num_kept, dtype=problem.dtype)
    for tile in problem.head_tiles():
        for rows in token_chunks(problem.hidden):
            place = problem.kept_tile(kept, rows, tile.columns)
            raw = tile.raw_logits(tile.operand(problem.hidden[rows]), space if place is None else place)
            problem.row_kernels.tile_lse_(
                raw,
                labels[rows],
                tile.columns.start,
                state[:, rows],
                tile.logit_map,
                statistics=statistics,
                disposable=place is None,
            )
    return state, kept


def score_with_derivative(problem: Problem, *, statistics: int = 0) -> tuple[Tensor, Tensor]:
    """(state [rows, tokens], d logprob / d hidden [tokens, H]): two products.

    d logprob / d hidden = sum over v of (onehot - softmax)_v * slope_v * weight_v, the softmax part of which
    is carried along relative to the running maximum, as the log-sum-exp is.
    """
    labels, state, space = problem.labels, problem.new_state(), problem.new_space()
    expected = torch.zeros_like(problem.hidden, dtype=problem.dtype, memory_format=torch.contiguous_format)
    for tile in problem.head_tiles():
        for rows in token_chunks(problem.hidden):
            operand = tile.operand(problem.hidden[rows])
            raw = tile.raw_logits(operand, space)
            weights = raw if operand.dtype == raw.dtype else torch.empty_like(raw, dtype=operand.dtype)
            problem.row_kernels.tile_lse_(
                raw,
                labels[rows],
                tile.columns.start,
                state[:, rows],
                tile.logit_map,
                weights=weights,
                statistics=statistics,
                disposable=True,
            )
            expected[rows] *= state[SHRINK, rows].unsqueeze(1)
            accumulate_product_(expected[rows], weights, tile.weight)
    last_word = problem.weight.shape[0] - 1
    for rows in token_chunks(problem.hidden):
        label_row = problem.weight[labels[rows].clamp(0, last_word)].to(problem.dtype)
        label_row.mul_(state[LABEL_SLOPE, rows].unsqueeze(1))
        expected[rows] = label_row.sub_(expected[rows].div_(state[TOTAL, rows].unsqueeze(1)))
    return state, expected.masked_fill_((labels < 0).unsqueeze(1), 0.0)


@dataclass(frozen=True, slots=True)
class Gradients:
    """Gradients of hidden (in the accumulation dtype), weight and bias; empty where not wanted."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class Backward:
    """The gradients of sum(grad * logprob): one product for each matrix, and one for the logits not kept."""

    problem: Problem
    state: Tensor
    kept: Tensor
    grad: Tensor
    space: Tensor

    def gradients(self, wanted: tuple[bool, bool, bool]) -> Gradients:
        """wanted: whether those of hidden, weight and bias are."""
        want_hidden, want_weight, want_bias = wanted
        hidden, weight, bias = self.problem.hidden, self.problem.weight, self.problem.logit_map.bias
        result = Gradients(
            torch.zeros(hidden.shape if want_hidden else 0, dtype=self.problem.dtype, device=hidden.device),
            torch.empty(weight.shape if want_weight else 0, dtype=weight.dtype, device=weight.device),
            bias.new_empty(bias.shape) if want_bias else hidden.new_empty(0),
        )
        for tile in self.problem.head_tiles():
            weight_sum = (
                _SumOfProducts(result.weight[tile.columns], self.problem.dtype) if want_weight else None
            )
            bias_sum = self.state.new_zeros(tile.weight.shape[0]) if want_bias else None
            for rows in token_chunks(hidden):
                operand = tile.operand(hidden[rows])
                delta = self._delta(tile, rows, operand)
                if want_bias:
                    bias_sum += delta.sum(dim=0, dtype=self.problem.dtype)
                if want_hidden:
                    accumulate_product_(result.hidden[rows], delta, tile.weight)
                if want_weight:
                    weight_sum.add_(delta.t(), operand)
            if want_bias:
                result.bias[tile.columns] = bias_sum
            if want_weight:
                weight_sum.finish_()
        return result

    def _delta(self, tile: HeadTile, rows: slice, operand: Tensor) -> Tensor:
        """The gradient of a tile of raw logits, in the dtype in which it enters its products."""
        place = self.problem.kept_tile(self.kept, rows, tile.columns)
        if place is None:
            raw = delta = tile.raw_logits(operand, self.space)
        else:
            raw = place.view(operand.shape[0], tile.weight.shape[0])
            # Not over the kept logits: a second backward may need them.
            delta = self.space[: raw.numel()].view_as(raw)
        if operand.dtype != delta.dtype:
            delta = torch.empty_like(raw, dtype=operand.dtype)
        self.problem.row_kernels.tile_grad_(
            raw,
            self.problem.labels[rows],
            tile.columns.start,
            self.state[:, rows],
            tile.logit_map,
            grad=self.grad[rows],
            out=delta,
        )
        return delta


class _SumOfProducts:
    """A sum of matrix products in the accumulation dtype, written to `target`, of any dtype, at the end."""

    def __init__(self, target: Tensor, dtype: torch.dtype) -> None:
        self.target = target
        self.total = target if target.dtype == dtype else torch.empty_like(target, dtype=dtype)
        self.is_empty = True

    def add_(self, left: Tensor, right: Tensor) -> None:
        # The first product is written, not added: that saves a pass over fresh memory.
        if self.is_empty:
            product(left, right, self.total)
            self.is_empty = False
        else:
            accumulate_product_(self.total, left, right)

    def finish_(self) -> None:
        if self.is_empty:
            self.target.zero_()
        elif self.total is not self.target:
            self.target.copy_(self.total)


def score_logits(logits: Tensor, labels: Tensor, row_kernels: ModuleType, *, statistics: int = 0) -> Tensor:
    """State [rows, tokens] of logits [tokens, V] that are already there."""
    state = new_state(logits.shape[0], accumulation_dtype(logits), logits.device)
    for rows, columns in row_kernels.logit_blocks(logits):
        row_kernels.tile_lse_(
            logits[rows, columns],
            labels[rows],
            columns.start,
            state[:, rows],
            LogitMap(),
            statistics=statistics,
        )
    return state


def write_logit_gradient_(
    out: Tensor, logits: Tensor, labels: Tensor, state: Tensor, *, grad: Tensor, row_kernels: ModuleType
) -> None:
    """out = d sum(grad * logprob) / d logits, tile by tile; `out` may be the logits themselves."""
    for rows, columns in row_kernels.logit_blocks(logits):
        block = logits[rows, columns]
        row_kernels.tile_grad_(
            block,
            labels[rows],
            columns.start,
            state[:, rows],
            LogitMap(),
            grad=grad[rows],
            out=block if out is logits else out[rows, columns],
        )
