"""`longtake bench` of a stream: what a viewer would feel, each part of a block, and what the kernels alone take.

A first video finds nothing warm: its first frame is the cold one. Then the generator is made warm
(`Generator.warm_up`). What both take longer than blocks do in the end went to compiling, choosing kernels and
recording. Of the next video, blocks count from the one on that is like all later ones.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from longtake.bench.clock import percentiles, playback, seconds_of, synchronize, timed
from longtake.bench.kernels import (
    Operation,
    best_layouts,
    decode_operations,
    floor_seconds,
    pass_operations,
    rates,
    tiny_operations,
)
from longtake.bench.watched import PROMPT, TimedGenerator, picture_of, settled, settled_block, watch
from longtake.encoders.condition import ConditionFrames, condition_frames
from longtake.encoders.decoders import TinyDecoder
from longtake.inference.frames import Frames
from longtake.inference.generator import Generator
from longtake.inference.video_io import VideoWriter
from longtake.models.attention import forward_kernels
from longtake.models.execution import compilations
from longtake.models.flops import Call

COLD_BLOCKS = 3
GIB = 2**30


def bench_stream(generator: Generator, load_seconds: float, *, blocks: int, warm_up: bool = False) -> dict[str, Any]:
    """All numbers of a stream, of which `blocks` settled blocks count.

    Args: `load_seconds` that its making took; `warm_up`: no video is made before the generator is warm.
    """
    device = generator.device
    cold = None if warm_up else watch(generator, COLD_BLOCKS)
    started = time.perf_counter()
    warming = generator.warm_up()
    warmed = time.perf_counter() - started
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    found = settled(generator, blocks)
    warm, block_seconds, frames, passes = found.video, found.block_seconds, found.frames, found.passes
    peak = peak_gib(device)
    compiled = compilations()  # in this process: the bench's
    context, decode = found.parts.get("context", 0.0), found.parts["decode"]
    loop = sum(passes) + context
    copy, write = copy_seconds(generator, warm.last), write_seconds(generator, frames)
    encoded = encoder_parts(generator)
    ms: dict[str, Any] = {**encoded, "passes": passes, "context": context, "decode": decode}
    ms |= {"copy": copy, "write": write, "rest": block_seconds - loop - decode - copy}
    ms |= {"launch": launch_seconds(generator), "first": first_parts(generator, encoded)}
    longer = [warmed - warming * block_seconds]
    if cold is not None:
        longer.append(cold.arrivals[-1] - warm.arrivals[len(cold.arrivals) - 1])
    held = [size / GIB for size in found.allocated]
    return {
        "ms": {name: _ms(value) for name, value in ms.items()},
        "block_ms": _ms(block_seconds),
        "fps": {"loop": frames / loop, "end_to_end": frames / block_seconds},
        "first_frame_s": {
            "warm": warm.first_generated,
            "cold": None if cold is None else load_seconds + cold.first_generated,
        },
        "gaps_ms": percentiles([1000 * (b - a) for a, b in pairwise(found.arrivals)]),
        "rtf": block_seconds * generator.fps / frames,
        "stalls": asdict(playback(*warm.generated(generator.fps))),
        "peak_gib": peak,
        "memory_gib": memory_gib(generator),
        "allocated_gib": [min(held), max(held)] if held else None,
        "load_s": load_seconds,
        "warm_up_s": warmed,
        "compiled": asdict(compiled),
        "compile_s": sum(max(0.0, seconds) for seconds in longer),
        "blocks": {"settled_from": settled_block(generator), "counted": blocks, "frames": frames},
    }


def kernel_report(generator: Generator) -> dict[str, Any]:
    """Rates of the kernels of a settled block, and what its passes and its decoding take at the least."""
    settings, device, vae = generator.settings, generator.device, generator.encoders.vae
    sizes, block = generator.model.config, generator.plan.block_frames
    height, width = settings.height // vae.spatial_stride, settings.width // vae.spatial_stride
    tokens = generator.model.tokens_per_frame(height, width)
    image = 0 if sizes.image_dim is None or generator.encoders.image is None else generator.encoders.image.num_tokens
    past = len(generator.plan.attended(*generator.plan.block_of(10**6)))
    call = Call.bidirectional(1, block, tokens, sizes.text_len, image).cached(block, past, with_context=False)
    dtype = torch.bfloat16 if settings.is_half else torch.float32
    passes = pass_operations(sizes, call, fp8=settings.precision == "fp8")
    found = _decode_operations(generator.decoder or vae, block, height, width)
    decoding = best_layouts(found, device, dtype)
    return {
        "rates_tflops": rates(passes, device, dtype) | rates(decoding, device, dtype),
        "floor_ms": {
            "pass": _ms(floor_seconds(passes, device, dtype)),
            "decode": _ms(floor_seconds(decoding, device, dtype)),
        },
        "tflop": {
            "pass": sum(one.operations * count for one, count in passes.items()) / 1e12,
            "decode": sum(one.operations * count for one, count in decoding.items()) / 1e12,
        },
    }


def _decode_operations(decoder: Any, latents: int, height: int, width: int) -> Counter[Operation]:
    if isinstance(decoder, TinyDecoder):
        return tiny_operations(decoder.sizes, latents, height, width)
    return decode_operations(decoder.module, latents, height, width)


def kernels_of(generator: Generator) -> dict[str, Any]:
    """What was chosen to compute with."""
    device, dtype = generator.device, torch.bfloat16 if generator.settings.is_half else torch.float32
    chosen = {"attention": "torch's own"}
    if device.type == "cuda":
        device = next(generator.model.parameters()).device  # with its index
        for name, many in (("attention", True), ("attention to few keys", False)):
            kernels = forward_kernels(device, dtype, generator.model.config.head_width, many)
            chosen[name] = ", ".join(k.name if k.ms is None else f"{k.name} {k.ms:.3f} ms" for k in kernels)
    used = generator.decoder or generator.encoders.vae
    decoder = f"{generator.settings.decoder}, {str(used.dtype).removeprefix('torch.')}, "
    decoder += f"{used.latents_per_call} latent(s) a call"
    return {**chosen, "decoder": decoder, "graphs": generator.denoiser.graphs is not None}


def plan_of(generator: Generator) -> dict[str, Any]:
    """The rules that it streams by."""
    settings, plan = generator.settings, generator.plan
    named = ("block_frames", "window_frames", "sink_frames", "rope", "context")
    return {
        "height": settings.height,
        "width": settings.width,
        "fps": settings.fps,
        "precision": settings.precision,
        "decoder": settings.decoder,
        **{name: getattr(plan, name) for name in named},
        "sigmas": list(plan.sigmas),
        "later_sigmas": None if plan.later_sigmas is None else list(plan.later_sigmas),
    }


# ---- parts that are measured by themselves ---------------------------------------------------------------------------
@torch.no_grad()
def encoder_parts(generator: Generator) -> dict[str, float | None]:
    """Seconds of each encoder alone: text, CLIP tokens, and y as far as it ever changes; None where it has none."""
    encoders, device, settings = generator.encoders, generator.device, generator.settings
    picture = torch.rand(1, 3, settings.height, settings.width, device=device) * 2 - 1
    image, y = encoders.image, generator.model.config.condition_channels
    return {
        "text": seconds_of(lambda: encoders.text.encode([PROMPT]), device),
        "clip": None if image is None else seconds_of(lambda: image.encode(picture), device),
        "y": seconds_of(lambda: condition_frames(encoders.vae, picture), device) if y else None,
    }


@torch.no_grad()
def first_parts(generator: Generator, encoded: Mapping[str, float | None]) -> dict[str, float | None]:
    """Seconds of each part that the first generated frame of a warm video waits for, each alone: the picture at its
    size, the encoders, of y what the first block reads, the passes of the picture and of that block, and its first
    latent decoded and fetched. Some run beside each other; and Python, which begins them all, has no part here.
    Args: `encoded`, as `encoder_parts` gives it.
    """
    encoders, device, picture = generator.encoders, generator.device, picture_of(generator)
    near = 1 + generator.plan.block_frames
    video = torch.zeros(1, 3, generator.settings.height, generator.settings.width, device=device)
    timed, with_y = TimedGenerator.of(generator), generator.model.config.condition_channels
    length = generator.first_pixels(given=picture is not None)
    if picture is not None:
        length += generator.plan.block_frames * encoders.vae.temporal_stride
    for _ in timed.stream(picture, PROMPT, num_frames=length):
        pass
    passes = [seconds for name, seconds in timed.take().items() if name != "decode"]
    decoder, latent = generator.new_decoder(), torch.zeros(1, 1, encoders.vae.latent_channels, *generator.latent_size)
    decoder.decode(latent)
    first = decoder.decode(latent)[0]
    return {
        "picture": None if picture is None else seconds_of(lambda: generator.prepare(picture), device),
        "text": encoded["text"],
        "clip": encoded["clip"],
        "y": seconds_of(lambda: ConditionFrames(encoders.vae, video).reach(near), device) if with_y else None,
        "passes": sum(passes),
        "decode": seconds_of(lambda: decoder.decode(latent), device),
        "copy": seconds_of(lambda: Frames(first).array(), device),
    }


def copy_seconds(generator: Generator, frames: NDArray[np.uint8]) -> float:
    """Seconds from the decoder's values of a block to bytes in this process's memory."""
    video = torch.from_numpy(frames).permute(0, 3, 1, 2).to(generator.device).float() / 127.5 - 1
    return seconds_of(lambda: Frames(video).array(), generator.device)


def write_seconds(generator: Generator, count: int) -> float:
    """Seconds that writing a block of `count` frames into an mp4 takes, which is no part of a block: `generate` writes
    beside a GPU. The frames are those of a picture with grain that drifts, since random networks make pure noise, which
    no encoder is made for.
    """
    settings = generator.settings
    height, width = settings.height, settings.width
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (height // 16 + 4, width // 16 + 4, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(coarse).resize((width + count, height + count), Image.Resampling.BICUBIC))
    drift = np.stack([picture[t : t + height, t : t + width] for t in range(count)])
    frames = (drift + random.normal(0, 4, drift.shape)).clip(0, 255).astype(np.uint8)
    with (
        TemporaryDirectory() as folder,
        VideoWriter(Path(folder) / "bench.mp4", settings.fps, height, width) as writer,
    ):
        writer.write(frames)  # the encoder starts
        return timed(lambda: writer.write(frames), torch.device("cpu"), repeats=3)


def launch_seconds(generator: Generator, blocks: int = 3) -> float | None:
    """Seconds that this process spends to begin a block while a GPU has nothing to do; None on a CPU, which then has
    made it. As long as it is less than the block itself, the GPU need not wait for Python.
    """
    if generator.device.type != "cuda":
        return None
    frames = 1 + (2 + blocks) * generator.plan.block_frames * generator.encoders.vae.temporal_stride
    session, took = generator.open(picture_of(generator), PROMPT, history_blocks=0, max_frames=frames), []
    for _ in range(2 + blocks):
        synchronize(generator.device)
        start = time.perf_counter()
        begun = session.begin()
        took.append(time.perf_counter() - start)
        begun.array()
    return sum(took[2:]) / blocks


@torch.no_grad()
def memory_gib(generator: Generator) -> dict[str, float] | None:
    """What of a GPU's memory is for what: networks, and what each part takes besides while it works; None on a CPU."""
    device, encoders = generator.device, generator.encoders
    if device.type != "cuda":
        return None
    decoder, stride = generator.new_decoder(), encoders.vae.spatial_stride
    size = generator.settings.height // stride, generator.settings.width // stride
    latents = torch.randn(1, generator.plan.block_frames, encoders.vae.latent_channels, *size, device=device)
    picture = torch.zeros(1, 3, generator.settings.height, generator.settings.width, device=device)
    decoder.decode(latents[:, :1])
    modules = {"transformer": generator.model, "text encoder": encoders.text.model, "vae": encoders.vae.module}
    modules |= {} if encoders.image is None else {"image encoder": encoders.image.model}
    held = {name: sum(p.nbytes for p in module.parameters() if p.is_cuda) for name, module in modules.items()}
    if generator.decoder is not None:
        held["decoder"] = sum(tensor.nbytes for tensor in generator.decoder.tensors().values())
    cache = generator.model.new_cache(generator.plan, 1, size, 1 if generator.plan.window_frames is None else None)
    held["cache"] = cache.size_bytes
    work = {
        "the text": lambda: encoders.text.encode([PROMPT]),
        "decoding": lambda: decoder.decode(latents),
        "y": lambda: ConditionFrames(encoders.vae, picture).reach(1 + generator.plan.block_frames),
    }
    held |= {f"besides, {name}": _besides(each, device) for name, each in work.items()}
    return {name: size / GIB for name, size in held.items()}


def _besides(work: Callable[[], Any], device: torch.device) -> int:
    """Bytes that `work` takes at its worst moment beyond those that are there before it."""
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def peak_gib(device: torch.device) -> float:
    """The most memory: allocated on a GPU since its peak was reset; on a CPU of this process since its start."""
    if device.type == "cuda":
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) / GIB
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def _ms(seconds: Any) -> Any:
    if isinstance(seconds, Mapping):
        return {name: _ms(value) for name, value in seconds.items()}
    if isinstance(seconds, list):
        return [_ms(value) for value in seconds]
    return None if seconds is None else seconds * 1000
