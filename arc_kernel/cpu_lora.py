"""LoRA on vLLM's CPU build as two matrix products a layer, instead of a copy of the adapter's weights per token.

vLLM's torch operators (vllm/lora/ops/torch_ops/lora_ops.py, read in 0.32) gather `weights[index of each token]`: at rank
32 on SmolLM2-135M that is 20 MB of copies a token in bfloat16, and index -1 (no adapter) takes the last slot's weights. Here a layer's
slots lie side by side. Answers of several adapters that are decoded together are multiplied with all slots' A, what is another's is
zeroed, and one product with all B adds the rest: so few rows cost their operators, not their FLOP. A prompt is multiplied with its own.
What few rows are multiplied with is put in order once for each adapter that is loaded (`cpu_operators.Product`).
For the head vLLM copies [vocabulary, rank] a token, 6 MB, also where no adapter has one: such adapters are passed over. GPUs keep
vLLM's own kernels.
"""

from __future__ import annotations

import inspect

from . import cpu_operators

SHORT = 32  # rows: shorter runs of one adapter are put together with their neighbours
FEW = 256  # rows: more are multiplied as fast in 16 bits without anything put in order, and need no zeros between slices


def install() -> bool:
    """Exchange vLLM's CPU LoRA wrapper's products; False, and nothing changed, where vLLM has moved it."""
    try:
        from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    except ImportError:
        return False
    names = lambda method: list(inspect.signature(method).parameters)
    first = ["self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale"]
    if names(PunicaWrapperCPU.add_lora_linear)[:7] != [*first, "output_slices"] or names(PunicaWrapperCPU.add_lora_logits)[:6] != first:
        return False
    if PunicaWrapperCPU.add_lora_linear is not _add_lora_linear:
        inherited = PunicaWrapperCPU.update_metadata

        def update_metadata(self, *args, **kwargs):
            inherited(self, *args, **kwargs)
            self.arc_kernel_segments = _segments(self.token_lora_indices)

        PunicaWrapperCPU.update_metadata = update_metadata
        PunicaWrapperCPU.add_lora_linear, PunicaWrapperCPU.add_lora_logits = _add_lora_linear, _add_lora_logits
    return True


class _Segment:
    """Neighbouring rows of a step that belong to one slot, or to several by turns (`slot` is None)."""

    def __init__(self, slots, start: int, stop: int):
        """`slots` int64 [tokens], -1 for none."""
        self.rows, self._slots, self._foreign = slice(start, stop), slots[start:stop], {}
        found = self._slots.unique().tolist()
        self.slot = found[0] if len(found) == 1 else None

    def foreign(self, slots: int, columns: int):
        """bool [rows, slots * columns]: columns of slots that are another's."""
        import torch

        if (slots, columns) not in self._foreign:
            mine = self._slots[:, None] == torch.arange(slots)
            self._foreign[slots, columns] = mine.logical_not_().repeat_interleave(columns, 1)
        return self._foreign[slots, columns]


def _segments(slots) -> list[_Segment]:
    """Of per-token slots int64 [tokens]: a prompt that is read is a segment, answers that are decoded are one together. Rows that all
    have no adapter are in none."""
    bounds, start, short = [], 0, False
    for count in slots.unique_consecutive(return_counts=True)[1].tolist():
        if short and count < SHORT:
            bounds[-1] = bounds[-1][0], start + count
        else:
            bounds.append((start, start + count))
        start, short = start + count, count < SHORT
    made = [_Segment(slots, *each) for each in bounds]
    return [segment for segment in made if segment.slot != -1]


class _Layer:
    """The weights of a layer that makes several outputs of one input (q, k and v), all slots in one memory: `a` [slots, slices * rank,
    in] and `b` [slots, slices * rank, out], zero where a slice's rows meet other slices' columns. The tensors that vLLM reads and
    writes, A [slots, 1, rank, in] and B [slots, 1, size, rank] of each slice, become views of them."""

    def __init__(self, a_stacked, b_stacked, sizes):
        import torch

        self.tensors = [*a_stacked, *b_stacked]  # held: their ids are how the layer is known
        slots, _, rank, inputs = a_stacked[0].shape
        self.slots, self.columns = slots, len(a_stacked) * rank
        self.a = a_stacked[0].new_empty(slots, self.columns, inputs)
        self.b = b_stacked[0].new_zeros(slots, self.columns, sum(sizes))
        self.parts, start = [], 0
        for number, (a, b, size) in enumerate(zip(a_stacked, b_stacked, sizes)):
            low, out = slice(number * rank, (number + 1) * rank), slice(start, start + size)
            for theirs, mine in ((a, self.a[:, None, low]), (b, self.b[:, None, low, out].mT)):
                mine.copy_(theirs)
                theirs.set_(mine.untyped_storage(), mine.storage_offset(), mine.shape, mine.stride())
            self.parts.append((low, out))
            start += size
        self.weights = {None: (self.a.flatten(0, 1).T, self.b.flatten(0, 1))} | {
            slot: (a.T, b) for slot, (a, b) in enumerate(zip(self.a, self.b))}
        self._orderly = cpu_operators.multiplies(self.a.dtype) and not any(tensor.is_inference() for tensor in self.tensors)
        self._ordered, self._written = {}, 0

    def add(self, y, x, segment: _Segment, scale) -> None:
        """y [rows, out] += scale * x [rows, in] @ A.T @ B.T, with each row's own A and B."""
        a, b = self.weights[segment.slot]
        ordered = self._in_order(segment.slot) if self._orderly and (len(x) < FEW or x.itemsize > 2) else None
        low = ordered[0](x) if ordered else x.mm(a)
        if segment.slot is None:
            low.masked_fill_(segment.foreign(self.slots, self.columns), 0)
        if ordered:
            y.add_(ordered[1](low), alpha=scale)
        elif len(self.parts) == 1 or segment.slot is None or len(x) < SHORT:
            y.addmm_(low, b, alpha=scale)
        else:
            for columns, out in self.parts:
                y[:, out].addmm_(low[:, columns], b[columns, out], alpha=scale)

    def _in_order(self, slot: int | None) -> tuple[cpu_operators.Product, cpu_operators.Product]:
        """Products with A and B of a slot, or of all (None), the same until vLLM writes into one: tensors count that, but those made in
        inference mode."""
        written = sum(tensor._version for tensor in self.tensors)
        if written != self._written:
            self._ordered, self._written = {}, written
        if slot not in self._ordered:
            self._ordered[slot] = tuple(map(cpu_operators.Product, self.weights[slot]))
        return self._ordered[slot]


def _add_lora_linear(self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **_):
    """y [tokens, out] += scale * x [tokens, in] @ A.T @ B.T, with A [slots, 1, rank, in] and B [slots, 1, slice, rank]."""
    if not self.arc_kernel_segments:
        return
    layers = self.__dict__.setdefault("arc_kernel_layers", {})
    layer = layers.get(id(lora_a_stacked[0]))
    if layer is None:
        layer = layers[id(lora_a_stacked[0])] = _Layer(lora_a_stacked, lora_b_stacked, output_slices)
    for segment in self.arc_kernel_segments:
        every = segment.rows.stop - segment.rows.start == len(x)
        layer.add(y if every else y[segment.rows], x if every else x[segment.rows], segment, scale)


def _add_lora_logits(self, y, x, lora_a_stacked, lora_b_stacked, scale, **_):
    """Logits y [prompts, vocabulary] += scale * x [prompts, hidden] @ A.T @ B.T, where an adapter has a head: its A is not zero."""
    y, x, slots = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]), self.sampler_indices
    for slot in slots.unique().tolist():
        if slot >= 0 and lora_a_stacked[slot].any():
            rows = slots == slot
            y[rows] = y[rows].addmm_(x[rows] @ lora_a_stacked[slot, 0].T, lora_b_stacked[slot, 0].T, alpha=scale)
