"""Checks of the preferences as such: 5 equal and repeated ones, 6 length bias, 14 overlap and text faults."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

import numpy as np

from ds_align.data import PreferenceDataset
from ds_align.doctor.facts import Facts, TextFacts
from ds_align.doctor.finding import Outcome, Parts
from ds_align.doctor.mixtures import across_parts

NEAR_SHARE = 0.1
LENGTH_RATIO = 1.2
LONGER_SHARE = 0.6
DIALECT_POINTS = 5.0
_SHOWN_ORIGINS = 5


# What only the texts show: kind, what is said of so many rows, the remedy.
_NEARLY = (
    ("near_duplicate", "rows nearly repeat an earlier one", "leave them out with --deduplicate near"),
    (
        "near_contradictory",
        "rows say the opposite of another one, case, spaces and vowel signs aside",
        "decide which are right",
    ),
)


def repeated_rows(facts: Facts) -> Outcome:
    """Equal, left out, repeated and contradictory preferences; answers that hardly differ where texts are."""
    counts, parts = facts.train.counts, Parts()
    seen = {
        "equal": (int(counts["dropped_equal_pairs"]), "pairs with chosen equal to rejected (left out)"),
        "unusable": (int(counts["bad_rows"]), "rows that are empty or cannot be read (left out)"),
        "duplicate": (int(counts["duplicate_rows"]), "repeated rows"),
        "contradictory": (int(counts["contradictory_rows"]), "rows that say the opposite of an earlier one"),
    }
    report = facts.texts.duplicates if facts.texts is not None else None
    if report is not None:
        near = report.counts.get("near_equal", 0)
        parts.value["near_equal"] = near
        if near > NEAR_SHARE * report.num_rows:
            parts.add(
                "warning",
                f"{near} of {report.num_rows} pairs have nearly identical answers",
                "their difference is what is learned: look whether it is the one that is meant",
            )
    examples = {} if report is None else _origins(report.findings)
    for kind, words, remedy in _NEARLY if report is not None else ():
        number = parts.value[kind] = report.counts.get(kind, 0)
        if number:
            parts.add("warning", f"{number} {words}", remedy, examples.get(kind, ()))
    for kind, (number, words) in seen.items():
        parts.value[kind] = number
        # The readers say themselves which rows they left out.
        if number and kind != "unusable":
            parts.add(
                "warning", f"{number} {words}", "mend or remove them in the file", examples.get(kind, ())
            )
    # Every row is hashed: too much for each start.
    if facts.train.parts and not facts.at_start:
        _note_parts(facts.train, parts)
    return parts.outcome("no equal, repeated or contradictory preference")


def _note_parts(data: PreferenceDataset, parts: Parts) -> None:
    """What the parts of a mixture share; each by itself is counted when it is read."""
    repeats, opposed = across_parts(data)
    parts.value |= {"repeats_across_parts": repeats, "contradictory_across_parts": opposed}
    for number, words in (
        (repeats, "repeat a row of an earlier part of the mixture"),
        (opposed, "say the opposite of a row of another part of the mixture"),
    ):
        if number:
            parts.add("warning", f"{number} rows {words}", "remove them from one of the parts")


def _origins(findings: tuple) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for finding in findings:
        shown = found.setdefault(finding.kind, [])
        if len(shown) < _SHOWN_ORIGINS:
            shown.append(f"{finding.kind}: {' and '.join(map(str, finding.origins))}")
    return found


def length_bias(facts: Facts) -> Outcome:
    """Whether the better answers are simply the longer ones: mean lengths in tokens, and P(chosen longer).

    For unpaired rows a desirable and an undesirable one are drawn by themselves.
    """
    lengths = facts.train.completion_lengths
    if facts.reads_pairs:
        better, worse = lengths[:, 0], lengths[:, 1]
        longer = float((better > worse).mean())
    else:
        desirable = facts.train.tables.desirable[facts.train.completion_index[:, 0]]
        better, worse = lengths[desirable, 0], lengths[~desirable, 0]
        if not len(better) or not len(worse):
            return Outcome("ok", {}, "one label alone: nothing to compare")
        longer = float(np.searchsorted(np.sort(worse), better, side="left").mean() / len(worse))
    ratio = float(better.mean() / worse.mean())
    value = {
        "mean_chosen_tokens": float(better.mean()),
        "mean_rejected_tokens": float(worse.mean()),
        "ratio": ratio,
        "chosen_longer": longer,
    }
    words = f"chosen answers have {ratio:.2f} x the tokens of rejected ones, {longer:.0%} are longer"
    if ratio <= LENGTH_RATIO and longer <= LONGER_SHARE:
        return Outcome("ok", value, words)
    if _normalises_length(facts):
        return Outcome("info", value, f"{words}; this loss compares per token")
    return Outcome(
        "warning",
        value,
        f"{words}: a sum of log-probs learns length",
        "compare per token (method simpo, dpo with loss_type=sigmoid_norm), or set ld_alpha=0.5",
    )


def _normalises_length(facts: Facts) -> bool:
    config = facts.config
    if config.method == "simpo" or (config.method == "ipo" and config.length_normalize):
        return True
    if getattr(config, "ld_alpha", None) not in (None, 1.0):
        return True
    return getattr(config, "loss_types", None) == ["sigmoid_norm"]


def overlap_and_text(facts: Facts) -> Outcome:
    """Prompts that are trained and evaluated, and characters that no person meant to write."""
    counts, parts = facts.train.counts, Parts()
    _note_overlap(facts, parts)
    for name, words, remedy in (
        (
            "rows_with_bidi_controls",
            "bidirectional controls, which reorder what a reader sees",
            "remove them",
        ),
        ("rows_with_nul", "NUL characters", "remove them"),
    ):
        number = parts.value[name] = int(counts[name])
        if number:
            parts.add("warning", f"{number} rows hold {words}", remedy)
    if facts.texts is not None:
        _note_garbled(facts.texts, parts)
    _note_dialects(facts, parts)
    return parts.outcome("no prompt is trained and evaluated, no odd characters")


def _note_overlap(facts: Facts, parts: Parts) -> None:
    if facts.evaluation is None or facts.eval_set == "train":
        return
    report = facts.texts.overlap if facts.texts is not None else None
    trained = prompt_digests(facts.train)
    exact = sum(digest in trained for digest in prompt_digests(facts.evaluation))
    near = 0
    if report is not None:
        exact, near = max(exact, report.exact), report.near
        parts.value["near_prompts"] = near
    parts.value["shared_prompts"] = exact
    _note_forms(facts, parts)
    if exact or near:
        nearly = f", {near} nearly" if near else ""
        parts.add(
            "warning",
            f"{exact} evaluation prompts are trained on, too{nearly}",
            "remove them from one of the two, or split with eval_fraction, which parts whole prompts",
        )


def _note_forms(facts: Facts, parts: Parts) -> None:
    """Strings are trained as they are, conversations by the chat template: an evaluation says little then."""
    both = (facts.train, facts.evaluation)
    talks = [bool(data.counts.get("rows_as_messages", 0)) for data in both]
    # Of token ids nobody knows what wrote them.
    if talks[0] != talks[1] and not any(data.counts.get("rows_of_token_ids", 0) for data in both):
        said = ["by the chat template" if is_talk else "as plain strings" for is_talk in talks]
        parts.add(
            "warning",
            f"training rows are written {said[0]}, evaluation rows {said[1]}",
            "give both as messages, or both as strings",
        )


def prompt_digests(data: PreferenceDataset) -> set[bytes]:
    """A hash of each distinct prompt's tokens."""
    prompts = data.tables.prompts
    return {blake2b(prompts[key], digest_size=16).digest() for key in np.unique(data.prompt_keys)}


def _note_garbled(texts: TextFacts, parts: Parts) -> None:
    parts.value["rows_with_mojibake"] = texts.num_garbled
    if texts.num_garbled:
        parts.add(
            "warning",
            f"{texts.num_garbled} rows hold mojibake (UTF-8 that was read as another encoding)",
            "read the source again as UTF-8",
            texts.garbled,
        )


def _note_dialects(facts: Facts, parts: Parts) -> None:
    """The shares of what is trained, where the data were cut to a distribution, else of what was found."""
    target = getattr(facts.config, "dialect_distribution", None)
    counts = facts.train.counts
    taken = {label: int(counts.get(f"dialect_{label}_taken", 0)) for label in target or {}}
    shares = facts.texts.dialects if facts.texts is not None else None
    if sum(taken.values()):
        shares = {label: number / sum(taken.values()) for label, number in taken.items()}
    if shares is None:
        return
    parts.value["dialects"] = shares
    far = far_shares(target or {}, shares)
    if far:
        shown = ", ".join(f"{label} {points:+.0f}" for label, points in far.items())
        parts.add("warning", f"dialect shares off target by points: {shown}", "balance the data set")


def far_shares(target: Mapping[str, float], shares: Mapping[str, float]) -> dict[str, float]:
    """By label, how many points a share is off its target, where that is more than the limit."""
    points = {label: 100.0 * (shares.get(label, 0.0) - share) for label, share in target.items()}
    return {label: off for label, off in points.items() if abs(off) > DIALECT_POINTS + 1e-9}
