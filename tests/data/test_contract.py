"""What every format must do alike: its kind is recognised, rows are in one order on any ranks, workers and positions,
each epoch reshuffles, and a bad row is named, counted, replaced or fatal."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from format_files import CANNOT_BE_BAD, FORMATS, write

from longtake.data.formats import detect_kind, open_dataset
from longtake.data.loader import Loader
from longtake.data.order import order
from longtake.errors import DataError

pytest.importorskip("lmdb")
pytest.importorskip("av")

NUMBER, SEED, BATCH = 6, 3, 4


@pytest.fixture(scope="module", params=FORMATS)
def made(request, tmp_path_factory):
    """(name, data set) of six good rows."""
    path = write(request.param, tmp_path_factory.mktemp(request.param), NUMBER)
    assert detect_kind(path) == FORMATS[request.param][1]
    return request.param, open_dataset(path, num_frames=5, height=16, width=16)


def make(dataset, **changes):
    return Loader(dataset, **{"seed": SEED, "batch_size": BATCH, "micro_batch_size": 1} | changes)


def prompts(loaders, position, updates):
    """Prompt by global index that all ranks read together from `position` on, with their threads."""
    read = {}
    for start in range(position, position + updates * BATCH, BATCH):
        for loader in loaders:
            picks = [pick for group in loader.picks(start) for pick in group]
            with ThreadPoolExecutor(max(1, loader.workers)) as pool:
                for pick, (_, sample) in zip(picks, pool.map(loader.read, [pick.row for pick in picks])):
                    assert pick.index not in read
                    read[pick.index] = sample.prompt
    return read


def expected(indices):
    return {g: f"prompt {order(SEED, g // NUMBER, NUMBER)[g % NUMBER]}" for g in indices}


def test_rows_have_prompts_pictures_and_a_place(made):
    name, dataset = made
    assert len(dataset) == NUMBER
    for row in range(NUMBER):
        sample = dataset[row]
        assert sample.prompt == sample.prompts[0] == f"prompt {row}" and sample.where
        if FORMATS[name][1] in ("texts", "encoded"):
            assert sample.image is None and sample.video is None
        else:
            assert sample.image.shape == (16, 16, 3)
        assert (sample.video is not None) == name.endswith("clips")
        if sample.video is not None:
            assert sample.video.shape == (5, 16, 16, 3)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 3), (2, 1), (4, 2)])
def test_order_is_one_for_all_ranks_and_workers_and_each_epoch_has_its_own(made, world_size, workers):
    _, dataset = made
    loaders = [make(dataset, rank=rank, world_size=world_size, workers=workers) for rank in range(world_size)]
    read = prompts(loaders, 0, 3)  # two epochs
    assert read == expected(range(3 * BATCH))
    epochs = [[read[g] for g in range(start, start + NUMBER)] for start in (0, NUMBER)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [f"prompt {row}" for row in range(NUMBER)]
    assert epochs[0] != epochs[1]


def test_any_position_goes_on_with_other_ranks_and_workers(made):
    _, dataset = made
    for world_size, workers in ((1, 2), (4, 0)):
        loaders = [make(dataset, rank=rank, world_size=world_size, workers=workers) for rank in range(world_size)]
        for loader in loaders:
            loader.seek(BATCH)
            assert loader.position == BATCH
        assert prompts(loaders, loaders[0].position, 2) == expected(range(BATCH, 3 * BATCH))


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in CANNOT_BE_BAD])
def test_a_bad_row_is_named_counted_and_replaced_or_fatal(name, tmp_path):
    path = write(name, tmp_path / name, NUMBER, bad=[2])
    dataset = open_dataset(path, num_frames=5, height=16, width=16)
    with pytest.raises(DataError, match="empty") as error:
        make(dataset).read(2)
    local = 2  # the first shard of two holds rows 0 to 2
    assert str(path) in str(error.value) and f"row {local}" in str(error.value)
    assert "data.on_bad_row=skip" in str(error.value)
    skipping = make(dataset, on_bad_row="skip", max_bad_share=0.2)
    row, sample = skipping.read(2)
    assert (row, sample.prompt) == (3, "prompt 3") and len(skipping.bad) == 1
    skipping.read(2)
    assert len(skipping.bad) == 1  # each row counts once
    with pytest.raises(DataError, match=r"1 of 6 rows are bad, more than data.max_bad_share=0.1"):
        make(dataset, on_bad_row="skip", max_bad_share=0.1).read(2)


def test_every_kind_has_a_writer():
    assert {kind for _, kind in FORMATS.values()} == {"images", "clips", "texts", "webdataset", "lmdb", "encoded"}
