"""Trains the toy teacher on one GPU within a wall-clock limit: latents in memory, Muon, learning rate to zero.

New worlds are drawn and encoded all the time: with 24,000 of them, however long it trained, the loss on others was half
as high again (docs/log.md).

    python scripts/assets/train_teacher.py --init FOLDER --seconds 265

`longtake/assets/toy/README.md` has the commands that made the shipped weights. The loss is that of
`longtake/objectives/flow_matching.py` (stage `teacher`, which trains the same from files on any machine, slower); only
data and optimizer are arranged for speed.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.pool import AsyncResult
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from muon import Muon
from torch import Tensor

from longtake.data.story import sample_story
from longtake.data.world import CROSS_WIDTH, REACH, SHAPES, SIZE, World, sample_world
from longtake.flow.path import add_noise, velocity
from longtake.flow.schedule import training_sigma
from longtake.models.dit import Block, DiTConfig, VideoDiT
from longtake.models.encoders import Encoders
from longtake.models.presets import PRESETS, shapes_of
from longtake.models.weights import load_dit, save_dit
from longtake.structs import Condition, pixel_frames

TRAIN_SEED = 0
HARD_SEED = 10_000  # candidate k for a hard world is of the list with seed HARD_SEED + k; held-out lists have others
HARD_TRIES = 500
HARD_VISIBILITY = 0.9  # a world is hard when in some frame less of a sprite is to be seen
GOLDEN = (math.sqrt(5) - 1) / 2
MOST_SPRITES = 3
MOST_PARAMETERS = 2_400_000
ROOT = Path(__file__).resolve().parents[2]


class Sampled(NamedTuple):
    """What is drawn of some worlds: background [N, h, w, 3], centres [N, T, S, 2], and the looks of the S sprites."""

    background: np.ndarray
    centres: np.ndarray
    looks: np.ndarray  # [N, S, 6]: shape number (-1 for no sprite), radius, reach of the shape's formula, RGB
    captions: list[str]


class Task(NamedTuple):
    """Worlds `start` to `start + number`; a share of `stops` is seen after a change of motion, with stops; one of
    `hard`, spread evenly whatever the other share is, has sprites that overlap.
    """

    start: int
    number: int
    num_frames: int
    stops: float
    hard: float


def shown(seed: int, index: int, num_frames: int, changed: bool) -> tuple[World, np.ndarray]:
    """World `index` of `seed` and the centres [T, S, 2] of its sprites; when `changed`, from a change of motion on."""
    world = sample_story(seed, index, [1], stops=True) if changed else sample_world(seed, index)
    return world, world.positions(num_frames + changed)[int(changed) :]


def hard_world(index: int, num_frames: int, changed: bool) -> tuple[World, np.ndarray]:
    """The first candidate for number `index` of which two sprites overlap in some of the frames that are shown."""
    for candidate in range(HARD_TRIES):
        world, centres = shown(HARD_SEED + candidate, index, num_frames, changed)
        if len(world.sprites) > 1 and world.visibility_at(centres).min() < HARD_VISIBILITY:
            return world, centres
    raise RuntimeError(f"no hard world among {HARD_TRIES} candidates for number {index}")


def sample(task: Task) -> Sampled:
    """The worlds of a task, always the same ones."""
    start, number, num_frames, stops, hard = task
    sampled = Sampled(
        np.empty((number, SIZE, SIZE, 3), np.uint8),
        np.zeros((number, num_frames, MOST_SPRITES, 2)),
        np.full((number, MOST_SPRITES, 6), -1, np.float32),
        [],
    )
    for row, index in enumerate(range(start, start + number)):
        changed = index % 100 < 100 * stops
        if index * GOLDEN % 1 < hard:
            world, centres = hard_world(index, num_frames, changed)
        else:
            world, centres = shown(TRAIN_SEED, index, num_frames, changed)
        count = len(world.sprites)
        sampled.background[row] = world.background
        sampled.centres[row, :, :count] = centres
        for number_of, (sprite, colour) in enumerate(zip(world.sprites, world.colours)):
            shape = SHAPES.index(sprite.shape)
            sampled.looks[row, number_of] = [shape, sprite.radius, REACH[sprite.shape] * sprite.radius, *colour]
        sampled.captions.append(world.segments[-1].caption)
    return sampled


def draw(worlds: Sampled, device: torch.device) -> Tensor:
    """What `World.draw` draws, uint8 [N, T, h, w, 3], on the device: sending the videos there would take longer."""
    background, centres, looks = (torch.from_numpy(part).to(device) for part in worlds[:3])
    video = background.float()[:, None].repeat(1, centres.shape[1], 1, 1, 1)
    pixels = torch.arange(SIZE, device=device, dtype=torch.float64)
    for sprite in range(looks.shape[1]):
        dx, dy = (
            (((pixels - centres[:, :, sprite, axis, None] + SIZE / 2) % SIZE) - SIZE / 2).float() for axis in (0, 1)
        )  # [N, T, w], [N, T, h]
        dx, dy = dx[:, :, None, :], dy[:, :, :, None]
        shape, radius, size = (looks[:, sprite, part, None, None, None] for part in range(3))
        ax, ay, width = dx.abs(), dy.abs(), CROSS_WIDTH * radius
        distances = {
            "circle": (dx * dx + dy * dy).sqrt() - size,
            "square": torch.maximum(ax, ay) - size,
            "triangle": torch.maximum(dy.expand(-1, -1, -1, SIZE), math.sqrt(0.75) * ax - dy / 2) - size / 2,
            "cross": torch.minimum(torch.maximum(ax - size, ay - width), torch.maximum(ax - width, ay - size)),
        }
        distance = torch.full_like(distances["circle"], 1.0)
        for number, name in enumerate(SHAPES):
            distance = torch.where(shape == number, distances[name], distance)
        mask = (0.5 - distance).clamp(0, 1)[..., None]
        colour = looks[:, sprite, None, None, None, 3:]
        video = torch.where(mask > 0, (video + (colour - video) * mask + 0.5).floor(), video)
    return video.byte()


class Pool:
    """Latents, y, text and CLIP tokens of worlds in half precision on the device; it grows while training goes on.

    `y` is encoded as far as the clip reaches; later frames are never read in training.
    """

    def __init__(self, encoders: Encoders, args: argparse.Namespace, frames: int, device: torch.device) -> None:
        self.encoders, self.device, self.frames = encoders, device, frames
        self.chunk, self.most = args.chunk, args.most_worlds
        self.stops, self.hard = args.stops, args.hard_share
        self.rows: list[Tensor] = []
        self.count = torch.zeros((), device=device)  # on the device, so that a captured step reads it
        self.filled, self.asked = 0, args.first_world
        self.workers = get_context("spawn").Pool(args.processes)
        self.waiting: deque[AsyncResult[Sampled]] = deque()
        for _ in range(2 * args.processes):
            self._ask()

    def _ask(self) -> None:
        task = Task(self.asked, self.chunk, pixel_frames(self.frames), self.stops, self.hard)
        self.waiting.append(self.workers.apply_async(sample, (task,)))
        self.asked += self.chunk

    @torch.no_grad()
    def grow(self) -> None:
        """Encodes the next chunk of worlds."""
        worlds = self.waiting.popleft().get()
        self._ask()
        videos = draw(worlds, self.device).permute(0, 1, 4, 2, 3).float().div(127.5).sub(1)
        padded = torch.zeros_like(videos)
        padded[:, :1] = videos[:, :1]
        y = self.encoders.vae.encode(padded)
        mask = torch.zeros_like(y[:, :, :4])
        mask[:, 0] = 1
        assert self.encoders.image is not None
        parts = [
            self.encoders.vae.encode(videos),
            torch.cat([mask, y], 2),
            self.encoders.text.encode(worlds.captions),
            self.encoders.image.encode(videos[:, 0]),
        ]
        if not self.rows:
            self.rows = [part.new_zeros(self.most, *part.shape[1:], dtype=torch.float16) for part in parts]
        for held, part in zip(self.rows, parts):
            held[self.filled : self.filled + self.chunk] = part[: self.most - self.filled]
        self.filled = min(self.most, self.filled + self.chunk)
        self.count.fill_(self.filled)

    def batch(self, size: int) -> list[Tensor]:
        """Random worlds: [latents, y, text, CLIP tokens]."""
        chosen = (torch.rand(size, device=self.device) * self.count).long()
        return [part[chosen].float() for part in self.rows]


def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: object = None) -> Tensor:
    """Attention without the choice of a verified kernel, which a compiled graph cannot contain."""
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def compiled(model: VideoDiT) -> VideoDiT:
    """The model as one compiled graph; `model` itself keeps the weights and their names."""
    model.set_attention(attend)
    for block in model.blocks:
        cast(Block, block).cross_attn.attend = attend
    return cast(VideoDiT, torch.compile(model, dynamic=False))


def new_config(args: argparse.Namespace) -> DiTConfig:
    """Sizes of a model that begins from random weights. Raises: SystemExit when it has too many parameters."""
    config = replace(
        PRESETS["toy"],
        patch_size=(1, args.patch, args.patch),
        dim=args.width,
        ffn_dim=4 * args.width,
        num_heads=args.width // 32,
        num_layers=args.layers,
    )
    parameters = sum(math.prod(shape) for shape in shapes_of(config).values())
    if parameters > MOST_PARAMETERS:
        raise SystemExit(f"{parameters} parameters; the toy has at most {MOST_PARAMETERS}: lower --width or --layers")
    return config


def train(args: argparse.Namespace) -> None:
    """Runs until `args.seconds` after the start of the program are over; writes the averaged weights."""
    began = time.time()
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    device = torch.device(args.device)
    encoders = Encoders.load(args.encoders, device)
    frames = 9
    data = Pool(encoders, args, frames, device)
    data.grow()  # starts the workers and warms up
    clock = time.time()
    while data.filled < args.worlds:
        data.grow()
    empty = encoders.text.encode([""]).to(device)
    speed = data.filled / max(time.time() - clock, 1e-9)
    print(f"{time.time() - began:5.0f}s {data.filled} worlds encoded, {speed:.0f} a second", flush=True)
    model = load_dit(args.init, device) if args.init else VideoDiT(new_config(args)).to(device)
    network = compiled(model) if args.compile else model
    average = {name: p.detach().clone() for name, p in model.state_dict().items()}
    inner = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    chosen = set(inner)
    others = [p for p in model.parameters() if p not in chosen]
    on_gpu = device.type == "cuda"
    peaks = (args.adam_lr, args.lr)
    rates = [torch.zeros((), device=device) for _ in peaks]  # tensors, so that a captured step reads them
    adam = torch.optim.AdamW(others, lr=rates[0], betas=(0.9, 0.99), fused=True, capturable=on_gpu)
    optimizers: list[torch.optim.Optimizer] = [adam]
    if args.muon:
        optimizers.append(Muon(inner, rates[1], momentum=0.95, weight_decay=0.01))
    else:
        optimizers.append(torch.optim.AdamW(inner, lr=rates[1], betas=(0.9, 0.99), fused=True, capturable=on_gpu))
    running = torch.zeros((), device=device)

    def update() -> None:
        clean, y, text, image = data.batch(args.batch)
        dropped = torch.rand(args.batch, device=device) < 0.1
        condition = Condition(torch.where(dropped[:, None, None], empty, text), image, y)
        sigma = training_sigma(torch.rand(args.batch, device=device), args.shift)[:, None].expand(-1, frames)
        noise = torch.randn_like(clean)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16, cache_enabled=False):
            predicted = network(add_noise(clean, noise, sigma), sigma, condition)
        loss = (predicted.float() - velocity(clean, noise)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        for optimizer in optimizers:
            optimizer.step()
        torch._foreach_lerp_(list(average.values()), list(model.state_dict().values()), 1 - args.ema)
        running.add_(loss.detach())
        model.zero_grad(set_to_none=True)

    # Warms up with learning rates of 0; on a GPU a step is then replayed as one graph: Python would be the slower half.
    advance = captured(update) if on_gpu and args.graph else update
    update()
    running.zero_()
    print(f"{time.time() - began:5.0f}s ready", flush=True)
    started, step = time.time(), 0
    total = max(1.0, args.seconds - (started - began))
    clock, saved = time.time(), time.time()
    while (progress := (time.time() - started) / total) < 1:
        factor = min(1.0, (step + 1) / args.warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        for rate, peak in zip(rates, peaks):
            rate.fill_(peak * factor)
        advance()
        step += 1
        if step % args.grow_every == 0 and data.filled < args.most_worlds:
            data.grow()
        if step % args.log_every == 0:
            mean = running.item() / args.log_every
            speed = args.log_every / (time.time() - clock)
            seen = f"{data.filled} worlds, {speed:.1f} steps/s"
            print(f"{time.time() - began:5.0f}s step {step} loss {mean:.4f} {seen}", flush=True)
            running.zero_()
            clock = time.time()
        if time.time() - saved > args.save_seconds:
            save_dit(model.config, average, args.output.with_name(f"{args.output.name}.partial"), torch.float16)
            saved = time.time()
    save_dit(model.config, average, args.output, torch.float16)
    print(f"{step} steps, {data.filled} worlds, saved {args.output}", flush=True)
    print(f"the next leg may begin with --first-world {data.asked}")
    data.workers.terminate()


def captured(update: Callable[[], None], warmup: int = 5) -> Callable[[], None]:
    """`update` as a CUDA graph; it is called `warmup` times and captured once, which changes nothing."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            update()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update()
    return graph.replay


def main() -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "longtake/assets/toy/teacher")
    parser.add_argument("--init", type=Path, default=None, help="start from these weights")
    parser.add_argument("--encoders", type=Path, default=ROOT / "longtake/assets/toy", help="folder of all three")
    parser.add_argument("--patch", type=int, default=2, help="latent pixels along a token's side, without --init")
    parser.add_argument("--width", type=int, default=128, help="of tokens, a multiple of 32, without --init")
    parser.add_argument("--layers", type=int, default=6, help="blocks, without --init")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1500)
    parser.add_argument("--save-seconds", type=float, default=45, help="between saves to OUTPUT.partial")
    parser.add_argument("--worlds", type=int, default=10000, help="encoded before training begins")
    parser.add_argument("--first-world", type=int, default=0, help="number of the first world that is drawn")
    parser.add_argument("--most-worlds", type=int, default=400000, help="room for the worlds, 50 kB each")
    parser.add_argument("--grow-every", type=int, default=16, help="steps until another chunk of worlds is encoded")
    parser.add_argument("--chunk", type=int, default=250, help="worlds that are encoded at a time")
    parser.add_argument("--stops", type=float, default=0.4, help="share of worlds that may have a sprite that stands")
    parser.add_argument("--hard-share", type=float, default=0.0, help="share of worlds with sprites that overlap")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="products in bfloat16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--graph", action=argparse.BooleanOptionalAction, default=True, help="replay a CUDA graph")
    parser.add_argument("--lr", type=float, default=3e-3, help="of the matrices inside the blocks")
    parser.add_argument("--adam-lr", type=float, default=1e-3, help="of everything else")
    parser.add_argument("--muon", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--shift", type=float, default=5.0)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--log-every", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
