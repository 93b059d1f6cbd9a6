"""Scans a data set that is made up as it is read, and prints what that took as JSON.

usage: duplicates_memory.py NUM_ROWS WORDS MEMORY_MB [KIND]; every 100th row repeats its predecessor with a
question mark more. KIND: plain, prefix (all prompts begin alike), ranked (ten pairs a prompt, one chosen
answer) or short (answers of one word).
"""

from __future__ import annotations

import json
import random
import resource
import sys
import time

from ds_align.data.duplicates import scan_duplicates
from ds_align.data.schemas import Preference

VOCABULARY = [
    "".join(random.Random(n).choices("abcdefghijklmnopqrstuvwxyz", k=2 + n % 9)) for n in range(5000)
]
# Words are about as frequent as in a language.
POOL = random.Random(0).choices(VOCABULARY, [1 / (number + 5) for number in range(len(VOCABULARY))], k=50000)
PREFIX = " ".join(VOCABULARY[:150])


class Rows:
    """Rows by number, each made from its own seed."""

    def __init__(self, num_rows: int, words: int, kind: str) -> None:
        self.num_rows, self.words, self.kind = num_rows, words, kind

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, number: int) -> Preference:
        if not 0 <= number < self.num_rows:
            raise IndexError(number)
        content = number - 1 if number % 100 == 99 else number
        prompt = text(content // 10 if self.kind == "ranked" else content, self.words // 2, 1)
        chosen = text(content // 10 if self.kind == "ranked" else content, self.words // 2, 2)
        rejected = text(content, self.words // 2, 3)
        if self.kind == "prefix":
            prompt = f"{PREFIX} {prompt}"
        if self.kind == "short":
            chosen, rejected = chosen.split()[0], rejected.split()[0] + "x"
        if content != number:
            prompt += "?"
        return Preference(f"row {number}", prompt, (chosen, rejected))


def text(seed: int, words: int, part: int) -> str:
    rng = random.Random(seed * 4 + part)
    return " ".join(rng.choices(POOL, k=words))


def main() -> None:
    num_rows, words, memory_mb = map(int, sys.argv[1:4])
    rows = Rows(num_rows, words, sys.argv[4] if len(sys.argv) > 4 else "plain")
    scan_duplicates([rows[0], rows[1]])
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    report = scan_duplicates(rows, memory_mb=memory_mb)
    seconds = time.process_time() - started
    started = time.process_time()
    for _ in rows:
        pass
    found = {
        "counts": report.counts,
        "growth_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        "seconds": seconds,
        "seconds_of_one_pass": time.process_time() - started,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
