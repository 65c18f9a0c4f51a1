"""``edge-glm completion``: what a shell completes commands and flags by."""

from __future__ import annotations

import argparse

import shtab

from edge_runtime.cli.parser import make_parser


def completion(arguments: argparse.Namespace) -> int:
    print(shtab.complete(make_parser(), arguments.shell))
    return 0
