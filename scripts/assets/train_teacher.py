"""Trains the toy teacher on one GPU within a wall-clock limit: latents in memory, Muon, learning rate to zero.

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
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from muon import Muon
from torch import Tensor

from longtake.data.world import World, sample_world
from longtake.flow.path import add_noise, velocity
from longtake.flow.schedule import training_sigma
from longtake.models.dit import Block, VideoDiT
from longtake.models.encoders import Encoders
from longtake.models.presets import PRESETS
from longtake.models.weights import load_dit, save_dit
from longtake.structs import Condition, pixel_frames

TRAIN_SEED = 0
ROOT = Path(__file__).resolve().parents[2]


def render(index: int, num_frames: int = 33) -> tuple[np.ndarray, str]:
    """(uint8 [T, h, w, 3], caption) of one world."""
    world: World = sample_world(TRAIN_SEED, index)
    return world.render(num_frames), world.caption


@torch.no_grad()
def encode(encoders: Encoders, num_worlds: int, num_latents: int, processes: int, device: torch.device) -> list[Tensor]:
    """[latents, y, text, CLIP tokens] of all worlds, in half precision on the device.

    `y` is encoded as far as the clip reaches; later frames are never read in training.
    """
    parts: list[list[Tensor]] = [[], [], [], []]
    with get_context("spawn").Pool(processes) as workers:
        done = workers.imap(render, range(num_worlds), chunksize=50)
        for start in range(0, num_worlds, 250):
            rows = [next(done) for _ in range(min(250, num_worlds - start))]
            videos = torch.from_numpy(np.stack([video for video, _ in rows])).to(device)
            videos = videos.permute(0, 1, 4, 2, 3).float().div(127.5).sub(1)
            padded = torch.zeros_like(videos)
            padded[:, :1] = videos[:, :1]
            y = encoders.vae.encode(padded)
            mask = torch.zeros_like(y[:, :, :4])
            mask[:, 0] = 1
            parts[0].append(encoders.vae.encode(videos).half())
            parts[1].append(torch.cat([mask, y], 2).half())
            parts[2].append(encoders.text.encode([caption for _, caption in rows]).half())
            assert encoders.image is not None
            parts[3].append(encoders.image.encode(videos[:, 0]).half())
    return [torch.cat(part) for part in parts]


def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: object = None) -> Tensor:
    """Attention without the choice of a verified kernel, which a compiled graph cannot contain."""
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def compiled(model: VideoDiT) -> VideoDiT:
    """The model as one compiled graph; `model` itself keeps the weights and their names."""
    model.set_attention(attend)
    for block in model.blocks:
        cast(Block, block).cross_attn.attend = attend
    return cast(VideoDiT, torch.compile(model, dynamic=False))


def train(args: argparse.Namespace) -> None:
    """Runs until `args.seconds` after the start of the program are over; writes the averaged weights."""
    began = time.time()
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    device = torch.device(args.device)
    encoders = Encoders.load(ROOT / "longtake/assets/toy", device)
    frames = 9
    assert pixel_frames(frames) == 33
    data = encode(encoders, args.worlds, frames, args.processes, device)
    empty = encoders.text.encode([""]).to(device)
    print(f"{time.time() - began:5.0f}s {args.worlds} worlds encoded", flush=True)
    model = load_dit(args.init, device) if args.init else VideoDiT(PRESETS["toy"]).to(device)
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
        rows = torch.randint(0, args.worlds, (args.batch,), device=device)
        clean, y, text, image = (part[rows].float() for part in data)
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
        if step % args.log_every == 0:
            mean = running.item() / args.log_every
            speed = args.log_every / (time.time() - clock)
            print(f"{time.time() - began:5.0f}s step {step} loss {mean:.4f} {speed:.1f} steps/s", flush=True)
            running.zero_()
            clock = time.time()
        if time.time() - saved > args.save_seconds:
            save_dit(model.config, average, args.output.with_name(f"{args.output.name}.partial"), torch.float16)
            saved = time.time()
    save_dit(model.config, average, args.output, torch.float16)
    print(f"{step} steps, saved {args.output}", flush=True)


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
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1500)
    parser.add_argument("--save-seconds", type=float, default=45, help="between saves to OUTPUT.partial")
    parser.add_argument("--worlds", type=int, default=10000)
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
