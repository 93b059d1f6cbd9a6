"""The trained model as a Hugging Face directory, written shard by shard."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ds_align import distributed
from ds_align.engine import AlignEngine

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
    """Writes config, tokenizer and safetensors shards; rank 0 holds at most one shard at a time.

    Collective: every rank must call this.
    """
    from safetensors.torch import save_file

    directory = Path(directory)
    model = engine.policy.module.model
    weight_bytes = engine.policy.weight_bytes()
    shards = plan_shards(weight_bytes, parse_size(engine.config.max_shard_size))
    files = _shard_files(shards)
    shard_of = {name: number for number, names in enumerate(shards) for name in names}
    if distributed.is_main():
        directory.mkdir(parents=True, exist_ok=True)
        for stale in directory.glob("model*.safetensors*"):
            stale.unlink()
    held: dict = {}
    for name, weight in engine.policy.weights():
        if weight is None:
            continue
        held[name] = weight.contiguous()
        number = shard_of[name]
        if len(held) == len(shards[number]):
            save_file(held, directory / files[number], metadata={"format": "pt"})
            held = {}
    if distributed.is_main():
        if len(shards) > 1:
            _write_index(directory, weight_bytes, {name: files[shard_of[name]] for name in weight_bytes})
        model.config.save_pretrained(directory)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(directory)
        engine.tokenizer.save_pretrained(directory)
    distributed.barrier()


def _shard_files(shards: list[list[str]]) -> list[str]:
    if len(shards) == 1:
        return ["model.safetensors"]
    total = len(shards)
    return [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]


def _write_index(directory: Path, weight_bytes: dict[str, int], weight_map: dict[str, str]) -> None:
    index = {"metadata": {"total_size": sum(weight_bytes.values())}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")
