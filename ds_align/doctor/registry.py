"""Every check with its number, its limit and what it needs; `examine` runs those that can run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ds_align.doctor.facts import Facts
from ds_align.doctor.finding import Finding, Outcome, Subject
from ds_align.doctor.machine import machine
from ds_align.doctor.pairs import length_bias, overlap_and_text, repeated_rows
from ds_align.doctor.scores import distance_of_data, start_agreement
from ds_align.doctor.settings import beta_range, ipo_margin, kto_balance, learning_rate_range, size_of_run
from ds_align.doctor.tokens import cut_rows, missing_eos, repeated_specials, shifted_boundary, uses_eos


@dataclass(frozen=True, slots=True)
class Check:
    """One check. needs: facts that it cannot do without; subject: whose fault an error is.

    said_by_config: BaseConfig.warnings() says it at the start of a run, so the checks do not say it again.
    """

    id: int
    name: str
    limit: str
    run: Callable[[Facts], Outcome]
    needs: tuple[str, ...] = ()
    subject: Subject = "data"
    said_by_config: bool = False


TOKENS = ("train", "tokenizer")
CHECKS = (
    Check(1, "special tokens", "one BOS in a row, one EOS a completion", repeated_specials, TOKENS),
    Check(2, "missing EOS", "an EOS at the end of what is not cut", missing_eos, TOKENS),
    Check(3, "prompt boundary", "<= 1 % of rows", shifted_boundary, TOKENS),
    Check(4, "truncation", "<= 5 % of rows; no completion cut to nothing", cut_rows, TOKENS),
    Check(5, "repeated pairs", "none; <= 10 % nearly equal", repeated_rows, ("train",)),
    Check(6, "length bias", "ratio <= 1.2, P(chosen longer) <= 0.6", length_bias, ("train",)),
    Check(7, "beta", "usual range of the method", beta_range, (), "settings", said_by_config=True),
    Check(
        8,
        "learning rate",
        "<= 5e-6 (full), <= 1e-4 (LoRA)",
        learning_rate_range,
        (),
        "settings",
        said_by_config=True,
    ),
    Check(9, "start agreement", "<= 1e-3 (fp32), <= 0.05 (half)", start_agreement, ("scores",)),
    Check(10, "IPO margin", "1 / (2 beta)", ipo_margin, (), "settings"),
    Check(11, "KTO balance", "y' mismatched; w_d n_d / (w_u n_u) in [1, 4/3]", kto_balance, ("train",)),
    Check(12, "distance of the data", ">= -3 nats a token", distance_of_data, ("scores",)),
    Check(13, "size of the run", ">= 50 steps, warm-up <= 30 %, memory <= 90 %", size_of_run, (), "settings"),
    Check(14, "overlap and text", "none; dialects within 5 points", overlap_and_text, ("train",)),
    Check(
        15,
        "machine",
        "equal versions, disk for 3 checkpoints, output, port",
        machine,
        ("machine",),
        "settings",
    ),
)
# They need the models, which load last.
OF_MODELS = (9, 12)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A check that was not run, and why."""

    id: int
    name: str
    reason: str


# How the facts are called in words.
_NEEDS = {
    "train": "data (dataset_path)",
    "tokenizer": "a tokenizer",
    "scores": "the models",
    "machine": "the machine",
}


def examine(facts: Facts, ids: Iterable[int] | None = None) -> tuple[list[Finding], list[Skipped]]:
    """Runs the checks with these numbers (default: all) that have the facts they need."""
    wanted = {check.id for check in CHECKS} if ids is None else set(ids)
    findings, skipped = [], []
    for check in CHECKS:
        if check.id not in wanted:
            continue
        missing = [need for need in check.needs if not facts.has(need)]
        if missing:
            skipped.append(Skipped(check.id, check.name, f"needs {' and '.join(_NEEDS[n] for n in missing)}"))
            continue
        found = check.run(facts)
        findings.append(
            Finding(
                check.id,
                check.name,
                found.level,
                found.value,
                check.limit,
                found.message,
                found.remedy,
                found.examples,
                check.subject,
            )
        )
    return findings, skipped


def as_warnings_where_legal(findings: Iterable[Finding], facts: Facts) -> list[Finding]:
    """The findings as a run takes them at its start: what the contract allows does not stop it.

    A row may keep a single token of a completion (4), and token ids are taken as they are, with whatever
    special tokens they have (1, 2): there an error is a warning, unless most completions end with the EOS.
    """
    legal = {4}
    if facts.train is not None and facts.tokenizer is not None and not uses_eos(facts):
        legal |= {1, 2}
    return [finding.lowered("warning") if finding.id in legal else finding for finding in findings]


def unsaid(findings: Iterable[Finding]) -> list[Finding]:
    """Those that BaseConfig.warnings() does not say."""
    told = {check.id for check in CHECKS if check.said_by_config}
    return [finding for finding in findings if finding.id not in told]
