"""Which preferences train and which evaluate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ds_align import distributed
from ds_align.arabic import DialectSubset
from ds_align.config import METHODS, BaseConfig
from ds_align.config.schema import changed
from ds_align.data import (
    PreferenceDataset,
    available_splits,
    load_mixture,
    load_preferences,
    with_choice,
)
from ds_align.errors import ConfigError, DataError

if TYPE_CHECKING:
    import datasets

    DataSource = str | PathLike[str] | Sequence[Mapping[str, Any]] | datasets.Dataset
else:
    DataSource = Any


@dataclass(frozen=True, slots=True)
class Splits:
    """The data of a run.

    eval_set: "given", "split", "held_out", "train" (asked for without evaluation data) or None. train_source,
    eval_source: (source, split) of the rows, before any were left out; None for a mixture, and where rows
    that evaluate are not from a source of their own.
    """

    train: PreferenceDataset
    evaluation: PreferenceDataset | None
    eval_set: str | None
    messages: tuple[str, ...]
    train_source: tuple[DataSource, str | None] | None = None
    eval_source: tuple[DataSource, str | None] | None = None


def load_splits(
    config: BaseConfig,
    tokenizer: object,
    train_dataset: DataSource | None = None,
    eval_dataset: DataSource | None = None,
) -> Splits:
    """Reads and tokenizes the training and the evaluation preferences.

    The training data is the argument, else dataset_path, else the mixture. Evaluation data is the argument,
    else eval_dataset_path, else eval_split or the validation or test split of the training data, else rows
    held out by eval_fraction, else the training rows where eval_steps or eval_on_start asks for evaluations.
    deduplicate and dialect_distribution choose among the training rows only, before any are held out.
    Raises ConfigError without training data, DataError for data that cannot be used, and where there are
    fewer training rows than ranks.
    """
    source = train_dataset if train_dataset is not None else config.dataset_path
    if source is None and config.mixture is None:
        raise ConfigError("dataset_path is missing; give --dataset_path FILE")
    if source is None:
        train, train_source, held_out = _load_mixture(config, tokenizer), None, None
    else:
        source = _with_choice(config, source)
        names = available_splits(source, config)
        split = config.train_split or ("train" if "train" in names else None)
        subset = DialectSubset.from_config(config)
        train = load(config, tokenizer, source, split, subset=subset, deduplicate=config.deduplicate)
        train_source = (source, split)
        trained = (split or names[0]).partition("[")[0]
        held_out = config.eval_split or next(
            (name for name in ("validation", "test") if name in names and name != trained), None
        )
    evaluation, eval_set, eval_source = None, None, None
    given = eval_dataset if eval_dataset is not None else config.eval_dataset_path
    if given is not None:
        eval_source, eval_set = (given, config.eval_split), "given"
    elif held_out is not None:
        eval_source, eval_set = (source, held_out), "split"
    elif config.eval_fraction > 0:
        train, evaluation = _hold_out(train, config)
        eval_set = "held_out"
    if eval_source is not None:
        evaluation = load(config, tokenizer, *eval_source)
    messages = _messages(config, train, evaluation, eval_set)
    if evaluation is None and (config.eval_steps is not None or config.eval_on_start):
        evaluation, eval_set = train, "train"
        messages.append("no evaluation data was given; evaluating on the training rows")
    if len(train) < distributed.world_size():
        raise DataError(
            f"{train.name}: {len(train)} usable rows for {distributed.world_size()} ranks; "
            "every rank needs at least one: start fewer processes or give more data"
        )
    told = tuple(dict.fromkeys(messages))
    return Splits(train, evaluation, eval_set, told, train_source, eval_source)


def _messages(
    config: BaseConfig, train: PreferenceDataset, evaluation: PreferenceDataset | None, eval_set: str | None
) -> list[str]:
    read = [data for data in (train, evaluation) if data is not None]
    messages = [f"{config.method}: {data.summary}" for data in read]
    messages += [message for data in read for message in data.notes]
    if config.eval_fraction > 0 and eval_set != "held_out":
        messages.append(
            f"eval_fraction={config.eval_fraction} holds nothing out: there is evaluation data ({eval_set})"
        )
    if eval_set == "held_out" and config.dialect_distribution is not None:
        messages.append(
            "eval_fraction was held out of the rows that dialect_distribution chose, by prompt; the shares "
            "of what trains are near to it, not exact: give an eval_dataset_path to have them exact"
        )
    return messages


def _load_mixture(config: BaseConfig, tokenizer: object) -> PreferenceDataset:
    if config.dialect_distribution is not None:
        raise ConfigError(
            "dialect_distribution chooses the rows of one data set and cannot be had with a mixture; give "
            "dataset_path, or balance each part beforehand with ArabicDialectDatasetProcessor"
        )
    return load_mixture(config, tokenizer, METHODS[config.method].inputs)


def _with_choice(config: BaseConfig, source: DataSource) -> DataSource:
    """The source with the config and the revision that the settings name."""
    if isinstance(source, str | PathLike):
        return with_choice(source, config.dataset_config_name, config.dataset_revision)
    names = changed(config, "dataset_config_name", "dataset_revision")
    if names:
        raise ConfigError(f"{', '.join(names)} without effect: the data was given itself; leave it out")
    return source


def load(
    config: BaseConfig,
    tokenizer: object,
    source: DataSource,
    split: str | None = None,
    *,
    deduplicate: Literal["none", "exact", "near"] = "none",
    subset: DialectSubset | None = None,
) -> PreferenceDataset:
    """Tokenizes one source for the config's method; subset: its rows. Raises DataError."""
    return load_preferences(
        source,
        tokenizer=tokenizer,
        inputs=METHODS[config.method].inputs,
        config=config,
        split=split,
        deduplicate=deduplicate,
        subset=subset,
    )


def _hold_out(data: PreferenceDataset, config: BaseConfig) -> tuple[PreferenceDataset, PreferenceDataset]:
    """Splits rows off by seed, in file order; whole prompts move, so that no prompt is on both sides."""
    keys = np.unique(data.prompt_keys)
    order = np.random.default_rng([config.seed, 0xE7A1]).permutation(keys)
    num_held = max(1, round(config.eval_fraction * len(keys)))
    if num_held >= len(keys):
        raise DataError(
            f"{data.name}: eval_fraction={config.eval_fraction} of {len(keys)} distinct prompts leaves no "
            "training data; give more data or an eval_dataset_path"
        )
    held = np.isin(data.prompt_keys, order[:num_held])
    return data.select(np.flatnonzero(~held)), data.select(np.flatnonzero(held))
