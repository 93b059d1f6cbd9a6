"""Learning-rate schedules as plain functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

from ds_align.config import BaseConfig


def learning_rate_schedule(config: BaseConfig, num_steps: int) -> Callable[[int], float]:
    """step (0 for the first) to a factor of learning_rate, as in transformers.

    Linear warm-up from 0 over warmup_steps (or warmup_ratio x num_steps, rounded up), then linear to 0,
    a half cosine to 0, or constant.
    """
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * num_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        if config.lr_scheduler_type == "constant":
            return 1.0
        progress = (step - warmup) / max(1, num_steps - warmup)
        if config.lr_scheduler_type == "linear":
            return max(0.0, 1.0 - progress)
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))

    return factor
