"""One objective: supervised fine-tuning (SFT). Maximise the likelihood of the chosen response.

Compare dpo.py: same samples, same model, same shape of code. The difference between the two files is the paper.
"""
from data import CHOSEN


def sft_loss(logps):
    """L_SFT = -log pi(y_c | I, q), the paper's equation for supervised post-training.

    logps: (samples, responses) summed log-probabilities of the responses under the policy.
    Returns (samples,) losses. What is rejected plays no part."""
    return -logps[:, CHOSEN]


def sft_objective(model, batch):
    """Loss summed over the batch, what to divide it by (target tokens of the chosen), metrics summed over samples."""
    loss = sft_loss(model(batch)).sum()
    return loss, int((batch.response % batch.responses == CHOSEN).sum()), {}
