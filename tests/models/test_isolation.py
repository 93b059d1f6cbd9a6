"""No token sees another pair, prompts are computed as often as the layout says, and misuse is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ds_align.batch import Layout, Pair
from ds_align.models import PolicyModel, choose_layout
from ds_align.models.attention import AttentionPlan, packed_attention
from ds_align.packing import PreferenceTable


def ids(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 61, length, dtype=np.int32)


def by_completion(bench, policy: PolicyModel, pairs: list[Pair], layout: Layout) -> dict[int, torch.Tensor]:
    batch = bench.one_pack(PreferenceTable.from_preferences(pairs), layout)
    with torch.no_grad():
        parts = policy(batch)[0].split(batch.completion_lengths.tolist())
    return dict(zip(batch.units.tolist(), parts, strict=True))


def changes(before: dict[int, torch.Tensor], after: dict[int, torch.Tensor]) -> dict[int, float]:
    return {unit: (before[unit] - after[unit]).abs().max().item() for unit in before}


# Equal lengths and units in order of appearance: pair n has the units 2n (chosen) and 2n + 1 (rejected).
PAIRS = [Pair(ids(n, 6), ids(10 + n, 5), ids(20 + n, 4)) for n in range(3)]


@pytest.mark.parametrize("layout", list(Layout))
def test_a_pair_does_not_see_the_others(bench, layout: Layout) -> None:
    policy = PolicyModel(bench.model("llama"), layout)
    other = Pair(ids(31, 6), ids(32, 5), ids(33, 4))
    before = by_completion(bench, policy, PAIRS, layout)
    after = by_completion(bench, policy, [PAIRS[0], other, PAIRS[2]], layout)
    moved = changes(before, after)
    assert min(moved[2], moved[3]) > 1e-2
    assert max(moved[unit] for unit in (0, 1, 4, 5)) < 1e-6


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize(("chosen", "rejected"), [(41, 20), (10, 42)])
def test_completions_of_one_prompt_do_not_see_each_other(
    bench, layout: Layout, chosen: int, rejected: int
) -> None:
    policy = PolicyModel(bench.model("qwen2"), layout)
    before = by_completion(bench, policy, PAIRS, layout)
    changed = Pair(PAIRS[0].prompt_ids, ids(chosen, 5), ids(rejected, 4))
    moved = changes(before, by_completion(bench, policy, [changed, *PAIRS[1:]], layout))
    touched = 0 if chosen == 41 else 1
    assert moved.pop(touched) > 1e-2
    assert max(moved.values()) < 1e-6


@pytest.mark.parametrize("layout", list(Layout))
def test_both_completions_see_their_prompt_to_its_first_token(bench, layout: Layout) -> None:
    policy = PolicyModel(bench.model("llama"), layout)
    before = by_completion(bench, policy, PAIRS, layout)
    prompt = PAIRS[0].prompt_ids.copy()
    prompt[0] = (prompt[0] + 1) % 61
    changed = Pair(prompt, PAIRS[0].chosen_ids, PAIRS[0].rejected_ids)
    moved = changes(before, by_completion(bench, policy, [changed, *PAIRS[1:]], layout))
    assert min(moved[0], moved[1]) > 1e-3


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        # Prompts 7, 1, 30, 1 once each = 39; distinct completions 5+1+23, 1+40, 2+3, 1+1 = 77.
        (Layout.SHARED, 39 + 77),
        # Prompts as often as they have distinct completions: 3*7 + 2*1 + 2*30 + 2*1 = 85.
        (Layout.PLAIN, 85 + 77),
        # Nine rows of the longest, 1 + 40.
        (Layout.PADDED, 9 * 41),
    ],
)
def test_tokens_that_the_decoder_computes(bench, layout: Layout, expected: int) -> None:
    policy = PolicyModel(bench.model("llama"), layout)
    batch = bench.one_pack(bench.table, layout)
    counted = []
    decoder = policy.model.model
    decoder.embed_tokens.register_forward_hook(lambda _, inputs, __: counted.append(inputs[0].numel()))
    decoder.layers[0].register_forward_hook(
        lambda _, inputs, __: counted.append(inputs[0].shape[0] * inputs[0].shape[1])
    )
    scored = []
    policy.model.lm_head.register_forward_hook(lambda _, inputs, __: scored.append(inputs[0].shape[0]))
    policy(batch)
    assert counted == [expected, expected]
    assert scored == [77]
    assert batch.num_unshared_tokens == 85 + 77
    assert batch.num_padded_tokens == 9 * 41
    assert batch.num_tokens == (116 if layout is Layout.SHARED else 162)


def test_a_missing_plan_is_an_error(bench) -> None:
    policy = PolicyModel(bench.model("llama"), Layout.SHARED)
    batch = bench.one_pack(bench.table, Layout.SHARED)
    with pytest.raises(AssertionError, match="without its plan"):
        policy.model(input_ids=batch.input_ids, position_ids=batch.position_ids)


def test_attention_sinks_are_refused(bench) -> None:
    segments = bench.one_pack(bench.table, Layout.SHARED).segments
    plan = AttentionPlan(segments, torch.device("cpu"))
    states = torch.randn(1, 2, 116, 4)
    packed_attention(torch.nn.Identity(), states, states, states, None, plan=plan, s_aux=None)
    with pytest.raises(AssertionError, match="s_aux"):
        packed_attention(torch.nn.Identity(), states, states, states, None, plan=plan, s_aux=torch.ones(2))


def test_a_mask_beside_the_plan_is_refused(bench) -> None:
    plan = AttentionPlan(bench.one_pack(bench.table, Layout.SHARED).segments, torch.device("cpu"))
    states = torch.randn(1, 2, 116, 4)
    with pytest.raises(AssertionError, match="mask"):
        packed_attention(torch.nn.Identity(), states, states, states, torch.ones(116, 116), plan=plan)


def test_a_layers_window_that_its_mask_does_not_have_is_refused(bench) -> None:
    plan = AttentionPlan(bench.one_pack(bench.table, Layout.SHARED).segments, torch.device("cpu"))
    states = torch.randn(1, 2, 116, 4)
    arguments = (torch.nn.Identity(), states, states, states)
    packed_attention(*arguments, torch.tensor(7), plan=plan, sliding_window=7)
    for mask in (None, torch.tensor(8)):
        with pytest.raises(AssertionError, match="window"):
            packed_attention(*arguments, mask, plan=plan, sliding_window=7)


def test_the_layout_follows_the_settings() -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model("llama")

    def choose(attention: str, *, prefix_sharing: bool = True) -> tuple[Layout, str | None]:
        return choose_layout(
            config, attn_implementation=attention, prefix_sharing=prefix_sharing, max_length=16
        )

    assert choose("auto") == choose("packed") == (Layout.SHARED, None)
    assert choose("auto", prefix_sharing=False) == (Layout.PLAIN, None)
    assert choose("sdpa") == choose("eager") == (Layout.PADDED, None)


def test_a_padded_model_really_takes_the_attention_that_was_asked_for(bench) -> None:
    for attention in ("sdpa", "eager"):
        model = PolicyModel(bench.model("llama"), Layout.PADDED, attention).model
        assert model.config._attn_implementation == attention
