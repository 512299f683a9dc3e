"""Micro-batches after the encoders: position and seeking, one encoding a row, the same samples on any number of ranks."""

import numpy as np
import pytest
import torch
from fake_ranks import on_ranks
from tiny_stage import make_encoders

from longtake.condition import VideoShape
from longtake.data.loader import Loader
from longtake.data.samples import Sample
from longtake.encoders.condition import encode_condition
from longtake.encodings.encode import BatchEncoder, EncodedLoader, rows_at_once
from longtake.errors import DataError
from longtake.toy.world import sample_world

SHAPE = VideoShape(height=16, width=32, num_latent_frames=3)
ROWS = 6


class Clips:
    """Six rows of noise with the captions of the toy world, counting how often each is read."""

    def __init__(self, *, image=True, video=True, latents=None):
        self.image, self.video, self.latents = image, video, latents
        self.read = []

    def __len__(self):
        return ROWS

    def __getitem__(self, row):
        self.read.append(row)
        video = np.random.default_rng(row).integers(0, 256, (9, 16, 32, 3), np.uint8)
        image = video[0] if self.image else None
        extras = {} if self.latents is None else {"latents": self.latents[row]}
        return Sample(f"s{row}", sample_world(0, row).caption, image, video if self.video else None, extras)


class CountingEncoder(BatchEncoder):
    """Remembers how many rows each call encoded."""

    def rows(self, batch):
        self.sizes = [*getattr(self, "sizes", []), len(batch)]
        return super().rows(batch)


@pytest.fixture(scope="module")
def encoders():
    return make_encoders()


def make(encoders, data=None, *, rank=0, world_size=1, with_image=True, with_latents=True, **options):
    options = {"batch_size": 4, "micro_batch_size": 2} | options
    memory = {name: options.pop(name) for name in ("memory_bytes", "pairs") if name in options}
    loader = Loader(data or Clips(), seed=7, rank=rank, world_size=world_size, **options)
    contents = ["clip", "y"] * with_image + ["latents"] * with_latents
    encoder = CountingEncoder(encoders, SHAPE, contents, device=torch.device("cpu"))
    return EncodedLoader(loader, encoder, **memory)


def take(batches, count):
    """So many micro-batches, of whole updates."""
    taken = []
    while len(taken) < count:
        taken += next(batches)
    assert len(taken) == count
    return taken


def tensors(batch):
    return [batch.condition.text, batch.condition.image, batch.condition.frames, batch.latents, batch.first_latent]


def same(a, b):
    return a.indices == b.indices and all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def test_encodings_are_those_of_the_encoders(encoders):
    data = Clips()
    batches = make(encoders, data)
    batch = next(batches)[0]
    picks = Loader(data, seed=7, batch_size=4, micro_batch_size=2).picks(0)[0]
    assert batch.indices == [pick.index for pick in picks] == [0, 1]
    samples = [data[pick.row] for pick in picks]
    signed = torch.stack([torch.from_numpy(s.video) for s in samples]).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    wanted = encode_condition(encoders, signed[:, 0], [s.prompt for s in samples])
    torch.testing.assert_close(batch.condition.text, wanted.text)
    torch.testing.assert_close(batch.condition.image, wanted.image)
    torch.testing.assert_close(batch.condition.frames, wanted.frames)
    torch.testing.assert_close(batch.latents, encoders.vae.encode(signed), rtol=0, atol=1e-5)
    # the given picture is the latent of frame 0, from y
    torch.testing.assert_close(batch.first_latent, batch.latents[:, :1], rtol=0, atol=1e-5)
    assert torch.equal(batch.first_latent, batch.condition.frames[:, :1, 4:])
    assert torch.equal(batch.empty_text[1], encoders.text.encode([""])[0])
    assert batch.latent_size == (2, 4) and batch.unconditional.frames is batch.condition.frames


def test_each_row_is_read_and_encoded_once(encoders):
    data = Clips()
    batches = make(encoders, data)
    taken = take(batches, 6)
    first, again = taken[:3], taken[3:]  # six rows are one epoch of three micro-batches
    assert sorted(data.read) == list(range(ROWS)) and batches.encoder.sizes == [2, 2, 2]
    rows = {tuple(row.flatten()[:4].tolist()) for batch in first for row in batch.latents}
    assert rows == {tuple(row.flatten()[:4].tolist()) for batch in again for row in batch.latents} and len(rows) == ROWS
    # remembered rows come back under the global index of their new turn: their noise is new
    assert [i for batch in first + again for i in batch.indices] == list(range(12))


def test_position_counts_the_samples_of_whole_updates(encoders):
    batches = make(encoders)
    seen = []
    for _ in range(3):
        assert [len(batch.indices) for batch in next(batches)] == [2, 2]
        seen.append(batches.position)
    assert seen == [4, 8, 12]


@pytest.mark.whole
def test_seek_goes_on_where_an_uninterrupted_run_would_be(encoders):
    """Bit for bit, although the two remember other rows: an encoding must not depend on what else is encoded."""
    whole = make(encoders)
    expected = take(whole, 14)
    for start in (2, 4, 6, 10):  # in updates of two micro-batches; from 4 on in the second epoch and later
        resumed = make(encoders)
        resumed.seek(2 * start)
        assert resumed.position == 2 * start
        for a, b in zip(take(resumed, 14 - start), expected[start:], strict=True):
            assert same(a, b)


def test_partly_remembered_batches_are_filled_up_to_their_size(encoders):
    """The batch size picks the kernels and so the last bits: it is always the same."""
    data = Clips()
    batches = make(encoders, data, batch_size=4, micro_batch_size=4)
    take(batches, 2)  # rows 4, 5 of the first epoch beside two of the second
    assert batches.encoder.sizes == [4, 4] and sorted(data.read) == list(range(ROWS))


@pytest.mark.whole
@pytest.mark.parametrize("memory_bytes", [0, 40_000])
def test_little_memory_changes_no_number(encoders, memory_bytes):
    small, large = make(encoders, memory_bytes=memory_bytes), make(encoders)
    for a, b in zip(take(small, 8), take(large, 8), strict=True):
        assert same(a, b)
        assert small._used_bytes <= memory_bytes
    assert len(small.encoder.sizes) > len(large.encoder.sizes)


@pytest.mark.parametrize("micro", [1, 2])
def test_two_ranks_get_the_global_set(encoders, micro):
    one = make(encoders, batch_size=4, micro_batch_size=4)
    ranks = [make(encoders, batch_size=4, micro_batch_size=micro, rank=rank, world_size=2) for rank in (0, 1)]
    for _ in range(4):
        (whole,) = next(one)
        parts = [batch for rank in ranks for batch in take(rank, 2 // micro)]
        indices = [i for batch in parts for i in batch.indices]
        assert sorted(indices) == sorted(whole.indices) and len({rank.position for rank in [one, *ranks]}) == 1
        by_index = {i: batch.latents[k] for batch in parts for k, i in enumerate(batch.indices)}
        for k, index in enumerate(whole.indices):
            torch.testing.assert_close(by_index[index], whole.latents[k], rtol=0, atol=1e-5)


def test_what_a_stage_does_not_need_is_not_encoded(encoders):
    batch = next(make(encoders, Clips(video=False), with_latents=False))[0]
    assert batch.latents is None and batch.first_latent is not None
    batch = next(make(encoders, with_image=False))[0]
    assert batch.condition.image is None and batch.condition.frames is None and batch.first_latent is None
    assert batch.latents is not None


def test_missing_pictures_and_videos_are_named(encoders):
    with pytest.raises(DataError, match="s.: has neither video nor latents; .* repair or remove"):
        next(make(encoders, Clips(video=False)))
    with pytest.raises(DataError, match="s.: has no image"):
        next(make(encoders, Clips(image=False), with_latents=False))


def test_prefill_encodes_each_row_on_one_rank_and_changes_no_number(encoders):
    """A run that prefills and one that encodes as it goes are the same run."""

    def run(mesh):
        data = Clips()
        batches = make(encoders, data, rank=mesh.rank, world_size=mesh.world_size)
        batches.prefill(mesh)
        read, taken = len(data.read), take(batches, 5)
        assert len(data.read) == read  # nothing is read or encoded again
        return read, taken, list(batches._rows)

    filled = on_ranks(run)
    assert sum(read for read, _, _ in filled) == ROWS and all(rows == list(range(ROWS)) for _, _, rows in filled)
    for rank, (_, taken, _) in enumerate(filled):
        for a, b in zip(taken, take(make(encoders, rank=rank, world_size=2), 5), strict=True):
            assert same(a, b)


def test_prefill_fills_up_a_last_short_group(encoders):
    one = make(encoders, batch_size=4, micro_batch_size=4)
    one.prefill(on_ranks(lambda mesh: mesh, 1)[0])
    assert one.encoder.sizes == [4, 4]
    for a, b in zip(take(one, 3), take(make(encoders, batch_size=4, micro_batch_size=4), 3), strict=True):
        assert same(a, b)


def test_a_gpu_encodes_many_rows_of_small_videos_at_once():
    small, large = VideoShape(num_latent_frames=17), VideoShape(height=480, width=832, num_latent_frames=21)
    gpu = torch.device("cuda")
    assert rows_at_once(small, 4, torch.device("cpu")) == rows_at_once(large, 4, gpu) == 4
    assert rows_at_once(small, 4, gpu) == 63


def test_stored_latents_stand_in_for_videos(encoders):
    stored = np.random.default_rng(0).normal(size=(ROWS, 3, 4, 2, 4)).astype(np.float16)
    batches = make(encoders, Clips(video=False, latents=stored))
    rows = [pick.row for pick in batches.loader.picks(0)[0]]
    batch = next(batches)[0]
    assert batch.latents.dtype == torch.float32
    assert torch.equal(batch.latents, torch.from_numpy(stored[rows]).float())
    with pytest.raises(DataError, match=r"s.: stored latents are \(3, 4, 2, 3\); they must be \(3, 4, 2, 4\)"):
        next(make(encoders, Clips(video=False, latents=stored[..., :3])))


class Paragraphs(Clips):
    """Captions of two lines, of which row 4's first is longer than the text encoder reads."""

    def __getitem__(self, row):
        first = "a red circle climbs " * 100 if row == 4 else f"circle {row}"
        return Sample(f"s{row}", first, super().__getitem__(row).image, prompts=(first, "the background is green"))


def test_prompts_that_are_left_out_or_cut_are_named_once(encoders, caplog):
    batches = make(encoders, Paragraphs(), with_latents=False, memory_bytes=0)
    take(batches, 12)  # each row several times
    said = [record.getMessage() for record in caplog.records]
    assert len([line for line in said if "has 2 prompts" in line and "trains on the first one only" in line]) == 1
    assert [line for line in said if "may have been cut" in line] == [
        f"row 4 (s4): its prompt fills all {encoders.text.text_len} tokens of the text encoder and may have been cut"
    ]
