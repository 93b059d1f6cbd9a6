"""Error against float64, held to that of PyTorch's own path on the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ds_align.kernels import linear_logprob, logprob_gather

pytestmark = pytest.mark.usefixtures("implementation")

# What the online sums may add to the error of a log-softmax in float32: two units in the last place of a
# log-prob.
SPARE = 2e-6


def problem(dtype: torch.dtype, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of standard deviation `spread`."""
    generator = torch.Generator().manual_seed(11)
    hidden = torch.randn(257, 96, generator=generator) * (spread / 96**0.5)
    weight = torch.randn(5003, 96, generator=generator)
    return hidden.to(dtype), weight.to(dtype), torch.randint(0, 5003, (257,), generator=generator)


def picked(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1).gather(1, labels.unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_of_logprobs_and_gradients_under_a_head(dtype: torch.dtype, spread: float) -> None:
    inputs = problem(dtype, spread)
    upstream = torch.linspace(-1, 1, 257)

    def run(function, dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.clone().to(dtype).requires_grad_() for tensor in inputs[:2]]
        result = function(*leaves, inputs[2])
        (result * upstream.to(result.dtype)).sum().backward()
        return [result.detach().double(), *(leaf.grad.double() for leaf in leaves)]

    exact = run(lambda hidden, weight, labels: picked(hidden @ weight.T, labels), torch.float64)
    torchs = run(lambda hidden, weight, labels: picked((hidden @ weight.T).float(), labels), dtype)
    ours = run(linear_logprob, dtype)
    for name, true, other, own in zip(("logps", "hidden", "weight"), exact, torchs, ours, strict=True):
        size = true.abs().max().item()
        error, other_error = ((value - true).abs().max().item() for value in (own, other))
        assert error <= other_error + SPARE * max(1.0, size), name
    assert (ours[0] <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_of_given_logits(dtype: torch.dtype) -> None:
    hidden, weight, labels = problem(torch.float32, 3.0)
    logits = (hidden @ weight.T).to(dtype)
    exact, torchs = picked(logits.double(), labels), picked(logits.float(), labels)
    ours = logprob_gather(logits, labels)
    assert (ours - exact).abs().max() <= (torchs - exact).abs().max() + SPARE
    assert (ours <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_certain_word_has_a_logprob_of_exactly_0_and_never_above(dtype: torch.dtype) -> None:
    # One word far above 40,000 others, at places around the edges of tiles, from huge to hardly above.
    for gap in (1e4, 100.0, 20.0, 9.0, 1.0):
        for place in (0, 1, 1023, 1024, 39_999):
            logits = torch.zeros(1, 40_000, dtype=dtype)
            logits[0, place] = gap
            found = logprob_gather(logits, torch.tensor([place])).item()
            assert found <= 0.0
            if gap >= 100.0:
                assert found == 0.0
