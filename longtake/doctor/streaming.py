"""`longtake doctor --stream`: what of a GPU's memory a stream takes, by its choices, and which of them fit.

The real networks run on tensors without data (`Meter`), in torch's plain operations, which take somewhat more than the
kernels of a GPU. Text and image encoder are counted by their published sizes. Not counted: the CUDA context, workspaces
of kernels, fragments of the allocator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch

from longtake.condition import Condition
from longtake.config.generation import GenerationConfig
from longtake.doctor.estimate import Meter, network
from longtake.encoders.bundle import vae_calls
from longtake.encoders.decoders import random_decoder
from longtake.encoders.original import published_vae
from longtake.encoders.vae import VideoVAE
from longtake.models.sizes import DiTConfig

# Parameters of umT5-xxl and CLIP's ViT-H, and of the largest matrix of each. Source: specification C.1, C.2.
_TEXT, _TEXT_MATRIX = 5_680_910_336, 4096 * 10240
_IMAGE, _IMAGE_MATRIX = 632_076_800, 1280 * 5120
_IMAGE_TOKENS = 257
_LAYERS = 2  # of the transformer whose pass is traced: without gradient no layer leaves anything behind


@dataclass(frozen=True)
class Choice:
    """What a run may choose, and the bytes that a stream then takes, by what for; `work` is the most of what is not
    there all the time.
    """

    precision: str
    decoder: str
    low_memory: bool
    window_frames: int | None
    there: dict[str, int]
    work: dict[str, int]

    @property
    def total(self) -> int:
        """The most at once."""
        return sum(self.there.values()) + max(self.work.values())

    def named(self) -> str:
        """The values as they are given."""
        window = "all" if self.window_frames is None else self.window_frames
        low = "true" if self.low_memory else "false"
        return f"precision={self.precision} decoder={self.decoder} low_memory={low} plan.window_frames={window}"

    def tree(self) -> dict[str, Any]:
        """Plain values; sizes in bytes."""
        return {**asdict(self), "total": self.total}


def stream_choices(sizes: DiTConfig, settings: GenerationConfig) -> Iterator[Choice]:
    """The stream of `settings` first, then in the order of what they cost: what takes less memory.

    Args: `sizes` of the transformer. Raises: ConfigError for sizes that do not fit each other.
    """
    kinds = dict.fromkeys((settings.decoder, "exact", "tiny"))
    lows = dict.fromkeys((settings.low_memory, True))
    pixels = {low: _pixels(sizes, settings, list(kinds), low_memory=low) for low in lows}
    for precision in dict.fromkeys((settings.precision, "bf16", "fp8")):
        given = settings.model_copy(update={"precision": precision})
        parts, caches = _transformer(sizes, given)
        for kind, low, (window, cache) in product(kinds, lows, caches.items()):
            there, work = pixels[low][kind]
            encoders = _encoders(sizes, given, low_memory=low)
            yield Choice(precision, kind, low, window, parts | {"cache": cache} | encoders | there, work)


def _windows(settings: GenerationConfig) -> list[int | None]:
    """That of the settings, and shorter ones of whole blocks behind the sink."""
    window, plan = settings.plan.window_frames, settings.plan
    if window is None:
        return [None]
    shortest = plan.sink_frames + plan.block_frames
    return [window, *range(window - plan.block_frames, shortest - 1, -plan.block_frames)]


def _transformer(sizes: DiTConfig, settings: GenerationConfig) -> tuple[dict[str, int], dict[int | None, int]]:
    """Weights and what a pass takes, and the cache by window."""
    dtype, size = torch.bfloat16 if settings.is_half else torch.float32, _latent_size(sizes, settings)
    meter, sides = Meter(), 1 if settings.guidance == 1 else 2
    with meter.fake, torch.no_grad():
        model, caches = network(sizes).cast(dtype), {}
        for window in _windows(settings):
            plan = replace(settings.stream_plan, window_frames=window)
            most = settings.num_latent_frames if window is None else None
            caches[window] = sides * model.new_cache(plan, 1, size, most).size_bytes
        if settings.precision == "fp8":
            model.quantise()
        weights = sum(tensor.nbytes for tensor in model.state_dict().values())
        few = network(replace(sizes, num_layers=_LAYERS)).cast(dtype).eval()
        block, channels = settings.plan.block_frames, sizes.condition_channels
        condition = Condition(
            torch.empty(1, sizes.text_len, sizes.text_dim),
            torch.empty(1, _IMAGE_TOKENS, sizes.image_dim) if sizes.image_dim else None,
            torch.empty(1, block, channels, *size) if channels else None,
        )
        x = torch.empty(1, block, sizes.out_channels, *size)
        with meter:
            working = _most(meter, lambda: few(x, torch.ones(1), condition))
    return {"transformer": weights, "a pass": working}, caches


def _most(meter: Meter, work: Callable[[], Any]) -> int:
    """Bytes that `work` takes at its worst moment beyond those that are there before it."""
    before = meter.now
    meter.mark()
    work()
    return max(moment.size for moment in meter.moments[-1:]) - before


def _latent_size(sizes: DiTConfig, settings: GenerationConfig) -> tuple[int, int]:
    stride = 16 if sizes.out_channels == 48 else 8
    return settings.height // stride, settings.width // stride


def _pixels(
    sizes: DiTConfig, settings: GenerationConfig, kinds: Sequence[str], *, low_memory: bool
) -> dict[str, tuple[dict[str, int], dict[str, int]]]:
    """By decoder: what it and the VAE hold, and what encoding y and decoding take besides."""
    meter, found = Meter(), {}
    dtype = torch.bfloat16 if settings.has_half_vae else torch.float32
    with meter.fake, meter, torch.no_grad():
        torch.set_default_dtype(dtype)  # fake modules do not change their type
        try:
            module = published_vae(sizes.out_channels)
        finally:
            torch.set_default_dtype(torch.float32)
        vae = VideoVAE(module, **vae_calls(low_memory=low_memory))
        weights = meter.now
        y = {"encoding y": _encoding(meter, vae, settings)} if sizes.condition_channels else {}
        z = torch.empty(1, settings.plan.block_frames, sizes.out_channels, *_latent_size(sizes, settings))
        for kind in kinds:
            before = meter.now
            decoder: Any = vae if kind == "exact" else random_decoder(kind, vae, torch.device("cpu"), dtype)
            decoder.latents_per_call = vae.latents_per_call
            session = decoder.decoder_session()
            for part in (z[:, :1], z):
                session.decode(part)
            there = {"VAE": weights, "decoder": meter.now - before}
            found[kind] = there, y | {"decoding": _most(meter, partial(session.decode, z))}
    return found


def _encoding(meter: Meter, vae: VideoVAE, settings: GenerationConfig) -> int:
    """What the next latent of y takes, with what the encoder remembers where that is on the GPU."""
    session, before = vae.encoder_session(), meter.now
    session.encode(torch.empty(1, 1, 3, settings.height, settings.width))
    state = meter.now - before
    grey = torch.empty(1, vae.temporal_stride, 3, settings.height, settings.width)
    return _most(meter, lambda: session.encode(grey)) + (0 if vae.low_memory else state)


def _encoders(sizes: DiTConfig, settings: GenerationConfig, *, low_memory: bool) -> dict[str, int]:
    half = 2 if settings.is_half else 4
    text = 2 if settings.text_precision == "bf16" else half
    found = {"text encoder": text * (2 * _TEXT_MATRIX if low_memory else _TEXT)}
    if sizes.image_dim:
        found["image encoder"] = half * (2 * _IMAGE_MATRIX if low_memory else _IMAGE)
    return found


@dataclass(frozen=True)
class StreamReport:
    """What a stream takes as it is asked for, and the first other choices that fit; prints as text."""

    free_bytes: int
    where: str
    asked: Choice
    others: list[Choice]
    least: str

    @property
    def ok(self) -> bool:
        """Whether it fits as it is asked for."""
        return fits(self.asked, self.free_bytes)

    def tree(self) -> dict[str, Any]:
        """Plain values; sizes in bytes."""
        others = [choice.tree() for choice in self.others]
        return {"ok": self.ok, "free_bytes": self.free_bytes, "asked": self.asked.tree(), "others": others}

    def __str__(self) -> str:
        room = f"{_gib(self.free_bytes)} ({self.where})"
        verdict = "fits into" if self.ok else "PROBLEM: with a tenth for what is not counted does not fit into"
        lines = [f"{self.asked.named()}: {_gib(self.asked.total)} {verdict} {room}"]
        lines += [f"  {name:<16} {_gib(size):>11}" for name, size in self.asked.there.items()]
        lines += [f"  besides, {name:<12} {_gib(size):>6}" for name, size in self.asked.work.items()]
        if not self.ok:
            lines += [f"fits: {choice.named()}: {_gib(choice.total)}" for choice in self.others]
            lines += [] if self.others else [f"no choice fits: lower the size, the window or the sink ({self.least})"]
        return "\n".join(lines)


def fits(choice: Choice, free_bytes: int) -> bool:
    """Whether a choice fits, with a tenth for what is not counted."""
    return choice.total * 1.1 <= free_bytes


def stream_report(
    sizes: DiTConfig, settings: GenerationConfig, free_bytes: int, where: str, most: int = 6
) -> StreamReport:
    """Whether a stream fits. Args: `most` other choices that are named."""
    asked, *others = stream_choices(sizes, settings)
    least = min([asked, *others], key=lambda choice: choice.total)
    fitting = [one for one in others if fits(one, free_bytes)][:most]
    return StreamReport(free_bytes, where, asked, fitting, f"least: {least.named()}, {_gib(least.total)}")


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB"
