"""Runs that are killed and continued: bit for bit the uninterrupted run, or an error that says why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ds_align import checkpoint
from tests.distributed import tiny
from tests.distributed.launching import TRAIN, Result, launch
from tests.distributed.programs.resume_alone import CASES, STEPS

pytestmark = pytest.mark.distributed

CLOCK = {
    "pairs_per_second",
    "tokens_per_second",
    "step_time",
    "reference_time_fraction",
    "peak_memory_gb",
    "eval_runtime",
    "eval_samples_per_second",
}


def rows_of(directory: Path) -> list[dict]:
    text = (directory / "metrics.jsonl").read_text(encoding="utf-8")
    return without_clock([json.loads(line) for line in text.splitlines()])


def without_clock(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in rows]


def summary_of(directory: Path) -> dict:
    return json.loads((directory / "run_summary.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def runs(models: Path, out: Path) -> dict[str, Result]:
    """programs/resume.py on two ranks, one launch a case, in this order."""
    found = {}
    for case in ("straight", "killed", "dying", "resumed"):
        found[case] = launch("resume.py", models, out, case)
        if case == "dying":
            folder = out / "run" / checkpoint.FOLDER
            found["left"] = sorted(path.name for path in folder.iterdir())
    return found


def test_the_runs_ended_as_they_should(runs) -> None:
    for case in ("straight", "resumed"):
        runs[case].check()
    for case in ("killed", "dying"):
        assert runs[case].code != 0, case
        assert runs[case].seconds < 120, case


def test_a_run_that_was_killed_twice_ends_bit_for_bit_as_if_it_had_not(runs, out) -> None:
    runs["resumed"].check()
    straight, resumed = (torch.load(out / f"{name}.pt") for name in ("straight", "resumed"))
    assert set(straight) == set(resumed)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    rows = rows_of(out / "run")
    assert rows == rows_of(out / "straight")
    # 23 rows in batches of 6 are 4 steps an epoch, the last of 5 rows; the open window of step 3 was kept.
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 4, 6, 8]
    assert [row["step"] for row in rows if "eval_loss" in row] == [3, 6, 8]
    one, other = summary_of(out / "straight"), summary_of(out / "run")
    assert one["training_loss"] == other["training_loss"]
    assert one["tokens_forward"] == other["tokens_forward"]
    assert (other["status"], other["resumed_step"], other["global_step"]) == ("completed", 3, 8)


def test_a_save_that_lost_a_rank_is_not_used(runs) -> None:
    assert runs["left"] == [".tmp-step-00000006", "latest", "step-00000003"]
    assert "note: resume: going on after step 3" in runs["dying"].stdout
    (line,) = [line for line in runs["resumed"].stdout.splitlines() if line.startswith("warning:")]
    assert ".tmp-step-00000006" in line
    assert "going on from step-00000003" in line


def test_the_checkpoints_are_whole_and_counted(runs, out) -> None:
    runs["resumed"].check()
    folder = out / "run" / checkpoint.FOLDER
    assert [step for step, _ in checkpoint.list_steps(folder)] == [6, 3]
    assert (folder / "latest").read_text() == "step-00000006\n"
    assert not list(folder.glob(".tmp-*"))
    manifest = json.loads((folder / "step-00000006" / "manifest.json").read_text())
    assert manifest["world_size"] == 2
    assert checkpoint.verify(folder / "step-00000006").state["method"] == "dpo"
    summary = summary_of(out / "run")
    assert summary["checkpoint_bytes"] == sum(entry["size"] for entry in manifest["files"].values())
    assert summary["save_seconds"] > 0


def test_a_disk_that_is_full_on_one_rank_ends_the_run_on_both(runs, out) -> None:
    runs["straight"].check()
    for rank in range(2):
        error = json.loads((out / f"full-{rank}.json").read_text())
        assert ".tmp-step-00000006: the checkpoint cannot be written" in error
        assert "File too large" in error
    folder = out / "full" / checkpoint.FOLDER
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000003"]
    assert checkpoint.verify(folder / "step-00000003").step == 3
    assert summary_of(out / "full")["status"] == "failed"


@pytest.fixture(scope="module")
def alone(models: Path, out: Path, runs: dict) -> dict:
    """What programs/resume_alone.py found in one process."""
    assert (out / "run" / checkpoint.FOLDER / "step-00000003").is_dir(), runs["resumed"].output[-3000:]
    if not (models / "dropout").exists():
        tiny.write_model(models / "dropout", seed=0)
        path = models / "dropout" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_dropout": 0.2}))
    two_ranks = out / "run" / checkpoint.FOLDER / "step-00000003"
    launch("resume_alone.py", models, out, two_ranks, num_ranks=1).check()
    return torch.load(out / "alone.pt")


@pytest.mark.parametrize("case", CASES)
def test_stopped_and_continued_is_straight(alone, case) -> None:
    straight, resumed = alone["continued"][case]
    assert all(
        torch.equal(straight["weights"][name], resumed["weights"][name]) for name in straight["weights"]
    )
    assert without_clock(resumed["rows"]) == without_clock(straight["rows"])
    assert [row["step"] for row in resumed["rows"]] == [1, 2, 4, 6, 8]
    assert resumed["training_loss"] == straight["training_loss"]
    assert set(resumed["metrics"]) == set(straight["metrics"])
    assert resumed["checkpoints"] == ["latest", "step-00000003", "step-00000006"]


REFUSED = {
    "method": "CheckpointError 4: method: 'kto' -> 'ipo'",
    "world_size": "CheckpointError 4: world_size: 2 -> 1: the global batch was 6 and would be 5; give",
    "learning_rate": "CheckpointError 4: learning_rate: 0.001 -> 0.0005",
    "seed": "CheckpointError 4: seed: 42 -> 7",
    "batch": "CheckpointError 4: global_batch_size: 6 -> 4",
    "max_steps": "CheckpointError 4: num_steps: 8 -> 12",
    "stage": "CheckpointError 4: ds_config.zero_optimization.stage: 1 -> 2",
    "model": "CheckpointError 4: model_name_or_path:",
    "nowhere": "CheckpointError 4: manifest.json: there is no such file",
    "data": "CheckpointError 4: the training data are other rows",
    "none": "ConfigError 2: already holds a run",
    "elsewhere": "ConfigError 2: already holds a run",
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_run_is_refused(alone, case) -> None:
    kind, _, words = REFUSED[case].partition(": ")
    found = alone["refused"][case]
    assert found.startswith(f"{kind}: "), found
    assert words in found


def test_the_newest_two_are_kept(alone) -> None:
    kept = ["latest", "step-00000002", "step-00000004"]
    assert alone["allowed"]["after_stop"]["checkpoints"] == kept


def test_a_checkpoint_of_another_directory_brings_its_metrics(alone) -> None:
    elsewhere, fresh = alone["allowed"]["elsewhere"], alone["allowed"]["fresh"]
    assert without_clock(elsewhere["rows"]) == without_clock(fresh["rows"])
    assert elsewhere["training_loss"] == fresh["training_loss"]
    assert elsewhere["summary"]["resumed_step"] == 2


def test_damaged_ones_are_passed_over_and_some_settings_may_change(alone) -> None:
    changed, fresh = alone["allowed"]["changed"], alone["allowed"]["fresh"]
    (warning,) = [line for line in changed["printed"].splitlines() if line.startswith("warning:")]
    assert "going on from step-00000002" in warning
    for words in ("step-00000004", "its hash differs", "step-00000009"):
        assert words in warning, words
    assert "pack_max_tokens: 64 -> 48" in changed["printed"]
    assert "num_steps: 8 -> 9" in changed["printed"]
    # Logged at 1 and 2 by the stopped run, then at every step.
    assert [row["step"] for row in changed["rows"]] == list(range(1, STEPS + 2))
    # The directory of step 9 went when step 4 was written anew; nothing bad is left.
    assert changed["checkpoints"] == ["latest", "step-00000002", "step-00000004", "step-00000008"]
    before, now = fresh["rows"][-1], changed["rows"][STEPS - 1]
    assert before["step"] == now["step"] == STEPS
    assert now["learning_rate"] == before["learning_rate"]


def test_without_a_whole_checkpoint_auto_starts_afresh_but_not_over_a_finished_run(alone) -> None:
    fresh, early = alone["allowed"]["fresh"], alone["allowed"]["early"]
    for run in (fresh, early):
        assert "starting at the first step" in run["printed"]
    assert without_clock(early["rows"]) == without_clock(fresh["rows"])
    assert "completed, without a whole checkpoint" in alone["allowed"]["finished"]["error"]


def test_the_command_goes_on_and_refuses_with_code_4(models: Path, tmp_path: Path) -> None:
    data = tiny.write_jsonl(tmp_path / "pairs.jsonl", tiny.text_pairs())
    command = {
        "--method": "cpo",
        "--model_name_or_path": models / "policy",
        "--dataset_path": data,
        "--output_dir": tmp_path / "out",
        "--ds_config": "zero1",
        "--per_device_train_batch_size": 3,
        "--save_steps": 2,
    }
    arguments = [part for pair in command.items() for part in pair]
    launch(TRAIN, *arguments, num_ranks=1).check()
    refused = launch(TRAIN, *arguments, "--learning_rate", "1e-6", "--resume", num_ranks=1)
    assert refused.code == 4, refused.output[-3000:]
    assert "CheckpointError" in refused.stderr
    assert "learning_rate: 5e-07 -> 1e-06" in refused.stderr
    assert "Traceback" not in refused.stderr
    before = rows_of(tmp_path / "out")
    resumed = launch(TRAIN, *arguments, "--resume", num_ranks=1).check()
    assert "going on after step 2" in resumed.stdout
    assert rows_of(tmp_path / "out") == before
