"""The silent failures that VLM trainers are known for: each test fails when its guard is removed. More of them: row layout,
chunks and masks in test_data and test_model; live against cached reference and the stop after NaNs in test_pivot."""
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from tiny import COLORS, main, options, write_rows, write_tiny

import data
import dpo
import model as m
import pivot
import sft
from data import BadInput

BRISK = ["--lr", 1e-3, "--encoder-lr", 1e-3]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer):
    return write_tiny(tmp_path_factory.mktemp("tiny"), tokenizer)


def log(folder, name, stage="dpo"):
    return [json.loads(line) for line in (folder / "runs" / name / stage / "log.jsonl").read_text().splitlines()]


def weights(folder, name, stage="dpo"):
    return {f"{part}.{k}": v for part in pivot.ALL for k, v in
            load_file(folder / "runs" / name / stage / part / "model.safetensors").items()}


# ------------------------------------------------------------------------------------------------ 1 no gradient

@pytest.mark.parametrize("how", ["no_grad", "a layer is passed by", "frozen by mistake", "detached"])
def test_a_layer_without_gradient_is_an_error(tiny, monkeypatch, capsys, how):
    """Of the encoder's first layer; what trains is settled before anything else could freeze it."""
    run, build = m.EncoderLayer.forward, pivot.shard

    def forward(self, x):
        if how == "no_grad":
            with torch.no_grad():
                return run(self, x)
        return x if how == "a layer is passed by" and self is first else run(self, x)

    def shard(model, *more):
        nonlocal first
        first = model.encoder.encoder.layers[0]
        if how == "frozen by mistake" and len(more) == 1:           # not the reference
            first.requires_grad_(False)
        if how == "detached":                                       # every gradient is there, and zero
            first.register_forward_hook(lambda layer, inputs, out: out.detach() + 0 * out)
        return build(model, *more)

    first = None
    monkeypatch.setattr(pivot, "shard", shard)
    if how != "detached":
        monkeypatch.setattr(m.EncoderLayer, "forward", forward)
    assert main(*options(tiny, "--steps", 2, *BRISK, "--name", how, stage="sft")) == 1
    error = capsys.readouterr().err
    assert "encoder." in error and ("no gradient" in error or "did not move" in error)
    assert not (tiny / f"runs/{how}/sft/encoder").exists()


# ------------------------------------------------------------------- 2 a rank with a text-only micro-batch

@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_rank_without_a_picture_keeps_step(tiny, stage):
    """Two processes; in some micro-batches one has pictures and the other has none. As one process does it."""
    rows = [json.loads(line) for line in (tiny / "pairs.jsonl").read_text().splitlines()]
    steps, batch = 4, 4
    seen = {i for k in range(steps) for i in data.shuffled(k, batch, len(rows), 0)[k % 2::2]}   # of one rank, then the other
    write_rows(tiny / "mixed.jsonl", [{k: v for k, v in r.items() if i in seen or k != "image"} for i, r in enumerate(rows)])
    base = options(tiny, "--steps", steps, "--batch", batch, *BRISK, stage=stage, data="mixed.jsonl")
    assert main(*base, "--name", "one") == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOT / "pivot.py")]
    done = subprocess.run([*launch, *base, "--name", "two"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    for a, b in zip(log(tiny, "one", stage), log(tiny, "two", stage), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5 and abs(a["grad_norm"] - b["grad_norm"]) < 1e-4 * a["grad_norm"]
    one, two = weights(tiny, "one", stage), weights(tiny, "two", stage)
    old = {f"{part}.{k}": v for part in pivot.ALL for k, v in load_file(tiny / "base" / part / "model.safetensors").items()}
    for part in pivot.ALL:
        moved, apart = (sum((x[k] - y[k]).square().sum() for k in one if k.startswith(part)) ** .5
                        for x, y in ((one, old), (one, two)))
        assert apart < .02 * moved, part


# --------------------------------------------------------------------------------------------- 3 truncation

@pytest.mark.parametrize("apart", [False, True])
def test_truncation_never_cuts_image_tokens(tokenizer, apart):
    """Wherever the picture stands: all of its tokens are there, or an error names the sample."""
    picture, whole, refused = data.World("captions", "probe", 1)[0].image, 0, 0
    turns = [("what is it", "a red circle"), ("and <image> here", "a blue square")]
    for limit in range(1, 60):
        sample = data.Sample("s7", picture, turns, separate=apart, file="x.jsonl")
        try:
            tokens = data.encode(sample, tokenizer, "plain", 9, limit).tokens
            assert tokens.count(data.IMAGE) == 9
            whole += 1
        except BadInput as error:
            assert str(error).startswith("x.jsonl: sample s7: its p") and "--max-length" in str(error)
            refused += 1
    assert whole > 10 and refused > 8


# ------------------------------------------------------------------------------------------- 4 the reference

def test_a_reference_that_is_not_the_policy_stops_the_run(tiny, monkeypatch, capsys):
    """Blind, or of other weights though its key is right: an error before the first step."""
    honest = dpo.reference_logps
    base = options(tiny, "--steps", 2)
    for reference in ("live", "cached"):
        blind = [lambda model, precision, batch: honest(model, precision, replace(batch, pixels=0 * batch.pixels))]
        with monkeypatch.context() as patch:
            patch.setattr(pivot, "reference_logps", blind[0])
            assert main(*base, "--name", f"blind {reference}", "--reference", reference) == 1
        assert "the reference is not the model that trains" in capsys.readouterr().err
    assert main(*base, "--name", "stale") == 0
    file = tiny / "runs/stale/dpo/reference.safetensors"
    key = json.loads(file.read_bytes()[8:8 + int.from_bytes(file.read_bytes()[:8], "little")])["__metadata__"]
    save_file({"logps": load_file(file)["logps"] - .1}, file, key)
    settings = tiny / "runs/stale/dpo/settings.json"
    m.write_json(settings, {k: v for k, v in json.loads(settings.read_text()).items() if k != "finished"})
    for _, save in pivot.saves(settings.parent):
        save.rename(save.with_name("away"))
    assert main(*base, "--name", "stale") == 1 and "differ by 0.1 nats" in capsys.readouterr().err


def test_the_references_key_knows_data_weights_and_template(tiny, monkeypatch):
    """Under one name: a reference is computed again as soon as anything that it depends on is another."""
    keys, look = [], dpo.read_cache
    monkeypatch.setattr(dpo, "read_cache", lambda file, key: keys.append(key) or look(file, key))
    state = load_file(tiny / "base/llm/model.safetensors")
    other = tiny / "other"
    m.save_folder(other / "llm", {k: v + .001 for k, v in state.items()}, {}, (tiny / "base/llm").glob("[ct]*"), torch.float32)
    rows = (tiny / "pairs.jsonl").read_text()
    (tiny / "more.jsonl").write_text(rows + rows.splitlines()[0] + "\n")
    for k, more in enumerate(([], [], ["--llm", other / "llm"], ["--data", tiny / "more.jsonl"], ["--template", "chatml"],
                              ["--select-layer", -3], ["--max-length", 99], ["--dtype", "bfloat16"])):
        assert main(*options(tiny, "--steps", 1, *more, "--runs", tiny / f"runs {k}")) == 0
    assert keys[0] == keys[1] and len(set(keys)) == len(keys) - 1


def test_the_reference_does_not_move(tiny, monkeypatch):
    copies, build = [], pivot.frozen
    monkeypatch.setattr(pivot, "frozen", lambda model: copies.append(build(model)) or copies[-1])
    assert main(*options(tiny, "--steps", 4, *BRISK, "--name", "live", "--reference", "live")) == 0
    trained, copy = weights(tiny, "live"), copies[0].state_dict()
    start = load_file(tiny / "base/llm/model.safetensors")
    assert not any(p.requires_grad for p in copies[0].parameters())
    assert all(torch.equal(v, copy[f"llm.{k}"]) and not torch.equal(v, trained[f"llm.{k}"]) for k, v in start.items())


# ------------------------------------------------------------------------------------------------- 5 rounding

def test_bf16_does_not_swallow_small_steps(tiny):
    """--dtype bfloat16 at the paper's 1e-6: nearly every weight moves, by about the learning rate a step; with weights in
    bf16, whose neighbours are 2^-9 apart relatively, hardly one would."""
    assert main(*options(tiny, "--steps", 6, "--dtype", "bfloat16", "--lr", 1e-6, "--encoder-lr", 1e-6, "--name", "bf16")) == 0
    after = weights(tiny, "bf16")
    for part, name in (("encoder", "vision_model.encoder.layers.0.mlp.fc1.weight"), ("llm", "model.layers.1.mlp.up_proj.weight"),
                       ("projector", "2.weight")):
        change = (after[f"{part}.{name}"] - load_file(tiny / "base" / part / "model.safetensors")[name]).abs()
        assert (change > 0).float().mean() > .9 and 5e-7 < change.mean() < 1e-5, (part, change.mean())


# ------------------------------------------------------------------------------------------------ 6 loss masks

def test_an_empty_loss_mask_is_zero_and_no_nan(tiny, net, prepare, pairs, monkeypatch):
    """A sample without a target adds nothing; a whole batch of them is a step of zeros."""
    encode = data.encode

    def blank(sample, *more):
        row = encode(sample, *more)
        return row._replace(target=[False] * len(row.target)) if "void" in sample.id else row

    monkeypatch.setattr(data, "encode", blank)
    counted = [sft.sft_objective(net, prepare(pairs[:4]))]
    pairs[5].id = pairs[6].id = "void"
    counted.append(sft.sft_objective(net, prepare([*pairs[:4], *pairs[5:]])))
    assert counted[0][1] == counted[1][1] > 0 and torch.isclose(counted[0][0], counted[1][0], rtol=1e-5)
    rows = [{**json.loads(line), "id": "void"} for line in (tiny / "pairs.jsonl").read_text().splitlines()[:4]]
    write_rows(tiny / "void.jsonl", rows + [{**r, "id": "full"} for r in rows])
    monkeypatch.setattr(data, "shuffled", lambda step, *_: [0, 1, 2, 3] if step == 1 else [4, 5, 6, 7])
    assert main(*options(tiny, "--steps", 3, "--batch", 4, *BRISK, "--name", "void", stage="sft", data="void.jsonl")) == 0
    lines = log(tiny, "void", "sft")
    assert [line["loss"] == 0 for line in lines] == [False, True, False] and lines[1]["grad_norm"] == 0
    assert [line["no_target"] for line in lines] == [0, 4, 0] and not any(line["skipped"] for line in lines)
    assert all(v.isfinite().all() for v in weights(tiny, "void", "sft").values())


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_the_mask_is_the_answers_and_their_ends(tokenizer, template):
    """Whatever the turns: the targets spell the answers, each with its end; the prompt is never among them."""
    turns = [("what is it", "a red circle"), ("and here", "blue"), ("so", "")]
    row = data.encode(data.Sample("x", None, turns), tokenizer, template, 4, 500)
    targets = [t for t, on in zip(row.tokens, row.target) if on]
    assert [t for t in targets if t == tokenizer.end] == [tokenizer.end] * 3 and targets[-1] == tokenizer.end
    assert tokenizer.decode(targets).replace(" ", "") == "aredcircleblue"


# --------------------------------------------------------------------------------------------------- 7 pairs

def test_suspect_pairs_are_counted(tiny, capsys):
    rows = [json.loads(line) for line in (tiny / "pairs.jsonl").read_text().splitlines()]
    odd = [{**rows[0], "rejected": rows[0]["chosen"], "id": "a"}, {**rows[1], "chosen": " "}, {**rows[2], "rejected": ""},
           {**rows[3], "id": "again"}, rows[4]]
    write_rows(tiny / "odd.jsonl", rows + odd)
    assert main(*options(tiny, "--steps", 2, "--name", "odd", data="odd.jsonl")) == 0
    out = capsys.readouterr().out
    for warning in ("1 of 29 samples of {} have the same chosen and rejected response", "2 of 29 samples of {} have an empty response",
                    "2 of 29 samples of {} are there before"):
        warning = "warning: " + warning.format(tiny / "odd.jsonl")
        assert warning in out and warning in (tiny / "runs/odd/dpo/report.md").read_text()
    assert main(*options(tiny, "--steps", 2, "--name", "even")) == 0 and "warning" not in capsys.readouterr().out


def test_swapped_columns_are_a_warning(tiny, capsys):
    """A model that has learned which answers are right, and a file whose columns are the other way round."""
    rng, rows = random.Random(1), []
    for i in range(120):
        right, wrong = rng.choice(COLORS[:3]), rng.choice(COLORS[3:])       # what is right does not need the picture
        rows.append({"image": f"{i % 24}.png", "question": "which", "chosen": right, "rejected": wrong})
    write_rows(tiny / "right.jsonl", rows)
    write_rows(tiny / "swapped.jsonl", [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows])
    assert main(*options(tiny, "--steps", 30, *BRISK[:1], 1e-2, "--name", "able", stage="sft", data="right.jsonl")) == 0
    said = []
    for name in ("right", "swapped"):
        capsys.readouterr()
        at = [x for part in pivot.ALL for x in (f"--{part}", tiny / "runs/able/sft" / part)]
        assert main(*options(tiny, "--steps", 1, *at, "--name", name, data=f"{name}.jsonl")) == 0
        said.append(capsys.readouterr().err)
    assert "warning" not in said[0] and "swapped" in said[1] and "prefers the chosen response of only" in said[1]


# ------------------------------------------------------------------------------------ 8 not finite (and test_pivot)

def test_a_gradient_that_is_not_finite_skips_the_step(tiny, monkeypatch):
    """The loss is fine, its gradient is not: nothing moves in that step."""
    honest, calls = sft.sft_objective, []

    def poisoned(model, batch):
        loss, *rest = honest(model, batch)
        calls.append(1)
        return loss + ((model.projector[0].weight.sum() * 0).sqrt() if len(calls) == 2 else 0), *rest

    monkeypatch.setattr(pivot, "sft_objective", poisoned)
    assert main(*options(tiny, "--steps", 4, *BRISK, "--name", "nan", stage="sft")) == 0
    lines = log(tiny, "nan", "sft")
    assert [line["skipped"] for line in lines] == [0, 1, 0, 0] and lines[1]["loss"] > 0
    assert all(v.isfinite().all() for v in weights(tiny, "nan", "sft").values())


# -------------------------------------------------------------------------------------------------- long runs

def children(pid):
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def resident(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2 ** 20


def start(tiny, *more):
    command = [sys.executable, str(ROOT / "pivot.py"), *options(tiny, *more, stage="sft")]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=open(tiny / "stderr", "w"))


def steps_of(folder, process, wanted):
    """Wait until so many steps are logged."""
    file = folder / "log.jsonl"
    while not (file.exists() and file.read_text().count("\n") >= wanted):
        assert process.poll() is None
        time.sleep(.01)


def test_memory_and_files_stay_flat(tiny, capsys):
    """Main process and two workers at step 500 and at step 2,000."""
    process, seen = start(tiny, "--name", "long", "--steps", 2050, "--workers", 2, "--save-every", 5000), []
    for step in (500, 1000, 1500, 2000):
        steps_of(tiny / "runs/long/sft", process, step)
        pids = [process.pid, *children(process.pid)]
        files = [min(len(os.listdir(f"/proc/{pid}/fd")) for _ in range(20) if not time.sleep(.005)) for pid in pids]
        seen.append(([resident(pid) for pid in pids], files))
    process.kill()
    process.wait()
    with capsys.disabled():
        print("\nresident MiB (main, workers) and open files at steps 500 to 2000:", *(
            f"{[round(x, 1) for x in memory]} {files}" for memory, files in seen))
    assert len(seen[0][0]) == 3
    assert all(b < 1.02 * a for a, b in zip(seen[0][0], seen[-1][0]))
    assert all(b <= a + 1 for a, b in zip(seen[0][1], seen[-1][1]))


def test_a_worker_that_dies_stops_the_run_with_its_error(tiny):
    process = start(tiny, "--name", "orphan", "--steps", 5000, "--workers", 2, "--save-every", 5)
    steps_of(tiny / "runs/orphan/sft", process, 12)
    os.kill(children(process.pid)[0], 9)
    process.wait(timeout=60)
    error = (tiny / "stderr").read_text()
    assert process.returncode == 1 and "worker" in error and "Killed" in error
    assert pivot.saves(tiny / "runs/orphan/sft")[-1][0] >= 10
