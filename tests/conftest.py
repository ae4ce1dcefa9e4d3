"""Shared by the tests: the repository on the path, a tokenizer, small random models, and a way to run the program."""
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")       # the tests' processes share the cores: more threads only wait

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import model as m  # noqa: E402

dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return data.train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def net(tokenizer):
    """A random MLLM whose every bias, norm and position counts, with grouped queries and an untied head."""
    encoder = m.EncoderConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2)
    llm = m.LLMConfig(vocab_size=len(tokenizer), hidden_size=48, intermediate_size=64, num_hidden_layers=2,
                      num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=False)
    net = m.MLLM(m.Encoder(encoder), m.Projector(32, 48), m.Decoder(llm))
    generator = torch.Generator().manual_seed(1)
    for p in net.parameters():
        p.data.normal_(1 if p.ndim == 1 else 0, .2, generator=generator)
    return net


@pytest.fixture
def prepare(tokenizer, net):
    return data.Prepare(tokenizer, "chatml", net.encoder.config, 512, 2)


@pytest.fixture
def pairs():
    """Preferences of all lengths, one without a picture, one whose prompt has earlier turns."""
    samples = [data.World("preferences", "probe", 7)[i] for i in range(7)]
    samples[2].image = None
    samples[4].turns = [("what is there", "something"), ("and <image> where", "somewhere"), *samples[4].turns]
    samples[4].turns[0] = ("look <image> closely", "yes, a picture")
    samples[4].turns[1] = ("and where", "somewhere")
    return samples


def run(*arguments, processes=None, check=True, **options):
    """pivot.py as a user runs it: under torchrun with `processes`, else plain. Returns the finished process."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    command = [sys.executable, *launcher, str(ROOT / "pivot.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, **options)
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done
