"""Programs that end in a head and a loss: from hidden states [B, T, D] to what a training step asks for.

Each is a plain function of `Inputs`; the tests run them all, and so do the coverage table and the memory
bench.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict, Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["LEAVES", "PROGRAMS", "Inputs", "Program", "make_inputs", "scalar_of"]

IGNORED = -100


@dataclass(frozen=True)
class Inputs:
    """What a program reads; the floating-point ones get gradients, but for what a teacher or a sampler gives.

    hidden [B, T, D]; weight, second [V, D]; bias, classes [V]; value [1, D]; labels [B, T], some ignored;
    teacher [B, T, D], teacher_weight [V, D]; old, advantage [B, T]: log-probabilities and advantages
    of a sampler.
    """

    hidden: Tensor
    weight: Tensor
    second: Tensor
    bias: Tensor
    value: Tensor
    classes: Tensor
    labels: Tensor
    teacher: Tensor
    teacher_weight: Tensor
    old: Tensor
    advantage: Tensor


LEAVES = ("hidden", "weight", "second", "bias", "value")
Result = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Program:
    """about: in the table; run: the program; its first result is the loss, or what the loss is made of."""

    about: str
    run: Callable[[Inputs], Result]


def make_inputs(
    batch: int, length: int, width: int, classes: int, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> Inputs:
    """Random inputs, the same each time; every third label is not counted."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    labels = torch.randint(0, classes, (batch, length), generator=generator)
    labels[:, 1::3] = IGNORED
    scale = width**-0.5
    made = Inputs(
        hidden=normal(batch, length, width),
        weight=normal(classes, width, scale=scale),
        second=normal(classes, width, scale=scale),
        bias=normal(classes),
        value=normal(1, width, scale=scale),
        classes=normal(classes).exp(),
        labels=labels.to(device),
        teacher=normal(batch, length, width),
        teacher_weight=normal(classes, width, scale=scale),
        old=normal(batch, length) - 3,
        advantage=normal(batch, length),
    )
    for name in LEAVES:
        getattr(made, name).requires_grad_()
    return made


def scalar_of(results: Result) -> Tensor:
    """One scalar of all results that have gradients, each element with a weight of its own."""
    parts = [p for p in (results if isinstance(results, tuple) else (results,)) if p.requires_grad]
    total = parts[0].new_zeros(())
    for number, part in enumerate(parts):
        low, high = (0.5, 1.5) if part.dim() else (1.0, 1.0)
        weights = torch.linspace(low, high, part.numel(), dtype=part.dtype, device=part.device)
        total = total + (part.reshape(-1) * weights).sum() / (1 + 2 * number)
    return total


# ------------------------------------------------------------------ pieces


def logits_of(i: Inputs) -> Tensor:
    return F.linear(i.hidden, i.weight)


class LossOptions(TypedDict, total=False):
    """What `F.cross_entropy` may be told besides scores and labels."""

    weight: Tensor
    ignore_index: int
    reduction: str
    label_smoothing: float


def flat(logits: Tensor, labels: Tensor, **options: Unpack[LossOptions]) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), **options)


def each(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of the labels, [B, T]; 0 where a label is ignored."""
    picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return picked * (labels != IGNORED)


def entropy_of(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def teacher_of(i: Inputs) -> Tensor:
    with torch.no_grad():
        return F.linear(i.teacher, i.teacher_weight)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p) per token."""
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


# ------------------------------------------------------------------ cross-entropy and its options


def z_loss(i: Inputs) -> Tensor:
    """As Liger defines it: over the tokens that count."""
    logits, counted = logits_of(i), i.labels != IGNORED
    return flat(logits, i.labels) + 1e-4 * (logits.logsumexp(-1).square() * counted).sum() / counted.sum()


def shifted(i: Inputs) -> Tensor:
    return flat(logits_of(i)[:, :-1].contiguous(), i.labels[:, 1:].contiguous())


def shifted_before(i: Inputs) -> Tensor:
    return flat(F.linear(i.hidden[:, :-1], i.weight), i.labels[:, 1:])


def written_out(i: Inputs) -> Tensor:
    logits = logits_of(i)
    picked = logits.gather(-1, i.labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    counted = i.labels != IGNORED
    return ((logits.logsumexp(-1) - picked) * counted).sum() / counted.sum()


def focal(i: Inputs) -> Tensor:
    logp = each(logits_of(i), i.labels)
    return (-((1 - logp.exp()) ** 2) * logp).mean()


def per_sequence(i: Inputs) -> Tensor:
    """The mean over each sequence's counted tokens, then over sequences."""
    losses = flat(logits_of(i), i.labels, reduction="none").view(i.labels.shape)
    counted = i.labels != IGNORED
    return (losses.sum(1) / counted.sum(1)).mean()


def tied(i: Inputs) -> Tensor:
    """The head's weight is also the embedding."""
    hidden = i.hidden + F.embedding(i.labels.clamp(min=0), i.weight)
    return flat(F.linear(hidden, i.weight), i.labels)


# ------------------------------------------------------------------ several losses, several heads


def two_heads(i: Inputs) -> Tensor:
    return flat(logits_of(i), i.labels) + 0.5 * flat(F.linear(i.hidden, i.second), i.labels.roll(-1, 1))


def multi_token(i: Inputs) -> Tensor:
    """Heads for the next token and the one after it."""
    first = flat(logits_of(i)[:, :-1], i.labels[:, 1:])
    return first + 0.3 * flat(F.linear(i.hidden, i.second)[:, :-2], i.labels[:, 2:])


def auxiliary(i: Inputs) -> Tensor:
    return flat(logits_of(i), i.labels) + 0.01 * i.hidden.square().mean()


def two_scalars(i: Inputs) -> tuple[Tensor, Tensor]:
    logits = logits_of(i)
    return flat(logits, i.labels), logits.logsumexp(-1).square().mean()


def value_head(i: Inputs) -> Tensor:
    """PPO: a value per token beside the policy."""
    values = F.linear(i.hidden, i.value).squeeze(-1)
    return flat(logits_of(i), i.labels) + 0.5 * F.mse_loss(values, i.advantage)


# ------------------------------------------------------------------ distillation and preference


def distill(i: Inputs) -> Tensor:
    log_p, log_q = (logits_of(i) / 2).log_softmax(-1), (teacher_of(i) / 2).log_softmax(-1)
    return 4 * F.kl_div(log_p.flatten(0, 1), log_q.flatten(0, 1), reduction="batchmean", log_target=True)


def distill_reverse(i: Inputs) -> Tensor:
    log_p, log_q = logits_of(i).log_softmax(-1), teacher_of(i).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def distill_beside(i: Inputs) -> Tensor:
    logits = logits_of(i)
    soft = divergence(logits.log_softmax(-1), teacher_of(i).log_softmax(-1)).mean()
    return 0.5 * flat(logits, i.labels) + 0.5 * soft


def jensen_shannon(i: Inputs) -> Tensor:
    log_p, log_q = logits_of(i).log_softmax(-1), teacher_of(i).log_softmax(-1)
    middle = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=log_p.dtype))
    return (0.5 * divergence(middle, log_p) + 0.5 * divergence(middle, log_q)).mean()


def dpo(i: Inputs) -> Tensor:
    """Direct preference optimization: sums per sequence, the first half chosen, the second rejected."""
    policy = each(logits_of(i), i.labels).sum(1)
    with torch.no_grad():
        reference = each(teacher_of(i), i.labels).sum(1)
    chosen, rejected = (policy - reference).tensor_split(2)
    return -F.logsigmoid(0.1 * (chosen.sum() - rejected.sum()))


def clipped_ratio(i: Inputs) -> Tensor:
    """PPO and GRPO: the clipped ratio to the sampler's log-probabilities, with a KL to it."""
    logp = each(logits_of(i), i.labels)
    ratio = (logp - i.old).exp()
    surrogate = torch.min(ratio * i.advantage, ratio.clamp(0.8, 1.2) * i.advantage)
    kl = (i.old - logp).exp() - (i.old - logp) - 1
    counted = i.labels != IGNORED
    return ((-surrogate + 0.04 * kl) * counted).sum() / counted.sum()


def policy_entropy(i: Inputs) -> Tensor:
    logits = logits_of(i)
    return -(each(logits, i.labels) * i.advantage).mean() - 0.01 * entropy_of(logits).mean()


def reward(i: Inputs) -> Tensor:
    """Bradley-Terry on the last token's score."""
    scores = F.linear(i.hidden, i.value).squeeze(-1)[:, -1]
    return -F.logsigmoid(scores - scores.roll(1, 0)).mean()


# ------------------------------------------------------------------ further outputs


def with_metrics(i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Accuracy and entropy for the log, which need no gradient."""
    logits = logits_of(i)
    loss = flat(logits, i.labels)
    with torch.no_grad():
        hits = ((logits.argmax(-1) == i.labels) & (i.labels != IGNORED)).sum()
        entropy = entropy_of(logits).mean()
    return loss, hits, entropy


def with_argmax(i: Inputs) -> tuple[Tensor, Tensor]:
    logits = logits_of(i)
    return flat(logits, i.labels), logits.argmax(-1)


def with_log_probs(i: Inputs) -> tuple[Tensor, Tensor]:
    logits = logits_of(i)
    return flat(logits, i.labels), each(logits.detach(), i.labels)


def with_logits(i: Inputs) -> tuple[Tensor, Tensor]:
    logits = logits_of(i)
    return flat(logits, i.labels), logits


def with_last_logits(i: Inputs) -> tuple[Tensor, Tensor]:
    logits = logits_of(i)
    return flat(logits, i.labels), logits[:, -1]


def with_float(i: Inputs) -> Tensor:
    return flat(logits_of(i).float(), i.labels)


# ------------------------------------------------------------------ other tasks


def question_answering(i: Inputs) -> Tensor:
    """Start and end among the positions: the softmax runs over tokens."""
    scores = F.linear(i.hidden, torch.cat([i.value, i.weight[:1]]))
    start, end = scores.unbind(-1)
    target = i.labels[:, 0] % i.labels.shape[1]
    return (F.cross_entropy(start, target) + F.cross_entropy(end, target)) / 2


def contrastive(i: Inputs) -> Tensor:
    """CLIP: pooled pairs against each other."""
    a = F.normalize(F.linear(i.hidden.mean(1), i.weight), dim=-1)
    b = F.normalize(F.linear(i.hidden.amax(1), i.second), dim=-1)
    similar = a @ b.t() / 0.07
    target = torch.arange(similar.shape[0], device=similar.device)
    return (F.cross_entropy(similar, target) + F.cross_entropy(similar.t(), target)) / 2


def multi_label(i: Inputs) -> Tensor:
    target = F.one_hot(i.labels.clamp(min=0), i.bias.shape[0]).to(i.hidden.dtype)
    return F.binary_cross_entropy_with_logits(logits_of(i), target, pos_weight=i.classes)


def pooled_classes(i: Inputs) -> Tensor:
    """A classifier on the mean over tokens."""
    return F.cross_entropy(F.linear(i.hidden.mean(1), i.weight), i.labels[:, 0])


PROGRAMS: dict[str, Program] = {
    "mean": Program("cross-entropy, mean", lambda i: flat(logits_of(i), i.labels)),
    "sum": Program("cross-entropy, sum", lambda i: flat(logits_of(i), i.labels, reduction="sum")),
    "none": Program("reduction none, returned", lambda i: flat(logits_of(i), i.labels, reduction="none")),
    "none_mean": Program("reduction none, then mean", lambda i: flat(logits_of(i), i.labels, reduction="none").mean()),
    "ignore_index": Program(
        "another ignore_index", lambda i: flat(logits_of(i), i.labels.clamp(min=0), ignore_index=0)
    ),
    "class_weights": Program("class weights", lambda i: flat(logits_of(i), i.labels, weight=i.classes)),
    "smoothing": Program("label smoothing", lambda i: flat(logits_of(i), i.labels, label_smoothing=0.1)),
    "weights_smoothing": Program(
        "class weights and smoothing",
        lambda i: flat(logits_of(i), i.labels, weight=i.classes, label_smoothing=0.1),
    ),
    "z_loss": Program("z-loss", z_loss),
    "softcap": Program("logit softcap", lambda i: flat(30 * torch.tanh(logits_of(i) / 30), i.labels)),
    "scale": Program("logit scale", lambda i: flat(logits_of(i) * 0.25, i.labels)),
    "bias": Program("bias", lambda i: flat(F.linear(i.hidden, i.weight, i.bias), i.labels)),
    "tied": Program("weight tied to the embedding", tied),
    "upcast": Program("logits cast to float32", with_float),
    "classes_second": Program(
        "classes in dimension 1", lambda i: F.cross_entropy(logits_of(i).transpose(1, 2), i.labels)
    ),
    "written_out": Program("cross-entropy written out", written_out),
    "focal": Program("focal loss", focal),
    "per_sequence": Program("mean per sequence, then mean", per_sequence),
    "shift_after": Program("shift after the head", shifted),
    "shift_before": Program("shift before the head", shifted_before),
    "divided": Program("loss divided after the head", lambda i: flat(logits_of(i), i.labels, reduction="sum") / 77),
    "multiplied": Program("loss multiplied after the head", lambda i: 0.125 * flat(logits_of(i), i.labels)),
    "auxiliary": Program("an auxiliary loss beside", auxiliary),
    "two_scalars": Program("two losses returned", two_scalars),
    "two_heads": Program("two heads", two_heads),
    "multi_token": Program("multi-token prediction", multi_token),
    "value_head": Program("a value head beside (PPO)", value_head),
    "distill": Program("distillation, KL, temperature", distill),
    "distill_reverse": Program("distillation, reverse KL", distill_reverse),
    "distill_beside": Program("cross-entropy and distillation", distill_beside),
    "jensen_shannon": Program("distillation, Jensen-Shannon", jensen_shannon),
    "dpo": Program("DPO", dpo),
    "clipped_ratio": Program("PPO, GRPO: clipped ratio and KL", clipped_ratio),
    "policy_entropy": Program("policy gradient with entropy bonus", policy_entropy),
    "log_probs": Program("log-probabilities per token, returned", lambda i: each(logits_of(i), i.labels)),
    "with_log_probs": Program("log-probabilities beside the loss", with_log_probs),
    "with_metrics": Program("accuracy and entropy beside the loss", with_metrics),
    "with_argmax": Program("argmax beside the loss", with_argmax),
    "with_logits": Program("logits beside the loss", with_logits),
    "with_last_logits": Program("the last token's logits beside the loss", with_last_logits),
    "reward": Program("reward model", reward),
    "question_answering": Program("question answering", question_answering),
    "contrastive": Program("contrastive (CLIP)", contrastive),
    "multi_label": Program("many labels per token", multi_label),
    "pooled_classes": Program("sequence classification", pooled_classes),
}
