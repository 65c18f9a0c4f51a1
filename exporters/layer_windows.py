"""Which layers attend to a sliding window, as each family's configuration says it."""

from __future__ import annotations

from collections.abc import Callable

from edge_runtime.errors import CorruptModel, UnsupportedModel
from exporters.fields import Fields

FULL, SLIDING = "full_attention", "sliding_attention"

Windows = Callable[[Fields, int], tuple[int | None, ...]]
"""(fields, layers) → the window of each layer in tokens, None for a layer that sees everything."""


def no_windows(fields: Fields, count: int) -> tuple[int | None, ...]:
    return (None,) * count


def _by_type(fields: Fields, count: int, default: Callable[[int], bool], window: int | None) -> tuple[int | None, ...]:
    """Windows from ``layer_types``, or from ``default(index)`` (True: sliding)."""
    types = tuple(SLIDING if default(index) else FULL for index in range(count))
    if fields.has("layer_types"):
        types = fields.texts("layer_types", count)
    for unknown in sorted(set(types) - {FULL, SLIDING}):
        raise UnsupportedModel(f"config.json: layer type {unknown!r} is not supported, only {FULL} and {SLIDING}")
    if SLIDING in types and window is None:
        raise CorruptModel("config.json: layer_types has sliding_attention, but no sliding_window is in use")
    return tuple(window if kind == SLIDING else None for kind in types)


def every_layer(default: int | None) -> Windows:
    """One window for all layers; an explicit null means none (Mistral, Phi-3)."""
    return lambda fields, count: (_window(fields, default),) * count


def _window(fields: Fields, default: int | None) -> int | None:
    if fields.has("sliding_window"):
        return fields.integer("sliding_window")
    return None if fields.given("sliding_window") else default


def qwen(fields: Fields, count: int) -> tuple[int | None, ...]:
    """The layers from ``max_window_layers`` on, if ``use_sliding_window``."""
    window = _window(fields, 4096)
    if not fields.boolean("use_sliding_window", False):
        window = None  # Qwen writes a number that it does not use
    first = fields.integer("max_window_layers", 28, minimum=0)
    return _by_type(fields, count, lambda index: window is not None and index >= first, window)


def gemma(default_pattern: int, pattern_field: bool) -> Windows:
    """Every ``pattern``-th layer sees everything, the others a window."""

    def windows(fields: Fields, count: int) -> tuple[int | None, ...]:
        pattern = default_pattern
        if pattern_field:
            internal = fields.integer("_sliding_window_pattern", default_pattern)
            pattern = fields.integer("sliding_window_pattern", internal)
        if fields.has("sliding_window_size"):  # a second name in early Gemma 2 files
            fields.agree("sliding_window_size", _window(fields, 4096) or 0)
        return _by_type(fields, count, lambda index: bool((index + 1) % pattern), _window(fields, 4096))

    return windows


def smollm3(fields: Fields, count: int) -> tuple[int | None, ...]:
    """The layers without rotation, if ``use_sliding_window``."""
    window = _window(fields, None)
    if not fields.boolean("use_sliding_window", False):
        window = None
    interval = fields.integer("no_rope_layer_interval", 4)
    bare = tuple((index + 1) % interval == 0 for index in range(count))
    if fields.has("no_rope_layers"):
        bare = tuple(not value for value in fields.integers("no_rope_layers", count))
    return _by_type(fields, count, lambda index: window is not None and bare[index], window)
