"""The settings of what a row may hold beside its prompt and its two answers; each has one owner."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ds_align.config.schema import FieldName, NonNegativeNumber, PositiveNumber, Schema, changed, rule


class RowFields(Schema):
    """Ranked lists, scores, and the columns of system prompts and tools."""

    group: ClassVar[str] = "Data"

    ranked_pairs: Literal["all", "best_worst", "best_random"] = Field(
        "best_worst",
        description="Pairs of a ranked list (several answers with scores or ranks): the best answer with the "
        "worst; the best with a random worse one (by seed); or all, every two answers. kto: each answer of "
        "these pairs once, desirable where it wins more of them than it loses.",
    )
    ranked_min_gap: PositiveNumber | None = Field(
        None, description="Smallest difference of scores (or ranks) between the answers of a ranked pair."
    )
    min_score_margin: NonNegativeNumber | None = Field(
        None,
        description="Leave pairs out whose chosen_score is not at least this much above their "
        "rejected_score; they are counted.",
    )
    dataset_completions_field: FieldName = Field(
        "completions",
        description="Column of the answers of a ranked list; found by itself, too, as responses, answers or "
        "generations.",
    )
    dataset_scores_field: FieldName = Field(
        "scores", description="Column of their scores, higher is better; also found as ratings."
    )
    dataset_ranks_field: FieldName = Field("ranks", description="Column of their ranks, 1 is the best.")
    dataset_chosen_score_field: FieldName = Field(
        "chosen_score", description="Column of the chosen answer's score; also found as score_chosen."
    )
    dataset_rejected_score_field: FieldName = Field(
        "rejected_score", description="Column of the rejected answer's score; also found as score_rejected."
    )
    dataset_system_field: FieldName = Field(
        "system", description="Column of a system prompt that conversations begin with."
    )
    dataset_tools_field: FieldName = Field(
        "tools", description="Column of the tools that the chat template shows, a list or JSON text."
    )

    @rule("min_score_margin", "dataset_chosen_score_field", "dataset_rejected_score_field")
    def _score_columns_need_a_margin(self) -> str | None:
        names = changed(self, "dataset_chosen_score_field", "dataset_rejected_score_field")
        if names and self.min_score_margin is None:
            return f"{', '.join(names)} without effect: min_score_margin is none; set it or leave them out"
        return None
