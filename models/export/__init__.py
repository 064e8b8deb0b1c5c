"""A model in the forms of other libraries, each read back by its own library before it counts as exported."""

from __future__ import annotations

from models.export.exporter import TARGETS, check_export, export_model

__all__ = ["TARGETS", "check_export", "export_model"]
