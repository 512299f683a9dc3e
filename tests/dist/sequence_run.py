"""Each rank's part of the unit tests of sequence parallelism, for `test_sequence`: plain tensors and one transformer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from longtake.models.execution import Execution
from longtake.plan import StreamPlan
from longtake.rollout.denoise import Denoiser

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from tape import Tape
from tiny_models import make_tiny_condition, make_tiny_model, relative_error

from longtake.config.groups import ParallelConfig
from longtake.parallel.mesh import init_mesh
from longtake.parallel.ulysses import Ulysses
from longtake.errors import CacheError, ConfigError, ShapeError
from longtake.models.dit import VideoDiT
from longtake.models.recompute import Again, ByBlock
from longtake.rollout.cuda_graphs import CUDAGraphRunner, Made, Recorded
from longtake.rollout.self_forcing import roll_out
from tiny_plan import tiny_plan

HEADS = 4
SIZES = {"even": (4, 8), "uneven": (6, 6)}  # 8 and 9 tokens a frame
FRAMES = 5
ERRORS: dict[str, Callable] = {
    "heads": lambda ranks: make_tiny_model(num_heads=1 + ranks.size, dim=8 * (1 + ranks.size)).executed(
        Execution(ranks)
    ),
    "tokens": lambda ranks: ranks.shard(ranks.size - 1),
}


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exchanges(ranks: Ulysses, tokens: int) -> dict[str, bool]:
    """Each function of a shard against slices of the whole, forward and backward; equal to the last bit."""
    shard, first = ranks.shard(tokens), sum(ranks.shard(tokens).sizes[: ranks.rank])
    n, last = HEADS // ranks.size, first + ranks.shard(tokens).size
    heads = slice(n * ranks.rank, n * (ranks.rank + 1))
    whole = [numbers(seed, 2, 3, tokens, HEADS, 5) for seed in range(3)]
    mine = [x[:, :, first:last].clone().requires_grad_() for x in whole]
    got = shard.to_heads(*mine)
    back = shard.to_tokens(got[0])
    result = {
        "own memory": len({x.untyped_storage().data_ptr() for x in got}) == len(got),
        "heads": all(torch.equal(a, b[:, :, :, heads]) for a, b in zip(got, whole)),
        "tokens": torch.equal(back, mine[0]),
        "whole": torch.equal(shard.all_gather(mine[0]), whole[0]),
        "take": torch.equal(shard.shard(whole[0]), mine[0]),
    }
    # The gradient of an exchange is the other exchange of the gradient.
    grads = [numbers(10 + seed, *x.shape) for seed, x in enumerate(whole)]
    sum((a * g[:, :, :, heads]).sum() for a, g in zip(got, grads)).backward()
    result["heads backward"] = all(torch.equal(x.grad, g[:, :, first:last]) for x, g in zip(mine, grads))
    some = whole[0][:, :, :, heads].clone().requires_grad_()
    (shard.to_tokens(some) * grads[0][:, :, first:last]).sum().backward()
    result["tokens backward"] = torch.equal(some.grad, grads[0][:, :, :, heads])
    # The whole: this rank's gradient, times the ranks over which it will be averaged; back before the split.
    piece, x = mine[1].detach().requires_grad_(), whole[1].clone().requires_grad_()
    (shard.all_gather(piece) * grads[1]).sum().backward()
    result["whole backward"] = torch.equal(piece.grad, ranks.size * grads[1][:, :, first:last])
    (shard.all_gather(shard.shard(x)) * grads[1]).sum().backward()
    result["take backward"] = torch.equal(x.grad, grads[1])
    return result


def check(name: str, model: VideoDiT, plain: VideoDiT, use: Callable[[VideoDiT], torch.Tensor]) -> dict[str, float]:
    """Relative errors of what `use` gives, and of the worst gradient after the mean over ranks."""
    ours, theirs = use(model), use(plain)
    errors = {name: relative_error(ours.detach(), theirs.detach())}
    if ours.requires_grad:
        target = numbers(5, *ours.shape)
        for network, out in ((model, ours), (plain, theirs)):
            network.zero_grad()
            (out * target).mean().backward()
        worst = 0.0
        norm = max(float(p.grad.norm()) for p in plain.parameters() if p.grad is not None)
        for mine, wanted in zip(model.parameters(), plain.parameters(), strict=True):
            if wanted.grad is not None:  # of those that nearly cancel, rounding is most
                grad = mine.grad.clone()
                dist.all_reduce(grad)
                error = float((grad / dist.get_world_size() - wanted.grad).norm())
                worst = max(worst, error / max(float(wanted.grad.norm()), 0.01 * norm))
        errors[f"{name}, gradients"] = worst
    return errors


def passes(ranks: Ulysses, size: tuple[int, int], **autocast: bool) -> dict[str, float]:
    """The three uses of the transformer against one process."""
    model, plain = (make_tiny_model(True, num_heads=HEADS) for _ in range(2))
    model = model.executed(Execution(ranks))
    condition = make_tiny_condition(model, num_frames=FRAMES, size=size)
    x, sigma = numbers(1, 2, FRAMES, 4, *size), torch.rand(2, FRAMES, generator=torch.Generator().manual_seed(2))
    plan = tiny_plan(2, 1)
    layouts = {
        rope: plan.but(window_frames=3, sink_frames=1, rope=rope).teacher_forcing_layout(FRAMES)
        for rope in ("relative", "absolute")
    }
    both, levels = torch.cat([x, x.flip(1)], 1), torch.cat([torch.zeros_like(sigma), sigma], 1)
    errors = check("bidirectional", model, plain, lambda m: m(x, sigma, condition))
    # Ranks exchange again in backward what they keep none of, all at the same time.
    kept: dict[str, Again | ByBlock] = {"attention": "selective", "products": "products", "by block": ByBlock([False, "products"])}
    for name, ways in kept.items():
        again = model.executed(replace(model.execution, recompute=ways))
        errors |= check(f"kept, {name}", again, plain, lambda m: m(x, sigma, condition))
    for rope, layout in layouts.items():
        errors |= check(f"masked, {rope}", model, plain, lambda m, k=layout: m(both, levels, condition, k))  # noqa: B023

    def cached(m: VideoDiT, rope: str, checkpointing: bool) -> torch.Tensor:
        m = m.executed(replace(m.execution, recompute=checkpointing))
        cache = m.new_cache(tiny_plan(2, 1, 3, 1, rope), 2, size, spare_frames=2)
        out = []
        for start, end in plan.blocks(0, FRAMES):
            out.append(Denoiser(m)(x[:, start:end], sigma[:, start:end], condition, cache))
            with torch.no_grad():
                Denoiser(m)(x[:, start:end], torch.zeros(2), condition, cache, commit=True)
        return torch.cat(out, 1)

    for rope in layouts:
        for checkpointing in (False, True):
            name = f"cached, {rope}{', recomputed' if checkpointing else ''}"
            errors |= check(name, model, plain, lambda m, r=rope, c=checkpointing: cached(m, r, c))  # noqa: B023
        with torch.no_grad():
            errors |= check(f"streamed, {rope}", model, plain, lambda m, r=rope: cached(m, r, False))  # noqa: B023

    def unrolled(m: VideoDiT, rope: str, replays: bool = False, **law: Any) -> torch.Tensor:
        # Of all blocks at once, with checkpointing (which one way has) or without, against one at a time.
        batched = m is model and not replays
        m = m.executed(replace(m.execution, recompute=rope == "relative"))
        rules = plan.but(window_frames=3, sink_frames=1, rope=rope, sigmas=(1.0, 0.5), **law)

        def noise(start: int, end: int, step: int) -> torch.Tensor:
            return numbers(10 * start + step, 2, end - start, 4, *size)

        denoiser = Denoiser(m, batched_exit_backward=batched, replays=replays)
        return roll_out(denoiser, condition, x[:, :1], noise, rules, FRAMES, size, with_grad=True).latents

    for rope in layouts:
        errors |= check(f"rolled out, {rope}", model, plain, lambda m, r=rope: unrolled(m, r))  # noqa: B023
        errors |= check(f"replayed, {rope}", model, plain, lambda m, r=rope: unrolled(m, r, True))  # noqa: B023
    last = {"context": "last_step", "context_from": 0}
    errors |= check("rolled out, last step", model, plain, lambda m: unrolled(m, "relative", **last))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        errors |= {
            f"bfloat16: {k}": v
            for k, v in check("masked", model, plain, lambda m: m(both, levels, condition, layouts["relative"])).items()
        }
    return errors


def cache_rules(ranks: Ulysses) -> dict[str, object]:
    """What a cache holds on this rank, and that its rules hold."""
    model, plain = (make_tiny_model(True, num_heads=HEADS) for _ in range(2))
    model = model.executed(Execution(ranks))
    size = SIZES["even"]
    condition, x = make_tiny_condition(model, num_frames=FRAMES, size=size), numbers(1, 2, 2, 4, *size)
    caches = [m.new_cache(tiny_plan(2, 1, 3, 1, "absolute"), 2, size) for m in (model, plain)]
    with torch.no_grad():
        for m, cache in zip((model, plain), caches):
            Denoiser(m)(x, torch.zeros(2), condition, cache, commit=True)
    ours, theirs = (cache.stored([0, 1])[0] for cache in caches)
    n = HEADS // ranks.size
    model = model.executed(replace(model.execution, recompute=True))
    out = Denoiser(model)(x[:, :1], torch.ones(2), condition, caches[0])
    try:
        with torch.no_grad():
            for _ in range(2):
                Denoiser(model)(x[:, :1], torch.zeros(2), condition, caches[0], commit=True)
        refused = False
    except CacheError:
        refused = True
    out.sum().backward()
    return {
        "error": relative_error(ours, theirs[:, :, :, :, n * ranks.rank : n * (ranks.rank + 1)]),
        "shard of bytes": caches[0].size_bytes / caches[1].size_bytes,
        "refused": refused,
    }


def recorded(ranks: Ulysses) -> dict[str, object]:
    """Streamed passes that are recorded and replayed, against those that Python makes; what one rank cannot record,
    no rank replays.
    """
    size = SIZES["uneven"]
    model = make_tiny_model(True, num_heads=HEADS)
    model = model.executed(Execution(ranks))
    condition, x = make_tiny_condition(model, num_frames=FRAMES, size=size), numbers(1, 2, 2, 4, *size)

    def streamed(graphs: CUDAGraphRunner | None = None) -> torch.Tensor:
        denoiser = Denoiser(model, graphs=graphs)
        cache = model.new_cache(tiny_plan(2, 1, 5, 1), 2, size)
        out = []
        with torch.no_grad():
            for block in range(14):
                out.append(denoiser(x + block, torch.ones(2), condition, cache))
                denoiser(out[-1], torch.zeros(2), condition, cache, commit=True)
        return torch.cat(out, 1)

    def refuses(*works: Callable[[], Made]) -> list[Recorded]:
        if ranks.rank == 1:
            raise RuntimeError("no memory left")
        return [(lambda: None, (x,))]  # to record a pass starts none of its exchanges

    expected, tape = streamed(), Tape()
    equal = torch.equal(streamed(CUDAGraphRunner(tape)), expected)
    refusing = CUDAGraphRunner(refuses)
    return {
        "equal": equal,
        "replayed": tape.replayed,
        "equal where a rank cannot": torch.equal(streamed(refusing), expected),
        "given up": refusing._broken,
        "agree": [ranks.agree(True), ranks.agree(ranks.rank > 0)],
    }


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with init_mesh("cpu") as mesh:
        arranged = mesh.arranged(ParallelConfig(sequence=mesh.world_size))
        ranks = arranged.sequence
        assert ranks is not None and arranged.num_data_ranks == 1 and arranged.data_rank == 0
        calls = []
        exchange = dist.all_to_all_single
        with patch.object(dist, "all_to_all_single", lambda *a, **k: (calls.append(1), exchange(*a, **k))[1]):
            model = make_tiny_model(num_heads=HEADS)
            model = model.executed(Execution(ranks))
            with torch.no_grad():
                size = SIZES["even"]
                model(numbers(1, 2, 3, 4, *size), torch.ones(2), make_tiny_condition(model, size=size))
        seen: dict[str, object] = {"all-to-alls a layer": len(calls) / 2}
        for name, (height, width) in SIZES.items():
            seen[name] = {"exchanges": exchanges(ranks, height * width // 4), "passes": passes(ranks, (height, width))}
        seen["cache"] = cache_rules(ranks)
        seen["recorded"] = recorded(ranks)
        for name, provoke in ERRORS.items():
            try:
                provoke(ranks)
            except (ConfigError, ShapeError) as error:
                seen[f"error: {name}"] = str(error)
        (folder / f"rank{mesh.rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
