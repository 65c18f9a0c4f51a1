"""The real model at 4 bits: what a sequence answers hardly depends on what else runs, and not at all if so asked.

Our own kernels compute each token alike, always. Both engines compute a step of two or more tokens bit for bit alike
however it is cut and batched; with them a single token goes through a matrix-vector kernel, which sums in another
order; the last bit that differs flips a rounding to int8 somewhere, and after 30 layers logits differ by about as much
as int8 activations cost anyway. ``batch_invariant`` keeps away from that kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from numpy.typing import NDArray

from devices import Decoder, DecoderOptions, Step, open_decoder
from edge_runtime import EdgeLLM, SamplingParams
from edge_runtime.bench.workload import bundled_text
from edge_runtime.package import Package
from edge_runtime.server.app import create_app
from tests.bench.fidelity import DEVICES, REFERENCES
from tests.conftest import usable
from tests.server.served import running

QUESTIONS = (
    "Why is the sky blue?",
    "Name three primary colours.",
    "What is a heat pump?",
    "Write a sentence about the sea.",
    "What does 17 + 25 make?",
    "Who wrote Hamlet?",
    "Explain what a budget is in one sentence.",
    "List four animals that live on a farm.",
)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return usable(request.param)


@contextmanager
def opened(package: Package, device: str, invariant: bool) -> Iterator[Decoder]:
    variant = package.variant(DEVICES[device], "int4")
    assert variant is not None
    options = DecoderOptions(max_sequences=9, batch_invariant=invariant)
    decoder = open_decoder(package.spec(variant), device, options)
    try:
        yield decoder
    finally:
        decoder.close()


@pytest.fixture(scope="module")
def ids() -> NDArray[np.int64]:
    with np.load(REFERENCES / "text.npz") as arrays:
        return np.asarray(arrays["ids"], np.int64)


def test_steps_of_several_tokens_are_bit_for_bit_alike(
    smollm2_package: Package, device: str, ids: NDArray[np.int64]
) -> None:
    if device == "openvino:cpu" and "vnni" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("without VNNI OpenVINO multiplies floats, by kernels that go by the number of tokens")
    with opened(smollm2_package, device, invariant=False) as decoder:
        whole_sequence, cut, other = (decoder.new_sequence() for _ in range(3))
        (whole,) = decoder.forward([Step(whole_sequence, ids[:96], rows=96)])
        (first,) = decoder.forward([Step(cut, ids[:64], rows=64)])
        second, _ = decoder.forward([Step(cut, ids[64:96], rows=32), Step(other, ids[500:503])])
        assert np.array_equal(np.concatenate([first, second]), whole)
        assert 64 % decoder.limits.kv_block == 0


def test_decoding_among_others_is_bit_for_bit_like_alone(
    smollm2_package: Package, device: str, ids: NDArray[np.int64]
) -> None:
    prompts = [ids[50 * i : 50 * i + 20 + 3 * i] for i in range(8)]
    with opened(smollm2_package, device, invariant=True) as decoder:

        def decode(chosen: list[int]) -> list[NDArray[np.float32]]:
            sequences = [decoder.new_sequence() for _ in chosen]
            rows = [
                [decoder.forward([Step(sequence, prompts[i])])[0]]
                for i, sequence in zip(chosen, sequences, strict=True)
            ]
            for token in ids[600:606]:
                for own, logits in zip(
                    rows, decoder.forward([Step(s, np.array([token])) for s in sequences]), strict=True
                ):
                    own.append(logits)
            for sequence in sequences:
                sequence.close()
            decoder.check_integrity()
            return [np.concatenate(own) for own in rows]

        together = decode(list(range(8)))
        for i in range(8):
            (alone,) = decode([i])
            assert np.array_equal(alone, together[i])


@pytest.mark.parametrize("chunk", [1, 12, 50])
def test_decoding_beside_a_chunk_is_bit_for_bit_like_alone(
    smollm2_package: Package, device: str, chunk: int, ids: NDArray[np.int64]
) -> None:
    with opened(smollm2_package, device, invariant=True) as decoder:
        alone, beside, other = (decoder.new_sequence() for _ in range(3))
        decoder.forward([Step(alone, ids[:45])])
        decoder.forward([Step(beside, ids[:45])])
        (expected,) = decoder.forward([Step(alone, ids[45:46])])
        found, _ = decoder.forward([Step(beside, ids[45:46]), Step(other, ids[500 : 500 + chunk])])
        assert np.array_equal(found, expected)


def test_the_same_prompt_twice_answers_the_same(smollm2_package: Package, device: str) -> None:
    """The second time most of the prompt comes from the prefix cache."""
    params = SamplingParams(temperature=0, max_tokens=48)
    prompt = "Write a short story about a lighthouse keeper who finds a strange bottle on the beach one morning, " * 3
    with EdgeLLM(str(smollm2_package.folder), device) as llm:
        first, second = (llm.generate(prompt, params) for _ in range(2))
        assert second.usage.cached_tokens >= 32
        assert second.token_ids == first.token_ids


def test_drafts_change_nothing(smollm2_package: Package, device: str) -> None:
    """Answers that copy and answers that do not; the first differ at token 15 or 17 without ``batch_invariant``."""
    text = " ".join(bundled_text().split())[:1200]
    prompts = [f"Repeat this text word for word, without any change:\n\n{text}", *QUESTIONS[:2]]
    params = SamplingParams(temperature=0, max_tokens=64)
    answers = []
    for lookup in (False, True):
        with EdgeLLM(str(smollm2_package.folder), device, batch_invariant=True, prompt_lookup=lookup) as llm:
            answers.append([llm.generate(prompt, params).token_ids for prompt in prompts])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("invariant", [True, False])
def test_eight_clients_at_once_get_their_own_answers(smollm2_package: Package, device: str, invariant: bool) -> None:
    """Exactly those they get alone; without ``batch_invariant`` up to a choice between nearly equal tokens."""
    with (
        EdgeLLM(str(smollm2_package.folder), device, batch_invariant=invariant, prefix_cache_bytes=0) as llm,
        running(create_app(llm)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client,
    ):

        def ask(question: str) -> list[Any]:
            answer = client.chat.completions.create(
                model=llm.model_id,
                messages=[{"role": "user", "content": question}],
                temperature=0,
                max_tokens=24,
                logprobs=True,
                top_logprobs=2,
            )
            logprobs = answer.choices[0].logprobs
            assert logprobs is not None
            assert logprobs.content is not None
            return logprobs.content

        alone = [ask(question) for question in QUESTIONS]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(ask, QUESTIONS))

    for one, many in zip(alone, together, strict=True):
        pairs = list(zip(one, many, strict=False))
        different = next((pair for pair in pairs if pair[0].token != pair[1].token), None)
        if different is None:
            assert len(one) == len(many)
            continue
        assert not invariant
        assert device != "edge:cpu"
        likeliest, other = different[0].top_logprobs
        assert other.token == different[1].token
        assert likeliest.logprob - other.logprob < 0.5
