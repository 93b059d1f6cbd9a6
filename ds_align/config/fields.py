"""The fields that every method shares, one class a theme; each field has one owner.

A description says what the field does; its type carries the range. Names are those of Hugging Face
TrainingArguments and TRL wherever the meaning is the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ds_align.config.schema import (
    Count,
    Expects,
    FieldName,
    NonNegativeCount,
    NonNegativeNumber,
    PathText,
    PositiveNumber,
    Schema,
    Share,
    ShareBelowOne,
    changed,
    rule,
)

Precision = Literal["float32", "bfloat16", "float16"]
NllNormalization = Literal["token", "sequence", "sum"]
BETA = "Strength of the pull towards the reference: the reward is beta times the log-ratio in nats."
NLL_NORMALIZATION = (
    "The NLL term is the mean per chosen token of the global batch (token, as usual in practice), the mean "
    "over pairs of each completion's mean per token (sequence), or of its sum (sum, as in the CPO paper)."
)
ShardSize = Annotated[
    str, Field(pattern=r"^[1-9]\d*(\.\d+)?\s?[KMGT]i?B$"), Expects("a size such as 500MB or 5GB")
]


class ModelFields(Schema):
    """Which models are trained and compared with."""

    group: ClassVar[str] = "Model"

    model_name_or_path: PathText | None = Field(
        None, description="The policy at the start: a Hugging Face directory or Hub id. Alias: --model_name."
    )
    ref_model_name: PathText | None = Field(
        None, description="The reference model, where it is not the policy at the start."
    )
    tokenizer_name: PathText | None = Field(
        None, description="The tokenizer, where it is not the model's own."
    )
    trust_remote_code: bool = Field(
        False, description="Run model and tokenizer code that comes with the weights."
    )
    dtype: Precision | None = Field(
        None,
        description="Precision of the model: none means float32 on CPU and bfloat16 on GPU. "
        "Aliases: --torch_dtype, --bf16, --fp16.",
    )
    attn_implementation: Literal["auto", "packed", "sdpa", "eager"] = Field(
        "auto",
        description="auto: packed rows where the architecture allows them, else padded rows with sdpa; "
        "packed: packed rows or an error; sdpa, eager: padded rows with that attention.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute activations again in the backward pass instead of keeping them."
    )
    disable_dropout: bool = Field(True, description="Set every dropout in the model to 0.")


class DataFields(Schema):
    """Where preferences come from and how they are cut."""

    group: ClassVar[str] = "Data"

    dataset_path: PathText | None = Field(
        None,
        description="The training preferences: a file, a directory, or org/name of the Hub. Alias: "
        "--dataset_name.",
    )
    eval_dataset_path: PathText | None = Field(None, description="The preferences that evaluation uses.")
    eval_fraction: ShareBelowOne = Field(
        0.0, description="Share of the training rows that is held out for evaluation."
    )
    chat_template: PathText | None = Field(
        None, description="A chat template, as a file or as Jinja text, instead of the tokenizer's own."
    )
    dataset_prompt_field: FieldName = Field(
        "prompt", description="Column of the prompt. Alias: --dataset_text_field."
    )
    dataset_chosen_field: FieldName = Field("chosen", description="Column of the chosen completion.")
    dataset_rejected_field: FieldName = Field("rejected", description="Column of the rejected completion.")
    dataset_completion_field: FieldName = Field("completion", description="Column of an unpaired completion.")
    dataset_label_field: FieldName = Field("label", description="Column that says whether it is desirable.")
    max_length: Annotated[int, Field(ge=2)] = Field(
        1024, description="Most tokens of prompt and completion together. Alias: --max_seq_length."
    )
    max_prompt_length: Count | None = Field(
        None, description="Most tokens of the prompt; none: no own limit."
    )
    max_completion_length: Count | None = Field(
        None, description="Most tokens of the completion; none: no own limit."
    )
    truncation_side: Annotated[Literal["left", "right"], Expects("left (keep_end) or right (keep_start)")] = (
        Field(
            "left",
            description="The side on which a prompt that is too long is cut. Alias: --truncation_mode, also "
            "with keep_end (left) and keep_start (right).",
        )
    )
    on_bad_rows: Literal["error", "skip"] = Field(
        "error", description="error: stop at rows that cannot be read; skip: leave them out and count them."
    )
    max_bad_fraction: Share = Field(0.01, description="Largest share of bad rows that skip accepts.")
    dataset_num_proc: Count | Literal["auto"] = Field(
        "auto",
        description="Processes that tokenize; auto: one below 20000 rows, else a core each. The result is "
        "the same.",
    )
    dataset_cache_dir: PathText | None = Field(
        "auto",
        description="Directory of tokenized data by their content; auto: `tokens` in $DS_ALIGN_CACHE or "
        "~/.cache/ds_align; none: tokenize at each start.",
    )

    # Whether the method reads single completions with a label beside pairs.
    reads_unpaired: ClassVar[bool] = False

    @rule("on_bad_rows", "max_bad_fraction")
    def _a_cap_needs_skip(self) -> str | None:
        if self.on_bad_rows == "error" and changed(self, "max_bad_fraction"):
            return f"max_bad_fraction={self.max_bad_fraction:g} has no effect without on_bad_rows=skip"
        return None

    @rule("dataset_completion_field", "dataset_label_field")
    def _unpaired_columns_need_unpaired_data(self) -> str | None:
        names = changed(self, "dataset_completion_field", "dataset_label_field")
        if names and not self.reads_unpaired:
            return f"{', '.join(names)} without effect: this method trains on pairs; leave out"
        return None


class BatchFields(Schema):
    """How preferences are grouped into optimizer steps and packs."""

    group: ClassVar[str] = "Batch"

    per_device_train_batch_size: Count = Field(
        8,
        description="Preferences per device and accumulation step; the global batch is this times "
        "gradient_accumulation_steps times the number of devices.",
    )
    gradient_accumulation_steps: Count = Field(1, description="Factor of the global batch; see above.")
    per_device_eval_batch_size: Count = Field(8, description="Preferences per device and evaluation batch.")
    pack_max_tokens: Count | Literal["auto"] = Field(
        "auto",
        description="Most tokens of one pack (a micro-batch), padding of padded rows included; auto: 512 "
        "on CPU (1024 for the preferences of one prompt), 16384 on GPU. A larger preference has its own.",
    )
    ref_batch_tokens: Count | Literal["auto"] = Field(
        "auto", description="Most tokens of one pack of the reference, which may be far larger."
    )
    prefix_sharing: bool = Field(True, description="Compute a prompt once for all of its completions.")
    train_sampling_strategy: Literal["random", "sequential"] = Field(
        "random", description="random: a new order each epoch; sequential: the order of the file."
    )
    group_by_prompt: bool = Field(
        False,
        description="Put the rows of one prompt into one optimizer step, as far as it holds them, so that "
        "the prompt and completions that return are computed once; the order of the prompts stays random.",
    )

    @rule("group_by_prompt", "train_sampling_strategy")
    def _grouping_needs_an_order_to_choose(self) -> str | None:
        if self.group_by_prompt and self.train_sampling_strategy == "sequential":
            return (
                "group_by_prompt has no meaning with train_sampling_strategy=sequential, which keeps the "
                "order of the file; leave one of the two out"
            )
        return None


class OptimisationFields(Schema):
    """How long, how fast and with which optimizer the policy learns."""

    group: ClassVar[str] = "Optimisation"

    max_steps: Count | None = Field(None, description="Optimizer steps; wins over num_train_epochs.")
    num_train_epochs: PositiveNumber = Field(1.0, description="Passes over the training preferences.")
    learning_rate: NonNegativeNumber = Field(5e-7, description="Peak learning rate.")
    learning_rate_override: bool = Field(
        False, description="Say nothing about a learning rate outside of the usual range."
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="Shape of the learning rate after the warm-up."
    )
    warmup_ratio: Share = Field(
        0.0, description="Share of the steps in which the learning rate rises from 0."
    )
    warmup_steps: NonNegativeCount = Field(0, description="Steps in which the learning rate rises from 0.")
    optim: Literal["adamw_torch", "adamw_torch_fused", "sgd", "deepspeed_cpu_adam"] = Field(
        "adamw_torch", description="The optimizer; deepspeed_cpu_adam needs offload_optimizer."
    )
    adam_beta1: ShareBelowOne = Field(0.9, description="AdamW: decay of the mean of the gradients.")
    adam_beta2: ShareBelowOne = Field(0.999, description="AdamW: decay of the mean of their squares.")
    adam_epsilon: PositiveNumber = Field(1e-8, description="AdamW: added to the denominator.")
    weight_decay: NonNegativeNumber = Field(0.0, description="Weight decay of every trained parameter.")
    max_grad_norm: NonNegativeNumber = Field(1.0, description="Largest norm of the gradient; 0: no clipping.")
    router_aux_loss_coef: NonNegativeNumber = Field(
        0.0, description="Weight of the load-balancing loss of a mixture-of-experts model."
    )
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = Field(42, description="Seed of every random choice.")

    @rule("warmup_ratio", "warmup_steps")
    def _one_warmup(self) -> str | None:
        if self.warmup_ratio and self.warmup_steps:
            given = f"warmup_ratio={self.warmup_ratio} and warmup_steps={self.warmup_steps}"
            return f"{given} both say how long the warm-up is; set one to 0"
        return None

    @rule("optim", "adam_beta1", "adam_beta2", "adam_epsilon")
    def _adam_values_need_adam(self) -> str | None:
        names = changed(self, "adam_beta1", "adam_beta2", "adam_epsilon")
        if self.optim == "sgd" and names:
            return f"{', '.join(names)}: optim=sgd has no such values; leave out or change optim"
        return None


class AdapterFields(Schema):
    """Whether low-rank adapters are trained instead of the model's weights."""

    group: ClassVar[str] = "Adapters"

    use_lora: bool = Field(
        False,
        description="Train LoRA adapters (arXiv:2106.09685) and no other weight; the reference is the policy "
        "with its adapters off. A model directory that holds an adapter is trained on without it, too.",
    )
    lora_r: Count = Field(16, description="LoRA: rank of the adapters.")
    lora_alpha: PositiveNumber = Field(32, description="LoRA: the update is scaled by lora_alpha / lora_r.")
    lora_dropout: ShareBelowOne = Field(
        0.1,
        description="LoRA: dropout before the adapters, of the policy in training alone; disable_dropout "
        "does not touch it. An adapter directory keeps its own where this is 0.1.",
    )
    lora_target_modules: list[str] | None = Field(
        None,
        description="LoRA: names of the layers that get adapters; none: every linear layer but the head.",
    )

    @property
    def trains_adapters(self) -> bool:
        """Whether adapters are trained: new ones, or those of a model directory that holds an adapter."""
        model = getattr(self, "model_name_or_path", None)
        return self.use_lora or (model is not None and (Path(model) / "adapter_config.json").is_file())

    @rule("use_lora", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
    def _adapter_settings_need_adapters(self) -> str | None:
        names = changed(self, "lora_r", "lora_alpha", "lora_target_modules")
        if not self.trains_adapters:
            names += changed(self, "lora_dropout")
        if names and not self.use_lora:
            return f"{', '.join(names)} without effect: use_lora is false; set it or leave them out"
        return None


class EvaluationFields(Schema):
    """What is measured, written and kept."""

    group: ClassVar[str] = "Evaluation and output"

    output_dir: PathText | None = Field(
        None,
        description="Directory of the model and the metrics; none: runs/<method>-<model>. "
        "Alias: --save_directory.",
    )
    overwrite_output_dir: bool = Field(False, description="Allow an output_dir that already holds a run.")
    run_name: str | None = Field(None, description="Name of the run in its summary.")
    logging_steps: Count = Field(10, description="Optimizer steps between two logged rows.")
    eval_steps: Count | None = Field(
        None, description="Optimizer steps between two evaluations; none: at the end."
    )
    eval_on_start: bool = Field(False, description="Evaluate before the first step.")
    max_shard_size: ShardSize = Field("5GB", description="Largest file of the saved weights.")


class CheckpointFields(Schema):
    """When the state of a run is written, and whether one is continued."""

    group: ClassVar[str] = "Checkpoints"

    save_steps: Count | None = Field(
        None, description="Optimizer steps between two checkpoints; none: no checkpoint."
    )
    save_total_limit: Count | None = Field(
        None, description="How many checkpoints are kept, the newest ones; none: all."
    )
    resume: PathText | None = Field(
        None,
        description="auto: continue from the newest whole checkpoint of output_dir, or start where there is "
        "none; a checkpoint's directory: continue from it; none: start afresh. `--resume` alone and true are "
        "auto. "
        "Alias: --resume_from_checkpoint.",
    )

    @rule("save_steps", "save_total_limit")
    def _a_limit_needs_checkpoints(self) -> str | None:
        if self.save_total_limit is not None and self.save_steps is None:
            return f"save_total_limit={self.save_total_limit} without effect: save_steps is none; set it"
        return None


class SystemFields(Schema):
    """How the run uses the machine."""

    group: ClassVar[str] = "System"

    ds_config: PathText | dict[str, Any] = Field(
        "zero3",
        description="DeepSpeed settings of the policy: a JSON file or the name of a shipped one (zero0, "
        "zero1, zero2, zero3, zero3_offload).",
    )
    ref_ds_config: PathText | dict[str, Any] | None = Field(
        None,
        description="DeepSpeed settings of the reference: a JSON file or the name of a shipped one "
        "(zero_inference, zero_inference_nvme); none: zero_inference.",
    )
    logits_budget_mb: NonNegativeCount = Field(
        256,
        description="Memory in MB for logits that a trained head keeps for its backward, which then need not "
        "be computed again; 0: one tile only. The results are the same.",
    )
    dry_run: bool = Field(False, description="Check everything and show the plan; train nothing.")
    debug: bool = Field(False, description="Show the traceback of an error.")
