#!/usr/bin/env python3
"""Train the small masked language model that ships as ``mlmfast.load("tiny")``.

    python training/train_tiny.py --corpus FILE... --wordnet /usr/share/wordnet --out mlmfast/tiny

Text in (.txt or .txt.gz, one paragraph or sentence a line; WordNet's dictionary files),
a plain Hugging Face DeBERTa-v2 folder out. Runs on a CPU with bfloat16 matrix units in
about an hour and a half. Checkpoints go to --work; --resume goes on from the last one.
The run ends after --steps or --minutes, the learning rate falling to zero over its last
part; --resume with other ends lengthens or shortens the run.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import time
from pathlib import Path

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")  # many batch shapes
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads are ruinous on a shared machine
import numpy as np
import torch
from tiny_context import KINDS_OF_ROW, STAGES, Context
from tiny_model import best_tokens, export, make_model, masked_loss, self_check, start_from
from tiny_text import CLS, MASK, SEP, read_text, train_tokenizer


def prepare(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Tokenised text, cached in the work folder: flat token arrays with their row ends."""
    from tokenizers import Tokenizer

    cache, tokdir = Path(args.work) / "tokens.npz", Path(args.work) / "tokenizer"
    if not cache.exists():
        data = read_text(args.corpus, args.wordnet, args.seed)
        if not (tokdir / "tokenizer.json").exists():
            train_tokenizer((s for k in ("sents", "glosses") for s in data["train"][k]), tokdir)
        tok, arrays = Tokenizer.from_file(str(tokdir / "tokenizer.json")), {}
        for part, kinds in data.items():
            for kind, texts in kinds.items():
                rows = [
                    e.ids
                    for i in range(0, len(texts), 4096)
                    for e in tok.encode_batch_fast(texts[i : i + 4096], add_special_tokens=False)
                ]
                arrays[f"{part}_{kind}"] = np.fromiter((t for r in rows for t in r), np.int16)
                arrays[f"{part}_{kind}_len"] = np.array([len(r) for r in rows], np.int32)
        np.savez(cache, **arrays)
    z = np.load(cache)
    return {k: z[k] for k in z.files}


class Batches:
    """Batches of rows of one length each: sentences, chunks of running text, rows to be filled in from context."""

    def __init__(self, data: dict[str, np.ndarray], args: argparse.Namespace) -> None:
        self.args, self.run = args, data["train_runs"].astype(np.int64)
        self.context = Context(self.run, Path(args.work) / "tokenizer", args.wordnet, args.stage)
        self.rows = {}
        for kind in "sents", "glosses":
            self.rows[kind] = self.by_length(data["train_" + kind], data[f"train_{kind}_len"])
        self.epoch, self.pos, self.plan = 0, 0, None
        held = self.by_length(data["held_sents"], data["held_sents_len"])
        self.held = [(m[: args.batch // (n + 2)], "sent") for n, m in held.items() if n % 3 == 2]
        run = data["held_runs"].astype(np.int64)
        self.held += [(run[: len(run) // 126 * 126].reshape(-1, 126)[:160], "run")]
        self.needles = {n: self.context.needles(16, n, run) for n in (62, 126, 254)}

    def by_length(self, flat: np.ndarray, lens: np.ndarray, low: int = 3, high: int = 62) -> dict[int, np.ndarray]:
        """{length: rows [count, length]} of the sentences whose length lies in low..high."""
        ends, out = np.cumsum(lens), {}
        for n in range(low, high + 1):
            starts = (ends - lens)[lens == n]
            if len(starts):
                out[n] = flat[starts[:, None] + np.arange(n)].astype(np.int64)
        return out

    def plan_epoch(self) -> None:
        """The order of the sentence batches of one pass over the text."""
        rng = np.random.default_rng([self.args.seed, 1, self.epoch])
        self.plan = []
        for n in range(3, 63):  # every sentence, and another half of the definitions every time
            rows = self.rows["sents"].get(n, np.zeros((0, n), np.int64))
            g = self.rows["glosses"].get(n, rows[:0])
            rows = np.concatenate([rows, g[rng.random(len(g)) < 0.5]])
            rows = rows[rng.permutation(len(rows))]
            size = max(1, self.args.batch // (n + 2))
            self.plan += [rows[i : i + size] for i in range(0, len(rows), size) if len(rows) - i >= size]
        self.plan = [self.plan[i] for i in rng.permutation(len(self.plan))]

    def next(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The masked batch of a step; what is drawn depends on the seed and the step alone."""
        rng = np.random.default_rng([self.args.seed, 2, step])
        if rng.random() < self.args.context:
            return self.context.batch((self.args.seed, 3, step), self.args.batch)
        if rng.random() < self.args.chunks:
            n = 254 if rng.random() < 0.15 else 126
            starts = rng.integers(0, len(self.run) - n, self.args.batch // (n + 2))
            rows = self.run[starts[:, None] + np.arange(n)]
        else:
            if self.plan is None or self.pos >= len(self.plan):
                self.epoch, self.pos = self.epoch + (self.plan is not None), 0 if self.plan is not None else self.pos
                self.plan_epoch()
            rows = self.plan[self.pos]
            self.pos += 1
        return mask_rows(rows, rng)


def mask_rows(rows: np.ndarray, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[CLS] rows [SEP] with some spans of 1 to 3 tokens as [MASK]; the flat places of the masks; what was there."""
    rate = rng.uniform(0.15, 0.30, (len(rows), 1)) / 1.64  # 1.64 tokens a span
    start, length = rng.random(rows.shape) < rate, rng.choice(3, rows.shape, p=[6 / 11, 3 / 11, 2 / 11])
    hit = start.copy()
    hit[:, 1:] |= (start & (length >= 1))[:, :-1]
    hit[:, 2:] |= (start & (length >= 2))[:, :-2]
    edge = np.ones((len(rows), 1), np.int64)
    ids = np.concatenate([edge * CLS, np.where(hit, MASK, rows), edge * SEP], 1)
    where = np.flatnonzero(np.pad(hit, ((0, 0), (1, 1))))
    return torch.from_numpy(ids), torch.from_numpy(where), torch.from_numpy(rows[hit])


def evaluate(model: torch.nn.Module, batches: Batches) -> dict[str, float]:
    """Held-out loss of sentences and running text and the share of needles found, always with the same masks."""
    out = {"sent": [0.0, 0], "run": [0.0, 0]}
    rng = np.random.default_rng(7)
    with torch.no_grad():
        for rows, kind in batches.held:
            for i in range(0, len(rows), 64):
                ids, where, labels = mask_rows(rows[i : i + 64], rng)
                if len(where):
                    out[kind][0] += masked_loss(model, ids, where, labels, torch.bfloat16).item() * len(where)
                    out[kind][1] += len(where)
        losses = {k: a / n for k, (a, n) in out.items()}
        for n, (ids, where, labels) in batches.needles.items():
            found = best_tokens(model, ids, where) == labels
            losses[f"digits {n + 2}"] = found.float().mean().item()
            losses[f"needles {n + 2}"] = found.view(-1, 6).all(1).float().mean().item()
        for kind in KINDS_OF_ROW:
            ids, where, labels = batches.context.batch("held", 4096, 126, kind)
            losses[kind] = masked_loss(model, ids, where, labels, torch.bfloat16).item()
    return losses


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--corpus", nargs="+", default=[], help="text files, .txt or .txt.gz")
    ap.add_argument("--wordnet", help="folder of WordNet's data.noun, data.verb, ...")
    ap.add_argument("--out", required=True)
    ap.add_argument("--work", default="tiny_work", help="token cache and checkpoints")
    ap.add_argument("--steps", type=int, default=20000, help="the run ends after this many steps")
    ap.add_argument("--minutes", type=float, default=1e9, help="or after so many minutes, whichever is sooner")
    ap.add_argument("--batch", type=int, default=8192, help="tokens a step")
    ap.add_argument("--chunks", type=float, default=0.27, help="share of steps on running text")
    ap.add_argument(
        "--context", type=float, default=0.5, help="share of steps on rows to be filled in from their context"
    )
    ap.add_argument(
        "--stage", choices=list(STAGES), default="long", help="which of these rows; copy, recall, long in turn"
    )
    ap.add_argument("--init", help="folder of a model of this shape to begin with, tokenizer included")
    ap.add_argument("--lr", type=float, default=2e-3, help="AdamW: embeddings, norms, biases")
    ap.add_argument("--muon-lr", type=float, default=4e-3, help="Muon: matrices (0: AdamW for these too)")
    ap.add_argument("--weight-decay", type=float, default=0.05)
    ap.add_argument("--warmup", type=int, default=300)
    ap.add_argument("--decay", type=float, default=0.85, help="last share of the run, lr falling to 0")
    ap.add_argument("--eval-every", type=int, default=250)
    ap.add_argument("--save-minutes", type=float, default=3)
    ap.add_argument("--threads", type=int, default=os.cpu_count())
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--resume", action="store_true", help="go on from the work folder's checkpoint")
    ap.add_argument("--export-only", action="store_true", help="write --out from the checkpoint and stop")
    args = ap.parse_args()
    os.makedirs(args.work, exist_ok=True)
    torch.set_num_threads(args.threads)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc: keep freed memory, as giving it back each step costs a fifth of the speed
        for key, value in ((-4, 0), (-1, 2**31 - 1), (-2, 256 << 20)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            libc.mallopt(key, value)

    torch.manual_seed(args.seed)
    model, ckpt = make_model(), Path(args.work) / "checkpoint.pt"
    if args.export_only:
        model.load_state_dict(torch.load(ckpt)["model"])
        export(model, args.out, Path(args.work) / "tokenizer")
        return
    self_check(model)
    if args.init:
        start_from(model, args.init, Path(args.work) / "tokenizer")
    batches = Batches(prepare(args), args)

    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embedding" not in n]
    inside = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in inside]
    groups = [
        {"params": [p for p in rest if p.ndim == 2], "weight_decay": args.weight_decay / 5},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    if not args.muon_lr:
        groups.append({"params": hidden, "weight_decay": args.weight_decay})
    opts = [torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), eps=1e-8)]
    if args.muon_lr:
        opts.append(
            torch.optim.Muon(hidden, lr=args.muon_lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    base = [args.lr, args.muon_lr]

    step = tokens = 0
    before = 0.0  # seconds of earlier runs
    if args.resume:
        c = torch.load(ckpt)
        model.load_state_dict(c["model"])
        for o, state in zip(opts, c["opts"], strict=True):
            o.load_state_dict(state)
        step, tokens, before, batches.epoch, batches.pos = c["step"], c["tokens"], c["seconds"], c["epoch"], c["pos"]
        batches.plan_epoch()
    print(json.dumps(vars(args)), f"parameters {sum(p.numel() for p in model.parameters())}", flush=True)

    start = last = saved = time.time()
    run_loss, run_n, run_tokens = 0.0, 0, 0
    while True:
        seconds = before + time.time() - start
        part = max(step / args.steps, seconds / 60 / args.minutes)  # how much of the run is over
        if part >= 1 or time.time() - saved > args.save_minutes * 60:
            torch.save(
                {
                    "model": model.state_dict(),
                    "opts": [o.state_dict() for o in opts],
                    "step": step,
                    "tokens": tokens,
                    "seconds": seconds,
                    "epoch": batches.epoch,
                    "pos": batches.pos,
                },
                f"{ckpt}.new",
            )
            os.replace(f"{ckpt}.new", ckpt)
            saved = time.time()
        if step % args.eval_every == 0 or part >= 1:
            held = evaluate(model, batches)
            if hasattr(libc, "malloc_trim"):
                libc.malloc_trim(0)  # batches of many shapes leave holes
            print(
                f"step {step} tokens {tokens / 1e6:.2f}M done {part:.1%} held-out: "
                + ", ".join(f"{k} {v:.4f}" for k, v in held.items()),
                flush=True,
            )
        if part >= 1:
            break
        factor = min(1.0, (step + 1) / args.warmup, (1 - part) / args.decay)
        for o, lr in zip(opts, base, strict=False):
            for g in o.param_groups:
                g["lr"] = lr * factor
        ids, where, labels = batches.next(step)
        loss = masked_loss(model, ids, where, labels, torch.bfloat16)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for o in opts:
            o.step()
            o.zero_grad(set_to_none=True)
        step, tokens, run_tokens = step + 1, tokens + ids.numel(), run_tokens + ids.numel()
        run_loss, run_n = run_loss + loss.item() * len(where), run_n + len(where)
        if step % 50 == 0:
            now = time.time()
            print(
                f"step {step} tokens {tokens / 1e6:.2f}M epoch {batches.epoch} {run_tokens / (now - last):.0f} tok/s "
                f"loss {run_loss / run_n:.4f} lr x{factor:.3f} {seconds / 60:.1f} min",
                flush=True,
            )
            last, run_loss, run_n, run_tokens = now, 0.0, 0, 0
    export(model, args.out, Path(args.work) / "tokenizer")


if __name__ == "__main__":
    main()
