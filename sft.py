"""One objective: supervised fine-tuning (SFT). Maximise the likelihood of the chosen response.

Compare dpo.py: same samples, same model, same shape of code. The difference is the paper.
"""
from data import CHOSEN


def sft_loss(logps):
    """L_SFT = -log pi(y_c | I, q): the paper's loss for supervised post-training.

    logps: (samples, responses) summed log-probabilities of the responses under the policy.
    Returns (samples,) losses. What is rejected plays no part."""
    return -logps[:, CHOSEN]


def sft_objective(model, batch):
    """The loss summed over a batch, what to divide it by (target tokens), metrics to add up."""
    loss = sft_loss(model(batch)).sum()
    return loss, int((batch.response % batch.responses == CHOSEN).sum()), {}
