"""How many copies of a request are identical to others, and so need not be computed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mlmfast.masking import MaskPlan
from mlmfast.packing import unique_copies


@dataclass(frozen=True)
class Savings:
    """Copies of some requests, each deduplicated for itself.

    Attributes:
        requests: number of plans.
        requested: copies that they ask for.
        unique: copies that have to be computed.
    """

    requests: int
    requested: int
    unique: int

    @property
    def share(self) -> float:
        """The part of the copies that is saved, 0 for no copies."""
        return 1 - self.unique / self.requested if self.requested else 0.0


def savings(plans: Iterable[MaskPlan]) -> Savings:
    """Counts the copies of plans that are computed one after another: none is shared between two of them."""
    requests = requested = unique = 0
    for plan in plans:
        requests += 1
        requested += plan.copies
        unique += unique_copies(plan)
    return Savings(requests, requested, unique)
