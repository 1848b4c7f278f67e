"""What a server does not offer, and why."""

from __future__ import annotations


class Refused(Exception):  # noqa: N818 - no fault of anyone
    """An extension of the protocol that this server does not have, or that is turned off."""


FIXED = "this server has one model, chosen with --model: it loads and unloads none"
NO_TRACES = "this server keeps no traces: see /metrics, and the output report"
NO_LOGS = "the log of this server is set up on its command line"
