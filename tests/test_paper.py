"""The paper's recipe on checkpoints that transformers wrote: bash train.sh paper, and what comes out of it."""
import json
import os
import random
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
COLORS = ["red", "green", "blue", "white", "black", "yellow"]


def write_models(folder):
    """A small SigLIP2 and a small Qwen2.5 with its kind of tokenizer, as a hub folder has them."""
    torch.manual_seed(0)
    vision = transformers.SiglipVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                                             num_attention_heads=4, image_size=32, patch_size=8)
    transformers.SiglipVisionModel(vision).save_pretrained(folder / "siglip")
    transformers.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "siglip")
    fast = tokenizers.Tokenizer(tokenizers.models.BPE())
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, show_progress=False, special_tokens=[
        "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    fast.train_from_iterator([f"what color is the picture {c} system user assistant" for c in COLORS], trainer)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|im_end|>")
    wrapped.save_pretrained(folder / "qwen")
    llm = transformers.Qwen2Config(vocab_size=416, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                   num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    transformers.Qwen2ForCausalLM(llm).save_pretrained(folder / "qwen")


def write_data(folder):
    """Plain pictures and what colour they have, in LLaVA's, MMPR's and the questions' format."""
    (folder / "images").mkdir()
    rng = random.Random(0)
    captions, talks, pairs, questions = [], [], [], []
    for i in range(24):
        right, wrong = rng.sample(COLORS, 2)
        Image.new("RGB", (50, 40), right).save(folder / "images" / f"{i}.png")
        image, question = f"images/{i}.png", "what color is the picture"
        captions.append({"id": str(i), "image": image, "conversations": [
            {"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"the picture is {right}"}]})
        talks.append({"id": str(i), "image": image, "conversations": [
            {"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": right}]})
        pairs.append({"image": image, "question": question, "chosen": right, "rejected": wrong})
        questions.append({"image": image, "question": question, "answers": [right], "category": "general",
                          "metric": "exact"})
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "instruct.json").write_text(json.dumps(talks))
    for name, rows in (("pairs", pairs), ("questions", questions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    write_models(folder)
    write_data(folder)
    return folder


def train(folder, *options, fails=False):
    command = ["bash", str(ROOT / "train.sh"), "paper", "--encoder", folder / "siglip", "--llm", folder / "qwen",
               "--captions", folder / "captions.json", "--instruct", folder / "instruct.json",
               "--preferences", folder / "pairs.jsonl", "--dtype", "float32", *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=900, env={
        **os.environ, "VIRTUAL_ENV": sys.prefix, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        "LAUNCH": "python"})
    assert bool(done.returncode) == fails, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_price_before_paying(paper):
    out = train(paper, "--dry-run", "--gpus", "4")
    rows = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| ")]
    assert rows[0] == "stage" and rows[2:] == ["align", "instruct", "sft", "dpo", *["pivot-align", "pivot"] * 3]
    assert "GPU-hours in all" in out and not (paper / "runs").exists()
    assert "GPU-hours" not in train(paper, "--dry-run", "--captions", paper / "absent.json", fails=True)


def test_the_papers_recipe_end_to_end(paper):
    """All stages on transformers' folders with nothing edited: losses fall where there is something to learn, the encoder
    moves where it trains and only there, transformers opens what comes out."""
    runs = paper / "runs"
    train(paper, "--runs", runs, "--batch", "8", "--epochs", "6", "--lr", "3e-3", "--encoder-lr", "3e-3",
          "--questions", paper / "questions.jsonl", "--export", "llava")

    def losses(name):
        return [json.loads(line)["loss"] for line in (runs / name / "log.jsonl").read_text().splitlines()]

    for name in ("paper/align", "paper/instruct", "paper/dpo", "paper-dpo/pivot-align", "paper-dpo/pivot"):
        loss = losses(name)
        assert len(loss) == 18 and sum(loss[-3:]) < sum(loss[:3]), (name, loss)

    def encoder(at):
        return {k.removeprefix("vision_model."): v for k, v in load_file(at / "model.safetensors").items()}

    before, dpo = encoder(paper / "siglip"), encoder(runs / "paper/dpo/encoder")
    assert before.keys() == dpo.keys()
    same = {name for name in before if torch.equal(before[name], dpo[name])}
    assert same == {n for n in before if "layers.2." in n or "post_layernorm" in n or "head" in n}   # select_layer -2
    for row in ("instruct", "sft", "dpo"):
        pivoted = encoder(runs / f"paper-{row}/pivot/encoder")
        assert all(torch.equal(v, pivoted[k]) for k, v in encoder(runs / f"paper/{row}/encoder").items())
        assert "| general" in (runs / f"paper-{row}/pivot/report.md").read_text()
    at = runs / "paper/dpo"
    for kind, folder in ((transformers.SiglipVisionModel, at / "encoder"), (transformers.AutoModelForCausalLM, at / "llm"),
                         (transformers.LlavaForConditionalGeneration, at / "llava")):
        _, info = kind.from_pretrained(folder, output_loading_info=True)
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
