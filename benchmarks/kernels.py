"""Times the log-prob kernels beside what they replace and beside the bare matrix products, in one run.

    python benchmarks/kernels.py [--tokens 512] [--hidden 512] [--vocabulary 32000 151936] [--rounds 7]

Per contender: seconds (median over the rounds; CPU time of the process on a CPU, device time on a GPU); its
ratio to the bare matrix products that the same work needs at least, with their results in memory that is
there already (warm) and in fresh memory (fresh); its ratio to the same work through the whole matrix of
logits (naive); the peak of extra memory in MB, gradients included; and the largest error of a log-prob
against float64. The rounds go through all contenders in turn, so that a machine that slows down slows all of
them. --json FILE writes the same numbers.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ds_align.kernels import backend, linear_logprob, logprob_gather, native

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ENOUGH_MB = 2**20


@dataclass(frozen=True, slots=True)
class Problem:
    """hidden [T, H], weight [V, H], labels [T]; upstream [T] is the gradient that comes in."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    upstream: Tensor

    @classmethod
    def random(
        cls, num_tokens: int, width: int, vocabulary: int, *, dtype: torch.dtype, device: str
    ) -> Problem:
        """Logits of standard deviation 3, whatever the width."""
        generator = torch.Generator(device=device).manual_seed(0)
        options = {"generator": generator, "device": device}
        hidden = torch.randn(num_tokens, width, **options) * (3.0 / width**0.5)
        weight = torch.randn(vocabulary, width, **options)
        labels = torch.randint(0, vocabulary, (num_tokens,), **options)
        return cls(hidden.to(dtype), weight.to(dtype), labels, torch.randn(num_tokens, **options))

    def leaves(self, *, trains_head: bool) -> tuple[Tensor, Tensor]:
        """hidden and weight as the ends of a new graph."""
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_(trains_head)

    def exact(self) -> Tensor:
        """The log-probs in float64, some tokens at a time."""
        weight = self.weight.double()
        parts = []
        for rows in range(0, len(self.labels), 32):
            logits = self.hidden[rows : rows + 32].double() @ weight.T
            parts.append(
                -torch.nn.functional.cross_entropy(logits, self.labels[rows : rows + 32], reduction="none")
            )
        return torch.cat(parts)


@dataclass(frozen=True, slots=True)
class Contender:
    """`run` does the work once and returns the log-probs, or None.

    products: those that the work needs at least, "logits", "hidden" or "weight"; like: who does it naively.
    """

    name: str
    run: Callable[[], Tensor | None]
    products: tuple[str, ...] = ()
    like: str = ""


@dataclass(slots=True)
class Result:
    """One line of the table."""

    name: str
    seconds: float
    warm: float | None
    fresh: float | None
    naive: float | None
    peak_mb: float
    error: float | None


def naive(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What everybody writes first: all logits, then their log-softmax in float32."""
    logits = hidden @ weight.T
    return torch.log_softmax(logits.float(), dim=-1).gather(1, labels.unsqueeze(1)).squeeze(1)


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

    return [Contender(f"{name}, warm", warm(*factors[name])) for name in factors] + [
        Contender(f"{name}, fresh", fresh(*factors[name][:2])) for name in factors
    ]


SCORING, FROZEN, TRAINING = ("logits",), ("logits", "hidden"), ("logits", "hidden", "weight")


def contenders(problem: Problem, impl: str) -> list[Contender]:
    """Ours in every mode with one implementation."""
    labels = problem.labels

    def scored() -> Tensor:
        with torch.no_grad():
            return linear_logprob(problem.hidden, problem.weight, labels, impl=impl)

    def backward(logprobs: Tensor) -> Tensor:
        (logprobs * problem.upstream).sum().backward()
        return logprobs.detach()

    def trained(*, trains_head: bool, budget: int = 0) -> Callable[[], Tensor]:
        def run() -> Tensor:
            hidden, weight = problem.leaves(trains_head=trains_head)
            return backward(linear_logprob(hidden, weight, labels, impl=impl, logits_budget_mb=budget))

        return run

    def gathered(*, reuse_logits: bool) -> Callable[[], Tensor]:
        def run() -> Tensor:
            hidden, weight = problem.leaves(trains_head=True)
            logits = hidden @ weight.T
            return backward(logprob_gather(logits, labels, impl, reuse_logits=reuse_logits))

        return run

    recompute, keep = trained(trains_head=True), trained(trains_head=True, budget=ENOUGH_MB)
    # One twentieth of the logits' bytes.
    some = trained(trains_head=True, budget=len(labels) * len(problem.weight) * 4 // 20 // 2**20)
    return [
        Contender(f"{impl}: no gradient", scored, SCORING, "naive: no gradient"),
        Contender(f"{impl}: frozen head", trained(trains_head=False), FROZEN, "naive: frozen head"),
        Contender(f"{impl}: recompute", recompute, ("logits", *TRAINING), "naive: trainable"),
        Contender(f"{impl}: keep 1/20", some, ("logits", *TRAINING), "naive: trainable"),
        Contender(f"{impl}: keep logits", keep, TRAINING, "naive: trainable"),
        Contender(f"{impl}: gather", gathered(reuse_logits=False), TRAINING, "naive: trainable"),
        Contender(f"{impl}: gather, reuse", gathered(reuse_logits=True), TRAINING, "naive: trainable"),
    ]


def naive_contenders(problem: Problem) -> list[Contender]:
    """The same work through the whole matrix of logits."""

    def scored() -> Tensor:
        with torch.no_grad():
            return naive(problem.hidden, problem.weight, problem.labels)

    def trained(*, trains_head: bool) -> Callable[[], Tensor]:
        def run() -> Tensor:
            logprobs = naive(*problem.leaves(trains_head=trains_head), problem.labels)
            (logprobs * problem.upstream).sum().backward()
            return logprobs.detach()

        return run

    return [
        Contender("naive: no gradient", scored, SCORING),
        Contender("naive: frozen head", trained(trains_head=False), FROZEN),
        Contender("naive: trainable", trained(trains_head=True), TRAINING),
    ]


def seconds_of(run: Callable[[], object], device: str) -> float:
    """One run, in CPU seconds of the process or seconds of the device."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def resident_mb(key: str) -> float:
    """VmRSS or VmHWM of this process."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(rf"{key}:\s+(\d+) kB", status)[1]) / 1024


def peak_mb_of(run: Callable[[], object], device: str) -> float:
    """Most memory that one run took beyond what was there before it."""
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident_mb("VmRSS")
    run()
    return resident_mb("VmHWM") - before


def compared(contender: Contender, seconds: dict[str, float]) -> dict[str, float | None]:
    """The contender's ratios."""
    own = seconds[contender.name]
    ratios: dict[str, float | None] = {
        kind: own / sum(seconds[f"{name}, {kind}"] for name in contender.products)
        if contender.products
        else None
        for kind in ("warm", "fresh")
    }
    return ratios | {"naive": own / seconds[contender.like] if contender.like else None}


def measured(problem: Problem, rounds: int, device: str) -> list[Result]:
    """All contenders on one problem."""
    impls = ["native", "torch"] if native.HAS_KERNELS.get(device) else ["torch"]
    ours = [contender for impl in impls for contender in contenders(problem, impl)]
    everybody = products(problem) + naive_contenders(problem) + ours
    exact = problem.exact()
    errors, peaks, times = {}, {}, {contender.name: [] for contender in everybody}
    for contender in everybody:
        logprobs = contender.run()
        errors[contender.name] = None if logprobs is None else (logprobs.double() - exact).abs().max().item()
        peaks[contender.name] = peak_mb_of(contender.run, device)
    for _ in range(rounds):
        for contender in everybody:
            times[contender.name].append(seconds_of(contender.run, device))
    seconds = {name: statistics.median(values) for name, values in times.items()}
    return [
        Result(
            name=contender.name,
            seconds=seconds[contender.name],
            **compared(contender, seconds),
            peak_mb=peaks[contender.name],
            error=errors[contender.name],
        )
        for contender in everybody
    ]


def table(results: list[Result]) -> str:
    """The results as aligned text."""
    columns = ("seconds", "warm", "fresh", "naive", "peak MB", "error")
    lines = [f"{'contender':<24}" + "".join(f"{column:>9}" for column in columns)]
    for result in results:
        ratios = [f"{ratio:.3f}" if ratio else "" for ratio in (result.warm, result.fresh, result.naive)]
        error = "" if result.error is None else f"{result.error:.1e}"
        cells = (f"{result.seconds:.4f}", *ratios, f"{result.peak_mb:.1f}", error)
        lines.append(f"{result.name:<24}" + "".join(f"{cell:>9}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    """Measures each vocabulary and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32000, 151936])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    runs = []
    for vocabulary in arguments.vocabulary:
        shape = (arguments.tokens, arguments.hidden, vocabulary)
        problem = Problem.random(*shape, dtype=DTYPES[arguments.dtype], device=arguments.device)
        results = measured(problem, arguments.rounds, arguments.device)
        where = f"{arguments.dtype} {arguments.device}, live: {backend()}"
        print(f"\nT={shape[0]} H={shape[1]} V={vocabulary} {where}")
        print(table(results), flush=True)
        runs.append({"vocabulary": vocabulary, "results": [asdict(result) for result in results]})
    if arguments.json:
        about = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
        settings = {key: str(value) for key, value in vars(arguments).items()}
        arguments.json.write_text(json.dumps({"about": about, "settings": settings, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
