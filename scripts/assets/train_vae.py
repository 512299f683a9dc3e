"""Trains the toy VAE (diffusers' `AutoencoderKLWan`) on worlds rendered on the fly, within a wall-clock limit.

Made `longtake/assets/toy/vae` (the limit is in minutes: another machine makes other weights):

    python scripts/assets/train_vae.py --minutes 5.5 --pool 12000 --lr 8e-3

The folder is rewritten atomically every few minutes, with `latents_mean` and `latents_std` measured on held-out
worlds, so that partly trained weights are usable.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import toy_encoders as toy
from muon import Muon
from torch import Tensor

from longtake.toy.world import sample_world

TRAIN_SEED, HELD_OUT_SEED = 71_001, 71_002
POOL_FRAMES = 17
GREY_SHARE = 0.04


def render_clip(index: int, seed: int = TRAIN_SEED) -> np.ndarray:
    """uint8 [T, h, w, 3] of one world."""
    return sample_world(seed, index).render(POOL_FRAMES)


class Pool:
    """uint8 clips on the device, rendered once by several processes."""

    def __init__(self, size: int, device: torch.device, processes: int) -> None:
        with get_context("spawn").Pool(processes) as workers:
            clips = workers.map(render_clip, range(size), chunksize=64)
        self.clips = torch.from_numpy(np.stack(clips)).to(device)

    def batch(self, rng: np.random.Generator, batch_size: int, num_frames: int) -> Tensor:
        """Random clips [B, 3, T, h, w] in [-1, 1], flipped at random in space and time."""
        start = int(rng.integers(0, POOL_FRAMES - num_frames + 1))
        chosen = torch.from_numpy(rng.integers(0, len(self.clips), batch_size)).to(self.clips.device)
        video = to_video(self.clips[chosen, start : start + num_frames])
        video = video.flip([axis for axis in (2, 3, 4) if rng.random() < 0.5])
        # Image-to-video conditions are a picture followed by mid grey: keep their latents in the trained range.
        grey = torch.from_numpy(rng.random(batch_size) < GREY_SHARE).to(video.device)
        video[grey, :, 1:] = 0
        return video


def to_video(clips: Tensor) -> Tensor:
    """uint8 [B, T, h, w, 3] -> float [B, 3, T, h, w] in [-1, 1]."""
    return clips.permute(0, 4, 1, 2, 3).float().div(127.5).sub(1)


def moving_weight(video: Tensor, gain: float) -> Tensor:
    """1 on the still background, 1 + gain where something moves within the clip: sprites cover few pixels."""
    moved = (video.amax(2, keepdim=True) - video.amin(2, keepdim=True)).amax(1, keepdim=True) > 0.15
    return 1 + gain * moved.float()


def loss_of(vae: torch.nn.Module, video: Tensor, kl_weight: float, moving_gain: float) -> tuple[Tensor, Tensor]:
    """Weighted L1 + MSE + KL of a reparametrised sample. Returns (loss, plain MSE)."""
    posterior = vae.encode(video).latent_dist
    decoded = decode_unclamped(vae, posterior.sample())
    error = decoded - video
    weight = moving_weight(video, moving_gain)
    weight = weight / weight.mean()
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    loss = 0.5 * (weight * error.abs()).mean() + 2 * (weight * error.square()).mean() + kl_weight * kl
    return loss, error.detach().square().mean()


def decode_unclamped(vae: torch.nn.Module, latents: Tensor) -> Tensor:
    """The decoder without the final clamp, which would stop the gradient of every pixel that overshoots."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    features: list[object] = [None] * sum(type(m).__name__ == "WanCausalConv3d" for m in vae.decoder.modules())
    x = vae.post_quant_conv(latents)
    chunks = [
        vae.decoder(x[:, :, i : i + 1], feat_cache=features, feat_idx=[0], first_chunk=i == 0)
        for i in range(x.shape[2])
    ]
    return unpatchify(torch.cat(chunks, 2), patch_size=vae.config.patch_size)


@torch.no_grad()
def evaluate(vae: torch.nn.Module, clips: Tensor) -> tuple[float, float, list[float], list[float]]:
    """PSNR in dB over all pixels and over moving pixels, and the mean and std of mu a channel, on held-out clips."""
    squared, moving, moving_count, means = 0.0, 0.0, 0.0, []
    for start in range(0, len(clips), 8):
        video = to_video(clips[start : start + 8])
        mu = vae.encode(video).latent_dist.mean
        error = (vae.decode(mu).sample - video).square()
        moved = (moving_weight(video, 1.0) - 1).expand_as(error)
        squared += error.mean(dim=(1, 2, 3, 4)).sum().item()
        moving += (error * moved).sum().item()
        moving_count += moved.sum().item()
        means.append(mu)
    mu = torch.cat(means)
    psnr = [10 * math.log10(4 / e) for e in (squared / len(clips), moving / max(moving_count, 1))]
    return psnr[0], psnr[1], mu.mean(dim=(0, 2, 3, 4)).tolist(), mu.std(dim=(0, 2, 3, 4)).tolist()


def save(vae: torch.nn.Module, folder: Path, mean: list[float], std: list[float]) -> None:
    """float16 weights beside the config, in a temporary folder that then takes the place of `folder`."""
    copy = toy.build_vae(latents_mean=mean, latents_std=std)
    copy.load_state_dict({key: value.cpu() for key, value in vae.state_dict().items()})
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    copy.half().save_pretrained(fresh)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def build_optimizers(vae: torch.nn.Module, lr: float, *, muon: bool) -> list[torch.optim.Optimizer]:
    """Muon for the kernels inside and AdamW for the first and last layers, biases and gains; or AdamW for all."""
    if not muon:
        return [torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)]
    outer = {vae.encoder.conv_in.weight, vae.decoder.conv_out.weight}
    kernels = [p for p in vae.parameters() if p.ndim >= 4 and p.shape[0] > 1 and p.shape[1] > 1 and p not in outer]
    chosen = set(kernels)
    others = [p for p in vae.parameters() if p not in chosen]
    return [
        Muon(kernels, lr, weight_decay=0.01),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def learning_rate(progress: float, step: int, peak: float, warmup: int) -> float:
    """Linear warm-up by step, then cosine to 2 % of the peak at the time limit."""
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * cosine * min(1.0, (step + 1) / warmup)


def clip_size(rng: np.random.Generator, progress: float, frames: int) -> tuple[int, int]:
    """(batch, frames) of about `frames` frames: pictures and short clips first, longer ones later."""
    if progress < 0.1:
        weights = [0.6, 0.4, 0.0, 0.0]
    else:
        weights = [0.0, 0.5, 0.5, 0.0] if progress < 0.6 else [0.0, 0.2, 0.6, 0.2]
    length = (1, 5, 9, 17)[rng.choice(4, p=weights)]
    return max(1, frames // length), length


def new_vae(init: Path | None) -> torch.nn.Module:
    """A VAE in training mode, random or from a folder."""
    if init:
        from diffusers import AutoencoderKLWan

        return AutoencoderKLWan.from_pretrained(init, torch_dtype=torch.float32).train()
    vae = toy.build_vae()
    with torch.no_grad():
        # The library's start (variance 1, means near 0) drowns the signal: training then never leaves the mean colour.
        vae.quant_conv.weight[vae.config.z_dim :] = 0
        vae.quant_conv.bias[vae.config.z_dim :] = -5.0
    return vae.train()


def train(args: argparse.Namespace) -> None:
    """Runs until `args.minutes` are over; logs a line every 100 steps."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    device = torch.device(args.device)
    rng = np.random.default_rng(args.seed)
    vae = new_vae(args.init).to(device)
    pool = Pool(args.pool, device, args.processes)
    clips = [render_clip(i, HELD_OUT_SEED) for i in range(64)]
    held_out = torch.from_numpy(np.stack(clips)).to(device)
    optimizers = build_optimizers(vae, args.lr, muon=args.muon)
    started = clock = saved = time.time()
    step, frames, running = 0, 0, torch.zeros((), device=device)
    while (progress := (time.time() - started) / (60 * args.minutes)) < 1:
        rate = learning_rate(progress, step, args.lr, args.warmup)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        batch_size, num_frames = clip_size(rng, progress, args.frames)
        video = pool.batch(rng, batch_size, num_frames)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16 and progress < 0.9):
            loss, mse = loss_of(vae, video, args.kl_weight, args.moving_gain)
        vae.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        if torch.isfinite(norm):
            for optimizer in optimizers:
                optimizer.step()
        step, frames, running = step + 1, frames + batch_size * num_frames, running + mse
        if step % 100 == 0:
            speed = frames / (time.time() - clock)
            psnr = 10 * math.log10(4 / (running.item() / 100))
            print(
                f"{time.time() - started:6.0f}s step {step} loss {loss.item():.4f} train PSNR {psnr:.2f} dB "
                f"grad {norm.item():.3f} lr {rate:.1e} {speed:.0f} frames/s",
                flush=True,
            )
            frames, running, clock = 0, torch.zeros((), device=device), time.time()
        if time.time() - saved > args.save_minutes * 60:
            report(vae, held_out, args.output, step)
            saved = time.time()
    report(vae, held_out, args.output, step)


def report(vae: torch.nn.Module, held_out: Tensor, folder: Path, step: int) -> None:
    """Evaluates, prints and saves."""
    vae.eval()
    psnr, moving, mean, std = evaluate(vae, held_out)
    save(vae, folder, mean, std)
    vae.train()
    print(f"step {step} held-out PSNR {psnr:.2f} dB, moving pixels {moving:.2f} dB, saved {folder}", flush=True)
    print(f"  std {' '.join(f'{s:.2f}' for s in std)}", flush=True)


def main() -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parents[2]
    parser.add_argument("--output", type=Path, default=root / "longtake/assets/toy/vae")
    parser.add_argument("--init", type=Path, default=None, help="start from these weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=5.5)
    parser.add_argument("--save-minutes", type=float, default=2)
    parser.add_argument("--pool", type=int, default=12000, help="worlds that are rendered, once")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="processes that render")
    parser.add_argument("--frames", type=int, default=576, help="pixel frames of a batch")
    parser.add_argument("--lr", type=float, default=8e-3)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--kl-weight", type=float, default=1e-4)
    parser.add_argument("--moving-gain", type=float, default=3.0)
    parser.add_argument("--muon", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    train(args)


if __name__ == "__main__":
    main()
