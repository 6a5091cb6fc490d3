"""Training's fused path: what LoRA layers and gated feed-forward blocks of a PEFT model compute, in fewer passes.

`fuse` gives modules another forward, here and nowhere else; parameters, names and files stay PEFT's. Linears of one
input (q, k and v; gate and up) run together when the first of them is called, and the others hand out what that call
left for them. A feed-forward block is fused whole when, on random inputs, that gives what its own forward gives. What
is not covered keeps its forward, and is named: layers with dropout, DoRA, a bias in the adapter, other quantization.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from bitsandbytes.nn import Linear8bitLt
from peft.tuners.lora import LoraLayer
from peft.utils import TrainableTokensWrapper
from torch import nn
from transformers.activations import GELUTanh, SiLUActivation
from transformers.modeling_outputs import CausalLMOutputWithPast

from qlora.kernels.float8 import Float8Weight, takes
from qlora.kernels.gated_mlp import Activation, gated_mlp
from qlora.kernels.head_loss import head_loss
from qlora.kernels.lora_linears import Copies, FrozenLinear, free_buffers, lora_linears
from qlora.kernels.norms import SOURCE, fuse_rms_norms
from qlora.kernels.rotary import learns
from qlora.models.frozen import QUANTIZED, compute_dtype, dense_weight, is_known, kernel_weight
from qlora.models.rotary_functions import replace_rotary
from qlora.models.tokens import learned_rows, row_ids
from qlora.training.residual import ADDS_RESIDUAL, fuse_layers

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
BLOCK = ("gate_proj", "up_proj", "down_proj")
# What a batch says to a fused head: tokens to predict, and the positions that predict them.
HEAD_INPUTS = ("targets", "predicting")
# Relative, of a block against its own forward: two orders of rounding in the dtype.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.005}
TOLERANCE_OF_FLOAT8 = 0.15


@dataclass(frozen=True)
class Fused:
    """What `fuse` did."""

    linears: int
    """Adapter layers on the fused path."""
    blocks: int
    """Feed-forward blocks fused whole; their linears count above too."""
    norms: int
    """RMS norms in one kernel; what reads their output keeps their input in its place."""
    residuals: int
    """Decoder layers whose additions are in the norms' kernels."""
    plain: dict[str, int]
    """Why adapter layers keep PEFT's forward → how many."""
    layers: Sequence[_Layer] = field(repr=False)

    def keep_dense(self, share: float = 1.0) -> None:
        """Keep the first of the quantized weights in what products take too: the same, and not dequantized again."""
        dense = self.layers[: round(share * len(self.layers))]
        for layer in dense:
            layer.keep_dense()
        if len(dense) == len(self.layers):
            free_buffers()


def fuse(model: nn.Module, *, float8: bool = False) -> Fused:
    """Put the adapter layers of a PEFT model with one adapter on the fused path, where they can be.

    float8: their products with frozen weights in 8 bits.
    """
    plain: Counter[str] = Counter()
    linears = blocks = 0
    every: list[_Layer] = []
    copies = _AdapterCopies()
    tolerance = TOLERANCE_OF_FLOAT8 if float8 else None
    fuse_rotary(model)
    norms = fuse_rms_norms(model, device=next(model.parameters()).device.type, note_source=True)
    for parent in list(model.modules()):
        children = {name: child for name, child in parent.named_children() if isinstance(child, LoraLayer)}
        reasons = {name: reason for name, child in children.items() if (reason := obstacle(child))}
        plain.update(reasons.values())
        layers = {name: _Layer(child, float8) for name, child in children.items() if name not in reasons}
        linears += len(layers)
        every += layers.values()
        together = [[name for name in names if name in layers] for names in SIBLINGS]
        grouped = {name for names in SIBLINGS for name in names}
        copied = {}
        for names in [*together, *([name] for name in layers if name not in grouped)]:
            members = [layers[name] for name in names]
            if members:
                copied[tuple(names)] = copies.of(members)
                _SharedInput(members, copied[tuple(names)])
        if all(name in layers for name in BLOCK):
            both = copied[BLOCK[:2]], copied[BLOCK[2:]]
            blocks += _fuse_block(parent, [layers[name] for name in BLOCK], both, tolerance)
    residuals = 0
    if linears:
        causal: Any = model.get_base_model()  # type: ignore[operator]
        residuals = fuse_layers(causal, tolerance or TOLERANCE[causal.dtype])
        # Whoever calls the model in whatever way goes through its decoder.
        getattr(causal, causal.base_model_prefix).register_forward_pre_hook(copies.refresh)
    return Fused(linears, blocks, norms, residuals, dict(plain), every)


def fuse_rotary(model: nn.Module) -> int:
    """Have training turn queries and keys in one pass, where gradients are asked for; as `replace_rotary`."""
    return replace_rotary(model, learns)


def fuse_head(model: Any) -> str | None:
    """Have a PEFT model compute its loss from `HEAD_INPUTS` where a batch has them; why not, if it cannot.

    Of a head, rows of some tokens may learn.

    The batch's other inputs, and batches without, go the model's own way.
    """
    causal = model.get_base_model()
    decoder, head = getattr(causal, causal.base_model_prefix, None), causal.get_output_embeddings()
    trained = head.token_adapter if isinstance(head, TrainableTokensWrapper) else None
    head = head if trained is None else trained.get_base_layer()
    if decoder is None or type(head) is not nn.Linear:
        return "an output head of another kind"
    if head.weight.requires_grad or head.bias is not None:
        return "an output head that learns or has a bias"
    plain = causal.forward
    ids = row_ids(trained) if trained is not None else None

    @wraps(type(causal).forward)  # by its signature transformers tells what `generate` may pass
    def forward(
        *args: Any,
        targets: torch.Tensor | None = None,
        predicting: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if targets is None or predicting is None:
            given = {"labels": labels, "num_items_in_batch": num_items_in_batch}
            return plain(*args, **kwargs, **{key: value for key, value in given.items() if value is not None})
        hidden_BTD = decoder(*args, **kwargs).last_hidden_state
        hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, predicting)
        count = torch.as_tensor(len(targets) if num_items_in_batch is None else num_items_in_batch)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            weight_VD = head.weight.to(hidden_ND.dtype)
            rows_LD = learned_rows(trained) if trained is not None else None
            learned = (ids, rows_LD.to(hidden_ND.dtype)) if ids is not None and rows_LD is not None else None
            loss = head_loss(hidden_ND, weight_VD, targets, 1 / count.clamp(min=1), learned)
        return CausalLMOutputWithPast(loss=loss)  # type: ignore[arg-type]

    ids_BT = torch.arange(8, device=head.weight.device)[None] % head.out_features
    trains = model.training
    model.eval()
    with torch.no_grad():
        expected = plain(input_ids=ids_BT).logits
        hidden_BTD = decoder(input_ids=ids_BT).last_hidden_state
        found = hidden_BTD @ head.weight.T
        if trained is not None and ids is not None:
            rows_LD = trained.trainable_tokens_delta[trained.active_adapters[0]]
            found[..., ids] = hidden_BTD @ rows_LD.to(hidden_BTD.dtype).T
    model.train(trains)
    if (found - expected).float().norm() > TOLERANCE[head.weight.dtype] * expected.float().norm():
        return "an output head that does more than multiply"
    causal.forward = forward
    return None


def obstacle(layer: LoraLayer) -> str | None:
    """Why this layer cannot take the fused path; None if it can."""
    base = layer.get_base_layer()
    if len(layer.active_adapters) != 1 or layer.active_adapters[0] not in layer.lora_A:
        return "other than one active adapter"
    (name,) = layer.active_adapters
    if name in layer.lora_variant:
        return f"a variant of LoRA ({type(layer.lora_variant[name]).__name__})"
    if not isinstance(layer.lora_dropout[name], nn.Identity):
        return "dropout"
    if layer.lora_bias.get(name):
        return "a bias in the adapter"
    if isinstance(base, Linear8bitLt):
        return "a base in int8, which bitsandbytes multiplies with in 8 bits"
    if not is_known(base):
        return f"a base layer of another kind ({type(base).__name__})"
    return None


class _Layer:
    """One adapter layer, its frozen half in the form that kernels take."""

    def __init__(self, module: Any, float8: bool) -> None:
        self.module = module
        (self._adapter,) = module.active_adapters
        self.plain: Callable[..., torch.Tensor] = self.module.forward
        base = module.get_base_layer()
        self.quantized = isinstance(base, QUANTIZED)
        self._base: Any = base
        self._float8 = float8 and takes(base.out_features, base.in_features)
        self._kept: torch.Tensor | Float8Weight | None = None

    def keep_dense(self) -> None:
        if self.quantized:
            weight = dense_weight(self._base, self.dtype)
            self._kept = Float8Weight.of(weight) if self._float8 else weight

    @property
    def frozen(self) -> FrozenLinear:
        weight = kernel_weight(self._base) if self._kept is None else self._kept
        return FrozenLinear(weight, self._base.bias, self.module.scaling[self._adapter], self._float8)

    @property
    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.module.lora_A[self._adapter].weight, self.module.lora_B[self._adapter].weight

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return compute_dtype(self._base)

    def takes(self, x: torch.Tensor) -> bool:
        """Whether the fused path computes what PEFT would for this input, as things stand."""
        dtype = self.dtype
        same_bias = self._base.bias is None or self._base.bias.dtype == dtype
        if self.module.disable_adapters or self.module.merged or list(self.module.active_adapters) != [self._adapter]:
            return False
        return x.dtype == dtype and same_bias


class _AdapterCopies:
    """Of all adapters of a model, as products want them; made in a few launches when the model's forward begins.

    They stay what the adapters are until the backward is done: nobody changes adapters in between.
    """

    def __init__(self) -> None:
        self._targets: list[torch.Tensor] = []
        self._sources: list[torch.Tensor] = []
        self._scalings: list[float] = []

    def of(self, members: Sequence[_Layer]) -> Copies:
        """Room for those of one input."""
        frozen, matrices = [member.frozen for member in members], [member.matrices for member in members]
        with torch.no_grad():
            copies = Copies.of([matrix for pair in matrices for matrix in pair], frozen, members[0].dtype)
        downs = copies.down_RK.split([down.shape[0] for down, _ in matrices])
        for (down, up), linear, target, up_target in zip(matrices, frozen, downs, copies.ups, strict=True):
            self._sources += [down, up]
            self._targets += [target, up_target]
            self._scalings += [1.0, linear.scaling]
        return copies

    @torch.no_grad()
    def refresh(self, *_: Any) -> None:
        """Take over what the adapters are now."""
        torch._foreach_copy_(self._targets, torch._foreach_mul(self._sources, self._scalings))


class _SharedInput:
    """The linears of one input; the first that is called with a tensor computes them all."""

    def __init__(self, members: Sequence[_Layer], copies: Copies) -> None:
        self._members, self._copies = members, copies
        self._x: torch.Tensor | None = None
        self._ready: dict[int, torch.Tensor] = {}
        for index, member in enumerate(members):
            member.module.forward = self._forward_of(index, member)

    def _forward_of(self, index: int, member: _Layer) -> Callable[..., torch.Tensor]:
        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if args or kwargs or not all(each.takes(x) for each in self._members):
                return member.plain(x, *args, **kwargs)
            if self._x is not x or index not in self._ready:
                self._x = x
                self._ready = dict(enumerate(self._compute(x)))
            output = self._ready.pop(index)
            if not self._ready:
                self._x = None
            return output

        return forward

    def _compute(self, x: torch.Tensor) -> list[torch.Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            outputs = lora_linears(
                x.reshape(-1, x.shape[-1]),
                [member.frozen for member in self._members],
                [member.matrices for member in self._members],
                getattr(x, SOURCE, None),
                self._copies,
            )
        return [output.view(*x.shape[:-1], -1) for output in outputs]


def _fuse_block(
    block: nn.Module, layers: Sequence[_Layer], copies: tuple[Copies, Copies], tolerance: float | None
) -> bool:
    """Give a gated feed-forward block one operation for a forward. False, and nothing done, if that is not the same.

    tolerance: relative; by the dtype if there is none.
    """
    activation = _activation(getattr(block, "act_fn", None))
    weight = layers[0].matrices[0]
    if activation is None:
        return False
    plain = block.forward

    def forward(x: torch.Tensor, *args: Any, residual: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or not all(layer.takes(x) for layer in layers):
            output = plain(x, *args, **kwargs)
            return output if residual is None else residual + output
        gate, up, down = (layer.frozen for layer in layers)
        with torch.autocast(x.device.type, enabled=False):
            matrices = [layer.matrices for layer in layers]
            flat, source = x.reshape(-1, x.shape[-1]), getattr(x, SOURCE, None)
            beside = None if residual is None else residual.reshape(flat.shape)
            return gated_mlp(flat, (gate, up, down), matrices, activation, source, copies, beside).view(x.shape)

    dtype = layers[0].dtype
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, weight.shape[1], generator=generator).to(weight.device, dtype)
    with torch.no_grad():
        expected, found = plain(x), forward(x)
    if (found - expected).float().norm() > (tolerance or TOLERANCE[dtype]) * expected.float().norm():
        return False
    setattr(forward, ADDS_RESIDUAL, True)
    block.forward = forward
    return True


def _activation(module: Any) -> Activation | None:
    if isinstance(module, (nn.SiLU, SiLUActivation)):
        return "silu"
    if isinstance(module, GELUTanh) or (isinstance(module, nn.GELU) and module.approximate == "tanh"):
        return "gelu_tanh"
    return None
