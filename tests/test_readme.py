"""What README and docs say exists: commands, options, paths, keys, links, names; the list of files is complete."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from longtake.cli import app as cli
from longtake.config.base import describe
from longtake.config.job import JobConfig, load_config
from longtake.config.stage import StageConfig

ROOT = Path(__file__).parent.parent
READMES = (ROOT / "README.md", ROOT / "README.zh-CN.md")
README = READMES[0].read_text()
PATHS_OF_MODULES = ("design.md", "glossary.md")  # docs that name modules without longtake/
DOCS = {
    path.name: path.read_text() for path in [*READMES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
}


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


OF_OTHERS = ("source", "hf", "tail")  # programs that are not ours
COMMANDS = [line for block in fenced("bash") for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def inline(text: str) -> list[str]:
    """What stands between backticks, outside of fenced blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


# ---- commands ---------------------------------------------------------------------------------------------------------
def check_command(line: str) -> None:
    """The command exists and takes these options; a training command's configuration is valid."""
    words = shlex.split(line, comments=True)
    if words[0] in OF_OTHERS:
        return
    if words[0] == "torchrun":
        words = words[words.index("--") + 1 :]
    if words[0] == "bash":
        script = ROOT / words[1]
        shown = subprocess.run(["bash", str(script), "--help"], capture_output=True, text=True, timeout=30, check=True)
        assert all(word in shown.stdout for word in words[2:] if word.startswith("--"))
        return
    assert words.pop(0).removeprefix(".venv/bin/") == "longtake"
    command = typer.main.get_command(cli.app).commands[words[0]]
    context = command.make_context(words[0], words[1:])
    if words[0] in ("train", "encode"):
        with contextlib.chdir(ROOT):  # a file of a clone, or the name of a recipe
            load_config(context.params["config"], context.params["overrides"] or [])


@pytest.mark.parametrize("line", COMMANDS)
def test_command_of_the_readme_parses(line):
    check_command(line)


def test_the_two_commands_and_all_others_are_shown():
    assert any(line.startswith("bash scripts/train_i2v_local.sh") for line in COMMANDS)
    assert "`bash scripts/test.sh`" in README
    named = " ".join(DOCS.values())
    for name in typer.main.get_command(cli.app).commands:
        assert f"longtake {name}" in named, f"no document shows `longtake {name}`"


@pytest.mark.parametrize("name", sorted(DOCS.keys() - {"log.md"}))  # whose commands are those of their commits
def test_commands_inside_the_text_parse(name):
    text = re.sub(r"(?<=\S)\n(?=\S)", " ", DOCS[name])  # a command may be wrapped
    for command in inline(text):
        if (
            re.match(r"(\.venv/bin/)?longtake (train|encode|generate|evaluate|world|config) ", command)
            and re.search(r"\b(FILE|NAME)\b", command) is None
        ):
            check_command(command)


# ---- paths and keys ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(DOCS))
def test_named_paths_exist(name):
    folders = ("configs", "docs", "scripts", "tests", "longtake")
    inside = {path.name for path in (ROOT / "longtake").iterdir() if path.is_dir()}
    for text in inline(DOCS[name]):
        word = text.split()[-1] if text.startswith("bash ") else text
        if re.fullmatch(r"[\w./-]+", word) is None:
            continue
        if word.split("/")[0] in folders and "/" in word:
            assert (ROOT / word).exists(), word
        elif word.split("/")[0] in inside and (word.endswith(".py") or word.endswith("/")) and name in PATHS_OF_MODULES:
            assert (ROOT / "longtake" / word).exists(), word


@pytest.mark.parametrize("name", sorted(DOCS))
def test_named_keys_exist(name):
    known = {key for model in (StageConfig, JobConfig) for key, *_ in describe(model)}
    groups = {key.split(".")[0] for key in known if "." in key} - {"stages", "evaluation"}
    files = (".py", ".md", ".sh", ".txt", ".yaml", ".png", ".mp4", ".json", ".jsonl")
    for text in inline(DOCS[name]):
        key = text.split(":")[0].split("=")[0]
        if re.fullmatch(r"[a-z_]+(\.[a-z0-9_]+)+", key) and key.split(".")[0] in groups and not key.endswith(files):
            assert key in known, f"{name}: `{text}` names a key that does not exist"


def test_the_table_of_recipes_is_what_the_files_say():
    shown = subprocess.run(
        [sys.executable, ROOT / "scripts/recipe_table.py"], capture_output=True, text=True, check=True
    )
    assert shown.stdout in DOCS["recipes.md"], "python scripts/recipe_table.py prints another one"
    rows = shown.stdout.splitlines()[2:]
    assert (
        len(rows) == len(list((ROOT / "configs").rglob("[!_]*.yaml"))) and len({row.count(" | ") for row in rows}) == 1
    )


# ---- the file tree ----------------------------------------------------------------------------------------------------
def tree() -> dict[str, str]:
    """Path and description of each line of docs/files.md."""
    block = DOCS["files.md"].split("```")[1]
    lines = {}
    for line in block.strip("\n").splitlines():
        name, _, text = line.strip().partition(" ")
        lines[("longtake/" if line.startswith("  ") else "") + name] = text.strip()
    return lines


def test_file_tree_names_real_files_and_every_module():
    named = tree()
    for path, text in named.items():
        assert (ROOT / path).exists(), path
        assert text or path == "longtake/", f"{path} has no description"
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "longtake").rglob("*.py")}
    packages = {path for path in modules if path.endswith("__init__.py") and path != "longtake/__init__.py"}
    assert modules - packages - set(named) == set()
    others = [*(ROOT / "docs").glob("*.md"), *(ROOT / "scripts").glob("*.sh")]
    assert {path.relative_to(ROOT).as_posix() for path in others} <= set(named)


# ---- links, log, glossary ---------------------------------------------------------------------------------------------
def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a text."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def test_links_inside_the_docs_hold():
    for path in [*READMES, *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]*(?:#[^)\s]*)?)\)", path.read_text()):
            name, _, anchor = target.partition("#")
            if "://" in name:
                continue
            file = path.parent / name if name else path
            assert file.exists(), f"{path}: {target}"
            assert not anchor or anchor in anchors(file.read_text()), f"{path}: {target}"


def test_log_is_questions_with_answer_table_command_and_records():
    entries = DOCS["log.md"].split("\n## ")[1:]
    dates = [entry[:10] for entry in entries]
    assert dates == sorted(dates, reverse=True), "newest first"
    for entry in entries:
        heading, answer, table, command = entry.strip().split("\n\n")
        assert re.fullmatch(r"20\d\d-\d\d-\d\d: .*\?", heading), heading
        assert not answer.startswith("|") and all(line.startswith("|") for line in table.splitlines()), heading
        assert "`" in command and "](log/" in command, heading


def test_glossary_names_what_the_package_has():
    """Names of keys, classes and functions in its last two columns; so a renaming reaches it."""
    source = "\n".join(path.read_text() for path in (ROOT / "longtake").rglob("*.py"))
    for row in re.findall(r"^\| (?!ours|-)(.*) \|$", DOCS["glossary.md"], re.M):
        for name in inline(" ".join(row.split(" | ")[2:])):
            for word in [] if "/" in name else re.findall(r"\w+", name):
                assert re.search(rf"\b{word}\b", source), f"`{name}`: the package has no {word}"


# ---- snippets ---------------------------------------------------------------------------------------------------------
def test_the_snippet_runs_as_it_stands(monkeypatch):
    """With the packaged student: its names are public, and shapes are what its comments say."""
    monkeypatch.chdir(ROOT)
    (snippet,) = fenced("python")
    assert len([line for line in snippet.splitlines() if line]) == 6
    scope: dict = {}
    exec(compile(snippet, "README", "exec"), scope)
    first, frames, generator = scope["first"], scope["frames"], scope["generator"]
    assert first.shape == (1, 64, 64, 3) and frames.shape == (16, 64, 64, 3) and frames.dtype == first.dtype == "uint8"
    assert scope["session"].prompt == re.findall(r'"(a [^"]*)"', snippet)[1] and generator.settings.fps == 16


def test_snippet_of_the_network_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    section = DOCS["extending.md"].split("## The network alone")[1]
    scope: dict = {}
    exec(compile(re.search(r"^```python\n(.*?)^```", section, re.M | re.S)[1], "extending.md", "exec"), scope)
    assert scope["velocity"].shape == (1, 5, 16, 8, 8)


# ---- house rules for prose --------------------------------------------------------------------------------------------
def test_results_have_their_place():
    rows = [line.split("|")[1].strip() for line in README.splitlines() if line.startswith("| ")]
    assert {"teacher, causal", "causal", "distill"} <= set(rows) and "<!--" not in README
    rows = [line.split("|")[1].strip() for line in DOCS["toy.md"].splitlines() if line.startswith("| ")]
    assert {"truth", "teacher", "teacher, causal", "causal", "distill"} <= set(rows)


def parts(readme: str) -> dict[str, list[str]]:
    """What both languages must share: blocks of code, levels of headings, links, code in the text, and numbers."""
    text = re.sub(r"^```.*?^```", "", readme, flags=re.M | re.S)
    return {
        "blocks": re.findall(r"^```.*?^```", readme, re.M | re.S),
        "headings": re.findall(r"^(#+) ", text, re.M),
        "tables": [line.count("|") for line in text.splitlines() if line.startswith("|")],
        "links": sorted(set(re.findall(r"\]\(([^)]*)\)", text)) - {"README.md", "README.zh-CN.md"}),
        "references": re.findall(r"^\[\d\]: .*", text, re.M),
        "code": sorted(re.findall(r"`([^`\n]+)`", text)),
        "numbers": sorted(re.findall(r"\d+(?:[.,:-]\d+)*(?:e-\d+)?", re.sub(r"`[^`\n]+`", "", text))),
    }


def test_both_languages_say_the_same():
    english, chinese = (parts(path.read_text()) for path in READMES)
    for part, wanted in english.items():
        assert wanted and chinese[part] == wanted, part
    row = re.compile(r"^\| (?:teacher, causal|causal|distill) \|.*", re.M)
    rows = [row.findall(path.read_text()) for path in READMES]
    assert rows[0] == rows[1] and len(rows[0]) == 3
    assert max(len(path.read_text().splitlines()) for path in READMES) <= 150


def test_the_picture_of_the_readme_is_small_and_half_a_minute():
    from PIL import Image

    path = ROOT / "docs/figures/stream.gif"
    with Image.open(path) as film:
        seconds = 0.0
        for number in range(film.n_frames):
            film.seek(number)
            seconds += film.info["duration"] / 1000
        assert film.width <= 800 and seconds == pytest.approx(30, abs=0.5)
    assert path.stat().st_size < 3.1e6 and "docs/figures/stream.gif" in README


def test_licence_is_the_declared_one():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text()
