"""The tables of vs_trl.py: medians, ratios to ours, and whether both sides trained the same."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.vs_trl import Runs
    from benchmarks.vs_trl_cases import Case

# Largest relative difference of a loss. bfloat16 keeps 8 bits of every activation.
TOLERANCES = {"float32": 2e-5, "bfloat16": 2e-2}


@dataclass(frozen=True, slots=True)
class Line:
    """One side of one case; medians over its repeats, ratios to ours (ours is 1).

    cost_s: seconds of a step, CPU time on a CPU. live_growth_mb: growth_mb as tensors alone take it. check:
    what was held against ours and how far it is apart.
    """

    side: str
    micro_batch: int | None
    rate: float
    cost_s: float
    cost_ratio: float
    growth_mb: float
    growth_ratio: float
    peak_mb: float
    peak_ratio: float
    live_growth_mb: float
    live_growth_ratio: float
    first_step_s: float
    start_to_first_step_s: float
    check: str = ""
    valid: bool = True
    floor_ratio: float | None = None


def median(results: Sequence[dict], name: str) -> float:
    """Over the repeats."""
    return statistics.median(result[name] for result in results)


def difference(ours: Sequence[dict], theirs: Sequence[dict], name: str) -> float:
    """The largest relative difference of a logged figure over the steps; infinite where one is missing."""
    if len(ours) != len(theirs) or not all(name in step for step in (*ours, *theirs)):
        return float("inf")
    pairs = [(mine[name], other[name]) for mine, other in zip(ours, theirs, strict=True)]
    if not all(math.isfinite(value) for pair in pairs for value in pair):
        return float("inf")
    return max(abs(mine - other) / max(abs(other), 1e-12) for mine, other in pairs)


def check(case: Case, ours: Sequence[dict], theirs: Sequence[dict], micro_batch: int) -> tuple[str, bool]:
    """Whether TRL trained what we did: every loss, or, where its loss is another one by definition, the
    log-probs of the first step.

    ours, theirs: results, one a repeat.
    """
    term = case.loss_depends_on(micro_batch)
    if not term:
        found = max(difference(mine["logged"], other["logged"], "loss") for mine in ours for other in theirs)
        text = f"losses {found:.1e}"
    else:
        found = max(
            difference(mine["logged"][:1], other["logged"][:1], name)
            for mine in ours
            for other in theirs
            for name in ("logps/chosen", "logps/rejected")
        )
        text = f"{term} of a micro-batch: first log-probs {found:.1e}"
    valid = found <= TOLERANCES[case.dtype]
    return (text if valid else f"INVALID {text}"), valid


def lines_of(runs: Runs, *, usual: int, device: str) -> list[Line]:
    """Ours, TRL at the usual micro-batch, TRL at its fastest."""
    clock = "cpu_s" if device == "cpu" else "wall_s"
    floor = median(runs.floor, "floor_s")
    base = {name: median(runs.ours, name) for name in (clock, "growth_mb", "peak_mb", "live_growth_mb")}

    def line(side: str, results: list[dict], micro_batch: int | None) -> Line:
        text, valid = ("", True) if micro_batch is None else check(runs.case, runs.ours, results, micro_batch)
        seconds = median(results, clock)
        return Line(
            side=side,
            micro_batch=micro_batch,
            rate=runs.case.batch / median(results, "wall_s"),
            cost_s=seconds,
            cost_ratio=seconds / base[clock],
            growth_mb=median(results, "growth_mb"),
            growth_ratio=median(results, "growth_mb") / base["growth_mb"],
            peak_mb=median(results, "peak_mb"),
            peak_ratio=median(results, "peak_mb") / base["peak_mb"],
            live_growth_mb=median(results, "live_growth_mb"),
            live_growth_ratio=median(results, "live_growth_mb") / base["live_growth_mb"],
            first_step_s=median(results, "first_step_s"),
            start_to_first_step_s=median(results, "start_to_first_step_s"),
            check=text,
            valid=valid,
            floor_ratio=seconds / floor,
        )

    lines = [line("ds_align", runs.ours, None)]
    if usual in runs.trl:
        lines.append(line("TRL", runs.trl[usual], usual))
    lines.append(line("TRL, fastest", runs.trl[runs.fastest], runs.fastest))
    return lines


def table(lines: Sequence[Line]) -> str:
    """One row a side; x: ratio to ours."""
    titles = (
        "prefs/s",
        "s/step",
        "x",
        "x floor",
        "live MB",
        "x",
        "growth MB",
        "x",
        "peak MB",
        "x",
        "1st step s",
        "start s",
    )
    rows = [f"{'':<14}{'micro':>6}" + "".join(f"{title:>11}" for title in titles) + "  checked"]
    for line in lines:
        cells = (
            *(f"{line.rate:.2f}", f"{line.cost_s:.3f}", f"{line.cost_ratio:.2f}", f"{line.floor_ratio:.2f}"),
            *(
                f"{line.live_growth_mb:.0f}",
                f"{line.live_growth_ratio:.2f}",
                f"{line.growth_mb:.0f}",
                f"{line.growth_ratio:.2f}",
                f"{line.peak_mb:.0f}",
            ),
            *(f"{line.peak_ratio:.2f}", f"{line.first_step_s:.2f}", f"{line.start_to_first_step_s:.1f}"),
        )
        micro = "packs" if line.micro_batch is None else str(line.micro_batch)
        rows.append(
            f"{line.side:<14}{micro:>6}" + "".join(f"{cell:>11}" for cell in cells) + f"  {line.check}"
        )
    return "\n".join(rows)


def losses_table(runs: Runs, lines: Sequence[Line]) -> str:
    """The loss of every step on every side, those of the warm-up included."""
    sides = {"ds_align": runs.ours[0]}
    for line in lines[1:]:
        sides[f"TRL, micro-batch {line.micro_batch}"] = runs.trl[line.micro_batch][0]
    rows = [f"{'loss of step':<20}" + "".join(f"{step + 1:>13}" for step in range(runs.case.all_steps))]
    for name, result in sides.items():
        rows.append(f"{name:<20}" + "".join(f"{step['loss']:>13.7f}" for step in result["logged"]))
    return "\n".join(rows)
