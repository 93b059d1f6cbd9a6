"""log sum_v p_v^2 of a token's distribution: how likely two draws from it agree.

What WPO weighs with: the log-prob of a token minus this is 0 where the token is as likely as the policy's own
samples are on average. A constant for the losses, hence without gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import native, operators
from .checks import check_head, check_logits
from .reference import SQUARES, TOTAL, WITH_SQUARES, accumulation_dtype


def log_collision_of(state: Tensor) -> Tensor:
    """[tokens] nats, from the state of a walk that took the squares along."""
    return state[SQUARES].log() - 2.0 * state[TOTAL].log()


@torch.no_grad()
def linear_log_collision(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """log sum_v softmax(logits)_v^2 under the LM head, [tokens] nats, detached.

    Arguments and dtypes as in linear_logprob; it costs one matrix product and no tensor above a tile. Where
    log-probs are wanted too, linear_scores gives both for one product.
    """
    check_head("linear_log_collision", hidden, weight, bias, softcap=softcap, scale=scale)
    labels = torch.full(hidden.shape[:1], -1, dtype=torch.long, device=hidden.device)
    use_native = native.is_taken("auto", hidden.device, accumulation_dtype(hidden, weight))
    scale, softcap = 1.0 if scale is None else scale, 0.0 if softcap is None else softcap
    _, state, _ = operators.linear_score(
        hidden, weight, bias, labels, scale, softcap, WITH_SQUARES, num_kept=0, use_native=use_native
    )
    return log_collision_of(state)


@torch.no_grad()
def log_collision(logits: Tensor) -> Tensor:
    """log sum_v softmax(logits)_v^2 of logits [tokens, V] that are already there, [tokens] nats, detached."""
    check_logits("log_collision", logits)
    labels = torch.full(logits.shape[:1], -1, dtype=torch.long, device=logits.device)
    use_native = native.is_taken("auto", logits.device, accumulation_dtype(logits))
    _, state = operators.gather_score(logits, labels, WITH_SQUARES, reuse_logits=False, use_native=use_native)
    return log_collision_of(state)
