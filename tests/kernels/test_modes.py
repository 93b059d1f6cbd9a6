"""What the modes of linear_logprob and logprob_gather promise beside right numbers: the same bits, how much
memory, who owns what in the backward.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ds_align.kernels import (
    attach_gradient,
    linear_log_collision,
    linear_logprob,
    linear_scores,
    logprob_gather,
    reference,
)
from tests.kernels.largest_tensor import LargestTensor

pytestmark = pytest.mark.usefixtures("implementation")

TOKENS, VOCABULARY, WIDTH = 600, 2500, 24
MATRIX_MB = math.ceil(TOKENS * VOCABULARY * 4 / 2**20)


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype)
    bias = torch.randn(VOCABULARY, generator=generator).to(dtype)
    labels = torch.randint(-1, VOCABULARY, (TOKENS,), generator=generator)
    return hidden, weight, labels, bias


def trained(budget: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Log-probs and the three gradients."""
    hidden, weight, labels, bias = problem(dtype)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    result = linear_logprob(hidden, weight, labels, bias, 20.0, 0.5, logits_budget_mb=budget)
    (result * torch.linspace(-1, 1, TOKENS)).sum().backward()
    return [result.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [3, MATRIX_MB, 10_000])
def test_kept_logits_change_no_bit(budget: int, dtype: torch.dtype) -> None:
    for kept, recomputed in zip(trained(budget, dtype), trained(0, dtype), strict=True):
        assert torch.equal(kept, recomputed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_0_margin_is_exactly_0(dtype: torch.dtype) -> None:
    # The policy in any of its modes against a reference that scores without gradients.
    hidden, weight, labels, bias = problem(dtype)
    with torch.no_grad():
        reference_logps = linear_logprob(hidden, weight, labels, bias, 20.0, 0.5)
    hidden.requires_grad_()
    frozen = linear_logprob(hidden, weight, labels, bias, 20.0, 0.5)
    for policy_logps in (frozen.detach(), trained(0, dtype)[0], trained(10_000, dtype)[0]):
        assert torch.equal(policy_logps - reference_logps, torch.zeros(TOKENS))


@pytest.mark.parametrize(
    ("budget", "largest"),
    [
        (0, reference.CPU_TILE.tokens * reference.CPU_TILE.vocabulary),
        (3, 3 * 2**18),
        (10_000, TOKENS * VOCABULARY),
    ],
)
def test_the_budget_bounds_what_is_kept(budget: int, largest: int) -> None:
    hidden, weight, labels, _ = problem()
    weight.requires_grad_()
    with LargestTensor() as record:
        linear_logprob(hidden, weight, labels, logits_budget_mb=budget).sum().backward()
    assert record.num_elements == max(largest, reference.CPU_TILE.tokens * reference.CPU_TILE.vocabulary)


def test_nothing_is_kept_without_a_backward_or_with_a_frozen_head() -> None:
    hidden, weight, labels, _ = problem()
    tile = reference.CPU_TILE.tokens * reference.CPU_TILE.vocabulary
    for needs_gradient in (False, True):
        with LargestTensor() as record:
            linear_logprob(hidden.requires_grad_(needs_gradient), weight, labels, logits_budget_mb=10_000)
        assert record.num_elements == tile


@pytest.mark.parametrize("budget", [0, 3, 10_000])
def test_a_second_backward_over_a_retained_graph_gives_the_same(budget: int) -> None:
    hidden, weight, labels, _ = problem()
    weight.requires_grad_()
    total = linear_logprob(hidden, weight, labels, logits_budget_mb=budget).sum()
    (first,) = torch.autograd.grad(total, weight, retain_graph=True)
    (second,) = torch.autograd.grad(total, weight)
    assert torch.equal(first, second)


@pytest.mark.parametrize("trains_head", [False, True])
def test_differentiating_twice_is_an_error(trains_head: bool) -> None:
    hidden, weight, labels, _ = problem()
    leaf = hidden.requires_grad_()
    total = linear_logprob(leaf, weight.requires_grad_(trains_head), labels).sum()
    (grad,) = torch.autograd.grad(total, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered|does not require grad"):
        grad.sum().backward()


def test_statistics_come_from_the_same_walk() -> None:
    hidden, weight, labels, bias = problem()
    options = {"bias": bias, "softcap": 15.0, "scale": 0.5}
    for frozen in (True, False):
        scores = linear_scores(
            hidden.requires_grad_(),
            weight.requires_grad_(not frozen),
            labels,
            **options,
            with_mean_logits=True,
            with_collision=True,
        )
        logits = 15.0 * torch.tanh((hidden.double() @ weight.double().T + bias.double()) * 0.5 / 15.0)
        expected = torch.log_softmax(logits, dim=-1)
        torch.testing.assert_close(scores.mean_logits.double(), logits.mean(dim=-1), rtol=0, atol=1e-6)
        collision = expected.mul(2).exp().sum(dim=-1).log()
        torch.testing.assert_close(scores.log_collision.double(), collision, rtol=0, atol=3e-6)
        assert not scores.mean_logits.requires_grad and not scores.log_collision.requires_grad
        assert scores.logprobs.requires_grad and scores.derivative is None
    apart = linear_log_collision(hidden, weight, **options)
    assert torch.equal(apart, scores.log_collision)


def test_an_attached_gradient_is_that_of_the_frozen_head() -> None:
    hidden, weight, labels, bias = problem()
    upstream = torch.linspace(-2, 1, TOKENS)
    leaves = [hidden.clone().requires_grad_() for _ in range(2)]
    whole = linear_logprob(leaves[0], weight, labels, bias, 20.0, 0.5)
    whole.backward(upstream)
    with torch.no_grad():
        scores = linear_scores(
            leaves[1], weight, labels, bias=bias, softcap=20.0, scale=0.5, with_derivative=True
        )
    assert not scores.logprobs.requires_grad
    weight.fill_(math.nan)  # as good as gone: the backward must not read it
    attached = attach_gradient(leaves[1], scores.logprobs, scores.derivative)
    attached.backward(upstream)
    assert torch.equal(attached, whole) and torch.equal(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reused_logits_hold_the_gradient(dtype: torch.dtype) -> None:
    hidden, weight, labels, _ = problem()
    gradients = []
    for reuse_logits in (False, True):
        leaf = hidden.clone().requires_grad_()
        logits = (leaf @ weight.T).to(dtype)
        logits.retain_grad()
        before = logits.detach().clone()
        logprob_gather(logits, labels, reuse_logits=reuse_logits).sum().backward()
        gradients.append((logits.grad, leaf.grad))
        assert torch.equal(logits.detach(), before) is not reuse_logits
    for kept, reused in zip(*gradients, strict=True):
        assert torch.equal(kept, reused)
    assert torch.equal(logits.detach(), gradients[1][0])


def test_reuse_of_logits_that_another_operation_needs_is_an_error() -> None:
    leaf = torch.randn(5, 7, requires_grad=True)
    total = logprob_gather(leaf.exp(), torch.arange(5), reuse_logits=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_reused_logits_serve_one_backward_only() -> None:
    logits = torch.randn(5, 7, requires_grad=True) * 1.0
    total = logprob_gather(logits, torch.arange(5), reuse_logits=True).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
