"""How fast, beside the usual way: our SFT and DPO steps, the naive DPO step, TRL's DPOTrainer.

    pip install -r requirements.txt -r tests/requirements-bench.txt     (without TRL its rows are left out)
    python tests/bench.py --shapes cpu                                  side by side, in alternation
    python tests/bench.py --shapes world --check                        do they learn the same?
    python tests/bench.py --shapes h200 --dtype bfloat16 --only sft dpo trl

    sft     our step on the chosen responses                dpo     ours on pairs, cached reference
    ref     our frozen reference, once over the pairs: three epochs share it, so a third of it belongs to a dpo step
    naive   our model the usual way: chosen and rejected are rows of their own with a picture each, the reference runs in
            every step, logits of the whole vocabulary at every position
    trl     DPOTrainer.training_step on LlavaForConditionalGeneration (SigLIP, Qwen2): our weights, pictures, token ids

A step is forward, backward, clipping and AdamW, the same for all; making the batch is not in it, and is done by TRL's own
collator for TRL. One process; every round times each variant once, in turn; ratios are taken within a round.
"""
import argparse
import copy
import os
import platform
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import model as m  # noqa: E402
import probe  # noqa: E402
from dpo import dpo_loss, dpo_objective, frozen  # noqa: E402
from sft import sft_objective  # noqa: E402

BETA, EPOCHS, PAD, PLACE = .1, 3, 0, 1      # PAD, PLACE: token ids that no text uses; PLACE is TRL's image token
SHAPES = {      # encoder, LLM, pairs in a batch; the text has 60 prompt and 150 response tokens, the world's is its own
    "cpu": (m.EncoderConfig(384, 1536, 12, 6, 384, 16), m.LLMConfig(28000, 512, 2816, 16, 8, 4), 2),
    "world": (m.EncoderConfig(), m.LLMConfig(600), 32),
    "h200": (m.EncoderConfig(1152, 4304, 27, 16, 384, 16),
             m.LLMConfig(151936, 1536, 8960, 28, 12, 2, rope_theta=1e6), 8),
}
TARGETS = {"dpo / sft": "at most 1.45", "naive / dpo": "at least 1.8", "trl / dpo": "at least 2.0"}


# ------------------------------------------------------------------------------------------ data

def make_pairs(shapes, encoder, llm, count, seed):
    """Pictures and token ids: [(picture, prompt, chosen, rejected)]. The image stands first in the prompt."""
    if shapes == "world":
        world = data.World("preferences", "preferences", (seed + 1) * count)
        samples = [world[i] for i in range(seed * count, (seed + 1) * count)]
        with tempfile.TemporaryDirectory() as folder:
            rows = [data.encode(s, data.train_tokenizer(folder), "plain", 0, 512) for s in samples]
        return [(s.image, *([t for t, of in zip(row.tokens, row.segment) if of == part] for part in range(3)))
                for s, row in zip(samples, rows)]
    rng = np.random.default_rng(seed)
    return [(Image.fromarray(rng.integers(0, 256, (encoder.image_size, encoder.image_size, 3), np.uint8)),
             *(rng.integers(2, llm.vocab_size, n).tolist() for n in (60, 150, 150))) for _ in range(count)]


def make_batch(pairs, encoder, *responses):
    """Batch of rows prompt + responses. responses: 2 and 3 are a pair's chosen and rejected; (2, 3) both in one row,
    (2,), (3,) rows of their own."""
    picture, rows, pictures = data.Prepare(None, "plain", encoder, 0, 2).picture, [], []
    for kinds in responses:
        for pair in pairs:
            prompt = [data.IMAGE] * encoder.tokens + pair[1]
            parts, n = [prompt, *(pair[k] for k in kinds)], len(prompt)
            tokens = [t for part in parts for t in part]
            segment = [i for i, part in enumerate(parts) for _ in part]
            position = [j + (n if i else 0) for i, part in enumerate(parts) for j in range(len(part))]
            source = [n - 1 if p == n else t - 1 for t, p in enumerate(position)]
            rows.append(data.Row(tokens, segment, [s > 0 for s in segment], position, source))
            pictures.append(picture(data.Sample("", pair[0], [])))
    return data.collate(rows, pictures, range(len(rows)), encoder.image_size, len(responses[0]) == 2)


# ---------------------------------------------------------------------------------- the contestants

def naive_logps(model, batch):
    """(rows,) log-probabilities as they are usually computed: from the logits of everything."""
    column = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    mask = m.visible(batch.sample[..., None], batch.segment[..., None], column[:, None],
                     batch.sample[:, None], batch.segment[:, None], column)
    hidden = model.llm(model.embed(batch), mask[:, None], batch.position)
    logits = (hidden @ model.llm.head().type_as(hidden).mT).float()
    logps = logits[:, :-1].log_softmax(-1).gather(2, batch.tokens[:, 1:, None].clamp(min=0)).squeeze(2)
    return (logps * (batch.segment[:, 1:] == 1)).sum(1)


def make_trl(net, pairs, args, device):
    """DPOTrainer around our weights, and its batch: (trainer, model as prepared for training, inputs)."""
    import datasets
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast,
                              Qwen2Config, SiglipVisionConfig)
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    from trl import DPOConfig, DPOTrainer
    encoder, llm = net.encoder.config, net.llm.config
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(llm.vocab_size)}, unk_token=f"t{PAD}"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=f"t{PAD}", eos_token=f"t{PAD}",
                                    extra_special_tokens={"image_token": f"t{PLACE}"})
    side = {"height": encoder.image_size, "width": encoder.image_size}
    processor = LlavaProcessor(SiglipImageProcessorPil(size=side), words, encoder.patch_size, "full")
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    vision = SiglipVisionConfig(**{k: getattr(encoder, k) for k in (*keys, "image_size", "patch_size")},
                                layer_norm_eps=encoder.layer_norm_eps, vision_use_head=False)
    text = Qwen2Config(**{k: getattr(llm, k) for k in (*keys, "vocab_size", "num_key_value_heads", "rms_norm_eps")},
                       rope_parameters={"rope_type": "default", "rope_theta": llm.rope_theta},
                       tie_word_embeddings=llm.tie_word_embeddings, pad_token_id=PAD, bos_token_id=None, eos_token_id=PAD)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=PLACE, image_seq_length=encoder.tokens,
                         vision_feature_select_strategy="full", vision_feature_layer=-2,
                         tie_word_embeddings=llm.tie_word_embeddings, attn_implementation="sdpa")
    names = {"encoder.": "model.vision_tower.", "projector.0": "model.multi_modal_projector.linear_1",
             "projector.2": "model.multi_modal_projector.linear_2", "llm.model.": "model.language_model.",
             "llm.lm_head": "lm_head"}
    state = {next(new + k[len(old):] for old, new in names.items() if k.startswith(old)): v
             for k, v in net.state_dict().items()}
    if llm.tie_word_embeddings:
        state["lm_head.weight"] = net.llm.head()
    llava = [LlavaForConditionalGeneration(config) for _ in range(2)]       # policy and reference
    for one in llava:
        one.load_state_dict(state)

    def words_of(ids):
        return " ".join(f"t{i}" for i in ids)

    samples = [{"images": [image], "prompt": f"t{PLACE} {words_of(prompt)}", "chosen": " " + words_of(chosen),
                "rejected": " " + words_of(rejected)} for image, prompt, chosen, rejected in pairs]
    settings = dict(beta=BETA, max_length=None, gradient_checkpointing=False, bf16=args.dtype == "bfloat16",
                    use_cpu=device.type == "cpu", per_device_train_batch_size=len(pairs), dataloader_pin_memory=False,
                    precompute_ref_log_probs=False, padding_free=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(llava[0], llava[1], DPOConfig(folder, report_to="none", **settings),
                             train_dataset=datasets.Dataset.from_list(samples[:1]), processing_class=processor)
    trainer.current_gradient_accumulation_steps = 1                         # what train() would have set
    args.trl = {"attn_implementation": llava[0].config._attn_implementation, **settings}
    batch = trainer._prepare_inputs(trainer.data_collator(samples))
    expected = make_batch(pairs, encoder, (2,), (3,)).tokens                # the very same token ids
    real = batch["attention_mask"].bool().cpu()
    assert torch.equal(batch["input_ids"].cpu()[real], expected.where(expected >= 0, PLACE)[real])
    return trainer, trainer.accelerator.prepare_model(trainer.model), batch


def updating(model, loss_of, lr):
    """loss_of() backpropagates and returns the loss; add what follows, for everybody the same."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0, fused=True)

    def step():
        loss = loss_of()
        torch.nn.utils.clip_grad_norm_(parameters, 1.)
        optimizer.step()
        optimizer.zero_grad()
        return loss
    return step


def contestants(net, pairs, args, device):
    """{name: (step, bytes of weights and optimiser state)}; a step returns its loss."""
    encoder, steps = net.encoder.config, {}
    chosen, paired, apart = (make_batch(pairs, encoder, *kinds).to(device)
                             for kinds in ([(2,)], [(2, 3)], [(2,), (3,)]))
    size = 4 * sum(p.numel() for p in net.parameters())

    def backward(loss_of):
        def run():
            with probe.autocast(device, args.dtype):
                loss = loss_of()
            loss.backward()
            return loss.detach()
        return run

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

    paired.ref = reference()
    if "sft" in args.only:
        steps["sft"] = updating(net, backward(lambda: mean(sft_objective, chosen)), args.lr), 3 * size
    if "dpo" in args.only:
        steps["ref"] = reference, size
        steps["dpo"] = updating(net, backward(lambda: mean(dpo_objective, paired)), args.lr), 3 * size
    if "naive" in args.only:
        old = frozen(net)
        steps["naive"] = updating(net, backward(naive), args.lr), 4 * size
    if "trl" in args.only:
        trainer, model, batch = make_trl(net, pairs, args, device)
        steps["trl"] = updating(model, lambda: trainer.training_step(model, dict(batch)), args.lr), 4 * size
    return steps


# ---------------------------------------------------------------------------------------- measuring

def seconds(run, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(run, device):
    """Bytes that a step needs above what is there before it: activations, gradients, logits."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max())


def matmul_peak(device, dtype):
    """FLOP/s of the fastest of a few large square matrix products: what the machine can do."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=getattr(torch, dtype))
    return 2 * n ** 3 / min(seconds(lambda: a @ b, device) for _ in range(30))


def useful_flops(net, pairs, responses):
    """FLOPs of an update on these pairs: shared prefixes once, attention dense, recomputation not counted."""
    return sum(probe.flops(net.encoder.config, net.llm.config, len(net.encoder.used()), net.encoder.config.tokens
                           + len(p[1]) + sum(len(p[k]) for k in responses), sum(len(p[k]) for k in responses),
                           ("encoder", "projector", "llm")) for p in pairs)


def measure(net, pairs, args, device):
    steps, times = contestants(net, pairs, args, device), {}
    for run, _ in steps.values():                           # warm up; the optimiser makes its state
        run()
    peaks = {name: peak_memory(run, device) for name, (run, _) in steps.items()}
    for k in range(args.steps):
        names = list(steps)[k % len(steps):] + list(steps)[:k % len(steps)]
        for name in names:
            times.setdefault(name, []).append(seconds(steps[name][0], device))
    if "dpo" in times:
        times["dpo + ref / 3"] = [d + r / EPOCHS for d, r in zip(times["dpo"], times["ref"])]
    top, work = matmul_peak(device, args.dtype), {"sft": useful_flops(net, pairs, (2,)),
                                                  "dpo": useful_flops(net, pairs, (2, 3))}
    rows = [[name, f"{median(t):.3f}", f"{min(t):.3f} to {max(t):.3f}", f"{len(pairs) / median(t):.3f}",
             *((f"{steps[name][1] / 1e9:.2f}", f"{peaks[name] / 1e9:.2f}") if name in steps else ("", "")),
             f"{work[name] / median(t) / top:.0%}" if name in work else ""] for name, t in times.items()]
    print(probe.markdown(["step", "seconds", "range", "pairs/s", "held GB", "peak GB above", "MFU"], rows) + "\n")
    rows = []
    for a, b in ("dpo", "sft"), ("naive", "dpo"), ("trl", "dpo"), ("trl", "naive"):
        for c, d in ((a, b), (a.replace("dpo", "dpo + ref / 3"), b.replace("dpo", "dpo + ref / 3"))):
            if c in times and d in times and [f"{c} / {d}"] not in [row[:1] for row in rows]:
                r = [x / y for x, y in zip(times[c], times[d])]
                target = TARGETS.get(f"{a} / {b}", "") if "ref" in c + d else ""
                rows.append([f"{c} / {d}", f"{median(r):.2f}", f"{min(r):.2f} to {max(r):.2f}", target])
    print(probe.markdown(["seconds, ratio", "median", "range over rounds", "target"], rows) + "\n")
    print(f"MFU against a measured matmul peak of {top / 1e12:.2f} TFLOP/s in {args.dtype}.")
    if args.shapes == "h200" and "sft" in times:
        rate = work["sft"] / median(times["sft"])
        print(f"At sft's {rate / 1e12:.0f} TFLOP/s the paper's recipe (3.0e19 FLOP) takes {3.0e19 / rate / 3600:.1f} "
              f"GPU-hours; the datasheet's 989 TFLOP/s would make its MFU {rate / 989e12:.0%}.")


def check(net, pairs, args, device):
    """The same weights, pairs and AdamW: do loss, logps and margin stay the same while the loss falls?"""
    theirs = copy.deepcopy(net)
    batch, ours, seen = make_batch(pairs, net.encoder.config, (2, 3)).to(device), [], []
    with torch.no_grad():
        batch.ref = net(batch)

    def objective():
        loss, count, metrics = dpo_objective(net, batch, BETA)
        (loss / count).backward()
        ours.append([loss.item() / count, *seen.pop().mean(0).tolist(), metrics["margin"].item() / count])

    net.register_forward_hook(lambda module, inputs, logps: seen.append(logps.detach()))
    step = updating(net, objective, args.lr)
    for _ in range(args.steps):
        step()
    trainer, model, inputs = make_trl(theirs, pairs, args, device)
    step = updating(model, lambda: trainer.training_step(model, dict(inputs)), args.lr)
    losses = [float(step()) for _ in range(args.steps)]
    keys = "logps/chosen", "logps/rejected", "rewards/margins"
    trl = np.array([losses, *(trainer._metrics["train"][k] for k in keys)]).T
    ours = np.array(ours)
    print(probe.markdown(["step", "loss", "TRL's", "margin", "TRL's"],
                         [[k, *(f"{v:.6f}" for v in (ours[k, 0], trl[k, 0], ours[k, 3], trl[k, 3]))]
                          for k in range(args.steps)]) + "\n")
    error = np.abs(ours - trl)
    error /= np.where(np.arange(args.steps)[:, None] + [1, 1, 1, 0] > 0, np.abs(trl), 1)    # the first margin is zero
    fall, worst = 1 - trl[-1, 0] / trl[0, 0], dict(zip(("loss", "chosen", "rejected", "margin"), error.max(0)))
    print(f"loss falls by {fall:.0%}; largest relative differences: " + ", ".join(f"{k} {v:.1e}" for k, v in worst.items()))
    return fall >= .3 and max(worst.values()) <= 1e-4


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="compute in; weights are fp32")
    parser.add_argument("--only", nargs="+", choices=["sft", "dpo", "naive", "trl"], default=["sft", "dpo", "naive", "trl"])
    parser.add_argument("--steps", type=int, help="rounds (default 5); with --check steps (default 20)")
    parser.add_argument("--pairs", type=int, help="pairs in the batch")
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--check", action="store_true", help="compare what is learned with TRL; exit status 1 if not the same")
    args = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)          # TRL's own settings, renamed in transformers
    args.steps, args.trl = args.steps or (20 if args.check else 5), None
    try:
        versions = [f"{name} {version(name)}" for name in ("transformers", "trl")]
    except ImportError:
        versions, args.only = ["no TRL here: its row is left out"], [v for v in args.only if v != "trl"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder, llm, count = SHAPES[args.shapes]
    net = m.MLLM(m.Encoder(encoder), m.Projector(encoder.hidden_size, llm.hidden_size), m.Decoder(llm))
    m.initialise(net, 0).to(device)
    for module in net.encoder.unused():
        module.requires_grad_(False)
    pairs = make_pairs(args.shapes, encoder, llm, args.pairs or count, 0)
    print(f"{' '.join(sys.argv)}\n{torch.cuda.get_device_name() if device.type == 'cuda' else platform.processor()}, "
          f"{torch.get_num_threads()} threads of {os.cpu_count()}, torch {torch.__version__}, {', '.join(versions)}\n"
          f"{args.shapes} shapes, {args.dtype}, {len(pairs)} pairs a step, {args.steps} rounds, learning rate {args.lr}\n")
    good = (check if args.check else measure)(net, pairs, args, device)
    if args.trl:
        print("\nTRL: " + ", ".join(f"{k}={v}" for k, v in args.trl.items()))
    sys.exit(bool(args.check and not good))


if __name__ == "__main__":
    main()
