"""Some rows at once, from records to token ids in flat arrays: the work that processes share.

What comes out depends on the rows and the settings alone, never on the chunks before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from ds_align.data.rows import BadRow, Record
from ds_align.data.schemas import Columns, Layout, Preference, count_text_hazards, parse_row
from ds_align.data.tokenize import EncodedPreference, PreferenceTokenizer, needs_tokenizer, take_token_ids
from ds_align.data.truncate import Limits, cut_completion, cut_prompt
from ds_align.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COUNTED = (
    "prompts_cut",
    "completions_cut",
    "dropped_equal_pairs",
    "pairs_equal_after_cut",
    "duplicate_rows",
    "contradictory_rows",
    "rows_without_kl_completion",
    "rows_with_bidi_controls",
    "rows_with_nul",
    "builtin_template_rows",
    "prompts_not_prefix",
)


@dataclass(frozen=True, slots=True)
class ChunkSettings:
    """What the tokens of a row depend on beside the row. layout: what the rows hold; inputs: what is asked
    for; chat_template: a file or Jinja text, None for the tokenizer's own.
    """

    tokenizer: PreTrainedTokenizerBase | None
    chat_template: str | None
    layout: Layout
    inputs: Layout
    columns: Columns
    limits: Limits


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
    """The preferences of some rows, cut, in file order.

    prompts: one a preference. completions: all of a preference, then those of the next. desirable: one label
    a completion of unpaired inputs, else empty. given_kl: the y' that rows bring along, for the completions
    numbered kl_rows (int64). prompt_keys uint64 [n, 2]: equal exactly where the cut prompts are equal.
    preference_keys uint64 [n, 2]: the same for uncut preferences; those that contradict differ in bit 0.
    """

    num_read: int
    prompts: Sequences
    completions: Sequences
    desirable: np.ndarray
    given_kl: Sequences
    kl_rows: np.ndarray
    prompt_keys: np.ndarray
    preference_keys: np.ndarray
    counts: Counter[str]
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
            parse_row(row, settings.layout, settings.columns) if isinstance(row, Record) else row
            for row in rows
        ]
        for item in self._encode(parsed, collected.counts):
            if isinstance(item, BadRow):
                collected.bad.append(item)
            else:
                collected.add(item)
        return collected.finish(len(parsed))

    def _encode(
        self, parsed: list[Preference | BadRow], counts: Counter[str]
    ) -> Iterator[EncodedPreference | BadRow]:
        good = [row for row in parsed if isinstance(row, Preference)]
        texts = [row for row in good if needs_tokenizer(row.prompt)]
        encoded_texts = iter(self._encode_texts(texts, counts) if texts else [])
        for row in good:
            count_text_hazards(row, counts)
        for row in parsed:
            if isinstance(row, BadRow):
                yield row
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
    bad: list[BadRow] = field(default_factory=list)
    prompts: list[np.ndarray] = field(default_factory=list)
    completions: list[np.ndarray] = field(default_factory=list)
    desirable: list[bool] = field(default_factory=list)
    given_kl: dict[int, np.ndarray] = field(default_factory=dict)
    prompt_keys: list[bytes] = field(default_factory=list)
    preference_keys: list[bytes] = field(default_factory=list)

    def add(self, row: EncodedPreference) -> None:
        is_pair = len(row.completion_ids) == 2
        if is_pair and np.array_equal(*row.completion_ids):
            self.counts["dropped_equal_pairs"] += 1
            return
        self.preference_keys.append(_preference_key(row))
        prompt_ids = cut_prompt(row.prompt_ids, self.limits, self.bos_id)
        completions = [cut_completion(ids, len(prompt_ids), self.limits) for ids in row.completion_ids]
        self.counts["prompts_cut"] += len(prompt_ids) < len(row.prompt_ids)
        self.counts["completions_cut"] += sum(
            len(ids) < len(whole) for ids, whole in zip(completions, row.completion_ids, strict=True)
        )
        self.counts["pairs_equal_after_cut"] += is_pair and np.array_equal(*completions)
        self.prompts.append(prompt_ids)
        self.prompt_keys.append(_digest(prompt_ids.tobytes()))
        if self.inputs == "unpaired":
            self.desirable += (True, False) if is_pair else (bool(row.desirable),)
            if row.kl_ids is not None:
                kl_ids = cut_completion(row.kl_ids, len(prompt_ids), self.limits)
                start = len(self.completions)
                self.given_kl.update(dict.fromkeys(range(start, start + len(completions)), kl_ids))
        self.completions += completions

    def finish(self, num_read: int) -> EncodedChunk:
        return EncodedChunk(
            num_read,
            Sequences.from_parts(self.prompts),
            Sequences.from_parts(self.completions),
            np.asarray(self.desirable, dtype=bool),
            Sequences.from_parts(list(self.given_kl.values())),
            np.asarray(list(self.given_kl), dtype=np.int64),
            _as_keys(self.prompt_keys),
            _as_keys(self.preference_keys),
            self.counts,
            self.bad,
        )


def _preference_key(row: EncodedPreference) -> bytes:
    """A hash that a preference shares with its repeats; one that says the opposite has another bit 0."""
    prompt, *answers = (_digest(ids.tobytes()) for ids in (row.prompt_ids, *row.completion_ids))
    sense = answers[0] > answers[-1] if row.desirable is None else row.desirable
    key = _digest(b"".join((prompt, *sorted(answers))))
    return bytes([key[0] & 0xFE | sense]) + key[1:]


def _digest(content: bytes) -> bytes:
    return blake2b(content, digest_size=16).digest()


def _as_keys(digests: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)
