"""The reference's cache from the command line: what a dry run, a bad place and precompute say of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import tiny
from tests.distributed.launching import TRAIN, environment
from tests.test_command_line import command, error_lines, run_several


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with good data, a good model, and one whose weights do not fit its config."""
    folder = tmp_path_factory.mktemp("cache")
    tiny.write_model(folder / "model")
    tiny.write_jsonl(folder / "good.jsonl", tiny.text_pairs(3))
    file = shutil.copytree(folder / "model", folder / "more-layers") / "config.json"
    more = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    return folder


def test_a_place_that_cannot_be_written_is_found_before_a_model_loads(place: Path) -> None:
    # The weights of this model do not fit: that would be the error of a model that loads.
    flags = {"model_name_or_path": "more-layers", "ref_logps": "cache"}
    cases = [
        flags | {"ref_cache_dir": "good.jsonl/x"},
        flags | {"ref_cache_dir": "good.jsonl", "use_lora": "true"},
        flags | {"ref_cache_dir": "good.jsonl", "dry_run": "true"},
    ]
    for ending in run_several([(command(place, "out", case), None, None) for case in cases]):
        assert ending["code"] == 4, ending["err"]
        (line,) = error_lines(ending["err"])
        assert line.startswith("CheckpointError: ref_cache_dir: ")
        assert line.endswith(
            "cannot be written (Not a directory); a file stands in its path, give a directory"
        )


def test_a_dry_run_counts_what_the_cache_lacks_and_scores_nothing(place: Path) -> None:
    flags = {"dry_run": "true", "ref_logps": "cache", "ref_cache_dir": "cold"}
    (ending,) = run_several([(command(place, "out-dry", flags), None, None)])
    assert ending["code"] == 0, ending["err"]
    # One step of two of the three rows.
    assert "reference cache: 2 of 2 rows are missing in" in ending["out"]
    assert "0 reference pack(s)" in ending["out"]
    assert not (place / "cold").exists()


def precompute(*arguments: str) -> subprocess.CompletedProcess:
    program = TRAIN.with_name("precompute.py")
    return subprocess.run(
        [sys.executable, str(program), *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_precompute_says_what_it_does() -> None:
    result = precompute("--help")
    assert result.returncode == 0
    usage, _, rest = result.stdout.partition("\n\n")
    assert usage.startswith("usage: precompute.py --method METHOD")
    about = " ".join(rest.partition("\n\n")[0].split())
    assert about.startswith("Score the preferences of a run under its reference model")
    assert "All rows of the training and evaluation data" in about
    assert "max_steps" in about
    assert "Train a language model" not in result.stdout


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("simpo", []),
        ("simpo", ["--ref_cache_dir", "somewhere"]),
        ("dpo", ["--reference_free"]),
        ("kto", ["--use_ref_model", "false"]),
    ],
)
def test_precompute_has_nothing_to_do_without_a_reference(method: str, flags: list[str]) -> None:
    result = precompute("--method", method, *flags)
    assert result.returncode == 2
    assert result.stderr == (
        f"ConfigError: precompute: this {method} run has no reference model, so there is nothing to compute; "
        "train at once\n"
    )


def test_precompute_names_other_mistakes() -> None:
    result = precompute("--method", "dpo", "--max_step", "3")
    assert result.returncode == 2
    assert "did you mean max_steps" in result.stderr
