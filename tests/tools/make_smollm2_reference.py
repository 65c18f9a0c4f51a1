"""Make tests/fixtures/smollm2/TEXT.npz from TEXT.txt: Transformers in fp32 on the real GGUF's dequantized weights.

Run by hand in an environment with torch, transformers and llama-cpp-python:

    python tests/tools/make_smollm2_reference.py SmolLM2-135M-Instruct.Q4_1.gguf text heldout

The weights are dequantized with gguf-py and the token ids are llama.cpp's, so that nothing of the project takes part.
``text`` is prose written for the project, on which encodings were chosen; ``heldout`` is "Execution model" of the
Python 3.11 reference (PSF licence), first used when they had been.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parents[1] / "fixtures" / "smollm2"
HEADS = {"q": 9, "k": 3}


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of rotary pairs in the rows of q and k."""
    rows, cols = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, cols).swapaxes(1, 2).reshape(rows, cols)


def state_dict(path: Path) -> dict[str, torch.Tensor]:
    names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    names |= {"attn_output": "self_attn.o_proj"} | {f"attn_{p}": f"self_attn.{p}_proj" for p in "qkv"}
    names |= {f"ffn_{p}": f"mlp.{p}_proj" for p in ("gate", "up", "down")}
    state = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        match tensor.name.split("."):
            case ["blk", index, part, "weight"]:
                if part in ("attn_q", "attn_k"):
                    values = unpermute(values, HEADS[part[-1]])
                state[f"model.layers.{index}.{names[part]}.weight"] = torch.from_numpy(values.copy())
            case ["token_embd", "weight"]:
                state["model.embed_tokens.weight"] = state["lm_head.weight"] = torch.from_numpy(values)
            case ["output_norm", "weight"]:
                state["model.norm.weight"] = torch.from_numpy(values.copy())
            case other:
                raise ValueError(f"unexpected tensor {other}")
    return state


def token_ids(path: Path, text: str) -> list[int]:
    from llama_cpp import Llama

    return list(Llama(str(path), vocab_only=True, verbose=False).tokenize(text.encode(), add_bos=False, special=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("texts", nargs="+", help="names of texts in tests/fixtures/smollm2, without .txt")
    args = parser.parse_args()
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(state_dict(args.gguf))
    for name in args.texts:
        ids = token_ids(args.gguf, (FOLDER / f"{name}.txt").read_text(encoding="utf-8"))
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double()
        logp = torch.log_softmax(logits, -1)
        score = logp[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].numpy()
        print(f"{name}: {len(ids)} tokens, mean NLL {-score.mean():.5f}")
        np.savez_compressed(
            FOLDER / f"{name}.npz",
            ids=np.array(ids, np.int32),
            score=score.astype(np.float32),
            top1=logits.argmax(-1).numpy().astype(np.int32),
        )


if __name__ == "__main__":
    main()
