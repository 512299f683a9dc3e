"""The import direction of the package, its lazy heavy imports, and who may know the process group or the environment."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "longtake"
FILES = sorted(PACKAGE.rglob("*.py"))

BASE = {
    "errors",
    "json_text",
    "plan",
    "condition",
    "config",
    "rng",
    "run_folder",
    "devices",
    "outputs",
    "progress",
    "processes",
    "lock",
}
BELOW_ROLLOUT = BASE | {"flow", "models", "weights", "encoders", "data", "toy"}
INFERENCE = BELOW_ROLLOUT | {"rollout", "inference"}
TRAINING = INFERENCE | {"objectives", "parallel", "encodings", "checkpoint", "train"}
# What each part of the package may import; a part may always import itself.
ALLOWED = {
    **dict.fromkeys(BASE, BASE),
    "client": BASE,
    "flow": BASE,
    "data": BASE,
    "toy": BASE | {"data"},
    **dict.fromkeys(("models", "weights", "encoders"), BELOW_ROLLOUT),
    "parallel": BASE | {"models", "weights", "rollout"},  # whose captured graphs hold the group that is left
    "rollout": BELOW_ROLLOUT,
    "objectives": BELOW_ROLLOUT | {"rollout"},
    "inference": INFERENCE,
    "evaluation": INFERENCE | {"parallel", "encodings"},
    "serve": INFERENCE,
    **dict.fromkeys(("encodings", "checkpoint"), TRAINING),
    "train": TRAINING | {"evaluation"},
    "doctor": TRAINING | {"evaluation"},  # it runs a training without data
    "bench": TRAINING | {"doctor", "evaluation"},  # nobody imports it
}
ENTRANCES = {"__init__", "__main__", "cli"}  # they import what they start, each lazily

HEAVY = {"diffusers", "transformers", "peft", "gradio", "av", "lmdb", "matplotlib", "wandb", "tensorboard"}
TORCH_FREE = BASE - {"rng"} | ENTRANCES | {"objectives"}  # whose files hold groups of keys
PROCESS_GROUP = ("parallel/", "train/", "checkpoint/", "data/loader.py", "evaluation/run.py", "doctor/estimate.py")
ENVIRONMENT = ("cli/app.py", "parallel/mesh.py")


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, *, top_level: bool = False) -> Iterator[str]:
    """Dotted names of all imports outside `if TYPE_CHECKING`; with `top_level`, only those made on import."""

    def walk(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if top_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    yield from walk(ast.parse(path.read_text()))


def own_parts(path: Path) -> set[str]:
    names = [name.split(".") for name in imports(path) if name.split(".")[0] == "longtake"]
    return {name[1] for name in names if len(name) > 1}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_import_direction(path):
    if part(path) in ENTRANCES:
        return
    allowed = ALLOWED[part(path)] | {part(path)}
    assert own_parts(path) <= allowed, f"{relative(path)} imports {sorted(own_parts(path) - allowed)}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_heavy_imports_are_lazy(path):
    loaded = {name.split(".")[0] for name in imports(path, top_level=True)}
    assert not loaded & HEAVY
    if part(path) in TORCH_FREE and relative(path) != "objectives/batch.py":
        assert "torch" not in loaded


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_process_group_and_environment_have_their_places(path):
    if not relative(path).startswith(PROCESS_GROUP):
        assert not any(name.startswith("torch.distributed") for name in imports(path))
        assert "torch.distributed" not in path.read_text()
    if relative(path) not in ENVIRONMENT:
        assert "environ" not in path.read_text() and "getenv" not in path.read_text()


def test_torchvision_is_never_imported():
    assert not any(name.split(".")[0] == "torchvision" for path in FILES for name in imports(path))


def test_the_rules_see_a_wrong_import(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "tests.test_imports.PACKAGE" if __name__.startswith("tests.") else f"{__name__}.PACKAGE", tmp_path
    )
    (tmp_path / "flow").mkdir()
    bad = tmp_path / "flow" / "x.py"
    bad.write_text("import lmdb\ndef f():\n    from longtake.train.loop import train\n")
    with pytest.raises(AssertionError, match="imports \\['train'\\]"):
        test_import_direction(bad)
    with pytest.raises(AssertionError):
        test_heavy_imports_are_lazy(bad)


def test_helpers_of_several_test_folders_lie_above_them():
    """pytest finds a helper in a test's own folder and in `tests/`, in another one only if that was collected before."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    home = {path.stem: path.parent for path in files}
    for path in files:
        found = {name.split(".")[0] for name in imports(path)} & home.keys()
        strangers = [name for name in found if home[name] not in (path.parent, Path(__file__).parent)]
        assert not strangers, f"{path} imports {strangers}; move them to tests/"


def test_every_public_name_is_there():
    import longtake

    assert {"open_dataset", "read_lora", "VideoWriter", "DataError"} <= set(longtake.__all__) <= set(dir(longtake))
    for name in longtake.__all__:
        assert getattr(longtake, name).__name__ == name


def test_no_circle_of_imports():
    """Lazy and type-only imports count: whoever reads one file of a circle must read all of it."""
    names = {".".join(["longtake", *path.relative_to(PACKAGE).with_suffix("").parts]): path for path in FILES}
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    needs = {}
    for name, path in names.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        needs[name] = {other for other in found & names.keys() if other not in (name, "longtake")}
    while free := {name for name, wanted in needs.items() if not wanted & needs.keys()}:
        needs = {name: wanted for name, wanted in needs.items() if name not in free}
    assert not needs, f"these import each other in a circle, or need those that do: {sorted(needs)}"


def test_few_functions_take_the_whole_configuration_of_a_stage():
    """Who needs three values takes three values: then it can be called, tested and read without all the others."""
    found = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if any("StageConfig" in ast.unparse(one.annotation) for one in given if one.annotation):
                    found.append(f"{relative(path)}: {node.name}")
    assert 0 < len(found) < 20, found


@pytest.mark.whole
def test_who_asks_an_objective_does_not_ask_for_its_kind():
    """What depends on the kind is a question that the objective answers (`ObjectiveConfig`)."""
    kinds = ("flow_matching", "teacher_forcing", "dmd", "long_tuning")
    classes = ("FlowMatching", "TeacherForcing", "Dmd", "LongTuning")
    found = []
    for path in FILES:
        if part(path) in ("objectives", "config"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.unparse(node) if isinstance(node, ast.Compare | ast.Call) else ""
            compared = isinstance(node, ast.Compare) and any(repr(kind) in text for kind in kinds)
            asked = text.startswith("isinstance(") and any(name in text for name in classes)
            found += [f"{relative(path)}: {text}"] * (compared or asked)
    assert len(found) < 10, found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_functions_and_files_are_short(path):
    text = path.read_text()
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > 60} == {}
    assert len(text.splitlines()) <= 450
