"""Constraints on what is written: prefix checkers that work token by token, from a Python predicate, a regular expression, a JSON
schema or a Lark grammar.

A constraint says of every state (what was written so far, and can still become valid) which tokens may follow, and whether the
text may end here. It is monotone: what is refused once cannot be made good by more text. Tokens count by the bytes that they
write, so any tokenizer will do, and a token may end in the middle of a character.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from laconic.decoding.sampling import Processor, Text
from laconic.decoding.tree import DraftTree
from laconic.errors import LaconicError, quote


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What the tokens of a model write.

    Attributes:
        pieces: bytes of each token; None for those that write nothing, such as special ones.
        ends: tokens that end a text.
    """

    pieces: tuple[bytes | None, ...]
    ends: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Any, ends: Iterable[int] | None = None) -> Vocabulary:
        """Of a fast tokenizer of transformers; ``ends`` is by default its end-of-text token."""
        if isinstance(tokenizer, Vocabulary):
            return tokenizer
        end = getattr(tokenizer, "eos_token_id", None)
        found = frozenset(ends) if ends is not None else frozenset() if end is None else frozenset([end])
        if not found:
            raise LaconicError("The tokenizer has no token that ends a text: give its id as ends=[...].")
        return cls(tuple(token_bytes(tokenizer)), found)

    @cached_property
    def possible(self) -> torch.Tensor:
        """Boolean ``(vocabulary,)``: tokens that write something or end a text."""
        mask = torch.tensor([piece is not None for piece in self.pieces])
        mask[list(self.ends)] = True
        return mask

    @cached_property
    def guidance(self) -> Any:
        """The same for llguidance."""
        lib = _guidance()
        return lib.LLTokenizer(lib.TokenizerWrapper(_Pieces(self)), n_vocab=len(self.pieces))


class _Pieces:
    """A vocabulary in the form that llguidance asks for."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = min(vocabulary.ends)
        self.special_token_ids = [i for i, piece in enumerate(vocabulary.pieces) if not piece]
        self.tokens = [piece or f"<special {i}>".encode() for i, piece in enumerate(vocabulary.pieces)]

    def __call__(self, text: bytes) -> list[int]:
        raise LaconicError("This vocabulary does not tokenize texts.")  # nobody asks: nothing is forced, see FREE


# Where bytes are forced the library would refuse all tokens that write them but those of one tokenization, and masks would differ
# from checks.
FREE = '%llguidance {"no_forcing": true}\n'


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """Bytes that each token writes behind other text, None for special tokens and holes.

    Byte-level BPE, SentencePiece pieces with or without bytes, WordPiece, and whole words are known.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        raise LaconicError(f"The bytes of the tokens of {type(tokenizer).__name__} are not known: load a fast tokenizer.")
    write = _writer(json.loads(core.to_str())["decoder"])
    added = core.get_added_tokens_decoder()
    pieces: list[bytes | None] = [None] * (max(core.get_vocab().values()) + 1)
    for text, token in core.get_vocab().items():
        if token not in added:
            pieces[token] = write(text) or None
        elif not added[token].special and token not in tokenizer.all_special_ids:
            pieces[token] = text.encode()
    return pieces


def _writer(decoder: dict[str, Any] | None) -> Callable[[str], bytes]:
    """Bytes of a piece of the vocabulary, as a decoder of the tokenizers library writes it."""
    steps = {} if decoder is None else {d["type"]: d for d in decoder.get("decoders", [decoder])}
    if "ByteLevel" in steps:
        table = _byte_alphabet()
        return lambda text: bytes(table[c] for c in text) if all(c in table for c in text) else text.encode()
    if "ByteFallback" in steps or "Metaspace" in steps:
        byte = {f"<0x{value:02X}>": bytes([value]) for value in range(256)} if "ByteFallback" in steps else {}
        return lambda text: byte[text] if text in byte else text.replace("▁", " ").encode()
    if "BPEDecoder" in steps:
        suffix = steps["BPEDecoder"]["suffix"]
        return lambda text: (text.removesuffix(suffix) + " " * text.endswith(suffix)).encode()
    if not steps or "WordPiece" in steps:
        prefix = steps["WordPiece"]["prefix"] if steps else None
        return lambda text: (text.removeprefix(prefix) if prefix and text.startswith(prefix) else " " + text).encode()
    raise LaconicError(f"What tokens write is not known of a tokenizer that decodes by {', '.join(steps)}: give a Vocabulary.")


def _byte_alphabet() -> dict[str, int]:
    """The byte behind each character that byte-level BPE writes: printable bytes stand for themselves, others from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in plain]
    return {chr(value): value for value in plain} | {chr(256 + i): value for i, value in enumerate(others)}


class State:
    """What was written so far, under a constraint. States never change; ``after`` gives another one."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._known: dict[int, bool] = {}
        # Particles that share a past share what was found out about it, as long as one of them is there.
        self._next: weakref.WeakValueDictionary[int, State] = weakref.WeakValueDictionary()

    @cached_property
    def complete(self) -> bool:
        """Whether the text may end here."""
        return self._complete()

    def ok(self, token: int) -> bool:
        """Whether the text can still become valid with ``token`` behind it; for a token that ends it, whether it is valid."""
        if token in self.vocabulary.ends:
            return self.complete
        if token not in self._known:
            pieces = self.vocabulary.pieces
            self._known[token] = token < len(pieces) and pieces[token] is not None and self._extends(token)
        return self._known[token]

    def after(self, token: int) -> State:
        """The state behind a token that is ok."""
        state = self._next.get(token)
        if state is None:
            state = self._next[token] = self._after(token)
        return state

    def test_all(self) -> np.ndarray:
        """Boolean ``(vocabulary,)``: which tokens are ok, tested one by one."""
        return np.fromiter(map(self.ok, range(len(self.vocabulary.pieces))), bool)

    def mask(self) -> np.ndarray:
        """As ``test_all``, in the cheapest way that the constraint has."""
        return self.test_all()

    @property
    def mask_checks(self) -> int:
        """Questions to the checker that a mask takes."""
        return len(self.vocabulary.pieces)

    def _complete(self) -> bool:
        raise NotImplementedError

    def _extends(self, token: int) -> bool:
        raise NotImplementedError

    def _after(self, token: int) -> State:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Constraint:
    """A vocabulary, and the state in which nothing is written. Made by the functions below."""

    vocabulary: Vocabulary
    start: State

    def accepts(self, tokens: Iterable[int]) -> bool:
        """Whether a text, its end token apart, is valid."""
        state = self.start
        for token in tokens:
            if token in self.vocabulary.ends:
                break
            if not state.ok(token):
                return False
            state = state.after(token)
        return state.complete

    def possible(self, size: int) -> torch.Tensor:
        """Boolean ``(size,)``: tokens that can be ok at all, of a model with ``size`` logits: not special ones and holes."""
        known = self.vocabulary.possible[:size]
        return torch.nn.functional.pad(known, (0, size - len(known)))


class _Written(State):
    """Of a Python predicate: the characters that are complete, and the bytes of one that is not."""

    def __init__(self, vocabulary: Vocabulary, rule: tuple[Callable, Callable], text: str, rest: bytes) -> None:
        super().__init__(vocabulary)
        self.rule, self.text, self.rest = rule, text, rest

    def _complete(self) -> bool:
        return not self.rest and bool(self.rule[1](self.text))

    def _read(self, token: int) -> tuple[str, bytes] | None:
        reader = codecs.getincrementaldecoder("utf-8")()
        try:
            fresh = reader.decode(self.rest + self.vocabulary.pieces[token])
        except UnicodeDecodeError:
            return None
        return self.text + fresh, reader.getstate()[0]

    def _extends(self, token: int) -> bool:
        read = self._read(token)
        if read is None or not self.rule[0](read[0]):
            return False
        text, rest = read
        return not rest or any(self.rule[0](text + character) for character in characters(rest))

    def _after(self, token: int) -> State:
        return _Written(self.vocabulary, self.rule, *self._read(token))


@functools.cache
def characters(rest: bytes, most: int = 64) -> tuple[str, ...]:
    """Characters whose UTF-8 begins with ``rest``: all of them, or ``most`` spread evenly where there are more."""
    size = 2 if rest[0] < 0xE0 else 3 if rest[0] < 0xF0 else 4
    code = rest[0] & (0x7F >> size)
    for byte in rest[1:]:
        code = code << 6 | byte & 0x3F
    free = 6 * (size - len(rest))
    codes = range(code << free, (code + 1) << free, max(1, (1 << free) // most))
    found = (chr(c) for c in codes if c <= 0x10FFFF and not 0xD800 <= c < 0xE000)
    return tuple(character for character in found if character.encode().startswith(rest))


def predicate(prefix: Callable[[str], bool], complete: Callable[[str], bool], tokenizer: Any) -> Constraint:
    """From two functions on the text: whether it can still become valid, and whether it is valid as it stands.

    Args:
        prefix: has to be monotone: False stays False, whatever follows. A token that ends in the middle of a character is
            judged by 64 characters that begin so.
        tokenizer: a fast tokenizer of transformers, or a :class:`Vocabulary`.
    """
    vocabulary = Vocabulary.of(tokenizer)
    if not prefix(""):
        raise LaconicError("The constraint cannot be satisfied: its prefix function refuses the empty text.")
    return Constraint(vocabulary, _Written(vocabulary, (prefix, complete), "", b""))


class _Matched(State):
    """Of a grammar of llguidance."""

    def __init__(self, vocabulary: Vocabulary, matcher: Any) -> None:
        super().__init__(vocabulary)
        self.matcher = matcher

    def _complete(self) -> bool:
        return self.matcher.is_accepting()

    def _extends(self, token: int) -> bool:
        return self.matcher.validate_tokens([token]) == 1

    def _after(self, token: int) -> State:
        matcher = self.matcher.deep_copy()
        if not matcher.consume_token(token):
            raise LaconicError(f"The grammar library gave up: {quote(matcher.get_error(), 200)}.")
        return _Matched(self.vocabulary, matcher)

    def mask(self) -> np.ndarray:
        size, mask = len(self.vocabulary.pieces), None
        if self.matcher.is_stopped():  # valid, and nothing can follow
            mask = np.zeros(size, bool)
        else:
            bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
            mask = np.unpackbits(bits, count=size, bitorder="little").astype(bool)
        mask[list(self.vocabulary.ends)] = self.complete
        return mask

    @property
    def mask_checks(self) -> int:
        return 1


def regex(pattern: str, tokenizer: Any) -> Constraint:
    """Texts that match ``pattern`` as a whole. Needs llguidance; the syntax is that of Rust's regular expressions."""
    return _grammar(f"start: /{_guidance().regex_to_lark(pattern, '')}/", f"The pattern {quote(pattern)}", tokenizer)


def json_schema(schema: str | dict[str, Any], tokenizer: Any, *, spaces: bool = False) -> Constraint:
    """JSON texts that are valid under a schema. Needs llguidance.

    Args:
        spaces: whether white space may stand between parts. A small model may never stop writing it.
    """
    options = {"whitespace_flexible": spaces}
    try:
        grammar = _guidance().LLMatcher.grammar_from_json_schema(schema, overrides=options)
    except ValueError as error:
        raise LaconicError(f"The schema is not JSON: {quote(str(error), 200)}.") from error
    (part,) = json.loads(grammar)["grammars"]
    return _grammar(f"start: %json {json.dumps(part['json_schema'])}", "The schema", tokenizer)


def lark(grammar: str, tokenizer: Any) -> Constraint:
    """Texts of a context-free grammar in Lark's syntax, from ``start``. Needs llguidance."""
    return _grammar(grammar, "The grammar", tokenizer)


def _grammar(grammar: str, name: str, tokenizer: Any) -> Constraint:
    vocabulary, lib = Vocabulary.of(tokenizer), _guidance()
    matcher = lib.LLMatcher(vocabulary.guidance, lib.LLMatcher.grammar_from_lark(FREE + grammar), log_level=0)
    if matcher.is_error():
        reason = re.split(r"\s+\d+ \| ", matcher.get_error().split("<state>")[0])[0]  # without the lines of the grammar
        raise LaconicError(f"{name} cannot be used: {quote(' '.join(reason.split()), 300)}.")
    start = _Matched(vocabulary, matcher)
    if not start.mask().any():
        raise LaconicError(f"{name} cannot be satisfied: no text matches.")
    return Constraint(vocabulary, start)


def _guidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise LaconicError("Patterns, schemas and grammars need llguidance: pip install 'laconic[constrain]'.") from error
    return llguidance


def masked(constraint: Constraint) -> Processor:
    """A processor that leaves only the tokens which are ok, after every node of a draft tree: for ``Sampling(processors=...)``.

    The law is that of local masking: every step is right, and texts that run into rare endings are too likely (see ``awrs``).
    Where nothing is ok the text ends; ask ``constraint.accepts`` whether it is valid.
    """
    known: weakref.WeakKeyDictionary[Text, list[tuple[int, State | None]]] = weakref.WeakKeyDictionary()
    ends = sorted(constraint.vocabulary.ends)

    def follow(state: State | None, token: int) -> State | None:
        return state.after(token) if state is not None and token not in ends and state.ok(token) else None

    def process(logits: torch.Tensor, text: Text, tree: DraftTree) -> torch.Tensor:
        rows = known.setdefault(text, [(count, constraint.start) for count in text.prompts])
        allowed = np.zeros(logits.shape, bool)
        tokens, parents = tree.tokens.tolist(), tree.shape.parents.tolist()
        for row, (count, state) in enumerate(rows):
            for token in text.rows[row][count:]:
                state = follow(state, token)
            rows[row] = len(text.rows[row]), state
            states: list[State | None] = [state]
            for node in range(1, tree.nodes):
                above = parents[row][node]
                states.append(follow(states[above], tokens[row][node]) if above >= 0 else None)
            for node, at in enumerate(states):
                if at is not None:
                    mask = at.mask()[: logits.shape[-1]]
                    allowed[row, node, : len(mask)] = mask
                if not allowed[row, node].any():
                    allowed[row, node, ends] = True
        return logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), float("-inf"))

    return process
