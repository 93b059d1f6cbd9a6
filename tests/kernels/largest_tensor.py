"""Sees how large the tensors are that operations make, inside of ds_align's own operators too."""

from __future__ import annotations

import torch
from torch.library import CustomOpDef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_align.kernels import operators

# To a dispatch mode an operator is one step; its Python body shows what happens in it.
BODIES = {
    operator._opoverload: operator._init_fn
    for operator in vars(operators).values()
    if isinstance(operator, CustomOpDef)
}


class LargestTensor(TorchDispatchMode):
    """Keeps the size of the largest tensor that any operation returned, but for some shapes and dtypes."""

    def __init__(
        self, allowed_shapes: tuple[tuple[int, ...], ...] = (), dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.allowed_shapes = allowed_shapes
        self.dtype = dtype
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in BODIES:
            with self:
                return BODIES[func](*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and self.counts(leaf):
                self.num_elements = max(self.num_elements, leaf.numel())
        return result

    def counts(self, leaf: torch.Tensor) -> bool:
        return self.dtype in (None, leaf.dtype) and tuple(leaf.shape) not in self.allowed_shapes
