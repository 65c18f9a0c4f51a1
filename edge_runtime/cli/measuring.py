"""Flags of the commands that measure: bench, profile and tune."""

from __future__ import annotations

import argparse

from edge_runtime.cli.arguments import (
    REFERENCE_HELP,
    add_device,
    add_loading,
    add_memory_budget,
    add_weights,
    add_workload,
)


def add_bench(bench: argparse.ArgumentParser) -> None:
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
    for add in (add_device, add_weights, add_loading):
        add(here)
    here.add_argument(
        "--every-device",
        action="store_true",
        default=None,
        help="measure all devices that auto may choose, with one stream, many and long prompts; auto then goes by it",
    )
    here.add_argument(
        "--ladder",
        action="store_true",
        default=None,
        help="from an unfused fp32 graph over int8 and int4 to prefix reuse: latency, memory, agreement of each step",
    )
    here.add_argument("--int4", metavar="REF", help="of a ladder, a package made by a recipe for the steps in int4")
    here.add_argument("--draft", metavar="REF", help="of a ladder, the last step: a smaller model that drafts")
    here.add_argument("--draft-device", metavar="DEVICE", help="where it runs (default: as the model)")
    here.add_argument(
        "--repeats", type=int, metavar="N", help="measured rounds, after one to warm up (default: 5; of a ladder 3)"
    )
    here.add_argument("--shared-prefix", type=int, metavar="N", help="also: first token after N tokens known already")
    here.add_argument(
        "--copy", action="store_true", default=None, help="also: answers that repeat their prompt, with prompt lookup"
    )
    here.add_argument("--no-nll", dest="nll", action="store_false", default=None, help="do not score the bundled text")
    here.add_argument(
        "--no-timing",
        dest="timing",
        action="store_false",
        default=None,
        help="do not time single requests of several lengths, which plan and the router go by",
    )
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


def add_profile(profile: argparse.ArgumentParser) -> None:
    profile.add_argument("ref", metavar="REF", help=REFERENCE_HELP)
    for add in (add_device, add_weights, add_loading):
        add(profile)
    profile.add_argument("--prompt-tokens", type=int, metavar="N", help="default: 512")
    profile.add_argument("--new-tokens", type=int, metavar="N", help="default: 64")
    profile.add_argument("--concurrency", type=int, metavar="N", help="requests at once (default: 1)")
    profile.add_argument("--requests", type=int, metavar="N", default=20, help="after those to warm up (default: 20)")
    profile.add_argument("--seed", type=int, metavar="N", help="of prompts (default: 0)")
    profile.add_argument("--json", action="store_true", help="print JSON instead of tables")
    profile.add_argument(
        "--html",
        metavar="FILE",
        help="the report, with flame charts and memory over time (default: profile.html; with --json none)",
    )


def add_tune(tune: argparse.ArgumentParser) -> None:
    tune.add_argument("ref", metavar="REF", help=REFERENCE_HELP)
    add_device(tune)
    add_weights(tune)
    add_workload(tune, "one", "tune for one stream, many, or long prompts")
    tune.add_argument("--prompt-tokens", type=int, metavar="N", help="default: 512; four times as many for long")
    tune.add_argument("--new-tokens", type=int, metavar="N", help="default: 64; 32 for long")
    tune.add_argument("--time-limit", type=float, metavar="S", default=300.0, help="seconds (default: 300)")
    add_memory_budget(tune)
    tune.add_argument(
        "--allow-int8-kv",
        action="store_true",
        help="also try a KV cache of 8 bits, which is smaller and may be faster, but changes some answers",
    )
    tune.add_argument("--json", action="store_true", help="print JSON instead of a table")
