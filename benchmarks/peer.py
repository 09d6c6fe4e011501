"""The official algorithm of Coconut in plain PyTorch and transformers, for comparison.

Training (coconut.py of facebookresearch/coconut): one pass up to the first latent, then one pass for each further
latent, through the KV cache. The hidden state after the final layer norm replaces the embedding of the next latent.
Logits are computed at every position, and the cross-entropy ignores labels of -100. Decoding: one example at a time,
without a cache, so every token repeats the whole computation. Does not import mlx.
"""

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


def new_model(
    vocabulary: int, layers: int, width: int, heads: int, inner: int | None = None, dropout: float = 0.1
) -> GPT2LMHeadModel:
    """Make a GPT-2 with random weights; inner: the width between the feed-forward layers, None for 4 * width."""
    torch.manual_seed(0)
    rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), dropout)
    shape = GPT2Config(vocab_size=vocabulary, n_layer=layers, n_embd=width, n_head=heads, n_inner=inner, **rates)
    return GPT2LMHeadModel(shape)


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
    tensors = (torch.tensor(array) for array in (ids, labels, mask, positions))
    return PeerBatch(*tensors, first if n_latents.any() else length, torch.tensor(is_latent))


def think(model: GPT2LMHeadModel, batch: PeerBatch):
    """Run all passes; returns (logits [B, T, V], embeddings with the thoughts filled in [B, T, D])."""
    embeddings, cache = model.transformer.wte(batch.ids), DynamicCache()
    n_latents, length = batch.is_latent.shape[1], batch.ids.shape[1]
    logits, start = [], 0
    for k, end in enumerate([*range(batch.first_latent, batch.first_latent + n_latents), length]):
        out = model(
            None,  # input_ids
            cache,  # by position: the keyword past_key_values became cache in transformers 5.24
            inputs_embeds=embeddings[:, start:end],
            attention_mask=batch.mask[:, :end],
            position_ids=batch.positions[:, start:end],
            use_cache=True,
            output_hidden_states=True,
        )
        logits.append(out.logits)
        if k < n_latents:  # hidden_states[-1] is the state after ln_f
            thought = torch.where(batch.is_latent[:, k, None], out.hidden_states[-1][:, -1], embeddings[:, end])
            embeddings = torch.cat([embeddings[:, :end], thought[:, None], embeddings[:, end + 1 :]], dim=1)
        start = end
    return torch.cat(logits, dim=1), embeddings


def loss(model: GPT2LMHeadModel, batch: PeerBatch) -> torch.Tensor:
    """Mean cross-entropy of the labeled tokens."""
    logits = think(model, batch)[0][:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, batch.labels[:, 1:].flatten())


def train_step(model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer, batch: PeerBatch) -> float:
    """Run forward, backward and update; returns the loss."""
    model.train()
    value = loss(model, batch)
    value.backward()
    optimizer.step()
    optimizer.zero_grad()
    return value.item()


@torch.no_grad()
def generate(model: GPT2LMHeadModel, row, max_new_tokens: int, eos_id: int) -> list[int]:
    """Decode one prompt greedily; returns the new ids without the end token."""
    model.eval()
    logits, embeddings = think(model, collate([row], pad_id=0))
    ids: list[int] = []
    while True:
        token = int(logits[0, -1].argmax())
        if token == eos_id:
            return ids
        ids.append(token)
        if len(ids) == max_new_tokens:
            return ids
        embeddings = torch.cat([embeddings, model.transformer.wte(torch.tensor([[token]]))], dim=1)
        logits = model(inputs_embeds=embeddings).logits
