"""A loss from outside the package: the decorator, module:function, its settings, its files and its errors."""

# The losses here are never called.
# ruff: noqa: ARG001

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from ds_align import method
from ds_align.config import METHODS, DPOConfig, SimPOConfig, parse_command_line
from ds_align.errors import ConfigError

LOSSES = """
    from __future__ import annotations

    from typing import TYPE_CHECKING, Literal

    from my_lab.curves import identity
    from ds_align import method

    if TYPE_CHECKING:
        from ds_align.losses import LossOutput, PairedLogps

    CONSTANT = 3


    @method
    def my_loss(logps: PairedLogps, *, gap: float = 0.5, shape: Literal["a", "b"] = "a") -> LossOutput:
        '''A loss of
        this laboratory.

        gap: How far apart the two must be
        '''
        return identity(logps)


    def plain(logps, rate: float | None = None):
        return identity(logps)


    @method(name="other", needs_reference=False, coupled=True)
    def second(logps):
        return identity(logps)
"""


@pytest.fixture(autouse=True)
def _methods_of_a_test() -> Iterator[None]:
    """What a test registers and imports is gone after it."""
    methods, modules, path = dict(METHODS), set(sys.modules), list(sys.path)
    yield
    METHODS.clear()
    METHODS.update(methods)
    for name in set(sys.modules) - modules:
        del sys.modules[name]
    sys.path[:] = path


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with the package my_lab in it."""
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab" / "__init__.py").write_text("")
    (tmp_path / "my_lab" / "curves.py").write_text("def identity(value):\n    return value\n")
    (tmp_path / "my_lab" / "losses.py").write_text(textwrap.dedent(LOSSES))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as error:
        parse_command_line(argv)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_decorated_function_is_a_method_and_stays_a_function() -> None:
    @method
    def doubled(logps: int, *, beta: float = 0.1, rounds: int = 2, tau: float | None = None) -> int:
        return 2 * logps

    assert doubled(4, beta=0.3) == 8
    spec = METHODS["doubled"]
    assert (spec.config, spec.inputs, spec.loss) == (doubled.config, "pairs", doubled)
    config = doubled.config(model_name_or_path="models/m", beta="2e-1", rounds=3)
    assert spec.arguments(config) == {"beta": 0.2, "rounds": 3, "tau": None}
    assert (spec.needs_reference(config), spec.coupled(config), config.nll_weight) == (True, False, 0.0)
    assert config.resolved_output_dir == "runs/doubled-m"
    with pytest.raises(ConfigError, match="DoubledConfig: beta='x' is not valid; expected a number"):
        doubled.config(beta="x")
    with pytest.raises(ConfigError, match="gamma_beta_ratio' is a setting of simpo, not of doubled"):
        doubled.config(gamma_beta_ratio=1.0)
    with pytest.raises(ConfigError, match="'rounds' is a setting of doubled, not of dpo"):
        DPOConfig(rounds=1)


def test_what_the_method_says_of_itself() -> None:
    @method(name="mine", needs_reference=False, coupled=True)
    def single(logps: UnpairedLogps, *, share: Annotated[float, Field(ge=0, le=1)] = 0.5) -> None:  # noqa: F821
        """Nothing."""

    spec = METHODS["mine"]
    config = single.config()
    assert (spec.inputs, spec.needs_reference(config), spec.coupled(config)) == ("unpaired", False, True)
    assert config.reads_unpaired
    assert config.needs_reference_point
    with pytest.raises(ConfigError, match="share=2.0 is not valid; expected a number >= 0 and <= 1"):
        single.config(share=2.0)

    @method(inputs="unpaired")
    def unannotated(logps, *, kind: Literal["x", "y"] = "x", hard: bool = False) -> None:
        pass

    assert METHODS["unannotated"].inputs == "unpaired"
    with pytest.raises(ConfigError, match="kind='z' is not valid; expected one of x, y"):
        unannotated.config(kind="z")


def test_the_same_function_defined_again_takes_its_place() -> None:
    def define(beta: float, name: str | None = None) -> type:
        @method(name=name)
        def again(logps, *, beta: float = beta) -> None:
            pass

        return again.config

    define(0.1)
    second = define(0.2)
    assert METHODS["again"].config is second
    assert METHODS["again"].config().beta == 0.2
    renamed = define(0.3, "renamed")
    assert "again" not in METHODS
    assert METHODS["renamed"].config is renamed


def test_a_name_that_is_taken() -> None:
    with pytest.raises(ConfigError, match="method 'dpo': the name is taken by a built-in method"):

        @method
        def dpo(logps) -> None:
            pass

    @method(name="mine")
    def first(logps) -> None:
        pass

    with pytest.raises(ConfigError, match=r"the name is taken by the loss .*; give another: @method\(name="):

        @method(name="mine")
        def second(logps) -> None:
            pass

    assert METHODS["dpo"].config is DPOConfig
    assert METHODS["mine"].loss is first


def test_module_and_function_on_the_command_line(lab: Path) -> None:
    flags = ["--gap", "0.25", "--shape", "b", "--learning-rate", "1e-6", "--model_name", "m"]
    config = parse_command_line(["--method", "my_lab.losses:my_loss", *flags])
    assert (config.method, config.gap, config.shape, config.learning_rate) == ("my_loss", 0.25, "b", 1e-6)
    assert config.resolved_output_dir == "runs/my_loss-m"
    # Its name is enough from now on, and the import is not done again.
    assert type(parse_command_line(["--method", "my_loss"])) is type(config)
    assert type(parse_command_line(["--method", "my_lab.losses:my_loss"])) is type(config)
    assert parse_command_line(["--method=my_lab.losses:second"]).method == "other"
    assert METHODS["other"].coupled(METHODS["other"].config())
    assert not METHODS["other"].needs_reference(METHODS["other"].config())
    assert refusal("--method", "my_loss", "--gapp", "1") == "--gapp: unknown key 'gapp'; did you mean gap?"


def test_a_function_without_the_decorator_and_a_file(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (lab / "elsewhere").mkdir()
    (lab / "elsewhere" / "beside.py").write_text("from my_lab.curves import identity\n")
    (lab / "elsewhere" / "loss.py").write_text(
        "from beside import identity\n"
        "def plain(logps, rate: float | None = None):\n"
        "    return identity(logps)\n"
    )
    plain = parse_command_line(["--method", "my_lab.losses:plain", "--rate", "0.5"])
    assert (plain.method, plain.rate, METHODS["plain"].inputs) == ("plain", 0.5, "pairs")
    del METHODS["plain"]
    monkeypatch.chdir(lab / "elsewhere")
    config = parse_command_line(["--method", "loss.py:plain", "--rate", "none"])
    assert (config.method, config.rate) == ("plain", None)
    assert config.import_path == f"{lab}/elsewhere/loss.py:plain"
    again = parse_command_line(["--method", f"{lab}/elsewhere/../elsewhere/loss.py:plain"])
    assert type(again) is type(config)


@pytest.mark.parametrize("path", ["my_lab.losses:my_loss", "my_lab/losses.py:my_loss"])
def test_the_written_file_names_the_function(lab: Path, path: str) -> None:
    config = parse_command_line(["--method", path, "--gap", "0.25", "--seed", "7"])
    config.to_yaml("run.yaml")
    written = "my_lab.losses:my_loss" if ".py" not in path else f"{lab}/my_lab/losses.py:my_loss"
    assert Path("run.yaml").read_text().splitlines()[0] == f"method: {written}"
    assert parse_command_line(["--config", "run.yaml"]) == config
    assert type(config).from_yaml("run.yaml", gap=0.5).gap == 0.5
    with pytest.raises(ConfigError, match="but SimPOConfig is for 'simpo'"):
        SimPOConfig.from_yaml("run.yaml")
    # As a new process reads it: nothing is registered yet.
    program = "import sys; from ds_align.config import parse_command_line as p; print(p(sys.argv[1:]).gap)"
    command = [sys.executable, "-c", program, "--config", "run.yaml"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "0.25\n"


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("my_lab.losses:my_los", ("losses.py has no 'my_los'; did you mean my_loss?",)),
        ("my_lab.losses:zzz", ("losses.py has no 'zzz'; it has identity, method, my_loss, plain, second",)),
        ("my_lab.losses:CONSTANT", ("CONSTANT is a int; expected a function loss(logps",)),
        ("my_lab.loses:my_loss", ("no module 'my_lab.loses' in ", "path/to/file.py:function")),
        ("mylab.losses:my_loss", ("no module 'mylab' in ",)),
        ("my_lab/loses.py:my_loss", ("no file '", "my_lab/loses.py'; check the path")),
        ("my_lab.losses:", ("expected a name, module:function or file.py:function",)),
        ("broken:f", ("broken.py:3: ZeroDivisionError: division by zero",)),
        ("broken.py:f", ("broken.py:3: ZeroDivisionError: division by zero",)),
        ("syntax:f", ("syntax.py:2: SyntaxError: ",)),
        ("leaves:f", ("leaves.py:1: SystemExit: 3",)),
        ("needs:f", ("needs.py:1: ModuleNotFoundError: No module named 'not_there_at_all'",)),
    ],
)
def test_a_function_that_is_not_there(lab: Path, path: str, parts: tuple[str, ...]) -> None:
    (lab / "broken.py").write_text("# a comment\n\nx = 1 / 0\n")
    (lab / "syntax.py").write_text("x = 1\ny = = 1\n")
    (lab / "leaves.py").write_text("raise SystemExit(3)\n")
    (lab / "needs.py").write_text("import not_there_at_all\n")
    # The flag of the loss is no further error: which flags there are is not known.
    message = refusal("--method", path, "--gap", "1")
    assert message.startswith("--method: ")
    for part in parts:
        assert part in message
    (lab / "run.yaml").write_text(f"seed: 1\nmethod: '{path}'\n")
    assert refusal("--config", "run.yaml").startswith("run.yaml:2: ")


@pytest.mark.parametrize(
    ("code", "part"),
    [
        ("def f(): pass", "expected a function of the log-probs, loss(logps, *, ...), found f()"),
        ("def f(*, a: float = 1): pass", "found f(*, a: float = 1)"),
        ("def f(logps, *, a: float): pass", "parameter 'a' has no default; give one, as in a: float = 0.1"),
        ("def f(logps, a=1): pass", "parameter 'a' has no type; expected an annotation: float, int"),
        ("def f(logps, *a): pass", "parameter 'a' cannot become a setting"),
        ("def f(logps, **a): pass", "parameter 'a' cannot become a setting"),
        ("def f(logps, *, seed: int = 3): pass", "parameter 'seed' has a name that every configuration uses"),
        ("def f(logps, *, bf16: bool = True): pass", "parameter 'bf16' has a name"),
        ("def f(logps, *, nll_weight: float = 1): pass", "parameter 'nll_weight' has a name"),
        ("def f(logps, *, config: str = ''): pass", "parameter 'config' has a name"),
        ("def f(logps, *, loss_args: str = ''): pass", "parameter 'loss_args' has a name"),
        ("def f(logps, *, _a: float = 1): pass", "parameter '_a' has a name"),
        (
            "def f(logps, *, a: list = 3): pass",
            "parameter 'a' is annotated as <class 'list'>; expected float",
        ),
        ("def f(logps, *, a: float = 'x'): pass", "parameter 'a' has the default 'x'; expected a number"),
        ("def f(logps, *, a: 'Nope' = 3): pass", "the type of parameter 'a' cannot be read: NameError"),
        ("@method(inputs='pears')\ndef f(logps): pass", "inputs='pears'; expected pairs or unpaired"),
        ("@method(inputs='pairs')\ndef f(logps: 'UnpairedLogps'): pass", "annotated as UnpairedLogps"),
        ("@method(name='a/b')\ndef f(logps): pass", "method 'a/b': not a name; expected letters"),
        ("@method\nclass f: pass", "is a type; expected a function"),
    ],
)
def test_a_function_that_cannot_be_a_method(lab: Path, code: str, part: str) -> None:
    (lab / "wrong.py").write_text(f"from ds_align import method\n\n{code}\n")
    message = refusal("--method", "wrong:f")
    assert part in message
    assert "wrong.py:3: " in message or "@method: " in message
    assert "f" not in METHODS


def test_an_unknown_method_says_that_a_function_is_possible() -> None:
    assert "A loss of your own is given as module:function" in refusal("--method", "my_loss")


def test_help_shows_the_settings_of_the_function(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_command_line(["--help", "--method", "my_lab.losses:my_loss"])
    text = " ".join(capsys.readouterr().out.split())
    own = text[text.index("Method: my_loss:") :]
    assert "--gap X How far apart the two must be. Takes a number. Default: 0.5." in own
    assert "--shape X A loss of this laboratory. Takes one of a, b. Default: a." in own
    assert "--gamma_beta_ratio" not in text
    assert "--loss_args X" in text
    with pytest.raises(ConfigError, match="no module 'mylab'"):
        parse_command_line(["--help", "--method", "mylab:f"])


def test_the_decorator_needs_no_torch() -> None:
    program = (
        "import sys\nfrom ds_align import method\n"
        "@method\ndef f(logps, *, beta: float = 0.1): pass\n"
        "assert f.config(beta=0.2).import_path == '', f.config.import_path\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_script_is_found_again_by_its_file(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from ds_align import method\nfrom ds_align.config import parse_command_line\n"
        "@method\ndef f(logps, *, beta: float = 0.1): pass\n"
        "if __name__ == '__main__':\n"
        "    f.config(beta=0.2).to_yaml('run.yaml')\n"
        "    config = parse_command_line(['--config', 'run.yaml'])\n"
        "    assert type(config) is f.config\n"
    )
    subprocess.run([sys.executable, str(script)], cwd=tmp_path, check=True)
    config = parse_command_line(["--config", str(tmp_path / "run.yaml")])
    assert (config.method, config.beta, config.import_path) == ("f", 0.2, f"{script}:f")


def test_loss_args_are_the_settings_by_their_names(tmp_path: Path) -> None:
    given = {"beta": 0.2, "label_smoothing": 0.1, "loss_type": ["sigmoid", "robust"]}
    assert DPOConfig(loss_args=given) == DPOConfig(**given)
    config = DPOConfig(beta=0.2, loss_args={"beta": 0.2})
    config.loss_args = {"beta": 0.3}
    assert config.beta == 0.3
    assert "loss_args" not in config.model_dump()
    run = tmp_path / "run.yaml"
    run.write_text("method: dpo\nloss_args: {beta: 1e-2, label_smoothing: 0.1}\nmax_length: 64\n")
    # Of each argument the upper layer wins, whichever way it is given.
    config = parse_command_line(["--config", str(run), "--beta", "0.3"])
    assert (config.beta, config.label_smoothing, config.max_length) == (0.3, 0.1, 64)
    config = parse_command_line(["--config", str(run), "--loss_args", '{"beta": 0.3, "rpo_alpha": 1}'])
    assert (config.beta, config.label_smoothing, config.rpo_alpha) == (0.3, 0.1, 1.0)
    run.write_text("beta: 0.5\nlabel_smoothing: 0.2\n")
    argv = ["--method", "dpo", "--config", str(run), '--loss_args={"beta":1}', "--label_smoothing", "0.1"]
    config = parse_command_line(argv)
    assert (config.beta, config.label_smoothing) == (1.0, 0.1)
    assert DPOConfig.from_yaml(run, loss_args={"beta": 0.7}).beta == 0.7


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (['{"bta": 1}'], "--loss_args: loss_args: unknown key 'bta'; did you mean beta?"),
        (
            ['{"seed": 1}'],
            "--loss_args: loss_args: 'seed' is no argument of the loss; give it by itself",
        ),
        (
            ['{"fp16": true}'],
            "--loss_args: loss_args: 'fp16' is no argument of the loss; give it by itself",
        ),
        (['{"beta": "x"}'], "--loss_args: beta='x' is not valid; expected a number > 0"),
        (
            ['{"beta": 0.2}', "--beta", "0.3"],
            "--beta, --loss_args: beta=0.3 and loss_args: beta=0.2 disagree; give one of the two",
        ),
        (["3"], "--loss_args: loss_args=3 is not valid; expected a mapping"),
        ([], "--loss_args: loss_args=None is not valid; expected a mapping"),
    ],
)
def test_loss_args_errors(argv: list[str], message: str) -> None:
    assert refusal("--method", "ipo", "--loss_args", *argv) == message


def test_loss_args_that_are_no_mapping_at_all() -> None:
    assert "--loss_args: '{\"beta\": ' is not valid JSON" in refusal(
        "--method", "ipo", "--loss_args", '{"beta": '
    )
    twice = refusal("--method", "ipo", "--loss_args", '{"beta": 1, "beta": 2}')
    assert "'beta' is given twice" in twice
    text = refusal("--method", "cpo", "--loss_args", '{"zzz": 1}')
    assert text.endswith(
        "unknown key 'zzz'; expected beta, loss_type, label_smoothing, length_normalize, cpo_alpha, "
        "nll_normalization"
    )


def test_loss_args_of_an_own_method(lab: Path) -> None:
    argv = ["--method", "my_lab.losses:my_loss", "--loss_args", '{"gap": 2, "shape": "b"}']
    config = parse_command_line(argv)
    assert (config.gap, config.shape) == (2.0, "b")
