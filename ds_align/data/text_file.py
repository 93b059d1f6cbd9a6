"""A text file whose bytes can be sought, compressed or not.

A row is read by the place of its first byte, and by any process. A compressed stream can be entered at its
beginning only, and the states of a decoder at many places (a block index) are as large as the text between
them; so one pass unpacks the file, into a temporary one that goes away with the rows that read it.
"""

from __future__ import annotations

import gzip
import os
import tempfile
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ds_align.errors import DataError

COMPRESSIONS = (".gz", ".zst")
# Equal bytes shrink by up to 40000 times, and zstandard hands out at once what a block of this size holds.
_ZSTD_BLOCK_BYTES = 2**10


class TextFile:
    """A file by its path; str() is what messages call it. A copy that was pickled removes nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._plain = None if path.suffix.lower() in COMPRESSIONS else path

    def __str__(self) -> str:
        return str(self.path)

    def __getstate__(self) -> dict[str, Path]:
        return {"path": self.path, "_plain": self._unpacked()}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.path, self._plain = state["path"], state["_plain"]

    def open(self) -> BinaryIO:
        """The text as bytes. Raises DataError for a compressed file that is damaged or has no room."""
        return self._unpacked().open("rb")

    def _unpacked(self) -> Path:
        if self._plain is None:
            self._plain = _unpack(self.path)
            weakref.finalize(self, self._plain.unlink, missing_ok=True)
        return self._plain


def _unpack(path: Path) -> Path:
    """A temporary file with what `path` holds."""
    folder = Path(tempfile.gettempdir())
    try:
        descriptor, name = tempfile.mkstemp(prefix="ds-align-", suffix=".unpacked", dir=folder)
        try:
            _write_unpacked(path, descriptor)
        except BaseException:
            Path(name).unlink()
            raise
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: cannot be unpacked ({error}); get or compress the file again") from error
    except OSError as error:
        raise DataError(
            f"{path}: cannot be unpacked into {folder} ({error.strerror or error}); set TMPDIR to a "
            "directory with room"
        ) from error
    return Path(name)


def _write_unpacked(path: Path, descriptor: int) -> None:
    with os.fdopen(descriptor, "wb") as plain, path.open("rb") as packed:
        for block in _gzip_blocks(packed) if path.suffix.lower() == ".gz" else _zstd_blocks(packed):
            plain.write(block)


def _gzip_blocks(packed: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=packed) as stream:
        while block := stream.read(2**20):
            yield block


def _zstd_blocks(packed: BinaryIO) -> Iterator[bytes]:
    import zstandard

    # The library's own stream takes a file that was cut off for one that ended.
    frame = None
    try:
        while block := packed.read(_ZSTD_BLOCK_BYTES):
            while block:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(block)
                block = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from error
    if frame is not None:
        raise EOFError("the file ends inside of a frame")
