"""`activation_checkpointing: auto`: what is measured, what is decided of it, and that training goes on alike."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
import yaml
from count_bytes import Held
from fake_ranks import on_ranks
from tiny_stage import stage_config, stage_tree
from typer.testing import CliRunner

from longtake.cli.app import app
from longtake.models.attention import attend
from longtake.models.execution import Execution
from longtake.models.layers import MLP
from longtake.models.recompute import Again, ByBlock
from longtake.models.trial import is_right
from longtake.objectives.teacher_forcing import TeacherForcing
from longtake.parallel.fsdp import parallelize
from longtake.parallel.mesh import Mesh
from longtake.train import job, keeping, networks
from longtake.train.keeping import ROOM, Keeper, Memory, Watched, first_ways, plan, tried_first

KEPT: dict[Again, int] = {True: 10, "selective": 30, "narrow": 45, "products": 60, False: 100}
SEEN, WIDE = {way: size for way, size in KEPT.items() if way != "narrow"}, 15


@pytest.mark.parametrize(
    ("spare", "expected"),
    [
        (-5, [8, 0, 0, 0, 0]),  # not even what there is fits
        (19, [8, 0, 0, 0, 0]),
        (79, [5, 3, 0, 0, 0]),  # attention first: 20 a block
        (159, [1, 7, 0, 0, 0]),
        (220, [0, 4, 4, 0, 0]),  # then products that are not wide: 15 more each
        (295, [0, 0, 7, 1, 0]),  # then the wide ones: as much
        (400, [0, 0, 0, 8, 0]),
        (480, [0, 0, 0, 6, 2]),  # then all
        (10**6, [0, 0, 0, 0, 8]),
    ],
)
def test_attention_is_kept_first_then_products_then_all(spare, expected):
    found = plan(KEPT, 8, spare)
    assert [found.get(way, 0) for way in KEPT] == expected
    assert sum(count * (KEPT[way] - 10) for way, count in found.items()) <= max(0, spare)


def test_where_no_results_can_be_kept_alone_whole_blocks_are():
    kept = {way: KEPT[way] for way in (True, False)}
    assert plan(kept, 8, 299) == {True: 5, False: 3} and plan(kept, 8, 10**6) == {False: 8}
    assert first_ways(6, selective=False) == [False, *[True] * 5]
    assert first_ways(6, selective=True) == [False, "products", True, True, True, "selective"]


@pytest.mark.parametrize(
    "spare, expected",
    [
        (0, [True] * 5),
        (40_000, ["selective"] * 2 + [True] * 3),
        (390_000, ["narrow"] * 3 + ["selective"] * 2),
        (660_000, ["products"] * 3 + ["narrow"] * 2),
        (2**30, [False] * 5),
    ],
)
def test_what_blocks_keep_is_measured_and_decided_once(
    spare, expected, tiny_model, tiny_condition, tiny_latents, caplog
):
    by_block = ByBlock(first_ways(5, selective=True))
    model = parallelize(tiny_model(True, num_layers=5), Mesh(), recompute=by_block)
    memory = Held(model)
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
        tried = tried_first(keeper.watched[0].most)  # which is free again
        memory.total = int((memory.highest - tried + spare) / ROOM) + 1
        keeper.passed(2)
    assert keeper.settled and by_block.ways == expected
    assert sum(keeper.decided["critic"].values()) == 5
    assert len(caplog.records) == 1 and "critic: backward computes again" in caplog.text
    nothing, attention, products, whole = keeper.watched[0].most.values()
    # A block leaves its result; attention's results and the sums of rows beside; those of products; all of it.
    result = x.shape[0] * 9 * 6 * model.config.dim * 4
    assert nothing == result and nothing < attention < products < whole
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)
    memory.begin()
    assert torch.equal(update(), first)
    assert memory.highest <= ROOM * memory.total + 2**10  # as foreseen


class Stated(Memory):
    """A GPU on which `spare` bytes are free beside the most that was held."""

    def __init__(self, spare: int) -> None:
        self.spare = spare

    def begin(self) -> None: ...

    def now(self) -> int:
        return 0

    def most(self) -> int:
        return 1000

    def all(self) -> int:
        return int((1000 + self.spare) / ROOM) + 1


@pytest.mark.parametrize(
    "spares, expected", [((10**6, 79 - 90), [5, 3, 0, 0, 0]), ((220 - 90, 400 - 90), [0, 4, 4, 0, 0])]
)
def test_ranks_decide_alike_by_what_the_fullest_has_to_spare(spares, expected):
    """Else one would wait in backward for exchanges that another does not make. 90 bytes were kept to be measured."""

    def decide(mesh):
        by_block = ByBlock(first_ways(8, selective=True))
        watched = Watched("critic", torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(8)), by_block)
        watched.most, watched.wide = {way: size - mesh.rank for way, size in SEEN.items()}, [0, WIDE]
        Keeper([watched], mesh, ["critic"], lambda step: ["critic"], 1, Stated(spares[mesh.rank])).passed(0)
        return [list(by_block.ways).count(way) for way in KEPT]

    assert on_ranks(decide) == [expected, expected]


@pytest.mark.parametrize(
    "forms, expected", [((0, 0), [0, 0, 0, 0, 8]), ((1, 0), [0, 0, 0, 8, 0]), ((1, 2), [8, 0, 0, 0, 0])]
)
def test_recorded_calls_each_hold_what_they_keep(forms, expected):
    """A kind of call that is recorded holds its memory while another one runs: 1000 bytes to work in, and what is kept."""
    watched = []
    for number in forms:
        by_block = ByBlock(first_ways(8, selective=True))
        blocks = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(8))
        watched.append(Watched("critic", blocks, by_block, lambda number=number: number))
        watched[-1].most, watched[-1].wide = dict(SEEN), [0, WIDE]
    Keeper(watched, Mesh(), ["critic"], lambda step: ["critic"], 1, Stated(1800)).passed(0)
    assert [[list(one.by_block.ways).count(way) for way in KEPT] for one in watched] == [expected] * 2


def test_ranks_of_which_one_alone_records_decide_alike():
    """A recording that failed on one: the other has 90 bytes of the first block again, and it has not."""

    def decide(mesh):
        by_block = ByBlock(first_ways(8, selective=True))
        blocks = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(8))
        watched = Watched("critic", blocks, by_block, lambda: mesh.rank)
        watched.most, watched.wide = dict(SEEN), [0, WIDE]
        Keeper([watched], mesh, ["critic"], lambda step: ["critic"], 1, Stated(1158)).passed(0)
        return [list(by_block.ways).count(way) for way in KEPT]

    assert on_ranks(decide) == [[5, 3, 0, 0, 0]] * 2  # (1158 - 1000) / 2 = 79


def test_what_one_rank_cannot_keep_none_does(workshop, tmp_path, monkeypatch, tiny_model):
    can = [True, False]
    monkeypatch.setattr(networks, "keeps_some", lambda *_: can.pop())
    config, model = stage_config(workshop, tmp_path, "distill"), tiny_model(True)
    assert on_ranks(lambda mesh: networks.Builder(config, mesh)._keeps_some(model)) == [False, False] and not can


class Whole(Execution):
    """One on a CPU that goes the ways of a GPU."""

    def on_a_gpu(self, x):
        return True


@pytest.mark.parametrize("wrong", [None, "attention", "the MLP"])
@pytest.mark.parametrize("dtype, alone", [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_what_is_not_itself_when_it_is_made_again_is_refused_by_name(wrong, dtype, alone, monkeypatch, caplog):
    """Right by itself, and another function in backward."""

    def spoilt(function):
        def run(first, *given, **options):
            again = torch._C._current_graph_task_id() != -1
            return function(first * 2 if again else first, *given, **options)

        return run

    execution = Whole(fuses=True, attend=spoilt(attend) if wrong == "attention" else attend, fused_shards=alone)
    if wrong == "the MLP":
        forward = MLP.forward
        monkeypatch.setattr(MLP, "forward", lambda layers, *given: spoilt(partial(forward, layers))(*given))
    state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        assert keeping.keeps_some(execution, torch.device("cpu"), dtype, 16) == (wrong is None)
    assert torch.equal(torch.get_rng_state(), state)
    told = [record.getMessage() for record in caplog.records if record.name == is_right.__module__]
    assert len(told) == (wrong is not None) and all(f"keeping some results of {wrong}" in one for one in told)


def test_a_stage_on_a_cpu_recomputes_nothing(workshop, tmp_path):
    config = stage_config(workshop, tmp_path, "distill")
    assert config.activation_checkpointing == "auto" and config.without_a_gpu().activation_checkpointing is False


CUDA_IS_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nsee the documentation")


@pytest.mark.parametrize(
    ("error", "changes", "told", "not_told"),
    [
        (
            CUDA_IS_FULL,
            {},
            ["activation_checkpointing=full (it is auto, which decides by", "micro_batch_size=1 (it is 2)"],
            [],
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
            {"activation_checkpointing": "full"},
            ["2)"],
            ["=full"],
        ),
        (
            CUDA_IS_FULL,
            {"micro_batch_size": 1, "lora": {"rank": 2}},
            ["=full"],
            ["micro_batch", "lora.rank", "; lower"],
        ),
    ],
)
def test_memory_that_runs_out_later_is_one_message_with_the_fix(
    workshop, tmp_path, monkeypatch, error, changes, told, not_told
):
    """In the third iteration, where `auto` has decided; the checkpoint before it stays."""
    loss = TeacherForcing.loss

    def out_of_memory(self, turn, batch, step):
        if step == 2:
            raise type(error)(str(error))
        return loss(self, turn, batch, step)

    monkeypatch.setattr(TeacherForcing, "loss", out_of_memory)
    monkeypatch.setattr(job, "_log_on_main", lambda mesh: None)
    changes = {"max_steps": 3, "save_every": 2, "batch_size": 2, "micro_batch_size": 2} | changes
    tree = stage_tree(workshop, tmp_path / "log", "causal", **changes)
    file = tmp_path / "stage.yaml"
    file.write_text(yaml.safe_dump(tree))
    result = CliRunner().invoke(app, ["train", str(file)])
    (said,) = (line for line in result.output.splitlines() if line.startswith("Not enough memory ("))
    assert result.exit_code == 1 and said.startswith(f"Not enough memory ({str(error).splitlines()[0]}); any of these")
    for part in (*told, "video.num_latent_frames (it is ", "`longtake doctor CONFIG"):
        assert part in said
    assert not [part for part in not_told if part in said]
    assert said.endswith("; started again, it goes on from its last checkpoint")
    assert [path.name for path in (tmp_path / "log/causal/checkpoints").iterdir()] == ["step_000002"]
