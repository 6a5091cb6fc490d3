"""Greedy decoding with a static cache: a prefill, then steps of a token that a CUDA graph replays.

A step reads the last tokens, their position and the cache from fixed places and writes the next tokens and position
there, so that it is captured once and replayed without Python. Where it cannot be captured, or the graph does not do
what the step does (kernels on another stream are not in it), steps run one after the other, and `eager_because` says
why. Tokens are those of `model.generate` without sampling: rows of one length, and nothing ends them.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import StaticCache
from transformers.cache_utils import Cache, StaticLayer

from qlora.errors import UserError
from qlora.kernels.one_token import append

ALIGNED = 64
"""Slots of a cache are a multiple of it: attention with a mask is fastest so."""
WARM_UP = 3
"""Steps before capture: libraries choose kernels, and Triton compiles its own."""
# Root mean square of what logits differ by, in their deviations. Libraries may choose other kernels in a capture, whose
# rounding came to 0.04 in 32 layers of random weights; where a linear of one of them is missing it is above 0.15.
NOISE = 0.1


class _Layer(StaticLayer):
    """Keys and values of a layer, at the positions that all layers share; transformers' own adds up one for each."""

    def __init__(self, slots: int, positions: list[torch.Tensor]) -> None:
        super().__init__(max_cache_len=slots)
        self._positions = positions

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        append(self.keys, self.values, self._positions[0], key_states, value_states)
        return (key_states, value_states) if self._prefills else (self.keys, self.values)

    @property
    def _prefills(self) -> bool:
        return len(self._positions[0]) > 1

    def get_seq_length(self) -> Any:
        """Tokens before those that come now: a number for a prefill, which then needs no mask."""
        return 0 if self._prefills else self._positions[0][0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that are attended to, and how many were dropped before them."""
        return (query_length if self._prefills else self.max_cache_len), 0


class Decoder:
    """A model with a cache for `batch` rows of at most `length` tokens. Models with recurrent states are refused."""

    def __init__(self, model: Any, batch: int, length: int, *, graphs: bool | None = None) -> None:
        """graphs: whether to try; None for wherever there is a GPU."""
        self.model, self.device = model, next(model.parameters()).device
        self.eager_because: str | None = None
        self._tries = self.device.type == "cuda" if graphs is None else graphs
        self._graph: Any = None
        self._tokens_B1 = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
        self._position = torch.zeros(1, dtype=torch.long, device=self.device)
        self._positions = [self._position]
        self._logits_BV: torch.Tensor | None = None
        slots = -(-length // ALIGNED) * ALIGNED
        layers = StaticCache(config=model.config, max_cache_len=slots).layers
        plain = [layer for layer in layers if isinstance(layer, StaticLayer)]
        others = {type(layer).__name__ for layer in layers if layer not in plain}
        if others:
            raise UserError(f"layers with a state of another kind than keys and values: {', '.join(sorted(others))}")
        # Layers with a sliding window keep all tokens here: their masks, which are transformers' own, hide what is
        # behind it. Where there are none, layers have one mask in the form in which attention adds it.
        self._slots = None if any(layer.is_sliding for layer in plain) else torch.arange(slots, device=self.device)
        self._cache = Cache(layers=[_Layer(slots, self._positions) for _ in layers])

    @property
    def has_graph(self) -> bool:
        """Whether steps are replayed from a CUDA graph."""
        return self._graph is not None

    @torch.inference_mode()
    def prefill(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Start anew with a prompt of more than a token; returns the first new tokens [B, 1]."""
        length = ids_BT.shape[1]
        self._positions[0] = torch.arange(length, device=self.device)
        logits_BV = self._forward(ids_BT.to(self.device), self._positions[0], None)
        self._positions[0] = self._position
        self._position.fill_(length)
        return self._tokens_B1.copy_(logits_BV.argmax(-1, keepdim=True))

    @torch.inference_mode()
    def capture(self) -> None:
        """Make the graph of a step. After a prefill, whose state is as before when this returns."""
        if self._graph is not None or self.eager_because is not None or not self._tries:
            return
        if self.device.type != "cuda":
            self.eager_because = f"no CUDA graphs on {self.device.type}"
            return
        try:
            with self._unchanged():
                for _ in range(WARM_UP):
                    self._step()
                torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Other threads of a library may call CUDA meanwhile.
            with self._unchanged(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._step()
            self.eager_because = self._difference(graph)
            self._graph = graph if self.eager_because is None else None
        except Exception as error:  # whatever a library does that a graph cannot hold
            self.eager_because = _one_line(error)
            with contextlib.suppress(Exception):
                torch.cuda.synchronize()

    @torch.inference_mode()
    def step(self) -> torch.Tensor:
        """The next tokens [B, 1], overwritten by the next step."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self._step()
        return self._tokens_B1

    def greedy(self, ids_BT: torch.Tensor, new: int) -> torch.Tensor:
        """[B, new]: prompts and what follows them."""
        found = [self.prefill(ids_BT).clone()]
        self.capture()
        for _ in range(new - 1):
            found.append(self.step().clone())
        return torch.cat(found, dim=1)

    def _mask(self) -> torch.Tensor | None:
        """[1, 1, 1, slots]: 0 up to the position, −∞ behind it; of booleans, SDPA would make this in every layer."""
        if self._slots is None:
            return None
        dtype = self.model.get_input_embeddings().weight.dtype
        mask = torch.zeros(self._slots.shape, dtype=dtype, device=self.device)
        return mask.masked_fill_(self._slots > self._position, -torch.inf)[None, None, None]

    def _forward(self, ids_BT: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        output = self.model(
            input_ids=ids_BT,
            position_ids=positions[None],
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_BV: torch.Tensor = output.logits[:, -1]
        return logits_BV

    def _step(self) -> None:
        logits_BV = self._forward(self._tokens_B1, self._position, self._mask())
        self._logits_BV = logits_BV
        self._tokens_B1.copy_(logits_BV.argmax(-1, keepdim=True))
        self._position.add_(1)

    @contextlib.contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Tokens and position are afterwards what they were; slots behind the position are never read."""
        tokens_B1, position = self._tokens_B1.clone(), self._position.clone()
        yield
        self._tokens_B1.copy_(tokens_B1)
        self._position.copy_(position)

    def _difference(self, graph: Any) -> str | None:
        """Why the graph is not the step, if it is not."""
        with self._unchanged():
            graph.replay()
            torch.cuda.synchronize()
            assert self._logits_BV is not None
            of_graph = self._logits_BV.float().clone()
        with self._unchanged():
            self._step()
            of_step = self._logits_BV.float()
            torch.cuda.synchronize()
        error = (of_graph - of_step).square().mean().sqrt() / of_step.std()
        if bool(error <= NOISE):
            return None
        if not bool(error.isfinite()):
            return "a graph of it gives no numbers: a kernel is not in it"
        return f"a graph of it gives other logits (by {float(error):.2g} of their deviation): a kernel is not in it"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{type(error).__name__}: {text}"[:300]
