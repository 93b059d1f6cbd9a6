"""The learning rate against transformers' own schedules, step by step."""

from __future__ import annotations

import pytest
import torch

from ds_align.config import DPOConfig
from ds_align.schedule import learning_rate_schedule

NUM_STEPS = 23


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(
    # A tenth of 23 steps is 2.3: rounded up, as transformers does.
    ("settings", "warmup"),
    [({}, 0), ({"warmup_steps": 5}, 5), ({"warmup_ratio": 0.1}, 3), ({"warmup_steps": 40}, 40)],
)
def test_every_step_is_that_of_transformers(name: str, settings: dict, warmup: int) -> None:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(
        "constant_with_warmup" if name == "constant" else name,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=NUM_STEPS,
    )
    ours = learning_rate_schedule(DPOConfig(lr_scheduler_type=name, **settings), NUM_STEPS)
    for step in range(NUM_STEPS + 3):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12), step
        optimizer.step()
        theirs.step()


def test_linear_by_hand() -> None:
    # Warm-up over 2 of 6 steps: 0, 1/2; then 1 - k/4 for k = 0..3.
    factor = learning_rate_schedule(DPOConfig(warmup_steps=2), 6)
    assert [factor(step) for step in range(7)] == [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
