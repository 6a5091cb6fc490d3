"""Fields of TRL's SFTConfig that `train.args` must not touch, and options of a base that peers have, with reasons."""

from __future__ import annotations

# With PEFT 0.21 and accelerate 1.15: "MmBackward0 returned an invalid gradient … expected device meta but got cpu".
_OFFLOAD = (
    "layers whose weights wait on the CPU cannot have an adapter: PEFT puts it on the meta device beside them, where "
    "it holds no numbers, and the backward fails. nf4 takes half of int8's memory; where that is short too, training "
    "moves token embeddings and the inputs of layers to the host by itself (train.memory)"
)
REFUSED_MODEL_KEYS: dict[str, str] = {
    "cpu_offload": _OFFLOAD,
    "llm_int8_enable_fp32_cpu_offload": _OFFLOAD,
    "device_map": "every process trains on one device; " + _OFFLOAD,
    "load_in_8bit": "use quantization: int8",
    "load_in_4bit": "use quantization: nf4 or fp4",
    "llm_int8_threshold": "use int8_threshold",
    "llm_int8_skip_modules": "use skip_modules",
}

REFUSED_TRAIN_ARGS: dict[str, str] = {
    "output_dir": "the run directory decides where checkpoints go",
    "assistant_only_loss": "rows arrive with labels; use data.loss_on",
    "completion_only_loss": "rows arrive with labels; use data.loss_on",
    "dataset_text_field": "rows arrive tokenised; use data.train[].format",
    "chat_template_path": "training, calibration and evaluation share one template; use data.chat_template",
    "max_length": "rows arrive tokenised and cut; use data.max_length",
    "packing": "rows are packed by themselves; use train.micro_batch_tokens",
    "padding_free": "rows are packed by themselves; use train.micro_batch_tokens",
    "eos_token": "the tokenizer and template decide where answers end; use data.chat_template",
    "pad_token": "pad tokens never reach labels, Hessians or metrics, whatever they are",
    "model_init_kwargs": "the base is loaded from the model section, so that the merge can reproduce it",
    "bf16": "use model.compute_dtype",
    "fp16": "use model.compute_dtype",
    "use_cpu": "use device",
    "seed": "use seed",
    "data_seed": "use seed",
    "report_to": "use track.to",
    "run_name": "use name",
    "push_to_hub": "use `qlora publish`",
    "resume_from_checkpoint": "a run resumes by itself from its last complete checkpoint",
    "save_strategy": "use train.checkpoint_every",
    "save_steps": "use train.checkpoint_every",
    "eval_strategy": "use train.evaluate_every",
    "eval_steps": "use train.evaluate_every",
    "load_best_model_at_end": "use train.keep_best",
    "metric_for_best_model": "train.keep_best goes by the loss on held-out rows",
    "neftune_noise_alpha": "use train.neftune_alpha: TRL scales by the length of a whole batch of packed rows",
    "gradient_checkpointing": "use train.gradient_checkpointing",
    "per_device_train_batch_size": "use train.micro_batch_tokens",
    "gradient_accumulation_steps": "it follows from train.batch_size and train.micro_batch_tokens",
    "remove_unused_columns": "the trainer feeds exactly input_ids and labels",
    "use_liger_kernel": "TRL's deprecated switch; kernels are chosen by the training path",
    "fsdp": "use train.shard, which divides the 4-bit base and leaves adapters whole",
    "fsdp_config": "use train.shard, which divides the 4-bit base and leaves adapters whole",
    "deepspeed": "use train.shard, which divides the 4-bit base; DeepSpeed divides the small adapter",
    "parallelism_config": "rows are divided among all processes; train.shard divides the base",
    "disable_tqdm": "progress is shown by qlora",
}
