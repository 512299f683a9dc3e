"""Captions of the embedded world: the vocabulary, the writer of clauses and its exact inverse.

A caption is a list of clauses, one a sprite: `a [size] colour shape` and then how it moves. Every word that carries
meaning is in one of the tables below, and `parse_caption` reads a clause from these tables alone, word by word. This
file must know no pixels, and nothing but words is random in it.

VOCABULARY is what the shipped teacher knows. The words of STOP_WORDS came later: the shipped text encoder reads them,
and no shipped transformer was trained on captions with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from longtake.errors import DataError

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

# Words that set a part of the direction.
DIRECTION_WORDS = {
    (1, 0): ("right", "rightwards"),
    (-1, 0): ("left", "leftwards"),
    (0, -1): ("up", "upwards", "upper", "climbs", "rises", "ascends"),
    (0, 1): ("down", "downwards", "lower", "sinks", "falls", "descends"),
}
# Words that set the speed; a clause with none of them is medium.
SPEED_WORDS = {
    "slow": ("slowly", "gently", "drifts", "creeps", "crawls"),
    "medium": ("steadily",),
    "fast": ("quickly", "swiftly", "rapidly", "races", "rushes", "shoots"),
}
ADVERBS = {"slow": ("slowly", "gently"), "medium": ("steadily",), "fast": ("quickly", "swiftly", "rapidly")}
VERBS = {"slow": ("drifts", "creeps", "crawls"), "medium": (), "fast": ("races", "rushes", "shoots")}
PLAIN_VERBS = ("moves", "goes", "travels", "glides", "slides")
VERTICAL_VERBS = {"up": ("climbs", "rises", "ascends"), "down": ("sinks", "falls", "descends")}
# One of these words leaves direction and speed open.
OPEN_WORDS = ("somewhere", "wanders", "roams", "some")
OPEN_PHRASES = (
    "moves somewhere",
    "goes somewhere",
    "travels somewhere",
    "moves in some direction",
    "wanders off",
    "wanders about",
    "roams about",
)
STILL = "still"  # the speed of a sprite that stands still; no caption that the shipped text encoder reads says so
STOP_PHRASES = ("stops", "halts", "stands still")
STOP_WORDS = ("stops", "halts", "stands", "still")
DIRECTION_PHRASES = {
    "right": ("to the right", "right", "rightwards"),
    "left": ("to the left", "left", "leftwards"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
    "upper right": ("to the upper right", "up and to the right", "diagonally up and right"),
    "upper left": ("to the upper left", "up and to the left", "diagonally up and left"),
    "lower right": ("to the lower right", "down and to the right", "diagonally down and right"),
    "lower left": ("to the lower left", "down and to the left", "diagonally down and left"),
}
FILLERS = (*PLAIN_VERBS, "to", "the", "and", "diagonally", "in", "direction", "off", "about")
CONNECTORS = (", ", " and ", ", and ", " while ")
_CONNECTOR_WORDS = (",", "and", "while")
_ARTICLE = "a"

_SPEED_OF = {word: speed for speed, words in SPEED_WORDS.items() for word in words}
_STEP_OF = {word: step for step, words in DIRECTION_WORDS.items() for word in words}
_DIRECTION_OF = {step: name for name, step in DIRECTIONS.items()}

VOCABULARY = tuple(
    sorted(
        {_ARTICLE, *_CONNECTOR_WORDS, *FILLERS, *OPEN_WORDS, *_SPEED_OF, *_STEP_OF, *SHAPES, *COLOURS, *SIZES}
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


def tokenize(caption: str) -> list[str]:
    """The caption's words in lower case; white space separates, a comma is a word, full stops are dropped."""
    return caption.lower().replace(",", " , ").replace(".", " ").split()


def write_caption(clauses: list[Clause], rng: np.random.Generator) -> str:
    """A caption of these clauses in one of many wordings; `parse_caption` gives the clauses back."""
    caption = _write_clause(clauses[0], rng)
    for clause in clauses[1:]:
        caption += _pick(CONNECTORS, rng) + _write_clause(clause, rng)
    return caption


def parse_caption(caption: str) -> list[Clause]:
    """The clauses of a caption, the exact inverse of `write_caption`.

    Raises: DataError when a word is unknown, or when a clause says too little or contradicts itself.
    """
    words, spans = tokenize(caption), clause_spans(caption)
    number = max(spans, default=-1) + 1
    if number == 0:
        raise DataError(f"caption {caption!r} has no clause; each begins with the word {_ARTICLE!r}")
    return [
        _parse_clause([word for word, span in zip(words, spans) if span == clause], caption) for clause in range(number)
    ]


def clause_spans(caption: str) -> list[int]:
    """For each word of `tokenize(caption)` the index of its clause; -1 for the connectors between clauses."""
    words = tokenize(caption)
    spans, clause = [], -1
    for index, word in enumerate(words):
        clause += word == _ARTICLE
        spans.append(clause)
        if word == _ARTICLE:
            # ", and" before an article joins clauses; the "and" of "up and left" has no article after it.
            back = index - 1
            while back >= 0 and words[back] in _CONNECTOR_WORDS:
                spans[back] = -1
                back -= 1
    return spans


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _write_clause(clause: Clause, rng: np.random.Generator) -> str:
    size = "" if clause.size == "medium" else clause.size + " "
    subject = f"{_ARTICLE} {size}{clause.colour} {clause.shape}"
    if clause.speed == STILL:
        return f"{subject} {_pick(STOP_PHRASES, rng)}"
    if clause.direction is None or clause.speed is None:
        return f"{subject} {_pick(OPEN_PHRASES, rng)}"
    adverb = _pick(ADVERBS[clause.speed], rng)
    if clause.direction in VERTICAL_VERBS and rng.random() < 0.5:
        verb, where = _pick(VERTICAL_VERBS[clause.direction], rng), ""
        needs_adverb = clause.speed != "medium"
    else:
        where = _pick(DIRECTION_PHRASES[clause.direction], rng)
        needs_adverb = clause.speed != "medium" and rng.random() < 0.5
        verb = _pick(PLAIN_VERBS if needs_adverb or clause.speed == "medium" else VERBS[clause.speed], rng)
    if not needs_adverb and rng.random() < 0.8:
        adverb = ""  # an adverb that agrees with the verb is allowed, and rare
    order = ((adverb, verb, where), (verb, adverb, where), (verb, where, adverb))[int(rng.integers(3))]
    return " ".join(part for part in (subject, *order) if part)


def _parse_clause(words: list[str], caption: str) -> Clause:
    where = f"clause {' '.join(words)!r} of caption {caption!r}"
    unknown = [word for word in words if word not in VOCABULARY and word not in STOP_WORDS]
    if unknown:
        raise DataError(f"{where} has unknown words {unknown}; VOCABULARY lists the words of the embedded world")
    found: dict[str, set[str]] = {"size": set(), "shape": set(), "colour": set(), "speed": set()}
    step, is_open, stops = [0, 0], False, False
    for word in words:
        for name, table in (("size", SIZES), ("shape", SHAPES), ("colour", COLOURS)):
            if word in table:
                found[name].add(word)
        if word in _SPEED_OF:
            found["speed"].add(_SPEED_OF[word])
        is_open |= word in OPEN_WORDS
        stops |= word in STOP_WORDS
        for axis, value in enumerate(_STEP_OF.get(word, (0, 0))):
            if value and step[axis] == -value:
                raise DataError(f"{where} names opposite directions; name one")
            step[axis] = value or step[axis]
    if stops:
        found["speed"].add(STILL)
    for name, default in (("size", "medium"), ("speed", "medium"), ("shape", ""), ("colour", "")):
        if len(found[name]) > 1 or not (found[name] or default):
            raise DataError(f"{where} names {sorted(found[name])} as {name}; it must name exactly one")
        found[name] = found[name] or {default}
    direction = _DIRECTION_OF.get((step[0], step[1]))
    if is_open + stops + (direction is not None) != 1:
        raise DataError(
            f"{where} must do one of three: name a direction, leave it open ({OPEN_WORDS}) or stop ({STOP_WORDS})"
        )
    size, shape, colour, speed = (next(iter(found[name])) for name in ("size", "shape", "colour", "speed"))
    return Clause(size, shape, colour, direction, None if is_open else speed)
