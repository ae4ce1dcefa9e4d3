"""The program as a user runs it: stages, reuse, resume, several processes, chat, errors."""
import hashlib
import json
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, run
from PIL import Image
from safetensors.torch import load_file

import model as m
import pivot

TOY = ["--preset", "toy", "--dtype", "float32", "--eval-scenes", "2"]


def weights(folder):
    return {f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest()
            for f in sorted(folder.rglob("model.safetensors"))}


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """All stages at toy length, under torchrun as the README says."""
    runs = tmp_path_factory.mktemp("runs")
    done = run("--stage", "dpo", *TOY, "--runs", runs, processes=1)
    return runs, done


def test_dpo_runs_its_prerequisites_and_reports(toy):
    runs, done = toy
    for stage in ("encoder", "llm", "align", "lookup", "instruct", "dpo"):
        assert (runs / "toy" / stage / "settings.json").exists() and f"toy/{stage}: done" in done.stdout
        assert (runs / "toy" / stage / "curve.png").stat().st_size > 500 and len(log(runs / "toy" / stage)) == 4
    assert set(weights(runs / "toy/dpo")) == {f"{p}/model.safetensors" for p in pivot.ALL}
    for word in ("relative change", "reward margin", "exist", "knowledge", "grey", "before"):
        assert word in done.stdout
    assert abs(log(runs / "toy/dpo")[0]["loss"] - .6931472) < 1e-6          # log 2: policy = reference
    assert log(runs / "toy/dpo")[0]["margin"] == 0


def test_the_second_time_there_is_nothing_to_do(toy):
    runs, _ = toy
    before, start = weights(runs), time.time()
    done = run("--stage", "dpo", *TOY, "--runs", runs)
    assert "nothing to do" in done.stdout and "reward margin" in done.stdout
    assert weights(runs) == before and time.time() - start < 60


def test_other_questions_are_asked_of_the_finished_model(toy, tmp_path):
    """Nothing trains again, the base answers them, too; asked once."""
    runs, _ = toy
    before, file = weights(runs), tmp_path / "questions.jsonl"
    for color in ("red", "blue"):
        Image.new("RGB", (20, 16), color).save(tmp_path / f"{color}.png")
    file.write_text("".join(json.dumps({"image": f"{c}.png", "question": "what color", "answers": [c], "category": "mine"})
                            + "\n" for c in ("red", "blue")))
    options = ["--stage", "dpo", *TOY, "--runs", runs, "--questions", file]
    done = run(*options)
    assert "| mine " in done.stdout and "exist" not in done.stdout and "relative change" in done.stdout
    assert done.stdout.count("Held-out") == 2 and weights(runs) == before
    assert "nothing to do" in run(*options).stdout
    assert "| mine " in run("--stage", "dpo", *TOY, "--runs", runs).stdout          # nothing new is asked
    file.write_text(file.read_text().replace("mine", "yours"))
    again = run(*options)
    assert "| yours " in again.stdout and "| mine " not in again.stdout and "nothing to do" not in again.stdout


def test_frozen_parts_stay_bit_identical(toy):
    runs, _ = toy
    runs /= "toy"
    assert weights(runs / "align/encoder") == weights(runs / "encoder/encoder")
    assert weights(runs / "align/llm") == weights(runs / "llm/llm")
    for stage, earlier in (("lookup", "align"), ("instruct", "lookup"), ("dpo", "instruct")):
        for part in pivot.ALL:
            old, new = (load_file(runs / s / part / "model.safetensors") for s in (earlier, stage))
            frozen = {k for k in old if "layers.3." in k and part == "encoder" or "post_layernorm" in k}
            assert all(torch.equal(old[k], new[k]) for k in frozen)
            assert all(not torch.equal(old[k], new[k]) for k in set(old) - frozen), (stage, part)


def test_other_settings_under_the_same_name_are_refused(toy):
    runs, _ = toy
    before = weights(runs)
    done = run("--stage", "dpo", *TOY, "--runs", runs, "--beta", ".2", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    assert "beta = 0.1, now 0.2" in done.stderr and "--name" in done.stderr and weights(runs) == before


def test_live_and_cached_reference_agree_at_every_step(toy):
    runs, _ = toy
    options = ["--stage", "dpo", *TOY, "--runs", runs, "--steps", "20", "--lr", "1e-3", "--encoder-lr", "1e-3"]
    for reference in ("live", "cached"):
        run(*options, "--name", reference, "--reference", reference)
    live, cached = log(runs / "live/dpo"), log(runs / "cached/dpo")
    # it learns, so that agreement means something
    assert len(live) == 20 and sum(line["margin"] for line in live[-5:]) / 5 > .1
    for a, b in zip(live, cached):
        assert abs(a["loss"] - b["loss"]) < 1e-5 and abs(a["margin"] - b["margin"]) < 1e-4


def test_held_out_pairs_have_a_reference_of_their_own(toy):
    """Nothing moves at a learning rate of zero: every loss, held-out ones too, is log 2."""
    runs, _ = toy
    for reference in ("live", "cached"):
        run("--stage", "dpo", *TOY, "--runs", runs, "--lr", "0", "--encoder-lr", "0", "--eval-every", "2",
            "--name", f"still-{reference}", "--reference", reference)
        lines = log(runs / f"still-{reference}/dpo")
        for line in [*lines, lines[1]["held_out"], lines[3]["held_out"]]:
            assert abs(line["loss"] - .6931472) < 1e-5 and abs(line["margin"]) < 1e-4


def test_a_stale_reference_is_not_used(tmp_path):
    from dpo import cached
    table = torch.arange(8.).view(4, 2)

    class Steps(list):
        data = range(4)

    batch = type("Batch", (), {"index": torch.arange(4), "to": lambda self, device: self})()
    look = [tmp_path / "reference.safetensors", {"weights": "a"}, "cpu"]
    assert torch.equal(cached(lambda b: table, Steps([[batch]]), *look)(batch), table)
    assert torch.equal(cached(lambda b: 1 / 0, Steps([[batch]]), *look)(batch), table)       # same identity: read
    look[1] = {"weights": "b"}
    assert torch.equal(cached(lambda b: -table, Steps([[batch]]), *look)(batch), -table)     # another: computed
    look[0].write_bytes(look[0].read_bytes()[:-3])
    assert torch.equal(cached(lambda b: table, Steps([[batch]]), *look)(batch), table)       # damaged: computed


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_same_bits_twice_and_after_sigkill(toy, tmp_path, stage):
    """Undisturbed, repeated, and killed at random moments: the weights are the same bits."""
    runs, _ = toy
    base = ["--stage", stage, *TOY, "--runs", runs, "--steps", "12", "--save-every", "3", "--eval-every", "5"]
    run(*base, "--name", f"{stage}-once")
    rng = random.Random(stage)
    command = [sys.executable, str(ROOT / "pivot.py"), *map(str, base), "--name", f"{stage}-killed"]
    for _ in range(3):
        process, file = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), \
            runs / f"{stage}-killed" / stage / "log.jsonl"
        at = rng.randrange(1, 11)
        while process.poll() is None and not (file.exists() and file.read_text().count("\n") >= at):
            time.sleep(.002)
        time.sleep(rng.random() * .05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    run(*base, "--name", f"{stage}-killed")
    once, killed = runs / f"{stage}-once" / stage, runs / f"{stage}-killed" / stage
    assert weights(once) == weights(killed) and len(weights(once)) == 3
    clocked = {"samples_per_s", "tokens_per_s", "tflops", "peak_gb", "waiting"}
    assert [{k: v for k, v in line.items() if k not in clocked} for line in log(once)] == \
        [{k: v for k, v in line.items() if k not in clocked} for line in log(killed)]
    assert "held_out" in log(once)[4] and not list(killed.rglob("*.tmp"))
    run(*base, "--name", f"{stage}-twice")
    assert weights(once) == weights(runs / f"{stage}-twice" / stage)


@pytest.mark.parametrize("stage", ["instruct", "dpo"])
def test_two_processes_give_the_single_process_result(toy, stage):
    """FSDP over gloo; an odd batch, so that one rank runs short, and micro-batches."""
    runs, _ = toy
    options = ["--stage", stage, *TOY, "--runs", runs, "--batch", "7", "--steps", "4", "--optimizer", "adamw",
               "--lr", "1e-3", "--encoder-lr", "1e-3"]
    run(*options, "--name", "one")
    run(*options, "--name", "two", "--micro-batch", "3", processes=2)
    one, two = log(runs / "one" / stage), log(runs / "two" / stage)
    assert len(one) == len(two) == 4
    for a, b in zip(one, two):
        assert abs(a["loss"] - b["loss"]) < 1e-5 * a["loss"] and abs(a["grad_norm"] - b["grad_norm"]) < 1e-4 * a["grad_norm"]
    for part in pivot.ALL:
        a, b, old = (load_file(runs / x / part / "model.safetensors") for x in
                     (f"one/{stage}", f"two/{stage}", "toy/lookup" if stage == "instruct" else "toy/instruct"))
        change = sum((a[k] - old[k]).square().sum() for k in a) ** .5
        assert sum((a[k] - b[k]).square().sum() for k in a) ** .5 < .02 * change


def test_pivot_keeps_the_encoder_and_learns_the_rest(toy):
    """A dpo encoder, frozen, under a fresh projector and the text LLM; its alignment is run first."""
    runs, _ = toy
    source = runs / "toy/dpo/encoder"
    done = run("--stage", "pivot", *TOY, "--runs", runs, "--name", "again", "--encoder", source)
    assert "pivot-align: done" in done.stdout and "pivot: done" in done.stdout and "knowledge" in done.stdout
    assert weights(runs / "again/pivot/encoder") == weights(source)
    for part in ("projector", "llm"):
        assert weights(runs / "again/pivot" / part) != weights(runs / "toy/dpo" / part)
    assert weights(runs / "again/pivot-align/encoder") == weights(source)


def test_one_ranks_bad_sample_ends_the_job(toy, tmp_path):
    """The other rank waits for it in the first step's sum: it must not wait for ever, nor the first one to say goodbye."""
    runs, _ = toy
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    bad = pivot.data.shuffled(0, 2, 2, 0)[1]                    # of the first step's two the second rank's
    rows = [{"id": f"s{i}", "image": "b.png" if i == bad else "a.png", "question": "what", "chosen": "red"} for i in (0, 1)]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(r | {"rejected": "blue"}) + "\n" for r in rows))
    done = run("--stage", "sft", *TOY, "--runs", runs, "--name", "bad", "--data", tmp_path / "one.jsonl", "--batch", 2,
               processes=2, check=False)
    assert done.returncode and f"sample s{bad}: cannot read picture" in done.stderr
    assert not (runs / "bad/sft/encoder").exists()


def test_the_papers_preset_wants_files(toy, tmp_path):
    runs, _ = toy
    given = [x for part in pivot.ALL for x in (f"--{part}", runs / "toy/instruct" / part)]
    options = ["--preset", "paper", "--dtype", "float32", "--runs", tmp_path, *given, "--template", "plain"]
    done = run("--stage", "sft", *options, check=False)
    assert done.returncode == 1 and "needs a file of samples" in done.stderr
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": f"what is {i}", "chosen": "red", "rejected": "blue"} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run("--stage", "dpo", *options, "--data", tmp_path / "pairs.jsonl", "--batch", "8")
    lines = log(tmp_path / "paper/dpo")
    assert len(lines) == 8 and max(line["lr"] for line in lines) == 1e-6        # ceil(3 epochs * 20 / 8) steps
    assert all(abs(line["loss"] - .6931) < 1e-2 for line in lines)
    run("--stage", "dpo", *options, "--data", tmp_path / "pairs.jsonl", "--batch", "8", "--steps", "2", "--name", "short")
    assert len(log(tmp_path / "short/dpo")) == 2


def test_real_preferences_from_files(toy, tmp_path):
    from PIL import Image
    runs, _ = toy
    rows = []
    for i in range(12):
        Image.new("RGBA", (40 + i, 10), (20 * i, 0, 0, 255)).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": "Is it dark? Größe", "chosen": "True" if i < 6 else "False",
                     "rejected": "False" if i < 6 else "True"})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = ["--data", tmp_path / "pairs.jsonl", "--eval-data", tmp_path / "pairs.jsonl", "--runs", runs]
    done = run("--stage", "dpo", *TOY, *data, "--name", "mine")
    assert "majority" in done.stdout and "0.500" in done.stdout and "texture" not in done.stdout
    assert len(weights(runs / "mine/dpo")) == 3
    (tmp_path / "pairs.jsonl").write_text(json.dumps(rows[0]) + "\n")
    done = run("--stage", "dpo", *TOY, *data, "--name", "mine", check=False)
    assert done.returncode == 1 and "made with data =" in done.stderr


def test_chat(toy, tmp_path):
    from data import Scene
    runs, _ = toy
    Scene("test", 0).image().save(tmp_path / "scene.png")
    options = ["--stage", "chat", *TOY, "--runs", runs, "--image", tmp_path / "scene.png"]
    assert run(*options, "--question", "what color is top left").returncode == 0
    done = run(*options, input="where is red\nis there any circle\n")
    assert done.stdout.count("\n") >= 2


@pytest.mark.parametrize("options, message", [
    (["--stage", "chat", "--question", "hi"], "no model there yet"),
    (["--stage", "align", "--encoder", "nowhere", "--llm", "nowhere"], "nowhere"),
    (["--stage", "encoder", "--data", "x.json"], "embedded world only"),
    (["--stage", "dpo", "--encoder", "e", "--projector", "p", "--llm", "l", "--data", "missing.jsonl"], "missing.jsonl")])
def test_errors_are_one_line(tmp_path, options, message):
    done = run(*options, *TOY, "--runs", tmp_path / "runs", check=False, cwd=tmp_path)
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_help_shows_every_option_with_its_default():
    done = run("--help")
    for field in pivot.fields(pivot.Settings):
        assert "--" + field.name.replace("_", "-") in done.stdout
    assert done.stdout.count("(default:") >= len(pivot.fields(pivot.Settings)) - 2


def test_schedule():
    rates = [pivot.schedule(k, 100, .05) for k in range(100)]
    assert rates[:5] == pytest.approx([.2, .4, .6, .8, 1.]) and rates[5] == 1 and 0 < rates[-1] < 1e-3
    assert all(a >= b for a, b in zip(rates[5:], rates[6:])) and pivot.schedule(0, 1, .03) == 1



# ------------------------------------------------------------------------------------------------------- silent failures

def test_a_loss_that_is_not_finite_skips_the_step_and_three_stop_the_run(tmp_path, monkeypatch, capsys):
    """Poisoned steps: one is skipped and the run goes on; three in a row end it, with the samples named."""
    import sft
    honest, calls = sft.sft_objective, []
    monkeypatch.setattr(pivot, "setup", lambda: torch.device("cpu"))
    monkeypatch.setattr(pivot.dist, "destroy_process_group", lambda: None)
    argv = ["--preset", "toy", "--stage", "llm", "--runs", str(tmp_path), "--steps", "8", "--save-every", "2"]

    def poisoned(model, batch, when):
        calls.append(1)
        loss, *rest = honest(model, batch)
        return loss * (float("nan") if len(calls) in when else 1), *rest

    monkeypatch.setattr(pivot, "sft_objective", lambda *a: poisoned(*a, when=[3]))
    pivot.main([*argv, "--name", "once"])
    log = [json.loads(line) for line in (tmp_path / "once/llm/log.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in log] == [0, 0, 1, 0, 0, 0, 0, 0]
    calls.clear()
    monkeypatch.setattr(pivot, "sft_objective", lambda *a: poisoned(*a, when=[4, 5, 6]))
    with pytest.raises(SystemExit) as stop:
        pivot.main([*argv, "--name", "thrice"])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "not finite in steps 3 to 5" in error and "llm-" in error
    assert [step for step, _ in pivot.saves(tmp_path / "thrice/llm")] == [4]


def test_a_part_that_should_move_and_does_not_is_an_error(toy, tmp_path):
    """Preferences without a single picture: the encoder gets no gradient, and nobody would notice."""
    runs, _ = toy
    rows = [{"question": f"what is {i}", "chosen": "red", "rejected": "blue"} for i in range(8)]
    (tmp_path / "blind.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = run("--stage", "sft", *TOY, "--runs", runs, "--name", "blind", "--data", tmp_path / "blind.jsonl", check=False)
    assert done.returncode == 1 and "encoder.embeddings" in done.stderr and "did not move" in done.stderr


def test_a_signal_saves_and_the_same_command_goes_on(tmp_path):
    """SIGTERM in the middle: status 143, one line; then the same command ends in the bits of an undisturbed run."""
    argv = ["--preset", "toy", "--stage", "llm", "--steps", "60", "--runs"]
    run(*argv, tmp_path / "whole")
    command = [sys.executable, str(ROOT / "pivot.py"), *argv, str(tmp_path / "cut")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "cut/toy/llm/log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 5):
        time.sleep(.02)
    process.send_signal(signal.SIGTERM)
    error = process.communicate()[1]
    assert process.returncode == 143 and "the same command goes on" in error
    run(*argv, tmp_path / "cut")
    one, two = ((tmp_path / name / "toy/llm/llm/model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == two


# ----------------------------------------------------------------------------------------------------------------- PIVOT

def test_a_reused_projector_layer_stays_and_unfreezing_moves_the_encoder(toy):
    runs, _ = toy
    source = runs / "toy/dpo"
    old, fresh = load_file(source / "projector/model.safetensors"), load_file(source / "encoder/model.safetensors")
    for name, options in (("reused", ["--projector-layers", "1"]), ("moving", ["--unfreeze"])):
        run("--stage", "pivot", *TOY, "--runs", runs, "--name", name, "--base", "toy", "--encoder", source / "encoder", *options)
        projector = load_file(runs / name / "pivot/projector/model.safetensors")
        encoder = load_file(runs / name / "pivot/encoder/model.safetensors")
        assert torch.equal(old["0.weight"], projector["0.weight"]) == (name == "reused")
        assert not torch.equal(old["2.weight"], projector["2.weight"])
        assert all(torch.equal(v, encoder[k]) for k, v in fresh.items()) == (name == "reused")


@pytest.mark.parametrize("c", [m.EncoderConfig(96, 400, num_attention_heads=4), m.LLMConfig(
    9, 96, 500, num_attention_heads=6, num_key_value_heads=1), m.LLMConfig(9, 80, 430, num_attention_heads=5)])
def test_activations_are_what_a_layer_keeps(c, monkeypatch):
    """dry_run's bytes against autograd's saved tensors in bf16, with an attention that keeps its inputs and output."""
    class Flash(torch.autograd.Function):
        @staticmethod
        def forward(context, q, k, v):
            context.save_for_backward(q, k, v, out := q.clone())
            return out

    llm, x = isinstance(c, m.LLMConfig), torch.randn(1, 70, c.hidden_size, requires_grad=True)
    monkeypatch.setattr(m, "attend", lambda q, k, v, *_, **__: Flash.apply(q, k, v).transpose(1, 2).flatten(2))
    layer = m.DecoderLayer(c) if llm else m.EncoderLayer(c)
    angles = [torch.ones(1, 1, 70, c.head_dim)] * 2 if llm else []
    weights, found = {tuple(p.shape) for p in layer.parameters()}, {}

    def keep(t):                            # not weights, nor their copies in bf16
        if not weights & {tuple(t.shape), tuple(t.shape[::-1])} and t.shape != (1, 1, 70, c.head_dim if llm else 0):
            found[t.data_ptr()] = t.nbytes, t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        kept = layer(x, *([None, *angles] if llm else []))
    assert sum(size for size, _ in found.values()) == pytest.approx(70 * pivot.kept(c, 1), rel=.05), kept.shape
    assert pivot.kept(c, 9) == 9 * pivot.kept(c, 1) and pivot.kept(c, 9, True) == pivot.kept(c, 1) + 36 * c.hidden_size
