"""log sum_v p_v^2 of a token's distribution, tile by tile: how likely two draws from it agree.

What WPO weighs with: the log-prob of a token minus this is 0 where the token is as likely as the policy's own
samples are on average. A constant for the losses, hence without gradient.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .reference import (
    HeadTile,
    LogitMap,
    OnlineLogSumExp,
    accumulation_dtype,
    logit_blocks,
    token_chunks,
    vocabulary_tiles,
)


@torch.no_grad()
def linear_log_collision(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """log sum_v softmax(logits)_v^2 under the LM head, [tokens] nats, detached.

    Arguments and dtypes as in linear_logprob; it costs one more matrix product and no tensor above a tile.
    """
    logit_map = LogitMap(scale, softcap)
    dtype = accumulation_dtype(hidden, weight)

    def tiles() -> Iterator[tuple[slice, slice, Tensor]]:
        for columns in vocabulary_tiles(weight):
            tile = HeadTile(weight, bias, columns, dtype)
            for rows in token_chunks(hidden):
                yield rows, columns, logit_map.apply_(tile.raw_logits(hidden[rows]))

    with torch.autocast(hidden.device.type, enabled=False):
        return _log_collision(tiles(), hidden.shape[0], dtype, hidden.device)


@torch.no_grad()
def log_collision(logits: Tensor) -> Tensor:
    """log sum_v softmax(logits)_v^2 of logits [tokens, V] that are already there, [tokens] nats, detached."""
    dtype = accumulation_dtype(logits)
    tiles = (
        (rows, columns, logits[rows, columns].to(dtype, copy=True)) for rows, columns in logit_blocks(logits)
    )
    return _log_collision(tiles, logits.shape[0], dtype, logits.device)


def _log_collision(
    tiles: Iterator[tuple[slice, slice, Tensor]], num_tokens: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    no_labels = torch.full((num_tokens,), -1, dtype=torch.long, device=device)
    online = OnlineLogSumExp(no_labels, dtype)
    squares = torch.zeros(num_tokens, dtype=dtype, device=device)
    for rows, columns, logits in tiles:
        shrink = online.update_(rows, columns, logits)
        squares[rows] = squares[rows] * shrink.square() + logits.square_().sum(dim=1)
    return squares.log() - 2.0 * online.total.log()
