"""logprob_gather against hand-worked numbers, plain Python, and its memory promise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ds_align.kernels import logprob_gather, reference
from tests.kernels.largest_tensor import LargestTensor

pytestmark = pytest.mark.usefixtures("implementation")


def plain_python(row: list[float], label: int) -> float:
    if label < 0:
        return 0.0
    top = max(row)
    return row[label] - top - math.log(math.fsum(math.exp(value - top) for value in row))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CPU_TILE", reference.Tile(3, 5))


def test_uniform_logits_by_hand() -> None:
    # Eight equal logits: log(1/8) = -2.0794415, gradient onehot - 1/8.
    logits = torch.full((1, 8), 3.0, requires_grad=True)
    result = logprob_gather(logits, torch.tensor([2]))
    assert result.item() == pytest.approx(-2.0794415, abs=1e-6)
    result.sum().backward()
    expected = torch.full((1, 8), -0.125)
    expected[0, 2] = 0.875
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 1), (1, 12), (3, 5), (7, 11), (10, 10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_matches_plain_python(tokens: int, vocabulary: int, dtype: torch.dtype) -> None:
    torch.manual_seed(tokens + vocabulary)
    logits = (4 * torch.randn(tokens, vocabulary)).to(dtype)
    labels = torch.randint(-1, vocabulary, (tokens,))
    result = logprob_gather(logits, labels)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = [plain_python(row, label) for row, label in zip(logits.tolist(), labels.tolist(), strict=True)]
    torch.testing.assert_close(
        result.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=2e-6
    )


@pytest.mark.usefixtures("small_tiles")
def test_gradcheck() -> None:
    logits = torch.randn(7, 12, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 11, -100, 4, 5, 9, 10])
    assert torch.autograd.gradcheck(lambda logits: logprob_gather(logits, labels), (logits,))


@pytest.mark.usefixtures("small_tiles")
def test_extreme_and_infinite_logits() -> None:
    row = [-math.inf] * 6 + [1e4, -1e4, 1e4, 0.0]
    logits = torch.tensor([row] * 3 + [[-math.inf] * 10], requires_grad=True)
    result = logprob_gather(logits, torch.tensor([6, 7, 0, -1]))
    # Two winners at 1e4 share the probability: log(1/2); -1e4 is 2e4 below; an entry at -inf has -inf.
    torch.testing.assert_close(
        result.detach(), torch.tensor([-math.log(2.0), -2e4 - math.log(2.0), -math.inf, 0.0])
    )
    result.sum().backward()
    half = torch.tensor([0.0] * 6 + [-0.5, 0.0, -0.5, 0.0])
    for index, label in ((0, 6), (1, 7), (2, 0)):
        torch.testing.assert_close(logits.grad[index], half + torch.eye(10)[label])
    assert torch.equal(logits.grad[3], torch.zeros(10))


def test_the_logits_are_left_as_they_were() -> None:
    logits = torch.randn(20, 30, requires_grad=True)
    before = logits.detach().clone()
    logprob_gather(logits, torch.randint(0, 30, (20,))).sum().backward()
    assert torch.equal(logits.detach(), before)


def test_strided_logits_are_read_where_they_lie() -> None:
    logits = torch.randn(12, 2, 9)
    labels = torch.randint(0, 9, (12,))
    torch.testing.assert_close(
        logprob_gather(logits[:, 1], labels), logprob_gather(logits[:, 1].clone(), labels)
    )


def test_zero_tokens_stay_on_the_graph() -> None:
    logits = torch.zeros(0, 6, requires_grad=True)
    result = logprob_gather(logits, torch.zeros(0, dtype=torch.int32))
    assert result.shape == (0,) and result.grad_fn is not None
    result.sum().backward()
    assert logits.grad.shape == (0, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_never_copied_whole_to_float32(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, implementation: str
) -> None:
    monkeypatch.setattr(reference, "CPU_TILE", reference.Tile(64, 64))
    logits = torch.randn(200, 500).to(dtype).requires_grad_()
    with LargestTensor(((reference.NUM_STATE_ROWS, 200),), dtype=torch.float32) as record:
        logprob_gather(logits, torch.randint(0, 500, (200,))).sum().backward()
    # The compiled kernels read bfloat16 where it lies.
    in_place = implementation == "native" and dtype == torch.bfloat16
    assert record.num_elements == (200 if in_place else 64 * 64)
    assert logits.grad.dtype == dtype


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(1, 2, 3), torch.zeros(2, dtype=torch.long), "flatten leading dimensions"),
        (torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, dtype=torch.long), "expected floating"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), "label 3 is outside the vocabulary; expected 0 to 2"),
        (torch.zeros(2, 3), torch.tensor([True, False]), "expected integers"),
    ],
)
def test_inputs_that_do_not_fit_are_named(logits: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        logprob_gather(logits, labels)
