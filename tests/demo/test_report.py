"""What the report makes of a finished run."""

from __future__ import annotations

import json

import pytest

from ds_align.demo.__main__ import main
from ds_align.demo.report import read_metrics, read_result, result_table, save_curves
from ds_align.errors import EXIT_DATA, DataError

METRICS = [
    {"step": 0, "eval_loss": 0.6931, "eval_policy_accuracy": 0.5, "eval_margin": 0.0, "epoch": 0.0},
    {"step": 4, "loss": 0.6, "rewards/accuracies": 0.7, "rewards/margins": 0.3, "epoch": 0.1},
    {"step": 8, "loss": 0.2, "rewards/accuracies": 0.9, "rewards/margins": 2.0, "epoch": 0.2},
    {"step": 8, "eval_loss": 0.3, "eval_policy_accuracy": 0.8, "eval_margin": 1.5, "epoch": 0.2},
    {"step": 16, "eval_loss": 0.1, "eval_policy_accuracy": 0.95, "eval_margin": 3.5, "epoch": 0.4},
]


def write_run(directory, *, status="completed", metrics=METRICS):
    lines = (json.dumps(row) + "\n" for row in metrics)
    (directory / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    summary = {"status": status, "world_size": 2, "zero_stage": 3}
    (directory / "run_summary.json").write_text(json.dumps(summary), encoding="utf-8")


def test_result_is_first_and_last_evaluation(tmp_path):
    write_run(tmp_path)
    result = read_result(tmp_path, seconds=61.04)
    assert (result.accuracy_before, result.accuracy_after) == (0.5, 0.95)
    assert (result.margin_before, result.margin_after) == (0.0, 3.5)
    assert (result.loss_before, result.loss_after) == (0.6931, 0.1)
    assert (result.world_size, result.zero_stage, result.seconds) == (2, 3, 61.0)


def test_table_shows_before_and_after(tmp_path):
    write_run(tmp_path)
    lines = result_table(read_result(tmp_path, seconds=61.0)).splitlines()
    assert lines[2].split() == ["accuracy", "0.5000", "0.9500"]
    assert lines[3].split() == ["margin", "0.0000", "3.5000"]
    assert lines[4].split() == ["loss", "0.6931", "0.1000"]


def test_curves_are_a_png(tmp_path):
    write_run(tmp_path)
    save_curves(read_metrics(tmp_path), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_run_without_training_rows_still_has_curves(tmp_path):
    write_run(tmp_path, metrics=METRICS[:1])
    save_curves(read_metrics(tmp_path), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 0


@pytest.mark.parametrize("status", ["running", "preempted"])
def test_unfinished_run_is_refused(tmp_path, status):
    write_run(tmp_path, status=status)
    with pytest.raises(DataError, match=f"status '{status}', expected 'completed'"):
        read_result(tmp_path, seconds=1.0)


def test_single_evaluation_is_refused(tmp_path):
    write_run(tmp_path, metrics=METRICS[:3])
    with pytest.raises(DataError, match=r"1 evaluation\(s\), expected one before and one after training"):
        read_result(tmp_path, seconds=1.0)


def test_missing_summary_and_bad_line_name_the_file(tmp_path):
    with pytest.raises(DataError, match=r"run_summary\.json: no such file"):
        read_result(tmp_path, seconds=1.0)
    write_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: "):
        read_result(tmp_path, seconds=1.0)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(DataError, match=r"metrics\.jsonl: no such file"):
        read_result(tmp_path, seconds=1.0)


def test_command_line_needs_a_command(capsys):
    with pytest.raises(SystemExit) as left:
        main([])
    assert left.value.code == 2
    assert "build" in capsys.readouterr().err


def test_report_of_no_run_leaves_with_the_data_code(demo, tmp_path, capsys):
    arguments = ["--directory", str(demo.directory), "--output_dir", str(tmp_path), "--seconds", "1"]
    assert main(["report", *arguments]) == EXIT_DATA
    assert "run_summary.json: no such file" in capsys.readouterr().err
