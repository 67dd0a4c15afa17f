"""The one exception that is ours: a combination that nobody has made right yet."""

from __future__ import annotations


class UnsupportedError(NotImplementedError):
    """This model, layer, argument or device is not supported, and the message says which, why and what to do."""
