"""``edge-glm bench`` beside other runtimes on the same model file: medians over interleaved rounds, and ratios.

    python -m tests.bench.peers MODEL.gguf REF --peer-python VENV/bin/python --peer-script bench_peers.py

REF is what edge-glm opens: the same file, or a package made from it. The peers live in a virtual environment of their
own, behind a script that measures one of them, as they convert the model: ``SCRIPT MODEL.gguf --peer NAME
--prompt-tokens N --new-tokens N --streams N [--threads N]`` prints a line of JSON with prefill_tps, decode_tps,
streams_tps, load_s and peak_rss_mb. All take turns within each round, so that what drifts on the machine meets
everyone; a ratio is the median over the rounds of ours / theirs in the same round. Run it alone on the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

Row = Mapping[str, float]
COLUMNS = {
    "prefill_tps": "prefill, tokens/s",
    "decode_tps": "decode, tokens/s",
    "streams_tps": "{streams} streams, tokens/s",
    "load_s": "load, s",
    "start_s": "start to first token, s",
    "peak_rss_mb": "peak memory, MB",
    "nll": "loss",
}


def main() -> None:
    args = _arguments()
    shape = ["--prompt-tokens", args.prompt_tokens, "--new-tokens", args.new_tokens]
    threads = [] if args.threads is None else ["--threads", args.threads]
    runs: dict[str, Callable[[], Row]] = {}
    for device in args.device:
        runs[f"edge-glm {device}"] = partial(ours, args.ref, device, [*shape, *threads], args.streams)
    for peer in args.peer:
        command = [args.peer_python, args.peer_script, args.gguf, "--peer", peer, *shape, "--streams", args.streams]
        runs[peer] = partial(last_json, [*command, *threads])
    rounds = []
    for number in range(args.rounds):
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
        rounds.append({name: run() for name, run in runs.items()})
    print(table(rounds, args.peer, args.streams))


def ours(ref: str, device: str, options: Sequence[object], streams: int) -> Row:
    """One stream and several, in the peers' terms."""
    command = [sys.executable, "-m", "edge_runtime.cli.main", "bench", ref, "--device", device, "--json"]
    one = last_json([*command, *options])
    many = last_json([*command, *options, "--no-nll", "--concurrency", streams])
    return {
        **{name: one[name] for name in ("prefill_tps", "decode_tps", "load_s", "start_s", "nll")},
        "streams_tps": many["decode_tps"],
        "peak_rss_mb": one["peak_rss_bytes"] / 1e6,
    }


def last_json(command: Sequence[object]) -> Row:
    """The JSON object at the end of a command's output. SystemExit if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"failed with exit code {done.returncode}: {' '.join(words)}")
    text = done.stdout.strip()
    found: Row = json.loads(text if text.endswith("\n}") else text.splitlines()[-1])
    return found


def table(rounds: Sequence[Mapping[str, Row]], peers: Sequence[str], streams: int) -> str:
    """Markdown: a row for each runtime, then one for each of ours against each peer."""
    names = list(rounds[0])
    heads = [head.format(streams=streams) for head in COLUMNS.values()]
    lines = [f"| | {' | '.join(heads)} |", f"|---{'|---' * len(heads)}|"]
    for name in names:
        cells = [_cell([each[name].get(column) for each in rounds]) for column in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name in names:
        for peer in peers if name not in peers else ():
            ratios = [_cell([_ratio(each[name].get(c), each[peer].get(c)) for each in rounds]) for c in COLUMNS]
            lines.append(f"| {name} / {peer} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or theirs is None else ours / theirs


def _cell(values: Sequence[float | None]) -> str:
    """Their median; a dash if it was not measured."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    median = statistics.median(known)
    return f"{median:.0f}" if median >= 100 else f"{median:.2f}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("ref", metavar="REF")
    parser.add_argument("--peer-python", required=True, metavar="PATH")
    parser.add_argument("--peer-script", required=True, metavar="PATH")
    parser.add_argument("--peer", nargs="+", default=["llama.cpp", "openvino-genai"], metavar="NAME")
    parser.add_argument("--device", nargs="+", default=["onnxruntime:cpu", "openvino:cpu"])
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="N")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--streams", type=int, default=8, metavar="N")
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {args.rounds}")
    return args


if __name__ == "__main__":
    main()
