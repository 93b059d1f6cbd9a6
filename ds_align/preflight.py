"""The doctor's command: all checks of a run, the models' too, without training anything."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ds_align import distributed
from ds_align.config import BaseConfig
from ds_align.doctor import OF_MODELS, Facts, Finding, Skipped, examine
from ds_align.doctor.report import Report, lengths_of, sample_of
from ds_align.doctor.texts import read_texts
from ds_align.doctor.tokens import spread
from ds_align.engine import AlignEngine
from ds_align.engine.examination import first_scores, gather_facts
from ds_align.engine.init import init_distributed
from ds_align.engine.setup import Setup, check_setup
from ds_align.errors import DataError, DsAlignError
from ds_align.models import load_tokenizer
from ds_align.models.load import weight_files
from ds_align.records import check_output_dir
from ds_align.splits import Splits, load_splits

# Decoded for check 3, and scored for checks 9 and 12.
SAMPLE_ROWS = 2000
SCORED_ROWS = 64


@dataclass(frozen=True, slots=True)
class _Run:
    """What the command has opened; setup is None where the model directory holds no weights."""

    config: BaseConfig
    device: torch.device
    tokenizer: object
    setup: Setup | None
    splits: Splits | None


def examine_run(config: BaseConfig) -> Report:
    """Every check that this model and these data allow.

    Without weights in the model directory its scores are left out, without data all checks of them.
    Collective: every rank must call this. Raises ConfigError and DataError for what cannot be opened at all.
    """
    faults = (*output_faults(config), *port_faults())
    device = init_distributed()
    has_weights = distributed.agree(lambda: _has_weights(config))
    setup = distributed.agree(lambda: check_setup(config, device)) if has_weights else None
    tokenizer = setup.tokenizer if setup is not None else distributed.agree(lambda: _tokenizer(config))
    splits = None
    if config.dataset_path is not None or config.mixture is not None:
        splits = distributed.agree(lambda: load_splits(config, tokenizer))
    run = _Run(config, device, tokenizer, setup, splits)
    facts = gather_facts(config, splits, tokenizer, setup, device)
    facts = replace(facts, sample_rows=SAMPLE_ROWS, machine=replace(facts.machine, faults=faults))
    # One rank reads the texts; a DataError there is one on all.
    texts = distributed.agree(lambda: _texts(run))
    facts = replace(facts, texts=texts)
    findings, skipped = distributed.broadcast_object(
        examine(facts, [number for number in range(1, 16) if number not in OF_MODELS])
        if distributed.is_main()
        else ([], [])
    )
    more, reason = _examine_models(run, findings)
    skipped += [Skipped(*named, reason) for named in _unscored(more)]
    findings = sorted([*findings, *more], key=lambda finding: finding.id)
    return _report(run, facts, findings, sorted(skipped, key=lambda item: item.id))


def stop_on_errors(report: Report) -> None:
    """Raises DataError where a check found an error."""
    wrong = [finding for finding in report.findings if finding.level == "error"]
    if wrong:
        names = ", ".join(f"{finding.id} ({finding.name})" for finding in wrong)
        raise DataError(f"{len(wrong)} of the doctor's checks found an error: {names}; see the table above")


def _texts(run: _Run) -> object:
    if run.splits is None or not distributed.is_main():
        return None
    return read_texts(run.config, run.splits)


def _has_weights(config: BaseConfig) -> bool:
    """Whether the model can be loaded; what is no directory is left to the check of the setup."""
    directory = Path(config.model_name_or_path or "")
    if not directory.is_dir() or (directory / "adapter_config.json").is_file():
        return True
    return bool(weight_files(directory))


def _tokenizer(config: BaseConfig) -> object:
    name = config.tokenizer_name or config.model_name_or_path
    return load_tokenizer(name, trust_remote_code=config.trust_remote_code)


def _examine_models(run: _Run, findings: list[Finding]) -> tuple[list[Finding], str]:
    """The checks of the models' scores, or none of them and the reason. Collective."""
    if not run.config.doctor_models:
        return [], "doctor_models is false"
    if run.setup is None:
        return [], f"{run.config.model_name_or_path} holds no weights"
    if run.splits is None:
        return [], "no data was given"
    if any(finding.id == 13 and finding.level == "error" for finding in findings):
        return [], "the models do not fit in memory, see check 13"
    # A cache would be filled for all rows; the reference itself is asked for these few.
    config = run.config.model_copy(update={"doctor": "off", "ref_logps": "live", "ref_cache_dir": None})
    engine = AlignEngine.from_config(config)
    rows = spread(len(engine.train_data), max(SCORED_ROWS, engine.world_size))
    facts = Facts(run.config, scores=first_scores(engine, torch.tensor(rows).numpy()))
    found, _ = examine(facts, OF_MODELS)
    return found, ""


def _unscored(found: list[Finding]) -> list[tuple[int, str]]:
    from ds_align.doctor import CHECKS

    there = {finding.id for finding in found}
    return [(check.id, check.name) for check in CHECKS if check.id in OF_MODELS and check.id not in there]


def output_faults(config: BaseConfig) -> tuple[str, ...]:
    """Why the output directory cannot take this run; nothing where it can."""
    try:
        check_output_dir(Path(config.resolved_output_dir), config)
    except DsAlignError as error:
        return (str(error),)
    return ()


def port_faults() -> tuple[str, ...]:
    """Why a launcher's port cannot be had; asked before the process group takes it.

    Without a launcher a free port is chosen, and under torchrun its own agent holds it already.
    """
    port = os.environ.get("MASTER_PORT")
    launched = "RANK" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    if port is None or not launched or not distributed.is_main():
        return ()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(port)))
        except OSError as error:
            return (f"MASTER_PORT={port} cannot be had ({error.strerror}); give --master_port another",)
    return ()


def _report(run: _Run, facts: Facts, findings: list[Finding], skipped: list[Skipped]) -> Report:
    report = Report(
        {
            "method": run.config.method,
            "model_name_or_path": run.config.model_name_or_path,
            "dataset_path": run.config.dataset_path,
            "world_size": facts.world_size,
            "num_steps": facts.num_steps,
        },
        findings,
        skipped,
    )
    if run.setup is not None:
        report.notes += run.setup.messages
    if run.splits is not None:
        data = run.splits.train
        report.run |= {"rows": len(data), "data_counts": {name: int(n) for name, n in data.counts.items()}}
        report.run |= {"eval_rows": None if facts.evaluation is None else len(facts.evaluation)}
        report.notes += run.splits.messages
        report.sample = sample_of(data, run.tokenizer)
        report.lengths = lengths_of(data)
    if facts.texts is not None:
        report.dialects = facts.texts.dialects
        report.notes += facts.texts.remarks
    return report
