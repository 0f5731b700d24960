r"""The listener as its clients see it: dialects, order, limits, TLS, attacks.

Dialogues are transcripts; \r \n \0 \xff mean these bytes. The greeting has
been read when a transcript begins. Bytes that a client sends at once, or one
by one, must come to the same, so most dialogues are held in all three ways.

    C: what the client sends; CRLF follows unless it brings its own line end
    S: how the last line of the reply begins, or 'closed'
    L: user and password that the program was asked about
    M: sender -> recipients of a mail that the program took
    =: the bytes of that mail
"""
import base64
import contextlib
import logging
import os
import random
import re
import resource
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
import unittest
from unittest import mock

import smtps
from tests import fuzz
from tests.fakes import Client, Wire, client_tls, server_tls, wait_until

HELLO = 'C: EHLO printer\nS: 250\n'
ENVELOPE = '''
    C: MAIL FROM:<a@home.lan>
    S: 250
    C: RCPT TO:<b@example.org>
    S: 250
'''
DATA = ENVELOPE + 'C: DATA\nS: 354\n'
END = 'C: .\nS: 250\n'
TAKEN = 'M: a@home.lan -> b@example.org\n'
MAIL = DATA + 'C: hello\n' + END + TAKEN
QUIT = 'C: QUIT\nS: 221\nS: closed\n'
BIG = 3 * smtps.CHUNK           # bytes; a mail that comes in several pieces


def octets(text):
    """The bytes that a transcript means."""
    return text.encode('latin-1').decode('unicode_escape').encode('latin-1')


def steps(transcript):
    """[('C', bytes), ('S', '250'), ...] of a transcript."""
    for line in transcript.strip().splitlines():
        side, _, text = line.strip().partition(':')
        text = text[1:]
        if side in 'C=':
            text = octets(text)
            if side == 'C' and not text.endswith((b'\n', b'\r')):
                text += b'\r\n'
        yield side, text


def bytewise(data):
    return [data[i:i + 1] for i in range(len(data))]


class Kept(smtps.Message):
    """A mail as it arrived: sender, to, parameters, client, content."""

    def __init__(self, case, client, sender, to, parameters):
        self.case, self.client, self.sender = case, client, sender
        self.to, self.parameters, self.content = to, parameters, b''

    def write(self, chunk):
        self.content += chunk

    def commit(self):
        self.case.mails.append(self)
        return super().commit()

    def abort(self):
        self.case.aborted.append(self)


class Keeper(smtps.Session):
    """Tells the test all that it hears."""
    MAIL = Kept

    def __init__(self, case, client):
        super().__init__(client)
        self.case = case

    def hello(self, name):
        self.case.names.append(name)

    def auth(self, user, password):
        self.case.logins.append((user, password))
        if password == 'wrong':
            raise smtps.Refused(535, '5.7.8 wrong')

    def data(self, sender, recipients, parameters):
        return self.MAIL(self.case, self.client, sender, recipients,
                         parameters)

    def closed(self):
        self.case.closed += 1


class Records(logging.Handler):
    """Keeps what is logged, as a list."""

    def __init__(self):
        super().__init__()
        self.list = []

    def emit(self, record):
        self.list.append(record)


class Visitor(Client):
    """A client that comes from another address of this host."""

    def __init__(self, address, source):
        Wire.__init__(self, socket.create_connection(
            address, 10, (source, 0)))
        self.dialogue = []


class ListenerCase(unittest.TestCase):
    """A server, clients, and what the program was told. A test fails if a
    thread ends by an error or a traceback is logged that it did not expect:
    errors, a regular expression."""
    SESSION, LIMITS, errors = Keeper, {}, None

    def setUp(self):
        self.mails, self.aborted, self.logins = [], [], []
        self.names, self.closed = [], 0
        self.watch_log()
        hook = mock.patch.object(threading, 'excepthook', self.crashed)
        hook.start()
        self.addCleanup(hook.stop)
        self.server = self.serve(**self.LIMITS)
        self.address = self.server.listeners[0].getsockname()

    def watch_log(self):
        log, self.records = logging.getLogger('smtps'), Records()
        self.addCleanup(setattr, log, 'propagate', log.propagate)
        self.addCleanup(log.setLevel, log.level)
        self.addCleanup(self.check_log)
        self.addCleanup(log.removeHandler, self.records)
        log.addHandler(self.records)
        log.propagate = False
        log.setLevel(logging.DEBUG)
        self.crashes = []

    def crashed(self, arguments):
        self.crashes.append(arguments.exc_value)

    def check_log(self):
        self.assertEqual([], self.crashes)
        for record in self.records.list:
            if record.exc_info and not re.search(
                    self.errors or '$.', str(record.exc_info[1])):
                self.fail('unexpected: %s %r' % (
                    record.getMessage(), record.exc_info[1]))

    def serve(self, tls=None, **limits):
        """A server on a port of its own; tls: it begins with a handshake."""
        server = smtps.Server(
            lambda client: self.SESSION(self, client),
            smtps.Limits(**dict({'timeout': 20}, **limits)), 'box')
        server.listen('127.0.0.1', 0)
        if limits.get('tls') or tls:
            server.limits = server.limits._replace(tls=tls or limits['tls'])
            server.listen('127.0.0.1', 0, tls=True)
        server.start()
        self.stop = self.stop_once(server)
        self.addCleanup(next, self.stop, None)
        return server

    @staticmethod
    def stop_once(server):
        yield server.stop()

    def client(self, source=None, greeting=220):
        """A client that has read the greeting."""
        client = (Visitor(self.address, source) if source
                  else Client(self.address))
        self.addCleanup(client.close)
        self.assertEqual(greeting, client.reply()[0], client.dialogue)
        return client

    def send_apart(self, client, data, cut):
        """Sends data in two pieces that are not read at once."""
        client.socket.sendall(data[:cut])
        self.wait_for_the_loop()
        client.socket.sendall(data[cut:])

    def wait_for_the_loop(self):
        """There is one event loop: who is served now shows that it has read
        what was sent before."""
        with contextlib.closing(Client(self.address)) as other:
            other.expect('220')

    def assertServes(self):
        """Another client is served, mail and all."""
        self.converse(HELLO + MAIL + QUIT)

    def assertLogged(self, level, text):
        wait_until(lambda: [r for r in self.records.list if (
            r.levelname == level and text in r.getMessage())])

    def converse(self, transcript, client=None, pieces=None):
        """Holds a dialogue, line by line, or in the pieces that pieces()
        makes of all that the client says."""
        client = client or self.client()
        said, heard = len(self.mails), len(self.logins)
        script = list(steps(transcript))
        if pieces:
            for piece in pieces(b''.join(x for s, x in script if s == 'C')):
                client.socket.sendall(piece)
        for side, text in script:
            if side == 'C' and not pieces:
                client.send(text)
            elif side == 'S':
                client.expect(text.strip())
        self.compare(script, self.mails[said:], self.logins[heard:])
        return client

    def compare(self, script, mails, logins):
        """What the program was told is what the script says."""
        def said(wanted):
            return [text for side, text in script if side == wanted]
        self.assertEqual(said('M'), ['%s -> %s' % (
            mail.sender, ', '.join(mail.to)) for mail in mails])
        self.assertEqual(said('L'), [
            ('%s %s' % login).strip() for login in logins])
        for content, mail in zip(said('='), mails):
            self.assertEqual(content, mail.content)

    def converse_in_all_ways(self, transcript):
        """Line by line, all in one packet, one byte a packet."""
        for pieces in None, lambda data: [data], bytewise:
            self.converse(transcript, pieces=pieces).close()

    def table(self, rows):
        """Rows of (transcript, where such a client was met)."""
        for transcript, source in rows:
            with self.subTest(source, transcript=transcript):
                self.converse_in_all_ways(transcript)


# --- What a program gets ----------------------------------------------------

class ALibrary(unittest.TestCase):

    def example(self):
        """The one that takes mail, in the docstring of smtps.py."""
        text = smtps.__doc__
        start = text.index('    import smtps\n')
        text = text[start:text.index('\nTo deliver', start)]
        return textwrap.dedent(text).replace("'', 2525", "'127.0.0.1', 0")

    def test_the_example_of_the_manual_receives_mail(self):
        known = {}
        exec(self.example(), known)
        self.addCleanup(known['server'].stop)
        client = Client(known['server'].listeners[0].getsockname())
        self.addCleanup(client.close)
        client.expect('220')

        client.converse(HELLO + DATA + 'C: Subject: x\nC:\nC: ..\nC: .')

        client.expect('250 2.0.0 thank you')
        self.assertEqual([b'Subject: x\r\n\r\n.\r\n'], known['mails'])

    def test_alone_on_a_port_that_is_not_to_be_had_it_says_so(self):
        with socket.socket() as taken:
            taken.bind(('', 0))
            taken.listen()
            for port, words in (
                    (str(taken.getsockname()[1]), 'Address already in use'),
                    ('abc', 'is no port'), ('99999', 'is no port')):
                with self.subTest(port):
                    done = subprocess.run(
                        [sys.executable, smtps.__file__, port],
                        stderr=subprocess.PIPE, universal_newlines=True)
                    self.assertEqual(1, done.returncode)
                    self.assertRegex(done.stderr, r'\Asmtps: .*%s.*\n\Z'
                                     % words)


# --- What devices say -------------------------------------------------------

class Dialects(ListenerCase):

    def test_any_greeting_will_do(self):
        for line, source in (
                ('HELO\\x20', 'a UPS, OpenSMTPD#1054'),
                ('HELO', 'Danfoss drive, simple.mailserver#5'),
                ('EHLO', 'the same'),
                ('EHLO NPIF65E56', 'HP printer, mailcow-docs#455'),
                ('ehlo localhost', 'chatmail/core#1847'),
                ('HELO my_printer', 'underscore, RFC 952 forbids it'),
                ('EHLO 192.168.1.7', 'bare address'),
                ('EHLO [192.168.1.7]', 'RFC 5321 4.1.3'),
                ('EHLO [IPv6:fe80::1]', 'OpenSMTPD#178'),
                ('EHLO two words', 'a name with a blank'),
                ('hElO  x\\x20\\x20', 'case and blanks'),
                ('EHLO k\\xfcche', 'latin-1, a German NAS'),
                ('EHLO a\nS: 250\nC: EHLO b', 'again, RFC 5321 4.1.4'),
                ('NOOP', 'no greeting; Postfix smtpd_helo_required=no')):
            with self.subTest(line, source=source):
                self.converse_in_all_ways(
                    'C: %s\nS: 250\n%s' % (line, MAIL + QUIT))

    def test_senders_are_understood(self):
        for line, sender, source in (
                ('MAIL FROM:<a@x>', 'a@x', 'RFC 5321'),
                ('MAIL FROM: <a@x>', 'a@x', 'mox#101, KumoMTA#76'),
                ('MAIL FROM:a@x', 'a@x', 'emailrelay nostrictparsing'),
                ('MAIL FROM: a@x', 'a@x', 'the same'),
                ('MAIL FROM:a@x SIZE=1', 'a@x', 'the same'),
                ('mail from :<a@x>', 'a@x', 'field notes 5.6'),
                ('Mail  From:<a@x>  ', 'a@x', 'blanks'),
                ('MAIL FROM:< a@x >', 'a@x', 'blanks'),
                ('MAIL FROM:<>', '', 'a bounce, RFC 5321 4.5.5'),
                ('MAIL FROM: <>', '', 'the same'),
                ('MAIL FROM:Name <a@x>', 'a@x', 'RFC 822, as Postfix'),
                ('MAIL FROM:"A B" <a@x>', 'a@x', 'the same'),
                ('MAIL FROM:<ilo.@x>', 'ilo.@x', 'HP iLO, smtp-server#259'),
                ('MAIL FROM:<a..b@x>', 'a..b@x', 'Japanese phones'),
                ('MAIL FROM:<root>', 'root', 'cron, no domain'),
                ('MAIL FROM:<root@localhost>', 'root@localhost', 'cron'),
                ('MAIL FROM:<u@[192.168.1.5]>', 'u@[192.168.1.5]', 'camera'),
                ('MAIL FROM:<@relay.x:a@x>', 'a@x', 'RFC 5321 appendix C'),
                ('MAIL FROM:<"a b"@x>', '"a b"@x', 'RFC 5321 4.1.2'),
                ('MAIL FROM:<"a>b"@x>', '"a>b"@x', 'RFC 5321 4.1.2'),
                ('MAIL FROM:<M\\xc3\\xbcller@x>', 'M\xfcller@x',
                 'RFC 6531')):
            with self.subTest(line, source=source):
                self.converse_in_all_ways('C: %s\nS: 250 2.1.0\n' % line)
                self.assertSender(line, sender)

    def assertSender(self, line, sender):
        client = self.converse(
            'C: %s\nS: 250\nC: RCPT TO:<b@x>\nS: 250\nC: DATA\nS: 354\n'
            % line)
        self.converse(END + 'M: %s -> b@x' % sender, client)

    def test_recipients_are_understood(self):
        for line, to in (
                ('RCPT TO:<b@x>', 'b@x'), ('rcpt to: b@x', 'b@x'),
                ('RCPT TO :<b@x>', 'b@x'), ('RCPT TO:B C <b@x>', 'b@x'),
                ('RCPT TO:<postmaster>', 'postmaster'),
                ('RCPT TO:<b@x> NOTIFY=NEVER ORCPT=rfc822;b@x', 'b@x')):
            with self.subTest(line):
                self.converse_in_all_ways(
                    'C: MAIL FROM:<a@x>\nS: 250\nC: %s\nS: 250 2.1.5\n'
                    'C: DATA\nS: 354\n%sM: a@x -> %s' % (line, END, to))

    def test_several_addresses_in_one_path_are_as_many_recipients(self):
        for path, to, source in (
                ('<a@x.org;b@x.org>', 'a@x.org, b@x.org', 'ESPEasy#1692'),
                ('<a@x,b@y>', 'a@x, b@y', 'dma#73'),
                ('< a@x ; b@x ,\\tc@x >', 'a@x, b@x, c@x', 'blanks'),
                ('a@x,b@x', 'a@x, b@x', 'no brackets'),
                ('a@x; b@x', 'a@x, b@x', 'no brackets, a blank'),
                ('<a@x;b@x> NOTIFY=NEVER', 'a@x, b@x', 'a parameter'),
                ('<@r,@s:a@x;b@x>', 'a@x, b@x', 'behind a route'),
                ('Us <a@x;b@x>', 'a@x, b@x', 'with a name'),
                ('<"a;b"@x;"c d,e"@x>', '"a;b"@x, "c d,e"@x', 'in quotes'),
                ('<"a"@x;b@x;b@x;a@x>', 'a@x, b@x', 'one named twice'),
                ('<u@[192.168.1.5],b@x>', 'u@[192.168.1.5], b@x', 'literal'),
                ('<+49,123;ext=4@fax>', '+49,123;ext=4@fax', 'a fax'),
                ('<a@x;+49,1@fax>', 'a@x;+49,1@fax', 'a fax'),
                ('<a,b@x>', 'a,b@x', 'one address'),
                ('<a@x;>', 'a@x;', 'nothing behind it'),
                ('<a@x;b>', 'a@x;b', 'no domain'),
                ('<a@x,@r:b@x>', 'a@x,@r:b@x', 'a route inside')):
            with self.subTest(path, source=source):
                self.converse_in_all_ways(
                    'C: MAIL FROM:<a@x>\nS: 250\nC: RCPT TO:%s\nS: 250\n'
                    'C: DATA\nS: 354\n%sM: a@x -> %s' % (path, END, to))

    def test_one_address_refused_refuses_all_of_its_command(self):
        def refuse(session, recipient):
            if recipient.startswith('no'):
                raise smtps.Refused(550, '5.1.1 unknown')
        with mock.patch.object(Keeper, 'rcpt', refuse):
            for path, code in (
                    ('<c@x;no@x>', '550 5.1.1'), ('<no@x,c@x>', '550 5.1.1'),
                    ('<c@x;"a\\x01"@x>', '501 5.1.3'),
                    ('<c@x;\\xff@x>', '553 5.6.7'),
                    ('<c@x; d>', '501 5.1.3'), ('<c@x;>;d@x', '501 5.1.3'),
                    ('<c@x;d@x> XYZ=1', '555 5.5.4')):
                with self.subTest(path):
                    self.converse_in_all_ways(ENVELOPE + (
                        'C: RCPT TO:%s\nS: %s\nC: DATA\nS: 354\n' % (
                            path, code)) + END + TAKEN)

    def test_parameters_of_extensions_not_offered_are_ignored(self):
        for words, source in (
                ('BODY=7BIT', 'RFC 6152'), ('BODY=8BITMIME', 'RFC 6152'),
                ('BODY=BINARYMIME', 'RFC 3030'), ('SIZE=0', 'RFC 1870'),
                ('BODY=FOO', 'no RFC'), ('BODY', 'no value'),
                ('BODY=\\xff\\x80', 'no letters'), ('SMTPUTF8=x', 'no RFC'),
                ('SMTPUTF8=\\xff', 'no letters'),
                ('SIZE', 'a keyword without value, simplesmtp#17'),
                ('AUTH=<>', 'RFC 4954'), ('SMTPUTF8', 'RFC 6531'),
                ('RET=HDRS ENVID=x', 'RFC 3461'), ('size=5', 'lower case'),
                ('body=8bitmime  size=10', 'two blanks')):
            with self.subTest(words, source=source):
                self.converse_in_all_ways(
                    'C: MAIL FROM:<a@x> %s\nS: 250\n' % words)

    def test_an_address_that_could_inject_is_refused(self):
        for line, code in (
                ('MAIL FROM:<a@x', '501'), ('MAIL FROM:', '501'),
                ('MAIL FROM', '501'), ('MAIL <a@x>', '501'),
                ('MAIL', '501'), ('MAIL FROM:<a b@x>', '501'),
                ('MAIL FROM:<a\\rRSET@x>', '501'),
                ('MAIL FROM:<a\\0@x>', '501'),
                ('MAIL FROM:<"a\\rb"@x>', '501'),
                ('MAIL FROM:<a\\x1b[2J@x>', '501'),
                ('MAIL FROM:<<a@x>>', '501'), ('MAIL FROM:a<b', '501'),
                ('MAIL FROM:<\\xff@x>', '553'),
                ('MAIL FROM:<\\xf0\\x9f\\x98\\x80\\xff@x>', '553'),
                ('MAIL FROM:<a@x> SIZE=x', '501'),
                ('MAIL FROM:<a@x> SIZE=-1', '501'),
                ('MAIL FROM:<a@x> XYZ=1', '555 5.5.4'),
                ('MAIL FROM:<a@x> \\xff\\0', '555 5.5.4')):
            with self.subTest(line):
                self.converse_in_all_ways(
                    'C: %s\nS: %s\n%s' % (line, code, MAIL))

    def test_odd_line_ends(self):
        self.table((
            ('C: helo router\\n\nS: 250\nC: mail from:<a@x>\\n\nS: 250\n'
             'C: rcpt to:<b@x>\\n\nS: 250\nC: data\\n\nS: 354\nC: one\n'
             + END + 'M: a@x -> b@x\n=: one\\r\\n',
             'LF-only commands: D-Link router, lists.sans.org 2004'),
            (DATA + 'C: Subject: x\\n\\none\\ntwo\n' + END + TAKEN
             + '=: Subject: x\\r\\n\\r\\none\\r\\ntwo\\r\\n',
             'LF-only lines: PHP on Windows, loopia 11842, twisted#5305'),
            (DATA + 'C: Subject: x\\r\\r\\n\\r\\r\\none\\r\\r\\n\n' + END
             + TAKEN, 'CR CR LF: BusyBox sendmail with PHP 8, mailpit#87'),
            (DATA + 'C: a\\r\\r\\nb\n' + END + TAKEN
             + '=: a\\r\\nb\\r\\n', 'the same'),
            (DATA + 'C: a\\rb\n' + END + TAKEN + '=: a\\r\\nb\\r\\n',
             'bare CR'),
            ('C: HELO x\\r\\r\\n\nS: 250\n' + MAIL,
             'CR CR LF behind a command')))

    def test_a_last_line_with_two_returns_is_one_line(self):
        """mailpit#87: every line ends so but the dot's."""
        self.converse_in_all_ways(
            DATA + 'C: one\\r\\r\\n\n' + END + TAKEN + '=: one\\r\\n')

    def test_any_byte_goes_through(self):
        self.table((
            (DATA + 'C: \\x80\\xff\\xfe caf\\xe9\n' + END + TAKEN
             + '=: \\x80\\xff\\xfe caf\\xe9\\r\\n', 'latin-1 header'),
            (DATA + 'C: a\\0b\n' + END + TAKEN + '=: a\\0b\\r\\n', 'NUL'),
            (DATA + END + TAKEN + '=: ', 'an empty mail'),
            (DATA + 'C: ..\n' + END + TAKEN + '=: ..\\r\\n', 'a dot'),
            (DATA + 'C: .a\n' + END + TAKEN + '=: .a\\r\\n',
             'a dot that was not doubled'),
            (DATA + 'C: \n' + END + TAKEN + '=: \\r\\n', 'one empty line')))

    def test_lines_may_be_long(self):
        """arcane#1225: 500 Line too long, for a real mail."""
        for length in 998, 1000, 1001, 2049, 70000, BIG:
            with self.subTest(length):
                line = b'x' * length + b'\r\n'
                self.converse(DATA).converse('C: ' + 'x' * length + '\n' + END)
                self.assertEqual(line, self.mails[-1].content)

    def test_login_dialects(self):
        self.table([(HELLO + row, source) for row, source in (
            ('C: AUTH LOGIN\nS: 334 VXNlcm5hbWU6\nC: dXNlcg==\n'
             'S: 334 UGFzc3dvcmQ6\nC: cGFzcw==\nS: 235 2.7.0\n'
             'L: user pass', 'phpBB, most devices'),
            ('C: AUTH LOGIN dXNlcg==\nS: 334 UGFzc3dvcmQ6\n'
             'C: cGFzcw==\nS: 235\nL: user pass',
             'aiosmtpd#219, smtp4dev#17'),
            ('C: auth login\nS: 334 VXNlcm5hbWU6\nC: dXNlcg\n'
             'S: 334 UGFzc3dvcmQ6\nC: cGFzcw\nS: 235\nL: user pass',
             '.NET; some leave the padding out'),
            ('C: AUTH LOGIN =\nS: 334 UGFzc3dvcmQ6\nC: =\nS: 235\n'
             'L:', 'RFC 4954: = is the empty answer'),
            ('C: AUTH PLAIN AHVzZXIAcGFzcw==\nS: 235\nL: user pass',
             'RFC 4616'),
            ('C: auth plain\nS: 334\nC: AHVzZXIAcGFzcw==\nS: 235\n'
             'L: user pass', 'no initial response'),
            ('C: AUTH PLAIN egB1c2VyAHBhc3M=\nS: 235\nL: user pass',
             'with an authorization identity'))])

    def test_login_refusals(self):
        self.table([(HELLO + row + '\n' + MAIL, source)
                    for row, source in (
            ('C: AUTH LOGIN\nS: 334\nC: *\nS: 501', 'cancelled'),
            ('C: AUTH PLAIN\nS: 334\nC: *\nS: 501', 'cancelled'),
            ('C: AUTH LOGIN\nS: 334\nC: a\nS: 501', 'no base64'),
            ('C: AUTH PLAIN dXNlcg==\nS: 501', 'no NUL in it'),
            ('C: AUTH PLAIN \\xff\\xfe\nS: 501', 'no base64'),
            ('C: AUTH CRAM-MD5\nS: 504 5.5.4', 'Ricoh, postal#663'),
            ('C: AUTH\nS: 504', 'no mechanism'),
            ('C: AUTH PLAIN AHUAcA==\nS: 235\n'
             'C: AUTH PLAIN AHUAcA==\nS: 503\nL: u p',
             'twice: phpBB takes a 503 for success'))])

    def test_a_wrong_password_costs_time_and_ends_nothing(self):
        """Field notes 5.12: the allow list decides on mail, not this."""
        with mock.patch.object(smtps, 'AUTH_PAUSE', 0.05):
            begin = time.monotonic()
            self.table([(
                HELLO + 'C: AUTH PLAIN AHUAd3Jvbmc=\nS: 535 5.7.8\n'
                'L: u wrong\n' + MAIL, 'a guest')])
        self.assertGreater(time.monotonic() - begin, 0.15)

    def test_a_program_says_what_may_be_offered(self):
        text = base64.b64encode(b'user=me\1auth=Bearer T\1\1').decode()
        with mock.patch.object(Keeper, 'mechanisms', ('XOAUTH2',)):
            client = self.client()
            self.assertIn('\nAUTH XOAUTH2\n', client.command('EHLO x')[1])
            self.table([(HELLO + row, 'XOAUTH2') for row in (
                'C: AUTH PLAIN AHUAcA==\nS: 504 5.5.4 AUTH takes XOAUTH2',
                'C: AUTH XOAUTH2 %s\nS: 235\nL: me T' % text,
                'C: auth xoauth2\nS: 334 \nC: %s\nS: 235\nL: me T' % text,
                'C: AUTH XOAUTH2 dXNlcj1tZQ==\nS: 501')])

    def test_a_challenge_keeps_its_trailing_blank(self):
        """phpBB reads until byte 4 of a line is a blank."""
        client = self.client()
        client.send('AUTH PLAIN')
        self.assertEqual(b'334 \r\n', client.read_line())

    def test_no_secret_is_logged(self):
        self.converse(HELLO + 'C: AUTH LOGIN dXNlcg==\nS: 334\n'
                      'C: c2VjcmV0\nS: 235\nL: user secret')
        for record in self.records.list:
            self.assertNotRegex(record.getMessage(), 'c2VjcmV0|secret|dXNl')

    def test_no_secret_is_shown_after_a_refused_login(self):
        """The client goes on with its name and password all the same."""
        secret = 'aGlkZGVuIHNlY3JldA==', 'Hidden secret', 'help hidden secret'
        for login in ('AUTH CRAM-MD5', 'AUTH LOGIN admin', 'AUTH=LOGIN',
                      'AUTH', 'AUTH PLAIN dXNlcg==',
                      'AUTH PLAIN AHUAd3Jvbmc='):
            with self.subTest(login), mock.patch.object(
                    smtps, 'AUTH_PAUSE', 0):
                client = self.client()
                client.command('EHLO x')
                for line in (login,) + secret * 2:
                    client.command(line)

                said = client.dialogue + [
                    record.getMessage() for record in self.records.list]
                said = [line for line in said if not line.startswith('C:')]
                self.assertNotRegex('\n'.join(said), '(?i)aGlk|hidden|secret')

    def test_a_login_or_a_mail_ends_the_silence_about_commands(self):
        for login, code in (('AUTH PLAIN AHUAcA==', 235), ('AUTH X', 504)):
            client = self.client()
            self.assertEqual(code, client.command(login)[0])
            client.command('MAIL FROM:<a@x>')
            client.command('XCLIENT ' + login)
            self.assertLogged('DEBUG', 'XCLIENT ' + login)

    def test_offers_are_written_as_old_clients_expect(self):
        """phpBB looks for the word AUTH; no CRAM-MD5, no STARTTLS without a
        certificate (smtp-oauth-relay#70); phpBB reads 255 bytes a line."""
        client = self.client()
        client.send('EHLO x')
        _, lines = client.reply()
        self.assertEqual(
            ['box', 'PIPELINING', '8BITMIME', 'SIZE 100000000', 'SMTPUTF8',
             'ENHANCEDSTATUSCODES', 'AUTH LOGIN PLAIN', 'AUTH=LOGIN PLAIN'],
            lines)

    def test_replies_are_short_lines(self):
        client = self.client()
        for line in ('EHLO ' + 'x' * 900, 'HELP', 'Q' * 900,
                     'MAIL FROM:<%s>' % ('a' * 900), 'RSET',
                     'MAIL FROM:<a> ' + 'X' * 900, 'VRFY ' + 'x' * 900):
            client.send(line)
            client.reply()
        self.assertLess(max(map(len, (
            line for line in client.dialogue if line[0] == 'S'))), 258)

    def test_what_is_known_of_the_client(self):
        self.converse('C: EHLO pbx\nS: 250\nC: AUTH PLAIN AHUAcA==\nS: 235\n'
                      + MAIL + 'L: u p')
        client = self.mails[0].client
        self.assertEqual(
            ('127.0.0.1', 'pbx', True, False, 'u'),
            (client.address, client.hello, client.extended, client.secure,
             client.user))


class Sequences(ListenerCase):

    def test_dialogues_in_any_order(self):
        simple = ''.join('C: %s\nS: %s\n' % pair for pair in (
            ('NOOP', '250'), ('noop x', '250'), ('VRFY b', '252'),
            ('EXPN b', '502'), ('HELP', '214'), ('HELP MAIL', '214')))
        self.table((
            (HELLO + MAIL + MAIL + MAIL + QUIT, 'several mails'),
            (simple + MAIL, 'before a greeting'),
            (HELLO + ENVELOPE + simple + 'C: DATA\nS: 354\n' + END + TAKEN,
             'inside an envelope'),
            (HELLO + MAIL + 'C: RSET\nS: 250\n' + MAIL,
             'RSET after a mail, msmtp#217'),
            (HELLO + ENVELOPE + 'C: RSET\nS: 250\nC: DATA\nS: 503\n'
             + MAIL, 'RSET in an envelope'),
            (HELLO + ENVELOPE + HELLO + 'C: RCPT TO:<b@x>\nS: 503\n',
             'EHLO resets, RFC 5321 4.1.4'),
            ('C: RCPT TO:<b@x>\nS: 503 5.5.1\n', 'RCPT first'),
            ('C: DATA\nS: 503 5.5.1\n', 'DATA first'),
            ('C: MAIL FROM:<a@x>\nS: 250\nC: DATA\nS: 503\n', 'no RCPT'),
            ('C: MAIL FROM:<a@x>\nS: 250\nC: MAIL FROM:<c@x>\nS: 503\n'
             'C: RCPT TO:<b@x>\nS: 250\nC: DATA\nS: 354\n' + END
             + 'M: a@x -> b@x', 'MAIL twice'),
            (ENVELOPE + 'C: AUTH PLAIN AHUAcA==\nS: 503\n', 'AUTH too late'),
            ('C: MAIL FROM:<a@x>\nS: 250\nC: RCPT TO:<>\nS: 550 5.1.3\n',
             'nobody'),
            ('C: STARTTLS\nS: 502\n', 'not offered'),
            ('C: FOO\nS: 500 5.5.2\nC: \\xff\\0\nS: 500\n'
             'C: BDAT 5 LAST\nS: 500\n' + MAIL, 'unknown commands'),
            ('C: MAIL FROM:<a@x>\nS: 250\nC: RCPT TO:<b@x>\nS: 250\n'
             'C: RCPT TO:<c@x>\nS: 250\nC: RCPT TO:<b@x>\nS: 250\n'
             'C: DATA\nS: 354\n' + END + 'M: a@x -> b@x, c@x',
             'several recipients; one named twice is one')))

    def test_one_empty_line_between_commands_is_ignored(self):
        """Its reply would be taken for that to the next command."""
        self.table((
            (HELLO + 'C: \n' + MAIL + 'C: \n' + MAIL + 'C: \n' + QUIT,
             'behind the dot: ESPEasy#5121, mailsac#13, ghettoVCB#71'),
            ('C: \\n\n' + HELLO + 'C: \\r\\r\\n\n' + MAIL, 'any line end'),
            ('C: NOOP\nS: 250\nC: \nC: \nS: 500 5.5.2\n' + MAIL, 'two'),
            ('C: NOOP\nS: 250\nC: \\x20\nS: 500 5.5.2\n' + MAIL, 'a blank'),
            ('C: AUTH PLAIN\nS: 334\nC: \nS: 501\n' + MAIL, 'an answer')))

    def test_a_client_may_leave_at_any_time(self):
        """Field notes 5.23: port scans and health checks are not noise."""
        said = b''.join(x for s, x in steps(HELLO + DATA + 'C: hi\nC: .')
                        if s == 'C')
        for end in range(0, len(said) - 3, 3):
            client = self.client()
            client.send(said[:end])
            client.close()
        wait_until(lambda: self.closed == len(range(0, len(said) - 3, 3)))
        self.assertEqual([], self.mails)
        self.assertEqual({'DEBUG'}, {
            record.levelname for record in self.records.list
            if 'never completed' not in record.getMessage()})
        self.assertServes()

    def test_half_a_mail_is_aborted(self):
        client = self.converse(DATA)
        client.send(b'x' * BIG)
        client.close()

        wait_until(lambda: self.aborted)
        self.assertEqual([], self.mails)
        self.assertServes()

    def test_closing_the_sending_side_keeps_the_replies(self):
        """printf ... | nc: it sends all, then only listens."""
        client = self.client()
        client.send(b''.join(x for s, x in steps(HELLO + MAIL) if s == 'C'))
        client.socket.shutdown(socket.SHUT_WR)

        self.assertEqual(
            ['250', '250', '250', '354', '250'],
            re.findall(r'(?m)^(\d+) ', client.read_until_closed().decode()))
        self.assertEqual(1, len(self.mails))

    def test_what_follows_quit_is_not_obeyed(self):
        client = self.client()
        client.send(b'QUIT\r\nMAIL FROM:<a@x>\r\n')
        with contextlib.suppress(ConnectionError):
            self.assertEqual(1, client.read_until_closed().count(b'\n'))

    def test_hostile_commands_cost_no_time(self):
        """A slow pattern would stop all clients: the event loop runs it."""
        for text in ('<' + ' ' * 2000, ' ' * 2000, '"' * 2001, '<' * 2000,
                     '<@' + ' ' * 1000 + '@:' * 500, '<"\\' * 700,
                     '<' + '"\\' * 1000, '<a> ' + 'SIZE=1 ' * 300,
                     'x' * 2000 + '<', '<@' * 1000, '<a' + ' a' * 1000,
                     '<' + 'a@x;' * 500, 'a@x' + ' ' * 2000 + '"',
                     'a@x; ' * 400 + '"', '"@x,' * 500,
                     '<' + '"\\"@x;' * 330 + '>'):
            with self.subTest(text[:10]), contextlib.suppress(smtps.Refused):
                begin = time.thread_time()
                smtps.parse_path(text, '5.1.7')
            with contextlib.suppress(smtps.Refused):
                smtps.parse_recipients(text, '5.1.3')
            self.assertLess(time.thread_time() - begin, 0.02, text[:10])


class Addresses(unittest.TestCase):
    """One string is made of what the client said, and it stays the same."""
    WRITTEN = ('<%s>', '%s', ' < %s >', 'Name <%s>', '"A B" <%s>',
               '<%s> SIZE=1', '<@relay.x:%s>', '@relay.x:%s',
               'Name <@relay.x,@r: %s >')

    def accepted(self, text):
        """The address, or None."""
        with contextlib.suppress(smtps.Refused):
            return smtps.parse_path(text, '5.1.7')[0]

    def test_a_good_one_stays_as_it_is_however_it_is_written(self):
        for good in ('a@x', 'PrinTer@Home.LAN', 'root', 'ilo.@hp', 'a..b@x',
                     '"a b"@x', r'"q\"x\\"@x', '"@"@x', '"@r:a"@x',
                     '"a:b"@x', 'u@[192.168.1.5]', 'a@[IPv6:fe80::1]',
                     'x%y!z@a', "o'b@x", 'IMCEAFAX-+49+2089+20123@x',
                     '[FAX:+49123]', 'FAX=+49/x@y', '+49,123;ext=4@fax',
                     'gr\xfc\xdfe@b\xfccher.x', r'a\b@x'):
            for written in self.WRITTEN:
                with self.subTest(good, written=written):
                    self.assertEqual(good, self.accepted(written % good))

    def test_quotes_that_nobody_needs_make_no_other_address(self):
        """RFC 5321 4.1.2: else "boss"@x goes round the account of boss@x."""
        for quoted, plain in (
                ('"boss"@x', 'boss@x'), (r'"b\o\ss"@x', 'boss@x'),
                ('@relay:"a.b"@x', 'a.b@x'), ('"a b"@x', '"a b"@x'),
                ('"a@b"@x', '"a@b"@x'), (r'"a\"b"@x', r'"a\"b"@x')):
            with self.subTest(quoted):
                self.assertEqual(plain, self.accepted('<%s>' % quoted))

    def test_what_is_accepted_is_read_again_as_the_same(self):
        dice, accepted = random.Random(14), 0
        for _ in range(30000):
            text = dice.choice(self.WRITTEN) % fuzz.address(dice)
            address = self.accepted(text)
            if address is not None:
                accepted += 1
                self.assertEqual(
                    (address, {}), smtps.parse_path('<%s>' % address, '5'),
                    repr(text))
        self.assertGreater(accepted, 5000)

    def test_what_others_could_read_otherwise_is_refused(self):
        for bad in ('a"b@x', '"abc', 'a@x"', '"', 'a"b"c@x', '"a"b@x', '@x',
                    'a@"x"', r'"a\"@x', '@r:@s:a@x', '@r:', '@[r]:a@x', '@',
                    'a\x85b@x', '"a\x9bm"@x', 'a\u2028b@x', 'a\xa0b@x'):
            for written in '<%s>', '%s', '<@r:%s>', '@r:%s', 'Name <%s>':
                with self.subTest(bad, written=written):
                    self.assertIsNone(self.accepted(written % bad))

    def test_of_the_parameters_what_is_understood_is_kept(self):
        """Issue 17: a strict server refuses the rest for good."""
        for words, kept in (
                ('BODY=7BIT SMTPUTF8', {'BODY': '7BIT', 'SMTPUTF8': ''}),
                ('body=8bitmime', {'BODY': '8bitmime'}),
                ('BODY=BINARYMIME', {}), ('BODY', {}), ('BODY=', {}),
                ('BODY=FOO', {}), ('BODY=<b>', {}), ('BODY=\0', {}),
                ('BODY=8B\u0131TMIME', {}), ('BODY=\udcff', {}),
                ('SMTPUTF8=x', {}), ('SMTPUTF8=\udcff', {})):
            with self.subTest(words):
                self.assertEqual(
                    ('a@x', kept), smtps.parse_path('<a@x> ' + words, '5'))


# --- Limits -----------------------------------------------------------------

class Limits(ListenerCase):
    LIMITS = {'maxsize': 1000}

    def test_a_mail_announced_too_large_is_refused_at_once(self):
        self.table(((
            'C: MAIL FROM:<a@x> SIZE=1001\nS: 552 5.3.4\n'
            'C: MAIL FROM:<a@x> SIZE=1000\nS: 250\n', 'RFC 1870'),))

    def test_a_mail_that_grows_too_large_is_refused_after_its_dot(self):
        self.table((
            (DATA + 'C: %s\nC: .\nS: 552 5.3.4\n%s' % (
                'x' * 999, MAIL), 'and the next one is taken'),
            (DATA + 'C: %s\nC: .\nS: 552 5.3.4\n%s' % (
                'x' * 5000, QUIT), 'far too large')))
        self.assertEqual(6, len(self.aborted))

    def test_a_large_mail_that_grows_too_large_is_read_to_its_end(self):
        client = self.converse(HELLO + DATA)

        client.send(b'x' * BIG + b'\r\n' + b'RSET\r\n' * 50000 + b'.\r\n')

        client.expect('552 5.3.4')
        self.converse(MAIL, client)
        self.assertEqual(1, len(self.aborted))

    def test_a_mail_of_just_the_size_is_taken_however_it_is_split(self):
        content, client = b'x' * 998 + b'\r\n', self.converse(HELLO)
        for cut in range(997, 1003):
            client.converse(DATA)
            self.send_apart(client, content + b'.\r\n', cut)
            client.expect('250')
        self.assertEqual({content}, {mail.content for mail in self.mails})

    def test_size_is_that_of_the_mail_whatever_the_pieces(self):
        content = b'x' * 20 + b'\r\n'
        stream = content + b'.\r\nQUIT\r\n'
        for cut in range(len(stream)):
            reader = smtps.DataReader()
            reader.feed(stream[:cut])
            self.assertLessEqual(reader.size - len(reader.rest or b''),
                                 len(content) + 3)
            if reader.rest is None:
                reader.feed(stream[cut:])
            self.assertEqual(len(content), reader.size)

    def test_a_command_line_may_be_long_but_not_endless(self):
        self.table((
            ('C: NOOP %s\nS: 250\n' % ('x' * 2000), 'long'),
            ('C: NOOP %s\nS: 500 5.5.2\n' % ('x' * 2048) + MAIL,
             'too long'),
            ('C: %s\nS: 500 5.5.2\n' % ('x' * 9000), 'far too long'),
            ('C: AUTH LOGIN\nS: 334\nC: %s\nS: 334\nC: %s\nS: 500\n' % (
                'QUFB' * 3000, 'QUFB' * 3100) + MAIL,
             'AUTH answers may have 12288 bytes, RFC 4954')))

    def test_too_many_recipients(self):
        with mock.patch.object(smtps, 'RECIPIENTS', 3):
            self.table(((
                'C: MAIL FROM:<a@x>\nS: 250\n'
                + ''.join('C: RCPT TO:<%s@x>\nS: %s\n' % row for row in (
                    ('b', 250), ('c', 250), ('d@x,e', '452 4.5.3'),
                    ('d', 250), ('e', '452 4.5.3'), ('b', 250)))
                + 'C: DATA\nS: 354\n' + END
                + 'M: a@x -> b@x, c@x, d@x', 'RFC 5321 4.5.3.1.10'),))

    def test_too_many_errors(self):
        self.converse('C: FOO\nS: 500\n' * (smtps.ERRORS + 1)
                      + 'S: 421 4.7.0\nS: closed\n')

    def test_a_mail_taken_forgives_errors(self):
        errors = 'C: FOO\nS: 500\n' * (smtps.ERRORS - 1)
        self.converse((errors + MAIL) * 3)


class Silence(ListenerCase):
    LIMITS = {'timeout': 0.1, 'tls': server_tls()}

    def test_a_silent_client_is_dismissed(self):
        for said in '', HELLO, HELLO + ENVELOPE, HELLO + DATA, (
                'C: AUTH LOGIN\nS: 334\n'):
            with self.subTest(said):
                self.converse(said + 'S: 421 4.4.2\nS: closed\n')
        self.assertEqual(1, len(self.aborted))

    def test_a_silent_handshake_is_dismissed(self):
        for address in self.server.listeners[1].getsockname(), self.address:
            with socket.create_connection(address, 10) as sock:
                if address is self.address:
                    sock.sendall(b'STARTTLS\r\n')
                with contextlib.suppress(ConnectionError):
                    while sock.recv(100):
                        pass

    def test_a_client_that_never_reads_is_dismissed(self):
        client = self.client()
        client.socket.settimeout(0.2)
        with contextlib.suppress(OSError):
            for _ in range(200):
                client.socket.sendall(b'HELP\r\n' * 20000)
        wait_until(lambda: self.closed, 20)
        self.assertServes()


class Talk(ListenerCase):
    LIMITS = {'timeout': 0.5}

    def test_time_starts_anew_with_every_byte(self):
        client = self.client()
        end = time.monotonic() + 0.8
        while time.monotonic() < end:
            client.socket.sendall(b'NOOP\r\n')
            client.expect('250')
        client.expect('421 4.4.2')


class Places(ListenerCase):
    """Who may come, and how many."""
    LIMITS = {'maxconnections': 3}

    def test_one_more_gets_a_421(self):
        held = [self.client() for _ in range(3)]
        self.client(greeting=421).expect('closed')

        held[0].command('QUIT')
        wait_until(lambda: self.closed)

        self.converse(HELLO)

    def test_another_address_gets_its_share(self):
        """Eight connections of one camera don't shut out the rest."""
        camera = [self.client() for _ in range(3)]
        for client in camera[1:]:
            client.command('NOOP')

        other = self.client('127.0.0.2')

        camera[0].expect('421 4.7.0')
        self.converse(HELLO + MAIL, other)
        self.converse(HELLO, camera[2])

    def test_shares_are_even_in_the_end(self):
        for _ in range(3):
            self.client()
        self.client('127.0.0.2')
        self.client('127.0.0.2', 421).expect('closed')
        self.client('127.0.0.3')
        self.client('127.0.0.3', 421)
        self.client('127.0.0.1', 421)

    def test_strangers_are_refused(self):
        self.server.limits = self.server.limits._replace(
            allowed='127.0.0.1'.__eq__)
        self.client('127.0.0.2', 554).expect('closed')
        self.assertLogged('WARNING', '127.0.0.2: refused: 554 5.7.1')
        self.assertServes()


# --- Not SMTP ---------------------------------------------------------------

class Strangers(ListenerCase):
    """Other protocols on the plain port."""

    def test_tls_is_dropped_with_a_word_in_the_log(self):
        """OpenSMTPD#1244: wrong version number."""
        with socket.create_connection(self.address, 10) as sock:
            with self.assertRaises(OSError):
                client_tls().wrap_socket(sock, server_hostname='localhost')
        self.assertLogged('WARNING', 'speaks TLS')

    def test_web_browsers_are_dropped_at_the_first_line(self):
        """A page could make a browser post mail (cross-protocol attack)."""
        for line in 'GET / HTTP/1.1', 'POST / HTTP/1.0', 'head / x':
            client = self.client()
            with contextlib.suppress(ConnectionError):
                client.send(line.encode() + b'\r\nHELO x\r\nMAIL FROM:<a>\r\n')
                self.assertEqual(b'', client.read_until_closed())
        self.assertLogged('WARNING', 'speaks HTTP')

    def test_rubbish_is_refused(self):
        dice = random.Random(5)
        for _ in range(30):
            client = self.client()
            with contextlib.suppress(ConnectionError):
                client.send(bytes(dice.randrange(256) for _ in range(3000)))
                client.socket.shutdown(socket.SHUT_WR)
                client.read_until_closed()
        self.assertEqual([], self.mails)
        self.assertServes()

    def test_a_reset_is_survived(self):
        for _ in range(20):
            client = self.client()
            client.send(b'EHLO x\r\n' * 50)
            reset(client.socket)
        self.assertServes()


def reset(sock):
    """Closes with an RST, as crashed devices and port scanners do."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                    struct.pack('ii', 1, 0))
    sock.close()


# --- TLS --------------------------------------------------------------------

class Waiting(Keeper):
    """Stops the event loop while a client says HELO wait."""
    asked, go_on = threading.Event(), threading.Event()

    def hello(self, name):
        if name == 'wait':
            self.asked.set()
            self.go_on.wait(10)


class TLS(ListenerCase):
    LIMITS, SESSION = {'tls': server_tls()}, Waiting

    def setUp(self):
        super().setUp()
        self.tls_address = self.server.listeners[1].getsockname()

    def secured(self):
        client = Client(self.tls_address, client_tls())
        self.addCleanup(client.close)
        client.expect('220')
        return client

    def test_starttls(self):
        client = self.client()
        client.send('EHLO x')
        self.assertIn('STARTTLS', client.reply()[1])
        client.converse('C: STARTTLS\nS: 220')
        client.secure(client_tls())

        client.send('EHLO x')
        self.assertNotIn('STARTTLS', client.reply()[1])
        self.converse('C: STARTTLS\nS: 502\n' + MAIL, client)
        self.assertTrue(self.mails[0].client.secure)

    def test_mail_over_implicit_tls_in_all_ways(self):
        for pieces in None, lambda data: [data], bytewise:
            self.converse(HELLO + MAIL + 'C: QUIT\nS: 221',
                          self.secured(), pieces)

    def test_a_large_mail_over_tls(self):
        client = self.secured()
        client.converse(DATA)
        client.socket.sendall(b'x' * 1000000 + b'\r\n.\r\n')
        client.expect('250')
        self.assertEqual(1000002, len(self.mails[0].content))

    def test_what_was_injected_before_tls_is_thrown_away(self):
        """CVE-2011-0411."""
        client = self.client()
        client.send(b'EHLO x\r\nSTARTTLS\r\nMAIL FROM:<evil@x>\r\n')
        client.expect('250')
        client.expect('220')
        client.secure(client_tls())
        client.converse('C: NOOP\nS: 250 2.0.0\nC: RCPT TO:<b@x>\nS: 503')

    def test_what_was_said_before_tls_is_forgotten(self):
        """RFC 3207 section 4.2."""
        client = self.converse(HELLO + 'C: AUTH PLAIN AHUAcA==\nS: 235\n'
                               'L: u p\n' + ENVELOPE + 'C: STARTTLS\nS: 220')
        client.secure(client_tls())
        self.converse('C: DATA\nS: 503\n' + MAIL, client)
        client = self.mails[0].client
        self.assertEqual((None, None), (client.hello, client.user))

    def test_a_failed_handshake_leaves_no_clear_text_session(self):
        for rubbish in b'NOOP\r\n', b'\x16\x03\x01\x00\x05hello', b'\0' * 99:
            client = self.converse('C: STARTTLS\nS: 220')
            client.send(rubbish)
            with contextlib.suppress(ConnectionError):
                self.assertNotIn(b'250', client.read_until_closed())
        self.assertServes()

    def test_slow_handshakes_hold_up_nobody(self):
        for _ in range(smtps.WORKERS + 8):
            sock = socket.create_connection(self.tls_address, 10)
            self.addCleanup(sock.close)
            sock.sendall(b'\x16\x03\x01')
        self.converse(HELLO + MAIL, self.secured())
        self.assertServes()

    def test_a_reset_before_the_handshake_is_survived(self):
        """A port scan: the connection is gone when it is accepted."""
        for _ in range(3):
            with self.subTest(), self.loop_occupied():
                for data in b'', b'\x16\x03\x01':
                    sock = socket.create_connection(self.tls_address, 10)
                    sock.sendall(data)
                    reset(sock)
        self.converse(HELLO + MAIL, self.secured())
        self.assertServes()

    @contextlib.contextmanager
    def loop_occupied(self):
        client = self.client()
        client.send('HELO wait')
        self.assertTrue(Waiting.asked.wait(5))
        yield
        Waiting.go_on.set()
        client.expect('250')
        Waiting.asked.clear()
        Waiting.go_on.clear()

    def test_a_tls_port_without_certificate_is_never_a_plain_one(self):
        self.server.limits = self.server.limits._replace(tls=None)

        with contextlib.closing(Client(self.tls_address)) as client:
            client.expect('421 4.7.0')
            self.assertEqual(b'', client.read_until_closed())

        self.assertLogged('WARNING', 'no certificate')
        self.assertServes()

    def test_goodbye_is_said_in_tls(self):
        """A client must see the end of TLS, not a cut."""
        client = self.secured()
        client.converse('C: QUIT\nS: 221')
        self.assertEqual(b'', client.socket.recv(10))


# --- Mails that wait for the disk -------------------------------------------

class Disk:
    """Notes who takes which step, and can be made to take long."""

    def __init__(self):
        self.steps, self.is_quick = [], threading.Event()
        self.is_quick.set()

    def step(self, name, mail):
        self.steps.append((name, mail.content[:1].decode()))
        self.is_quick.wait(10)


class OnDisk(Kept):

    def seal(self):
        self.case.disk.step('seal', self)

    def commit(self):
        self.case.disk.step('commit', self)
        return super().commit()


class GroupCommit(ListenerCase):

    class SESSION(Keeper):
        MAIL = OnDisk

    def setUp(self):
        self.disk = Disk()
        super().setUp()

    def give(self, content):
        """Hands a mail in up to the final dot; returns the client."""
        client = self.client()
        self.converse(HELLO + DATA, client)
        client.socket.sendall(content + b'\r\n.\r\n')
        return client

    def busy_with(self, content):
        """The disk has a mail in hand, and takes long."""
        self.disk.is_quick.clear()
        client = self.give(content)
        wait_until(lambda: self.disk.steps)
        return client

    def test_mails_that_wait_take_each_step_together(self):
        first = self.busy_with(b'1')
        others = [self.give(content) for content in (b'2', b'3')]
        self.wait_for_the_loop()

        self.disk.is_quick.set()

        for client in [first] + others:
            client.expect('250')
        self.assertEqual(
            [('seal', '1'), ('commit', '1'), ('seal', '2'), ('seal', '3'),
             ('commit', '2'), ('commit', '3')], self.disk.steps)

    def test_a_slow_disk_holds_up_no_conversation(self):
        first = self.busy_with(b'1')

        self.converse(HELLO + 'C: AUTH PLAIN AHUAcA==\nS: 235\nL: u p\n'
                      + DATA)

        self.assertEqual([], self.mails)
        self.disk.is_quick.set()
        first.expect('250')

    @contextlib.contextmanager
    def stuck(self, step):
        """That step of a Message is begun and does not end."""
        begun, goes_on = threading.Event(), threading.Event()
        usual = getattr(OnDisk, step)

        def wait(mail, *arguments):
            begun.set()
            goes_on.wait(10)
            return usual(mail, *arguments)
        with mock.patch.object(OnDisk, step, wait):
            try:
                yield begun
            finally:
                goes_on.set()

    def test_a_disk_that_is_stuck_holds_up_no_other_client(self):
        """Not even if there was no other when it got stuck."""
        for step, size in (('write', 9), ('seal', 9), ('commit', 9),
                           ('write', BIG), ('seal', BIG), ('commit', BIG)):
            with self.subTest(step, size=size):
                with self.stuck(step) as begun:
                    client = self.give(b'x' * size)
                    self.assertTrue(begun.wait(5))
                    self.wait_for_the_loop()
                client.expect('250')

    def test_what_is_given_up_holds_up_no_other_client(self):
        with self.stuck('abort') as begun:
            client = self.converse(HELLO + DATA)
            client.send(b'x' * BIG)
            client.close()
            self.assertTrue(begun.wait(5))
            self.wait_for_the_loop()
        wait_until(lambda: self.aborted)

    def test_a_large_mail_is_whole_however_often_others_take_their_turn(self):
        content = b''.join(b'%09d\r\n' % n for n in range(100000))
        for turn in 1, 2, 1000:
            with self.subTest(turn), mock.patch.object(smtps, 'TURN', turn):
                self.give(content[:-2]).expect('250')
                self.assertTrue(self.mails.pop().content == content)

    def test_a_mail_without_end_does_not_keep_the_service_from_stopping(self):
        client, sent = self.converse(HELLO + DATA), threading.Event()

        def send():
            with contextlib.suppress(OSError):
                while True:
                    client.socket.sendall(b'x' * BIG)
                    sent.set()
        threading.Thread(target=send, name='sender', daemon=True).start()
        self.assertTrue(sent.wait(5))

        begin = time.monotonic()
        next(self.stop)

        self.assertLess(time.monotonic() - begin, 4)
        self.assertEqual(1, len(self.aborted))

    def test_a_small_mail_does_not_wait_for_the_sync_of_a_large_one(self):
        large = self.busy_with(b'L' * 10 * smtps.CHUNK)
        self.disk.steps.clear()
        small = self.give(b's')

        wait_until(lambda: self.disk.steps)

        self.assertEqual([('seal', 's')], self.disk.steps)
        self.disk.is_quick.set()
        small.expect('250')
        large.expect('250')

    def test_a_mail_that_the_disk_has_in_hand_survives_a_stop(self):
        first = self.busy_with(b'1')
        stopping = threading.Thread(target=next, args=(self.stop, None),
                                    name='stop')
        stopping.start()
        wait_until(lambda: not self.server.listeners)

        self.disk.is_quick.set()

        first.expect('250')
        stopping.join(5)
        self.assertFalse([thread for thread in threading.enumerate()
                          if thread.name == 'smtp-disk'])


# --- Hooks that fail --------------------------------------------------------

class Thrown(BaseException):
    """What `except Exception` does not catch."""


class Faulty(Keeper):
    """fault: {hook: exception}."""
    fault = {}

    def fail(self, hook):
        if hook in self.fault:
            raise self.fault[hook]

    def hello(self, name):
        self.fail('hello')

    def auth(self, user, password):
        self.fail('auth')

    def mail(self, sender, parameters):
        self.fail('mail')

    def rcpt(self, recipient):
        self.fail('rcpt')

    def reset(self):
        self.fail('reset')

    def closed(self):
        super().closed()
        self.fail('closed')

    def data(self, sender, recipients, parameters):
        self.fail('data')
        message = super().data(sender, recipients, parameters)
        message.fail = self.fail
        return message


class FaultyMail(Kept):

    def write(self, chunk):
        self.fail('write')
        super().write(chunk)

    def seal(self):
        self.fail('seal')
        super().seal()

    def commit(self):
        self.fail('commit')
        return super().commit()

    def abort(self):
        super().abort()
        self.fail('abort')


class Hooks(ListenerCase):
    """A bug never becomes a 250, and never ends the service."""
    SESSION, errors = Faulty, 'on purpose'
    STEPS = (('hello', 'EHLO x'), ('auth', 'AUTH PLAIN AHUAcA=='),
             ('mail', 'MAIL FROM:<a@x>'), ('rcpt', 'RCPT TO:<b@x>'),
             ('data', 'DATA'), ('write', 'hi\r\n.'), ('seal', 'hi\r\n.'),
             ('commit', 'hi\r\n.'))

    def setUp(self):
        Faulty.fault, Faulty.MAIL = {}, FaultyMail
        super().setUp()

    def replies(self, fault):
        """The codes of a whole dialogue up to where the fault shows."""
        Faulty.fault, codes = fault, {}
        client = self.client()
        for hook, line in self.STEPS:
            if hook == 'seal' and 'write' in codes:     # one line, one reply
                codes['seal'] = codes['commit'] = codes['write']
                break
            codes[hook] = client.command(line)[0]
            if hook in fault:
                break
        Faulty.fault = {}
        self.assertEqual(250, client.command('RSET')[0])
        return codes

    def test_refused_is_answered_as_it_says(self):
        for hook, _ in self.STEPS:
            with self.subTest(hook), mock.patch.object(
                    smtps, 'AUTH_PAUSE', 0):
                fault = {hook: smtps.Refused(556, '5.9.9 no')}
                self.assertEqual(556, self.replies(fault)[hook])
        self.assertEqual([], self.mails)
        self.assertServes()

    def test_a_mail_that_is_safe_is_accepted_whatever_fails_then(self):
        for error in (ValueError('on purpose'), SystemExit('on purpose'),
                      smtps.Refused(554, '5.0.0 on purpose')):
            with self.subTest(error=error):
                Faulty.fault = {'reset': error}

                self.converse(HELLO + MAIL)

                self.assertEqual([], self.aborted)
        Faulty.fault = {}

    def test_a_mail_that_is_safe_is_accepted_whatever_its_text(self):
        for text in None, '', 7, '2.0.0 \udcff', '2.0.0 grün':
            with self.subTest(text=text), mock.patch.object(
                    FaultyMail, 'commit', lambda mail, text=text: text):
                self.converse(HELLO + DATA + END)

    def test_another_exception_is_answered_451_and_logged(self):
        for hook, _ in self.STEPS:
            for error in ValueError, OSError, MemoryError, ConnectionError:
                with self.subTest(hook, error=error):
                    fault = {hook: error('on purpose')}
                    self.assertEqual(451, self.replies(fault)[hook])
                    self.assertLogged('ERROR', '451')
        self.assertEqual([], self.mails)
        self.assertServes()

    def test_not_even_an_exit_ends_more_than_the_command(self):
        for hook, _ in self.STEPS:
            for error in SystemExit, KeyboardInterrupt, Thrown:
                with self.subTest(hook, error=error):
                    fault = {hook: error('on purpose')}
                    self.assertEqual(451, self.replies(fault)[hook])
        self.assertLogged('ERROR', '451')
        self.assertEqual([], self.mails)
        self.assertServes()

    def test_what_ends_a_conversation_ends_no_other(self):
        """GeneratorExit is how Python itself ends a conversation."""
        for hook, _ in self.STEPS:
            with self.subTest(hook), contextlib.suppress(ConnectionError):
                self.replies({hook: GeneratorExit('on purpose')})
            Faulty.fault = {}
        self.assertLogged('ERROR', 'ended by an error')
        self.assertServes()

    def test_hooks_that_can_refuse_nothing_change_nothing(self):
        for error in ValueError, SystemExit, GeneratorExit:
            Faulty.fault = {hook: error('on purpose')
                            for hook in ('reset', 'closed')}
            self.converse(HELLO + MAIL + MAIL + QUIT)
            self.assertLogged('ERROR', 'closed')

    def test_an_abort_that_fails_does_not_change_the_reply(self):
        Faulty.fault = {'commit': smtps.Refused(452, '4.3.1 full'),
                        'abort': OSError('on purpose')}
        self.converse(HELLO + DATA + 'C: .\nS: 452 4.3.1\n' + QUIT)

    def test_a_mail_that_failed_in_the_middle_is_read_to_its_end(self):
        """The rest of it must not be taken for commands."""
        Faulty.fault = {'write': OSError('on purpose')}
        client = self.converse(HELLO + DATA)
        client.send(b'RSET\r\n' * (BIG // 6) + b'.\r\n')
        client.expect('451')
        self.assertEqual(1, len(self.aborted))

        Faulty.fault = {}
        self.converse(MAIL, client)

    def test_a_session_that_cannot_be_made_ends_only_itself(self):
        """make_session is the program's too."""
        make = self.server.make_session
        for broken in None, lambda _: sys.exit('on purpose'):
            self.server.make_session = broken
            with contextlib.suppress(ConnectionError):
                with contextlib.closing(Client(self.address)) as client:
                    self.errors = 'NoneType|on purpose'
                    self.assertNotIn(b'220', client.read_until_closed())

        self.server.make_session = make
        self.assertServes()


# --- A box that has run out of something ------------------------------------

class Shortage(ListenerCase):

    def test_without_threads_clients_wait_for_each_other(self):
        with mock.patch.object(threading.Thread, 'start', side_effect=(
                RuntimeError("can't start new thread"))):
            clients = [self.converse(HELLO) for _ in range(3)]
            for client in clients:
                self.converse('C: AUTH PLAIN AHVzZXIAcGFzcw==\nS: 235'
                              '\nL: user pass', client)
                self.converse(MAIL, client)
        self.assertLogged('WARNING', 'no more threads')
        self.assertServes()

    @contextlib.contextmanager
    def no_descriptors(self):
        """Not one is left for this process."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        probe, taken = os.open(os.devnull, os.O_RDONLY), []
        resource.setrlimit(resource.RLIMIT_NOFILE, (probe + 20, hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.dup(probe))
            yield
        finally:
            for number in taken + [probe]:
                os.close(number)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    def call(self, sock):
        """Connects, without a new descriptor here; what is said (bytes)."""
        self.addCleanup(sock.close)
        sock.settimeout(10)
        sock.connect(self.address)
        return sock.recv(100)

    def test_without_descriptors_clients_hear_a_421(self):
        callers = [socket.socket() for _ in range(3)]
        with self.no_descriptors():
            for sock in callers:
                self.assertEqual(b'421 4.3.2', self.call(sock)[:9])
        self.assertLogged('ERROR', 'turned away')
        self.assertServes()

    def test_the_spare_descriptor_is_not_closed_twice(self):
        """Its number may belong to a mail's file by then."""
        first, second = socket.socket(), socket.socket()
        with self.no_descriptors():
            with mock.patch('builtins.open', side_effect=OSError(24)) as spare:
                self.call(first)
                wait_until(lambda: spare.called)
            with open(os.devnull) as file:      # gets the spare one's number
                second.connect(self.address)
                wait_until(lambda: self.turned_away() > 1)
                os.fstat(file.fileno())
        second.close()
        self.assertServes()

    def turned_away(self):
        return sum('turned away' in record.getMessage()
                   for record in self.records.list)


class Stop(ListenerCase):

    def test_idle_clients_are_told(self):
        clients = [self.client(), self.converse(HELLO + DATA)]
        next(self.stop)
        for client in clients:
            client.expect('421 4.3.2')
            client.expect('closed')
        self.assertEqual(1, len(self.aborted))


# --- The end of a mail ------------------------------------------------------

TRUE_END = b'\r\n.\r\n'
FALSE_ENDS = (
    b'\n.\n', b'\n.\r\n', b'\r\n.\n', b'\r.\r', b'\r.\r\n', b'\r\n.\r',
    b'\r.\n', b'\n.\r', b'\r\r\n.\r\r\n', b'\r\n.\r\r\n', b'\n\r.\r\n',
    b'\n\r.\n\r', b'\r\n\r.\r', b'\n.\r\r\n', b'\r\n.\0\r\n',
    b'\r\n\0.\r\n', b'\0\r\n\0.\0\r\n', b'\r\0\n.\r\0\n', b'\r\n.\r\0\n',
    b'\n\0.\n', b'\r\n..\n.\n', b'\r\n.\x0b\n', b'\r\n. \r\n',
    b'\xc2\x85.\xc2\x85', b'\n.\n.\n.\n', b'\r\n.\n.\r', b'\r.\r.\r.\r',
    b'\n.\nQUIT\n', b'\n.\nquit\nQUIT\n', b'\n.\nQUIT\r\n', b'\n.\nQU\n.\n',
    b'\n.\n\n', b'\n.\n\r\n', b'\n.\nQUIT \n', b'\n.\n.\nQUIT\n',
    b'\n\0.\nQUIT\n', b'\n.\n\0QUIT\n')
EVIL = (b'MAIL FROM:<evil@x>\r\nRCPT TO:<evil@x>\r\nDATA\r\n'
        b'smuggled\r\n.\r\n')

# Where receivers known to the field see the end of a line: a line that is a
# single dot is an end of data for them. Some drop NUL bytes first.
RECEIVERS = {
    'Postfix before 3.9': rb'\r*\n',
    'Exim 4.96, Sendmail 8.17': rb'\r?\n',
    'Cisco, bare CR': rb'\r\n|\r|\n',
    'RFC 5321': rb'\r\n'}


def other_ends(content):
    """The receivers that find an end of data inside content (bytes)."""
    return [name for name, line_end in RECEIVERS.items()
            for text in (content, content.replace(b'\0', b''))
            if b'.' in re.split(line_end, text)]


def read(chunks, lf_only=False):
    """(content, rest, size) of bytes in chunks; rest may be None."""
    reader, chunks, content = smtps.DataReader(lf_only), list(chunks), b''
    while chunks and reader.rest is None:
        reader.feed(chunks.pop(0))
        content += reader.take()
    if reader.rest is None:
        return content, None, None
    return content, reader.rest + b''.join(chunks), reader.size


def cuts(data, dice, count):
    """data in up to count + 1 pieces."""
    places = sorted(dice.randrange(len(data) + 1) for _ in range(count))
    return [data[a:b] for a, b in zip([0] + places, places + [len(data)])]


class Smuggling(ListenerCase):
    """CVE-2023-51764, -51765, -51766: a mail must not hide another one."""

    def test_the_table_of_receivers_knows_an_end(self):
        for end in FALSE_ENDS[:8]:
            self.assertTrue(other_ends(b'a' + end + b'b'), end)
        self.assertEqual([], other_ends(b'a\r\n..\r\n.b\r\nc.\r\n'))

    def test_only_one_sequence_ends_a_mail_split_anywhere(self):
        for end in FALSE_ENDS:
            stream = b'before' + end + EVIL + b'QUIT\r\n'
            cut = stream.index(TRUE_END, len(b'before' + end)) + 5
            for place in range(len(stream)):
                for lf_only in False, True:
                    with self.subTest(end, place=place, lf_only=lf_only):
                        content, rest, _ = read(
                            [stream[:place], stream[place:]], lf_only)
                        self.assertEqual(stream[cut:], rest)
                        self.assertEqual([], other_ends(content))

    def test_the_true_end_is_one_split_anywhere(self):
        stream = b'before' + TRUE_END + EVIL
        for place in range(len(stream)):
            self.assertEqual((b'before\r\n', EVIL, 8), read(
                [stream[:place], stream[place:]]))

    def test_a_client_gets_one_mail_through(self):
        """Also one that has sent no CR until then."""
        said = b''.join(x for s, x in steps(HELLO + DATA) if s == 'C')
        for said in said, said.replace(b'\r', b''):
            for end in FALSE_ENDS:
                with self.subTest(end, said=said), mock.patch.object(
                        smtps, 'LF_SILENCE', 60):
                    for place in range(-3, len(end) + 3):
                        self.send(said + b'before' + end + EVIL + b'QUIT\r\n',
                                  len(said + b'before') + place)
                        self.assertOneMail()

    def send(self, stream, place):
        """Sends stream in two pieces, reads all replies."""
        self.mails.clear()
        with contextlib.closing(Client(self.address)) as client:
            self.send_apart(client, stream, place)
            client.read_until_closed()

    def assertOneMail(self):
        mail, = self.mails
        self.assertEqual('a@home.lan', mail.sender)
        self.assertTrue(mail.content.endswith(b'smuggled\r\n'))
        self.assertNotRegex(mail.content, rb'\r(?!\n)|(?<!\r)\n')
        self.assertEqual([], other_ends(mail.content))

    def test_a_lone_dot_is_sent_on_as_two(self):
        for text, kept in (
                (b'a\n.\nb', b'a\r\n..\r\nb\r\n'),
                (b'a\r.\rb', b'a\r\n..\r\nb\r\n'),
                (b'.\nb', b'..\r\nb\r\n'), (b'.\rb', b'..\r\nb\r\n'),
                (b'a\r\n..\r\nb', b'a\r\n..\r\nb\r\n'),
                (b'a\n..\nb', b'a\r\n..\r\nb\r\n'),
                (b'a\n.', b'a\r\n..\r\n'), (b'a\n.\n.', b'a\r\n..\r\n..\r\n')):
            with self.subTest(text):
                self.assertEqual(kept, read([text + TRUE_END])[0])


    def test_a_dot_behind_a_bare_cr_is_not_lost(self):
        """No client doubles it: for it a bare CR is no line end."""
        for text, meant in (
                (b'a\r.f', b'a\r\n.f'), (b'a\r..f', b'a\r\n..f'),
                (b'a\r\r.f', b'a\r\n\r\n.f'), (b'\r.\r.f', b'\r\n.\r\n.f'),
                (b'.\r.f', b'.\r\n.f'), (b'a\r.', b'a\r\n.'),
                (b'a\n..f', b'a\r\n.f'), (b'a\r\r\n..f', b'a\r\n.f')):
            stream = text + TRUE_END
            for place in range(len(stream)):
                with self.subTest(text, place=place):
                    content, _, _ = read([stream[:place], stream[place:]])
                    self.assertEqual(meant + b'\r\n', smtps.unstuffed(content))


LF_HELLO = 'C: HELO x\\n\nS: 250\n'
LF_DATA = ('C: MAIL FROM:<a@home.lan>\\n\nS: 250\n'
           'C: RCPT TO:<b@example.org>\\n\nS: 250\nC: DATA\\n\nS: 354\n')
LF_QUIT = 'C: QUIT\\n\nS: 221\nS: closed\n'


def without_cr(transcript):
    """All that its client says (bytes), with LF for CRLF."""
    return b''.join(text for side, text in steps(transcript)
                    if side == 'C').replace(b'\r\n', b'\n')


class LineFeedsOnly(ListenerCase):
    """A device that never sends a CR: lwsgs, JitterBug, `... | nc`. A mail
    server always does."""
    LIMITS = {'maxsize': BIG + 1000, 'tls': server_tls()}

    def silence(self, seconds):
        """So long nothing may follow LF.LF."""
        patch = mock.patch.object(smtps, 'LF_SILENCE', seconds)
        patch.start()
        self.addCleanup(patch.stop)

    def test_its_dot_ends_a_mail_if_nothing_or_quit_follows(self):
        self.silence(0.05)
        self.table([(LF_HELLO + LF_DATA + row, source) for row, source in (
            ('C: Subject: x\\n\\nhi\\n.\\n\nS: 250\n' + TAKEN
             + '=: Subject: x\\r\\n\\r\\nhi\\r\\n', 'nothing'),
            ('C: hi\\n.\\n\nS: 250\n' + TAKEN + LF_QUIT, 'QUIT'),
            ('C: hi\\n.\\nquit\\n\nS: 250\nS: 221\nS: closed\n' + TAKEN
             + '=: hi\\r\\n', 'QUIT at once'),
            ('C: .\\n\nS: 250\n' + TAKEN + '=: ', 'an empty mail'),
            ('C: \\n.\\n\nS: 250\n' + TAKEN + '=: \\r\\n', 'an empty line'),
            ('C: ..\\n.a\\n.\\n\nS: 250\n' + TAKEN
             + '=: ..\\r\\n.a\\r\\n', 'other dots'))])
        self.assertNotIn('WARNING', [r.levelname for r in self.records.list])

    def test_its_next_mail_is_taken_as_well(self):
        self.silence(0.05)
        mail = LF_DATA + 'C: hi\\n.\\n\nS: 250\n' + TAKEN
        self.converse(LF_HELLO + mail + mail + LF_QUIT)

    def test_a_large_mail_ends_so_too(self):
        self.silence(0.05)
        for size, code in (BIG, '250'), (4 * BIG, '552'):
            for end in b'', b'QUIT\n':
                with self.subTest(size, end=end):
                    client = self.converse(LF_HELLO + LF_DATA)
                    client.send(b'x' * (size - 1) + b'\n.\n' + end)
                    client.expect(code)
                    self.converse('S: 221' if end else LF_QUIT, client)
        self.assertEqual([b'x' * (BIG - 1) + b'\r\n'] * 2,
                         [mail.content for mail in self.mails])

    def test_a_client_that_will_say_no_more_need_not_be_waited_for(self):
        """printf ... | nc"""
        self.silence(60)
        for size in 10, BIG:
            for end in b'', b'QUIT', b'QUIT\n':
                with self.subTest(end, size=size):
                    client = self.client()
                    client.send(without_cr(LF_HELLO + LF_DATA) + b'x' * size
                                + b'\n.\n' + end)
                    client.socket.shutdown(socket.SHUT_WR)
                    self.assertIn(b'250 2.0.0', client.read_until_closed())
        self.assertEqual(6, len(self.mails))

    def test_the_silence_holds_up_no_reply_and_no_other_client(self):
        self.silence(60)
        client = self.client()
        client.send(without_cr(LF_HELLO + LF_DATA) + b'hi\n.\n')
        for code in '250', '250', '250', '354':
            client.expect(code)

        self.assertServes()

        self.assertEqual(1, len(self.mails))
        client.send(b'QUIT\nmore\r\n.\r\n')
        client.expect('250')
        self.assertEqual(b'hi\r\n..\r\nQUIT\r\nmore\r\n',
                         self.mails[1].content)

    def test_a_stop_need_not_wait_for_the_silence(self):
        self.silence(60)
        client = self.converse(LF_HELLO + LF_DATA)
        client.send(b'hi\n.\n')
        self.wait_for_the_loop()

        next(self.stop)

        client.expect('421 4.3.2')
        self.assertEqual([], self.mails)

    def test_what_comes_while_the_loop_is_busy_is_not_overlooked(self):
        """The time is over, but the bytes are there."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            conversation = smtps.Conversation(
                self.server, ours, smtps.Client('', 0), None)
            waiting = conversation._receive_within(1)
            self.assertEqual(smtps.READ, next(waiting))
            theirs.send(b'more')

            with self.assertRaises(StopIteration) as end:
                waiting.throw(smtps.IdleTimeout())

        self.assertEqual(b'more', end.exception.value)
        self.assertEqual(self.server.limits.timeout, conversation.patience)

    def test_one_that_has_sent_a_cr_has_to_go_on_with_it(self):
        """Not even a long silence makes an end of LF.LF then."""
        self.silence(0)
        for said, source in (
                (HELLO + LF_DATA, 'its first line'),
                (LF_HELLO + DATA, 'all that follows'),
                (LF_HELLO + LF_DATA + 'C: one', 'a line of the mail'),
                (LF_HELLO + LF_DATA + 'C: a\\rb\\n', 'inside a line'),
                (LF_HELLO + LF_DATA + 'C: .\\r\\r\\n', 'CR CR LF'),
                (LF_HELLO + 'C: NOOP\nS: 250\n' + LF_DATA, 'one command'),
                (LF_HELLO + 'C: \n' + LF_DATA, 'an empty line'),
                (LF_HELLO + 'C: %s\\r\\n\nS: 500\n' % ('x' * 2049)
                 + LF_DATA, 'a line too long'),
                (LF_HELLO + 'C: AUTH PLAIN\\n\nS: 334\nC: AHUAcA==\n'
                 'S: 235\nL: u p\n' + LF_DATA, 'its password'),
                (LF_HELLO + LF_DATA + END + TAKEN + LF_DATA, 'a mail before'),
                (LF_HELLO + 'C: RSET\nS: 250\n' + LF_DATA, 'RSET')):
            for end in b'', b'QUIT\n':
                with self.subTest(source, end=end):
                    self.records.list.clear()
                    self.assertGoesOn(self.converse(said), end)

    def test_a_cr_at_the_end_of_a_line_too_long_counts(self):
        self.silence(0)
        client = self.client()
        line = b'x' * 3000 + b'\r\n'
        self.send_apart(client, line, len(line) - 1)
        client.expect('500')

        self.assertGoesOn(self.converse(LF_DATA, client), b'')

    def assertGoesOn(self, client, end):
        """LF.LF, with end behind it, does not end the mail."""
        client.send(b'hi\n.\n' + end)
        self.wait_for_the_loop()
        self.wait_for_the_loop()
        client.send(b'more\r\n.\r\n')
        client.expect('250')
        self.assertTrue(self.mails[-1].content.endswith(
            b'hi\r\n..\r\n' + end.replace(b'\n', b'\r\n') + b'more\r\n'))
        self.assertLogged('WARNING', 'single dot that is not its end')

    def test_what_follows_its_dot_is_part_of_the_mail_and_a_warning(self):
        self.silence(60)
        said = without_cr(LF_HELLO + LF_DATA)
        for behind in (b'more\n', b'\n', b'QUIT\nQUIT\n', b'QUITX\n',
                       b'QUIT \n', b'.\n.\n', EVIL.replace(b'\r', b'')):
            for cut in 0, 1, len(behind):
                with self.subTest(behind, cut=cut):
                    self.records.list.clear()
                    client = self.client()
                    data = said + b'hi\n.\n' + behind + b'\n.\n'
                    self.send_apart(client, data, len(
                        said + b'hi\n.\n') + cut)
                    self.assertLogged('WARNING', 'from <a@home.lan> is a line')
                    client.socket.shutdown(socket.SHUT_WR)
                    client.read_until_closed()
                    self.assertEqual(1, len(self.mails))
                    self.assertEqual([], other_ends(self.mails.pop().content))

    def test_no_silence_makes_an_end_of_a_dot_with_bytes_behind_it(self):
        self.silence(0)
        for behind in (b'\n', b'more', b'QU', b'QUITX', b'QUIT \n', b'\0',
                       b'QUIT\n\n', b'.\n\n', b'.', b'..\n'):
            with self.subTest(behind):
                client = self.converse(LF_HELLO + LF_DATA)
                client.send(b'hi\n.\n' + behind)
                self.wait_for_the_loop()
                self.wait_for_the_loop()
                client.close()
        wait_until(lambda: len(self.aborted) == 10)
        self.assertEqual([], self.mails)

    def test_what_was_sent_before_tls_does_not_count(self):
        self.silence(0.05)
        client = self.converse(HELLO + 'C: STARTTLS\nS: 220')
        client.secure(client_tls())
        self.converse(LF_HELLO + LF_DATA + 'C: hi\\n.\\n\nS: 250\n' + TAKEN,
                      client)

    def test_a_mail_without_its_dot_says_why_in_the_log(self):
        for said, reason in (
                (b'hi\r\n', 'the dot at its end is missing'),
                (b'hi\r\n.\n', 'its line of a single dot is not an end'),
                (b'hi\n.\n\n', 'its line of a single dot is not an end')):
            with self.subTest(said):
                client = self.converse(LF_HELLO + LF_DATA)
                client.send(said)
                client.close()
                self.assertLogged('WARNING', (
                    'never completed, nothing of it is kept: closed the '
                    'connection; ' + reason))


class DataReader(unittest.TestCase):
    """However the bytes come in, the same mail comes out."""
    PARTS = (b'\r', b'\n', b'.', b'\r\n', b'\r\r\n', b'\r\n.', b'a', b'..',
             b'\0', b'\r\n.\r\n', b'x' * 998, b'y' * 1001, b'\n.\n')

    def streams(self, seed, count):
        dice = random.Random(seed)
        for _ in range(count):
            yield dice, b''.join(dice.choice(self.PARTS) for _ in range(
                dice.randrange(1, 16))) + TRUE_END + b'NOOP\r\n'

    def test_random_pieces_make_no_difference(self):
        for dice, stream in self.streams(51764, 1500):
            whole = read([stream])
            for count in 1, 3, 10:
                pieces = cuts(stream, dice, count)
                self.assertEqual(whole, read(pieces), pieces)

    def test_single_bytes_make_no_difference(self):
        for _, stream in self.streams(51765, 60):
            self.assertEqual(read([stream]), read(bytewise(stream)), stream)

    def test_line_feeds_only_come_to_the_same_mail(self):
        for dice, stream in self.streams(51768, 1500):
            text = b'\n' + stream.replace(b'\r', b'')
            text = text.partition(b'\n.\n')[0][1:]
            quit = dice.choice((b'', b'QUIT', b'quit\n'))
            reader, content = smtps.DataReader(lf_only=True), b''
            for piece in cuts(text + b'\n.\n' + quit, dice, 4):
                reader.feed(piece)
                content += reader.take()
            self.assertTrue(reader.may_be_over(), text)
            reader.end()

            self.assertEqual((read([text + TRUE_END])[0], quit), (
                content + reader.take(), reader.rest))

    def test_what_comes_out_is_lines(self):
        for _, stream in self.streams(51766, 1500):
            content, rest, _ = read([stream])
            self.assertIsNotNone(rest)
            self.assertNotRegex(content, rb'\r(?!\n)|(?<!\r)\n')
            self.assertRegex(content, rb'(\A|\r\n)\Z')
            self.assertNotRegex(content, rb'(\A|\r\n)\.\r\n')

    def test_nothing_but_line_ends_and_dots_is_changed(self):
        for _, stream in self.streams(51767, 1500):
            content, _, _ = read([stream])
            mail = (b'\r\n' + stream).partition(TRUE_END)[0]
            change = rb'[\r\n.\0]'
            self.assertEqual(re.sub(change, b'', mail),
                             re.sub(change, b'', content))

    def test_memory_is_bounded_by_the_line_not_by_the_mail(self):
        for piece in b'x' * 65536, b'x\r\n' * 5000, b'\r' * 16384, (
                b'\n' * 16384), b'.' * 65536:
            reader = smtps.DataReader()
            for fed in range(len(piece), 8 * len(piece), len(piece)):
                reader.feed(piece)
                reader.take()
                self.assertLess(fed - reader.size, 2 * smtps.LONG_LINE)


if __name__ == '__main__':
    unittest.main()
