"""The command line as a user meets it: quick help, clear errors, exit codes."""

from __future__ import annotations

import dataclasses
import importlib
import os
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest

from experiments import __main__ as cli
from kvjax.errors import CacheFullError
from kvjax.progress import track

HELP_SECONDS = 0.5


def kvjax(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "experiments", *arguments], capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def command(monkeypatch):
    """Makes `kvjax try` run the given main function, with a Config of one option."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        number: int = 1

    def install(main) -> None:
        module = SimpleNamespace(Config=Config, main=main, __doc__="Tries something.")
        monkeypatch.setitem(sys.modules, "experiments.try", module)
        monkeypatch.setitem(cli.COMMANDS, "try", cli.Command("experiments.try", "tries something"))

    return install


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["", *cli.COMMANDS])
def test_help_answers_at_once_and_does_not_start_jax(name):
    """Processor time, which is the wall time of an idle machine: other work on this one must not decide."""
    arguments = [*filter(None, [name]), "--help"]
    code = (
        "import sys; from experiments.__main__ import main\n"
        f"try: main({arguments!r})\n"
        "finally: assert 'jax' not in sys.modules, 'the help imported jax'"
    )
    seconds = []
    for _ in range(3):
        before = _processor_seconds()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        seconds.append(_processor_seconds() - before)
        assert done.returncode == 0, done.stderr
        assert "usage: kvjax" in done.stdout
        if seconds[-1] < HELP_SECONDS:
            break
    assert min(seconds) < HELP_SECONDS


def _processor_seconds() -> float:
    """Of all child processes so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_frozen_config_with_documented_defaults(name):
    module = importlib.import_module(cli.COMMANDS[name].module)
    assert module.__doc__
    assert dataclasses.is_dataclass(module.Config)
    assert module.Config.__dataclass_params__.frozen
    module.Config()  # everything has a default
    assert callable(module.main)


def test_no_arguments_print_the_usage(capsys):
    assert cli.main([]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed and command.help in printed for name, command in cli.COMMANDS.items())
    assert max(map(len, printed.splitlines())) <= 100


def test_the_version_is_printed(capsys):
    from kvjax import __version__

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"kvjax {__version__}\n"


def test_an_unknown_command_names_the_nearest(capsys):
    assert cli.main(["compares"]) == 2
    assert "Did you mean 'compare'?" in capsys.readouterr().err


def test_options_reach_the_command_and_its_exit_code_comes_back(command):
    command(lambda config: config.number)
    assert cli.main(["try", "--number", "3"]) == 3
    command(lambda config: None)
    assert cli.main(["try"]) == 0


def test_an_unknown_option_is_refused(command, capsys):
    command(lambda config: 0)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["try", "--numbr", "3"])
    assert stopped.value.code == 2
    assert "--number" in capsys.readouterr().err


def test_an_expected_error_is_a_message_not_a_traceback(command, capsys):
    def main(config):
        raise CacheFullError("row 2 needs 300 slots and has 256 [bold]; use max_length=300")

    command(main)
    assert cli.main(["try"]) == CacheFullError.exit_code == 4
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "row 2 needs 300 slots and has 256 [bold]; use" in " ".join(printed.err.split())
    assert "Traceback" not in printed.err


def test_a_bug_keeps_its_traceback(command):
    def main(config):
        raise ZeroDivisionError

    command(main)
    with pytest.raises(ZeroDivisionError):
        cli.main(["try"])


def test_what_the_system_refuses_names_the_file(command, capsys, tmp_path):
    (tmp_path / "file").write_text("")

    def main(config):
        (tmp_path / "file" / "below").write_text("")

    command(main)
    assert cli.main(["try"]) == 2
    printed = "".join(capsys.readouterr().err.split())
    assert "Notadirectory" in printed and f"{tmp_path}/file/below" in printed and "Traceback" not in printed


def test_control_c_ends_with_130(command, capsys):
    def main(config):
        raise KeyboardInterrupt

    command(main)
    assert cli.main(["try"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_reader_that_goes_away_is_no_error():
    code = (
        "import sys; from experiments import __main__ as cli\n"
        "def usage():\n    for _ in range(100_000): print('line')\n    return ''\n"
        "cli.run = lambda name, rest: usage() and 0\n"
        "sys.exit(cli.main(['doctor']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=30) == cli.BROKEN_PIPE
    assert errors == ""


def test_the_module_and_the_script_are_one():
    done = kvjax("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("kvjax ")


def test_progress_without_a_terminal_is_plain_lines_on_stderr(capsys):
    with track("measuring", 3) as advance:
        for name in ("a", "b", "c"):
            advance(note=name)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "measuring 3/3 0 s c\n"


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_progress_on_a_terminal_is_a_bar():
    import pty

    code = "from kvjax.progress import track\nwith track('measuring', 2) as a: a(note='[x]'); a(note='done')"
    controller, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    subprocess.run([sys.executable, "-c", code], stderr=terminal, env=environment, check=True, timeout=30)
    os.close(terminal)
    written = os.read(controller, 65536).decode()
    os.close(controller)
    assert "measuring" in written and "2/2" in written and "━" in written
