"""The section of a recipe that says where its results are published. It changes no result."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qlora.recipe_section import Section

Deliverable = Literal["adapter", "merged", "gptq"]


class Publish(Section):
    repo: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Hub repository of the GPTQ checkpoint, as owner/name. The adapter goes to <repo>-adapter, the merged model to
    <repo>-merged."""
    what: Annotated[list[Deliverable], Field(min_length=1)] = ["gptq", "adapter"]
    """What is published, each in a repository of its own."""
    private: bool = True
    """Whether repositories that are created are private. A public one is refused where this is true."""
    revision: str | None = None
    """Branch to publish to, created where it is missing; null: main."""
    license: str | None = None
    """License that the model cards name, as the Hub spells it (apache-2.0); null: the base's own where it is known."""
