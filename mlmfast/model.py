"""MaskedLM: the one object that knows texts, plans, batches and the encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast, overload

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from mlmfast import backends
from mlmfast.architectures.spec import Derived
from mlmfast.arguments import (
    check_batch_tokens,
    check_on_error,
    check_temperature,
    check_top_k,
    listed,
    listed_options,
    listed_pairs,
)
from mlmfast.budget import usual_batch_tokens
from mlmfast.cpu import products
from mlmfast.errors import BackendError, MLMFastError, RequestError, TextError, UnsupportedModelError
from mlmfast.execution import Reader, Visitor, compute, head_states, read_best, read_logprobs, read_rows, run, visit
from mlmfast.generation import Generating, ending, streaming
from mlmfast.generic import FAMILY, Generic, Spec, architecture_of, foreign
from mlmfast.graphs import Graphs
from mlmfast.masking import OBJECTIVES, MaskPlan, TokenSequence, check_metric, make_plan
from mlmfast.packing import PackedBatch
from mlmfast.prefix import compute_after_prefix
from mlmfast.results import Distribution, Fill, Generation, Ranking, Score
from mlmfast.tokenization import EncodedText, TextEncoder


class MaskedLM:
    """A masked language model that scores, ranks and fills. Made by :func:`mlmfast.load`.

    Attributes:
        name: as given to :func:`mlmfast.load`.
        family: the checkpoint's ``model_type``; ``"generic"`` for a model that its own code computes.
        model: the Hugging Face model whose weights are used.
        tokenizer: its tokenizer.
        semantics: ``"trained"`` or ``"upstream"``.
        objective: ``"mlm"`` or ``"mntp"``.
        extras: tensors of the checkpoint that its transformers class leaves behind, such as a mask decoder's.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        semantics: str,
        extras: dict[str, Tensor],
        backend: str = "auto",
        batch_tokens: int | None = None,
        cuda_graphs: bool = True,
        objective: str = "mlm",
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.semantics = semantics
        self.objective = objective
        self._architecture = architecture_of(model, tokenizer, name)
        self.family: str = FAMILY if self.generic else model.config.model_type
        if self.generic and backend != "auto":
            raise BackendError(f"{name} runs in its own code, which no backend serves; use backend='auto'")
        self.extras = extras
        self._derived = Derived()
        self._backend = None if backend == "auto" else backend
        self._batch_tokens = check_batch_tokens(batch_tokens)
        self._graphs = Graphs[PackedBatch](head_states) if cuda_graphs else None
        with backends.forced(self._backend):
            backends.report(self.device.type, self.dtype)  # a forced backend that cannot serve says so now
        self._encoder(self.spec())  # a model or tokenizer that cannot serve says so now, too

    @property
    def config(self) -> Any:
        """The checkpoint's config."""
        return self.model.config

    @property
    def generic(self) -> bool:
        """Whether the model's own code computes it, without mlmfast's kernels (:mod:`mlmfast.generic`)."""
        return isinstance(self._architecture, Generic)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.model.parameters()).dtype

    @property
    def batch_tokens(self) -> int:
        """Most packed rows computed at once: as set, or what suits the device, on CUDA by the memory free now."""
        return self._batch_tokens or usual_batch_tokens(self.spec(), self.device)

    @batch_tokens.setter
    def batch_tokens(self, batch_tokens: int | None) -> None:
        self._batch_tokens = check_batch_tokens(batch_tokens)

    @property
    def max_length(self) -> int | None:
        """Longest sequence the model holds, special tokens included; None where only memory limits it."""
        return self.spec().max_length

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return self.spec().vocab_size

    def refresh(self) -> None:
        """Forgets what was computed from the weights. Only needed after they were written through ``.data``."""
        self._derived.clear()
        if self._graphs is not None:
            self._graphs.forget()
        products.forget()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles take model, tokenizer and settings along; what was computed from weights is so anew."""
        settings: dict[str, Any] = {"name": self.name, "semantics": self.semantics, "extras": self.extras}
        settings |= {"backend": self._backend or "auto", "batch_tokens": self._batch_tokens}
        settings |= {"cuda_graphs": self._graphs is not None, "objective": self.objective}
        return partial(MaskedLM, **settings), (self.model, self.tokenizer)

    def __repr__(self) -> str:
        size = sum(p.numel() for p in self.model.parameters()) / 1e6
        kind = str(self.dtype).removeprefix("torch.")
        family = self.family
        if self.generic:
            family += f" ({self.config.model_type or type(self.model).__name__})"
        objective = "" if self.objective == "mlm" else f", objective {self.objective}"
        return f"MaskedLM({self.name!r}, {family}, {size:.1f}M parameters, {kind} on {self.device}{objective})"

    def spec(self) -> Spec:
        """The model's weights as the encoder reads them, taken from the live modules at every call.

        Of a generic model: its own code, and what is known of it.

        Raises:
            UnsupportedModelError: code that is not transformers' own was put into the model after it was loaded.
        """
        other = None if self.generic else foreign(self.model)
        if other is not None:
            raise UnsupportedModelError(
                f"{self.name}: {other}, and had not when it was loaded; take it away (merge an adapter, remove a "
                "hook), or load the model again to have its own code compute it"
            )
        return self._architecture.build(self.model, self._derived, self.extras, self.semantics)

    def score(
        self,
        texts: Sequence[str],
        *,
        metric: str = "original",
        window: int = 3,
        stride: int = 8,
        spans: Sequence[tuple[int, int | None] | None] | None = None,
        temperature: float = 1.0,
        ranks: bool = False,
        entropies: bool = False,
        truncation: str | None = None,
        on_error: str = "raise",
        progress: bool | None = None,
        _prefix: bool = False,
    ) -> list[Score]:
        """Pseudo-log-likelihoods, token by token.

        Args:
            texts: a list of texts; a single one goes in a list of one. Or what :meth:`encode` has made of them.
            metric: what is masked together with the scored token, see :mod:`mlmfast.masking`. All but ``"strided"``
                are exact.
            window: positions masked by ``"window"``.
            stride: copies a text of ``"strided"``.
            spans: for each text the characters ``(start, end)`` to score, or None for all. A token is scored if it
                ends beyond ``start`` and begins before ``end``; an ``end`` of None is open, one beyond the text an
                error.
            temperature: divides the logits.
            ranks: also the rank of each token among the vocabulary.
            entropies: also the entropy of the distribution at each token.
            truncation: ``"right"`` or ``"left"`` cuts a text that is too long; None refuses it. Without effect where
                nothing is too long, as with DeBERTa's relative positions.
            on_error: ``"raise"``, or ``"return"`` to have a :class:`TextError` stand in the place of a text that
                cannot be scored.
            progress: a bar on stderr; None shows one on a terminal if it takes more than two seconds.

        Returns:
            A :class:`Score` a text, in the order given. A text's score does not depend on its company.

        Raises:
            RequestError: the arguments are wrong.
            TextError: a text cannot be scored, and ``on_error="raise"``.
        """
        check_temperature(temperature)

        def make(encoded: EncodedText, positions: np.ndarray, values: dict[str, np.ndarray]) -> Score:
            ids = encoded.sequence.token_ids[positions]
            offsets = encoded.offsets
            return Score(
                text=encoded.text,
                tokens=self._pieces(ids),
                token_ids=ids,
                offsets=None if offsets is None else [(int(a), int(b)) for a, b in offsets[positions]],
                metric=metric,
                truncated=encoded.truncated,
                generic=self.generic,
                **values,
            )

        masking = {"metric": metric, "window": window, "stride": stride}
        read = read_logprobs(temperature, ranks, entropies)
        return self._each(texts, spans, truncation, on_error, progress, masking, read, make, prefix=_prefix)

    def encode(self, texts: Sequence[str], *, truncation: str | None = None) -> list[EncodedText | TextError]:
        """Texts as :meth:`score` reads them: for callers who tokenise the next ones while these are computed.

        Args:
            texts, truncation: as in :meth:`score`.

        Returns:
            For each text its encoding, which stands for the text in :meth:`score` of the same model, or the error that
            keeps it from being scored.
        """
        return self._encoder(self.spec()).encode(listed(texts, "texts"), None, truncation)

    def score_continuations(self, pairs: Sequence[tuple[str, str]], **options: Any) -> list[Score]:
        """Scores only the continuations, each in the context of its prefix.

        Prefix and continuation are joined as given and tokenised as one text; a token belongs to the continuation if
        it ends beyond the prefix, so leading white space goes with the continuation.

        Args:
            pairs: ``(prefix, continuation)``.
            options: as in :meth:`score`, but ``spans``.
        """
        if "spans" in options:
            raise RequestError("score_continuations() sets the spans itself; with your own, call score()")
        pairs = listed_pairs(pairs)
        spans = [(len(prefix), None) for prefix, _ in pairs]
        return self.score([prefix + continuation for prefix, continuation in pairs], spans=spans, **options)

    def rank(
        self,
        prompt: str,
        options: Sequence[str],
        *,
        metric: str = "window",
        normalize: str | None = None,
        unconditional_prompt: str = "",
        cache: str = "none",
        **scoring: Any,
    ) -> Ranking:
        """Ranks continuations of a prompt by their PLL in its context.

        Args:
            prompt: what every option follows, joined as given: options mostly begin with a space.
            options: the candidates.
            metric: as in :meth:`score`; the paper's ``"window"`` does not reward tokens for predicting each other.
            normalize: None compares totals; ``"tokens"`` divides by an option's number of tokens;
                ``"unconditional"`` subtracts its PLL after ``unconditional_prompt`` (GPT-3's correction for options
                that are likely anyway).
            unconditional_prompt: such as ``"Answer:"``.
            cache: ``"none"``: exact. ``"prefix"``: **approximate**, the prompt's states are computed once, with masks
                in the options' place, and each copy computes the option's rows only; pays for long prompts.
            scoring: further arguments of :meth:`score`. ``truncation="left"`` shortens the prompt; ``"right"`` would
                cut the options and is refused.

        Raises:
            RequestError: no options, an unknown ``normalize``, or arguments that do not apply.
            TextError: an option cannot be scored; its index is the option's.
        """
        options = listed_options(options, normalize, scoring)
        if cache not in ("none", "prefix"):
            raise RequestError(f"cache={cache!r} is not known; choose 'none' (exact) or 'prefix' (approximate)")
        if cache == "prefix" and self.generic:
            raise RequestError(self._needs_layers("cache='prefix'"))
        scoring |= {"metric": metric, "_prefix": cache == "prefix"}
        scores = self.score_continuations([(prompt, option) for option in options], **scoring)
        values = np.array([score.total for score in scores])
        if normalize == "tokens":
            values = np.array([score.mean for score in scores])
        elif normalize == "unconditional":
            alone = self.score_continuations([(unconditional_prompt, option) for option in options], **scoring)
            values = values - np.array([score.total for score in alone])
        return Ranking(prompt, options, scores, values, normalize, cache, self.generic)

    def distributions(
        self,
        texts: Sequence[str],
        *,
        metric: str = "original",
        window: int = 3,
        stride: int = 8,
        spans: Sequence[tuple[int, int | None] | None] | None = None,
        temperature: float = 1.0,
        top_k: int | None = 5,
        truncation: str | None = None,
        on_error: str = "raise",
        progress: bool | None = None,
    ) -> list[Distribution]:
        """What the model expects at each scored token.

        Args:
            top_k: candidates a token; None for whole distributions, ``[n, vocabulary]`` float32 a text.

        The other arguments, the order and the errors are those of :meth:`score`.
        """
        check_temperature(temperature)
        check_top_k(top_k, self.vocab_size)
        read = read_rows(temperature) if top_k is None else read_best(top_k, temperature)

        def make(encoded: EncodedText, positions: np.ndarray, values: dict[str, np.ndarray]) -> Distribution:
            ids = encoded.sequence.token_ids[positions]
            best = values.get("ids")
            return Distribution(
                text=encoded.text,
                tokens=self._pieces(ids),
                token_ids=ids,
                candidate_ids=best,
                candidates=None if best is None else [self._pieces(row) for row in best],
                logprobs=values["logprobs"],
                generic=self.generic,
            )

        masking = {"metric": metric, "window": window, "stride": stride}
        return self._each(texts, spans, truncation, on_error, progress, masking, read, make)

    @overload
    def fill(self, texts: str, *, top_k: int = 5, temperature: float = 1.0) -> list[Fill]: ...

    @overload
    def fill(
        self, texts: list[str] | tuple[str, ...], *, top_k: int = 5, temperature: float = 1.0
    ) -> list[list[Fill]]: ...

    def fill(
        self, texts: str | list[str] | tuple[str, ...], *, top_k: int = 5, temperature: float = 1.0
    ) -> list[Fill] | list[list[Fill]]:
        """Candidates for each mask that stands in a text, all masks of it present at once.

        Args:
            texts: a text, or a list of them, with the tokenizer's mask token where a word is wanted.
            top_k: candidates a mask.
            temperature: divides the logits.

        Returns:
            For one text a list of :class:`Fill`, a mask each in text order; for a list of texts a list of such lists.

        Raises:
            TextError: a text has no mask, or cannot be read.
        """
        check_temperature(temperature)

        def make(encoded: EncodedText, positions: np.ndarray, values: dict[str, np.ndarray]) -> list[Fill]:
            return [
                Fill(
                    text=encoded.text,
                    position=int(position),
                    token_ids=ids,
                    tokens=self._pieces(ids),
                    words=[self.tokenizer.decode([token]).strip() for token in ids.tolist()],
                    logprobs=logprobs,
                    generic=self.generic,
                )
                for position, ids, logprobs in zip(positions, values["ids"], values["logprobs"])
            ]

        single = isinstance(texts, str)
        batch = [texts] if isinstance(texts, str) else listed(texts, "texts")
        check_top_k(top_k, self.vocab_size)
        read = read_best(top_k, temperature)
        filled = self._each(batch, None, None, "raise", None, {"metric": "unmasked"}, read, make, scores_masks=True)
        return filled[0] if single else filled

    @overload
    def generate(self, prompts: str, **options: Any) -> Generation: ...

    @overload
    def generate(self, prompts: list[str] | tuple[str, ...], **options: Any) -> list[Generation]: ...

    def generate(
        self,
        prompts: str | list[str] | tuple[str, ...],
        *,
        num_masks: int = 3,
        cache: str = "none",
        recompute: int | None = None,
        refresh: int | str | None = "auto",
        draft: str | None = None,
        final_token: str | int | Sequence[int] | None = "auto",
        generation_config: Any = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        streamer: Any = None,
        seed: int | Sequence[int] | None = None,
        on_error: str = "raise",
        progress: bool | None = None,
        **settings: Any,
    ) -> Any:
        """Continues prompts by appending masks and reading the first (Samuel 2024, arXiv 2406.04823, section 2.1).

        Prompts of any lengths are computed together, without padding; those that have ended make room for others.
        Ctrl-C returns what there is so far, with ``stopped="interrupted"``.

        Args:
            prompts: a text, or a list of them.
            num_masks: masks at the end of each step. DeBERTa, which was trained on spans of up to three, wants 3; with
                one it takes every token for the last.
            cache: ``"none"``: every step is a whole pass, exact. ``"window"``: **approximate**, keys and values of
                earlier tokens are kept, and a step computes the last ``recompute`` tokens and the masks. It holds the
                longest prompt and ``max_new_tokens`` rows for each continuation that is computed at once.
            recompute: of the window cache, 8 unless given; as many as there are tokens make it exact.
            refresh: of the window cache: every so many steps all tokens are computed, 16 unless given; None for never.
            draft: ``"masks"``: for greedy search, the masks after the first draft tokens that the next pass verifies:
                the same tokens, up to the dtype's rounding, in fewer and larger passes. None: a token a pass.
            final_token: what stands after the masks: ``"auto"`` for what the tokenizer puts at the end of a text, a
                token, its id or ids, or None for nothing.
            generation_config: transformers' ``GenerationConfig``; ``settings`` go before it.
            logits_processor, stopping_criteria: lists of transformers' objects. They are called for one prompt at a
                time, with its tokens without special ones; criteria get no scores.
            streamer: transformers' ``TextStreamer`` or its like, for a single prompt without beams.
            seed: of sampling, one for all or one a prompt. With one for all a prompt's result depends on it and on the
                prompt's place in the list, not on the other prompts. None draws one from torch's random state.
            on_error: ``"raise"``, or ``"return"`` to have a :class:`TextError` stand in the place of a prompt that
                cannot be continued.
            progress: a bar on stderr; None shows one on a terminal if it takes more than two seconds.
            settings: fields of ``GenerationConfig``: ``max_new_tokens`` (32), ``min_new_tokens``, ``num_beams``,
                ``length_penalty``, ``early_stopping``, ``num_return_sequences``, ``do_sample``, ``temperature``,
                ``top_k`` (50, when sampling), ``top_p``, ``repetition_penalty``, ``no_repeat_ngram_size``,
                ``eos_token_id`` (the tokenizer's separator and end), ``stop_strings``, ``max_time`` and others; what is
                not supported is refused.

        Returns:
            A :class:`Generation` a prompt, in the order given; one alone for a single text without
            ``num_return_sequences``, which else stand side by side, best first for beams.

        Raises:
            RequestError: arguments that contradict each other, or a setting that is not supported.
            TextError: a prompt that the model has no room to continue.
        """
        single = isinstance(prompts, str)
        batch = [prompts] if isinstance(prompts, str) else listed(prompts, "prompts")
        generating = self._generating(
            batch,
            num_masks=num_masks,
            cache=cache,
            recompute=recompute,
            refresh=refresh,
            draft=draft,
            final_token=final_token,
            generation_config=generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            seed=seed,
            on_error=on_error,
            settings=settings,
        )
        put = None
        if streamer is not None:
            generating.require_one("a streamer")
            put = streaming(generating, streamer)
        bar = tqdm(
            total=len(generating.searches),
            desc=f"generating with {self.name}",
            unit="text",
            delay=2 if progress is None else 0,
            disable=None if progress is None else not progress,
            leave=bool(progress),
        )
        with bar, ending(streamer):
            try:
                for took in generating.run():
                    if put is not None:
                        put()
                    bar.update(sum(generating.searches[i].done for i in took))
            except KeyboardInterrupt:
                pass  # what there is so far says that it was interrupted
        found = generating.results()
        return found[0] if single and generating.settings["num_return_sequences"] == 1 else found

    def stream(self, prompt: str, **options: Any) -> Iterator[str]:
        """The text that :meth:`generate` adds to one prompt, in pieces as they are chosen.

        Args:
            prompt: a text.
            options: as in :meth:`generate`, but ``streamer`` and ``progress``, and without beams.

        Yields:
            what has been added since the last piece. A stop string may be among it.
        """
        defaults: dict[str, Any] = {"num_masks": 3, "cache": "none", "recompute": None, "refresh": "auto"}
        defaults |= {"draft": None, "final_token": "auto", "generation_config": None, "seed": None}
        defaults |= {"logits_processor": None, "stopping_criteria": None, "on_error": "raise"}
        manner = {name: options.pop(name, usual) for name, usual in defaults.items()}
        if not isinstance(prompt, str):
            raise RequestError("stream() follows one prompt, one string; generate() takes a list")
        generating = self._generating([prompt], **manner, settings=options)
        generating.require_one("stream()")
        return generating.pieces()

    def _generating(self, prompts: list[str], **request: Any) -> Generating:
        spec = self.spec()
        return Generating(self, spec, self._encoder(spec), prompts, **request)

    def plan(
        self,
        texts: Sequence[str],
        *,
        metric: str = "original",
        window: int = 3,
        stride: int = 8,
        spans: Sequence[tuple[int, int | None] | None] | None = None,
        truncation: str | None = None,
    ) -> MaskPlan:
        """The copies that scoring these texts would ask for, without computing any; see :func:`mlmfast.packing.pack`.

        Raises:
            RequestError, TextError: as :meth:`score` does.
        """
        encoder = self._encoder(self.spec())
        encoded = encoder.encode(listed(texts, "texts"), spans, truncation)
        for one in encoded:
            if isinstance(one, TextError):
                raise one
        sequences = [cast(EncodedText, one).sequence for one in encoded]
        return make_plan(
            sequences, encoder.mask_token_id, metric, window=window, stride=stride, lookback=encoder.lookback
        )

    def logprobs(self, plan: MaskPlan, *, temperature: float = 1.0) -> np.ndarray:
        """Log-probabilities of a plan's targets, for callers who make their own plans.

        Args:
            plan: from :meth:`plan` or :func:`mlmfast.masking.make_plan`, with this tokenizer's mask token and this
                objective's lookback.
            temperature: divides the logits.

        Returns:
            float32 ``[N]`` in nats, in the plan's order.

        Raises:
            RequestError: the plan is read elsewhere than this model predicts.
        """
        check_temperature(temperature)
        return self.read(plan, read_logprobs(temperature)).get("logprobs", np.zeros(0, np.float32))

    def read(self, plan: MaskPlan, reader: Reader) -> dict[str, np.ndarray]:
        """What a reader finds at a plan's targets: ranks, whole distributions, several temperatures of one pass.

        Args:
            plan: as in :meth:`logprobs`.
            reader: of :mod:`mlmfast.execution`, such as ``read_logprobs(ranks=True)`` or ``read_rows()``; what it finds
                as ``logprobs`` has to be finite.

        Returns:
            Named arrays with a row a target, in the plan's order; none for a plan without targets.

        Raises:
            RequestError: as :meth:`logprobs` does.
        """
        if plan.lookback != OBJECTIVES[self.objective]:
            raise RequestError(
                f"the plan has lookback={plan.lookback}, but objective={self.objective!r} reads predictions "
                f"{OBJECTIVES[self.objective]} to the left: pass lookback={OBJECTIVES[self.objective]} to make_plan()"
            )
        with self._computing():
            spec = self.spec()
            values = run(spec, plan, reader, **self._means(spec))
        if not np.isfinite(values.get("logprobs", 0)).all():
            raise MLMFastError(f"the plan {self._not_finite()}")
        return values

    def visit(
        self,
        sequences: Sequence[TokenSequence],
        take: Visitor,
        *,
        metric: str = "original",
        temperature: float = 1.0,
        advance: Callable[[float], Any] = lambda share: None,
    ) -> None:
        """Hands whole distributions over while they pass, for callers who reduce them: none is kept here.

        Args:
            sequences: tokenised texts, by callers who tokenise for themselves.
            take: called with some scored tokens' sequences, int64 ``[n]``, their positions in them, int64 ``[n]``, and
                log-probabilities ``[n, V]`` on the model's device, float32 (float64 from a float64 model), which it may
                overwrite. Each token comes once, in no order, a few dozen at a time.
            metric: as in :meth:`score`, with its usual settings.
            temperature: divides the logits.
            advance: told how many sequences have been computed since it was told last, in fractions.

        Raises:
            RequestError: an unknown metric.
            TextError: a sequence is longer than the model holds, or its log-probabilities are not finite.
        """
        check_temperature(temperature)
        check_metric(metric)
        longest = self.max_length
        for i, sequence in enumerate(sequences):
            if longest is not None and len(sequence) > longest:
                raise TextError(i, f"has {len(sequence)} tokens; {self.name} holds {longest}: split it")

        def checked(owners: np.ndarray, positions: np.ndarray, logprobs: Tensor) -> None:
            if not torch.isfinite(logprobs).all():
                bad = int((~torch.isfinite(logprobs).all(1)).nonzero()[0])
                raise TextError(int(owners[bad]), self._not_finite())
            take(owners, positions, logprobs)

        with self._computing():
            spec = self.spec()
            encoder = self._encoder(spec)
            masking = {"metric": metric, "lookback": encoder.lookback}
            way = {"advance": advance, **self._means(spec)}
            visit(spec, sequences, encoder.mask_token_id, masking, checked, temperature, **way)

    def _each(
        self,
        texts: Sequence[str],
        spans: Sequence[tuple[int, int | None] | None] | None,
        truncation: str | None,
        on_error: str,
        progress: bool | None,
        masking: dict[str, Any],
        read: Reader,
        make: Callable[[EncodedText, np.ndarray, dict[str, np.ndarray]], Any],
        scores_masks: bool = False,
        prefix: bool = False,
    ) -> list[Any]:
        """Texts -> plan -> batches -> encoder -> ``read`` -> ``make``, a window of texts at a time."""
        texts = listed(texts, "texts")
        check_metric(**masking)
        check_on_error(on_error)
        spec = self.spec()
        encoder = self._encoder(spec)
        read_before = [isinstance(text, (EncodedText, TextError)) for text in texts]
        if any(read_before):
            if not all(read_before):
                raise RequestError("texts: give texts, or what encode() has made of them, and not both")
            if spans is not None or truncation is not None or scores_masks:
                raise RequestError("texts that encode() has read are scored as they were read: no spans, no truncation")
            encoded = texts
        else:
            encoded = encoder.encode(texts, spans, truncation, scores_masks=scores_masks)
        results: list[Any] = list(encoded)
        good: list[int] = []
        for i, one in enumerate(encoded):
            if not isinstance(one, TextError):
                good.append(i)
            elif on_error == "raise":
                raise one
        bar = tqdm(
            total=len(good),
            desc=f"scoring with {self.name}",
            unit="text",
            delay=2 if progress is None else 0,
            disable=None if progress is None else not progress,  # None: off where stderr is not a terminal
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} left",
            leave=bool(progress),
        )
        sequences = [cast(EncodedText, encoded[i]).sequence for i in good]
        with bar, self._computing():
            way: Any = compute_after_prefix if prefix else compute  # which never meets a generic spec: see rank
            computed = way(
                spec,
                sequences,
                encoder.mask_token_id,
                masking | {"lookback": encoder.lookback},
                read,
                advance=bar.update,
                **self._means(spec),
            )
            for place, positions, values in computed:
                i = good[place]
                if np.isfinite(values["logprobs"]).all():
                    results[i] = make(cast(EncodedText, encoded[i]), positions, values)
                else:
                    results[i] = TextError(i, self._not_finite())
                    if on_error == "raise":
                        raise results[i]
        return results

    def _encoder(self, spec: Spec) -> TextEncoder:
        """The tokenizer with the limits of the model as it is now: a live one may have grown new tokens."""
        lookback = OBJECTIVES[self.objective]
        return TextEncoder(self.tokenizer, self.name, spec.max_length, spec.vocab_size, lookback)

    def _means(self, spec: Spec) -> dict[str, Any]:
        """Where and how batches are computed."""
        device = self.device
        rows = self._batch_tokens or usual_batch_tokens(spec, device)
        graphs = None
        if device.type == "cuda":  # the reference asks the device for bounds, which cannot be captured
            services = backends.report(device.type, self.dtype)
            graphs = None if any(service.backend == "reference" for service in services) else self._graphs
        return {"device": device, "batch_tokens": rows, "graphs": graphs}

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Exact inference on the chosen backend, whatever surrounds the call: an autocast would narrow float32."""
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False), backends.forced(self._backend):
            yield

    def _pieces(self, ids: np.ndarray) -> list[str]:
        """The tokenizer's pieces; a row of the vocabulary that it has no piece for is named by its id."""
        pieces = self.tokenizer.convert_ids_to_tokens(ids.tolist())
        return [f"[id {i}]" if piece is None else piece for i, piece in zip(ids, pieces)]

    def _needs_layers(self, what: str) -> str:
        return (
            f"{what} keeps keys and values of layers, and {self.name} is generic: its own code computes whole passes; "
            "pass cache='none'"
        )

    def _not_finite(self) -> str:
        return (
            f"gets NaN or infinite log-probabilities from {self.name}: its weights have become NaN, or numbers "
            f"overflow in {self.dtype} (a wider dtype, or a temperature closer to 1, may help)"
        )
