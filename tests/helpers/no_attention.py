"""Models with a softmax that is no attention, though much of it may look alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, ...]
B, N, C, H = 2, 24, 32, 4


class Model(nn.Module):
    """A function of inputs and of parameters, which are random."""

    def __init__(self, call: Callable[..., object], shapes: dict[str, Shape]) -> None:
        super().__init__()
        self.call = call
        for name, shape in shapes.items():
            fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
            self.register_parameter(name, nn.Parameter(torch.randn(shape) / math.sqrt(fan_in)))

    def forward(self, *inputs: Tensor) -> object:
        """Call the function with the inputs and the parameters."""
        return self.call(*inputs, **dict(self.named_parameters()))


@dataclass(frozen=True)
class Case:
    """A function, and the shapes of what it takes."""

    call: Callable[..., object]
    shapes: tuple[Shape, ...]
    parameters: dict[str, Shape]
    softmaxes: int
    """Number of softmaxes to be listed as rejected; a log_softmax alone makes no weights."""

    @property
    def name(self) -> str:
        """The function's name."""
        return self.call.__name__

    def model(self) -> Model:
        """One with fresh parameters."""
        return Model(self.call, self.parameters)

    def inputs(self) -> list[Tensor]:
        """Return random inputs."""
        return [torch.randn(shape) for shape in self.shapes]


CASES: list[Case] = []


def no_attention(
    *inputs: Shape, softmaxes: int = 1, **parameters: Shape
) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Add a function of inputs and parameters of these shapes to `CASES`."""

    def add(call: Callable[..., object]) -> Callable[..., object]:
        CASES.append(Case(call, inputs, parameters, softmaxes))
        return call

    return add


def heads_of(x: Tensor) -> Tensor:
    """Split [B, N, H * D] into [B, H, N, D]."""
    return x.unflatten(-1, (H, -1)).transpose(1, 2)


# Routers of experts.


@no_attention((B * N, C), gate=(8, C))
def mixtral_router(hidden, gate):
    weights = F.softmax(F.linear(hidden, gate), dim=1, dtype=torch.float)
    weights, selected = torch.topk(weights, 2, dim=-1)
    return weights / weights.sum(dim=-1, keepdim=True), selected


@no_attention((B * N, C), gate=(8, C))
def router_of_the_chosen(hidden, gate):
    """gpt-oss: the softmax runs over the experts chosen."""
    values, selected = torch.topk(F.linear(hidden, gate), 4, dim=-1)
    return F.softmax(values, dim=1, dtype=values.dtype), selected


@no_attention((B, N, C), gate=(8, C), up=(8, C, C))
def experts_all_combined(x, gate, up):
    weights = F.softmax(x @ gate.T, dim=-1)
    experts = torch.einsum("bnc,ecd->bned", x, up)
    return torch.einsum("bne,bned->bnd", weights, experts)


@no_attention((B, N, C), gate=(8, C), up=(8, C, C))
def experts_of_a_sequence(x, gate, up):
    """One choice of experts for each sequence."""
    weights = F.softmax(F.linear(x.mean(1), gate), -1)
    return torch.einsum("be,ecd,bnc->bnd", weights, up, x)


@no_attention((B, N, C), softmaxes=2, phi=(C, 6))
def soft_mixture_of_experts(x, phi):
    """Puigcerver et al.: softmax over tokens to fill slots, over slots to empty them."""
    logits = torch.einsum("bnc,cs->bns", x, phi)
    slots = torch.einsum("bns,bnc->bsc", logits.softmax(dim=1), x)
    return torch.einsum("bns,bsc->bnc", logits.softmax(dim=2), slots.tanh())


# Classifiers and losses.


@no_attention((B, N, C), head=(100, C))
def token_probabilities(x, head):
    return F.softmax(F.linear(x, head), dim=-1)


@no_attention((B, C), softmaxes=0, head=(10, C))
def negative_log_likelihood(x, head):
    labels = torch.arange(B)
    return -F.log_softmax(x @ head.T, dim=-1).gather(1, labels[:, None]).mean()


@no_attention((B * N, C), (B * N, C), softmaxes=0)
def info_nce(anchors, positives):
    logits = F.normalize(anchors, dim=-1) @ F.normalize(positives, dim=-1).T / 0.07
    return -F.log_softmax(logits, dim=-1).diagonal().mean()


@no_attention((B * N, C), (5, C), scale=())
def clip_probabilities(images, texts, scale):
    images, texts = F.normalize(images, dim=1), F.normalize(texts, dim=1)
    return (scale.exp() * images @ texts.t()).softmax(dim=-1)


@no_attention((B, C), (B, C), prototypes=(30, C))
def swapped_prototypes(first, second, prototypes):
    target = F.softmax(first @ prototypes.T / 0.05, dim=-1)
    return -(target * F.log_softmax(second @ prototypes.T / 0.1, dim=-1)).sum(-1).mean()


@no_attention((B, N, C), (B, N, C), head=(50, C))
def distillation(student, teacher, head):
    student, teacher = F.linear(student, head), F.linear(teacher, head)
    return F.kl_div(F.log_softmax(student, -1), F.softmax(teacher, -1), reduction="batchmean")


@no_attention((B, C, 6, 8), (B, 5, 6, 8), classes=(5, C, 1, 1))
def dice_loss(x, target, classes):
    probabilities = F.softmax(F.conv2d(x, classes), dim=1)
    overlap = (probabilities * target).sum((2, 3))
    return 1 - 2 * overlap / (probabilities.sum((2, 3)) + 1)


@no_attention((B, N, C), softmaxes=2, prior=(3, C), latent=(3 * C, C), head=(20, C))
def mixture_of_softmaxes(x, prior, latent, head):
    share = F.softmax(F.linear(x, prior), -1)
    each = torch.tanh(F.linear(x, latent)).unflatten(-1, (3, -1))
    return (share.unsqueeze(-1) * F.softmax(F.linear(each, head), -1)).sum(-2)


@no_attention((B, N, C), (B, N, C))
def pointer_network(decoder, encoder):
    """Its probabilities are the answer: there are no values."""
    return F.softmax(decoder @ encoder.mT / math.sqrt(C), dim=-1)


# Pooling by scores that are no product of queries and keys.


@no_attention((B, N, C), query=(C,))
def pooling_by_a_parameter(x, query):
    weights = (x @ query).softmax(dim=1)
    return (weights.unsqueeze(-1) * x).sum(dim=1)


@no_attention((B, N, C), query=(1, C))
def pooling_by_a_linear_layer(x, query):
    weights = F.softmax(F.linear(x, query).squeeze(-1), dim=-1)
    return torch.bmm(weights.unsqueeze(1), x).squeeze(1)


@no_attention((N, C), tanh=(16, C), gate=(16, C), last=(1, 16))
def gated_pooling_of_instances(x, tanh, gate, last):
    """Ilse et al., attention-based multiple instance learning."""
    a = F.linear(torch.tanh(F.linear(x, tanh)) * torch.sigmoid(F.linear(x, gate)), last)
    return torch.mm(F.softmax(a.transpose(1, 0), dim=1), x)


@no_attention((B, 7, C), (B, N, C), query=(C, C), key=(C, C), last=(1, C))
def bahdanau(decoder, encoder, query, key, last):
    hidden = torch.tanh(F.linear(decoder, query)[:, :, None] + F.linear(encoder, key)[:, None])
    weights = F.softmax(F.linear(hidden, last).squeeze(-1), dim=-1)
    return torch.bmm(weights, encoder)


@no_attention((N, C), (N, N), weight=(C, C), source=(C, 1), target=(C, 1))
def graph_attention(x, adjacency, weight, source, target):
    wh = x @ weight
    e = F.leaky_relu(wh @ source + (wh @ target).T, 0.2)
    attention = F.softmax(torch.where(adjacency > 0, e, -9e15), dim=1)
    return F.elu(attention @ wh)


@no_attention((B, C, 6, 8), mask=(1, C, 1, 1))
def global_context_block(x, mask):
    weights = F.conv2d(x, mask).view(B, 1, -1).softmax(dim=2)
    return x + torch.matmul(x.view(B, C, -1), weights.transpose(1, 2)).unsqueeze(-1)


@no_attention((B, C, 6, 8), regions=(5, C, 1, 1))
def object_regions(x, regions):
    """Softmax of class logits over pixels, as in OCRNet."""
    probabilities = F.softmax(F.conv2d(x, regions).flatten(2), dim=2)
    return torch.matmul(probabilities, x.flatten(2).permute(0, 2, 1))


@no_attention((B, C, 6, 8), points=(4, C, 1, 1))
def spatial_expectation(x, points):
    """Soft-argmax: where a heat map lies."""
    heat = F.conv2d(x, points).flatten(2).softmax(-1)
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(8.0), indexing="ij")
    return torch.stack(((heat * rows.flatten()).sum(-1), (heat * columns.flatten()).sum(-1)), -1)


# Softmax over channels or branches.


@no_attention((B, C, 6, 8), (B, C, 6, 8), squeeze=(8, C), excite=(2 * C, 8))
def selective_kernel(first, second, squeeze, excite):
    features = torch.stack((first, second), dim=1)
    pooled = features.sum(1).mean((2, 3))
    weights = F.linear(F.relu(F.linear(pooled, squeeze)), excite).view(B, 2, C)
    return (features * weights.softmax(dim=1)[..., None, None]).sum(1)


@no_attention((B, C, 6, 8), squeeze=(8, C), excite=(C, 8))
def squeeze_and_softmax(x, squeeze, excite):
    pooled = x.mean((2, 3))
    return x * F.linear(F.relu(F.linear(pooled, squeeze)), excite).softmax(-1)[..., None, None]


@no_attention((B, N, C), qkv=(3 * C, C), temperature=(H, 1, 1))
def cross_covariance(x, qkv, temperature):
    """XCiT: each feature attends to features."""
    packed = F.linear(x, qkv).reshape(B, N, 3, H, C // H).permute(2, 0, 3, 1, 4)
    q, k, v = (part.transpose(-2, -1) for part in packed.unbind(0))
    attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * temperature
    return (attn.softmax(dim=-1) @ v).permute(0, 3, 1, 2).reshape(B, N, C)


@no_attention((B, C, 6, 8), qkv=(3 * C, C, 1, 1), temperature=(H, 1, 1))
def restormer(x, qkv, temperature):
    q, k, v = (part.reshape(B, H, C // H, -1) for part in F.conv2d(x, qkv).chunk(3, dim=1))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    attn = (q @ k.transpose(-2, -1)) * temperature
    return (attn.softmax(dim=-1) @ v).reshape(B, C, 6, 8)


@no_attention((B, C, 6, 8), before=(C, C, 1, 1))
def dual_attention_of_channels(x, before):
    x = F.conv2d(x, before).view(B, C, -1)
    energy = torch.bmm(x, x.permute(0, 2, 1))
    energy = torch.max(energy, -1, keepdim=True)[0].expand_as(energy) - energy
    return torch.bmm(torch.softmax(energy, dim=-1), x).view(B, C, 6, 8)


# Linear attention: no score of a query and a key is ever made.


@no_attention((B, N, C), softmaxes=2, qkv=(3 * C, C))
def efficient_attention(x, qkv):
    q, k, v = (heads_of(part) for part in F.linear(x, qkv).chunk(3, -1))
    context = k.softmax(dim=-2).transpose(-1, -2) @ v
    return q.softmax(dim=-1) @ context


@no_attention((B, C, 6, 8), softmaxes=2, qkv=(3 * C, C, 1, 1))
def linear_attention_of_pixels(x, qkv):
    q, k, v = (part.reshape(B, H, C // H, -1) for part in F.conv2d(x, qkv).chunk(3, dim=1))
    q = q.softmax(dim=-2) * (C // H) ** -0.5
    context = torch.einsum("b h d n, b h e n -> b h d e", k.softmax(dim=-1), v)
    return torch.einsum("b h d e, b h d n -> b h e n", context, q).reshape(B, C, 6, 8)


# Both sides are parameters.


@no_attention((B, N, C), first=(64, C), second=(C, 64))
def softmax_in_a_perceptron(x, first, second):
    return F.linear(F.softmax(F.linear(x, first), dim=-1), second)


@no_attention((B, N, C), keys=(C, 64), values=(64, C))
def external_attention(x, keys, values):
    attn = (x @ keys).softmax(dim=1)
    return attn / (1e-9 + attn.sum(dim=2, keepdim=True)) @ values


@no_attention((B, N, C), codebook=(64, C))
def soft_codebook(x, codebook):
    distance = x.pow(2).sum(-1, keepdim=True) - 2 * x @ codebook.T + codebook.pow(2).sum(-1)
    return F.softmax(-distance, dim=-1) @ codebook


@no_attention((B, N, C), embedding=(64, C))
def expected_embedding(x, embedding):
    return F.softmax(x @ embedding.T / 0.7, dim=-1) @ embedding


@no_attention((B, N, C), (B, N, 10), head=(10, C), embedding=(10, C))
def gumbel_softmax(x, noise, head, embedding):
    return ((F.linear(x, head) + noise) / 0.5).softmax(-1) @ embedding


# A product of queries and keys, but not the sum over the keys that the softmax normalised.


@no_attention((B, H, N, 8), (B, H, N, 8), (B, H, N, 8))
def normalised_over_queries(q, k, v):
    """Attend with nn.Softmax(dim=-2) by mistake."""
    return torch.softmax(q @ k.mT / math.sqrt(8), dim=-2) @ v


@no_attention((B, H, N, 8), (B, H, N, 8), (B, H, N, 8))
def normalised_over_heads(q, k, v):
    return torch.softmax(q @ k.mT / math.sqrt(8), dim=1) @ v


@no_attention((B, H, N, 8), (B, H, N, 8), (B, H, N, 8))
def summed_over_queries(q, k, v):
    return torch.softmax(q @ k.mT / math.sqrt(8), dim=-1).mT @ v


@no_attention((B, 5, C), (B, N, C), (B, N, C))
def slot_attention(slots, k, v):
    """Locatello et al.: slots compete for each token, then take the mean of what they won."""
    attn = torch.einsum("bnc,bsc->bns", k, slots).mul(C**-0.5).softmax(dim=-1) + 1e-8
    return torch.einsum("bnc,bns->bsc", v, attn / attn.sum(dim=1, keepdim=True))


@no_attention((B, H, N, 8), (B, H, N, 8), (B, H, N, N))
def weights_times_a_tensor(q, k, other):
    return torch.softmax(q @ k.mT / math.sqrt(8), dim=-1) * other
