"""The key-value cache of one layer, with the three members that mlx-lm's models ask for.

`offset`, `make_mask` and `update_and_fetch` are all that an attention layer needs to know about the columns before it,
so a model takes (embeddings, cache) and no positions or masks. B rows, S columns, H heads, Dh = width of a head.

The cache is functional: arrays are replaced and never written to, so gradients flow through it.
"""

import mlx.core as mx

State = tuple[mx.array, ...]  # keys and values, each [B, H, S, Dh]; empty before the first pass


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
    """Keys and values of one layer for the n_columns columns seen so far."""

    def __init__(self, columns: Columns, state: State = (), n_columns: int = 0):
        self.columns, self.state, self.n_columns = columns, state, n_columns

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
        width = self._mask_width(n_new)
        queries, keys = mx.arange(self.n_columns, self.n_columns + n_new), mx.arange(width)
        tokens = self.columns.attention_mask[:, :width]  # [B, width]
        mask = (queries[:, None] >= keys)[None, None] & tokens[:, None, None]
        if n_new > 1:
            mask = mask | (queries[:, None] == keys)
        if window_size is None:
            return mask
        # Positions, not columns: padding may lie between a prompt and its answer.
        positions = mx.cumsum(tokens.astype(mx.int32), axis=1)  # [B, width]
        near = positions[:, self.n_columns :, None] < positions[:, None] + window_size  # [B, n_new, width]
        return mask & near[:, None]

    def _mask_width(self, n_new: int) -> int:
        """Columns that the keys of a pass of n_new columns have."""
        return self.n_columns + n_new

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append a pass's keys and values [B, H, T, Dh]; returns those of all columns [B, H, S + T, Dh]."""
        n_new = keys.shape[2]
        if self.state:
            keys = mx.concatenate([self.state[0], keys], axis=2)
            values = mx.concatenate([self.state[1], values], axis=2)
        self.advance((keys, values), n_new)
        return self.state

    def advance(self, state: State, n_new: int) -> None:
        """Take the state that a pass of n_new columns has made of this one."""
        self.state, self.n_columns = state, self.n_columns + n_new

    def before(self, n_columns: int) -> "LayerCache":
        """A cache as this one was when so many columns had been seen."""
        state = tuple(part[:, :, :n_columns] for part in self.state) if n_columns else ()
        return type(self)(self.columns, state, n_columns)

    def select(self, rows: mx.array) -> None:
        """Keep these rows alone; rows [b] int. The shared columns are selected apart."""
        self.state = tuple(part[rows] for part in self.state)


class BufferedCache(LayerCache):
    """For evaluation on a GPU: columns are written into buffers with room for more, and not copied for each token.

    The state is (keys, values), each [B, H, n_columns and some more, Dh].
    """

    ROOM = 64  # columns that a buffer is larger than needed when it is made

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        start, end = self.n_columns, self.n_columns + keys.shape[2]
        if not self.state or end > self.state[0].shape[2]:
            self.state = tuple(
                self._with_room(part, old) for part, old in zip((keys, values), self.state or (None,) * 2, strict=True)
            )
        for buffer, part in zip(self.state, (keys, values), strict=True):
            buffer[:, :, start:end] = part
        self.n_columns = end
        return self.state[0][:, :, :end], self.state[1][:, :, :end]

    def _with_room(self, part: mx.array, old: mx.array | None) -> mx.array:
        """A buffer for the columns in `old` and those of `part`, which are not written yet."""
        B, H, T, Dh = part.shape
        room = mx.zeros((B, H, T + self.ROOM, Dh), dtype=part.dtype)
        return room if old is None else mx.concatenate([old[:, :, : self.n_columns], room], axis=2)


class TrainingCache(LayerCache):
    """For training on a GPU: the passes write into `buffers` as wide as the batch, and never copy what is there.

    buffers: keys and values, [B, H, all columns of the batch, Dh] each, zero where no pass has been. MLX writes into an
    array in place only where nothing else refers to it, so no gradient may go through them. The state stands in their
    place there: two arrays of the same shape, which take no memory, whose gradients are those of the buffers.

    From the second pass on masks are as wide as the buffers, so that no shape depends on the pass.
    """

    buffers: State = ()

    def _mask_width(self, n_new: int) -> int:
        return self.columns.attention_mask.shape[1] if self.n_columns else n_new

    def write(self, fresh: State) -> None:
        """Write a pass's keys and values [B, H, T, Dh] into the columns behind those seen so far."""
        if self.buffers:
            self.buffers = tuple(self._written(*pair) for pair in zip(self.buffers, fresh, strict=True))
        else:
            self.buffers = tuple(self._widened(part) for part in fresh)

    def _written(self, buffer: mx.array, part: mx.array) -> mx.array:
        buffer = buffer[...]  # another object, because an assignment changes the one on its left
        buffer[:, :, self.n_columns : self.n_columns + part.shape[2]] = part
        return buffer

    def _widened(self, part: mx.array) -> mx.array:
        B, H, T, Dh = part.shape
        n_more = self.columns.attention_mask.shape[1] - T
        if not n_more:  # a batch without thoughts has one pass
            return mx.contiguous(part)
        # Zeros and not what the memory holds: a weight of 0 times NaN is NaN.
        return mx.concatenate([part, mx.zeros((B, H, n_more, Dh), dtype=part.dtype)], axis=2)

    def before(self, n_columns: int) -> "TrainingCache":
        found = TrainingCache(self.columns, self.state if n_columns else (), n_columns)
        found.buffers = self.buffers if n_columns else ()  # what later passes have written is masked
        return found


def make_cache(n_layers: int, attention_mask: mx.array, left_padding: mx.array, kind=LayerCache) -> list[LayerCache]:
    """An empty cache for each layer, before the first column; attention_mask [B, S] bool, left_padding [B] int."""
    columns = Columns(attention_mask, left_padding)
    return [kind(columns) for _ in range(n_layers)]
