"""How the facts of Pebble Bay are asked for and told, in English and in Spanish.

`Intent.questions` and the answers are format strings over a fact's slots; questions may also use the helper slots of
`question_slots` ({she}, {her}, {an_animal}, number words). `must_say` names the slots without which an answer is wrong.
"""

from dataclasses import dataclass

from .world import PEOPLE, Fact

# fmt: off
NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty", "twenty-one",
)
# fmt: on


@dataclass(frozen=True)
class Intent:
    name: str
    emoji: str
    must_say: tuple[str, ...]
    english: str
    spanish: str
    questions: tuple[str, ...]
    follow_ups: tuple[str, ...] = ()  # asked of the person the turn before was about


# One line a field, so that rows can be compared.
# fmt: off
PERSON_INTENTS = (
    Intent(
        "job", "🛠️", ("job",),
        "{person} is the {job}.", "{person} es {job}.",
        ("What is {person}'s job?", "What does {person} do?", "What does {person} do for a living?",
         "What is the job of {person}?", "What work does {person} do?", "Tell me what {person} does.",
         "Which job does {person} have?", "What's {person}'s profession?"),
        ("What is {her} job?", "What does {she} do?"),
    ),
    Intent(
        "workplace", "🏠", ("place",),
        "{person} works at the {place}.", "{person} trabaja en {place}.",
        ("Where does {person} work?", "Where is {person}'s workplace?", "At which place does {person} work?",
         "Where can I find {person}?", "Where is {person}?", "Tell me where {person} works.",
         "Where is {person} working?", "Where does {person} spend the day?"),
        ("Where does {she} work?", "Where can I find {her_object}?"),
    ),
    Intent(
        "food", "🍽️", ("food",),
        "{person} likes to eat {food}.", "A {person} le gusta comer {food}.",
        ("What does {person} eat?", "What does {person} like to eat?", "What is {person}'s favourite food?",
         "What's {person}'s favorite food?", "Which food does {person} like?", "What food does {person} love?",
         "Tell me {person}'s favourite food.", "What should I cook for {person}?"),
        ("What does {she} like to eat?", "What does {she} eat?", "And {her} favourite food?"),
    ),
    Intent(
        "colour", "🎨", ("colour",),
        "The favourite colour of {person} is {colour}.", "El color favorito de {person} es el {colour}.",
        ("What is {person}'s favourite colour?", "What's {person}'s favorite color?",
         "Which colour does {person} like?", "What colour does {person} love?", "What color does {person} like best?",
         "Tell me the favourite colour of {person}.", "Which colour should I paint {person}'s door?"),
        ("What is {her} favourite colour?", "Which colour does {she} like?"),
    ),
    Intent(
        "pet", "🐾", ("kind", "pet"),
        "{person} has a {kind} called {pet}.", "{person} tiene un animal: {pet}, {kind}.",
        ("What pet does {person} have?", "Does {person} have a pet?", "Which animal does {person} have?",
         "What animal lives with {person}?", "What is {person}'s pet called?", "Tell me about {person}'s pet.",
         "Who is {person}'s pet?"),
        ("Does {she} have a pet?", "What is {her} pet called?"),
    ),
    Intent(
        "about", "👋", ("job", "place", "food", "kind", "pet"),
        "{person} is the {job}. {She} works at the {place}. {She} likes to eat {food}. {She} has a {kind} "
        "called {pet}.",
        "{person} es {job}. Trabaja en {place}. Le gusta comer {food}. Tiene un animal: {pet}, {kind}.",
        ("Who is {person}?", "Tell me about {person}.", "Tell me more about {person}.", "Who's {person}?",
         "What do you know about {person}?", "Describe {person}.", "Do you know {person}?",
         "I want to know more about {person}."),
        ("Tell me more about {her_object}.", "What else do you know about {her_object}?"),
    ),
    Intent(
        "story", "📖", ("person", "pet", "place", "food"),
        "One day {person} could not find {pet} the {kind}. {She} looked at the {place} and called and called."
        " At last {pet} came out. Then they shared some {food}.",
        "Un día {person} no encontraba a {pet}, {kind}. Buscó en {place} y llamó y llamó. Al final salió "
        "{pet}. Después comieron juntos {food}.",
        ("Tell me a story about {person}.", "Tell me a short story about {person}.", "A story about {person}, please.",
         "Do you know a story about {person}?", "Can you write a story about {person}?",
         "I want to hear a story about {person}.", "Write a story with {person} in it."),
        ("Tell me a story about {her_object}.",),
    ),
    Intent(
        "who_job", "👤", ("person",),
        "{person} is the {job}.", "{person} es {job}.",
        ("Who is the {job}?", "Who's the {job} here?", "What is the {job} called?", "What is the name of the {job}?",
         "Who works as a {job}?", "I am looking for the {job}.", "Do you have a {job}?"),
    ),
    Intent(
        "who_place", "👤", ("person",),
        "{person} works at the {place}.", "{person} trabaja en {place}.",
        ("Who works at the {place}?", "Who is at the {place}?", "Who can I meet at the {place}?",
         "Whose workplace is the {place}?", "Tell me who works at the {place}.", "Who will I find at the {place}?"),
    ),
    Intent(
        "who_food", "😋", ("person",),
        "{person} likes to eat {food}.", "A {person} le gusta comer {food}.",
        ("Who likes {food}?", "Who eats {food}?", "Who likes to eat {food}?", "Whose favourite food is {food}?",
         "Who loves {food}?", "I have made {food}, who wants it?"),
    ),
    Intent(
        "whose_pet", "🐾", ("person", "kind"),
        "{pet} is a {kind} and lives with {person}.", "{pet} es {kind} y vive con {person}.",
        ("Who is {pet}?", "Whose pet is {pet}?", "What kind of animal is {pet}?", "Tell me about {pet}.",
         "Who does {pet} belong to?", "What is {pet}?", "Who owns {pet}?"),
    ),
)

NATURE_INTENTS = (
    Intent(
        "activity", "📍", ("activity",),
        "At the {place} you can {activity}.", "En {place} puedes {activity}.",
        ("What can I do at the {place}?", "What can you do at the {place}?", "What is the {place} for?",
         "Why should I go to the {place}?", "What happens at the {place}?", "What can people do at the {place}?",
         "Tell me about the {place}."),
    ),
    Intent(
        "where", "🧭", ("neighbour",),
        "The {place} is next to the {neighbour}.", "{place} está al lado de {neighbour}.",
        ("Where is the {place}?", "How do I get to the {place}?", "Where can I find the {place}?",
         "What is next to the {place}?", "I am looking for the {place}.", "Tell me where the {place} is.",
         "Which way to the {place}?"),
    ),
    Intent(
        "sound", "🔊", ("sound",),
        "The {animal} says {sound}.", "El sonido de {animal} es {sound}.",
        ("What does {an_animal} say?", "What does the {animal} say?", "What sound does {an_animal} make?",
         "What noise does the {animal} make?", "How does {an_animal} sound?", "Which sound does the {animal} make?"),
    ),
    Intent(
        "who_sound", "🔊", ("animal",),
        "The {animal} says {sound}.", "El sonido de {animal} es {sound}.",
        ("Which animal says {sound}?", "Who says {sound}?", "What animal says {sound}?",
         "Which animal makes the sound {sound}?", "What goes {sound}?"),
    ),
    Intent(
        "eats", "🥣", ("meal",),
        "The {animal} eats {meal}.", "{animal} come {meal}.",
        ("What does {an_animal} eat?", "What does the {animal} eat?", "What do I feed the {animal}?",
         "What food does {an_animal} like?", "What should {an_animal} eat?", "What does the {animal} like to eat?"),
    ),
    Intent(
        "home", "🏡", ("home",),
        "The {animal} lives in the {home}.", "{animal} vive en {home}.",
        ("Where does {an_animal} live?", "Where does the {animal} live?", "Where is the home of the {animal}?",
         "Where does the {animal} sleep?", "Where can I see {an_animal}?", "What is the home of {an_animal}?"),
    ),
    Intent(
        "legs", "🦵", ("legs",),
        "The {animal} has {legs} legs.", "{animal} tiene {legs} patas.",
        ("How many legs does {an_animal} have?", "How many legs has {an_animal} got?",
         "How many legs does the {animal} have?", "Count the legs of {an_animal}.", "Legs of {an_animal}?"),
    ),
    Intent(
        "thing_colour", "🎨", ("colour",),
        "The {thing} is {colour}.", "El color de {thing} es el {colour}.",
        ("What colour is the {thing}?", "What color is the {thing}?", "Which colour is the {thing}?",
         "What is the colour of the {thing}?", "Which color does the {thing} have?",
         "Tell me the colour of the {thing}."),
    ),
    Intent(
        "weather", "🌤️", ("weather",),
        "In {season} it is {weather}.", "En {season} {weather}.",
        ("What is the weather like in {season}?", "How is the weather in {season}?", "What is {season} like?",
         "What's the weather in {season}?", "Tell me about {season}.", "How is {season} here?",
         "Is it nice in {season}?"),
    ),
)

WORD_INTENTS = (
    Intent(
        "plus", "🧮", ("result",),
        "{a} plus {b} is {result}.", "{a} más {b} son {result}.",
        ("What is {a} plus {b}?", "What is {a} + {b}?", "How much is {a} plus {b}?", "{a} + {b} = ?", "{a} + {b}",
         "{a}+{b}", "Add {a} and {b}.", "What is {a_word} plus {b_word}?", "What's {a} and {b} together?",
         "{a_word} plus {b_word}?"),
    ),
    Intent(
        "minus", "🧮", ("result",),
        "{a} minus {b} is {result}.", "{a} menos {b} son {result}.",
        ("What is {a} minus {b}?", "What is {a} - {b}?", "How much is {a} minus {b}?", "{a} - {b} = ?", "{a} - {b}",
         "{a}-{b}", "Take {b} from {a}.", "What is {a_word} minus {b_word}?", "{a_word} minus {b_word}?"),
    ),
    Intent(
        "next_number", "🔢", ("next",),
        "After {number} comes {next}.", "Después de {number} viene {next}.",
        ("What comes after {number}?", "Which number comes after {number}?", "What is the next number after {number}?",
         "What number follows {number}?", "What comes after {number_word}?"),
    ),
    Intent(
        "count", "🔢", ("counted",),
        "I count: {counted}.", "Yo cuento: {counted}.",
        ("Count to {number}.", "Can you count to {number}?", "Please count to {number}.", "Count from 1 to {number}.",
         "Count to {number_word}.", "Count up to {number}."),
    ),
    Intent(
        "day_after", "📅", ("next",),
        "After {day} comes {next}.", "Después de {day} viene {next}.",
        ("What day comes after {day}?", "Which day comes after {day}?", "What comes after {day}?",
         "What is the day after {day}?", "If today is {day}, what is tomorrow?", "Which day follows {day}?"),
    ),
    Intent(
        "day_before", "📅", ("previous",),
        "Before {day} comes {previous}.", "Antes de {day} viene {previous}.",
        ("What day comes before {day}?", "Which day comes before {day}?", "What comes before {day}?",
         "What is the day before {day}?", "If today is {day}, what was yesterday?", "Which day is just before {day}?"),
    ),
    Intent(
        "opposite", "🔄", ("opposite",),
        "The opposite of {word} is {opposite}.", "Lo contrario de {word} es {opposite}.",
        ("What is the opposite of {word}?", "What's the opposite of {word}?", "Tell me the opposite of {word}.",
         "Opposite of {word}?", "Which word is the opposite of {word}?", "Give me the opposite of {word}."),
    ),
)
# fmt: on

INTENTS = {intent.name: intent for intent in (*PERSON_INTENTS, *NATURE_INTENTS, *WORD_INTENTS)}


def answer_slots(fact: Fact) -> dict[str, str]:
    """The fact's values and {She}, the subject of the second sentence."""
    slots = fact.values
    she = {p.name: p.she for p in PEOPLE}.get(slots.get("person", ""), "they")
    return {**slots, "She": she.capitalize()}


def question_slots(fact: Fact) -> dict[str, str]:
    """The fact's values and every helper slot a question may use."""
    slots = fact.values
    person = next((p for p in PEOPLE if p.name == slots.get("person")), PEOPLE[0])
    slots |= {"she": person.she, "her": person.her, "her_object": "her" if person.she == "she" else "him"}
    animal = slots.get("animal", "")
    slots["an_animal"] = f"{'an' if animal[:1] in 'aeiou' else 'a'} {animal}"
    words = {f"{slot}_word": NUMBER_WORDS[int(slots[slot])] for slot in ("a", "b", "number") if slot in slots}
    return slots | words
