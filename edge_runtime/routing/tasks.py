"""Generated tasks with known answers, to calibrate the router for a model: from what it can do to what it cannot.

Each kind of task has two families that look alike to nobody but a human; a calibration is fitted on the one and held to
the other.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Task:
    """``prompt``: one message of a user. ``answer``: what the reply must hold, see :func:`right`."""

    family: str
    split: Split
    prompt: str
    answer: str


def tasks(split: Split, count: int, seed: int = 0) -> Iterator[Task]:
    """``count`` tasks, the families of ``split`` in turns, sizes growing within each."""
    families = [(name, make) for name, (of, make) in _FAMILIES.items() if of == split]
    for number in range(count):
        name, make = families[number % len(families)]
        draw = random.Random(f"{seed} {split} {number}")
        size = 1 + (number // len(families)) % SIZES
        prompt, answer = make(draw, size)
        yield Task(name, split, prompt, answer)


def right(reply: str, answer: str) -> bool:
    """Whether the reply says the answer: its words and numbers in this order, with no other number before the end of
    them, and nothing between; case and punctuation do not matter."""
    said, wanted = _words(reply), _words(answer)
    place = next((i for i in range(len(said)) if said[i : i + len(wanted)] == wanted), None)
    if place is None:
        return False
    if answer.strip().replace(" ", "").isdigit():  # a wrong number first is a wrong answer
        numbers = [word for word in said if word.isdigit()]
        return numbers[-len(wanted) :] == wanted or numbers[: len(wanted)] == wanted
    return True


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+|\d+", text.lower().replace(",", "" if re.fullmatch(r"[\d, ]+", text) else " "))


SIZES = 8
_NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry", "Ivy", "Jack", "Karen", "Liam")
_CITIES = ("Paris", "Oslo", "Rome", "Madrid", "Berlin", "Lima", "Cairo", "Tokyo", "Dublin", "Vienna", "Prague", "Bern")
_THINGS = ("apple", "chair", "river", "stone", "cloud", "horse", "table", "light", "bread", "clock", "tiger", "plant")
_COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "orange", "purple", "pink", "grey", "silver")


def _addition(draw: random.Random, size: int) -> tuple[str, str]:
    digits = 1 + size // 2
    a, b = (draw.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
    asked = draw.choice(
        (f"What is {a} + {b}?", f"{a} + {b} =", f"Add {a} and {b}.", f"Please compute this sum:\n{a} + {b}")
    )
    return asked, str(a + b)


def _subtraction(draw: random.Random, size: int) -> tuple[str, str]:
    digits = 1 + size // 2
    a, b = sorted((draw.randrange(10 ** (digits - 1), 10**digits) for _ in range(2)), reverse=True)
    return f"Calculate {a} minus {b}.", str(a - b)


def _copy_words(draw: random.Random, size: int) -> tuple[str, str]:
    words = " ".join(draw.choice(_THINGS) for _ in range(2 * size))
    asked = draw.choice((f"Repeat exactly these words: {words}", f'Say "{words}".', f"Copy this text:\n{words}"))
    return asked, words


def _copy_line(draw: random.Random, size: int) -> tuple[str, str]:
    line = " ".join(draw.choice(_NAMES + _COLOURS) for _ in range(2 * size))
    return f'Write the following line again, without any change.\n"{line}"', line


def _address_book(draw: random.Random, size: int) -> tuple[str, str]:
    names, cities = draw.sample(_NAMES, min(size + 1, 9)), draw.sample(_CITIES, min(size + 1, 9))
    form, between = draw.choice(
        (("{} lives in {}.", "\n"), ("{}: {}", ", "), ("- {}, {}", "\n"), ("{} is from {}.", " "))
    )
    listed = between.join(form.format(name, city) for name, city in zip(names, cities, strict=True))
    place = draw.randrange(len(names))
    asked = draw.choice(("In which city does {} live?", "Where is {} from?", "What is the city of {}?"))
    return f"{listed}{draw.choice((' ', chr(10)))}{asked.format(names[place])}", cities[place]


def _price_list(draw: random.Random, size: int) -> tuple[str, str]:
    things = draw.sample(_THINGS, min(size + 1, 9))
    prices = draw.sample(range(11, 99), len(things))
    listed = ", ".join(f"{thing}: {price}" for thing, price in zip(things, prices, strict=True))
    place = draw.randrange(len(things))
    return f"Prices in euros: {listed}. How much is the {things[place]}? Give the number.", str(prices[place])


def _sort_numbers(draw: random.Random, size: int) -> tuple[str, str]:
    numbers = draw.sample(range(1, 60), size + 1)
    ordered = " ".join(map(str, sorted(numbers)))
    asked = draw.choice(
        ("Sort these numbers from smallest to largest:", "Arrange in ascending order:", "Order them:\n")
    )
    return f"{asked} {draw.choice((', ', ' ')).join(map(str, numbers))}", ordered


def _sort_words(draw: random.Random, size: int) -> tuple[str, str]:
    words = draw.sample(_THINGS, size + 1)
    return f"Put these words in alphabetical order: {', '.join(words)}", " ".join(sorted(words))


def _fact(draw: random.Random, size: int) -> tuple[str, str]:
    thing, colour = draw.choice(_THINGS), draw.choice(_COLOURS)
    filler = " ".join(f"The {each} is old." for each in draw.sample([t for t in _THINGS if t != thing], size))
    fact, between = f"The {thing} is {colour}.", draw.choice((" ", "\n"))
    told = draw.choice((f"{fact}{between}{filler}", f"{filler}{between}{fact}"))
    return f"{told}{between}What colour is the {thing}?", colour


def _meeting(draw: random.Random, size: int) -> tuple[str, str]:
    day = draw.choice(("Monday", "Tuesday", "Wednesday", "Thursday", "Friday"))
    name = draw.choice(_NAMES)
    filler = " ".join(f"Bring the {each}." for each in draw.sample(_THINGS, size))
    return f"Note: {name} comes on {day}. {filler} Question: on which day does {name} come?", day


def _steps(draw: random.Random, size: int) -> tuple[str, str]:
    value = draw.randrange(2, 10)
    told = [f"Start with {value}."]
    for _ in range(size):
        amount = draw.randrange(2, 10)
        step, value = draw.choice(
            [(f"Add {amount}.", value + amount), ("Double it.", value * 2), (f"Subtract {amount}.", value - amount)]
        )
        told.append(step)
    between = draw.choice((" Then: ", "\n", " "))
    return f"{between.join(told)}{draw.choice((' ', chr(10)))}What is the result?", str(value)


def _box(draw: random.Random, size: int) -> tuple[str, str]:
    count = draw.randrange(2, 12)
    told = [f"There are {count} balls in a box."]
    for _ in range(size):
        amount = draw.randrange(1, 9)
        name = draw.choice(_NAMES)
        put = draw.random() < 0.5 or amount > count
        told.append(f"{name} {'puts in' if put else 'takes out'} {amount}.")
        count += amount if put else -amount
    return f"{' '.join(told)} How many balls are in the box now?", str(count)


def _room(draw: random.Random, size: int) -> tuple[str, str]:
    room = draw.randrange(100, 999)
    filler = " ".join(f"Bring the {each}." for each in draw.sample(_THINGS, size))
    fact, between = f"The meeting is in room {room}.", draw.choice((" ", "\n"))
    told = draw.choice((f"{fact}{between}{filler}", f"{filler}{between}{fact}"))
    return f"{told}{between}In which room is the meeting?", str(room)


def _temperature(draw: random.Random, size: int) -> tuple[str, str]:
    degrees = draw.randrange(20, 99)
    filler = " ".join(f"The {thing} is {draw.choice(_COLOURS)}." for thing in draw.sample(_THINGS, size))
    return f"Sensor report: the temperature is {degrees} degrees. {filler} What is the temperature?", str(degrees)


def _home(draw: random.Random, size: int) -> tuple[str, str]:
    name, city = draw.choice(_NAMES), draw.choice(_CITIES)
    filler = " ".join(f"{name} has a {each}." for each in draw.sample(_THINGS, size))
    fact, between = f"{name} lives in {city}.", draw.choice((" ", "\n"))
    told = draw.choice((f"{fact}{between}{filler}", f"{filler}{between}{fact}"))
    return f"{told}{between}{draw.choice(('In which city', 'Where'))} does {name} live?", city


def _journey(draw: random.Random, size: int) -> tuple[str, str]:
    name, city = draw.choice(_NAMES), draw.choice(_CITIES)
    filler = " ".join(f"{name} likes the {each}." for each in draw.sample(_THINGS, size))
    return f"{filler} Tomorrow {name} travels to {city}. Where does {name} travel to?", city


def _mail(draw: random.Random, size: int) -> tuple[str, str]:
    address = f"{draw.choice(_NAMES).lower()}@{draw.choice(_THINGS)}.com"
    filler = " ".join(f"The {each} is old." for each in draw.sample(_THINGS, size))
    told = f"{filler}{draw.choice((' ', chr(10)))}Please write to {address} for more."
    asked = draw.choice(("What is the email address in this text?", "Extract the email address.", "Find the address."))
    return f"{told} {asked}", address


def _age(draw: random.Random, size: int) -> tuple[str, str]:
    name, age = draw.choice(_NAMES), draw.randrange(18, 80)
    filler = " ".join(f"{name} likes the {each}." for each in draw.sample(_THINGS, size))
    return f"{name} is {age} years old. {filler} How old is {name}?", str(age)


def _stock(draw: random.Random, size: int) -> tuple[str, str]:
    things = draw.sample(_THINGS, min(size + 1, 9))
    counts = draw.sample(range(11, 99), len(things))
    form, between = draw.choice((("{}: {}", "\n"), ("{} {}", ", "), ("We have {1} of {0}.", " ")))
    listed = between.join(form.format(thing, count) for thing, count in zip(things, counts, strict=True))
    place = draw.randrange(len(things))
    return f"In stock: {listed}\nWhich number belongs to {things[place]}?", str(counts[place])


def _speed(draw: random.Random, size: int) -> tuple[str, str]:
    speed = draw.randrange(20, 130)
    filler = " ".join(f"The {thing} is {draw.choice(_COLOURS)}." for thing in draw.sample(_THINGS, size))
    return f"{filler} The car drives at {speed} kilometres per hour. How fast is the car?", str(speed)


def _order(draw: random.Random, size: int) -> tuple[str, str]:
    number = draw.randrange(1000, 9999)
    filler = " ".join(f"It has a {draw.choice(_COLOURS)} {thing}." for thing in draw.sample(_THINGS, size))
    return f"Your order has the number {number}. {filler} What number does the order have?", str(number)


def _drink(draw: random.Random, size: int) -> tuple[str, str]:
    name, drink = draw.choice(_NAMES), draw.choice(("tea", "coffee", "milk", "water", "juice", "cocoa"))
    filler = " ".join(f"The {each} is old." for each in draw.sample(_THINGS, size))
    return f"{name} likes {drink}. {filler} What does {name} like?", drink


def _work(draw: random.Random, size: int) -> tuple[str, str]:
    name, job = draw.choice(_NAMES), draw.choice(("teacher", "doctor", "nurse", "baker", "pilot", "farmer"))
    filler = " ".join(f"{name} has a {each}." for each in draw.sample(_THINGS, size))
    return f"{name} works as a {job}. {filler} What is the job of {name}?", job


def _weather(draw: random.Random, size: int) -> tuple[str, str]:
    weather, day = draw.choice(("rain", "snow", "sun", "wind", "fog")), draw.choice(("Monday", "Friday", "Sunday"))
    filler = " ".join(f"Please bring the {each}." for each in draw.sample(_THINGS, size))
    return f"On {day} there will be {weather}. {filler} How will the weather be on {day}?", weather


Make = Callable[[random.Random, int], tuple[str, str]]
_FAMILIES: dict[str, tuple[Split, Make]] = {
    "addition": ("train", _addition),
    "subtraction": ("test", _subtraction),
    "copy words": ("train", _copy_words),
    "copy a line": ("test", _copy_line),
    "room": ("train", _room),
    "temperature": ("test", _temperature),
    "address book": ("train", _address_book),
    "price list": ("test", _price_list),
    "mail": ("train", _mail),
    "age": ("test", _age),
    "sort numbers": ("train", _sort_numbers),
    "sort words": ("test", _sort_words),
    "colour": ("train", _fact),
    "day": ("test", _meeting),
    "home": ("train", _home),
    "journey": ("test", _journey),
    "stock": ("train", _stock),
    "order": ("test", _order),
    "speed": ("train", _speed),
    "work": ("test", _work),
    "drink": ("train", _drink),
    "weather": ("test", _weather),
    "steps": ("train", _steps),
    "box": ("test", _box),
}
