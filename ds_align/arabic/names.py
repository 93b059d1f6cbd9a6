"""Names that data sets and classifiers have for the labels."""

from __future__ import annotations

from collections.abc import Mapping

from ds_align.config.dialects import DIALECTS
from ds_align.config.schema import nearest
from ds_align.errors import ConfigError, DataError

# As corpora of the field spell them, without regard to case.
_USUAL = {
    "modern standard arabic": "msa",
    "standard": "msa",
    "egyptian": "egy",
    "gulf": "glf",
    "gul": "glf",
    "khaleeji": "glf",
    "levantine": "lev",
    "lav": "lev",
    "maghrebi": "mgr",
    "maghribi": "mgr",
    "mag": "mgr",
    "mgh": "mgr",
    "nor": "mgr",
}


class LabelNames:
    """Foreign name to label: the user's map first, then the labels and their usual names.

    Raises ConfigError for a map to something that is no label.
    """

    def __init__(self, label_map: Mapping[str, str] | None = None) -> None:
        self._map = dict(label_map or {})
        for name, label in self._map.items():
            if label not in DIALECTS:
                raise ConfigError(
                    f"label_map: {name!r} means the unknown dialect {label!r}"
                    f"{nearest(str(label), DIALECTS) or ';'} expected one of {', '.join(DIALECTS)}"
                )

    def label(self, name: str, where: str) -> str:
        """The label that a name means. Raises DataError that begins with `where`."""
        if name in self._map:
            return self._map[name]
        folded = " ".join(name.lower().replace("_", " ").replace("-", " ").split())
        if folded in DIALECTS:
            return folded
        if folded in _USUAL:
            return _USUAL[folded]
        raise DataError(
            f"{where}: unknown dialect {name!r}{nearest(folded, [*DIALECTS, *_USUAL]) or ';'} expected one "
            f"of {', '.join(DIALECTS)}; say what other names mean with dialect_label_map (in the library "
            "label_map)"
        )
