"""Meshes of many GPUs: what is refused, what a rank holds, which mesh is best, and what the command prints."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from tiny_stage import TEACHER, stage_config, stage_tree
from typer.testing import CliRunner

from longtake.cli import app
from longtake.config import load_config
from longtake.doctor.files import look_at
from longtake.doctor.layout import Layout, candidates, layout_of, with_shared_base
from longtake.doctor.memory import Networks
from longtake.doctor.need import stage_need
from longtake.doctor.rates import rates_of
from longtake.doctor.speed import SpeedModel
from longtake.doctor.table import KNOWN_BATCH, best_row, markdown
from longtake.errors import ConfigError

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "configs" / "wan" / "i2v_1_3b" / "distill.yaml"
NETWORKS = Networks(TEACHER, TEACHER, TEACHER)


def invoke(*arguments):
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


# ---- meshes -----------------------------------------------------------------------------------------------------------
def test_sizes_of_a_mesh():
    layout = Layout(64, sequence=4, replicate=2)
    assert (layout.data_ranks, layout.shards, layout.nodes) == (16, 32, 8)
    assert Layout(9, 8).nodes == 2
    with pytest.raises(ConfigError, match="--gpus 8 must be a multiple of --sequence 3 x --replicate 1"):
        Layout(8, sequence=3)
    with pytest.raises(ConfigError, match="--gpus-per-node 0 must be at least 1"):
        Layout(8, gpus_per_node=0)


def test_heads_and_batch_must_fit(workshop, tmp_path):
    config = stage_config(workshop, tmp_path, "distill")  # batch 4, networks of 2 heads
    Layout(8, sequence=2).check(config, NETWORKS)
    with pytest.raises(ConfigError, match=r"batch_size=4 .* 8 data ranks .* set batch_size to 8, or raise --sequence"):
        Layout(8).check(config, NETWORKS)
    with pytest.raises(ConfigError, match="--sequence 4 must divide the 2 heads of each network; take one of 1, 2"):
        Layout(8, sequence=4).check(config, NETWORKS)
    other = Networks(TEACHER, TEACHER, replace(TEACHER, ffn_dim=96))
    with pytest.raises(ConfigError, match="--shared-base needs networks of one size"):
        Layout(1, shared_base=True).check(config, other)


def test_the_configuration_may_name_the_mesh():
    """Groups that a stage may have; options win over them."""
    parallel = SimpleNamespace(replicate=2, sequence=4, compile=True)
    config = SimpleNamespace(parallel=parallel, roles="shared")
    layout = layout_of(config, 16, sequence=2, replicate=None)
    assert layout == Layout(16, 8, 2, 2, shared_base=True, compile=True)
    assert layout_of(SimpleNamespace(), 4) == Layout(4) == layout_of(SimpleNamespace(parallel=None, roles="own"), 4)


def test_what_a_rank_holds(workshop, tmp_path):
    config = stage_config(workshop, tmp_path, "distill", activation_checkpointing=True, batch_size=8)

    def parts(layout, config=config):
        return stage_need(config, NETWORKS, layout.gpus, image_tokens=17, layout=layout).parts

    one, four, shared = parts(Layout(4)), parts(Layout(4, replicate=4)), parts(Layout(4, sequence=2))
    assert one == stage_need(config, NETWORKS, 4, image_tokens=17).parts
    for name in ("weights", "optimizer", "average", "frozen networks"):
        assert four[name] == pytest.approx(4 * one[name], rel=1e-3) and shared[name] == one[name]
    # two ranks share one video: half of the activations and the cache of a rank with as many videos
    double = parts(Layout(2))
    for name in ("activations", "cache", "working memory"):
        assert shared[name] == double[name] // 2
    offloaded = parts(Layout(4, cpu_offload=True))
    assert sum(one.values()) - sum(offloaded.values()) == sum(
        one[name] for name in ("weights", "gradients", "optimizer", "average")
    )
    lora = with_shared_base(config)
    assert lora.lora == lora.critic.lora and lora.lora.rank == 256
    several, base = (parts(Layout(1, shared_base=on), lora) for on in (False, True))
    # the teacher is the base of all; otherwise student and critic have a base each
    assert base["frozen networks"] == several["frozen networks"]
    assert several["weights"] - base["weights"] == pytest.approx(2 * several["frozen networks"], rel=1e-6)


def test_candidates_are_all_allowed_and_keep_the_batch_where_they_can(workshop, tmp_path):
    config = stage_config(workshop, tmp_path, "distill")
    found = list(candidates(config, NETWORKS, Layout(16, gpus_per_node=4)))
    assert {(layout.sequence, layout.shards) for layout, _ in found} == {
        *((1, shards) for shards in (1, 2, 4, 8, 16)),
        *((2, shards) for shards in (1, 2, 4, 8, 16)),
    }
    for layout, changed in found:
        layout.check(changed, NETWORKS)
        assert layout.whole == (layout.shards == 1) and layout.shards * layout.copies == 16
        assert changed.batch_size == (16 if layout.sequence == 1 else 8)
    assert {c.batch_size for _, c in candidates(config, NETWORKS, Layout(2))} == {4}


@pytest.fixture(scope="module")
def recipe():
    config = load_config(RECIPE)
    return config, look_at(config).networks


def test_the_best_mesh(recipe):
    """One that fits; then a batch that others train with; then the least time a sample."""
    config, networks = recipe
    rates = rates_of()
    four = best_row(config, networks, 4, rates, 257, like=Layout(1))
    assert four.fits and four.config.batch_size == 4 and four.layout.shards > 1
    many = best_row(config, networks, 64, rates, 257, like=Layout(1))
    assert many.config.batch_size == KNOWN_BATCH and many.fits
    assert many.prediction.samples_per_second > 10 * four.prediction.samples_per_second
    small = replace(rates, device=replace(rates.device, memory_bytes=10 << 30))
    tight = best_row(config, networks, 1, small, 257, like=Layout(1))
    assert not tight.fits
    text = markdown(config, networks, small, 257, like=Layout(1), counts=(1, 1024))
    rows = [line for line in text.splitlines() if line.startswith(("| 1 ", "| 1024 "))]
    assert rows[0].endswith("| does not fit |")
    assert "batch beyond 64, which has work for 256 GPUs at most" in rows[1]


# ---- the command ------------------------------------------------------------------------------------------------------
def test_a_prediction_for_other_machines(tmp_path):
    result = invoke(RECIPE, "batch_size=16", "--gpus", 64, "--sequence", 4, "--replicate", 8, "--json")
    assert result.exit_code == 1  # nothing of what it reads is here
    tree = json.loads(result.output)
    (stage,) = tree["stages"]
    assert stage["layout"]["sequence"] == 4 and stage["layout"]["replicate"] == 8 and stage["device"] == "H200"
    assert stage["free_bytes"] == 141 * 10**9 and stage["calibrated"]
    guess = stage["prediction"]
    assert guess["seconds"] == pytest.approx(sum(guess["seconds_by_phase"].values())) and guess["network_bytes"] > 0
    text = invoke(RECIPE, "batch_size=64", "--gpus", 64, "--device", "H100", "--gpus-per-node", 4).output
    assert (
        "predicted for 64 x H100 in nodes of 4 (no whole step was measured on one): 1 replica(s) x 64 shard(s)" in text
    )
    assert "seconds a step" in text and "GB between nodes" in text and "an H100 by its data sheet" in text


def test_a_mesh_of_the_configuration_is_that_of_the_options(workshop, tmp_path):
    """`parallel.sequence=2` says what `--sequence 2` says, and does not stand in the way of other options."""
    options = {"batch_size": 2, "micro_batch_size": 2, "precision": "bf16"}
    named = stage_config(workshop, tmp_path, "distill", parallel={"sequence": 2}, **options)
    plain = stage_config(workshop, tmp_path, "distill", **options)
    networks, layout = Networks(TEACHER, TEACHER, TEACHER), Layout(2, sequence=2)
    assert layout_of(named, 2) == layout
    needs = [stage_need(config, networks, 2, layout=layout) for config in (named, plain)]
    guesses = [SpeedModel(config, networks, layout, rates_of(), 17).predict() for config in (named, plain)]
    assert needs[0] == needs[1] and guesses[0] == guesses[1]


def test_this_machine_is_meant_unless_a_node_is_too_small(workshop, tmp_path):
    file = tmp_path / "stage.yaml"
    file.write_text(yaml.safe_dump(stage_tree(workshop, tmp_path, "distill")))
    assert "memory without a GPU" in invoke(file, "--gpus", 4).output
    assert "an H200 by its data sheet" in invoke(file, "--gpus", 4, "--device", "H200").output
    assert "an H200 by its data sheet" in invoke(file, "--gpus", 4, "--gpus-per-node", 2).output


def test_wrong_options_end_before_anything_is_looked_at(workshop, tmp_path):
    file = tmp_path / "stage.yaml"
    file.write_text(yaml.safe_dump(stage_tree(workshop, tmp_path, "distill")))
    for arguments, reason in (
        (("--gpus", 64), "must be a multiple of the 64 data ranks"),
        (("--device", "TPU"), "--device TPU is not in the table"),
        (("--measured", tmp_path / "none.json"), "cannot be read"),
    ):
        result = invoke(file, *arguments)
        assert result.exit_code == 2 and reason in result.output, result.output
    assert invoke("--table").exit_code == 2


def test_a_table_of_each_stage_of_a_job(workshop, tmp_path):
    tree = stage_tree(workshop, tmp_path, "distill")
    tree["logdir"] = str(tmp_path)
    file = tmp_path / "stage.yaml"
    file.write_text(yaml.safe_dump(tree))
    result = invoke(file, "--table", "--shared-base")
    assert result.exit_code == 0 and result.output.count("| 1024 |") == 1
    job = invoke(ROOT / "configs/toy/i2v.yaml", "--table")
    assert job.exit_code == 0 and job.output.count("| 1024 |") == 2
