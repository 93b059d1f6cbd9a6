"""Every family of models in every layout against its rows alone; what cannot be packed says why."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from ds_align.batch import Layout
from ds_align.models import PolicyModel, choose_layout
from ds_align.models.attention import PACKABLE_MODEL_TYPES, unpackable_reason
from ds_align.models.head import LogprobHead

LAYOUTS = [
    pytest.param(Layout.SHARED, "auto", id="shared"),
    pytest.param(Layout.PLAIN, "auto", id="plain"),
    pytest.param(Layout.PADDED, "sdpa", id="padded-sdpa"),
    pytest.param(Layout.PADDED, "eager", id="padded-eager"),
]
WINDOW = {"sliding_window": 5}
QWEN_WINDOW = WINDOW | {"use_sliding_window": True, "max_window_layers": 1}
# Rows of the batch have up to 41 tokens, prompts up to 30, completions up to 40: each longer than the window,
# which therefore cuts in prompts, within completions, and from completions back into their prompts.
WINDOWS = {
    "cohere2": WINDOW,
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
    "ministral": WINDOW,
    "ministral3": WINDOW,
    "mistral": WINDOW,
    "mixtral": WINDOW,
    "olmo3": WINDOW,
    "phi3": WINDOW,
    "qwen2": QWEN_WINDOW,
    "qwen2_moe": QWEN_WINDOW,
    "qwen3": QWEN_WINDOW,
    "qwen3_moe": QWEN_WINDOW,
    "smollm3": QWEN_WINDOW | {"layer_types": ["sliding_attention", "full_attention"]},
    "starcoder2": WINDOW,
}
WIDE = {"sliding_window": 64}
FAMILIES = [*((name, {}) for name in sorted(PACKABLE_MODEL_TYPES)), *sorted(WINDOWS.items())]
CASES = [
    pytest.param(name, settings, *layout.values, id=f"{name}{'-window' if settings else ''}-{layout.id}")
    for name, settings in FAMILIES
    for layout in LAYOUTS
    # transformers has no SDPA for Gemma 2; asking for it is an error, tested below.
    if (name, layout.id) != ("gemma2", "padded-sdpa")
]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(("model_type", "settings", "layout", "attention"), CASES)
def test_every_layout_gives_the_logprobs_and_gradients_of_single_rows(
    bench, model_type: str, settings: dict, layout: Layout, attention: str, checkpointing: bool
) -> None:
    model = bench.model(model_type, **settings)
    if layout is not Layout.PADDED:
        assert unpackable_reason(model.config, 41) is None
    if checkpointing:
        bench.enable_checkpointing(model)
    policy = PolicyModel(model, layout, attention)
    assert isinstance(model.get_output_embeddings(), LogprobHead)
    batch = bench.one_pack(bench.table, layout)
    assert batch.num_completions == 9
    bench.assert_same(bench.score_packed(policy, batch), bench.alone(model_type, **settings))


@pytest.mark.parametrize("model_type", sorted(WINDOWS))
def test_the_window_of_these_cases_matters(bench, model_type: str) -> None:
    settings = WINDOWS[model_type]
    narrow, wide = bench.alone(model_type, **settings), bench.alone(model_type, **settings | WIDE)
    assert bench.largest_change(narrow, wide) > 1e-2


def test_every_family_whose_config_has_a_window_is_tested_with_one() -> None:
    has_window = {
        name for name in PACKABLE_MODEL_TYPES if hasattr(AutoConfig.for_model(name), "sliding_window")
    }
    assert has_window == set(WINDOWS)


@pytest.mark.parametrize(
    ("model_type", "name", "off"),
    [
        ("gemma2", "attn_logit_softcapping", None),
        ("gemma2", "final_logit_softcapping", None),
        ("gemma3_text", "final_logit_softcapping", None),
        ("cohere", "logit_scale", 1.0),
        ("cohere2", "logit_scale", 1.0),
        ("granite", "logits_scaling", 1.0),
    ],
)
def test_the_caps_and_scales_of_these_cases_matter(bench, model_type: str, name: str, off: object) -> None:
    assert bench.largest_change(bench.alone(model_type), bench.alone(model_type, **{name: off})) > 1e-2


STATE = "layers would carry their state from one sequence of a pack into the next"
MIXED_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
LINEAR = {
    f"linear_{name}": size
    for name, size in (
        ("num_key_heads", 2),
        ("num_value_heads", 4),
        ("key_head_dim", 8),
        ("value_head_dim", 8),
    )
}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
# What cannot be packed: settings that make it small, and the reason.
REFUSED = {
    "mamba": ({"state_size": 4}, f"its linear_attention {STATE}"),
    "falcon_mamba": ({"state_size": 4}, f"its linear_attention {STATE}"),
    "jamba": (
        {"mamba_d_state": 4, "mamba_dt_rank": 4, "num_experts": 2, "attn_layer_period": 2}
        | {"attn_layer_offset": 1, "use_mamba_kernels": False},
        f"its linear_attention {STATE}",
    ),
    "qwen3_next": (
        EXPERTS | LINEAR | MIXED_LINEAR | {"num_experts": 4, "head_dim": 8},
        f"its linear_attention {STATE}",
    ),
    "falcon_h1": (
        {"head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4}
        | {"mamba_n_groups": 1, "mamba_chunk_size": 8},
        f"its hybrid {STATE}",
    ),
    "llama4_text": (
        {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 8}
        | {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 1]},
        "its chunked_attention layers cut the pack into chunks, not its sequences",
    ),
    "gpt_oss": (
        WINDOW | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
        "its attention sinks are not computed segment by segment",
    ),
    "gemma3": (
        {
            "text_config": {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
            | {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0},
            "vision_config": VISION | {"image_size": 28, "patch_size": 14},
            "mm_tokens_per_image": 4,
        },
        "models of text and images are not known to run packed",
    ),
}


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_families_that_cannot_be_packed_fall_back_and_say_why(model_type: str) -> None:
    check_refusal(AutoConfig.for_model(model_type), f"architecture {model_type!r}: {REFUSED[model_type][1]}")


def check_refusal(config: object, reason: str, max_length: int = 64) -> None:
    assert unpackable_reason(config, max_length) == reason
    choose = {"prefix_sharing": True, "max_length": max_length}
    layout, message = choose_layout(config, attn_implementation="auto", **choose)
    assert layout is Layout.PADDED and reason in message
    with pytest.raises(ValueError, match="use 'auto'"):
        choose_layout(config, attn_implementation="packed", **choose)


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_refused_families_run_padded(bench, model_type: str) -> None:
    settings = REFUSED[model_type][0]
    model = bench.model(model_type, **settings)
    policy = PolicyModel(model, Layout.PADDED)
    assert not policy.fused_head
    found = bench.score_packed(policy, bench.one_pack(bench.table, Layout.PADDED))
    bench.assert_same(found, bench.alone(model_type, **settings))


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "phi"])
def test_other_architectures_are_not_packed(model_type: str) -> None:
    check_refusal(AutoConfig.for_model(model_type), f"architecture {model_type!r} is not known to run packed")


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_bidirectional_attention_is_refused(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, use_bidirectional_attention=True)
    check_refusal(config, "its attention is not causal")


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss"])
def test_sdpa_where_transformers_has_none_is_refused_before_the_model_loads(model_type: str) -> None:
    with pytest.raises(ValueError, match=f"'sdpa' is not possible: architecture '{model_type}'.*'eager'"):
        choose_layout(
            AutoConfig.for_model(model_type), attn_implementation="sdpa", prefix_sharing=True, max_length=64
        )


DYNAMIC = {
    "max_position_embeddings": 41,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
}
LONGROPE = {
    "max_position_embeddings": 128,
    "original_max_position_embeddings": 41,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [4.0, 5.0, 6.0, 7.0],
    },
}


@pytest.mark.parametrize(
    ("model_type", "settings"), [("llama", DYNAMIC), ("phi3", LONGROPE)], ids=["dynamic", "longrope"]
)
@pytest.mark.parametrize("layout", list(Layout))
def test_rotary_scaling_by_length_is_exact_up_to_its_limit(bench, model_type, settings, layout) -> None:
    # The longest row of the batch has 41 tokens, exactly the limit.
    model = bench.model(model_type, **settings)
    assert unpackable_reason(model.config, 41) is None
    found = bench.score_packed(PolicyModel(model, layout), bench.one_pack(bench.table, layout))
    bench.assert_same(found, bench.alone(model_type, **settings))
    check_refusal(
        model.config,
        f"its {settings['rope_parameters']['rope_type']} rotary scaling takes other frequencies for a whole "
        "batch once one row is longer than 41 tokens, and max_length is 42",
        42,
    )


def test_beyond_its_limit_rotary_scaling_by_length_would_not_be_exact(bench) -> None:
    # One row of 41 tokens is beyond 40: packed with it, the short rows take the long frequencies too.
    settings = LONGROPE | {"original_max_position_embeddings": 40}
    model = bench.model("phi3", **settings)
    assert unpackable_reason(model.config, 40) is None
    assert "longer than 40 tokens" in unpackable_reason(model.config, 41)
    found = bench.score_packed(PolicyModel(model, Layout.PLAIN), bench.one_pack(bench.table, Layout.PLAIN))
    assert bench.largest_change(found, bench.alone("phi3", **settings)) > 1e-2


def test_gemma_3s_scaling_is_found_in_its_full_layers() -> None:
    scaling = {"full_attention": DYNAMIC["rope_parameters"], "sliding_attention": {"rope_type": "default"}}
    config = AutoConfig.for_model("gemma3_text", max_position_embeddings=41, rope_parameters=scaling)
    assert unpackable_reason(config, 41) is None
    assert "dynamic" in unpackable_reason(config, 42)


README = Path(__file__).parents[2] / "README.md"


def table_of_families() -> str:
    """The README's table, from the code's list, the windows and the refusals above."""
    config = {name: AutoConfig.for_model(name) for name in PACKABLE_MODEL_TYPES}
    # Gemma 3's config has the field as well, unset, and its layers do not read it.
    capped = {name for name in config if getattr(config[name], "attn_logit_softcapping", None)}
    rows = [
        (PACKABLE_MODEL_TYPES - set(WINDOWS), "packed", "causal attention"),
        (set(WINDOWS) - capped, "packed", "causal attention; sliding windows count within each sequence"),
        (capped, "packed", "the same, and soft-capped scores, computed without SDPA"),
    ]
    reasons = dict.fromkeys(reason for _, reason in REFUSED.values())
    rows += [({name for name in REFUSED if REFUSED[name][1] == why}, "padded", why) for why in reasons]
    lines = ["| `model_type` in config.json | Rows | Why |", "|---|---|---|"]
    for types, layout, why in rows:
        lines.append(f"| {', '.join(f'`{name}`' for name in sorted(types))} | {layout} | {why} |")
    lines.append("| any other | padded | not known to run packed |")
    return "\n".join(lines) + "\n"


def test_the_readmes_table_of_families_is_what_the_code_says() -> None:
    assert table_of_families() in README.read_text(encoding="utf-8")
