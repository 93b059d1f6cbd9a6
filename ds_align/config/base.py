"""The settings of a run as one flat configuration: every theme of fields, its aliases and its files."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from ds_align.config.cleaning import CleaningFields
from ds_align.config.dialects import DialectFields
from ds_align.config.doctor import DoctorFields
from ds_align.config.fields import (
    AdapterFields,
    BatchFields,
    CheckpointFields,
    DataFields,
    EvaluationFields,
    ModelFields,
    OptimisationFields,
    Precision,
    SystemFields,
)
from ds_align.config.reference import ReferenceFields
from ds_align.config.rows import RowFields
from ds_align.config.schema import Problem, changed, nearest, rule
from ds_align.config.sources import SourceFields
from ds_align.config.survival import SurvivalFields

_REFERENCE_SETTINGS = (
    "ref_model_name",
    "ref_ds_config",
    "ref_batch_tokens",
    "ref_logps",
    "ref_load_in_8bit",
    "ref_load_in_4bit",
    "sync_ref_model",
)
# What is kept of a prompt, and the side that is cut for it.
_TRUNCATION_MODES = {"keep_end": "left", "keep_start": "right"}
# As other trainers write it.
_RESUME = {"true": "auto", "false": None}


class BaseConfig(
    SystemFields,
    DoctorFields,
    SurvivalFields,
    CheckpointFields,
    EvaluationFields,
    ReferenceFields,
    AdapterFields,
    OptimisationFields,
    BatchFields,
    RowFields,
    CleaningFields,
    SourceFields,
    DialectFields,
    DataFields,
    ModelFields,
):
    """Settings of one run, without those of a method; subclasses add the loss's parameters.

    Fields are keyword arguments of the constructor, keys of a YAML file and flags of the command line.
    Raises ConfigError (with every problem at once) for an unknown key, a wrong type, a value out of
    range or a combination without meaning, at construction and at every assignment.
    """

    method: ClassVar[str] = ""
    # Of a loss from outside the package: module:function or file.py:function, which stands in written files.
    import_path: ClassVar[str] = ""
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
        "resume_from_checkpoint": "resume",
        "truncation_mode": "truncation_side",
    }

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference model."""
        return False

    @property
    def nll_weight(self) -> float:
        """Weight of the NLL of the chosen completions in the loss."""
        return 0.0

    @property
    def needs_running_delta(self) -> bool:
        """Whether the loss is shifted by the running mean of the rewards."""
        return False

    @property
    def needs_reference_point(self) -> bool:
        """Whether the loss compares with z0, a mean over the global batch."""
        return False

    @property
    def metric_aliases(self) -> dict[str, str]:
        """Further names of logged metrics: alias to name."""
        return {}

    @property
    def coupled(self) -> bool:
        """Whether the loss of a preference depends on the others of the global batch."""
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
        """Return every key that may be given: the fields, their aliases, `method` and `loss_args`."""
        return [*super().known_keys(), "method", "loss_args"]

    @classmethod
    def loss_settings(cls) -> list[str]:
        """Return the fields of the method's own, without the shared ones."""
        return [name for name in cls.model_fields if name not in BaseConfig.model_fields]

    @classmethod
    def spread_loss_args(cls, values: dict[str, Any]) -> list[Problem]:
        """Replace `loss_args` in `values` by its entries; return what is wrong with them."""
        if "loss_args" not in values:
            return []
        given = values.pop("loss_args")
        if not isinstance(given, Mapping):
            return [Problem(("loss_args",), f"loss_args={given!r} is not valid; expected a mapping")]
        problems = []
        for key, value in given.items():
            if key not in cls.loss_settings():
                problems.append(Problem(("loss_args",), f"loss_args: {cls._explain_loss_arg(str(key))}"))
            elif key in values and values[key] != value:
                message = (
                    f"{key}={values[key]!r} and loss_args: {key}={value!r} disagree; give one of the two"
                )
                problems.append(Problem((key, "loss_args"), message))
            else:
                values[key] = value
        return problems

    @classmethod
    def _explain_loss_arg(cls, key: str) -> str:
        if cls.aliases.get(key, key) in BaseConfig.model_fields:
            return f"{key!r} is no argument of the loss; give it by itself"
        own = ", ".join(cls.loss_settings()) or "none"
        return f"unknown key {key!r}{nearest(key, cls.loss_settings()) or f'; expected {own}'}"

    @classmethod
    def normalise(cls, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str], list[Problem]]:
        """Replace aliases by their fields; `method` may be given where it says what the class says."""
        rest = dict(values)
        problems = cls.spread_loss_args(rest)
        method = rest.pop("method", cls.method)
        if method not in (cls.method, cls.import_path or cls.method):
            message = (
                f"method={method!r} is read only: {cls.__name__} is for {cls.method!r}; use the other class"
            )
            problems.append(Problem(("method",), message))
        problems += merge_precision(rest)
        for key in rest.keys() & {"truncation_side", "truncation_mode"}:
            rest[key] = _TRUNCATION_MODES.get(str(rest[key]), rest[key])
        for key in rest.keys() & {"resume", "resume_from_checkpoint"}:
            rest[key] = _RESUME.get(str(rest[key]).lower(), rest[key])
        by_field, spelled, more = super().normalise(rest)
        if "dtype" not in values:
            given = next((key for key in ("torch_dtype", "bf16", "fp16") if key in values), "dtype")
            spelled.update({"dtype": given} if "dtype" in by_field else {})
        return by_field, spelled, problems + more

    @classmethod
    def explain_unknown(cls, key: str, also: Iterable[str] = ()) -> str:
        """Return the message for a key that is no field here; names the methods that do have it."""
        from ds_align.config.methods import METHODS

        owners = [name for name, spec in METHODS.items() if key in spec.config.model_fields]
        if owners:
            return f"{key!r} is a setting of {', '.join(owners)}, not of {cls.method}"
        return super().explain_unknown(key, also)

    @rule(
        "use_lora",
        "ref_model_name",
        "ref_ds_config",
        "ref_load_in_8bit",
        "ref_load_in_4bit",
        "sync_ref_model",
    )
    def _adapters_off_is_no_second_model(self) -> str | None:
        if not self.use_lora:
            return None
        if self.sync_ref_model:
            return (
                "sync_ref_model has no meaning with use_lora: a policy of model and adapters cannot be mixed "
                "into a reference; leave one of the two out"
            )
        names = changed(self, "ref_ds_config", "ref_load_in_8bit", "ref_load_in_4bit")
        if names and self.ref_model_name is None:
            return (
                f"{', '.join(names)} without effect: with use_lora the reference is the policy with its "
                "adapters off, not a second model; leave it out, or name a ref_model_name"
            )
        return None

    @rule("eval_fraction", "eval_dataset_path")
    def _one_evaluation_set(self) -> str | None:
        if self.eval_fraction and self.eval_dataset_path is not None:
            return (
                f"eval_fraction={self.eval_fraction} has no effect beside eval_dataset_path="
                f"{self.eval_dataset_path!r}; give one of the two"
            )
        return None

    @rule(*_REFERENCE_SETTINGS)
    def _reference_settings_need_a_reference(self) -> str | None:
        names = changed(self, *_REFERENCE_SETTINGS)
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
