"""The kernels that CUDA uses in bf16, FlexAttention by block masks and plain causal attention, beside the dense masks of the
CPU: their forward pass, not compiled to a kernel. A CPU cannot train with FlexAttention, and no GPU has run these tests."""
from dataclasses import replace

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention

import model as m


def by_kernels(net, batch, monkeypatch):
    """Log-probabilities as CUDA gets them."""
    with monkeypatch.context() as patch:
        patch.setattr(m, "mask_of", lambda sample, segment, _, honest=m.mask_of: honest(sample, segment, True))
        return net(batch)


@torch.no_grad()
@pytest.mark.parametrize("pack", [False, True])
def test_block_masks_are_the_dense_masks(net, prepare, pairs, pack, monkeypatch):
    """Same mask, same log-probabilities."""
    monkeypatch.setattr(m, "flex", lambda: flex_attention)
    prepare.pack = pack
    for some in (pairs, pairs[1:4]):
        batch = prepare(some)
        dense, blocks = (m.mask_of(batch.sample, batch.segment, kernels) for kernels in (False, True))
        rows, length = batch.tokens.shape
        assert isinstance(blocks, BlockMask)
        assert torch.equal(create_mask(blocks.mask_mod, rows, None, length, length, "cpu"), dense)
        torch.testing.assert_close(by_kernels(net, batch, monkeypatch), net(batch), rtol=1e-5, atol=0)


@torch.no_grad()
def test_it_is_compiled_once(net, prepare, pairs, monkeypatch):
    """Batches of other rows and lengths make no new graph."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    kernel, made = torch.compile(flex_attention, dynamic=True, backend=backend), []
    monkeypatch.setattr(m, "flex", lambda: kernel)
    for some in (pairs[:4], pairs, pairs[1:6], pairs[:3]):
        batch = prepare(some)
        torch.testing.assert_close(by_kernels(net, batch, monkeypatch), net(batch), rtol=1e-5, atol=0)
        made.append(len(graphs))
    assert 0 < made[1] == made[3], made


@pytest.mark.parametrize("tokens", [torch.float32, torch.bfloat16])
def test_where_plain_causal_attention_is_enough(net, prepare, pairs, tokens, monkeypatch):
    """One sample a row and one response: no mask at all, the same loss and gradients."""
    prepare.responses, results = 1, []
    batch = prepare(pairs)
    assert (batch.sample < 0).any() and m.mask_of(batch.sample, batch.segment, True) is None
    for forward in (net, lambda batch: by_kernels(net, batch, monkeypatch)):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=tokens == torch.bfloat16):
            logps = forward(batch)
        logps.sum().backward()
        results.append((logps.detach(), net.llm.model.layers[0].self_attn.q_proj.weight.grad.clone()))
    close = 1e-5 if tokens == torch.float32 else 3e-2
    for one, other in zip(*results):
        assert (one - other).norm() <= close * one.norm()
    apart = prepare([replace(pairs[4], separate=True, rejected=None), *pairs[:2]])
    prepare.pack = True
    for other in (apart, prepare(pairs)):                       # separate questions; several samples a row
        assert isinstance(m.mask_of(other.sample, other.segment, True), BlockMask)
