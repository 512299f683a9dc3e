"""The public names: listed, typed, with the nearest one in errors."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import longtake

PACKAGE = Path(longtake.__file__).parent


def test_every_public_name_is_there_and_listed():
    assert {"Generator", "Session", "Video", "open_dataset", "ConfigError"} <= set(longtake.__all__)
    assert set(dir(longtake)) - {name for name in dir(longtake) if name.startswith("__")} == set(longtake.__all__)
    assert "__version__" in dir(longtake)


def test_type_checkers_see_the_same_names_from_the_same_homes():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (branch,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname: node.module for node in branch.body for alias in node.names}
    assert seen == longtake._HOMES and (PACKAGE / "py.typed").is_file()


def test_a_misspelt_name_brings_the_nearest():
    with pytest.raises(AttributeError, match="no attribute 'Generater'; did you mean Generator"):
        longtake.Generater  # noqa: B018
    with pytest.raises(AttributeError, match="did you mean open_dataset"):
        longtake.open_data_set  # noqa: B018
    with pytest.raises(ImportError):
        exec("from longtake import Nothing")


def test_listing_the_names_loads_nothing():
    program = "import longtake, sys; dir(longtake); assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, cwd=PACKAGE.parent)
