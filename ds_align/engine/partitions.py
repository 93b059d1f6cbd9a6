"""Partitions of a reference's weights on a rank: mixed with the policy's, saved and restored.

Partitions of equal weights are equal on a rank, so nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Iterator

import deepspeed
import torch

from ds_align import distributed
from ds_align.engine.setup import Setup
from ds_align.errors import CheckpointError, ConfigError


def check_can_sync(setup: Setup) -> None:
    """Raises ConfigError where the reference cannot be moved towards the policy; loads no weights."""
    if setup.reference_ds_config is None:
        raise ConfigError(
            "sync_ref_model: the reference is the policy with its adapters off, not a second model; "
            "leave it out"
        )
    _check_can_be_mixed(setup.reference_ds_config)
    if setup.source.path == setup.reference_source.path:
        return
    first, second = setup.source.weight_shapes(), setup.reference_source.weight_shapes()
    if first == second:
        return
    different = sorted(name for name in {*first, *second} if first.get(name) != second.get(name))
    name = different[0]
    raise ConfigError(
        f"sync_ref_model: policy and reference differ in {len(different)} weights (first: {name}, "
        f"{first.get(name, 'absent')} and {second.get(name, 'absent')}); a mixture needs one architecture"
    )


def _check_can_be_mixed(reference_ds_config: dict) -> None:
    offload = reference_ds_config["zero_optimization"].get("offload_param") or {}
    if offload.get("device") == "nvme":
        raise ConfigError(
            "sync_ref_model: the reference's weights are on NVMe and cannot be mixed there; "
            "use ref_ds_config=zero_inference"
        )


@torch.no_grad()
def mix(policy: deepspeed.DeepSpeedEngine, reference: deepspeed.DeepSpeedEngine, alpha: float) -> None:
    """reference = alpha * policy + (1 - alpha) * reference, partition by partition, in float32.

    In half precision the result is rounded to the weights' dtype, so an alpha below about 1e-3 moves nothing.
    """
    weights = dict(policy.module.model.named_parameters())
    for name, partition in partitions(reference):
        own = _partition_of(weights[name], partition.numel()).to(partition.device, torch.float32)
        partition.copy_(own.mul_(alpha).add_(partition.float(), alpha=1.0 - alpha))


def partitions(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, flat partition) of each weight of a ZeRO-3 engine; writing to a partition changes the model."""
    # A forward without backward leaves prefetched weights whole, and they would not see the change.
    engine.empty_partition_cache()
    for name, parameter in engine.module.model.named_parameters():
        yield name, parameter.ds_tensor


def _partition_of(weight: torch.nn.Parameter, numel: int) -> torch.Tensor:
    """A new flat tensor [numel] with this rank's part of a weight that may be whole; zeros beyond its end."""
    if hasattr(weight, "ds_tensor"):
        assert weight.ds_tensor.numel() == numel, "policy and reference are partitioned alike"
        return weight.ds_tensor.detach().clone()
    part = weight.detach().flatten()[distributed.rank() * numel :][:numel]
    return torch.nn.functional.pad(part, (0, numel - part.numel())) if part.numel() < numel else part.clone()


def partition_state(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """The partitions by name, copied to the CPU."""
    return {name: partition.detach().cpu().clone() for name, partition in partitions(engine)}


@torch.no_grad()
def load_partition_state(engine: deepspeed.DeepSpeedEngine, state: dict[str, torch.Tensor]) -> None:
    """Takes over what partition_state() gave. Raises CheckpointError where names or sizes differ."""
    for name, partition in partitions(engine):
        saved = state.get(name)
        if saved is None or saved.shape != partition.shape:
            found = "absent" if saved is None else tuple(saved.shape)
            raise CheckpointError(
                f"the reference's weight {name} is {found} in the checkpoint and {tuple(partition.shape)} "
                "here; resume with the same models and number of ranks"
            )
        partition.copy_(saved)
