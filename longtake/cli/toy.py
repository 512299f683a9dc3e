"""The commands about the toy world: `longtake world` and `longtake evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longtake.cli.common import Device, Run, clean_errors, given
from longtake.errors import ConfigError

Models = Annotated[
    list[str] | None,
    typer.Option(help="Or a folder of `longtake export`, or toy; given several times, the last is the result."),
]
Teacher = Annotated[str | None, typer.Option(help="With --model: a folder of bidirectional weights, or toy.")]
Report = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder of table, JSON and plots; by default that of the run.")
]
OpenWorlds = Annotated[
    int | None, typer.Option(help="Further worlds whose captions leave a motion open, in a table of their own.")
]
LatentSwitches = Annotated[
    list[int] | None,
    typer.Option(
        "--switch", help="Latent frame at which the captions change, on a block boundary; may be given several times."
    ),
]
PixelSwitches = Annotated[
    list[int] | None,
    typer.Option("--switch", help="Pixel frame at which the captions change; may be given several times."),
]
Formats = Annotated[
    list[str] | None, typer.Option("--format", help="images, clips or lmdb; may be given several times.")
]


def evaluate(
    context: typer.Context,
    run: Run = None,
    model: Models = None,
    teacher: Teacher = None,
    output: Report = None,
    num_worlds: Annotated[int | None, typer.Option(help="Held-out toy worlds, in place of the run's value.")] = None,
    num_latent_frames: Annotated[int | None, typer.Option(help="Length, in place of the run's value.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of worlds and noise, in place of the run's value.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Worlds at once, in place of the run's value.")] = None,
    open_worlds: OpenWorlds = None,
    ablations: Annotated[bool | None, typer.Option(help="Rows with a condition taken away.")] = None,
    switch_frames: LatentSwitches = None,
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the report that is in the folder.")] = False,
) -> None:
    """Measure a run, or exported students, in held-out toy worlds: table, JSON and plots."""
    with clean_errors(context):
        if (run is None) == (not model):
            raise ConfigError("give either --run or --model: a training run, or folders of weights")
        if run is not None and teacher is not None:
            raise ConfigError("--teacher goes with --model; a run knows its teacher")
        folder = output or run
        if folder is None:
            raise ConfigError("--model needs --output, the folder that table, JSON and plots are written to")
        if (there := folder / "evaluation.json").exists() and not overwrite:
            raise ConfigError(f"{there} exists already; name another folder with -o, or give --overwrite to replace it")
        names = ("num_worlds", "num_latent_frames", "seed", "batch_size", "open_worlds", "ablations", "switch_frames")
        from longtake.evaluation.run import evaluate as measure
        from longtake.evaluation.target import of_models

        target = run if run is not None else of_models(model or [], teacher)
        report = measure(target, overrides=given(context, *names), output=output, device=device)
        typer.echo(str(report))


def world(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Folder to write; nothing happens when it holds the same world.")],
    num_worlds: Annotated[int | None, typer.Option(help="Worlds, one sample each.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Pixel frames of each clip.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the worlds.")] = None,
    formats: Formats = None,
    switch_frames: PixelSwitches = None,
    stops: Annotated[
        bool | None, typer.Option(help="Sprites may stop; the shipped weights were not trained on it.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another world in the folder.")] = False,
) -> None:
    """Write the toy world as a data set: pictures, clips and LMDB, with captions."""
    with clean_errors(context):
        from longtake.config.groups import WorldConfig
        from longtake.toy.files import write_world

        names = ("num_worlds", "num_frames", "seed", "formats", "switch_frames", "stops")
        settings = WorldConfig.from_tree(given(context, *names))
        written = write_world(folder, settings, overwrite=overwrite)
        typer.echo(f"{settings.num_worlds} worlds are in {written}: {', '.join(settings.formats)}")
