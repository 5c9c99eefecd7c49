"""A server that sends any bytes as its answer, also such as no HTTP library would send."""

import asyncio
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

Answer = Callable[[], Iterable[bytes]]


@dataclass
class RawServer:
    """A server on a loopback port that gives every request the same answer, and then closes the connection.

    Attributes:
        answer: Makes the chunks of an answer; b"" among them is a pause of 50 ms.
        requests: Heads of all requests.
    """

    answer: Answer = lambda: [plain(b"{}")]
    requests: list[bytes] = field(default_factory=list)
    url: str = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            length = re.search(rb"(?i)content-length: (\d+)", self.requests[-1])
            await reader.readexactly(int(length[1]) if length else 0)  # closing with bytes unread would reset
            for chunk in self.answer():
                if not chunk:
                    await asyncio.sleep(0.05)
                writer.write(chunk)
                await writer.drain()
        writer.close()


@contextmanager
def raw_server() -> Iterator[RawServer]:
    """Run a server in a thread."""
    made, loop = RawServer(), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> asyncio.Server:
        return await asyncio.start_server(made.handle, "127.0.0.1", 0, limit=2**24)

    server = asyncio.run_coroutine_threadsafe(start(), loop).result()
    made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield made
    finally:
        asyncio.run_coroutine_threadsafe(_cancel_others(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _cancel_others() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def head(status: str = "200 OK", **headers: str) -> bytes:
    """Return a status line and headers; underscores in names are dashes."""
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def plain(body: bytes, status: str = "200 OK", **headers: str) -> bytes:
    """Return a whole answer."""
    headers = {"Content_Type": "application/json", "Content_Length": str(len(body)), "Connection": "close"} | headers
    return head(status, **headers) + body


def endless(begin: bytes, chunk: bytes) -> Iterator[bytes]:
    """Yield ``begin``, and then ``chunk`` for ever."""
    yield begin
    while True:
        yield chunk
