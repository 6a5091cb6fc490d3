"""Small real tokenizers of the families that trip templates and masks up, and sources on disk."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qlora.data.templates import resolve_chat_template
from qlora.recipe import Data, Source

CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is the capital of France? Paris is the capital of France.",
    "user assistant system Below is an instruction. Response: Question: Answer: yes no maybe 0 1 2 3 4 5 6 7 8 9",
    '{"item": "lamp", "quantity": 14}\n\nSecond paragraph.\n  indented\ttabs and   spaces\n\n\nEnd of text.\n',
] * 4


def byte_level(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def chatml_tokenizer():
    """As SmolLM2 and Qwen: no BOS of its own, EOS ends turns and is the pad token too."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    tokenizer.chat_template = resolve_chat_template(tokenizer, "chatml")
    return tokenizer


@pytest.fixture(scope="session")
def llama3_tokenizer():
    """As Llama-3-Instruct: BOS before everything, turns end with another special token than EOS."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    backend = byte_level(special)
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
    )
    tokenizer.chat_template = resolve_chat_template(tokenizer, "llama-3")
    return tokenizer


@pytest.fixture(scope="session")
def spaced_tokenizer():
    """As Llama-2 and Mistral: a space is put before the first word, BOS before everything; no chat template."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=700, special_tokens=special))
    layout = json.loads(tokenizer.to_str())
    layout["added_tokens"] = layout["added_tokens"][:3]  # the trainer marks bytes as special too, which they are not
    tokenizer = Tokenizer.from_str(json.dumps(layout))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def data_settings():
    """Makes a data section: `data_settings(max_length=8)`."""
    return lambda **fields: Data(train=[Source(path="unused")], **fields)


@pytest.fixture
def make_source():
    """Makes a source entry: `make_source(path, format="text")`."""
    return lambda path, **fields: Source(path=str(path), **fields)


@pytest.fixture
def jsonl_source(tmp_path: Path):
    """Writes rows as JSON lines and gives the source entry for the file."""

    def write(rows, name="train.jsonl", **fields):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return Source(path=str(path), **fields)

    return write
