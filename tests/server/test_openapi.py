"""The published description, and schemathesis on it: no 500, no answer that it does not tell of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, strategies
from schemathesis import Case
from schemathesis.checks import CheckFunction, not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from edge_runtime.server.app import ROUTES, create_app
from edge_runtime.server.openapi import description
from tests.server.served import FakeModel, running

CHECKS: list[CheckFunction] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


UNTOLD = {"/openapi.json", "/", "/ui/{file}"}
"""The description itself, and what is for people."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    model = FakeModel()
    with running(create_app(model, max_new_tokens=8)) as address:
        yield address
    model.engine.close()


OPERATIONS = [each.ok() for each in schemathesis.openapi.from_dict(description()).get_all_operations()]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
@hypothesis.settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@hypothesis.given(data=strategies.data())
def test_nothing_undocumented_comes_back(operation: Any, url: str, data: Any) -> None:
    case: Case = data.draw(operation.as_strategy())
    if isinstance(case.body, dict) and data.draw(strategies.booleans()):  # else all would be 404
        case.body["model"] = "fake"
    case.validate_response(case.call(base_url=url, timeout=60), checks=CHECKS)


def test_every_route_is_described(url: str) -> None:
    told = httpx.get(f"{url}/openapi.json").json()
    assert told == description()
    paths = {route.path.replace(":path", "") for route in ROUTES} - UNTOLD
    assert set(told["paths"]) == paths
    for route in ROUTES:
        if route.path not in UNTOLD:
            methods = {method.lower() for method in route.methods or () if method != "HEAD"}
            assert methods <= set(told["paths"][route.path.replace(":path", "")])
