"""`smaug.ops.attention` as an attention implementation of Hugging Face transformers."""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import smaug.kernels
from smaug.ops import attention
from smaug.ops.layer import pad_heads
from smaug.tokens import ragged_cu_seqlens, uniform_cu_seqlens

INSTALL = "pip install -c constraints.txt -e '.[peers]'"


def _our_folder_is_not_theirs() -> None:
    """transformers imports a package `kernels`, if there is one, to see its version. Where the root of smaug's checkout
    is on sys.path that is our folder, which must not be imported so, and every model of transformers would fail."""
    if "kernels" in sys.modules or (spec := importlib.util.find_spec("kernels")) is None or spec.origin is None:
        return
    if Path(spec.origin).resolve() == Path(smaug.kernels.__file__).resolve():
        sys.modules["kernels"] = None  # type: ignore[assignment]


_our_folder_is_not_theirs()  # on import, since a model may be imported before register() is called


def register(name: str = "smaug_flash") -> str:
    """Make ``attn_implementation=name`` known to transformers -> name. Calling it again does nothing more.

        model = AutoModel.from_pretrained(..., attn_implementation=register())
        model = AutoModel.from_pretrained(..., attn_implementation={"vision_config": register(), "text_config": "sdpa"})

    For bidirectional attention, self or cross, grouped heads included: batches with a 2-D mask, and packed calls
    (`PackedTokens.hf_kwargs`; the vision towers of Qwen-VL's kind make them). Causal masks, sliding windows, masks
    that are not 2-D, dropout in training, changed logits (softcap, position bias, sinks) and attention weights are
    refused with a ValueError.

    ``name`` must contain "flash": by that transformers' vision towers decide to call once with cu_seqlens, instead of
    once a sequence. ValueError for other names and for those of transformers itself; ImportError where transformers
    is missing.
    """
    if "flash" not in name or re.search(r"[/|:@]|^flash_attention_\d$", name):
        raise ValueError(
            f'name={name!r} must contain "flash", or vision towers call once a sequence, and be no name that '
            'transformers knows or looks for on the Hub; use "smaug_flash".'
        )
    _our_folder_is_not_theirs()  # again: the root may have come to sys.path meanwhile
    try:
        from transformers import AttentionInterface, AttentionMaskInterface, modeling_utils
    except ImportError as error:
        raise ImportError(f"smaug.integrations.transformers needs transformers 5: {INSTALL}") from error
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, key_mask)  # under the same name, or a model's mask is dropped in silence
    _do_not_search_the_hub(modeling_utils, name)
    return name


def _do_not_search_the_hub(modeling_utils: Any, name: str) -> None:
    """transformers (5.23) loads a flash-attention package or a Hub kernel for every name with "flash" in it, whether
    or not it is registered, and raises where there is none. There is no switch for that, so its loader is wrapped."""
    loader = getattr(modeling_utils, "lazy_import_flash_attention", None)
    if loader is None:
        return
    names = getattr(loader, "smaug_names", None)
    if names is None:
        names = set()

        @functools.wraps(loader)
        def load(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
            return None if implementation in names else loader(implementation, *args, **kwargs)

        load.smaug_names = names  # type: ignore[attr-defined]
        modeling_utils.lazy_import_flash_attention = load
    names.add(name)


def key_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask function: the 2-D mask (B, S) bool, True is a token, as it is, or None. No host read."""
    from transformers.masking_utils import bidirectional_mask_function

    if mask_function is not bidirectional_mask_function:
        raise ValueError(
            "smaug's attention is bidirectional and takes padding masks only; give parts with other masks "
            'attn_implementation="sdpa", as in {"vision_config": "smaug_flash", "text_config": "sdpa"}.'
        )
    if attention_mask is None:
        return None
    mask = attention_mask[:, -kv_length:].bool()
    mask = mask.view(mask.shape)  # an object of its own, which lives as long as the forward
    mask.smaug_keys = _keys(mask)  # type: ignore[attr-defined]
    return mask


def _keys(mask: Tensor) -> tuple[Tensor, Tensor]:
    """mask (B, S) bool -> rows (B * S,) int64, kept ones first and in order; cu_seqlens (B + 1,) of the kept."""
    rows = mask.reshape(-1).logical_not().to(torch.uint8).argsort(stable=True)
    return rows, ragged_cu_seqlens(mask.sum(1))


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    max_length_k: int | Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query (B, H, T, E), key and value (B, H_kv, S, E) -> (B, T, H, E), None.

    attention_mask None or (B, S) bool, True is a token: masked keys are not attended to. All queries are computed,
    since a mask of keys does not say whether it is one of queries too; a query without a key gives 0.
    cu_seq_lens_q, cu_seq_lens_k (sequences + 1,): the rows of the batch, end to end, are packed; keys as queries where
    cu_seq_lens_k is missing. max_length_*, number, tensor or missing, are not read. No host read.
    """
    _refuse(module, attention_mask, dropout, is_causal, sliding_window, cu_seq_lens_q, kwargs)
    b, h, length, e = query.shape
    keys = key.shape[2]
    q, k, v = (pad_heads(x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])) for x in (query, key, value))
    lengths_q: int | None = None
    lengths_k: int | None = None
    if cu_seq_lens_q is not None:
        cu_q = cu_seq_lens_q.to(torch.int32)
        cu_k = cu_q if cu_seq_lens_k is None else cu_seq_lens_k.to(torch.int32)
    else:
        cu_q, lengths_q = uniform_cu_seqlens(b, length, q.device), length
        if attention_mask is None:
            cu_k, lengths_k = uniform_cu_seqlens(b, keys, q.device), keys
        else:
            # made once a forward by `key_mask`, not once a layer
            rows, cu_k = getattr(attention_mask, "smaug_keys", None) or _keys(attention_mask.bool())
            k, v = k.index_select(0, rows), v.index_select(0, rows)  # masked keys become the tail
    scale = e**-0.5 if scaling is None else scaling
    o = attention(q, k, v, cu_q, cu_k, scale=scale, lengths_q=lengths_q, lengths_k=lengths_k)
    return o[..., :e].reshape(b, length, h, e), None


def _refuse(
    module: torch.nn.Module,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool | None,
    sliding_window: int | None,
    cu_seqlens: Tensor | None,
    kwargs: dict[str, Any],
) -> None:
    if getattr(module, "is_causal", False) if is_causal is None else is_causal:
        raise ValueError(
            'smaug\'s attention is bidirectional; give causal parts attn_implementation="sdpa", as in '
            '{"vision_config": "smaug_flash", "text_config": "sdpa"}.'
        )
    if dropout:
        raise ValueError(
            f"smaug's attention has no dropout and the model asks for {dropout}; set attention_dropout or "
            "attention_probs_dropout_prob to 0 in its config, or call eval()."
        )
    if sliding_window is not None:
        raise ValueError(
            "smaug's attention has no sliding window; pack the windows as sequences with cu_seq_lens_q, or use "
            'attn_implementation="sdpa".'
        )
    if mask is not None and cu_seqlens is not None:
        raise ValueError("Packed calls hold no padding; pass attention_mask or cu_seq_lens_q, not both.")
    if mask is not None and mask.ndim != 2:
        raise ValueError(
            f"smaug's attention takes a mask (batch, keys), but this is {tuple(mask.shape)}; pass the model the 2-D "
            'mask or use attn_implementation="sdpa".'
        )
    if kwargs.get("output_attentions"):
        raise ValueError('smaug\'s attention never forms its weights; for them use attn_implementation="eager".')
    changes = [x for x in ("softcap", "position_bias", "s_aux", "cache") if kwargs.get(x) is not None]
    if changes:
        raise ValueError(f'smaug\'s attention does not know {changes[0]}; use attn_implementation="sdpa" or "eager".')
