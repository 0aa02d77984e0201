"""Any other masked language model of transformers, computed by its own code: exact, but without mlmfast's kernels.

A :class:`GenericSpec` stands where a family's file gives an :class:`~mlmfast.architectures.spec.EncoderSpec`. Of a
packed batch, copies of one length are computed together as they are. They are never padded: some models mix or pool
over all positions (FNet, Funnel), and copies are sorted by length, so that padding would save few passes.

Only scored rows pass the prediction head, where a :func:`probe` has found that this changes nothing; the same probe
refuses a model whose predictions are none that a score could be read from.
"""

from __future__ import annotations

import inspect
import re
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, pairwise
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from mlmfast.architectures import FAMILIES, family_module
from mlmfast.architectures.spec import EncoderSpec
from mlmfast.budget import out_of_memory
from mlmfast.errors import MLMFastError, UnsupportedModelError
from mlmfast.packing import Batch
from mlmfast.reference import accumulation
from mlmfast.reference.vocab_rows import row_chunks

FAMILY = "generic"
# Whose code a family's file stands for.
LIBRARIES = ("torch.", "transformers.")


def _activation(name: str) -> Any:
    """The class of one of transformers' activations; ``ACT2FN[name]`` would make one, and some say things then."""
    made = dict.__getitem__(ACT2FN, name)
    return made[0] if isinstance(made, tuple) else made


ACTIVATIONS = {_activation(name) for name in ACT2FN} - {nn.Identity}
OWN_ACTIVATION = re.compile(r"pooler|generator_predictions|contact_head")
# The probe's sequences: some that are computed together and alone, and one beyond the chunks of 64 tokens below which
# models that hash (Reformer) do not.
TOGETHER = (3, 7)
LONG = 160
# Differences of logits that are rounding, as a part of the largest: of two dtypes of 16 bits, and of wider ones.
ROUNDING = {2: 5e-2}
USUAL_ROUNDING = 3e-5

# Rows that a table of positions may have beyond max_position_embeddings (BART counts from 2).
SPARE = 4

# One pass at a time: it changes what all threads see, the model's mode and its hook.
_passing = threading.Lock()


@dataclass(frozen=True)
class LogitsHead:
    """Reads what :class:`mlmfast.architectures.spec.Head` reads, from logits ``[R, V]`` that the model's head has made.

    Attributes:
        vocab_size: ``V``.
    """

    vocab_size: int

    def vocab_logprob(
        self,
        logits: Tensor,
        targets: Tensor,
        target_rows: Tensor,
        temperature: float = 1.0,
        ranks: bool = False,
        entropies: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logprobs = logits.new_empty(len(targets), dtype=accumulation(logits.dtype))
        places = targets.new_empty(len(targets) if ranks else 0)
        spread = logits.new_empty(len(logits) if entropies else 0, dtype=logprobs.dtype)
        for part in row_chunks(len(targets), logits.shape[1]):
            rows = self.vocab_rows(logits[target_rows[part]], temperature)
            own = rows.gather(1, targets[part, None])
            logprobs[part] = own[:, 0]
            if ranks:
                places[part] = (rows > own).sum(1) + 1
        for part in row_chunks(len(spread), logits.shape[1]):
            # A token of probability 0 adds nothing, where 0 * -inf would be NaN.
            spread[part] = torch.special.entr(self.vocab_rows(logits[part], temperature).exp()).sum(1)
        return logprobs, places, spread

    def vocab_topk(self, logits: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        found = [
            self.vocab_rows(logits[part], temperature).topk(k) for part in row_chunks(len(logits), logits.shape[1])
        ]
        return torch.cat([values for values, _ in found]), torch.cat([ids for _, ids in found])

    def vocab_rows(self, logits: Tensor, temperature: float = 1.0) -> Tensor:
        return (logits.to(accumulation(logits.dtype)) / temperature).log_softmax(1)

    def first_logits(self, logits: Tensor) -> Tensor:
        return logits[:, 0].to(accumulation(logits.dtype))


@dataclass(frozen=True)
class Conduct:
    """What a :func:`probe` found out about a model.

    Attributes:
        vocab_size: width of its logits.
        together: copies of one length may be computed together; else each is alone (a Nystromformer scales all copies
            by the largest).
        hooked: scored rows may reach its head alone.
    """

    vocab_size: int
    together: bool
    hooked: bool


@dataclass(frozen=True)
class GenericSpec:
    """What others ask of a model, and its pass.

    Attributes:
        model: with its own code.
        conduct: how it may be asked.
        head: reads its logits.
        max_length: longest sequence, special tokens included; None where only memory limits it.
        dtype: of the weights.
        width: about how many numbers a row holds at any time in a pass.
    """

    family: ClassVar[str] = FAMILY
    model: OwnCode
    conduct: Conduct
    head: LogitsHead
    max_length: int | None
    dtype: torch.dtype
    width: int

    @property
    def vocab_size(self) -> int:
        """Token ids that can be read and predicted."""
        return self.head.vocab_size

    def scored_logits(self, batch: Batch, mask_token_id: int) -> Tensor:
        """Logits ``[R, V]`` of a batch's scored rows: passes over copies of one length, in the batch's order."""
        ids = batch.token_ids.index_fill(0, batch.masked_rows, mask_token_id)
        starts, scored = batch.cu_seqlens.tolist(), batch.cu_scored.tolist()
        found: list[Tensor] = []
        for first, last in _runs(starts, self.conduct.together):
            length = starts[first + 1] - starts[first]
            rows = batch.scored_rows[scored[first] : scored[last]] - starts[first]
            found.append(
                self.model.logits(ids[starts[first] : starts[last]].view(-1, length), rows, self.conduct.hooked)
            )
        return torch.cat(found)[:, : self.vocab_size]


Spec = EncoderSpec | GenericSpec


def _runs(starts: list[int], together: bool) -> Iterator[tuple[int, int]]:
    """Bounds of neighbouring copies of one length, or of each copy."""
    lengths = [end - start for start, end in pairwise(starts)]
    if not together:
        yield from ((copy, copy + 1) for copy in range(len(lengths)))
        return
    first = 0
    for _, run in groupby(lengths):
        last = first + len(list(run))
        yield first, last
        first = last


class OwnCode:
    """A Hugging Face model, asked for logits at some rows.

    Args:
        model: an ``...ForMaskedLM`` or its like: token ids in, logits of every position out.
        name: for messages.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.model = model
        self.name = name
        self.base = getattr(model, "base_model", model)
        taken = inspect.signature(model.forward).parameters
        self._takes_mask = "attention_mask" in taken
        self._options = {"use_cache": False} if "use_cache" in taken else {}  # a decoder would keep keys and values
        self._attention: str | None = getattr(self.base, "attention_type", None)
        self._switched_at = 0

    def logits(self, ids: Tensor, rows: Tensor, hooked: bool) -> Tensor:
        """Logits ``[R, V]`` at some of the rows of copies of one length.

        Args:
            ids: int64 ``[C, L]``.
            rows: int64 ``[R]``, places in the copies laid end to end.
            hooked: only these rows pass the head; else all do.

        Raises:
            MLMFastError: the model's code fails, or gives no row a token.
        """
        told = {"attention_mask": torch.ones_like(ids)} if self._takes_mask else {}
        try:
            with self._predicting(ids.shape[1]), self._only(rows, ids.shape) if hooked else _nothing():
                output = self.model(input_ids=ids, **told, **self._options)
        except Exception as error:
            if isinstance(error, (RuntimeError, MemoryError)) and out_of_memory(error):
                raise
            raise MLMFastError(
                f"{self.name}: its own code fails on {ids.shape[1]} tokens "
                f"({type(error).__name__}: {' '.join(str(error).split())}); mlmfast runs it as it is"
            ) from error
        logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", None)
        wanted = (1, len(rows)) if hooked else tuple(ids.shape)
        if not hooked and isinstance(logits, Tensor) and logits.dim() == 3:
            logits = logits[:, : ids.shape[1]]  # a Perceiver gives rows for all the positions that it has
        if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != wanted:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else None
            raise MLMFastError(f"{self.name}: its logits for {wanted} tokens are {shape}: not one row a token")
        return logits[0] if hooked else logits.flatten(0, 1)[rows]

    @contextmanager
    def _predicting(self, length: int) -> Iterator[None]:
        """Evaluation, and the model left as it was. Not inference mode: what a model keeps must serve training, too."""
        base, usual = self.base, self._attention
        device = next(self.model.parameters()).device.type
        inference = (torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False))
        with _passing, inference[0], inference[1], inference[2]:
            # A BigBird leaves its sparse attention for good at the first short text; a long one must not depend on it.
            if usual is not None and length > self._switched_at and base.attention_type != usual:
                base.set_attention_type(usual)
            modes = {name: module.training for name, module in self.model.named_modules()}
            if any(modes.values()):
                self.model.eval()
            try:
                yield
            finally:
                if any(modes.values()):
                    for name, module in self.model.named_modules():  # a BigBird's own may be new ones
                        modes.setdefault(name, modes.get(name.rpartition(".")[0], False))
                        module.training = modes[name]
                if usual is not None and base.attention_type != usual:
                    self._switched_at = max(self._switched_at, length)

    @contextmanager
    def _only(self, rows: Tensor, shape: torch.Size) -> Iterator[None]:
        """Within the block the base model gives the head some rows ``[1, R, d]`` of its states ``[C, L, d]``."""
        thread = threading.get_ident()  # the caller's other threads may use the model meanwhile

        def select(module: Any, given: Any, output: Any) -> Any:
            if threading.get_ident() != thread:
                return None
            states = output[0]
            if states.shape[:2] != shape:
                raise ValueError(f"states {tuple(states.shape)} of tokens {tuple(shape)}")
            states = states.flatten(0, 1)[rows][None]
            if isinstance(output, tuple):
                return (states, *output[1:])
            output[next(iter(output))] = states
            return output

        handle = self.base.register_forward_hook(select)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def probe(code: OwnCode, ordinary: list[int], max_length: int | None) -> Conduct:
    """Finds out how a model may be asked, from a few random sequences.

    Args:
        code: the model.
        ordinary: token ids that a text may have.
        max_length: longest sequence that it holds.

    Raises:
        UnsupportedModelError: no score can be read from it.
    """
    device = next(code.model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    most = max_length or LONG

    def draw(copies: int, length: int) -> Tensor:
        picked = torch.randint(len(ordinary), (copies, min(length, most)), generator=generator)
        return torch.tensor(ordinary)[picked].to(device)

    def every(ids: Tensor) -> Tensor:
        return code.logits(ids, torch.arange(ids.numel(), device=device), False)

    short, long = draw(*TOGETHER), draw(1, LONG)
    try:
        first = every(long)
        whole = every(short)
        again = every(long)
        alone = torch.cat([every(copy[None]) for copy in short])
        elsewhere = every(torch.cat([short[:1, :1], short[1:2, 1:]], 1))  # the first token in another text
    except MLMFastError as error:
        raise UnsupportedModelError(f"{error}, and this model cannot be served") from error
    if not _near(first, again):
        raise UnsupportedModelError(
            f"{code.name}: its predictions change from run to run (random hashing?), so that it has no one score"
        )
    if torch.equal(elsewhere[0], whole[0]):
        raise UnsupportedModelError(
            f"{code.name}: its predictions at a token do not depend on the others (MRA's attention is zero without its "
            "CUDA kernel), so that its scores would be noise"
        )
    some = [torch.arange(1, short.numel(), device=device), torch.tensor([2], device=device)]
    return Conduct(
        vocab_size=whole.shape[1],
        together=_near(whole, alone),
        hooked=code.base is not code.model and all(_hooks(code, short, rows, whole[rows]) for rows in some),
    )


def _hooks(code: OwnCode, ids: Tensor, rows: Tensor, wanted: Tensor) -> bool:
    """Whether these rows alone get the same logits from the head."""
    try:
        return _near(code.logits(ids, rows, True), wanted)
    except MLMFastError:
        return False


def _near(one: Tensor, other: Tensor) -> bool:
    """Whether logits are equal but for rounding; overflow is equal to overflow, and found where it is scored."""
    finite = one[one.isfinite()].abs()
    largest = max(1.0, float(finite.max())) if len(finite) else 1.0
    bound = ROUNDING.get(one.element_size(), USUAL_ROUNDING) * largest
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=bound, equal_nan=True)


class Generic:
    """Stands where a family's module does: gives the spec of a model as it is now.

    Args:
        code: the model.
        tokenizer: its tokenizer.
    """

    def __init__(self, code: OwnCode, tokenizer: Any) -> None:
        self._code = code
        self._tokenizer = tokenizer
        self._probed: tuple[int, Conduct] | None = None

    def build(self, model: Any, derived: Any, extras: Any, semantics: str) -> GenericSpec:
        """The spec; the model is probed at the first call, and anew when its vocabulary has grown."""
        rows = _embedded(model)
        limit = max_length(model, self._code.base, self._tokenizer)
        if self._probed is None or self._probed[0] != rows:
            special = set(self._tokenizer.all_special_ids)
            ordinary = [i for i in range(rows) if i not in special] or list(range(rows))
            self._probed = (rows, probe(self._code, ordinary, limit))
        conduct = self._probed[1]
        weight = next(model.parameters())
        hidden = getattr(_text_config(model), "hidden_size", None) or weight.shape[-1]
        return GenericSpec(
            model=self._code,
            conduct=conduct,
            head=LogitsHead(min(rows, conduct.vocab_size)),
            max_length=limit,
            dtype=weight.dtype,
            # Each row may be scored: its logits, them in one piece, and wide. And a layer's inside, four widths of it.
            width=3 * conduct.vocab_size + 16 * hidden,
        )


def _embedded(model: Any) -> int:
    """Rows of the table of words."""
    try:
        return len(model.get_input_embeddings().weight)
    except (AttributeError, NotImplementedError):
        return int(_text_config(model).vocab_size)


def _text_config(model: Any) -> Any:
    """The config, or its part for text where it has several."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def max_length(model: Any, base: Any, tokenizer: Any) -> int | None:
    """Longest sequence that a model holds, special tokens included: by its table of positions, else by its tokenizer.

    None where positions are relative, whatever the config says of them.
    """
    holds = getattr(_text_config(model), "max_position_embeddings", None)
    if isinstance(holds, int) and holds > 0:
        for name, module in base.named_modules():
            padding = getattr(module, "padding_idx", None)
            if name.rpartition(".")[2] == "position_embeddings" and padding is not None:
                return holds - padding - 1  # as RoBERTa, which counts from there
        tables = (x for name, x in (*base.named_parameters(), *base.named_buffers()) if "pos" in name and x.dim() == 2)
        return holds if any(holds <= len(table) <= holds + SPARE for table in tables) else None
    told = getattr(tokenizer, "model_max_length", None)
    return int(told) if told is not None and 0 < told < 1 << 30 else None  # transformers' own for "none" is 1e30


def architecture_of(model: Any, tokenizer: Any, name: str) -> ModuleType | Generic:
    """What gives the spec of a model: its family's file, where its code is transformers' own, else a Generic."""
    if model.config.model_type in FAMILIES:
        other = foreign(model)
        if other is None:
            return family_module(model.config.model_type, name)
        warnings.warn(
            f"{name}: {other}, so its own code computes it, exactly but without mlmfast's kernels; for their speed "
            "merge an adapter (PEFT: model.merge_and_unload()), dequantise, take hooks away, or load the checkpoint by "
            "name",
            stacklevel=4,  # who called load
        )
    return Generic(OwnCode(model, name), tokenizer)


def foreign(model: Any) -> str | None:
    """What of a live model its family's file cannot see: code that is not transformers' own. None if there is none."""
    if masked_class(model) is None:
        return f"a {type(model).__name__} is none of transformers' own masked models"
    return foreign_module(model.named_modules(), model.config)


def foreign_module(modules: Iterable[tuple[str, Any]], config: Any) -> str | None:
    """The first of some named modules that are not as transformers makes them of a config, and why; None if all are."""
    named = {_activation(value) for value in vars(config).values() if isinstance(value, str) and value in ACT2FN}
    for name, module in modules:
        # Families read the activation's name in the config. Those of a head or pooler need not be named there.
        if type(module) in ACTIVATIONS - named and not OWN_ACTIVATION.search(name):
            return f"{name} ({type(module).__name__}) is an activation that the config does not name"
        what = f"{name or 'the model'} ({type(module).__name__})"
        forward = getattr(module.forward, "accelerated", module.forward)  # by mlmfast itself: the same numbers
        forward = getattr(forward, "_torchdynamo_orig_callable", forward)  # torch.compile changes nothing
        function = getattr(forward, "__func__", forward)
        if function is not type(module).forward or not function.__module__.startswith(LIBRARIES):
            return f"{what} has a forward that is not transformers' own"
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if not getattr(hook, "__module__", "").startswith("transformers."):  # which records outputs by hooks
                return f"{what} has a hook"
    return None


def masked_class(model: Any) -> type[Any] | None:
    """transformers' own masked LM that a model is, by its config and its class; None if it is none."""
    expected: Any = AutoModelForMaskedLM._model_mapping.get(type(model.config), None)
    return expected if expected is not None and isinstance(model, expected) else None


def generic_types() -> list[str]:
    """Model types of the installed transformers that load generically, unless the probe at load refuses one."""
    return sorted(set(MODEL_FOR_MASKED_LM_MAPPING_NAMES) - set(FAMILIES))
