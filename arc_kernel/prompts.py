"""One view of a task becomes token ids and labels.

Ids are put together from parts (words as cached parts, cells from a table of one-token cells where the tokenizer has
them), so the label mask is known from the putting together and never searched for. The ids of an inference prompt are
exactly the beginning of the training example with the same pairs. Knows nothing of weights or engines.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from .errors import ArcKernelError
from .grids import GridEncoder
from .tasks import Grid, Pair, Task
from .views import View

IGNORED = -100  # label where no loss is taken (torch's cross_entropy ignore_index)
SYSTEM = "You are a helpful assistant."
QUESTION = "Find the rule that turns each input grid into its output grid and apply it to the test input."
SIDES = {"inputs": "Input", "outputs": "Output"}  # prompts that show one side of the pairs only and ask for one more
ONE_MORE = "Find what these {}s have in common and write one more."
ANCHORS = ("\n", "0", ":")  # a text is tokenized behind one of these where a tokenizer begins each text with a space
_MARK = "\u2402arc\u2402"  # stands in a rendered chat template where the grids go


@dataclass(frozen=True)
class Example:
    """A training example: `input_ids` int64 [T], `labels` int64 [T] with -100 where no loss is taken."""

    input_ids: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class _Words:
    """The words of a prompt kind around its grids; `end` is the token that closes an answer."""

    start: str
    before_input: str
    before_output: str
    after_pair: str
    before_test: str
    before_answer: str
    end: int


class PromptBuilder:
    """Builds prompts and training examples of one kind (`chat` or `compact`) with one encoder for one tokenizer.

    `longest_answer` is the number of tokens of a 30x30 answer with its closing token; `end_token` is that token's id,
    `special_tokens` is `special_ids` of the tokenizer.
    """

    def __init__(self, tokenizer, encoder: GridEncoder, kind: str):
        self.encoder, self.kind, self._tokenizer = encoder, kind, tokenizer
        self._begins_with_space = tokenizer.convert_ids_to_tokens(self._whole("0"))[:1] not in ([], ["0"])
        self.ids_of = functools.lru_cache(maxsize=4096)(self._tokenize)
        self._one_token_cells = all(len(self.ids_of(c)) == 1 for c in (*"0123456789", *encoder.separator))
        self._words = _chat_words(tokenizer) if kind == "chat" else _compact_words(tokenizer)
        self._side_words = functools.cache(functools.partial(_chat_side if kind == "chat" else _compact_side, tokenizer))
        self.end_token, self.special_tokens = self._words.end, special_ids(tokenizer)
        self.longest_answer = len(self.answer_ids(encoder.longest()))

    def _tokenize(self, text: str) -> tuple[int, ...]:
        """Ids of a text that goes on from another.

        Llama-2's tokenizer begins every text it is given with a space; inside a prompt there is none, so the text is then
        tokenized behind an anchor, whose ids are taken off again.
        """
        if not self._begins_with_space:
            return self._whole(text)
        for anchor in ANCHORS:
            ahead, ids = self._whole(anchor), self._whole(anchor + text)
            if ids[: len(ahead)] == ahead:
                return ids[len(ahead):]
        raise ArcKernelError(f"{self._tokenizer.name_or_path}: tokenizer joins {text[:20]!r} with whatever stands before it: "
                             "take another model")

    def _whole(self, text: str) -> tuple[int, ...]:
        """Ids of a text by itself, without the tokens a tokenizer puts around a text."""
        return tuple(self._tokenizer(text, add_special_tokens=False).input_ids) if text else ()

    def grid_ids(self, grid: Grid) -> list[int]:
        """Token ids of an encoded grid, line by line."""
        ids: list[int] = []
        for number, pieces in enumerate(self.encoder.lines(grid)):
            if number:
                ids += self.ids_of("\n")
            for piece in pieces if self._one_token_cells else ["".join(pieces)]:
                ids += self.ids_of(piece)
        return ids

    def answer_ids(self, grid: Grid) -> list[int]:
        """Token ids of an answer: the encoded grid and the closing token."""
        return [*self.grid_ids(grid), self.end_token]

    def prompt_ids(self, train: tuple[Pair, ...], test_input: Grid) -> list[int]:
        """Token ids up to the answer for train pairs and a test input, as some view shows them."""
        return self._prompt(train, test_input)[0]

    def _prompt(self, train: tuple[Pair, ...], test_input: Grid) -> tuple[list[int], list[slice]]:
        """Token ids up to the answer, and where in them what is learnt of each train pair's output stands."""
        w, ids, outputs = self._words, [], []
        ids += self._whole(w.start)
        for number, pair in enumerate(train, 1):
            ids += self.ids_of(w.before_input.format(number))
            ids += self.grid_ids(pair.input)
            ids += self.ids_of(w.before_output)
            first = len(ids)
            ids += self.grid_ids(pair.output)
            outputs.append(self._learnt(first, ids, w.after_pair))
            ids += self.ids_of(w.after_pair)
        ids += self.ids_of(w.before_test)
        ids += self.grid_ids(test_input)
        ids += self.ids_of(w.before_answer)
        return ids, outputs

    def _learnt(self, first: int, ids: list[int], after: str) -> slice:
        """Where the grid from `first` to the end of `ids` stands, with the token that comes next where it closes an answer, too: what
        closes a grid otherwise (a space before the marker, a line of words) is not taught, for no answer ends with it."""
        return slice(first, len(ids) + (self.ids_of(after)[:1] == (self.end_token,)))

    def prompt(self, view: View, task: Task, test_index: int) -> list[int]:
        """Token ids of the prompt for test input `test_index` of `task` under `view`."""
        seen = view.apply(task)
        return self.prompt_ids(seen.train, seen.test[test_index].input)

    def example(self, train: tuple[Pair, ...], target: Pair, all_outputs: bool = False) -> Example:
        """A training example that asks for `target.output`; loss is taken on the answer and its closing token.

        With `all_outputs` also on the output of each train pair but the first, which is predicted from the pairs before it, and on its
        closing token where that is the answer's.
        """
        prompt, outputs = self._prompt(train, target.input)
        ids = np.array(prompt + self.answer_ids(target.output), dtype=np.int64)
        labels = np.full(len(ids), IGNORED)
        for part in (*(outputs[1:] if all_outputs else ()), slice(len(prompt), None)):
            labels[part] = ids[part]
        return Example(ids, labels)

    def side_example(self, side: str, context: tuple[Grid, ...], target: Grid, all_outputs: bool = False) -> Example:
        """A training example that shows the `inputs` (or `outputs`) of some pairs and asks for one more; loss as in `example`.

        Source: arc24's tasks inputs-from-inputs and outputs-from-outputs (github.com/ironbar/arc24), words of our own.
        """
        start, before, after, ask = self._side_words(side)
        ids, learnt = [*self._whole(start)], []
        for grid in context:
            ids += self.ids_of(before)
            first = len(ids)
            ids += self.grid_ids(grid)
            learnt.append(self._learnt(first, ids, after))
            ids += self.ids_of(after)
        ids += self.ids_of(ask)
        learnt = [*(learnt[1:] if all_outputs else ()), slice(len(ids), None)]
        found = np.array(ids + self.answer_ids(target), dtype=np.int64)
        labels = np.full(len(found), IGNORED)
        for part in learnt:
            labels[part] = found[part]
        return Example(found, labels)

    def text_of(self, answer_ids: list[int]) -> str:
        """The text of answer ids (without a closing token), exactly as the tokenizer spells it, special tokens included."""
        return self._tokenizer.decode(answer_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def fit(self, train: tuple[Pair, ...], test_input: Grid, answer_tokens: int, max_seq_len: int) -> tuple[int, ...] | None:
        """Indexes of the train pairs kept so that prompt plus answer fit, longest pairs dropped first, order kept.

        Lengths are the greater of the grid as it is and transposed, so that the choice holds under every view. None where
        it does not fit with a single pair (or, for a task without pairs, with none).
        """
        frame = len(self.prompt_ids((), np.zeros((1, 1), np.int8))) + answer_tokens + self._most_ids(test_input)
        words = max(len(self.ids_of(self._words.before_input.format(k))) for k in range(1, max(10, len(train)) + 1))
        words += len(self.ids_of(self._words.before_output)) + len(self.ids_of(self._words.after_pair))
        sizes = [self._most_ids(p.input) + self._most_ids(p.output) + words for p in train]
        keep = list(range(len(train)))
        while frame + sum(sizes[i] for i in keep) > max_seq_len:
            if len(keep) <= 1:
                return None
            keep.remove(max(keep, key=lambda i: sizes[i]))
        return tuple(keep)

    def fit_example(self, context: tuple[Pair, ...], target: Pair, max_seq_len: int) -> tuple[int, ...] | None:
        """`fit` for an example that asks for `target.output`: indexes of the context pairs kept, under every view."""
        return self.fit(context, target.input, self._most_ids(target.output) + 1, max_seq_len)

    def likely_answer(self, task: Task, test_index: int) -> int:
        """Tokens to leave for an answer, under every view: those of the longest train output or of the test input, whichever has more.

        21 of 1,002 outputs of ARC-AGI-1 and of 2's evaluation set are longer, which matters only where prompts fill the context.
        """
        return max(map(self._most_ids, (task.test[test_index].input, *(p.output for p in task.train)))) + 1

    def _most_ids(self, grid: Grid) -> int:
        """Token ids of a grid, as it is or transposed, whichever are more."""
        return max(len(self.grid_ids(grid)), len(self.grid_ids(grid.T)))


def special_ids(tokenizer) -> frozenset[int]:
    """Ids of all special tokens, those without a role (Gemma 3's `<end_of_turn>`, Phi-3's `<|end|>`) included."""
    return frozenset(tokenizer.all_special_ids) | {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def default_builder(tokenizer, encoder: str) -> PromptBuilder:
    """The builder for a model of which no run has said how it is asked: in its chat template, compact where it has none."""
    return PromptBuilder(tokenizer, GridEncoder.from_name(encoder), "chat" if getattr(tokenizer, "chat_template", None) else "compact")


def _compact_words(tokenizer) -> _Words:
    """No words: `I` and `O` before grids, and each output closed like an answer, as in the ARChitects' formatter
    (github.com/da-fr/arc-prize-2024, arc_loader.py): nothing but its place tells a pair from the test, and a model that learnt to go on
    after an output goes on after its answer (benchmarks/LOG.md)."""
    if tokenizer.eos_token_id is None:
        raise ArcKernelError(f"{tokenizer.name_or_path}: tokenizer has no end-of-sequence token: set eos_token in tokenizer_config.json")
    return _Words(_opening(tokenizer), "I\n", "\nO\n", tokenizer.eos_token, "I\n", "\nO\n", tokenizer.eos_token_id)


def _compact_side(tokenizer, side: str) -> tuple[str, str, str, str]:
    """Words before all grids, before a grid, after it, and before the answer: a letter before each grid, each closed like the answer."""
    return _opening(tokenizer), f"{SIDES[side][0]}\n", tokenizer.eos_token, f"{SIDES[side][0]}\n"


def _opening(tokenizer) -> str:
    """What a tokenizer puts before each text, as models of Llama's and Gemma's kind have seen it in training; others put nothing there."""
    whole, own = tokenizer("0").input_ids, tokenizer("0", add_special_tokens=False).input_ids
    ahead = next((k for k in range(len(whole)) if whole[k: k + len(own)] == own), 0)
    return "".join(tokenizer.convert_ids_to_tokens(whole[:ahead]))


def _chat_side(tokenizer, side: str) -> tuple[str, str, str, str]:
    """The same four in the model's own chat template, a turn for each grid."""
    before, reply, between, after, _ = _chat_frame(tokenizer)
    name = SIDES[side].lower()
    return f"{before}{ONE_MORE.format(name)}\nNew {name}:", reply, f"{between}New {name}:", after


def _chat_words(tokenizer) -> _Words:
    """The model's own chat template, a turn for each pair, the question in the first: each output is closed as the template closes a
    reply, like the answer. With all pairs in one turn a newline ended them, and a tenth of the answers went on after a whole grid
    (benchmarks/LOG.md)."""
    before, reply, between, after, end = _chat_frame(tokenizer)
    # one newline after the question: GPT-2's pre-tokenizer splits two before a word, and keeps them whole at a part's end
    return _Words(f"{before}{QUESTION}\n", "Input {}:\n", reply, between, "Test input:\n", after, end)


def _chat_frame(tokenizer) -> tuple[str, str, str, str, int]:
    """What the chat template puts before the user's first words, before a reply, between it and the user's next words, and before the
    answer; and the token that closes an answer."""
    if not getattr(tokenizer, "chat_template", None):
        raise ArcKernelError(f"{tokenizer.name_or_path}: tokenizer has no chat template: use prompt=compact")
    system, *turns = [{"role": role, "content": text} for role, text in
                      (("system", SYSTEM), ("user", _MARK), ("assistant", _MARK), ("user", _MARK))]
    render = lambda messages: tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    try:
        try:
            asked = render([system, *turns])
        except Exception:  # templates raise what they like, for example on a system role
            asked = render(turns)
    except Exception as error:
        why = " ".join(str(error).split())
        raise ArcKernelError(f"{tokenizer.name_or_path}: chat template fails: {why}: use prompt=compact") from None
    if asked.count(_MARK) != len(turns):
        raise ArcKernelError(f"{tokenizer.name_or_path}: chat template leaves messages out: use prompt=compact")
    before, reply, between, after = asked.split(_MARK)
    closing = tokenizer(between, add_special_tokens=False).input_ids
    end = closing[0] if closing and closing[0] in special_ids(tokenizer) else tokenizer.eos_token_id
    if end is None:
        raise ArcKernelError(f"{tokenizer.name_or_path}: chat template closes no answer and there is no eos_token: use prompt=compact")
    return before, reply, between, after, end
