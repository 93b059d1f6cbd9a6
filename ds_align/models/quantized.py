"""Frozen linear layers whose weights take 8 or 4 bits, computed in the model's own precision.

A group of weights along the input is held as integers from its least to its greatest,
w = least + step * code with step = (greatest - least) / (2^bits - 1), so that a weight moves by at most half
a step. The embedding, the LM head, norms and biases stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

GROUP_SIZE = 64


def quantize(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes, steps and least values of a weight [out, in] as one flat uint8 tensor. bits: 8 or 4."""
    groups = weight.detach().float().reshape(-1, group_size(weight.shape[1]))
    least, greatest = groups.aminmax(dim=1, keepdim=True)
    step = (greatest - least) / (2**bits - 1)
    # A group of equal weights has no step; any code then stands for its one value.
    codes = ((groups - least) / step.where(step > 0, 1.0)).round_().to(torch.uint8).flatten()
    if bits == 4:
        codes = F.pad(codes, (0, codes.numel() % 2))
        codes = codes[0::2] << 4 | codes[1::2]
    # All bytes together must be whole numbers of any dtype, whatever the size of the layer.
    codes = F.pad(codes, (0, -codes.numel() % 8))
    return torch.cat([codes, step.flatten().view(torch.uint8), least.flatten().view(torch.uint8)])


def dequantize(packed: torch.Tensor, shape: tuple[int, int], bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] in dtype from what quantize made of it."""
    num_weights, num_groups = math.prod(shape), math.prod(shape) // group_size(shape[1])
    codes, numbers = packed[: -8 * num_groups], packed[-8 * num_groups :].view(torch.float32)
    if bits == 4:
        codes = torch.stack([codes >> 4, codes & 15], dim=1).flatten()
    step, least = numbers.view(2, num_groups, 1)
    groups = codes[:num_weights].view(num_groups, -1)
    return torch.addcmul(least, groups.to(torch.float32), step).view(shape).to(dtype)


def group_size(num_inputs: int) -> int:
    """Weights that share a step: 64, or the largest power of two that divides the inputs."""
    return math.gcd(num_inputs, GROUP_SIZE)


class QuantizedLinear(nn.Module):
    """A linear layer with a quantised weight; only for inference.

    The bytes are held under the model's own dtype, as a bit pattern: ZeRO-3 gathers the parameters of a model
    as one dtype. Nothing may compute with them but dequantize.
    """

    def __init__(self, packed: torch.Tensor, linear: nn.Linear, bits: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = (linear.out_features, linear.in_features)
        self.bits = bits
        self.packed = nn.Parameter(packed.view(dtype), requires_grad=False)
        self.bias = linear.bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., in] to [..., out]."""
        weight = dequantize(self.packed.view(torch.uint8), self.shape, self.bits, hidden.dtype)
        # Not F.linear: ZeRO-3 replaces it by one that keeps its weight for a backward.
        output = hidden @ weight.T
        return output if self.bias is None else output + self.bias


def quantize_linears(
    model: nn.Module,
    bits: int,
    dtype: torch.dtype,
    *,
    whole: Callable[[nn.Parameter], torch.Tensor],
    adopt: Callable[[nn.Module], None],
) -> float:
    """Replaces every linear layer but the LM head; returns the share of the model's weights that it held.

    whole: a copy of a parameter that may be partitioned. adopt: called with each new layer, to partition it.
    """
    head = model.get_output_embeddings()
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in model.named_parameters()}
    quantized = 0
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or module is head:
            continue
        quantized += sizes[f"{name}.weight"]
        layer = QuantizedLinear(quantize(whole(module.weight), bits), module, bits, dtype)
        adopt(layer)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    return quantized / sum(sizes.values())
