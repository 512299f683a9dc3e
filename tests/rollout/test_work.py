"""The calls that a stage is said to make against those that its objective really makes."""

from dataclasses import replace

import pytest
from tiny_batches import make_batch
from tiny_models import HEIGHT, IMAGE_TOKENS, WIDTH, make_tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from longtake.config.stage import StageConfig
from longtake.models import flops
from longtake.models.execution import Execution
from longtake.models.flops import Work, forward
from longtake.objectives.dmd import DataLoss, Dmd, DmdSettings
from longtake.objectives.flow_matching import FlowMatching
from longtake.objectives.teacher_forcing import ErrorRecycling, TeacherForcing
from longtake.rng import KeyedRNG
from longtake.rollout.denoise import Denoiser
from longtake.rollout.work import clip_call, loras, model_work, passes, roll_out_passes

SEED = 3


def config_of(stage, i2v=True, **changes):
    """A stage of the tiny sizes: latents of 4x6, 7 frames in blocks [1, 2, 2, 2] (or 6 in [2, 2, 2])."""
    tree = {
        "stage": stage,
        "name": "x",
        "logdir": "nowhere",
        "init_from": "toy",
        "model": {"image_condition": "i2v" if i2v else "t2v"},
        "video": {"height": 8 * HEIGHT, "width": 8 * WIDTH, "num_latent_frames": 7 if i2v else 6},
        "plan": {
            "block_frames": 2,
            "first_frames": 1 if i2v else 2,
            "window_frames": 5 if i2v else 4,
            "sink_frames": 1 if i2v else 0,
        },
        "flow": {"steps": [1.0, 0.7, 0.4]},
        "data": {"path": "data"},
        "batch_size": 2,
        "micro_batch_size": 2,
        "max_steps": 1,
    }
    return StageConfig.from_tree(tree | ({"teacher": "toy"} if stage in ("distill", "long") else {}) | changes)


class Counter(TorchDispatchMode):
    """Operations, counted as torch's `FlopCounterMode` does, which cannot follow a backward inside of a backward."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        count = flop_registry.get(function._overloadpacket)
        self.total += 0 if count is None else count(*args, **(kwargs or {}), out_val=out)
        return out


def counted(work):
    with sdpa_kernel(SDPBackend.MATH), Counter() as counter:
        result = work()
    return counter.total, result


def dmd_of(config, i2v):
    networks = [make_tiny_model(i2v=i2v, seed=k) for k in range(3)]
    flow = config.flow
    settings = DmdSettings(flow.shift, flow.guidance, updates_per_generator=config.critic.updates_per_generator)
    student, *scores = networks
    return Dmd(Denoiser(student), *scores, KeyedRNG(SEED), config.stream_plan, config.video.num_latent_frames, settings)


def total(found, networks, config, *phases):
    work = model_work(found, networks, loras(config))
    return sum(work[phase].total for phase in phases)


@pytest.mark.parametrize("i2v", [True, False], ids=["i2v", "t2v"])
@pytest.mark.parametrize("step", range(4))
def test_distillation(i2v, step):
    """Both losses of an iteration and their backwards, at whatever step its roll-out stops."""
    config = config_of("distill", i2v, critic={"updates_per_generator": 2})
    dmd = dmd_of(config, i2v)
    networks = {"generator": dmd.generator.model.config, "critic": dmd.critic.config, "teacher": dmd.real.config}
    batch = make_batch(dmd.generator.model, [4, 9], dmd.num_frames)
    update = "generator" in dmd.turns(step)
    found = passes(config, networks, 2, IMAGE_TOKENS, update_generator=update, exit_step=dmd.exit_step(step))
    ran = {"forward": 0, "backward": 0}
    for turn in dmd.turns(step):
        operations, result = counted(lambda turn=turn: dmd.loss(turn, batch, step))
        ran["forward"] += operations
        ran["backward"] += counted(result.loss.backward)[0]
    assert ran["forward"] == total(found, networks, config, "rollout", "scores")
    assert ran["backward"] == total(found, networks, config, "backward")


def recomputed(size, call):
    """The blocks of a forward, without embeddings and head."""
    blocks = [sum(p(None)[0] for p in flops._block(size, call, first=first, lora=None)) for first in (True, False)]
    return Work(blocks[0] + (size.num_layers - 1) * blocks[1], size.num_layers * flops._attention(size, call))


@pytest.mark.parametrize("step", [0, 2])
def test_exit_steps_together_have_one_backward_and_no_forward_of_their_own(step):
    """But for embeddings and head; the blocks are recomputed once."""
    config = config_of("distill", critic={"updates_per_generator": 2})
    dmd = dmd_of(config, True)
    dmd.generator = Denoiser(dmd.generator.model.executed(Execution(recompute=True)), batched_exit_backward=True)
    networks = {"generator": dmd.generator.model.config, "critic": dmd.critic.config, "teacher": dmd.real.config}
    batch = make_batch(dmd.generator.model, [4, 9], dmd.num_frames)
    found = passes(config, networks, 2, IMAGE_TOKENS, exit_step=dmd.exit_step(step), together=True)
    (joined,) = (each for each in found if not each.ahead)
    again, whole = (work(networks["generator"], joined.call).total for work in (recomputed, forward))
    ran, result = counted(lambda: dmd.loss("generator", batch, step))
    back = counted(result.loss.backward)[0]
    ran_critic, result = counted(lambda: dmd.loss("critic", batch, step))
    back += counted(result.loss.backward)[0]
    assert ran + ran_critic == total(found, networks, config, "rollout", "scores") + whole - again
    assert back == total(found, networks, config, "backward") + again


def test_real_videos_are_a_call_of_teacher_forcing_with_each_update_of_the_student():
    config = config_of("distill", data={"path": "x", "kind": "clips"}, data_loss={"weight": 1, "num_latent_frames": 9})
    dmd = dmd_of(config, True)
    dmd.data_loss = DataLoss(TeacherForcing(dmd.generator, dmd.draws, dmd.plan, shift=5.0), 1.0)
    networks = {"generator": dmd.generator.model.config, "critic": dmd.critic.config, "teacher": dmd.real.config}
    batch = make_batch(dmd.generator.model, [4, 9], 9)
    ran, result = counted(lambda: dmd.loss("generator", batch, 0))
    back = counted(result.loss.backward)[0]
    critic, more = counted(lambda: dmd.loss("critic", batch, 0))
    back += counted(more.loss.backward)[0]
    found = passes(config, networks, 2, IMAGE_TOKENS, exit_step=dmd.exit_step(0))
    assert ran + critic == total(found, networks, config, "rollout", "scores", "forward")
    assert back == total(found, networks, config, "backward")
    alone = passes(config, networks, 2, IMAGE_TOKENS, update_generator=False)
    assert all(each.phase != "forward" for each in alone)


def test_teacher_and_causal():
    """A CPU computes the permitted pairs alone, as the prediction counts them."""
    model = make_tiny_model(i2v=True)
    batch = make_batch(model, [4, 9], 7)
    config = config_of("teacher")
    objective = FlowMatching(model, KeyedRNG(SEED), shift=3.0, caption_dropout=0.0, first_frame_clean=False)
    (found,) = passes(config, {"generator": model.config}, 2, IMAGE_TOKENS)
    ran, result = counted(lambda: objective.loss("generator", batch, 0))
    assert found.with_grad and ran == forward(model.config, found.call).total
    config = config_of("causal")
    causal = TeacherForcing(Denoiser(model), KeyedRNG(SEED), config.stream_plan, shift=3.0, caption_dropout=0.0)
    (found,) = passes(config, {"generator": model.config}, 2, IMAGE_TOKENS)
    ran, _ = counted(lambda: causal.loss("generator", batch, 0))
    assert ran == forward(model.config, found.call).total


def test_error_recycling_costs_its_share_of_a_roll_out():
    model = make_tiny_model(i2v=True)
    config = config_of("causal", error_recycling={"share": 1.0, "from_step": 2})
    batch = make_batch(model, [4, 9], 7)
    causal = TeacherForcing(
        Denoiser(model),
        KeyedRNG(SEED),
        config.stream_plan,
        shift=3.0,
        caption_dropout=0.0,
        error_recycling=ErrorRecycling(1.0, 2),
    )
    *own, _ = passes(config, {"generator": model.config}, 2, IMAGE_TOKENS)
    ran, _ = counted(lambda: causal._history(batch.latents, batch.condition, batch, 0))
    assert ran == sum(forward(model.config, each.call).total * each.times for each in own)
    half = config_of("causal", error_recycling={"share": 0.5, "from_step": 2})
    *less, _ = passes(half, {"generator": model.config}, 2, IMAGE_TOKENS)
    assert [each.times for each in less] == [each.times / 2 for each in own]


@pytest.mark.parametrize(
    ("from_step", "first", "later"), [(0, 1.5, 2.0), (1, 1.5, 1.5), (2, 1.0, 1.0)], ids=["noise", "one", "last"]
)
@pytest.mark.parametrize("i2v", [True, False], ids=["i2v", "t2v"])
def test_error_recycling_costs_the_mean_over_the_steps_that_blocks_begin_from(i2v, from_step, first, later):
    """Of three steps; the block that is generated first begins at the second one or later."""
    config = config_of("causal", i2v, error_recycling={"share": 1.0, "from_step": from_step})
    *own, _ = passes(config, {"generator": make_tiny_model(i2v=i2v).config}, 2, IMAGE_TOKENS)
    picture = [1] if i2v else []
    assert [each.times for each in own] == [*picture, first, 1, later, 1]
    assert [each.call.with_context for each in own] == [*([True] if i2v else []), False, not i2v, False, False]


@pytest.mark.parametrize(("guidance", "times"), [(1.0, 1), (0.0, 2), (2.0, 2), (4.0, 2)])
def test_the_teacher_is_called_once_where_there_is_no_guidance(guidance, times):
    config = config_of("distill", flow={"steps": [1.0, 0.7, 0.4], "guidance": guidance})
    networks = dict.fromkeys(("generator", "critic", "teacher"), make_tiny_model(i2v=True).config)
    found = passes(config, networks, 2, IMAGE_TOKENS)
    assert [each.times for each in found if each.network == "teacher"] == [times]


@pytest.mark.parametrize("patch", [(1, 4, 2), (1, 2, 3), (1, 1, 1)])
def test_the_tokens_of_a_clip_are_its_patches(patch):
    network = replace(make_tiny_model(i2v=True).config, patch_size=patch)
    call = clip_call(config_of("teacher"), network, 2, IMAGE_TOKENS)
    assert call.tokens == (HEIGHT // patch[1]) * (WIDTH // patch[2]) and call.all_tokens == 2 * 7 * call.tokens
    assert call.pairs == (7 * call.tokens) ** 2 and call.image_tokens == IMAGE_TOKENS
    text_alone = make_tiny_model(i2v=False).config
    assert clip_call(config_of("teacher", False), text_alone, 2, IMAGE_TOKENS).image_tokens == 0


def test_long_tuning_goes_on_where_the_chunk_before_ended():
    """The first chunk is a roll-out; a later one commits what was left and denoises its own frames alone."""
    config = config_of("long", long={"num_chunks": [3], "new_frames": 4})
    clip = clip_call(config, make_tiny_model(i2v=True).config, 2, IMAGE_TOKENS)
    first = list(roll_out_passes(config, clip, 2, with_grad=False))
    later = list(roll_out_passes(config, clip, 2, with_grad=False, chunk=2))
    assert sum(each.call.entries for each in first if each.times == 1) == 1 + 2 * 2 + 3 * 2
    assert [(each.call.entries, each.times) for each in later] == [(2, 1), (2, 1)] + [(2, 2), (2, 1)] * 2
    assert {each.call.pairs for each in later} == {2 * 5 * 36}  # the window is full
