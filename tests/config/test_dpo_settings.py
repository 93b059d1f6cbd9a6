"""The settings of DPO's loss types, and those of the other methods' losses: values, names and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_align.config import (
    METHODS,
    BaseConfig,
    CPOConfig,
    DPOConfig,
    IPOConfig,
    KTOConfig,
    SimPOConfig,
    parse_command_line,
)
from ds_align.config.dpo import LOSS_TYPES
from ds_align.errors import ConfigError


def refusal(config_class: type[BaseConfig], **values: object) -> str:
    with pytest.raises(ConfigError) as error:
        config_class(**values)
    message = str(error.value)
    assert "\n" not in message, message
    assert message.startswith(f"{config_class.__name__}: ")
    return message


def having(ability: str) -> list[str]:
    return [name for name, kind in LOSS_TYPES.items() if getattr(kind, ability)]


def lacking(ability: str) -> list[str]:
    return [name for name, kind in LOSS_TYPES.items() if not getattr(kind, ability)]


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_each_type_alone(name: str) -> None:
    config = DPOConfig(loss_type=name)
    assert (config.loss_type, config.loss_types, config.preference_weights) == (name, [name], [1.0])
    assert config.needs_reference
    assert config.coupled == (name in ("aot", "aot_unpaired", "bco_pair"))
    assert config.needs_running_delta == (name == "bco_pair")


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("ipo_loss", "ipo"),
        ("aot_pair", "aot_unpaired"),
        (["hinge"], "hinge"),
        (["aot_pair"], "aot_unpaired"),
        (("sigmoid", "ipo_loss"), ["sigmoid", "ipo"]),
        (["sigmoid", "sft"], ["sigmoid", "sft"]),
    ],
)
def test_older_names_and_lists_of_one(given: object, stored: object) -> None:
    assert DPOConfig(loss_type=given).loss_type == stored


def test_a_mixture() -> None:
    config = DPOConfig(loss_type=["sft", "sigmoid", "bco_pair"], loss_weights=[0.2, 1, "0.5"], rpo_alpha=0.3)
    assert (config.loss_types, config.preference_weights) == (["sigmoid", "bco_pair"], [1.0, 0.5])
    assert config.nll_weight == pytest.approx(0.5)
    assert config.coupled and config.needs_running_delta
    assert not DPOConfig(loss_type=["sigmoid", "hinge"]).coupled


def test_weight_of_the_nll() -> None:
    assert DPOConfig().nll_weight == 0.0
    assert DPOConfig(rpo_alpha=0.7).nll_weight == 0.7
    assert DPOConfig(loss_type=["sigmoid", "sft"]).nll_weight == 1.0


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"loss_type": "sigmiod"}, "loss_type='sigmiod' is not valid; expected one of sigmoid, hinge, ipo"),
        ({"loss_type": ["sigmoid", "kto"]}, "loss_type=['sigmoid', 'kto'] is not valid"),
        ({"loss_type": "sft"}, "has no preference loss; sft only stands beside one"),
        ({"loss_type": []}, "has no preference loss"),
        ({"loss_type": ["aot_unpaired", "aot_pair"]}, "names a type twice; give it a larger weight"),
        ({"loss_type": ["ipo", "sft", "ipo_loss"]}, "names a type twice"),
        ({"loss_type": 3}, "loss_type=3 is not valid; expected one of sigmoid"),
        ({"loss_weights": [1.0]}, "loss_weights without effect: loss_type is a single type"),
        ({"loss_type": ["hinge"], "loss_weights": [2.0]}, "loss_weights without effect"),
        (
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]},
            "loss_weights has 1 entries and loss_type 2; give one for each",
        ),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.0]}, "has a zero; leave that type out"),
        (
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, -1.0]},
            "loss_weights=[1.0, -1.0] is not valid",
        ),
        ({"f_divergence_type": "kl"}, "f_divergence_type='kl' is not valid; expected one of reverse_kl"),
        ({"f_divergence_type": "alpha", "f_alpha_divergence_coef": 1.0}, "expected a number > 0 and < 1"),
        ({"f_divergence_type": "alpha", "f_alpha_divergence_coef": 0}, "expected a number > 0 and < 1"),
        (
            {"f_alpha_divergence_coef": 0.3},
            "f_alpha_divergence_coef without effect: f_divergence_type is not alpha",
        ),
        (
            {"loss_type": "hinge", "discopop_tau": 0.1},
            "discopop_tau without effect: loss_type is not discopop",
        ),
        ({"loss_type": "discopop", "discopop_tau": 0}, "discopop_tau=0 is not valid; expected a number > 0"),
        (
            {"reference_free": True, "f_divergence_type": "js"},
            "f_divergence_type=js is a divergence from the reference",
        ),
        ({"ld_alpha": 1.5}, "ld_alpha=1.5 is not valid; expected a number >= 0 and <= 1 or none"),
        ({"rpo_alpha": -1}, "rpo_alpha=-1 is not valid; expected a number >= 0"),
        ({"nll_normalization": "sum"}, "nll_normalization=sum without effect: the NLL term has no weight"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing=0.5 is not valid"),
    ],
)
def test_values_without_meaning_are_refused(values: dict[str, object], part: str) -> None:
    assert part in refusal(DPOConfig, **values)


@pytest.mark.parametrize("name", having("smoothing"))
def test_label_smoothing_is_known(name: str) -> None:
    assert DPOConfig(loss_type=name, label_smoothing=0.2).label_smoothing == 0.2


@pytest.mark.parametrize(
    ("setting", "value", "ability"),
    [
        ("label_smoothing", 0.2, "smoothing"),
        ("f_divergence_type", "js", "divergence"),
        ("ld_alpha", 0.5, "ld"),
    ],
)
def test_a_setting_of_some_types_is_refused_for_the_others(setting: str, value: object, ability: str) -> None:
    assert having(ability) and lacking(ability)
    for name in having(ability):
        assert getattr(DPOConfig(loss_type=name, **{setting: value}), setting) == value
    for name in lacking(ability):
        for loss_type in (name, ["sft", name], ["sigmoid", name]):
            message = refusal(DPOConfig, loss_type=loss_type, **{setting: value})
            assert f"{setting}={value} has no meaning for loss_type={name}: it is defined for" in message
            assert ", ".join(having(ability)) in message


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_reference_free_is_refused_where_the_reference_matters(name: str) -> None:
    kind = LOSS_TYPES[name]
    if kind.absolute or kind.sorts:
        assert f"reference_free has no meaning for loss_type={name}" in refusal(
            DPOConfig, loss_type=["sigmoid", name], reference_free=True
        )
    else:
        assert not DPOConfig(loss_type=name, reference_free=True).needs_reference


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_weighting_is_refused_where_pairs_are_mixed(name: str) -> None:
    if LOSS_TYPES[name].sorts:
        assert f"use_weighting has no meaning for loss_type={name}" in refusal(
            DPOConfig, loss_type=name, use_weighting=True
        )
    else:
        assert DPOConfig(loss_type=name, use_weighting=True).use_weighting


def test_a_mixture_where_each_type_knows_the_setting() -> None:
    config = DPOConfig(loss_type=["robust", "sigmoid", "sft"], label_smoothing=0.1, f_divergence_type="js")
    assert config.label_smoothing == 0.1


@pytest.mark.parametrize("suffixed", ["js_divergence", "alpha_divergence"])
def test_divergences_under_their_long_names(suffixed: str) -> None:
    assert DPOConfig(f_divergence_type=suffixed).f_divergence_type == suffixed.removesuffix("_divergence")


def test_settings_that_fit_are_kept() -> None:
    assert DPOConfig(f_divergence_type="alpha", f_alpha_divergence_coef=0.3).f_alpha_divergence_coef == 0.3
    assert DPOConfig(loss_type=["hinge", "discopop"], discopop_tau=0.1).discopop_tau == 0.1
    assert DPOConfig(rpo_alpha=1, nll_normalization="sequence").nll_normalization == "sequence"
    assert DPOConfig(loss_type=["hinge", "sft"], nll_normalization="sum").nll_weight == 1.0


def test_an_assignment_keeps_the_rules() -> None:
    config = DPOConfig(loss_type="sigmoid", label_smoothing=0.1)
    with pytest.raises(ConfigError, match="label_smoothing=0.1 has no meaning for loss_type=nca_pair"):
        config.loss_type = "nca_pair"
    assert config.loss_type == "sigmoid"
    config.loss_type = ["sigmoid", "aot_pair"]
    assert config.loss_type == ["sigmoid", "aot_unpaired"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--loss_type", "sigmoid,sft", "--loss_weights", "1,0.5"],
        ["--loss_type", "sigmoid", "--loss_type", "sft", "--loss_weights", "1.0", "--loss_weights", "0.5"],
    ],
)
def test_lists_on_the_command_line(flags: list[str]) -> None:
    config = parse_command_line(["--method", "dpo", *flags])
    assert (config.loss_type, config.loss_weights) == (["sigmoid", "sft"], [1.0, 0.5])
    assert config.nll_weight == 0.5


def test_lists_in_a_file(tmp_path: Path) -> None:
    config = DPOConfig(loss_type=["hinge", "sft"], loss_weights=[1, 0.25], nll_normalization="sequence")
    config.to_yaml(tmp_path / "run.yaml")
    assert DPOConfig.from_yaml(tmp_path / "run.yaml") == config


def test_arguments_of_the_loss() -> None:
    config = DPOConfig(
        loss_type=["sft", "sigmoid", "exo_pair"], loss_weights=[0.1, 2, 3], label_smoothing=0.1
    )
    assert METHODS["dpo"].arguments(config) == {
        "loss_type": ["sigmoid", "exo_pair"],
        "loss_weights": [2.0, 3.0],
        "beta": 0.1,
        "label_smoothing": 0.1,
        "reference_free": False,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "discopop_tau": 0.05,
    }
    assert (
        METHODS["kto"].arguments(KTOConfig(loss_type="apo_zero_unpaired"))["loss_type"] == "apo_zero_unpaired"
    )
    assert METHODS["simpo"].arguments(SimPOConfig(alpha=0.25))["alpha"] == 0.25


def test_kto_loss_types() -> None:
    assert KTOConfig().needs_reference_point
    assert not KTOConfig(loss_type="apo_zero_unpaired").needs_reference_point
    assert not KTOConfig(use_ref_model=False).needs_reference
    message = refusal(KTOConfig, loss_type="apo_zero_unpaired", use_ref_model=False)
    assert "loss_type=apo_zero_unpaired with use_ref_model=False" in message
    assert "loss_type='sigmoid' is not valid; expected one of kto, apo_zero_unpaired" in refusal(
        KTOConfig, loss_type="sigmoid"
    )


def test_cpo_points_to_simpo() -> None:
    assert "CPO-SimPO is --method simpo with cpo_alpha set" in refusal(CPOConfig, loss_type="simpo")
    assert "expected one of sigmoid, hinge, ipo" in refusal(CPOConfig, loss_type="robust")
    assert SimPOConfig(loss_type="simpo", cpo_alpha=1.0).nll_weight == 1.0


def test_simpo_has_one_nll_weight_under_two_names() -> None:
    assert SimPOConfig().nll_weight == 0.0
    assert SimPOConfig(sft_weight=0.4).nll_weight == 0.4
    assert "sft_weight=0.4 and cpo_alpha=0.5 are two names of one weight" in refusal(
        SimPOConfig, sft_weight=0.4, cpo_alpha=0.5
    )


def test_alphapo_belongs_to_sigmoid() -> None:
    assert SimPOConfig(alpha=-0.5, label_smoothing=0.1).alpha == -0.5
    assert "alpha=0.25 has no meaning for loss_type=hinge" in refusal(
        SimPOConfig, alpha=0.25, loss_type="hinge"
    )


@pytest.mark.parametrize(
    ("config_class", "without", "weight"),
    [
        (DPOConfig, {}, {"rpo_alpha": 0.1}),
        (CPOConfig, {"cpo_alpha": 0}, {"cpo_alpha": 0.1}),
        (SimPOConfig, {}, {"sft_weight": 0.1}),
        (SimPOConfig, {}, {"cpo_alpha": 0.1}),
    ],
)
def test_nll_normalization_needs_an_nll_term(
    config_class: type[BaseConfig], without: dict[str, float], weight: dict[str, float]
) -> None:
    for kind in ("sequence", "sum"):
        message = refusal(config_class, nll_normalization=kind, **without)
        assert f"nll_normalization={kind} without effect: the NLL term has no weight" in message
        assert config_class(nll_normalization=kind, **weight).nll_normalization == kind
    assert config_class(nll_normalization="token", **without).nll_normalization == "token"


def test_methods_without_an_nll_term_have_no_normalization() -> None:
    for config_class in (IPOConfig, KTOConfig):
        assert "'nll_normalization' is a setting of dpo, cpo, simpo" in refusal(
            config_class, nll_normalization="sum"
        )
        assert config_class().nll_weight == 0.0
