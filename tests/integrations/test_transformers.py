"""Models of transformers with tiny random weights: smaug_flash equals sdpa, outputs and gradients."""

import builtins

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from smaug.integrations.transformers import INSTALL, attend, register
from smaug.testing import HostReads, offsets

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
STILL = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
MASK = torch.tensor([[1] * 7, [1] * 3 + [0] * 4, [0, 1, 1, 0, 1, 1, 1]])


@pytest.fixture
def library():
    return pytest.importorskip("transformers")


def pair(model, config):
    """The model twice, with the same weights: sdpa's and ours."""
    theirs, ours = (model._from_config(config(), attn_implementation=name) for name in ("sdpa", register()))
    ours.load_state_dict(theirs.state_dict())
    assert ours.config._attn_implementation == "smaug_flash"
    return theirs, ours


def same(theirs, ours, run, like=lambda x: x):
    """Outputs, and gradients of all weights."""
    want, got = (like(run(m)) for m in (theirs, ours))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    for x in (want, got):
        (x * weights).sum().backward()
    pairs = [(a.grad, b.grad) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True)]
    assert any(a is not None and a.abs().sum() > 0 for a, _ in pairs)
    for a, b in pairs:
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)


def bert(library, **more):
    return pair(library.BertModel, lambda: library.BertConfig(vocab_size=50, **SMALL, **STILL, **more))


def test_bert_padded_and_packed(library):
    theirs, ours = bert(library)
    words = torch.randint(50, MASK.shape)
    kept = MASK.bool()
    same(theirs, ours, lambda m: m(words, attention_mask=MASK).last_hidden_state[kept])
    same(theirs, ours, lambda m: m(words).last_hidden_state)
    cu = offsets(MASK.sum(1).tolist())
    where = torch.arange(7).expand(3, 7)[kept]
    padded = theirs(words, attention_mask=MASK).last_hidden_state[kept]
    for lengths in ({}, dict(max_length_q=7, max_length_k=7), dict(max_length_q=torch.tensor(7))):
        with HostReads() as reads:
            packed = ours(
                words[kept][None], position_ids=where[None], cu_seq_lens_q=cu, cu_seq_lens_k=cu, **lengths
            ).last_hidden_state[0]
        assert not reads.found
        torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-5)


def test_no_host_read_with_a_mask(library):
    _, ours = bert(library)
    with HostReads() as reads:
        ours(torch.randint(50, MASK.shape), attention_mask=MASK).last_hidden_state.sum().backward()
    assert not reads.found


def test_cross_attention(library):
    """As many queries as keys, so that the mask of the keys could be taken for one of the queries."""
    config = library.BertConfig(vocab_size=50, **SMALL, **STILL)
    modeling = library.models.bert.modeling_bert
    config._attn_implementation = register()
    cross = modeling.BertCrossAttention(config).train()
    masks = library.masking_utils
    x, memory = torch.randn(3, 7, 32), torch.randn(3, 7, 32)
    out = {}
    for name in ("sdpa", register()):
        config._attn_implementation = name
        mask = masks.create_bidirectional_mask(config, x, MASK, encoder_hidden_states=memory)
        out[name] = cross(x, memory, mask)[0]
    torch.testing.assert_close(out["smaug_flash"], out["sdpa"], rtol=1e-4, atol=1e-5)


def test_vit(library):
    theirs, ours = pair(library.ViTModel, lambda: library.ViTConfig(image_size=16, patch_size=8, **SMALL))
    images = torch.randn(2, 3, 16, 16)
    same(theirs, ours, lambda m: m(images).last_hidden_state)


def test_videomae(library):
    def config():
        return library.VideoMAEConfig(image_size=16, patch_size=8, num_frames=4, **SMALL)

    theirs, ours = pair(library.VideoMAEModel, config)
    video = torch.randn(2, 4, 3, 16, 16)
    hidden = torch.tensor([[1, 0, 0, 1, 0, 0, 1, 1], [0, 1, 1, 0, 0, 1, 0, 1]]).bool()
    same(theirs, ours, lambda m: m(video).last_hidden_state)
    same(theirs, ours, lambda m: m(video, bool_masked_pos=hidden).last_hidden_state)


def test_clip(library):
    def vision():
        return library.CLIPVisionConfig(image_size=16, patch_size=8, **SMALL)

    images = torch.randn(2, 3, 16, 16)
    theirs, ours = pair(library.CLIPVisionModel, vision)
    same(theirs, ours, lambda m: m(images).last_hidden_state)
    # the whole model, one part each
    text = dict(vocab_size=50, max_position_embeddings=8, bos_token_id=48, eos_token_id=49, **SMALL)
    config = library.CLIPConfig(text_config=text, vision_config=vision().to_dict(), projection_dim=16)
    theirs = library.CLIPModel._from_config(config, attn_implementation="sdpa")
    ours = library.CLIPModel(config)
    ours.load_state_dict(theirs.state_dict())
    ours.set_attn_implementation({"vision_config": register(), "text_config": "sdpa"})
    words = torch.randint(49, (2, 6))
    same(theirs, ours, lambda m: m(input_ids=words, pixel_values=images).logits_per_image)
    ours.set_attn_implementation(register())
    with pytest.raises(ValueError, match="padding masks only"):
        ours(input_ids=words, pixel_values=images)


@pytest.mark.parametrize("generation", ["qwen2_vl", "qwen2_5_vl"])
def test_qwen_vision_tower(library, generation):
    """Two images of different size in one packed call; 2.5 packs windows too."""
    if generation == "qwen2_vl":
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel as Tower
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLVisionConfig as Config

        options = dict(depth=2, embed_dim=32, hidden_size=24, mlp_ratio=2)
    else:
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel as Tower
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionConfig as Config

        options = dict(depth=2, hidden_size=32, intermediate_size=48, out_hidden_size=24)
        options |= dict(window_size=16, fullatt_block_indexes=[1])
    theirs, ours = pair(Tower, lambda: Config(num_heads=2, patch_size=4, **options))
    grids = torch.tensor([[1, 4, 6], [2, 2, 4]])
    pixels = torch.randn(int(grids.prod(1).sum()), 3 * 2 * 4 * 4)
    calls = []
    for block in ours.blocks:
        block.attn.register_forward_hook(lambda *_: calls.append(1))
    same(theirs, ours, lambda m: m(pixels, grid_thw=grids), like=lambda out: getattr(out, "pooler_output", out))
    assert len(calls) == 2


@pytest.mark.parametrize("heads_kv", [4, 2, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_grouped_heads_and_any_width(masked, heads_kv):
    query, key, value = torch.randn(3, 4, 5, 12), torch.randn(3, heads_kv, 7, 12), torch.randn(3, heads_kv, 7, 12)
    mask = MASK.bool() if masked else None
    wide = mask[:, None, None] if masked else None
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value, wide, scale=0.3, enable_gqa=True)
    got, weights = attend(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    assert weights is None and got.shape == (3, 5, 4, 12)
    torch.testing.assert_close(got, want.transpose(1, 2))


def test_packed_cross_attention():
    cu_q, cu_k = offsets([2, 3]), offsets([4, 2])
    query, key, value = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 6, 16), torch.randn(1, 2, 6, 16)
    got, _ = attend(torch.nn.Module(), query, key, value, None, cu_seq_lens_q=cu_q, cu_seq_lens_k=cu_k)
    for rows, keys in ((slice(0, 2), slice(0, 4)), (slice(2, 5), slice(4, 6))):
        want = torch.nn.functional.scaled_dot_product_attention(query[:, :, rows], key[:, :, keys], value[:, :, keys])
        torch.testing.assert_close(got[:, rows], want.transpose(1, 2))


def test_compiles_without_recompiling():
    """Packed, and padded with the mask that a model makes: no graph break, and no new graph as lengths change."""

    def packed(x, cu):
        return attend(torch.nn.Module(), x, x, x, None, cu_seq_lens_q=cu, cu_seq_lens_k=cu)[0]

    def padded(x, mask):
        return attend(torch.nn.Module(), x, x, x, mask)[0]

    for call in (packed, padded):
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
        graphs = []
        for lengths in ([3, 4], [5, 2, 6], [9, 1, 2, 2]):
            longest = max(lengths)  # 5 heads: no other size of the first call, or dynamo takes the two for one
            mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
            x = torch.randn(*((1, 5, sum(lengths)) if call is packed else (len(lengths), 5, longest)), 16)
            inputs = x, offsets(lengths) if call is packed else mask
            torch.testing.assert_close(compiled(*inputs), call(*inputs))
            graphs.append(counter.frame_count)
        assert graphs == graphs[:1] * 3


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (dict(is_causal=True), "bidirectional; give causal parts"),
        (dict(dropout=0.1), "set attention_dropout"),
        (dict(sliding_window=4), "no sliding window; pack the windows"),
        (dict(attention_mask=torch.ones(1, 1, 4, 4)), r"takes a mask \(batch, keys\)"),
        (dict(attention_mask=torch.ones(1, 4), cu_seq_lens_q=offsets([4])), "not both"),
        (dict(softcap=30.0), "does not know softcap"),
        (dict(output_attentions=True), "never forms its weights"),
    ],
)
def test_refusals(call, match):
    x = torch.zeros(1, 2, 4, 16)
    with pytest.raises(ValueError, match=match):
        attend(torch.nn.Module(), x, x, x, **{"attention_mask": None, **call})


def test_models_are_refused_in_time(library):
    """Dropout in training, causal modules, and masks that are more than padding."""
    _, ours = pair(library.BertModel, lambda: library.BertConfig(vocab_size=50, **SMALL))
    words = torch.randint(50, (2, 5))
    with pytest.raises(ValueError, match="no dropout"):
        ours.train()(words)
    ours.eval()(words)
    _, decoder = bert(library, is_decoder=True)
    for mask in (None, torch.ones(2, 5)):
        with pytest.raises(ValueError, match="bidirectional"):
            decoder(words, attention_mask=mask)
    masks = library.masking_utils
    with pytest.raises(ValueError, match="padding masks only"):
        masks.create_bidirectional_mask(
            ours.config, torch.zeros(2, 5, 32), None, and_mask_function=lambda b, h, q, k: q >= k
        )


def test_names(library):
    with pytest.raises(ValueError, match='must contain "flash"'):
        register("smaug")
    for name in ("flash_attention_2", "owner/flash"):
        with pytest.raises(ValueError, match="no name that"):
            register(name)
    assert register() == register() == "smaug_flash"
    assert register("my_flash") == "my_flash"
    for name in ("my_flash", "smaug_flash"):  # either may come first
        library.ViTModel._from_config(library.ViTConfig(image_size=16, **SMALL), attn_implementation=name)
    with pytest.raises((ValueError, ImportError)):  # others' names are looked up as before
        library.ViTModel._from_config(library.ViTConfig(image_size=16, **SMALL), attn_implementation="other_flash")


def test_without_transformers(monkeypatch):
    find = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "transformers":
            raise ImportError(name)
        return find(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError) as error:
        register()
    assert str(error.value).endswith(INSTALL) and "\n" not in str(error.value)
