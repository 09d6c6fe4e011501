"""The key-value cache of one layer, with the three members that mlx-lm's models ask for.

`offset`, `make_mask` and `update_and_fetch` are all that an attention layer needs to know about the columns before it,
so a model takes (embeddings, cache) and no positions or masks. B rows, S columns, H heads, Dh = width of a head.

The cache is functional: arrays are replaced and never written to, so gradients flow through it.
"""

import mlx.core as mx

State = tuple[mx.array, ...] | None  # keys and values, each [B, H, S, Dh]; None before the first pass


class Columns:
    """The columns of a batch, shared by the caches of all layers.

    attention_mask [B, S] bool: False on padding, also for columns that are still to come. padding [B] int: the padding
    columns in front of a row's next token, so that the token in column s has position s - padding.
    """

    def __init__(self, attention_mask: mx.array, left_padding: mx.array):
        self.attention_mask, self.padding = attention_mask, left_padding

    def end_prompt(self, next_position: mx.array) -> None:
        """Continue behind the last column, where each row's next token has `next_position` [B] int."""
        self.padding = self.attention_mask.shape[1] - next_position

    def append_token(self) -> None:
        """One more column, a token in every row."""
        token = mx.ones((self.attention_mask.shape[0], 1), dtype=mx.bool_)
        self.attention_mask = mx.concatenate([self.attention_mask, token], axis=1)  # [B, S + 1]

    def select(self, rows: mx.array) -> None:
        """Keep these rows alone; rows [b] int."""
        self.attention_mask, self.padding = self.attention_mask[rows], self.padding[rows]


class LayerCache:
    """Keys and values of one layer for the columns seen so far."""

    def __init__(self, columns: Columns, state: State = None):
        self.columns, self.state = columns, state

    @property
    def n_columns(self) -> int:
        """Columns seen so far."""
        return 0 if self.state is None else self.state[0].shape[2]

    @property
    def offset(self) -> mx.array:
        """Position of each row's next column [B] int; negative where that column is padding on the left."""
        # An arange and not the number: mx.compile writes numbers into its kernels' source, and each shape of a batch
        # would need kernels of its own, 2 to 5 seconds each on CUDA.
        return mx.arange(self.n_columns, self.n_columns + 1) - self.columns.padding

    def make_mask(self, n_new: int, return_array: bool = True, window_size: int | None = None) -> mx.array:
        """bool [B, 1, n_new, S + n_new], True where a new column may attend: causal, and never to other padding.

        Among several new columns each sees itself, padding too: a softmax over nothing can be NaN on a GPU, and NaN in
        a padding column spoils every column of the next layer, because 0 * NaN is NaN.

        Always an array, also where return_array is False, because only an array can hold padding. window_size: the
        most positions, its own included, that a column sees.
        """
        end = self.n_columns + n_new
        queries, keys = mx.arange(self.n_columns, end), mx.arange(end)
        tokens = self.columns.attention_mask[:, :end]  # [B, end]
        mask = (queries[:, None] >= keys)[None, None] & tokens[:, None, None]
        if n_new > 1:
            mask = mask | (queries[:, None] == keys)
        if window_size is None:
            return mask
        # Positions, not columns: padding may lie between a prompt and its answer.
        positions = mx.cumsum(tokens.astype(mx.int32), axis=1)  # [B, end]
        near = positions[:, self.n_columns :, None] < positions[:, None] + window_size  # [B, n_new, end]
        return mask & near[:, None]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append a pass's keys and values [B, H, T, Dh]; returns those of all columns [B, H, S + T, Dh]."""
        if self.state is not None:
            keys = mx.concatenate([self.state[0], keys], axis=2)
            values = mx.concatenate([self.state[1], values], axis=2)
        self.state = keys, values
        return self.state

    def select(self, rows: mx.array) -> None:
        """Keep these rows alone; rows [b] int. The shared columns are selected apart."""
        if self.state is not None:
            self.state = self.state[0][rows], self.state[1][rows]


class BufferedCache(LayerCache):
    """For evaluation on a GPU: columns are written into buffers with room for more, and not copied for each token.

    The state is (keys, values), each [B, H, n_columns and some more, Dh].
    """

    ROOM = 64  # columns that a buffer is larger than needed when it is made

    def __init__(self, columns: Columns, state: State = None):
        super().__init__(columns, state)
        self._n_columns = 0

    @property
    def n_columns(self) -> int:
        return self._n_columns

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        start, end = self._n_columns, self._n_columns + keys.shape[2]
        if self.state is None or end > self.state[0].shape[2]:
            self.state = tuple(
                self._with_room(part, old) for part, old in zip((keys, values), self.state or (None,) * 2, strict=True)
            )
        for buffer, part in zip(self.state, (keys, values), strict=True):
            buffer[:, :, start:end] = part
        self._n_columns = end
        return self.state[0][:, :, :end], self.state[1][:, :, :end]

    def _with_room(self, part: mx.array, old: mx.array | None) -> mx.array:
        """A buffer for the columns in `old` and those of `part`, which are not written yet."""
        B, H, T, Dh = part.shape
        room = mx.zeros((B, H, T + self.ROOM, Dh), dtype=part.dtype)
        return room if old is None else mx.concatenate([old[:, :, : self._n_columns], room], axis=2)


class PiecewiseCache(LayerCache):
    """For training on a GPU: the columns of the first pass are apart from later ones and never copied.

    The state is a tuple of one or two pieces [2, B, H, S, Dh], keys and values of the first pass and of the later ones.
    """

    @property
    def n_columns(self) -> int:
        return sum(piece.shape[-2] for piece in self.state or ())

    def extend(self, piece: mx.array) -> tuple[mx.array, ...]:
        """Append a pass's keys and values [2, B, H, T, Dh]; returns the pieces."""
        if not self.state:
            piece = mx.contiguous(piece)  # a view until here, which every later pass would read out of order
        first, later = (self.state or ())[:1], (self.state or ())[1:]
        self.state = (*first, mx.concatenate([*later, piece], axis=3) if later else piece)
        return self.state


def make_cache(n_layers: int, attention_mask: mx.array, left_padding: mx.array, kind=LayerCache) -> list[LayerCache]:
    """An empty cache for each layer, before the first column; attention_mask [B, S] bool, left_padding [B] int."""
    columns = Columns(attention_mask, left_padding)
    return [kind(columns) for _ in range(n_layers)]
