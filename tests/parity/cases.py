"""What is trained on both sides: the data, the shared settings, and each side's names for the rest."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

WORDS = (
    *("ash", "birch", "cedar", "dogwood", "elm", "fir", "gum", "hazel"),
    *("ivy", "juniper", "kauri", "larch", "maple", "nutmeg", "oak", "pine"),
)
# Both clip: the first gradients of every method are larger.
SHARED = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 2,
    "max_grad_norm": 1.0,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "train_sampling_strategy": "sequential",
    "logging_steps": 1,
    "max_length": 512,
    "disable_dropout": True,
    "gradient_checkpointing": False,
    "seed": 42,
}


@dataclass(frozen=True)
class Case:
    """One run on each side. shared, ours, theirs: settings; other_reference: not the policy at the start."""

    method: str
    shared: dict = field(default_factory=dict)
    ours: dict = field(default_factory=dict)
    theirs: dict = field(default_factory=dict)
    steps: int = 5
    batch: int = 4
    accumulation: int = 1
    other_reference: bool = False
    long_prompts: bool = False
    first_row: int = 0

    @property
    def reference(self) -> str | None:
        """The directory of the reference model, None for methods without one."""
        if self.method in ("cpo", "simpo"):
            return None
        return "reference" if self.other_reference else "policy"

    @property
    def common(self) -> dict:
        """The settings that have one name on both sides."""
        return {
            **SHARED,
            "max_steps": self.steps,
            "per_device_train_batch_size": self.batch,
            "gradient_accumulation_steps": self.accumulation,
            **self.shared,
        }


def _sentence(rng: np.random.Generator, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(low, high)))


def pairs(num_rows: int = 20, *, long_prompts: bool = False) -> list[dict]:
    """Text pairs of uneven length; a character is a token, and no chosen equals its rejected."""
    rng = np.random.default_rng(3)
    low, high = (6, 12) if long_prompts else (1, 5)
    return [
        {
            "prompt": f"{number}: {_sentence(rng, low, high)} ",
            "chosen": _sentence(rng, 1, 4 + 12 * (number % 5 == 3)),
            "rejected": _sentence(rng, 2, 5 + 9 * (number % 4 == 1)),
        }
        for number in range(num_rows)
    ]


def labelled(batch: int, num_rows: int = 20) -> list[dict]:
    """Single completions, of both classes in any two rows, with the y' that TRL takes.

    That is the completion of the row before in the batch, the last one's for the first row.
    """
    rows = [
        {
            "prompt": row["prompt"],
            "completion": row["chosen" if number % 2 == 0 else "rejected"],
            "label": number % 2 == 0,
        }
        for number, row in enumerate(pairs(num_rows))
    ]
    for start in range(0, num_rows, batch):
        part = rows[start : start + batch]
        for row, other in zip(part, [part[-1], *part[:-1]], strict=True):
            row["kl_completion"] = other["completion"]
    return rows


def rows_of(case: Case) -> list[dict]:
    """The data of a case; both sides take it in this order."""
    if case.method == "kto":
        return labelled(case.batch)[case.first_row :]
    return pairs(long_prompts=case.long_prompts)[case.first_row :]


LONGEST_PROMPT = max(len(row["prompt"]) for row in pairs(long_prompts=True))


def dpo(loss_type: str | list[str] = "sigmoid", **settings: object) -> Case:
    """One step of DPO against another reference, so that no log-ratio is 0."""
    return Case("dpo", {"loss_type": loss_type, **settings}, steps=1, other_reference=True)


# Five steps: loss, rewards, log-probs and gradient norm must stay together.
RUNS: dict[str, Case] = {
    "dpo": Case("dpo", {"beta": 0.1}),
    "dpo accumulated": Case("dpo", {"beta": 0.1}, batch=2, accumulation=2),
    "dpo other reference": Case("dpo", {"beta": 0.05}, other_reference=True),
    "dpo cut": Case("dpo", {"beta": 0.1, "max_length": LONGEST_PROMPT + 10}, long_prompts=True),
    "ipo": Case("ipo", {"beta": 0.1}, theirs={"loss_type": "ipo"}),
    "ipo accumulated": Case("ipo", {"beta": 0.1}, theirs={"loss_type": "ipo"}, batch=2, accumulation=2),
    "kto": Case(
        "kto", {"beta": 0.1, "desirable_weight": 1.3, "undesirable_weight": 0.8}, other_reference=True
    ),
    "kto same reference": Case("kto", {"beta": 0.1}),
    "kto apo_zero": Case("kto", {"beta": 0.1, "loss_type": "apo_zero_unpaired"}, other_reference=True),
    "cpo": Case("cpo", {"beta": 0.1, "cpo_alpha": 1.0}),
    "cpo smoothing": Case("cpo", {"beta": 0.1, "cpo_alpha": 0.5, "label_smoothing": 0.1}),
    "cpo hinge": Case("cpo", {"beta": 0.1, "cpo_alpha": 1.0, "loss_type": "hinge"}),
    "cpo ipo": Case("cpo", {"beta": 0.1, "cpo_alpha": 1.0, "loss_type": "ipo"}),
    "simpo": Case(
        "simpo",
        {"beta": 2.0, "cpo_alpha": 0.0},
        ours={"gamma_beta_ratio": 0.5},
        theirs={"loss_type": "simpo", "simpo_gamma": 1.0},
    ),
    "simpo accumulated": Case(
        "simpo",
        {"beta": 2.0, "cpo_alpha": 0.0},
        ours={"gamma_beta_ratio": 0.3},
        theirs={"loss_type": "simpo", "simpo_gamma": 0.6},
        batch=2,
        accumulation=2,
    ),
    "cpo simpo": Case(
        "simpo",
        {"beta": 2.0, "cpo_alpha": 0.5, "label_smoothing": 0.1},
        ours={"gamma_beta_ratio": 0.5},
        theirs={"loss_type": "simpo", "simpo_gamma": 1.0},
    ),
    "alphapo": Case(
        "simpo",
        {"beta": 2.0, "cpo_alpha": 0.0, "alpha": 0.25},
        ours={"gamma_beta_ratio": 0.5},
        theirs={"loss_type": "simpo", "simpo_gamma": 1.0},
    ),
}

# One step of every loss type that both have.
ZOO: dict[str, Case] = {
    **{
        f"type {name}": dpo(name, beta=0.05)
        for name in (
            *("sigmoid", "hinge", "ipo", "nca_pair", "robust", "sppo_hard", "aot", "aot_unpaired"),
            *("apo_zero", "apo_down", "discopop", "sigmoid_norm"),
        )
    },
    "type robust smoothing": dpo("robust", beta=0.05, label_smoothing=0.2),
    "type exo_pair": dpo("exo_pair", beta=0.05, label_smoothing=0.1),
    "type aot smoothing": dpo("aot", beta=0.05, label_smoothing=0.1),
    "type aot_unpaired smoothing": dpo("aot_unpaired", beta=0.05, label_smoothing=0.1),
    "type discopop wide": dpo("discopop", beta=0.05, discopop_tau=0.5),
    "sigmoid sft": dpo(["sigmoid", "sft"], beta=0.05),
    "weighted mixture": dpo(["sigmoid", "nca_pair", "sft"], beta=0.05, loss_weights=[0.8, 0.2, 1.5]),
    "ld_alpha": dpo(beta=0.05, ld_alpha=0.3),
    "ld_alpha 0": dpo("hinge", beta=0.05, ld_alpha=0.0),
    "use_weighting": dpo(beta=0.05, use_weighting=True),
    "forward_kl": dpo(beta=0.05, f_divergence_type="forward_kl"),
    "js": dpo(beta=0.05, f_divergence_type="js_divergence"),
    # f'(u) = (1 - u^-a)/a as in the paper (arXiv:2309.16240); TRL's coefficient is 1 - a.
    "alpha": Case(
        "dpo",
        {"beta": 0.05, "f_divergence_type": "alpha_divergence"},
        ours={"f_alpha_divergence_coef": 0.3},
        theirs={"f_alpha_divergence_coef": 0.7},
        steps=1,
        other_reference=True,
    ),
    "rpo_alpha": Case(
        "dpo",
        {"beta": 0.05},
        ours={"rpo_alpha": 0.4},
        theirs={"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.4]},
        steps=1,
        other_reference=True,
    ),
}

_STILL = {"learning_rate": 0.0, "beta": 0.05}
_HALF = {"steps": 2, "batch": 2, "other_reference": True, "first_row": 12}
_WHOLE = {"steps": 1, "batch": 2, "accumulation": 2, "other_reference": True, "first_row": 12}
# The same four rows as two batches of two with a learning rate of 0, and as one batch accumulated from two.
COUPLED: dict[str, tuple[str, dict]] = {
    "kto": ("kto", {"learning_rate": 0.0, "beta": 0.3, "desirable_weight": 3.0}),
    "cpo": ("cpo", {"learning_rate": 0.0, "beta": 0.1, "cpo_alpha": 1.0}),
    "sft": ("dpo", {**_STILL, "loss_type": ["sigmoid", "sft"]}),
    "aot": ("dpo", {**_STILL, "loss_type": "aot"}),
    "aot_unpaired": ("dpo", {**_STILL, "loss_type": "aot_unpaired"}),
}
HALVES = {f"{name} halves": Case(method, shared, **_HALF) for name, (method, shared) in COUPLED.items()}
WHOLES = {f"{name} whole": Case(method, shared, **_WHOLE) for name, (method, shared) in COUPLED.items()}

# Where the two are not meant to agree, or where only one side has an effect.
OTHERS: dict[str, Case] = {
    **{
        f"{name} smoothed": dpo(name, beta=0.05, label_smoothing=0.2)
        for name in ("sigmoid", "ipo", "sigmoid_norm")
    },
    "bco_pair": Case("dpo", {"beta": 0.05, "loss_type": "bco_pair"}, steps=1, batch=1, other_reference=True),
    "long prompts": Case("dpo", {"beta": 0.1, "max_length": LONGEST_PROMPT - 5}, steps=1, long_prompts=True),
}

CASES: dict[str, Case] = {**RUNS, **ZOO, **HALVES, **WHOLES, **OTHERS}
