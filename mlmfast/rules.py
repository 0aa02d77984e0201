"""What generation may choose and when it stops: transformers' ``GenerationConfig``, processors and criteria.

The fields that are honoured are those of :data:`SUPPORTED`; a field that is set and not among them is refused by name,
never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessorList,
    MaxTimeCriteria,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from mlmfast.errors import RequestError

# Field -> its value unless told otherwise, as transformers has it.
SUPPORTED: dict[str, Any] = {
    "max_new_tokens": 32,
    "min_new_tokens": 0,
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "length_penalty": 1.0,
    "early_stopping": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "exponential_decay_length_penalty": None,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "eos_token_id": None,
    "stop_strings": None,
    "max_time": None,
}
# These say nothing about which tokens come next here.
IRRELEVANT = {
    "bos_token_id",
    "cache_config",
    "cache_implementation",
    "decoder_start_token_id",
    "pad_token_id",
    "return_dict_in_generate",
    "transformers_version",
    "use_cache",
    "_from_model_config",
}


# Fields that mean nothing unless tokens are drawn.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def settings_of(config: GenerationConfig | None, given: dict[str, Any]) -> dict[str, Any]:
    """Every field of :data:`SUPPORTED`: as given, else as the config has it, else its default.

    Raises:
        RequestError: a field that is unknown or not supported, or settings that contradict each other.
    """
    unknown = sorted(set(given) - set(SUPPORTED))
    if unknown:
        raise RequestError(f"generate() does not know {', '.join(unknown)}; it takes {', '.join(SUPPORTED)}")
    settings = dict(SUPPORTED)
    if config is not None:
        usual = GenerationConfig().to_dict()
        later: dict[str, Any] = getattr(
            GenerationConfig, "_get_default_generation_params", dict
        )()  # what None comes to mean
        for name, value in config.to_dict().items():
            if value is None or value in (usual.get(name), later.get(name)) or name in IRRELEVANT:
                continue
            if name == "max_length":  # of prompt and answer together
                if config.max_new_tokens is None and given.get("max_new_tokens") is None:
                    raise RequestError(f"generation_config asks for max_length={value}; pass max_new_tokens instead")
                continue
            if name not in SUPPORTED:
                raise RequestError(f"generation_config asks for {name}={value!r}, which generate() cannot do")
            settings[name] = value
    chosen = {name: value for name, value in given.items() if value is not None}
    settings |= chosen
    _check(settings)
    if not settings["do_sample"]:
        for name in SAMPLING:
            if chosen.get(name, SUPPORTED[name]) != SUPPORTED[name]:
                raise RequestError(f"{name}={chosen[name]!r} is for sampling: pass do_sample=True")
    return settings


def _check(settings: dict[str, Any]) -> None:
    for name, least in (("max_new_tokens", 1), ("min_new_tokens", 0), ("num_beams", 1), ("num_return_sequences", 1)):
        value = settings[name]
        if not isinstance(value, int) or value < least:
            raise RequestError(f"{name}={value!r} is not a whole number from {least}")
    for name, least in (("top_k", 0), ("no_repeat_ngram_size", 0)):
        if not isinstance(settings[name], int) or settings[name] < least:
            raise RequestError(f"{name}={settings[name]!r} is not a whole number from {least}")
    for name, most in (("temperature", math.inf), ("repetition_penalty", math.inf), ("top_p", 1.0)):
        if not isinstance(settings[name], (int, float)) or not 0 < settings[name] <= most:
            raise RequestError(f"{name}={settings[name]!r} is not a number above 0" + (" up to 1" if most == 1 else ""))
    if settings["early_stopping"] not in (True, False, "never"):
        raise RequestError(f"early_stopping={settings['early_stopping']!r} is none of True, False and 'never'")
    if settings["min_new_tokens"] > settings["max_new_tokens"]:
        raise RequestError(
            f"min_new_tokens={settings['min_new_tokens']} is more than max_new_tokens={settings['max_new_tokens']}"
        )
    beams, returned, sample = settings["num_beams"], settings["num_return_sequences"], settings["do_sample"]
    if beams > 1 and sample:
        raise RequestError("beam search does not sample: pass num_beams=1 with do_sample=True, or do_sample=False")
    if returned > 1 and not sample and returned > beams:
        raise RequestError(
            f"num_return_sequences={returned} of one greedy search would be the same: pass do_sample=True, or "
            f"num_beams={returned} or more"
        )


@dataclass(frozen=True)
class Rules:
    """What one prompt's search may choose and when it ends.

    Attributes:
        settings: of :func:`settings_of`.
        prompt: tokens of the prompt, special ones not counted.
        most: most tokens that may be generated: as asked for, or as many as the model has room for.
        stop_ids: tokens that end it.
        own_processors, own_criteria: of the caller, transformers' kinds.
    """

    settings: dict[str, Any]
    prompt: int
    most: int
    stop_ids: tuple[int, ...]
    own_processors: Sequence[Any] = ()
    own_criteria: Sequence[Any] = ()

    @property
    def sample(self) -> bool:
        return bool(self.settings["do_sample"])

    @property
    def beams(self) -> int:
        return int(self.settings["num_beams"])

    @property
    def returned(self) -> int:
        return int(self.settings["num_return_sequences"])

    @property
    def length_penalty(self) -> float:
        return float(self.settings["length_penalty"])

    @property
    def early_stopping(self) -> bool | str:
        return self.settings["early_stopping"]

    def processors(self) -> LogitsProcessorList:
        """Made anew for each search, in transformers' order; empty where nothing changes the model's scores.

        Raises:
            RequestError: transformers refuses a setting.
        """
        try:
            return LogitsProcessorList(self._processors())
        except (TypeError, ValueError) as error:
            raise RequestError(f"transformers refuses these settings: {error}") from error

    def _processors(self) -> list[Any]:
        s = self.settings
        stops = torch.tensor(self.stop_ids, dtype=torch.long)
        found: list[Any] = []
        if s["sequence_bias"] is not None:
            found.append(SequenceBiasLogitsProcessor(s["sequence_bias"]))
        if s["repetition_penalty"] != 1.0:
            found.append(RepetitionPenaltyLogitsProcessor(float(s["repetition_penalty"])))
        if s["no_repeat_ngram_size"] > 0:
            found.append(NoRepeatNGramLogitsProcessor(s["no_repeat_ngram_size"]))
        if s["bad_words_ids"] is not None:
            found.append(NoBadWordsLogitsProcessor(s["bad_words_ids"], stops))
        if s["min_new_tokens"] > 0 and self.stop_ids:
            found.append(MinNewTokensLengthLogitsProcessor(self.prompt, s["min_new_tokens"], stops))
        if s["remove_invalid_values"]:
            found.append(InfNanRemoveLogitsProcessor())
        if s["exponential_decay_length_penalty"] is not None:
            found.append(ExponentialDecayLengthPenalty(s["exponential_decay_length_penalty"], stops, self.prompt))
        if s["suppress_tokens"] is not None:
            found.append(SuppressTokensLogitsProcessor(s["suppress_tokens"]))
        if s["begin_suppress_tokens"] is not None:
            found.append(SuppressTokensAtBeginLogitsProcessor(s["begin_suppress_tokens"], self.prompt))
        found += self.own_processors
        if s["do_sample"]:
            if s["temperature"] != 1.0:
                found.append(TemperatureLogitsWarper(float(s["temperature"])))
            if s["top_k"]:
                found.append(TopKLogitsWarper(s["top_k"]))
            if s["top_p"] < 1.0:
                found.append(TopPLogitsWarper(float(s["top_p"])))
            if s["min_p"] is not None:
                found.append(MinPLogitsWarper(s["min_p"]))
            if s["typical_p"] < 1.0:
                found.append(TypicalLogitsWarper(s["typical_p"]))
            if 0 < s["epsilon_cutoff"] < 1:
                found.append(EpsilonLogitsWarper(s["epsilon_cutoff"]))
            if 0 < s["eta_cutoff"] < 1:
                found.append(EtaLogitsWarper(s["eta_cutoff"]))
        if s["renormalize_logits"]:
            found.append(LogitNormalization())
        return found

    def stopped(self, token_ids: list[int]) -> str | None:
        """Why a continuation ends here; None if it goes on.

        ``"token"``: it ended with a stop token. ``"criterion"``: a stop string, a time limit, or a criterion of the
        caller. ``"length"``: it has as many tokens as it may have.
        """
        if token_ids[-1] in self.stop_ids:
            return "token"
        if self.own_criteria and bool(StoppingCriteriaList(self.own_criteria)(torch.tensor([token_ids]), None).all()):
            return "criterion"
        return "length" if len(token_ids) - self.prompt >= self.most else None


def criteria_of(settings: dict[str, Any], tokenizer: Any, own: Iterable[Any]) -> list[Any]:
    """Transformers' stopping criteria for the settings, and those of the caller. A time limit begins now."""
    found: list[Any] = []
    if settings["max_time"] is not None:
        found.append(MaxTimeCriteria(settings["max_time"]))
    if settings["stop_strings"] is not None:
        found.append(StopStringCriteria(tokenizer, settings["stop_strings"]))
    return [*found, *own]


def stop_ids_of(settings: dict[str, Any], tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a continuation: as set, else the tokenizer's separator and end of sequence."""
    chosen = settings["eos_token_id"]
    if chosen is None:
        chosen = [tokenizer.sep_token_id, tokenizer.eos_token_id]
    chosen = [chosen] if isinstance(chosen, int) else list(chosen)
    return tuple(dict.fromkeys(int(one) for one in chosen if one is not None))
