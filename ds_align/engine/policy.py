"""The trained model under ZeRO: forward to token log-probs, one scaled backward, one step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import deepspeed
import torch

from ds_align import distributed
from ds_align.batch import Layout, PackedBatch, TokenScores
from ds_align.config import BaseConfig
from ds_align.engine.init import partitioned_loading
from ds_align.engine.nvme import OwnDirectories
from ds_align.models import AdapterPlan, ModelSource, PolicyModel
from ds_align.models.adapters import attach

if TYPE_CHECKING:
    from peft import LoraConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class StepResult:
    """What an optimizer step did; grad_norm is that of the whole gradient before clipping.

    skipped: the gradient was not finite, and weights, optimizer and learning rate are as before; the same on
    every rank. The norm may be a tensor: reading it waits for the device, so that is left to whoever logs it.
    """

    grad_norm: float | torch.Tensor
    learning_rate: float
    skipped: bool


class PolicyEngine:
    """The policy inside a DeepSpeed engine.

    The number of forwards and backwards between two steps must be the same on every rank.
    """

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        zero_stage: int,
        device: torch.device,
        adapter_settings: LoraConfig | None = None,
        *,
        directories: OwnDirectories,
    ) -> None:
        self.engine = engine
        self.zero_stage = zero_stage
        self.device = device
        self.adapter_settings = adapter_settings
        self.directories = directories
        self.world_size = distributed.world_size()

    @classmethod
    def from_config(
        cls,
        config: BaseConfig,
        ds_config: dict,
        source: ModelSource,
        *,
        layout: Layout,
        dtype: str,
        device: torch.device,
        schedule: Callable[[int], float],
        adapters: AdapterPlan | None = None,
    ) -> PolicyEngine:
        """Loads the model, partitioned as it is read under ZeRO-3, and wraps it; with adapters, freezes it.

        Collective: every rank must call this. schedule: step (from 0) to a factor of the learning rate.
        """
        directories = OwnDirectories(ds_config)
        ds_config = directories.ds_config
        with partitioned_loading(ds_config):
            model = source.load(DTYPES[dtype])
        if adapters is not None:
            attach(model, adapters)
        policy = PolicyModel(
            model, layout, config.attn_implementation, logits_budget_mb=config.logits_budget_mb
        )
        if config.disable_dropout:
            policy.disable_dropout()
        if config.gradient_checkpointing:
            # The name changed within transformers 5; the older one warns where both are there.
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        engine, *_ = deepspeed.initialize(
            model=policy,
            model_parameters=parameters,
            config=ds_config,
            optimizer=_client_optimizer(config, ds_config, parameters),
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, schedule),
        )
        settings = None if adapters is None else adapters.settings
        stage = ds_config["zero_optimization"]["stage"]
        return cls(engine, stage, device, settings, directories=directories)

    @property
    def scales_losses(self) -> bool:
        """Whether float16 looks for a loss scale, and skips steps on the way."""
        return bool(self.engine.fp16_enabled())

    @property
    def module(self) -> PolicyModel:
        """The wrapped model; under ZeRO-3 its parameters are empty outside a forward."""
        return self.engine.module

    def forward(
        self,
        batch: PackedBatch,
        *,
        grad: bool = True,
        with_collision: bool = False,
        with_router: bool = False,
    ) -> TokenScores:
        """Scores of a batch on this rank's device; grad=False keeps no graph.

        Collective under ZeRO-3: every rank must call this.
        """
        self.engine.train(grad)
        with contextlib.nullcontext() if grad else torch.no_grad():
            values = self.engine(batch, with_collision=with_collision, with_router=with_router)
        logps, mean_logits, *rest = values
        router = rest[-2:] if with_router else (None, None)
        return TokenScores(logps, mean_logits, rest[0] if with_collision else None, *router)

    def backward(self, loss_sum: torch.Tensor, *, global_count: int) -> None:
        """Gradient of sum(losses over all ranks) / global_count; the one place that scales.

        loss_sum: scalar, the sum over this rank's part of a micro-batch. DeepSpeed averages gradients over
        ranks, hence the factor world_size. Collective: every rank must call this.
        """
        # global_count already covers every accumulation step; DeepSpeed would divide by their number again.
        self.engine.backward(loss_sum * (self.world_size / global_count), scale_wrt_gas=False)

    def step(self) -> StepResult:
        """Clips, updates the weights, moves the schedule on. Collective: every rank must call this."""
        learning_rate = float(self.engine.get_lr()[0])
        skipped_before = self.engine.skipped_steps
        if hasattr(self.engine.optimizer, "_global_grad_norm"):
            self.engine.step()
            norm = self.engine.get_global_grad_norm()
        else:
            norm = self._step_unpartitioned()
        return StepResult(norm, learning_rate, self.engine.skipped_steps > skipped_before)

    def _step_unpartitioned(self) -> torch.Tensor:
        """A step at ZeRO stage 0 in float32, where DeepSpeed reports no norm; returns the norm."""
        if self.world_size > 1:
            # Not allreduce_gradients(): outside of step() it sees no accumulation boundary, reduces nothing.
            self.engine.buffered_allreduce_fallback()
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        optimizer, schedule = self.engine.optimizer, self.engine.lr_scheduler
        update = optimizer.step
        if not torch.isfinite(norm):
            # As the partitioned optimizers do by themselves: neither weights nor schedule move.
            for gradient in gradients:
                gradient.zero_()
            optimizer.step, self.engine.lr_scheduler = _no_update, None
            self.engine.skipped_steps += 1
        self.engine.enable_backward_allreduce = False  # reduced above; step would do it again
        try:
            self.engine.step()
        finally:
            self.engine.enable_backward_allreduce = True
            optimizer.step, self.engine.lr_scheduler = update, schedule
        return norm

    def weights(self, *, trained_only: bool = False) -> Iterator[tuple[str, torch.Tensor | None]]:
        """(name, whole tensor on the CPU) of each parameter in turn; the tensor is None except on rank 0.

        trained_only: without frozen ones. Collective: every rank must iterate to the end. Only one parameter
        is whole at a time.
        """
        if self.zero_stage == 3:
            # A forward without backward leaves prefetched weights in flight, which cannot be gathered.
            self.engine.empty_partition_cache()
        for name, parameter in self._parameters(trained_only):
            if self.zero_stage == 3:
                with deepspeed.zero.GatheredParameters([parameter]):
                    whole = parameter.detach().cpu().clone() if distributed.is_main() else None
            else:
                whole = parameter.detach().cpu().clone() if distributed.is_main() else None
            yield name, whole

    def weight_bytes(self, *, trained_only: bool = False) -> dict[str, int]:
        """Bytes of each whole parameter, by name; no communication."""
        return {
            name: getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
            for name, parameter in self._parameters(trained_only)
        }

    def _parameters(self, trained_only: bool) -> Iterator[tuple[str, torch.nn.Parameter]]:  # noqa: FBT001
        for name, parameter in self.module.model.named_parameters():
            if parameter.requires_grad or not trained_only:
                yield name, parameter


def _no_update(*_: object, **__: object) -> None:
    """In place of an optimizer's step."""


def _client_optimizer(
    config: BaseConfig, ds_config: dict, parameters: list[torch.nn.Parameter]
) -> torch.optim.Optimizer | None:
    """The optimizers that DeepSpeed's JSON has no name for; None where the JSON names one."""
    if "optimizer" in ds_config:
        return None
    assert config.optim == "sgd", config.optim
    return torch.optim.SGD(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
