"""Validation of rows over two ranks with sharded weights: the numbers of one, and an error of one ends nothing."""

import json
import subprocess
import sys

import apart_run
import pytest
import validation_run
import yaml
from encoded_files import from_cache
from forked_ranks import torchrun
from test_meshes import rows_of

from longtake.parallel.mesh import Mesh
from longtake.train.stage import run_stage


def config_of(workshop, logdir, whole):
    validation = {"num_rows": 3, "times_longer": 2, "teacher_steps": 2, "max_share": 1.0}
    validation["data"] = str(workshop / "data/images")
    changes = {"max_steps": 4, "validate_every": 2, "validation": validation, "save_every": 100}
    return from_cache(workshop, logdir, whole, "distill", **changes)


@pytest.mark.whole
@pytest.mark.timeout(400)
def test_two_ranks_validate_as_one(workshop, whole, tmp_path):
    one, two = (config_of(workshop, tmp_path / name / "run", whole) for name in ("one", "two"))
    run_stage(one, Mesh())
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(two.model_dump()))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, validation_run.__file__, "train", str(file)], capture_output=True, text=True, timeout=380
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert "VALIDATION FAILED (step 2, error 1 of this run)" in done.stderr and "rank 1 failed with OutOfMemory" in done.stderr
    wanted, found = rows_of(one.folder), rows_of(two.folder)
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    for a, b in zip(found, wanted, strict=True):
        if a["step"] == 2 and "validation/errors" in a:
            assert {key for key in a if "seconds" not in key} == {"step", "validation/errors"}
            continue
        assert a.keys() == b.keys()
        for key, value in b.items():
            if key == "validation/errors":
                assert a[key] == (a["step"] == 4)
            elif value is not None and "seconds" not in key:
                assert a[key] == pytest.approx(value, rel=0.02, abs=2e-3), (a["step"], key)
    samples = {path.name for path in (two.folder / "samples").iterdir()}
    assert {f"step_000004_row{k}{end}.mp4" for k in range(3) for end in ("", "_long")} <= samples
    kept = [json.loads(line) for line in (two.folder / "saves.jsonl").read_text().splitlines()]
    assert [line["step"] for line in kept] == [4] and len(list((tmp_path / "two/teacher_samples").iterdir())) == 3


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_rank_that_fails_where_the_other_waits_ends_the_run_at_once(workshop, whole, tmp_path):
    """Without the watchdog, and long before a collective times out."""
    config = config_of(workshop, tmp_path / "run", whole)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump() | {"watchdog": {"seconds": 0}}))
    done = torchrun(2, apart_run.__file__, "train", file)
    assert done.returncode != 0, done.stderr[-6000:]
    assert "rank 1 failed with OutOfMemoryError: CUDA out of memory (a test); rank 0 waited" in done.stderr
    assert [row["step"] for row in rows_of(config.folder) if "validation/errors" in row] == [0]
