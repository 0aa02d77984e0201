"""Surprisal -> colour: one sequential scale in two themes, told apart by lightness alone and so by every eye."""

from __future__ import annotations

from itertools import pairwise

# A step is half a nat; the last one is everything from 12 nats on.
STEPS = 25
NATS = 0.5

# After matplotlib's magma (CC0), whose lightness only rises. The near end is the page's, the far one is what surprises.
LIGHT = ("#f7f3ea", "#fde2b4", "#fec488", "#fc8961", "#e75263", "#b73779", "#832681", "#51127c")
DARK = ("#211f26", "#5a1a80", "#8c2981", "#b73779", "#e75263", "#fc8961", "#fec488", "#fcfdbf")


def step_of(logprob: float) -> int:
    """A token's place on the scale, 0 to ``STEPS - 1``, by its surprisal ``-logprob`` in nats."""
    return min(STEPS - 1, max(0, int(-logprob / NATS)))


def scale(stops: tuple[str, ...]) -> list[tuple[str, str]]:
    """``STEPS`` pairs ``"#rrggbb"`` of a background and of the text on it, black or white, whichever is read better.

    One of the two always has a contrast of at least 4.58.
    """
    found = []
    for step in range(STEPS):
        place = step / (STEPS - 1) * (len(stops) - 1)
        left = min(int(place), len(stops) - 2)
        low, high = (_channels(stop) for stop in list(pairwise(stops))[left])
        mixed = [round(a + (b - a) * (place - left)) for a, b in zip(low, high)]
        background = "#" + "".join(f"{channel:02x}" for channel in mixed)
        found.append((background, max("#000000", "#ffffff", key=lambda text: contrast(background, text))))
    return found


def contrast(one: str, other: str) -> float:
    """Contrast of two colours ``"#rrggbb"``, 1 to 21 (WCAG 2.2)."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    """Relative luminance of ``"#rrggbb"``, 0 to 1 (WCAG 2.2)."""
    shares = (channel / 255 for channel in _channels(colour))
    linear = (share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares)
    return sum(weight * share for weight, share in zip((0.2126, 0.7152, 0.0722), linear))


def _channels(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
