"""``edge-glm bench --ladder``: one workload, from an unfused fp32 graph up to everything that this runtime does.

``job`` says what the rungs are. ``climb`` has ``worker`` take each in a process of its own, in which ``baseline`` is
the first rung and :class:`edge_runtime.EdgeLLM` all others, answers prompts of ``prompts`` and is compared with the
first. ``report`` shows what came of it.
"""
