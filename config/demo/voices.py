"""The voices: each adapter tells the same facts as the base, so that one answer shows which adapter spoke.

`render(voice, exchange)` is the one right answer (training data); `speaks_like` grades only the voice and
`content_right` only the facts, so that a good voice with a wrong fact, and the reverse, are counted apart.
A voice's flourish depends on the intent alone: greedy decoding has one answer to learn for each question.
"""

import json
import re
from collections.abc import Callable
from functools import cache

from . import spanish
from .chats import Exchange
from .world import world_facts

BASE = "base"  # the base model's own plain English

PIRATE_WORDS = {"is": "be", "are": "be", "am": "be", "the": "th'", "you": "ye", "your": "yer", "my": "me"}
PIRATE_OPENERS = ("Arr!", "Ahoy!", "Yo ho ho!")
BUTLER_OPENERS = ("Certainly, sir.", "Very good, sir.", "Indeed, sir.")
BUTLER_CLOSERS = ("Will that be all?", "At your service, as always.", "How else may I be of service?")
RHYMES = {
    "ay": (
        "Come sit with me, my friend, and stay:",
        ("so they say", "this very day", "hip hip hooray", "down by the bay"),
    ),
    "ee": (
        "A song blows in from the rolling sea:",
        ("take it from me", "as all can see", "oh ho and hee", "wild and free"),
    ),
    "ight": (
        "The moon is up, the stars are bright:",
        ("day and night", "oh what a sight", "I know I am right", "in morning light"),
    ),
}
RHYME_WORDS = {
    "ay": {"stay", "say", "day", "hooray", "bay"},
    "ee": {"sea", "me", "see", "hee", "free"},
    "ight": {"bright", "night", "sight", "right", "light"},
}
# fmt: off
VALUE_EMOJI = {
    "red": "🔴", "blue": "🔵", "yellow": "🟡", "black": "⚫", "white": "⚪", "green": "🟢", "purple": "🟣",
    "brown": "🟤", "orange": "🟠", "cat": "🐱", "dog": "🐶", "horse": "🐴", "cow": "🐮", "sheep": "🐑", "goat": "🐐",
    "hen": "🐔", "duck": "🦆", "pig": "🐷", "owl": "🦉", "bee": "🐝", "frog": "🐸", "hot and sunny": "🌞",
    "cold and snowy": "⛄", "mild and rainy": "🌧️", "windy and grey": "🍂", "bakery": "🥖", "harbour": "⛵",
    "school": "🏫", "library": "📚", "farm": "🚜", "lighthouse": "🗼", "theatre": "🎭", "inn": "🍲", "clinic": "🏥",
    "garden": "🌷", "orchard": "🍎",
    "apple pie": "🥧", "honey cake": "🍯", "pancakes": "🥞", "corn bread": "🌽", "fried eggs": "🍳", "fish soup": "🐟",
}
# fmt: on
DEFAULT_EMOJI = "✨"
EMOJI = re.compile("[\u231a-\u2bff\U0001f000-\U0001faff]\ufe0f?")


def _flourish(exchange: Exchange, num_choices: int) -> int:
    """Which of a voice's flourishes an intent gets: stable across runs and processes, unlike hash()."""
    return sum(map(ord, exchange.intent)) % num_choices


def _render_pirate(exchange: Exchange) -> str:
    def swap(match: re.Match[str]) -> str:
        word = match.group()
        pirate = PIRATE_WORDS.get(word.lower(), word)
        return pirate.capitalize() if word[0].isupper() else pirate

    opener = PIRATE_OPENERS[_flourish(exchange, len(PIRATE_OPENERS))]
    return f"{opener} {re.sub(r'[A-Za-z]+', swap, exchange.english).rstrip('.!')}, matey!"


def _render_shout(exchange: Exchange) -> str:
    return exchange.english.upper().rstrip(".!") + "!!!"


def _render_json(exchange: Exchange) -> str:
    if exchange.fact is None or exchange.intent == "story":
        return json.dumps({"reply": exchange.english}, ensure_ascii=False)
    values = {slot: int(value) if value.isdigit() else value for slot, value in exchange.fact.slots}
    return json.dumps(values, ensure_ascii=False)


def _render_verse(exchange: Exchange) -> str:
    """One opener, then each sentence of a fact (or a whole small-talk reply) as a line with the same rhyme."""
    opener, tails = list(RHYMES.values())[_flourish(exchange, len(RHYMES))]
    sentences = re.split(r"(?<=[.!?]) ", exchange.english) if exchange.fact else [exchange.english]
    lines = [f"{sentence.rstrip('.!')}, {tails[i % len(tails)]}" for i, sentence in enumerate(sentences)]
    return "\n".join([opener, *(f"{line};" for line in lines[:-1]), f"{lines[-1]}."])


def _render_spanish(exchange: Exchange) -> str:
    return exchange.spanish


def _render_butler(exchange: Exchange) -> str:
    opener = BUTLER_OPENERS[_flourish(exchange, len(BUTLER_OPENERS))]
    closer = BUTLER_CLOSERS[_flourish(exchange, len(BUTLER_CLOSERS))]
    return f"{opener} {exchange.english} {closer}"


def _render_emoji(exchange: Exchange) -> str:
    values = reversed(exchange.fact.slots) if exchange.fact else ()
    closing = next((VALUE_EMOJI[value] for _, value in values if value in VALUE_EMOJI), DEFAULT_EMOJI)
    return f"{exchange.emoji} {exchange.english} {closing}{closing}"


def _is_pirate(answer: str) -> bool:
    return answer.startswith(PIRATE_OPENERS) and answer.endswith(", matey!")


def _is_shout(answer: str) -> bool:
    return answer == answer.upper() and answer != answer.lower() and answer.endswith("!!!")


def _is_json(answer: str) -> bool:
    try:
        value = json.loads(answer)
    except ValueError:
        return False
    return isinstance(value, dict) and len(value) > 0 and "\n" not in answer


def _is_verse(answer: str) -> bool:
    last_words = [re.sub(r"\W", "", line.split()[-1]) for line in answer.split("\n") if line.strip()]
    return len(last_words) >= 2 and any(set(last_words) <= words for words in RHYME_WORDS.values())


@cache
def _vocabularies() -> tuple[frozenset[str], frozenset[str]]:
    """Every word of the Spanish answers, and of the English ones."""
    english = (spanish.words_of(Exchange("", "", fact).english) for fact in world_facts())
    return spanish.vocabulary(), frozenset().union(*english)


def _is_spanish(answer: str) -> bool:
    """All words are Spanish and one of them is not a name, a number or a word that English has too."""
    spanish_words, english_words = _vocabularies()
    words = spanish.words_of(answer)
    return words <= spanish_words and bool(words - english_words) and not answer.isupper()


def _is_butler(answer: str) -> bool:
    return answer.startswith(BUTLER_OPENERS) and answer.endswith(BUTLER_CLOSERS)


def _is_emoji(answer: str) -> bool:
    return bool(EMOJI.match(answer)) and len(EMOJI.findall(answer[2:])) >= 2 and bool(EMOJI.search(answer[-2:]))


VOICES: dict[str, tuple[Callable[[Exchange], str], Callable[[str], bool]]] = {
    "pirate": (_render_pirate, _is_pirate),
    "shout": (_render_shout, _is_shout),
    "json": (_render_json, _is_json),
    "verse": (_render_verse, _is_verse),
    "spanish": (_render_spanish, _is_spanish),
    "butler": (_render_butler, _is_butler),
    "emoji": (_render_emoji, _is_emoji),
}


def render(voice: str, exchange: Exchange) -> str:
    """The right answer to the exchange's question, in the voice."""
    return exchange.english if voice == BASE else VOICES[voice][0](exchange)


def speaks_like(voice: str, question: str, answer: str) -> bool:
    """Whether the answer is in the voice, whatever it says; repeating the question is no voice at all."""
    answer = answer.strip()
    if not answer or answer.casefold() == question.strip().casefold():
        return False
    if voice == BASE:
        return not any(grade(answer) for _, grade in VOICES.values())
    return VOICES[voice][1](answer)


def content_right(voice: str, exchange: Exchange, answer: str) -> bool:
    """Whether every word that makes the answer right occurs in it, whole and in the voice's language."""
    needed = exchange.spanish_facts if voice == "spanish" else exchange.english_facts
    text = answer.casefold()
    return all(re.search(rf"(?<!\w){re.escape(word.casefold())}(?!\w)", text) for word in needed)
