"""Arguments, and the one place where errors become a line and an exit code.

Imports here stay light, so that ``--help`` and mistakes answer at once; each command imports what it needs.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

OK, FAILED, INTERRUPTED, BROKEN_PIPE = 0, 1, 130, 141

REFERENCE_HELP = (
    "smollm2:135m, pypi:NAME[==VERSION], hf:ORG/NAME[/FILE.gguf][@REVISION], synthetic:NAME, "
    "or a path to a .gguf file, a safetensors folder or a model package"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 (error), 2 (usage), 130 (Ctrl-C)."""
    arguments = _parser().parse_args(argv)
    verbose = getattr(arguments, "verbose", False)
    _accept_any_text()
    try:
        code = _command(arguments.command)(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        if verbose:
            traceback.print_exc()
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has left, as `| head` does. The interpreter flushes stdout once more at exit: give it a sink.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        return _report(error, verbose)


def _report(error: Exception, verbose: bool) -> int:
    from devices.errors import EdgeError

    if verbose:
        traceback.print_exc()
    text = " ".join(str(error).split())
    if isinstance(error, EdgeError):
        print(f"edge-glm: {text}", file=sys.stderr)
    else:
        print(f"edge-glm: internal error, {type(error).__name__}: {text} (--verbose shows where)", file=sys.stderr)
    return FAILED


def _accept_any_text() -> None:
    """A terminal that cannot show a character shows its code instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _command(name: str) -> Callable[[argparse.Namespace], int]:
    module, function = {
        "pull": ("models", "pull"),
        "export": ("models", "export"),
        "list": ("models", "list_models"),
        "show": ("models", "show"),
        "rm": ("models", "remove"),
        "run": ("run", "run"),
        "serve": ("serve", "serve"),
        "devices": ("devices", "devices"),
        "plan": ("plan", "plan"),
        "bench": ("bench", "bench"),
        "tune": ("tune", "tune"),
        "route": ("route", "route"),
        "ledger": ("ledger", "ledger"),
        "deferred": ("deferred", "deferred"),
    }[name]
    command: Callable[[argparse.Namespace], int] = getattr(import_module(f"edge_runtime.cli.{module}"), function)
    return command


class _Version(argparse.Action):
    """Looked up only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: object) -> None:
        from edge_runtime.version import version

        print(f"edge-glm {version()}")
        parser.exit()


class _Intermixed(argparse.ArgumentParser):
    """Takes ``run REF --max-tokens 9 PROMPT`` too: argparse ends the positional arguments at the first flag."""

    _inside = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._inside:  # parse_known_intermixed_args comes back here
            return super().parse_known_args(args, namespace)
        self._inside = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._inside = False


def _parser() -> argparse.ArgumentParser:
    common = _Intermixed(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--verbose", action="store_true", help="show the traceback of an error")

    parser = argparse.ArgumentParser(
        prog="edge-glm", description="Run language models on this machine.", parents=[common]
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Intermixed)

    def add(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", parents=[common])

    pull = add("pull", "get a model and prepare it for this machine")
    pull.add_argument("ref", metavar="REF", help=REFERENCE_HELP)
    _add_device(pull)
    _add_engine(pull, default=None, help="prepare it for this engine (default: the one that --device picks)")
    _add_weights(pull)

    export = add("export", "make a model package in a folder of your choice")
    export.add_argument("source", metavar="SRC", help=REFERENCE_HELP)
    export.add_argument("-o", "--output", required=True, metavar="DIR", help="the package; variants are added to one")
    _add_engine(export, default="all", help="default: all")
    _add_weights(export)

    run = add("run", "answer a prompt, or chat")
    run.add_argument("ref", metavar="REF", help=REFERENCE_HELP)
    run.add_argument("prompt", metavar="PROMPT", nargs="?", help="- or none: standard input; on a terminal: a chat")
    _add_device(run)
    _add_fallback(run)
    _add_weights(run, auto=True)
    _add_loading(run)
    _add_max_prompt(run)
    _add_prefixes(run)
    _add_workload(run, "one")
    _add_policy(run)
    run.add_argument("--system", metavar="TEXT", help="system message")
    run.add_argument("--max-tokens", type=int, metavar="N", help="longest answer (default: to the end of the context)")
    run.add_argument("--temperature", type=float, metavar="T", help="0: always the likeliest token")
    run.add_argument("--seed", type=int, metavar="N", help="same seed, same answer")

    serve = add("serve", "serve the OpenAI-compatible HTTP API")
    serve.add_argument("ref", metavar="REF", nargs="?", help=f"{REFERENCE_HELP} (default: the only model here)")
    _add_device(serve)
    _add_fallback(serve)
    _add_weights(serve, auto=True)
    _add_loading(serve)
    _add_max_prompt(serve)
    _add_prefixes(serve)
    _add_workload(serve, "many")
    _add_policy(serve)
    serve.add_argument("--host", metavar="ADDRESS", help="default: 127.0.0.1")
    serve.add_argument("--port", type=int, metavar="N", help="default: 8000")
    serve.add_argument("--api-key", metavar="KEY", help="ask clients for this key; better set EDGE_GLM_API_KEY")

    listing = add("list", "list the models on this machine")
    listing.add_argument("--json", action="store_true", help="print JSON")

    show = add("show", "show what a model is")
    show.add_argument("ref", metavar="REF", help="a name from `edge-glm list`, or a reference")
    show.add_argument("--verify", action="store_true", help="check the hash of every file")
    show.add_argument("--json", action="store_true", help="print the manifest")

    remove = add("rm", "remove a model from this machine")
    remove.add_argument("ref", metavar="REF", help="a name from `edge-glm list`, or a reference")

    devices = add("devices", "list devices, and why one cannot be used")
    devices.add_argument("--json", action="store_true", help="print JSON")

    plan = add("plan", "show what memory a model takes on each device, and what fits a budget")
    plan.add_argument("ref", metavar="REF", help=REFERENCE_HELP)
    _add_device(plan)
    _add_weights(plan, auto=True)
    _add_memory_budget(plan)
    _add_kv_type(plan)
    _add_prefix_store(plan)
    _add_workload(plan, "one")
    plan.add_argument("--context", type=int, metavar="N", help="tokens of each sequence (default: what fits)")
    plan.add_argument("--sequences", type=int, metavar="N", help="sequences of so many tokens at once (default: 1)")
    plan.add_argument("--json", action="store_true", help="print JSON")

    bench = add("bench", "measure a model here, or a server")
    _add_bench(bench)

    route = add("route", "say which tier a prompt goes to and why; check a policy; calibrate for a model")
    _add_route(route)

    ledger = add("ledger", "show, verify or export what has left this device")
    ledger.add_argument("action", choices=("show", "verify", "export"))
    ledger.add_argument("--last", type=int, metavar="N", help="the newest N rows only (show: 20)")
    ledger.add_argument("--head", metavar="HASH", help="verify: a hash that was the last once, and must be there")
    ledger.add_argument("--output", metavar="FILE", help="export: JSON lines (default: standard output)")

    deferred = add("deferred", "list requests that are answered later, show or remove one")
    deferred.add_argument("id", metavar="ID", nargs="?", help="show this one")
    deferred.add_argument("--remove", action="store_true", help="remove it")
    deferred.add_argument("--json", action="store_true", help="print JSON")

    tune = add("tune", "find out how a model runs fastest here, and remember it")
    _add_tune(tune)
    return parser


def _add_route(route: argparse.ArgumentParser) -> None:
    words = "a prompt (- for standard input); `tasks -o FILE`: write tasks with known answers; `calibrate FILE`"
    route.add_argument("words", metavar="PROMPT", nargs="*", help=words)
    route.add_argument("--check", action="store_true", help="only check the policy (PROMPT is its file, or --policy)")
    route.add_argument("--model", metavar="REF", help="the model that answers here (default: the only one)")
    _add_device(route)
    _add_memory_budget(route)
    _add_policy(route)
    route.add_argument("--answer", action="store_true", help="have it answered too, and show what was decided then")
    route.add_argument("--header", action="append", metavar="NAME=VALUE", help="as if the request had it")
    route.add_argument("--metadata", action="append", metavar="NAME=VALUE", help="likewise")
    route.add_argument("--field", action="append", metavar="NAME=VALUE", help="likewise")
    route.add_argument("--max-tokens", type=int, metavar="N", help="likewise")
    route.add_argument("--json", action="store_true", help="print JSON")
    route.add_argument("--count", type=int, metavar="N", default=720, help="tasks: of each half (default: 720)")
    route.add_argument("--seed", type=int, metavar="N", default=0, help="tasks: others with another seed")
    route.add_argument("-o", "--output", metavar="FILE", help="of tasks; calibrate: default calibration.json")
    wanted = route.add_mutually_exclusive_group()
    wanted.add_argument("--remote-share", type=float, metavar="S", help="calibrate: at most so much may go elsewhere")
    wanted.add_argument("--quality", type=float, metavar="Q", help="calibrate: keep so much of the remote's quality")
    route.add_argument("--html", metavar="FILE", help="calibrate: write a report with plots")


def _add_tune(tune: argparse.ArgumentParser) -> None:
    tune.add_argument("ref", metavar="REF", help=REFERENCE_HELP)
    _add_device(tune)
    _add_weights(tune)
    _add_workload(tune, "one", "tune for one stream, many, or long prompts")
    tune.add_argument("--prompt-tokens", type=int, metavar="N", help="default: 512; four times as many for long")
    tune.add_argument("--new-tokens", type=int, metavar="N", help="default: 64; 32 for long")
    tune.add_argument("--time-limit", type=float, metavar="S", default=300.0, help="seconds (default: 300)")
    _add_memory_budget(tune)
    tune.add_argument(
        "--allow-int8-kv",
        action="store_true",
        help="also try a KV cache of 8 bits, which is smaller and may be faster, but changes some answers",
    )
    tune.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_bench(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("ref", metavar="REF", nargs="?", help=f"{REFERENCE_HELP}; none with --url")
    bench.add_argument("--prompt-tokens", type=int, metavar="N", help="default: 512")
    bench.add_argument("--new-tokens", type=int, metavar="N", help="default: 64")
    bench.add_argument("--concurrency", type=int, metavar="N", help="streams at once (default: 1)")
    bench.add_argument("--seed", type=int, metavar="N", help="of prompts and arrivals (default: 0)")
    bench.add_argument("--json", action="store_true", help="print JSON instead of a table")
    bench.add_argument("--output", metavar="FILE", help="write the JSON to a file too")
    bench.add_argument("--html", metavar="FILE", help="write a report with plots")
    bench.add_argument("--compare", metavar="FILE", help="ratios to an earlier measurement's JSON")
    here = bench.add_argument_group("a model here")
    for add in (_add_device, _add_weights, _add_loading):
        add(here)
    here.add_argument(
        "--every-device",
        action="store_true",
        default=None,
        help="measure all devices that auto may choose, with one stream, many and long prompts; auto then goes by it",
    )
    here.add_argument("--repeats", type=int, metavar="N", help="measured rounds, after one to warm up (default: 5)")
    here.add_argument("--shared-prefix", type=int, metavar="N", help="also: first token after N tokens known already")
    here.add_argument(
        "--copy", action="store_true", default=None, help="also: answers that repeat their prompt, with prompt lookup"
    )
    here.add_argument("--no-nll", dest="nll", action="store_false", default=None, help="do not score the bundled text")
    server = bench.add_argument_group("a server")
    server.add_argument("--url", help="any OpenAI-compatible server, as http://127.0.0.1:8000")
    server.add_argument("--model", metavar="NAME", help="default: the only one it has")
    server.add_argument(
        "--chat", action="store_true", default=None, help="ask /v1/chat/completions, not /v1/completions"
    )
    server.add_argument("--api-key", metavar="KEY", help="the server's")
    server.add_argument("--requests", type=int, metavar="N", help="default: 20, or 5 for each of --concurrency")
    server.add_argument("--rate", type=float, metavar="R", help="Poisson arrivals, R requests a second on average")
    server.add_argument("--goodput", nargs="+", metavar="LIMIT", help="count requests within ttft:MS and tpot:MS")


def _add_device(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--device", metavar="DEVICE", help="auto, cpu, gpu, npu, cuda, coreml, or engine:device as in openvino:cpu"
    )


def _add_fallback(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fallback",
        action="store_true",
        default=None,
        help="where --device cannot be used, or fails, go on with a device of auto",
    )


def _add_engine(parser: argparse.ArgumentParser, default: str | None, help: str) -> None:
    choices = ("onnx", "onnx-coreml", "onnx-cuda", "onnx-edge", "openvino", "openvino-npu", "all")
    parser.add_argument("--engine", choices=choices, default=default, help=help)


def _add_weights(parser: argparse._ActionsContainer, auto: bool = False) -> None:
    help, choices = "weight format (default: int4)", ["fp32", "fp16", "int8", "int4"]
    if auto:
        help += "; auto: the smallest here that keeps the answers, or a smaller one that fits"
        choices.append("auto")
    parser.add_argument("--weights", choices=choices, help=help)


def _add_prefixes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt-lookup",
        action="store_true",
        default=None,
        help="draft tokens from what was said before: faster where an answer repeats its prompt",
    )
    _add_prefix_store(parser)


def _add_prefix_store(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--prefix-store", metavar="SIZE", help="disk for what prompts leave in the KV cache; 0: none (default: 1GiB)"
    )


def _add_workload(
    parser: argparse.ArgumentParser,
    default: str,
    what: str = "choose what bench and tune found fastest here with one stream, many, or long prompts",
) -> None:
    parser.add_argument("--workload", choices=("one", "many", "long"), help=f"{what} (default: {default})")


def _add_policy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", metavar="FILE", help="TOML: which requests other tiers may answer, and how")
    parser.add_argument("--offline", action="store_true", default=None, help="tiers on other machines are off")


def _add_memory_budget(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="most memory to use, e.g. 1GiB, or 25%% of the device's (default: 80%% of what is free)",
    )


def _add_kv_type(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--kv-type",
        choices=("float32", "float16", "int8", "auto"),
        help="type of the KV cache; int8 is half as large as float16; auto: on edge:cpu, int8 for long prompts and "
        "where memory is short (default: the device's choice)",
    )


def _add_max_prompt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-prompt", type=int, metavar="N", help="tokens that NPUs are compiled for; others take all (default: 1024)"
    )


def _add_loading(parser: argparse._ActionsContainer) -> None:
    _add_memory_budget(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="threads that compute (default: the engine's choice)")
    _add_kv_type(parser)
    parser.add_argument(
        "--no-tuning",
        dest="tuning",
        action="store_false",
        default=None,
        help="open the model as it comes, whatever edge-glm tune found",
    )
    parser.add_argument(
        "--batch-invariant",
        action="store_true",
        default=None,
        help="the same answer at temperature 0 whatever else is running or drafted, to the last bit; slower, except "
        "on edge:cpu, where it is so anyway",
    )


if __name__ == "__main__":
    sys.exit(main())
