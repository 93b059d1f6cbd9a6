"""A causal language model as a function: PackedBatch -> one log-prob for each completion token."""

from __future__ import annotations

import torch
from torch import nn

from ds_align.batch import Layout, PackedBatch
from ds_align.kernels import log_collision, logprob_gather
from ds_align.models.attention import (
    PACKABLE_MODEL_TYPES,
    PACKED_ATTENTION,
    AttentionPlan,
    register_packed_attention,
    unpackable_reason,
)
from ds_align.models.head import LogprobHead, head_arguments
from ds_align.models.router import router_sums


def choose_layout(
    config: object, *, attn_implementation: str, prefix_sharing: bool, max_length: int
) -> tuple[Layout, str | None]:
    """The layout for a model, and a message where the architecture rules out the one that was asked for.

    config: a transformers config. Raises ValueError where packing or SDPA is demanded and impossible.
    """
    if attn_implementation == "sdpa" and not _has_sdpa(config):
        raise ValueError(
            f"attn_implementation='sdpa' is not possible: architecture {config.model_type!r} has no SDPA in "
            "transformers; use 'auto' or 'eager'"
        )
    if attn_implementation not in ("auto", "packed"):
        return Layout.PADDED, None
    reason = unpackable_reason(config, max_length)
    if reason is None:
        return (Layout.SHARED if prefix_sharing else Layout.PLAIN), None
    if attn_implementation == "packed":
        raise ValueError(f"attn_implementation='packed' is not possible: {reason}; use 'auto'")
    return Layout.PADDED, f"padded rows are used instead of packs: {reason}"


def _has_sdpa(config: object) -> bool:
    """Whether transformers runs a model through SDPA; soft caps and sinks rule it out. Unknown code: yes."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return True
    return getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "_supports_sdpa", True)


class PolicyModel(nn.Module):
    """Wraps a Hugging Face causal language model; only log-probs leave it, never logits.

    The wrapper is what an engine wraps in turn, so that under ZeRO-3 the LM head is gathered inside its own
    forward and everything above works on vectors of tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        attn_implementation: str = "auto",
        *,
        logits_budget_mb: int = 0,
    ) -> None:
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
            LogprobHead.adopt(head, **head_arguments(model.config), logits_budget_mb=logits_budget_mb)

    def disable_dropout(self) -> None:
        """Sets the model's dropouts to 0, the attention's too (a plain attribute), but not its adapters'."""
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Dropout) and "lora_dropout" not in name.split("."):
                module.p = 0.0
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0

    def forward(
        self, batch: PackedBatch, *, with_collision: bool = False, with_router: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """(token_logps, mean_logits), each float32 [num_scored]; only token_logps has a gradient.

        with_collision: a third vector, log sum_v p_v^2 of each scored token. with_router: last come the two
        of router_sums. A dummy pack returns vectors of length 0 that are still attached to every parameter.
        """
        # A plain tuple: DeepSpeed hooks tensors in tuples and would pass over those of a dataclass.
        inputs = self._inputs(batch)
        if with_router:
            inputs["output_router_logits"] = True
        if not self.fused_head:
            return self._forward_logits(batch, inputs, with_collision=with_collision)
        decoder = getattr(self.model, self.model.base_model_prefix)
        output = decoder(**inputs)
        hidden = output.last_hidden_state
        hidden = hidden.reshape(-1, hidden.shape[-1])[batch.source_index]
        head = self.model.get_output_embeddings()
        scores = head.score(hidden, batch.labels, with_collision=with_collision)
        return (*scores, *self._router_sums(output, batch)) if with_router else scores

    def _router_sums(self, output: object, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        top_k = self.model.config.get_text_config().num_experts_per_tok
        return router_sums(output.router_logits, batch.token_weights, top_k)

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

    def _forward_logits(
        self, batch: PackedBatch, inputs: dict, *, with_collision: bool
    ) -> tuple[torch.Tensor, ...]:
        """The way for heads that are not known: the model's own logits."""
        if batch.segments is None:
            del inputs["position_ids"]  # not every architecture takes them; padded rows count by themselves
        output = self.model(**inputs)
        logits = output.logits
        logits = logits.reshape(-1, logits.shape[-1])[batch.source_index]
        scores = logprob_gather(logits, batch.labels), logits.detach().mean(dim=-1, dtype=torch.float32)
        if with_collision:
            scores = (*scores, log_collision(logits))
        return (*scores, *self._router_sums(output, batch)) if "output_router_logits" in inputs else scores
