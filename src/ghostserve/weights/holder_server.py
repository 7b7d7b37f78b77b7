"""The holder's loop: connections in, the books asked, memory and descriptors out. One thread, and it waits for nobody.

Each round takes at most one message of each connection. An answer that does not fit into a peer's socket, since it does
not read, costs that peer its connection, and so does a message that is none. What a connection held ends with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import selectors
import socket
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ghostserve.arena import peers
from ghostserve.clock import monotonic_s
from ghostserve.errors import ProtocolError
from ghostserve.weights import pool_memory
from ghostserve.weights import pool_messages as messages
from ghostserve.weights.host_memory import HostMemory
from ghostserve.weights.pool_book import PoolBook
from ghostserve.weights.pool_types import Action, Free, GiveFollow, GiveHit, GiveLease, Image, Refusal, Refuse

logger = logging.getLogger(__name__)

QUIET_S = 5.0  # a connection that holds nothing and says nothing for so long is closed
CLIENTS_MAX = 4096
TICK_S = 30.0


@dataclass(slots=True, kw_only=True)
class _Client:
    number: int
    sock: socket.socket
    greeted: bool
    heard_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Memory:
    """An entry's descriptors."""

    fd: int  # for its filler
    reading_fd: int  # for everybody else
    image: Image
    meta_bytes: int = 0

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.reading_fd)


class HolderServer:
    """Serves `listener` until it has been idle for `idle_timeout_s`, or cannot be found any more (`findable`)."""

    def __init__(
        self,
        listener: socket.socket,
        book: PoolBook,
        *,
        idle_timeout_s: float,
        host_memory: Callable[[], HostMemory],
        findable: Callable[[], bool] = lambda: True,
        quiet_s: float = QUIET_S,
        tick_s: float = TICK_S,
        clients_max: int = CLIENTS_MAX,
    ) -> None:
        self._listener = listener
        self._book = book
        self._idle_timeout_s = idle_timeout_s
        self._host_memory = host_memory
        self._findable = findable
        self._quiet_s, self._tick_s, self._clients_max = quiet_s, tick_s, clients_max
        self._clients: dict[int, _Client] = {}
        self._memory: dict[int, _Memory] = {}
        self._todo: deque[Action] = deque()
        self._performing = False
        self._numbers = itertools.count(1)
        self._idle_since_s = monotonic_s()
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def run(self) -> str:
        """Serve; why it ended."""
        while True:
            for key, _ in self._selector.select(timeout=self._patience_s()):
                if key.data is None:
                    self._accept()
                elif key.data in self._clients:  # else dropped in this round
                    self._hear(self._clients[key.data])
            now_s = monotonic_s()
            self._perform(self._book.tick(now_s))
            for client in [one for one in self._clients.values() if self._is_mute(one, now_s)]:
                self._drop(client, "said nothing")
            if not self._book.idle:
                self._idle_since_s = now_s
            elif now_s - self._idle_since_s >= self._idle_timeout_s:
                return f"idle for {self._idle_timeout_s:g} s"
            if not self._book.in_use and not self._findable():
                return "its socket is gone, so that nobody can find it"

    def close(self) -> None:
        """Close every connection and all memory; what clients have mapped stays theirs."""
        for client in self._clients.values():
            client.sock.close()
        for memory in self._memory.values():
            memory.close()
        self._clients, self._memory = {}, {}
        self._selector.close()

    def _patience_s(self) -> float:
        now_s = monotonic_s()
        patience_s = self._tick_s
        if self._book.idle:
            patience_s = min(patience_s, self._idle_since_s + self._idle_timeout_s - now_s)
        mute = [one.heard_s for one in self._clients.values() if not self._book.holds(one.number)]
        if mute:
            patience_s = min(patience_s, min(mute) + self._quiet_s - now_s)
        return max(patience_s, 0.0)

    def _is_mute(self, client: _Client, now_s: float) -> bool:
        return not self._book.holds(client.number) and now_s - client.heard_s >= self._quiet_s

    # -- connections -------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        sock = peers.accept(self._listener, own_uid=os.geteuid())
        if sock is None:
            return
        if len(self._clients) >= self._clients_max:
            idle = next((one for one in self._clients.values() if not self._book.holds(one.number)), None)
            if idle is None:
                logger.warning("a client was refused: %d are connected already", len(self._clients))
                sock.close()
                return
            self._drop(idle, "made room for another")
        sock.setblocking(False)
        client = _Client(number=next(self._numbers), sock=sock, greeted=False, heard_s=monotonic_s())
        self._clients[client.number] = client
        self._selector.register(sock, selectors.EVENT_READ, data=client.number)

    def _hear(self, client: _Client) -> None:
        """One message, or the end."""
        client.heard_s = monotonic_s()
        try:
            data, fds, cut = peers.receive(client.sock, data_max_bytes=messages.REQUEST_BYTES_MAX, fds_max=1)
            for fd in fds:
                os.close(fd)
            if not data:
                self._drop(client, None)
                return
            if cut or fds:
                raise ProtocolError(f"{len(data)} bytes and {len(fds)} descriptors in one message")
            self._answer(client, messages.request_from_json(data))
        except BlockingIOError:
            return
        except (OSError, ProtocolError) as error:
            self._drop(client, str(error))

    def _drop(self, client: _Client, why: str | None) -> None:
        """Close a connection; what it held goes to others."""
        if self._clients.pop(client.number, None) is None:
            return
        if why is not None:
            logger.warning("client %d was dropped: %s", client.number, why)
        self._selector.unregister(client.sock)
        client.sock.close()
        if self._book.holds(client.number):
            self._perform(self._book.leave(client.number, free_bytes=self._free_bytes(), now_s=monotonic_s()))

    # -- requests ----------------------------------------------------------------------------------------------------

    def _answer(self, client: _Client, request: messages.Request) -> None:
        if isinstance(request, messages.Hello):
            self._greet(client, request)
        elif not client.greeted:
            raise ProtocolError("no hello")
        elif isinstance(request, messages.Open):
            if self._book.holds(client.number):
                raise ProtocolError("a connection holds one entry at a time")
            self._perform(
                self._book.open(
                    client.number, request.image, free_bytes=self._free_bytes(), now_s=monotonic_s()
                )
            )
        elif isinstance(request, messages.Publish):
            self._publish(client, request.meta_bytes)
        else:
            self._send(client, self._asked(request))

    def _greet(self, client: _Client, hello: messages.Hello) -> None:
        if hello.version != messages.VERSION:
            reason = f"the holder (process {os.getpid()}) speaks version {messages.VERSION}, and not {hello.version}"
            self._send(client, messages.Refused(why=Refusal.OTHER.value, reason=reason))
            return
        client.greeted = True
        if hello.budget_bytes is not None and hello.budget_bytes != self._book.budget_bytes:
            logger.info("the budget is %d bytes from now on", hello.budget_bytes)
            self._perform(self._book.set_budget(hello.budget_bytes, now_s=monotonic_s()))
        self._send(client, messages.Welcome())

    def _publish(self, client: _Client, meta_bytes: int) -> None:
        leased = self._book.lease_of(client.number)
        if leased is None:
            raise ProtocolError("nothing is leased to this connection")
        entry, image = leased
        memory = self._memory[entry]
        flaw = pool_memory.flaw(memory.fd, image.nbytes, meta_bytes)
        if flaw is not None:
            logger.warning("an entry of %s is not published: %s", image.label, flaw)
            self._perform(self._book.leave(client.number, free_bytes=self._free_bytes(), now_s=monotonic_s()))
            self._send(client, messages.Refused(why=Refusal.OTHER.value, reason=flaw))
            return
        self._memory[entry] = dataclasses.replace(memory, meta_bytes=meta_bytes)
        self._perform(self._book.publish(client.number, meta_bytes=meta_bytes, now_s=monotonic_s()))

    def _asked(self, ask: messages.Ask) -> messages.Answer:
        if ask.what == "status":
            return messages.numbers_of(self._book.stats())
        if ask.what == "list":
            return messages.page_of(self._book.entries(after=ask.after))
        if ask.what == "pin":
            count = self._book.pin(ask.name)
            if count is None:
                return messages.Refused(why=Refusal.OTHER.value, reason="too much is pinned already")
            return messages.Done(entries=count)
        if ask.what == "unpin":
            was_pinned, actions = self._book.unpin(ask.name, now_s=monotonic_s())
            self._perform(actions)
            return messages.Done(entries=int(was_pinned))
        count, in_use, actions = self._book.drop(ask.name)
        self._perform(actions)
        return messages.Done(entries=count, in_use=in_use)

    # -- what the books say ------------------------------------------------------------------------------------------

    def _perform(self, actions: Iterable[Action]) -> None:
        """In order. Performing one may drop a client, and what follows from that comes after what is there already."""
        self._todo.extend(actions)
        if self._performing:
            return
        self._performing = True
        try:
            while self._todo:
                self._perform_one(self._todo.popleft())
        finally:
            self._performing = False

    def _perform_one(self, action: Action) -> None:
        if isinstance(action, Free):
            self._free(action)
            return
        client = self._clients.get(action.client)
        if client is None:  # dropped meanwhile: `leave` has told the books
            return
        if isinstance(action, Refuse):
            self._send(client, messages.Refused(why=action.why.value, reason=action.reason))
        elif isinstance(action, GiveLease):
            self._lease(client, action)
        else:
            self._give(client, action)

    def _lease(self, client: _Client, action: GiveLease) -> None:
        image = self._book.image(action.entry)
        try:
            fd = pool_memory.create(image.nbytes)
            try:
                self._memory[action.entry] = _Memory(fd=fd, reading_fd=pool_memory.reading(fd), image=image)
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            logger.warning("no memory for %d bytes: %s", image.nbytes, error)
            self._perform(self._book.no_memory(client.number, f"no memory: {error}"))
            return
        self._send(client, messages.Given(how="lease", nbytes=image.nbytes), fd=fd)

    def _give(self, client: _Client, action: GiveFollow | GiveHit) -> None:
        memory = self._memory.get(action.entry)
        if memory is None:  # its lease failed a moment ago, and this client was refused with it
            return
        how = "hit" if isinstance(action, GiveHit) else "follow"
        given = messages.Given(how=how, nbytes=memory.image.nbytes, meta_bytes=memory.meta_bytes)
        self._send(client, given, fd=memory.reading_fd)

    def _free(self, action: Free) -> None:
        memory = self._memory.pop(action.entry, None)
        if memory is None:
            return
        if action.abandoned:
            with contextlib.suppress(OSError):
                pool_memory.mark_abandoned(memory.fd, memory.image.nbytes)
        memory.close()

    def _send(self, client: _Client, answer: messages.Answer, *, fd: int | None = None) -> None:
        """A peer that does not take its answer is dropped."""
        try:
            data = messages.to_json(answer)
            socket.send_fds(client.sock, [data], [] if fd is None else [fd])
        except OSError as error:
            self._drop(client, f"it does not read: {error}")

    def _free_bytes(self) -> int | None:
        """What may still be promised: what is left above the floor, less what running leases will still take."""
        try:
            spendable_bytes = self._host_memory().spendable_bytes
        except (OSError, ValueError, KeyError) as error:
            logger.warning("the machine's memory cannot be read: %s", error)
            return None
        for entry, charged_bytes in self._book.filling():
            memory = self._memory.get(entry)
            done_bytes = 0 if memory is None else pool_memory.allocated_bytes(memory.fd)
            spendable_bytes -= max(0, charged_bytes - done_bytes)
        return spendable_bytes
