"""A trained student as a folder to keep and to share: its weights in half the bytes, and the rules it streams by."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from longtake.config.generation import write_rules
from longtake.config.stage import TOY, TOY_ASSETS
from longtake.errors import ConfigError
from longtake.inference.model_card import CARD, write_card
from longtake.inference.source import Source
from longtake.outputs import check_new_folder, new_folder
from longtake.progress import as_size
from longtake.run_folder import best_checkpoint, chosen_by, find_checkpoint
from longtake.weights.convert import WEIGHT_FILES
from longtake.weights.load import load_opened, save_dit
from longtake.weights.locate import is_hub_name
from longtake.weights.two_networks import writers_own

logger = logging.getLogger(__name__)

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

    Everything that `longtake generate --model` needs: averaged weights, `config.json`, `generation.yaml`, which also
    names the place of the encoders, and `README.md`, the model card.
    Args: `dtype` float16, bfloat16 or float32; `changes` of its rules, as in
    `Source.of_run`; `overwrite` lets it replace a folder of weights; `best`, the weights that `keep_best`
    kept, not those of the last checkpoint.
    Raises: ConfigError when `target` exists, OutputError when it cannot be written; CheckpointError when there is no
    student.
    """
    target = Path(target)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype} must be one of {', '.join(DTYPES)}")
    checkpoint = best_checkpoint(Path(run)) if best else find_checkpoint(Path(run))
    if (why := chosen_by(checkpoint)) is not None:
        logger.info("the best checkpoint of %s: %s", checkpoint.parents[1], why)
    source = Source.of_run(checkpoint, changes)
    check_new_folder(target, own=(*WEIGHT_FILES, CARD), inputs=[run, source.weights], overwrite=overwrite)
    settings = source.settings.model_copy(update={"encoders": _place(source.encoders)})
    logger.info("reading %s", source.weights)
    model, apart = load_opened(source.open()), source.open_writer()
    state = model.state_dict() | ({} if apart is None else writers_own(model, load_opened(apart)))
    weighs = as_size(sum(tensor.numel() for tensor in state.values()) * DTYPES[dtype].itemsize)
    logger.info("writing %s in %s to %s", weighs, dtype, target)
    with new_folder(target, overwrite=overwrite) as folder:
        save_dit(model.config, state, folder, DTYPES[dtype])
        write_rules(folder, settings)
        kind = {"with_picture": model.config.condition_channels > 0, "with_writer": apart is not None}
        write_card(folder, target.name, checkpoint, settings, **kind)
    return target


def _place(encoders: Path) -> str:
    """How a folder of encoders is named where its student will lie: a name on the hub and `toy` mean the same there."""
    if encoders == TOY_ASSETS:
        return TOY
    return str(encoders) if is_hub_name(encoders) else str(encoders.absolute())
