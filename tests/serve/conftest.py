"""One generator for all tests of the server; a server and a client for each."""

import pytest
from live_server import LiveClient, serving
from tiny_sessions import make_generator


@pytest.fixture(scope="session")
def generator():
    return make_generator(history_blocks=6)


@pytest.fixture
def address(generator, tmp_path):
    with serving(generator, tmp_path / "live", max_sessions=4) as address:
        yield address


@pytest.fixture
def client(address):
    return LiveClient(address)
