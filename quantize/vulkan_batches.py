"""The calibration tokens on a device, in batches, and what waits of each between two stages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from uq.formats.config import GemmaConfig
from uq.kernels.per_layer import Beside
from uq.kernels.products import flat
from uq.kernels.reference import embed
from uq.kernels.vulkan.dense.layer import Chunk, Layer, Tokens
from uq.kernels.vulkan.dense.matrix import Matrix, Store
from uq.quantize.calibration_engine import Array, LayerRows, TokenRows
from uq.quantize.vulkan_waiting import Waiting

# What waits of each batch.
HIDDEN, EXACT_HIDDEN, EXACT_OUT = "hidden", "exact hidden", "exact out"
CONTEXT, MLP_HIDDEN = "context", "mlp hidden"
INPUT_OF = {"self_attn.o_proj": CONTEXT, "mlp.down_proj": MLP_HIDDEN}


@dataclass(frozen=True)
class Pair:
    """Some sequences on the quantized path, and on the floating-point path when it is followed."""

    quantized: Chunk
    exact: Chunk | None


class Batches:
    """Pairs by their number; going through them brings their residual streams to the device.

    Attributes:
        tokens: of all.
        waiting: where they are between two stages.
    """

    def __init__(
        self, store: Store, config: GemmaConfig, rows: Iterable[TokenRows], waiting: Waiting
    ) -> None:
        """`rows`: as of `CalibrationEngine.begin`."""
        self._store, self._config, self.waiting = store, config, waiting
        self.pairs = [self._placed(number, batch) for number, batch in enumerate(rows)]
        self.tokens = sum(pair.quantized.tokens for pair in self.pairs)

    @property
    def corrects(self) -> bool:
        """Whether the floating-point path is followed."""
        return self.pairs[0].exact is not None

    def keep_hidden(self, number: int) -> None:
        """The residual streams of a pair were changed."""
        pair = self.pairs[number]
        self.waiting.keep(HIDDEN, number, pair.quantized.hidden)
        if pair.exact is not None:
            self.waiting.keep(EXACT_HIDDEN, number, pair.exact.hidden)

    def _placed(self, number: int, batch: TokenRows) -> Pair:
        exact = None
        if batch.exact is not None:
            exact = self._chunk(EXACT_HIDDEN, number, batch.exact, batch.exact_rows)
        return Pair(self._chunk(HIDDEN, number, batch.quantized, batch.quantized_rows), exact)

    def _chunk(self, what: str, number: int, rows: Array, per_layer: LayerRows | None) -> Chunk:
        embedded = embed(self._config, rows)
        hidden = flat(embedded)
        placed = self._store.put(self.waiting.name(what, number, len(hidden)), hidden)
        self.waiting.keep(what, number, placed)
        beside = Beside() if per_layer is None else Beside(embedded, per_layer)
        return Chunk(placed, rows.shape[0], rows.shape[1], beside)

    def __iter__(self) -> Iterator[tuple[int, Pair]]:
        """The pairs, each with its residual stream on the device."""
        for number, pair in enumerate(self.pairs):
            self.waiting.fetch(HIDDEN, number, pair.quantized.hidden)
            if pair.exact is not None:
                self.waiting.fetch(EXACT_HIDDEN, number, pair.exact.hidden)
            yield number, pair

    def input(self, role: str, number: int, inputs: Sequence[Tokens]) -> Tokens:
        """What a linear that joins the residual stream reads."""
        self.waiting.fetch(INPUT_OF[role], number, inputs[number].half)
        return inputs[number]

    def keep_exact_out(self, number: int, exact: Layer, role: str, x: Tokens) -> None:
        out = exact.linear(role, x, self.waiting.name(EXACT_OUT, number, x.half.rows))
        self.waiting.keep(EXACT_OUT, number, out)

    def exact_out(self, number: int) -> Matrix:
        """Outputs of the linear that joins the stream, on the floating-point path."""
        tokens = self.pairs[number].quantized.tokens
        name = self.waiting.name(EXACT_OUT, number, tokens)
        found = self._store.matrix(name, tokens, self._config.hidden_size)
        self.waiting.fetch(EXACT_OUT, number, found)
        return found

    @property
    def room(self) -> int:
        """Padded tokens of the largest batch."""
        return max(pair.quantized.hidden.height for pair in self.pairs)
