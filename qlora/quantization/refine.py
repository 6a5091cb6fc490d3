"""Refinement: tune what a GPTQ checkpoint holds beside its integer codes, until the model says what the full one says.

GPTQ matches each layer's output on its own. Here the Kullback-Leibler divergence of the whole model's predictions,

    Σ_t weight_t · KL(softmax(teacher logits_t) ‖ softmax(student logits_t)),

falls by gradient descent (Adam, Kingma and Ba 2014, arXiv:1412.6980) on the scales of all groups, as relative changes
exp(δ), and on the weights of norms, as relative changes 1 + ε. Codes and zero points stay, so the format and size of
the checkpoint do, and serving costs what it did.

The teacher is the model that was quantized. It is streamed through the device once, a layer at a time, and leaves its
last hidden states of every row in host memory; its logits are made again from them, a chunk of tokens at a time, with
the head that it shares with the student. Some rows are never trained on; if the divergence on them does not fall, the
checkpoint stays as it was.

Equal inputs give equal bytes on a CPU; on a GPU deterministic kernels are asked for, where PyTorch has them.

Shapes: T tokens that count, B rows, D width of the hidden states, V vocabulary.
"""

from __future__ import annotations

import math
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qlora.data.calibration import CalibrationRow
from qlora.errors import Problem, UserError
from qlora.models.checkpoint import TensorSource, overwrite_tensors
from qlora.quantization.calibration import Batch, make_batches
from qlora.quantization.skeleton import Skeleton
from qlora.quantization.states import CalibrationStates, enter_model
from qlora.quantization.streams import PrefetchingSource
from qlora.quantization.student import Student, forward_replaced

Progress = Callable[[int, int, str], None]

WARMUP_SHARE = 0.05
# fp32 elements of one tensor of logits; about five of that size exist at a time.
LOGITS_ELEMENTS = {"cpu": 2**23, "cuda": 2**25}
# Steps between two reports of progress, each of which waits for the device.
REPORT_EVERY = 10


@dataclass(frozen=True)
class RefineSettings:
    """How a checkpoint is refined. Raises UserError for values that make no sense."""

    steps: int = 50
    tokens_per_step: int = 8192
    """Padded tokens of a step; rows of similar length share one."""
    learning_rate: float = 5e-4
    """Of the relative change of the scales of 4-bit weights, at its peak; twice that for every bit less, since the
    error that there is to make up for grows likewise."""
    norms: bool = True
    """Tune the weights of norms too."""
    norm_learning_rate: float = 3e-4
    """Of the relative change of the norms' weights, at its peak."""
    prompt_weight: float = 1.0
    """Weight of positions that carried no loss in training; all others weigh 1."""
    held_out: float = 0.1
    """Where no other rows decide whether the result is kept: the share of the rows that does, and is not trained on."""
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [
            Problem(str(getattr(self, name)), name, "choose a number above 0")
            for name in ("steps", "tokens_per_step", "learning_rate", "norm_learning_rate")
            if not getattr(self, name) > 0
        ]
        if not self.prompt_weight >= 0:
            problems.append(Problem(str(self.prompt_weight), "prompt_weight", "choose 0 or more"))
        if not 0 < self.held_out < 1:
            problems.append(Problem(str(self.held_out), "held_out", "choose a share between 0 and 1, such as 0.1"))
        if problems:
            raise UserError(problems)


@dataclass(frozen=True)
class RefineReport:
    """What refinement did."""

    kept: bool
    """False: the divergence on held-back rows did not fall, and the checkpoint is what it was."""
    kl_before: float
    """Mean divergence per (weighted) token of the held-back rows, in nats, as GPTQ left the checkpoint."""
    kl_after: float
    """The same after the last step, with scales rounded to what is stored."""
    steps: int
    tokens: int
    """Tokens that counted, over all steps."""
    rows: int
    """Rows trained on."""
    held_out_rows: int
    scales: int
    """Scales tuned."""
    norm_weights: int
    """Weights of norms tuned."""
    teacher_seconds: float
    seconds: float
    """All of it, `teacher_seconds` included."""


def refine_checkpoint(
    source: TensorSource,
    gptq_dir: Path,
    rows: Sequence[CalibrationRow],
    settings: RefineSettings,
    *,
    device: str,
    held_back: Sequence[CalibrationRow] = (),
    progress: Progress | None = None,
    before_writing: Callable[[], None] = lambda: None,
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
) -> RefineReport:
    """Tune scales and norms of the GPTQ checkpoint in `gptq_dir`, in place, towards the model it was made of, `source`.

    held_back: rows that decide whether the result is kept. Best are rows that GPTQ has not seen either: on those that
    it was calibrated on, it looks better than it is. Without any, `settings.held_out` of `rows` are held back.
    `progress(done, steps, text)` is called every few steps, `before_writing()` before files change. The device holds
    the packed student, the activations of one step (recomputed where they would not fit) and 16 bytes per scale. Raises
    UserError when the checkpoint is not one of `source`, or when there are too few rows to hold some back.
    """
    started = time.perf_counter()
    build = partial(Skeleton, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code)
    skeleton = build(source)
    training, exam_rows = (list(rows), list(held_back)) if held_back else _split(rows, settings)
    vocabulary = skeleton.model.config.get_text_config().vocab_size
    batches = [
        make_batches(part, settings.tokens_per_step, vocabulary, device, settings.prompt_weight)
        for part in (training, exam_rows)
    ]
    lessons = teach(build, source, batches[0] + batches[1], device)
    lessons, exam = lessons[: len(batches[0])], lessons[len(batches[0]) :]
    taught = time.perf_counter()

    student = Student(skeleton, gptq_dir, device)
    before = examine(student, exam)
    with _sums_in_fixed_order():
        tokens = train(student, lessons, settings, progress)
    for linear in student.linears.values():
        linear.round_scales()
    after = examine(student, exam)
    kept = after < before
    if kept:
        before_writing()
        tensors = {f"{name}scales": linear.stored_scales() for name, linear in student.linears.items()}
        overwrite_tensors(gptq_dir, tensors | (student.norms.stored() if settings.norms else {}))
    return RefineReport(
        kept=kept,
        kl_before=before,
        kl_after=after,
        steps=settings.steps,
        tokens=tokens,
        rows=len(training),
        held_out_rows=len(exam_rows),
        scales=sum(linear.log_scale.numel() for linear in student.linears.values()),
        norm_weights=student.norms.epsilon.numel() if settings.norms else 0,
        teacher_seconds=taught - started,
        seconds=time.perf_counter() - started,
    )


@contextmanager
def _sums_in_fixed_order() -> Iterator[None]:
    """Have PyTorch take deterministic kernels where it has a choice: on a GPU, for attention's backward.

    Only warnings otherwise, which say that cuBLAS needs a setting for several streams; here there is one.
    """
    enabled, only_warned = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    setting: Any = torch.utils.deterministic
    filled = setting.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        torch.use_deterministic_algorithms(True, warn_only=True)
        setting.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(enabled, warn_only=only_warned)
            setting.fill_uninitialized_memory = filled


@dataclass(frozen=True)
class Lesson:
    """One batch of rows and what the teacher makes of it."""

    input_ids_BT: torch.Tensor
    positions_T: torch.Tensor
    """int64, on the device: which of the batch's positions count, row after row."""
    weight_T: torch.Tensor
    """fp32, on the device."""
    teacher_TD: torch.Tensor
    """What the teacher's head gets there, on the CPU, pinned where there is a GPU."""

    @property
    def tokens(self) -> int:
        return self.positions_T.numel()


@torch.no_grad()
def teach(
    build: Callable[[TensorSource], Skeleton], source: TensorSource, batches: Sequence[Batch], device: str
) -> list[Lesson]:
    """Stream the teacher through the device, the next layer being read while one computes."""
    stored = PrefetchingSource(source, device)
    skeleton = build(stored)
    prefixes = [skeleton.checkpoint_name(f"{skeleton.layers_name}.{i}.") for i in range(len(skeleton.layers))]
    names = [[name for name in stored.names() if name.startswith(prefix)] for prefix in prefixes]
    stored.prefetch(names[0])
    states = enter_model(skeleton, batches, device)
    outputs: list[type] = []
    skeleton.layers[-1].register_forward_hook(lambda module, args, output: outputs.append(type(output)))
    for index, read_now in enumerate(names):
        if index + 1 < len(names):
            stored.prefetch(names[index + 1])
        layer = skeleton.fill_layer(index, device)
        states.advance(layer, index)
        layer.to("meta")
        stored.release(read_now)
    stored.close()
    lessons = []
    last_states = _leave_model(build(source), states, in_tuple=outputs[0] is tuple)
    for batch, hidden_BTD in zip(batches, last_states, strict=True):
        count = batch.input_ids_BT.numel()
        positions_T = torch.arange(count, device=device) if batch.real is None else batch.real
        weight_T = torch.ones(len(positions_T), device=device) if batch.weight is None else batch.weight[positions_T]
        positions_T, weight_T = positions_T[weight_T > 0], weight_T[weight_T > 0]
        teacher_TD = hidden_BTD.flatten(0, 1)[positions_T].cpu()
        if hidden_BTD.is_cuda:
            teacher_TD = teacher_TD.pin_memory()
        lessons.append(Lesson(batch.input_ids_BT, positions_T, weight_T, teacher_TD))
    return lessons


def _leave_model(skeleton: Skeleton, states: CalibrationStates, *, in_tuple: bool) -> Iterator[torch.Tensor]:
    """Per batch [B, T, D]: what the decoder makes of the last layer's output, which is what its head gets.

    in_tuple: whether the model's layers return a tuple.
    """
    with skeleton.filled_entrance(states.device) as decoder, ExitStack() as stack:
        output: list[Any] = []
        for layer in skeleton.layers:
            stack.enter_context(forward_replaced(layer, lambda *args, **kwargs: output[0]))
        for batch, hidden_BTD in zip(states.batches, states.on_device(), strict=True):
            output[:] = [(hidden_BTD,) if in_tuple else hidden_BTD]
            yield decoder(input_ids=batch.input_ids_BT.to(states.device), use_cache=False).last_hidden_state


def train(student: Student, lessons: Sequence[Lesson], settings: RefineSettings, progress: Progress | None) -> int:
    """Tune the student's scales, and its norms where the settings say so. Returns the number of tokens that counted."""
    student.plan_memory(max((lesson.input_ids_BT for lesson in lessons), key=torch.numel))
    scales: dict[int, list[torch.Tensor]] = {}
    for linear in student.linears.values():
        scales.setdefault(linear.weight.bits, []).append(linear.log_scale)
    groups: list[dict[str, Any]] = [
        {"params": members, "lr": settings.learning_rate * 2.0 ** (4 - bits)} for bits, members in scales.items()
    ]
    if settings.norms:
        student.norms.train()
        groups.append({"params": [student.norms.epsilon], "lr": settings.norm_learning_rate})
    # Fused: a handful of kernels for all scales of the model. The loss is a sum over tokens, whose size Adam ignores.
    optimizer = torch.optim.Adam(groups, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings.steps))
    divergence = torch.zeros((), device=student.device)
    tokens = reported = 0
    for step, lesson in enumerate(_order(lessons, settings), start=1):
        optimizer.zero_grad()
        hidden_BTD = student.hidden(lesson.input_ids_BT)
        loss, grad_BTD = compare(student, hidden_BTD, lesson)
        hidden_BTD.backward(grad_BTD)
        if settings.norms:
            student.norms.take_gradients()
        optimizer.step()
        schedule.step()
        if settings.norms:
            student.norms.apply()
        divergence += loss / lesson.weight_T.sum()
        tokens += lesson.tokens
        if progress and (step % REPORT_EVERY == 0 or step == settings.steps):
            progress(step, settings.steps, f"KL {float(divergence) / (step - reported):.4f}")
            reported = step
            divergence.zero_()
    return tokens


def compare(student: Student, hidden_BTD: torch.Tensor, lesson: Lesson) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of weight · KL(teacher ‖ student) over the lesson, in nats; its gradient for the student's hidden states).

    With p and q the teacher's and the student's probabilities, ∂KL/∂(student's logits) = q − p.
    """
    student_TD = hidden_BTD.detach().flatten(0, 1)[lesson.positions_T]
    teacher_TD = lesson.teacher_TD.to(student_TD.device, non_blocking=True)
    grad_TD = torch.zeros_like(student_TD)
    total = torch.zeros((), device=student_TD.device)
    vocabulary = student.model.config.get_text_config().vocab_size
    chunk = max(1, LOGITS_ELEMENTS[student_TD.device.type] // vocabulary)
    for start in range(0, lesson.tokens, chunk):
        part = slice(start, start + chunk)
        weight_T = lesson.weight_T[part]
        hidden_TD = student_TD[part].requires_grad_(torch.is_grad_enabled())
        logits_TV = student.logits(hidden_TD)
        with torch.no_grad():
            log_p_TV = student.logits(teacher_TD[part]).float().log_softmax(-1)
            log_q_TV = logits_TV.float().log_softmax(-1)
            p_TV = log_p_TV.exp()
            total += torch.dot(weight_T, (log_p_TV.sub_(log_q_TV).mul_(p_TV)).sum(-1))
            grad_TV = log_q_TV.exp_().sub_(p_TV).mul_(weight_T.unsqueeze(1)).to(logits_TV.dtype)
        if torch.is_grad_enabled():
            (grad_TD[part],) = torch.autograd.grad(logits_TV, hidden_TD, grad_TV)
    grad_BTD = torch.zeros_like(hidden_BTD)
    grad_BTD.flatten(0, 1)[lesson.positions_T] = grad_TD
    return total, grad_BTD


@torch.no_grad()
def examine(student: Student, lessons: Sequence[Lesson]) -> float:
    """Mean divergence per unit of weight, in nats."""
    total = torch.stack([compare(student, student.hidden(lesson.input_ids_BT), lesson)[0] for lesson in lessons]).sum()
    return float(total / torch.stack([lesson.weight_T.sum() for lesson in lessons]).sum())


def _split(
    rows: Sequence[CalibrationRow], settings: RefineSettings
) -> tuple[list[CalibrationRow], list[CalibrationRow]]:
    """(rows to train on, rows held back), drawn with the seed from those with a position that counts."""
    rows = [row for row in rows if settings.prompt_weight > 0 or row.loss is None or any(row.loss)]
    if len(rows) < 2:
        raise UserError(
            f"{len(rows)} rows with tokens that count; refinement trains on some and holds others back",
            where="calibration",
            fix="raise quantize.calibration.samples",
        )
    order = random.Random(settings.seed).sample(range(len(rows)), len(rows))
    held_back = min(max(1, round(settings.held_out * len(rows))), len(rows) - 1)
    return [rows[index] for index in order[held_back:]], [rows[index] for index in order[:held_back]]


def _order(lessons: Sequence[Lesson], settings: RefineSettings) -> Iterator[Lesson]:
    """As many lessons as there are steps: all of them in a random order, again and again."""
    rng = random.Random(settings.seed)
    order: list[Lesson] = []
    for _ in range(settings.steps):
        order = order or rng.sample(lessons, len(lessons))
        yield order.pop()


def _rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: a linear warm-up, then half a cosine down to 0."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
