"""SIGKILL, signals, full disks, other settings: what is on disk is whole or absent, and the same command goes on to the bits
of an undisturbed run."""
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import ROOT
from safetensors.torch import load_file
from tiny import main, options, write_rows, write_tiny

import dpo
import model as m
import pivot

# A parent that has imported everything forks a child for every line on its standard input: a start takes a tenth of a second.
# The child is a process of its own, with its own process group, and dies as any other.
FORKS = """
import json, os, sys
import torch
torch.set_num_threads(1)
sys.path[:0] = [{root!r}]
import pivot
for line in sys.stdin:
    log, *argv = json.loads(line)
    pid = os.fork()
    if not pid:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        os.dup2(2, 1)
        pivot.main(argv)
        os._exit(0)
    print(pid, flush=True)
    status = os.waitpid(pid, 0)[1]
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer):
    return write_tiny(tmp_path_factory.mktemp("tiny"), tokenizer)


@pytest.fixture(scope="module")
def spawn(tiny):
    """argv -> pid of a running child; wait() -> its exit status, negative for a signal; and what the latest child printed (a
    log each: the workers of a killed one may complain seconds later)."""
    logs = []
    parent = subprocess.Popen([sys.executable, "-c", FORKS.format(root=str(ROOT))], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)

    def start(argv):
        logs.append(tiny / f"child{len(logs)}.log")
        parent.stdin.write(json.dumps([str(logs[-1]), *map(str, argv)]) + "\n")
        parent.stdin.flush()
        return int(parent.stdout.readline())

    yield start, lambda: int(parent.stdout.readline()), lambda: logs[-1].read_text()
    parent.stdin.close()
    parent.wait(timeout=30)


def weights(folder):
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("model.safetensors"))}


def learned(folder):
    """The log without its clocks."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: line[k] for k in ("step", "loss", "margin", "grad_norm", "held_out") if k in line} for line in lines]


def whole(folder):
    """Everything under its own name can be read in full; what is being written has another name."""
    for part in (p for p in folder.rglob("*") if p.is_dir() and p.name in (*pivot.ALL, "llava") and ".tmp" not in str(p)):
        assert (part / "config.json").exists() and load_file(part / "model.safetensors"), part
        for file in part.glob("*.json"):
            json.loads(file.read_text())
    for _, save in pivot.saves(folder):
        kept = dcp.FileSystemReader(save)
        metadata = kept.read_metadata()
        assert all((save / i.relative_path).stat().st_size >= i.offset + i.length for i in metadata.storage_data.values())
    for file in (folder / "settings.json", folder / "results.json"):
        assert not file.exists() or json.loads(file.read_text())
    if (folder / "reference.safetensors").exists():
        assert load_file(folder / "reference.safetensors")["logps"].isfinite().all()


def phase(folder, index):
    """What a run is doing, as its files tell."""
    names = {p.name for p in folder.glob("*")} | {p.name for p in (folder / "train").glob("*")} | {
        p.name for p in index.parent.glob("*.part")}
    if not index.exists():
        return "index"
    if any(n.startswith("step-") and n.endswith(".tmp") for n in names):
        return "save"
    if names & {"encoder.tmp", "projector.tmp", "llm.tmp", "llava.tmp", "encoder", "llm"}:
        return "export"
    if "reference.safetensors" not in names:
        return "reference"
    return "step"


def test_killed_25_times_at_random_moments(tiny, spawn, capsys):
    """Index build, reference pass, steps, saves, export: killed in each of them, then run to the end: the same bits as
    undisturbed, and after every kill everything on disk is whole or absent."""
    start, wait, log = spawn
    rows = [json.loads(line) for line in (tiny / "pairs.jsonl").read_text().splitlines()]
    runs, rng, seen, began = {}, random.Random(0), [], time.time()
    for name in ("once", "killed"):
        (tiny / name).mkdir()
        for row in rows:
            (tiny / name / row["image"]).write_bytes((tiny / row["image"]).read_bytes())
        write_rows(tiny / name / "pairs.jsonl", [{**r, "id": f"{i}-{r['id']}"} for i in range(40) for r in rows])
        runs[name] = options(tiny, "--name", name, "--steps", 40, "--save-every", 4, "--eval-every", 15, "--take", 400, "--lr",
                             1e-3, "--encoder-lr", 1e-3, "--export", "llava", "--eval-data", tiny / "pairs.jsonl",
                             data=f"{name}/pairs.jsonl")
    start(runs["once"])
    assert wait() == 0, log()[-2000:]
    killed, index = tiny / "runs/killed/dpo", tiny / "killed/pairs.jsonl.index"
    plan = ["index"] * 5 + ["reference"] * 5 + ["step", "save"] * 5 + ["export"] * 5
    for wanted in plan:
        for file in {"index": [index], "reference": [killed / "reference.safetensors"]}.get(wanted, []):
            file.unlink(missing_ok=True)            # once more, if the last kill came too late
        if wanted in ("step", "save") and pivot.saves(killed)[-1:] and pivot.saves(killed)[-1][0] == 40:
            shutil.rmtree(killed)                   # nothing is left to train: from the beginning
        pid, deadline = start(runs["killed"]), time.time() + 20

        def waits():
            return time.time() < deadline and os.path.exists(f"/proc/{pid}")

        if wanted == "step":                        # some steps of progress, so that the kills are spread over the run
            lines = (killed / "log.jsonl").read_text().count("\n") if (killed / "log.jsonl").exists() else 0
            goal = lines + rng.randrange(0, 3)
            while waits() and not ((killed / "log.jsonl").exists() and
                                   (killed / "log.jsonl").read_text().count("\n") > goal):
                time.sleep(.001)
        else:
            while waits() and (phase(killed, index) != wanted or wanted == "reference" and not killed.exists()):
                time.sleep(.0005)
        time.sleep(rng.random() * {"index": .03, "reference": .05, "step": .03, "save": .03, "export": .06}[wanted])
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        status, now = wait(), phase(killed, index)
        assert status in (0, -signal.SIGKILL), log()[-2000:]
        whole(killed)
        seen.append(now if status else "finished")
        if not status and len(plan) < 40:           # too late: once more
            plan.append(wanted)
        if pivot.finished(killed):                  # what follows is to be done again
            m.write_json(killed / "settings.json", {k: v for k, v in pivot.read_settings(killed).items() if k != "finished"})
    start(runs["killed"])
    assert wait() == 0, log()[-2000:]
    once = tiny / "runs/once/dpo"
    with capsys.disabled():
        print(f"\nkilled {sum(s != 'finished' for s in seen)} of {len(seen)} times in {time.time() - began:.0f} s:",
              {s: seen.count(s) for s in sorted(set(seen))})
    assert len(weights(once)) == 4 and weights(once) == weights(killed)
    assert learned(once) == learned(killed) and len(learned(once)) == 40
    assert {"index", "step", "save", "export"} <= set(seen) and sum(s != "finished" for s in seen) >= 25
    assert not [p for p in killed.rglob("*") if p.suffix in (".tmp", ".old")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_time_is_one_line(tiny, spawn, number):
    """In the middle of training: saved, status 143, how to go on. Ctrl-C before training: one line, too."""
    start, wait, log = spawn
    name = f"signal {number}"
    argv = options(tiny, "--name", name, "--steps", 200, stage="sft")
    pid, folder = start(argv), tiny / "runs" / name / "sft"
    while not ((folder / "log.jsonl").exists() and (folder / "log.jsonl").read_text().count("\n") > 5):
        time.sleep(.002)
    os.kill(pid, number)
    assert wait() == 143 and "the same command goes on" in log().splitlines()[-1]
    done = len(learned(folder))
    assert pivot.saves(folder)[-1][0] == done < 200 and "Traceback" not in log()


def test_a_signal_after_training_is_not_swallowed(tiny):
    """The loop's handlers go when the loop ends."""
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    assert main(*options(tiny, "--name", "after", "--steps", 2, stage="sft")) == 0
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize("where, limit", [("log", 900), ("save", 60_000), ("folder", 40_000), ("reference", 60), ("settings", 100)])
def test_a_full_disk_is_one_line_and_loses_nothing(tiny, monkeypatch, capsys, where, limit):
    """From some moment on no file may grow beyond a limit (RLIMIT_FSIZE; the error is the disk's): one line that names what
    could not be written; what was there before is whole; with room again the same command ends in the same bits."""
    name, soft = f"full {where}", resource.getrlimit(resource.RLIMIT_FSIZE)
    base = options(tiny, "--steps", 6, "--save-every", 2, "--lr", 1e-3, "--encoder-lr", 1e-3)
    if not (tiny / "runs/roomy/dpo").exists():
        assert main(*base, "--name", "roomy") == 0

    def full(module, function, after):
        """The disk is full from the call number `after` of a function on."""
        honest, calls = getattr(module, function), []

        def wrapped(*more, **named):
            calls.append(1)
            if len(calls) == after:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, soft[1]))
            return honest(*more, **named)
        monkeypatch.setattr(module, function, wrapped)

    full(*{"log": (pivot, "meter", 4), "save": (pivot, "save_resume", 2), "folder": (pivot, "save_model", 1),
           "reference": (dpo, "save_file", 1), "settings": (pivot, "write_json", 1)}[where])
    try:
        status = main(*base, "--name", name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    error = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
    assert status == 1 and len(error) == 1 and ("cannot be written" in error[0] or "cannot be saved" in error[0])
    assert "File too large" in error[0] and "the same command again" in error[0]
    folder = tiny / "runs" / name / "dpo"
    whole(folder)
    assert [k for k, _ in pivot.saves(folder)] == {"log": [2], "save": [2], "folder": [6]}.get(where, [])
    monkeypatch.undo()
    assert main(*base, "--name", name) == 0
    assert weights(folder) == weights(tiny / "runs/roomy/dpo") and learned(folder) == learned(tiny / "runs/roomy/dpo")


# -------------------------------------------------------------------------------------- going on with something else

def begun(tiny, name, **more):
    """A run that was stopped after two of its six steps."""
    argv = options(tiny, "--name", name, "--steps", 6, "--save-every", 2, "--lr", 1e-3, "--encoder-lr", 1e-3)
    honest = pivot.save_resume

    def stop(*save):
        honest(*save)
        raise pivot.Stopped("here")

    pivot.save_resume = stop
    try:
        assert main(*argv) == 143
    finally:
        pivot.save_resume = honest
    return argv


FREE = {"micro_batch": 3, "workers": 2, "save_every": 4, "eval_every": 3, "checkpointing": None, "on_bad_sample": "skip"}
BOUND = {"seed": 1, "steps": 7, "batch": 4, "lr": 2e-3, "encoder_lr": 2e-3, "optimizer": "muon", "warmup": .5, "clip": .5, "beta": .2,
         "loss": "ipo", "reference": "live", "max_length": 99, "template": "chatml", "select_layer": -3, "dtype": "bfloat16",
         "image_size": 24, "take": 9, "max_prompt_chosen": 99, "epochs": 2, "export_dtype": "bfloat16", "preset": "toy"}


def test_what_may_change_does_and_what_may_not_is_refused_by_name(tiny, capsys):
    argv = begun(tiny, "bound")
    folder = tiny / "runs/bound/dpo"
    kept = weights(tiny / "runs/bound"), (folder / "settings.json").read_bytes(), (folder / "log.jsonl").read_bytes()
    for key, value in BOUND.items():
        capsys.readouterr()
        assert main(*argv, "--" + key.replace("_", "-"), value) == 1, key
        error = capsys.readouterr().err
        assert f"was made with {key} = " in error and f"now {value}" in error and "--name" in error, (key, error)
    rows = (tiny / "pairs.jsonl").read_text()
    (tiny / "other.jsonl").write_text(rows.replace("red", "tan"))
    llm = m.initialise(m.load_llm(tiny / "base/llm"), 5)
    m.save_folder(tiny / "other/llm", llm.state_dict(), {"config.json": m.llm_json(llm.config)}, (tiny / "base/llm").glob("token*"),
                  torch.float32)
    for key, value in (("data", tiny / "other.jsonl"), ("llm", tiny / "other/llm")):
        capsys.readouterr()
        assert main(*argv, f"--{key}", value) == 1 and f"was made with {key} = " in capsys.readouterr().err, key
    assert kept == (weights(tiny / "runs/bound"), (folder / "settings.json").read_bytes(), (folder / "log.jsonl").read_bytes())
    assert main(*argv) == 0
    straight = weights(folder)
    named = {f.name for f in pivot.fields(pivot.Settings)}
    assert named >= {*FREE, *BOUND} and {*FREE} <= {*pivot.FREE} and not {*BOUND} & {*pivot.FREE}
    for key, value in FREE.items():
        more = ["--eval-data", tiny / "pairs.jsonl"] if key == "eval_every" else []
        assert main(*begun(tiny, f"free {key}"), *more, "--" + key.replace("_", "-"), *([] if value is None else [value])) == 0, key
        now = tiny / f"runs/free {key}/dpo"
        assert [a["step"] for a in learned(now)] == list(range(6))
        for a, b in zip(learned(folder), learned(now)):
            assert abs(a["loss"] - b["loss"]) < 1e-5, key
        assert key in ("micro_batch", "checkpointing") or weights(now) == straight, key


@pytest.mark.parametrize("first, then", [(1, 2), (2, 1)])
def test_another_number_of_processes_goes_on(tiny, first, then):
    """Stopped after two steps, continued by more or by fewer processes: as one process does it alone."""
    argv = options(tiny, "--steps", 6, "--save-every", 2, "--lr", 1e-3, "--encoder-lr", 1e-3)
    if not (tiny / "runs/alone/dpo").exists():
        assert main(*argv, "--name", "alone") == 0
    name, folder = f"from {first}", tiny / f"runs/from {first}/dpo"

    def launch(processes):
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
        return subprocess.Popen([sys.executable, *torchrun, str(ROOT / "pivot.py"), *argv, "--name", name],
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    if first == 1:
        begun(tiny, name)
    else:
        process = launch(first)
        while not pivot.saves(folder) and process.poll() is None:
            time.sleep(.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert pivot.saves(folder)[-1][0] < 6
    assert launch(then).wait(timeout=240) == 0
    for a, b in zip(learned(tiny / "runs/alone/dpo"), learned(folder), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5 and abs(a["grad_norm"] - b["grad_norm"]) < 1e-3 * a["grad_norm"]
