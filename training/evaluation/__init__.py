"""Evaluation, exact over all ranks: zero-shot classification and retrieval. Knows nothing of training steps."""

from __future__ import annotations

from training.evaluation.classifier import DEFAULT_TEMPLATES, build_classifier
from training.evaluation.evaluator import Evaluator
from training.evaluation.feed import Stopped
from training.evaluation.retrieval import retrieval
from training.evaluation.zeroshot import zeroshot

__all__ = ["DEFAULT_TEMPLATES", "Evaluator", "Stopped", "build_classifier", "retrieval", "zeroshot"]
