"""Model directories and tokenizers: checked before anything large is allocated, then loaded."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ds_align import distributed
from ds_align.errors import ConfigError
from ds_align.models.adapter_files import ADAPTER_CONFIG, is_adapter_directory

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model comes from: a local directory or a Hub id, and what it is."""

    path: str
    config: PreTrainedConfig
    trust_remote_code: bool
    label: str

    @classmethod
    def open(
        cls, path: str, *, trust_remote_code: bool = False, setting: str = "model_name_or_path"
    ) -> ModelSource:
        """Reads the model's config and checks that its weights are there and whole; loads no weights.

        setting: the field that names the model, for messages. Raises ConfigError for a missing directory, a
        missing or broken config and missing or broken weight files.
        """
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig

        directory, label = Path(path), f"{setting}={path!r}"
        if directory.is_dir():
            _check_directory(directory, label)
        elif _is_local(path):
            found = "a file, not a directory" if directory.is_file() else "no such directory"
            raise ConfigError(f"{label}: {found}; give a Hugging Face model directory or a Hub id")
        elif distributed.is_main():
            print(
                f"{label}: no such directory here, asking the Hugging Face Hub", file=sys.stderr, flush=True
            )
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, StrictDataclassError) as error:
            raise ConfigError(
                f"{label}: no usable model config ({_one_line(error)}); "
                "give a Hugging Face model directory or a Hub id that this machine can reach"
            ) from error
        return cls(path, config, trust_remote_code, label)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each weight by name; the model is built without memory."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, trust_remote_code=self.trust_remote_code)
        return {name: tuple(weight.shape) for name, weight in model.named_parameters()}

    def load(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model with its weights in dtype; partitioned on the way when a ZeRO-3 context is active.

        Collective: every rank must call this. Raises ConfigError where the files lack weights of the
        architecture or hold them in another shape, which transformers would fill with random numbers.
        """
        return distributed.agree(lambda: self._load(dtype))

    def _load(self, dtype: torch.dtype) -> PreTrainedModel:
        from transformers import AutoModelForCausalLM

        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                self.path, dtype=dtype, trust_remote_code=self.trust_remote_code, output_loading_info=True
            )
        except RuntimeError as error:
            # Weights of another shape have no exception of their own; anything else is not the user's.
            first = next((line for line in str(error).splitlines() if "size mismatch" in line), None)
            if first is None:
                raise
            raise ConfigError(
                f"{self.label}: the weights do not fit config.json ({first.strip().rstrip('.')}); "
                "give the config that was saved with the weights"
            ) from error
        missing = sorted(found["missing_keys"])
        if missing:
            raise ConfigError(
                f"{self.label}: {len(missing)} weights of the model are not in its files "
                f"({', '.join(missing[:3])}); give whole weights, or their own config.json"
            )
        return model


def _is_local(path: str) -> bool:
    """Whether a name can only be a path: a Hub id is `name` or `owner/name`."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).is_file()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).removesuffix(".")


def _check_directory(directory: Path, label: str) -> None:
    if is_adapter_directory(directory):
        raise ConfigError(
            f"{label}: holds {ADAPTER_CONFIG} where a whole model is needed; merge the adapter into its base "
            "(merge_and_unload of peft) and give the result"
        )
    if not (directory / "config.json").is_file():
        raise ConfigError(f"{label}: no config.json; give a directory written by save_pretrained")
    files = weight_files(directory)
    if not files:
        raise ConfigError(
            f"{label}: config.json is there but no weights; "
            f"expected one of {', '.join(_WEIGHT_FILES)}; copy the weights into the directory"
        )
    for file in files:
        if file.suffix == ".safetensors":
            _check_safetensors(file)


def weight_files(directory: Path) -> list[Path]:
    """The files that transformers reads: safetensors first, in one piece first; none where there are none.

    Raises ConfigError for an index that cannot be read or names shards that are not there.
    """
    first = next((path for name in _WEIGHT_FILES if (path := directory / name).is_file()), None)
    if first is None:
        return []
    return _shards(first) if first.name.endswith(".index.json") else [first]


def _shards(index: Path) -> list[Path]:
    """The weight files that an index names; raises ConfigError where it cannot be read or one is missing."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{index}: not an index of weight files ({type(error).__name__}: {error}); "
            "copy it again from where the model came from"
        ) from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ConfigError(
            f"{index}: {len(missing)} of {len(names)} shards are missing ({', '.join(missing[:3])}); "
            "copy them into the directory"
        )
    return [index.parent / name for name in names]


def _check_safetensors(file: Path) -> None:
    """Reads the header, which says how long the file must be; raises ConfigError where that is not so."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{file}: not a whole safetensors file of {file.stat().st_size} bytes ({_one_line(error)}); "
            "copy or download it again"
        ) from error


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory or Hub id. Raises ConfigError where there is none."""
    from transformers import AutoTokenizer

    remedy = "give --tokenizer_name a directory that holds one"
    if _is_local(path) and not Path(path).is_dir():
        raise ConfigError(f"tokenizer {path!r}: no such directory; {remedy}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"tokenizer {path!r} cannot be loaded ({_one_line(error)}); {remedy}") from error
    # Without its files transformers makes an empty tokenizer of the model's kind, and no error.
    files = sorted(set(tokenizer.vocab_files_names.values()))
    if Path(path).is_dir() and files and not any((Path(path) / name).is_file() for name in files):
        raise ConfigError(
            f"tokenizer {path!r}: no tokenizer in it; expected one of {', '.join(files)}; {remedy}"
        )
    return tokenizer
