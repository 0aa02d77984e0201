"""Specs by their tensors, for tests that put them elsewhere or look for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor


def mapped(part: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A spec, or a part of one, with every tensor changed."""
    if isinstance(part, Tensor):
        return change(part)
    if is_dataclass(part):
        return replace(part, **{f.name: mapped(getattr(part, f.name), change) for f in fields(part)})  # type: ignore[type-var]
    return [mapped(one, change) for one in part] if isinstance(part, list) else part
