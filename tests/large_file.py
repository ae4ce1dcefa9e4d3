"""Open a JSONL of 3.2 million samples twice: seconds and peak memory of each process.

    python tests/large_file.py [samples]      (needs about 1.2 GB of temporary space)"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

OPEN = """
import random, resource, sys, time
import data
start = time.time()
records = data.Records(sys.argv[1])
opened, start = time.time() - start, time.time()
for _ in range(20000):
    records[random.randrange(len(records))]
each, peak = (time.time() - start) / 20000, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(f"{len(records):,} samples opened in {opened:.2f} s, {each * 1e6:.0f} us a sample, peak {peak / 1024:.0f} MB")
"""
with tempfile.TemporaryDirectory() as folder:
    with open(Path(folder) / "large.jsonl", "w") as f:
        for i in range(int(sys.argv[1]) if len(sys.argv) > 1 else 3_200_000):
            talk = [{"from": "human", "value": f"<image>\nWhat stands in front of the house, and what is behind it, in picture {i}?"},
                    {"from": "gpt", "value": "A tree stands in front of it. " * (1 + i % 7)}]
            f.write(json.dumps({"id": str(i), "image": f"{i % 999}/{i}.jpg", "conversations": talk}) + "\n")
    for _ in range(2):
        subprocess.run([sys.executable, "-c", OPEN, f.name], check=True, cwd=Path(__file__).resolve().parent.parent)
