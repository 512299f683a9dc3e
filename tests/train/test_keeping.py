"""`activation_checkpointing: auto`: what is measured, what is decided of it, and that training goes on alike."""

from __future__ import annotations

import logging
import weakref

import pytest
import torch
from tiny_stage import stage_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longtake.models.recompute import ByBlock
from longtake.parallel.fsdp import parallelize
from longtake.parallel.mesh import Mesh
from longtake.train.keeping import ROOM, Keeper, Kept, Memory, Watched, plan


class Counted(TorchDispatchMode, Memory):
    """Bytes of the storages made while it is on, as those of a GPU of `total` bytes."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.total = self.held = self.highest = 0
        self.known = {p.untyped_storage()._cdata for p in model.parameters()}  # made before; their views are no others

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.held += storage.nbytes()
                weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes()).atexit = False
        self.highest = max(self.highest, self.held)
        return out

    def drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.held -= size

    def begin(self) -> None:
        self.highest = 0

    def now(self) -> int:
        return self.held

    def most(self) -> int:
        return self.highest

    def all(self) -> int:
        return self.total


KEPT = Kept(whole=100, attention=30, nothing=10)


@pytest.mark.parametrize(
    ("spare", "attention", "expected"),
    [
        (-5, True, (0, 0)),  # not even what there is fits
        (19, True, (0, 0)),
        (79, True, (0, 3)),  # attention first: 20 a block
        (199, True, (0, 8)),
        (299, True, (1, 7)),  # then whole blocks: 70 more each
        (10**6, True, (8, 0)),
        (299, False, (3, 0)),  # of whole blocks alone: 90 each
        (10**6, False, (8, 0)),
    ],
)
def test_attention_is_kept_first_then_whole_blocks(spare, attention, expected):
    found = plan(KEPT, 8, spare, attention=attention)
    assert found == expected
    whole, some = found
    assert whole * 90 + some * 20 <= max(0, spare)


@pytest.mark.parametrize("spare, expected", [(0, (0, 0)), (100_000, (0, 2)), (2**20, (2, 2)), (2**30, (4, 0))])
def test_what_blocks_keep_is_measured_and_decided_once(
    spare, expected, tiny_model, tiny_condition, tiny_latents, caplog
):
    by_block = ByBlock(1, 1)
    model = parallelize(tiny_model(True, num_layers=4), Mesh(), recompute=by_block)
    memory = Counted(model)
    condition, x = tiny_condition(model), tiny_latents(9)

    def update() -> torch.Tensor:
        with memory:
            model.zero_grad()
            loss = model(x, torch.tensor([0.9, 0.3]), condition).square().mean()
            loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    keeper = Keeper(
        [Watched("critic", model.blocks, by_block)],
        Mesh(),
        ["generator", "critic"],
        lambda step: ["critic"][step:],
        1,
        memory,
    )
    first = update()
    with caplog.at_level(logging.INFO):
        keeper.passed(1)  # which updated nothing
        assert not keeper.settled and not caplog.records
        keeper.shown = lambda step: ["generator", "critic"]
        memory.total = int((memory.highest + spare) / ROOM) + 1
        keeper.passed(2)
    assert keeper.settled and (by_block.whole, by_block.attention) == expected
    [record] = caplog.records
    _, _, _, _, _, _, whole, attention, nothing, least, _ = record.args
    # A block leaves its result; attention's results and the sums of rows beside; all of it much more.
    result = x.shape[0] * 9 * 6 * model.config.dim * 4 / 2**30
    assert nothing == pytest.approx(result) and nothing < attention < 6 * result < whole
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)
    memory.begin()
    assert torch.equal(update(), first)
    assert memory.highest <= ROOM * memory.total + 2**10  # as foreseen


def test_a_stage_on_a_cpu_recomputes_nothing(workshop, tmp_path):
    config = stage_config(workshop, tmp_path, "distill")
    assert config.activation_checkpointing == "auto" and config.without_a_gpu().activation_checkpointing is False
