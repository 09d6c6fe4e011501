"""The official algorithm of Coconut in plain PyTorch and transformers, as something to be measured beside.

Training (coconut.py of facebookresearch/coconut): one pass up to the first latent, then one for each further latent,
through the KV cache; the hidden state after the final layer norm takes the place of the next latent's embedding;
logits at every position; cross-entropy with -100 left out. Decoding: one example at a time, no cache, everything
computed again for every token. Imports no mlx.
"""

from typing import NamedTuple

import numpy as np
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel


class PeerBatch(NamedTuple):
    """Rows padded on the left until their first latents stand in one column, then on the right."""

    ids: torch.Tensor  # [B, T]
    labels: torch.Tensor  # [B, T], -100 where there is none
    mask: torch.Tensor  # [B, T] 1 or 0
    positions: torch.Tensor  # [B, T]
    first_latent: int
    is_latent: torch.Tensor  # [B, K] bool


def new_model(vocabulary: int, layers: int, width: int, heads: int, dropout: float = 0.1) -> GPT2LMHeadModel:
    """A GPT-2 with random weights."""
    torch.manual_seed(0)
    rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), dropout)
    shape = GPT2Config(vocab_size=vocabulary, n_layer=layers, n_embd=width, n_head=heads, **rates)
    return GPT2LMHeadModel(shape)


def collate(rows, pad_id: int) -> PeerBatch:
    """The official MyCollator; rows: (ids, latent_start, n_latents, n_unlabelled)."""
    first = max((row.latent_start for row in rows if row.n_latents), default=0)
    shifts = [first - row.latent_start if row.n_latents else 0 for row in rows]
    length = max(shift + len(row.ids) for shift, row in zip(shifts, rows, strict=True))
    ids, labels = np.full((len(rows), length), pad_id), np.full((len(rows), length), -100)
    mask, positions = np.zeros((len(rows), length), dtype=int), np.zeros((len(rows), length), dtype=int)
    for i, (shift, row) in enumerate(zip(shifts, rows, strict=True)):
        place = slice(shift, shift + len(row.ids))
        ids[i, place], mask[i, place], positions[i, place] = row.ids, 1, np.arange(len(row.ids))
        labels[i, shift + row.n_unlabelled : place.stop] = row.ids[row.n_unlabelled :]
    n_latents = np.array([row.n_latents for row in rows])
    is_latent = np.arange(n_latents.max()) < n_latents[:, None]
    tensors = (torch.tensor(array) for array in (ids, labels, mask, positions))
    return PeerBatch(*tensors, first if n_latents.any() else length, torch.tensor(is_latent))


def think(model: GPT2LMHeadModel, batch: PeerBatch):
    """All passes: -> (logits [B, T, V], embeddings with the thoughts in place [B, T, D])."""
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
    """Mean cross-entropy of the labelled tokens."""
    logits = think(model, batch)[0][:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, batch.labels[:, 1:].flatten())


def train_step(model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer, batch: PeerBatch) -> float:
    """Forward, backward and update."""
    model.train()
    value = loss(model, batch)
    value.backward()
    optimizer.step()
    optimizer.zero_grad()
    return value.item()


@torch.no_grad()
def generate(model: GPT2LMHeadModel, row, max_new_tokens: int, eos_id: int) -> list[int]:
    """Greedy continuation of one prompt, without the end token."""
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
