"""Each published student's rules, streamed by a tiny model, against its rule evaluated by brute force in float64."""

from dataclasses import replace

import pytest
import students_oracle as published
import torch
from tiny_models import HEIGHT, WIDTH, make_tiny_condition, make_tiny_model, relative_error

from longtake.inference.beginning import Beginning
from longtake.inference.sampling import stream_noise, student_latents
from longtake.rollout.denoise import Denoiser
from longtake.weights.students import read_table

FRAMES = 30
STUDENTS = {student.name: student for student in read_table()[0]}
# Of those with the same rules, one stands for all.
DISTINCT = {repr(rule): name for name, rule in reversed(published.PUBLISHED.items())}.values()


@pytest.fixture(scope="module")
def model():
    return make_tiny_model().eval().requires_grad_(False)


def compared(model, name, *, switch_frame=None, given=None, num_frames=FRAMES, writer=None, judged=None):
    """Relative error of the package's stream by the rules of a student; the judge may have another writer (`judged`)."""
    beginning = Beginning.of(model.config, STUDENTS[name].settings)
    plan = beginning.plan_of(given=given is not None)
    now, later = (make_tiny_condition(model, batch=1, seed=seed) for seed in (1, 8))
    changes = {} if switch_frame is None else {"later": [later], "switch_frames": [switch_frame]}
    options = {"seed": 3, "videos": [0]}
    made = student_latents(
        Denoiser(model, writer=writer), now, given, plan, num_frames, (HEIGHT, WIDTH), **options, **changes
    )
    noise = stream_noise(3, [0], model.config.out_channels, (HEIGHT, WIDTH), "cpu")
    expected = published.stream(
        published.PUBLISHED[name],
        model.state_dict(),
        [now.text, later.text],
        noise,
        num_frames,
        num_heads=model.config.num_heads,
        text_len=model.config.text_len,
        switch_frame=switch_frame,
        given=given,
        writer=None if writer is None else (judged or writer).state_dict(),
    )
    return relative_error(made, expected)


def test_every_student_of_the_table_has_a_published_rule():
    assert STUDENTS.keys() == published.PUBLISHED.keys()
    for name, rule in published.PUBLISHED.items():
        same = DISTINCT and next(other for other in DISTINCT if published.PUBLISHED[other] == rule)
        assert STUDENTS[same].settings.stream_plan == STUDENTS[name].settings.stream_plan


@pytest.mark.parametrize("name", DISTINCT)
def test_a_student_streams_by_its_published_rule(model, name):
    assert compared(model, name) < 1e-5


@pytest.mark.whole
@pytest.mark.parametrize("name", ["LongLive", *(n for n, r in published.PUBLISHED.items() if r.switch == "nothing")])
@pytest.mark.parametrize("switch_frame", [6, 18])
def test_a_switch_of_prompt_by_the_published_law(model, name, switch_frame):
    """At 6 the window is not full, and LongLive makes its sink anew, too."""
    assert compared(model, name, switch_frame=switch_frame) < 1e-5


@pytest.mark.parametrize(
    "name",
    [
        "Causal-Forcing (framewise)",
        "Causal-rCM (chunkwise, 2 steps)",
        "Causal-rCM (framewise, 2 steps, noisy context)",
        "Self-Gradient-Forcing (chunkwise)",
    ],
)
def test_a_picture_zero_shot(model, name):
    """A clean latent as frame 0, then whole blocks, of which the first has the first block's levels; or 3 of a picture."""
    frames = 3 if STUDENTS[name].settings.picture == "still" else 1
    given = torch.randn(1, frames, 4, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    assert compared(model, name, given=given, num_frames=frames + 12) < 1e-5


def test_one_network_denoises_and_another_makes_the_context(model):
    """SGF+: with cross-attention of its own, through switches of prompt and from a picture."""
    writer = make_tiny_model(seed=6).eval().requires_grad_(False)
    name = "Self-Gradient-Forcing+ (chunkwise)"
    given = torch.randn(1, 3, 4, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    assert compared(model, name, writer=writer, num_frames=24, switch_frame=9, given=given) < 1e-5
    for judged in (model, make_tiny_model(seed=7)):  # the network that denoises alone, and another one
        assert compared(model, name, writer=writer, num_frames=12, judged=judged) > 1e-3


def test_another_law_would_be_seen(model, monkeypatch):
    """The bar tells each law from its neighbours."""
    for name, change in (
        ("LongLive", {"sink": 0}),
        ("Self-Gradient-Forcing (chunkwise)", {"rope": "absolute"}),
        ("Causal-rCM (framewise, 2 steps, noisy context)", {"noisy_context": False}),
        ("Causal-rCM (framewise, 2 steps, noisy context)", {"first": published.FOUR, "later": (1.0, 5 / 8)}),
        ("Causal-rCM (chunkwise, 2 steps)", {"clock": float}),
        ("CausVid (3 steps)", {"first": (1.0, 0.757, 0.522)}),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(published.PUBLISHED, name, replace(published.PUBLISHED[name], **change))
            assert compared(model, name, num_frames=18) > 1e-4, (name, change)
