"""A gated feed-forward block with LoRA adapters as one differentiable operation: down(act(gate(x)) · up(x)).

Kept for the backward are x and the outputs g and u of gate and up; their product is made again. With h = act(g)·u and
dh its gradient, dg = dh·u·act'(g) and du = dh·act(g).

On a GPU the passes over [T, F] are what costs, beside the products with frozen weights. There are two, and adapters
have none of their own: what they add to g, u and dh is added where these are read, never stored, and the gradients of
the adapters that are F wide are summed while their factors are at hand. dg and du take the place of g and u.

Shapes: T tokens, K inputs, F width of the block, R ranks of gate and up together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from qlora.kernels import lora_linears
from qlora.kernels.lora_linears import Copies, FrozenLinear, Source, kept_input

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without Triton
    triton = None

Activation = Literal["silu", "gelu_tanh"]
# Tokens and columns that a program holds at a time, forwards and backwards.
FORWARD_TILE, TILE = (64, 32), (64, 64)
# Tiles that a backward has under way: one is computed while the next ones are read.
STAGES = 3
# Programs of a backward that a multiprocessor runs at a time.
RESIDENT = 2
# Of the row of an adapter that a tile can be multiplied with in registers; larger ones have passes of their own.
MOST_RANK_BYTES = 128

_for_backward_alone = False


@contextmanager
def for_backward_alone() -> Iterator[None]:
    """Blocks that run in here keep what their backward needs, and give NaNs instead of the product with down.

    For a forward that is computed again; whether anything needs the output then, its caller finds out by the NaNs.
    """
    global _for_backward_alone
    _for_backward_alone = True
    try:
        yield
    finally:
        _for_backward_alone = False


def gated_mlp(
    x_TK: torch.Tensor,
    linears: tuple[FrozenLinear, FrozenLinear, FrozenLinear],
    adapters: Sequence[tuple[torch.Tensor, torch.Tensor]],
    activation: Activation,
    source: Source | None = None,
    copies: tuple[Copies, Copies] | None = None,
) -> torch.Tensor:
    """[T, K] of gate, up and down, and their (A, B), as `lora_linears` takes them; copies of the first two, of down."""
    matrices = [matrix for pair in adapters for matrix in pair]
    if copies is None:
        plain = [matrix.detach() for matrix in matrices]
        first, last = Copies.of(plain[:4], linears[:2], x_TK.dtype), Copies.of(plain[4:], linears[2:], x_TK.dtype)
        copies = first, last
    return _GatedMlp.apply(x_TK, linears, activation, copies, source, *matrices)


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TK: torch.Tensor,
        linears: tuple[FrozenLinear, FrozenLinear, FrozenLinear],
        activation: Activation,
        copies: tuple[Copies, Copies],
        source: Source | None,
        *matrices: torch.Tensor,
    ) -> torch.Tensor:
        first, last = copies
        inner_TR = x_TK @ first.down_RK.T
        gate_TF, up_TF = lora_linears.products(x_TK, linears[:2])
        if _adds(gate_TF, copies):
            hidden_TF = _gated_with_triton(gate_TF, up_TF, activation, inner_TR, first)
        else:
            lora_linears.add_adapters_((gate_TF, up_TF), inner_TR, first)
            hidden_TF = gated(gate_TF, up_TF, activation)
        inner_Tr = hidden_TF @ last.down_RK.T
        ctx.save_for_backward(gate_TF, up_TF, inner_TR, inner_Tr, *kept_input(x_TK, source))
        ctx.linears, ctx.activation, ctx.copies = linears, activation, copies
        ctx.dtype, ctx.spent = matrices[0].dtype, False
        if _for_backward_alone:
            return x_TK.new_full((1, 1), math.nan).expand(len(x_TK), linears[2].weight.shape[0])
        (output_TK,) = lora_linears.products(hidden_TF, linears[2:])
        lora_linears.add_adapters_((output_TK,), inner_Tr, last)
        return output_TK

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError("a gated block goes backwards once: its gradients take the place of what was kept")
        ctx.spent = True
        gate_TF, up_TF, inner_TR, inner_Tr, *kept = ctx.saved_tensors
        linears, activation, (first, last), dtype = ctx.linears, ctx.activation, ctx.copies, ctx.dtype
        u_Tr = lora_linears.into_ranks(grads, last)
        of_last_up = lora_linears.gradients_of_ups(grads, inner_Tr, linears[2:], last, dtype)
        if _adds(gate_TF, ctx.copies):
            grad_TF = lora_linears.gradient_of_input(grads, None, linears[2:], last)
            grads_TF, of_ups, of_last_down = _all_gradients(
                gate_TF, up_TF, grad_TF, activation, inner_TR, first, u_Tr, last
            )
            of_ups = [of_up.mul_(linear.scaling).to(dtype) for of_up, linear in zip(of_ups, linears[:2], strict=True)]
            of_last_down = of_last_down.to(dtype)
        else:
            grad_TF = lora_linears.gradient_of_input(grads, u_Tr, linears[2:], last)
            hidden_TF = gated(gate_TF, up_TF, activation)
            (of_last_down,) = lora_linears.gradients_of_downs(u_Tr, [hidden_TF], last, dtype)
            del hidden_TF
            grads_TF = gated_gradients(gate_TF, up_TF, grad_TF, activation)
            of_ups = lora_linears.gradients_of_ups(grads_TF, inner_TR, linears[:2], first, dtype)
        del grad_TF
        u_TR = lora_linears.into_ranks(grads_TF, first)
        grad_x_TK = None
        if ctx.needs_input_grad[0]:
            grad_x_TK = lora_linears.gradient_of_input(grads_TF, u_TR, linears[:2], first)
        of_downs = lora_linears.gradients_of_downs(u_TR, kept, first, dtype)
        of_matrices = lora_linears.in_pairs([*of_downs, of_last_down], [*of_ups, *of_last_up])
        return grad_x_TK, None, None, None, None, *of_matrices


def gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """act(g)·u of [T, F], computed in fp32 or better, in the dtype of g."""
    if gate.is_cuda and triton is not None:
        return _gated_with_triton(gate, up, activation)
    act, _ = _activation(gate, activation)
    return (act * up).to(gate.dtype)


def gated_gradients(
    gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dg, du) from dh, all [T, F]."""
    if gate.is_cuda and triton is not None:
        return _gradients_with_triton(gate, up, grad, activation)
    act, slope = _activation(gate, activation)
    return (grad * up * slope).to(gate.dtype), (grad * act).to(gate.dtype)


def _activation(x: torch.Tensor, activation: Activation) -> tuple[torch.Tensor, torch.Tensor]:
    """(act(x), act'(x)) in fp32 or better."""
    x = x if x.dtype == torch.float64 else x.float()
    if activation == "silu":
        share = torch.sigmoid(x)
        return x * share, share * (1 + x * (1 - share))
    # GELU in its tanh form: x·σ(2z), z = √(2/π)·(x + 0.044715·x³).
    share = torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    slope = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
    return x * share, share * (1 + x * (1 - share) * slope)


def _adds(x: torch.Tensor, copies: Sequence[Copies]) -> bool:
    """Whether the kernels add what adapters add."""
    ranks = [up.shape[1] for some in copies for up in some.ups]
    return x.is_cuda and triton is not None and max(ranks) * x.element_size() <= MOST_RANK_BYTES


def _gated_with_triton(
    gate_TF: torch.Tensor,
    up_TF: torch.Tensor,
    activation: Activation,
    inner_TR: torch.Tensor | None = None,
    copies: Copies | None = None,
) -> torch.Tensor:
    """inner, copies: what adapters of gate and up have yet to add."""
    tokens, width = gate_TF.shape
    out_TF = torch.empty_like(gate_TF)
    ups = (gate_TF, gate_TF) if copies is None else copies.ups
    ranks = (0, 0) if copies is None else tuple(up.shape[1] for up in ups)
    grid = (triton.cdiv(width, FORWARD_TILE[1]), triton.cdiv(tokens, FORWARD_TILE[0]))
    _gated_kernel[grid](
        gate_TF, up_TF, out_TF, gate_TF if inner_TR is None else inner_TR, *ups, tokens, width,
        GATE_RANK=ranks[0], UP_RANK=ranks[1], RANKS=_room(ranks),
        SILU=activation == "silu", TOKENS=FORWARD_TILE[0], COLUMNS=FORWARD_TILE[1],
    )  # fmt: skip
    return out_TF


def _gradients_with_triton(
    gate_TF: torch.Tensor, up_TF: torch.Tensor, grad_TF: torch.Tensor, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor]:
    of_gate_TF, of_up_TF = torch.empty_like(gate_TF), torch.empty_like(up_TF)
    tokens, width = gate_TF.shape
    grid = (triton.cdiv(width, TILE[1]), triton.cdiv(tokens, TILE[0]))
    unused = [gate_TF] * 6
    _gradients_kernel[grid](
        gate_TF, up_TF, grad_TF.contiguous(), of_gate_TF, of_up_TF, *unused, tokens, width, TILE[0],
        GATE_RANK=0, UP_RANK=0, DOWN_RANK=0, RANKS=0,
        SILU=activation == "silu", TOKENS=TILE[0], COLUMNS=TILE[1], STAGES=1,
    )  # fmt: skip
    return of_gate_TF, of_up_TF


def _all_gradients(
    gate_TF: torch.Tensor,
    up_TF: torch.Tensor,
    grad_TF: torch.Tensor,
    activation: Activation,
    inner_TR: torch.Tensor,
    first: Copies,
    u_Tr: torch.Tensor,
    last: Copies,
) -> tuple[tuple[torch.Tensor, torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """((dg, du) in the memory of g and u, [dB of gate and of up] not scaled yet, dA of down), the last ones in fp32.

    From g, u and dh without what adapters add: inner [T, R] is theirs of gate and up, u [T, r] of down.
    """
    tokens, width = gate_TF.shape
    ranks = (*(up.shape[1] for up in first.ups), last.down_RK.shape[0])
    room = _room(ranks)
    columns = triton.cdiv(width, TILE[1])
    tiles = _tiles_each(triton.cdiv(tokens, TILE[0]), columns, gate_TF.device)
    programs, each = triton.cdiv(tokens, tiles * TILE[0]), tiles * TILE[0]
    sums = torch.empty(programs, 3, width, room, dtype=torch.float32, device=gate_TF.device)
    _gradients_kernel[(columns, programs)](
        gate_TF, up_TF, grad_TF.contiguous(), gate_TF, up_TF, inner_TR, *first.ups, u_Tr, last.down_RK, sums,
        tokens, width, each,
        GATE_RANK=ranks[0], UP_RANK=ranks[1], DOWN_RANK=ranks[2], RANKS=room,
        SILU=activation == "silu", TOKENS=TILE[0], COLUMNS=TILE[1], STAGES=STAGES,
        num_warps=4 if room == 16 else 8,
    )  # fmt: skip
    of_gate, of_up, of_down = sums.sum(0)
    of_ups = [of_gate[:, : ranks[0]], of_up[:, : ranks[1]]]
    return (gate_TF, up_TF), of_ups, of_down.view(room, width)[: ranks[2]]


def _tiles_each(tiles: int, columns: int, device: torch.device) -> int:
    """How many tiles of tokens one program takes, so that the last programs to run leave few multiprocessors idle."""
    slots = RESIDENT * torch.cuda.get_device_properties(device).multi_processor_count

    def duration(each: int) -> int:  # a tile of each for a start and an end
        return -(-columns * -(-tiles // each) // slots) * (each + 1)

    return min(range(1, tiles + 1), key=duration)


def _room(ranks: Sequence[int]) -> int:
    """Of each adapter in a product of tiles, which has 16 rows or more; 0 for none."""
    return max(16, triton.next_power_of_2(max(ranks))) if any(ranks) else 0


if triton is not None:

    @triton.jit
    def _act(x, SILU: tl.constexpr):
        """(act(x), act'(x)) of fp32."""
        if SILU:
            share = tl.sigmoid(x)
            return x * share, share * (1 + x * (1 - share))
        else:
            share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
            slope = 1.5957691216057308 * (1 + 0.134145 * x * x)
            return x * share, share * (1 + x * (1 - share) * slope)

    @triton.jit
    def _inner(ptr, token, stride, tokens, RANK: tl.constexpr, RANKS: tl.constexpr):
        """[TOKENS, RANKS], of which RANK exist."""
        rank = tl.arange(0, RANKS)[None, :]
        at = token.to(tl.int64)[:, None] * stride + rank
        return tl.load(ptr + at, mask=(token < tokens)[:, None] & (rank < RANK), other=0.0)

    @triton.jit
    def _up(ptr, column, width, RANK: tl.constexpr, RANKS: tl.constexpr):
        """[RANKS, COLUMNS] of B [F, RANK]."""
        rank = tl.arange(0, RANKS)[:, None]
        return tl.load(ptr + column[None, :] * RANK + rank, mask=(column < width)[None, :] & (rank < RANK), other=0.0)

    @triton.jit(do_not_specialize=["tokens"])
    def _gated_kernel(
        gate_ptr, up_ptr, out_ptr, inner_ptr, gate_up_ptr, up_up_ptr, tokens, width,
        GATE_RANK: tl.constexpr, UP_RANK: tl.constexpr, RANKS: tl.constexpr,
        SILU: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """A tile of act(g)·u."""
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
        at = token.to(tl.int64)[:, None] * width + column[None, :]
        inside = (token < tokens)[:, None] & (column < width)[None, :]
        gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if RANKS > 0:
            of_gate = _inner(inner_ptr, token, GATE_RANK + UP_RANK, tokens, GATE_RANK, RANKS)
            of_up = _inner(inner_ptr + GATE_RANK, token, GATE_RANK + UP_RANK, tokens, UP_RANK, RANKS)
            gate += tl.dot(of_gate, _up(gate_up_ptr, column, width, GATE_RANK, RANKS), input_precision="ieee")
            up += tl.dot(of_up, _up(up_up_ptr, column, width, UP_RANK, RANKS), input_precision="ieee")
        act, _ = _act(gate, SILU)
        tl.store(out_ptr + at, (act * up).to(out_ptr.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=["tokens", "each"])
    def _gradients_kernel(
        gate_ptr, up_ptr, grad_ptr, of_gate_ptr, of_up_ptr,
        inner_ptr, gate_up_ptr, up_up_ptr, u_ptr, down_ptr, sums_ptr, tokens, width, each,
        GATE_RANK: tl.constexpr, UP_RANK: tl.constexpr, DOWN_RANK: tl.constexpr, RANKS: tl.constexpr,
        SILU: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """Some columns of `each` tokens, tile by tile: dg and du, and the sums over tokens for dB and dA."""
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        dtype = of_gate_ptr.dtype.element_ty
        if RANKS > 0:
            rank = tl.arange(0, RANKS)
            gate_up = _up(gate_up_ptr, column, width, GATE_RANK, RANKS)
            up_up = _up(up_up_ptr, column, width, UP_RANK, RANKS)
            down_at = rank[:, None] * width + column[None, :]
            down_inside = (rank < DOWN_RANK)[:, None] & (column < width)[None, :]
            down = tl.load(down_ptr + down_at, mask=down_inside, other=0.0)
            sum_gate = tl.zeros((RANKS, COLUMNS), tl.float32)
            sum_up = tl.zeros((RANKS, COLUMNS), tl.float32)
            sum_down = tl.zeros((RANKS, COLUMNS), tl.float32)
        first = tl.program_id(1) * each
        for start in tl.range(first, min(first + each, tokens), TOKENS, num_stages=STAGES):
            token = start + tl.arange(0, TOKENS)
            at = token.to(tl.int64)[:, None] * width + column[None, :]
            inside = (token < tokens)[:, None] & (column < width)[None, :]
            gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
            up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
            grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
            if RANKS > 0:
                inner_gate = _inner(inner_ptr, token, GATE_RANK + UP_RANK, tokens, GATE_RANK, RANKS)
                inner_up = _inner(inner_ptr + GATE_RANK, token, GATE_RANK + UP_RANK, tokens, UP_RANK, RANKS)
                u = _inner(u_ptr, token, DOWN_RANK, tokens, DOWN_RANK, RANKS)
                gate += tl.dot(inner_gate, gate_up, input_precision="ieee")
                up += tl.dot(inner_up, up_up, input_precision="ieee")
                grad += tl.dot(u, down, input_precision="ieee")
            act, slope = _act(gate, SILU)
            of_gate = (grad * up * slope).to(dtype)
            of_up = (grad * act).to(dtype)
            tl.store(of_gate_ptr + at, of_gate, mask=inside)
            tl.store(of_up_ptr + at, of_up, mask=inside)
            if RANKS > 0:
                sum_gate += tl.dot(tl.trans(inner_gate), of_gate, input_precision="ieee")
                sum_up += tl.dot(tl.trans(inner_up), of_up, input_precision="ieee")
                sum_down += tl.dot(tl.trans(u), (act * up).to(dtype), input_precision="ieee")
        if RANKS > 0:
            place = column[None, :] * RANKS + rank[:, None]
            sums_ptr += tl.program_id(1).to(tl.int64) * 3 * width * RANKS
            tl.store(sums_ptr + place, sum_gate, mask=(column < width)[None, :])
            tl.store(sums_ptr + width * RANKS + place, sum_up, mask=(column < width)[None, :])
            tl.store(sums_ptr + 2 * width * RANKS + down_at, sum_down, mask=(column < width)[None, :])
