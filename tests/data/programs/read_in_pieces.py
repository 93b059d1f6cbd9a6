"""Reads a source from the first row to the last and says how far that raised the peak of this process.

usage: read_in_pieces.py SMALL LARGE; prints [rows, grown bytes] of LARGE as JSON. SMALL is read first, so
that what a library needs once is not counted.
"""

from __future__ import annotations

import json
import resource
import sys

from ds_align.data.readers import Record, open_records


def read(path: str) -> int:
    """The number of rows, all of which must be good."""
    number = 0
    for row in open_records(path).rows():
        assert isinstance(row, Record), row
        number += 1
    return number


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    small, large = sys.argv[1:]
    read(small)
    before = peak()
    print(json.dumps([read(large), peak() - before]))


if __name__ == "__main__":
    main()
