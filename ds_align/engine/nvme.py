"""Weights on a local NVMe disk: whether DeepSpeed can keep them there, and directories of a run's own.

DeepSpeed finds out only after it has begun to load, by an assertion or by ending the process; so what it
needs is looked at before.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import fcntl
import math
import mmap
import os
import resource
import shutil
import tempfile
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepspeed.git_version_info import installed_ops
from deepspeed.runtime.swap_tensor.utils import AIO_ALIGNED_BYTES, MIN_AIO_BYTES
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadParamConfig

from ds_align import distributed
from ds_align.config import resolved_precision
from ds_align.errors import ConfigError
from ds_align.models import ModelSource

_PREFIX = "ds_align-"
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# DeepSpeed places one buffer right after the other; direct input and output want each on a page of its own.
_BUFFER_MULTIPLE = 4096
_SECONDS_UNTIL_NOTE = 10.0


def largest_partition(source: ModelSource) -> int:
    """Elements of a rank's part of the model's largest weight, up to whole pages: the least buffer_size."""
    elements = max(_partitions(source).values())
    return math.ceil(elements / _BUFFER_MULTIPLE) * _BUFFER_MULTIPLE


def check_nvme(ds_config: dict, setting: str, source: ModelSource) -> list[str]:
    """Messages on a resolved DeepSpeed JSON that offloads to NVMe; nothing happens where it does not.

    Compiles DeepSpeed's async_io operator where that was not done before: a minute or more, once a machine.
    Raises ConfigError where the operator, the directory, its space, the buffers or the right to lock them
    in memory are not to be had.
    """
    sections = _sections(ds_config)
    if not sections:
        return []
    _load_operator(setting)
    for name, section in sections.items():
        _check_direct_writes(
            section["nvme_path"], f"{setting}: zero_optimization.{name}.nvme_path={section['nvme_path']!r}"
        )
    if "offload_param" not in sections:
        return []
    return _check_buffers(ds_config, f"{setting}: zero_optimization.offload_param", source)


class OwnDirectories:
    """A DeepSpeed JSON with a new directory below each nvme_path, this rank's alone.

    DeepSpeed's names in it depend on the rank and nothing else, and it empties what it finds under them: two
    runs, or the two models of one, would take each other's weights away. ds_config: the JSON to use instead.
    remove: takes the directories away; so do the end of this object's life and that of the process. What a
    killed process left is taken away by the next one that comes to the same nvme_path.
    """

    def __init__(self, ds_config: dict) -> None:
        self.ds_config = copy.deepcopy(ds_config)
        made: list[tuple[Path, int]] = []
        self.remove = weakref.finalize(self, _remove, made)
        for section in _sections(self.ds_config).values():
            made.append(_make(Path(section["nvme_path"])))
            section["nvme_path"] = str(made[-1][0])


def forget(swapper: Any, weight: Any) -> None:
    """Removes the file of a weight that something else has replaced."""
    Path(swapper.get_path(weight)).unlink(missing_ok=True)


def free_buffers(swapper: Any) -> None:
    """Gives back the locked memory of a model that is not used any more, which DeepSpeed would keep."""
    # A read that is still under way would write into memory of somebody else.
    swapper.synchronize_reads()
    if not swapper.use_gds:
        swapper.aio_read_handle.free_cpu_locked_tensor(swapper.buffers)
    swapper.buffers = None


def _sections(ds_config: dict) -> dict[str, dict[str, Any]]:
    """The parts of a DeepSpeed JSON that offload to NVMe."""
    zero = ds_config["zero_optimization"]
    found = {name: zero.get(name) or {} for name in ("offload_param", "offload_optimizer")}
    return {name: section for name, section in found.items() if section.get("device") == "nvme"}


def _partitions(source: ModelSource) -> dict[str, int]:
    """Elements of each weight on a rank."""
    ranks = distributed.world_size()
    return {name: math.ceil(math.prod(shape) / ranks) for name, shape in source.weight_shapes().items()}


def _load_operator(setting: str) -> None:
    caches = os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")
    text = (
        "waiting for DeepSpeed's async_io operator, which is compiled once a machine (a minute or more); "
        f"if no compiler runs, delete the file `lock` in async_io or pin_memory below {caches}"
    )
    # Another process may be compiling, and a killed one leaves its lock, on which PyTorch waits for ever.
    note = threading.Timer(_SECONDS_UNTIL_NOTE, print, [text], {"flush": True})
    note.daemon = True
    if distributed.is_main():
        note.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Not every accelerator of DeepSpeed's has one.
            from deepspeed.ops.op_builder import AsyncIOBuilder

            builder = AsyncIOBuilder()
            if not installed_ops.get(builder.name) and not builder.is_compatible(verbose=False):
                raise OSError("no libaio to link with, or no compiler")
            builder.load(verbose=False)
    except (RuntimeError, ImportError, OSError, TypeError, AssertionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ConfigError(
            f"{setting}: device=nvme needs DeepSpeed's async_io operator, which cannot be had here "
            f"({reason}); install libaio with its headers, a C++ compiler and ninja (Debian: libaio-dev g++ "
            "ninja-build), or take device=cpu"
        ) from error
    finally:
        note.cancel()


def _check_direct_writes(path: str, label: str) -> None:
    """Writes a block past the page cache, as DeepSpeed does."""
    try:
        handle, name = tempfile.mkstemp(prefix=_PREFIX, dir=path)
        os.close(handle)
        try:
            direct = os.open(name, os.O_WRONLY | os.O_DIRECT)
            try:
                with mmap.mmap(-1, mmap.PAGESIZE) as page, memoryview(page)[:AIO_ALIGNED_BYTES] as block:
                    os.write(direct, block)
            finally:
                os.close(direct)
        finally:
            Path(name).unlink()
    except OSError as error:
        raise ConfigError(
            f"{label}: a direct write fails there ({error.strerror}); give a directory that can be written, "
            "on a local disk with blocks of at most 1024 bytes"
        ) from error


def _check_buffers(ds_config: dict, label: str, source: ModelSource) -> list[str]:
    offload = DeepSpeedZeroOffloadParamConfig(**ds_config["zero_optimization"]["offload_param"])
    item_bytes = _ITEM_BYTES[resolved_precision(ds_config)]
    least_bytes = max(MIN_AIO_BYTES, ds_config.get("aio", {}).get("block_size", 0))
    partitions = _partitions(source)
    swapped = {name: size for name, size in partitions.items() if size * item_bytes >= least_bytes}
    if not swapped:
        message = (
            f"{label}: every weight stays in host memory: none has {least_bytes} bytes on a rank, the least "
            "that DeepSpeed writes to NVMe"
        )
        return [message]
    name = max(swapped, key=swapped.__getitem__)
    if swapped[name] > offload.buffer_size:
        raise ConfigError(
            f"{label}.buffer_size={offload.buffer_size}: {name} has {swapped[name]} elements on a rank; "
            f'set "auto" or at least that'
        )
    module, count = Counter(name.rpartition(".")[0] for name in swapped).most_common(1)[0]
    if count > offload.buffer_count:
        raise ConfigError(
            f"{label}.buffer_count={offload.buffer_count}: {module} needs {count} at once; set at least that"
        )
    alignment = AIO_ALIGNED_BYTES * ds_config.get("aio", {}).get("intra_op_parallelism", 1)
    buffer_bytes = math.ceil(offload.buffer_size * item_bytes / alignment) * alignment
    _check_lockable(buffer_bytes * offload.buffer_count, label)
    needed = sum(swapped.values()) * item_bytes * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = shutil.disk_usage(str(offload.nvme_path)).free
    if needed > free:
        raise ConfigError(
            f"{label}.nvme_path={str(offload.nvme_path)!r}: {free / 1e9:.1f} GB are free and the weights "
            f"take {needed / 1e9:.1f} GB; make room or give another disk"
        )
    return []


def _check_lockable(num_bytes: int, label: str) -> None:
    """DeepSpeed ends the process where it may not lock its buffers in memory."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY or num_bytes <= limit or _may_lock(limit + mmap.PAGESIZE):
        return
    raise ConfigError(
        f"{label}: the buffers lock {num_bytes / 1e6:.0f} MB in memory and this process may lock "
        f"{limit / 1e6:.0f} MB; raise `ulimit -l`, or lower buffer_count (and buffer_size where it is not "
        '"auto")'
    )


def _may_lock(num_bytes: int) -> bool:
    """Whether so much can be locked; a privileged process may lock more than its limit."""
    library = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(-1, num_bytes) as pages:
        start = ctypes.c_char.from_buffer(pages)
        address, length = ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(num_bytes)
        locked = library.mlock(address, length) == 0
        if locked:
            library.munlock(address, length)
        # The mapping cannot be closed while something points into it.
        del start
    return locked


@contextlib.contextmanager
def _opened(directory: Path) -> Iterator[int]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _make(parent: Path) -> tuple[Path, int]:
    """A new directory and a descriptor that holds its lock, which the end of the process gives back."""
    # Between its making and its locking a directory looks like a dead process's.
    with _opened(parent) as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        for old in parent.glob(f"{_PREFIX}*/"):
            # Another user's directory is that user's to sweep.
            with contextlib.suppress(OSError), _opened(old) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old)
        directory = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}rank{distributed.rank()}-", dir=parent))
        own = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(own, fcntl.LOCK_EX)
    return directory, own


def _remove(made: list[tuple[Path, int]]) -> None:
    for directory, lock in made:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)
