"""What was learned: preference accuracy and visual question answering, tables and pictures.

Everything here measures a model as it was saved, on samples that no stage trains on."""
import copy
import json
from collections import Counter, defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from tqdm import tqdm

from model import load_model

BATCH = 128


def autocast(device, dtype):
    """Compute in bf16 over fp32 weights, or leave everything in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def batches(data, prepare, rank, world, what, **kind):
    """This rank's share of a data set, in order: (samples, Batch)."""
    mine = range(rank, len(data), world)
    for start in tqdm(range(0, len(mine), BATCH), what, leave=False, disable=rank > 0):
        samples = [data[i] for i in mine[start:start + BATCH]]
        yield samples, prepare(samples, **kind)


def gathered(rows, world):
    """The rows of all ranks, on every rank."""
    if world == 1:
        return rows
    everyone = [None] * world
    dist.all_gather_object(everyone, rows)
    return [row for rows in everyone for row in rows]


@torch.no_grad()
def preference(model, data, prepare, device, dtype, rank=0, world=1, blank=False):
    """[(sample id, kind, chosen text, logp chosen, logp rejected)] over held-out pairs; blank: with a grey picture."""
    rows = []
    for samples, batch in batches(data, prepare, rank, world, "pairs", blank=blank):
        with autocast(device, dtype):
            logps = model(batch.to(device)).tolist()
        rows += [(s.id, s.kind, s.turns[-1][1], *both) for s, both in zip(samples, logps)]
    return gathered(rows, world)


@torch.no_grad()
def vqa(model, data, prepare, device, dtype, rank=0, world=1, blank=False):
    """[(sample id, kind, category, answer, what the model said)], greedy generation."""
    rows = []
    for samples, batch in batches(data, prepare, rank, world, "questions", blank=blank, answers=False):
        with autocast(device, dtype):
            said = model.generate(batch.to(device), prepare.tokenizer.end, max_new=8)
        rows += [(s.id, s.kind, s.category, s.turns[-1][1], prepare.tokenizer.decode(ids).strip())
                 for s, ids in zip(samples, said)]
    return gathered(rows, world)


def evaluate(parts, select_layer, pairs, questions, prepare, device, dtype, rank=0, world=1):
    """Measure the model in three folders on held-out pairs and questions (None: not on those).

    Returns {"pairs": {kind: [n, right, right with a grey picture, sum of margins, most common chosen text's n]},
             "questions": {kind: [n, right, right with a grey picture, most common answer's n, category]}}"""
    model = load_model(parts["encoder"], parts["projector"], parts["llm"], select_layer).to(device).eval()
    prepare = copy.copy(prepare)
    prepare.responses = 2
    where = device, dtype, rank, world
    out = {}
    if pairs is not None:
        out["pairs"] = table = defaultdict(lambda: [0, 0, 0, 0., 0])
        seen, blank = preference(model, pairs, prepare, *where), preference(model, pairs, prepare, *where, blank=True)
        common = {key: Counter(t for _, k, t, *_ in seen if key in (k, "all")).most_common(1)[0][0]
                  for key in {"all", *(k for _, k, *_ in seen)}}
        for (_, kind, text, chosen, rejected), (*_, c, r) in zip(seen, blank):
            for key in (kind, "all"):
                row = 1, chosen > rejected, c > r, chosen - rejected, text == common[key]
                table[key] = [a + b for a, b in zip(table[key], row)]
    if questions is not None:
        out["questions"] = table = defaultdict(lambda: [0, 0, 0, 0, ""])
        seen, blank = vqa(model, questions, prepare, *where), vqa(model, questions, prepare, *where, blank=True)
        common = {k: Counter(a for _, kind, _, a, _ in seen if kind == k).most_common(1)[0][0] for _, k, *_ in seen}
        for (_, kind, category, answer, said), (*_, unseen) in zip(seen, blank):
            hit = (1, said == answer, unseen == answer, answer == common[kind])
            table[kind] = [a + b for a, b in zip(table[kind], (*hit, category if not table[kind][4] else ""))]
    return out


# ------------------------------------------------------------------------------------------------------ tables, pictures

def markdown(header, rows):
    """A table whose columns line up also where it is not rendered."""
    rows = [header, *[[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row] for row in rows]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    rows.insert(1, ["-" * w for w in widths])
    return "\n".join("| " + " | ".join(v.ljust(w) for v, w in zip(row, widths)) + " |" for row in rows)


def moved(before, after):
    """How far each part moved: |after - before| / |before|, and the parameters that moved at all."""
    sums = defaultdict(lambda: [0., 0., 0, 0])
    for name, old in before.items():
        change = (after[name].double() - old.double())
        row = change.square().sum().item(), old.double().square().sum().item(), change.ne(0).sum().item(), old.numel()
        sums[name.split(".")[0]] = [a + b for a, b in zip(sums[name.split(".")[0]], row)]
    return markdown(["part", "parameters", "moved", "relative change"],
                    [[part, n, moved, f"{(change / old) ** .5:.2e}"] for part, (change, old, moved, n) in sums.items()])


def tables(results, beta):
    """Held-out tables, before (where there is a before) and after. results: {"before": ..., "after": ...}."""
    sides, out = list(results), []
    after = results["after"]
    if "questions" in after:
        total, rows = defaultdict(lambda: [0] * (len(sides) + 4)), []
        for kind, (n, _, blank, constant, category) in after["questions"].items():
            row = [n, constant, blank, *(results[side]["questions"][kind][1] for side in sides)]
            rows.append([category, kind, n, *(v / n for v in row[1:])])
            for key in (category, *(["visual"] if category != "knowledge" else []), "all"):
                total[key] = [a + b for a, b in zip(total[key], row)]
        rows.sort(key=lambda row: row[0])
        rows += [[key, "", n, *(v / n for v in sums)] for key, (n, *sums) in sorted(
            total.items(), key=lambda item: (item[0] in ("visual", "all"), item[0] == "all", item[0]))]
        out.append("Visual questions, held out: share answered right (greedy, exact match); constant = always the most "
                   "common\nanswer, grey = the model shown a grey picture.\n\n" +
                   markdown(["category", "question", "n", "constant", "grey", *sides], rows))
    if "pairs" in after:
        rows = []
        for kind, (n, right, blank, margin, majority) in after["pairs"].items():
            gain = [beta * (margin - results["before"]["pairs"][kind][3]) / n] if "before" in results else []
            rows.append([kind, n, majority / n, blank / n, *(results[s]["pairs"][kind][1] / n for s in sides), *gain])
        out.append("Preferences, held out: share of pairs whose chosen response is the likelier one; majority = the most "
                   "common\nchosen response, grey = with a grey picture.\n\n" +
                   markdown(["answer", "n", "majority", "grey", *sides, *(["reward margin"] if len(sides) > 1 else [])],
                            sorted(rows, key=lambda row: row[0] == "all")))
    return out


def curve(log, file):
    """The loss over the steps as a picture: every step in grey, a running mean in blue."""
    loss = [json.loads(line)["loss"] for line in Path(log).read_text().splitlines()]
    width, height, pad = 640, 320, 44
    low, high = min(loss), max(loss)
    mean, smooth = loss[0], []
    for value in loss:
        mean += .1 * (value - mean)
        smooth.append(mean)
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)

    def at(step, value):
        return (pad + step * (width - 2 * pad) / max(1, len(loss) - 1),
                height - pad - (value - low) * (height - 2 * pad) / ((high - low) or 1))

    for k in range(5):
        value = low + k * (high - low) / 4
        draw.line([at(0, value), at(len(loss) - 1, value)], fill=(225, 225, 225))
        draw.text((4, at(0, value)[1] - 6), f"{value:.3g}", fill="black")
    for values, color in ((loss, (190, 190, 190)), (smooth, (40, 80, 220))):
        if len(values) > 1:
            draw.line([at(i, v) for i, v in enumerate(values)], fill=color, width=1 + (values is smooth))
    draw.text((width // 2 - 60, height - 18), f"loss over {len(loss)} steps", fill="black")
    picture.save(file)
