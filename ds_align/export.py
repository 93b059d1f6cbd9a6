"""The trained model as a Hugging Face directory, written shard by shard."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ds_align import distributed
from ds_align.engine import AlignEngine
from ds_align.models.adapters import saved_name, write_settings

_UNITS = {"K": 1, "M": 2, "G": 3, "T": 4}


def parse_size(text: str) -> int:
    """Bytes of a size such as 500MB (powers of 1000) or 5GiB (powers of 1024)."""
    number, unit, binary = re.fullmatch(r"([\d.]+)\s?([KMGT])(i?)B", text).groups()
    return int(float(number) * (1024 if binary else 1000) ** _UNITS[unit])


def plan_shards(weight_bytes: dict[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Names by shard, in order; a weight larger than the limit has a shard of its own."""
    shards: list[list[str]] = []
    room = 0
    for name, size in weight_bytes.items():
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def save_model(engine: AlignEngine, directory: str | Path) -> None:
    """Writes the trained weights and the tokenizer: the adapter alone where adapters were trained.

    Rank 0 holds at most one shard (or the adapter) at a time. Collective: every rank must call this.
    """
    directory = Path(directory)
    if distributed.is_main():
        directory.mkdir(parents=True, exist_ok=True)
        # Of an earlier run in this directory; a mixture of the two kinds would be read as an adapter.
        for pattern in (
            "model*.safetensors*",
            "adapter_model*",
            "adapter_config.json",
            "config.json",
            "generation_config.json",
        ):
            for stale in directory.glob(pattern):
                stale.unlink()
    if engine.policy.adapter_settings is not None:
        _save_adapter(engine, directory)
    else:
        _save_whole(engine, directory)
    if distributed.is_main():
        engine.tokenizer.save_pretrained(directory)
    distributed.barrier()


def _save_adapter(engine: AlignEngine, directory: Path) -> None:
    from safetensors.torch import save_file

    weights = {
        saved_name(name): weight.contiguous()
        for name, weight in engine.policy.weights(trained_only=True)
        if weight is not None
    }
    if distributed.is_main():
        save_file(weights, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        write_settings(engine.policy.adapter_settings, directory)


def _save_whole(engine: AlignEngine, directory: Path) -> None:
    from safetensors.torch import save_file

    model = engine.policy.module.model
    weight_bytes = engine.policy.weight_bytes()
    shards = plan_shards(weight_bytes, parse_size(engine.config.max_shard_size))
    files = _shard_files(shards)
    shard_of = {name: number for number, names in enumerate(shards) for name in names}
    held: dict = {}
    for name, weight in engine.policy.weights():
        if weight is None:
            continue
        held[name] = weight.contiguous()
        number = shard_of[name]
        if len(held) == len(shards[number]):
            save_file(held, directory / files[number], metadata={"format": "pt"})
            held = {}
    if not distributed.is_main():
        return
    if len(shards) > 1:
        _write_index(directory, weight_bytes, {name: files[shard_of[name]] for name in weight_bytes})
    model.config.save_pretrained(directory)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(directory)


def _shard_files(shards: list[list[str]]) -> list[str]:
    if len(shards) == 1:
        return ["model.safetensors"]
    total = len(shards)
    return [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]


def _write_index(directory: Path, weight_bytes: dict[str, int], weight_map: dict[str, str]) -> None:
    index = {"metadata": {"total_size": sum(weight_bytes.values())}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")
