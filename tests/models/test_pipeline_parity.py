"""y, CLIP tokens and text rows against diffusers' WanImageToVideoPipeline on the same random encoders."""

import numpy as np
import pytest
import torch
from PIL import Image
from toy_assets import toy

from longtake.encoders.bundle import ImageEncoder, TextEncoder, VideoVAE
from longtake.encoders.condition import condition_frames
from longtake.errors import ConfigError

torch.set_num_threads(1)
STATISTICS = {"latents_mean": np.linspace(-0.5, 0.5, 16).tolist(), "latents_std": np.linspace(0.5, 2, 16).tolist()}
PUBLISHED = {
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "patch_size": None,
    "in_channels": 3,
    "out_channels": 3,
}


def make_pipeline(**parts):
    from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline

    names = ("tokenizer", "text_encoder", "vae", "image_encoder", "image_processor")
    return WanImageToVideoPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), **dict.fromkeys(names) | parts)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return VideoVAE(toy.build_vae(base_dim=4, **PUBLISHED, **STATISTICS))


@pytest.fixture(scope="module")
def clip():
    """The published picture size, patch size and depth of tokens; three narrow layers."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    return CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=224, patch_size=14, hidden_act="gelu")).eval()


def pictures(batch, height, width):
    return np.random.default_rng(height).integers(0, 256, (batch, height, width, 3), dtype=np.uint8)


def as_tensor(pixels):
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def library_y(pipeline, image, num_frames):
    """y [1, F, 4 + C, H, W] of one picture [3, h, w], by the pipeline."""
    with torch.no_grad():
        _, y = pipeline.prepare_latents(
            image[None], 1, 16, *image.shape[-2:], num_frames, torch.float32, torch.device("cpu")
        )
    return y.transpose(1, 2)


@pytest.mark.whole
@pytest.mark.parametrize("size", [(32, 48), (48, 32)], ids=["landscape", "portrait"])
@pytest.mark.parametrize("batch", [1, 3])
def test_y_equals_the_pipelines(vae, batch, size):
    pipeline, image = make_pipeline(vae=vae.module), as_tensor(pictures(batch, *size))
    y = condition_frames(vae, image)
    wanted = torch.cat([library_y(pipeline, picture, 81) for picture in image])
    assert wanted.shape == (batch, 21, 20, size[0] // 8, size[1] // 8)
    torch.testing.assert_close(y[:, :21], wanted, rtol=0, atol=1e-5)


def test_y_extends_as_the_pipelines(vae):
    """Past the steady index the last frame stands for all."""
    image = as_tensor(pictures(1, 16, 16))
    frames = vae.steady_index + 4
    wanted = library_y(make_pipeline(vae=vae.module), image[0], 4 * frames - 3)
    y = condition_frames(vae, image)
    extended = torch.cat([y, y[:, -1:].expand(-1, frames - y.shape[1], -1, -1, -1)], dim=1)
    torch.testing.assert_close(extended, wanted, rtol=0, atol=1e-5)


def test_first_latent_of_ti2v_equals_the_pipelines():
    torch.manual_seed(0)
    layout = {"dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True], "scale_factor_spatial": 16}
    vae = VideoVAE(toy.build_vae(base_dim=8, is_residual=True, **layout, **STATISTICS))
    image = as_tensor(pictures(3, 32, 64))
    pipeline = make_pipeline(vae=vae.module, expand_timesteps=True)
    with torch.no_grad():
        _, first, _ = pipeline.prepare_latents(image, 1, 16, 32, 64, 17, torch.float32, torch.device("cpu"))
    assert first.shape == (3, 16, 1, 2, 4)
    torch.testing.assert_close(vae.encode(image[:, None]), first.transpose(1, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("preprocess", ["original", "diffusers"])
@pytest.mark.parametrize("batch", [1, 3])
def test_clip_tokens_equal_the_pipelines(clip, batch, preprocess):
    """At the model's own size both ways of resizing change nothing."""
    from transformers import CLIPImageProcessorPil

    pipeline, pixels = (
        make_pipeline(image_encoder=clip, image_processor=CLIPImageProcessorPil()),
        pictures(batch, 224, 224),
    )
    with torch.no_grad():
        wanted = pipeline.encode_image([Image.fromarray(picture) for picture in pixels])
    tokens = ImageEncoder(clip, preprocess).encode(as_tensor(pixels))
    assert tokens.shape == (batch, 257, 32)
    torch.testing.assert_close(tokens, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(480, 832), (832, 480), (300, 301), (120, 100)])
def test_the_diffusers_way_cuts_as_the_library_does(clip, size):
    """The library works in whole levels of 256 after each axis: a few pixels differ by up to two of them."""
    from transformers import CLIPImageProcessorPil

    picture = np.array(Image.fromarray(pictures(1, 24, 24)[0]).resize(size[::-1], Image.Resampling.BICUBIC))
    wanted = CLIPImageProcessorPil()(images=[Image.fromarray(picture)], return_tensors="pt").pixel_values
    got = ImageEncoder(clip, "diffusers").preprocess(as_tensor(picture[None]))
    assert got.shape == (1, 3, 224, 224)
    level = 1 / 255 / 0.26
    torch.testing.assert_close(got, wanted, rtol=0, atol=2.1 * level)
    assert (got - wanted).abs().mean() < 0.4 * level
    if max(size) > 800:
        stretched = ImageEncoder(clip).preprocess(as_tensor(picture[None]))
        assert (stretched - wanted).abs().mean() > 40 * level


def test_unknown_preprocessing_is_refused(clip):
    with pytest.raises(ConfigError, match="'crop' is unknown; the values are original and diffusers"):
        ImageEncoder(clip, "crop")


def test_text_rows_equal_the_pipelines():
    tokenizer = toy.build_tokenizer()
    torch.manual_seed(2)
    model = toy.build_text_model(len(tokenizer)).eval()
    prompts = ["a small red circle drifts up, a green cross rises", "  A blue &amp; square\nfalls ", ""]
    with torch.no_grad():
        wanted, _ = make_pipeline(tokenizer=tokenizer, text_encoder=model).encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=48
        )
    torch.testing.assert_close(TextEncoder(model, tokenizer, 48).encode(prompts), wanted, rtol=0, atol=1e-5)
