"""The calls that an objective says it makes against those that it really makes."""

from dataclasses import replace

import pytest
from axes import pairwise
from tiny_batches import make_batch
from tiny_codec import TinyCodec
from tiny_models import HEIGHT, IMAGE_TOKENS, WIDTH, make_tiny_model
from tiny_objectives import parts_of, teacher_forcing
from tiny_plan import tiny_plan
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from longtake.condition import VideoShape
from longtake.models import flops
from longtake.models.execution import Execution
from longtake.models.flops import Work, backward, forward
from longtake.objectives.dmd import Dmd, DmdConfig
from longtake.objectives.dmd_keys import CriticConfig, DataLoss
from longtake.objectives.flow_matching import FlowMatching, FlowMatchingConfig
from longtake.objectives.long_tuning import LongTuning, LongTuningConfig
from longtake.objectives.teacher_forcing import ErrorRecycling
from longtake.plan import unwarp
from longtake.rollout.denoise import Denoiser
from longtake.train.throughput import clip_call

SIGMAS = (1.0, 0.9, 0.7)


LAWS = {
    "pass": {},
    "last step": {"context": "last_step"},
    "three then two": {"later_sigmas": (1.0, 0.8)},
    "last step, three then two": {"context": "last_step", "context_from": 0, "later_sigmas": (1.0, 0.8)},
}


def options_of(i2v=True, law="pass"):
    """The tiny sizes: latents of 4x6, 7 frames in blocks [1, 2, 2, 2] (or 6 in [2, 2, 2])."""
    plan = tiny_plan(2, 1, 5, 1, sigmas=SIGMAS) if i2v else tiny_plan(2, 2, 4, 0, sigmas=SIGMAS)
    return {"plan": plan.but(**LAWS[law]), "num_frames": 7 if i2v else 6}


def clips_of(objective, batch=2):
    parts = objective.parts
    networks = {"generator": parts.student.model, **parts.trained, **parts.frozen}
    shape = VideoShape(height=8 * HEIGHT, width=8 * WIDTH, num_latent_frames=parts.num_frames)
    return {name: clip_call(shape, network.config, batch, IMAGE_TOKENS) for name, network in networks.items()}


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


def dmd_of(i2v=True, ratio=2, law="pass", share=1, **settings):
    networks = [make_tiny_model(i2v=i2v, seed=k) for k in range(3)]
    critic = CriticConfig(updates_per_generator=ratio, updates_per_rollout=share)
    settings = DmdConfig(teacher="toy", critic=critic, **settings)
    return Dmd(parts_of(*networks, **options_of(i2v, law)), settings)


def total(found, size, *phases):
    """Operations of the calls in these phases; `backward` is that of all."""
    ahead = (forward(size, each.call).total * each.times for each in found if each.ahead and each.phase in phases)
    back = (backward(size, each.call).total * each.times for each in found if each.with_grad)
    return sum(ahead) + (sum(back) if "backward" in phases else 0)


@pytest.mark.parametrize(("i2v", "law", "step"), pairwise((True, False), LAWS, range(4)))
def test_distillation(i2v, law, step):
    """Both losses of an iteration and their backwards, at whatever step its roll-out stops."""
    dmd = dmd_of(i2v, law=law)
    size, batch = dmd.critic.config, make_batch(dmd.generator.model, [4, 9], dmd.parts.num_frames)
    found = dmd.passes(step, clips_of(dmd))
    ran = {"forward": 0, "backward": 0}
    for turn in dmd.turns(step):
        operations, result = counted(lambda turn=turn: dmd.loss(turn, batch, step))
        ran["forward"] += operations
        ran["backward"] += counted(result.loss.backward)[0]
    assert ran["forward"] == total(found, size, "rollout", "scores")
    assert ran["backward"] == total(found, size, "backward")


def test_an_update_on_kept_clips_costs_its_own_call_alone():
    dmd = dmd_of(ratio=5, share=3)
    size, batch = dmd.critic.config, make_batch(dmd.generator.model, [4, 9], dmd.parts.num_frames)
    ran = [counted(lambda step=step: dmd.loss("critic", batch, step))[0] for step in (1, 2, 3, 4)]
    found = [dmd.passes(step, clips_of(dmd)) for step in (1, 2, 3, 4)]
    assert ran == [total(each, size, "rollout", "scores") for each in found]
    assert [len(each) > 1 for each in found] == [True, False, False, True] and ran[1] == ran[2] < min(ran[0], ran[3])


def recomputed(size, call):
    """The blocks of a forward, without embeddings and head."""
    blocks = [sum(p(None)[0] for p in flops._block(size, call, first=first, lora=None)) for first in (True, False)]
    return Work(blocks[0] + (size.num_layers - 1) * blocks[1], size.num_layers * flops._attention(size, call))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("step", [0, 2])
def test_exit_steps_together_have_one_backward_and_no_forward_of_their_own(law, step):
    """But for embeddings and head; the blocks are recomputed once."""
    dmd = dmd_of(law=law)
    dmd.generator = Denoiser(dmd.generator.model.executed(Execution(recompute=True)), batched_exit_backward=True)
    size, batch = dmd.critic.config, make_batch(dmd.generator.model, [4, 9], 7)
    found = dmd.passes(step, clips_of(dmd))
    (joined,) = (each for each in found if not each.ahead)
    again, whole = (work(size, joined.call).total for work in (recomputed, forward))
    ran, result = counted(lambda: dmd.loss("generator", batch, step))
    back = counted(result.loss.backward)[0]
    ran_critic, result = counted(lambda: dmd.loss("critic", batch, step))
    back += counted(result.loss.backward)[0]
    assert ran + ran_critic == total(found, size, "rollout", "scores") + whole - again
    assert back == total(found, size, "backward") + again


@pytest.mark.parametrize("i2v", [True, False], ids=["i2v", "t2v"])
@pytest.mark.parametrize("law", LAWS)
def test_a_replay_is_one_call_more_and_the_only_one_with_gradient(i2v, law):
    dmd = dmd_of(i2v, law=law)
    dmd.generator = Denoiser(dmd.generator.model, replays=True)
    size, batch = dmd.critic.config, make_batch(dmd.generator.model, [4, 9], dmd.parts.num_frames)
    found = dmd.passes(2, clips_of(dmd))
    (replayed,) = (each for each in found if each.with_grad and each.network == "generator")
    # Context of all blocks but the last, and exit steps of all but the picture
    assert replayed.call.entries == (5 + 6 if i2v else 4 + 6)
    ran, result = counted(lambda: dmd.loss("generator", batch, 2))
    back = counted(result.loss.backward)[0]
    critic, result = counted(lambda: dmd.loss("critic", batch, 2))
    back += counted(result.loss.backward)[0]
    assert ran + critic == total(found, size, "rollout", "scores")
    assert back == total(found, size, "backward")


def test_real_videos_are_a_call_of_teacher_forcing_with_each_update_of_the_student():
    dmd = dmd_of(data_loss=DataLoss(weight=1, num_latent_frames=9))
    size, batch = dmd.critic.config, make_batch(dmd.generator.model, [4, 9], 9)
    ran, result = counted(lambda: dmd.loss("generator", batch, 0))
    back = counted(result.loss.backward)[0]
    critic, more = counted(lambda: dmd.loss("critic", batch, 0))
    back += counted(more.loss.backward)[0]
    found = dmd.passes(0, clips_of(dmd))
    assert ran + critic == total(found, size, "rollout", "scores", "forward")
    assert back == total(found, size, "backward")
    assert all(each.phase != "forward" for each in dmd.passes(1, clips_of(dmd)))  # the critic alone


def test_teacher_and_causal():
    """A CPU computes the permitted pairs alone, as the prediction counts them."""
    model = make_tiny_model(i2v=True)
    batch = make_batch(model, [4, 9], 7)
    teacher = FlowMatching(parts_of(model, **options_of()), FlowMatchingConfig())
    for objective in (teacher, teacher_forcing(model, **options_of())):
        (found,) = objective.passes(0, clips_of(objective))
        ran, _ = counted(lambda objective=objective: objective.loss("generator", batch, 0))
        assert found.with_grad and ran == forward(model.config, found.call).total


@pytest.mark.parametrize(
    ("i2v", "law", "step", "from_step"), pairwise((True, False), LAWS, [(0, 0), (1, 0), (2, 1), (3, 2)])
)
def test_error_recycling_costs_the_roll_out_of_this_iteration(i2v, law, step, from_step):
    model, frames = make_tiny_model(i2v=i2v), options_of(i2v)["num_frames"]
    batch = make_batch(model, [4, 9], frames)
    causal = teacher_forcing(model, recycling=ErrorRecycling(share=1.0, from_step=from_step), **options_of(i2v, law))
    *own, _ = causal.passes(step, clips_of(causal))
    ran, _ = counted(lambda: causal._history(batch.latents, batch.condition, batch, step))
    assert ran == total(own, model.config, "rollout")
    # The picture and all blocks but the last are committed; each but the picture is denoised from its own step on.
    blocks = 3 if i2v else 2
    assert sum(each.times == 1 for each in own) >= blocks and len(own) == 2 * blocks - (1 if i2v else 0)
    rest = teacher_forcing(model, recycling=ErrorRecycling(share=0.0), **options_of(i2v))
    assert len(rest.passes(step, clips_of(rest))) == 1


@pytest.mark.parametrize(("guidance", "times"), [(1.0, 1), (0.0, 2), (2.0, 2), (4.0, 2)])
def test_the_teacher_is_called_once_where_there_is_no_guidance(guidance, times):
    dmd = dmd_of(guidance=guidance)
    assert [each.times for each in dmd.passes(0, clips_of(dmd)) if each.network == "teacher"] == [times]


def test_a_teacher_that_is_guided_at_some_levels_is_called_so_often_on_average():
    dmd = dmd_of(guidance_interval=[0.3, 0.7])
    expected = 1 + unwarp(0.7, dmd.parts.shift) - unwarp(0.3, dmd.parts.shift)
    assert [each.times for each in dmd.passes(0, clips_of(dmd)) if each.network == "teacher"] == [expected]


@pytest.mark.parametrize("patch", [(1, 4, 2), (1, 2, 3), (1, 1, 1)])
def test_the_tokens_of_a_clip_are_its_patches(patch):
    network = replace(make_tiny_model(i2v=True).config, patch_size=patch)
    call = clip_call(VideoShape(height=8 * HEIGHT, width=8 * WIDTH, num_latent_frames=7), network, 2, IMAGE_TOKENS)
    assert call.tokens == (HEIGHT // patch[1]) * (WIDTH // patch[2]) and call.all_tokens == 2 * 7 * call.tokens
    assert call.pairs == (7 * call.tokens) ** 2 and call.image_tokens == IMAGE_TOKENS
    text_alone = make_tiny_model(i2v=False).config
    assert (
        clip_call(
            VideoShape(height=8 * HEIGHT, width=8 * WIDTH, num_latent_frames=7), text_alone, 2, IMAGE_TOKENS
        ).image_tokens
        == 0
    )


def test_long_tuning_goes_on_where_the_chunk_before_ended():
    """The first chunk is a roll-out; a later one commits what was left and denoises its own frames alone."""
    networks = [make_tiny_model(i2v=True, seed=k) for k in range(3)]
    settings = LongTuningConfig(teacher="toy", num_chunks=[3], new_frames=4)
    long = LongTuning(parts_of(*networks, codec=TinyCodec(networks[0].config), **options_of()), settings)
    long.exit_step = lambda step: 2
    first, later = ([each for each in long.passes(step, clips_of(long)) if each.phase == "rollout"] for step in (1, 2))
    assert long.schedule.at(1).chunk == 1 and long.schedule.at(2).chunk == 2
    assert [(each.call.entries, each.times) for each in later] == [(2, 1), (2, 1)] + [(2, 2), (2, 1)] * 2
    assert {each.call.pairs for each in later} == {2 * 5 * 36}  # the window is full
    assert len(first) == len(later)
    beginning = [each for each in long.passes(3, clips_of(long)) if each.phase == "rollout"]
    assert sum(each.call.entries for each in beginning if each.times == 1) == 1 + 2 * 2 + 3 * 2
