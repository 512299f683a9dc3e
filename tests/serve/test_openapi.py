"""The API as it describes itself: whatever is sent, nothing fails, and errors have their form."""

import hypothesis
import pytest
import schemathesis
from live_server import LiveClient, serving

from longtake.serve.settings import Limits


@pytest.fixture(scope="module")
def served(generator, tmp_path_factory):
    limits = Limits(creates_per_minute=100_000, queued=4)
    with serving(generator, tmp_path_factory.mktemp("api"), max_sessions=2, limits=limits) as address:
        yield address


def attack(address, examples):
    """Sends so many requests to each operation, those of a session mostly to one that is there."""
    client = LiveClient(address)
    client.open()
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    statuses = set()

    def ask(case):
        if "name" in (case.path_parameters or {}) and case.method != "DELETE":
            case.path_parameters["name"] = client.name
            case.headers = {**(case.headers or {}), "x-session-secret": client.secret}
        answer = case.call(timeout=30)
        statuses.add(answer.status_code)
        assert answer.status_code != 500 and b"Traceback" not in answer.content, (case.method, case.path, answer.text)
        if answer.status_code >= 400 and answer.headers.get("content-type") == "application/json":
            error = answer.json()["error"]
            assert set(error) == {"code", "message", "fix"}, answer.text

    for operation in schema.get_all_operations():
        strategy = operation.ok().as_strategy()
        chosen = hypothesis.settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        chosen(hypothesis.given(case=strategy)(ask))()
    honest = LiveClient(address)
    client.request("DELETE")
    return statuses, honest


@pytest.mark.whole
def test_no_request_fails(served):
    statuses, honest = attack(served, 4)
    assert {200, 404, 422} <= statuses
    assert honest.http.get("/ready").status_code == 200


@pytest.mark.slow
def test_no_request_fails_in_many(served):
    statuses, honest = attack(served, 300)
    assert honest.http.get("/ready").status_code == 200
