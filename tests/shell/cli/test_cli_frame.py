import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from streamlstm import errors
from streamlstm.cli import main as frame
from streamlstm.cli.groups import Entry, Group, LazyGroup
from streamlstm.cli.options import examples, with_config

ROOT = Path(__file__).parents[3]
MINIMAL = str(ROOT / "config" / "minimal.yaml")


@pytest.fixture(autouse=True)
def _no_configuration_in_the_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith("STREAMLSTM_"):
            monkeypatch.delenv(name)


def process(*args, **more):
    return subprocess.run(
        [sys.executable, "-m", "streamlstm.cli.main", *args],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **more,
    )


@pytest.fixture
def program(monkeypatch, tmp_path):
    """The frame around one command, ``do``, that does what the test says."""

    def program(body):
        module = tmp_path / "doing.py"
        module.write_text("")
        monkeypatch.syspath_prepend(tmp_path)
        sys.modules.pop("doing", None)
        import doing  # noqa: PLC0415, because it was made just now

        doing.do = click.command("do")(body)
        cli = LazyGroup("streamlstm", entries={"do": Entry("doing:do", "Do.", "Here")})
        monkeypatch.setattr(frame, "cli", cli)
        return frame.main(["do"])

    return program


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["--version"],
        ["config", "--help"],
        ["config", "show", "--help"],
        ["checkpoint", "restore", "--help"],
        ["verify", "--help"],
    ],
)
def test_help_imports_nothing_heavy(args):
    heavy = [
        "torch",
        "numpy",
        "pyarrow",
        "pydantic",
        "yaml",
        "kafka",
        "rich",
        "structlog",
        "prometheus_client",
        "msgspec",
    ]
    code = (
        "import sys; from streamlstm.cli.main import main; code = main(sys.argv[1:]);"
        f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")


def test_help_lists_every_command_under_a_heading_and_ends_with_examples(capsys):
    assert frame.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, entry in frame.COMMANDS.items():
        assert f"  {name}" in text
        assert entry.help in text
        assert f"{entry.heading}:" in text
    assert text.rstrip().splitlines()[-4].strip() == "Examples:"


def test_a_missing_module_does_not_break_the_help(capsys):
    cli = LazyGroup("g", entries={"gone": Entry("streamlstm.cli.gone:gone", "Went.", "Here")})
    assert "Went." in cli.get_help(click.Context(cli))


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["rnu"], "did you mean 'run'?"),
        (["config", "vaildate"], "did you mean 'validate'?"),
        (["zzz"], "there is: run, replay, demo"),
        (["config", "show", "--orign"], "--origin"),
    ],
)
def test_a_mistyped_command_is_answered_with_the_near_one(capsys, args, hint):
    assert frame.main(args) == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert hint in out.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.StreamlstmError, 1),
        (errors.LogGap, 65),
        (errors.Unavailable, 69),
        (errors.CheckpointNotWritten, 74),
        (errors.Temporary, 75),
        (errors.Superseded, 76),
        (errors.NotAuthorised, 77),
        (errors.ConfigError, 78),
    ],
)
def test_each_error_is_one_message_on_stderr_and_its_own_exit_code(program, capsys, error, code):
    def body():
        raise error("it broke: mend it")

    assert program(body) == code
    assert capsys.readouterr() == ("", "streamlstm: error: it broke: mend it\n")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (errors.DataError, r"no field a\nstreamlstm: fine\x1b[2J\u2028b\ud800"),
        (errors.ConfigError, "no field a\nstreamlstm: fine\\x1b[2J\\u2028b\\ud800"),
    ],
)
def test_what_an_error_quotes_can_neither_forge_a_line_nor_steer_the_terminal(program, capsys, error, told):
    def body():
        raise error("no field a\nstreamlstm: fine\x1b[2J\u2028b\ud800")

    program(body)
    assert capsys.readouterr().err == f"streamlstm: error: {told}\n"


def test_an_interrupt_is_130(program):
    def body():
        raise KeyboardInterrupt

    assert program(body) == 130


def test_a_command_ends_with_0_whatever_it_wrote_or_with_the_code_it_asked_for(program):
    assert program(lambda: click.echo("x")) == 0
    assert program(lambda: click.get_current_context().exit(3)) == 3


def test_a_defect_keeps_its_traceback(program):
    def body():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        program(body)


def test_a_lost_connection_does_not_end_quietly(program):
    def body():
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(RuntimeError, match="a connection broke"):
        program(body)


def test_a_reader_that_went_away_is_no_traceback():
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "streamlstm.cli.main", "config", "show", "-c", MINIMAL],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_colour_is_for_terminals_that_want_it():
    import pty  # noqa: PLC0415, because only this test needs it

    def stderr_of(**environ):
        leader, follower = pty.openpty()
        subprocess.run(
            [sys.executable, "-m", "streamlstm.cli.main", "config", "show", "-c", "none.yaml"],
            stderr=follower,
            env={**os.environ, **environ},
            timeout=60,
            check=False,
        )
        os.close(follower)
        text = os.read(leader, 10_000).decode()
        os.close(leader)
        return text

    assert "\x1b[" in stderr_of()
    assert "\x1b[" not in stderr_of(NO_COLOR="1")


@pytest.mark.parametrize("name", frame.COMMANDS)
def test_every_command_exists_and_ends_its_help_with_examples(name):
    def walk(command, path):
        yield path, command
        if isinstance(command, click.Group):
            for inner in command.list_commands(click.Context(command)):
                yield from walk(command.get_command(click.Context(command), inner), f"{path} {inner}")

    command = frame.cli.get_command(click.Context(frame.cli), name)
    assert [
        path for path, found in walk(command, name) if f"Examples:\n  streamlstm {path}" not in (found.epilog or "")
    ] == []


def test_a_command_gets_its_configuration_from_file_environment_and_set(monkeypatch, capsys):
    @click.command(epilog=examples("x"))
    @with_config
    @click.option("--more", default=1)
    def show(config, *, more):
        click.echo(f"{config.model.horizons} {config.model.season} {config.model.seed} {more}")

    monkeypatch.setenv("STREAMLSTM_MODEL__SEASON", "7")
    show.main(["-c", MINIMAL, "--set", "model.seed=5", "--more", "2"], standalone_mode=False)
    assert capsys.readouterr().out == "24 7 5 2\n"


def test_a_subgroup_is_asked_by_its_own_commands(capsys):
    group = Group("g", commands=[click.Command("alpha"), click.Command("beta")])
    with pytest.raises(click.UsageError, match="did you mean 'alpha'"):
        group.main(["alpa"], standalone_mode=False)


def test_validate_says_ok_and_what_it_comes_to():
    done = process("config", "validate", "-c", MINIMAL)
    assert done.returncode == 0
    assert done.stdout.startswith(f"{MINIMAL}: OK\n")
    assert "forecasts, forecasts.dlq, forecasts.progress" in done.stdout
    assert done.stderr == ""


def test_validate_tells_every_problem_and_exits_78(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("source: {topics: [a]}\ndecode: {series_id: [$.h], target: $.v}\nmodel: {horizons: 0}\n")
    done = process("config", "validate", "-c", str(file), "--set", "nmae=x")
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.splitlines() == [
        "streamlstm: error: 3 problems in the configuration:",
        f"  {file}:2: decode.timestamp.path: this is missing: write for example path: $.timestamp",
        f"  {file}:3: model.horizons: 0 is refused: write a whole number from 1 to 1000",
        "  --set nmae: there is no such key; did you mean name?",
    ]


def test_validate_compiles_the_paths_too(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("source: {topics: [a]}\ndecode: {series_id: [$.h..x], timestamp: {path: $.t}, target: $.v}\n")
    done = process("config", "validate", "-c", str(file))
    assert done.returncode == 78
    assert "$.h..x" in done.stderr


def test_show_says_where_each_key_was_set(capsys, monkeypatch):
    monkeypatch.setenv("STREAMLSTM_MODEL__SEASON", "7")
    args = ["config", "show", "-c", MINIMAL, "--set", "source.properties.fetch_min_bytes=2", "--origin"]
    assert frame.main(args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"  topics: [metrics.raw]  # {MINIMAL}:4" in lines
    assert "  season: 7  # environment STREAMLSTM_MODEL__SEASON" in lines
    assert "  properties: {fetch_min_bytes: 2}  # --set source.properties.fetch_min_bytes" in lines
    assert "  horizons: 24  # default" in lines


def test_show_as_json_is_one_object_of_data(capsys):
    assert frame.main(["config", "show", "-c", MINIMAL, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["source"]["topics"] == ["metrics.raw"]
    assert frame.main(["config", "show", "-c", MINIMAL, "--json", "--origin"]) == 0
    assert json.loads(capsys.readouterr().out)["model.seed"] == {"value": 17, "origin": "default"}


def test_a_proof_cannot_end_before_it_begins(capsys):
    assert frame.main(["verify", "-c", MINIMAL, "--from", "8", "--to", "5"]) == 2
    assert "--to 5 is before --from 8" in capsys.readouterr().err
