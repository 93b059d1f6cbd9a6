"""Defaults, then a YAML file, then overrides: strict, with the origin of every value in its error."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml

from ds_align.config.base import BaseConfig
from ds_align.config.custom import find_method
from ds_align.config.methods import METHODS
from ds_align.config.schema import Problem, join_messages, nearest
from ds_align.errors import ConfigError

Config = TypeVar("Config", bound=BaseConfig)


@dataclass(slots=True)
class Layer:
    """Values from one source by key, where each came from, and what was already wrong with the source."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


class _StrictLoader(yaml.SafeLoader):
    """YAML with the scalars of YAML 1.2 (true, 12, 1e-6, null), which refuses a key given twice.

    PyYAML's own rules read `1e-6` and `1E5` as text, `010` as eight, `1:30` as ninety and `no` as false.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        """Build a mapping; raise at a key that stands in it twice."""
        first: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if key in first:
                message = f"{key!r} is given twice (first in line {first[key]}); keep one"
                raise yaml.constructor.ConstructorError(None, None, message, key_node.start_mark)
            first[key] = line
        return super().construct_mapping(node, deep=deep)


for _tag, _pattern in (
    ("bool", r"true|True|TRUE|false|False|FALSE"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
    ("null", r"~|null|Null|NULL|"),
):
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), None)


def read_mapping(text: str) -> Any:
    """Read a flag's text as JSON or as YAML in one line. Raises ValueError."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        raise ValueError(" ".join(problem.split())) from error


def read_yaml(path: str | Path) -> Layer:
    """Read the settings of a YAML file; what is wrong with it goes to `problems`, nothing is raised."""
    layer = Layer()
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        layer.problems.append(f"{path}: cannot be read ({reason}); expected a YAML file of settings")
        return layer
    try:
        loader = _StrictLoader(text)
        node = loader.get_single_node()
        if node is None:
            return layer
        if not isinstance(node, yaml.MappingNode):
            found = node.start_mark.line + 1
            layer.problems.append(f"{path}:{found}: expected `key: value` lines, found a {node.id}")
            return layer
        _fill_layer(layer, loader, node, path)
    except yaml.MarkedYAMLError as error:
        layer.problems.append(_describe_yaml_error(path, error))
    except yaml.YAMLError as error:
        layer.problems.append(f"{path}: not valid YAML: {' '.join(str(error).split())}")
    return layer


def _fill_layer(layer: Layer, loader: _StrictLoader, node: yaml.MappingNode, path: str | Path) -> None:
    """Take the top-level keys one by one, so that one bad value does not hide the next."""
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = str(loader.construct_object(key_node, deep=True))
        if key in layer.values:
            before = layer.origins[key].rsplit(":", 1)[1]
            layer.problems.append(f"{path}:{line}: {key!r} is given twice (first in line {before}); keep one")
            continue
        layer.origins[key] = f"{path}:{line}"
        try:
            layer.values[key] = loader.construct_object(value_node, deep=True)
        except yaml.MarkedYAMLError as error:
            layer.problems.append(_describe_yaml_error(path, error))


def _describe_yaml_error(path: str | Path, error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    line = f":{mark.line + 1}" if mark is not None else ""
    return f"{path}{line}: not valid YAML: {error.problem or error.context}"


def choose_method(layers: list[Layer], default: str | None = None) -> str | None:
    """Return the method that the last layer names; a missing or unknown one goes to its layer's problems.

    Imports module:function or file.py:function. Raises ConfigError at once where that fails: without the
    function nobody knows which other keys are right.
    """
    for layer in reversed(layers):
        if "method" not in layer.values:
            continue
        name = layer.values["method"]
        if isinstance(name, str) and name in METHODS:
            return name
        if isinstance(name, str) and ":" in name:
            try:
                return find_method(name)
            except ConfigError as error:
                raise ConfigError(f"{layer.origins['method']}: {error}") from error
        hint = nearest(str(name), METHODS)
        expected = ", ".join(METHODS)
        layer.problems.append(
            f"{layer.origins['method']}: method={name!r} is unknown; expected {expected}{hint or '.'} "
            "A loss of your own is given as module:function"
        )
        return None
    if default is None:
        layers[-1].problems.append(f"no method; give --method or `method:` in the YAML: {', '.join(METHODS)}")
    return default


def build_config(config_class: type[Config], layers: list[Layer]) -> Config:
    """Merge the layers, later ones over earlier ones, and build; raise ConfigError with every problem."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    layers = [_spread_loss_args(config_class, layer) for layer in layers]
    messages = [message for layer in layers for message in layer.problems]
    for layer in layers:
        _lay_over(config_class, values, layer)
        origins.update(layer.origins)
    # The class decides which method this is; the value of a lower layer is not a disagreement.
    values.pop("method", None)
    config, problems = config_class.check(values)
    messages += [_with_origin(problem, origins) for problem in problems]
    if messages:
        raise ConfigError(join_messages(messages))
    return config


def _spread_loss_args(config_class: type[BaseConfig], layer: Layer) -> Layer:
    """The layer with loss_args taken apart, so that each argument meets those of other layers by its name."""
    values = dict(layer.values)
    problems = config_class.spread_loss_args(values)
    origins = dict.fromkeys(values, layer.origins.get("loss_args", "")) | layer.origins
    return Layer(values, origins, layer.problems + [_with_origin(problem, origins) for problem in problems])


def _lay_over(config_class: type[BaseConfig], values: dict[str, Any], layer: Layer) -> None:
    """Put a layer's values over `values`; an alias in the upper layer replaces its field in the lower one."""
    aliases = config_class.aliases
    fields = {aliases.get(key, key) for key in layer.values}
    for key in [key for key in values if aliases.get(key, key) in fields]:
        del values[key]
    values.update(layer.values)


def _with_origin(problem: Problem, origins: Mapping[str, str]) -> str:
    known = list(dict.fromkeys(origins[key] for key in problem.keys if key in origins))
    return f"{', '.join(known)}: {problem.message}" if known else problem.message


def read_config(config_class: type[Config], path: str | Path, overrides: Mapping[str, Any]) -> Config:
    """Read `path` as a configuration of `config_class`, with keyword overrides on top. Raises ConfigError."""
    layer = read_yaml(path)
    method = layer.values.get("method", config_class.method)
    if method not in (config_class.method, config_class.import_path or config_class.method):
        layer.problems.append(
            f"{layer.origins['method']}: method={method!r}, but {config_class.__name__} is for "
            f"{config_class.method!r}; use the other class or change the file"
        )
    given = Layer(dict(overrides), {key: f"argument {key}" for key in overrides})
    return build_config(config_class, [layer, given])


def write_yaml(config: BaseConfig, path: str | Path) -> None:
    """Write the method and every field; read_config gives an equal configuration."""
    values = {"method": config.import_path or config.method, **config.model_dump()}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)
    Path(path).write_text(text, encoding="utf-8")
