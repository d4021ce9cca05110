"""The words that documents are made of: invented names, word lists, and the attributes a subject can have.

Names are invented from syllables with fixed seeds, so that no list has to be shipped. The last eleventh of each list of
names is *held out*: training never draws from it, evaluation draws from nothing else. Lists are ordered: the text of a
seed depends on it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache


def word_list(text: str) -> list[str]:
    """The words of `text`."""
    return text.split()


ONSETS = word_list("b br c cl cr d dr f fl g gl gr h j k kl l m n p pl pr qu r s sh sk sl st t th tr v w y z")
VOWELS = word_list("a e i o u ai ea ee ia io ou oa")
CODAS = word_list("b ck d ff g l ll m n nd ng nt p r rd rn s ss st t th v x z")
PLACE_ENDINGS = word_list("""
    ton ham ford burg wick dale mere stead field moor haven port mouth by ville gate holm ridge brook well
""")
SURNAME_ENDINGS = word_list("son sen sky man ez ini ova ard er ley worth kin low ett ano ides")

ADJECTIVES = word_list("""
    red blue green amber silver golden copper brass iron wooden marble velvet crimson violet scarlet ivory ebony pale
    dark bright old new ancient broken cracked polished rusty dusty heavy light hollow narrow wide tall short round
    square small large tiny huge quiet loud gentle rough smooth soft hard cold warm frozen painted carved folded hidden
    secret northern southern eastern western spare second third plain striped spotted curved twisted bent sealed open
    empty full faded shiny woven knitted glass paper leather linen silk woolen stone clay plaster tin bronze pearl coral
    jade
""")
OBJECTS = word_list("""
    lantern kettle ladder mirror violin trunk cabinet clock compass basket barrel anchor bell blanket bottle bowl box
    brush bucket candle carpet cart chair chest chisel coat crown cup desk door drum engine fan fiddle flag flute fork
    globe glove hammer harp hat helmet hook horn jar jug key kite knife lamp lens lock map mask mat medal needle oar
    oven pan pen pipe plate plough pot press pump purse quilt rack radio ring robe rope rug saddle sail saw scale scarf
    screw shield shovel sieve sketch spade spoon stamp statue stool stove sword table tent tile torch tower toy tray
    tripod trumpet umbrella urn valve vase wagon watch wheel whistle window wrench
""")
ROLES = word_list("""
    courier baker miller tailor cooper potter weaver farmer gardener librarian teacher nurse doctor surgeon pilot
    captain sailor fisher hunter ranger guard clerk notary lawyer judge mayor printer painter sculptor singer drummer
    plumber mason carpenter welder smith jeweller barber butcher grocer brewer cook waiter porter driver mechanic
    engineer chemist botanist surveyor archivist curator editor reporter broker banker tutor coach keeper inspector
""")
COLOURS = word_list("""
    red blue green amber silver golden crimson violet scarlet ivory turquoise maroon orange yellow purple brown black
    white grey pink teal indigo
""")
DISHES = word_list("""
    soup stew pie bread rice beans noodles dumplings salad cheese fish lamb mushrooms cabbage potatoes pudding porridge
    pancakes
""")
ANIMALS = word_list("""
    horse dog cat goat sheep donkey falcon parrot rabbit ferret tortoise pony goose raven owl hedgehog otter badger
    lizard
""")
INSTRUMENTS = word_list("violin cello flute harp drum trumpet piano guitar oboe clarinet banjo fiddle organ lute")
MONTHS = word_list("January February March April May June July August September October November December")
_MORE_WORDS = word_list("""
    river mountain meadow forest harbour island valley canyon desert glacier orchard garden castle temple bridge tunnel
    market village street corner winter summer autumn spring morning evening thunder shadow whisper silence courage
    wisdom patience fortune journey promise riddle legend marble ember frost pebble feather blossom clover maple willow
    cedar juniper saffron ginger pepper cinnamon walnut almond cherry apple plum
""")
WORDS = sorted({*ADJECTIVES, *OBJECTS, *ROLES, *COLOURS, *DISHES, *ANIMALS, *INSTRUMENTS, *_MORE_WORDS})

VERBS = word_list("""
    watched carried found lost repaired sold described moved opened closed cleaned borrowed returned counted measured
    painted followed admired ignored noticed
""")
ADVERBS = word_list("""
    slowly quickly quietly carefully often rarely again yesterday today finally suddenly gladly once twice
""")
SPOTS = word_list("""
    river hill wall fence harbour market station kitchen cellar attic garden roof road forest field school library
    church tower stable barn mill quarry shore canal square corridor workshop meadow pond orchard
""")
TIMES = word_list("morning evening winter summer autumn spring night noon")

KINSHIPS = word_list("""
    employer neighbour sister brother teacher doctor boss cousin uncle aunt tenant mentor rival partner
""")

# attribute -> kind of value (source.VALUE_KINDS)
ATTRIBUTES = {
    "locker number": "number",
    "badge number": "number",
    "phone extension": "number",
    "account number": "number",
    "room number": "number",
    "ticket number": "number",
    "licence number": "number",
    "access code": "number",
    "door code": "number",
    "serial number": "number",
    "passport number": "number",
    "invoice number": "number",
    "lucky number": "number",
    "pin code": "number",
    "case number": "number",
    "password": "word",
    "code word": "word",
    "nickname": "word",
    "secret phrase": "phrase",
    "motto": "phrase",
    "call sign": "code",
    "registration code": "code",
    "product code": "code",
    "key id": "hex",
    "checksum": "hex",
    "favourite colour": "colour",
    "favourite dish": "dish",
    "favourite instrument": "instrument",
    "pet": "animal",
    "home town": "place",
    "birthplace": "place",
    "destination": "place",
    "best friend": "person",
    "assistant": "person",
    "landlord": "person",
    "supervisor": "person",
    "departure time": "time",
    "appointment": "date",
    "deadline": "date",
    "birthday": "date",
    "weight": "weight",
    "height": "height",
    "price": "coins",
    "salary": "coins",
    "shoe size": "small number",
    "shelf": "small number",
    "seat": "seat",
    "mailing address": "address",
    "last delivery": "object",
    "hobby object": "object",
}
ATTRIBUTE_NAMES = list(ATTRIBUTES)


def plural(attribute: str) -> str:
    """The plural of an attribute's name."""
    if attribute.endswith("y") and attribute[-2] not in "aeiou":
        return f"{attribute[:-1]}ies"
    return f"{attribute}es" if attribute.endswith(("s", "sh", "x")) else f"{attribute}s"


@cache
def first_names() -> tuple[str, ...]:
    """22_000 distinct invented first names."""
    return _invent(22_000, seed=11, ending=_first_name_ending)


@cache
def surnames() -> tuple[str, ...]:
    """66_000 distinct invented surnames."""
    return _invent(66_000, seed=12, ending=_surname_ending)


@cache
def places() -> tuple[str, ...]:
    """66_000 distinct invented names of towns."""
    return _invent(66_000, seed=13, ending=_place_ending)


def n_training(names: tuple[str, ...]) -> int:
    """How many of `names`, from the front, training may draw; the rest is held out."""
    return len(names) * 10 // 11


def _invent(count: int, *, seed: int, ending: Callable[[random.Random], str]) -> tuple[str, ...]:
    rng = random.Random(seed)
    names: dict[str, None] = {}
    while len(names) < count:
        stem = rng.choice(ONSETS) + rng.choice(VOWELS[:5] if rng.random() < 0.75 else VOWELS)
        name = stem + ending(rng)
        if 3 < len(name) < 13:
            names[name.capitalize()] = None
    return tuple(names)


def _first_name_ending(rng: random.Random) -> str:
    if rng.random() < 0.4:
        return rng.choice(CODAS)
    syllable = rng.choice(ONSETS[:20]) + rng.choice("aeio")
    return syllable + (rng.choice("nlrs") if rng.random() < 0.5 else "")


def _surname_ending(rng: random.Random) -> str:
    coda = rng.choice(CODAS[:20])
    if rng.random() < 0.6:
        return coda + rng.choice(SURNAME_ENDINGS)
    return coda + rng.choice("aeiou") + rng.choice(CODAS)


def _place_ending(rng: random.Random) -> str:
    coda = rng.choice(CODAS)
    if rng.random() < 0.6:
        return coda + rng.choice(PLACE_ENDINGS)
    return coda + rng.choice("aeiou") + rng.choice(["", "n", "r", "s", "th"])
