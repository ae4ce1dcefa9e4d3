"""PIVOT: train a vision encoder under an LLM head, with SFT or with DPO, and see what changed.

    torchrun pivot.py --stage dpo                                 all the way, on the embedded world
    torchrun pivot.py --stage dpo --name mine --data pairs.jsonl  the same on your preference pairs
    torchrun pivot.py --stage chat --image some.png --question "what color is top left"

Stages, each from the one before it: encoder, llm -> align -> lookup -> instruct -> sft | dpo.
Those that a stage needs and that are not there yet are run first. pivot-align -> pivot puts the
encoder that --encoder names, frozen, under a fresh projector and LLM.
"""
import argparse
import datetime
import functools
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
import probe
from data import TEMPLATES, BadInput
from dpo import cached, dpo_objective, frozen, reference_logps, sampled_pairs
from model import (MLLM, Decoder, DecoderLayer, Encoder, EncoderConfig, EncoderLayer, LLMConfig,
                   Projector, SigLIP, export_llava, hash_file, hash_weights, initialise, load_model,
                   read_encoder_config, read_llm_config, read_weights, save_model, write_json,
                   writing)
from sft import sft_objective


def contrastive_objective(model, batch):
    """SigLIP's loss: -log sigmoid(z * logit), z = 1 for a picture and its caption, else -1. The
    wrong captions are the micro-batch's: only here the split of a batch matters."""
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
    optimizer: str      # muon: Muon for matrices in the blocks (lr), AdamW for the rest (lr / 10)
    epochs: float = 0   # passes over the data, instead of steps
    checkpointing: bool = False


ALL = ("encoder", "projector", "llm")
WORLD = {
    "encoder": Stage((), ALL[:1], "contrastive", "captions", 32000, 100, 128, .015, .015, "muon"),
    "llm": Stage((), ALL[2:], "sft", "text", 32000, 60, 32, .015, 0, "muon"),
    "align": Stage(("encoder", "llm"), ALL[1:2], "sft", "captions", 32000, 50, 32, .015, 0, "muon"),
    "lookup": Stage(("align",), ALL, "sft", "lookup", 32000, 200, 32, .015, .0015, "muon"),
    "instruct": Stage(("lookup",), ALL, "sft", "instruct", 64000, 800, 32, .015, .0015, "muon"),
    "sft": Stage(("instruct",), ALL, "sft", "preferences", 4096, 256, 16, 1e-3, 1e-3, "adamw"),
    "dpo": Stage(("instruct",), ALL, "dpo", "preferences", 4096, 256, 16, 3e-5, 3e-5, "adamw"),
    "pivot-align": Stage(("encoder", "llm"), ALL[1:], "sft", "lookup", 32000, 100, 32, .015, 0,
                         "muon"),
    "pivot": Stage(("pivot-align",), ALL[1:], "sft", "instruct", 64000, 200, 32, .015, .0015,
                   "muon"),
}
PAPER = {   # the appendix's hyper-parameters; every stage takes its data from --data
    "align": Stage(("encoder", "llm"), ALL[1:2], "sft", "", 0, 0, 256, 1e-3, 0, "adamw", 1, True),
    "instruct": Stage(("align",), ALL, "sft", "", 0, 0, 256, 1e-5, 2e-6, "adamw", 1, True),
    "sft": Stage(("instruct",), ALL, "sft", "", 0, 0, 256, 5e-6, 5e-6, "adamw", 3, True),
    "dpo": Stage(("instruct",), ALL, "dpo", "", 0, 0, 256, 1e-6, 1e-6, "adamw", 3, True),
    "pivot-align": Stage(("encoder", "llm"), ALL[1:2], "sft", "", 0, 0, 256, 1e-3, 0, "adamw", 1,
                         True),
    "pivot": Stage(("pivot-align",), ALL[1:], "sft", "", 0, 0, 256, 1e-5, 2e-6, "adamw", 1, True),
}
PRESETS = {"world": WORLD, "paper": PAPER,
           "toy": {k: replace(row, samples=64, steps=4, batch=8) for k, row in WORLD.items()}}
PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}      # FLOP/s, see meter
SIZES = {"small": (64, 2, 4), "base": (128, 4, 4), "large": (192, 6, 6)}   # width, layers, heads
LEAVES = {"encoder": ALL[:1], "llm": ALL[2:]}   # what a stage writes, if not all three parts


def option(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Settings:
    """The command line. None: the stage's row in the table decides."""
    stage: str = option("dpo", "what to run", [*WORLD, "probe", "gradients", "chat"])
    name: str = option(None, "of the run, written to RUNS/NAME/STAGE (default: the preset)")
    base: str = option(None, "run whose earlier stages this one starts from (default: the preset)")
    runs: str = option("runs", "folder of all runs")
    preset: str = option("world", "table of stages; toy: a few steps each, for tests", [*PRESETS])
    seed: int = option(0, "seed of initialisation and sample order")
    encoder: str = option(None, "start from this encoder folder (default: the earlier stage's)")
    projector: str = option(None, "the same for the projector (default: the earlier stage's)")
    llm: str = option(None, "the same for the LLM (default: the earlier stage's)")
    encoder_config: str = option(None, "JSON files' folder, for an encoder in LLaVA's own layout")
    image_size: int = option(None, "pixels a side; positions are interpolated (default: as is)")
    data: str = option(None, "JSON or JSONL of conversations or preferences (default: the world)")
    eval_data: str = option(None, "the same, held out (default: the world's held-out scenes)")
    image_root: str = option(None, "where image paths start (default: the data file's folder)")
    questions: str = option(None, "JSONL of questions, answers, category, metric: for evaluation")
    take: int = option(None, "so many samples of --data, after a seeded shuffle")
    max_prompt_chosen: int = option(None, "most tokens in prompt and chosen of a sample of --data")
    on_bad_sample: str = option("stop", "of --data; skip: go on, and list them", ["stop", "skip"])
    samples: int = option(None, "distinct samples of the world")
    wording: str = option("free", "of the world's descriptions: free; a pair's two apart; terse", [
        "free", "apart", "terse"])
    errors: float = option(.2, "share of chosen descriptions with an error of their own (world)")
    pairs: str = option("mixed", "world: drawn; sampled from the model that the stage starts from, "
                        "where two responses differ in quality; half each", [
                            "drawn", "sampled", "mixed"])
    encoder_size: str = option("base", "of the encoder that the world's stage makes", [*SIZES])
    llm_size: str = option("base", "of the LLM that the world's stage makes", [*SIZES])
    steps: int = option(None, "optimiser steps")
    epochs: float = option(None, "passes over the data (default: as many as --steps make)")
    batch: int = option(None, "samples per step, over all ranks and micro-batches")
    micro_batch: int = option(None, "samples per forward pass and rank (default: all at once)")
    lr: float = option(None, "peak learning rate")
    encoder_lr: float = option(None, "peak learning rate of the vision encoder")
    projector_layers: int = option(0, "pivot: reuse so many of the encoder's projector", [0, 1])
    unfreeze: bool = option(False, "pivot: train the encoder, too")
    optimizer: str = option(None, "adamw; or muon, for hidden matrices", ["adamw", "muon"])
    warmup: float = option(.03, "share of the steps that warm up; a cosine to zero follows")
    clip: float = option(1., "gradient norm above which gradients are scaled down")
    beta: float = option(.1, "DPO's pull towards the reference")
    loss: str = option("dpo", "preference loss", ["dpo", "ipo"])
    reference: str = option("cached", "computed once, or live in every step", ["cached", "live"])
    max_length: int = option(2048, "tokens per response with its prompt and image")
    template: str = option(None, "of chats (default: the LLM's; align: caption; world: plain)", [
        *TEMPLATES])
    select_layer: int = option(-2, "layer that the projector sees, as in LLaVA; 0: run them all")
    dtype: str = option("auto", "compute in; auto: bfloat16 where the machine has it", [
        "auto", "bfloat16", "float32"])
    checkpointing: bool = option(None, "keep only the inputs of blocks: slower, smaller")
    compile: bool = option(False, "torch.compile every transformer block")
    attention: str = option("auto", "auto: bf16 on CUDA: FlexAttention, or causal flash attention "
                            "where that is enough; sdpa: dense masks", ["auto", "sdpa"])
    export_dtype: str = option("float32", "of the folders; bfloat16 rounds most of DPO away", [
        "float32", "bfloat16"])
    export: str = option(None, "also write the model as one folder for transformers", ["llava"])
    workers: int = option(None, "processes that prepare batches (default: 4 for paper, else 0)")
    save_every: int = option(200, "steps between saves for resuming")
    eval_every: int = option(0, "steps between looks at held-out samples; 0: none")
    split: str = option("test", "of the tables; settings: on validation", ["validation", "test"])
    eval_scenes: int = option(200, "scenes of the final tables: 13 questions, 4 pairs each")
    dry_run: bool = option(False, "print what the stage will cost, and stop")
    gpus: int = option(8, "dry run: how many")
    utilisation: float = option(.5, "dry run: model FLOPs over the peak of an H100 or H200")
    image: str = option(None, "chat: a picture (default: none)")
    question: str = option(None, "chat: a question (default: read them from standard input)")
    model: str = option(None, "chat: a stage's folder (default: the run's dpo, sft or instruct)")


# handed on to the earlier stages that a stage has to run first
SHARED = ("runs", "preset", "seed", "wording", "encoder_config", "image_size", "encoder_size",
          "llm_size", "max_length", "template", "select_layer", "dtype", "workers", "eval_scenes")
# may change between a run and its continuation; settings that name files count by their content
FREE = ("name", "base", "runs", "encoder", "projector", "llm", "data", "eval_data", "questions",
        "image_root", "on_bad_sample", "micro_batch", "workers", "save_every", "eval_every",
        "image", "question", "model", "export", "checkpointing", "compile", "attention", "dry_run",
        "gpus", "utilisation")


def resolve(s):
    """Fill in what the command line left open."""
    workers = s.workers if s.workers is not None else 4 * (s.preset == "paper")
    s = replace(s, name=s.name or s.preset, base=s.base or s.preset, workers=workers)
    if s.dtype == "auto":
        cuda = torch.cuda.is_available()
        bf16 = (torch.cuda.is_bf16_supported(False) if cuda else        # not merely emulated
                torch.cpu._is_avx512_bf16_supported())
        s = replace(s, dtype="bfloat16" if bf16 else "float32")
    if s.stage in ("probe", "gradients") and dist.get_world_size() > 1:
        raise BadInput(f"--stage {s.stage}: one process does it; give torchrun no more")
    if (s.take or s.max_prompt_chosen) and not s.data:
        raise BadInput("--take, --max-prompt-chosen: of which file? name it with --data")
    if s.stage in ("chat", "probe", "gradients") and not s.dry_run:
        return s
    if s.stage not in PRESETS[s.preset]:
        raise BadInput(f"--stage {s.stage}: preset {s.preset} has no such stage" +
                       " with a price" * s.dry_run)
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
    hours = datetime.timedelta(hours=2)     # the others wait while the first one writes and hashes
    dist.init_process_group("nccl" if cuda else "gloo", timeout=hours, **alone)
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def first():
    """Is this the process that writes and speaks?"""
    return dist.get_rank() == 0


def say(text):
    if first():
        print(text, flush=True)


def shard(model, s, train=True):
    """FSDP2: a unit per transformer block, gathered in what it computes in; gradients meet in fp32.
    Embeddings and head, which may be tied, are the root's unit, which stays fp32, as do residuals
    and the arithmetic of norms. One process keeps plain tensors: on a CPU DTensor's bookkeeping
    costs more than 5%."""
    half = torch.bfloat16 if s.dtype == "bfloat16" else None
    policy = MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False)
    idle = model.encoder.unused() if model.encoder else ()      # never gathered: the root's, too
    for block in [m for m in model.modules()
                  if isinstance(m, (EncoderLayer, DecoderLayer)) and m not in idle]:
        if s.compile:                       # the code is the same in all blocks: compiled once
            block.forward = torch.compile(block.forward, dynamic=True)
        if s.checkpointing and train:       # keep a block's input, compute the rest again
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if dist.get_world_size() > 1:
            fully_shard(block, mp_policy=policy)
    if dist.get_world_size() > 1:
        fully_shard(model)
    return model


def full(tensor):
    """The whole of a tensor that may be sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state(model):
    """{name: whole tensor on the CPU} in the first process; the others help, and keep nothing."""
    state = {}
    for name, tensor in model.state_dict().items():
        tensor = full(tensor).detach()
        if first():
            state[name] = tensor.cpu().clone()
    return state


def schedule(step, steps, warmup):
    """The factor on the peak learning rate: linear warm-up, then a cosine to zero."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return .5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def freeze(model, row, reused=0):
    """Only the parts that the stage trains get gradients, and of the encoder only what runs.
    reused: first layers of the projector that stay as they are."""
    for name, module in model.named_children():
        module.requires_grad_(name in row.trains or row.objective == "contrastive")
    if reused:
        model.projector[0].requires_grad_(False)
    for module in model.encoder.unused() if model.encoder else ():
        module.requires_grad_(False)


def make_optimizers(model, s):
    """AdamW; or Muon for the matrices inside the blocks and AdamW, a tenth as fast, for the rest.
    The encoder has a learning rate of its own. peak: a group's, which `schedule` scales."""
    kinds = {torch.optim.Muon: {}, torch.optim.AdamW: {}}
    for name, p in model.named_parameters():
        if p.requires_grad:
            encoder = name.startswith("encoder.")
            matrix = s.optimizer == "muon" and p.ndim == 2 and ".layers." in name
            scale = .1 if s.optimizer == "muon" and not matrix else 1
            rate = scale * (s.encoder_lr if encoder else s.lr)
            kinds[torch.optim.Muon if matrix else torch.optim.AdamW].setdefault(
                encoder, {"params": [], "lr": rate, "peak": rate})["params"].append(p)
    return [make(groups.values(), weight_decay=0) for make, groups in kinds.items() if groups]


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
    try:
        dcp.save(resume_state(model, optimizers), checkpoint_id=final.with_suffix(".tmp"),
                 no_dist=dist.get_world_size() == 1)
    except (OSError, dcp.api.CheckpointException) as error:
        error = [e for e, _ in getattr(error, "failures", {0: (error, 0)}).values()][0]
        raise BadInput(f"{final}: cannot be saved ({str(error):.300}); the save before it is "
                       "whole: make room and start the same command again") from None
    if first():
        os.replace(final.with_suffix(".tmp"), final)
        for _, path in old:
            shutil.rmtree(path)


def load_resume(folder, model, optimizers, log):
    """Go on from the last save, if there is one; forget what was logged after it. Returns how many
    steps are done."""
    start, save = [(0, None), *saves(folder)][-1]
    try:
        if save:
            dcp.load(resume_state(model, optimizers), checkpoint_id=save,
                     no_dist=dist.get_world_size() == 1)
    except (Exception, dcp.api.CheckpointException) as error:   # a damaged file raises anything
        raise BadInput(f"{save}: is damaged ({type(error).__name__}); remove it to start the stage "
                       "again") from None
    if first():
        with writing(log):                      # all of it is whole, the last line perhaps not
            lines = log.read_text().splitlines() if log.exists() else []
            log.write_text("".join(f"{line}\n" for line in lines[:start]))
    return start


def read_settings(folder):
    file = folder / "settings.json"
    try:
        return dict(json.loads(file.read_text())) if file.exists() else {}
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise BadInput(f"{file}: cannot be read ({error}); restore it, or remove the "
                       "folder") from None


def finished(folder):
    return read_settings(folder).get("finished", False)


def same_or_refuse(folder, settings):
    """True if this very run is finished, False if it is new or unfinished; an error if another is
    there under its name."""
    old = read_settings(folder)
    old, settings = (d.get("inputs", {}) | d for d in (old, settings))      # each by its own name
    for key, value in settings.items():
        if old and old.get(key) != json.loads(json.dumps(value)):
            raise BadInput(f"{folder}: was made with {key} = {old.get(key)}, now {value}; choose "
                           f"another --name, or remove the folder")
    return finished(folder)


def meter(sums, seconds, waited, device):
    """Speed of a step over all ranks: what log.jsonl keeps of it. Model FLOPs, see probe.flops;
    utilisation (mfu) against the datasheet's dense bf16 peak; waiting: share of time for data."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else ""
    peak = next((v for k, v in PEAK.items() if k in re.split(r"\W", name)), None)
    rate = sums["flops"] / seconds / dist.get_world_size()
    unit = 1 if sys.platform == "darwin" else 1024          # of maxrss, bytes
    memory = (torch.cuda.max_memory_allocated() if cuda else
              resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    return {"samples_per_s": sums["samples"] / seconds, "tokens_per_s": sums["tokens"] / seconds,
            "flops": sums["flops"], "tflops": rate / 1e12, **({"mfu": rate / peak} if peak else {}),
            "peak_gb": memory / 2 ** 30, "waiting": waited / seconds}


# ----------------------------------------------------------------------------- the training loop

class Stopped(Exception):
    """The run was asked to stop, and has saved all it needs to go on."""


SUMS = "loss", "count", "samples", "tokens", "flops", "stop", "no_target"   # and the metrics


def train(s, objective, folder, model, steps, held_out, references, device):
    """A stage's loop: fetch, forward, backward, clip, step, log, save. Interrupted, it goes on
    from its last save. steps[k] are the micro-batches of this rank for step k. references: for DPO
    two functions batch -> (samples, 2), for the steps and for what is held out."""
    stop = []                                   # a signal asks: finish the step, save, leave
    handlers = {number: signal.signal(number, lambda *_: stop.append(1))
                for number in (signal.SIGTERM, signal.SIGINT)}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    trains = {name.split(".")[0] for name in trained}
    optimizers, log = make_optimizers(model, s), folder / "log.jsonl"
    start = load_resume(folder, model, optimizers, log)

    def forward(batch, reference):
        """Loss summed over a micro-batch; numbers to add up over micro-batches and ranks."""
        lengths = batch.sample[batch.sample >= 0].bincount().tolist()
        work = probe.flops(model, lengths, len(batch.target), trains, batch.images)
        batch = batch.to(device)
        if reference:
            batch.ref = reference(batch)
        with probe.autocast(device, s.dtype):   # bf16 over fp32 master weights; loss in fp32
            loss, count, metrics = objective(model, batch)
        weight = 0. if batch.dummy else 1.
        no_target = len(batch) - len((batch.response // batch.responses).unique())
        sums = dict(zip(SUMS, (loss.detach(), count, len(batch), sum(lengths), work, len(stop),
                               no_target))) | metrics
        return loss * weight, {k: weight * float(v) for k, v in sums.items()}

    def total(parts):
        """Dicts of numbers added up, over all ranks too; loss per count and metrics per sample."""
        sums = torch.tensor([list(p.values()) for p in parts], dtype=torch.float64).sum(0)
        dist.all_reduce(sums := sums.to(device))
        sums = dict(zip(parts[0], sums.tolist()))
        means = {k: v / sums["samples"] for k, v in sums.items() if k not in SUMS}
        return {"loss": sums["loss"] / max(1, sums["count"]), **means}, sums

    loader = torch.utils.data.DataLoader(steps, batch_size=None, sampler=range(start, len(steps)),
                                         num_workers=s.workers, pin_memory=device.type == "cuda")
    bar = tqdm(loader, s.stage, len(steps), initial=start, unit="step", disable=not first(),
               dynamic_ncols=True)
    clock, bad = time.perf_counter(), 0
    for step, batches in enumerate(bar, start):
        # ---- forward and backward
        waited, parts = time.perf_counter() - clock, []
        for k, batch in enumerate(batches):
            if isinstance(model, FSDPModule):       # gradients meet once a step
                model.set_requires_gradient_sync(k == len(batches) - 1)
            loss, sums = forward(batch, references[0])
            loss.backward()
            parts.append(sums)
        means, sums = total(parts)
        if step == 0 and references[0]:             # rewards are beta * (logps - ref): zero so far
            drift = max(abs(means["chosen"]), abs(means["rejected"])) / s.beta
            if drift > {"float32": .01, "bfloat16": 1.}[s.dtype]:
                raise BadInput(f"{folder}: before the first step policy and reference differ by "
                               f"{drift:.3g} nats: the reference is not the model that trains")
        if lost := [name for name, p in trained.items() if p.grad is None]:
            raise BadInput(f"{folder}: {', '.join(lost)[:300]} got no gradient: no loss reaches it")

        # ---- clip and step. Gradients are of a sum, averaged over ranks by FSDP: make them the
        # step's mean, however it is split
        scale = dist.get_world_size() / max(1, sums["count"])
        torch._foreach_mul_([p.grad for p in trained.values()], scale)
        norm = float(full(torch.nn.utils.clip_grad_norm_(trained.values(), s.clip)))
        bad = 0 if math.isfinite(means["loss"]) and math.isfinite(norm) else bad + 1
        rate = schedule(step, len(steps), s.warmup)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            if not bad:                             # a step that is not finite is skipped
                optimizer.step()
            optimizer.zero_grad()

        # ---- log
        seconds, clock = time.perf_counter() - clock, time.perf_counter()
        line = {"step": step, **means, "grad_norm": norm, "lr": s.lr * rate, "skipped": bad,
                "no_target": int(sums["no_target"]), **meter(sums, seconds, waited, device)}
        if s.eval_every and (step + 1) % s.eval_every == 0:
            with torch.no_grad():
                line["held_out"] = total([forward(batch, references[1])[1] for k in
                                          range(len(held_out)) for batch in held_out[k]])[0]
            if isinstance(model, FSDPModule):       # the root waits for a backward pass: none comes
                model.reshard()
        if first():
            with writing(log), open(log, "a") as f:
                f.write(json.dumps(line) + "\n")
            bar.set_postfix_str(f"loss {means['loss']:.3f}, {line['samples_per_s']:.0f} samples/s, "
                                f"{line['tflops']:.2g} TFLOP/s", refresh=False)
        if bad == 3:
            index = data.shuffled(step, s.batch, len(steps.data), s.seed)
            raise BadInput(f"{folder}: loss or gradient not finite in steps {step - 2} to {step}; "
                           f"look at the samples {', '.join(steps.data[i].id for i in index)} or "
                           f"lower --lr; {folder / 'train'} holds the last good save")

        # ---- save
        if (step + 1) % s.save_every == 0 or step + 1 == len(steps) or sums["stop"]:
            save_resume(folder, step + 1, model, optimizers)
        if sums["stop"] and step + 1 < len(steps):
            raise Stopped(f"{folder}: stopped after step {step + 1} of {len(steps)}, all saved; "
                          "the same command goes on from there")
    for number, handler in handlers.items():
        signal.signal(number, handler)


# ------------------------------------------------------------------------------------- one stage

def inputs(s, device, dry=False):
    """{part: folder} that the stage starts from. Runs the earlier stages that are missing, unless
    it is a dry run."""
    given = {part: getattr(s, part) for part in ALL if getattr(s, part)}
    for need in PRESETS[s.preset][s.stage].needs:
        made = [part for part in LEAVES.get(need, ALL) if part not in given]
        home = s.name if s.stage == "pivot" else s.base     # pivot's alignment is for its encoder
        earlier = Path(s.runs) / home / need
        if made and not dry and not finished(earlier):
            if need not in PRESETS[s.preset]:
                raise BadInput(f"--{made[0]}: name a folder; preset {s.preset} does not make one")
            say(f"{s.stage} needs {need}, which is not there yet")
            shared = {k: getattr(s, k) for k in SHARED}
            if s.stage == "pivot":
                shared |= {"encoder": s.encoder, "projector_layers": s.projector_layers}
            run_stage(resolve(Settings(stage=need, name=home, base=s.base, **shared)), device)
        given |= {part: str(earlier / part) for part in made}
    return given


def stage_row(s):
    """The stage's row in the table; --unfreeze changes it."""
    row = PRESETS[s.preset][s.stage]
    return replace(row, trains=ALL) if s.unfreeze and s.stage == "pivot" else row


def training_data(s, row):
    """What a stage trains on: the user's file, or the world."""
    if s.data and not row.needs:
        raise BadInput(f"--data: stage {s.stage} knows the embedded world only")
    if not s.data and not row.content:
        raise BadInput(f"--data: stage {s.stage} of preset {s.preset} needs a file of samples")
    if s.data:
        return data.Records(s.data, s.image_root, s.on_bad_sample == "skip")
    split = s.stage if row.content != "preferences" else "preferences"      # sft and dpo share it
    return data.World(row.content, split, s.samples, s.wording, s.errors, first=s.seed * 1_000_000)


def must_be_pairs(*datasets):
    for d in datasets:
        if isinstance(d, data.Records) and not d.preferences:
            raise BadInput(f"{d.file}: has no \"rejected\"; DPO needs preferences")


def preparation(s, row, parts, dataset, folder):
    """How the stage makes batches; what --take and others leave out leaves the data set. folder:
    where a tokenizer is made if no LLM is among the parts."""
    words = parts.get("llm") or folder / "tokenizer"
    if "llm" not in parts and first():
        data.train_tokenizer(words)
    dist.barrier()
    tokenizer = data.Tokenizer(words)
    if "encoder" in parts:
        encoder = read_encoder_config(parts["encoder"], s.image_size, s.encoder_config)
    else:
        width, depth, heads = SIZES[s.encoder_size]
        encoder = EncoderConfig(width, 4 * width, depth, heads)
    template = s.template or ("plain" if s.preset != "paper" else "caption" if
                              s.stage.endswith("align") else data.choose_template(parts["llm"]))
    if "llm" in parts:
        tokenizer.check(read_llm_config(parts["llm"]).vocab_size, template)
    prepare = data.Prepare(tokenizer, template, encoder, s.max_length,
                           responses=2 if row.objective == "dpo" else 1,
                           pack=row.objective != "contrastive")
    if s.take or s.max_prompt_chosen:
        dataset.select(prepare, s.take, s.seed, s.max_prompt_chosen)
    return prepare


def kept(c, layers, checkpointing=False):
    """Bytes of activations that layers keep of a token for the backward pass: of each fp32 channel
    of the residuals the input alone, or all that a layer keeps (one at a time is computed again).
    Channels count 24 (LLM: 31) bytes, those of the MLP 4 (8): tests/test_pivot.py measures them."""
    width, inner = (31, 8) if isinstance(c, LLMConfig) else (24, 4)
    layer = width * c.hidden_size + inner * c.intermediate_size
    return 4 * c.hidden_size * layers + layer if checkpointing else layer * layers


def dry_run(s, device):
    """--dry-run: the price of a stage from its configs and 200 of its samples; nothing is trained.

    Memory per GPU: weights, gradients and AdamW's moments in fp32 (16 bytes a trained parameter, 4
    a frozen one), sharded; and what layers keep of a token in bf16, where attention keeps no
    scores: see `kept`."""
    row, parts = stage_row(s), inputs(s, device, dry=True)
    if not parts:
        raise BadInput(f"--dry-run: stage {s.stage} starts from nothing, see the others")
    dataset, paired = training_data(s, row), row.objective == "dpo"
    prepare = preparation(s, row, parts, dataset, None)
    encoder, llm = prepare.encoder, read_llm_config(parts["llm"])
    with torch.device("meta"):
        model = MLLM(Encoder(encoder, s.select_layer),
                     Projector(encoder.hidden_size, llm.hidden_size), Decoder(llm))
    freeze(model, row, s.projector_layers)
    some = [dataset[i] for i in range(0, len(dataset), math.ceil(len(dataset) / 200))]
    rows = [(prepare.row(x), x.image is not None) for x in some]

    def work(trains):
        return sum(probe.flops(model, [len(r.tokens)], sum(r.target), trains, seen)
                   for r, seen in rows) / len(rows)

    steps = math.ceil(s.epochs * len(dataset) / s.batch) or s.steps
    flops = (s.epochs * len(dataset) or steps * s.batch) * work(row.trains)
    flops += len(dataset) * paired * work(())           # the reference
    tokens = sum(len(r.tokens) for r, _ in rows) / len(rows)
    state = sum(p.numel() * (16 if p.requires_grad else 4) for p in model.parameters()) / s.gpus
    micro, layers = min(s.micro_batch, math.ceil(s.batch / s.gpus)), len(model.encoder.used())
    activations = micro * (encoder.tokens * kept(encoder, layers, s.checkpointing) +
                           tokens * kept(llm, llm.num_hidden_layers, s.checkpointing))
    hours = flops / (PEAK["H100"] * s.utilisation) / 3600
    pretraining = 40e9 * probe.flops(model, [], 0, ("encoder",), 1)
    say(probe.markdown(
        ["stage", "samples", "steps", "tokens a sample", "FLOPs", "of the encoder's pretraining",
         f"GB a GPU, {s.gpus} GPUs", f"GPU-hours at {s.utilisation:.0%}"],
        [[s.stage, len(dataset), steps, f"{tokens:.0f}", f"{flops:.2e}",
          f"{flops / pretraining:.4%}", f"{(state + activations) / 1e9:.1f}", f"{hours:.2f}"]]))


def run_stage(s, device):
    """Inputs, data, model, loop; then the folders that the stage leaves, and its tables."""
    row, folder = stage_row(s), Path(s.runs) / s.name / s.stage
    settings = {k: v for k, v in asdict(s).items() if k not in FREE and (k != "template" or v)}
    same_or_refuse(folder, settings)
    parts = inputs(s, device)
    if s.projector_layers and s.stage == "pivot-align":
        parts["projector"] = str(Path(parts["encoder"]).parent / "projector")

    # ---- data
    dataset = training_data(s, row)
    held_out = (data.Records(s.eval_data, s.image_root) if s.eval_data else
                None if s.data else data.World(row.content, s.split, 512))
    if row.objective == "dpo":
        must_be_pairs(dataset, held_out)
    if s.eval_every and not held_out:
        raise BadInput("--eval-every: needs held-out samples; name a file with --eval-data")
    questions = s.questions and data.Records(s.questions, s.image_root)
    prepare = preparation(s, row, parts, dataset, folder)
    tokenizer, encoder = prepare.tokenizer, prepare.encoder
    settings["inputs"] = {"data": dataset.fingerprint(), "tokenizer": hash_file(tokenizer.file),
                          **{part: hash_weights(at) for part, at in parts.items()}}
    settings["template"] = prepare.template
    if same_or_refuse(folder, settings):
        export(s, folder)
        text, asked = (folder / "report.md").read_text(), fingerprints(held_out, questions)
        if asked in ([], read_settings(folder).get("measured")):
            say(text)
            return say(f"{folder}: done before with the same settings and inputs, nothing to do")
        report = [text.partition("\n\nHeld-out ")[0].strip()]     # the same model, other tables
        return conclude(s, folder, report, settings, parts, held_out, questions, prepare, device)
    if first():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "settings.json", settings)
    dist.barrier()

    # ---- model
    def start():
        """The model before its first step: fresh, or read from its folders."""
        if s.stage == "encoder":
            text = Decoder(LLMConfig(len(tokenizer), num_hidden_layers=2))
            return initialise(SigLIP(Encoder(encoder, select_layer=0), text), s.seed)
        if s.stage == "llm":
            width, depth, n = SIZES[s.llm_size]
            llm = LLMConfig(len(tokenizer), width, 3 * width, depth - 1, 2 * n, n)
            return initialise(MLLM(None, None, Decoder(llm)), s.seed)
        model = load_model(parts["encoder"], parts.get("projector"), parts["llm"], s.select_layer,
                           s.seed, s.image_size, s.encoder_config)
        if s.projector_layers and s.stage == "pivot-align":
            initialise(model.projector[2], s.seed)      # the second layer is fresh
        return model

    # sharded before it is read: then no process ever holds the whole of a large model
    with torch.device("meta" if row.needs and dist.get_world_size() > 1 else "cpu"):
        model = start()
    report = [f"# {s.name}/{s.stage}", *(
        f"warning: {count} of {dataset.size} samples of {dataset.file} {what}"
        for what, count in getattr(dataset, "suspect", {}).items() if count)]
    if len(report) > 1:
        say("\n".join(report[1:]))
    freeze(model, row, s.projector_layers)
    trained = [n for n, p in model.named_parameters()       # noted before anything else can freeze
               if p.requires_grad and (s.encoder_lr if n.startswith("encoder.") else s.lr)]

    # ---- train
    if isinstance(dataset, data.World) and row.content == "preferences" and s.pairs != "drawn":
        dataset.sampled = on_policy(s, start, dataset, prepare, settings, device)

    def in_steps(samples, epochs=1):            # 0: not in epochs, but in steps
        steps = math.ceil(epochs * len(samples) / s.batch) or s.steps
        return data.Steps(samples, prepare, steps, s.batch, s.micro_batch, s.seed,
                          dist.get_rank(), dist.get_world_size(),
                          folder / "skipped.txt" if s.on_bad_sample == "skip" else None)

    pairs, held_out = held_out, held_out if s.eval_every else None
    references = None, None
    if row.objective == "dpo":
        reference = read_weights(shard(frozen(model), s, False), device)
        live = functools.partial(reference_logps, reference, probe.autocast(device, s.dtype))
        references = live, live
        if s.reference == "cached":
            references = [d and cached(live, in_steps(d), folder / file,
                                       settings | {"samples": d.fingerprint()}, device)
                          for d, file in ((dataset, "reference.safetensors"),
                                          (held_out, "reference_held_out.safetensors"))]
        del live, reference
    objective = {"contrastive": contrastive_objective, "sft": sft_objective,
                 "dpo": functools.partial(dpo_objective, beta=s.beta, variant=s.loss)}
    model = read_weights(shard(model, s), device)
    train(s, objective[row.objective], folder, model,
          in_steps(dataset, s.epochs), held_out and in_steps(held_out), references, device)

    # ---- the folders it leaves, and its tables
    after, skipped = full_state(model), folder / "skipped.txt"
    if skipped.exists():                            # ranks and workers wrote it, perhaps twice
        bad = sorted({*skipped.read_text().splitlines()})
        report += [f"{len(bad)} bad samples skipped:\n" + "\n".join(bad)]
    if first():
        before = start().state_dict()
        probe.check_moved(before, after, trained)
        save_model(folder, after, model, tokenizer, getattr(torch, s.export_dtype))
        export(s, folder)
        probe.curve(folder / "log.jsonl", folder / "curve.png")
        report += [probe.moved(before, after)]
        del before, after
    dist.barrier()
    del model, references
    conclude(s, folder, report, settings, parts, pairs, questions, prepare, device)


def fingerprints(*datasets):
    """Of those that are a user's files."""
    return [d.fingerprint() for d in datasets if isinstance(d, data.Records)]


def conclude(s, folder, report, settings, parts, pairs, questions, prepare, device):
    """Add tables to the report on what the stage left, and finish it."""
    if s.stage in ("instruct", "sft", "dpo", "pivot"):
        report += measure(s, folder, parts, pairs, questions, prepare, device)
    finish(folder, settings | {"measured": fingerprints(pairs, questions)}, report)


def finish(folder, settings, report):
    """Write the report; what settings.json then says is that all is there."""
    if first():
        (folder / "report.md").write_text("\n\n".join(report) + "\n")
        write_json(folder / "settings.json", settings | {"finished": True})
    dist.barrier()
    say("\n\n".join([*report, f"{folder}: done"]))


def export(s, folder):
    """--export llava. Any special token that text never makes can stand for a patch."""
    if s.export and first() and not (folder / s.export).exists():
        tokenizer = data.Tokenizer(folder / "llm")
        names = [t for t in ("<image>", "<|image_pad|>", "<|reserved_special_token_0|>", "<unk>")
                 if t in tokenizer.special]
        if not names:
            raise BadInput(f"{folder / 'llm'}: its tokenizer has no token to stand for the image")
        model = load_model(*(folder / part for part in ALL), s.select_layer)
        export_llava(folder / s.export, model, tokenizer.files, tokenizer.special[names[0]],
                     names[0], getattr(torch, s.export_dtype))


def on_policy(s, start, dataset, prepare, settings, device):
    """The sampled share of the world's preferences, kept for all who share the base model."""
    key = {k: settings[k] for k in ("inputs", "seed", "samples", "pairs", "template", "dtype")}
    key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    file = Path(s.runs) / s.base / "sampled" / f"{key}.json"
    if not file.exists():
        wanted = range(0, s.samples, 1 + (s.pairs == "mixed"))
        pairs = sampled_pairs(start().to(device), dataset, wanted, prepare, s.seed, device,
                              probe.autocast(device, s.dtype))
        if first():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, pairs)
        dist.barrier()
    pairs = json.loads(file.read_text())
    say(f"{len(pairs)} of {s.samples} pairs are the model's own")
    return {int(i): tuple(pair) for i, pair in pairs.items()}


def measure(s, folder, parts, pairs, questions, prepare, device):
    """Tables of the model that the stage left, beside the one that it started from: questions and
    pairs about the world's held-out scenes, or a user's held-out pairs and questions."""
    if not s.data:
        pairs = None if s.stage == "pivot" else data.World("preferences", s.split,
                                                           4 * s.eval_scenes)
        questions = questions or data.World("questions", s.split,
                                            len(data.World.asked) * s.eval_scenes)
    elif pairs and not pairs.preferences:
        pairs = None
    if not pairs and not questions:
        return []
    setup = {k: getattr(s, k) for k in ("split", "max_length", "select_layer", "dtype",
                                        "eval_scenes")}
    setup |= {"template": prepare.template, "image_size": prepare.encoder.image_size,
              "questions": fingerprints(questions)}

    def evaluated(parts, *loading):
        model = load_model(*(parts[part] for part in ALL), s.select_layer, s.seed, *loading)
        return probe.evaluate(model, pairs, questions, prepare, device, s.dtype)

    results, homes = {}, {Path(at).parent for at in parts.values()}
    if s.stage in ("sft", "dpo"):
        file = homes.pop() / "results.json"     # a base is measured once, not by all who use it
        known = json.loads(file.read_text()) if file.exists() and not homes and not s.data else {}
        results["before"] = (known["results"] if known.get("setup") == setup else
                             evaluated(parts, s.image_size, s.encoder_config))
    results["after"] = evaluated({part: folder / part for part in ALL})
    if first() and not s.data:
        write_json(folder / "results.json", {"setup": setup, "results": results["after"]})
    return probe.tables(results, s.beta)


def run_probe(s, device):
    """Every probe on every encoder of the run NAME and of runs NAME-..., side by side; and on that
    of the base model, if it is another run's."""
    runs, folder = Path(s.runs), Path(s.runs) / s.name / "probe"
    encoders = {f"{home.name[len(s.name) + 1:]} {stage}".strip(): str(home / stage / "encoder")
                for home in sorted(runs.glob(f"{s.name}*"))
                if home.name[len(s.name):][:1] in ("", "-")
                for stage in ("encoder", "instruct", "sft", "dpo") if finished(home / stage)}
    llm, base = runs / s.base / "llm", runs / s.base / "instruct"
    if s.base != s.name and finished(base):
        encoders = {"base": str(base / "encoder")} | encoders
    if not encoders or not finished(llm):
        raise BadInput(f"{runs}: no finished stage of {s.name}, or none of {s.base}: train one")
    settings = {k: getattr(s, k) for k in ("seed", "split", "select_layer")}
    settings |= {"inputs": {name: hash_weights(at) for name, at in encoders.items()}}
    if begun(folder, settings):
        return
    encoders = {name: (at,) if Path(at).parent.name == "encoder" else
                (at, str(Path(at).parent / "projector")) for name, at in encoders.items()}
    scenes = (60, 20, 60) if s.preset == "toy" else (1000, 300, 1000)
    results = probe.probes(encoders, llm=llm / "llm", select_layer=s.select_layer, seed=s.seed,
                           scenes=scenes, device=device, out=folder)
    write_json(folder / "results.json", {"probes": results})
    finish(folder, settings, [f"# {s.name}/{s.stage}", *probe.probe_tables(results)])


def run_gradients(s, device):
    """Gradient maps of SFT and DPO at the model that both start from: on the world's held-out pairs
    of this seed, worded in three ways; or on --data's first ones (pictures: no region is known)."""
    folder, row = Path(s.runs) / s.name / "gradients", PRESETS[s.preset]["dpo"]
    parts = inputs(replace(s, stage="dpo"), device)
    given = s.data and data.Records(s.data, s.image_root)
    must_be_pairs(given)
    prepare = preparation(s, row, parts, given, folder)
    prepare.pack = False
    settings = {k: getattr(s, k) for k in ("seed", "split", "errors", "select_layer", "beta",
                                           "eval_scenes", "template", "image_size")}
    settings |= {"inputs": {part: hash_weights(at) for part, at in parts.items()} |
                 {"data": given.fingerprint() if given else None}}
    if begun(folder, settings):
        return
    model = load_model(*(parts[part] for part in ALL), s.select_layer, s.seed, s.image_size,
                       s.encoder_config).to(device).requires_grad_(False)
    rows, kinds, most = [], [""] if given else ["one word", "object", "scene"], 5 * s.eval_scenes
    for wording in ["given"] if given else ["apart", "terse", "free"]:
        pairs = given or data.World("preferences", s.split, most, wording, s.errors,
                                    first=s.seed * 1000)
        samples = [x for i in range(min(len(pairs), most)) if (x := pairs[i]).image is not None]
        if not samples:
            raise BadInput(f"{s.data}: no picture in its first {most} samples")
        maps, found = probe.gradient_maps(model, samples, prepare, device, s.beta,
                                          s.micro_batch or (1 if given else 32))
        rows += [line | {"wording": wording} for line in found]
    for kind in kinds:
        shown = [r["sample"] for r in found if r["answer"] == kind][:3] if kind else range(
            min(len(samples), 12))
        file = folder / ("-".join(["gradients", *kind.split()]) + ".png")
        probe.gradient_picture([samples[i] for i in shown], prepare.encoder, maps[list(shown)],
                               file)
    write_json(folder / "results.json", {"gradients": rows})
    finish(folder, settings, [f"# {s.name}/{s.stage}", *probe.gradient_tables(rows)])


def begun(folder, settings):
    """For what one process does. Was it done before with the same settings? Then say so."""
    if same_or_refuse(folder, settings):
        say((folder / "report.md").read_text())
        return True
    folder.mkdir(parents=True, exist_ok=True)


# ---------------------------------------------------------------------------- chat, command line

def chat(s, device):
    """Answer questions about a picture."""
    home = Path(s.runs) / s.name
    found = [home / stage for stage in ("dpo", "sft", "instruct") if finished(home / stage)]
    at = Path(s.model) if s.model else found[0] if found else home / "dpo"
    if not (at / "llm").is_dir():
        raise BadInput(f"{at}: no model there yet; run --stage dpo first, or name one with --model")
    made = read_settings(at)                    # speak to it as it was trained
    s = replace(s, **{k: made[k] for k in ("template", "select_layer", "max_length") if k in made})
    template = s.template or data.choose_template(at / "llm")
    model = load_model(at / "encoder", at / "projector", at / "llm", s.select_layer).to(device)
    tokenizer = data.Tokenizer(at / "llm")
    tokenizer.check(model.llm.config.vocab_size, template)
    prepare = data.Prepare(tokenizer, template, model.encoder.config, s.max_length, responses=1)
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
        kind = ({"action": argparse.BooleanOptionalAction} if f.type is bool else
                {"type": f.type, "choices": f.metadata["choices"]})
        parser.add_argument("--" + f.name.replace("_", "-"), help=text, default=f.default, **kind)
    columns = [f.name for f in fields(Stage) if f.name not in ("needs", "trains")]
    parser.epilog = "the stages of preset world:\n\n" + probe.markdown(["stage", *columns], [
        [name, *(str(getattr(row, c)) for c in columns)] for name, row in WORLD.items()])
    return Settings(**vars(parser.parse_args(argv)))


def main(argv=None):
    asked = arguments(argv)
    device = setup()
    try:
        s = resolve(asked)
        MLLM.kernels = s.attention == "auto"
        (dry_run if s.dry_run else
         {"chat": chat, "probe": run_probe, "gradients": run_gradients}.get(
             s.stage, run_stage))(s, device)
    except (BadInput, Stopped, KeyboardInterrupt) as error:
        print(f"pivot: {str(error) or 'interrupted; the same command goes on'}", file=sys.stderr)
        status = 1 if isinstance(error, BadInput) else 143
        if dist.get_world_size() > 1:       # the others may wait for this rank: leave, don't join
            os._exit(status)
        sys.exit(status)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
