"""Trains every case with TRL's trainers in one process; writes what was logged and the token ids as JSON.

usage: theirs.py MODELS OUT.json
"""

from __future__ import annotations

import gc
import json
from pathlib import Path

import datasets
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from tests.distributed.tiny import program_arguments
from tests.parity.cases import CASES, Case, rows_of

KINDS = {
    "dpo": (DPOConfig, DPOTrainer),
    "ipo": (DPOConfig, DPOTrainer),
    "kto": (KTOConfig, KTOTrainer),
    "cpo": (CPOConfig, CPOTrainer),
    "simpo": (CPOConfig, CPOTrainer),
}


def load(directory: Path) -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(directory, dtype="float32", attn_implementation="sdpa")


def run(case: Case, models: Path, out: Path) -> dict:
    config_class, trainer_class = KINDS[case.method]
    arguments = config_class(
        output_dir=str(out.parent / "theirs"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        optim="adamw_torch",
        **case.common,
        **case.theirs,
    )
    models_given = {"model": load(models / "policy")}
    if case.reference is not None:
        models_given["ref_model"] = load(models / case.reference)
    rows = [{key: value for key, value in row.items() if key != "kl_completion"} for row in rows_of(case)]
    trainer = trainer_class(
        **models_given,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(models / "policy"),
    )
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"steps": steps, "ids": token_ids(case, trainer.train_dataset)}


def token_ids(case: Case, data: datasets.Dataset) -> list[list[list[int]]]:
    """For each row: prompt, chosen and rejected, or prompt, completion and y'; not yet cut to max_length."""
    if case.method in ("cpo", "simpo"):
        return [
            [row["prompt_input_ids"], *[scored(row[f"{side}_labels"]) for side in ("chosen", "rejected")]]
            for row in data
        ]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    if case.method == "kto":
        names = ("prompt_ids", "completion_ids", "KL_completion_ids")
    return [[row[name] for name in names if name in row] for row in data]


def scored(labels: list[int]) -> list[int]:
    return [label for label in labels if label != -100]


def main() -> None:
    models, out = map(Path, program_arguments())
    datasets.disable_progress_bars()
    gc.freeze()
    found = {name: run(case, models, out) for name, case in CASES.items()}
    out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
