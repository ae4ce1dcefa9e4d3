"""Open a JSONL of 3.2 million samples twice: seconds and peak memory of each process.

    python tests/large_file.py [samples]      (needs about 1.2 GB of temporary space)"""
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OPEN = """
import random, resource, sys, time
import data
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.time()
records = data.Records(sys.argv[1])
opened = time.time() - start
start = time.time()
samples = [records[random.randrange(len(records))] for _ in range(20000)]
each = (time.time() - start) / len(samples)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(f"{len(records):,} samples, {records.left_out}: opened in {opened:.2f} s, {each * 1e6:.0f} us a "
      f"sample, peak {peak / 1024:.0f} MB ({before / 1024:.0f} MB of it the imports)")
"""


def main(count):
    with tempfile.TemporaryDirectory() as folder:
        file, start = Path(folder) / "large.jsonl", time.time()
        with open(file, "w") as f:
            for i in range(count):
                talk = [{"from": "human", "value": "<image>\nWhat stands in front of the house, and what "
                                                   f"is behind it, in picture number {i}?"},
                        {"from": "gpt", "value": "A tree stands in front of it. " * (1 + i % 7)}]
                f.write(json.dumps({"id": str(i), "image": f"{i % 999}/{i}.jpg", "conversations": talk}) + "\n")
        print(f"{file.stat().st_size / 1e9:.2f} GB written in {time.time() - start:.0f} s", flush=True)
        for what in ("first", "second"):
            print(f"{what} time:", flush=True)
            subprocess.run([sys.executable, "-c", OPEN, file], check=True, cwd=Path(__file__).resolve().parent.parent)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3_200_000)
