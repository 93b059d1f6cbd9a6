"""Some rows at once, from records to token ids in flat arrays: the work that processes share.

What comes out depends on the rows and the settings alone, never on the chunks before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np

from ds_align.data.ranked import PairRules, answer_labels
from ds_align.data.rows import BadRow, Record
from ds_align.data.schemas import Columns, Layout, Preference, RowLayout, count_text_hazards, parse_row
from ds_align.data.text_keys import signed_digest
from ds_align.data.tokenize import EncodedPreference, PreferenceTokenizer, needs_tokenizer, take_token_ids
from ds_align.data.truncate import Limits, cut_completion, cut_prompt
from ds_align.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COUNTED = (
    "prompts_cut",
    "completions_cut",
    "dropped_equal_pairs",
    "dropped_low_margin",
    "ranked_ties",
    "ranked_below_gap",
    "ranked_undecided",
    "ranked_unusable_answers",
    "pairs_equal_after_cut",
    "duplicate_rows",
    "contradictory_rows",
    "rows_without_kl_completion",
    "rows_with_bidi_controls",
    "rows_with_nul",
    "rows_with_eos_inside",
    "builtin_template_rows",
    "prompts_not_prefix",
    "strings_with_system_or_tools",
    "instructions_with_unused_input",
    "pairs_with_unused_label",
    "pairs_scored_the_other_way",
    "rows_as_messages",
    "rows_of_token_ids",
)


@dataclass(frozen=True, slots=True)
class ChunkSettings:
    """What the tokens of a row depend on beside the row. layout: what the rows hold; inputs: what is asked
    for; chat_template: a file or Jinja text, None for the tokenizer's own; rules: which pairs are made.
    """

    tokenizer: PreTrainedTokenizerBase | None
    chat_template: str | None
    layout: RowLayout
    inputs: Layout
    columns: Columns
    limits: Limits
    rules: PairRules


@dataclass(slots=True)
class Sequences:
    """Token sequences one behind the other: values int32, lengths int32 [num]."""

    values: np.ndarray
    lengths: np.ndarray

    @classmethod
    def from_parts(cls, parts: list[np.ndarray]) -> Sequences:
        """Copies the parts into one array."""
        values = np.concatenate(parts) if parts else np.zeros(0)
        return cls(values.astype(np.int32, copy=False), np.asarray([len(ids) for ids in parts], np.int32))


@dataclass(slots=True)
class EncodedChunk:
    """The records of some rows, cut, in file order, and the preferences that are made of them.

    prompts: one a record. completions: those of a record that are trained on, each once, then those of the
    next. row_prompts int64 [n], row_completions int64 [n, 2] (chosen, rejected) or [n, 1]: their numbers, for
    each of the n preferences. desirable: one label a completion of unpaired inputs, else empty. given_kl: the
    y' that rows bring along, for the completions numbered kl_rows (int64). prompt_keys uint64 [records, 2]:
    equal exactly where the cut prompts are equal. preference_keys uint64 [, 2]: the same for uncut
    preferences; those that contradict differ in bit 0. forms: how many records were read as what.
    """

    num_read: int
    prompts: Sequences
    completions: Sequences
    row_prompts: np.ndarray
    row_completions: np.ndarray
    desirable: np.ndarray
    given_kl: Sequences
    kl_rows: np.ndarray
    prompt_keys: np.ndarray
    preference_keys: np.ndarray
    counts: Counter[str]
    forms: Counter[str]
    bad: list[BadRow]


class ChunkEncoder:
    """Encodes chunk after chunk; the tokenizer is prepared at the first row that is text."""

    def __init__(self, settings: ChunkSettings) -> None:
        self._settings = settings
        self._text_encoder: PreferenceTokenizer | None = None
        tokenizer = settings.tokenizer
        self._vocabulary_size = None if tokenizer is None else len(tokenizer)

    def encode(self, rows: Iterable[Record | BadRow]) -> EncodedChunk:
        """Raises DataError or ConfigError for what no row can mend."""
        settings = self._settings
        bos_id = None if settings.tokenizer is None else settings.tokenizer.bos_token_id
        collected = _Collected(settings.inputs, settings.limits, bos_id)
        parsed = [
            parse_row(row, settings.layout, settings.columns, settings.rules)
            if isinstance(row, Record)
            else row
            for row in rows
        ]
        for item in parsed:
            if isinstance(item, Preference):
                collected.forms[item.form] += 1
                if item.counted:
                    collected.counts.update(item.counted)
        for item in self._encode(parsed, collected.counts):
            if isinstance(item, BadRow):
                collected.bad.append(item)
            else:
                collected.add(item)
        return collected.finish(len(parsed))

    def _encode(
        self, parsed: list[Preference | BadRow], counts: Counter[str]
    ) -> Iterator[EncodedPreference | BadRow]:
        good = [row for row in parsed if isinstance(row, Preference) and not row.is_left_out]
        texts = [row for row in good if needs_tokenizer(row.prompt)]
        encoded_texts = iter(self._encode_texts(texts, counts) if texts else [])
        eos = getattr(self._settings.tokenizer, "eos_token", None)
        for row in good:
            count_text_hazards(row, counts, eos)
        for row in parsed:
            if isinstance(row, BadRow):
                yield row
            elif row.is_left_out:
                continue
            elif needs_tokenizer(row.prompt):
                yield next(encoded_texts)
            else:
                yield take_token_ids(row, self._vocabulary_size)

    def _encode_texts(
        self, texts: list[Preference], counts: Counter[str]
    ) -> list[EncodedPreference | BadRow]:
        settings = self._settings
        if settings.tokenizer is None:
            raise DataError(
                f"{texts[0].origin}: the row is text and no tokenizer was given; give one, or token ids"
            )
        if self._text_encoder is None:
            self._text_encoder = PreferenceTokenizer.from_config(settings.tokenizer, settings.chat_template)
        self._text_encoder.counts = counts
        return self._text_encoder.encode(texts)


@dataclass(slots=True)
class _Collected:
    """Rows as they arrive: cut and counted; equal pairs are dropped here."""

    inputs: Layout
    limits: Limits
    bos_id: int | None
    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(COUNTED, 0)))
    forms: Counter[str] = field(default_factory=Counter)
    bad: list[BadRow] = field(default_factory=list)
    prompts: list[np.ndarray] = field(default_factory=list)
    completions: list[np.ndarray] = field(default_factory=list)
    row_prompts: list[int] = field(default_factory=list)
    row_completions: list[tuple[int, ...]] = field(default_factory=list)
    desirable: list[bool] = field(default_factory=list)
    given_kl: dict[int, np.ndarray] = field(default_factory=dict)
    prompt_keys: list[bytes] = field(default_factory=list)
    preference_keys: list[bytes] = field(default_factory=list)

    def add(self, row: EncodedPreference) -> None:
        if row.desirable is not None:
            self.preference_keys.append(_preference_key(row, (0,)))
            self._store(row, [0], (), {0: row.desirable})
            return
        comparisons = [pair for pair in row.comparisons if not _are_equal(row.completion_ids, pair)]
        self.counts["dropped_equal_pairs"] += len(row.comparisons) - len(comparisons)
        self.preference_keys += [_preference_key(row, pair) for pair in comparisons]
        used = list(dict.fromkeys(number for pair in comparisons for number in pair))
        labels: dict[int, bool] = {}
        if self.inputs == "unpaired":
            found = answer_labels(comparisons)
            labels = {number: found[number] for number in sorted(used) if found[number] is not None}
            self.counts["ranked_undecided"] += len(used) - len(labels)
            used = list(labels)
        if used:
            self._store(row, used, comparisons, labels)

    def _store(
        self,
        row: EncodedPreference,
        used: list[int],
        comparisons: Sequence[tuple[int, int]],
        labels: dict[int, bool],
    ) -> None:
        """Cuts a prompt and the completions that are used, each once, and numbers the preferences."""
        prompt_ids = cut_prompt(row.prompt_ids, self.limits, self.bos_id)
        whole = [row.completion_ids[number] for number in used]
        completions = [cut_completion(ids, len(prompt_ids), self.limits) for ids in whole]
        self.counts["prompts_cut"] += len(prompt_ids) < len(row.prompt_ids)
        self.counts["completions_cut"] += sum(
            len(ids) < len(uncut) for ids, uncut in zip(completions, whole, strict=True)
        )
        first = len(self.completions)
        place = {number: first + index for index, number in enumerate(used)}
        cut = dict(zip(used, completions, strict=True))
        self.counts["pairs_equal_after_cut"] += sum(
            pair[0] in cut and pair[1] in cut and _are_equal(cut, pair) for pair in comparisons
        )
        if self.inputs == "unpaired":
            rows = [(place[number],) for number in used]
            self.desirable += labels.values()
            if row.kl_ids is not None:
                kl_ids = cut_completion(row.kl_ids, len(prompt_ids), self.limits)
                self.given_kl.update(dict.fromkeys(place.values(), kl_ids))
        else:
            rows = [(place[chosen], place[rejected]) for chosen, rejected in comparisons]
        self.row_prompts += [len(self.prompts)] * len(rows)
        self.row_completions += rows
        self.prompts.append(prompt_ids)
        self.prompt_keys.append(_digest(prompt_ids.tobytes()))
        self.completions += completions

    def finish(self, num_read: int) -> EncodedChunk:
        num_columns = 2 if self.inputs == "pairs" else 1
        return EncodedChunk(
            num_read,
            Sequences.from_parts(self.prompts),
            Sequences.from_parts(self.completions),
            np.asarray(self.row_prompts, dtype=np.int64),
            np.asarray(self.row_completions, dtype=np.int64).reshape(-1, num_columns),
            np.asarray(self.desirable, dtype=bool),
            Sequences.from_parts(list(self.given_kl.values())),
            np.asarray(list(self.given_kl), dtype=np.int64),
            _as_keys(self.prompt_keys),
            _as_keys(self.preference_keys),
            self.counts,
            self.forms,
            self.bad,
        )


def _are_equal(completions: Any, pair: tuple[int, int]) -> bool:
    return np.array_equal(completions[pair[0]], completions[pair[1]])


def _preference_key(row: EncodedPreference, numbers: tuple[int, ...]) -> bytes:
    """A hash that a preference shares with its repeats; one that says the opposite has another bit 0."""
    answers = [_digest(row.completion_ids[number].tobytes()) for number in numbers]
    return signed_digest(_digest(row.prompt_ids.tobytes()), answers, row.desirable)


def _digest(content: bytes) -> bytes:
    return blake2b(content, digest_size=16).digest()


def _as_keys(digests: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)
