"""Decoders in the VAE's place against evaluations of the published networks written here; no code is shared."""

import math

import pytest
import torch
import torch.nn.functional as F
from original_oracles import vae_shapes
from safetensors.torch import save_file
from toy_assets import toy

from longtake.encoders.decoders import TinyDecoder, load_decoder, random_decoder
from longtake.encoders.tiny import TinySizes
from longtake.encoders.vae import VideoVAE
from longtake.errors import CheckpointError, ConfigError

torch.set_num_threads(1)

KINDS = {"taew2_1": (16, 1), "taew2_2": (48, 2), "taew2_2_super": (48, 2)}
SPLITS = ([5], [1] * 5, [1, 4], [3, 0, 2])


# ---- the published networks: names, shapes and formulas of specification Q -------------------------------------------
def names_and_shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """Of the decoder's tensors."""
    channels, patch = KINDS[kind]
    out = 3 * patch * patch
    if kind.endswith("super"):
        found = {"0.weight": (512, channels, 1, 1), "22.weight": (out, 64, 3, 3), "22.bias": (out,)}
        for start, n, after, grow in ((1, 512, 256, 1), (8, 256, 128, 2), (15, 128, 64, 2)):
            for i in range(start, start + 3):
                found |= {f"{i}.conv.0.weight": (2 * n, 1, 7, 7), f"{i}.conv.1.weight": (4 * n, 2 * n, 1, 1)}
                found |= {f"{i}.conv.1.bias": (4 * n,), f"{i}.conv.3.weight": (n, 4 * n, 1, 1)}
            found |= {f"{start + 3}.weight": (4 * after, n, 3, 3), f"{start + 3}.bias": (4 * after,)}
            found[f"{start + 6}.conv.weight"] = (grow * after, after, 1, 1)
    else:
        found = {"1.weight": (256, channels, 3, 3), "1.bias": (256,), "22.weight": (out, 64, 3, 3), "22.bias": (out,)}
        for start, n, after, grow in ((3, 256, 128, 1), (9, 128, 64, 2), (15, 64, 64, 2)):
            for i in range(start, start + 3):
                for part, inputs in ((0, 2 * n), (2, n), (4, n)):
                    found |= {f"{i}.conv.{part}.weight": (n, inputs, 3, 3), f"{i}.conv.{part}.bias": (n,)}
            found |= {f"{start + 4}.conv.weight": (grow * n, n, 1, 1), f"{start + 5}.weight": (after, n, 3, 3)}
    return {f"decoder.{name}": shape for name, shape in found.items()}


def random_state(kind: str, dtype=torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in names_and_shapes(kind).items():
        scale = (2 / math.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.2
        state[name] = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    state["decoder.22.weight"] *= 0.002 if kind.endswith("super") else 0.02  # pixels between 0 and 1
    state["decoder.22.bias"] = torch.full_like(state["decoder.22.bias"], 0.5)
    return state


def published_decode(state: dict[str, torch.Tensor], kind: str, z: torch.Tensor) -> torch.Tensor:
    """A whole video at once, [B, T, 3, h, w] in [-1, 1]."""
    batch, patch = z.shape[0], KINDS[kind][1]

    def conv(x, name, padding=1, groups=1):
        name = f"decoder.{name}"
        return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), padding=padding, groups=groups)

    def before(x):
        frames = x.unflatten(0, (batch, -1))
        return torch.cat([torch.zeros_like(frames[:, :1]), frames[:, :-1]], 1).flatten(0, 1)

    def block(x, i):
        both = torch.cat([x, before(x)], 1)
        if kind.endswith("super"):
            inner = conv(conv(both, f"{i}.conv.0", 3, both.shape[1]), f"{i}.conv.1", 0)
            return x + conv(F.relu(inner), f"{i}.conv.3", 0)
        inner = F.relu(conv(F.relu(conv(both, f"{i}.conv.0")), f"{i}.conv.2"))
        return F.relu(conv(inner, f"{i}.conv.4") + x)

    def grow(x, name):
        n = x.shape[1]
        return conv(x, f"{name}.conv", 0).reshape(-1, n, *x.shape[2:])  # group j of the channels is frame j

    x = z.flatten(0, 1)
    if kind.endswith("super"):
        x = conv(x, "0", 0)
        for start in (1, 8, 15):
            for i in range(start, start + 3):
                x = block(x, i)
            x = grow(F.pixel_shuffle(F.relu(conv(x, str(start + 3))), 2), str(start + 6))
    else:
        x = F.relu(conv(3 * torch.tanh(x / 3), "1"))
        for start in (3, 9, 15):
            for i in range(start, start + 3):
                x = block(x, i)
            x = conv(grow(F.interpolate(x, scale_factor=2.0, mode="nearest"), str(start + 4)), str(start + 5))
        x = F.relu(x)
    pixels = F.pixel_shuffle(conv(x, "22"), patch).unflatten(0, (batch, -1))
    return pixels[:, 3:].clamp(0, 1) * 2 - 1


def latents(channels: int, frames: int = 5, batch: int = 2, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, frames, channels, 1, 2, generator=generator, dtype=torch.float64).to(dtype)


def tiny(kind: str, dtype=torch.float64, **options) -> TinyDecoder:
    return TinyDecoder(TinySizes(*KINDS[kind], kind.endswith("super")), random_state(kind, dtype), **options)


def vae_of(channels: int) -> VideoVAE:
    """A narrow VAE of Wan2.1's or Wan2.2's strides whose latents have a mean and a std that matter."""
    shape = {} if channels == 16 else {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2}
    statistics = {
        "latents_mean": torch.linspace(-0.5, 0.5, channels).tolist(),
        "latents_std": torch.linspace(0.5, 2, channels).tolist(),
    }
    if channels == 16:
        shape |= {"patch_size": None, "in_channels": 3, "out_channels": 3}
    sizes = {"base_dim": 8, "dim_mult": [1, 2, 2, 2], "temperal_downsample": [False, True, True], "z_dim": channels}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return VideoVAE(toy.build_vae(**{**sizes, **statistics, **shape}))


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_of_weights_are_the_published_ones(kind):
    shapes = names_and_shapes(kind)
    assert TinySizes(*KINDS[kind], kind.endswith("super")).shapes() == shapes
    counts = {"taew2_1": 9_844_611, "taew2_2": 9_923_532, "taew2_2_super": 18_993_420}
    assert sum(map(math.prod, shapes.values())) == counts[kind]


@pytest.mark.whole
@pytest.mark.parametrize("kind", ["taew2_1", "taew2_2", pytest.param("taew2_2_super", marks=pytest.mark.slow)])
def test_any_split_is_the_published_network_at_once(kind):
    z = latents(KINDS[kind][0])
    wanted = published_decode(random_state(kind), kind, z)
    assert wanted.shape == (2, 17, 3, *(n * 8 * KINDS[kind][1] for n in (1, 2)))
    assert (wanted.abs() < 1).double().mean() > 0.5 and wanted.std() > 0.05  # not all clamped, not all grey
    for split in SPLITS:
        decoder = tiny(kind, latents_per_call=1 + len(split) % 3)
        session, counts = decoder.decoder_session(), []
        for part in z.split(split, dim=1):
            counts.append(session.decode(part))
        assert [made.shape[1] for made in counts] == [4 * n - 3 * (k == 0) if n else 0 for k, n in enumerate(split)]
        torch.testing.assert_close(torch.cat(counts, 1), wanted, rtol=0, atol=1e-12)
        assert session.num_pixel_frames == 17


def test_a_reset_is_fresh_and_copies_do_not_touch_each_other():
    decoder, z = tiny("taew2_1", torch.float32), latents(16, 12, 1, torch.float32)
    other = z.flip(1)
    whole, fresh = decoder.decoder_session().decode(z), decoder.decoder_session()
    session = decoder.decoder_session()
    assert torch.equal(session.decode(z[:, :9]), whole[:, :33])
    at_once = fresh.decode(torch.cat([z[:, :9], other[:, :3]], 1))
    for branch in (session.copy(), session.fork()):
        assert torch.equal(branch.decode(other[:, :3]), at_once[:, 33:])
    # The first of the copies has overwritten the past that this one had: it is made anew.
    assert torch.equal(session.decode(z[:, 9:]), whole[:, 33:])
    pasts = [[t.data_ptr() for t in one._held.past if t is not None] for one in (session, branch)]
    assert len(pasts[0]) == 9 and not set(pasts[0]) & set(pasts[1])


def test_a_latent_reaches_no_further_than_what_is_kept():
    decoder, z = tiny("taew2_1", torch.float32), latents(16, 14, batch=1, dtype=torch.float32)
    z[:, 3] = torch.nan
    bad = decoder.decoder_session().decode(z).isnan().any(dim=4).any(dim=3).any(dim=2)[0].nonzero()[:, 0]
    assert bad[0] == 4 * 3 - 3  # the first frame of latent 3, and the last one that it reaches is a frame of latent
    assert (bad[-1] + 3) // 4 == 3 + decoder.network.reach == 11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_other_types(dtype):
    z = latents(16, dtype=torch.float32)
    wanted = published_decode(random_state("taew2_1"), "taew2_1", z.double()).float()
    frames = tiny("taew2_1", dtype).decoder_session().decode(z)
    assert frames.dtype == torch.float32
    assert (frames - wanted).norm() / wanted.norm() < (1e-5 if dtype == torch.float32 else 5e-2)


# ---- files -----------------------------------------------------------------------------------------------------------
def write(folder, name: str, state) -> None:
    folder.mkdir(exist_ok=True)
    if name.endswith(".pth"):
        torch.save(state, folder / name)
    else:
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / name)


def with_encoder(state):
    return state | {"encoder.0.weight": torch.zeros(64, 3, 3, 3)}


def load(folder, kind="tiny", weights=None, channels=16):
    return load_decoder(kind, weights, folder, vae_of(channels), "cpu", torch.float32)


@pytest.mark.whole
@pytest.mark.parametrize("name", ["taew2_1.pth", "taew2_2.safetensors", "taew2_2_super.safetensors"])
def test_published_files_are_found_and_read(tmp_path, name):
    kind = name.partition(".")[0]
    state, channels = random_state(kind, torch.float32), KINDS[kind][0]
    write(tmp_path, name, with_encoder(state))
    z = latents(channels, dtype=torch.float32)
    wanted = published_decode(state, kind, z)
    for weights in (None, tmp_path / name):
        decoder = load(tmp_path, weights=weights, channels=channels)
        torch.testing.assert_close(decoder.decoder_session().decode(z), wanted, rtol=0, atol=5e-5)


@pytest.mark.parametrize("channels", [16, 48])
def test_lighttae_reads_latents_that_are_not_normalised(tmp_path, channels):
    kind = {16: "taew2_1", 48: "taew2_2"}[channels]
    state, vae = random_state(kind, torch.float32), vae_of(channels)
    write(tmp_path, f"light{kind}.pth", with_encoder(state))
    z = latents(channels, dtype=torch.float32)
    mean, std = (
        torch.tensor(v).view(1, 1, -1, 1, 1) for v in (vae.module.config.latents_mean, vae.module.config.latents_std)
    )
    wanted = published_decode(state, kind, z * std + mean)
    frames = load(tmp_path, channels=channels).decoder_session().decode(z)
    torch.testing.assert_close(frames, wanted, rtol=0, atol=5e-5)
    assert (frames - published_decode(state, kind, z)).abs().max() > 0.1


def test_more_grown_frames_than_ours_are_the_last_ones(tmp_path):
    state = random_state("taew2_1", torch.float32)
    more = {**state, "decoder.7.conv.weight": torch.cat([torch.randn(256, 256, 1, 1), state["decoder.7.conv.weight"]])}
    write(tmp_path, "taew2_1.pth", more)
    z = latents(16, dtype=torch.float32)
    frames = load(tmp_path).decoder_session().decode(z)
    torch.testing.assert_close(frames, published_decode(state, "taew2_1", z), rtol=0, atol=5e-5)


@pytest.mark.whole
def test_wrong_files_are_refused(tmp_path):
    state = random_state("taew2_1", torch.float32)
    with pytest.raises(CheckpointError, match=r"needs taew2_1 or lighttaew2_1 .* in .*empty, or decoder_weights=FILE"):
        load(tmp_path / "empty")
    with pytest.raises(ConfigError, match="decoder=light is not published for 48 latent channels"):
        load(tmp_path, "light", channels=48)
    with pytest.raises(CheckpointError, match="does not exist"):
        load(tmp_path, weights=tmp_path / "taew2_1.pth")
    write(tmp_path, "decoder.pth", state)
    with pytest.raises(CheckpointError, match="must begin with taew2_1 or lighttaew2_1"):
        load(tmp_path, weights=tmp_path / "decoder.pth")
    write(tmp_path / "two", "taew2_1.pth", state)
    write(tmp_path / "two", "lighttaew2_1.pth", state)
    with pytest.raises(CheckpointError, match="holds lighttaew2_1.pth and taew2_1.pth; say which"):
        load(tmp_path / "two")
    write(tmp_path / "kind", "taew2_2.pth", random_state("taew2_2_super", torch.float32))
    with pytest.raises(CheckpointError, match=r"do not fit the TAEHV decoder taew2_2; keys \d+ missing"):
        load(tmp_path / "kind", channels=48)
    less = {name: tensor for name, tensor in state.items() if name != "decoder.14.weight"}
    for number, wrong in enumerate(
        (less, state | {"decoder.23.weight": torch.zeros(1)}, state | {"decoder.1.bias": torch.zeros(3)})
    ):
        write(tmp_path / f"w{number}", "taew2_1.safetensors", wrong)
        with pytest.raises(CheckpointError, match="do not fit the TAEHV decoder taew2_1"):
            load(tmp_path / f"w{number}")
    write(tmp_path / "nan", "taew2_1.pth", state | {"decoder.1.bias": torch.full((256,), torch.nan)})
    with pytest.raises(CheckpointError, match="decoder.1.bias of .* finite"):
        load(tmp_path / "nan")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_lightvae_is_a_narrow_vae(tmp_path, suffix):
    shapes = vae_shapes(24, 24, 16, nested=False)
    assert sum(map(math.prod, shapes.values())) == 8_035_003
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(shape, generator=generator)
        * (1 if "gamma" in name or len(shape) < 2 else math.prod(shape[1:]) ** -0.5)
        for name, shape in shapes.items()
    }
    write(tmp_path, f"lightvaew2_1{suffix}", state)
    decoder = load(tmp_path, "light")
    assert decoder.module.config.base_dim == 24
    torch.save(state, tmp_path / "vae.pth")
    oracle = VideoVAE.load(tmp_path / "vae.pth")
    z = latents(16, 3, 1, torch.float32)
    assert torch.equal(decoder.decoder_session().decode(z), oracle.decode(z))
    del state["decoder.head.2.bias"]
    write(tmp_path, f"lightvaew2_1{suffix}", state)
    with pytest.raises(CheckpointError, match="decoder.head.2.bias"):
        load(tmp_path, "light")


def test_random_decoders_have_the_sizes_of_the_vae():
    for channels, kind in ((16, "tiny"), (48, "tiny"), (16, "light")):
        vae = vae_of(channels)
        decoder = random_decoder(kind, vae, torch.device("cpu"), torch.float32)
        frames = decoder.decoder_session().decode(latents(channels, 2, 1, torch.float32))
        assert frames.shape == (1, 5, 3, vae.spatial_stride, 2 * vae.spatial_stride) and frames.isfinite().all()
    with pytest.raises(ConfigError, match="use exact"):
        random_decoder("light", vae_of(48), torch.device("cpu"), torch.float32)
    with pytest.raises(ConfigError, match="spatial_stride=8 instead of 4"):
        small = VideoVAE(
            toy.build_vae(
                base_dim=8,
                dim_mult=[1, 1, 1],
                temperal_downsample=[True, True],
                patch_size=None,
                in_channels=3,
                out_channels=3,
            )
        )
        random_decoder("tiny", small, torch.device("cpu"), torch.float32)
