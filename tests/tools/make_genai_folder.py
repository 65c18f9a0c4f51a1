"""Makes tests/fixtures/foreign/genai: a tiny llama as onnxruntime-genai's model builder writes it, and what its own
runtime answers.

Run by hand, with onnxruntime-genai beside torch and transformers, which are no dependencies::

    python tests/tools/make_genai_folder.py
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import onnxruntime_genai as og
from make_openvino_folder import FIXTURES, NEW, PROMPTS, tiny_llama

TARGET = FIXTURES / "foreign" / "genai"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = tiny_llama(Path(folder))
        told = json.loads((source / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
        (source / "config.json").write_text(json.dumps(told | {"hidden_act": "silu"}))
        shutil.rmtree(TARGET, ignore_errors=True)
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(TARGET)]
        subprocess.run([*builder, "-p", "fp32", "-e", "cpu", "-c", folder], check=True)
        config = json.loads((TARGET / "genai_config.json").read_text())
        config["model"]["eos_token_id"] = 95  # which no answer here has: nothing ends one
        scratch = Path(folder) / "endless"
        shutil.copytree(TARGET, scratch)
        (scratch / "genai_config.json").write_text(json.dumps(config))
        model = og.Model(str(scratch))
        answers = []
        for prompt in PROMPTS:
            params = og.GeneratorParams(model)
            params.set_search_options(do_sample=False, max_length=len(prompt) + NEW, min_length=0)
            generator = og.Generator(model, params)
            generator.append_tokens(prompt)
            while not generator.is_done():
                generator.generate_next_token()
            answers.append(generator.get_sequence(0).tolist()[len(prompt) :])
    (TARGET / "expected.json").write_text(json.dumps({"prompts": PROMPTS, "answers": answers}))
    print(sorted(path.name for path in TARGET.iterdir()), [len(answer) for answer in answers])


if __name__ == "__main__":
    main()
