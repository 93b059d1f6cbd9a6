"""The methods as plain data: a config, a loss by import path, and what the loss needs.

Losses are imported at first use, so that help and validation need no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from ds_align.config.fields import BaseConfig
from ds_align.config.schema import NonNegativeNumber, PositiveNumber, Smoothing, rule

BETA = "Strength of the pull towards the reference: the reward is beta times the log-ratio in nats."


def _default(field: str, value: Any) -> Any:
    """Give a shared field another default; its type, range and description stay where they are owned."""
    return Field(value, description=BaseConfig.model_fields[field].description)


def _smoothing_refusal(loss_type: str, label_smoothing: float, legal: tuple[str, ...]) -> str | None:
    if label_smoothing and loss_type not in legal:
        return (
            f"label_smoothing={label_smoothing} has no meaning for loss_type={loss_type}: it is defined for "
            f"{' and '.join(legal)} only; set it to 0"
        )
    return None


class DPOConfig(BaseConfig):
    """Direct preference optimisation (arXiv:2305.18290)."""

    method: ClassVar[str] = "dpo"
    group: ClassVar[str] = "Method: dpo"
    usual_beta: ClassVar[tuple[float, float]] = (0.01, 1.0)

    beta: PositiveNumber = Field(0.1, description=BETA)
    loss_type: Literal["sigmoid", "hinge", "ipo"] = Field("sigmoid", description="Form of the loss.")
    label_smoothing: Smoothing = Field(
        0.0, description="Assumed share of swapped labels; for loss_type sigmoid and ipo."
    )
    reference_free: bool = Field(False, description="Take the reference as uniform: no reference model.")
    rpo_alpha: NonNegativeNumber = Field(
        0.0, description="Weight of the NLL of the chosen completions (arXiv:2404.19733)."
    )

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference model."""
        return not self.reference_free

    @rule("loss_type", "label_smoothing")
    def _smoothing_is_defined(self) -> str | None:
        return _smoothing_refusal(self.loss_type, self.label_smoothing, ("sigmoid", "ipo"))


class IPOConfig(BaseConfig):
    """Identity preference optimisation (arXiv:2310.12036)."""

    method: ClassVar[str] = "ipo"
    group: ClassVar[str] = "Method: ipo"
    usual_beta: ClassVar[tuple[float, float]] = (0.01, 1.0)

    beta: PositiveNumber = Field(0.1, description="The log-ratio gap is pulled to 1 / (2 beta).")
    length_normalize: bool = Field(
        True, description="Compare log-ratios per token; false: sums, as in the paper."
    )
    label_smoothing: Smoothing = Field(0.0, description="Assumed share of swapped labels.")

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference model."""
        return True


class KTOConfig(BaseConfig):
    """Kahneman-Tversky optimisation (arXiv:2402.01306), on single completions with a label."""

    method: ClassVar[str] = "kto"
    group: ClassVar[str] = "Method: kto"
    reads_unpaired: ClassVar[bool] = True
    usual_beta: ClassVar[tuple[float, float]] = (0.01, 1.0)

    learning_rate: NonNegativeNumber = _default("learning_rate", 1e-6)
    beta: PositiveNumber = Field(0.1, description=BETA)
    desirable_weight: NonNegativeNumber = Field(1.0, description="Weight of desirable completions.")
    undesirable_weight: NonNegativeNumber = Field(1.0, description="Weight of undesirable completions.")
    use_ref_model: bool = Field(True, description="Compare with a reference model; false: log-probs alone.")

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference model."""
        return self.use_ref_model

    @rule("desirable_weight", "undesirable_weight")
    def _some_weight(self) -> str | None:
        if self.desirable_weight == 0 and self.undesirable_weight == 0:
            return "desirable_weight=0 and undesirable_weight=0 leave no loss; make one of the two positive"
        return None


class CPOConfig(BaseConfig):
    """Contrastive preference optimisation (arXiv:2401.08417): no reference in the loss."""

    method: ClassVar[str] = "cpo"
    group: ClassVar[str] = "Method: cpo"
    usual_beta: ClassVar[tuple[float, float]] = (0.01, 1.0)

    beta: PositiveNumber = Field(0.1, description="Factor of the log-prob gap between chosen and rejected.")
    loss_type: Literal["sigmoid", "hinge", "ipo"] = Field("sigmoid", description="Form of the loss.")
    label_smoothing: Smoothing = Field(
        0.0, description="Assumed share of swapped labels; for loss_type sigmoid."
    )
    length_normalize: bool = Field(True, description="loss_type ipo: compare per-token means; false: sums.")
    cpo_alpha: NonNegativeNumber = Field(1.0, description="Weight of the NLL of the chosen completions.")

    @rule("loss_type", "label_smoothing")
    def _smoothing_is_defined(self) -> str | None:
        return _smoothing_refusal(self.loss_type, self.label_smoothing, ("sigmoid",))

    @rule("loss_type", "length_normalize")
    def _length_normalize_is_defined(self) -> str | None:
        if not self.length_normalize and self.loss_type != "ipo":
            return (
                f"length_normalize=False has no effect with loss_type={self.loss_type}, which compares sums; "
                "leave it out or set loss_type=ipo"
            )
        return None


def _older_name(value: Any) -> Any:
    return "sigmoid" if value == "simpo" else value


class SimPOConfig(BaseConfig):
    """Simple preference optimisation (arXiv:2405.14734): length-normalised, no reference."""

    method: ClassVar[str] = "simpo"
    group: ClassVar[str] = "Method: simpo"
    usual_beta: ClassVar[tuple[float, float]] = (1.0, 10.0)

    learning_rate: NonNegativeNumber = _default("learning_rate", 1e-6)
    beta: PositiveNumber = Field(2.0, description="Factor of the gap between mean log-probs per token.")
    gamma_beta_ratio: NonNegativeNumber = Field(0.5, description="Target margin, as a share of beta.")
    loss_type: Annotated[Literal["sigmoid", "hinge"], BeforeValidator(_older_name)] = Field(
        "sigmoid", description="Form of the loss; simpo is another name of sigmoid."
    )
    label_smoothing: Smoothing = Field(
        0.0, description="Assumed share of swapped labels; for loss_type sigmoid."
    )
    sft_weight: NonNegativeNumber = Field(0.0, description="Weight of the NLL of the chosen completions.")

    @rule("loss_type", "label_smoothing")
    def _smoothing_is_defined(self) -> str | None:
        return _smoothing_refusal(self.loss_type, self.label_smoothing, ("sigmoid",))


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """A method as data.

    loss is "module:function"; loss_parameters are the config fields that the function takes as keywords;
    nll_weight is the field that weighs the token-weighted NLL of the chosen completions, if there is one.
    """

    name: str
    config: type[BaseConfig]
    inputs: Literal["pairs", "unpaired"]
    loss: str
    loss_parameters: tuple[str, ...]
    nll_weight: str | None = None
    needs_reference: Callable[[BaseConfig], bool] = attrgetter("needs_reference")


METHODS: dict[str, MethodSpec] = {
    "dpo": MethodSpec(
        name="dpo",
        config=DPOConfig,
        inputs="pairs",
        loss="ds_align.losses.dpo:dpo_loss",
        loss_parameters=("beta", "loss_type", "label_smoothing", "reference_free"),
        nll_weight="rpo_alpha",
    ),
    "ipo": MethodSpec(
        name="ipo",
        config=IPOConfig,
        inputs="pairs",
        loss="ds_align.losses.ipo:ipo_loss",
        loss_parameters=("beta", "length_normalize", "label_smoothing"),
    ),
    "kto": MethodSpec(
        name="kto",
        config=KTOConfig,
        inputs="unpaired",
        loss="ds_align.losses.kto:kto_loss",
        loss_parameters=("beta", "desirable_weight", "undesirable_weight"),
    ),
    "cpo": MethodSpec(
        name="cpo",
        config=CPOConfig,
        inputs="pairs",
        loss="ds_align.losses.cpo:cpo_loss",
        loss_parameters=("beta", "loss_type", "label_smoothing", "length_normalize"),
        nll_weight="cpo_alpha",
    ),
    "simpo": MethodSpec(
        name="simpo",
        config=SimPOConfig,
        inputs="pairs",
        loss="ds_align.losses.simpo:simpo_loss",
        loss_parameters=("beta", "gamma_beta_ratio", "loss_type", "label_smoothing"),
        nll_weight="sft_weight",
    ),
}
