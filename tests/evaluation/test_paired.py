"""Intervals over worlds and paired differences: known answers, and what the tables make of them."""

import numpy as np
import pytest

from longtake.evaluation import report
from longtake.evaluation.paired import (
    ROUND_TRIP,
    Share,
    compared,
    interval,
    intervals,
    last_table,
    pairs_table,
    shares,
    switch_table,
)
from longtake.toy.metrics import measure
from longtake.toy.story import sample_story
from longtake.toy.windows import WindowRule

RULE, FRAMES, SWITCH = WindowRule(9, 4), 41, 17
WORLDS = [sample_story(5, index, (SWITCH,)) for index in range(6)]


def scores_of(video_of):
    return [measure(world, video_of(world), RULE) for world in WORLDS]


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    value, low, high = intervals({"count_kept": Share.of(values)})["count_kept"]
    error = values.std(ddof=1) / 20
    assert value == pytest.approx(values.mean()) and high - low == pytest.approx(2 * 1.96 * error, rel=0.08)
    assert interval(Share.of([float("nan")] * 3).means(np.array([[0, 1, 2]] * 4))) is None


def test_a_share_of_sprites_weighs_worlds_by_their_sprites_and_skips_those_without():
    one = Share(np.array([1.0, 0.0, 0.0]), np.array([1.0, 3.0, 0.0]))
    assert intervals({"follow": one})["follow"][0] == 0.25


def test_paired_rows_are_known_better_than_each_alone():
    """The difference of two rows that both depend on the world has the spread of the difference alone."""
    rng = np.random.default_rng(2)
    world, step = rng.normal(0.5, 0.2, 300), rng.normal(0.02, 0.01, 300)
    rows = [{"count_kept": Share.of(world + step), "position_error_px": Share.of(world * 1.3)}]
    rows.append({"count_kept": Share.of(world), "position_error_px": Share.of(world)})
    found = compared(*rows)
    value, low, high = found["count_kept"]
    assert (
        value == pytest.approx(step.mean())
        and low > 0
        and high - low < 0.1 * np.diff(intervals(rows[0])["count_kept"][1:])
    )
    assert found["position_error_px"] == pytest.approx([1.3] * 3)


def test_rows_are_compared_in_the_worlds_in_which_both_were_scored():
    """A world that one of them lost, here the hardest, is left out of both."""
    mine = {"count_kept": Share.of([0.9, 0.8, float("nan")]), "position_error_px": Share.of([2.0, 4.0, float("nan")])}
    theirs = {"count_kept": Share.of([0.8, 0.7, 0.1]), "position_error_px": Share.of([1.0, 2.0, 50.0])}
    for row, other, sign in ((mine, theirs, 1), (theirs, mine, -1)):
        found = compared(row, other)
        assert found["count_kept"] == pytest.approx([0.1 * sign] * 3)
        assert found["position_error_px"] == pytest.approx([2.0**sign] * 3)
    nothing = {"count_kept": Share.of([float("nan")] * 2 + [0.5]), "position_error_px": mine["position_error_px"]}
    assert compared(mine, nothing)["count_kept"] is None


def test_numbers_of_closed_form_videos():
    truth = shares(scores_of(lambda world: world.render(FRAMES)))
    vanished = shares(scores_of(lambda world: np.concatenate(
        [world.render(FRAMES)[:SWITCH], np.repeat(world.background[None], FRAMES - SWITCH, 0)])))  # fmt: skip
    assert intervals(truth)["follow"] == [1.0, 1.0, 1.0] and intervals(truth)["last_lost"][0] == 0
    assert intervals(truth)["after_count_kept"][0] == 1 and intervals(vanished)["after_count_kept"][0] == 0
    assert intervals(vanished)["follow"][0] == 0 and intervals(vanished)["last_lost"][0] > 0.7
    assert (
        compared(vanished, truth)["last_saturation"][0] < 0.7
        and compared(vanished, truth)["after_count_kept"] == [-1.0] * 3
    )


def summary_of(row, others, bits=None):
    found = {"intervals": intervals(row), "windows": {"num_followers": 9}}
    return found | {"compared": {name: compared(row, other) for name, other in others.items()}}


def test_the_tables_say_who_is_compared_with_whom():
    names = [
        "last_motion",
        *(f"last_{n}" for n in ("shape_kept", "colour_kept", "count_kept", "lost", "saturation", "contrast")),
    ]
    names += ["follow", *(f"after_{n}" for n in ("shape_kept", "colour_kept", "count_kept")), "motion"]
    vae, worse = ({name: Share.of([value] * 4) for name in names} for value in (0.8, 0.6))
    rows = {ROUND_TRIP: summary_of(vae, {}), "mine": summary_of(vae, {ROUND_TRIP: vae})}
    rows["other"] = summary_of(worse, {ROUND_TRIP: vae, "mine": vae})
    vae_line, mine, other = (line.split("|")[2:-1] for line in last_table(rows).splitlines()[2:])
    assert [cell.strip() for cell in (vae_line[1], vae_line[5])] == ["80.0%", "1.000"]
    assert other[1].strip() == "60.0% (-20.0 to -20.0)" and other[5].strip() == "0.750 (0.750 to 0.750)"
    assert mine[0].strip() == "0.800 (+0.000 to +0.000)"
    black = summary_of(vae | {"last_saturation": Share.of([float("nan")] * 4)}, {ROUND_TRIP: vae})
    assert last_table({"black": black}).splitlines()[2].split("|")[7].strip() == "-"  # and not that of the round trip
    assert switch_table(rows).splitlines()[4].split("|")[2:4] == [" 9       ", " 60.0% (60.0% to 60.0%) "]
    head, _, line = pairs_table(rows).splitlines()
    assert line.startswith("| other against mine |") and "last saturation x" in head
    assert "-20.0 (-20.0 to -20.0)" in line and "0.750 (0.750 to 0.750)" in line
    assert pairs_table({ROUND_TRIP: rows[ROUND_TRIP]}) == ""


def test_open_directions_are_shown_beside_the_teachers():
    part = {"num_open_worlds": 8, "open_entropy_ci95_bits": [1, 2], "open_stop_rate": 0.0, "stop_rate": 0.0}
    part |= dict.fromkeys(("position_error_px", "motion_ratio", "shape_kept", "count_kept"), 1.0)
    rows = {
        name: {"open_worlds": {**part, "open_entropy_bits": bits}} for name, bits in (("teacher", 2.5), ("mine", 2.4))
    }
    head, _, *lines = report.open_table(rows).splitlines()
    column = [cell.strip() for cell in head.split("|")].index("of teacher")
    assert [line.split("|")[column].strip() for line in lines] == ["100%", "96%"]
    del rows["teacher"]
    assert report.open_table(rows).splitlines()[2].split("|")[column].strip() == "-"


def test_what_was_not_scored_is_left_out_and_what_is_infinite_stays_so():
    every = np.arange(3)[None]
    assert Share.of([1.0, float("nan"), 3.0]).means(every) == 2.0
    assert Share.of([1.0, float("nan"), float("inf")]).means(every) == float("inf")
