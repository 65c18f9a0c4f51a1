"""Generated tasks with known answers, to calibrate the router for a model: from what it can do to what it cannot.

Families of one half are made for fitting, those of the other for trying: what a calibration is held to, it has not
seen the like of. Three in four or more ask for something that the
prompt says, the rest for arithmetic, copying and sorting.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
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
    families = [(name, make) for name, (of, often, make) in _FAMILIES.items() if of == split for _ in range(often)]
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


def _platform(draw: random.Random, size: int) -> tuple[str, str]:
    city, platform = draw.choice(_CITIES), draw.randrange(2, 30)
    filler = " ".join(f"The {each} is old." for each in draw.sample(_THINGS, size))
    told = draw.choice(
        (f"The train to {city} leaves from platform {platform}.", f"Train to {city}: platform {platform}.")
    )
    return f"{told} {filler} From which platform does the train to {city} leave?", str(platform)


def _gate(draw: random.Random, size: int) -> tuple[str, str]:
    city, gate = draw.choice(_CITIES), draw.randrange(2, 90)
    filler = " ".join(f"Passengers may take a {each}." for each in draw.sample(_THINGS, size))
    return f"{filler} The flight to {city} departs at gate {gate}. At which gate is the flight to {city}?", str(gate)


def _pressure(draw: random.Random, size: int) -> tuple[str, str]:
    pressure = draw.randrange(100, 999)
    filler = "\n".join(f"{thing}: {draw.choice(_COLOURS)}" for thing in draw.sample(_THINGS, size))
    return f"{filler}\nThe pressure is {pressure} millibar.\nWhat is the pressure?", str(pressure)


def _key(draw: random.Random, size: int) -> tuple[str, str]:
    thing, *others = draw.sample(_THINGS, size + 1)
    filler = " ".join(f"The {each} is {draw.choice(_COLOURS)}." for each in others)
    return f"The key is under the {thing}. {filler} Where is the key?", thing


def _shop(draw: random.Random, size: int) -> tuple[str, str]:
    things = draw.sample(_THINGS, 1 + size // 3)
    bought = [(draw.randrange(2, 9), draw.randrange(2, 15), thing) for thing in things]
    told = " and ".join(f"{count} {thing}s at {price} euros each" for count, price, thing in bought)
    return f"{draw.choice(_NAMES)} buys {told}. How much is that in total?", str(sum(c * p for c, p, _ in bought))


def _older(draw: random.Random, size: int) -> tuple[str, str]:
    names = draw.sample(_NAMES, 2 + size // 3)
    age = draw.randrange(10, 50)
    told = [f"{names[0]} is {age} years old."]
    for younger, name in pairwise(names):
        years = draw.randrange(2, 9)
        age += years
        told.append(f"{name} is {years} years older than {younger}.")
    return f"{' '.join(told)} How old is {names[-1]}?", str(age)


def _largest(draw: random.Random, size: int) -> tuple[str, str]:
    numbers = draw.sample(range(1, 100 * size), size + 2)
    asked = draw.choice(("Which number is the largest?", "Find the maximum.", "Which of them is the biggest?"))
    return f"{', '.join(map(str, numbers))}. {asked}", str(max(numbers))


def _reverse(draw: random.Random, size: int) -> tuple[str, str]:
    word = "".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(size + 2))
    return draw.choice((f"Spell {word} backwards.", f"Reverse the word {word}.")), word[::-1]


Make = Callable[[random.Random, int], tuple[str, str]]
_FAMILIES: dict[str, tuple[Split, int, Make]] = {
    # looking up what the prompt says, which is most of what a device is asked
    "room": ("train", 2, _room),
    "home": ("train", 2, _home),
    "colour": ("train", 2, _fact),
    "mail": ("train", 2, _mail),
    "address book": ("train", 2, _address_book),
    "stock": ("train", 2, _stock),
    "speed": ("train", 2, _speed),
    "drink": ("train", 2, _drink),
    "platform": ("train", 2, _platform),
    "pressure": ("train", 2, _pressure),
    "temperature": ("test", 2, _temperature),
    "journey": ("test", 2, _journey),
    "day": ("test", 2, _meeting),
    "age": ("test", 2, _age),
    "price list": ("test", 2, _price_list),
    "order": ("test", 2, _order),
    "work": ("test", 2, _work),
    "weather": ("test", 2, _weather),
    "gate": ("test", 2, _gate),
    "key": ("test", 2, _key),
    # what needs more than that
    "addition": ("train", 1, _addition),
    "steps": ("train", 1, _steps),
    "shop": ("train", 1, _shop),
    "older": ("train", 1, _older),
    "copy words": ("train", 1, _copy_words),
    "sort numbers": ("train", 1, _sort_numbers),
    "largest": ("train", 1, _largest),
    "reverse": ("train", 1, _reverse),
    "subtraction": ("test", 1, _subtraction),
    "box": ("test", 1, _box),
    "copy a line": ("test", 1, _copy_line),
    "sort words": ("test", 1, _sort_words),
}
"""Name → half, how often it comes, and how it is made."""
