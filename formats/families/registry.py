"""Every architecture that is known."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from uq.errors import CheckpointError
from uq.formats.decode import shown
from uq.formats.families import gemma, gemma2, gemma3, gemma3n, gemma4, vaultgemma
from uq.formats.families.family import Family

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        gemma.FAMILY,
        gemma2.FAMILY,
        gemma3.FAMILY,
        vaultgemma.FAMILY,
        gemma3n.FAMILY,
        gemma4.FAMILY,
        gemma4.UNIFIED,
    )
}
MODEL_TYPES: Mapping[str, Family] = {
    model_type: family for family in FAMILIES.values() for model_type in family.model_types
}


def known(found: object, names: Mapping[str, Family], what: str) -> Family:
    """The family of a name out of a file; `what` begins the message.

    Raises:
        CheckpointError: it is not known; names the nearest.
    """
    if isinstance(found, str) and found in names:
        return names[found]
    near = get_close_matches(str(found)[:100], names, n=1)
    nearest = f"; the nearest is {near[0]}" if near else ""
    raise CheckpointError(
        f"{what} {shown(found)} is not supported{nearest}; supported are: " + ", ".join(names)
    )
