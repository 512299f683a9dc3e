"""A trained student as a folder to keep and to share: its weights in half the bytes, and the rules it streams by."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from longtake.config_generation import write_rules
from longtake.errors import ConfigError
from longtake.inference.source import Source
from longtake.models.weights import load_dit, save_dit

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def export(run: str | Path, target: str | Path, *, dtype: str = "bfloat16") -> Path:
    """Writes the student of a run (a log, stage or checkpoint folder) to the folder `target`, whole or not at all.

    Everything that `longtake generate --model` needs but the encoders: averaged weights, `config.json`,
    `generation.yaml`. Args: `dtype` float16, bfloat16 or float32.
    Raises: ConfigError when `target` exists; CheckpointError when there is no student.
    """
    target = Path(target)
    if target.exists():
        raise ConfigError(f"{target} exists already; give the name of a folder that does not")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype} must be one of {', '.join(DTYPES)}")
    source = Source.of_run(run)
    model = load_dit(source.weights)
    partial = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    try:
        save_dit(model.config, model.state_dict(), partial, DTYPES[dtype])
        write_rules(partial, source.settings)
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target
