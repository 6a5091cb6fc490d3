"""QLoRA fine-tuning that ships GPTQ checkpoints: NF4 training, exact merge, GPTQ, every stage measured."""

__version__ = "0.1.0"
