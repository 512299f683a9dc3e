"""The command `longtake serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longtake.cli.common import Decoder, Rules, Run, clean_errors, given, source_of
from longtake.cli.generate import Dtype, Encoders, Model, Stage
from longtake.errors import ConfigError


def serve(
    context: typer.Context,
    overrides: Rules = None,
    run: Run = None,
    model: Model = None,
    encoders: Encoders = None,
    config: Stage = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen at; others than this machine's need a token.")
    ] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port; 0 = any that is free.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="File whose first line is the token.")] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Name by which the server may be called; give it once for each.")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Where recordings and saved sessions lie.")] = None,
    max_sessions: Annotated[int | None, typer.Option(help="Sessions that play at once; default: as measured.")] = None,
    history_blocks: Annotated[
        int | None, typer.Option("--history", help="Blocks by which a session can be rewound; each costs memory.")
    ] = None,
    dtype: Dtype = None,
    decoder: Decoder = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ..., or several, a worker each: cuda:0,cuda:1; default: a GPU.")
    ] = None,
) -> None:
    """Open a page on which videos play while they are made, and are steered."""
    with clean_errors(context):
        from longtake.config.generation import changes_of

        changes = changes_of(*(overrides or []), dtype=dtype, decoder=decoder)
        source = source_of(run, "toy" if model is None and run is None else model, encoders, config, changes)
        try:
            from longtake.serve.run import serve as start
        except ModuleNotFoundError as error:
            raise ConfigError(f"{error.name} is not installed; run pip install 'longtake[serve]'") from None
        from longtake.serve.settings import ServeSettings

        token = None if token_file is None else _first_line(token_file)
        said = given(context, "folder", "host", "port", "max_sessions", "history_blocks")
        settings = ServeSettings(token=token, hosts=tuple(allow_host or ()), **said)
        devices = [None] if device is None else device.split(",")
        start(source, devices, settings, typer.echo)


def _first_line(file: Path) -> str:
    try:
        return file.read_text().strip().splitlines()[0].strip()
    except (OSError, UnicodeError, IndexError):
        raise ConfigError(f"{file} holds no token; write one line: openssl rand -hex 32 > {file}") from None
