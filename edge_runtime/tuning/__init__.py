"""``edge-glm tune``: which way of opening a model is the fastest here, found by measuring and kept for later.

``space`` says what may be tried, ``search`` tries it in turns with the default and decides, each trial a fresh process
of :mod:`edge_runtime.bench` (``run``). ``log`` keeps every trial (``records``), ``table`` shows them, and ``apply``
gives what was found to a model that is opened.
"""
