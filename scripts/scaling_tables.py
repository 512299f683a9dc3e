"""Writes the tables of docs/scaling.md anew: each one after its `longtake doctor ... --table`, and the constants.

python scripts/scaling_tables.py            # rewrites the file
python scripts/scaling_tables.py --check    # exit code 1 when it would change
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from longtake.doctor.rates import rates_of
from longtake.doctor.run import scaling_table

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docs" / "scaling.md"
_TABLE = r"(?:\|[^\n]*\n)+"
_COMMANDS = re.compile(rf"(```bash\nlongtake doctor ([^\n]*) --table([^\n]*)\n```\n\n){_TABLE}")
_CONSTANTS = re.compile(rf"(## The constants\n\n(?:[^|\n][^\n]*\n|\n)*){_TABLE}")


def table(arguments: str) -> str:
    """What `longtake doctor ARGUMENTS --table` prints."""
    words = shlex.split(arguments)
    shared = "--shared-base" in words
    config, *overrides = [word for word in words if word != "--shared-base"]
    return scaling_table(ROOT / config, overrides, shared_base=shared or None)


def renewed(text: str) -> str:
    """The document with every table as the models give it now."""
    text = _COMMANDS.sub(lambda match: match[1] + table(f"{match[2]} {match[3]}") + "\n", text)
    return _CONSTANTS.sub(lambda match: match[1] + rates_of().markdown() + "\n", text)


def main(arguments: list[str]) -> int:
    """Rewrites the file, or with `--check` compares; the exit code."""
    before = FILE.read_text()
    after = renewed(before)
    if arguments == ["--check"]:
        if before != after:
            print(f"{FILE} does not agree with the models; run python scripts/scaling_tables.py")
        return int(before != after)
    FILE.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
