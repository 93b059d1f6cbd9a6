"""A run that goes on with one rank, then with two again: the same rows in the same order, the same losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ds_align import checkpoint
from tests.distributed.launching import launch
from tests.distributed.programs.ranks import CASES
from tests.distributed.test_resume import rows_of

pytestmark = pytest.mark.distributed


# Each is four launches.
@pytest.mark.parametrize(
    "case", ["zero3", *(pytest.param(case, marks=pytest.mark.long) for case in CASES if case != "zero3")]
)
def test_two_ranks_then_one_then_two_are_the_undisturbed_run(case, models: Path, tmp_path: Path) -> None:
    def start(name: str, stop: int, ranks: int):
        return launch("ranks.py", models, tmp_path, case, name, stop, num_ranks=ranks).check()

    start("straight", 0, 2)
    # Of the save of the stopped step nothing is there yet: the run goes on after steps 2 and 4.
    start("run", 3, 2)
    alone = start("run", 5, 1)
    assert (
        "world_size: 2 -> 1: gradient_accumulation_steps=2, so that the global batch stays 6" in alone.stdout
    )
    assert "going on after step 2" in alone.stdout
    both = start("run", 0, 2)
    assert "world_size: 1 -> 2: the global batch stays 6" in both.stdout
    assert "going on after step 4" in both.stdout
    directory = tmp_path / case.replace(" ", "-")
    straight, run = (rows_of(directory / name) for name in ("straight", "run"))
    # The window of steps 2 to 4 is open in the first checkpoint: two ranks counted its beginning.
    assert [row["step"] for row in run] == [row["step"] for row in straight] == [1, 4, 8]
    for one, other in zip(straight, run, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "learning_rate"):
            assert other[name] == pytest.approx(one[name], rel=1e-5, abs=1e-7), (one["step"], name)
    expected, found = (torch.load(directory / f"{name}.pt") for name in ("straight", "run"))
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, rtol=0, atol=1e-4 * float(weight.abs().max())), name
    assert not list((directory / "run" / checkpoint.FOLDER).glob(".tmp-*"))
