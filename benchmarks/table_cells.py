"""What tables have in common: how machines, runs and cells read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def machine(header: dict[str, Any]) -> str:
    """Machine, versions and commit: what runs on one day have in common."""
    versions = ", ".join(f"{name} {header[name]}" for name in ("python", "torch", "transformers", "mlmfast"))
    cpu = f"{header['cpu']} ({header['instructions']}), {header['threads']} threads"
    if "device" in header:
        gpu = header["device"]
        cpu = f"{gpu['name']} (compute capability {gpu['capability']}), {cpu}"
        versions += f", CUDA {gpu['cuda']}, Triton {gpu['triton']}"
    return f"{cpu}; {versions}; commit {header['commit']}"


def described(header: dict[str, Any]) -> str:
    """A run: what it compared with, where and when."""
    against = header.get("peers") or dict.fromkeys(header["settings"]["against"], "")
    peers = ", ".join(f"{name} {version}".rstrip() for name, version in against.items())
    note = f" {header['note']}" if "note" in header else ""
    for later in header.get("continued", []):
        note += f" Continued {later['time']}, load {later['load']}."
    return f"{machine(header)}; against {peers}; {header['time']}, load {header['load']} at the start.{note}"


def peer_name(row: dict[str, Any]) -> str:
    """The peer, with its dtype where that is another than ours."""
    return row["peer"] if row["peer_dtype"] == row["dtype"] else f"{row['peer']} {row['peer_dtype']}"


def refusal(details: dict[str, Any]) -> str:
    """Why a row has no speed."""
    if "failure" in details:
        return f"failed: {details['failure']}"
    found = [details["side"]] if details.get("side") in ("mlmfast", "the peer") else []
    found += [f"{name} {details[name]:.2g}" for name in ("error", "bound") if details.get(name) is not None]
    return f"disagrees ({', '.join(found)})" if found else "disagrees"


def spread(value: float, quartiles: Sequence[float], unit: str) -> str:
    return f"{value:.3g}{unit} ({quartiles[0]:.3g}-{quartiles[1]:.3g})"


def unique(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(items))
