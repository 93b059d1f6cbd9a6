"""MinHash signatures of texts (Broder 1997), many texts at once: rows that share a band key may be alike.

The features of a text are its pairs of neighbouring words, of neighbouring characters where a script writes
no spaces. Two texts whose feature sets have Jaccard similarity J share one minimum with probability J; a band
key holds several minima, of each field of a row, so that it is shared with the product of their J.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

NUM_BANDS = 64
# Minima that a band takes of each field: a row has one prompt, and one or two completions.
MINIMA = {1: (4,), 2: (2, 3), 3: (1, 2, 2)}
_END = "\n"
_SPACE, _WORD, _SINGLE, _TRIPLE = range(4)
# Scripts whose words are not parted by blanks. A letter of the first says about as much as a word; of the
# others, three.
_SINGLE_RANGES = (
    (0x2E80, 0x3004),
    (0x3008, 0xA4D0),
    (0xF900, 0xFB00),
    (0x1B000, 0x1B170),
    (0x20000, 0x30000),
)
_TRIPLE_RANGES = ((0x0E00, 0x0F00), (0x1000, 0x10A0), (0x1780, 0x1800), (0x19E0, 0x1A00))
_TABLE_SIZE = 0x30000
_WORD_POWERS = 64


def band_keys(fields: Sequence[Sequence[str]], bands: range) -> np.ndarray:
    """uint32 [len(bands), n]: the band keys of n rows, whose texts are fields[f][row] without line breaks."""
    minima = MINIMA[len(fields)]
    factors, shifts = _permutations(sum(minima))
    keys = np.zeros((len(bands), len(fields[0])), dtype=np.uint32)
    column = 0
    for texts, count in zip(fields, minima, strict=True):
        features, starts = _features(texts)
        permuted = np.empty_like(features)
        for number in range(column, column + count):
            for place, band in enumerate(bands):
                np.multiply(features, factors[band, number], out=permuted)
                np.add(permuted, shifts[band, number], out=permuted)
                lowest = np.minimum.reduceat(permuted, starts)
                keys[place] = _mix((keys[place] ^ lowest) * np.uint32(0x9E3779B1) + np.uint32(number + 1))
        column += count
    return keys


def _features(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """uint32 hashes of all features, text after text, each with one at least, and where each text begins."""
    lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts)) + len(_END)
    joined = _END + "".join(text + _END for text in texts)
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    tokens, places = _tokens(codes)
    features = _mix(tokens[:-1] * np.uint32(0x85EBCA6B) ^ (tokens[1:] * np.uint32(0xC2B2AE35) + np.uint32(1)))
    # Each feature belongs to the text of its second token; each text ends with a token of its own.
    begins = np.concatenate(([1], np.cumsum(lengths)[:-1] + 1))
    return features, np.searchsorted(places, begins) - 1


def _tokens(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(uint32 hashes of the tokens, the place of the first character of each)."""
    kinds = _character_kinds()[np.minimum(codes, _TABLE_SIZE)]
    is_word = kinds == _WORD
    begins = kinds != _SPACE
    begins[1:] &= ~(is_word[1:] & is_word[:-1])
    places = np.flatnonzero(begins)
    mixed = _mix(codes + np.uint32(1))
    within = np.arange(len(codes)) - np.repeat(places, np.diff(places, append=len(codes)))
    weighted = mixed * _powers()[within % _WORD_POWERS]
    weighted[kinds == _SPACE] = 0
    tokens = np.add.reduceat(weighted, places)
    triples = np.flatnonzero(kinds[places] == _TRIPLE)
    if len(triples):
        at, powers = places[triples], _powers()
        # A text ends with a line break, so that only the third letter can be one of the next text.
        third = np.where(codes[at + 1] == ord(_END), 0, mixed[np.minimum(at + 2, len(mixed) - 1)])
        tokens[triples] = mixed[at] * powers[0] + mixed[at + 1] * powers[1] + third * powers[2]
    return tokens, places


@lru_cache(maxsize=1)
def _character_kinds() -> np.ndarray:
    """uint8 [code point]: space, part of a word, or a token by itself; the last entry is for all beyond."""
    kinds = np.full(_TABLE_SIZE + 1, _SINGLE, dtype=np.uint8)
    for code in range(_SINGLE_RANGES[-1][0]):
        character = chr(code)
        if unicodedata.category(character)[0] in "LMN" or character == "_":
            kinds[code] = _WORD
        elif character.isspace() and character != _END:
            kinds[code] = _SPACE
    for kind, ranges in ((_SINGLE, _SINGLE_RANGES), (_TRIPLE, _TRIPLE_RANGES)):
        for first, stop in ranges:
            kinds[first:stop] = kind
    return kinds


@lru_cache(maxsize=1)
def _powers() -> np.ndarray:
    return np.cumprod(np.full(_WORD_POWERS, 0x01000193, dtype=np.uint32), dtype=np.uint32)


@lru_cache(maxsize=4)
def _permutations(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Odd factors and shifts of maps of the 32-bit numbers onto themselves, uint32 [NUM_BANDS, count]."""
    drawn = np.random.default_rng(0x5EED).integers(0, 2**32, (2, NUM_BANDS, count), dtype=np.uint32)
    return drawn[0] | np.uint32(1), drawn[1]


def _mix(values: np.ndarray) -> np.ndarray:
    """Spreads each of 32 bits over all of them (the last steps of MurmurHash3)."""
    values = values ^ (values >> np.uint32(16))
    values *= np.uint32(0x85EBCA6B)
    values ^= values >> np.uint32(13)
    values *= np.uint32(0xC2B2AE35)
    values ^= values >> np.uint32(16)
    return values
