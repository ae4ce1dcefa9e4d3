"""What was learned: frozen encoders under probes, models under questions; tables and pictures.

    python probe.py ENCODER ENCODER ...                 side by side, on the embedded world
    python probe.py ENCODER ... --data FOLDER           on class folders, or images/, annotations/

Everything here measures a model as it was saved, on samples that no stage trains on.
"""
import argparse
import copy
import difflib
import json
import random
import re
import sys
import tempfile
import textwrap
from collections import Counter, defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (CELL, CHOSEN, COLORS, DETAILS, GROUNDS, REJECTED, SIDE, SUFFIXES, TILTS,
                  BadInput, Prepare, Sample, Scene, Tokenizer, framed, read_picture)
from dpo import dpo_loss
from model import (MLLM, Encoder, EncoderConfig, Projector, fill, initialise, load_encoder,
                   load_llm, open_tensors, write_json)
from sft import sft_loss

BATCH = 128


def autocast(device, dtype):
    """Compute in bf16 over fp32 weights, or leave everything in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


@torch.no_grad()
def measured(model, data, prepare, device, dtype, asked):
    """[(kind, category, right answer, value, value with a grey picture)] of all samples, those of
    the first rank first. value: the margin logp chosen - logp rejected of a pair; or, if it is
    asked, how right the answer is that the model generates greedily."""
    def values(samples, batch):
        if not asked:
            return [chosen - rejected for chosen, rejected in model(batch).tolist()]
        said = model.generate(batch, prepare.end, getattr(data, "longest", 64))
        return [score(s.metric, prepare.tokenizer.decode(ids), s.answers or (s.turns[-1][1],))
                for s, ids in zip(samples, said)]

    rank, world = dist.get_rank(), dist.get_world_size()
    mine, rows = range(rank, len(data), world), []
    for start in tqdm(range(0, len(mine), BATCH), "questions" if asked else "pairs", leave=False,
                      disable=rank > 0):
        samples = [data[i] for i in mine[start:start + BATCH]]
        batch = prepare(samples, answers=not asked).to(device)
        grey = replace(batch, pixels=torch.zeros_like(batch.pixels))
        with autocast(device, dtype):
            both = [values(samples, b) for b in (batch, grey)]
        rows += [(s.kind, s.category, s.turns[-1][1], *pair) for s, *pair in zip(samples, *both)]
    if world == 1:                          # alone, gloo's threads would slow all later steps
        return rows
    dist.all_gather_object(everyone := [None] * world, rows)
    return [row for part in everyone for row in part]


def evaluate(model, pairs, questions, prepare, device, dtype):
    """Measure a model on held-out pairs and questions (None: not on those).

    Returns {"pairs": [[kind, chosen text, logp chosen - logp rejected, the same with a grey
                        picture]],
             "questions": {category kind: [n, right, right with a grey picture, most common
                                           answer's n, category, kind]}}."""
    model.to(device).eval()
    prepare, out, groups = copy.copy(prepare), {}, defaultdict(list)
    prepare.responses = 2
    if pairs is not None:
        out["pairs"] = [[kind, *row] for kind, _, *row in measured(
            model, pairs, prepare, device, dtype, asked=False)]
    if questions is not None:
        out["questions"] = {}
        for kind, category, *row in measured(model, questions, prepare, device, dtype, asked=True):
            groups[category, kind].append(row)
        for (category, kind), rows in groups.items():
            answers, seen, grey = zip(*rows)
            out["questions"][f"{category} {kind}"] = [
                len(rows), sum(seen), sum(grey), max(Counter(answers).values()), category, kind]
    return out


# -------------------------------------------------------------------------------- VQA's metrics

def number(text):
    """The number that a text is ("3", "12.5", "40%" = 0.4), or None."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text.replace(",", ""))
    except ValueError:
        return None


def relaxed(said, answer):
    """ChartQA (Masry et al. 2022): numbers may be 5% off, anything else must be equal."""
    a, b = number(said), number(answer)
    return abs(a - b) <= .05 * abs(b) if a is not None and b else said == answer


def anls(said, answer):
    """DocVQA (Biten et al. 2019): 1 - edit distance / longer length; 0 from a distance of half."""
    row = list(range(len(answer) + 1))
    for i, c in enumerate(said, 1):
        row, above = [i], row
        for j, d in enumerate(answer, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (c != d)))
    distance = row[-1] / max(len(said), len(answer), 1)
    return 1 - distance if distance < .5 else 0.


DIGITS = dict(zip("none zero one two three four five six seven eight nine ten".split(),
                  "0 0 1 2 3 4 5 6 7 8 9 10".split()))


def plain(text):
    """VQA v2's normal form: no punctuation or articles, number words as digits."""
    text = re.sub(r"(?<=\d),(?=\d)|(?<!\d)\.|\.(?!\d)|['\"]", "", text.lower())
    words = re.sub(r"[^\w\s.:]", " ", text).split()
    return " ".join(DIGITS.get(w, w) for w in words if w not in ("a", "an", "the"))


def vqa_accuracy(said, answers):
    """VQA v2 (Goyal et al. 2017): min(agreeing of the other nine annotators / 3, 1), averaged over
    leaving each annotator out."""
    hits = [plain(said) == plain(answer) for answer in answers]
    return sum(min((sum(hits) - hit) / 3, 1) for hit in hits) / len(hits)


def choice(said, answer):
    """Multiple choice: the option's letter, as "B", "(b)", "B. a cat" or "the answer is B"."""
    letter = re.search(r"^\(?([a-z])(?:[).:]|$)|answer is:? \(?([a-z])\b", said)
    return said == answer or bool(letter) and answer in letter.groups()


def score(metric, said, answers):
    """How right an answer is, 0 to 1: the best over the acceptable answers, case ignored."""
    said, answers = said.strip().lower(), [a.strip().lower() for a in answers]
    if metric == "vqa":
        return vqa_accuracy(said, answers)
    rule = {"exact": str.__eq__, "relaxed": relaxed, "anls": anls, "choice": choice}[metric]
    return float(max(rule(said, answer) for answer in answers))


# --------------------------------------------------------------------------- frozen features

CHUNK = 8192                                # rows of features in use at the same time
VIEWS = "encoder", "encoder + projector"


def load_parts(encoder, projector=None, config=None, select_layer=-2):
    """Folders -> the frozen modules [encoder] or [encoder, projector]. config: see load_encoder."""
    parts = [load_encoder(encoder, select_layer, config=config)]
    if projector:
        tensors = open_tensors(projector, "model.mm_projector.")
        if "0.weight" not in tensors:
            raise BadInput(f"{projector}: no projector; it has a tensor 0.weight")
        wide, narrow = tensors["0.weight"].get_shape()
        parts.append(fill(lambda: Projector(narrow, wide), projector, tensors))
    return [part.requires_grad_(False).eval() for part in parts]


def pixels(prepare, images):
    """Pictures or their files -> (images, 3, H, W), as an encoder wants them."""
    return torch.stack([prepare.picture(Sample("probe", image, [])) for image in images])


@torch.no_grad()
def features(parts, images, pool, folder, device="cpu", workers=0):
    """What frozen modules make of pictures: [(images, ...) float32 after each of the parts], in
    memory maps in a folder, so that a million pictures need no more memory than a batch.

    parts: load_parts'. pool: (batch, tokens, width) -> what is kept of it."""
    start, out, prepare = 0, [], Prepare(None, "plain", parts[0].config, 0, 1)
    loader = DataLoader(images, BATCH, num_workers=workers, collate_fn=partial(pixels, prepare))
    for x in tqdm(loader, "features", leave=False):
        x = x.to(device)
        for i, part in enumerate(parts):
            x = part(x)
            kept = pool(x).float().cpu()
            if start == 0:
                out.append(torch.from_numpy(np.lib.format.open_memmap(
                    Path(folder) / f"{i}.npy", "w+", np.float32, (len(images), *kept.shape[1:]))))
            out[i][start:start + len(kept)] = kept
        start += len(kept)
    return out


def moments(x):
    """Mean and standard deviation of every column of (n, d): (d,) each; 1 where all is constant."""
    sums = sum(torch.stack((c.double().sum(0), c.double().square().sum(0))) for c in x.split(CHUNK))
    mean, square = sums / len(x)
    std = (square - mean ** 2).clamp(min=0).sqrt()
    return mean.type_as(x), torch.where(std > 1e-6 * (1 + mean.abs()), std, 1.).type_as(x)


# ------------------------------------------------------------------------------ linear probe

L2 = .1, .01, .001, .0001                   # strengths to choose from


def logistic(chunks, n, classes, l2, tolerance=1e-3):
    """Multinomial logistic regressions, for every strength in l2 and all columns of labels:

        min_{w, b}  mean_i -log softmax(w x_i + b)[label_i] + l2 / 2 |w|^2

    (scikit-learn's with C = 1 / (l2 n)), by L-BFGS until no derivative exceeds the tolerance. The
    Hessian is about H = X'X / 4n + l2. With H = L L', L-BFGS looks for v = L' w instead of w: there
    the problem is nearly round, and tens of steps suffice, not thousands.

    chunks(): all n rows, some at a time: x (m, d), labels (m, columns) of numbers below
    classes[column]. Yields w: (d, sum(classes)), b: (1, sum(classes)) for each strength."""
    gram = sum(x.mT @ x for x, _ in chunks()) / (4 * n)
    w, b = gram.new_zeros(len(gram), sum(classes)), gram.new_zeros(1, sum(classes))
    for strength in l2:                     # each starts where the one before ended
        lower = torch.linalg.cholesky(gram + strength * torch.eye(len(gram)).to(gram))
        v, b = (lower.mT @ w).contiguous().requires_grad_(), b.detach().requires_grad_()
        solver = torch.optim.LBFGS([v, b], max_iter=1000, history_size=20, tolerance_change=0,
                                   tolerance_grad=tolerance, line_search_fn="strong_wolfe")

        def closure():
            solver.zero_grad()
            w = torch.linalg.solve_triangular(lower.mT, v, upper=True)
            ends = [t.detach().requires_grad_() for t in (w, b)]
            total = strength * ends[0].square().sum() / 2
            total.backward()
            for x, labels in chunks():
                parts = (x @ ends[0] + ends[1]).split(classes, 1)
                loss = sum(F.cross_entropy(p, y, reduction="sum") for p, y in zip(parts, labels.T))
                (loss / n).backward()
                total = total + loss.detach() / n
            torch.autograd.backward([w, b], [t.grad for t in ends])
            return total

        solver.step(closure)
        w = torch.linalg.solve_triangular(lower.mT, v.detach(), upper=True)
        yield w, b.detach()


def linear_probe(x, labels, classes, cuts, device="cpu"):
    """Fit on x[:cuts[0]], choose the L2 strength of each column on x[cuts[0]:cuts[1]], test on the
    rest. x: (n, d) features, labels: (n, columns), classes: each column's number of classes.
    Returns for each column {"right", "n", "l2", "constant": the most common answer's share}."""
    mean, std = (t.to(device) for t in moments(x[:cuts[0]]))

    def chunks(start, end):
        for at in range(start, end, CHUNK):
            rows = slice(at, min(at + CHUNK, end))
            yield (x[rows].to(device) - mean) / std, labels[rows].to(device)

    few = cuts[0] <= CHUNK and list(chunks(0, cuts[0]))             # standardised only once
    hits = []
    for w, b in logistic(lambda: few or chunks(0, cuts[0]), cuts[0], classes, L2):
        hits.append(torch.cat([torch.stack([p.argmax(1) for p in (z @ w + b).split(classes, 1)], 1)
                               == y for z, y in chunks(cuts[0], len(x))]).cpu())
    hits = torch.stack(hits, 1)             # (rows, strengths, columns)
    split = cuts[1] - cuts[0]
    best = hits[:split].sum(0).max(0).indices.tolist()
    return [{"right": int(hits[split:, s, i].sum()), "n": len(hits) - split, "l2": L2[s],
             "constant": labels[cuts[1]:, i].bincount().max().item() / (len(hits) - split)}
            for i, s in enumerate(best)]


def wilson(right, n):
    """95% interval of a share (Wilson 1927): (low, high)."""
    z, p = 1.96, right / n
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + (z / (2 * n)) ** 2) ** .5
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


# ------------------------------------------------------------------------ segmentation probe

def patches(image, grid):
    """(H, W) numbers -> (grid * grid, pixels): each patch's. What is left over has no patch."""
    p = len(image) // grid
    image = torch.from_numpy(np.ascontiguousarray(image[:grid * p, :grid * p]))
    return image.view(grid, p, grid, p).transpose(1, 2).flatten(2).flatten(0, 1)


def patch_labels(ids, grid, classes):
    """(H, W) class numbers, 0 = none -> (grid * grid, classes) bool: what each patch contains."""
    seen = torch.zeros(grid ** 2, classes + 1, dtype=torch.bool)
    return seen.scatter_(1, patches(ids, grid).long(), True)[:, 1:]


def segmentation_probe(x, labels, cut, seed=0, device="cpu", heads=6, epochs=4, batch=16, lr=4e-3):
    """Covert et al. (2025): a two-layer MLP per patch, as wide as the features, a sigmoid
    per class, threshold 1/2.

    x: (pictures, patches, d) features, labels: (pictures, patches, classes) bool; fit on the first
    `cut` pictures, tested on the rest. Heads (other weights, other order) train side by side.
    Returns {"recall", "f1": [per head], macro over the classes that are somewhere; "classes":
    [recall]}, and what head 0 finds on the rest, as the labels."""
    mean, std = (t.to(device) for t in moments(x[:cut].flatten(0, 1)))
    generator, (d, k) = torch.Generator().manual_seed(seed), (x.shape[2], labels.shape[2])
    shapes = (d, d), (1, d), (d, k), (1, k)
    weights = [(torch.randn(heads, *s, generator=generator) * (s[0] > 1) / s[0] ** .5).to(device)
               .requires_grad_() for s in shapes]
    optimizer = torch.optim.AdamW(weights, lr, weight_decay=.01)
    steps = epochs * cut // batch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def logits(pictures):                   # (heads or 1, n, d) -> (heads, n, k)
        a, b, c, e = weights
        return F.gelu((pictures.to(device) - mean) / std @ a + b) @ c + e

    orders = torch.stack([torch.cat([torch.randperm(cut, generator=generator)
                                     for _ in range(epochs)]) for _ in range(heads)])
    for step in tqdm(range(steps), "heads", leave=False):
        at = orders[:, step * batch:(step + 1) * batch]
        truth = labels[at].flatten(1, 2).float().to(device)
        loss = F.binary_cross_entropy_with_logits(logits(x[at].flatten(1, 2)), truth)
        optimizer.zero_grad()
        (heads * loss).backward()
        optimizer.step()
        schedule.step()
    counts, first = 0, []
    with torch.no_grad():
        for a, truth in zip(x[cut:].split(batch), labels[cut:].split(batch)):
            found, truth = logits(a.flatten(0, 1)) > 0, truth.flatten(0, 1).to(device)
            counts = counts + torch.stack([t.sum(1).double() for t in (
                found & truth, found, truth.expand_as(found))])
            first.append(found[0].unflatten(0, (len(a), -1)).cpu())
    right, found, there = counts            # (heads, classes)
    recall, f1, some = right / there, 2 * right / (found + there), there[0] > 0
    return {"recall": recall[:, some].mean(1).tolist(), "f1": f1[:, some].mean(1).tolist(),
            "classes": recall.mean(0).tolist()}, torch.cat(first)


# --------------------------------------------------------------------------------- alignment

@torch.no_grad()
def text_features(llm, captions, device="cpu"):
    """(captions, width): the mean of a text LLM's last hidden states over each caption's tokens."""
    model, tokenizer, out = MLLM(None, None, load_llm(llm)).to(device), Tokenizer(llm), []
    prepare = Prepare(tokenizer, "plain", EncoderConfig(), 2048, 1)
    for start in tqdm(range(0, len(captions), BATCH), "captions", leave=False):
        texts = captions[start:start + BATCH]
        batch = prepare([Sample(t, None, [(t, None)]) for t in texts]).to(device)
        words = batch.sample >= 0
        mask = words[:, None] & torch.ones_like(words[0]).expand(len(words[0]), -1).tril()
        hidden = model.llm(model.embed(batch), mask[:, None], batch.position)
        out.append((hidden * words[..., None]).sum(1) / words.sum(1, keepdim=True))
    return torch.cat(out).cpu()


def mutual_knn(a, b, ks):
    """Huh et al. (2024): {k: mean over samples of |knn_a(i) & knn_b(i)| / k}, nearest by cosine.
    a, b: (n, width) of the same n samples, in order. By chance it is k / (n - 1)."""
    out, near = {}, []
    for x in (a, b):
        x = F.normalize(x.double(), dim=1)
        near.append((x @ x.mT).fill_diagonal_(-2).topk(max(ks)).indices)
    for k in ks:
        one, two = (torch.zeros(len(a), len(a)).scatter_(1, n[:, :k], 1) for n in near)
        out[k] = (one * two).sum().item() / (k * len(a))
    return out


# ----------------------------------------------------------------------------- gradient maps

MAPS = "sft", "dpo", "sft, differing tokens", "rejected"


def differing(chosen, rejected):
    """The places in one list of tokens at which it departs from the other; where it only lacks
    some, the place that follows them."""
    places = set()
    for what, a, b, *_ in difflib.SequenceMatcher(None, chosen, rejected, False).get_opcodes():
        places |= set(range(a, max(b, a + 1))) if what != "equal" else set()
    return sorted(places & set(range(len(chosen))))


def gradient_maps(model, samples, prepare, device="cpu", beta=.1, batch=32):
    """How strongly each visual token is told to change: |d loss / d A_t|, A = ViT(I), of each
    sample's own loss, at the start of post-training (DPO's reference is the model itself).

    Returns maps, (samples, MAPS, tokens), and a row for each sample with a region (a patch belongs
    to it as far as it is covered): {"sample": its number, "answer": one word | object | scene,
    "kind", "detail", "area": the region's share, "touched": share of patches with some of it, and
    for each of MAPS [lift = share of the gradient's mass inside / area, is the strongest token
    one that the region touches?]}. A sample's loss depends on no other sample's picture."""
    kept, maps, rows = [], [], []

    def leaf(module, inputs, output):       # gradients end here
        kept.append(output.detach().requires_grad_())
        return kept[-1]

    hook = model.encoder.register_forward_hook(leaf)
    for start in tqdm(range(0, len(samples), batch), "gradients", leave=False):
        at = prepare(samples[start:start + batch])
        owner, extra = at.response, []      # a third "response": the chosen one's differing tokens
        for i in range(len(at)):
            (c, chosen), (r, rejected) = ((where, at.target[where].tolist()) for where in (
                (owner == 2 * i + side).nonzero().flatten() for side in (CHOSEN, REJECTED)))
            extra += c[differing(chosen, rejected)].tolist()
        at = replace(at, target=torch.cat((at.target, at.target[extra])), responses=3,
                     source=torch.cat((at.source, at.source[extra])), response=torch.cat(
                         (owner // 2 * 3 + owner % 2, owner[extra] // 2 * 3 + 2)))
        logps = model(at.to(device))
        losses = (sft_loss(logps), dpo_loss(logps, logps.detach(), beta), sft_loss(logps[:, 2:]),
                  -logps[:, REJECTED])
        maps.append(torch.stack([torch.autograd.grad(loss.sum(), kept[-1], retain_graph=True)[0]
                                 .norm(dim=-1) for loss in losses], 1).float().cpu())
        kept.clear()
    hook.remove()
    maps, c = torch.cat(maps), model.encoder.config
    for i, (sample, strength) in enumerate(zip(samples, maps)):
        if sample.region is None or not sample.region.any():
            continue
        mask = framed(Image.fromarray(sample.region).convert("L"), c, Image.NEAREST)
        cover = patches(np.array(mask) > 0, round(maps.shape[2] ** .5)).float().mean(1)
        area, inside = cover.mean().item(), strength @ cover / strength.sum(1)
        hits = cover[strength.argmax(1)] > 0
        described = sample.kind in ("object", "scene")
        rows.append({"sample": i, "answer": sample.kind if described else "one word",
                     "kind": sample.kind, "area": area,
                     "touched": (cover > 0).float().mean().item(),
                     "detail": sample.detail,
                     **{m: [a / area, bool(h)] for m, a, h in zip(MAPS, inside.tolist(), hits)}})
    return maps, rows


# ------------------------------------------------------------------------------------------ cost

def flops(model, lengths, targets, trains, images):
    """Floating-point operations of a training step on rows of so many tokens; a multiply-add is
    two. Forward: 2 for each weight of a matrix and each token that meets it; in a layer's attention
    (dense) 4 for each channel and pair of tokens. Backward costs a matrix once more for its
    weights, if its part trains, and once more for its inputs, if anything that trains lies before
    it; attention, which has two inputs, twice more. Recomputation is not counted.

    model: an MLLM, or what there is of one. targets: tokens with a logit. trains: names of parts.
    """
    def weights(module):
        return sum(m.weight.numel() for m in module.modules()
                   if isinstance(m, (nn.Conv2d, nn.Linear)))

    encoder, llm = getattr(model, "encoder", None), getattr(model, "llm", None)
    steps = []      # in the order of the forward pass: (part, matrices, attention)
    if encoder:
        c, layers, tokens = encoder.config, encoder.used(), images * encoder.config.tokens
        length = c.tokens + encoder.extra
        steps += [("encoder", 2 * tokens * weights(encoder.embeddings), 0),
                  ("encoder", 2 * images * length * weights(layers),
                   4 * images * length ** 2 * c.hidden_size * len(layers))]
    if encoder and llm:
        steps += [("projector", 2 * tokens * weights(layer), 0) for layer in model.projector]
    if llm:
        c, pairs = llm.config, sum(n * n for n in lengths)
        steps += [("llm", 2 * sum(lengths) * weights(llm.model),
                   4 * pairs * c.num_attention_heads * c.head_dim * c.num_hidden_layers),
                  ("llm", 2 * targets * llm.head().numel(), 0)]
    total, below = 0, False
    for part, matrices, attention in steps:
        total += matrices * (1 + (part in trains) + below) + attention * (1 + 2 * below)
        below = below or part in trains
    return total


# ------------------------------------------------------------------------------ tables, pictures

def markdown(header, rows):
    """A table whose columns line up also where it is not rendered."""
    rows = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    rows = [header, ["-" * w for w in widths], *rows]
    return "\n".join("| " + " | ".join(v.ljust(w) for v, w in zip(row, widths)) + " |"
                     for row in rows)


def moved(before, after):
    """How far each part moved: |after - before| / |before|, and how many parameters moved."""
    sums = defaultdict(lambda: torch.zeros(4, dtype=torch.double))
    for name, old in before.items():
        change = after[name].double() - old.double()
        sums[name.split(".")[0]] += torch.tensor([old.numel(), change.ne(0).sum(), change.square(
            ).sum(), old.double().square().sum()], dtype=torch.double)
    return markdown(["part", "parameters", "moved", "relative change"],
                    [[part, int(n), int(count), f"{(change / old) ** .5:.2e}"]
                     for part, (n, count, change, old) in sums.items()])


def check_moved(before, after, trained):
    """A block of which no trained parameter moved got no gradient: an error, not a table's row."""
    blocks = defaultdict(bool)
    for name in trained:
        block = re.sub(r"(\.\d+)\..*|\.[^.]*$", r"\1", name)
        blocks[block] |= not torch.equal(before[name], after[name])
    if stuck := [block for block, did in blocks.items() if not did]:
        raise BadInput(f"{stuck[0]} was to train and did not move: does any sample reach it?")


def tables(results, beta):
    """Held-out tables. results: {"before": ..., "after": ...} of evaluate; before may be absent."""
    sides, after, out = list(results), results["after"], []
    if "questions" in after:
        rows = sorted(([category, kind, n, most, grey,
                        *(results[s]["questions"][name][1] for s in sides)] for name, (
                            n, _, grey, most, category, kind) in after["questions"].items()),
                      key=lambda row: row[0])
        found = sorted({row[0] for row in rows})
        groups = {category: [category] for category in found} | {
            "visual": [c for c in found if c not in ("knowledge", "fact")], "all": found}
        rows += [[name, "", *map(sum, zip(*(row[2:] for row in rows if row[0] in group)))]
                 for name, group in groups.items() if group]
        out.append("Held-out questions: share answered right (greedy decoding). constant: always "
                   "the most common answer;\ngrey: the model shown a grey picture; visual: all but "
                   "knowledge.\n\n" + markdown(
                       ["category", "question", "n", "constant", "grey", *sides],
                       [[a, b, n, *(v / n for v in row)] for a, b, n, *row in rows]))
    if "pairs" in after:
        rows = []
        for kind in (*sorted({pair[0] for pair in after["pairs"]}), "all"):
            at = [i for i, pair in enumerate(after["pairs"]) if kind in (pair[0], "all")]
            texts, grey = zip(*(after["pairs"][i][1::2] for i in at))
            margins = [[results[side]["pairs"][i][2] for i in at] for side in sides]
            rows.append([kind, len(at), max(Counter(texts).values()) / len(at),
                         *(fmean(m > 0 for m in column) for column in (grey, *margins))])
            if len(sides) > 1:
                gain = [b - a for a, b in zip(*margins)]
                rows[-1] += [fmean(g > 0 for g in gain), beta * fmean(gain)]
        header = ["answer", "n", "majority", "grey", *sides, "reward accuracy", "reward margin"]
        out.append("Held-out preferences: share of pairs whose chosen response is the likelier "
                   "one. majority: the most common\nchosen response's share; grey: with a grey "
                   "picture; reward accuracy: share of pairs whose chosen response\ngained on the "
                   "rejected one; reward margin: by how much, times beta.\n\n" + markdown(
                       header[:len(rows[0])], rows))
    return out


def curve(log, file, width=640, height=320, pad=44):
    """The loss over the steps as a picture: every step in grey, a running mean in blue."""
    loss = [json.loads(line)["loss"] for line in Path(log).read_text().splitlines()]
    low, high, mean, smooth = min(loss), max(loss), loss[0], []
    for value in loss:
        mean += .1 * (value - mean)
        smooth.append(mean)
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)

    def points(values):
        right = (width - 2 * pad) / max(1, len(loss) - 1)
        up = (height - 2 * pad) / (high - low or 1)
        return [(pad + i * right, height - pad - (v - low) * up) for i, v in enumerate(values)]

    for value in (low + k * (high - low) / 4 for k in range(5)):
        draw.line(points([value] * len(loss)), fill=(225, 225, 225))
        draw.text((4, points([value])[0][1] - 6), f"{value:.3g}", fill="black")
    draw.line(points(loss), fill=(190, 190, 190))
    draw.line(points(smooth), fill=(40, 80, 220), width=2)
    draw.text((width // 2 - 60, height - 18), f"loss over {len(loss)} steps", fill="black")
    picture.save(file)


def line(text, width, color="white"):
    """A line of a page, behind a square of a color: (17, width, 3)."""
    image = Image.new("RGB", (width, 17), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle([4, 4, 12, 12], fill=color)
    draw.text((17, 0), text, fill="black", font=ImageFont.load_default(13))
    return np.array(image)


def panels(rows, c, headings, notes, file, side=190):
    """A page of pictures, a row for each (image or file, region, maps): what an encoder of config c
    sees of the image, then each map, a square array of colors, laid over it, with the outline of
    the region, (H, W) bool, if there is one. A heading over each column; lines under each row:
    notes[row] = [(text, color)]."""
    page = [np.hstack([line(heading[-side // 8:], side) for heading in headings])]
    width, size = page[0].shape[1], (side - 8, side - 8)
    for (image, region, maps), note in zip(rows, notes):
        image, *maps = (i.resize(size, Image.NEAREST) for i in (read_picture(image, c), *(
            Image.fromarray(colors.astype(np.uint8)) for colors in maps)))
        grey = image.convert("L").convert("RGB")
        pictures = [image, *(Image.blend(grey, colors, .65) for colors in maps)]
        if region is not None:
            mask = framed(Image.fromarray(region).convert("L"), c, Image.NEAREST)
            mask = mask.resize(size, Image.NEAREST)
            edge = ImageChops.subtract(mask, mask.filter(ImageFilter.MinFilter(5)))
            for picture in pictures:
                picture.paste("white", mask=edge)
        page.append(np.hstack([ImageOps.expand(picture, 4, "white") for picture in pictures]))
        page += [line(part, width, "white" if k else color) for text, color in note
                 for k, part in enumerate(textwrap.wrap(text, width // 8))]
    Image.fromarray(np.vstack(page)).save(file)


def segmentation_picture(images, c, found, colors, file, wide=12):
    """As the paper's figure 9: a patch has a stripe for each of its classes. c: see panels. found:
    {heading: (images, patches, classes) bool}, the truth among them; colors: {class: its RGB}."""
    def striped(seen):
        grid = round(len(seen) ** .5)
        out = np.full((grid, wide, grid, wide, 3), 255)
        for place, classes in enumerate(seen):
            painted = [color for color, there in zip(colors.values(), classes) if there]
            for x in range(wide if painted else 0):
                out[place // grid, :, place % grid, x] = painted[x * len(painted) // wide]
        return out.reshape(grid * wide, grid * wide, 3)

    rows = [(image, None, [striped(seen[i]) for seen in found.values()])
            for i, image in enumerate(images)]
    some = torch.stack([seen.flatten(0, 1).any(0) for seen in found.values()]).any(0)
    legend = [both for both, there in zip(colors.items(), some) if there]
    panels(rows, c, ["image", *found], [[]] * (len(rows) - 1) + [legend], file)


def gradient_picture(samples, c, maps, file):
    """As the paper's figure 7: image with the region's outline, SFT's and DPO's map (each scaled to
    its own maximum), question and both answers. samples, maps: gradient_maps', those to draw; c:
    see panels."""
    ramp = (20, 60, 180, 250, 255), (10, 20, 40, 140, 250), (60, 130, 110, 30, 120)     # RGB
    grid = round(maps.shape[2] ** .5)
    heat = (maps / maps.amax(2, keepdim=True)).unflatten(2, (grid, grid)).numpy()
    heat = np.stack([np.interp(heat, [0, .25, .5, .75, 1], color) for color in ramp], -1)
    notes = [list(zip((*s.turns[-1], s.rejected), ("white", "green", "red"))) for s in samples]
    panels([(s.image, s.region, both[:2]) for s, both in zip(samples, heat)], c,
           ["image", "SFT", "DPO"], notes, file)


# ----------------------------------------------------------------- encoders, side by side

DRAWN = {**DETAILS, "tilt": TILTS, "ground": range(GROUNDS)}    # what scenes differ in
CELLS = SIDE // CELL                                            # in a row
KS = 5, 10, 20, 50                                              # neighbours


def cells(x):
    """(scenes, tokens, width) -> (scenes, cells, 9, width): each cell as 3 x 3 patches."""
    grid = round(x.shape[1] ** .5)
    x = F.adaptive_avg_pool2d(x.mT.unflatten(2, (grid, grid)), 3 * CELLS)
    x = x.unflatten(3, (CELLS, 3)).unflatten(2, (CELLS, 3))     # scenes, width, y, 3, x, 3
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


def object_maps(scene, c):
    """For every detail what an encoder of config c sees, (image_size, image_size): 0 where no
    object is, else 1 + which value the object has."""
    maps = np.zeros((len(DETAILS), SIDE, SIDE), np.uint8)
    for thing in scene.things:
        maps[:, scene.mask([thing])] = [[1 + list(values).index(getattr(thing, name))]
                                        for name, values in DETAILS.items()]
    return [np.array(framed(Image.fromarray(ids), c, Image.NEAREST)) for ids in maps]


def annotation(file, c=None):
    """A picture of class numbers, 0 = none or other; what an encoder of config c sees of it."""
    try:
        image = Image.open(file)
        if len(image.getbands()) > 1:
            raise ValueError(f"mode {image.mode}, not one number per pixel")
        return np.array(framed(image, c, Image.NEAREST) if c else image)
    except (OSError, ValueError) as error:
        raise BadInput(f"{file}: cannot be read as an annotation ({error})") from None


def read_folder(folder, seed):
    """A user's pictures, shuffled: (files, (where validation and test start), each file's class
    number or annotation file, the classes' names). FOLDER/train/CLASS/*, val/CLASS/*; or
    FOLDER/images/training/*, annotations/training/*.png, and validation beside training. What has
    no test pictures gives a fifth of the others; where L2 is chosen, a tenth goes to that."""
    root, masked = Path(folder), (Path(folder) / "annotations").is_dir()
    top = root / "images" if masked else root
    parts = [top / p for p in (("training", "validation") if masked else ("train", "val"))]
    parts = [part for part in parts if part.is_dir()] or [top]
    files = [sorted(str(p) for p in part.rglob("*") if p.suffix.lower() in SUFFIXES)
             for part in parts]
    for each in files:
        random.Random(seed).shuffle(each)
    learn, test = [*files, []][:2]
    fifth = len(learn) // 5
    learn, test = (learn, test) if test else (learn[fifth:], learn[:fifth])
    found, names = learn + test, sorted({Path(file).parent.name for file in learn})
    if not test or not masked and len(names) < 2:
        raise BadInput(f"{folder}: needs at least two folders with pictures, one per class (in "
                       f"train/ and val/), or images/ and annotations/")
    if masked:
        truth = [root / "annotations" / Path(file).relative_to(top).with_suffix(".png")
                 for file in found]
        most = max(int(annotation(file).max()) for file in tqdm(truth, "classes", leave=False))
        return found, (len(learn), len(learn)), truth, range(1, most + 1)
    number = {name: i for i, name in enumerate(names)}
    truth = [number.get(Path(file).parent.name) for file in found]
    if None in truth:
        raise BadInput(f"{found[truth.index(None)]}: its class has nothing to learn from")
    return found, (len(learn) - max(1, len(learn) // 10), len(learn)), truth, names


def patch_truth(truth, kinds, c):
    """Segmentation's labels of scenes or annotation files, as an encoder of config c sees them:
    (pictures, patches, classes) bool. In the world, every value of every detail that is talked
    about is a class."""
    grid = c.image_size // c.patch_size

    def maps(one):
        return object_maps(one, c) if isinstance(one, Scene) else [annotation(one, c)]

    return torch.stack([torch.cat([patch_labels(ids, grid, len(classes)) for ids, classes in
                                   zip(maps(one), kinds.values())], 1)
                        for one in tqdm(truth, "labels", leave=False)])


def world_scenes(seed, sizes):
    """Probe scenes, and of each of their objects: (scene, place), (objects, DRAWN) values."""
    made = [Scene("probe", seed * sum(sizes) + i) for i in range(sum(sizes))]
    where = [(i, t.place) for i, scene in enumerate(made) for t in scene.things]
    values = [[list(DRAWN[name]).index(getattr(t, name, scene.ground)) for name in DRAWN]
              for scene in made for t in scene.things]
    return made, torch.tensor(where), torch.tensor(values)


def world_rows(views, where, values, words, cuts, device):
    """What the world's scenes tell about features: linear probes of an object, from the mean of its
    cell's 3 x 3 patches and from all nine side by side; alignment with words, features of captions
    (None: not measured)."""
    ends, row = [int((where[:, 0] < c).sum()) for c in cuts], {"linear": {}}
    for view, tokens in views.items():
        x = cells(tokens)[where[:, 0], where[:, 1]]
        for pool, pooled in (("mean", x.mean(1)), ("cell", x.flatten(1))):
            counts = [len(drawn) for drawn in DRAWN.values()]
            found = dict(zip(DRAWN, linear_probe(pooled, values, counts, ends, device)))
            ground, scenes = found["ground"], len(tokens) - cuts[1]     # one for all objects of
            ground |= {"right": ground["right"] * scenes / ground["n"], "n": scenes}    # a scene
            row["linear"][f"{view}, {pool}"] = found
    if words is not None:
        row["alignment"] = {view: mutual_knn(tokens[cuts[1]:].mean(1), words, KS)
                            for view, tokens in views.items()}
        row["alignment"]["chance"] = {k: k / (len(words) - 1) for k in KS}
    return row


def probes(encoders, folder=None, llm=None, select_layer=-2, seed=0, scenes=(1000, 300, 1000),
           device="cpu", workers=0, out=None):
    """Every probe on every encoder, on the same pictures, and on a random encoder like the first.

    encoders: {name: load_parts' folders}. folder: see read_folder; None: the world; of `scenes` so
    many to learn from, to choose L2 on, and to test on. llm: a text LLM to align with (world). out:
    folder for the segmentation's pictures, and, while it works, for features.
    Returns {name: {"linear": {view: {attribute: linear_probe's}}, "segmentation": {"recall", "f1":
    [per head], "classes": {class: recall}}, "alignment": {view: {k: score}}}}."""
    results, labels, found, config, words = {}, {}, {}, None, None
    if folder:
        images, cuts, truth, names = read_folder(folder, seed)
        kinds = {"class": names}
    else:
        truth, where, values = world_scenes(seed, scenes)
        images, kinds = [scene.image() for scene in truth], DETAILS
        cuts = scenes[0], scenes[0] + scenes[1]
        if llm:
            words = text_features(llm, [s.describe(s.things) for s in truth[cuts[1]:]], device)
    masked = not isinstance(truth[0], int)
    pool = (lambda x: x) if masked else (lambda x: x.mean(1))
    names = [f"{kind} {value}" for kind, classes in kinds.items() for value in classes]
    colors = {name: COLORS.get(name.removeprefix("color "), ImageColor.getrgb(
        f"hsv({i * 137 % 360}, 80%, 90%)")) for i, name in enumerate(names)}
    for name, at in {**encoders, "random": None}.items():
        parts = load_parts(*at, select_layer=select_layer) if at else [
            initialise(Encoder(config, select_layer), seed)]
        row, c = results.setdefault(name, {}), parts[0].config
        config = config or c
        with tempfile.TemporaryDirectory(dir=out) as memory:
            views = dict(zip(VIEWS, features([p.to(device) for p in parts], images, pool, memory,
                                             device, workers)))
            if not folder:
                row |= world_rows(views, where, values, words, cuts, device)
            if not masked:
                row["linear"] = {view: {"class": linear_probe(x, torch.tensor(truth)[:, None], [
                    len(names)], cuts, device)[0]} for view, x in views.items()}
                continue
            size = c.image_size, c.shortest_edge, c.patch_size
            if size not in labels:
                labels[size] = patch_truth(truth, kinds, c)
            row["segmentation"], found[name] = segmentation_probe(
                views[VIEWS[0]], labels[size], cuts[1], seed, device)
            row["segmentation"]["classes"] = dict(zip(names, row["segmentation"]["classes"]))
    for kind in kinds if masked and out else ():
        at = [i for i, name in enumerate(names) if name.startswith(kind)]
        shown = {"truth": labels[size][cuts[1]:], **found}
        some = [i for i, there in enumerate(shown["truth"][:, :, at]) if there.any()][:6]
        segmentation_picture([images[cuts[1] + i] for i in some], c,
                             {name: seen[some][:, :, at] for name, seen in shown.items()},
                             {names[i]: colors[names[i]] for i in at},
                             Path(out) / f"segmentation-{kind}.png")
    return results


def probe_tables(results):
    """The results of probes as markdown tables, a row for each encoder, with 95% intervals: of a
    share (Wilson), or over segmentation's heads."""
    out, any_row = [], next(iter(results.values()))

    def table(what, header, rows):
        out.append(f"{what}\n\n" + markdown(["encoder", *header], rows))

    def right(cells):
        hits, n = (sum(c[key] for c in cells) for key in ("right", "n"))
        return "{:.3f} ({:.3f}-{:.3f})".format(hits / n, *wilson(hits, n))

    def spread(values):                     # Student's t for 5 degrees of freedom: six heads
        half = 2.571 * np.std(values, ddof=1) / len(values) ** .5
        return f"{np.mean(values):.3f} ({np.mean(values) - half:.3f}-{np.mean(values) + half:.3f})"

    for view in dict.fromkeys(v for row in results.values() for v in row.get("linear", ())):
        rows = {n: row["linear"][view] for n, row in results.items() if view in row["linear"]}
        some = next(iter(rows.values()))
        groups = {name: [name] for name in some}
        if "tilt" in some:
            groups = {"asked": list(DETAILS), "never": ["tilt", "ground"], **groups}
        constant = [fmean(some[c]["constant"] for c in cs) for cs in groups.values()]
        table(f"Linear probe, {view}: top-1 on test.", groups, [
            *([n, *(right([row[c] for c in cs]) for cs in groups.values())]
              for n, row in rows.items()), ["constant", *constant]])
    if "segmentation" in any_row:
        kinds = dict.fromkeys(name.split()[0] for name in any_row["segmentation"]["classes"])
        found = {n: row["segmentation"] for n, row in results.items()}
        table("Segmentation probe: what each patch contains, macro over classes; recall by kind.",
              ["recall", "F1", *kinds],
              [[n, spread(row["recall"]), spread(row["f1"]), *(
                  fmean(v for c, v in row["classes"].items() if c.startswith(kind) and v == v)
                  for kind in kinds)] for n, row in found.items()])
    if "alignment" in any_row:
        table("Alignment with the text LLM: mutual k nearest neighbours.", [f"k = {k}" for k in KS],
              [[f"{n}, {view}", *scores.values()] for n, row in results.items()
               for view, scores in row["alignment"].items() if view != "chance" or n == "random"])
    return out


def gradient_tables(rows):
    """gradient_maps' rows, each with its "wording": lift and hit by wording and kind of answer, and
    by detail, with the 95% interval over samples of DPO's lift minus SFT's, paired by sample."""
    groups = defaultdict(list)
    for row in rows:
        groups["what the answers are", f"{row['wording']}, {row['answer']}"].append(row)
        groups["the detail they differ in", f"{row['wording']}, {row['detail']}"].append(row)
    out = []
    for title in dict.fromkeys(title for title, _ in groups):
        lines = []
        for name, some in ((name, some) for (at, name), some in groups.items() if at == title):
            gaps = [row["dpo"][0] - row["sft"][0] for row in some]
            half = 1.96 * np.std(gaps) / len(gaps) ** .5
            lines.append([name, len(some), *(fmean(row[m][i] for row in some)
                                             for i in (0, 1) for m in MAPS),
                          f"{fmean(gaps):+.3f} +- {half:.3f}"])
        out.append(f"Gradient maps, by {title}: lift, and how often the strongest token is inside."
                   "\n\n" + markdown(["wording, answer", "n", *(f"lift {m}" for m in MAPS),
                                      *(f"hit {m}" for m in MAPS), "lift, DPO - SFT"], lines))
    return out


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("encoders", nargs="+", metavar="ENCODER", help="an encoder's folder, or a stage's with "
        "encoder/ in it; a projector/ beside it is probed as well")
    add("--data", dest="folder", help="your pictures: a folder per class in train/ and val/, or "
        "images/ and annotations/ (default: the world's probe scenes)")
    add("--select-layer", type=int, default=-2, help="layer that is probed, as in LLaVA; 0: the "
        "last, normed (default: -2)")
    add("--encoder-config", help="folder with the JSON files of the encoder that an official PIVOT "
        "or LLaVA-OneVision folder began with")
    add("--seed", type=int, default=0, help="(default: 0)")
    add("--llm", help="text LLM folder for the alignment probe (default: none)")
    add("--out", type=Path, help="folder for results.json and pictures (default: none)")
    add("--workers", type=int, default=0, help="processes that read pictures")
    asked = vars(parser.parse_args(argv))
    config, encoders, out = asked.pop("encoder_config"), asked.pop("encoders"), asked["out"]
    folders = {}
    for name in encoders:
        home = Path(name) / "encoder" if (Path(name) / "encoder").is_dir() else Path(name)
        beside = home.parent / "projector"
        folders[name] = ((home, beside) if beside.is_dir() else
                         (home, home, config) if config else (home,))       # LLaVA's: all in one
    try:
        if out:
            out.mkdir(parents=True, exist_ok=True)
        results = probes(folders, device="cuda" if torch.cuda.is_available() else "cpu", **asked)
        if out:
            write_json(out / "results.json", results)
        print("\n\n".join(probe_tables(results)))
    except BadInput as error:
        print(f"probe: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
