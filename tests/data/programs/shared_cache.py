"""Loads data sets on every rank, in ways that concern the ranks together.

usage: shared_cache.py DIRECTORY; it holds good.jsonl, bad.jsonl and file, a file. Rank 0 writes facts.json.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch.distributed as dist

from ds_align import DPOConfig, distributed
from ds_align.errors import DsAlignError
from ds_align.splits import load_splits


def load(source: object, cache: Path | str) -> dict:
    """What this rank sees, or the error that reached it."""
    started = time.perf_counter()
    settings = {"dataset_cache_dir": str(cache), "dataset_num_proc": 1, "eval_fraction": 0.2}
    if isinstance(source, dict):
        settings, source = settings | source, None
    config = DPOConfig(**settings)
    try:
        data = distributed.agree(lambda: load_splits(config, None, source)).train
    except DsAlignError as error:
        return {"error": f"{type(error).__name__}: {error}", "seconds": time.perf_counter() - started}
    return {
        "digest": data.digest(),
        "processes": data.num_processes,
        "mapped": data.directory is not None,
        "notes": data.notes,
    }


def main() -> None:
    work = Path(next(text for text in sys.argv[1:] if not text.startswith("--local_rank")))
    dist.init_process_group("gloo")
    rows = [{"prompt_ids": [number], "chosen_ids": [1], "rejected_ids": [2]} for number in range(30)]
    path = str(work / "good.jsonl")
    mixture = [
        {"path": path, "split": split, "name": split, "weight": weight}
        for split, weight in (("train[:9000]", 3), ("train[9000:]", 1))
    ]
    cases = {
        "cold": (work / "good.jsonl", work / "cache"),
        "warm": (work / "good.jsonl", work / "cache"),
        "mixture": ({"mixture": mixture, "mixture_rows": 5000}, work / "cache"),
        "none": (work / "good.jsonl", "none"),
        "unusable": (work / "good.jsonl", work / "file" / "cache"),
        "in memory": (rows, work / "cache"),
        "bad": (work / "bad.jsonl", work / "cache"),
        "missing": (work / ("good.jsonl" if distributed.rank() else "nowhere.jsonl"), work / "cache"),
    }
    facts = {}
    for name, (source, cache) in cases.items():
        distributed.barrier()
        facts[name] = distributed.gather_objects(load(source, cache))
    if distributed.is_main():
        (work / "facts.json").write_text(json.dumps(facts))
    distributed.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
