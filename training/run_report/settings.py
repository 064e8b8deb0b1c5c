"""The configuration of runs: by section, against the defaults and against each other. Secrets come masked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from training.cli import settings as known_settings
from training.folder import plain
from training.run_report.history import History
from training.run_report.markup import Markup, folded, joined, note, section, table, tag
from training.run_report.words import NOTHING

_MISSING = object()


def settings_section(histories: Sequence[History]) -> Markup:
    """One run's settings by section, or what differs between several."""
    if len(histories) == 1:
        return section("Configuration", _by_section(histories[0].settings))
    parts = [folded(f"All settings of {history.name}", _by_section(history.settings)) for history in histories]
    return section("Configuration", _differences(histories), *parts)


def changed(settings: Mapping[str, Any]) -> list[str]:
    """Names of the settings that are not at their defaults, in the order of the sections."""
    defaults = plain({name: setting.default for name, setting in known_settings().items()})
    return [name for name in settings if settings[name] != defaults.get(name, _MISSING)]


def differing(all_settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the settings that are not the same in all runs."""
    names = dict.fromkeys(name for settings in all_settings for name in settings)
    return [
        name
        for name in names
        if any(s.get(name, _MISSING) != all_settings[0].get(name, _MISSING) for s in all_settings)
    ]


def _by_section(settings: Mapping[str, Any]) -> Markup:
    if not settings:
        return note("The run folder has no config.yaml.")
    known, own = known_settings(), set(changed(settings))
    sections: dict[str, list[str]] = {}
    for name in settings:
        sections.setdefault(known[name].section if name in known else "unknown here", []).append(name)
    parts = [
        folded(
            joined(tag("b", title), f" {len(own.intersection(names))} of {len(names)} differ from the defaults"),
            table(
                ["setting", "value", "default"],
                [
                    _row(name, settings[name], known[name].default if name in known else None, name in own)
                    for name in names
                ],
                f"Settings of the section {title}",
                text_columns=3,
            ),
            is_open=bool(own.intersection(names)),
        )
        for title, names in sections.items()
    ]
    return joined(note("What differs from the defaults is marked with ", tag("span", "●", class_="mark"), "."), *parts)


def _row(name: str, value: Any, default: Any, is_changed: bool) -> list[object]:
    mark = (
        tag("span", "●", class_="mark", title="differs from the default", aria_label="changed") if is_changed else None
    )
    return [joined(name, " " if mark else None, mark), tag("code", _shown(value)), tag("code", _shown(default))]


def _differences(histories: Sequence[History]) -> Markup:
    names = differing([history.settings for history in histories])
    if not names:
        return note("All runs have the same settings.")
    return table(
        ["setting", *(history.name for history in histories)],
        [[name, *(tag("code", _shown(h.settings.get(name, NOTHING))) for h in histories)] for name in names],
        "Settings that differ between the runs",
        text_columns=1 + len(histories),
    )


def _shown(value: Any) -> str:
    if value is None or value == "" or value in ([], ()):
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return repr(value) if value == "\t" else str(value)
