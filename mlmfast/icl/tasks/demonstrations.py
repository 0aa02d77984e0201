"""Which solved examples stand before a test example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from lm_eval.api.samplers import ContextSampler

from mlmfast.errors import RequestError
from mlmfast.icl.tasks.rows import INDEX


class PerExample(ContextSampler):
    """Draws afresh for each test example, by seed, task and the example's row.

    lm_eval's own sampler goes on from draw to draw, so that what an example gets depends on those before it.

    Attributes:
        task: its name, so that two tasks with one seed do not draw alike.
        around: None if the pool is not the test split; else how far around the test example none is drawn, 0 for
            itself alone.
    """

    task = ""
    around: int | None = None

    def set_rnd(self, rnd: int | None) -> PerExample:
        self.seed = rnd
        return self

    def sample(
        self,
        n: int,
        eval_doc: dict[str, Any] | None = None,
        df: Sequence[dict[str, Any]] | None = None,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """``n`` distinct rows of the pool, none of them the test example itself.

        Raises:
            RequestError: the pool is too small.
        """
        assert eval_doc is not None
        pool: Sequence[dict[str, Any]] = self.df if df is None else df
        place, content = eval_doc[INDEX], without_place(eval_doc)
        rng = Random(f"{self.seed} {self.task} {place}")
        seen: set[int] = set()
        drawn: list[dict[str, Any]] = []
        while len(drawn) < n:
            if len(seen) == len(pool):
                raise RequestError(f"{self.task}: {n} demonstrations are asked for, {len(drawn)} rows can be drawn")
            i = rng.randrange(len(pool))
            if i in seen:
                continue
            seen.add(i)
            near = self.around is not None and abs(pool[i][INDEX] - place) <= self.around
            # Test rows may have fields that demonstrations lack, as WSC's candidates.
            shown = without_place(pool[i])
            if not near and shown != {name: content.get(name) for name in shown}:
                drawn.append(pool[i])
        return drawn


def without_place(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != INDEX}
