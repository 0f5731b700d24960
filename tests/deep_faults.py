"""What a server does wrong, at every stage, and what becomes of the mail.

One table: stage x fault, each with deleteonerror false (and PIPELINING) and
true (and none). All rows run at once, each with an account, a server and a
mail of its own, from A client to A and B."""
import contextlib
import socket
import threading
import unittest
from typing import NamedTuple
from unittest import mock

import smtpproxy
import smtps
from tests.case import A, B, ProxyCase
from tests.fakes import (
    CERTIFICATE, DROP, ENDLESS_LINE, ENDLESS_REPLY, EXTENSIONS, GARBAGE, HANG,
    RESET, FakePOP, FakeSMTP, dribble, server_tls, wait_until)

CONNECT_TIME, REPLY_TIME, DOT_TIME = 0.7, 0.8, 0.9       # seconds, here
TLS = server_tls()
LOGIN = {'smtpusername': 'me', 'smtppassword': 'secret'}
POP = {'popbeforesmtp': 'true', 'popssl': 'false', 'popusername': 'me',
       'poppassword': 'secret'}
SECURE = {'smtpsecurity': 'tls', 'tlscafile': CERTIFICATE}
SMALL, LARGE = 1, 6000000       # bytes; more than all buffers on the way
CLOSED, SILENT = 'closed|reset', 'does not answer in time'

# fault: reply or action, and what the log says of it, one of several words
FAULTS = {
    '4xx': ('451 4.3.0 not now', '451 4.3.0 not now'),
    '5xx': ('554 5.3.0 not ever', '554 5.3.0 not ever'),
    '421': ('421 4.3.2 closing', '421 4.3.2 closing'),
    'drop': (DROP, CLOSED), 'reset': (RESET, CLOSED),
    'hang': (HANG, SILENT), 'dribble': (dribble('250 fine', .4), SILENT),
    'garbage': (GARBAGE, 'not SMTP'),
    'endless line': (ENDLESS_LINE, 'too long'),
    'endless reply': (ENDLESS_REPLY, 'does not end')}
POP_FAULTS = dict(
    {name: FAULTS[name] for name in ('drop', 'reset', 'hang')},
    **{'-ERR': ('-ERR not now', '-ERR not now'),
       'dribble': (dribble('+OK fine', .4), SILENT),
       'garbage': (GARBAGE, ''),
       'endless line': (ENDLESS_LINE, 'too long')})

# stage: begins of the commands that fail, keys of the account, word for it
EARLY = {'greeting': (('',), {}, 'connect'),
         'EHLO': (('EHLO', 'HELO'), {}, 'EHLO'),
         'STARTTLS': (('STARTTLS',), SECURE, 'STARTTLS'),
         'AUTH': (('AUTH',), LOGIN, 'login')}
LATE = {'MAIL': ('MAIL',), 'RCPT of all': ('RCPT',),
        'RCPT of one': ('RCPT TO:<b@',), 'DATA': ('DATA',),
        'final dot': ('.',)}


class Row(NamedTuple):
    """parked: else the mail waits; left: who has not got it; words: of the
    log line; healed: a working server makes up for it."""
    name: str
    script: dict = {}
    keys: dict = {}
    parked: bool = False
    left: tuple = (A, B)
    words: tuple = ()
    size: int = SMALL
    pop: dict = None
    server: dict = {}
    healed: bool = True
    taken: bool = False


def early_rows():
    for stage, (commands, keys, word) in EARLY.items():
        for fault, (action, said) in FAULTS.items():
            yield Row('%s: %s' % (stage, fault), dict.fromkeys(
                commands, action), keys, words=(word, said))


def late_rows():
    for stage, commands in LATE.items():
        for fault, (action, said) in FAULTS.items():
            if stage == 'final dot' and fault == 'dribble':
                continue            # the mail is taken: a special row
            refused = fault in ('4xx', '5xx')
            yield Row('%s: %s' % (stage, fault), dict.fromkeys(
                commands, action), parked=fault == '5xx', words=(said,),
                left=(B,) if refused and 'one' in stage else (A, B))


def pop_rows():
    for command in '', 'USER', 'PASS':
        for fault, (action, said) in POP_FAULTS.items():
            yield Row('POP %s: %s' % (command or 'greeting', fault), {}, POP,
                      words=('POP login', said), pop={command: action})


def in_the_body(action):
    """An action at DATA: the fault comes in the middle of the mail."""
    def begin(conversation):
        conversation.say('354 go on')
        conversation.file.read(4096)
        return action(conversation)
    return begin


def take_and_drop(conversation):
    """The mail is the server's, but nobody hears so."""
    conversation.socket.shutdown(socket.SHUT_RDWR)
    return '250 2.0.0 taken'


def hang_unread(conversation):
    """Takes not one byte more, so that the buffers on the way get full."""
    conversation.server.closing.wait(REPLY_TIME + .3)
    raise ConnectionError('hung up')


def starttls_then(action):
    """An action: it says yes to STARTTLS, the fault is the handshake."""
    def begin(conversation):
        conversation.say('220 go ahead')
        return action(conversation)
    return begin


def special_rows():
    yield Row('name lookup', keys={'smtphost': 'nosuch.invalid'}, words=(
        'connect', 'the name nosuch.invalid', 'not known'), healed=False)
    yield Row('connect: refused', keys={'smtpport': 'refused'}, words=(
        'connect', 'refused'), healed=False)
    yield Row('connect: blackhole', keys={'smtpport': 'blackhole'}, words=(
        'connect', SILENT), healed=False)
    for fault, action in (('drop', DROP), ('reset', RESET)):
        yield Row('body: ' + fault, {'DATA': in_the_body(action)},
                  size=LARGE // 10, words=(CLOSED + '|roken pipe',))
    yield Row('body: hang', {'DATA': in_the_body(hang_unread)}, size=LARGE,
              words=(SILENT,))
    yield Row('after the final dot: drop', {'.': take_and_drop},
              words=(CLOSED,), taken=True)
    yield Row('after the final dot: dribble',
              {'.': dribble('250 2.0.0 taken', .4)}, words=(SILENT,),
              taken=True)
    yield Row('STARTTLS: stripped', keys=SECURE, words=(
        'STARTTLS', 'not sent in plain text'), server={'tls': None},
        healed=False)
    yield Row('STARTTLS: not trusted', keys={'smtpsecurity': 'tls'}, words=(
        'STARTTLS', 'certificate', 'tlscafile'), healed=False)
    yield Row('STARTTLS: another host', keys=SECURE, words=(
        'STARTTLS', 'certificate', 'smtphost'),
        server={'host': '127.0.0.2'}, healed=False)
    for fault, action, word in (
            ('drop', DROP, 'STARTTLS'), ('hang', HANG, SILENT),
            ('garbage', lambda _: GARBAGE, 'no TLS')):
        yield Row('handshake: ' + fault, {'STARTTLS': starttls_then(action)},
                  SECURE, words=('STARTTLS', word))


ROWS = [*early_rows(), *late_rows(), *pop_rows(), *special_rows()]


def look_up(host, *arguments, **options):
    if host == 'nosuch.invalid':
        raise socket.gaierror(-2, 'Name or service not known')
    return LOOK_UP(host, *arguments, **options)


LOOK_UP = socket.getaddrinfo


class FaultCase(ProxyCase):
    """Servers, accounts and mails for all rows."""

    def setUp(self):
        super().setUp()
        for name, value in (
                ('CONNECT_TIME', CONNECT_TIME), ('REPLY_TIME', REPLY_TIME),
                ('DOT_TIME', DOT_TIME)):
            self.patch(smtps, name, value)
        self.patch(smtpproxy, 'LINGER', .05)
        self.patch(socket, 'getaddrinfo', look_up)
        self.ports = {'refused': self.deaf(),
                      'blackhole': self.blackhole()}

    def patch(self, *arguments):
        patched = mock.patch.object(*arguments)
        patched.start()
        self.addCleanup(patched.stop)

    def deaf(self):
        """A port that nobody listens on, nor will."""
        sock = socket.socket()
        self.addCleanup(sock.close)
        sock.bind(('127.0.0.1', 0))
        return sock.getsockname()[1]

    def blackhole(self):
        """A port where a connection is neither taken nor refused."""
        listener = socket.socket()
        self.addCleanup(listener.close)
        listener.bind(('127.0.0.1', 0))
        listener.listen(0)
        for _ in range(3):
            sock = socket.socket()
            self.addCleanup(sock.close)
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect(listener.getsockname())
        return listener.getsockname()[1]

    def prepare(self, extensions):
        """A server for each row; returns the accounts."""
        accounts, self.servers, self.pops = {}, {}, {}
        for row in ROWS:
            server = self.serve(FakeSMTP(dict(row.script), **dict(
                {'tls': TLS, 'extensions': extensions}, **row.server)))
            keys = dict(row.keys)
            if row.pop is not None:
                pop = self.pops[row.name] = self.serve(FakePOP(dict(row.pop)))
                keys.update(pophost=pop.host, popport=pop.port)
            keys['smtpport'] = self.ports.get(
                keys.get('smtpport'), server.port)
            self.servers[row.name] = server
            accounts[self.sender(row)] = self.account(server, **keys)
        return accounts

    @staticmethod
    def sender(row):
        return 'row%d@home.lan' % ROWS.index(row)

    def run_all(self, deleteonerror, extensions):
        """A mail for each row, and one to a server that is well."""
        accounts = self.prepare(extensions)
        accounts['well@home.lan'] = self.account()
        self.start({'deleteonerror': deleteonerror, 'sleeptime': 60},
                   accounts)
        client = self.greeted()
        self.ids = {row.name: self.submit(
            self.content(row), self.sender(row), (A, B), client)
            for row in ROWS}
        self.submit(sender='well@home.lan', client=client)
        self.assertDelivered([A])
        self.assertTrue(self.in_hand(), 'none hangs any more')
        client.close()
        wait_until(lambda: not self.in_hand(), 10)

    @staticmethod
    def content(row):
        return b'Subject: %s\r\n\r\n' % row.name.encode() + (
            b'0123456789abcd\r\n' * (row.size // 16))

    def line(self, row, level, *words):
        """The log line about a row's mail that has all the words, each of
        which may be one|another; fails if there is none."""
        lines = [line for line in self.lines if ' %s %s: ' % (
            level, self.ids[row.name]) in line]
        for line in lines:
            if all(any(word in line for word in words_.split('|'))
                   for words_ in words):
                return line
        self.fail('%s: no line with %s in\n%s' % (
            row.name, words, '\n'.join(line for line in self.lines
                                       if self.ids[row.name] in line)))

    def assertNothingLeaks(self):
        for row in ROWS:
            with self.subTest(row.name):
                for server in filter(None, (self.servers[row.name],
                                            self.pops.get(row.name))):
                    wait_until(lambda: not server.open)
                    self.assertLessEqual(server.connections, 1, 'busy loop')

    def assertArrived(self, row, left):
        """Who is not left has the mail, whole and once."""
        mails = self.servers[row.name].mails
        got = [to for mail in mails for to in mail.to]
        self.assertEqual(sorted({A, B} - set(left)) + [A, B] * row.taken,
                         sorted(got[:2 - len(left)]) + got[2 - len(left):])
        for mail in mails:
            self.assertTrue(mail.data.endswith(self.content(row)))

    def assertExplained(self, row, level, *words):
        line = self.line(row, level, *(row.words + words))
        self.assertNotIn('secret', line)
        if not row.keys.get('smtphost') and row.keys.get('smtpport') is None:
            server = self.pops.get(row.name) or self.servers[row.name]
            self.assertIn(server.host, line)


class Faults(FaultCase):

    def test_deleteonerror_false_keeps_all_that_is_not_delivered(self):
        self.run_all('false', EXTENSIONS)
        self.assertNothingLeaks()
        self.lines = self.log().splitlines()
        for row in ROWS:
            with self.subTest(row.name):
                mail = self.proxy.spool.load(self.ids[row.name])

                self.assertArrived(row, row.left)
                self.assertEqual((row.parked, 1), (mail.parked, mail.tries))
                self.assertEqual(sorted(row.left), sorted(
                    mail.to + list(mail.refused)))
                if row.parked:
                    self.assertExplained(row, 'ERROR', self.sender(row),
                                         'not tried again by itself')
                else:
                    self.assertExplained(row, 'WARNING', 'try 1',
                                         'next one in 6|next one each 6')

        self.heal()

    def heal(self):
        """The servers are well again and the owner asks for a new try: each
        recipient has each mail once."""
        for server in [*self.servers.values(), *self.pops.values()]:
            server.script.clear()
        for name in 'REPLY_TIME', 'DOT_TIME':       # a slow box may be slow
            self.patch(smtps, name, 20)
        self.proxy.reload()
        self.assertSpooled(sum(not row.healed for row in ROWS), 20)
        wait_until(lambda: not self.in_hand())
        for row in ROWS:
            with self.subTest(row.name, healed=row.healed):
                self.assertArrived(row, () if row.healed else row.left)

    def test_deleteonerror_true_deletes_and_says_all(self):
        self.run_all('true', ())
        self.assertNothingLeaks()
        self.lines = self.log().splitlines()
        self.assertSpooled(0)
        for row in ROWS:
            with self.subTest(row.name):
                self.assertArrived(row, row.left)
                self.assertExplained(
                    row, 'ERROR', 'deleted', self.sender(row),
                    'subject ' + row.name, *row.left)


class Trials(FaultCase):
    """Each row of the fault matrix that a short mail meets, through --test."""

    ROWS = [row for row in ROWS if row.size == SMALL]

    def test_each_is_seen_with_its_stage_its_reason_and_what_to_do(self):
        path = self.ini({}, self.prepare(()))
        self.settings = smtpproxy.load(path)
        lines = {row.name: [] for row in self.ROWS}
        threads = [threading.Thread(
            target=self.go, args=(row, lines[row.name]),
            name='trial-' + row.name) for row in self.ROWS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)

        for row in self.ROWS:
            with self.subTest(row.name):
                self.assertTold(row, lines[row.name])

    def go(self, row, lines):
        """A test of one row's account; lines gets what it tells."""
        sender = self.sender(row)
        trial = smtpproxy.Trial(
            self.settings, self.settings.account_for(sender), lines.append)
        if trial.connect() and trial.send(
                smtpproxy.test_mail(sender, B, sender)):
            lines.append('sent')
        trial.close()

    def assertTold(self, row, lines):
        """The last line is the failure."""
        *before, last = lines
        self.assertIn('failed: ', last)
        self.assertNotIn('failed: ', ''.join(before))
        for words in row.words:
            self.assertTrue(any(word in last for word in words.split('|')),
                            last)
        self.assertNotIn('secret', ''.join(lines))


if __name__ == '__main__':
    unittest.main()
