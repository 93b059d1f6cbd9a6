"""log sum_v p_v^2: against numbers by hand and float64, on shapes around the tiles."""

from __future__ import annotations

import math

import pytest
import torch

from ds_align.kernels import linear_log_collision, log_collision
from ds_align.kernels import reference as tiles

pytestmark = pytest.mark.usefixtures("implementation")


def expected(logits: torch.Tensor) -> torch.Tensor:
    return logits.double().softmax(-1).square().sum(-1).log()


def test_by_hand() -> None:
    # Two equal words: p = 1/2 each, 1/4 + 1/4 = 1/2. Weights 1 and 3: p = 1/4, 3/4, 1/16 + 9/16 = 5/8.
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3.0)]])
    assert log_collision(logits).tolist() == pytest.approx([math.log(1 / 2), math.log(5 / 8)])
    # One word takes all: 1. The shift of a softmax does not matter, however large.
    assert log_collision(torch.tensor([[1e4, -1e4]])).tolist() == [0.0]


SHAPES = [(1, 1), (3, 5), (tiles.CPU_TILE.tokens + 1, 7), (2, tiles.CPU_TILE.vocabulary + 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("num_tokens", "vocabulary"), SHAPES)
def test_of_logits(num_tokens: int, vocabulary: int, dtype: torch.dtype) -> None:
    logits = 3.0 * torch.randn(num_tokens, vocabulary, generator=torch.Generator().manual_seed(0))
    logits = logits.to(dtype)
    kept = logits.clone()
    found = log_collision(logits)
    torch.testing.assert_close(found.double(), expected(logits), rtol=0, atol=2e-6)
    assert torch.equal(logits, kept), "the logits still belong to the caller"


@pytest.mark.parametrize("extra", [{}, {"softcap": 2.0}, {"scale": 0.5}, {"softcap": 3.0, "scale": 2.0}])
@pytest.mark.parametrize(("num_tokens", "vocabulary"), SHAPES)
def test_of_hidden_states(num_tokens: int, vocabulary: int, extra: dict) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(num_tokens, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocabulary, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    logits = (hidden @ weight.T + bias) * extra.get("scale", 1.0)
    if "softcap" in extra:
        logits = extra["softcap"] * (logits / extra["softcap"]).tanh()
    found = linear_log_collision(hidden, weight, bias, **extra)
    torch.testing.assert_close(found, expected(logits.detach()), rtol=0, atol=1e-12)
    assert not found.requires_grad


def test_no_tokens() -> None:
    assert linear_log_collision(torch.zeros(0, 4), torch.zeros(9, 4)).shape == (0,)
    assert log_collision(torch.zeros(0, 9)).shape == (0,)
