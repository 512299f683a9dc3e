"""What must not change between a run, its resumption and its use."""

from __future__ import annotations

from typing import Any

from longtake.config import StageConfig


def facts(config: StageConfig) -> dict[str, Any]:
    """What must not change between a run, its resumption and its use: stored in every manifest."""
    return {
        "rope": config.rope,
        "plan": config.plan.model_dump(),
        "steps": config.flow.steps,
        "shift": config.flow.shift,
        "fps": config.video.fps,
        "clip_preprocess": config.model.clip_preprocess,
    }
