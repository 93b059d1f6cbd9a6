"""Shares of Arabic dialects that the training data is cut down to."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from ds_align.config.schema import Expects, FieldName, Number, PathText, Schema, changed, nearest, rule

# Modern Standard, Egyptian, Gulf, Levantine and Maghrebi Arabic, and what nothing could be told of.
DIALECTS = ("msa", "egy", "glf", "lev", "mgr", "unknown")
SHARES_TOLERANCE = 1e-6


def _mapping_from_text(value: Any) -> Any:
    """Read "egy=0.4,msa=0.6" or JSON; what is neither stays as it is, for the type check to refuse."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    entries = [entry.partition("=") for entry in value.split(",")]
    found = {name.strip(): text.strip() for name, _, text in entries}
    is_whole = len(found) == len(entries) and all(name and text for name, text in found.items())
    return found if is_whole else value


Shares = Annotated[
    dict[str, Number],
    BeforeValidator(_mapping_from_text),
    Expects("shares of dialects, as a mapping or as text such as egy=0.4,msa=0.6"),
]
LabelMap = Annotated[
    dict[str, str],
    BeforeValidator(_mapping_from_text),
    Expects("names and their dialects, as a mapping or as text such as LABEL_0=egy,LABEL_1=msa"),
]


def shares_problem(shares: Mapping[str, float]) -> str | None:
    """What is wrong with the shares of a target distribution; None where nothing is."""
    for label, share in shares.items():
        if label not in DIALECTS:
            return f"unknown dialect {label!r}{nearest(str(label), DIALECTS) or '.'} {_LABELS}"
        is_number = isinstance(share, int | float) and not isinstance(share, bool)
        if not is_number or not math.isfinite(share) or share < 0:
            return f"the share of {label} is {share!r}, expected a number from 0 to 1"
    total = math.fsum(shares.values())
    # The slack is that of one rounding, so that shares of six digits pass.
    if abs(total - 1) > SHARES_TOLERANCE * (1 + 1e-9):
        return f"the shares sum to {total:.9g}, expected 1"
    return None


_LABELS = f"The labels are {', '.join(DIALECTS)}"


class DialectFields(Schema):
    """Which share of the training rows each Arabic dialect has."""

    group: ClassVar[str] = "Data"

    dialect_distribution: Shares | None = Field(
        None,
        description="Train on the largest part of the training rows in which the dialects (msa, egy, glf, "
        "lev, mgr, unknown) have these shares; none: on all rows.",
    )
    dialect_column: FieldName = Field(
        "dialect",
        description="Column that says a row's dialect; rows without it are labelled by dialect_classifier, "
        "or by the built-in lexicon.",
    )
    dialect_text_field: FieldName | None = Field(
        None,
        description="Columns, with commas, whose text a row is labelled by; none: the prompt and the chosen "
        "or only completion.",
    )
    dialect_classifier: PathText | None = Field(
        None,
        description="A fastText model (.bin, .ftz) or a directory of a Hugging Face text classifier that "
        "labels rows instead of the built-in lexicon.",
    )
    dialect_label_map: LabelMap | None = Field(
        None, description="What other names in the column or of the classifier mean: LABEL_0=egy,LABEL_1=msa."
    )

    @rule("dialect_distribution")
    def _shares_are_a_distribution(self) -> str | None:
        if self.dialect_distribution is None:
            return None
        problem = shares_problem(self.dialect_distribution)
        return None if problem is None else f"dialect_distribution: {problem}"

    @rule("dialect_label_map")
    def _names_mean_dialects(self) -> str | None:
        for name, label in (self.dialect_label_map or {}).items():
            if label not in DIALECTS:
                hint = nearest(label, DIALECTS) or "."
                return f"dialect_label_map: {name!r} means the unknown dialect {label!r}{hint} {_LABELS}"
        return None

    @rule(
        "dialect_distribution",
        "dialect_column",
        "dialect_text_field",
        "dialect_classifier",
        "dialect_label_map",
    )
    def _labels_need_a_distribution(self) -> str | None:
        names = changed(
            self, "dialect_column", "dialect_text_field", "dialect_classifier", "dialect_label_map"
        )
        if names and self.dialect_distribution is None:
            return f"{', '.join(names)} without effect: no dialect_distribution is asked for; leave out"
        return None
