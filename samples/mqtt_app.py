"""A model behind an MQTT broker: ``python samples/mqtt_app.py [--ref REF] [--host HOST] [--port PORT]``

Asked on ``edge/ask/ID`` (text, or JSON with ``prompt`` and ``max_tokens``), it answers piece by piece on
``edge/answer/ID``: ``{"text": …}`` and at the end ``{"done": true, "finish": …}``, or ``{"error": …}``. A message on
``edge/cancel/ID`` ends an answer. ``edge/status`` is ``online`` as long as it runs; the broker itself says ``offline``
where it vanishes (last will). At most eight questions wait; one more is refused at once. It connects again by itself.
"""

import argparse
import json
import queue
import signal
import threading

import paho.mqtt.client as mqtt

from edge_runtime import EdgeError, EdgeLLM, SamplingParams

parser = argparse.ArgumentParser()
parser.add_argument("--ref", default="smollm2:135m")
parser.add_argument("--host", default="127.0.0.1")
parser.add_argument("--port", type=int, default=1883)
arguments = parser.parse_args()

waiting: queue.Queue[tuple[str, str, int] | None] = queue.Queue(8)
cancelled: set[str] = set()
client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, "edge-glm", clean_session=False)


def say(id: str, **what: object) -> None:
    client.publish(f"edge/answer/{id}", json.dumps(what), qos=1)


def on_connect(*_: object) -> None:  # also after every reconnection
    client.subscribe([("edge/ask/+", 1), ("edge/cancel/+", 1)])
    client.publish("edge/status", "online", qos=1, retain=True)


def on_message(_: mqtt.Client, __: object, message: mqtt.MQTTMessage) -> None:
    kind, id = message.topic.split("/")[1:]
    if kind == "cancel":
        cancelled.add(id)
        return
    try:
        text = message.payload.decode()
        asked = json.loads(text) if text.startswith("{") else {"prompt": text}
        waiting.put_nowait((id, str(asked["prompt"]), int(asked.get("max_tokens", 128))))
    except queue.Full:
        say(id, error="too many questions are waiting: ask again later")
    except (ValueError, KeyError, TypeError) as error:
        say(id, error=f"that is no question: {error}")


def answer(llm: EdgeLLM, id: str, prompt: str, max_tokens: int) -> None:
    finish = "cancelled"
    try:
        for chunk in llm.stream(prompt, SamplingParams(max_tokens=max_tokens)):
            if id in cancelled:
                break
            if chunk.text:
                say(id, text=chunk.text)
            finish = chunk.finish_reason or finish
        say(id, done=True, finish=finish)
    except EdgeError as error:
        say(id, error=str(error))
    cancelled.discard(id)


client.will_set("edge/status", "offline", qos=1, retain=True)
client.on_connect, client.on_message = on_connect, on_message
client.reconnect_delay_set(1, 30)
client.connect_async(arguments.host, arguments.port, keepalive=15)
with EdgeLLM(arguments.ref) as llm:
    client.loop_start()
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda *_: threading.Thread(target=waiting.put, args=(None,)).start())
    while (question := waiting.get()) is not None:
        answer(llm, *question)
    client.publish("edge/status", "offline", qos=1, retain=True).wait_for_publish(5)
    client.loop_stop()
