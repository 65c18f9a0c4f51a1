"""Messages, whatever they quote."""

from __future__ import annotations

from devices.errors import LONGEST
from edge_runtime.errors import CorruptModel


def test_a_long_message_keeps_its_beginning_and_its_end() -> None:
    text = f"the field {'x' * 100_000} is not known; export the model again"
    said = str(CorruptModel(text))
    assert said.startswith("the field xxx")
    assert said.endswith("export the model again")
    assert "characters) …" in said
    assert len(said) < LONGEST


def test_a_short_message_is_as_it_was() -> None:
    assert str(CorruptModel("x" * LONGEST)) == "x" * LONGEST
    assert str(CorruptModel()) == ""
