"""The rules of the key/value cache: what is never read, never overwritten, never copied, never synchronised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import make_tiny_condition, make_tiny_latents, make_tiny_model, with_self_attention
from tiny_plan import tiny_plan
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longtake.condition import Condition
from longtake.errors import CacheError, ConfigError, ShapeError
from longtake.models.attention import attend
from longtake.models.cache import CacheView, KVCache
from longtake.models.dit import CrossAttention, VideoDiT
from longtake.rollout.denoise import Denoiser

ROPES = ("absolute", "relative")


def _commit(model: VideoDiT, cache: KVCache, condition: Condition, x: Tensor) -> Tensor:
    with torch.no_grad():
        return Denoiser(model)(x, torch.zeros(x.shape[0]), condition, cache, commit=True)


def _passes(model: VideoDiT, cache: KVCache, condition: Condition, blocks: list[int]) -> Iterator[int]:
    """A noisy pass and a commit per block; yields after each block."""
    for i, frames in enumerate(blocks):
        x = make_tiny_latents(frames, cache.batch_size, seed=30 + i)
        with torch.no_grad():
            Denoiser(model)(x, torch.ones(cache.batch_size), condition, cache)
        _commit(model, cache, condition, x)
        yield i


class _Watch(TorchDispatchMode):
    """Counts operators, and keeps the largest new storage and every operator that would wait for the device."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.largest = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[-1]
        self.calls[name] += 1
        if any(wait == name or name.startswith(wait + "_") for wait in self.WAITING):
            self.waits.append(name)
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in known:
            self.largest = max(self.largest, out.untyped_storage().nbytes())
        return out


def test_graded_commit_is_refused_and_graded_calls_never_write() -> None:
    model = make_tiny_model(True)
    condition, x = make_tiny_condition(model), make_tiny_latents(1)
    cache = model.new_cache(tiny_plan(2, 1, 3, 1), 2, (4, 6))
    _commit(model, cache, condition, x)
    before = [t.clone() for t in (cache.keys, cache.values)]
    with pytest.raises(CacheError, match="gradients enabled"):
        Denoiser(model)(x, torch.zeros(2), condition, cache, commit=True)
    Denoiser(model)(x, torch.full((2,), 0.5), condition, cache).sum().backward()
    assert cache.position == 1 and cache.held_frames == [0]
    assert torch.equal(before[0], cache.keys) and torch.equal(before[1], cache.values)
    with torch.no_grad():  # an ungraded pass without commit leaves no trace either
        Denoiser(model)(x, torch.ones(2), condition, cache)
    assert cache.position == 1 and torch.equal(before[0], cache.keys) and torch.equal(before[1], cache.values)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("blocks, window, sink", [([1, 4, 4, 4], 9, 3), ([3, 3, 3, 3], 6, 0), ([1, 4, 4], 9, 5)])
def test_empty_slots_are_never_attended(blocks, window, sink, with_grad: bool, rope: str) -> None:
    # N.12: everything that was not committed is poisoned; any read of it would surface as nan.
    model = make_tiny_model(True)
    condition = make_tiny_condition(model)
    cache = model.new_cache(tiny_plan(2, 1, window, sink, rope), 2, (4, 6), spare_frames=2)
    cache.keys.fill_(float("nan"))
    cache.values.fill_(float("nan"))
    counts: list[int] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, *, mask: Any = None) -> Tensor:
        assert bool(k.isfinite().all()) and bool(v.isfinite().all())
        counts.append(k.shape[1] // cache.tokens_per_frame)
        return attend(q, k, v, mask=mask)

    model = with_self_attention(model, spy)
    done = 0
    for frames in blocks:
        x = make_tiny_latents(frames, seed=done)
        counts.clear()
        with torch.set_grad_enabled(with_grad):
            assert bool(Denoiser(model)(x, torch.ones(2), condition, cache).isfinite().all())
        assert counts == [min(done + frames, window)] * model.config.num_layers
        assert bool(_commit(model, cache, condition, x).isfinite().all())
        done += frames


@pytest.mark.parametrize("rope", ROPES)
def test_a_full_window_repeats_shapes_and_addresses(rope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_model(True)
    condition = make_tiny_condition(model)
    cache = model.new_cache(tiny_plan(2, 1, 7, 1, rope), 2, (4, 6), spare_frames=1)
    readings: list[tuple[tuple[int, ...], list[int]]] = []
    attended: list[tuple] = []
    view_of = KVCache.view

    def spy_view(self: KVCache, block_frames: int, **options: bool) -> CacheView:
        out = view_of(self, block_frames, **options)
        tensors = [t for t in vars(out).values() if isinstance(t, Tensor)]
        readings.append((tuple(t.data_ptr() for t in tensors), out.frame_index.tolist()))
        return out

    def spy(q: Tensor, k: Tensor, v: Tensor, *, mask: Any = None) -> Tensor:
        attended.append((k.shape, v.shape))
        return attend(q, k, v, mask=mask)

    monkeypatch.setattr(KVCache, "view", spy_view)
    model = with_self_attention(model, spy)
    for block in _passes(model, cache, condition, [1] + [3] * 7):
        if block == 1:  # seven frames seen: the window is full from now on
            readings.clear()
            attended.clear()
    assert len(readings) == 12 and len(attended) == 12 * model.config.num_layers
    assert len({address for address, _ in readings}) == 1
    assert [index for _, index in readings[::2]] == [[f, f + 1, f + 2] for f in range(4, 22, 3)]
    assert set(attended) == {((2, 7 * cache.tokens_per_frame, 2, 16),) * 2}


@pytest.mark.parametrize("rope", ROPES)
def test_a_pass_neither_synchronises_nor_copies_the_cache(rope: str) -> None:
    model = make_tiny_model(True)
    condition = make_tiny_condition(model)
    cache = model.new_cache(tiny_plan(2, 1, 17, 1, rope), 2, (4, 6), spare_frames=40)
    blocks = _passes(model, cache, condition, [1] + [4] * 6)
    for _ in range(5):
        next(blocks)
    layer_bytes = cache.keys[0].untyped_storage().nbytes() // len(cache.keys)
    assert layer_bytes == cache.size_bytes // 2 // model.config.num_layers
    with _Watch() as steady:
        next(blocks)
    assert steady.waits == []
    # One layer's cache has 57 frames; what a layer attends to has 17. Nothing as large as the former is ever made.
    assert 0 < steady.largest <= layer_bytes * 17 // 57
    with _Watch() as again:
        next(blocks)
    assert again.calls == steady.calls  # the same operators, whatever the position
    x, sigma = make_tiny_latents(4), torch.ones(2)
    with _Watch() as with_grad:
        Denoiser(model)(x, sigma, condition, cache).sum().backward()
    assert with_grad.waits == [] and with_grad.largest < cache.size_bytes


def test_the_watch_sees_what_it_must_see() -> None:
    with _Watch() as watch:
        x = torch.arange(300.0)
        x.clone()
        x[0].item()
        x.nonzero()
        torch.equal(x, x)
    assert watch.largest >= 1200 and {"_local_scalar_dense", "nonzero", "equal"} <= set(watch.waits)


@pytest.mark.parametrize("rope", ROPES)
def test_position_set_forward_for_a_recache(rope: str, rel) -> None:
    # After a switch the last frames are fed again from their own position: y and RoPE follow the absolute index.
    model, x = make_tiny_model(True), make_tiny_latents(5)
    condition = make_tiny_condition(model, num_frames=9)
    assert condition.frames is not None
    shifted = Condition(condition.text, condition.image, condition.frames[:, 3:])
    late, early = (model.new_cache(tiny_plan(2, 1, 7, 0, rope), 2, (4, 6)) for _ in range(2))
    _commit(model, late, condition, make_tiny_latents(3, seed=77))
    late.clear()
    late.position = 3
    for block in (slice(0, 2), slice(2, 5)):
        a, b = _commit(model, late, condition, x[:, block]), _commit(model, early, shifted, x[:, block])
        assert rel(a, b) < 1e-5
    assert late.position == 8 and late.held_frames == [3, 4, 5, 6, 7] and early.held_frames == [0, 1, 2, 3, 4]
    # RoPE is relative in effect, y is not: at position 0 the same call gives something else.
    early.clear()
    assert rel(_commit(model, early, condition, x[:, :2]), _commit(model, late, condition, x[:, :2])) > 1e-3


@pytest.mark.parametrize("rope", ROPES)
def test_recache_of_the_window_with_the_sink_kept(rope: str, rel) -> None:
    # Going back to the oldest frame of the window and committing the same frames restores the same cache.
    model = make_tiny_model(True)
    condition, x = make_tiny_condition(model), make_tiny_latents(13)
    cache = model.new_cache(tiny_plan(2, 1, 9, 1, rope), 2, (4, 6), spare_frames=4)
    for start, end in ((0, 1), (1, 5), (5, 9), (9, 13)):
        _commit(model, cache, condition, x[:, start:end])
    probe = make_tiny_latents(4, seed=50)
    with torch.no_grad():
        before = Denoiser(model)(probe, torch.ones(2), condition, cache)
    cache.position = 9
    assert cache.held_frames == [0, 1, 2, 3, 4, 5, 6, 7, 8]  # frames 9 to 12 are no context any more
    _commit(model, cache, condition, x[:, 9:13])
    with torch.no_grad():
        after = Denoiser(model)(probe, torch.ones(2), condition, cache)
        assert rel(after, before) < 1e-6
        other = make_tiny_condition(model, seed=99)
        cache.position = 9
        _commit(model, cache, other, x[:, 9:13])
        assert rel(Denoiser(model)(probe, torch.ones(2), condition, cache), before) > 1e-3
    with pytest.raises(CacheError, match="must not be negative"):
        cache.position = -1


def test_condition_frames_stand_still_after_their_last(rel) -> None:
    model = make_tiny_model(True)
    short = make_tiny_condition(model, num_frames=3)
    assert short.frames is not None
    tail = short.frames[:, -1:].expand(-1, 6, -1, -1, -1)
    long = Condition(short.text, short.image, torch.cat([short.frames, tail], 1))
    caches = [model.new_cache(tiny_plan(2, 1, 5, 1), 2, (4, 6)) for _ in range(2)]
    for frames in (1, 2, 2, 2, 2):
        x = make_tiny_latents(frames)
        a, b = (_commit(model, cache, c, x) for cache, c in zip(caches, (short, long)))
        assert torch.equal(a, b)


def test_cross_attention_is_projected_once_for_a_condition(monkeypatch: pytest.MonkeyPatch, rel) -> None:
    model = make_tiny_model(True)
    condition, x = make_tiny_condition(model), make_tiny_latents(1)
    calls: list[Tensor] = []
    project = CrossAttention.project

    def spy(self: CrossAttention, text: Tensor, image: Tensor | None) -> tuple[Tensor, ...]:
        calls.append(text)
        return project(self, text, image)

    monkeypatch.setattr(CrossAttention, "project", spy)
    cache, sigma, layers = model.new_cache(tiny_plan(2, 1, 3, 0), 2, (4, 6)), torch.ones(2), model.config.num_layers

    def count(condition: Condition) -> tuple[int, Tensor]:
        calls.clear()
        with torch.no_grad():
            out = Denoiser(model)(x, sigma, condition, cache)
        return len(calls), out

    first, out = count(condition)
    second, same = count(condition)
    assert (first, second) == (layers, 0) and torch.equal(out, same)
    addresses = [t.data_ptr() for layer in range(layers) for t in cache.cross(layer)]
    other = make_tiny_condition(model, seed=5)
    third, changed = count(other)
    assert third == layers and rel(changed, out) > 1e-3
    # Rebuilt at the same addresses, for a captured graph; an equal but distinct object counts as another condition.
    assert addresses == [t.data_ptr() for layer in range(layers) for t in cache.cross(layer)]
    equal = Condition(condition.text, condition.image, condition.frames)
    fourth, back = count(equal)
    assert fourth == layers and torch.equal(back, out)
    equal.text.add_(0.5)  # changed in place: what was kept is stale
    fifth, moved = count(equal)
    assert fifth == layers and rel(moved, out) > 1e-3
    cache.clear_condition()
    assert count(equal)[0] == layers

    # Graded calls neither use nor replace what is kept.
    kept = [t.clone() for t in cache.cross(0)]
    calls.clear()
    Denoiser(model)(x, sigma, equal, cache).sum().backward()
    assert len(calls) == layers and all(text.requires_grad for text in calls)
    Denoiser(model)(x, sigma, condition, cache)
    assert cache.has_cross(model, equal) and all(torch.equal(a, b) for a, b in zip(kept, cache.cross(0)))
    assert count(equal)[0] == 0


def test_cross_attention_with_tokens_of_another_number_or_type() -> None:
    """What is kept for one condition is no room for that of another kind."""
    model, x, sigma = make_tiny_model(True), make_tiny_latents(1), torch.ones(2)
    condition, cache = make_tiny_condition(model), model.new_cache(tiny_plan(2, 1, 3, 0), 2, (4, 6))
    assert condition.image is not None
    fewer = Condition(condition.text, condition.image[:, :3], condition.frames)
    for one, half in ((condition, False), (fewer, False), (condition, False), (condition, True), (fewer, False)):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            cache.clear_condition()
            found = Denoiser(model)(x, sigma, one, cache)
            assert torch.equal(found, Denoiser(model)(x, sigma, one, model.new_cache(tiny_plan(2, 1, 3, 0), 2, (4, 6))))
            assert all(t.dtype == (torch.bfloat16 if half else torch.float32) for t in cache.cross(0))


@pytest.mark.parametrize("window", [1, 2])
def test_the_smallest_cache_is_that_of_one_sample_and_one_frame(window: int, rel) -> None:
    model, x = make_tiny_model(), make_tiny_latents(1)
    both = make_tiny_condition(model)
    one, two = Condition(both.text[:1]), [model.new_cache(tiny_plan(2, 1, window, 0), n, (4, 6)) for n in (1, 2)]
    for _ in range(3):
        alone, beside = _commit(model, two[0], one, x[:1]), _commit(model, two[1], both, x)
        assert rel(alone, beside[:1]) < 1e-5
    assert two[0].held_frames == two[1].held_frames == [2, 1][:window][::-1]


def test_sizes_that_cannot_work_are_refused() -> None:
    model, x = make_tiny_model(), make_tiny_latents(4)
    condition = make_tiny_condition(model)
    for message, plan, spare in (
        ("needs max_frames", tiny_plan(2), 0),
        ("must be larger than sink_frames", tiny_plan(2, 1, 3, 3), 0),
        ("must not be negative", tiny_plan(2, 1, 3, 0), -1),
    ):
        with pytest.raises(ConfigError, match=message):
            model.new_cache(plan, 2, (4, 6), spare_frames=spare)
    with pytest.raises(ShapeError, match="multiple of the patch"):
        model.new_cache(tiny_plan(2, 1, 3, 0), 2, (5, 6))

    whole = model.new_cache(tiny_plan(2, 1, None, 0), 2, (4, 6), max_frames=6)
    _commit(model, whole, condition, x)
    with pytest.raises(ShapeError, match=r"frames \[4, 8\) do not fit max_frames=6"):
        _commit(model, whole, condition, x)
    _commit(model, whole, condition, x[:, :2])
    assert whole.position == 6 and whole.held_frames == [0, 1, 2, 3, 4, 5]

    small = model.new_cache(tiny_plan(2, 1, 4, 1), 2, (4, 6))
    with pytest.raises(ShapeError, match="set window_frames to 6 or more"):
        _commit(model, small, condition, make_tiny_latents(5))
    _commit(model, small, condition, x)  # nothing lies before it: four frames fit
    with pytest.raises(ShapeError, match="set window_frames to 5 or more"):
        _commit(model, small, condition, x)
    assert small.position == 4 and small.held_frames == [0, 1, 2, 3]


def test_a_commit_that_fails_half_way_leaves_no_readable_frame() -> None:
    model, x = make_tiny_model(), make_tiny_latents(2)
    condition, cache = make_tiny_condition(model), model.new_cache(tiny_plan(2, 1, 4, 0), 2, (4, 6))
    _commit(model, cache, condition, x)
    _commit(model, cache, condition, x)

    calls = []

    def broken(q: Tensor, k: Tensor, v: Tensor, *, mask: Any = None) -> Tensor:
        calls.append(mask)
        if len(calls) == 2:  # layer 0 has already overwritten frames 0 and 1 by then
            raise MemoryError
        return attend(q, k, v, mask=mask)

    with pytest.raises(MemoryError):
        _commit(with_self_attention(model, broken), cache, condition, x)
    assert cache.position == 4 and cache.held_frames == [2, 3]


def test_ungraded_calls_under_inference_mode_and_no_grad_share_a_cache(rel) -> None:
    model, x = make_tiny_model(True), make_tiny_latents(1)
    condition, sigma = make_tiny_condition(model), torch.zeros(2)
    plain = model.new_cache(tiny_plan(2, 1, 3, 1), 2, (4, 6))
    with torch.inference_mode():
        cache = model.new_cache(tiny_plan(2, 1, 3, 1), 2, (4, 6))
    for step in range(6):
        with torch.inference_mode() if step % 2 == 0 else torch.no_grad():
            if step in (3, 4):
                cache.clear_condition()  # made in one mode, rebuilt in the other
            mixed = Denoiser(model)(x, sigma, condition, cache, commit=True)
        assert torch.equal(mixed, _commit(model, plain, condition, x))
    Denoiser(model)(x, sigma, condition, cache).sum().backward()


def test_cache_keeps_the_type_of_the_matrix_products() -> None:
    model = make_tiny_model()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.new_cache(tiny_plan(2, 1, 3, 0), 2, (4, 6)).keys.dtype == torch.bfloat16
    cache = model.cast(torch.bfloat16).new_cache(tiny_plan(2, 1, 3, 0), 2, (4, 6), spare_frames=2)
    assert cache.keys.dtype == torch.bfloat16 and cache.device == torch.device("cpu")
    assert cache.keys.shape == (2, 2, 5, 6, 2, 16) and cache.size_bytes == 2 * 2 * cache.keys.numel()
    assert _commit(model, cache, make_tiny_condition(model), make_tiny_latents(2)).dtype == torch.float32
