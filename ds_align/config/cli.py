"""The command line: every config field is a flag, and nothing else is.

argparse lays out the help only. Flags are read here, because argparse stops at the first error, takes
prefixes for flags and reads `-1e-6` as a flag.
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from ds_align.config.base import BaseConfig
from ds_align.config.custom import find_method
from ds_align.config.load import Layer, build_config, choose_method, read_mapping, read_yaml
from ds_align.config.methods import METHODS
from ds_align.config.schema import describe_type, join_messages, nearest
from ds_align.errors import EXIT_DONE, ConfigError

# Appended to the script's arguments by the deepspeed launcher; the rank is read from the environment.
LAUNCHER_FLAGS = ("local_rank",)
COMMAND_FLAGS = ("method", "config", "help", *LAUNCHER_FLAGS)
# What a flag means that stands alone, where it is no switch.
BARE_VALUES = {"resume": "auto"}
RUN_FLAGS = {
    "method": f"The method: {', '.join(METHODS)}, or a loss of your own as module:function or "
    "file.py:function. Also `method:` in the YAML.",
    "config": "A YAML file with flags as keys.",
    "loss_args": "Settings of the method itself as one mapping, like a flag for each: '{\"beta\": 0.2}'.",
    "local_rank": "Set by the deepspeed launcher.",
    "help": "Show this and stop; with --method, the settings of that method alone.",
}
FLAG_RULES = (
    "Defaults < --config file < flags; a flag given twice counts as last given. `--flag` alone means true; "
    "dashes and underscores are the same."
)
DESCRIPTION = f"Train a language model from preferences. {FLAG_RULES}"


@dataclass(slots=True)
class Tokens:
    """What stands on the command line: flag name to its texts in order (None: no value), and the errors."""

    texts: dict[str, list[str | None]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def parse_command_line(argv: Sequence[str], *, description: str = DESCRIPTION) -> BaseConfig:
    """Build the configuration of the chosen method from `argv` (without the program's name).

    The method comes from --method or from `method:` in the --config file; flags win over the file.
    Prints help, headed by description, and raises SystemExit(0) for --help. Raises ConfigError with every
    error at once.
    """
    tokens = split_flags(argv)
    if "help" in tokens.texts:
        name = _text(tokens, "method")
        print_help(find_method(name) if name is not None and ":" in name else name, description)
        raise SystemExit(EXIT_DONE)
    flags = Layer(problems=tokens.problems)
    for name in ("method", "config"):
        if name in tokens.texts and _text(tokens, name) is None:
            flags.problems.append(f"--{name}: expected a value after it")
    path = _text(tokens, "config")
    layers = [read_yaml(path), flags] if path is not None else [flags]
    if _text(tokens, "method") is not None:
        flags.values["method"], flags.origins["method"] = _text(tokens, "method"), "--method"
    method = choose_method(layers)
    if method is None:
        _report_without_method(tokens, layers)
    config_class = METHODS[method].config
    _check_launcher_flags(tokens)
    for name, texts in tokens.texts.items():
        if name == "loss_args":
            _read_loss_args(flags, texts[-1])
        elif name not in COMMAND_FLAGS:
            _read_flag(flags, config_class, name, texts)
    return build_config(config_class, layers)


def split_flags(argv: Sequence[str]) -> Tokens:
    """Split `--x 5`, `--x=5`, `--x` and `--a-b 5` into names and texts; a text without a flag is an error."""
    tokens = Tokens()
    current: list[str | None] | None = None
    for token in argv:
        if token == "-h":
            token = "--help"
        if token.startswith("--") and len(token) > 2:
            name, equals, text = token[2:].partition("=")
            current = tokens.texts.setdefault(name.replace("-", "_"), [])
            current.append(text if equals else None)
            current = None if equals else current
        elif current is not None:
            current[-1] = token
            current = None
        else:
            tokens.problems.append(f"{token!r} belongs to no flag; expected --name value")
    return tokens


def _text(tokens: Tokens, name: str) -> str | None:
    return tokens.texts.get(name, [None])[-1]


def _check_launcher_flags(tokens: Tokens) -> None:
    for name in LAUNCHER_FLAGS:
        for text in tokens.texts.get(name, []):
            if text is None or not text.isdigit():
                tokens.problems.append(f"--{name}={text}: expected an integer >= 0; the launcher sets it")


def _report_without_method(tokens: Tokens, layers: list[Layer]) -> None:
    """Raise for a run whose method is unknown, with the flags that no method knows."""
    known = {*COMMAND_FLAGS, *(key for spec in METHODS.values() for key in spec.config.known_keys())}
    messages = [message for layer in layers for message in layer.problems]
    messages += [
        f"--{name}: unknown flag{nearest(name, known)}" for name in tokens.texts if name not in known
    ]
    raise ConfigError(join_messages(messages))


def _read_flag(flags: Layer, config_class: type[BaseConfig], name: str, texts: list[str | None]) -> None:
    """Put one flag's value into the layer; among repeated flags the last one wins, lists are joined."""
    flags.origins[name] = f"--{name}"
    known = config_class.model_fields.get(config_class.aliases.get(name, name))
    is_switch = name in ("bf16", "fp16") or (known is not None and known.annotation is bool)
    if texts[-1] is None and config_class.aliases.get(name, name) in BARE_VALUES:
        texts = [BARE_VALUES[config_class.aliases.get(name, name)]]
    if texts[-1] is None and known is not None and not is_switch:
        flags.problems.append(
            f"--{name}: expected {describe_type(known.annotation, known.metadata)} after it"
        )
        return
    text = "true" if texts[-1] is None else texts[-1]
    if known is not None and get_origin(_item_type(known.annotation)) is dict:
        _read_yaml(flags, name, text, describe_type(known.annotation, known.metadata))
        return
    if known is not None and _item_type(known.annotation) is not None:
        text = ",".join(part for part in texts if part is not None)
    if known is None:
        flags.problems.append(f"--{name}: {config_class.explain_unknown(name, also=COMMAND_FLAGS)}")
    else:
        flags.values[name] = parse_text(text, bool if is_switch else known.annotation)


def _read_loss_args(flags: Layer, text: str | None) -> None:
    flags.origins["loss_args"] = "--loss_args"
    _read_yaml(flags, "loss_args", text or "", "a mapping, as in '{\"beta\": 0.2}'")


def _read_yaml(flags: Layer, name: str, text: str, expected: str) -> None:
    try:
        flags.values[name] = read_mapping(text)
    except ValueError as error:
        flags.problems.append(f"--{name}: {text!r} is not valid JSON ({error}); expected {expected}")


def parse_text(text: str, annotation: Any) -> Any:
    """Read a flag's text as `annotation`; a text that fits nothing stays text, for validation to refuse.

    "none" and "null" are None where the field takes None; a number wins over text; lists split at
    commas, with or without brackets and quotes.
    """
    kinds = _kinds(annotation)
    lowered = text.lower()
    if type(None) in kinds and lowered in ("none", "null"):
        return None
    item = _item_type(annotation)
    if item is not None:
        # [a, b] and ["a", "b"] are what YAML and JSON would have.
        inner = text.strip().removeprefix("[").removesuffix("]") if text.strip().startswith("[") else text
        return [parse_text(part.strip().strip("\"'"), item) for part in inner.split(",")]
    if bool in kinds and lowered in ("true", "false"):
        return lowered == "true"
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def _item_type(annotation: Any) -> Any:
    """Return the type of the items where `annotation` takes a list, else None."""
    branches = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return next((get_args(branch)[0] for branch in branches if get_origin(branch) is list), None)


def _kinds(annotation: Any) -> set[Any]:
    """Return the plain types that an annotation takes: {int, NoneType} for `Count | None`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return set().union(*(_kinds(branch) for branch in get_args(annotation)))
    return {str} if origin is Literal else {annotation}


def print_help(method: str | None, description: str = DESCRIPTION) -> None:
    """Print every flag, grouped by theme, with its default; of one method, or of all where it is None."""
    chosen = [method] if method in METHODS else list(METHODS)
    sections = {"Run": [_help_line(name, text) for name, text in RUN_FLAGS.items()]}
    shown: set[str] = set()
    for name in chosen:
        config_class = METHODS[name].config
        for key, info in config_class.model_fields.items():
            # A method's own fields may have the names of another's; shared fields are shown once.
            if key in BaseConfig.model_fields and key in shown:
                continue
            shown.add(key)
            expected = describe_type(info.annotation, info.metadata)
            default = _defaults(key, chosen, owner=config_class)
            text = f"{info.description} Takes {expected}. Default: {default}."
            sections.setdefault(field_group(config_class, key), []).append(_help_line(key, text))
    formatter = argparse.HelpFormatter(Path(sys.argv[0]).name, max_help_position=34, width=110)
    formatter.add_text("usage: %(prog)s --method METHOD [--config FILE] [--FLAG VALUE ...]")
    formatter.add_text(description)
    for title, lines in sections.items():
        formatter.start_section(title)
        formatter.add_arguments(lines)
        formatter.end_section()
    sys.stdout.write(formatter.format_help())


def _help_line(name: str, text: str) -> argparse.Action:
    nargs = 0 if name == "help" else None
    return argparse.Action([f"--{name}"], dest=name, nargs=nargs, metavar="X", help=text.replace("%", "%%"))


def field_group(config_class: type[BaseConfig], name: str) -> str:
    """Return the theme of a field: that of the class which owns it, whoever gives it another default."""
    owners = [base for base in config_class.__mro__ if name in vars(base).get("__annotations__", {})]
    return str(vars(owners[-1])["group"])


def _defaults(key: str, methods: Sequence[str], owner: type[BaseConfig]) -> str:
    """Return the default in words; for a shared field whose default differs, that of each method."""
    if key not in BaseConfig.model_fields:
        return _show(owner.model_fields[key].default)
    values = {name: METHODS[name].config.model_fields[key].default for name in methods}
    if len(set(map(repr, values.values()))) == 1:
        return _show(next(iter(values.values())))
    return ", ".join(f"{_show(value)} ({name})" for name, value in values.items())


def _show(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
