"""Aspect-ratio buckets: batches of one size, exact order and position, no stretching."""

import numpy as np
import pytest
from format_files import encode, mp4, pixels, text_folder, write_tar
from PIL import Image

from longtake.data.formats import open_dataset
from longtake.data.loader import Loader, collate
from longtake.data.order import Buckets, nearest_buckets
from longtake.data.samples import FileSize, nearest_size
from longtake.errors import ConfigError, DataError

SIZES = (FileSize(16, 32), FileSize(16, 16), FileSize(32, 16))
SEED, BATCH = 5, 4


def make(bucket_of_row, dataset=None, **changes):
    buckets = Buckets(np.array(bucket_of_row), SIZES)
    options = {"seed": SEED, "batch_size": BATCH, "micro_batch_size": 1, "buckets": buckets} | changes
    return Loader(dataset or [None] * len(bucket_of_row), **options)


def rows_of(loaders, updates, start=0):
    """The rows of each update, in the order of global indices, over all ranks."""
    result = []
    for position in range(start * BATCH, (start + updates) * BATCH, BATCH):
        picks = sorted((p.index, p.row) for loader in loaders for group in loader.picks(position) for p in group)
        assert [index for index, _ in picks] == list(range(position, position + BATCH))
        result.append([row for _, row in picks])
    return result


BUCKET_OF_ROW = [0] * 20 + [1] * 10 + [2] * 3


def test_an_update_has_rows_of_one_bucket_and_each_row_comes_once_an_epoch_of_its_bucket():
    updates = rows_of([make(BUCKET_OF_ROW)], 400)
    seen = {0: [], 1: [], 2: []}
    for rows in updates:
        buckets = {BUCKET_OF_ROW[row] for row in rows}
        assert len(buckets) == 1
        seen[buckets.pop()] += rows
    for bucket, rows in seen.items():
        own = [row for row, b in enumerate(BUCKET_OF_ROW) if b == bucket]
        epochs = [rows[k : k + len(own)] for k in range(0, len(rows) - len(own) + 1, len(own))]
        assert len(epochs) >= 2 and all(sorted(epoch) == own for epoch in epochs)
        assert len(own) == 3 or epochs[0] != epochs[1]
        # as often as its share of the rows, within four standard deviations of 400 draws
        share = len(own) / len(BUCKET_OF_ROW)
        assert abs(len(rows) / BATCH - 400 * share) < 4 * (400 * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_order_and_position_are_those_of_one_rank(world_size):
    whole = rows_of([make(BUCKET_OF_ROW)], 40)
    ranks = [make(BUCKET_OF_ROW, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert rows_of(ranks, 40) == whole
    later = [make(BUCKET_OF_ROW, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert rows_of(later, 10, start=30) == whole[30:]  # nothing was read before
    far = rows_of([make(BUCKET_OF_ROW)], 3, start=2047)
    assert far == rows_of([make(BUCKET_OF_ROW)], 2050)[2047:]


def test_another_batch_size_in_the_middle_is_refused():
    with pytest.raises(ConfigError, match="batch_size=4 does not divide the 6 samples .* data.buckets"):
        make(BUCKET_OF_ROW).picks(6)


def test_a_bad_row_gives_way_to_one_of_its_bucket():
    class Broken:
        def __len__(self):
            return 6

        def __getitem__(self, row):
            if row in (1, 3):
                raise DataError(f"row {row}: broken")
            return row

    loader = make([0, 2, 0, 2, 0, 2], Broken(), on_bad_row="skip", max_bad_share=1.0)
    assert [loader.read(row)[0] for row in range(6)] == [0, 5, 2, 5, 4, 5]
    with pytest.raises(DataError, match="none of the 2 rows of the bucket"):
        make([2, 0, 2, 0, 2, 2], _AllBad(), on_bad_row="skip", max_bad_share=1.0).read(1)


class _AllBad:
    def __len__(self):
        return 6

    def __getitem__(self, row):
        raise DataError("broken")


@pytest.mark.parametrize(
    ("height", "width", "wanted"), [(10, 20, 0), (100, 130, 1), (100, 145, 0), (30, 31, 1), (50, 30, 2), (500, 10, 2)]
)
def test_the_nearest_aspect_is_by_ratio(height, width, wanted):
    """Between 1 and 2 the border is the square root of 2."""
    assert nearest_size(SIZES, height, width) == wanted


@pytest.fixture
def pictures(tmp_path):
    """Wide, square and tall pictures, one lying down with an EXIF turn, one broken."""
    shapes = [(20, 40), (30, 30), (60, 25), (24, 50)]
    for i, shape in enumerate(shapes):
        (tmp_path / f"{i}.png").write_bytes(encode(pixels(i, *shape)))
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "4.jpg").write_bytes(encode(pixels(4, 20, 40), "JPEG", exif=exif))
    (tmp_path / "5.png").write_bytes(b"broken")
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(f"prompt {i}")
    return tmp_path


def test_pictures_are_assigned_by_their_heads_and_read_at_that_size(pictures):
    dataset = open_dataset(pictures, buckets=SIZES)
    buckets = nearest_buckets(dataset, range(len(dataset)), SIZES, threads=2)
    assert buckets == [0, 1, 2, 0, 2, 0]  # the broken one is met again when it is read
    for row, bucket in enumerate(buckets[:5]):
        assert dataset[row].image.shape == (SIZES[bucket].height, SIZES[bucket].width, 3)
    loader = make(buckets, dataset, on_bad_row="skip", max_bad_share=0.5, micro_batch_size=2)
    for position in range(0, 40, BATCH):
        for picks in loader.picks(position):
            read = [loader.read(pick.row) for pick in picks]
            batch = collate([sample for _, sample in read], picks, [row for row, _ in read])
            size = loader.size_of(picks[0].row)
            assert batch.images.shape == (2, 3, size.height, size.width)


def test_nothing_is_stretched(tmp_path):
    """A disc stays a disc in every bucket."""
    rows, columns = np.mgrid[:120, :180]
    disc = np.repeat(((rows - 60) ** 2 + (columns - 90) ** 2 < 20**2)[..., None], 3, 2).astype(np.uint8) * 255
    for name, array in (("a", disc), ("b", disc[:, 30:150]), ("c", np.ascontiguousarray(disc.swapaxes(0, 1)))):
        (tmp_path / f"{name}.png").write_bytes(encode(array))
        (tmp_path / f"{name}.txt").write_text("a disc")
    sizes = tuple(FileSize(2 * size.height, 2 * size.width) for size in SIZES)
    dataset = open_dataset(tmp_path, buckets=sizes)
    shapes = set()
    for row in range(3):
        inside = dataset[row].image[..., 0] > 127
        height, width = inside.any(1).sum(), inside.any(0).sum()
        assert abs(height - width) <= 1 and height > 5
        shapes.add(inside.shape)
    assert len(shapes) == 3


def test_clips_and_tars_have_sizes_texts_have_none(tmp_path):
    write_tar(
        tmp_path / "a.tar", [("1.mp4", mp4(size=(32, 16))), ("1.txt", b"x"), ("2.png", encode(pixels(0, 10, 20)))]
    )
    dataset = open_dataset(tmp_path / "a.tar", num_frames=5, buckets=SIZES)
    assert nearest_buckets(dataset, range(2), SIZES) == [2, 0]
    assert dataset[0].video.shape == (5, 32, 16, 3)
    (tmp_path / "texts").mkdir()
    texts = open_dataset(text_folder(tmp_path / "texts", 2))
    with pytest.raises(ConfigError, match="data.buckets=.* needs pictures, and row 0 has none"):
        nearest_buckets(texts, range(2), SIZES)
