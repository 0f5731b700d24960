"""Whole sessions with mutations, against the program as its owner runs it:

    python3 -m tests.fuzz [--sessions N] [--seed S] [--show]

Each session is made from its own number, so that a failure can be repeated:
what clients say (often wrong, sometimes rubbish), the pieces in which they
send it, TLS or not, and how they leave. Then the program must still be there,
with an untroubled log, no more memory, files and threads than before, and
every mail that was answered 250 must have been delivered exactly once, with
no other mail hidden in it. Exit code 0 if so; --show tells a session.
"""
import argparse
import collections
import contextlib
import os
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time

from tests.fakes import (CERTIFICATE, Client, FakeSMTP, client_tls,
                         wait_until)

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CLIENTS = 20            # sessions at the same time
PATIENCE = 40           # seconds; several wrong passwords cost 3 each
GROWTH = {'VmRSS': 24000, 'fds': 6, 'Threads': 40}      # kB and pieces
INI = '''[config]
port={port}
host=127.0.0.1
tlsport={tlsport}
tlscert={cert}
tlskey={cert}
timeout=2
maxsize=200000
maxconnections=60
waitafterpop=0
deleteonerror=false
msgdir={folder}/msgs
sleeptime=1
[logging]
size=0
level=DEBUG
[default]
smtphost=127.0.0.1
smtpport={sink}
[locked@home.lan]
smtphost=127.0.0.1
smtpport={sink}
localpassword=secret
'''


# --- The program ------------------------------------------------------------

def free_port():
    with socket.create_server(('127.0.0.1', 0)) as sock:
        return sock.getsockname()[1]


class Program:
    """smtpproxy.py in a folder and a process of its own. settings: changes
    to the ini, what -> what."""

    def __init__(self, sink, settings=()):
        self.folder = tempfile.mkdtemp(prefix='smtpproxy-fuzz-')
        self.address = '127.0.0.1', free_port()
        self.tls_address = '127.0.0.1', free_port()
        ini = INI.format(port=self.address[1], tlsport=self.tls_address[1],
                         cert=CERTIFICATE, sink=sink,
                         folder=self.folder)
        for old, new in dict(settings).items():
            ini = ini.replace(old, new)
        self.write_ini(ini)
        with open(self.path('output'), 'wb') as output:
            self.process = subprocess.Popen(
                [sys.executable, os.path.join(TOP, 'smtpproxy.py')],
                cwd=self.folder, stdout=output, stderr=output)
        wait_until(self.answers, 20)

    def write_ini(self, text):
        with open(self.path('smtpproxy.ini'), 'w') as file:
            file.write(text)
        os.chmod(file.name, 0o600)

    def path(self, name):
        return os.path.join(self.folder, name)

    def answers(self):
        """Whether somebody is greeted."""
        try:
            with Client(self.address) as client:
                return client.reply()[0] == 220
        except OSError:
            if self.process.poll() is not None:
                raise SystemExit('it did not start:\n' + self.text('output'))

    def text(self, name):
        with open(self.path(name), encoding='utf-8',
                  errors='surrogateescape') as file:
            return file.read()

    def size(self):
        """{'VmRSS': kB, 'Threads': n, 'fds': n}, empty where unknown."""
        proc = '/proc/%d/' % self.process.pid
        if not os.path.isdir(proc):
            return {}
        with open(proc + 'status') as file:
            found = re.findall(r'(?m)^(VmRSS|Threads):\s+(\d+)', file.read())
        return dict([(name, int(value)) for name, value in found],
                    fds=len(os.listdir(proc + 'fd')))

    def waiting(self):
        """The names of mails in msgs/."""
        return [name for name in os.listdir(self.path('msgs'))
                if name.endswith('.mail')]

    def stop(self):
        """The exit code; kills what does not end in time."""
        self.process.terminate()
        try:
            return self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def clean(self, keep):
        if keep:
            print('kept: ' + self.folder)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)


# --- What clients say -------------------------------------------------------

VERBS = ('HELO x', 'EHLO printer', 'MAIL FROM:<a@home.lan>', 'DATA', 'RSET',
         'RCPT TO:<b@example.org>', 'NOOP', 'VRFY b', 'EXPN b', 'HELP',
         'AUTH LOGIN', 'AUTH PLAIN AHUAcA==', 'AUTH PLAIN', 'STARTTLS',
         'AUTH PLAIN AGxvY2tlZEBob21lLmxhbgB4',         # a wrong password
         'MAIL FROM:<locked@home.lan>', 'dXNlcg==', '*', 'QUIT',
         'BDAT 10 LAST', 'XCLIENT ADDR=1.2.3.4',
         'MAIL FROM:<> SIZE=999999999', 'RCPT TO:<' + 'x' * 3000 + '>',
         'MAIL FROM:<b\u00fc\U0001f600@x> SMTPUTF8', '.', '', ' ', '\t')
ADDRESSES = ('a@home.lan', 'a@home.lan', '', 'root', '"a b"@x', '"a>b"@x',
             'b\u00fc@x', 'a..b.@x', '@r.x:a@x', 'a@[127.0.0.1]', 'x' * 200)
PARTS = ('a', 'B', 'b@x', '@', '@x', '.', '"', '""', '"a b"', '\\', ' ', '\t',
         ':', '@r.x:', '@r,@s:', ',', ';', '<', '>', '/', '+49', '=', '\0',
         '[', ']', '[IPv6:::1]', '\u00fc', '\u00a0', '\x85', '\u2028',
         '\udcff')
LINES = ('Subject: x', 'Received: from y', 'From: <a@home.lan>', 'Bcc: c@x',
         '', '.', '..', '.x', ' folded', 'From a mailbox', 'x' * 1200, '\0',
         'QUIT', 'no colon', 'Date: x', 'Message-ID: <1@x>', '--b', '\u00e9')
ENDS = (b'\r\n',) * 30 + (b'\n', b'\r', b'\r\r\n', b'\0', b'\r\n.\n', b'\n.\r')
RUBBISH = (b'\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03', b'GET / HTTP/1.0',
           b'\x00' * 50, b'\xff' * 70, b'\x80\xe2\x82', b'%s%n', b'\x1b[2J',
           b'\r\n.\r\n', b'\n.\n', b'\r.\r', b'\r\n', b'\x04', b'<' * 300)


def word(dice, text):
    """text, with some of its letters in another case."""
    return dice.choice((text, text, text.lower(), text.swapcase()))


def address(dice):
    """Something like an address, as it stands between < and >."""
    if dice.random() < .3:
        return dice.choice(ADDRESSES)
    parts = [dice.choice(PARTS) for _ in range(dice.randrange(1, 6))]
    parts[dice.randrange(len(parts))] = dice.choice(ADDRESSES)
    return ''.join(parts)


def path(dice):
    """What stands behind FROM: or TO:."""
    if dice.random() < .9:
        return '<%s>' % dice.choice(ADDRESSES[:2] + ADDRESSES)
    return dice.choice(('<%s>', '%s', 'Name <%s>', '<@r.x:%s>', '@r.x:%s',
                        ' < %s >', '<%s> SIZE=1 BODY=8BITMIME')
                       ) % address(dice)


def envelope(dice):
    """A mail that is likely to be taken, as a list of bytes."""
    lines = [word(dice, 'EHLO ') + 'printer'] if dice.random() < .7 else []
    lines.append(word(dice, 'MAIL FROM:') + path(dice))
    for _ in range(dice.choice((1, 1, 1, 2, 5, 30))):
        lines.append(word(dice, 'RCPT TO:') + path(dice))
    lines.append(word(dice, 'DATA'))
    return [line.encode('utf-8', 'surrogateescape') + b'\r\n'
            for line in lines]


def content(dice):
    """The lines of a mail with its dot."""
    lines = [dice.choice(LINES).encode() + dice.choice(ENDS)
             for _ in range(dice.choice((0, 3, 10, 40)))]
    if dice.random() < .1:
        lines.append(b'y' * dice.choice((70000, 150000, 250000)) + b'\r\n')
    return [line.replace(b'.', b'..', 1) if line[:1] == b'.' and
            dice.random() < .7 else line for line in lines] + [b'.\r\n']


def commands(dice):
    return [dice.choice(VERBS).encode() + dice.choice(ENDS)
            for _ in range(dice.randrange(1, 8))]


def rubbish(dice):
    return [dice.choice(RUBBISH), bytes(
        dice.randrange(256) for _ in range(dice.randrange(60)))]


def mutated(dice, lines):
    """lines (of bytes) with a few of them changed, doubled, lost, moved."""
    for _ in range(dice.choice((0, 0, 0, 1, 2, 6))):
        place = dice.randrange(len(lines))
        dice.choice((
            lambda: lines.insert(place, lines[place]),
            lambda: lines.__delitem__(slice(place, place + 1)),
            lambda: lines.append(lines.pop(place)),
            lambda: lines.__setitem__(place, flipped(dice, lines[place])),
            lambda: lines.insert(place, rubbish(dice)[0])))()
        lines = lines or [b'\r\n']
    return lines


def flipped(dice, line):
    """line with one byte other, less or more."""
    place = dice.randrange(len(line) + 1)
    return (line[:place] + dice.choice((b'', b'\0', b'\r', b'\n', b' ', b':',
                                        b'<', b'\xff', b'"', b'\\'))
            + line[place + dice.randrange(2):])


class Session:
    """What the client of this number does.

    says: list of lines; way: how they are cut; leave: how it ends; tls:
    None, 'implicit', 'starttls', or 'rubbish' in place of a handshake;
    lf_only: it never sends a CR."""

    def __init__(self, seed, number):
        dice = self.dice = random.Random('%s/%s' % (seed, number))
        self.says = []
        for _ in range(dice.choice((1, 1, 2, 3, 6))):
            self.says += mutated(dice, dice.choice((
                lambda: envelope(dice) + content(dice),
                lambda: envelope(dice) + content(dice),
                lambda: envelope(dice) + content(dice),
                lambda: commands(dice), lambda: rubbish(dice)))())
        self.way = dice.choice(('lines', 'lines', 'packet', 'pieces', 'bytes'))
        self.leave = dice.choice(('quit',) * 8 + (
            'close', 'half', 'reset', 'cut', 'silent', 'deaf'))
        self.tls = dice.choice((None,) * 12 + (
            'implicit', 'starttls', 'rubbish'))
        self.lf_only = dice.random() < .1

    def pieces(self):
        data = b''.join(self.says)
        if self.leave == 'cut':
            data = data[:self.dice.randrange(len(data) + 1)]
        elif self.leave == 'quit':
            data += b'\r\n.\r\nQUIT\r\n'
        if self.lf_only:
            data = data.replace(b'\r', b'')
        if self.way == 'lines':
            return data.splitlines(True)
        if self.way == 'bytes':
            return [data[i:i + 1] for i in range(min(len(data), 3000))] + [
                data[3000:]]
        step = len(data) + 1 if self.way == 'packet' else (
            self.dice.randrange(1, 2000))
        return [data[i:i + step] for i in range(0, len(data), step)]

    def connect(self, program):
        sock = socket.create_connection(
            program.tls_address if self.tls in ('implicit', 'rubbish')
            else program.address, PATIENCE)
        try:
            if self.tls == 'rubbish':
                sock.sendall(b'\x16\x03\x01' + self.dice.choice(RUBBISH))
            elif self.tls == 'starttls':
                sock.sendall(b'STARTTLS\r\n')
                while b'220 2.0.0' not in sock.recv(1000):
                    pass
            if self.tls in ('implicit', 'starttls'):
                return client_tls().wrap_socket(
                    sock, server_hostname='localhost')
            return sock
        except BaseException:
            sock.close()
            raise

    def run(self, program):
        """What the program said (bytes). Raises TimeoutError if it did not
        end the conversation."""
        self.heard, self.hangs = [], False
        try:
            with self.connect(program) as sock:
                self.talk(sock)
        except OSError:
            pass                    # it may hang up on such a client
        if self.hangs:
            raise socket.timeout('not ended by the program')
        return b''.join(self.heard)

    def talk(self, sock):
        reader = threading.Thread(target=self.listen, args=(sock,),
                                  name='reader', daemon=True)
        listens = self.leave not in ('deaf', 'reset')
        if listens and not self.tls:
            reader.start()          # TLS sockets are for one thread
        self.say(sock)
        with contextlib.suppress(OSError):
            self.hang_up(sock)
        if reader.ident:
            reader.join()
        elif listens:
            self.listen(sock)

    def say(self, sock):
        try:
            for piece in self.pieces():
                sock.sendall(piece)
        except socket.timeout:
            self.hangs = self.leave != 'deaf'
        except OSError:
            pass

    def hang_up(self, sock):
        if self.leave in ('close', 'cut'):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)
        elif self.leave == 'half' and not self.tls:
            sock.shutdown(socket.SHUT_WR)
        elif self.leave == 'reset':
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                            struct.pack('ii', 1, 0))

    def listen(self, sock):
        try:
            while True:
                data = sock.recv(65536)
                if not data:
                    return
                self.heard.append(data)
        except socket.timeout:
            self.hangs = True
        except OSError:
            pass


# --- The verdict ------------------------------------------------------------

class Fuzz:
    """Runs the sessions, then looks at what they have left behind."""

    def __init__(self, program, sink, seed):
        self.program, self.sink, self.seed = program, sink, seed
        self.promised, self.problems = [], []

    def run(self, first, last):
        """Sessions first to last, several at a time."""
        numbers = iter(range(first, last))
        threads = [threading.Thread(
            target=self.work, args=(numbers,), name='fuzz-%d' % i,
            daemon=True) for i in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def work(self, numbers):
        for number in numbers:
            try:
                said = Session(self.seed, number).run(self.program)
            except socket.timeout as error:
                self.problems.append('session %d hangs: %s' % (number, error))
            except Exception as error:
                self.problems.append('session %d: %r' % (number, error))
            else:
                self.promised += re.findall(
                    r'(?m)^250 2\.0\.0 accepted as (\S+)\r$', said.decode(
                        'ascii', 'replace'))
            if self.program.process.poll() is not None:
                return

    def good_client(self):
        """A usual mail goes through."""
        with Client(self.program.address) as client:
            client.converse('''
                S: 220
                C: EHLO good
                S: 250
                C: MAIL FROM:<a@home.lan>
                S: 250
                C: RCPT TO:<b@example.org>
                S: 250
                C: DATA
                S: 354
                C: Subject: good
                C: .
                S: 250
                C: QUIT
                S: 221
            ''')
            self.promised.append(client.dialogue[-3].split()[-1])

    def settle(self):
        """Waits until all mail is out and all clients are gone."""
        try:
            wait_until(lambda: not self.program.waiting(), 60)
        except AssertionError:
            self.problems.append('not delivered: %s' % sorted(
                self.program.waiting())[:5])

    def judge_deliveries(self):
        arrived = collections.Counter(
            re.search(rb'(?s)^Received: .*? id ([^;]+);', mail.data)
            .group(1).decode() for mail in self.sink.mails)
        for id in self.promised:
            if arrived[id] != 1:
                self.problems.append('%s was answered 250 and delivered %d '
                                     'times' % (id, arrived[id]))
        self.problems += ['%s was delivered %d times' % item
                          for item in arrived.items() if item[1] > 1]
        for mail in self.sink.mails:
            if re.search(rb'\r(?!\n)|(?<!\r)\n|(?:\A|\n)\0*\.\0*\r\n',
                         mail.raw):
                self.problems.append('another end of data in %r'
                                     % mail.raw[-200:])

    def judge_log(self):
        log = self.program.text('smtpproxy.log') + self.program.text('output')
        for line in re.findall(r'(?m)^.*(?:Traceback|Error\b.*:).*$', log):
            if 'Traceback' in line or not re.match(r'\d{4}-', line):
                self.problems.append('in the log: ' + line[:200])
        if re.search(r'[\x00-\x08\x0b-\x1f\x7f\udc80-\udcff]', log):
            self.problems.append('the log has bytes that could fool a '
                                 'terminal')

    def judge_spool(self):
        """What was accepted can be read."""
        with contextlib.suppress(FileNotFoundError):
            self.problems += ['in corrupt/: ' + name for name in os.listdir(
                self.program.path('msgs/corrupt'))]

    def judge_growth(self, before, after):
        for what in before:
            if after[what] - before[what] > GROWTH[what]:
                self.problems.append('%s grew from %d to %d' % (
                    what, before[what], after[what]))


def main():
    parser = argparse.ArgumentParser(description='Mutated SMTP sessions.')
    parser.add_argument('--sessions', type=int, default=1000, metavar='N')
    parser.add_argument('--seed', default=str(int(time.time())))
    parser.add_argument('--show', type=int, metavar='NUMBER',
                        help='only print what this session says')
    options = parser.parse_args()
    if options.show is not None:
        session = Session(options.seed, options.show)
        print(session.way, session.leave, session.tls, *session.says, sep='\n')
        return 0
    return run(options.sessions, options.seed)


def run(sessions, seed):
    """Returns the exit code."""
    begin, warm = time.monotonic(), min(sessions // 4, 500)
    before, after = {}, {}
    with FakeSMTP() as sink:
        program = Program(sink.port)
        fuzz = Fuzz(program, sink, seed)
        try:
            fuzz.run(0, warm)
            before = program.size()
            fuzz.run(warm, sessions)
            fuzz.good_client()
            fuzz.settle()
            after = program.size()
            fuzz.judge_growth(before, after)
            fuzz.judge_deliveries()
        except (OSError, AssertionError) as error:
            fuzz.problems.append('a good client is not served: %s' % error)
        finally:
            code = program.stop()
        if code != 0:
            fuzz.problems.append('exit code %s' % code)
        fuzz.judge_log()
        fuzz.judge_spool()
        program.clean(keep=fuzz.problems)
    for problem in sorted(set(fuzz.problems))[:40]:
        print(problem)
    print('%d sessions, seed %s: %d mails promised, %d delivered, %d '
          'problems, %s to %s, %.0f s' % (
              sessions, seed, len(fuzz.promised), len(sink.mails),
              len(fuzz.problems), before, after, time.monotonic() - begin))
    return bool(fuzz.problems)


if __name__ == '__main__':
    sys.exit(main())
