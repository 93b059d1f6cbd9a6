"""What groups cost, counted by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from ds_align.batch import Layout
from ds_align.packing import CostModel
from ds_align.packing.cost import attended


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 6, 7, 8, 40])
def test_attended_pairs_are_those_of_the_mask(num_tokens: int, window: int | None) -> None:
    pairs = [(query, key) for query in range(num_tokens) for key in range(query + 1)]
    assert attended(num_tokens, window) == sum(q - k < (window or math.inf) for q, k in pairs)


def test_the_default_counts_tokens() -> None:
    # A prompt of 10 with completions of 3 and 4 tokens: once, or a copy each.
    assert CostModel().of(10, [3, 4], Layout.SHARED) == 17
    assert CostModel().of(10, [3, 4], Layout.PLAIN) == CostModel().of(10, [3, 4], Layout.PADDED) == 27


def test_a_shared_prompt_attends_once() -> None:
    # Prompt 2, completions 1 and 3. Prompt: 1 + 2 pairs; completions: 3, then 3 + 4 + 5.
    cost = CostModel(per_key=1.0)
    assert cost.of(2, [1, 3], Layout.SHARED) == 6 + 3 + 3 + 12
    # With its own copy each: 6 + 15 pairs of the sequences of 3 and of 5, and 8 tokens.
    assert cost.of(2, [1, 3], Layout.PLAIN) == 8 + 6 + 15


def test_labels_and_windows_have_their_own_price() -> None:
    # 4 tokens of prompt, 2 of completion; window 3: 1 + 2 + 3 + 3 + 3 + 3 pairs; 2 labels.
    cost = CostModel(per_label=10.0, per_window_key=0.5, window=3)
    assert cost.of(4, [2], Layout.SHARED) == 6 + 20 + 7.5


def config(**values: object) -> SimpleNamespace:
    shape = {"hidden_size": 6, "num_attention_heads": 3, "num_hidden_layers": 4, "intermediate_size": 16}
    return SimpleNamespace(**(shape | {"vocab_size": 100} | values))


def test_the_model_that_a_rule_of_thumb_speaks_of() -> None:
    # h = 6 and i = 8/3 h: a layer has 4 h^2 + 3 h i = 12 h^2 weights, so 24 h^2 = 864 operations a token.
    # 4 h = 24 a query and key in each layer; the head has 2 h V = 1200, and there are 4 layers.
    cost = CostModel.from_model(config())
    assert cost.per_key == pytest.approx(24 / 864)
    assert cost.per_label == pytest.approx(1200 / (4 * 864))
    assert (cost.per_window_key, cost.window) == (0.0, None)


def test_grouped_heads_experts_and_windows() -> None:
    # Heads of 4: q = 12, one key head: k = 4. 6 (12 + 2 * 4) + 12 * 6 = 192 weights in the attention.
    # Two experts of 5 and one for all of 7: 3 * 6 * 17 = 306. Operations: 2 (192 + 306) = 996.
    experts = {
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 5,
        "shared_expert_intermediate_size": 7,
    }
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    cost = CostModel.from_model(
        config(head_dim=4, num_key_value_heads=1, sliding_window=9, layer_types=kinds, **experts)
    )
    assert cost.per_key == pytest.approx(48 / (4 * 996))
    assert cost.per_window_key == pytest.approx(3 * 48 / (4 * 996))
    assert cost.window == 9
    # Without a list every layer has the window.
    every = CostModel.from_model(config(sliding_window=9))
    assert (every.per_key, every.per_window_key) == (0.0, pytest.approx(24 / 864))


def test_a_model_without_attention_has_no_price_for_it() -> None:
    shape = SimpleNamespace(hidden_size=8, num_hidden_layers=2, vocab_size=50)
    assert CostModel.from_model(shape).per_key == 0.0


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma2", "qwen3_moe", "gpt2", "falcon_mamba", "jamba"])
def test_every_kind_of_config_has_a_cost(kind: str) -> None:
    from transformers import AutoConfig

    cost = CostModel.from_model(AutoConfig.for_model(kind).get_text_config())
    # 4096 keys cost about as much as the token itself; a label of the head no more than the layers.
    assert 0 <= 4096 * (cost.per_key + cost.per_window_key) < 2
    assert 0 < cost.per_label < 1
