"""The KV blocks of live requests: growth, shared prefixes, and who computes a prefix that several requests wait for."""

from semgap.engine.live_request import LiveRequest
from semgap.kv.block_tables import BlockTables, PrefixKey


class RequestBlocks:
    """Keeps the block table of each request. Unless it `shares`, no request finds, adopts or waits for blocks of another.

    A request that begins a block claims it. Others that need the same block after the same prefix wait until it is full, then adopt it.
    """

    def __init__(self, tables: BlockTables, shares: bool) -> None:
        self._tables, self._shares = tables, shares
        self._claims: dict[PrefixKey, LiveRequest] = {}

    def missing(self, request: LiveRequest) -> int:
        """Blocks that the request still needs for its known tokens and one block more."""
        positions = min(request.length + self._tables.positions, request.most)
        return self._tables.blocks_of(positions) - len(request.table)

    def grow(self, request: LiveRequest, tokens: int) -> bool:
        """Takes blocks for the next `tokens` tokens; False if the pool runs out before."""
        wanted = self._tables.blocks_of(request.computed + tokens)
        while len(request.table) < wanted:
            block = self._tables.take()
            if block is None:
                return False
            request.table.append(block)
        return True

    def adopt(self, request: LiveRequest) -> None:
        """Holds all full blocks that follow the request's own, short of its last token, which it must compute."""
        positions = self._tables.positions
        while self._shares and request.left > positions and request.computed % positions == 0 and request.claim is None:
            key = self._current_key(request)
            block = None if key is None else self._tables.adopt(key)
            if block is None:
                return
            request.table.append(block)
            request.computed += positions
            request.sealed += 1

    def claimant(self, request: LiveRequest) -> LiveRequest:
        """Who computes the next block of `request`: itself, or the request that claimed an equal block before it."""
        positions = self._tables.positions
        stands_before_block = request.computed % positions == 0
        can_adopt = request.left > positions  # else the block has the last token, which the request computes itself
        return self._claim(request) if self._shares and stands_before_block and can_adopt else request

    def seal(self, request: LiveRequest) -> None:
        """Makes the blocks that are full now findable, and claims the one that is begun."""
        if not self._shares:
            return
        tables, positions = self._tables, self._tables.positions
        while (request.sealed + 1) * positions <= request.computed:
            number = request.sealed
            key = tables.key(request.table[:number], request.known[number * positions : (number + 1) * positions])
            request.table[number] = tables.seal(request.table[number], key)
            request.sealed += 1
            self._unclaim(request)
        if request.computed % positions:
            self._claim(request)

    def free(self, request: LiveRequest) -> None:
        """Gives back all blocks: nothing of the request is computed any more."""
        self._unclaim(request)
        self._tables.give_back(request.table)
        request.table, request.computed, request.sealed = [], 0, 0

    def _current_key(self, request: LiveRequest) -> PrefixKey | None:
        tokens = request.current_block(self._tables.positions)
        return None if tokens is None else self._tables.key(request.table[: request.sealed], tokens)

    def _claim(self, request: LiveRequest) -> LiveRequest:
        """Who has claimed the request's current block: the request itself if nobody did before."""
        key = self._current_key(request) if request.claim is None else None
        if key is None:
            return request
        owner = self._claims.setdefault(key, request)
        if owner is request:
            request.claim = key
        return owner

    def _unclaim(self, request: LiveRequest) -> None:
        if request.claim is not None:
            del self._claims[request.claim]
            request.claim = None
