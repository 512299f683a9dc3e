"""The original Wan files: loaded, they compute the published formulas; what does not fit is refused by name."""

import math
import shutil

import pytest
import torch
from original_oracles import (
    VaeOracle,
    clip_forward,
    clip_shapes,
    random_state,
    t5_bucket,
    t5_forward,
    t5_shapes,
    vae_shapes,
)

from longtake.encoders.bundle import Encoders, ImageEncoder, TextEncoder, VideoVAE
from longtake.encoders.original import load_image_model, load_text_model, load_vae_module
from longtake.errors import CheckpointError
from longtake.toy import encoders as toy

torch.set_num_threads(1)
T5, CLIP = "models_t5_umt5-xxl-enc-bf16.pth", "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
PROMPTS = ["a small red circle drifts up, a green cross rises", "a blue square falls", ""]


def t5_state(**changes):
    return random_state(t5_shapes(**{"vocabulary": 80, "width": 24, "inner": 32, "hidden": 40, "heads": 4, "layers": 3} | changes))  # fmt: skip


def clip_state():
    state = random_state(clip_shapes(width=32, hidden=80, layers=3, size=56, patch=14, out=8), seed=1)
    # The text half and the temperature, which has no axes.
    return state | {"textual.token_embedding.weight": torch.zeros(7, 3), "log_scale": torch.tensor(4.6)}


def vae_state(*, nested, channels=None):
    channels = channels or (48 if nested else 16)
    return random_state(vae_shapes(8, 12 if nested else 8, channels, nested=nested), seed=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An original Wan folder at a tiny size."""
    path = tmp_path_factory.mktemp("wan")
    torch.save({k: v.bfloat16() for k, v in t5_state().items()}, path / T5)
    torch.save(clip_state(), path / CLIP)
    torch.save(vae_state(nested=False), path / "Wan2.1_VAE.pth")
    toy.build_tokenizer().save_pretrained(path / "google/umt5-xxl")
    return path


def video(frames, height=16, width=24, batch=2):
    return torch.rand(batch, frames, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def statistics(vae):
    return (
        torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.module.config.latents_mean, vae.module.config.latents_std)
    )


def test_shapes_of_the_oracles_are_the_published_ones():
    """Parameter counts of spec B.1, C.1 and C.2; Wan2.2's VAE has 196 tensors."""
    t5 = t5_shapes(vocabulary=256384, width=4096, inner=4096, hidden=10240, heads=64, layers=24)
    clip = clip_shapes(width=1280, hidden=5120, layers=32, size=224, patch=14, out=1024)
    vae = vae_shapes(96, 96, 16, nested=False)
    counts = [sum(map(math.prod, shapes.values())) for shapes in (t5, clip, vae)]
    assert counts == [5_680_910_336, 632_076_800, 126_892_531]
    assert len(vae_shapes(160, 256, 48, nested=True)) == 196


@pytest.mark.parametrize(
    ("load", "shapes"),
    [
        (load_text_model, t5_shapes(256384, 4096, 4096, 10240, 64, 24)),
        (load_image_model, clip_shapes(1280, 5120, 32, 224, 14, 1024)),
        (load_vae_module, vae_shapes(96, 96, 16, nested=False)),
        (load_vae_module, vae_shapes(160, 256, 48, nested=True)),
    ],
    ids=["umT5-xxl", "ViT-H/14", "Wan2.1", "Wan2.2"],
)
def test_published_sizes_fit(tmp_path, load, shapes):
    """Of the full size only names and shapes: all values are one number in memory."""
    torch.save({name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}, tmp_path / "full.pth")
    model = load(tmp_path / "full.pth", "meta", torch.bfloat16)
    unused = 1280 * 1024 if load is load_image_model else 0  # the projection to the text half
    assert sum(p.numel() for p in model.parameters()) == sum(map(math.prod, shapes.values())) - unused


def test_text_encoder_computes_the_formulas(folder):
    encoder = TextEncoder.load(folder / T5, dtype=torch.float32)
    state = {k: v.bfloat16().float() for k, v in t5_state().items()}
    tokens = encoder.tokenizer(PROMPTS, padding="max_length", max_length=48, return_tensors="pt")
    expected = t5_forward(state, tokens.input_ids, tokens.attention_mask)
    hidden = encoder.encode(PROMPTS)
    assert hidden.shape == (3, 48, 24)
    for got, wanted, mask in zip(hidden, expected, tokens.attention_mask.bool(), strict=True):
        torch.testing.assert_close(got[mask], wanted[mask], rtol=0, atol=1e-5)
        assert (got[~mask] == 0).all()


def test_long_texts_reach_the_far_buckets(tmp_path):
    """At 150 tokens every bucket of the position table is used, also the one of everything past 128."""
    assert {t5_bucket(d) for d in range(-149, 150)} == set(range(16)) | set(range(17, 32))
    torch.save(t5_state(), tmp_path / T5)
    toy.build_tokenizer().save_pretrained(tmp_path / "google/umt5-xxl")
    encoder = TextEncoder.load(tmp_path / T5, text_len=150)
    prompt = "a red circle rises, " * 40
    ids = encoder.tokenizer([prompt], max_length=150, truncation=True, return_tensors="pt").input_ids
    expected = t5_forward(t5_state(), ids, torch.ones_like(ids))
    torch.testing.assert_close(encoder.encode([prompt]), expected, rtol=0, atol=1e-5)


def test_text_encoder_in_bfloat16(folder):
    exact = TextEncoder.load(folder / T5).encode(PROMPTS)
    encoder = TextEncoder.load(folder / T5, dtype=torch.bfloat16)
    assert {p.dtype for p in encoder.model.parameters()} == {torch.bfloat16}
    rounded = encoder.encode(PROMPTS)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.15)
    assert torch.equal((rounded == 0).all(-1), (exact == 0).all(-1)) and (rounded[2, 1:] == 0).all()


def test_image_encoder_computes_the_formulas(folder):
    encoder = ImageEncoder.load(folder / CLIP)
    assert (encoder.image_size, encoder.num_tokens, encoder.width) == (56, 17, 32)
    image = video(1, 40, 72)[:, 0]
    expected = clip_forward(clip_state(), encoder.preprocess(image))
    torch.testing.assert_close(encoder.encode(image), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("nested", [False, True], ids=["wan2.1", "wan2.2"])
@pytest.mark.parametrize("frames", [1, 5, 13])
def test_vae_computes_the_formulas(tmp_path, nested, frames):
    state = vae_state(nested=nested)
    torch.save(state, tmp_path / "vae.pth")
    vae, oracle = VideoVAE.load(tmp_path / "vae.pth"), VaeOracle(state)
    assert (vae.temporal_stride, vae.spatial_stride) == (4, 16 if nested else 8)
    assert vae.latent_channels == (48 if nested else 16)
    mean, std = statistics(vae)
    clip = video(frames, 32, 48)
    z = vae.encode(clip)
    wanted = (oracle.encode(clip.transpose(1, 2)) - mean) / std
    torch.testing.assert_close(z, wanted.transpose(1, 2), rtol=0, atol=1e-5)
    wanted = oracle.decode(z.transpose(1, 2) * std + mean).transpose(1, 2)
    torch.testing.assert_close(vae.decode(z), wanted, rtol=0, atol=1e-5)
    assert wanted.abs().max() > 0.1 and wanted.abs().mean() < 0.9  # not all clamped
    decoder, encoder = vae.decoder_session(), vae.encoder_session()
    streamed = torch.cat([decoder.decode(z[:, i : i + 1]) for i in range(z.shape[1])], dim=1)
    torch.testing.assert_close(streamed, wanted, rtol=0, atol=1e-5)
    streamed = torch.cat([encoder.encode(clip[:, i : i + 1]) for i in range(frames)], dim=1)
    torch.testing.assert_close(streamed, z, rtol=0, atol=1e-5)


def test_latent_statistics_are_the_published_ones(tmp_path):
    for nested, first, last in (
        (False, (-0.7571, 2.8184), (-0.2921, 1.9160)),
        (True, (-0.2289, 0.4765), (-0.0667, 0.7744)),
    ):
        torch.save(vae_state(nested=nested), tmp_path / "vae.pth")
        config = load_vae_module(tmp_path / "vae.pth", "cpu", torch.float32).config
        pairs = list(zip(config.latents_mean, config.latents_std, strict=True))
        assert (pairs[0], pairs[-1], len(pairs)) == (first, last, 48 if nested else 16)


def test_steady_index_of_wan2_2(tmp_path):
    torch.save(vae_state(nested=True), tmp_path / "vae.pth")
    vae = VideoVAE.load(tmp_path / "vae.pth", latents_per_call=1)
    index = vae.steady_index
    clip = torch.cat([video(1, batch=1, height=16, width=16), torch.zeros(1, 4 * (index + 2), 3, 16, 16)], dim=1)
    z = vae.encode(clip)
    assert torch.equal(z[:, index], z[:, index + 1]) and torch.equal(z[:, index], z[:, index + 2])


def test_an_original_folder_and_a_mixed_one(folder, tmp_path):
    encoders = Encoders.load(folder, text_dtype=torch.bfloat16, clip_preprocess="diffusers")
    assert encoders.text.model.dtype == torch.bfloat16 and encoders.image.dtype == torch.float32
    assert encoders.vae.dtype == torch.float32 and encoders.text.text_len == toy.TEXT_LEN
    assert not any(p.requires_grad for e in (encoders.vae.module, encoders.text.model) for p in e.parameters())
    image = video(1, 40, 72)[:, 0]
    cut = ImageEncoder.load(folder / CLIP, preprocess="diffusers").encode(image)
    assert torch.equal(encoders.image.encode(image), cut)
    assert not torch.equal(ImageEncoder.load(folder / CLIP).encode(image), cut)
    mixed = shutil.copytree(folder, tmp_path / "mixed")
    encoders.vae.module.save_pretrained(mixed / "vae")  # the converted module is a library model like any other
    with pytest.raises(CheckpointError, match=r"more than one VAE, vae and Wan2.1_VAE.pth; keep one"):
        Encoders.load(mixed)
    (mixed / "Wan2.1_VAE.pth").unlink()
    assert torch.equal(Encoders.load(mixed, with_image=False).vae.encode(video(5)), encoders.vae.encode(video(5)))


def test_what_is_missing_is_named_with_its_source(tmp_path):
    with pytest.raises(CheckpointError) as error:
        Encoders.load(tmp_path)
    for part in (
        "hf download Wan-AI/Wan2.1-T2V-1.3B Wan2.1_VAE.pth",
        "hf download Wan-AI/Wan2.2-TI2V-5B Wan2.2_VAE.pth",
        f"{T5} google/umt5-xxl/tokenizer.json",
        f"hf download Wan-AI/Wan2.1-I2V-14B-480P {CLIP} --local-dir {tmp_path}",
    ):
        assert part in str(error.value)
    with pytest.raises(CheckpointError) as error:
        Encoders.load(tmp_path, with_image=False)
    assert CLIP not in str(error.value)
    torch.save(t5_state(), tmp_path / T5)
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json in .*google/umt5-xxl or .*each Wan repository"):
        TextEncoder.load(tmp_path / T5)
    with pytest.raises(CheckpointError, match=r"gone.pth does not exist"):
        VideoVAE.load(tmp_path / "gone.pth")


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("text", "blocks.1.ffn.gate.0.weight"),
        ("image", "visual.transformer.2.attn.to_qkv.bias"),
        ("vae", "decoder.upsamples.4.shortcut.bias"),
    ],
)
def test_missing_surplus_and_reshaped_keys_are_listed(folder, tmp_path, kind, key):
    make, load, name = {
        "text": (t5_state, TextEncoder.load, T5),
        "image": (clip_state, ImageEncoder.load, CLIP),
        "vae": (lambda: vae_state(nested=False), VideoVAE.load, "Wan2.1_VAE.pth"),
    }[kind]
    shutil.copytree(folder / "google", tmp_path / "google")
    state = make()
    tensor = state.pop(key)
    torch.save(state, tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"1 missing: {key}$"):
        load(tmp_path / name)
    torch.save(state | {key: tensor, key + "_2": tensor}, tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"1 surplus: {key}_2$"):
        load(tmp_path / name)
    torch.save(state | {key: tensor[:-1]}, tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"1 reshaped: {key} .*\d.* instead of "):
        load(tmp_path / name)


def test_files_that_are_something_else_are_refused(folder, tmp_path):
    shutil.copy(folder / CLIP, tmp_path / "vae.pth")
    with pytest.raises(CheckpointError, match=r"no such encoder of Wan: conv2.weight is missing"):
        VideoVAE.load(tmp_path / "vae.pth")
    torch.save(vae_state(nested=False, channels=8), tmp_path / "vae.pth")
    with pytest.raises(CheckpointError, match="8 latent channels, whose mean and std are not published"):
        VideoVAE.load(tmp_path / "vae.pth")
    torch.save({"model": vae_state(nested=False)}, tmp_path / "vae.pth")
    with pytest.raises(CheckpointError, match="something else than tensors by name"):
        VideoVAE.load(tmp_path / "vae.pth")
    torch.save(ImageEncoder, tmp_path / "vae.pth")  # a pickled class: never loaded
    with pytest.raises(CheckpointError, match="ImageEncoder beside its tensors, which is not loaded"):
        VideoVAE.load(tmp_path / "vae.pth")
    state = vae_state(nested=False)
    state["conv1.bias"][1] = torch.inf
    torch.save(state, tmp_path / "vae.pth")
    with pytest.raises(CheckpointError, match=r"conv1.bias of .*vae.pth holds values that are not finite"):
        load_vae_module(tmp_path / "vae.pth", "cpu", torch.float32)
    (tmp_path / "vae.pth").write_bytes((folder / "Wan2.1_VAE.pth").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="zip archive that is cut short; download it again"):
        VideoVAE.load(tmp_path / "vae.pth")


def test_files_of_the_old_format_are_read(tmp_path):
    state = vae_state(nested=False)
    torch.save(state, tmp_path / "vae.pth", _use_new_zipfile_serialization=False)
    loaded = load_vae_module(tmp_path / "vae.pth", "cpu", torch.float32)
    assert torch.equal(loaded.quant_conv.weight, state["conv1.weight"])
