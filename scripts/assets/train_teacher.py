"""Trains the toy teacher on one GPU within a wall-clock limit: latents in memory, Muon, learning rate to zero.

    python scripts/assets/train_teacher.py --init FOLDER --seconds 265

`longtake/assets/toy/README.md` has the commands that made the shipped weights. The loss is that of
`longtake/objectives/flow_matching.py` (stage `teacher`, which trains the same from files on any machine, slower); only
data (`world_pool.py`) and optimizer (`gpu_loop.py`) are arranged for speed.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from gpu_loop import TOY, Trained, add_arguments, filled_pool, run
from torch import Tensor

from longtake.condition import Condition
from longtake.encoders.bundle import Encoders
from longtake.flow.path import add_noise, velocity
from longtake.flow.schedule import training_sigma
from longtake.models.dit import VideoDiT
from longtake.models.execution import Execution
from longtake.models.sizes import DiTConfig
from longtake.weights.load import load_dit
from longtake.weights.presets import PRESETS, shapes_of

MOST_PARAMETERS = 2_400_000


def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: object = None) -> Tensor:
    """Attention without the choice of a verified kernel, which a compiled graph cannot contain."""
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def compiled(model: VideoDiT) -> VideoDiT:
    """The model as one compiled graph; `model` itself keeps the weights and their names."""
    return cast(VideoDiT, torch.compile(model.executed(Execution(attend=attend)), dynamic=False))


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


def first_model(args: argparse.Namespace, device: torch.device) -> VideoDiT:
    """What training begins from: `--init`, its patches made smaller where `--patch` says so, or random weights."""
    if args.init is None:
        return VideoDiT(new_config(args)).to(device)
    model = load_dit(args.init, device)
    size = model.config.patch_size[1]
    if args.patch >= size:
        return model
    smaller = VideoDiT(replace(model.config, patch_size=(1, args.patch, args.patch))).to(device)
    state = model.state_dict()
    # A smaller patch answers to a constant picture as the large one did, and begins with the mean of its pixels.
    state["patch_embedding.weight"] = (
        state["patch_embedding.weight"].sum((3, 4), keepdim=True).expand(-1, -1, -1, args.patch, args.patch)
        / args.patch**2
    ).contiguous()
    for part in ("weight", "bias"):
        pixels = state[f"head.head.{part}"].unflatten(0, (size * size, -1)).mean(0, keepdim=True)
        state[f"head.head.{part}"] = pixels.expand(args.patch**2, *pixels.shape[1:]).flatten(0, 1).contiguous()
    smaller.load_state_dict(state)
    return smaller


def train(args: argparse.Namespace) -> None:
    """Runs until `args.seconds` after the start of the program are over; writes the averaged weights."""
    began = time.time()
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    device = torch.device(args.device)
    encoders = Encoders.load(args.encoders, device)
    frames = 9
    data = filled_pool(args, encoders, frames, began, device)
    empty = encoders.text.encode([""]).to(device)
    model = first_model(args, device)
    network = compiled(model) if args.compile else model
    trained = Trained(model, args, betas=(0.9, 0.99), clip=1.0)
    running = torch.zeros(1, device=device)

    def update() -> None:
        clean, y, text, image = data.batch(args.batch)
        dropped = torch.rand(args.batch, device=device) < 0.1
        condition = Condition(torch.where(dropped[:, None, None], empty, text), image, y)
        sigma = training_sigma(torch.rand(args.batch, device=device), args.shift)[:, None].expand(-1, frames)
        noise = torch.randn_like(clean)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16, cache_enabled=False):
            predicted = network(add_noise(clean, noise, sigma), sigma, condition)
        loss = (predicted.float() - velocity(clean, noise)).square().mean()
        running.add_(loss.detach())
        trained.update(loss)

    # Warms up with learning rates of 0; on a GPU a step is then replayed as one graph: Python would be the slower half.
    advance = captured(update) if device.type == "cuda" and args.graph else update
    update()
    running.zero_()
    print(f"{time.time() - began:5.0f}s ready", flush=True)
    run(args, began, data, [trained], lambda step: advance(), running)


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
    parser.add_argument("--output", type=Path, default=TOY / "teacher")
    parser.add_argument("--init", type=Path, default=None, help="start from these weights")
    parser.add_argument("--patch", type=int, default=2, help="latent pixels along a token's side, without --init")
    parser.add_argument("--width", type=int, default=128, help="of tokens, a multiple of 32, without --init")
    parser.add_argument("--layers", type=int, default=6, help="blocks, without --init")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--graph", action=argparse.BooleanOptionalAction, default=True, help="replay a CUDA graph")
    add_arguments(parser)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
