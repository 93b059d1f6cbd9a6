"""What the public functions refuse, and what they take although it looks odd."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from ds_align.kernels import (
    attach_gradient,
    linear_log_collision,
    linear_logprob,
    log_collision,
    logprob_gather,
)

H, V, T = 8, 12, 4


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(T, H, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(V, H, generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([1, 0, -1, 11])


def forward_of(function, point):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(point, torch.ones_like(point)))


@pytest.mark.parametrize(
    "differentiate", [forward_of, lambda f, x: torch.func.jvp(f, (x,), (x,))], ids=["dual", "jvp"]
)
def test_forward_mode_is_an_error_and_no_zero(hidden, weight, differentiate):
    """A custom operator without a forward-mode rule would give a tangent of zeros."""
    with pytest.raises(NotImplementedError, match=r"linear_logprob has no forward-mode derivative"):
        differentiate(lambda h: linear_logprob(h, weight, LABELS), hidden)
    with pytest.raises(NotImplementedError, match=r"linear_logprob has no forward-mode derivative"):
        differentiate(lambda w: linear_logprob(hidden, w, LABELS), weight)
    with pytest.raises(NotImplementedError, match=r"logprob_gather has no forward-mode derivative"):
        differentiate(lambda logits: logprob_gather(logits, LABELS), hidden @ weight.T)


def test_a_level_without_a_tangent_is_no_error(hidden, weight):
    with forward_ad.dual_level():
        found = linear_logprob(hidden, weight, LABELS)
    torch.testing.assert_close(found, linear_logprob(hidden, weight, LABELS))


@pytest.mark.parametrize(
    "labels",
    [LABELS.to(torch.complex64), LABELS.abs().to(torch.uint64), LABELS > 0, LABELS.float()],
    ids=lambda labels: str(labels.dtype),
)
def test_labels_that_are_no_signed_numbers_are_refused(hidden, weight, labels):
    for call in (
        lambda: linear_logprob(hidden, weight, labels),
        lambda: logprob_gather(hidden @ weight.T, labels),
    ):
        with pytest.raises(ValueError, match=rf"labels is {labels.dtype} \(4,\); expected integers \(4,\)"):
            call()


@pytest.mark.parametrize("softcap", [0.0, -2.0, float("nan"), float("inf"), 1e-50, 1e39])
def test_a_soft_cap_that_float32_cannot_hold_is_refused(hidden, weight, softcap):
    with pytest.raises(ValueError, match="softcap=.*expected a number greater than 0"):
        linear_logprob(hidden, weight, LABELS, softcap=softcap)
    with pytest.raises(ValueError, match="linear_log_collision: softcap=.*expected a number greater than 0"):
        linear_log_collision(hidden, weight, softcap=softcap)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_a_scale_that_is_not_finite_is_refused(hidden, weight, scale):
    with pytest.raises(ValueError, match="scale=.*expected a finite number"):
        linear_logprob(hidden, weight, LABELS, scale=scale)


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_a_bias_may_lie_anywhere(hidden, weight, impl):
    table = torch.randn(V, 3, generator=torch.Generator().manual_seed(2))
    for bias in (table[:, 0], table[:1, 0].expand(V)):
        found = linear_logprob(hidden, weight, LABELS, bias, impl=impl)
        torch.testing.assert_close(found, linear_logprob(hidden, weight, LABELS, bias.clone(), impl=impl))


@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize("cap", [5.0, 30.0, 41.0, 47.0, 49.0, 50.0, 53.0])
def test_a_saturated_cap_has_no_slope(impl, cap):
    """tanh is 1 to the last bit, so that no input moves a logit."""
    hidden = torch.full((2, H), 100.0, requires_grad=True)
    weight = (100.0 * torch.tensor([1.0, -1.0]).repeat(V // 2)).unsqueeze(1).repeat(1, H).requires_grad_()
    linear_logprob(hidden, weight, torch.tensor([0, 1]), softcap=cap, impl=impl).sum().backward()
    assert not hidden.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_logits_that_share_their_places_keep_them(impl):
    """Rows of an expanded tensor, and rows that overlap: one place cannot hold two gradients."""
    labels = torch.tensor([1, 2, 3])

    def gradients(reuse_logits):
        row = torch.randn(1, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
        band = torch.randn(14, generator=torch.Generator().manual_seed(0)).requires_grad_()
        logprob_gather((row * 1).expand(3, 5), labels, impl, reuse_logits=reuse_logits).sum().backward()
        rows = (band * 1).as_strided((3, 8), (3, 1))
        logprob_gather(rows, labels, impl, reuse_logits=reuse_logits).sum().backward()
        return row.grad, band.grad

    for reused, kept in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(reused, kept)


def test_a_leaf_is_not_overwritten():
    logits = torch.randn(3, 5, requires_grad=True)
    with pytest.raises(ValueError, match="reuse_logits=True would write the gradient over a leaf"):
        logprob_gather(logits, torch.tensor([1, 2, 3]), reuse_logits=True)


def test_logits_that_are_no_matrix_are_refused(hidden, weight):
    for logits in (torch.randn(5), torch.ones(2, 5, dtype=torch.long)):
        with pytest.raises(ValueError, match="log_collision: logits is"):
            log_collision(logits)
    with pytest.raises(ValueError, match="linear_log_collision: bias has shape"):
        linear_log_collision(hidden, weight, torch.randn(1))
    with pytest.raises(ValueError, match="linear_log_collision: hidden .* and weight .* do not fit"):
        linear_log_collision(hidden, weight[:, :3])


def test_a_derivative_of_other_tokens_is_refused(hidden):
    with pytest.raises(ValueError, match="attach_gradient: hidden .* do not fit"):
        attach_gradient(hidden, torch.zeros(T - 1), torch.zeros(T, H))
