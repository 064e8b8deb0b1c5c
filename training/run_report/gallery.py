"""Examples of what a model finds, as grids of pictures. Knows no model.

What is right is marked by a word and a frame, never by a colour alone.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence

from training.run_report.examples import ClassExamples, Guess, Hit, PairExamples, Query
from training.run_report.history import History
from training.run_report.markup import Markup, joined, note, section, tag
from training.run_report.selection import Findings
from training.run_report.words import count, share


def examples_section(histories: Sequence[History], findings: Sequence[Findings]) -> Markup:
    """What each run's model finds in the sets, or why nothing is shown."""
    parts: list[Markup] = []
    level = "h4" if len(histories) > 1 else "h3"
    for history, found in zip(histories, findings, strict=True):
        parts += [tag("h3", history.name)] if len(histories) > 1 else []
        parts += [note("By the weights of ", tag("code", found.checkpoint), ".")] if found.checkpoint else []
        parts += [
            _pairs(item, level) if isinstance(item, PairExamples) else _classes(item, level) for item in found.shown
        ]
        parts += [note(f"No examples: {reason}") for reason in found.missing]
    return section("Examples", *parts)


def _pairs(found: PairExamples, level: str) -> Markup:
    looked_at = (
        f"the first {count(len(found.pictures))} images and {count(len(found.captions))} captions of {found.label}"
    )
    return joined(
        tag(level, "Text to image"),
        note(f"Nearest images of a caption among {looked_at}, with the cosine of the angle between both."),
        *(_caption_query(found, query) for query in found.by_caption),
        tag(level, "Image to text"),
        note(f"Nearest captions of an image among {looked_at}."),
        tag("div", *(_image_query(found, query) for query in found.by_image), class_="cards"),
    )


def _caption_query(found: PairExamples, query: Query) -> Markup:
    caption = found.captions[query.index]
    images = [_image_hit(found, hit) for hit in query.hits]
    if query.right not in query.hits:
        images.append(_image_hit(found, query.right, f"rank {count(query.rank)}"))
    title = tag("figcaption", tag("q", caption), " ", _verdict(query, len(found.pictures)))
    return tag("figure", title, tag("ol", *images, class_="images"), class_="query")


def _image_hit(found: PairExamples, hit: Hit, place: str | None = None) -> Markup:
    own = found.captions[found.owner.index(hit.index)]
    marks = [tag("span", f"{hit.score:.3f}", class_="score"), _right(hit.is_right), place and tag("small", place)]
    return tag(
        "li", picture(found.pictures[hit.index], f"image with the caption: {own}"), *marks, class_=_kind(hit.is_right)
    )


def _image_query(found: PairExamples, query: Query) -> Markup:
    own = found.captions[query.right.index]
    lines = [_caption_hit(found, hit) for hit in query.hits]
    if query.right not in query.hits:
        lines.append(_caption_hit(found, query.right, f"rank {count(query.rank)}"))
    return tag(
        "figure",
        picture(found.pictures[query.index], f"image with the caption: {own}"),
        tag("figcaption", _verdict(query, len(found.captions)), tag("ol", *lines, class_="lines")),
        class_="card",
    )


def _caption_hit(found: PairExamples, hit: Hit, place: str | None = None) -> Markup:
    text = tag("span", found.captions[hit.index], " ", _right(hit.is_right), place and tag("small", " ", place))
    return tag("li", text, tag("span", f"{hit.score:.3f}", class_="score"), class_=_kind(hit.is_right))


def _verdict(query: Query, num_keys: int) -> Markup:
    return tag("span", f"right one at rank {count(query.rank)} of {count(num_keys)}", class_="verdict")


def _classes(found: ClassExamples, level: str) -> Markup:
    return joined(
        tag(level, "Zero-shot classification"),
        note(
            f"The likeliest of {count(found.num_classes)} classes for images among the first "
            f"{count(found.num_samples)} of {found.label}, with their share of the softmax."
        ),
        tag("div", *map(_guess, found.guesses), class_="cards"),
    )


def _guess(guess: Guess) -> Markup:
    lines = [
        tag(
            "li",
            tag("span", name, " ", _right(name == guess.right)),
            tag("span", share(value), class_="score"),
            tag("span", class_="strength", style=f"width:{100 * value:.1f}%", aria_hidden="true"),
            class_=_kind(name == guess.right),
        )
        for name, value in guess.guesses
    ]
    title = tag("span", "class: ", tag("b", guess.right), class_="verdict")
    image = picture(guess.picture, f"image of the class {guess.right}")
    return tag("figure", image, tag("figcaption", title, tag("ol", *lines, class_="lines")), class_="card")


def picture(jpeg: bytes, alt: str) -> Markup:
    """An image that is part of the page."""
    return tag("img", src=f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}", alt=alt)


def _right(is_right: bool) -> Markup | None:
    return tag("span", "✓ right", class_="mark") if is_right else None


def _kind(is_right: bool) -> str | None:
    return "right" if is_right else None
