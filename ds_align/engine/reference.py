"""The frozen reference under ZeRO-Inference: stage 3 without an optimizer, partitions in host memory."""

from __future__ import annotations

import deepspeed
import torch

from ds_align.batch import Layout, PackedBatch
from ds_align.engine.init import partitioned_loading
from ds_align.engine.policy import DTYPES
from ds_align.models import ModelSource, PolicyModel


class ReferenceEngine:
    """The reference model inside a DeepSpeed engine of its own; it only scores."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        self.engine = engine

    @classmethod
    def from_config(
        cls,
        ds_config: dict,
        source: ModelSource,
        *,
        layout: Layout,
        dtype: str,
        attn_implementation: str,
    ) -> ReferenceEngine:
        """Loads the model partitioned and wraps it. Collective: every rank must call this."""
        with partitioned_loading(ds_config):
            model = source.load(DTYPES[dtype])
        reference = PolicyModel(model, layout, attn_implementation)
        reference.eval()
        reference.requires_grad_(False)
        engine, *_ = deepspeed.initialize(model=reference, config=ds_config)
        engine.eval()
        return cls(engine)

    @property
    def module(self) -> PolicyModel:
        """The wrapped model; its parameters are empty outside a forward."""
        return self.engine.module

    @torch.no_grad()
    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Token log-probs, float32 [num_scored]. Collective: every rank must call this."""
        token_logps, _ = self.engine(batch)
        return token_logps
