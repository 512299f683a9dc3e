"""Alarms: synthetic students that freeze, fade and collapse raise them, healthy ones do not; histories; what is kept."""

import json
import math

import numpy as np
import pytest
from test_row_validation import SHORT, config_of

from longtake.checkpoint.best import Best
from longtake.config.alarms import AlarmsConfig
from longtake.errors import CheckpointError, ConfigError, TrainingError
from longtake.evaluation.instruments import measure
from longtake.evaluation.row_videos import against, means
from longtake.inference.export import export
from longtake.parallel.mesh import Mesh
from longtake.run_folder import best_checkpoint, exported_weights, read_manifest
from longtake.toy.world import sample_world
from longtake.train.alarms import Alarms, Watch
from longtake.train.stage import run_stage
from longtake.weights.load import load_dit

WORLDS, FRAMES = 4, 33


def videos(share=1.0, fade=1.0, first=0):
    """Toy worlds that move a share of the way and whose colours fade to a share of themselves at the end."""
    made = []
    for number in range(first, first + WORLDS):
        world = sample_world(5, number)
        pictures = world.render(FRAMES)
        pictures = np.stack([pictures[round(k * share)] for k in range(FRAMES)]).astype(np.float32)
        grey = pictures.mean(-1, keepdims=True)
        shares = np.linspace(1, fade, FRAMES)[:, None, None, None]
        made.append((grey + shares * (pictures - grey)).round().astype(np.uint8))
    return made


@pytest.fixture(scope="module")
def teacher():
    return [measure(video, 16) for video in videos()]


def numbers(student, teacher):
    """What a validation would log of a student's videos."""
    measured = [measure(video, 16) for video in student]
    return {f"validation/{name}": value for name, value in (means(measured) | against(measured, teacher)).items()}


def collapsed():
    """Students whose pictures are gone after half of the video."""
    made = videos()
    for video in made:
        video[FRAMES // 2 :] = 128
    return made


@pytest.mark.parametrize(
    ("alarm", "student"),
    [("motion", lambda: videos(share=0.3)), ("saturation", lambda: videos(fade=0.7)), ("uniform", collapsed)],
)
def test_a_student_that_goes_wrong_raises_its_alarm_within_two_validations(teacher, alarm, student):
    watch, wrong = Watch(AlarmsConfig()), numbers(student(), teacher)
    assert watch.validation(0, wrong) == []  # before training nothing is said
    raised = [{one.alarm for one in watch.validation(step, wrong)} for step in (100, 200)]
    assert alarm in raised[1] and (alarm in raised[0]) == (alarm == "uniform")


@pytest.mark.whole
@pytest.mark.parametrize("students", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_healthy_students_raise_none(teacher, students):
    """Of other worlds of the same kind even: so many students, three validations each."""
    for seed in range(students):
        watch = Watch(AlarmsConfig(saturation=0.3))  # other worlds have other colours
        for step in (100, 200, 300):
            assert watch.validation(step, numbers(videos(first=10 * seed + step // 100), teacher)) == []
    watch = Watch(AlarmsConfig())
    paler = numbers(videos(share=0.9, fade=0.97), teacher)
    for step in (100, 200, 300):  # of the same worlds, a little slower and paler
        assert watch.validation(step, paler) == []


def test_seams_and_single_slips():
    watch = Watch(AlarmsConfig())
    seam, sound = {"validation/long_seam_score": 1.5}, {"validation/long_seam_score": 1.0}
    assert watch.validation(1, seam) == [] and watch.validation(2, sound) == [] and watch.validation(3, seam) == []
    (raised,) = watch.validation(4, seam)
    assert raised == ("seam", "validation/long_seam_score", 1.5, 1.25)
    failed = {"validation/errors": 1.0, "validation/seconds": 2.0}
    assert watch.validation(5, failed) == [] and watch.validation(6, seam)  # one that failed interrupts nothing
    off = Watch(AlarmsConfig(seam=None))
    assert off.validation(1, seam) == off.validation(2, seam) == []


def test_colours_of_longer_videos_are_compared_with_those_of_the_clips():
    """A student that is a little brighter than its teacher is sound while it stays so, and fades when it does not."""
    watch = Watch(AlarmsConfig())
    clip, long = "validation/saturation_vs_teacher", "validation/long_saturation_vs_teacher"
    sound, fades = {clip: 1.1, long: 1.16}, {clip: 1.1, long: 0.95}
    assert watch.validation(1, sound) == watch.validation(2, sound) == watch.validation(3, fades) == []
    (raised,) = watch.validation(4, fades)
    assert raised[:3] == ("saturation", long, 0.95) and raised.limit == pytest.approx(0.99)
    burnt = {clip: 1.2, long: 1.25}
    assert watch.validation(5, burnt) == [] and watch.validation(6, burnt) == [("saturation", clip, 1.2, 1.15)]


def test_toy_worlds_are_judged_by_the_truth():
    slow, teacher = (
        {"validation/motion_ratio": 0.5, "validation/position_error_px": 3.0},
        {"validation/teacher_motion_ratio": 0.8},
    )
    watch = Watch(AlarmsConfig())
    assert not watch.validation(1, slow) and watch.validation(2, slow)[0].value == 0.5
    watch = Watch(AlarmsConfig())  # the teacher itself is slow: 0.5 / 0.8 is enough
    assert not watch.validation(1, slow | teacher) and not watch.validation(2, slow | teacher)


def test_losses_and_gradients_are_compared_with_their_own_history():
    draws = np.random.default_rng(0)
    watch = Watch(AlarmsConfig())
    falling = [math.exp(draws.normal(0, 0.4) - k / 400) for k in range(1000)]
    for value in falling:  # noisy, and slowly falling: as usual
        assert watch.iteration({"critic_loss": value, "critic_grad_norm": 3 * value, "seconds": 1.0}) == []
    (raised,) = watch.iteration({"critic_loss": 500.0, "critic_grad_norm": 0.3})
    assert raised.alarm == "history" and raised.number == "critic_loss" and raised.value == 500 > raised.limit > 1
    assert watch.iteration({"critic_loss": 600.0}) == []  # said once, not at each row
    assert watch.iteration({"critic_loss": 0.1}) == []
    assert watch.iteration({"critic_loss": 700.0})[0].value == 700
    assert watch.iteration({"critic_loss": 0.1}) == [] and watch.iteration({"critic_loss": 1e-9})[0].limit < 0.1
    young = Watch(AlarmsConfig())
    assert all(young.iteration({"critic_loss": value}) == [] for value in (1.0, 100.0, 1e-6, 1e6))
    assert young.iteration({"critic_loss": math.nan}) == []


def test_a_loud_line_and_a_row_that_a_resumed_run_does_not_repeat(tmp_path, caplog):
    slow = {"validation/motion_vs_teacher": 0.4}
    alarms = Alarms(AlarmsConfig(), tmp_path, Mesh(), first_step=0)
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in (10, 20):
            file.write(json.dumps({"step": step, **slow}) + "\n")
            alarms.validation(step, slow)
    rows = [json.loads(line) for line in (tmp_path / "alarms.jsonl").read_text().splitlines()]
    number = "validation/motion_vs_teacher"
    assert rows == [{"step": 20, "alarm": "motion", "value": 0.4, "limit": 0.6, "action": "warn", "number": number}]
    assert "ALARM motion after 20 iterations" in caplog.text and alarms.stopping is None
    resumed = Alarms(AlarmsConfig(stop=["motion"]), tmp_path, Mesh(), first_step=20)
    assert (tmp_path / "alarms.jsonl").read_text() == ""
    resumed.validation(20, slow)
    assert json.loads((tmp_path / "alarms.jsonl").read_text())["action"] == "stop"
    assert resumed.stopping.startswith("alarm motion: validation/motion_vs_teacher is 0.4")


@pytest.mark.whole
def test_an_alarm_stops_a_stage_once_it_is_saved_and_the_best_is_exported(workshop, whole, tmp_path):
    """Random weights: a limit that every video passes."""
    changes = {"max_steps": 6, "save_every": 100, "keep_best": "distance_to_teacher", "validation": SHORT}
    config = config_of(workshop, tmp_path / "run", whole, **changes, alarms={"motion": 1000.0, "stop": ["motion"]})
    with pytest.raises(TrainingError, match="stopped after 4 of 6 iterations by the alarm motion: .*goes on where"):
        run_stage(config, Mesh())
    rows = [json.loads(line) for line in (config.folder / "alarms.jsonl").read_text().splitlines()]
    assert {(row["alarm"], row["step"], row["action"]) for row in rows} >= {("motion", 4, "stop")}
    assert read_manifest(config.folder / "checkpoints/step_000004")["step"] == 4
    kept = best_checkpoint(tmp_path / "run")
    scores = {}
    for line in (config.folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["step"] and "validation/distance_to_teacher" in row:
            scores[row["step"]] = row["validation/distance_to_teacher"]
    best = json.loads((config.folder / "best/best.json").read_text())
    assert kept.name == f"step_{min(scores, key=scores.get):06d}" and best["value"] == min(scores.values())
    assert best["score"] == "distance_to_teacher" and best["seed"] == config.validation.seed
    export(tmp_path / "run", tmp_path / "student", dtype="float32", best=True)
    said = (
        f"iteration {best['step']}, by distance_to_teacher={best['value']:.4g} of the validations, seed {best['seed']}"
    )
    assert f"- chosen as the best checkpoint: {said}" in (tmp_path / "student/README.md").read_text()
    mine, theirs = load_dit(tmp_path / "student").state_dict(), load_dit(exported_weights(kept)).state_dict()
    assert all((mine[name] == theirs[name]).all() for name in theirs)


@pytest.mark.whole
def test_an_alarm_stops_after_the_last_iteration_too(workshop, whole, tmp_path):
    """A job would go on with its next stage, which begins with the student of this one."""
    changes = {"alarms": {"motion": 1000.0, "stop": ["motion"]}, "validation": SHORT}
    config = config_of(workshop, tmp_path / "run", whole, **changes)
    with pytest.raises(TrainingError, match="stopped after 4 of 4 iterations by the alarm motion"):
        run_stage(config, Mesh())
    assert read_manifest(config.folder / "checkpoints/step_000004")["step"] == 4


def test_the_best_is_the_one_with_the_lowest_or_nearest_score(tmp_path):
    best = Best("motion_vs_teacher", tmp_path, Mesh())
    name = "validation/motion_vs_teacher"
    values = {0: 1.0, 1: 0.5, 2: 1.9, 3: 2.2, 4: math.nan, 5: 0.9, 6: 1.05, 7: 0.9}
    assert [step for step, value in values.items() if best.improves(step, {name: value})] == [1, 2, 5, 6]
    kept = Best("count_kept", tmp_path, Mesh())
    assert [
        kept.improves(step, {"validation/count_kept": value}) for step, value in ((1, 0.5), (2, 0.4), (3, 0.9))
    ] == [
        True,
        False,
        True,
    ]
    assert not best.improves(8, {}) and not Best(None, tmp_path, Mesh()).improves(1, {name: 1.0})
    with pytest.raises(CheckpointError, match="holds no best checkpoint; train with keep_best"):
        best_checkpoint(tmp_path)


def test_the_best_needs_checkpoints(workshop, whole, tmp_path):
    with pytest.raises(ConfigError, match="keep_best=stop_rate needs checkpoints, and save_every=0 saves none"):
        config_of(workshop, tmp_path, whole, keep_best="stop_rate", save_every=0)
