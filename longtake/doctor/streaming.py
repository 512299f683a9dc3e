"""`longtake doctor --stream`: what of a GPU's memory a stream takes, and what takes less of it.

The real networks run on tensors without data (`Meter`), in torch's plain operations, which take somewhat more than the
kernels of a GPU. Text and image encoder are counted by their published sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch

from longtake.condition import Condition
from longtake.config.generation import GenerationConfig
from longtake.doctor.estimate import Meter, network, vae_without_data
from longtake.doctor.machine import fits, in_words
from longtake.encoders.bundle import vae_calls
from longtake.encoders.decoders import random_decoder
from longtake.encoders.vae import VideoVAE
from longtake.models.sizes import DiTConfig
from longtake.weights.locate import CLIP_TOKENS

# Parameters of umT5-xxl and CLIP's ViT-H, and of the largest matrix of each. Source: specification C.1, C.2.
_TEXT, _TEXT_MATRIX = 5_680_910_336, 4096 * 10240
_IMAGE, _IMAGE_MATRIX = 632_076_800, 1280 * 5120
_LAYERS = 2  # of the transformer whose pass is traced: without gradient no layer leaves anything behind


# What takes less memory, in the order of what it costs: a rule, its value, and those that it comes in place of
_SPARING: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
    ("precision", "bf16", ("fp32",)),
    ("low_memory", True, (False,)),
    ("decoder", "tiny", ("exact", "light")),
    ("precision", "fp8", ("bf16",)),
)


@dataclass(frozen=True)
class Choice:
    """Rules of a stream, and the bytes that it then takes, by what for; `work` is the most of what is not there all the
    time.
    """

    rules: GenerationConfig
    there: dict[str, int]
    work: dict[str, int]

    @property
    def total(self) -> int:
        """The most at once."""
        return sum(self.there.values()) + max(self.work.values())

    @property
    def chosen(self) -> dict[str, Any]:
        """The rules that one may choose by."""
        rules, window = self.rules, self.rules.plan.window_frames
        low = {"low_memory": rules.low_memory, "window_frames": window}
        return {"precision": rules.precision, "decoder": rules.decoder, **low}

    def named(self) -> str:
        """They as they are given."""
        precision, decoder, low, window = self.chosen.values()
        return (
            f"precision={precision} decoder={decoder} low_memory={'true' if low else 'false'} "
            f"plan.window_frames={'all' if window is None else window}"
        )

    def tree(self) -> dict[str, Any]:
        """Plain values; sizes in bytes."""
        return {**self.chosen, "there": self.there, "work": self.work, "total": self.total}


def stream_choices(sizes: DiTConfig, settings: GenerationConfig, networks: int = 1) -> Iterator[Choice]:
    """The stream of `settings` first, then what takes less memory, each beside those before.

    Args: `sizes` of the transformer, and how many there are. Raises: ConfigError for sizes that do not fit each other.
    """
    shape = settings.shape(4, sizes.vae_stride)
    size = shape.latent_height, shape.latent_width
    # Of several choices the same: traced once.
    transformer = cache(lambda **rules: _transformer(sizes, settings.model_copy(update=rules), size))
    pixels = cache(lambda **rules: _pixels(sizes, settings.model_copy(update=rules), size))

    def choice(rules: GenerationConfig) -> Choice:
        parts, a_pass = transformer(precision=rules.precision)
        vae = "bf16" if rules.has_half_vae else "fp32"
        there, work = pixels(decoder=rules.decoder, low_memory=rules.low_memory, vae_precision=vae)
        parts = {**parts, "transformer": networks * parts["transformer"]}
        return Choice(rules, parts | _encoders(sizes, rules) | there, {"a pass": a_pass, **work})

    yield (last := choice(settings))
    for rule, value, instead_of in _SPARING:
        if getattr(last.rules, rule) in instead_of:
            yield (last := choice(last.rules.model_copy(update={rule: value})))
    plan = settings.plan
    if (window := plan.window_frames) is not None:  # shorter ones, of whole blocks behind the sink
        frame = last.there["cache"] // window
        for shorter in range(window - plan.block_frames, plan.sink_frames, -plan.block_frames):
            rules = last.rules.model_copy(update={"plan": plan.model_copy(update={"window_frames": shorter})})
            yield Choice(rules, last.there | {"cache": frame * shorter}, last.work)


def _encoders(sizes: DiTConfig, rules: GenerationConfig) -> dict[str, int]:
    width = 2 if rules.is_half else 4
    text = 2 if rules.text_precision == "bf16" else width
    found = {"text encoder": text * (2 * _TEXT_MATRIX if rules.low_memory else _TEXT)}
    if sizes.image_dim:
        found["image encoder"] = width * (2 * _IMAGE_MATRIX if rules.low_memory else _IMAGE)
    return found


def _transformer(sizes: DiTConfig, settings: GenerationConfig, size: tuple[int, int]) -> tuple[dict[str, int], int]:
    """Weights and cache, and what a pass takes."""
    meter, plan, dtype = Meter(), settings.stream_plan, torch.bfloat16 if settings.is_half else torch.float32
    block, channels = plan.block_frames, sizes.condition_channels
    with meter.fake, torch.no_grad():
        model = network(sizes).cast(dtype)
        most = settings.num_latent_frames if plan.window_frames is None else None
        kept = (1 if settings.guidance == 1 else 2) * model.new_cache(plan, 1, size, most).size_bytes
        if settings.precision == "fp8":
            model.quantise()
        weights = sum(tensor.nbytes for tensor in model.state_dict().values())
        few = network(replace(sizes, num_layers=_LAYERS)).cast(dtype).eval()
        condition = Condition(
            torch.empty(1, sizes.text_len, sizes.text_dim),
            torch.empty(1, CLIP_TOKENS, sizes.image_dim) if sizes.image_dim else None,
            torch.empty(1, block, channels, *size) if channels else None,
        )
        x = torch.empty(1, block, sizes.out_channels, *size)
        with meter:
            working = _most(meter, lambda: few(x, torch.ones(1), condition))
    return {"transformer": weights, "cache": kept}, working


def _most(meter: Meter, work: Callable[[], Any]) -> int:
    """Bytes that `work` takes at its worst moment beyond those that are there before it."""
    before = meter.now
    meter.mark()
    work()
    return meter.moments[-1].size - before


def _pixels(
    sizes: DiTConfig, settings: GenerationConfig, size: tuple[int, int]
) -> tuple[dict[str, int], dict[str, int]]:
    """What VAE and decoder hold, and what encoding y and decoding take besides."""
    meter, dtype = Meter(), torch.bfloat16 if settings.has_half_vae else torch.float32
    module = vae_without_data(sizes.out_channels, dtype)
    with meter.fake, meter, torch.no_grad():
        vae = VideoVAE(module.to_empty(device="cpu"), **vae_calls(low_memory=settings.low_memory))
        weights = meter.now
        work = {"encoding y": _encoding(meter, vae, settings)} if sizes.condition_channels else {}
        z, before = torch.empty(1, settings.plan.block_frames, sizes.out_channels, *size), meter.now
        decoder: Any = vae
        if settings.decoder != "exact":
            calls = {"latents_per_call": vae.latents_per_call}
            decoder = random_decoder(settings.decoder, vae, torch.device("cpu"), dtype, **calls)
        session = decoder.decoder_session()
        for part in (z[:, :1], z):
            session.decode(part)
        there = {"VAE": weights, "decoder": meter.now - before}
        return there, work | {"decoding": _most(meter, partial(session.decode, z))}


def _encoding(meter: Meter, vae: VideoVAE, settings: GenerationConfig) -> int:
    """What the next latent of y takes, with what the encoder remembers where that is on the GPU."""
    session, before = vae.encoder_session(), meter.now
    session.encode(torch.empty(1, 1, 3, settings.height, settings.width))
    state = meter.now - before
    grey = torch.empty(1, vae.temporal_stride, 3, settings.height, settings.width)
    return _most(meter, lambda: session.encode(grey)) + (0 if vae.low_memory else state)


@dataclass(frozen=True)
class StreamReport:
    """What a stream takes as it is asked for, and `others` that take less; prints as text."""

    free_bytes: int
    where: str
    asked: Choice
    others: list[Choice]

    @property
    def ok(self) -> bool:
        """Whether it fits as it is asked for."""
        return fits(self.asked.total, self.free_bytes)

    def tree(self) -> dict[str, Any]:
        """Plain values; sizes in bytes; of the others those that fit."""
        others = [choice.tree() for choice in self.others if fits(choice.total, self.free_bytes)]
        return {"ok": self.ok, "free_bytes": self.free_bytes, "asked": self.asked.tree(), "others": others}

    def __str__(self) -> str:
        asked, room = in_words(self.asked.total), f"{in_words(self.free_bytes)} ({self.where})"
        if self.ok:
            first = [f"it fits: {asked} of {room}"]
        else:
            first = [f"PROBLEM: {asked}, and a tenth for what is not counted, do not fit into {room}; what takes less:"]
            for one in self.others:
                verdict = "fits" if fits(one.total, self.free_bytes) else "does not fit"
                first.append(f"  {one.named():<75} {in_words(one.total):>11}  {verdict}")
            if not any(fits(one.total, self.free_bytes) for one in self.others):
                first.append("no choice fits: lower the size, the window or the sink")
        lines = [*first, "", self.asked.named()]
        lines += [f"  {name:<20} {in_words(size):>11}" for name, size in self.asked.there.items()]
        lines += [f"  besides, {name:<11} {in_words(size):>11}" for name, size in self.asked.work.items()]
        return "\n".join([*lines, "  (of these the largest counts: they come one after the other)"])
