"""The cells of a notebook that one of its cells needs, so that a test need not run all of them."""

from __future__ import annotations

import symtable


def names(source: str) -> tuple[set[str], set[str]]:
    """What a cell's code makes and what it uses, of the names that cells share."""
    made, used, tables = set(), set(), [symtable.symtable(source, "cell", "exec")]
    made |= {
        s.get_name()
        for s in tables[0].get_symbols()
        if s.is_assigned() or s.is_imported() or s.is_namespace()
    }
    for table in tables:
        top = table.get_type() == "module"
        used |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and (top or s.is_global())}
        tables += table.get_children()
    return made, used


def needed(cells: list, wanted: list[int]) -> list[int]:
    """Positions of the code cells that those at `wanted` need, and these themselves; the parameters always."""
    kept, missing = set(wanted), set()
    for i in reversed(range(len(cells))):
        if cells[i].cell_type != "code":
            continue
        made, used = names(cells[i].source)
        if i in kept or made & missing or "parameters" in cells[i].metadata.get("tags", []):
            kept.add(i)
            missing = (missing - made) | (used - made)
    return sorted(kept)
