"""How the routers of a mixture-of-experts model spread the tokens of a pack, for its load-balancing loss.

The loss of a global batch is E sum_e f_e p_e (Switch Transformer, arXiv:2101.03961, eq. 4 to 6), over the
tokens of all layers together as transformers takes it: f_e is the share of tokens that choose expert e among
their top k, p_e its mean router probability, E the number of experts. f_e has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_NUM_EXPERTS = ("num_experts", "num_local_experts")


def num_experts(config: object) -> int:
    """Experts of a model from its transformers config; 0 where it has none."""
    text_config = config.get_text_config()
    return next((getattr(text_config, name) for name in _NUM_EXPERTS if hasattr(text_config, name)), 0)


def router_sums(
    router_logits: Sequence[torch.Tensor], token_weights: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(probabilities [E], load [E + 1]) summed over layers and weighted tokens, float32.

    router_logits: [tokens, E] of each layer. token_weights: [tokens], how often each token counts.
    probabilities: sum of the router probabilities, with gradient. load: how often each expert is among the
    top k, and last the weight of all tokens, detached.
    """
    weights = token_weights.flatten().float()
    probabilities, load = 0.0, 0.0
    for logits in router_logits:
        routing = logits.reshape(len(weights), -1).float().softmax(dim=-1)
        chosen = routing.topk(top_k, dim=-1).indices
        counts = torch.zeros(routing.shape[-1], device=weights.device)
        counts.scatter_add_(0, chosen.flatten(), weights.repeat_interleave(top_k))
        probabilities = probabilities + weights @ routing
        load = load + torch.cat([counts, weights.sum().reshape(1)])
    return probabilities, load
