"""``MaskedLMEvaluator`` of lm-pub-quiz (Ploner et al. 2024, arXiv 2408.15729) that scores its statements with mlmfast.

Templates, encoding, masking and reduction are lm-pub-quiz's own; only the passes are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mlmfast.execution import read_logprobs
from mlmfast.integrations.masked_rows import MaskedRows, loaded, read_rows_of

try:
    import lm_pub_quiz
except ImportError as error:
    raise ImportError('lm-pub-quiz is not installed: pip install "mlmfast[lm-pub-quiz]"') from error


class MaskedLMEvaluator(lm_pub_quiz.MaskedLMEvaluator):
    """The evaluator for masked language models, made by its own ``MaskedLMEvaluator.from_model``."""

    def score_statements(
        self,
        batched_statements: Any,
        *,
        scoring_masks: Sequence[Sequence[bool]] | None = None,
        batch_size: int = 1,
        token_roles_internal: Any = None,
    ) -> list[list[float]]:
        """Log-probabilities of each statement's scored tokens, as lm-pub-quiz masks them.

        Args:
            batched_statements: from :meth:`encode`, or any padded batch with its special tokens' mask.
            scoring_masks: for each statement which tokens are scored; None for all but the special ones.
            batch_size: means nothing here: batches follow mlmfast's token budget.
            token_roles_internal: for each statement which tokens are the answer's; for ``answer_l2r+word_l2r``.

        Returns:
            A list a statement, a float a scored token.
        """
        if scoring_masks is None:
            scoring_masks = self.default_scoring_mask(batched_statements)
        rows = self.create_masked_batch(batched_statements, scoring_masks, token_roles_internal)
        counts = [sum(map(bool, mask)) for mask in scoring_masks]
        columns = [rows[name] for name in ("input_ids", "attention_mask", "labels", "masked_indices")]
        texts = [MaskedRows(*parts) for parts in zip(*(torch.split(column, counts) for column in columns))]
        read = read_rows_of(loaded(self.model, self.tokenizer), texts, read_logprobs())
        return [values["logprobs"].tolist() if values else [] for values in read]
