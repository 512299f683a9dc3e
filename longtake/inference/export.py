"""A trained student as a folder to keep and to share: its weights in half the bytes, and the rules it streams by."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from longtake.config.generation import write_rules
from longtake.errors import ConfigError
from longtake.inference.source import Source
from longtake.outputs import check_new_folder, new_folder
from longtake.run_folder import best_checkpoint
from longtake.weights.convert import WEIGHT_FILES
from longtake.weights.load import load_dit, save_dit

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def export(
    run: str | Path,
    target: str | Path,
    *,
    dtype: str = "bfloat16",
    changes: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    best: bool = False,
) -> Path:
    """Writes the student of a run (a log, stage or checkpoint folder) to the folder `target`, whole or not at all.

    Everything that `longtake generate --model` needs but the encoders: averaged weights, `config.json`,
    `generation.yaml`. Args: `dtype` float16, bfloat16 or float32; `changes` of its rules, as in
    `Source.of_run`; `overwrite` lets it replace a folder of weights; `best`, the weights that `keep_best`
    kept, not those of the last checkpoint.
    Raises: ConfigError when `target` exists, OutputError when it cannot be written; CheckpointError when there is no
    student.
    """
    target = Path(target)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype} must be one of {', '.join(DTYPES)}")
    source = Source.of_run(best_checkpoint(Path(run)) if best else run, changes)
    check_new_folder(target, own=WEIGHT_FILES, inputs=[run, source.weights], overwrite=overwrite)
    model = load_dit(source.weights)
    with new_folder(target, overwrite=overwrite) as folder:
        save_dit(model.config, model.state_dict(), folder, DTYPES[dtype])
        write_rules(folder, source.settings)
    return target
