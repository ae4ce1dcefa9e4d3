"""The other objective: direct preference optimisation (DPO, Rafailov et al. 2023). Prefer the
chosen over the rejected response, against a frozen reference.

Compare sft.py: same samples, same model, same shape of code. The difference is the paper.
"""
import copy
import hashlib
import json
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from data import CHOSEN, REJECTED
from model import writing


def dpo_loss(logps, ref, beta, variant="dpo"):
    """L_DPO = -log sigmoid(beta * [(log pi(y_c|I,q) - log ref(y_c|I,q))
                                 - (log pi(y_r|I,q) - log ref(y_r|I,q))]):
    the paper's loss for preference-based post-training. ref is the model it starts from.

    logps, ref: (samples, 2) summed log-probabilities of chosen and rejected, policy and reference.
    beta: strength of the pull towards the reference.
    variant "ipo": (margin - 1 / (2 beta))^2 (Azar et al. 2023).
    Returns (samples,) losses; log 2 where policy = reference."""
    reward = logps - ref                        # implicit reward, without its factor beta
    margin = reward[:, CHOSEN] - reward[:, REJECTED]
    if variant == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    return -F.logsigmoid(beta * margin)


def dpo_objective(model, batch, beta=0.1, variant="dpo"):
    """The loss summed over a batch, what to divide it by (pairs), metrics to add up."""
    logps = model(batch)
    loss = dpo_loss(logps, batch.ref, beta, variant).sum()
    chosen, rejected = (beta * (logps.detach() - batch.ref)).unbind(1)      # rewards
    return loss, len(batch), {"margin": (chosen - rejected).sum(),
                              "accuracy": (chosen > rejected).float().sum(),
                              "chosen": chosen.sum(), "rejected": rejected.sum()}


# --------------------------------------------------------------------------------- the reference

def frozen(model):
    """The reference: a copy of the policy from before its first step. It never moves."""
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def reference_logps(reference, precision, batch):
    """Live: log ref(y|I,q) of a batch, (samples, 2). precision: the policy's autocast, because
    the two logs of a ratio want to be computed alike."""
    with precision:
        return reference(batch)


def cached(reference, steps, file, identity, device):
    """Cached: nothing in the reference changes while the policy trains, so evaluate it once.

    reference: batch -> (samples, 2). steps: batches that cover the data set, composed as they will
    be in the first epoch. identity: all that the numbers depend on (weights, data, template,
    tokenizer, precision, ...); a file written under another one is not used.
    Returns a function batch -> (samples, 2) that looks the numbers up."""
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    table, first = read_cache(file, key), dist.get_rank() == 0
    if table is None:
        table = torch.full((len(steps.data), 2), -torch.inf, device=device)
        for k in tqdm(range(len(steps)), "reference", unit="step", disable=not first):
            for batch in steps[k]:
                table[batch.index.to(device)] = reference(batch.to(device))
        if dist.get_world_size() > 1:
            dist.all_reduce(table, dist.ReduceOp.MAX)
        if first:
            with writing(file):
                save_file({"logps": table.cpu()}, file.with_suffix(".tmp"), {"key": key})
                os.replace(file.with_suffix(".tmp"), file)
    table = table.to(device)
    seen = table[table.isfinite().all(1)]
    prefers = (seen[:, CHOSEN] > seen[:, REJECTED]).float().mean()
    if first and len(seen) >= 100 and prefers < .35:
        print(f"warning: the reference prefers the chosen response of only {prefers:.0%} of the "
              "pairs: are chosen and rejected swapped, or the chosen ones longer?", file=sys.stderr)
    return lambda batch: table[batch.index]


# -------------------------------------------------------------------------------- on-policy pairs

@torch.no_grad()
def sampled_pairs(model, data, wanted, prepare, seed, device, precision):
    """Pairs of the policy's own responses: two at temperature 1 to each question, chosen the one
    with fewer mistakes; without ties. Good, not perfect, and as worded as the model words.

    data: a World of preferences. wanted: indices. Returns {index: (chosen, rejected)}."""
    by_kind, pairs = {}, {}
    for i in wanted:                            # short answers need not wait for long ones
        by_kind.setdefault(data.draw(i)[2], []).append(i)
    batches = [at[k:k + 256] for at in by_kind.values() for k in range(0, len(at), 256)]
    rank, world = dist.get_rank(), dist.get_world_size()
    for k in tqdm(range(rank, len(batches), world), "sampling", unit="batch", disable=rank > 0):
        batch = prepare([data[i] for i in batches[k]], answers=False).to(device)
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + k)
        with precision:
            said = [model.generate(batch, prepare.end, 96, 1., generator)
                    for _ in range(2)]
        for i, *both in zip(batches[k], *said):
            both = sorted((data.mistakes(i, text), text)
                          for text in map(prepare.tokenizer.decode, both))
            if both[0][0] < both[1][0]:
                pairs[i] = both[0][1], both[1][1]
    if world > 1:
        everyone = [None] * world
        dist.all_gather_object(everyone, pairs)
        pairs = {i: pair for part in everyone for i, pair in part.items()}
    return pairs


def read_cache(file, key):
    """The cached table, or None if it is absent, damaged or somebody else's."""
    try:
        with safe_open(file, "pt") as f:
            return f.get_tensor("logps") if (f.metadata() or {}).get("key") == key else None
    except (OSError, SafetensorError):
        return None
