"""Score, rank and fill real sentences with the model that ships inside the package: ``make demo``."""

from __future__ import annotations

import argparse
import math
import time

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import mlmfast

# Minimal pairs: one word makes the second sentence wrong. Not taken from any benchmark, and no measure of the model:
# they were picked to show a mistake as well as successes.
PAIRS = [
    ("The dogs were barking in the garden.", "The dogs was barking in the garden."),
    ("She has never seen the ocean.", "She has ever seen the ocean."),
    ("The boy washed himself before dinner.", "The boy washed herself before dinner."),
    ("They gave the book to their teacher.", "They gave the book their to teacher."),
    ("Which of the letters did you read?", "Which of the letters did you read them?"),
]
PROMPT = "She poured some water into the"
OPTIONS = [" glass", " bottle", " moon", " quickly"]
BLANK = "He opened the [MASK] and walked into the room."


def bar(logprob: float, worst: float, width: int = 24) -> str:
    """A bar as long as the token's surprisal is large; ``worst`` (the lowest log-probability) fills ``width``."""
    return "█" * max(1, round(width * logprob / min(worst, -1e-9)))


def tokens_table(score: mlmfast.Score) -> Table:
    """One row a token: log-probability, the model's rank for it, and the surprisal as a bar."""
    table = Table()
    table.add_column("token")
    table.add_column("log-probability", justify="right")
    table.add_column("rank", justify="right")
    table.add_column("surprisal")
    worst = float(score.logprobs.min())
    ranks = [""] * len(score) if score.ranks is None else [str(rank) for rank in score.ranks]
    for token, logprob, rank in zip(score.tokens, score.logprobs, ranks):
        table.add_row(escape(token), f"{logprob:.4f}", rank, bar(float(logprob), worst))
    table.add_section()
    table.add_row("PLL (nats)", f"{score.total:.4f}", "", f"pseudo-perplexity {score.perplexity:.1f}")
    return table


def pairs_table(lm: mlmfast.MaskedLM) -> Table:
    """Which sentence of each minimal pair the model finds likelier."""
    table = Table()
    table.add_column("right one", justify="right")
    table.add_column("wrong one", justify="right")
    table.add_column("")
    table.add_column("the likelier of the two")
    scores = lm.score([sentence for pair in PAIRS for sentence in pair])
    for (good, bad), first, second in zip(PAIRS, scores[::2], scores[1::2]):
        mark, likelier = ("[green]✓[/]", good) if first.total > second.total else ("[red]✗[/]", bad)
        table.add_row(f"{first.total:.2f}", f"{second.total:.2f}", mark, escape(likelier))
    return table


def ranking_table(ranking: mlmfast.Ranking) -> Table:
    """The options after the prompt, best first."""
    table = Table()
    table.add_column("option")
    table.add_column("tokens", justify="right")
    table.add_column("PLL", justify="right")
    table.add_column("share", justify="right")
    for i in ranking.order:
        name, tokens = ranking.options[i].strip(), str(len(ranking.scores[i]))
        table.add_row(escape(name), tokens, f"{ranking.values[i]:.4f}", f"{ranking.probabilities[i]:.1%}")
    return table


def fill_table(fill: mlmfast.Fill) -> Table:
    """The model's first choices for the mask."""
    table = Table()
    table.add_column("word")
    table.add_column("log-probability", justify="right")
    table.add_column("probability", justify="right")
    for word, logprob in zip(fill.words, fill.logprobs):
        table.add_row(escape(word), f"{logprob:.4f}", f"{math.exp(logprob):.1%}")
    return table


def main() -> None:
    """Print the four tables and the time they took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny", help="tiny (bundled), a Hub name or a local folder")
    model = parser.parse_args().model
    console = Console()
    console.print(f"mlmfast {mlmfast.__version__}, model {model}")
    lm = mlmfast.load(model)
    start = time.perf_counter()
    score = lm.score([PAIRS[0][0]], ranks=True)[0]
    ranking = lm.rank(PROMPT, OPTIONS)
    fill = lm.fill(BLANK.replace("[MASK]", lm.tokenizer.mask_token), top_k=5)[0]
    tables = {
        f"score: {score.text}": tokens_table(score),
        "score: minimal pairs, PLL in nats": pairs_table(lm),
        f"rank: {ranking.prompt} …": ranking_table(ranking),
        f"fill: {fill.text}": fill_table(fill),
    }
    seconds = time.perf_counter() - start
    for title, table in tables.items():
        console.print(f"\n[bold]{escape(title)}[/]", table, sep="\n", highlight=False)
    console.print(f"\nComputed in {seconds:.2f} s on {lm.device}, {lm.dtype}.")


if __name__ == "__main__":
    main()
