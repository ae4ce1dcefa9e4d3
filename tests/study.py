"""The paper's study on the embedded world: trains what it compares, several seeds of each, and writes report.md.

    python tests/study.py --seeds 5 --first 100 --out runs/study            the core comparison
    python tests/study.py --seeds 5 --first 100 --out runs/study --sweeps 2 also sizes, samples and single settings
    python tests/study.py --seeds 3 --first 0 --out runs/tune --grid        learning rates, on validation scenes

Every model is one command of pivot.py; what is there already is kept, so that an interrupted study goes on where it was.
Post-training seed s starts from one of two base models and sees scenes of its own; all rows of a seed share base, samples
and order, so that differences between rows are paired by seed. Options not listed here go to pivot.py.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from probe import markdown  # noqa: E402

GRID = ["3e-6", "1e-5", "3e-5", "1e-4", "3e-4", "1e-3", "3e-3"]
SAMPLES = [512, 1024, 2048]                            # beside the default number
SETTINGS = {    # one departure from the defaults each
    "one-rate": ["--lr", "3e-4", "--encoder-lr", "3e-4"],       # the same for both methods
    "terse": ["--wording", "terse"], "apart": ["--wording", "apart"], "perfect": ["--errors", "0"],
    "drawn": ["--pairs", "drawn"], "sampled": ["--pairs", "sampled"],
    # more than the laptop's minutes allow by default: here DPO, too, learns to rank unseen pairs
    "16k": ["--samples", "16384", "--steps", "1024"],
    "clean-16k": ["--samples", "16384", "--steps", "1024", "--pairs", "drawn", "--errors", "0"]}
DPO_16K = ["--lr", "1e-4", "--encoder-lr", "1e-4"]     # by the grid's rule; SFT's: 1e-3, as ever
BASES = {f"{part}-{size}": [f"--{part}-size", size] for size in ("small", "large") for part in ("encoder", "llm")}
LONG = ["--steps", "1600"]                             # of instruct, twice the default: a base model that has seen more
BATCH = 16                                             # of SFT and DPO
PIVOTS = {"original": "{b}/encoder", "base": "{b}/instruct", "sft": "{s}/sft", "dpo": "{s}/dpo",
          "larger": "{b}-larger/encoder"}


def runs_of(first, seeds, name):
    """({run of a seed: run of its base model}, {run: seed}). name: one run for both, of the one seed."""
    numbers = range(first, first + seeds)
    if name:
        return {name: name}, {name: first}
    bases = {str(s): f"base-{numbers[i % min(2, seeds)]}" for i, s in enumerate(numbers)}
    return bases, {run: int(run.split("-")[-1]) for run in (*bases, *(f"base-{s}" for s in numbers))}


def plan(bases, number, grid, sweeps, samples):
    """{run/stage: (options of pivot.py, jobs that it waits for)}, in the order in which to start them."""
    jobs = {}

    def add(run, stage, base, seed, *options, after=()):
        jobs.setdefault(f"{run}/{stage}", (["--base", base, "--seed", number[seed], *options], list(after)))

    def chain(base, seed, *options, longer=()):
        add(base, "encoder", base, seed, *options)
        add(base, "instruct", base, seed, *options, *longer, after=[f"{base}/encoder"])

    def maps(base, seed):
        if not grid:
            add(base, "gradients", base, seed, after=[f"{base}/instruct"])

    def both(run, base, seed, *options):
        for stage in ("sft", "dpo"):
            own = DPO_16K if stage == "dpo" and run.endswith("16k") else ()
            add(run, stage, base, seed, *options, *own, after=[f"{base}/instruct"] + [f"{run}/sft"] * (stage == "dpo"))

    for b in dict.fromkeys(bases.values()):
        chain(b, b)
        maps(b, b)
    if grid:
        for s, b in bases.items():
            for rate in GRID:
                both(f"{s}-{rate}", b, s, "--lr", rate, "--encoder-lr", rate)
        return jobs
    for s, b in bases.items():
        both(s, b, s)
        add(f"{s}-twice", "sft", b, s, "--samples", 2 * samples, "--steps", 2 * samples // BATCH, after=[f"{b}/instruct"])
    for s, b in bases.items():
        add(f"{b}-larger", "encoder", f"{b}-larger", b, "--encoder-size", "large", after=[f"{b}/instruct"])
        add(s, "probe", b, s, after=[f"{s}/sft", f"{s}/dpo", f"{s}-twice/sft", f"{b}-larger/encoder"])
        add(b, "probe", b, b, after=[f"{b}/instruct", f"{b}-larger/encoder"])
        for row, source in PIVOTS.items():
            source = source.format(s=s, b=b)
            add(f"{s}-pivot-{row}", "pivot", b, s, "--encoder", f"{{out}}/{source}/encoder",
                after=[source, f"{b}/instruct"])

    def sweep(run, base, s, *options):
        both(run, base, s, *options)
        add(run, "probe", base, s, after=[f"{run}/sft", f"{run}/dpo"])

    some = list(bases.items())[:sweeps]
    for s, b in some:
        for n in SAMPLES:
            sweep(f"{s}-n{n}", b, s, "--samples", n, "--steps", n // BATCH)
        for name, options in SETTINGS.items():
            sweep(f"{s}-{name}", b, s, *options)
    for b in [b for b in number if b not in bases or b in bases.values()] if sweeps else ():
        chain(b, b)                                     # more base models, most for their maps alone
        maps(b, b)
        chain(f"{b}-long", b, longer=LONG)
        maps(f"{b}-long", b)
    for s, b in some:
        sweep(f"{s}-long", f"{b}-long", s)
        sweep(f"{s}-long-clean-16k", f"{b}-long", s, *SETTINGS["clean-16k"])
    for name, options in BASES.items():
        for s, b in some:
            chain(f"{b}-{name}", b, *options)
            maps(f"{b}-{name}", b)
            sweep(f"{s}-{name}", f"{b}-{name}", s)
    return jobs


def run(jobs, out, parallel, extra):
    """Run the jobs, `parallel` at a time, each with its share of the cores; stop at the first that fails."""
    def finished(name):
        file = out / name / "settings.json"
        return file.exists() and json.loads(file.read_text()).get("finished", False)

    def log(name):
        return out / "logs" / f"{name.replace('/', '-')}.txt"

    def now(name):
        """What the job's own bar says: its stage and how far it is."""
        bars = re.findall(r"(\w+): +(\d+%)", log(name).read_text(errors="replace")[-300:])
        return " ".join((name, *(bars[-1] if bars else ())))

    cores = os.cpu_count() or 1
    bases = {options[1] for options, _ in jobs.values() if not options[1].endswith(("large", "small", "larger"))}
    chain = [f"{b}/{stage}" for b in bases for stage in ("encoder", "instruct")]
    waiting, running = [j for j in jobs if not finished(j)], {}
    (out / "logs").mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(waiting), unit="job", dynamic_ncols=True)
    while waiting or running:
        for name, (process, began) in list(running.items()):
            if process.poll() is not None:
                del running[name]
                bar.update()
                bar.write(f"{name}: {time.time() - began:.0f} s")
                if process.returncode:
                    sys.exit(f"{name} failed, see {log(name)}: {log(name).read_text()[-2000:]}")
        open_ = {*waiting, *running}
        ready = [j for j in waiting if not open_ & set(jobs[j][1])]
        for name in ready[:parallel - len(running)]:
            waiting.remove(name)
            options = [str(o).replace("{out}", str(out)) for o in jobs[name][0]]
            command = [sys.executable, str(ROOT / "pivot.py"), "--runs", str(out), "--name", name.split("/")[0],
                       "--stage", name.split("/")[1], *options, *extra]
            alone = name in chain and len(chain) == 2           # one base model: all others wait for it
            threads = cores if alone else max(1, cores // parallel)
            with open(log(name), "w") as file:
                running[name] = subprocess.Popen(command, stdout=file, stderr=file, env={
                    **os.environ, "OMP_NUM_THREADS": str(threads)}), time.time()
        bar.set_postfix_str(", ".join(map(now, running)))
        time.sleep(.2)
    bar.close()


# --------------------------------------------------------------------------------------------------------- what came out

T = [0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]     # Student's t, 97.5%, by degrees of freedom
POWER = [0, 1.376, 1.061, .978, .941, .920, .906, .896, .889, .883]         # the same, 80%
SHARED = ("random", "original", "larger original", "base")                 # rows that all seeds of a base model share
GROUPS = {"asked": ("shape", "color", "size", "texture", "letter"),         # tilt and ground are never mentioned
          "tilt": ("tilt",), "ground": ("ground",)}


def read(file):
    return json.loads(file.read_text()) if file.exists() else None


def answers(folder):
    """{metric: value} of a stage's questions and pairs on held-out scenes."""
    found = (read(folder / "results.json") or {}).get("results")
    if not found:
        return {}
    groups = {"visual": lambda kind, category: category not in ("knowledge", "fact"),
              **{c: lambda kind, category, c=c: category == c for c in ("general", "knowledge", "ocr", "vision")},
              "absent objects": lambda kind, category: kind == "exist",
              "text only": lambda kind, category: kind == "fact"}
    out = {}
    for name, wanted in groups.items():
        rows = [row for row in found["questions"].values() if wanted(row[5], row[4])]
        out[name] = sum(row[1] for row in rows) / sum(row[0] for row in rows)
        out["blank: " + name] = sum(row[2] for row in rows) / sum(row[0] for row in rows)
    if "pairs" in found:
        out["pairs"] = sum(pair[2] > 0 for pair in found["pairs"]) / len(found["pairs"])
    return out


def probed(row):
    """{metric: value} of one encoder's probes."""
    out = {}
    for view, attributes in row["linear"].items():
        for name, group in GROUPS.items():
            cells = [attributes[a] for a in group]
            out[f"{name}, {view}"] = sum(c["right"] for c in cells) / sum(c["n"] for c in cells)
    for k in ("recall", "f1"):
        out[f"segmentation {k}"] = sum(row["segmentation"][k]) / len(row["segmentation"][k])
    return out | {f"alignment {k}": v for k, v in row.get("alignment", {}).get("encoder", {}).items()}


def collect(out, bases):
    """{row: {metric: {seed: value}}}; what is missing is missing. What belongs to a base model, not to a seed, stands at
    the first seed that uses it: two seeds do not make one base model two."""
    table, once = {}, {b: s for s, b in reversed(bases.items())}

    def put(row, metrics, shared=False):
        for name, value in metrics.items() if not shared or once[b] == s else ():
            table.setdefault(row, {}).setdefault(name, {})[s] = value

    for s, b in bases.items():
        mine, first = (read(out / name / "probe" / "results.json") for name in (s, b))
        for row, run, label in (("random", first, "random"), ("original", first, "encoder"),
                                ("base", mine, "base" if s != b else "instruct"), ("larger original", first, "larger encoder"),
                                ("SFT", mine, "sft"), ("SFT x 2", mine, "twice sft"), ("DPO", mine, "dpo")):
            if run and label in run["probes"]:
                put(row, probed(run["probes"][label]), run is first)
        for row, at in (("base", f"{b}/instruct"), ("SFT", f"{s}/sft"), ("SFT x 2", f"{s}-twice/sft"),
                        ("DPO", f"{s}/dpo")):
            put(row, answers(out / at), row == "base")
        for row, name in zip(("original", "base", "SFT", "DPO", "larger original"), PIVOTS):
            put(row, {f"PIVOT: {k}": v for k, v in answers(out / f"{s}-pivot-{name}" / "pivot").items()})
    return table


def interval(values):
    """(mean, half of its 95% interval, what a true difference must be to be found in 80% of such studies)."""
    n = len(values)
    mean = sum(values) / n
    error = (sum((v - mean) ** 2 for v in values) / max(1, n - 1) / n) ** .5
    return mean, T[n - 1] * error if n > 1 else float("nan"), (T[n - 1] + POWER[n - 1]) * error if n > 1 else float("nan")


def compare(table, a, b, metrics, bases):
    """Rows of a markdown table: b - a, paired by seed. What has no value of this seed has its base model's; where neither
    depends on the seed, a base model counts once."""
    rows, once = [], {b: s for s, b in reversed(bases.items())}
    for metric in metrics:
        first, second = (table.get(row, {}).get(metric, {}) for row in (a, b))
        both = a in SHARED and b in SHARED and not metric.startswith("PIVOT")
        pairs = [(first[at], second[s]) for s in second if not both or s in once.values()
                 for at in (s if s in first else once[bases[s]],) if at in first]
        if pairs:
            mean, half, least = interval([y - x for x, y in pairs])
            sure = "not known from one seed" if half != half else "higher" if mean > half else \
                "lower" if mean < -half else "no difference found"
            known = [f"{v:.4f}" if v == v else "" for v in (half, least)]
            rows.append([f"{b} - {a}", metric, len(pairs), f"{mean:+.4f}", *known, sure])
    return rows


def values(table, metrics):
    rows = [[row, *(f"{sum(found[m].values()) / len(found[m]):.3f}" if m in found else "" for m in metrics)]
            for row, found in table.items() if any(m in found for m in metrics)]
    return markdown(["row", *metrics], rows)


DIFFERENCE = ["difference", "measure", "seeds", "mean", "95% +-", "detectable", "verdict"]
CONTROL = "No claim of the paper: "
FINDINGS = [    # title, claim, measures, pairs of rows; the first table: first measure of DPO - SFT, or of the first pair
    ("1. A larger encoder, frozen, in a fresh MLLM", "A larger encoder helps, most where fine vision is needed.",
     ["PIVOT: visual", "PIVOT: ocr", "PIVOT: vision", "PIVOT: knowledge"], [("original", "larger original")]),
    ("2. DPO and SFT under the LLM", "DPO is better than SFT, mostly on strongly visual questions.",
     ["visual", "general", "knowledge", "ocr", "vision", "absent objects", "text only", "pairs"],
     [("base", "SFT"), ("base", "DPO"), ("SFT", "DPO"), ("SFT x 2", "DPO")]),
    ("2b. The same with blank images", CONTROL + "whoever answers without looking shows here.",
     ["blank: visual", "blank: absent objects"], [("base", "DPO"), ("SFT", "DPO")]),
    ("3. The encoder by itself: linear probes", "Post-training rewrites the encoder; DPO's is better than SFT's.",
     [*(f"{what}, encoder, {pool}" for pool in ("cell", "mean") for what in GROUPS), "asked, encoder + projector, cell"],
     [("random", "original"), ("original", "base"), ("base", "SFT"), ("base", "DPO"), ("SFT", "DPO"), ("SFT x 2", "DPO")]),
    ("4. Segmentation", "DPO's encoder localises better than SFT's.", ["segmentation recall", "segmentation f1"],
     [("random", "original"), ("original", "base"), ("base", "SFT"), ("base", "DPO"), ("SFT", "DPO"), ("SFT x 2", "DPO")]),
    ("Alignment with a text LLM", "DPO's features agree better with a text LLM's.",
     ["alignment 5", "alignment 10", "alignment 20", "alignment 50"],
     [("original", "base"), ("base", "SFT"), ("base", "DPO"), ("SFT", "DPO")]),
    ("6. PIVOT: the encoder, frozen, in a fresh MLLM", "PIVOT's encoder beats SFT's, the original and a larger original.",
     ["PIVOT: visual", "PIVOT: general", "PIVOT: knowledge", "PIVOT: ocr", "PIVOT: vision"],
     [("original", "base"), ("base", "SFT"), ("base", "DPO"), ("SFT", "DPO"), ("larger original", "DPO")])]


LIFT = """The paper: DPO's gradient concentrates on the question's region, SFT's is scattered.

lift: share of the gradient's mass inside the region over the region's share of the picture; hit: the strongest token lies
inside. Part of DPO's lift is arithmetic: tokens that both answers share cancel; compare "sft, differing tokens". Wording: terse,
the base model's own; free, the preferences', a pair alike; apart, a pair's two in different words.

"""


def gradients(out, bases, endings):
    """Finding 4, gradient maps of the base models: lift by kind of answer, in every wording, and by detail. endings: of the
    names of base models; those of a seed count once. Returns markdown and {kind of answer: (mean of DPO's lift over SFT's,
    half of its interval)}; nothing if a map is missing."""
    homes = {b: [read(out / f"{b}{e}" / "gradients" / "results.json") for e in endings] for b in bases}
    homes = {b: [row for part in found for row in part["gradients"]] for b, found in homes.items() if all(found)}
    if not homes:
        return "", {}
    groups = [("", wording, "answer") for wording in ("free", "terse", "apart")] + [("detail: ", "terse", "detail")]
    rows, maps, ratio = [], ("sft", "dpo", "sft, differing tokens", "rejected"), {}
    for title, wording, key in groups:
        def wanted(row):
            described = row["answer"] != "one word"
            return row["wording"] == wording and (described or key == "answer" and wording == "free")
        for group in sorted({row[key] for home in homes.values() for row in home if wanted(row)}):
            some = [[row for row in home if wanted(row) and row[key] == group] for home in homes.values()]
            lifts = [[sum(row[m][i] for row in part) / len(part) for i in (0, 1) for m in maps] for part in some if part]
            ratios = [interval([home[k] / home[0] for home in lifts])[:2] for k in (1, 2)]
            name = title + group + (f", {wording}" if group in ("object", "scene") else "")
            ratio[name] = ratios[0]
            rows.append([name, *(f"{sum(c) / len(c):.2f}" for c in zip(*lifts)),
                         *(f"{mean:.2f}" + (f" +- {half:.2f}" if half == half else "") for mean, half in ratios)])
    return markdown([f"{len(homes) * len(endings)} base models", *(f"lift {m}" for m in maps), *(f"hit {m}" for m in maps), "DPO / SFT",
                     "differing tokens / SFT"], rows), ratio


def knowledge(out):
    """Does DPO's gradient find what the base model already sees? A point for each base model (of any size) and detail: its
    right answers above the constant answer's, and DPO's lift over SFT's, descriptions in the base model's own terse words."""
    points, rows = {}, []
    for home in sorted(out.glob("base-*")):
        found, asked = (read(home / stage / "results.json") for stage in ("gradients", "instruct"))
        for n, right, _, constant, _, detail in asked["results"]["questions"].values() if found and asked else ():
            some = [row for row in found["gradients"] if row["wording"] == "terse" and row["answer"] != "one word"
                    and row["detail"] == detail]
            if some and detail in GROUPS["asked"]:
                sft, dpo = (sum(row[m][0] for row in some) for m in ("sft", "dpo"))
                points[home.name, detail] = (right - constant) / n, dpo / sft
    homes = dict.fromkeys(home for home, _ in points)
    if len({home.split("-")[1] for home in homes}) < 3:
        return ""
    details = list(dict.fromkeys(detail for _, detail in points))
    rows = [[home, *(f"{points[home, d][0]:+.2f}: {points[home, d][1]:.2f}" for d in details)] for home in homes]
    x, y = (np.array([[points[home, d][i] for d in details] for home in homes]) for i in (0, 1))

    def slope(kept):
        """log(y) on x, least squares, between base models, within a detail."""
        a, b = (v[kept] - v[kept].mean(0) for v in (x, np.log(y)))
        return (a * b).sum() / (a * a).sum()

    seeds = np.array([home.split("-")[1] for home in homes])         # what a seed's base models share is not seen twice
    without = np.array([slope(seeds != seed) for seed in dict.fromkeys(seeds)])
    n = len(without)
    half = T[min(n, len(T)) - 1] * ((n - 1) / n * ((without - without.mean()) ** 2).sum()) ** .5
    return ("Does DPO's gradient find what the base model already sees? Right answers above the constant answer's share, and "
            "DPO's lift over SFT's (descriptions,\nterse), by base model and detail:\n\n" + markdown(["base model", *details], rows) +
            f"\n\nWithin a detail, between base models: {slope(seeds != ''):+.2f} +- {half:.2f} in log(lift ratio) for "
            "each 1.00 of accuracy (least squares, jackknife over seeds).")


def sweeps(out, bases):
    """Figures 2 to 6 in small, and one departure from the defaults at a time, paired by seed, or by base model where that is
    another one."""
    parts = {"1. and 5. Size of the encoder and of the LLM head": [*BASES],
             "Base models of twice the instruct steps": ["long", "long-clean-16k"],
             "2. and 3. Number of samples": [f"n{n}" for n in SAMPLES],
             "Settings of the world, one at a time": list(SETTINGS)}
    metrics = ["visual", "ocr", "pairs", "asked, encoder, cell", "segmentation recall"]

    def measured(run, stage, probed_in, label):
        row = (read(out / probed_in / "probe/results.json") or {}).get("probes", {}).get(label)
        return answers(out / run / stage) | (probed(row) if row else {})

    def rows_of(name, some):
        """Means of base, SFT and DPO, and differences, each {seed or base model: a value for each of the metrics}."""
        rows = [[name or "defaults", row, len(some), *(f"{np.mean([k[m] for k in kind]):.3f}" for m in metrics)]
                for row, kind in zip(("base", "SFT", "DPO"), zip(*some.values()))]
        gaps = {f"DPO - {a}": {s: [k[2][m] - k[at][m] for m in metrics] for s, k in some.items()}
                for at, a in enumerate(("base", "SFT"))}
        against = {s: [k[2][m] - usual[s][2][m] for m in metrics] for s, k in some.items() if name and s in usual}
        if name in bases_of:                            # what differs is between base models, so that they count, not seeds
            against = {b: np.mean([against[s] for s in against if bases[s] == b], 0) for b in {bases[s]: 0 for s in against}}
        for what, found in {**gaps, "DPO - the defaults' DPO": against}.items():
            cells = [interval(column)[:2] for column in zip(*found.values())]
            rows += [["", what, len(found), *(f"{m:+.3f}" + (f" +- {h:.3f}" if h == h else "") for m, h in cells)]] if found else []
        return rows

    bases_of = {**{name: f"-{name}" for name in BASES}, "long": "-long", "long-clean-16k": "-long"}    # not the defaults'
    complete = {}                                       # {name: {seed: (base's, SFT's, DPO's metrics)}}
    for name in ("", *(name for names in parts.values() for name in names)):
        for s, b in bases.items():
            run = f"{s}-{name}".rstrip("-")
            at, home = (run if name in bases_of else s), b + bases_of.get(name, "")
            kinds = (measured(home, "instruct", at, "base" if s != b else "instruct"),
                     *(measured(run, stage, run, stage) for stage in ("sft", "dpo")))
            if all(metrics[-1] in kind for kind in kinds):
                complete.setdefault(name, {})[s] = kinds
    usual, text = complete.get("", {}), []
    for title, names in parts.items():
        rows = [row for name in names if name in complete for row in rows_of(name, complete[name])]
        if rows:
            text.append(f"## {title}\n\n" + markdown(["run", "method", "n", *metrics], rows_of("", usual) + rows))
    return text


def grid_report(out, bases):
    """The learning rates that the held-out preferences choose, by the same rule for both methods."""
    lines, best = [], {}
    for stage in ("sft", "dpo"):
        shown = {}
        for rate in GRID:
            found = [answers(out / f"{s}-{rate}" / stage) for s in bases]
            shown[rate] = [sum(f[m] for f in found) / len(found) for m in ("visual", "pairs")]
        best[stage] = max(GRID, key=lambda rate: shown[rate][1])
        lines += [[stage.upper(), rate, *(f"{v:.3f}" for v in values), "*" if rate == best[stage] else ""]
                  for rate, values in shown.items()]
    base = answers(out / next(iter(bases.values())) / "instruct")
    lines.append(["base", "", f"{base['visual']:.3f}", f"{base['pairs']:.3f}", ""])
    return ("## Learning rates\n\nOn validation scenes, from one grid. The rule, for both methods: the largest share of "
            "held-out pairs whose\nchosen answer is the likelier one, the task that both are trained for.\n\n"
            + markdown(["method", "rate", "visual", "pairs", "chosen"], lines) + "\n")


def cost(out, b, s):
    """FLOPs of each stage as trained, beside the encoder's pretraining."""
    stages = {**{n: f"{b}/{n}" for n in ("encoder", "llm", "align", "lookup", "instruct")}, "sft": f"{s}/sft",
              "dpo": f"{s}/dpo", "pivot": f"{s}-pivot-dpo/pivot"}
    logs = {n: out / at / "log.jsonl" for n, at in stages.items() if (out / at / "log.jsonl").exists()}
    flops = {n: sum(json.loads(line)["flops"] for line in log.read_text().splitlines()) for n, log in logs.items()}
    return ("## Cost\n\nThe paper's recipe is 0.09% of its encoder's pretraining; our pretraining is as tiny as the rest. "
            "Of a DPO step, the reference pass\nis left out; of the contrastive stage, the text tower.\n\n" + markdown(
                ["stage", "FLOPs", "of the encoder's pretraining"],
                [[n, f"{v:.2e}", f"{v / flops['encoder']:.2f}"] for n, v in flops.items()]))


def report(out, bases, number, grid, file):
    """Write report.md: a section per finding with what was measured, and an honest sentence made from the numbers."""
    table = collect(out, bases)
    seeds, home = [number[s] for s in bases], next(iter(bases))
    text = [f"# The study: seeds {seeds[0]} to {seeds[-1]}, base models: {len(set(bases.values()))}\n\n"
            "Means over seeds; differences are paired by seed, with Student's 95% intervals; detectable: the true "
            "difference\nthat such a study finds in 80% of cases. original: before any LLM; base: after instruct; SFT x 2: "
            "twice the samples,\nas many distinct responses as DPO sees; random: an untrained encoder."]
    overview = []
    for title, claim, metrics, pairs in FINDINGS:
        rows = [row for a, b in pairs for row in compare(table, a, b, metrics, bases)]
        if rows:
            text.append(f"## {title}\n\nThe paper: {claim}\n\n{values(table, metrics)}\n\n{markdown(DIFFERENCE, rows)}")
            key = next((row for row in rows if row[:2] == ["DPO - SFT", metrics[0]]), rows[0])
            agrees = {"higher": "agrees", "lower": "contradicts"}.get(key[6], "undecided" if key[4] else "one seed")
            pages = sorted((out / home / "probe").glob("segmentation-*.png")) if metrics[0].startswith("segm") else []
            text += [f"![{page.stem}]({os.path.relpath(page, file.parent)})" for page in pages]
            overview.append([title, *key[:2], *key[3:6], "" if claim.startswith(CONTROL) else agrees])
    for title, endings in (("", [""]), (", base models of twice the instruct steps", ["-long"]), (", both", ["", "-long"])):
        lifts, ratio = gradients(out, number, endings)
        for name in (f"{kind}, {wording}" for kind in ("object", "scene") for wording in ("terse", "free", "apart")) if lifts else ():
            mean, half = ratio[name]
            agrees = "agrees" if mean - half > 1 else "contradicts" if mean + half < 1 else "undecided"
            overview.append([f"4. Where the gradient goes{title}", "DPO / SFT", f"lift, {name}", f"{mean:.3f}",
                             *((f"{half:.3f}", "", agrees) if half == half else ("", "", "one seed"))])
        text += [f"## 4. Where the gradient goes{title}\n\n" + LIFT * (not title) + lifts] if lifts else []
    pictures = next((at for b in number if (at := out / b / "gradients").exists()), out)
    text += [f"![gradient maps, {page.stem}]({os.path.relpath(page, file.parent)})" for page in sorted(pictures.glob("gradients-*.png"))]
    text += [seen] if (seen := knowledge(out)) else []
    text.insert(1, "## In one table\n\nDoes our world agree with the paper's claim?\n\n" + markdown(
        ["finding", "difference", "measure", "mean", "95% +-", "detectable", "paper"], overview))
    text += sweeps(out, bases) + [cost(out, bases[home], home)]
    text += [grid.read_text()] if grid else []
    file.write_text("\n\n".join(text) + "\n")
    print("\n\n".join(text))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first one")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--name", help="one seed, in the runs NAME and NAME-..., as pivot.py names them by itself")
    parser.add_argument("--samples", type=int, default=4096, help="preference pairs")
    parser.add_argument("--jobs", type=int, default=2, help="commands at a time")
    parser.add_argument("--grid", action="store_true", help="learning rates of SFT and DPO, instead of the comparison")
    parser.add_argument("--learning-rates", type=Path, help="grid.md of a --grid run, for the report")
    parser.add_argument("--sweeps", type=int, default=0, help="also sizes, samples, single settings, of so many seeds")
    args, extra = parser.parse_known_args()
    bases, number = runs_of(args.first, args.seeds, args.name)
    run(plan(bases, number, args.grid, args.sweeps, args.samples), args.out.resolve(), args.jobs, extra)
    if args.grid:
        text = grid_report(args.out, bases)
        (args.out / "grid.md").write_text(text)
        return print(text)
    file = args.out / (args.name or "") / "report.md"
    report(args.out, bases, number, args.learning_rates, file)
    print(f"\n{file}: done")


if __name__ == "__main__":
    main()
