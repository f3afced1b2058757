"""What the name of a revision says of its training, and the order that follows from it.

    stage1-step1000-tokens3B                   stage 1, step 1000, 3 billion tokens
    stage2-ingredient1-step11931-tokens50B     stage 2, ingredient 1, step 11931, 50 billion tokens
    step_250_lr1e-6                            step 250
    main                                       nothing

The parts are read wherever they stand, so that a name nobody thought of still says what it can.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_BEHIND = r"[-_]?(\d+)(?![\d.])"
_STAGE, _INGREDIENT, _STEP = (re.compile(word + _BEHIND, re.IGNORECASE) for word in ("stage", "ingredient", "step"))
_TOKENS = re.compile(r"tokens[-_]?(\d+)B(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class TrainingPoint:
    """A point of a model's training; None: the name does not say."""

    stage: int | None
    ingredient: int | None
    """which of several runs of that stage, whose weights are averaged afterwards"""
    step: int | None
    """optimiser steps of the stage"""
    tokens_b: int | None
    """billions of training tokens of the stage"""


def read_name(name: str) -> TrainingPoint:
    """Read a revision's name."""
    stage, ingredient, step, tokens = (_number(part, name) for part in (_STAGE, _INGREDIENT, _STEP, _TOKENS))
    return TrainingPoint(stage, ingredient, step, tokens)


def _number(part: re.Pattern[str], name: str) -> int | None:
    found = part.search(name)
    return int(found[1]) if found else None


def training_order(name: str) -> tuple[bool, float, float, float, str]:
    """Return what names are sorted by: stage, ingredient, step; what is not said comes before, but no step after.

    Names that say neither, such as main, come last: they are what the training ended in.
    """
    point = read_name(name)
    said = point.stage is not None or point.step is not None
    step = math.inf if point.step is None else point.step
    return not said, point.stage or 0, point.ingredient or 0, step, name
