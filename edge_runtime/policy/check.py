"""What is wrong with a policy that reads well: contradictions, classes that no request can reach, missing keys."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import urlsplit

from edge_runtime.errors import PolicyError
from edge_runtime.paths import expanded
from edge_runtime.policy.language import known_languages
from edge_runtime.policy.patterns import Pattern, words_pattern
from edge_runtime.policy.rules import (
    UNMATCHED,
    LocalTierSpec,
    Match,
    Policy,
    RemoteTierSpec,
    TaskClass,
)

FIELDS = ("model", "prompt_cache_key", "safety_identifier", "service_tier", "user")
"""Fields of a request that ``match.field`` may name."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
MAX_KEY = 8192
"""Bytes of a file that holds a key."""


def problems(policy: Policy, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Every one, in words; empty: the policy can be used."""
    return [*_tier_problems(policy, environ), *_class_problems(policy), *_other_problems(policy)]


def key_of(tier: RemoteTierSpec, environ: Mapping[str, str] = os.environ) -> str | None:
    """The tier's key. PolicyError if it should have one and it cannot be had; no message ever holds it."""
    if tier.api_key_env is not None:
        key = environ.get(tier.api_key_env, "").strip()
        if not key:
            raise PolicyError(f"tier {tier.name}: the variable {tier.api_key_env} with its key is not set")
    elif tier.api_key_file is not None:
        try:
            with expanded(tier.api_key_file).open("rb") as file:
                key = file.read(MAX_KEY).decode("ascii").strip()
        except (OSError, ValueError) as error:
            decoding = isinstance(error, UnicodeDecodeError)  # which tells of what was read
            why = error.strerror if isinstance(error, OSError) else "not ASCII" if decoding else str(error)
            raise PolicyError(f"tier {tier.name}: its key cannot be read from {tier.api_key_file}: {why}") from None
        if not key:
            raise PolicyError(f"tier {tier.name}: {tier.api_key_file} is empty")
    else:
        return None
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise PolicyError(f"tier {tier.name}: its key is not printable ASCII on one line")
    return key


# --- tiers ------------------------------------------------------------------------------------------------------------


def _tier_problems(policy: Policy, environ: Mapping[str, str]) -> Iterator[str]:
    if not policy.tiers:
        yield "there are no tiers"
    yield from _names("tier", [tier.name for tier in policy.tiers])
    plain = [tier.name for tier in policy.tiers if isinstance(tier, LocalTierSpec) and tier.model is None]
    if len(plain) > 1:
        yield f"tiers {' and '.join(plain)} are the same model; name another with model"
    for tier in policy.tiers:
        if isinstance(tier, LocalTierSpec):
            if tier.model is None and (tier.device, tier.weights, tier.memory_budget) != ("auto", None, None):
                yield f"tier {tier.name} is the model that is opened, whose device and memory are set there"
            continue
        yield from _remote_problems(tier, environ)


def _remote_problems(tier: RemoteTierSpec, environ: Mapping[str, str]) -> Iterator[str]:
    where = f"tier {tier.name}"
    try:
        url = urlsplit(tier.base_url)
        sound = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        bare = not (url.username or url.password or url.query or url.fragment)
    except ValueError:
        sound, bare = False, True
    if not sound:
        yield f"{where}: base_url must be like https://api.example.com/v1, not {tier.base_url!r}"
    elif not bare:
        yield f"{where}: base_url holds a user, password, query or fragment: keys go into api_key_env or api_key_file"
    if not tier.model:
        yield f"{where}: model is empty"
    if tier.api_key_env is not None and tier.api_key_file is not None:
        yield f"{where}: the key is either in api_key_env or in api_key_file"
    try:
        key_of(tier, environ)
    except PolicyError as error:
        yield str(error)
    if tier.ca_file is not None and not expanded(tier.ca_file).is_file():
        yield f"{where}: there is no file {tier.ca_file}"
    positive = {
        "context": tier.context,
        "max_output": tier.max_output,
        "retry.attempts": tier.retry.attempts,
        "breaker.failures": tier.breaker.failures,
        "breaker.cooldown": tier.breaker.cooldown,
        **{f"timeouts.{name}": getattr(tier.timeouts, name) for name in tier.timeouts.__struct_fields__},
    }
    yield from (f"{where}: {name} must be over 0, not {value:g}" for name, value in positive.items() if value <= 0)
    amounts = {"price.input": tier.price.input, "price.output": tier.price.output}
    amounts |= {"retry.base": tier.retry.base, "retry.longest": tier.retry.longest}
    yield from _not_negative(where, amounts)
    if 0 < tier.context <= tier.max_output:
        yield f"{where}: max_output {tier.max_output} leaves no room for a prompt in a context of {tier.context}"


# --- classes ----------------------------------------------------------------------------------------------------------


def _class_problems(policy: Policy) -> Iterator[str]:
    yield from _names("class", [task.name for task in policy.classes])
    if any(task.name == UNMATCHED.name for task in policy.classes):
        yield f"class {UNMATCHED.name} is what no class takes; choose another name"
    for place, task in enumerate(policy.classes):
        yield from _task_problems(policy, task)
        for earlier in policy.classes[:place]:
            if _covers(earlier.match, task.match):
                why = "takes every request" if earlier.match.empty else "takes every request that this one would"
                yield f"class {task.name} is never reached: class {earlier.name} before it {why}"
                break


def _task_problems(policy: Policy, task: TaskClass) -> Iterator[str]:
    where = f"class {task.name}"
    known = {tier.name: tier for tier in policy.tiers}
    tiers = list(known) if task.tiers is None else list(task.tiers)
    if not tiers:
        yield f"{where}: tiers is empty, so nobody could answer"
    for name in tiers:
        if name not in known:
            yield f"{where}: there is no tier {name}; there is {', '.join(known)}"
    if len(set(tiers)) < len(tiers):
        yield f"{where}: a tier is named twice"
    there = [known[name] for name in tiers if name in known]
    remote = [tier.name for tier in there if tier.remote]
    if task.privacy == "local-only":
        if task.tiers is not None and remote:
            yield (
                f"{where}: privacy is local-only (which it is unless said otherwise), but {', '.join(remote)} is "
                "not on this device; set privacy to redact or any, or leave the tier out"
            )
        elif there and len(remote) == len(there):
            yield f"{where}: privacy is local-only, and there is no local tier"
    if task.broken_stream == "continue" and len(remote) == len(there):
        yield f'{where}: broken_stream = "continue" needs a local tier'
    amounts: dict[str, float | None] = {
        "latency.ttft": task.latency.ttft,
        "latency.total": task.latency.total,
        "cost_cap.day": task.cost_cap.day,
        "cost_cap.month": task.cost_cap.month,
        "hold.tokens": task.hold.tokens,
        "hold.ms": task.hold.ms,
        "hedge_ms": task.hedge_ms,
    }
    yield from _not_negative(where, amounts)
    yield from _match_problems(task.match, where)


def _match_problems(match: Match, where: str) -> Iterator[str]:
    for name in match.field:
        if name not in FIELDS:
            yield f"{where}: match.field knows {', '.join(FIELDS)}, not {name}"
    for name in match.header:
        if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name):
            yield f"{where}: {name!r} is no name of a header"
    if match.tokens is not None and (match.tokens.min < 0 or not match.tokens.holds(match.tokens.min)):
        yield f"{where}: no prompt has {match.tokens.min} to {match.tokens.max} tokens"
    if match.keywords is not None and (not match.keywords or not all(word.strip() for word in match.keywords)):
        yield f"{where}: keywords must hold words, or no request matches"
    if match.languages is not None:
        known = known_languages()
        if not known:
            yield f"{where}: languages need CLD2: pip install 'edge-glm[language]'"
        elif not match.languages:
            yield f"{where}: languages is empty, so no request matches"
        else:
            yield from (f"{where}: {each!r} is no language code" for each in match.languages if each not in known)
    try:
        if match.regex is not None:
            Pattern(match.regex, f"{where}: regex")
        if match.keywords:
            words_pattern(match.keywords, f"{where}: keywords")
    except PolicyError as error:
        yield str(error)


def _covers(earlier: Match, later: Match) -> bool:
    """Whether ``earlier`` takes every request that ``later`` takes, as far as one can tell from their conditions."""
    for name in ("field", "metadata", "header"):
        if not getattr(earlier, name).items() <= getattr(later, name).items():
            return False
    for name in ("regex", "tools", "schema"):
        wanted = getattr(earlier, name)
        if wanted is not None and wanted != getattr(later, name):
            return False
    for name in ("keywords", "languages"):
        wanted = getattr(earlier, name)
        if wanted is not None and not set(getattr(later, name) or ["\0"]) <= set(wanted):
            return False
    if earlier.tokens is None:
        return True
    if later.tokens is None:
        return False
    highest = later.tokens.max
    return earlier.tokens.min <= later.tokens.min and (
        earlier.tokens.max is None or (highest is not None and highest <= earlier.tokens.max)
    )


# --- the rest ---------------------------------------------------------------------------------------------------------


def _other_problems(policy: Policy) -> Iterator[str]:
    yield from _not_negative("caps", {"day": policy.caps.day, "month": policy.caps.month})
    bounds = policy.deferred
    yield from _not_negative("deferred", {"max_count": bounds.max_count, "max_bytes": bounds.max_bytes})
    if bounds.max_age_hours <= 0:
        yield f"deferred: max_age_hours must be over 0, not {bounds.max_age_hours:g}"
    threshold = policy.routing.threshold
    if threshold is not None and not 0 <= threshold <= 1:
        yield f"routing: threshold is a probability, not {threshold:g}"
    if not 2 <= policy.routing.forks <= 8 or not 1 <= policy.routing.fork_tokens <= 64:
        yield "routing: forks must be 2 to 8, fork_tokens 1 to 64"
    for pattern in policy.privacy.patterns:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9]{0,31}", pattern.name):
            yield f"privacy: the pattern's name {pattern.name!r} must be letters and digits"
        try:
            Pattern(pattern.regex, f"privacy: pattern {pattern.name}")
        except PolicyError as error:
            yield str(error)
    region = policy.privacy.phone_region
    if region is not None and not re.fullmatch(r"[A-Z]{2}", region):
        yield f"privacy: phone_region is a country such as DE, not {region!r}"


def _names(what: str, names: Sequence[str]) -> Iterator[str]:
    for name in names:
        if not _NAME.fullmatch(name):
            yield f"{what} {name[:80]!r}: a name has lower-case letters, digits, '.', '_' and '-'"
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"{what} {name} is there twice"


def _not_negative(where: str, amounts: Mapping[str, float | None]) -> Iterator[str]:
    for name, value in amounts.items():
        if value is not None and not 0 <= value < float("inf"):
            yield f"{where}: {name} must not be negative, but is {value:g}"
