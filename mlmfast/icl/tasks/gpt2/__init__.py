"""The GPT-2 paper's own zero-shot protocols (Radford et al. 2019) as tasks like those beside them.

The README here tables prompts, what is scored, data and metrics, and says what the paper leaves open.
"""
