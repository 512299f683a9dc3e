"""Reads the captions of the embedded world back: the exact inverse of `longtake.toy.captions.write_caption`.

The labels of the text encoder's training come from here, and tests hold that every caption has one meaning.
"""

from __future__ import annotations

from longtake.errors import DataError
from longtake.toy.captions import (
    ARTICLE,
    COLOURS,
    CONNECTOR_WORDS,
    DIRECTIONS,
    OPEN_WORDS,
    SHAPES,
    SIZES,
    SPEED_OF,
    STEP_OF,
    STILL,
    STOP_WORDS,
    VOCABULARY,
    Clause,
)

_DIRECTION_OF = {step: name for name, step in DIRECTIONS.items()}


def tokenize(caption: str) -> list[str]:
    """The caption's words in lower case; white space separates, a comma is a word, full stops are dropped."""
    return caption.lower().replace(",", " , ").replace(".", " ").split()


def parse_caption(caption: str) -> list[Clause]:
    """The clauses of a caption, the exact inverse of `write_caption`.

    Raises: DataError when a word is unknown, or when a clause says too little or contradicts itself.
    """
    words, spans = tokenize(caption), clause_spans(caption)
    number = max(spans, default=-1) + 1
    if number == 0:
        raise DataError(f"caption {caption!r} has no clause; each begins with the word {ARTICLE!r}")
    return [
        _parse_clause([word for word, span in zip(words, spans) if span == clause], caption) for clause in range(number)
    ]


def clause_spans(caption: str) -> list[int]:
    """For each word of `tokenize(caption)` the index of its clause; -1 for the connectors between clauses."""
    words = tokenize(caption)
    spans, clause = [], -1
    for index, word in enumerate(words):
        clause += word == ARTICLE
        spans.append(clause)
        if word == ARTICLE:
            # ", and" before an article joins clauses; the "and" of "up and left" has no article after it.
            back = index - 1
            while back >= 0 and words[back] in CONNECTOR_WORDS:
                spans[back] = -1
                back -= 1
    return spans


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
        if word in SPEED_OF:
            found["speed"].add(SPEED_OF[word])
        is_open |= word in OPEN_WORDS
        stops |= word in STOP_WORDS
        for axis, value in enumerate(STEP_OF.get(word, (0, 0))):
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
