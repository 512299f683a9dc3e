"""What is said of a process that dies."""

import os

import pytest

from longtake.errors import LongtakeError
from longtake.processes import answered, spawned


def test_of_a_process_that_dies_something_is_said_whether_it_has_work_or_is_to_get_some():
    with spawned(1) as pool:
        with answered("sums"):
            assert list(pool.map(abs, [-1, 2])) == [1, 2]
        for _ in range(2):
            with pytest.raises(LongtakeError, match="a process for sums was ended before"), answered("sums"):
                pool.submit(os._exit, 1).result()
