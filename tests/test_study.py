"""The study at toy length: every job of its plan runs, and its report says what the files say."""
import json
import math
import subprocess
import sys

import numpy as np
import study
from conftest import ROOT, run


def test_intervals_are_students():
    from scipy import stats
    values = np.random.default_rng(0).normal(1, 2, (200, 5))
    for row in values[:20]:
        mean, half, least = study.interval(list(row))
        low, high = stats.t.interval(.95, 4, row.mean(), stats.sem(row))
        assert abs(mean - row.mean()) < 1e-9 and abs(mean - half - low) < 1e-3 and abs(mean + half - high) < 1e-3
        assert abs(least - (stats.t.ppf(.975, 4) + stats.t.ppf(.8, 4)) * stats.sem(row)) < 2e-3
    assert math.isnan(study.interval([1.])[1])


def test_every_job_waits_for_jobs_that_there_are():
    for grid, sweeps in ((False, 0), (True, 0), (False, 1), (False, 3)):
        jobs = study.plan(*study.runs_of(100, 5, None), grid, sweeps, 4096)
        assert all(need in jobs for _, after in jobs.values() for need in after)
        assert len({s for s in (o[3] for o, _ in jobs.values())}) == 5          # five seeds, two of them with a base
        ends = [name for name in jobs if name.startswith("base-")]              # sweeps: sizes, and all five, twice, for the maps
        for stage, some in (("/instruct", True), ("/gradients", not grid)):
            assert sum(name.endswith(stage) for name in ends) == some * (2 + 8 * bool(sweeps) + 4 * min(2, sweeps))
    jobs = study.plan(*study.runs_of(0, 1, "toy"), False, 1, 4096)
    assert "toy-long/sft" in jobs and all(need in jobs for _, after in jobs.values() for need in after)


def test_the_study_at_toy_length(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "tests/study.py"), "--out", str(tmp_path), "--name", "toy", "--preset", "toy",
                           "--eval-scenes", "8", "--samples", "64"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = (tmp_path / "toy/report.md").read_text()
    for title in ("2. DPO and SFT", "3. The encoder by itself", "4. Segmentation", "4. Where the gradient goes",
                  "Alignment", "6. PIVOT", "Cost", "random", "larger original", "absent objects"):
        assert title in report, title
    assert all((tmp_path / f"toy/gradients/gradients-{kind}.png").exists() for kind in ("one-word", "object", "scene"))
    again = run("--stage", "dpo", "--preset", "toy", "--eval-scenes", "8", "--samples", "64", "--runs", tmp_path)
    assert "nothing to do" in again.stdout                                  # the names are those that pivot.py gives
    answers = [study.answers(tmp_path / f"toy/{stage}")["visual"] for stage in ("sft", "dpo")]
    row = next(line for line in report.splitlines() if line.startswith("| DPO - SFT ") and "| visual " in line)
    assert f"{answers[1] - answers[0]:+.4f}" in row and "not known from one seed" in row
    found = json.loads((tmp_path / "toy/dpo/results.json").read_text())["results"]["questions"]
    asked = [v for v in found.values() if v[4] not in ("knowledge", "fact")]
    assert abs(answers[1] - sum(v[1] for v in asked) / sum(v[0] for v in asked)) < 1e-9


def test_differences_are_paired_and_a_base_model_counts_once():
    bases = {0: 0, 1: 1, 2: 0, 3: 1, 4: 0}
    table = {"base": {"visual": {0: .5, 1: .7}}, "SFT": {"visual": {s: .6 + s / 100 for s in bases}},
             "DPO": {"visual": {s: .61 + s / 50 for s in bases if s != 2}}, "original": {"visual": {0: .4, 1: .5}}}
    row, = study.compare(table, "SFT", "DPO", ["visual"], bases)
    gains = [.01 + s / 100 for s in (0, 1, 3, 4)]
    mean, half, _ = study.interval(gains)
    assert row[2:5] == [4, f"{mean:+.4f}", f"{half:.4f}"]
    row, = study.compare(table, "original", "base", ["visual"], bases)
    assert row[2:4] == [2, "+0.1500"]
    row, = study.compare(table, "base", "SFT", ["visual"], bases)
    assert row[2] == 5 and row[3] == f"{sum(.6 + s / 100 - (.5, .7)[b] for s, b in bases.items()) / 5:+.4f}"


def test_knowledge_finds_a_slope_between_base_models_within_details(tmp_path):
    """Base models that know more of a detail get a larger ratio of lifts: the slope that was put in comes out, whatever the
    details' own levels are."""
    rng = np.random.default_rng(0)
    for b in range(5):
        rows, questions = [], {c: [2, 1, 1, 1, c, c] for c in ("general", "knowledge", "ocr", "vision", "exist", "fact")}
        for i, detail in enumerate(study.GROUPS["asked"]):
            right = int(rng.integers(60, 200))
            questions[f"x {detail}"] = [200, right, 0, 40, "x", detail]
            ratio = math.exp(i / 3 + .8 * (right - 40) / 200)
            rows += [{"wording": w, "answer": answer, "detail": detail, "sft": [2., True], "rejected": [2., True],
                      "sft, differing tokens": [2., True], "dpo": [2 * ratio if w == "terse" else 2.2 - b / 10, True]}
                     for w in ("terse", "free", "apart") for answer in ("object", "scene")]
        for stage, found in (("gradients", {"gradients": rows}), ("instruct", {"results": {"questions": questions}})):
            (tmp_path / f"base-{b}" / stage).mkdir(parents=True)
            (tmp_path / f"base-{b}" / stage / "results.json").write_text(json.dumps(found))
    assert "base models: +0.80 +- 0.00 in log" in study.knowledge(tmp_path)
    bases, number = study.runs_of(0, 5, None)
    study.report(tmp_path, bases, number, None, tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    mean, half, _ = study.interval([1.1 - b / 20 for b in range(5)])
    assert study.knowledge(tmp_path) in text and f"{mean:.2f} +- {half:.2f}" in text and "| lift, object, free  | 1.000" in text


def test_sweeps_pair_by_seed_and_what_has_another_base_model_by_base_model(tmp_path):
    """Of 1,000 questions so many are answered right as it says; encoders are a tenth of that."""
    def write(run, stage, right, probed=()):
        folder, table = tmp_path / run / stage, {
            c: [1000, right, 0, 1, c, c] for c in ("general", "knowledge", "ocr", "vision", "exist", "fact")}
        folder.mkdir(parents=True)
        found = {"results": {"questions": table, "pairs": [["", "", 1, 0]]}}
        cells = {name: {"right": right, "n": 10_000} for name in ("shape", "color", "size", "texture", "letter", "tilt", "ground")}
        row = {"linear": {"encoder, cell": cells}, "segmentation": {"recall": [right / 10_000], "f1": [0.]}}
        (folder / "results.json").write_text(json.dumps(found))
        (tmp_path / run / "probe").mkdir(exist_ok=True)
        rows = study.read(tmp_path / run / "probe/results.json") or {"probes": {}}
        for label in (stage, *probed):
            rows["probes"][label] = row
        (tmp_path / run / "probe/results.json").write_text(json.dumps(rows))

    bases, number = study.runs_of(0, 5, None)
    for i, b in enumerate(("base-0", "base-1")):
        write(b, "instruct", 500 + 10 * i)
        write(f"{b}-llm-small", "instruct", 300)
    for s, b in bases.items():
        for ending, right in (("", 600), ("-n512", 550), ("-llm-small", 400 + 40 * (b == "base-1"))):
            write(s + ending, "sft", right, ["base"])
            write(s + ending, "dpo", right + 10 * int(s))
    sizes, samples = study.sweeps(tmp_path, bases)
    mean, half, _ = study.interval([.01 * s for s in range(5)])
    assert f"| DPO - SFT               | 5 | {mean:+.3f} +- {half:.3f}" in samples
    assert "| DPO - the defaults' DPO | 5 | -0.050 +- 0.000" in samples                # by seed: all alike
    mean, half, _ = study.interval([-.2, -.16])                                       # by base model: two
    assert f"| DPO - the defaults' DPO | 2 | {mean:+.3f} +- {half:.3f}" in sizes and f"{mean / 10:+.3f} +- {half / 10:.3f}" in sizes
