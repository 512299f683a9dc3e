"""Draws the two pictures of `docs/design.md` from the code: who makes and who takes what flows, and who imports whom.

    python scripts/draw_design.py             # prints them
    python scripts/draw_design.py --write     # puts them into docs/design.md

A folder makes a thing when it calls its class, and takes it when it names it as a type and does not make it.
Of what a folder imports, the second picture leaves out what the others of these import already.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, PAGE = ROOT / "longtake", ROOT / "docs" / "design.md"

# What flows, in this order: the class, and what it is in a few words.
FLOW = {
    "Sample": "a row: prompts, picture, clip",
    "Batch": "rows of one rank, by global index",
    "EncodedBatch": "text, picture, latents as tensors",
    "Condition": "what a network is told",
    "Opened": "a network without weights, and their reader",
    "VideoDiT": "a transformer",
    "Denoiser": "a transformer that streams",
    "RollOut": "what a student made of a batch",
    "LossResult": "a loss, and numbers to log",
    "TrainState": "all that resuming needs",
    "Frames": "pixels, a block at a time",
}
WATCHERS = {"doctor", "evaluation"}  # they make and take everything, to look at it


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Yields (part of the package, its syntax tree) of each file: a folder, or a file beside the folders."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name not in ("__init__.py", "__main__.py"):
            yield path.relative_to(PACKAGE).parts[0].removesuffix(".py"), ast.parse(path.read_text(encoding="utf-8"))


def folders() -> list[str]:
    """The folders of the package."""
    return sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def words(annotation: ast.expr | None) -> set[str]:
    """Names in a type."""
    return set() if annotation is None else set(re.findall(r"\w+", ast.unparse(annotation)))


def made_and_taken(tree: ast.Module) -> tuple[set[str], set[str]]:
    """Names that a file calls (`Name(...)`, `Name.build(...)`), and those in its types."""
    made, taken = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func
            while isinstance(called, ast.Attribute):
                called = called.value
            made |= {called.id} if isinstance(called, ast.Name) else set()
        elif isinstance(node, ast.FunctionDef):
            parameters = [*node.args.args, *node.args.kwonlyargs]
            taken |= set().union(*(words(parameter.annotation) for parameter in parameters), words(node.returns))
        elif isinstance(node, ast.AnnAssign):
            taken |= words(node.annotation)
    return made, taken


def flow() -> str:
    """The picture of what flows between folders, as a Mermaid flowchart."""
    makers: dict[str, set[str]] = {name: set() for name in FLOW}
    takers: dict[str, set[str]] = {name: set() for name in FLOW}
    for part, tree in sources():
        if part in WATCHERS or part not in folders():
            continue
        made, taken = made_and_taken(tree)
        for name in FLOW:
            makers[name] |= {part} if name in made else set()
            takers[name] |= {part} if name in taken else set()
    lines = ["flowchart TD"]
    for name, about in FLOW.items():
        takes = takers[name] - makers[name]
        if not makers[name] or not takes:
            raise SystemExit(f"{name} is made in {makers[name]} and taken in {takes}: name another class in FLOW")
        lines.append(f'    {name}(["{name}: {about}"])')
        lines += [f"    {part} --> {name}" for part in sorted(makers[name])]
        lines += [f"    {name} --> {part}" for part in sorted(takes)]
    return "\n".join(lines)


def imports() -> dict[str, set[str]]:
    """For each part the others that it imports, lazily or for types alone included."""
    found: dict[str, set[str]] = {}
    for part, tree in sources():
        names = (node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module)
        parts = {name.split(".")[1] for name in names if name.startswith("longtake.")}
        found[part] = found.get(part, set()) | parts - {part}
    return found


def reached(needs: dict[str, set[str]], part: str) -> set[str]:
    """All that a part imports, directly or not."""
    seen: set[str] = set()
    todo = [part]
    while todo:
        new = needs[todo.pop()] - seen
        seen |= new
        todo += new
    return seen


def layers() -> str:
    """The picture of who imports whom: a line a folder, those that know most first."""
    graph, inside = imports(), set(folders())
    needs = {part: graph[part] & inside for part in inside}
    below = {part: reached(needs, part) - {part} for part in inside}
    width = max(map(len, inside))
    lines = []
    for part in sorted(inside, key=lambda part: (-len(below[part]), part)):
        equals = {other for other in below[part] if part in below[other]}
        others = needs[part] - equals
        told: set[str] = set().union(*(below[other] for other in others))
        line = f"{part:<{width}}  ->  {' '.join(sorted(others - told)) or '-'}"
        lines.append(line + (f"   (and, in both directions, {' '.join(sorted(equals))})" if equals else ""))
    beside = " ".join(sorted(part for part in graph if part not in inside))
    return "\n".join([*lines, f"{'(all)':<{width}}  ->  {beside}"])


def drawn() -> dict[str, str]:
    """The blocks of the page, by name."""
    return {"flow": f"```mermaid\n{flow()}\n```", "layers": f"```\n{layers()}\n```"}


def page_with(blocks: dict[str, str], page: str) -> str:
    """The page with its drawn blocks replaced. Raises: ValueError when it has no place for one."""
    for name, block in blocks.items():
        head, begin, rest = page.partition(f"<!-- drawn: {name} -->\n")
        _, end, tail = rest.partition("<!-- end -->")
        if not begin or not end:
            raise ValueError(f"{PAGE} has no place for the picture {name}")
        page = f"{head}{begin}{block}\n{end}{tail}"
    return page


def main() -> None:
    """Prints or writes the pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put them into docs/design.md")
    if parser.parse_args().write:
        PAGE.write_text(page_with(drawn(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(drawn().values()))  # noqa: T201


if __name__ == "__main__":
    main()
