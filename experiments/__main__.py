"""The command line: `kvjax <command>` runs `main(Config)` of one module in this package.

Nothing is imported before it is known to be needed, so that `kvjax --help` answers at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from kvjax.errors import KvjaxError, nearest


class Command(NamedTuple):
    module: str
    help: str


COMMANDS = {
    "demo": Command("experiments.demo", "the shipped model, eight cache methods, four tasks: a table and a report"),
    "compare": Command("experiments.compare", "compare methods of your choice on a model, tasks and contexts"),
    "leaderboard": Command("experiments.leaderboard", "every named method at the same bytes, and the Pareto fronts"),
    "study": Command("experiments.study", "what the founding papers claim, predicted and measured: held or not"),
    "bottleneck": Command("experiments.bottleneck", "classes one task after another: who forgets what it learnt"),
    "calibrate": Command("experiments.calibrate", "find what a method must know of a model, and keep it in one file"),
    "convert": Command("experiments.convert", "turn a trained model into one whose attention caches less"),
    "variants": Command("experiments.variants", "attention variants trained at equal parameters: loss, recall, bytes"),
    "vit_allocation": Command("experiments.vit_allocation", "query heads allotted by key norms, on a small ViT"),
    "methods": Command("experiments.methods", "every named method: paper, what it chooses, bits per element"),
    "generate": Command("experiments.generate", "continue a prompt with the cache kept by any method"),
    "doctor": Command("experiments.doctor", "check Python, jax, devices and kernels, and say how to fix them"),
    "pretrain": Command("experiments.pretrain", "train the reference model from scratch; resumes where it stopped"),
}

INTERRUPTED = 130
BROKEN_PIPE = 141


def usage() -> str:
    """What `kvjax --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: kvjax <command> [options]",
            "",
            "Compare KV-cache methods on a real model: what each one costs and what it loses.",
            "",
            *lines,
            "",
            "kvjax <command> --help lists a command's options.  Start with: kvjax demo",
        ]
    )


def run(name: str, arguments: Sequence[str]) -> int:
    """Parses the arguments of one command into its `Config` and runs it; returns the exit code."""
    import tyro

    module = importlib.import_module(COMMANDS[name].module)
    config = tyro.cli(module.Config, prog=f"kvjax {name}", description=module.__doc__, args=list(arguments))
    return module.main(config) or 0


def fail(message: str) -> None:
    """Prints an error on stderr, folded to the terminal and without a traceback."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    console.print(Text("kvjax: error", style="bold red"))
    console.print(Padding(Text(message), (0, 2)))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that `argv` (default: the process's arguments) names; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        from kvjax import __version__

        print(f"kvjax {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        fail(f"unknown command {name!r}. {nearest(name, COMMANDS)}\nkvjax --help lists the commands.")
        return KvjaxError.exit_code
    try:
        return run(name, rest)
    except KvjaxError as error:
        fail(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away: `kvjax methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:  # what the system refuses: no permission, no room, no such file
        where = f": {error.filename}" if error.filename else ""
        fail(f"{error.strerror or error}{where}\nCheck that it is there, that it is yours, and that the disk has room.")
        return KvjaxError.exit_code


if __name__ == "__main__":
    sys.exit(main())
