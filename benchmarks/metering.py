"""What a step costs this process: time, CPU time and memory, read at the ends of steps.

Memory is told in two ways. The resident set is what the machine gives, with the holes that malloc leaves;
live tensors are what the program asks for, as torch.cuda.max_memory_allocated tells it on a GPU.
"""

from __future__ import annotations

import ctypes
import gc
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.machine import resident_mb


def live_mb() -> float:
    """What the tensors that Python knows take in host memory, each storage once, their gradients included."""
    storages: dict[int, int] = {}
    for found in gc.get_objects():
        if not issubclass(type(found), torch.Tensor):
            continue
        for tensor in (found, found.grad if found.is_leaf else None):
            if tensor is not None and tensor.device.type == "cpu" and tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values()) / 2**20


class _LivePeak:
    """The most that tensors take at once between start() and stop(), by the allocations in between."""

    def __init__(self) -> None:
        self._before_mb = live_mb()
        self._profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        )
        self._profile.start()

    def stop(self) -> float:
        """MB."""
        self._profile.stop()
        events = [
            event for event in self._profile.profiler.kineto_results.events() if event.name() == "[memory]"
        ]
        now = most = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        return self._before_mb + most / 2**20


@dataclass(slots=True)
class Meter:
    """Reads the clocks at the end of each step.

    marks: (wall seconds, CPU seconds of the process) at the start of training and after each step. The peak
    is reset when the models are loaded: loaded_mb is what is there then, peak_mb the most until the last
    step. profiled: the step (from 1) whose live tensors are watched, which takes as long as the step itself:
    the last of the warm-up.
    """

    device: str
    profiled: int
    marks: list[tuple[float, float]] = field(default_factory=list)
    loading_peak_mb: float = 0.0
    loaded_mb: float = 0.0
    peak_mb: float = 0.0
    live_loaded_mb: float = 0.0
    live_peak_mb: float = 0.0
    _watch: _LivePeak | None = None

    def loaded(self) -> None:
        """Models and data are there, training begins."""
        gc.collect()
        if self.device == "cuda":
            self.loading_peak_mb = torch.cuda.max_memory_allocated() / 2**20
            torch.cuda.reset_peak_memory_stats()
            self.loaded_mb = torch.cuda.memory_allocated() / 2**20
        else:
            ctypes.CDLL(None).malloc_trim(0)
            self.loading_peak_mb = resident_mb("VmHWM")
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self.loaded_mb = resident_mb("VmRSS")
            self.live_loaded_mb = live_mb()
        self.mark()

    def mark(self) -> None:
        """A step ends."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.peak_mb = torch.cuda.max_memory_allocated() / 2**20
        else:
            self.peak_mb = resident_mb("VmHWM")
            self._watch_live_tensors()
        self.marks.append((time.perf_counter(), time.process_time()))

    def _watch_live_tensors(self) -> None:
        if self._watch is not None:
            self.live_peak_mb = self._watch.stop()
            self._watch = None
        # The mark of this moment is not there yet: with none, training begins, and so does step 1.
        elif len(self.marks) == self.profiled - 1:
            self._watch = _LivePeak()

    def result(self, warm_up: int) -> dict[str, float]:
        """Means over the steps after the first warm_up ones; first_step_s counts from loaded()."""
        (start, start_cpu), (end, end_cpu) = self.marks[warm_up], self.marks[-1]
        steps = len(self.marks) - 1 - warm_up
        growth = self.peak_mb - self.loaded_mb
        return {
            "steps": steps,
            "wall_s": (end - start) / steps,
            "cpu_s": (end_cpu - start_cpu) / steps,
            "first_step_s": self.marks[1][0] - self.marks[0][0],
            "before_training_cpu_s": self.marks[0][1],
            "loading_peak_mb": self.loading_peak_mb,
            "loaded_mb": self.loaded_mb,
            "peak_mb": self.peak_mb,
            "growth_mb": growth,
            "live_growth_mb": growth if self.device == "cuda" else self.live_peak_mb - self.live_loaded_mb,
        }
