"""Image and prompt to `Condition`: the 4 + C channels of `y`, CLIP tokens and text rows.

Must know no transformer and no sampler; reads pictures, but no datasets.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from longtake.condition import Condition
from longtake.data.images import fit_image, open_image, upright_rgb
from longtake.encoders.bundle import Encoders, VideoVAE
from longtake.encoders.clip import check_image
from longtake.errors import DataError, ShapeError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image


class ConditionFrames:
    """The condition channels `y` of pictures, encoded as far as they are read.

    `frames`, float32 [B, F, temporal_stride + C, H, W], F = steady_index + 1: the mask comes first (its channels are
    the pixel frames of a latent: 1 on latent frame 0, else 0), then the latents of the picture followed by mid grey
    (0.0 in pixels, neither black nor zero latents). The last frame stands for every later one. `frames` is one tensor
    for ever; latents that were not reached yet are zeros in it.

    Args: `image` [B, 3, h, w] in [-1, 1], already at the size of the video; `num_latent_frames`, the length of the only
    clip that it is for, beyond which nothing is encoded.
    Raises: ShapeError.
    Source: Wan2.1 image-to-video; spec B.3.
    """

    def __init__(self, vae: VideoVAE, image: Tensor, num_latent_frames: int | None = None) -> None:
        check_image(image)
        self._encoder = vae.encoder_session()
        self._grey = torch.zeros_like(image)[:, None].expand(-1, vae.temporal_stride, -1, -1, -1)
        first = self._encoder.encode(image[:, None])
        most = vae.steady_index + 1
        latents = first.new_zeros(first.shape[0], min(most, num_latent_frames or most), *first.shape[2:])
        latents[:, :1] = first
        self.frames = with_mask(latents, vae.temporal_stride)
        self._latents = self.frames[:, :, vae.temporal_stride :]
        self._reaching = Lock()  # branches of a session share one

    @property
    def reached(self) -> int:
        """Latent frames that are encoded."""
        return self._encoder.num_latent_frames

    def reach(self, num_latent_frames: int) -> None:
        """Encodes as far as that, or to the end. What was encoded stays as it is, bit for bit.

        One latent after the other: the numbers do not depend on how far each call went.
        """
        with self._reaching:
            while (index := self.reached) < min(num_latent_frames, self.frames.shape[1]):
                self._latents[:, index : index + 1] = self._encoder.encode(self._grey)


def condition_frames(vae: VideoVAE, image: Tensor, num_latent_frames: int | None = None) -> Tensor:
    """The frames of `ConditionFrames`, all of them encoded. Arguments and errors are the same."""
    y = ConditionFrames(vae, image, num_latent_frames)
    y.reach(y.frames.shape[1])
    return y.frames


def with_mask(latents: Tensor, temporal_stride: int) -> Tensor:
    """The condition channels of condition latents [B, F, C, H, W]: the mask of a given first frame in front of them."""
    mask = torch.zeros_like(latents[:, :, :1]).repeat(1, 1, temporal_stride, 1, 1)
    mask[:, 0] = 1
    return torch.cat([mask, latents], dim=2)


def begin_condition(
    encoders: Encoders, images: Tensor, prompts: list[str], y_frames: int = 1
) -> tuple[Condition, ConditionFrames]:
    """As `encode_condition`; of the condition's `frames` those alone that the second result has reached: `y_frames`."""
    if images.shape[0] != len(prompts):
        raise ShapeError(f"{images.shape[0]} images and {len(prompts)} prompts were given; each image needs one prompt")
    # First what takes a GPU the longest: it works on y while Python starts the many small kernels of the other two.
    y = ConditionFrames(encoders.vae, images)
    y.reach(y_frames)
    text = _beside(lambda: encoders.text.encode(prompts), encoders.text.device)
    tokens = None if encoders.image is None else encoders.image.encode(images)
    return Condition(text(), tokens, y.frames), y


def _beside(work: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Begins `work`, on a GPU beside what is begun after it; a function that gives its result."""
    if device.type != "cuda":
        made = work()
        return lambda: made
    here, beside = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    with torch.cuda.stream(beside):
        made = work()

    def result() -> Tensor:
        here.wait_stream(beside)
        made.record_stream(here)  # its memory is `beside`'s, which must not take it back while it is read here
        return made

    return result


def encode_condition(encoders: Encoders, images: Tensor, prompts: list[str]) -> Condition:
    """The condition of a batch: text rows, CLIP tokens (None without image encoder) and `y`.

    Args: `images` [B, 3, h, w] in [-1, 1], one a prompt.
    Raises: ShapeError when the numbers differ.
    """
    condition, y = begin_condition(encoders, images, prompts)
    y.reach(y.frames.shape[1])
    return condition


def prepare_image(image: str | Path | Image.Image | NDArray[np.uint8], height: int, width: int) -> Tensor:
    """A picture at the size of the video, float32 [3, h, w] in [-1, 1].

    Cut around the centre to the aspect of the video, then resized (bicubic, antialiased); never stretched. Orientation
    tags and colour profiles are obeyed, greyscale and palettes become RGB, transparent parts lie on white.

    Args: `image`, a path, a PIL image, or uint8 [h, w], [h, w, 3] or [h, w, 4].
    Raises: DataError, naming the file, when the picture cannot be read.
    """
    if height < 1 or width < 1:
        raise ShapeError(f"height={height} and width={width} must be positive")
    picture = _open(image)
    return torch.from_numpy(fit_image(picture, height, width)).permute(2, 0, 1).float().div(127.5).sub(1).contiguous()


def _open(image: str | Path | Image.Image | NDArray[np.uint8]) -> Image.Image:
    from PIL import Image

    if isinstance(image, np.ndarray):
        name = f"an array of {image.dtype} {image.shape}"
        if image.dtype != np.uint8 or image.size == 0 or not (image.ndim == 2 or image.shape[2:] in ((3,), (4,))):
            raise DataError(f"{name} is no picture; give uint8 [h, w, 3]")
        return upright_rgb(Image.fromarray(np.ascontiguousarray(image)), name)
    if isinstance(image, Image.Image):
        return upright_rgb(image, f"image {getattr(image, 'filename', '')}".strip())
    if not isinstance(image, str | Path):
        raise DataError(f"a picture must be a path, a PIL image or a uint8 array; got {type(image).__name__}")
    try:
        data = Path(image).read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(
            f"image {image} cannot be read as a picture ({error}); name a PNG, JPEG or WebP file"
        ) from error
    return upright_rgb(open_image(data, f"image {image}"), f"image {image}")
