"""What was learned: preference accuracy and visual question answering; tables and pictures.

Everything here measures a model as it was saved, on samples that no stage trains on.
"""
import copy
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from tqdm import tqdm

from data import BadInput

BATCH = 128


def autocast(device, dtype):
    """Compute in bf16 over fp32 weights, or leave everything in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def shares(data, prepare, what, **kind):
    """This rank's share of a data set, in order: (samples, Batch)."""
    mine = range(dist.get_rank(), len(data), dist.get_world_size())
    for start in tqdm(range(0, len(mine), BATCH), what, leave=False, disable=dist.get_rank() > 0):
        samples = [data[i] for i in mine[start:start + BATCH]]
        yield samples, prepare(samples, **kind)


def gathered(rows):
    """The rows of all ranks, on every rank."""
    if dist.get_world_size() == 1:
        return rows
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, rows)
    return [row for rows in everyone for row in rows]


@torch.no_grad()
def preference(model, data, prepare, device, dtype, blank=False):
    """[(kind, chosen text, logp chosen, logp rejected)] of pairs; blank: with a grey picture."""
    rows = []
    for samples, batch in shares(data, prepare, "pairs", blank=blank):
        with autocast(device, dtype):
            logps = model(batch.to(device)).tolist()
        rows += [(s.kind, s.turns[-1][1], *both) for s, both in zip(samples, logps)]
    return gathered(rows)


@torch.no_grad()
def vqa(model, data, prepare, device, dtype, blank=False):
    """[(kind, category, answer, score of what the model says)] of questions, generated greedily."""
    rows = []
    for samples, batch in shares(data, prepare, "questions", blank=blank, answers=False):
        with autocast(device, dtype):
            said = model.generate(batch.to(device), prepare.end, max_new=32)
        for s, ids in zip(samples, said):
            answers = s.answers or (s.turns[-1][1],)
            rows.append((s.kind, s.category, answers[0],
                         score(s.metric, prepare.tokenizer.decode(ids), answers)))
    return gathered(rows)


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


def evaluate(model, pairs, questions, prepare, device, dtype):
    """Measure a model on held-out pairs and questions (None: not on those).

    Returns {"pairs": [[kind, chosen text, logp chosen - logp rejected, the same with a grey
                        picture]],
             "questions": {category kind: [n, right, right with a grey picture, most common
                                           answer's n, category, kind]}}."""
    model.to(device).eval()
    prepare = copy.copy(prepare)
    prepare.responses = 2
    where, out = (prepare, device, dtype), {}

    if pairs is not None:
        seen, grey = (preference(model, pairs, *where, blank=b) for b in (False, True))
        out["pairs"] = [[kind, text, chosen - rejected, c - r]
                        for (kind, text, chosen, rejected), (_, _, c, r) in zip(seen, grey)]
    if questions is not None:
        seen, grey = (vqa(model, questions, *where, blank=b) for b in (False, True))
        out["questions"] = {}
        for kind, category in dict.fromkeys(row[:2] for row in seen):
            both = [(a, b) for a, b in zip(seen, grey) if a[:2] == (kind, category)]
            out["questions"][f"{category} {kind}"] = [
                len(both), sum(a[3] for a, _ in both), sum(b[3] for _, b in both),
                Counter(a[2] for a, _ in both).most_common(1)[0][1], category, kind]
    return out


# ------------------------------------------------------------------------------------------ cost

def flops(model, lengths, targets, trains, images):
    """Floating-point operations of a training step on rows of so many tokens; a multiply-add is
    two. Forward:

        encoder     per token  layers * (2 (4 d^2 + 2 d f) + 4 d tokens) + 2 * 3 p^2 d
        projector   per token  2 (d D + D^2)
        llm         per token  layers * (2 (2 D q + 2 D k + 3 D F) + 4 q length); per target 2 D V

    d, f / D, F: width and MLP width of encoder / LLM; q, k: width of all query / key heads; V: the
    vocabulary; p: the patch. The last term of a layer is attention (dense). Backward costs a matrix
    once more for its weights, if its part trains, and once more for its inputs, if anything that
    trains lies before it; attention, which has two inputs, twice more. Recomputation is not counted.

    model: an MLLM (its configs count). targets: tokens with a logit. trains: names of parts."""
    encoder, llm, layers = model.encoder.config, model.llm.config, len(model.encoder.used())
    n, d, f, p = encoder.tokens, encoder.hidden_size, encoder.intermediate_size, encoder.patch_size
    m = images * (n + encoder.class_token + encoder.num_register_tokens)
    f *= 1.5 if encoder.hidden_act == "swiglu" else 1       # its first matrix is twice as wide
    width, tokens, length = llm.hidden_size, n * images, sum(lengths)
    q, k = (h * llm.head_dim for h in (llm.num_attention_heads, llm.num_key_value_heads))
    depth = llm.num_hidden_layers
    steps = [       # in the order of the forward pass: (part, matrices, attention)
        ("encoder", tokens * 6 * p * p * d, 0),
        ("encoder", m * layers * 2 * (4 * d * d + 2 * d * f), m * layers * 4 * d * m / max(1, images)),
        ("projector", tokens * 2 * d * width, 0), ("projector", tokens * 2 * width * width, 0),
        ("llm", length * depth * 2 * (2 * width * (q + k) + 3 * width * llm.intermediate_size),
         sum(l * l for l in lengths) * depth * 4 * q),
        ("llm", targets * 2 * width * llm.vocab_size, 0)]
    total, below = 0, False
    for part, matrices, attention in steps:
        total += matrices * (1 + (part in trains) + below) + attention * (1 + 2 * below)
        below = below or part in trains
    return total


# ------------------------------------------------------------------------------ tables, pictures

def share(hits):
    hits = list(hits)
    return sum(hits) / len(hits)


def markdown(header, rows):
    """A table whose columns line up also where it is not rendered."""
    rows = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    rows = [header, ["-" * w for w in widths], *rows]
    return "\n".join("| " + " | ".join(v.ljust(w) for v, w in zip(row, widths)) + " |"
                     for row in rows)


def moved(before, after):
    """How far each part moved: |after - before| / |before|, and how many parameters moved."""
    sums = defaultdict(lambda: [0., 0., 0, 0])
    for name, old in before.items():
        part, change = name.split(".")[0], after[name].double() - old.double()
        row = (change.square().sum().item(), old.double().square().sum().item(),
               change.ne(0).sum().item(), old.numel())
        sums[part] = [a + b for a, b in zip(sums[part], row)]
    return markdown(["part", "parameters", "moved", "relative change"],
                    [[part, n, count, f"{(change / old) ** .5:.2e}"]
                     for part, (change, old, count, n) in sums.items()])


def check_moved(before, after, trained):
    """A block of which no trained parameter moved got no gradient: an error, not a table's row."""
    blocks = defaultdict(bool)
    for name in trained:
        block = re.sub(r"(\.\d+)\..*|\.[^.]*$", r"\1", name)
        blocks[block] |= not torch.equal(before[name], after[name])
    for block, did in blocks.items():
        if not did:
            raise BadInput(f"{block} was to train and did not move: does any sample reach it?")


def tables(results, beta):
    """Held-out tables. results: {"before": ..., "after": ...} of evaluate; before may be absent."""
    sides, after, out = list(results), results["after"], []
    if "questions" in after:
        rows, total = [], defaultdict(lambda: [0] * (len(sides) + 3))
        for name, (n, _, grey, majority, category, kind) in after["questions"].items():
            row = [n, majority, grey, *(results[s]["questions"][name][1] for s in sides)]
            rows.append([category, kind, *row])
            for key in (category, "all", *(["visual"] if category not in ("knowledge", "fact") else [])):
                total[key] = [a + b for a, b in zip(total[key], row)]
        rows.sort(key=lambda row: row[0])
        rows += [[key, "", *total[key]] for key in (*sorted(set(total) - {"visual", "all"}),
                                                    "visual", "all")]
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
            row = [kind, len(at), share(t == max(texts, key=texts.count) for t in texts),
                   *(share(m > 0 for m in column) for column in (grey, *margins))]
            if len(sides) > 1:
                gain = [b - a for a, b in zip(*margins)]
                row += [share(g > 0 for g in gain), beta * sum(gain) / len(gain)]
            rows.append(row)
        header = ["answer", "n", "majority", "grey", *sides, "reward accuracy", "reward margin"]
        out.append(
            "Held-out preferences: share of pairs whose chosen response is the likelier one. majority: "
            "the most common\nchosen response's share; grey: with a grey picture; reward accuracy: "
            "share of pairs whose chosen response\ngained on the rejected one; reward margin: by how "
            "much, times beta.\n\n" + markdown(header[:len(rows[0])], rows))
    return out


def curve(log, file):
    """The loss over the steps as a picture: every step in grey, a running mean in blue."""
    loss = [json.loads(line)["loss"] for line in Path(log).read_text().splitlines()]
    width, height, pad = 640, 320, 44
    low, high, mean, smooth = min(loss), max(loss), loss[0], []
    for value in loss:
        mean += .1 * (value - mean)
        smooth.append(mean)
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)

    def at(step, value):
        return (pad + step * (width - 2 * pad) / max(1, len(loss) - 1),
                height - pad - (value - low) * (height - 2 * pad) / ((high - low) or 1))

    for value in (low + k * (high - low) / 4 for k in range(5)):
        draw.line([at(0, value), at(len(loss) - 1, value)], fill=(225, 225, 225))
        draw.text((4, at(0, value)[1] - 6), f"{value:.3g}", fill="black")
    draw.line([at(i, v) for i, v in enumerate(loss)], fill=(190, 190, 190))
    draw.line([at(i, v) for i, v in enumerate(smooth)], fill=(40, 80, 220), width=2)
    draw.text((width // 2 - 60, height - 18), f"loss over {len(loss)} steps", fill="black")
    picture.save(file)
