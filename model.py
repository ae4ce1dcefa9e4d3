"""What learns: a ViT encoder, an MLP projector, a decoder LLM, and the multimodal LLM (MLLM) that
they make; and the folders that they are kept in.

Modules and parameters carry the names of Hugging Face's checkpoints (SigLIP's vision model; Qwen2's
and Llama's decoder), so that loading is load_state_dict and what we save opens there.
"""
import hashlib
import json
import math
import os
import re
import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from data import IMAGE, BadInput

LOGIT_CHUNK = 256           # target positions whose logits exist at the same time
MAX_SHARD = 5 * 10 ** 9     # bytes of one weight file


@dataclass
class Source:
    """What else was in the folder that a part was loaded from: saving writes it back."""
    files: dict                                     # the JSON files
    names: dict = field(default_factory=dict)       # our tensor name -> (its name there, ndim)
    rest: dict = field(default_factory=dict)        # the tensors that we do not use


@dataclass
class EncoderConfig:
    """A vision transformer in the words of its config.json, and its preprocessing."""
    hidden_size: int = 128
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    image_size: int = 48
    patch_size: int = 8
    model_type: str = "siglip_vision_model"         # one of FAMILIES
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    mlp_ratio: float = 0.       # DINOv2's way to say intermediate_size
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False
    num_register_tokens: int = 0
    dropped_layers: int = 0     # last layers that LLaVA has cut off and select_layer still counts
    image_mean: tuple = (.5, .5, .5)
    image_std: tuple = (.5, .5, .5)
    resample: int = 3           # Pillow's code: 2 bilinear, 3 bicubic
    shortest_edge: int = 0      # resize the shorter side to this, then crop the centre; 0: squash
    source: Source = field(default=None, compare=False, repr=False)

    def __post_init__(self):
        if self.mlp_ratio:
            self.intermediate_size = int(self.hidden_size * self.mlp_ratio)

    @property
    def tokens(self):
        return (self.image_size // self.patch_size) ** 2


@dataclass
class LLMConfig:
    """Qwen2's / Llama's config."""
    vocab_size: int = 512
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 3
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = None                # hidden_size / num_attention_heads unless it says otherwise
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_type: str = "default"          # one of ROPES, with the numbers that it needs
    factor: float = 1.
    low_freq_factor: float = 1.
    high_freq_factor: float = 4.
    original_max_position_embeddings: int = 8192
    attention_bias: bool = True         # on q, k, v: Qwen2 has it, Llama does not
    output_bias: bool = False           # on o: what Llama's attention_bias adds to that
    tie_word_embeddings: bool = True
    source: Source = field(default=None, compare=False, repr=False)

    def __post_init__(self):
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads


# ------------------------------------------------------------------- what sets the families apart

VIT = (("cls_token", "class_embedding"), ("patch_embeddings.projection", "patch_embedding"),
       ("position_embeddings", "position_embedding.weight"), ("encoder.layer.", "encoder.layers."),
       ("attention.attention.query", "self_attn.q_proj"),
       ("attention.attention.key", "self_attn.k_proj"),
       ("attention.attention.value", "self_attn.v_proj"),
       ("attention.output.dense", "self_attn.out_proj"), ("intermediate.dense", "mlp.fc1"),
       (".output.dense", ".mlp.fc2"), ("layernorm_before", "layer_norm1"),
       ("layernorm_after", "layer_norm2"), ("layernorm.", "post_layernorm."))
DINO = (*VIT, (".norm1.", ".layer_norm1."), (".norm2.", ".layer_norm2."))
IMAGENET = {"image_mean": (.485, .456, .406), "image_std": (.229, .224, .225)}
CLIP = {"image_mean": (.48145466, .4578275, .40821073),
        "image_std": (.26862954, .26130258, .27577711)}


@dataclass(frozen=True)
class Family:
    """A family of vision transformers: what its config.json does not say."""
    processor: str
    model: str = ""                     # where the vision part is saved alone: its class
    rename: tuple = ()                  # (part of a tensor's name, what we call it)
    class_token: bool = True
    pre_norm: bool = False              # a norm before the first layer
    patch_bias: bool = True
    layer_scale: bool = False
    crop: bool = False                  # pictures are cropped to a square, not squashed
    antialias: bool = False             # of interpolated positions
    defaults: dict = field(default_factory=dict)


FAMILIES = {
    "siglip_vision_model": Family("SiglipImageProcessor", "SiglipVisionModel", class_token=False),
    "clip_vision_model": Family(
        "CLIPImageProcessor", "CLIPVisionModel", pre_norm=True, patch_bias=False, crop=True,
        defaults={"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, **CLIP}),
    "dinov2": Family(
        "BitImageProcessor", rename=DINO, layer_scale=True, crop=True,
        defaults={"hidden_act": "gelu", "mlp_ratio": 4, **IMAGENET}),
    "dinov2_with_registers": Family(
        "BitImageProcessor", rename=DINO, layer_scale=True, crop=True, antialias=True,
        defaults={"hidden_act": "gelu", "mlp_ratio": 4, "num_register_tokens": 4, **IMAGENET}),
    "vit_mae": Family("ViTImageProcessor", rename=VIT, defaults={
        "hidden_act": "gelu", "layer_norm_eps": 1e-12, "resample": 2, **IMAGENET}),
    "vit": Family("ViTImageProcessor", rename=VIT, defaults={
        "hidden_act": "gelu", "layer_norm_eps": 1e-12, "resample": 2})}
SIZES = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
         "num_attention_heads": 12, "image_size": 224, "patch_size": 16}
WHOLE = {"siglip": {"model_type": "siglip_vision_model", **SIZES},      # sizes if it names none
         "clip": {"model_type": "clip_vision_model", **SIZES, "patch_size": 32}}
ACTIVATIONS = {"gelu": F.gelu, "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
               "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}

# model_type in config.json: that of the LLM alone, its class, what config.json means where it says
# nothing, and what it means whatever it says
QWEN2 = "qwen2", "Qwen2ForCausalLM", {}, {"attention_bias": True, "output_bias": False,
                                          "sliding_window": None}
LLAMA = "llama", "LlamaForCausalLM", {}, {"sliding_window": None}
MISTRAL = "mistral", "MistralForCausalLM", {"sliding_window": 4096}, {
    "attention_bias": False, "output_bias": False}
LLMS = {"qwen2": QWEN2, "llava_qwen": QWEN2, "llama": LLAMA, "llava_llama": LLAMA,
        "mistral": MISTRAL, "llava_mistral": MISTRAL}
ROPES = {"default": (), "linear": ("factor",), "llama3": (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}

# what we compute: any other value of these would be computed wrongly
VISION = {"model_type": FAMILIES, "hidden_act": ACTIVATIONS, "num_channels": (3,),
          "quantization_config": ()}
TEXT = {"rope_type": ROPES, "hidden_act": ("silu",), "mlp_bias": (False,),
        "partial_rotary_factor": (1,), "use_sliding_window": (False,), "sliding_window": (),
        "quantization_config": ()}


# -------------------------------------------------------------------------------------- attention

def visible(sample_q, segment_q, column_q, sample_k, segment_k, column_k):
    """The one attention rule: a token sees an earlier token of its own sample if that one is in the
    prompt or in the same response. Elementwise on whatever broadcasts."""
    return ((sample_q == sample_k) & (column_q >= column_k) &
            ((segment_k == 0) | (segment_q == segment_k)))


def attend(q, k, v, mask=None):
    """Softmax attention. q: (B, heads, T, d), k, v: (B, heads, S, d), mask: bool (B, 1, T, S)
    -> (B, heads, T, d).

    On a CPU it is written out: the fused kernel's backward takes twice as long at our sizes."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, mask)
    scores = q @ k.mT * q.shape[-1] ** -.5
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ v


def heads(x, n):
    """(B, T, n * d) -> (B, n, T, d)"""
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


# ---------------------------------------------------------------------------------------- encoder

class EncoderAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n = c.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(c.hidden_size, c.hidden_size, c.qkv_bias) for _ in range(3))
        self.out_proj = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x):
        q, k, v = (heads(f(x), self.n) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(q, k, v).transpose(1, 2).flatten(2))


class EncoderMLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc1 = nn.Linear(c.hidden_size, c.intermediate_size)
        self.fc2 = nn.Linear(c.intermediate_size, c.hidden_size)
        self.act = ACTIVATIONS[c.hidden_act]

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class EncoderSwiGLU(nn.Module):
    """DINOv2's giant has it: two thirds as wide, rounded up to a multiple of 8."""

    def __init__(self, c):
        super().__init__()
        width = (int(c.intermediate_size * 2 / 3) + 7) // 8 * 8
        self.weights_in = nn.Linear(c.hidden_size, 2 * width)
        self.weights_out = nn.Linear(width, c.hidden_size)

    def forward(self, x):
        gate, up = self.weights_in(x).chunk(2, -1)
        return self.weights_out(F.silu(gate) * up)


class LayerScale(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(c.hidden_size))

    def forward(self, x):
        return x * self.lambda1


class EncoderLayer(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, c):
        super().__init__()
        scale = LayerScale if FAMILIES[c.model_type].layer_scale else nn.Identity
        self.layer_norm1 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.self_attn, self.layer_scale1 = EncoderAttention(c), scale(c)
        self.layer_norm2 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.mlp = EncoderSwiGLU(c) if c.use_swiglu_ffn else EncoderMLP(c)
        self.layer_scale2 = scale(c)

    def forward(self, x):
        x = x + self.layer_scale1(self.self_attn(self.layer_norm1(x)))
        return x + self.layer_scale2(self.mlp(self.layer_norm2(x)))


class Embeddings(nn.Module):
    """(I, 3, H, W) -> (I, extra + tokens, width): class token and patches with learned positions,
    and between them registers, which have none."""

    def __init__(self, c):
        super().__init__()
        family, width = FAMILIES[c.model_type], c.hidden_size
        self.patch_embedding = nn.Conv2d(3, width, c.patch_size, c.patch_size,
                                         bias=family.patch_bias)
        self.position_embedding = nn.Embedding(family.class_token + c.tokens, width)
        self.extra = family.class_token + c.num_register_tokens
        if family.class_token:
            self.class_embedding = nn.Parameter(torch.zeros(width))
        if c.num_register_tokens:
            self.register_tokens = nn.Parameter(torch.zeros(c.num_register_tokens, width))

    def forward(self, pixels):
        x, n = self.patch_embedding(pixels).flatten(2).mT, len(pixels)
        if self.extra:
            x = torch.cat((self.class_embedding.expand(n, 1, -1), x), 1)
        x = x + self.position_embedding.weight
        if self.extra > 1:
            x = torch.cat((x[:, :1], self.register_tokens.expand(n, -1, -1), x[:, 1:]), 1)
        return x


class Encoder(nn.Module):
    """A vision transformer. (I, 3, H, W) pixels -> (I, tokens, width) features, one a patch.

    select_layer counts as LLaVA does: -2, the paper's choice, is the output of the second-to-last
    layer; the last layer and the final norm then neither run nor train, but are kept and saved. 0
    runs everything."""

    def __init__(self, config, select_layer=-2):
        super().__init__()
        self.config = c = config
        self.select_layer = select_layer
        norm = nn.LayerNorm if FAMILIES[c.model_type].pre_norm else nn.Identity
        self.embeddings = Embeddings(c)
        self.pre_layrnorm = norm(c.hidden_size, c.layer_norm_eps)      # CLIP's spelling
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(EncoderLayer(c) for _ in range(c.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)

    def used(self):
        """The layers that run."""
        return self.encoder.layers[:len(self.encoder.layers) + 1 + (self.select_layer or -1)]

    def unused(self):
        """The modules that do not: nothing in them ever gets a gradient."""
        return [*self.encoder.layers[len(self.used()):],
                *([self.post_layernorm] if self.select_layer else [])]

    def forward(self, pixels):
        x = self.pre_layrnorm(self.embeddings(pixels))
        for layer in self.used():
            x = layer(x)
        x = x if self.select_layer else self.post_layernorm(x)
        return x[:, self.embeddings.extra:]


class Projector(nn.Sequential):
    """Linear, GELU, Linear: encoder width -> LLM width. Parameters 0.*, 2.*, as in LLaVA's
    mm_projector."""

    def __init__(self, width_in, width_out):
        super().__init__(nn.Linear(width_in, width_out), nn.GELU(),
                         nn.Linear(width_out, width_out))


# -------------------------------------------------------------------------------------------- LLM

class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).type_as(x)


def frequencies(c, device):
    """Radians per position of each pair of channels: (head_dim / 2,) fp32. To reach beyond the
    length of pretraining all are slowed down (linear), or those that hardly turn in it (llama3)."""
    f = 1 / c.rope_theta ** (torch.arange(0, c.head_dim, 2, device=device).float() / c.head_dim)
    if c.rope_type == "linear":
        f = f / c.factor
    if c.rope_type == "llama3":
        turns = c.original_max_position_embeddings / (2 * math.pi / f)
        keep = (turns - c.low_freq_factor) / (c.high_freq_factor - c.low_freq_factor)
        keep = keep.clamp(0, 1)
        f = (1 - keep) * f / c.factor + keep * f
    return f


def rotate(x, cos, sin):
    """Rotary positions, halves convention. x: (B, heads, T, d), cos, sin: (B, 1, T, d)."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Attention(nn.Module):
    """Grouped-query attention: several query heads share a key and value head."""

    def __init__(self, c):
        super().__init__()
        self.n, self.kv = c.num_attention_heads, c.num_key_value_heads
        self.q_proj = nn.Linear(c.hidden_size, self.n * c.head_dim, c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, self.kv * c.head_dim, c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, self.kv * c.head_dim, c.attention_bias)
        self.o_proj = nn.Linear(self.n * c.head_dim, c.hidden_size, c.output_bias)

    def forward(self, x, mask, cos, sin, past=None):
        """past: a list that holds this layer's (k, v) so far and is replaced; None outside
        generation."""
        q = heads(self.q_proj(x), self.n)
        k, v = (heads(f(x), self.kv) for f in (self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin).type_as(v), rotate(k, cos, sin).type_as(v)
        if past is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(past or (k[:, :, :0], v[:, :, :0]), (k, v)))
            past[:] = k, v
        if self.kv < self.n:
            k, v = (t.repeat_interleave(self.n // self.kv, 1) for t in (k, v))
        return self.o_proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, mask, cos, sin, past=None):
        x = x + self.self_attn(self.input_layernorm(x), mask, cos, sin, past)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Qwen2 / Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.model.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.num_hidden_layers))
        self.model.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def head(self):
        """(vocab, width): the output matrix, the embedding's where they are tied."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    def forward(self, x, mask, position, past=None):
        """x: (B, T, width) embeddings, mask: bool (B, 1, T, S), position: (B, T)
        -> (B, T, width), normed. past: a list with one list per layer, see Attention."""
        angle = position[..., None].float() * frequencies(self.config, x.device)
        cos, sin = (f(torch.cat((angle, angle), -1))[:, None] for f in (torch.cos, torch.sin))
        for i, layer in enumerate(self.model.layers):
            x = layer(x, mask, cos, sin, past and past[i])
        return self.model.norm(x)


# ------------------------------------------------------------------------------------------- MLLM

def token_logps(hidden, head, target):
    """log softmax(hidden @ head.T)[target], fp32. hidden: (n, width), head: (vocab, width),
    target: (n,) -> (n,)"""
    logits = (hidden @ head.type_as(hidden).mT).float()
    return -F.cross_entropy(logits, target, reduction="none")


class MLLM(nn.Module):
    """Vision encoder + projector + LLM; without the first two, a language model. model(batch) is
    all that training needs."""

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
        column = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
        keys = batch.sample[:, None], batch.segment[:, None], column
        mask = visible(batch.sample[..., None], batch.segment[..., None], column[:, None], *keys)
        hidden = self.llm(self.embed(batch), mask[:, None], batch.position)
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
        column = torch.arange(length + max_new, device=batch.tokens.device)
        # new tokens are the row's own
        sample = torch.cat((batch.sample, row[:, None].expand(-1, max_new)), 1)
        prompt = (batch.sample >= 0).sum(1)
        mask = visible(*(t[:, None, :, None] for t in (sample, 0 * sample)), column[:, None],
                       *(t[:, None, None] for t in (sample, 0 * sample)), column)
        past, now = [[] for _ in self.llm.model.layers], mask[:, :, :length, :length]
        hidden = self.llm(self.embed(batch), now, batch.position, past)[row, prompt - 1]
        out, open_ = [], torch.ones_like(row, dtype=torch.bool)
        for step in range(max_new):
            logits = (hidden @ self.llm.head().type_as(hidden).mT).float()
            token = logits.argmax(-1) if temperature == 0 else torch.multinomial(
                (logits / temperature).softmax(-1), 1, generator=generator).squeeze(1)
            open_ = open_ & (token != end)
            out.append(torch.where(open_, token, end))
            if not open_.any() or step == max_new - 1:
                break
            x, at = self.llm.model.embed_tokens(token)[:, None], length + step
            now = mask[:, :, at:at + 1, :at + 1]
            hidden = self.llm(x, now, (prompt + step)[:, None], past)[:, 0]
        return [[t for t in tokens if t != end] for tokens in torch.stack(out, 1).tolist()]


class SigLIP(nn.Module):
    """Contrastive pretraining (Zhai et al. 2023): every picture against every caption, a sigmoid
    each. Gives the world its "original" encoder; the text tower and both heads are thrown away
    afterwards."""

    def __init__(self, encoder, text):
        super().__init__()
        self.encoder, self.text = encoder, text
        self.image_head = nn.Linear(2 * encoder.config.hidden_size, text.config.hidden_size)
        self.scale = nn.Parameter(torch.tensor(math.log(10.)))
        self.bias = nn.Parameter(torch.tensor(-10.))

    def forward(self, batch):
        """(samples, samples) logits: row = picture, column = caption."""
        features = self.encoder(batch.pixels)
        image = self.image_head(torch.cat((features.mean(1), features.amax(1)), -1))
        words = (batch.sample >= 0) & (batch.tokens != IMAGE)
        column = torch.arange(batch.tokens.shape[1], device=words.device)
        mask = (words[:, None] & (column[:, None] >= column))[:, None]
        x = self.text.model.embed_tokens(batch.tokens.clamp(min=0))
        hidden = self.text(x, mask, batch.position)
        text = (hidden * words[..., None]).sum(1) / words.sum(1, keepdim=True)
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        return image @ text.T * self.scale.exp() + self.bias


def initialise(module, seed):
    """Fresh weights from a generator: normal, as wide as the layer wants; residual outputs and
    biases small."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(module.named_parameters()):
        if p.ndim >= 2:
            std = .02 if "embed" in name and "patch" not in name else p[0].numel() ** -.5
            nn.init.normal_(p, std=std, generator=generator)
        elif p.ndim == 1 and name.endswith("bias"):
            nn.init.zeros_(p)
    return module


# -------------------------------------------------------------------------------- reading folders

TOWER = "model.vision_tower.vision_tower."      # LLaVA's own layout: a whole model in one folder


def read_json(file):
    """A file that holds a JSON object -> dict."""
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{file}: cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise BadInput(f"{file}: is not a JSON object")
    return value


def weight_files(folder):
    """The safetensors files of a folder: one, or the shards that an index names."""
    one, index = Path(folder) / "model.safetensors", Path(folder) / "model.safetensors.index.json"
    if one.exists() or not index.exists():
        return [one]
    shards = read_json(index).get("weight_map")
    shards = set(map(str, shards.values())) if isinstance(shards, dict) else ()
    if not shards or any(Path(s).name != s for s in shards):
        raise BadInput(f'{index}: "weight_map" does not say which file beside it has a tensor')
    return [one.with_name(s) for s in sorted(shards)]


def open_tensors(folder):
    """{tensor name: (file, its name, open file)}; only the headers are read yet."""
    tensors = {}
    for file in weight_files(folder):
        try:
            f = safe_open(file, "pt")
            tensors |= {name: (file, name, f) for name in f.keys()}
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{file}: cannot be read ({' '.join(str(error).split())})") from None
    return tensors


def filled(make, folder, tensors, names, prefix=None, layers=0):
    """The module that make() makes, with a folder's weights, in fp32; all must be there and fit.
    tensors: as open_tensors finds them; names: {our name: name there}; prefix: of its layers."""
    if layers > len(names):                     # or making them could take all memory
        raise BadInput(f"{folder}: the weights of most of its {layers} layers are missing")
    with torch.device("meta"):
        module = make()
    own, state = module.state_dict(), {}
    missing = [name for name in own if name not in names]
    if missing:
        raise BadInput(f"{folder}: {missing[0]} is missing ({len(missing)} tensors in all)")
    for name in names:                          # a bias, a norm, a layer: not to be left out
        if prefix and name.startswith(prefix) and name not in own and "rotary_emb" not in name:
            raise BadInput(f"{folder}: has {names[name]}, unlike what its config.json describes")
    for name, like in own.items():
        file, key, f = tensors[names[name]]
        header = f.get_slice(key)
        shape, dtype = tuple(header.get_shape()), header.get_dtype()
        expected = (1,) * (len(shape) - like.ndim) + tuple(like.shape)
        if shape != expected or dtype not in ("F64", "F32", "F16", "BF16"):
            raise BadInput(f"{file}: {key} is {shape}, {dtype}; expected {expected}, float")
        state[name] = f.get_tensor(key).to(torch.float32, copy=True).view(like.shape)
    module.load_state_dict(state, assign=True)
    return module


def refuse(file, values, known):
    """Settings that we would compute wrongly. known: {field: its values that we can compute}."""
    for name, options in known.items():
        if values.get(name) is not None and values[name] not in list(options):
            raise BadInput(f'{file}: "{name}" is {json.dumps(values[name])}; this needs '
                           f'{" or ".join(map(json.dumps, options)) or "none"}')


def checked(kind, needs, *layers):
    """A config dataclass of what JSON files say, each value of the type and sign that it must be.
    layers: (file, its values), the later file's count."""
    given = {k: (v, file) for file, values in layers for k, v in values.items() if v is not None}

    def fits(v, kind, zero):
        if kind is tuple:
            return isinstance(v, (list, tuple)) and len(v) == 3 and all(
                fits(x, float, zero) for x in v)
        if kind in (int, float):
            return type(v) in (int, kind) and (0 < v < math.inf or zero and v == 0)
        return isinstance(v, kind)

    for name in needs:
        if name not in given:
            raise BadInput(f'{layers[0][0]}: "{name}" is missing')
    values = {}
    for f in fields(kind):
        if f.name in given and f.repr:
            v, file = given[f.name]
            if not fits(v, f.type, f.default in (0, None) or f.name == "image_mean"):
                raise BadInput(f'{file}: "{f.name}" is {json.dumps(v)}, which cannot be')
            values[f.name] = tuple(v) if f.type is tuple else v
    config = kind(**values)
    pairs = [("num_attention_heads", "num_key_value_heads")]
    for many, few in pairs if values.get("head_dim") else [("hidden_size", pairs[0][0]), *pairs]:
        a, b = getattr(config, many), getattr(config, few, 1)
        if a % b:
            raise BadInput(f'{layers[0][0]}: "{few}" {b} does not divide "{many}" {a}')
    return config


def read_encoder_config(file):
    """config.json, with the preprocessor_config.json beside it -> (EncoderConfig at the size of the
    checkpoint's positions, pixels a side that pictures are resized to)."""
    raw, pixel_file = read_json(file), file.with_name("preprocessor_config.json")
    pixels = read_json(pixel_file) if pixel_file.exists() else {}
    whole = WHOLE.get(str(raw.get("model_type")))
    if whole:
        if not isinstance(raw.get("vision_config"), dict):
            raise BadInput(f'{file}: "vision_config" is missing')
        raw = whole | raw["vision_config"]
    refuse(file, raw | {"model_type": str(raw.get("model_type"))}, VISION)
    family = FAMILIES[raw["model_type"]]
    needs = [k for k in SIZES if k != "intermediate_size" or "mlp_ratio" not in family.defaults]
    shown = {k: pixels.get(k) for k in ("image_mean", "image_std", "resample")}
    c = checked(EncoderConfig, needs, (file, family.defaults | raw), (pixel_file, shown))

    side = {}                   # a number, {"shortest_edge"}, or {"height", "width"} that are equal
    for name in ("size", "crop_size"):
        value = pixels.get(name) or c.image_size
        sides = list(value.values()) if isinstance(value, dict) else [value]
        if any(type(v) is not int or not 0 < v == sides[0] for v in sides):
            raise BadInput(f'{pixel_file}: "{name}" is {json.dumps(value)}, not that of a square')
        side[name] = sides[0]
    crop = pixels.get("do_center_crop")
    crop = family.crop if crop is None else crop
    c.shortest_edge = side["size"] if crop else 0
    raw |= {"architectures": [family.model]} if family.model else {}
    c.source = Source({"config.json": raw, "preprocessor_config.json": pixels})
    return c, side["crop_size" if crop else "size"]


def load_encoder(folder, select_layer=-2, image_size=None, config=None):
    """A vision encoder from a Hugging Face folder; of a whole CLIP, SigLIP, LLaVA the vision part.

    image_size: pixels a side, if not as in preprocessor_config.json. Where the checkpoint knows
    another size, positions are interpolated. config: the folder with the two config files, which
    LLaVA's layout needs. LLaVA cuts the last layer off, but select_layer goes on counting it: -2
    are always the same features."""
    file = Path(config or folder) / "config.json"
    c, size = read_encoder_config(file)
    family, files, wanted = FAMILIES[c.model_type], c.source.files, image_size or size
    if min(wanted, c.image_size) < c.patch_size:
        raise BadInput(f'{file}: "patch_size" {c.patch_size} is more than the image size')

    # ---- which tensors are vision, and what we call them
    tensors = open_tensors(folder)
    there = {k.removeprefix(TOWER): v for k, v in tensors.items() if k.startswith(TOWER)}
    tower, there = bool(there), there or tensors
    if family.model:                            # beside the vision part there may be a text part
        there = ({k: v for k, v in there.items() if k.startswith("vision_model.")} or
                 {"vision_model." + k: v for k, v in there.items()})
    names = {}
    for name in there:
        ours = re.sub(r"^(vision_model|vit|dinov2|dinov2_with_registers)\.", "", name)
        for old, new in family.rename:
            ours = ours.replace(old, new)
        names[ours] = name

    # ---- LLaVA's lost layer
    last = f"encoder.layers.{c.num_hidden_layers - 1}."
    if tower and not any(k.startswith(last) for k in names):
        c.num_hidden_layers, c.dropped_layers = c.num_hidden_layers - 1, c.dropped_layers + 1
        files["config.json"] |= {
            "num_hidden_layers": c.num_hidden_layers, "dropped_layers": c.dropped_layers,
            "vision_use_head": any(k.startswith("head.") for k in names)}
    layers = c.num_hidden_layers + c.dropped_layers
    select = select_layer + c.dropped_layers if select_layer else 0
    if not -layers - 1 <= select_layer <= 0 or c.dropped_layers and select >= 0:
        raise BadInput(f"{folder}: select_layer {select_layer} is not one of its {layers} layers"
                       f"{', the last of which LLaVA has cut off' * bool(c.dropped_layers)}")
    encoder = filled(lambda: Encoder(c, select), folder, there, names, "encoder.layers.",
                     c.num_hidden_layers)
    own = encoder.state_dict()
    for ours, name in names.items():            # remembered for saving
        _, key, f = there[name]
        if ours in own:
            c.source.names[ours] = name, len(f.get_slice(key).get_shape())
        else:
            c.source.rest[name] = f.get_tensor(key).clone()

    # ---- another size
    if wanted != c.image_size:
        c.image_size = files["config.json"]["image_size"] = wanted
        side, table = wanted // c.patch_size, encoder.embeddings.position_embedding.weight.data
        table = interpolated(table, family.class_token, side, family.antialias)
        encoder.embeddings.position_embedding = nn.Embedding.from_pretrained(table, freeze=False)
        c.source.rest = {k: interpolated(v[0], 1, side)[None] if k.endswith("decoder_pos_embed")
                         else v for k, v in c.source.rest.items() if "position_ids" not in k}
    if wanted != size or not files["preprocessor_config.json"]:
        c.shortest_edge = c.shortest_edge * wanted // size
        files["preprocessor_config.json"] |= pixel_json(c)
    return encoder


def interpolated(table, extra, side, antialias=False):
    """Positions of `extra` tokens and n * n patches, (extra + n * n, width), for side * side."""
    n = math.isqrt(len(table) - extra)
    grid = table[extra:].float().T.reshape(1, -1, n, n)
    grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=antialias)
    return torch.cat((table[:extra], grid[0].flatten(1).T))


def load_llm(folder):
    """A Qwen2 or Llama model from a Hugging Face folder, or the LLM of LLaVA's own layout."""
    folder, file = Path(folder), Path(folder) / "config.json"
    raw = read_json(file)
    refuse(file, raw | {"model_type": str(raw.get("model_type"))}, {"model_type": LLMS})
    model_type, model, usual, fixed = LLMS[raw["model_type"]]
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise BadInput(f'{file}: "rope_scaling" or "rope_parameters" is {json.dumps(rope)}')
    rope = {"rope_type": rope.get("type", "default"), "original_max_position_embeddings":
            raw.get("max_position_embeddings"), **rope}
    values = {"num_key_value_heads": raw.get("num_attention_heads"), "attention_bias": False,
              "output_bias": raw.get("attention_bias"), "tie_word_embeddings": False,
              **usual, **raw, **rope, **fixed}
    refuse(file, values, TEXT)
    c = checked(LLMConfig, ["vocab_size", *list(SIZES)[:4], *ROPES[rope["rope_type"]]],
                (file, values))
    raw = {k: v for k, v in raw.items() if not k.startswith("mm_")}
    c.source = Source({"config.json": raw | {"model_type": model_type, "architectures": [model]}})
    if (folder / "generation_config.json").exists():
        c.source.files["generation_config.json"] = read_json(folder / "generation_config.json")
    tensors = open_tensors(folder)
    return filled(lambda: Decoder(c), folder, tensors, {k: k for k in tensors}, "model.layers.",
                  c.num_hidden_layers)


def load_model(encoder, projector, llm, select_layer=-2, seed=0, image_size=None,
               encoder_config=None):
    """Three folders -> MLLM; in LLaVA's own layout they are one. projector None: a fresh one.
    image_size, encoder_config: see load_encoder."""
    encoder = load_encoder(encoder, select_layer, image_size, encoder_config)
    llm, width = load_llm(llm), encoder.config.hidden_size
    if projector:
        tensors = open_tensors(projector)
        names = {k.removeprefix("model.mm_projector."): k for k in tensors}
        made = filled(lambda: Projector(width, llm.config.hidden_size), projector, tensors, names)
    else:
        made = initialise(Projector(width, llm.config.hidden_size), seed)
    return MLLM(encoder, made, llm)


# -------------------------------------------------------------------------------- writing folders

def hash_file(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def hash_weights(folder):
    """One digest of a folder's weights, in however many files."""
    return "-".join(map(hash_file, weight_files(folder)))


def write_json(file, value):
    """Write beside the file and rename: it is whole or absent."""
    temporary = Path(file).with_name(Path(file).name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, file)


def save_folder(folder, tensors, files, copies=(), dtype=torch.float32):
    """One checkpoint folder: tensors as dtype in files of at most MAX_SHARD bytes, JSON files, and
    copies of others. Whole or absent."""
    folder, shards, room = Path(folder), [], 0
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, tensor in tensors.items():
        size = tensor.numel() * dtype.itemsize
        if size > room:
            shards.append({})
            room = MAX_SHARD
        shards[-1][name], room = tensor, room - size
    index = {}
    for i, shard in enumerate(shards, 1):
        one = f"model-{i:05}-of-{len(shards):05}" if len(shards) > 1 else "model"
        index |= dict.fromkeys(shard, one + ".safetensors")
        shard = {k: (v.to(dtype) if v.is_floating_point() else v).detach().cpu().contiguous()
                 for k, v in shard.items()}
        save_file(shard, temporary / (one + ".safetensors"), {"format": "pt"})
    if len(shards) > 1:
        size = sum(v.numel() for v in tensors.values()) * dtype.itemsize
        files = files | {"model.safetensors.index.json": {"metadata": {"total_size": size},
                                                          "weight_map": index}}
    for name, value in files.items():
        write_json(temporary / name, stamped(value, dtype) if name == "config.json" else value)
    for file in copies:
        shutil.copy(file, temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def stamped(config, dtype):
    """A config.json that says in which type its weights are stored."""
    config = {k: stamped(v, dtype) if k in ("vision_config", "text_config") else v
              for k, v in config.items() if k != "torch_dtype"}
    return config | {"dtype": str(dtype).removeprefix("torch.")}


def pixel_json(c):
    """preprocessor_config.json of an encoder."""
    square = {"height": c.image_size, "width": c.image_size}
    return {"image_processor_type": FAMILIES[c.model_type].processor, "do_resize": True,
            "size": {"shortest_edge": c.shortest_edge} if c.shortest_edge else square,
            "do_center_crop": c.shortest_edge > 0, "crop_size": square, "do_convert_rgb": True,
            "resample": c.resample, "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": c.image_mean, "image_std": c.image_std}


def encoder_folder(c, state):
    """(tensors, JSON files) of an encoder with this state dict: named and shaped as in the folder
    that it came from, with what else was there; a fresh one is a SigLIP."""
    source = c.source or Source({"config.json": {
        "model_type": c.model_type, "architectures": [FAMILIES[c.model_type].model],
        "hidden_act": c.hidden_act, "layer_norm_eps": c.layer_norm_eps, "vision_use_head": False,
        **{k: getattr(c, k) for k in SIZES}}, "preprocessor_config.json": pixel_json(c)},
        {k: ("vision_model." + k, v.ndim) for k, v in state.items()})
    named = {name: state[k][(None,) * (ndim - state[k].ndim)]
             for k, (name, ndim) in source.names.items()}
    return named | source.rest, source.files


def llm_files(c):
    """The JSON files of an LLM."""
    if c.source:
        return c.source.files
    model_type, model, *_ = QWEN2 if c.attention_bias else LLAMA
    values = {k: v for k, v in vars(c).items() if k not in ("source", "output_bias", *TEXT,
                                                            *ROPES["llama3"])}
    return {"config.json": {"model_type": model_type, "architectures": [model],
                            "hidden_act": "silu", **values}}


def save_model(folder, state, encoder, projector, llm, tokenizer, dtype=torch.float32):
    """Write those of encoder/, projector/, llm/ that are asked for. state: the MLLM's full state
    dict; encoder, llm: their configs or False; projector: True or False."""
    folder, parts = Path(folder), {"encoder": {}, "projector": {}, "llm": {}}
    for name, tensor in state.items():
        part, name = name.split(".", 1)
        parts.setdefault(part, {})[name] = tensor
    if encoder:
        save_folder(folder / "encoder", *encoder_folder(encoder, parts["encoder"]), dtype=dtype)
    if projector:
        save_folder(folder / "projector", parts["projector"],
                    {"config.json": {"hidden_act": "gelu"}}, dtype=dtype)
    if llm:
        copies = getattr(tokenizer, "files", None) or [tokenizer.file]
        save_folder(folder / "llm", parts["llm"], llm_files(llm), copies, dtype)


def export_llava(folder, mllm, tokenizer_files, image_token_id, image_token="<image>",
                 dtype=torch.float32):
    """Write the whole model as one folder that transformers' LlavaForConditionalGeneration opens.

    image_token, image_token_id: what stands for a patch in its prompts: a token that the embedding
    has and text never uses. tokenizer_files: copied beside the weights."""
    c, text, select = mllm.encoder.config, mllm.llm.config, mllm.encoder.select_layer
    if not FAMILIES[c.model_type].model or not select:
        raise BadInput("llava: wants the features of a layer of SigLIP or CLIP, before the norm")
    if not 0 <= image_token_id < text.vocab_size:
        raise BadInput(f"llava: image token {image_token_id} is not in the LLM's embedding of "
                       f"{text.vocab_size}; choose an id that text never uses")
    tensors, files = encoder_folder(c, mllm.encoder.state_dict())
    tensors = {"vision_tower." + k: v for k, v in tensors.items()}
    tensors |= {"language_model." + k: v for k, v in mllm.llm.state_dict().items()}
    for name, tensor in mllm.projector.state_dict().items():
        name = name.replace("0.", "linear_1.").replace("2.", "linear_2.")
        tensors["multi_modal_projector." + name] = tensor
    strategy = "default" if mllm.encoder.embeddings.extra else "full"
    config = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"],
              "vision_config": files["config.json"],
              "text_config": llm_files(text)["config.json"], "projector_hidden_act": "gelu",
              "image_token_index": image_token_id, "image_seq_length": c.tokens,
              "vision_feature_layer": select, "vision_feature_select_strategy": strategy,
              "tie_word_embeddings": text.tie_word_embeddings}
    processor = {"processor_class": "LlavaProcessor", "image_token": image_token,
                 "patch_size": c.patch_size, "vision_feature_select_strategy": strategy,
                 "num_additional_image_tokens": mllm.encoder.embeddings.extra}
    save_folder(folder, tensors, {**llm_files(text), **files, "config.json": config,
                                  "processor_config.json": processor}, tokenizer_files, dtype)
