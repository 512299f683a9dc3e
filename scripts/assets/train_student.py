"""Trains toy students on one GPU within a wall-clock limit: stages `causal` and `distill` on worlds without end.

    python scripts/assets/train_student.py causal --init FOLDER --output FOLDER --seconds 400
    python scripts/assets/train_student.py distill --init FOLDER --output FOLDER --seconds 300

`longtake/assets/toy/README.md` has the commands that made the shipped weights. Losses, rules and noise levels are those
of `longtake train` with `configs/toy/causal.yaml` and `distill.yaml` (`--config` names another one); only data
(`world_pool.py`), random numbers and optimizer (`gpu_loop.py`) are arranged for speed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from gpu_loop import ROOT, TOY, Trained, add_arguments, filled_pool, run
from torch import Tensor

from longtake.condition import Condition, MaskLayout
from longtake.config.job import load_config
from longtake.config.stage import StageConfig
from longtake.encoders.bundle import Encoders
from longtake.models.attention import FrameMask, in_parts
from longtake.models.context import PreparedMask
from longtake.models.dit import VideoDiT
from longtake.models.execution import Execution
from longtake.objectives.base import Objective, Parts
from longtake.objectives.batch import EncodedBatch
from longtake.objectives.dmd import Dmd, DmdConfig
from longtake.objectives.teacher_forcing import TeacherForcing, TeacherForcingConfig
from longtake.rng import KeyedRNG
from longtake.rollout.cuda_graphs import CUDAGraphRunner
from longtake.rollout.denoise import Denoiser
from longtake.weights.load import load_dit


class DeviceDraws(KeyedRNG):
    """Random numbers drawn on the device, and none of them ever again."""

    def __init__(self, seed: int, device: torch.device) -> None:
        super().__init__(seed)
        self.device = device

    def noise(
        self,
        step: int,
        purpose: str,
        indices: Sequence[int],
        shape: Sequence[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        part: int = 0,
    ) -> Tensor:
        """As `KeyedRNG.noise`, but for where it is drawn."""
        return torch.randn(len(indices), *shape, device=self.device, dtype=dtype)

    def uniform(
        self,
        step: int,
        purpose: str,
        indices: Sequence[int],
        low: float = 0.0,
        high: float = 1.0,
        dtype: torch.dtype = torch.float32,
        part: int = 0,
    ) -> Tensor:
        """As `KeyedRNG.uniform`, but for where it is drawn."""
        return low + (high - low) * torch.rand(len(indices), device=self.device, dtype=dtype)


class Quick:
    """A student whose teacher-forcing calls, all of one mask, go through a compiled graph, and all others as ever."""

    def __init__(self, model: VideoDiT, mask: PreparedMask) -> None:
        self._model, self._mask = model, mask
        plain = model.executed(Execution(attend=attend_plainly))
        self._forced: Callable[..., Tensor] | None = torch.compile(plain, dynamic=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition, context: Any = None) -> Tensor:
        if isinstance(context, MaskLayout) and self._forced is not None:
            try:
                return self._forced(x, sigma, condition, self._mask)
            except RuntimeError as error:  # what a compiler raises is one
                print(f"not compiled: {error}", flush=True)
                self._forced = None
        return self._model(x, sigma, condition, context)


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, *, mask: FrameMask | None = None) -> Tensor:
    """Attention without the choice of a verified kernel, which a compiled graph cannot contain."""
    if mask is not None:
        return in_parts(q, k, v, mask, attend_plainly)
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def load_networks(
    args: argparse.Namespace, config: StageConfig, device: torch.device
) -> tuple[Objective, list[Trained]]:
    """The objective of the stage, and what it trains; the student first."""
    draws, plan, flow = DeviceDraws(args.seed, device), config.stream_plan, config.flow
    student = load_dit(args.init, device)
    graphs = CUDAGraphRunner() if device.type == "cuda" and args.graphs else None
    denoiser = Denoiser(student, graphs=graphs)
    parts = Parts(
        denoiser, {"generator": student}, {}, draws, plan, shift=flow.shift, num_frames=config.video.num_latent_frames
    )
    if isinstance(config.objective, TeacherForcingConfig):
        causal = TeacherForcing(parts, config.objective)
        if args.compile:
            shape = config.video
            tokens = student.tokens_per_frame(shape.latent_height, shape.latent_width)
            layout = plan.teacher_forcing_layout(config.video.num_latent_frames)
            mask = PreparedMask.of(layout, tokens, device, flex=False)
            causal.model = cast(VideoDiT, Quick(student, mask))
        return causal, [Trained(student, args, betas=(0.9, 0.99), clip=1.0)]
    assert isinstance(config.objective, DmdConfig)
    warmed = {"critic_warmup_steps": args.critic_warmup_steps}
    settings = config.objective.model_copy(update={"critic": config.objective.critic.model_copy(update=warmed)})
    critic, real = load_dit(args.critic or args.teacher, device), load_dit(args.teacher, device)
    parts = replace(parts, trained={"generator": student, "critic": critic}, frozen={"teacher": real})
    dmd = Dmd(parts, settings)
    trained = [Trained(network, args, betas=(0.0, 0.999), clip=10.0) for network in (student, critic)]
    trained[1].peaks = tuple(args.critic_rate * peak for peak in trained[1].peaks)
    return dmd, trained


def train(args: argparse.Namespace) -> None:
    """Runs until `args.seconds` after the start of the program are over; writes the student's averaged weights."""
    began = time.time()
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    device = torch.device(args.device)
    config = load_config(args.config or ROOT / f"configs/toy/{args.stage}.yaml", args.changes)
    assert isinstance(config, StageConfig)
    encoders = Encoders.load(args.encoders, device)
    learnt, made = config.clip_shape.num_latent_frames, config.video.num_latent_frames
    data = filled_pool(args, encoders, max(learnt, made), began, device)
    empty = encoders.text.encode([""]).to(device).expand(args.batch, -1, -1)
    objective, networks = load_networks(args, config, device)
    by_name = dict(zip(objective.networks, networks))
    running = torch.zeros(len(networks), device=device)
    indices = range(args.batch)

    def advance(step: int) -> None:
        clean, y, text, image = data.batch(args.batch)
        clean = clean[:, :learnt]
        batch = EncodedBatch(
            indices, Condition(text, image, y), empty, (clean.shape[-2], clean.shape[-1]), clean, clean[:, :1]
        )
        for turn in objective.turns(step):
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                loss = objective.loss(turn, batch, step).loss
            running[list(by_name).index(turn)] += loss.detach()
            by_name[turn].update(loss)

    run(args, began, data, networks, advance, running)


def main() -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["causal", "distill"])
    parser.add_argument("changes", nargs="*", help="changes of the configuration, a.b=c")
    parser.add_argument("--config", type=Path, help="default: that of the stage in configs/toy")
    parser.add_argument("--init", type=Path, required=True, help="weights to start from")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, default=TOY / "teacher")
    parser.add_argument("--critic", type=Path, help="weights of the critic (default: the teacher's)")
    parser.add_argument("--critic-rate", type=float, default=2.0, help="its learning rate / the student's")
    parser.add_argument("--head-start", type=int, default=100, help="first steps, of the critic alone")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="causal: one graph")
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True, help="replay CUDA graphs")
    add_arguments(parser)
    train(parser.parse_intermixed_args())


if __name__ == "__main__":
    main()
