"""A causal language model as a function: PackedBatch -> one log-prob for each completion token."""

from __future__ import annotations

import torch
from torch import nn

from ds_align.batch import Layout, PackedBatch
from ds_align.kernels import logprob_gather
from ds_align.models.attention import (
    PACKABLE_MODEL_TYPES,
    PACKED_ATTENTION,
    AttentionPlan,
    register_packed_attention,
    unpackable_reason,
)
from ds_align.models.head import LogprobHead, head_arguments


def choose_layout(
    config: object, *, attn_implementation: str, prefix_sharing: bool, max_length: int
) -> tuple[Layout, str | None]:
    """The layout for a model, and a message where the architecture rules out the one that was asked for.

    config: a transformers config. Raises ValueError where packing is demanded and impossible.
    """
    if attn_implementation not in ("auto", "packed"):
        return Layout.PADDED, None
    reason = unpackable_reason(config, max_length)
    if reason is None:
        return (Layout.SHARED if prefix_sharing else Layout.PLAIN), None
    if attn_implementation == "packed":
        raise ValueError(f"attn_implementation='packed' is not possible: {reason}; use 'auto' or 'sdpa'")
    return Layout.PADDED, f"padded rows are used instead of packs: {reason}"


class PolicyModel(nn.Module):
    """Wraps a Hugging Face causal language model; only log-probs leave it, never logits.

    The wrapper is what an engine wraps in turn, so that under ZeRO-3 the LM head is gathered inside its own
    forward and everything above works on vectors of tokens.
    """

    def __init__(self, model: nn.Module, layout: Layout, attn_implementation: str = "auto") -> None:
        super().__init__()
        self.model = model
        self.layout = layout
        if layout is not Layout.PADDED:
            register_packed_attention()
            model.set_attn_implementation(PACKED_ATTENTION)
        elif attn_implementation in ("sdpa", "eager"):
            model.set_attn_implementation(attn_implementation)
        head = model.get_output_embeddings()
        # Another head class (quantised, wrapped by an adapter) may compute something else than hidden @ W.T.
        self.fused_head = type(head) in (nn.Linear, LogprobHead) and (
            model.config.model_type in PACKABLE_MODEL_TYPES
        )
        if self.fused_head:
            LogprobHead.adopt(head, **head_arguments(model.config))

    def disable_dropout(self) -> None:
        """Sets every dropout probability to 0, the attention's too (it lives in a plain attribute)."""
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0

    def forward(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """(token_logps, mean_logits), each float32 [num_scored]; mean_logits is detached.

        Differentiable in token_logps. A dummy pack returns vectors of length 0 that are still attached to
        every parameter.
        """
        if not self.fused_head:
            return self._forward_logits(batch)
        decoder = getattr(self.model, self.model.base_model_prefix)
        hidden = decoder(**self._inputs(batch)).last_hidden_state
        hidden = hidden.reshape(-1, hidden.shape[-1])[batch.source_index]
        return self.model.get_output_embeddings()(hidden, batch.labels)

    def _inputs(self, batch: PackedBatch) -> dict:
        inputs = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "position_ids": batch.position_ids,
            "use_cache": False,
        }
        if batch.segments is not None:
            inputs["plan"] = AttentionPlan(batch.segments, batch.input_ids.device)
        return inputs

    def _forward_logits(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The way for heads that are not known: the model's own logits."""
        inputs = self._inputs(batch)
        if batch.segments is None:
            del inputs["position_ids"]  # not every architecture takes them; padded rows count by themselves
        logits = self.model(**inputs).logits
        logits = logits.reshape(-1, logits.shape[-1])[batch.source_index]
        return logprob_gather(logits, batch.labels), logits.detach().mean(dim=-1, dtype=torch.float32)
