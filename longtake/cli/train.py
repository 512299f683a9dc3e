"""The commands about training: `longtake train`, `longtake encode`, `longtake doctor`, `longtake config`."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longtake.cli.common import EXIT_ERROR, Overwrite, Quiet, clean_errors, given, refuse
from longtake.errors import ConfigError

if TYPE_CHECKING:
    from longtake.config.stage import StageConfig
    from longtake.doctor.run import Report
    from longtake.doctor.streaming import StreamReport
    from longtake.encodings.write import EncodeReport


def _recipes(incomplete: str) -> list[str]:
    """The names that a shell completes."""
    from longtake.config.recipes import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


Recipe = Annotated[
    Path,
    typer.Argument(
        help="YAML file of a job or of one stage, or a name that `longtake recipes` lists, e.g. toy/i2v.",
        autocompletion=_recipes,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Values that win over the file, e.g. optim.lr=1e-5 or, in a job, distill.optim.lr=1e-5.",
    ),
]


class ConfigKind(StrEnum):
    """The kinds of configuration."""

    stage = "stage"
    job = "job"
    generation = "generation"


def train(
    context: typer.Context,
    config: Recipe,
    overrides: Overrides = None,
    logdir: Annotated[str | None, typer.Option(help="Log folder, in place of the file's `logdir`.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only validate and print the resolved configuration.")] = False,
) -> None:
    """Train a stage, or run a whole job; an interrupted run goes on from its last checkpoint."""
    with clean_errors(context):
        from longtake.config.job import load_config
        from longtake.config.stage import dump

        given_logdir = [] if logdir is None else [f"logdir={logdir}"]
        resolved = load_config(config, [*(overrides or []), *given_logdir])
        if check:
            typer.echo(dump(resolved), nl=False)
            return
        from longtake.train.job import run

        run(resolved)


# What both writers of encoded sets take.
OneStage = Annotated[
    Path, typer.Argument(help="YAML file or recipe of one stage, e.g. toy/distill.", autocompletion=_recipes)
]
SetFolder = Annotated[
    Path, typer.Option("--output", "-o", help="Folder of the encoded set; started again, it goes on.")
]
StoredType = Annotated[
    str | None, typer.Option("--dtype", help="float32, float16 or bfloat16: type of stored CLIP tokens and latents.")
]
RowsPerShard = Annotated[int | None, typer.Option("--rows-per-shard", help="Rows of the data set in one file.")]


def encode(
    context: typer.Context,
    config: OneStage,
    output: SetFolder,
    overrides: Overrides = None,
    dtype: StoredType = None,
    rows_per_shard: RowsPerShard = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Encode the data of a stage once, so that training from it loads no encoder."""
    with clean_errors(context):
        from longtake.encodings.write import encode as run

        chosen = given(context, "dtype", "rows_per_shard")
        _tell(run(_stage(config, overrides), output, overwrite=overwrite, **chosen))


def teacher_data(
    context: typer.Context,
    config: OneStage,
    output: SetFolder,
    overrides: Overrides = None,
    dtype: StoredType = None,
    rows_per_shard: RowsPerShard = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Have a stage's teacher make its data: ODE paths (toy/ode), or clips of pictures and prompts (toy/causal)."""
    with clean_errors(context):
        from longtake.encodings.teacher_data import teacher_data as run

        chosen = given(context, "dtype", "rows_per_shard")
        _tell(run(_stage(config, overrides), output, overwrite=overwrite, **chosen))


def _tell(report: EncodeReport) -> None:
    """Prints the report of all ranks once."""
    from longtake.parallel.mesh import launched

    if launched()[0] == 0:
        typer.echo(str(report))


def _stage(config: Path, overrides: list[str] | None) -> StageConfig:
    """The stage that a file describes. Raises: ConfigError when it is a job."""
    from longtake.config.job import load_config
    from longtake.config.stage import StageConfig

    resolved = load_config(config, overrides or [])
    if not isinstance(resolved, StageConfig):
        raise ConfigError(f"{config} is a job; give the file of one of its stages, whose data is made")
    return resolved


def doctor(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(help="YAML file or recipe of a job or of one stage.", autocompletion=_recipes)
    ] = None,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Ranks to plan for; by default the GPUs of this machine.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Plan for other machines with H200, H100, A100, 5090, 4090, 3090, or memory such as 24GB."),
    ] = None,
    stream: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="In place of CONFIG: a preset or folder that streams; KEY=VALUE its rules."),
    ] = None,
    seconds_from: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON of `longtake bench CONFIG --json FILE`: tells the hours.")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of an hour of one GPU, in any currency.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; sizes in bytes.")] = False,
    quiet: Quiet = False,
) -> None:
    """Say what is missing, whether a configuration fits, and what this machine has."""
    with clean_errors(context):
        from longtake.doctor.run import diagnose, diagnose_stream

        report: Report | StreamReport
        if stream is not None:
            refuse(context, ("gpus", "seconds_from", "price"), "{option} is of a training; leave it or --stream out")
            rules = [*([] if config is None else [str(config)]), *(overrides or [])]
            report = diagnose_stream(stream, rules, device=device)
        else:
            chosen = given(context, "gpus", "device", "seconds_from", "price")
            report = diagnose(config, overrides or [], **chosen)
        typer.echo(json.dumps(report.tree(), indent=2) if as_json else str(report))
        if not report.ok:
            raise typer.Exit(EXIT_ERROR)


def show_config(
    context: typer.Context,
    kind: Annotated[ConfigKind, typer.Argument(help="stage, job or generation.")] = ConfigKind.stage,
) -> None:
    """List every key of a configuration file with its type, default and meaning."""
    with clean_errors(context):
        from longtake.config.base import Settings, describe
        from longtake.config.generation import GenerationConfig
        from longtake.config.job import JobConfig
        from longtake.config.stage import StageConfig

        models: dict[str, type[Settings]] = {"stage": StageConfig, "job": JobConfig, "generation": GenerationConfig}
        for key, annotation, default, description in describe(models[kind.value]):
            value = "required" if default is ... else json.dumps(default)
            typer.echo(f"{key}  ({annotation}; {value})\n    {description}")
