"""Clips whose caption changes on the way: written, read, encoded, trained on; and who cannot learn them says so."""

import json

import pytest
from tiny_stage import stage_config

from longtake.config.groups import WorldConfig
from longtake.data.encoded import EncodedRows
from longtake.data.formats import open_dataset
from longtake.encodings.write import encode
from longtake.errors import ConfigError, DataError
from longtake.objectives.teacher_forcing import TeacherForcing
from longtake.parallel.mesh import Mesh
from longtake.toy.files import write_world
from longtake.toy.story import sample_story
from longtake.train.metrics import read_rows
from longtake.train.stage import run_stage

FRAMES = [5, 9, 17]  # of latents 2 (within a block), 3 and, past the clips, none


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """Six worlds of 17 frames; the captions of four change in their clips."""
    asked = WorldConfig(num_worlds=6, num_frames=17, formats=["clips"], switch_frames=FRAMES, one_switch=True)
    return write_world(tmp_path_factory.mktemp("stories") / "data", asked) / "clips"


def losses_of(config, monkeypatch):
    """Losses by iteration, and what each micro-batch was told of its changes."""
    told, loss = [], TeacherForcing.loss

    def spy(self, turn, batch, step):
        told.append((list(batch.switch_frames), batch.later_text is not None))
        return loss(self, turn, batch, step)

    with monkeypatch.context() as patch:
        patch.setattr(TeacherForcing, "loss", spy)
        run_stage(config, Mesh())
    rows = read_rows(config.folder / "metrics.jsonl")
    return [row["generator_loss"] for row in rows if "generator_loss" in row], told


def data_of(path):
    return {"data": {"path": str(path), "num_workers": 0}}


@pytest.mark.whole
def test_a_stage_learns_the_changes_also_from_an_encoded_set(workshop, stories, tmp_path, monkeypatch):
    rows = open_dataset(stories, num_frames=17, fps=16)
    assert [rows[k].switch_frames for k in range(6)] == [(5,), (9,), (17,)] * 2
    assert all(rows[k].prompts[1] == sample_story(0, k, [9]).switches[0].caption for k in range(6))
    assert '"one_switch": true' in (stories.parent / "world.json").read_text()
    config = stage_config(workshop, tmp_path / "direct", "causal", max_steps=2, **data_of(stories))
    direct, told = losses_of(config, monkeypatch)
    switches = [frame for frames, _ in told for frame in frames]
    assert set(switches) == {2, 3, None} and all(later for frames, later in told if any(frames))
    encode(config, tmp_path / "set", Mesh())
    stored = EncodedRows(tmp_path / "set")
    assert [stored[k].switch_frames for k in range(6)] == [(5,), (9,), (17,)] * 2
    cached = stage_config(workshop, tmp_path / "cached", "causal", max_steps=2, **data_of(tmp_path / "set"))
    again, told_again = losses_of(cached, monkeypatch)
    assert told_again == told and again == pytest.approx(direct, rel=2e-2)  # texts are stored in bfloat16


@pytest.mark.slow
def test_real_clips_beside_distribution_matching_change_too(workshop, stories, tmp_path, monkeypatch):
    config = stage_config(
        workshop, tmp_path, "distill", data_loss={"weight": 0.5}, max_steps=2, validate_every=0, **data_of(stories)
    )
    losses, told = losses_of(config, monkeypatch)
    assert len(losses) == 1 and any(later for _, later in told)


def test_a_bidirectional_teacher_refuses_them_by_row(workshop, stories, tmp_path):
    config = stage_config(workshop, tmp_path, "teacher", **data_of(stories))
    with pytest.raises(
        DataError, match=r"caption changes at frames \[.\], inside the clip of 17.*not with this objective"
    ):
        run_stage(config, Mesh())


def test_two_changes_in_one_clip_are_refused(workshop, tmp_path):
    asked = WorldConfig(num_worlds=4, num_frames=17, formats=["clips"], switch_frames=[5, 9])
    folder = write_world(tmp_path / "data", asked)
    config = stage_config(workshop, tmp_path / "run", "causal", **data_of(folder / "clips"))
    with pytest.raises(DataError, match=r"changes at frames \[5, 9\].*only once; cut the video"):
        run_stage(config, Mesh())
    with pytest.raises(ConfigError, match="give them"):
        write_world(tmp_path / "other", WorldConfig(num_worlds=1, one_switch=True))


@pytest.mark.parametrize("frames", [[9, 17], "9", [0], [9, 9], [True, 1.5], {"a": 1}])
def test_frames_that_do_not_fit_the_prompts_make_a_bad_row(stories, tmp_path, frames):
    row = {"file_name": str(stories / "000000.mp4"), "prompts": ["a", "b"], "switch_frames": frames}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    rows = open_dataset(tmp_path, kind="clips", num_frames=17, fps=16)
    with pytest.raises(DataError, match="must be ascending pixel frames above 0, one less than prompts"):
        rows[0]
