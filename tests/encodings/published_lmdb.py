"""Writes the published I2V layout with nothing but lmdb and numpy, as its own writer does: a program of its own.

Usage: python published_lmdb.py FOLDER ROWS [latents: F C H W]. Shards are filled in turn; pictures are raw RGB bytes of
480x832, latents raw float16, `latents_shape` holds the number of rows first. A prompt a row comes from standard input.
"""

import sys
from pathlib import Path

import lmdb
import numpy as np

folder, rows, shape = Path(sys.argv[1]), int(sys.argv[2]), [int(n) for n in sys.argv[3:]]
prompts = sys.stdin.read().splitlines()
for shard in range(2):
    mine = range(shard, rows, 2)
    (folder / f"shard_{shard}").mkdir(parents=True)
    env = lmdb.open(str(folder / f"shard_{shard}"), map_size=1 << 40)
    with env.begin(write=True) as txn:
        for i, row in enumerate(mine):
            rng = np.random.default_rng(row)
            picture = rng.integers(0, 256, (480, 832, 3), dtype=np.uint8)
            txn.put(f"img_{i}_data".encode(), picture.tobytes())
            txn.put(f"prompts_{i}_data".encode(), prompts[row].encode())
            if shape:
                txn.put(f"latents_{i}_data".encode(), rng.normal(size=shape).astype(np.float16).tobytes())
        if shape:
            txn.put(b"latents_shape", " ".join(str(n) for n in [len(mine), *shape]).encode())
    env.close()
