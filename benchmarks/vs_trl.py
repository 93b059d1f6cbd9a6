"""Trains the same model on the same preferences with ds_align and with TRL, in turn, and compares the costs.

    python benchmarks/vs_trl.py --quick
    python benchmarks/vs_trl.py [--models body head] [--methods dpo kto cpo simpo] [--profiles mixed long]
        [--references live cache] [--steps 3] [--repeats 3] [--json FILE]

Each run is the real trainer of its side in a process of its own, with logging and metrics at every step. TRL
is shown at a micro-batch of 8 preferences, as a user starts it, and at its fastest one of 1, 2, 4 and 8 with
gradient accumulation to the same batch. The floor is the time of the bare matrix products of our steps. The
figures are medians over the repeats; a cost is CPU time (user + system of the process), on a GPU wall time.
A line whose losses are not ours is invalid, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

# Python puts this folder first, where transformers would find kernels.py for the package of that name.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.launching import MALLOC, RunError, child_environment, run_side  # noqa: E402
from benchmarks.machine import conditions  # noqa: E402
from benchmarks.vs_trl_cases import (  # noqa: E402
    METHODS,
    MODELS,
    PROFILES,
    SHARED,
    WITH_REFERENCE,
    Case,
    rows_of,
    write_model,
)
from benchmarks.vs_trl_report import TOLERANCES, Line, lines_of, losses_table, table  # noqa: E402

QUICK = "a check that both sides run and agree, no figure of speed: fixed costs decide on so small a model"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
USUAL_MICRO_BATCH = 8


@dataclass(slots=True)
class Runs:
    """Everything that was measured of one case: results by side, in the order of the repeats.

    trl: by micro-batch. fastest: TRL's best micro-batch.
    """

    case: Case
    ours: list[dict] = field(default_factory=list)
    trl: dict[int, list[dict]] = field(default_factory=dict)
    floor: list[dict] = field(default_factory=list)
    fastest: int = USUAL_MICRO_BATCH
    failures: list[str] = field(default_factory=list)


class Bench:
    """Starts the sides of one case, each in a process of its own."""

    def __init__(self, case: Case, work: Path, arguments: argparse.Namespace) -> None:
        self.case = case
        self.folder = work / case.name.replace(" ", "-")
        self.folder.mkdir()
        self.timeout = arguments.timeout
        self.micro_batches = arguments.micro_batches
        self.environment = child_environment(arguments.threads, device=DEVICE)
        model = work / case.model
        if not model.is_dir():
            write_model(model, MODELS[case.model])
        rows = self.folder / "rows.json"
        vocabulary = MODELS[case.model]["vocab_size"]
        rows.write_text(json.dumps(rows_of(case, vocabulary, arguments.data)), encoding="utf-8")
        self.spec = {
            "case": asdict(case),
            "model": str(model),
            "rows": str(rows),
            "sizes": MODELS[case.model],
        }
        self.count = 0

    def run(self, side: str, **more: object) -> dict:
        """One run. Raises RunError."""
        self.count += 1
        out, spec = self.folder / f"{self.count}", self.folder / f"{self.count}.spec.json"
        spec.write_text(json.dumps(self.spec | more), encoding="utf-8")
        (result,) = run_side(side, spec, out, environment=self.environment, timeout=self.timeout)
        # A repeat must find neither our trained model nor our cache of the reference.
        for left in (out, out.with_name("reference")):
            shutil.rmtree(left, ignore_errors=True)
        return result


def cost(result: dict) -> float:
    """Seconds of a step."""
    return result["cpu_s"] if DEVICE == "cpu" else result["wall_s"]


def measure(bench: Bench, repeats: int, say: Callable[[str], None]) -> Runs:
    """All runs of a case; the sides take turns, in reverse order every second time."""
    runs = Runs(bench.case)

    def ours() -> None:
        runs.ours.append(bench.run("ours"))
        say(f"ours {cost(runs.ours[-1]):.3f} s a step")

    def trl(size: int) -> None:
        try:
            result = bench.run("trl", micro_batch=size)
        except RunError as error:
            # Too large a micro-batch for the memory ends TRL alone.
            runs.failures.append(f"TRL at micro-batch {size}: {error}")
            return
        runs.trl.setdefault(size, []).append(result)
        say(f"TRL at micro-batch {size} {cost(result):.3f} s a step")

    def floor() -> None:
        runs.floor.append(bench.run("floor", packs=runs.ours[0]["packs"]))
        say(f"floor {runs.floor[-1]['floor_s']:.3f} s a step")

    sizes = [size for size in bench.case.micro_batches() if size in bench.micro_batches]
    if not sizes:
        possible = ", ".join(map(str, bench.case.micro_batches()))
        raise RunError(f"TRL takes none of these --micro_batches here; give one of {possible}")
    ours()
    for size in reversed(sizes):
        trl(size)
    floor()
    if not runs.trl:
        raise RunError("\n".join(runs.failures))
    runs.fastest = min(runs.trl, key=lambda size: cost(runs.trl[size][0]))
    shown = [size for size in dict.fromkeys((USUAL_MICRO_BATCH, runs.fastest)) if size in runs.trl]
    turn = [ours, *(lambda size=size: trl(size) for size in shown), floor]
    for number in range(1, repeats):
        for run in turn if number % 2 == 0 else reversed(turn):
            run()
    return runs


def cases_of(arguments: argparse.Namespace) -> list[Case]:
    """The cases that the arguments ask for; what cannot be is said and left out."""
    from ds_align.config import METHODS as OURS

    found: list[Case] = []
    for model in arguments.models:
        for method in arguments.methods:
            for profile in arguments.profiles:
                for reference in arguments.references if method in WITH_REFERENCE else ["none"]:
                    case = Case(
                        *(method, model, profile, reference, arguments.steps),
                        warm_up=arguments.warm_up,
                        prompts=arguments.prompts,
                        dtype=arguments.dtype,
                        ds_config=arguments.ds_config,
                    )
                    if method == "kto" and profile == "ranked":
                        print(f"{case.name}: left out, KTO has no pairs to rank")
                    elif reference == "cache" and "ref_logps" not in OURS[method].config.model_fields:
                        print(f"{case.name}: left out, this ds_align has no setting ref_logps")
                    else:
                        found.append(case)
    return found


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["body"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--profiles", nargs="+", choices=PROFILES, default=["mixed"])
    parser.add_argument("--references", nargs="+", choices=("live", "cache"), default=["live"])
    parser.add_argument(
        "--micro_batches",
        type=int,
        nargs="+",
        choices=(1, 2, 4, 8),
        default=[1, 2, 4, 8],
        help="TRL's, among which its fastest is found",
    )
    parser.add_argument("--prompts", type=int, default=8, help="prompts in a step; a multiple of 8")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a run")
    parser.add_argument("--warm_up", type=int, default=2, help="steps before them")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=TOLERANCES, default="float32")
    parser.add_argument("--ds_config", default="zero0", help="ours: a shipped DeepSpeed configuration")
    parser.add_argument(
        "--data", type=Path, help="JSONL of texts (prompt, chosen, rejected); else random ids"
    )
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that one run may take")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK}; one case, a minute on an idle CPU")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.prompts < 1 or arguments.prompts % USUAL_MICRO_BATCH:
        parser.error(f"--prompts {arguments.prompts}: give a multiple of {USUAL_MICRO_BATCH}")
    if min(arguments.steps, arguments.warm_up, arguments.repeats, arguments.threads) < 1:
        parser.error("--steps, --warm_up, --repeats and --threads are at least 1")
    if arguments.data is not None and set(arguments.profiles) != {"mixed"}:
        parser.error("--data has its own lengths; leave --profiles out")
    if DEVICE == "cpu" and arguments.dtype != "float32":
        parser.error(f"--dtype {arguments.dtype} is for GPUs")
    if arguments.quick:
        arguments.models, arguments.methods, arguments.profiles = ["tiny"], ["dpo"], ["tiny"]
        arguments.references, arguments.repeats = ["live"], 1
    return arguments


def introduce(arguments: argparse.Namespace) -> None:
    """What holds for all tables."""
    about = conditions(DEVICE)
    packages = ("torch", "transformers", "trl", "deepspeed")
    place, versions = about["machine"], about["versions"]
    print(place.get("gpu", place["cpu"]), *(f"{name} {versions[name]}" for name in packages), sep=", ")
    print(
        f"{arguments.dtype}, {arguments.threads} thread(s) a process, ours under {arguments.ds_config}; both "
        f"sides: {', '.join(f'{name}={value}' for name, value in SHARED.items())}"
    )
    print(f"both sides with {' '.join(f'{name}={value}' for name, value in MALLOC.items())}: without them")
    print("glibc returns large tensors to the system at every step and takes them again")
    if arguments.quick:
        print(f"--quick is {QUICK}")
    if arguments.data is not None:
        print(f"preferences of {arguments.data}, whatever the name of the profile says")
    cores, load = place["cores"], about["load_average_at_start"][0]
    if load > 0.5:
        print(f"warning: the load average is {load:.2f} on {cores} cores; others are at work")


def main() -> int:
    """Measures the cases one after the other; 1 where a line is invalid."""
    arguments = parse()
    introduce(arguments)
    found: list[tuple[Runs, list[Line]]] = []
    with tempfile.TemporaryDirectory() as work:
        for case in cases_of(arguments):
            print(f"\n{case.name}: {case.batch} preferences a step", flush=True)
            bench = Bench(case, Path(work), arguments)
            try:
                runs = measure(bench, arguments.repeats, lambda text: print(f"  {text}", flush=True))
            except RunError as error:
                sys.exit(f"{case.name}: {error}")
            lines = lines_of(runs, usual=USUAL_MICRO_BATCH, device=DEVICE)
            print(table(lines), losses_table(runs, lines), *runs.failures, sep="\n", flush=True)
            found.append((runs, lines))
    if arguments.json is not None:
        settings = {name: str(value) for name, value in vars(arguments).items()}
        cases = [asdict(runs) | {"lines": [asdict(line) for line in lines]} for runs, lines in found]
        whole = {"conditions": conditions(DEVICE), "settings": settings, "environment": MALLOC}
        whole["cases"] = cases
        arguments.json.write_text(json.dumps(whole, indent=1), encoding="utf-8")
    return int(any(not line.valid for _, lines in found for line in lines))


if __name__ == "__main__":
    sys.exit(main())
