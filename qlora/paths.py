"""Where things are: the cache, the packaged recipes, and the files of a run directory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


def cache_dir() -> Path:
    """Folder for converted models and rendered rows; QLORA_CACHE moves it."""
    return Path(os.environ.get("QLORA_CACHE") or Path.home() / ".cache" / "qlora")


def expand(text: str) -> str:
    """`~` and environment variables in a path; ${QLORA_CACHE} is always known."""
    text = text.replace("${QLORA_CACHE}", str(cache_dir()))
    return os.path.expanduser(os.path.expandvars(text))


def packaged_recipes() -> Path:
    """The folder of recipes: inside an installed package, or beside it in a source checkout."""
    package = Path(__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


@dataclass(frozen=True)
class RunDir:
    """The layout of a run directory: a contract with everything that reads one."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def lineage(self) -> Path:
        return self.root / "lineage.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def merged(self) -> Path:
        return self.root / "merged"

    @property
    def gptq(self) -> Path:
        return self.root / "gptq"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation"

    @property
    def report(self) -> Path:
        return self.root / "report"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def tracking(self) -> Path:
        return self.root / "tracking"
