"""GPTQ: 16-bit checkpoints to 4-bit ones that serving engines load."""

from qlora.quantization.engine import quantize_checkpoint
from qlora.quantization.modules import quantizable_modules
from qlora.quantization.settings import GPTQSettings, ModuleReport, QuantizeReport

__all__ = ["GPTQSettings", "ModuleReport", "QuantizeReport", "quantizable_modules", "quantize_checkpoint"]
