"""Adapters in a model and adapter directories: what is planned and refused, and what a switch leaves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from ds_align.batch import Layout
from ds_align.config import CPOConfig, DPOConfig
from ds_align.engine.setup import Setup, check_setup
from ds_align.errors import ConfigError
from ds_align.models import PolicyModel
from ds_align.models.adapters import adapted_layers, attach, reference_adapters
from tests.distributed import tiny

CPU = torch.device("cpu")
IDS = torch.arange(2, 20)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `wide` (another width) and `adapter` (on q_proj and up_proj of base, r 3, alpha 5)."""
    directory = tmp_path_factory.mktemp("adapters")
    tiny.write_model(directory / "base")
    tiny.write_model(directory / "wide", hidden_size=64)
    write_adapter(directory / "adapter", directory / "base")
    return directory


def write_adapter(directory: Path, base: Path, **settings: object) -> Path:
    values = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**(values | settings)))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(directory, save_embedding_layers=False)
    return directory


def check(model: Path | str, config_class: type = DPOConfig, **settings: object) -> Setup:
    return check_setup(config_class(model_name_or_path=str(model), **settings), CPU)


def built(setup: Setup) -> torch.nn.Module:
    model = setup.source.load(torch.float32)
    attach(model, setup.adapters)
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def randomise(model: torch.nn.Module) -> None:
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)


def test_adapters_off_is_the_base_bit_for_bit(folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    model = built(check(folder / "base", use_lora=True))
    assert torch.equal(logits(model), logits(base)), "B is 0 at the start"
    randomise(model)
    trained = logits(model)
    assert (trained - logits(base)).abs().max() > 0.1
    with reference_adapters(model):
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model), trained)


def test_the_reference_of_an_adapter_directory_is_its_start(folder: Path) -> None:
    setup = check(folder / "adapter")
    assert setup.reference_is_policy
    assert setup.reference_ds_config is None
    model = built(setup)
    start = logits(model)
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    assert (start - logits(base)).abs().max() > 0.1
    randomise(model)
    assert (logits(model) - start).abs().max() > 0.1
    with reference_adapters(model):
        assert torch.equal(logits(model), start)


@pytest.mark.parametrize("start", ["base", "adapter"])
def test_switching_leaves_nothing_behind(folder: Path, start: str) -> None:
    model = built(check(folder / start, use_lora=True) if start == "base" else check(folder / start))
    randomise(model)
    before, flags = logits(model), [parameter.requires_grad for parameter in model.parameters()]
    assert any(flags)
    with reference_adapters(model):
        assert flags == [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(RuntimeError), reference_adapters(model):
        model(input_ids=torch.zeros(1, 1))
    assert torch.equal(logits(model), before)
    assert flags == [parameter.requires_grad for parameter in model.parameters()]


def test_a_method_without_a_reference_keeps_no_copy(folder: Path) -> None:
    setup = check(folder / "adapter", CPOConfig)
    assert not setup.reference_is_policy
    assert all(set(layer.lora_A) == {"default"} for layer in adapted_layers(built(setup)))
    assert check(folder / "adapter", ref_model_name=str(folder / "base")).adapters.keeps_start is False


def test_only_adapters_train_and_the_seed_makes_them(folder: Path) -> None:
    first, again, other = (built(check(folder / "base", use_lora=True, seed=seed)) for seed in (1, 1, 2))
    trained = [name for name, parameter in first.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 7 * 2
    assert all(".lora_" in name for name in trained)
    values = [dict(model.named_parameters()) for model in (first, again, other)]
    for name in trained:
        assert torch.equal(values[0][name], values[1][name])
        assert torch.equal(values[0][name], values[2][name]) is (".lora_B." in name)


def test_disable_dropout_leaves_lora_dropout_alone(folder: Path) -> None:
    model = built(check(folder / "base", use_lora=True, lora_dropout=0.25))
    model.model.extra = torch.nn.Dropout(0.5)
    policy = PolicyModel(model, Layout.PADDED)
    policy.disable_dropout()
    assert model.model.extra.p == 0
    assert {layer.lora_dropout["default"].p for layer in adapted_layers(model)} == {0.25}
    assert policy.fused_head


def test_adapters_take_the_models_precision(folder: Path) -> None:
    setup = check(folder / "base", use_lora=True)
    model = setup.source.load(torch.bfloat16)
    attach(model, setup.adapters)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_target_modules_choose_the_layers(folder: Path) -> None:
    def names(**settings: object) -> set[str]:
        model = built(check(folder / "base", use_lora=True, **settings))
        layers = adapted_layers(model)
        return {name.rpartition(".")[2] for name, module in model.named_modules() if module in layers}

    every = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert names() == names(lora_target_modules=["all-linear"]) == every
    assert names(lora_target_modules=["q_proj", "v_proj"]) == {"q_proj", "v_proj"}
    # Targets are ends of names: one layer of one block can be meant.
    assert names(lora_target_modules=["layers.1.mlp.up_proj"]) == {"up_proj"}


def test_an_adapter_on_the_head_is_announced(folder: Path) -> None:
    setup = check(folder / "base", use_lora=True, lora_target_modules=["lm_head", "q_proj"])
    assert setup.adapters.wraps_head
    assert any("LM head has an adapter" in message for message in setup.messages)
    assert not PolicyModel(built(setup), Layout.PADDED).fused_head
    assert check(folder / "base", use_lora=True).messages == ()


def test_the_base_may_be_named_relative_to_the_working_directory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = shutil.copytree(folder / "adapter", tmp_path / "adapter")
    edit_settings(adapter, base_model_name_or_path="base")
    monkeypatch.chdir(folder)
    setup = check(adapter)
    assert setup.source.path == "base"
    assert setup.adapters.settings.base_model_name_or_path == str(folder / "base")


def test_the_tokenizer_beside_the_adapter_wins(folder: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(folder / "adapter", tmp_path / "adapter")
    assert check(adapter).tokenizer.name_or_path == str(folder / "base")
    tiny.write_tokenizer(adapter)
    assert check(adapter).tokenizer.name_or_path == str(adapter)
    assert check(adapter, tokenizer_name=str(folder / "wide")).tokenizer.name_or_path == str(folder / "wide")


def edit_settings(directory: Path, **values: object) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_target_modules": ["q_proj", "nothing"]}, ["'nothing'", "down_proj, gate_proj", "lm_head"]),
        ({"lora_target_modules": ["embed_tokens"]}, ["'embed_tokens' names no linear layer"]),
        ({"lora_target_modules": ["mlp"]}, ["'mlp' names no linear layer"]),
    ],
    ids=str,
)
def test_targets_that_are_no_linear_layers_are_refused(
    folder: Path, settings: dict, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        check(folder / "base", use_lora=True, **settings)
    for word in ["lora_target_modules", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, ["lora_r=16 (the adapter's: 3)", "lora_alpha=32 (the adapter's: 5)"]),
        (
            {"lora_r": 3, "lora_alpha": 5, "lora_dropout": 0.0},
            ["lora_target_modules=down_proj", "(the adapter's: q_proj,up_proj)"],
        ),
    ],
    ids=["numbers", "layers"],
)
def test_use_lora_must_say_what_the_adapter_says(folder: Path, settings: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check(folder / "adapter", use_lora=True, **settings)
    for word in words:
        assert word in str(caught.value)
    same = {"lora_r": 3, "lora_alpha": 5, "lora_dropout": 0.0, "lora_target_modules": ["up_proj", "q_proj"]}
    assert check(folder / "adapter", use_lora=True, **same).adapters.settings.r == 3


def test_dropout_is_not_the_adapters_shape(folder: Path) -> None:
    # The adapter was trained without dropout; 0.1 is the default, which leaves that as it is.
    for settings, expected in (({}, 0.0), ({"lora_dropout": 0.1}, 0.0), ({"lora_dropout": 0.3}, 0.3)):
        assert check(folder / "adapter", **settings).adapters.settings.lora_dropout == expected
    with pytest.raises(ConfigError, match="lora_dropout without effect"):
        check(folder / "base", lora_dropout=0.3)


def truncate(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no base": (lambda d: edit_settings(d, base_model_name_or_path="/nowhere/base"), "no such directory"),
    "base not named": (lambda d: edit_settings(d, base_model_name_or_path=None), "names no base model"),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "no weights"),
    "cut weights": (truncate, "not a whole file of weights"),
    "not LoRA": (lambda d: edit_settings(d, peft_type="IA3"), "only LORA adapters"),
    "DoRA": (lambda d: edit_settings(d, use_dora=True), "use_dora=True, which is more than plain LoRA"),
    "trained head": (lambda d: edit_settings(d, modules_to_save=["lm_head"]), "modules_to_save=['lm_head']"),
    "changed base": (lambda d: edit_settings(d, init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "of the future": (lambda d: edit_settings(d, use_magic=True), "use_magic=True"),
    "other layers": (
        lambda d: edit_settings(d, target_modules=["q_proj"]),
        "weights of the adapter do not fit",
    ),
    "unknown layers": (lambda d: edit_settings(d, target_modules=["nothing"]), "does not fit its base"),
    "embeddings": (lambda d: edit_settings(d, target_modules=["embed_tokens"]), "no linear layer"),
    "broken settings": (lambda d: (d / "adapter_config.json").write_text("{"), "cannot be read"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_broken_adapter_directories_are_refused(folder: Path, tmp_path: Path, mistake: str) -> None:
    adapter = shutil.copytree(folder / "adapter", tmp_path / "adapter")
    make, words = MISTAKES[mistake]
    make(adapter)
    with pytest.raises(ConfigError) as caught:
        check(adapter)
    assert words in str(caught.value)
    assert "adapter" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(folder / "adapter", tmp_path / "adapter")
    edit_settings(adapter, base_model_name_or_path=str(folder / "wide"))
    with pytest.raises(ConfigError, match=r"expected shape \(3, 64\), found \(3, 32\)"):
        check(adapter)


def test_an_adapter_is_no_reference_model(folder: Path) -> None:
    with pytest.raises(ConfigError, match="holds adapter_config.json where a whole model is needed"):
        check(folder / "base", ref_model_name=str(folder / "adapter"))


def test_the_base_is_never_the_output_directory(folder: Path) -> None:
    with pytest.raises(ConfigError, match="the directory of the adapter's base model"):
        check(folder / "adapter", output_dir=str(folder / "base"))


def test_adapters_cannot_be_mixed_into_a_reference(folder: Path) -> None:
    with pytest.raises(ConfigError, match="sync_ref_model: the policy trains adapters"):
        check(folder / "adapter", ref_model_name=str(folder / "base"), sync_ref_model=True)


def test_settings_of_a_second_model_need_one(folder: Path) -> None:
    with pytest.raises(ConfigError, match="ref_ds_config without effect"):
        check(folder / "adapter", ref_ds_config="zero_inference")
    second = check(folder / "adapter", ref_model_name=str(folder / "base"), ref_ds_config="zero_inference")
    assert not second.reference_is_policy
    assert second.reference_ds_config["zero_optimization"]["stage"] == 3
