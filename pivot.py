"""PIVOT: train a vision encoder under an LLM head, with SFT or with DPO, and see what changed.

    torchrun pivot.py --stage dpo                                 all the way, on the embedded world
    torchrun pivot.py --stage dpo --name mine --data pairs.jsonl  the same on your preference pairs
    torchrun pivot.py --stage chat --image some.png --question "what color is top left"

Stages, each from the one before it: encoder, llm -> align -> lookup -> instruct -> sft | dpo.
Those that a stage needs and that are not there yet are run first. pivot-align -> pivot puts the
encoder that --encoder names, frozen, under a fresh projector and LLM.
"""
import argparse
import functools
import json
import math
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import data
import probe
from data import TEMPLATES, BadInput
from dpo import cached, dpo_objective, frozen, reference_logps
from model import (MLLM, Decoder, DecoderLayer, Encoder, EncoderConfig, EncoderLayer, LLMConfig,
                   SigLIP, hash_file, initialise, load_model, save_model, write_json)
from sft import sft_objective


def contrastive_objective(model, batch):
    """SigLIP's loss: -log sigmoid(z * logit), z = 1 for a picture and its caption, else -1."""
    logits = model(batch)
    own = torch.eye(len(batch), device=logits.device)
    hits = (logits.argmax(1) == own.argmax(1)).float().sum()
    return -F.logsigmoid(logits * (2 * own - 1)).sum(), len(batch), {"accuracy": hits}


# ---------------------------------------------------------------------------------------- stages

@dataclass(frozen=True)
class Stage:
    """What a stage is; and its settings, unless the command line says otherwise."""
    needs: tuple        # stages whose models it starts from
    trains: tuple       # parts that learn; the others stay bit-identical
    objective: str      # contrastive | sft | dpo
    content: str        # what of the world it sees, see data.World
    samples: int        # distinct ones
    steps: int
    batch: int
    lr: float
    encoder_lr: float
    optimizer: str      # muon: Muon for matrices inside the blocks (lr), AdamW for the rest (lr / 10)
    epochs: float = 0   # passes over the data, instead of steps


ALL = ("encoder", "projector", "llm")
WORLD = {
    "encoder": Stage((), ALL[:1], "contrastive", "captions", 32000, 100, 128, .015, .015, "muon"),
    "llm": Stage((), ALL[2:], "sft", "text", 32000, 60, 32, .015, 0, "muon"),
    "align": Stage(("encoder", "llm"), ALL[1:2], "sft", "captions", 32000, 50, 32, .015, 0, "muon"),
    "lookup": Stage(("align",), ALL, "sft", "lookup", 32000, 200, 32, .015, .0015, "muon"),
    "instruct": Stage(("lookup",), ALL, "sft", "instruct", 64000, 800, 32, .015, .0015, "muon"),
    "sft": Stage(("instruct",), ALL, "sft", "preferences", 8192, 256, 32, 3e-4, 3e-4, "adamw"),
    "dpo": Stage(("instruct",), ALL, "dpo", "preferences", 8192, 256, 32, 1e-4, 1e-4, "adamw"),
    "pivot-align": Stage(("encoder", "llm"), ALL[1:2], "sft", "lookup", 32000, 150, 32, .015, 0, "muon"),
    "pivot": Stage(("pivot-align",), ALL[1:], "sft", "instruct", 64000, 800, 32, .015, 0, "muon"),
}
PAPER = {   # the appendix's hyper-parameters; every stage takes its data from --data
    "align": Stage(("encoder", "llm"), ALL[1:2], "sft", "", 0, 0, 256, 1e-3, 0, "adamw", 1),
    "instruct": Stage(("align",), ALL, "sft", "", 0, 0, 256, 1e-5, 2e-6, "adamw", 1),
    "sft": Stage(("instruct",), ALL, "sft", "", 0, 0, 256, 5e-6, 5e-6, "adamw", 3),
    "dpo": Stage(("instruct",), ALL, "dpo", "", 0, 0, 256, 1e-6, 1e-6, "adamw", 3),
    "pivot-align": Stage(("encoder", "llm"), ALL[1:2], "sft", "", 0, 0, 256, 1e-3, 0, "adamw", 1),
    "pivot": Stage(("pivot-align",), ALL[1:], "sft", "", 0, 0, 256, 1e-5, 0, "adamw", 1),
}
PRESETS = {"world": WORLD, "paper": PAPER,
           "toy": {k: replace(row, samples=64, steps=4, batch=8) for k, row in WORLD.items()}}
LEAVES = {"encoder": ALL[:1], "llm": ALL[2:]}           # what a stage writes, if not all three parts


def option(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Settings:
    """The command line. None: the stage's row in the table decides."""
    stage: str = option("dpo", "what to run", [*WORLD, "chat"])
    name: str = option(None, "name of the run, written to RUNS/NAME/STAGE (default: the preset)")
    base: str = option(None, "run whose earlier stages this one starts from (default: the preset)")
    runs: str = option("runs", "folder of all runs")
    preset: str = option("world", "table of stages; toy: a few steps each, for tests", list(PRESETS))
    seed: int = option(0, "seed of initialisation and sample order")
    encoder: str = option(None, "start from this encoder folder (default: the earlier stage's)")
    projector: str = option(None, "start from this projector folder (default: the earlier stage's)")
    llm: str = option(None, "start from this LLM folder (default: the earlier stage's)")
    data: str = option(None, "JSON or JSONL of conversations or preferences (default: the world)")
    eval_data: str = option(None, "the same, held out (default: the world's held-out scenes)")
    image_root: str = option(None, "folder that image paths start from (default: the data file's)")
    samples: int = option(None, "distinct samples of the world")
    steps: int = option(None, "optimiser steps")
    epochs: float = option(None, "passes over the data (default: as many as --steps make)")
    batch: int = option(None, "samples per step, over all ranks and micro-batches")
    micro_batch: int = option(None, "samples per forward pass and rank (default: all at once)")
    lr: float = option(None, "peak learning rate")
    encoder_lr: float = option(None, "peak learning rate of the vision encoder")
    optimizer: str = option(None, "adamw; or muon, for hidden matrices", ["adamw", "muon"])
    warmup: float = option(.03, "share of the steps that warm up; a cosine to zero follows")
    clip: float = option(1., "gradient norm above which gradients are scaled down")
    beta: float = option(.1, "DPO's pull towards the reference")
    loss: str = option("dpo", "preference loss", ["dpo", "ipo"])
    reference: str = option("cached", "reference log-probabilities: computed once before the first "
                            "step, or live in every step", ["cached", "live"])
    max_length: int = option(2048, "tokens per response with its prompt and image")
    template: str = option("plain", "chat template", list(TEMPLATES))
    select_layer: int = option(-2, "layer that the projector sees, as in LLaVA; 0: run them all")
    dtype: str = option("auto", "compute in; auto: bfloat16 where the machine has it",
                        ["auto", "bfloat16", "float32"])
    workers: int = option(0, "processes that prepare batches")
    save_every: int = option(200, "steps between saves for resuming")
    eval_every: int = option(0, "steps between looks at held-out samples while training; 0: none")
    split: str = option("test", "scenes of the final tables; choose settings on validation",
                        ["validation", "test"])
    eval_scenes: int = option(300, "scenes of the final tables: 12 questions, 4 pairs each")
    image: str = option(None, "chat: a picture (default: none)")
    question: str = option(None, "chat: a question (default: read them from standard input)")
    model: str = option(None, "chat: a stage's folder (default: the run's dpo, sft or instruct)")


# handed on to the earlier stages that a stage has to run first
SHARED = ("runs", "preset", "seed", "max_length", "template", "select_layer", "dtype", "workers",
          "eval_scenes")
# may change between a run and its continuation; settings that name files count by their content
FREE = ("name", "base", "runs", "encoder", "projector", "llm", "data", "eval_data", "image_root",
        "micro_batch", "workers", "save_every", "eval_every", "image", "question", "model")


def resolve(s):
    """Fill in what the command line left open."""
    s = replace(s, name=s.name or s.preset, base=s.base or s.preset)
    if s.dtype == "auto":
        cuda = torch.cuda.is_available()
        bf16 = torch.cuda.is_bf16_supported() if cuda else torch.cpu._is_avx512_bf16_supported()
        s = replace(s, dtype="bfloat16" if bf16 else "float32")
    if s.stage == "chat":
        return s
    if s.stage not in PRESETS[s.preset]:
        raise BadInput(f"--stage {s.stage}: preset {s.preset} has no such stage")
    row = asdict(PRESETS[s.preset][s.stage])
    if s.steps:
        s = replace(s, epochs=s.epochs or 0.)           # asked for in steps, not in epochs
    s = replace(s, **{k: row[k] for k in row if hasattr(s, k) and getattr(s, k) is None})
    return replace(s, micro_batch=s.micro_batch or s.batch)


# ------------------------------------------------------------------------------------- machinery

def setup():
    """Join the process group (under torchrun or alone) and return this process's device."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    alone = {} if "RANK" in os.environ else {"rank": 0, "world_size": 1, "store": dist.HashStore()}
    dist.init_process_group("nccl" if cuda else "gloo", **alone)
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def first():
    """Is this the process that writes and speaks?"""
    return dist.get_rank() == 0


def say(text):
    if first():
        print(text, flush=True)


def shard(model):
    """FSDP2: a unit per transformer block; embeddings and head, which may be tied, in the root's.
    One process keeps plain tensors: on a CPU DTensor's bookkeeping would cost more than 5%."""
    if dist.get_world_size() > 1:
        for module in model.modules():
            if isinstance(module, (EncoderLayer, DecoderLayer)):
                fully_shard(module)
        fully_shard(model)
    return model


def full(tensor):
    """The whole of a tensor that may be sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state(model):
    return {k: full(v).detach().cpu().clone() for k, v in model.state_dict().items()}


def schedule(step, steps, warmup):
    """The factor on the peak learning rate: linear warm-up, then a cosine to zero."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return .5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def freeze(model, row):
    """Only the parts that the stage trains get gradients, and of the encoder only what runs."""
    for name, module in model.named_children():
        module.requires_grad_(name in row.trains or row.objective == "contrastive")
    for module in model.encoder.unused() if model.encoder else ():
        module.requires_grad_(False)


def make_optimizers(model, s):
    """AdamW; or Muon for the matrices inside the blocks and AdamW for everything else."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            matrix = s.optimizer == "muon" and p.ndim == 2 and ".layers." in name
            groups.setdefault((matrix, name.startswith("encoder.")), []).append(p)
    optimizers = []
    for kind in (True, False):
        scale = .1 if s.optimizer == "muon" and not kind else 1
        chosen = [{"params": ps, "lr": scale * (s.encoder_lr if encoder else s.lr)}
                  for (matrix, encoder), ps in groups.items() if matrix == kind]
        if chosen:
            make = torch.optim.Muon if kind else torch.optim.AdamW
            optimizers.append(make(chosen, weight_decay=0))
    for group in (g for optimizer in optimizers for g in optimizer.param_groups):
        group["peak"] = group["lr"]
    return optimizers


def resume_state(model, optimizers):
    """What a run needs to go on, as flat tensors: trained weights and optimiser moments."""
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    state = {f"weight.{name}": p.detach() for p, name in names.items()}
    for optimizer in optimizers:
        muon = isinstance(optimizer, torch.optim.Muon)
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if not optimizer.state[p]:          # before the first step: room to read a save into
                moments = ["momentum_buffer"] if muon else ["exp_avg", "exp_avg_sq"]
                optimizer.state[p] = {k: torch.zeros_like(p) for k in moments}
                optimizer.state[p] |= {} if muon else {"step": torch.tensor(0.)}
            state |= {f"{key}.{names[p]}": value for key, value in optimizer.state[p].items()}
    return state


def saves(folder):
    """Whole saves for resuming, oldest first: [(steps done, folder)]."""
    return sorted((int(p.name[5:]), p) for p in (folder / "train").glob("step-*[0-9]"))


def save_resume(folder, step, model, optimizers):
    """Write beside the old save, rename, delete the old one: a whole one is there at any moment."""
    old, final = saves(folder), folder / "train" / f"step-{step}"
    # alone, no collectives: gloo's threads would start OpenMP teams that slow the main one down
    dcp.save(resume_state(model, optimizers), checkpoint_id=final.with_suffix(".tmp"),
             no_dist=dist.get_world_size() == 1)
    if first():
        os.replace(final.with_suffix(".tmp"), final)
        for _, path in old:
            shutil.rmtree(path)


def hash_weights(folder):
    """What identifies a checkpoint folder: the hashes of its tensor files."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise BadInput(f"{folder}: no safetensors there; name a folder with a model in it")
    return [hash_file(file) for file in files]


def finished(folder):
    file = folder / "settings.json"
    return file.exists() and json.loads(file.read_text()).get("finished", False)


def same_or_refuse(folder, settings):
    """True if this very run is finished, False if it is new or unfinished; an error if another is
    there under its name."""
    file = folder / "settings.json"
    old = json.loads(file.read_text()) if file.exists() else {}
    for key, value in settings.items():
        if old and old.get(key) != json.loads(json.dumps(value)):
            raise BadInput(f"{folder}: was made with {key} = {old.get(key)}, now {value}; choose "
                           f"another --name, or remove the folder")
    return finished(folder)


# ----------------------------------------------------------------------------- the training loop

def train(s, objective, folder, model, steps, held_out, references, device):
    """A stage's loop: fetch, forward, backward, clip, step, log, save. Interrupted, it goes on
    from its last save. steps[k] are the micro-batches of this rank for step k. references: for DPO
    two functions batch -> (samples, 2), for the steps and for what is held out."""
    optimizers, log, start = make_optimizers(model, s), folder / "log.jsonl", 0
    trained = [p for p in model.parameters() if p.requires_grad]
    for start, save in saves(folder)[-1:]:
        dcp.load(resume_state(model, optimizers), checkpoint_id=save,
                 no_dist=dist.get_world_size() == 1)
    if first():                                 # forget what was logged after the last save
        lines = log.read_text().splitlines() if log.exists() else []
        log.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] < start))

    def forward(batch, reference):
        """Loss summed over a micro-batch; numbers to add up over micro-batches and ranks."""
        batch = batch.to(device)
        if reference:
            batch.ref = reference(batch)
        with probe.autocast(device, s.dtype):   # bf16 over fp32 master weights; loss in fp32
            loss, count, metrics = objective(model, batch)
        weight = 0. if batch.dummy else 1.
        sums = {"loss": loss.detach(), "count": count, "samples": len(batch), **metrics}
        return loss * weight, {k: weight * float(v) for k, v in sums.items()}

    def total(parts):
        """Add up dicts of numbers, over all ranks too. The loss is per count, metrics per sample."""
        sums = torch.tensor([list(p.values()) for p in parts], dtype=torch.float64).sum(0)
        dist.all_reduce(sums := sums.to(device))
        loss, count, samples, *rest = sums.tolist()
        metrics = {k: v / samples for k, v in zip(list(parts[0])[3:], rest)}
        return {"loss": loss / count, **metrics}, count, samples

    loader = torch.utils.data.DataLoader(steps, batch_size=None, sampler=range(start, len(steps)),
                                         num_workers=s.workers)
    bar = tqdm(loader, s.stage, len(steps), initial=start, unit="step", disable=not first(),
               dynamic_ncols=True)
    clock = time.perf_counter()
    for step, batches in enumerate(bar, start):
        parts = []
        for batch in batches:
            loss, sums = forward(batch, references[0])
            loss.backward()
            parts.append(sums)
        means, count, samples = total(parts)

        # gradients of a sum, averaged over ranks by FSDP: make them the step's mean, however split
        torch._foreach_mul_([p.grad for p in trained], dist.get_world_size() / count)
        norm = full(torch.nn.utils.clip_grad_norm_(trained, s.clip))
        rate = schedule(step, len(steps), s.warmup)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            optimizer.step()
            optimizer.zero_grad()

        seconds, clock = time.perf_counter() - clock, time.perf_counter()
        line = {"step": step, **means, "grad_norm": float(norm), "lr": s.lr * rate,
                "samples_per_s": samples / seconds}
        if s.eval_every and (step + 1) % s.eval_every == 0:
            with torch.no_grad():
                line["held_out"] = total([forward(batch, references[1])[1] for k in
                                          range(len(held_out)) for batch in held_out[k]])[0]
        if first():
            with open(log, "a") as f:
                f.write(json.dumps(line) + "\n")
            bar.set_postfix_str(f"loss {means['loss']:.3f}, {samples / seconds:.0f} samples/s",
                                refresh=False)
        if (step + 1) % s.save_every == 0 or step + 1 == len(steps):
            save_resume(folder, step + 1, model, optimizers)


# ------------------------------------------------------------------------------------- one stage

def inputs(s, device):
    """{part: folder} that the stage starts from. Runs the earlier stages that are missing."""
    given = {part: getattr(s, part) for part in ALL if getattr(s, part)}
    for need in PRESETS[s.preset][s.stage].needs:
        made = [part for part in LEAVES.get(need, ALL) if part not in given]
        home = s.name if s.stage == "pivot" else s.base     # pivot's alignment is for its encoder
        earlier = Path(s.runs) / home / need
        if made and not finished(earlier):
            if need not in PRESETS[s.preset]:
                raise BadInput(f"--{made[0]}: name a folder; preset {s.preset} does not make one")
            say(f"{s.stage} needs {need}, which is not there yet")
            shared = {k: getattr(s, k) for k in SHARED}
            shared |= {"encoder": s.encoder} if s.stage == "pivot" else {}
            run_stage(resolve(Settings(stage=need, name=home, base=s.base, **shared)), device)
        given |= {part: str(earlier / part) for part in made}
    return given


def run_stage(s, device):
    """Inputs, data, model, loop; then the folders that the stage leaves, and its tables."""
    row, folder = PRESETS[s.preset][s.stage], Path(s.runs) / s.name / s.stage
    settings = {k: v for k, v in asdict(s).items() if k not in FREE}
    same_or_refuse(folder, settings)
    parts = inputs(s, device)

    # ---- data
    if s.data and not row.needs:
        raise BadInput(f"--data: stage {s.stage} knows the embedded world only")
    if not s.data and not row.content:
        raise BadInput(f"--data: stage {s.stage} of preset {s.preset} needs a file of samples")
    split = s.stage if row.content != "preferences" else "preferences"      # sft and dpo share it
    dataset = (data.Records(s.data, s.image_root) if s.data else
               data.World(row.content, split, s.samples))
    held_out = (data.Records(s.eval_data, s.image_root) if s.eval_data else
                None if s.data else data.World(row.content, s.split, 512))
    for d in (dataset, held_out):
        if row.objective == "dpo" and isinstance(d, data.Records) and not d.preferences:
            raise BadInput(f"{d.file}: has no \"rejected\"; stage dpo needs preferences")
    hashes = {part: hash_weights(at) for part, at in parts.items()}
    if "llm" not in parts and first():
        data.train_tokenizer(folder / "tokenizer")
    dist.barrier()
    tokenizer = data.Tokenizer(parts.get("llm", folder / "tokenizer"))
    settings["inputs"] = {"data": dataset.fingerprint(), "tokenizer": hash_file(tokenizer.file),
                          **hashes}
    if same_or_refuse(folder, settings):
        say((folder / "report.md").read_text())
        return say(f"{folder}: done before with the same settings and inputs, nothing to do")
    if first():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "settings.json", settings)
    dist.barrier()

    # ---- model
    llm = LLMConfig(vocab_size=len(tokenizer))
    if s.stage == "encoder":
        text = Decoder(replace(llm, num_hidden_layers=2))
        model = initialise(SigLIP(Encoder(EncoderConfig(), select_layer=0), text), s.seed)
    elif s.stage == "llm":
        model = initialise(MLLM(None, None, Decoder(llm)), s.seed)
    else:
        model = load_model(parts["encoder"], parts.get("projector"), parts["llm"], s.select_layer,
                           s.seed)
    before = full_state(model) if first() else None
    freeze(model.to(device), row)

    # ---- train
    encoder = model.encoder.config if model.encoder else EncoderConfig()
    prepare = data.Prepare(tokenizer, s.template, encoder, s.max_length,
                           responses=2 if row.objective == "dpo" else 1)

    def in_steps(samples, epochs=1, steps=None):
        steps = steps or math.ceil(epochs * len(samples) / s.batch)
        return data.Steps(samples, prepare, steps, s.batch, s.micro_batch, s.seed,
                          dist.get_rank(), dist.get_world_size())

    pairs, held_out = held_out, held_out if s.eval_every else None
    references = None, None
    if row.objective == "dpo":
        live = functools.partial(reference_logps, shard(frozen(model)),
                                 probe.autocast(device, s.dtype))
        references = live, live
        if s.reference == "cached":
            references = [d and cached(live, in_steps(d), folder / file,
                                       settings | {"samples": d.fingerprint()}, device)
                          for d, file in ((dataset, "reference.safetensors"),
                                          (held_out, "reference_held_out.safetensors"))]
        del live
    objective = {"contrastive": contrastive_objective, "sft": sft_objective,
                 "dpo": functools.partial(dpo_objective, beta=s.beta, variant=s.loss)}
    train(s, objective[row.objective], folder, shard(model),
          in_steps(dataset, s.epochs, s.steps if not s.epochs else None),
          held_out and in_steps(held_out), references, device)

    # ---- the folders it leaves, and its tables
    after, report = full_state(model), [f"# {s.name}/{s.stage}"]
    if first():
        has = {part: part in LEAVES.get(s.stage, ALL) for part in ALL}
        save_model(folder, after, has["encoder"] and encoder, has["projector"],
                   has["llm"] and model.llm.config, tokenizer)
        probe.curve(folder / "log.jsonl", folder / "curve.png")
        report += [probe.moved(before, after)]
    dist.barrier()
    del model, references
    if s.stage in ("instruct", "sft", "dpo", "pivot"):
        report += measure(s, folder, parts, pairs, prepare, device)
    if first():
        (folder / "report.md").write_text("\n\n".join(report) + "\n")
        write_json(folder / "settings.json", settings | {"finished": True})
    dist.barrier()
    say("\n\n".join(report) + f"\n\n{folder}: done")


def measure(s, folder, parts, pairs, prepare, device):
    """Tables of the model that the stage left, beside the one that it started from: questions and
    pairs about the world's held-out scenes, or a user's held-out pairs."""
    questions = None
    if not s.data:
        pairs = data.World("preferences", s.split, 4 * s.eval_scenes)
        questions = data.World("questions", s.split, len(data.CATEGORY) * s.eval_scenes)
    elif not pairs or not pairs.preferences:
        return []
    setup = {k: getattr(s, k) for k in ("split", "template", "max_length", "select_layer", "dtype",
                                        "eval_scenes")}
    results, after = {}, {part: str(folder / part) for part in ALL}
    for side, at in {"before": parts, "after": after}.items():
        home = {Path(v).parent for v in at.values()}
        file = home.pop() / "results.json"      # a base is measured once, not by all who use it
        known = json.loads(file.read_text()) if file.exists() and not home and not s.data else {}
        if side == "before" and s.stage not in ("sft", "dpo"):
            continue
        if side == "before" and known.get("setup") == setup:
            results[side] = known["results"]
        else:
            results[side] = probe.evaluate(at, s.select_layer, pairs, questions, prepare, device,
                                           s.dtype)
    if first() and not s.data:
        write_json(folder / "results.json", {"setup": setup, "results": results["after"]})
    return probe.tables(results, s.beta)


# ---------------------------------------------------------------------------- chat, command line

def chat(s, device):
    """Answer questions about a picture."""
    home = Path(s.runs) / s.name
    found = [home / stage for stage in ("dpo", "sft", "instruct") if finished(home / stage)]
    at = Path(s.model) if s.model else found[0] if found else home / "dpo"
    if not (at / "llm").is_dir():
        raise BadInput(f"{at}: no model there yet; run --stage dpo first, or name one with --model")
    if (at / "settings.json").exists():         # speak to it as it was trained
        made = json.loads((at / "settings.json").read_text())
        s = replace(s, **{k: made[k] for k in ("template", "select_layer", "max_length")})
    model = load_model(at / "encoder", at / "projector", at / "llm", s.select_layer).to(device)
    tokenizer = data.Tokenizer(at / "llm")
    prepare = data.Prepare(tokenizer, s.template, model.encoder.config, s.max_length, responses=1)
    for question in [s.question] if s.question else map(str.strip, sys.stdin):
        image = Path(s.image) if s.image else None
        batch = prepare([data.Sample(s.image or "chat", image, [(question, None)])])
        with probe.autocast(device, s.dtype):
            ids, = model.generate(batch.to(device), prepare.end, max_new=128)
        say(tokenizer.decode(ids))


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Settings):
        text = f.metadata["help"]
        if "(default" not in text:
            text += f" (default: {'see below' if f.default is None else f.default})"
        parser.add_argument("--" + f.name.replace("_", "-"), type=f.type, default=f.default,
                            choices=f.metadata["choices"], help=text)
    columns = [f.name for f in fields(Stage) if f.name not in ("needs", "trains")]
    rows = [["stage", *columns]] + [[name, *(str(getattr(row, c)) for c in columns)]
                                    for name, row in WORLD.items()]
    parser.epilog = "the stages of preset world:\n" + "\n".join(
        "  " + " ".join(cell.ljust(12) for cell in row) for row in rows)
    return Settings(**vars(parser.parse_args(argv)))


def main(argv=None):
    asked = arguments(argv)
    device = setup()
    try:
        s = resolve(asked)
        (chat if s.stage == "chat" else run_stage)(s, device)
    except BadInput as error:
        print(f"pivot: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
