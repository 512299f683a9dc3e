"""The mean of the weights of folders of one architecture, written as float16: python ... A B -o OUT

Training from one set of weights to another often leaves their mean as good as either (Wortsman et al. 2022, "Model
soups", arXiv 2203.05482). Other files of the first folder (its rules) are copied.
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
    args = parser.parse_args()
    models = [load_dit(folder, "cpu") for folder in args.folders]
    states = [model.state_dict() for model in models]
    mean = {name: torch.stack([state[name].float() for state in states]).mean(0) for name in states[0]}
    save_dit(models[0].config, mean, args.output, torch.float16)
    for file in args.folders[0].glob("*.yaml"):
        shutil.copy(file, args.output)


if __name__ == "__main__":
    main()
