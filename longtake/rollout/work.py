"""Which calls of which network one iteration of a stage makes, and what they cost: the utilisation that training logs.

The calls are those of `rollout/self_forcing.py`, `rollout/long_video.py` and the objectives; tests count them there.
Not counted: encoders and VAE, the rebuild of a cache where a prompt changes, and the unconditional text of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from longtake.config.stage import LoraConfig, StageConfig
from longtake.models.flops import Call, Work, backward, forward
from longtake.models.sizes import DiTConfig

GENERATOR, CRITIC, TEACHER = "generator", "critic", "teacher"


@dataclass(frozen=True)
class Pass:
    """`times` equal calls of one network, in the phase of `train/loop.py` that they belong to.

    `with_grad`: a backward follows each of them. `ahead` False: their forward is that of other passes.
    """

    network: str
    phase: str
    call: Call
    with_grad: bool = False
    times: float = 1.0
    ahead: bool = True


def clip_call(config: StageConfig, network: DiTConfig, batch: int, image_tokens: int) -> Call:
    """A training clip of the stage in one bidirectional call of `network`; `image_tokens` where it has that branch."""
    shape, patch = config.video.shape, network.patch_size
    tokens = (shape.latent_height // patch[1]) * (shape.latent_width // patch[2])
    seen = image_tokens if network.image_dim is not None else 0
    return Call.bidirectional(batch, shape.num_latent_frames, tokens, network.text_len, seen)


def passes(
    config: StageConfig,
    networks: Mapping[str, DiTConfig],
    batch: int,
    image_tokens: int,
    *,
    update_generator: bool = True,
    exit_step: int = 0,
    chunk: int = 0,
    together: bool = False,
) -> list[Pass]:
    """What one micro-batch of `batch` videos costs in one iteration.

    Args: `networks`, sizes by `generator`, `critic`, `teacher`; in distill and long `update_generator` says whether the
    iteration updates the student, and `exit_step` where roll-outs stop; `chunk` of long tuning;
    `together`, where the exit steps of a roll-out have one backward (`Denoiser.batched_exit_backward`).
    """
    clips = {name: clip_call(config, network, batch, image_tokens) for name, network in networks.items()}
    if config.stage == "teacher":
        return [Pass(GENERATOR, "forward", clips[GENERATOR], with_grad=True)]
    if config.stage == "causal":
        return [*remake_passes(config, clips[GENERATOR]), forced_pass(config, clips[GENERATOR])]
    clip = clips[GENERATOR]
    found = list(roll_out_passes(config, clip, exit_step, with_grad=update_generator, chunk=chunk, together=together))
    if update_generator:
        guided = 1 if config.flow.guidance == 1 else 2
        found += [Pass(CRITIC, "scores", clips[CRITIC]), Pass(TEACHER, "scores", clips[TEACHER], times=guided)]
        if config.data_loss.weight:
            found.append(forced_pass(config, clips[GENERATOR]))
    return [*found, Pass(CRITIC, "scores", clips[CRITIC], with_grad=True)]


def forced_pass(config: StageConfig, clip: Call) -> Pass:
    """Teacher forcing on the rows' videos."""
    layout = config.stream_plan.teacher_forcing_layout(config.clip_shape.num_latent_frames)
    return Pass(GENERATOR, "forward", clip.masked(layout), with_grad=True)


def remake_passes(config: StageConfig, clip: Call) -> Iterator[Pass]:
    """The student's own version of the real clip (`rollout.recycle`), of which an iteration makes its share."""
    plan, own = config.stream_plan, config.error_recycling
    frames, steps = config.video.num_latent_frames, len(config.flow.steps)
    given = 1 if config.model.image_condition == "i2v" else 0
    fresh, first = True, True
    for start, end in plan.blocks(0, frames):
        if own.share == 0 or end == frames:
            return
        past = len(plan.attended(start, end))
        if start >= given:
            least = min(max(own.from_step, 1), steps - 1) if first else own.from_step
            call = clip.cached(end - start, past, with_context=fresh)
            mean = (steps - least + 1) / 2
            yield Pass(GENERATOR, "rollout", replace(call, with_context=False), times=own.share * mean)
            first = False
        yield Pass(GENERATOR, "rollout", clip.cached(end - start, past, with_context=fresh), times=own.share)
        fresh = False


def roll_out_passes(
    config: StageConfig, clip: Call, exit_step: int, *, with_grad: bool, chunk: int = 0, together: bool = False
) -> Iterator[Pass]:
    """Denoising and context passes of a roll-out; of long tuning, those of one chunk of a running video."""
    plan = config.stream_plan
    given = 1 if config.model.image_condition == "i2v" else 0
    start, end = given, config.video.num_latent_frames
    if chunk:
        end += chunk * config.new_frames
        start = end - config.new_frames
    # The block before is committed first: the picture, or what the chunk before left.
    commits = [plan.block_of(start - 1)] if start else []
    denoised = list(plan.blocks(start, end))
    commits += denoised[:-1]
    fresh = True  # the first call without gradient makes the context's keys and values

    def one(block: tuple[int, int], *, with_context: bool) -> Call:
        past = len(plan.attended(*block))
        return clip.cached(block[1] - block[0], past, with_context=with_context)

    for block in commits:
        yield Pass(GENERATOR, "rollout", one(block, with_context=fresh))
        fresh = False
    for block in denoised:
        call = one(block, with_context=fresh)
        yield Pass(GENERATOR, "rollout", replace(call, with_context=False), times=exit_step)
        apart = with_grad and not together
        yield Pass(GENERATOR, "rollout", replace(call, with_context=apart or fresh), with_grad=apart)
        fresh = False
    if with_grad and together:
        joined = Call.joined([one(block, with_context=True) for block in denoised])
        yield Pass(GENERATOR, "rollout", joined, with_grad=True, ahead=False)


def loras(config: StageConfig) -> dict[str, LoraConfig | None]:
    """Low-rank updates by network; None where all weights are trained, or none."""
    critic = None if config.critic is None else config.critic.lora
    return {GENERATOR: config.lora, CRITIC: critic, TEACHER: None}


def model_work(
    found: list[Pass], networks: Mapping[str, DiTConfig], updates: Mapping[str, LoraConfig | None]
) -> dict[str, Work]:
    """Operations by phase, each forward once and each backward (`backward`) without what checkpointing computes again:
    what the mathematics needs, by which the utilisation of a device is measured.
    """
    total: dict[str, Work] = {}
    for each in found:
        network, lora = networks[each.network], updates[each.network]
        if each.ahead:
            total[each.phase] = total.get(each.phase, Work()) + forward(network, each.call, lora) * each.times
        if each.with_grad:
            total["backward"] = total.get("backward", Work()) + backward(network, each.call, lora) * each.times
    return total
