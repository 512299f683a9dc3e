"""Pre-trains the toy CLIP vision model: each patch tells what lies in it and where, the class token what there is.

Reproduces `longtake/assets/toy/image_encoder` (under 4 minutes on one core):

    python scripts/assets/train_image_encoder.py

Linear heads read the penultimate layer, the one that `ImageEncoder` gives out. On patch tokens they predict, for each
colour, the shape that covers the patch with it or none, and the offset of a sprite's centre that lies in it; on the
class token the same for the picture. The heads and the last layer's random weights have no further use.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import toy_encoders as toy
from torch import Tensor, nn

from longtake.encoders.clip import ImageEncoder
from longtake.toy.captions import COLOURS, SHAPES
from longtake.toy.world import SIZE, sample_world, sprite_mask

TRAIN_SEED, HELD_OUT_SEED = 73_001, 73_002
CLASSES = len(SHAPES) + 1  # of each colour: absent, or the shape that has it; no two sprites share a colour
COVERED = 0.1  # of a patch's pixels


def build_set(seed: int, number: int, grid: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures uint8 [N, h, w, 3], classes [N, 1 + patches, colours] (the picture first), centres [N, patches, 3]."""
    cell = SIZE // grid
    pictures = np.empty((number, SIZE, SIZE, 3), np.uint8)
    classes = np.zeros((number, 1 + grid * grid, len(COLOURS)), np.int64)
    centres = np.zeros((number, grid, grid, 3), np.float32)
    for index in range(number):
        world = sample_world(seed, index)
        pictures[index] = world.render(1)[0]
        for sprite, position in zip(world.sprites, world.positions(1)[0]):
            colour, shape = COLOURS.index(sprite.colour), 1 + SHAPES.index(sprite.shape)
            where, mask = sprite_mask(sprite.shape, sprite.radius, position[None])
            area = np.zeros(SIZE * SIZE, np.float32)
            area[where] = mask
            share = area.reshape(grid, cell, grid, cell).mean((1, 3))
            classes[index, 0, colour] = shape
            classes[index, 1:, colour] = np.where(share.ravel() > COVERED, shape, 0)
            x, y = position
            row, column = min(int(y // cell), grid - 1), min(int(x // cell), grid - 1)
            centres[index, row, column] = (1, x / cell - column - 0.5, y / cell - row - 0.5)
    centres = centres.reshape(number, grid * grid, 3)
    return torch.from_numpy(pictures), torch.from_numpy(classes), torch.from_numpy(centres)


class Heads(nn.Module):
    """The linear heads of pre-training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        number = CLASSES * len(COLOURS)
        self.patch, self.picture, self.centre = (nn.Linear(width, n) for n in (number, number, 3))


def loss_of(
    encoder: ImageEncoder, heads: Heads, pixels: Tensor, classes: Tensor, centres: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """(loss, what is right) on prepared `pixels`."""
    tokens = encoder.model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    logits = torch.cat([heads.picture(tokens[:, :1]), heads.patch(tokens[:, 1:])], dim=1)
    logits = logits.unflatten(-1, (len(COLOURS), CLASSES))
    centre = heads.centre(tokens[:, 1:])
    held = centres[..., 0] > 0
    offset = F.mse_loss(centre[..., 1:][held], centres[..., 1:][held])
    loss = 2 * F.cross_entropy(logits[:, 0].flatten(0, 1), classes[:, 0].flatten())
    loss = loss + 4 * F.cross_entropy(logits[:, 1:].flatten(0, 2), classes[:, 1:].flatten())
    loss = loss + F.binary_cross_entropy_with_logits(centre[..., 0], centres[..., 0]) + 5 * offset
    with torch.no_grad():
        right = logits.argmax(-1) == classes
        report = {
            "patches right": right[:, 1:].all(-1).float().mean().item(),
            "pictures right": right[:, 0].all(-1).float().mean().item(),
            "colours right": ((logits[:, 0].argmax(-1) > 0) == (classes[:, 0] > 0)).all(-1).float().mean().item(),
            "shapes right": right[:, 0][classes[:, 0] > 0].float().mean().item(),
            "centre error px": offset.sqrt().item() * SIZE / (centres.shape[1] ** 0.5),
        }
    return loss, report


def train(args: argparse.Namespace) -> None:
    """Trains, measures on held-out pictures, saves float16 and checks what was saved."""
    torch.manual_seed(args.seed)
    encoder = ImageEncoder(toy.build_image_model())
    model = encoder.model.train().requires_grad_(True)
    heads = Heads(encoder.width)
    grid = int((encoder.num_tokens - 1) ** 0.5)
    pictures, classes, centres = build_set(TRAIN_SEED, args.pictures, grid)
    pixels = prepare(encoder, pictures)
    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=args.lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.1)
    started = time.time()
    for step in range(args.steps):
        rows = torch.randint(args.pictures, (args.batch_size,))
        loss, report = loss_of(encoder, heads, *roll(pixels[rows], classes[rows], centres[rows], grid))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 500 == 0:
            print(
                f"{time.time() - started:5.0f}s step {step + 1} loss {loss.item():.4f} {describe(report)}", flush=True
            )
    finish(encoder, heads, build_set(HELD_OUT_SEED, 1000, grid), args.output)


def prepare(encoder: ImageEncoder, pictures: Tensor) -> Tensor:
    """Pictures as the encoder sees them."""
    return encoder.preprocess(pictures.permute(0, 3, 1, 2).float().div(127.5).sub(1))


def roll(pixels: Tensor, classes: Tensor, centres: Tensor, grid: int) -> tuple[Tensor, Tensor, Tensor]:
    """The batch moved by whole patches around the torus: the world wraps, so that these are pictures of worlds too."""
    rows, columns = torch.randint(grid, (2,)).tolist()
    cell = pixels.shape[-1] // grid
    moved = [
        t.unflatten(1, (grid, grid)).roll((rows, columns), (1, 2)).flatten(1, 2) for t in (classes[:, 1:], centres)
    ]
    return (
        pixels.roll((rows * cell, columns * cell), (2, 3)),
        torch.cat([classes[:, :1], moved[0]], dim=1),
        moved[1],
    )


def describe(report: dict[str, float]) -> str:
    """The report as text."""
    return ", ".join(f"{name} {value:.4f}" for name, value in report.items())


@torch.no_grad()
def finish(encoder: ImageEncoder, heads: Heads, held_out: tuple[Tensor, Tensor, Tensor], folder: Path) -> None:
    """Saves, loads again and reports what the saved weights reach on held-out pictures."""
    shutil.rmtree(folder, ignore_errors=True)
    encoder.model.half().save_pretrained(folder)
    saved = ImageEncoder.load(folder)
    pictures, classes, centres = held_out
    _, report = loss_of(saved, heads, prepare(saved, pictures), classes, centres)
    tokens = saved.encode(pictures[:100].permute(0, 3, 1, 2).float().div(127.5).sub(1))
    size = sum(f.stat().st_size for f in folder.iterdir()) / 1e6
    print(f"held-out, as saved: {describe(report)}; std {tokens.std():.3f}; {size:.2f} MB in {folder}")


def main() -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parents[2]
    parser.add_argument("--output", type=Path, default=root / "longtake/assets/toy/image_encoder")
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args)


if __name__ == "__main__":
    main()
