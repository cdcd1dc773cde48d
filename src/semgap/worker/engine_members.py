"""The engine's ends of its sessions' channels: who joins, who leaves, what comes and goes. Nothing here waits for a session."""

from __future__ import annotations

import selectors
import socket
from collections.abc import Iterator

import msgspec

from semgap.worker.engine_channel import Channel, FromSession, Gone, Message

Ready = list[tuple[selectors.SelectorKey, int]]


class Members:
    """The sessions of an engine, by number. The first one founded it; others come through `intake`, a channel's end each.

    Once all have left, the intake takes nobody any more. Who came through it just before is served yet.
    """

    def __init__(self, founder: Channel[FromSession], intake: socket.socket, welcome: Message) -> None:
        self._intake, self._takes, self._welcome = intake, True, welcome
        self._channels: dict[int, Channel[FromSession]] = {}
        self._arrived = 0
        self._selector = selectors.DefaultSelector()
        intake.setblocking(False)
        self._selector.register(intake, selectors.EVENT_READ)
        self._join(founder)

    @property
    def count(self) -> int:
        """Sessions that are here."""
        return len(self._channels)

    def wait(self, wait_s: float | None) -> Ready:
        """The sockets on which something happened, within `wait_s` at most (None: however long it takes)."""
        return self._selector.select(wait_s)

    def events(self, sockets: Ready) -> Iterator[tuple[int, FromSession | None]]:
        """The events there: (session, its message), or (session, None) if it left."""
        for key, ready in sockets:
            if key.fileobj is self._intake:
                if self._takes:  # else the last session left just before, and who came was taken in with that
                    self._take_in()
            elif key.data in self._channels:
                yield from self._of(key.data, ready)

    def send(self, session: int, message: Message) -> None:
        """Sends a message without waiting. That a session left shows in `events`."""
        channel = self._channels[session]
        try:
            channel.send(message)
        except Gone:
            channel.unsent.clear()
        self._watch(session, channel)

    def send_all(self, message: Message) -> None:
        """Sends a message to every session."""
        for session in self._channels:
            self.send(session, message)

    def dismiss(self, session: int) -> None:
        """Closes a session's channel."""
        channel = self._channels.pop(session)
        self._selector.unregister(channel)
        channel.close()
        if not self._channels and self._takes:
            self._close_intake()

    def _of(self, session: int, ready: int) -> Iterator[tuple[int, FromSession | None]]:
        channel = self._channels[session]
        try:
            if ready & selectors.EVENT_WRITE:
                channel.flush()
                self._watch(session, channel)
            for message in channel.receive() if ready & selectors.EVENT_READ else ():
                yield session, message
        except (Gone, msgspec.MsgspecError):
            self.dismiss(session)
            yield session, None

    def _join(self, channel: Channel[FromSession]) -> None:
        self._arrived += 1
        self._channels[self._arrived] = channel
        self._selector.register(channel, selectors.EVENT_READ, self._arrived)
        self.send(self._arrived, self._welcome)

    def _watch(self, session: int, channel: Channel[FromSession]) -> None:
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if channel.unsent else 0)
        if self._selector.get_key(channel).events != wanted:
            self._selector.modify(channel, wanted, session)

    def _take_in(self) -> bool:
        """Takes one session in. False if none waits."""
        try:
            _, fds, _, _ = socket.recv_fds(self._intake, 1, 1)
        except BlockingIOError:
            return False
        if fds:
            self._join(Channel(socket.socket(fileno=fds[0]), FromSession))
        return bool(fds)

    def _close_intake(self) -> None:
        """From now on the listening process founds a new engine; it sees at once that this one takes nobody."""
        self._takes = False
        self._selector.unregister(self._intake)
        self._intake.shutdown(socket.SHUT_RD)
        while self._take_in():
            pass
        self._intake.close()
