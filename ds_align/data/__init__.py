"""Files to token ids: `load_preferences` reads a source into a PreferenceDataset of Pair or Unpaired rows.

The way of a row: readers (source to records) -> schemas (records to preferences) -> tokenize (to ids) ->
truncate (to length) -> dataset (flat arrays).
"""

from __future__ import annotations

from ds_align.data.dataset import DataFields, PreferenceDataset, load_preferences
from ds_align.data.readers import available_splits
from ds_align.data.tables import TokenTable
from ds_align.data.tokenize import BUILTIN_CHAT_TEMPLATE, PreferenceTokenizer

__all__ = [
    "BUILTIN_CHAT_TEMPLATE",
    "DataFields",
    "PreferenceDataset",
    "PreferenceTokenizer",
    "TokenTable",
    "available_splits",
    "load_preferences",
]
