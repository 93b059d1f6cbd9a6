"""Weights in 8 and 4 bits: the error that the formula allows, in any shape and precision."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ds_align.models.quantized import (
    QuantizedLinear,
    dequantize,
    group_size,
    quantize,
    quantize_linears,
)
from tests.models.conftest import make_model

SHAPES = [(1, 1), (3, 5), (7, 64), (4, 96), (64, 128), (5, 6)]


def steps_of(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The step of each weight's group, by hand."""
    groups = weight.reshape(-1, group_size(weight.shape[1]))
    spread = groups.max(dim=1, keepdim=True).values - groups.min(dim=1, keepdim=True).values
    return (spread / (2**bits - 1)).expand_as(groups).reshape(weight.shape)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_weight_moves_by_more_than_half_a_step(shape: tuple[int, int], bits: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape) * 3 + 1
    found = dequantize(quantize(weight, bits), shape, bits, torch.float32)
    assert ((found - weight).abs() <= steps_of(weight, bits) / 2 + 1e-6).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_on_the_grid_and_equal_weights_are_exact(bits: int) -> None:
    top = 2**bits - 1
    grid = torch.arange(64).remainder(top + 1).float()
    grid[-1] = top
    weight = torch.stack([grid * 0.5 - 2.0, torch.full((64,), -3.25)])
    assert torch.equal(dequantize(quantize(weight, bits), (2, 64), bits, torch.float32), weight)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_bytes_are_those_of_the_codes_and_eight_a_group(bits: int) -> None:
    packed = quantize(torch.randn(32, 128), bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == 32 * 128 * bits // 8 + 8 * 32 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_layer_computes_with_its_dequantized_weight(dtype: torch.dtype, bits: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 10, bias=has_bias).to(dtype)
    packed = quantize(linear.weight, bits)
    layer = QuantizedLinear(packed, linear, bits, dtype)
    assert layer.packed.dtype == dtype
    weight = dequantize(packed, (10, 96), bits, dtype)
    hidden = torch.randn(3, 5, 96).to(dtype)
    expected = nn.functional.linear(hidden, weight, linear.bias)
    torch.testing.assert_close(layer(hidden), expected, rtol=2e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-2)
    assert not any(parameter.requires_grad for parameter in [layer.packed])


@pytest.mark.parametrize("num_inputs", [1, 2, 3, 5, 7])
def test_a_layer_whose_bytes_do_not_fill_a_number_is_padded(num_inputs: int) -> None:
    linear = nn.Linear(num_inputs, 3)
    for bits in (8, 4):
        packed = quantize(linear.weight, bits)
        for dtype in (torch.float32, torch.float64):
            layer = QuantizedLinear(packed, linear.to(dtype), bits, dtype)
            weight = dequantize(packed, (3, num_inputs), bits, dtype)
            hidden = torch.eye(num_inputs, dtype=dtype)
            torch.testing.assert_close(layer(hidden), weight.T + linear.bias, rtol=1e-6, atol=1e-6)
        linear = linear.float()


@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_every_linear_layer_but_the_head_is_replaced(model_type: str) -> None:
    model = make_model(model_type)
    before = copy.deepcopy(model)
    seen = []
    share = quantize_linears(model, 8, torch.float32, whole=lambda weight: weight.detach(), adopt=seen.append)
    names = {name for name, module in before.named_modules() if type(module) is nn.Linear} - {"lm_head"}
    assert {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)} == names
    assert len(seen) == len(names) > 10
    linear = sum(before.get_submodule(name).weight.numel() for name in names)
    assert share == pytest.approx(linear / sum(p.numel() for p in before.parameters()))
    for name in names:
        layer = model.get_submodule(name)
        with torch.no_grad():
            weight = dequantize(layer.packed.view(torch.uint8), layer.shape, 8, torch.float32)
            before.get_submodule(name).weight.copy_(weight)
    ids = torch.randint(0, 30, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before(ids).logits, rtol=1e-5, atol=1e-5)
