"""The tiny model, a training loss that is Hugging Face's but several times faster, and the export.

Within rows of equal length only 2n - 1 distances exist, so the position scores are plain matrix products
with a table in the order of the distance, read through a strided view: no gather, no index tensor.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from tiny_text import CLS, PAD, SEP, VOCAB


def make_model() -> torch.nn.Module:
    """A fresh DeBERTa-v2 masked language model of 6.9 million parameters."""
    from transformers import DebertaV2Config, DebertaV2ForMaskedLM

    return DebertaV2ForMaskedLM(
        DebertaV2Config(
            vocab_size=VOCAB,
            hidden_size=256,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=1024,
            hidden_act="gelu",
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            max_position_embeddings=512,
            type_vocab_size=0,
            layer_norm_eps=1e-7,
            relative_attention=True,
            max_relative_positions=512,
            position_buckets=64,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pos_att_type=["p2c", "c2p"],
            position_biased_input=False,
            legacy=False,
            pad_token_id=PAD,
            cls_token_id=CLS,
            sep_token_id=SEP,
            bos_token_id=CLS,
            eos_token_id=SEP,
        )
    )


def shifted(a: torch.Tensor, n: int) -> torch.Tensor:
    """View x of a [..., n, 2n-1] with x[i, j] = a[i, n-1-i+j] (no gather, no copy)."""
    return a.as_strided(a.shape[:-1] + (n,), a.stride()[:-2] + (2 * n - 2, 1), n - 1)


class Disentangled(torch.autograd.Function):
    """softmax(q k' + q pk[i-j]' + k pq[i-j]') v for heads x rows x n x d; q and pq come scaled.

    pk and pq are heads x (2n-1) x d in falling order of the distance i-j."""

    @staticmethod
    def forward(ctx, q, k, v, pk, pq):
        h, b, n, d = q.shape
        c2p = (q.view(h, b * n, d) @ pk.transpose(1, 2)).view(h, b, n, 2 * n - 1)
        p2c = (k.view(h, b * n, d) @ pq.flip(1).transpose(1, 2)).view(h, b, n, 2 * n - 1)
        s = q @ k.transpose(-1, -2)
        s += shifted(c2p, n)
        s += shifted(p2c, n).transpose(-1, -2)
        p = torch.softmax(s, -1)
        ctx.save_for_backward(q, k, v, pk, pq, p)
        return p @ v

    @staticmethod
    def backward(ctx, do):
        q, k, v, pk, pq, p = ctx.saved_tensors
        h, b, n, d = q.shape
        do = do.contiguous()
        ds = torch._softmax_backward_data(do @ v.transpose(-1, -2), p, -1, p.dtype)
        dst = ds.transpose(-1, -2).contiguous()
        dv = p.transpose(-1, -2) @ do
        wide = ds.new_zeros(h, b, n, 2 * n - 1)
        flat = wide.view(h, b * n, 2 * n - 1)
        shifted(wide, n).copy_(ds)
        dq = ds @ k
        dq += (flat @ pk).view_as(dq)
        dpk = flat.transpose(1, 2) @ q.view(h, b * n, d)
        shifted(wide, n).copy_(dst)
        dk = dst @ q
        dk += (flat @ pq.flip(1)).view_as(dk)
        dpq = (flat.transpose(1, 2) @ k.view(h, b * n, d)).flip(1)
        return dq, dk, dv, dpk, dpq


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of x w' + b, with its gradients worked out on the way, a few rows at a time."""

    @staticmethod
    def forward(ctx, x, w, b, labels):
        wt, dx, dw, db, loss = w.to(x.dtype), [], torch.zeros_like(w), torch.zeros_like(b), 0.0
        for i in range(0, len(x), 256):
            xi, li = x[i : i + 256], labels[i : i + 256, None]
            logits = (xi @ wt.T).float()
            logits += b
            logp = torch.log_softmax(logits, -1)
            loss += -logp.gather(1, li).sum()
            if ctx.needs_input_grad[0]:
                p = logp.exp_()
                p.scatter_add_(1, li, torch.full_like(li, -1.0, dtype=p.dtype))
                db += p.sum(0)
                p = p.to(x.dtype)
                dx.append(p @ wt)
                dw += p.T @ xi
        ctx.save_for_backward(*([torch.cat(dx), dw, db] if dx else []))
        ctx.n = len(x)
        return loss / len(x)

    @staticmethod
    def backward(ctx, g):
        dx, dw, db = (t * (g / ctx.n).to(t.dtype) for t in ctx.saved_tensors)
        return dx, dw, db, None


def masked_rows(model: torch.nn.Module, ids: torch.Tensor, where: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the head gives to the vocabulary [len(where), d] at the flat places `where` of `ids` [rows, n]."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    c, enc, emb = model.config, model.deberta.encoder, model.deberta.embeddings
    b, n = ids.shape
    h, d = c.num_attention_heads, c.hidden_size // c.num_attention_heads
    scale = 1 / math.sqrt(d * 3)

    def norm(x: torch.Tensor, ln: torch.nn.LayerNorm) -> torch.Tensor:
        return F.layer_norm(x, ln.normalized_shape, ln.weight.to(x.dtype), ln.bias.to(x.dtype), ln.eps)

    def lin(x: torch.Tensor, m: torch.nn.Linear) -> torch.Tensor:
        return F.linear(x, m.weight.to(dtype), m.bias.to(dtype))

    dist = torch.arange(n - 1, -n, -1)
    bucket = make_log_bucket_position(dist, c.position_buckets, c.max_relative_positions).long()
    span = c.position_buckets
    rel = enc.get_rel_embedding()[(bucket + span).clamp(0, 2 * span - 1)].to(dtype)
    x = norm(F.embedding(ids, emb.word_embeddings.weight), emb.LayerNorm).to(dtype).view(b * n, -1)
    for layer in enc.layer:
        a = layer.attention.self
        w = torch.cat([a.query_proj.weight * scale, a.key_proj.weight, a.value_proj.weight]).to(dtype)
        bias = torch.cat([a.query_proj.bias * scale, a.key_proj.bias, a.value_proj.bias]).to(dtype)
        q, k, v = F.linear(x, w, bias).view(b, n, 3, h, d).permute(2, 3, 0, 1, 4).contiguous()
        pq, pk = (
            F.linear(rel, w[: 2 * h * d], bias[: 2 * h * d]).view(2 * n - 1, 2, h, d).permute(1, 2, 0, 3).contiguous()
        )
        o = Disentangled.apply(q, k, v, pk, pq).permute(1, 2, 0, 3).reshape(b * n, h * d)
        x = norm(lin(o, layer.attention.output.dense) + x, layer.attention.output.LayerNorm)
        y = F.gelu(lin(x, layer.intermediate.dense))
        x = norm(lin(y, layer.output.dense) + x, layer.output.LayerNorm)
    head = model.lm_predictions.lm_head
    return norm(F.gelu(lin(x[where], head.dense)), head.LayerNorm)


def masked_loss(
    model: torch.nn.Module, ids: torch.Tensor, where: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Mean loss of `labels` at the flat places `where` of `ids`."""
    x = masked_rows(model, ids, where, dtype)
    return HeadLoss.apply(x, model.deberta.embeddings.word_embeddings.weight, model.lm_predictions.lm_head.bias, labels)


def best_tokens(model: torch.nn.Module, ids: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """The likeliest token at each place, in the numbers of the training."""
    x = masked_rows(model, ids, where, torch.bfloat16)
    words, bias = model.deberta.embeddings.word_embeddings.weight, model.lm_predictions.lm_head.bias
    return (F.linear(x, words.to(x.dtype)).float() + bias).argmax(-1)


def start_from(model: torch.nn.Module, folder: str, tokenizer: Path) -> None:
    """Weights of a checkpoint of this shape, and its tokenizer copied to where the training looks for one."""
    from transformers import DebertaV2ForMaskedLM

    model.load_state_dict(DebertaV2ForMaskedLM.from_pretrained(folder, dtype=torch.float32).state_dict())
    tokenizer.mkdir(parents=True, exist_ok=True)
    for f in "tokenizer.json", "tokenizer_config.json":
        (tokenizer / f).write_bytes((Path(folder) / f).read_bytes())


def self_check(model: torch.nn.Module) -> None:
    """The fast loss and its gradients against Hugging Face's own module, in float32."""
    torch.manual_seed(1)
    ids = torch.randint(5, VOCAB, (3, 90))
    where, labels = torch.arange(0, 270, 3), torch.randint(5, VOCAB, (90,))
    out = []
    for f in (
        lambda: F.cross_entropy(model(input_ids=ids).logits.view(-1, VOCAB)[where], labels),
        lambda: masked_loss(model, ids, where, labels, torch.float32),
    ):
        model.zero_grad()
        loss = f()
        loss.backward()
        out.append((loss.item(), {k: p.grad.clone() for k, p in model.named_parameters()}))
    assert abs(out[0][0] - out[1][0]) < 1e-4, "fast forward differs from Hugging Face's"
    for k, g in out[0][1].items():
        assert (g - out[1][1][k]).abs().max() <= 1e-3 * g.abs().max() + 1e-6, f"gradient of {k} differs"
    model.zero_grad(set_to_none=True)


def export(model: torch.nn.Module, out: str, tokenizer: Path) -> None:
    """The folder that mlmfast and transformers load: float16 weights, config, tokenizer."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    half = make_model()
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(out)
    (Path(out) / "model.safetensors").chmod(0o644)
    cfg = Path(out) / "config.json"
    d = json.loads(cfg.read_text())
    d["dtype"] = "float32"  # what it is computed in; the file stays float16
    cfg.write_text(json.dumps(d, indent=2, sort_keys=True) + "\n")
    for f in "tokenizer.json", "tokenizer_config.json":
        (Path(out) / f).write_bytes((tokenizer / f).read_bytes())
    m, info = AutoModelForMaskedLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    tok = AutoTokenizer.from_pretrained(out)
    for text in "The [MASK] sat on the mat.", "She doesn't [MASK] what he said.", "They [MASK] going home.":
        ids = tok(text, return_tensors="pt")
        best = m(**ids).logits[0][ids["input_ids"][0] == tok.mask_token_id].topk(5).indices[0]
        print(text, tok.convert_ids_to_tokens(best.tolist()))
    print("exported to", out, sum(f.stat().st_size for f in Path(out).iterdir()), "bytes", flush=True)
