"""The error of what a server does not offer."""

from __future__ import annotations


class Refused(Exception):  # noqa: N818 - no fault of anyone
    """An extension of the protocol that this server does not have, or that is turned off."""
