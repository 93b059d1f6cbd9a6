"""Settings that choose rows: one way to say it, and a mixture as YAML, as JSON and on the command line."""

from __future__ import annotations

import json

import pytest

from ds_align.config import DPOConfig, parse_command_line
from ds_align.errors import ConfigError

PARTS = [
    {"path": "a.jsonl", "weight": 2, "columns": {"prompt": "question"}},
    {"path": "b.csv", "repeat": True},
]
AS_YAML = "[{path: a.jsonl, weight: 2, columns: {prompt: question}}, {path: b.csv, repeat: true}]"


@pytest.mark.parametrize("text", [AS_YAML, json.dumps(PARTS)])
def test_a_mixture_on_the_command_line_is_that_of_the_file(text, tmp_path) -> None:
    file = tmp_path / "run.yaml"
    lines = ["method: dpo", "mixture:"]
    lines += [
        "- path: a.jsonl",
        "  weight: 2",
        "  columns: {prompt: question}",
        "- {path: b.csv, repeat: true}",
    ]
    file.write_text("\n".join([*lines, "mixture_rows: 7"]))
    by_file = parse_command_line(["--config", str(file)])
    by_flag = parse_command_line(["--method", "dpo", "--mixture", text, "--mixture_rows=7"])
    assert by_file == by_flag == DPOConfig(mixture=PARTS, mixture_rows=7)
    first, second = by_flag.mixture_parts
    assert (first.title, first.weight, first.columns, first.repeat) == (
        "a",
        2.0,
        {"prompt": "question"},
        False,
    )
    assert (second.title, second.weight, second.columns, second.repeat) == ("b", 1.0, {}, True)
    # A flag takes the place of the whole list.
    over = parse_command_line(["--config", str(file), "--mixture", "[{path: c.json}]"])
    assert [part.title for part in over.mixture_parts] == ["c"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mixture", "[{path: a"], "--mixture: '[{path: a' is not valid JSON"),
        (["--mixture", "{path: a}"], "expected a list of parts such as"),
        (["--mixture"], "expected a list of parts such as"),
        (["--mixture", "[]"], "expected at least one part"),
        (["--mixture", "[{path: a}]", "--dataset_name", "b"], "dataset_path beside mixture"),
        (["--mixture", "[{path: a}]", "--dataset_split", "b"], "dataset_split beside mixture"),
        (["--mixture", "[{path: a, path: b}]"], "'path' is given twice"),
        (["--mixture_rows", "0", "--mixture", "[{path: a}]"], "expected an integer >= 1"),
    ],
)
def test_mixtures_that_say_nothing_or_two_things(flags, message) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_command_line(["--method", "dpo", *flags])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_splits_are_two_settings_or_one() -> None:
    both = parse_command_line(["--method", "dpo", "--dataset_splits", "train[:90%],test"])
    assert (both.train_split, both.eval_split) == ("train[:90%]", "test")
    single = DPOConfig(dataset_split="train", eval_dataset_split="test[:5]")
    assert (single.train_split, single.eval_split) == ("train", "test[:5]")
    assert (DPOConfig().train_split, DPOConfig(dataset_splits=["a"]).eval_split) == (None, None)
    for wrong in ([], ["a", ""], ["a", "b", "c"]):
        with pytest.raises(ConfigError, match="expected one that trains, then one that evaluates"):
            DPOConfig(dataset_splits=wrong)
    with pytest.raises(
        ConfigError, match="dataset_splits and dataset_split, eval_dataset_split say the same"
    ):
        DPOConfig(dataset_splits=["a"], dataset_split="a", eval_dataset_split="b")
    with pytest.raises(ConfigError, match="expected a split such as train"):
        DPOConfig(dataset_split="")
