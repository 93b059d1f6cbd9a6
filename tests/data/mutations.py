"""Files with something wrong in them: bytes, lines and values of good files, changed at random by a seed."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable

import zstandard

from tests.data import formats

# What stands in the way of readers: controls, marks, numbers that do not fit, halves of characters.
_PIECES = (
    *(b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n\n", b"\x1a", b"\x85", b"\xe2\x80\xa8", b"\xd9"),
    *(b"\\ud800", b"\\u0000", b"\xe2\x80\x8d\xe2\x80\xae", b'"', b"'", b",", b"{", b"}", b"[", b"]", b":"),
    *(b"null", b"NaN", b"-Infinity", b"1e999", b"9" * 400, b"true", b"{}", b"[]", b'""', b"[[" * 2000),
)
_VALUES: tuple[object, ...] = (
    *(None, True, 0, -1, 1.5, float("nan"), 2**70, "", " \t\n", "\x00", "x", [], {}, [[]], [None]),
    *([{"role": "user"}], [{"role": "robot", "content": "x"}], [{"role": "assistant", "content": 3}]),
    *([{"from": "gpt", "value": "x"}], {"role": "assistant", "content": "x"}, ["a", "b"], {"a": {"b": []}}),
)
_NAMES = ("prompt", "chosen", "rejected", "completion", "label", "completions", "scores", "ranks", "messages")
_NAMES += (
    "conversations",
    "prompt_ids",
    "chosen_ids",
    "tools",
    "system",
    "chosen_score",
    "kl_completion",
    "",
)


def rows(rng: random.Random) -> list[dict]:
    """A few good rows of one form, some of whose values and names were changed."""
    number = rng.randint(1, 6)
    form = rng.choice((_pair, _chat, _labelled, _ranked, _ids))
    found = [form(rng, place) for place in range(number)]
    for row in found:
        if rng.random() < 0.3:
            _spoil(row, rng)
    return found


def spoiled_file(rng: random.Random, name: str) -> bytes:
    """The rows in the form of `name`, with up to eight faults in the bytes, before or after packing."""
    good = rows(rng)
    pack: Callable[[bytes], bytes] | None = None
    if name.endswith(".gz"):
        pack = gzip.compress
    elif name.endswith(".zst"):
        pack = zstandard.ZstdCompressor().compress
    plain = name.removesuffix(".gz").removesuffix(".zst")
    try:
        content = formats.PLAIN[plain](good)
    except (ValueError, TypeError, OverflowError, NotImplementedError):
        # Parquet has no column for such a mixture of values.
        content = formats.PLAIN[plain]([_pair(rng, place) for place in range(3)])
    if pack is None:
        return _spoil_bytes(content, rng)
    return pack(_spoil_bytes(content, rng)) if rng.random() < 0.7 else _spoil_bytes(pack(content), rng)


def _words(rng: random.Random) -> str:
    return " ".join(
        rng.choice(("the", "cat", "القاهرة", "mat", "貓", "é", "!")) for _ in range(rng.randint(1, 5))
    )


def _pair(rng: random.Random, number: int) -> dict:
    return {"prompt": f"{number} {_words(rng)}", "chosen": _words(rng), "rejected": _words(rng)}


def _chat(rng: random.Random, number: int) -> dict:
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    pair = _pair(rng, number)
    return {name: [{"role": role, "content": pair[name]}] for name, role in roles.items()}


def _labelled(rng: random.Random, number: int) -> dict:
    return {"prompt": f"{number}", "completion": _words(rng), "label": rng.random() < 0.5}


def _ranked(rng: random.Random, number: int) -> dict:
    answers = [_words(rng) for _ in range(rng.randint(1, 4))]
    return {"prompt": f"{number}", "completions": answers, "scores": [rng.randint(0, 3) for _ in answers]}


def _ids(rng: random.Random, _number: int) -> dict:
    return {name: [rng.randint(0, 40)] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}


def _spoil(row: dict, rng: random.Random) -> None:
    name = rng.choice(list(row))
    kind = rng.randrange(4)
    if kind == 0:
        del row[name]
    elif kind == 1:
        row[name] = rng.choice(_VALUES)
    elif kind == 2:
        row[rng.choice(_NAMES)] = row.pop(name)
    else:
        row[rng.choice(_NAMES)] = rng.choice(_VALUES)


def _spoil_bytes(content: bytes, rng: random.Random) -> bytes:
    found = bytearray(content)
    for _ in range(rng.randint(0, 8)):
        start = rng.randrange(len(found) + 1)
        stop = min(len(found), start + rng.choice((1, 1, 2, 8, 64)))
        kind = rng.randrange(5)
        if kind == 0:
            del found[start:stop]
        elif kind == 1:
            found[start:start] = rng.choice(_PIECES)
        elif kind == 2:
            found[start:stop] = rng.randbytes(stop - start)
        elif kind == 3:
            found[start:start] = found[start:stop] * 2
        elif rng.random() < 0.2:
            del found[start:]
    return bytes(found)


def as_json_lines(content: bytes) -> int:
    """How many rows a JSONL file has for whoever counts its lines that are not blank."""
    return sum(bool(line.strip()) for line in content.split(b"\n"))


def describe(seed: int, name: str, content: bytes) -> str:
    """For a failing test: how to make the file again, and how it begins."""
    return json.dumps({"seed": seed, "name": name, "begins": repr(content[:200])})
