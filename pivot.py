"""PIVOT: train a vision encoder under an LLM head, with SFT or with DPO, and see what the encoder learned.

    torchrun pivot.py --stage dpo                                    the whole way on the embedded world
    torchrun pivot.py --stage dpo --name mine --data pairs.jsonl     the same on your own preference pairs
    torchrun pivot.py --stage chat --image some.png --question "what color is top left"

Stages, each from the one before:  encoder, llm -> align -> instruct -> sft | dpo.  Missing ones are run first.
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
from model import (MLLM, Decoder, DecoderLayer, Encoder, EncoderConfig, EncoderLayer, LLMConfig, SigLIP, hash_file,
                   initialise, load_model, save_model, write_json)
from sft import sft_objective


def contrastive_objective(model, batch):
    """SigLIP's loss: -log sigmoid(z * logit), z = 1 for a picture and its own caption, -1 for another's."""
    logits = model(batch)
    own = torch.eye(len(batch), device=logits.device)
    hits = (logits.argmax(1) == torch.arange(len(batch), device=logits.device)).float().sum()
    return -F.logsigmoid(logits * (2 * own - 1)).sum(), len(batch), {"accuracy": hits}


# ------------------------------------------------------------------------------------------------------------ the stages

@dataclass(frozen=True)
class Stage:
    """What a stage is, and its settings unless the command line says otherwise."""
    needs: tuple        # stages whose models it starts from
    trains: tuple       # parts that learn; the others stay bit-identical
    objective: str      # contrastive | sft | dpo
    content: str        # what of the world it sees, see data.World
    samples: int        # distinct samples
    steps: int
    batch: int
    lr: float
    encoder_lr: float
    optimizer: str = "adamw"    # muon: Muon for the hidden matrices (lr), AdamW (lr / 10) for the rest


EVERYTHING = ("encoder", "projector", "llm")
WORLD = {
    "encoder": Stage((), ("encoder",), "contrastive", "captions", 32000, 120, 128, .015, .015, "muon"),
    "llm": Stage((), ("llm",), "sft", "text", 32000, 60, 32, .015, 0, "muon"),
    "align": Stage(("encoder", "llm"), ("projector",), "sft", "captions", 32000, 50, 32, .015, 0, "muon"),
    "lookup": Stage(("align",), EVERYTHING, "sft", "lookup", 32000, 250, 32, .015, .0015, "muon"),
    "instruct": Stage(("lookup",), EVERYTHING, "sft", "instruct", 64000, 1000, 32, .015, .0015, "muon"),
    "sft": Stage(("instruct",), EVERYTHING, "sft", "preferences", 4096, 384, 32, 1e-4, 1e-4),
    "dpo": Stage(("instruct",), EVERYTHING, "dpo", "preferences", 4096, 384, 32, 1e-4, 1e-4),
}
PRESETS = {"world": WORLD, "toy": {name: replace(row, samples=64, steps=4, batch=8) for name, row in WORLD.items()}}


def option(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Settings:
    """The command line. None: the stage's row in the table decides."""
    stage: str = option("dpo", "what to run", [*WORLD, "chat"])
    name: str = option(None, "name of the run, which is written to RUNS/NAME/STAGE (default: the preset's)")
    base: str = option(None, "name of the run whose earlier stages this one starts from (default: the preset's)")
    runs: str = option("runs", "folder of all runs")
    preset: str = option("world", "table of stages; toy is the world in a few steps, for tests", list(PRESETS))
    seed: int = option(0, "seed of initialisation and sample order")
    encoder: str = option(None, "start from this encoder folder instead of the earlier stage's")
    projector: str = option(None, "start from this projector folder")
    llm: str = option(None, "start from this LLM folder")
    data: str = option(None, "JSON or JSONL of conversations or preferences instead of the world's")
    eval_data: str = option(None, "the same, held out")
    image_root: str = option(None, "folder that image paths in the data start from (default: the file's folder)")
    samples: int = option(None, "distinct samples of the world")
    steps: int = option(None, "optimiser steps")
    epochs: float = option(None, "passes over the data, instead of --steps")
    batch: int = option(None, "samples per step, over all ranks and micro-batches")
    micro_batch: int = option(None, "samples per forward pass (default: the batch)")
    lr: float = option(None, "peak learning rate")
    encoder_lr: float = option(None, "peak learning rate of the vision encoder")
    optimizer: str = option(None, "adamw; or muon for hidden matrices, with adamw for the rest", ["adamw", "muon"])
    warmup: float = option(.03, "share of the steps that warm up; a cosine to zero follows")
    clip: float = option(1., "gradient norm above which gradients are scaled down")
    beta: float = option(.1, "DPO's pull towards the reference")
    loss: str = option("dpo", "preference loss", ["dpo", "ipo"])
    reference: str = option("cached", "reference log-probabilities: once before the first step, or live in every step",
                            ["cached", "live"])
    max_length: int = option(2048, "tokens per response with its prompt and image")
    template: str = option("plain", "chat template", list(TEMPLATES))
    select_layer: int = option(-2, "layer whose features the projector sees, counted as in LLaVA; 0: run all layers")
    dtype: str = option("auto", "compute in; auto: bfloat16 where the machine has it", ["auto", "bfloat16", "float32"])
    workers: int = option(0, "processes that prepare batches")
    save_every: int = option(200, "steps between saves for resuming")
    eval_every: int = option(0, "steps between evaluations on held-out samples while training; 0: never")
    split: str = option("test", "scenes of the final tables; choose settings on validation", ["validation", "test"])
    eval_scenes: int = option(300, "scenes in the final tables: 12 questions and 4 preference pairs each")
    image: str = option(None, "chat: a picture")
    question: str = option(None, "chat: a question; without one, questions are read from standard input")
    model: str = option(None, "chat: folder with encoder, projector and llm (default: the run's dpo)")


# settings that a stage hands to the earlier stages it has to run first
SHARED = ("runs", "preset", "seed", "max_length", "template", "select_layer", "dtype", "workers", "eval_scenes")
# settings that may change between a run and its continuation; those that name files count by the files' hashes
FREE = ("name", "base", "runs", "encoder", "projector", "llm", "data", "eval_data", "image_root", "micro_batch",
        "workers", "save_every", "eval_every", "image", "question", "model")


def resolve(s):
    """Fill what the command line left open."""
    s = replace(s, name=s.name or s.preset, base=s.base or s.preset)
    if s.dtype == "auto":
        bf16 = torch.cuda.is_bf16_supported() if torch.cuda.is_available() else torch.cpu._is_avx512_bf16_supported()
        s = replace(s, dtype="bfloat16" if bf16 else "float32")
    if s.stage == "chat":
        return s
    row = asdict(PRESETS[s.preset][s.stage])
    s = replace(s, **{k: row[k] for k in row if hasattr(s, k) and getattr(s, k) is None})
    return replace(s, micro_batch=s.micro_batch or s.batch)


# -------------------------------------------------------------------------------------------------------------- machinery

def setup():
    """(rank, world, device): under torchrun on one or many GPUs or CPU processes, and without torchrun."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def shard(model):
    """FSDP2, one unit per transformer block; embeddings and head in the root's, since they may be tied."""
    for module in model.modules():
        if isinstance(module, (EncoderLayer, DecoderLayer)):
            fully_shard(module)
    return fully_shard(model)


def full_state(model):
    """{name: tensor on the CPU}, gathered from all ranks."""
    return {k: (v.full_tensor() if isinstance(v, DTensor) else v).detach().cpu().clone()
            for k, v in model.state_dict().items()}


def schedule(step, steps, warmup):
    """The factor on the peak learning rate: linear warm-up, then a cosine to zero."""
    rise = max(1, round(warmup * steps))
    return (step + 1) / rise if step < rise else .5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def freeze(model, row):
    """Only the parts that the stage trains get gradients, and of the encoder only what runs."""
    for name, module in model.named_children():
        module.requires_grad_(name in row.trains or not row.needs)
    for module in model.encoder.unused() if model.encoder else ():
        module.requires_grad_(False)


def make_optimizers(model, s):
    """AdamW; or Muon for the matrices inside the blocks and AdamW at a tenth of the rate for everything else."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            matrix = s.optimizer == "muon" and p.ndim == 2 and ".layers." in name
            groups.setdefault((matrix, name.startswith("encoder.")), []).append(p)
    optimizers = []
    for kind in (True, False):
        tenth = 10 if s.optimizer == "muon" and not kind else 1
        chosen = [{"params": ps, "lr": (s.encoder_lr if encoder else s.lr) / tenth}
                  for (matrix, encoder), ps in groups.items() if matrix == kind]
        if chosen:
            optimizers.append(torch.optim.Muon(chosen, weight_decay=0) if kind else
                              torch.optim.AdamW(chosen, weight_decay=0))
            for group in chosen:
                group["peak"] = group["lr"]
    return optimizers


def resume_state(model, optimizers):
    """What a run needs to go on, as flat tensors: trained weights and optimiser moments."""
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    state = {f"weight.{name}": p.detach() for p, name in names.items()}
    for optimizer in optimizers:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if not optimizer.state[p]:                  # before the first step: room to read a save into
                moments = ["momentum_buffer"] if isinstance(optimizer, torch.optim.Muon) else ["exp_avg", "exp_avg_sq"]
                optimizer.state[p] = {k: torch.zeros_like(p) for k in moments}
                if "exp_avg" in moments:
                    optimizer.state[p]["step"] = torch.tensor(0.)
            state |= {f"{key}.{names[p]}": value for key, value in optimizer.state[p].items()}
    return state


def saves(folder):
    """Whole saves for resuming, oldest first: [(steps done, folder)]."""
    return sorted((int(p.name.removeprefix("step-")), p) for p in (folder / "train").glob("step-*[0-9]"))


def save_resume(folder, step, model, optimizers, rank, world):
    """Write beside the old save, rename, then delete the old one: at any moment a whole one is there."""
    old, final = saves(folder), folder / "train" / f"step-{step}"
    dcp.save(resume_state(model, optimizers), checkpoint_id=final.with_suffix(".tmp"), no_dist=world == 1)
    if rank == 0:
        os.replace(final.with_suffix(".tmp"), final)
        for _, path in old:
            shutil.rmtree(path)


def same_or_refuse(folder, settings):
    """True if this very run is finished; False if it is new or unfinished; an error if it is another."""
    file = folder / "settings.json"
    old = json.loads(file.read_text()) if file.exists() else {}
    for key, value in settings.items():
        if old and old.get(key) != json.loads(json.dumps(value)):
            raise BadInput(f"{folder}: was made with {key} = {old.get(key)}, now {value}; choose another --name, or "
                           f"remove the folder")
    return old.get("finished", False)


def barrier(world):
    if world > 1:
        dist.barrier()


def say(rank, text):
    if rank == 0:
        print(text, flush=True)


# ----------------------------------------------------------------------------------------------------- the training loop

def train(s, objective, folder, model, steps, held_out, reference, rank, world, device):
    """A stage's loop: fetch, forward, backward, clip, step, log, save. Interrupted, it goes on from its last save."""
    optimizers, log = make_optimizers(model, s), folder / "log.jsonl"
    trained = [p for p in model.parameters() if p.requires_grad]
    start = 0
    for start, save in saves(folder)[-1:]:
        dcp.load(resume_state(model, optimizers), checkpoint_id=save, no_dist=world == 1)
    if rank == 0:                                       # forget what was logged after the last save
        lines = log.read_text().splitlines() if log.exists() else []
        log.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] < start))

    def forward(batch):
        """Loss summed over a micro-batch, and the numbers to add up over micro-batches and ranks."""
        batch = batch.to(device)
        if reference:
            batch.ref = reference(batch)
        with probe.autocast(device, s.dtype):           # bf16 over fp32 master weights; the loss in fp32
            loss, count, metrics = objective(model, batch)
        weight = 0. if batch.dummy else 1.
        sums = {"loss": loss.detach(), "count": count, "samples": len(batch), **metrics}
        return loss * weight, {k: weight * float(v) for k, v in sums.items()}

    def total(parts):
        """Add up dicts of numbers, over all ranks too: the loss per count, metrics per sample."""
        sums = torch.tensor([[p[k] for k in parts[0]] for p in parts], dtype=torch.float64).sum(0).to(device)
        if world > 1:
            dist.all_reduce(sums)
        loss, count, samples, *rest = sums.tolist()
        return {"loss": loss / count, **{k: v / samples for k, v in zip(list(parts[0])[3:], rest)}}, count, samples

    loader = torch.utils.data.DataLoader(steps, batch_size=None, sampler=range(start, len(steps)),
                                         num_workers=s.workers)
    bar = tqdm(loader, s.stage, len(steps), initial=start, unit="step", disable=rank > 0, dynamic_ncols=True)
    clock = time.perf_counter()
    for step, batches in enumerate(bar, start):
        parts = []
        for batch in batches:
            loss, sums = forward(batch)
            loss.backward()
            parts.append(sums)
        means, count, samples = total(parts)

        # FSDP has averaged over ranks the gradient of a sum: make it the mean over the step, however that was split
        torch._foreach_mul_([p.grad for p in trained], world / count)
        norm = torch.nn.utils.clip_grad_norm_(trained, s.clip)
        rate = schedule(step, len(steps), s.warmup)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            optimizer.step()
            optimizer.zero_grad()

        seconds, clock = time.perf_counter() - clock, time.perf_counter()
        line = {"step": step, **means, "grad_norm": float(norm.full_tensor() if world > 1 else norm),
                "lr": s.lr * rate, "samples_per_s": samples / seconds}
        if s.eval_every and (step + 1) % s.eval_every == 0:
            with torch.no_grad():
                line["held_out"] = total([forward(b)[1] for k in range(len(held_out)) for b in held_out[k]])[0]
        if rank == 0:
            with open(log, "a") as f:
                f.write(json.dumps(line) + "\n")
            bar.set_postfix_str(f"loss {means['loss']:.3f}, {samples / seconds:.0f} samples/s", refresh=False)
        if (step + 1) % s.save_every == 0 or step + 1 == len(steps):
            save_resume(folder, step + 1, model, optimizers, rank, world)


# -------------------------------------------------------------------------------------------------------------- one stage

def inputs(s, rank, world, device):
    """{part: folder} that the stage starts from. Runs the earlier stages that are missing."""
    given = {part: getattr(s, part) for part in EVERYTHING if getattr(s, part)}
    for need in PRESETS[s.preset][s.stage].needs:
        earlier = Path(s.runs) / s.base / need
        made = [p for p in leaves(s.preset, need) if p not in given]
        if made and not finished(earlier):
            say(rank, f"{s.stage} needs {need}, which is not there yet")
            run_stage(resolve(Settings(stage=need, name=s.base, base=s.base, **{k: getattr(s, k) for k in SHARED})),
                      rank, world, device)
        given |= {part: str(earlier / part) for part in made}
    return given


def leaves(preset, stage):
    """The parts that a stage writes."""
    row = PRESETS[preset][stage]
    return EVERYTHING if row.needs else row.trains


def finished(folder):
    file = folder / "settings.json"
    return file.exists() and json.loads(file.read_text()).get("finished", False)


def measure(s, folder, parts, pairs, prepare, rank, world, device):
    """Tables of the model that the stage left, beside the one it started from. On the world: questions and pairs of
    the held-out scenes; on a user's data: the held-out pairs."""
    pairs, questions = pairs if getattr(pairs, "preferences", False) else None, None
    if not s.data:
        pairs = data.World("preferences", s.split, 4 * s.eval_scenes)
        questions = data.World("questions", s.split, len(data.CATEGORY) * s.eval_scenes)
    if pairs is None:
        return []
    sides = {"before": parts, "after": {part: str(folder / part) for part in EVERYTHING}}
    if s.stage == "instruct":
        del sides["before"]
    setup = {k: getattr(s, k) for k in ("split", "eval_scenes", "template", "max_length", "select_layer", "dtype")}
    results = {}
    for side, at in sides.items():
        known = Path(at["llm"]).parent / "results.json"         # a base model is measured once, not by each that uses it
        known = json.loads(known.read_text()) if known.exists() and not s.data and side == "before" else {}
        if known.get("setup") == setup and {Path(v).parent for v in at.values()} == {Path(at["llm"]).parent}:
            results[side] = known["results"]
        else:
            results[side] = probe.evaluate(at, s.select_layer, pairs, questions, prepare, device, s.dtype, rank, world)
    if rank == 0 and not s.data:
        write_json(folder / "results.json", {"setup": setup, "results": results["after"]})
    return probe.tables(results, s.beta)


def run_stage(s, rank, world, device):
    """Inputs, data, model, loop; then the folders it leaves and its tables."""
    row, folder = PRESETS[s.preset][s.stage], Path(s.runs) / s.name / s.stage
    settings = {k: v for k, v in asdict(s).items() if k not in FREE}
    same_or_refuse(folder, settings)
    parts = inputs(s, rank, world, device)

    # ---- data
    if s.data and not row.needs:
        raise BadInput(f"--data: stage {s.stage} knows the embedded world only")
    dataset = data.Records(s.data, s.image_root) if s.data else data.World(
        row.content, "preferences" if row.content == "preferences" else s.stage, s.samples)
    held_out = (data.Records(s.eval_data, s.image_root) if s.eval_data else
                None if s.data else data.World(row.content, s.split, 512))
    for d in (dataset, held_out):
        if row.objective == "dpo" and isinstance(d, data.Records) and not d.preferences:
            raise BadInput(f"{d.file}: has no \"rejected\"; stage dpo needs preferences")
    settings["inputs"] = {"data": dataset.fingerprint(),
                          **{part: hash_file(Path(at) / "model.safetensors") for part, at in parts.items()}}
    if "llm" in parts:
        settings["inputs"]["tokenizer"] = hash_file(data.Tokenizer(parts["llm"]).file)
    if same_or_refuse(folder, settings):
        say(rank, (folder / "report.md").read_text() + f"{folder}: same settings, same inputs, nothing to do")
        return
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "settings.json", settings)
        if "llm" not in parts:
            data.train_tokenizer(folder / "tokenizer")
    barrier(world)

    # ---- model
    tokenizer = data.Tokenizer(parts.get("llm", folder / "tokenizer"))
    if s.stage == "encoder":
        text = Decoder(LLMConfig(vocab_size=len(tokenizer), num_hidden_layers=2))
        model = initialise(SigLIP(Encoder(EncoderConfig(), select_layer=0), text), s.seed)
    elif s.stage == "llm":
        model = initialise(MLLM(None, None, Decoder(LLMConfig(vocab_size=len(tokenizer)))), s.seed)
    else:
        model = load_model(parts["encoder"], parts.get("projector"), parts["llm"], s.select_layer, s.seed)
    before = full_state(model) if rank == 0 else None
    freeze(model, row)
    model.to(device)

    # ---- train
    encoder = model.encoder.config if model.encoder else EncoderConfig()
    prepare = data.Prepare(tokenizer, s.template, encoder, s.max_length, 2 if row.objective == "dpo" else 1)
    total = math.ceil(s.epochs * len(dataset) / s.batch) if s.epochs else s.steps
    steps = data.Steps(dataset, prepare, total, s.batch, s.micro_batch, s.seed, rank, world)
    held_out = held_out and data.Steps(held_out, prepare, math.ceil(len(held_out) / s.batch), s.batch, s.micro_batch, 0,
                                       rank, world)
    reference = None
    if row.objective == "dpo":
        reference = frozen(model) if world == 1 else shard(frozen(model))
        reference = functools.partial(reference_logps, reference, probe.autocast(device, s.dtype))
        if s.reference == "cached":
            once = data.Steps(dataset, prepare, math.ceil(len(dataset) / s.batch), s.batch, s.micro_batch, s.seed,
                              rank, world)
            reference = cached(reference, once, folder / "reference.safetensors", settings, rank, world, device)
    objective = {"contrastive": contrastive_objective, "sft": sft_objective,
                 "dpo": functools.partial(dpo_objective, beta=s.beta, variant=s.loss)}[row.objective]
    if world > 1:
        shard(model)
    train(s, objective, folder, model, steps, held_out, reference, rank, world, device)

    # ---- the folders it leaves, and its tables
    after = full_state(model)
    if rank == 0:
        has = {part: part in leaves(s.preset, s.stage) for part in EVERYTHING}
        save_model(folder, after, has["encoder"] and encoder, has["projector"], has["llm"] and model.llm.config,
                   tokenizer)
    barrier(world)
    report = [f"# {s.name}/{s.stage}"] + ([probe.moved(before, after)] if rank == 0 else [])
    del model, reference
    if "instruct" in (s.stage, *row.needs):
        report += measure(s, folder, parts, held_out and held_out.data, prepare, rank, world, device)
    if rank == 0:
        probe.curve(folder / "log.jsonl", folder / "curve.png")
        (folder / "report.md").write_text("\n\n".join(report) + "\n")
        write_json(folder / "settings.json", settings | {"finished": True})
    barrier(world)
    say(rank, "\n\n".join(report) + f"\n\n{folder}: done")


# --------------------------------------------------------------------------------------------------- chat, command line

def chat(s, device):
    """Answer questions about a picture."""
    at = Path(s.model or next((f for stage in ("dpo", "sft", "instruct")
                               if finished(f := Path(s.runs) / s.name / stage)), Path(s.runs) / s.name / "dpo"))
    if not finished(at) and not (at / "encoder").is_dir():
        raise BadInput(f"{at}: no model there yet; run --stage dpo first, or name one with --model")
    if (at / "settings.json").exists():                 # talk to it as it was trained
        made = json.loads((at / "settings.json").read_text())
        s = replace(s, **{k: made[k] for k in ("template", "select_layer", "max_length")})
    model = load_model(at / "encoder", at / "projector", at / "llm", s.select_layer).to(device)
    tokenizer = data.Tokenizer(at / "llm")
    prepare = data.Prepare(tokenizer, s.template, model.encoder.config, s.max_length, 1)
    for question in [s.question] if s.question else map(str.strip, sys.stdin):
        sample = data.Sample(s.image or "chat", Path(s.image) if s.image else None, [(question, None)])
        with probe.autocast(device, s.dtype):
            ids = model.generate(prepare([sample]).to(device), tokenizer.end, max_new=128)[0]
        print(tokenizer.decode(ids), flush=True)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Settings):
        kind = f.type if isinstance(f.type, type) else str
        default = "the stage's" if f.default is None and "default" not in f.metadata["help"] else f.default
        note = "" if "default" in f.metadata["help"] else f" (default: {default})"
        parser.add_argument("--" + f.name.replace("_", "-"), type=kind, default=f.default,
                            choices=f.metadata["choices"], help=f.metadata["help"].replace("%", "%%") + note)
    table = "\n".join(f"  {name:9} {row.objective:12} {row.content:12} {row.samples:7} {row.steps:6} {row.batch:6} "
                      f"{row.lr:8g} {row.encoder_lr:11g}  {row.optimizer}" for name, row in WORLD.items())
    parser.epilog = ("stages of preset world:\n  stage     objective    content      samples  steps  batch       lr  "
                     "encoder-lr  optimizer\n" + table)
    return resolve(Settings(**vars(parser.parse_args(argv))))


def main(argv=None):
    s = arguments(argv)
    rank, world, device = setup()
    try:
        chat(s, device) if s.stage == "chat" else run_stage(s, rank, world, device)
    except BadInput as error:
        print(f"pivot: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        if world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
