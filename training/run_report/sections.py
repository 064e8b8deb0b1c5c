"""The parts of the page that are numbers: the head, results, data and time. Knows no models."""

from __future__ import annotations

import re
from collections.abc import Sequence

from training.run_report.history import History, Measured, measured
from training.run_report.intake import Intake, intake_of
from training.run_report.markup import Markup, folded, joined, note, section, table, tag
from training.run_report.times import TimeSplit, split_times
from training.run_report.words import NOTHING, count, duration, figure, in_hours, large, moment, share

_KEY_FIGURES = ("top1", "_R@1", "clip_val_loss")
_SPELT = {"zeroshot": "zero-shot", "top1": "top-1", "top5": "top-5"}
_TILES = ("-top1", "text_to_image_R@1", "clip_val_loss")


def head(histories: Sequence[History]) -> Markup:
    """Who the runs are, how far they are and what they score."""
    if len(histories) == 1:
        return tag(
            "header",
            tag("h1", histories[0].name, " ", _badge(histories[0])),
            _progress(histories[0]),
            _tiles(histories[0]),
        )
    return tag("header", tag("h1", f"{len(histories)} runs"), _overview(histories))


def _badge(history: History) -> Markup:
    state = history.state()
    return tag("span", state, class_=f"badge {state}")


def _progress(history: History) -> Markup:
    step, total = history.last["step"], history.total_steps
    if not total:
        return tag("p", f"Step {count(step)}")
    bar = tag("progress", share(step / total), value=step, max=total, aria_label="steps done")
    return tag("p", bar, " ", f"step {count(step)} of {count(total)} ({share(step / total, 0)})", class_="progress")


def _tiles(history: History) -> Markup:
    facts = _facts(history)
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in facts), class_="tiles")


def _facts(history: History) -> list[tuple[str, str]]:
    """The few numbers of a run that are asked for first."""
    times, last = split_times(history.records), history.last
    facts = [("samples seen", large(last["samples_seen"])), ("epochs done", str(last["epoch"]))]
    if times is not None:
        facts.append(("time span", duration(times.total_s)))
        ranks = history.num_ranks
        if ranks:
            facts += [("ranks", str(ranks)), ("rank-hours", in_hours(ranks * times.total_s, ranks * times.total_s))]
        facts.append(("jobs", f"{times.num_jobs}" + (f" ({times.num_jobs - 1} resumed)" if times.num_jobs > 1 else "")))
    facts.append(("last record", moment(last["time"])))
    losses = [record["train/loss"] for record in history.training if record.get("train/loss") is not None]
    if losses:
        facts.append(("training loss", f"{losses[-1]:.4g}"))
    return [*facts, *_first_figures(measured(history.records))]


def _first_figures(figures: Sequence[Measured]) -> list[tuple[str, str]]:
    """One figure of each kind that tiles show."""
    chosen = [next((item for item in figures if item.name.endswith(kind)), None) for kind in _TILES]
    return [(_plain(item.name), figure(item.name, item.last[1])) for item in chosen if item is not None]


def _plain(name: str) -> str:
    """A figure's name for a reader: val/demo-zeroshot-top1 as demo zero-shot top-1."""
    words = name.removeprefix("val/").replace("clip_val_loss", "validation loss")
    return " ".join(_SPELT.get(word, word) for word in re.split("[-_/ ]", words))


def _overview(histories: Sequence[History]) -> Markup:
    facts = [
        dict([("state", history.state()), ("step", _step_in_words(history)), *_facts(history)]) for history in histories
    ]
    names = dict.fromkeys(name for own in facts for name in own)
    rows = [[name, *(own.get(name, NOTHING) for own in facts)] for name in names]
    return table(["", *(history.name for history in histories)], rows, "The runs side by side")


def _step_in_words(history: History) -> str:
    total = history.total_steps
    return count(history.last["step"]) + (f" of {count(total)}" if total else "")


def end_of_log(histories: Sequence[History]) -> Markup:
    """What each run said last."""
    lines = [(history.name, history.last_words) for history in histories]
    shown = [tag("p", f"Last line of {name}'s train.log: ", tag("code", words[1])) for name, words in lines if words]
    return joined(*shown)


def results_section(histories: Sequence[History]) -> Markup:
    """The figures of the evaluations: their last and their best values."""
    parts = [_named(history, histories, _results(history)) for history in histories]
    return section("Evaluations", *parts)


def _results(history: History) -> Markup:
    figures = measured(history.records)
    if not figures:
        return note("Nothing has been evaluated yet.")
    key = [item for item in figures if item.name.endswith(_KEY_FIGURES)]
    others = [item for item in figures if item not in key]
    rest = folded(f"{len(others)} further figures", _figures_table(others, "Further figures")) if others else None
    return joined(_figures_table(key, "Key figures") if key else None, rest)


def _figures_table(figures: Sequence[Measured], caption: str) -> Markup:
    heads = ["figure", "last", "at samples", "best", "at samples", "evaluations"]
    rows = [
        [
            _plain(item.name),
            figure(item.name, item.last[1]),
            large(item.last[0]),
            figure(item.name, item.best[1]),
            large(item.best[0]),
            item.num_evaluations,
        ]
        for item in figures
    ]
    return table(heads, rows, caption)


def data_section(histories: Sequence[History]) -> Markup:
    """What was read and what was lost of it."""
    return section("Data", *(_named(history, histories, _data(intake_of(history.records))) for history in histories))


def _data(intake: Intake | None) -> Markup:
    if intake is None:
        return note("The records hold no counts of samples.")
    reasons = [
        *((f"sample: {reason.replace('_', ' ')}", count(number)) for reason, number in intake.skipped_samples.items()),
        *((f"shard: {kind.replace('_', ' ')}", count(number)) for kind, number in intake.skipped_shards.items()),
    ]
    lost = table(["reason", "number"], reasons, "Samples and shards that could not be used") if reasons else None
    return joined(_sources(intake), lost or note("No sample and no shard was lost."))


def _sources(intake: Intake) -> Markup:
    total, rows = max(1, intake.used), []
    for source in intake.sources:
        read = source.used + source.skipped + source.filtered
        rows.append(
            [
                source.name,
                count(source.used),
                share(source.used / total),
                count(source.skipped),
                share(source.skipped / max(1, read), 2),
                count(source.filtered),
                NOTHING if source.epochs is None else f"{source.epochs:.2f}",
            ]
        )
    heads = ["source", "samples used", "share of used", "skipped", "share skipped", "filtered out", "passes"]
    return table(heads, rows, "Samples by source, over all ranks and jobs")


def time_section(histories: Sequence[History]) -> Markup:
    """Where the time went."""
    parts = [_named(history, histories, _time(history, split_times(history.records))) for history in histories]
    limits = note(
        "The other ranks' waits for data count as computing: rank 0 waits for them inside a step. "
        "A job's last checkpoint, and steps that were made again after a resume, are unaccounted."
    )
    return section("Time", *parts, limits)


def _time(history: History, times: TimeSplit | None) -> Markup:
    if times is None:
        return note("No step has been recorded yet.")
    kinds = [
        ("compute", "Computing", times.compute_s),
        ("data", "Waiting for data", times.data_s),
        ("checkpoint", "Checkpoints", times.checkpoint_s),
        ("evaluation", "Evaluations", times.evaluation_s),
        ("startup", "Start-up of jobs", times.startup_s),
        ("other", "Between jobs, and unaccounted", times.other_s),
    ]
    total = max(times.total_s, 1e-9)
    bar = [
        tag(
            "span",
            class_=f"part {kind}",
            style=f"width:{100 * seconds / total:.3f}%",
            title=f"{name} {share(seconds / total)}",
        )
        for kind, name, seconds in kinds
        if seconds / total >= 0.0005
    ]
    rows = [_time_row(kind, name, seconds, total) for kind, name, seconds in kinds]
    rows.append(["Whole span", *_both(total, total), share(1.0)])
    return joined(
        tag(
            "div",
            *bar,
            class_="bar",
            role="img",
            aria_label=f"Shares of the time span of {history.name}, as the table says",
        ),
        table(
            ["", "time", "hours", "share"],
            rows,
            f"Time of {times.num_jobs} job{'s' * (times.num_jobs != 1)}, as rank 0 saw it",
        ),
        None
        if times.pauses_known
        else note("These records do not tell checkpoints and evaluations apart from other pauses."),
    )


def _time_row(kind: str, name: str, seconds: float, total: float) -> list[object]:
    swatch = tag("span", class_=f"swatch {kind}", aria_hidden="true")
    return [joined(swatch, name), *_both(seconds, total), share(seconds / total)]


def _both(seconds: float, total_s: float) -> tuple[str, str]:
    return duration(seconds), in_hours(seconds, total_s)


def _named(history: History, histories: Sequence[History], content: Markup) -> Markup:
    """With several runs, the run's name above what is its own."""
    return joined(tag("h3", history.name), content) if len(histories) > 1 else content
