"""What a model is, by the content of its files: never by its path, and never by weights in memory.

Under ZeRO-3 the weights in memory are partitions, which look alike (empty) for every model.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from ds_align.errors import ConfigError
from ds_align.file_digests import FileDigests
from ds_align.models.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ds_align.models.load import ModelSource, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def model_digest(source: ModelSource, digests: FileDigests) -> str:
    """Hash of a model's config, weights and, where it brings any, its code; downloads a model of the Hub.

    Raises ConfigError where the files cannot be read.
    """
    directory = Path(source.path) if Path(source.path).is_dir() else _download(source)
    files = [directory / "config.json", *weight_files(directory)]
    if source.trust_remote_code:
        files += directory.glob("*.py")
    return _digest_all(files, source.label, digests)


def adapter_digest(directory: Path, digests: FileDigests) -> str:
    """Hash of an adapter's settings and weights. Raises ConfigError where they cannot be read."""
    files = [path for name in (ADAPTER_CONFIG, *ADAPTER_WEIGHTS) if (path := directory / name).is_file()]
    return _digest_all(files, str(directory), digests)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of which text each token id stands for."""
    tokens = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    text = json.dumps([tokens, tokenizer.special_tokens_map], sort_keys=True, default=str)
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _download(source: ModelSource) -> Path:
    """The directory of a Hub model on this machine, as from_pretrained would find it."""
    from huggingface_hub import snapshot_download

    try:
        directory = Path(snapshot_download(source.path, allow_patterns=["*.json", "*.safetensors", "*.py"]))
        if not weight_files(directory):
            directory = Path(snapshot_download(source.path, allow_patterns=["*.json", "*.bin", "*.py"]))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{source.label}: its files cannot be had from the Hub ({' '.join(str(error).split())[:160]}); "
            "give a local directory"
        ) from error
    return directory


def _digest_all(files: list[Path], label: str, digests: FileDigests) -> str:
    try:
        return digests.digest_all(files)
    except OSError as error:
        raise ConfigError(f"{label}: {error.filename} cannot be read ({error.strerror})") from error
