"""The unconditional side of distillation: the empty prompt, or the one that the recipe names."""

import pytest
import torch
from encoded_files import from_cache, rounding
from tiny_stage import stage_config

from longtake.encodings.write import encode
from longtake.errors import ConfigError, DataError
from longtake.inference.pipeline import load_encoders
from longtake.models.dit import VideoDiT
from longtake.parallel.mesh import Mesh
from longtake.train.stage import run_stage

NEGATIVE = "three red squares"


@pytest.mark.whole
@pytest.mark.parametrize("negative", ["", NEGATIVE])
def test_the_teacher_is_guided_away_from_it(workshop, tmp_path, monkeypatch, negative):
    rounding(monkeypatch)
    config = stage_config(workshop, tmp_path, "distill", negative_prompt=negative, max_steps=1)
    encode(config, tmp_path / "set", Mesh())
    wanted = load_encoders(config.encoders_folder, config.model, torch.device("cpu"), with_image=False).text.encode(
        [negative]
    )[0]
    cached = from_cache(workshop, tmp_path / "log", tmp_path / "set", "distill", negative_prompt=negative, max_steps=1)
    texts, forward = [], VideoDiT.forward

    def spy(self, x, sigma, condition, context=None):
        texts[-1].append(condition.text)
        return forward(self, x, sigma, condition, context)

    monkeypatch.setattr(VideoDiT, "forward", spy)
    for stage in (config, cached):
        texts.append([])
        run_stage(stage, Mesh())
        # Every prompt of the data is another text; the unconditional one comes once a micro-batch of the one update.
        assert sum(torch.equal(row, wanted) for text in texts[-1] for row in text) == config.batch_size
    assert len(texts[0]) == len(texts[1])


def test_a_set_serves_one_negative_prompt(workshop, tmp_path):
    config = stage_config(workshop, tmp_path, "distill", negative_prompt=NEGATIVE)
    encode(config, tmp_path / "set", Mesh())
    with pytest.raises(DataError, match=f"negative_prompt='{NEGATIVE}', wanted ''"):
        run_stage(from_cache(workshop, tmp_path / "log", tmp_path / "set", "distill"), Mesh())


def test_where_nobody_reads_it_it_is_refused(workshop, tmp_path):
    with pytest.raises(ConfigError, match="unknown key objective.negative_prompt; it belongs to objective.kind=.*dmd"):
        stage_config(workshop, tmp_path, "causal", negative_prompt=NEGATIVE)
    with pytest.raises(ConfigError, match="negative_prompt='three red squares' is read with guidance other than 1"):
        stage_config(workshop, tmp_path, "distill", negative_prompt=NEGATIVE, guidance=1.0)
