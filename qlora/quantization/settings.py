"""What can be chosen about GPTQ, and what it reports about each layer it quantized."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qlora.errors import Problem, UserError
from qlora.models.gptq_format import SUPPORTED_BITS, SUPPORTED_GROUP_SIZES, GPTQFormat


@dataclass(frozen=True)
class GPTQSettings:
    """The settings of one quantization. Raises UserError for values outside the checkpoint format."""

    bits: int = 4
    """Bits per weight: 2, 3, 4 or 8."""
    group_size: int = 128
    """Inputs that share a scale: 32, 64 or 128, or −1 for all inputs of a layer."""
    sym: bool = True
    """Zero point fixed in the middle of the range."""
    act_order: bool = True
    """Visit columns in descending activation size, with the groups of the original order (static groups)."""
    true_sequential: bool = True
    """Inside a layer, calibrate each group of linears on the already quantized ones before it."""
    damp: float = 0.01
    """Share of the Hessian's mean diagonal added to its diagonal; raised where the Cholesky factorisation fails."""
    block_size: int = 128
    """Columns updated one by one before the rest of the matrix is updated at once; changes speed only."""

    def __post_init__(self) -> None:
        problems = []
        if self.bits not in SUPPORTED_BITS:
            problems.append(Problem(f"{self.bits} bits", "bits", f"choose from {SUPPORTED_BITS}"))
        if self.group_size not in SUPPORTED_GROUP_SIZES:
            problems.append(Problem(str(self.group_size), "group_size", f"choose from {SUPPORTED_GROUP_SIZES}"))
        if not 0 < self.damp < 1:
            problems.append(Problem(str(self.damp), "damp", "choose a share between 0 and 1, such as 0.01"))
        if problems:
            raise UserError(problems)

    @property
    def format(self) -> GPTQFormat:
        """The checkpoint format that these settings write; g_idx is monotone whatever `act_order` says."""
        return GPTQFormat(bits=self.bits, group_size=self.group_size, sym=self.sym, desc_act=False)


@dataclass(frozen=True)
class ModuleReport:
    """How one linear layer was quantized."""

    name: str
    loss: float
    """Squared error of the layer's output, summed over outputs, per calibration token: tr((W−Q)·H·(W−Q)ᵀ)."""
    relative_loss: float
    """`loss` as a share of the squared output itself, tr(W·H·Wᵀ)."""
    damp: float
    """Damping that the factorisation needed; more than the setting means that it had to be raised."""
    dead_columns: int
    """Inputs that were zero on every calibration token; their weights are rounded to nearest."""
    seconds: float
    """Time of solving and packing, shared by the modules that are solved together."""


@dataclass(frozen=True)
class QuantizeReport:
    """How a checkpoint was quantized."""

    modules: tuple[ModuleReport, ...]
    rows: int
    tokens: int
    """Calibration tokens, without padding; every module saw all of them."""
    parameters: int
    """Weights that are quantized."""
    seconds: float
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain lists, numbers and strings, for JSON."""
        return asdict(self)
