"""Everything that a model on the hub needs, fetched before it is used: `longtake download`."""

from __future__ import annotations

import logging
from pathlib import Path

from longtake.config.stage import TOY
from longtake.errors import ConfigError
from longtake.outputs import check_output_folder
from longtake.weights.hub import (
    Order,
    encoders_of,
    fetch,
    fetch_small,
    joined,
    lacks_encoders,
    needs_image,
    order_encoders,
    order_weights,
)
from longtake.weights.locate import is_hub_name
from longtake.weights.students import find_student

logger = logging.getLogger(__name__)


def download(name: str, folder: str | Path | None = None) -> tuple[Path, list[str]]:
    """Fetches a model: a published student with its updates and the encoders of its base, or the transformer, VAE, text
    and image encoder and tokenizer that a repository has. What and how large is said before, in the log.

    Args: `name`, OWNER/NAME (and a folder or file of it), or a name of `longtake students`; `folder` to put the files
    into, a student's encoders into `encoders/` of it; None: the hub's cache, in which `--model` finds them by the name.
    Returns: what `--model` takes now, and names of the encoders that the repository lacks.
    Raises: CheckpointError when something is not there, before anything is fetched; ConfigError for a local path.
    """
    if Path(name).expanduser().exists():
        raise ConfigError(f"{name} is a local path; give OWNER/NAME on the Hugging Face hub, or rename the path")
    if name == TOY:
        raise ConfigError("toy comes with the package, and nothing of it is fetched: longtake generate --model toy ...")
    if folder is not None:
        check_output_folder(Path(folder))
    student = find_student(name)
    if student is None and not is_hub_name(name):
        raise ConfigError(f"{name} is neither OWNER/NAME on the Hugging Face hub nor a name of `longtake students`")
    if student is not None:
        order, beside, lacking = student.order(), encoders_of(student.encoders(), with_image=False), []
        assert order is not None
    else:
        order = order_weights(name)
        with_image = needs_image(fetch_small(order))
        beside = order_encoders(order.repository, with_image=with_image)
        lacking = lacks_encoders(beside, with_image=with_image)
        if lacking:  # said before hours of fetching
            logger.warning("%s has no %s: the model will need --encoders", name, " and no ".join(lacking))
    root = _put([order, beside], None if folder is None else Path(folder))
    return (Path(name) if folder is None else root if student else root / order.part), lacking


def _put(orders: list[Order], folder: Path | None) -> Path:
    """Fetches both; encoders of another repository lie in a folder of their own. Returns the folder of the first."""
    together = joined(orders)
    if folder is None or len(together) == 1:
        return fetch(together, folder)[0]
    first, second = together
    fetch([second], folder / "encoders")
    return fetch([first], folder)[0]
