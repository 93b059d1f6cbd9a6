"""Runs that are told to end, hang, or meet numbers that are not finite: real processes, two ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from ds_align import checkpoint
from tests.distributed.launching import Result, launch
from tests.distributed.test_resume import rows_of, summary_of

pytestmark = pytest.mark.distributed

NOT_FINITE = ("0-float32-stop", "2-float32-skip", "3-float32-stop", "1-bfloat16-stop", "3-bfloat16-skip")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def runs(models: Path, out: Path) -> dict[str, Result]:
    """programs/faults.py on two ranks, one launch a case, in this order."""
    cases = (
        "straight",
        "signalled",
        "continued",
        "thrice",
        "hanging",
        "alone",
        "short",
        "behind",
        *NOT_FINITE,
    )
    return {case: launch("faults.py", models, out, case, timeout=120) for case in cases}


def test_a_signal_to_one_rank_saves_the_run_and_ends_it_with_75(runs) -> None:
    found = runs["signalled"]
    assert found.code != 0, found.output[-3000:]
    assert "exits with return code = 75" in found.output
    assert "Preempted: SIGTERM on rank 1: the run was saved after step 3 of 8" in found.output
    assert "rank 1: SIGTERM: the run ends after this step and is saved" in found.output
    assert "rank 1: SIGUSR1: it is being saved" in found.output
    assert "Traceback" not in found.output


def test_the_run_that_was_told_to_end_goes_on_bit_for_bit(runs, out) -> None:
    for case in ("straight", "continued"):
        runs[case].check()
    straight, continued = (torch.load(out / f"{name}.pt") for name in ("straight", "continued"))
    assert all(torch.equal(straight[name], continued[name]) for name in straight)
    # Step 3 is one of evaluation: it was left for later, and is not lost.
    assert sorted(map(str, rows_of(out / "run"))) == sorted(map(str, rows_of(out / "straight")))
    summary = summary_of(out / "run")
    assert (summary["status"], summary["resumed_step"]) == ("completed", 3)


def test_a_third_signal_ends_at_once(runs, out) -> None:
    found = runs["thrice"]
    assert found.code != 0
    assert "return code = 75" not in found.output
    assert not checkpoint.list_steps(out / "thrice" / checkpoint.FOLDER)
    assert found.seconds < 60


def test_a_rank_that_hangs_ends_all_and_both_say_where(runs) -> None:
    found = runs["hanging"]
    assert found.code != 0
    assert "nothing was done for" in found.output
    assert "since a micro-batch (hang_timeout=6)" in found.output
    # The stacks: rank 1 sleeps in this program, rank 0 waits in the collective of the step.
    assert "faults.py" in found.output and "hooked" in found.output
    assert found.seconds < 60


def test_a_rank_that_raises_alone_ends_all(runs) -> None:
    found = runs["alone"]
    assert found.code != 0
    assert "RuntimeError: something that nobody foresaw" in found.output
    assert found.seconds < 45


def test_a_rank_whose_peer_is_gone_ends_with_the_launchers_signal(runs) -> None:
    found = runs["behind"]
    assert found.code != 0 and "return code = 7" in found.output
    # The launcher kills after 30 s what does not heed its signal.
    assert found.seconds < 30


def test_a_rank_that_is_out_of_memory_says_what_to_change(runs) -> None:
    found = runs["short"]
    assert found.code != 0 and found.seconds < 45
    (line,) = [line for line in found.output.splitlines() if "OutOfMemory: rank 1, step 3" in line]
    assert "can't allocate memory" in line
    assert "lower pack_max_tokens (now 64), or set gradient_checkpointing=true, or lower ref_batch" in line


@pytest.mark.parametrize("case", NOT_FINITE)
def test_a_gradient_that_is_not_finite_changes_no_weight(case, runs, out) -> None:
    found, same = runs[case], json.loads((out / f"{case}.json").read_text())
    # same[1] compares the weights after steps 2 and 3.
    assert same[:2] == [False, True]
    dumped = json.loads((out / case / "nan_step_3.json").read_text())
    rows = [row for pack in dumped["micro_batches"] for row in pack["rows"]]
    # Step 3 of 23 rows in batches of 6; the losses are finite, the scaled one was not.
    assert len(rows) == len(set(rows)) == dumped["num_preferences"] == 6
    assert {pack["rank"] for pack in dumped["micro_batches"]} == {0, 1}
    assert dumped["rows_with_a_loss_that_is_not_finite"] == []
    steps = [row["step"] for row in rows_of(out / case) if "loss" in row]
    if case.endswith("stop"):
        assert found.code != 0 and "return code = 5" in found.output
        assert "NonFiniteError: step 3: the gradient is not finite" in found.output
        assert (len(same), steps) == (2, [1, 2])
        assert summary_of(out / case)["status"] == "failed"
    else:
        found.check()
        assert "warning: step 3: the gradient is not finite" in found.output
        assert same[2:] == [False] * 5
        assert steps == [1, 2, 4, 5, 6, 7, 8]
        summary = summary_of(out / case)
        assert (summary["status"], summary["skipped_steps"]) == ("completed", 1)
        assert math.isfinite(summary["training_loss"])
