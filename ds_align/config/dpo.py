"""The settings of DPO and its relatives: which loss types there are, and which settings each knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from ds_align.config.base import BaseConfig
from ds_align.config.fields import BETA, NLL_NORMALIZATION, NllNormalization
from ds_align.config.schema import Expects, NonNegativeNumber, PositiveNumber, Share, Smoothing, changed, rule


@dataclass(frozen=True, slots=True)
class LossType:
    """What a loss type of dpo_loss knows.

    smoothing: label_smoothing. divergence: f_divergence_type, for losses of the difference of two rewards.
    ld: ld_alpha, for losses of summed log-probs. absolute: it looks at one reward by itself, so that it
    needs a reference. sorts: it compares sorted values of a whole global batch. shifts: it takes the running
    mean of the rewards.
    """

    smoothing: bool = False
    divergence: bool = False
    ld: bool = True
    absolute: bool = False
    sorts: bool = False
    shifts: bool = False


LOSS_TYPES: dict[str, LossType] = {
    "sigmoid": LossType(smoothing=True, divergence=True),
    "hinge": LossType(divergence=True),
    "ipo": LossType(smoothing=True, ld=False),
    "exo_pair": LossType(smoothing=True, divergence=True),
    "nca_pair": LossType(absolute=True),
    "robust": LossType(smoothing=True, divergence=True),
    "bco_pair": LossType(absolute=True, shifts=True),
    "sppo_hard": LossType(absolute=True),
    "aot": LossType(smoothing=True, sorts=True),
    "aot_unpaired": LossType(smoothing=True, sorts=True),
    "apo_zero": LossType(absolute=True),
    "apo_down": LossType(absolute=True),
    "discopop": LossType(divergence=True),
    "sigmoid_norm": LossType(smoothing=True, ld=False),
}
# In a list of types beside at least one of the above: NLL of the chosen completions.
SFT = "sft"
_OLDER_NAMES = {"ipo_loss": "ipo", "aot_pair": "aot_unpaired"}


def _current_names(value: Any) -> Any:
    """Older names become today's, and a list of one type that type."""
    if isinstance(value, (list, tuple)):
        types = [_current_names(one) for one in value]
        return types[0] if len(types) == 1 else types
    return _OLDER_NAMES.get(value, value) if isinstance(value, str) else value


LossTypes = Annotated[
    str | list[str],
    BeforeValidator(_current_names),
    Expects(f"one of {', '.join(LOSS_TYPES)}, or a list of them ({SFT} too)"),
]


Divergence = Annotated[
    Literal["reverse_kl", "forward_kl", "js", "alpha"],
    BeforeValidator(lambda value: value.removesuffix("_divergence") if isinstance(value, str) else value),
]


class DPOConfig(BaseConfig):
    """Direct preference optimisation (arXiv:2305.18290) and its relatives."""

    method: ClassVar[str] = "dpo"
    group: ClassVar[str] = "Method: dpo"
    usual_beta: ClassVar[tuple[float, float]] = (0.01, 0.5)

    beta: PositiveNumber = Field(0.1, description=BETA)
    loss_type: LossTypes = Field(
        "sigmoid", description="Form of the loss; of a list the weighted sum, see loss_weights."
    )
    loss_weights: list[NonNegativeNumber] | None = Field(
        None, description="Weight of each loss type of a list; none: 1 each."
    )
    label_smoothing: Smoothing = Field(
        0.0,
        description="Assumed share of swapped labels; for loss_type "
        f"{', '.join(name for name, kind in LOSS_TYPES.items() if kind.smoothing)}.",
    )
    reference_free: bool = Field(False, description="Take the reference as uniform: no reference model.")
    f_divergence_type: Divergence = Field(
        "reverse_kl", description="Divergence that holds the policy near the reference (arXiv:2309.16240)."
    )
    f_alpha_divergence_coef: Annotated[PositiveNumber, Field(lt=1)] = Field(
        0.5, description="The alpha of f_divergence_type alpha; towards 0 it becomes reverse_kl."
    )
    discopop_tau: PositiveNumber = Field(
        0.05, description="Temperature of loss_type discopop (arXiv:2406.08414)."
    )
    ld_alpha: Share | None = Field(
        None,
        description="Weight of the tokens beyond the length of the shorter completion (LD-DPO, "
        "arXiv:2409.06411); none or 1: all tokens count alike.",
    )
    use_weighting: bool = Field(
        False, description="Weigh each pair by how likely the policy is to write it (WPO, arXiv:2406.11827)."
    )
    rpo_alpha: NonNegativeNumber = Field(
        0.0,
        description="Weight of the NLL of the chosen completions (RPO, arXiv:2404.19733, which takes "
        "nll_normalization=sequence).",
    )
    nll_normalization: NllNormalization = Field("token", description=NLL_NORMALIZATION)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference model."""
        return not self.reference_free

    @property
    def loss_types(self) -> list[str]:
        """The preference losses that are summed, without sft."""
        return [name for name in self._types() if name != SFT]

    @property
    def preference_weights(self) -> list[float]:
        """The weight of each of loss_types."""
        return [weight for name, weight in zip(self._types(), self._weights(), strict=True) if name != SFT]

    @property
    def nll_weight(self) -> float:
        """Weight of the NLL term: rpo_alpha, and that of sft in a list of types."""
        sft = sum(weight for name, weight in zip(self._types(), self._weights(), strict=True) if name == SFT)
        return self.rpo_alpha + sft

    @property
    def metric_aliases(self) -> dict[str, str]:
        """The NLL term under the name of its loss type."""
        return {"sft_loss": "nll_loss"} if SFT in self._types() else {}

    @property
    def coupled(self) -> bool:
        """Whether the loss of a pair depends on the other pairs of the global batch."""
        return any(LOSS_TYPES[name].sorts or LOSS_TYPES[name].shifts for name in self.loss_types)

    @property
    def needs_running_delta(self) -> bool:
        """Whether the loss is shifted by the running mean of the rewards."""
        return any(LOSS_TYPES[name].shifts for name in self.loss_types)

    def _types(self) -> list[str]:
        return [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type

    def _weights(self) -> list[float]:
        return [1.0] * len(self._types()) if self.loss_weights is None else self.loss_weights

    def _without(self, ability: str) -> list[str]:
        """Those of the chosen types that lack an ability; unknown ones are another rule's matter."""
        known = [name for name in self._types() if name in LOSS_TYPES]
        return [name for name in known if not getattr(LOSS_TYPES[name], ability)]

    @rule("loss_type")
    def _types_are_known(self) -> str | None:
        unknown = [name for name in self._types() if name not in LOSS_TYPES and name != SFT]
        if unknown:
            expected = ", ".join(LOSS_TYPES)
            return f"loss_type={self.loss_type!r} is not valid; expected one of {expected} or a list of them"
        if not self.loss_types:
            return f"loss_type={self.loss_type!r} has no preference loss; {SFT} only stands beside one"
        if len(set(self._types())) < len(self._types()):
            return f"loss_type={self.loss_type!r} names a type twice; give it a larger weight in loss_weights"
        return None

    @rule("loss_type", "loss_weights")
    def _a_weight_for_each_type(self) -> str | None:
        if self.loss_weights is None:
            return None
        types, weights = self._types(), self.loss_weights
        if isinstance(self.loss_type, str):
            return "loss_weights without effect: loss_type is a single type; give a list or leave them out"
        if len(types) != len(weights):
            return f"loss_weights has {len(weights)} entries and loss_type {len(types)}; give one for each"
        if not all(weights):
            return f"loss_weights={weights} has a zero; leave that type out"
        return None

    @rule("loss_type", "label_smoothing")
    def _smoothing_is_defined(self) -> str | None:
        return self._refusal("label_smoothing", "smoothing") if self.label_smoothing else None

    @rule("loss_type", "f_divergence_type", "f_alpha_divergence_coef")
    def _divergence_is_defined(self) -> str | None:
        if changed(self, "f_alpha_divergence_coef") and self.f_divergence_type != "alpha":
            return "f_alpha_divergence_coef without effect: f_divergence_type is not alpha; leave it out"
        if self.f_divergence_type == "reverse_kl":
            return None
        return self._refusal("f_divergence_type", "divergence")

    @rule("loss_type", "ld_alpha")
    def _ld_is_defined(self) -> str | None:
        return None if self.ld_alpha is None else self._refusal("ld_alpha", "ld")

    def _refusal(self, setting: str, ability: str) -> str | None:
        lacking = self._without(ability)
        if not lacking:
            return None
        legal = [name for name, kind in LOSS_TYPES.items() if getattr(kind, ability)]
        return (
            f"{setting}={getattr(self, setting)} has no meaning for loss_type={', '.join(lacking)}: it is "
            f"defined for {', '.join(legal)} only; leave it out"
        )

    @rule("loss_type", "discopop_tau")
    def _tau_belongs_to_discopop(self) -> str | None:
        if changed(self, "discopop_tau") and "discopop" not in self._types():
            return "discopop_tau without effect: loss_type is not discopop; leave it out"
        return None

    @rule("loss_type", "use_weighting")
    def _weighting_is_defined(self) -> str | None:
        sorted_types = [name for name in self._types() if name in LOSS_TYPES and LOSS_TYPES[name].sorts]
        if self.use_weighting and sorted_types:
            return (
                f"use_weighting has no meaning for loss_type={', '.join(sorted_types)}, which compares "
                "sorted values of different pairs; leave it out"
            )
        return None

    @rule("loss_type", "reference_free", "f_divergence_type")
    def _a_reference_is_not_missing(self) -> str | None:
        if not self.reference_free:
            return None
        if self.f_divergence_type != "reverse_kl":
            kind = self.f_divergence_type
            return f"reference_free: f_divergence_type={kind} is a divergence from the reference; drop one"
        kinds = {name: LOSS_TYPES[name] for name in self._types() if name in LOSS_TYPES}
        absolute = [name for name, kind in kinds.items() if kind.absolute or kind.sorts]
        if absolute:
            return (
                f"reference_free has no meaning for loss_type={', '.join(absolute)}, which needs more of "
                "the reference than one difference; leave it out"
            )
        return None

    @rule("loss_type", "loss_weights", "rpo_alpha", "nll_normalization")
    def _nll_normalization_needs_nll(self) -> str | None:
        if self.loss_weights is not None and len(self._weights()) != len(self._types()):
            return None
        return nll_refusal(self)


def nll_refusal(config: BaseConfig) -> str | None:
    """The message for an nll_normalization without an NLL term, or None."""
    if changed(config, "nll_normalization") and not config.nll_weight:
        return (
            f"nll_normalization={config.nll_normalization} without effect: the NLL term has no weight; "
            "leave it out"
        )
    return None
