"""Continuous batching over pages of 8-bit numbers: requests come, share a prefix, and leave.

    python examples/serving.py

A server has a fixed number of rows, and one compiled function decodes a token of each. Keys and
values lie in pages of 16 tokens, int8 with a scale for each token and head. A table lists the pages
of each row. Requests that begin with the same text list the same pages for it. Nothing here knows
of lychee; `backend="lychee"` is all that changes. The example serves the same requests by
`torch.compile` alone and by lychee, and decodes each of them alone and uncompiled to compare. A
prompt is indexed at the first step behind it, or behind the next; other rows keep their index. On a
CPU sparse steps pay in contexts of some 8,000 tokens, if answers are long.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lychee_compile

VOCABULARY, GROUP, PAGE = 256, 4, 16


class Pages(nn.Module):
    """Keys or values of one layer: pages of int8, and a scale for each token and head."""

    def __init__(self, count: int, heads: int, head_dim: int) -> None:
        super().__init__()
        numbers = torch.zeros(count, heads, PAGE, head_dim, dtype=torch.int8)
        self.register_buffer("numbers", numbers, persistent=False)
        self.register_buffer("scales", torch.zeros(count, heads, PAGE, 1), persistent=False)

    def update(self, new: Tensor, positions: Tensor, table: Tensor) -> Tensor:
        """Write new [B, Hkv, T, D] at `positions` [B, T]; return all that `table` [B, P] lists."""
        rows = torch.arange(len(table), device=table.device)[:, None]
        page, slot = table[rows, positions // PAGE], positions % PAGE
        scale = (new.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-6)
        self.numbers[page, :, slot] = (new / scale).round().to(torch.int8).transpose(1, 2)
        self.scales[page, :, slot] = scale.transpose(1, 2).to(self.scales.dtype)
        found = self.numbers[table].to(new.dtype) * self.scales[table].to(new.dtype)
        return found.transpose(1, 2).flatten(2, 3)  # [B, Hkv, P * PAGE, D]


class Block(nn.Module):
    """Grouped-query attention over pages and a gated feed-forward layer."""

    def __init__(self, width: int, pages: int) -> None:
        super().__init__()
        self.head_dim = min(width // 8, 128)
        self.sizes = [width, width // GROUP, width // GROUP]
        self.query_key_value = nn.Linear(width, sum(self.sizes), bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.norm_1, self.norm_2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.gate_up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)
        heads = width // self.head_dim // GROUP
        self.keys, self.values = (Pages(pages, heads, self.head_dim) for _ in range(2))

    def forward(self, x: Tensor, positions: Tensor, table: Tensor) -> Tensor:
        """Map x [B, T, width] at `positions` [B, T] to the same shape."""
        q, k, v = (
            each.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for each in self.query_key_value(self.norm_1(x)).split(self.sizes, dim=-1)
        )
        k = self.keys.update(rotate(k, positions), positions, table)
        v = self.values.update(v, positions, table)
        seen = torch.arange(k.shape[2], device=x.device) <= positions[:, None, :, None]
        y = F.scaled_dot_product_attention(
            rotate(q, positions), k, v, attn_mask=seen, enable_gqa=True
        )
        x = x + self.project(y.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm_2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Turn pairs of features of x [B, H, T, D] by angles that grow with `positions` [B, T]."""
    half = torch.arange(0, x.shape[-1], 2, device=x.device) / x.shape[-1]
    angles = positions[:, None, :, None] * 10000.0**-half
    a, b = x.float().chunk(2, -1)
    turned = a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()
    return torch.cat(turned, -1).to(x.dtype)


class Decoder(nn.Module):
    """Decoder of token ids to the likeliest next token."""

    def __init__(self, width: int, layers: int, pages: int) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Block(width, pages) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor, positions: Tensor, table: Tensor) -> Tensor:
        """Return the token, int64 [B, 1], after the last of `ids` [B, T] at `positions` [B, T]."""
        x = self.words(ids)
        for layer in self.layers:
            x = layer(x, positions, table)
        return self.head(self.norm(x[:, -1:])).argmax(-1)


@dataclass
class Request:
    """A prompt, of which the first `shared` tokens are those of others, and its answer."""

    prompt: Tensor
    shared: int
    new: int
    said: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)


Step = Callable[[Tensor, Tensor, Tensor], Tensor]


class Server:
    """Rows that decode together, their pages, and the requests that wait for a row.

    An idle row writes to the page of its own number.
    """

    def __init__(self, model: Decoder, rows: int, pages: int, longest: int, device: str) -> None:
        self.model, self.rows = model, rows
        self.free = list(range(rows, pages))
        self.prefix: list[int] = []
        own = torch.arange(rows, device=device)[:, None]
        self.idle = own.expand(rows, -(-longest // PAGE)).clone()
        self.table, self.ids = self.idle.clone(), torch.zeros_like(own)
        self.positions = torch.zeros_like(own)
        self.active: dict[int, Request] = {}
        self.seconds: list[float] = []

    def serve(self, requests: Sequence[Request], step: Step) -> None:
        """Answer all requests, as many at a time as there are rows."""
        waiting = list(requests)
        while waiting or self.active:
            for row in range(self.rows):
                if waiting and row not in self.active and self.admit(row, waiting[0]):
                    waiting.pop(0)
            self.decode(step)

    def admit(self, row: int, request: Request) -> bool:
        """Give a request a row and pages, and read its prompt; False if too few pages are free."""
        shared = self.prefix[: request.shared // PAGE]
        count = -(-(len(request.prompt) + request.new) // PAGE)
        if len(self.free) < count - len(shared):
            return False
        fresh = [self.free.pop(0) for _ in range(count - len(shared))]
        read = len(shared) * PAGE
        if request.shared and not shared:  # the first that has this text: its pages stay
            shared = self.prefix = [fresh.pop(0) for _ in range(request.shared // PAGE)]
        request.pages = fresh
        self.table[row, :count] = torch.tensor([*shared, *fresh], device=self.table.device)
        positions = torch.arange(read, len(request.prompt), device=self.table.device)[None]
        token = self.model(request.prompt[None, read:], positions, self.table[row : row + 1])
        self.ids[row], self.positions[row] = token[0], len(request.prompt)
        request.said.append(int(token))
        self.active[row] = request
        return True

    def decode(self, step: Step) -> None:
        """Decode one token of each row, and let requests leave that have all of theirs."""
        started = time.perf_counter()
        tokens = step(self.ids, self.positions, self.table).clone()
        said = tokens.flatten().tolist()
        self.seconds.append(time.perf_counter() - started)
        for row, request in list(self.active.items()):
            request.said.append(said[row])
            self.ids[row] = tokens[row]
            self.positions[row] += 1
            if len(request.said) >= request.new:
                del self.active[row]
                self.free += request.pages
                self.table[row], self.positions[row], self.ids[row] = self.idle[row], 0, 0


def some_requests(chosen: argparse.Namespace) -> list[Request]:
    """Return requests of several lengths; two of three begin with the same text."""
    generator = torch.Generator().manual_seed(1)
    prefix = torch.randint(VOCABULARY, (chosen.prefix,), generator=generator)
    requests = []
    for number in range(chosen.requests):
        own = chosen.context - chosen.prefix - (7 * number) % (chosen.context // 4)
        text = torch.randint(VOCABULARY, (own,), generator=generator)
        shared = chosen.prefix if number % 3 != 2 else 0
        prompt = torch.cat((prefix, text)) if shared else text
        requests.append(Request(prompt.to(chosen.device), shared, chosen.new_tokens - number % 3))
    return requests


@dataclass
class Served:
    """Answers to all requests in one way to decode."""

    said: list[list[int]]
    rate: float
    """Tokens of each second in steps, those included that index a new prompt."""
    step: float
    """Median seconds of a step."""


def serve(model: Decoder, chosen: argparse.Namespace, pages: int, step: Step) -> Served:
    """Serve all requests with this function for steps."""
    for _ in range(2):  # the first time compiles
        requests = some_requests(chosen)
        longest = max(len(each.prompt) + each.new for each in requests)
        server = Server(model, chosen.rows, pages, longest, chosen.device)
        server.serve(requests, step)
    count, seconds = sum(len(each.said) - 1 for each in requests), server.seconds
    said = [each.said for each in requests]
    return Served(said, count / sum(seconds), statistics.median(seconds))


def one_by_one(model: Decoder, chosen: argparse.Namespace, pages: int) -> list[list[int]]:
    """Return the answers to all requests, each alone and decoded densely, uncompiled."""
    requests = some_requests(chosen)
    for request in requests:
        request.shared = 0
        longest = len(request.prompt) + request.new
        Server(model, 1, pages, longest, chosen.device).serve([request], model)
    return [each.said for each in requests]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add, device = parser.add_argument, "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="cpu or cuda (%(default)s)")
    add("--rows", type=int, default=4, metavar="N", help="rows of the server (%(default)s)")
    add("--requests", type=int, default=6, metavar="N", help="(%(default)s)")
    add("--prefix", type=int, default=6144, metavar="N", help="tokens shared (%(default)s)")
    add("--context", type=int, default=8192, metavar="N", help="longest prompt (%(default)s)")
    add("--new-tokens", type=int, default=64, metavar="N", help="longest answer (%(default)s)")
    add("--budget", type=int, default=512, metavar="N", help="tokens read per step (%(default)s)")
    add("--width", type=int, default=512, metavar="N", help="hidden size (%(default)s)")
    add("--layers", type=int, default=2, metavar="N", help="(%(default)s)")
    add("--no-dense", action="store_true", help="do not serve by torch.compile alone as well")
    chosen = parser.parse_args(arguments)
    least = max(-(-4 * chosen.prefix // 3), 4)  # prompts are up to a quarter shorter
    if chosen.context < least:
        parser.error(f"--context {chosen.context}: at least {least} for --prefix {chosen.prefix}")
    return chosen


@dataclass
class Compared:
    """Answers and rates in all ways, and what became of each attention."""

    alone: list[list[int]]
    served: dict[str, Served]
    decisions: list[str]


@torch.no_grad()
def main(arguments: Sequence[str] = ()) -> Compared:
    """Serve densely and sparsely, decode one by one, and compare."""
    chosen = parse(arguments)
    torch.manual_seed(0)
    pages = chosen.rows + (chosen.rows + 1) * -(-(chosen.context + chosen.new_tokens) // PAGE)
    dtype = torch.bfloat16 if chosen.device == "cuda" else torch.float32
    model = Decoder(chosen.width, chosen.layers, pages).eval().to(chosen.device, dtype)
    for layer in model.layers:  # random queries attend to all alike, as trained ones do not
        layer.query_key_value.weight[: chosen.width] *= 12
    mode = "reduce-overhead" if chosen.device == "cuda" else None
    options = {"budget": chosen.budget, "mode": mode}
    served = {}
    if not chosen.no_dense:
        print(f"Serving {chosen.requests} requests twice by torch.compile: the first time compiles")
        step = torch.compile(model, fullgraph=True, mode=mode)
        served["torch.compile"] = serve(model, chosen, pages, step)
    print(f"Serving {chosen.requests} requests twice by lychee")
    step = torch.compile(model, backend="lychee", fullgraph=True, options=options)
    served["lychee"] = serve(model, chosen, pages, step)
    decisions = [site.decision for site in lychee_compile.reports()[-1].sites]
    print("Decoding each request alone, densely")
    result = Compared(one_by_one(model, chosen, pages), served, decisions)
    show(result, chosen)
    return result


def show(result: Compared, chosen: argparse.Namespace) -> None:
    """Print the report, and how fast and how well each way has answered."""
    print(lychee_compile.reports()[-1])
    for name, served in result.served.items():
        same = sum(ours == theirs for ours, theirs in zip(served.said, result.alone, strict=True))
        print(
            f"{name:>13}: {served.rate:8.1f} tokens a second by {chosen.rows} rows, "
            f"{1e3 * served.step:.2f} ms a step in the median; {same} of {chosen.requests} answers "
            "are those of dense decoding one by one"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
