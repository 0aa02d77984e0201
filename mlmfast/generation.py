"""Prompts -> generated texts: what :meth:`mlmfast.model.MaskedLM.generate` and ``stream`` do.

Checks the request, makes a search a prompt, lets :class:`mlmfast.decoding.Decoder` run them, and dresses the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from mlmfast.architectures.spec import EncoderSpec
from mlmfast.arguments import check_on_error
from mlmfast.budget import free_memory
from mlmfast.cache import Cache, cache_slots
from mlmfast.decoding import CONTINUATIONS, Decoder, ExactSteps, Frame, Search, Steps, WindowSteps
from mlmfast.errors import RequestError, TextError
from mlmfast.execution import Reader, read_best, read_logits, run
from mlmfast.generic import Spec
from mlmfast.results import Generation
from mlmfast.rules import Rules, criteria_of, settings_of, stop_ids_of
from mlmfast.searches import BeamSearch, DraftedSearch, GreedySearch, Hypothesis
from mlmfast.tokenization import TextEncoder

CACHES = ("none", "window")
DRAFTS = (None, "masks")
# Of the window cache, unless told otherwise: see benchmarks/results for what they cost and what they lose.
RECOMPUTE = 8
REFRESH = 16


@dataclass(frozen=True)
class Manner:
    """How steps are computed.

    Attributes:
        num_masks: appended masks.
        cache: ``"none"`` or ``"window"``.
        recompute, refresh: of the window; None where there is none, and for no refresh.
        draft: ``"masks"`` or None.
    """

    num_masks: int
    cache: str
    recompute: int | None
    refresh: int | None
    draft: str | None

    @classmethod
    def checked(
        cls,
        num_masks: Any,
        cache: str,
        recompute: int | None,
        refresh: int | str | None,
        draft: str | None,
        settings: dict[str, Any],
    ) -> Manner:
        """Raises RequestError for what contradicts itself."""
        if not isinstance(num_masks, int) or num_masks < 1:
            raise RequestError(f"num_masks={num_masks!r} predicts nothing: 1 is the least, and DeBERTa wants 3")
        if cache not in CACHES:
            raise RequestError(f"cache={cache!r} is not known; choose 'none' (exact) or 'window' (approximate)")
        if draft not in DRAFTS:
            raise RequestError(f"draft={draft!r} is not known; choose None or 'masks'")
        if cache == "none" and (recompute is not None or refresh != "auto"):
            raise RequestError("recompute and refresh belong to cache='window'; the exact step computes all rows")
        if draft is not None:
            if num_masks == 1:
                raise RequestError("draft='masks' reads the masks after the first: pass num_masks=2 or more")
            if settings["num_beams"] > 1 or settings["do_sample"]:
                raise RequestError("draft='masks' is for greedy search: pass num_beams=1 and do_sample=False")
            if cache != "none":
                raise RequestError("draft='masks' checks the draft by exact passes: pass cache='none'")
        if cache == "none":
            return cls(num_masks, cache, None, None, draft)
        recompute = _count("recompute", RECOMPUTE if recompute is None else recompute)
        refresh = REFRESH if refresh == "auto" else refresh
        return cls(num_masks, cache, recompute, None if refresh is None else _count("refresh", refresh), draft)


class Generating:
    """One request, ready to run.

    Args:
        lm: the :class:`mlmfast.model.MaskedLM`.
        spec: its weights.
        encoder: its tokenizer.
        prompts: texts.

    The other arguments are those of :meth:`mlmfast.model.MaskedLM.generate`.

    Raises:
        RequestError, TextError: what cannot be done.
    """

    def __init__(
        self,
        lm: Any,
        spec: Spec,
        encoder: TextEncoder,
        prompts: Sequence[str],
        *,
        num_masks: int,
        cache: str,
        recompute: int | None,
        refresh: int | str | None,
        draft: str | None,
        final_token: str | int | Sequence[int] | None,
        generation_config: Any,
        logits_processor: Any,
        stopping_criteria: Any,
        seed: int | Sequence[int] | None,
        on_error: str,
        settings: dict[str, Any],
    ) -> None:
        check_on_error(on_error)
        self.lm = lm
        self.spec = spec
        self.prompts = list(prompts)
        self.settings = settings = settings_of(generation_config, settings)
        self.manner = Manner.checked(num_masks, cache, recompute, refresh, draft, settings)
        if lm.generic and cache == "window":
            raise RequestError(lm._needs_layers("cache='window'"))
        before, after = encoder.surroundings()
        if final_token != "auto":
            after = _final(final_token, lm.tokenizer, spec.vocab_size)
        self.frame = Frame(before, num_masks, after, encoder.mask_token_id, encoder.lookback)
        stop_ids = stop_ids_of(settings, lm.tokenizer)
        criteria = criteria_of(settings, lm.tokenizer, stopping_criteria or ())
        copies = settings["num_return_sequences"] if settings["do_sample"] else 1
        if not settings["do_sample"]:
            seed = 0  # and the caller's random state is left alone
        elif seed is None:
            seed = int(torch.randint(1 << 31, ()))
        seeds = (
            [seed + i * copies for i in range(len(self.prompts))] if isinstance(seed, (int, np.integer)) else list(seed)
        )
        if len(seeds) != len(self.prompts):
            raise RequestError(f"{len(seeds)} seeds were given for {len(self.prompts)} prompts")
        self.errors: dict[int, TextError] = {}
        self.searches: list[Search] = []
        self.prompt_ids: list[list[int]] = []  # of each search, as the three below
        self.rules: list[Rules] = []
        self.owners: list[int] = []  # its prompt
        self.on_error = on_error
        for i, ids in enumerate(encoder.encode_prompts(self.prompts)):
            room = self._room(i, ids)
            if isinstance(ids, TextError) or isinstance(room, TextError):
                self.errors[i] = ids if isinstance(ids, TextError) else cast(TextError, room)
                if on_error == "raise":
                    raise self.errors[i]
                continue
            most = min(settings["max_new_tokens"], room)
            rules = Rules(settings, len(ids), most, stop_ids, list(logits_processor or ()), criteria)
            for copy in range(copies):
                self.searches.append(self._search(ids, rules, seeds[i] + copy))
                self.prompt_ids.append(ids)
                self.rules.append(rules)
                self.owners.append(i)
        self.passes = [0] * len(self.searches)  # steps that each has taken part in

    def require_one(self, what: str) -> None:
        """Raises RequestError unless there is a single search whose tokens are final as they come."""
        for error in self.errors.values():
            raise error
        if len(self.searches) != 1 or self.settings["num_beams"] > 1:
            raise RequestError(f"{what} follows one prompt without beams: pass one prompt, num_beams=1")

    @property
    def line(self) -> Hypothesis:
        """The one continuation that :meth:`require_one` asks for."""
        search = self.searches[0]
        assert isinstance(search, GreedySearch)
        return search.line

    def _room(self, prompt: int, ids: list[int] | TextError) -> int | TextError:
        """How many tokens may follow a prompt, or why none may."""
        if isinstance(ids, TextError):
            return ids
        if len(self.frame.before) + len(ids) < self.frame.lookback:
            return TextError(
                prompt,
                "is empty, and with objective='mntp' a token is predicted at the one before it; write a word, or load "
                "a tokenizer that puts a special token before a text",
            )
        longest = self.spec.max_length
        if longest is None:
            return int(self.settings["max_new_tokens"])
        # The last token is predicted with the masks, not beside them.
        room = longest - self.frame.tokens - len(ids) + 1
        if room >= 1:
            return room
        return TextError(
            prompt,
            f"has {len(ids)} tokens, which leaves no room for one more: {self.lm.name} holds {longest}, and "
            f"{self.frame.tokens} are special tokens and masks; shorten the prompt",
        )

    def _search(self, ids: list[int], rules: Rules, seed: int) -> Search:
        if rules.beams > 1:
            return BeamSearch(ids, rules)
        if self.manner.draft is not None:
            return DraftedSearch(ids, rules, self.manner.num_masks)
        return GreedySearch(ids, rules, torch.Generator().manual_seed(seed) if rules.sample else None)

    def run(self) -> Iterator[list[int]]:
        """Runs to the end; after each step yields the searches that took part."""
        if not self.searches:
            return
        with self.lm._computing():
            steps = Decoder(self.searches, self._steps()).run()
        while True:
            with self.lm._computing():  # around each step, so that nothing of it surrounds the caller's code
                took = next(steps, None)
            if took is None:
                return
            for search in took:
                self.passes[search] += 1
            yield took

    def _reader(self) -> Reader:
        best = self.searches[0].best
        return read_logits() if best is None else read_best(min(best, self.spec.vocab_size))

    def _steps(self) -> Steps:
        means = self.lm._means(self.spec)
        read = self._reader()
        width = self.searches[0].slots
        if self.manner.recompute is None:
            return ExactSteps(
                self.frame,
                lambda plan: run(self.spec, plan, read, **means),
                max(CONTINUATIONS // width, 1) * width,
            )
        assert isinstance(self.spec, EncoderSpec)
        capacity = self.frame.tokens + max(len(ids) + r.most for ids, r in zip(self.prompt_ids, self.rules))
        device = means["device"]
        free = free_memory(device) if device.type == "cuda" else None
        wanted = min(CONTINUATIONS, width * len(self.searches))
        slots = cache_slots(self.spec, capacity, wanted, width, free)
        return WindowSteps(
            self.spec,
            self.frame,
            read,
            Cache(self.spec, slots, capacity),
            device=device,
            batch_tokens=means["batch_tokens"],
            recompute=self.manner.recompute,
            refresh=self.manner.refresh,
            record=means["graphs"] is not None,
        )

    def results(self) -> list[Generation | TextError]:
        """What stands: finished or not, prompt by prompt in the order given, best first."""
        returned = self.settings["num_return_sequences"]
        found: dict[int, list[Generation | TextError]] = {i: [error] * returned for i, error in self.errors.items()}
        for search, (owner, one) in enumerate(zip(self.owners, self.searches)):
            found.setdefault(owner, []).extend(self._generation(search, line) for line in one.results())
        return [one for i in range(len(self.prompts)) for one in found[i]]

    def _generation(self, search: int, line: Hypothesis) -> Generation | TextError:
        if line.finished == "not finite":
            error = TextError(self.owners[search], self.lm._not_finite())
            if self.on_error == "raise":
                raise error
            return error
        generated = line.token_ids[len(self.prompt_ids[search]) :]
        stopped = line.finished or "interrupted"
        if stopped == "length" and self.rules[search].most < self.settings["max_new_tokens"]:
            stopped = "room"
        ids = np.array(generated, np.int64)
        return Generation(
            prompt=self.prompts[self.owners[search]],
            text=self.text(search, generated),
            tokens=self.lm._pieces(ids),
            token_ids=ids,
            logprobs=np.array(line.logprobs, np.float32),
            stopped=stopped,
            passes=self.passes[search],
            score=line.score if self.settings["num_beams"] > 1 else None,
            cache=self.manner.cache,
            generic=self.lm.generic,
        )

    def text(self, search: int, generated: list[int]) -> str:
        """Generated tokens as they read after the prompt: a piece may begin with the space that parts it from it."""
        alone, whole = (
            self.lm.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for ids in (self.prompt_ids[search], self.prompt_ids[search] + generated)
        )
        if whole.startswith(alone):
            return whole[len(alone) :]
        return self.lm.tokenizer.decode(generated, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def pieces(self) -> Iterator[str]:
        """Runs the one prompt's search, and yields the text as it grows; a character that is not whole is held back."""
        shown = ""
        line = self.line
        start = len(self.prompt_ids[0])
        for _ in self.run():
            text = self.text(0, line.token_ids[start:])
            if text.startswith(shown) and not text.endswith("\N{REPLACEMENT CHARACTER}") and len(text) > len(shown):
                yield text[len(shown) :]
                shown = text
        self.results()  # which raises if the model's numbers were no numbers
        text = self.text(0, line.token_ids[start:])
        if text.startswith(shown) and len(text) > len(shown):
            yield text[len(shown) :]


def _count(name: str, value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise RequestError(f"{name}={value!r} is not a whole number from 1")
    return value


def streaming(generating: Generating, streamer: Any) -> Callable[[], None]:
    """Gives a transformers streamer the prompt; returns what gives it the tokens that are new since the last call."""
    line = generating.line
    streamer.put(torch.tensor(line.token_ids))
    given = len(line.token_ids)

    def put() -> None:
        nonlocal given
        for token in line.token_ids[given:]:
            streamer.put(torch.tensor([token]))
        given = len(line.token_ids)

    return put


@contextmanager
def ending(streamer: Any) -> Iterator[None]:
    """Tells a streamer, if there is one, that its text has ended, however it has."""
    try:
        yield
    finally:
        if streamer is not None:
            streamer.end()


def _final(final_token: str | int | Sequence[int] | None, tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """Token ids of what the caller wants after the masks."""
    if final_token is None:
        return ()
    if isinstance(final_token, str):
        found = tokenizer.convert_tokens_to_ids(final_token)
        if found is None or tokenizer.convert_ids_to_tokens(found) != final_token:
            raise RequestError(f"final_token={final_token!r} is no token of this tokenizer")
        return (found,)
    ids = tuple(int(one) for one in np.atleast_1d(np.asarray(final_token, np.int64)))
    if not all(0 <= one < vocab_size for one in ids):
        raise RequestError(f"final_token={final_token!r} is outside the vocabulary of {vocab_size}")
    return ids
