"""What can go wrong, by whose doing: the request, one text in it, the checkpoint, or the machine.

Every message names the culprit and the remedy.
"""

from __future__ import annotations


class MLMFastError(Exception):
    """Base class of every error that mlmfast raises on purpose."""


class RequestError(MLMFastError, ValueError):
    """The request itself is wrong (an unknown metric, a metric this tokenizer cannot serve, ``top_k=0``)."""


class TextError(MLMFastError, ValueError):
    """One text of a request cannot be scored; the others can.

    Attributes:
        index: place of the text in the request, counted from 0.
        reason: the message without the place.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"text {index} {reason}")
        self.index = index
        self.reason = reason

    def __reduce__(self) -> tuple[type[TextError], tuple[int, str]]:
        return type(self), (self.index, self.reason)


class CheckpointError(MLMFastError, ValueError):
    """A checkpoint that must not or cannot be used: no prediction head, NaN weights, an unsafe pickle."""


class UnsupportedModelError(CheckpointError):
    """A model family or an option of it that is not implemented; refused by name, never approximated."""


class BackendError(MLMFastError, RuntimeError):
    """A backend was asked for by name and cannot serve here."""
