"""The commands about weights: `longtake download`, `convert`, `export` and `students`."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from longtake.cli.common import Overwrite, Quiet, Rules, clean_errors, given

Target = Annotated[Path, typer.Argument(help="Folder to write.")]


class Layout(StrEnum):
    """The layouts that `convert` writes."""

    original = "original"
    diffusers = "diffusers"
    longtake = "longtake"


def download(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face hub, or a name of `longtake students`.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the files; by default the hub's cache.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Fetch all that a model needs: transformer, VAE, text and image encoder, tokenizer."""
    with clean_errors(context):
        from longtake.weights.download import download as fetch

        model, lacking = fetch(name, output)
        if lacking:
            typer.echo(f"The repository has no {' and no '.join(lacking)}: name them with --encoders")
        typer.echo(f"Ready: longtake generate --model {shlex.quote(str(model))} ...")


def convert(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(help="Folder or file of weights, OWNER/NAME on the Hugging Face hub, or a published student."),
    ],
    target: Target,
    to: Annotated[Layout, typer.Option(help="Names and config.json of Wan's code, of diffusers, or of Longtake.")],
    network: Annotated[
        str | None, typer.Option(help="Which one of a .pt file: generator, generator_ema, critic, ...")
    ] = None,
    lora: Annotated[Path | None, typer.Option(help="File or folder of low-rank updates to merge.")] = None,
    lora_scale: Annotated[
        float | None, typer.Option(help="alpha / rank of all layers; else what the updates say, or 1.")
    ] = None,
    unmerge: Annotated[bool, typer.Option("--unmerge", help="Take the updates out instead of merging them.")] = False,
    shard_bytes: Annotated[int | None, typer.Option(help="Most bytes of a weight file.")] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Rewrite the weights of a transformer in another layout, bit for bit."""
    with clean_errors(context):
        from longtake.weights.convert import convert as rewrite

        options = given(context, "network", "lora_scale", "shard_bytes")
        for file in rewrite(source, target, to.value, lora=lora, unmerge=unmerge, overwrite=overwrite, **options):
            typer.echo(str(file))


def export(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="Log folder, stage folder or checkpoint of a training run.")],
    target: Target,
    overrides: Rules = None,
    dtype: Annotated[str | None, typer.Option(help="float16, bfloat16 or float32.")] = None,
    best: Annotated[bool, typer.Option("--best", help="What keep_best kept, in place of the last checkpoint.")] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Write the student of a run with its rules: a folder for `longtake generate --model`."""
    with clean_errors(context):
        from longtake.config.generation import changes_of
        from longtake.inference.export import export as write

        changes = changes_of(*(overrides or []))
        typer.echo(str(write(run, target, changes=changes, overwrite=overwrite, best=best, **given(context, "dtype"))))


def students(context: typer.Context) -> None:
    """List the published students that are known by name, with their licences, and those that cannot be played."""
    with clean_errors(context):
        from longtake.weights.students import read_table

        playable, refused = read_table()
        for student in playable:
            typer.echo(f"{student.name}\n  --model {student.model}\n  {student.in_words}\n  licence: {student.licence}")
        typer.echo("\nCannot be played:")
        for row in refused:
            typer.echo(f"{row.name}\n  {row.repository}: {row.law}; it would need {row.needed}")
            typer.echo(f"  licence: {row.licence}")
