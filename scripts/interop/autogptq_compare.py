"""Does AutoGPTQ 0.7.1 compute what a GPTQ checkpoint says? Logits of both sides on fixed prompts, in fp32 on the CPU.

    python autogptq_compare.py reference GPTQ_DIR LOGITS.safetensors    in qlora's environment: dequantized weights
    python autogptq_compare.py compare   GPTQ_DIR LOGITS.safetensors    in AutoGPTQ's: its own kernel, exit 1 if apart

The two libraries cannot share an environment (AutoGPTQ does not import beside transformers 5), so token ids and
logits travel in a file: `ids.<i>` int64 [1, T] and `logits.<i>` float32 [T, V] for prompt i. `autogptq.sh` runs both.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPTS = (
    "The lighthouse keeper climbed the stairs every evening, and on the night of the storm he",
    "Question: A farmer sells 48 eggs in April and half as many in May. How many does he sell altogether? Answer:",
    '{"name": "Ada Lovelace", "born": 1815, "occupation": "',
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Der Zug nach München fährt um 17:42 Uhr von Gleis 9 ab; bitte",
)
# fp32 on both sides leaves the order of summation and two transformers versions: 1e-4 on SmolLM2-135M. Weights rounded
# to fp16 already move its logits by 0.1, wrong zero points or another rotary base by whole units.
MAX_LOGIT_DIFFERENCE = 0.01
MAX_KL = 1e-5


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("step", choices=("reference", "compare"))
    parser.add_argument("checkpoint", type=Path, help="directory of the GPTQ checkpoint")
    parser.add_argument("logits", type=Path, help="file that carries token ids and logits from one step to the other")
    arguments = parser.parse_args()
    if arguments.step == "reference":
        write_reference(arguments.checkpoint, arguments.logits)
        return 0
    return compare(arguments.checkpoint, arguments.logits)


def write_reference(checkpoint: Path, logits: Path) -> None:
    """Write token ids and logits of qlora's dequantizing loader to `logits`."""
    from qlora.models.loading import load_gptq, load_tokenizer

    tokenizer = load_tokenizer(checkpoint)
    model = load_gptq(checkpoint, torch.float32, "cpu")
    tensors = {}
    for i, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        tensors[f"ids.{i}"] = ids
        tensors[f"logits.{i}"] = compute_logits(model, ids)
    save_file(tensors, logits)


def compare(checkpoint: Path, logits: Path) -> int:
    """Print how far AutoGPTQ's logits are from those in `logits`; 0 if they agree, 1 if not."""
    logging.disable(logging.WARNING)  # AutoGPTQ warns at length about CUDA kernels, which a CPU has no use for
    from auto_gptq import AutoGPTQForCausalLM, __version__

    reference = load_file(logits)
    model = AutoGPTQForCausalLM.from_quantized(
        str(checkpoint), device="cpu", torch_dtype=torch.float32, disable_exllama=True, disable_exllamav2=True
    ).model
    if model.config.tie_word_embeddings:
        restore_tied_embeddings(model, checkpoint)
    modules = [module for module in model.modules() if hasattr(module, "qweight")]
    if not modules:
        print("AutoGPTQ loaded the checkpoint without a single quantized layer")
        return 1
    pairs = [
        (reference[f"logits.{i}"], compute_logits(model, reference[f"ids.{i}"])) for i in range(len(reference) // 2)
    ]
    ours_TV, theirs_TV = (torch.cat(side) for side in zip(*pairs, strict=True))
    difference = (ours_TV - theirs_TV).abs().max().item()
    kl = torch.nn.functional.kl_div(
        theirs_TV.log_softmax(-1), ours_TV.log_softmax(-1), log_target=True, reduction="batchmean"
    ).item()
    same = (ours_TV.argmax(-1) == theirs_TV.argmax(-1)).float().mean().item()
    agree = difference <= MAX_LOGIT_DIFFERENCE and kl <= MAX_KL

    kernel = type(modules[0]).__module__.rpartition(".")[2]
    print(f"AutoGPTQ {__version__}, {len(modules)} layers in {kernel}, {len(ours_TV)} tokens of {len(pairs)} prompts")
    print(f"largest logit             {ours_TV.abs().max().item():.1f}")
    print(f"largest logit difference  {difference:.2e}  (at most {MAX_LOGIT_DIFFERENCE:g})")
    print(f"KL to the reference       {kl:.2e}  nats per token (at most {MAX_KL:g})")
    print(f"top-1 agreement           {same:.2%}")
    print("agree" if agree else "DISAGREE: AutoGPTQ does not compute what this checkpoint says")
    return 0 if agree else 1


@torch.no_grad()
def restore_tied_embeddings(model: "PreTrainedModel", checkpoint: Path) -> None:
    """Read the input embeddings again, if the checkpoint holds no head of its own.

    AutoGPTQ loads through accelerate, which then ties the embeddings it has just read to the head, and a head that is
    not in the file was never initialised: every tied model whose head is not written twice comes out with zeros.
    """
    tied = model.get_input_embeddings().weight
    name, embeddings = next((name, weight) for name, weight in model.named_parameters() if weight is tied)
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            if name in shard.keys():  # noqa: SIM118 (a shard is not iterable)
                embeddings.copy_(shard.get_tensor(name))
                print(f"{name} read again: AutoGPTQ loses tied embeddings")


@torch.no_grad()
def compute_logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits float32 [T, V] for token ids [1, T]."""
    return model(input_ids=ids).logits[0].float().contiguous()


if __name__ == "__main__":
    sys.exit(main())
