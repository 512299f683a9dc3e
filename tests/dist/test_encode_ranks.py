"""`longtake encode` on two real ranks (gloo, CPU): the set of one rank, and an error that stops both."""

import yaml
from forked_ranks import torchrun
from tiny_stage import stage_config, stage_tree

from longtake.parallel.mesh import Mesh
from longtake.encodings.write import encode


def test_two_ranks_write_what_one_writes(workshop, tmp_path):
    tree = stage_tree(workshop, tmp_path, "distill")
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(tree))
    command = ["-m", "longtake", "encode", tmp_path / "stage.yaml", "--rows-per-shard", 2]
    done = torchrun(2, *command, "-o", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("6 rows, 0 bad rows left out") == 1 and "on 2 ranks" in done.stdout
    encode(stage_config(workshop, tmp_path, "distill"), tmp_path / "one", Mesh(), rows_per_shard=2)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two and len(one) == 5
