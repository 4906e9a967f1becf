"""Tokens beside others, however they are made: heads, queries and keys are still told apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lychee_compile
from lychee_compile.passes.site import Site

BATCH, TOKENS, HEADS, DIM = 2, 40, 4, 8
WIDTH = HEADS * DIM
OPTIONS = {"budget": 16, "sinks": 2, "recent": 4, "chunk": (2, 4), "dense_layers": 0}

THOROUGH = pytest.mark.thorough
pytestmark = pytest.mark.usefixtures("uncompiled_graphs", "seeded")


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * 0.2)


def split(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], HEADS, -1).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) @ value


def only_site(model: nn.Module, *inputs: Tensor) -> Site:
    """Return the one attention of a model, which has to compute the same when compiled."""
    torch._dynamo.reset()
    model = model.eval()
    with torch.no_grad():
        expected = model(*inputs)
        got = torch.compile(model, backend="lychee", options=OPTIONS)(*inputs)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    (report,) = lychee_compile.reports()
    assert not report.rejections()
    (site,) = report.sites
    return site


def sizes(site: Site) -> tuple[int | str, ...]:
    return site.query_heads, site.kv_heads, site.query_len, site.kv_len


class Linear(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return split(super().forward(x))


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = parameter(HEADS, DIM, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("hdi,bni->bhnd", self.weight, x)


class MatrixProduct(nn.Module):
    """A product with the weights of all heads, repeated for every row of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = parameter(1, WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return split(torch.bmm(x, self.weight.expand(x.shape[0], -1, -1)))


class PerHead(nn.Module):
    """The same small layer for every head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.view(*x.shape[:2], HEADS, DIM)).transpose(1, 2)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return split(self.layer(x.mT).mT.contiguous())


class ConvolutionOfHeads(nn.Module):
    """A projection, and after it a convolution of each head on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.pool = Linear(), nn.Conv1d(DIM, DIM, 3, padding=1, groups=DIM)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.layer(x)
        pooled = self.pool(heads.reshape(-1, *heads.shape[2:]).mT)
        return pooled.mT.reshape(heads.shape)


PROJECTIONS = (Linear, Einsum, MatrixProduct, PerHead, Convolution, ConvolutionOfHeads)


class Encoder(nn.Module):
    """One attention over tokens, of which `join` puts some beside those of an image."""

    def __init__(
        self,
        projection: Callable[[], nn.Module],
        join: Callable[[Tensor, Tensor, Tensor], Tensor],
        token_shape: tuple[int, ...] = (WIDTH,),
    ) -> None:
        super().__init__()
        self.query, self.key, self.value = projection(), projection(), projection()
        self.token, self.other = parameter(*token_shape), parameter(*token_shape)
        self.join = join

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.join(self.token, self.other, x)
        key = self.key(x)
        return attend(self.query(x), key, self.value(x)), key


def class_token_expanded(token: Tensor, _: Tensor, x: Tensor) -> Tensor:
    return torch.cat((token.expand(len(x), 1, -1), x), 1)


def class_token_viewed(token: Tensor, _: Tensor, x: Tensor) -> Tensor:
    return torch.cat((token.view(1, 1, -1).repeat(len(x), 1, 1), x), 1)


def class_token_behind(token: Tensor, _: Tensor, x: Tensor) -> Tensor:
    return torch.cat((x, token[None, None].repeat(len(x), 1, 1)), 1)


def distilled(token: Tensor, other: Tensor, x: Tensor) -> Tensor:
    tokens = [each.view(1, 1, -1).expand(len(x), -1, -1) for each in (token, other)]
    return torch.cat((*tokens, x), 1)


def around(token: Tensor, other: Tensor, x: Tensor) -> Tensor:
    first, last = (each.view(1, 1, -1).expand(len(x), -1, -1) for each in (token, other))
    return torch.cat((first, x, last), 1)


def class_token_unsqueezed(token: Tensor, _: Tensor, x: Tensor) -> Tensor:
    return torch.cat((token.expand(len(x), -1).unsqueeze(1), x), 1)


def mean_token(_: Tensor, __: Tensor, x: Tensor) -> Tensor:
    return torch.cat((x.mean(1, keepdim=True), x), 1)


def removed_again(token: Tensor, _: Tensor, x: Tensor) -> Tensor:
    return class_token_viewed(token, token, x)[:, 1:]


JOINS = {
    class_token_expanded: 1, class_token_viewed: 1, class_token_unsqueezed: 1,
    class_token_behind: 1, distilled: 2, around: 2, mean_token: 1, removed_again: 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("projection", "join"),
    [
        pytest.param(
            projection,
            join,
            marks=() if projection is Einsum or join is class_token_viewed else THOROUGH,
            id=f"{projection.__name__}-{join.__name__}",
        )
        for projection in PROJECTIONS
        for join in JOINS
    ],
)
def test_an_encoder_with_more_tokens_is_an_encoder(projection, join) -> None:
    site = only_site(Encoder(projection, join), torch.randn(BATCH, TOKENS, WIDTH))
    tokens = TOKENS + JOINS[join]
    assert sizes(site) == (HEADS, HEADS, tokens, tokens)
    assert site.decision == "exact"


@pytest.mark.parametrize("joined", ["front", "behind"])
@pytest.mark.parametrize("registers", [2, 5])
def test_registers_stored_in_one_vector_are_tokens(joined, registers: int) -> None:
    def join(token: Tensor, _: Tensor, x: Tensor) -> Tensor:
        tokens = token.view(1, registers, WIDTH).expand(len(x), -1, -1)
        return torch.cat((tokens, x) if joined == "front" else (x, tokens), 1)

    model = Encoder(Einsum, join, (registers * WIDTH,))
    site = only_site(model, torch.randn(BATCH, TOKENS, WIDTH))
    assert sizes(site) == (HEADS, HEADS, TOKENS + registers, TOKENS + registers)


class NullKeys(nn.Module):
    """Learned keys and values beside those of the tokens."""

    def __init__(
        self,
        projection: Callable[[], nn.Module],
        shape: tuple[int, ...],
        shaped: Callable[[Tensor], Tensor],
        front: bool,
    ) -> None:
        super().__init__()
        self.query, self.key, self.value = projection(), projection(), projection()
        self.null_key, self.null_value = parameter(*shape), parameter(*shape)
        self.shaped, self.front = shaped, front

    def _joined(self, null: Tensor, made: Tensor) -> Tensor:
        null = self.shaped(null).expand(len(made), HEADS, -1, DIM)
        return torch.cat((null, made) if self.front else (made, null), 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        key = self._joined(self.null_key, self.key(x))
        value = self._joined(self.null_value, self.value(x))
        return attend(self.query(x), key, value), key


NULL_KEYS = {
    "D": ((DIM,), lambda t: t.view(1, 1, 1, -1), 1),
    "H D": ((HEADS, DIM), lambda t: t[:, None], 1),
    "H 1 D": ((HEADS, 1, DIM), lambda t: t, 1),
    "HD": ((WIDTH,), lambda t: t.view(1, HEADS, 1, DIM), 1),
    "H M D": ((HEADS, 3, DIM), lambda t: t, 3),
    "M HD": ((3, WIDTH), lambda t: t.view(3, HEADS, DIM).transpose(0, 1), 3),
    "H MD": ((HEADS, 3 * DIM), lambda t: t.view(1, HEADS, 3, DIM), 3),
}


@pytest.mark.parametrize(
    "front", [True, pytest.param(False, marks=THOROUGH)], ids=["front", "behind"]
)
@pytest.mark.parametrize(
    "projection", [Einsum, *(pytest.param(each, marks=THOROUGH) for each in (Linear, Convolution))]
)
@pytest.mark.parametrize("null", NULL_KEYS)
def test_learned_keys_are_keys(null: str, projection, front: bool) -> None:
    shape, shaped, count = NULL_KEYS[null]
    model = NullKeys(projection, shape, shaped, front)
    site = only_site(model, torch.randn(BATCH, TOKENS, WIDTH))
    assert sizes(site) == (HEADS, HEADS, TOKENS, TOKENS + count)
    assert site.decision == "exact"


class Vision(nn.Module):
    """Patches by a convolution, flattened, with more tokens, with or without projections."""

    def __init__(self, join: Callable[[Tensor, Tensor, Tensor], Tensor], project: bool) -> None:
        super().__init__()
        self.patches, self.join = nn.Conv2d(3, WIDTH, 4, 4), join
        self.token, self.other = parameter(WIDTH), parameter(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH) if project else None

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = self.join(self.token, self.other, x)
        query = key = value = x
        if self.qkv is not None:
            query, key, value = self.qkv(F.layer_norm(x, (WIDTH,))).chunk(3, -1)
        query, key, value = map(split, (query, key, value))
        return attend(query, key, value), key


@pytest.mark.parametrize(
    ("join", "project"),
    [
        (class_token_viewed, True),
        (class_token_viewed, False),
        (class_token_unsqueezed, False),
        (distilled, False),
    ],
)
def test_patches_of_a_feature_map_are_tokens(join, project: bool) -> None:
    site = only_site(Vision(join, project), torch.randn(BATCH, 3, 24, 20))
    tokens = 30 + JOINS[join]
    assert sizes(site) == (HEADS, HEADS, tokens, tokens)
    assert site.decision == "exact"


class LearnedQueries(nn.Module):
    """Learned queries [HD] beside those of the tokens, joined after the projection."""

    def __init__(self, front: bool) -> None:
        super().__init__()
        self.query, self.key, self.value = Einsum(), Einsum(), Einsum()
        self.learned, self.front = parameter(WIDTH), front

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        learned = split(self.learned.expand(len(x), -1).unsqueeze(1))
        parts = (learned, self.query(x))
        query = torch.cat(parts if self.front else parts[::-1], 2)
        key = self.key(x)
        return attend(query, key, self.value(x)), key


@pytest.mark.parametrize("front", [True, False])
def test_learned_queries_are_queries(front: bool) -> None:
    site = only_site(LearnedQueries(front), torch.randn(BATCH, TOKENS, WIDTH))
    assert sizes(site) == (HEADS, HEADS, TOKENS + 1, TOKENS)
    assert site.decision == "exact"


def patches_of_a_signal(x: Tensor) -> tuple[Tensor, Tensor]:
    key = x.view(BATCH, TOKENS, DIM)
    return attend(key, key, key), key


def patches_of_an_image(image: Tensor) -> tuple[Tensor, Tensor]:
    x = image.view(BATCH, 3, 5, 4, 6, 4).permute(0, 2, 4, 1, 3, 5).reshape(BATCH, 30, 48)
    return attend(x, x, x), x


@pytest.mark.parametrize(
    ("call", "shape", "tokens"),
    [
        (patches_of_a_signal, (BATCH, TOKENS * DIM), TOKENS),
        (patches_of_an_image, (BATCH, 3, 20, 24), 30),
    ],
)
def test_parts_of_an_input_are_tokens_and_no_heads(call, shape, tokens: int) -> None:
    class Call(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return call(x)

    site = only_site(Call(), torch.randn(shape))
    assert sizes(site) == (1, 1, tokens, tokens)
    assert site.decision == "exact"


class SingleHeadOfPatches(nn.Module):
    """A layer of one head right after an image is cut into patches."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(48, 48) for _ in range(3))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = image.view(BATCH, 3, 5, 4, 6, 4).permute(0, 2, 4, 1, 3, 5).reshape(BATCH, 30, 48)
        return attend(self.query(x), self.key(x), self.value(x)), x


def test_patches_before_a_layer_of_one_head_are_no_heads() -> None:
    site = only_site(SingleHeadOfPatches(), torch.randn(BATCH, 3, 20, 24))
    assert sizes(site) == (1, 1, 30, 30)


class Rotated(nn.Module):
    """Rotary positions: halves or pairs of features are joined anew, for a part of them or all."""

    def __init__(self, pairs: bool, rotated: int) -> None:
        super().__init__()
        self.query, self.key, self.value = Linear(), Linear(), Linear()
        self.pairs, self.rotated = pairs, rotated

    def _turned(self, x: Tensor) -> Tensor:
        turned, rest = x[..., : self.rotated], x[..., self.rotated :]
        angle = torch.arange(x.shape[2])[:, None] / (1.0 + torch.arange(self.rotated // 2))
        if self.pairs:
            cos, sin = angle.cos(), angle.sin()
            a, b = turned[..., ::2], turned[..., 1::2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        else:
            cos, sin = (torch.cat((each, each), -1) for each in (angle.cos(), angle.sin()))
            a, b = turned.chunk(2, -1)
            turned = cos * turned + torch.cat((-b, a), -1) * sin
        return torch.cat((turned, rest), -1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        key = self._turned(self.key(x))
        return attend(self._turned(self.query(x)), key, self.value(x)), key


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("rotated", [4, 8])
def test_rotated_features_are_no_heads(pairs: bool, rotated: int) -> None:
    site = only_site(Rotated(pairs, rotated), torch.randn(BATCH, TOKENS, WIDTH))
    assert sizes(site) == (HEADS, HEADS, TOKENS, TOKENS)


class Channels(nn.Module):
    """Channels that attend to each other, some of them made by another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24)
        self.some, self.others = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        key = torch.cat((self.some(x), self.others(x)), -1)
        return attend(self.query(x).mT, key.mT, self.value(x).mT)


def test_channels_of_several_layers_are_no_tokens() -> None:
    report = lychee_compile.explain(Channels().eval(), torch.randn(BATCH, TOKENS, WIDTH))
    assert not report.sites
    assert "over features" in report.rejections()[0]


class Grouped(nn.Module):
    """Query heads that share a KV head, and a learned query in front of those of the tokens."""

    def __init__(self, kv_heads: int) -> None:
        super().__init__()
        self.kv_heads, self.token = kv_heads, parameter(WIDTH)
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key, self.value = (nn.Linear(WIDTH, kv_heads * DIM) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat((self.token.view(1, 1, -1).repeat(len(x), 1, 1), x), 1)
        query = self.query(x).view(*x.shape[:2], self.kv_heads, -1, DIM).permute(0, 2, 3, 1, 4)
        key, value = (
            layer(x).view(*x.shape[:2], self.kv_heads, 1, DIM).permute(0, 2, 3, 1, 4)
            for layer in (self.key, self.value)
        )
        return attend(query, key, value), key


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_heads_that_share_keys_are_no_queries(kv_heads: int) -> None:
    site = only_site(Grouped(kv_heads), torch.randn(BATCH, TOKENS, WIDTH))
    assert sizes(site) == (HEADS, kv_heads, TOKENS + 1, TOKENS + 1)
    assert site.decision == "exact"
