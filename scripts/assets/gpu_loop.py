"""Optimizers and the clock of the scripts that train toy transformers on one GPU: a learning rate that falls to zero as
the time runs out, Muon for the matrices inside the blocks, an average of the weights.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from muon import Muon
from torch import Tensor
from world_pool import Pool

from longtake.encoders.bundle import Encoders
from longtake.models.dit import VideoDiT
from longtake.weights.load import save_dit

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / "longtake/assets/toy"


class Trained:
    """One network, its optimizers, and the average of its weights that is saved."""

    def __init__(self, model: VideoDiT, args: argparse.Namespace, *, betas: tuple[float, float], clip: float) -> None:
        self.model, self.clip, self.decay = model, clip, args.ema
        self.average = {name: p.detach().clone() for name, p in model.state_dict().items()}
        device = next(model.parameters()).device
        inner = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
        chosen = set(inner)
        others = [p for p in model.parameters() if p not in chosen]
        on_gpu = device.type == "cuda"
        self.peaks = (args.adam_lr, args.lr)
        self.rates = [torch.zeros((), device=device) for _ in self.peaks]  # tensors, so that a captured step reads them
        adam = torch.optim.AdamW(others, lr=self.rates[0], betas=betas, fused=True, capturable=on_gpu)
        self.optimizers: list[torch.optim.Optimizer] = [adam]
        if args.muon:
            self.optimizers.append(Muon(inner, self.rates[1], momentum=0.95, weight_decay=0.01))
        else:
            self.optimizers.append(
                torch.optim.AdamW(inner, lr=self.rates[1], betas=betas, fused=True, capturable=on_gpu)
            )

    def set_rates(self, factor: float) -> None:
        """The peaks of the learning rates, times `factor`."""
        for rate, peak in zip(self.rates, self.peaks):
            rate.fill_(peak * factor)

    def update(self, loss: Tensor) -> None:
        """One update by the gradient of `loss`."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip, foreach=True)
        for optimizer in self.optimizers:
            optimizer.step()
        torch._foreach_lerp_(list(self.average.values()), list(self.model.state_dict().values()), 1 - self.decay)
        self.model.zero_grad(set_to_none=True)


def run(
    args: argparse.Namespace,
    began: float,
    data: Pool,
    networks: list[Trained],
    advance: Callable[[int], None],
    running: Tensor,
) -> int:
    """Advances until `args.seconds` after `began` are over, and saves the average of the first network.

    Args: `advance(step)` makes one step; `running` is where it adds its losses. Returns the number of steps.
    """
    started, step = time.time(), 0
    total = max(1.0, args.seconds - (started - began))
    clock, saved = time.time(), time.time()
    model, average = networks[0].model, networks[0].average
    while (progress := (time.time() - started) / total) < 1:
        factor = min(1.0, (step + 1) / args.warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        for network in networks:
            network.set_rates(factor)
        advance(step)
        step += 1
        if step % args.grow_every == 0 and data.filled < args.most_worlds:
            data.grow()
        if step % args.log_every == 0:
            losses = ", ".join(f"{value:.4f}" for value in (running / args.log_every).tolist())
            speed = args.log_every / (time.time() - clock)
            seen = f"{data.filled} worlds, {speed:.1f} steps/s"
            print(f"{time.time() - began:5.0f}s step {step} loss {losses} {seen}", flush=True)
            running.zero_()
            clock = time.time()
        if time.time() - saved > args.save_seconds:
            kept = f"{time.time() - began:.0f}" if args.keep_all else "partial"
            save_dit(model.config, average, args.output.with_name(f"{args.output.name}.{kept}"), torch.float16)
            saved = time.time()
    save_dit(model.config, average, args.output, torch.float16)
    print(f"{step} steps, {data.filled} worlds, saved {args.output}", flush=True)
    print(f"the next leg may begin with --first-world {data.asked}")
    data.workers.terminate()
    return step


def filled_pool(args: argparse.Namespace, encoders: Encoders, frames: int, began: float, device: torch.device) -> Pool:
    """A pool with the first `args.worlds` worlds in it."""
    data = Pool(encoders, args, frames, device)
    data.grow()  # starts the workers and warms up
    clock = time.time()
    while data.filled < args.worlds:
        data.grow()
    speed = data.filled / max(time.time() - clock, 1e-9)
    print(f"{time.time() - began:5.0f}s {data.filled} worlds encoded, {speed:.0f} a second", flush=True)
    return data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all of these scripts have."""
    parser.add_argument("--encoders", type=Path, default=TOY, help="folder of all three")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1500)
    parser.add_argument("--save-seconds", type=float, default=45, help="between saves to OUTPUT.partial")
    parser.add_argument("--keep-all", action="store_true", help="save to OUTPUT.SECONDS, and keep them all")
    parser.add_argument("--worlds", type=int, default=10000, help="encoded before training begins")
    parser.add_argument("--first-world", type=int, default=0, help="number of the first world that is drawn")
    parser.add_argument("--most-worlds", type=int, default=400000, help="room for the worlds, 50 kB each of 9 latents")
    parser.add_argument("--grow-every", type=int, default=16, help="steps until another chunk of worlds is encoded")
    parser.add_argument("--chunk", type=int, default=250, help="worlds that are encoded at a time")
    parser.add_argument("--stops", type=float, default=0.4, help="share of worlds that may have a sprite that stands")
    parser.add_argument("--hard-share", type=float, default=0.0, help="share of worlds with sprites that overlap")
    parser.add_argument("--hard-visibility", type=float, default=0.9, help="what may be seen of one")
    parser.add_argument("--open-share", type=float, default=0.0, help="share of worlds with a motion left open")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="products in bfloat16")
    parser.add_argument("--lr", type=float, default=3e-3, help="of the matrices inside the blocks")
    parser.add_argument("--adam-lr", type=float, default=1e-3, help="of everything else")
    parser.add_argument("--muon", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--shift", type=float, default=5.0)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--log-every", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
