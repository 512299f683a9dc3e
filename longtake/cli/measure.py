"""`longtake measure`: instruments of any video."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longtake.cli.common import Overwrite, clean_errors

Folders = Annotated[list[str], typer.Argument(metavar="NAME=FOLDER ...", help="Folders of videos, each with a name.")]
Json = Annotated[Path | None, typer.Option("--json", help="File for every number: videos, curves, rows.")]
Html = Annotated[
    Path | None, typer.Option("--html", help="Page with table, curves and the videos, which it links relatively.")
]
Block = Annotated[
    str | None,
    typer.Option(metavar="FRAMES", help="Pixel frames of a block, for seams: 12, or 9+12 where the first has 9."),
]


def measure(
    context: typer.Context,
    folders: Folders,
    json_file: Json = None,
    html: Html = None,
    block: Block = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure videos, whoever made them: motion, drift, seams, returns, broken frames; no weights are needed."""
    with clean_errors(context):
        from longtake.evaluation.html import write_page
        from longtake.evaluation.measure import as_json, as_table, measure_folders, parse_blocks, parse_folders
        from longtake.evaluation.report import write_json
        from longtake.outputs import check_output_file, writing

        named, blocks = parse_folders(folders), parse_blocks(block)
        for path, suffix in ((json_file, ".json"), (html, ".html")):
            if path is not None:
                check_output_file(path, suffixes=(suffix,), overwrite=overwrite)
        videos = measure_folders(named, blocks)
        typer.echo(as_table(videos))
        if json_file is not None:
            with writing(json_file):
                write_json(json_file, as_json(videos))
        if html is not None:
            with writing(html):
                write_page(html, videos)
