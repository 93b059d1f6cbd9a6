"""Times the log-prob kernels beside what they replace, what others offer, and the bare matrix products.

    python benchmarks/kernels.py [--tokens 512] [--hidden 512] [--vocabulary 32000 151936] [--rounds 5]

One run measures all contenders in turn, round by round, so that a machine that slows down slows all of them.
README.md beside this file says what the columns and the contenders are. --json writes the same numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from kernel_peers import PEERS, loaded, naive, reason_of
from kernel_problem import MODES, Logprobs, Outcome, Problem, errors_of
from machine import conditions, peak_mb_of, seconds_of
from torch import Tensor

from ds_align.kernels import linear_logprob, logprob_gather, native

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULTS = {
    "cpu": {"tokens": 512, "hidden": 512, "vocabulary": [32000, 151936], "dtype": "float32"},
    "cuda": {"tokens": 16384, "hidden": 4096, "vocabulary": [151936], "dtype": "bfloat16"},
}
RESULTS = Path(__file__).parent / "results"
ENOUGH_MB = 2**20
# Triton tunes and cuBLAS makes its workspaces in the first runs.
NUM_WARM_UPS = {"cpu": 0, "cuda": 3}
PRODUCT = "matrix products"


@dataclass(frozen=True, slots=True)
class Contender:
    """`run` does the work once. products: the matrix products that it makes. A peer's failure is a reason."""

    name: str
    mode: str
    run: Callable[[], Outcome | None]
    products: tuple[str, ...] = ()
    is_peer: bool = False


@dataclass(slots=True)
class Result:
    """One line of the table. seconds: one for each round, median theirs.

    first_seconds: the first run by the clock, compilation included.
    """

    name: str
    mode: str
    num_products: int
    seconds: list[float]
    median: float
    warm: float | None
    fresh: float | None
    naive: float | None
    peak_mb: float
    first_seconds: float
    logprob_error: float | None
    gradient_error: float | None


def products(problem: Problem) -> list[Contender]:
    """The bare matrix products, logits and the two of the backward: into memory that is there, and into
    fresh.
    """
    hidden, weight = problem.hidden, problem.weight
    logits = hidden.new_zeros(len(hidden), len(weight))
    factors = {
        "logits": (hidden, weight.T, logits),
        "hidden": (logits, weight, torch.zeros_like(hidden)),
        "weight": (logits.T, hidden, torch.zeros_like(weight)),
    }

    def warm(left: Tensor, right: Tensor, out: Tensor) -> Callable[[], None]:
        return lambda: (torch.mm(left, right, out=out), None)[1]

    def fresh(left: Tensor, right: Tensor) -> Callable[[], None]:
        return lambda: (torch.mm(left, right), None)[1]

    return [Contender(f"{name}, warm", PRODUCT, warm(*factors[name])) for name in factors] + [
        Contender(f"{name}, fresh", PRODUCT, fresh(*factors[name][:2])) for name in factors
    ]


def in_modes(
    name: str,
    logprobs_of: Logprobs,
    problem: Problem,
    modes: Iterable[str] = MODES,
    *,
    recomputes: bool = False,
    is_peer: bool = False,
) -> list[Contender]:
    """One function in several modes. recomputes: its backward makes the logits again."""
    return [
        Contender(
            name,
            mode,
            partial(problem.outcome, logprobs_of, mode),
            ("logits",) * (recomputes and mode != "no gradient") + MODES[mode],
            is_peer,
        )
        for mode in modes
    ]


def ours(problem: Problem, impl: str) -> list[Contender]:
    """Ours in every mode with one implementation."""

    def linear(budget_mb: int) -> Logprobs:
        return partial(linear_logprob, impl=impl, logits_budget_mb=budget_mb)

    def gather(*, reuse_logits: bool) -> Logprobs:
        return lambda hidden, weight, labels: logprob_gather(
            hidden @ weight.T, labels, impl, reuse_logits=reuse_logits
        )

    name, head = f"ours, {impl}", ["trainable"]
    # A twentieth of what the naive way holds (logits, log-softmax, their gradient), in float32.
    some = 3 * len(problem.labels) * len(problem.weight) * 4 // 20 // 2**20
    return [
        *in_modes(name, linear(0), problem, ["no gradient", "frozen head"]),
        *in_modes(f"{name}: recompute", linear(0), problem, head, recomputes=True),
        *in_modes(f"{name}: naive / 20", linear(some), problem, head, recomputes=True),
        *in_modes(f"{name}: keep logits", linear(ENOUGH_MB), problem, head),
        *in_modes(f"{name}: gather", gather(reuse_logits=False), problem, head),
        *in_modes(f"{name}: gather, reuse", gather(reuse_logits=True), problem, head),
    ]


def entrants(problem: Problem, device: str, only: str) -> tuple[list[Contender], dict[str, str]]:
    """Those whose names hold `only` and can start here, and why other peers cannot.

    The bare products and the naive way are always there: the ratios need them.
    """
    impls = ["native", "torch"] if native.HAS_KERNELS.get(device) else ["torch"]
    chosen = [contender for impl in impls for contender in ours(problem, impl)]
    chosen = [contender for contender in chosen if re.search(only, contender.name)]
    skipped = {}
    for peer in PEERS:
        if not re.search(only, peer.name):
            continue
        function = loaded(peer, device)
        if isinstance(function, str):
            skipped[peer.name] = function
        else:
            chosen += in_modes(peer.name, function, problem, recomputes=peer.recomputes, is_peer=True)
    return products(problem) + in_modes("naive", naive, problem) + chosen, skipped


def first_run(contender: Contender, exact: Outcome, device: str) -> dict[str, float | None]:
    """Clock time of the first run, errors and memory; the runs after it find everything compiled."""
    start = time.perf_counter()
    outcome = contender.run()
    if device == "cuda":
        torch.cuda.synchronize()
    first_seconds = time.perf_counter() - start
    logprob, gradient = (None, None) if outcome is None else errors_of(outcome, exact)
    del outcome
    for _ in range(NUM_WARM_UPS[device]):
        contender.run()
    return {
        "first_seconds": first_seconds,
        "logprob_error": logprob,
        "gradient_error": gradient,
        "peak_mb": peak_mb_of(contender.run, device),
    }


def started(
    everybody: list[Contender], exact: Outcome, device: str
) -> tuple[dict[tuple[str, str], dict[str, float | None]], dict[str, str]]:
    """The first runs by mode and name, and why some did not run.

    Only a peer may fail, and anybody may need more memory than a GPU has.
    """
    firsts, skipped = {}, {}
    for contender in everybody:
        try:
            firsts[contender.mode, contender.name] = first_run(contender, exact, device)
        except Exception as error:
            if not contender.is_peer and not isinstance(error, torch.OutOfMemoryError):
                raise
            skipped[f"{contender.name}, {contender.mode}"] = reason_of(error)
        # After the error is gone, whose frames hold tensors.
        if device == "cuda" and (contender.mode, contender.name) not in firsts:
            torch.cuda.empty_cache()
    return firsts, skipped


def ratio_to(seconds: float, parts: list[float | None]) -> float | None:
    """seconds over the sum of the parts, where all of them were measured."""
    return None if not parts or None in parts else seconds / sum(parts)


def measured(problem: Problem, rounds: int, device: str, only: str) -> tuple[list[Result], dict[str, str]]:
    """All contenders on one problem, and why some are missing."""
    torch.compiler.reset()
    everybody, skipped = entrants(problem, device, only)
    firsts, failed = started(everybody, problem.exact(), device)
    runners = [contender for contender in everybody if (contender.mode, contender.name) in firsts]
    times = {key: [] for key in firsts}
    for _ in range(rounds):
        for contender in runners:
            times[contender.mode, contender.name].append(seconds_of(contender.run, device))
    medians = {key: statistics.median(values) for key, values in times.items()}
    results = []
    for contender in runners:
        key = (contender.mode, contender.name)
        bare = {
            kind: [medians.get((PRODUCT, f"{name}, {kind}")) for name in contender.products]
            for kind in ("warm", "fresh")
        }
        results.append(
            Result(
                name=contender.name,
                mode=contender.mode,
                num_products=len(contender.products),
                seconds=times[key],
                median=medians[key],
                warm=ratio_to(medians[key], bare["warm"]),
                fresh=ratio_to(medians[key], bare["fresh"]),
                naive=ratio_to(medians[key], [medians.get((contender.mode, "naive"))]),
                **firsts[key],
            )
        )
    return results, skipped | failed


def table(results: list[Result], skipped: dict[str, str]) -> str:
    """The results as aligned text, a block for each mode, and what is missing from them."""
    columns = ("products", "seconds", "warm", "fresh", "naive", "peak MB", "first s", "logprob", "gradient")
    lines = []
    for mode in (PRODUCT, *MODES):
        lines.append(f"{mode:<30}" + "".join(f"{column:>9}" for column in columns))
        for result in (result for result in results if result.mode == mode):
            ratios = (result.warm, result.fresh, result.naive if result.name != "naive" else None)
            errors = (result.logprob_error, result.gradient_error)
            cells = (
                str(result.num_products or ""),
                f"{result.median:.4f}",
                *("" if ratio is None else f"{ratio:.3f}" for ratio in ratios),
                f"{result.peak_mb:.1f}",
                f"{result.first_seconds:.2f}",
                *("" if error is None else f"{error:.1e}" for error in errors),
            )
            lines.append(f"  {result.name:<28}" + "".join(f"{cell:>9}" for cell in cells))
    return "\n".join(lines + [f"not run: {name}: {reason}" for name, reason in skipped.items()])


def number(least: int) -> Callable[[str], int]:
    """The type of an argument that is at least so much."""

    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value}; expected {least} or more")
        return value

    return parse


def check(arguments: argparse.Namespace) -> str | None:
    """What cannot be done with the arguments, before anything is measured."""
    try:
        chosen = re.compile(arguments.only)
    except re.error as error:
        return f"--only {arguments.only!r} is no regular expression: {error}"
    names = [f"ours, {impl}" for impl in ("native", "torch")] + [peer.name for peer in PEERS]
    suffixes = ["", ": recompute", ": naive / 20", ": keep logits", ": gather", ": gather, reuse"]
    if not any(chosen.search(name + suffix) for name in names for suffix in suffixes):
        return f"--only {arguments.only!r} leaves nobody; the names: {', '.join(names)}"
    if arguments.json is not None and arguments.json != RESULTS and arguments.json.is_dir():
        return f"--json {arguments.json}: a directory; expected a file"
    return None


def arguments_of(words: list[str]) -> argparse.Namespace:
    """The command line, with the device's own defaults."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=DEFAULTS, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=number(1))
    parser.add_argument("--hidden", type=number(1))
    # With one word every log-prob is 0, and so is every gradient that an error could be a share of.
    parser.add_argument("--vocabulary", type=number(2), nargs="+")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--rounds", type=number(1), default=5)
    parser.add_argument("--threads", type=number(1), default=1)
    parser.add_argument("--only", default="", help="a regular expression on the contenders' names")
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=RESULTS,
        help="a file; without one, results/kernels-<device>.json",
    )
    arguments = parser.parse_args(words)
    problem = check(arguments)
    if problem is not None:
        parser.error(problem)
    for name, value in DEFAULTS[arguments.device].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.json == RESULTS:
        arguments.json = RESULTS / f"kernels-{arguments.device}.json"
    return arguments


def main() -> None:
    """Measures each vocabulary and prints its table."""
    arguments = arguments_of(sys.argv[1:])
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: this torch sees no CUDA device")
    torch.set_num_threads(arguments.threads)
    about, runs, start = conditions(arguments.device), [], time.monotonic()
    for vocabulary in arguments.vocabulary:
        shape = (arguments.tokens, arguments.hidden, vocabulary)
        problem = Problem.random(*shape, dtype=DTYPES[arguments.dtype], device=arguments.device)
        results, skipped = measured(problem, arguments.rounds, arguments.device, arguments.only)
        where = f"{arguments.dtype} {arguments.device}, live: {about['live_back_end']}"
        print(f"\nT={shape[0]} H={shape[1]} V={vocabulary} {where}")
        print(table(results, skipped), flush=True)
        runs.append(
            {
                "vocabulary": vocabulary,
                "results": [asdict(result) for result in results],
                "skipped": skipped,
            }
        )
    about |= {"load_average_at_end": list(os.getloadavg()), "run_seconds": time.monotonic() - start}
    print(f"\n{about['run_seconds']:.0f} s, load {about['load_average_at_start'][0]:.2f} at the start")
    if arguments.json:
        settings = vars(arguments) | {"json": str(arguments.json)}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        whole = {"about": about, "settings": settings, "runs": runs}
        arguments.json.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
