"""SparseAttention: nn.MultiheadAttention's weights and call, computed over the tokens that are there."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smaug.ops.attention import attention
from smaug.tokens import Lengths, PackedTokens, ragged_cu_seqlens, uniform_cu_seqlens


def pad_heads(x: Tensor) -> Tensor:
    """x (T, H, E) -> (T, H, E'), zeros behind: E' is the next width that `attention` offers, x itself where E is one.

    With the scale of E given, logits do not change, and the first E columns of the output are the output.
    """
    width = max(16, -(-x.shape[-1] // 8) * 8)
    return x if width == x.shape[-1] else F.pad(x, (0, width - x.shape[-1]))


class SparseAttention(nn.Module):
    """Drop-in for `nn.MultiheadAttention` without padded rows: same constructor, same state dict, same numbers.

        o = concat_h softmax(q_h k_h^T / sqrt(E)) v_h;   out = o W_o^T + b_o;   q, k, v = x W^T + b

    Parameters in_proj_weight (3D, D), in_proj_bias (3D,), out_proj.weight (D, D), out_proj.bias (D,), initialised as
    there; with kdim or vdim q_proj_weight, k_proj_weight, v_proj_weight instead of in_proj_weight. D = embed_dim.
    Heads of any width up to 256 (zeros are added up to a multiple of 8). ``impl`` as in `smaug.ops.attention`.

    Not offered, refused with a ValueError: add_bias_kv, add_zero_attn; causal masks, attn_mask, need_weights=True;
    dropout > 0 while training.
    """

    in_proj_weight: nn.Parameter | None
    q_proj_weight: nn.Parameter | None
    k_proj_weight: nn.Parameter | None
    v_proj_weight: nn.Parameter | None
    in_proj_bias: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is no multiple of {num_heads} heads.")
        if add_bias_kv or add_zero_attn:
            raise ValueError(
                "SparseAttention has no add_bias_kv and no add_zero_attn; append the extra token to keys and values."
            )
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.dropout = dropout
        self.batch_first = batch_first
        self.impl = impl
        # nn.TransformerEncoderLayer reads this name, and where it is true runs torch's fused layer in place of us
        self._qkv_same_embed_dim = False
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        one = self.kdim == self.vdim == embed_dim
        for name, shape in {
            "in_proj_weight": (3 * embed_dim, embed_dim) if one else None,
            "q_proj_weight": None if one else (embed_dim, embed_dim),
            "k_proj_weight": None if one else (embed_dim, self.kdim),
            "v_proj_weight": None if one else (embed_dim, self.vdim),
            "in_proj_bias": (3 * embed_dim,) if bias else None,
        }.items():
            self.register_parameter(name, None if shape is None else nn.Parameter(torch.empty(shape, **options)))
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **options)
        for parameter in self.parameters(recurse=False):
            nn.init.xavier_uniform_(parameter) if parameter.ndim == 2 else nn.init.zeros_(parameter)
        if bias:
            nn.init.zeros_(self.out_proj.bias)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, batch_first={self.batch_first}, impl={self.impl!r}"

    def forward(
        self,
        query: Tensor | PackedTokens,
        key: Tensor | PackedTokens | None = None,
        value: Tensor | PackedTokens | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        key_scores: Literal["cls", "mean"] | None = None,
    ) -> Any:
        """Padded tensors -> (output, None or scores); PackedTokens -> PackedTokens, with key_scores (it, scores).

        key left out is the query, value left out the key. need_weights is False by default, not True as in
        nn.MultiheadAttention, so a call that does not say it gets (output, None).

        Padded: query (B, L, D), key (B, S, kdim), value (B, S, vdim) with batch_first, else (L, B, D) and so on; or
        unbatched (L, D). Output as query. key_padding_mask (B, S): bool, True = ignore; or float, added to the
        logits, -inf = ignore (what nn.TransformerEncoder makes of a bool mask). Ignored keys are neither projected
        nor attended to. Where ``query is key``, their rows are no queries either, and the output there is 0
        (nn.MultiheadAttention computes them, and NaN where all keys are ignored). With a mask the number of kept
        rows is read on the host, once a call: pack once before the first layer to have no read.

        Packed: query (T_q, D), sequence s attends to sequence s of key (T_k, kdim), whose offsets value shares. No
        host read. The result keeps the query's ids, sizes and lengths; its tail is 0.

        key_scores "cls" or "mean" as in `smaug.ops.attention`: fp32, detached, (T_k,) packed, (B, S) padded with 0 at
        ignored keys.
        """
        self._refuse(need_weights, attn_mask, is_causal)
        key = query if key is None else key
        value = key if value is None else value
        if isinstance(query, PackedTokens) and isinstance(key, PackedTokens) and isinstance(value, PackedTokens):
            if key_padding_mask is not None:
                raise ValueError("PackedTokens hold no padding; leave key_padding_mask out.")
            return self._packed(query, key, value, key_scores)
        if isinstance(query, PackedTokens) or isinstance(key, PackedTokens) or isinstance(value, PackedTokens):
            raise ValueError(
                "query, key and value must all be tensors or all PackedTokens; pack with PackedTokens.from_padded."
            )
        return self._padded(query, key, value, key_padding_mask, key_scores)

    def _refuse(self, need_weights: bool, attn_mask: Tensor | None, is_causal: bool) -> None:
        if need_weights:
            raise ValueError(
                "SparseAttention never forms its weights; pass need_weights=False, and for the attention that each key "
                'received key_scores="cls" or "mean".'
            )
        if is_causal:
            raise ValueError("SparseAttention is bidirectional; for causal masks use nn.MultiheadAttention.")
        if attn_mask is not None:
            raise ValueError(
                "SparseAttention takes no attn_mask; pass key_padding_mask, or PackedTokens whose sequences are what "
                "may attend to each other."
            )
        if self.dropout and self.training:
            raise ValueError(
                f"SparseAttention has no dropout of weights and was made with dropout={self.dropout}; make it with "
                "dropout=0 and put nn.Dropout behind it, or call eval()."
            )

    def _packed(self, query: PackedTokens, key: PackedTokens, value: PackedTokens, key_scores: Any) -> Any:
        if query.num_sequences != key.num_sequences or key.rows != value.rows:
            raise ValueError(
                f"query, key and value must pair up, but have {query.num_sequences}, {key.num_sequences} and "
                f"{value.num_sequences} sequences and {query.rows}, {key.rows} and {value.rows} rows."
            )
        out, scores = self._attend(
            *(query.values, key.values, value.values, query.cu_seqlens, key.cu_seqlens),
            *(query.lengths, key.lengths, None, key_scores),
        )
        if query.used != query.rows:
            tail = torch.arange(query.rows, device=out.device) >= query.cu_seqlens[-1]
            out = out.masked_fill(tail[:, None], 0)  # out_proj has put its bias there
        result = query.with_values(out)
        return result if key_scores is None else (result, scores)

    def _padded(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, key_scores: Any) -> Any:
        for name, x, width in ("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim):
            if x.ndim not in (2, 3) or x.ndim != query.ndim or x.shape[-1] != width:
                raise ValueError(f"{name} must be batched or unbatched rows of {width}, but is {tuple(x.shape)}.")
        batched, self_attention = query.ndim == 3, query is key
        batch = 0 if self.batch_first or not batched else 1
        b, along = (query.shape[batch], 1 - batch) if batched else (1, 0)
        length, keys = query.shape[along], key.shape[along]
        if key.shape[:-1] != value.shape[:-1] or (batched and key.shape[batch] != b):
            raise ValueError(
                f"query, key and value are {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}, but must "
                f"share the batch, dimension {batch}, and keys and values the length."
            )
        cu_k, rows, bias = uniform_cu_seqlens(b, keys, key.device), None, None
        lengths_k: Lengths = keys
        if mask is not None:
            mask = mask if batched else mask[None]
            rows, cu_k, bias = _kept(mask, b, keys)
            lengths_k = None

        def flat(x: Tensor, rows: Tensor | None) -> Tensor:
            x = (x.transpose(0, 1) if batch else x).reshape(-1, x.shape[-1])
            return x if rows is None else x.index_select(0, rows)

        k = flat(key, rows)
        v = k if value is key else flat(value, rows)
        q = k if self_attention else flat(query, None)
        cu_q, lengths_q = (cu_k, lengths_k) if self_attention else (uniform_cu_seqlens(b, length, q.device), length)
        out, scores = self._attend(q, k, v, cu_q, cu_k, lengths_q, lengths_k, bias, key_scores)
        if rows is not None and self_attention:
            out = out.new_zeros(b * length, self.embed_dim).index_copy(0, rows, out)
        if rows is not None and scores is not None:
            scores = scores.new_zeros(b * keys).index_copy(0, rows, scores)
        if batched:
            out = out.view(b, length, self.embed_dim)
            out = out.transpose(0, 1) if batch else out
            scores = None if scores is None else scores.view(b, keys)
        return out, scores

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        lengths_q: Lengths,
        lengths_k: Lengths,
        key_bias: Tensor | None,
        key_scores: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Rows in, rows out: (T_q, D), (T_k, kdim), (T_k, vdim) -> (T_q, D) and scores (T_k,) or None."""
        q, k, v = (pad_heads(x) for x in self._project(query, key, value))
        got = attention(
            *(q, k, v, cu_q, cu_k),
            lengths_q=lengths_q,
            lengths_k=lengths_k,
            key_bias=key_bias,
            key_scores=key_scores,
            scale=self.head_dim**-0.5,
            impl=self.impl,
        )
        o, scores = got if key_scores else (got, None)
        return self.out_proj(o[..., : self.head_dim].flatten(1)), scores

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """(T, H, E) each, in as few products as the inputs allow."""
        d, weight, bias = self.embed_dim, self.in_proj_weight, self.in_proj_bias
        heads = (self.num_heads, self.head_dim)
        if weight is not None and query is key and key is value:
            return F.linear(query, weight, bias).view(-1, 3, *heads).unbind(1)
        if weight is not None and key is value:
            own, rest = weight.split([d, 2 * d])
            own_bias, rest_bias = (None, None) if bias is None else bias.split([d, 2 * d])
            return (
                F.linear(query, own, own_bias).view(-1, *heads),
                *F.linear(key, rest, rest_bias).view(-1, 2, *heads).unbind(1),
            )
        each = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if weight is None else weight.chunk(3)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        rows = []
        for x, w, c in zip((query, key, value), each, biases, strict=True):
            assert w is not None
            rows.append(F.linear(x, w, c).view(-1, *heads))
        return tuple(rows)


def _kept(mask: Tensor, b: int, keys: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """key_padding_mask (B, S) -> kept rows (T,) int64, cu_seqlens (B + 1,), what a float mask adds (T,) or None."""
    if mask.shape != (b, keys) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(
            f"key_padding_mask must be ({b}, {keys}), bool (True = ignore) or float, but is {tuple(mask.shape)} of "
            f"{mask.dtype}."
        )
    keep = ~mask if mask.dtype == torch.bool else mask != -torch.inf
    rows = keep.reshape(-1).nonzero().squeeze(1)  # the one host read: how many rows there are to compute
    bias = None if mask.dtype == torch.bool else mask.reshape(-1).index_select(0, rows).float()
    return rows, ragged_cu_seqlens(keep.sum(1)), bias
