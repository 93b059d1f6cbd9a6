"""Where a DeepSpeed JSON is found, and how it is read: a path, a shipped file's name, or a dict."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_align.config.schema import nearest
from ds_align.errors import ConfigError


def ds_config_directories() -> list[Path]:
    """Return where shipped files lie: inside the installed package, or next to it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return [path for path in (package / "ds_configs", package.parent / "ds_configs") if path.is_dir()]


def find_ds_config(name: str, *, setting: str = "ds_config") -> Path:
    """Return the file that `name` means: a path, or a shipped file ("zero3", "ds_configs/zero3.json").

    Raises ConfigError where there is neither, with the nearest shipped names.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = {
        file.stem: file for folder in reversed(ds_config_directories()) for file in folder.glob("*.json")
    }
    if str(path.parent) in (".", "ds_configs") and path.name.removesuffix(".json") in shipped:
        return shipped[path.name.removesuffix(".json")]
    raise ConfigError(
        f"{setting} {name!r}: no such file; expected a JSON file or one of {', '.join(sorted(shipped))}"
        f"{nearest(path.name.removesuffix('.json'), shipped)}"
    )


def read_ds_config(
    given: str | Mapping[str, Any], *, setting: str = "ds_config"
) -> tuple[str, dict[str, Any]]:
    """Return the name for messages and the values of a DeepSpeed JSON, given as a path, a name or a dict.

    Raises ConfigError for a missing file, invalid JSON (with its line) or a key that is given twice.
    """
    if isinstance(given, Mapping):
        return setting, copy.deepcopy(dict(given))
    path = find_ds_config(given, setting=setting)
    twice: list[str] = []

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        names = [key for key, _ in pairs]
        twice.extend(key for key in values if names.count(key) > 1)
        return values

    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=build)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno}); mend the file"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}; expected a JSON file") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(values).__name__}; mend the file")
    if twice:
        raise ConfigError(f"{path}: given twice: {', '.join(twice)}; keep one of each")
    return str(path), values
