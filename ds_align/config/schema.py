"""What every configuration class shares: strict construction, aliases, and all errors at once.

A Schema is a flat pydantic model. Its constructor and its assignments raise ConfigError with every
problem in one message; `check` returns the problems instead, so that a loader can put the origin of
each value (file:line or flag) in front of its message.
"""

from __future__ import annotations

import difflib
import os
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from ds_align.errors import ConfigError

Rule = TypeVar("Rule", bound=Callable[..., "str | None"])


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: the keys as the user spelled them, and the message without its origin."""

    keys: tuple[str, ...]
    message: str


@dataclass(frozen=True, slots=True)
class Expects:
    """Field metadata: says in words what a field takes, where its type alone does not."""

    words: str


def _number_from_text(value: Any) -> Any:
    """Read "1e-6", which YAML and shells hand over as text; anything else is left to the type check."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _text_from_path(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


Number = Annotated[float, BeforeValidator(_number_from_text)]
PositiveNumber = Annotated[Number, Field(gt=0)]
NonNegativeNumber = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
ShareBelowOne = Annotated[Number, Field(ge=0, lt=1)]
Smoothing = Annotated[Number, Field(ge=0, lt=0.5)]
Count = Annotated[int, Field(ge=1)]
NonNegativeCount = Annotated[int, Field(ge=0)]
PathText = Annotated[
    str, BeforeValidator(_text_from_path), Field(min_length=1), Expects("text that is not empty")
]
FieldName = Annotated[str, Field(min_length=1), Expects("the name of a column")]


def rule(*fields: str) -> Callable[[Rule], Rule]:
    """Mark a method as a check across `fields`; it returns a message, or None where all is well.

    The check is left out when one of its fields is itself not valid.
    """

    def mark(check: Rule) -> Rule:
        check.rule_fields = fields  # type: ignore[attr-defined]
        return check

    return mark


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return "; did you mean a or b?" for close candidates and those that contain `name`, or ""."""
    names = sorted(candidates)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    close = close or [candidate for candidate in names if len(name) > 2 and name in candidate][:3]
    return f"; did you mean {' or '.join(close)}?" if close else ""


def join_messages(messages: Iterable[str]) -> str:
    """Return one message as it is, several under a line with their count; one line each, none twice."""
    lines = list(dict.fromkeys(messages))
    return (
        lines[0] if len(lines) == 1 else f"{len(lines)} errors:\n" + "\n".join(f"  {line}" for line in lines)
    )


def describe_type(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """Say in words what a field takes: "an integer >= 1 or none", "one of linear, cosine, constant"."""
    metadata = tuple(metadata)
    if get_origin(annotation) is Annotated:
        base, *extra = get_args(annotation)
        return describe_type(base, (*extra, *metadata))
    metadata = _flatten(metadata)
    words = next((entry.words for entry in metadata if isinstance(entry, Expects)), None)
    if words is not None:
        return words
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(describe_type(branch) for branch in get_args(annotation))
    if get_origin(annotation) is Literal:
        choices = [str(choice) for choice in get_args(annotation)]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if get_origin(annotation) is list:
        (item,) = get_args(annotation)
        return f"a list with commas, each {describe_type(item)}"
    noun = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "none"}
    return " ".join([noun.get(annotation, "a mapping"), _describe_bounds(metadata)]).strip()


def _flatten(metadata: Iterable[Any]) -> tuple[Any, ...]:
    """Replace a Field(...) inside Annotated by the bounds it holds."""
    flat: list[Any] = []
    for entry in metadata:
        flat.extend(entry.metadata if isinstance(entry, FieldInfo) else [entry])
    return tuple(flat)


def _describe_bounds(metadata: Iterable[Any]) -> str:
    signs = {Ge: (">=", "ge"), Gt: (">", "gt"), Le: ("<=", "le"), Lt: ("<", "lt")}
    bounds = [
        f"{signs[type(entry)][0]} {getattr(entry, signs[type(entry)][1])}"
        for entry in metadata
        if type(entry) in signs
    ]
    return " and ".join(bounds)


class Schema(BaseModel):
    """A flat, mutable, strict configuration: unknown keys, wrong types and bad ranges are ConfigErrors.

    `aliases` maps an accepted other spelling to the field that it sets.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        validate_assignment=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    aliases: ClassVar[Mapping[str, str]] = {}
    # What to say of a value that is often tried and belongs elsewhere, by (field, value).
    refused_values: ClassVar[Mapping[tuple[str, str], str]] = {}

    def __init__(self, **values: Any) -> None:
        problems = self._fill(values)
        if problems:
            raise ConfigError(
                join_messages(f"{type(self).__name__}: {problem.message}" for problem in problems)
            )

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> tuple[Self, list[Problem]]:
        """Build from `values` and return the configuration with every problem found.

        A configuration that comes with problems holds defaults for the fields that are not valid; it
        must not be used.
        """
        config = cls.__new__(cls)
        return config, cls._fill(config, values)

    @classmethod
    def known_keys(cls) -> list[str]:
        """Return every key that may be given: the fields and their aliases."""
        return [*cls.model_fields, *cls.aliases]

    @classmethod
    def normalise(cls, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str], list[Problem]]:
        """Replace aliases by their fields.

        Returns the values by field, the key that the user spelled for each field, and the problems
        (unknown keys, an alias that disagrees with its field).
        """
        by_field: dict[str, Any] = {}
        spelled: dict[str, str] = {}
        problems: list[Problem] = []
        for key, value in values.items():
            field = cls.aliases.get(key, key)
            if field not in cls.model_fields:
                problems.append(Problem((key,), cls.explain_unknown(key)))
            elif field in by_field and by_field[field] != value:
                message = (
                    f"{spelled[field]}={by_field[field]!r} and {key}={value!r} disagree; give one of the two"
                )
                problems.append(Problem((spelled[field], key), message))
            else:
                by_field[field], spelled[field] = value, key
        return by_field, spelled, problems

    @classmethod
    def explain_unknown(cls, key: str, also: Iterable[str] = ()) -> str:
        """Return the message for a key that is no field; `also` are further names that it may mean."""
        return f"unknown key {key!r}{nearest(key, [*cls.known_keys(), *also])}"

    def _fill(self, values: Mapping[str, Any]) -> list[Problem]:
        by_field, spelled, problems = self.normalise(values)
        invalid: dict[str, Any] = {}
        try:
            super().__init__(**by_field)
        except ValidationError as error:
            invalid = {str(entry["loc"][0]): by_field[str(entry["loc"][0])] for entry in error.errors()}
            super().__init__(**{name: value for name, value in by_field.items() if name not in invalid})
        for name, value in invalid.items():
            problems.append(Problem((spelled[name],), self._explain_invalid(name, spelled[name], value)))
        return problems + self._broken_rules(skip=set(invalid), spelled=spelled)

    @classmethod
    def _explain_invalid(cls, name: str, key: str, value: Any) -> str:
        field = cls.model_fields[name]
        if isinstance(value, str) and (name, value) in cls.refused_values:
            return f"{key}={value!r} is not valid: {cls.refused_values[name, value]}"
        return f"{key}={value!r} is not valid; expected {describe_type(field.annotation, field.metadata)}"

    def _broken_rules(self, skip: set[str], spelled: Mapping[str, str]) -> list[Problem]:
        problems = []
        members = {
            name: member for base in reversed(type(self).__mro__) for name, member in vars(base).items()
        }
        for check in members.values():
            fields = getattr(check, "rule_fields", None)
            if fields is None or skip.intersection(fields):
                continue
            message = check(self)
            if message is not None:
                given = tuple(spelled.get(field, field) for field in fields)
                problems.append(Problem(given, message))
        return problems

    def __getattr__(self, name: str) -> Any:
        # Reached only when no field or method has the name, so an alias can never hide one.
        if name in type(self).aliases:
            return getattr(self, type(self).aliases[name])
        return super().__getattr__(name)  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:
        by_field, spelled, problems = self.normalise({name: value})
        for field, new in by_field.items():
            problems += self._assign(field, new, spelled[field])
        if problems:
            raise ConfigError(
                join_messages(f"{type(self).__name__}: {problem.message}" for problem in problems)
            )

    def _assign(self, field: str, value: Any, key: str) -> list[Problem]:
        before, was_set = getattr(self, field), field in self.model_fields_set
        try:
            super().__setattr__(field, value)
        except ValidationError:
            return [Problem((key,), self._explain_invalid(field, key, value))]
        problems = self._broken_rules(skip=set(), spelled={field: key})
        if problems:
            # A refused assignment leaves the configuration as it was, so that the caller may go on.
            super().__setattr__(field, before)
            if not was_set:
                self.model_fields_set.discard(field)
        return problems


def changed(config: Schema, *names: str) -> list[str]:
    """Return those of the fields whose value is not their default."""
    return [name for name in names if getattr(config, name) != type(config).model_fields[name].default]
