"""What a first frame waits for: as much of y as it reads, and nothing that an earlier video has made already."""

import gc
from dataclasses import replace

import numpy as np
import pytest
import torch
from tape import Tape
from tiny_sessions import PICTURE, A, B, make_generator, open_session, take

from longtake.encoders.condition import ConditionFrames
from longtake.inference.generator import Generator
from longtake.rollout.cuda_graphs import CUDAGraphRunner
from longtake.rollout.denoise import Denoiser

BLOCKS = 14  # beyond the VAE's steady index


@pytest.fixture(scope="module")
def whole(generator):
    """Frames of a session whose y is encoded to its end before anything is made."""

    class Whole(Generator):
        def begin_condition(self, picture, prompt):
            condition, first_latent, y = super().begin_condition(picture, prompt)
            y.reach(10**6)
            return condition, first_latent, None

    made = Whole(generator.denoiser, generator.encoders, generator.settings, generator.device)
    return take(open_session(made), BLOCKS)


def test_y_is_encoded_as_far_as_the_next_block_reads_it(generator, whole):
    session, steady = open_session(generator), generator.encoders.vae.steady_index
    reached, frames = [], []
    for _ in range(BLOCKS):
        frames.append(session.next())
        reached.append(None if session.state.y is None else session.state.y.reached)
    assert reached[:4] == [1, 3, 5, 7]  # the picture, then blocks of two
    assert reached[-1] is None and len([n for n in reached if n is not None]) == -(-(steady + 1) // 2)
    assert np.array_equal(np.concatenate(frames), whole)


def test_no_number_of_y_depends_on_how_it_was_reached(generator):
    vae, picture = generator.encoders.vae, torch.rand(1, 3, 32, 32) * 2 - 1
    once, bit_by_bit = ConditionFrames(vae, picture), ConditionFrames(vae, picture)
    once.reach(10**6)
    for end in (1, 3, 4, 9, 2, 10**6):
        bit_by_bit.reach(end)
    assert torch.equal(once.frames, bit_by_bit.frames) and once.frames.shape[1] == vae.steady_index + 1


def test_another_prompt_and_another_picture_find_what_they_read(generator):
    def script(session):
        made = [take(session, 3)]
        session.prompt = B
        made.append(take(session, 3))
        session.image_target = np.zeros((32, 32, 3), np.uint8)
        made.append(take(session, 3))
        return np.concatenate(made)

    gradual, at_once = open_session(generator), open_session(generator)
    first = at_once.next()
    at_once.state.encode()
    assert at_once.state.y is None

    expected = [first, take(at_once, 2)]
    at_once.prompt = B
    expected.append(take(at_once, 3))
    at_once.image_target = np.zeros((32, 32, 3), np.uint8)
    expected.append(take(at_once, 3))
    assert np.array_equal(script(gradual), np.concatenate(expected))


def test_a_saved_session_and_a_branch_have_all_of_y(generator, whole, tmp_path):
    session = open_session(generator, history_blocks=2)
    begun = take(session, 3)
    session.save(tmp_path / "a.session")
    resumed = generator.resume(tmp_path / "a.session")
    branch = session.fork()
    assert session.state.y is None and branch.state.y is None and all(past.y is None for past in branch._history)
    for other in (resumed, branch, session):
        assert np.array_equal(np.concatenate([begun, take(other, BLOCKS - 3)]), whole)


def test_a_session_goes_back_to_where_y_was_not_encoded(generator, whole):
    session = open_session(generator, history_blocks=3)
    take(session, 4)
    session.rewind(3)
    assert np.array_equal(take(session, BLOCKS - 1), whole[1:])


def test_the_first_latent_is_given_before_the_next_block_is_begun(generator, whole):
    """Its block's other frames and the next block as soon as they are decoded; from then on a block is begun ahead."""
    chunks = generator.stream(PICTURE, A, num_frames=41, ahead=True)
    begun, made = [], []
    for chunk in chunks:
        begun.append(chunks._blocks._session.num_frames)
        made.append(chunk)
    assert [len(chunk) for chunk in made] == [1, 4, 4, 8, 8, 8, 8] and begun == [9, 9, 9, 17, 33, 41, 41]
    assert np.array_equal(np.concatenate(made), whole[:41])


# ---- caches that outlive their session -------------------------------------------------------------------------------
@pytest.fixture
def taped():
    made, tape = make_generator(), Tape()
    return replace(made, denoiser=Denoiser(made.model, graphs=CUDAGraphRunner(tape))), tape


def test_a_warm_generator_records_nothing_more(taped, whole):
    generator, tape = taped
    generator.warm_up()
    cache = generator.caches._kept[0][1][0]
    captured = generator.denoiser.graphs.captured(cache)
    assert (
        captured == 5
    )  # passes with one frame and with a full window behind them, their context passes, the picture's
    session = open_session(generator)
    assert np.array_equal(take(session, BLOCKS), whole)
    assert session.state.stream.cache is cache and generator.denoiser.graphs.captured(cache) == captured


def test_two_sessions_at_once_have_caches_of_their_own(taped, whole):
    generator, _ = taped
    one = open_session(generator)
    first = [one.next()]
    other = open_session(generator)
    second = [other.next()]
    assert one.state.stream.cache is not other.state.stream.cache
    for _ in range(BLOCKS - 1):
        first.append(one.next())
        second.append(other.next())
    assert np.array_equal(np.concatenate(first), whole) and np.array_equal(np.concatenate(second), whole)


def test_a_cache_is_lent_again_when_its_session_is_gone(taped):
    generator, _ = taped
    one = open_session(generator)
    take(one, 2)
    cache = one.state.stream.cache
    del one
    gc.collect()
    two = open_session(generator)
    two.next()
    assert two.state.stream.cache is cache


def test_a_scene_that_could_not_be_begun_has_its_cache_when_it_is(taped, whole, monkeypatch):
    generator, _ = taped
    take(open_session(generator), 2)
    gc.collect()
    cache, session = generator.caches._kept[0][1][0], open_session(generator)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(generator.encoders.text, "encode", lambda prompts: (_ for _ in ()).throw(MemoryError))
        session.next()
    assert not generator.caches._kept and np.array_equal(take(session, BLOCKS), whole)
    assert session.state.stream.cache is cache and not session._unused


def test_a_cache_of_other_sizes_is_not_lent(taped):
    generator, _ = taped
    one = open_session(generator)
    one.next()
    cache = one.state.stream.cache
    del one
    gc.collect()
    settings = generator.settings.model_copy(update={"height": 64})
    two = open_session(replace(generator, settings=settings))
    two.next()
    assert two.state.stream.cache is not cache and not generator.caches._kept


def test_a_session_that_can_go_back_keeps_its_caches(taped):
    generator, _ = taped
    session = open_session(generator, history_blocks=2)
    session.next()
    del session
    gc.collect()
    assert not generator.caches._kept


@pytest.mark.parametrize(
    ("change", "pieces"), [("none", [8]), ("prompt", [4, 4]), ("image_target", [4, 4]), ("image", [1])]
)
def test_what_follows_a_change_comes_a_latent_first(generator, change, pieces):
    session = open_session(generator)
    take(session, 3)
    if change != "none":
        setattr(session, change, B if change == "prompt" else 255 - PICTURE)
    told = []
    frames = session.begin(early=lambda piece, count: told.append((piece, count)))
    assert [len(piece) for piece in frames.pieces] == pieces
    assert told == ([(frames.pieces[0], len(frames))] if len(pieces) > 1 else [])
    assert [len(piece) for piece in session.begin().pieces] == ([4, 4] if change == "image" else [8])
