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
_UNKNOWN = "unknown to this version"


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
    """What was set, at once; all of it, section by section, for those who open it."""
    if not settings:
        return note("The run folder has no config.yaml.")
    known, own = known_settings(), changed(settings)
    sections: dict[str, list[str]] = {}
    for name in settings:
        sections.setdefault(known[name].section if name in known else _UNKNOWN, []).append(name)
    parts = [
        folded(
            joined(tag("b", title), f" {len(set(own).intersection(names))} of {len(names)} differ from the defaults"),
            _settings_table(settings, names, own, f"Settings of the section {title}"),
        )
        for title, names in sections.items()
    ]
    if not own:
        return joined(note("All settings are at their defaults."), *parts)
    return joined(_settings_table(settings, own, [], "Settings that differ from the defaults"), *parts)


def _settings_table(settings: Mapping[str, Any], names: Sequence[str], own: Sequence[str], caption: str) -> Markup:
    known = known_settings()
    rows = [_row(name, settings[name], known[name].default if name in known else None, name in own) for name in names]
    return table(["setting", "value", "default"], rows, caption, text_columns=3)


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
