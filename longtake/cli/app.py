"""The command line: each command reads its arguments, builds the configuration and calls one function.

No default lives here. An option that was not given is None and is not passed on, so that it cannot undo a value of a
configuration file. Nothing heavy is imported before a command needs it: `longtake --help` loads no torch.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from longtake.cli.common import EXIT_ERROR, clean_errors, given_options, source_of
from longtake.cli.play import play
from longtake.cli.toy import evaluate, world
from longtake.errors import ConfigError
from longtake.outputs import check_output_file

WAIT_MINUTES = 7 * 24 * 60.0

app = typer.Typer(
    name="longtake",
    help="Trains and runs streaming image-to-video generators distilled from Wan video diffusion models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class ConfigKind(StrEnum):
    """The two kinds of configuration file."""

    stage = "stage"
    job = "job"


for _command in (play, evaluate, world):
    app.command()(_command)


@app.callback()
def common(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
) -> None:
    """Options of every command."""
    context.obj = debug
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name of a file may be no text
    # numpy's products are small here; its threads would cost five times the time beside torch's and scoring processes.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


Logdir = Annotated[str | None, typer.Option(help="Log folder, in place of the file's `logdir`.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there already; never an input.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; by default a GPU if there is one.")]


@app.command()
def train(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="YAML file of a job or of one stage, e.g. configs/toy/i2v.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Values that win over the file, e.g. distill.optim.lr=1e-5."),
    ] = None,
    logdir: Logdir = None,
    check: Annotated[bool, typer.Option("--check", help="Only validate and print the resolved configuration.")] = False,
) -> None:
    """Train a stage, or run a whole job; an interrupted run goes on from its last checkpoint."""
    with clean_errors(context):
        from longtake.config.job import load_config
        from longtake.config.stage import dump

        resolved = load_config(config, [*(overrides or []), *_override("logdir", logdir)])
        if check:
            typer.echo(dump(resolved), nl=False)
            return
        from longtake.train.job import run

        run(resolved)


@app.command()
def encode(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="YAML file of one stage, e.g. configs/toy/distill.yaml.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the encoded set; started again, it goes on.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Values that win over the file, e.g. data.path=photos."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16: type of stored CLIP tokens and latents.")
    ] = None,
    rows_per_shard: Annotated[int | None, typer.Option(help="Rows of the data set in one file.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Encode the data of a stage once, so that training from it loads no encoder."""
    with clean_errors(context):
        from longtake.config.job import load_config
        from longtake.config.stage import StageConfig

        resolved = load_config(config, overrides or [])
        if not isinstance(resolved, StageConfig):
            raise ConfigError(f"{config} is a job; give the file of one of its stages, whose data is encoded")
        from longtake.encodings.write import encode as run

        given = given_options(dtype=dtype, rows_per_shard=rows_per_shard, overwrite=overwrite or None)
        report = run(resolved, output, **given)
        if report is not None:
            typer.echo(str(report))


@app.command()
def generate(
    context: typer.Context,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The mp4 file; with --inputs or --samples the folder of the files.")
    ],
    run: Annotated[Path | None, typer.Option(help="Log folder or stage folder of a training run.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or file of weights in any layout, OWNER/NAME on the Hugging Face hub, or toy."),
    ] = None,
    encoders: Annotated[
        Path | None, typer.Option(help="Folder of the encoders, where it is not in or beside the model's.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of the stage whose rules the weights of --model follow.")
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="The first frame; any size, cropped to the aspect, never stretched.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What happens in the video.")] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(help="In place of --image and --prompt: folder of pictures and captions, or JSON lines."),
    ] = None,
    script: Annotated[
        Path | None, typer.Option(help="In place of --image and --prompt: YAML file of a video whose prompt changes.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Videos of each picture: seeds S, S + 1, ...")] = None,
    negative: Annotated[str | None, typer.Option(help="What should not happen; needs --guidance above 1.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Length in seconds.")] = None,
    frames: Annotated[int | None, typer.Option(help="Length in frames.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise.")] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels.")] = None,
    fps: Annotated[int | None, typer.Option(help="Frames a second of the file.")] = None,
    sampler: Annotated[
        str | None, typer.Option(help="stream, or whole: the whole clip at once, as bidirectional teachers need it.")
    ] = None,
    steps: Annotated[str | None, typer.Option(help="Denoising steps, or their levels: 1,0.75,0.5,0.25.")] = None,
    shift: Annotated[float | None, typer.Option(help="Warp of the noise levels.")] = None,
    block: Annotated[int | None, typer.Option(help="Latent frames of a block.")] = None,
    window: Annotated[str | None, typer.Option(help="Latent frames a block attends to, or all.")] = None,
    sink: Annotated[int | None, typer.Option(help="First latent frames that are never evicted.")] = None,
    rope: Annotated[str | None, typer.Option(help="relative or absolute temporal positions.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance; not 1 = twice the work.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32: type of weights and cache.")] = None,
    sequence_parallel: Annotated[
        int | None,
        typer.Option(help="Ranks of torchrun that make each video together; must divide the heads. Default: 1."),
    ] = None,
    decode_device: Annotated[
        str | None, typer.Option(help="Another GPU that decodes beside the transformer, e.g. cuda:1.")
    ] = None,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn one picture and a prompt into a video, or many of them, also over the ranks of torchrun."""
    with clean_errors(context):
        _check_generate(run, model, encoders or config, image, prompt, inputs or script, seconds, frames)
        from longtake.config.generation import changes_of

        rules = {"height": height, "width": width, "fps": fps, "steps": steps, "shift": shift, "block": block}
        rules |= {"window": window, "sink": sink, "rope": rope, "guidance": guidance, "dtype": dtype}
        rules |= {"sampler": sampler}
        changes = changes_of(**rules)
        length = given_options(num_frames=frames, seconds=seconds)
        given = given_options(seed=seed, negative=negative)
        alone = given_options(decode_device=decode_device, overwrite=overwrite or None)
        if script is not None:
            if inputs is not None or samples is not None:
                raise ConfigError("--script makes one video; leave out --inputs and --samples")
            check_output_file(output, suffixes=(".mp4",), inputs=[script, config], overwrite=overwrite)
            from longtake.inference.script import generate_story

            with _one_video(device, sequence_parallel) as ranks:
                wanted = given | given_options(seconds=seconds, frames=frames) | ranks.given | alone
                source = source_of(run, model, encoders, config, changes)
                ranks.report(generate_story(source, script, output, **wanted))
            return
        if inputs is None and image is not None and prompt is not None and samples is None:
            check_output_file(output, suffixes=(".mp4",), inputs=[image, config], overwrite=overwrite)
            from longtake.inference.generator import generate_file

            with _one_video(device, sequence_parallel) as ranks:
                # A plain run is found by the function itself.
                source = run if run is not None and not changes else source_of(run, model, encoders, config, changes)
                ranks.report(generate_file(source, image, prompt, output, **length, **given, **ranks.given, **alone))
            return
        if decode_device is not None:
            raise ConfigError("--decode-device is for one video; leave it out, or --inputs and --samples")
        from longtake.inference.batch import Length, Pair, check_apart, generate_many, read_pairs
        from longtake.parallel.mesh import init_mesh

        if inputs is None:
            assert image is not None and prompt is not None
            pairs = [Pair(image.stem, str(image), image, prompt)]
        else:
            check_apart(inputs, output)
            pairs = read_pairs(inputs)
        source = source_of(run, model, encoders, config, changes)
        # The ranks meet at the end alone: the one with the shortest share waits for the longest.
        with init_mesh(device, timeout_minutes=WAIT_MINUTES) as mesh:
            generate_many(
                source,
                pairs,
                output,
                mesh=mesh.arranged(_parallel(sequence_parallel)),
                length=Length(**length),
                report=typer.echo,
                **given,
                **given_options(samples=samples, overwrite=overwrite or None),
            )


@dataclass(frozen=True)
class _Ranks:
    """The processes that make one video together: arguments of the function that does, and who reports."""

    given: dict[str, Any]
    is_main: bool = True

    def report(self, made: object) -> None:
        if self.is_main:
            typer.echo(str(made))


@contextmanager
def _one_video(device: str | None, sequence_parallel: int | None) -> Iterator[_Ranks]:
    """The processes of torchrun, all of which make one video, or this process alone."""
    from longtake.parallel.mesh import init_mesh, launched

    _, world_size, _ = launched()
    if world_size == 1 and sequence_parallel in (None, 1):
        yield _Ranks(given_options(device=device))
        return
    if world_size == 1:
        raise ConfigError(
            f"--sequence-parallel {sequence_parallel} needs as many ranks, and this is one process; start them with "
            f"torchrun --nproc-per-node {sequence_parallel} -m longtake generate ..., or leave it out"
        )
    if sequence_parallel != world_size:
        raise ConfigError(
            f"one video and {world_size} ranks: give --sequence-parallel {world_size}, with which they make it "
            "together, or --inputs or --samples, or leave torchrun"
        )
    with init_mesh(device) as mesh:
        split = mesh.arranged(_parallel(sequence_parallel)).sequence
        yield _Ranks({"device": mesh.device, "split": split}, mesh.is_main)


def _parallel(sequence: int | None) -> Any:
    from longtake.config.groups import ParallelConfig

    return ParallelConfig.from_tree(given_options(sequence=sequence))


def _check_generate(
    run: Path | None,
    model: str | None,
    beside: Path | None,
    image: Path | None,
    prompt: str | None,
    inputs: Path | None,
    seconds: float | None,
    frames: int | None,
) -> None:
    """Raises ConfigError for options that do not go together."""
    if (run is None) == (model is None):
        raise ConfigError("give either --run (a training run) or --model (weights of any origin)")
    if run is not None and beside is not None:
        raise ConfigError("--encoders and --config belong to --model; a run brings both along")
    single = image is not None and prompt is not None
    if single == (inputs is not None) or (inputs is not None and (image is not None or prompt is not None)):
        raise ConfigError(
            "give either --image and --prompt, or --inputs (a folder or a JSON-lines file of pairs), or --script"
        )
    from longtake.config.generation import frames_of

    frames_of(frames, seconds, 1)


@app.command()
def doctor(
    context: typer.Context,
    config: Annotated[Path | None, typer.Argument(help="YAML file of a job or of one stage.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values that win over the file.")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Ranks to plan for; by default the GPUs of this machine.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Plan for other machines with H200, H100 or A100, or memory such as 24GB.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; sizes in bytes.")] = False,
) -> None:
    """Say what is missing, whether a configuration fits, and what this machine has."""
    with clean_errors(context):
        from longtake.doctor.run import diagnose

        report = diagnose(config, overrides or [], gpus=gpus, device=device)
        typer.echo(json.dumps(report.tree(), indent=2) if as_json else str(report))
        if not report.ok:
            raise typer.Exit(EXIT_ERROR)


class Layout(StrEnum):
    """The layouts that `convert` writes."""

    original = "original"
    diffusers = "diffusers"
    longtake = "longtake"


@app.command()
def convert(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="Folder or file of weights, or OWNER/NAME on the Hugging Face hub.")],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
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
) -> None:
    """Rewrite the weights of a transformer in another layout, bit for bit."""
    with clean_errors(context):
        from longtake.weights.convert import convert as rewrite

        given = given_options(network=network, lora=lora, lora_scale=lora_scale, shard_bytes=shard_bytes)
        given |= given_options(overwrite=overwrite or None)
        for file in rewrite(source, target, to.value, unmerge=unmerge, **given):
            typer.echo(str(file))


@app.command()
def export(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="Log folder, stage folder or checkpoint of a training run.")],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    dtype: Annotated[str | None, typer.Option(help="float16, bfloat16 or float32.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the student of a run with its rules: a folder for `longtake generate --model`."""
    with clean_errors(context):
        from longtake.inference.export import export as write

        typer.echo(str(write(run, target, **given_options(dtype=dtype, overwrite=overwrite or None))))


@app.command("config")
def show_config(
    context: typer.Context,
    kind: Annotated[ConfigKind, typer.Argument(help="stage or job.")] = ConfigKind.stage,
) -> None:
    """List every key of a configuration file with its type, default and meaning."""
    with clean_errors(context):
        from longtake.config.base import describe
        from longtake.config.job import JobConfig
        from longtake.config.stage import StageConfig

        for key, annotation, default, description in describe(StageConfig if kind is ConfigKind.stage else JobConfig):
            value = "required" if default is ... else json.dumps(default)
            typer.echo(f"{key}  ({annotation}; {value})\n    {description}")


def _override(key: str, value: str | None) -> list[str]:
    return [] if value is None else [f"{key}={value}"]


def main() -> None:
    """The console script."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # a closed standard stream is an empty one: else a file gets its number, and with it what is said
    os.close(handle)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    # What ends a job or a terminal is told as Ctrl-C is; but a rank that waits for others would not hear of it.
    for number in () if "WORLD_SIZE" in os.environ else (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    app()
