"""Pre-trains the toy text encoder: every word's hidden state tells what its clause says.

Reproduces `longtake/assets/toy/text_encoder` (model and tokenizer, under 3 minutes on one core):

    python scripts/assets/train_text_encoder.py

Linear heads on each word predict size, colour, shape, direction and speed of the word's clause ("open" where the
caption leaves the motion open); the heads are thrown away.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import toy_encoders as toy
from caption_parser import clause_spans, parse_caption
from torch import Tensor, nn

from longtake.encoders.text import TextEncoder
from longtake.toy.captions import COLOURS, DIRECTIONS, SHAPES, SIZES, SPEEDS, STILL
from longtake.toy.world import sample_world

TRAIN_SEED, HELD_OUT_SEED = 72_001, 72_002
IGNORE = -100
FIELDS: dict[str, tuple[str | None, ...]] = {
    "size": SIZES,
    "colour": COLOURS,
    "shape": SHAPES,
    "direction": (*DIRECTIONS, None),
    "speed": (*SPEEDS, None, STILL),
}


def labels_of(caption: str) -> np.ndarray:
    """[words + 1, fields] class of each word's clause; IGNORE for connectors and `</s>`."""
    clauses = [[values.index(getattr(c, name)) for name, values in FIELDS.items()] for c in parse_caption(caption)]
    rows = [clauses[span] if span >= 0 else [IGNORE] * len(FIELDS) for span in clause_spans(caption)]
    return np.array([*rows, [IGNORE] * len(FIELDS)])


def build_set(tokenizer: object, seed: int, number: int) -> tuple[Tensor, Tensor]:
    """Token ids [N, M] (0 = padding) and labels [N, M, fields] of `number` captions."""
    ids = torch.zeros(number, toy.TEXT_LEN, dtype=torch.long)
    labels = torch.full((number, toy.TEXT_LEN, len(FIELDS)), IGNORE)
    for index in range(number):
        caption = sample_world(seed, index).caption
        tokens, classes = tokenizer(caption).input_ids, labels_of(caption)  # type: ignore[operator]
        if len(tokens) != len(classes) or len(tokens) > toy.TEXT_LEN:
            raise ValueError(f"{len(tokens)} tokens and {len(classes)} labels for {caption!r}")
        ids[index, : len(tokens)] = torch.tensor(tokens)
        labels[index, : len(tokens)] = torch.from_numpy(classes)
    return ids, labels


def forward(model: nn.Module, heads: nn.ModuleDict, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, share of right answers a field, hidden states of real tokens)."""
    length = int((ids > 0).sum(1).max())
    ids, labels, mask = ids[:, :length], labels[:, :length], ids[:, :length] > 0
    hidden = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    loss, right = torch.zeros(()), []
    for index, head in enumerate(heads.values()):
        logits, target = head(hidden).flatten(0, 1), labels[..., index].flatten()
        loss = loss + F.cross_entropy(logits, target, ignore_index=IGNORE)
        known = target != IGNORE
        right.append((logits.argmax(-1) == target)[known].float().mean())
    return loss, torch.stack(right), hidden[mask]


def train(args: argparse.Namespace) -> None:
    """Trains, measures on held-out captions, saves float16 and checks what was saved."""
    torch.manual_seed(args.seed)
    tokenizer = toy.build_tokenizer()
    model = toy.build_text_model(len(tokenizer))
    heads = nn.ModuleDict({name: nn.Linear(model.config.d_model, len(values)) for name, values in FIELDS.items()})
    train_set, held_out = build_set(tokenizer, TRAIN_SEED, args.captions), build_set(tokenizer, HELD_OUT_SEED, 500)
    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.1)
    started = time.time()
    for step in range(args.steps):
        rows = torch.randint(args.captions, (args.batch_size,))
        ids = train_set[0][rows]
        # Some words become <unk>: a user's caption has words that the world does not know.
        noisy = torch.where((torch.rand(ids.shape) < 0.01) & (ids > 2), torch.full_like(ids, 2), ids)
        loss, right, _ = forward(model, heads, noisy, train_set[1][rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            share = " ".join(f"{name} {value:.4f}" for name, value in zip(FIELDS, right.tolist()))
            print(f"{time.time() - started:5.0f}s step {step + 1} loss {loss.item():.4f} right: {share}", flush=True)
    finish(model.eval(), heads, tokenizer, held_out, args.output)


@torch.no_grad()
def finish(
    model: nn.Module, heads: nn.ModuleDict, tokenizer: object, held_out: tuple[Tensor, Tensor], folder: Path
) -> None:
    """Scales the outputs to unit standard deviation, saves, loads again and reports accuracy of the saved weights."""
    scale = forward(model, heads, *held_out)[2].std()
    model.encoder.final_layer_norm.weight.div_(scale)  # type: ignore[union-attr, operator]
    for head in heads.values():
        head.weight.mul_(scale)  # type: ignore[union-attr, operator]
    shutil.rmtree(folder, ignore_errors=True)
    model.half().save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
    saved = TextEncoder.load(folder)
    _, right, hidden = forward(saved.model, heads, *held_out)
    share = " ".join(f"{name} {value:.4f}" for name, value in zip(FIELDS, right.tolist()))
    size = sum(f.stat().st_size for f in folder.iterdir()) / 1e6
    print(f"held-out, as saved: {share}; std {hidden.std():.3f}; text_len {saved.text_len}; {size:.2f} MB in {folder}")


def main() -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parents[2]
    parser.add_argument("--output", type=Path, default=root / "longtake/assets/toy/text_encoder")
    parser.add_argument("--captions", type=int, default=12_000)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args)


if __name__ == "__main__":
    main()
