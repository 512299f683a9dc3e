"""A cut to another picture is what long tuning trains where one of its videos ends and the next one begins."""

import pytest
import torch
from tiny_codec import TinyCodec
from tiny_models import make_tiny_model
from tiny_objectives import parts_of
from tiny_sessions import OTHER, PICTURE, A, B, make_generator

from longtake.inference.sampling import stream_noise
from longtake.models.cache import CacheView
from longtake.objectives.batch import EncodedBatch
from longtake.objectives.long_tuning import LongTuning, LongTuningConfig

HORIZON, SEED = 5, 4


def watched(model, monkeypatch):
    """What each denoising call from now on sees: its frames, and the positions of all keys."""
    seen, forward = [], model.forward

    def spy(x, sigma, condition, context=None):
        if isinstance(context, CacheView) and not context.commit:
            seen.append((context.frame_index.tolist(), context.query_position.tolist(), context.key_position.tolist()))
        return forward(x, sigma, condition, context)

    monkeypatch.setattr(model, "forward", spy)
    return seen


def long_tuning(generator, monkeypatch):
    """Videos of two chunks, 7 latents, by the generator's rules; roll-outs take all steps, by a session's noise."""
    network = generator.model
    parts = parts_of(
        generator.denoiser,
        *(make_tiny_model(i2v=True), make_tiny_model(i2v=True)),
        plan=generator.plan,
        num_frames=HORIZON,
        codec=TinyCodec(network.config),
    )
    long = LongTuning(parts, LongTuningConfig(teacher="toy", num_chunks=[2], new_frames=2))
    size = generator.latent_size
    monkeypatch.setattr(long, "exits", lambda step: None)
    monkeypatch.setattr(
        long,
        "_roll_out_noise",
        lambda batch, step: stream_noise(SEED, batch.indices, network.config.out_channels, size, "cpu"),
    )
    return long


def row(generator, picture, prompt, index):
    condition, first = generator.condition(generator.prepare(picture), prompt)
    return EncodedBatch([index], condition, torch.zeros_like(condition.text), generator.latent_size, None, first)


@pytest.mark.parametrize(
    ("rope", "keep_sink"),
    [("relative", True), *(pytest.param("absolute", k, marks=pytest.mark.slow) for k in (False, True))],
)
def test_the_scene_after_a_cut_is_the_next_video_of_long_tuning(rope, keep_sink, monkeypatch):
    """The same latents after the same calls, which see the same frames at the same positions: nothing of the scene
    before, its sink included. So a video of some number of chunks and the next one are a film with a cut after them.
    """
    plan = {"block_frames": 2, "window_frames": 5, "sink_frames": 1, "keep_sink": keep_sink}
    generator = make_generator(rope=rope, plan=plan)
    seen = watched(generator.model, monkeypatch)
    session, scenes = generator.open(PICTURE, A, seed=SEED), []
    for picture, prompt in ((PICTURE, A), (OTHER, B)):
        if scenes:
            session.image, session.prompt = picture, prompt
        made = []
        for _ in range(4):  # the picture and three blocks
            session.next()
            made.append(session.state.stream.pending.clean)
        scenes.append(torch.cat(made, 1))
    streamed = list(seen)
    assert len(streamed) == 2 * 3 * 2  # scenes, blocks, steps
    seen.clear()
    long = long_tuning(generator, monkeypatch)
    rows = [row(generator, PICTURE, A, 0), row(generator, OTHER, B, 1)]
    for step in range(4):
        place = long.schedule.at(step)
        assert place.sequence == step // 2
        made = long._roll_out(rows[place.sequence], step, with_grad=False).latents
        end = long.schedule.end_frame(place.chunk)
        new = slice(0 if place.chunk == 0 else end - 2, end)
        wanted = scenes[place.sequence][:, new]
        torch.testing.assert_close(made[:, -wanted.shape[1] :], wanted)
    assert seen == streamed
    assert seen[:6] == seen[6:]  # absolute frames restart
    assert (scenes[0] - scenes[1]).abs().max() > 0.1
