"""The embedded world: purity, captions, truth, and the files it is written to."""

import io
import json
import os
import socket

import numpy as np
import pytest
from toy_assets import clause_spans, parse_caption, tokenize

from longtake.config.groups import WorldConfig
from longtake.errors import ConfigError, DataError
from longtake.toy.captions import VOCABULARY, Clause
from longtake.toy.files import write_world
from longtake.toy.world import DIRECTIONS, FPS, SIZE, SPEED_PX, SPEEDS, sample_world, sprite_reach, toroidal_offset

WORLDS = [sample_world(7, index) for index in range(400)]


def test_world_is_a_pure_function_of_seed_and_index():
    first, again, other = sample_world(3, 5), sample_world(3, 5), sample_world(3, 6)
    assert first.sprites == again.sprites and first.caption == again.caption
    assert np.array_equal(first.render(5), again.render(5))
    assert not np.array_equal(first.render(1), other.render(1))


def test_render_has_the_promised_shape_and_a_prefix_does_not_depend_on_length():
    video = WORLDS[0].render(33)
    assert video.shape == (33, SIZE, SIZE, 3) and video.dtype == np.uint8 and FPS == 16
    assert np.array_equal(video[:7], WORLDS[0].render(7))
    frozen = WORLDS[0].render(5, time_scale=0)
    assert (frozen == video[0]).all()


def test_captions_parse_back_exactly():
    words = set()
    for index in range(3000):
        world = sample_world(11, index)
        assert parse_caption(world.caption) == [sprite.clause for sprite in world.sprites], world.caption
        tokens = tokenize(world.caption)
        words.update(tokens)
        assert len(tokens) + 1 < 48  # room for </s> in the toy text length
    assert words == set(VOCABULARY) and list(VOCABULARY) == sorted(VOCABULARY)


def test_the_caption_of_the_issue_parses():
    caption = "a small red circle drifts to the right, a green square climbs quickly"
    assert parse_caption(caption) == [
        Clause("small", "circle", "red", "right", "slow"),
        Clause("medium", "square", "green", "up", "fast"),
    ]
    assert clause_spans(caption) == [0] * 8 + [-1] + [1] * 5


def test_clause_spans_keep_the_and_of_a_diagonal_inside_its_clause():
    caption = "a red circle moves up and to the left, and a blue cross wanders off"
    assert clause_spans(caption) == [0] * 9 + [-1, -1] + [1] * 5
    assert parse_caption(caption)[0].direction == "upper left" and parse_caption(caption)[1].direction is None


@pytest.mark.parametrize(
    "caption",
    [
        "nothing here",
        "a red circle flies right",
        "a red circle moves",
        "a red circle moves left and right",
        "a red circle moves somewhere right",
        "a red blue circle moves right",
        "a circle moves right",
        "a red circle races slowly right",
    ],
)
def test_captions_without_one_meaning_are_refused(caption):
    with pytest.raises(DataError):
        parse_caption(caption)


def test_sampling_covers_everything_with_the_promised_shares():
    assert 0.15 < np.mean([any(s.is_open for s in w.sprites) for w in WORLDS]) < 0.25
    assert max(sum(s.is_open for s in w.sprites) for w in WORLDS) == 1
    assert {len(w.sprites) for w in WORLDS} == {1, 2, 3}
    sprites = [s for w in WORLDS for s in w.sprites]
    assert {(s.direction, s.speed) for s in sprites} == {(d, v) for d in DIRECTIONS for v in SPEEDS}
    for sprite in sprites:
        assert np.hypot(*sprite.velocity) == pytest.approx(SPEED_PX[sprite.speed])
        assert (sprite.clause.direction is None) == (sprite.clause.speed is None) == sprite.is_open


def test_sprites_of_a_world_differ_in_colour_and_start_apart():
    for world in WORLDS:
        assert len({s.colour for s in world.sprites}) == len(world.sprites)
        assert world.visibility(world.positions(1)).min() > 0.999
        starts = world.positions(1)[0]
        for i, a in enumerate(world.sprites):
            for j, b in enumerate(world.sprites[:i]):
                gap = np.hypot(*toroidal_offset(starts[i] - starts[j]))
                assert gap > sprite_reach(a.shape, a.radius) + sprite_reach(b.shape, b.radius)


def test_motion_wraps_and_shifting_moves_every_sprite():
    world = WORLDS[1]
    positions, free = world.positions(200), world.positions(200, wrap=False)
    assert positions.min() >= 0 and positions.max() < SIZE
    assert np.allclose(toroidal_offset(positions - free), 0)
    moved = toroidal_offset(world.shifted(3, -2).positions(9) - world.positions(9))
    assert np.allclose(moved, (3, -2))
    flat = world.shifted(SIZE, 0)
    assert np.array_equal(flat.render(3), world.render(3))


def test_a_sprite_that_crosses_the_edge_is_drawn_on_both_sides():
    world = next(w for w in WORLDS if len(w.sprites) == 1 and w.sprites[0].shape == "square")
    sprite = world.sprites[0]
    seam = world.shifted(-sprite.x, 0).render(1)[0].astype(int) - world.background
    changed = np.abs(seam).sum((0, 2)) > 0
    assert changed[0] and changed[-1] and not changed[SIZE // 2]


def test_a_folder_is_written_once_and_reads_back(tmp_path):
    av, lmdb = pytest.importorskip("av"), pytest.importorskip("lmdb")
    from PIL import Image

    asked = WorldConfig(num_worlds=3, seed=5, num_frames=9)
    folder = write_world(tmp_path / "data", asked)
    worlds = [sample_world(5, index) for index in range(3)]
    rows = [json.loads(line) for line in (folder / "worlds.jsonl").read_text().splitlines()]
    assert rows == [{"seed": 5, "index": w.index, "caption": w.caption} for w in worlds]
    assert sorted(os.listdir(folder)) == ["clips", "images", "lmdb", "world.json", "worlds.jsonl"]
    assert os.listdir(tmp_path) == ["data"]  # nothing temporary is left
    for name, suffix in (("images", "png"), ("clips", "mp4")):
        rows = [json.loads(line) for line in (folder / name / "metadata.jsonl").read_text().splitlines()]
        assert rows == [{"file_name": f"{i:06d}.{suffix}", "text": w.caption} for i, w in enumerate(worlds)]
    assert np.array_equal(np.asarray(Image.open(folder / "images/000001.png")), worlds[1].render(1)[0])
    with av.open(str(folder / "clips/000001.mp4")) as container:
        assert container.streams.video[0].average_rate == FPS
        clip = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    truth = worlds[1].render(9)
    assert clip.shape == truth.shape
    assert 10 * np.log10(255**2 / np.mean((clip.astype(float) - truth) ** 2)) > 32
    with lmdb.open(str(folder / "lmdb/shard_00"), readonly=True, lock=False) as env, env.begin() as read:
        assert (read.get(b"longtake_format"), read.get(b"num_rows")) == (b"1", b"3")
        assert read.get(b"prompts_2_data").decode() == worlds[2].caption
        picture = np.asarray(Image.open(io.BytesIO(read.get(b"img_2_data"))))
    assert np.array_equal(picture, worlds[2].render(1)[0])
    before = (folder / "world.json").stat().st_mtime_ns
    write_world(folder, asked)
    assert (folder / "world.json").stat().st_mtime_ns == before


PICTURES = WorldConfig(num_worlds=1, seed=5, num_frames=2, formats=["images"])


def test_other_contents_are_never_overwritten(tmp_path):
    folder = write_world(tmp_path / "data", PICTURES)
    with pytest.raises(DataError, match="asked for"):
        write_world(folder, PICTURES.model_copy(update={"seed": 6}))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"world\.json"):
        write_world(tmp_path / "mine", PICTURES)
    with pytest.raises(ConfigError, match="formats"):
        WorldConfig.from_tree({"formats": ["gif"]})


def test_a_failed_write_leaves_nothing_and_leftovers_of_killed_runs_go(tmp_path, monkeypatch):
    import longtake.toy.files as files

    leftover = tmp_path / f".tmp-data-{socket.gethostname()}-{2**22 + 1}"  # above any process number
    leftover.mkdir()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files, "_write_images", fail)
    with pytest.raises(OSError, match="disk full"):
        write_world(tmp_path / "data", PICTURES)
    assert os.listdir(tmp_path) == []


def test_clips_are_the_same_bytes_every_time(tmp_path):
    # x264's default rate control is not reproducible; a run's losses would depend on when its data were written.
    for name in ("a", "b", "c"):
        write_world(tmp_path / name, WorldConfig(num_worlds=8, seed=3, num_frames=17, formats=["clips"]))
    written = [[p.read_bytes() for p in sorted((tmp_path / n / "clips").glob("*.mp4"))] for n in ("a", "b", "c")]
    assert written[0] == written[1] == written[2]
