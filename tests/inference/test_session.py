"""Sessions: what they follow, branches, ways back; every equality is of bits."""

import random

import numpy as np
import pytest
import torch
from tiny_sessions import KINDS, OTHER, PICTURE, A, B, C, first_picture, make_generator, open_session, take

from longtake.condition import Condition
from longtake.encoders.condition import encode_condition, prepare_image
from longtake.errors import ConfigError, DataError
from longtake.inference.frames import to_frames
from longtake.inference.sampling import stream_noise, student_latents
from longtake.rollout.denoise import DenoisedBlock, Guidance, commit_block, denoise_block


@pytest.fixture(scope="module", params=list(KINDS))
def any_generator(request):
    return make_generator(**KINDS[request.param])


# The others meet what these tests do in `test_any_way_to_a_point_gives_what_the_straight_way_gives`, too.
FEW = ("plain", "guided, absolute", "begun by text alone")


@pytest.fixture(
    scope="module", params=[kind if kind in FEW else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def some_generator(request):
    return make_generator(**KINDS[request.param])


def prepared(image):
    return prepare_image(image, 32, 32)[None]


# ---- frames ----------------------------------------------------------------------------------------------------------
def test_a_session_gives_the_frames_of_a_stream(any_generator):
    session = open_session(any_generator, seed=3)
    assert (session.num_frames, session.position, session.scene) == (0, 0, -1)
    chunks = [session.next() for _ in range(6)]
    assert [chunk.shape for chunk in chunks] == [(n, 32, 32, 3) for n in (1, 8, 8, 8, 8, 8)]
    assert (session.num_frames, session.position, session.scene) == (41, 11, 0)
    streamed = any_generator.stream(first_picture(any_generator), A, num_frames=41, seed=3)
    assert np.array_equal(np.concatenate(chunks), np.concatenate(list(streamed)))


def test_two_sessions_do_not_touch_each_other(some_generator):
    alone = []
    for prompt, later, seed in ((A, B, 0), (B, C, 1)):
        session = open_session(some_generator, prompt, seed=seed)
        first = take(session, 3)
        session.prompt = later
        alone.append(np.concatenate([first, take(session, 3)]))
    a, b = open_session(some_generator, A, seed=0), open_session(some_generator, B, seed=1)
    made = [[], []]
    for block in range(6):
        if block == 3:
            a.prompt, b.prompt = B, C
        made[0].append(a.next())
        made[1].append(b.next())
    assert all(np.array_equal(np.concatenate(mine), expected) for mine, expected in zip(made, alone))


# ---- prompts ---------------------------------------------------------------------------------------------------------
class ByHand:
    """Streams block by block with nothing but the steps of `rollout/denoise.py`; both sides of guidance have a cache."""

    def __init__(self, generator):
        self.generator, self.rules = generator, generator.plan.with_given(int(first_picture(generator) is not None))
        self.noise = stream_noise(0, [0], 4, (4, 4), "cpu")
        self.blocks, self.starts = [], []
        self.follow(A)
        if first_picture(generator) is None:
            self.make()
        else:
            given = generator.encoders.vae.encode(prepared(PICTURE)[:, None])
            self.blocks, self.starts = [DenoisedBlock.given(given)], [0]

    @property
    def position(self):
        return self.starts[-1] + self.blocks[-1].clean.shape[1] if self.starts else 0

    def follow(self, prompt):
        """Empty caches under another prompt."""
        model, encoders, rules = self.generator.model, self.generator.encoders, self.rules
        text, empty = encoders.text.encode([prompt]), encoders.text.encode([""])
        if model.config.condition_channels:
            self.condition = encode_condition(encoders, prepared(PICTURE), [prompt])
        else:
            self.condition = Condition(text)
        self.caches = [model.new_cache(rules, 1, (4, 4), max_frames=64) for _ in range(2)]
        weight = self.generator.settings.guidance
        self.guidance = None if weight == 1 else Guidance(weight, self.condition.with_text(empty), self.caches[1])

    def commit(self, block, again=False):
        """By a pass, also what a stream stores by its last step; `again`, from clean latents."""
        start, made = self.starts[block], self.blocks[block]
        for cache in self.caches:
            cache.position = start
        context, side = made.context, {"guidance": self.guidance}
        if again and made.sigma:
            noise = self.noise(start, start + made.clean.shape[1], self.rules.context_step)
            context = (1 - made.sigma) * made.clean + made.sigma * noise
        commit_block(self.generator.denoiser, self.caches[0], self.condition, context, made.sigma, **side)

    def make(self):
        start = self.position
        made = denoise_block(
            self.generator.denoiser,
            self.caches[0],
            self.condition,
            lambda step: self.noise(start, start + 2 if start else 1, step),
            self.rules,
            guidance=self.guidance,
            stores=False,
        )
        self.starts.append(start)
        self.blocks.append(made)


@torch.no_grad()
def switched_oracle(generator, num_before, num_after):
    """Latents under A and then under B, from a cache that saw sink and window only, and only under B."""
    stream, rules = ByHand(generator), generator.plan
    for _ in range(num_before - 1):
        stream.commit(-1)
        stream.make()
    old = stream.caches
    stream.follow(B)
    sink = 0 if rules.window_frames is None else rules.sink_frames
    oldest = 0 if rules.window_frames is None else stream.position - (rules.window_frames - sink)
    left = []
    if rules.keep_sink:  # what A left of the sink stays
        left = [frame for frame in old[0].held_frames if frame < sink]
        for new, before in zip(stream.caches, old):
            new.restore(len(left), left, *before.stored(left))
    for block, start in enumerate(stream.starts):
        if (start < sink or start >= oldest) and start not in left:
            stream.commit(block, again=True)
    for index in range(num_after):
        if index:
            stream.commit(-1)
        stream.make()
    return torch.cat([block.clean for block in stream.blocks], 1)


@pytest.mark.parametrize(
    ("kind", "num_before"),
    [*((kind, 4) for kind in KINDS), ("plain", 1), ("plain", 2), ("kept sink", 1), ("kept sink", 2)],
)
def test_a_new_prompt_goes_on_from_a_cache_rebuilt_under_it(kind, num_before):
    any_generator = make_generator(**KINDS[kind])
    session = open_session(any_generator)
    before = take(session, num_before)
    session.prompt = B
    assert session.prompt == B
    after = take(session, 2)
    latents = switched_oracle(any_generator, num_before, 2)
    expected = to_frames(any_generator.encoders.vae.decode(latents)[0])
    assert np.array_equal(np.concatenate([before, after]), expected)
    unchanged = open_session(any_generator)
    take(unchanged, num_before)
    assert not np.array_equal(after, take(unchanged, 2))


@pytest.mark.parametrize(
    "law",
    [
        {"recache": "last_window", "keep_sink": True},
        {"recache": "none", "context_sigma": 0.2},
        {"recache": "none", "context": "last_step"},
    ],
)
def test_other_laws_of_a_new_prompt_hold_in_files_branches_and_ways_back(law, tmp_path):
    generator = make_generator(plan={"block_frames": 2, "window_frames": 5, "sink_frames": 1, **law})
    session = open_session(generator, history_blocks=2)
    before = take(session, 4)
    session.prompt = B
    session.save(tmp_path / "s")
    others = [session.fork(), generator.resume(tmp_path / "s")]
    after = take(session, 2)
    old, new = (generator.condition(prepared(PICTURE), prompt)[0] for prompt in (A, B))
    first, options = old.frames[:, :1, -4:], {"later": [new], "switch_frames": [7], "seed": 0, "videos": [0]}
    latents = student_latents(generator.denoiser, old, first, generator.plan, 11, (4, 4), **options)
    expected = to_frames(generator.encoders.vae.decode(latents)[0])
    assert np.array_equal(np.concatenate([before, after]), expected)
    session.rewind(2)
    session.prompt = B
    assert all(np.array_equal(take(other, 2), after) for other in [*others, session])


def test_a_prompt_before_the_first_block_is_the_prompt_from_the_start(some_generator):
    expected = take(open_session(some_generator, B), 4)
    for num_before in (0, 1) if first_picture(some_generator) is not None else (0,):
        session = open_session(some_generator, A)
        made = [session.next() for _ in range(num_before)]
        session.prompt = B
        assert np.array_equal(np.concatenate([*made, take(session, 4 - num_before)]), expected)


def test_a_prompt_that_is_taken_back_in_time_changes_nothing(generator):
    expected = take(open_session(generator), 5)
    session = open_session(generator)
    made = [take(session, 3)]
    session.prompt = B
    session.prompt = A
    assert np.array_equal(np.concatenate([*made, take(session, 2)]), expected)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("prompt", " \n", ConfigError, "prompt is empty"),
        ("image", "no/such.png", DataError, "no/such.png"),
        ("image_target", np.zeros((4, 4), np.float32), DataError, "float32"),
    ],
)
def test_what_cannot_be_followed_is_refused_and_changes_nothing(generator, name, value, error, message):
    session = open_session(generator)
    first = take(session, 2)
    with pytest.raises(error, match=message):
        setattr(session, name, value)
    assert np.array_equal(np.concatenate([first, take(session, 2)]), take(open_session(generator), 4))


# ---- pictures --------------------------------------------------------------------------------------------------------
def test_a_new_picture_is_a_cut_to_a_scene_of_its_own(some_generator):
    session = open_session(some_generator, seed=4)
    take(session, 4)
    session.image, session.prompt = OTHER, B
    scene = [session.next() for _ in range(3)]
    assert [len(chunk) for chunk in scene] == [1, 8, 8]
    assert (session.num_frames, session.position, session.scene) == (25 + 17, 5, 1)
    assert np.array_equal(session.image, OTHER)
    if some_generator.settings.guidance == 1 and some_generator.model.config.image_dim is not None:
        # Nothing of the past is left: a stream of its own, whose noise is that of video 1 of the seed.
        condition = encode_condition(some_generator.encoders, prepared(OTHER), [B])
        latents = student_latents(
            some_generator.denoiser,
            condition,
            condition.frames[:, :1, -4:],
            some_generator.plan,
            5,
            (4, 4),
            seed=4,
            videos=[1],
        )
        assert np.array_equal(np.concatenate(scene), to_frames(some_generator.encoders.vae.decode(latents)[0]))
    other_past = open_session(some_generator, C, seed=4)
    take(other_past, 2)
    other_past.prompt, other_past.image = B, OTHER
    assert np.array_equal(np.concatenate(scene), take(other_past, 3))


def test_a_cut_to_the_same_picture_is_another_take(generator):
    session = open_session(generator)
    first = take(session, 3)
    session.image = PICTURE
    second = take(session, 3)
    assert np.array_equal(first[0], second[0]) and not np.array_equal(first[1:], second[1:])


def test_a_target_changes_clip_tokens_and_the_tail_of_y(generator):
    """As if the condition made of both pictures had been rebuilt from, with the same kept latents."""
    session = open_session(generator)
    before = take(session, 3)
    assert session.image_target is None
    session.image_target = OTHER
    assert np.array_equal(session.image_target, OTHER) and np.array_equal(session.image, PICTURE)
    after = take(session, 1)
    own, other = (encode_condition(generator.encoders, prepared(image), [A]) for image in (PICTURE, OTHER))
    mixed = Condition(own.text, other.image, torch.cat([own.frames[:, :1], other.frames[:, 1:]], 1))
    rules, noise = generator.plan, stream_noise(0, [0], 4, (4, 4), "cpu")
    latents = student_latents(generator.denoiser, own, own.frames[:, :1, -4:], rules, 5, (4, 4), seed=0, videos=[0])
    cache = generator.model.new_cache(rules, 1, (4, 4))
    for start, end in rules.blocks(0, 5):
        commit_block(generator.denoiser, cache, mixed, latents[:, start:end])
    with torch.no_grad():
        block = denoise_block(generator.denoiser, cache, mixed, lambda k: noise(5, 7, k), rules).clean
    expected = to_frames(generator.encoders.vae.decode(torch.cat([latents, block], 1))[0])
    assert np.array_equal(np.concatenate([before, after]), expected)
    assert session.num_frames == 25 and session.scene == 0  # no cut


def test_a_target_that_goes_leaves_the_scenes_own_picture(generator):
    session, plain = open_session(generator), open_session(generator)
    take(session, 3), take(plain, 3)
    session.image_target = OTHER
    session.image_target = None
    assert np.array_equal(take(session, 1), take(plain, 1))
    session.image_target = OTHER
    assert not np.array_equal(take(session, 1), take(plain, 1))
    session.image = OTHER
    assert session.image_target is None
    session.next()
    session.image_target = PICTURE  # at once with the first block of a scene
    assert session.next().shape == (8, 32, 32, 3)


def test_a_target_from_the_first_frame_on(generator):
    early, late = open_session(generator), open_session(generator)
    early.image_target = OTHER
    frames = take(early, 3)
    first = late.next()
    late.image_target = OTHER
    assert np.array_equal(frames, np.concatenate([first, take(late, 2)]))


def test_weights_without_clip_tokens_take_no_target():
    session = open_session(make_generator(**KINDS["no y, no sink"]))
    with pytest.raises(ConfigError, match="these weights have none"):
        session.image_target = OTHER


# ---- branches and ways back ------------------------------------------------------------------------------------------
def memory_of(session):
    stream = session.state.stream
    tensors = [t for cache in stream.caches for t in (cache.keys, cache.values)]
    tensors += [t for cache in stream.caches for kept in cache._cross.values() for t in kept]
    tensors += [held for cache in stream.caches for held in cache._indices.values()]
    return {t.data_ptr() for t in tensors}


def test_a_fork_goes_on_alike_and_leaves_the_other_alone(some_generator):
    session = open_session(some_generator, history_blocks=2)
    expected = take(open_session(some_generator), 7)
    made = [take(session, 4)]
    branch, other = session.fork(), session.fork()
    assert not memory_of(session) & memory_of(branch)
    other.prompt = B
    changed = take(other, 3)
    assert np.array_equal(take(branch, 3), expected[-24:])
    assert np.array_equal(np.concatenate([*made, take(session, 3)]), expected)
    assert not np.array_equal(changed, expected[-24:])
    branch.rewind(2)
    other.image = OTHER
    assert np.array_equal(take(branch, 2), expected[-16:]) and len(other.next()) == 1
    assert session.num_frames == 49 and session.prompt == A


def test_a_fork_carries_the_history_and_what_was_asked_for(generator):
    session = open_session(generator, history_blocks=3)
    take(session, 5)
    session.prompt = B
    branch = session.fork()
    assert branch.prompt == B and branch.rewindable == 3
    expected = take(session, 1)
    assert np.array_equal(branch.next(), expected)
    branch.rewind(3)
    assert branch.prompt == A and np.array_equal(take(session, 1).shape, (8, 32, 32, 3))
    assert np.array_equal(take(branch, 2), take(open_session(generator), 5)[-16:])


@pytest.mark.parametrize(
    ("kind", "history_blocks", "num_blocks"),
    [("plain", 1, 8), ("plain", 4, 10), ("plain", 8, 4), *((kind, 3, 7) for kind in list(KINDS)[1:])],
)
def test_a_rewound_session_makes_the_same_frames_again(kind, history_blocks, num_blocks):
    any_generator = make_generator(**KINDS[kind])
    expected = take(open_session(any_generator), num_blocks)
    session = open_session(any_generator, history_blocks=history_blocks)
    assert np.array_equal(take(session, num_blocks), expected)
    most = min(history_blocks, num_blocks)
    assert session.rewindable == most
    session.rewind(most)
    left = num_blocks - most
    assert session.num_frames == (0 if left == 0 else 8 * left - 7) and session.rewindable == 0
    again = take(session, most)
    assert np.array_equal(again, expected[len(expected) - len(again) :])


def test_changes_are_taken_back_with_their_blocks(some_generator):
    session = open_session(some_generator, history_blocks=8)
    made = [session.next() for _ in range(4)]
    session.prompt = B
    made += [session.next() for _ in range(2)]
    session.image = OTHER
    made += [session.next() for _ in range(2)]
    session.rewind(2)
    assert session.prompt == B and session.scene == 0
    assert np.array_equal(session.image, first_picture(some_generator))
    more = session.next()  # without the cut
    session.rewind(1)
    session.image = OTHER
    assert all(np.array_equal(session.next(), chunk) for chunk in made[6:])
    session.rewind(2)
    assert np.array_equal(session.next(), more)
    session.rewind(3)
    assert session.prompt == A and session.num_frames == 25
    session.prompt = B
    assert all(np.array_equal(session.next(), chunk) for chunk in made[4:6])
    session.rewind(4)
    assert all(np.array_equal(session.next(), chunk) for chunk in made[2:4])


def test_what_cannot_be_taken_back_is_refused(generator):
    session = open_session(generator, history_blocks=2)
    take(session, 4)
    for number in (0, 3, -1):
        with pytest.raises(ConfigError, match=r"2 blocks can be taken back now, and never more than history_blocks=2"):
            session.rewind(number)
    with pytest.raises(ConfigError, match="never more than history_blocks=0"):
        open_session(generator).rewind(1)


def test_any_way_to_a_point_gives_what_the_straight_way_gives(any_generator, tmp_path):
    """Random blocks, changes, forks, ways back and files; then a new session with the changes that still count."""
    draw = random.Random(1)
    session = open_session(any_generator, history_blocks=3)
    target = any_generator.model.config.image_dim is not None
    log: list[dict] = []  # for each block, what was asked for before it
    asked: dict = {}
    chunks: list[np.ndarray] = []
    for _ in range(26):
        choice = draw.choice(["next"] * 5 + ["prompt", "image", "target", "fork", "rewind", "save"])
        if choice == "next" and len(log) < 12:
            chunks.append(session.next())
            log.append(asked)
            asked = {}
        elif choice == "prompt":
            session.prompt = asked["prompt"] = draw.choice([A, B, C])
        elif choice == "image":
            asked.pop("image_target", None)
            pictures = [PICTURE, OTHER] if any_generator.beginning.needed else [PICTURE, OTHER, None]
            session.image = asked["image"] = draw.choice(pictures)
        elif choice == "target" and target:
            asked["image_target"] = session.image_target = draw.choice([PICTURE, OTHER, None])
        elif choice == "fork":
            left, session = session, session.fork()
            left.prompt = C
            left.next()
        elif choice == "rewind" and session.rewindable:
            number = draw.randint(1, session.rewindable)
            session.rewind(number)
            del log[-number:], chunks[-number:]
            asked = {}
        elif choice == "save":
            session.save(tmp_path / "s.safetensors")
            session = any_generator.resume(tmp_path / "s.safetensors", history_blocks=3)
    straight = open_session(any_generator)
    for changes, chunk in zip(log, chunks, strict=True):
        for name, value in changes.items():
            setattr(straight, name, value)
        assert np.array_equal(straight.next(), chunk)
    assert straight.num_frames == session.num_frames
