"""``tokenizer.json``, of a package and of a folder by Transformers."""

from __future__ import annotations

import json
import random
import shutil
from copy import deepcopy
from pathlib import Path

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Inner

from edge_runtime.tokenizer import Tokenizer
from exporters.hf_text import read_text_files
from tests.fuzz.mutation import as_json, damage, disturb, vary
from tests.fuzz.surface import Case, Json, Surface, sometimes
from tests.fuzz.surfaces.text import use_grammar, use_tokenizer

FOLDER = Path(__file__).parents[2] / "fixtures" / "foreign" / "optimum"
_PARTS: tuple[tuple[str, Json], ...] = (
    ("normalizer", {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}),
    ("normalizer", {"type": "Replace", "pattern": {"String": ""}, "content": "b" * 100}),
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "/////w=="}),
    ("normalizer", {"type": "Prepend", "prepend": "x" * 100_000}),
    ("normalizer", {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "ab"}] * 500}),
    ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(x+x+)+y|"}, "behavior": "Isolated", "invert": False}),
    ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
    ("pre_tokenizer", {"type": "Digits", "individual_digits": True}),
    ("pre_tokenizer", {"type": "FixedLength", "length": 0}),
    ("pre_tokenizer", {"type": "UnicodeScripts"}),
    ("decoder", {"type": "Strip", "content": " ", "start": 2**60, "stop": 2**60}),
    ("decoder", {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True}),
    ("decoder", {"type": "Replace", "pattern": {"Regex": "(a|a)*$"}, "content": ""}),
    ("post_processor", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}),
    ("post_processor", {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 50,
     "pair": [], "special_tokens": {}}),
)  # fmt: skip
"""Parts that mean harm, or that the seeds lack."""
_DIGIT = {"Regex": r"\d|[^a-z]+"}
_REPLACE: Json = {"type": "Replace", "pattern": _DIGIT, "content": " "}
_BYTES: Json = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
_SPACES: Json = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
_STEPS: dict[str, tuple[Json, ...]] = {
    "normalizers": (
        {"type": "NFC"}, {"type": "NFD"}, {"type": "NFKC"}, {"type": "NFKD"}, {"type": "Lowercase"}, {"type": "Nmt"},
        {"type": "StripAccents"}, {"type": "Strip", "strip_left": True, "strip_right": False}, {"type": "ByteLevel"},
        {"type": "Prepend", "prepend": "▁"}, _REPLACE, _REPLACE | {"pattern": {"String": " "}, "content": "▁"},
        {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
         "lowercase": True},
    ),
    "pretokenizers": (
        _BYTES, _SPACES, {"type": "Whitespace"}, {"type": "WhitespaceSplit"}, {"type": "BertPreTokenizer"},
        {"type": "Split", "pattern": _DIGIT, "behavior": "Isolated", "invert": False}, {"type": "UnicodeScripts"},
        {"type": "Digits", "individual_digits": True}, {"type": "Punctuation", "behavior": "Isolated"},
        {"type": "CharDelimiterSplit", "delimiter": "#"}, {"type": "FixedLength", "length": 3},
    ),
    "decoders": (
        _BYTES, _SPACES, _REPLACE, {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "BPEDecoder", "suffix": "</w>"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
    ),
    "processors": (
        _BYTES, {"type": "BertProcessing", "sep": ["b", 3], "cls": ["a", 2]},
        {"type": "RobertaProcessing", "sep": ["b", 3], "cls": ["a", 2], "trim_offsets": True, "add_prefix_space": True},
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "a", "type_id": 0}}, {"Sequence": {"id": "A",
         "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
         "special_tokens": {"a": {"id": "a", "ids": [2], "tokens": ["a"]}}},
    ),
}  # fmt: skip
"""What the library knows, by the key under which a sequence has it."""
_SECTIONS = {
    "normalizers": "normalizer",
    "pretokenizers": "pre_tokenizer",
    "decoders": "decoder",
    "processors": "post_processor",
}
_BEHAVIORS = ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
_WORDS: dict[str, tuple[object, ...]] = {
    "type": (), "version": (), "truncation": (), "padding": (), "behavior": _BEHAVIORS,
    "prepend_scheme": ("first", "never", "always"), "replacement": ("▁", "a", " "), "delimiter": ("#", "a"),
    "Regex": (r"\w+", r"\s*", "a|b", "(?i:hi)", r"\p{L}+|\p{N}", "(?=a)"), "Sequence": (), "SpecialToken": (),
}  # fmt: skip


class Tokenizers(Surface):
    name = "tokenizer"
    weight = 8

    def prepare(self) -> list[Case]:
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(FOLDER / file, self.folder)
        (self.folder / "generation_config.json").write_text('{"eos_token_id": 2, "bos_token_id": 1}')
        texts = [(FOLDER / "tokenizer.json").read_text(), *(each.to_str() for each in _tokenizers())]
        self._seeds = [Case("tokenizer.json", text.encode()) for text in texts]
        return self._seeds

    def make(self, rng: random.Random) -> Case:
        seed = rng.choice(self._seeds)
        if rng.random() < 0.5:
            return Case(seed.name, json.dumps(self._sound(rng, json.loads(seed.data)), ensure_ascii=False).encode())
        if rng.random() < 0.2:
            return Case(seed.name, damage(rng, seed.data, [each.data for each in self._seeds]))
        value = json.loads(seed.data)
        other = json.loads(rng.choice(self._seeds).data)
        if rng.random() < 0.4:
            part = rng.choice(("normalizer", "pre_tokenizer", "post_processor", "decoder", "model", "added_tokens"))
            value[part] = other[part]
        if rng.random() < 0.2:
            part, harm = rng.choice(_PARTS)
            value[part] = harm
        return Case(seed.name, as_json(rng, disturb(rng, value, self.made(rng))))

    def _sound(self, rng: random.Random, value: Json) -> Json:
        """Of the right types and shapes: other steps, other values."""
        for many, one in _SECTIONS.items():
            if rng.random() < 0.3:
                steps = [deepcopy(rng.choice(_STEPS[many])) for _ in range(rng.randint(1, 3))]
                value[one] = steps[0] if len(steps) == 1 else {"type": "Sequence", many: steps}
        if rng.random() < 0.3:
            return value
        part = rng.choice([*_SECTIONS.values(), "model", "added_tokens"])
        if value[part]:
            value[part] = vary(rng, {part: value[part]}, list(_STEPS.values()), _WORDS)[part]
        return value

    def run(self, case: Case) -> None:
        (self.folder / case.name).write_bytes(case.data)
        tokenizer = Tokenizer.from_folder(self.folder)
        use_tokenizer(tokenizer)
        if sometimes(case, 4):
            use_grammar(tokenizer)
        if sometimes(case, 2):
            read_text_files(self.folder, {"eos_token_id": 2, "bos_token_id": 1})


def _tokenizers() -> list[Inner]:
    """One of each model, with the parts that real ones have."""
    byte_level = Inner(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    byte_level.normalizer = normalizers.NFC()
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    byte_level.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 256)])
    byte_level.add_special_tokens([AddedToken("<s>", special=True, normalized=False), "</s>"])
    byte_level.add_tokens([AddedToken("  ", lstrip=True, rstrip=True, single_word=True)])
    letters = ["<unk>", "▁", "a", "b", "▁a", "ab", "▁ab", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {token: index for index, token in enumerate(letters)}
    fallback = Inner(models.BPE(vocab, [("▁", "a"), ("a", "b"), ("▁a", "b")], unk_token="<unk>", byte_fallback=True))
    fallback.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fallback.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    unigram = Inner(models.Unigram([(token, -float(index)) for index, token in enumerate(letters)], 0, True))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    pieces = Inner(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "hi": 3, "[CLS]": 4, "[SEP]": 5}, unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.post_processor = processors.BertProcessing(("[SEP]", 5), ("[CLS]", 4))
    pieces.decoder = decoders.WordPiece()
    words = Inner(models.WordLevel({"Hi": 0, "<unk>": 1, ",": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    return [byte_level, fallback, unigram, pieces, words]
