"""Several answers at once in asyncio; one is cancelled in the middle. ``python samples/stream_asyncio.py [REF]``"""

import asyncio
import sys

from edge_runtime import EdgeLLM, SamplingParams

QUESTIONS = ["What is a heat pump?", "Why is the sky blue?", "What is the capital of France?"]


async def answer(llm: EdgeLLM, question: str) -> str:
    text = ""
    messages = [{"role": "user", "content": question}]
    with llm.start_chat(messages, SamplingParams(temperature=0, max_tokens=40)) as generation:  # leaving cancels it
        async for chunk in generation:
            text += chunk.checked().text
    return text


async def main(ref: str) -> None:
    llm = await asyncio.to_thread(EdgeLLM, ref)
    try:
        for question, text in zip(
            QUESTIONS, await asyncio.gather(*(answer(llm, each) for each in QUESTIONS)), strict=True
        ):
            print(f"{question}\n  {' '.join(text.split())}")
        slow = asyncio.create_task(answer(llm, "Tell me a long story."))
        await asyncio.sleep(0.1)
        slow.cancel()
        print("cancelled:", isinstance((await asyncio.gather(slow, return_exceptions=True))[0], asyncio.CancelledError))
    finally:
        await asyncio.to_thread(llm.close)


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "smollm2:135m"))
