"""How the cost of a step grows: with its tokens, the vocabulary, the model, the ranks and ZeRO's stage.

    python benchmarks/scaling.py [--tables tokens vocabulary model ranks offload] [--steps 3] [--json FILE]

Each row is a run of ds_align's Trainer (DPO with a live reference) in processes of its own; the rows of a
table take turns over the repeats, and the figures are medians. Seconds are CPU time of one rank, the slowest;
on a GPU they are wall time. The last column is the cost of a unit of what grows (a token, a weight), over
that of the first row: 1 is linear.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

# Python puts this folder first, where transformers would find kernels.py for the package of that name.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.launching import MALLOC, RunError, child_environment, run_side  # noqa: E402
from benchmarks.machine import conditions  # noqa: E402
from benchmarks.vs_trl_cases import PROFILES, Case, rows_of, write_model  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOCK = "cpu_s" if DEVICE == "cpu" else "wall_s"
SIZES = {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
}
HEAD_WIDTH = 64
IN_MEMORY = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "train_micro_batch_size_per_gpu": "auto",
}


@dataclass(frozen=True)
class Row:
    """One run. grows: the number that the table is about; None where nothing is counted."""

    name: str
    sizes: dict[str, int] = field(default_factory=lambda: dict(SIZES))
    prompts: int = 8
    ranks: int = 1
    ds_config: str = "zero0"
    ours: dict = field(default_factory=dict)
    grows: str = ""


def tokens_rows(prompts: int) -> list[Row]:
    """More preferences a step."""
    return [
        Row(f"{factor * prompts} pairs", prompts=factor * prompts, grows="tokens") for factor in (1, 2, 4, 8)
    ]


def vocabulary_rows(prompts: int) -> list[Row]:
    """A larger head."""
    return [
        Row(f"{size} words", {**SIZES, "vocab_size": size}, prompts, grows="products")
        for size in (4096, 16384, 65536)
    ]


def model_rows(prompts: int) -> list[Row]:
    """Deeper and wider bodies."""
    found = []
    for layers, width in ((2, 128), (4, 256), (8, 384), (12, 512)):
        sizes = {
            "num_hidden_layers": layers,
            "hidden_size": width,
            "intermediate_size": 64 * round(width * 2.75 / 64),
            "num_attention_heads": width // HEAD_WIDTH,
            "num_key_value_heads": width // HEAD_WIDTH // 2,
        }
        found.append(Row(f"{layers} x {width}", {**SIZES, **sizes}, prompts, grows="products"))
    return found


def ranks_rows(prompts: int) -> list[Row]:
    """One global batch on one and on two ranks."""
    return [
        Row(f"{ranks} rank(s), ZeRO {stage}", prompts=prompts, ranks=ranks, ds_config=f"zero{stage}")
        for stage in (0, 2, 3)
        for ranks in (1, 2)
    ]


def offload_rows(prompts: int) -> list[Row]:
    """Where the partitions of the reference lie."""
    return [
        Row("offloaded", prompts=prompts),
        Row("on the device", prompts=prompts, ours={"ref_ds_config": IN_MEMORY}),
    ]


TABLES = {
    "tokens": tokens_rows,
    "vocabulary": vocabulary_rows,
    "model": model_rows,
    "ranks": ranks_rows,
    "offload": offload_rows,
}


def products(row: Row) -> int:
    """Weights that a token is multiplied with, the head included."""
    sizes = row.sizes
    width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    keys = sizes["num_key_value_heads"] * width // heads
    layer = 2 * width * width + 2 * width * keys + 3 * width * sizes["intermediate_size"]
    return sizes["num_hidden_layers"] * layer + sizes["vocab_size"] * width


class Bench:
    """Runs rows; keeps what each of their processes measured."""

    def __init__(self, work: Path, arguments: argparse.Namespace) -> None:
        self.work = work
        self.arguments = arguments
        self.environment = child_environment(1, device=DEVICE)
        self.count = 0

    def run(self, row: Row) -> dict:
        """One run: the results of all ranks, and its tokens a step."""
        self.count += 1
        folder = self.work / str(self.count)
        folder.mkdir()
        case = Case(
            *("dpo", "given", self.arguments.profile, "live", self.arguments.steps),
            prompts=row.prompts,
            dtype=self.arguments.dtype,
            ds_config=row.ds_config,
            ours={"per_device_train_batch_size": row.prompts // row.ranks, **row.ours},
        )
        model = write_model(folder / "model", row.sizes)
        (folder / "rows.json").write_text(
            json.dumps(rows_of(case, row.sizes["vocab_size"])), encoding="utf-8"
        )
        spec = {"case": asdict(case), "model": str(model), "rows": str(folder / "rows.json")}
        (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        limits = {"timeout": self.arguments.timeout, "ranks": row.ranks}
        ranks = run_side("ours", folder / "spec.json", folder / "run", environment=self.environment, **limits)
        shutil.rmtree(folder)
        # A pack: tokens, scored tokens, segments, trained.
        steps = [step for result in ranks for step in result["packs"][case.warm_up :]]
        tokens = sum(pack[0] for step in steps for pack in step if pack[3]) / case.steps
        return {"ranks": ranks, "tokens": tokens}


def figures(row: Row, runs: list[dict]) -> dict:
    """Medians over the repeats of one row; a rank's figures are those of the worst rank."""

    def median(name: str) -> float:
        return statistics.median(max(result[name] for result in run["ranks"]) for run in runs)

    seconds, tokens = median(CLOCK), runs[0]["tokens"]
    units = {"": None, "tokens": tokens, "products": products(row)}[row.grows]
    return {
        "row": row.name,
        "tokens": tokens,
        "seconds": seconds,
        "wall_s": median("wall_s"),
        "microseconds_a_token": seconds / tokens * 1e6,
        "growth_mb": median("growth_mb"),
        "peak_mb": median("peak_mb"),
        "loss": runs[0]["ranks"][0]["logged"][-1]["loss"],
        "per_unit": None if units is None else seconds / units,
    }


def table(found: list[dict]) -> Iterator[str]:
    """The lines of one table."""
    titles = ("tokens", "s/step", "wall s", "us/token", "growth MB", "peak MB", "last loss", "x a unit")
    yield f"{'':<20}" + "".join(f"{title:>11}" for title in titles)
    first = found[0]["per_unit"]
    for line in found:
        cells = (
            *(f"{line['tokens']:.0f}", f"{line['seconds']:.3f}", f"{line['wall_s']:.3f}"),
            *(f"{line['microseconds_a_token']:.1f}", f"{line['growth_mb']:.0f}", f"{line['peak_mb']:.0f}"),
            *(f"{line['loss']:.6f}", "" if first is None else f"{line['per_unit'] / first:.2f}"),
        )
        yield f"{line['row']:<20}" + "".join(f"{cell:>11}" for cell in cells)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--profile", choices=PROFILES, default="mixed")
    parser.add_argument("--prompts", type=int, default=8, help="pairs of a step, in tokens the smallest step")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a run, after two of warm-up")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that one run may take")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.prompts < 2 or arguments.prompts % 2:
        parser.error("--prompts is even, for two ranks")
    if PROFILES[arguments.profile].completions != 2:
        parser.error("--profile: one with pairs")
    if min(arguments.steps, arguments.repeats) < 1:
        parser.error("--steps and --repeats are at least 1")
    return arguments


def main() -> int:
    """Measures the tables one after the other."""
    arguments = parse()
    about = conditions(DEVICE)
    place, load = about["machine"], about["load_average_at_start"][0]
    print(place.get("gpu", place["cpu"]), f"load average {load:.2f}", sep=", ")
    print(f"one thread a process, {arguments.dtype}, {arguments.profile}, {MALLOC}")
    if DEVICE == "cuda" and torch.cuda.device_count() < 2 and "ranks" in arguments.tables:
        print("ranks: left out, one GPU")
        arguments.tables.remove("ranks")
    found: dict[str, list[dict]] = {}
    raw: dict[str, list[list[dict]]] = {}
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(Path(work), arguments)
        for name in arguments.tables:
            rows = TABLES[name](arguments.prompts)
            runs: list[list[dict]] = [[] for _ in rows]
            for number in range(arguments.repeats):
                for place in range(len(rows)) if number % 2 == 0 else reversed(range(len(rows))):
                    try:
                        runs[place].append(bench.run(rows[place]))
                    except RunError as error:
                        sys.exit(f"{name}, {rows[place].name}: {error}")
            found[name] = [figures(row, results) for row, results in zip(rows, runs, strict=True)]
            raw[name] = runs
            print(f"\n{name}", *table(found[name]), sep="\n", flush=True)
    if arguments.json is not None:
        settings = {key: str(value) for key, value in vars(arguments).items()}
        whole = {"conditions": about, "settings": settings, "environment": MALLOC}
        whole |= {"tables": found, "runs": raw}
        arguments.json.write_text(json.dumps(whole, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
