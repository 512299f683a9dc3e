"""Goes on training the decoder of the toy VAE, on videos longer than those that it was trained on.

`train_vae.py` shows the VAE 17 frames at most. Past them its pictures lose about 4 % of saturation. Here the encoder
stays as it is, so that latents, and what was trained on them, keep their meaning; the decoder streams long videos, two
latent frames a step, with its feature cache carried on (and no gradient into what is past):

    python scripts/assets/tune_decoder.py --output longtake/assets/toy/vae --minutes 20
"""

from __future__ import annotations

import argparse
import math
import os
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from train_vae import HELD_OUT_SEED, TRAIN_SEED, learning_rate, moving_weight, save, to_video

from longtake.toy.world import sample_world

STEP_LATENTS = 2


class Streams:
    """Videos that the decoder plays side by side; one that has ended gives its place to the next."""

    def __init__(self, vae: torch.nn.Module, seed: int, num_worlds: int, num_frames: int, processes: int) -> None:
        with get_context("spawn").Pool(processes) as workers:
            clips = workers.starmap(_render, [(seed, index, num_frames) for index in range(num_worlds)], chunksize=4)
        self.pixels = torch.from_numpy(np.stack(clips))
        with torch.no_grad():
            self.latents = torch.cat([vae.encode(to_video(clip[None])).latent_dist.mean for clip in self.pixels])

    def __len__(self) -> int:
        return len(self.latents)


def _render(seed: int, index: int, num_frames: int) -> np.ndarray:
    return sample_world(seed, index).render(num_frames)


def decode_step(vae: torch.nn.Module, latents: Tensor, features: list[object], *, first: bool) -> Tensor:
    """Pixels [B, 3, T, h, w] of the next latents [B, C, f, H, W], unclamped; `features` is updated in place."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    x = vae.post_quant_conv(latents)
    chunks = [
        vae.decoder(x[:, :, i : i + 1], feat_cache=features, feat_idx=[0], first_chunk=first and i == 0)
        for i in range(x.shape[2])
    ]
    return unpatchify(torch.cat(chunks, 2), patch_size=vae.config.patch_size)


def new_features(vae: torch.nn.Module) -> list[object]:
    """An empty feature cache of the decoder."""
    return [None] * sum(type(module).__name__ == "WanCausalConv3d" for module in vae.decoder.modules())


def pixels_of(start: int, count: int) -> slice:
    """Pixel frames of `count` latent frames from `start`: the first latent is one picture, the others four."""
    return slice(0 if start == 0 else 4 * start - 3, 4 * (start + count) - 3)


def loss_of(decoded: Tensor, video: Tensor, moving_gain: float) -> Tensor:
    """As `train_vae.py`, and the mean colour of each frame beside it."""
    error = decoded - video
    weight = moving_weight(video, moving_gain)
    weight = weight / weight.mean()
    colour = error.mean((3, 4)).abs().mean()
    return 0.5 * (weight * error.abs()).mean() + 2 * (weight * error.square()).mean() + 0.5 * colour


@torch.no_grad()
def evaluate(vae: torch.nn.Module, held_out: Streams) -> tuple[float, list[float]]:
    """PSNR in dB, and saturation over the truth's in windows of 33 frames."""
    squared, ratios = [], []
    for latents, pixels in zip(held_out.latents, held_out.pixels, strict=True):
        video, decoded = to_video(pixels[None]), vae.decode(latents[None]).sample
        squared.append((decoded - video).square().mean().item())
        spread = [(x.amax(1) - x.amin(1)).mean((0, 2, 3)) for x in (decoded, video)]
        ratios.append([(a.mean() / b.mean()).item() for a, b in zip(spread[0].split(33), spread[1].split(33))])
    return 10 * math.log10(4 / float(np.mean(squared))), np.mean(ratios, 0).round(4).tolist()


def train(args: argparse.Namespace) -> None:
    """Runs until `args.minutes` are over."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(args.seed)
    vae = AutoencoderKLWan.from_pretrained(args.init or args.output, torch_dtype=torch.float32).requires_grad_(False)
    began = time.time()
    held_out = Streams(vae, HELD_OUT_SEED, 8, args.num_frames, args.processes)
    worlds = Streams(vae, TRAIN_SEED, args.worlds, args.num_frames, args.processes)
    print(f"{time.time() - began:.0f}s encoded {len(worlds)} worlds; before: {evaluate(vae, held_out)}", flush=True)
    trained = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
    average = [parameter.detach().clone() for parameter in trained]
    num_latents = worlds.latents.shape[2]
    step, began, saved = 0, time.time(), time.time()
    while (progress := (time.time() - began) / (60 * args.minutes)) < 1:
        chosen = torch.from_numpy(rng.integers(0, len(worlds), args.batch))
        features, start = new_features(vae), 0
        while start < num_latents:
            count = min(1 if start == 0 else STEP_LATENTS, num_latents - start)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress, step, args.lr, warmup=50)
            latents = worlds.latents[chosen, :, start : start + count]
            noisy = latents + args.noise * torch.randn_like(latents)
            decoded = decode_step(vae, noisy, features, first=start == 0)
            loss = loss_of(decoded, to_video(worlds.pixels[chosen, pixels_of(start, count)]), args.moving_gain)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            torch._foreach_lerp_(average, [parameter.detach() for parameter in trained], 1 / min(step + 1, 100))
            features[:] = [f.detach() if isinstance(f, Tensor) else f for f in features]
            start, step = start + count, step + 1
            progress = min(1.0, (time.time() - began) / (60 * args.minutes))
            if step % 50 == 0:
                print(f"{time.time() - began:5.0f}s step {step} loss {loss.item():.4f}", flush=True)
        if time.time() - saved > 240:
            report(vae, trained, average, held_out, args.output)
            saved = time.time()
    report(vae, trained, average, held_out, args.output)


def report(vae: torch.nn.Module, trained: list[Tensor], average: list[Tensor], held_out: Streams, folder: Path) -> None:
    """Evaluates and saves the averaged weights."""
    current = [parameter.detach().clone() for parameter in trained]
    with torch.no_grad():
        torch._foreach_copy_(trained, average)
        print(f"held-out: {evaluate(vae, held_out)}, saved {folder}", flush=True)
        save(vae, folder, vae.config.latents_mean, vae.config.latents_std)
        torch._foreach_copy_(trained, current)


def main() -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--init", type=Path, default=None, help="start from these weights (default: --output)")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--worlds", type=int, default=64)
    parser.add_argument("--num-frames", type=int, default=129, help="pixel frames of a video, 4n+1")
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--noise", type=float, default=0.03, help="standard deviation added to the latents")
    parser.add_argument("--moving-gain", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
