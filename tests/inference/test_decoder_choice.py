"""Which decoder makes the pixels is a choice of a run: from files to frames, records and sessions."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_sessions import PICTURE, A

from longtake.config.generation import GenerationConfig
from longtake.config.stage import TOY_ASSETS
from longtake.encoders.tiny import TinySizes
from longtake.errors import CheckpointError, ConfigError
from longtake.inference.batch import Pair, generate_many
from longtake.inference.frames import to_frames
from longtake.inference.generator import Generator
from longtake.inference.source import TOY_STUDENT, Source
from longtake.parallel.mesh import Mesh

torch.set_num_threads(1)
SMALL = {"height": 32, "width": 32, "plan": {"block_frames": 2, "window_frames": 5, "sink_frames": 1}}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """The toy's encoders with a random TAEHV beside them."""
    folder = tmp_path_factory.mktemp("encoders")
    for part in ("vae", "text_encoder", "image_encoder"):
        (folder / part).symlink_to(TOY_ASSETS / part)
    generator = torch.Generator().manual_seed(0)
    shapes = TinySizes(16, 1).shapes()
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors = {name: t / (t[0].numel() ** 0.5 if t.ndim > 1 else 10) for name, t in tensors.items()}
    save_file(tensors, folder / "taew2_1.safetensors")
    return folder


def source(encoders, **changes) -> Source:
    return Source.of_model(TOY_STUDENT, encoders, None, {**SMALL, "decoder": "tiny", **changes})


@pytest.fixture(scope="module")
def generator(encoders) -> Generator:
    return Generator.build(source(encoders), "cpu")


@pytest.mark.whole
def test_frames_are_those_of_the_decoder(generator, encoders):
    exact = Generator.build(source(encoders, decoder="exact"), "cpu")
    session, other = generator.open(PICTURE, A), exact.open(PICTURE, A)
    frames, real = ([one.next() for _ in range(3)] for one in (session, other))
    kept = session.state.stream.kept
    assert all(
        torch.equal(a, b) for (_, a), (_, b) in zip(kept.blocks(), other.state.stream.kept.blocks(), strict=True)
    )
    latents = torch.cat([block for _, block in kept.blocks()], 1)
    wanted = to_frames(generator.decoder.decoder_session().decode(latents)[0])
    assert np.abs(np.concatenate(frames).astype(int) - wanted).max() <= 1  # by rounding, in other pieces
    assert [chunk.shape for chunk in frames] == [chunk.shape for chunk in real]
    assert np.abs(frames[2].astype(int) - real[2]).max() > 20


@pytest.mark.whole
def test_a_session_goes_on_with_its_decoder_and_no_other(generator, encoders, tmp_path):
    session = generator.open(PICTURE, A, history_blocks=2)
    for _ in range(4):
        session.next()
    session.save(tmp_path / "s")
    wanted = session.next()
    assert np.array_equal(generator.resume(tmp_path / "s").next(), wanted)
    session.rewind(1)
    assert np.array_equal(session.next(), wanted)
    with pytest.raises(CheckpointError, match="decoder: saved tiny, here exact"):
        Generator.build(source(encoders, decoder="exact"), "cpu").resume(tmp_path / "s")
    other = tmp_path / "taew2_1-other.safetensors"
    tensors = {name: tensor * 1.01 for name, tensor in generator.decoder.tensors().items()}
    save_file(tensors, other)
    given = Generator.build(source(encoders, decoder_weights=str(other)), "cpu")
    with pytest.raises(CheckpointError, match="other weights of: decoder"):
        given.resume(tmp_path / "s")


def test_the_choice_is_recorded_with_the_video(encoders, tmp_path):
    from PIL import Image

    Image.fromarray(PICTURE).save(tmp_path / "p.png")
    pairs = [Pair("p", "p", tmp_path / "p.png", A)]
    generate_many(source(encoders), pairs, tmp_path / "out", mesh=Mesh(), num_frames=5)
    assert json.loads((tmp_path / "out" / "p-seed0.json").read_text())["settings"]["decoder"] == "tiny"


def test_a_choice_without_its_file_or_without_sense_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="decoder=light needs lightvaew2_1"):
        Generator.build(source(TOY_ASSETS, decoder="light"), "cpu")
    with pytest.raises(ConfigError, match="decoder_weights=x says nothing with decoder=exact"):
        GenerationConfig.from_tree({"decoder_weights": "x"})
