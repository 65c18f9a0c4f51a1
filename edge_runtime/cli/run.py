"""``edge-glm run``: one prompt, or a chat with history."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing, suppress

from devices.names import parse_device
from edge_runtime.cli.licence import told_if_pulled
from edge_runtime.cli.progress import Bars
from edge_runtime.errors import InvalidRequest, RequestError
from edge_runtime.llm import EdgeLLM, Prompt
from edge_runtime.measurements import Workload
from edge_runtime.request import LOCAL
from edge_runtime.route import Route
from edge_runtime.sampling import SamplingParams
from edge_runtime.settings import Settings, load_settings
from edge_runtime.terminal import harmless

Message = dict[str, str]

_HELP = "/clear forgets the conversation, /bye, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


def run(arguments: argparse.Namespace) -> int:
    settings = load_settings(
        {
            name: getattr(arguments, name)
            for name in (
                *("device", "fallback", "weights", "workload", "memory_budget", "threads", "kv_type"),
                *("max_prompt", "batch_invariant", "prompt_lookup", "draft", "draft_device", "prefix_store"),
                *("tuning", "step_timeout", "policy", "offline"),
                *("system", "max_tokens", "temperature", "seed"),
            )
        }
    )
    params = SamplingParams(max_tokens=settings.max_tokens, temperature=settings.temperature, seed=settings.seed)
    prompt = _prompt(arguments.prompt)
    with open_model(arguments.ref, settings) as llm:
        if prompt is None:
            return _chat(llm, settings.system, params)
        system = [] if settings.system is None else [_message("system", settings.system)]
        _answer(llm, [*system, _message("user", prompt)] if system else prompt, params)
        return 0


def open_model(ref: str, settings: Settings, workload: Workload = "one", name: str | None = None) -> EdgeLLM:
    """Load, showing bars for whatever has to be fetched or prepared first, and saying where the device is another."""
    with told_if_pulled(ref), Bars() as bars:
        llm = EdgeLLM(
            ref,
            settings.device,
            settings.memory_budget,
            weights=settings.weights,
            threads=settings.threads,
            kv_type=settings.kv_type,
            max_prompt=settings.max_prompt,
            batch_invariant=settings.batch_invariant,
            prompt_lookup=settings.prompt_lookup,
            draft=settings.draft,
            draft_device=settings.draft_device,
            prefix_store_bytes=settings.prefix_store,
            workload=settings.workload or workload,
            fallback=settings.fallback,
            tuning=settings.tuning,
            step_timeout=settings.step_timeout,
            policy=settings.policy,
            offline=settings.offline,
            name=name,
            progress=bars,
        )
    if llm.device not in parse_device(settings.device):
        print(f"edge-glm: on {llm.device}, {llm.reason}", file=sys.stderr)
    return llm


def _prompt(given: str | None) -> str | None:
    """The argument, or standard input; None: a chat, because a person sits there."""
    if given is None and sys.stdin.isatty():
        return None
    prompt = sys.stdin.read() if given in (None, "-") else given
    if prompt is None or not prompt.strip():
        raise InvalidRequest("the prompt is empty", "prompt")
    return prompt


def _answer(llm: EdgeLLM, prompt: Prompt, params: SamplingParams) -> None:
    """Print the answer as it is made. Ctrl-C cancels it and comes through."""
    with closing(llm.stream(prompt, params)) as chunks:
        text = ""
        try:
            for chunk in chunks:
                text += chunk.text
                _write(chunk.text)
        finally:
            _write("" if text.endswith("\n") else "\n")
            _say_who(chunks.route)


def _say_who(route: Route) -> None:
    """Where a policy had another tier answer, or wanted to."""
    if route.continued is not None:
        said = f"{route.tier} answered, {route.continued}"
    elif route.degraded is not None:
        said = f"{route.tier} answered in place of another: {route.degraded}"
    elif route.tier not in ("", LOCAL):
        said = f"{route.tier} answered: {route.reason}"
    else:
        return
    print(f"edge-glm: {harmless(said)}", file=sys.stderr)


def _write(text: str) -> None:
    sys.stdout.write(harmless(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _chat(llm: EdgeLLM, system: str | None, params: SamplingParams) -> int:
    """Until Ctrl-D, /bye, /exit, or Ctrl-C twice at the prompt; Ctrl-C during an answer ends only the answer."""
    with suppress(ImportError):
        import readline  # noqa: F401  line editing and history in input()

    start: list[Message] = [] if system is None else [_message("system", system)]
    messages = start
    print(harmless(f"{llm.model_id} on {llm.device}, {llm.reason}"), file=sys.stderr)
    print("Ctrl-C stops an answer, Ctrl-D leaves, /help lists more", file=sys.stderr)
    interrupted = False
    while True:
        try:
            line = input(">>> ")
            command = line.strip()
            if command in ("/bye", "/exit"):
                return 0
            if command == "/clear":
                messages = start
            elif command == "/help":
                print(_HELP, file=sys.stderr)
            elif command:
                messages = _turn(llm, messages, line, params)
            interrupted = False
        except EOFError:
            print(file=sys.stderr)
            return 0
        except KeyboardInterrupt:  # at the prompt
            print(file=sys.stderr)
            if interrupted:
                return 0
            interrupted = True
            print("Ctrl-C again or Ctrl-D leaves", file=sys.stderr)


def _turn(llm: EdgeLLM, messages: list[Message], line: str, params: SamplingParams) -> list[Message]:
    """The history after one more exchange. An interrupted answer stays in it as far as it got."""
    asked = [*messages, _message("user", line)]
    text = ""
    try:
        with closing(llm.stream(asked, params)) as chunks:
            for chunk in chunks:
                text += chunk.text
                _write(chunk.text)
    except KeyboardInterrupt:
        pass
    except RequestError as error:  # such as a history over the context: this turn is refused, the chat goes on
        print(f"edge-glm: {error}", file=sys.stderr)
        return messages
    _write("\n")
    _say_who(chunks.route)
    return [*asked, _message("assistant", text)]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
