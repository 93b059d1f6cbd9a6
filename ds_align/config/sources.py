"""The settings that choose rows: splits, configs of the Hub, and weighted mixtures of several data sets."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field

from ds_align.config.schema import Count, Expects, FieldName, PathText, PositiveNumber, Schema, changed, rule

SplitText = Annotated[str, Field(min_length=1), Expects("a split such as train, test or train[:90%]")]
_ENDINGS = (".gz", ".zst", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_OF_ONE_SOURCE = ("dataset_split", "dataset_splits", "dataset_config_name", "dataset_revision")


ColumnName = Literal[
    "prompt",
    "chosen",
    "rejected",
    "completion",
    "label",
    "completions",
    "scores",
    "ranks",
    "system",
    "tools",
    "chosen_score",
    "rejected_score",
]


class MixturePart(Schema):
    """One part of a mixture."""

    path: PathText | None = Field(None, description="A source, as dataset_path takes it.")
    split: SplitText | None = Field(None, description="The split; none: train, or the only one.")
    weight: PositiveNumber = Field(1.0, description="Its share of the rows is weight / sum of weights.")
    columns: Annotated[
        dict[ColumnName, FieldName],
        Expects(f"a mapping of {', '.join(get_args(ColumnName))} to a column"),
    ] = Field(
        default_factory=dict,
        description="Names of its columns, where they are not those of dataset_*_field.",
    )
    max_rows: Count | None = Field(None, description="Take so many different rows at most.")
    repeat: bool = Field(False, description="Take rows more than once where there are too few.")
    name: PathText | None = Field(None, description="What reports call it; none: the end of its path.")
    config_name: PathText | None = Field(None, description="As dataset_config_name.")
    revision: PathText | None = Field(None, description="As dataset_revision.")

    @property
    def title(self) -> str:
        """name, or the last part of the path without its endings."""
        if self.name is not None:
            return self.name
        title = posixpath.basename((self.path or "").replace("\\", "/").rstrip("/"))
        while title.lower().endswith(_ENDINGS):
            title = title.rpartition(".")[0]
        return title


class SourceFields(Schema):
    """Which rows of the data are used."""

    group: ClassVar[str] = "Data"

    dataset_split: SplitText | None = Field(
        None, description="The rows that train, such as train[:90%]; none: train, or the only split."
    )
    eval_dataset_split: SplitText | None = Field(
        None,
        description="The rows that evaluation uses: of eval_dataset_path, else of dataset_path; none: the "
        "validation or test split.",
    )
    dataset_splits: list[str] | None = Field(
        None, description="Both at once: dataset_split, then eval_dataset_split."
    )
    dataset_config_name: PathText | None = Field(
        None, description="The config of a data set of the Hub; also as dataset_path org/name:config."
    )
    dataset_revision: PathText | None = Field(
        None, description="The branch, tag or commit of a data set of the Hub."
    )
    mixture: Annotated[
        list[dict[str, Any]] | None, Expects("a list of parts such as [{path: a.jsonl, weight: 2}]")
    ] = Field(
        None,
        description="Several data sets in shares by weight, instead of dataset_path: a list of mappings with "
        "path, split, weight, columns (column map), max_rows, repeat, name, config_name and revision.",
    )
    mixture_rows: Count | None = Field(
        None,
        description="Rows of the mixture; none: as many as there are without taking a row twice, parts with "
        "repeat left aside.",
    )

    @property
    def train_split(self) -> str | None:
        """The split that trains, where one is given."""
        return self.dataset_splits[0] if self.dataset_splits else self.dataset_split

    @property
    def eval_split(self) -> str | None:
        """The split that evaluates, where one is given."""
        return self.dataset_splits[1] if len(self.dataset_splits or ()) > 1 else self.eval_dataset_split

    @property
    def mixture_parts(self) -> list[MixturePart]:
        """The parts of the mixture, [] where there is none."""
        return [MixturePart(**part) for part in self.mixture or ()]

    @rule("mixture")
    def _parts_are_whole(self) -> str | None:
        if self.mixture is None:
            return None
        problems = list(_part_problems(self.mixture))
        if not self.mixture:
            problems.append("expected at least one part")
        return f"mixture: {'; '.join(problems)}" if problems else None

    @rule("mixture", "mixture_rows", *_OF_ONE_SOURCE)
    def _a_mixture_chooses_by_part(self) -> str | None:
        if self.mixture is None:
            return None if self.mixture_rows is None else "mixture_rows without effect: mixture is none"
        names = changed(self, "dataset_path", *_OF_ONE_SOURCE)
        if names:
            return (
                f"{', '.join(names)} beside mixture: give path, split, config_name and revision in its parts"
            )
        if self.eval_dataset_split is not None and getattr(self, "eval_dataset_path", None) is None:
            return "eval_dataset_split beside mixture: give an eval_dataset_path too, or eval_fraction"
        return None

    @rule("dataset_split", "eval_dataset_split", "dataset_splits")
    def _splits_are_given_once(self) -> str | None:
        if self.dataset_splits is None:
            return None
        if not 1 <= len(self.dataset_splits) <= 2 or not all(self.dataset_splits):
            return (
                f"dataset_splits={self.dataset_splits!r}: expected one that trains, then one that evaluates"
            )
        names = changed(self, "dataset_split", "eval_dataset_split")
        return f"dataset_splits and {', '.join(names)} say the same; give one of the two" if names else None

    @rule("eval_fraction", "eval_dataset_split", "dataset_splits")
    def _nothing_is_held_out_beside_a_split(self) -> str | None:
        if getattr(self, "eval_fraction", 0) and self.eval_split is not None:
            return f"eval_fraction={self.eval_fraction:g} has no effect beside an evaluation split; give one"
        return None


def _part_problems(parts: list[dict[str, Any]]) -> Iterator[str]:
    titles: Counter[str] = Counter()
    for number, values in enumerate(parts, 1):
        part, problems = MixturePart.check(values)
        title = f"part {number}" + (f" ({part.title})" if part.title else "")
        if not problems and part.path is None:
            yield f"{title}: path is missing"
        for problem in problems:
            yield f"{title}: {problem.message}"
        titles[part.title] += 1
    for title, count in titles.items():
        if title and count > 1:
            yield f"{count} parts have the name {title!r}; give each a name of its own"
