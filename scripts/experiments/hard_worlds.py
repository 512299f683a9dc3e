"""Pictures and captions of worlds that are hard for a student: sprites that cross, captions that leave a motion open.

    python scripts/experiments/hard_worlds.py FOLDER --num-worlds 1400

Writes FOLDER/NNNNNN.png and FOLDER/metadata.jsonl, as `longtake encode` reads them. A share of `--crossing` has two or
three sprites of which one is hidden by a tenth or more in some frame of the clip, and a share of `--open` an open
motion, independently of each other; the first worlds of the seed that fit are taken.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from longtake.toy.files import encode_png
from longtake.toy.world import World, sample_world


def crosses(world: World, num_frames: int) -> bool:
    """Whether a sprite hides a tenth or more of another one within the clip."""
    return len(world.sprites) > 1 and bool(world.visibility(world.positions(num_frames)).min() < 0.9)


def choose(seed: int, num_worlds: int, crossing: float, is_open: float, num_frames: int) -> list[World]:
    """The first worlds of a seed that fill the shares."""
    shares = {
        (hard, free): (crossing if hard else 1 - crossing) * (is_open if free else 1 - is_open)
        for hard in (True, False)
        for free in (True, False)
    }
    wanted = {kind: round(share * num_worlds) for kind, share in shares.items()}
    chosen: list[World] = []
    index = 0
    while any(wanted.values()):
        world = sample_world(seed, index)
        kind = crosses(world, num_frames), any(sprite.is_open for sprite in world.sprites)
        if wanted[kind]:
            wanted[kind] -= 1
            chosen.append(world)
        index += 1
    return chosen


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num-worlds", type=int, default=1400)
    parser.add_argument("--crossing", type=float, default=0.6, help="share (default: %(default)s)")
    parser.add_argument("--open", type=float, default=0.3, help="share (default: %(default)s)")
    parser.add_argument("--num-frames", type=int, default=33, help="of the clip (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="of the worlds (default: %(default)s)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    rows = []
    for number, world in enumerate(choose(args.seed, args.num_worlds, args.crossing, args.open, args.num_frames)):
        name = f"{number:06d}.png"
        (args.folder / name).write_bytes(encode_png(world.render(1)[0]))
        rows.append(json.dumps({"file_name": name, "text": world.caption}) + "\n")
    (args.folder / "metadata.jsonl").write_text("".join(rows))
    print(f"{len(rows)} worlds in {args.folder}")


if __name__ == "__main__":
    main()
