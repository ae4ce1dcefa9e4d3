"""FlexAttention, which CUDA uses, beside the dense masks of the CPU: its forward pass, not compiled to a kernel."""
import pytest
import torch
from torch.nn.attention.flex_attention import create_mask, flex_attention

import model as m


@torch.no_grad()
@pytest.mark.parametrize("pack", [False, True])
def test_block_masks_are_the_dense_masks(net, prepare, pairs, pack, monkeypatch):
    """Same mask, same log-probabilities; batches of other shapes make no new graph."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(m, "FLEX", torch.compile(flex_attention, dynamic=True, backend=backend))
    torch._dynamo.reset()
    prepare.pack, made = pack, []
    for some in (pairs[:4], pairs, pairs[1:6], pairs[:3]):
        batch = prepare(some)
        dense, blocks = (m.mask_of(batch, blocks) for blocks in (False, True))
        rows, length = batch.tokens.shape
        assert torch.equal(create_mask(blocks.mask_mod, rows, None, length, length, "cpu"), dense)
        expected = net(batch)
        with monkeypatch.context() as patch:
            patch.setattr(m, "mask_of", lambda batch, _: blocks)
            torch.testing.assert_close(net(batch), expected, rtol=1e-5, atol=0)
        made.append(len(graphs))
    assert 0 < made[1] == made[3], made
