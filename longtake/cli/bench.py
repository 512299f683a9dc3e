"""The command `longtake bench`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longtake.cli.common import (
    DecodeDevice,
    Decoder,
    Device,
    Json,
    Run,
    WarmUp,
    clean_errors,
    given,
    refuse,
    source_of,
    told_once,
)
from longtake.cli.generate import Encoders, Model
from longtake.errors import ConfigError
from longtake.outputs import check_output_file

if TYPE_CHECKING:
    from longtake.parallel.mesh import Mesh

What = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG] [KEY=VALUE]...",
        help="YAML file of a stage whose training is measured (without it: a stream); values that win over its own, or "
        "over the rules of the stream: plan.window_frames=21 ...",
    ),
]

_OF_STREAMS = ("encoders", "small_text", "size", "dtype", "decoder", "blocks", "warm_up", "decode_device")


def bench(
    context: typer.Context,
    what: What = None,
    model: Model = None,
    run: Run = None,
    encoders: Encoders = None,
    random: Annotated[
        str | None, typer.Option(metavar="PRESET", help="Random weights of a preset, made on the device; no files.")
    ] = None,
    small_text: Annotated[
        bool, typer.Option("--small-text", help="With --random, a text encoder of one layer in umT5's place (11 GB).")
    ] = False,
    size: Annotated[str | None, typer.Option(metavar="HxW", help="Height and width in pixels.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16, fp8; with --random on a GPU bf16 by default.")] = None,
    decoder: Decoder = None,
    blocks: Annotated[int | None, typer.Option(min=1, help="Blocks of a stream that count.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Iterations of a training that count.")] = None,
    memory: Annotated[
        float | None,
        typer.Option(min=1, metavar="GIB", help="With CONFIG: as if the GPU had no more than so many GiB."),
    ] = None,
    warm_up: WarmUp = False,
    device: Device = None,
    decode_device: DecodeDevice = None,
    json_file: Json = None,
) -> None:
    """Measure a stream (of the toy, unless another model is named) or a training: seconds, parts, kernels, memory.

    The ranks of torchrun train as CONFIG says, or make each pass of a stream together.
    """
    with clean_errors(context):
        config, overrides = _told_apart(what or [])
        if json_file is not None:
            check_output_file(json_file, suffixes=(".json",), inputs=[config], overwrite=True)
        if sum(one is not None for one in (config, model, run, random)) > 1:
            raise ConfigError("give one of CONFIG (a training), --model, --run and --random")
        if config is not None:
            refuse(context, _OF_STREAMS, "{option} is of a stream, and CONFIG of a training; leave one of them out")
        else:
            refuse(context, ("steps", "memory"), "{option} is of a training; give its CONFIG, too")
            if random is None:
                refuse(context, ("small_text",), "{option} goes with --random")
            else:
                refuse(context, ("encoders",), "{option} goes with --model; --random makes its own")
        from longtake.parallel.mesh import init_mesh, let_segments_grow

        if config:
            let_segments_grow()  # as a training does
        with init_mesh(device) as mesh, told_once(mesh):
            parts = _training(context, mesh, config, overrides) if config else _stream(context, mesh, overrides)
            _tell(parts, json_file, shown=mesh.is_main)


def _training(context: typer.Context, mesh: Mesh, config: Path, overrides: list[str]) -> Iterator[dict[str, Any]]:
    from longtake.bench.training import bench_training

    return bench_training(config, overrides, mesh, **given(context, "steps", "memory"))


def _stream(context: typer.Context, mesh: Mesh, overrides: list[str]) -> Iterator[dict[str, Any]]:
    from longtake.bench.run import bench_random, bench_source
    from longtake.config.generation import changes_of

    run, model, encoders, random, size = (
        context.params[name] for name in ("run", "model", "encoders", "random", "size")
    )
    changes = changes_of(*overrides, **_size(size), **given(context, "dtype", "decoder"))
    counted = given(context, "warm_up", "blocks", "decode_device")
    if random is not None:
        return bench_random(random, changes, mesh, **given(context, "small_text"), **counted)
    named = "toy" if model is None and run is None else model
    return bench_source(source_of(run, named, encoders, None, changes, must_stream=False), mesh, **counted)


def _tell(parts: Iterator[dict[str, Any]], file: Path | None, *, shown: bool) -> None:
    """Prints numbers as they are known, and keeps the file up to date; of all ranks, one does."""
    from longtake.bench.report import text
    from longtake.evaluation.report import write_json

    found: dict[str, Any] = {}
    for part in parts:
        found |= part
        if shown:
            typer.echo(text(part))
            if file is not None:
                write_json(file, found)


def _told_apart(what: list[str]) -> tuple[Path | None, list[str]]:
    """The file, where the first argument is one, and the overrides."""
    named = what[:1] if what and "=" not in what[0] else []
    return (Path(named[0]) if named else None), what[len(named) :]


def _size(text: str | None) -> dict[str, int]:
    """Height and width of a text such as 480x832. Raises: ConfigError."""
    if text is None:
        return {}
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise ConfigError(f"--size {text} must be height x width in pixels, such as 480x832")
    return {"height": int(height), "width": int(width)}
