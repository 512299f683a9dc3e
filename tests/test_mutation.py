"""The faults that scripts/mutation_test.py puts into a file."""

import importlib.util
import sys
from pathlib import Path

SOURCE = '''
def add(a: int = 3, *, flag: "1 + 1" = False) -> "a < 2":
    """a + 1 < 2"""
    if a < 2 and not flag:
        raise ValueError(f"{a + 1} is 1")
    return a - 1
'''


def test_each_fault_is_one_change_that_compiles(monkeypatch):
    path = Path(__file__).parent.parent / "scripts" / "mutation_test.py"
    spec = importlib.util.spec_from_file_location("mutation_test", path)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mutation_test", script)
    spec.loader.exec_module(script)
    found = script.mutants("add.py", SOURCE)
    lines = SOURCE.splitlines()
    changed = {}
    for mutant in found:
        compile(mutant.text, "add.py", "exec")
        (line,) = [k for k, (old, new) in enumerate(zip(lines, mutant.text.splitlines(), strict=True)) if old != new]
        assert line + 1 == mutant.line and mutant.span[0] <= mutant.line <= mutant.span[1]
        changed.setdefault(mutant.line, []).append(mutant.change.split(" -> ")[1])
    assert changed == {
        2: ["True", "(4)", "(2)"],
        4: ["(a < 2 or not flag)", "(a <= 2)", "(a >= 2)", "(3)", "(1)", "(flag)"],
        5: ["pass"],
        6: ["return None", "(a + 1)", "(2)", "(0)"],
    }
