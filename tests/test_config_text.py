"""Text, numbers and paths as people type them: KEY=VALUE takes text as it stands, YAML says how to quote."""

import os

import pytest
import yaml

from longtake.config.base import parse_yaml
from longtake.config.job import load_config
from longtake.errors import ConfigError

DISTILL = {
    "objective": {"kind": "dmd", "teacher": "toy"},
    "name": "s",
    "logdir": "out",
    "init_from": "toy",
    "max_steps": 10,
}
TEXTS = [
    *("clips #2", "2024", "no", "1e5", "0x10", "1_000", "010", "2026-11-29", "a: b", "- a", "[a", "*a", "&a", "!a"),
    *("%a", "@a", "{a}/b", "é 🎈", "a ", "null", "a=b", "'a' and 'b'", '"a" b', "a\\n", "`", "|", "2026-13-45"),
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(DISTILL | {"data": {"path": "d"}}))
    return path


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_as_it_is_typed(file, text):
    config = load_config(file, [f"data.path={text}", f"objective.negative_prompt={text}", f"logdir={text}"])
    assert (config.data.path, config.objective.negative_prompt, config.logdir) == (text, text, text)


def test_quotes_spaces_and_nothing(file):
    config = load_config(
        file, ["data.path='2024'", 'objective.negative_prompt="a #b"', "logdir = out put", "lora=null"]
    )
    assert (config.data.path, config.objective.negative_prompt, config.logdir) == ("2024", "a #b", "out put")
    assert load_config(file, ["objective.negative_prompt="]).objective.negative_prompt == ""
    for nothing in ("null", "~", ""):
        assert (
            load_config(
                file, ["objective.critic.lr=1e-4", f"objective.critic.init_from={nothing}"]
            ).objective.critic.init_from
            is None
        )
    assert load_config(file, ["objective.critic.init_from='null'"]).objective.critic.init_from == "null"
    with pytest.raises(ConfigError, match="data.path: got ''"):
        load_config(file, ["data.path="])


def test_home_and_log_folder(file, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    paths = ["logdir=~/runs", "data.path={logdir}/clips #2", "init_from=~/w", "encoders=~", "objective.teacher=./~x"]
    config = load_config(file, paths)
    assert (config.logdir, config.data.path) == ("/home/me/runs", "/home/me/runs/clips #2")
    assert (config.init_from, config.encoders, config.objective.teacher) == ("/home/me/w", "/home/me", "./~x")
    file.write_text(yaml.safe_dump(DISTILL | {"data": {"path": "~/d"}}))
    assert load_config(file).data.path == "/home/me/d"
    for wrong, rule in (("~nobody-here/x", "no home folder"), ("a" * 300, "at most 255 bytes"), ("\ud800", "unicode")):
        with pytest.raises(ConfigError, match=rule):
            load_config(file, [f"data.path={wrong}"])


def test_lists_of_text_and_other_kinds(file):
    config = load_config(file, ["lora.targets=[2024, no, 'a #b']", "ema.enabled=off", "batch_size=1_000"])
    assert config.lora.targets == ["2024", "no", "a #b"] and not config.ema.enabled and config.batch_size == 1000
    assert load_config(file, ["ema.enabled=yes", "activation_checkpointing=full"]).activation_checkpointing is True
    for override in ("seed=010", "seed=1:30", "seed=2026-11-29", "seed=1e5", "ema.enabled=1", "lora.targets=ffn.0"):
        with pytest.raises(ConfigError, match="got .*; must be a valid"):
            load_config(file, [override])


@pytest.mark.parametrize("value", ["2024", "no", "1.5", "{logdir}", "[a]"])
def test_yaml_that_is_no_text_says_how_to_quote(file, value):
    file.write_text(yaml.safe_dump(DISTILL) + f"data:\n  path: {value}\n")
    with pytest.raises(ConfigError, match=r"data.path: got .* goes in quotes, e.g. path: '2024'"):
        load_config(file)
    file.write_text(yaml.safe_dump(DISTILL) + "data:\n  path: {logdir}/clips\n")
    with pytest.raises(ConfigError, match="not valid YAML.* goes in quotes"):
        load_config(file)


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e999", "1e-320"])
def test_numbers_are_finite(file, value):
    keys = [
        "optim.lr",
        "objective.guidance",
        "flow.shift",
        "optim.eps",
        "watchdog.slow_seconds",
        "objective.data_loss.weight",
    ]
    for key in keys if value != "1e-320" else ["flow.shift"]:
        with pytest.raises(ConfigError, match=f"{key}: got|must be"):
            load_config(file, [f"{key}={value}"])


@pytest.mark.parametrize(
    "text", ["9" * 5000, "[" * 3000, "? [a] : b\n? [a] : c", "a: 1\na: 2", "!!python/name:os.x", "*a"]
)
def test_damaged_yaml_is_one_message(text):
    with pytest.raises(ConfigError, match="w is not valid YAML"):
        parse_yaml(text, "w")


def test_a_file_that_may_not_be_read_is_one_message(file):
    if os.geteuid() == 0:
        pytest.skip("root reads every file")
    file.chmod(0)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(file)
