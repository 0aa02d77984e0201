"""transformers: a model's own forward on mlmfast's ops, so that code which knows nothing of mlmfast gets faster.

What is replaced is the forward of the encoder (a ``BertModel``), not that of the model with its head: so heads,
poolers, losses, and hooks on all of these stay what they are, and one way serves masked LMs, classifiers and embedding
models. Whatever is not plain inference, or asks for more than hidden states, goes to the original code, and is
counted.

Hidden states are equal at attended positions; at padding, whose states nobody should read, they are zeros.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForMaskedLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mlmfast import backends
from mlmfast.architectures import FAMILIES, family_module
from mlmfast.architectures.spec import Derived, EncoderSpec
from mlmfast.budget import usual_batch_tokens
from mlmfast.checkpoint import quiet_transformers
from mlmfast.errors import RequestError, UnsupportedModelError
from mlmfast.generic import foreign_module, masked_class
from mlmfast.integrations.forwards import Acceleration, Forward
from mlmfast.padded import Padded

# What a call may ask for; everything else must be left out, None or False.
ASKED = ("input_ids", "attention_mask", "token_type_ids", "output_hidden_states", "return_dict")
# What only a loss reads.
UNREAD = ("num_items_in_batch",)
# The label that losses leave out.
NO_LABEL = -100

# Why a call that is running must reach the original code, where its encoder cannot know it.
_passing: ContextVar[str | None] = ContextVar("mlmfast_passing", default=None)


def accelerate(model: nn.Module, *, backend: str = "auto") -> Acceleration:
    """Lets a Hugging Face model's own forward run on mlmfast's ops while it is in inference.

    ``with accelerate(model): ...``, or ``handle = accelerate(model)`` and later ``handle.remove()``. Weights stay the
    model's own, read anew at each call. ``state_dict``, saving and pickling are as ever; a copy is not accelerated.

    Args:
        model: an ``...ForMaskedLM``, another model over the same encoder, the encoder alone (``AutoModel``), or any
            module that holds such (a ``SentenceTransformer``).
        backend: ``"auto"``, or the name of one that must serve every op. With ``"auto"`` calls whose device and dtype
            have no kernels go to the original code.

    Warns:
        UserWarning: every call will go to the original code as the model is now, and why.

    Raises:
        UnsupportedModelError: nothing in it is the encoder of a known family, or its forward has been replaced.
        RequestError: torch.compile has been applied to it, or it is accelerated already on another backend.
        BackendError: ``backend`` is not known.
    """
    modules = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if any("_orig_mod" in module._modules for module in model.modules()) or any(map(_compiled, modules)):
        raise RequestError("torch.compile has been applied to the model, which fixes its code; accelerate it as it was")
    encoders = [module for module in modules if _masked_lm(module) is not None]
    if not encoders:
        kind = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
        raise UnsupportedModelError(
            f"accelerate: {kind!r} has no encoder that is known; known are those of {', '.join(sorted(FAMILIES))}"
        )
    tokenwise = [module.base_model for module in modules if masked_class(module) is not None]
    handle = Acceleration()
    try:
        for module in modules:
            forward = Forward.on(module, backend)
            if forward is None and any(module is one for one in encoders):
                encoder = _Encoder(module, backend, any(module is one for one in tokenwise))
                obstacle = encoder.obstacle()
                if obstacle is not None:
                    warnings.warn(f"accelerate: {obstacle}, so the original code computes it", stacklevel=2)
                forward = Forward(module, encoder, backend)
            elif forward is None and {"labels", "start_positions"} & set(inspect.signature(module.forward).parameters):
                forward = Forward(module, _Labelled(), backend)
            if forward is not None:
                handle.join(forward)
    except BaseException:  # nothing half done stays on the model, not even after Ctrl-C
        handle.remove()
        raise
    return handle


class _Labelled:
    """A model with a head, which knows what its encoder does not: whether padding is counted in the loss."""

    def __call__(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            given = forward.arguments(args, kwargs)
        except TypeError:
            return forward.accelerated(*args, **kwargs)  # which says what is wrong
        ids, mask, labels = (given.get(name) for name in ("input_ids", "attention_mask", "labels"))
        if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or ids.shape != mask.shape:
            return forward.accelerated(*args, **kwargs)
        padding = mask == 0
        if given.get("start_positions") is not None and padding.any():
            reason = "the loss of a span is taken over all columns, so that it reads padding's states"
        elif isinstance(labels, Tensor) and labels.shape == ids.shape and (labels[padding] != NO_LABEL).any():
            reason = f"padding has labels other than {NO_LABEL}, so that the loss reads its states"
        else:
            return forward.accelerated(*args, **kwargs)
        token = _passing.set(reason)
        try:
            return forward.accelerated(*args, **kwargs)
        finally:
            _passing.reset(token)

    def refresh(self) -> None:
        """Keeps nothing."""


class _Pass(Exception):
    """A call is one for the original code; says why."""


class _Encoder:
    """Answers the calls of an encoder.

    Args:
        base: transformers' own, of a known family.
        backend: as in :func:`accelerate`.
        tokenwise: whether its states are read each for itself (a masked LM). Else a head may read the first column,
            which must then hold tokens.
    """

    def __init__(self, base: Any, backend: str, tokenwise: bool) -> None:
        if getattr(base.forward, "__func__", None) is not type(base).forward:
            raise UnsupportedModelError(
                f"accelerate: the forward of the {type(base).__name__} has been replaced; put its own back first"
            )
        self._base = base
        self._backend = None if backend == "auto" else backend
        self._tokenwise = tokenwise
        self._family = family_module(base.config.model_type, type(base).__name__)
        self._derived = Derived()
        self._patterns: dict[tuple[Any, ...], Any] = {}
        # A family's file reads masked LMs: the encoder gets the shell of one, whose head has no weights and no use.
        masked_lm: Any = _masked_lm(base)
        with torch.device("meta"), quiet_transformers():
            self._shell = masked_lm(copy.deepcopy(base.config))
        setattr(self._shell, self._shell.base_model_prefix, base)

    def __call__(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            with backends.forced(self._backend):
                output = self._answer(forward, args, kwargs)
        except _Pass as reason:
            return forward.original(args, kwargs, str(reason))
        for handle in forward.handles:
            handle.served += 1
        return output

    def refresh(self) -> None:
        self._derived.clear()

    def obstacle(self) -> str | None:
        """What in the model keeps every call from being served; None if nothing does."""
        try:
            with backends.forced(self._backend):
                self._check(self._obstacles())
                self._spec()
        except _Pass as reason:
            return str(reason)
        return None

    def _answer(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            given = forward.arguments(args, kwargs)
        except TypeError as error:
            raise _Pass(str(error)) from error
        self._check(itertools.chain(self._requests(given), self._moments(), self._obstacles()))
        spec = self._spec()
        padded = self._padded(spec, given)
        options = {name: value for name, value in given.items() if name in ("output_hidden_states", "return_dict")}
        pattern = self._pattern(forward, padded.token_ids[:1, :1], options, len(spec.layers) + 1)
        values = _values(pattern)
        layers = any(isinstance(value, tuple) for value in values)
        states = padded.states(spec, usual_batch_tokens(spec, padded.token_ids.device), layers)
        pooled = self._pooled(states[-1]) if any(_of_sequences(value) for value in values) else None

        def filled(value: Any) -> Any:
            if value is None:
                return None
            if isinstance(value, tuple):
                return tuple(states)
            return pooled if _of_sequences(value) else states[-1]

        if isinstance(pattern, tuple):
            return tuple(map(filled, pattern))
        return type(pattern)(**{name: filled(value) for name, value in pattern.items()})

    def _check(self, reasons: Iterator[str]) -> None:
        for reason in reasons:
            raise _Pass(reason)

    def _spec(self) -> EncoderSpec:
        self._shell.config = self._base.config
        try:
            return self._family.build(self._shell, self._derived, {}, "upstream")
        except UnsupportedModelError as error:
            raise _Pass(str(error)) from error

    def _requests(self, given: dict[str, Any]) -> Iterator[str]:
        """What is asked for that only the original code gives."""
        for name, value in given.items():
            if name in ("output_hidden_states", "return_dict"):
                served = value is None or isinstance(value, bool)  # or some layers' numbers
            else:
                served = name in ASKED + UNREAD or value is None or value is False
            if not served:
                yield f"{name} is given"

    def _moments(self) -> Iterator[str]:
        """Why this moment is not one of plain inference."""
        reason, device = _passing.get(), next(self._base.parameters()).device.type
        if reason is not None:
            yield reason
        if any(module.training for module in self._base.modules()):
            yield "the model is in training mode"
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in self._base.parameters()):
            yield "gradients are enabled, which mlmfast's ops do not pass: call it under torch.no_grad()"
        if torch.is_autocast_enabled(device):
            yield "autocast is on"
        if torch.jit.is_tracing():
            yield "the call is being traced"
        if torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0:
            yield "torch.func or forward-mode differentiation is at work"
        if device == "cuda" and torch.cuda.is_current_stream_capturing():
            yield "a CUDA graph is being recorded"
        if torch.nn.modules.module._has_any_global_hook():
            yield "there are hooks on all modules"

    def _obstacles(self) -> Iterator[str]:
        """What in the model is not known here."""
        config, weight = self._base.config, next(self._base.parameters())
        for option in ("output_attentions", "is_causal"):
            if getattr(config, option, False):
                yield f"config.{option} is set"
        if getattr(config, "tie_last_hidden_states", None) is False:
            yield "config.tie_last_hidden_states is off"
        name = getattr(config, "_attn_implementation", None)
        attention = ALL_ATTENTION_FUNCTIONS.get(name or "eager")
        if attention is not None and not attention.__module__.startswith("transformers."):
            yield f"the attention {name!r} is not transformers' own"
        inside = itertools.islice(self._base.named_modules(), 1, None)  # hooks on the encoder itself are called
        other = foreign_module(inside, config)
        if other is not None:
            yield other
        services = backends.report(weight.device.type, weight.dtype)
        if self._backend is None and any(service.backend == "reference" for service in services):
            yield f"there are no kernels for {backends.dtype_name(weight.dtype)} on {weight.device.type}"

    def _padded(self, spec: EncoderSpec, given: dict[str, Any]) -> Padded:
        """The call's tokens.

        Raises:
            _Pass: they are none that can be packed, or that the model holds.
        """
        ids, mask, types = (given.get(name) for name in ("input_ids", "attention_mask", "token_type_ids"))
        device, table = next(self._base.parameters()).device, spec.embedding.types
        if type(ids) is not Tensor or ids.dim() != 2 or not ids.numel() or ids.dtype not in (torch.int64, torch.int32):
            raise _Pass("input_ids are not a matrix of token ids")
        for name, other in (("attention_mask", mask), ("token_type_ids", types)):
            if other is not None and (type(other) is not Tensor or other.shape != ids.shape):
                raise _Pass(f"{name} is not of the shape of input_ids")
        if any(tensor is not None and tensor.device != device for tensor in (ids, mask, types)):
            raise _Pass(f"the model is on {device}, and the call's tensors are not")
        if spec.max_length is not None and ids.shape[1] > spec.max_length:
            raise _Pass(f"{ids.shape[1]} columns are more than the {spec.max_length} tokens that the model holds")
        mask = torch.ones_like(ids) if mask is None else mask
        types = torch.zeros_like(ids) if types is None or table is None else types  # without a table none are read
        attended = mask != 0
        runs = attended[:, 0].long() + (attended[:, 1:] & ~attended[:, :-1]).sum(1)
        # All that the host has to know, in one transfer.
        proper, first_column = ((mask == 0) | (mask == 1)).all(), attended[:, 0].all()
        facts = [proper, first_column, runs.max(), ids.min(), ids.max(), types.min(), types.max()]
        told = torch.cat([torch.stack([fact.long() for fact in facts]), attended.sum(1)]).tolist()
        lengths, greatest = told[len(facts) :], told[6]
        if not told[0]:
            raise _Pass("attention_mask holds other values than 0 and 1")
        if told[2] > 1:
            raise _Pass("attention_mask has holes")
        if not any(lengths):
            raise _Pass("no token is attended")
        if not told[1] and not self._tokenwise:
            raise _Pass("padding stands in the first column, which a head may read")
        if min(told[3], told[5]) < 0 or told[4] >= spec.vocab_size or (table is not None and greatest >= len(table)):
            raise _Pass("an id is outside its table")
        return Padded(ids.long(), attended, lengths, types.long() if greatest else None)

    def _pattern(self, forward: Forward, token: Tensor, options: dict[str, Any], states: int) -> Any:
        """What the original code gives for one token when asked so: its class, and what it holds.

        Raises:
            _Pass: it holds something that is not known here.
        """
        config = self._base.config
        usual = [getattr(config, name, None) for name in ("output_hidden_states", "return_dict")]
        key = (*options.items(), *usual, getattr(self._base, "pooler", None) is None)
        if key not in self._patterns:
            pattern = forward.accelerated(token, attention_mask=torch.ones_like(token), **options)
            for value in _values(pattern):
                layers = isinstance(value, tuple) and len(value) == states and all(map(torch.is_tensor, value))
                if not (value is None or layers or (isinstance(value, Tensor) and value.dim() in (2, 3))):
                    raise _Pass(f"its output holds a {type(value).__name__} that is not known")
            self._patterns[key] = pattern
        return self._patterns[key]

    def _pooled(self, states: Tensor) -> Tensor:
        """What the encoder's own pooler makes of the last states."""
        if hasattr(self._base, "pooler_activation"):  # ALBERT's pooler is a product
            return self._base.pooler_activation(self._base.pooler(states[:, 0]))
        return self._base.pooler(states)


def _masked_lm(module: Any) -> type[Any] | None:
    """transformers' masked LM over a module, where that is the encoder of a known family, nothing more; else None."""
    config: Any = getattr(module, "config", None)
    if getattr(config, "model_type", None) not in FAMILIES:
        return None
    kind: Any = type(config)
    encoder: Any = AutoModel._model_mapping.get(kind, None)
    masked_lm: Any = AutoModelForMaskedLM._model_mapping.get(kind, None)
    return masked_lm if type(module) is encoder else None


def _compiled(module: Any) -> bool:
    """Whether torch.compile has been applied to a module or its forward."""
    return module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable")


def _values(output: Any) -> list[Any]:
    """What a model's output holds."""
    return list(output) if isinstance(output, tuple) else list(output.values())


def _of_sequences(value: Any) -> bool:
    """Whether a row of it stands for a sequence, ``[B, d]``, not for a token."""
    return isinstance(value, Tensor) and value.dim() == 2


def register() -> None:
    """Makes ``transformers.pipeline("pseudo-log-likelihood", ...)`` known: a :class:`PseudoLogLikelihoodPipeline`."""
    from transformers.pipelines import PIPELINE_REGISTRY

    from mlmfast.integrations.pipelines import TASK, PseudoLogLikelihoodPipeline

    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            TASK, pipeline_class=PseudoLogLikelihoodPipeline, pt_model=AutoModelForMaskedLM, type="text"
        )
