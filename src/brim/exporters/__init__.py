"""Plans in the words of training frameworks: renamed, never computed."""

from __future__ import annotations

from brim.exporters.record import Export, ExportFile
from brim.exporters.render import export_plan, list_targets, write_export

__all__ = ["Export", "ExportFile", "export_plan", "list_targets", "write_export"]
