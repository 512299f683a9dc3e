"""Block boundaries, windows and mask layouts against their definitions, written down frame by frame."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_plan import causal_layout, tiny_plan

from longtake.condition import Condition, MaskLayout, VideoShape, latent_frames, pixel_frames
from longtake.errors import ConfigError, ShapeError
from longtake.plan import StreamPlan

PLANS = st.builds(tiny_plan, st.integers(1, 5), st.integers(1, 6))


def _boundaries(plan: StreamPlan, count: int) -> list[int]:
    """0, first, first + n, ...: the definition."""
    return [0] + [plan.first_frames + i * plan.block_frames for i in range(count)]


@given(PLANS, st.integers(1, 60))
def test_blocks_tile_the_frames(plan: StreamPlan, frames: int) -> None:
    edges = _boundaries(plan, 70)
    assert plan.is_boundary(frames) == (frames in edges) and plan.is_boundary(0)
    start, end = plan.block_of(frames)
    assert start <= frames < end and edges.index(end) == edges.index(start) + 1
    assert list(islice(plan.blocks(), 5)) == list(zip(edges[:5], edges[1:6]))
    if frames in edges:
        count = edges.index(frames)
        assert plan.num_blocks(frames) == count
        assert list(plan.blocks(0, frames)) == list(zip(edges[:count], edges[1 : count + 1]))
        assert list(plan.blocks(frames, edges[count + 2])) == [
            (edges[count], edges[count + 1]),
            (edges[count + 1], edges[count + 2]),
        ]
    else:
        for span in ((0, frames), (frames, None)):
            with pytest.raises(ConfigError, match=f"frame {frames} is no block boundary"):
                next(plan.blocks(*span))


@given(PLANS, st.integers(-3, 60))
def test_c_wrong_frame_counts_name_the_nearest_valid_values(plan: StreamPlan, frames: int) -> None:
    # Repair (c).
    valid = _boundaries(plan, 80)[1:]
    if frames in valid:
        plan.check(frames)
        return
    below = max([v for v in valid if v < frames], default=valid[0])
    above = valid[valid.index(below) + 1]
    with pytest.raises(ConfigError) as caught:
        plan.check(frames, "data.num_frames")
    message = str(caught.value)
    assert message.startswith(f"data.num_frames={frames} does not fit the block plan [{plan.first_frames}, ")
    assert message.endswith(f"set it to {below} or {above}")


def test_c_messages_in_words() -> None:
    with pytest.raises(ConfigError, match=r"num_latent_frames=20 .*\[1, 4, 4, \.\.\.\]; set it to 17 or 21"):
        tiny_plan(4).check(20)
    with pytest.raises(ConfigError, match="set it to 3 or 6"):
        causal_layout(tiny_plan(3, 3), 5)
    for values, rule in (
        ({"block": 0}, "block_frames: got 0; must be greater than 0"),
        ({"first": 0}, "first_frames: got 0; must be greater than 0"),
        ({"sink": -1}, "sink_frames: got -1; must be greater than or equal to 0"),
        ({"window": 0}, "window_frames: got 0; must be greater than 0"),
    ):
        with pytest.raises(ConfigError, match=rule):
            tiny_plan(**values)


@given(PLANS, st.one_of(st.none(), st.integers(1, 30)), st.integers(0, 20))
def test_check_window(plan: StreamPlan, window: int | None, sink: int) -> None:
    good_sink = sink in _boundaries(plan, 30)
    room = 0 if window is None else window - sink
    fits = window is None or (room >= plan.block_frames and room % plan.block_frames == 0)
    good = good_sink and fits and (window is None or window >= plan.first_frames)
    if good:
        plan.but(window_frames=window, sink_frames=sink).check_window()
        return
    with pytest.raises(ConfigError) as caught:
        plan.but(window_frames=window, sink_frames=sink).check_window()
    # What the message proposes is accepted.
    proposals = [int(n) for n in str(caught.value).rsplit(" to ", 1)[1].split(" or ")]
    for value in proposals:
        if good_sink:
            plan.but(window_frames=value, sink_frames=sink).check_window()
        else:
            plan.but(sink_frames=value).check_window()


def test_attended_by_the_worked_example() -> None:
    # Specification E.4: window 12, sink 3, blocks of 3.
    plan = tiny_plan(3, 3, 12, 3)
    assert plan.attended(12, 15) == [0, 1, 2, 6, 7, 8, 9, 10, 11]
    assert plan.attended(15, 18) == [0, 1, 2, 9, 10, 11, 12, 13, 14]
    assert plan.attended(0, 3) == [] and tiny_plan(3, 3).attended(9, 12) == list(range(9))
    # M-02: sink frames that do not exist are not attended.
    assert tiny_plan(4, 1, 7, 3).attended(1, 5) == [0]


LAWS = {
    "context": "append",
    "commit_role": "memory",
    "recache": "recompute",
    "sink_law": "ema",
    "rope": "infinite",
}


@pytest.mark.parametrize("name", LAWS)
def test_laws_of_other_students_are_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}(=|: got ){LAWS[name]!r}"):
        tiny_plan(3, **{name: LAWS[name]})


# ---- layouts --------------------------------------------------------------------------------------------------------

LAYOUT_ARGUMENTS = st.tuples(
    st.integers(1, 4), st.integers(1, 4), st.integers(0, 4), st.one_of(st.none(), st.integers(0, 6)), st.integers(0, 5)
)


def _fifo(plan: StreamPlan, frames: int, window: int | None, sink: int) -> dict[int, list[int]]:
    """Frames that each frame's block finds in a cache that evicts first in, first out behind the sink."""
    held: list[int] = []
    found: dict[int, list[int]] = {}
    for start, end in plan.blocks(0, frames):
        while window is not None and len(held) + end - start > window:
            held.pop(sink)
        for frame in range(start, end):
            found[frame] = list(held)
        held += range(start, end)
    return found


def _seen(layout: MaskLayout, query: int) -> list[tuple[int, int]]:
    """(position, entry) of every key that a query entry attends to, in the order of positions."""
    slots = layout.allowed[query].nonzero().flatten().tolist()
    return sorted((int(layout.key_position[s]), int(layout.key_entry[s])) for s in slots)


@settings(deadline=None, max_examples=150)
@given(LAYOUT_ARGUMENTS, st.sampled_from(["absolute", "relative"]), st.booleans())
def test_layouts_equal_a_first_in_first_out_cache(arguments, rope: str, forcing: bool) -> None:
    n, first, later, extra, sink = arguments
    frames = first + later * n
    window = None if extra is None else max(n + sink, first) + extra
    plan = tiny_plan(n, first, window, sink, rope)
    layout = plan.teacher_forcing_layout(frames) if forcing else causal_layout(plan, frames)
    halves = 2 if forcing else 1
    assert layout.num_entries == halves * frames and layout.frame_index.tolist() == list(range(frames)) * halves
    assert layout.allowed.shape == (halves * frames, layout.key_entry.numel())
    found = _fifo(plan, frames, window, sink)
    for query in range(layout.num_entries):
        half, frame = divmod(query, frames)
        block = plan.block_of(frame)
        own = [half * frames + f for f in range(*block)]
        seen = _seen(layout, query)
        # Past frames are always those of the clean half; the block itself is that of the query's half.
        assert [entry for _, entry in seen] == found[frame] + own
        attended = found[frame] + list(range(*block))
        if rope == "relative":
            # Only differences of positions count: they are those of the indices within the attended list.
            relative = [position - frame for position, _ in seen]
            assert relative == [i - attended.index(frame) for i in range(len(attended))]
        else:
            assert [position for position, _ in seen] == attended
    if rope == "absolute" or window is None:
        assert layout.plain_keys


def test_layouts_refuse_blocks_that_a_cache_refuses() -> None:
    with pytest.raises(ConfigError, match=r"frames \[1, 5\) does not fit window_frames=4 .* to 5 or more"):
        causal_layout(tiny_plan(4, 1, 4, 1), 9)
    with pytest.raises(ConfigError, match=r"frames \[0, 4\) does not fit window_frames=2 .* to 4 or more"):
        tiny_plan(2, 4, window=2).teacher_forcing_layout(6)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 4), st.one_of(st.none(), st.integers(1, 9)))
def test_layouts_equal_the_published_inequalities(n: int, first: int, later: int, window: int | None) -> None:
    # Specification E.2 without a sink: end(q) - w <= key < end(q), and for teacher forcing the two halves.
    plan, frames = tiny_plan(n, first), first + later * n
    window = None if window is None else max(window, n, first)
    causal = causal_layout(plan.but(window_frames=window), frames).allowed
    forced = plan.but(window_frames=window).teacher_forcing_layout(frames).allowed
    for q in range(frames):
        start, end = plan.block_of(q)
        for k in range(frames):
            near = window is None or k >= end - window
            assert bool(causal[q, k]) == (k < end and near)
            assert bool(forced[q, k]) == (k < end and near) and not forced[q, frames + k]
            assert bool(forced[frames + q, k]) == (k < start and near)
            assert bool(forced[frames + q, frames + k]) == (start <= k < end)


# ---- sizes and conditions -------------------------------------------------------------------------------------------


@given(st.integers(1, 400), st.sampled_from([1, 2, 4, 8]))
def test_pixel_and_latent_frames(count: int, stride: int) -> None:
    assert latent_frames(pixel_frames(count, stride), stride) == count
    assert pixel_frames(latent_frames(count, stride), stride) >= count
    assert latent_frames(count, stride) == 1 or pixel_frames(latent_frames(count, stride) - 1, stride) < count


def test_video_shape() -> None:
    shape = VideoShape(height=480, width=832, num_latent_frames=21)
    assert (shape.latent_height, shape.latent_width, shape.num_pixel_frames) == (60, 104, 81)
    assert VideoShape(height=64, width=64, num_latent_frames=9).num_pixel_frames == 33
    with pytest.raises(ConfigError, match="height=470 must be a positive multiple of 16; set it to 464 or 480"):
        VideoShape(height=470, width=832, num_latent_frames=21)
    with pytest.raises(ConfigError, match="width=8 must be a positive multiple of 16; set it to 16 or 32"):
        VideoShape(height=480, width=8, num_latent_frames=21)
    with pytest.raises(ConfigError, match="num_latent_frames: got 0; must be greater than 0"):
        VideoShape(height=480, width=832, num_latent_frames=0)


def test_condition() -> None:
    text, image, frames = torch.randn(2, 3, 4), torch.randn(2, 5, 6), torch.randn(2, 7, 20, 4, 4)
    condition = Condition(text, image, frames)
    assert condition.batch_size == 2 and condition != Condition(text, image, frames)
    other = condition.with_text(text + 1)
    assert other.image is image and other.frames is frames and other.text is not text
    half = condition.to("cpu", torch.bfloat16)
    assert half.image is not None and half.frames is not None
    assert {t.dtype for t in (half.text, half.image, half.frames)} == {torch.bfloat16}
    assert Condition(text).to("cpu").image is None
    for arguments in (
        (text[0],),
        (text, image[0]),
        (text, image, frames[0]),
        (text, image[:1]),
        (text, None, frames[:1]),
    ):
        with pytest.raises(ShapeError, match="must"):
            Condition(*arguments)
