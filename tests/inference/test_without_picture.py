"""Videos from a prompt alone: text-to-video weights, those that take both, pictures zero-shot, and what is refused."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny_models import TINY
from tiny_sessions import OTHER, PICTURE, A, B, make_generator, take
from tiny_stage import make_encoders, make_model, save_encoders, stage_tree
from tiny_wan import T2V
from typer.testing import CliRunner

from longtake.cli.app import app
from longtake.condition import Condition
from longtake.config.generation import GenerationConfig
from longtake.encoders.condition import prepare_image
from longtake.errors import ConfigError
from longtake.inference.beginning import Beginning
from longtake.inference.cues import Cue
from longtake.inference.frames import to_frames
from longtake.inference.sampling import student_latents, teacher_latents
from longtake.inference.script import Story, read_story
from longtake.inference.video_io import read_video
from longtake.models.sizes import DiTConfig
from longtake.weights.load import save_dit

# Blocks [3, 2, 2, ...] of weights that know text alone: 9 frames, then 8 at a time.
PLAN = {"block_frames": 2, "first_frames": 3, "window_frames": 7, "sink_frames": 3}
ALONE = {"_y": False, "picture": "none", "plan": PLAN}
STILL, FRAME = (
    {**ALONE, "picture": "still"},
    {**ALONE, "picture": "frame", "plan": {**PLAN, "window_frames": 6, "sink_frames": 0}},
)


@torch.no_grad()
def expected(generator, prompt, num_frames, first=None, plan=None, seed=0, scene=0):
    """Frames of the latents that `student_latents`, which knows no session, makes from `first` latents on."""
    condition = Condition(generator.encoders.text.encode([prompt]))
    latents = student_latents(
        generator.denoiser, condition, first, plan or generator.plan, num_frames, (4, 4), seed=seed, videos=[scene]
    )
    return to_frames(generator.encoders.vae.decode(latents)[0])


def encoded(generator, picture, num_pixels=1):
    video = prepare_image(picture, 32, 32)[None, None].expand(-1, num_pixels, -1, -1, -1)
    return generator.encoders.vae.encode(video)


# ---- streams ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("window", [7, None])
def test_the_first_block_is_generated(window, guidance):
    plan = {**PLAN, "window_frames": window, "sink_frames": 3 if window else 0}
    generator = make_generator(**{**ALONE, "plan": plan, "guidance": guidance})
    chunks = list(generator.stream(prompt=A, num_frames=41, seed=2))
    assert [len(chunk) for chunk in chunks] == [9, 8, 8, 8, 8]
    if guidance == 1:
        assert np.array_equal(np.concatenate(chunks), expected(generator, A, 11, seed=2))
    session = generator.open(prompt=A, seed=2, max_frames=41)
    assert session.image is None and np.array_equal(take(session, 5), np.concatenate(chunks))
    assert (session.position, session.num_frames, session.image) == (11, 41, None)
    if window is None:
        with pytest.raises(ConfigError, match="scenes of 11 latent frames, which have been made"):
            session.next()


def test_a_session_without_a_picture_is_forked_rewound_saved_and_changed(tmp_path):
    generator = make_generator(**ALONE)
    straight = take(generator.open(prompt=A, seed=3), 6)
    session = generator.open(prompt=A, seed=3, history_blocks=3)
    take(session, 4)
    branch = session.fork()
    branch.prompt = B
    switched = take(branch, 2)
    branch.save(tmp_path / "s")
    assert np.array_equal(take(make_generator(**ALONE).resume(tmp_path / "s"), 2), take(branch, 2))
    assert np.array_equal(take(session, 2), straight[-16:]) and not np.array_equal(switched, straight[-16:])
    session.rewind(3)
    assert np.array_equal(take(session, 3), straight[-24:])
    session.rewind(3)
    session.image = None  # a cut to a scene of the prompt alone, with noise of its own
    assert np.array_equal(take(session, 2), expected(generator, A, 5, seed=3, scene=1)) and session.scene == 1


def test_weights_that_take_both_begin_either_way():
    generator = make_generator(_y=False)  # TI2V: blocks [1, 2, 2]
    assert generator.beginning.picture == "trained" and not generator.beginning.needed
    assert np.array_equal(take(generator.open(prompt=A), 3), expected(generator, A, 5))
    given = take(generator.open(PICTURE, A), 3)
    assert np.array_equal(given, expected(generator, A, 5, encoded(generator, PICTURE)))
    wide = make_generator(
        _y=False, plan={**PLAN, "window_frames": 6, "sink_frames": 0}
    )  # [3, 2, 2], and with a picture [1, 2, 2]
    assert [len(chunk) for chunk in wide.stream(prompt=A, num_frames=25)] == [9, 8, 8]
    plan = wide.plan.but(first_frames=1)
    assert np.array_equal(take(wide.open(PICTURE, A), 3), expected(wide, A, 5, encoded(wide, PICTURE), plan))
    session = wide.open(prompt=A)
    take(session, 2)
    session.image = PICTURE
    assert [len(session.next()) for _ in range(2)] == [1, 8]


def test_a_whole_clip_from_a_prompt_alone():
    generator = make_generator(**{**ALONE, "sampler": "whole"})
    condition = Condition(generator.encoders.text.encode([A]))
    with torch.no_grad():
        latents = teacher_latents(
            generator.model,
            condition,
            condition.text,
            3,
            (4, 4),
            seed=4,
            videos=[0],
            num_steps=2,
            shift=3.0,
            guidance=1,
        )
        clip = to_frames(generator.encoders.vae.decode(latents)[0])
    assert np.array_equal(next(generator.stream(prompt=A, num_frames=9, seed=4)), clip)
    with pytest.raises(ConfigError, match="text-to-video weights"):
        generator.stream(PICTURE, A, num_frames=9)


# ---- pictures that the weights do not know ---------------------------------------------------------------------------
def test_a_still_first_block():
    generator = make_generator(**STILL)
    made = take(generator.open(PICTURE, A, seed=1), 4)
    assert np.array_equal(made, expected(generator, A, 9, encoded(generator, PICTURE, 9), seed=1))
    assert np.array_equal(take(generator.open(prompt=A), 2), expected(generator, A, 5))


def test_a_clean_first_latent(tmp_path):
    generator = make_generator(**FRAME)
    plan = generator.plan.but(first_frames=1)
    session = generator.open(PICTURE, A)
    made = take(session, 4)
    assert np.array_equal(made, expected(generator, A, 7, encoded(generator, PICTURE), plan))
    session.save(tmp_path / "s")
    assert np.array_equal(take(generator.resume(tmp_path / "s"), 2), take(session, 2))
    with pytest.raises(
        ConfigError, match=r"first has 3 frames: sink_frames=3 .*; or take the picture as picture=still"
    ):
        plan = {"block_frames": 3, "first_frames": 3, "window_frames": 9, "sink_frames": 3}
        make_generator(**{**FRAME, "plan": plan}).open(PICTURE, A)


def test_zero_shot_is_said():
    for rules, said in ((STILL, "stands still"), (FRAME, "clean first latent")):
        beginning = make_generator(**rules).beginning
        note = beginning.zero_shot(given=True)
        assert note is not None and note.startswith("zero-shot image-to-video") and said in note
        assert beginning.zero_shot(given=False) is None
    for rules in ({}, {"_y": False}, ALONE):
        assert make_generator(**rules).beginning.zero_shot(given=True) is None


# ---- what is refused -------------------------------------------------------------------------------------------------
def test_a_picture_is_never_ignored_and_a_missing_one_never_made_up():
    alone, i2v = make_generator(**ALONE), make_generator()
    refusal = "text-to-video weights, which take no picture; leave it out, or .* picture=frame .* or picture=still"
    for wrong in (
        lambda: alone.stream(PICTURE, A, num_frames=9),
        lambda: alone.open(PICTURE, A),
        lambda: setattr(alone.open(prompt=A), "image", PICTURE),
        lambda: Story(None, A, 30, 0, None, (Cue(9, None, OTHER, None),)).open(alone),
    ):
        with pytest.raises(ConfigError, match=refusal):
            wrong()
    for wrong in (
        lambda: i2v.stream(prompt=A, num_frames=9),
        lambda: setattr(i2v.open(PICTURE, A), "image", None),
        lambda: Story(None, A, 30, 0, None, ()).open(i2v),
    ):
        with pytest.raises(
            ConfigError, match="image-to-video weights, and there is no picture; give one: --image FILE"
        ):
            wrong()
    with pytest.raises(ConfigError, match="prompt is empty"):
        alone.stream(num_frames=9)


def test_rules_that_weights_cannot_follow():
    sizes = DiTConfig(**TINY, in_channels=12, model_type="i2v")
    with pytest.raises(ConfigError, match="picture=still is for weights that know text alone.*8 channels of y"):
        Beginning.of(sizes, GenerationConfig(picture="still"))
    plan = {"block_frames": 2, "first_frames": 3, "window_frames": 7, "sink_frames": 3}
    with pytest.raises(ConfigError, match="plan.first_frames=3 must be 1 for image-to-video weights"):
        Beginning.of(sizes, GenerationConfig.from_tree({"plan": plan}))
    assert Beginning.of(DiTConfig(**TINY, in_channels=4), GenerationConfig()).picture == "none"
    assert Beginning.of(DiTConfig(**TINY, in_channels=4, model_type="ti2v"), GenerationConfig()).picture == "trained"


# ---- scripts ---------------------------------------------------------------------------------------------------------
def test_a_script_without_a_picture(tmp_path):
    (tmp_path / "s.yaml").write_text(
        yaml.safe_dump({"prompt": A, "frames": 33, "events": [{"frame": 12, "prompt": B}]})
    )
    generator = make_generator(**ALONE)
    story = read_story(tmp_path / "s.yaml", generator.settings)
    assert story.files == () and story.begins == [False]
    made = list(story.play(story.open(generator)))
    session = generator.open(prompt=A)
    by_hand = take(session, 2)
    session.prompt = B
    assert [len(chunk) for chunk in made] == [9, 8, 8, 8]
    assert np.array_equal(np.concatenate(made), np.concatenate([by_hand, take(session, 2)]))


def test_events_are_due_where_the_blocks_are():
    generator, never = (
        make_generator(**ALONE),
        "never shows: it takes effect where a block begins, and the last does at",
    )
    Story(None, A, 20, 0, None, (Cue(9, B, None, None),)).open(generator)
    with pytest.raises(ConfigError, match=f"{never} frame 9 of 17"):
        Story(None, A, 17, 0, None, (Cue(10, B, None, None),)).open(generator)
    still = make_generator(**STILL)  # a cut shows its picture for 9 frames
    with pytest.raises(ConfigError, match=f"{never} frame 17 of 26"):
        Story(None, A, 26, 0, None, (Cue(12, None, OTHER, None), Cue(18, B, None, None))).open(still)


# ---- the whole way ---------------------------------------------------------------------------------------------------
def command(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A text-to-video student, trained by `longtake train` from prompts for one step."""
    folder = tmp_path_factory.mktemp("text")
    save_encoders(make_encoders(), folder / "encoders")
    save_dit(T2V, make_model(T2V).state_dict(), folder / "teacher")
    (folder / "prompts.txt").write_text(f"{A}\n{B}\n")
    tree = stage_tree(folder, folder / "log", "distill", max_steps=1, save_every=1, batch_size=2, micro_batch_size=1)
    tree |= {
        "model": {"image_condition": "t2v"},
        "plan": {"block_frames": 2, "first_frames": 3, "window_frames": 6, "sink_frames": 0},
        "video": {"height": 32, "width": 32, "num_latent_frames": 5},
        "data": {"path": str(folder / "prompts.txt"), "kind": "texts", "num_workers": 0},
    }
    (folder / "stage.yaml").write_text(yaml.safe_dump(tree))
    result = command("train", folder / "stage.yaml")
    assert result.exit_code == 0, result.output
    Image.fromarray(PICTURE).save(folder / "picture.png")
    return folder


def test_a_trained_text_to_video_student_is_generated_from_exported_and_played(run, tmp_path):
    here = ("--device", "cpu", "--prompt", A, "--frames", 17)
    result = command("generate", "--run", run / "log", *here, "-o", tmp_path / "run.mp4")
    assert result.exit_code == 0 and "17 frames in" in result.output and "zero-shot" not in result.output, result.output
    assert len(read_video(tmp_path / "run.mp4")[0]) == 17
    assert command("export", run / "log", tmp_path / "student", "--dtype", "float32").exit_code == 0
    model = ("--model", tmp_path / "student", "--encoders", run / "encoders")
    result = command("generate", *model, *here, "-o", tmp_path / "model.mp4")
    assert result.exit_code == 0, result.output
    assert np.array_equal(read_video(tmp_path / "model.mp4")[0], read_video(tmp_path / "run.mp4")[0])
    result = command("generate", *model, *here, "-o", tmp_path / "p.mp4", "--image", run / "picture.png")
    assert result.exit_code == 2 and "text-to-video weights, which take no picture" in result.output
    assert len(result.output.strip().splitlines()) == 1 and not (tmp_path / "p.mp4").exists()
    picture = ("--image", run / "picture.png", "picture=still")
    result = command("generate", *model, *here, "-o", tmp_path / "still.mp4", *picture)
    assert result.exit_code == 0 and "zero-shot image-to-video" in result.output, result.output
    typed = [
        "play",
        *map(str, model),
        "--prompt",
        A,
        "-o",
        str(tmp_path / "play.mp4"),
        "--seconds",
        "2",
        "--device",
        "cpu",
    ]
    result = CliRunner().invoke(app, typed, input=f"{B}\n/image\n")
    assert result.exit_code == 0 and len(read_video(tmp_path / "play.mp4")[0]) == 32, result.output
    assert "zero-shot" not in result.output
    cut = [*typed, "picture=still", "--overwrite"]
    result = CliRunner().invoke(app, cut, input=f"/image {run / 'picture.png'}\n")
    assert result.exit_code == 0 and "zero-shot image-to-video" in result.output, result.output


@pytest.mark.parametrize("layout", ["lines", "objects", "folder"])
def test_many_videos_from_prompts_alone(run, layout, tmp_path):
    inputs = {"lines": tmp_path / "p.txt", "objects": tmp_path / "p.jsonl", "folder": tmp_path / "p"}[layout]
    if layout == "lines":
        inputs.write_text(f"{A}\n\n{B}\n")
    elif layout == "objects":
        inputs.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in (A, B)))
    else:
        inputs.mkdir()
        for name, prompt in zip("ab", (A, B)):
            (inputs / f"{name}.txt").write_text(prompt)
    options = ("--run", run / "log", "--inputs", inputs, "--frames", 9, "--device", "cpu")
    result = command("generate", *options, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    records = [json.loads(file.read_text()) for file in sorted((tmp_path / "out").glob("*.json"))]
    assert [(record["image"], record["prompt"]) for record in records] == [(None, A), (None, B)]
    videos = [file.read_bytes() for file in sorted((tmp_path / "out").glob("*.mp4"))]
    assert len(videos) == 2 and all(a != b for a, b in pairwise(videos))


def test_records_name_what_was_zero_shot(run, tmp_path):
    options = ("--run", run / "log", "--image", run / "picture.png", "--prompt", A, "--samples", 1, "--frames", 9)
    result = command("generate", *options, "--device", "cpu", "-o", tmp_path / "out", "picture=frame")
    assert result.exit_code == 0 and "zero-shot" in result.output, result.output
    (record,) = [json.loads(file.read_text()) for file in (tmp_path / "out").glob("*.json")]
    assert record["note"].startswith("zero-shot image-to-video") and record["settings"]["picture"] == "frame"
    result = command("generate", *options, "--device", "cpu", "-o", tmp_path / "none")
    assert result.exit_code == 1 and "bad pairs (1; all others are done)" in result.output
    assert "text-to-video weights" in result.output
