"""Which plan to make when it is exported at once: one that the target's release has words for."""

from __future__ import annotations

from typing import Any

from brim.cli.output import print_remark
from brim.errors import InvalidInput


def aim_at(export: str | None, version: str | None, job: dict[str, Any]) -> dict[str, Any]:
    """Return the options that make a plan one that the target has words for.

    Raises:
        InvalidInput: a release of no target. UnknownName: no such target or release.
    """
    if version is not None and export is None:
        raise InvalidInput("--for-version is the release of an export target: name the target with --export")
    if version is None:
        return {"target": export}
    from brim.planner.target import trainer_for_target
    from brim.tables.dialects import find_dialect
    from brim.tables.read import find_trainer

    dialect = find_dialect(str(export), version)
    if dialect == find_dialect(dialect.target):
        return {"target": export}
    # The planner knows the newest release; what an older one has no word for is refused by the export.
    name = trainer_for_target(dialect.target)
    if "trainer" in job:
        return {}
    if not set(find_trainer(name).loss_kernels) <= set(dialect.loss_kernels):
        # Before its own loss came, TRL trained as the Trainer of transformers under it does.
        print_remark(f"note: planned for trainer transformers: {dialect.versions} has no loss of {name}'s own")
        name = "transformers"
    return {"trainer": name}
