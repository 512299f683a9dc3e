"""The command `longtake play`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longtake.cli.common import clean_errors, given_options, source_of


def play(
    context: typer.Context,
    image: Annotated[Path, typer.Option(help="The first frame; any size, cropped to the aspect, never stretched.")],
    prompt: Annotated[str, typer.Option(help="What happens until another prompt is typed.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The mp4 file.")],
    run: Annotated[Path | None, typer.Option(help="Log folder or stage folder of a training run.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or file of weights in any layout, or OWNER/NAME on the Hugging Face hub.")
    ] = None,
    encoders: Annotated[
        Path | None, typer.Option(help="Folder of the encoders, where it is not in or beside the model's.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of the stage whose rules the weights of --model follow.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Longest video, in seconds; by default there is no end.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32: type of weights and cache.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default a GPU if there is one.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file of the output's name; without it, the name is numbered.")
    ] = False,
) -> None:
    """Make a video without end; type prompts while it is written, Ctrl-C or /quit ends it."""
    from longtake.config.generation import changes_of, frames_of
    from longtake.errors import ConfigError
    from longtake.outputs import check_output_file, free_name

    with clean_errors(context):
        if (run is None) == (model is None) or (run is not None and (encoders or config) is not None):
            raise ConfigError("give either --run, or --model with --encoders and --config where they are needed")
        frames_of(None, seconds, 1)
        check_output_file(output, suffixes=(".mp4",), inputs=[image, config], overwrite=True)
        output = output if overwrite else free_name(output)
        source = source_of(run, model, encoders, config, changes_of(dtype=dtype))
        from longtake.inference.generator import Generator
        from longtake.inference.play import play as start

        generator = Generator.build(source, device)
        most = frames_of(None, seconds, generator.fps)
        report = start(generator, image, prompt, output, num_frames=most, **given_options(seed=seed))
        typer.echo(str(report))
