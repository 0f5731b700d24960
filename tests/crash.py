"""What a crash leaves of msgs/.

Recorder and Disk are a model of a disk: what was done to it, and what may be
on it if the power goes at any moment. tests/deep_crash.py goes through all of
them. Storm kills the real program under load:

    python3 -m tests.crash --kills 1000     # about ten minutes
    python3 -m tests.crash --kills 20       # for every day
    python3 -m tests.crash --folder DIR     # the spool dies in forked children
"""
import argparse
import collections
import functools
import itertools
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from types import SimpleNamespace

import smtpproxy
from tests.fakes import Client, FakeSMTP, wait_until

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# --- The model of a disk ----------------------------------------------------

class Recorder:
    """Notes, as long as the with block lasts, in which order the files in
    root/msgs are changed. timeline: a list of tuples, an operation and its
    arguments, with names relative to root, or whatever note() puts in."""

    CALLS = ('open', 'write', 'fsync', 'fdatasync', 'close', 'rename',
             'replace', 'unlink', 'remove', 'mkdir', 'rmdir', 'ftruncate',
             'truncate', 'link')

    def __init__(self, root):
        self.root, self.timeline, self.files = root, [], {}
        self.one_at_a_time = threading.RLock()

    def __enter__(self):
        self.saved = {name: getattr(os, name) for name in self.CALLS}
        self.real = dict(self.saved)
        for name in self.CALLS:
            setattr(os, name, functools.partial(self.call, name))
        # No power goes here, and other tests want the disk as well.
        self.real['fsync'] = self.real['fdatasync'] = lambda file: None
        return self

    def __exit__(self, *_):
        for name, function in self.saved.items():
            setattr(os, name, function)

    def note(self, *event):
        with self.one_at_a_time:
            self.timeline.append(event)

    def call(self, name, *arguments, **options):
        """Does what os.name does; only what succeeds is noted."""
        with self.one_at_a_time:
            file = self.name_of(arguments[0], options.get('dir_fd'))
            result = self.real[name](*arguments, **options)
            if name == 'open':
                self.files.pop(result, None)    # its number is used again
            if file is not None:
                self.understand(name, file, arguments, result)
            return result

    def name_of(self, file, folder=None):
        """The name below root of a path (relative to folder, if that is an
        open one) or open file, None if not ours."""
        if isinstance(file, int):
            return self.files.get(file)
        if folder in self.files:
            return os.path.join(self.files[folder], file)
        name = os.path.relpath(os.fspath(file), self.root)
        return '' if name == '.' else name if (
            name.split(os.sep)[0] == 'msgs') else None

    def understand(self, name, file, arguments, result):
        if name == 'open':
            self.files[result] = file
            self.note('open', file, arguments[1])
        elif name == 'close':
            self.files.pop(arguments[0], None)
            self.note('close', file)
        elif name == 'write':
            self.note('write', file, bytes(arguments[1][:result]))
        elif name in ('fsync', 'fdatasync'):
            self.note('fsync', file)
        elif name in ('rename', 'replace'):
            self.note('rename', file, self.name_of(arguments[1]))
        elif name in ('unlink', 'remove', 'mkdir'):
            self.note(name.replace('remove', 'unlink'), file)
        else:
            raise NotImplementedError('os.%s is not modelled' % name)


FOLDER = 'a folder'


class File:
    """The bytes of a file, and those that would survive a crash."""
    KINDS = 'synced', 'written', 'half', 'zeros', 'hole'

    def __init__(self):
        self.data = self.synced = b''

    def after_crash(self, kind):
        """What is there: the synced bytes alone, all that was written, half
        of it, its length and zeros, or all but for zeros in the middle."""
        start, end = len(self.synced), len(self.data)
        third = (end - start) // 3
        return {'synced': self.synced, 'written': self.data,
                'half': self.data[:start + (end - start) // 2],
                'zeros': self.synced.ljust(end, b'\0'),
                'hole': self.data[:start + third].ljust(end - third, b'\0')
                + self.data[end - third:]}[kind]


class Disk:
    """Replays a timeline. names: {name: File or FOLDER} for who asks now,
    lasting: what of that a crash can't undo, unsynced: the changes between
    the two, in order, each with the folders that it needs synced."""

    def __init__(self):
        self.names, self.lasting, self.unsynced = {}, {}, []

    def apply(self, operation, *arguments):
        getattr(self, operation)(*arguments)

    def open(self, name, flags):
        if flags & os.O_CREAT and name not in self.names:
            self.change({name: File()})
        elif flags & os.O_TRUNC:
            self.names[name].data = b''

    def write(self, name, data):
        self.names[name].data += data

    def close(self, name):
        pass                            # it makes nothing last

    def mkdir(self, name):
        self.change({name: FOLDER})

    def rename(self, old, new):
        self.change({old: None, new: self.names[old]})

    def unlink(self, name):
        self.change({name: None})

    def change(self, change):
        put(self.names, change)
        self.unsynced.append((change, set(map(os.path.dirname, change))))

    def fsync(self, name):
        """Of a file: its bytes. Of a folder: the names in it."""
        file = self.names.get(name, FOLDER)
        if file is not FOLDER:
            file.synced = file.data
            return
        for entry in self.unsynced[:]:
            change, folders = entry
            folders.discard(name)
            if not folders:
                self.unsynced.remove(entry)
                put(self.lasting, change)

    def after_crash(self, journal=True):
        """Yields (kind, {name: bytes or FOLDER}), what may be found after a
        crash now. Of the unsynced names the first few are there, none to all
        of them; without a journal it may be any of them."""
        for names in self.names_after_crash(journal):
            for kind in File.KINDS:
                yield kind, {
                    name: file if file is FOLDER else file.after_crash(kind)
                    for name, file in names.items()}

    def names_after_crash(self, journal):
        changes = [change for change, _ in self.unsynced]
        for count in range(len(changes) + 1):
            for some in [changes[:count]] if journal else (
                    itertools.combinations(changes, count)):
                names = dict(self.lasting)
                for change in some:
                    put(names, change)
                yield reachable(names)


def reachable(names):
    """names without those whose folder is gone."""
    found = {'': FOLDER}
    for name in sorted(names):
        if os.path.dirname(name) in found:
            found[name] = names[name]
    del found['']
    return found


def put(names, change):
    """Makes a change in names: None removes one."""
    for name, file in change.items():
        if file is None:
            names.pop(name, None)
        else:
            names[name] = file


def restore(state, folder):
    """Makes the files of a state in an empty folder."""
    for name, content in sorted(state.items()):
        path = os.path.join(folder, name)
        if content is FOLDER:
            os.mkdir(path, 0o700)
        else:
            with open(path, 'wb') as file:
                file.write(content)


# --- A process that dies before its n-th operation --------------------------

class Death(Recorder):
    """Ends the process, with nothing finished or tidied up, when it has done
    so many operations."""

    def __init__(self, root, operations):
        super().__init__(root)
        self.left = operations

    def call(self, name, *arguments, **options):
        if self.name_of(arguments[0]) is not None:
            self.left -= 1
            if self.left < 0:
                os._exit(1)
        return super().call(name, *arguments, **options)


def spool_life(root, tell):
    """What happens to one mail in the spool."""
    spool = smtpproxy.Spool(os.path.join(root, 'msgs'))
    spool.open()
    spool.start()
    draft = spool.draft('a@home.lan', ['b@home.lan', 'c@home.lan'], {})
    draft.write(b'Subject: death\r\n\r\n')
    draft.write(b'a line of many\r\n' * 10000)
    draft.seal()
    draft.commit()
    tell('promised ' + draft.id)
    mail = spool.load(draft.id)
    mail.msg = mail.msg.replace(b'death', b'life')
    spool.replace(mail)
    tell('replaced')
    mail = spool.load(draft.id)
    mail.to = mail.to[1:]
    spool.save(mail)
    tell('saved')
    spool.remove(mail)
    spool.close()


def die_everywhere(folder):
    """One forked child for n = 0, 1, ... operations, until one has done all
    of them: folder/n/msgs is what it leaves, folder/n/told what it said."""
    for count in range(1000):
        root = os.path.join(folder, str(count))
        os.mkdir(root)
        child = os.fork()
        if child == 0:
            with open(os.path.join(root, 'told'), 'w') as told, (
                    Death(root, count)):
                spool_life(root, lambda line: print(
                    line, file=told, flush=True))
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            return


# --- Kills under load -------------------------------------------------------

CLIENTS = 8
CONNECTIONS = 4         # to the sink, at most
READY = 15              # seconds for a start
INI = """[config]
host=127.0.0.1
port=%d
msgdir=msgs
sleeptime=1
deleteonerror=false
[logging]
level=INFO
[default]
smtphost=127.0.0.1
smtpport=%d
smtpconnections=%d
localhostname=box.home.lan
"""


class Sink(FakeSMTP):
    """Keeps of each mail its name, whether it is whole, its recipients, the
    connection and when it came; now and then it wants a mail later."""

    def __init__(self, chance):
        super().__init__({'RCPT TO:<later@': lambda _: (
            '451 4.2.0 later' if chance.random() < 0.3 else None)})

    def record(self, kind, item):
        if kind == 'mails':
            name, crc = re.search(
                rb'^X-Storm: (\S+) (\S+)\r\n', item.data, re.M).groups()
            body = item.data.partition(b'\r\n\r\n')[2]
            item = SimpleNamespace(
                name=name.decode(), whole=int(crc, 16) == zlib.crc32(body),
                to=item.to, connection=item.connection, time=self.clock())
        if kind != 'commands':
            super().record(kind, item)


class Storm:
    """The real program, sent mail by some clients, killed and started again.

    promised: {name: recipients}, what was answered 250."""

    def __init__(self, folder, seed):
        self.folder, self.chance = folder, random.Random(seed)
        self.sink, self.promised = Sink(self.chance), {}
        self.kills, self.over = [], threading.Event()
        self.names = itertools.count()
        with socket.create_server(('127.0.0.1', 0)) as free:
            self.address = free.getsockname()
        with open(self.path('smtpproxy.ini'), 'w') as ini:
            ini.write(INI % (self.address[1], self.sink.port, CONNECTIONS))
        os.chmod(self.path('smtpproxy.ini'), 0o600)

    def path(self, *names):
        return os.path.join(self.folder, *names)

    # The clients.

    def send(self):
        """The life of a client."""
        while not self.over.is_set():
            try:
                with Client(self.address) as client:
                    client.reply()
                    client.command('EHLO storm')
                    for _ in range(self.chance.randint(1, 20)):
                        self.send_one(client)
                        self.over.wait(self.chance.uniform(0, 0.02))
            except (OSError, ValueError):
                self.over.wait(0.02)

    def send_one(self, client):
        name, size = 'm%d' % next(self.names), self.chance.choice(
            (10, 10, 100, 100, 1000, 20000))
        body = b'.line of %s\r\n' % name.encode() * size
        to = self.chance.choice((['a@x.org'], ['a@x.org', 'later@x.org']))
        client.command('MAIL FROM:<printer@home.lan>')
        for recipient in to:
            client.command('RCPT TO:<%s>' % recipient)
        code, _ = client.data(b'X-Storm: %s %08x\r\n\r\n%s' % (
            name.encode(), zlib.crc32(body), body))
        client.dialogue.clear()
        if code == 250:
            self.promised[name] = to

    # The program.

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, os.path.join(TOP, 'smtpproxy.py')],
            cwd=self.folder, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)

    def is_ready(self):
        if self.process.poll() is not None:
            raise RuntimeError('it does not start:\n' + self.log()[-2000:])
        try:
            with Client(self.address) as client:
                return client.reply()[0] == 220
        except OSError:
            return False

    def kill(self):
        """Now and then before it is ready."""
        self.start()
        if self.chance.random() < 0.9:
            wait_until(self.is_ready, READY)
            self.over.wait(self.chance.uniform(0, 0.4))
        else:
            self.over.wait(self.chance.uniform(0, 0.3))
        self.process.kill()
        self.process.wait()
        self.kills.append(time.monotonic())

    def finish(self):
        """A last start delivers what is left."""
        self.over.set()
        self.sink.script.clear()
        self.start()
        wait_until(self.is_ready, READY)
        wait_until(lambda: not self.waiting(), 60)
        self.process.send_signal(signal.SIGTERM)
        if self.process.wait(15) != 0:
            raise RuntimeError('a stop failed:\n' + self.log()[-2000:])

    def waiting(self):
        return [name for name in os.listdir(self.path('msgs'))
                if name.endswith('.mail')]

    def log(self):
        """All of it, old parts too."""
        return '\n'.join(open_and_read(self.path(name))
                         for name in os.listdir(self.folder)
                         if name.startswith('smtpproxy.log'))

    # All of it.

    def run(self, kills):
        """Returns whether all is well."""
        clients = [threading.Thread(target=self.send, daemon=True,
                                    name='storm-%d' % n)
                   for n in range(CLIENTS)]
        for client in clients:
            client.start()
        try:
            while len(self.kills) < kills:
                self.kill()
                if len(self.kills) % 50 == 0:
                    print('%5d kills, %7d answered 250, %7d arrived' % (
                        len(self.kills), len(self.promised),
                        len(self.sink.mails)), flush=True)
            self.over.set()
            for client in clients:
                client.join(15)
            self.finish()
        finally:
            self.over.set()
            self.process.kill()
            self.process.wait()
            self.sink.close()
        return self.judge()

    def judge(self):
        copies = collections.defaultdict(list)
        for mail in self.sink.mails:
            for recipient in mail.to:
                copies[mail.name, recipient].append(mail)
        lost = [(name, recipient) for name in self.promised
                for recipient in self.promised[name]
                if (name, recipient) not in copies]
        twice = [mails for mails in copies.values() if len(mails) > 1]
        wrong = [mails for mails in twice if not self.in_flight(mails)]
        figures = collections.OrderedDict((
            ('kills', len(self.kills)), ('answered 250', len(self.promised)),
            ('copies that arrived', sum(map(len, copies.values()))),
            ('LOST', len(lost)),
            ('not whole', sum(not m.whole for m in self.sink.mails)),
            ('sent again, in flight at a kill', len(twice) - len(wrong)),
            ('sent again for no reason', len(wrong)),
            ('broken rules of SMTP', len(self.sink.violations)),
            ('set aside', len(names_in(self.path('msgs', 'corrupt')))),
            ('tracebacks in the log', self.log().count('Traceback'))))
        for name, figure in figures.items():
            print('%8d %s' % (figure, name))
        for mail in (lost + wrong)[:5]:
            print('         %s' % (mail,))
        good = 'kills', 'answered 250', 'copies that arrived'
        return not any(figure for name, figure in figures.items()
                       if name not in good and 'in flight' not in name)

    def in_flight(self, mails):
        """Was every copy but the last under way at a kill: the last mail on
        its connection, and a kill before the next copy? (The sink may read
        a little after the kill what was sent before it.)"""
        return all(
            self.last_on[mail.connection] is mail
            and any(mail.time - 1 <= kill <= following.time
                    for kill in self.kills)
            for mail, following in zip(mails, mails[1:]))

    @property
    def last_on(self):
        """{connection: its last mail}"""
        if 'last' not in vars(self):
            self.last = {m.connection: m for m in self.sink.mails}
        return self.last


def open_and_read(path):
    with open(path, encoding='utf-8', errors='replace') as file:
        return file.read()


def names_in(folder):
    return os.listdir(folder) if os.path.isdir(folder) else []


def main():
    parser = argparse.ArgumentParser(prog='python3 -m tests.crash')
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--seed', type=int, default=None)
    parser.add_argument('--folder', help='for tests/deep_crash.py')
    options = parser.parse_args()
    if options.folder:
        return die_everywhere(options.folder)
    folder = tempfile.mkdtemp(prefix='smtpproxy-storm-')
    began = time.monotonic()
    good = Storm(folder, options.seed).run(options.kills)
    print('%8d seconds' % (time.monotonic() - began))
    if good:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        print('kept: ' + folder)
    return 0 if good else 1


if __name__ == '__main__':
    sys.exit(main())
