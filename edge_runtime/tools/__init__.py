"""Tools that a model here may call: functions that a client describes, and runs when the model asks for it.

``wish`` is what a request says of them. ``formats`` knows how families write calls, ``prompting`` tells the model of
its tools by its chat template or in plain words, ``call_grammar`` holds calls to their schemas, ``reader`` finds them
in the answer as it comes, in ``pieces`` as OpenAI's deltas hold them. ``calling`` puts them together for one model.
"""
