"""docs/design.md: its pictures are those of the code, and each folder has one short section that says what it must."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "design.md").read_text()
SECTIONS = dict(re.findall(r"^### `(\w+)/`\n(.*?)(?=^##)", PAGE, re.M | re.S))


@pytest.fixture(scope="module")
def draw():
    spec = importlib.util.spec_from_file_location("draw_design", ROOT / "scripts" / "draw_design.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.whole
def test_the_pictures_are_drawn_from_the_code(draw):
    for name, block in draw.drawn().items():
        assert f"<!-- drawn: {name} -->\n{block}\n<!-- end -->" in PAGE, "python scripts/draw_design.py --write"
    assert draw.page_with(draw.drawn(), PAGE) == PAGE


def test_the_pictures_follow_the_code(draw, tmp_path, monkeypatch):
    """Two folders, one of which makes what the other takes, and a third that imports both."""
    files = {
        "low/__init__.py": "",
        "low/row.py": "class Sample: ...\n\n\ndef read() -> Sample:\n    return Sample()\n",
        "middle/__init__.py": "",
        "middle/use.py": "from longtake.low.row import Sample\n\n\ndef use(rows: list[Sample]) -> None: ...\n",
        "top/__init__.py": "",
        "top/run.py": "def run():\n    from longtake.low.row import read\n    from longtake.middle.use import use\n",
        "errors.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(draw, "PACKAGE", tmp_path)
    monkeypatch.setattr(draw, "FLOW", {"Sample": "a row"})
    assert draw.flow().splitlines()[1:] == [
        '    Sample(["Sample: a row"])',
        "    low --> Sample",
        "    Sample --> middle",
    ]
    lines = [re.sub(" +", " ", line) for line in draw.layers().splitlines()]
    assert lines == ["top -> middle", "middle -> low", "low -> -", "(all) -> errors"]
    monkeypatch.setattr(draw, "FLOW", {"Gone": "a class that is not there"})
    with pytest.raises(SystemExit, match="name another class in FLOW"):
        draw.flow()


def test_each_folder_has_a_short_section():
    assert sorted(SECTIONS) == sorted(path.parent.name for path in (ROOT / "longtake").glob("*/__init__.py"))
    for name, text in SECTIONS.items():
        assert "It must" in text or "They must" in text or "nobody" in text, f"{name}: what it must not know"
        assert text.count("**Hard:**") == 1 and len(text.strip().splitlines()) <= 20, name


def test_files_that_it_names_are_in_the_folder_of_their_section():
    for name, text in SECTIONS.items():
        for file in re.findall(r"`(\w+\.py)`", text):
            assert (ROOT / "longtake" / name / file).is_file(), f"{name}: {file}"
