"""What the user is told of a data set: one line on what became of its rows, and what was decided for him."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_align.data.build import LEFT_OUT, DataFields, Tokenized, describe_bad_rows
from ds_align.data.readers import origin_prefix
from ds_align.data.schemas import Layout

if TYPE_CHECKING:
    from ds_align.data.readers import Source

_SHOWN_FORMS = 3
_COMPARED = {
    "all": "every two answers",
    "best_worst": "best against worst",
    "best_random": "best against one drawn from the worse",
}


# What is counted, and the sentence for it: {0} is the count, {1} all rows.
_OF_COUNTS = {
    "builtin_template_rows": "the tokenizer has no chat template; {0} conversations were written with the "
    "built-in one (role headers such as 'User:'); give --chat_template to choose another",
    "strings_with_system_or_tools": "{0} rows are strings and have a system prompt or tools in columns of "
    "their own, which strings do not show; give message lists to use them, or write them into the prompt",
    "instructions_with_unused_input": "{0} rows have an instruction and a text in 'input', which is not "
    "read; write both into one column",
    "pairs_with_unused_label": "{0} rows are pairs and have a labelled completion, too, which is not read; "
    "split the two into rows of their own",
    "pairs_scored_the_other_way": "{0} pairs have a chosen_score below the rejected_score and are trained as "
    "they are; look which is right, or set min_score_margin=0",
    "prompts_not_prefix": "in {0} conversations the chat template's generation prompt is not the beginning "
    "of the whole; the prompt was taken from the whole conversation",
    "pairs_equal_after_cut": "{0} pairs differ only in what was cut off, so they teach nothing; raise "
    "max_length or max_completion_length, or lower max_prompt_length",
    "rows_without_kl_completion": "{0} of {1} rows have no y' for KTO's z0 (no row has another prompt); they "
    "are left out of its mean, and with no row left it is 0",
}


def summarise(found: Tokenized, name: str, inputs: Layout, config: DataFields) -> str:
    """One line: what the rows were read as, with the columns that were used, and what became of them."""
    counts, forms = found.counts, sorted(found.forms.items(), key=lambda item: -item[1])
    read = [f"{number:,} {form}" for form, number in forms[:_SHOWN_FORMS]]
    if len(forms) > _SHOWN_FORMS:
        read.append(f"{sum(number for _, number in forms[_SHOWN_FORMS:]):,} in other forms")
    kind = "pairs" if inputs == "pairs" else "labelled answers"
    parts = [f"{', '.join(read)} -> {counts['rows']:,} {kind}"]
    if any(form.startswith("ranked") for form in found.forms):
        parts.append(_COMPARED[config.ranked_pairs])
    left_out = {"bad_rows": "bad rows", "dropped_equal_pairs": "with equal answers", **LEFT_OUT}
    left = [f"{counts[key]:,} {words}" for key, words in left_out.items() if counts[key]]
    if left:
        parts.append(f"{' and '.join(left)} left out")
    return f"{name}: {', '.join(parts)}"


def describe_decisions(found: Tokenized, name: str, source: Source, config: DataFields) -> tuple[str, ...]:
    """What was decided for the user, and what he set without effect; a sentence each."""
    notes, counts = _without_effect(found, name, config), found.counts
    if counts["bad_rows"]:
        prefix = origin_prefix(source)
        shown = [(f"{prefix}{place}", reason) for place, reason in found.shown_bad]
        notes.append(
            f"{name}: {counts['bad_rows']} of {counts['rows_read']} rows were left out: "
            f"{describe_bad_rows(shown, counts['bad_rows'])}"
        )
    notes += _describe_duplicates(found, name, source)
    for counted, sentence in _OF_COUNTS.items():
        if counts[counted]:
            notes.append(f"{name}: {sentence.format(counts[counted], counts['rows'])}")
    return tuple(notes)


def _describe_duplicates(found: Tokenized, name: str, source: Source) -> list[str]:
    counts = found.counts
    if "duplicates_removed" not in counts:
        return []
    exact, near = counts["duplicates_removed"], counts["near_duplicates_removed"]
    removed = f"{exact + near} of {counts['rows_read']} rows repeat an earlier one and were left out"
    notes = [f"{name}: {removed} ({exact} equal, {near} nearly equal)"]
    if counts["contradictory_rows_found"]:
        prefix = origin_prefix(source)
        pairs = [" and ".join(f"{prefix}{place}" for place in pair) for pair in found.shown_contradictions]
        notes.append(
            f"{name}: {counts['contradictory_rows_found']} rows say the opposite of another one and stay, "
            f"such as {'; '.join(pairs)}; decide which are right"
        )
    return notes


def _without_effect(found: Tokenized, name: str, config: DataFields) -> list[str]:
    notes = []
    given = [
        f"{setting}={getattr(config, setting)}"
        for setting, usual in (("ranked_pairs", "best_worst"), ("ranked_min_gap", None))
        if getattr(config, setting) != usual
    ]
    if given and not any(form.startswith("ranked") for form in found.forms):
        notes.append(f"{name}: {', '.join(given)} changes nothing: no row is a ranked list")
    if config.min_score_margin is not None and not any(form.startswith("pairs") for form in found.forms):
        notes.append(
            f"{name}: min_score_margin={config.min_score_margin} changes nothing: no row is a pair with "
            "scores; for ranked lists there is ranked_min_gap"
        )
    return notes
