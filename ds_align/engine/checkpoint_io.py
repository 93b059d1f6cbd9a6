"""What is inside a checkpoint: DeepSpeed's files, random states, a moving reference, the state of the run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ds_align import checkpoint, distributed
from ds_align.checkpoint import Checkpoint
from ds_align.engine.align_engine import AlignEngine
from ds_align.engine.reshape import load_reshaped, merge_rank_states
from ds_align.errors import CheckpointError

_TAG = "deepspeed"


@dataclass(frozen=True, slots=True)
class Saved:
    """A written checkpoint: its directory, the bytes of all its files, the time that it took."""

    path: Path
    num_bytes: int
    seconds: float


def run_facts(engine: AlignEngine) -> dict[str, Any]:
    """What must be the same in a run that goes on, beside its settings; JSON values, equal on every rank."""
    names = hashlib.blake2b(digest_size=16)
    count = trained = 0
    for name, parameter in engine.policy.module.named_parameters():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        names.update(f"{name} {shape} {parameter.dtype} {parameter.requires_grad}\n".encode())
        count += int(np.prod(shape))
        trained += int(np.prod(shape)) * parameter.requires_grad
    return {
        "num_steps": engine.num_steps,
        "train_rows": len(engine.train_data),
        "train_data": engine.train_data.digest(),
        "parameters": count,
        "trained_parameters": trained,
        "architecture": names.hexdigest(),
        "device": engine.device.type,
        "ds_config": engine.policy.engine.config,
    }


def save(engine: AlignEngine, folder: Path, state: dict[str, Any], rank_state: dict[str, Any]) -> Saved:
    """Writes the checkpoint of the engine's step into folder; whole, or not at all.

    state: JSON values, the same on every rank; rank_state: tensors and plain values of this rank.
    Collective: every rank must call this. Raises CheckpointError where the disk refuses.
    """
    started = time.perf_counter()
    step = engine.global_step
    partial = checkpoint.begin(folder, step)
    try:
        _write_deepspeed(engine, partial)
        checkpoint.with_disk_errors(lambda: _write_own(engine, partial, state, rank_state), partial)
        num_bytes = checkpoint.publish(partial, step)
    except CheckpointError:
        checkpoint.discard(partial)
        raise
    return Saved(folder / checkpoint.step_name(step), num_bytes, time.perf_counter() - started)


def load(engine: AlignEngine, found: Checkpoint) -> dict[str, Any]:
    """Puts a freshly built engine where the checkpoint was; returns this rank's rank_state.

    DeepSpeed unpickles its files: found must be a run's own, verified checkpoint. One of another number of
    ranks is converted. Collective: every rank must call this. Raises CheckpointError where that fails.
    """
    inner = engine.policy.engine
    ranks = found.state["world_size"]
    # Frozen weights are not in the checkpoint; that all names are the same, run_facts has said.
    strict = all(parameter.requires_grad for parameter in inner.module.parameters())
    # Without ZeRO every rank holds all, in files that do not know of ranks.
    if ranks == engine.world_size or engine.policy.zero_stage == 0:
        path, _ = inner.load_checkpoint(str(found.path), tag=_TAG, load_module_strict=strict)
        assert path is not None, found.path
    else:
        work = Path(engine.config.resolved_output_dir) / checkpoint.FOLDER
        load_reshaped(inner, found, _TAG, work, strict=strict)
    if engine.config.sync_ref_model:
        moved = load_file(_own_file(found.path, "reference", "safetensors"))
        distributed.agree(lambda: engine.reference.load_state_dict(moved))
    engine.load_state_dict(found.state["engine"])
    rank_state = _rank_state(found.path, ranks)
    # Last: building and loading have drawn numbers.
    _restore_random(rank_state.pop("random"))
    return rank_state


def _rank_state(directory: Path, ranks: int) -> dict[str, Any]:
    """That of this rank, or what another number of ranks left of theirs."""

    def read(rank: int) -> dict[str, Any]:
        path = _own_file(directory, "state", "pt", rank)
        return torch.load(path, map_location="cpu", weights_only=True)

    if ranks == distributed.world_size():
        return read(distributed.rank())
    return merge_rank_states([read(rank) for rank in range(ranks)])


def _own_file(directory: Path, kind: str, ending: str, rank: int | None = None) -> Path:
    return directory / f"{kind}-rank{distributed.rank() if rank is None else rank:05d}.{ending}"


def _write_deepspeed(engine: AlignEngine, partial: Path) -> None:
    """DeepSpeed's own files. Collective; raises CheckpointError on every rank."""
    inner = engine.policy.engine
    with _deferred_disk_errors(inner) as errors:
        try:
            inner.save_checkpoint(
                str(partial),
                tag=_TAG,
                save_latest=False,
                exclude_frozen_parameters=True,
            )
        except OSError as error:
            # Files beside the shards, on one rank alone: the others wait in the barrier that ends a save.
            errors.append(str(error))
            distributed.barrier()

    def judge() -> None:
        if errors:
            raise checkpoint.write_error(partial, errors[0])

    distributed.agree(judge)


def _save_tensors(content: dict[str, Any], path: str | Path) -> None:
    """torch.save that tells why the disk refused. Raises OSError."""
    with Path(path).open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # torch's writer speaks of a wrong position; what the file said is behind it.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


class _Writer(TorchCheckpointEngine):
    """Writes as DeepSpeed does, but keeps the error of a full disk for later.

    Raised where it happens, it would leave the other ranks in DeepSpeed's next collective.
    """

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def save(self, state_dict: dict, path: str) -> None:
        """One file; after a first error nothing more is written."""
        if self.errors:
            return
        try:
            _save_tensors(state_dict, path)
        except OSError as error:
            self.errors.append(f"{Path(path).name}: {error.strerror}")


@contextlib.contextmanager
def _deferred_disk_errors(inner: deepspeed.DeepSpeedEngine) -> Iterator[list[str]]:
    usual = inner.checkpoint_engine
    writer = _Writer()
    inner.checkpoint_engine = writer
    try:
        yield writer.errors
    finally:
        inner.checkpoint_engine = usual


def _write_own(engine: AlignEngine, partial: Path, state: dict[str, Any], rank_state: dict[str, Any]) -> None:
    _save_tensors({**rank_state, "random": _random_state()}, _own_file(partial, "state", "pt"))
    if engine.config.sync_ref_model:
        try:
            save_file(engine.reference.state_dict(), _own_file(partial, "reference", "safetensors"))
        except SafetensorError as error:
            raise OSError(str(error)) from error
    if distributed.is_main():
        whole = {"format": checkpoint.FORMAT, "global_step": engine.global_step, **state}
        text = json.dumps({**whole, "engine": engine.state_dict()}, indent=1) + "\n"
        checkpoint.write_durably(partial / checkpoint.RUN_STATE, text)


def _random_state() -> dict[str, Any]:
    """States of every generator as tensors and plain values, which load without pickle."""
    version, words, gauss = random.getstate()
    name, keys, place, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - libraries draw from it
    return {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "name": name,
            "keys": torch.from_numpy(keys.astype(np.int64)),
            "place": place,
            "has_gauss": has_gauss,
            "cached": cached,
        },
        "torch": torch.get_rng_state(),
        "accelerator": get_accelerator().get_rng_state().cpu(),
    }


def _restore_random(state: dict[str, Any]) -> None:
    python, legacy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = legacy["keys"].numpy().astype(np.uint32)
    np.random.set_state((legacy["name"], keys, legacy["place"], legacy["has_gauss"], legacy["cached"]))  # noqa: NPY002
    get_accelerator().set_rng_state(state["accelerator"])
    torch.set_rng_state(state["torch"])
