"""The commands that make videos: `longtake generate` and `longtake play`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longtake.cli.common import (
    DecodeDevice,
    Decoder,
    Device,
    Overwrite,
    Quiet,
    Rules,
    Run,
    WarmUp,
    clean_errors,
    given,
    refuse,
    source_of,
    told_once,
)
from longtake.errors import ConfigError

if TYPE_CHECKING:
    from longtake.inference.batch import Pair
    from longtake.inference.generator import GenerationReport
    from longtake.inference.record import Writing
    from longtake.inference.source import Source
    from longtake.parallel.mesh import Mesh

WAIT_MINUTES = 7 * 24 * 60.0
# Short options for values of the rules, which `a.b=c` can say too (`config/generation.py`)
RULES = (
    *("height", "width", "fps", "sampler", "steps", "shift", "block", "window", "sink", "rope", "guidance", "dtype"),
    "decoder",
)
_RECORDED = (*RULES, "overrides", "config", "num_frames", "seconds", "seed", "negative")  # of a video, in its record

Model = Annotated[
    str | None,
    typer.Option(
        help="Folder or file of weights in any layout, OWNER/NAME on the Hugging Face hub, a name of `longtake "
        "students`, or toy."
    ),
]
Encoders = Annotated[
    str | None,
    typer.Option(help="Folder of the encoders, OWNER/NAME on the hub, or toy; where not in or beside the model's."),
]
Stage = Annotated[Path | None, typer.Option(help="YAML file of the stage whose rules the weights of --model follow.")]
Videos = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        help=".mp4, .webm, .gif, .webp or FOLDER/%05d.png, with its record beside it (NAME.json, NAME.gif.json, ...); "
        "with --inputs or --samples a folder of mp4 files.",
    ),
]
FIRST_FRAME = (
    "The first frame; any size, cropped to the aspect, never stretched. Image-to-video weights need one; text-to-video "
    "ones take it zero-shot, untrained for it, with picture=frame or picture=still."
)
Inputs = Annotated[
    Path | None,
    typer.Option(help="In place of --image and --prompt: folder of pictures and captions, JSON lines, or prompts."),
]
Script = Annotated[
    Path | None, typer.Option(help="In place of --image and --prompt: YAML file of a video whose prompt changes.")
]
Like = Annotated[
    Path | None,
    typer.Option(help="In place of all that: a video that was made here, which is made again from its own record."),
]
Crf = Annotated[
    int | None, typer.Option(help="Quality of mp4, webm and webp, 0 to 51; lower is better and larger; without it 15.")
]
Scale = Annotated[float | None, typer.Option(help="Enlarge the pictures of the file by this factor.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the noise.")]
Sampler = Annotated[
    str | None, typer.Option(help="stream, or whole: the whole clip at once, as bidirectional teachers need it.")
]
Dtype = Annotated[str | None, typer.Option(help="fp32, bf16 or fp8: type of weights and cache.")]
SequenceParallel = Annotated[
    int | None,
    typer.Option(help="Ranks of torchrun that make each video together; must divide the heads. Default: 1."),
]


def generate(
    context: typer.Context,
    output: Videos,
    overrides: Rules = None,
    run: Run = None,
    model: Model = None,
    encoders: Encoders = None,
    config: Stage = None,
    image: Annotated[Path | None, typer.Option(help=FIRST_FRAME)] = None,
    prompt: Annotated[str | None, typer.Option(help="What happens in the video.")] = None,
    inputs: Inputs = None,
    script: Script = None,
    like: Like = None,
    samples: Annotated[int | None, typer.Option(help="Videos of each picture: seeds S, S + 1, ...")] = None,
    negative: Annotated[str | None, typer.Option(help="What should not happen; needs --guidance above 1.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Length in seconds.")] = None,
    num_frames: Annotated[int | None, typer.Option("--frames", help="Length in frames.")] = None,
    seed: Seed = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels.")] = None,
    fps: Annotated[int | None, typer.Option(help="Frames a second of the file.")] = None,
    sampler: Sampler = None,
    steps: Annotated[str | None, typer.Option(help="Denoising steps, or their levels: 1,0.75,0.5,0.25.")] = None,
    shift: Annotated[float | None, typer.Option(help="Warp of the noise levels.")] = None,
    block: Annotated[int | None, typer.Option(help="Latent frames of a block.")] = None,
    window: Annotated[str | None, typer.Option(help="Latent frames a block attends to, or all.")] = None,
    sink: Annotated[int | None, typer.Option(help="First latent frames that are never evicted.")] = None,
    rope: Annotated[str | None, typer.Option(help="relative or absolute temporal positions.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance; not 1 = twice the work.")] = None,
    dtype: Dtype = None,
    decoder: Decoder = None,
    crf: Crf = None,
    scale: Scale = None,
    sequence_parallel: SequenceParallel = None,
    decode_device: DecodeDevice = None,
    device: Device = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Turn a prompt, and mostly a picture, into a video, or many of them, also over the ranks of torchrun."""
    with clean_errors(context):
        from longtake.config.generation import changes_of, frames_of
        from longtake.inference.record import check_output

        is_single = _is_single(context)
        frames_of(num_frames, seconds, 1)
        if is_single:
            check_output(output, inputs=[image, script, config, like], overwrite=overwrite)
        changes = changes_of(*(overrides or []), **given(context, *RULES))
        wanted = given(context, "num_frames", "seconds", "seed", "negative", "samples", "decode_device", "overwrite")
        wanted["writing"] = _writing(context)
        if like is not None:
            _make_one(_again(context, like, output, wanted), device, sequence_parallel)
            return
        source = source_of(run, model, encoders, config, changes)
        _start(context, source, wanted, is_single)


def _start(context: typer.Context, source: Source, wanted: dict[str, Any], is_single: bool) -> None:
    """Makes what is asked for: a script's video, one of a prompt, or many."""
    given_here = (context.params[name] for name in ("image", "prompt", "inputs", "script", "output"))
    image, prompt, inputs, script, output = given_here
    where = context.params["device"], context.params["sequence_parallel"]
    if script is not None:
        from longtake.inference.script import generate_story

        _make_one(partial(generate_story, source, script, output, **wanted), *where)
    elif is_single:
        from longtake.inference.generator import generate_file

        _make_one(partial(generate_file, source, image, prompt, output, **wanted), *where)
    else:
        from longtake.inference.batch import generate_many

        pairs = _pairs(image, prompt, inputs, output)
        _make_many(partial(generate_many, source, pairs, output, **wanted), *where)


def _writing(context: typer.Context) -> Writing:
    """How videos are written. Raises: ConfigError for a scale that is none."""
    from longtake.inference.record import Writing
    from longtake.inference.video_io import check_scale

    writing = Writing(**given(context, "crf", "scale"), command=shlex.join(["longtake", *sys.argv[1:]]))
    check_scale(writing.scale)
    return writing


def _again(context: typer.Context, like: Path, output: Path, wanted: dict[str, Any]) -> Callable[..., GenerationReport]:
    """What makes a video again. Raises: ConfigError for options that its record answers."""
    from longtake.inference.like import generate_like
    from longtake.inference.record import Writing

    refuse(context, _RECORDED, "--like makes the same video again, as its record says; leave out {option}")
    where = [context.params[name] for name in ("run", "model", "encoders")]
    source = source_of(*where, must_stream=False) if any(where) else None
    writing = wanted.pop("writing")
    look = given(context, "crf", "scale")
    assert isinstance(writing, Writing)
    return partial(
        generate_like,
        like,
        output,
        source=source,
        image=context.params["image"],
        look=look,
        command=writing.command,
        **wanted,
    )


def _is_single(context: typer.Context) -> bool:
    """Whether one video is made, a file. Raises: ConfigError for options that do not go together."""
    said = given(context, "image", "prompt", "inputs", "script", "samples", "decode_device", "like").keys()
    shown = said - {"samples", "decode_device"}
    if shown not in ({"image", "prompt"}, {"prompt"}, {"inputs"}, {"script"}, {"like"}, {"like", "image"}):
        raise ConfigError(
            "give either --prompt, with --image where the video begins with a picture, or --inputs (a folder or a "
            "JSON-lines file of pairs), or --script, or --like"
        )
    if "samples" in said and said & {"script", "like"}:
        raise ConfigError(f"--{min(said & {'script', 'like'})} makes one video; leave out --samples")
    if said.isdisjoint({"inputs", "samples"}):
        return True
    if "decode_device" in said:
        raise ConfigError("--decode-device is for one video; leave it out, or --inputs and --samples")
    return False


def _make_one(make: Callable[..., GenerationReport], device: str | None, sequence_parallel: int | None) -> None:
    """One video by all processes of torchrun together, or by this process alone."""
    from longtake.parallel.mesh import init_mesh, launched

    _, world_size, _ = launched()
    if world_size == 1 and sequence_parallel not in (None, 1):
        raise ConfigError(
            f"--sequence-parallel {sequence_parallel} needs as many ranks, and this is one process; start them with "
            f"torchrun --nproc-per-node {sequence_parallel} -m longtake generate ..., or leave it out"
        )
    if world_size > 1 and sequence_parallel != world_size:
        raise ConfigError(
            f"one video and {world_size} ranks: give --sequence-parallel {world_size}, with which they make it "
            "together, or --inputs or --samples, or leave torchrun"
        )
    with init_mesh(device) as mesh, told_once(mesh):
        made = make(device=mesh.device, split=_arranged(mesh, sequence_parallel).sequence)
        if mesh.is_main:
            typer.echo(str(made))


def _make_many(make: Callable[..., object], device: str | None, sequence_parallel: int | None) -> None:
    """Many videos, shared among the processes of torchrun."""
    from longtake.parallel.mesh import init_mesh

    # The ranks meet at the end alone: the one with the shortest share waits for the longest.
    with init_mesh(device, timeout_minutes=WAIT_MINUTES) as mesh, told_once(mesh):
        make(mesh=_arranged(mesh, sequence_parallel), report=typer.echo)


def _arranged(mesh: Mesh, sequence_parallel: int | None) -> Mesh:
    from longtake.config.groups import ParallelConfig

    return mesh.arranged(ParallelConfig.from_tree({} if sequence_parallel is None else {"sequence": sequence_parallel}))


def _pairs(image: Path | None, prompt: str | None, inputs: Path | None, output: Path) -> list[Pair]:
    """What the videos show: what lies in `inputs`, or one picture. Raises: as `check_apart`, `read_pairs`."""
    from longtake.inference.batch import Pair, check_apart, read_pairs

    if inputs is not None:
        check_apart(inputs, output)
        return read_pairs(inputs)
    assert prompt is not None
    return [Pair("prompt", "--prompt", None, prompt) if image is None else Pair(image.stem, str(image), image, prompt)]


def play(
    context: typer.Context,
    prompt: Annotated[str, typer.Option(help="What happens until another prompt is typed.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file, as of generate.")],
    image: Annotated[Path | None, typer.Option(help=FIRST_FRAME)] = None,
    overrides: Rules = None,
    run: Run = None,
    model: Model = None,
    encoders: Encoders = None,
    config: Stage = None,
    seconds: Annotated[
        float | None, typer.Option(help="Longest video, in seconds; by default there is no end.")
    ] = None,
    seed: Seed = None,
    dtype: Dtype = None,
    decoder: Decoder = None,
    device: Device = None,
    crf: Crf = None,
    scale: Scale = None,
    warm_up: WarmUp = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file of the output's name; without it, the name is numbered.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Make a video without end; type prompts while it is written, Ctrl-C or /quit ends it."""
    with clean_errors(context):
        from longtake.config.generation import changes_of, frames_of

        frames_of(None, seconds, 1)
        from longtake.inference.containers import Target
        from longtake.inference.record import check_output

        target = Target.of(output)
        output = output if overwrite else target.numbered()
        check_output(output, inputs=[image, config], overwrite=overwrite)
        source = source_of(run, model, encoders, config, changes_of(*(overrides or []), dtype=dtype, decoder=decoder))
        from longtake.inference.generator import Generator
        from longtake.inference.play import play as start

        most = frames_of(None, seconds, source.settings.fps)
        generator = Generator.build(source, device, begins=[image is not None])
        if warm_up:
            generator.warm_up()
        how = {**given(context, "seed"), "writing": _writing(context)}
        typer.echo(str(start(generator, image, prompt, output, num_frames=most, **how)))
