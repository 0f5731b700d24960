"""Many clients at once, against the program as its owner runs it:

    python3 -m tests.load [--clients N] [--mails N]

1. So many clients that send one byte a second, while usual mail goes through;
   the times of that mail, alone and in such company, are printed.
2. So many mails from 32 clients, on kept and on new connections, to a fast
   sink: none may be lost, none may arrive twice.

Each part ends by itself within a minute. Exit code 0 if all is well.
"""
import argparse
import asyncio
import collections
import contextlib
import re
import resource
import statistics
import sys
import time

from tests.fuzz import Program

SENDERS = 32
PART_TIME = 55          # seconds that one part may take
SLOWER = 3              # times; what usual mail may lose in slow company
AT_LEAST = 0.25         # seconds; a delay that nobody notices is none
BODY = b'Subject: load\r\n\r\n' + b'A line of a usual mail.\r\n' * 160
SAID = (b'EHLO slow\r\nMAIL FROM:<a@home.lan>\r\nRCPT TO:<b@example.org>\r\n'
        b'DATA\r\nSubject: slow\r\n\r\n') + b'x' * 200


# --- The far end ------------------------------------------------------------

class Sink:
    """Takes all mail; arrived: {token: how often}."""

    def __init__(self):
        self.arrived, self.news = collections.Counter(), asyncio.Event()
        self.expected = {}              # token -> future

    async def start(self):
        self.server = await asyncio.start_server(
            self.serve, '127.0.0.1', 0, limit=1 << 20)
        return self.server.sockets[0].getsockname()[1]

    async def serve(self, reader, writer):
        with contextlib.suppress(OSError, EOFError, asyncio.CancelledError):
            await self.converse(reader, writer)
        writer.close()

    async def converse(self, reader, writer):
        writer.write(b'220 sink\r\n')
        while True:
            verb = (await reader.readline())[:4].upper()
            if verb == b'DATA':
                writer.write(b'354 go\r\n')
                self.take(await reader.readuntil(b'\r\n.\r\n'))
            elif verb == b'EHLO':
                writer.write(b'250-sink\r\n250-PIPELINING\r\n')
            elif verb in (b'QUIT', b''):
                return
            writer.write(b'250 2.0.0 ok\r\n')

    def take(self, mail):
        token = re.search(rb'\r\nX-Token: (\S+)', mail).group(1).decode()
        self.arrived[token] += 1
        if token in self.expected:
            self.expected.pop(token).set_result(time.monotonic())
        self.news.set()

    async def all_there(self, count, seconds):
        """Returns when so many mails are there or nothing comes any more."""
        end = time.monotonic() + seconds
        while len(self.arrived) < count and time.monotonic() < end:
            self.news.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.news.wait(),
                                       end - time.monotonic())


# --- The clients ------------------------------------------------------------

class Sender:
    """A client that waits for each reply; new: a connection for each mail."""

    def __init__(self, address, new):
        self.address, self.new, self.writer = address, new, None

    async def connect(self):
        self.reader, self.writer = await asyncio.open_connection(
            *self.address)
        await self.expect(b'220')
        await self.say(b'EHLO load', b'250')

    async def expect(self, code):
        while True:
            line = await self.reader.readline()
            if not line.startswith(code):
                raise ConnectionError('expected %s: %s' % (code, line))
            if line[3:4] == b' ':
                return

    async def say(self, line, code):
        self.writer.write(line + b'\r\n')
        await self.expect(code)

    async def send(self, token):
        """Hands a mail in; returns when it was answered 250."""
        if self.writer is None:
            await self.connect()
        await self.say(b'MAIL FROM:<a@home.lan>', b'250')
        await self.say(b'RCPT TO:<b@example.org>', b'250')
        await self.say(b'DATA', b'354')
        await self.say(b'X-Token: ' + token.encode() + b'\r\n' + BODY
                       + b'.', b'250')
        if self.new:
            await self.say(b'QUIT', b'221')
            self.close()

    def close(self):
        if self.writer:
            self.writer.close()
        self.writer = None


async def drip(address, replies, head_start):
    """Sends a byte a second, behind so many at once; never comes to an end."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        replies.append(await reader.readline())
        writer.write(SAID[:head_start])
        for byte in SAID[head_start:]:
            writer.write(bytes([byte]))
            await asyncio.sleep(1)
    finally:
        writer.close()


# --- The two parts ----------------------------------------------------------

async def journey(program, sink, token):
    """Seconds (until the 250, until it has arrived) of one mail."""
    sink.expected[token] = asyncio.get_running_loop().create_future()
    arrival, begin = sink.expected[token], time.monotonic()
    sender = Sender(program.address, new=False)
    await asyncio.wait_for(sender.send(token), 20)
    accepted = time.monotonic()
    sender.close()
    return accepted - begin, await asyncio.wait_for(arrival, 20) - begin


async def journeys(program, sink, name, count=30):
    """The medians of some mails."""
    times = [await journey(program, sink, '%s-%d' % (name, i))
             for i in range(count)]
    return [statistics.median(column) for column in zip(*times)]


async def slow_company(program, sink, clients):
    """True if usual mail doesn't notice the slow clients."""
    await journeys(program, sink, 'first', 5)
    alone = await journeys(program, sink, 'alone')
    replies, size = [], program.size()
    tasks = [asyncio.ensure_future(drip(
        program.address, replies, number % 100)) for number in range(clients)]
    while len(replies) < clients:
        await asyncio.sleep(0.05)
    among = []
    for part in range(10):
        among.append(await journeys(program, sink, 'part%d' % part, 10))
        await asyncio.sleep(1)
    among = [statistics.median(column) for column in zip(*among)]
    grown = program.size()
    lost = sum(task.done() for task in tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    print('%d clients of a byte a second (%d greeted, %d lost): usual mail '
          'accepted in %.1f ms, arrived after %.1f ms; alone %.1f and %.1f; '
          '%.1f kB and %d threads more' % (
              (clients, sum(r[:3] == b'220' for r in replies), lost)
              + tuple(1000 * t for t in among + alone)
              + ((grown.get('VmRSS', 0) - size.get('VmRSS', 0)),
                 grown.get('Threads', 0) - size.get('Threads', 0))))
    return not lost and all(r[:3] == b'220' for r in replies) and all(
        slow < max(SLOWER * quick, AT_LEAST)
        for slow, quick in zip(among, alone))


async def crowd(program, sink, mails):
    """True if each mail arrived exactly once."""
    tokens = iter(['crowd-%d' % i for i in range(mails)])
    taken, begin = [], time.monotonic()
    sink.arrived.clear()

    async def work(sender):
        for token in tokens:
            await sender.send(token)
            taken.append(token)
        sender.close()

    await asyncio.gather(*[work(Sender(program.address, new=i % 2 == 0))
                           for i in range(SENDERS)])
    accepted = time.monotonic() - begin
    await sink.all_there(mails, PART_TIME - accepted)
    seconds = time.monotonic() - begin
    lost = sum(not sink.arrived[token] for token in taken)
    twice = sum(count > 1 for count in sink.arrived.values())
    print('%d mails from %d clients: accepted in %.1f s (%.0f/s), all '
          'delivered after %.1f s (%.0f/s); lost: %d, twice: %d, left in '
          'msgs/: %d' % (len(taken), SENDERS, accepted, len(taken) / accepted,
                         seconds, len(taken) / seconds, lost, twice,
                         len(program.waiting())))
    return len(taken) == mails and not lost and not twice


async def run(clients, mails):
    """The exit code."""
    sink = Sink()
    port = await sink.start()
    program = Program(port, {
        'maxconnections=60': 'maxconnections=%d' % (clients + 100),
        'timeout=2': 'timeout=30', 'level=DEBUG': 'level=INFO'})
    fine = [False]
    try:
        fine = [await asyncio.wait_for(part, PART_TIME + 5) for part in (
            slow_company(program, sink, clients), crowd(program, sink, mails))]
    except (OSError, asyncio.TimeoutError) as error:
        print('failed: %r' % error)
    finally:
        fine.append(program.stop() == 0)
        sink.server.close()
        program.clean(keep=not all(fine))
    return not all(fine)


def main():
    parser = argparse.ArgumentParser(description='Many clients at once.')
    parser.add_argument('--clients', type=int, default=500, metavar='N')
    parser.add_argument('--mails', type=int, default=10000, metavar='N')
    options = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * options.clients + 200      # the program inherits the limit
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (
            needed if hard == resource.RLIM_INFINITY else min(needed, hard),
            hard))
    return asyncio.run(run(options.clients, options.mails))


if __name__ == '__main__':
    sys.exit(main())
