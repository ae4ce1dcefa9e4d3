"""How fast, beside the usual way: our SFT and DPO steps, the naive DPO step, TRL's DPOTrainer.

    pip install -r requirements.txt -r tests/requirements-bench.txt    (without: no row of TRL's)
    python tests/bench.py --shapes cpu                                 side by side, in alternation
    python tests/bench.py --shapes world --check --lr 2e-4             do they learn the same?
    python tests/bench.py --shapes h200 --dtype bfloat16 --attention sdpa
    python tests/bench.py --shapes logits                              memory of log-probabilities

    sft     our step on the chosen responses
    dpo     our step on pairs, with a cached reference
    ref     that reference, once over the pairs; 3 epochs share it: a dpo step owes a third of it
    naive   our model, the usual way: chosen and rejected are rows of their own with a picture each,
            a live reference in every step, logits of the whole vocabulary at every position
    trl     DPOTrainer.training_step on LlavaForConditionalGeneration (SigLIP, Qwen2) with our
            weights, pictures and token ids; the ratios take its faster attention. (Its cached
            reference refuses images, its padding_free is switched off.)

A step is forward, backward, clipping and AdamW (fused), the same for all. Making the batch is not
in it; TRL's is made by its own collator. One process; every round times each once, in turn; ratios
are taken within a round.
"""
import argparse
import copy
import functools
import os
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import model as m  # noqa: E402
import probe  # noqa: E402
from dpo import dpo_loss, dpo_objective, frozen  # noqa: E402
from sft import sft_objective  # noqa: E402

BETA, EPOCHS, PAD, PLACE = .1, 3, 0, 1      # no text uses tokens 0, 1; PLACE: TRL's image token
SHAPES = {              # encoder, LLM, pairs a step
    "cpu": (m.EncoderConfig(384, 1536, 12, 6, 384, 16), m.LLMConfig(28000, 512, 2816, 16, 8, 4), 2),
    "world": (m.EncoderConfig(), m.LLMConfig(600), 32),
    "h200": (m.EncoderConfig(1152, 4304, 27, 16, 384, 16),      # SigLIP2-So400m/16, Qwen2.5-1.5B
             m.LLMConfig(151936, 1536, 8960, 28, 12, 2, rope_theta=1e6), 8),
}
LENGTHS = 60, 150, 150  # tokens of question, chosen, rejected; the world has its own
RATIOS = [("dpo", "sft", ""), ("dpo + ref / 3", "sft", "at most 1.45"), ("naive", "dpo", ""),
          ("naive", "dpo + ref / 3", "at least 1.8"), ("trl", "dpo", ""),
          ("trl", "dpo + ref / 3", "at least 2.0"), ("trl", "naive", "")]


# ------------------------------------------------------------------------------------------ data

def make_pairs(shapes, encoder, llm, count):
    """[(picture, question, chosen, rejected)], the last three as token ids."""
    if shapes == "world":
        world = data.World("preferences", "preferences", count)
        samples = [world[i] for i in range(count)]
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = data.train_tokenizer(folder)
        rows = [data.encode(s, tokenizer, "plain", 0, 512) for s in samples]
        return [(s.image, *([t for t, of in zip(row.tokens, row.segment) if of == part]
                            for part in range(3))) for s, row in zip(samples, rows)]
    rng, side = np.random.default_rng(0), encoder.image_size
    return [(Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)),
             *(rng.integers(2, llm.vocab_size, n).tolist() for n in LENGTHS)) for _ in range(count)]


def make_batch(pairs, encoder, *kinds):
    """Rows of image, question and responses. kinds: [(2, 3)] chosen and rejected in one row;
    [(2,), (3,)] first all chosen, then all rejected, in rows of their own."""
    picture, rows, pictures = data.Prepare(None, "plain", encoder, 0, 2).picture, [], []
    for pair, responses in [(pair, kind) for kind in kinds for pair in pairs]:
        parts = [[data.IMAGE] * encoder.tokens + pair[1], *(pair[k] for k in responses)]
        segment = [i for i, part in enumerate(parts) for _ in part]
        n = len(parts[0])
        position = [j + n * (i > 0) for i, part in enumerate(parts) for j in range(len(part))]
        source = [n - 1 if p == n else t - 1 for t, p in enumerate(position)]
        rows.append(data.Row(sum(parts, []), segment, [s > 0 for s in segment], position, source))
        pictures.append(picture(data.Sample("", pair[0], [])))
    return data.collate(rows, pictures, range(len(rows)), encoder.image_size, len(kinds[0]) == 2,
                        pack=len(kinds) == 1)


# ---------------------------------------------------------------------------------- the contestants

def naive_logps(model, batch):
    """(rows,) log-probabilities as they are usually computed: from the logits of everything."""
    column = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    mask = m.visible(batch.sample[..., None], batch.segment[..., None], column[:, None],
                     batch.sample[:, None], batch.segment[:, None], column)
    hidden = model.llm(model.embed(batch), mask[:, None], batch.position)
    logits = (hidden @ model.llm.head().type_as(hidden).mT).float()
    target = batch.tokens[:, 1:, None].clamp(min=0)
    logps = logits[:, :-1].log_softmax(-1).gather(2, target).squeeze(2)
    return (logps * (batch.segment[:, 1:] == 1)).sum(1)


def llava(net, attention):
    """transformers' LLaVA around our weights, and a processor whose words are our token ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor,
                              PreTrainedTokenizerFast, Qwen2Config, SiglipVisionConfig)
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    encoder, llm = vars(net.encoder.config), vars(net.llm.config)
    rope = {"rope_type": "default", "rope_theta": llm["rope_theta"]}
    text = Qwen2Config(**llm, rope_parameters=rope, pad_token_id=PAD, bos_token_id=None,
                       eos_token_id=PAD)
    theirs = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=SiglipVisionConfig(**encoder, vision_use_head=False), text_config=text,
        image_token_index=PLACE, vision_feature_select_strategy="full", vision_feature_layer=-2,
        tie_word_embeddings=text.tie_word_embeddings, attn_implementation=attention))
    names = {"encoder.": "model.vision_tower.", "llm.model.": "model.language_model.",
             "projector.0": "model.multi_modal_projector.linear_1",
             "projector.2": "model.multi_modal_projector.linear_2", "llm.lm_head": "lm_head"}
    state = {new + k[len(old):]: v for k, v in net.state_dict().items()
             for old, new in names.items() if k.startswith(old)}
    theirs.load_state_dict({"lm_head.weight": net.llm.head(), **state})

    words = ["<pad>", "<image>", *map(str, range(2, text.vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<pad>",
        extra_special_tokens={"image_token": "<image>"})
    images = SiglipImageProcessorPil(size=dict.fromkeys(("height", "width"), encoder["image_size"]))
    return theirs, LlavaProcessor(images, tokenizer, encoder["patch_size"], "full")


def make_trl(net, pairs, args, device, attention="sdpa"):
    """DPOTrainer, its model as it prepares it for training, and a batch from its collator."""
    import datasets
    from trl import DPOConfig, DPOTrainer
    settings = dict(bf16=args.dtype == "bfloat16", use_cpu=device.type == "cpu", max_length=None,
                    gradient_checkpointing=False, precompute_ref_log_probs=False,
                    padding_free=False)
    (model, processor), (reference, _) = (llava(net, attention) for _ in range(2))
    samples = [{"images": [pair[0]], "prompt": " ".join(["<image>", *map(str, pair[1])]),
                "chosen": " ".join(map(str, pair[2])), "rejected": " ".join(map(str, pair[3]))}
               for pair in pairs]
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(folder, report_to="none", beta=BETA, **settings)
        trainer = DPOTrainer(model, reference, config, processing_class=processor,
                             train_dataset=datasets.Dataset.from_list(samples[:1]))
    trainer.current_gradient_accumulation_steps = 1                 # as train() would set it
    args.trl = settings
    batch = trainer._prepare_inputs(trainer.data_collator(samples))
    expected = make_batch(pairs, net.encoder.config, (2,), (3,)).tokens     # the same token ids
    real = batch["attention_mask"].bool().cpu()
    assert torch.equal(batch["input_ids"].cpu()[real], expected.where(expected >= 0, PLACE)[real])
    return trainer, trainer.accelerator.prepare_model(trainer.model), batch


def adamw(model, lr):
    """Everybody's optimiser, its state made already by a step with no gradient."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0, fused=True)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def updating(optimizer, loss_of):
    """A step. loss_of() backpropagates and returns the loss; the rest is the same for everybody."""
    def step():
        loss = loss_of()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.)
        optimizer.step()
        optimizer.zero_grad()
        return loss
    return step


def contestants(net, pairs, args, device):
    """{name: (step, how many copies of the weights it holds: policy, two moments, reference)}"""
    steps, optimizer, kinds = {}, adamw(net, args.lr), ([(2,)], [(2, 3)], [(2,), (3,)])
    chosen, paired, apart = (make_batch(pairs, net.encoder.config, *k).to(device) for k in kinds)

    def add(name, loss_of, copies):
        def backward():
            with probe.autocast(device, args.dtype):
                loss = loss_of()
            loss.backward()
        steps[name] = updating(optimizer, backward), copies

    def mean(objective, batch):
        loss, count, _ = objective(net, batch)
        return loss / count

    @torch.no_grad()
    def reference():
        with probe.autocast(device, args.dtype):
            return net(paired)

    def naive():
        with torch.no_grad():
            ref = naive_logps(old, apart).view(2, -1).T
        return dpo_loss(naive_logps(net, apart).view(2, -1).T, ref, BETA).mean()

    if "sft" in args.only:
        add("sft", lambda: mean(sft_objective, chosen), 3)
    if "dpo" in args.only:
        paired.ref = reference()
        add("dpo", lambda: mean(dpo_objective, paired), 3)
        steps["ref"] = reference, 1
    if "naive" in args.only:
        old = frozen(net)
        add("naive", naive, 4)
    for attention in args.attention if "trl" in args.only else ():
        trainer, model, batch = make_trl(net, pairs, args, device, attention)
        loss_of = functools.partial(trainer.training_step, model, batch)
        steps["trl " + attention] = updating(adamw(model, args.lr), loss_of), 4
    return steps


# ---------------------------------------------------------------------------------------- measuring

def seconds(run, device, clock=time.perf_counter):
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def peak_memory(run, device):
    """Bytes that a step takes above what it found: activations, gradients, logits."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max()


def matmul_peak(device, dtype, clock):
    """FLOP/s of large square matrix products, the best of 30: what the machine can do."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device).to(getattr(torch, dtype))
    return 2 * n ** 3 / min(seconds(lambda: a @ b, device, clock) for _ in range(30))


def useful_flops(net, pairs, responses):
    """FLOPs of a step: a shared prefix counts once, recomputation not, attention as if dense."""
    trains, prompt = ("encoder", "projector", "llm"), net.encoder.config.tokens
    targets = [sum(len(pair[k]) for k in responses) for pair in pairs]
    return sum(probe.flops(net, [prompt + len(pair[1]) + n], n, trains, 1)
               for pair, n in zip(pairs, targets))


def logits(args, device):
    """Memory that the log-probabilities take, forward and backward: 8 pairs of 150 + 150 tokens of a
    vocabulary of 152k. A narrow head, to be quick: its weights and gradient are everybody's."""
    count, vocabulary, width = 8 * sum(LENGTHS[1:]), 151936, 16
    llm = m.Decoder(m.LLMConfig(vocabulary, width, width, 0, 1, 1)).to(device)
    net, zeros = m.MLLM(None, None, llm), torch.zeros(1, count, dtype=torch.long, device=device)
    target = torch.randint(vocabulary, (count,), device=device)
    batch = data.Batch(zeros, zeros, zeros, zeros, target, torch.arange(count, device=device),
                       zeros[0], None, zeros[0, :1], 1, 0)
    rows = []
    for name, chunk in ((f"ours, {m.LOGIT_CHUNK} positions at a time", m.LOGIT_CHUNK),
                        ("all positions at a time", count)):
        m.LOGIT_CHUNK = chunk
        with probe.autocast(device, args.dtype):
            peak = peak_memory(lambda: net(batch).sum().backward(), device)
        rows.append([name, f"{peak / 1e9:.2f}", "under 1" if not rows else ""])
    whole = 4e-9 * count * vocabulary
    print(probe.markdown(["log-probabilities", "peak GB above", "target"], rows))
    print(f"\n{count} positions, {vocabulary} words: their logits in fp32 are {whole:.2f} GB.")


def measure(net, pairs, args, device):
    steps, times = contestants(net, pairs, args, device), {}
    peaks = {name: peak_memory(run, device) for name, (run, _) in steps.items()}    # warms up, too
    clock = getattr(time, {"wall": "perf_counter", "cpu": "process_time"}[args.clock])
    for k in tqdm(range(args.steps), "round", leave=False):
        for name in (list(steps) * 2)[k % len(steps):][:len(steps)]:                # by turns
            times.setdefault(name, []).append(seconds(steps[name][0], device, clock))
    size = 4e-9 * sum(p.numel() for p in net.parameters())
    top = matmul_peak(device, args.dtype, clock)
    rate = {name: useful_flops(net, pairs, kinds) / median(times[name])
            for name, kinds in (("sft", (2,)), ("dpo", (2, 3))) if name in times}
    print(probe.markdown(
        ["step", "seconds", "range", "pairs/s", "held GB", "peak GB above", "MFU"],
        [[name, f"{median(t):.3f}", f"{min(t):.3f} to {max(t):.3f}",
          f"{len(pairs) / median(t):.2f}", f"{size * steps[name][1]:.2f}",
          f"{peaks[name] / 1e9:.2f}", f"{rate[name] / top:.0%}" if name in rate else ""]
         for name, t in times.items()]))
    if "dpo" in times:
        times["dpo + ref / 3"] = [a + b / EPOCHS for a, b in zip(times["dpo"], times["ref"])]
    if "trl" in args.only:
        times["trl"] = min((t for name, t in times.items() if name.startswith("trl")), key=median)
    ratios = [(a, b, [x / y for x, y in zip(times[a], times[b])], target)
              for a, b, target in RATIOS if a in times and b in times]
    print("\n" + probe.markdown(
        ["seconds of", "over", "median", "range of rounds", "target"],
        [[a, b, f"{median(r):.2f}", f"{min(r):.2f} to {max(r):.2f}", t] for a, b, r, t in ratios]))
    print(f"\nMFU against {top / 1e12:.3g} TFLOP/s, measured on {args.dtype} matrix products.")
    if args.shapes == "h200":
        for name, flops in rate.items():
            print(f"{name}: {flops / 1e12:.0f} TFLOP/s, {flops / 989e12:.0%} of the datasheet's; "
                  f"the paper's recipe (3.0e19 FLOP) in {3e19 / flops / 3600:.1f} GPU-hours.")


def check(net, pairs, args, device):
    """From the same weights on: are loss, logps and margin TRL's, while the loss falls by 30%?"""
    theirs, batch = copy.deepcopy(net), make_batch(pairs, net.encoder.config, (2, 3)).to(device)
    ours, seen = [], []
    with torch.no_grad():
        batch.ref = net(batch)
    net.register_forward_hook(lambda module, inputs, logps: seen.append(logps.detach().mean(0)))

    def objective():
        loss, count, metrics = dpo_objective(net, batch, BETA)
        (loss / count).backward()
        numbers = loss.detach() / count, *seen.pop(), metrics["margin"] / count
        ours.append([float(v) for v in numbers])

    trainer, model, inputs = make_trl(theirs, pairs, args, device)
    steps = [updating(adamw(net, args.lr), objective),
             updating(adamw(model, args.lr), lambda: trainer.training_step(model, dict(inputs)))]
    losses = [[float(step() or 0) for step in steps][1]
              for _ in tqdm(range(args.steps), leave=False)]
    names = "loss", "logps/chosen", "logps/rejected", "rewards/margins"
    theirs = np.array([losses, *(trainer._metrics["train"][k] for k in names[1:])]).T
    print(probe.markdown(["step", *(f"{who} {k}" for k in names for who in ("our", "TRL's"))],
                         [[k, *(f"{v:.6g}" for both in zip(ours[k], theirs[k]) for v in both)]
                          for k in range(args.steps)]))
    fall, off = 1 - ours[-1][0] / ours[0][0], np.abs(ours - theirs)
    off[1:] /= np.abs(theirs[1:])                           # the first step's margin is zero
    off[0, :3] /= np.abs(theirs[0, :3])
    print(f"\nloss falls by {fall:.0%}; largest relative difference: "
          + ", ".join(f"{k} {v:.1e}" for k, v in zip(names, off.max(0))))
    sys.exit(not (fall >= .3 and off.max() <= 1e-4))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    everyone = ["sft", "dpo", "naive", "trl"]
    parser.add_argument("--shapes", choices=[*SHAPES, "logits"], default="cpu",
                        help="logits: memory of the log-probabilities, nothing else")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                        help="compute in; weights are fp32")
    parser.add_argument("--only", nargs="+", choices=everyone, default=everyone)
    parser.add_argument("--steps", type=int, help="rounds (default: 5); steps of --check (20)")
    parser.add_argument("--pairs", type=int, help="pairs a step")
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--attention", nargs="+", default=["sdpa", "eager"],
                        help="TRL's, a row each; the faster one counts")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall",
                        help="cpu: processor time, for one thread on a busy machine")
    parser.add_argument("--check", action="store_true", help="same as TRL? exit status 1 if not")
    args = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)          # of TRL's own making
    args.steps, args.trl = args.steps or (20 if args.check else 5), {}
    try:
        versions = [f"{name} {version(name)}" for name in ("torch", "transformers", "trl")]
    except ImportError:
        versions = [f"torch {torch.__version__}", "no TRL: its row is left out"]
        args.only = [name for name in args.only if name != "trl"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.shapes == "logits":
        return logits(args, device)
    encoder, llm, count = SHAPES[args.shapes]
    projector = m.Projector(encoder.hidden_size, llm.hidden_size)
    net = m.MLLM(m.Encoder(encoder), projector, m.Decoder(llm))
    m.initialise(net, 0).to(device)
    for module in net.encoder.unused():
        module.requires_grad_(False)
    pairs = make_pairs(args.shapes, encoder, llm, args.pairs or count)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    print(" ".join(sys.argv), f"{name}, {torch.get_num_threads()} threads, {', '.join(versions)}",
          f"{args.shapes} shapes, {args.dtype}, {len(pairs)} pairs, lr {args.lr}", sep="\n")
    print(encoder, llm, "", sep="\n", flush=True)
    (check if args.check else measure)(net, pairs, args, device)
    if args.trl:
        print("TRL: " + ", ".join(f"{k}={v}" for k, v in args.trl.items()))


if __name__ == "__main__":
    main()
