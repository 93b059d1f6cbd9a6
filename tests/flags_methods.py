"""What the settings of each method do, and those of the reference that follows the policy."""

from __future__ import annotations

from ds_align.config.dpo import LOSS_TYPES
from tests.flags_entries import NO_REFERENCE, TRAINING, Effect, Refused


def own(method: str, *changes: dict, differs: str = "first_loss weights", base: dict | None = None) -> list:
    return [Effect(change, differs, "tokens order", base or {}, method) for change in changes]


def smoothing(method: str, refused: str) -> list:
    words = f"label_smoothing=0.2 has no meaning for loss_type={refused}"
    return [
        *own(method, {"label_smoothing": 0.2}),
        Refused({"label_smoothing": 0.2, "loss_type": refused}, words, method),
    ]


def normalization(method: str, base: dict, without: dict | None = None) -> list:
    words = "the NLL term has no weight"
    return [
        *own(method, *({"nll_normalization": kind} for kind in ("sequence", "sum")), base=base),
        Refused({"nll_normalization": "sum", **(without or {})}, words, method),
    ]


SYNC = {
    "sync_ref_model": [
        # The reference moves after the second of three steps.
        Effect({"sync_ref_model": True, "ref_model_sync_steps": 2}, "losses weights", "first_loss order"),
        Refused(
            {"sync_ref_model": True, "reference_free": True, **NO_REFERENCE}, "sync_ref_model without effect"
        ),
        Refused({"sync_ref_model": True, "use_lora": True}, "sync_ref_model has no meaning with use_lora"),
        Refused({"sync_ref_model": True, "ref_model_name": "WORK/wide"}, "policy and reference differ in"),
    ],
    "ref_model_sync_steps": [
        Effect({"ref_model_sync_steps": 1}, "losses weights", "first_loss", base={"sync_ref_model": True}),
        Refused({"ref_model_sync_steps": 1}, "ref_model_sync_steps without effect"),
    ],
    "ref_model_mixup_alpha": [
        Effect(
            {"ref_model_mixup_alpha": 0.3},
            "losses weights",
            "first_loss",
            base={"sync_ref_model": True, "ref_model_sync_steps": 1},
        ),
        Refused({"ref_model_mixup_alpha": 0.3}, "ref_model_mixup_alpha without effect"),
    ],
}

OWN = {
    ("dpo", "beta"): own("dpo", {"beta": 0.5}),
    ("dpo", "loss_type"): [
        *own(
            "dpo", *({"loss_type": name} for name in LOSS_TYPES if name not in ("sigmoid", "robust", "aot"))
        ),
        *own("dpo", {"loss_type": "robust"}, base={"label_smoothing": 0.1}),
        # Whole completions order the gaps by length, for policy and reference alike; single tokens do not.
        *own(
            "dpo",
            {"loss_type": "aot"},
            base={"per_device_train_batch_size": 12, "max_completion_length": 1},
        ),
        Effect({"loss_type": ["sigmoid"]}, same=TRAINING),
        Refused({"loss_type": "sigmod"}, "expected one of sigmoid, hinge"),
        Refused({"loss_type": "sft"}, "has no preference loss"),
        Refused({"loss_type": ["hinge", "hinge"]}, "names a type twice"),
    ],
    ("dpo", "loss_weights"): [
        *own("dpo", {"loss_weights": [2.0, 0.5]}, base={"loss_type": ["sigmoid", "sft"]}),
        Refused({"loss_weights": [2.0]}, "loss_type is a single type"),
        Refused({"loss_weights": [2.0], "loss_type": ["hinge", "sft"]}, "give one for each"),
    ],
    ("dpo", "f_divergence_type"): [
        *own("dpo", *({"f_divergence_type": name} for name in ("forward_kl", "js", "alpha"))),
        Effect({"f_divergence_type": "js_divergence"}, same=TRAINING, base={"f_divergence_type": "js"}),
        Refused({"f_divergence_type": "js", "loss_type": "ipo"}, "f_divergence_type=js has no meaning"),
        Refused({"f_divergence_type": "js", "reference_free": True, **NO_REFERENCE}, "divergence from the"),
    ],
    ("dpo", "f_alpha_divergence_coef"): [
        *own("dpo", {"f_alpha_divergence_coef": 0.2}, base={"f_divergence_type": "alpha"}),
        Refused({"f_alpha_divergence_coef": 0.2}, "f_alpha_divergence_coef without effect"),
    ],
    ("dpo", "discopop_tau"): [
        *own("dpo", {"discopop_tau": 0.5}, base={"loss_type": "discopop"}),
        Refused({"discopop_tau": 0.5}, "discopop_tau without effect"),
    ],
    ("dpo", "ld_alpha"): [
        *own("dpo", {"ld_alpha": 0.0}, {"ld_alpha": 0.5}),
        Effect({"ld_alpha": 1.0}, same=TRAINING),
        Refused({"ld_alpha": 0.5, "loss_type": "ipo"}, "ld_alpha=0.5 has no meaning"),
    ],
    ("dpo", "use_weighting"): [
        *own("dpo", {"use_weighting": True}),
        Refused({"use_weighting": True, "loss_type": "aot"}, "use_weighting has no meaning"),
    ],
    ("dpo", "nll_normalization"): normalization("dpo", {"rpo_alpha": 1.0}),
    ("dpo", "label_smoothing"): [
        *smoothing("dpo", "hinge"),
        *own("dpo", {"label_smoothing": 0.2}, base={"loss_type": "ipo"}),
    ],
    ("dpo", "reference_free"): own(
        "dpo", {"reference_free": True, **NO_REFERENCE}, differs="first_loss reference"
    )
    + [
        Refused({"reference_free": True, **NO_REFERENCE, "loss_type": name}, "reference_free has no meaning")
        for name in ("aot", "apo_zero", "bco_pair", "nca_pair", "sppo_hard")
    ],
    ("dpo", "rpo_alpha"): own("dpo", {"rpo_alpha": 1.0}),
    ("ipo", "beta"): own("ipo", {"beta": 0.5}),
    ("ipo", "length_normalize"): own("ipo", {"length_normalize": False}),
    ("ipo", "label_smoothing"): own("ipo", {"label_smoothing": 0.2}),
    ("kto", "beta"): own("kto", {"beta": 0.5}),
    ("kto", "loss_type"): [
        *own("kto", {"loss_type": "apo_zero_unpaired"}, differs="weights"),
        Refused(
            {"loss_type": "apo_zero_unpaired", "use_ref_model": False, **NO_REFERENCE},
            "reference alone",
            "kto",
        ),
    ],
    ("kto", "desirable_weight"): own("kto", {"desirable_weight": 2.0}, {"desirable_weight": 0.0}),
    ("kto", "undesirable_weight"): [
        *own("kto", {"undesirable_weight": 2.0}, {"undesirable_weight": 0.0}),
        Refused({"desirable_weight": 0.0, "undesirable_weight": 0.0}, "leave no loss", "kto"),
    ],
    ("kto", "use_ref_model"): own(
        "kto", {"use_ref_model": False, **NO_REFERENCE}, differs="first_loss reference"
    ),
    ("cpo", "beta"): own("cpo", {"beta": 0.5}),
    ("cpo", "loss_type"): [
        *own("cpo", {"loss_type": "hinge"}, {"loss_type": "ipo"}),
        Refused({"loss_type": "simpo"}, "CPO-SimPO is --method simpo with cpo_alpha", "cpo"),
    ],
    ("cpo", "label_smoothing"): smoothing("cpo", "ipo"),
    ("cpo", "length_normalize"): [
        *own("cpo", {"length_normalize": False}, base={"loss_type": "ipo"}),
        Refused({"length_normalize": False}, "length_normalize=False has no effect", "cpo"),
    ],
    ("cpo", "cpo_alpha"): own("cpo", {"cpo_alpha": 0.0}),
    ("cpo", "nll_normalization"): normalization("cpo", {}, {"cpo_alpha": 0.0}),
    ("simpo", "beta"): own("simpo", {"beta": 5.0}),
    ("simpo", "gamma_beta_ratio"): own("simpo", {"gamma_beta_ratio": 0.0}),
    ("simpo", "loss_type"): [
        *own("simpo", {"loss_type": "hinge"}),
        Effect({"loss_type": "simpo"}, same=TRAINING, method="simpo"),
    ],
    ("simpo", "label_smoothing"): smoothing("simpo", "hinge"),
    ("simpo", "alpha"): [
        *own("simpo", {"alpha": 0.25}, {"alpha": -0.25}),
        Refused({"alpha": 0.25, "loss_type": "hinge"}, "alpha=0.25 has no meaning", "simpo"),
    ],
    ("simpo", "sft_weight"): own("simpo", {"sft_weight": 1.0}),
    ("simpo", "cpo_alpha"): [
        *own("simpo", {"cpo_alpha": 1.0}),
        Effect(
            {"sft_weight": 0.0, "cpo_alpha": 1.0}, same=TRAINING, base={"sft_weight": 1.0}, method="simpo"
        ),
        Refused({"cpo_alpha": 1.0, "sft_weight": 1.0}, "two names of one weight", "simpo"),
    ],
    ("simpo", "nll_normalization"): normalization("simpo", {"sft_weight": 1.0}),
}
