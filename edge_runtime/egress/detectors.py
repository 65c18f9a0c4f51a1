"""Where in a text there is something that should not leave: each kind by its form, and where it has one, its checksum.

All patterns are RE2's (:mod:`edge_runtime.policy.patterns`), so that no text makes them slow.
"""

from __future__ import annotations

import ipaddress
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from edge_runtime.policy.patterns import Pattern


class Span(NamedTuple):
    """``text[start:end]`` is of ``kind``."""

    start: int
    end: int
    kind: str


Detector = Callable[[str], Iterator[Span]]


def detectors(patterns: Sequence[tuple[str, str]] = (), phone_region: str | None = None) -> list[Detector]:
    """The built-in ones and ``patterns`` (kind, RE2). PolicyError for a pattern that is none."""
    found: list[Detector] = [_by_form(kind, source, check) for kind, source, check in _FORMS]
    found += [_by_form(kind.upper(), source, _any) for kind, source in patterns]
    return [*found, _phones(phone_region)]


def find(text: str, by: Sequence[Detector]) -> list[Span]:
    """What ``by`` finds, left to right; what overlaps is one span, of the kind that begins first and is longest."""
    spans = sorted((span for detector in by for span in detector(text)), key=lambda span: (span.start, -span.end))
    joined: list[Span] = []
    for span in spans:
        if joined and span.start < joined[-1].end:
            joined[-1] = joined[-1]._replace(end=max(joined[-1].end, span.end))
        else:
            joined.append(span)
    return joined


def _by_form(kind: str, source: str, check: Callable[[str], int]) -> Detector:
    """``check``: how many characters of a match count; 0: none."""
    pattern = Pattern(source, f"privacy: {kind}")

    def detector(text: str) -> Iterator[Span]:
        for start, end in pattern.spans(text):
            length = check(text[start:end])
            if length:
                yield Span(start, start + length, kind)

    return detector


# --- checks -----------------------------------------------------------------------------------------------------------


def _any(text: str) -> int:
    return len(text)


def _card(text: str) -> int:
    """Luhn's sum (ISO/IEC 7812-1)."""
    digits = [int(each) for each in text if each.isdigit()]
    if not 13 <= len(digits) <= 19 or len(set(digits)) == 1:
        return 0
    doubled = [each if place % 2 == 0 else sum(divmod(2 * each, 10)) for place, each in enumerate(reversed(digits))]
    return len(text) if sum(doubled) % 10 == 0 else 0


def _iban(text: str) -> int:
    """The longest part that ends at a character of it and whose remainder mod 97 is 1 (ISO 13616)."""
    for end in range(len(text), 14, -1):
        compact = text[:end].replace(" ", "").replace("-", "").upper()
        if text[end - 1].isalnum() and 15 <= len(compact) <= 34:
            moved = compact[4:] + compact[:4]
            if int("".join(str(int(each, 36)) for each in moved)) % 97 == 1:
                return end
    return 0


def _address(text: str) -> int:
    """An address; without a digit it is a name in some programming language."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return 0
    return len(text) if any(map(str.isdigit, text)) else 0


def _place(text: str) -> int:
    """Degrees of latitude and longitude, in this order or the other."""
    numbers = [float(each) for each in text.replace(",", " ").replace(";", " ").split() if any(map(str.isdigit, each))]
    return len(text) if len(numbers) == 2 and min(map(abs, numbers)) <= 90 and max(map(abs, numbers)) <= 180 else 0


def _random(text: str) -> int:
    """Looks like a key: letters and digits mixed, and no word of any language spends so many bits on a character."""
    if not (any(map(str.isdigit, text)) and any(map(str.isupper, text)) and any(map(str.islower, text))):
        return 0
    entropy = -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())
    return len(text) if entropy > 3.7 else 0


_SECRETS = (
    r"sk-[A-Za-z0-9_-]{16,}",  # OpenAI, Anthropic and others
    r"gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,}",
    r"hf_[A-Za-z0-9]{20,}|xox[abeoprs]-[A-Za-z0-9-]{10,}|AIza[A-Za-z0-9_-]{30,}|(?:AKIA|ASIA)[A-Z0-9]{16}",
    r"eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*",  # a JSON Web Token
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?s:.*?)(?:-----END [A-Z ]*PRIVATE KEY-----|\z)",
    r"[Bb]earer [A-Za-z0-9._~+/=-]{8,}",
    r"[a-z][a-z0-9+.-]{1,20}://[^/\s:@]+:[^/\s@]+@",  # a password in a URL
)
_FORMS: tuple[tuple[str, str, Callable[[str], int]], ...] = (
    ("KEY", "|".join(_SECRETS), _any),
    ("KEY", r"\b[A-Za-z0-9_+/=-]{24,}", _random),
    ("EMAIL", r"[\pL\pN._%+'-]+@[\pL\pN-]+(?:\.[\pL\pN-]+)+", _any),
    ("IBAN", r"\b[A-Za-z]{2}\d{2}(?:[ -]?[A-Za-z0-9]){11,30}\b", _iban),
    ("CARD", r"\b\d(?:[ -]?\d){12,18}\b", _card),
    ("IP", r"\b\d{1,3}(?:\.\d{1,3}){3}\b", _address),
    ("IP", r"\b[0-9A-Fa-f]{1,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?:\.\d{1,3}){0,3}", _address),
    ("PLACE", r"[-+]?\d{1,3}\.\d{3,}(?:\s*[,;]\s*|\s+)[-+]?\d{1,3}\.\d{3,}", _place),
    (
        "PLACE",
        r"\d{1,3}(?:\.\d+)?\s?°(?:\s?\d{1,2}(?:\.\d+)?\s?['′])?(?:\s?\d{1,2}(?:\.\d+)?\s?(?:\"|″|''))?\s?[NSEWO]\b",
        _any,
    ),
)


def _phones(region: str | None) -> Detector:
    def detector(text: str) -> Iterator[Span]:
        if sum(character.isdigit() for character in text) < 6:
            return
        import phonenumbers  # late: 20 ms

        for match in phonenumbers.PhoneNumberMatcher(text, region):
            yield Span(match.start, match.end, "PHONE")

    return detector
