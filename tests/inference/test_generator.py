"""The generator over a checkpoint made by the real save code: what is loaded, what is streamed, what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_stage import save_student, stage_config

from longtake import Generator
from longtake.condition import pixel_frames
from longtake.encoders.bundle import Encoders, ImageEncoder
from longtake.encoders.condition import encode_condition, prepare_image
from longtake.errors import CheckpointError, ConfigError, DataError
from longtake.inference.frames import Fetched, Frames, to_frames
from longtake.inference.generator import generate_file
from longtake.inference.sampling import stream_noise, student_latents
from longtake.inference.session import Session
from longtake.inference.source import NotAStudentError, Source
from longtake.inference.video_io import read_video
from longtake.parallel.mesh import Mesh
from longtake.run_folder import exported_weights, find_checkpoint
from longtake.toy.world import sample_world
from longtake.train.stage import run_stage

WORLD = sample_world(3, 0)
PICTURE = WORLD.render(1)[0]


@pytest.fixture(scope="module")
def run(workshop, tmp_path_factory):
    """A log folder with a causal and a distilled student; the stages' names are not those of their kinds."""
    logdir = tmp_path_factory.mktemp("log")
    save_student(stage_config(workshop, logdir, "causal", name="z_start"), seed=5)
    save_student(stage_config(workshop, logdir, "distill", name="final", init_from="z_start"), seed=6)
    return logdir


@pytest.fixture(scope="module")
def generator(run):
    return Generator.from_run(run, "cpu")


@pytest.fixture(scope="module")
def video(generator):
    """25 frames with seed 0."""
    return frames_of(generator, num_frames=25)


@pytest.fixture(scope="module")
def other_video(generator):
    """17 frames with seed 1."""
    return frames_of(generator, seed=1)


def frames_of(generator, *, image=PICTURE, prompt=WORLD.caption, num_frames=17, seed=0):
    return np.concatenate(list(generator.stream(image, prompt, num_frames=num_frames, seed=seed)))


# ---- what is loaded --------------------------------------------------------------------------------------------------
def test_a_log_folder_gives_its_last_stage_and_the_average(run, generator):
    assert generator.config.name == "final" and generator.fps == 16
    path = find_checkpoint(run)
    assert path == run / "final" / "checkpoints" / "step_000001"
    assert exported_weights(path).name == "generator_ema"
    average, weights = (load_file(path / name / "model.safetensors") for name in ("generator_ema", "generator"))
    state = generator.model.state_dict()
    assert all(torch.equal(state[key], average[key]) for key in average)
    assert any(not torch.equal(average[key], weights[key]) for key in average)
    assert not generator.model.training and not any(p.requires_grad for p in generator.model.parameters())


def test_a_stage_folder_and_a_checkpoint_give_themselves(run):
    assert Generator.from_run(run / "z_start", "cpu").config.objective.kind == "teacher_forcing"
    assert find_checkpoint(run / "final" / "checkpoints" / "step_000001").name == "step_000001"


def test_without_an_average_the_weights_are_taken(workshop, tmp_path):
    taken = save_student(stage_config(workshop, tmp_path, "causal"), ema=False)
    state = Generator.from_run(str(tmp_path), "cpu").model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in taken.state_dict().items())


def test_the_newest_checkpoint_wins_and_rules_come_with_it(workshop, tmp_path):
    config = stage_config(workshop, tmp_path, "causal", rope="absolute")
    save_student(config, seed=1, step=9)
    save_student(config, seed=2, step=10)
    loaded = Generator.from_run(tmp_path, "cpu")
    assert find_checkpoint(tmp_path).name == "step_000010"
    rules = loaded.plan
    assert rules.rope == "absolute" and rules.window_frames == 5 and rules.sink_frames == 1
    assert list(rules.blocks(0, 5)) == [(0, 1), (1, 3), (3, 5)]
    assert rules.sigmas == pytest.approx([1.0, 0.75])


def test_encoders_work_as_they_did_in_training(workshop, tmp_path, run):
    model = {"clip_preprocess": "diffusers", "text_precision": "bf16"}
    save_student(stage_config(workshop, tmp_path, "causal", model=model))
    encoders, plain = (Generator.from_run(folder, "cpu").encoders for folder in (tmp_path, run))
    assert encoders.text.model.dtype == torch.bfloat16 and plain.text.model.dtype == torch.float32
    wide = torch.rand(1, 3, 48, 96) * 2 - 1
    folder = workshop / "encoders" / "image_encoder"
    for found, preprocess in ((encoders, "diffusers"), (plain, "original")):
        expected = ImageEncoder.load(folder, preprocess=preprocess).encode(wide)
        assert torch.equal(found.image.encode(wide), expected)
    assert not torch.equal(encoders.image.encode(wide), plain.image.encode(wide))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nothing", "does not exist; give a log folder"),
        (lambda folder: folder, "holds no complete checkpoint of a student"),
        (lambda folder: (folder / "checkpoints").mkdir() or folder, "holds no complete checkpoint"),
    ],
)
def test_a_wrong_folder_is_refused(make, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        Generator.from_run(make(tmp_path))


def test_a_teacher_cannot_stream(workshop, tmp_path):
    save_student(stage_config(workshop, tmp_path, "teacher"))
    with pytest.raises(NotAStudentError, match="bidirectional teacher, which cannot stream"):
        Generator.from_run(tmp_path / "teacher", "cpu")
    with pytest.raises(CheckpointError, match="holds no complete checkpoint of a student"):
        Generator.from_run(tmp_path, "cpu")


# ---- what is streamed ------------------------------------------------------------------------------------------------
def test_chunks_are_one_frame_and_then_blocks(generator):
    chunks = list(generator.stream(PICTURE, WORLD.caption, num_frames=25))
    assert [chunk.shape for chunk in chunks] == [(n, 64, 64, 3) for n in (1, 8, 8, 8)]
    assert all(chunk.dtype == np.uint8 for chunk in chunks)


def test_blocks_of_four_latents_make_chunks_of_sixteen(workshop, tmp_path):
    plan = {"block_frames": 4, "window_frames": 9, "sink_frames": 1}
    video = {"height": 64, "width": 64, "num_latent_frames": 9}
    save_student(stage_config(workshop, tmp_path, "causal", plan=plan, video=video))
    chunks = Generator.from_run(tmp_path, "cpu").stream(PICTURE, WORLD.caption)
    assert [len(next(chunks)) for _ in range(3)] == [1, 16, 16]  # without a length: for ever


@pytest.mark.parametrize("num_frames", [1, 10, 20])
def test_whole_blocks_are_generated_and_the_last_is_cut(generator, video, num_frames):
    assert np.array_equal(frames_of(generator, num_frames=num_frames), video[:num_frames])
    assert len(video) == 25


def test_other_seed_other_frames_after_the_same_picture(video, other_video):
    assert np.array_equal(video[0], other_video[0])
    assert all((a != b).any() for a, b in zip(video[1:], other_video[1:]))


def test_two_streams_at_once_do_not_mix(generator, video, other_video):
    a, b = (generator.stream(PICTURE, WORLD.caption, num_frames=17, seed=seed) for seed in (0, 1))
    pairs = list(zip(a, b, strict=True))
    assert np.array_equal(np.concatenate([x for x, _ in pairs]), video[:17])
    assert np.array_equal(np.concatenate([y for _, y in pairs]), other_video)


def test_a_block_ahead_of_what_is_fetched_gives_the_same_frames(generator, video, monkeypatch):
    order = []
    begin = Session.begin
    monkeypatch.setattr(Session, "begin", lambda self: order.append("begin") or begin(self))
    for ahead, wanted in ((False, "bfbfbf"), (True, "bbfffbf")):
        order.clear()
        chunks = []
        for chunk in generator.stream(PICTURE, WORLD.caption, num_frames=17, ahead=ahead):
            order.append("fetch")
            chunks.append(chunk)
        assert np.array_equal(np.concatenate(chunks), video[:17])
        assert "".join(what[0] for what in order) == wanted


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_frames_are_here_before_the_work_that_is_queued_behind_them():
    """Waiting for a block must not be waiting for the next one's decoding: the two overlap no more then."""

    def blocks():
        for number in range(3):
            yield Frames(torch.full((2, 3, 4, 4), number / 127.5 - 1, device="cuda"))
            torch.cuda._sleep(2_000_000_000)  # the next block's work, half a second and more

    chunks = Fetched(blocks(), ahead=True)
    for number, chunk in enumerate(chunks):
        assert (chunk == number).all()
        assert number == 2 or not torch.cuda.current_stream().query()


def test_a_second_device_decodes_with_a_copy_of_the_vae(run, video, tmp_path, monkeypatch):
    from longtake.encoders.wan_vae import WanDecoder

    generator = Generator.build(Source.of_run(run), "cpu", decode_device="cpu")
    decode, calls = WanDecoder.__call__, []

    def counted(self, *args, **options):
        calls.append("copy" if self is generator.decoder.network else "own")
        return decode(self, *args, **options)

    monkeypatch.setattr(WanDecoder, "__call__", counted)
    assert np.array_equal(frames_of(generator), video[:17]) and set(calls) == {"copy"}
    session = generator.open(PICTURE, WORLD.caption)
    first = [session.next() for _ in range(2)]
    session.save(tmp_path / "saved")
    assert np.array_equal(np.concatenate(first), video[: sum(map(len, first))])
    calls.clear()
    assert np.array_equal(generator.resume(tmp_path / "saved").next(), session.next()) and set(calls) == {"copy"}
    for name in ("nowhere", "cuda:9"):
        with pytest.raises(ConfigError, match=f"decode_device={name} cannot be used"):
            Generator.build(Source.of_run(run), "cpu", decode_device=name)
    with pytest.raises(ConfigError, match="is for one process; processes that share"):
        Generator.build(Source.of_run(run), "cpu", decode_device="cpu", split=object())


def latents_of(generator, seeds_of_videos, num_frames=5):
    images = torch.from_numpy(np.stack([PICTURE] * len(seeds_of_videos))).permute(0, 3, 1, 2).float() / 127.5 - 1
    condition = encode_condition(generator.encoders, images, [WORLD.caption] * len(seeds_of_videos))
    picture = condition.frames[:, :1, -generator.encoders.vae.latent_channels :]
    return student_latents(
        generator.denoiser,
        condition,
        picture,
        generator.plan,
        num_frames,
        (8, 8),
        seed=0,
        videos=seeds_of_videos,
    )


def test_streamed_frames_equal_the_one_shot_decode_of_the_same_latents(generator, video):
    at_once = to_frames(generator.encoders.vae.decode(latents_of(generator, [0], 7))[0])
    assert len(video) == pixel_frames(7) and np.abs(video.astype(int) - at_once).max() <= 1


def test_a_videos_noise_does_not_depend_on_its_batch(generator):
    together = latents_of(generator, [7, 3])
    for k, number in enumerate((7, 3)):
        torch.testing.assert_close(latents_of(generator, [number])[0], together[k], rtol=0, atol=1e-4)
    assert (together[0, 1:] - together[1, 1:]).abs().mean() > 0.1  # same picture and prompt, another seed
    noise = stream_noise(0, [7, 3], 4, (2, 2), "cpu")
    assert not torch.equal(*noise(1, 3, 0))
    assert torch.equal(noise(1, 3, 0)[1], stream_noise(0, [3], 4, (2, 2), "cpu")(1, 3, 0)[0])
    parts = [noise(1, 3, 0), noise(1, 3, 1), noise(3, 5, 0), stream_noise(1, [7, 3], 4, (2, 2), "cpu")(1, 3, 0)]
    assert len({part.flatten()[0].item() for part in parts}) == 4


def test_latents_are_cut_from_whole_blocks(generator):
    assert torch.equal(latents_of(generator, [0], 4), latents_of(generator, [0], 5)[:, :4])


def test_the_first_frame_is_the_given_picture_through_the_vae(generator):
    vae = generator.encoders.vae
    picture = prepare_image(PICTURE, 64, 64)
    expected = to_frames(vae.decode(vae.encode(picture[None, None]))[0])
    assert np.abs(frames_of(generator, num_frames=1).astype(int) - expected).max() <= 1


def test_a_student_that_keeps_every_frame_needs_a_length(workshop, tmp_path):
    plan = {"block_frames": 2, "window_frames": None, "sink_frames": 0}
    save_student(stage_config(workshop, tmp_path, "causal", plan=plan))
    keeps = Generator.from_run(tmp_path, "cpu")
    assert len(frames_of(keeps, num_frames=30)) == 30
    with pytest.raises(ConfigError, match="needs num_frames"):
        keeps.stream(PICTURE, WORLD.caption)


# ---- pictures and prompts --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(200, 90), (31, 77)])
def test_a_picture_of_any_size_is_cropped_and_never_stretched(generator, size):
    """A disc stays a disc: the frame that the model gets has the aspect of the middle of the picture."""
    width, height = size
    rows, columns = np.mgrid[:height, :width]
    radius = min(size) / 4
    disc = (rows - height / 2 + 0.5) ** 2 + (columns - width / 2 + 0.5) ** 2 < radius**2
    image = np.repeat((255 * disc[..., None]).astype(np.uint8), 3, 2)
    seen = prepare_image(image, 64, 64)[0] > 0
    assert seen.any(0).sum() == pytest.approx(32, abs=3) and seen.any(1).sum() == pytest.approx(32, abs=3)
    (chunk,) = generator.stream(image, "a red circle drifts to the right", num_frames=1)
    assert chunk.shape == (1, 64, 64, 3)


def test_a_path_a_pil_image_and_an_array_are_the_same_picture(generator, video, tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(PICTURE).save(file)
    for image in (file, str(file), Image.open(file)):
        assert np.array_equal(frames_of(generator, image=image, num_frames=9), video[:9])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": "no/such.png"}, DataError, "no/such.png"),
        ({"image": np.zeros((4, 4), np.float32)}, DataError, "float32"),
        ({"prompt": ""}, ConfigError, "prompt is empty"),
        ({"prompt": "  \n"}, ConfigError, "prompt is empty"),
        ({"prompt": None}, ConfigError, "the prompt is None and no text"),
        ({"seed": 1.5}, ConfigError, "seed=1.5 must be a whole number, at least 0 and below 2.63"),
        ({"seed": "x"}, ConfigError, "seed='x' must be a whole number"),
        ({"num_frames": 0}, ConfigError, "num_frames=0 must be at least 1"),
        ({"num_frames": -3}, ConfigError, "num_frames=-3"),
    ],
)
def test_bad_requests_are_refused_before_any_work(generator, change, error, message, monkeypatch):
    monkeypatch.setattr(Generator, "begin_condition", lambda *_: pytest.fail("work was done"))
    request = {"image": PICTURE, "prompt": "a red circle drifts", "num_frames": 9} | change
    image, prompt = request.pop("image"), request.pop("prompt")
    with pytest.raises(error, match=message):
        generator.stream(image, prompt, **request)  # not even one frame is asked for


def test_a_file_that_is_no_picture_leaves_no_video(run, tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG no")
    with pytest.raises(DataError, match="a.png"):
        generate_file(run, tmp_path / "a.png", "a red circle drifts", tmp_path / "out.mp4", device="cpu")
    assert not (tmp_path / "out.mp4").exists()


def test_text_and_picture_are_used(generator, video):
    for change in ({"prompt": "a green square climbs quickly"}, {"image": 255 - PICTURE}):
        assert not np.array_equal(video[1:9], frames_of(generator, num_frames=9, **change)[1:])


# ---- files -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("length", "expected"), [({}, 17), ({"num_frames": 11}, 11), ({"seconds": 1.25}, 20)])
def test_a_file_has_the_length_that_was_asked_for(run, tmp_path, length, expected):
    image, output = tmp_path / "a.png", tmp_path / "out.mp4"
    Image.fromarray(PICTURE).save(image)
    report = generate_file(run, image, WORLD.caption, output, device="cpu", **length)
    assert report.num_frames == expected and read_video(output)[0].shape == (expected, 64, 64, 3)
    assert 0 < report.first_frame_seconds <= report.seconds
    assert f"{expected} frames in" in str(report) and "frames/s" in str(report)


def test_encoders_come_from_the_runs_configuration(workshop, generator):
    ours = Encoders.load(workshop / "encoders").text.encode([WORLD.caption])
    assert torch.equal(generator.encoders.text.encode([WORLD.caption]), ours)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_frames_that_are_not_finite_are_an_error_and_not_black(generator, value, monkeypatch):
    from longtake.encoders.sessions import DecoderSession

    decode, calls = DecoderSession.decode, []

    def broken(self, latents):
        calls.append(latents)
        video = decode(self, latents).clone()
        if len(calls) == 4:
            video[0, 5, 1, 2, 3] = value
        return video

    monkeypatch.setattr(DecoderSession, "decode", broken)
    for ahead in (False, True):
        calls.clear()
        made = []
        with pytest.raises(DataError, match="frames 10 to 17 are not finite"):
            made.extend(generator.stream(PICTURE, "a red circle", num_frames=33, ahead=ahead))
        assert sum(map(len, made)) in (0, 9)


def test_devices_and_sizes_without_sense_are_refused(generator, tmp_path, monkeypatch):
    for name in ("gpu", "cuda:99", "meta", "cpu:7", ""):
        with pytest.raises(ConfigError, match=f"device={name} cannot be used"):
            Generator.build(Source(tmp_path, tmp_path, generator.settings), name)
    monkeypatch.setattr("longtake.inference.pipeline.memory_bytes", lambda _: 1000)
    with pytest.raises(ConfigError, match="lower the size, the window or the length"):
        next(generator.stream(PICTURE, "a red circle", num_frames=9))


def test_a_run_of_an_earlier_version_is_refused_with_what_to_do(workshop, tmp_path):
    config = stage_config(workshop, tmp_path, "causal")
    save_student(config)
    file = next((config.folder / "checkpoints").glob("*/manifest.json"))
    manifest = json.loads(file.read_text())
    values = {key: value for key, value in manifest["config"].items() if key != "objective"}
    file.write_text(json.dumps(manifest | {"config": values | {"stage": "causal"}}))
    for place in (config.folder, tmp_path):
        with pytest.raises(CheckpointError, match="written by another version.*a kind, and no objective.*--config"):
            Source.of_run(place)
    run_stage(
        stage_config(workshop, tmp_path, "distill", init_from=str(file.parent / "generator"), max_steps=1), Mesh()
    )
