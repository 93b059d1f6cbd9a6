"""The doctor's report: a decoded sample, histograms of lengths, and the table of checks last."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ds_align.data import PreferenceDataset
from ds_align.doctor.finding import Finding
from ds_align.doctor.registry import Skipped

NUM_BINS = 10
_BAR = 40
_WIDTH = 110
_SAMPLE_CHARACTERS = 1200
_MARKS = {True: ("\033[30;42m", "\033[0m"), False: ("[[", "]]")}
_COLOURS = {"ok": "\033[32m", "info": "\033[36m", "warning": "\033[33m", "error": "\033[31m"}


@dataclass(slots=True)
class Report:
    """What was found, and what a person should see of the data.

    sample: by name, (text, whether it is scored) of one preference. lengths: of each kind of sequence.
    """

    run: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sample: dict[str, tuple[str, bool]] = field(default_factory=dict)
    lengths: dict[str, dict[str, Any]] = field(default_factory=dict)
    dialects: dict[str, float] | None = None

    @property
    def status(self) -> str:
        """The highest level of all checks, "ok" where there is nothing to warn of."""
        levels = {finding.level for finding in self.findings}
        return next((level for level in ("error", "warning") if level in levels), "ok")

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        found = {
            **self.run,
            "status": self.status,
            "num_errors": sum(finding.level == "error" for finding in self.findings),
            "num_warnings": sum(finding.level == "warning" for finding in self.findings),
            "checks": [finding.as_json() for finding in self.findings],
            "skipped": [asdict(skipped) for skipped in self.skipped],
            "notes": self.notes,
            "sample": {
                name: {"text": text, "scored": scored} for name, (text, scored) in self.sample.items()
            },
            "lengths": self.lengths,
        }
        return found if self.dialects is None else {**found, "dialects": self.dialects}

    def as_text(self, *, in_colour: bool) -> str:
        """The report for a terminal; without colour the scored tokens stand in [[ ]]."""
        parts = [self._sample(in_colour), self._histograms(), *(f"note: {note}" for note in self.notes)]
        return "\n".join([*(part for part in parts if part), self._table(in_colour)])

    def _sample(self, in_colour: bool) -> str:  # noqa: FBT001
        if not self.sample:
            return ""
        start, end = _MARKS[in_colour]
        words = "in colour" if in_colour else "in [[ ]]"
        lines = [f"A preference as the model sees it, the scored tokens {words}:"]
        for name, (text, scored) in self.sample.items():
            shown = text if len(text) <= _SAMPLE_CHARACTERS else _shortened(text)
            lines.append(f"  {name}: {start if scored else ''}{shown}{end if scored else ''}")
        return "\n".join(lines)

    def _histograms(self) -> str:
        lines = []
        for name, facts in self.lengths.items():
            lines.append(
                f"{name}: {facts['num']} of {facts['min']} to {facts['max']} tokens, "
                f"mean {facts['mean']:.1f}, median {facts['median']:.0f}, 95 % below {facts['p95']:.0f}"
            )
            highest = max(count for _, _, count in facts["histogram"])
            for low, high, count in facts["histogram"]:
                bar = "#" * round(_BAR * count / highest)
                lines.append(f"  {low:>6} - {high:>6} {count:>8} {bar}".rstrip())
        if self.dialects is not None:
            lines.append("dialects of the rows:")
            lines += [
                f"  {name:>8} {share:>6.1%} {'#' * round(_BAR * share)}"
                for name, share in self.dialects.items()
            ]
        return "\n".join(lines)

    def _table(self, in_colour: bool) -> str:  # noqa: FBT001
        lines = [f"{'check':<26} {'level':<8} what was seen (limit)"]
        for finding in self.findings:
            colour, end = (_COLOURS[finding.level], "\033[0m") if in_colour else ("", "")
            head = f"{finding.id:>2} {finding.name:<23} {colour}{finding.level:<8}{end} "
            limit = "" if finding.level == "ok" else f" (limit: {finding.limit})"
            lines += _wrapped(head, finding.message + limit)
            if finding.remedy and finding.level != "ok":
                lines += _wrapped(f"{'':<36}", f"-> {finding.remedy}")
            lines += [f"{'':<38}{example}" for example in finding.examples]
        lines += [f"{skipped.id:>2} {skipped.name:<23} not run  {skipped.reason}" for skipped in self.skipped]
        counts = self.as_json()
        lines.append(f"{counts['num_errors']} error(s), {counts['num_warnings']} warning(s)")
        return "\n".join(lines)


def _shortened(text: str) -> str:
    half = _SAMPLE_CHARACTERS // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


def _wrapped(head: str, text: str) -> list[str]:
    """The text in lines of its own column; the colour's characters take no room."""
    first, *rest = textwrap.wrap(text, _WIDTH - 37, break_long_words=False) or [""]
    return [head + first, *(f"{'':<36}{line}" for line in rest)]


def sample_of(data: PreferenceDataset, tokenizer: object) -> dict[str, tuple[str, bool]]:
    """The preference in the middle of the data, decoded with its special tokens."""
    item = data[len(data) // 2]
    found = {}
    for name in type(item).__slots__:
        value = getattr(item, name)
        if isinstance(value, np.ndarray):
            text = tokenizer.decode(value.tolist(), skip_special_tokens=False)
            found[name.removesuffix("_ids")] = (
                text,
                name in ("chosen_ids", "rejected_ids", "completion_ids"),
            )
        elif isinstance(value, bool):
            found[name] = (str(value).lower(), False)
    return found


def lengths_of(data: PreferenceDataset) -> dict[str, dict[str, Any]]:
    """Figures and a histogram of the lengths in tokens, of prompts and of each kind of completion."""
    names = ("chosen", "rejected") if data.inputs == "pairs" else ("completion",)
    kinds = {"prompt": data.prompt_lengths}
    kinds |= {name: data.completion_lengths[:, column] for column, name in enumerate(names)}
    return {name: describe_lengths(values) for name, values in kinds.items()}


def describe_lengths(values: np.ndarray) -> dict[str, Any]:
    """Figures of some lengths, and [first, last, number] of each of at most ten bins of equal width."""
    low, high = int(values.min()), int(values.max())
    width = -(-(high - low + 1) // NUM_BINS)
    counts = np.bincount((values - low) // width)
    histogram = [
        [low + number * width, low + (number + 1) * width - 1, int(count)]
        for number, count in enumerate(counts)
    ]
    return {
        "num": len(values),
        "min": low,
        "max": high,
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "p95": float(np.percentile(values, 95)),
        "histogram": histogram,
    }
