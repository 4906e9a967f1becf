"""Calls that tracing does not follow by itself: checkpoints, and writes through `.data`."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lychee_compile

pytestmark = pytest.mark.usefixtures("without_inductor")
READ_ALL = {"prefill": "sparse", "prefill_from": 0, "prefill_budget": 2**30}


def attention(query, key, value):
    return (query @ key.mT).softmax(-1) @ value


def scaled(query, key, value):
    return attention(query * 0.5, key, value) + 1


def checkpointed(query, key, value):
    return checkpoint(attention, query, key, value, use_reentrant=False)


def twice(query, key, value):
    return checkpointed(checkpoint(scaled, query, key, value, use_reentrant=False), key, value)


def nested(query, key, value):
    return checkpoint(checkpointed, query, key, value, use_reentrant=False)


@pytest.mark.parametrize(("function", "count"), [(checkpointed, 1), (twice, 2), (nested, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_in_a_checkpoint_is_found(function, count, dtype):
    inputs = [torch.randn(2, 3, 12, 16, dtype=dtype) for _ in range(3)]
    with torch.no_grad():
        output = torch.compile(function, backend="lychee", options=READ_ALL)(*inputs)
        torch.testing.assert_close(output, function(*inputs))
    (report,) = lychee_compile.reports()
    assert len(report.sites) == count


def test_gradients_through_a_checkpoint_are_those_of_eager():
    inputs = [torch.randn(2, 3, 12, 16, requires_grad=True) for _ in range(3)]
    compiled = torch.compile(checkpointed, backend="lychee", options=READ_ALL)
    gradients = [
        torch.autograd.grad(each(*inputs).square().sum(), inputs)
        for each in (compiled, checkpointed)
    ]
    torch.testing.assert_close(*gradients)
    (report,) = lychee_compile.reports()
    assert [site.reason.code for site in report.sites] == ["gradients"]


class Remembering(nn.Module):
    """Attention that writes its buffers through `.data`, as modules of k-means do."""

    def __init__(self, *, read_again):
        super().__init__()
        self.read_again = read_again
        self.register_buffer("flag", torch.tensor(False))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, hidden):
        self.mean.data.copy_(hidden[0])
        self.flag.data.copy_(torch.tensor(True))
        if self.read_again:
            hidden = hidden + self.mean
        return attention(hidden, hidden, hidden)


@pytest.mark.parametrize("read_again", [False, True])
@pytest.mark.parametrize("options", [{}, READ_ALL])
def test_writes_through_data_are_done(read_again, options, caplog):
    model, eager = Remembering(read_again=read_again), Remembering(read_again=read_again)
    compiled = torch.compile(model, backend="lychee", options=options)
    with torch.no_grad():
        caplog.set_level("WARNING")
        for _ in range(2):
            hidden = torch.randn(5, 4)
            torch.testing.assert_close(compiled(hidden), eager(hidden))
            assert model.flag
            assert torch.equal(model.mean, eager.mean)
    assert not [each for each in caplog.records if each.name.startswith("lychee_compile")]
    assert len(lychee_compile.reports()[0].sites) == 1
