"""A very small model in three folders and a file of preferences about small pictures: what the tests of crashes, of
silent failures and of hostile input start from. A stage on them takes a tenth of a second."""
import json
import random

import torch
import torch.distributed as dist
from PIL import Image

import model as m
import pivot

COLORS = ["red", "green", "blue", "white", "black", "yellow"]


def write_tiny(folder, tokenizer, samples=24):
    """base/{encoder,projector,llm}, pairs.jsonl and its pictures. Returns the folder."""
    encoder = m.EncoderConfig(16, 32, 3, 2, image_size=16)
    llm = m.LLMConfig(len(tokenizer), 16, 32, 2, 2, 1)
    net = m.initialise(m.MLLM(m.Encoder(encoder), m.Projector(16, 16), m.Decoder(llm)), 0)
    m.save_model(folder / "base", net.state_dict(), net, tokenizer)
    rng = random.Random(0)
    rows = []
    for i in range(samples):
        right, wrong = rng.sample(COLORS, 2)
        Image.new("RGB", (20, 16), right).save(folder / f"{i}.png")
        rows.append({"id": f"s{i}", "image": f"{i}.png", "question": f"what color has {i}", "chosen": right,
                     "rejected": wrong})
    write_rows(folder / "pairs.jsonl", rows)
    return folder


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def options(folder, *more, stage="dpo", data="pairs.jsonl", base="base"):
    """The command line of a stage on the folder's model and data."""
    parts = [x for part in pivot.ALL for x in (f"--{part}", folder / base / part)]
    return list(map(str, ["--preset", "paper", "--stage", stage, *parts, "--data", folder / data, "--runs",
                          folder / "runs", "--template", "plain", "--dtype", "float32", "--batch", 8, *more]))


def main(*argv):
    """pivot.main within this process, whose process group stays. Returns its exit status."""
    kept = pivot.setup, dist.destroy_process_group
    pivot.setup, dist.destroy_process_group = lambda: torch.device("cpu"), lambda: None
    try:
        pivot.main(list(map(str, argv)))
    except SystemExit as stop:
        return stop.code
    finally:
        pivot.setup, dist.destroy_process_group = kept
    return 0
