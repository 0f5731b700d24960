"""A long backlog on disk: how soon the service answers, what it costs, and
whether all of it arrives.

    python3 -m tests.backlog [--mails 20000]

The figures and their limits are those of the issue: 220 in under 3 s, under
300 bytes of memory a mail, no scan of the whole folder for new mail, nothing
lost, nothing twice.
"""
import argparse
import collections
import os
import re
import shutil
import signal
import smtplib
import socket
import subprocess
import sys
import tempfile
import time
from unittest import mock

import smtpproxy
from tests.crash import TOP, names_in
from tests.fakes import Client, FakeSMTP, wait_until

CONTENT = (b'From: <printer@home.lan>\r\nX-Number: %d\r\n\r\n'
           + b'A line of a mail that had to wait.\r\n' * 20)
FRESH = 100             # mails that come in beside the backlog
INI = """[config]
host=127.0.0.1
port=%d
msgdir=msgs
sleeptime=1
deleteonerror=false
[logging]
level=WARNING
[default]
smtphost=127.0.0.1
smtpport=%d
localhostname=box.home.lan
"""


class Sink(FakeSMTP):
    """Counts mails by their number; first it wants none."""

    def __init__(self):
        super().__init__({'CONNECT': '421 4.3.2 later', '': '421 4.3.2 later'})
        self.copies = collections.Counter()

    def record(self, kind, item):
        if kind == 'mails':
            number = re.search(rb'^X-Number: (\d+)\r\n', item.data, re.M)[1]
            with self.changed:
                self.copies[int(number)] += 1


class Service:
    """The real program in a folder, and what it costs."""

    def __init__(self, folder, sink):
        self.folder = folder
        with socket.create_server(('127.0.0.1', 0)) as free:
            self.address = free.getsockname()
        ini = os.path.join(folder, 'smtpproxy.ini')
        with open(ini, 'w') as file:
            file.write(INI % (self.address[1], sink.port))
        os.chmod(ini, 0o600)

    def __enter__(self):
        """Returns when it answers 220; self.began: seconds that took."""
        begin = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, '-m', 'tests.backlog', '--serve', self.folder],
            cwd=TOP, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(self.answers, 60)
        self.began = time.monotonic() - begin
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(15)
        finally:
            self.process.kill()

    def answers(self):
        if self.process.poll() is not None:
            raise RuntimeError('it does not start')
        try:
            with Client(self.address) as client:
                return client.reply()[0] == 220
        except OSError:
            return False

    def memory(self):
        """Bytes that are its own (PSS, where Linux tells it)."""
        for name in 'smaps_rollup', 'smaps':
            try:
                with open('/proc/%d/%s' % (self.process.pid, name)) as file:
                    return 1024 * sum(map(int, re.findall(
                        r'^Pss: +(\d+) kB', file.read(), re.M)))
            except OSError:
                pass
        return 0

    def processor(self):
        """Seconds of CPU it has used."""
        with open('/proc/%d/stat' % self.process.pid) as file:
            fields = file.read().rpartition(')')[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf('SC_CLK_TCK')

    def rest(self):
        """Returns once it has nothing to do for a second."""
        samples = [-1.0]

        def calm():
            samples.append(self.processor())
            time.sleep(0.2)
            return len(samples) > 6 and samples[-1] - samples[-6] < 0.03
        wait_until(calm, 120)

    def scans(self):
        """How often it has listed the whole of msgs/."""
        with open(os.path.join(self.folder, 'scans')) as file:
            return len(file.readlines())

    def submit(self, first, count):
        with smtplib.SMTP(*self.address, timeout=20) as client:
            for number in range(first, first + count):
                client.sendmail('printer@home.lan', ['you@example.org'],
                                CONTENT % number)


def serve(folder):
    """The program as it is, but for a note at each scan of msgs/."""
    os.chdir(folder)
    msgs, notes = os.path.realpath('msgs'), os.path.join(folder, 'scans')

    def noted(function):
        def scan(path='.'):
            if os.path.realpath(path) == msgs:
                with open(notes, 'a') as file:
                    print('scan', file=file)
            return function(path)
        return scan
    os.listdir, os.scandir = noted(os.listdir), noted(os.scandir)
    return smtpproxy.main([])


def fill(folder, count):
    """Mails in folder/msgs, as a service leaves them; not synced one by one,
    since no crash is meant here."""
    spool = smtpproxy.Spool(os.path.join(folder, 'msgs'))
    spool.open()
    spool.start()
    with mock.patch('os.fsync'):
        for number in range(count):
            draft = spool.draft('printer@home.lan', ['you@example.org'], {})
            draft.write(CONTENT % number)
            draft.seal()
            draft.commit()
            draft.release()
    spool.close()


def waiting(folder):
    return sum(name.endswith('.mail')
               for name in names_in(os.path.join(folder, 'msgs')))


def at_rest(folder, count):
    """Bytes of a service that has count mails to keep, seconds to its 220."""
    sink = Sink()
    fill(folder, count)
    with sink, Service(folder, sink) as service:
        service.submit(count, 1)        # it has tried to deliver
        service.rest()
        return service.memory(), service.began


def drained(service, sink, folder):
    """Seconds until all have arrived and are removed."""
    begin = time.monotonic()
    sink.script.clear()
    service.process.send_signal(signal.SIGHUP)
    wait_until(lambda: not waiting(folder), 300)
    return time.monotonic() - begin


def report(what, figure, limit=None):
    """Prints a line; returns whether the figure is within the limit."""
    good = limit is None or figure <= limit
    print('%10.1f  %-46s %s' % (figure, what, '' if limit is None else
                                'limit %s: %s' % (limit, (
                                    'ok' if good else 'MISSED'))), flush=True)
    return good


def run(folder, count):
    empty, full = os.path.join(folder, 'empty'), os.path.join(folder, 'full')
    os.mkdir(empty), os.mkdir(full)
    base, _ = at_rest(empty, 0)
    fill(full, count)
    sink = Sink()
    with sink, Service(full, sink) as service:
        good = report('seconds to 220', service.began, 3)
        service.submit(count, 1)
        service.rest()
        good &= report('bytes of memory a mail', (
            service.memory() - base) / count, 300)
        before, cpu = service.scans(), service.processor()
        begin = time.monotonic()
        service.submit(count + 1, FRESH)
        report('seconds for %d new mails' % FRESH, time.monotonic() - begin)
        good &= report('scans of msgs/ for them',
                       service.scans() - before, 0)
        service.rest()
        report('CPU seconds for them and a rest', service.processor() - cpu)
        seconds = drained(service, sink, full)
        report('mails a second, drained', (count + 1 + FRESH) / seconds)
        report('bytes of memory a mail, at the end', (
            service.memory() - base) / count)
        lost = set(range(count + 1 + FRESH)) - set(sink.copies)
        good &= report('lost', len(lost), 0)
        good &= report('sent twice', sum(
            copies > 1 for copies in sink.copies.values()), 0)
    return good


def main():
    parser = argparse.ArgumentParser(prog='python3 -m tests.backlog')
    parser.add_argument('--mails', type=int, default=20000)
    parser.add_argument('--serve', metavar='FOLDER', help='used by itself')
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve)
    folder = tempfile.mkdtemp(prefix='smtpproxy-backlog-')
    try:
        return 0 if run(folder, options.mails) else 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == '__main__':
    sys.exit(main())
