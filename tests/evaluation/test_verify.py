"""`longtake verify` on tiny weights of every kind: all is well as they are, and what is broken fails its own line."""

import dataclasses
import gc
import json
import math

import pytest
import torch
from tiny_stage import TEACHER, make_encoders, save_encoders
from tiny_wan import T2V, TI2V, ti2v_encoders, write_model
from typer.testing import CliRunner

from longtake.cli.app import app
from longtake.config.stage import TOY_ASSETS
from longtake.encoders import condition, text
from longtake.encoders.clip import PREPROCESS
from longtake.encoders.vae import VideoVAE
from longtake.errors import ConfigError
from longtake.evaluation import verify as module
from longtake.evaluation.reference import Run
from longtake.evaluation.verify import NOT_CHECKED, PASSED, SUSPICIOUS, WRONG, Check, as_json, as_text, verify
from longtake.inference import sampling
from longtake.models import cache, dit
from longtake.weights.convert import convert

torch.set_num_threads(1)
VELOCITIES = {"velocity at 0.95", "velocity at 0.6", "velocity at 0.15", "teacher, a few steps"}
SMALL = {"height": 32, "width": 64}
NO_CLIP = dataclasses.replace(TEACHER, image_dim=None)
TWO_PICTURES = dataclasses.replace(TEACHER, model_type="flf2v", image_positions=34)  # 2 x (4 x 4 + 1) tokens
RUN = Run(torch.device("cpu"), torch.float32)
# That only trained weights pass: random ones give no picture
PLAUSIBLE = {"VAE, picture seen again, dB", "clip, first frame, dB", "clip, defects", "clip, motion, px a second"}


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Random weights show nothing more in more steps."""
    monkeypatch.setattr(module, "_CLIP_STEPS", 3)


def lines(folder, **options):
    found = list(verify(folder, device="cpu", changes=SMALL, **options))
    assert len({check.name for check in found}) == len(found)
    return {check.name: check for check in found}


def statuses(found, *, but=PLAUSIBLE):
    return {name: check.status for name, check in found.items() if name not in but}


@pytest.fixture(scope="module")
def i2v(tmp_path_factory):
    """A small image-to-video model as it is downloaded, in our layout."""
    return write_model(tmp_path_factory.mktemp("verified") / "i2v", TEACHER, make_encoders())


KINDS = {
    "i2v": (TEACHER, make_encoders, set()),
    "i2v without CLIP": (NO_CLIP, make_encoders, {"CLIP pixels", "CLIP tokens"}),
    "t2v": (T2V, make_encoders, {"CLIP pixels", "CLIP tokens", "y"}),
    "ti2v": (TI2V, ti2v_encoders, {"CLIP pixels", "CLIP tokens"}),
    "flf2v": (TWO_PICTURES, make_encoders, {"teacher, a few steps", "teacher's clip"}),
}


@pytest.mark.parametrize(("config", "encoders", "absent"), KINDS.values(), ids=KINDS)
def test_weights_of_every_kind_pass(tmp_path, config, encoders, absent):
    found = lines(write_model(tmp_path / "model", config, encoders()))
    assert {name for name, check in found.items() if check.status == NOT_CHECKED} == absent
    assert all(found[name].hint and found[name].value is None for name in absent)
    assert {name: status for name, status in statuses(found).items() if status != PASSED} == dict.fromkeys(
        absent, NOT_CHECKED
    )
    assert {check.status for check in found.values()} <= {PASSED, SUSPICIOUS, NOT_CHECKED}
    compared = {"velocity at 0.95", "velocity at 0.6", "velocity at 0.15", "cached against full", "text rows"}
    assert compared | {"VAE latents", "VAE decoding, dB", "VAE round trip, dB"} <= found.keys()
    assert ("latent of the picture" in found) == (config is TI2V)


def test_diffusers_layout_passes(tmp_path):
    """Which has no length of texts: they are of 512 rows."""
    encoders = make_encoders()
    encoders.text.tokenizer.model_max_length = 512
    given = write_model(tmp_path / "ours", dataclasses.replace(TEACHER, text_len=512), encoders)
    save_encoders(encoders, tmp_path / "theirs")
    convert(given, tmp_path / "theirs" / "transformer", "diffusers")
    found = statuses(lines(tmp_path / "theirs"))
    assert set(found.values()) == {PASSED} and "CLIP tokens" in found


@pytest.mark.whole
def test_the_toys_weights_pass_whole(monkeypatch):
    """Trained ones: their clip begins with the picture, moves and has no defect. Guided, too."""
    monkeypatch.setattr(module, "_CLIP_STEPS", 16)
    found = list(verify(TOY_ASSETS / "teacher", device="cpu", guidance=2.0, changes={"height": 64, "width": 64}))
    assert {check.name: check.status for check in found if check.status != PASSED} == {}
    assert {check.name for check in found} >= PLAUSIBLE


def test_no_two_networks_are_loaded(i2v, monkeypatch):
    """What a step loads is gone before the next one loads."""
    freed, left = module._free, []
    networks = {"UMT5EncoderModel", "CLIPVisionModel", "AutoencoderKLWan", "WanTransformer3DModel", "VideoDiT"}

    def free(run):
        freed(run)
        left.extend(name for each in gc.get_objects() if (name := type(each).__name__) in networks)

    gc.collect()  # what other tests left
    gc.disable()
    try:
        monkeypatch.setattr(module, "_free", free)
        assert lines(i2v)["text rows"].status == PASSED
    finally:
        gc.enable()
    assert left == []


@pytest.mark.whole
def test_bfloat16_passes():
    changes = {"height": 64, "width": 64, "precision": "bf16"}
    found = list(verify(TOY_ASSETS / "teacher", device="cpu", guidance=2.0, changes=changes))
    compared = {check.name: check for check in found if check.name not in PLAUSIBLE}
    assert {check.status for check in compared.values()} == {PASSED}
    assert compared["velocity at 0.6"].value > 1e-3  # it was no float32


# ---- one piece broken ------------------------------------------------------------------------------------------------
def break_text_layer(monkeypatch):
    whole = text.TextEncoder.load

    def load(*args, **options):
        encoder = whole(*args, **options)
        with torch.no_grad():
            encoder.model.encoder.block[0].layer[1].DenseReluDense.wo.weight.mul_(1.1)
        return encoder

    monkeypatch.setattr(text.TextEncoder, "load", load)
    return {"text rows"}


def break_pixels(monkeypatch):
    monkeypatch.setitem(PREPROCESS, "original", PREPROCESS["diffusers"])
    return {"CLIP pixels"}


def break_mask(monkeypatch):
    """The picture marked as what is to be made, and the rest as given."""
    whole = condition.with_mask

    def with_mask(latents, stride):
        y = whole(latents, stride)
        y[:, :, :stride] = 1 - y[:, :, :stride]
        return y

    monkeypatch.setattr(condition, "with_mask", with_mask)
    return {"y"}


def break_statistics(monkeypatch):
    """Deviations of another VAE: what is encoded and decoded comes back as it was."""
    monkeypatch.setattr(VideoVAE, "normalise", lambda self, mu: (mu.float() - self._mean) / self._std * 1.5)
    monkeypatch.setattr(VideoVAE, "denormalise", lambda self, z: z.float() / 1.5 * self._std + self._mean)
    return {"y", "VAE latents", "VAE decoding, dB"}


def break_rotation_of_the_past(monkeypatch):
    """The oldest key of a cache is rotated by a frame too much."""
    whole = cache.KVCache.view

    def view(self, *args, **options):
        out = whole(self, *args, **options)
        key_position = out.key_position.clone()
        key_position[: bool(out.num_past)] += 1
        return dataclasses.replace(out, key_position=key_position)

    monkeypatch.setattr(cache.KVCache, "view", view)
    return {"cached against full"}


def break_rotation(monkeypatch):
    """Rows and columns in each other's place."""
    whole = dit.rope_turn
    monkeypatch.setattr(
        dit, "rope_turn", lambda position, height, width, **size: whole(position, height=width, width=height, **size)
    )
    return VELOCITIES


def break_a_name(monkeypatch):
    """Queries and keys of one layer in each other's place."""
    whole = module.load_dit

    def load(*args, **options):
        model = whole(*args, **options)
        attention = model.blocks[1].self_attn
        attention.q, attention.k = attention.k, attention.q
        return model

    monkeypatch.setattr(module, "load_dit", load)
    return VELOCITIES


def break_levels(monkeypatch):
    """Levels of the teacher that were not shifted."""
    monkeypatch.setattr(sampling, "sampling_sigmas", lambda steps, _: [1 - k / steps for k in range(steps + 1)])
    return {"teacher, a few steps"}


BREAKS = [
    break_text_layer,
    break_pixels,
    break_mask,
    break_statistics,
    break_rotation_of_the_past,
    break_rotation,
    break_a_name,
    break_levels,
]


# The command's test breaks levels, too.
_SLOW = {break_pixels, break_statistics, break_rotation, break_levels}


@pytest.mark.parametrize(
    "spoil", [pytest.param(spoil, marks=pytest.mark.slow) if spoil in _SLOW else spoil for spoil in BREAKS]
)
def test_what_is_broken_fails_its_own_line(i2v, monkeypatch, spoil):
    broken = spoil(monkeypatch)
    found = lines(i2v)
    assert {name for name, status in statuses(found).items() if status != PASSED} == broken
    assert {found[name].status for name in broken} == {WRONG} and all(found[name].hint for name in broken)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of weights of every other kind."""
    root = tmp_path_factory.mktemp("kinds")
    return {
        name: write_model(root / name, config, make()) for name, (config, make, _) in KINDS.items() if name != "i2v"
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", [name for name in KINDS if name != "i2v"])
@pytest.mark.parametrize("spoil", BREAKS)
def test_what_is_broken_in_weights_of_another_kind_fails_its_own_line(models, monkeypatch, kind, spoil):
    """A piece that a kind does not have fails nothing."""
    broken, absent = spoil(monkeypatch), KINDS[kind][-1]
    if kind == "ti2v":  # the picture is the first latent, without a mask
        broken = broken - {"y"} | ({"latent of the picture"} if spoil is break_statistics else set())
    found = statuses(lines(models[kind]))
    assert {name for name, status in found.items() if status == WRONG} == broken - absent
    assert {name for name, status in found.items() if status not in (PASSED, WRONG)} == absent


# ---- the command -----------------------------------------------------------------------------------------------------
@pytest.mark.whole
def test_the_command_writes_json_and_exits_with_1_when_something_is_wrong(i2v, tmp_path, monkeypatch):
    words = ["verify", str(i2v), "height=32", "width=64", "--device", "cpu", "--json"]
    fine = CliRunner().invoke(app, [*words, str(tmp_path / "fine.json")])
    assert fine.exit_code == 0, fine.output
    checks = json.loads((tmp_path / "fine.json").read_text())["checks"]
    assert all(check.keys() == {"name", "status", "value", "limit", "hint"} for check in checks)
    assert [check["name"] for check in checks][0] == "text rows" and len(fine.stdout.splitlines()) == len(checks)
    assert json.loads((tmp_path / "fine.json").read_text())["finished"] is True
    told = fine.stderr.splitlines()
    assert [line.split(" s  ")[1] for line in told][:2] == ["text encoder, the library's ...", "text encoder, ours ..."]
    break_levels(monkeypatch)
    wrong = CliRunner().invoke(app, [*words, str(tmp_path / "wrong.json")])
    assert wrong.exit_code == 1 and "wrong       teacher, a few steps" in wrong.stdout
    assert "flow/schedule.py" in wrong.stdout
    checks = json.loads((tmp_path / "wrong.json").read_text())["checks"]
    assert [check["name"] for check in checks if check["status"] == WRONG] == ["teacher, a few steps"]


def test_an_interrupted_run_leaves_the_lines_that_were_done(i2v, tmp_path, monkeypatch):
    """Ctrl-C while the VAE is loaded: what text and picture said is on disk, and that it is not all."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(VideoVAE, "load", interrupted)
    threads = torch.get_num_threads()
    words = ["verify", str(i2v), "height=32", "width=64", "--device", "cpu", "--json", str(tmp_path / "checks.json")]
    assert CliRunner().invoke(app, words).exit_code not in (0, 1)
    found = json.loads((tmp_path / "checks.json").read_text())
    assert [check["name"] for check in found["checks"]] == ["text rows", "CLIP pixels", "CLIP tokens"]
    assert found["finished"] is False and torch.is_grad_enabled() and torch.get_num_threads() == threads


def test_small_networks_run_in_one_thread():
    """Two threads of a small network on busy cores spend five times the time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with module._threads(64):
            assert torch.get_num_threads() == 1
        with module._threads(1536):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_numbers_that_are_none_are_wrong_and_null():
    broken, whole = torch.full((2,), torch.nan), torch.ones(2)
    check = module._relative("a", broken, whole, RUN, "here")
    assert check.status == WRONG and as_json([check], finished=True)["checks"][0]["value"] is None
    assert module._db(whole, whole) == 100 and module._db(0 * whole, whole) == pytest.approx(10 * math.log10(4))
    check = module._at_least("a", module._db(broken, whole), module._db(whole, broken), 1, "here")
    shown = as_json([check], finished=True)["checks"][0]
    assert check.status == WRONG and shown["value"] is None and shown["limit"] is None
    check = module._relative("a", torch.ones(3), whole, RUN, "here")
    assert (check.status, check.hint) == (WRONG, "shape [3], the library's is [2]; here")
    assert [module._judged("a", value, (0.1, 5), "").status for value in (0.1, 0.2, 0.6)] == [PASSED, SUSPICIOUS, WRONG]
    words = ["a", "0.25", "(limit", "1)", "3.2", "s"]
    assert as_text(Check("a", PASSED, 0.25, 1.0, "here"), 3.21).split() == ["passed", *words]
    assert as_text(Check("a", WRONG, 0.25, 1.0, "here"), 3.21).split() == ["wrong", *words, "here"]


def test_guidance_below_none_is_refused(i2v):
    with pytest.raises(ConfigError, match=r"guidance=0\.5 must be at least 1"):
        next(verify(i2v, guidance=0.5))
