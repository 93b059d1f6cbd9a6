"""A checkpoint of another number of ranks: made independent of ranks, then taken apart anew."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch

from ds_align import checkpoint, distributed
from ds_align.checkpoint import Checkpoint
from ds_align.errors import CheckpointError

# What a launcher sets for the ranks; the converter is none of them.
_OF_A_RANK = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def load_reshaped(
    inner: deepspeed.DeepSpeedEngine, found: Checkpoint, tag: str, work: Path, *, strict: bool
) -> None:
    """Loads DeepSpeed's files of found into an engine of another number of ranks.

    work: a directory that all ranks see; what is put there is removed again. Collective: every rank must
    call this. Raises CheckpointError, on every rank, where the files cannot be converted.
    """
    folder = checkpoint.scratch(work, f"universal-{found.path.name}")
    try:
        distributed.agree(lambda: _convert(found.path / tag, folder))
        inner._config.load_universal_checkpoint = True  # noqa: SLF001 - known when the engine was made, else
        path, _ = inner.load_checkpoint(str(folder.parent), tag=folder.name, load_module_strict=strict)
        assert path is not None, folder
    finally:
        inner._config.load_universal_checkpoint = False  # noqa: SLF001
        distributed.barrier()
        if distributed.is_main():
            shutil.rmtree(folder, ignore_errors=True)


def _convert(source: Path, target: Path) -> None:
    """DeepSpeed's own converter, on the main rank and in a process of its own."""
    if not distributed.is_main():
        return
    command = [
        *(sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"),
        *("--input_folder", str(source), "--output_folder", str(target)),
    ]
    environment = {name: value for name, value in os.environ.items() if name not in _OF_A_RANK}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CheckpointError(
            f"{source.parent}: cannot be converted for another number of ranks ({last}); continue it on as "
            "many ranks as wrote it"
        )


def merge_rank_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    """What this rank goes on with, of the states of all ranks that wrote a checkpoint.

    The open window of all of them is the main rank's, since only its sum is ever used; the generators are
    those of the rank with this number, modulo their number.
    """
    rank = distributed.rank()
    merged = dict(states[0])
    merged["random"] = states[rank % len(states)]["random"]
    sums = torch.stack([state["sums"] for state in states]).sum(0)
    merged["sums"] = sums if rank == 0 else torch.zeros_like(sums)
    windows = [state["window"] for state in states]
    counted = ("preferences", "tokens", "unshared_tokens", "padded_tokens", "slots")
    whole = {name: sum(window[name] for window in windows) if rank == 0 else 0 for name in counted}
    merged["window"] = windows[0] | whole
    return merged
