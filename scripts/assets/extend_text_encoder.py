"""Teaches the toy text encoder the words for standing still, and changes nothing else.

The words of STOP_WORDS get rows at the end of the embedding; only these rows are trained, so every caption without them
is encoded as before, bit for bit, and what was trained on it keeps its meaning:

    python scripts/assets/extend_text_encoder.py --output longtake/assets/toy/text_encoder

Linear heads learn to read size, colour, shape, direction and speed of a word's clause from the encoder as it is; then
the new rows are trained so that the same heads read clauses that stop. The heads are thrown away.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from pathlib import Path

import torch
import toy_encoders as toy
from torch import Tensor, nn
from train_text_encoder import FIELDS, IGNORE, forward, labels_of

from longtake.encoders.text import TextEncoder
from longtake.toy.captions import STILL, STOP_WORDS
from longtake.toy.story import sample_story
from longtake.toy.world import sample_world

TRAIN_SEED, HELD_OUT_SEED = 73_001, 73_002


def captions_of(seed: int, number: int) -> list[str]:
    """Half of them of worlds in which some sprite stands still."""
    captions = [sample_world(seed, index).caption for index in range(number // 2)]
    index = 0
    while len(captions) < number:
        later = sample_story(seed, index, [1], stops=True).switches[0]
        if any(sprite.speed == STILL for sprite in later.sprites):
            captions.append(later.caption)
        index += 1
    return captions


def build_set(tokenizer: object, seed: int, number: int) -> tuple[Tensor, Tensor]:
    """Token ids [N, M] (0 = padding) and labels [N, M, fields] of `number` captions."""
    ids = torch.zeros(number, toy.TEXT_LEN, dtype=torch.long)
    labels = torch.full((number, toy.TEXT_LEN, len(FIELDS)), IGNORE)
    for row, caption in enumerate(captions_of(seed, number)):
        tokens, classes = tokenizer(caption).input_ids, labels_of(caption)  # type: ignore[operator]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, : len(tokens)] = torch.from_numpy(classes)
    return ids, labels


def train(args: argparse.Namespace) -> None:
    """Trains heads, then rows; checks, saves in place."""
    torch.manual_seed(args.seed)
    old = TextEncoder.load(args.init or args.output)
    tokenizer = toy.build_tokenizer()
    model = old.model.float().requires_grad_(False)
    known = model.shared.weight.shape[0]
    if known + len(STOP_WORDS) != len(tokenizer):
        raise SystemExit(f"the encoder knows {known} words and the tokenizer {len(tokenizer)}: already extended?")
    table = model.shared.weight.detach().clone()
    # From the mean of the old rows: a place where the frozen layers expect words.
    start = table[3:].mean(0, keepdim=True) + 0.3 * table[3:].std(0) * torch.randn(len(STOP_WORDS), table.shape[1])
    new = nn.Parameter(start)
    widened = nn.Embedding(len(tokenizer), table.shape[1])

    def place() -> None:
        widened.weight = nn.Parameter(torch.cat([table, new]), requires_grad=False)
        model.set_input_embeddings(widened)
        model.config.vocab_size = len(tokenizer)

    place()
    heads = nn.ModuleDict({name: nn.Linear(model.config.d_model, len(values)) for name, values in FIELDS.items()})
    train_set, held_out = build_set(tokenizer, TRAIN_SEED, args.captions), build_set(tokenizer, HELD_OUT_SEED, 600)
    stops = (train_set[0] >= known).any(1)
    plain, stopping = torch.nonzero(~stops).flatten(), torch.nonzero(stops).flatten()

    def embed(ids: Tensor) -> Tensor:
        return torch.nn.functional.embedding(ids, torch.cat([table, new]))

    class Embedded(nn.Module):
        """The encoder with the trained rows in its graph."""

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> object:
            return model(inputs_embeds=embed(input_ids), attention_mask=attention_mask)

    network, began = Embedded(), time.time()
    optimizer = torch.optim.Adam([{"params": heads.parameters(), "lr": 1e-2}, {"params": [new], "lr": args.lr}])
    for step in range(args.steps):
        # The heads learn from plain captions at first, then from both.
        source = plain if step < args.steps // 3 else torch.cat([plain, stopping, stopping])
        rows = source[torch.randint(len(source), (args.batch_size,))]
        loss, right, _ = forward(network, heads, train_set[0][rows], train_set[1][rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.998
        if (step + 1) % 100 == 0:
            share = " ".join(f"{name} {value:.4f}" for name, value in zip(FIELDS, right.tolist()))
            print(f"{time.time() - began:5.0f}s step {step + 1} loss {loss.item():.4f} right: {share}", flush=True)
    with torch.no_grad():
        new.copy_(new.half().float())
    place()
    finish(model, heads, tokenizer, held_out, known, old.text_len, args)


@torch.no_grad()
def finish(
    model: nn.Module,
    heads: nn.ModuleDict,
    tokenizer: object,
    held_out: tuple[Tensor, Tensor],
    known: int,
    text_len: int,
    args: argparse.Namespace,
) -> None:
    """Saves, loads again, and reports what the heads read from the new words and from the clauses around them."""
    before = TextEncoder.load(args.init or args.output)
    plain = [sample_world(HELD_OUT_SEED, index).caption for index in range(200)]
    was = before.encode(plain)
    fresh = args.output.with_name(f".{args.output.name}.{os.getpid()}")
    model.half().save_pretrained(fresh)  # type: ignore[operator]
    tokenizer.save_pretrained(fresh)  # type: ignore[attr-defined]
    saved = TextEncoder.load(fresh)
    if saved.text_len != text_len or not torch.equal(saved.encode(plain), was):
        raise SystemExit("captions without the new words are encoded otherwise than before; nothing was changed")
    ids, labels = held_out
    for name, rows in (("plain", ~(ids >= known).any(1)), ("stopping", (ids >= known).any(1))):
        _, right, _ = forward(saved.model.float(), heads, ids[rows], labels[rows])
        share = " ".join(f"{field} {value:.4f}" for field, value in zip(FIELDS, right.tolist()))
        print(f"held-out, as saved, {name}: {share}")
    only_new = torch.where((ids >= known)[..., None], labels, IGNORE)
    _, right, _ = forward(saved.model.float(), heads, ids, only_new)
    print("the new words alone:", " ".join(f"{field} {value:.4f}" for field, value in zip(FIELDS, right.tolist())))
    shutil.rmtree(args.output, ignore_errors=True)
    fresh.rename(args.output)
    print(f"saved {args.output}")


def main() -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--init", type=Path, default=None, help="start from this folder (default: --output)")
    parser.add_argument("--captions", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-2)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
