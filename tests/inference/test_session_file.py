"""Sessions on disk: they go on bit for bit, fit only what made them, and files appear whole."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_sessions import KINDS, OTHER, A, B, make_generator, open_session, take

from longtake.errors import CheckpointError, DataError
from longtake.inference.session_file import weights_key


@pytest.mark.parametrize(
    ("kind", "num_before"), [*((kind, 2 + k % 4) for k, kind in enumerate(KINDS)), ("plain", 0), ("plain", 1)]
)
def test_a_resumed_session_goes_on_alike(kind, num_before, tmp_path):
    generator = make_generator(**KINDS[kind])
    session = open_session(generator, seed=2)
    for _ in range(num_before):
        session.next()
    session.save(tmp_path / "s")
    again = make_generator(**KINDS[kind]).resume(tmp_path / "s")  # another process has other objects
    assert (again.num_frames, again.position, again.scene) == (session.num_frames, session.position, session.scene)
    assert (again.prompt, again.rewindable) == (A, 0) and np.array_equal(again.image, session.image)
    assert np.array_equal(take(session, 2), take(again, 2))
    session.prompt = again.prompt = B  # what a rebuild needs was kept, too
    assert np.array_equal(take(session, 2), take(again, 2))
    session.image = again.image = OTHER
    assert np.array_equal(take(session, 2), take(again, 2))


@pytest.mark.parametrize("name", ["prompt", "image", "image_target"])
def test_what_was_asked_for_and_is_not_in_effect_yet_is_saved(generator, name, tmp_path):
    session = open_session(generator)
    take(session, 3)
    session.image_target = OTHER
    take(session, 1)
    setattr(session, name, B if name == "prompt" else None if name == "image_target" else OTHER)
    session.save(tmp_path / "s")
    again = generator.resume(tmp_path / "s", history_blocks=2)
    expected = take(session, 2)
    assert np.array_equal(expected, take(again, 2))
    again.rewind(1)
    session.save(tmp_path / "s")  # over the older one
    assert np.array_equal(take(again, 1)[-1], expected[-1])
    assert np.array_equal(take(generator.resume(tmp_path / "s"), 1), take(session, 1))
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_saving_changes_nothing(generator, tmp_path):
    session, expected = open_session(generator), take(open_session(generator), 4)
    made = []
    for _ in range(4):
        made.append(session.next())
        session.save(tmp_path / "s")
    assert np.array_equal(np.concatenate(made), expected)


# ---- what it fits ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 6}, "other weights of: model;"),
        ({"encoders_seed": 1}, "other weights of: image encoder, text encoder, vae;"),
        ({"_y": False}, "other weights of: image encoder, model;"),
        ({"rope": "absolute"}, "other rules .rope: saved relative, here absolute"),
        ({"height": 64, "steps": [1.0]}, "height: saved 32, here 64; steps: saved .1.0, 0.5., here .1.0."),
        ({"plan": {"block_frames": 2, "window_frames": 7, "sink_frames": 1}}, "plan: saved"),
    ],
)
def test_other_weights_rules_and_sizes_are_named(generator, changes, message, tmp_path):
    session = open_session(generator)
    take(session, 2)
    session.save(tmp_path / "s")
    with pytest.raises(CheckpointError, match=message):
        make_generator(**changes).resume(tmp_path / "s")


def test_rate_and_history_are_free(generator, tmp_path):
    session = open_session(generator)
    take(session, 4)
    session.save(tmp_path / "s")
    again = make_generator(fps=24, history_blocks=3).resume(tmp_path / "s")
    expected = take(again, 3)
    again.rewind(3)
    assert np.array_equal(take(again, 3), expected) and np.array_equal(take(session, 3), expected)


def test_the_key_of_weights_sees_every_row():
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(3, 4)
    torch.nn.init.normal_(layer.weight, generator=generator)
    key = weights_key(layer.state_dict())
    assert weights_key(layer.to(torch.float32).state_dict()) == key
    with torch.no_grad():
        layer.weight.copy_(layer.weight.flip(0))
    assert weights_key(layer.state_dict()) != key, "rows changed places"
    with torch.no_grad():
        layer.weight.copy_(layer.weight.flip(0))
        assert weights_key(layer.state_dict()) == key
        layer.bias[2] = torch.nextafter(layer.bias[2], torch.tensor(9.0))
    assert weights_key(layer.state_dict()) != key and weights_key(layer.to(torch.bfloat16).state_dict()) != key


# ---- files -----------------------------------------------------------------------------------------------------------
def test_files_that_are_no_session_are_refused(generator, tmp_path):
    (tmp_path / "text").write_text("no")
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    session = open_session(generator)
    take(session, 2)
    session.save(tmp_path / "s")
    whole = (tmp_path / "s").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    with safe_open(tmp_path / "s", "pt") as file:
        values = json.loads(file.metadata()["longtake_session"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / "new", {"longtake_session": json.dumps({**values, "version": 4})})
    del tensors["kept.0"], tensors["kept.1"]
    save_file(tensors, tmp_path / "damaged", {"longtake_session": json.dumps(values)})
    for name, message in (
        ("nothing", "cannot be read as a session"),
        ("text", "cannot be read as a session"),
        ("cut", "cannot be read as a session"),
        ("weights.safetensors", "holds no session"),
        ("new", "version 4 and this version reads 3"),
        ("damaged", "is damaged .another checksum"),
    ):
        with pytest.raises(CheckpointError, match=message):
            generator.resume(tmp_path / name)


def test_no_changed_byte_goes_unnoticed(generator, tmp_path):
    """A bit of each of 40 bytes all over the file; and a file of an earlier version, which has no checksum."""
    session = open_session(generator)
    take(session, 1)
    session.save(tmp_path / "s")
    whole = bytearray((tmp_path / "s").read_bytes())
    for place in range(9, len(whole), len(whole) // 40):
        changed = bytearray(whole)
        changed[place] ^= 1
        (tmp_path / "changed").write_bytes(changed)
        with pytest.raises(
            CheckpointError, match="changed (is damaged|cannot be read|is a session of|holds no session)"
        ):
            generator.resume(tmp_path / "changed")
    with safe_open(tmp_path / "s", "pt") as file:
        values = json.loads(file.metadata()["longtake_session"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del values["checksum"]
    save_file(tensors, tmp_path / "old", {"longtake_session": json.dumps(values)})
    assert np.array_equal(take(generator.resume(tmp_path / "old"), 1), take(session, 1))


def test_a_file_that_cannot_be_written_leaves_nothing(generator, tmp_path):
    session = open_session(generator)
    take(session, 2)
    with pytest.raises(DataError, match="cannot be written"):
        session.save(tmp_path / "nowhere" / "s")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="cannot be written"):
        session.save(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert np.array_equal(take(session, 1), take(open_session(generator), 3)[-8:])
