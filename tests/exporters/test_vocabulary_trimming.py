"""A vocabulary of fewer tokens: the same text in and out, with other numbers in between."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from edge_runtime.cli.recipes import parse_prune
from edge_runtime.errors import ConfigError, CorruptModel, UnsupportedModel
from exporters.checkpoint import TextFiles
from exporters.compression.vocabulary import TrimmedCheckpoint, tokens_to_keep
from tests.exporters.numpy_builder import run
from tests.exporters.random_checkpoint import SHORT, TEXT, RandomCheckpoint


class Trained(RandomCheckpoint):
    """With a tokenizer that merges."""

    @property
    def text(self) -> TextFiles:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
        more = "Where the wild wind winds, there wanders whoever whispers. " * 30 + "λ " * 30
        tokenizer.train_from_iterator([TEXT.text, more], trainer)
        tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
        end = tokenizer.token_to_id("<|end|>")
        return TextFiles(
            tokenizer.to_str(),
            special_tokens={"eos_token": "<|end|>"},
            generation={"eos_token_id": [end], "temperature": 0.5},
        )


WORDY = replace(SHORT, vocab_size=512)


def test_a_trimmed_vocabulary_says_the_same(tmp_path: Path) -> None:
    source = Trained(WORDY)
    whole = Tokenizer.from_str(source.text.tokenizer_json)
    trimmed = TrimmedCheckpoint(source, tokens_to_keep(source, [TEXT.text]))
    tokenizer = Tokenizer.from_str(trimmed.text.tokenizer_json)
    assert trimmed.architecture.vocab_size == tokenizer.get_vocab_size() < whole.get_vocab_size()
    inside = TEXT.text[:60]
    assert tokenizer.encode(inside).tokens == whole.encode(inside).tokens
    for outside in ("whoever wanders", "Größe 漢字 🙂", "\x00\n\t", "<|end|>"):
        assert tokenizer.decode(tokenizer.encode(outside).ids, skip_special_tokens=False) == outside
    assert trimmed.text.generation == {"eos_token_id": [tokenizer.token_to_id("<|end|>")], "temperature": 0.5}
    ids = np.array(tokenizer.encode(inside).ids)
    np.testing.assert_allclose(run(trimmed, ids), run(source, trimmed.kept[ids])[:, trimmed.kept], rtol=1e-5, atol=1e-5)


def test_unigram_vocabularies_are_trimmed(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0), *((chr(97 + n), -9.0) for n in range(26)), ("▁", -3.0), ("▁sea", -2.0), ("▁see", -2.0)]
    content = json.loads(Tokenizer.from_str(_unigram(pieces)).to_str())

    class Uni(RandomCheckpoint):
        @property
        def text(self) -> TextFiles:
            return TextFiles(json.dumps(content))

    source = Uni(replace(SHORT, vocab_size=64))
    trimmed = TrimmedCheckpoint(source, tokens_to_keep(source, ["sea"]))
    tokenizer = Tokenizer.from_str(trimmed.text.tokenizer_json)
    assert "▁sea" in tokenizer.get_vocab()
    assert "▁see" not in tokenizer.get_vocab()
    assert tokenizer.encode("see").tokens == ["▁", "s", "e", "e"]


def _unigram(pieces: list[tuple[str, float]]) -> str:
    tokenizer = Tokenizer(models.Unigram(pieces, 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer.to_str()


def test_a_script_is_kept() -> None:
    source = Trained(WORDY)
    both = Tokenizer.from_str(source.text.tokenizer_json)
    assert both.encode("λ").tokens == ["Î»"]  # its two bytes, in the alphabet of bytes
    trimmed = TrimmedCheckpoint(source, tokens_to_keep(source, [], "latin"))
    tokenizer = Tokenizer.from_str(trimmed.text.tokenizer_json)
    assert "Î»" not in tokenizer.get_vocab()
    assert tokenizer.decode(tokenizer.encode("λ, whoever").ids) == "λ, whoever"
    assert tokenizer.encode("whoever wanders").tokens == both.encode("whoever wanders").tokens
    with pytest.raises(ConfigError, match="klingon"):
        tokens_to_keep(source, [], "klingon")
    assert parse_prune("vocab=script:latin")[0].script == "latin"


def test_vocabularies_that_cannot_be_trimmed() -> None:
    class Words(RandomCheckpoint):
        @property
        def text(self) -> TextFiles:
            model = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}
            return TextFiles(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))

    class Lacking(Trained):
        @property
        def text(self) -> TextFiles:
            return replace(super().text, special_tokens={"eos_token": "<|never|>"})

    with pytest.raises(UnsupportedModel, match="WordLevel"):
        tokens_to_keep(Words(SHORT), ["a"])
    with pytest.raises(CorruptModel, match="never"):
        tokens_to_keep(Lacking(WORDY), ["a"])
    with pytest.raises(ConfigError, match="empty"):
        tokens_to_keep(Trained(WORDY), [" \n"])
