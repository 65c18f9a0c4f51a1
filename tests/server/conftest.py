"""A server on a loopback port, and OpenAI's own client."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from edge_runtime.server.app import create_app
from tests.server.served import FakeModel, running


@pytest.fixture(scope="module")
def model() -> Iterator[FakeModel]:
    model = FakeModel()
    yield model
    model.engine.close()


@pytest.fixture(scope="module")
def url(model: FakeModel) -> Iterator[str]:
    with running(create_app(model, max_body=100_000)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url) as client:
        yield client
