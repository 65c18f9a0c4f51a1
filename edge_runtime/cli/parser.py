"""What can be said on the command line."""

from __future__ import annotations

import argparse
from typing import Any

from edge_runtime.cli.arguments import (
    REFERENCE_HELP,
    WEIGHTS,
    add_device,
    add_draft,
    add_engine,
    add_fallback,
    add_kv_type,
    add_loading,
    add_max_prompt,
    add_memory_budget,
    add_policy,
    add_prefix_store,
    add_prefixes,
    add_step_timeout,
    add_weights,
    add_workload,
)
from edge_runtime.cli.measuring import add_bench, add_profile, add_tune


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


def make_parser() -> argparse.ArgumentParser:
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
    add_device(pull)
    add_engine(pull, default=None, help="prepare it for this engine (default: the one that --device picks)")
    add_weights(pull)

    export = add("export", "make a model package in a folder of your choice")
    export.add_argument("source", metavar="SRC", help=REFERENCE_HELP)
    export.add_argument("-o", "--output", required=True, metavar="DIR", help="the package; variants are added to one")
    add_engine(export, default="all", help="default: all")
    add_weights(export)
    _add_recipe(export)

    run = add("run", "answer a prompt, or chat")
    run.add_argument("ref", metavar="REF", help=REFERENCE_HELP)
    run.add_argument("prompt", metavar="PROMPT", nargs="?", help="- or none: standard input; on a terminal: a chat")
    add_device(run)
    add_fallback(run)
    add_weights(run, auto=True)
    add_loading(run)
    add_step_timeout(run)
    add_max_prompt(run)
    add_prefixes(run)
    add_workload(run, "one")
    add_policy(run)
    run.add_argument("--system", metavar="TEXT", help="system message")
    run.add_argument("--max-tokens", type=int, metavar="N", help="longest answer (default: to the end of the context)")
    run.add_argument("--temperature", type=float, metavar="T", help="0: always the likeliest token")
    run.add_argument("--seed", type=int, metavar="N", help="same seed, same answer")

    serve = add("serve", "serve models over OpenAI's and Ollama's HTTP APIs")
    serve.add_argument(
        "refs",
        metavar="REF",
        nargs="*",
        help=f"{REFERENCE_HELP}; several, encoders too (default: the only one)",
    )
    add_device(serve)
    add_fallback(serve)
    add_weights(serve, auto=True)
    add_loading(serve)
    add_step_timeout(serve)
    add_max_prompt(serve)
    add_prefixes(serve)
    add_workload(serve, "many")
    add_policy(serve)
    serve.add_argument("--host", metavar="ADDRESS", help="default: 127.0.0.1")
    serve.add_argument("--port", type=int, metavar="N", help="default: 8000")
    serve.add_argument(
        "--on-demand",
        action="store_true",
        default=None,
        help="offer all models of this machine, opened when somebody asks (so it is too when there is none named)",
    )
    serve.add_argument(
        "--also-on",
        metavar="DEVICE",
        action="append",
        help="offer the named models on this device too, as NAME@DEVICE, opened when somebody asks",
    )
    serve.add_argument(
        "--keep-alive", metavar="TIME", help="that such a one stays open unused (default: 5m; -1: for ever)"
    )
    serve.add_argument(
        "--otel",
        action="store_true",
        default=None,
        help="send where time goes by OTLP, to OTEL_EXPORTER_OTLP_ENDPOINT (default: this machine, port 4318)",
    )
    _add_limits(serve)

    ps = add("ps", "list the models that a server has open")
    ps.add_argument("--requests", action="store_true", help="list its newest requests, and where their time went")
    ps.add_argument("--limit", type=int, metavar="N", help="of them (default: 20; for --chrome all that are kept)")
    ps.add_argument("--chrome", metavar="FILE", help="write their spans, as JSON, to a file for ui.perfetto.dev")
    ps.add_argument("--json", action="store_true", help="print JSON")
    stop = add("stop", "have a server close a model that it opened on demand")
    stop.add_argument("model", metavar="NAME", help="as `edge-glm ps` calls it")
    slo = add("slo", "show which requests to a server met the latency that their class wants, and why others did not")
    slo.add_argument("--json", action="store_true", help="print JSON")
    for each in (ps, stop, slo):
        each.add_argument("--url", help="default: http://127.0.0.1:8000, or as host and port are set")
        each.add_argument("--api-key", metavar="KEY", help="the server's; better set EDGE_GLM_API_KEY")

    batch = add("batch", "answer a file of requests in OpenAI's batch format")
    batch.add_argument("requests", metavar="IN", help="a request a line: custom_id, url and body")
    batch.add_argument("answers", metavar="OUT", help="an answer a line, in that order; goes on where it was ended")
    batch.add_argument("--model", metavar="REF", help="answer all with this one (default: as each body says)")
    add_device(batch)
    add_fallback(batch)
    add_weights(batch, auto=True)
    add_loading(batch)
    add_step_timeout(batch)
    add_max_prompt(batch)
    add_prefixes(batch)
    add_workload(batch, "many")

    key = add("key", "make, list and remove API keys of the server here")
    key.add_argument("action", choices=["add", "list", "rm"], help="a running server learns of it at once")
    key.add_argument("name", metavar="NAME", nargs="?", help="whose key it is")
    key.add_argument("--rate-limit", type=int, metavar="N", help="add: requests a minute (default: as serve says)")
    key.add_argument("--json", action="store_true", help="list: print JSON")

    config = add("config", "show every setting, and where its value is from")
    config.add_argument("action", choices=["show"], nargs="?", default="show")
    config.add_argument("--json", action="store_true", help="print JSON")

    completion = add("completion", "print what a shell completes commands and flags by")
    completion.add_argument(
        "shell", choices=["bash", "zsh", "tcsh"], help='as in: eval "$(edge-glm completion bash)" in ~/.bashrc'
    )

    listing = add("list", "list the models on this machine")
    listing.add_argument("--json", action="store_true", help="print JSON")

    show = add("show", "show what a model is")
    show.add_argument("ref", metavar="REF", help="a name from `edge-glm list`, or a reference")
    show.add_argument("--verify", action="store_true", help="check the hash of every file")
    show.add_argument("--json", action="store_true", help="print the manifest")
    show.add_argument("--html", metavar="FILE", help="write a report of what was pruned, with heat maps")

    remove = add("rm", "remove a model from this machine")
    remove.add_argument("ref", metavar="REF", help="a name from `edge-glm list`, or a reference")

    devices = add("devices", "list devices, and why one cannot be used")
    devices.add_argument("--json", action="store_true", help="print JSON")

    plan = add("plan", "show what memory and time a model takes on each device, and what fits a budget")
    plan.add_argument("ref", metavar="REF", help=REFERENCE_HELP)
    add_device(plan)
    add_weights(plan, auto=True)
    add_memory_budget(plan)
    add_kv_type(plan)
    add_prefix_store(plan)
    add_workload(plan, "one")
    add_draft(plan)
    plan.add_argument("--context", type=int, metavar="N", help="tokens of each sequence (default: what fits)")
    plan.add_argument("--sequences", type=int, metavar="N", help="sequences of so many tokens at once (default: 1)")
    plan.add_argument("--prompt", type=int, metavar="N", default=512, help="how long would so many tokens take? (512)")
    plan.add_argument("--new-tokens", type=int, metavar="N", default=128, help="and an answer of so many? (128)")
    plan.add_argument("--json", action="store_true", help="print JSON")

    bench = add("bench", "measure a model here, or a server")
    add_bench(bench)

    profile = add("profile", "show where the time and the memory of requests go, down to the engine's operators")
    add_profile(profile)

    route = add("route", "say which tier a prompt goes to and why; check a policy; calibrate for a model")
    _add_route(route)

    ledger = add("ledger", "show, verify or export what has left this device")
    ledger.add_argument("action", choices=("show", "verify", "export"))
    ledger.add_argument("--last", type=int, metavar="N", help="the newest N rows only (show: 20)")
    ledger.add_argument("--head", metavar="HASH", help="verify: a hash that was the last once, and must be there")
    ledger.add_argument("--output", metavar="FILE", help="export: JSON lines (default: standard output)")
    ledger.add_argument("--json", action="store_true", help="show: print JSON")

    deferred = add("deferred", "list requests that are answered later, show or remove one")
    deferred.add_argument("id", metavar="ID", nargs="?", help="show this one")
    deferred.add_argument("--remove", action="store_true", help="remove it")
    deferred.add_argument("--json", action="store_true", help="print JSON")

    evaluate = add("eval", "measure how faithful a model is to another, on texts")
    evaluate.add_argument("ref", metavar="REF", help=REFERENCE_HELP)
    evaluate.add_argument("--reference", metavar="REF2", help="the model that it should be like, as a wider export")
    evaluate.add_argument("--text", metavar="FILE", nargs="+", help="UTF-8 texts (default: three that come along)")
    add_device(evaluate)
    add_weights(evaluate)
    evaluate.add_argument("--reference-device", metavar="DEVICE", help="default: as --device")
    evaluate.add_argument("--reference-weights", choices=WEIGHTS, help="the reference's format, where it has several")
    evaluate.add_argument("--json", action="store_true", help="print JSON")

    tune = add("tune", "find out how a model runs fastest here, and remember it")
    add_tune(tune)
    return parser


def _add_recipe(export: argparse.ArgumentParser) -> None:
    recipe = export.add_argument_group(
        "smaller by a recipe", "rounding is for int4: what a 4-bit source has is rounded anew where it has another form"
    )
    recipe.add_argument(
        "--method",
        choices=("nearest", "gptq", "awq", "awq+gptq"),
        help="round each weight by itself, make errors good by later ones, scale up inputs that matter, or both",
    )
    recipe.add_argument("--group", type=int, metavar="N", help="columns that share a scale: 16 to 128 (default: 32)")
    recipe.add_argument("--symmetric", action="store_true", default=None, help="no zero points")
    recipe.add_argument("--embedding-bits", type=int, choices=(4, 8), help="of embedding and head (default: 8)")
    recipe.add_argument(
        "--bits",
        type=float,
        metavar="B",
        help="bits a weight on average: what suffers most has 8 (or 16, for the engines "
        "onnx-edge and onnx-cuda), as many as fit",
    )
    recipe.add_argument(
        "--activation-bits",
        type=int,
        choices=(8, 16),
        help="to which onnx-edge rounds what meets 4-bit matrices (default: 8; 16 loses nothing, and takes longer)",
    )
    recipe.add_argument(
        "--prune",
        metavar="WHAT",
        help="cut out, and refit what is left: heads=SHARE, mlp=SHARE, layers=N, vocab=FILE (keep the tokens of a "
        "text, or of script:latin), or until bytes=SHARE or latency=SHARE are left or loss=NATS is reached; commas "
        "between; any weights",
    )
    recipe.add_argument("--calibrate", metavar="FILE", help="a text to learn from (default: one that comes along)")


def _add_route(route: argparse.ArgumentParser) -> None:
    words = "a prompt (- for standard input); `tasks -o FILE`: write tasks with known answers; `calibrate FILE`"
    route.add_argument("words", metavar="PROMPT", nargs="*", help=words)
    route.add_argument("--check", action="store_true", help="only check the policy (PROMPT is its file, or --policy)")
    route.add_argument("--model", metavar="REF", help="the model that answers here (default: the only one)")
    add_device(route)
    add_memory_budget(route)
    add_policy(route)
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


def _add_limits(serve: argparse.ArgumentParser) -> None:
    door = serve.add_argument_group("who may ask, and how much")
    door.add_argument(
        "--api-key", metavar="KEY", help="ask clients for this key; better set EDGE_GLM_API_KEY, or edge-glm key add"
    )
    door.add_argument(
        "--allow-open", action="store_true", default=None, help="let other machines ask though there is no key"
    )
    door.add_argument("--rate-limit", type=int, metavar="N", help="requests a minute of each key, or address")
    door.add_argument("--max-body", metavar="SIZE", help="of a request (default: 8MiB)")
    door.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer (default: what the context holds)")
    door.add_argument(
        "--cors", metavar="ORIGIN", action="append", help="let web pages of this origin ask, as https://app.example"
    )
