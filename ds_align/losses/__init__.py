"""The preference losses as pure functions: one value a pair or example, torch alone, no reduction."""

from __future__ import annotations

from .base import Logps, LossOutput, PairedLogps, UnpairedLogps
from .cpo import cpo_loss
from .dpo import dpo_loss
from .ipo import ipo_loss
from .kto import kto_loss
from .simpo import simpo_loss

__all__ = [
    "Logps",
    "LossOutput",
    "PairedLogps",
    "UnpairedLogps",
    "cpo_loss",
    "dpo_loss",
    "ipo_loss",
    "kto_loss",
    "simpo_loss",
]
