"""How the help of commands looks: options in panels, and what a command does where an option is not given.

An option that was not given is None and is not passed on, so its default stands with the function that it reaches; the
help tells it without importing that.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperOption

# The panels of a command's help in their order, with the options that stand there, in whichever command; all others
# stand in "Options", before them.
PANELS = {
    "What it shows": (
        *("image", "prompt", "inputs", "script", "like", "samples", "negative", "seconds", "num_frames", "seed"),
    ),
    "Rows of your own": ("data", "num_rows", "multiples", "teacher_steps", "teacher_guidance", "layout"),
    "Toy worlds": (
        *("num_worlds", "num_latent_frames", "batch_size", "open_worlds", "ablations", "switch_frames", "formats"),
        *("one_switch", "stops"),
    ),
    "Whose weights": (
        *("run", "model", "encoders", "config", "teacher", "random", "small_text", "network", "lora", "lora_scale"),
        *("unmerge", "best"),
    ),
    "How it streams, where that is not as the weights say": (
        *("height", "width", "size", "fps", "sampler", "steps", "shift", "block", "window", "sink", "rope", "guidance"),
        *("dtype", "decoder"),
    ),
    "Where it runs": ("device", "sequence_parallel", "decode_device", "warm_up"),
    "The server": ("host", "port", "token_file", "allow_host", "folder", "max_sessions", "history_blocks"),
    "What is written": ("output", "crf", "scale", "json_file", "html", "to", "shard_bytes", "overwrite"),
}


# What is so where an option is not given, by command and option
DEFAULTS = {
    "generate": {
        "seed": "0",
        "samples": "1",
        "seconds": "as the training clips",
        "crf": "15",
        "scale": "1.0",
    },
    "play": {"seed": "0", "crf": "15", "scale": "1.0"},
    "serve": {"host": "127.0.0.1", "port": "8765", "folder": "outputs/live", "history_blocks": "8"},
    "encode": {"dtype": "float32", "rows_per_shard": "64"},
    "export": {"dtype": "bfloat16"},
    "convert": {"shard_bytes": "5368709120"},
    "verify": {"guidance": "5.0"},
    "bench": {"blocks": "12", "steps": "8"},
    "evaluate": {
        "num_rows": "16",
        "multiples": "1",
        "samples": "1",
        "teacher_steps": "50",
        "teacher_guidance": "5.0",
        "num_worlds": "32",
        "batch_size": "8",
        "open_worlds": "0",
        "ablations": "ablations",
    },
    "world": {
        "num_worlds": "512",
        "num_frames": "33",
        "seed": "0",
        "formats": "images, clips, lmdb",
        "stops": "no-stops",
    },
}


class Command(TyperCommand):
    """A command whose help has the panels and defaults that are written here."""

    def __init__(self, *words: Any, **values: Any) -> None:
        super().__init__(*words, **values)
        panels = {name: panel for panel, names in PANELS.items() for name in names}
        defaults = DEFAULTS.get(self.name or "", {})
        for option in self.params:
            if isinstance(option, TyperOption):
                option.rich_help_panel = panels.get(option.name)
                option.show_default = defaults.get(option.name, option.show_default)
        order = [None, *PANELS]
        self.params.sort(key=lambda one: order.index(one.rich_help_panel) if isinstance(one, TyperOption) else 0)
