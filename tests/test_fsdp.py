"""FSDP over gloo: on any number of processes the training loop gives the single process's numbers.

This file is also the program that torchrun starts: python test_fsdp.py FOLDER NAME=VALUE,... ... does a job for each."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import model as m  # noqa: E402
import pivot  # noqa: E402
from dpo import dpo_objective, frozen, reference_logps  # noqa: E402
from sft import sft_objective  # noqa: E402

BATCH, STEPS, STOP = 7, 6, 3            # stopped and resumed after three of six steps


def make_net(vocabulary):
    """Random, every bias and norm counts, queries are grouped, the head is untied, no width divides by 3."""
    encoder = m.EncoderConfig(hidden_size=32, intermediate_size=46, num_hidden_layers=3, num_attention_heads=2)
    llm = m.LLMConfig(vocab_size=vocabulary, hidden_size=40, intermediate_size=64, num_hidden_layers=2, num_attention_heads=5,
                      num_key_value_heads=1, tie_word_embeddings=False)
    net = m.MLLM(m.Encoder(encoder), m.Projector(32, 40), m.Decoder(llm))
    generator = torch.Generator().manual_seed(1)
    for p in net.parameters():
        p.data.normal_(1 if p.ndim == 1 else 0, .2, generator=generator)
    return net


def from_folders(base):
    """The model in these folders as a stage loads it on several processes; and, once they are read, how many rows of
    how many this process has read of each tensor of the encoder and the LLM."""
    shares, honest, patch = {}, m.open_tensors, pytest.MonkeyPatch()

    class Counted:
        """A slice of a file that knows how much of it was read."""
        def __init__(self, key, file):
            self.key, self.file, self.get_shape, self.get_dtype = key, file, file.get_shape, file.get_dtype

        def __getitem__(self, rows):
            read = self.file[rows]
            shares[self.key] = len(read), self.get_shape()[0]
            return read

    def counting(folder, *prefixes):
        return {name: t if folder.name == "projector" else Counted((folder, name), t)
                for name, t in honest(folder, *prefixes).items()}

    patch.setattr(m, "open_tensors", counting)
    with torch.device("meta"):
        net = m.load_model(*(base / part for part in pivot.ALL))
    patch.undo()
    assert all(p.is_meta for part in (net.encoder, net.llm) for p in part.parameters())
    return net, shares


def job(folder, tokens, name, objective="sft", optimizer="adamw", micro=BATCH, stop=0, resume="", trains="all",
        dtype="float32", base="", held="", **options):
    """Train by pivot.train as a stage does. Leaves FOLDER/NAME.pt: log, first step's gradients, trained weights, and
    for a resumed run what was read back. base: sharded before its weights are read from FOLDER/BASE. held: look at
    held-out samples every other step, also in those that save."""
    samples, tokenizer = [data.World("preferences", "probe", 14)[i] for i in range(14)], data.Tokenizer(tokens)
    for i in data.shuffled(0, BATCH, 14, 0)[1::2]:          # of two ranks the second sees no picture in the first step
        samples[i].image = None
    s = pivot.resolve(pivot.Settings("dpo", preset="toy", batch=BATCH, micro_batch=int(micro), optimizer=optimizer, lr=1e-3,
                                     encoder_lr=1e-3, dtype=dtype, steps=STEPS, eval_every=2 if held else 0,
                                     **{k: bool(v) for k, v in options.items()}))
    net, shares = from_folders(Path(folder) / base) if base else (make_net(len(tokenizer)), {})
    row = replace(pivot.WORLD["dpo"], trains=pivot.ALL if trains == "all" else (trains,))
    pivot.freeze(net, row)
    prepare = data.Prepare(tokenizer, "plain", net.encoder.config, 512, 2 if objective == "dpo" else 1, pack=True)
    steps = data.Steps(samples, prepare, STEPS, BATCH, s.micro_batch, 0, dist.get_rank(), dist.get_world_size())
    live = None
    if objective == "dpo":
        copy = m.read_weights(pivot.shard(frozen(net), s, False))
        live = lambda batch: reference_logps(copy, pivot.probe.autocast(torch.device("cpu"), dtype), batch)  # noqa: E731
    folder, kept, calls = Path(folder), {}, []
    home = folder / name
    home.mkdir(parents=True, exist_ok=True)
    if resume and dist.get_rank() == 0:
        shutil.copytree(folder / resume, home, dirs_exist_ok=True)
    dist.barrier()

    def loss_of(*arguments):
        calls.append(1)
        if stop and len(calls) == (STOP - 1) * len(steps[0]) + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return (sft_objective if objective == "sft" else dpo_objective)(*arguments)

    def clip(parameters, most, honest=torch.nn.utils.clip_grad_norm_):
        if "gradient" not in kept:
            kept["gradient"] = {n: pivot.full(p.grad).clone() for n, p in net.named_parameters() if p.requires_grad}
        return honest(parameters, most)

    def load(state, honest=pivot.dcp.load, **options):
        honest(state, **options)
        kept["read"] = {k: pivot.full(v).detach().clone() for k, v in state.items()}

    def save(state, honest=pivot.dcp.save, **options):
        honest(state, **options)
        kept["saved"] = {k: pivot.full(v).detach().clone() for k, v in state.items()}

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    patch = pytest.MonkeyPatch()
    patch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    patch.setattr(pivot.dcp, "load", load)
    patch.setattr(pivot.dcp, "save", save)
    patch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))        # no C++, which takes minutes
    try:
        names = list(net.state_dict())
        net = m.read_weights(pivot.shard(net, s))
        assert list(net.state_dict()) == names and bool(shares) == bool(base)
        assert all(rows <= math.ceil(whole / dist.get_world_size()) for rows, whole in shares.values()), shares
        pivot.train(s, loss_of, home, net, steps, held and steps, (live, live), torch.device("cpu"))
    except pivot.Stopped:
        assert stop
    finally:
        patch.undo()
        for number, handler in handlers.items():        # pytest's own
            signal.signal(number, handler)
    kept["weights"] = pivot.full_state(net)
    if dist.get_rank() == 0:
        kept["log"] = [json.loads(line) for line in (home / "log.jsonl").read_text().splitlines()]
        torch.save(kept, folder / f"{name}.pt")
    dist.barrier()


def launch(processes, folder, tokens, *jobs):
    """The jobs, one after the other, on so many processes."""
    if processes == 1:
        for options in jobs:
            job(folder, tokens, **options)
        return
    text = [",".join(f"{k}={v}" for k, v in options.items()) for options in jobs]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", __file__,
                           str(folder), str(tokens), *text], capture_output=True, text=True, timeout=600,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


# ------------------------------------------------------------------------------------------------------- the tests

KINDS = [("sft", "adamw"), ("dpo", "adamw"), ("sft", "muon")]


def close(a, b, relative):
    """Norms of differences, a tensor at a time. Softmax ignores what a key's bias adds to all scores alike (rotary
    positions in the LLM make it count), so the encoder's has a gradient of zero: rounding, which Adam blows up."""
    for name in set(a) - {k for k in a if "encoder.layers" in k and "k_proj.bias" in k}:
        assert (a[name].double() - b[name]).norm() <= relative * a[name].double().norm(), name


def compare(one, other, weights):
    close(one["gradient"], other["gradient"], 1e-5)
    for a, b in zip(one["log"], other["log"], strict=True):
        assert abs(a["loss"] - b["loss"]) <= 1e-5 * a["loss"] and abs(a["grad_norm"] - b["grad_norm"]) <= 1e-4 * a["grad_norm"]
    close(one["weights"], other["weights"], weights)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Every job's results by name. Saved on two processes, resumed on one, two and three."""
    folder = tmp_path_factory.mktemp("fsdp")
    data.train_tokenizer(tokens := folder / "tokenizer")

    def jobs(tag, micro, **options):
        return [dict(name=f"{o}-{opt}-{tag}", objective=o, optimizer=opt, micro=micro) | options for o, opt in KINDS]

    def resumed(tag):
        return [j | {"resume": j["name"].replace(tag, "cut")} for j in jobs(tag, 3)[1:]]

    base = make_net(len(data.Tokenizer(tokens)))
    m.save_model(folder / "base", base.state_dict(), base, data.Tokenizer(tokens))
    launch(1, folder, tokens, *jobs("one", BATCH), *jobs("parts", 2))
    launch(2, folder, tokens, *jobs("two", 3), *jobs("cut", 3, stop=1)[1:], *resumed("again2"),
           dict(name="bf16-two", objective="dpo", dtype="bfloat16", micro=3), dict(name="align-two", trains="projector"),
           dict(name="kept-two", objective="dpo", micro=3, checkpointing=1), *jobs("read2", 3, base="base")[1:2],
           *jobs("held", 3, held=1)[1:2])
    launch(3, folder, tokens, *jobs("three", 2), *resumed("again3"), *jobs("read3", 2, base="base")[1:2])
    launch(1, folder, tokens, *resumed("again1"), dict(name="bf16-one", objective="dpo", dtype="bfloat16", micro=3),
           dict(name="align-one", trains="projector"), dict(name="kept-one", objective="dpo", checkpointing=1))
    return {file.stem: torch.load(file) for file in folder.glob("*.pt")}


@pytest.mark.parametrize("split", ["parts", "two", "three"])
@pytest.mark.parametrize("objective, optimizer", KINDS)
def test_any_split_is_the_same_run(done, objective, optimizer, split):
    """Ragged samples; ranks that run short or see no picture. Muon orthogonalises in bf16, where rounding shows."""
    one, other = (done[f"{objective}-{optimizer}-{tag}"] for tag in ("one", split))
    start = make_net(len(one["weights"]["llm.lm_head.weight"])).state_dict()
    trained = [k for k in one["gradient"] if "encoder.layers" not in k or "k_proj.bias" not in k]
    assert all((one["weights"][k] - start[k]).norm() > 1e-4 * start[k].norm() for k in trained)     # it learns
    compare(one, other, 1e-5 if optimizer == "adamw" else 1e-3)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("objective, optimizer", KINDS[1:])
def test_saved_on_two_resumed_on_any(done, objective, optimizer, processes):
    kind = f"{objective}-{optimizer}"
    whole, cut, resumed = (done[f"{kind}-{tag}"] for tag in ("two", "cut", f"again{processes}"))
    assert len(cut["log"]) == STOP and set(resumed["read"]) == set(cut["saved"])
    moments = {k.split(".")[0] for k in resumed["read"]}
    assert moments == {"weight", "exp_avg", "exp_avg_sq", "step"} | ({"momentum_buffer"} if optimizer == "muon" else set())
    for name, value in cut["saved"].items():
        assert torch.equal(resumed["read"][name], value) and value.any(), name
        assert not name.startswith("step.") or value == STOP
    if processes == 2:
        assert all(torch.equal(v, resumed["weights"][k]) for k, v in whole["weights"].items())
    for a, b in zip(whole["log"], resumed["log"], strict=True):
        assert abs(a["loss"] - b["loss"]) <= 1e-5 * a["loss"]
    close(whole["weights"], resumed["weights"], 1e-5 if optimizer == "adamw" else 1e-3)


@pytest.mark.parametrize("processes, whole", [(2, "two"), (3, "three")])
def test_read_in_parts_is_the_same_run(done, processes, whole):
    """Sharded on the meta device, each process reading its rows only, which job checks: not a bit is another."""
    whole, parts = done[f"dpo-adamw-{whole}"], done[f"dpo-adamw-read{processes}"]
    assert all(torch.equal(v, parts[part][k]) for part in ("gradient", "weights") for k, v in whole[part].items())


def test_looking_at_held_out_samples_changes_nothing(done):
    whole, held = done["dpo-adamw-two"], done["dpo-adamw-held"]
    assert all(torch.equal(v, held[part][k]) for part in ("gradient", "saved", "weights") for k, v in whole[part].items())
    assert ["held_out" in line for line in held["log"]] == [False, True] * (STEPS // 2)


def test_frozen_parts_are_sharded_and_stay(done):
    one, two = done["align-one"], done["align-two"]
    compare(one, two, 1e-5)
    start = make_net(len(one["weights"]["llm.lm_head.weight"])).state_dict()
    assert {k for k, v in start.items() if not torch.equal(v, two["weights"][k])} == {k for k in start if "projector" in k}


def test_bf16_gathers_keep_fp32_masters(done):
    """Blocks gathered in bf16 beside autocast over whole fp32 weights: losses agree, weights learn below bf16's step, and
    the gradient is as near to fp32's as a single process's."""
    one, two = done["bf16-one"], done["bf16-two"]
    exact, errors = done["dpo-adamw-one"]["gradient"], []
    for a, b in zip(one["log"], two["log"], strict=True):
        assert abs(a["loss"] - b["loss"]) <= 2e-2 * a["loss"]
    for state in (one, two):
        assert all(v.dtype == torch.float32 for v in [*state["weights"].values(), *state["gradient"].values()])
        moved = state["weights"]["llm.model.layers.0.mlp.up_proj.weight"]
        assert (moved != moved.bfloat16().float()).float().mean() > .9
        errors.append(sum((state["gradient"][k].double() - g).square().sum() for k, g in exact.items()) ** .5)
    whole = sum(g.double().square().sum() for g in exact.values()) ** .5
    assert 0 < errors[0] < 5e-2 * whole and errors[1] < 1.5 * errors[0]

def test_checkpointing_changes_nothing(done):
    one, kept = done["dpo-adamw-one"], done["kept-one"]
    assert all(torch.equal(v, kept[part][k]) for part in ("gradient", "weights") for k, v in one[part].items())
    compare(one, done["kept-two"], 1e-5)


def test_blocks_compile_once_and_not_once_per_length(tmp_path, monkeypatch):
    """Loss and gradient are unchanged; batches of other rows, lengths and pictures make no new graph; it generates."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    tokenizer = data.train_tokenizer(tmp_path)
    plain, net = make_net(len(tokenizer)), make_net(len(tokenizer))
    pivot.shard(net, pivot.resolve(pivot.Settings("dpo", preset="toy", dtype="float32", compile=True, checkpointing=True)))
    assert list(net.state_dict()) == list(plain.state_dict())
    prepare = data.Prepare(tokenizer, "plain", net.encoder.config, 512, 2, pack=True)
    samples, shapes, made = [data.World("preferences", "probe", 40)[i] for i in range(40)], set(), []
    for some in (samples[:7], samples[7:16], samples[18:30], samples[31:]):
        batch = prepare(some)
        losses = [dpo_objective(model, replace(batch, ref=torch.zeros(len(some), 2)))[0] for model in (plain, net)]
        for model, loss in zip((plain, net), losses):
            model.zero_grad()
            loss.backward()
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
        close(*({n: p.grad for n, p in model.named_parameters() if p.grad is not None} for model in (plain, net)), 1e-5)
        shapes.add((*batch.tokens.shape, batch.images))
        made.append(len(graphs))
    assert len(shapes) == 4 and 0 < made[1] == made[3], made        # whether a size is dynamic shows at the second batch
    prompts = prepare(samples[:3], answers=False)
    assert net.generate(prompts, prepare.end, 4) == plain.generate(prompts, prepare.end, 4)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for text in sys.argv[3:]:
        job(*sys.argv[1:3], **dict(pair.split("=") for pair in text.split(",")))
    dist.destroy_process_group()
