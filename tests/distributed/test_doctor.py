"""The doctor on two real ranks: the models' first scores, the command, and the start of training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed import tiny
from tests.distributed.launching import ROOT, TRAIN, Result, launch

pytestmark = pytest.mark.distributed

DOCTOR = ROOT / "launch" / "doctor.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("doctor")
    tiny.write_model(place / "models" / "policy")
    tiny.write_model(place / "models" / "reference", seed=1)
    tiny.write_jsonl(place / "pairs.jsonl", tiny.text_pairs(24))
    return place


@pytest.fixture(scope="module")
def scores(place: Path) -> dict[str, dict]:
    launch("doctor.py", place / "models", place).check()
    return json.loads((place / "doctor-2.json").read_text())


@pytest.mark.parametrize("case", ["dpo", "dpo cached", "dpo lora", "dpo bfloat16", "dpo coupled", "kto"])
def test_policy_and_reference_of_the_same_weights_agree(case: str, scores: dict[str, dict]) -> None:
    found = scores[case]["9"]
    assert found["level"] == "ok", found
    assert found["value"]["tokens"] > 50
    assert found["value"]["mean_difference"] <= found["value"]["max_difference"]
    if case in ("dpo", "dpo cached", "dpo lora"):
        assert found["value"]["first_loss"] == pytest.approx(0.693147, abs=1e-5)
    else:
        assert found["value"]["first_loss"] is None or case == "dpo bfloat16"


def test_another_reference_is_no_fault(scores: dict[str, dict]) -> None:
    found = scores["dpo other"]["9"]
    assert found["level"] == "info"
    assert found["value"]["max_difference"] > 0.1


def test_without_a_reference_the_data_are_still_measured(scores: dict[str, dict]) -> None:
    assert scores["simpo"]["9"]["message"] == "no reference to compare with"
    # A random model of 112 tokens: some -ln 112 = -4.7 nats a token.
    value = scores["simpo"]["12"]["value"]["chosen_logp_per_token"]
    assert -6.0 < value < -4.0
    # The policy's own weights: the same as under DPO's reference.
    assert value == pytest.approx(scores["dpo"]["12"]["value"]["chosen_logp_per_token"], abs=1e-5)


def test_a_policy_that_is_not_its_reference_stops_the_run(scores: dict[str, dict]) -> None:
    assert scores["changed error"]["error"].startswith("DataError: doctor, check 9")
    assert scores["changed warn"]["9"]["level"] == "error"
    assert scores["changed off"] == {}


def flags(place: Path, output: str, **values: object) -> list[str]:
    settings = {
        "method": "dpo",
        "model_name_or_path": place / "models" / "policy",
        "dataset_path": place / "pairs.jsonl",
        "output_dir": place / output,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
    }
    return [text for name, value in (settings | values).items() for text in (f"--{name}", str(value))]


def test_the_command_runs_under_the_launcher(place: Path) -> None:
    ran = launch(DOCTOR, *flags(place, "unused"))
    assert ran.code == 0, ran.output[-4000:]
    assert ran.stdout.count("15 machine                 ok") == 1
    assert " 9 start agreement         ok" in ran.stdout
    assert not (place / "unused").exists()


@pytest.fixture(scope="module")
def trained(place: Path) -> Result:
    # A beta this large makes gradients that are.
    return launch(TRAIN, *flags(place, "trained", beta=300.0)).check()


def test_training_keeps_what_the_doctor_found(place: Path, trained: Result) -> None:
    summary = json.loads((place / "trained" / "run_summary.json").read_text())
    levels = {finding["id"]: finding["level"] for finding in summary["doctor"]}
    assert sorted(levels) == list(range(1, 16))
    assert (levels[7], levels[9], levels[13]) == ("warning", "ok", "warning")
    said = [line for line in trained.stdout.splitlines() if line.startswith("note: doctor, check")]
    numbers = [line.split("check ")[1].split(" ")[0] for line in said]
    # beta is said once, by the settings.
    assert len(numbers) == len(set(numbers))
    assert "7" not in numbers
    assert trained.stdout.count("beta=300 is outside") == 1


def test_training_says_once_that_the_gradient_is_large(place: Path, trained: Result) -> None:
    rows = [json.loads(line) for line in (place / "trained" / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["grad_norm"] > 100.0 for row in rows) > 1
    remarks = json.loads((place / "trained" / "run_summary.json").read_text())["remarks"]
    assert [remark["step"] for remark in remarks if "grad_norm" in remark["text"]] == [1]
    assert trained.stdout.count("warning: grad_norm is") == 1
