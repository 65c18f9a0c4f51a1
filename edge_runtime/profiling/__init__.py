"""``edge-glm profile``: where the time of requests goes, down to the engine's operators, and where the memory.

``process`` starts ``worker``, a fresh process. There ``measure`` opens the model and sends requests, each with a trace:
``parts`` and ``critical_path`` read these, ``resources`` what the system counts meanwhile, ``memory`` what was planned.
The engine's operators are counted afterwards (``operators``), in a decoder opened anew, for counting makes it slower;
``limits`` says what the machine could do at most. ``table`` and ``html`` show a ``result``.
"""
