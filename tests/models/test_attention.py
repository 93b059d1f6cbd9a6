"""Windows and soft caps of packed attention alone, against one dense computation with every score."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from ds_align.batch import Segment
from ds_align.models import attention
from ds_align.models.attention import AttentionPlan, packed_attention

# A prompt of 9 tokens with completions of 4, 6 and 1, a lone sequence of 13, then one of 3 behind tokens that
# begin and end inside of other segments: 36 tokens.
SEGMENTS = (
    Segment((0, 13), ((0, 13),)),
    Segment((13, 19), ((0, 9), (13, 19))),
    Segment((19, 20), ((0, 9), (19, 20))),
    Segment((20, 33), ((20, 33),)),
    Segment((33, 36), ((4, 15), (33, 36))),
)
TOKENS, HEADS, KV_HEADS, HEAD_DIM = 36, 4, 2, 6
VARIANTS = [(None, None), (3, None), (1, None), (12, None), (None, 0.7), (3, 0.7), (40, 0.7)]


def states(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, heads, TOKENS, HEAD_DIM, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def visible(window: int | None) -> torch.Tensor:
    """bool [tokens, tokens]: whether a token of the pack sees another, position by position."""
    mask = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    for segment in SEGMENTS:
        sequence = [token for start, stop in segment.keys for token in range(start, stop)]
        for query in range(*segment.query):
            position = sequence.index(query)
            first = 0 if window is None else max(0, position - window + 1)
            mask[query, sequence[first : position + 1]] = True
    return mask


def dense(query, key, value, *, window, softcap, scaling):
    key, value = (part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible(window), -torch.inf)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2)


def packed(inputs, plan: AttentionPlan, window: int | None, softcap: float | None, **settings: object):
    mask = None if window is None else torch.tensor(window)
    return packed_attention(torch.nn.Identity(), *inputs, mask, plan=plan, softcap=softcap, **settings)[0]


# 200 scores: 200 // (4 heads * 13 keys) = 3 queries a block in the longest segments; 1: one query a block.
@pytest.mark.parametrize("max_scores", [1 << 24, 200, 1])
@pytest.mark.parametrize("min_block", [256, 2])
@pytest.mark.parametrize(("window", "softcap"), VARIANTS)
def test_values_and_gradients(monkeypatch, window, softcap, min_block: int, max_scores: int) -> None:
    monkeypatch.setattr(attention, "_MIN_BLOCK", min_block)
    inputs = states()
    weights = torch.randn(1, TOKENS, HEADS, HEAD_DIM, dtype=torch.float64)
    expected = dense(*inputs, window=window, softcap=softcap, scaling=0.8)
    theirs = torch.autograd.grad((weights * expected).sum(), inputs)
    plan = AttentionPlan(SEGMENTS, torch.device("cpu"), max_scores=max_scores)
    found = packed(inputs, plan, window, softcap, scaling=0.8)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    ours = torch.autograd.grad((weights * found).sum(), inputs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_mask_by_hand() -> None:
    # Two queries behind three earlier keys stand at positions 3 and 4; a window of 3 shows 1..3 and 2..4.
    mask = AttentionPlan((), torch.device("cpu")).mask(2, 5, 3)
    assert mask.int().tolist() == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]


def test_masks_are_made_once() -> None:
    plan = AttentionPlan(SEGMENTS, torch.device("cpu"))
    assert plan.mask(4, 9, 3) is plan.mask(4, 9, 3)
    assert plan.mask(4, 9, 3) is not plan.mask(4, 9, 2)


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_attention_without_a_scale_takes_that_of_the_head_width(softcap: float | None) -> None:
    inputs, plan = states(), AttentionPlan(SEGMENTS, torch.device("cpu"))
    expected = dense(*inputs, window=3, softcap=softcap, scaling=HEAD_DIM**-0.5)
    torch.testing.assert_close(packed(inputs, plan, 3, softcap), expected, rtol=0, atol=1e-12)


def test_soft_capped_attention_keeps_no_scores_for_the_backward_pass() -> None:
    length = 512
    plan = AttentionPlan(
        (Segment((0, length), ((0, length),)),), torch.device("cpu"), max_scores=2 * 16 * length
    )
    inputs = [torch.randn(1, 2, length, 4, requires_grad=True) for _ in range(3)]
    made, kept = [], {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        # Views of one storage are kept once.
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    original = attention._capped_attention

    def spy(query, key, *rest):
        made.append(query.shape[1] * query.shape[2] * key.shape[2])
        return original(query, key, *rest)

    with pytest.MonkeyPatch.context() as patch, saved_tensors_hooks(keep, lambda tensor: tensor):
        patch.setattr(attention, "_capped_attention", spy)
        found = packed(inputs, plan, None, 5.0)
    # Blocks of 16 queries, 32 of them; all scores of both heads would be 2 * 512 * 512 numbers of 4 bytes.
    assert len(made) == 32 and max(made) == 2 * 16 * length
    assert 0 < sum(kept.values()) < 2 * length * length * 4 / 8
    found.sum().backward()


def test_dropout_of_soft_capped_attention_is_the_same_when_it_is_made_again() -> None:
    inputs, plan = states(), AttentionPlan(SEGMENTS, torch.device("cpu"), max_scores=200)

    def run() -> torch.Tensor:
        torch.manual_seed(3)
        return packed(inputs, plan, None, 0.7, dropout=0.5)

    found = run()
    assert not torch.allclose(found, packed(inputs, plan, None, 0.7))
    # The output is linear in the values: its directional derivative is a difference, whatever was dropped.
    direction = torch.randn_like(inputs[2])
    torch.manual_seed(99)
    slope = (torch.autograd.grad(found.sum(), inputs[2])[0] * direction).sum()
    with torch.no_grad():
        inputs[2] += direction
    torch.testing.assert_close(run().sum() - found.sum(), slope, rtol=0, atol=1e-10)


def test_bfloat16_scores_are_capped_in_float32() -> None:
    inputs, plan = states(), AttentionPlan(SEGMENTS, torch.device("cpu"))
    half = [part.detach().bfloat16() for part in inputs]
    expected = dense(*(part.double() for part in half), window=3, softcap=0.7, scaling=0.8)
    found = packed(half, plan, 3, 0.7, scaling=0.8)
    assert found.dtype == torch.bfloat16
    assert np.abs((found.double() - expected).detach().numpy()).max() < 3e-2
