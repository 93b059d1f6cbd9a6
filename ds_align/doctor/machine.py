"""Check 15, the machine: and how the figures of memory and disk come about, which 13 uses, too."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ds_align import distributed
from ds_align.checkpoint import FOLDER, list_steps
from ds_align.config import BaseConfig, resolved_precision, zero_stage
from ds_align.doctor.facts import Facts, MachineFacts
from ds_align.doctor.finding import Outcome, Parts
from ds_align.models.load import weight_files

if TYPE_CHECKING:
    from ds_align.models import ModelSource

NUM_CHECKPOINTS = 3
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def machine(facts: Facts) -> Outcome:
    """Equal versions on all ranks, room for the model and three checkpoints, and what was found broken."""
    found, parts = facts.machine, Parts()
    parts.value |= {
        "ranks": len(found.versions),
        "disk_needed": found.disk_needed,
        "disk_free": found.disk_free,
    }
    names = {name for versions in found.versions for name in versions}
    differing = sorted(name for name in names if len({v.get(name) for v in found.versions}) > 1)
    if differing:
        shown = (
            f"{name} " + ", ".join(f"{v.get(name)} (rank {rank})" for rank, v in enumerate(found.versions))
            for name in differing
        )
        parts.add(
            "error", f"the ranks have other versions of {', '.join(differing)}", "install the same", shown
        )
    if found.disk_needed is not None and found.disk_free is not None and found.disk_needed > found.disk_free:
        # A run may free what it needs as it goes; a save that does not fit ends it by itself.
        parts.add(
            "warning" if facts.at_start else "error",
            f"output_dir={found.output_dir!r} has {found.disk_free / 1e9:.2f} GB free, the model and its "
            f"checkpoints take about {found.disk_needed / 1e9:.2f} GB",
            "free the disk, give another output_dir, or set save_total_limit",
        )
    for fault in found.faults:
        parts.add("error", fault)
    return parts.outcome("versions, disk, output directory and port are fine")


def look_at_machine(
    config: BaseConfig,
    *,
    versions: tuple[dict[str, str], ...],
    device: torch.device,
    source: ModelSource | None = None,
    ds_config: Mapping[str, Any] | None = None,
    num_steps: int | None = None,
) -> MachineFacts:
    """The facts of this node; without a source nothing is known of memory and disk."""
    output = config.resolved_output_dir
    there = next(path for path in (Path(output), *Path(output).absolute().parents) if path.exists())
    facts = {
        "versions": versions,
        "output_dir": output,
        "disk_free": shutil.disk_usage(there).free,
        "device_bytes": device_bytes(device),
    }
    number = None if source is None else num_parameters(source)
    if number is not None and ds_config is not None:
        # Adapters are a hundredth of the model: they are left out of an estimate from below.
        trained = 0 if config.trains_adapters else number
        num_there = len(list_steps(Path(output) / FOLDER))
        facts |= {
            "num_parameters": number,
            "state_bytes": state_bytes(config, ds_config, number, trained, device.type),
            "disk_needed": disk_bytes(config, ds_config, trained, num_steps, num_there),
        }
    return MachineFacts(**facts)


def num_parameters(source: ModelSource) -> int | None:
    """Weights in a local model's safetensors files, by their headers; None for other files and Hub ids."""
    from safetensors import safe_open

    directory = Path(source.path)
    files = weight_files(directory) if directory.is_dir() else []
    if not files or any(file.suffix != ".safetensors" for file in files):
        return None
    number = 0
    for file in files:
        with safe_open(file, framework="pt") as weights:
            number += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return number


def state_bytes(
    config: BaseConfig, ds_config: Mapping[str, Any], number: int, trained: int, device: str
) -> int:
    """Bytes that a rank's device holds at least: weights, gradients, optimizer and reference.

    The parts are those of ZeRO (arXiv:1910.02054, section 3): stage 1 divides the optimizer, 2 the gradients,
    3 the weights. On a CPU what is offloaded stays in the same memory.
    """
    ranks, stage = distributed.world_size(), zero_stage(ds_config)
    zero = ds_config.get("zero_optimization", {})
    width = 4 if resolved_precision(ds_config) == "float32" else 2
    weights = width * number / (ranks if stage >= 3 else 1)
    gradients = width * trained / (ranks if stage >= 2 else 1)
    optimizer = _optimizer_width(config, width) * trained / (ranks if stage >= 1 else 1)
    elsewhere = ("nvme",) if device == "cpu" else ("cpu", "nvme")
    if zero.get("offload_optimizer", {}).get("device") in elsewhere:
        gradients = optimizer = 0
    if zero.get("offload_param", {}).get("device") in elsewhere:
        weights = 0
    reference = 0.0
    # A ref_ds_config may put it anywhere; the shipped default holds it in host memory, divided by rank.
    if device == "cpu" and config.ref_ds_config is None and config.needs_reference and trained:
        reference = number * (config.ref_bits or 8 * width) / 8 / ranks
    return round(weights + gradients + optimizer + reference)


def _optimizer_width(config: BaseConfig, width: int) -> int:
    """Bytes a weight: Adam's two moments in float32, and the float32 copy of weights of half the width."""
    return (0 if config.optim == "sgd" else 8) + (4 if width == 2 else 0)


def disk_bytes(
    config: BaseConfig, ds_config: Mapping[str, Any], trained: int, num_steps: int | None, num_there: int = 0
) -> int:
    """Bytes that the run writes: the model, and as many checkpoints as lie there at a time, three at most.

    num_there: checkpoints that lie there already; at least one more is written.
    """
    width = 4 if resolved_precision(ds_config) == "float32" else 2
    model = width * trained
    if config.save_steps is None:
        return model
    saved = NUM_CHECKPOINTS if num_steps is None else num_steps // config.save_steps
    kept = min(NUM_CHECKPOINTS, saved, config.save_total_limit or NUM_CHECKPOINTS)
    if kept:
        kept = max(1, kept - num_there)
    return model + kept * (width + _optimizer_width(config, width)) * trained


def device_bytes(device: torch.device) -> int:
    """Memory of the device; of a CPU this rank's share of what the machine, or its container, has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in _CGROUP_LIMITS:
        text = Path(name).read_text(encoding="utf-8").strip() if Path(name).is_file() else ""
        if text.isdigit():
            limits.append(int(text))
    ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or distributed.world_size()
    return min(limits) // int(ranks)
