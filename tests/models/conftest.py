"""Tiny random models, a batch with every awkward shape, and log-probs the plain way, one row at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ds_align.batch import Layout, PackedBatch, Pair
from ds_align.packing import PreferenceTable, build_batch, plan_step

VOCABULARY = 61
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MIXED = ["sliding_attention", "full_attention"]
OWN_SETTINGS = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"attention_bias": True, "head_dim": 8},
    "gemma": {"attention_bias": True, "head_dim": 16, "num_key_value_heads": 1},
    "olmo2": {"attention_bias": True},
    "granite": {
        "attention_bias": True,
        "logits_scaling": 3.0,
        "attention_multiplier": 0.5,
        "residual_multiplier": 0.7,
        "embedding_multiplier": 2.0,
    },
    "gemma2": {"attention_bias": True, "head_dim": 16, "query_pre_attn_scalar": 12, "layer_types": MIXED}
    | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.5},
    "gemma3_text": {"attention_bias": True, "head_dim": 16, "layer_types": MIXED}
    | {"query_pre_attn_scalar": 12, "final_logit_softcapping": 2.5},
    "cohere": {"attention_bias": True, "use_qk_norm": True, "logit_scale": 0.3},
    # Where a layer has no rotary positions a key bias has no effect: these two keep their biases off.
    "cohere2": {"logit_scale": 0.3, "layer_types": MIXED},
    "ministral": {"head_dim": 8, "layer_types": MIXED},
    # Its queries grow with their position from original_max_position_embeddings on.
    "ministral3": {
        "head_dim": 8,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.5,
        },
    },
    "olmo3": {"attention_bias": True, "layer_types": MIXED},
    "smollm3": {"no_rope_layers": [1, 0]},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**MOE, "head_dim": 8},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 24},
}


def make_model(model_type: str, seed: int = 0, **changes: object) -> nn.Module:
    """A random causal language model in eval mode, its biases and norm weights random too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **(SHAPE | OWN_SETTINGS.get(model_type, {}) | changes))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    for name, parameter in model.named_parameters():
        # Text alone never reaches the parts for images.
        if "vision_tower" in name or "multi_modal" in name:
            parameter.requires_grad_(False)
    return model


@dataclass(frozen=True)
class Scored:
    """Token log-probs of each unit, and the gradient of their weighted sum by parameter name."""

    token_logps: list[Tensor]
    gradients: dict[str, Tensor]


def token_weights(unit: int, length: int) -> Tensor:
    """A fixed weight for each token of a unit, so that every token's gradient is told apart."""
    return torch.randn(length, generator=torch.Generator().manual_seed(unit), dtype=torch.float64)


def score_alone(model: nn.Module, table: PreferenceTable) -> Scored:
    """Every prompt with one completion as a row of its own through the model's logits and a log-softmax."""
    model.zero_grad()
    token_logps = []
    for unit, completion in enumerate(table.completions):
        prompt = table.prompts[table.prompt_of[unit]]
        ids = torch.tensor(np.concatenate([prompt, completion]).astype(np.int64))
        logits = model(input_ids=ids[None]).logits[0].double()
        logps = torch.log_softmax(logits, dim=-1)[torch.arange(len(ids) - 1), ids[1:]]
        token_logps.append(logps[len(prompt) - 1 :])
    total = sum((token_weights(unit, len(logps)) * logps).sum() for unit, logps in enumerate(token_logps))
    total.backward()
    return Scored([logps.detach() for logps in token_logps], gradients_of(model))


def score_packed(policy: nn.Module, batch: PackedBatch) -> Scored:
    """The same of one PackedBatch through a PolicyModel."""
    policy.zero_grad()
    logps, mean_logits = policy(batch)
    assert logps.shape == mean_logits.shape == batch.labels.shape
    parts = dict(zip(batch.units.tolist(), logps.split(batch.completion_lengths.tolist()), strict=True))
    total = sum((token_weights(unit, len(part)) * part.double()).sum() for unit, part in parts.items())
    total.backward()
    return Scored([parts[unit].detach().double() for unit in sorted(parts)], gradients_of(policy.model))


def enable_checkpointing(model: nn.Module) -> None:
    """Recomputes each layer in the backward pass, under whichever name transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    model.train()


def assert_same(found: Scored, expected: Scored, tolerance: float = 1e-5) -> None:
    """Log-probs within tolerance, gradients within tolerance relative to their norm."""
    for number, (ours, theirs) in enumerate(zip(found.token_logps, expected.token_logps, strict=True)):
        assert (ours - theirs).abs().max() < tolerance, f"log-probs of completion {number}"
    assert found.gradients.keys() == expected.gradients.keys()
    for name, theirs in expected.gradients.items():
        assert theirs.norm() > 0, f"{name} is not tested by this batch"
        error = (found.gradients[name] - theirs).norm() / theirs.norm()
        assert error < tolerance, f"gradient of {name}: {error:.1e}"


def largest_change(found: Scored, expected: Scored) -> float:
    """The largest difference of a log-prob."""
    pairs = zip(found.token_logps, expected.token_logps, strict=True)
    return max((ours - theirs).abs().max().item() for ours, theirs in pairs)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def awkward_pairs() -> list[Pair]:
    """Three completions of one prompt in three pairs, one-token prompts and completions, uneven lengths."""
    generator = np.random.default_rng(7)

    def ids(length: int) -> np.ndarray:
        return generator.integers(0, VOCABULARY, length, dtype=np.int32)

    shared, first, second, third = ids(7), ids(5), ids(1), ids(23)
    return [
        Pair(shared, first, second),
        Pair(ids(1), ids(1), ids(40)),
        Pair(shared, first, third),
        Pair(ids(30), ids(2), ids(3)),
        Pair(shared, third, second),
        Pair(ids(1), ids(1), ids(1)),
    ]


def one_pack(table: PreferenceTable, layout: Layout) -> PackedBatch:
    """All preferences of a table in one micro-batch."""
    plan = plan_step(
        table,
        world_size=1,
        layout=layout,
        pack_tokens=100_000,
        reference_tokens=100_000,
        needs_reference=False,
    )
    assert [len(packs) for packs in plan.train] == [1]
    return build_batch(table, plan.train[0][0], range(len(table.members)), layout)


@dataclass(frozen=True)
class Bench:
    """What the tests of this folder share."""

    model: Callable[..., nn.Module]
    score_alone: Callable[[nn.Module, PreferenceTable], Scored]
    score_packed: Callable[[nn.Module, PackedBatch], Scored]
    one_pack: Callable[[PreferenceTable, Layout], PackedBatch]
    pairs: Sequence[Pair]
    assert_same: Callable[[Scored, Scored], None]
    largest_change: Callable[[Scored, Scored], float]
    enable_checkpointing: Callable[[nn.Module], None]
    alone: Callable[..., Scored]

    @property
    def table(self) -> PreferenceTable:
        return PreferenceTable.from_preferences(self.pairs)


def alone(model_type: str, **changes: object) -> Scored:
    """Reference results: the rows of awkward_pairs alone through the plain eager model, computed once."""
    key = repr((model_type, sorted(changes.items())))
    if key not in _ALONE:
        model = make_model(model_type, **changes)
        model.set_attn_implementation("eager")
        _ALONE[key] = score_alone(model, PreferenceTable.from_preferences(awkward_pairs()))
    return _ALONE[key]


_ALONE: dict[str, Scored] = {}


@pytest.fixture(scope="session")
def bench() -> Bench:
    return Bench(
        make_model,
        score_alone,
        score_packed,
        one_pack,
        awkward_pairs(),
        assert_same,
        largest_change,
        enable_checkpointing,
        alone,
    )
