"""Denoise one block against a cache, and commit it: the only place that does so, in training and in inference.

Source: Self-Forcing (Huang et al. 2025, arXiv 2506.08009, algorithm 1) with the rules of the project's specification:
context is stored at the level of the plan (sigma exactly 0, but for students that are trained otherwise), and only the
exit step may carry gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.condition import Condition
from longtake.flow.path import add_noise, clean_from_velocity, guided
from longtake.models.attention import attend_fastest
from longtake.models.cache import CacheView, KVCache
from longtake.models.dit import VideoDiT
from longtake.models.execution import LARGE_WIDTH
from longtake.models.shared_base import WriterApart
from longtake.plan import Exits, StreamPlan
from longtake.rollout.cuda_graphs import CUDAGraphRunner, Made
from longtake.rollout.replay import ExitStep, Replay, exits_with_grad, hold_until_backward
from longtake.rollout.rounded import Rounded

# noise(step) -> [B, f, C, H, W]: fresh noise for denoising step `step` of one block
BlockNoise = Callable[[int], Tensor]


class Denoiser:
    """One network as it streams: its calls against caches, and everything that makes these fast or differentiable.

    It moves caches on, keeps the condition's keys and values there, replays captured passes, lends one cache to one
    roll-out after another, and says how roll-outs get their gradient. The network and the cache know nothing of it.

    Args: `graphs` captures passes without gradient and replays them (None: Python makes every call); `rounded` makes
    these in place of the `model` that it follows; `batched_exit_backward` has the exit steps of a roll-out recomputed
    and differentiated together in the end; `replays` makes them again with gradient into their context instead
    (`replay.py`); `writer`, another network of the same sizes that makes all of the context, while `model` only
    denoises (SGF+; None: that of a `WriterApart`, or the model itself); `gathering`, entered around several calls
    between which no weight changes: sharded weights are gathered once for them.
    """

    def __init__(
        self,
        model: VideoDiT,
        *,
        graphs: CUDAGraphRunner | None = None,
        rounded: Rounded | None = None,
        batched_exit_backward: bool = False,
        replays: bool = False,
        writer: VideoDiT | None = None,
        gathering: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        assert not (batched_exit_backward and replays), "two ways to give a roll-out its gradient"
        self.model, self.graphs, self.gathered = model, graphs, gathering
        self.writer = model.writer if writer is None and isinstance(model, WriterApart) else writer
        self.rounded = rounded
        self.batched_exit_backward, self.replays = batched_exit_backward, replays
        self._pool: tuple[tuple, KVCache] | None = None
        # Looking for them takes as long as starting a replay, or ten. They may move, and stay the same objects.
        self._weights: WeakKeyDictionary[VideoDiT, list[nn.Parameter]] = WeakKeyDictionary()

    @property
    def rereads(self) -> bool:
        """Whether the cache is read again after a roll-out: what that attended to must stay there until then."""
        return bool(self.model.execution.recompute) or self.batched_exit_backward or self.replays

    def pooled_cache(
        self, plan: StreamPlan, batch_size: int, size: tuple[int, int], max_frames: int, spare_frames: int = 0
    ) -> KVCache:
        """As `VideoDiT.new_cache`, for one roll-out: with `graphs`, the cache that the roll-out before had, cleared,
        where it fits and no backward reads from it any more, so that its captured passes can be replayed.
        """
        if self.rounded is not None:
            self.rounded.changed()
        sizes = (plan, batch_size, size, max_frames, spare_frames)
        if self.graphs is None:
            return self.model.new_cache(*sizes)
        key = (sizes, torch.is_autocast_enabled())
        if self._pool is None or self._pool[0] != key or self._pool[1].is_held:
            self._pool = key, self.model.new_cache(*sizes)
            self.graphs.comes_again(self._pool[1])
        cache = self._pool[1]
        cache.clear()
        return cache

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        condition: Condition,
        cache: KVCache,
        *,
        commit: bool = False,
        layers: list[Tensor] | None = None,
    ) -> Tensor:
        """Velocity [B, f, C, H, W] of the block at `cache.position`; arguments as those of `VideoDiT.forward`.

        Args: `commit` stores its keys and values at the given `sigma` and moves the cache on; it needs
        `torch.no_grad()`. `layers` gets what each layer made. What raises leaves the cache as it was, or shows.
        Raises: ShapeError when arguments do not fit; CacheError.
        """
        # Keys and values of the text are of one network: where two take turns, each makes its own anew.
        model = self.writer if commit and self.writer is not None else self.model
        model.check(x, sigma, condition, cache)
        frames = x.shape[1]
        if torch.is_grad_enabled():
            if commit:
                cache.begin_commit(frames)  # says why not
            pins = cache.pin(frames)
            velocity = model(x, sigma, condition, cache.view(frames, with_grad=True))
            return hold_until_backward(velocity, [pins]) if model.execution.recompute else velocity
        kept = cache.has_cross(model, condition)
        view = cache.view(frames, commit=commit, cross_kept=kept)
        text, image = (None, None) if kept else (_padded(condition.text, model.config.text_len), condition.image)
        form = (torch.is_autocast_enabled(x.device.type), *(None if t is None else t.shape for t in (text, image)))
        if not kept:
            cache.clear_condition()  # a replayed pass writes others, and may not come to its end
        if commit:
            cache.begin_commit(frames)
        # Captured or not yet, passes of one kind are computed in one way: when they are captured changes no number.
        made_by = model if self.rounded is None or model is not self.model else self.rounded.current()
        work = _Pass(made_by, view, condition, keep_layers=layers is not None, quick=self.graphs is not None)
        if self.graphs is None:
            velocity, *made = work.run(x, sigma, condition)
        else:
            inputs = (x, sigma, condition.frames, text, image)
            if made_by not in self._weights:
                self._weights[made_by] = list(made_by.parameters())
            addresses = (*(p.data_ptr() for p in self._weights[made_by]), *cache.cross_addresses())
            kind = (view.num_past, frames, commit, layers is not None, kept)
            split = model.execution.split
            agree = bool if split is None else split.agree
            again = kept or cache.has_space_for_cross(form)
            velocity, *made = self.graphs.run(work, kind, inputs, cache, addresses, agree, again=again)
        if layers is not None:
            layers[:] = made
        if not kept:
            cache.cross_is_for(model, condition, form)
        if commit:
            cache.end_commit(frames)
        return velocity

    def exits_with_grad(self, condition: Condition, exits: Sequence[ExitStep]) -> Tensor:
        """Clean latents of the exit steps of several blocks, with gradient (`rollout/replay.py`)."""
        return exits_with_grad(self.model, condition, exits)

    def replayed(self, condition: Condition, replay: Replay) -> Tensor:
        """Those of the blocks that a `Replay` is of, with gradient into their context too."""
        return replay.with_grad(self.model, condition)


@dataclass(frozen=True)
class _Pass:
    """One call without gradient; as a function of tensors alone, which can be captured.

    Besides the velocity it gives what each layer made, `keep_layers`; in `static` tensors where there are any. `quick`,
    on a GPU: by the fastest attention and, of large networks, with what lies between matrix products compiled, which
    takes seconds once.
    """

    model: VideoDiT
    view: CacheView
    condition: Condition
    keep_layers: bool
    quick: bool

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        frames: Tensor | None,
        text: Tensor | None,
        image: Tensor | None,
        static: Sequence[Tensor] | None = None,
    ) -> Made:
        if text is None:  # kept: the call reads neither text nor image
            return self.run(x, sigma, replace(self.condition, frames=frames), static)
        return self.run(x, sigma, Condition(text, image, frames), static)

    def run(self, x: Tensor, sigma: Tensor, condition: Condition, static: Sequence[Tensor] | None = None) -> Made:
        """The call under a condition."""
        made: list[Tensor] = []

        def layers(_block: nn.Module, run: Callable[..., Tensor], inputs: Sequence[Tensor | None]) -> Tensor:
            hidden = run(*inputs)
            made.append(hidden if static is None else static[len(made)].copy_(hidden))
            return hidden

        view = replace(self.view, layers=layers) if self.keep_layers else self.view
        model = self.model
        if self.quick and x.is_cuda:
            fuses = model.config.dim >= LARGE_WIDTH
            model = model.executed(replace(model.execution, attend=attend_fastest, fuses=fuses))
        return model(x, sigma, condition, view), *made


def _padded(text: Tensor, length: int) -> Tensor:
    """[B, M, D] -> [B, length, D], with zero rows: captured passes take texts of one length."""
    return F.pad(text, (0, 0, 0, length - text.shape[1]))


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of a stream: uncond + `weight` (cond - uncond).

    The unconditional side has a `condition` (same picture, other text) and a `cache` of its own, because what a frame
    leaves in the cache depends on the text. So guidance doubles passes and cache memory.
    """

    weight: float
    condition: Condition
    cache: KVCache


@dataclass(frozen=True)
class DenoisedBlock:
    """A finished block: its `clean` latents [B, f, C, H, W], float32, and what it is in the past of later ones.

    `context`, the latents at noise level `sigma` of which its keys and values are made (`StreamPlan.context_level`);
    `noisy`, at level `noisy_sigma`, what its exit step began from (of what nobody has denoised here: the context);
    `stored`: the cache had it when it was finished, from the last denoising step.
    """

    clean: Tensor
    context: Tensor
    sigma: float
    noisy: Tensor
    noisy_sigma: float
    stored: bool = False

    @classmethod
    def given(cls, latents: Tensor) -> DenoisedBlock:
        """The given picture, which nobody has denoised; it is stored without noise."""
        return cls(latents, latents, 0.0, latents, 0.0)


def denoise_block(
    denoiser: Denoiser,
    cache: KVCache,
    condition: Condition,
    noise: BlockNoise,
    plan: StreamPlan,
    *,
    begin: tuple[int, Tensor] | None = None,
    exit_step: Exits | None = None,
    with_grad: bool = False,
    exits: list[ExitStep] | None = None,
    guidance: Guidance | None = None,
    stores: bool = True,
    check: Callable[[], None] | None = None,
) -> DenoisedBlock:
    """The block at `cache.position`, at the levels and with the context of `plan`.

    The cache is only read, but where the plan has the last step store the block (`StreamPlan.stores_itself`), that was
    taken, and it `stores` (False: nobody will read it): then the cache has moved on. With gradient such a step is made
    once more without, since a call with gradient stores nothing.
    Args: `begin`, a step and the noisy latents to begin from (default: the first, noise alone); `exit_step` stops after
    that step (`StreamPlan.exit_step`); `with_grad` lets gradient through the exit step, and through that
    step alone; or `exits` gets that step, for `Denoiser.exits_with_grad`; `guidance` None = off; `check` is called
    after each step but the last, and what it raises leaves the cache as it was.
    """
    start = cache.position
    sigmas, itself = plan.levels(start), plan.stores_itself(start)
    last = plan.exit_step(start, exit_step)
    first, x = begin or (0, _first_input(noise(0).float(), sigmas[0]))
    with torch.no_grad():
        for step in range(first, last):
            clean = _predict(denoiser, cache, condition, x, sigmas[step], guidance)
            x = add_noise(clean, noise(step + 1), _level(x, sigmas[step + 1]))
            if check is not None:
                check()
    layers = None
    if exits is not None:
        assert guidance is None, "training is never guided"
        frames = x.shape[1]
        exits.append(ExitStep(x, sigmas[last], cache.view(frames, with_grad=True), cache.pin(frames)))
        layers = None if denoiser.model.execution.made_by else exits[-1].layers
    itself = itself and last == len(sigmas) - 1
    store, apart = itself and stores, with_grad and exits is None
    assert not (store and denoiser.writer), "a last step that stores is one network's"
    with torch.set_grad_enabled(apart):
        clean = _predict(denoiser, cache, condition, x, sigmas[last], guidance, layers, commit=store and not apart)
    if itself:
        if store and apart:
            commit_block(denoiser, cache, condition, x, sigmas[last], guidance=guidance)
        return DenoisedBlock(clean, x, sigmas[last], x, sigmas[last], store)
    level, context = plan.context_level(start), clean.detach()
    if level > 0:
        context = add_noise(context, noise(plan.context_step), _level(context, level))
    return DenoisedBlock(clean, context, level, x, sigmas[last])


@torch.no_grad()
def commit_block(
    denoiser: Denoiser,
    cache: KVCache,
    condition: Condition,
    context: Tensor,
    sigma: float | Sequence[float] = 0.0,
    *,
    guidance: Guidance | None = None,
) -> None:
    """The context pass: stores keys and values of latents and advances the cache (both caches).

    Args: `context` [B, f, C, H, W] at noise level `sigma`, which frames may have each their own of.
    """
    level = _level(context, sigma)
    denoiser(context.detach(), level, condition, cache, commit=True)
    if guidance is not None:
        denoiser(context.detach(), level, guidance.condition, guidance.cache, commit=True)


def _predict(
    denoiser: Denoiser,
    cache: KVCache,
    condition: Condition,
    x: Tensor,
    sigma: float,
    guidance: Guidance | None,
    layers: list[Tensor] | None = None,
    *,
    commit: bool = False,
) -> Tensor:
    level = _level(x, sigma)
    velocity = denoiser(x, level, condition, cache, layers=layers, commit=commit)
    if guidance is not None:
        unconditional = denoiser(x, level, guidance.condition, guidance.cache, commit=commit)
        velocity = guided(velocity, unconditional, guidance.weight)
    return clean_from_velocity(x, velocity, level)


def _first_input(noise: Tensor, sigma: float) -> Tensor:
    """What a block begins with: latents that are zero, at its first level."""
    return noise if sigma == 1 else noise * sigma


def _level(x: Tensor, sigma: float | Sequence[float]) -> Tensor:
    """[B], or [B, f] where each frame has a level of its own."""
    if isinstance(sigma, float):
        return torch.full((x.shape[0],), sigma, device=x.device)
    return torch.tensor(sigma, device=x.device).expand(x.shape[0], -1)
