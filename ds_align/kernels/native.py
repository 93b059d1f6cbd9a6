"""The row kernels of the compiled extension ds_align._C, and which implementation a call takes.

The extension holds operators alone (csrc/ops.cpp); it is optional, and nothing but speed depends on it. The
environment variable DS_ALIGN_KERNELS=torch turns it off, =native makes its absence an error.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from . import reference
from .reference import LogitMap

IMPLEMENTATIONS = ("auto", "native", "torch")
ENVIRONMENT_VARIABLE = "DS_ALIGN_KERNELS"
# The dtypes that tiles of logits may have; others are cast first.
TILE_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
# What this module calls; a binary that was built from other sources may have something else.
OPERATORS = {
    "tile_lse_": "tile_lse_(Tensor logits, Tensor labels, int first, Tensor(a!) state, Tensor? bias, "
    "float scale, float softcap, Tensor(b!)? weights, int statistics) -> ()",
    "tile_grad_": "tile_grad_(Tensor logits, Tensor labels, int first, Tensor state, Tensor? bias, "
    "float scale, float softcap, Tensor grad, Tensor(a!) out) -> ()",
}


def _load() -> str | None:
    """Loads the extension; None, or the reason why there is none."""
    found = sorted(Path(__file__).resolve().parents[1].glob("_C*.so"))
    if not found:
        return (
            "it was not built: pip install --no-build-isolation -e . builds it where there is a C++ compiler"
        )
    reason = None
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        reason = f"{found[0].name} does not load: {error}"
    else:
        schemas = [torch._C._get_schema(f"ds_align::{name}", "") for name in OPERATORS if _is_there(name)]  # noqa: SLF001
        if [str(schema).removeprefix("ds_align::") for schema in schemas] != [*OPERATORS.values()]:
            reason = f"{found[0].name} is of another version of ds_align; build it again"
    if reason is not None:
        warnings.warn(f"ds_align: the PyTorch kernels are used, {reason}", RuntimeWarning, stacklevel=2)
    return reason


def _is_there(name: str) -> bool:
    return hasattr(torch.ops.ds_align, name)


WHY_ABSENT = _load()


def has_kernels(device_type: str) -> bool:
    """Whether the extension is there with kernels for "cpu" or "cuda" tensors."""
    return WHY_ABSENT is None and torch._C._dispatch_has_kernel_for_dispatch_key(  # noqa: SLF001
        "ds_align::tile_lse_", device_type.upper()
    )


if WHY_ABSENT is None:
    # Both write to their arguments alone.
    for name in ("ds_align::tile_lse_", "ds_align::tile_grad_"):
        torch.library.register_fake(name, lambda *_: None)

HAS_KERNELS = {device_type: has_kernels(device_type) for device_type in TILE_DTYPES}


def is_taken(impl: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a call with this `impl`, device and accumulation dtype takes the extension.

    Raises ValueError: unknown impl. Raises RuntimeError: the extension is asked for and cannot serve.
    """
    asked = os.environ.get(ENVIRONMENT_VARIABLE, "auto") if impl == "auto" else impl
    if asked not in IMPLEMENTATIONS:
        name = ENVIRONMENT_VARIABLE if impl == "auto" else "impl"
        raise ValueError(f"{name}={asked!r}; expected one of {', '.join(IMPLEMENTATIONS)}")
    serves = HAS_KERNELS.get(device.type, False) and dtype in TILE_DTYPES[device.type]
    if asked == "native" and not serves:
        if WHY_ABSENT is not None:
            raise RuntimeError(
                f"impl='native' needs the compiled extension ds_align._C, which is not there ({WHY_ABSENT}); "
                "use impl='auto' or impl='torch'"
            )
        raise RuntimeError(
            f"impl='native' has no kernels for {dtype} on {device.type}; use impl='auto' or impl='torch'"
        )
    return serves and asked != "torch"


def backend() -> str:
    """What impl="auto" takes for a float32 model on this machine's main device: "cuda" or "cpu", the
    extension's kernels for a GPU or for CPUs; "torch", the plain PyTorch ones.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device.type if is_taken("auto", device, torch.float32) else "torch"


def tile_lse_(
    logits: Tensor,
    labels: Tensor,
    first: int,
    state: Tensor,
    logit_map: LogitMap,
    *,
    weights: Tensor | None = None,
    statistics: int = 0,
    disposable: bool = False,  # noqa: ARG001 - the kernel needs no space of its own
) -> None:
    """As reference.tile_lse_."""
    torch.ops.ds_align.tile_lse_(
        _readable(logits, state),
        labels,
        first,
        state,
        logit_map.bias,
        logit_map.scale,
        logit_map.softcap,
        weights,
        statistics,
    )


def tile_grad_(
    logits: Tensor,
    labels: Tensor,
    first: int,
    state: Tensor,
    logit_map: LogitMap,
    *,
    grad: Tensor,
    out: Tensor,
) -> None:
    """As reference.tile_grad_."""
    readable = _readable(logits, state)
    target = out if readable is logits else readable
    torch.ops.ds_align.tile_grad_(
        readable,
        labels,
        first,
        state,
        logit_map.bias,
        logit_map.scale,
        logit_map.softcap,
        grad,
        target,
    )
    if target is not out:
        out.copy_(target)


def logit_blocks(logits: Tensor) -> Iterator[tuple[slice, slice]]:
    """As reference.logit_blocks; in one piece where the kernels read the logits where they lie."""
    if _is_readable(logits):
        yield slice(0, logits.shape[0]), slice(0, logits.shape[1])
    else:
        yield from reference.logit_blocks(logits)


def _is_readable(logits: Tensor) -> bool:
    adjacent = logits.shape[1] <= 1 or logits.stride(1) == 1
    return adjacent and logits.dtype in TILE_DTYPES[logits.device.type]


def _readable(logits: Tensor, state: Tensor) -> Tensor:
    """The tile itself where the kernels can read it, else a copy in the accumulation dtype."""
    if _is_readable(logits):
        return logits
    return torch.empty_like(logits, dtype=state.dtype, memory_format=torch.contiguous_format).copy_(logits)
