"""How the report is shown, what the command makes of --json, and the faults of output and port."""

from __future__ import annotations

import json
import socket

import numpy as np
import pytest

from ds_align.command import take_json_flag
from ds_align.config import DPOConfig
from ds_align.doctor import examine
from ds_align.doctor.report import Report, describe_lengths, lengths_of, sample_of
from ds_align.preflight import output_faults, port_faults
from tests.doctor.patients import facts_of, labelled, make_tokenizer, texts


def test_histogram_by_hand():
    # 1 to 21 are 21 lengths: bins of 3, the last one from 19 to 21.
    found = describe_lengths(np.array([1, 2, 3, 4, 21]))
    assert found["histogram"] == [
        [1, 3, 3],
        [4, 6, 1],
        [7, 9, 0],
        [10, 12, 0],
        [13, 15, 0],
        [16, 18, 0],
        [19, 21, 1],
    ]
    assert (found["mean"], found["median"], found["min"], found["max"]) == (6.2, 3.0, 1, 21)
    assert describe_lengths(np.array([5, 5]))["histogram"] == [[5, 5, 2]]
    wide = describe_lengths(np.arange(1, 101))["histogram"]
    assert [count for _, _, count in wide] == [10] * 10


def report(method: str = "dpo") -> Report:
    facts = facts_of(texts(4) if method == "dpo" else labelled(2, 2), method=method, num_steps=3)
    findings, skipped = examine(facts)
    shown = Report({"method": method}, findings, skipped)
    shown.sample = sample_of(facts.train, make_tokenizer())
    shown.lengths = lengths_of(facts.train)
    return shown


def test_scored_tokens_are_marked():
    plain, coloured = report().as_text(in_colour=False), report().as_text(in_colour=True)
    assert "  prompt: 2?\n  chosen: [[yes<eos>]]\n  rejected: [[nay<eos>]]" in plain
    assert "  chosen: \033[30;42myes<eos>\033[0m" in coloured
    assert "[[" not in coloured
    assert "\033" not in plain
    single = report("kto").as_text(in_colour=False)
    assert "  completion: [[evil<eos>]]\n  desirable: false" in single


def test_table_is_last_and_names_every_check():
    lines = report().as_text(in_colour=False).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("check "))
    numbers = [int(line[:2]) for line in lines[start:-1] if line[:2].strip().isdigit()]
    assert sorted(numbers) == list(range(1, 16))
    assert lines[-1] == "0 error(s), 1 warning(s)"
    assert max(map(len, lines)) <= 112


def test_json_holds_the_same():
    document = json.loads(json.dumps(report().as_json()))
    assert document["status"] == "warning"
    assert {entry["id"] for entry in document["checks"]} | {
        entry["id"] for entry in document["skipped"]
    } == set(range(1, 16))
    assert document["sample"]["chosen"] == {"text": "yes<eos>", "scored": True}
    assert document["lengths"]["prompt"]["histogram"] == [[2, 2, 4]]


@pytest.mark.parametrize(
    ("argv", "rest", "wanted"),
    [
        (["--beta", "1"], ["--beta", "1"], False),
        (["--json", "--beta", "1"], ["--beta", "1"], True),
        (["--beta", "1", "--json", "true"], ["--beta", "1"], True),
        (["--json=false", "--beta", "1"], ["--beta", "1"], False),
        (["--json", "false", "--dry_run", "true"], ["--dry_run", "true"], False),
    ],
)
def test_json_flag(argv, rest, wanted):
    assert take_json_flag(argv) == (rest, wanted)


def test_an_output_directory_that_is_taken(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "metrics.jsonl").write_text("{}\n")
    assert "already holds a run" in output_faults(DPOConfig(output_dir=str(tmp_path / "used")))[0]
    assert output_faults(DPOConfig(output_dir=str(tmp_path / "free"))) == ()
    assert not (tmp_path / "free").exists()


def test_a_port_that_is_taken(monkeypatch):
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        port = holder.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        monkeypatch.delenv("RANK", raising=False)
        assert port_faults() == ()  # without a launcher it is not used
        monkeypatch.setenv("RANK", "0")
        assert f"MASTER_PORT={port} cannot be had" in port_faults()[0]
    assert port_faults() == ()
