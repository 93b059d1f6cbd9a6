"""What the settings that choose rows do; flags_table.py takes these entries over."""

from __future__ import annotations

from collections.abc import Callable

from tests.flags_entries import EVALUATED, TRAINING, Effect, Refused

HUB = {"dataset_path": "WORK/copied_hub"}
PARTS = [
    {"path": "WORK/pairs.jsonl", "weight": 2},
    {"path": "WORK/renamed_prompt.jsonl", "columns": {"prompt": "my_prompt"}, "name": "renamed"},
]
MIXTURE = {"dataset_path": None, "mixture": PARTS}


def has_rows(number: int, eval_set: str | None = None) -> Callable[[dict], bool]:
    return lambda run: (run["train_rows"], run["eval_set"]) == (number, eval_set)


def mixed(*rows: int) -> Callable[[dict], bool]:
    return lambda run: [part["rows"] for part in run["mixture"]] == list(rows)


SOURCES = {
    "dataset_split": [
        Effect({"dataset_split": "train[:75%]"}, "train_rows tokens", holds=has_rows(9)),
        Refused({"dataset_split": "trian"}, "there is no split 'trian'; found train"),
    ],
    "eval_dataset_split": [
        Effect({"eval_dataset_split": "train[:5]"}, "eval_batches", TRAINING, holds=has_rows(12, "split")),
        Effect({"eval_dataset_split": "train[:2]"}, "eval_losses", TRAINING, base=EVALUATED),
        Refused(
            {"eval_dataset_split": "train[:5]", "eval_fraction": 0.25}, "eval_fraction=0.25 has no effect"
        ),
        Refused(MIXTURE | {"eval_dataset_split": "test"}, "eval_dataset_split beside mixture"),
    ],
    "dataset_splits": [
        Effect(
            {"dataset_splits": ["train[:9]", "train[9:]"]}, "tokens eval_batches", holds=has_rows(9, "split")
        ),
        Refused({"dataset_splits": ["a", "b", "c"]}, "expected one that trains, then one that evaluates"),
        Refused({"dataset_splits": ["train"], "dataset_split": "train"}, "say the same"),
    ],
    "dataset_config_name": [
        Effect(HUB | {"dataset_config_name": "many"}, same=f"tokens {TRAINING}"),
        Effect(HUB | {"dataset_config_name": "few"}, "tokens", base=HUB | {"dataset_config_name": "many"}),
        Refused(HUB | {"dataset_config_name": "none"}, "'none' not found"),
        Refused({"dataset_config_name": "many"}, "no such file or directory"),
    ],
    "dataset_revision": [
        Refused({"dataset_revision": "v1"}, "dataset_revision='v1' without effect"),
        Refused(MIXTURE | {"dataset_revision": "v1"}, "dataset_revision beside mixture"),
    ],
    "mixture": [
        # Shares of 18 rows: 12 and 6; of 19 the first part would have 12.67, so 13 of its 12.
        Effect(MIXTURE, "tokens train_rows order losses", holds=mixed(12, 6)),
        Refused({"mixture": PARTS}, "dataset_path beside mixture"),
        Refused({"dataset_path": None, "mixture": [{"weight": 1}]}, "part 1: path is missing"),
        Refused({"dataset_path": None, "mixture": [{"path": "WORK/nowhere.csv"}]}, "mixture part 'nowhere'"),
    ],
    "mixture_rows": [
        Effect({"mixture_rows": 9}, "tokens train_rows", base=MIXTURE, holds=mixed(6, 3)),
        Refused(MIXTURE | {"mixture_rows": 30}, "its share of mixture_rows=30 is 20 rows, and it has 12"),
        Refused({"mixture_rows": 9}, "mixture_rows without effect"),
    ],
}
