"""The floor of a step: the bare matrix products of its useful tokens, and nothing else.

Per layer the linear layers over all tokens of a pack, and attention over its segments, block by block, so
that products with keys that no query of a block sees are left out; at the end the head over the scored
tokens. A trained pack needs three products where a scored one needs one: the result, and the gradients of
both factors.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from ds_align.batch import PackedBatch

# Of queries: small enough to leave most of the unseen half out, large enough for an efficient product.
BLOCK = 128


class Pack(NamedTuple):
    """What of a pack decides its products. segments: (queries, keys) of each, causal, bottom right."""

    num_tokens: int
    num_scored: int
    segments: list[tuple[int, int]]
    trained: bool

    @classmethod
    def of(cls, batch: PackedBatch, *, trained: bool) -> Pack:
        """Of a packed batch; padded rows count with all their columns."""
        if batch.segments is None:
            rows, width = batch.input_ids.shape
            segments = [(width, width)] * rows
        else:
            segments = [
                (segment.query[1] - segment.query[0], sum(stop - start for start, stop in segment.keys))
                for segment in batch.segments
            ]
        return cls(batch.input_ids.numel(), len(batch.labels), segments, trained)


class _Products:
    """Runs products on memory that is there already; while it rehearses it only takes the memory."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.rehearses = True
        self._options = {"dtype": dtype, "device": device}
        self._memory: dict[str, torch.Tensor] = {}

    def _view(self, name: str, *shape: int) -> torch.Tensor:
        size = torch.Size(shape).numel()
        if name not in self._memory or self._memory[name].numel() < size:
            assert self.rehearses, f"{name} was not rehearsed with {shape}"
            self._memory[name] = torch.randn(size, **self._options)
        return self._memory[name][:size].view(shape)

    def _multiply(self, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
        if not self.rehearses:
            (torch.mm if out.dim() == 2 else torch.bmm)(left, right, out=out)

    def linear(self, rows: int, wide_in: int, wide_out: int, *, trained: bool) -> None:
        """rows x [in, out]."""
        inputs, outputs = self._view("inputs", rows, wide_in), self._view("outputs", rows, wide_out)
        weight = self._view("weight", wide_out, wide_in)
        self._multiply(inputs, weight.T, outputs)
        if trained:
            self._multiply(outputs, weight, self._view("inputs gradient", rows, wide_in))
            self._multiply(outputs.T, inputs, self._view("weight gradient", wide_out, wide_in))

    def attention(self, shape: tuple[int, int, int], queries: int, keys: int, *, trained: bool) -> None:
        """Scores and shares of one block; shape: (heads of keys, queries' heads to each, width of a head)."""
        heads, groups, width = shape
        rows = groups * queries
        query, key = self._view("query", heads, rows, width), self._view("key", heads, keys, width)
        value, output = self._view("value", heads, keys, width), self._view("output", heads, rows, width)
        scores = self._view("scores", heads, rows, keys)
        self._multiply(query, key.mT, scores)
        self._multiply(scores, value, output)
        if trained:
            self._multiply(scores.mT, output, self._view("value gradient", heads, keys, width))
            self._multiply(output, value.mT, self._view("scores gradient", heads, rows, keys))
            self._multiply(scores, key, self._view("query gradient", heads, rows, width))
            self._multiply(scores.mT, query, self._view("key gradient", heads, keys, width))


def run_pack(products: _Products, pack: Pack, sizes: dict[str, int]) -> None:
    """All products of one pack; sizes: those of the model, as transformers names them."""
    hidden, between = sizes["hidden_size"], sizes["intermediate_size"]
    heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    width = hidden // heads
    linears = [(hidden, hidden)] * 2 + [(hidden, kv_heads * width)] * 2 + [(hidden, between)] * 2
    linears.append((between, hidden))
    for _ in range(sizes["num_hidden_layers"]):
        for wide_in, wide_out in linears:
            products.linear(pack.num_tokens, wide_in, wide_out, trained=pack.trained)
        for queries, keys in pack.segments:
            for start in range(0, queries, BLOCK):
                stop = min(queries, start + BLOCK)
                seen = keys - queries + stop
                products.attention(
                    (kv_heads, heads // kv_heads, width), stop - start, seen, trained=pack.trained
                )
    if pack.num_scored:
        products.linear(pack.num_scored, hidden, sizes["vocab_size"], trained=pack.trained)


def floor_seconds(
    steps: list[list[Pack]], sizes: dict[str, int], *, dtype: torch.dtype, device: str
) -> float:
    """Mean over the steps: CPU seconds of the process, or seconds of the device."""
    products = _Products(dtype, device)
    packs = [pack for step in steps for pack in step]
    for pack in packs:
        run_pack(products, pack, sizes)
    products.rehearses = False
    run_pack(products, packs[0], sizes)
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    started = clock()
    for pack in packs:
        run_pack(products, pack, sizes)
    if device == "cuda":
        torch.cuda.synchronize()
    return (clock() - started) / len(steps)
