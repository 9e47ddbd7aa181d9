"""What schemathesis draws from our OpenAPI schema: no 5xx, no hang, errors in the API's form."""

from collections import Counter
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from expertlane.server.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from server.running import PATIENCE_S

ERROR = {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def described(served):
    return schemathesis.openapi.from_url(f"{served.server.url}/openapi.json")


def check(case):
    """The answer comes, and is none of a broken server; gives its status."""
    if isinstance(case.body, dict):  # what runs to the end of its context is for other tests
        case.body.setdefault("timeout_s", 2)
    answer = case.call(timeout=PATIENCE_S)
    status = answer.status_code
    error = answer.json()["error"] if status >= 400 else None
    assert status < 500 or (status == 504 and error["code"] == "timeout"), answer.text
    assert error is None or (error.keys() == ERROR and error["message"])
    return status


def draw(described, num_examples):
    """Draw for every route, valid requests and invalid ones; gives how often each status came."""
    found = Counter()
    for result in described.get_all_operations():
        operation = result.ok()
        for mode in GenerationMode if operation.body else [GenerationMode.POSITIVE]:

            @settings(
                max_examples=num_examples,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def answer(case):
                found[check(case)] += 1

            answer()
    return found


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_many_requests(described):
    found = draw(described, 230)
    print(found)
    assert found.total() >= 2000
    assert {200, 400} <= found.keys()


@pytest.mark.parametrize(
    "model",
    [CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest],
)
def test_the_page_has_every_field(model):
    page = (Path(__file__).parents[2] / "docs/http_api.md").read_text()
    assert [name for name in model.model_fields if f"`{name}`" not in page] == []
