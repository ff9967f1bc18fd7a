"""The Spanish words for every value of the world, by slot, because the article depends on the sentence.

Names of people and pets, numbers and the village stay as they are.
"""

from .intents import INTENTS
from .small_talk import SMALL_TALK, UNKNOWN
from .world import Fact, world_facts

JOBS = {
    "baker": "la panadera",
    "fisherman": "el pescador",
    "teacher": "la maestra",
    "blacksmith": "el herrero",
    "doctor": "la médica",
    "gardener": "el jardinero",
    "painter": "la pintora",
    "carpenter": "el carpintero",
    "beekeeper": "la apicultora",
    "captain": "el capitán",
    "librarian": "la bibliotecaria",
    "cook": "el cocinero",
    "musician": "la música",
    "shepherd": "el pastor",
    "weaver": "la tejedora",
    "postman": "el cartero",
}
PLACES = {
    "bakery": "la panadería",
    "school": "la escuela",
    "library": "la biblioteca",
    "post office": "la oficina de correos",
    "market": "el mercado",
    "inn": "la posada",
    "theatre": "el teatro",
    "studio": "el estudio",
    "workshop": "el taller",
    "forge": "la herrería",
    "clinic": "la clínica",
    "garden": "el jardín",
    "orchard": "el huerto",
    "farm": "la granja",
    "lighthouse": "el faro",
    "harbour": "el puerto",
}
FOODS = {
    "apple pie": "tarta de manzana",
    "fish soup": "sopa de pescado",
    "honey cake": "pastel de miel",
    "roast potatoes": "patatas asadas",
    "tomato salad": "ensalada de tomate",
    "carrot stew": "guiso de zanahoria",
    "plum jam": "mermelada de ciruela",
    "cheese bread": "pan de queso",
    "pancakes": "tortitas",
    "fried eggs": "huevos fritos",
    "almond biscuits": "galletas de almendra",
    "mushroom pasta": "pasta con setas",
    "cherry ice cream": "helado de cereza",
    "lentil soup": "sopa de lentejas",
    "rice pudding": "arroz con leche",
    "corn bread": "pan de maíz",
}
COLOURS = {
    "red": "rojo",
    "blue": "azul",
    "yellow": "amarillo",
    "black": "negro",
    "white": "blanco",
    "green": "verde",
    "purple": "morado",
    "brown": "marrón",
    "orange": "naranja",
    "pink": "rosa",
    "gold": "dorado",
    "silver": "plateado",
}
ANIMALS = {
    "cat": "el gato",
    "dog": "el perro",
    "horse": "el caballo",
    "cow": "la vaca",
    "sheep": "la oveja",
    "goat": "la cabra",
    "hen": "la gallina",
    "duck": "el pato",
    "pig": "el cerdo",
    "owl": "el búho",
    "bee": "la abeja",
    "frog": "la rana",
}
SOUNDS = {
    "meow": "miau",
    "woof": "guau",
    "neigh": "iii",
    "moo": "mu",
    "baa": "beee",
    "maa": "meee",
    "cluck": "cocoroc",
    "quack": "cuac",
    "oink": "oinc",
    "hoot": "uuu",
    "buzz": "bzzz",
    "ribbit": "croac",
}
MEALS = {
    "fish": "pescado",
    "bones": "huesos",
    "hay": "heno",
    "grass": "hierba",
    "clover": "trébol",
    "leaves": "hojas",
    "corn": "maíz",
    "bread": "pan",
    "turnips": "nabos",
    "mice": "ratones",
    "nectar": "néctar",
    "flies": "moscas",
}
HOMES = {
    "house": "la casa",
    "kennel": "la caseta",
    "stable": "la cuadra",
    "barn": "el granero",
    "field": "el prado",
    "hills": "las colinas",
    "coop": "el gallinero",
    "pond": "el estanque",
    "sty": "la pocilga",
    "tower": "la torre",
    "hive": "la colmena",
    "ditch": "la zanja",
}
THINGS = {
    "sea": "el mar",
    "grass": "la hierba",
    "sun": "el sol",
    "snow": "la nieve",
    "night": "la noche",
    "fire": "el fuego",
    "lighthouse": "el faro",
    "bridge": "el puente",
    "rose": "la rosa",
    "sand": "la arena",
    "moon": "la luna",
    "plum": "la ciruela",
}
ACTIVITIES = {
    "buy warm bread": "comprar pan caliente",
    "learn to read": "aprender a leer",
    "borrow books": "pedir libros",
    "send letters": "enviar cartas",
    "buy wool": "comprar lana",
    "eat dinner": "cenar bien",
    "hear music": "escuchar canciones",
    "look at paintings": "mirar cuadros",
    "build chairs": "construir sillas",
    "make horseshoes": "hacer herraduras",
    "get medicine": "recibir medicinas",
    "smell flowers": "oler flores",
    "pick apples": "recoger manzanas",
    "feed sheep": "alimentar ovejas",
    "see far": "ver lejos",
    "watch boats": "mirar barcos",
}
SEASONS = {"spring": "primavera", "summer": "verano", "autumn": "otoño", "winter": "invierno"}
WEATHER = {
    "mild and rainy": "hace fresco y llueve",
    "hot and sunny": "hace calor y sol",
    "windy and grey": "hace viento y está gris",
    "cold and snowy": "hace frío y nieva",
}
DAYS = {
    "Monday": "el lunes",
    "Tuesday": "el martes",
    "Wednesday": "el miércoles",
    "Thursday": "el jueves",
    "Friday": "el viernes",
    "Saturday": "el sábado",
    "Sunday": "el domingo",
}
WORDS = {
    "hot": "caliente",
    "cold": "frío",
    "big": "grande",
    "small": "pequeño",
    "fast": "rápido",
    "slow": "lento",
    "old": "viejo",
    "new": "nuevo",
    "day": "día",
    "night": "noche",
    "up": "arriba",
    "down": "abajo",
    "happy": "feliz",
    "sad": "triste",
    "wet": "mojado",
    "dry": "seco",
    "loud": "ruidoso",
    "quiet": "silencioso",
    "open": "abierto",
    "closed": "cerrado",
    "full": "lleno",
    "empty": "vacío",
    "early": "temprano",
    "late": "tarde",
}
KINDS = {kind: ("una " if name.startswith("la ") else "un ") + name[3:] for kind, name in ANIMALS.items()}

BY_SLOT = {
    "job": JOBS,
    "place": PLACES,
    "neighbour": PLACES,
    "food": FOODS,
    "colour": COLOURS,
    "kind": KINDS,
    "animal": ANIMALS,
    "sound": SOUNDS,
    "meal": MEALS,
    "home": HOMES,
    "thing": THINGS,
    "activity": ACTIVITIES,
    "season": SEASONS,
    "weather": WEATHER,
    "day": DAYS,
    "previous": DAYS,
    "word": WORDS,
    "opposite": WORDS,
}


def translate(slot: str, value: str) -> str:
    """The Spanish word for a slot's value; names and numbers stand for themselves."""
    if slot == "next":  # a day or a number, by the intent
        return DAYS.get(value, value)
    return BY_SLOT[slot][value] if slot in BY_SLOT else value


def tell(fact: Fact) -> str:
    """The fact as Spanish sentences, with the contractions de + el and a + el."""
    sentence = INTENTS[fact.intent].spanish.format(**{slot: translate(slot, value) for slot, value in fact.slots})
    sentence = sentence.replace(" de el ", " del ").replace(" a el ", " al ")
    return sentence[:1].upper() + sentence[1:]


def words_of(text: str) -> set[str]:
    return {word.strip("¡!¿?.,:;").casefold() for word in text.split()} - {""}


def vocabulary() -> frozenset[str]:
    """Every word a Spanish answer can contain: what the grader calls Spanish."""
    sentences = [tell(fact) for fact in world_facts()]
    sentences += [talk.spanish for talk in (*SMALL_TALK, UNKNOWN)]
    return frozenset().union(*(words_of(sentence) for sentence in sentences))
