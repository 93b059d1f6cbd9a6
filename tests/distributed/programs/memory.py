"""Peak private memory of each rank while a large model is loaded, referenced and saved; writes JSON.

usage: memory.py MODEL OUT
"""

from __future__ import annotations

import ctypes
import gc
import json
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from ds_align import DPOConfig, distributed
from ds_align.engine import AlignEngine
from ds_align.export import save_model
from ds_align.models import ModelSource
from tests.distributed.tiny import ds_config, pairs, program_arguments, reference_ds_config


def anonymous_bytes() -> int:
    """Private memory of this process: weights live there; pages of mapped files can be dropped again."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc/self/status")


class Peak:
    """Samples the memory in a thread; growth is the peak over what was there at the start, in bytes."""

    def __init__(self) -> None:
        self.growth = 0
        self._stop = threading.Event()

    def __enter__(self) -> Peak:
        gc.collect()
        # Freed memory that the allocator kept would hide as much growth.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        self._start = anonymous_bytes()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.001):
            self.growth = max(self.growth, anonymous_bytes() - self._start)


def measured(action: Callable[[], object], growth: dict[str, int], name: str) -> object:
    with Peak() as peak:
        result = action()
    growth[name] = peak.growth
    return result


def measure_loads(growth: dict[str, int]) -> None:
    """Measures every load of weights by its place: the policy's is the first, the reference's the second."""
    load = ModelSource.load
    names = iter(("policy", "reference"))
    ModelSource.load = lambda source, dtype: measured(lambda: load(source, dtype), growth, next(names))


def main() -> None:
    model, out = program_arguments()
    growth: dict[str, int] = {}
    measure_loads(growth)
    buckets = dict.fromkeys(("reduce_bucket_size", "stage3_prefetch_bucket_size"), "auto")
    config = DPOConfig(
        model_name_or_path=model,
        ds_config=ds_config(3, **buckets),
        ref_ds_config=reference_ds_config(),
        per_device_train_batch_size=1,
        dtype="float32",
        optim="sgd",
        max_shard_size="20MB",
    )
    with Peak() as peak:
        engine = AlignEngine.from_config(config, train_dataset=pairs(4))
    growth["both_with_optimizer"] = peak.growth
    parameters = list(engine.policy.module.parameters())
    measured(lambda: save_model(engine, Path(out) / "saved"), growth, "saved")
    growth["whole"] = sum(parameter.ds_numel * 4 for parameter in parameters)
    growth["held"] = sum(parameter.ds_tensor.numel() * 4 for parameter in parameters)
    every = [None] * distributed.world_size()
    torch.distributed.all_gather_object(every, growth)
    if distributed.is_main():
        (Path(out) / "memory.json").write_text(json.dumps(every), encoding="utf-8")
    distributed.barrier()


if __name__ == "__main__":
    main()
