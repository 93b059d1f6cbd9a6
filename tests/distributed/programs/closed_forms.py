"""Trains a bigram model on one-token completions, case after case; saves losses, z0 and the table's rows.

usage: closed_forms.py MODELS OUT.pt [NAME ...]; without names every case. MODELS holds `uniform`, `start`,
`two_words`, `policy` and `reference`.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ds_align import AlignEngine, distributed
from ds_align.config import METHODS, BaseConfig
from tests.distributed import bigram  # noqa: F401  (registers the model's class)
from tests.distributed.tiny import destroy, ds_config, program_arguments, reference_ds_config

PROMPT, A, B, C = 10, 20, 21, 22


@dataclass(frozen=True)
class Case:
    """One run. preferences: (chosen, rejected) to how often it is in the data; global_batch is in rows."""

    method: str
    preferences: dict[tuple[int, int], int]
    model: str = "uniform"
    steps: int = 30
    global_batch: int = 4
    settings: dict = field(default_factory=dict)

    def rows(self) -> list[dict]:
        pairs = [pair for pair, count in self.preferences.items() for _ in range(count)]
        return [{"prompt_ids": [PROMPT], "chosen_ids": [c], "rejected_ids": [r]} for c, r in pairs]


@dataclass(frozen=True)
class LabelledCase(Case):
    """A run of KTO; examples: (prompt, completion, desirable)."""

    preferences: dict[tuple[int, int], int] = field(default_factory=dict)
    examples: tuple[tuple[int, int, bool], ...] = ()

    def rows(self) -> list[dict]:
        return [
            {"prompt_ids": [prompt], "completion_ids": [completion], "label": label}
            for prompt, completion, label in self.examples
        ]


def noisy(method: str, *, model: str = "uniform", steps: int, **settings: object) -> Case:
    """Three pairs say A > B, one says B > A: q = 3/4."""
    return Case(method, {(A, B): 3, (B, A): 1}, model=model, steps=steps, settings=settings)


# Three rows in a global batch of four: two ranks with unequal shares of a batch that is partial.
ALONE = {(A, B): 3}
# R(A), R(B), R(C) = 2 ln 3, ln 3, 0: A beats B and B beats C in 3 of 4, A beats C in 9 of 10 pairs.
BRADLEY_TERRY = {(A, B): 3, (B, A): 1, (B, C): 3, (C, B): 1, (A, C): 9, (C, A): 1}
MIXED = ((11, A, True), (11, B, False), (12, C, True), (13, A, False), (12, B, False))
KTO_WEIGHTS = (2.0, 3.0, 4.0)

CASES: dict[str, Case] = {
    "dpo optimum": Case(
        "dpo",
        BRADLEY_TERRY,
        model="start",
        steps=25,
        global_batch=18,
        settings={"beta": 0.8, "learning_rate": 6.0},
    ),
    "dpo smoothing": Case(
        "dpo", ALONE, steps=20, settings={"beta": 0.5, "learning_rate": 9.0, "label_smoothing": 0.2}
    ),
    "dpo path": Case("dpo", ALONE, steps=12, settings={"beta": 0.5, "learning_rate": 0.7}),
    "ipo optimum": noisy("ipo", steps=25, beta=0.4, learning_rate=0.15),
    "ipo path": Case(
        "ipo",
        {(A, B): 7},
        steps=12,
        global_batch=6,
        settings={
            "beta": 0.25,
            "learning_rate": 0.1,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 3,
            "gradient_accumulation_steps": 3,
            "pack_max_tokens": 4,
        },
    ),
    "cpo 0.1 0": noisy("cpo", model="two_words", steps=20, beta=0.1, cpo_alpha=0.0, learning_rate=200.0),
    "cpo 0.1 1": noisy("cpo", model="two_words", steps=20, beta=0.1, cpo_alpha=1.0, learning_rate=2.0),
    "cpo 1 1": noisy("cpo", model="two_words", steps=20, beta=1.0, cpo_alpha=1.0, learning_rate=1.0),
    "simpo": noisy("simpo", steps=20, beta=2.0, gamma_beta_ratio=0.5, learning_rate=0.5),
    **{
        f"kto weight {weight}": LabelledCase(
            "kto",
            examples=((PROMPT, A, True), *[(PROMPT, A, False)] * 3),
            steps=3,
            settings={"desirable_weight": weight, "learning_rate": 1.0},
        )
        for weight in KTO_WEIGHTS
    },
    "kto step 0": LabelledCase("kto", examples=MIXED, steps=1, settings={"learning_rate": 0.0}),
    "kto z0": LabelledCase(
        "kto", examples=MIXED, model="policy", steps=8, settings={"beta": 0.5, "learning_rate": 4.0}
    ),
}


def build_config(case: Case, models: Path) -> BaseConfig:
    config_class = METHODS[case.method].config
    accumulation = case.settings.get("gradient_accumulation_steps", 1)
    values = {
        "model_name_or_path": str(models / case.model),
        "ds_config": ds_config(3),
        "per_device_train_batch_size": case.global_batch // (distributed.world_size() * accumulation),
        "train_sampling_strategy": "sequential",
        "max_steps": case.steps,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "dtype": "float32",
        **case.settings,
    }
    config = config_class(**values)
    if METHODS[case.method].needs_reference(config):
        config.ref_ds_config = reference_ds_config()
        config.ref_model_name = str(models / "reference") if case.model == "policy" else None
    return config


def run_case(case: Case, models: Path) -> dict:
    """losses and z0 [steps]; tables: float32 [steps + 1, prompts, vocabulary], before and after each step."""
    engine = AlignEngine.from_config(build_config(case, models), train_dataset=case.rows())
    losses, kl, counts = [], [], []
    tables = [table(engine)]
    for global_batch in engine.batches():
        loss = torch.zeros(1, dtype=torch.float64)
        for batch in global_batch.micro_batches:
            output = engine.forward(batch)
            engine.backward(output.losses.sum(), global_count=global_batch.num_preferences)
            loss += output.losses.detach().sum().cpu()
        engine.step()
        tables.append(table(engine))
        counts.append(global_batch.num_preferences)
        losses.append(distributed.all_reduce_sum(loss, engine.device).item() / counts[-1])
        kl.append(0.0 if global_batch.kl is None else float(global_batch.kl))
    result = {"losses": losses, "kl": kl, "counts": counts, "layout": str(engine.layout)}
    destroy(engine)
    return result | {"tables": torch.stack(tables) if distributed.is_main() else None}


def table(engine: AlignEngine) -> torch.Tensor | None:
    """The rows of the prompts that the cases use, on rank 0. Collective."""
    weights = dict(engine.policy.weights())["table.weight"]
    return None if weights is None else weights[PROMPT : PROMPT + 4]


def main() -> None:
    from ds_align.engine.init import init_distributed

    models, out, *names = program_arguments()
    init_distributed()
    # Reading the weights collects garbage each time, which is slow only for all that was imported.
    gc.freeze()
    results = {name: run_case(CASES[name], Path(models)) for name in names or CASES}
    if distributed.is_main():
        torch.save(results, out)
    distributed.barrier()


if __name__ == "__main__":
    main()
