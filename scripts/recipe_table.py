"""Prints the table of `docs/recipes.md`: the main values of every recipe in `configs/`, in Markdown.

Values are those of the resolved configurations; GPUs, memory and hours are what the heads of the files state.
"""

from __future__ import annotations

import re
from pathlib import Path

from longtake.config.job import load_config
from longtake.config.stage import StageConfig

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
STATED = {
    "GPUs": r"GPUs +(\d+ with \d+ GB)",
    "GiB a rank": r"Memory +(\d+) GiB",
    "hours": r"(?i)time +about ([\d.]+) hours",
}
COLUMNS = [
    "objective",
    "model",
    "begins with",
    "teacher (critic)",
    "latents",
    "block, window, sink",
    "steps",
    "iterations",
    "lr (critic)",
]
COLUMNS += ["trained", "precision", "mesh", *STATED]


def _steps(stage: StageConfig) -> str:
    """Levels of a block, and those of later blocks where these have others."""
    lists = [stage.flow.steps, stage.flow.later_steps] if stage.objective.causal else []
    return ", then ".join(" ".join(f"{level:g}" for level in levels) for levels in lists if levels) or "-"


def values(stage: StageConfig) -> list[str]:
    """The cells of a stage, up to what only the head of its file states."""
    video, plan, mesh, networks = stage.video, stage.plan, stage.parallel, stage.networks
    critic = networks["critic"].optim if "critic" in networks else None
    begins = stage.init_from and stage.init_from.removeprefix("weights/")
    sources = [(networks[name].source or "-") for name in ("teacher", "critic") if name in networks] or ["-"]
    teacher, *other = (source.removeprefix("weights/") for source in dict.fromkeys(sources))
    teacher += "".join(f" ({source})" for source in other)
    return [
        stage.objective.kind,
        stage.model.preset,
        begins or "random weights",
        teacher,
        f"{video.num_latent_frames} of {video.height}x{video.width}",
        f"{plan.block_frames}, {plan.window_frames}, {plan.sink_frames}",
        _steps(stage),
        f"{stage.max_steps} of {stage.batch_size}",
        f"{stage.optim.lr:g}" + (f" ({critic.lr:g})" if critic else ""),
        (f"rank {stage.lora.rank}" if stage.lora else "all weights")
        + (", shared base" if any(network.shared for network in networks.values()) else ""),
        stage.precision,
        mesh.data_parallel
        + "".join(f", {name} {n}" for name in ("replicate", "sequence") if (n := getattr(mesh, name)) > 1),
    ]


def table() -> str:
    """The table; the row of a job names its stages."""
    lines = [["recipe", *COLUMNS], ["---"] * (len(COLUMNS) + 1)]
    for file in sorted(CONFIGS.rglob("[!_]*.yaml")):
        config = load_config(file)
        is_stage = isinstance(config, StageConfig)
        cells = (
            values(config)
            if is_stage
            else ["job: " + ", ".join(config.stages), *"-" * (len(COLUMNS) - 1 - len(STATED))]
        )
        head = " ".join(line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
        found = [re.search(pattern, head) for pattern in STATED.values()]
        name = f"`{file.relative_to(CONFIGS.parent).as_posix()}`"
        lines.append([name, *cells, *(match[1] if match else "-" for match in found)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table())
