"""``edge-glm bench``: how fast a model is here, measured so that it can be measured again.

``job`` says what to measure. ``process`` starts ``worker``, a fresh process that opens the model and runs the
scenarios of ``local``; or ``load`` sends requests to any OpenAI-compatible server through ``client``. Both make
prompts with ``workload``, reduce arrival times with ``timing`` and give a ``result``, which ``table``, ``html`` and
``compare`` show.
"""
