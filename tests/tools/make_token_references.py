"""Make tests/fixtures/tokens: tiny vocabularies, and llama.cpp's token ids of awkward strings.

Three steps, run from the repository's root; the first two where gguf, tokenizers and sentencepiece are installed,
the last where llama_cpp is (it reads vocabularies only, never weights):

    python -m tests.tools.make_token_references train
    python -m tests.tools.make_token_references write FOLDER
    python tests/tools/make_token_references.py ask FOLDER SmolLM2-135M-Instruct.Q4_1.gguf
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "tokens"

TEXTS = [
    "",
    " ",
    "Hello, world!",
    " leading space",
    "   three leading, two trailing  ",
    "a  b   c    d     e         f",
    "\ttab\t\ttabs\t \t mixed",
    "\n",
    "line\nline\n\nparagraph\n\n\n\nfar   \n   \n end\r\ncrlf\r\n\r\n",
    "def f(x: int) -> str:\n    if x >= 10_000:\n        return f'{x!r}'\n\treturn None  # 100%",
    'const a = [1, 22, 333, 4444, 55555]; // {"key": "value", "n": -1.5e-10}',
    "0 12 345 6789 12345678901234567890 3.14159 1,000,000 ½ ² Ⅷ ٣٤٥",
    "I'm you're he's we've they'll it'd I'M YOU'RE HE'S don'T",
    "CamelCaseWords HTTPServer iPhone ÉCOLE éCole ПриветМир",
    "我想在apple工作1314151天～你好，世界。こんにちは世界カタカナ 안녕하세요 세계",
    "السلام عليكم ورحمة الله وبركاته ١٢٣",
    "שלום עולם हिन्दी में पाठ ภาษาไทย ខ្មែរ",
    "👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 😶‍🌫️🦙🦙 ✅🚀",
    "e\u0301 a\u0308\u0304 Z\u0351\u036b\u0343 naïve naïve",
    "\u00a0non\u00a0breaking\u2003em\u200bzero\u3000ideographic\ufeff",
    "!!! ??? ... ---===*** <<>> [](){} `code` ``` ~~ @#$%^& || \\ //",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "text<|im_end|>text <|im_end|> text<|im_end|><|im_end|>",
    "<s>not a turn</s> <unk> <0x0A> <|endoftext|>",
    "<user>  defined\n<user>x  y",
    "▁▁ already▁escaped ▁",
    "Straße İstanbul ﬁancée ﷺ Ǆ ſ'S",
    "\x00\x01\x7f control\x1b[0m",
    "https://example.com/a?b=c&d=%20#frag foo_bar-baz@qux.io C:\\path\\file.txt",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa hahahahahaha ==========================",
]


def train() -> None:
    """Vocabularies whose merges cross every boundary, so that ids show where a pre-tokenizer splits."""
    corpus = [(ROOT / "LICENSE").read_text(), *(TEXTS * 4)]
    FIXTURES.mkdir(exist_ok=True)
    for name, made in {"bpe": _train_bpe(corpus), "spm": _train_spm(corpus)}.items():
        (FIXTURES / f"vocabulary-{name}.json").write_text(json.dumps(made, ensure_ascii=False, separators=(",", ":")))


def _train_bpe(corpus: list[str]) -> dict[str, object]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<user>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=10,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    types = [3, 3, 3, 4, *[1] * (len(tokens) - 4)]
    ids = {"bos": 1, "eos": 2, "unknown": 0, "padding": 2}
    merges = [" ".join(pair) for pair in model["merges"]]
    return {"model": "gpt2", "tokens": tokens, "types": types, "merges": merges, "ids": ids}


def _train_spm(corpus: list[str]) -> dict[str, object]:
    import sentencepiece

    stream = io.BytesIO()
    lines = [line for text in corpus for line in text.replace("\x00", "").split("\n") if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=stream,
        model_type="bpe",
        vocab_size=1200,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_by_whitespace=False,
        split_digits=True,
        user_defined_symbols=["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<user>"],
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=stream.getvalue())
    tokens, scores, types = [], [], []
    for index in range(pieces.get_piece_size()):
        piece = pieces.id_to_piece(index)
        kind = 2 if pieces.is_unknown(index) else 6 if pieces.is_byte(index) else 1
        kind = 3 if pieces.is_control(index) or piece.startswith("<|") else 4 if piece == "<user>" else kind
        tokens.append(piece)
        scores.append(pieces.get_score(index))
        types.append(kind)
    return {"model": "llama", "tokens": tokens, "types": types, "scores": scores, "ids": {"bos": 1, "eos": 2}}


def write(folder: Path) -> None:
    from tests.exporters.gguf_vocabulary import VARIANTS, write

    folder.mkdir(exist_ok=True)
    for name, variant in VARIANTS.items():
        write(variant, folder / f"{name}.gguf")


def ask(folder: Path, smollm2: Path) -> None:
    tiny = {path.stem: _ids(path) for path in sorted(folder.glob("*.gguf"))}
    (FIXTURES / "texts.json").write_text(json.dumps(TEXTS, ensure_ascii=False, indent=0) + "\n")
    for name, made in {"tiny": tiny, "smollm2": _ids(smollm2)}.items():
        (FIXTURES / f"{name}.json").write_text(json.dumps(made, separators=(",", ":")) + "\n")


def _ids(path: Path) -> dict[str, object]:
    """``ids`` with special tokens in text parsed, ``plain`` with them as text, ``bos``: what is put before a prompt."""
    from llama_cpp import Llama

    model = Llama(str(path), vocab_only=True, verbose=False)
    return {
        "ids": [model.tokenize(text.encode(), add_bos=False, special=True) for text in TEXTS],
        "plain": [model.tokenize(text.encode(), add_bos=False, special=False) for text in TEXTS],
        "bos": model.tokenize(b"", add_bos=True, special=True),
    }


if __name__ == "__main__":
    steps = {"train": train, "write": write, "ask": ask}
    steps[sys.argv[1]](*[Path(argument) for argument in sys.argv[2:]])
