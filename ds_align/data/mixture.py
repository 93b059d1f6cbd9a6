"""Several data sets as one, in shares by weight: an index over their tokens, which stay where they are.

Each part is tokenized, and kept in the cache, by itself: another weight costs no tokenizing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ds_align.data.build import DataFields
from ds_align.data.dataset import Part, PreferenceDataset, load_preferences
from ds_align.data.deduplicate import Deduplicate
from ds_align.data.hub import with_choice
from ds_align.data.quotas import largest_total, quotas
from ds_align.data.schemas import Layout
from ds_align.data.tables import join_tables
from ds_align.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ds_align.config.sources import MixturePart

# largest_total looks at so many totals, at most.
_SMALLEST_SHARE = Fraction(1, 100_000)


class MixtureFields(DataFields, Protocol):
    """What a mixture reads from a config."""

    seed: int
    deduplicate: Deduplicate
    mixture_rows: int | None
    mixture_parts: list[MixturePart]


def load_mixture(
    config: MixtureFields, tokenizer: PreTrainedTokenizerBase | None, inputs: Layout
) -> PreferenceDataset:
    """The mixture of a config: the rows of each part by a permutation of its own, all parts interleaved.

    config.deduplicate compares the rows within each part, not those of two parts.
    It follows from the parts' rows, their names, the weights and the seed; not from the ranks. Raises
    DataError and ConfigError, which name the part.
    """
    parts = config.mixture_parts
    loaded = [_load_part(part, config, tokenizer, inputs) for part in parts]
    available = [min(len(data), part.max_rows or len(data)) for part, data in zip(parts, loaded, strict=True)]
    weights = _exact_weights(parts)
    some_do_not = not all(part.repeat for part in parts)
    limits = [
        None if some_do_not and part.repeat else number for part, number in zip(parts, available, strict=True)
    ]
    largest = largest_total(weights, limits)
    total = config.mixture_rows or largest
    taken = quotas(weights, total)
    chosen, reports, start = [], [], 0
    for part, data, number, quota in zip(parts, loaded, available, taken, strict=True):
        _check_quota(part, number, quota, total, largest)
        seed = [config.seed, 0x314D, int.from_bytes(sha256(part.title.encode()).digest()[:8], "little")]
        chosen.append(start + choose_rows(len(data), quota, most=number, seed=seed))
        source = f"{part.path} ({part.split})" if part.split else str(part.path)
        share, repeated = quota / total, max(0, quota - number)
        reports.append(Part(part.title, source, part.weight, len(data), quota, share, repeated))
        start += len(data)
    counts: Counter[str] = Counter()
    for data in loaded:
        counts.update(data.counts)
    return PreferenceDataset(
        "mixture",
        inputs,
        join_tables([data.tables for data in loaded]),
        counts=dict(counts) | {"rows": total},
        notes=(
            *(note for data in loaded for note in data.notes),
            *map(_describe, reports),
            *(data.summary for data in loaded),
        ),
        summary=f"mixture: {total:,} rows of {len(parts)} parts",
        rows=np.concatenate(chosen)[interleaved(taken)],
        num_processes=max(data.num_processes for data in loaded),
        parts=tuple(reports),
    )


class PartFields:
    """A config with the column map of a part."""

    def __init__(self, config: MixtureFields, columns: dict[str, str]) -> None:
        self._config = config
        self._columns = {f"dataset_{name}_field": column for name, column in columns.items()}

    def __getattr__(self, name: str) -> Any:
        return self._columns[name] if name in self._columns else getattr(self._config, name)


def source_of(part: MixturePart) -> str:
    """Where the rows of a part lie, as load_preferences takes it."""
    return with_choice(part.path, part.config_name, part.revision)


def _load_part(
    part: MixturePart, config: MixtureFields, tokenizer: PreTrainedTokenizerBase | None, inputs: Layout
) -> PreferenceDataset:
    try:
        return load_preferences(
            source_of(part),
            tokenizer=tokenizer,
            inputs=inputs,
            config=PartFields(config, part.columns),
            split=part.split,
            deduplicate=config.deduplicate,
        )
    except (DataError, ConfigError) as error:
        raise type(error)(f"mixture part {part.title!r}: {error}") from error


def _exact_weights(parts: Sequence[MixturePart]) -> list[int]:
    """Whole numbers in the ratios that are written: 0.1 is a tenth. Raises ConfigError for a tiny share."""
    weights = [Fraction(repr(part.weight)) for part in parts]
    for part, weight in zip(parts, weights, strict=True):
        if weight < _SMALLEST_SHARE * sum(weights):
            raise ConfigError(
                f"mixture part {part.title!r}: weight={part.weight:g} is less than {_SMALLEST_SHARE} of all "
                "weights; raise it or leave the part out"
            )
    common = math.lcm(*(weight.denominator for weight in weights))
    return [int(weight * common) for weight in weights]


def _check_quota(part: MixturePart, available: int, quota: int, total: int, largest: int) -> None:
    if quota == 0:
        raise DataError(
            f"mixture part {part.title!r}: weight={part.weight:g} gives it none of {total} rows; raise the "
            "weight or mixture_rows, or leave the part out"
        )
    if quota > available and not part.repeat:
        raise DataError(
            f"mixture part {part.title!r}: its share of mixture_rows={total} is {quota} rows, and it has "
            f"{available}; set mixture_rows={largest} or fewer, lower its weight, or set repeat: true for it"
        )


def _describe(part: Part) -> str:
    repeated = f", {part.repeated} of them taken again" if part.repeated else ""
    return (
        f"mixture part {part.name!r} ({part.source}): {part.rows} rows{repeated}, {part.share:.2%} of all, "
        f"of {part.available} that are there"
    )


def choose_rows(num_rows: int, quota: int, *, most: int, seed: Sequence[int]) -> np.ndarray:
    """Which rows of a part are taken, int64 [quota]: the first of a permutation, `most` different ones.

    Where the quota is larger, each is taken again before any is taken a third time, in another order.
    """
    pool = np.random.default_rng([*seed, 0]).permutation(num_rows)[:most]
    passes = [pool]
    while sum(map(len, passes)) < quota:
        passes.append(np.random.default_rng([*seed, len(passes)]).permutation(pool))
    return np.concatenate(passes)[:quota]


def interleaved(counts: Sequence[int]) -> np.ndarray:
    """An order of the rows of all parts, numbered part after part, in which every part is spread evenly."""
    places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    return np.argsort(places, kind="stable")
