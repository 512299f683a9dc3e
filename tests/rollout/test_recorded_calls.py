"""Calls of small networks as recorded graphs, backward too: training is what it is when Python makes every call."""

from __future__ import annotations

import logging
import weakref
from dataclasses import replace

import pytest
import torch
from tape import Tape
from tiny_batches import RULES, make_batch
from tiny_models import HEIGHT, WIDTH, make_tiny_condition, make_tiny_latents, make_tiny_model, relative_error
from tiny_objectives import parts_of

from longtake.models.execution import Execution
from longtake.models.recompute import ByBlock
from longtake.models.shared_base import AdapterSwitch
from longtake.objectives.dmd import Dmd, DmdConfig
from longtake.objectives.dmd_keys import CriticConfig
from longtake.objectives.flow_matching import FlowMatching, FlowMatchingConfig
from longtake.objectives.teacher_forcing import TeacherForcing, TeacherForcingConfig
from longtake.rollout import recorded_calls
from longtake.rollout.cuda_graphs import CUDAGraphCapture, CUDAGraphRunner
from longtake.rollout.denoise import Denoiser, denoise_block
from longtake.rollout.recorded_calls import EAGER_CALLS, RecordedCalls

STEPS = 5  # of two micro-batches each; the generator of dmd is updated in every other one


def networks(calls, device="cpu", again=False):
    """Three with `calls`, None: as Python makes them."""
    made = [make_tiny_model(i2v=True, seed=seed).to(device) for seed in range(3)]
    return [model.executed(Execution(recompute=again, calls=calls)) for model in made]


def objective(kind, calls, device="cpu", *, batched=True, graphs=None, again=False):
    student, critic, teacher = networks(calls, device, again)
    if kind == "flow_matching":
        return FlowMatching(parts_of(student), FlowMatchingConfig())
    if kind == "teacher_forcing":
        return TeacherForcing(parts_of(student), TeacherForcingConfig())
    denoiser = Denoiser(student, graphs=graphs, batched_exit_backward=batched)
    settings = DmdConfig(teacher="toy", critic=CriticConfig(updates_per_generator=2))
    return Dmd(parts_of(denoiser, critic, teacher, plan=RULES, num_frames=7), settings)


def trained(objective, device="cpu"):
    """Losses of some iterations of gradient descent, as the loop makes them, and the weights after them."""
    losses = []
    for step in range(STEPS):
        for turn in objective.turns(step):
            weights = list(objective.networks[turn].parameters())
            for indices in ([4 * step, 4 * step + 1], [4 * step + 2, 4 * step + 3]):
                batch = make_batch(objective.networks["generator"], indices)
                batch = replace(
                    batch,
                    condition=batch.condition.to(device),
                    empty_text=batch.empty_text.to(device),
                    latents=batch.latents.to(device),
                    first_latent=batch.first_latent.to(device),
                )
                loss = objective.loss(turn, batch, step).loss
                (loss / 2).backward()
                losses.append(loss.detach().cpu())
            with torch.no_grad():
                for weight in weights:
                    if weight.grad is not None:
                        weight -= 1e-2 * weight.grad
                        weight.grad = None
    return torch.stack(losses), [p.detach().cpu() for net in objective.networks.values() for p in net.parameters()]


@pytest.mark.parametrize(
    ("kind", "again"),
    [
        ("flow_matching", False),
        ("teacher_forcing", True),
        pytest.param("dmd", False, marks=pytest.mark.whole),
        pytest.param("dmd", True, marks=pytest.mark.whole),
    ],
)
def test_training_by_replays_is_training_by_python(kind, again):
    """Bit for bit, where a loss has one call with gradient; with several, a gradient is summed in another order. Two
    micro-batches an update, weights that change, losses of several networks.
    """
    expected, weights = trained(objective(kind, None, batched=False, graphs=CUDAGraphRunner(Tape()), again=again))
    tapes = []

    def tape():
        tapes.append(Tape())
        return tapes[-1]

    calls = RecordedCalls(tape)
    mine = objective(kind, calls, batched=False, graphs=CUDAGraphRunner(Tape()), again=again)
    losses, found = trained(mine)
    most = 1e-6 if kind == "dmd" else 0.0
    assert relative_error(losses, expected) <= most
    assert all(relative_error(a, b) <= most for a, b in zip(found, weights, strict=True))
    assert sum(one.replayed for one in tapes) > 0
    assert all(calls.recorded(network) for network in mine.networks.values())


@pytest.mark.whole
def test_the_exit_steps_of_a_roll_out_are_one_recorded_call():
    """They are made again with their graph, where as ever the layers of the roll-out itself are kept for backward."""
    expected, weights = trained(objective("dmd", None, graphs=CUDAGraphRunner(Tape())))
    calls = RecordedCalls(Tape)
    mine = objective("dmd", calls, graphs=CUDAGraphRunner(Tape()))
    losses, found = trained(mine)
    assert calls.recorded(mine.generator.model) == 1
    assert relative_error(losses, expected) < 1e-5
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(found, weights, strict=True))


def gradients(model, inputs):
    """Of a loss of several calls, all of them made before its backward."""
    condition = make_tiny_condition(model)
    made = [model(x, torch.full((2,), 0.3), condition) for x in inputs]
    sum(one.square().mean() for one in made).backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def test_a_form_that_waits_for_its_backward_is_not_written_over():
    inputs = [make_tiny_latents(7, seed=seed) for seed in range(3)]
    expected = gradients(make_tiny_model(i2v=True), inputs)
    calls = RecordedCalls(Tape)
    model = make_tiny_model(i2v=True).executed(Execution(calls=calls))
    for _ in range(3):
        found = gradients(model, inputs)
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))
    assert calls.recorded(model) == 1
    dropped = model(inputs[0], torch.full((2,), 0.3), make_tiny_condition(model))  # and nobody differentiates it
    del dropped
    (record,) = calls._networks[model].records.values()
    assert not record.waits
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(gradients(model, inputs), expected, strict=True))


def test_weights_elsewhere_and_other_ways_of_recomputing_are_recorded_anew():
    calls = RecordedCalls(Tape)
    model = make_tiny_model(i2v=True).executed(Execution(calls=calls))
    inputs = [make_tiny_latents(7)]
    for _ in range(EAGER_CALLS + 1):
        gradients(model, inputs)
    assert calls.recorded(model) == 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data * 1.1
    plain = model.executed(Execution())
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, inputs), gradients(plain, inputs), strict=True))
    assert calls.recorded(model) == 0
    for _ in range(EAGER_CALLS):
        found = gradients(model, inputs)
    assert calls.recorded(model) == 1
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(plain, inputs), strict=True))


def test_nothing_is_recorded_while_forwards_are_measured():
    """Where `train/keeping.py` has yet to decide what of them is kept."""
    ways, calls = ByBlock([True, False]), RecordedCalls(Tape)
    model = make_tiny_model(i2v=True).executed(Execution(recompute=ways, calls=calls))
    for _ in range(EAGER_CALLS + 2):
        gradients(model, [make_tiny_latents(7)])
        with torch.no_grad():
            gradient_free = model(make_tiny_latents(7), torch.tensor([0.9, 0.3]), make_tiny_condition(model))
    assert not gradient_free.requires_grad and calls.recorded(model) == 0
    assert calls.forms(model.blocks) == 1 and calls.forms(make_tiny_model().blocks) == 0
    gradients(model, [make_tiny_latents(5)])
    assert calls.forms(model.blocks) == 2  # each is to hold memory of its own
    ways.follow([False, False])
    for _ in range(EAGER_CALLS + 1):
        gradients(model, [make_tiny_latents(7)])
    assert calls.recorded(model) == 1


def seen_once(model, times):
    """Calls with gradient against a cache of their own, which nobody has afterwards: what there was of it."""
    cache = model.new_cache(RULES, 2, (HEIGHT, WIDTH), max_frames=7)
    x, condition = make_tiny_latents(1), make_tiny_condition(model)
    for _ in range(times):
        model(x, torch.full((2,), 0.3), condition, cache.view(1, with_grad=True)).sum().backward()
    return weakref.ref(cache)


def test_caches_are_not_kept_and_make_room_for_others(monkeypatch):
    """Each roll-out has a cache of its own where no other lends it one, and so does each long video."""
    monkeypatch.setattr(recorded_calls, "MOST_FORMS", 1)

    def as_a_graph(*works):  # of which what was recorded stays, not the function
        return [(lambda: None, tuple(made.clone() for made in work())) for work in works]

    calls = RecordedCalls(lambda: as_a_graph)
    model = make_tiny_model(i2v=True).executed(Execution(calls=calls))
    for times in (1, EAGER_CALLS + 1, 1, EAGER_CALLS + 1):
        cache = seen_once(model, times)
        assert cache() is None
        assert calls.recorded(model) == (times > 1)
        assert len(calls._networks[model].uses) == 1


def test_what_a_backward_reads_again_is_kept_for_it():
    model = make_tiny_model(i2v=True).executed(Execution(calls=RecordedCalls(Tape)))
    layout = RULES.teacher_forcing_layout(7)
    for _ in range(EAGER_CALLS + 1):
        made = model(make_tiny_latents(14), torch.full((2,), 0.3), make_tiny_condition(model), layout)
    assert made.grad_fn.waits.context is layout
    made.sum().backward()
    assert made.grad_fn.waits is None


def test_exit_steps_keep_their_layers_where_calls_are_never_recorded():
    """Else each of them would be made twice: roles that share a base, say."""
    switch, noise = AdapterSwitch(), make_tiny_latents(RULES.first_frames)
    for updates, kept in ((switch, 2), (None, 0)):
        model = make_tiny_model(i2v=True).executed(Execution(calls=RecordedCalls(Tape), updates=updates))
        denoiser, exits = Denoiser(model, batched_exit_backward=True), []
        cache = model.new_cache(RULES, 2, (HEIGHT, WIDTH), max_frames=7)
        denoise_block(denoiser, cache, make_tiny_condition(model), lambda _: noise, RULES, with_grad=True, exits=exits)
        assert len(exits[0].layers) == kept


def test_what_cannot_be_recorded_runs_as_ever_and_says_so_once(caplog):
    def refuse(*works):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    with caplog.at_level(logging.WARNING):
        losses, weights = trained(objective("teacher_forcing", RecordedCalls(lambda: refuse)))
    expected, others = trained(objective("teacher_forcing", None))
    assert torch.equal(losses, expected) and all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    assert [r.message for r in caplog.records if "CUDA graphs" in r.message] == [
        "calls are not recorded as CUDA graphs, and run as ever: operation not permitted when stream is capturing"
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_work_goes_on_where_it_was_after_a_recording_that_failed():
    x, stream = torch.ones(4, device="cuda"), torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        CUDAGraphCapture()(lambda: (x * x.sum().item(),))
    assert torch.cuda.current_stream() == stream
    assert float((x + 1).sum()) == 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("kind", ["flow_matching", "teacher_forcing", "dmd"])
def test_cuda_graphs_of_forward_and_backward(kind, again):
    """Against Python's calls on the same GPU, whose kernels are the same but for the masks' and the exit steps'."""
    expected, weights = trained(objective(kind, None, "cuda", again=again), "cuda")
    calls = RecordedCalls()
    mine = objective(kind, calls, "cuda", graphs=CUDAGraphRunner(), again=again)
    losses, found = trained(mine, "cuda")
    assert not calls._broken and all(calls.recorded(network) for network in mine.networks.values())
    assert relative_error(losses, expected) < 1e-4
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(found, weights, strict=True))
