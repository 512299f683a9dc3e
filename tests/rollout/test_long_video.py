"""Videos that go on over many steps: the same stream as at inference, and the right window for teacher and critic."""

from itertools import islice

import pytest
import torch
from tiny_batches import RULES
from tiny_codec import STRIDE, TinyCodec
from tiny_models import make_tiny_condition, make_tiny_latents, make_tiny_model, randomize, relative_error
from tiny_plan import tiny_plan

from longtake.errors import ConfigError
from longtake.models.execution import Execution
from longtake.rng import KeyedRNG
from longtake.rollout.denoise import Denoiser, commit_block, denoise_block
from longtake.rollout.long_video import LongStream, Switch
from longtake.rollout.recache import LatentHistory, recache
from longtake.rollout.self_forcing import block_noise_at
from longtake.rollout.stream import LatentStream

HORIZON = 7
T2V = tiny_plan(2, 2, 6, 2, sigmas=RULES.sigmas)


def noise(start, end, step):
    return KeyedRNG(0).noise(step, "x", [0, 1], (end - start, 4, 4, 6), part=start)


def make(i2v=True, switch=None, rules=RULES, batched=False, recompute=False, **options):
    model = make_tiny_model(i2v=i2v).executed(Execution(recompute=recompute))
    condition = make_tiny_condition(model)
    first = make_tiny_latents(1) if i2v else None
    codec = TinyCodec(model.config)
    horizon = HORIZON if i2v else 6
    stream = LongStream(
        Denoiser(model, batched_exit_backward=batched),
        condition,
        first,
        rules,
        (4, 6),
        codec,
        horizon=horizon,
        max_frames=40,
        switch=switch,
        **options,
    )
    return stream, model, condition, first, codec


def latents_of(windows, ends, horizon):
    """All generated latents, from the windows."""
    parts = [windows[0].latents] + [w.latents[:, -(b - a) :] for w, a, b in zip(windows[1:], ends, ends[1:])]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("i2v", [True, False])
@pytest.mark.parametrize("rope", ["relative", "absolute"])
def test_it_is_the_stream_of_inference(i2v, rope):
    rules = (RULES if i2v else T2V).but(rope=rope)
    stream, model, condition, first, _ = make(i2v, rules=rules)
    ends = [7, 13, 17, 23] if i2v else [6, 10, 12, 16]
    windows = [stream.advance(end, noise) for end in ends]
    cache = model.new_cache(rules, 2, (4, 6))
    blocks = LatentStream(Denoiser(model), cache, condition, first, noise, rules)
    expected = torch.cat(list(islice(blocks, rules.num_blocks(ends[-1]))), 1)
    assert torch.equal(latents_of(windows, ends, HORIZON), expected)
    assert stream.position == ends[-1] and not any(window.latents.requires_grad for window in windows)


@pytest.mark.parametrize("i2v", [True, False])
def test_late_windows_begin_with_the_picture_before_their_other_latents(i2v):
    stream, _, condition, _, codec = make(i2v) if i2v else make(False, rules=T2V)
    horizon, ends = (7, [7, 13, 17, 23]) if i2v else (6, [6, 10, 12, 16])
    windows = [stream.advance(end, noise) for end in ends]
    whole = latents_of(windows, ends, horizon)
    assert windows[0].condition is condition and torch.equal(windows[0].latents, whole[:, :horizon])
    assert windows[0].generated.tolist() == [not i2v] + [True] * (horizon - 1)
    for k, (window, end, before) in enumerate(zip(windows[1:], ends[1:], ends)):
        assert window.latents.shape[1] == horizon
        assert torch.equal(window.latents[:, 1:], whole[:, end - horizon + 1 : end])
        assert window.generated.tolist() == [False] * (horizon - (end - before)) + [True] * (end - before)
        # the last pixel frame of the latent before, decoded in the one stream, encoded anew
        last = whole[:, end - horizon, :3] * STRIDE
        assert torch.equal(codec.pictures[k], last)
        picture = codec.encode(last)
        assert torch.equal(window.latents[:, :1], picture.latent)
        assert torch.equal(window.condition.text, condition.text)
        if i2v:
            assert torch.equal(window.condition.image, picture.tokens)
            assert torch.equal(window.condition.frames, picture.frames)
        else:
            assert window.condition.image is None and window.condition.frames is None
    # one decoder, each latent once, in order
    (decoded,) = codec.decoded
    assert torch.equal(torch.stack(decoded, 1), whole[:, : ends[-1] - horizon + 1])


def oracle_with_switch(model, condition, first, later, switch, end):
    """The definition: blocks under the old prompt, a rebuilt cache at the switch, blocks under the new one."""
    cache = model.new_cache(RULES, 2, (4, 6))
    kept, blocks, pending = LatentHistory(RULES), [first], first
    for begin, stop in RULES.blocks(1, end):
        kept.append(pending)
        if begin == switch:
            condition = condition.with_text(later)
            recache(Denoiser(model), cache, condition, kept)
        else:
            commit_block(Denoiser(model), cache, condition, pending)
        pending = denoise_block(Denoiser(model), cache, condition, block_noise_at(noise, begin, stop), RULES).clean
        blocks.append(pending)
    return torch.cat(blocks, 1)


def test_new_weights_are_used_whole_from_the_next_chunk_on():
    """Those of cross-attention too, whose keys and values are kept for a condition: a new object has none kept."""
    stream, model, condition, first, _ = make()
    stream.advance(7, noise)
    cache = model.new_cache(RULES, 2, (4, 6))
    pending = first
    for begin, stop in RULES.blocks(1, 11):
        if begin == 7:
            randomize(model, seed=9)
            condition = condition.with_text(condition.text)
        commit_block(Denoiser(model), cache, condition, pending)
        pending = denoise_block(Denoiser(model), cache, condition, block_noise_at(noise, begin, stop), RULES).clean
    assert torch.equal(stream.advance(11, noise).latents[:, -2:], pending)


@pytest.mark.parametrize("switch", [7, 9, 13, 15])
def test_the_prompt_switches_at_its_frame_and_only_what_follows_is_learnt_from(switch):
    later = make_tiny_condition(make_tiny_model(i2v=True), seed=8).text
    stream, model, condition, first, _ = make(switch=Switch(switch, later))
    ends = [7, 13, 19]
    windows = [stream.advance(end, noise, with_grad=True) for end in ends]
    whole = latents_of(windows, ends, HORIZON).detach()
    assert torch.equal(whole, oracle_with_switch(model, condition, first, later, switch, 19))
    for window, start, end in zip(windows, [1, *ends], ends):
        learns = switch if start < switch < end else start
        assert window.generated.tolist() == [frame >= learns for frame in range(end - HORIZON, end)]
        text = later if end > switch else condition.text
        assert torch.equal(window.condition.text, text)
        # exactly the marked frames carry gradient
        reached = [latent.sum().requires_grad and bool(_grads(latent, model)) for latent in window.latents.unbind(1)]
        assert reached == window.generated.tolist()


def _grads(latent, model):
    weight = model.head.head.weight
    (grad,) = torch.autograd.grad(latent.sum(), weight, retain_graph=True, allow_unused=True)
    return grad is not None and grad.abs().sum() > 0


def test_a_switch_at_the_first_chunk_needs_no_picture_but_the_kept_one():
    later = make_tiny_condition(make_tiny_model(i2v=True), seed=8).text
    stream, model, condition, first, _ = make(switch=Switch(3, later))
    window = stream.advance(7, noise)
    assert torch.equal(window.latents, oracle_with_switch(model, condition, first, later, 3, 7))
    assert window.generated.tolist() == [False] * 3 + [True] * 4


@pytest.mark.parametrize("switch", [None, 9, 15])
def test_checkpointing_and_eviction_inside_the_chunk_change_no_gradient(switch):
    """N.7: what backward recomputes is what the forward saw, though the window rolled on meanwhile."""
    gradients = []
    text = make_tiny_condition(make_tiny_model(i2v=True), seed=8).text
    for checkpointing, together in ((False, False), (True, False), (True, True), (False, True)):
        turn = None if switch is None else Switch(switch, text)
        stream, model, *_ = make(
            spare_frames=HORIZON if checkpointing or together else 0,
            switch=turn,
            batched=together,
            recompute=checkpointing,
        )
        for end in (7, 13, 19):
            model.zero_grad()
            window = stream.advance(end, noise, with_grad=True, exit_step=1)
            (window.latents * window.generated[None, :, None, None, None]).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for other in gradients[1:]:
        assert len(gradients[0]) == len(other) > 20
        for a, b in zip(gradients[0], other):
            assert relative_error(a, b) < 1e-5


def test_memory_does_not_grow_with_the_video():
    def held(stream):
        tensors = [block for _, block in stream.kept.blocks()] + stream._undecoded
        return sum(t.numel() for t in tensors), stream._cache.keys.numel()

    stream, *_ = make()
    stream.advance(7, noise)
    sizes = []
    for end in range(13, 40, 6):
        stream.advance(end, noise)
        sizes.append(held(stream))
    assert len(set(sizes)) == 1


def test_chunks_that_no_window_can_hold_are_refused():
    stream, *_ = make()
    with pytest.raises(ConfigError, match=r"\[1, 5\).*horizon=7.*first call must end there"):
        stream.advance(5, noise)
    stream.advance(7, noise)
    for end in (7, 15):
        with pytest.raises(ConfigError, match="each later one must make fewer"):
            stream.advance(end, noise)
    whole, *_ = make(False, rules=T2V)
    whole.advance(6, noise)
    with pytest.raises(ConfigError, match="each later one must make fewer"):
        whole.advance(12, noise)  # no latent before it would be in the window, to begin with
    assert whole.advance(10, noise).generated.tolist() == [False] * 2 + [True] * 4
    with pytest.raises(ConfigError, match="no block boundary"):
        make(switch=Switch(8, make_tiny_latents(1)))
