"""smtpproxy signs in at a real token server and sends through a real Dovecot.

    .ci/run oauth [-- [Class[.test]] [--kills N]]

The servers are described in signin.py. The class Ground tries them without
the program; all others run the program, as soon as it knows --login.
"""
import argparse
import base64
import contextlib
import hashlib
import itertools
import os
import pathlib
import random
import re
import signal
import smtplib
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.error
import urllib.parse

import real
from real import PROGRAM, SENDER, letter
from servers import free_port, wait_for
from signin import (APP, CONFIDENTIAL, MAILBOX, PUBLIC, SECRET, Person,
                    TokenServers)

DEVICE_CODE = 'urn:ietf:params:oauth:grant-type:device_code'
RENEWAL = 'refresh_token'
MARGIN = 600            # seconds before a token's end that it is renewed
GAP = 0.5               # seconds between the server's answer and a kill
OTHER = 'camera@home.test'
kills = 20
servers = tokens = None


# --- Secrets -----------------------------------------------------------------

def spellings(secret):
    """Itself, as in an address, and what of its base64 stands inside that of
    any text around it."""
    yield secret
    yield urllib.parse.quote(secret, '')
    for before in range(3):
        text = base64.b64encode(b'=' * before + secret.encode()).decode()
        yield text[4 if before else 0:].rstrip('=')[:-2]


def betrayed(text):
    """The secrets that a text gives away."""
    words = ' '.join(set(re.findall(r'[\w+/=.~%-]{16,}', text)))
    return [secret for secret in tokens.secrets()
            if any(spelling in words for spelling in spellings(secret))]


class Witness:
    """Notes the arguments of every process that it sees."""

    def __init__(self):
        self.seen, self.over = set(), threading.Event()
        self.thread = threading.Thread(target=self.watch, name='witness')

    def watch(self):
        while not self.over.wait(0.05):
            for file in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
                with contextlib.suppress(OSError):
                    self.seen.add(file.read_bytes())

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()


# --- The program -------------------------------------------------------------

def knows_login():
    return '--login' in subprocess.run(
        [sys.executable, str(PROGRAM / 'smtpproxy.py'), '--help'],
        capture_output=True, text=True).stdout


def account(flow, **more):
    """The ini's keys for an account that signs in so."""
    way = {'device': {'oauthdeviceurl': tokens.url + '/device/auth'},
           'browser': {'oauthauthurl': tokens.url + '/auth'},
           'app': {'oauthclientid': APP, 'oauthclientsecret': SECRET}}
    return {'smtphost': '127.0.0.1', 'smtpport': servers.port['submission'],
            'smtpusername': MAILBOX, 'oauth': 'other', 'oauthflow': flow,
            'oauthclientid': PUBLIC, 'oauthscope': 'smtp.send',
            'oauthtokenurl': tokens.url + '/token', **way[flow], **more}


class Proxy(real.Proxy):
    """Its log tells as much as it can, and no secret."""

    def __init__(self, accounts, config=None):
        super().__init__(accounts, {'debuglevel': 2, **(config or {})})

    def __exit__(self, kind, error, where):
        self.forbidden += betrayed(self.log())
        super().__exit__(kind, error, where)

    def start(self):
        """Once more, after kill()."""
        super().__enter__()

    def kill(self):
        """End it as a power failure would; return when."""
        self.process.kill()
        when = time.time()
        self.process.wait()
        return when

    def run(self, *arguments, **options):
        return Command(self, *arguments, **options)

    def says(self, *arguments):
        """All that a command prints."""
        with self.run(*arguments) as command:
            command.end()
            return command.output()

    def sign_in(self, sender=SENDER, person=None):
        """By device code."""
        with self.run('--login', sender) as login:
            login.approve(person)
            if login.end() != 0:
                raise AssertionError('--login:\n' + login.output())

    def sign_ins(self):
        """The files that a sign-in is kept in."""
        return [path for path in self.folder.glob('tokens/*')
                if path.is_file() and '"' in path.read_text('latin-1')]


class Command:
    """A command of the program beside the service, as a person sees it."""
    numbers = itertools.count()

    def __init__(self, proxy, *arguments):
        base = proxy.folder / ('command%d' % next(self.numbers))
        self.out, self.err = base.with_suffix('.out'), base.with_suffix('.err')
        with open(self.out, 'wb') as out, open(self.err, 'wb') as err:
            self.process = subprocess.Popen(
                [sys.executable, '-X', 'dev', str(PROGRAM / 'smtpproxy.py'),
                 '--config', 'smtpproxy.ini', *arguments], cwd=proxy.folder,
                stdin=subprocess.PIPE, stdout=out, stderr=err)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.stdin.close()
        self.process.wait()
        output = self.output()
        for word in ('Traceback', 'ResourceWarning', *betrayed(output)):
            if word in output:
                raise AssertionError('%r in:\n%s' % (word, output))

    def output(self):
        return self.out.read_text('utf-8') + self.err.read_text('utf-8')

    def shows(self, pattern, seconds=20):
        """Wait for a line of stdout that matches; return the match."""
        def match():
            return re.search(pattern, self.out.read_text('utf-8'), re.M)
        try:
            return wait_for(match, seconds, 'nothing matches ' + pattern)
        except TimeoutError as error:
            raise AssertionError('%s:\n%s' % (error, self.output()))

    def approve(self, person=None):
        """Do what its lines ask a person to do, on the phone; return the
        last page."""
        address = self.shows(r'(https?://\S+/device)\b')[1]
        code = self.shows(r'\b([A-Z]{4}-[A-Z]{4})\b')[1]
        return (person or Person()).sign_in(address, code)

    def address(self):
        """What is to be opened in a browser: it is alone on its line."""
        return self.shows(r'^(https?://\S+/auth\?\S+)$')[1]

    def type(self, line):
        self.process.stdin.write(line.encode() + b'\n')
        self.process.stdin.flush()

    def end(self, seconds=30):
        """Wait for its end; return the exit code."""
        return self.process.wait(seconds)


class Case(real.Case):
    def setUp(self):
        tokens.reset()
        self.before = len(tokens.requests())

    def tearDown(self):
        tokens.reset()

    def requests(self, *grants):
        """What this test's program has asked the token server for."""
        return tokens.requests(*grants, since=self.before)

    def assertRenewals(self, count, why=None):
        """The token server's log may have the last one a moment later."""
        wait_for(lambda: len(self.requests(RENEWAL)) >= count, 5,
                 'not so many renewals')
        self.assertEqual(len(self.requests(RENEWAL)), count, why)

    def disconnected(self):
        """Wait until the program has left Dovecot: only who comes anew has
        to log in."""
        there = re.compile(r'^ *\d+: \S+ 0100007F:%04X 01 '
                           % servers.port['submission'], re.M)
        wait_for(lambda: not there.search(
            pathlib.Path('/proc/net/tcp').read_text()), 20, 'still connected')

    def assertNoReuse(self):
        """No refresh token was presented twice."""
        presented = [request['presented'] for request in
                     self.requests(RENEWAL)]
        self.assertEqual(len(presented), len(set(presented)))


# --- The servers by themselves -----------------------------------------------

def device_tokens(scope='smtp.send', person=None):
    """What the token server answers after a sign-in by device code."""
    _, answer = tokens.post('/device/auth', client_id=PUBLIC, scope=scope)
    (person or Person()).sign_in(answer['verification_uri'],
                                 answer['user_code'])
    return tokens.post('/token', client_id=PUBLIC, grant_type=DEVICE_CODE,
                       device_code=answer['device_code'])[1]


def renew(refresh_token, **more):
    return tokens.post('/token', client_id=PUBLIC, grant_type=RENEWAL,
                       refresh_token=refresh_token, **more)


def sasl(mechanism, token, user=MAILBOX):
    form = {'XOAUTH2': 'user=%s\x01auth=Bearer %s\x01\x01',
            'OAUTHBEARER': 'n,a=%s,\x01auth=Bearer %s\x01\x01'}[mechanism]
    return base64.b64encode((form % (user, token)).encode()).decode()


@contextlib.contextmanager
def dovecot():
    with smtplib.SMTP('127.0.0.1', servers.port['submission']) as smtp:
        smtp.ehlo()
        yield smtp


def login(mechanism, token, user=MAILBOX):
    """The codes of Dovecot's replies."""
    with dovecot() as smtp:
        replies = [smtp.docmd('AUTH', '%s %s' % (
            mechanism, sasl(mechanism, token, user)))]
        if replies[-1][0] == 334:       # a refusal; it waits for an answer
            replies.append(smtp.docmd(
                '' if mechanism == 'XOAUTH2' else 'AQ=='))
        return [code for code, _ in replies]


class Ground(Case):
    """So that the program is not blamed for the servers."""

    def test_device_code(self):
        answer = device_tokens('smtp.send offline_access')
        self.assertEqual(answer['scope'], 'smtp.send offline_access')
        self.assertEqual(answer['expires_in'], 3600)
        self.assertEqual(login('XOAUTH2', answer['access_token']), [235])

    def test_device_code_that_waits_or_is_refused(self):
        _, answer = tokens.post('/device/auth', client_id=PUBLIC)
        poll = {'client_id': PUBLIC, 'grant_type': DEVICE_CODE,
                'device_code': answer['device_code']}
        status, pending = tokens.post('/token', **poll)
        self.assertEqual((status, pending['error']),
                         (400, 'authorization_pending'))
        Person(consents=False).sign_in(answer['verification_uri'],
                                       answer['user_code'])
        self.assertEqual(tokens.post('/token', **poll)[1]['error'],
                         'access_denied')

    def test_browser_with_pkce(self):
        verifier, back = 'v' * 43, 'http://127.0.0.1:%d/' % free_port()
        digest = hashlib.sha256(verifier.encode()).digest()
        question = {
            'client_id': CONFIDENTIAL, 'response_type': 'code',
            'scope': 'smtp.send', 'redirect_uri': back, 'state': 'a state',
            'code_challenge_method': 'S256', 'code_challenge':
            base64.urlsafe_b64encode(digest).decode().rstrip('=')}
        for proof, status in ((verifier, 200), ('w' * 43, 400)):
            with self.subTest(status):
                address = Person().sign_in(tokens.url + '/auth?'
                                           + urllib.parse.urlencode(question))
                self.assertTrue(address.startswith(back), address)
                answer = dict(urllib.parse.parse_qsl(
                    urllib.parse.urlsplit(address).query))
                self.assertEqual(answer['state'], 'a state')
                got = tokens.post(
                    '/token', client_id=CONFIDENTIAL, client_secret=SECRET,
                    grant_type='authorization_code', code=answer['code'],
                    code_verifier=proof, redirect_uri=back)
                self.assertEqual(got[0], status, got)

    def test_app(self):
        question = {'client_id': APP, 'scope': 'smtp.send',
                    'grant_type': 'client_credentials'}
        status, answer = tokens.post('/token', client_secret=SECRET,
                                     **question)
        self.assertEqual(status, 200)
        self.assertEqual(login('XOAUTH2', answer['access_token']), [235])
        status, answer = tokens.post(
            '/token', client_secret='a wrong secret', **question)
        self.assertEqual((status, answer['error']), (401, 'invalid_client'))

    def test_rotation_and_reuse(self):
        first = device_tokens()
        status, second = renew(first['refresh_token'])
        self.assertEqual(status, 200)
        self.assertNotEqual(first['refresh_token'], second['refresh_token'])
        self.assertEqual(login('XOAUTH2', second['access_token']), [235])
        self.assertEqual(renew(first['refresh_token'])[1]['error'],
                         'invalid_grant')
        self.assertIn('already used', tokens.requests()[-1]['why'])
        self.assertEqual(renew(second['refresh_token'])[0], 400)
        self.assertEqual(login('XOAUTH2', second['access_token']), [334, 535])

    def test_a_scope_that_was_not_granted_cannot_be_renewed(self):
        first = device_tokens('smtp.send')
        self.assertEqual(
            renew(first['refresh_token'],
                  scope='smtp.send offline_access')[1]['error'],
            'invalid_scope')
        self.assertEqual(renew(first['refresh_token'])[0], 200)

    def test_revocation_and_expiry(self):
        first = device_tokens()
        tokens.expire()
        self.assertEqual(login('XOAUTH2', first['access_token']), [334, 535])
        second = renew(first['refresh_token'])[1]
        self.assertEqual(login('XOAUTH2', second['access_token']), [235])
        tokens.revoke()
        self.assertEqual(login('XOAUTH2', second['access_token']), [334, 535])
        self.assertEqual(renew(second['refresh_token'])[1]['error'],
                         'invalid_grant')
        tokens.change(ttl=1)
        token = device_tokens()['access_token']
        wait_for(lambda: login('XOAUTH2', token)[-1] == 535, 10,
                 'the token does not run out')

    def test_every_login_at_dovecot(self):
        mine = device_tokens()['access_token']
        theirs = device_tokens(person=Person(OTHER))['access_token']
        no_scope = device_tokens('offline_access')['access_token']
        for mechanism in ('XOAUTH2', 'OAUTHBEARER'):
            for what, token, codes in (
                    ('good', mine, [235]), ('wrong', 'x', [334, 535]),
                    ('of another person', theirs, [334, 535]),
                    ('without the scope', no_scope, [334, 535])):
                with self.subTest(mechanism, token=what):
                    self.assertEqual(login(mechanism, token), codes)

    def test_a_long_token_needs_two_steps(self):
        tokens.change(bits=16000)
        token = device_tokens()['access_token']
        self.assertGreater(len(token), 2000)
        with dovecot() as smtp:
            code, text = smtp.docmd('AUTH', 'XOAUTH2 '
                                    + sasl('XOAUTH2', token))
            self.assertEqual((code, b'too long' in text), (500, True))
        for mechanism in ('XOAUTH2', 'OAUTHBEARER'):
            with dovecot() as smtp:
                self.assertEqual(smtp.docmd('AUTH', mechanism)[0], 334)
                self.assertEqual(smtp.docmd(sasl(mechanism, token))[0], 235)

    def test_a_mail_arrives_as_it_was(self):
        to = 'ground@elsewhere.test'
        mail = letter('ground', to)
        token = device_tokens()['access_token']
        with dovecot() as smtp:
            with self.assertRaises(smtplib.SMTPResponseException):
                smtp.sendmail(SENDER, to, b'x')
            smtp.docmd('AUTH', 'XOAUTH2 ' + sasl('XOAUTH2', token))
            smtp.sendmail(SENDER, to, mail.replace(b'\n', b'\r\n'))
        self.assertArrived(to, mail)


# --- The program signs in ----------------------------------------------------

@unittest.skipUnless(knows_login(), 'the program does not know --login yet')
class ProgramCase(Case):
    """Nothing that this program does may use a refresh token twice."""

    def tearDown(self):
        self.assertNoReuse()
        super().tearDown()

    def assertNotSignedIn(self, proxy):
        self.assertEqual(proxy.sign_ins(), [])
        self.assertIn('not signed in', proxy.says('--check'))

    def assertSignedIn(self, proxy, login, sender=SENDER):
        """The command has ended well, says so, and mail goes out."""
        self.assertEqual(login.end(), 0, login.output())
        self.assertIn(MAILBOX, login.output())
        [path] = proxy.sign_ins()
        self.assertEqual(path.stat().st_mode & 0o777, 0o600)
        self.assertEqual(path.parent.stat().st_mode & 0o777, 0o700)
        self.assertIn(path.name, login.output())
        self.assertIn('signed in since', proxy.says('--check'))
        self.assertThrough(proxy, 'signed in')


class SignIn(ProgramCase):
    def test_by_device_code(self):
        with Proxy({SENDER: account('device')}) as proxy:
            self.assertNotSignedIn(proxy)
            with proxy.run('--login', SENDER) as login:
                self.assertIn('Success', login.approve())
                self.assertSignedIn(proxy, login)
        self.assertEqual(self.requests(RENEWAL), [])

    def test_five_seconds_between_two_polls_if_nothing_is_said(self):
        tokens.change(interval=None)
        with Proxy({SENDER: account('device')}) as proxy:
            with proxy.run('--login', SENDER) as login:
                login.approve()
                self.assertSignedIn(proxy, login)
        polls = self.requests(DEVICE_CODE)
        self.assertGreater(len(polls), 0)
        for one, next_one in zip(polls, polls[1:]):
            self.assertGreater(next_one['arrived'] - one['answered'], 4.5)

    def test_a_person_who_refuses(self):
        with Proxy({SENDER: account('device')}) as proxy:
            with proxy.run('--login', SENDER) as login:
                login.approve(Person(consents=False))
                self.assertEqual(login.end(), 1)
            self.assertNotSignedIn(proxy)

    def test_by_browser(self):
        for client in (PUBLIC, CONFIDENTIAL):
            keys = account('browser', oauthclientid=client)
            if client == CONFIDENTIAL:
                keys['oauthclientsecret'] = SECRET
            with self.subTest(client), Proxy({SENDER: keys}) as proxy:
                with proxy.run('--login', SENDER) as login:
                    back = Person().sign_in(login.address())
                    Person().open(back)
                    self.assertSignedIn(proxy, login)

    def test_by_an_address_that_is_pasted(self):
        for only_code in (False, True):
            with self.subTest(only_code=only_code), Proxy(
                    {SENDER: account('browser')}) as proxy:
                with proxy.run('--login', SENDER) as login:
                    back = Person().sign_in(login.address())
                    if only_code:
                        back = re.search('code=[^&]+', back)[0]
                    login.type(back)
                    self.assertSignedIn(proxy, login)

    def test_visits_that_mean_nothing(self):
        with Proxy({SENDER: account('browser')}) as proxy:
            with proxy.run('--login', SENDER) as login:
                back = Person().sign_in(login.address())
                place, _, query = back.partition('?')
                for path in ('favicon.ico', '?' + query.replace(
                        'state=', 'state=x'), '?state=x'):
                    with contextlib.suppress(urllib.error.HTTPError):
                        Person().open(place + path)
                self.assertIsNone(login.process.poll())
                Person().open(back)
                self.assertSignedIn(proxy, login)

    def test_a_person_who_refuses_in_the_browser(self):
        with Proxy({SENDER: account('browser')}) as proxy:
            with proxy.run('--login', SENDER) as login:
                back = Person(consents=False).sign_in(login.address())
                self.assertIn('error=access_denied', back)
                Person().open(back)
                self.assertEqual(login.end(), 1)
            self.assertNotSignedIn(proxy)

    def test_an_app_signs_in_by_itself(self):
        with Proxy({SENDER: account('app')}) as proxy:
            self.assertThrough(proxy, 'app')
            self.assertThrough(proxy, 'app again')
            with proxy.run('--login', SENDER) as login:
                self.assertSignedIn(proxy, login)
        self.assertLessEqual(len(self.requests('client_credentials')), 2)

    def test_a_person_with_another_mailbox(self):
        with Proxy({SENDER: account('device')}) as proxy:
            with proxy.run('--login', SENDER) as login:
                login.approve(Person(OTHER))
                self.assertEqual(login.end(), 1)
                self.assertIn('535', login.output())
            proxy.sign_in()
            self.assertThrough(proxy, 'mended')

    def test_ctrl_c_leaves_the_old_sign_in(self):
        with Proxy({SENDER: account('device')}) as proxy:
            proxy.sign_in()
            [path] = proxy.sign_ins()
            before = path.read_bytes()
            with proxy.run('--login', SENDER) as login:
                login.shows(r'[A-Z]{4}-[A-Z]{4}')
                login.process.send_signal(signal.SIGINT)
                self.assertNotEqual(login.end(), 0)
            self.assertEqual(path.read_bytes(), before)
            self.assertThrough(proxy, 'as before')

    def test_without_a_running_service(self):
        proxy = Proxy({SENDER: account('device')})
        proxy.sign_in()
        with proxy:
            self.assertThrough(proxy, 'started later')

    def test_log_out(self):
        with Proxy({SENDER: account('device')}) as proxy:
            proxy.sign_in()
            for _ in range(2):
                with proxy.run('--logout', SENDER) as logout:
                    self.assertEqual(logout.end(), 0, logout.output())
            self.assertNotSignedIn(proxy)

    def test_a_scope_that_the_server_leaves_out(self):
        """OpenID Connect 11: offline_access without prompt=consent."""
        keys = account('browser', oauthscope='smtp.send offline_access')
        with Proxy({SENDER: keys}) as proxy:
            with proxy.run('--login', SENDER) as login:
                Person().open(Person().sign_in(login.address()))
                self.assertSignedIn(proxy, login)
            self.disconnected()
            tokens.expire()
            self.assertThrough(proxy, 'renewed')

    def test_with_certificates(self):
        https = 'https://localhost:%d' % servers.port['oidctls']
        cafile = servers.folder / 'tls/ca.pem'
        keys = account(
            'device', smtphost='localhost', smtpsecurity='tls',
            tlscafile=cafile, oauthtokenurl=https + '/token',
            oauthdeviceurl=https + '/device/auth')
        with Proxy({SENDER: keys}) as proxy:
            with proxy.run('--login', SENDER) as login:
                login.approve(Person(cafile=cafile))
                self.assertSignedIn(proxy, login)
            proxy.write({SENDER: dict(
                keys, tlscafile=servers.folder / 'tls/stranger.pem',
                tlsverify='false')})
            with proxy.run('--login', SENDER) as login:
                self.assertEqual(login.end(), 1)
                self.assertIn('certificate', login.output())


# --- The program sends -------------------------------------------------------

class Sending(ProgramCase):
    def test_both_mechanisms(self):
        """Dovecot wants the long token in a line of its own."""
        for mechanism, bits in (('auto', 16000), ('xoauth2', 256),
                                ('oauthbearer', 16000)):
            with self.subTest(mechanism, bits=bits):
                tokens.change(bits=bits)
                with Proxy({SENDER: account(
                        'device', smtpauth=mechanism)}) as proxy:
                    proxy.sign_in()
                    self.assertThrough(proxy, mechanism)

    def test_mail_waits_for_the_first_sign_in(self):
        to = 'first@elsewhere.test'
        mail = letter('first', to)
        with Proxy({SENDER: account('device')},
                   {'deleteonerror': 'true'}) as proxy:
            proxy.send(to, mail)
            proxy.logged('ERROR.*--login')
            self.assertEqual(len(proxy.waiting()), 1)
            proxy.sign_in()
            self.assertArrived(to, mail)

    def test_a_token_that_runs_out_is_renewed(self):
        tokens.change(ttl=MARGIN + 2)
        with Proxy({SENDER: account('device')}) as proxy:
            proxy.sign_in()
            self.assertThrough(proxy, 'fresh')
            self.assertEqual(self.requests(RENEWAL), [])
            for count in (1, 2):
                time.sleep(2.5)
                self.disconnected()
                self.assertThrough(proxy, 'renewed')
                self.assertRenewals(count)

    def test_a_token_is_kept_over_a_restart(self):
        with Proxy({SENDER: account('device')}) as proxy:
            proxy.sign_in()
            self.assertThrough(proxy, 'before')
            proxy.kill()
            proxy.start()
            self.assertThrough(proxy, 'after')
        self.assertEqual(self.requests(RENEWAL), [])

    def test_a_token_that_the_server_has_forgotten(self):
        with Proxy({SENDER: account('device')}) as proxy:
            proxy.sign_in()
            self.disconnected()
            tokens.expire()
            self.assertThrough(proxy, 'forgotten')
        self.assertRenewals(1)

    def test_a_sign_in_that_is_revoked(self):
        to = 'revoked@elsewhere.test'
        mail = letter('revoked', to)
        with Proxy({SENDER: account('device'),
                    OTHER: account('app')}) as proxy:
            proxy.sign_in()
            self.assertThrough(proxy, 'before')
            self.disconnected()
            tokens.revoke()
            proxy.send(to, mail)
            line = proxy.logged('ERROR.*--login')
            self.assertIn(SENDER, line)
            self.assertRenewals(1)
            proxy.send(to, mail)
            time.sleep(4)                           # sleeptime is 1
            self.assertRenewals(1, 'a storm')
            self.assertEqual(len(proxy.waiting()), 2)
            self.assertIn('--login', proxy.says('--check'))
            self.assertIn('--login', proxy.says('--queue'))

            other = letter('other', 'other@elsewhere.test')
            proxy.send('other@elsewhere.test', other, OTHER)
            self.assertArrived('other@elsewhere.test', other)

            proxy.sign_in()
            self.assertArrived(to, mail)
            self.assertArrived(to, mail)
            for command in (['--check'], ['--queue'], ['--queue', '--json']):
                proxy.says(*command)                # and no secret in it


class Together(ProgramCase):
    """At the moment when the token runs out."""
    MAILS = 20

    def send_at_once(self, proxy):
        """20 mails from 20 clients; return the recipients."""
        stamp = time.time_ns()
        to = ['%d.%d@elsewhere.test' % (number, stamp)
              for number in range(self.MAILS)]
        clients = [threading.Thread(
            target=proxy.send, name=address,
            args=(address, letter('together', address))) for address in to]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        return to

    def expired(self, proxy):
        """Sign in; come back when the token counts as run out."""
        tokens.change(ttl=MARGIN + 2)
        proxy.sign_in()
        time.sleep(2.5)
        tokens.change(ttl=3600, before=700)

    def assertAllArrive(self, to):
        wait_for(lambda: set(to) <= set(servers.recipients()), 60,
                 'not all have arrived')

    def test_mails_and_a_test(self):
        with Proxy({SENDER: account('device')}) as proxy:
            self.expired(proxy)
            with proxy.run('--test', SENDER) as test:
                to = self.send_at_once(proxy)
                self.assertEqual(test.end(), 0, test.output())
            self.assertAllArrive(to)
        self.assertRenewals(1)

    def test_mails_and_a_login(self):
        with Proxy({SENDER: account('device')}) as proxy:
            self.expired(proxy)
            with proxy.run('--login', SENDER) as login:
                login.approve()
                to = self.send_at_once(proxy)
                self.assertEqual(login.end(), 0, login.output())
            self.assertAllArrive(to)
        self.assertLessEqual(len(self.requests(RENEWAL)), 1)

    def test_several_processes(self):
        with Proxy({SENDER: account('device')}) as proxy:
            self.expired(proxy)
            with contextlib.ExitStack() as stack:
                tests = [stack.enter_context(proxy.run('--test', SENDER))
                         for _ in range(4)]
                for test in tests:
                    self.assertEqual(test.end(), 0, test.output())
        self.assertRenewals(1)


# --- Kills -------------------------------------------------------------------

class Kills(ProgramCase):
    """kill -9 while tokens are renewed for each connection."""

    def tearDown(self):
        Case.tearDown(self)     # in the kill's window a token may come twice

    def test_between_the_answer_and_the_disk(self):
        """The window, held open: it costs the sign-in, but no mail."""
        to = 'window@elsewhere.test'
        mail = letter('window', to)
        tokens.change(ttl=5)
        with Proxy({SENDER: account('device')}) as proxy:
            proxy.sign_in()
            before = len(self.requests(RENEWAL))
            tokens.change(after=2000)
            proxy.send(to, mail)
            wait_for(lambda: len(self.requests(RENEWAL)) > before, 10,
                     'no renewal')
            proxy.kill()
            tokens.change(after=0)
            proxy.start()
            proxy.logged('ERROR.*--login')
            proxy.sign_in()
            self.assertArrived(to, mail)

    def test_at_random_moments(self):
        tokens.change(ttl=5)    # less than the margin: good for one login
        self.promised, self.over = [], threading.Event()
        self.died, self.mended = [], 0
        chance = random.Random(kills)
        proxy = Proxy({SENDER: account('device')})
        clients = [threading.Thread(target=self.send, args=(proxy, name),
                                    name=name) for name in ('one', 'two')]
        with proxy:
            proxy.sign_in()
            for client in clients:
                client.start()
            try:
                for _ in range(kills):
                    time.sleep(chance.uniform(0, 0.5))
                    self.died.append(proxy.kill())
                    proxy.start()
                    self.mend(proxy)
            finally:
                self.over.set()
                for client in clients:
                    client.join()
            self.assertNoMailLost(proxy)
        self.assertLostInTheWindowOnly()

    def send(self, proxy, name):
        """A client's life; self.promised: the recipients answered 250."""
        for number in itertools.count():
            if self.over.wait(0.1):
                return
            to = 'kill.%s.%d@elsewhere.test' % (name, number)
            with contextlib.suppress(OSError, smtplib.SMTPException):
                proxy.send(to, b'Subject: kill\n\nx\n')
                self.promised.append(to)

    def refused(self):
        return [request for request in self.requests(RENEWAL)
                if request.get('error')]

    def mend(self, proxy):
        """Sign in again if that was lost."""
        if len(self.refused()) > self.mended:
            proxy.sign_in()
            self.mended = len(self.refused())

    def assertNoMailLost(self, proxy):
        def all_there():
            self.mend(proxy)
            return set(self.promised) <= set(servers.recipients())
        try:
            wait_for(all_there, 60, 'mail is missing')
        except TimeoutError:
            missing = set(self.promised) - set(servers.recipients())
            self.fail('%d of %d mails are missing: %s' % (
                len(missing), len(self.promised), sorted(missing)[:9]))

    def assertLostInTheWindowOnly(self):
        """Each refused renewal presents a token that was used before, by
        who was killed between the server's answer and the disk."""
        requests = self.requests(RENEWAL)
        used = {request['presented']: request for request in requests
                if not request.get('error')}
        gaps = []
        for lost in self.refused():
            first = used.get(lost['presented'])
            self.assertIsNotNone(first, 'refused, and no reuse: %s' % lost)
            self.assertNotIn(first['issued'], used, 'its answer was stored')
            answered = first.get('answered', first['arrived'])
            gap = min((when - answered for when in self.died), key=abs)
            self.assertLess(abs(gap), GAP, 'reused, no kill: %s' % lost)
            gaps.append(gap)
        print('kills: %d, mails %d, none lost; %d renewals, %d sign-ins lost '
              'in the window (seconds after the answer: %s)' % (
                  kills, len(self.promised), len(requests), len(gaps),
                  ' '.join('%.3f' % gap for gap in sorted(gaps)) or '-'))


# --- All of it ---------------------------------------------------------------

def main():
    global servers, tokens, kills
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument('--kills', type=int, default=kills)
    options, rest = parser.parse_known_args()
    kills = options.kills

    def ended(*_):
        servers.stop()
        os._exit(1)     # unittest takes an exception for one more failed test

    with tempfile.TemporaryDirectory(prefix='oauth.') as folder:
        servers = real.servers = TokenServers(folder)
        signal.signal(signal.SIGTERM, ended)
        servers.start()
        tokens = servers.tokens
        try:
            with Witness() as witness:
                result = unittest.main(argv=[sys.argv[0], *rest],
                                       exit=False).result
            arguments = b'\n'.join(witness.seen).decode('latin-1')
            seen = betrayed(arguments)
        finally:
            servers.stop()
    if seen:
        print('%d secrets in the arguments of processes' % len(seen))
    sys.exit(not result.wasSuccessful() or bool(seen))


if __name__ == '__main__':
    main()
