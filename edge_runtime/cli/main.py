"""The command line: the one place where errors become a line and an exit code.

Imports here stay light, so that ``--help`` and mistakes answer at once; each command imports what it needs.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module

from edge_runtime.cli.parser import make_parser

OK, FAILED, INTERRUPTED, BROKEN_PIPE = 0, 1, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 (error), 2 (usage), 130 (Ctrl-C)."""
    arguments = make_parser().parse_args(argv)
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
    text = _printable(" ".join(str(error).split()))
    if isinstance(error, EdgeError):
        print(f"edge-glm: {text}", file=sys.stderr)
    else:
        print(f"edge-glm: internal error, {type(error).__name__}: {text} (--verbose shows where)", file=sys.stderr)
    return FAILED


def _printable(text: str) -> str:
    """What is quoted may be a file's or a server's, and must not steer the terminal."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


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
        "key": ("key", "key"),
        "ps": ("remote", "ps"),
        "stop": ("remote", "stop"),
        "config": ("config", "config"),
        "completion": ("completion", "completion"),
        "batch": ("batch", "batch"),
        "devices": ("devices", "devices"),
        "plan": ("plan", "plan"),
        "bench": ("bench", "bench"),
        "tune": ("tune", "tune"),
        "eval": ("evaluate", "evaluate_model"),
        "route": ("route", "route"),
        "ledger": ("ledger", "ledger"),
        "deferred": ("deferred", "deferred"),
    }[name]
    command: Callable[[argparse.Namespace], int] = getattr(import_module(f"edge_runtime.cli.{module}"), function)
    return command


if __name__ == "__main__":
    sys.exit(main())
