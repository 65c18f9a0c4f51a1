"""A stage of one's own: a signal for the router, a check of local answers, and degrees Fahrenheit made Celsius."""

import re

FAHRENHEIT = re.compile(r"(-?\d+(?:\.\d+)?) ?°F")


class Units:
    def signals(self, facts):
        """Questions about units are where this model goes wrong."""
        return {"units": float(bool(re.search(r"\b(convert|fahrenheit|inches|pounds)\b", facts.question.lower())))}

    def problem(self, text, tokens, ended, facts):
        """A temperature below absolute zero is no answer."""
        cold = [value for value in map(float, FAHRENHEIT.findall(text)) if value < -459.67]
        return f"{cold[0]:g} °F is below absolute zero" if cold else None

    def output(self, facts):
        return Celsius()


class Celsius:
    """Holds back what may still become a temperature."""

    def __init__(self):
        self.held = ""

    def add(self, text):
        text = FAHRENHEIT.sub(lambda found: f"{(float(found[1]) - 32) / 1.8:.0f} °C", self.held + text)
        start = re.search(r"-?\d+(\.\d*)? ?°?$", text)
        self.held = text[start.start() :] if start else ""
        return text[: len(text) - len(self.held)]

    def flush(self):
        held, self.held = self.held, ""
        return held
