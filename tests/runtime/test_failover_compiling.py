"""While a device compiles the model another answers; and two that are in use share the work by length."""

from __future__ import annotations

import threading

import pytest

from devices.errors import EngineError
from edge_runtime.errors import PromptTooLong
from edge_runtime.failover import Failover
from edge_runtime.sampling import SamplingParams
from tests.fake_decoder import FakeDecoder
from tests.runtime.helpers import Gate, collect, greedy, prompt
from tests.runtime.machine import Failing, Machine, submit
from tests.server.served import wait_until

LONG = SamplingParams(temperature=0, max_tokens=40)


def ready(failover: Failover) -> None:
    """Wait until both are in use."""
    wait_until(lambda: len(failover.loaded) == 2)


def test_another_device_answers_while_one_compiles() -> None:
    compiling = threading.Event()
    npu, cpu = FakeDecoder(max_prompt=32), FakeDecoder()
    machine = Machine(npu, cpu, compiling=compiling)
    failover = machine.start()
    assert [each.device for each in failover.loaded] == ["fake:1"]
    assert failover.loaded[0].placement.reason == "not fake:0: it is compiling the model"
    assert collect(submit(failover, prompt(1, 20)))[0].tokens == greedy(cpu, prompt(1, 20), 12)
    assert not npu.batches
    gate = Gate()
    cpu.before_forward = gate
    begun = submit(failover, prompt(2, 20))
    assert gate.reached.wait(60)
    compiling.set()
    ready(failover)
    assert failover.aside == {}
    before = len(cpu.batches)
    assert collect(submit(failover, prompt(3, 20)))[0].tokens == greedy(npu, prompt(3, 20), 12)
    assert len(cpu.batches) == before
    gate.open.set()
    assert collect(begun)[0].finish_reason == "length"  # where it began
    assert machine.shares == {"fake:0": 2, "fake:1": 2}
    failover.close()
    assert npu.closed
    assert cpu.closed


def test_what_is_too_long_for_one_goes_to_the_next() -> None:
    npu, cpu = FakeDecoder(max_prompt=32), FakeDecoder()
    compiling = threading.Event()
    compiling.set()
    failover = Machine(npu, cpu, compiling=compiling).start()
    ready(failover)
    collect(submit(failover, prompt(1, 32)))
    assert npu.batches
    assert not cpu.batches
    assert collect(submit(failover, prompt(1, 33)))[0].tokens == greedy(cpu, prompt(1, 33), 12)
    assert len(failover.score(prompt(1, 200))) == 199
    with pytest.raises(PromptTooLong, match="300 tokens, this model and device take 256"):
        submit(failover, prompt(1, 300))
    failover.close()


def test_a_device_that_does_not_compile_is_put_aside() -> None:
    compiling = threading.Event()
    failover = Machine(EngineError("the compiler crashed"), FakeDecoder(), compiling=compiling).start()
    compiling.set()
    wait_until(lambda: "crashed" in failover.aside.get("fake:0", ""))
    assert collect(submit(failover, prompt(1, 20)))[0].finish_reason == "length"
    assert [each.device for each in failover.loaded] == ["fake:1"]
    failover.close()


@pytest.mark.parametrize("failing", [0, 1])
def test_of_two_in_use_one_fails(failing: int) -> None:
    compiling = threading.Event()
    compiling.set()
    decoders = [FakeDecoder(max_prompt=32), FakeDecoder()]
    machine = Machine(*decoders, compiling=compiling)
    failover = machine.start()
    ready(failover)
    decoders[failing].before_forward = Failing(0)
    other = decoders[1 - failing]
    answer = collect(submit(failover, prompt(1, 20)))[0]
    assert answer.tokens == greedy(other, prompt(1, 20), 12)
    if failing == 1:
        last = collect(submit(failover, prompt(1, 40)))[0].last
        assert last is not None
        assert "40 tokens, this model and device take 32" in str(last.error)
    assert [each.device for each in failover.loaded] == [f"fake:{1 - failing}"]
    assert sorted(machine.opened) == ["fake:0", "fake:1"]
    failover.close()


def test_without_another_device_one_waits_for_the_compiler() -> None:
    compiling = threading.Event()
    compiling.set()
    failover = Machine(FakeDecoder(), compiling=compiling).start()
    assert [each.device for each in failover.loaded] == ["fake:0"]
    assert not failover.aside
    failover.close()


def test_closing_while_one_compiles() -> None:
    compiling = threading.Event()
    npu, cpu = FakeDecoder(), FakeDecoder()
    failover = Machine(npu, cpu, compiling=compiling).start()
    closing = threading.Thread(target=failover.close)
    closing.start()
    wait_until(lambda: cpu.closed)
    compiling.set()
    closing.join(60)
    assert not closing.is_alive()
    assert npu.closed
