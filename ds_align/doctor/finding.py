"""What a check says, and what all of them say together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from ds_align.errors import ConfigError, DataError, DsAlignError

Level = Literal["ok", "info", "warning", "error"]
LEVELS: tuple[Level, ...] = ("ok", "info", "warning", "error")
Subject = Literal["data", "settings"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a check saw. value: its figures by name, JSON values; message: the same in words, one line."""

    level: Level
    value: dict[str, Any]
    message: str
    remedy: str = ""
    examples: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Finding:
    """An outcome with the number and the name of its check, and the limit that it was held against."""

    id: int
    name: str
    level: Level
    value: dict[str, Any]
    limit: str
    message: str
    remedy: str = ""
    examples: tuple[str, ...] = ()
    subject: Subject = "data"

    @property
    def line(self) -> str:
        """One line for the messages of a run."""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"doctor, check {self.id} ({self.name}): {self.message}{remedy}"

    def lowered(self, level: Level) -> Finding:
        """The same at this level at most."""
        return replace(self, level=min(self.level, level, key=LEVELS.index))

    def as_json(self) -> dict[str, Any]:
        """The finding as JSON values."""
        return asdict(self)


@dataclass(slots=True)
class Parts:
    """Several things that one check looks at, gathered into one outcome: the highest level counts."""

    value: dict[str, Any] = field(default_factory=dict)
    level: Level = "ok"
    _messages: list[str] = field(default_factory=list)
    _remedies: list[str] = field(default_factory=list)
    _examples: list[str] = field(default_factory=list)

    def add(self, level: Level, message: str, remedy: str = "", examples: Iterable[str] = ()) -> None:
        """Notes one thing that is not as it should be."""
        self.level = max(self.level, level, key=LEVELS.index)
        self._messages.append(message)
        if remedy and remedy not in self._remedies:
            self._remedies.append(remedy)
        self._examples += examples

    def outcome(self, well: str) -> Outcome:
        """All of it; `well` is said where nothing was noted."""
        message = "; ".join(self._messages) or well
        return Outcome(self.level, self.value, message, "; ".join(self._remedies), tuple(self._examples))


def messages(findings: Iterable[Finding]) -> list[str]:
    """A line for each warning, and for each error that did not stop the run."""
    return [finding.line for finding in findings if finding.level in ("warning", "error")]


def error_of(findings: Iterable[Finding]) -> DsAlignError | None:
    """The error that the findings amount to: of the data, or of the settings where they alone are wrong."""
    errors = [finding for finding in findings if finding.level == "error"]
    if not errors:
        return None
    kind = ConfigError if all(finding.subject == "settings" for finding in errors) else DataError
    text = " | ".join(finding.line for finding in errors)
    return kind(f"{text}; doctor=warn goes on in spite of it")
