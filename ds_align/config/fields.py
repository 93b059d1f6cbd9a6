"""The fields that every method shares, one class a theme; each field has one owner.

A description says what the field does; its type carries the range. Names are those of Hugging Face
TrainingArguments and TRL wherever the meaning is the same.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from ds_align.config.schema import (
    Count,
    Expects,
    FieldName,
    NonNegativeCount,
    NonNegativeNumber,
    PathText,
    PositiveNumber,
    Problem,
    Schema,
    Share,
    ShareBelowOne,
    changed,
    rule,
)

Precision = Literal["float32", "bfloat16", "float16"]
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
        None, description="The training preferences. Alias: --dataset_name."
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
    truncation_side: Literal["left", "right"] = Field(
        "left", description="The side on which a prompt that is too long is cut."
    )
    on_bad_rows: Literal["error", "skip"] = Field(
        "error", description="error: stop at rows that cannot be read; skip: leave them out and count them."
    )
    max_bad_fraction: Share = Field(0.01, description="Largest share of bad rows that skip accepts.")

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
        description="Most tokens of one pack (a micro-batch); auto: at least the largest prompt group.",
    )
    ref_batch_tokens: Count | Literal["auto"] = Field(
        "auto", description="Most tokens of one pack of the reference, which may be far larger."
    )
    prefix_sharing: bool = Field(True, description="Compute a prompt once for all of its completions.")
    train_sampling_strategy: Literal["random", "sequential"] = Field(
        "random", description="random: a new order each epoch; sequential: the order of the file."
    )


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
    dry_run: bool = Field(False, description="Check everything and show the plan; train nothing.")
    debug: bool = Field(False, description="Show the traceback of an error.")


class BaseConfig(SystemFields, EvaluationFields, OptimisationFields, BatchFields, DataFields, ModelFields):
    """Settings of one run, without those of a method; subclasses add the loss's parameters.

    Fields are keyword arguments of the constructor, keys of a YAML file and flags of the command line.
    Raises ConfigError (with every problem at once) for an unknown key, a wrong type, a value out of
    range or a combination without meaning, at construction and at every assignment.
    """

    method: ClassVar[str] = ""
    usual_beta: ClassVar[tuple[float, float]] = (0.0, float("inf"))

    aliases: ClassVar[Mapping[str, str]] = {
        "model_name": "model_name_or_path",
        "dataset_name": "dataset_path",
        "dataset_text_field": "dataset_prompt_field",
        "max_seq_length": "max_length",
        "save_directory": "output_dir",
        "torch_dtype": "dtype",
        "bf16": "dtype",
        "fp16": "dtype",
    }

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference model."""
        return False

    @property
    def resolved_output_dir(self) -> str:
        """output_dir, or `runs/<method>-<last part of the model's name>` where it is not given."""
        if self.output_dir is not None:
            return self.output_dir
        model = posixpath.basename((self.model_name_or_path or "demo").replace("\\", "/").rstrip("/"))
        return posixpath.join("runs", f"{self.method}-{model}")

    def resolved_dtype(self, device: str) -> Precision:
        """Return dtype, or the default of the device: float32 on "cpu", bfloat16 elsewhere.

        A ds_config that turns bf16 or fp16 on decides where dtype is none; resolved_precision tells that.
        """
        return self.dtype or ("float32" if device == "cpu" else "bfloat16")

    def warnings(self) -> list[str]:
        """Return a message for each value that is legal but unwise; no value is ever changed."""
        from ds_align.config.advice import unwise_settings

        return unwise_settings(self)

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> Self:
        """Read a YAML file of this class's fields; `overrides` win over the file. Raises ConfigError."""
        from ds_align.config.load import read_config

        return read_config(cls, path, overrides)

    def to_yaml(self, path: str | Path) -> None:
        """Write every field, and the method, so that from_yaml or --config gives an equal configuration."""
        from ds_align.config.load import write_yaml

        write_yaml(self, path)

    @classmethod
    def known_keys(cls) -> list[str]:
        """Return every key that may be given: the fields, their aliases and `method`."""
        return [*super().known_keys(), "method"]

    @classmethod
    def normalise(cls, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str], list[Problem]]:
        """Replace aliases by their fields; `method` may be given where it says what the class says."""
        rest = dict(values)
        problems = []
        method = rest.pop("method", cls.method)
        if method != cls.method:
            message = (
                f"method={method!r} is read only: {cls.__name__} is for {cls.method!r}; use the other class"
            )
            problems.append(Problem(("method",), message))
        problems += merge_precision(rest)
        by_field, spelled, more = super().normalise(rest)
        if "dtype" not in values:
            given = next((key for key in ("torch_dtype", "bf16", "fp16") if key in values), "dtype")
            spelled.update({"dtype": given} if "dtype" in by_field else {})
        return by_field, spelled, problems + more

    @classmethod
    def explain_unknown(cls, key: str, also: Iterable[str] = ()) -> str:
        """Return the message for a key that is no field here; names the methods that do have it."""
        owners = [other.method for other in BaseConfig.__subclasses__() if key in other.model_fields]
        if owners:
            return f"{key!r} is a setting of {', '.join(owners)}, not of {cls.method}"
        return super().explain_unknown(key, also)

    @rule("eval_fraction", "eval_dataset_path")
    def _one_evaluation_set(self) -> str | None:
        if self.eval_fraction and self.eval_dataset_path is not None:
            return (
                f"eval_fraction={self.eval_fraction} has no effect beside eval_dataset_path="
                f"{self.eval_dataset_path!r}; give one of the two"
            )
        return None

    @rule("ref_model_name", "ref_ds_config", "ref_batch_tokens")
    def _reference_settings_need_a_reference(self) -> str | None:
        names = changed(self, "ref_model_name", "ref_ds_config", "ref_batch_tokens")
        if names and not self.needs_reference:
            return (
                f"{', '.join(names)} without effect: this {self.method} run has no reference model; leave out"
            )
        return None


def merge_precision(values: dict[str, Any]) -> list[Problem]:
    """Turn dtype, torch_dtype, bf16 and fp16 in `values` into one `dtype`, and return their disagreements.

    `bf16: false` alone asks for float32, because the default on a GPU would be bfloat16; `fp16: false`
    alone asks for nothing, because float16 is no default.
    """
    names = {"bf16": "bfloat16", "fp16": "float16"}
    keys = [key for key in ("dtype", "torch_dtype", "bf16", "fp16") if key in values]
    given = {key: values.pop(key) for key in keys}
    problems = [
        Problem((key,), f"{key}={given[key]!r} is not valid; expected true or false")
        for key in names
        if key in given and not isinstance(given[key], bool)
    ]
    wanted = {
        key: names.get(key) or str(value).removeprefix("torch.")
        for key, value in given.items()
        if value is not None and not (key in names and value is not True)
    }
    denied = {key: names[key] for key in names if given.get(key) is False}
    clash = [key for key, name in denied.items() if name in wanted.values()]
    if len(set(wanted.values())) > 1 or clash:
        said = ", ".join(f"{key}={given[key]}" for key in [*wanted, *clash])
        problems.append(Problem((*wanted, *clash), f"{said} disagree about the precision; give one"))
    elif wanted:
        values["dtype"] = next(iter(wanted.values()))
    elif "bf16" in denied:
        values["dtype"] = "float32"
    elif "dtype" in given:
        values["dtype"] = given["dtype"]
    return problems
