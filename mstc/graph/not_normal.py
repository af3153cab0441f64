"""Why a graph is left as it came."""

from __future__ import annotations


class NotNormalError(Exception):
    """The graph as a whole cannot be brought to normal form; it is lowered as it was.

    node, source: where the obstacle stands ("" if it is not one node's).
    """

    def __init__(self, reason: str, node: str = "", source: str = "", remedy: str = "") -> None:
        super().__init__(reason)
        self.reason, self.node, self.source, self.remedy = reason, node, source, remedy
