"""Which checkpoint a run goes on from, and with which batch where the number of ranks has changed."""

from __future__ import annotations

from pathlib import Path

from ds_align import checkpoint, distributed
from ds_align.checkpoint import Checkpoint
from ds_align.config import BaseConfig
from ds_align.engine.init import init_distributed
from ds_align.errors import CheckpointError
from ds_align.same_run import changed_versions, check_settings, rescaled_batch
from ds_align.versions import versions


def find_checkpoint(
    config: BaseConfig, output_dir: Path, *, has_engine: bool
) -> tuple[Checkpoint | None, list[str]]:
    """(the verified checkpoint that config.resume asks for, or None to start afresh; messages).

    On another number of ranks than wrote it, the settings of the batch are changed so that the global batch
    stays; has_engine: the models are loaded already, for the settings as they are. Collective: every rank
    must call this. Raises CheckpointError, before anything is loaded.
    """
    if config.resume in (None, "none"):
        return None, []
    init_distributed()
    found = checkpoint.choose(output_dir, config.resume)
    if found is None:
        folder = output_dir / checkpoint.FOLDER
        return None, [f"resume: {folder} holds no whole checkpoint; starting at the first step"]
    messages = []
    if found.state["world_size"] != distributed.world_size():
        messages.append(_rescale(config, found, has_engine=has_engine))
    messages += check_settings(found.path, found.state, config, distributed.world_size())
    messages += changed_versions(found.state, versions())
    messages.append(f"resume: going on after step {found.step} of {found.path}")
    return found, messages


def _rescale(config: BaseConfig, found: Checkpoint, *, has_engine: bool) -> str:
    batch, message = rescaled_batch(found.path, found.state, config, distributed.world_size())
    if batch and has_engine:
        raise CheckpointError(
            f"{found.path}: {message}; the engine is there already, with another batch: call train() without "
            "setup() before it"
        )
    for name, value in batch.items():
        setattr(config, name, value)
    return message
