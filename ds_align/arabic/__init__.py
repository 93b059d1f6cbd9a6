"""Arabic dialects: which one a row is in, and data sets in which they have given shares.

The way of a row: record_text (what it is judged by) -> its column, classifiers or scorer (which looks its
words up in lexicon, by the keys of normalise) -> annotate -> shares (how many of each) -> balance (which
rows). Each name is loaded at its first use; torch is imported by a Hugging Face classifier alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ds_align.arabic.balance import ArabicDialectDatasetProcessor
    from ds_align.arabic.report import BalanceReport
    from ds_align.arabic.scorer import Label, label_text
    from ds_align.arabic.training_rows import DialectSubset

_LAZY = {
    "ArabicDialectDatasetProcessor": "ds_align.arabic.balance",
    "BalanceReport": "ds_align.arabic.report",
    "DialectSubset": "ds_align.arabic.training_rows",
    "Label": "ds_align.arabic.scorer",
    "label_text": "ds_align.arabic.scorer",
}

__all__ = ["ArabicDialectDatasetProcessor", "BalanceReport", "DialectSubset", "Label", "label_text"]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'ds_align.arabic' has no attribute {name!r}")
