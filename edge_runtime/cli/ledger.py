"""``edge-glm ledger``: what has left this device."""

from __future__ import annotations

import argparse
import base64
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from edge_runtime.columns import columns
from edge_runtime.egress.ledger import Ledger, money
from edge_runtime.errors import LedgerError
from edge_runtime.paths import home


def ledger(arguments: argparse.Namespace) -> int:
    path = home().ledger
    if not path.is_file():
        print("nothing has left this device: there is no ledger", file=sys.stderr)
        if arguments.json:
            print("[]")
        return 0
    kept = Ledger(path)
    try:
        return {"show": _show, "verify": _verify, "export": _export}[arguments.action](kept, arguments)
    finally:
        kept.close()


def _show(kept: Ledger, arguments: argparse.Namespace) -> int:
    rows = list(kept.rows(arguments.last or 20))
    if arguments.json:
        print(json.dumps([_plain(row) for row in rows], indent=2, ensure_ascii=False))
        return 0
    cells = [["row", "time", "event", "tier", "class", "bytes", "tokens", "cost", "outcome"]]
    for row in rows:
        when = datetime.fromtimestamp(row["time"]).strftime("%Y-%m-%d %H:%M:%S")
        size = row["bytes_out"] if row["event"] == "sent" else row["bytes_in"]
        tokens = "" if row["prompt_tokens"] is None else f"{row['prompt_tokens']}+{row['completion_tokens']}"
        cost = f"≤{money(row['cost'])}" if row["event"] == "sent" else money(row["cost"])
        outcome = row["outcome"] or f"sha256 {row['sha256'][:16]}…"
        cells.append([str(row["seq"]), when, row["event"], row["tier"], row["class"], str(size), tokens, cost, outcome])
    print(columns(cells, "rllllrrrl", head=True))
    return 0


def _verify(kept: Ledger, arguments: argparse.Namespace) -> int:
    wrong = kept.verify(arguments.head)
    if wrong:
        raise LedgerError("; ".join(wrong))
    print(f"the chain is whole; its last hash is {kept.head}")
    return 0


def _export(kept: Ledger, arguments: argparse.Namespace) -> int:
    rows = (json.dumps(_plain(row), ensure_ascii=False) + "\n" for row in kept.rows(arguments.last))
    if arguments.output is None:
        sys.stdout.writelines(rows)
        return 0
    with Path(arguments.output).open("w", encoding="utf-8") as file:
        file.writelines(rows)
    return 0


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    content = row["content"]
    return {**row, "content": None if content is None else base64.b64encode(content).decode()}
