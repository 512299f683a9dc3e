"""The commands that judge: `longtake measure` of any videos, `longtake evaluate` of students and their teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from longtake.cli.common import Device, Json, Overwrite, Quiet, Rules, Run, clean_errors, given, refuse, told_once
from longtake.cli.generate import WAIT_MINUTES, Encoders
from longtake.errors import ConfigError

Folders = Annotated[list[str], typer.Argument(metavar="NAME=FOLDER ...", help="Folders of videos, each with a name.")]
Html = Annotated[
    Path | None, typer.Option("--html", help="Page with table, curves and the videos, which it links relatively.")
]
Block = Annotated[
    str | None,
    typer.Option(metavar="FRAMES", help="Pixel frames of a block, for seams: 12, or 9+12 where the first has 9."),
]
Models = Annotated[
    list[str] | None,
    typer.Option(help="Or a folder of `longtake export`, or toy; given several times, the last is the result."),
]
Teacher = Annotated[str | None, typer.Option(help="With --model: a folder of bidirectional weights, or toy.")]
Report = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder of table, JSON and plots; by default that of the run.")
]
Data = Annotated[
    Path | None,
    typer.Option(help="Rows of any format to make videos of, an encoded set too; without it held-out toy worlds."),
]
Rows = Annotated[int | None, typer.Option("--rows", help="With --data: the first so many rows.")]
Multiples = Annotated[
    str | None, typer.Option(help="With --data: lengths of the students' videos in training clips, such as 1,4,10.")
]
Samples = Annotated[int | None, typer.Option(help="With --data: videos of each row: seeds S, S + 1, ...")]
Steps = Annotated[int | None, typer.Option(help="With --data: sampling steps of the teacher.")]
Guidance = Annotated[float | None, typer.Option(help="With --data: guidance of the teacher.")]
Layout = Annotated[
    bool | None,
    typer.Option("--vbench", help="With --data: also lay the videos out as VBench reads them."),
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
# Options that belong to one of the two kinds of evaluation
_OF_WORLDS = ("num_worlds", "num_latent_frames", "batch_size", "open_worlds", "ablations", "switch_frames")
_OF_DATA = ("num_rows", "multiples", "samples", "teacher_steps", "teacher_guidance", "layout")


def evaluate(
    context: typer.Context,
    overrides: Rules = None,
    run: Run = None,
    model: Models = None,
    teacher: Teacher = None,
    encoders: Encoders = None,
    data: Data = None,
    num_rows: Rows = None,
    multiples: Multiples = None,
    samples: Samples = None,
    teacher_steps: Steps = None,
    teacher_guidance: Guidance = None,
    layout: Layout = None,
    output: Report = None,
    num_worlds: Annotated[int | None, typer.Option(help="Held-out toy worlds, in place of the run's value.")] = None,
    num_latent_frames: Annotated[int | None, typer.Option(help="Length, in place of the run's value.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of worlds and noise, in place of the run's value.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Worlds at once; on a GPU at least 32.")] = None,
    open_worlds: OpenWorlds = None,
    ablations: Annotated[bool | None, typer.Option(help="Rows with a condition taken away.")] = None,
    switch_frames: LatentSwitches = None,
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the report that is in the folder.")] = False,
    quiet: Quiet = False,
) -> None:
    """Measure a run, or models, beside their teacher: on rows of your own, or in held-out toy worlds."""
    with clean_errors(context):
        if (run is None) == (not model):
            raise ConfigError("give either --run or --model: a training run, or folders of weights")
        if run is not None and (teacher or encoders) is not None:
            raise ConfigError("--teacher goes with --model, and so does --encoders; a run knows its own")
        if data is not None:
            refuse(context, _OF_WORLDS, "{option} is of toy worlds; leave it or --data out")
        else:
            refuse(context, (*_OF_DATA, "overrides"), "{option} needs --data, the rows to make videos of")
        folder = output or run
        if folder is None:
            raise ConfigError("--model needs --output, the folder that table, JSON and plots are written to")
        if (there := folder / "evaluation.json").exists() and not overwrite:
            raise ConfigError(f"{there} exists already; name another folder with -o, or give --overwrite to replace it")
        if data is not None:
            asked = {"data": data, **given(context, *_OF_DATA, "seed")}
            _on_data(run, model or [], teacher, encoders, overrides or [], asked, folder, device, overwrite)
            return
        from longtake.evaluation.run import evaluate as measure
        from longtake.evaluation.target import of_models
        from longtake.parallel.mesh import init_mesh

        target = run if run is not None else of_models(model or [], teacher, encoders)
        with init_mesh(device) as mesh, told_once(mesh):
            report = measure(target, overrides=given(context, *_OF_WORLDS, "seed"), output=output, mesh=mesh)
            if mesh.is_main:
                typer.echo(str(report))


def _on_data(
    run: Path | None,
    models: list[str],
    teacher: str | None,
    encoders: str | None,
    overrides: list[str],
    asked: dict[str, Any],
    folder: Path,
    device: str | None,
    overwrite: bool,
) -> None:
    from longtake.config.generation import changes_of
    from longtake.evaluation.contenders import Asked, parse_multiples
    from longtake.evaluation.on_data import evaluate_on_data, tables
    from longtake.evaluation.target import of_models, of_run
    from longtake.parallel.mesh import init_mesh

    if "multiples" in asked:
        asked["multiples"] = parse_multiples(asked["multiples"])
    wanted, changes = Asked(**asked), changes_of(*overrides)
    target = of_run(run, changes) if run is not None else of_models(models, teacher, encoders, changes)
    # The ranks meet at the end alone: the one with the shortest share waits for the longest.
    with init_mesh(device, timeout_minutes=WAIT_MINUTES) as mesh, told_once(mesh):
        videos = evaluate_on_data(target, wanted, folder, mesh, overwrite=overwrite)
        if mesh.is_main:
            typer.echo(tables(videos))


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
        from longtake.outputs import check_output_file

        named, blocks = parse_folders(folders), parse_blocks(block)
        for path, suffix in ((json_file, ".json"), (html, ".html")):
            if path is not None:
                check_output_file(path, suffixes=(suffix,), overwrite=overwrite)
        videos = measure_folders(named, blocks)
        typer.echo(as_table(videos))
        if json_file is not None:
            write_json(json_file, as_json(videos))
        if html is not None:
            write_page(html, videos)
