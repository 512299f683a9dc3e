"""`longtake verify`: weights in our code against the same weights in diffusers'."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longtake.cli.common import Device, Json, Overwrite, Rules, clean_errors, given

if TYPE_CHECKING:
    from longtake.evaluation.verify import Check

Weights = Annotated[
    str, typer.Argument(help="Folder or file of weights in any layout, or `toy`; its encoders inside or beside it.")
]
Image = Annotated[Path | None, typer.Option(help="A photograph; without, a picture of the toy world.")]
Prompt = Annotated[str | None, typer.Option(help="What moves in it and how; without, the caption of that picture.")]


def verify(
    context: typer.Context,
    weights: Weights,
    overrides: Rules = None,
    image: Image = None,
    prompt: Prompt = None,
    encoders: Annotated[str | None, typer.Option(help="Folder of the encoders, OWNER/NAME on the hub, or toy.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance of the teacher; 1 = none.")] = None,
    device: Device = None,
    json_file: Json = None,
    overwrite: Overwrite = False,
) -> None:
    """Compare weights in our code with the same in diffusers', piece by piece, and measure a short clip.

    Each line is passed, suspicious or wrong and says where to look; the exit code is 1 when one is wrong. What is being
    done is told meanwhile. The file for the checks grows with them, and says in the end that it is whole.
    """
    with clean_errors(context):
        from longtake.cli.common import EXIT_ERROR
        from longtake.config.generation import changes_of
        from longtake.evaluation.report import write_json
        from longtake.evaluation.verify import WRONG, as_json, as_text
        from longtake.evaluation.verify import verify as verified
        from longtake.outputs import check_output_file

        if json_file is not None:
            check_output_file(json_file, suffixes=(".json",), overwrite=overwrite)
        checks: list[Check] = []
        options = given(context, "image", "prompt", "encoders", "guidance", "device")
        begun = last = time.monotonic()
        begins = lambda what: typer.echo(f"{time.monotonic() - begun:6.1f} s  {what} ...", err=True)  # noqa: E731
        for check in verified(weights, changes=changes_of(*(overrides or [])), begins=begins, **options):
            now = time.monotonic()
            typer.echo(as_text(check, now - last))
            last = now
            checks.append(check)
            if json_file is not None:
                write_json(json_file, as_json(checks, finished=False))
        if json_file is not None:
            write_json(json_file, as_json(checks, finished=True))
        if any(check.status == WRONG for check in checks):
            raise typer.Exit(EXIT_ERROR)
