"""Texts of several scripts, small changes to them, and preferences that repeat others, from a seed."""

from __future__ import annotations

import random

from ds_align.data.schemas import Preference

ALPHABETS = {
    "latin": "abcdefghijklmnopqrstuvwxyzäé",
    "arabic": "ابتثجحخدذرزسشصضطظعغفقكلمنهوي",
    "devanagari": "कखगघचछजझटठडढणतथदधनपफबभमयरलवशषसह",
    "hangul": "가나다라마바사아자차카타파하거너더러머버서어저처커터퍼허",
}
UNSPACED = {
    "han": "".join(chr(0x4E00 + 7 * number) for number in range(1500)),
    "kana": "".join(chr(0x3042 + number) for number in range(70)),
    "thai": "".join(chr(0x0E01 + number) for number in range(40)),
}
SCRIPTS = (*ALPHABETS, *UNSPACED)
VOCABULARIES = {
    name: ["".join(random.Random(f"{name}{n}").choices(letters, k=2 + n % 7)) for n in range(1500)]
    for name, letters in ALPHABETS.items()
}


def text(rng: random.Random, script: str, length: int) -> str:
    """`length` words, or three times as many characters where a script has no blanks."""
    if script in UNSPACED:
        return "".join(rng.choices(UNSPACED[script], k=3 * length))
    return " ".join(rng.choices(VOCABULARIES[script], k=length))


def changed(rng: random.Random, whole: str, times: int) -> str:
    """The text with some words (or characters, without blanks) replaced, doubled or left out."""
    blank = " " if " " in whole else ""
    words = whole.split() if blank else list(whole)
    for _ in range(times):
        place = rng.randrange(len(words))
        kind = rng.randrange(3)
        if kind == 0:
            words[place] = words[rng.randrange(len(words))]
        elif kind == 1:
            words.insert(place, words[place])
        elif len(words) > 1:
            del words[place]
    return blank.join(words)


def pair(number: int, prompt: str, chosen: str, rejected: str) -> Preference:
    return Preference(f"f:{number}", prompt, (chosen, rejected))


def random_rows(rng: random.Random, number: int) -> list[Preference]:
    """Fresh rows, and rows that repeat, turn round or change one word or letter of an earlier one."""
    rows: list[Preference] = []
    for index in range(number):
        kind = rng.random()
        if not rows or kind < 0.4:
            script = rng.choice(SCRIPTS)
            fields = [text(rng, script, rng.randint(5, 16)) for _ in range(3)]
        else:
            old = rng.choice(rows)
            fields = [old.prompt, *old.completions]
        if kind >= 0.9:
            fields[1:] = fields[:0:-1]
            if kind >= 0.95:
                fields[0] = fields[0].upper() + " "
        elif kind >= 0.85:
            fields[2] = fields[1]
        elif kind >= 0.8:
            fields[2] = fields[1] + "."
        elif kind >= 0.55:
            place = rng.randrange(3)
            fields[place] = changed(rng, fields[place], 1)
        rows.append(pair(index, *fields))
    return rows
