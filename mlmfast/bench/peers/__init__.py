"""What mlmfast is compared with. A peer takes the same weights and the same plan and returns the same numbers.

``--against`` names them, commas between; ``:float32`` or ``:bfloat16`` after a name gives that peer a dtype of its own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TypeVar

from mlmfast.bench.peers.disentangled_flash import DisentangledFlash
from mlmfast.bench.peers.exported import OnnxRuntime, OpenVINO
from mlmfast.bench.peers.flashdeberta import FlashDeBERTa
from mlmfast.bench.peers.huggingface import HuggingFaceCompiled, HuggingFaceEager
from mlmfast.bench.peers.minicons import Minicons
from mlmfast.bench.peers.scored import HuggingFaceScored
from mlmfast.bench.peers.subject import Peer, Served, Subject
from mlmfast.errors import RequestError

__all__ = ["PEERS", "DisentangledFlash", "FlashDeBERTa", "HuggingFaceCompiled", "HuggingFaceEager", "HuggingFaceScored"]
__all__ += ["Minicons", "OnnxRuntime", "OpenVINO", "Peer", "Subject", "named", "versions"]

PEERS: dict[str, type[Peer]] = {
    "hf": HuggingFaceEager,
    "hf-scored": HuggingFaceScored,
    "hf-compile": HuggingFaceCompiled,
    "disentangled-flash": DisentangledFlash,
    "flashdeberta": FlashDeBERTa,
    "minicons": Minicons,
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVINO,
}


Known = TypeVar("Known", bound=Served)


def named(against: Sequence[str], dtype: str, device: str = "cpu") -> dict[str, tuple[type[Peer], str]]:
    """The peers that ``--against`` names, each with the dtype it computes in; see :func:`chosen`."""
    return chosen(PEERS, against, dtype, device)


def chosen(
    known: Mapping[str, type[Known]], against: Sequence[str], dtype: str, device: str
) -> dict[str, tuple[type[Known], str]]:
    """Some of the peers that are known, each with the dtype it computes in.

    Args:
        known: by name.
        against: names of them, ``:dtype`` after one that computes in another dtype than mlmfast.
        dtype: mlmfast's.
        device: a device type, all sides'.

    Raises:
        RequestError: a name that is not known or not installed, or a dtype or device that a peer does not compute in.
    """
    if not against:
        raise RequestError(f"--against names nobody; choose from {', '.join(known)}")
    found: dict[str, tuple[type[Known], str]] = {}
    for label in against:
        name, _, own = label.partition(":")
        if name not in known:
            raise RequestError(f"peer {name!r} is not known; choose from {', '.join(known)}")
        peer, computed = known[name], own or dtype
        if computed not in peer.dtypes:
            instead = f"; --against {name}:{peer.dtypes[0]} compares with its {peer.dtypes[0]}" if not own else ""
            raise RequestError(f"{name} computes in {' or '.join(peer.dtypes)} here, not in {computed}{instead}")
        if device not in peer.devices:
            raise RequestError(f"{name} computes on {' or '.join(peer.devices)} here, not on {device}")
        missing = [package for package in peer.packages if importlib.util.find_spec(package) is None]
        if missing:
            raise RequestError(f"{name} needs {', '.join(missing)}: pip install {' '.join(missing)}")
        found[label] = (peer, computed)
    return found


def versions(against: Sequence[str]) -> dict[str, str]:
    """Versions of the packages that only peers need."""
    packages = {package for label in against for package in PEERS[label.partition(":")[0]].packages}
    return {package: version(package) for package in sorted(packages)}
