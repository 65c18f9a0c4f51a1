"""The machine itself: its processor, and the memory that this process may use."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

_CPUINFO = Path("/proc/cpuinfo")
_GROUP = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")
_PROCESSORS = Path("/sys/devices/system/cpu")
_ECORES = Path("/sys/devices/cpu_atom")
_INSTRUCTIONS = {
    # as Linux, macOS (without "hw.optional." and "arm.FEAT_") and numpy say → as everybody does
    **dict.fromkeys(("avx2", "avx2_0", "AVX2"), "AVX2"),
    **dict.fromkeys(("avx_vnni",), "AVX-VNNI"),
    **dict.fromkeys(("avx512f", "AVX512F"), "AVX-512"),
    **dict.fromkeys(("avx512_vnni", "AVX512VNNI"), "AVX-512 VNNI"),
    **dict.fromkeys(("avx512_bf16", "AVX512BF16"), "AVX-512 BF16"),
    **dict.fromkeys(("amx_int8",), "AMX-INT8"),
    **dict.fromkeys(("amx_bf16",), "AMX-BF16"),
    **dict.fromkeys(("asimd", "neon", "AdvSIMD", "ASIMD"), "NEON"),
    **dict.fromkeys(("asimddp", "DotProd", "ASIMDDP"), "DotProd"),
    **dict.fromkeys(("i8mm", "I8MM"), "I8MM"),
    **dict.fromkeys(("bf16", "BF16"), "BF16"),
    **dict.fromkeys(("sve", "SVE"), "SVE"),
    **dict.fromkeys(("sme", "SME"), "SME"),
}


class Memory(NamedTuple):
    """Bytes."""

    total: int
    free: int
    """What could be had now, caches that would be given up included."""


def processor() -> str:
    """Its name."""
    with suppress(OSError):  # Linux on x86; on ARM the file has no names
        found = re.search(r"^model name\s*:\s*(.+)$", _CPUINFO.read_text(), re.M)
        if found:
            return found[1].strip()
    if sys.platform == "darwin":
        with suppress(OSError, subprocess.CalledProcessError):
            return _sysctl("-n", "machdep.cpu.brand_string").strip()
    return platform.processor() or platform.machine() or "unknown"


def cores() -> int:
    """Logical cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def core_groups() -> tuple[tuple[int, ...], ...]:
    """The logical processors of each physical core, as numbered by the system, those that this process may use; ()
    where the system does not tell, or lets no thread be pinned."""
    groups: dict[str, list[int]] = {}
    if hasattr(os, "sched_getaffinity"):
        with suppress(OSError):
            for each in sorted(os.sched_getaffinity(0)):
                siblings = (_PROCESSORS / f"cpu{each}" / "topology" / "thread_siblings_list").read_text()
                groups.setdefault(siblings, []).append(each)
            return tuple(map(tuple, groups.values()))
    return ()


def physical_cores() -> int:
    """Cores that this process may use, each counted once however many threads it runs; at least 1."""
    import psutil

    return len(core_groups()) or min(psutil.cpu_count(logical=False) or cores(), cores())


def cores_differ() -> bool:
    """Whether some cores are slower than others, as in hybrid processors. False where the system does not tell."""
    capacities = set()
    with suppress(OSError):
        capacities = {path.read_text() for path in _PROCESSORS.glob("cpu[0-9]*/cpu_capacity")}
    return len(capacities) > 1 or _ECORES.exists()


def instructions() -> tuple[str, ...]:
    """Those that matter for inference, by their usual names; () where the system does not tell."""
    names = set(_instruction_names())
    return tuple(dict.fromkeys(usual for own, usual in _INSTRUCTIONS.items() if own in names))


def _instruction_names() -> list[str]:
    with suppress(OSError):
        found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _CPUINFO.read_text(), re.M)
        return found[1].split() if found else []
    if sys.platform == "darwin":
        with suppress(OSError, subprocess.CalledProcessError):
            return re.findall(r"^hw\.optional\.(?:arm\.FEAT_)?(\w+): 1$", _sysctl("hw.optional"), re.M)
    with suppress(ImportError):  # numpy chooses its own kernels by them, but has no public name for the list
        features = getattr(import_module("numpy._core._multiarray_umath"), "__cpu_features__", {})
        return [name for name, there in features.items() if there]
    return []


def _sysctl(*arguments: str) -> str:
    command = ["sysctl", *arguments]  # constants; by PATH, which is the user's
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout  # nosec B603  # see above


def host_memory() -> Memory:
    """Of the machine, or of the control group (container, service) that this process is confined to."""
    import psutil

    found = psutil.virtual_memory()
    total, free = int(found.total), int(found.available)
    for limit, used in _group_limits():
        total, free = min(total, limit), min(free, max(limit - used, 0))
    return Memory(total, free)


def _group_limits() -> Iterator[tuple[int, int]]:
    """(limit, bytes used without what can be dropped) of each control group that has a limit, innermost first.

    Both versions: https://docs.kernel.org/admin-guide/cgroup-v2.html, …/cgroup-v1/memory.html.
    """
    try:
        lines = _GROUP.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = _GROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = _GROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        here = root / path.lstrip("/")
        for folder in (here, *here.parents):
            with suppress(OSError, ValueError):  # "max" is no number: no limit
                limit = int((folder / names[0]).read_text())
                used = int((folder / names[1]).read_text())
                dropped = re.search(rf"^{names[2]} (\d+)$", (folder / "memory.stat").read_text(), re.M)
                yield limit, used - int(dropped[1] if dropped else 0)
            if folder == root:
                break
