"""What the loop counts: times as shares of the steps' time, over windows and over the whole run."""

from __future__ import annotations

import pytest
import torch

from ds_align.batch import GlobalBatch
from ds_align.tally import Tally


def step(reference_seconds: float) -> GlobalBatch:
    nothing = torch.empty(0, dtype=torch.long)
    batch = GlobalBatch(1, 0.0, [], [], [], nothing, 1, 1, 0, nothing)
    batch.reference_seconds = reference_seconds
    return batch


def two_windows() -> Tally:
    """Two steps of 2 s with 0.5 s and 0.7 s of reference each, then one of 6 s without."""
    tally = Tally("pairs", torch.device("cpu"))
    for seconds in (0.5, 0.7):
        tally.end_step(step(seconds))
    assert tally.window.reference_seconds == pytest.approx(1.2)
    tally.close_window({"loss": 1.0, "step_time": 2.0}, {"tokens": 3.0})
    tally.end_step(step(0.0))
    assert tally.window.reference_seconds == 0.0
    tally.close_window({"loss": 4.0, "step_time": 6.0}, {"tokens": 4.0})
    return tally


def test_the_reference_s_share_is_of_the_time_of_all_steps() -> None:
    tally = two_windows()
    # 1.2 s of 2 x 2 s + 6 s.
    assert tally.reference_time_fraction == pytest.approx(0.12)
    assert tally.loss_sum == pytest.approx(2 * 1.0 + 4.0)
    assert tally.totals == {"tokens": 7.0}


def test_no_step_has_no_share() -> None:
    assert Tally("pairs", torch.device("cpu")).reference_time_fraction == 0.0


def test_the_share_goes_on_after_a_resume() -> None:
    before = two_windows()
    before.end_step(step(2.0))
    after = Tally("pairs", torch.device("cpu"))
    after.load(before.state(), before.rank_state())
    assert after.window.reference_seconds == 2.0
    after.end_step(step(1.0))
    after.close_window({"loss": 0.0, "step_time": 5.0}, {})
    # (1.2 + 3.0) s of 10 s + 2 x 5 s.
    assert after.reference_time_fraction == pytest.approx(0.21)
