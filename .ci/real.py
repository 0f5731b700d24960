"""smtpproxy between real clients and real servers, on loopback.

    .ci/run real [-- Class[.test]]

.ci/run installs the tools and names in EXIM, BUSYBOX_SENDMAIL and NODE_PATH
those that are no packages. What a test sends must arrive, every byte of it.
The servers are described in servers.py.
"""
import collections
import contextlib
import email.message
import email.policy
import os
import pathlib
import pwd
import re
import shutil
import signal
import smtplib
import subprocess
import sys
import tempfile
import time
import unittest

from clients import CLIENTS
from servers import (PASSWORD, POP_WINDOW, USER, Servers, answers, free_port,
                     wait_for)

PROGRAM = pathlib.Path(__file__).resolve().parent.parent
SENDER = 'printer@home.test'
LOCAL_PASSWORD = 'l%et+me#in'
servers = None

# What every server on the way may add to a header.
HOPS = {'return-path', 'x-original-to', 'delivered-to', 'envelope-to',
        'delivery-date', 'received'}

Door = collections.namedtuple('Door', 'mode port cafile user password')


# --- Mail: what is sent and what arrives -------------------------------------

LETTER = """\
Received: by something that was there before;
\tSun, 22 Nov 2020 09:59:59 +0000
Date: Sun, 22 Nov 2020 10:00:00 +0000
From: "The Printer" <%(sender)s>
To: %(to)s
Subject: %(subject)s,
\tfolded with a tab, Gr\u00fc\u00dfe
Message-ID: <%(to)s.%(time)d@home.test>
x-oDD:no blank
X-Empty:

A dot:
.
..
.leading
From here on, a word
From: looks like a header
blanks at the end  \t


8 bit: Gr\u00fc\u00dfe, and latin-1: LATIN-1
a long line: %(long)s
\tthe end

"""


def letter(subject, to, body=None):
    """A mail, as bytes with LF, with all that a proxy likes to break."""
    text = LETTER % {'sender': SENDER, 'to': to, 'subject': subject,
                     'time': time.time_ns(), 'long': 'x' * 1500}
    mail = text.encode().replace(b'LATIN-1', b'Gr\xfc\xdfe')
    if body is not None:
        mail = parts(mail)[0] + b'\n\n' + body
    return mail


def parts(mail):
    """Header and body."""
    header, _, body = mail.partition(b'\n\n')
    return header, body


def fields(header):
    """The fields of a header, folded ones as they are."""
    return re.split(rb'\n(?![ \t])', header)


def name(field):
    return field.split(b':')[0].decode('latin-1').lower()


# --- The proxy ---------------------------------------------------------------

class Proxy:
    """The program as a process, in a folder of its own."""

    def __init__(self, accounts, config=None, command=None):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix='proxy.'))
        self.ini = self.folder / 'smtpproxy.ini'
        self.port = free_port()
        self.config = {
            'host': '127.0.0.1', 'port': self.port, 'msgdir': 'msgs',
            'sleeptime': 1, 'waitafterpop': 0, 'deleteonerror': 'false',
            **(config or {})}
        self.command = command or [
            sys.executable, '-X', 'dev', str(PROGRAM / 'smtpproxy.py'),
            '--config', 'smtpproxy.ini']
        self.forbidden = ['Traceback', 'ResourceWarning', PASSWORD,
                          LOCAL_PASSWORD]
        self.write(accounts)

    def write(self, accounts):
        sections = {'config': self.config, 'logging': {'level': 'DEBUG'},
                    **accounts}
        self.ini.write_text(''.join(
            '[%s]\n%s\n' % (section, ''.join(
                '%s=%s\n' % item for item in keys.items()))
            for section, keys in sections.items()))
        self.ini.chmod(0o600)

    def __enter__(self):
        with open(self.folder / 'stderr', 'wb') as out:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, stdin=subprocess.DEVNULL,
                stdout=out, stderr=out)
        try:
            wait_for(lambda: self.process.poll() is not None
                     or answers(self.config['port']), 15, 'no proxy')
            if self.process.poll() is not None:
                raise AssertionError('the proxy has ended:\n' + self.log())
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, kind, error, where):
        self.process.terminate()
        try:
            code = self.process.wait(10)
        except subprocess.TimeoutExpired:
            code = 'nothing within 10 s'
            self.process.kill()
            self.process.wait()
        log = self.log()
        shutil.rmtree(self.folder)
        if kind:
            print('--- the proxy\n%s\n%s' % (log[-4000:], servers.logs()),
                  file=sys.stderr)
            return
        if code != 0:
            raise AssertionError('SIGTERM, and then: %s\n%s' % (code, log))
        for word in self.forbidden:
            if word in log:
                raise AssertionError('%r is in the log:\n%s' % (word, log))

    def log(self):
        return ''.join(
            path.read_text('utf-8', 'replace')
            for path in (self.folder / 'smtpproxy.log', self.folder / 'stderr')
            if path.exists())

    def logged(self, pattern, seconds=20):
        """Wait for a line of the log that matches; return it."""
        def line():
            return re.search('^.*(?:%s).*$' % pattern, self.log(),
                             re.I | re.M)
        return wait_for(line, seconds,
                        'no line in the log matches ' + pattern)[0]

    def waiting(self):
        """The files of the mails that are still in the spool."""
        return sorted(self.folder.glob('msgs/*.mail'))

    def send(self, to, mail, sender=SENDER, options=()):
        with smtplib.SMTP('127.0.0.1', self.config['port']) as smtp:
            return smtp.sendmail(sender, to, mail.replace(b'\n', b'\r\n'),
                                 ['BODY=8BITMIME', *options])

    def memory(self):
        """The most that the process has ever had in memory, in kB."""
        status = pathlib.Path('/proc/%d/status' % self.process.pid)
        return int(re.search(r'VmHWM:\s+(\d+)', status.read_text())[1])


def account(door, **more):
    """The ini's keys for an account at one of the servers."""
    keys = {'smtphost': 'localhost', 'smtpport': servers.port[door],
            'tlscafile': servers.folder / 'tls/ca.pem'}
    if door == 'submission':
        keys['smtpsecurity'] = 'tls'
    elif door != 'relay':
        keys['smtpsecurity'] = 'ssl'
    if door != 'relay':
        keys.update(smtpusername=USER, smtppassword=PASSWORD)
    return dict(keys, **more)


def pop(door='pop3s', **more):
    """The keys for POP-before-SMTP."""
    return dict({'popbeforesmtp': 'true', 'pophost': 'localhost',
                 'popport': servers.port[door],
                 'popssl': 'true' if door == 'pop3s' else 'false',
                 'popusername': USER, 'poppassword': PASSWORD}, **more)


class Case(unittest.TestCase):
    maxDiff = 2000

    def setUp(self):
        self.close_the_relay()

    def close_the_relay(self):
        """As if the last POP login were long ago."""
        for file in servers.folder.glob('popped/*'):
            file.unlink()

    def assertArrived(self, to, sent, seconds=30):
        """The mail that was sent is there, every byte; only header fields
        of the names in HOPS have been added."""
        arrived = servers.take(to, seconds)
        head, body = parts(arrived)
        sent_head, sent_body = parts(sent)
        self.assertEqual(body, sent_body)
        left = fields(sent_head)
        for field in fields(head):
            if left and field == left[0]:
                del left[0]
            else:
                self.assertIn(name(field), HOPS, field)
        self.assertEqual(left, [], head.decode('latin-1'))
        return arrived

    def assertThrough(self, proxy, subject, seconds=30):
        """Send a mail; it arrives as it was, and the spool is empty."""
        to = '%s.%d@elsewhere.test' % (subject.replace(' ', '-'),
                                       time.time_ns())
        mail = letter(subject, to)
        proxy.send(to, mail)
        arrived = self.assertArrived(to, mail, seconds=seconds)
        wait_for(lambda: not proxy.waiting(), 10, 'the spool is not empty')
        return arrived


# --- The way out -------------------------------------------------------------

class PopBeforeSmtp(Case):
    def test_exim_relays_only_after_a_pop_login(self):
        def attempt():
            with smtplib.SMTP('127.0.0.1', servers.port['relay']) as smtp:
                smtp.ehlo()
                smtp.mail(SENDER)
                return smtp.rcpt('x@elsewhere.test')[0]
        self.assertEqual(attempt(), 550)
        with Proxy({SENDER: account('relay', **pop())}) as proxy:
            self.assertThrough(proxy, 'opens')
        self.assertEqual(attempt(), 250)

    def test_pop_and_pops(self):
        for door in ('pop3', 'pop3s'):
            with self.subTest(door):
                self.close_the_relay()
                with Proxy({SENDER: account('relay', **pop(door))}) as proxy:
                    self.assertThrough(proxy, door)

    def test_without_pop_the_mail_is_refused_and_kept(self):
        with Proxy({SENDER: account('relay')}) as proxy:
            proxy.send('x@elsewhere.test', letter('refused', 'x'))
            proxy.logged('relay not permitted')
            self.assertEqual(len(proxy.waiting()), 1)

    def test_login_is_repeated_when_it_is_too_old(self):
        delay = POP_WINDOW - 3
        keys = account('relay', **pop(popcheckdelay=delay))
        with Proxy({SENDER: keys}) as proxy:
            before = servers.pop_logins()
            self.assertThrough(proxy, 'first')
            self.assertThrough(proxy, 'right behind')
            self.assertEqual(servers.pop_logins(), before + 1)
            time.sleep(POP_WINDOW + 1)      # now the server has forgotten
            self.assertThrough(proxy, 'later')
            self.assertEqual(servers.pop_logins(), before + 2)

    def test_pause_after_the_login(self):
        keys = account('relay', **pop())
        with Proxy({SENDER: keys}, {'waitafterpop': 2}) as proxy:
            begin = time.monotonic()
            self.assertThrough(proxy, 'slow')
            self.assertGreaterEqual(time.monotonic() - begin, 2)


class Submission(Case):
    def test_every_login_at_every_server(self):
        for door in ('submission', 'smtps', 'eximtls'):
            for method in ('auto', 'plain', 'login', 'cram-md5'):
                with self.subTest(door, smtpauth=method):
                    with Proxy({SENDER: account(
                            door, smtpauth=method)}) as proxy:
                        self.assertThrough(proxy, door + ' ' + method)

    def test_addresses_in_utf8(self):
        for door in ('smtps', 'relay'):
            with self.subTest(door):
                to = 'gr\u00fc\u00dfe-%s@elsewhere.test' % door
                mail = letter('utf-8', to)
                keys = account(door, **(pop() if door == 'relay' else {}))
                with Proxy({SENDER: keys}) as proxy:
                    proxy.send(to, mail, options=['SMTPUTF8'])
                    self.assertArrived(to, mail)

    def test_header_settings(self):
        to = 'settings@elsewhere.test'
        mail = letter('settings', to)
        with Proxy({SENDER: account(
                'submission', returnpath='bounce@home.test',
                replyto='answer@home.test',
                forcefrom='owner@home.test')}) as proxy:
            proxy.send(to, mail)
            arrived = servers.take(to)
        head, body = parts(arrived)
        self.assertEqual(body, parts(mail)[1])
        self.assertRegex(head, rb'(?m)^Return-Path: <bounce@home.test>$')
        self.assertRegex(head, rb'(?m)^Reply-To: <?answer@home.test>?$')
        self.assertRegex(head, rb'(?m)^From: .*<?owner@home.test>?$')
        self.assertNotIn(SENDER.encode(), head)

    def test_refused_recipients_stay_alone(self):
        good = ['one@elsewhere.test', 'two@elsewhere.test']
        mail = letter('three', good[0])
        with Proxy({SENDER: account('smtps')}) as proxy:
            proxy.send([good[0], 'nobody@elsewhere.test', good[1]], mail)
            for to in good:
                self.assertArrived(to, mail)
            proxy.logged('no such user here')
            self.assertEqual(len(proxy.waiting()), 1)
            proxy.process.send_signal(signal.SIGHUP)
            time.sleep(2)
            self.assertIsNone(servers.find(good[0]), 'sent twice')

    def test_temporary_refusal_is_tried_again(self):
        with Proxy({SENDER: account('smtps')}) as proxy:
            proxy.send('later@elsewhere.test', letter('later', 'later'))
            wait_for(lambda: proxy.log().count('try again later') > 1, 20,
                     'no second try')
            self.assertEqual(len(proxy.waiting()), 1)

    def test_several_accounts(self):
        keys = {'a@home.test': account('submission'),
                '*@home.test': account('eximtls'),
                'default': account('relay', **pop())}
        with Proxy(keys) as proxy:
            for sender, server in (
                    ('A@Home.test', b'by postfix.test'),
                    ('b@home.test', b'by exim.test'),
                    ('', b'by exim.test'),
                    ('c@else.test', b'by exim.test')):
                with self.subTest(sender):
                    mail = letter('accounts', 'several@elsewhere.test')
                    proxy.send('several@elsewhere.test', mail, sender)
                    arrived = self.assertArrived(
                        'several@elsewhere.test', mail)
                    self.assertIn(server, arrived)


class Added(Case):
    """--add with nothing but what an owner knows, then a first mail."""

    def add(self, proxy, keys):
        """What --add says; passwords come from stdin."""
        secrets = [value for key, value in keys.items()
                   if key.endswith('password')]
        done = subprocess.run(
            [*proxy.command, '--add', SENDER, *(
                '%s=%s' % (key, '-' if key.endswith('password') else value)
                for key, value in keys.items())],
            cwd=proxy.folder, input='\n'.join(secrets) + '\n', text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertNotIn(PASSWORD, done.stdout)
        return done

    def test_an_account_of_each_kind_delivers(self):
        for door, keys in (
                ('submission', account('submission')),
                ('smtps', account('smtps')),
                ('relay', dict(account('relay', smtpsecurity='none'),
                               **pop()))):
            with self.subTest(door):
                self.close_the_relay()
                proxy = Proxy({})
                done = self.add(proxy, keys)
                self.assertEqual(0, done.returncode, done.stdout)
                self.close_the_relay()
                with proxy:
                    self.assertThrough(proxy, 'added for ' + door)

    def test_a_wrong_password_is_not_written(self):
        proxy = Proxy({})
        before = proxy.ini.read_bytes()

        done = self.add(proxy, account('submission', smtppassword='wrong'))

        self.assertEqual(1, done.returncode)
        self.assertIn('535 5.7.8', done.stdout)
        self.assertEqual(before, proxy.ini.read_bytes())

    def test_a_running_service_takes_it_at_once(self):
        with Proxy({'default': account('relay', **pop())}) as proxy:
            done = self.add(proxy, account('submission'))
            self.assertIn('has read it again', done.stdout)
            self.assertThrough(proxy, 'added while it runs')


class Trouble(Case):
    """The mail is kept, the log says why, and a mended ini sends it."""

    def assertKept(self, pattern, keys):
        to = 'kept.%d@elsewhere.test' % time.time_ns()
        mail = letter('kept', to)
        with Proxy({SENDER: keys}) as proxy:
            proxy.send(to, mail)
            line = proxy.logged(pattern)
            self.assertRegex(line, 'WARNING|ERROR')
            ident = proxy.waiting()[0].name.split('.')[0]
            self.assertIn(ident, line)
            proxy.write({SENDER: account('submission')})
            proxy.process.send_signal(signal.SIGHUP)
            self.assertArrived(to, mail)
            wait_for(lambda: not proxy.waiting(), 10, 'still in the spool')

    def test_certificates(self):
        stranger = servers.folder / 'tls/stranger.pem'
        for why, pattern, keys in (
                ('expired', 'expired', account('expired')),
                ('for another host', 'localhost', account('otherhost')),
                ('of an unknown CA, STARTTLS', 'tlscafile',
                 account('submission', tlscafile=stranger)),
                ('of an unknown CA, TLS', 'tlscafile',
                 account('smtps', tlscafile=stranger)),
                ('of an unknown CA, POP', 'tlscafile',
                 account('relay', tlscafile=stranger, **pop()))):
            with self.subTest(why):
                self.assertKept('certificate.*' + pattern, keys)

    def test_certificate_that_is_not_to_be_verified(self):
        for door in ('expired', 'otherhost'):
            with Proxy({SENDER: account(door, tlsverify='false')}) as proxy:
                self.assertThrough(proxy, 'unverified ' + door)

    def test_wrong_password(self):
        for method in ('auto', 'plain', 'login', 'cram-md5'):
            with self.subTest(method):
                self.assertKept('535.*authentication', account(
                    'eximtls', smtppassword='wrong', smtpauth=method))

    def test_wrong_pop_password(self):
        for door in ('pop3', 'pop3s'):
            with self.subTest(door):
                self.assertKept('POP.*authentication', account(
                    'relay', **pop(door, poppassword='wrong')))

    def test_wrong_host_and_port(self):
        nobody = free_port()
        for why, pattern, keys in (
                ('port', 'refused', account('smtps', smtpport=nobody)),
                ('POP port', 'refused',
                 account('relay', **pop(popport=nobody))),
                ('name', 'no-such-host', account(
                    'smtps', smtphost='no-such-host.invalid')),
                ('security, no STARTTLS there', 'STARTTLS',
                 account('relay', smtpsecurity='tls')),
                ('security, no TLS there', 'smtpsecurity',
                 account('submission', smtpsecurity='ssl')),
                ('security, TLS wanted', 'smtpsecurity=tls',
                 account('submission', smtpsecurity='none')),
                ('service', 'not SMTP', account(
                    'relay', smtpport=servers.port['pop3']))):
            with self.subTest(why):
                self.assertKept(pattern, keys)


# --- The way in --------------------------------------------------------------

class Clients(Case):
    """Ten clients and Postfix, each through every door that it can use."""

    @classmethod
    def setUpClass(cls):
        with contextlib.ExitStack() as stack:
            tlsport = free_port()
            tls = servers.folder / 'tls'
            cls.proxy = stack.enter_context(Proxy(
                {SENDER: account('smtps', localpassword=LOCAL_PASSWORD)},
                {'tlscert': tls / 'good.crt', 'tlskey': tls / 'good.key',
                 'tlsport': tlsport}))
            wait_for(lambda: answers(tlsport), 5, 'no tlsport')
            cls.doors = {
                mode: Door(mode, tlsport if mode == 'tls' else cls.proxy.port,
                           str(tls / 'ca.pem'), SENDER, LOCAL_PASSWORD)
                for mode in ('plain', 'starttls', 'tls')}
            cls.addClassCleanup(stack.pop_all().close)

    def run_client(self, client, door, to, mail):
        command, text = client(door, SENDER, to, mail)
        if callable(command):
            return command()
        done = subprocess.run(
            command, input=text, capture_output=True, timeout=60,
            env=dict(os.environ, HOME='/nonexistent'))    # no rc files
        self.assertEqual(done.returncode, 0, (done.stdout + done.stderr)
                         .decode('latin-1') + self.proxy.log()[-3000:])

    def through_every_door(self, client):
        for mode, door in self.doors.items():
            with self.subTest(mode):
                to = '%s-%s@elsewhere.test' % (client, mode)
                mail = letter(to, to)
                self.run_client(CLIENTS[client], door, to, mail)
                self.assertArrived(to, mail)

    def test_curl(self):
        self.through_every_door('curl')

    def test_swaks(self):
        self.through_every_door('swaks')

    def test_msmtp(self):
        self.through_every_door('msmtp')

    def test_busybox_sendmail(self):
        self.through_every_door('busybox')

    def test_perl_net_smtp(self):
        self.through_every_door('perl')

    def test_php_forum(self):
        self.through_every_door('board')

    def test_php_mailer_sends_two_at_once(self):
        for mode, door in self.doors.items():
            with self.subTest(mode):
                to = ['mailer%d-%s@elsewhere.test' % (number, mode)
                      for number in (1, 2)]
                mail = letter('mailer', to[0])
                self.run_client(CLIENTS['mailer'], door, ','.join(to), mail)
                for address in to:
                    self.assertArrived(address, mail)

    def test_nodemailer(self):
        self.through_every_door('nodemailer')

    def test_python(self):
        self.through_every_door('python')

    def test_s_nail(self):
        """It writes its own header, so only the body can be compared."""
        for mode, door in self.doors.items():
            with self.subTest(mode):
                to = 's-nail-%s@elsewhere.test' % mode
                mail = letter(to, to, b'.\n..\n\nGr\xc3\xbc\xc3\x9fe  \nend\n')
                self.run_client(CLIENTS['s-nail'], door, to, mail)
                head, body = parts(servers.take(to))
                self.assertEqual(body, parts(mail)[1])
                self.assertIn(b'\nSubject: from s-nail', head)

    def test_postfix(self):
        secure = (' -o smtp_tls_security_level=secure'
                  ' -o smtp_tls_secure_cert_match=localhost')
        process = servers.start_postfix(
            'client', 'client.cf', 'plain unix - - n - - smtp',
            'starttls unix - - n - - smtp' + secure,
            'wrapped unix - - n - - smtp -o smtp_tls_wrappermode=yes'
            + secure, port=self.proxy.port, tlsport=self.doors['tls'].port,
            login='%s:%s' % (SENDER, LOCAL_PASSWORD))
        self.addCleanup(process.wait, 10)
        self.addCleanup(process.terminate)
        for mode in self.doors:
            with self.subTest(mode):
                to = 'postfix-%s@elsewhere.test' % mode
                mail = letter(to, to)
                subprocess.run(
                    ['sendmail', '-C', str(servers.folder / 'client'),
                     '-f', SENDER, '-i', to], input=mail, check=True)
                self.assertArrived(to, mail)

    def test_strangers_are_refused(self):
        for what, wrong in (('password', {'password': 'wrong'}),
                            ('user', {'user': 'somebody@home.test'})):
            with self.subTest(what):
                door = self.doors['plain']._replace(**wrong)
                with self.assertRaises(smtplib.SMTPException):
                    CLIENTS['python'](door, SENDER, 'x@elsewhere.test',
                                      letter('stranger', 'x'))[0]()
        with self.assertRaises(smtplib.SMTPSenderRefused) as refused:
            self.proxy.send('x@elsewhere.test', letter('stranger', 'x'))
        self.assertEqual(refused.exception.smtp_code, 530)


def on_openwrt(packages):
    """The command that runs the program with only some of the library."""
    return [sys.executable, str(PROGRAM / '.ci/light.py'), packages,
            str(PROGRAM / 'smtpproxy.py'), '--config', 'smtpproxy.ini']


# --- The program as a whole --------------------------------------------------

class Program(Case):
    def test_a_mail_of_100_MB_takes_no_memory(self):
        to = 'large@elsewhere.test'
        line = b'0123456789abcdef' * 4 + b'\n'
        mail = letter('large', to, line * (10**8 // len(line)))
        for door in ('smtps', 'relay'):
            with self.subTest(door):
                keys = account(door, **(pop() if door == 'relay' else {}))
                with Proxy({SENDER: keys},
                           {'maxsize': 2 * 10**8}) as proxy:
                    self.assertThrough(proxy, 'small')
                    before = proxy.memory()
                    proxy.send(to, mail)
                    self.assertArrived(to, mail, seconds=120)
                    grown = proxy.memory() - before
                self.assertLessEqual(grown, 8 * 1024)
                print('100 MB to %s: from %d kB, %+d kB' % (
                    door, before, grown))

    def test_root_becomes_the_configured_user(self):
        low = next(port for port in (25, *range(1023, 900, -1))
                   if not answers(port))
        # A Python and a program below root's home would be out of reach.
        proxy = Proxy(
            {SENDER: account('smtps', smtpport=free_port())},
            {'port': low, 'user': 'mail', 'group': 'mail'},
            ['/usr/bin/python3', 'smtpproxy.py'])
        self.install(proxy.folder)
        for path in [proxy.folder, *proxy.folder.glob('**/*')]:
            shutil.chown(path, 'mail', 'mail')
        with proxy:
            proxy.send('x@elsewhere.test', letter('kept', 'x'))
            proxy.logged('refused')
            mail = pwd.getpwnam('mail')
            status = pathlib.Path(
                '/proc/%d/status' % proxy.process.pid).read_text()
            for key, number in (('Uid', mail.pw_uid), ('Gid', mail.pw_gid)):
                ids = re.search(key + r':\s+(.*)', status)[1].split()
                self.assertEqual(ids, [str(number)] * 4)
            groups = re.search(r'Groups:(.*)', status)[1].split()
            self.assertNotIn('0', groups)
            for path in [proxy.folder / 'smtpproxy.log',
                         *proxy.folder.glob('msgs/**/*'),
                         proxy.folder / 'msgs']:
                self.assertEqual(path.stat().st_uid, mail.pw_uid, path)
            self.assertEqual(len(proxy.waiting()), 1)

            proxy.write({SENDER: account('smtps')})
            proxy.process.send_signal(signal.SIGHUP)
            servers.take('x@elsewhere.test')

    def install(self, folder):
        for file in ('smtpproxy.py', 'smtps.py', 'MailHandler.py'):
            shutil.copy(PROGRAM / file, folder)
        shutil.copytree(PROGRAM / 'handlers', folder / 'handlers',
                        ignore=shutil.ignore_patterns('__pycache__'))

    def test_an_installation_of_1_7_goes_on(self):
        proxy = Proxy({}, command=[sys.executable, 'smtpproxy.py'])
        self.install(proxy.folder)
        for file, text in OLD_HANDLERS.items():
            (proxy.folder / 'handlers' / file).write_text(text)
        proxy.ini.write_bytes((OLD_INI % dict(
            servers.port, port=proxy.port, user=USER, password=PASSWORD,
            ca=servers.folder / 'tls/ca.pem'))
            .replace('\n', '\r\n').encode())
        proxy.forbidden.remove('Traceback')       # one handler is broken
        copy = 'archive@elsewhere.test'
        with proxy:
            # Its subject is ASCII: other ones were never a str in 1.x either.
            mail = letter('fax', 'somebody@elsewhere.test').replace(
                b'Gr\xc3\xbc\xc3\x9fe', b'Hello', 1)
            proxy.send('somebody@elsewhere.test', mail, 'fax@home.test')
            arrived = servers.take(copy)
            head, body = parts(arrived)
            self.assertEqual(body, parts(mail)[1])
            self.assertRegex(head, rb'(?m)^To: <?archive@elsewhere.test>?$')
            self.assertRegex(head, rb'(?m)^Reply-To: <?me@home.test>?$')
            self.assertRegex(head, rb'(?mi)^Return-Path: <me@home.test>$')
            proxy.logged('redirected a fax')

            proxy.send('somebody@elsewhere.test',
                       mail.replace(b'fax', b'SPAM of a camera'))
            proxy.logged('swallowed')
            wait_for(lambda: not proxy.waiting(), 10, 'not discarded')

            other = 'other@elsewhere.test'
            mail = letter('other', other)
            proxy.send(other, mail, 'scanner@home.test')
            self.assertArrived(other, mail)
            self.assertIsNone(servers.find('somebody@elsewhere.test'))

    def test_on_openwrt(self):
        """With the packages that the README names, and without TLS."""
        for packages, keys in (
                ('logging,urllib,openssl,codecs',
                 account('smtps', **pop('pop3s'))),
                ('logging,urllib,codecs', account('relay', **pop('pop3')))):
            with self.subTest(packages):
                self.close_the_relay()
                if 'openssl' not in packages:
                    del keys['tlscafile']
                with Proxy({SENDER: keys},
                           command=on_openwrt(packages)) as proxy:
                    self.assertThrough(proxy, 'openwrt')

    def test_on_openwrt_a_missing_package_is_named(self):
        packages = ['logging', 'urllib', 'openssl', 'codecs']
        for gone in packages[1:]:
            with self.subTest(gone):
                left = ','.join(set(packages) - {gone})
                with Proxy({SENDER: account('smtps')},
                           command=on_openwrt(left)) as proxy:
                    proxy.send('x@elsewhere.test', letter('x', 'x'))
                    proxy.logged('WARNING.*python3-' + gone)
                    self.assertEqual(len(proxy.waiting()), 1)

    def test_voice_mail_is_saved_and_sent(self):
        """A PBX mail made by a real library; the shipped handler."""
        message = email.message.EmailMessage(
            policy=email.policy.SMTP.clone(cte_type='7bit'))
        message['From'] = 'Anrufbeantworter <%s>' % SENDER
        message['To'] = 'voice@elsewhere.test'
        message['Subject'] = 'Nachricht von 0123 456789 (M\u00fcller)'
        message['Date'] = 'Sun, 22 Nov 2020 10:00:00 +0000'
        message['Message-ID'] = '<voice.%d@home.test>' % time.time_ns()
        message.set_content('Sie haben eine Nachricht f\u00fcr Sie.\n')
        wav = [b'RIFF\x24\x20\0\0WAVEfmt ' + bytes(range(256)) * 512 + end
               for end in (b'one', b'two')]
        message.add_attachment(wav[0], maintype='audio', subtype='x-wav',
                               filename='../../22.11.20_10.00 M\u00fcller.wav')
        proxy = Proxy({SENDER: account('smtps'),
                       'handler savevoice': {'enabled': 'true',
                                             'folder': 'FOLDER'}})
        voices = proxy.folder / 'voices'
        voices.mkdir()
        proxy.ini.write_text(proxy.ini.read_text().replace(
            'FOLDER', str(voices)))
        with proxy:
            for sound in wav:       # two messages, but one file name
                message.get_payload(1).set_content(
                    sound, 'audio', 'x-wav', disposition='attachment',
                    filename='../../22.11.20_10.00 M\u00fcller.wav')
                mail = message.as_bytes().replace(b'\r\n', b'\n')
                proxy.send('voice@elsewhere.test', mail)
                self.assertArrived('voice@elsewhere.test', mail)
            saved = list(voices.iterdir())
            self.assertCountEqual([path.read_bytes() for path in saved], wav)
            self.assertEqual([path.suffix for path in saved], ['.wav'] * 2)


OLD_INI = '''\
; An ini as 1.7 had it
[config]
port = %(port)d
sleeptime = 2
debuglevel = 1
waitafterpop = 1
deleteonerror = true
msgdir = msgs

[logging]
file = smtpproxy.log
size = 1000000
count = 10
level = DEBUG

[me@home.test]
localhostname = home.test
smtphost = localhost
smtpport = %(relay)d
smtpsecurity = none
popbeforesmtp = true
pophost = localhost
popport = %(pop3)d
popssl = false
popusername = %(user)s
poppassword = %(password)s
popcheckdelay = 4
returnpath = me@home.test
replyto = me@home.test

[fax@home.test]
use = me@home.test

[default]
smtphost = localhost
smtpport = %(smtps)d
smtpsecurity = ssl
smtpusername = %(user)s
smtppassword = %(password)s
tlscafile = %(ca)s
'''

OLD_HANDLERS = {
    'RedirectFax.py': '''\
import mlogging
from MailHandler import MailHandler

class RedirectFax(MailHandler):
    def __init__(self):
        self.logger = None

    def isEnabled(self):
        return True

    def setLogger(self, logger):
        self.logger = logger

    def handleMessage(self, message, mail, callback):
        if mail.frm == '<fax@home.test>' and \\
                mail.to[0] == '<somebody@elsewhere.test>':
            callback.setTo('archive@elsewhere.test')
            self.logger.log('redirected a fax: ' + message['Message-ID'])
        return True
''',
    'SwallowSpam.py': '''\
from MailHandler import MailHandler
import mlogging, sys

class SwallowSpam(MailHandler):
    def isEnabled(self):
        return True

    def setLogger(self, logger):
        self.logger = logger

    def handleMessage(self, message, mail, callback):
        if message['Subject'].find('SPAM') >= 0:
            self.logger.logerr('swallowed a mail to %s' % mail.to)
            return False
        self.logger.logdebug('passed %d bytes' % len(mail.msg))
        return True
''',
    'Broken.py': '''\
import mlogging
from MailHandler import MailHandler

class Broken(MailHandler):
    def isEnabled(self):
        return True

    def setLogger(self, logger):
        self.logger = logger

    def handleMessage(self, message, mail, callback):
        raise ValueError('a handler with a mistake')
''',
    'Off.py': '''\
import mlogging
from MailHandler import MailHandler

class Off(MailHandler):
    def isEnabled(self):
        return False

    def setLogger(self, logger):
        self.logger = logger

    def handleMessage(self, message, mail, callback):
        return False
'''}


def main():
    global servers

    def ended(*_):
        servers.stop()
        os._exit(1)     # unittest takes an exception for one more failed test

    with tempfile.TemporaryDirectory(prefix='real.') as folder:
        servers = Servers(folder, os.environ['EXIM'])
        signal.signal(signal.SIGTERM, ended)
        servers.start()
        try:
            unittest.main()
        finally:
            servers.stop()


if __name__ == '__main__':
    main()
