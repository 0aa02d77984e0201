"""What every command shares: one line to stderr for whatever ends it early, and the exit status that goes with it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from mlmfast.errors import MLMFastError


def say(message: str) -> None:
    """One line to stderr."""
    typer.echo(f"mlmfast: {message}", err=True)


@contextmanager
def reporting() -> Iterator[None]:
    """Turns what ends a command early into one line on stderr and its exit status."""
    try:
        yield
        sys.stdout.flush()
    except MLMFastError as error:
        say(" ".join(str(error).split()))
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        say("interrupted")
        raise typer.Exit(130) from None
    except BrokenPipeError:
        # What is still buffered must not be tried again when Python closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from None
    except OSError as error:
        say(str(error))
        raise typer.Exit(2) from None
