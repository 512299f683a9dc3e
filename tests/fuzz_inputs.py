"""The inputs of `fuzz.py`: a tiny student and teacher, data of every format, recipes, a run, and things to trip over."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import yaml
from format_files import mp4
from PIL import Image
from tiny_lora import adapted, adapter_of, stir
from tiny_stage import TEACHER, make_encoders, make_model, save_encoders, stage_tree

from longtake.config.groups import WorldConfig
from longtake.config.stage import StageConfig
from longtake.encodings.write import encode
from longtake.inference.export import export
from longtake.models.lora import factors
from longtake.toy.files import write_world
from longtake.train.job import run
from longtake.weights.fingerprint import weights_identity
from longtake.weights.load import save_dit
from longtake.weights.lora import Base, write_adapter


def make(root: Path) -> None:
    """Writes all into the folder `root`, to which the paths in recipes are relative."""
    save_encoders(make_encoders(), root / "encoders")
    save_dit(TEACHER, make_model().state_dict(), root / "teacher")
    write_world(root / "data", WorldConfig(num_worlds=2, num_frames=17))
    Image.new("RGB", (64, 64), (200, 60, 30)).save(root / "in.png")
    (root / "clip.mp4").write_bytes(mp4(9, (64, 64)))
    stage, distill = (_recipe(kind) for kind in ("causal", "distill"))
    _write(root / "stage.yaml", stage)
    _write(root / "distill.yaml", distill)
    job = {"logdir": "job", "data": {"num_worlds": 2, "num_frames": 17}, "stages": {"causal": "stage.yaml"}}
    _write(root / "job.yaml", job)
    event = {"seconds": 0.1, "prompt": "a blue square falls"}
    _write(root / "story.yaml", {"image": "in.png", "prompt": "a red circle", "frames": 17, "events": [event]})
    small = {"logdir": "run", "max_steps": 1, "batch_size": 1}
    run(StageConfig.from_tree(stage | small))
    export(root / "run", root / "student")
    updated = stir(adapted(make_model()))
    base = Base("../teacher", weights_identity(root / "teacher"))
    write_adapter(root / "lora", factors(updated.state_dict()), adapter_of(updated, base=base))
    encode(StageConfig.from_tree(distill), root / "encoded")
    _rows(root)
    (root / "keep").mkdir()
    (root / "keep" / "thesis.txt").write_text("years of work")
    (root / "loop").symlink_to("loop")
    (root / "dangling").symlink_to("nothing")
    (root / "rows.csv").write_text("file_name,text\nin.png,a red circle\n")


def _recipe(kind: str) -> dict:
    tree = stage_tree(Path("."), Path("log"), kind)
    tree |= {"init_from": "./teacher", "encoders": "./encoders", "batch_size": 2, "micro_batch_size": 1}
    if kind == "distill":
        tree |= {"objective": tree["objective"] | {"teacher": "./teacher"}}
    return tree


def _write(path: Path, tree: dict) -> None:
    path.write_text(yaml.safe_dump(tree, sort_keys=False))


def _rows(root: Path) -> None:
    """Pictures named by JSON lines, and the same in a tar."""
    rows = root / "rows"
    rows.mkdir()
    (root / "tar").mkdir()
    with tarfile.open(root / "tar" / "a.tar", "w") as tar:
        for name in ("a.png", "b.png"):
            Image.new("RGB", (64, 64), (20, 160, 30)).save(rows / name)
            tar.add(rows / name, name)
            info = tarfile.TarInfo(name.replace("png", "txt"))
            info.size = 5
            tar.addfile(info, io.BytesIO(b"words"))
    lines = [{"file_name": name, "text": "a green square"} for name in ("a.png", "b.png")]
    (rows / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
