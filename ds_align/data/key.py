"""What the tokens of a source depend on, as one hash: its content and every setting that can change a token.

Paths, times of files and settings of the training have no part in it.
"""

from __future__ import annotations

import datetime as dt
import inspect
import json
import sys
import tempfile
from dataclasses import asdict
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_align.data.build import Job
from ds_align.data.directory import file_format
from ds_align.data.hub import load_with_datasets
from ds_align.data.ranked import PairRules
from ds_align.data.readers import check_place
from ds_align.data.schemas import Columns
from ds_align.data.store import FORMAT
from ds_align.data.tokenize import read_chat_template
from ds_align.data.truncate import Limits
from ds_align.errors import ConfigError
from ds_align.file_digests import FileDigests

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PACKAGES = ("transformers", "tokenizers", "jinja2", "numpy")
# A template that asks for the time gives other tokens another day.
_CLOCK = "strftime_now"
_PLACES = ("name_or_path", "tokenizer_file", "vocab_file", "merges_file", "spm_file", "cache_dir")


def entry_key(job: Job, source: str) -> str:
    """Hash of all that the tokens of a job depend on; source: the hash of its files. Raises ConfigError."""
    config = job.config
    parts = {
        "format": FORMAT,
        "source": source,
        "split": job.split,
        "inputs": job.inputs,
        "columns": asdict(Columns.from_config(config)),
        "limits": asdict(Limits.from_config(config)),
        "rules": asdict(PairRules.from_config(config)),
        "deduplicate": job.deduplicate,
        "subset": None if job.subset is None else job.subset.key,
        "bad_rows": [config.on_bad_rows, config.max_bad_fraction],
        "tokenizer": None if job.tokenizer is None else _tokenizer_state(job.tokenizer),
        "template": _template(job),
        "programs": [sys.version, code_digest(), *(f"{name} {version(name)}" for name in _PACKAGES)],
    }
    return _hash(parts)


def source_digest(source: str | Path, digests: FileDigests) -> str:
    """Hash of a source's content and kind, wherever it lies. Raises DataError where it cannot be a source."""
    place = check_place(source)
    if place.path is None:
        tables = load_with_datasets(place)
        return _hash(
            {
                split: [digests.digest(Path(file["filename"])) for file in rows.cache_files]
                for split, rows in tables.items()
            }
        )
    if not place.path.is_dir():
        return _hash([*file_format(place.path), digests.digest(place.path)])
    files = sorted(file for file in place.path.rglob("*") if file.is_file())
    named = [[file.relative_to(place.path).as_posix(), digests.digest(file)] for file in files]
    return _hash([place.config, named])


def code_digest() -> str:
    """Hash of this room's own code: whoever changes how rows are read or cut makes old entries void."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return _hash([[file.name, sha256(file.read_bytes()).hexdigest()] for file in files])


def _template(job: Job) -> list[Any]:
    try:
        given = read_chat_template(job.config.chat_template)
    except ConfigError:
        # Token ids never ask for it; who does raises the error.
        given = job.config.chat_template
    own = getattr(job.tokenizer, "chat_template", None)
    reads_clock = _CLOCK in f"{given}{own}"
    return [given, own, dt.datetime.now().astimezone().date().isoformat() if reads_clock else None]


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    state = {
        "class": f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
        "code": [_own_code(kind) for kind in type(tokenizer).__mro__],
        "special": {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())},
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "size": len(tokenizer),
    }
    if tokenizer.is_fast:
        # A call that cuts or pads leaves its wishes in the tokenizer; this one takes them back.
        tokenizer("a", padding=False, truncation=False)
        return state | {"whole": sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()}
    settings = {name: value for name, value in tokenizer.init_kwargs.items() if name not in _PLACES}
    return state | {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "settings": settings,
        "files": _vocabulary_files(tokenizer),
    }


def _own_code(kind: type) -> str | None:
    """Hash of the file of a class that is neither Python's nor transformers', whose versions are known."""
    if kind.__module__.partition(".")[0] in ("transformers", "builtins"):
        return None
    try:
        return sha256(Path(inspect.getfile(kind)).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return None


def _vocabulary_files(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Merges and scores are in no method's result, only in the files that the tokenizer writes."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            tokenizer.save_vocabulary(directory)
        except (NotImplementedError, ValueError, AttributeError, TypeError):
            return []
        return [
            f"{path.name} {sha256(path.read_bytes()).hexdigest()}"
            for path in sorted(Path(directory).iterdir())
        ]


def _hash(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=repr)
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
