"""VAE sessions against the library's one-shot calls, and the text and image encoders' contracts."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_assets import random_encoders, toy

import longtake
from longtake.config.stage import TOY_ASSETS
from longtake.encoders.bundle import Encoders, ImageEncoder, TextEncoder, VideoVAE
from longtake.encoders.text import clean_prompt
from longtake.errors import CheckpointError, DataError, ShapeError
from longtake.toy.world import sample_world

torch.set_num_threads(1)
TOY_WEIGHTS = Path(longtake.__path__[0]) / "assets" / "toy"


def random_vae(**changes) -> VideoVAE:
    """A small random VAE whose latents have a mean and a std that matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        statistics = {
            "latents_mean": torch.linspace(-0.5, 0.5, 16).tolist(),
            "latents_std": torch.linspace(0.5, 2, 16).tolist(),
        }
        return VideoVAE(toy.build_vae(**{"base_dim": 8, **statistics, **changes}))


@pytest.fixture(scope="module")
def vae() -> VideoVAE:
    return random_vae()


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    return random_encoders(0)


def video(frames: int, batch: int = 1, size: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, frames, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def latents(frames: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, frames, 16, 2, 2, generator=torch.Generator().manual_seed(seed))


def library_encode(vae: VideoVAE, clip: torch.Tensor) -> torch.Tensor:
    mean, std = (
        torch.tensor(v).view(1, 16, 1, 1, 1) for v in (vae.module.config.latents_mean, vae.module.config.latents_std)
    )
    with torch.no_grad():
        return ((vae.module.encode(clip.transpose(1, 2)).latent_dist.mean - mean) / std).transpose(1, 2)


def library_decode(vae: VideoVAE, z: torch.Tensor) -> torch.Tensor:
    mean, std = (
        torch.tensor(v).view(1, 16, 1, 1, 1) for v in (vae.module.config.latents_mean, vae.module.config.latents_std)
    )
    with torch.no_grad():
        return vae.module.decode(z.transpose(1, 2) * std + mean).sample.transpose(1, 2)


def pieces(tensor: torch.Tensor, split: list[int]) -> list[torch.Tensor]:
    assert sum(split) == tensor.shape[1]
    return list(tensor.split(split, dim=1))


@pytest.mark.parametrize("split", [[6], [1] * 6, [2, 4], [1, 5], [3, 2, 1], [0, 4, 0, 2]])
@pytest.mark.parametrize("latents_per_call", [1, 3])
def test_streaming_decode_equals_one_shot_for_any_split(vae, split, latents_per_call):  # spec N.9
    z = latents(6, batch=2)
    session = VideoVAE(vae.module, latents_per_call=latents_per_call).decoder_session()
    streamed = torch.cat([session.decode(piece) for piece in pieces(z, split)], dim=1)
    assert streamed.shape == (2, 21, 3, 16, 16)
    assert session.num_pixel_frames == 21
    torch.testing.assert_close(streamed, library_decode(vae, z), rtol=0, atol=1e-5)


@pytest.mark.parametrize("split", [[17], [1] * 17, [1, 4, 4, 4, 4], [3, 7, 7], [5, 0, 12]])
@pytest.mark.parametrize("latents_per_call", [1, 3])
def test_streaming_encode_equals_one_shot_for_any_split(vae, split, latents_per_call):
    clip = video(17, batch=2)
    session = VideoVAE(vae.module, latents_per_call=latents_per_call).encoder_session()
    streamed = torch.cat([session.encode(piece) for piece in pieces(clip, split)], dim=1)
    assert streamed.shape == (2, 5, 16, 2, 2)
    torch.testing.assert_close(streamed, library_encode(vae, clip), rtol=0, atol=1e-5)
    torch.testing.assert_close(vae.encode(clip), streamed, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperal_downsample": [False, True, True], "dim_mult": [1, 2, 2, 2], "patch_size": None, "in_channels": 3, "out_channels": 3},
        {"temperal_downsample": [False, True, True], "dim_mult": [1, 2, 2, 2], "is_residual": True},
    ],
    ids=["wan2.1", "wan2.2"],
)  # fmt: skip
def test_published_layouts_stream_too(changes):
    vae = random_vae(**changes)
    size = 2 * vae.spatial_stride
    assert (vae.temporal_stride, vae.spatial_stride) == (4, 8 if changes.get("is_residual") is None else 16)
    clip = video(13, size=size)
    z = vae.encode(clip)
    torch.testing.assert_close(z, library_encode(vae, clip), rtol=0, atol=1e-5)
    session = VideoVAE(vae.module, latents_per_call=2).decoder_session()
    streamed = torch.cat([session.decode(piece) for piece in pieces(z, [1, 3])], dim=1)
    torch.testing.assert_close(streamed, library_decode(vae, z), rtol=0, atol=1e-5)


def test_first_latent_depends_on_the_first_frame_only(vae):
    clip = video(9)
    torch.testing.assert_close(vae.encode(clip)[:, :1], vae.encode(clip[:, :1]), rtol=0, atol=1e-5)


def test_sessions_share_a_vae_without_sharing_state():
    vae = random_vae()
    before = set(vars(vae.module))
    clips = [latents(5, seed=seed) for seed in range(3)]
    got: dict[int, torch.Tensor] = {}

    def alone(index: int) -> torch.Tensor:
        session = vae.decoder_session()
        return torch.cat([session.decode(piece) for piece in pieces(clips[index], [1, 2, 2])], dim=1)

    def work(index: int) -> None:
        got[index] = alone(index)

    expected = [alone(index) for index in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(3):
        assert torch.equal(got[index], expected[index])
    vae.encode(video(5))
    assert set(vars(vae.module)) == before and "_feat_map" not in before


def test_steady_index_is_exact_and_follows_the_structure(vae):
    index, vae = vae.steady_index, VideoVAE(vae.module, latents_per_call=1)  # bit for bit: one shape of calls
    picture = video(1, size=16)
    clip = torch.cat([picture, torch.zeros(1, 4 * (index + 3), 3, 16, 16)], dim=1)
    z = vae.encode(clip)
    for later in range(index + 1, index + 4):
        assert torch.equal(z[:, index], z[:, later])
    other = vae.encode(torch.cat([video(1, seed=9), clip[:, 1:]], dim=1))
    assert torch.equal(other[:, index:], z[:, index:])
    assert not torch.equal(other[:, index - 1], z[:, index - 1])
    assert random_vae(num_res_blocks=2).steady_index > index


def test_steady_index_of_the_published_structure():
    structure = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True]}
    vae = random_vae(base_dim=4, patch_size=None, in_channels=3, out_channels=3, **structure)
    assert vae.steady_index == 29  # spec B.3: bit-constant from latent 29 on


def test_steady_index_refuses_weights_with_nan():
    vae = random_vae()
    vae.module.quant_conv.bias.fill_(torch.nan)
    with pytest.raises(CheckpointError, match="NaN"):
        _ = vae.steady_index


def test_encoding_ignores_a_surrounding_autocast(vae):
    clip = video(5)
    with torch.autocast("cpu", torch.bfloat16):
        under = vae.encode(clip)
    assert torch.equal(under, vae.encode(clip))


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (video(4), "cut it to 1 or extend it to 5"),
        (video(5).transpose(1, 2), "B, T, 3, h, w"),
        ((video(5) * 127).to(torch.uint8), "float"),
        (video(5, size=12), "multiples of 8"),
    ],
)
def test_encode_refuses(vae, clip, message):
    with pytest.raises(ShapeError, match=message):
        vae.encode(clip)


def test_sessions_refuse_another_size(vae):
    decoder, encoder = vae.decoder_session(), vae.encoder_session()
    decoder.decode(latents(1))
    encoder.encode(video(1))
    with pytest.raises(ShapeError, match="new session"):
        decoder.decode(latents(1, batch=2))
    with pytest.raises(ShapeError, match="new session"):
        encoder.encode(video(4, size=32))
    with pytest.raises(ShapeError, match=r"\[B, F, 16, H, W\]"):
        decoder.decode(latents(1).transpose(1, 2))


def test_clean_prompt():
    assert clean_prompt("  a &amp;amp; b \n\t c  ") == "a & b c"
    assert clean_prompt("caf\u00c3\u00a9") == "café"


def test_text_rows_past_the_prompt_are_exactly_zero(encoders):
    prompts = ["a small red circle drifts up, a green cross rises", "a blue square falls", ""]
    hidden = encoders.text.encode(prompts)
    assert hidden.shape == (3, toy.TEXT_LEN, 64) and hidden.dtype == torch.float32
    for row, prompt in zip(hidden, prompts):
        length = len(encoders.text.tokenizer(prompt).input_ids)  # counts </s>
        assert (row[:length].abs().sum(-1) > 0).all()
        assert (row[length:] == 0).all()
    # A prompt's rows do not depend on its batch, and neither case nor white space matter.
    alone = encoders.text.encode(["  A small RED circle drifts\nup, a green cross rises"])
    torch.testing.assert_close(alone, hidden[:1], rtol=1e-5, atol=1e-6)


def test_long_prompts_are_cut_at_text_len(encoders, caplog):
    hidden = encoders.text.encode(["a red circle rises, " * 40])
    assert hidden.shape == (1, toy.TEXT_LEN, 64) and (hidden.abs().sum(-1) > 0).all()
    assert "may have been cut" in caplog.text


def test_words_that_the_weights_do_not_know_are_named_once(caplog):
    text = TextEncoder.load(TOY_ASSETS / "text_encoder")
    text.encode(["a Red circle drifts to the right, and a Dog barks", ""])
    (said,) = caplog.messages
    assert said == "These weights do not know what is meant by: Dog, barks; it says nothing to them"
    text.encode(["a Dog sleeps"])
    text.encode(["a Dog barks", "a red circle rises"])
    assert len(caplog.messages) == 2 and "by: sleeps;" in caplog.messages[1]
    many = [f"w{chr(97 + k // 26)}{chr(97 + k % 26)}" for k in range(30)]
    text.encode([" ".join(many)])
    assert caplog.messages[2].count(",") == 20 and ", ...;" in caplog.messages[2]


def test_half_a_character_is_refused(encoders):
    with pytest.raises(DataError, match="holds half a character"):
        encoders.text.encode(["a red \ud83d circle"])


@pytest.mark.parametrize("prompts", ["a red circle", [], [None]])
def test_text_encoder_refuses(encoders, prompts):
    with pytest.raises(DataError, match="list of strings"):
        encoders.text.encode(prompts)


def test_image_tokens_are_the_penultimate_layer(encoders):
    image = video(2)[0]
    tokens = encoders.image.encode(image)
    assert tokens.shape == (2, encoders.image.num_tokens, 64) and encoders.image.encode(image[:1]).shape[0] == 1
    model = encoders.image.model
    changed = [p for name, p in model.named_parameters() if "layers.2." in name or "post_layernorm" in name]
    kept = [p.clone() for p in changed]
    assert changed
    try:
        for p in changed:
            p.fill_(7.0)
        assert torch.equal(encoders.image.encode(image), tokens)
    finally:
        for p, old in zip(changed, kept):
            p.copy_(old)


def test_an_embedding_is_the_last_class_token_after_the_final_norm(encoders):
    image, model = video(2)[0], encoders.image.model
    norm = next(module for name, module in model.named_modules() if name.endswith("post_layernorm"))
    with torch.no_grad():
        last = model(pixel_values=encoders.image.preprocess(image)).last_hidden_state
        expected = norm(last[:, 0])
    assert torch.equal(encoders.image.embed(image), expected) and expected.shape == (2, 64)
    with pytest.raises(ShapeError, match=r"\[B, 3, h, w\]"):
        encoders.image.embed(image[0])


def test_image_preprocessing_is_plain_bicubic_with_clip_statistics(encoders):
    grey = encoders.image.preprocess(torch.zeros(1, 3, 40, 70))
    assert grey.shape == (1, 3, 32, 32)
    expected = (0.5 - np.array([0.48145466, 0.4578275, 0.40821073])) / np.array([0.26862954, 0.26130258, 0.27577711])
    np.testing.assert_allclose(grey.mean(dim=(0, 2, 3)), expected, atol=1e-5)
    # No antialiasing: of a one-pixel stripe pattern at twice the size, every fourth tap misses whole columns.
    stripes = torch.zeros(1, 3, 64, 64)
    stripes[..., 8] = 1
    plain = torch.nn.functional.interpolate(stripes, size=(32, 32), mode="bicubic", align_corners=False)
    got = encoders.image.preprocess(stripes) * torch.tensor(0.26862954) + 0.48145466 - 0.5
    torch.testing.assert_close(got[:, :1] * 2, plain[:, :1], rtol=0, atol=1e-5)


def test_image_encoder_refuses_pixels_for_people(encoders):
    with pytest.raises(ShapeError, match=r"\[B, 3, h, w\]"):
        encoders.image.encode(torch.zeros(1, 64, 64, 3))


def test_random_toy_encoders_depend_on_the_seed_only():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again = random_encoders(1), random_encoders(1)
    assert torch.equal(state, torch.get_rng_state())
    prompt = ["a red circle rises"]
    assert torch.equal(first.text.encode(prompt), again.text.encode(prompt))
    assert not torch.equal(first.text.encode(prompt), random_encoders(2).text.encode(prompt))


def test_folders_round_trip_and_missing_parts_are_named(tmp_path, encoders):
    encoders.vae.module.save_pretrained(tmp_path / "vae")
    encoders.image.model.save_pretrained(tmp_path / "image_encoder")
    encoders.text.model.save_pretrained(tmp_path / "text_encoder")
    with pytest.raises(CheckpointError, match="tokenizer_config.json"):
        Encoders.load(tmp_path)
    encoders.text.tokenizer.save_pretrained(tmp_path / "tokenizer")  # where the library's Wan repositories keep it
    loaded = Encoders.load(tmp_path)
    assert loaded.text.text_len == toy.TEXT_LEN
    prompt, image = ["a red circle rises, unheard of"], video(2)[0]
    assert torch.equal(loaded.text.encode(prompt), encoders.text.encode(prompt))
    assert torch.equal(loaded.image.encode(image), encoders.image.encode(image))
    assert torch.equal(loaded.vae.encode(video(5)), encoders.vae.encode(video(5)))
    assert Encoders.load(tmp_path, with_image=False).image is None
    with pytest.raises(CheckpointError, match="nowhere"):
        Encoders.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="VAE folder"):
        VideoVAE.load(tmp_path / "other")
    (tmp_path / "image_encoder" / "model.safetensors").rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match="image_encoder holds no"):
        ImageEncoder.load(tmp_path / "image_encoder")
    (tmp_path / "image_encoder" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"model.safetensors holds no weights \(it begins with b'damaged'\)"):
        ImageEncoder.load(tmp_path / "image_encoder")
    file = next((tmp_path / "vae").glob("*.safetensors"))
    state = load_file(file)
    state["quant_conv.bias"][1] = torch.nan
    save_file(state, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="quant_conv.bias of .*vae holds values that are not finite"):
        VideoVAE.load(tmp_path / "vae")


def test_missing_and_reshaped_weights_are_refused(tmp_path, encoders):
    folder = tmp_path / "text_encoder"
    encoders.text.model.save_pretrained(folder)
    encoders.text.tokenizer.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in weights if key.endswith("wi_0.weight"))
    save_file({k: v for k, v in weights.items() if k != name}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="1 missing.*wi_0"):
        TextEncoder.load(folder)
    save_file({**weights, name: weights[name][:5].clone()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="wi_0"):
        TextEncoder.load(folder)


def test_shipped_toy_weights_keep_sprites_where_they_are():
    from longtake.toy.metrics import measure

    encoders = Encoders.load(TOY_WEIGHTS)
    scores = []
    for index in range(3):
        world = sample_world(90_210, index)
        clip = torch.from_numpy(world.render(17)).permute(0, 3, 1, 2)[None].float() / 127.5 - 1
        z = encoders.vae.encode(clip)
        decoded = ((encoders.vae.decode(z)[0].permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()
        scores.append(measure(world, decoded))
        assert 0.3 < z.std() < 3 and abs(z.mean()) < 0.5  # normalised
    assert np.mean([score.psnr.mean() for score in scores]) > 30
    assert np.mean([np.nanmean(score.position_error) for score in scores]) < 0.25  # pixels
    assert encoders.text.text_len == toy.TEXT_LEN
    assert encoders.text.tokenizer.get_vocab() == toy.build_tokenizer().get_vocab()
    right, left = encoders.text.encode(["a red circle goes to the right", "a red circle goes to the left"])
    assert (right - left).norm(dim=-1)[:3].min() > 1  # every word of the clause knows the direction
    assert encoders.image.encode(clip[0, :1]).shape == (1, 17, 64)


# ---- one past for all copies -----------------------------------------------------------------------------------------
def test_a_past_that_is_made_anew_is_the_same_bit_for_bit():
    vae = random_vae(temperal_downsample=[False, True, True], dim_mult=[1, 1, 1, 1], num_res_blocks=1, patch_size=None,
                     in_channels=3, out_channels=3)  # fmt: skip
    reach, z, other = vae.network.reach, latents(40), latents(4, seed=1)
    assert reach == 30
    session, alone = vae.decoder_session(), vae.decoder_session()
    for start, end in ((0, 1), (1, 6), (6, 10), (10, 11), (11, 32)):
        assert torch.equal(session.decode(z[:, start:end]), alone.decode(z[:, start:end]))
    before = session.copy()
    assert torch.equal(session.copy().decode(other), alone.fork().decode(other))  # overwrites what `session` had
    assert sum(chunk.shape[1] for chunk in before._recent) < reach + 4
    assert torch.equal(session.decode(z[:, 32:]), alone.decode(z[:, 32:]))
    assert torch.equal(before.decode(z[:, 32:36]), alone_from(vae, z, 36)[:, -16:])
    states = [[kept for kept in one._held.past if kept is not None] for one in (session, alone)]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def alone_from(vae: VideoVAE, z: torch.Tensor, frames: int) -> torch.Tensor:
    session = vae.decoder_session()
    parts = ((0, 1), (1, 6), (6, 10), (10, 11), (11, 32), (32, frames))
    return torch.cat([session.decode(z[:, start:end]) for start, end in parts], 1)


def test_a_decode_that_fails_is_made_again_from_what_was_before(vae, monkeypatch):
    from longtake.encoders.wan_vae import WanDecoder

    z, session = latents(7), vae.decoder_session()
    wanted = vae.decode(z)
    session.decode(z[:, :3])
    made, calls = WanDecoder.__call__, []

    def failing(self, *args, **given):
        calls.append(made(self, *args, **given))  # the past is overwritten
        if len(calls) == 1:
            raise KeyboardInterrupt
        return calls[-1]

    monkeypatch.setattr(WanDecoder, "__call__", failing)
    with pytest.raises(KeyboardInterrupt):
        session.decode(z[:, 3:])
    assert session.num_latent_frames == 3
    torch.testing.assert_close(session.decode(z[:, 3:]), wanted[:, 9:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperal_downsample": [False, True, True], "dim_mult": [1, 1, 1, 1], "patch_size": None, "in_channels": 3, "out_channels": 3},
        {"temperal_downsample": [True, True], "dim_mult": [1, 1, 1], "num_res_blocks": 1},
    ],
)  # fmt: skip
def test_no_latent_is_remembered_longer_than_the_networks_reach(changes):
    vae = random_vae(**{"base_dim": 4, **changes})
    session = vae.decoder_session()
    session.decode(torch.full((1, 1, 16, 1, 1), torch.nan))
    for count in range(1, vae.network.reach + 1):
        assert any(kept is not None and kept.isnan().any() for kept in session._held.past), count
        session.decode(torch.zeros(1, 1, 16, 1, 1))
    assert not any(kept is not None and kept.isnan().any() for kept in session._held.past)
