"""Whether a checkpoint belongs to this run: what must be the same, and what may change on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ds_align.config import METHODS, BaseConfig
from ds_align.config.custom import source_digest
from ds_align.errors import CheckpointError

# Without influence on the weights.
_FREE = frozenset(
    {
        "dataset_cache_dir",
        "dataset_num_proc",
        "debug",
        "doctor",
        "doctor_models",
        "dry_run",
        "eval_on_start",
        "eval_steps",
        "hang_timeout",
        "learning_rate_override",
        "logging_steps",
        "max_shard_size",
        "max_skipped_steps",
        "non_finite",
        "output_dir",
        "overwrite_output_dir",
        "per_device_eval_batch_size",
        "ref_cache_dir",
        "resume",
        "run_name",
        "save_steps",
        "save_total_limit",
        "trust_remote_code",
    }
)
# The same mathematics in another order: what a run may need that ran out of memory.
_ROUNDING = frozenset(
    {
        "attn_implementation",
        "gradient_checkpointing",
        "logits_budget_mb",
        "pack_max_tokens",
        "prefix_sharing",
        "ref_batch_tokens",
        "ref_ds_config",
        "ref_logps",
    }
)
# Held by what came of them instead: the tokens, the number of steps, the global batch, the DeepSpeed values.
_BY_OUTCOME = frozenset(
    {
        "chat_template",
        "dataset_config_name",
        "dataset_path",
        "deduplicate",
        "dataset_revision",
        "dataset_split",
        "dataset_splits",
        "dialect_classifier",
        "dialect_column",
        "dialect_distribution",
        "dialect_label_map",
        "dialect_text_field",
        "ds_config",
        "eval_dataset_path",
        "eval_dataset_split",
        "eval_fraction",
        "gradient_accumulation_steps",
        "max_bad_fraction",
        "max_steps",
        "mixture",
        "mixture_rows",
        "num_train_epochs",
        "on_bad_rows",
        "per_device_train_batch_size",
        "tokenizer_name",
    }
)
# Follow from the global batch and the number of ranks.
_DS_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def settings_of(config: BaseConfig, world_size: int) -> dict[str, Any]:
    """What run_state.json keeps of the settings, all JSON values."""
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return {
        "method": config.method,
        "world_size": world_size,
        "global_batch_size": batch * world_size,
        "loss_code": source_digest(METHODS[config.method].loss),
        "config": config.model_dump(mode="json"),
    }


def check_settings(path: Path, state: Mapping[str, Any], config: BaseConfig, world_size: int) -> list[str]:
    """Messages about settings that changed and may; needs no model and no data.

    Raises CheckpointError that shows each setting which may not (checkpoint's value -> this run's).
    """
    now = settings_of(config, world_size)
    if state["method"] != config.method:
        raise _other_run(path, [_change("method", state["method"], config.method)])
    if state.get("loss_code") != now["loss_code"]:
        raise CheckpointError(
            f"{path}: the code beside the loss {config.import_path!r} has changed since this was written; "
            "take the old code, or start afresh in another output_dir"
        )
    changed = list(_changed_fields(state["config"], now["config"], type(config)))
    wrong = [_change(*change) for change in changed if change[0] not in _FREE | _ROUNDING | _BY_OUTCOME]
    if state["global_batch_size"] != now["global_batch_size"]:
        wrong.append(_change("global_batch_size", state["global_batch_size"], now["global_batch_size"]))
    if wrong:
        raise _other_run(path, wrong)
    rounding = [_change(*change) for change in changed if change[0] in _ROUNDING]
    if rounding:
        return [
            f"{', '.join(rounding)}: the run goes on with it, equal to an uninterrupted one up to rounding"
        ]
    return []


def rescaled_batch(
    path: Path, state: Mapping[str, Any], config: BaseConfig, world_size: int
) -> tuple[dict[str, int], str]:
    """(settings of the batch, message) with which another number of ranks has the checkpoint's global batch.

    Raises CheckpointError where it cannot be shared by so many ranks, or more than the batch would change.
    """
    before, whole = state["world_size"], state["global_batch_size"]
    change = _change("world_size", before, world_size)
    given = state["config"]
    usual = given["per_device_train_batch_size"] * given["gradient_accumulation_steps"]
    asked = config.per_device_train_batch_size * config.gradient_accumulation_steps
    if asked * world_size == whole:
        return {}, f"{change}: the global batch stays {whole}"
    if asked != usual or whole % world_size:
        raise CheckpointError(
            f"{path}: {change}: the global batch was {whole} and would be {asked * world_size}; give "
            "per_device_train_batch_size and gradient_accumulation_steps whose product with the number of "
            f"ranks is {whole}, or the checkpoint's own on a number of ranks that divides it"
        )
    bound = "sync_ref_model" if config.sync_ref_model else "optim=sgd" if config.optim == "sgd" else None
    if bound is not None:
        raise CheckpointError(
            f"{path}: {change}: a run with {bound} goes on with as many ranks as wrote it; continue it on "
            f"{before}"
        )
    share = whole // world_size
    per_device = config.per_device_train_batch_size
    if share % per_device:
        batch = {"per_device_train_batch_size": share, "gradient_accumulation_steps": 1}
    else:
        batch = {"gradient_accumulation_steps": share // per_device}
    shown = ", ".join(f"{name}={value}" for name, value in batch.items())
    return batch, f"{change}: {shown}, so that the global batch stays {whole}"


def changed_versions(state: Mapping[str, Any], now: Mapping[str, str]) -> list[str]:
    """A message where other versions wrote the checkpoint: bits are promised for the same ones only."""
    changes = [_change(*change) for change in _changed_values(state["versions"], now)]
    if not changes:
        return []
    return [
        f"{', '.join(changes)}: the run goes on, but may differ in the last bits from an uninterrupted one"
    ]


def check_facts(
    path: Path, state: Mapping[str, Any], facts: Mapping[str, Any], config: BaseConfig
) -> list[str]:
    """Messages about what differs in the loaded run and may; facts: run_facts() of engine.checkpoint_io.

    Raises CheckpointError that shows each fact which may not differ (checkpoint's value -> this run's).
    """
    values = list(_changed_values(_flat(state["facts"]), _flat(facts)))
    changed = [_change(*change) for change in values if change[0] != _DATA_DIGEST]
    if len(changed) != len(values):
        changed.insert(0, "the training data are other rows, or the same ones tokenized in another way")
    steps, total = state["facts"]["num_steps"], facts["num_steps"]
    messages = []
    if steps != total:
        text = _change("num_steps", steps, total)
        # Only a constant rate says the same of the steps so far, whatever the end.
        if config.lr_scheduler_type != "constant" or config.warmup_ratio > 0:
            text += f" (the learning rate of lr_scheduler_type={config.lr_scheduler_type} depends on it)"
            changed.append(text)
        elif total < state["global_step"]:
            changed.append(f"{text} (the checkpoint is at step {state['global_step']})")
        else:
            messages.append(f"{text}: the constant learning rate goes on")
    if changed:
        raise _other_run(path, changed)
    return messages


# Of run_facts(); a hash says nothing to a reader.
_DATA_DIGEST = "train_data"


def _other_run(path: Path, changes: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{path}: not a checkpoint of this run: {'; '.join(changes)} (checkpoint -> now); "
        "give the checkpoint's data and values, or start afresh in another output_dir"
    )


def _change(name: str, before: Any, now: Any) -> str:
    return f"{name}: {before!r} -> {now!r}"


def _changed_fields(
    saved: Mapping[str, Any], now: Mapping[str, Any], config_class: type[BaseConfig]
) -> Iterator[tuple[str, Any, Any]]:
    for name, value in now.items():
        # A field that is newer than the checkpoint had its default's effect.
        before = saved.get(name, config_class.model_fields[name].default)
        if before != value:
            yield name, before, value


def _changed_values(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in sorted({*saved, *now} - {"num_steps"}):
        if saved.get(name) != now.get(name):
            yield name, saved.get(name), now.get(name)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as dotted names, without what follows from the batch."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        elif not (prefix and name in _DS_BATCH):
            found[prefix + name] = value
    return found
