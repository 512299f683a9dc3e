"""Pictures as viewers show them: profiles, orientations, kinds of pixels, and files that are no still picture."""

import io
import sys

import numpy as np
import pytest
from PIL import Image, ImageCms

from longtake.data.images import decode_image, image_size
from longtake.encoders.condition import prepare_image
from longtake.errors import DataError

RED = np.zeros((8, 12, 3), np.uint8) + np.array([200, 30, 60], np.uint8)
# The profile that comes with LittleCMS, and one in which the first number is green and the second red.
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = SRGB.replace(b"rXYZ", b"____").replace(b"gXYZ", b"rXYZ").replace(b"____", b"gXYZ")


def saved(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_colour_profiles_are_obeyed(tmp_path, kind):
    lossless = {"lossless": True} if kind == "WEBP" else {}
    assert (decode_image(saved(RED, kind, icc_profile=SRGB, **lossless), "x") == RED).all()
    data = saved(RED, kind, icc_profile=SWAPPED, **lossless)
    np.testing.assert_allclose(decode_image(data, "x"), RED[..., [1, 0, 2]], atol=2)
    (tmp_path / "a").write_bytes(data)
    for given in (tmp_path / "a", Image.open(io.BytesIO(data))):  # also where one picture is given
        seen = prepare_image(given, 8, 12).add(1).mul(127.5).permute(1, 2, 0).numpy()
        np.testing.assert_allclose(seen, RED[..., [1, 0, 2]], atol=2)


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "LA"])
def test_profiles_and_kinds_of_pixels(mode):
    picture = Image.fromarray(RED).convert(mode)
    wanted = picture.convert("RGB")
    seen = decode_image(saved(picture, icc_profile=SWAPPED), "x")
    np.testing.assert_allclose(seen, np.asarray(wanted)[..., [1, 0, 2]], atol=3)


@pytest.mark.parametrize(
    "profile", [b"no profile", SRGB[:200], SRGB.replace(b"RGB ", b"CMYK"), SRGB.replace(b"RGB ", b"GRAY")]
)
def test_profiles_that_cannot_be_used_are_named(profile):
    with pytest.raises(DataError, match="a.png: its RGB colours cannot be shown .*profile.*; convert it to sRGB"):
        decode_image(saved(RED, icc_profile=profile), "a.png")


def test_cmyk_is_shown_with_and_without_profile():
    ink = Image.fromarray(RED).convert("CMYK")
    np.testing.assert_allclose(decode_image(saved(ink, "JPEG", quality=100), "x"), RED, atol=6)
    with pytest.raises(DataError, match="its CMYK colours cannot be shown .*profile is for RGB"):
        decode_image(saved(ink, "JPEG", icc_profile=SRGB), "x")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_of_exif(orientation):
    rng = np.random.default_rng(0)
    upright = rng.integers(0, 256, (6, 10, 3), dtype=np.uint8)
    undone = {2: np.fliplr, 3: lambda p: np.rot90(p, 2), 4: np.flipud, 5: lambda p: p.swapaxes(0, 1)}
    undone |= {6: lambda p: np.rot90(p), 7: lambda p: np.rot90(p, 2).swapaxes(0, 1), 8: lambda p: np.rot90(p, -1)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(np.ascontiguousarray(undone.get(orientation, lambda p: p)(upright)), exif=exif)
    np.testing.assert_array_equal(decode_image(data, "x"), upright)
    assert image_size(data, "x") == (6, 10)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_moving_pictures_are_named_and_still_ones_read(kind):
    frames = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (10, 90, 200)]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match="a.x moves: it holds 3 pictures"):
        decode_image(data, "a.x")
    assert decode_image(saved(frames[0], kind), "x").shape == (8, 8, 3)


def test_sixteen_bits_are_named():
    with pytest.raises(DataError, match="I;16 pixels; only 8 bits"):
        decode_image(saved(np.full((8, 8), 40000, np.uint16)), "x")


def test_avif_and_heic(monkeypatch):
    np.testing.assert_allclose(decode_image(saved(RED, "AVIF", quality=100, subsampling="4:4:4"), "x"), RED, atol=4)
    heic = bytes([0, 0, 0, 24]) + b"ftypheic" + bytes(12)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(DataError, match="a.heic is HEIC; install pillow-heif to read it, or convert it to JPEG"):
        decode_image(heic, "a.heic")


def test_heic_is_read_where_pillow_heif_is():
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(RED.repeat(8, 0).repeat(8, 1))).save(buffer, quality=100)
    np.testing.assert_allclose(decode_image(buffer.getvalue(), "x")[20, 20], RED[0, 0], atol=6)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"\x00\x05\x16\x07abc", "AppleDouble"),
        (b"", "0 bytes"),
    ],
)
def test_what_is_no_picture_is_said(data, words):
    with pytest.raises(DataError, match=f"a.png: .*{words}"):
        decode_image(data, "a.png")
