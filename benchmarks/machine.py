"""Time, memory, and what must be known of this machine to read them."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from ds_align.kernels import backend, native

DISTRIBUTIONS = (
    *("ds_align", "torch", "triton", "deepspeed", "transformers", "accelerate", "trl", "numpy"),
    *("liger-kernel", "cut-cross-entropy"),
)
# What changes times without being an argument.
ENVIRONMENT = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "LD_PRELOAD",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    native.ENVIRONMENT_VARIABLE,
)


def seconds_of(run: Callable[[], object], device: str) -> float:
    """One run, in CPU seconds of the process or seconds of the device."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def resident_mb(key: str) -> float:
    """VmRSS or VmHWM of this process."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(rf"{key}:\s+(\d+) kB", status)[1]) / 1024


def peak_mb_of(run: Callable[[], object], device: str) -> float:
    """Most memory that one run took beyond what was there before it."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident_mb("VmRSS")
    run()
    return resident_mb("VmHWM") - before


def version_of(distribution: str) -> str:
    """Its version, or that it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def machine(device: str) -> dict[str, object]:
    """The processor, its cores (all, and those that this process may use), and the GPU if one is measured."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    about: dict[str, object] = {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        about |= {"gpu": properties.name, "gpu_memory_mb": properties.total_memory // 2**20}
    return about


def conditions(device: str) -> dict[str, object]:
    """What must be known to read the numbers: machine, versions, date, load and environment at the start."""
    return {
        "machine": machine(device),
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda}
        | {name: version_of(name) for name in DISTRIBUTIONS},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average_at_start": list(os.getloadavg()),
        "live_back_end": backend(),
        "extension_absent": native.WHY_ABSENT,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
    }
