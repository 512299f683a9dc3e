"""`longtake verify`: whether weights mean to us what they mean to diffusers, piece by piece, on this machine.

Each piece of ours gets the input that the library's gets, so that a fault shows in its own line and in no later one;
only the short clip at the end is ours alone. One network at a time is loaded. docs/verifying.md explains the lines.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.condition import Condition
from longtake.devices import usable_device
from longtake.encoders.clip import ImageEncoder
from longtake.encoders.condition import condition_frames, prepare_image
from longtake.encoders.text import TextEncoder
from longtake.encoders.vae import VideoVAE
from longtake.errors import ConfigError
from longtake.evaluation import reference
from longtake.evaluation.instruments import STILL_PX, measure
from longtake.evaluation.reference import Inputs, Run, Sampling
from longtake.flow.path import add_noise
from longtake.inference.frames import to_frames
from longtake.inference.pipeline import check_prompt
from longtake.inference.sampling import teacher_latents
from longtake.inference.source import Source
from longtake.models.dit import VideoDiT
from longtake.models.sizes import DiTConfig
from longtake.plan import StreamPlan
from longtake.rng import KeyedRNG
from longtake.rollout.cuda_graphs import CUDAGraphRunner
from longtake.rollout.denoise import Denoiser
from longtake.toy.world import sample_world
from longtake.weights.load import load_dit, open_dit
from longtake.weights.locate import EncoderPaths, encoder_paths

PASSED, SUSPICIOUS, WRONG, NOT_CHECKED = "passed", "suspicious", "wrong", "not checked"

_SMALL_WIDTH = 512  # of a transformer; products of less are over before a second thread has begun
_LEVELS = (0.95, 0.6, 0.15)
_FRAMES = 5  # latent frames of everything
_FEW_STEPS, _CLIP_STEPS = 4, 20
_PLAN = StreamPlan(block_frames=1, window_frames=3, sink_frames=1)  # frames leave the window within `_FRAMES`

# Relative differences by type of the matrix weights: what passes, and how many times as much is wrong. In float32 far
# above rounding and far below any fault; in bfloat16 the library rounds what ours keeps, 5 % of the toy's velocities.
_LIMITS = {torch.float32: (5e-4, 10.0), torch.bfloat16: (6e-2, 3.0)}
_DECODED_DB = {torch.float32: 60.0, torch.bfloat16: 35.0}
_CLIP_WRONG = 10.0  # limits
# Pixels that CLIP is shown, in levels of 256: the library's processor works in whole levels
_CLIP_LEVELS = {"original": 0.02, "diffusers": 1.0}
_LOST_DB, _SEEN_DB = 0.1, 20.0  # of a round trip against the library's; what a picture must come back with
_LEVEL = 1 / 255 / 0.27  # of 256, after CLIP's normalisation


@dataclass(frozen=True)
class Check:
    """One line: `value` is compared with `limit` (None where there is nothing to compare); `hint`: where to look."""

    name: str
    status: str
    value: float | None
    limit: float | None
    hint: str


@dataclass(frozen=True)
class Subject:
    """What is verified: weights with their encoders and rules, and the picture [1, 3, h, w] in [-1, 1] and prompt."""

    source: Source
    config: DiTConfig
    paths: EncoderPaths
    picture: Tensor
    prompt: str
    guidance: float
    run: Run
    text_run: Run
    vae_run: Run
    begins: Callable[[str], None]

    @property
    def has_y(self) -> bool:
        return self.config.condition_channels > 0

    @property
    def is_ti2v(self) -> bool:
        """A picture enters as clean frame 0 alone. Source: Wan2.2-TI2V-5B."""
        return not self.has_y and self.config.model_type == "ti2v"

    @property
    def pictures(self) -> int:
        """How many pictures a clip is made from (Wan2.1-FLF2V: its first and its last)."""
        return 1 if self.config.image_positions is None else 2


def verify(
    weights: str | Path,
    *,
    image: str | Path | None = None,
    prompt: str | None = None,
    encoders: str | Path | None = None,
    guidance: float = 5.0,
    device: str | None = None,
    changes: Mapping[str, Any] | None = None,
    begins: Callable[[str], None] = lambda _: None,
) -> Iterator[Check]:
    """Yields the lines as they are found.

    Args: `weights`, `encoders`, `changes` as `Source.of_model`; without `image` or `prompt` those of a toy world;
    `guidance` of the teacher, 1 = none; `begins` is told what is worked at from here on, for those who wait.
    Raises: CheckpointError for files that cannot be read, ConfigError, DataError for the image.
    """
    if not 1 <= guidance < math.inf:
        raise ConfigError(f"guidance={guidance:g} must be at least 1, which is none; diffusers knows no less")
    source = Source.of_model(weights, encoders, changes=changes, must_stream=False).fetched()
    world = sample_world(0, 0)
    config, settings, place = open_dit(source.weights)[1].config, source.settings, usable_device(device)
    wide, narrow = torch.float32, torch.bfloat16
    dtype = narrow if settings.precision == "bf16" else wide
    text_dtype = narrow if settings.text_precision == "bf16" else dtype
    vae_dtype = narrow if (settings.vae_precision or settings.precision) == "bf16" else wide
    picture = prepare_image(world.render(1)[0] if image is None else image, settings.height, settings.width)
    subject = Subject(
        source,
        config,
        encoder_paths(source.encoders, with_image=config.image_dim is not None),
        picture[None],
        check_prompt(world.caption if prompt is None else prompt),
        guidance,
        Run(place, dtype),
        Run(place, text_dtype),
        Run(place, vae_dtype),
        begins,
    )
    # Convolutions in TF32 would differ by more than a small fault does.
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False), _threads(config.dim):
        yield from _lines(subject)


@contextmanager
def _threads(width: int) -> Iterator[None]:
    """One thread for small networks: more wait for each other longer than they work, most of all on busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if width < _SMALL_WIDTH else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def as_json(checks: Sequence[Check], *, finished: bool) -> dict[str, Any]:
    """What `--json` writes; values that are not finite are null."""
    rows = [asdict(check) for check in checks]
    numbers = [{name: row[name] if _finite(row[name]) else None for name in ("value", "limit")} for row in rows]
    return {"checks": [row | finite for row, finite in zip(rows, numbers)], "finished": finished}


def as_text(check: Check, seconds: float) -> str:
    """The line of a check and how long it took; where to look only when it did not pass."""
    value = "" if check.value is None else f"{check.value:.4g}"
    value += "" if check.limit is None else f" (limit {check.limit:.4g})"
    hint = "" if check.status == PASSED else f"  {check.hint}"
    return f"{check.status:<12}{check.name:<28}{value:<26}{seconds:6.1f} s{hint}"


def _lines(subject: Subject) -> Iterator[Check]:
    text, own_text = yield from _text(subject)
    tokens, own_tokens = yield from _image(subject)
    coded, own_given = yield from _coding(subject)
    with_y = subject.has_y
    own = Condition(own_text[:1], own_tokens, own_given if with_y else None)
    inputs = Inputs(
        _padded(text) if tokens is not None else text,
        None if tokens is None else tokens.repeat(subject.pictures, 1, 1),
        coded.given if with_y else None,
        coded.given if subject.is_ti2v else None,
        KeyedRNG(0).noise(0, "teacher", [0], coded.latents.shape[1:]),  # that `teacher_latents` starts from
        subject.picture,
    )
    clip = yield from _network(subject, inputs, coded.latents, own, own_text[1:], own_given)
    yield from _clip(subject, clip)


# ---- encoders --------------------------------------------------------------------------------------------------------
def _text(subject: Subject) -> Generator[Check, None, tuple[Tensor, Tensor]]:
    """Returns rows [2, M, D] of the prompt and of the empty one, the library's and ours."""
    path, run, prompts = subject.paths.text, subject.text_run, [subject.prompt, ""]
    subject.begins("text encoder, the library's")
    wanted = reference.text_rows(path, prompts, subject.config.text_len, run)
    _free(run)
    subject.begins("text encoder, ours")
    own = TextEncoder.load(path, run.device, run.dtype).encode(prompts).cpu()
    _free(run)
    hint = f"encoders/text.py: tokenizer, cleaning of prompts, length, zeros past the end; files: {path}"
    yield _relative("text rows", own, wanted, run, hint + _untold(path))
    return wanted, own


def _image(subject: Subject) -> Generator[Check, None, tuple[Tensor | None, Tensor | None]]:
    """Returns CLIP tokens [1, L, D], the library's and ours."""
    path, run, way = subject.paths.image, subject.run, subject.source.settings.clip_preprocess
    if path is None:
        yield from (_absent(f"CLIP {part}", "this kind has no CLIP branch") for part in ("pixels", "tokens"))
        return None, None
    subject.begins("image encoder, ours")
    encoder = ImageEncoder.load(path, run.device, run.dtype, preprocess=way)
    picture = subject.picture.to(run.device)
    pixels, own, size = encoder.preprocess(picture).cpu(), encoder.encode(picture).cpu(), encoder.image_size
    del encoder
    _free(run)
    shown = reference.clip_pixels(path, subject.picture, size, way)
    levels = float((pixels - shown).abs().mean()) / _LEVEL if pixels.shape == shown.shape else math.inf
    resizing = f"encoders/clip.py: resizing (clip_preprocess={way}), mean and std of pixels; mean difference in levels"
    yield _judged("CLIP pixels", levels, (_CLIP_LEVELS[way], _CLIP_WRONG), resizing)
    subject.begins("image encoder, the library's")
    wanted = reference.clip_tokens(path, pixels, run)
    _free(run)
    hint = f"encoders/clip.py: the layer that is read; files: {path}"
    yield _relative("CLIP tokens", own, wanted, run, hint + _untold(path))
    return wanted, own


def _coding(subject: Subject) -> Generator[Check, None, tuple[reference.Coded, Tensor]]:
    """Returns what the library's VAE makes of picture and clip; y or the latent of the picture as ours makes it."""
    path, run, with_y = subject.paths.vae, subject.vae_run, subject.has_y
    subject.begins("VAE, the library's")
    wanted = reference.coded(path, subject.picture, _FRAMES, run, with_y=with_y)
    _free(run)
    subject.begins("VAE, ours")
    vae, clip = VideoVAE.load(path, run.device, run.dtype), wanted.clip
    latents = vae.encode(clip)
    given = condition_frames(vae, clip[:, 0].to(run.device), _FRAMES) if with_y else vae.encode(clip[:, :1])
    pixels, back = vae.decode(wanted.latents).cpu(), _db(vae.decode(latents).cpu(), clip)
    latents, given = latents.cpu(), given.cpu()
    del vae
    _free(run)
    networks = f"encoders/vae.py (mean, std, chunks), encoders/wan_vae.py; files: {path}"
    if with_y:
        hint = "encoders/condition.py: mask before latents, grey after the picture; then the lines of the VAE"
        yield _relative("y", given, wanted.given, run, hint)
    elif subject.is_ti2v:
        yield _relative("latent of the picture", given, wanted.given, run, networks)
    else:
        yield _absent("y", "text-to-video weights take no picture")
    theirs = _db(wanted.pixels, clip)
    yield _relative("VAE latents", latents, wanted.latents, run, networks)
    yield _at_least("VAE decoding, dB", _db(pixels, wanted.pixels), _DECODED_DB[run.dtype], 10, networks)
    yield _at_least("VAE round trip, dB", back, theirs - _LOST_DB, 1, f"{networks}; the library's: {theirs:.1f} dB")
    yield _plausible(
        "VAE, picture seen again, dB", theirs, _SEEN_DB, f"is {path} a trained VAE, with its own mean and std?"
    )
    return wanted, given


# ---- the transformer -------------------------------------------------------------------------------------------------
def _network(
    subject: Subject, inputs: Inputs, clean: Tensor, own: Condition, own_empty: Tensor, own_given: Tensor
) -> Generator[Check, None, Tensor | None]:
    """Returns the latents of a clip that is ours alone (None: this kind cannot make one)."""
    source, run, shift = subject.source, subject.run, subject.source.settings.shift
    few = None if subject.pictures > 1 else Sampling(_FEW_STEPS, shift, subject.guidance)
    noisy = [(add_noise(clean, inputs.noise, torch.tensor([level])), level) for level in _LEVELS]
    subject.begins("transformer, ours")
    model = load_dit(source.weights, run.device, None if run.dtype == torch.float32 else run.dtype)
    model = model.eval().requires_grad_(False)
    padded = _of_text(model, inputs.text.shape[1])
    condition = _condition(inputs).to(run.device)
    velocities = [_velocity(padded, inputs, condition, x, level) for x, level in noisy]
    held = "models/cache.py (what is kept, evicted, rotated), rollout/denoise.py, models/attention.py (masks)"
    yield _relative(
        "cached against full", *_cached(padded, condition, clean, noisy[1], source.settings.rope), run, held
    )
    sampled = clip = None
    if few is not None:
        empty = inputs.text[1:].to(run.device)
        sampled = _teacher(padded, condition, empty, inputs.first, clean, few).cpu()
        first = own_given.to(run.device) if subject.is_ti2v else None
        whole = replace(few, steps=_CLIP_STEPS)
        subject.begins(f"transformer, ours: a clip in {_CLIP_STEPS} steps")
        clip = _teacher(model, own.to(run.device), own_empty.to(run.device), first, clean, whole).cpu()
    del model, padded
    _free(run)
    subject.begins("transformer, the library's")
    places = source.weights, subject.paths.vae, subject.config
    names = f"weights/names.py (which tensor is which), models/dit.py, models/layers.py; files: {source.weights}"
    with closing(reference.called(*places, inputs, noisy, few, run, subject.vae_run)) as called:
        for level, made in zip(_LEVELS, velocities):
            yield _relative(f"velocity at {level}", made, next(called), run, names)
        if sampled is None:
            yield _absent("teacher, a few steps", "weights for two pictures are not sampled")
        else:
            hint = "flow/schedule.py, flow/sampler.py, guidance (inference/sampling.py), if the velocities passed"
            yield _relative("teacher, a few steps", sampled, next(called), run, hint, times=3)
    gc.collect()  # diffusers' transformer is one of a circle
    _free(run)
    return clip


def _condition(inputs: Inputs) -> Condition:
    """Of two pictures the tokens lie behind each other."""
    return Condition(inputs.text[:1], None if inputs.tokens is None else inputs.tokens.flatten(0, 1)[None], inputs.y)


def _padded(text: Tensor) -> Tensor:
    """[B, M, D] -> [B, 512, D], as diffusers must have it beside tokens of a picture."""
    return torch.nn.functional.pad(text, (0, 0, 0, reference.TEXT_LEN - text.shape[1]))


def _of_text(model: VideoDiT, text_len: int) -> VideoDiT:
    """The same network for texts of another length, of which no weight knows."""
    other = copy.copy(model)
    other.config = replace(model.config, text_len=text_len)
    return other


def _velocity(model: VideoDiT, inputs: Inputs, condition: Condition, x: Tensor, sigma: float) -> Tensor:
    levels = torch.full((1, x.shape[1]), sigma)
    if inputs.first is not None:
        x = torch.cat([inputs.first, x[:, 1:]], 1)
        levels[:, 0] = 0
    device = condition.text.device
    return model(x.to(device), levels.to(device), condition).cpu()


def _teacher(
    model: VideoDiT, condition: Condition, empty: Tensor, first: Tensor | None, like: Tensor, how: Sampling
) -> Tensor:
    return teacher_latents(
        model,
        condition,
        empty,
        like.shape[1],
        (like.shape[3], like.shape[4]),
        seed=0,
        videos=[0],
        num_steps=how.steps,
        shift=how.shift,
        guidance=how.guidance,
        first_latent=None if first is None else first.to(condition.text.device),
    )


def _cached(
    model: VideoDiT, condition: Condition, clean: Tensor, noisy: tuple[Tensor, float], rope: str
) -> tuple[Tensor, Tensor]:
    """Velocities of blocks against a cache of the clean blocks before, and of all of them in one masked call."""
    plan, device = _PLAN.but(rope=rope), condition.text.device
    frames, size, (x, level) = clean.shape[1], (clean.shape[3], clean.shape[4]), noisy
    clean, x = clean.to(device), x.to(device)
    zero, sigma = (torch.full((1, frames), value, device=device) for value in (0.0, level))
    layout = plan.teacher_forcing_layout(frames).to(device)
    whole = model(torch.cat([clean, x], 1), torch.cat([zero, sigma], 1), condition, layout)[:, frames:]
    denoiser = Denoiser(model, graphs=CUDAGraphRunner() if device.type == "cuda" else None)
    cache, blocks = model.new_cache(plan, 1, size), []
    for start, end in plan.blocks(0, frames):
        blocks.append(denoiser(x[:, start:end], sigma[:, 0], condition, cache))
        denoiser(clean[:, start:end], zero[:, 0], condition, cache, commit=True)
    return torch.cat(blocks, 1).cpu(), whole.cpu()


# ---- the clip --------------------------------------------------------------------------------------------------------
def _clip(subject: Subject, latents: Tensor | None) -> Iterator[Check]:
    """What can be said of a short clip of ours without another one: nothing here is more than suspicious."""
    if latents is None:
        yield _absent("teacher's clip", "weights for two pictures are not sampled")
        return
    run = subject.vae_run
    vae = VideoVAE.load(subject.paths.vae, run.device, run.dtype)
    pixels = vae.decode(latents).cpu()
    del vae
    _free(run)
    if subject.has_y or subject.is_ti2v:
        seen = _db(pixels[:, :1], subject.picture[:, None])
        hint = "the first frame is not the picture: y or its mask, the VAE; or the weights are no trained ones"
        yield _plausible("clip, first frame, dB", seen, _SEEN_DB, hint)
    fps = subject.source.settings.fps
    found = measure(to_frames(pixels[0]), fps)
    motion = found.metrics["motion_px_s"] or 0.0
    said = ", ".join(found.defects) or "none"
    hint = f"defects: {said}; longtake generate, then longtake measure and your eyes"
    yield Check("clip, defects", SUSPICIOUS if found.defects else PASSED, float(len(found.defects)), 0.0, hint)
    yield _plausible("clip, motion, px a second", motion, STILL_PX * fps, "the clip stands still: guidance, prompt, y")


# ---- judging ---------------------------------------------------------------------------------------------------------
def _relative(name: str, own: Tensor, wanted: Tensor, run: Run, hint: str, *, times: float = 1.0) -> Check:
    """Norm of the difference over the library's norm; `times`, of the limits of one call."""
    limit, wrong = _LIMITS[run.dtype]
    if own.shape != wanted.shape:
        shapes = f"shape {list(own.shape)}, the library's is {list(wanted.shape)}; "
        return Check(name, WRONG, None, times * limit, shapes + hint)
    norm = float(wanted.double().norm())
    value = float((own.double() - wanted.double()).norm()) / norm if norm else math.inf
    return _judged(name, value, (times * limit, wrong), hint)


def _judged(name: str, value: float, limits: tuple[float, float], hint: str) -> Check:
    limit, wrong = limits
    status = PASSED if value <= limit else SUSPICIOUS if value <= wrong * limit else WRONG
    return Check(name, status, value, limit, hint)


def _at_least(name: str, value: float, limit: float, margin: float, hint: str) -> Check:
    """Decibels; suspicious within `margin` below the limit."""
    status = PASSED if value >= limit else SUSPICIOUS if value >= limit - margin else WRONG
    return Check(name, status, value, limit, hint)


def _plausible(name: str, value: float, limit: float, hint: str) -> Check:
    """Of trained weights `value` is above the limit, but no comparison proves it."""
    return Check(name, PASSED if value >= limit else SUSPICIOUS, value, limit, hint)


def _absent(name: str, why: str) -> Check:
    return Check(name, NOT_CHECKED, None, None, why)


def _db(one: Tensor, other: Tensor) -> float:
    """Peak signal over the mean squared difference of pixels in [-1, 1]; 100 at most, NaN where pixels are none."""
    error = float((one.double() - other.double()).square().mean())
    return 10 * math.log10(4 / max(error, 4e-10)) if math.isfinite(error) else math.nan  # `min` would lose a NaN


def _untold(path: Path) -> str:
    """What a comparison cannot see: original files of these encoders are read by our own table of names alone."""
    return "" if path.suffix != ".pth" else " (both sides took its names from encoders/original.py)"


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _free(run: Run) -> None:
    """Gives memory back before the next network is loaded: the one before has gone with its last name."""
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
