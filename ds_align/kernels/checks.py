"""What the public functions refuse, with what they got and what they expect."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

# float32 holds the soft cap, and 0 means none to the row kernels.
SOFTCAPS = (1e-30, 1e30)


def check_head(
    where: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    softcap: float | None,
    scale: float | None,
) -> None:
    """Raises ValueError for an LM head that cannot be applied to the hidden states."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{where}: hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not fit; "
            "expected [tokens, H] and [V, H]"
        )
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise ValueError(
            f"{where}: hidden is {hidden.dtype}, weight {weight.dtype}; expected floating dtypes"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise ValueError(
            f"{where}: bias has shape {tuple(bias.shape)} and dtype {bias.dtype}; "
            f"expected floating ({weight.shape[0]},)"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{where}: {name} is on {tensor.device}; expected {hidden.device}, as hidden")
    if softcap is not None and not SOFTCAPS[0] <= softcap <= SOFTCAPS[1]:
        raise ValueError(
            f"{where}: softcap={softcap}; expected a number greater than 0 (from 1e-30 to 1e30), or None"
        )
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"{where}: scale={scale}; expected a finite number, or None")


def check_logits(where: str, logits: Tensor) -> None:
    """Raises ValueError for logits that are no floating matrix."""
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(
            f"{where}: logits is {logits.dtype} {tuple(logits.shape)}; expected floating [tokens, V], "
            "flatten leading dimensions first"
        )


def checked_labels(where: str, labels: Tensor, beside: Tensor) -> Tensor:
    """The labels as the kernels read them. Raises ValueError where they are none."""
    num_tokens = beside.shape[0]
    # The upper half of uint64 would come out negative, which means ignored.
    is_integer = not (labels.is_floating_point() or labels.is_complex()) and labels.dtype not in (
        torch.bool,
        torch.uint64,
    )
    if labels.shape != (num_tokens,) or not is_integer:
        raise ValueError(
            f"{where}: labels is {labels.dtype} {tuple(labels.shape)}; expected integers ({num_tokens},)"
            + ("; convert them to int64" if labels.dtype == torch.uint64 else "")
        )
    if labels.device != beside.device:
        raise ValueError(f"{where}: labels is on {labels.device}; expected {beside.device}")
    return labels.to(torch.long).contiguous()


def refuse_forward_mode(where: str, *tensors: Tensor | None) -> None:
    """Raises NotImplementedError in forward-mode differentiation, which would give zeros without a word."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:  # noqa: SLF001
        return
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{where} has no forward-mode derivative (jvp, jacfwd); differentiate backward (grad, jacrev)"
            )


def has_own_places(matrix: Tensor) -> bool:
    """Whether no two entries of a matrix can share a place in memory."""
    (rows, columns), (by_row, by_column) = matrix.shape, matrix.stride()
    if rows <= 1 or columns <= 1:
        return max(rows, columns) <= 1 or (by_row if rows > 1 else by_column) > 0
    return (by_column > 0 and by_row >= columns * by_column) or (by_row > 0 and by_column >= rows * by_row)
