"""The frozen reference: a model under ZeRO-Inference, or the policy with its adapters off.

ZeRO-Inference is stage 3 without an optimizer, with the partitions in host memory.
"""

from __future__ import annotations

from typing import ClassVar

import deepspeed
import torch

from ds_align.batch import Layout, PackedBatch
from ds_align.engine import partitions
from ds_align.engine.init import partitioned_loading
from ds_align.engine.nvme import OwnDirectories, forget, free_buffers
from ds_align.engine.policy import DTYPES, PolicyEngine
from ds_align.models import ModelSource, PolicyModel
from ds_align.models.adapters import reference_adapters
from ds_align.models.quantized import quantize_linears


class ReferenceEngine:
    """The reference model inside a DeepSpeed engine of its own; it only scores."""

    kind: ClassVar[str] = "model"

    def __init__(self, engine: deepspeed.DeepSpeedEngine, directories: OwnDirectories) -> None:
        self.engine = engine
        self.directories = directories

    @classmethod
    def from_config(
        cls,
        ds_config: dict,
        source: ModelSource,
        *,
        layout: Layout,
        dtype: str,
        attn_implementation: str,
        bits: int | None = None,
    ) -> ReferenceEngine:
        """Loads the model partitioned and wraps it. bits: of the weights of its linear layers, None: dtype's.

        Collective: every rank must call this.
        """
        directories = OwnDirectories(ds_config)
        ds_config = directories.ds_config
        with partitioned_loading(ds_config):
            model = source.load(DTYPES[dtype])
        if bits is not None:
            quantize_linears(
                model,
                bits,
                DTYPES[dtype],
                whole=_taken,
                # A swapper of its own would empty the directory of the model's and lock memory again.
                adopt=lambda layer: deepspeed.zero.Init(
                    module=layer, config_dict_or_path=ds_config, param_swapper=_swapper(model)
                ),
            )
        reference = PolicyModel(model, layout, attn_implementation)
        reference.eval()
        reference.requires_grad_(False)
        engine, *_ = deepspeed.initialize(model=reference, config=ds_config)
        engine.eval()
        return cls(engine, directories)

    @property
    def module(self) -> PolicyModel:
        """The wrapped model; its parameters are empty outside a forward."""
        return self.engine.module

    def mix(self, policy: deepspeed.DeepSpeedEngine, alpha: float) -> None:
        """Becomes alpha * policy + (1 - alpha) * itself (TR-DPO, arXiv:2404.09656); no communication."""
        partitions.mix(policy, self.engine, alpha)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The partitions of the weights on this rank, by name, on the CPU."""
        return partitions.partition_state(self.engine)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Takes over what state_dict() gave. Raises CheckpointError where it is of another model."""
        partitions.load_partition_state(self.engine, state)

    @torch.no_grad()
    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Token log-probs, float32 [num_scored]. Collective: every rank must call this."""
        token_logps, _ = self.engine(batch)
        return token_logps

    def close(self) -> None:
        """Gives the model's memory back; it cannot score any more."""
        swapper = _swapper(self.module)
        self.engine.destroy()
        self.engine = None
        if swapper is not None:
            free_buffers(swapper)
        self.directories.remove()


def _swapper(model: torch.nn.Module) -> object | None:
    """What moves a model's weights from and to NVMe; None where they are elsewhere."""
    return next(model.parameters()).nvme_swapper


def _taken(weight: torch.nn.Parameter) -> torch.Tensor:
    """A copy of a whole weight, which itself is not used any more."""
    with deepspeed.zero.GatheredParameters([weight]):
        copy = weight.detach().clone()
    if weight.nvme_swapper is not None:
        forget(weight.nvme_swapper, weight)
    return copy


class AdaptersOffReference:
    """The policy's own model as it was at the start: its adapters off, or their kept start in their place."""

    kind: ClassVar[str] = "adapters_off"

    def __init__(self, policy: PolicyEngine) -> None:
        self.policy = policy

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Token log-probs, float32 [num_scored]. Collective: every rank must call this."""
        with reference_adapters(self.policy.module.model):
            return self.policy.forward(batch, grad=False).logps

    def close(self) -> None:
        """Nothing to give back: the model is the policy's."""
