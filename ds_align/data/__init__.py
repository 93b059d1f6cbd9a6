"""Files to token ids: `load_preferences` reads a source into a PreferenceDataset of Pair or Unpaired rows.

The way of a row: readers (source to records) -> subset (which of them) -> schemas (records to preferences) ->
tokenize (to ids) -> truncate (to length) -> chunks (flat arrays of some rows) -> spool (of all rows) -> store
(on disk) -> dataset; mixture joins several of those. Each name is loaded at its first use: the processes that
tokenize do without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ds_align.data.build import DataFields
    from ds_align.data.cache import available_splits
    from ds_align.data.dataset import Part, PreferenceDataset, load_preferences
    from ds_align.data.hub import with_choice
    from ds_align.data.mixture import load_mixture
    from ds_align.data.tables import TokenTable
    from ds_align.data.tokenize import BUILTIN_CHAT_TEMPLATE, PreferenceTokenizer

_LAZY = {
    "BUILTIN_CHAT_TEMPLATE": "ds_align.data.tokenize",
    "DataFields": "ds_align.data.build",
    "Part": "ds_align.data.dataset",
    "PreferenceDataset": "ds_align.data.dataset",
    "PreferenceTokenizer": "ds_align.data.tokenize",
    "TokenTable": "ds_align.data.tables",
    "available_splits": "ds_align.data.cache",
    "load_mixture": "ds_align.data.mixture",
    "load_preferences": "ds_align.data.dataset",
    "with_choice": "ds_align.data.hub",
}

__all__ = [
    "BUILTIN_CHAT_TEMPLATE",
    "DataFields",
    "Part",
    "PreferenceDataset",
    "PreferenceTokenizer",
    "TokenTable",
    "available_splits",
    "load_mixture",
    "load_preferences",
    "with_choice",
]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'ds_align.data' has no attribute {name!r}")
