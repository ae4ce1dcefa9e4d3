"""The paper's study on the embedded world: trains what it compares, several seeds of each, and writes report.md.

    python tests/study.py --seeds 5 --first 100 --out runs/study            the core comparison
    python tests/study.py --seeds 5 --first 100 --out runs/study --sweeps   also sizes, samples and single settings
    python tests/study.py --seeds 3 --first 0 --out runs/tune --grid        learning rates, on validation scenes

Every model is one command of pivot.py; what is there already is kept, so that an interrupted study goes on where it was.
Post-training seed s starts from one of two base models and sees scenes of its own; all rows of a seed share base, samples
and order, so that differences between rows are paired by seed. Options not listed here go to pivot.py.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

GRID = ["3e-6", "1e-5", "3e-5", "1e-4", "3e-4", "1e-3"]
SAMPLES = [1024, 2048, 4096]                            # beside the default number
SETTINGS = {    # one departure from the defaults each
    "terse": ["--wording", "terse"], "perfect": ["--errors", "0"], "drawn": ["--pairs", "drawn"],
    "sampled": ["--pairs", "sampled"]}
PIVOTS = {"original": "base-{b}/encoder", "base": "base-{b}/instruct", "sft": "{s}/sft", "twice": "{s}-twice/sft",
          "dpo": "{s}/dpo", "larger": "base-{b}-larger/encoder"}


def plan(seeds, grid, sweeps, samples):
    """{name/stage: (options of pivot.py, names that it waits for)}, in the order in which to start them."""
    jobs, numbers = {}, range(seeds[0], seeds[0] + seeds[1])
    bases = {s: numbers[i % min(2, seeds[1])] for i, s in enumerate(numbers)}

    def add(name, stage, base, seed, *options, after=()):
        jobs.setdefault(f"{name}/{stage}", (["--base", base, "--seed", seed, *options], list(after)))

    def chain(base, seed, *options):
        add(base, "encoder", base, seed, *options)
        add(base, "instruct", base, seed, *options, after=[f"{base}/encoder"])

    def both(name, base, seed, *options):
        for stage in ("sft", "dpo"):
            add(name, stage, base, seed, *options, after=[f"{base}/instruct"] + [f"{name}/sft"] * (stage == "dpo"))

    for b in sorted(set(bases.values())):
        chain(f"base-{b}", b)
    if grid:
        for s, b in bases.items():
            for rate in GRID:
                both(f"{s}-{rate}", f"base-{b}", s, "--lr", rate, "--encoder-lr", rate)
        return jobs
    for s, b in bases.items():
        base = f"base-{b}"
        both(f"{s}", base, s)
        add(f"{s}-twice", "sft", base, s, "--samples", 2 * samples, "--steps", samples // 16,
            after=[f"{base}/instruct"])
    for s, b in bases.items():
        base = f"base-{b}"
        add(base, "probe", base, b, after=[f"{base}/instruct"])
        add(f"{s}", "probe", base, s, after=[f"{s}/sft", f"{s}/dpo", f"{s}-twice/sft"])
        add(f"{base}-larger", "encoder", f"{base}-larger", b, "--encoder-size", "large")
        for row, source in PIVOTS.items():
            source = source.format(s=s, b=b)
            add(f"{s}-pivot-{row}", "pivot", base, s, "--encoder", f"{{out}}/{source}/encoder",
                after=[source, f"{base}/instruct"])
    if sweeps:
        s, b = next(iter(bases.items()))
        for n in SAMPLES:
            both(f"{s}-n{n}", f"base-{b}", s, "--samples", n, "--steps", n // 32)
        for name, options in SETTINGS.items():
            both(f"{s}-{name}", f"base-{b}", s, *options)
        for part in ("encoder", "llm"):
            for size in ("small", "large"):
                base = f"base-{b}-{part}-{size}"
                chain(base, b, f"--{part}-size", size)
                both(f"{s}-{part}-{size}", base, s)
        for name in [j.split("/")[0] for j in list(jobs) if j.endswith("/dpo") and j.startswith(f"{s}-")]:
            add(name, "probe", jobs[f"{name}/dpo"][0][1], s, after=[f"{name}/sft", f"{name}/dpo"])
    return jobs


def run(jobs, out, parallel, extra):
    """Run the jobs, `parallel` at a time, each with its share of the cores; stop at the first that fails."""
    def finished(name):
        file = out / name / "settings.json"
        return file.exists() and json.loads(file.read_text()).get("finished", False)

    threads = max(1, (os.cpu_count() or 1) // parallel)
    waiting, running = [j for j in jobs if not finished(j)], {}
    (out / "logs").mkdir(parents=True, exist_ok=True)
    while waiting or running:
        for name, (process, began) in list(running.items()):
            if process.poll() is not None:
                del running[name]
                log = out / "logs" / f"{name.replace('/', '-')}.txt"
                print(f"{name}: {time.time() - began:.0f} s", flush=True)
                if process.returncode:
                    sys.exit(f"{name} failed: {log.read_text()[-2000:]}")
        open_ = {*waiting, *running}
        ready = [j for j in waiting if not open_ & set(jobs[j][1])]
        for name in ready[:parallel - len(running)]:
            waiting.remove(name)
            options = [str(o).replace("{out}", str(out)) for o in jobs[name][0]]
            command = [sys.executable, str(ROOT / "pivot.py"), "--runs", str(out), "--name", name.split("/")[0],
                       "--stage", name.split("/")[1], *options, *extra]
            with open(out / "logs" / f"{name.replace('/', '-')}.txt", "w") as log:
                running[name] = subprocess.Popen(command, stdout=log, stderr=log, env={
                    **os.environ, "OMP_NUM_THREADS": str(threads)}), time.time()
        time.sleep(.2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first one")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--samples", type=int, default=8192, help="preference pairs")
    parser.add_argument("--jobs", type=int, default=2, help="commands at a time")
    parser.add_argument("--grid", action="store_true", help="learning rates of SFT and DPO, instead of the comparison")
    parser.add_argument("--sweeps", action="store_true", help="also sizes, samples and single settings")
    args, extra = parser.parse_known_args()
    jobs = plan((args.first, args.seeds), args.grid, args.sweeps, args.samples)
    run(jobs, args.out.resolve(), args.jobs, extra)


if __name__ == "__main__":
    main()
