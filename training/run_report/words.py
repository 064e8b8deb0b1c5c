"""Numbers as a person reads them. Pure."""

from __future__ import annotations

import math
import time

THIN_SPACE = "\u202f"
NOTHING = "–"


def count(value: float) -> str:
    """1234567 as 1 234 567, with narrow spaces."""
    return f"{value:,.0f}".replace(",", THIN_SPACE)


def large(value: float) -> str:
    """A number of samples: 12.8 million."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {word}"
    return count(value)


def share(value: float, digits: int = 1) -> str:
    """0.1234 as 12.3 %."""
    return f"{100 * value:.{digits}f}{THIN_SPACE}%"


def duration(seconds: float) -> str:
    """In the two largest units that count: 3 d 4 h, 2 h 5 min, 1 min 20 s, 0.42 s."""
    if seconds < 10:
        return f"{seconds:.2g} s" if seconds else "0 s"
    whole = round(seconds)
    for size, name, below, lower in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // below} {lower}"
    return f"{whole} s"


def in_hours(seconds: float, largest_s: float) -> str:
    """Hours, with as many digits as a column whose largest entry is `largest_s` needs."""
    digits = 4 if largest_s < 3600 else 2 if largest_s < 360_000 else 0
    return f"{seconds / 3600:,.{digits}f}".replace(",", THIN_SPACE)


def moment(unix_seconds: float) -> str:
    """A point in time, in the reader's own zone, which is named."""
    return time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(unix_seconds))


def figure(name: str, value: float | None) -> str:
    """The value of a metric, by its kind: a share as a percentage, ranks and losses as numbers."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if name.endswith(("_rank", "num_samples", "num_captions")):
        return count(value) if value == round(value) else f"{value:,.1f}".replace(",", THIN_SPACE)
    return share(value) if name.endswith(("top1", "top5", "recall")) or "_R@" in name else f"{value:.4g}"
