"""Makes tests/fixtures/foreign/optimum: a tiny llama as optimum-intel writes it, and what its own runtime answers.

Run by hand, with optimum-intel installed beside torch and transformers, which are no dependencies::

    python tests/tools/make_openvino_folder.py
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

FIXTURES = Path(__file__).parents[1] / "fixtures"
TARGET = FIXTURES / "foreign" / "optimum"
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"
PROMPTS = [[5, 9, 23, 4], [7] * 20, list(range(3, 90))]
NEW = 24


def tiny_llama(folder: Path) -> Path:
    """The llama of the families' fixtures, with a tokenizer of single characters."""
    source = folder / "llama"
    shutil.copytree(FIXTURES / "families" / "llama", source)
    alphabet = {chr(33 + index): index for index in range(94)}
    inner = tokenizers.Tokenizer(models.BPE({**alphabet, "</s>": 94, " ": 95}, []))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="#", chat_template=TEMPLATE)
    tokenizer.save_pretrained(source)
    return source


def main() -> None:
    from optimum.intel import OVModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        source = tiny_llama(Path(folder))
        exact = {"KV_CACHE_PRECISION": "f32", "INFERENCE_PRECISION_HINT": "f32"}  # else answers hang by a thread
        model = OVModelForCausalLM.from_pretrained(source, export=True, load_in_8bit=False, ov_config=exact)
        shutil.rmtree(TARGET, ignore_errors=True)
        model.save_pretrained(TARGET)
        AutoTokenizer.from_pretrained(source).save_pretrained(TARGET)
        model.generation_config.eos_token_id = None
        answers = []
        for prompt in PROMPTS:
            made = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)
            answers.append(made[0, len(prompt) :].tolist())
    (TARGET / "expected.json").write_text(json.dumps({"prompts": PROMPTS, "answers": answers}))
    print(sorted(path.name for path in TARGET.iterdir()), [len(answer) for answer in answers])


if __name__ == "__main__":
    main()
