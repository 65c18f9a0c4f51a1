"""A tuning, for people at a terminal."""

from __future__ import annotations

from edge_runtime.tuning.records import Run, Setup, Verdict


def table(run: Run) -> str:
    """Each lever with what was tried, what it gained, and what is used from now on."""
    shape = run.shape
    lines = [
        f"{run.model} {run.weights}, {shape.prompt_tokens} prompt tokens, {shape.new_tokens} new, "
        f"{shape.concurrency} at once; trials: {len(run.trials)}",
        "",
    ]
    rows = [("lever", "from", "to", "gain", "")]
    rows += [_row(each) for each in run.verdicts]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines += [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows
    ]
    lines += [f"{each.lever}, {each.setup}: {each.why}" for each in run.verdicts if each.why is not None]
    lines += ["", "gain: how many times as fast, and between which bounds with 95 % confidence; * is faster"]
    if run.busy:
        lines.append(
            f"the machine was busy with other work (load average {run.load_average:g}): what is best then, threads "
            "above all, may not be when it is quiet, so tune again then"
        )
    return "\n".join([*lines, conclusion(run)])


def conclusion(run: Run) -> str:
    """What is used from now on, and why."""
    if run.best is not None and run.best != run.default:
        return f"used from now on: {run.best}: {run.gain:.2f} times the default ({run.default})"
    if run.best is not None:
        late = sum(each.outcome == "no time" for each in run.verdicts)
        untried = f"; not tried to the end for want of time: {late} (--time-limit {2 * run.limit_s:g} gives more)"
        return f"nothing is faster than the default beyond the noise: {run.default} stays{untried if late else ''}"
    if run.candidate != run.default:
        return f"no time was left to confirm {run.candidate}, so it is not used; tune again to begin with it"
    return "nothing was decided; what was found before stays"


def _row(verdict: Verdict) -> tuple[str, str, str, str, str]:
    gain = ""
    if verdict.gain is not None:
        gain = f"{verdict.gain:.2f}"
        if verdict.low is not None:
            gain += f" ({verdict.low:.2f} to {verdict.high:.2f})"
    mark = {"won": "*", "lost": "no gain"}.get(verdict.outcome, verdict.outcome)
    return verdict.lever, *_difference(verdict.against, verdict.setup), gain, mark


def _difference(before: Setup, after: Setup) -> tuple[str, str]:
    """Both in words, without what they share."""
    if before.device != after.device:
        return str(before), str(after)
    old, new = before.options.words(), after.options.words()
    left = [", ".join(each for each in ours if each not in theirs) for ours, theirs in ((old, new), (new, old))]
    return left[0] or "default", left[1] or "default"
