#!/usr/bin/env python3
"""How small and how fast is smtpproxy on this box?

    python3 -m tests.bench                all workloads, some minutes
    python3 -m tests.bench accept rest    only these
    python3 -m tests.bench --rounds 1     one value instead of a median

The program from the folder above is started as a process, its msgs/ in a
temporary folder on the same disk. Load and destination are processes of
their own, so that they are not the slow part; the load is Postfix's
smtp-source where that is installed. Beside it stands what the box can do by
itself, measured in turns in the same run. Only ratios mean something: the
figures are true for this box at this hour.
"""
import argparse
import asyncio
import collections
import compileall
import concurrent.futures
import contextlib
import glob
import itertools
import os
import re
import shutil
import smtplib
import socket
import statistics
import subprocess
import sys
import tempfile
import time

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SENDER, RECIPIENT = b'printer@bench.test', b'you@bench.test'
BLOCK = (b'x' * 70 + b'\r\n') * 14563           # about a megabyte
CROWD, LIMIT = 500, 60                  # idle clients; seconds a step may take
MESSAGE = b'From: <%s>\r\n\r\n' % SENDER + BLOCK[:56 * 72]     # 4 KB
now = time.monotonic                            # one clock for all processes


class Skipped(Exception):
    """Why something could not be measured."""


# --- Processes beside: a destination, a load, a disk at work ----------------

class Sink(asyncio.Protocol):
    """A server that says yes, delay seconds late, and forgets. A line per
    mail is left in log: seconds, size."""
    REPLIES = {b'EHLO': b'250-bench\r\n250-PIPELINING\r\n250 8BITMIME\r\n',
               b'DATA': b'354 go\r\n', b'QUIT': b'221 bye\r\n'}

    def __init__(self, log, delay):
        self.log, self.delay = log, delay
        self.buffer, self.size = b'', None      # size: inside a mail

    def connection_made(self, transport):
        self.transport = transport
        self.answer(b'220 bench\r\n')

    def answer(self, text):
        if self.delay:
            asyncio.get_running_loop().call_later(
                self.delay, self.transport.write, text)
        else:
            self.transport.write(text)

    def data_received(self, data):
        self.buffer += data
        replies = b''.join(iter(
            lambda: self.command() if self.size is None else self.content(),
            None))
        if replies:
            self.answer(replies)

    def command(self):
        line, end, rest = self.buffer.partition(b'\n')
        if not end:
            return None
        self.buffer, verb = rest, line[:4].upper()
        if verb == b'DATA':
            self.size, self.buffer = 0, b'\r\n' + rest
        return self.REPLIES.get(verb, b'250 ok\r\n')

    def content(self):
        """Counts what is there, but for what may begin the end."""
        lines, end, rest = self.buffer.partition(b'\r\n.\r\n')
        if not end:
            lines, rest = lines[:-4], lines[-4:]
        self.size, self.buffer = self.size + len(lines), rest
        if not end:
            return None
        self.log.write('%.6f %d\n' % (now(), self.size))
        self.size = None
        return b'250 ok\r\n'


async def sink_process(port, path, delay):
    with open(path, 'w', buffering=1) as log:
        server = await asyncio.get_running_loop().create_server(
            lambda: Sink(log, float(delay)), '127.0.0.1', int(port),
            backlog=512)
        await server.serve_forever()


async def load_process(port, clients, mails, keep):
    """Hands mails in over so many connections at once."""
    numbers = iter(range(int(mails)))

    async def client():
        for _ in numbers:
            reader, writer = await asyncio.open_connection('127.0.0.1', port)

            async def say(line):
                writer.write(line + b'\r\n')
                if (await reader.readline())[:1] not in b'23':
                    sys.exit('refused: ' + line[:50].decode())
            await reader.readline()
            await say(b'HELO bench.test')
            while True:
                await say(b'MAIL FROM:<%s>' % SENDER)
                await say(b'RCPT TO:<%s>' % RECIPIENT)
                await say(b'DATA')
                await say(MESSAGE + b'.')
                if keep != 'True' or next(numbers, None) is None:
                    break
            await say(b'QUIT')
            writer.close()
    await asyncio.gather(*(client() for _ in range(int(clients))))


PROCESSES = {'sink': sink_process, 'load': load_process}


def process(name, *arguments):
    """The command line of one of these."""
    return [sys.executable, __file__, '--process', name] + [
        str(argument) for argument in arguments]


@contextlib.contextmanager
def running(command, **options):
    """A process; gets ten seconds to end by itself."""
    child = subprocess.Popen(command, **options)
    try:
        yield child.pid
    finally:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def output(command):
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, check=True,
                              stderr=subprocess.STDOUT, timeout=LIMIT).stdout
    except subprocess.CalledProcessError as error:
        raise Skipped(error.stdout.decode()[-200:].strip())
    except subprocess.TimeoutExpired:
        raise Skipped('not done in %d s' % LIMIT)


# --- Bench: the proxy, and what every workload needs ------------------------

def free_port():
    with socket.create_server(('127.0.0.1', 0)) as sock:
        return sock.getsockname()[1]


def greeted(port):
    """Waits until port says 220."""
    end = now() + 20
    while now() < end:
        with contextlib.suppress(OSError):
            with socket.create_connection(('127.0.0.1', port), 5) as sock:
                if sock.recv(512).startswith(b'220'):
                    return
        time.sleep(0.001)
    raise Skipped('nobody says 220')


def read(path):
    with open(path) as file:
        return file.read()


class Proxy:
    """One that runs, and what /proc knows of it."""

    def __init__(self, folder, port, pid):
        self.folder, self.port, self.pid = folder, port, pid

    def client(self):
        client = smtplib.SMTP('127.0.0.1', self.port, 'bench.test', 600)
        client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return client

    def queued(self):
        return len(glob.glob(self.folder + '/msgs/*.mail'))

    def cpu(self):
        """Milliseconds so far."""
        fields = read('/proc/%d/stat' % self.pid).rpartition(')')[2].split()
        return (int(fields[11]) + int(fields[12])) * 1000 / os.sysconf(
            'SC_CLK_TCK')

    def memory(self, key):
        """MB, of 'Pss', 'VmRSS' or 'VmHWM'."""
        file = 'smaps_rollup' if key == 'Pss' else 'status'
        return int(re.search(key + r':\s+(\d+)', read(
            '/proc/%d/%s' % (self.pid, file)))[1]) / 1024

    def wake_ups(self):
        """Voluntary context switches of all threads."""
        return sum(int(re.search(r'\nvol.*\s(\d+)', read(path))[1])
                   for path in glob.glob('/proc/%d/task/*/status' % self.pid))


class Bench:

    def __init__(self, options, folder):
        self.options, self.folder = options, folder
        self.source = shutil.which('smtp-source', path=os.environ.get(
            'PATH', os.defpath) + ':/usr/sbin:/usr/lib/postfix/sbin')
        self.mails = options.mails or min(2000, max(50, int(self.syncs(8))))

    def syncs(self, threads):
        """4 KB files made and synced, a second, by so many threads."""
        end = now() + 0.7

        def work(name):
            for count in itertools.count():
                if now() > end:
                    return count / 0.7
                file = os.open('%s/%s-%d' % (folder, name, count),
                               os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                os.write(file, BLOCK[:4096])
                os.fsync(file)
                os.close(file)
        with tempfile.TemporaryDirectory(dir=self.folder) as folder, \
                concurrent.futures.ThreadPoolExecutor(threads) as team:
            return sum(team.map(work, range(threads)))

    def load(self, proxy, clients, mails, keep=False):
        """Hands mails in; returns the mails a second."""
        begin = now()
        output([self.source, '-s', str(clients), '-m', str(mails), '-l',
                '4096', '-f', SENDER, '-t', RECIPIENT] + ['-d'] * keep
               + ['127.0.0.1:%d' % proxy.port] if self.source else
               process('load', proxy.port, clients, mails, keep))
        return mails / (now() - begin)

    def wait(self, what, condition):
        end = now() + LIMIT
        while not condition():
            if now() > end:
                raise Skipped('not in %d s: %s' % (LIMIT, what))
            time.sleep(0.001)

    @contextlib.contextmanager
    def proxy(self, destination=None, sleeptime=30):
        """A Proxy; by default nobody is where it delivers to."""
        port = free_port()
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            with open(folder + '/smtpproxy.ini', 'w') as file:
                os.chmod(file.name, 0o600)
                file.write(
                    '[config]\nport=%d\nhost=127.0.0.1\nmaxsize=10000000000\n'
                    'maxconnections=2000\ndeleteonerror=false\nmsgdir=msgs\n'
                    'sleeptime=%d\n[default]\nsmtphost=127.0.0.1\nsmtpport=%d'
                    % (port, sleeptime, destination or free_port()))
            # As the README's recipes do it: compiled, as a module.
            for name in 'smtpproxy.py', 'smtps.py':
                compileall.compile_file(os.path.join(TOP, name), quiet=1)
            with running([sys.executable, '-m', 'smtpproxy', '--config',
                          file.name], cwd=TOP,
                         stdout=subprocess.DEVNULL) as pid:
                greeted(port)
                yield Proxy(folder, port, pid)

    @contextlib.contextmanager
    def relaying(self, delay=0.0):
        """(a Proxy that has delivered ten mails, arrivals): arrivals(n)
        waits for n more and returns all so far, [seconds, size]."""
        port, rows = free_port(), []
        path = os.path.join(self.folder, 'arrived')
        with running(process('sink', port, path, delay)):
            greeted(port)
            with open(path) as log, self.proxy(port) as proxy:
                def arrivals(more):
                    target = len(rows) + more
                    self.wait('arrival', lambda: rows.extend(
                        line.split() for line in log) or len(rows) >= target)
                    return rows
                self.load(proxy, 1, 10)
                arrivals(10)
                yield proxy, arrivals


def journal_commits(folder):
    """How many the journal under folder has made, None if there is none."""
    device = os.stat(folder).st_dev
    name = os.path.basename(os.path.realpath(
        '/sys/dev/block/%d:%d' % (os.major(device), os.minor(device))))
    for path in glob.glob('/proc/fs/jbd2/%s-*/info' % name):
        return int(read(path).split()[0])


def hand_in(client, *content):
    """One mail; returns when its 250 is there."""
    client.mail(SENDER.decode())
    client.rcpt(RECIPIENT.decode())
    client.docmd('DATA')
    for chunk in content + (b'.\r\n',):
        client.sock.sendall(chunk)
    if client.getreply()[0] != 250:
        raise Skipped('not accepted')
    return now()


# --- Workloads: each returns {figure: value} --------------------------------

def accept(bench):
    """mails safe on disk at the 250; 1, 8, 32 clients, new or kept
    connections; the commits of ext4's journal that a mail costs"""
    figures, sent = {}, 0
    with bench.proxy(sleeptime=3600) as proxy:
        for clients in 1, 8, 32:
            for way in 'new', 'kept':
                count = bench.mails // (3 if clients == 1 else 1)
                before = journal_commits(bench.folder)
                rate = bench.load(proxy, clients, count, way == 'kept')
                sent += count
                bench.wait('all in msgs/', lambda: proxy.queued() == sent)
                figures['%d, %s, mails/s' % (clients, way)] = rate
                if before is not None:
                    figures['%d, %s, commits' % (clients, way)] = (
                        journal_commits(bench.folder) - before) / count
        figures['CPU ms a mail'] = proxy.cpu() / sent
    return figures


def synced_files(bench):
    """One 4 KB file a mail, by as many threads as clients."""
    rates = {clients: bench.syncs(clients) for clients in (1, 8, 32)}
    return {'%d, %s, mails/s' % (clients, way): rates[clients]
            for clients in rates for way in ('new', 'kept')}


def relay(bench, delay=0.0):
    """from the first byte in to the last mail at a near server"""
    with bench.relaying(delay) as (proxy, arrivals):
        cpu, begin = proxy.cpu(), now()
        bench.load(proxy, 8, bench.mails)
        rows = arrivals(bench.mails)
        return {'mails/s': bench.mails / (float(rows[-1][0]) - begin),
                'CPU ms a mail': (proxy.cpu() - cpu) / bench.mails}


def far(bench):
    """the same, and every answer of that server takes 20 ms"""
    return relay(bench, 0.02)


def latency(bench):
    """from the client's 250 to the arrival, one mail at a time"""
    accepts, arrived = [], []
    with bench.relaying() as (proxy, arrivals), proxy.client() as client:
        for _ in range(min(bench.mails, 200)):
            begin = now()
            at = hand_in(client, MESSAGE)
            accepts.append((at - begin) * 1000)
            arrived.append((float(arrivals(1)[-1][0]) - at) * 1000)
    arrived.sort()
    return {'accept p50 ms': statistics.median(accepts),
            'arrival p50 ms': statistics.median(arrived),
            'arrival p99 ms': arrived[len(arrived) * 99 // 100]}


def large(bench):
    """one large mail, and what memory grows by"""
    blocks, megabyte = bench.options.megabytes, len(BLOCK) / 1e6
    with bench.relaying() as (proxy, arrivals), proxy.client() as client:
        before = proxy.memory('VmRSS')
        with open('/proc/%d/clear_refs' % proxy.pid, 'w') as file:
            file.write('5')                     # the peak counts from here
        begin = now()
        at = hand_in(client, MESSAGE, *[BLOCK] * blocks)
        when, size = arrivals(1)[-1]
        if int(size) < len(BLOCK) * blocks:
            raise Skipped('it arrived with %s bytes' % size)
        return {'in MB/s': blocks * megabyte / (at - begin),
                'out MB/s': blocks * megabyte / (float(when) - at),
                'growth MB': proxy.memory('VmHWM') - before}


def rest(bench):
    """start, then nothing to do: memory, wake-ups"""
    begin = now()
    with bench.proxy() as proxy:
        figures = {'start s': now() - begin}
        time.sleep(1)
        figures['PSS MB'] = proxy.memory('Pss')
        figures['RSS MB'] = proxy.memory('VmRSS')
        before = proxy.wake_ups()
        time.sleep(bench.options.idle)
        figures['wake-ups in %d s' % bench.options.idle] = (
            proxy.wake_ups() - before)
    with bench.relaying() as (proxy, _):
        time.sleep(1)
        figures['PSS MB after 10 mails'] = proxy.memory('Pss')
    return figures


def sleeping_python(bench):
    """A bare python3 by the same names."""
    begin = now()
    output([sys.executable, '-c', 'pass'])
    seconds = now() - begin
    with running([sys.executable, '-c', 'import time; time.sleep(9)']) as pid:
        time.sleep(1)
        pss, rss = map(Proxy(None, None, pid).memory, ('Pss', 'VmRSS'))
        return {'start s': seconds, 'RSS MB': rss, 'PSS MB': pss,
                'PSS MB after 10 mails': pss}


def crowd(bench):
    """500 idle connections, and one mail more"""
    with bench.relaying() as (proxy, _), contextlib.ExitStack() as stack:
        before = proxy.memory('Pss')
        for _ in range(CROWD):
            stack.callback(proxy.client().close)
        grown = proxy.memory('Pss') - before
        begin = now()
        with proxy.client() as client:
            seconds = hand_in(client, MESSAGE) - begin
        return {'KB each': grown * 1024 / CROWD,
                'one more mail ms': seconds * 1000}


def calls(bench):
    """system calls of a mail from client to server, by strace"""
    if not shutil.which('strace'):
        raise Skipped('strace is not installed')
    names = ('fsync', 'fdatasync', 'write', 'openat', 'unlink', 'rename',
             'fadvise64')
    trace = os.path.join(bench.folder, 'trace')
    with bench.relaying() as (proxy, arrivals):
        with running(['strace', '-fqqo', trace, '-e', ','.join(names), '-p',
                      str(proxy.pid)], stderr=subprocess.DEVNULL):
            bench.wait('strace', lambda: int(re.search(r'TracerPid:\s*(\d+)',
                       read('/proc/%d/status' % proxy.pid))[1]))
            bench.load(proxy, 1, 50, True)
            arrivals(50)
            bench.wait('all removed', lambda: not proxy.queued())
        text = read(trace)
    return {name + ' a mail': len(re.findall(
        r'^\d+ +%s\(' % name, text, re.M)) / 50 for name in names}


def disk(bench):
    """the program without its tests"""
    names = [os.path.join(folder, name) for folder, _, names in os.walk(TOP)
             for name in names if '.log' not in name and not re.search(
                 r'/(\.|tests/|msgs/|__pycache__/|bench-)',
                 folder[len(TOP):] + '/')]
    return {'KB': sum(map(os.path.getsize, names)) / 1000}


WORKLOADS = {run.__name__: run for run in (
    accept, relay, far, latency, large, rest, crowd, calls, disk)}
BY_ITSELF = {'accept': synced_files, 'rest': sleeping_python}


# --- Rounds and tables ------------------------------------------------------

def measure(bench, name):
    """All rounds of a workload, in turns; prints its table."""
    print('\n%s: %s' % (name, ' '.join(WORKLOADS[name].__doc__.split())))
    runs = [run[name] for run in (WORKLOADS, BY_ITSELF) if name in run]
    values = [collections.defaultdict(list) for _ in runs]
    for _ in range(bench.options.rounds):
        for run, figures in zip(runs, values):
            try:
                for figure, value in run(bench).items():
                    figures[figure].append(value)
            except (Skipped, OSError, smtplib.SMTPException) as error:
                print('  not measured: %s' % error)
    row = '  %-22s' + '%24s' * (2 * len(runs) - 1)
    columns = [run.__name__.replace('_', ' ') for run in runs[1:]]
    print(row % ('', 'smtpproxy', *columns, *['ratio'] * len(columns)))
    for figure, own in values[0].items():
        limit = values[1].get(figure, []) if runs[1:] else []
        ratios = [a / b for a, b in zip(own, limit)]
        print(row % (figure, *map(
            spread, [own, limit, ratios][:2 * len(runs) - 1])), flush=True)


def spread(values):
    """The median, and from where to where."""
    if not values:
        return '-'
    low, middle, high = ('%.4g' % round(value, 2) for value in (
        min(values), statistics.median(values), max(values)))
    return middle if low == high else '%s (%s-%s)' % (middle, low, high)


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, prog='python3 -m tests.bench',
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('workload', nargs='*', help=', '.join(WORKLOADS))
    add('--rounds', type=int, default=3, help='(default: 3)')
    add('--mails', type=int, help='a load (default: what the disk can sync '
        'in a second, at most 2000)')
    add('--megabytes', type=int, default=100, help='of the large mail')
    add('--idle', type=int, default=10, help='seconds to count wake-ups')
    add('--folder', default=TOP, help='on the disk that counts')
    options = parser.parse_args(arguments)
    for name in set(options.workload) - set(WORKLOADS):
        parser.error('%s? there are %s' % (name, ', '.join(WORKLOADS)))
    return options


def main(arguments):
    if arguments[:1] == ['--process']:
        return asyncio.run(PROCESSES[arguments[1]](*arguments[2:]))
    options = parse(arguments)
    with tempfile.TemporaryDirectory(
            prefix='bench-', dir=options.folder) as folder:
        bench = Bench(options, folder)
        print('Python %s, %d CPUs, load %.1f; %d mails a load, from %s' % (
            sys.version.split()[0], os.cpu_count(), os.getloadavg()[0],
            bench.mails, bench.source or 'our own client'))
        print('median (lowest-highest); only the ratios mean something')
        for name in options.workload or WORKLOADS:
            measure(bench, name)


if __name__ == '__main__':
    main(sys.argv[1:])
