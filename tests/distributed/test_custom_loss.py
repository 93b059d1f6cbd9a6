"""The README's own loss, used as a user would: from a directory outside the package, on two ranks."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.launching import ROOT, TRAIN, launch
from tests.distributed.programs.custom_loss import NUM_ROWS, SETTINGS
from tests.distributed.tiny import pairs, write_jsonl

pytestmark = pytest.mark.distributed

README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_of_the_readme() -> str:
    return re.search(r"^```python\n(# my_lab/losses\.py\n.*?)^```", README, re.MULTILINE | re.DOTALL)[1]


def flags_of_the_readme() -> list[str]:
    """What the README's command gives to train.py, without model and data."""
    command = re.search(r"^deepspeed path/to/launch/train\.py (.*margin_dpo.*)\\$", README, re.MULTILINE)[1]
    return shlex.split(command)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    """A user's directory with my_lab/ and data, after a run of the command and one of the program."""
    directory = tmp_path_factory.mktemp("user")
    (directory / "my_lab").mkdir()
    (directory / "my_lab" / "losses.py").write_text(code_of_the_readme(), encoding="utf-8")
    write_jsonl(directory / "pairs.jsonl", pairs(NUM_ROWS))
    (directory / "ds.json").write_text(json.dumps(SETTINGS["ds_config"]))
    settings = {name: value for name, value in SETTINGS.items() if name not in ("ds_config", "beta")}
    flags = [text for name, value in settings.items() for text in (f"--{name}", value)]
    paths = ["--ds_config", "ds.json", "--dataset_path", "pairs.jsonl", "--output_dir", "command"]
    model = str(models / "policy")
    given = ["--loss_args", json.dumps({"beta": SETTINGS["beta"]}), "--model_name_or_path", model]
    launch(TRAIN, *flags_of_the_readme(), *given, *flags, *paths, cwd=directory).check()
    launch("custom_loss.py", model, "command", ".", cwd=directory).check()
    return directory


@pytest.fixture(scope="module")
def weights(place: Path) -> dict[str, dict[str, torch.Tensor]]:
    return torch.load(place / "weights.pt")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_the_command_trains_with_the_loss(place: Path) -> None:
    assert flags_of_the_readme() == ["--method", "my_lab.losses:margin_dpo", "--margin", "0.3"]
    summary = json.loads((place / "command" / "run_summary.json").read_text())
    assert (summary["status"], summary["method"], summary["world_size"]) == ("completed", "margin_dpo", 2)
    assert summary["reference"] == "model"
    metadata = json.loads((place / "command" / "margin_dpo_metadata.json").read_text())
    assert (metadata["training_method"], metadata["beta"], metadata["margin"]) == ("margin_dpo", 0.2, 0.3)
    lines = [json.loads(line) for line in (place / "command" / "metrics.jsonl").read_text().splitlines()]
    # At the first step the policy is the reference: -log sigmoid(0 - margin).
    assert lines[0]["loss"] == pytest.approx(math.log1p(math.exp(0.3)), abs=1e-6)
    assert lines[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)


def test_its_files_and_python_give_the_same_run(place: Path, weights: dict) -> None:
    assert same(weights["margin"], load_file(place / "command" / "model.safetensors"))
    assert same(weights["again"], weights["margin"])
    facts = json.loads((place / "facts.json").read_text())
    # The path in the written file and the import in Python are one and the same method.
    assert facts["class"]
    assert facts["methods"].count("margin_dpo") == 1


def test_without_a_margin_it_is_dpo_bit_for_bit(weights: dict) -> None:
    assert same(weights["no margin"], weights["dpo"])
    assert not same(weights["margin"], weights["dpo"])


@pytest.mark.parametrize("kind", ["unpaired", "coupled", "reference-free"])
def test_a_copy_of_a_built_in_loss_trains_to_its_weights(weights: dict, kind: str) -> None:
    assert same(weights[kind], weights[f"built-in {kind}"])
    assert not same(weights[kind], weights["dpo"])


def test_a_loss_that_averages_is_refused_before_a_model_loads(place: Path, models: Path) -> None:
    code = code_of_the_readme().replace("LossOutput(losses,", "LossOutput(losses.mean(),")
    (place / "mean.py").write_text(code, encoding="utf-8")
    given = ["--model_name_or_path", models / "policy", "--dataset_path", "pairs.jsonl"]
    result = launch(TRAIN, "--method", "mean.py:margin_dpo", *given, "--output_dir", "refused", cwd=place)
    assert result.code == 2, result.output[-3000:]
    lines = [line for line in result.output.splitlines() if "ConfigError: " in line]
    assert len(lines) == 1
    assert "mean.py:8): losses of 3 preferences has shape ()" in lines[0]
    assert "Traceback" not in result.output
