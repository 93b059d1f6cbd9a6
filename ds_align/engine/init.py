"""Process group, device and ZeRO-3 loading context."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from ds_align import distributed
from ds_align.errors import ConfigError

# DeepSpeed calls collectives under their older names, once a parameter: thousands of lines of noise.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)


def init_distributed() -> torch.device:
    """Joins the process group (one rank without a launcher) and returns this rank's device.

    Collective: every rank must call this. Safe to call again.
    """
    deepspeed.utils.logger.setLevel(logging.WARNING)
    distributed.set_single_process_environment()
    accelerator = get_accelerator()
    # On CPUs DeepSpeed would compile a shared-memory all-reduce here: a minute at the first run, a failure
    # without a compiler and a stale lock when killed, for a collective that ZeRO-3 hardly uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not distributed.is_initialized():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), verbose=False)
    if accelerator.device_name() == "cpu":
        _share_cores()
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    accelerator.set_device(local_rank)
    return torch.device(accelerator.device_name(), local_rank)


def _share_cores() -> None:
    """Without OMP_NUM_THREADS every rank would start a thread for each core of the machine."""
    if "OMP_NUM_THREADS" not in os.environ:
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(distributed.world_size())))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))


def check_precision(dtype: str) -> None:
    """Raises ConfigError where the device cannot compute in the model's precision."""
    accelerator = get_accelerator()
    supported = {"bfloat16": accelerator.is_bf16_supported, "float16": accelerator.is_fp16_supported}
    if dtype in supported and not supported[dtype]():
        raise ConfigError(
            f"dtype={dtype}: this device ({accelerator.device_name()}) does not compute in it; "
            "set another dtype (float32 works everywhere)"
        )


def check_ds_config(ds_config: dict, given: str | Mapping[str, Any] | None, setting: str) -> None:
    """Lets DeepSpeed read a complete JSON before a model loads, so that a bad value costs nothing.

    given, setting: what the user gave and in which field, for the message. Raises ConfigError.
    """
    try:
        deepspeed.runtime.config.DeepSpeedConfig(copy.deepcopy(ds_config))
    except (ValueError, TypeError, AssertionError, deepspeed.runtime.config.DeepSpeedConfigError) as error:
        source = given if isinstance(given, str) else setting
        # pydantic adds the addresses of its manual, DeepSpeed a dump of the whole file.
        lines = [line.strip() for line in str(error).splitlines() if "errors.pydantic.dev" not in line]
        raise ConfigError(
            f"{source}: DeepSpeed refuses a value: {' '.join(lines)[:300]}; change it or leave it out"
        ) from error


@contextlib.contextmanager
def partitioned_loading(ds_config: dict) -> Iterator[None]:
    """While open, from_pretrained partitions each weight over the ranks as it is read (ZeRO stage 3 only).

    Closed again at once: as long as transformers' handle lives, every from_pretrained of the process, the
    user's own too, returns partitioned and seemingly empty tensors.
    """
    if ds_config["zero_optimization"]["stage"] != 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    handle = HfDeepSpeedConfig(ds_config)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del handle
