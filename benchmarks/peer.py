"""Coconut in plain PyTorch and transformers, for comparison, on CUDA, MPS or a CPU: two peers. Does not import mlx.

The official algorithm (coconut.py of facebookresearch/coconut). Training: one pass up to the first latent, then one
pass for each further latent, through the KV cache. The hidden state after the final layer norm replaces the embedding
of the next latent. Logits are computed at every position, and the cross-entropy ignores labels of -100. Decoding: one
example at a time, without a cache, so every token repeats the whole computation.

The lean peer is the best that a PyTorch user could do with the same model: logits of labeled tokens alone, and decoding
of whole batches through the KV cache.
"""

from contextlib import AbstractContextManager, nullcontext
from itertools import takewhile
from typing import NamedTuple

import numpy as np
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel


class PeerBatch(NamedTuple):
    """Rows padded on the left so that their first latents are in the same column, then on the right."""

    ids: torch.Tensor  # [B, T]
    labels: torch.Tensor  # [B, T], -100 without a label
    mask: torch.Tensor  # [B, T] 1 or 0
    positions: torch.Tensor  # [B, T]
    first_latent: int
    is_latent: torch.Tensor  # [B, K] bool


def device() -> torch.device:
    """Where the peers compute: CUDA or MPS where there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def synchronize() -> None:
    """Wait until the device has done all its work."""
    if device().type != "cpu":
        getattr(torch, device().type).synchronize()


def precision(name: str) -> AbstractContextManager:
    """Compute in float32, tf32 (CUDA) or bf16 (autocast, with float32 parameters) inside the context."""
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    return torch.autocast(device().type, dtype=torch.bfloat16) if name == "bf16" else nullcontext()


def new_optimizer(model: GPT2LMHeadModel) -> torch.optim.AdamW:
    """AdamW as in run.py, in one kernel on CUDA."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=device().type == "cuda")


def new_model(
    vocabulary: int, layers: int, width: int, heads: int, inner: int | None = None, dropout: float = 0.1
) -> GPT2LMHeadModel:
    """Make a GPT-2 with random weights, on the device; inner: the width inside a feed-forward layer (4 * width)."""
    torch.manual_seed(0)
    rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), dropout)
    shape = GPT2Config(vocab_size=vocabulary, n_layer=layers, n_embd=width, n_head=heads, n_inner=inner, **rates)
    return GPT2LMHeadModel(shape).to(device())


def collate(rows, pad_id: int) -> PeerBatch:
    """Pad as the official MyCollator; rows: (ids, latent_start, n_latents, n_unlabeled)."""
    first = max((row.latent_start for row in rows if row.n_latents), default=0)
    shifts = [first - row.latent_start if row.n_latents else 0 for row in rows]
    length = max(shift + len(row.ids) for shift, row in zip(shifts, rows, strict=True))
    ids, labels = np.full((len(rows), length), pad_id), np.full((len(rows), length), -100)
    mask, positions = np.zeros((len(rows), length), dtype=int), np.zeros((len(rows), length), dtype=int)
    for i, (shift, row) in enumerate(zip(shifts, rows, strict=True)):
        columns = slice(shift, shift + len(row.ids))
        ids[i, columns], mask[i, columns], positions[i, columns] = row.ids, 1, np.arange(len(row.ids))
        labels[i, shift + row.n_unlabeled : columns.stop] = row.ids[row.n_unlabeled :]
    n_latents = np.array([row.n_latents for row in rows])
    is_latent = np.arange(n_latents.max()) < n_latents[:, None]
    tensors = (torch.tensor(array, device=device()) for array in (ids, labels, mask, positions))
    return PeerBatch(*tensors, first if n_latents.any() else length, torch.tensor(is_latent, device=device()))


def think(model: GPT2LMHeadModel, batch: PeerBatch):
    """Run all passes; returns (hidden states [B, T, D], embeddings with the thoughts filled in [B, T, D], cache)."""
    embeddings, cache = model.transformer.wte(batch.ids), DynamicCache()
    n_latents, length = batch.is_latent.shape[1], batch.ids.shape[1]
    hidden, start = [], 0
    for k, end in enumerate([*range(batch.first_latent, batch.first_latent + n_latents), length]):
        out = model.transformer(
            None,  # input_ids
            cache,  # by position: the keyword past_key_values became cache in transformers 5.24
            inputs_embeds=embeddings[:, start:end],
            attention_mask=batch.mask[:, :end],
            position_ids=batch.positions[:, start:end],
            use_cache=True,
        )
        hidden.append(out.last_hidden_state)  # after ln_f
        if k < n_latents:
            last = hidden[-1][:, -1].to(embeddings.dtype)
            thought = torch.where(batch.is_latent[:, k, None], last, embeddings[:, end])
            embeddings = torch.cat([embeddings[:, :end], thought[:, None], embeddings[:, end + 1 :]], dim=1)
        start = end
    return torch.cat(hidden, dim=1), embeddings, cache


def loss(model: GPT2LMHeadModel, batch: PeerBatch) -> torch.Tensor:
    """Mean cross-entropy of the labeled tokens, from the logits of all positions."""
    logits = model.lm_head(think(model, batch)[0])[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits.float(), batch.labels[:, 1:].flatten())


def lean_loss(model: GPT2LMHeadModel, batch: PeerBatch) -> torch.Tensor:
    """Mean cross-entropy of the labeled tokens, from their logits alone."""
    labels = batch.labels[:, 1:]
    labeled = think(model, batch)[0][:, :-1][labels >= 0]  # [N, D]
    return torch.nn.functional.cross_entropy(model.lm_head(labeled).float(), labels[labels >= 0])


def train_step(model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer, batch: PeerBatch, loss=loss) -> float:
    """Run forward, backward and update; returns the loss."""
    model.train()
    value = loss(model, batch)
    value.backward()
    optimizer.step()
    optimizer.zero_grad()
    synchronize()
    return value.item()


@torch.no_grad()
def generate(model: GPT2LMHeadModel, row, max_new_tokens: int, eos_id: int) -> list[int]:
    """Decode one prompt greedily; returns the new ids without the end token."""
    model.eval()
    hidden, embeddings, _ = think(model, collate([row], pad_id=0))
    logits = model.lm_head(hidden)
    ids: list[int] = []
    while True:
        token = int(logits[0, -1].argmax())
        if token == eos_id:
            return ids
        ids.append(token)
        if len(ids) == max_new_tokens:
            return ids
        new = torch.tensor([[token]], device=device())
        embeddings = torch.cat([embeddings, model.transformer.wte(new)], dim=1)
        logits = model(inputs_embeds=embeddings).logits


@torch.no_grad()
def lean_generate(model: GPT2LMHeadModel, rows, max_new_tokens: int, eos_id: int) -> list[list[int]]:
    """Decode a batch of prompts greedily through the cache; returns the new ids of each without the end token."""
    model.eval()
    batch = collate(rows, pad_id=0)
    hidden, _, cache = think(model, batch)
    last = batch.positions.argmax(dim=1)  # column of each row's last token
    token = model.lm_head(hidden[torch.arange(len(rows)), last]).argmax(dim=-1)  # [B]
    found, mask, ended = [token], batch.mask, token == eos_id
    next_position = batch.positions.max(dim=1).values + 1
    while len(found) < max_new_tokens and not ended.all():
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        positions = (next_position + len(found) - 1)[:, None]
        hidden = model.transformer(token[:, None], cache, attention_mask=mask, position_ids=positions, use_cache=True)[
            0
        ]
        token = model.lm_head(hidden[:, -1]).argmax(dim=-1)
        found.append(token)
        ended |= token == eos_id
    return [list(takewhile(lambda i: i != eos_id, ids)) for ids in torch.stack(found, dim=1).tolist()]
