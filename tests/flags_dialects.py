"""What the settings of dialects do; `dialect` calls 4 of 12 rows Egyptian, `region` 3, texts `heard` 6."""

from __future__ import annotations

from collections.abc import Callable

from tests.flags_entries import Effect, Refused

HALVES = {"dialect_distribution": {"egy": 0.5, "msa": 0.5}}
SPOKEN = {"dataset_path": "WORK/dialects.jsonl"}


def takes(**quotas: int) -> Callable[[dict], bool]:
    return lambda run: run["dialects"] == quotas and run["train_rows"] == sum(quotas.values())


DIALECTS = {
    "dialect_distribution": [
        # 4 Egyptian rows, of 9 rows each has 4.5 and msa comes first.
        Effect(
            HALVES,
            "tokens train_rows losses weights",
            base=SPOKEN,
            holds=lambda run: takes(msa=5, egy=4)(run) and "9 of 12 rows by dialect" in run["printed"],
        ),
        Effect(
            {"dialect_distribution": "egy=0.25,msa=0.75"}, "tokens", base=SPOKEN, holds=takes(msa=8, egy=3)
        ),
        Effect(HALVES | {"seed": 7}, "tokens", base=SPOKEN | HALVES),
        Refused({"dialect_distribution": {"egy": 0.5, "msa": 0.4}}, "the shares sum to 0.9, expected 1"),
        Refused({"dialect_distribution": {"egypt": 1.0}}, "unknown dialect 'egypt'; did you mean egy"),
        Refused({"dialect_distribution": "egy"}, "such as egy=0.4,msa=0.6"),
        Refused(SPOKEN | {"dialect_distribution": {"lev": 1.0}}, "no row of lev"),
    ],
    "dialect_column": [
        Effect({"dialect_column": "region"}, "tokens", base=SPOKEN | HALVES, holds=takes(msa=4, egy=3)),
        Refused({"dialect_column": "region"}, "dialect_column without effect"),
        Refused(SPOKEN | HALVES | {"dialect_column": "regoin"}, "no row has the dialect column 'regoin'"),
    ],
    "dialect_text_field": [
        Effect(
            {"dialect_column": "dialect_free", "dialect_text_field": "heard"},
            "tokens",
            base=SPOKEN | HALVES,
            holds=takes(msa=6, egy=6),
        ),
        Refused(SPOKEN | HALVES | {"dialect_column": "dialect_free"}, "no row of msa, egy"),
        Refused({"dialect_text_field": "heard"}, "dialect_text_field without effect"),
    ],
    "dialect_classifier": [
        Effect(
            {"dialect_column": "dialect_free", "dialect_classifier": "WORK/classifier"},
            "tokens",
            base=SPOKEN | HALVES,
            holds=lambda run: set(run["dialects"]) == {"msa", "egy"},
        ),
        Refused(SPOKEN | HALVES | {"dialect_classifier": "WORK/nowhere"}, "nothing is there"),
        Refused({"dialect_classifier": "WORK/classifier"}, "dialect_classifier without effect"),
    ],
    "dialect_label_map": [
        Effect(
            {"dialect_column": "place", "dialect_label_map": {"Cairo": "egy", "books": "msa"}},
            same="tokens weights",
            base=SPOKEN | HALVES,
        ),
        Refused(SPOKEN | HALVES | {"dialect_column": "place"}, "unknown dialect 'Cairo'"),
        Refused(
            HALVES | {"dialect_label_map": {"Cairo": "egypt"}}, "'Cairo' means the unknown dialect 'egypt'"
        ),
        Refused({"dialect_label_map": "Cairo=egy"}, "dialect_label_map without effect"),
    ],
}
