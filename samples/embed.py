"""A model in a script: one answer, one that streams, one in a form. ``python samples/embed.py [REF]``"""

import json
import sys

from edge_runtime import EdgeLLM, Grammar, SamplingParams

CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 30}}, "required": ["city"]}

with EdgeLLM(sys.argv[1] if len(sys.argv) > 1 else "smollm2:135m") as llm:
    print(llm.generate("Name three primary colours.", SamplingParams(temperature=0, max_tokens=40)).text)

    for chunk in llm.stream("Count to five.", SamplingParams(temperature=0, max_tokens=30)):
        print(chunk.text, end="", flush=True)
    print()

    form = SamplingParams(temperature=0, max_tokens=40, grammar=Grammar.json_schema(CITY))
    print(json.loads(llm.generate("Where is the Louvre?", form).text)["city"])
