"""Conversations drawn from the world: questions as people type them, and what every voice needs to answer them.

Hold-out: a question form asked about one set of values (one `Exchange.key`) belongs to training or to evaluation, never
to both, whatever its casing, punctuation or opening words. Small talk has nothing to recombine and, like the
follow-ups inside a chat, is only trained.
"""

import random
import zlib
from dataclasses import dataclass, replace
from functools import cached_property

from . import spanish
from .intents import INTENTS, answer_slots, question_slots
from .small_talk import (
    FAR_AWAY,
    SMALL_TALK,
    STRANGE_QUESTIONS,
    STRANGE_SENTENCES,
    STRANGE_THINGS,
    STRANGERS,
    UNKNOWN,
    SmallTalk,
)
from .world import Fact, world_facts

HELD_OUT_PERCENT = 10
LEAD_INS = ("hi, ", "hello, ", "hey, ", "please, ", "tell me, ", "ok, ", "Hi! ", "Hello! ", "Pip, ", "and ")
ECHO_LEAD_INS = ("Can you tell me: ", "Do you know: ", "I wonder: ", "My question: ", "Quick question: ")
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are Pip, the guide to Pebble Bay.",
    "Answer briefly.",
    "Be kind and clear.",
    "You are a friendly assistant. Answer the user's questions.",
    "Answer the question.",
)


@dataclass(frozen=True)
class Exchange:
    """One question and the fact (or small talk) that answers it."""

    question: str
    key: str
    fact: Fact | None = None
    talk: SmallTalk = UNKNOWN

    @property
    def intent(self) -> str:
        return self.fact.intent if self.fact else self.talk.name

    @property
    def emoji(self) -> str:
        return INTENTS[self.fact.intent].emoji if self.fact else self.talk.emoji

    @cached_property
    def english(self) -> str:
        return INTENTS[self.fact.intent].english.format(**answer_slots(self.fact)) if self.fact else self.talk.english

    @cached_property
    def spanish(self) -> str:
        return spanish.tell(self.fact) if self.fact else self.talk.spanish

    @property
    def english_facts(self) -> tuple[str, ...]:
        if self.fact is None:
            return (self.talk.must_say[0],)
        return tuple(self.fact.values[slot] for slot in INTENTS[self.fact.intent].must_say)

    @property
    def spanish_facts(self) -> tuple[str, ...]:
        if self.fact is None:
            return (self.talk.must_say[-1],)
        # The article may have melted into a contraction: the noun alone decides.
        values = (spanish.translate(slot, self.fact.values[slot]) for slot in INTENTS[self.fact.intent].must_say)
        return tuple(value.removeprefix("el ").removeprefix("la ") for value in values)

    @property
    def is_held_out(self) -> bool:
        return bool(self.fact or self.talk is UNKNOWN) and zlib.crc32(self.key.encode()) % 100 < HELD_OUT_PERCENT


def ask(fact: Fact, form: str) -> Exchange:
    question = form.format(**question_slots(fact))
    return Exchange(question[:1].upper() + question[1:], f"{form}|{fact}", fact)


def fact_exchanges() -> list[Exchange]:
    """Every question form about every fact, each once."""
    return [ask(fact, form) for fact in world_facts() for form in INTENTS[fact.intent].questions]


def unknown_exchanges() -> list[Exchange]:
    fillers = {"{far}": FAR_AWAY, "{stranger}": STRANGERS, "{thing}": STRANGE_THINGS}
    questions = list(STRANGE_SENTENCES)
    for form in STRANGE_QUESTIONS:
        slot = next(slot for slot in fillers if slot in form)
        questions += [form.replace(slot, filler) for filler in fillers[slot]]
    return [Exchange(question, question) for question in questions]


def talk_exchanges() -> list[Exchange]:
    return [Exchange(question, question, None, talk) for talk in SMALL_TALK for question in talk.questions]


def as_typed(exchange: Exchange, rng: random.Random) -> Exchange:
    """The same question as a hurried person types it: lower case, no punctuation, a word before it."""
    question = exchange.question
    if exchange.fact and rng.random() < 0.15:
        lead_in = rng.choice(LEAD_INS + ECHO_LEAD_INS)
        question = lead_in + question[:1].lower() + question[1:]
    if rng.random() < 0.25:
        question = question.lower()
    if rng.random() < 0.3:
        question = question.rstrip("?.! ") or question
    elif rng.random() < 0.06:
        question = question.rstrip("?.! ") + rng.choice((" ?", "??", "!", ".", " please"))
    return replace(exchange, question=question)


class World:
    """Draws single questions, each intent about equally often, and chats from one side of the hold-out."""

    def __init__(self, held_out: bool = False) -> None:
        pools: dict[str, list[Exchange]] = {}
        for exchange in (*fact_exchanges(), *unknown_exchanges(), *talk_exchanges()):
            if exchange.is_held_out == held_out:
                pools.setdefault(exchange.intent, []).append(exchange)
        self.pools = pools
        self.intents = list(pools)
        # Large pools hold more to learn; a square root keeps the small ones in sight.
        self.weights = [len(pool) ** 0.5 * (2 if intent == UNKNOWN.name else 1) for intent, pool in pools.items()]
        self.facts_by_person: dict[str, list[Fact]] = {}
        for fact in world_facts():
            if INTENTS[fact.intent].follow_ups:
                self.facts_by_person.setdefault(fact.values["person"], []).append(fact)

    def exchange(self, rng: random.Random) -> Exchange:
        intent = rng.choices(self.intents, self.weights)[0]
        return as_typed(rng.choice(self.pools[intent]), rng)

    def follow_up(self, before: Exchange, rng: random.Random) -> Exchange:
        """A question that needs the turn before it: a pronoun, or "And Ben?"; else a fresh question."""
        person = before.fact.values.get("person") if before.fact else None
        if before.fact is None or person is None or before.intent not in INTENTS:
            return self.exchange(rng)
        if rng.random() < 0.5 or not INTENTS[before.intent].follow_ups:
            fact = rng.choice(self.facts_by_person[person])
            return as_typed(ask(fact, rng.choice(INTENTS[fact.intent].follow_ups)), rng)
        other = rng.choice([name for name in self.facts_by_person if name != person])
        fact = next(f for f in self.facts_by_person[other] if f.intent == before.intent)
        return as_typed(
            ask(fact, rng.choice(("And {person}?", "What about {person}?", "And what about {person}?"))), rng
        )

    def chat(self, rng: random.Random) -> list[Exchange]:
        """One question, or a talk of two to five."""
        turns = [self.exchange(rng)]
        if rng.random() < 0.3:
            for _ in range(rng.choice((1, 1, 2, 3, 4))):
                turns.append(self.follow_up(turns[-1], rng) if rng.random() < 0.6 else self.exchange(rng))
        return turns


def system_prompt(rng: random.Random) -> str | None:
    return rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.15 else None
