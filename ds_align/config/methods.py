"""The methods as plain data: a config, a loss by import path, and what the loss needs.

Losses are imported at first use, so that help and validation need no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from ds_align.config.base import BaseConfig
from ds_align.config.dpo import DPOConfig, nll_refusal
from ds_align.config.fields import BETA, NLL_NORMALIZATION, NllNormalization
from ds_align.config.schema import NonNegativeNumber, Number, PositiveNumber, Smoothing, rule


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
    loss_type: Literal["kto", "apo_zero_unpaired"] = Field(
        "kto", description="kto, or APO-zero of single completions (arXiv:2408.06266), which has no z0."
    )
    desirable_weight: NonNegativeNumber = Field(1.0, description="Weight of desirable completions.")
    undesirable_weight: NonNegativeNumber = Field(1.0, description="Weight of undesirable completions.")
    use_ref_model: bool = Field(True, description="Compare with a reference model; false: log-probs alone.")

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference model."""
        return self.use_ref_model

    @property
    def needs_reference_point(self) -> bool:
        """Whether the loss compares with z0, a mean over the global batch."""
        return self.loss_type == "kto"

    @rule("loss_type", "use_ref_model")
    def _apo_needs_a_reference(self) -> str | None:
        if self.loss_type == "apo_zero_unpaired" and not self.use_ref_model:
            return (
                "loss_type=apo_zero_unpaired with use_ref_model=False: it compares each completion with the "
                "reference alone; set use_ref_model or loss_type=kto"
            )
        return None

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
    nll_normalization: NllNormalization = Field("token", description=NLL_NORMALIZATION)

    refused_values: ClassVar[Mapping[tuple[str, str], str]] = {
        ("loss_type", "simpo"): "CPO-SimPO is --method simpo with cpo_alpha set"
    }

    @property
    def nll_weight(self) -> float:
        """Weight of the NLL term."""
        return self.cpo_alpha

    @rule("cpo_alpha", "nll_normalization")
    def _nll_normalization_needs_nll(self) -> str | None:
        return nll_refusal(self)

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
    alpha: Number = Field(
        0.0,
        description="Shape of the reward (AlphaPO, arXiv:2501.03884); 0: the mean log-prob, as in SimPO.",
    )
    sft_weight: NonNegativeNumber = Field(0.0, description="Weight of the NLL of the chosen completions.")
    cpo_alpha: NonNegativeNumber = Field(
        0.0, description="The same weight under CPO's name: setting it makes the loss CPO-SimPO."
    )
    nll_normalization: NllNormalization = Field("token", description=NLL_NORMALIZATION)

    @property
    def nll_weight(self) -> float:
        """Weight of the NLL term, under either of its names."""
        return self.sft_weight + self.cpo_alpha

    @property
    def metric_aliases(self) -> dict[str, str]:
        """SimPO's names of its own metrics."""
        return {"sft_loss": "nll_loss", "simpo_loss": "loss"}

    @rule("sft_weight", "cpo_alpha")
    def _one_nll_weight(self) -> str | None:
        if self.sft_weight and self.cpo_alpha:
            return (
                f"sft_weight={self.sft_weight} and cpo_alpha={self.cpo_alpha} are two names of one weight; "
                "give one of the two"
            )
        return None

    @rule("alpha", "loss_type")
    def _alpha_is_defined(self) -> str | None:
        if self.alpha and self.loss_type != "sigmoid":
            return f"alpha={self.alpha} has no meaning for loss_type={self.loss_type}; only for sigmoid"
        return None

    @rule("sft_weight", "cpo_alpha", "nll_normalization")
    def _nll_normalization_needs_nll(self) -> str | None:
        return nll_refusal(self)

    @rule("loss_type", "label_smoothing")
    def _smoothing_is_defined(self) -> str | None:
        return _smoothing_refusal(self.loss_type, self.label_smoothing, ("sigmoid",))


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """A method as data.

    loss is "module:function", or the function itself; loss_parameters maps its keyword arguments to the
    config attributes that they are read from. coupled: whether a preference's loss depends on the rest of the
    global batch.
    """

    name: str
    config: type[BaseConfig]
    inputs: Literal["pairs", "unpaired"]
    loss: str | Callable[..., Any]
    loss_parameters: Mapping[str, str]
    needs_reference: Callable[[BaseConfig], bool] = attrgetter("needs_reference")
    coupled: Callable[[BaseConfig], bool] = attrgetter("coupled")

    def arguments(self, config: BaseConfig) -> dict[str, Any]:
        """The loss function's keyword arguments."""
        return {name: getattr(config, source) for name, source in self.loss_parameters.items()}


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


METHODS: dict[str, MethodSpec] = {
    "dpo": MethodSpec(
        name="dpo",
        config=DPOConfig,
        inputs="pairs",
        loss="ds_align.losses.dpo:dpo_loss",
        loss_parameters={
            "loss_type": "loss_types",
            "loss_weights": "preference_weights",
            **_same("beta", "label_smoothing", "reference_free", "f_divergence_type"),
            **_same("f_alpha_divergence_coef", "discopop_tau"),
        },
    ),
    "ipo": MethodSpec(
        name="ipo",
        config=IPOConfig,
        inputs="pairs",
        loss="ds_align.losses.ipo:ipo_loss",
        loss_parameters=_same("beta", "length_normalize", "label_smoothing"),
    ),
    "kto": MethodSpec(
        name="kto",
        config=KTOConfig,
        inputs="unpaired",
        loss="ds_align.losses.kto:kto_loss",
        loss_parameters=_same("beta", "loss_type", "desirable_weight", "undesirable_weight"),
    ),
    "cpo": MethodSpec(
        name="cpo",
        config=CPOConfig,
        inputs="pairs",
        loss="ds_align.losses.cpo:cpo_loss",
        loss_parameters=_same("beta", "loss_type", "label_smoothing", "length_normalize"),
    ),
    "simpo": MethodSpec(
        name="simpo",
        config=SimPOConfig,
        inputs="pairs",
        loss="ds_align.losses.simpo:simpo_loss",
        loss_parameters=_same("beta", "gamma_beta_ratio", "loss_type", "label_smoothing", "alpha"),
    ),
}
