"""`generate --model`: weights of any layout, rules from YAML and options, guidance, bfloat16, memory."""

import gc
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny_plan import causal_layout
from tiny_stage import TEACHER, make_model, save_student, stage_config, stage_tree
from torch._subclasses.fake_tensor import FakeTensor
from typer.testing import CliRunner

from longtake import Generator
from longtake.cli.app import app
from longtake.config.generation import GenerationConfig, changes_of, generation_settings
from longtake.config.job import load_config
from longtake.errors import CheckpointError, ConfigError
from longtake.inference import pipeline
from longtake.inference.export import export
from longtake.inference.generator import Source
from longtake.inference.video_io import read_video
from longtake.rng import KeyedRNG
from longtake.toy.metrics import measure
from longtake.toy.world import sample_world
from longtake.weights.load import save_dit
from longtake.weights.names import to_diffusers_key

WORLD = sample_world(3, 0)
PICTURE = WORLD.render(1)[0]
RULES = {"height": 64, "width": 64, "num_latent_frames": 5, "steps": [1.0, 0.5], "shift": 3.0, "sampler": "stream"}
RULES["plan"] = {"block_frames": 2, "window_frames": 5, "sink_frames": 1}


def frames_of(generator, num_frames=9, **given):
    return np.concatenate(list(generator.stream(PICTURE, WORLD.caption, num_frames=num_frames, **given)))


@pytest.fixture(scope="module")
def models(workshop, tmp_path_factory):
    """The same weights in three layouts, each with the encoders where that layout has them, and as a run."""
    root = tmp_path_factory.mktemp("models")
    taken = save_student(stage_config(workshop, root / "run", "causal"), ema=False)
    state = taken.state_dict()
    save_dit(TEACHER, state, root / "original")
    shutil.copytree(workshop / "encoders", root / "original", dirs_exist_ok=True)
    renamed = {to_diffusers_key(key): value for key, value in state.items()}
    save_dit(TEACHER, renamed, root / "diffusers" / "transformer")
    shutil.copytree(workshop / "encoders", root / "diffusers", dirs_exist_ok=True)
    checkpoint = root / "run" / "causal" / "checkpoints" / "step_000001"
    shutil.copytree(checkpoint / "generator", root / "longtake" / "generator")
    shutil.copytree(workshop / "encoders", root / "encoders")  # beside `longtake`
    return root


def test_a_source_has_a_name_without_folders(models):
    assert Source.of_model("toy").name == "toy"
    assert Source.of_run(models / "run" / "causal").name == "run"
    assert Source(models / "original", models, GenerationConfig()).name == "original"


@pytest.mark.parametrize("layout", ["original", "diffusers", "longtake"])
def test_every_layout_gives_the_frames_of_the_run(models, layout):
    expected = frames_of(Generator.from_run(models / "run", "cpu"))
    found = Generator.from_model(models / layout, "cpu", changes=RULES)
    assert np.abs(frames_of(found).astype(int) - expected).max() <= 1  # alignment in memory moves last bits
    assert found.config is None and found.fps == 16


def test_rules_come_from_a_stage_and_options_win(models, workshop, tmp_path):
    stage = stage_config(workshop, tmp_path, "distill", init_from=str(models / "original"), rope="absolute")
    generator = Generator.from_model(models / "original", "cpu", stage=stage, changes=changes_of(steps="4", fps=24))
    rules = generator.plan
    assert (rules.rope, rules.window_frames, rules.sink_frames, generator.fps) == ("absolute", 5, 1, 24)
    assert generator.settings.steps == [1, 0.75, 0.5, 0.25] and generator.settings.height == 64
    defaults = generation_settings()
    assert defaults == GenerationConfig() and defaults.guidance == 1 and defaults.plan.first_frames == 1
    changed = generation_settings(None, changes_of(window="all", sink=1, block=3, dtype="bf16", steps="1,0.5"))
    assert changed.plan.window_frames is None and changed.plan.block_frames == 3
    assert changed.precision == "bf16" and changed.steps == [1, 0.5] and changed.width == defaults.width


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": "many"}, "--steps many must be"),
        ({"window": "-3"}, "--window -3 must be"),
        ({"steps": "0.5,1"}, "must descend strictly"),
        ({"window": "6", "sink": 1}, "must be a multiple of block_frames=4"),
        ({"dtype": "fp4"}, "precision: got 'fp4'"),
    ],
)
def test_wrong_rules_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        generation_settings(None, changes_of(**options))


def test_the_command_line_wins_over_a_stage_and_a_stage_over_the_defaults(workshop, tmp_path):
    stage = stage_config(workshop, tmp_path, "causal")
    words = (
        "plan.keep_sink=true",
        "plan.sink_frames=3",
        "steps=[1,0.5]",
        "text_precision=bf16",
        "plan.window_frames=9",
    )
    settings = generation_settings(stage, changes_of(*words, sink=1, dtype="bf16"))
    assert settings.plan.model_dump() == {**stage.plan.model_dump(), "keep_sink": True, "window_frames": 9}
    assert stage.plan.sink_frames == 1 != GenerationConfig().plan.sink_frames  # the option, the default
    assert (settings.steps, settings.precision, settings.text_precision) == ([1.0, 0.5], "bf16", "bf16")
    assert (settings.height, settings.shift) == (stage.video.height, stage.flow.shift)
    assert changes_of("plan.window_frames=null") == {"plan": {"window_frames": None}} == changes_of(window="all")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("plan.windw_frames=9", "unknown key plan.windw_frames; did you mean plan.window_frames"),
        ("window=9", "unknown key window; here it is plan.window_frames"),
        ("guidence=2", "unknown key guidence; did you mean guidance"),
        ("plan=9", "plan: got 9"),
        ("plan.window_frames=9.5", "plan.window_frames: got 9.5; must be a valid integer"),
        ("shift", "override 'shift' must have the form key=value"),
    ],
)
def test_a_wrong_override_is_named(override, message):
    with pytest.raises(ConfigError, match=message):
        generation_settings(None, changes_of(override))


def test_folders_without_weights_or_encoders_say_where_was_looked(models, tmp_path):
    with pytest.raises(CheckpointError, match="nothing does not exist"):
        Source.of_model(tmp_path / "nothing", tmp_path)
    with pytest.raises(CheckpointError, match="holds no .*safetensors, nor do transformer, generator_ema"):
        Source.of_model(tmp_path, tmp_path)
    save_dit(TEACHER, make_model().state_dict(), tmp_path / "bare")
    with pytest.raises(CheckpointError, match="no encoders were found in .*--encoders"):
        Source.of_model(tmp_path / "bare", changes=RULES)
    found = Source.of_model(tmp_path / "bare", models / "encoders", changes=RULES)
    assert found.encoders == models / "encoders"


def test_a_checkpoint_keeps_its_rules(models, workshop, tmp_path):
    checkpoint = models / "run" / "causal" / "checkpoints" / "step_000001"
    for path in (checkpoint, checkpoint / "generator"):
        with pytest.raises(ConfigError, match="rules of its own; give it with --run"):
            Source.of_model(path, models / "encoders")
    stage = stage_config(workshop, tmp_path, "causal")
    assert Source.of_model(checkpoint, models / "encoders", stage).weights == checkpoint / "generator"
    assert Source.of_run(checkpoint).weights == checkpoint / "generator"


def test_weights_and_encoders_must_fit(models, tmp_path, monkeypatch):
    with (
        monkeypatch.context() as patched,
        pytest.raises(ConfigError, match="height=72 must be a positive multiple of 16"),
    ):
        patched.setattr(pipeline, "streaming_model", lambda *_: pytest.fail("weights were read before"))
        Generator.from_model(models / "original", "cpu", changes={**RULES, "height": 72})
    config = TEACHER.__class__(**{**TEACHER.to_dict(), "out_channels": 8})
    save_dit(config, make_model(config).state_dict(), tmp_path / "model")
    with pytest.raises(ConfigError, match="8 latent channels and the VAE"):
        Generator.from_model(tmp_path / "model", "cpu", encoders=models / "encoders", changes=RULES)


def test_other_rules_than_those_of_training_are_named(models, tmp_path, caplog):
    changes = {"plan": {"window_frames": 3}, "shift": 4.0}
    Source.of_run(models / "run", changes)
    (said,) = caplog.messages
    assert said == (
        "Not as in training: plan.window_frames is 3 and was 5, shift is 4.0 and was 3.0; expect drift or flicker"
    )
    caplog.clear()
    Source.of_run(models / "run", {"precision": "bf16", "fps": 24})
    assert not caplog.text
    Source.of_run(models / "run", {"height": 32})
    assert caplog.messages == ["Pictures of 32x64 from weights that were trained with 64x64: expect worse ones"]
    folder = export(models / "run", tmp_path / "student")
    caplog.clear()
    Source.of_model(folder, models / "encoders", changes={**changes, "width": 32})
    assert len(caplog.messages) == 2 and caplog.messages[0] == said and "64x32 from weights" in caplog.messages[1]


def test_weights_without_y_start_from_the_clean_first_frame(models, tmp_path):
    """TI2V weights: the picture enters through the cache alone."""
    sizes = {**TEACHER.to_dict(), "in_channels": TEACHER.out_channels, "image_dim": None, "model_type": "ti2v"}
    config = TEACHER.__class__(**sizes)
    save_dit(config, make_model(config).state_dict(), tmp_path / "model")
    generator = Generator.from_model(tmp_path / "model", "cpu", encoders=models / "encoders", changes=RULES)
    one = frames_of(generator)
    other = np.concatenate(list(generator.stream(255 - PICTURE, WORLD.caption, num_frames=9)))
    assert len(one) == 9 and not np.array_equal(one[1:], other[1:])


# ---- guidance --------------------------------------------------------------------------------------------------------
def guided_oracle(generator, weight, num_blocks):
    """Latents of guided streaming without a cache: every block sees the whole past, both texts side by side."""
    from longtake.encoders.condition import encode_condition, prepare_image

    rules, model, encoders = generator.plan, generator.model, generator.encoders
    picture = prepare_image(PICTURE, 64, 64)[None]
    sides = [encode_condition(encoders, picture, [text]) for text in (WORLD.caption, "blurred")]
    latents = sides[0].frames[:, :1, -encoders.vae.latent_channels :].float()
    plan = rules
    for start, end in plan.blocks(1, 1 + num_blocks * plan.block_frames):
        layout = causal_layout(plan.but(window_frames=None, rope=rules.rope), end)
        draws = KeyedRNG(0)
        shape = (end - start, model.config.out_channels, 8, 8)
        x = draws.noise(0, "stream", [0], shape, part=start)
        for step, sigma in enumerate(rules.sigmas):
            levels = torch.zeros(1, end)
            levels[:, start:] = sigma
            both = [model(torch.cat([latents, x], 1), levels, side, layout)[:, start:] for side in sides]
            clean = x - sigma * (both[1] + weight * (both[0] - both[1]))
            if step + 1 < len(rules.sigmas):
                following = rules.sigmas[step + 1]
                noise = draws.noise(step + 1, "stream", [0], shape, part=start)
                x = (1 - following) * clean + following * noise
        latents = torch.cat([latents, clean], 1)
    return latents


def test_guidance_equals_two_passes_without_a_cache(models):
    from longtake.inference.frames import to_frames

    plan = {"block_frames": 2, "window_frames": None, "sink_frames": 0}
    generator = Generator.from_model(models / "original", "cpu", changes={**RULES, "plan": plan, "guidance": 2.5})
    with torch.no_grad():
        expected = to_frames(generator.encoders.vae.decode(guided_oracle(generator, 2.5, 2))[0])
    made = frames_of(generator, 17, negative="blurred")
    assert np.abs(made.astype(int) - expected).max() <= 1
    assert not np.array_equal(made, frames_of(generator, 17))  # the negative prompt is used


def test_a_negative_prompt_without_guidance_is_refused(models):
    generator = Generator.from_model(models / "original", "cpu", changes=RULES)
    with pytest.raises(ConfigError, match="negative prompt .'blurred'. has no effect with guidance=1"):
        generator.stream(PICTURE, WORLD.caption, num_frames=9, negative="blurred")


# ---- precision and memory --------------------------------------------------------------------------------------------
def test_bfloat16_on_a_cpu_is_close_to_float32(models):
    exact = Generator.from_model(models / "original", "cpu", changes=RULES)
    rough = Generator.from_model(models / "original", "cpu", changes={**RULES, "precision": "bf16"})
    dtypes = {name: p.dtype for name, p in rough.model.named_parameters()}
    assert dtypes["blocks.0.self_attn.q.weight"] == torch.bfloat16
    assert dtypes["blocks.0.modulation"] == dtypes["head.head.weight"] == torch.float32
    assert rough.encoders.text.model.dtype == rough.encoders.vae.dtype == torch.bfloat16
    other = {**RULES, "precision": "bf16", "vae_precision": "fp32"}
    assert Generator.from_model(models / "original", "cpu", changes=other).encoders.vae.dtype == torch.float32
    a, b = frames_of(exact).astype(float), frames_of(rough).astype(float)
    assert np.abs(a[0] - b[0]).max() <= 1
    assert 0 < np.abs(a[1:] - b[1:]).mean() < 0.1 * np.abs(a[1:] - a[:1]).mean() + 5


def live_tensors():
    gc.collect()
    tensors = {}
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor) and not isinstance(item, FakeTensor):  # other tests leave some of these
            storage = item.untyped_storage()
            tensors[storage.data_ptr()] = storage.nbytes()
    return len(tensors), sum(tensors.values())


@pytest.mark.whole
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_memory_does_not_grow_with_the_length(models, guidance):
    generator = Generator.from_model(models / "original", "cpu", changes={**RULES, "guidance": guidance})
    used = {}
    for block, frames in enumerate(generator.stream(PICTURE, WORLD.caption)):
        assert len(frames) == (8 if block else 1)
        if block in (15, 30):  # the encoder is gone once y is encoded to its end
            used[block] = live_tensors()
        if block == 30:
            break
    assert used[30] == used[15]


# ---- the command -----------------------------------------------------------------------------------------------------
def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_command_with_a_stage_file(models, workshop, tmp_path):
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(stage_tree(workshop, tmp_path, "distill", init_from="toy")))
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    pair = ("--image", tmp_path / "a.png", "--prompt", WORLD.caption)
    command = ("generate", "--model", models / "original", "--config", tmp_path / "stage.yaml", *pair)
    result = invoke(*command, "-o", tmp_path / "a.mp4", "--frames", 9, "--fps", 12, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "9 frames in" in result.output and "frames/s, first generated frame after" in result.output
    video, fps = read_video(tmp_path / "a.mp4")
    assert video.shape == (9, 64, 64, 3) and fps == 12
    refused = invoke(*command, "-o", tmp_path / "b.mp4", "--negative", "blurred")
    assert refused.exit_code == 2 and "guidance=1" in refused.output and not (tmp_path / "b.mp4").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", "a", "--prompt", "p"], "either --run"),
        (["--run", "r", "--model", "m", "--image", "a", "--prompt", "p"], "either --run"),
        (["--model", "m"], "either --prompt, with --image where"),
        (["--model", "m", "--image", "a"], "either --prompt, with --image where"),
        (["--model", "m", "--inputs", "f", "--prompt", "p"], "either --prompt, with --image where"),
        (["--run", "r", "--encoders", "e", "--inputs", "f"], "belong to --model"),
        (["--model", "m", "--config", "configs/toy/i2v.yaml", "--image", "a", "--prompt", "p"], "job of several"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    result = invoke("generate", "-o", "o.mp4", *options)
    assert result.exit_code == 2 and message in result.output


# ---- a student as a folder of its own ---------------------------------------------------------------------------------
def test_an_exported_student_streams_by_its_own_rules(models, tmp_path):
    folder = tmp_path / "student"
    result = CliRunner().invoke(app, ["export", str(models / "run"), str(folder), "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    names = ["README.md", "config.json", "diffusion_pytorch_model.safetensors", "generation.yaml"]
    assert sorted(p.name for p in folder.iterdir()) == names
    run = Generator.from_run(models / "run", "cpu")
    expected = frames_of(run)
    found = Generator.from_model(folder, "cpu")  # and nothing more: the place of the encoders is in the folder
    place = str(run.config.encoders_folder)
    assert found.settings == run.settings.model_copy(update={"encoders": place}) and Path(place).is_absolute()
    assert np.abs(frames_of(found).astype(int) - expected).max() <= 1
    changed = Generator.from_model(folder, "cpu", encoders=models / "encoders", changes={"shift": 4.0})
    assert changed.settings.shift == 4.0 and changed.settings.plan == found.settings.plan
    with pytest.raises(ConfigError, match="exists already"):
        export(models / "run", folder)
    with pytest.raises(ConfigError, match="dtype=int8 must be one of float16"):
        export(models / "run", tmp_path / "other", dtype="int8")
    assert [p.name for p in tmp_path.iterdir()] == ["student"]
    export(models / "run", folder, dtype="float32", overwrite=True)
    result = CliRunner().invoke(app, ["export", str(models / "run"), str(tmp_path / "second"), "history_blocks=3"])
    assert result.exit_code == 0, result.output
    again = Source.of_model(tmp_path / "second").settings
    assert again == found.settings.model_copy(update={"history_blocks": 3})
    (folder / "generation.yaml").write_text("shift: -1\nwindow: 3\n")
    with pytest.raises(ConfigError, match=r"(?s)shift: got -1.*unknown key window|unknown key window.*shift: got -1"):
        Generator.from_model(folder, "cpu", encoders=models / "encoders")


@pytest.mark.whole
def test_the_packaged_student_is_named_toy():
    generator = Generator.from_model("toy", "cpu")
    assert generator.settings.plan == load_config("configs/toy/distill.yaml").plan
    video = np.concatenate(list(generator.stream(PICTURE, WORLD.caption, num_frames=33)))
    assert video.shape == (33, 64, 64, 3)
    assert np.nanmedian(measure(WORLD, video).position_error) < 3  # pixels; it follows the caption
