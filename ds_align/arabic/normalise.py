"""Keys of Arabic words, for counting and comparing alone: no text that is trained on passes through here.

A key folds what writers choose freely: presentation forms, vowel signs, tatweel, joiners and direction marks,
the seat of a hamza, ta marbuta and alef maqsura. Two spellings of a word have one key; two words may, too.
"""

from __future__ import annotations

import re
import unicodedata

# Vowel signs and Quranic marks; tatweel; joiners, direction marks and the byte order mark.
_DROPPED = re.compile(
    "[\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06dc\u06df-\u06e8\u06ea-\u06ed\u0640"
    "\u200b-\u200f\u061c\u202a-\u202e\u2060\u2066-\u2069\ufeff]"
)
_FOLDED = str.maketrans("أإآٱةىؤئ", "ااااهيوي")
_WORD = re.compile(r"[^\W\d_]+")
_ARABIC = re.compile("[\u0621-\u064a\u066e-\u06d3\u06d5\u06fa-\u06fc\u0750-\u077f]")
# Letters of Arabic, and those that Arabs add for sounds of other languages.
_OF_ARABIC = re.compile("[\u0621-\u064aپچڤڨگڭ]+")


def fold(text: str) -> str:
    """The key of a text: NFKC without signs and marks, letters folded; never longer than NFKC makes it."""
    return _DROPPED.sub("", unicodedata.normalize("NFKC", text)).translate(_FOLDED)


def words(text: str) -> list[str]:
    """Keys of the words of a text, in order; digits and punctuation part words and are left out."""
    return _WORD.findall(fold(text))


def is_arabic_script(word: str) -> bool:
    """Whether the key of a word holds a letter of the Arabic script, of whatever language."""
    return _ARABIC.search(word) is not None


def is_arabic(word: str) -> bool:
    """Whether the key of a word has letters that Arabic is written with alone (Persian ی and ک are not)."""
    return _OF_ARABIC.fullmatch(word) is not None
