"""LangChain's standard tests of chat models, through langchain-openai, against a running server with a real model.

Where 135M parameters cannot follow a tool prompt, ``tool_choice`` forces the call, which the grammar guarantees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.runnables import Runnable
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

from edge_runtime.llm import EdgeLLM
from edge_runtime.package import Package
from edge_runtime.server.app import create_app
from tests.server.served import running

pytestmark = [
    pytest.mark.filterwarnings("ignore:Received a Pydantic BaseModel V1:UserWarning"),  # a test's own wish
    pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning"),  # of the client, on its own object
]
URL = ""


class Forced(ChatOpenAI):
    """Calls a tool whenever it has one."""

    def bind_tools(self, tools: Sequence[Any], **more: Any) -> Runnable[Any, AIMessage]:
        return super().bind_tools(tools, **{"tool_choice": "any", **more})


@pytest.fixture(scope="module", autouse=True)
def server(smollm2_package: Package) -> Iterator[None]:
    global URL
    with EdgeLLM(str(smollm2_package.folder)) as llm, running(create_app(llm)) as URL:
        yield


class TestStandard(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return Forced

    @property
    def chat_model_params(self) -> dict[str, object]:
        return {
            "model": "smollm2",
            "base_url": f"{URL}/v1",
            "api_key": "unused",
            "temperature": 0,
            "max_tokens": 300,
            "stream_usage": True,
            "frequency_penalty": 0.5,  # greedy, so small a model goes round in circles
            "model_kwargs": {"parallel_tool_calls": False},
        }

    @property
    def has_tool_choice(self) -> bool:
        return True

    @property
    def structured_output_kwargs(self) -> dict[str, object]:
        return {"method": "json_schema"}

    @property
    def supports_json_mode(self) -> bool:
        return False  # any object would do there, and so small a model does not take its keys from the prompt

    @property
    def supports_image_inputs(self) -> bool:
        return False
