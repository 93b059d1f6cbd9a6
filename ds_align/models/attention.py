"""Attention over the segments of a pack, as an attention function of transformers.

The plan travels as a keyword from PolicyModel through the decoder to every layer's attention. Without it the
layers would see one long causal row, and from position ids alone transformers would cut the second completion
off from its prompt: a missing plan is an error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from ds_align.batch import Segment

PACKED_ATTENTION = "ds_align_packed"

# Architectures whose layers are plain causal attention through transformers' interface: each is held
# against its padded forward in the tests. Others fall back to padded rows.
# A mixture of experts routes each token by itself, so its packs are exact too.
PACKABLE_MODEL_TYPES = frozenset(
    {"llama", "qwen2", "qwen3", "mistral", "gemma", "phi3", "olmo2", "granite"}
    | {"mixtral", "qwen2_moe", "qwen3_moe"}
)


class AttentionPlan:
    """The segments of one pack, and the masks of its later completions, made once for all layers."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self.segments = tuple(segments)
        self._masks: dict[tuple[int, int], torch.Tensor] = {}
        self._device = device

    def mask(self, num_queries: int, num_keys: int) -> torch.Tensor:
        """Causal, aligned bottom right: bool [num_queries, num_keys], True where a query sees a key."""
        key = (num_queries, num_keys)
        if key not in self._masks:
            ones = torch.ones(key, dtype=torch.bool, device=self._device)
            self._masks[key] = ones.tril(num_keys - num_queries)
        return self._masks[key]


def packed_attention(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    plan: AttentionPlan | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention of each segment to its key ranges.

    query: [1, heads, tokens, head_dim]; key, value: [1, kv_heads, tokens, head_dim].
    Returns [1, tokens, heads, head_dim], as transformers expects it.
    Raises AssertionError for a missing plan and for variants that the plan does not describe.
    """
    assert plan is not None, "packed attention was called without its plan"
    assert attention_mask is None, "packed attention does not take a mask beside its plan"
    for name in ("softcap", "s_aux"):
        assert kwargs.get(name) is None, f"packed attention does not know {name}"
    grouped = query.shape[1] != key.shape[1]
    pieces = []
    for segment in plan.segments:
        start, stop = segment.query
        part = query[:, :, start:stop]
        keys = _gather(key, segment.keys)
        square = keys.shape[2] == stop - start
        pieces.append(
            F.scaled_dot_product_attention(
                part,
                keys,
                _gather(value, segment.keys),
                attn_mask=None if square else plan.mask(stop - start, keys.shape[2]),
                is_causal=square,
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=grouped,
            )
        )
    output = torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]
    return output.transpose(1, 2), None


def _gather(states: torch.Tensor, ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
    parts = [states[:, :, start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _no_mask(*args: object, **kwargs: object) -> None:
    """The plan is the mask: transformers must not build one of [tokens, tokens]."""


def register_packed_attention() -> None:
    """Makes PACKED_ATTENTION a name that set_attn_implementation accepts; safe to call again."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, _no_mask)


def unpackable_reason(config: object, max_length: int) -> str | None:
    """Why a model cannot run packed, or None if it can.

    config: a transformers config. max_length: the longest prompt with a completion; a sliding window that is
    at least as long never cuts anything.
    """
    model_type = getattr(config, "model_type", "?")
    if model_type not in PACKABLE_MODEL_TYPES:
        return f"architecture {model_type!r} is not known to run packed"
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    slides = "sliding_attention" in layer_types if layer_types else window is not None
    if slides and window is not None and window < max_length:
        return f"its sliding window of {window} tokens is shorter than max_length {max_length}"
    return None
