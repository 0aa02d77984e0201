"""In-context learning with masked models and causal ones: the paper's tasks, their evaluation, needles in haystacks."""
