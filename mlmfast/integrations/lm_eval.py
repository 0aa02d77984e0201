"""The model ``mlmfast`` of lm-evaluation-harness: a masked language model that answers its requests.

What its words for causal models mean here:

``loglikelihood``
    The PLL of the continuation's tokens beside their context (:meth:`mlmfast.MaskedLM.score_continuations`). *Greedy*
    if each of these tokens is the model's first choice where it stood masked.
``loglikelihood_rolling``
    The PLL of the whole text, of a long one in windows.
``generate_until``
    Masks appended, the first one read (:meth:`mlmfast.MaskedLM.generate`).

Importing this module makes the name known to lm_eval; releases that read entry points find it by themselves.
"""

from __future__ import annotations

import atexit
import inspect
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed
from tqdm import tqdm
from transformers import StopStringCriteria

import mlmfast
from mlmfast.errors import RequestError, TextError
from mlmfast.masking import OBJECTIVES, TokenSequence, check_metric, make_plan, windows
from mlmfast.results import Score
from mlmfast.rules import SAMPLING
from mlmfast.tokenization import TextEncoder

try:
    import lm_eval.models  # noqa: F401  lists its own models, which lm_eval does only while there is no other
    from lm_eval.api.model import LM
    from lm_eval.api.registry import model_registry
except ImportError as error:
    raise ImportError(
        f'mlmfast.integrations.lm_eval needs lm_eval 0.4.13 or newer ({error}): pip install "mlmfast[lm_eval]"'
    ) from error

NAME = "mlmfast"
# Of mlmfast.load, what the command line can give.
LOADING = [name for name in inspect.signature(mlmfast.load).parameters if name not in ("model", "tokenizer", "device")]
REDUCTIONS = ("sum", "mean")
COMPATIBLE = (None, "hf-mlm")
# As lm_eval calls them, the first that is given counts.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# What is computed by one call; after each the answers are in lm_eval's cache, whatever happens then.
CONTINUATIONS, WINDOWS, PROMPTS = 512, 64, 64
# A process that has finished waits for the others however long they take.
WAIT = timedelta(weeks=52)

log = logging.getLogger(__name__)

T = TypeVar("T")


class MLMFastLM(LM):
    """``--model mlmfast --model_args pretrained=NAME,...``

    Args:
        pretrained: a name, a folder or a live model, as :func:`mlmfast.load` takes them.
        tokenizer: needed beside a live model.
        metric, window, stride, temperature: as in :meth:`mlmfast.MaskedLM.score`.
        reduction: of ``loglikelihood``: ``"sum"``, the PLL, or ``"mean"``, PLL a token. None: the sum; with
            ``compatible="hf-mlm"`` the mean.
        unconditional_prompt: such as ``"Answer:"``: from each ``loglikelihood`` is subtracted what the continuation has
            after this prompt (GPT-3's correction for answers that are likely anyway). None subtracts nothing.
        compatible: ``"hf-mlm"``: ``loglikelihood`` as the model ``hf-mlm`` of BabyLM's 2024 pipeline computes it, by
            minicons' ``conditional_score``.
        rolling_tokens: most tokens of a window of ``loglikelihood_rolling``, special ones included; fewer if the model
            holds fewer.
        max_gen_toks: of ``generate_until``, where the task does not say.
        batch_size, max_batch_size: lm_eval's, ``"auto"`` and ``"auto:10"`` among them. They change nothing: batches
            are packed by their tokens, and ``batch_tokens`` bounds them.
        device: None, and lm_eval's own ``"cuda:0"``, for CUDA if there is one, else the CPU; among several processes
            each takes its own GPU.
        trust_remote_code: lm_eval passes it on from its flag, which is for data sets too; no checkpoint's code runs.
        options: the other arguments of :func:`mlmfast.load`, such as ``dtype``, ``objective``, ``batch_tokens``.

    Raises:
        RequestError: arguments that are unknown or contradict each other.
    """

    def __init__(
        self,
        pretrained: Any,
        tokenizer: Any = None,
        *,
        metric: str = "original",
        window: int = 3,
        stride: int = 8,
        temperature: float = 1.0,
        reduction: str | None = None,
        unconditional_prompt: str | None = None,
        compatible: str | None = None,
        rolling_tokens: int = 512,
        max_gen_toks: int = 256,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        check_metric(metric, window, stride)
        if reduction is not None and reduction not in REDUCTIONS:
            raise RequestError(f"reduction={reduction!r} is not known; choose one of {', '.join(REDUCTIONS)}")
        if compatible not in COMPATIBLE:
            raise RequestError(f"compatible={compatible!r} is not known; choose 'hf-mlm' or leave it out")
        if compatible == "hf-mlm":
            own = (metric, temperature, unconditional_prompt) == ("original", 1.0, None)
            if not own or reduction not in (None, "mean"):
                raise RequestError(
                    "compatible='hf-mlm' fixes metric, temperature, reduction and normalisation; leave them out"
                )
        if not re.fullmatch(r"auto(:\d+(\.\d+)?)?|[1-9]\d*", str(batch_size)):
            raise RequestError(f"batch_size={batch_size!r} is neither a whole number from 1 nor 'auto' nor 'auto:N'")
        if trust_remote_code:
            log.warning("trust_remote_code: mlmfast runs no checkpoint's own code; for data sets the flag holds")
        self.batch_size = batch_size
        self.max_gen_toks = max_gen_toks
        self.rolling_tokens = rolling_tokens
        self.reduction = reduction or "sum"
        self.compatible = compatible
        self.unconditional_prompt = unconditional_prompt
        self.masking: dict[str, Any] = {"metric": metric, "window": window, "stride": stride}
        self.temperature = temperature
        # A live model belongs to a program that deals with its processes itself.
        self._rank, self._world_size = processes() if isinstance(pretrained, (str, os.PathLike)) else (0, 1)
        if not torch.cuda.is_available() and str(device).startswith("cuda"):
            log.info(
                "no CUDA here: %s, which lm_eval's command line asks for unless told otherwise, is the CPU", device
            )
            device = "cpu"
        elif torch.cuda.is_available() and self.world_size > 1 and not str(device).startswith("cpu"):
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        unknown = sorted(set(options) - set(LOADING))
        if unknown:
            raise RequestError(
                f"the model {NAME} has no argument {', '.join(unknown)}; beside its own it takes mlmfast.load's: "
                + ", ".join(LOADING)
            )
        for name, value in (("rolling_tokens", rolling_tokens), ("max_gen_toks", max_gen_toks)):
            if not isinstance(value, int) or value < 1:
                raise RequestError(f"{name}={value!r} is not a whole number from 1")
        options.setdefault("semantics", "upstream")  # transformers' own numbers, as in every integration
        self.lm = mlmfast.load(pretrained, tokenizer, device="auto" if device is None else device, **options)
        self._device = self.lm.device
        self._alone: dict[str, float] = {}  # continuation -> what it has after the unconditional prompt

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each ``(context, continuation)`` the continuation's value, and whether it is greedy.

        White space between them belongs to the continuation. After an empty context it belongs to neither, since the
        text begins there. A context that is too long for the model loses its beginning, with a warning.

        Raises:
            RequestError: a continuation that has no token, or that the model cannot hold.
        """
        pairs: list[tuple[str, str]] = [request.args for request in requests]
        found: dict[tuple[str, str], tuple[float, bool]] = {}
        # Asked for once: lm_eval repeats requests, among them those that keep its processes in step.
        with self._bar("loglikelihood", len(set(pairs)), disable_tqdm) as bar:
            for part in parts(list(dict.fromkeys(pairs)), CONTINUATIONS):
                answers = self._as_hf_mlm(part) if self.compatible == "hf-mlm" else self._answers(part)
                for pair, answer in zip(part, answers):
                    found[pair] = answer
                    self.cache_hook.add_partial("loglikelihood", pair, answer)
                bar.update(len(part))
        return [found[pair] for pair in pairs]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The PLL of each whole text; an empty one has 0.

        A text of more than ``rolling_tokens`` is cut into windows of so many, and every token is scored in one of them,
        beside the window's other tokens. As lm_eval does it, the last window reaches back to its full length.
        """
        texts = [request.args[0] for request in requests]
        distinct = list(dict.fromkeys(texts))
        encoder = self._encoder(None)
        before, after = (len(ids) for ids in encoder.surroundings())
        most = min(self.rolling_tokens, self.lm.max_length or self.rolling_tokens)
        if most <= before + after:
            raise RequestError(f"rolling_tokens={most} holds no text beside {before + after} special tokens")
        totals = dict.fromkeys(distinct, 0.0)
        pieces: list[tuple[str, TokenSequence]] = []
        for text, encoded in zip(distinct, encoder.encode(distinct)):
            if not isinstance(encoded, TextError):
                pieces += [(text, piece) for piece in windows(encoded.sequence, before, after, most)]
            elif text.strip():
                raise RequestError(f"the text {text[:60]!r} {encoded.reason}")
        left = Counter(text for text, _ in pieces)
        with self._bar("loglikelihood_rolling", len(left), disable_tqdm) as bar:
            for part in parts(pieces, WINDOWS):
                for (text, _), logprobs in zip(part, self._logprobs([piece for _, piece in part])):
                    totals[text] += float(logprobs.sum(dtype=np.float64))
                    left[text] -= 1
                    if not left[text]:
                        self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[text])
                        bar.update()
        return [totals[text] for text in texts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to the first of the strings in ``until``.

        What a task's ``generation_kwargs`` hold besides lm_eval's own ``until`` and ``max_gen_toks`` are arguments of
        :meth:`mlmfast.MaskedLM.generate`, ``num_masks`` among them. With ``min_new_tokens``, strings in ``until`` that
        are tokens are stop tokens, which may not come before, and stop nothing as parts of others (``1,000``). A
        context that is too long for the model loses its beginning, with a warning.

        Raises:
            RequestError: settings that ``generate`` does not know, or no room for a context.
        """
        alike: dict[str, list[int]] = {}  # requests with the same settings are generated together
        for place, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(place)
        answers = [""] * len(requests)
        with self._bar("generate_until", len(requests), disable_tqdm) as bar:
            for places in alike.values():
                until, settings = generation_settings(requests[places[0]].args[1], self.max_gen_toks)
                ends: list[str] = []  # that tokens are, which stand at the end of a text that they stopped
                if settings.get("min_new_tokens") and settings.get("eos_token_id") is None:
                    settings |= self._stops(until)
                    left = settings["stop_strings"] or []
                    until, ends = left, [one for one in until if one not in left]
                possible = [one for one in settings.get("stop_strings") or [] if self._writes(one)]
                settings["stop_strings"] = possible or None
                for part in parts(places, PROMPTS):
                    prompts = self._fitting([requests[place].args[0] for place in part], settings)
                    found = self.lm.generate(prompts, progress=False, **settings)
                    if any(one.stopped == "interrupted" for one in found):
                        raise KeyboardInterrupt  # half an answer is none: it must not come into a cache
                    for place, one in zip(part, found):
                        text = one.text
                        if one.stopped == "token":
                            text = text.removesuffix(next((end for end in ends if text.endswith(end)), ""))
                        answers[place] = cut(text, until)
                        self.cache_hook.add_partial("generate_until", requests[place].args, answers[place])
                    bar.update(len(part))
        return answers

    def _answers(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Values and greediness of distinct pairs."""
        joined = [moved(*pair) for pair in pairs]
        scores = self._scores(joined)
        values = [self._reduced(score) for score in scores]
        if self.unconditional_prompt is not None:
            new = [one for one in dict.fromkeys(one for _, one in joined) if one not in self._alone]
            alone = self._scores([moved(self.unconditional_prompt, one) for one in new])
            self._alone |= dict(zip(new, map(self._reduced, alone)))
            values = [value - self._alone[one] for value, (_, one) in zip(values, joined)]
        return [(value, bool(np.all(score.ranks == 1))) for value, score in zip(values, scores)]

    def _scores(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        """Scores of continuations, the contexts cut from the left where they must be."""
        texts = [(context, continuation if context else continuation.lstrip()) for context, continuation in pairs]
        try:
            scores = self.lm.score_continuations(
                texts, temperature=self.temperature, ranks=True, truncation="left", progress=False, **self.masking
            )
        except TextError as error:
            raise RequestError(f"{named(texts[error.index])} {error.reason}") from error
        shortened = 0
        for text, score in zip(texts, scores):
            if not score.truncated:
                continue
            assert score.offsets is not None
            if score.text[len(text[0]) : score.offsets[0][0]].strip():  # tokens of the continuation itself are gone
                raise RequestError(
                    f"{named(text)}: {self.lm.name} holds {self.lm.max_length} tokens, fewer than the continuation "
                    "has; take a model that holds more, or leave the request out"
                )
            shortened += 1
        if shortened:
            log.warning(
                "%d of %d contexts lost their beginnings: %s holds %d tokens",
                shortened,
                len(texts),
                self.lm.name,
                self.lm.max_length,
            )
        return scores

    def _reduced(self, score: Score) -> float:
        return score.total if self.reduction == "sum" else score.mean

    def _as_hf_mlm(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """minicons' ``conditional_score(context, continuation)``, as ``hf-mlm`` calls it; nothing is greedy.

        A space joins the two, whatever white space is there already, and the tokenizer's EOS stands for an empty
        context (the word None where it has no EOS). All but CLS, SEP and padding is scored from the place on that the
        context alone ends at, counted in tokens.
        """
        tokenizer = self.lm.tokenizer
        contexts = [context or f"{tokenizer.eos_token}" for context, _ in pairs]
        encoder = self._encoder(self.lm.max_length)
        encoded = encoder.encode([f"{context} {pair[1]}" for context, pair in zip(contexts, pairs)])
        sequences = []
        for pair, one, alone in zip(pairs, encoded, tokenizer(contexts)["input_ids"]):
            if isinstance(one, TextError):
                raise RequestError(f"{named(pair)} {one.reason}")
            ids = one.sequence.token_ids
            start = sum(token not in (tokenizer.pad_token_id, tokenizer.sep_token_id) for token in alone)
            unscored = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)
            special = np.isin(ids, [token for token in unscored if token is not None])
            scored = ~special & (np.arange(len(ids)) >= start)
            if not scored.any():
                raise RequestError(f"{named(pair)} has no token to score")
            sequences.append(TokenSequence(ids, special, scored, one.sequence.word_ids))
        return [(float(logprobs.mean(dtype=np.float64)), False) for logprobs in self._logprobs(sequences)]

    def _logprobs(self, sequences: Sequence[TokenSequence]) -> list[np.ndarray]:
        """Log-probabilities of each sequence's scored tokens under this model's metric."""
        encoder = self._encoder(None)
        plan = make_plan(sequences, encoder.mask_token_id, lookback=encoder.lookback, **self.masking)
        return np.split(self.lm.logprobs(plan, temperature=self.temperature), plan.score_offsets[1:-1])

    def _encoder(self, max_length: int | None) -> TextEncoder:
        lookback = OBJECTIVES[self.lm.objective]
        return TextEncoder(self.lm.tokenizer, self.lm.name, max_length, self.lm.vocab_size, lookback)

    def _fitting(self, prompts: list[str], settings: Mapping[str, Any]) -> list[str]:
        """Prompts cut from the left, at a token, so that the new tokens have room after them."""
        longest, tokenizer = self.lm.max_length, self.lm.tokenizer
        if longest is None or not tokenizer.is_fast:
            return prompts
        frame = sum(len(ids) for ids in self._encoder(None).surroundings()) + settings["num_masks"]
        room = longest - frame - settings["max_new_tokens"] + 1  # the last token is predicted with the masks
        if room < 1:
            raise RequestError(
                f"max_gen_toks={settings['max_new_tokens']} leaves no room for a context: {self.lm.name} holds "
                f"{longest} tokens, {frame} of them special tokens and masks; ask for fewer by --gen_kwargs"
            )
        encoded = tokenizer(prompts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        fitting = [self._end(prompt, offsets, room) for prompt, offsets in zip(prompts, encoded["offset_mapping"])]
        shortened = sum(a != b for a, b in zip(prompts, fitting))
        if shortened:
            log.warning("%d of %d contexts lost their beginnings: %d tokens fit", shortened, len(prompts), room)
        return fitting

    def _end(self, prompt: str, offsets: Sequence[tuple[int, int]], room: int) -> str:
        """The end of a prompt that has at most so many tokens."""
        start = max(0, len(offsets) - room)
        while start:
            end = prompt[offsets[start][0] :] if start < len(offsets) else ""
            # Cut inside a word it may have more tokens than it had there.
            more = len(self.lm.tokenizer(end, add_special_tokens=False, verbose=False)["input_ids"]) - room
            if more <= 0:
                return end
            start += more
        return prompt

    def _stops(self, until: Sequence[str]) -> dict[str, Any]:
        """Stop strings as settings of ``generate``: those that are tokens, after a word or after a space, as tokens."""
        tokenizer = self.lm.tokenizer
        tokens, strings = {tokenizer.sep_token_id, tokenizer.eos_token_id} - {None}, []
        for one in until:
            before = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("", ".", "a")}
            after = {text: tokenizer(text + one, add_special_tokens=False)["input_ids"] for text in before}
            found = {after[text][-1] for text, ids in before.items() if after[text][:-1] == ids}
            found -= {tokenizer.unk_token_id}
            tokens |= found
            strings += [] if found else [one]
        return {"eos_token_id": sorted(tokens), "stop_strings": strings or None}

    def _writes(self, text: str) -> bool:
        """Whether tokens can spell a stop string; transformers refuses to look for one that never comes."""
        try:
            StopStringCriteria(self.lm.tokenizer, [text])
        except ValueError:
            return False
        return True

    def _bar(self, what: str, total: int, disable: bool) -> Any:
        return tqdm(total=total, desc=f"Running {what} requests", disable=disable or self.rank != 0)

    @property
    def tokenizer(self) -> Any:
        """The model's, of which lm_eval notes special tokens beside the results."""
        return self.lm.tokenizer

    @property
    def max_length(self) -> int | None:
        """As lm_eval notes it beside the results."""
        return self.lm.max_length

    @property
    def tokenizer_name(self) -> str:
        """By which lm_eval tells apart the requests it has stored."""
        return str(self.lm.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's template, by name if there are several."""
        if not chat_template:
            return None
        return self.lm.tokenizer.get_chat_template(chat_template if isinstance(chat_template, str) else None)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as the tokenizer's template writes them; transformers refuses where there is none."""
        return self.lm.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval writes of the model beside the results."""
        return {
            "model_num_parameters": self.lm.model.num_parameters(),
            "model_dtype": str(self.lm.dtype),
            "mlmfast_version": mlmfast.__version__,
            "mlmfast_family": self.lm.family,
        }

    def all_gather(self, tensor: Tensor) -> Tensor:
        """A tensor of all processes, end to end."""
        if self.world_size == 1:
            return tensor
        here = tensor.to("cpu" if distributed.get_backend() == "gloo" else self.device)
        found = [torch.zeros_like(here) for _ in range(self.world_size)]
        distributed.all_gather(found, here)
        return torch.stack(found) if here.dim() == 0 else torch.cat(found)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """An object of all processes in a list, at process ``dst``; None elsewhere."""
        if self.world_size == 1:
            return [obj]
        found = [None] * self.world_size if self.rank == dst else None
        distributed.gather_object(obj, found, dst=dst)
        return found

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.world_size > 1:
            distributed.barrier()


def processes() -> tuple[int, int]:
    """This process's rank among those that a launcher (torchrun, accelerate) started, and their number."""
    if not distributed.is_available():
        return 0, 1
    if not distributed.is_initialized():
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return 0, 1
        distributed.init_process_group("gloo", timeout=WAIT)  # counts and results are all that is exchanged
        atexit.register(distributed.destroy_process_group)
    return distributed.get_rank(), distributed.get_world_size()


def generation_settings(given: Mapping[str, Any], most: int) -> tuple[list[str], dict[str, Any]]:
    """A task's ``generation_kwargs`` as stop strings and as arguments of :meth:`mlmfast.MaskedLM.generate`.

    As for lm_eval's other models, a temperature of 0 and ``do_sample=False`` are greedy, whatever else is set.
    """
    settings = {"num_masks": 3, **given}
    given_strings = [settings.pop(name, None) or [] for name in ("until", "stop_strings")]
    until = [one for some in given_strings for one in ([some] if isinstance(some, str) else some) if one]
    lengths = [settings.pop(name, None) for name in LENGTHS]
    settings["max_new_tokens"] = int(next((one for one in lengths if one is not None), most))
    warmth = float(settings.get("temperature") or 0)
    if settings.get("do_sample") is None or settings.get("temperature") is not None:
        settings["do_sample"] = settings.get("do_sample") is not False and warmth > 0
    if not settings["do_sample"]:
        settings = {name: value for name, value in settings.items() if name not in SAMPLING}
    if settings.get("num_return_sequences") not in (None, 1):
        raise RequestError("num_return_sequences: lm_eval takes one text a request; a task's repeats ask for more")
    if until:
        settings["stop_strings"] = until
    return until, settings


def moved(context: str, continuation: str) -> tuple[str, str]:
    """The two with the white space between them in the continuation, as lm_eval's own models have it."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def cut(text: str, until: Sequence[str]) -> str:
    """A text up to the first of some strings."""
    for one in until:
        text = text.split(one)[0]
    return text


def named(pair: tuple[str, str]) -> str:
    """A request in a message."""
    return f"the continuation {pair[1][:60]!r} of {pair[0][-60:]!r}"


def parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


if NAME not in model_registry:  # an entry point may have put it there, and be what is importing this
    model_registry.register(NAME, target=MLMFastLM)
