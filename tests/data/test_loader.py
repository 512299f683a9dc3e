"""The loader: one order of samples for any number of ranks, any position, any worker; bad rows; seeded draws."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from longtake.data.loader import Loader, collate
from longtake.data.order import batch_rows, order, sample_at
from longtake.data.samples import Sample
from longtake.errors import ConfigError, DataError
from longtake.rng import KeyedRNG


class Memory:
    """A data set of `number` rows in memory, some of them bad."""

    def __init__(self, number=20, bad=(), video=False):
        self.number, self.bad, self.video = number, set(bad), video

    def __len__(self):
        return self.number

    def __getitem__(self, row):
        if row in self.bad:
            raise DataError(f"memory row {row}: broken")
        image = np.full((4, 6, 3), row, np.uint8)
        video = np.stack([image] * 5) if self.video else None
        return Sample(f"s{row}", f"prompt {row}", image, video, {"latents": np.full((2, 3), row, np.float32)})


def make(dataset=None, **changes):
    return Loader(dataset or Memory(), **{"seed": 7, "batch_size": 8, "micro_batch_size": 2} | changes)


def update(loader, position=0):
    """The micro-batches of the update at `position`, read by as many threads as the loader allows."""
    with ThreadPoolExecutor(max(1, loader.workers)) as pool:
        batches = []
        for picks in loader.picks(position):
            read = list(pool.map(loader.read, [pick.row for pick in picks]))
            batches.append(collate([sample for _, sample in read], picks, [row for row, _ in read]))
        return batches


def take(loader, updates):
    return [batch for step in range(updates) for batch in update(loader, step * loader.batch_size)]


def test_an_epoch_is_a_permutation_and_epochs_differ():
    first, second = order(3, 0, 50), order(3, 1, 50)
    assert sorted(first) == sorted(second) == list(range(50))
    assert (first != second).any() and (first != order(4, 0, 50)).any()
    assert [sample_at(3, 50, p)[1] for p in range(50)] == first.tolist()
    assert sample_at(3, 50, 51) == (1, second[1])
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1


@pytest.mark.parametrize(("world_size", "micro"), [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2)])
def test_ranks_together_see_the_same_samples(world_size, micro):
    for step in range(5):
        picks = [
            pick
            for rank in range(world_size)
            for group in batch_rows(1, 13, step * 8, 8, rank=rank, world_size=world_size, micro=micro)
            for pick in group
        ]
        assert sorted(pick.index for pick in picks) == list(range(step * 8, step * 8 + 8))
        assert all(pick.row == sample_at(1, 13, pick.index)[1] for pick in picks)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="multiple"):
        make(micro_batch_size=3)
    with pytest.raises(ConfigError, match="multiple"):
        make(micro_batch_size=8, world_size=2)


def test_batches_hold_signed_pixels_prompts_and_encodings():
    batch = update(make(Memory(video=True)))[0]
    assert batch.images.shape == (2, 3, 4, 6) and batch.videos.shape == (2, 5, 3, 4, 6)
    assert batch.extras["latents"].shape == (2, 2, 3)
    for b, row in enumerate(batch.rows):
        assert batch.prompts[b] == f"prompt {row}" and batch.names[b] == f"s{row}"
        assert batch.images[b].unique().item() == pytest.approx(row / 127.5 - 1)
    assert batch.indices == [0, 1] and len(batch) == 2
    white = Sample("w", "p", np.full((2, 2, 3), 255, np.uint8))
    assert update(make([white] * 8))[0].images.max() == 1.0


@pytest.mark.parametrize("workers", [0, 3])
def test_any_position_continues_the_run(workers):
    whole = take(make(workers=workers), 3)
    loader = make(workers=workers)
    assert loader.position == 0
    loader.seek(8)
    assert loader.position == 8
    rest = update(loader, loader.position)  # rows are a function of the position, not of what was read before
    assert [(b.indices, b.rows) for b in rest] == [(b.indices, b.rows) for b in whole[4:8]]
    assert all(torch.equal(a.images, b.images) for a, b in zip(rest, whole[4:8], strict=True))
    assert [b.indices for b in update(loader, 16)] == [b.indices for b in whole[8:]]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_row_fails_at_once_with_its_name(workers):
    with pytest.raises(DataError, match=r"memory row 5: broken; .*on_bad_row=skip"):
        take(make(Memory(bad=[5]), workers=workers), 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_replaces_a_bad_row_by_the_next_good_one(workers):
    skipping = {"on_bad_row": "skip", "max_bad_share": 0.2, "workers": workers}
    loader = make(Memory(bad=[5, 6, 19]), **skipping)
    clean, repaired = take(make(), 3), take(loader, 3)
    replaced = {5: 7, 6: 7, 19: 0}
    for a, b in zip(clean, repaired, strict=True):
        assert b.indices == a.indices
        assert b.rows == [replaced.get(row, row) for row in a.rows]
    assert len(loader.bad) == 3
    ranks = [make(Memory(bad=[5, 6, 19]), rank=r, world_size=2, **skipping) for r in range(2)]
    rank = [batch for loader in ranks for batch in update(loader)]
    rows = dict(zip(sum((b.indices for b in rank), []), sum((b.rows for b in rank), [])))
    assert rows == dict(zip(sum((b.indices for b in repaired[:4]), []), sum((b.rows for b in repaired[:4]), [])))


def test_skip_stops_above_the_share():
    with pytest.raises(DataError, match=r"3 of 20 rows are bad, more than data.max_bad_share=0.1"):
        take(make(Memory(bad=[1, 2, 3]), on_bad_row="skip", max_bad_share=0.1), 10)
    with pytest.raises(DataError, match="none of the 4 rows"):
        take(make(Memory(4, bad=range(4)), on_bad_row="skip", max_bad_share=1.0), 1)


def test_pictures_of_different_sizes_are_refused():
    samples = [Sample(str(i), "p", np.zeros((4, 4 + i, 3), np.uint8)) for i in range(8)]
    with pytest.raises(DataError, match="set height and width"):
        update(make(samples))


def test_draws_depend_on_the_sample_not_on_the_batch():
    draws = KeyedRNG(11)
    whole = draws.noise(4, "noise", range(8), (2, 3))
    split = torch.cat([draws.noise(4, "noise", [i], (2, 3)) for i in range(8)])
    assert torch.equal(whole, split)
    assert torch.equal(draws.uniform(4, "sigma", range(8))[5:], draws.uniform(4, "sigma", [5, 6, 7]))
    assert torch.equal(KeyedRNG(11).noise(4, "noise", [3], (2, 3)), whole[3:4])


def test_draws_differ_by_every_part_of_the_key():
    noise = [
        KeyedRNG(1).noise(0, "a", [0], (64,)),
        KeyedRNG(2).noise(0, "a", [0], (64,)),
        KeyedRNG(1).noise(1, "a", [0], (64,)),
        KeyedRNG(1).noise(0, "b", [0], (64,)),
        KeyedRNG(1).noise(0, "a", [1], (64,)),
        KeyedRNG(1).noise(0, "a", [0], (64,), part=1),
    ]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(noise, 2))


def test_draws_have_their_distributions():
    draws = KeyedRNG(0)
    u = draws.uniform(0, "u", range(4000))
    assert u.dtype == torch.float32 and u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.02 and abs(u.std() - 12**-0.5) < 0.01
    n = draws.noise(0, "n", range(100), (50,))
    assert n.dtype == torch.float32 and abs(n.mean()) < 0.05 and abs(n.std() - 1) < 0.05
    k = [draws.integer(step, "exit", 0, 4) for step in range(400)]
    assert set(k) == {0, 1, 2, 3} and k == [KeyedRNG(0).integer(step, "exit", 0, 4) for step in range(400)]
    assert all(60 < k.count(i) < 140 for i in range(4))
