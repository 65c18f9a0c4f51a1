"""Prefixes on disk: what comes back is what was written, or nothing; and no request ever suffers."""

from __future__ import annotations

import logging
import os
import stat
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from devices.base import Snapshot, Step
from devices.errors import EngineError
from edge_runtime import prefix_cache, prefix_store
from edge_runtime.engine import Engine
from edge_runtime.llm import EdgeLLM
from edge_runtime.prefix_cache import PrefixCache
from edge_runtime.prefix_store import SEGMENT, PrefixStore
from edge_runtime.request import Kind
from edge_runtime.sampling import SamplingParams
from tests.fake_decoder import FakeDecoder, FakeSequence
from tests.runtime.helpers import GREEDY, LetterTokenizer, greedy, prompt
from tests.server.served import wait_until

GIB = 1 << 30


def snapshot(seed: int = 0, start: int = 0) -> Snapshot:
    rng = np.random.default_rng(seed)
    arrays = (rng.random((2, SEGMENT, 4), np.float32), rng.integers(0, 255, (8, 2, 5), np.uint8))
    return Snapshot(SEGMENT, arrays, start)


def store_at(folder: Path, size: int = GIB, name: str = "model") -> PrefixStore:
    return PrefixStore(folder, name, size)


def saved(store: PrefixStore, tokens: list[int], seed: int = 0) -> list[str]:
    """All segments of ``tokens`` written; their names."""
    names = list(store.names(tokens))
    for place, name in enumerate(names):
        assert store.save(place, name, snapshot(seed + place, place * SEGMENT), timeout=60)
    store.close()
    return names


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# --- segments ---------------------------------------------------------------------------------------------------------


def test_what_comes_back_is_what_was_written(tmp_path: Path) -> None:
    names = saved(store_at(tmp_path / "store"), prompt(1, 2 * SEGMENT + 5))
    assert len(names) == 2
    again = store_at(tmp_path / "store")
    for place, name in enumerate(names):
        assert again.touch(place, name)
        found, expected = again.load(name), snapshot(place, place * SEGMENT)
        assert found is not None
        assert (found.length, found.start) == (expected.length, expected.start)
        for ours, theirs in zip(found.arrays, expected.arrays, strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)


def test_names_say_all_tokens_the_model_and_the_kind(tmp_path: Path) -> None:
    store, tokens = store_at(tmp_path), prompt(1, 3 * SEGMENT)
    names = list(store.names(tokens))
    assert len(set(names)) == 3
    assert list(store.names(tokens[: 2 * SEGMENT + 255])) == names[:2]
    changed = [tokens[0] ^ 1, *tokens[1:]]
    kinds = (Kind(long_rope=True), Kind(kv_type="int8"), Kind(kv_type="float16"))
    same = [store.names(changed), store_at(tmp_path, name="other").names(tokens)]
    for others in [*same, *(store.names(tokens, kind) for kind in kinds)]:
        assert not set(others) & set(names)
    assert list(store.names(tokens[: SEGMENT - 1])) == []


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    saved(store_at(tmp_path / "store"), prompt(1, SEGMENT))
    (file,) = files(tmp_path / "store")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("damage", ["cut", "empty", "bit", "header", "text"])
def test_what_is_damaged_is_deleted_and_not_believed(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    (name,) = saved(store_at(tmp_path), prompt(1, SEGMENT))
    (file,) = files(tmp_path)
    data = bytearray(file.read_bytes())
    if damage == "bit":
        data[-100] ^= 1
    elif damage == "header":
        data[3] = 0xFF
    file.write_bytes({"cut": data[:-50], "empty": b"", "text": b"hello"}.get(damage, bytes(data)))
    store = store_at(tmp_path)
    assert store.load(name) is None
    assert "damaged" in caplog.text
    assert not files(tmp_path)
    assert store.load(name) is None


def test_the_length_is_checked_too(tmp_path: Path) -> None:
    (name,) = saved(store_at(tmp_path), prompt(1, SEGMENT))
    (file,) = files(tmp_path)
    file.write_bytes(file.read_bytes().replace(b'"length":"256"', b'"length":"255"'))
    assert store_at(tmp_path).load(name) is None


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    size = len(prefix_store._encode(snapshot()))
    prompts = [prompt(seed, SEGMENT) for seed in range(3)]
    names = []
    for index, tokens in enumerate(prompts[:2]):
        names += saved(store_at(tmp_path / "a", 2 * size + 99), tokens)
        os.utime(files(tmp_path / "a")[0].parent / f"{names[-1]}.safetensors", (index, index))
    store = PrefixStore(tmp_path / "b", "model", 2 * size + 99, root=tmp_path)
    assert store_at(tmp_path / "a").touch(0, names[0])  # used: the other is older now
    names += saved(store, prompts[2])
    assert {file.stem for file in files(tmp_path)} == {names[0], names[2]}


def test_of_one_prefix_the_last_segments_go_first(tmp_path: Path) -> None:
    size = len(prefix_store._encode(snapshot()))
    names = saved(store_at(tmp_path, 3 * size + 99), prompt(1, 3 * SEGMENT))
    (other,) = saved(store_at(tmp_path, 3 * size + 99), prompt(2, SEGMENT))
    assert {file.stem for file in files(tmp_path)} == {*names[:2], other}


def test_a_segment_over_the_size_is_not_written(tmp_path: Path) -> None:
    saved(store_at(tmp_path, 100), prompt(1, SEGMENT))
    assert not files(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="there a file is left for an hour")
def test_what_a_killed_process_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, however young; what another is still writing is left alone."""
    replace = Path.replace
    dead = tmp_path / "x.partial"
    dead.write_bytes(b"half")

    def meanwhile(partial: Path, target: Path) -> None:
        monkeypatch.setattr(Path, "replace", replace)
        saved(store_at(tmp_path), prompt(2, SEGMENT))
        assert not dead.exists()
        replace(partial, target)

    monkeypatch.setattr(Path, "replace", meanwhile)
    saved(store_at(tmp_path), prompt(1, SEGMENT))
    assert len(files(tmp_path)) == 2
    assert not list(tmp_path.glob("*.partial"))


def test_a_full_disk_switches_writing_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (kept,) = saved(store_at(tmp_path), prompt(1, SEGMENT))

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)  # between writing and renaming
    store = store_at(tmp_path)
    saved(store, prompt(2, SEGMENT))
    saved(store, prompt(3, SEGMENT))
    assert not store.writable
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "No space left" in caplog.text
    assert [file.stem for file in files(tmp_path)] == [kept]
    assert store.load(kept) is not None


def test_a_folder_that_cannot_be_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    store = store_at(tmp_path / "file" / "store")
    names = saved(store, prompt(1, SEGMENT))
    assert not store.writable
    assert store.load(names[0]) is None
    assert "damaged" not in caplog.text
    assert not store.touch(0, names[0])


def test_two_stores_on_one_folder(tmp_path: Path) -> None:
    a, b = store_at(tmp_path), store_at(tmp_path)
    names = saved(a, prompt(1, 4 * SEGMENT))
    assert saved(b, prompt(1, 4 * SEGMENT)) == names
    assert len(files(tmp_path)) == 4
    assert b.touch(0, names[0])
    a.discard(names[0])
    assert b.load(names[0]) is None
    assert not b.touch(0, names[0])
    b.discard(names[0])  # gone already


# --- in the engine, over a decoder without a model --------------------------------------------------------------------


def fake() -> FakeDecoder:
    return FakeDecoder(max_context=2048, kv_tokens=8192, prefill_chunk=256)


def start(decoder: FakeDecoder, folder: Path | None) -> Engine:
    store = None if folder is None else store_at(folder)
    return Engine(decoder, LetterTokenizer(), vocab_size=decoder.vocab_size, prefix_store=store)


def cached(engine: Engine, tokens: list[int]) -> int:
    """Ask; the answer must be right, whatever came from where."""
    with engine.submit(tokens, GREEDY) as generation:
        answer = [token for chunk in generation for token in chunk.checked().token_ids]
        assert answer == greedy(FakeDecoder(), tokens, len(answer))
        return generation.usage.cached_tokens


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_runtime.engine.IDLE_S", 0.01)


def test_a_long_prompt_survives_a_restart(tmp_path: Path) -> None:
    tokens = prompt(1, 700)
    with start(fake(), tmp_path) as engine:
        assert cached(engine, tokens) == 0
    assert len(files(tmp_path)) == 2
    with start(fake(), tmp_path) as engine:
        assert cached(engine, tokens) == 2 * SEGMENT
        assert cached(engine, tokens) == len(tokens) - 2  # the device knows more than the disk
        assert cached(engine, tokens[:600] + prompt(2, 50)) >= 600
    with start(fake(), tmp_path) as engine:
        assert cached(engine, tokens[:300] + prompt(3, 50)) == SEGMENT
        assert cached(engine, tokens) == 2 * SEGMENT  # 300 tokens on the device, a segment more on the disk
        assert cached(engine, tokens[:200]) == 198


def test_short_and_lone_prompts_are_not_written(tmp_path: Path) -> None:
    with start(fake(), tmp_path) as engine:
        cached(engine, prompt(1, 400))
    assert not files(tmp_path)


def test_a_shared_prefix_is_written_when_the_engine_is_idle(tmp_path: Path, quick: None) -> None:
    prefix = prompt(1, 2 * SEGMENT + 10)
    with start(fake(), tmp_path) as engine:
        cached(engine, prefix + prompt(2, 20))
        time.sleep(0.1)
        assert not files(tmp_path)  # nobody has used it twice
        assert cached(engine, prefix + prompt(3, 20)) == len(prefix)
        wait_until(lambda: len(files(tmp_path)) == 2)


def test_a_longer_prompt_adds_only_its_new_segments(tmp_path: Path) -> None:
    for length, expected in ((600, 2), (600, 2), (1100, 4)):
        with start(fake(), tmp_path) as engine:
            cached(engine, prompt(1, length))
        assert len(files(tmp_path)) == expected


def test_nothing_is_written_without_a_store(tmp_path: Path) -> None:
    with start(fake(), None) as engine:
        cached(engine, prompt(1, 700))
    assert not files(tmp_path)


def test_a_missing_or_strange_segment_costs_only_time(tmp_path: Path) -> None:
    tokens = prompt(1, 3 * SEGMENT + 10)
    with start(fake(), tmp_path) as engine:
        cached(engine, tokens)
    names = list(store_at(tmp_path).names(tokens))
    store_at(tmp_path).discard(names[1])
    with start(fake(), tmp_path) as engine:
        assert cached(engine, tokens) == SEGMENT
    path = tmp_path / f"{names[2]}.safetensors"
    path.write_bytes(prefix_store._encode(snapshot(0, 2 * SEGMENT)))  # well formed, of another model
    with start(fake(), tmp_path) as engine:
        assert cached(engine, tokens) == 2 * SEGMENT


def test_without_room_for_it_the_prompt_is_computed(tmp_path: Path) -> None:
    tokens = prompt(1, 700)
    with start(fake(), tmp_path) as engine:
        cached(engine, tokens)
    decoder = FakeDecoder(max_context=2048, kv_tokens=740, prefill_chunk=256)
    with start(decoder, tmp_path) as engine:
        cached(engine, prompt(2, 300))
        cached(engine, tokens)
        decoder.check_integrity()


def test_a_device_without_snapshots_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for outcome in (None, EngineError("no")):

        def refuse(*args: object, outcome: EngineError | None = outcome) -> None:
            if outcome is not None:
                raise outcome

        monkeypatch.setattr(FakeSequence, "snapshot", refuse)
        with start(fake(), tmp_path) as engine:
            cached(engine, prompt(1, 700))
        assert not files(tmp_path)


def test_a_full_queue_is_tried_again_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, store = fake(), store_at(tmp_path)
    cache = PrefixCache(GIB, store=store)
    tokens = prompt(1, 3 * SEGMENT)
    sequence = decoder.new_sequence()
    for at in range(0, len(tokens), SEGMENT):
        decoder.forward([Step(sequence, np.asarray(tokens[at : at + SEGMENT]), 0)])
    cache.put(tokens, sequence, wanted=len(tokens))
    with monkeypatch.context() as patch:
        patch.setattr(store, "save", lambda *args: False)
        cache.save_next()
        assert cache.unsaved
    while cache.unsaved:
        cache.save_next()
    cache.close()
    assert len(files(tmp_path)) == 3


def test_the_end_is_not_held_up_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "SAVE_AT_END_S", 0.0)
    with start(fake(), tmp_path) as engine:
        cached(engine, prompt(1, 700))
    assert not files(tmp_path)


def test_the_cache_off_is_the_store_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_GLM_HOME", str(tmp_path))
    for options in ({"prefix_cache_bytes": 0}, {"prefix_store_bytes": 0}):
        with EdgeLLM("synthetic:tiny", "onnxruntime:cpu", weights="fp32", **options) as llm:
            llm.generate(prompt(1, 600), SamplingParams(temperature=0, max_tokens=2))
        assert not files(tmp_path / "cache" / "prefixes")


# --- on real devices --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["onnxruntime:cpu", "openvino:cpu"])
def test_real_devices_answer_the_same_after_a_restart(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_GLM_HOME", str(tmp_path))
    tokens = prompt(1, 600)
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)

    def answer() -> tuple[tuple[int, ...], int]:
        with EdgeLLM("synthetic:tiny", device, weights="fp32", threads=1) as llm:
            found = llm.generate(tokens, params)
            return found.token_ids, found.usage.cached_tokens

    first, again = answer(), answer()
    assert again == (first[0], 2 * SEGMENT)
    assert first[1] == 0
    with EdgeLLM("synthetic:tiny", device, weights="fp32", batch_invariant=True) as llm:
        assert llm.generate(tokens, params).usage.cached_tokens == 0  # not the same bits


def test_removing_a_model_removes_its_prefixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_runtime.paths import home
    from edge_runtime.store import Store

    monkeypatch.setenv("EDGE_GLM_HOME", str(tmp_path))
    with EdgeLLM("synthetic:tiny", "onnxruntime:cpu", weights="fp32") as llm:
        llm.generate(prompt(1, 600), SamplingParams(temperature=0, max_tokens=2))
    assert files(home().prefixes)
    Store(home()).remove("synthetic:tiny")
    assert not files(home().prefixes)
