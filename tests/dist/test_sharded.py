"""Sharded weights are computed as whole ones are: gradients, what is kept and gathered, and what `auto` decides."""

import json

import pytest
import sharded_run
from forked_ranks import torchrun


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.whole)])
def found(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    done = torchrun(request.param, sharded_run.__file__, folder, "cpu")
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]


@pytest.mark.parametrize("case", sharded_run.CASES)
def test_gradients_and_what_is_computed_again_are_those_of_whole_weights(found, case):
    """Blocks that keep all, products, attention and nothing, also where the forward found its weights gathered, and so
    had other operators than its recomputation. A unit is gathered once in a backward.
    """
    for rank in found:
        seen = rank[case]
        assert seen["apart"] < 1e-6
        assert all(seen["sharded"][what] == seen["whole"][what] > 0 for what in ("attentions", "products"))
        assert seen["units"] == (9 if "bfloat16" in case else 5)
        assert seen["sharded"]["gathers"] == (0 if len(found) == 1 else seen["units"])


def test_blocks_of_sharded_weights_are_measured_and_kept_as_those_of_whole_ones(found):
    """On all ranks alike, by the one that has the least to spare: one that kept more would not wait for the others."""
    for rank in found:
        sharded, whole = rank["auto"]["sharded"], rank["auto"]["whole"]
        assert sharded["seen"] == whole["seen"] == sorted(set(whole["seen"]))
        assert sharded["ways"] == whole["ways"] and {*whole["ways"]} == {"selective", True}
        assert sharded["apart"] == whole["apart"] == 0
