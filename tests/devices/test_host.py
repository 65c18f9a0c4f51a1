"""The processor, and the memory that control groups leave."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from devices import host
from devices.host import Memory, host_memory

GIB = 1 << 30


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where control groups are; the machine has 16 GiB, 12 of them free, and no groups."""
    found = SimpleNamespace(total=16 * GIB, available=12 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: found)
    monkeypatch.setattr(host, "_GROUP", tmp_path / "cgroup")
    monkeypatch.setattr(host, "_GROUPS", tmp_path / "fs")
    return tmp_path


def group(folder: Path, names: tuple[str, str, str], limit: str, used: int, dropped: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {dropped}\nfile 7\n")


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


def test_of_the_machine(groups: Path) -> None:
    assert host_memory() == Memory(16 * GIB, 12 * GIB)
    (groups / "cgroup").write_text("0::/\n")
    assert host_memory() == Memory(16 * GIB, 12 * GIB)


def test_of_a_group(groups: Path) -> None:
    (groups / "cgroup").write_text("0::/box/service\n")
    group(groups / "fs/box/service", V2, "max", GIB, 0)
    group(groups / "fs/box", V2, str(4 * GIB), 3 * GIB, GIB)  # a limit further out counts too
    assert host_memory() == Memory(4 * GIB, 2 * GIB)
    group(groups / "fs/box/service", V2, str(GIB), 2 * GIB, 0)  # over it, as while it shrinks
    assert host_memory() == Memory(GIB, 0)


def test_of_a_group_of_the_first_version(groups: Path) -> None:
    (groups / "cgroup").write_text("5:cpu,cpuacct:/box\n4:memory:/box\n")
    group(groups / "fs/memory/box", V1, str(2 * GIB), GIB, 0)
    group(groups / "fs/memory", V1, str(2**63 - 4096), 5 * GIB, 0)  # none
    assert host_memory() == Memory(2 * GIB, GIB)


def test_a_group_that_cannot_be_read(groups: Path) -> None:
    (groups / "cgroup").write_text("0::/box\n")
    group(groups / "fs/box", V2, "not a number", 0, 0)
    assert host_memory() == Memory(16 * GIB, 12 * GIB)
    (groups / "fs/box/memory.max").unlink()
    assert host_memory() == Memory(16 * GIB, 12 * GIB)


def test_here() -> None:
    memory = host_memory()
    assert 0 < memory.free < memory.total
    assert 1 <= host.cores() <= (os.cpu_count() or 1)
    assert host.processor()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 avx512f avx512_vnni amx_int8\n", True),
        ("processor : 0\nFeatures : fp asimd asimddp i8mm bf16\n", False),
    ],
)
def test_what_linux_says(text: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(host, "_CPUINFO", tmp_path / "cpuinfo")
    if expected:
        assert host.processor() == "Some CPU @ 2 GHz"
        assert host.instructions() == ("AVX2", "AVX-512", "AVX-512 VNNI", "AMX-INT8")
    else:
        assert host.instructions() == ("NEON", "DotProd", "I8MM", "BF16")


def test_what_macos_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_CPUINFO", tmp_path / "absent")
    monkeypatch.setattr(host.sys, "platform", "darwin")
    said = "hw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 0\nhw.optional.AdvSIMD: 1\n"
    monkeypatch.setattr(host, "_sysctl", lambda *words: said if words == ("hw.optional",) else "Apple M4\n")
    assert host.processor() == "Apple M4"
    assert host.instructions() == ("NEON", "DotProd")


def test_what_numpy_knows_where_the_system_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = set(host.instructions())
    monkeypatch.setattr(host, "_CPUINFO", tmp_path / "absent")
    monkeypatch.setattr(host.sys, "platform", "win32")
    assert set(host.instructions()) <= here
    assert ("AVX2" in host.instructions()) == ("AVX2" in here)


@pytest.fixture
def processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four processors, two to a core, of which the last may not be used."""
    for number, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        topology = tmp_path / f"cpu{number}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{siblings}\n")
    monkeypatch.setattr(host, "_PROCESSORS", tmp_path)
    monkeypatch.setattr(host, "_ECORES", tmp_path / "cpu_atom")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    return tmp_path


def test_cores_and_their_threads(processors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.core_groups() == ((0, 2), (1,))
    assert (host.physical_cores(), host.cores()) == (2, 3)
    (processors / "cpu1/topology/thread_siblings_list").unlink()
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 8)
    assert host.core_groups() == ()
    assert host.physical_cores() == 3  # not more than may be used
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: None)
    assert host.physical_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert host.core_groups() == ()


def test_cores_that_differ(processors: Path) -> None:
    assert not host.cores_differ()
    for number, capacity in enumerate((1024, 1024, 1024, 512)):
        (processors / f"cpu{number}" / "cpu_capacity").write_text(f"{capacity}\n")
        assert host.cores_differ() == (number == 3)
    for number in range(4):
        (processors / f"cpu{number}" / "cpu_capacity").unlink()
    (processors / "cpu_atom").mkdir()
    assert host.cores_differ()
