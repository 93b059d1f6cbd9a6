"""What a step costs this process: time, CPU time and memory, read at the ends of steps."""

from __future__ import annotations

import ctypes
import gc
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.machine import resident_mb


@dataclass(slots=True)
class Meter:
    """Reads the clocks at the end of each step.

    marks: (wall seconds, CPU seconds of the process) at the start of training and after each step. The peak
    is reset when the models are loaded: loaded_mb is what is there then, peak_mb the most until the last
    step.
    """

    device: str
    marks: list[tuple[float, float]] = field(default_factory=list)
    loading_peak_mb: float = 0.0
    loaded_mb: float = 0.0
    peak_mb: float = 0.0

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
        self.mark()

    def mark(self) -> None:
        """A step ends."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.peak_mb = torch.cuda.max_memory_allocated() / 2**20
        else:
            self.peak_mb = resident_mb("VmHWM")
        self.marks.append((time.perf_counter(), time.process_time()))

    def result(self, warm_up: int) -> dict[str, float]:
        """Means over the steps after the first warm_up ones; first_step_s counts from loaded()."""
        (start, start_cpu), (end, end_cpu) = self.marks[warm_up], self.marks[-1]
        steps = len(self.marks) - 1 - warm_up
        return {
            "steps": steps,
            "wall_s": (end - start) / steps,
            "cpu_s": (end_cpu - start_cpu) / steps,
            "first_step_s": self.marks[1][0] - self.marks[0][0],
            "before_training_cpu_s": self.marks[0][1],
            "loading_peak_mb": self.loading_peak_mb,
            "loaded_mb": self.loaded_mb,
            "peak_mb": self.peak_mb,
            "growth_mb": self.peak_mb - self.loaded_mb,
        }
