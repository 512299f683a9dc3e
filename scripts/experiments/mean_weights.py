"""The mean of the weights of folders of one architecture, written as float16: python ... A B [--shares 1 7] -o OUT

Training from one set of weights to another often leaves their mean as good as either (Wortsman et al. 2022, "Model
soups", arXiv 2203.05482); where it costs something, most of the way from the first to the second may cost less
(Wortsman et al. 2021, arXiv 2109.01903). Other files of the first folder (its rules) are copied.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from longtake.weights.load import load_dit, save_dit


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", help="one a folder, of any sum; all equal by default")
    args = parser.parse_args()
    shares = torch.tensor(args.shares or [1.0] * len(args.folders))
    if len(shares) != len(args.folders) or not (shares > 0).all():
        parser.error(f"--shares {args.shares} must be one number above 0 for each of the {len(args.folders)} folders")
    shares /= shares.sum()
    models = [load_dit(folder, "cpu") for folder in args.folders]
    states = [model.state_dict() for model in models]
    mean = {name: sum(share * state[name].float() for share, state in zip(shares, states)) for name in states[0]}
    save_dit(models[0].config, mean, args.output, torch.float16)
    for file in args.folders[0].glob("*.yaml"):
        shutil.copy(file, args.output)


if __name__ == "__main__":
    main()
