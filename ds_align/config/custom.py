"""A researcher's own loss as a method: the `method` decorator, and `module:function` where a method is named.

Nothing here imports torch; the file that holds the loss does.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import Field, ValidationError

from ds_align.config.base import BaseConfig
from ds_align.config.methods import METHODS, MethodSpec
from ds_align.config.schema import Number, describe_type, nearest
from ds_align.errors import ConfigError

Loss = TypeVar("Loss", bound=Callable[..., Any])
Inputs = Literal["pairs", "unpaired"]

_INPUTS: dict[str, Inputs] = {"PairedLogps": "pairs", "UnpairedLogps": "unpaired"}
_TYPES = {float: Number, int: int, bool: bool, str: str, types.NoneType: types.NoneType}
_EXPECTED_TYPES = "float, int, bool, str, Literal[...], or one of them with `| None`"
# Flags of the command that are no settings.
_RESERVED = ("help", "config", "local_rank")


def method(
    function: Loss | None = None,
    /,
    *,
    name: str | None = None,
    inputs: Inputs | None = None,
    needs_reference: bool = True,
    coupled: bool = False,
) -> Any:
    """Decorator: makes `loss(logps, *, beta: float = 0.1, ...) -> LossOutput` a method of its own.

    Each further parameter becomes a setting and a flag; it needs an annotation and a default. The function
    stays as it is and gets `.config`, the class of its settings.

    name: of the method, by default the function's. inputs: by default what the first parameter's annotation
    says (PairedLogps or UnpairedLogps), else pairs. coupled: a preference's loss depends on the others of the
    global batch. Raises ConfigError for a function that cannot be a method and for a name that is taken.
    """

    def register(loss: Loss) -> Loss:
        if not inspect.isfunction(loss):
            raise ConfigError(f"@method: {loss!r} is a {type(loss).__name__}; expected a function")
        chosen = name or loss.__name__
        where = f"{loss.__code__.co_filename}:{loss.__code__.co_firstlineno}: method {chosen!r}"
        if not re.fullmatch(r"[A-Za-z]\w*", chosen):
            raise ConfigError(f"{where}: not a name; expected letters, digits and _")
        logps, *parameters = _parameters(loss, where)
        kind = _inputs(logps, inputs, where)
        traits = {
            "method": chosen,
            "group": f"Method: {chosen}",
            "import_path": import_path(loss),
            "reads_unpaired": kind == "unpaired",
            "needs_reference": needs_reference,
            "needs_reference_point": kind == "unpaired",
            "coupled": coupled,
        }
        config = _config_class(loss, traits, parameters, where)
        _put(MethodSpec(chosen, config, kind, loss, {one.name: one.name for one in parameters}), where)
        loss.config = config
        return loss

    return register if function is None else register(function)


def _put(spec: MethodSpec, where: str) -> None:
    """Enter a method; the same function, defined again, takes its own place."""
    former = [other.name for other in METHODS.values() if _is_redefined(other.loss, spec.loss)]
    if spec.name in METHODS and spec.name not in former:
        other = METHODS[spec.name]
        owner = "a built-in method" if isinstance(other.loss, str) else f"the loss {other.config.import_path}"
        raise ConfigError(f'{where}: the name is taken by {owner}; give another: @method(name="...")')
    for name in former:
        del METHODS[name]
    METHODS[spec.name] = spec


def _is_redefined(old: str | Callable[..., Any], new: Callable[..., Any]) -> bool:
    if isinstance(old, str) or old.__qualname__ != new.__qualname__:
        return False
    # One file may be imported under the name of its module and by its path.
    return old.__module__ == new.__module__ or old.__code__.co_filename == new.__code__.co_filename


def _parameters(loss: Callable[..., Any], where: str) -> list[inspect.Parameter]:
    """The parameters, the log-probs first. Raises ConfigError for a signature that cannot be called so."""
    parameters = list(inspect.signature(loss).parameters.values())
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if not parameters or parameters[0].kind not in positional:
        raise ConfigError(
            f"{where}: expected a function of the log-probs, loss(logps, *, ...), found "
            f"{loss.__name__}{inspect.signature(loss)}"
        )
    taken = {*BaseConfig.known_keys(), *_RESERVED}
    for parameter in parameters[1:]:
        said = f"{where}: parameter {parameter.name!r}"
        if parameter.kind not in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
            raise ConfigError(f"{said} cannot become a setting; give each setting a name of its own")
        if parameter.name in taken or hasattr(BaseConfig, parameter.name) or parameter.name.startswith("_"):
            raise ConfigError(f"{said} has a name that every configuration uses itself; take another")
        if parameter.default is inspect.Parameter.empty:
            raise ConfigError(f"{said} has no default; give one, as in {parameter.name}: float = 0.1")
        if parameter.annotation is inspect.Parameter.empty:
            raise ConfigError(f"{said} has no type; expected an annotation: {_EXPECTED_TYPES}")
    return parameters


def _inputs(logps: inspect.Parameter, inputs: str | None, where: str) -> Inputs:
    annotation = logps.annotation
    # Compared by name, so that the annotation may be imported for type checkers alone.
    said = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    annotated = _INPUTS.get(said.strip("'\"").rpartition(".")[2])
    if inputs is not None and inputs not in _INPUTS.values():
        raise ConfigError(f"{where}: inputs={inputs!r}; expected {' or '.join(_INPUTS.values())}")
    if inputs is not None and annotated not in (None, inputs):
        raise ConfigError(f"{where}: inputs={inputs!r}, but {logps.name!r} is annotated as {said}")
    return inputs or annotated or "pairs"


def _config_class(
    loss: Callable[..., Any], traits: Mapping[str, Any], parameters: list[inspect.Parameter], where: str
) -> type[BaseConfig]:
    """A subclass of BaseConfig with these class attributes and one field a parameter."""
    annotations: dict[str, Any] = dict.fromkeys(traits, ClassVar[Any])
    values = dict(traits)
    for parameter in parameters:
        annotations[parameter.name] = _field_type(_annotation(parameter, loss, where), parameter.name, where)
        values[parameter.name] = Field(parameter.default, description=_description(loss, parameter.name))
    class_name = "".join(part.capitalize() for part in traits["method"].split("_")) + "Config"
    body = {"__module__": loss.__module__, "__qualname__": class_name, "__annotations__": annotations}
    config = type(BaseConfig)(class_name, (BaseConfig,), {**body, "__doc__": _summary(loss), **values})
    try:
        config(**{parameter.name: parameter.default for parameter in parameters})
    except ValidationError as error:
        wrong = str(error.errors()[0]["loc"][0])
        info = config.model_fields[wrong]
        expected = describe_type(info.annotation, info.metadata)
        raise ConfigError(
            f"{where}: parameter {wrong!r} has the default {info.default!r}; expected {expected}"
        ) from error
    return config


def source_digest(loss: str | Callable[..., Any]) -> str | None:
    """A digest of the file that an own loss stands in, without its comments; None for a built-in loss."""
    if isinstance(loss, str):
        return None
    tree = ast.dump(ast.parse(Path(inspect.getfile(loss)).read_text(encoding="utf-8")))
    return hashlib.blake2b(tree.encode(), digest_size=16).hexdigest()


def import_path(loss: Callable[..., Any]) -> str:
    """Where --method finds the function again: module:name or file.py:name, "" where nothing can."""
    if not loss.__qualname__.isidentifier():
        return ""
    source = loss.__module__
    if source == "__main__":
        file = getattr(sys.modules[source], "__file__", None)
        source = str(Path(file).resolve()) if file else ""
    return f"{source}:{loss.__qualname__}" if source else ""


def _annotation(parameter: inspect.Parameter, loss: Callable[..., Any], where: str) -> Any:
    """The annotation as a type, where it stands as text (`from __future__ import annotations`)."""
    holder = types.SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    names = inspect.unwrap(loss).__globals__
    try:
        return get_type_hints(holder, globalns=names, include_extras=True)[parameter.name]
    except (NameError, AttributeError, SyntaxError, TypeError) as error:
        raise ConfigError(
            f"{where}: the type of parameter {parameter.name!r} cannot be read: {_one_line(error)}"
        ) from error


def _field_type(annotation: Any, name: str, where: str) -> Any:
    """The type of a field for an annotation; a number may also stand as text, as in YAML's '1e-6'."""
    origin = get_origin(annotation)
    if origin is Annotated:
        base, *extra = get_args(annotation)
        return Annotated[_field_type(base, name, where), *extra]
    if origin in (Union, types.UnionType):
        return Union[tuple(_field_type(branch, name, where) for branch in get_args(annotation))]  # noqa: UP007
    if origin is Literal:
        return annotation
    if annotation not in _TYPES:
        raise ConfigError(
            f"{where}: parameter {name!r} is annotated as {annotation!r}; expected {_EXPECTED_TYPES}"
        )
    return _TYPES[annotation]


def _summary(loss: Callable[..., Any]) -> str:
    return " ".join((inspect.getdoc(loss) or "").partition("\n\n")[0].split())


def _description(loss: Callable[..., Any], name: str) -> str:
    """The docstring's line `name: text`, else its first paragraph."""
    line = re.search(rf"^\s*{name}\s*:\s*(\S.*)$", inspect.getdoc(loss) or "", re.MULTILINE)
    text = line[1] if line else _summary(loss) or f"Argument of {loss.__name__}"
    return text.rstrip(".") + "."


def find_method(text: str) -> str:
    """Return the name of the method that `text` means: a name, or module:function or file.py:function.

    A function is imported, with the current directory importable, and entered as a method where it has no
    decorator. Raises ConfigError where there is none.
    """
    paths = {spec.config.import_path: name for name, spec in METHODS.items() if spec.config.import_path}
    if text in METHODS or text in paths:
        return paths.get(text, text)
    source, _, attribute = text.rpartition(":")
    if not source or not attribute.isidentifier():
        raise ConfigError(
            f"method={text!r} is no method; expected a name, module:function or file.py:function"
        )
    module = _import(source, text)
    found = vars(module).get(attribute) if attribute in vars(module) else getattr(module, attribute, None)
    if found is None:
        raise ConfigError(_describe_missing(text, attribute, module))
    if not inspect.isfunction(found):
        raise ConfigError(
            f"method={text!r}: {attribute} is a {type(found).__name__}; "
            "expected a function loss(logps, *, ...) -> LossOutput"
        )
    if not any(spec.loss is found for spec in METHODS.values()):
        method(found)
    return next(name for name, spec in METHODS.items() if spec.loss is found)


def _import(source: str, text: str) -> types.ModuleType:
    """Import a module by name or a file by path. Raises ConfigError with the line that failed."""
    _make_importable(Path.cwd())
    try:
        return _import_file(source, text) if source.endswith(".py") else importlib.import_module(source)
    except ConfigError:
        raise
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if source != missing and not source.startswith(f"{missing}."):
            raise ConfigError(f"method={text!r}: {_origin(error)}{_one_line(error)}") from error
        raise ConfigError(
            f"method={text!r}: no module {missing!r} in {Path.cwd()} or on PYTHONPATH; start in the "
            "directory that holds it, or name the file: path/to/file.py:function"
        ) from error
    except (Exception, SystemExit) as error:
        # Whatever a file does as it is imported, the user is to see the line in it.
        raise ConfigError(f"method={text!r}: {_origin(error)}{_one_line(error)}") from error


def _import_file(source: str, text: str) -> types.ModuleType:
    path = Path(source).expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"method={text!r}: no file {str(path)!r}; check the path")
    # The whole path is the module's name: a stem such as `losses` may belong to another module.
    name = str(path)
    if name in sys.modules:
        return sys.modules[name]
    _make_importable(path.parent)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _make_importable(directory: Path) -> None:
    # At the end: a file of the user's that is called like a library must not take the library's place.
    if str(directory) not in sys.path:
        sys.path.append(str(directory))


def _describe_missing(text: str, attribute: str, module: types.ModuleType) -> str:
    functions = [
        name for name, value in vars(module).items() if inspect.isfunction(value) and not name.startswith("_")
    ]
    hint = nearest(attribute, functions) or (
        f"; it has {', '.join(sorted(functions)[:8])}" if functions else ""
    )
    return f"method={text!r}: {getattr(module, '__file__', module.__name__)} has no {attribute!r}{hint}"


def _origin(error: BaseException) -> str:
    """The file and line that raised, leaving out the import machinery, with a colon behind; "" for none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: "
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen") and frame.filename != __file__
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""


def _one_line(error: BaseException) -> str:
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {' '.join(str(message).split())}"
