"""Stage long from files to files: videos over many iterations, a stop in the middle of one, prompts that switch."""

import json
import math

import pytest
import torch
from PIL import Image
from tiny_stage import stage_config

from longtake.encoders.text import TextEncoder
from longtake.encodings.write import encode
from longtake.errors import ConfigError, DataError
from longtake.inference.generator import Generator
from longtake.objectives.long_tuning import LongTuning
from longtake.parallel.mesh import Mesh
from longtake.run_folder import exported_weights, latest_checkpoint
from longtake.toy.world import sample_world
from longtake.train.metrics import read_rows
from longtake.train.stage import run_stage
from longtake.train.stage_data import DataBuilder, open_data

LONG = {"num_chunks": [3], "new_frames": 2}


def long_config(workshop, logdir, **changes):
    values = LONG | {"max_steps": 7, "save_every": 1, "keep_checkpoints": 20}
    return stage_config(workshop, logdir, "long", **values | changes)


def rows_of(config):
    rows = read_rows(config.folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(("seconds", "speed"))} for row in rows]


def weights_of(config, step=None):
    folder = config.folder / "checkpoints"
    checkpoint = latest_checkpoint(folder) if step is None else folder / f"step_{step:06d}"
    from safetensors.torch import load_file

    return load_file(exported_weights(checkpoint) / "model.safetensors")


@pytest.fixture(scope="module")
def whole(workshop, tmp_path_factory):
    """7 iterations in one go: two sequences of 3 chunks and the begin of a third."""
    config = long_config(workshop, tmp_path_factory.mktemp("long"))
    run_stage(config, Mesh())
    return config


def stopped(config, workshop, logdir, step):
    """The same run, stopped after `step` iterations and started again."""
    run_stage(long_config(workshop, logdir, max_steps=step, **config), Mesh())
    again = long_config(workshop, logdir, **config)
    run_stage(again, Mesh())
    return again


def test_it_trains_and_its_student_streams(whole):
    rows = rows_of(whole)
    assert len(rows) == 7 and all(math.isfinite(row["critic_loss"]) for row in rows)
    # generator turns: chunk + sequence even
    assert [k for k, row in enumerate(rows) if "generator_loss" in row] == [0, 2, 4, 6]
    assert all(row["generator_grad_norm"] > 0 for row in rows if "generator_loss" in row)
    generator = Generator.from_run(whole.folder, "cpu")
    picture = Image.fromarray(sample_world(5, 0).render(1)[0])
    frames = list(generator.stream(picture, "a red circle moves right", num_frames=33))
    assert sum(len(block) for block in frames) == 33


@pytest.mark.whole
def test_stopped_between_sequences_it_equals_the_uninterrupted_run_bit_for_bit(whole, workshop, tmp_path):
    again = stopped({}, workshop, tmp_path, 3)
    assert rows_of(again) == rows_of(whole)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(again).values(), weights_of(whole).values()))


@pytest.mark.whole
def test_stopped_within_a_sequence_it_goes_on_with_the_same_videos(whole, workshop, tmp_path):
    """Their past is made again by the saved weights: equal where the weights hardly move."""
    still = {"optim": {"lr": 1e-9}, "critic": {"lr": 1e-9, "updates_per_generator": 2}}
    calm = long_config(workshop, tmp_path / "calm", **still)
    run_stage(calm, Mesh())
    again = stopped(still, workshop, tmp_path / "again", 4)
    for mine, truth in zip(rows_of(again), rows_of(calm), strict=True):
        assert mine.keys() == truth.keys()
        for name, value in truth.items():
            assert mine[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


def test_pictures_of_windows_are_encoded_as_far_as_a_window_reaches(workshop, tmp_path):
    config = long_config(workshop, tmp_path)
    codec = DataBuilder(config, Mesh(), open_data(config.data, config.clip_shape), True).codec(None)
    picture = codec.encode(torch.rand(2, 3, 64, 64) * 2 - 1)
    assert picture.frames.shape[1] == config.video.num_latent_frames <= codec.vae.steady_index
    assert torch.equal(picture.latent, picture.frames[:, :1, 4:]) and picture.tokens.shape[0] == 2


@pytest.mark.whole
def test_running_videos_that_are_not_finite_are_made_again(workshop, tmp_path, monkeypatch):
    """NaN in one roll-out is in the cache for good: after the skipped update the past is generated anew."""
    noise_of, poisoned = LongTuning._roll_out_noise, []

    def noise(self, batch, step):
        made = noise_of(self, batch, step)
        if step == 1 and len(poisoned) < 2:  # once for each of the two micro-batches
            poisoned.append(step)
            return lambda *place: made(*place) * float("nan")
        return made

    monkeypatch.setattr(LongTuning, "_roll_out_noise", noise)
    config = long_config(workshop, tmp_path, on_nonfinite="skip", max_skipped=1, max_steps=4)
    run_stage(config, Mesh())
    losses = [row.get("critic_loss") for row in rows_of(config)]
    assert len(poisoned) == 2 and losses[1] is None
    assert all(math.isfinite(loss) for k, loss in enumerate(losses) if k != 1)
    assert rows_of(config)[-1]["skipped_updates"] == 1


@pytest.mark.slow
def test_a_stop_within_a_sequence_has_one_defined_result(whole, workshop, tmp_path):
    one, two = (stopped({}, workshop, tmp_path / name, 4) for name in ("one", "two"))
    assert rows_of(one) == rows_of(two) and rows_of(one)[:4] == rows_of(whole)[:4]
    assert all(torch.equal(a, b) for a, b in zip(weights_of(one).values(), weights_of(two).values()))


@pytest.fixture(scope="module")
def stories(workshop, tmp_path_factory):
    """Pictures with two prompts a row."""
    folder = tmp_path_factory.mktemp("stories")
    lines = []
    for k in range(6):
        world = sample_world(2, k)
        Image.fromarray(world.render(1)[0]).save(folder / f"{k}.png")
        lines.append({"file_name": f"{k}.png", "prompts": [world.caption, sample_world(2, k + 50).caption]})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.mark.whole
def test_prompts_switch_also_from_an_encoded_set_and_then_without_text_encoder(
    workshop, stories, tmp_path, monkeypatch
):
    data = {"path": str(stories), "kind": "images", "num_workers": 0}
    settings = {"switch_frames": [7], "max_steps": 3, "data": data}
    plain = long_config(workshop, tmp_path / "plain", **settings)
    run_stage(plain, Mesh())
    unswitched = long_config(workshop, tmp_path / "same", **settings | {"switch_frames": []})
    run_stage(unswitched, Mesh())
    losses = [[row["critic_loss"] for row in rows_of(config)] for config in (plain, unswitched)]
    # The third chunk is under the second prompt; the roll-out of the one before ends where it begins.
    assert losses[0][:2] == losses[1][:2] and losses[0][2] != losses[1][2]

    encode(plain, tmp_path / "set", Mesh())
    monkeypatch.setattr(TextEncoder, "load", lambda *_, **__: pytest.fail("the text encoder was loaded"))
    stored = long_config(
        workshop, tmp_path / "stored", **settings | {"data": {"path": str(tmp_path / "set"), "num_workers": 0}}
    )
    run_stage(stored, Mesh())
    for mine, truth in zip(rows_of(stored), rows_of(plain), strict=True):
        assert mine["critic_loss"] == pytest.approx(truth["critic_loss"], rel=2e-2)  # texts are stored in bfloat16


def test_rows_without_a_second_prompt_are_named(workshop, tmp_path):
    config = long_config(workshop, tmp_path, switch_frames=[7])
    with pytest.raises(DataError, match="has one prompt.*needs two a row"):
        run_stage(config, Mesh())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"new_frames": 3}, "objective.new_frames=3 must be a multiple of plan.block_frames=2.*set it to 4"),
        ({"new_frames": 6}, "below video.num_latent_frames=5; set it to 4"),
        ({"switch_frames": [4]}, "4 is no block boundary.*set it to 3 or 5"),
        ({"switch_frames": [0]}, "0 is no block boundary after the first block"),
        ({"switch_frames": [3, 9]}, r"switch_frames=\[9\] are not before the end.*9 latent frames"),
        ({"num_chunks": [0]}, "must all be at least 1"),
        ({"teacher": None}, "objective.teacher: got None"),
        ({"caption_dropout": 0.1}, "caption_dropout; it belongs to objective.kind=flow_matching and teacher_forcing"),
    ],
)
def test_wrong_settings_are_refused_when_they_are_read(workshop, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        long_config(workshop, tmp_path, **changes)


def test_long_belongs_to_its_stage(workshop, tmp_path):
    with pytest.raises(ConfigError, match="unknown key objective.num_chunks; it belongs to objective.kind=long_tuning"):
        stage_config(workshop, tmp_path, "distill", **LONG)
