"""`longtake world`: the toy world as a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longtake.cli.common import clean_errors, given

PixelSwitches = Annotated[
    list[int] | None,
    typer.Option("--switch", help="Pixel frame at which the captions change; may be given several times."),
]
Formats = Annotated[
    list[str] | None, typer.Option("--format", help="images, clips or lmdb; may be given several times.")
]


def world(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Folder to write; nothing happens when it holds the same world.")],
    num_worlds: Annotated[int | None, typer.Option(help="Worlds, one sample each.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Pixel frames of each clip.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the worlds.")] = None,
    formats: Formats = None,
    switch_frames: PixelSwitches = None,
    one_switch: Annotated[
        bool | None, typer.Option(help="Each caption changes once, at one of the frames by turns.")
    ] = None,
    stops: Annotated[
        bool | None, typer.Option(help="Sprites may stop; the shipped weights were not trained on it.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another world in the folder.")] = False,
) -> None:
    """Write the toy world as a data set: pictures, clips and LMDB, with captions."""
    with clean_errors(context):
        from longtake.config.groups import WorldConfig
        from longtake.toy.files import write_world

        names = ("num_worlds", "num_frames", "seed", "formats", "switch_frames", "one_switch", "stops")
        settings = WorldConfig.from_tree(given(context, *names))
        written = write_world(folder, settings, overwrite=overwrite)
        typer.echo(f"{settings.num_worlds} worlds are in {written}: {', '.join(settings.formats)}")
