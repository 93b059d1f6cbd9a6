"""linear_logprob against hand-worked numbers, float64 definitions written another way, and its memory
promise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ds_align.kernels import linear_logprob, reference
from tests.kernels.largest_tensor import LargestTensor

pytestmark = pytest.mark.usefixtures("implementation")


def naive(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """The definition with the whole matrix, in float64, differentiated by autograd."""
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    if scale is not None:
        logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    picked = torch.log_softmax(logits, dim=-1)[torch.arange(len(labels)), labels.clamp(min=0)]
    return torch.where(labels < 0, torch.zeros_like(picked), picked)


def problem(
    tokens: int, vocabulary: int, width: int, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens * 1000 + vocabulary)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    if tokens > 3:
        labels[1::4] = -100
    return hidden, weight, bias, labels


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 3 tokens x 5 entries, so that small problems cross many edges."""
    monkeypatch.setattr(reference, "CPU_TILE", reference.Tile(3, 5))


def gradients(function, weights: Tensor, *inputs: Tensor, **options) -> tuple[Tensor, list[Tensor]]:
    leaves = [tensor.clone().requires_grad_(tensor.is_floating_point()) for tensor in inputs]
    value = function(*leaves, **options)
    (value * weights.to(value.dtype)).sum().backward()
    return value.detach(), [leaf.grad for leaf in leaves if leaf.is_floating_point()]


def test_two_words_by_hand() -> None:
    # hidden (1, 2); words (1, 0), (0, 1): logits 1 and 2. log p(second) = 2 - log(e + e^2) = -log(1 + e^-1).
    result = linear_logprob(torch.tensor([[1.0, 2.0]]), torch.eye(2), torch.tensor([1]))
    assert result.dtype == torch.float32 and result.shape == (1,)
    assert result.item() == pytest.approx(-math.log1p(math.exp(-1.0)), abs=1e-6)


def test_gradient_of_two_words_by_hand() -> None:
    # p(second) = 1/(1 + e^-1) = 0.7310586; d logp / d logits = (-p0, 1 - p1) = (-0.2689414, 0.2689414).
    # With words (1, 0), (0, 1) the same numbers are d logp / d hidden; d logp / d weight[v] = d logit_v * (1,
    # 2).
    hidden = torch.tensor([[1.0, 2.0]], requires_grad=True)
    weight = torch.eye(2, requires_grad=True)
    linear_logprob(hidden, weight, torch.tensor([1])).sum().backward()
    torch.testing.assert_close(hidden.grad, torch.tensor([[-0.2689414, 0.2689414]]))
    torch.testing.assert_close(weight.grad, torch.tensor([[-0.2689414, -0.5378828], [0.2689414, 0.5378828]]))


def test_bias_scale_and_softcap_by_hand() -> None:
    # raw = (1*1 + 1, 1*2 - 1) = (2, 1); times 3: (6, 3); 4 tanh(z/4): (4 tanh 1.5, 4 tanh 0.75).
    first, second = 4 * math.tanh(1.5), 4 * math.tanh(0.75)
    expected = first - math.log(math.exp(first) + math.exp(second))
    weight, bias = torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, -1.0])
    result = linear_logprob(torch.ones(1, 1), weight, torch.tensor([0]), bias, 4.0, scale=3.0)
    assert result.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 1), (1, 13), (3, 5), (4, 11), (10, 10), (7, 23)])
@pytest.mark.parametrize("options", [{}, {"scale": 0.25}, {"softcap": 2.0}, {"scale": -1.5, "softcap": 3.0}])
@pytest.mark.parametrize("with_bias", [False, True])
def test_matches_the_definition_on_odd_sizes(
    tokens: int, vocabulary: int, options: dict, with_bias: bool
) -> None:
    hidden, weight, bias, labels = problem(tokens, vocabulary, 6)
    inputs = (hidden, weight, labels, bias) if with_bias else (hidden, weight, labels)
    upstream = torch.linspace(-1.0, 2.0, tokens)
    expected, expected_grads = gradients(naive, upstream, *inputs, **options)
    result, grads = gradients(linear_logprob, upstream, *inputs, **options)
    torch.testing.assert_close(result, expected.float(), rtol=1e-5, atol=1e-5)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    "trainable", ["hidden", "weight", "bias", "hidden weight bias", "hidden bias", "weight bias"]
)
def test_gradcheck_for_every_choice_of_trainable_input(trainable: str) -> None:
    hidden, weight, bias, labels = problem(5, 12, 3, dtype=torch.float64)
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        tensor.requires_grad_(name in trainable.split())

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_logprob(hidden, weight, labels, bias, 2.5, scale=0.7)

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_head_gives_bit_equal_logprobs_and_the_same_gradient(dtype: torch.dtype) -> None:
    hidden, weight, _, labels = problem(530, 4100, 16, dtype=dtype)
    with torch.no_grad():
        scored = linear_logprob(hidden, weight, labels)
    results = []
    for head_is_frozen in (True, False):
        leaf = hidden.clone().requires_grad_()
        value = linear_logprob(leaf, weight.clone().requires_grad_(not head_is_frozen), labels)
        value.sum().backward()
        results.append(leaf.grad)
        assert torch.equal(value.detach(), scored)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(results[0], results[1], rtol=tolerance, atol=tolerance)


def test_frozen_inputs_get_no_gradient() -> None:
    hidden, weight, bias, labels = problem(4, 7, 3)
    weight.requires_grad_()
    linear_logprob(hidden, weight, labels, bias).sum().backward()
    assert hidden.grad is None and bias.grad is None and weight.grad is not None
    assert not linear_logprob(hidden, weight.detach(), labels, bias).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_computed_in_float32(dtype: torch.dtype) -> None:
    hidden, weight, bias, labels = problem(600, 4200, 8, dtype=dtype)
    upstream = torch.linspace(0.0, 1.0, 600)
    expected, expected_grads = gradients(naive, upstream, hidden, weight, labels, bias)
    result, grads = gradients(linear_logprob, upstream, hidden, weight, labels, bias)
    assert result.dtype == torch.float32
    # Inputs are exact in float64, so all that is left is float32 rounding: far below the dtype's own 4e-3.
    torch.testing.assert_close(result, expected.float(), rtol=1e-5, atol=1e-5)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert grad.dtype == dtype
        # Both gradients were rounded once, to the model's dtype: they differ by one unit in the last place at
        # most.
        torch.testing.assert_close(grad, expected_grad, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_float64_stays_float64() -> None:
    hidden, weight, bias, labels = problem(9, 30, 5, dtype=torch.float64)
    result = linear_logprob(hidden, weight, labels, bias)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, naive(hidden, weight, labels, bias), rtol=1e-13, atol=1e-13)


def test_mixed_dtypes() -> None:
    hidden, weight, _, labels = problem(9, 30, 5)
    leaf = weight.bfloat16().requires_grad_()
    result = linear_logprob(hidden, leaf, labels)
    torch.testing.assert_close(result, naive(hidden, leaf, labels).float(), rtol=1e-5, atol=1e-5)
    result.sum().backward()
    assert leaf.grad.dtype == torch.bfloat16


def test_autocast_does_not_round_the_products() -> None:
    hidden, weight, _, labels = problem(20, 50, 64)
    weight.requires_grad_()
    plain = linear_logprob(hidden, weight, labels)
    (expected,) = torch.autograd.grad(plain.sum(), weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = linear_logprob(hidden, weight, labels)
        (grad,) = torch.autograd.grad(result.sum(), weight)
    assert torch.equal(result, plain) and torch.equal(grad, expected)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("head_is_frozen", [True, False])
def test_ignored_labels_have_neither_value_nor_gradient(head_is_frozen: bool) -> None:
    hidden, weight, _, _ = problem(8, 9, 4)
    labels = torch.tensor([-1, 2, -100, 8, -1, -1, -1, 0])
    hidden.requires_grad_()
    weight.requires_grad_(not head_is_frozen)
    result = linear_logprob(hidden, weight, labels)
    result.sum().backward()
    ignored = labels < 0
    assert torch.equal(result[ignored], torch.zeros(5))
    assert torch.equal(hidden.grad[ignored], torch.zeros(5, 4))
    assert (hidden.grad[~ignored].abs().amax(dim=1) > 0).all()
    if head_is_frozen:
        return
    kept = weight.detach().clone().requires_grad_()
    linear_logprob(hidden.detach()[~ignored], kept, labels[~ignored]).sum().backward()
    torch.testing.assert_close(weight.grad, kept.grad)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("head_is_frozen", [True, False])
def test_extreme_logits(head_is_frozen: bool) -> None:
    # Logits of +-1e4: the winner's log-prob is 0, the other's -2e4, with no overflow on the way.
    weight = torch.tensor([[-1e4]] * 6 + [[1e4]] + [[0.0]] * 4, requires_grad=not head_is_frozen)
    hidden = torch.ones(2, 1, requires_grad=True)
    result = linear_logprob(hidden, weight, torch.tensor([6, 0]))
    torch.testing.assert_close(result.detach(), torch.tensor([0.0, -2e4]))
    # p is all on entry 6: d/dh = w[label] - w[6] = 0 and -2e4.
    result.sum().backward()
    torch.testing.assert_close(hidden.grad, torch.tensor([[0.0], [-2e4]]))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("head_is_frozen", [True, False])
def test_entries_at_minus_infinity(head_is_frozen: bool) -> None:
    # A bias of -inf takes words out, here the whole first tile and one more: the rest share the probability.
    hidden, weight, bias, _ = problem(4, 12, 3)
    bias[:5] = -math.inf
    bias[7] = -math.inf
    labels = torch.tensor([5, 6, 11, 9])
    kept = torch.tensor([5, 6, 8, 9, 10, 11])
    expected_hidden = hidden.clone().requires_grad_()
    place = torch.tensor([0, 1, 5, 3])
    expected = naive(expected_hidden, weight[kept], place, bias[kept])
    expected.sum().backward()
    hidden.requires_grad_()
    weight.requires_grad_(not head_is_frozen)
    result = linear_logprob(hidden, weight, labels, bias)
    result.sum().backward()
    torch.testing.assert_close(result.detach(), expected.detach().float())
    torch.testing.assert_close(hidden.grad, expected_hidden.grad)
    forbidden = linear_logprob(hidden, weight, torch.tensor([7, 7, 7, 7]), bias)
    assert (forbidden == -math.inf).all()


@pytest.mark.parametrize("head_is_frozen", [True, False])
def test_zero_tokens_stay_on_the_graph(head_is_frozen: bool) -> None:
    hidden = torch.zeros(0, 4, requires_grad=True)
    weight = torch.randn(6, 4).requires_grad_(not head_is_frozen)
    bias = torch.zeros(6).requires_grad_(not head_is_frozen)
    result = linear_logprob(hidden, weight, torch.zeros(0, dtype=torch.long), bias)
    assert result.shape == (0,) and result.dtype == torch.float32 and result.grad_fn is not None
    result.sum().backward()
    assert hidden.grad.shape == (0, 4)
    if not head_is_frozen:
        assert torch.equal(weight.grad, torch.zeros(6, 4)) and torch.equal(bias.grad, torch.zeros(6))


@pytest.mark.parametrize("mode", ["scoring", "frozen head", "trainable head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_one_tile(
    monkeypatch: pytest.MonkeyPatch, mode: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(reference, "CPU_TILE", reference.Tile(64, 64))
    tokens, vocabulary, width = 300, 1000, 5
    hidden, weight, _, labels = problem(tokens, vocabulary, width, dtype=dtype)
    hidden.requires_grad_(mode != "scoring")
    weight.requires_grad_(mode == "trainable head")
    # The inputs, their gradients and views of them; every other tensor is bounded by the tile.
    shapes = ((vocabulary, width), (width, vocabulary))
    with LargestTensor(shapes) as record:
        result = linear_logprob(hidden, weight, labels, None, 5.0, scale=0.5)
        if mode != "scoring":
            result.sum().backward()
    assert record.num_elements == 64 * 64
    assert record.num_elements < tokens * vocabulary / 50


def test_the_record_of_the_largest_tensor_sees_a_whole_matrix() -> None:
    hidden, weight, _, labels = problem(300, 1000, 5)
    with LargestTensor(()) as record:
        naive(hidden, weight, labels)
    assert record.num_elements == 300 * 1000


def test_the_shipped_tile_is_far_below_a_real_matrix() -> None:
    tile = reference.CPU_TILE
    assert tile.tokens * tile.vocabulary * 4 <= 2**23
    hidden, weight, _, labels = problem(1030, 8200, 4)
    weight.requires_grad_()
    with LargestTensor(()) as record:
        linear_logprob(hidden, weight, labels).sum().backward()
    assert record.num_elements == tile.tokens * tile.vocabulary


def test_the_weight_itself_is_saved_and_read_again_in_the_backward() -> None:
    # ZeRO-3 swaps the storage between forward and backward; a kept view or copy would see the old numbers.
    hidden, weight, _, labels = problem(4, 6, 3)
    hidden.requires_grad_()
    parameter = torch.nn.Parameter(weight.clone())
    result = linear_logprob(hidden, parameter, labels)
    assert any(saved is parameter for saved in result.grad_fn.saved_tensors)
    gathered = parameter.data
    parameter.data = torch.empty(0)
    parameter.data = gathered.clone()
    gathered.fill_(math.nan)
    result.sum().backward()
    expected_hidden = hidden.detach().clone().requires_grad_()
    naive(expected_hidden, weight, labels).sum().backward()
    torch.testing.assert_close(hidden.grad, expected_hidden.grad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 6])}, "label 6 is outside the vocabulary; expected 0 to 5"),
        ({"labels": torch.tensor([0.0, 1.0])}, "expected integers"),
        ({"labels": torch.tensor([0])}, "expected integers"),
        ({"hidden": torch.zeros(1, 2, 3)}, "do not fit"),
        ({"weight": torch.zeros(0)}, "do not fit"),
        ({"weight": torch.zeros(6, 3, dtype=torch.long)}, "expected floating"),
        ({"bias": torch.zeros(5)}, "bias has shape"),
        ({"bias": torch.zeros(6, dtype=torch.long)}, "dtype torch.int64"),
        ({"softcap": 0.0}, "softcap=0.0"),
        ({"impl": "cuda"}, "impl='cuda'; expected one of auto, native, torch"),
        ({"logits_budget_mb": -1}, "logits_budget_mb=-1"),
        ({"weight": torch.zeros(6, 3, device="meta")}, "weight is on meta; expected cpu"),
        ({"labels": torch.zeros(2, dtype=torch.long, device="meta")}, "labels is on meta; expected cpu"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change: dict, message: str) -> None:
    arguments = {
        "hidden": torch.zeros(2, 3),
        "weight": torch.zeros(6, 3),
        "labels": torch.tensor([0, 5]),
    } | change
    with pytest.raises(ValueError, match=message):
        linear_logprob(**arguments)
