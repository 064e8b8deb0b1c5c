"""Kinds of command-line arguments that several scripts take."""

from __future__ import annotations

import argparse


def positive(word: str) -> int:
    """A whole number of at least 1."""
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number
