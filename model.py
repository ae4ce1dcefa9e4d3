"""What learns: a ViT encoder, an MLP projector, a decoder LLM, and the multimodal LLM (MLLM) that
they make; and the folders that they are kept in.

Modules and parameters carry the names of Hugging Face's checkpoints (SigLIP's vision model; Qwen2's
and Llama's decoder), so that loading is load_state_dict and what we save opens there.
"""
import contextlib
import functools
import hashlib
import json
import math
import os
import re
import shutil
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from data import IMAGE, BadInput

LOGIT_CHUNK = 256       # target positions whose logits exist at the same time


@dataclass
class EncoderConfig:
    """A vision transformer in the words of its config.json, and how pictures are prepared."""
    hidden_size: int = 128
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    image_size: int = 48
    patch_size: int = 8
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"
    mlp_ratio: float = 0.           # DINOv2's way to say intermediate_size
    qkv_bias: bool = True
    class_token: bool = False
    num_register_tokens: int = 0
    pre_norm: bool = False          # CLIP's norm before the first layer, and no bias on patches
    layer_scale: bool = False       # DINOv2's factor on each channel of a branch
    image_mean: tuple = (.5, .5, .5)
    image_std: tuple = (.5, .5, .5)
    resample: int = 3               # Pillow's number: 2 bilinear, 3 bicubic
    shortest_edge: int = 0          # resize the shorter side to this, crop the centre; 0: squash
    source = None                   # what else its folder held, {"config.json": ...}; no field

    @property
    def tokens(self):
        return (self.image_size // self.patch_size) ** 2


@dataclass
class LLMConfig:
    """A Qwen2 or Llama in the words of its config.json."""
    vocab_size: int = 512
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 3
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 0                   # 0: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    factor: float = 0.                  # of Llama 3's rope scaling; 0: none
    low_freq_factor: float = 1.
    high_freq_factor: float = 4.
    original_max_position_embeddings: int = 8192
    attention_bias: bool = True         # on q, k, v: Qwen2 has it, Llama does not
    tie_word_embeddings: bool = True
    source = None                       # its config.json as it was read; no field

    def __post_init__(self):
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads


# -------------------------------------------------------------------------------------- attention

def visible(sample_q, segment_q, column_q, sample_k, segment_k, column_k):
    """The one attention rule: a token sees an earlier token of its own sample if that one is in the
    prompt or in the same response. Elementwise on whatever broadcasts."""
    return ((sample_q == sample_k) & (column_q >= column_k) &
            ((segment_k == 0) | (segment_q == segment_k)))


def mask_of(sample, segment, kernels=False):
    """Who sees whom. sample, segment: (rows, length) -> bool (rows, 1, length, length). For the
    kernels of CUDA: None, plain causal attention, where a row is one sample with one response and
    then padding; else a BlockMask, by which FlexAttention skips what nobody sees."""
    rows, length = sample.shape

    def see(row, head, i, j):
        return visible(sample[row, i], segment[row, i], i, sample[row, j], segment[row, j], j)

    if not kernels:
        row, column = (torch.arange(n, device=sample.device) for n in (rows, length))
        return see(row[:, None, None], 0, column[:, None], column)[:, None]
    if not ((segment > 1) | (sample >= 0) & (sample != sample[:, :1])).any():
        return None
    return create_block_mask(see, rows, None, length, length, sample.device)


@functools.cache
def flex():
    """FlexAttention as a kernel of its own: compiled at first use, once and not once per length."""
    return torch.compile(flex_attention, dynamic=True)


def attend(q, k, v, mask=None, causal=False):
    """Softmax attention. q: (B, heads, T, d), k, v: (B, heads, S, d), or fewer heads, of which each
    serves several of q's; mask: a BlockMask, or what is added to scores, (B, 1, T, S)
    -> (B, T, heads * d).

    In bf16 on a CPU it is written out: the fused kernel takes 1.7 (936 tokens) to 10 times (36
    tokens) as long."""
    if isinstance(mask, BlockMask):         # in a block that is compiled it is compiled with it
        kernel = flex_attention if torch.compiler.is_compiling() else flex()
        return kernel(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2).flatten(2)
    if k.shape[1] < q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    mask = mask if mask is None else mask.type_as(q)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and not causal:
        scores = (q * q.shape[-1] ** -.5) @ k.mT        # scaled here: q is smaller than the scores
        out = (scores if mask is None else scores + mask).softmax(-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    return out.transpose(1, 2).flatten(2)


def heads(x, d):
    """(B, T, n * d) -> (B, n, T, d)"""
    return x.unflatten(-1, (-1, d)).transpose(1, 2)


class LayerNorm(nn.LayerNorm):
    """In the dtype of x, fp32 in a block, also where FSDP has gathered the weights in bf16."""

    def forward(self, x):
        weight, bias = self.weight.type_as(x), self.bias.type_as(x)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """See LayerNorm."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.type_as(x), self.eps)


# ---------------------------------------------------------------------------------------- encoder

ACTIVATIONS = {"gelu": F.gelu, "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
               "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
               "swiglu": lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]}


class EncoderLayer(nn.Module):
    """Pre-norm transformer block: attention, then an MLP."""

    def __init__(self, c):
        super().__init__()
        width, gates = c.hidden_size, 2 if c.hidden_act == "swiglu" else 1
        self.head_dim, self.act = width // c.num_attention_heads, ACTIVATIONS[c.hidden_act]
        self.layer_norm1 = LayerNorm(width, c.layer_norm_eps)
        self.layer_norm2 = LayerNorm(width, c.layer_norm_eps)
        self.layer_scale1 = nn.Parameter(torch.ones(width)) if c.layer_scale else 1
        self.layer_scale2 = nn.Parameter(torch.ones(width)) if c.layer_scale else 1
        self.self_attn = nn.ModuleDict(
            {f"{x}_proj": nn.Linear(width, width, c.qkv_bias) for x in "qkv"} |
            {"out_proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, gates * c.intermediate_size),
                                  "fc2": nn.Linear(c.intermediate_size, width)})

    def forward(self, x):
        attn, mlp, h = self.self_attn, self.mlp, self.layer_norm1(x)
        q, k, v = (heads(f(h), self.head_dim) for f in (attn.q_proj, attn.k_proj, attn.v_proj))
        x = x + self.layer_scale1 * attn.out_proj(attend(q, k, v))
        return x + self.layer_scale2 * mlp.fc2(self.act(mlp.fc1(self.layer_norm2(x))))


class Encoder(nn.Module):
    """A vision transformer. (I, 3, H, W) pixels -> (I, tokens, width) features, one a patch.

    select_layer counts as LLaVA does: -2, the paper's choice, is the output of the second-to-last
    layer; the last layer and the final norm then neither run nor train, but are kept and saved. 0
    runs everything."""

    def __init__(self, config, select_layer=-2):
        super().__init__()
        self.config, self.select_layer, c = config, select_layer, config
        width, registers, p = c.hidden_size, c.num_register_tokens, c.patch_size
        self.extra = c.class_token + registers              # tokens before the patches'
        self.embeddings = e = nn.Module()
        e.patch_embedding = nn.Conv2d(3, width, p, p, bias=not c.pre_norm)
        e.position_embedding = nn.Embedding(c.class_token + c.tokens, width)
        e.class_embedding = nn.Parameter(torch.zeros(width)) if c.class_token else None
        e.register_tokens = nn.Parameter(torch.zeros(registers, width)) if registers else None
        norm = nn.LayerNorm if c.pre_norm else nn.Identity
        self.pre_layrnorm = norm(width, c.layer_norm_eps)               # CLIP's spelling
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(EncoderLayer(c) for _ in range(c.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(width, c.layer_norm_eps)

    def used(self):
        """The layers that run."""
        return self.encoder.layers[:len(self.encoder.layers) + 1 + (self.select_layer or -1)]

    def unused(self):
        """The modules that do not: nothing in them ever gets a gradient."""
        norm = [self.post_layernorm] if self.select_layer else []
        return [*self.encoder.layers[len(self.used()):], *norm]

    def forward(self, pixels):
        e = self.embeddings
        x = e.patch_embedding(pixels).flatten(2).mT
        if e.class_embedding is not None:
            x = torch.cat((e.class_embedding.expand(len(x), 1, -1), x), 1)
        x = x + e.position_embedding.weight
        if e.register_tokens is not None:                   # they alone have no positions
            x = torch.cat((x[:, :1], e.register_tokens.expand(len(x), -1, -1), x[:, 1:]), 1)
        x = self.pre_layrnorm(x)
        for layer in self.used():
            x = layer(x)
        x = x if self.select_layer else self.post_layernorm(x)
        return x[:, self.extra:]


class Projector(nn.Sequential):
    """Encoder width -> LLM width; parameters 0.*, 2.*, as in LLaVA's mm_projector."""

    def __init__(self, width, out):
        super().__init__(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))


# -------------------------------------------------------------------------------------------- LLM

def rotate(x, cos, sin):
    """Rotary positions, halves convention. x: (B, heads, T, d), cos, sin: (B, 1, T, d)."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class DecoderLayer(nn.Module):
    """Pre-norm transformer block: attention with shared key and value heads, then SwiGLU."""

    def __init__(self, c):
        super().__init__()
        width, inner, bias = c.hidden_size, c.intermediate_size, c.attention_bias
        q, kv = (n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads))
        self.head_dim = c.head_dim
        self.input_layernorm = RMSNorm(width, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(width, c.rms_norm_eps)
        self.self_attn = nn.ModuleDict(
            {f"{x}_proj": nn.Linear(width, n, bias) for x, n in zip("qkv", (q, kv, kv))} |
            {"o_proj": nn.Linear(q, width, bias=False)})
        self.mlp = nn.ModuleDict({"gate_proj": nn.Linear(width, inner, bias=False),
                                  "up_proj": nn.Linear(width, inner, bias=False),
                                  "down_proj": nn.Linear(inner, width, bias=False)})

    def forward(self, x, mask, cos, sin, past=None):
        """past: a list of this layer's (k, v) so far, replaced; None outside generation."""
        attn, mlp, h = self.self_attn, self.mlp, self.input_layernorm(x)
        q, k, v = (heads(f(h), self.head_dim) for f in (attn.q_proj, attn.k_proj, attn.v_proj))
        q, k = rotate(q, cos, sin).type_as(v), rotate(k, cos, sin).type_as(v)
        if past is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(past or (k[:, :, :0], v[:, :, :0]), (k, v)))
            past[:] = k, v
        x = x + attn.o_proj(attend(q, k, v, mask, causal=mask is None))
        h = self.post_attention_layernorm(x)
        return x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))


class Decoder(nn.Module):
    """Qwen2 / Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.model.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.num_hidden_layers))
        self.model.norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def head(self):
        """(vocab, width): the output matrix, the embedding's where they are tied."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    def forward(self, x, mask, position, past=None):
        """x: (B, T, width) embeddings, mask: see mask_of, position: (B, T)
        -> (B, T, width), normed. past: a list with one list per layer, see DecoderLayer."""
        c, lowest = self.config, torch.finfo(torch.bfloat16).min        # finite in fp32, too
        if isinstance(mask, torch.Tensor):
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, lowest)
        f = c.rope_theta ** -(torch.arange(0, c.head_dim, 2, device=x.device) / c.head_dim)
        if c.factor:        # Llama 3 slows down what hardly turned within its first pretraining
            turns = c.original_max_position_embeddings * f / (2 * math.pi)
            keep = (turns - c.low_freq_factor) / (c.high_freq_factor - c.low_freq_factor)
            f = f.lerp(f / c.factor, 1 - keep.clamp(0, 1))
        angle = position[:, None, :, None].float() * torch.cat((f, f))
        cos, sin = angle.cos(), angle.sin()
        for i, layer in enumerate(self.model.layers):
            x = layer(x, mask, cos, sin, past and past[i])
        return self.model.norm(x)


# ------------------------------------------------------------------------------------------- MLLM

def token_logps(hidden, head, target):
    """log softmax(hidden @ head.T)[target]: (n, width), (vocab, width), (n,) -> (n,), fp32."""
    logits = (hidden @ head.type_as(hidden).mT).float()
    return -F.cross_entropy(logits, target, reduction="none")


class MLLM(nn.Module):
    """Vision encoder + projector + LLM; without the first two, a language model."""
    kernels = True          # FlexAttention and causal flash, in bf16 on CUDA; else dense masks

    def __init__(self, encoder, projector, llm):
        super().__init__()
        self.encoder, self.projector, self.llm = encoder, projector, llm

    def embed(self, batch):
        """Token embeddings with image features in the image positions: (rows, length, width).

        The encoder runs even when no row has an image, so that under FSDP every rank calls the
        same collectives."""
        x = self.llm.model.embed_tokens(batch.tokens.clamp(min=0))
        if self.encoder is None:
            return x
        features = self.projector(self.encoder(batch.pixels)).flatten(0, 1)
        place = (batch.tokens == IMAGE).flatten().nonzero().squeeze(1)
        if len(place) != batch.images * self.encoder.config.tokens:
            raise ValueError(f"{len(place)} image positions for {batch.images} pictures of "
                             f"{self.encoder.config.tokens} tokens")
        features = features[:len(place)].type_as(x)
        return x.flatten(0, 1).index_put((place,), features).view_as(x)

    def forward(self, batch):
        """Summed log-probability of every response, log pi(y | I, q): (samples, responses), fp32.

        Logits exist only at target positions, LOGIT_CHUNK of them at a time; backward computes
        each chunk again."""
        kernels = (self.kernels and batch.tokens.is_cuda and torch.is_autocast_enabled("cuda") and
                   self.llm.config.head_dim >= 16)          # FlexAttention has no smaller ones
        mask = mask_of(batch.sample, batch.segment, kernels)
        hidden = self.llm(self.embed(batch), mask, batch.position)
        hidden, head, logps = hidden.flatten(0, 1)[batch.source], self.llm.head(), []
        for h, target in zip(hidden.split(LOGIT_CHUNK), batch.target.split(LOGIT_CHUNK)):
            logps.append(checkpoint(token_logps, h, head, target, use_reentrant=False))
        total = torch.zeros(len(batch), batch.responses, device=hidden.device)
        place = batch.response // batch.responses, batch.response % batch.responses
        return total.index_put(place, torch.cat(logps), accumulate=True)

    @torch.no_grad()
    def generate(self, batch, end, max_new=32, temperature=0., generator=None):
        """Continue every row's prompt until `end`, with a KV cache. Greedy at temperature 0, else
        sampled. Returns a list of token id lists, without the end token."""
        rows, length = batch.tokens.shape
        row = torch.arange(rows, device=batch.tokens.device)
        sample = torch.cat((batch.sample, row[:, None].expand(-1, max_new)), 1)     # its row's own
        mask, prompt = mask_of(sample, 0 * sample), (batch.sample >= 0).sum(1)
        x, position, columns, last = self.embed(batch), batch.position, slice(length), prompt - 1
        past, out = [[] for _ in self.llm.model.layers], []
        open_ = torch.ones_like(row, dtype=torch.bool)
        for at in range(length, length + max_new):      # the column of the token to come
            hidden = self.llm(x, mask[:, :, columns, :at], position, past)[row, last]
            logits = (hidden @ self.llm.head().type_as(hidden).mT).float()
            token = logits.argmax(-1) if temperature == 0 else torch.multinomial(
                (logits / temperature).softmax(-1), 1, generator=generator).squeeze(1)
            open_ = open_ & (token != end)
            out.append(torch.where(open_, token, end))
            if not open_.any():
                break
            x, columns, last = self.llm.model.embed_tokens(token)[:, None], slice(at, at + 1), 0
            position = (prompt + at - length)[:, None]
        return [[t for t in tokens if t != end] for tokens in torch.stack(out, 1).tolist()]


class SigLIP(nn.Module):
    """Contrastive pretraining (Zhai et al. 2023): every picture against every caption, a sigmoid
    each. Gives the world its "original" encoder; text tower and heads are thrown away."""

    def __init__(self, encoder, text):
        super().__init__()
        self.encoder, self.text = encoder, text
        self.image_head = nn.Linear(2 * encoder.config.hidden_size, text.config.hidden_size)
        self.scale = nn.Parameter(torch.tensor([math.log(10.)]))    # FSDP cannot shard scalars
        self.shift = nn.Parameter(torch.tensor([-10.]))

    def forward(self, batch):
        """(samples, samples) logits: row = picture, column = caption."""
        features = self.encoder(batch.pixels)
        image = self.image_head(torch.cat((features.mean(1), features.amax(1)), -1))
        words = (batch.sample >= 0) & (batch.tokens != IMAGE)
        x = self.text.model.embed_tokens(batch.tokens.clamp(min=0))
        hidden = self.text(x, mask_of(words, 0 * batch.segment), batch.position)
        text = (hidden * words[..., None]).sum(1) / words.sum(1, keepdim=True)
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        return image @ text.T * self.scale.exp() + self.shift


def initialise(module, seed):
    """Fresh weights from a generator: normal, as wide as the layer wants; biases zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(module.named_parameters()):
        if p.ndim >= 2:
            std = .02 if "embed" in name and "patch" not in name else p[0].numel() ** -.5
            nn.init.normal_(p, std=std, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
    return module


# ------------------------------------------------------------------------------ checkpoint folders
# Where families differ, tables differ: what their JSON files mean where they do not say, and the
# rules that make SigLIP's names of their tensors' names.

SIZES = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
         "num_attention_heads": 12, "image_size": 224, "patch_size": 16}
SIGLIP = {"image_processor_type": "SiglipImageProcessor"}
CLIP = {"class_token": True, "pre_norm": True, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
        "patch_size": 32, "do_center_crop": True, "image_processor_type": "CLIPImageProcessor",
        "image_mean": [.48145466, .4578275, .40821073],
        "image_std": [.26862954, .26130258, .27577711]}
IMAGENET = {"image_mean": [.485, .456, .406], "image_std": [.229, .224, .225]}
VIT = {"class_token": True, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "resample": 2,
       "image_processor_type": "ViTImageProcessor"}
DINO = {"class_token": True, "hidden_act": "gelu", "mlp_ratio": 4, "layer_scale": True, "size": 256,
        "crop_size": 224, "do_center_crop": True, "image_processor_type": "BitImageProcessor"}
FAMILIES = {"siglip_vision_model": SIGLIP, "clip_vision_model": CLIP, "dinov2": DINO | IMAGENET,
            "dinov2_with_registers": DINO | IMAGENET | {"num_register_tokens": 4},
            "vit_mae": VIT | IMAGENET, "vit": VIT}
TOWERS = {"siglip_vision_model": "SiglipVisionModel", "clip_vision_model": "CLIPVisionModel"}
RENAME = {r"^(vision_model|vit|dinov2|dinov2_with_registers)\.": "", r"\.lambda1$": "",
          "cls_token": "class_embedding", r"patch_embeddings\.projection": "patch_embedding",
          "position_embeddings": "position_embedding.weight",
          r"^encoder\.layer\.": "encoder.layers.", r"^layernorm\.": "post_layernorm.",
          r"attention\.attention\.([qkv])[a-z]+": r"self_attn.\1_proj",
          r"attention\.output\.dense": "self_attn.out_proj",
          r"intermediate\.dense|mlp\.weights_in": "mlp.fc1",
          r"(?<=\d\.)output\.dense|mlp\.weights_out": "mlp.fc2",
          r"\.(layernorm_before|norm1)\.": ".layer_norm1.",
          r"\.(layernorm_after|norm2)\.": ".layer_norm2."}

LLMS = {"llama": {}, "qwen2": {"attention_bias": True}, "mistral": {"sliding_window": 4096}}
LLAVA = {"llava_llama": "llama", "llava_qwen": "qwen2"}         # whose LLM it holds
LLAMA3 = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"

FITS = {bool: lambda v: type(v) is bool, int: lambda v: type(v) is int and 0 <= v < 2 ** 24,
        float: lambda v: type(v) in (int, float) and 0 <= v < 2 ** 24,
        str: lambda v: type(v) is str,
        tuple: lambda v: type(v) is list and len(v) == 3 and all(map(FITS[float], v))}


@contextlib.contextmanager
def reading(path):
    """Around what reads: whatever is wrong with a file is one line."""
    try:
        yield
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise BadInput(f"{path}: cannot be read ({' '.join(str(error).split())[:300]})") from None


@contextlib.contextmanager
def writing(path):
    """Around what writes: a full disk, or a place that is not ours, is one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: cannot be written ({error}); what was there is whole: make room "
                       "and start the same command again") from None


def read_json(file):
    """A JSON object -> dict, without the type that weights had; save_folder says theirs."""
    with reading(file):
        return dict(json.loads(file.read_text("utf-8"), object_hook=lambda d: {
            k: v for k, v in d.items() if k not in ("dtype", "torch_dtype")}))


def checked(kind, file, values, needed=(), **known):
    """A config dataclass of a JSON file's values, each as its field's type FITS, zero only where it
    is the default. needed: names that must be there; known: all that we compute of a setting."""
    values = {k: v for k, v in values.items() if v is not None}
    kept = {f: values[f.name] for f in fields(kind) if f.name in values}
    wrong = [k for k in needed if k not in values]
    wrong += [k for k, options in known.items() if values.get(k) not in [None, *options]]
    wrong += [f.name for f, v in kept.items() if not FITS[f.type](v) or f.default and (
        f.type is not bool and v == 0 or f.name == "image_std" and 0 in v or
        f.name == "num_hidden_layers" and v > 1000)]
    if not wrong:
        c = kind(**{f.name: tuple(v) if f.type is tuple else v for f, v in kept.items()})
        if not (c.hidden_size % c.num_attention_heads or getattr(c, "head_dim", 2) % 2 or
                c.num_attention_heads % getattr(c, "num_key_value_heads", 1)):
            return c
        wrong = ["num_attention_heads"]     # does not divide, is not divided, leaves odd widths
    value = json.dumps(values[wrong[0]]) if wrong[0] in values else "missing"
    options = " or ".join(map(json.dumps, known.get(wrong[0], ()))) or "a value that makes sense"
    raise BadInput(f'{file}: "{wrong[0]}" is {value}; this needs {options}')


def one(size):
    """The number in {"height": 32, "width": 32} or {"shortest_edge": 32}; else what is given."""
    numbers = [*size.values()] if isinstance(size, dict) else [size]
    return numbers[0] if numbers.count(numbers[0]) == len(numbers) else size


def read_encoder_config(folder, image_size=None, config=None):
    """The EncoderConfig of load_encoder's encoder; reads no weights."""
    file = Path(config or folder) / "config.json"
    raw, pixel_file = read_json(file), file.with_name("preprocessor_config.json")
    given = read_json(pixel_file) if pixel_file.exists() else {}
    if raw.get("model_type") in ("siglip", "clip"):                 # of the whole the vision part
        part = raw.get("vision_config")
        raw = {"model_type": raw["model_type"] + "_vision_model"} | (
            part if isinstance(part, dict) else {"hidden_size": part})
    family = FAMILIES.get(str(raw.get("model_type")), {})
    values = SIZES | family | raw | ({"hidden_act": "swiglu"} if raw.get("use_swiglu_ffn") else {})
    native = checked(EncoderConfig, file, values, ["model_type"], model_type=FAMILIES,
                     hidden_act=ACTIVATIONS).image_size

    # ---- pictures: squashed to a square, or the shorter side resized and a square cropped
    pixels = values | {k: v for k, v in given.items() if v is not None}
    size = pixels.get("size") or native
    crop = pixels.get("do_center_crop") and not (isinstance(size, dict) and "height" in size)
    side = one((pixels.get("crop_size") or native) if crop else size)
    pixels |= {"image_size": side, "shortest_edge": one(size) if crop else 0}
    c = checked(EncoderConfig, pixel_file, pixels, ["image_size"], resample=range(6),
                do_resize=[True], do_rescale=[True], do_normalize=[True])
    new = image_size or (side if given else min(side, native))
    c.image_size, c.shortest_edge = new, c.shortest_edge * new // side
    c.source = {"config.json": raw | {"image_size": native},
                "preprocessor_config.json": {k: pixels[k] for k in SIGLIP} | given}
    if c.mlp_ratio:
        c.intermediate_size = int(c.hidden_size * c.mlp_ratio)
        if c.hidden_act == "swiglu":                # two thirds, rounded up to a multiple of 8
            c.intermediate_size = (int(c.intermediate_size * 2 / 3) + 7) // 8 * 8
    if not 0 < c.tokens <= 1 << 16:
        raise BadInput(f'{file}: image size {new} and "patch_size" {c.patch_size} make {c.tokens} '
                       f"image tokens; this needs 1 to {1 << 16}")
    return c


def read_llm_config(folder):
    """The LLMConfig of load_llm's model; reads no weights."""
    file = Path(folder) / "config.json"
    raw = read_json(file)
    model_type = str(raw.get("model_type"))
    model_type = LLAVA.get(model_type, model_type)
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    rope = rope if isinstance(rope, dict) else {"rope_type": rope}
    values = {"num_key_value_heads": raw.get("num_attention_heads"), "attention_bias": False,
              "tie_word_embeddings": False, "rope_type": rope.get("type", "default"),
              "original_max_position_embeddings": raw.get("max_position_embeddings"),
              **LLMS.get(model_type, {}), **raw, **rope}
    needed = ["model_type", "vocab_size", *[*SIZES][:4]]
    needed += LLAMA3[:3] if values["rope_type"] == "llama3" else ()
    known = {"sliding_window": []} if model_type == "mistral" else {"use_sliding_window": [False]}
    c = checked(LLMConfig, file, values, needed, model_type=[*LLMS, *LLAVA], hidden_act=["silu"],
                rope_type=["default", "llama3"], **known)
    c.source = {k: v for k, v in raw.items() if not k.startswith("mm_")} | {
        "model_type": model_type, "architectures": [model_type.capitalize() + "ForCausalLM"]}
    return c


def weight_files(folder):
    """The safetensors files of a folder: one, or shards."""
    files = sorted(filter(Path.is_file, Path(folder).glob("*.safetensors")))
    if not files:
        raise BadInput(f"{folder}: no safetensors there (a .bin is not read: save it as one); name "
                       "a folder with a model in it")
    return files


def open_tensors(folder, *prefixes):
    """{name: safetensors' slice}: shape and dtype; rows are read when asked for. Of names with one
    of the prefixes that is cut off, and other names are left out."""
    tensors = {}
    for file in weight_files(folder):
        with reading(file), safe_open(file, "pt") as f:
            tensors |= {name: f.get_slice(name) for name in f.keys()}
    for p in prefixes:
        tensors = {k[len(p):]: v for k, v in tensors.items() if k.startswith(p)} or tensors
    return tensors


def fill(make, folder, tensors, lost=()):
    """make()'s module with a folder's tensors in fp32. All must be there and fit; zeros stand for
    those whose names begin with `lost`. Under torch.device("meta") it gets no values yet, only
    where read_weights finds them."""
    with torch.device("meta"):
        module = make()
    own = module.state_dict()
    state = {name: v for name, v in own.items() if name.startswith(lost)}
    with reading(folder):
        for name, t in tensors.items():
            shape = t.get_shape()
            if name in own:
                if t.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    raise TypeError(f"{name} is {t.get_dtype()}")
                shape = shape[-own[name].ndim:]             # without the batch of one
                if "position" in name:                      # interpolated
                    shape = [len(own[name]), *shape[1:]]
            elif not re.match(r"(encoder|model)\.layers\.(?!.*rotary_emb)", name):
                continue                                    # else a bias, a norm, a layer too many
            state[name] = torch.empty(shape, device="meta")
        module.load_state_dict(state)
    # a function, for copies of the module to share: slices of files cannot be copied
    module.stored = lambda: (folder, {k: t for k, t in tensors.items() if k in own})
    return module if torch.get_default_device().type == "meta" else read_weights(module)


def read_weights(model, device="cpu"):
    """Move a model to its device; what fill left on the meta device gets its values there: of a
    parameter that FSDP has sharded this process reads its own rows only, but of positions and
    tokens, which are small, all. Returns the model."""
    model._apply(lambda t: torch.zeros_like(t, device=device) if t.is_meta else t.to(device))
    for module in [module for module in model.modules() if hasattr(module, "stored")]:
        folder, tensors = vars(module).pop("stored")()
        for name, t in tensors.items():
            p = module.get_parameter(name)
            local, start = p.detach(), 0
            if isinstance(p, DTensor):      # of equal parts, of which the last ones may be shorter
                local, mesh = local.to_local(), p.device_mesh
                start = mesh.get_local_rank() * math.ceil(len(p) / mesh.size())
            rows = slice(start, start + len(local))
            with reading(folder):
                if t.get_shape() == [*p.shape]:
                    t = t[rows].float()
                else:
                    antialias = "embeddings.register_tokens" in tensors     # as DINOv2's authors
                    t = fitted(t[...].float(), p.shape, antialias)[rows]
            if not t.sum().isfinite():
                raise BadInput(f"{folder}: {name} has values that are not finite")
            local.copy_(t)
    return model


def fitted(table, shape, antialias):
    """What is stored in another shape than ours: with a batch of one; and positions of n * n
    patches, before them a class token's if it has one, for pictures of another size."""
    table = table.reshape(-1, *shape[1:])
    if len(table) != shape[0]:
        n, side = math.isqrt(len(table)), math.isqrt(shape[0])
        first, grid = table.split((len(table) - n * n, n * n))
        grid = F.interpolate(grid.T.reshape(1, -1, n, n), (side, side), mode="bicubic",
                             antialias=antialias)
        table = torch.cat((first, grid[0].flatten(1).T))
    return table


def load_encoder(folder, select_layer=-2, image_size=None, config=None):
    """A vision encoder from a Hugging Face folder; of a whole CLIP, SigLIP, LLaVA the vision part.

    image_size: pixels a side, if not as in preprocessor_config.json; positions are interpolated.
    config: the folder with the two JSON files, which LLaVA's own layout needs. That has lost the
    last layer: one of zeros, which passes on what it gets, stands in, so that select_layer counts
    as before."""
    c = read_encoder_config(folder, image_size, config)
    tensors = open_tensors(folder, "model.vision_tower.vision_tower.", "vision_model.")
    theirs = {functools.reduce(lambda name, rule: re.sub(*rule, name), RENAME.items(), name): name
              for name in tensors}                              # {our name: theirs}
    last = f"encoder.layers.{c.num_hidden_layers - 1}."
    lost = config and not any(name.startswith(last) for name in theirs)
    if not -c.num_hidden_layers - 1 <= select_layer <= (-2 if lost else 0):
        cut = ", of which LLaVA has cut off the last" if lost else ""
        raise BadInput(f"{folder}: select_layer {select_layer} is not one of its "
                       f"{c.num_hidden_layers} layers{cut}")
    encoder = fill(lambda: Encoder(c, select_layer), folder,
                   {our: tensors[name] for our, name in theirs.items()}, last if lost else ())

    # ---- kept for saving: names, and what we do not use, but no tables made for another size
    raw, own = c.source["config.json"], encoder.state_dict()
    tower = TOWERS.get(raw["model_type"])
    c.source["names"] = {our: "vision_model." * bool(tower) + name for our, name in theirs.items()}
    with torch.device("cpu"):
        c.source["rest"] = {
            c.source["names"][our]: tensors[name][...].clone() for our, name in theirs.items()
            if our not in own and (c.image_size == raw["image_size"] or "pos" not in name)}
    raw |= {"architectures": [tower]} if tower else {}
    raw |= {"vision_use_head": any("head." in name for name in theirs)} if lost else {}
    return encoder


def load_llm(folder):
    """A Qwen2 or Llama model from a Hugging Face folder, or the LLM of LLaVA's own layout."""
    c = read_llm_config(folder)
    return fill(lambda: Decoder(c), folder, open_tensors(folder))


def load_model(encoder, projector, llm, select_layer=-2, seed=0, image_size=None,
               encoder_config=None):
    """Three folders -> MLLM; in LLaVA's own layout they are one. projector None: a fresh one.
    image_size, encoder_config: see load_encoder. Under torch.device("meta"): see fill."""
    encoder, llm = load_encoder(encoder, select_layer, image_size, encoder_config), load_llm(llm)
    widths = encoder.config.hidden_size, llm.config.hidden_size
    with torch.device("cpu"):               # small: always read or made
        return MLLM(encoder, initialise(Projector(*widths), seed) if not projector else fill(
            lambda: Projector(*widths), projector,
            open_tensors(projector, "model.mm_projector.")), llm)


def hash_file(path):
    with reading(path), open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def hash_weights(folder):
    """What identifies a checkpoint folder: the hashes of its tensor files."""
    return [hash_file(file) for file in weight_files(folder)]


def write_json(file, value):
    """Write beside the file and rename: it is whole or absent."""
    with writing(file):
        Path(f"{file}.tmp").write_text(json.dumps(value, indent=2) + "\n")
        os.replace(f"{file}.tmp", file)


def save_folder(folder, tensors, files, copies, dtype):
    """One checkpoint folder: model.safetensors, JSON files, copies of others. Whole or absent."""
    folder, stored = Path(folder), str(dtype).removeprefix("torch.")
    temporary, old = Path(f"{folder}.tmp"), Path(f"{folder}.old")
    with writing(folder):
        for left in (temporary, old):
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file({k: v.detach().to("cpu", dtype if v.is_floating_point() else None).contiguous()
                   for k, v in tensors.items()}, temporary / "model.safetensors", {"format": "pt"})
        for name, value in files.items():
            own = {"dtype": stored, "torch_dtype": stored} if name == "config.json" else {}
            write_json(temporary / name, value | own)
        for file in copies:
            shutil.copy(file, temporary)
        if folder.exists():                     # not removed in place: that takes a while
            os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)


def encoder_folder(c, state):
    """(tensors, JSON files) of an encoder: as in the folder it came from; a fresh one's: SigLIP"""
    fresh = {"model_type": "siglip_vision_model", "architectures": ["SiglipVisionModel"],
             "vision_use_head": False,
             **{k: getattr(c, k) for k in (*SIZES, "hidden_act", "layer_norm_eps")}}
    source = {"names": {}, "rest": {}, "config.json": fresh, "preprocessor_config.json": SIGLIP}
    source |= c.source or {}
    tensors = {source["names"].get(name, "vision_model." + name): t for name, t in state.items()}
    tensors |= {name: t[(None,) * (3 - t.ndim)] for name, t in tensors.items()      # batch of one
                if re.search("cls_token|register_tokens|position_embeddings", name)}
    square = {"height": c.image_size, "width": c.image_size}
    pixels = {"size": {"shortest_edge": c.shortest_edge} if c.shortest_edge else square,
              "do_center_crop": c.shortest_edge > 0, "crop_size": square, "do_resize": True,
              "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
              **{k: getattr(c, k) for k in ("image_mean", "image_std", "resample")}}
    return tensors | source["rest"], {
        "config.json": source["config.json"] | {"image_size": c.image_size},
        "preprocessor_config.json": source["preprocessor_config.json"] | pixels}


def llm_json(c):
    """config.json of an LLM: the one it came with; a fresh one is a Qwen2 or a Llama."""
    kind = ("qwen2", "Qwen2ForCausalLM") if c.attention_bias else ("llama", "LlamaForCausalLM")
    return c.source or {"model_type": kind[0], "architectures": [kind[1]], "hidden_act": "silu",
                        **{k: v for k, v in vars(c).items() if k not in LLAMA3}}


def save_model(folder, state, model, tokenizer, dtype=torch.float32):
    """Write encoder/, projector/, llm/, those that the model has. state: its full state dict."""
    for part, module in model.named_children():
        tensors = {k: state[f"{part}.{k}"] for k in module.state_dict()}
        files, copies = {"config.json": {"hidden_act": "gelu"}}, []         # a projector's
        if part == "encoder":
            tensors, files = encoder_folder(module.config, tensors)
        if part == "llm":
            files, copies = {"config.json": llm_json(module.config)}, tokenizer.files
        if part in ("encoder", "projector", "llm"):
            save_folder(Path(folder) / part, tensors, files, copies, dtype)


def export_llava(folder, mllm, tokenizer_files, image_token_id, image_token="<image>",
                 dtype=torch.float32):
    """Write the whole model as one folder that transformers' LlavaForConditionalGeneration opens.
    image_token: what stands for a patch in its prompts; its id must be in the LLM's embedding, and
    text must never use it."""
    c, text, extra = mllm.encoder.config, mllm.llm.config, mllm.encoder.extra
    tower, files = encoder_folder(c, mllm.encoder.state_dict())
    if files["config.json"]["model_type"] not in TOWERS or not mllm.encoder.select_layer:
        raise BadInput("llava: wants the features of a layer of SigLIP or CLIP, before the norm")
    if not 0 <= image_token_id < text.vocab_size:
        raise BadInput(f"llava: image token {image_token_id} is not in the LLM's embedding of "
                       f"{text.vocab_size}; choose an id that text never uses")
    tensors = {"vision_tower." + k: v for k, v in tower.items()}
    tensors |= {"language_model." + k: v for k, v in mllm.llm.state_dict().items()}
    tensors |= {f"multi_modal_projector.linear_{1 + int(k[0]) // 2}{k[1:]}": v
                for k, v in mllm.projector.state_dict().items()}
    features = {"vision_feature_select_strategy": "default" if extra else "full"}
    files["processor_config.json"] = {
        "processor_class": "LlavaProcessor", "image_token": image_token,
        "patch_size": c.patch_size, "num_additional_image_tokens": extra, **features}
    files["config.json"] = {
        "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"],
        "vision_config": files["config.json"], "text_config": llm_json(text),
        "vision_feature_layer": mllm.encoder.select_layer, "image_seq_length": c.tokens,
        "image_token_index": image_token_id, "projector_hidden_act": "gelu",
        "tie_word_embeddings": text.tie_word_embeddings, **features}
    save_folder(folder, tensors, files, tokenizer_files, dtype)
