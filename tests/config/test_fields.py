"""Construction, assignment and the rules across fields."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from ds_align.config import METHODS, BaseConfig, CPOConfig, DPOConfig, IPOConfig, KTOConfig, SimPOConfig
from ds_align.config.cli import field_group
from ds_align.config.schema import describe_type
from ds_align.errors import ConfigError

ALL_CONFIGS = [spec.config for spec in METHODS.values()]


def refusal(config_class: type[BaseConfig], **values: object) -> str:
    with pytest.raises(ConfigError) as error:
        config_class(**values)
    return str(error.value)


@pytest.mark.parametrize(
    ("config_class", "beta", "learning_rate"),
    [
        (DPOConfig, 0.1, 5e-7),
        (IPOConfig, 0.1, 5e-7),
        (KTOConfig, 0.1, 1e-6),
        (CPOConfig, 0.1, 5e-7),
        (SimPOConfig, 2.0, 1e-6),
    ],
)
def test_defaults_of_each_method(config_class: type[BaseConfig], beta: float, learning_rate: float) -> None:
    config = config_class()
    assert (config.beta, config.learning_rate) == (beta, learning_rate)
    assert (config.per_device_train_batch_size, config.max_length, config.max_grad_norm) == (8, 1024, 1.0)
    assert config.warnings() == []


def test_every_error_is_reported_at_once_with_the_nearest_name() -> None:
    message = refusal(DPOConfig, max_steps="many", lerning_rate=1e-6, seed=-1, gamma_beta_ratio=0.5)
    lines = message.splitlines()
    assert lines[0] == "4 errors:"
    assert any("max_steps='many' is not valid; expected an integer >= 1 or none" in line for line in lines)
    assert any(
        "unknown key 'lerning_rate'; did you mean learning_rate or learning_rate_override?" in line
        for line in lines
    )
    assert any("seed=-1" in line for line in lines)
    assert any("'gamma_beta_ratio' is a setting of simpo, not of dpo" in line for line in lines)


def test_a_rule_is_checked_beside_an_invalid_field() -> None:
    message = refusal(DPOConfig, beta="x", warmup_ratio=0.1, warmup_steps=3)
    assert message.startswith("2 errors:")
    assert "beta='x'" in message
    assert "warmup_ratio=0.1 and warmup_steps=3" in message


def test_config_error_is_a_value_error_with_exit_code_2() -> None:
    with pytest.raises(ValueError, match="beta=0 is not valid; expected a number > 0") as error:
        DPOConfig(beta=0)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("beta", 0.0),
        ("beta", True),
        ("beta", math.nan),
        ("learning_rate", -1e-6),
        ("learning_rate", math.inf),
        ("max_steps", 0),
        ("max_steps", 2.0),
        ("max_steps", True),
        ("num_train_epochs", 0),
        ("per_device_train_batch_size", 0),
        ("gradient_accumulation_steps", "4"),
        ("pack_max_tokens", "automatic"),
        ("pack_max_tokens", 0),
        ("max_length", 1),
        ("eval_fraction", 1.0),
        ("max_bad_fraction", 1.1),
        ("warmup_ratio", 1.01),
        ("adam_beta1", 1.0),
        ("adam_epsilon", 0),
        ("max_grad_norm", -1),
        ("seed", 2**32),
        ("label_smoothing", 0.5),
        ("truncation_side", "middle"),
        ("lr_scheduler_type", "wave"),
        ("optim", "adam"),
        ("dtype", "float64"),
        ("prefix_sharing", "true"),
        ("prefix_sharing", 1),
        ("max_shard_size", "big"),
        ("dataset_prompt_field", ""),
        ("model_name_or_path", 3),
    ],
)
def test_values_out_of_range_are_refused(field: str, bad: object) -> None:
    message = refusal(DPOConfig, **{field: bad})
    assert message.startswith(f"DPOConfig: {field}=")
    assert "expected" in message


@pytest.mark.parametrize(
    ("field", "given", "stored"),
    [
        ("learning_rate", "1e-6", 1e-6),
        ("learning_rate", 0, 0.0),
        ("num_train_epochs", 3, 3.0),
        ("pack_max_tokens", 4096, 4096),
        ("pack_max_tokens", "auto", "auto"),
        ("dataset_path", Path("a/b.jsonl"), "a/b.jsonl"),
        ("max_shard_size", "500MB", "500MB"),
        ("ds_config", {"zero_optimization": {"stage": 1}}, {"zero_optimization": {"stage": 1}}),
    ],
)
def test_sensible_other_forms_are_accepted(field: str, given: object, stored: object) -> None:
    value = getattr(DPOConfig(**{field: given}), field)
    assert value == stored
    assert type(value) is type(stored)


@pytest.mark.parametrize(
    ("alias", "field", "value"),
    [
        ("model_name", "model_name_or_path", "org/model"),
        ("dataset_name", "dataset_path", "pairs.jsonl"),
        ("dataset_text_field", "dataset_prompt_field", "question"),
        ("max_seq_length", "max_length", 77),
        ("save_directory", "output_dir", "out"),
    ],
)
def test_aliases_set_and_read_their_field(alias: str, field: str, value: object) -> None:
    config = DPOConfig(**{alias: value})
    assert getattr(config, field) == value
    assert getattr(config, alias) == value
    other = DPOConfig()
    setattr(other, alias, value)
    assert getattr(other, field) == value


def test_an_alias_that_disagrees_is_refused_and_one_that_agrees_is_not() -> None:
    assert DPOConfig(max_length=9, max_seq_length=9).max_length == 9
    message = refusal(DPOConfig, max_length=9, max_seq_length=8)
    assert "max_length=9 and max_seq_length=8 disagree" in message


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ({"bf16": True}, "bfloat16"),
        ({"fp16": True, "bf16": False}, "float16"),
        ({"bf16": False}, "float32"),
        ({"fp16": False}, None),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "torch.float16"}, "float16"),
        ({"dtype": "bfloat16", "bf16": True, "fp16": False}, "bfloat16"),
        ({"dtype": None}, None),
    ],
)
def test_precision_aliases(given: dict[str, object], dtype: str | None) -> None:
    assert DPOConfig(**given).dtype == dtype


@pytest.mark.parametrize(
    "given",
    [
        {"bf16": True, "fp16": True},
        {"dtype": "float32", "bf16": True},
        {"dtype": "bfloat16", "bf16": False},
        {"dtype": "float16", "torch_dtype": "bfloat16"},
    ],
)
def test_precision_aliases_that_disagree_are_refused(given: dict[str, object]) -> None:
    assert "disagree about the precision" in refusal(DPOConfig, **given)


def test_precision_defaults_by_device() -> None:
    assert DPOConfig().resolved_dtype("cpu") == "float32"
    assert DPOConfig().resolved_dtype("cuda") == "bfloat16"
    assert DPOConfig(dtype="float16").resolved_dtype("cuda") == "float16"


@pytest.mark.parametrize(
    ("config_class", "loss_type", "legal"),
    [
        (DPOConfig, "sigmoid", True),
        (DPOConfig, "ipo", True),
        (DPOConfig, "hinge", False),
        (CPOConfig, "sigmoid", True),
        (CPOConfig, "ipo", False),
        (CPOConfig, "hinge", False),
        (SimPOConfig, "sigmoid", True),
        (SimPOConfig, "simpo", True),
        (SimPOConfig, "hinge", False),
    ],
)
def test_label_smoothing_is_legal_where_it_has_a_meaning(
    config_class: type[BaseConfig], loss_type: str, legal: bool
) -> None:
    values = {"loss_type": loss_type, "label_smoothing": 0.1}
    if legal:
        assert config_class(**values).label_smoothing == 0.1
    else:
        assert "label_smoothing=0.1 has no meaning" in refusal(config_class, **values)


def test_kto_has_no_label_smoothing_and_ipo_has() -> None:
    assert IPOConfig(label_smoothing=0.2).label_smoothing == 0.2
    assert "'label_smoothing' is a setting of dpo, ipo, cpo, simpo" in refusal(KTOConfig, label_smoothing=0.1)


def test_simpo_is_another_name_of_sigmoid() -> None:
    assert SimPOConfig(loss_type="simpo").loss_type == "sigmoid"


@pytest.mark.parametrize(
    ("config_class", "values", "part"),
    [
        (DPOConfig, {"warmup_ratio": 0.1, "warmup_steps": 5}, "set one to 0"),
        (DPOConfig, {"optim": "sgd", "adam_beta2": 0.95}, "optim=sgd has no such values"),
        (DPOConfig, {"eval_fraction": 0.1, "eval_dataset_path": "e.jsonl"}, "give one of the two"),
        (DPOConfig, {"reference_free": True, "ref_model_name": "m"}, "no reference model"),
        (KTOConfig, {"use_ref_model": False, "ref_batch_tokens": 4096}, "no reference model"),
        (SimPOConfig, {"ref_ds_config": "zero_inference"}, "no reference model"),
        (KTOConfig, {"desirable_weight": 0, "undesirable_weight": 0}, "leave no loss"),
        (CPOConfig, {"length_normalize": False}, "no effect with loss_type=sigmoid"),
    ],
)
def test_combinations_without_meaning_are_refused(
    config_class: type[BaseConfig], values: dict[str, object], part: str
) -> None:
    assert part in refusal(config_class, **values)


def test_assignment_is_validated_like_the_constructor() -> None:
    config = DPOConfig(loss_type="hinge")
    config.learning_rate = "1e-6"
    assert config.learning_rate == 1e-6
    for name, bad, part in (
        ("beta", -1, "beta=-1 is not valid; expected a number > 0"),
        ("betta", 1, "unknown key 'betta'; did you mean beta"),
        ("label_smoothing", 0.1, "no meaning for loss_type=hinge"),
        ("bf16", "yes", "expected true or false"),
        ("method", "kto", "read only"),
    ):
        with pytest.raises(ConfigError, match=part):
            setattr(config, name, bad)
    assert (config.beta, config.label_smoothing, config.dtype) == (0.1, 0.0, None)
    config.bf16 = True
    assert config.dtype == "bfloat16"


def test_a_refused_assignment_does_not_count_as_given() -> None:
    config = DPOConfig(warmup_ratio=0.1)
    with pytest.raises(ConfigError):
        config.warmup_steps = 4
    assert config.model_fields_set == {"warmup_ratio"}
    assert config == DPOConfig(warmup_ratio=0.1)


def test_output_dir_is_derived_from_method_and_model() -> None:
    assert DPOConfig(model_name="org/Qwen2-0.5B/").resolved_output_dir == "runs/dpo-Qwen2-0.5B"
    assert KTOConfig().resolved_output_dir == "runs/kto-demo"
    assert KTOConfig(save_directory="here").resolved_output_dir == "here"


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (DPOConfig(learning_rate=1e-4), "destroys the model"),
        (DPOConfig(learning_rate=6e-6), "is high"),
        (DPOConfig(learning_rate=2e-4, use_lora=True), "is high for LoRA"),
        (DPOConfig(beta=5), "outside the usual range of dpo"),
        (SimPOConfig(beta=0.1), "outside the usual range of simpo"),
        (DPOConfig(max_steps=5, warmup_steps=6), "never reaches its peak"),
        (DPOConfig(max_length=64, max_prompt_length=64), "max_prompt_length=64 never applies"),
    ],
)
def test_unwise_values_are_warned_about_and_kept(config: BaseConfig, part: str) -> None:
    before = config.model_dump()
    messages = config.warnings()
    assert len(messages) == 1
    assert part in messages[0]
    assert config.model_dump() == before


def test_adapters_take_larger_learning_rates(tmp_path: Path) -> None:
    """The limits of full fine-tuning are not theirs, whether use_lora or the model's directory says so."""
    (tmp_path / "adapter_config.json").write_text("{}")
    for config in ({"use_lora": True}, {"model_name_or_path": str(tmp_path)}):
        assert DPOConfig(learning_rate=1e-4, **config).warnings() == []
        assert "for LoRA" in DPOConfig(learning_rate=1.1e-4, **config).warnings()[0]
        assert DPOConfig(learning_rate=1, learning_rate_override=True, **config).warnings() == []


@pytest.mark.parametrize("config_class", ALL_CONFIGS)
def test_every_field_has_a_default_a_description_and_a_group(config_class: type[BaseConfig]) -> None:
    for name, info in config_class.model_fields.items():
        assert not info.is_required(), name
        assert info.description, name
        assert describe_type(info.annotation, info.metadata), name
        assert field_group(config_class, name), name


# Settings of a method that its loss function does not take: reference, NLL term, weights of pairs and types.
OF_THE_OBJECTIVE = {
    "dpo": {"loss_type", "loss_weights", "ld_alpha", "use_weighting", "rpo_alpha", "nll_normalization"},
    "ipo": set(),
    "kto": {"use_ref_model"},
    "cpo": {"cpo_alpha", "nll_normalization"},
    "simpo": {"sft_weight", "cpo_alpha", "nll_normalization"},
}


def test_method_specs_name_fields_and_losses_that_exist() -> None:
    for name, spec in METHODS.items():
        assert (spec.name, spec.config.method) == (name, name)
        config = spec.config()
        arguments = spec.arguments(config)
        assert list(arguments) == list(spec.loss_parameters)
        for parameter, source in spec.loss_parameters.items():
            assert source in type(config).model_fields or isinstance(getattr(type(config), source), property)
            assert arguments[parameter] == getattr(config, source), (name, parameter)
        # What is a field of the method alone reaches the loss, or is a matter of the objective.
        own = set(spec.config.model_fields) - set(BaseConfig.model_fields)
        assert own - set(spec.loss_parameters.values()) <= OF_THE_OBJECTIVE[name], name
    assert [METHODS[name].needs_reference(METHODS[name].config()) for name in METHODS] == [
        True,
        True,
        True,
        False,
        False,
    ]
    assert not METHODS["dpo"].needs_reference(DPOConfig(reference_free=True))
    assert not METHODS["kto"].needs_reference(KTOConfig(use_ref_model=False))


def test_loss_functions_take_the_loss_parameters() -> None:
    # torch is imported in a process of its own, so that this file stays a test of a torch-free room.
    program = """
import importlib, inspect
import torch
from ds_align.config import METHODS
from ds_align.losses import Logps, PairedLogps, UnpairedLogps

def logps(seed):
    torch.manual_seed(seed)
    return Logps(-10 * torch.rand(4), torch.tensor([3, 5, 2, 7]))

inputs = {
    "pairs": PairedLogps(*map(logps, range(4))),
    "unpaired": UnpairedLogps(policy=logps(0), reference=logps(1), desirable=torch.tensor([True, False] * 2)),
}
# What is no setting: a state of the run, which the objective hands over.
state = {"dpo": {"bco_delta"}}
for spec in METHODS.values():
    module, name = spec.loss.split(":")
    loss = getattr(importlib.import_module(module), name)
    accepted = set(inspect.signature(loss).parameters) - {"logps"} - state.get(spec.name, set())
    assert accepted == set(spec.loss_parameters), (spec.name, accepted)
    arguments = spec.arguments(spec.config())
    for parameter in accepted:
        default = inspect.signature(loss).parameters[parameter].default
        # A list of one type with its weight is that type alone.
        forms = [default, [default], [1.0] if default is None else default]
        assert arguments[parameter] in forms, (spec.name, parameter)
    given, default = loss(inputs[spec.inputs], **arguments), loss(inputs[spec.inputs])
    assert torch.equal(given.losses, default.losses), spec.name
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
