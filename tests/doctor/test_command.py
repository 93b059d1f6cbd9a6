"""launch/doctor.py as a user runs it: on rows with every kind of fault planted, and on good ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.distributed import tiny
from tests.distributed.launching import ROOT, Result, launch
from tests.doctor.patients import BOS, EOS, ids, make_tokenizer

DOCTOR = ROOT / "launch" / "doctor.py"


def good_rows(num_rows: int = 60) -> list[dict]:
    """Prompts that differ in their letters, answers of which neither is longer as a rule."""
    answers = ("yes indeed", "certainly", "of course")
    others = ("never again", "not at all", "by no means")
    return [
        {
            "prompt": f"{'abcdefghij'[number % 10]}{number} tell {number * 7919 % 1000} ways?",
            "chosen": f"{answers[number % 3]}, {number * 31 % 97} {'xyz'[number % 3] * (number % 5)}",
            "rejected": f"{others[number % 3]}, {number * 57 % 89} {'uvw'[number % 3] * (4 - number % 5)}",
        }
        for number in range(num_rows)
    ]


def bad_rows() -> list[dict]:
    rows = good_rows(20)
    rows[0]["chosen"] = "one <eos> two"  # 1
    rows[1] = ids([BOS, BOS, 5], [7, EOS], [9, EOS])  # 1
    rows[2] = ids([5, 6, 7], [9, 9], [8, EOS])  # 2
    for row in rows[3:6]:
        row["prompt"] += " "  # 3: the space belongs to the " y" of the answer
        row["chosen"] = f"y{row['chosen']}"
    rows[6]["chosen"] *= 20  # 4
    for row in rows[13:20]:
        row["chosen"] *= 2  # 6
    rows[7]["prompt"] *= 20  # 4: of the completion one token is left
    rows[8]["rejected"] = rows[8]["chosen"]  # 5: equal
    rows[9]["chosen"] = "\u202enever"  # 14
    rows[10]["chosen"] = "القاهرة".encode().decode("latin-1")  # 14
    rows += [dict(rows[11]), {**rows[12], "chosen": rows[12]["rejected"], "rejected": rows[12]["chosen"]}]
    return rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("command")
    tiny.write_model(place / "model")
    # The vocabulary of make_tokenizer is that of the model.
    make_tokenizer(bos=True, merges=True).save_pretrained(place / "model")
    shutil.copytree(place / "model", place / "no-weights")
    (place / "no-weights" / "model.safetensors").unlink()
    tiny.write_jsonl(place / "good.jsonl", good_rows())
    tiny.write_jsonl(place / "bad.jsonl", bad_rows())
    tiny.write_jsonl(place / "heldout.jsonl", [bad_rows()[13], good_rows(40)[39]])
    return place


def examine(place: Path, *also: object, **values: object) -> Result:
    settings = {
        "method": "dpo",
        "model_name_or_path": place / "model",
        "output_dir": place / "out",
        "max_steps": 60,
        **values,
    }
    flags = [text for name, value in settings.items() for text in (f"--{name}", value)]
    return launch(DOCTOR, *flags, *also, num_ranks=1)


@pytest.fixture(scope="module")
def sick(place: Path) -> Result:
    return examine(
        place,
        "--json",
        dataset_path=place / "bad.jsonl",
        eval_dataset_path=place / "heldout.jsonl",
        max_length=64,
        max_steps=10,
        warmup_steps=5,
        beta=5.0,
        learning_rate=1e-4,
    )


def test_every_planted_fault_is_named(sick: Result) -> None:
    assert sick.code == 3, sick.output[-4000:]
    report = json.loads(sick.stdout)
    found = {entry["id"]: entry for entry in report["checks"]}
    assert sorted(found) == list(range(1, 16))
    levels = {number: entry["level"] for number, entry in found.items()}
    errors = {number for number, level in levels.items() if level == "error"}
    warnings = {number for number, level in levels.items() if level == "warning"}
    assert errors == {1, 2, 4}
    assert warnings == {3, 5, 6, 7, 8, 12, 13, 14}
    assert (report["status"], report["num_errors"], report["num_warnings"]) == ("error", 3, 8)
    assert found[1]["value"]["rows_with_double_bos"] == 1
    assert found[1]["value"]["completions_with_several_eos"] == 1
    assert found[2]["value"]["completions_without_eos"] == 1
    assert found[3]["value"]["rows_shifted"] == 3
    assert found[4]["value"]["rows_cut_to_nothing"] == 1
    assert [found[5]["value"][kind] for kind in ("equal", "duplicate", "contradictory")] == [1, 1, 1]
    assert found[14]["value"]["shared_prompts"] == 1
    assert found[14]["value"]["rows_with_bidi_controls"] == 1
    assert found[14]["value"]["rows_with_mojibake"] == 1
    assert all(entry["remedy"] for entry in report["checks"] if entry["level"] == "error")
    assert all(
        set(entry) >= {"id", "name", "level", "value", "limit", "remedy", "examples"}
        for entry in found.values()
    )


def test_all_but_the_document_is_on_stderr(sick: Result) -> None:
    assert sick.stderr.strip().splitlines()[-1].startswith("DataError: 3 of the doctor's checks")
    assert "-> " in sick.stderr
    assert sick.stdout.startswith("{")


def test_good_rows_end_with_0(place: Path) -> None:
    ran = examine(place, dataset_path=place / "good.jsonl")
    assert ran.code == 0, ran.output[-4000:]
    lines = ran.stdout.splitlines()
    # Only the random model is far from the data.
    assert lines[-1] == "0 error(s), 1 warning(s)"
    assert [line[:24].strip() for line in lines if line[27:34] == "warning"] == ["12 distance of the data"]
    assert "  chosen: [[" in ran.stdout
    assert "<eos>]]" in ran.stdout
    assert "\033" not in ran.stdout
    assert any(line.startswith("prompt: 60 of ") for line in lines)
    # The table is last.
    start = next(number for number, line in enumerate(lines) if line.startswith("check "))
    assert all("#" not in line for line in lines[start:])
    assert not (place / "out").exists()


def test_a_model_without_weights_is_not_scored(place: Path) -> None:
    ran = examine(
        place,
        "--json",
        model_name_or_path=place / "no-weights",
        dataset_path=place / "good.jsonl",
        method="ipo",
    )
    assert ran.code == 0, ran.output[-4000:]
    report = json.loads(ran.stdout)
    assert [entry["id"] for entry in report["skipped"]] == [9, 12]
    assert all("holds no weights" in entry["reason"] for entry in report["skipped"])
    margin = next(entry for entry in report["checks"] if entry["id"] == 10)
    assert (margin["level"], margin["value"]["margin"]) == ("info", 5.0)


def test_without_data_the_settings_are_still_examined(place: Path) -> None:
    ran = examine(place, "--json", beta=5)
    report = json.loads(ran.stdout)
    assert (ran.code, report["status"]) == (0, "warning")
    assert [entry["id"] for entry in report["checks"]] == [7, 8, 10, 13, 15]
    assert [entry["id"] for entry in report["skipped"]] == [1, 2, 3, 4, 5, 6, 9, 11, 12, 14]


def test_what_cannot_be_opened_is_a_document_too(place: Path) -> None:
    for flags, code, words in (
        ({"dataset_path": place / "gone.jsonl"}, 3, "DataError: "),
        ({"beta": -1}, 2, "ConfigError: "),
    ):
        ran = examine(place, "--json", **flags)
        assert ran.code == code
        report = json.loads(ran.stdout)
        assert report["status"] == "error"
        assert report["error"].startswith(words)
