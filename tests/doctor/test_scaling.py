"""docs/scaling.md agrees with the models that it shows."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "scaling.md").read_text()


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "scripts" / "scaling_tables.py"))


def test_every_command_has_its_table(script):
    commands = re.findall(r"^longtake doctor (.*) --table(.*)$", TEXT, re.M)
    assert len(commands) == len(script["_COMMANDS"].findall(TEXT)) == 5
    assert script["_CONSTANTS"].search(TEXT) is not None
    for name in ("i2v_1_3b/distill", "i2v_14b/distill_1_3b", "i2v_14b/distill", "i2v_1_3b/teacher_forcing"):
        assert any(f"configs/wan/{name}.yaml" in command for command, _ in commands)
    rows = [line for line in TEXT.splitlines() if re.match(r"\| \d+ \| \d+ x \d+ ", line)]
    assert [int(row.split("|")[1]) for row in rows] == [1, 2, 4, 8, 64, 256, 1024] * 5


@pytest.mark.parametrize("number", [0, 4])
def test_a_table_agrees_with_the_models(script, number):
    found = script["_COMMANDS"].findall(TEXT)[number]
    assert script["table"](f"{found[1]} {found[2]}") in TEXT, "run python scripts/scaling_tables.py"


@pytest.mark.slow
def test_the_whole_document_agrees(script):
    assert script["renewed"](TEXT) == TEXT, "run python scripts/scaling_tables.py"


def test_a_changed_number_is_seen(script):
    changed = TEXT.replace("| products |", "| product |").replace("782000000000000", "1").replace("7.82e+14", "1")
    assert changed != TEXT
    match = script["_CONSTANTS"].search(changed)
    assert script["rates_of"]().markdown() not in match[0] and script["rates_of"]().markdown() in TEXT
