"""A name, a folder or a live model -> :class:`~mlmfast.model.MaskedLM`, and nothing unsafe on the way.

Weights come from safetensors, or from ``.bin`` through torch's restricted loader. Remote code never runs. A checkpoint
whose scores would be noise (no prediction head, NaN weights) is refused.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer
from transformers.utils import cached_file

from mlmfast.architectures import family_module
from mlmfast.errors import CheckpointError, MLMFastError, RequestError, UnsupportedModelError
from mlmfast.generic import generic_types, masked_class
from mlmfast.masking import OBJECTIVES
from mlmfast.model import MaskedLM

SEMANTICS = ("trained", "upstream")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

# As transformers looks for them: single file before shards, safetensors before pickles.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# What readers of weights raise on a file that is cut short, not theirs, or missing a part.
UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, SafetensorError)


def load(
    model: str | os.PathLike[str] | Any,
    tokenizer: Any = None,
    *,
    semantics: str | None = None,
    objective: str = "mlm",
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    backend: str = "auto",
    batch_tokens: int | None = None,
    cuda_graphs: bool = True,
    revision: str | None = None,
    allow_random_head: bool = False,
) -> MaskedLM:
    """Loads a masked language model.

    Args:
        model: ``"tiny"`` (bundled), a folder, a Hub name, or a live Hugging Face ``...ForMaskedLM``, whose weights are
            shared, not copied: scoring after a training step uses the new ones (after writing through
            ``parameter.data``, call :meth:`MaskedLM.refresh`).
        tokenizer: a transformers tokenizer, or a name or folder to load one from; needed beside a live model,
            otherwise the checkpoint's own is loaded.
        semantics: ``"trained"``, the model as it was trained, or ``"upstream"``, exactly what transformers computes
            (they differ for DeBERTa beyond its trained length or with its enhanced mask decoder). None: trained for
            names and folders, upstream for live models.
        objective: what the model was trained for: ``"mlm"``, a masked token is predicted at its own position, or
            ``"mntp"``, at the one before it (masked-next-token prediction, as GPT-BERT is trained).
        dtype: ``"auto"`` (float32; a live model's own), ``"float32"``, ``"bfloat16"``, ``"float16"``, ``"float64"``.
        device: ``"auto"`` (CUDA if there is one; a live model's own) or a torch device.
        backend: ``"auto"``, or the name of one that must serve every op.
        batch_tokens: most packed rows computed at once; bounds memory. None: what suits the device, on CUDA by the
            memory that is free at each request.
        cuda_graphs: on CUDA, record the pass of a small batch whose shape returns and replay it in one launch; a
            recording holds some memory. Elsewhere it means nothing.
        revision: of a Hub name.
        allow_random_head: accept a checkpoint that lacks its prediction head. Its scores are noise.

    Raises:
        UnsupportedModelError: an option of a family that is not implemented, or a model that is none of transformers'
            masked ones; the known families are named.
        CheckpointError: nothing to load, or unsafe, incomplete or NaN weights.
        RequestError: arguments that do not go together.
        BackendError: ``backend`` is not known or cannot serve here.
    """
    live = not isinstance(model, (str, os.PathLike))
    model = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = load_tokenizer(os.fspath(tokenizer), {"trust_remote_code": False})
    if semantics is None:
        semantics = "upstream" if live else "trained"
    if semantics not in SEMANTICS:
        raise RequestError(f"semantics={semantics!r} is not known; choose one of {', '.join(SEMANTICS)}")
    if objective not in OBJECTIVES:
        raise RequestError(f"objective={objective!r} is not known; choose one of {', '.join(OBJECTIVES)}")
    if live:
        name = check_live(model, tokenizer, None if dtype == "auto" else dtype_of(dtype), device)
        return MaskedLM(
            model,
            tokenizer,
            name=name,
            semantics=semantics,
            extras={},
            backend=backend,
            batch_tokens=batch_tokens,
            cuda_graphs=cuda_graphs,
            objective=objective,
        )
    name = os.path.expanduser(os.fspath(model))
    place = device_of(device)
    source = str(Path(__file__).with_name("tiny")) if model == "tiny" else name  # Path("tiny") is a folder
    loaded = load_checkpoint(
        source,
        semantics=semantics,
        dtype=torch.float32 if dtype == "auto" else dtype_of(dtype),
        device=place,
        revision=revision,
        allow_random_head=allow_random_head,
        tokenizer=tokenizer,
    )
    return MaskedLM(
        loaded.model,
        loaded.tokenizer,
        name=name,
        semantics=semantics,
        extras=loaded.extras,
        backend=backend,
        batch_tokens=batch_tokens,
        cuda_graphs=cuda_graphs,
        objective=objective,
    )


def dtype_of(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype by its name.

    Raises:
        RequestError: one that weights are not loaded in.
    """
    found = dtype if isinstance(dtype, torch.dtype) else DTYPES.get(dtype)
    if found not in DTYPES.values():
        raise RequestError(f"dtype={dtype!r} is not known; choose 'auto' or one of {', '.join(DTYPES)}")
    return cast(torch.dtype, found)


def device_of(device: str | torch.device) -> torch.device:
    """A device by its name; ``"auto"`` is CUDA if there is one.

    Raises:
        RequestError: it cannot be used here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise RequestError(f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return torch.device(device)


@dataclass(frozen=True)
class Checkpoint:
    """What loading found: the model, its tokenizer, and tensors that transformers leaves behind."""

    model: Any
    tokenizer: Any
    extras: dict[str, Tensor]


def load_checkpoint(
    name: str,
    *,
    semantics: str,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None = None,
    allow_random_head: bool = False,
    tokenizer: Any = None,
) -> Checkpoint:
    """Loads a masked LM by Hub name or from a folder.

    Raises:
        UnsupportedModelError: the family is not known.
        CheckpointError: nothing is there, or what is there is unsafe, incomplete or not finite.
    """
    options: dict[str, Any] = {"trust_remote_code": False}
    if revision is not None:
        options["revision"] = revision
    with quiet_transformers():
        config, family = _config(name, options)
        try:
            files = weight_files(name, revision)
            keys = {key for file in files for key in tensor_names(file)}
            if family is not None and hasattr(family, "prepare_config"):
                family.prepare_config(config, keys, semantics)
            model, info = AutoModelForMaskedLM.from_pretrained(
                name,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                weights_only=True,
                ignore_mismatched_sizes=True,  # they are named and refused below; transformers' own report is silenced
                **options,
            )
            wanted = [key for key in getattr(family, "EXTRAS", ()) if key in keys]
            extras = {key: tensor.to(device, dtype) for key, tensor in read_tensors(files, wanted).items()}
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{name}: its .bin file holds more than tensors, and torch's restricted loader refuses it; "
                "ask for safetensors weights, or convert the file where you trust it"
            ) from error
        except MLMFastError:
            raise
        except UNREADABLE as error:
            raise CheckpointError(f"{name}: its weights cannot be read: {error}") from error
        if tokenizer is None:
            tokenizer = load_tokenizer(name, options)
    base = f"{model.base_model_prefix}."
    missing = sorted([*info["missing_keys"], *(str(key[0]) for key in info.get("mismatched_keys", ()))])
    missing = [key for key in missing if not key.endswith("inv_freq")]  # rotary frequencies follow from the config
    headless = not any(key.startswith(base) for key in missing)
    if missing and not (allow_random_head and headless):
        remedy = (
            "use a checkpoint with its masked-LM head, or pass allow_random_head=True if you mean it"
            if headless
            else "the file is incomplete or belongs to another architecture"
        )
        raise CheckpointError(
            f"{name}: {len(missing)} tensors are not in the checkpoint in the config's shape and would be freshly "
            f"initialised ({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}), so its scores would be noise; "
            f"{remedy}"
        )
    model.eval().to(device)
    check_finite(name, {**dict(model.named_parameters()), **extras})
    return Checkpoint(model, tokenizer, extras)


def check_live(model: Any, tokenizer: Any, dtype: torch.dtype | None, device: str | torch.device) -> str:
    """Judges a live model as :func:`load_checkpoint` judges a stored one, and returns its name.

    Raises:
        RequestError: not a Hugging Face model, no tokenizer, or a dtype or device that is not the model's own.
        UnsupportedModelError: the family is not known.
        CheckpointError: no masked-LM head, or weights that are not finite.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise RequestError(f"load() takes a name, a folder or a Hugging Face model, not a {type(model).__name__}")
    config: Any = model.config
    name = getattr(config, "name_or_path", "") or type(model).__name__
    # A class that is not transformers' own is code that the caller has chosen to run; what it gives is probed.
    if masked_class(model) is None and type(model).__module__.startswith("transformers."):
        expected: Any = AutoModelForMaskedLM._model_mapping.get(type(config), None)
        if expected is None:
            family_module(config.model_type, name)
            raise UnsupportedModelError(
                f"{name}: its config is a {type(config).__name__}, which is not transformers' own; its code may "
                "compute something else. Load the checkpoint by name or folder instead"
            )
        raise CheckpointError(f"{name} is a {type(model).__name__}; a {expected.__name__} is needed to predict tokens")
    if tokenizer is None:
        raise RequestError("a live model needs its tokenizer: load(model, tokenizer)")
    own = next(model.parameters())
    if dtype is not None and dtype != own.dtype:
        raise RequestError(f"a live model keeps its dtype ({own.dtype}); convert it yourself: model.to({dtype})")
    if device != "auto" and device_of(device) not in (own.device, torch.device(own.device.type)):
        raise RequestError(f"a live model stays on its device ({own.device}); move it yourself: model.to({device!r})")
    check_finite(name, dict(model.named_parameters()))
    return name


def _config(name: str, options: dict[str, Any]) -> tuple[Any, ModuleType | None]:
    """The config and its family's module, None for a generic model; judged before any class is looked for."""
    try:
        raw, _ = transformers.PreTrainedConfig.get_config_dict(name, **options)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name}: no model is there; give 'tiny', a folder with a config.json, or a name on the Hub ({error})"
        ) from error
    if not raw:
        raise CheckpointError(f"{name}: no config.json is there; give 'tiny', a folder with one, or a name on the Hub")
    model_type = raw.get("model_type")
    try:
        family = None if model_type in generic_types() else family_module(model_type, name)
    except UnsupportedModelError as error:
        if "auto_map" in raw:
            raise UnsupportedModelError(f"{error}; it asks for remote code, which mlmfast never runs") from None
        raise
    try:
        return AutoConfig.from_pretrained(name, **options), family
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{name}: its config.json cannot be used: {error}") from error


def load_tokenizer(name: str, options: dict[str, Any]) -> Any:
    """The tokenizer that belongs to a checkpoint."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:  # tokenizers raise anything from OSError to a bare Exception
        raise CheckpointError(f"{name}: its tokenizer cannot be loaded: {error}") from error
    # Without tokenizer files transformers makes one up that knows its special tokens and at most a word boundary.
    pieces = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    if not any(re.search(r"\w", piece) and not re.match(r"[<\[].+[>\]]", piece) for piece in pieces):
        raise CheckpointError(
            f"{name}: its tokenizer has no vocabulary, so every word would be unknown; save the tokenizer beside the "
            "model, or pass load(model, tokenizer)"
        )
    return tokenizer


def weight_files(name: str, revision: str | None = None) -> list[Path]:
    """Local paths of the files that hold the weights, fetched from the Hub where they are not here yet."""
    for candidate in WEIGHT_FILES:
        found = _local(name, candidate, revision)
        if found is None:
            continue
        if not candidate.endswith(".index.json"):
            return [found]
        shards = sorted(set(json.loads(found.read_text())["weight_map"].values()))
        paths = [_local(name, shard, revision) for shard in shards]
        absent = [shard for shard, path in zip(shards, paths) if path is None]
        if absent:
            raise CheckpointError(f"{name}: {candidate} names {absent[0]}, which is not there")
        return [path for path in paths if path is not None]
    raise CheckpointError(f"{name}: no weights are there; looked for {', '.join(WEIGHT_FILES)}")


def _local(name: str, file: str, revision: str | None) -> Path | None:
    folder = Path(name)
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    path = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if path is None else Path(path)


def tensor_names(file: Path) -> list[str]:
    """Names of the tensors in a weights file."""
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as reader:
            return list(reader.keys())
    return list(_read_bin(file))


def read_tensors(files: list[Path], names: list[str]) -> dict[str, Tensor]:
    """Some tensors of a checkpoint by name."""
    found: dict[str, Tensor] = {}
    for file in files if names else []:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as reader:
                found |= {name: reader.get_tensor(name) for name in names if name in reader.keys()}  # noqa: SIM118
        else:
            held = _read_bin(file)
            found |= {name: held[name] for name in names if name in held}
    return found


def _read_bin(file: Path) -> dict[str, Tensor]:
    """A ``.bin`` through the restricted loader; mapped, where its format (a zip file since torch 1.6) allows."""
    return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))


def check_finite(name: str, weights: Mapping[str, Tensor]) -> None:
    """Refuses weights that would make every score NaN."""
    for key, tensor in weights.items():
        # By pieces: isfinite takes a copy and a mask, and word embeddings are most of a model.
        if not all(bool(torch.isfinite(piece).all()) for piece in tensor.flatten().split(1 << 22)):
            raise CheckpointError(
                f"{name}: weight {key!r} holds NaN or infinite values, so its scores would be meaningless; "
                "use an earlier checkpoint or look for the overflow in its training"
            )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' loading bars and reports off the terminal; what matters is raised instead."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
