"""The section of a recipe that says what is measured of a run's models, and what they must hold to be shipped."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qlora.recipe_section import PositiveInt, Section, Share


class Gates(Section):
    kl: Annotated[float, Field(gt=0)] | None = None
    """Highest KL divergence per answer token from the trained to the GPTQ model."""
    top1: Share | None = None
    """Lowest share of answer tokens on which both pick the same token."""
    gain_retained: Annotated[float, Field(gt=0, le=1)] | None = None
    """Lowest share of the fine-tune's loss improvement that the GPTQ model keeps."""
    exact_match: Annotated[float, Field(gt=0, le=1)] | None = None
    """Lowest share of generated answers that equal the reference (needs evaluate.generate)."""
    preferred: Annotated[float, Field(gt=0, le=1)] | None = None
    """Lowest share of comparisons that the better answer wins (needs rows of format preference or kto)."""
    survival: Share | None = None
    """Lowest share of the update that is left, along itself, over all quantized modules (needs evaluate.survival). Near
    1 whatever the bits, near 0 in a checkpoint that is not of this adapter; what rounding costs, it does not see."""
    merge_kl: Annotated[float, Field(gt=0)] | None = 0.01
    """Highest KL divergence from the trained to the merged model; more means the merge is not exact. Does not apply
    where the merged model is not measured (merge.write: false) or differs by intent (merge.base: original, and
    model.quantization: int8, which quantizes inputs on a GPU too)."""


class Evaluate(Section):
    rows: PositiveInt | None = 200
    """Rows of data.eval to use; null for all."""
    batch_size: PositiveInt = 8
    """Rows per forward pass."""
    generate: bool = False
    """Also generate answers and count exact matches."""
    max_new_tokens: PositiveInt = 256
    """Longest generated answer."""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """Where this stage computes; null: as `device` says."""
    memory: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    """GiB that evaluation may take of each GPU; auto: what is free, but for a tenth. Models in 16 bits that are larger
    lie on all GPUs that are visible and in host memory."""
    survival: bool = True
    """Measure what of the fine-tune is left in every quantized module, and refuse codes that do not stand for it."""
    compare_merges: bool = False
    """Merge into the other base too (merge.base), take it through GPTQ as well, and say which of the two to ship. Takes
    as long as merge and quantize together, and their disk while it lasts."""
    gates: Gates = Gates()
    """Thresholds; a run that misses one ends with exit code 3 and keeps its artefacts."""
