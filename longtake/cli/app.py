"""The command line: the app, its commands and how a process begins; each command reads its arguments and calls one
function.

No default lives here. An option that was not given is None and is not passed on, so that it cannot undo a value of a
configuration file. Nothing heavy is imported before a command needs it: `longtake --help` loads no torch.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from longtake import __version__
from longtake.cli.bench import bench
from longtake.cli.generate import generate, play
from longtake.cli.help import Command
from longtake.cli.measure import evaluate, measure
from longtake.cli.recipes import recipes
from longtake.cli.serve import serve
from longtake.cli.toy import world
from longtake.cli.train import doctor, encode, show_config, teacher_data, train
from longtake.cli.verify import verify
from longtake.cli.weights import convert, download, export, students

# The panels of `longtake --help` with their commands
_COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    "Make videos": (generate, play, serve),
    "Train": (train, encode, teacher_data, show_config),
    "Judge": (evaluate, measure, verify, bench),
    "Weights": (download, convert, export, students),
    "This machine, toy data": (doctor, world),
}
app = typer.Typer(
    name="longtake",
    help="Trains and runs streaming image-to-video generators distilled from Wan video diffusion models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _panel, _commands in _COMMANDS.items():
    for _command in _commands:
        _name = "config" if _command is show_config else None
        app.command(_name, cls=Command, rich_help_panel=_panel)(_command)
app.add_typer(recipes, rich_help_panel="Train")


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"longtake {__version__}")
        raise typer.Exit


@app.callback()
def common(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_tell_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of every command."""
    context.obj = debug
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name of a file may be no text
    # numpy's products are small here; its threads would cost five times the time beside torch's and scoring processes.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # FlashAttention-4 keeps what it compiles between processes where it is asked to; torch does so by itself.
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")


def main() -> None:
    """The console script."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # a closed standard stream is an empty one: else a file gets its number, and with it what is said
    os.close(handle)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    # What ends a job or a terminal is told as Ctrl-C is; but a rank that waits for others would not hear of it.
    for number in () if "WORLD_SIZE" in os.environ else (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    app(prog_name="longtake")
