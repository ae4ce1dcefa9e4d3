"""What learns: a ViT encoder, an MLP projector, a decoder LLM, and the multimodal LLM (MLLM) that they make.

Modules and parameters carry the names of Hugging Face's checkpoints (SigLIP's vision model; Qwen2's and Llama's
decoder), so that loading is load_state_dict and what we save opens there.
"""
import hashlib
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from data import IMAGE, BadInput

LOGIT_CHUNK = 256       # target positions whose logits exist at the same time


@dataclass
class EncoderConfig:
    """SigLIP's vision config, and its preprocessing."""
    hidden_size: int = 128
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    image_size: int = 48
    patch_size: int = 8
    layer_norm_eps: float = 1e-6
    image_mean: tuple = (.5, .5, .5)
    image_std: tuple = (.5, .5, .5)

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
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    attention_bias: bool = True         # on q, k, v: Qwen2 has it, Llama does not
    tie_word_embeddings: bool = True


# ---------------------------------------------------------------------------------------- attention

def visible(sample_q, segment_q, column_q, sample_k, segment_k, column_k):
    """The one attention rule: a token sees an earlier token of its own sample if that one is in the prompt or in the
    same response. Elementwise on whatever broadcasts."""
    return (sample_q == sample_k) & (column_q >= column_k) & ((segment_k == 0) | (segment_q == segment_k))


def additive(mask):
    """A bool mask as what is added to the scores: 0, or a number that is finite in bf16 and fp32."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.bfloat16).min)


def attend(q, k, v, mask=None):
    """Softmax attention. q: (B, heads, T, d), k, v: (B, heads, S, d), mask: see `additive`, (B, 1, T, S)
    -> (B, heads, T, d).

    In bf16 on a CPU it is written out: the fused kernel takes 1.7 (936 tokens) to 10 times (36) as long."""
    mask = mask if mask is None else mask.type_as(q)
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, mask)
    scores = (q * q.shape[-1] ** -.5) @ k.mT        # scaled here: q is smaller than the scores
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ v


def heads(x, n):
    """(B, T, n * d) -> (B, n, T, d)"""
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


# ------------------------------------------------------------------------------------------ encoder

class EncoderAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n = c.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(c.hidden_size, c.hidden_size)
                                                                for _ in range(4))

    def forward(self, x):
        q, k, v = (heads(f(x), self.n) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(q, k, v).transpose(1, 2).flatten(2))


class EncoderMLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc1 = nn.Linear(c.hidden_size, c.intermediate_size)
        self.fc2 = nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class EncoderLayer(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, c):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.self_attn = EncoderAttention(c)
        self.layer_norm2 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.mlp = EncoderMLP(c)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    """Patches and their learned positions."""

    def __init__(self, c):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, c.hidden_size, c.patch_size, c.patch_size)
        self.position_embedding = nn.Embedding(c.tokens, c.hidden_size)

    def forward(self, pixels):
        return self.patch_embedding(pixels).flatten(2).mT + self.position_embedding.weight


class Encoder(nn.Module):
    """SigLIP's vision transformer. (I, 3, H, W) pixels -> (I, tokens, width) features.

    select_layer counts as LLaVA does: -2, the paper's choice, is the output of the second-to-last layer; the last
    layer and the final norm then neither run nor train, but are kept and saved. 0 runs everything."""

    def __init__(self, config, select_layer=-2):
        super().__init__()
        self.config, self.select_layer = config, select_layer
        self.embeddings = Embeddings(config)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def used(self):
        """The layers that run."""
        return self.encoder.layers[:len(self.encoder.layers) + 1 + (self.select_layer or -1)]

    def unused(self):
        """The modules that do not: nothing in them ever gets a gradient."""
        return [*self.encoder.layers[len(self.used()):], *([self.post_layernorm] if self.select_layer else [])]

    def forward(self, pixels):
        x = self.embeddings(pixels)
        for layer in self.used():
            x = layer(x)
        return x if self.select_layer else self.post_layernorm(x)


class Projector(nn.Sequential):
    """Linear, GELU, Linear: encoder width -> LLM width. Parameters 0.*, 2.*, as in LLaVA's mm_projector."""

    def __init__(self, width_in, width_out):
        super().__init__(nn.Linear(width_in, width_out), nn.GELU(), nn.Linear(width_out, width_out))


# ---------------------------------------------------------------------------------------------- LLM

class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).type_as(x)


def rotate(x, cos, sin):
    """Rotary positions, halves convention. x: (B, heads, T, d), cos, sin: (B, 1, T, d)."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Attention(nn.Module):
    """Grouped-query attention: several query heads share a key and value head."""

    def __init__(self, c):
        super().__init__()
        self.n, self.kv, d = c.num_attention_heads, c.num_key_value_heads, c.hidden_size // c.num_attention_heads
        self.q_proj = nn.Linear(c.hidden_size, self.n * d, c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, self.kv * d, c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, self.kv * d, c.attention_bias)
        self.o_proj = nn.Linear(self.n * d, c.hidden_size, bias=False)

    def forward(self, x, mask, cos, sin, past=None):
        """past: a list that holds this layer's (k, v) so far and is replaced; None outside generation."""
        q, k, v = heads(self.q_proj(x), self.n), heads(self.k_proj(x), self.kv), heads(self.v_proj(x), self.kv)
        q, k = rotate(q, cos, sin).type_as(v), rotate(k, cos, sin).type_as(v)
        if past is not None:
            k, v = (torch.cat((old, new), 2) for old, new in zip(past or (k[:, :, :0], v[:, :, :0]), (k, v)))
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
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, x, mask, position, past=None):
        """x: (B, T, width) embeddings, mask: bool (B, 1, T, S), position: (B, T) -> (B, T, width), normed.
        past: a list with one list per layer, see Attention."""
        c, mask = self.config, additive(mask)
        half = c.hidden_size // c.num_attention_heads // 2
        angle = position[..., None].float() * c.rope_theta ** (-torch.arange(half, device=x.device) / half)
        cos, sin = (f(torch.cat((angle, angle), -1))[:, None] for f in (torch.cos, torch.sin))
        for i, layer in enumerate(self.model.layers):
            x = layer(x, mask, cos, sin, past and past[i])
        return self.model.norm(x)


# --------------------------------------------------------------------------------------------- MLLM

def token_logps(hidden, head, target):
    """log softmax(hidden @ head.T)[target], fp32. hidden: (n, width), head: (vocab, width), target: (n,) -> (n,)"""
    return -F.cross_entropy((hidden @ head.type_as(hidden).mT).float(), target, reduction="none")


class MLLM(nn.Module):
    """Vision encoder + projector + LLM; without the first two, a language model. model(batch) is all that training
    needs."""

    def __init__(self, encoder, projector, llm):
        super().__init__()
        self.encoder, self.projector, self.llm = encoder, projector, llm

    def embed(self, batch):
        """Token embeddings with image features in the image positions: (rows, length, width).

        The encoder runs even when no row has an image, so that under FSDP every rank calls the same collectives."""
        x = self.llm.model.embed_tokens(batch.tokens.clamp(min=0))
        if self.encoder is None:
            return x
        features = self.projector(self.encoder(batch.pixels)).flatten(0, 1)
        place = (batch.tokens == IMAGE).flatten().nonzero().squeeze(1)
        if len(place) != batch.images * self.encoder.config.tokens:
            raise ValueError(f"{len(place)} image positions for {batch.images} pictures of "
                             f"{self.encoder.config.tokens} tokens")
        return x.flatten(0, 1).index_put((place,), features[:len(place)].type_as(x)).view_as(x)

    def forward(self, batch):
        """Summed log-probability of every response, log pi(y | I, q): (samples, responses), fp32.

        Logits exist only at target positions, LOGIT_CHUNK of them at a time; backward computes each chunk again."""
        column = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
        keys = batch.sample[:, None], batch.segment[:, None], column
        mask = visible(batch.sample[..., None], batch.segment[..., None], column[:, None], *keys)
        hidden = self.llm(self.embed(batch), mask[:, None], batch.position)
        hidden, head, logps = hidden.flatten(0, 1)[batch.source], self.llm.head(), []
        for h, target in zip(hidden.split(LOGIT_CHUNK), batch.target.split(LOGIT_CHUNK)):
            logps.append(checkpoint(token_logps, h, head, target, use_reentrant=False))
        total, place = torch.zeros(len(batch), batch.responses, device=hidden.device), batch.response
        return total.index_put((place // batch.responses, place % batch.responses), torch.cat(logps), accumulate=True)

    @torch.no_grad()
    def generate(self, batch, end, max_new=32, temperature=0., generator=None):
        """Continue every row's prompt until `end`, with a KV cache. Greedy at temperature 0, else sampled.
        Returns a list of token id lists, without the end token."""
        rows, length = batch.tokens.shape
        row, column = torch.arange(rows, device=batch.tokens.device), torch.arange(length + max_new,
                                                                                   device=batch.tokens.device)
        sample = torch.cat((batch.sample, row[:, None].expand(-1, max_new)), 1)     # new tokens are the row's own
        prompt = (batch.sample >= 0).sum(1)
        mask = visible(*(t[:, None, :, None] for t in (sample, 0 * sample)), column[:, None],
                       *(t[:, None, None] for t in (sample, 0 * sample)), column)
        past = [[] for _ in self.llm.model.layers]
        hidden = self.llm(self.embed(batch), mask[:, :, :length, :length], batch.position, past)[row, prompt - 1]
        out, open_ = [], torch.ones_like(row, dtype=torch.bool)
        for step in range(max_new):
            logits = (hidden @ self.llm.head().type_as(hidden).mT).float()
            token = logits.argmax(-1) if temperature == 0 else torch.multinomial(
                (logits / temperature).softmax(-1), 1, generator=generator).squeeze(1)
            open_ = open_ & (token != end)
            out.append(torch.where(open_, token, end))
            if not open_.any() or step == max_new - 1:
                break
            at = length + step
            hidden = self.llm(self.llm.model.embed_tokens(token)[:, None], mask[:, :, at:at + 1, :at + 1],
                              (prompt + step)[:, None], past)[:, 0]
        return [[t for t in tokens if t != end] for tokens in torch.stack(out, 1).tolist()]


class SigLIP(nn.Module):
    """Contrastive pretraining (Zhai et al. 2023): every picture against every caption, a sigmoid each. Gives the
    world its "original" encoder; the text tower and both heads are thrown away afterwards."""

    def __init__(self, encoder, text):
        super().__init__()
        self.encoder, self.text = encoder, text
        self.image_head = nn.Linear(2 * encoder.config.hidden_size, text.config.hidden_size)
        self.scale, self.bias = nn.Parameter(torch.tensor(math.log(10.))), nn.Parameter(torch.tensor(-10.))

    def forward(self, batch):
        """(samples, samples) logits: row = picture, column = caption."""
        features = self.encoder(batch.pixels)
        image = self.image_head(torch.cat((features.mean(1), features.amax(1)), -1))
        words = (batch.sample >= 0) & (batch.tokens != IMAGE)
        column = torch.arange(batch.tokens.shape[1], device=words.device)
        mask = (words[:, None] & (column[:, None] >= column))[:, None]
        hidden = self.text(self.text.model.embed_tokens(batch.tokens.clamp(min=0)), mask, batch.position)
        text = (hidden * words[..., None]).sum(1) / words.sum(1, keepdim=True)
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        return image @ text.T * self.scale.exp() + self.bias


# -------------------------------------------------------------------------------- the three folders

def initialise(module, seed):
    """Fresh weights from a generator: normal, as wide as the layer wants; residual outputs and biases small."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(module.named_parameters()):
        if p.ndim >= 2:
            std = .02 if "embed" in name and "patch" not in name else p[0].numel() ** -.5
            nn.init.normal_(p, std=std, generator=generator)
        elif p.ndim == 1 and name.endswith("bias"):
            nn.init.zeros_(p)
    return module


def hash_file(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_json(file, value):
    """Write beside the file and rename: it is whole or absent."""
    temporary = Path(file).with_name(Path(file).name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, file)


def save_folder(folder, tensors, config, files=()):
    """One checkpoint folder: model.safetensors (fp32), config.json, and copies of `files`. Whole or absent."""
    folder = Path(folder)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({k: v.detach().float().cpu().contiguous() for k, v in tensors.items()}, temporary / "model.safetensors",
              {"format": "pt"})
    for name, value in config.items():
        write_json(temporary / name, value)
    for file in files:
        shutil.copy(file, temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def save_model(folder, state, encoder, projector, llm, tokenizer):
    """Write those of encoder/, projector/, llm/ that are asked for. state: the MLLM's full state dict;
    encoder, llm: their configs or False; projector: True or False."""
    def part(name, new=""):
        return {new + k.removeprefix(name + "."): v for k, v in state.items() if k.startswith(name + ".")}

    if encoder:
        config = {k: v for k, v in asdict(encoder).items() if not k.startswith("image_m") and k != "image_std"}
        pixels = {"image_processor_type": "SiglipImageProcessor", "do_resize": True, "do_rescale": True,
                  "do_normalize": True, "do_convert_rgb": True, "resample": 3, "rescale_factor": 1 / 255,
                  "size": {"height": encoder.image_size, "width": encoder.image_size},
                  "image_mean": encoder.image_mean, "image_std": encoder.image_std}
        save_folder(Path(folder) / "encoder", part("encoder", "vision_model."), {
            "config.json": {"model_type": "siglip_vision_model", "architectures": ["SiglipVisionModel"],
                            "hidden_act": "gelu_pytorch_tanh", "vision_use_head": False, **config},
            "preprocessor_config.json": pixels})
    if projector:
        save_folder(Path(folder) / "projector", part("projector"), {"config.json": {"hidden_act": "gelu"}})
    if llm:
        qwen = llm.attention_bias
        save_folder(Path(folder) / "llm", part("llm"), {"config.json": {
            "model_type": "qwen2" if qwen else "llama", "hidden_act": "silu", "dtype": "float32",
            "architectures": ["Qwen2ForCausalLM" if qwen else "LlamaForCausalLM"], **asdict(llm)}}, [tokenizer.file])


def read_config(folder, kind):
    """config.json (and preprocessor_config.json) -> EncoderConfig or LLMConfig."""
    values = {}
    for name in ("config.json", "preprocessor_config.json") if kind is EncoderConfig else ("config.json",):
        try:
            values |= json.loads((Path(folder) / name).read_text())
        except (OSError, ValueError) as error:
            raise BadInput(f"{Path(folder) / name}: cannot be read ({error})") from None
    values = values.get("vision_config", {}) | values | values.get("rope_parameters", {})
    if kind is LLMConfig:
        values.setdefault("attention_bias", values.get("model_type") == "qwen2")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
                   if k in kind.__dataclass_fields__})


def read_weights(folder, module):
    """Load model.safetensors into a module; every tensor must be there and fit."""
    file, own = Path(folder) / "model.safetensors", module.state_dict()
    try:
        with safe_open(file, "pt") as f:
            names = {k.removeprefix("vision_model."): k for k in f.keys()}
            missing = sorted(set(own) - set(names))
            if missing:
                raise BadInput(f"{file}: {missing[0]} is missing ({len(missing)} tensors in all)")
            for name, tensor in own.items():
                value = f.get_tensor(names[name])
                if value.shape != tensor.shape:
                    raise BadInput(f"{file}: {name} is {tuple(value.shape)}, expected {tuple(tensor.shape)}")
                tensor.copy_(value)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{file}: cannot be read ({error})") from None
    return module


def load_encoder(folder, select_layer=-2):
    return read_weights(folder, Encoder(read_config(folder, EncoderConfig), select_layer))


def load_llm(folder):
    return read_weights(folder, Decoder(read_config(folder, LLMConfig)))


def load_model(encoder, projector, llm, select_layer=-2, seed=0):
    """Three folders -> MLLM. projector None: a fresh one."""
    encoder, llm = load_encoder(encoder, select_layer), load_llm(llm)
    fresh = Projector(encoder.config.hidden_size, llm.config.hidden_size)
    return MLLM(encoder, read_weights(projector, fresh) if projector else initialise(fresh, seed), llm)
