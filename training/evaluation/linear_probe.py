"""Linear probe: how well a linear classifier on the image tower's features does. Knows no files and no texts.

Logistic regression on features of length 1, fitted by L-BFGS; the strength of its regularisation is chosen on images
held out of the training split (Radford et al. 2021, appendix A.3). Ranks share the encoding of images, and the
strengths that are tried; every fit sees all features in the order of the set, in float64, from zeros. So a figure
does not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data import EvalBatch
from training.distributed import World
from training.errors import DataConfigError
from training.evaluation.features import encode_images, evaluating
from training.evaluation.feed import ShouldStop, Stopped, filled, in_step, with_checked_labels
from training.evaluation.hits import count_hits, figures_of, no_hits

# Half a decade apart, from no classifier at all to hardly any regularisation of features of length 1.
STRENGTHS = tuple(10 ** (-exponent / 2) for exponent in range(2, 17))
MAX_ITERATIONS = 1000
# Of a class, so many images are fitted for one that is held out.
_FITTED_FOR_ONE_HELD_OUT = 4
_ITERATIONS_A_ROUND = 20
_SCORES_A_BLOCK = 8_000_000  # 64 MB in float64
_WORTH_THREADS = 100_000_000  # multiplications of one evaluation


@dataclass(frozen=True)
class LabelledFeatures:
    """A split in its own order, on the rank's device: features float64 [N, E] of length 1, labels int64 [N]."""

    features: Tensor
    labels: Tensor

    def rows(self, wanted: Tensor) -> LabelledFeatures:
        """Those of a mask, bool [N]."""
        return LabelledFeatures(self.features[wanted], self.labels[wanted])


def linear_probe(
    model: nn.Module,
    train: Iterator[EvalBatch],
    test: Iterator[EvalBatch],
    num_classes: int,
    batch_size: int,
    image_size: tuple[int, int],
    precision: str = "fp32",
    world: World | None = None,
    should_stop: ShouldStop | None = None,
) -> dict[str, float]:
    """Figures of the test split in [0, 1], as `figures_of` names them, and `strength`, the one that was chosen.

    train, test: this rank's labelled batches, of up to `batch_size` rows. Collective. Raises DataConfigError for an
    empty split or a label outside the classes, Stopped when asked to stop.
    """
    world = world or World()
    with evaluating(model, world):
        splits = []
        for name, batches in (("train", train), ("test", test)):
            checked = with_checked_labels(batches, num_classes)
            splits.append(_features(name, model, checked, batch_size, image_size, precision, world, should_stop))
    fitted_on, tested_on = splits
    with _fitting_threads(fitted_on, num_classes):
        strength = choose_strength(fitted_on, num_classes, world, should_stop)
        fit = Fit(fitted_on, num_classes, strength)
        _run([fit], world, should_stop)
    # Every rank has the same classifier; each counts its share of the images.
    counts = no_hits(num_classes) + _counts(fit.classifier(), tested_on, world.rank, world.size)
    return figures_of(counts, world) | {"strength": strength}


@contextmanager
def _fitting_threads(train: LabelledFeatures, num_classes: int) -> Iterator[None]:
    """Inside: one thread for small products, whose many threads would wait for each other more than compute."""
    before = torch.get_num_threads()
    is_small = train.features.numel() * num_classes < _WORTH_THREADS
    torch.set_num_threads(1 if is_small else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def choose_strength(
    train: LabelledFeatures, num_classes: int, world: World, should_stop: ShouldStop | None = None
) -> float:
    """The strength under which most held-out images are right; of equal ones the greatest. Collective."""
    held_out = held_out_rows(train.labels)
    if not held_out.any():
        return STRENGTHS[len(STRENGTHS) // 2]  # no class has images to spare
    fitted, judged = train.rows(~held_out), train.rows(held_out)
    own = {index: Fit(fitted, num_classes, STRENGTHS[index]) for index in range(world.rank, len(STRENGTHS), world.size)}
    _run(list(own.values()), world, should_stop)
    hits = {index: int(_counts(fit.classifier(), judged)[1].sum()) for index, fit in own.items()}
    every = {index: right for part in world.all_gather_object(hits) for index, right in part.items()}
    return STRENGTHS[max(sorted(every), key=lambda index: every[index])]


def held_out_rows(labels: Tensor) -> Tensor:
    """bool [N]: the last of every few images of a class, in the order of the set."""
    share = _FITTED_FOR_ONE_HELD_OUT + 1
    seen: dict[int, int] = {}
    held_out = []
    for label in labels.tolist():
        seen[label] = seen.get(label, 0) + 1
        held_out.append(seen[label] % share == 0)
    return torch.tensor(held_out, dtype=torch.bool, device=labels.device)


class Fit:
    """One logistic regression: the mean cross-entropy plus strength / 2 times the squared weights, minimised.

    The bias is not regularised. `advance` does some iterations at a time, so that ranks can ask each other between.
    """

    def __init__(self, train: LabelledFeatures, num_classes: int, strength: float):
        self._train, self._strength = train, strength
        width = train.features.shape[1]
        # The last row is the bias.
        self._classifier = torch.zeros(
            width + 1, num_classes, dtype=torch.float64, device=train.features.device, requires_grad=True
        )
        self._optimizer = torch.optim.LBFGS(
            [self._classifier],
            max_iter=_ITERATIONS_A_ROUND,
            max_eval=2 * _ITERATIONS_A_ROUND,
            tolerance_grad=1e-8,
            tolerance_change=0,
            history_size=10,
            line_search_fn="strong_wolfe",
        )
        self._iterations, self._loss = 0, torch.inf
        self.done = False

    def advance(self) -> None:
        """A few iterations. `done` when they no longer help, or were too many."""
        loss = float(self._optimizer.step(self._evaluate))  # before these iterations
        self._iterations += _ITERATIONS_A_ROUND
        assert self._classifier.grad is not None
        is_flat = float(self._classifier.grad.abs().max()) <= 1e-8 or self._loss - loss < 1e-9 * abs(loss)
        self.done = is_flat or self._iterations >= MAX_ITERATIONS
        self._loss = loss

    def classifier(self) -> Tensor:
        """float64 [E + 1, C]: a weight for each feature, then the bias."""
        return self._classifier.detach()

    @torch.no_grad()
    def _evaluate(self) -> Tensor:
        """The objective, and its gradient into `grad`, in closed form and block by block."""
        train, weights = self._train, self._classifier
        loss = self._strength / 2 * weights[:-1].square().sum()
        grad = torch.cat([self._strength * weights[:-1], torch.zeros_like(weights[-1:])])
        for rows in _blocks(len(train.labels), weights.shape[1]):
            features, labels = train.features[rows], train.labels[rows]
            log_shares = _logits(features, weights).log_softmax(dim=1)
            loss -= log_shares.gather(1, labels[:, None]).sum() / len(train.labels)
            error = log_shares.exp_()
            error.scatter_add_(1, labels[:, None], error.new_full((len(labels), 1), -1.0)).div_(len(train.labels))
            grad[:-1].addmm_(features.T, error)
            grad[-1] += error.sum(dim=0)
        weights.grad = grad
        return loss


def _run(fits: Sequence[Fit], world: World, should_stop: ShouldStop | None) -> None:
    """This rank's fits to their ends, while the others work at theirs. Collective."""
    while True:
        waiting = [fit for fit in fits if not fit.done]
        if not world.any(bool(waiting)):  # Collective:
            return
        if should_stop is not None and world.any(should_stop()):  # Collective:
            raise Stopped
        world.pulse.beat()
        if waiting:
            waiting[0].advance()


def _features(
    name: str,
    model: nn.Module,
    batches: Iterator[EvalBatch],
    batch_size: int,
    image_size: tuple[int, int],
    precision: str,
    world: World,
    should_stop: ShouldStop | None,
) -> LabelledFeatures:
    """A whole split on every rank, in its own order. Collective."""
    own: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in in_step(batches, world, should_stop):
        images = filled(None if batch is None else batch.images, batch_size, image_size)
        features = encode_images(model, images, precision, world).cpu()
        if batch is not None:
            assert batch.labels is not None
            # A copy: a view would keep, and send, the rows that only fill up.
            own.append((batch.indices, features[: len(batch.images)].clone(), batch.labels))
    every = [part for parts in world.all_gather_object(own) for part in parts]
    if not every:
        raise DataConfigError(f"the {name} split is empty: no image was found in it")
    order = torch.cat([indices for indices, _, _ in every]).argsort()
    features = torch.cat([rows for _, rows, _ in every])[order]
    labels = torch.cat([rows for _, _, rows in every])[order]
    return LabelledFeatures(features.to(world.device).double(), labels.to(world.device))


def _counts(classifier: Tensor, split: LabelledFeatures, first: int = 0, step: int = 1) -> Tensor:
    """The counts [3, C] of blocks number `first`, `first + step`, ..."""
    counts = no_hits(classifier.shape[1])
    for rows in _blocks(len(split.labels), classifier.shape[1])[first::step]:
        counts += count_hits(_logits(split.features[rows], classifier), split.labels[rows].cpu())
    return counts


def _logits(features: Tensor, classifier: Tensor) -> Tensor:
    return torch.addmm(classifier[-1], features, classifier[:-1])


def _blocks(num_rows: int, num_classes: int) -> list[slice]:
    size = max(1, _SCORES_A_BLOCK // num_classes)
    return [slice(first, first + size) for first in range(0, num_rows, size)]
