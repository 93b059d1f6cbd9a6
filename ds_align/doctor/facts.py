"""What the checks look at: everything is gathered first, so that a check is a function of values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ds_align.config import METHODS, BaseConfig
from ds_align.data import PreferenceDataset

if TYPE_CHECKING:
    from ds_align.data.duplicates import DuplicateReport, OverlapReport


@dataclass(frozen=True, slots=True)
class TextFacts:
    """What the rows say before they are tokens. garbled: origins of the first rows with mojibake.

    dialects: share by label; None where nothing was classified. remarks: what the user should know of that.
    """

    num_rows: int
    num_garbled: int = 0
    garbled: tuple[str, ...] = ()
    duplicates: DuplicateReport | None = None
    overlap: OverlapReport | None = None
    dialects: dict[str, float] | None = None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FirstScores:
    """Policy against reference before the first step, over all ranks.

    mean_difference, max_difference: of |log pi - log ref| of a token, in nats; None without a reference.
    chosen_logp: mean log-prob of a chosen token under the reference, else the policy; None without one.
    loss: mean loss of the preferences. precision: of the models, such as "float32".
    """

    num_preferences: int
    num_tokens: int
    precision: str
    mean_difference: float | None
    max_difference: float | None
    chosen_logp: float | None
    loss: float | None = None
    same_weights: bool = True


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """Where the run takes place; bytes, and None for what is not known.

    state_bytes: weights, gradients, optimizer and reference of one rank; device_bytes: what its device has.
    disk_needed, disk_free: for the model and up to three checkpoints. faults: what was found not to work.
    """

    versions: tuple[dict[str, str], ...] = ()
    num_parameters: int | None = None
    state_bytes: int | None = None
    device_bytes: int | None = None
    disk_needed: int | None = None
    disk_free: int | None = None
    output_dir: str = ""
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Facts:
    """All that is known of a run; None for what was not looked at.

    num_steps: optimizer steps of the whole run. sample_rows: how many rows are decoded where all would take
    too long. at_start: a run begins; nobody asked for the doctor alone. template_closes_turns: whether the
    chat template ends every assistant turn with the EOS.
    """

    config: BaseConfig
    world_size: int = 1
    num_steps: int | None = None
    train: PreferenceDataset | None = None
    evaluation: PreferenceDataset | None = None
    eval_set: str | None = None
    tokenizer: Any = None
    template_closes_turns: bool = False
    sample_rows: int = 256
    at_start: bool = False
    texts: TextFacts | None = None
    scores: FirstScores | None = None
    machine: MachineFacts = field(default_factory=MachineFacts)

    @property
    def reads_pairs(self) -> bool:
        """Whether a preference is a chosen and a rejected answer."""
        return METHODS[self.config.method].inputs == "pairs"

    def has(self, need: str) -> bool:
        """Whether that fact was gathered."""
        return getattr(self, need) is not None
