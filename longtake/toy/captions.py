"""Captions of the embedded world: the vocabulary and the writer of clauses.

A caption is a list of clauses, one a sprite: `a [size] colour shape` and then how it moves. Every word that carries
meaning is in one of the tables below: `scripts/assets/caption_parser.py` reads captions back from them alone. This
file must know no pixels, and nothing but words is random in it.

VOCABULARY is what the shipped teacher knows. The words of STOP_WORDS came later: the shipped text encoder reads them,
and no shipped transformer was trained on captions with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "yellow", "green", "cyan", "blue", "purple")
SIZES = ("small", "medium", "large")
SPEEDS = ("slow", "medium", "fast")
# Direction -> unit steps (x to the right, y downwards).
DIRECTIONS = {
    "right": (1, 0),
    "upper right": (1, -1),
    "up": (0, -1),
    "upper left": (-1, -1),
    "left": (-1, 0),
    "lower left": (-1, 1),
    "down": (0, 1),
    "lower right": (1, 1),
}

# Words that set the speed; a clause with none of them is medium.
ADVERBS = {"slow": ("slowly", "gently"), "medium": ("steadily",), "fast": ("quickly", "swiftly", "rapidly")}
VERBS = {"slow": ("drifts", "creeps", "crawls"), "medium": (), "fast": ("races", "rushes", "shoots")}
SPEED_OF = {word: speed for table in (ADVERBS, VERBS) for speed, words in table.items() for word in words}
PLAIN_VERBS = ("moves", "goes", "travels", "glides", "slides")
# Words that set a part of the direction.
VERTICAL_VERBS = {"up": ("climbs", "rises", "ascends"), "down": ("sinks", "falls", "descends")}
DIRECTION_WORDS = {
    (1, 0): ("right", "rightwards"),
    (-1, 0): ("left", "leftwards"),
    (0, -1): ("up", "upwards", "upper", *VERTICAL_VERBS["up"]),
    (0, 1): ("down", "downwards", "lower", *VERTICAL_VERBS["down"]),
}
STEP_OF = {word: step for step, words in DIRECTION_WORDS.items() for word in words}
DIRECTION_PHRASES = {
    "right": ("to the right", "right", "rightwards"),
    "left": ("to the left", "left", "leftwards"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
    **{
        f"{edge} {side}": (f"to the {edge} {side}", f"{way} and to the {side}", f"diagonally {way} and {side}")
        for edge, way in (("upper", "up"), ("lower", "down"))
        for side in ("right", "left")
    },
}
# One of these words leaves direction and speed open.
OPEN_WORDS = ("somewhere", "wanders", "roams", "some")
OPEN_PHRASES = (
    *("moves somewhere", "goes somewhere", "travels somewhere", "moves in some direction"),
    *("wanders off", "wanders about", "roams about"),
)
STILL = "still"  # the speed of a sprite that stands still; no caption that the shipped text encoder reads says so
STOP_PHRASES = ("stops", "halts", "stands still")
STOP_WORDS = ("stops", "halts", "stands", "still")
FILLERS = (*PLAIN_VERBS, "to", "the", "and", "diagonally", "in", "direction", "off", "about")
CONNECTORS = (", ", " and ", ", and ", " while ")
CONNECTOR_WORDS = (",", "and", "while")
ARTICLE = "a"

VOCABULARY = tuple(
    sorted(
        {ARTICLE, *CONNECTOR_WORDS, *FILLERS, *OPEN_WORDS, *SPEED_OF, *STEP_OF, *SHAPES, *COLOURS, *SIZES}
        - {"medium"}  # the medium size has no adjective
    )
)


@dataclass(frozen=True)
class Clause:
    """What a caption says of one sprite; `direction` and `speed` are None together when its motion is left open.

    Of a sprite that stops, the speed is STILL and the direction None.
    """

    size: str
    shape: str
    colour: str
    direction: str | None
    speed: str | None


def write_caption(clauses: list[Clause], rng: np.random.Generator) -> str:
    """A caption of these clauses in one of many wordings, which has no other meaning."""
    caption = _write_clause(clauses[0], rng)
    for clause in clauses[1:]:
        caption += pick(CONNECTORS, rng) + _write_clause(clause, rng)
    return caption


def pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    """One of the options."""
    return options[int(rng.integers(len(options)))]


def _write_clause(clause: Clause, rng: np.random.Generator) -> str:
    size = "" if clause.size == "medium" else clause.size + " "
    subject = f"{ARTICLE} {size}{clause.colour} {clause.shape}"
    if clause.speed == STILL:
        return f"{subject} {pick(STOP_PHRASES, rng)}"
    if clause.direction is None or clause.speed is None:
        return f"{subject} {pick(OPEN_PHRASES, rng)}"
    adverb = pick(ADVERBS[clause.speed], rng)
    if clause.direction in VERTICAL_VERBS and rng.random() < 0.5:
        verb, where = pick(VERTICAL_VERBS[clause.direction], rng), ""
        needs_adverb = clause.speed != "medium"
    else:
        where = pick(DIRECTION_PHRASES[clause.direction], rng)
        needs_adverb = clause.speed != "medium" and rng.random() < 0.5
        verb = pick(PLAIN_VERBS if needs_adverb or clause.speed == "medium" else VERBS[clause.speed], rng)
    if not needs_adverb and rng.random() < 0.8:
        adverb = ""  # an adverb that agrees with the verb is allowed, and rare
    order = ((adverb, verb, where), (verb, adverb, where), (verb, where, adverb))[int(rng.integers(3))]
    return " ".join(part for part in (subject, *order) if part)
