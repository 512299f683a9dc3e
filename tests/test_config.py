"""Configuration: precedence, errors that name key, value and rule, and every cross-field rule."""

from pathlib import Path

import pytest
import yaml

from longtake.config.base import describe
from longtake.config.groups import OptimConfig
from longtake.config.job import JobConfig, load_config
from longtake.config.stage import TOY_ASSETS, StageConfig, dump, resolve_source
from longtake.errors import ConfigError
from longtake.objectives.dmd_keys import CriticConfig

STAGE = {
    "objective": {"kind": "teacher_forcing"},
    "name": "causal",
    "logdir": "out",
    "init_from": "toy",
    "max_steps": 10,
    "data": {"path": "d"},
}
DISTILL = STAGE | {"objective": {"kind": "dmd", "teacher": "toy"}, "name": "distill", "init_from": "causal"}


def write(folder, tree, name="c.yaml"):
    path = folder / name
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return path


@pytest.fixture
def job(tmp_path):
    write(tmp_path, STAGE, "causal.yaml")
    write(tmp_path, DISTILL, "distill.yaml")
    return write(tmp_path, {"logdir": "run", "stages": {"causal": "causal.yaml", "distill": "distill.yaml"}})


def stage(tmp_path, *overrides, base=STAGE):
    config = load_config(write(tmp_path, base), list(overrides))
    assert isinstance(config, StageConfig)
    return config


def test_command_line_wins_over_yaml_wins_over_default(tmp_path):
    file = STAGE | {"batch_size": 16, "optim": {"lr": 3e-4}}
    assert stage(tmp_path, base=STAGE).batch_size == StageConfig.model_fields["batch_size"].default
    assert stage(tmp_path, base=file).batch_size == 16
    config = stage(tmp_path, "batch_size=32", "optim.beta1=0.5", base=file)
    assert (config.batch_size, config.optim.lr, config.optim.beta1) == (32, 3e-4, 0.5)


def test_override_values_are_yaml(tmp_path):
    config = stage(
        tmp_path, "optim.lr=1e-4", "flow.steps=[1, 0.5]", "plan.window_frames=null", "ema.enabled=false", "name=x"
    )
    assert config.optim.lr == 1e-4 and config.flow.steps == [1.0, 0.5] and config.plan.window_frames is None
    assert config.ema.enabled is False and config.name == "x"


def test_yaml_reads_numbers_as_written(tmp_path):
    text = yaml.safe_dump(STAGE) + "optim: {lr: 1e-4, eps: 1E-9}\n"
    config = load_config(write(tmp_path, text))
    assert (config.optim.lr, config.optim.eps) == (1e-4, 1e-9)


def test_dump_reads_back_equal(tmp_path, job):
    for config in (stage(tmp_path), stage(tmp_path, base=DISTILL), load_config(job)):
        assert load_config(write(tmp_path, dump(config), "resolved.yaml")) == config
        assert type(config).from_tree(yaml.safe_load(dump(config))) == config


def test_config_is_frozen(tmp_path):
    with pytest.raises(ValueError, match="frozen"):
        stage(tmp_path).batch_size = 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("btach_size=3", r"unknown key btach_size; did you mean batch_size"),
        ("optim.lrr=3", r"unknown key optim.lrr; did you mean optim.lr"),
        ("window_frames=3", r"unknown key window_frames; did you mean plan.window_frames"),
        ("lr=3", r"unknown key lr; did you mean lora or objective.critic.lr or optim.lr"),
        ("denoising_step_list=[1000]", r"unknown key denoising_step_list; here it is flow.steps"),
        ("num_frame_per_block=3", r"here it is plan.block_frames"),
        ("zzz=3", r"unknown key zzz; the keys of the top level are name, logdir"),
        ("optim.lr=-1", r"optim.lr: got -1; must be greater than 0"),
        ("optim.lr=fast", r"optim.lr: got 'fast'; must be a valid number"),
        ("batch_size=true", r"batch_size: got True; must be a valid integer"),
        ("batch_size='8'", r"batch_size: got '8'; must be a valid integer"),
        ("ema.enabled=1", r"ema.enabled: got 1; must be a valid boolean"),
        ("rope=fancy", r"rope: got 'fancy'; must be 'relative' or 'absolute'"),
        ("optim=3", r"optim: got 3"),
        ("optim.lr.x=3", r"optim.lr: got {'x': 3}; must be a valid number"),
        ("batch_size.x=3", r"override batch_size.x|batch_size: got"),
        ("name=../x", r"name: got '../x'"),
        ("max_steps=null", r"max_steps: got None; must be a valid integer"),
        ("batch_size", r"must have the form key=value"),
        ("=3", r"must have the form key=value"),
        ("optim.lr=[1", r"not valid YAML"),
    ],
)
def test_wrong_values_name_key_value_and_rule(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        stage(tmp_path, override)


def test_all_mistakes_are_listed_at_once(tmp_path):
    with pytest.raises(ConfigError) as error:
        stage(tmp_path, "optim.lr=-1", "seed=x", "zzz=1")
    assert len(str(error.value).splitlines()) == 3


def test_missing_keys_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"max_steps: missing"):
        stage(tmp_path, base={k: v for k, v in STAGE.items() if k != "max_steps"})


def test_python_construction_raises_the_same_error():
    with pytest.raises(ConfigError, match="lr: got -1; must be greater than 0"):
        OptimConfig(lr=-1)
    with pytest.raises(ConfigError, match=r"data.path: missing"):
        StageConfig(**(STAGE | {"data": {}}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1", "must be a mapping"),
        ("", "must be a mapping"),
        ("logdir: x", "neither `objective:`"),
        ("name: causal\nname: distill", "'name' is written twice"),
        ("stages: []", "stages must map"),
        ("stages: {data: x.yaml}", "cannot be called data"),
        ("stages: {a: gone.yaml}", "gone.yaml is not a file"),
        ("stages: {a: 3}\nlogdir: x", "stages.a: got 3"),
    ],
)
def test_wrong_files_are_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))
    with pytest.raises(ConfigError, match="is not a file"):
        load_config(tmp_path / "gone.yaml")


def test_c_frames_that_do_not_fit_the_block_plan_are_refused_when_the_config_is_read(tmp_path):
    with pytest.raises(ConfigError, match=r"video.num_latent_frames=8 does not fit .*set it to 5 or 9"):
        stage(tmp_path, "video.num_latent_frames=8")
    with pytest.raises(ConfigError, match=r"validation.num_latent_frames=10 does not fit .*set it to 9 or 13"):
        stage(tmp_path, "validation.num_latent_frames=10")
    assert stage(tmp_path, "video.num_latent_frames=13").video.num_pixel_frames == 49


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["plan.window_frames=8"], r"plan: window_frames=8 .*set window_frames to 5 or 9"),
        (["plan.sink_frames=3"], r"plan: sink_frames=3 must be 0 or a block boundary; set it to 1 or 5"),
        (["video.height=60"], r"video: height=60 must be a positive multiple of 16; set it to 48 or 64"),
        (["plan.first_frames=4", "plan.sink_frames=0", "plan.window_frames=8"], r"plan.first_frames=4 must be 1"),
        (["video.num_latent_frames=1"], r"leaves nothing to generate.*set it to 5"),
        (["flow.steps=[1000, 500]"], r"divide them by 1000"),
        (["flow.steps=[1, 0.5, 0]"], r"must be above 0"),
        (["flow.steps=[0.9, 0.5]"], r"must descend strictly from 1"),
        (["flow.steps=[1, 0.5, 0.5]"], r"must descend strictly from 1"),
        (["flow.steps=[]"], r"flow.steps: got \[\]"),
        (["batch_size=6"], r"batch_size=6 must be a multiple of micro_batch_size=4; set batch_size to 4 or 8"),
        (["batch_size=2"], r"set batch_size to 4, or"),
        (["init_from=null"], r"init_from=null: teacher_forcing needs trained weights"),
        (["init_from=causal"], r"init_from=causal is the stage itself"),
        (["name=toy"], r"name=toy is taken"),
        (
            ["objective.teacher=toy"],
            r"unknown key objective.teacher; it belongs to objective.kind=ode_regression and dmd",
        ),
        (["objective.critic.lr=1e-5"], r"unknown key objective.critic; it belongs to objective.kind=dmd and long_"),
        (["objective.kind=dnd"], r"objective: kind=dnd is not known; give flow_matching, .*, or MODULE:CLASS"),
        (["objective.kind=no.such:Thing"], r"objective: kind=no.such:Thing cannot be imported .*PYTHONPATH"),
        (["objective.kind=longtake.plan:StreamPlan"], r"must be a subclass of ObjectiveConfig"),
        (["objective={}"], r"objective: kind: missing; it says what is trained: flow_matching, "),
        (["objective=dmd"], r"objective: got 'dmd'"),
        (["objective.kind=dmd"], r"objective.teacher: missing; this key has no default"),
        (["data.kind=images"], r"has no motion to learn from"),
        (["data.kind=csv"], r"data.kind: 'csv' is no data format; give auto or one of encoded, .*clips"),
        (["wandb.enabled=true"], r"wandb: enabled=true needs project"),
    ],
)
def test_combinations_are_checked_when_the_config_is_read(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        stage(tmp_path, *overrides)


def test_dmd_has_a_critic_and_says_what_it_does_not_read(tmp_path):
    assert stage(tmp_path, base=DISTILL).objective.critic == CriticConfig()
    assert stage(tmp_path, "objective.critic.lr=1e-6", base=DISTILL).objective.critic.lr == 1e-6
    for changes, message in (
        (["objective.teacher=distill"], "objective.teacher=distill is the stage itself"),
        (["objective.caption_dropout=0.1"], "caption_dropout; it belongs to objective.kind=flow_matching and teacher"),
        (["objective.error_recycling.share=0.1"], "error_recycling; it belongs to objective.kind=teacher_forcing"),
        (["objective.num_chunks=[2]"], "unknown key objective.num_chunks; it belongs to objective.kind=long_tuning"),
        (["objective.critc.lr=1"], "unknown key objective.critc; did you mean objective.critic"),
        (["objective.critic.lrr=1"], "unknown key objective.critic.lrr; did you mean objective.critic.lr"),
        (["objective.sigma_min=0.99"], r"objective: sigma_min=0.99 must be below"),
    ):
        with pytest.raises(ConfigError, match=message):
            stage(tmp_path, *changes, base=DISTILL)
    with pytest.raises(ConfigError, match="data_loss; it belongs to objective.kind=dmd and long_tuning"):
        stage(tmp_path, "objective.data_loss.weight=0.5")
    with pytest.raises(
        ConfigError, match="error_recycling.from_step=4 must be below the 4 flow.steps; set it to 3 or less"
    ):
        stage(tmp_path, "objective.error_recycling.share=0.5", "objective.error_recycling.from_step=4")
    assert stage(tmp_path, "flow.steps=[1.0]", base=DISTILL).flow.steps == [1.0]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        (
            "stage=causal",
            "objective.kind (teacher = flow_matching, causal = teacher_forcing, distill = dmd, long = long_",
        ),
        ("teacher=toy", "objective.teacher"),
        ("critic.lr=1e-5", "objective.critic"),
        ("objective.critic.head_start=3", "objective.critic.critic_warmup_steps"),
        ("real_videos.weight=1", "objective.data_loss"),
        ("own_history.share=1", "objective.error_recycling"),
        ("caption_dropout=0.1", "objective.caption_dropout"),
        ("roles=shared", "objective.shared_base (shared = true)"),
        ("long.num_chunks=[3]", "objective: num_chunks, new_frames and switch_frames are keys of kind long_tuning"),
        ("flow.guidance=2", "objective.guidance"),
        ("flow.sigma_min=0.1", "objective.sigma_min"),
        ("parallel.join_exits=true", "automatic: remove the key"),
        ("parallel.cpu_offload=true", "gone: remove the key"),
        ("optim.moments=int8", "gone: remove the key"),
        (
            "parallel.weights=whole",
            "parallel.data_parallel (sharded = fsdp, or hsdp with replicate above 1; whole = ddp)",
        ),
    ],
)
def test_keys_of_earlier_versions_are_refused_with_their_new_names(tmp_path, override, named):
    with pytest.raises(ConfigError) as error:
        stage(tmp_path, override, base=DISTILL)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"unknown key {override.split('=')[0].removesuffix('.lr').removesuffix('.weight')}"[:16])
    assert f"; here it is {named}" in line


def test_a_recipe_of_an_earlier_version_is_refused_with_the_new_name_of_its_kind(tmp_path):
    old = {key: value for key, value in STAGE.items() if key != "objective"} | {"stage": "causal"}
    with pytest.raises(ConfigError, match="unknown key stage; here it is objective.kind .teacher = flow_matching"):
        stage(tmp_path, base=old)


def test_real_videos_are_read_as_clips_of_their_own_length(tmp_path):
    plain = stage(tmp_path, base=DISTILL)
    assert not plain.objective.learns_from_videos and plain.clip_shape == plain.video
    changes = ["objective.data_loss.weight=1", "data.kind=clips"]
    same = stage(tmp_path, *changes, base=DISTILL)
    assert same.objective.learns_from_videos and same.clip_shape == same.video
    longer = stage(tmp_path, *changes, "objective.data_loss.num_latent_frames=13", base=DISTILL)
    assert (longer.clip_shape.num_latent_frames, longer.video.num_latent_frames) == (13, 9)
    with pytest.raises(ConfigError, match="data_loss.num_latent_frames=13 has no effect while data_loss.weight=0"):
        stage(tmp_path, "objective.data_loss.num_latent_frames=13", base=DISTILL)
    with pytest.raises(ConfigError, match="data_loss.num_latent_frames=1 leaves nothing to learn"):
        stage(tmp_path, *changes, "objective.data_loss.num_latent_frames=1", base=DISTILL)
    with pytest.raises(ConfigError, match="data_loss.num_latent_frames=12 .* block"):
        stage(tmp_path, *changes, "objective.data_loss.num_latent_frames=12", base=DISTILL)
    with pytest.raises(ConfigError, match=r"data.kind=images has no motion .*\(dmd\)"):
        stage(tmp_path, "objective.data_loss.weight=1", "data.kind=images", base=DISTILL)


def test_a_student_is_gathered_once_unless_operators_are_counted(tmp_path):
    """Selective recomputation after a gathered roll-out: torch met operators of FSDP that the forward had not."""
    assert stage(tmp_path, base=DISTILL).gathers_once
    assert not stage(tmp_path, "activation_checkpointing=selective", base=DISTILL).gathers_once
    alone = ("activation_checkpointing=selective", "parallel.fused_shards=true")
    assert stage(tmp_path, *alone, base=DISTILL).gathers_once  # of which only those that are kept are counted


@pytest.mark.parametrize(
    "other, told",
    [
        (
            "data_parallel=ddp",
            "fused_shards=true has no effect with data_parallel=ddp, where weights are whole; remove",
        ),
        ("compile=true", "fused_shards=true compiles functions of blocks, and compile=true whole blocks; set one of"),
    ],
)
def test_fused_shards_go_with_shards_whose_blocks_are_not_compiled(tmp_path, other, told):
    assert not stage(tmp_path, f"parallel.{other}").parallel.fused_shards
    with pytest.raises(ConfigError, match=told):
        stage(tmp_path, f"parallel.{other}", "parallel.fused_shards=true")


def test_the_anchor_needs_clips_of_the_videos_length(tmp_path):
    option = "objective.anchor.weight=0.5"
    config = stage(tmp_path, option, "data.kind=clips", base=DISTILL)
    assert config.objective.learns_from_videos and config.clip_shape == config.video
    longer = ["data.kind=clips", "objective.data_loss.weight=1", "objective.data_loss.num_latent_frames=13"]
    assert stage(tmp_path, option, *longer, base=DISTILL).clip_shape.num_latent_frames == 13
    with pytest.raises(ConfigError, match="data_loss.num_latent_frames=5 must be at least video.num_latent_frames=9"):
        stage(tmp_path, option, *longer[:2], "objective.data_loss.num_latent_frames=5", base=DISTILL)
    with pytest.raises(ConfigError, match="data.kind=images has no motion to learn from"):
        stage(tmp_path, option, "data.kind=images", base=DISTILL)


def test_scores_in_context_need_frames_that_the_window_keeps(tmp_path):
    base = DISTILL | {"objective": {"kind": "long_tuning", "teacher": "toy"}, "name": "long"}
    key = "objective.context_scores.history_frames"
    config = stage(tmp_path, f"{key}=8", "objective.anchor.weight=1", "data.kind=clips", base=base)
    assert config.reference is None and stage(tmp_path, base=base).reference == "toy"
    for changes, message in (
        ([f"{key}=6"], f"{key}=6 must be a multiple of plan.block_frames=4; set 4"),
        ([f"{key}=12"], f"{key}=12 must be at most the 8 that the window keeps beside the sink; set it to 8"),
        (
            [f"{key}=4", "plan.sink_frames=0", "plan.window_frames=8"],
            f"{key}=4 shows the first frames .* set that to 1",
        ),
        (["objective.context_scores.sigma=0.25"], f"sigma=0.25 has no effect while {key}=0"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            stage(tmp_path, *changes, base=base)
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "alone", "shared"),
    [
        ([], True, True),
        (["activation_checkpointing=none"], False, True),
        (["activation_checkpointing=full"], True, True),
        (["activation_checkpointing=selective"], False, False),
        (["activation_checkpointing=full", "lora.rank=4"], False, True),
    ],
)
def test_where_exit_steps_are_joined(tmp_path, changes, alone, shared):
    config = stage(tmp_path, *changes, base=DISTILL)
    assert [config.batches_exit_backward(whole=True, sequence=n) for n in (1, 2)] == [alone, shared]
    assert not any(config.batches_exit_backward(whole=False, sequence=n) for n in (1, 2))
    assert config.without_a_gpu().batches_exit_backward(whole=True, sequence=1) == (alone and bool(changes))


def test_a_new_teacher_starts_from_random_weights(tmp_path):
    assert stage(tmp_path, "objective.kind=flow_matching", "init_from=null").init_from is None


def test_t2v_may_have_any_first_block(tmp_path):
    frames = ["plan.first_frames=4", "plan.sink_frames=0", "plan.window_frames=8", "video.num_latent_frames=8"]
    assert stage(tmp_path, "model.image_condition=t2v", *frames).plan.num_blocks(8) == 2
    with pytest.raises(
        ConfigError,
        match="widen=true adds y, the condition of i2v; set image_condition=i2v and first_frame_sigma=clip, or",
    ):
        stage(tmp_path, "model.image_condition=t2v", "model.widen=true", *frames)


def test_accumulation_follows_the_ranks(tmp_path):
    config = stage(tmp_path)
    assert (config.accumulation(1), config.accumulation(2)) == (2, 1)
    assert (config.micro_batch(2), config.micro_batch(4), config.accumulation(4)) == (4, 2, 1)  # a rank's whole share
    with pytest.raises(ConfigError, match=r"multiple of 3 ranks = 3; set batch_size to 6 or 9"):
        config.accumulation(3)


def test_weight_sources(tmp_path):
    config = stage(tmp_path)
    assert config.source("toy") == TOY_ASSETS / "teacher"
    assert config.source("causal").as_posix() == "out/causal"
    assert config.source("./causal") == Path("causal").absolute()  # a dot: never a name of the hub
    assert resolve_source("/a/b", "out").as_posix() == "/a/b"
    assert config.folder.as_posix() == "out/causal"


def test_logdir_stands_in_data_path(tmp_path):
    config = stage(tmp_path, "data.path='{logdir}/data/clips'", "logdir=/tmp/y")
    assert config.data.path == "/tmp/y/data/clips"


def test_a_job_reads_its_stages_and_routes_overrides(job):
    config = load_config(job, ["causal.optim.lr=1e-6", "distill.max_steps=7", "evaluation.num_worlds=4", "logdir=q"])
    assert isinstance(config, JobConfig) and list(config.stages) == ["causal", "distill"]
    assert config.stages["causal"].optim.lr == 1e-6 and config.stages["distill"].optim.lr == OptimConfig().lr
    assert config.stages["distill"].max_steps == 7 and config.evaluation.num_worlds == 4
    assert {stage.logdir for stage in config.stages.values()} == {"q"} and config.data_folder.as_posix() == "q/data"
    assert load_config(job, ["stages.distill.max_steps=7"]).stages["distill"].max_steps == 7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("causal.optim.lr=-1", r"stages.causal.optim.lr: got -1"),
        ("distill.max_step=3", r"unknown key stages.distill.max_step; did you mean stages.distill.max_steps"),
        ("distill.window_frames=3", r"did you mean stages.distill.plan.window_frames"),
        ("distill.init_from=causl", r"stages.distill: init_from=causl is no earlier stage of this job \(causal\)"),
        (
            "causal.init_from=distill",
            r"stages.causal: init_from=distill is no earlier stage of this job \(there is none",
        ),
        ("distill.logdir=other", r"logdir=other must be that of the job"),
        ("distill.name=other", r"name=other must be the key"),
        ("evaluation.seed=0", r"would not be held out"),
        ("distill.validation.seed=0", r"would not be held out"),
        ("distil.max_steps=3", r"unknown key distil"),
    ],
)
def test_rules_of_a_job(job, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(job, [override])


def test_a_job_writes_clips_that_are_long_enough(job):
    with pytest.raises(ConfigError, match=r"needs clips of 49 frames .* set data.num_frames=49"):
        load_config(job, ["causal.data.path='{logdir}/data/clips'", "causal.video.num_latent_frames=13"])


def test_every_key_is_described():
    rows = [*describe(StageConfig), *describe(JobConfig)]
    assert all(description.strip() for _, _, _, description in rows)
    assert len({key for key, *_ in describe(StageConfig)}) == len(list(describe(StageConfig)))


# ---- data ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.buckets=[[64, 64]]", "data.buckets: got .* at least 2"),
        ("data.buckets=[[64, 64], [64]]", "data.buckets=.* must be pairs .height, width."),
        ("data.buckets=[[64, 64], [60, 64]]", "data.buckets=.*height=60 must be a positive multiple of 16"),
        ("data.buckets=[[64, 64], [128, 128]]", "data.buckets=.* has two of one aspect"),
        ("data.buckets=[[32, 64], [64, 32]]", r"data.buckets=.* must hold \[video.height, video.width\]=\[64, 64\]"),
        ("data.kind=texts", "data.kind=texts has no motion to learn from.*teacher_forcing.*; use clips"),
        ("data.kind=images", "data.kind=images has no motion to learn from.*teacher_forcing.*; use clips"),
    ],
)
def test_data_that_cannot_train_the_stage_is_refused(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        stage(tmp_path, override)


def test_prompts_alone_are_for_text_to_video(tmp_path):
    with pytest.raises(ConfigError, match="data.kind=texts has no pictures for model.image_condition=i2v"):
        stage(tmp_path, "data.kind=texts", base=DISTILL)
    assert stage(tmp_path, "data.kind=texts", "model.image_condition=t2v", base=DISTILL).data.kind == "texts"
    assert stage(tmp_path, "data.buckets=[[64, 64], [48, 80]]").data.buckets == [[64, 64], [48, 80]]
