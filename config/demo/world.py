"""Pebble Bay, the small world the demo model knows: its people, animals, places, days and sums.

Every fact is a `Fact`: the intent that asks for it and the values that fill the intent's sentences (`intents.py`).
Values are bijective wherever a question runs backwards ("Who likes honey cake?"), so every question has one answer.
Plain data, no randomness: what is drawn at random is drawn in `chats.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Person:
    name: str
    she: str
    job: str
    place: str
    food: str
    colour: str
    kind: str
    pet: str

    @property
    def her(self) -> str:
        return {"she": "her", "he": "his"}[self.she]


PEOPLE = (
    Person("Anna", "she", "baker", "bakery", "apple pie", "red", "cat", "Milo"),
    Person("Ben", "he", "fisherman", "harbour", "fish soup", "blue", "dog", "Rex"),
    Person("Clara", "she", "teacher", "school", "honey cake", "yellow", "horse", "Star"),
    Person("David", "he", "blacksmith", "forge", "roast potatoes", "black", "goat", "Pepper"),
    Person("Emma", "she", "doctor", "clinic", "tomato salad", "white", "hen", "Dot"),
    Person("Felix", "he", "gardener", "garden", "carrot stew", "green", "duck", "Splash"),
    Person("Greta", "she", "painter", "studio", "plum jam", "purple", "cat", "Smudge"),
    Person("Hugo", "he", "carpenter", "workshop", "cheese bread", "brown", "dog", "Oak"),
    Person("Iris", "she", "beekeeper", "orchard", "pancakes", "yellow", "goat", "Daisy"),
    Person("Jonas", "he", "captain", "lighthouse", "fried eggs", "blue", "owl", "Moon"),
    Person("Karla", "she", "librarian", "library", "almond biscuits", "green", "owl", "Page"),
    Person("Leo", "he", "cook", "inn", "mushroom pasta", "red", "pig", "Truffle"),
    Person("Mira", "she", "musician", "theatre", "cherry ice cream", "purple", "horse", "Melody"),
    Person("Nils", "he", "shepherd", "farm", "lentil soup", "white", "sheep", "Cloud"),
    Person("Olga", "she", "weaver", "market", "rice pudding", "brown", "sheep", "Button"),
    Person("Paul", "he", "postman", "post office", "corn bread", "black", "duck", "Stamp"),
)

# What one can do there; each place stands next to the one on the line below, the last next to the first.
PLACES = {
    "bakery": "buy warm bread",
    "school": "learn to read",
    "library": "borrow books",
    "post office": "send letters",
    "market": "buy wool",
    "inn": "eat dinner",
    "theatre": "hear music",
    "studio": "look at paintings",
    "workshop": "build chairs",
    "forge": "make horseshoes",
    "clinic": "get medicine",
    "garden": "smell flowers",
    "orchard": "pick apples",
    "farm": "feed sheep",
    "lighthouse": "see far",
    "harbour": "watch boats",
}

# animal: (sound, food, home, legs)
ANIMALS = {
    "cat": ("meow", "fish", "house", "4"),
    "dog": ("woof", "bones", "kennel", "4"),
    "horse": ("neigh", "hay", "stable", "4"),
    "cow": ("moo", "grass", "barn", "4"),
    "sheep": ("baa", "clover", "field", "4"),
    "goat": ("maa", "leaves", "hills", "4"),
    "hen": ("cluck", "corn", "coop", "2"),
    "duck": ("quack", "bread", "pond", "2"),
    "pig": ("oink", "turnips", "sty", "4"),
    "owl": ("hoot", "mice", "tower", "2"),
    "bee": ("buzz", "nectar", "hive", "6"),
    "frog": ("ribbit", "flies", "ditch", "4"),
}

THINGS = {
    "sea": "blue",
    "grass": "green",
    "sun": "yellow",
    "snow": "white",
    "night": "black",
    "fire": "orange",
    "lighthouse": "red",
    "bridge": "brown",
    "rose": "pink",
    "sand": "gold",
    "moon": "silver",
    "plum": "purple",
}

WEATHER = {
    "spring": "mild and rainy",
    "summer": "hot and sunny",
    "autumn": "windy and grey",
    "winter": "cold and snowy",
}

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

OPPOSITES = (
    ("hot", "cold"),
    ("big", "small"),
    ("fast", "slow"),
    ("old", "new"),
    ("day", "night"),
    ("up", "down"),
    ("happy", "sad"),
    ("wet", "dry"),
    ("loud", "quiet"),
    ("open", "closed"),
    ("full", "empty"),
    ("early", "late"),
)


@dataclass(frozen=True)
class Fact:
    """One thing that can be asked: the intent's name and (slot, value) pairs in the order in which they are told."""

    intent: str
    slots: tuple[tuple[str, str], ...] = ()

    @property
    def values(self) -> dict[str, str]:
        return dict(self.slots)


def fact(intent: str, **slots: str) -> Fact:
    return Fact(intent, tuple(slots.items()))


def people_facts() -> Iterator[Fact]:
    for p in PEOPLE:
        yield fact("job", person=p.name, job=p.job)
        yield fact("workplace", person=p.name, place=p.place)
        yield fact("food", person=p.name, food=p.food)
        yield fact("colour", person=p.name, colour=p.colour)
        yield fact("pet", person=p.name, kind=p.kind, pet=p.pet)
        yield fact("about", person=p.name, job=p.job, place=p.place, food=p.food, kind=p.kind, pet=p.pet)
        yield fact("story", person=p.name, pet=p.pet, place=p.place, kind=p.kind, food=p.food)
        yield fact("who_job", person=p.name, job=p.job)
        yield fact("who_place", person=p.name, place=p.place)
        yield fact("who_food", person=p.name, food=p.food)
        yield fact("whose_pet", pet=p.pet, person=p.name, kind=p.kind)


def nature_facts() -> Iterator[Fact]:
    places = list(PLACES)
    for index, place in enumerate(places):
        yield fact("activity", place=place, activity=PLACES[place])
        yield fact("where", place=place, neighbour=places[(index + 1) % len(places)])
    for animal, (sound, meal, home, legs) in ANIMALS.items():
        yield fact("sound", animal=animal, sound=sound)
        yield fact("who_sound", animal=animal, sound=sound)
        yield fact("eats", animal=animal, meal=meal)
        yield fact("home", animal=animal, home=home)
        yield fact("legs", animal=animal, legs=legs)
    for thing, colour in THINGS.items():
        yield fact("thing_colour", thing=thing, colour=colour)
    for season, weather in WEATHER.items():
        yield fact("weather", season=season, weather=weather)


def number_facts() -> Iterator[Fact]:
    for a in range(1, 11):
        for b in range(1, 11):
            yield fact("plus", a=str(a), b=str(b), result=str(a + b))
            if b < a:
                yield fact("minus", a=str(a), b=str(b), result=str(a - b))
    for n in range(1, 21):
        yield fact("next_number", number=str(n), next=str(n + 1))
    for n in range(3, 11):
        yield fact("count", number=str(n), counted=", ".join(str(i) for i in range(1, n + 1)))


def word_facts() -> Iterator[Fact]:
    for index, day in enumerate(DAYS):
        yield fact("day_after", day=day, next=DAYS[(index + 1) % 7])
        yield fact("day_before", day=day, previous=DAYS[index - 1])
    for one, other in OPPOSITES:
        yield fact("opposite", word=one, opposite=other)
        yield fact("opposite", word=other, opposite=one)


def world_facts() -> list[Fact]:
    """Everything that is true in Pebble Bay, in a fixed order."""
    return [*people_facts(), *nature_facts(), *number_facts(), *word_facts()]
