"""Rules of a student from a configuration to its weights and back: levels by block, context by the last step."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from tiny_stage import save_student, stage_config, state_of
from typer.testing import CliRunner

from longtake import Generator
from longtake.checkpoint.invariants import compare_facts, invariants
from longtake.cli.app import app
from longtake.config.generation import GenerationConfig, changes_of, generation_settings
from longtake.errors import CheckpointError, ConfigError
from longtake.inference.export import export
from longtake.inference.sampling import student_latents
from longtake.inference.source import Source
from longtake.parallel.mesh import Mesh
from longtake.run_folder import MANIFEST, latest_checkpoint
from longtake.toy.world import sample_world
from longtake.train.networks import Builder
from longtake.train.stage import run_stage

# Blocks [1, 2, 2] of 5 latents: the first generated block has three levels, the second one two
RULES = {
    "plan": {"block_frames": 2, "window_frames": 5, "sink_frames": 1, "context": "last_step"},
    "flow": {"steps": [1.0, 0.7, 0.4], "later_steps": [1.0, 0.5], "shift": 3.0},
}
PICTURE = sample_world(3, 0).render(1)[0]


def config_of(workshop, logdir, stage, **changes):
    if stage == "causal":
        changes = {"error_recycling": {"share": 1.0, "from_step": 0}} | changes
    if stage == "long":
        changes = {"num_chunks": [2]} | changes
    return stage_config(workshop, logdir, stage, **{**RULES, "max_steps": 4, "save_every": 2, **changes})


@pytest.mark.whole
@pytest.mark.parametrize("stage", ["causal", "distill", "long"])
def test_a_stage_trains_resumes_bit_for_bit_and_its_student_streams_by_the_same_rules(workshop, tmp_path, stage):
    whole = config_of(workshop, tmp_path / "whole", stage)
    run_stage(whole, Mesh())
    resumed = config_of(workshop, tmp_path / "resumed", stage)
    run_stage(resumed.model_copy(update={"max_steps": 3}), Mesh())
    shutil.rmtree(latest_checkpoint(resumed.folder / "checkpoints"))  # of step 3: a killed run goes on from step 2
    run_stage(resumed, Mesh())
    one, two = state_of(whole), state_of(resumed)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    generator = Generator.from_run(whole.folder, device="cpu")
    assert generator.plan == whole.stream_plan and generator.plan.later_sigmas == (1.0, pytest.approx(0.75))
    streamed = np.concatenate(list(generator.stream(PICTURE, "a red circle drifts to the right", num_frames=33)))
    condition, first = generator.condition(generator.prepare(PICTURE), "a red circle drifts to the right")
    latents = student_latents(
        generator.denoiser, condition, first, whole.stream_plan, 9, generator.latent_size, seed=0, videos=[0]
    )
    pixels = generator.encoders.vae.decode(latents)[0].permute(0, 2, 3, 1).add(1).mul(127.5).round().clamp(0, 255)
    assert np.abs(streamed.astype(int) - pixels.numpy().astype(int)).max() <= 1 and streamed.std() > 0
    plan = {**RULES["plan"], "context": "pass"}
    with pytest.raises(CheckpointError, match="trained with.*plan="):
        run_stage(config_of(workshop, tmp_path / "whole", stage, plan=plan), Mesh())


def test_rules_go_along_with_exported_weights_and_options_win(workshop, tmp_path):
    config = config_of(workshop, tmp_path / "log", "causal", max_steps=1)
    run_stage(config, Mesh())
    export(config.folder, tmp_path / "out")
    found = Generator.from_model(tmp_path / "out", "cpu", encoders=workshop / "encoders")
    assert found.plan == config.stream_plan
    words = changes_of("plan.context=pass", "later_steps=null", "plan.recache=none")
    changed = Source.of_model(tmp_path / "out", workshop / "encoders", changes=words).settings.stream_plan
    assert (changed.context, changed.later_sigmas, changed.recache) == ("pass", None, "none")


def test_levels_may_be_given_as_they_are():
    words = ["warp_steps=false", "steps=[0.99938,0.9375,0.8333,0.625]", "later_steps=[0.99938,0.8333]"]
    plan = generation_settings(None, changes_of(*words)).stream_plan
    assert plan.sigmas == (0.99938, 0.9375, 0.8333, 0.625) and plan.later_sigmas == (0.99938, 0.8333)
    warped = generation_settings(None, changes_of("later_steps=[1,0.5]")).stream_plan
    assert warped.sigmas[1:] == pytest.approx((15 / 16, 5 / 6, 5 / 8)) and warped.later_sigmas[1] == pytest.approx(
        5 / 6
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan.context=append"], "plan.context: got 'append'; must be 'pass' or 'last_step'"),
        (["plan.recache=recompute"], "plan.recache: got 'recompute'"),
        (["plan.context=last_step", "steps=[1]"], "one noise level that is noise alone"),
        (["plan.context=last_step", "later_steps=[1]"], "one noise level that is noise alone"),
        (["plan.recache=last_window"], "last_window.*keep_sink"),
        (["plan.context_sigma=1.0"], "plan.context_sigma"),
        (["steps=[1,0.5]", "later_steps=[1,0.7,0.5]"], "no more than that"),
        (["later_steps=[0.5]"], "later_steps=.* must descend strictly from 1"),
        (["later_steps=[1000,500]"], "later_steps=.*divide them by 1000"),
        (["later_steps=[]"], "later_steps"),
    ],
)
def test_wrong_rules_are_named(words, message):
    with pytest.raises(ConfigError, match=message):
        generation_settings(None, changes_of(*words))


def test_files_of_earlier_versions_mean_what_those_did(workshop, tmp_path):
    """A student's rules, and what a run must keep."""
    new = ("context", "context_from", "context_sigma", "recache")
    tree = yaml.safe_load(yaml.safe_dump(GenerationConfig().model_dump()))
    older = {key: value for key, value in tree.items() if key not in ("later_steps", "warp_steps")}
    older["plan"] = {key: value for key, value in tree["plan"].items() if key not in new}
    assert GenerationConfig.from_tree(older) == GenerationConfig()
    config = stage_config(workshop, tmp_path, "distill")
    manifest = {**invariants(config), "config": config.model_dump()}
    del manifest["later_steps"], manifest["warp_steps"]
    manifest["plan"] = {key: value for key, value in manifest["plan"].items() if key not in new}
    assert compare_facts(manifest, invariants(config), tmp_path) == []
    for key, other in (
        ("plan", {"context": "last_step"}),
        ("flow", {"later_steps": [1.0]}),
        ("flow", {"warp_steps": False}),
    ):
        changed = config.model_copy(update={key: getattr(config, key).model_copy(update=other)})
        with pytest.raises(CheckpointError, match="plan" if key == "plan" else next(iter(other))):
            compare_facts(manifest, invariants(changed), tmp_path)


def test_a_stage_goes_on_from_a_student_of_an_earlier_version(workshop, tmp_path):
    """Whose manifest has fewer rules: what it does not name, that version did as the defaults do."""
    save_student(stage_config(workshop, tmp_path, "causal"))
    file = latest_checkpoint(tmp_path / "causal" / "checkpoints") / MANIFEST
    manifest = json.loads(file.read_text())
    for name in ("later_steps", "warp_steps"):
        del manifest[name]
    for name in ("context", "context_from", "context_sigma", "recache", "keep_sink"):
        del manifest["plan"][name]
    file.write_text(json.dumps(manifest))
    Builder(stage_config(workshop, tmp_path, "distill", init_from="causal"), Mesh()).check_start()
    plan = {"block_frames": 2, "window_frames": 5, "sink_frames": 1, "keep_sink": True}
    with pytest.raises(ConfigError, match="plan=.* is not that of init_from=causal"):
        Builder(stage_config(workshop, tmp_path, "distill", init_from="causal", plan=plan), Mesh()).check_start()


@pytest.mark.parametrize("begins", ["a teacher's run", "a teacher's rules", "toy"])
def test_scores_in_context_refuse_weights_that_say_they_are_bidirectional(workshop, tmp_path, begins):
    def starts(teacher, **scores):
        changes = {"teacher": str(teacher), "num_chunks": [2], "context_scores": {"history_frames": 2} | scores}
        return Builder(stage_config(workshop, tmp_path, "long", **changes), Mesh()).check_start()

    folder = shutil.copytree(workshop / "teacher", tmp_path / "weights")
    # Nothing lies beside these. Tensors of a teacher and of a student have the same names and shapes, and either may
    # have been trained from the other: whoever trained them alone knows.
    starts(folder)
    for stage in ("teacher", "causal"):
        save_student(stage_config(workshop, tmp_path, stage))
    starts("causal")
    (folder / "generation.yaml").write_text("sampler: stream\n")
    starts(folder)
    (folder / "generation.yaml").write_text("{sampler: whole, steps: [1.0, 0.5]}\n")
    wrong = {"a teacher's run": "teacher", "a teacher's rules": folder, "toy": "toy"}[begins]
    with pytest.raises(ConfigError, match=f"objective.teacher={wrong} are bidirectional weights, .*history_frames=0"):
        starts(wrong)
    starts(wrong, history_frames=0)


@pytest.mark.parametrize(
    ("recipe", "context", "levels"), [("2step", "pass", 2), ("2step", "last_step", 2), ("1step", "pass", 1)]
)
def test_the_recipes_of_fewer_steps_train_and_stream(workshop, tmp_path, recipe, context, levels):
    """After a causal stage of the same context, from the command line, at tiny size."""
    plan = {**RULES["plan"], "context": context}
    flow = {"steps": [1, 0.75, 0.5, 0.25], "later_steps": [1, 0.5] if context == "last_step" else None, "shift": 5.0}
    save_student(stage_config(workshop, tmp_path / "run", "causal", plan=plan, flow=flow))
    words = [f"plan.{key}={value}" for key, value in plan.items()]
    words += [
        f"logdir={tmp_path / 'run'}",
        f"encoders={workshop / 'encoders'}",
        f"data.path={workshop / 'data/images'}",
    ]
    words += [f"objective.teacher={workshop / 'teacher'}", "model.preset=toy", "video.num_latent_frames=5"]
    words += ["batch_size=2", "micro_batch_size=2", "max_steps=1", "validate_every=0", "data.num_workers=0"]
    result = CliRunner().invoke(app, ["train", f"toy/distill_{recipe}", *words])
    assert result.exit_code == 0, result.output
    generator = Generator.from_run(tmp_path / "run" / f"distill_{recipe}", device="cpu")
    assert [len(generator.plan.with_given(1).levels(start)) for start in (1, 3, 5)] == [4, levels, levels]
    session = generator.open(PICTURE, "a red circle drifts to the right")
    assert [len(session.next()) for _ in range(3)] == [1, 8, 8]
    if recipe == "1step":
        refused = CliRunner().invoke(app, ["train", "toy/distill_1step", *words, "plan.context=last_step"])
        assert refused.exit_code == 2 and "noise alone" in refused.output
