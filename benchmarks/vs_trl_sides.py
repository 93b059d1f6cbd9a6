"""Trains one case on one side and writes what it cost as JSON; vs_trl.py starts it.

usage: python -m benchmarks.vs_trl_sides ours|trl|floor SPEC.json OUT

The result is OUT.RANK.json.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.gemm_floor import Pack, floor_seconds
from benchmarks.metering import Meter
from benchmarks.vs_trl_cases import TOKENIZER, WITH_REFERENCE, Case

if TYPE_CHECKING:
    from ds_align.engine import AlignEngine

STARTED = time.perf_counter()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANK = int(os.environ.get("RANK", "0"))
LOGGED = ("loss", "grad_norm", "logps/chosen", "logps/rejected")


def run_ours(case: Case, model: Path, rows: list[dict], output: Path) -> dict:
    """ds_align's own Trainer; what it logs is read from its metrics.jsonl."""
    from ds_align import Trainer
    from ds_align.config import METHODS

    paths = {
        "model_name_or_path": str(model),
        "tokenizer_name": str(model / TOKENIZER),
        "output_dir": str(output),
    }
    if case.reference == "cache":
        paths["ref_cache_dir"] = str(output.with_name("reference"))
    settings = case.our_settings() | paths
    trainer = Trainer(METHODS[case.method].config(**settings))
    engine = trainer.setup(rows)
    packs = packs_of(engine, scores_reference=case.reference == "live")
    meter = Meter(DEVICE, profiled=case.warm_up)
    update = engine.step

    def step() -> object:
        result = update()
        # The real one has returned: the trainer's logging of this step counts with the next, as in TRL.
        meter.mark()
        return result

    engine.step = step
    meter.loaded()
    trainer.train()
    # Rank 0 writes it.
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if RANK == 0 else []
    return finished(case, meter, [json.loads(line) for line in lines]) | {"packs": packs}


def run_trl(case: Case, model: Path, rows: list[dict], output: Path, micro_batch: int) -> dict:
    """TRL's trainer of the method; what it logs is its log history."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    kinds = {"dpo": (DPOConfig, DPOTrainer), "kto": (KTOConfig, KTOTrainer)}
    config_class, trainer_class = kinds.get(case.method, (CPOConfig, CPOTrainer))
    meter = Meter(DEVICE, profiled=case.warm_up)

    class Marks(TrainerCallback):
        """Reads the clocks where run_ours does: after the optimizer's step, before the logging."""

        def on_step_end(self, *_args: object, **_kwargs: object) -> None:
            meter.mark()

    def load() -> AutoModelForCausalLM:
        # bf16 is autocast over float32 weights: both sides keep float32 master weights.
        return AutoModelForCausalLM.from_pretrained(model, dtype="float32", attn_implementation="sdpa")

    datasets.disable_progress_bars()
    given = {"model": load()}
    if case.method in WITH_REFERENCE and case.reference == "live":
        given["ref_model"] = load()
    settings = case.trl_settings(micro_batch) | {"output_dir": str(output), "use_cpu": DEVICE == "cpu"}
    kept = [{key: value for key, value in row.items() if key != "kl_completion"} for row in rows]
    trainer = trainer_class(
        **given,
        args=config_class(**settings),
        train_dataset=datasets.Dataset.from_list(kept),
        processing_class=AutoTokenizer.from_pretrained(model / TOKENIZER),
        callbacks=[Marks()],
    )
    meter.loaded()
    trainer.train()
    return finished(case, meter, [entry for entry in trainer.state.log_history if "loss" in entry])


def finished(case: Case, meter: Meter, logged: list[dict]) -> dict:
    """The costs, and the figures of every step, the warm-up included."""
    steps = [{name: line[name] for name in LOGGED if name in line} for line in logged]
    started = meter.marks[1][0] - STARTED
    return meter.result(case.warm_up) | {"start_to_first_step_s": started, "logged": steps}


def packs_of(engine: AlignEngine, *, scores_reference: bool) -> list[list[Pack]]:
    """For each step, the packs that go through a model and how."""
    found = []
    for batch in engine.batches():
        packs = [Pack.of(micro, trained=True) for micro in batch.micro_batches]
        packs += [Pack.of(scored, trained=False) for scored in batch.kl_batches]
        if scores_reference:
            packs += [Pack.of(scored, trained=False) for scored in batch.reference_batches]
        found.append(packs)
    return found


def run_floor(case: Case, steps: list[list[Pack]], sizes: dict[str, int]) -> dict:
    """The bare matrix products of the timed steps of ours."""
    dtype = getattr(torch, case.dtype)
    return {"floor_s": floor_seconds(steps[case.warm_up :], sizes, dtype=dtype, device=DEVICE)}


def main() -> None:
    """Reads the specification, runs the side, writes the result."""
    # The launcher puts its own flag in front.
    side, *paths = (text for text in sys.argv[1:] if not text.startswith("--local_rank"))
    spec_path, out = map(Path, paths)
    spec = json.loads(spec_path.read_text(encoding="utf-8"))
    case = Case(**spec["case"])
    if side == "floor":
        steps = [[Pack(*pack) for pack in step] for step in spec["packs"]]
        result = run_floor(case, steps, spec["sizes"])
    else:
        rows = json.loads(Path(spec["rows"]).read_text(encoding="utf-8"))
        common = (case, Path(spec["model"]), rows, out)
        result = run_ours(*common) if side == "ours" else run_trl(*common, spec["micro_batch"])
    out.with_suffix(f".{RANK}.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
