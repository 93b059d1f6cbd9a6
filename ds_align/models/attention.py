"""Attention over the segments of a pack, as an attention function of transformers.

The plan travels as a keyword from PolicyModel through the decoder to every layer's attention. Without it the
layers would see one long causal row, and from position ids alone transformers would cut the second completion
off from its prompt: a missing plan is an error.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ds_align.batch import Segment

PACKED_ATTENTION = "ds_align_packed"

# Architectures whose layers are causal attention through transformers' interface, full or with a sliding
# window: each is held against single rows in the tests. Others fall back to padded rows.
# A mixture of experts routes each token by itself, so its packs are exact too.
PACKABLE_MODEL_TYPES = frozenset(
    {"llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "granite", "cohere", "cohere2"}
    | {"mistral", "ministral", "ministral3", "olmo2", "olmo3", "smollm3", "starcoder2"}
    | {"mixtral", "qwen2_moe", "qwen3_moe"}
)
# Windows are cut into blocks of at least this many queries: smaller ones only cost calls.
_MIN_BLOCK = 256
_PACKABLE_LAYERS = frozenset({"full_attention", "sliding_attention"})
_LAYER_REASONS = {
    "linear_attention": "would carry their state from one sequence of a pack into the next",
    "hybrid": "would carry their state from one sequence of a pack into the next",
    "chunked_attention": "cut the pack into chunks, not its sequences",
}
_TYPE_REASONS = {
    "gpt_oss": "its attention sinks are not computed segment by segment",
    "gemma3": "models of text and images are not known to run packed",
}


class AttentionPlan:
    """The segments of one pack, and the masks that they need, made once for all layers.

    max_scores: the most attention scores (heads * queries * keys) that soft-capped attention holds at once.
    """

    def __init__(
        self, segments: Sequence[Segment], device: torch.device, *, max_scores: int = 1 << 24
    ) -> None:
        self.segments = tuple(segments)
        self.sizes = [stop - start for start, stop in (segment.query for segment in self.segments)]
        self.key_places = [
            [place for span in segment.keys for place in self._places(*span)] for segment in self.segments
        ]
        self.max_scores = max_scores
        self._masks: dict[tuple[int, int, int | None], torch.Tensor] = {}
        self._device = device

    def _places(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """A key range as (segment, first, end) of the segments that it lies in, counted within each."""
        starts = [segment.query[0] for segment in self.segments]
        for number in range(bisect_right(starts, start) - 1, bisect_left(starts, stop)):
            first = starts[number]
            yield number, max(start - first, 0), min(stop - first, self.sizes[number])

    def mask(self, num_queries: int, num_keys: int, window: int | None = None) -> torch.Tensor:
        """Causal, aligned bottom right: bool [num_queries, num_keys], True where a query sees a key.

        window: a query sees itself and the window - 1 keys before it.
        """
        key = (num_queries, num_keys, window)
        if key not in self._masks:
            diagonal = num_keys - num_queries
            ones = torch.ones(key[:2], dtype=torch.bool, device=self._device).tril(diagonal)
            self._masks[key] = ones if window is None else ones.triu(diagonal - window + 1)
        return self._masks[key]


@dataclass(frozen=True, slots=True)
class _Variant:
    """What one layer's attention is beside causal."""

    window: int | None
    softcap: float | None
    scaling: float | None
    dropout: float


def packed_attention(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    plan: AttentionPlan | None = None,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention of each segment to its key ranges.

    query: [1, heads, tokens, head_dim]; key, value: [1, kv_heads, tokens, head_dim]. attention_mask: None or
    what _window_of_layer made of the layer's mask. softcap: scores become softcap * tanh(scores / softcap).
    Returns [1, tokens, heads, head_dim], as transformers expects it.
    Raises AssertionError for a missing plan and for variants that the plan does not describe.
    """
    assert plan is not None, "packed attention was called without its plan"
    assert attention_mask is None or attention_mask.dim() == 0, (
        "packed attention does not take a mask beside its plan"
    )
    assert kwargs.get("s_aux") is None, "packed attention does not know s_aux"
    window = None if attention_mask is None else int(attention_mask)
    # Most architectures pass the window by keyword too; one that has it there alone would attend too far.
    assert kwargs.get("sliding_window") in (None, window), "the window of the mask is not that of the layer"
    variant = _Variant(window, softcap, scaling, dropout)
    # Split once: the backward of a slice fills a tensor of the whole pack, that of a split none.
    queries, keys, values = (states.split(plan.sizes, dim=2) for states in (query, key, value))
    pieces = []
    for own, places in zip(queries, plan.key_places, strict=True):
        pieces += _attend_in_blocks(own, _gather(keys, places), _gather(values, places), variant, plan)
    output = torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]
    return output.transpose(1, 2), None


def _attend_in_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, variant: _Variant, plan: AttentionPlan
) -> Iterator[torch.Tensor]:
    """One segment, a block of queries at a time, each with only those keys that some of its queries see."""
    heads, num_queries, num_keys = query.shape[1], query.shape[2], key.shape[2]
    # The keys are a sequence from its first token on, so key j stands at position j.
    first_position = num_keys - num_queries
    window = variant.window if variant.window is not None and variant.window < num_keys else None
    rows = num_queries
    if window is not None:
        rows = min(rows, max(window, _MIN_BLOCK))
    if variant.softcap is not None:
        visible = num_keys if window is None else min(num_keys, rows + window)
        rows = min(rows, max(1, plan.max_scores // (heads * visible)))
    for start in range(0, num_queries, rows):
        stop = min(start + rows, num_queries)
        seen = slice(
            0 if window is None else max(0, first_position + start - window + 1), first_position + stop
        )
        block = query[:, :, start:stop], key[:, :, seen], value[:, :, seen]
        attend = _attend if variant.softcap is None else _attend_capped
        yield attend(*block, variant, plan)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, variant: _Variant, plan: AttentionPlan
) -> torch.Tensor:
    num_queries, num_keys = query.shape[2], key.shape[2]
    window = variant.window if variant.window is not None and variant.window < num_keys else None
    causal = window is None and num_queries == num_keys
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if causal else plan.mask(num_queries, num_keys, window),
        is_causal=causal,
        dropout_p=variant.dropout,
        scale=variant.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _attend_capped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, variant: _Variant, plan: AttentionPlan
) -> torch.Tensor:
    mask = plan.mask(query.shape[2], key.shape[2], variant.window)
    # SDPA cannot cap. The scores are made again in the backward pass: kept for all blocks and layers they
    # would be the largest tensors of the step.
    return checkpoint(
        _capped_attention,
        *(query, key, value, mask, variant),
        use_reentrant=False,
        preserve_rng_state=variant.dropout > 0.0,
    )


def _capped_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, variant: _Variant
) -> torch.Tensor:
    scaling = query.shape[-1] ** -0.5 if variant.scaling is None else variant.scaling
    kv_heads = key.shape[1]
    grouped = query.unflatten(1, (kv_heads, query.shape[1] // kv_heads))
    scores = grouped @ key.unsqueeze(2).transpose(-1, -2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = variant.softcap * torch.tanh(scores * (scaling / variant.softcap))
    shares = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1).to(value.dtype)
    shares = F.dropout(shares, variant.dropout)
    return (shares @ value.unsqueeze(2)).flatten(1, 2)


def _gather(pieces: Sequence[torch.Tensor], places: Sequence[tuple[int, int, int]]) -> torch.Tensor:
    parts = [pieces[held][:, :, start:stop] for held, start, stop in places]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _window_of_layer(*_args: object, local_size: int | None = None, **_kwargs: object) -> torch.Tensor | None:
    """In place of a mask of [tokens, tokens]: None, or the sliding window as a tensor of no dimension.

    The mask is the one thing that every architecture gives to each of its layers; not all pass the window.
    """
    return None if local_size is None else torch.tensor(local_size)


def register_packed_attention() -> None:
    """Makes PACKED_ATTENTION a name that set_attn_implementation accepts; safe to call again."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, _window_of_layer)


def unpackable_reason(config: object, max_length: int) -> str | None:
    """Why a model cannot run packed, or None if it can.

    config: a transformers config. max_length: the longest prompt with a completion.
    """
    model_type = getattr(config, "model_type", "?")
    if model_type in _TYPE_REASONS:
        return f"architecture {model_type!r}: {_TYPE_REASONS[model_type]}"
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - _PACKABLE_LAYERS)
    if unknown:
        reason = _LAYER_REASONS.get(unknown[0], "are not known to run packed")
        return f"architecture {model_type!r}: its {unknown[0]} layers {reason}"
    if model_type not in PACKABLE_MODEL_TYPES:
        return f"architecture {model_type!r} is not known to run packed"
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        return "its attention is not causal"
    return depends_on_other_rows(config, max_length)


def depends_on_other_rows(config: object, max_length: int) -> str | None:
    """Why a row's log-probs depend on the rows beside it: frequencies that follow the longest; or None."""
    parameters = getattr(config, "rope_parameters", None) or {}
    for rope in (parameters, *parameters.values()):
        kind = rope.get("rope_type", "") if isinstance(rope, dict) else ""
        if "dynamic" in kind:
            limit = config.max_position_embeddings
        elif kind == "longrope":
            limit = rope["original_max_position_embeddings"]
        else:
            continue
        if max_length > limit:
            return (
                f"its {kind} rotary scaling takes other frequencies for a whole batch once one row is longer "
                f"than {limit} tokens, and max_length is {max_length}"
            )
    return None
