"""What a stage needs on each rank: what lies there all the time, and what comes and goes at the worst moment.

What comes and goes in an update is never all there at once: copies of weights and the scores' working memory belong to
the end of its forward, gradients and the recomputed block to its backward, and its gradients are dropped before the
other network is updated (`train/loop.py`). Each such moment is added up; the largest one counts.

Must know no file and no device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from longtake.doctor.memory import (
    VAE_WIDTH,
    Activations,
    Clip,
    Networks,
    autocast_bytes,
    cache_bytes,
    gathered_bytes,
    left_bytes,
    master_bytes,
    optimizer_bytes,
    pass_bytes,
    roll_out_bytes,
    trained_count,
    vae_bytes,
    weight_bytes,
    working_bytes,
)

if TYPE_CHECKING:
    from longtake.config import LoraConfig, StageConfig
    from longtake.doctor.layout import Layout
    from longtake.models.dit import DiTConfig

# What the model does not count: the CUDA context, fragments of the allocator, remembered encodings.
HEADROOM = 1.1


@dataclass(frozen=True)
class Need:
    """Bytes that one rank needs, by what for; `alternative` is the total with checkpointing switched over, `loading`
    what there is before the first iteration, `checkpoint` the disk that one checkpoint takes.
    """

    parts: dict[str, int] = field(default_factory=dict)
    alternative: int = 0
    loading: int = 0
    checkpoint: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def peak(self) -> int:
        """The larger one of training and loading."""
        return max(self.total, self.loading)


def without_mesh(config: StageConfig) -> StageConfig:
    """The stage for a `Layout`, which says by itself how ranks are arranged: its data ranks are all the stage knows."""
    parallel = config.parallel.model_copy(update={"replicate": 1, "sequence": 1})
    return config.model_copy(update={"parallel": parallel})


def stage_need(
    config: StageConfig,
    networks: Networks,
    world_size: int,
    *,
    encoder_bytes: int = 0,
    image_tokens: int = 0,
    layout: Layout | None = None,
    vae_width: int = VAE_WIDTH,
) -> Need:
    """What each of `world_size` ranks needs to train a stage. Networks are sharded, encoders are not.

    Args: `layout`, where the ranks are not all data ranks over which one copy of each network is sharded; `vae_width`,
    `base_dim` of the VAE, of which long tuning holds more than its weights.
    """
    precision = config.precision
    sequence, shared, offload = 1, config.roles == "shared", False
    data_ranks, gather_once = world_size, config.gathers_once
    holds_whole = world_size == 1 or config.parallel.weights == "whole"
    if holds_whole:
        world_size = 1
    if layout is not None:
        config = without_mesh(config)
        sequence, shared, offload = layout.sequence, layout.shared_base, layout.cpu_offload
        data_ranks, world_size, gather_once = layout.data_ranks, layout.shards, layout.gather_once
        holds_whole = layout.holds_whole
    critic, masters = config.critic, "float32"
    trained = [_Trained(networks.generator, config.lora, "float32")]
    if networks.critic is not None:
        assert critic is not None
        trained.append(_Trained(networks.critic, critic.lora, "float32"))
    values = sum(master_bytes(each.network, each.lora, masters) for each in trained)
    # With shared roles the teacher is the base of the others.
    bases = sum(weight_bytes(each.network, precision) for each in trained if each.lora is not None and not shared)
    frozen = 0 if networks.teacher is None else weight_bytes(networks.teacher, _frozen_type(config))
    shown = 0 if networks.shown is None else weight_bytes(networks.shown)
    student = 4 * trained_count(networks.generator, config.lora)
    average = student if config.ema.enabled else 0
    optimizer = sum(optimizer_bytes(each.network, each.lora, each.moments) for each in trained)
    clip = _stage_clip(config, networks.generator, data_ranks, image_tokens)
    ranks = _Ranks(
        data_ranks * sequence, world_size, sequence, config.accumulation(data_ranks), offload, gather_once, holds_whole
    )
    modes = {}
    for on in (False, True):
        mode = {"activation_checkpointing": on and (config.activation_checkpointing or True)}
        together = config.model_copy(update=mode).joins_exits(whole=holds_whole, sequence=sequence)
        moments = _Moments(config, networks, clip, ranks, vae_width, checkpointing=on, together=together)
        modes[on] = max(moments, key=lambda parts: sum(parts.values()))
    on = bool(config.activation_checkpointing)
    parts = {
        "weights": (values + bases) // world_size,
        "optimizer": optimizer // world_size,
        "average": average // world_size,
        "frozen networks": frozen // world_size + shown,
        "gathered shards": max(gathered_bytes(network, world_size) for network in networks.loaded),
        **modes[on],
        "encoders": encoder_bytes,
    }
    if offload:  # shards, optimizer and average lie in the host's memory, as gradients do
        parts |= dict.fromkeys(("weights", "optimizer", "average"), 0)
    other = sum(parts.values()) + sum(modes[not on].values()) - sum(modes[on].values())
    whole = weight_bytes(networks.generator) if config.init_from is None else 0
    loading = encoder_bytes + parts["frozen networks"] + max(whole, parts["weights"])
    return Need(parts, other, loading, values + optimizer + average + student + average)


@dataclass(frozen=True)
class _Trained:
    """A network that is trained: its size, its updates and the type of its moments."""

    network: DiTConfig
    lora: LoraConfig | None
    moments: str


def _frozen_type(config: StageConfig) -> str:
    kept = "auto"
    return config.precision if kept == "auto" else {"float32": "fp32", "bfloat16": "bf16"}[kept]


@dataclass(frozen=True)
class _Ranks:
    """Among how many ranks: `all` of them, `shards` of a network, `sequence` of a video; micro-batches of an update."""

    all: int
    shards: int
    sequence: int
    accumulation: int
    offload: bool
    gather_once: bool
    whole: bool


@dataclass(frozen=True)
class _Update:
    """Of one network: what its `calls` graded calls keep, the cache beside them, and what one pass without gradient
    holds while both are there; `unrolling`, what a pass of its own roll-out holds.
    """

    network: DiTConfig
    of_critic: bool
    kept: Activations
    calls: int
    cache: int
    passing: int
    unrolling: int = 0


class _Moments:
    """Iterates over what comes and goes in an iteration, by moment: bytes of a rank by what for."""

    def __init__(
        self,
        config: StageConfig,
        networks: Networks,
        clip: Clip,
        ranks: _Ranks,
        vae_width: int,
        *,
        checkpointing: bool,
        together: bool,
    ) -> None:
        self.config, self.networks, self.clip, self.ranks = config, networks, clip, ranks
        self.checkpointing, self.together = checkpointing, together
        self.features, self.coding = vae_bytes(clip, vae_width) if config.stage == "long" else (0, 0)

    def __iter__(self) -> Iterator[dict[str, int]]:
        for update in self._updates():
            gradients = self._gradients(update)
            # Earlier micro-batches left theirs. The others come while what the last call kept goes.
            before = gradients if self.ranks.accumulation > 1 else 0
            after = before or max(0, gradients - update.kept.last // self.ranks.sequence)
            ahead, back = (self._copies(update, in_backward=on) for on in (False, True))
            yield self._moment(update, before, ahead, update.kept.stored, working=update.passing)
            if update.unrolling and self.ranks.shards > 1 and self.ranks.gather_once:
                kept, working = update.kept.stored, update.unrolling
                yield self._moment(update, before, 0, kept, working=working, gathered=self._gathered(update))
            if self.coding and not update.of_critic:  # the picture of a window is decoded and encoded again
                yield self._moment(update, before, ahead, update.kept.stored, vae=self.coding)
            yield self._moment(update, after, back, update.kept.total)
            yield self._moment(update, gradients, 0, 0)  # while the optimizer works

    def _moment(
        self,
        update: _Update,
        gradients: int,
        copies: int,
        activations: int,
        *,
        working: int = 0,
        vae: int = 0,
        gathered: int = 0,
    ) -> dict[str, int]:
        shared = {"cache": update.cache, "activations": activations, "working memory": working}
        return {
            "gradients": gradients,
            "bfloat16 copies": copies,
            "gathered student": gathered,
            **{name: size // self.ranks.sequence for name, size in shared.items()},
            "VAE": self.features + vae,
        }

    def _gathered(self, update: _Update) -> int:
        """The student as it is gathered for a roll-out."""
        config = self.config
        updates = 0 if config.lora is None else trained_count(update.network, config.lora)
        precision = config.precision
        return weight_bytes(update.network, precision) + (2 if precision == "bf16" else 4) * updates

    def _updates(self) -> Iterator[_Update]:
        config, networks, clip = self.config, self.networks, self.clip
        generator, critic, precision = networks.generator, networks.critic, config.precision
        options: dict[str, Any] = {"precision": precision, "checkpointing": self.checkpointing}
        if critic is None:
            frames = 2 * clip.frames if config.stage == "causal" else clip.frames  # [clean | noisy]
            passed = replace(clip, frames=frames)
            kept = pass_bytes(generator, passed, **options)
            yield _Update(generator, False, kept, 1, 0, working_bytes(generator, passed, precision))
            return
        plan, given = config.stream_plan, 1 if config.model.image_condition == "i2v" else 0
        kept = roll_out_bytes(
            generator,
            clip,
            plan,
            given_frames=given,
            together=self.together,
            **options,
        )
        if config.real_videos.weight:  # [clean | noisy], beside the roll-out until their one backward
            forced = replace(clip, frames=2 * config.clip_shape.num_latent_frames)
            kept = kept.beside(pass_bytes(generator, forced, **options))
        cache = self._cache(generator)
        calls = len(list(plan.blocks(given, clip.frames))) + bool(config.real_videos.weight)
        scores = max(working_bytes(network, clip, precision) for network in (critic, networks.teacher or critic))
        block = working_bytes(generator, replace(clip, frames=plan.block_frames), precision)
        yield _Update(generator, False, kept, calls, cache, scores, block)
        running = cache if self._records or config.stage == "long" else 0
        kept, passing = pass_bytes(critic, clip, **options), working_bytes(critic, clip, precision)
        yield _Update(critic, True, kept, 1, running, passing)

    def _cache(self, generator: DiTConfig) -> int:
        """Of the student; recomputation needs room for what leaves the window before the backward."""
        window, frames, spare = self.config.plan.window_frames, self.clip.frames, 0
        if window is not None and (self.checkpointing or self.together):
            spare = frames if self.config.stage == "long" else max(0, frames - window)
        precision, given = self.config.precision, 1 if self.config.model.image_condition == "i2v" else 0
        size = cache_bytes(generator, self.clip, window_frames=window, spare_frames=spare, precision=precision)
        if self._records and self.together:
            size += left_bytes(generator, self.clip, self.config.stream_plan, given)
        # Long tuning has running videos, each with its cache, for each micro-batch.
        return size * (self.ranks.accumulation if self.config.stage == "long" else 1)

    @property
    def _records(self) -> bool:
        """Whether roll-outs are recorded, and so one cache lent to all of them."""
        parallel = self.config.parallel
        whole = self.ranks.whole and self.config.lora is None
        return parallel.graphs and whole and not parallel.compile

    def _gradients(self, update: _Update) -> int:
        """Of the updated network."""
        config, ranks = self.config, self.ranks
        lora = config.critic.lora if update.of_critic and config.critic is not None else config.lora
        size = master_bytes(update.network, lora, "float32")
        return 0 if ranks.offload else size // ranks.shards

    def _copies(self, update: _Update, *, in_backward: bool) -> int:
        """Bytes of bfloat16 copies of weights."""
        config, networks = self.config, self.networks
        if config.precision != "bf16":
            return 0
        masters = "float32"
        sizes = {False: autocast_bytes(networks.generator, config.lora, masters), True: 0}
        if networks.critic is not None:
            assert config.critic is not None
            sizes[True] = autocast_bytes(networks.critic, config.critic.lora, masters)
        own = sizes[update.of_critic]
        if self.ranks.shards == 1:
            if not in_backward:  # torch remembers them until the loss is there
                return sum(sizes.values())
            return own // update.network.num_layers if self.checkpointing else own
        return own // update.network.num_layers if self.checkpointing else own * update.calls


def _stage_clip(config: StageConfig, generator: DiTConfig, world_size: int, image_tokens: int) -> Clip:
    shape = config.video.shape
    patch = generator.patch_size
    tokens = (shape.latent_height // patch[1]) * (shape.latent_width // patch[2])
    tokens_image = image_tokens if generator.image_dim is not None else 0
    pixels, batch = shape.height * shape.width, config.micro_batch(world_size)
    return Clip(batch, shape.num_latent_frames, tokens, generator.text_len, tokens_image, pixels)
