"""The model against transformers' modules with the same weights, and against slower ways to the same number."""
import math
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM, Qwen2ForCausalLM, SiglipVisionModel

import data
import model as m
from data import IMAGE


def close(a, b, relative=1e-5):
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    assert (a - b).abs().max() <= relative * b.abs().max(), ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture
def theirs(net, tokenizer, tmp_path):
    """What transformers makes of the folders that we write."""
    m.save_model(tmp_path, net.state_dict(), net, tokenizer)
    opened = []
    for kind, folder in ((SiglipVisionModel, "encoder"), (Qwen2ForCausalLM, "llm")):
        model, info = kind.from_pretrained(tmp_path / folder, output_loading_info=True, attn_implementation="eager")
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        opened.append(model.float().eval())
    return opened


@torch.no_grad()
def separate(net, theirs, row, pixels):
    """Log-probability of each segment by a plain causal forward of prompt + segment alone, in transformers."""
    encoder, llm = theirs
    out = []
    for response in sorted(set(row.segment) - {0}):
        keep = [i for i, s in enumerate(row.segment) if s in (0, response)]
        tokens = torch.tensor([row.tokens[i] for i in keep])
        x = llm.model.embed_tokens(tokens.clamp(min=0))
        if pixels is not None:
            x[tokens == IMAGE] = net.projector(encoder(pixels[None], output_hidden_states=True).hidden_states[-2])[0]
        logps = llm(inputs_embeds=x[None]).logits[0].log_softmax(-1)
        out.append(sum(logps[i - 1, tokens[i]] for i in range(1, len(keep)) if row.target[keep[i]]))
    return torch.stack(out)


@torch.no_grad()
def test_shared_prefix_equals_two_separate_causal_forwards(net, theirs, prepare, pairs):
    batch = prepare(pairs)
    assert batch.images == 6 and batch.tokens.shape[0] == 7 and (batch.sample < 0).any()
    expected = torch.stack([separate(net, theirs, prepare.row(s), prepare.picture(s)) for s in pairs])
    close(net(batch), expected)
    prepare.pack = True                                     # the same, several samples to a row
    batch = prepare(pairs)
    assert batch.tokens.shape[0] < 7 and len(batch) == 7
    close(net(batch), expected)


@torch.no_grad()
@pytest.mark.parametrize("apart", [False, True])
def test_several_turns(net, theirs, prepare, apart):
    """A conversation, whose turns see the earlier ones; and separate questions about one picture, which do not."""
    samples = [replace(data.World("instruct", "probe", 4)[i], separate=apart) for i in range(4)]
    samples[1].image = None
    rows = [prepare.row(s) for s in samples]
    for row, sample in zip(rows, samples):
        answers = sum(on and not before for on, before in zip(row.target, [False, *row.target]))
        assert answers == len(sample.turns) and max(row.segment) == (len(sample.turns) if apart else 1)
    expected = [separate(net, theirs, r, prepare.picture(s)).sum(0, keepdim=True) for r, s in zip(rows, samples)]
    close(net(prepare(samples)), torch.stack(expected))


@torch.no_grad()
def test_a_batch_does_not_change_its_rows(net, prepare, pairs):
    alone = torch.cat([net(prepare([s])) for s in pairs])
    close(net(prepare(pairs)), alone)


@torch.no_grad()
@pytest.mark.parametrize("select_layer, state", [(-2, -2), (-3, -3), (-1, -1)])
def test_select_layer_counts_as_in_llava(net, theirs, select_layer, state):
    net.encoder.select_layer = select_layer
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    close(net.encoder(pixels), theirs[0](pixels, output_hidden_states=True).hidden_states[state])
    net.encoder.select_layer = 0
    close(net.encoder(pixels), theirs[0](pixels).last_hidden_state)


def test_fresh_llama_opens_in_transformers(tokenizer, tmp_path):
    config = m.LLMConfig(vocab_size=len(tokenizer), attention_bias=False, rope_theta=5e5)
    llm = m.initialise(m.Decoder(config), 0)
    m.save_model(tmp_path, {f"llm.{k}": v for k, v in llm.state_dict().items()}, m.MLLM(None, None, llm), tokenizer)
    theirs, tokens = LlamaForCausalLM.from_pretrained(tmp_path / "llm"), torch.arange(20)[None]
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    with torch.no_grad():
        close(llm(llm.model.embed_tokens(tokens), mask, tokens) @ llm.head().T, theirs(tokens).logits)


def gradients(net):
    return {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}


def test_chunks_equal_the_whole(net, prepare, pairs, monkeypatch):
    results = []
    for chunk in (7, 10 ** 6):
        monkeypatch.setattr(m, "LOGIT_CHUNK", chunk)
        net.zero_grad()
        logps = net(prepare(pairs))
        (logps * torch.linspace(-1, 1, logps.numel()).view_as(logps)).sum().backward()
        results.append((logps.detach(), gradients(net)))
    close(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        if not name.endswith("k_proj.bias"):            # zero by symmetry, and noise in practice
            assert (grad - results[1][1][name]).norm() <= 1e-5 * grad.norm(), name


def test_full_logits_never_exist(net, prepare, pairs, monkeypatch):
    """Backward keeps nothing of the vocabulary's width; the same model without recomputation does."""
    def widths(batch):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape[-1:]) or t, lambda t: t):
            net(batch)
        return kept

    vocabulary, batch = torch.Size([net.llm.config.vocab_size]), prepare(pairs * 4)
    assert len(batch.target) > m.LOGIT_CHUNK and vocabulary not in widths(batch)
    monkeypatch.setattr(m, "checkpoint", lambda f, *a, **_: f(*a))
    assert vocabulary in widths(batch)


def test_text_only_batch_keeps_the_encoder_in_the_graph(net, prepare, pairs):
    for sample in pairs:
        sample.image = None
        sample.turns = [(q.replace("<image>", ""), a) for q, a in sample.turns]
    net(prepare(pairs)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in net.encoder.embeddings.parameters())


def test_image_tokens_and_features_must_agree(net, prepare, pairs):
    batch = prepare(pairs)
    batch.tokens[0, batch.tokens[0].tolist().index(IMAGE)] = 5
    with pytest.raises(ValueError, match="image positions"):
        net(batch)


@torch.no_grad()
def test_generation_with_cache_equals_without(net, prepare, pairs, tokenizer):
    """Each next token from a forward over the whole text so far, by the model's own decoder with a causal mask."""
    batch = prepare(pairs, answers=False)
    got = net.generate(batch, end=-5, max_new=9)
    for i in range(len(pairs)):
        n = int((batch.sample[i] >= 0).sum())
        one = prepare([pairs[i]], answers=False)
        x = net.embed(one)[:, :n]
        for token in got[i]:
            t = x.shape[1]
            hidden = net.llm(x, torch.ones(1, 1, t, t, dtype=torch.bool).tril(), torch.arange(t)[None])
            assert token == int((hidden[0, -1] @ net.llm.head().T).argmax())
            x = torch.cat((x, net.llm.model.embed_tokens(torch.tensor([[token]]))), 1)
    end = got[0][3]
    assert net.generate(batch, end=end, max_new=9)[0] == got[0][:got[0].index(end)]


@torch.no_grad()
def test_sampling_follows_the_distribution(net, prepare, pairs):
    n, options = 2000, {"end": -5, "max_new": 1, "temperature": 3.}
    batch = prepare([pairs[0]] * n, answers=False)
    drawn = [row[0] for row in net.generate(batch, **options, generator=torch.Generator().manual_seed(0))]
    mask = torch.ones(batch.tokens.shape[1:] * 2, dtype=torch.bool).tril()
    hidden = net.llm(net.embed(prepare([pairs[0]], answers=False)), mask[None, None], batch.position[:1])[0, -1]
    p = (hidden @ net.llm.head().T / 3).softmax(-1).topk(3)
    for value, token in zip(p.values.tolist(), p.indices.tolist()):
        assert abs(drawn.count(token) - n * value) < 4 * (n * value * (1 - value)) ** .5
    assert drawn == [row[0] for row in net.generate(batch, **options, generator=torch.Generator().manual_seed(0))]


def test_save_then_load_is_bit_identical(net, tokenizer, tmp_path):
    m.save_model(tmp_path, net.state_dict(), net, tokenizer)
    back = m.load_model(tmp_path / "encoder", tmp_path / "projector", tmp_path / "llm")
    assert back.encoder.config == net.encoder.config and back.llm.config == net.llm.config
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in net.state_dict().items())
    assert data.Tokenizer(tmp_path / "llm").encode("a red circle") == tokenizer.encode("a red circle")


def test_visible_rule_by_brute_force():
    sample = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, -1])
    segment = torch.tensor([0, 0, 1, 1, 2, 2, 0, 1, 2, 0])
    column = torch.arange(10)
    got = m.visible(sample[:, None], segment[:, None], column[:, None], sample, segment, column)
    for q in range(10):
        for k in range(10):
            allowed = k <= q and sample[q] == sample[k] and (segment[k] == 0 or segment[k] == segment[q])
            assert bool(got[q, k]) == bool(allowed)


def test_siglip_loss_is_its_definition(tokenizer):
    import pivot
    encoder = m.EncoderConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    net = m.initialise(m.SigLIP(m.Encoder(encoder, 0), m.Decoder(m.LLMConfig(vocab_size=len(tokenizer)))), 0)
    prepare = data.Prepare(tokenizer, "plain", encoder, 512, 1)
    batch = prepare([data.World("captions", "probe", 5)[i] for i in range(5)])
    loss, count, _ = pivot.contrastive_objective(net, batch)
    logits = net(batch).detach().double()
    expected = sum(math.log1p(math.exp(-(1 if i == j else -1) * logits[i, j])) for i in range(5) for j in range(5))
    assert count == 5 and abs(loss.item() - expected) < 1e-4 * expected
