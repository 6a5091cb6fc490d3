"""The section of a recipe that says what is measured of a run's models, and what they must hold to be shipped."""

from __future__ import annotations

import re
from collections import Counter
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from qlora.recipe_section import PositiveInt, Section, Share

EXACT_MATCH, JSON_VALID = "exact_match", "json_valid"
GENERAL_LENGTH = 512  # tokens of a row of general text


class Gates(Section):
    kl: Annotated[float, Field(gt=0)] | None = None
    """Highest KL divergence per answer token from the trained to the GPTQ model."""
    top1: Share | None = None
    """Lowest share of answer tokens on which both pick the same token."""
    gain_retained: Annotated[float, Field(gt=0, le=1)] | None = None
    """Lowest share of the fine-tune's loss improvement that the GPTQ model keeps."""
    exact_match: Annotated[float, Field(gt=0, le=1)] | None = None
    """Lowest share of generated answers that equal the reference (needs evaluate.generate)."""
    metrics: dict[str, Annotated[float, Field(gt=0, le=1)]] = {}
    """Name of one of evaluate.metrics → lowest share of generated answers that it holds for."""
    preferred: Annotated[float, Field(gt=0, le=1)] | None = None
    """Lowest share of comparisons that the better answer wins (needs rows of format preference or kto)."""
    survival: Share | None = None
    """Lowest share of the update that is left, along itself, over all quantized modules (needs evaluate.survival). Near
    1 whatever the bits, near 0 in a checkpoint that is not of this adapter; what rounding costs, it does not see."""
    merge_kl: Annotated[float, Field(gt=0)] | None = 0.01
    """Highest KL divergence from the trained to the merged model; more means the merge is not exact. Does not apply
    where the merged model is not measured (merge.write: false) or differs by intent (merge.base: original, and
    model.quantization: int8, which quantizes inputs on a GPU too)."""


class Pattern(Section):
    """A form that generated answers must have."""

    regex: str
    """Regular expression of Python that the whole answer must match, white space at its ends aside; `.` matches line
    ends too."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")] = "regex"
    """What the share of answers that match is called in the ladder and in gates.metrics."""

    @field_validator("regex")
    @classmethod
    def _compiles(cls, regex: str) -> str:
        try:
            re.compile(regex)
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        return regex


class Evaluate(Section):
    rows: PositiveInt | None = 200
    """Rows of data.eval to use; null for all."""
    batch_size: PositiveInt = 8
    """Rows per forward pass."""
    generate: bool = False
    """Also generate answers and count exact matches."""
    max_new_tokens: PositiveInt = 256
    """Longest generated answer."""
    metrics: list[Literal["exact_match", "json_valid"] | Pattern] = []
    """What else to count of generated answers beside exact matches, which always are (needs generate): json_valid (the
    whole answer is JSON), or {regex: PATTERN, name: NAME}."""
    examples: Annotated[int, Field(ge=0)] = 6
    """Rows, spread over those measured, whose generated answers of every model are kept (needs generate)."""
    general: str | Annotated[list[str], Field(min_length=1)] | None = None
    """General text to measure forgetting on: `wikitext2` or `c4` (their held-out parts), the hub id of a data set with
    a column `text`, a file (.txt, or rows with a column `text`), or a list of strings."""
    general_tokens: PositiveInt = 16384
    """Tokens of it, in rows of 512 spread evenly over the text."""
    tasks: list[str] = []
    """Tasks of lm-eval to measure every model on, by name or as a file (.yaml) (needs qlora[eval])."""
    task_limit: PositiveInt | None = None
    """Rows of each task; null for all."""
    task_chat_template: bool = False
    """Put the tasks' questions into the chat template, as users of a chat model do."""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """Where this stage computes; null: as `device` says."""
    memory: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    """GiB that evaluation may take of each GPU; auto: what is free, but for a tenth. Models in 16 bits that are larger
    lie on all GPUs that are visible and in host memory."""
    golden: Annotated[int, Field(ge=0)] = 8
    """Held-out prompts whose greedy answers contract.json keeps, for `qlora verify` to replay on a server. 0: none, and
    then no held-out text is in the files that are published."""
    golden_tokens: PositiveInt = 48
    """Longest of these answers."""
    survival: bool = True
    """Measure what of the fine-tune is left in every quantized module, and refuse codes that do not stand for it."""
    compare_merges: bool = False
    """Merge into the other base too (merge.base), take it through GPTQ as well, and say which of the two to ship. Takes
    as long as merge and quantize together, and their disk while it lasts."""
    gates: Gates = Gates()
    """Thresholds; a run that misses one ends with exit code 3 and keeps its artefacts."""

    @property
    def metric_names(self) -> list[str]:
        """Of `metrics`, as the ladder calls them, exact match aside."""
        return [
            metric.name if isinstance(metric, Pattern) else metric for metric in self.metrics if metric != EXACT_MATCH
        ]

    @property
    def general_batch(self) -> int:
        """Rows of general text in a forward pass: they may be longer than the rows that batch_size is for."""
        return min(self.batch_size, 8)

    @model_validator(mode="after")
    def _metrics_fit(self) -> Evaluate:
        if self.metrics and not self.generate:
            raise ValueError("evaluate.metrics are of generated answers: they need evaluate.generate: true")
        names = Counter([EXACT_MATCH, *self.metric_names])
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"evaluate.metrics: {twice[0]} is there twice; give each regex a name of its own")
        if unknown := [name for name in self.gates.metrics if name not in self.metric_names]:
            known = ", ".join(self.metric_names) or "empty"
            raise ValueError(f"evaluate.gates.metrics: {unknown[0]} is not one of evaluate.metrics ({known})")
        if self.general == "train":
            raise ValueError("evaluate.general: text that was not trained on, such as wikitext2 or a file")
        return self
