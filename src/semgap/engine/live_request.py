"""A request between its first call and its end: the tokens that are known of it, and those whose KV entries are computed."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from semgap.engine.batch import Run
from semgap.kv.block_tables import PrefixKey
from semgap.wire.frames import Coded
from semgap.wire.messages import Call

RequestKey = tuple[int, int]  # number of the session, number of the request in it


class CallError(Coded, ValueError):
    """A call that the engine does not take. `code` travels in error frames; the call changed nothing."""


@dataclass(slots=True, eq=False)
class LiveRequest:
    """`known` (most + 1,), int64: its first `length` tokens were fed by calls or drawn, the first `computed` have KV entries in `table`.

    `drawn_last`: the last known token was drawn and no call feeds it yet. The first `sealed` blocks of `table` are findable by others.
    Times are in seconds on the clock of the scheduler's caller.
    """

    key: RequestKey
    age: int  # counts requests: the youngest has the largest
    most: int
    known: np.ndarray
    length: int = 0
    computed: int = 0
    sealed: int = 0
    table: list[int] = field(default_factory=list)
    runs: bool = False  # admitted: may hold blocks
    claim: PrefixKey | None = None  # the block that it computes for all who wait for it

    draws: int = 0  # tokens still wanted by its call
    ends: bool = False
    drawn_last: bool = False
    is_new_call: bool = False  # the call has not run yet

    ready_s: float = 0.0  # since when it has waited for its next token, or for its next call
    deadline_s: float = 0.0  # for each draw of the call; 0: none
    started_s: float | None = None
    compute_s: float = 0.0

    @classmethod
    def begun(cls, key: RequestKey, age: int, call: Call, max_length: int) -> "LiveRequest":
        """A request without tokens, as its first call asks for it."""
        if call.position:
            raise CallError("position", f"request {key[1]} is not known here; it begins at position 0, not {call.position}")
        if not call.tokens:
            raise CallError("tokens", f"request {key[1]} begins without tokens; feed one or more")
        if not 0 < call.most <= max_length:
            raise CallError("position", f"request {key[1]} wants {call.most} positions in all; this engine has 1 to {max_length}")
        return cls(key, age, call.most, np.zeros(call.most + 1, np.int64))

    @property
    def filled(self) -> int:
        """Positions that its client counts as filled. Some of them may wait to be computed again."""
        return self.length - self.drawn_last

    @property
    def left(self) -> int:
        """Known tokens that are not computed."""
        return self.length - self.computed

    @property
    def is_decode(self) -> bool:
        """Its next pass has one token after others."""
        return self.length - self.computed == 1 and self.computed > 0

    def check(self, call: Call, tokens: np.ndarray) -> None:
        """Raises CallError if `call` cannot follow now."""
        number = self.key[1]
        if self.draws:
            raise CallError("drawing", f"request {number} still draws {self.draws} tokens; wait for them, or end it with draws 0")
        if call.position != self.filled:
            raise CallError("position", f"request {number} has {self.filled} filled positions, the call says {call.position}")
        if tokens.shape != (call.tokens,):
            raise CallError("tokens", f"request {number} feeds {call.tokens} tokens, and {tokens.size} came")
        if not call.tokens and not (call.draws and self.length):
            raise CallError("tokens", f"a call feeds nothing to request {number} and draws nothing; use tokens or draws of 1 or more")
        fed = self.filled + call.tokens if call.tokens else self.length
        if fed + max(call.draws - 1, 0) > self.most:
            wanted = f"{fed} tokens and {call.draws} draws"
            raise CallError("position", f"request {number} would pass its {self.most} positions with {wanted}; begin it with a larger most")

    def feed(self, call: Call, tokens: np.ndarray, now_s: float) -> None:
        """Takes a checked call: its tokens replace a drawn one that was not fed."""
        if call.tokens:
            self.known[call.position : call.position + call.tokens] = tokens
            self.length = call.position + call.tokens
        self.draws, self.ends, self.drawn_last, self.is_new_call = call.draws, call.ends, False, True
        self.deadline_s = call.deadline_us * 1e-6
        self.wait_from(now_s)

    def wait_from(self, now_s: float) -> None:
        """Its next token is wanted from now on."""
        self.ready_s, self.started_s, self.compute_s = now_s, None, 0.0

    def current_block(self, positions: int) -> np.ndarray | None:
        """The known tokens (positions,) of the block in which its next token lies, or None if it does not know the whole block."""
        begin = self.computed - self.computed % positions
        end = begin + positions
        return self.known[begin:end] if end <= self.length else None

    def run(self, tokens: int) -> Run:
        """The pass over its next `tokens` tokens. The table must cover them."""
        end = self.computed + tokens
        return Run(self.known[self.computed : end], self.computed, tuple(self.table), end == self.length)

    def draw(self, token: int, stops: Sequence[int] | frozenset[int]) -> bool:
        """Takes a drawn token. True if it is the last of its call: all are out, or it is a stop token."""
        self.known[self.length] = token
        self.length += 1
        self.draws -= 1
        if token in stops:
            self.draws = 0
        self.drawn_last = not self.draws
        return self.drawn_last

    def slack_s(self, now_s: float, token_s: float) -> float:
        """Time to spare until its next token is due, if each token takes `token_s`; infinite without a deadline."""
        if not self.deadline_s:
            return float("inf")
        return self.ready_s + self.deadline_s - now_s - self.left * token_s
