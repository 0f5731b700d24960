"""Signals that come at a bad moment, on a machine that is busy.

    python3 .ci/signals.py [STARTS]

STARTS times (60) a service is started, takes a mail and gets SIGTERM right
behind its 250; it has to end with 0 within ten seconds. A third as often
SIGTERM comes again and again until it has ended. Then one service gets STARTS
times SIGHUP and has to reload before the next.
"""
import concurrent.futures
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, TOP)

from tests.fakes import Client, FakeSMTP, wait_until   # noqa: E402

AT_ONCE = 4             # services
TO_STOP = 10            # seconds that a service may take
# As an owner has it: Python keeps what it compiles.
ENVIRONMENT = {key: value for key, value in os.environ.items()
               if key != 'PYTHONDONTWRITEBYTECODE'}
INI = '''\
[config]
port=0
host=127.0.0.1
msgdir=msgs
[default]
smtphost=%s
smtpport=%d
'''


@contextlib.contextmanager
def busy_machine():
    loop = subprocess.Popen([sys.executable, '-c', 'while True: pass'])
    try:
        yield
    finally:
        loop.kill()
        loop.wait()


@contextlib.contextmanager
def service(upstream):
    """(process, its folder, its port); killed if it is still there."""
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, 'smtpproxy.ini'), 'w') as file:
            file.write(INI % (upstream.host, upstream.port))
        process = subprocess.Popen(
            [sys.executable, os.path.join(TOP, 'smtpproxy.py')], cwd=folder,
            env=ENVIRONMENT, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, text=True)
        try:
            yield process, folder, int(process.stdout.readline().split()[-1])
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def submit(port):
    client = Client(('127.0.0.1', port))
    with contextlib.closing(client):
        client.reply()
        for line in 'EHLO box', 'MAIL FROM:<a@b>', 'RCPT TO:<c@d>':
            client.command(line)
        assert client.data(b'Subject: x\r\n\r\nx\r\n')[0] == 250


def stop_once(upstream):
    """The exit code after one SIGTERM; None if it does not end."""
    with service(upstream) as (process, _, port):
        submit(port)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(TO_STOP)


def stop_again_and_again(upstream):
    """The same after one SIGTERM behind the other."""
    with service(upstream) as (process, _, port):
        submit(port)
        end = time.monotonic() + TO_STOP
        while process.poll() is None and time.monotonic() < end:
            process.terminate()
            time.sleep(0.001)
        return process.poll()


def reload_often(upstream, times):
    """How many of so many SIGHUPs were followed by a reload."""
    with service(upstream) as (process, folder, _):
        def reloads():
            with open(os.path.join(folder, 'smtpproxy.log')) as file:
                return file.read().count('INFO reloaded')
        for done in range(times):
            process.send_signal(signal.SIGHUP)
            try:
                wait_until(lambda: reloads() > done, TO_STOP)
            except AssertionError:
                return done
        return times


def main(starts):
    begin = time.monotonic()
    upstream = FakeSMTP()
    with contextlib.closing(upstream), busy_machine(), \
            concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        once = list(pool.map(stop_once, [upstream] * starts))
        again = list(pool.map(stop_again_and_again,
                              [upstream] * (starts // 3)))
        reloads = reload_often(upstream, starts)
    print('Ran %d stops, %d with more than one SIGTERM, %d of %d reloads in '
          '%.0f s; exit codes other than 0: %s' % (
              len(once), len(again), reloads, starts,
              time.monotonic() - begin, [x for x in once + again if x != 0]))
    return any(once + again) or None in once + again or reloads != starts


if __name__ == '__main__':
    sys.exit(main(int((sys.argv[1:] or [60])[0])))
