"""What each setting does: one or more entries for every field of every method; test_flags.py holds them.

An Effect is a run with the setting changed, held against a run without it; a Refused is an error.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.distributed.tiny import ds_config
from tests.flags_adapters import ADAPTERS
from tests.flags_checkpoints import CHECKPOINTS
from tests.flags_cleaning import CLEANING
from tests.flags_dialects import DIALECTS
from tests.flags_doctor import DOCTOR
from tests.flags_entries import ALIKE, EVALUATED, NO_REFERENCE, TRAINING, Effect, Refused
from tests.flags_faults import FAULTS
from tests.flags_methods import OWN, SYNC
from tests.flags_reference import CACHED
from tests.flags_rows import ROWS
from tests.flags_sources import SOURCES


def longest(part: slice) -> Callable[[dict], int]:
    return lambda run: max(len(ids) for row in run["tokens"] for ids in row[part])


def renamed(name: str, method: str = "dpo") -> list[Effect | Refused]:
    """With its column named, renamed data give the very run of the original; without, they are refused."""
    data = {"dataset_path": f"WORK/renamed_{name}.jsonl"}
    column = {f"dataset_{name}_field": f"my_{name}"}
    everything = "tokens losses weights"
    return [Effect(data | column, same=everything, method=method), Refused(data, f"'{name}'", method)]


def needs_reference(changes: dict) -> list[Refused]:
    words = f"{next(iter(changes))} without effect"
    return [Refused(changes, words, method) for method in ("cpo", "simpo")] + [
        Refused({**NO_REFERENCE, "reference_free": True, **changes}, words)
    ]


def read_by_kto_only(name: str) -> list[Effect | Refused]:
    words = f"dataset_{name}_field without effect"
    return [*renamed(name, "kto"), Refused({f"dataset_{name}_field": f"my_{name}"}, words)]


def kept_in(name: str | None) -> Callable[[dict], bool]:
    return lambda run: run["token_directory"] == name


CHAT_TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{{ eos_token }}{% endfor %}"

MODEL = {
    "model_name_or_path": [
        Effect({"model_name_or_path": "WORK/other"}, "first_loss weights"),
        Refused({"model_name_or_path": None}, "model_name_or_path is missing"),
        Refused({"model_name_or_path": "WORK/nowhere"}, "no such directory"),
    ],
    "ref_model_name": [
        Effect({"ref_model_name": "WORK/other"}, "first_loss weights"),
        *needs_reference({"ref_model_name": "WORK/other"}),
    ],
    "tokenizer_name": [
        Effect({"tokenizer_name": "WORK/swapped"}, "tokens first_loss"),
        Refused({"tokenizer_name": "WORK/used"}, "--tokenizer_name"),
    ],
    "trust_remote_code": [
        Refused({"model_name_or_path": "WORK/remote"}, "no usable model config"),
        Effect({"model_name_or_path": "WORK/remote", "trust_remote_code": True}, "layout", "tokens"),
    ],
    "dtype": [
        Effect(
            {"dtype": "bfloat16"},
            "policy_ds reference_ds weights_dtype losses",
            holds=lambda run: run["weights_dtype"] == ["torch.bfloat16"],
        ),
        Effect({"dtype": "float32"}, same="weights policy_ds"),
    ],
    "attn_implementation": [
        Effect({"attn_implementation": "sdpa"}, "layout attention", ALIKE),
        Effect({"attn_implementation": "eager"}, "layout attention", ALIKE),
        Effect({"attn_implementation": "packed"}, same="layout weights"),
        Refused(
            {
                "attn_implementation": "packed",
                "model_name_or_path": "WORK/remote",
                "trust_remote_code": True,
            },
            "attn_implementation='packed' is not possible",
        ),
    ],
    "gradient_checkpointing": [Effect({"gradient_checkpointing": True}, "layer_calls", ALIKE)],
    "disable_dropout": [
        Effect({"disable_dropout": False}, "first_loss", base={"model_name_or_path": "WORK/dropout"}),
        Effect({"model_name_or_path": "WORK/dropout"}, same=ALIKE),
    ],
}

DATA = {
    "dataset_path": [
        Effect({"dataset_path": "WORK/heldout.jsonl"}, "train_rows tokens"),
        Refused({"dataset_path": None}, "dataset_path is missing"),
    ],
    "eval_dataset_path": [Effect(EVALUATED, "evaluations eval_batches eval_set", TRAINING)],
    "eval_fraction": [
        Effect(
            {"eval_fraction": 0.25},
            "evaluations eval_batches tokens",
            holds=lambda run: run["train_rows"] == 9 and run["eval_set"] == "held_out",
        ),
        Effect(
            {"eval_fraction": 0.25},
            same=TRAINING,
            base={"dataset_path": "WORK/split.json"},
            holds=lambda run: run["eval_set"] == "split" and "eval_fraction=0.25" in run["printed"],
        ),
        Refused({"eval_fraction": 0.25, **EVALUATED}, "eval_fraction=0.25 has no effect"),
    ],
    "chat_template": [
        Effect(
            {"chat_template": CHAT_TEMPLATE}, "tokens first_loss", base={"dataset_path": "WORK/chats.jsonl"}
        ),
        Refused({"chat_template": "WORK/nowhere.jinja"}, "chat_template="),
    ],
    "dataset_prompt_field": renamed("prompt"),
    "dataset_chosen_field": renamed("chosen"),
    "dataset_rejected_field": renamed("rejected"),
    "dataset_completion_field": read_by_kto_only("completion"),
    "dataset_label_field": read_by_kto_only("label"),
    "max_length": [
        Effect({"max_length": 12}, "tokens losses", holds=lambda run: longest(slice(1, 3))(run) == 12 - 6)
    ],
    "max_prompt_length": [
        Effect({"max_prompt_length": 3}, "tokens losses", holds=lambda run: longest(slice(0, 1))(run) == 3)
    ],
    "max_completion_length": [
        Effect(
            {"max_completion_length": 5}, "tokens losses", holds=lambda run: longest(slice(1, 3))(run) == 5
        )
    ],
    "truncation_side": [
        Effect({"truncation_side": "right"}, "tokens losses", base={"max_prompt_length": 3}),
    ],
    "on_bad_rows": [
        Refused({"dataset_path": "WORK/bad.jsonl"}, "1 of 13 rows cannot be used"),
        Effect(
            {"dataset_path": "WORK/bad.jsonl", "on_bad_rows": "skip", "max_bad_fraction": 0.1},
            same="tokens weights",
            holds=lambda run: "1 of 13 rows were left out" in run["printed"],
        ),
    ],
    "max_bad_fraction": [
        Refused({"dataset_path": "WORK/bad.jsonl", "on_bad_rows": "skip"}, "max_bad_fraction=0.01"),
        Refused({"max_bad_fraction": 0.1}, "max_bad_fraction=0.1 has no effect"),
    ],
    **CLEANING,
    "dataset_num_proc": [
        Effect(
            {"dataset_num_proc": 2},
            "tokenizing_processes",
            "tokens weights",
            base={"dataset_path": "WORK/many.jsonl", "dataset_cache_dir": "none"},
            holds=lambda run: run["tokenizing_processes"] == 2,
        ),
        Refused({"dataset_num_proc": 0}, "dataset_num_proc"),
    ],
    "dataset_cache_dir": [
        Effect({"dataset_cache_dir": directory}, "token_directory", f"tokens {TRAINING}", holds=kept_in(name))
        for directory, name in (("WORK/my-tokens", "my-tokens"), ("none", None))
    ],
}

BATCH = {
    "per_device_train_batch_size": [
        Effect({"per_device_train_batch_size": 6}, "global_batch order epochs losses policy_ds")
    ],
    "gradient_accumulation_steps": [
        Effect({"gradient_accumulation_steps": 2}, "global_batch order epochs losses policy_ds"),
    ]
    + [
        Effect(
            {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
            "policy_ds",
            f"global_batch order {TRAINING}",
            base={"ds_config": ds_config(stage)},
        )
        for stage in (0, 1, 3)
    ],
    "per_device_eval_batch_size": [
        Effect(
            {"per_device_eval_batch_size": 2},
            "eval_batches",
            f"eval_losses {TRAINING}",
            base=EVALUATED,
            holds=lambda run: run["eval_batches"] == 3,
        )
    ],
    "pack_max_tokens": [
        Effect(
            {"pack_max_tokens": 40, "ref_batch_tokens": 16384}, "micro_batches", f"reference_packs {ALIKE}"
        )
    ],
    "ref_batch_tokens": [
        Effect({"ref_batch_tokens": 40}, "reference_packs", f"micro_batches {ALIKE}"),
        *needs_reference({"ref_batch_tokens": 40}),
    ],
    "group_by_prompt": [
        Effect(
            {"group_by_prompt": True},
            "order step_tokens losses weights",
            base={"dataset_path": "WORK/ranked.jsonl"},
            # Three prompts of four rows each, in batches of four: a prompt a step.
            holds=lambda run: all(len({row % 3 for row in rows}) == 1 for rows in run["order"]),
        ),
        Effect(
            {"group_by_prompt": True},
            same="order weights",
            holds=lambda run: "no two of the 12 rows have the same prompt" in run["printed"],
        ),
        Refused(
            {"group_by_prompt": True, "train_sampling_strategy": "sequential"},
            "group_by_prompt has no meaning",
        ),
    ],
    "prefix_sharing": [Effect({"prefix_sharing": False}, "layout step_tokens", ALIKE)],
    "train_sampling_strategy": [
        Effect(
            {"train_sampling_strategy": "sequential"},
            "order first_loss weights",
            holds=lambda run: (
                [sorted(rows) for rows in run["order"]]
                == [list(range(start, start + 4)) for start in (0, 4, 8)]
            ),
        )
    ],
}


def rates(*shares: float) -> Callable[[dict], bool]:
    """Whether the learning rates are these shares of the peak."""
    return lambda run: run["learning_rates"] == pytest.approx([1e-3 * share for share in shares])


OPTIMISATION = {
    "max_steps": [Effect({"max_steps": 2}, "num_steps logged_steps learning_rates weights", "first_loss")],
    "num_train_epochs": [
        Effect(
            {"num_train_epochs": epochs},
            "num_steps weights learning_rates",
            base={"max_steps": None},
            # 12 rows in batches of 4 are 3 steps an epoch; half an epoch is 1.5 steps, rounded up.
            holds=lambda run, steps=steps: run["num_steps"] == steps,
        )
        for epochs, steps in ((2.0, 6), (0.5, 2))
    ],
    "learning_rate_override": [
        Effect(
            {"learning_rate_override": True},
            "printed",
            TRAINING,
            holds=lambda run: "learning_rate=" not in run["printed"],
        )
    ],
    "learning_rate": [Effect({"learning_rate": 5e-4}, "learning_rates weights policy_ds", "first_loss")],
    "lr_scheduler_type": [
        # linear: 1, 2/3, 1/3; cosine: (1 + cos(pi k / 3)) / 2 for k = 0, 1, 2.
        Effect({"lr_scheduler_type": "linear"}, same="weights", holds=rates(1, 2 / 3, 1 / 3)),
        Effect({"lr_scheduler_type": "cosine"}, "weights", "first_loss", holds=rates(1, 0.75, 0.25)),
        Effect({"lr_scheduler_type": "constant"}, "weights", "first_loss", holds=rates(1, 1, 1)),
    ],
    "warmup_ratio": [Effect({"warmup_ratio": 0.5}, "weights", "first_loss", holds=rates(0, 0.5, 1))],
    "warmup_steps": [
        Effect({"warmup_steps": 1}, "weights", "first_loss", holds=rates(0, 1, 0.5)),
        Refused({"warmup_steps": 1, "warmup_ratio": 0.5}, "both say how long the warm-up is"),
    ],
    "optim": [
        Effect({"optim": "adamw_torch_fused"}, "optimizer policy_ds", ALIKE),
        Effect({"optim": "sgd"}, "optimizer policy_ds weights", "first_loss"),
        Refused({"optim": "deepspeed_cpu_adam"}, "optim=deepspeed_cpu_adam needs"),
    ],
    "adam_beta1": [Effect({"adam_beta1": 0.5}, "optimizer weights policy_ds", "first_loss")],
    "adam_beta2": [Effect({"adam_beta2": 0.9}, "optimizer weights policy_ds", "first_loss")],
    "adam_epsilon": [Effect({"adam_epsilon": 0.1}, "optimizer weights policy_ds", "first_loss")],
    "weight_decay": [
        Effect({"weight_decay": 0.5}, "optimizer weights policy_ds", "first_loss"),
        Effect({"weight_decay": 0.5}, "optimizer weights", "first_loss", base={"optim": "sgd"}),
    ],
    "max_grad_norm": [
        Effect({"max_grad_norm": limit}, "weights", "first_grad_norm", base={"optim": "sgd"})
        for limit in (0.1, 0.0)
    ]
    # At stage 0 DeepSpeed clips in another place.
    + [
        Effect(
            {"max_grad_norm": limit},
            "weights",
            "first_grad_norm",
            base={"optim": "sgd", "ds_config": ds_config(0)},
        )
        for limit in (0.1, 0.0)
    ],
    "seed": [Effect({"seed": 7}, "order first_loss weights")],
    "router_aux_loss_coef": [
        Effect(
            {"router_aux_loss_coef": 1.0},
            "first_loss weights",
            "order",
            base={"model_name_or_path": "WORK/experts", "ref_model_name": None},
        ),
        Refused({"router_aux_loss_coef": 1.0}, "not a mixture of experts"),
    ],
}
OPTIMISATION["adam_beta1"] += [
    Refused({"optim": "sgd", name: value}, f"{name}: optim=sgd has no such values")
    for name, value in (("adam_beta1", 0.5), ("adam_beta2", 0.9), ("adam_epsilon", 0.1))
]

OUTPUT = {
    "output_dir": [Effect({"output_dir": "WORK/elsewhere"}, "output_dir", f"files {TRAINING}")],
    "overwrite_output_dir": [
        Refused({"output_dir": "WORK/used"}, "already holds a run"),
        Effect({"output_dir": "WORK/used", "overwrite_output_dir": True}, "output_dir", f"files {TRAINING}"),
    ],
    "run_name": [Effect({"run_name": "blue"}, "run_name", TRAINING)],
    "logging_steps": [
        Effect({"logging_steps": 3}, "losses", "weights", holds=lambda run: run["logged_steps"] == [1, 3])
    ],
    "eval_steps": [
        Effect(
            {"eval_steps": 2},
            "evaluations",
            TRAINING,
            EVALUATED,
            holds=lambda run: run["evaluations"] == [2, 3],
        ),
        # Without evaluation data the training rows are used, and it is said.
        Effect(
            {"eval_steps": 2},
            "evaluations",
            TRAINING,
            holds=lambda run: run["eval_set"] == "train" and "no evaluation data" in run["printed"],
        ),
    ],
    "eval_on_start": [
        Effect(
            {"eval_on_start": True},
            "evaluations",
            TRAINING,
            base=base,
            holds=lambda run: run["evaluations"] == [0, 3],
        )
        for base in (EVALUATED, {})
    ],
    "max_shard_size": [Effect({"max_shard_size": "10KB"}, "files", "weights")],
}

SYSTEM = {
    "ds_config": [
        Effect({"ds_config": stage}, "zero_stage policy_ds", ALIKE)
        for stage in ("zero3", ds_config(3), ds_config(2), ds_config(0))
    ],
    "ref_ds_config": [
        Effect({"ref_ds_config": ds_config(3)}, "reference_ds", ALIKE),
        *needs_reference({"ref_ds_config": ds_config(3)}),
    ],
    "logits_budget_mb": [
        Effect(
            {"logits_budget_mb": 0},
            "kept_logits",
            "losses grad_norms weights",
            holds=lambda run: run["kept_logits"] == 0,
        ),
        Effect({"logits_budget_mb": 1000}, same="kept_logits losses weights"),
    ],
    "dry_run": [
        Effect(
            {"dry_run": True},
            "status losses weights",
            "order layout",
            holds=lambda run: not run["files"] and "first step: 4 preferences" in run["printed"],
        )
    ],
    "debug": [],  # test_debug_shows_the_traceback
}


SHARED_FIELDS = MODEL | ADAPTERS | SYNC | CACHED | DATA | SOURCES | ROWS | DIALECTS | BATCH
SHARED_FIELDS |= OPTIMISATION | OUTPUT | CHECKPOINTS | SYSTEM | DOCTOR | FAULTS


def every_entry() -> list[tuple[str, Effect | Refused]]:
    """(name, entry): the name is the field's, with its method where it is the method's own."""
    named = {**SHARED_FIELDS, **{f"{method}.{name}": entries for (method, name), entries in OWN.items()}}
    return [(name, entry) for name, entries in named.items() for entry in entries]
