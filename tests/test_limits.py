"""No folder of tests is passed over. A test that does not end is named, with all stacks, and the run ends with a failure."""

import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

HANGS = """
import ctypes, threading
import pytest

@pytest.fixture
def stuck():
    yield
    deadlock()

def deadlock():
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)

@pytest.mark.timeout(6)
@pytest.mark.parametrize("where", ["python", "fine", "swallowed", "c", "teardown"])
def test_hangs(where, request):
    waits = threading.Event()
    threading.Thread(target=waits.wait, name="other", daemon=True).start()
    if where == "python":
        waits.wait()
    if where == "swallowed":
        try:
            waits.wait()
        except BaseException:
            waits.wait()
    if where == "c":
        deadlock()
    if where == "teardown":
        request.getfixturevalue("stuck")
        raise ValueError
"""


def test_no_folder_is_passed_over(pytestconfig):
    """As pytest of itself does with any that is called `dist`, whose tests then run by name alone."""
    folders = {path.parent for path in Path(__file__).parent.rglob("test_*.py")}
    never = pytestconfig.getini("norecursedirs")
    assert not [folder for folder in folders for pattern in never if fnmatch(folder.name, pattern)]


def test_no_two_files_have_one_name():
    """pytest imports them by it, and takes none of the second."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["python", "swallowed", "c", "teardown"])
def test_a_test_that_hangs_ends_the_run_with_its_name_and_stacks(where, tmp_path):
    """On two processes as in scripts/test.sh; what pytest-timeout reaches leaves the rest of the file to run."""
    tests = Path(__file__).parent
    (tmp_path / "conftest.py").write_text((tests / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\ntimeout = 60\nmarkers = slow: none\n")
    (tmp_path / "test_hangs.py").write_text(HANGS)
    words = ["-n", "2", "--dist", "loadfile", "--max-worker-restart", "0", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, "-k", f"{where} or fine"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    assert f"test_hangs[{where}]" in said and "threading.py" in said and "gateway_base.py" in said, said
    if where == "python":
        assert "1 failed, 1 passed" in said and "Stack of other" in said, said
