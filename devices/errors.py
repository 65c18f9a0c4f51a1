"""The root of the project's error tree, and the branch that devices raise.

The whole tree is drawn in :mod:`edge_runtime.errors`. The root lives here because ``devices`` is the
lowest layer. Exceptions of an engine are translated once, where the engine is called, with ``from``.
"""

from __future__ import annotations

LONGEST = 4000
"""Characters of a message."""


class EdgeError(Exception):
    """Anything Edge-GLM refuses or fails at. The message names what was wrong, the limit and the next step.

    Messages quote what they refuse, which may be of any length: of one over :data:`LONGEST` the middle is left out.
    """

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) <= LONGEST:
            return text
        begins, ends = LONGEST // 2, LONGEST // 4
        return f"{text[:begins]} … ({len(text) - begins - ends:,} characters) … {text[-ends:]}"


class DeviceError(EdgeError):
    """A device or its engine failed."""


class UnknownDevice(DeviceError):
    """The device name is not one this runtime knows."""


class DeviceUnavailable(DeviceError):
    """The device is known but cannot be used here; the message says why and what would make it usable."""


class EngineError(DeviceError):
    """The engine refused the model or failed while running it."""


class OutOfSequences(DeviceError):
    """More sequences were opened than ``DecoderLimits.max_sequences``."""


class OutOfKVCache(DeviceError):
    """The KV cache has no room for the step. Nothing of the batch was run; every sequence is unchanged."""


class ContextOverflow(DeviceError):
    """A step would take a sequence past ``DecoderLimits.max_context``. Nothing of the batch was run."""
