"""`y` as in spec B.3 and N.8, and pictures of every kind made ready for it."""

import numpy as np
import pytest
import torch
from PIL import Image

from longtake.encoders.bundle import Encoders
from longtake.encoders.condition import condition_frames, encode_condition, prepare_image
from longtake.errors import DataError, ShapeError

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    return Encoders.build_toy_random(0)


def pictures(batch: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("batch", [1, 2])
def test_y_layout(encoders, batch):
    vae, image = encoders.vae, pictures(batch)
    y = condition_frames(vae, image)
    assert y.shape == (batch, vae.steady_index + 1, 20, 4, 4) and y.dtype == torch.float32
    assert (y[:, 0, :4] == 1).all() and (y[:, 1:, :4] == 0).all()
    torch.testing.assert_close(y[:, :1, 4:], vae.encode(image[:, None]), rtol=0, atol=1e-5)
    if batch == 2:
        assert not torch.equal(y[0], y[1])
        torch.testing.assert_close(condition_frames(vae, image[1:]), y[1:], rtol=0, atol=1e-5)


def test_y_is_the_picture_followed_by_grey_and_extends_exactly(encoders):
    vae, image = encoders.vae, pictures(1)
    y = condition_frames(vae, image)[:, :, 4:]
    frames = 1 + 4 * (vae.steady_index + 6)
    longer = vae.encode(torch.cat([image[:, None], torch.zeros(1, frames - 1, 3, 32, 32)], dim=1))
    extended = torch.cat([y, y[:, -1:].expand(-1, 6, -1, -1, -1)], dim=1)
    torch.testing.assert_close(extended, longer, rtol=0, atol=1e-5)
    # Grey pixels are neither zero latents nor black, and the fade from the picture is still seen in latent 1.
    assert y[:, -1].abs().max() > 1e-3
    assert (y[:, 1] - y[:, -1]).abs().max() > 1e-3


def test_y_for_one_clip_alone_is_the_beginning_of_the_whole(encoders):
    image = torch.rand(2, 3, 32, 48) * 2 - 1
    whole = condition_frames(encoders.vae, image)
    for frames in (1, 2, 5):
        assert torch.equal(condition_frames(encoders.vae, image, frames), whole[:, :frames])
    assert torch.equal(condition_frames(encoders.vae, image, whole.shape[1] + 7), whole)


def test_condition_of_a_batch(encoders):
    image = pictures(2)
    condition = encode_condition(encoders, image, ["a red circle rises", ""])
    assert condition.batch_size == 2
    assert condition.text.shape == (2, 48, 64) and condition.image.shape == (2, 17, 64)
    assert torch.equal(condition.frames, condition_frames(encoders.vae, image))
    without = Encoders(encoders.vae, encoders.text, None)
    assert encode_condition(without, image, ["", ""]).image is None
    with pytest.raises(ShapeError, match="2 images and 1 prompts"):
        encode_condition(encoders, image, ["a"])


@pytest.mark.parametrize(
    "image", [torch.zeros(3, 32, 32), torch.zeros(1, 32, 32, 3), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)]
)
def test_condition_frames_refuses(encoders, image):
    with pytest.raises(ShapeError, match=r"\[B, 3, h, w\]"):
        condition_frames(encoders.vae, image)


def test_condition_frames_refuses_other_sizes(encoders):
    with pytest.raises(ShapeError, match="multiples of 8"):
        condition_frames(encoders.vae, torch.zeros(1, 3, 30, 32))


def test_prepare_image_keeps_pixels_of_the_right_size():
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    prepared = prepare_image(pixels, 48, 64)
    assert prepared.shape == (3, 48, 64) and prepared.dtype == torch.float32 and prepared.is_contiguous()
    torch.testing.assert_close(prepared.permute(1, 2, 0), torch.from_numpy(pixels).float() / 127.5 - 1)


def circle(height: int, width: int, radius: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    inside = np.hypot(y - (height - 1) / 2, x - (width - 1) / 2) < radius
    return np.where(inside[..., None], 255, 0).repeat(3, -1).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(200, 300), (300, 200), (201, 333)])
def test_prepare_image_cuts_and_never_stretches(height, width):
    white = prepare_image(circle(height, width, 60), 64, 64)[0] > 0
    rows, columns = white.any(1).sum().item(), white.any(0).sum().item()
    expected = 120 * 64 / min(height, width)
    assert abs(rows - columns) <= 1 and abs(rows - expected) <= 1.5
    assert abs(white.float().argmax(0).float()[32].item() - (64 - expected) / 2) <= 1.5  # around the centre


def test_prepare_image_is_antialiased():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    assert prepare_image(stripes, 64, 64).abs().max() < 0.1  # mid grey


def test_prepare_image_obeys_orientation_tags(tmp_path):
    picture = Image.new("RGB", (40, 20))
    picture.paste((255, 0, 0), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    picture.save(tmp_path / "turned.png", exif=exif)
    prepared = prepare_image(tmp_path / "turned.png", 40, 20)
    assert (prepared[0, :20] == 1).all() and (prepared[0, 20:] == -1).all()


def test_prepare_image_colour_modes(tmp_path):
    size = (16, 16)
    red = prepare_image(Image.new("RGB", size, (255, 0, 0)), 16, 16)
    assert torch.equal(prepare_image(np.array(Image.new("RGB", size, (255, 0, 0))), 16, 16), red)
    assert torch.equal(prepare_image(Image.new("P", size, 0).convert("P"), 16, 16), torch.full((3, 16, 16), -1.0))
    grey = prepare_image(Image.new("L", size, 255), 16, 16)
    assert torch.equal(grey, torch.ones(3, 16, 16))
    assert torch.equal(prepare_image(np.full((16, 16), 255, np.uint8), 16, 16), grey)
    clear = Image.new("RGBA", size, (255, 0, 0, 0))
    assert torch.equal(prepare_image(clear, 16, 16), grey)
    clear.save(tmp_path / "clear.webp", lossless=True)
    assert torch.equal(prepare_image(str(tmp_path / "clear.webp"), 16, 16), grey)
    half = prepare_image(Image.new("RGBA", size, (255, 0, 0, 128)), 16, 16)
    assert half[0].min() == 1 and abs(half[1].mean().item()) < 0.02


def test_prepare_image_names_bad_files(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:900])
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep.png")
    for name in ("bad.png", "cut.jpg", "deep.png", "absent.png"):
        with pytest.raises(DataError, match=name):
            prepare_image(tmp_path / name, 16, 16)
    for wrong in (np.zeros((8, 8, 3), np.float32), np.zeros((8, 8, 2), np.uint8), np.zeros((0, 8, 3), np.uint8), 5):
        with pytest.raises(DataError):
            prepare_image(wrong, 16, 16)
