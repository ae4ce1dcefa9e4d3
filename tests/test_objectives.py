"""The two losses against formulas in float64, finite differences and torch's own cross entropy."""
import math

import pytest
import torch
import torch.nn.functional as F

import data
import model as m
import pivot
from data import CHOSEN, REJECTED
from dpo import dpo_loss, dpo_objective
from sft import sft_loss, sft_objective


@pytest.fixture
def numbers():
    generator = torch.Generator().manual_seed(3)
    return (-40 * torch.rand(16, 2, dtype=torch.float64, generator=generator) for _ in range(2))


def formula(pi, ref, beta):
    margin = (pi[CHOSEN] - ref[CHOSEN]) - (pi[REJECTED] - ref[REJECTED])
    return math.log1p(math.exp(-beta * margin))


@pytest.mark.parametrize("beta", [.03, .1, 1.])
def test_dpo_loss_and_gradient(numbers, beta):
    logps, ref = numbers
    expected = torch.tensor([formula(p, r, beta) for p, r in zip(logps.tolist(), ref.tolist())], dtype=torch.float64)
    assert torch.allclose(dpo_loss(logps, ref, beta), expected, rtol=1e-12)
    assert torch.allclose(dpo_loss(logps.float(), ref.float(), beta).double(), expected, rtol=1e-5, atol=1e-6)
    logps.requires_grad_()
    gradient, = torch.autograd.grad(dpo_loss(logps, ref, beta).sum(), logps)
    for i in range(16):
        for response in (CHOSEN, REJECTED):
            up, down = logps[i].tolist(), logps[i].tolist()
            up[response], down[response] = up[response] + 1e-5, down[response] - 1e-5
            finite = (formula(up, ref[i].tolist(), beta) - formula(down, ref[i].tolist(), beta)) / 2e-5
            assert abs(finite - gradient[i, response].item()) < 1e-7


def test_dpo_is_log_2_at_the_start(numbers):
    logps, _ = numbers
    assert torch.equal(dpo_loss(logps, logps, .1), torch.full((16,), math.log(2), dtype=torch.float64))


def test_ipo(numbers):
    logps, ref = numbers
    margin = (logps - ref)[:, CHOSEN] - (logps - ref)[:, REJECTED]
    assert torch.allclose(dpo_loss(logps, ref, .1, "ipo"), (margin - 5) ** 2)


@torch.no_grad()
def test_sft_loss_is_cross_entropy(net, prepare, pairs):
    batch = prepare(pairs)
    loss, count, _ = sft_objective(net, batch)
    expected, tokens = 0., 0
    for sample in pairs:
        one = prepare([sample])
        row = prepare.row(sample)
        length = row.segment.index(2)                   # prompt and chosen only, plain causal attention
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        hidden = net.llm(net.embed(one)[:, :length], mask, torch.arange(length)[None])
        labels = torch.tensor([t if on else -100 for t, on in zip(row.tokens, row.target)])[1:length]
        expected += F.cross_entropy((hidden @ net.llm.head().T)[0, :-1], labels, ignore_index=-100, reduction="sum")
        tokens += int((labels != -100).sum())
    assert count == tokens and abs(loss - expected) < 1e-5 * expected
    assert torch.equal(sft_loss(torch.tensor([[-3., -1.], [-2., -9.]])), torch.tensor([3., 2.]))


def test_dpo_metrics(net, prepare, pairs):
    batch = prepare(pairs)
    with torch.no_grad():
        logps = net(batch)
    batch.ref = logps + torch.randn(logps.shape, generator=torch.Generator().manual_seed(0))
    loss, count, metrics = dpo_objective(net, batch, .5)
    reward = .5 * (logps - batch.ref)
    assert count == len(pairs) and torch.isclose(loss.detach(), dpo_loss(logps, batch.ref, .5).sum())
    assert torch.isclose(metrics["margin"], (reward[:, 0] - reward[:, 1]).sum(), atol=1e-5)
    assert metrics["accuracy"] == (reward[:, 0] > reward[:, 1]).sum()
    assert torch.isclose(metrics["chosen"] - metrics["rejected"], metrics["margin"], atol=1e-4)


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_any_split_into_micro_batches_gives_the_same_gradient(net, prepare, objective):
    """1 x 8 = 4 x 2 = 2 x 4 = 3 + 3 + 2, as the loop divides: loss and gradient summed, then over the step's count."""
    world, results = data.World("preferences", "probe", 8), []
    with torch.no_grad():
        ref = net(prepare([world[i] for i in range(8)])) + torch.linspace(-3, 3, 16).view(8, 2)
    for micro in (8, 2, 4, 3):
        net.zero_grad()
        steps, losses, counts = data.Steps(world, prepare, 1, 8, micro, seed=0), [], []
        for batch in steps[0]:
            batch.ref = ref[batch.index]
            loss, count, _ = (dpo_objective if objective == "dpo" else sft_objective)(net, batch)
            loss.backward()
            losses.append(loss.item())
            counts.append(count)
        assert len(counts) == math.ceil(8 / micro)
        results.append((sum(losses) / sum(counts), {k: p.grad / sum(counts) for k, p in net.named_parameters()
                                                     if p.grad is not None and not k.endswith("k_proj.bias")}))
    for loss, grads in results[1:]:
        assert abs(loss - results[0][0]) < 1e-5 * abs(results[0][0])
        for name, grad in grads.items():
            assert (grad - results[0][1][name]).norm() <= 2e-5 * grad.norm(), name


@pytest.mark.parametrize("stage", list(pivot.WORLD))
def test_every_trained_tensor_gets_a_gradient(stage, tokenizer):
    """Above a millionth of the median norm; attention key biases aside, whose gradient is zero by symmetry."""
    row, encoder, llm = pivot.WORLD[stage], m.EncoderConfig(), m.LLMConfig(vocab_size=len(tokenizer))
    if stage == "encoder":
        net = m.SigLIP(m.Encoder(encoder, 0), m.Decoder(llm))
    elif stage == "llm":
        net = m.MLLM(None, None, m.Decoder(llm))
    else:
        net = m.MLLM(m.Encoder(encoder), m.Projector(128, 128), m.Decoder(llm))
    pivot.freeze(m.initialise(net, 0), row)
    prepare = data.Prepare(tokenizer, "plain", encoder, 512, 2 if row.objective == "dpo" else 1)
    batch = prepare([data.World(row.content, "probe", 8)[i] for i in range(8)])
    batch.ref = torch.zeros(8, 2)
    objective = {"contrastive": pivot.contrastive_objective, "sft": sft_objective, "dpo": dpo_objective}
    objective[row.objective](net, batch)[0].backward()
    trained = {k: p for k, p in net.named_parameters() if p.requires_grad}
    norms = {k: float("nan") if p.grad is None else p.grad.norm().item() for k, p in trained.items()}
    median = sorted(norms.values())[len(norms) // 2]
    silent = [k for k, v in norms.items() if not v > 1e-6 * median and not k.endswith("k_proj.bias")]
    assert not silent and {k.split(".")[0] for k in trained} >= set(row.trains)
    frozen = {k for k, p in net.named_parameters() if not p.requires_grad}
    expected = [f"{part}." for part in pivot.ALL if part not in row.trains]
    expected += ["encoder.encoder.layers.3", "encoder.post_layernorm"]
    assert all(k.startswith(tuple(expected)) for k in frozen) and bool(frozen) == bool(row.needs)
