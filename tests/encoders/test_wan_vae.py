"""The VAE's own networks against the library's, and the norms between their convolutions."""

import logging
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm, patchify, unpatchify

from longtake.encoders import norm_silu as norms
from longtake.encoders import wan_vae
from longtake.encoders.doubling import doubled, folded
from longtake.encoders.norm_silu import Sum, norm_silu, settle
from longtake.encoders.wan_vae import WanDecoder, WanEncoder

torch.set_num_threads(1)

PATCHES = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2}
STATISTICS = {"latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}
LAYOUTS = {
    "wan2.1": {"base_dim": 8, "num_res_blocks": 1},
    "wan2.2": {"base_dim": 8, "decoder_base_dim": 12, "num_res_blocks": 1, "z_dim": 48, **PATCHES, **STATISTICS},
    "time first": {
        "base_dim": 4,
        "dim_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "z_dim": 4,
        "temperal_downsample": [True, False],
    },
}
SPLITS = ([1, 4], [1, 1, 1, 1, 1], [1, 2, 2])


def library_vae(layout: str) -> AutoencoderKLWan:
    """Random weights with gammas and biases that matter."""
    generator = torch.Generator().manual_seed(5)
    vae = AutoencoderKLWan(**LAYOUTS[layout]).eval().requires_grad_(False)
    for name, weight in vae.named_parameters():
        if "gamma" in name:
            weight.uniform_(0.5, 1.5, generator=generator)
        else:
            weight.normal_(0, 0.1 if weight.ndim == 1 else weight[0].numel() ** -0.5, generator=generator)
    return vae


@pytest.fixture(scope="module", params=LAYOUTS)
def vae(request) -> AutoencoderKLWan:
    return library_vae(request.param)


def random_latents(vae, num_frames: int, seed: int = 0, size=(3, 5)) -> torch.Tensor:
    shape = (2, num_frames, *size, vae.config.z_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def library_decode(vae, latents: torch.Tensor) -> torch.Tensor:
    """One latent after the other, as the library does it, not clamped: [B, T, 3, h, w]."""
    features, frames = [None] * vae._cached_conv_counts["decoder"], []
    inner = vae.post_quant_conv(latents.permute(0, 4, 1, 2, 3))
    for index in range(latents.shape[1]):
        part = inner[:, :, index : index + 1]
        frames.append(vae.decoder(part, feat_cache=features, feat_idx=[0], first_chunk=index == 0))
    return unpatchify(torch.cat(frames, dim=2), vae.config.patch_size or 1).transpose(1, 2)


def library_encode(vae, chunks: list[torch.Tensor]) -> torch.Tensor:
    """Means [B, F, H, W, C] of chunks of 1, then a stride's frames."""
    features, means = [None] * vae._cached_conv_counts["encoder"], []
    for chunk in chunks:
        x = patchify(chunk.transpose(1, 2).contiguous(), vae.config.patch_size or 1)
        moments = vae.quant_conv(vae.encoder(x, feat_cache=features, feat_idx=[0]))
        means.append(moments[:, : vae.config.z_dim].permute(0, 2, 3, 4, 1))
    return torch.cat(means, dim=1)


def streamed(network, x: torch.Tensor, split: list[int], **options) -> torch.Tensor:
    made, past = [], network.new_past()
    for index, chunk in enumerate(x.split(split, dim=1)):
        out, past = network(chunk, past, first=index == 0, **options)
        made.append(out)
    return torch.cat(made, dim=1)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_the_decoder_is_the_librarys(vae, split):
    z = random_latents(vae, 5)
    torch.testing.assert_close(streamed(WanDecoder(vae), z, split), library_decode(vae, z), rtol=0, atol=1e-5)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_the_encoder_is_the_librarys(vae, split):
    stride = 2 ** sum(vae.config.temperal_downsample)
    side = 2 ** (len(vae.config.dim_mult) - 1) * (vae.config.patch_size or 1)
    shape = (2, 1 + 4 * stride, 3, 3 * side, 5 * side)
    clip = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    got = streamed(WanEncoder(vae), clip, [1, *(stride * count for count in split[1:])])
    assert got.shape == (2, 5, 3, 5, vae.config.z_dim)
    wanted = library_encode(vae, list(clip.split([1, *[stride] * 4], dim=1)))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_a_call_leaves_the_past_it_was_given(vae):
    decoder, z = WanDecoder(vae), random_latents(vae, 4)
    _, past = decoder(z[:, :1], decoder.new_past(), first=True)
    _, past = decoder(z[:, 1:2], past, first=False)
    before = [None if kept is None else kept.clone() for kept in past]
    frames, after = decoder(z[:, 2:], past, first=False)
    for kept, old, new in zip(past, before, after, strict=True):
        assert (kept is None) == (old is None) == (new is None)
        assert kept is None or (torch.equal(kept, old) and not torch.equal(kept, new))
    again, _ = decoder(z[:, 2:], past, first=False)
    assert torch.equal(frames, again)


def test_a_call_that_is_interrupted_leaves_the_past_it_was_given(vae, monkeypatch):
    decoder, z = WanDecoder(vae), random_latents(vae, 4)
    _, past = decoder(z[:, :1], decoder.new_past(), first=True)
    wanted, _ = decoder(z[:, 1:], past, first=False)
    convolve, left = wan_vae._CausalConv.__call__, [7]

    def interrupted(self, buffer):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return convolve(self, buffer)

    with monkeypatch.context() as patch:
        patch.setattr(wan_vae._CausalConv, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decoder(z[:, 1:], past, first=False)
    assert torch.equal(decoder(z[:, 1:], past, first=False)[0], wanted)


def test_the_past_can_be_updated_where_it_is(vae):
    decoder, z = WanDecoder(vae), random_latents(vae, 6)
    _, past = decoder(z[:, :1], decoder.new_past(), first=True)
    _, past = decoder(z[:, 1:2], past, first=False)
    frames, new = decoder(z[:, 2:4], past, first=False)
    inside, same = decoder(z[:, 2:4], past, first=False, into=past)
    assert torch.equal(inside, frames) and all(a is b for a, b in zip(same, past, strict=True))
    for kept, other in zip(past, new, strict=True):
        assert (kept is None and other is None) or torch.equal(kept, other)
    assert torch.equal(decoder(z[:, 4:], past, first=False)[0], decoder(z[:, 4:], new, first=False)[0])


def test_streams_of_one_network_do_not_touch_each_other(vae):
    decoder, before = WanDecoder(vae), {name: id(value) for name, value in vars(vae).items()}
    clips = [random_latents(vae, 4, seed, size) for seed, size in ((1, (3, 5)), (2, (2, 3)))]
    alone = [streamed(decoder, z, [1, 1, 2]) for z in clips]
    pasts, made = [decoder.new_past() for _ in clips], [[], []]
    for start, end in ((0, 1), (1, 2), (2, 4)):
        for index, z in enumerate(clips):
            frames, pasts[index] = decoder(z[:, start:end], pasts[index], first=start == 0)
            made[index].append(frames)
    for parts, wanted in zip(made, alone, strict=True):
        assert torch.equal(torch.cat(parts, dim=1), wanted)
    assert {name: id(value) for name, value in vars(vae).items()} == before


def test_half_precision_is_near_float32():
    vae = library_vae("wan2.1")
    z = random_latents(vae, 3)
    exact = streamed(WanDecoder(vae), z, [1, 2])
    half = streamed(WanDecoder(vae.to(torch.bfloat16)), z.bfloat16(), [1, 2])
    assert half.dtype == torch.float32
    assert (half - exact).norm() / exact.norm() < 3e-2


def test_a_folded_upsampling_is_doubling_and_convolving():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((2, 3, 5, 4, 6), (7, 6, 3, 3)))
    pictures = F.interpolate(x.flatten(0, 1).permute(0, 3, 1, 2), scale_factor=2.0, mode="nearest-exact")
    wanted = F.conv2d(pictures, weight, padding=1).permute(0, 2, 3, 1).unflatten(0, (2, 3))
    got = doubled(x, folded(weight))
    assert got.shape == (2, 3, 10, 8, 7)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=2e-5)


def parts_of(channels: int, dtype=torch.float32, device="cpu", *, bias=True, skip=True) -> tuple:
    """Random parts of a sum, [2, 3, 4, 5, channels]."""
    generator, size = torch.Generator().manual_seed(channels), (2, 3, 4, 5, channels)
    x, other, b = (torch.randn(shape, generator=generator).to(device, dtype) for shape in (size, size, (channels,)))
    return x, b if bias else None, other if skip else None


def total_of(value, bias, skip) -> torch.Tensor:
    return value + (0 if bias is None else bias) + (0 if skip is None else skip)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("given", [(True, True), (True, False), (False, False)])
def test_a_norm_is_the_librarys(given, silu):
    parts = parts_of(8, bias=given[0], skip=given[1])
    if not any(given):
        parts[0][0, 0, 0, 0] = 0  # a pixel without length stays zero
    norm = WanRMS_norm(8, images=False)
    norm.gamma.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    total = total_of(*parts).clone()
    wanted = norm(total.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
    buffer = torch.full((2, 5, 4, 5, 8), 7.0)
    kept = norm_silu(Sum(*parts), norm.gamma.detach().flatten(), buffer[:, 2:], silu=silu)
    torch.testing.assert_close(buffer[:, 2:], F.silu(wanted) if silu else wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kept, total, rtol=0, atol=1e-6)
    assert (buffer[:, :2] == 7).all()  # what the convolution remembers


def test_a_norm_writes_frames_beside_the_later_ones():
    gamma, plain, stacked = torch.ones(4), torch.empty(2, 3, 4, 5, 4), torch.full((2, 3, 4, 5, 3, 4), 7.0)
    norm_silu(Sum(*parts_of(4)), gamma, plain)
    norm_silu(Sum(*parts_of(4)), gamma, stacked)
    for time in range(3):
        for tap in range(3):
            frame = time - 2 + tap
            wanted = plain[:, frame] if frame >= 0 else torch.full_like(plain[:, 0], 7.0)
            assert torch.equal(stacked[:, time, :, :, tap], wanted)


def test_a_sum_settles_where_it_is_or_elsewhere():
    parts, buffer = parts_of(4), torch.full((2, 5, 4, 5, 4), 7.0)
    wanted, place = total_of(*parts), parts[0].data_ptr()
    settle(Sum(*parts_of(4)), buffer[:, 2:])
    torch.testing.assert_close(buffer[:, 2:], wanted, rtol=0, atol=1e-6)
    settled = settle(Sum(*parts))
    assert settled.data_ptr() == place and (buffer[:, :2] == 7).all()
    torch.testing.assert_close(settled, wanted, rtol=0, atol=1e-6)
    assert settle(Sum(settled)) is settled


def test_a_sum_is_read_once_and_holds_nothing_then():
    value = torch.zeros(1, 1, 2, 2, 4)
    x, alive = Sum(value), weakref.ref(value)
    assert norm_silu(x, torch.ones(4), torch.empty(1, 1, 2, 2, 4), keep=False) is None
    del value
    assert alive() is None
    with pytest.raises(AssertionError, match="twice"):
        settle(x)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_stacked_convolutions_are_the_librarys(vae, monkeypatch, split):
    """Those that a GPU may prefer; also where the finest level takes one frame at a time."""
    monkeypatch.setattr(wan_vae, "_stacks", lambda weight: True)
    decoder, z = WanDecoder(vae), random_latents(vae, 5)
    for frames in (8, 1):
        decoder.finest_frames = frames
        torch.testing.assert_close(streamed(decoder, z, split), library_decode(vae, z), rtol=0, atol=1e-5)
    monkeypatch.undo()
    assert [kept.shape for kept in decoder_past(decoder, z)] == [
        kept.shape for kept in decoder_past(WanDecoder(vae), z)
    ]


def decoder_past(decoder: WanDecoder, z: torch.Tensor) -> list[torch.Tensor]:
    _, past = decoder(z[:, :1], decoder.new_past(), first=True)
    return [kept for kept in decoder(z[:, 1:2], past, first=False)[1] if kept is not None]


@pytest.mark.parametrize("frames", [1, 4, 5])
def test_the_finest_level_can_take_any_number_of_frames(vae, frames):
    decoder, z = WanDecoder(vae), random_latents(vae, 6)
    wanted = library_decode(vae, z)
    decoder.finest_frames = frames
    torch.testing.assert_close(streamed(decoder, z, [1, 2, 3]), wanted, rtol=0, atol=1e-5)
    _, past = decoder(z[:, :1], decoder.new_past(), first=True)
    _, past = decoder(z[:, 1:3], past, first=False)
    made, again = decoder(z[:, 3:], past, first=False), decoder(z[:, 3:], past, first=False, into=past)
    assert torch.equal(made[0], again[0])
    for new, same, old in zip(made[1], again[1], past, strict=True):
        assert same is old and (new is None or torch.equal(new, same))


def test_without_triton_a_gpu_says_once_that_it_takes_longer(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "longtake.encoders.norm_silu_triton", None)
    monkeypatch.delattr("longtake.encoders.norm_silu_triton", raising=False)
    norms._compiled.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert norms._compiled() is None and norms._compiled() is None
    assert caplog.text.count("triton is missing") == 1
    norms._compiled.cache_clear()


def test_no_kernel_is_compiled_for_tiny_frames_nor_for_a_cpu(monkeypatch):
    monkeypatch.setattr(norms, "_compiled", lambda: "kernels")
    sums = {side: Sum(torch.empty(1, 1, side, side, 4, device="meta")) for side in (32, 33)}
    for x in sums.values():
        x.device = torch.device("cuda")
    assert norms._kernels(sums[32]) is None and norms._kernels(sums[33]) == "kernels"
    sums[33].device = torch.device("cpu")
    assert norms._kernels(sums[33]) is None


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [4, 96, 384])
@pytest.mark.parametrize("given", [(True, True), (True, False), (False, False)])
def test_the_kernel_is_the_plain_way(monkeypatch, channels, dtype, given):
    assert norms._compiled() is not None
    monkeypatch.setattr(norms, "FEW_PIXELS", 0)
    gamma = torch.rand(channels, device="cuda", dtype=dtype) + 0.5
    made = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(norms, "_kernels", lambda _: None)
        x, y, z = (Sum(*parts_of(channels, dtype, "cuda", bias=given[0], skip=given[1])) for _ in range(3))
        buffer = torch.full((2, 5, 4, 5, channels), 7.0, device="cuda", dtype=dtype)
        stacked = torch.full((2, 3, 4, 5, 3, channels), 7.0, device="cuda", dtype=dtype)
        norm_silu(z, gamma, stacked, keep=False)
        made.append((buffer, norm_silu(x, gamma, buffer[:, 2:]), settle(y), stacked))
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for got, wanted in zip(*made, strict=True):
        torch.testing.assert_close(got, wanted, **close)


@pytest.mark.gpu
@gpu
def test_a_recorded_call_is_the_call(vae):
    vae = library_vae("wan2.1").cuda()
    with torch.backends.cudnn.flags(allow_tf32=False):
        decoder, z = WanDecoder(vae), random_latents(vae, 9).cuda()
        torch.testing.assert_close(streamed(decoder, z, [1, 4, 4]), library_decode(vae, z), rtol=0, atol=1e-4)
        _, past = decoder(z[:, :1], decoder.new_past(), first=True)
        _, past = decoder(z[:, 1:5], past, first=False)
        wanted, _ = decoder(z[:, 5:], past, first=False)
        given, graph = z[:, 5:].clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made, _ = decoder(given, past, first=False, into=past)
        graph.replay()
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-5)
