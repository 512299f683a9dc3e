"""One generator for all tests of the server, one server for each file of them, and a session for each test."""

import pytest
from live_server import LiveClient, serving
from tiny_sessions import make_generator

from longtake.serve.settings import Limits


@pytest.fixture(scope="session")
def generator():
    return make_generator(history_blocks=6)


@pytest.fixture(scope="module")
def live_folder(tmp_path_factory):
    """Where the server of the file keeps its sessions."""
    return tmp_path_factory.mktemp("live")


@pytest.fixture(scope="module")
def address(generator, live_folder):
    """That of a server with room for a session or two of each test."""
    with serving(generator, live_folder, max_sessions=64, limits=Limits(creates_per_minute=1000)) as address:
        yield address


@pytest.fixture
def client(address):
    client = LiveClient(address)
    yield client
    if client.name:
        client.request("DELETE")
