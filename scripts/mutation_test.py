"""Mutation testing: small faults in what computes, each of which some fast test must notice.

python scripts/mutation_test.py --work DIR            # 300 mutants; goes on where it was stopped; lists what survived
python scripts/mutation_test.py --work DIR --again    # runs those that survived once more, with the tests of today

`--budget SECONDS` leaves out the slower tests of a mutant, for a first view. DIR lies outside the repository and gets
`map.json` (which test runs which line, and for how long) and `results.jsonl`. One process has imported the libraries
and forks a child for each mutant, which imports the mutated package and runs the tests that reach the line, quickest
first. A mutant with which a test takes far longer than without counts as killed. Text, annotations and decorators are
not mutated. Mutants are known by the mutated text of their file.
"""

from __future__ import annotations

import argparse
import ast
import copy
import difflib
import hashlib
import importlib.util
import inspect
import json
import math
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.machinery import SourceFileLoader
from itertools import accumulate
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ["longtake/objectives", "longtake/flow", "longtake/rollout", "longtake/models/cache.py"]
TESTS = ["tests/objectives", "tests/flow", "tests/rollout", "tests/inference/test_session.py"]
TESTS += [f"tests/models/test_{name}.py" for name in ("cache", "streaming", "recompute")]
LIBRARIES = ["torch", "torch._dynamo", "pytest", "hypothesis", "pydantic", "yaml", "av", "diffusers", "transformers"]
LEAST_PER_FILE = 10
# What may stand in the place of an operator, by the names of `ast`.
SWAPS = (
    "Lt:LtE,GtE LtE:Lt,Gt Gt:GtE,LtE GtE:Gt,Lt Eq:NotEq NotEq:Eq Is:IsNot IsNot:Is In:NotIn NotIn:In And:Or Or:And "
    "Add:Sub Sub:Add Mult:Div Div:Mult FloorDiv:Mult Mod:FloorDiv Pow:Mult LShift:RShift RShift:LShift BitAnd:BitOr"
)
OTHERS = dict(swap.split(":") for swap in SWAPS.split())


@dataclass(frozen=True)
class Mutant:
    """One fault: the `text` that its file has then; it can show in the lines `span` of its statement."""

    file: str
    line: int
    change: str
    span: tuple[int, int]
    text: str

    def row(self) -> dict[str, Any]:
        """Name and description in the results."""
        before = (ROOT / self.file).read_text().splitlines()
        diff = list(difflib.unified_diff(before, self.text.splitlines(), lineterm="", n=0))[2:]
        key = hashlib.sha256(f"{self.file}\n{self.text}".encode()).hexdigest()[:16]
        return {"key": key, "file": self.file, "line": self.line, "change": self.change, "diff": diff}


def _others(op: ast.AST) -> list[ast.AST]:
    return [getattr(ast, name)() for name in OTHERS.get(type(op).__name__, "").split(",") if name]


def _altered(node: Any, **changes: Any) -> tuple[Any, str]:
    other = copy.copy(node)
    vars(other).update(changes)
    return node, ast.unparse(other) if isinstance(node, ast.stmt) else f"({ast.unparse(other)})"


def faults(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """(part of the tree, its new source) for each fault of this node alone."""
    match node:
        case ast.Compare(ops=ops):
            for k, op in enumerate(ops):
                yield from (_altered(node, ops=[*ops[:k], other, *ops[k + 1 :]]) for other in _others(op))
        case ast.BinOp(op=op) | ast.AugAssign(op=op) | ast.BoolOp(op=op):
            yield from (_altered(node, op=other) for other in _others(op))
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node, f"({ast.unparse(node.operand)})"
        case ast.Constant(value=bool(value)):
            yield node, str(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield from (_altered(node, value=value + change) for change in (1, -1))
        case ast.Return(value=ast.expr()):
            yield node, "return None"
        case ast.Expr(value=ast.Call()) | ast.Raise() | ast.Break() | ast.Continue():
            yield node, "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript(), *_]):
            yield node, "pass"
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            if isinstance(test, ast.Name | ast.Attribute | ast.Call):
                yield test, f"(not {ast.unparse(test)})"


def mutants(file: str, source: str) -> list[Mutant]:
    """All faults of a file, in order."""
    lines = [line.encode() for line in source.splitlines(keepends=True)]  # columns count bytes
    found: list[Mutant] = []

    def visit(node: Any, span: tuple[int, int]) -> None:
        if isinstance(node, ast.stmt) and not isinstance(node, ast.ClassDef):
            span = node.lineno, node.end_lineno or node.lineno
            if isinstance(node, ast.If | ast.While | ast.For | ast.With):
                span = node.lineno, node.body[0].lineno - 1
        for part, text in faults(node):
            assert isinstance(part, ast.stmt | ast.expr) and part.end_lineno and part.end_col_offset
            head = b"".join(lines[: part.lineno - 1]) + lines[part.lineno - 1][: part.col_offset]
            tail = lines[part.end_lineno - 1][part.end_col_offset :] + b"".join(lines[part.end_lineno :])
            change = f"{' '.join(ast.unparse(part).split())} -> {text}"
            found.append(Mutant(file, part.lineno, change, span, (head + text.encode() + tail).decode()))
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns", "decorator_list"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr):
                        visit(child, span)

    visit(ast.parse(source), (0, 0))
    return found


def python_files(places: list[str], pattern: str) -> list[Path]:
    """The files that are named, and those of the folders that are."""
    return [file for p in places for file in ([ROOT / p] if p.endswith(".py") else sorted((ROOT / p).glob(pattern)))]


def sample(count: int, seed: int) -> list[Mutant]:
    """A seeded choice of `count` faults: at least ten of each file, or all that it has, the rest anywhere."""
    chooser = random.Random(seed)
    chosen, rest = [], []
    order = [str(path.relative_to(ROOT)) for path in python_files(TARGETS, "*.py")]
    for file in order:
        found = mutants(file, (ROOT / file).read_text())
        chooser.shuffle(found)
        chosen += found[:LEAST_PER_FILE]
        rest += found[LEAST_PER_FILE:]
    chosen += chooser.sample(rest, min(len(rest), max(0, count - len(chosen))))
    return sorted(chosen, key=lambda mutant: (order.index(mutant.file), mutant.line))


class Watch:
    """A pytest plugin that sees of each test the seconds and the lines of the targets that it runs, and what failed.

    `known`, instead, what was seen before: no lines then, and an end to the process in a test that takes far longer.
    """

    def __init__(self, known: dict[str, dict[str, Any]] | None = None) -> None:
        self.known = known
        self.failed: list[str] = []
        self.tests: dict[str, dict[str, Any]] = {}
        self._targets = tuple(str(ROOT / target) for target in TARGETS)

    def trace(self, frame: Any, event: str, _: Any) -> Any:
        name, flags = frame.f_code.co_filename, frame.f_code.co_flags
        if not (name.startswith(self._targets) and flags & inspect.CO_OPTIMIZED):
            return None  # not ours, or run at import
        self._lines.setdefault(os.path.relpath(name, ROOT), set()).add(frame.f_lineno)
        return self.trace

    def pytest_runtest_setup(self, item: Any) -> None:
        self._lines: dict[str, set[int]] = {}
        if self.known is None:
            sys.settrace(self.trace)
        else:  # seconds of the processor
            signal.setitimer(signal.ITIMER_PROF, 10 + 5 * self.known[item.nodeid]["seconds"])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "teardown" and self.known is None:
            sys.settrace(None)
        self.failed += [report.nodeid] if report.failed else []
        test = self.tests.setdefault(report.nodeid, {"seconds": 0.0})
        test["seconds"] += report.duration
        test["lines"] = {file: sorted(lines) for file, lines in self._lines.items()}


class Mutated(SourceFileLoader):
    """Loads the text of a mutant; as a finder, its module alone."""

    def __init__(self, mutant: Mutant) -> None:
        super().__init__(mutant.file.removesuffix(".py").replace("/", "."), str(ROOT / mutant.file))
        self.text = mutant.text

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, fullname: str) -> Any:
        return compile(self.text, self.path, "exec", dont_inherit=True)


def run_tests(work: Path, arguments: list[str], watch: Watch) -> dict[str, Any]:
    """pytest in this process, with its words in a file: what the plugin saw."""
    import pytest

    log = os.open(work / "last.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    options = ["-p", "no:cacheprovider", "-m", "not slow and not gpu", f"--basetemp={work / 'tmp'}"]
    code = int(pytest.main([*options, *arguments], [watch]))
    return {"code": code, "failed": watch.failed, "tests": watch.tests}


def in_child(work: Path, body: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """What `body()` returns in a forked process; None when that died or took too long."""
    answer = work / "answer.json"
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        try:
            signal.setitimer(signal.ITIMER_PROF, 300)
            signal.alarm(3000)  # for those that wait
            resource.setrlimit(resource.RLIMIT_AS, (1 << 33, 1 << 33))
            answer.write_text(json.dumps(body()))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return json.loads(answer.read_text()) if answer.exists() else None


def test_map(work: Path) -> dict[str, dict[str, Any]]:
    """Seconds and lines of each fast test; a file of tests is run again when it or the package has changed."""
    path = work / "map.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    package = "".join(file.read_text() for file in sorted((ROOT / "longtake").rglob("*.py")))
    tests: dict[str, dict[str, Any]] = {}
    for file in python_files(TESTS, "test_*.py"):
        name, watch = str(file.relative_to(ROOT)), Watch()
        digest = hashlib.sha256((package + file.read_text()).encode()).hexdigest()
        if name not in known or known[name]["digest"] != digest:
            found = in_child(work, partial(run_tests, work, [name], watch))
            if found is None:
                sys.exit(f"{name} did not end: see {work / 'last.txt'}")
            print(f"{name}: {len(found['tests'])} tests, left out since they fail: {found['failed']}", flush=True)
            kept = {test: each for test, each in found["tests"].items() if test not in found["failed"]}
            known[name] = {"digest": digest, "tests": kept}
            path.write_text(json.dumps(known))
        tests |= known[name]["tests"]
    return tests


def judge(mutant: Mutant, work: Path, tests: dict[str, dict[str, Any]], budget: float) -> dict[str, Any]:
    """Runs the tests that reach the mutant's statement, or its file where the statement runs at import: its result."""
    lines, begin = set(range(mutant.span[0], mutant.span[1] + 1)), time.time()
    reach = {name: test["lines"].get(mutant.file, []) for name, test in tests.items()}
    near = [name for name in tests if lines.intersection(reach[name])] or [name for name in tests if reach[name]]
    chosen = sorted(near or tests, key=lambda name: tests[name]["seconds"])
    spent = accumulate(tests[name]["seconds"] for name in chosen)
    chosen = [name for name, seconds in zip(chosen, spent) if seconds <= budget]

    def body() -> dict[str, Any]:
        sys.meta_path.insert(0, Mutated(mutant))  # type: ignore[arg-type]
        return run_tests(work, ["-x", *chosen], Watch(tests))

    found = in_child(work, body) or {"code": "died", "failed": ["time"]}
    status = "survived" if found["code"] == 0 else "killed"
    took = {"status": status, "by": found["failed"], "tests": len(chosen), "seconds": time.time() - begin}
    return {**mutant.row(), **took}


def main() -> int:
    """Runs what is still to be run and lists what survived; exit code 1 when there is such a mutant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--budget", type=float, default=math.inf)
    options = parser.parse_args()
    work = options.work.resolve()
    if work.is_relative_to(ROOT):
        parser.error(f"--work {work} lies inside the repository; give a folder outside it")
    work.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(ROOT))
    os.chdir(ROOT)
    for library in LIBRARIES:
        importlib.import_module(library)
    tests, results = test_map(work), work / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    known, done = {row["key"]: row for row in rows}, []
    chosen = sample(options.count, options.seed)
    for number, mutant in enumerate(chosen):
        row = known.get(mutant.row()["key"])
        if row is None or (options.again and row["status"] == "survived"):
            row = judge(mutant, work, tests, options.budget)
            with open(results, "a") as file:
                file.write(json.dumps(row) + "\n")
            place = f"{row['file']}:{row['line']}  {row['change']}"
            print(f"{number + 1}/{len(chosen)} {row['status']} {row['seconds']:.1f} s  {place}", flush=True)
        done.append(row)
    survivors = [row for row in done if row["status"] == "survived"]
    for row in survivors:
        print("", f"{row['file']}:{row['line']}", *row["diff"][1:], sep="\n")
    print(f"\nseed {options.seed}: {len(done)} mutants, {len(survivors)} survived")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
