"""Packed, prefix-shared and padded batches against every row run alone through the plain model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ds_align.batch import Layout
from ds_align.models import PolicyModel
from ds_align.packing import Group, build_batch


@pytest.mark.parametrize("layout", list(Layout))
def test_tied_embeddings(bench, layout: Layout) -> None:
    model = bench.model("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    found = bench.score_packed(PolicyModel(model, layout), bench.one_pack(bench.table, layout))
    bench.assert_same(found, bench.alone("llama", tie_word_embeddings=True))


@pytest.mark.parametrize("layout", list(Layout))
def test_a_head_of_another_class_takes_the_models_own_logits(bench, layout: Layout) -> None:
    class OtherHead(nn.Linear):
        pass

    model = bench.model("llama")
    model.lm_head.__class__ = OtherHead
    policy = PolicyModel(model, layout)
    assert not policy.fused_head
    bench.assert_same(bench.score_packed(policy, bench.one_pack(bench.table, layout)), bench.alone("llama"))


def test_gpt2_runs_padded_through_its_own_logits(bench) -> None:
    policy = PolicyModel(bench.model("gpt2"), Layout.PADDED, "sdpa")
    assert not policy.fused_head
    found = bench.score_packed(policy, bench.one_pack(bench.table, Layout.PADDED))
    expected = bench.alone("gpt2")
    for ours, theirs in zip(found.token_logps, expected.token_logps, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    whole, theirs = (
        torch.cat([gradient.flatten() for gradient in scored.gradients.values()])
        for scored in (found, expected)
    )
    # Key biases have no effect without rotary positions: their gradient is rounding, so all is one vector.
    assert (whole - theirs).norm() / theirs.norm() < 1e-5


def test_a_completion_that_stands_twice_in_a_pack(bench) -> None:
    # Two parts of a split group may meet in one pack: the completion that both need is there twice.
    table = bench.table
    assert table.members[0][0] == table.members[2][0]
    groups = [Group(0, table.members[number], (number,), 0) for number in (0, 2)]
    batch = build_batch(table, groups, range(6), Layout.SHARED)
    policy = PolicyModel(bench.model("llama"), Layout.SHARED)
    token_logps, _ = policy(batch)
    totals = torch.zeros(4, dtype=torch.float64).index_add(0, batch.completion_index, token_logps.double())
    expected = torch.stack([logps.sum() for logps in bench.alone("llama").token_logps])
    torch.testing.assert_close(totals[batch.members], expected[torch.tensor(table.members)[[0, 2]]])


@pytest.mark.parametrize("layout", list(Layout))
def test_mean_logits_are_the_mean_over_the_vocabulary(bench, layout: Layout) -> None:
    plain = bench.model("granite")
    batch = bench.one_pack(bench.table, layout)
    _, mean_logits = PolicyModel(copy.deepcopy(plain), layout)(batch)
    assert not mean_logits.requires_grad
    parts = mean_logits.split(batch.completion_lengths.tolist())
    for unit, part in zip(batch.units.tolist(), parts, strict=True):
        prompt, completion = bench.table.prompts[bench.table.prompt_of[unit]], bench.table.completions[unit]
        row = torch.tensor([*prompt, *completion])[None]
        with torch.no_grad():
            logits = plain(input_ids=row).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(part, logits.mean(dim=-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", list(Layout))
def test_a_dummy_pack_gives_every_parameter_a_gradient_of_zero(bench, layout: Layout) -> None:
    policy = PolicyModel(bench.model("llama"), layout)
    batch = build_batch(bench.table, (), (), layout)
    assert batch.num_completions == batch.num_preferences == batch.num_tokens == 0
    assert batch.members.shape == (0, 2) and batch.rows == ()
    token_logps, mean_logits = policy(batch)
    assert token_logps.shape == mean_logits.shape == (0,)
    token_logps.sum().backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_dropout_is_switched_off_everywhere(bench) -> None:
    policy = PolicyModel(bench.model("granite", attention_dropout=0.5), Layout.SHARED).train()
    batch = bench.one_pack(bench.table, Layout.SHARED)
    first, second = policy(batch)[0], policy(batch)[0]
    assert not torch.equal(first, second)
    policy.disable_dropout()
    assert torch.equal(policy(batch)[0], policy(batch)[0])
