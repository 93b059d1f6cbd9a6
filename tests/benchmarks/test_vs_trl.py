"""The comparison with TRL: what it counts as useful work, what it calls equal, and one small run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import metering
from benchmarks.gemm_floor import Pack, floor_seconds
from benchmarks.metering import Meter
from benchmarks.vs_trl_cases import PROFILES, Case, groups_from_file, rows_of
from benchmarks.vs_trl_report import check, difference

ROOT = Path(__file__).resolve().parents[2]


def steps(*losses: float) -> list[dict]:
    return [{"loss": loss, "logps/chosen": -10.0, "logps/rejected": -20.0} for loss in losses]


def test_the_difference_is_the_largest_relative_one():
    # |0.5 - 0.4| / 0.4 = 0.25, |2 - 2| = 0.
    assert difference(steps(0.5, 2.0), steps(0.4, 2.0), "loss") == pytest.approx(0.25)
    assert difference(steps(0.5), steps(0.5, 0.5), "loss") == float("inf")
    assert difference([{}], steps(0.5), "loss") == float("inf")


def test_other_losses_make_a_line_invalid():
    case = Case("dpo", "tiny", "mixed", "live", 2)
    mine = [{"logged": steps(0.69, 0.68)}]
    assert check(case, mine, [{"logged": steps(0.69, 0.68)}], 8) == ("losses 0.0e+00", True)
    text, valid = check(case, mine, [{"logged": steps(0.69, 0.6801)}], 8)
    assert (text[:7], valid) == ("INVALID", False)
    for broken in (float("nan"), float("inf")):
        assert not check(case, mine, [{"logged": steps(0.69, broken)}], 8)[1]


def test_a_loss_of_micro_batches_is_held_by_its_first_log_probs():
    case = Case("cpo", "tiny", "mixed", "none", 2)
    mine, other = [{"logged": steps(7.0, 6.0)}], [{"logged": steps(7.1, 6.1)}]
    assert not check(case, mine, other, 8)[1]
    text, valid = check(case, mine, other, 2)
    assert valid
    assert text == "NLL per token of a micro-batch: first log-probs 0.0e+00"
    wrong = [{"logged": [{**step, "logps/chosen": -10.1} for step in steps(7.1, 6.1)]}]
    assert not check(case, mine, wrong, 2)[1]


def test_four_ranked_completions_make_six_pairs():
    case = Case("dpo", "tiny", "ranked", "live", 2, warm_up=1)
    rows = rows_of(case, 512)
    # 4 * 3 / 2 = 6 pairs of each of 8 prompts, for 1 + 2 steps.
    assert (case.batch, len(rows)) == (48, 48 * 3)
    assert len({row["prompt"] for row in rows[:48]}) == 8
    assert len({row["chosen"] for row in rows[:6]} | {row["rejected"] for row in rows[:6]}) == 4


def test_kto_rows_carry_the_completion_of_the_row_before():
    case = Case("kto", "tiny", "tiny", "live", 1, warm_up=1)
    rows = rows_of(case, 512)
    batch = rows[8:16]
    assert [row["label"] for row in batch] == [True, False] * 4
    expected = [batch[number - 1]["completion"] for number in range(8)]
    assert [row["kl_completion"] for row in batch] == expected


def test_lengths_stay_within_the_profile():
    case = Case("dpo", "tiny", "mixed", "live", 20)
    lengths = {key: [len(row[key].split()) for row in rows_of(case, 512)] for key in ("prompt", "chosen")}
    for key, ends in (("prompt", PROFILES["mixed"].prompt), ("chosen", PROFILES["mixed"].completion)):
        assert ends[0] <= min(lengths[key]) < max(lengths[key]) <= ends[1]


def test_texts_from_a_file_become_ids_of_the_vocabulary(tmp_path):
    path = tmp_path / "pairs.jsonl"
    row = {"prompt": "Name a tree. ", "chosen": "An old oak", "rejected": "Käse und 木"}
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    ((prompt, completions),) = groups_from_file(path, 1, 400)
    assert all(ids and min(ids) >= 1 and max(ids) < 400 for ids in (prompt, *completions))
    with pytest.raises(SystemExit, match="1 rows"):
        list(groups_from_file(path, 2, 400))


def test_the_meter_leaves_the_warm_up_out():
    meter = Meter("cpu", profiled=1)
    # Loaded at 10 s, steps end at 13, 15, 19: after one step of warm-up 2 steps of 3 s and 1.5 CPU s.
    meter.marks = [(10.0, 1.0), (13.0, 2.0), (15.0, 3.0), (19.0, 5.0)]
    result = meter.result(1)
    assert (result["steps"], result["wall_s"], result["cpu_s"], result["first_step_s"]) == (2, 3.0, 1.5, 3.0)


def test_live_tensors_are_told_without_the_holes_of_malloc():
    import torch

    meter = Meter("cpu", profiled=2)
    meter.loaded()
    kept = torch.zeros(2**20)  # 4 MiB in step 1
    meter.mark()  # the watch of step 2 begins
    for _ in range(3):
        first, second = torch.zeros(2**20), torch.zeros(2**21)  # 4 and 8 MiB at once
        del first, second
    kept.grad = torch.zeros(2**20)  # 4 MiB that stay
    meter.mark()  # it ends
    # 4 there before, then 4 + 8 at once; the gradient came when those were gone.
    meter.mark()
    assert meter.result(2)["live_growth_mb"] == pytest.approx(4 + 4 + 8, abs=0.1)


@pytest.mark.parametrize("warm_up", [1, 2])
def test_the_watch_of_live_tensors_is_over_when_the_timed_steps_begin(warm_up, monkeypatch):
    watched: list[str] = []

    class Watch:
        def __init__(self) -> None:
            watched.append(f"begins after mark {len(meter.marks)}")

        def stop(self) -> float:
            watched.append(f"ends before mark {len(meter.marks) + 1}")
            return 0.0

    monkeypatch.setattr(metering, "_LivePeak", Watch)
    meter = Meter("cpu", profiled=warm_up)
    meter.loaded()  # mark 1
    for _ in range(4):
        meter.mark()
    # Timed steps begin with mark warm_up + 1.
    assert watched == [f"begins after mark {warm_up - 1}", f"ends before mark {warm_up + 1}"]


def test_padded_rows_count_whole():
    import torch

    class Padded:
        segments = None
        input_ids = torch.zeros(2, 5)
        labels = torch.zeros(3)

    assert Pack.of(Padded(), trained=True) == Pack(10, 3, [(5, 5), (5, 5)], True)


def test_the_floor_makes_three_products_for_a_trained_pack_and_one_for_a_scored():
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    sizes = {
        "num_hidden_layers": 1,
        "hidden_size": 4,
        "intermediate_size": 6,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 10,
    }

    def operations(pack: Pack) -> int:
        with FlopCounterMode(display=False) as counter:
            floor_seconds([[pack]], sizes, dtype=torch.float32, device="cpu")
        # It runs once to warm up and once for the clock, and an addition comes with each multiplication.
        return counter.get_total_flops() // 4

    # 5 tokens x (2 of 4 x 4, 2 of 4 x 2, 3 of 4 x 6) = 600; 3 x (4 x 10) = 120 for the head; attention of 2
    # heads of width 2: scores 2 x 5 x 5 x 2 = 100, and as much for the shares.
    pack = Pack(5, 3, [(5, 5)], False)
    assert operations(pack) == 600 + 120 + 200
    assert operations(pack._replace(trained=True)) == 3 * (600 + 120 + 200)


def test_help_says_that_a_quick_run_is_no_figure_of_speed():
    command = [sys.executable, str(ROOT / "benchmarks" / "vs_trl.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    text = " ".join(done.stdout.partition("--quick")[2].split())
    assert "a check that both sides run and agree, no figure of speed" in text


@pytest.mark.slow
def test_a_quick_run_agrees_with_trl(tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed: pip install trl==1.16.0")
    out = tmp_path / "found.json"
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "vs_trl.py"),
        "--quick",
        "--steps",
        "1",
        "--warm_up",
        "1",
    ]
    done = subprocess.run([*command, "--json", str(out)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    (case,) = json.loads(out.read_text())["cases"]
    assert [line["side"] for line in case["lines"]] == ["ds_align", "TRL", "TRL, fastest"]
    assert all(line["valid"] and line["cost_s"] > 0 and line["floor_ratio"] > 1 for line in case["lines"])
    # Both started at ln 2 and then moved together.
    losses = [step["loss"] for step in case["ours"][0]["logged"]]
    assert losses[0] == pytest.approx(0.6931472, abs=1e-6)
    assert len(losses) == 2
    assert "losses" in done.stdout
    assert "no figure of speed" in done.stdout
