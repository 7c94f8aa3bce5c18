"""What keeps one row from being measured, and no other."""

from __future__ import annotations

from uq.errors import UqError


class NotRun(UqError):
    """A row cannot be made here; the message is the reason that the table gives."""
