"""PackedTokens: sequences of different lengths, laid end to end without a padded row."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree


class HostLengths(Sequence[int]):
    """The lengths of S sequences: what a tuple is, and equal to one, but torch.compile does not look inside.

    Of a tuple it compiles in how many numbers there are and all that it reads of them: each batch would compile anew.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers = tuple(numbers)

    def __getitem__(self, index: Any) -> Any:
        return self._numbers[index]

    def __len__(self) -> int:
        return len(self._numbers)

    def __eq__(self, other: object) -> bool:
        return self._numbers == tuple(other) if isinstance(other, HostLengths | tuple | list) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._numbers)

    def __repr__(self) -> str:
        return repr(self._numbers)


Lengths = int | Sequence[int] | None


def host_lengths(lengths: Lengths) -> Lengths:
    """What code may reckon with: all there is in eager PyTorch, inside torch.compile only one length for all. There the
    lengths of different sequences count as known to the device alone, so that one graph serves every batch."""
    return lengths if isinstance(lengths, int) or not torch.compiler.is_compiling() else None


@dataclass(frozen=True)
class PackedTokens:
    """S sequences in one tensor of T rows; sequence s owns rows ``cu_seqlens[s]`` to ``cu_seqlens[s + 1] - 1``.

    values      (T, D)    tokens. T is a capacity: rows at or after ``cu_seqlens[-1]`` are the tail, zero and ignored.
    cu_seqlens  (S + 1,)  int32, on the device of values, first 0.
    ids         (T,)      int32: frame * N + patch of the source grid; -1 for [CLS], fused and tail rows.
    size        (T,)      fp32: how many original tokens a row stands for; 0 in the tail.
    max_seqlen  host int  no sequence is longer.
    lengths     host      int (all equal), S ints, or None (only the device knows). Inside torch.compile S ints count as
                          None (`host_lengths`): one graph serves every batch, and results that they would have made
                          exact have capacity.

    A sequence is a frame or a clip; `group` turns one into the other. Registered as a pytree, so it can be returned
    from compiled and checkpointed functions.
    """

    values: Tensor
    cu_seqlens: Tensor
    ids: Tensor
    size: Tensor
    max_seqlen: int
    lengths: Lengths = None

    def __post_init__(self) -> None:
        if isinstance(self.lengths, tuple | list):
            object.__setattr__(self, "lengths", HostLengths(self.lengths))

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def rows(self) -> int:
        """T, the capacity; what a linear layer computes."""
        return self.values.shape[0]

    @property
    def used(self) -> int | None:
        """Rows before the tail, where the host knows."""
        lengths = host_lengths(self.lengths)
        return lengths * self.num_sequences if isinstance(lengths, int) else None if lengths is None else sum(lengths)

    @property
    def places(self) -> Tensor:
        """ids as rows of a table: 0 instead of the tail's -1."""
        return self.ids if self.used == self.rows else self.ids.clamp(min=0)

    def with_values(self, values: Tensor) -> PackedTokens:
        """The same sequences with other values (T, D'): what follows a layer."""
        return PackedTokens(values, self.cu_seqlens, self.ids, self.size, self.max_seqlen, self.lengths)

    def to(self, device: torch.device | str) -> PackedTokens:
        values, cu_seqlens, ids, size = (x.to(device) for x in (self.values, self.cu_seqlens, self.ids, self.size))
        return PackedTokens(values, cu_seqlens, ids, size, self.max_seqlen, self.lengths)

    def group(self, frames: int) -> PackedTokens:
        """Every ``frames`` neighbouring sequences as one (frames into clips): a view of ``cu_seqlens``, no copy."""
        if frames < 1 or self.num_sequences % frames:
            raise ValueError(
                f"{self.num_sequences} sequences cannot be grouped by {frames}; use a number that divides them."
            )
        lengths = host_lengths(self.lengths)
        if isinstance(lengths, int):
            lengths = lengths * frames
            max_seqlen = lengths
        elif lengths is not None:
            lengths = tuple(sum(lengths[i : i + frames]) for i in range(0, len(lengths), frames))
            max_seqlen = max(lengths, default=0)
        else:
            max_seqlen = min(self.max_seqlen * frames, self.rows)
        return PackedTokens(self.values, self.cu_seqlens[::frames], self.ids, self.size, max_seqlen, lengths)

    def first_rows(self) -> Tensor:
        """(S,) int32, a view: the row of every sequence's first token, its [CLS] where there is one."""
        return self.cu_seqlens[:-1]

    def to_padded(self, length: int | None = None) -> tuple[Tensor, Tensor]:
        """-> padded (S, L, D) with zeros, mask (S, L) bool, True where a token is. L defaults to ``max_seqlen``.

        Copies S * L * D elements; no host read. Tokens beyond L are cut.
        """
        length = self.max_seqlen if length is None else length
        if isinstance(self.lengths, int) and self.lengths == length and self.used == self.rows:
            mask = torch.ones(self.num_sequences, length, dtype=torch.bool, device=self.values.device)
            return self.values.reshape(self.num_sequences, length, *self.values.shape[1:]), mask
        position = torch.arange(length, device=self.values.device)
        start, end = self.cu_seqlens[:-1, None], self.cu_seqlens[1:, None]
        rows = start + position
        mask = rows < end
        padded = self.values.index_select(0, rows.clamp(0, max(self.rows - 1, 0)).reshape(-1))
        padded = padded.reshape(self.num_sequences, length, *self.values.shape[1:])
        return padded.masked_fill(~mask.reshape(*mask.shape, *[1] * (padded.ndim - 2)), 0), mask

    @staticmethod
    def from_padded(
        x: Tensor, mask: Tensor | None = None, *, lengths: Lengths = None, total: int | None = None
    ) -> PackedTokens:
        """x (S, L, D) -> packed; ``ids`` hold the column of each token.

        mask (S, L) bool, True is a token, anywhere in the row. Without a mask: ``lengths`` on the host (int or one a
        row, tokens first), or else every column is a token. With a mask, ``total`` is the capacity T, a host number
        at least the number of True; left out, it is read from the device, the one host read of this function.
        """
        s, n = x.shape[:2]
        device = x.device
        if mask is None:
            lengths = n if lengths is None else lengths
            if isinstance(lengths, int):
                values = x[:, :lengths].reshape(s * lengths, *x.shape[2:])
                return packed_uniform(values, lengths)
            if len(lengths) != s or max(lengths, default=0) > n:
                raise ValueError(f"lengths must hold {s} numbers of at most {n}, one for each row of x.")
            lengths, total = tuple(lengths), sum(lengths)
            # a fill of host numbers, one small copy to the device and no read from it
            mask = torch.arange(n, device=device) < torch.tensor(lengths, device=device)[:, None]
        elif lengths is not None:
            raise ValueError("from_padded takes a mask or lengths, not both; leave one out.")
        if mask.shape != (s, n):
            raise ValueError(f"mask is {tuple(mask.shape)} but x has rows and columns ({s}, {n}); they must agree.")
        if total is None:
            total = int(mask.sum())
        running = mask.reshape(-1).cumsum(0)
        source = torch.searchsorted(running, torch.arange(1, total + 1, device=device)).clamp(max=max(s * n - 1, 0))
        cu_seqlens = ragged_cu_seqlens(mask.sum(1)).clamp(max=total)
        tail = torch.arange(total, device=device) >= cu_seqlens[-1]
        values = x.reshape(s * n, *x.shape[2:]).index_select(0, source)
        values = values.masked_fill(tail.reshape(-1, *[1] * (values.ndim - 1)), 0)
        ids = (source % max(n, 1)).to(torch.int32).masked_fill(tail, -1)
        longest = min(n, total) if lengths is None else max(lengths, default=0)
        return PackedTokens(values, cu_seqlens, ids, (~tail).float(), longest, lengths)

    def to_nested(self) -> Tensor:
        """As a nested jagged tensor (S, j, D) that shares storage with ``values``."""
        return torch.nested.nested_tensor_from_jagged(
            self.values, self.cu_seqlens.long(), min_seqlen=0, max_seqlen=self.max_seqlen
        )

    @staticmethod
    def from_nested(nested: Any, *, max_seqlen: int | None = None) -> PackedTokens:
        """From a nested jagged tensor (S, j, D) without holes; shares its storage. ``max_seqlen`` defaults to the
        tensor's row count, a bound that needs no host read."""
        if nested.layout != torch.jagged:
            raise ValueError(
                "from_nested takes a nested tensor of layout torch.jagged; make it with layout=torch.jagged."
            )
        values, offsets = nested.values(), nested.offsets()
        if nested.lengths() is not None:
            raise ValueError("This nested tensor has holes (a narrowed view); call .contiguous() on it first.")
        return packed_ragged(values, offsets, max_seqlen=max_seqlen)

    def flash_kwargs(self) -> dict[str, Any]:
        """FlashAttention's plain tensors for self-attention over these sequences."""
        return {
            "cu_seqlens_q": self.cu_seqlens,
            "cu_seqlens_k": self.cu_seqlens,
            "max_seqlen_q": self.max_seqlen,
            "max_seqlen_k": self.max_seqlen,
        }

    def hf_kwargs(self) -> dict[str, Any]:
        """Hugging Face transformers' names for the same (``FlashAttentionKwargs``)."""
        return {
            "cu_seq_lens_q": self.cu_seqlens,
            "cu_seq_lens_k": self.cu_seqlens,
            "max_length_q": self.max_seqlen,
            "max_length_k": self.max_seqlen,
        }


def _flatten(tokens: PackedTokens) -> tuple[list[Tensor], tuple[int, Lengths]]:
    return [tokens.values, tokens.cu_seqlens, tokens.ids, tokens.size], (tokens.max_seqlen, tokens.lengths)


def _unflatten(children: Any, context: tuple[int, Lengths]) -> PackedTokens:
    values, cu_seqlens, ids, size = children
    return PackedTokens(values, cu_seqlens, ids, size, *context)


pytree.register_pytree_node(PackedTokens, _flatten, _unflatten, serialized_type_name="smaug.tokens.PackedTokens")


def uniform_cu_seqlens(count: int, length: int, device: torch.device | str) -> Tensor:
    """(count + 1,) int32: 0, length, 2 * length, ... from host numbers, nothing read or copied."""
    if length == 0:  # arange refuses a step of 0
        return torch.zeros(count + 1, dtype=torch.int32, device=device)
    return torch.arange(0, count * length + 1, length, dtype=torch.int32, device=device)


def ragged_cu_seqlens(counts: Tensor) -> Tensor:
    """(S + 1,) int32 from how many rows each sequence has, (S,) on the device; no host read."""
    ends = counts.cumsum(0)
    return torch.cat([ends.new_zeros(1), ends]).to(torch.int32)


def known_cu_seqlens(lengths: Sequence[int], device: torch.device) -> Tensor:
    """(S + 1,) int32 from host lengths: one small copy to the device, which nobody waits for; none if all are equal."""
    if len(set(lengths)) == 1:
        return uniform_cu_seqlens(len(lengths), lengths[0], device)
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return ends.to(device, non_blocking=True)


def packed_uniform(
    values: Tensor, length: int, *, ids: Tensor | None = None, size: Tensor | None = None
) -> PackedTokens:
    """PackedTokens of equal sequences: values (S * length, D). ids default to the position in the sequence, size to 1.

    With ``length`` 0 the number of sequences is unknown; it is taken as 0.
    """
    rows = values.shape[0]
    count = rows // length if length else 0
    if count * length != rows:
        raise ValueError(f"{rows} rows are no whole number of sequences of length {length}.")
    if ids is None:
        ids = torch.arange(length, dtype=torch.int32, device=values.device).repeat(count)
    if size is None:
        size = torch.ones(rows, dtype=torch.float32, device=values.device)
    return PackedTokens(values, uniform_cu_seqlens(count, length, values.device), ids, size, length, length)


def packed_ragged(
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    ids: Tensor | None = None,
    size: Tensor | None = None,
    max_seqlen: int | None = None,
    lengths: Sequence[int] | int | None = None,
) -> PackedTokens:
    """PackedTokens from values (T, D) and offsets (S + 1,). ids default to the position in the sequence (-1 in the
    tail), size to 1 (0 in the tail), max_seqlen to what ``lengths`` say or else to T."""
    rows = values.shape[0]
    cu_seqlens = cu_seqlens.to(torch.int32)
    if ids is None or size is None:
        row = torch.arange(rows, dtype=torch.int32, device=values.device)
        tail = row >= cu_seqlens[-1]
    if ids is None:
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True).clamp(
            max=max(cu_seqlens.shape[0] - 2, 0)
        )
        ids = (row - cu_seqlens[sequence]).masked_fill(tail, -1)
    if size is None:
        size = (~tail).float()
    if max_seqlen is None:
        host = host_lengths(lengths)
        max_seqlen = rows if host is None else host if isinstance(host, int) else max(host, default=0)
    return PackedTokens(values, cu_seqlens, ids, size, max_seqlen, lengths)


def cat_tokens(parts: Sequence[PackedTokens]) -> PackedTokens:
    """All sequences of all parts in one PackedTokens, in order: a group of videos and a group of images as one batch.

    Copies every row once; no host read. Capacities add up. A part with a tail (its length known only to the device)
    has the rows behind it moved up, so that tails come together at the end.
    """
    if not parts:
        raise ValueError("cat_tokens needs at least one PackedTokens.")
    if len(parts) == 1:
        return parts[0]
    device = parts[0].values.device
    every = [host_lengths(part.lengths) for part in parts]
    only = every[0]
    lengths: Lengths = None
    if isinstance(only, int) and all(host == only for host in every):
        lengths = only
    elif not torch.compiler.is_compiling() and None not in every:
        lengths = []
        for host, part in zip(every, parts, strict=True):
            lengths += [host] * part.num_sequences if isinstance(host, int) else host or ()
    full = [part.used == part.rows for part in parts]
    values = torch.cat([p.values for p in parts])
    ids = torch.cat([p.ids for p in parts])
    size = torch.cat([p.size for p in parts])
    if isinstance(lengths, int) and all(full):
        cu_seqlens = uniform_cu_seqlens(sum(part.num_sequences for part in parts), lengths, device)
    elif isinstance(lengths, list) and all(full):
        cu_seqlens = known_cu_seqlens(lengths, device)
    elif all(full[:-1]):
        offset, cu = 0, [parts[0].cu_seqlens]
        for before, part in itertools.pairwise(parts):
            offset += before.rows
            cu.append(part.cu_seqlens[1:] + offset)
        cu_seqlens = torch.cat(cu)
    else:
        used = torch.stack([p.cu_seqlens[-1] for p in parts]).long()
        end = used.cumsum(0)
        cu_seqlens = torch.cat(
            [parts[0].cu_seqlens] + [p.cu_seqlens[1:] + end[i].to(torch.int32) for i, p in enumerate(parts[1:])]
        )
        row = torch.arange(values.shape[0], device=device)
        source, capacity = row, 0
        for i, before in enumerate(parts[:-1]):
            capacity += before.rows
            source = torch.where(row >= end[i], row - end[i] + capacity, source)
        tail = row >= end[-1]
        source = source.clamp(max=max(values.shape[0] - 1, 0))
        values = values.index_select(0, source)
        values = values.masked_fill(tail.reshape(-1, *[1] * (values.ndim - 1)), 0)
        ids = ids.index_select(0, source).masked_fill(tail, -1)
        size = size.index_select(0, source).masked_fill(tail, 0)
    return PackedTokens(values, cu_seqlens, ids, size, max(p.max_seqlen for p in parts), lengths)


def split_tokens(tokens: PackedTokens, like: Sequence[PackedTokens]) -> list[PackedTokens]:
    """The inverse of `cat_tokens(like)` for other values: parts with the offsets, ids and lengths of ``like``, views.

    Where a part but the last has a tail, `cat_tokens` has moved rows: then the parts are copies, their tails zero.
    """
    if all(part.used == part.rows for part in like[:-1]):
        parts = tokens.values.split([part.rows for part in like])
        return [part.with_values(values) for part, values in zip(like, parts, strict=True)]
    end = torch.stack([part.cu_seqlens[-1] for part in like]).long().cumsum(0)
    found = []
    for i, part in enumerate(like):
        row = torch.arange(part.rows, device=end.device)
        source = row if i == 0 else row + end[i - 1]
        values = tokens.values.index_select(0, source.clamp(max=max(tokens.rows - 1, 0)))
        found.append(part.with_values(without_tail(values, part.cu_seqlens)))
    return found


def without_tail(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """values (T, ...) with zeros at and after row cu_seqlens[-1]; no host read."""
    tail = torch.arange(values.shape[0], device=values.device) >= cu_seqlens[-1]
    return values.masked_fill(tail.reshape(-1, *[1] * (values.ndim - 1)), 0)


def with_capacity(tokens: PackedTokens, rows: int, sequences: int | None = None) -> PackedTokens:
    """The same with a tail up to ``rows`` rows, and empty sequences up to ``sequences``; lengths None.

    ValueError if there are more already.
    """
    sequences = tokens.num_sequences if sequences is None else sequences
    more = rows - tokens.rows
    if more < 0 or sequences < tokens.num_sequences:
        raise ValueError(
            f"{tokens.rows} rows of {tokens.num_sequences} sequences do not fit a capacity of {rows} and {sequences}"
        )
    cu_seqlens = tokens.cu_seqlens
    if sequences > tokens.num_sequences:
        cu_seqlens = torch.cat([cu_seqlens, cu_seqlens[-1:].expand(sequences - tokens.num_sequences)])
    values = F.pad(tokens.values, (*(0, 0) * (tokens.values.ndim - 1), 0, more))
    return PackedTokens(values, cu_seqlens, F.pad(tokens.ids, (0, more), value=-1), F.pad(tokens.size, (0, more)), rows)


def take_rows(tokens: PackedTokens, rows: Tensor, lengths: Sequence[int] | int | Tensor) -> PackedTokens:
    """Some rows of each sequence: rows (n,) int64, ascending; lengths how many of each sequence.

    On the host, an int or S ints; or on the device, (S,): then n is a capacity, and the rows behind the last are a
    tail, whatever row each names.
    """
    values, ids, size = (x.index_select(0, rows) for x in (tokens.values, tokens.ids, tokens.size))
    if isinstance(lengths, Tensor):
        cu_seqlens = ragged_cu_seqlens(lengths)
        values, size = without_tail(values, cu_seqlens), without_tail(size, cu_seqlens)
        return packed_ragged(values, cu_seqlens, ids=ids.where(size > 0, -1), size=size)
    each = (lengths,) * tokens.num_sequences if isinstance(lengths, int) else lengths
    cu_seqlens = known_cu_seqlens(each, rows.device)
    return packed_ragged(values, cu_seqlens, ids=ids, size=size, lengths=lengths)


def regroup(tokens: PackedTokens, counts: Sequence[int]) -> PackedTokens:
    """Every counts[g] neighbouring sequences as one, a view of the values; host numbers that sum up to S."""
    each, first = tokens.lengths, [0, *itertools.accumulate(counts)]
    if each is None or first[-1] != tokens.num_sequences:
        raise ValueError(
            f"{first[-1]} sequences are to be grouped, and there are {tokens.num_sequences}; counts must sum up to "
            "these, and their lengths must be known to the host."
        )
    if isinstance(each, int):
        lengths = [each * count for count in counts]
    else:
        ends = [0, *itertools.accumulate(each)]
        lengths = [ends[b] - ends[a] for a, b in itertools.pairwise(first)]
    cu_seqlens = known_cu_seqlens(lengths, tokens.values.device)
    return PackedTokens(tokens.values, cu_seqlens, tokens.ids, tokens.size, max(lengths, default=0), tuple(lengths))
