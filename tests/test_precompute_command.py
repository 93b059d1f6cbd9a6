"""launch/precompute.py on the command line: what it says of itself, and when there is nothing to do."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.distributed.launching import TRAIN, environment


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
