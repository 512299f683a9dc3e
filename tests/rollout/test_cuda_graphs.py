"""Recorded passes: what a CUDA graph would read and write is where it was, so replaying equals running."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from tape import Tape
from tiny_models import make_tiny_condition, make_tiny_latents, make_tiny_model, relative_error
from tiny_plan import tiny_plan

from longtake.models.execution import Execution
from longtake.rollout.cuda_graphs import CUDAGraphRunner, _Passes, forget_all
from longtake.rollout.denoise import Denoiser
from longtake.rollout.self_forcing import roll_out
from longtake.rollout.stream import LatentStream

RULES = tiny_plan(2, 1, 5, 1, sigmas=(1.0, 0.8, 0.5))


def noise(start, end, step, batch=2):
    generator = torch.Generator().manual_seed(100 * start + step)
    return torch.randn(batch, end - start, 4, 4, 6, generator=generator)


def stream(denoiser, condition, blocks, rules=RULES):
    cache = denoiser.model.new_cache(rules, 2, (4, 6))
    return LatentStream(denoiser, cache, condition, make_tiny_latents(1), noise, rules), blocks


def unrolled(denoiser, condition, blocks=8, rules=RULES, change=None):
    running, blocks = stream(denoiser, condition, blocks, rules)
    made = []
    for number in range(blocks):
        if change is not None and number == blocks - 3:
            running.change(change)
        made.append(running.next())
    return torch.cat(made, 1)


@pytest.mark.parametrize("rope", ["relative", "absolute"])
@pytest.mark.parametrize("i2v", [True, False])
def test_a_replayed_stream_equals_the_one_that_python_runs(i2v, rope):
    model = make_tiny_model(i2v)
    denoiser = Denoiser(model)
    condition, other = make_tiny_condition(model), make_tiny_condition(model, seed=8)
    rules = RULES.but(window_frames=5, sink_frames=1, rope=rope, sigmas=RULES.sigmas)
    expected = unrolled(denoiser, condition, rules=rules, change=other)
    tape = Tape()
    denoiser.graphs = CUDAGraphRunner(tape)
    assert torch.equal(unrolled(denoiser, condition, rules=rules, change=other), expected)
    assert tape.recorded >= 1 and tape.replayed >= 3 * 2  # the blocks after the first eight passes of one kind


@pytest.mark.whole
def test_roll_outs_share_a_cache_and_see_new_weights_conditions_and_captions():
    model = make_tiny_model(i2v=True)
    denoiser = Denoiser(model)
    rules = RULES

    def both(condition):
        graphs, denoiser.graphs = denoiser.graphs, None
        expected = roll_out(denoiser, condition, make_tiny_latents(1), noise, rules, 9, (4, 6)).latents
        denoiser.graphs = graphs
        made = roll_out(denoiser, condition, make_tiny_latents(1), noise, rules, 9, (4, 6)).latents
        assert torch.equal(made, expected)
        return made

    tape = Tape()
    denoiser.graphs = CUDAGraphRunner(tape)
    seen = [both(make_tiny_condition(model, seed=seed)) for seed in range(1, 9)]  # until all of its passes are recorded
    assert not torch.equal(seen[0], seen[1]) and tape.replayed > 0
    before, recorded = tape.replayed, tape.recorded
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)  # as an optimizer does it: where they are
    both(make_tiny_condition(model, seed=5))
    assert tape.replayed > before and tape.recorded == recorded
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data * 0.9  # somewhere else: recorded passes would read the old ones
    for _ in range(4):
        both(make_tiny_condition(model, seed=5))
    assert tape.recorded > recorded


@pytest.mark.parametrize("i2v", [True, False])
@pytest.mark.parametrize("together", [False, True])
def test_every_pass_of_a_roll_out_is_replayed_in_the_end(i2v, together):
    """The first one too, which makes the keys and values of a condition."""
    model, tape = make_tiny_model(i2v=i2v), Tape()
    denoiser = Denoiser(model, graphs=CUDAGraphRunner(tape), batched_exit_backward=together)
    condition = make_tiny_condition(model)
    plan = tiny_plan(2, 1 if i2v else 2)
    rules = plan.but(window_frames=6, sink_frames=2, sigmas=RULES.sigmas)

    def passes(condition):
        before = tape.replayed
        first, frames = (make_tiny_latents(1), 9) if i2v else (None, 8)
        made = roll_out(denoiser, condition, first, noise, rules, frames, (4, 6), with_grad=together).latents
        if together:
            made.sum().backward()
        return tape.replayed - before

    for _ in range(3):
        passes(condition)
    # four blocks of three steps; the last block has no context pass, the picture has one
    assert passes(make_tiny_condition(model, seed=9)) == 4 * 3 + (4 if i2v else 3)


@pytest.mark.parametrize("together", [False, True])
def test_a_graded_roll_out_keeps_its_cache_until_its_backward(together):
    model = make_tiny_model(i2v=True)
    model = model.executed(Execution(recompute=True))
    denoiser = Denoiser(model, graphs=CUDAGraphRunner(Tape()), batched_exit_backward=together)
    condition = make_tiny_condition(model)

    def gradients(between):
        made = roll_out(
            denoiser, condition, make_tiny_latents(1), noise, RULES, 9, (4, 6), exit_step=1, with_grad=True
        ).latents
        if between:
            roll_out(denoiser, make_tiny_condition(model, seed=9), make_tiny_latents(1), noise, RULES, 9, (4, 6))
        model.zero_grad()
        made.square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for _ in range(4):  # until passes are replayed
        expected = gradients(between=False)
    assert all(torch.equal(a, b) for a, b in zip(gradients(between=True), expected, strict=True))


def refuse(work):
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


def test_what_cannot_be_recorded_runs_as_ever_and_says_so_once(caplog):
    model = make_tiny_model(i2v=True)
    denoiser = Denoiser(model)
    condition = make_tiny_condition(model)
    expected = unrolled(denoiser, condition)
    denoiser.graphs = CUDAGraphRunner(refuse)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(unrolled(denoiser, condition), expected)
        assert torch.equal(unrolled(denoiser, condition), expected)
    assert [r.message for r in caplog.records if "CUDA graphs" in r.message] == [
        "passes are not captured as CUDA graphs, and run as ever: operation not permitted when stream is capturing"
    ]


def test_copies_of_a_cache_and_forgotten_passes_are_recorded_anew():
    model, tape = make_tiny_model(i2v=True), Tape()
    denoiser = Denoiser(model)
    denoiser.graphs = CUDAGraphRunner(tape)
    running, _ = stream(denoiser, make_tiny_condition(model), 0)
    for _ in range(8):
        running.next()
    graphs = denoiser.graphs
    assert graphs.captured(running.cache) and not graphs.captured(running.cache.copy())
    forget_all()
    assert not graphs.captured(running.cache)


def test_static_outputs_are_made_once():
    """Later captures write to the addresses of the first."""
    passes, latents, made = _Passes(), torch.Size([2, 1]), [torch.zeros(3), torch.ones(2, 2)]
    passes.make_static(latents, made)
    static = passes.static[latents]
    assert [tensor.shape for tensor in static] == [tensor.shape for tensor in made]
    passes.make_static(latents, made)
    passes.make_static(torch.Size([2, 2]), [])
    assert list(passes.static) == [latents] and all(a is b for a, b in zip(passes.static[latents], static))


class SharedTape(Tape):
    """As CUDA's recorder: results lie in memory that all recorded passes share, and who records must be alone."""

    def __init__(self):
        super().__init__()
        self.memory, self.running, self.wrong = {}, 0, 0

    @contextmanager
    def alone(self):
        self.running += 1
        try:
            time.sleep(0.002)  # another thread would come now
            if self.running > 1:
                self.wrong += 1
                raise RuntimeError("operation not permitted when stream is capturing")
            yield
        finally:
            self.running -= 1

    def _record(self, work):
        with self.alone():
            self.recorded += 1
            outputs = tuple(self.memory.setdefault(made.shape, torch.empty_like(made)) for made in work())

        def replay():
            self.replayed += 1
            self.running += 1
            made = work()
            self.running -= 1
            with torch.no_grad():
                for output, one in zip(outputs, made, strict=True):
                    output.copy_(one)
            time.sleep(0.002)

        return replay, outputs


def together(works):
    """What several functions give, each in a thread of its own; they begin at once."""
    begin = threading.Barrier(len(works))
    with ThreadPoolExecutor(len(works)) as pool:
        return [done.result() for done in [pool.submit(lambda w=work: (begin.wait(), w())[1]) for work in works]]


def test_streams_of_several_threads_do_not_mix():
    """Each with a condition of its own: eager passes, recording and replays of the three run into each other."""
    model = make_tiny_model(i2v=True)
    denoiser = Denoiser(model)
    conditions = [make_tiny_condition(model, seed=seed) for seed in (1, 8, 9)]

    def works():
        return [lambda c=condition, k=k: unrolled(denoiser, c, blocks=7 + k) for k, condition in enumerate(conditions)]

    expected = [work() for work in works()]
    tape = SharedTape()
    denoiser.graphs = CUDAGraphRunner(tape)
    for made, wanted in zip(together(works()), expected, strict=True):
        assert torch.equal(made, wanted)
    assert not tape.wrong and not denoiser.graphs._broken and tape.recorded >= 3 and tape.replayed > 9


OTHER_DEVICE = """
import torch
from longtake.rollout.cuda_graphs import CUDAGraphCapture

wait = torch.cuda.synchronize
x = torch.ones(4, device="cuda:0")
busy = torch.randn(8192, 8192, device="cuda:1", dtype=torch.bfloat16)
CUDAGraphCapture()(lambda: (x * 2,))
expected = (busy @ busy)[:2, :2].clone()
wait(1)
for _ in range(1000):
    product = busy @ busy
kept = product[:2, :2].clone()
del product  # free for torch, in use by the other device for a second to come
((replay, (out,)),) = CUDAGraphCapture()(lambda: (x * 2,))
replay()
wait(1)
assert out.tolist() == [2.0] * 4 and torch.equal(kept, expected)
"""


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_recording_takes_no_memory_that_another_device_uses():
    """pytorch/pytorch 196258: with growing segments that ended with an illegal address."""
    settings = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    command = [sys.executable, "-c", OTHER_DEVICE]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture
def uncompiled(monkeypatch):
    """What is fused elsewhere runs as it is: of these tiny sizes compiling takes minutes, and says nothing of graphs."""
    monkeypatch.setattr("longtake.models.execution.has_triton", lambda: False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bf16", [False, True])
def test_cuda_graphs_give_the_same_latents(bf16, request):
    if not bf16:
        request.getfixturevalue("uncompiled")
    model = make_tiny_model(i2v=True).cuda()
    denoiser = Denoiser(model)
    condition = make_tiny_condition(model).to("cuda")

    def on_gpu(start, end, step):
        return noise(start, end, step).cuda()

    def run():
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            cache = model.new_cache(tiny_plan(2, 1, 5, 1), 2, (4, 6))
            running = LatentStream(denoiser, cache, condition, make_tiny_latents(1).cuda(), on_gpu, RULES)
            made = torch.cat([running.next() for _ in range(9)], 1)
        return made, cache

    plain, _ = run()
    denoiser.graphs = CUDAGraphRunner(refuse)
    expected, _ = run()
    assert relative_error(expected, plain) < (2e-2 if bf16 else 1e-4)  # another kernel of attention, fused work
    denoiser.graphs = CUDAGraphRunner()
    made, cache = run()
    assert denoiser.graphs.captured(cache) and not denoiser.graphs._broken
    torch.testing.assert_close(made, expected, rtol=0, atol=0)
    del cache  # the last one that holds recorded passes: their memory is gone, and others are recorded
    made, cache = run()
    assert denoiser.graphs.captured(cache) and not denoiser.graphs._broken
    torch.testing.assert_close(made, expected, rtol=0, atol=0)
    rolled = [
        roll_out(denoiser, condition, make_tiny_latents(1).cuda(), on_gpu, RULES, 9, (4, 6)).latents for _ in range(6)
    ]
    assert all(torch.equal(one, rolled[0]) for one in rolled)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("own_streams", [False, True])
def test_three_threads_of_streams_equal_one_after_the_other(own_streams, uncompiled):
    """LONGTAKE_TRIALS (2) times three threads of 60 blocks each (bfloat16), recorded; needs torch alone."""
    sizes = {"dim": 256, "ffn_dim": 512, "num_heads": 4, "num_layers": 6}
    model = make_tiny_model(i2v=True, **sizes).cuda().cast(torch.bfloat16).requires_grad_(False)
    denoiser = Denoiser(model)
    conditions = [make_tiny_condition(model, seed=seed).to("cuda") for seed in (1, 8, 9)]
    noises = {(s, k): noise(s, s + 2, k).cuda() for s in range(1, 121, 2) for k in range(3)}

    def run(number):
        stream = torch.cuda.Stream() if own_streams else torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            cache, first = model.new_cache(tiny_plan(2, 1, 5, 1), 2, (4, 6)), make_tiny_latents(1, seed=number).cuda()
            running = LatentStream(denoiser, cache, conditions[number], first, lambda s, e, k: noises[s, k], RULES)
            made = []
            for block in range(60):
                if block in (25, 45):
                    running.change(conditions[(number + block) % 3])
                made.append(running.next().cpu())
        return torch.cat(made, 1), denoiser.graphs.captured(cache)

    denoiser.graphs = CUDAGraphRunner(refuse)
    expected = [run(number)[0] for number in range(3)]
    for trial in range(int(os.environ.get("LONGTAKE_TRIALS", "2"))):
        denoiser.graphs = CUDAGraphRunner()
        for number, (made, recorded) in enumerate(together([lambda n=n: run(n) for n in range(3)])):
            assert recorded and not denoiser.graphs._broken, trial
            assert torch.equal(made, expected[number]), (trial, number)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bf16", [False, True])
def test_exit_steps_together_from_replayed_passes(bf16, uncompiled):
    """Gradients of a roll-out whose steps were replayed, against one block at a time by Python."""

    def on_gpu(start, end, step):
        return noise(start, end, step).cuda()

    found = {}
    for together in (False, True):
        model = make_tiny_model(i2v=True).cuda().executed(Execution(recompute=True))
        denoiser = Denoiser(model, batched_exit_backward=together)
        denoiser.graphs = CUDAGraphRunner() if together else None
        condition = make_tiny_condition(model).to("cuda")
        for _ in range(5):
            model.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
                made = roll_out(
                    denoiser, condition, make_tiny_latents(1).cuda(), on_gpu, RULES, 9, (4, 6), with_grad=True
                )
                loss = made.latents.square().mean()
            loss.backward()
        assert not together or (denoiser.graphs.captured(denoiser._pool[1]) and not denoiser.graphs._broken)
        found[together] = [p.grad for p in model.parameters() if p.grad is not None]
    for one, other in zip(found[False], found[True], strict=True):
        assert relative_error(one, other) < (5e-2 if bf16 else 1e-4)
