"""Programs in a process that stays: one after another, so that what they all import is imported once.

For libraries that start threads when they are imported, which no process can be forked from (see warm).
"""

import contextlib
import io
import os
import sys
from collections.abc import Mapping, Sequence

GPTQMODEL = {
    "TORCH_COMPILE_DISABLE": "1",
    "GPTQMODEL_CPU_WORKERS": "2",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def set_variables(variables: Mapping[str, str]) -> None:
    """Before anything is imported that reads them."""
    os.environ.update(variables)


def run(code: str, arguments: Sequence[str], folder: str, variables: Mapping[str, str]) -> str:
    """What the program prints, with these arguments and variables, in this folder."""
    before = dict(os.environ), os.getcwd()
    printed = io.StringIO()
    sys.argv = ["-c", *arguments]
    os.environ.update(variables)
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(printed):
            exec(code, {"__name__": "__main__"})
    finally:
        os.chdir(before[1])
        os.environ.clear()
        os.environ.update(before[0])
    return printed.getvalue()
