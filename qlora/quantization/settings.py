"""What can be chosen about GPTQ, and what it reports about each layer it quantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from qlora.errors import Problem, UserError
from qlora.models.gptq_format import SUPPORTED_BITS, SUPPORTED_GROUP_SIZES, GPTQFormat, check_group_size
from qlora.models.module_rules import ModuleRule, check_rules, first_match, recipe_rules
from qlora.recipe import Quantize


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
    asymmetric_calibration: float = 0.5
    """How far weights also make up for what quantization before them did to their inputs, so that outputs come close to
    the full model's: 0 not at all, 1 fully. Experts of mixtures do not: they see other tokens in the full model."""
    prompt_weight: float = 1.0
    """Weight in the Hessians of positions that carried no loss in training; those that did weigh 1."""
    modules: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Regular expression, searched in full module names → `bits`, `group_size` and `sym` that differ there."""
    skip: tuple[str, ...] = ()
    """Regular expressions, searched in full module names, of what is not quantized. They come before `modules`."""

    @classmethod
    def from_recipe(cls, section: Quantize) -> GPTQSettings:
        """The settings in a recipe's `quantize` section."""
        given = {name: value for name, value in section if name in {item.name for item in fields(cls)}}
        given["modules"] = {
            pattern: changes.model_dump(exclude_none=True) for pattern, changes in section.modules.items()
        }
        return cls(**given | {"skip": tuple(section.skip)})

    def __post_init__(self) -> None:
        problems = []
        if self.bits not in SUPPORTED_BITS:
            problems.append(Problem(f"{self.bits} bits", "bits", f"choose from {SUPPORTED_BITS}"))
        if self.group_size not in SUPPORTED_GROUP_SIZES:
            problems.append(Problem(str(self.group_size), "group_size", f"choose from {SUPPORTED_GROUP_SIZES}"))
        if not 0 < self.damp < 1:
            problems.append(Problem(str(self.damp), "damp", "choose a share between 0 and 1, such as 0.01"))
        for name in ("asymmetric_calibration", "prompt_weight"):
            if not 0 <= getattr(self, name) <= 1:
                problems.append(Problem(str(getattr(self, name)), name, "choose a number from 0 to 1"))
        if problems:
            raise UserError(problems)

    @property
    def format(self) -> GPTQFormat:
        """The checkpoint format that these settings write; g_idx is monotone whatever `act_order` says."""
        return GPTQFormat(self.bits, self.group_size, self.sym, desc_act=False, rules=self.rules)

    @cached_property
    def rules(self) -> tuple[ModuleRule, ...]:
        """`skip` and `modules` in the order in which they are tried. Raises UserError for broken expressions."""
        return recipe_rules(self.modules, self.skip)

    def for_module(self, name: str) -> GPTQSettings | None:
        """The settings of the module of this full name in the checkpoint; None if it is not quantized."""
        rule = first_match(self.rules, name)
        if rule is None:
            return replace(self, modules={}, skip=())
        return None if rule.changes is None else replace(self, modules={}, skip=(), **rule.changes)

    def check_modules(self, names: Sequence[str]) -> None:
        """Raise UserError for rules that have no effect on modules of these full names, or part what engines fuse."""
        check_rules(self.rules, names)

    def check_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """`check_modules` for linears given as full name → (N, K), and whether groups and words fit each of them."""
        self.check_modules(list(shapes))
        by_format: dict[tuple[int, int], dict[str, tuple[int, int]]] = {}
        for name, shape in shapes.items():
            if (own := self.for_module(name)) is not None:
                by_format.setdefault((own.group_size, own.bits), {})[name] = shape
        for (group_size, bits), alike in by_format.items():
            check_group_size(alike, group_size, bits)


@dataclass(frozen=True)
class ModuleReport:
    """How one linear layer was quantized."""

    name: str
    loss: float | None
    """Squared error of the layer's output, summed over outputs, per calibration token: tr((W−Q)·H·(W−Q)ᵀ), damped.
    None where another engine quantized, whose figures have other units."""
    relative_loss: float | None
    """`loss` as a share of the squared output itself, tr(W·H·Wᵀ)."""
    inputs: int
    tokens: int
    """Calibration tokens that reached it. 0: weights are rounded to nearest, nothing being known of the inputs."""
    damp: float | None
    """Damping that the factorisation needed; None for AWQ, which has none."""
    damp_raised: bool
    """Whether that is more than the setting."""
    dead_columns: int | None
    """Inputs that were zero on every calibration token; their weights are rounded to nearest. None: not known."""


@dataclass(frozen=True)
class QuantizeReport:
    """How a checkpoint was quantized."""

    modules: tuple[ModuleReport, ...]
    rows: int
    tokens: int
    """Calibration tokens, without padding; experts see some of them, every other module all."""
    parameters: int
    """Weights that are quantized."""
    seconds: float
    timings: dict[str, float]
    """Seconds per part, on the GPU where there is one; reading and writing in the background are not in them."""
    warnings: tuple[str, ...]
    """Every way in which modules got less than GPTQ, counted."""

    def to_dict(self) -> dict[str, Any]:
        """The report as plain lists, numbers and strings, for JSON."""
        return asdict(self)


def shortfalls(reports: Sequence[ModuleReport]) -> tuple[str, ...]:
    """Every way in which a module got less than GPTQ."""
    found = []
    unreached = [report.name for report in reports if not report.tokens]
    if unreached:
        found.append(f"{len(unreached)} modules were rounded: no calibration token reached {unreached[0]} …")
    raised = [report.name for report in reports if report.damp_raised]
    if raised:
        found.append(f"{len(raised)} modules needed more damping than asked for, {raised[0]} …")
    starved = [report for report in reports if 0 < report.tokens < report.inputs]
    if starved:
        first = starved[0]
        found.append(
            f"{len(starved)} modules saw fewer calibration tokens than they have inputs ({first.name}: {first.tokens} "
            f"for {first.inputs}); several times as many are needed"
        )
    return tuple(found)
