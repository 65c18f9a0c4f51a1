"""What may be tried on which machine, and how it reaches the engine."""

from __future__ import annotations

import pytest

from devices.base import DecoderOptions
from edge_runtime.measurements import Shape
from edge_runtime.tuning import space
from edge_runtime.tuning.records import Options, Setup
from edge_runtime.tuning.space import HISTORY, challengers, levers, opened, problem
from tests.tuning.machine import scope

EDGE, ORT, OPENVINO, CUDA = (
    Setup(name) for name in ("edge:cpu", "onnxruntime:cpu", "openvino:cpu", "onnxruntime:cuda")
)


def machine(patch: pytest.MonkeyPatch, groups: tuple[tuple[int, ...], ...], *, hybrid: bool = False) -> None:
    count = sum(map(len, groups))
    for module in (space, "devices.hints"):
        where = module if isinstance(module, str) else module.__name__
        patch.setattr(f"{where}.physical_cores", lambda: len(groups))
        patch.setattr(f"{where}.cores", lambda: count)
    patch.setattr("devices.hints.core_groups", lambda: groups)
    patch.setattr("devices.hints.cores_differ", lambda: hybrid)


FOUR_WITH_SMT = ((0, 4), (1, 5), (2, 6), (3, 7))


def options(lever: str, setup: Setup, **changes: object) -> list[Options]:
    found = challengers(lever, setup, scope(**changes))
    assert all(each.device == setup.device for each in found)
    return [each.options for each in found]


@pytest.mark.parametrize(
    ("groups", "counts"),
    [(((0,),), [1]), (((0,), (1,)), [1, 2]), (((0, 1),), [1, 2]), (FOUR_WITH_SMT, [1, 2, 4, 8])],
)
def test_threads(monkeypatch: pytest.MonkeyPatch, groups: tuple[tuple[int, ...], ...], counts: list[int]) -> None:
    """1, half of the cores, the cores, and all that they run at once."""
    machine(monkeypatch, groups)
    for device in (EDGE, ORT, OPENVINO):
        assert [each.threads for each in options("threads", device)] == counts
    assert options("threads", CUDA) == []


def test_other_levers_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, FOUR_WITH_SMT)
    found = Setup("edge:cpu", Options(threads=2, properties={"session.dynamic_block_base": "4"}))
    assert options("chunk", found)[0] == Options(2, 128, properties={"session.dynamic_block_base": "4"})
    assert options("spinning", found)[0].properties == {
        "session.dynamic_block_base": "4",
        "session.intra_op.allow_spinning": "0",
    }
    tried = Setup("edge:cpu", Options(properties={"session.intra_op.allow_spinning": "0"}))
    assert [each.properties for each in options("spinning", tried)] == [{"session.intra_op.spin_duration_us": "1000"}]
    assert Options(4) in options("threads", Setup("edge:cpu", Options(2)))
    assert Options(2) not in options("threads", Setup("edge:cpu", Options(2)))


def test_chunks_are_no_longer_than_prompts() -> None:
    def chunks(prompt: int) -> list[int | None]:
        return [each.prefill_chunk for each in options("chunk", EDGE, shape=Shape(prompt, 64, 1))]

    assert (chunks(40), chunks(512), chunks(2048)) == ([128], [128, 512], [128, 512, 1024])


def test_the_cache_loses_nothing_unless_that_is_allowed() -> None:
    kinds = [each.kv_type for each in options("KV cache", OPENVINO)]
    assert kinds == ["float16"]  # where the engine takes 8 bits
    assert options("KV cache", OPENVINO, weights="fp32") == []  # where it takes 32
    assert options("KV cache", EDGE) == options("KV cache", ORT, int8_kv=True) == []
    assert [each.kv_type for each in options("KV cache", EDGE, int8_kv=True)] == ["int8"]


def test_devices_are_tried_as_they_come() -> None:
    tuned = Setup("edge:cpu", Options(threads=1))
    assert challengers("device", tuned, scope()) == [ORT, OPENVINO]
    assert challengers("device", tuned, scope(devices=("edge:cpu",))) == []


def test_history_within_what_is_searched() -> None:
    found = (Setup("openvino:cpu"), Setup("edge:cpu", Options(prefill_chunk=512)), Setup("openvino:cpu"), EDGE)
    assert challengers(HISTORY, EDGE, scope(history=found)) == [OPENVINO, found[1]]
    assert challengers(HISTORY, EDGE, scope(history=found, devices=("edge:cpu",))) == [found[1]]
    assert challengers(HISTORY, EDGE, scope(history=found, budget=True)) == [OPENVINO]
    small = Setup("edge:cpu", Options(kv_type="int8"))
    assert challengers(HISTORY, EDGE, scope(history=(small,))) == []  # allowed then, not now
    assert challengers(HISTORY, EDGE, scope(history=(small,), int8_kv=True)) == [small]


def test_hints_are_those_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(*devices: str) -> set[str]:
        return set(levers(scope(devices=devices)))

    common = {HISTORY, "device", "threads", "chunk", "KV cache", "pinning"}
    machine(monkeypatch, ((0,), (1,)))
    assert names("edge:cpu") == names("onnxruntime:cpu") == common | {"spinning", "loop blocks"}
    assert names("openvino:cpu") == common | {"performance hint"}
    machine(monkeypatch, FOUR_WITH_SMT, hybrid=True)
    assert names("openvino:cpu") == common | {"performance hint", "hyper-threading", "core type"}
    assert names("onnxruntime:cuda") == common


def test_pinning_reaches_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, FOUR_WITH_SMT)
    given = DecoderOptions()

    def affinities(device: str, threads: int | None = None) -> tuple[int | None, dict[str, str]]:
        found = opened(Setup(device, Options(threads, pinning=True)), given)
        return found.threads, found.properties

    # processors are counted from 1, and the first thread is the caller's
    assert affinities("edge:cpu") == (4, {"session.intra_op_thread_affinities": "2,6;3,7;4,8"})
    assert affinities("onnxruntime:cpu", threads=2) == (2, {"session.intra_op_thread_affinities": "2,6"})
    assert affinities("edge:cpu", threads=8)[1] == {"session.intra_op_thread_affinities": "2,6;3,7;4,8;1,5;2,6;3,7;4,8"}
    assert affinities("edge:cpu", threads=1) == (1, {})
    assert affinities("openvino:cpu") == (None, {"ENABLE_CPU_PINNING": "YES"})
    free = opened(Setup("openvino:cpu", Options(pinning=False)), given)
    assert free.properties == {"ENABLE_CPU_PINNING": "NO"}
    machine(monkeypatch, ((3,),))
    assert options("pinning", EDGE) == []
    assert len(options("pinning", OPENVINO)) == 2


def test_what_is_given_beats_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, FOUR_WITH_SMT)
    found = Setup("edge:cpu", Options(2, 128, "int8", True, {"session.dynamic_block_base": "4"}))
    alone = opened(found, DecoderOptions(max_sequences=3))
    assert (alone.threads, alone.prefill_chunk, alone.kv_type, alone.max_sequences) == (2, 128, "int8", 3)
    given = opened(found, DecoderOptions(threads=3, kv_type="float16", properties={"session.dynamic_block_base": "2"}))
    assert (given.threads, given.prefill_chunk, given.kv_type) == (3, 128, "float16")
    assert given.properties == {"session.dynamic_block_base": "2"}  # and three threads are not pinned


@pytest.mark.parametrize(
    ("setup", "trouble"),
    [
        (Setup("tpu"), "there is no device 'tpu'"),
        (Setup("edge:cpu", Options(threads=3)), "3 threads are not tried here"),
        (Setup("edge:cpu", Options(threads=-1)), "-1 threads"),
        (Setup("edge:cpu", Options(prefill_chunk=7)), "chunks of 7 tokens"),
        (Setup("onnxruntime:cpu", Options(kv_type="int8")), "onnxruntime:cpu is not tried with a KV cache of int8"),
        (Setup("edge:cpu", Options(properties={"session.disable_prepacking": "1"})), "takes no session.disable_pre"),
        (Setup("openvino:cpu", Options(properties={"INFERENCE_PRECISION_HINT": "bf16"})), "takes no INFERENCE_PREC"),
        (Setup("edge:cpu", Options(properties={"PERFORMANCE_HINT": "THROUGHPUT"})), "takes no PERFORMANCE_HINT"),
    ],
)
def test_what_is_not_offered(monkeypatch: pytest.MonkeyPatch, setup: Setup, trouble: str) -> None:
    machine(monkeypatch, FOUR_WITH_SMT)
    assert trouble in (problem(setup) or "")


def test_all_that_is_offered_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, FOUR_WITH_SMT, hybrid=True)
    for device in (EDGE, ORT, OPENVINO):
        for lever in levers(scope()):
            for each in challengers(lever, device, scope(int8_kv=True, shape=Shape(2048, 32, 1))):
                assert problem(each) is None, each


def test_in_words() -> None:
    assert str(EDGE) == "edge:cpu"
    assert str(EDGE.options) == "default"
    found = Setup("edge:cpu", Options(2, 128, "int8", True, {"a": "1"}))
    assert str(found) == "edge:cpu, threads 2, chunk 128, KV cache int8, threads pinned, a=1"
    assert str(Options(pinning=False)) == "threads not pinned"
