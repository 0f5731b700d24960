"""Remote ends for the tests, independent of smtps.py and smtpproxy.py, so
that a shared misreading of an RFC shows: FakeSMTP and FakePOP to deliver to,
a FakeTokenServer to sign in at by OAuth2 and a FakeProxy on the way to it, a
Client to send with, a Clock, TLS for localhost, and wait_until.

FakeSMTP and FakePOP follow a script, a dict: how a command begins, in any
case (the longest that fits counts) -> the reply. '' is the greeting, '.' the
end of a mail, 'PASSWORD' the verdict on an SMTP login. What it does not name
gets the usual reply of a strict server. A reply is

    str         of one or several lines; '' says nothing
    bytes       sent as they are
    None        the usual reply
    a list      one reply after another; the last one repeats
    callable    called with the Conversation, returns one of str, bytes, None
                or a callable: DROP, HANG, RESET, ENDLESS_LINE, dribble()...

Only a positive reply changes the state, a 421 ends the conversation, and a
command in the wrong place is refused without a look at the script.
"""
import base64
import collections
import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import select
import socket
import ssl
import struct
import threading
import time
import types
import urllib.parse
import warnings

CERTIFICATE = os.path.join(os.path.dirname(__file__), 'localhost.pem')
EXTENSIONS = ('PIPELINING', '8BITMIME', 'SIZE 100000000', 'SMTPUTF8',
              'ENHANCEDSTATUSCODES')
PARAMETERS = {'SIZE': 'SIZE', 'BODY': '8BITMIME', 'SMTPUTF8': 'SMTPUTF8',
              'AUTH': 'AUTH'}           # and the extension that allows each
FAULTS = {'bare LF': rb'(?<!\r)\n', 'bare CR': rb'\r(?!\n)',
          'dot not doubled': rb'(?:\A|\r\n)\.(?!\.)'}   # of a mail


class Refused(Exception):
    """A command gets this reply."""


def demand(condition, refusal):
    """Refuses the command unless condition holds."""
    if not condition:
        raise Refused(refusal)


def server_tls(old=False):
    """A context for a server on localhost; old: it speaks TLS 1.0 only."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    if old:
        context.set_ciphers('DEFAULT:@SECLEVEL=0')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', DeprecationWarning)
            context.minimum_version = ssl.TLSVersion.TLSv1
            context.maximum_version = ssl.TLSVersion.TLSv1
    return context


def client_tls():
    """A context for a client that trusts server_tls()."""
    return ssl.create_default_context(cafile=CERTIFICATE)


def wait_until(condition, seconds=5):
    """Returns condition() once it is true, fails if that takes too long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        result = condition()
        if result:
            return result
        time.sleep(0.002)
    raise AssertionError('still not true after %s s' % seconds)


class Clock:
    """A monotonic time that only a test moves; slept: list of seconds."""

    def __init__(self, now=1000.0):
        self.now, self.slept = now, []

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.advance(seconds)


class Wire(contextlib.AbstractContextManager):
    """One end of a connection."""

    def __init__(self, connected):
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self.file = connected, connected.makefile('rb')

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.file.close()
        self.socket.close()

    def read_line(self):
        """The next line (bytes), or ConnectionError if there is none."""
        line = self.file.readline()
        if not line.endswith(b'\n'):
            raise ConnectionError('closed by the other end')
        return line

    def secure(self, context, server_side=False):
        """Begins TLS; what was read ahead in clear is thrown away."""
        self.file.close()
        try:
            self.socket = context.wrap_socket(
                self.socket, server_side, do_handshake_on_connect=False,
                server_hostname=None if server_side else 'localhost')
            self.socket.do_handshake()
        except OSError:
            self.close()
            raise
        self.file = self.socket.makefile('rb')


# --- Replies and actions ----------------------------------------------------

GARBAGE = b'\x00\xff\xfe\x80\x16\x03\x01 \xe2\x82\r\n'


def DROP(conversation):
    """Closes without a word."""
    raise ConnectionError('dropped')


def HANG(conversation):
    """Says nothing until either end closes."""
    while conversation.file.read1(65536):
        pass
    raise ConnectionError('hung up')


def RESET(conversation):
    """Closes with a TCP reset."""
    conversation.socket.setsockopt(
        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    raise ConnectionError('reset')


def ENDLESS_LINE(conversation, block=b'2' * 65536):
    """A reply without a line end, for as long as the client takes it."""
    while True:
        conversation.socket.sendall(block)


def ENDLESS_REPLY(conversation):
    """A reply without a last line, for as long as the client takes it."""
    ENDLESS_LINE(conversation, b'250-and so on\r\n' * 4096)


def dribble(reply, seconds):
    """An action: from this reply on, so many seconds for each byte."""
    def action(conversation):
        conversation.pace = seconds
        return reply
    return action


def octets(reply):
    """A reply as it is sent."""
    return reply if isinstance(reply, bytes) else ''.join(
        line + '\r\n' for line in reply.splitlines()).encode()


def positive(reply):
    """Whether a reply says yes."""
    return octets(reply)[:1] in (b'2', b'3', b'+')


# --- The servers ------------------------------------------------------------

class Command(str):
    """A command line with .connection (its number) and .time."""


class Conversation(Wire):
    """A server's side of one connection, in a thread of its own. line: the
    command that is being answered, or CONNECT, or a name in the script."""

    def __init__(self, server, connected, number):
        super().__init__(connected)
        self.server, self.number, self.line = server, number, 'CONNECT'
        self.user, self.tls, self.pace = None, None, 0

    def run(self):
        """All of it; a lost connection ends it quietly."""
        try:
            if self.server.implicit:
                self.begin_tls()
            if self.says(self.USUAL['CONNECT']):
                while True:
                    self.answer()
        except OSError:
            pass
        finally:
            self.close()
            self.server.talking.remove(self)

    def begin_tls(self):
        self.secure(self.server.tls, server_side=True)
        self.tls = self.socket.version()

    def answer(self):
        """Reads one command and answers it."""
        self.line = self.read_text()
        command = Command(self.line)
        command.connection, command.time = self.number, self.server.clock()
        self.server.record('commands', command)
        verb, _, argument = self.line.partition(' ')
        try:
            getattr(self, 'do_' + verb.upper(), self.simple)(argument)
        except Refused as refused:
            self.say(str(refused))
        except ValueError:
            self.say('501 5.5.2 not understood')

    def read_text(self):
        """The next line (str) without its end."""
        line = self.read_line()
        if not line.endswith(b'\r\n'):
            self.server.record('violations', 'bare LF: %r' % line)
        return line.decode('utf-8', 'surrogateescape').rstrip('\r\n')

    def choose(self, usual):
        """The script's reply to self.line, or else the usual one."""
        reply = self.server.scripted(self.line)
        while callable(reply):
            reply = reply(self)
        return usual if reply is None else reply

    def says(self, usual):
        return self.say(self.choose(usual))

    def say(self, reply):
        """Sends a reply; returns whether it is a positive one."""
        data = octets(reply)
        self.pause(self.server.delay)
        step = 1 if self.pace else len(data) or 1
        for start in range(0, len(data), step):
            self.pause(self.pace)
            self.socket.sendall(data[start:start + step])
        if data.startswith(b'421'):
            raise ConnectionError('421')
        return positive(reply)

    def pause(self, seconds):
        """Sleeps, but not longer than the server lives."""
        if self.server.closing.wait(seconds):
            raise ConnectionError('the server closes')

    def simple(self, _):
        """A command that changes nothing."""
        verb = self.line.upper().partition(' ')[0]
        self.says(self.USUAL.get(verb, self.USUAL['?']))

    def do_QUIT(self, _):
        self.simple(_)
        raise ConnectionError('QUIT')

    def verdict(self, user, right):
        """Ends a login; the record comes before the reply."""
        reply = self.choose(self.USUAL['right' if right else 'wrong'])
        if positive(reply):
            self.user = user
            self.server.record('logins', (user, self.server.clock()))
        self.say(reply)

    def knows(self, user, password):
        users = self.server.users
        return users is None or users.get(user) == password


class Fake(contextlib.AbstractContextManager):
    """A server at .address = (.host, .port); runs until close().

    script: the dict, may be changed at any time; users: dict of passwords,
    None lets anybody in; tls: an ssl.SSLContext; implicit: TLS from the
    first byte; delay: seconds before each reply; clock: for the records.

    Records: commands (of Command), logins (of (user, time)), violations (of
    str), connections (how many there were), open (how many there are)."""

    def __init__(self, script=None, users=None, tls=None, implicit=False,
                 delay=0, host='127.0.0.1', port=0, clock=time.monotonic):
        self.script = {} if script is None else script
        self.users, self.tls, self.implicit = users, tls, implicit
        self.delay, self.clock, self.connections = delay, clock, 0
        self.commands, self.logins, self.violations = [], [], []
        self.changed = threading.Condition()    # guards all that is recorded
        self.closing, self.used = threading.Event(), collections.Counter()
        self.talking, self.threads = [], []
        self.listener = socket.create_server(
            (host, port), family=socket.AF_INET6 if ':' in host
            else socket.AF_INET)
        self.address = self.host, self.port = self.listener.getsockname()[:2]
        self.begin(self.listen, 'listener')

    def __exit__(self, *_):
        self.close()

    def begin(self, target, name):
        """Starts a thread that close() will join."""
        self.threads.append(threading.Thread(
            target=target, daemon=True,
            name='%s-%d-%s' % (type(self).__name__, self.port, name)))
        self.threads[-1].start()

    def listen(self):
        """Accepts until close() makes the last connection."""
        while True:
            connected, _ = self.listener.accept()
            if self.closing.is_set():
                return connected.close()
            self.connections += 1
            talk = self.TALK(self, connected, self.connections)
            self.talking.append(talk)
            self.begin(talk.run, self.connections)

    def close(self):
        """Ends all conversations and threads; may be called twice."""
        if not self.closing.is_set():
            self.closing.set()
            socket.create_connection(self.address).close()
            with self.listener:
                wait_until(self.hung_up)

    def hung_up(self):
        """Shuts what is open; returns whether all threads have ended."""
        for talk in list(self.talking):
            with contextlib.suppress(OSError):
                # Not SSLSocket's own: that one would go on in clear.
                socket.socket.shutdown(talk.socket, socket.SHUT_RDWR)
        return not any(thread.is_alive() for thread in self.threads)

    @property
    def open(self):
        return len(self.talking)

    def record(self, kind, item):
        with self.changed:
            getattr(self, kind).append(item)
            self.changed.notify_all()

    def wait(self, count=1, seconds=5):
        """Returns the mails (POP: logins) once there are so many."""
        found = getattr(self, self.AWAITED)
        with self.changed:
            if not self.changed.wait_for(lambda: len(found) >= count, seconds):
                raise AssertionError('%d of %d %s in %s s, commands: %s' % (
                    len(found), count, self.AWAITED, seconds, self.commands))
        return found

    def scripted(self, line):
        """What the script says to a command, or None."""
        keys = [key for key in list(self.script)
                if line.upper().startswith(key.upper() or 'CONNECT')]
        key = max(keys, key=len, default=None)
        reply = self.script.get(key)
        if isinstance(reply, list):
            with self.changed:
                self.used[key] += 1
                reply = reply[min(self.used[key], len(reply)) - 1]
        return reply


# --- SMTP -------------------------------------------------------------------

class Mail(types.SimpleNamespace):
    """sender, to (list), parameters (dict), data (bytes, dots undoubled), raw
    (as on the wire, up to the final dot), user, hello, tls (version or None),
    connection (number)."""


class SMTPConversation(Conversation):
    """RFC 5321, strictly and in order."""
    USUAL = {'CONNECT': '220 fake ESMTP', 'QUIT': '221 2.0.0 bye',
             'NOOP': '250 2.0.0 ok', 'VRFY': '252 2.0.0 perhaps',
             'HELP': '214 2.0.0 no', '?': '500 5.5.1 what?',
             'right': '235 2.7.0 welcome', 'wrong': '535 5.7.8 wrong'}
    hello, mail, offered = None, None, ()

    def do_EHLO(self, name):
        server, lines = self.server, list(self.server.extensions)
        if server.tls and not self.tls:
            lines.append('STARTTLS')
        if server.mechanisms:
            lines.append('AUTH ' + ' '.join(server.mechanisms))
        self.do_HELO(name, lines)

    def do_HELO(self, name, extensions=()):
        demand(name, '501 5.5.4 and your name?')
        *lines, last = ['fake', *extensions]
        if self.says(''.join('250-%s\n' % x for x in lines) + '250 ' + last):
            self.hello, self.mail = name, None
            self.offered = [line.split()[0] for line in extensions]

    def do_RSET(self, _):
        if self.says('250 2.0.0 ok'):
            self.mail = None

    def do_STARTTLS(self, argument):
        demand('STARTTLS' in self.offered, '503 5.5.1 not now')
        demand(not argument, '501 5.5.4 no more words')
        if self.says('220 2.0.0 go ahead'):
            self.begin_tls()
            self.hello = self.mail = self.user = None
            self.offered = ()

    def do_AUTH(self, argument):
        demand(len(self.line) <= 510, '500 5.5.2 line too long')
        mechanism = argument.upper().partition(' ')[0]
        demand('AUTH' in self.offered, '503 5.5.1 not offered')
        demand(self.user is None and not self.mail, '503 5.5.1 not now')
        demand(mechanism in self.server.mechanisms, '504 5.5.4 what?')
        reply = self.choose(None)
        if reply is not None:
            self.user = '' if self.say(reply) else None
            return
        method = getattr(self, 'auth_' + mechanism.replace('-', '_'))
        user, right = method(argument[len(mechanism) + 1:])
        self.line = 'PASSWORD'
        self.verdict(user, right)

    def ask(self, challenge, initial=''):
        """The answer to a challenge (str), unless it came already; raises
        ValueError for '*' and whatever else is not base64."""
        if not initial:
            self.say('334 ' + base64.b64encode(challenge.encode()).decode())
            initial = self.read_text()
        initial = '' if initial == '=' else initial
        return base64.b64decode(initial, validate=True).decode()

    def auth_PLAIN(self, initial):
        _, user, password = self.ask('', initial).split('\0')
        return user, self.knows(user, password)

    def auth_LOGIN(self, initial):
        user, password = self.ask('Username:', initial), self.ask('Password:')
        return user, self.knows(user, password)

    def auth_CRAM_MD5(self, _):
        challenge, users = '<1.%d@fake>' % self.number, self.server.users
        user, _, digest = self.ask(challenge).rpartition(' ')
        key = (users or {}).get(user, '').encode()
        right = hmac.new(key, challenge.encode(), 'md5').hexdigest()
        return user, users is None or user in users and digest == right

    def auth_XOAUTH2(self, initial):
        match = re.fullmatch('user=([^\1]*)\1auth=Bearer ([!-~]+)\1\1',
                             self.ask('', initial))
        return self.bearer(match, '', {'status': '401', 'schemes': 'bearer'})

    def auth_OAUTHBEARER(self, initial):
        match = re.fullmatch(
            'n,a=([^\1]*),\1host=[^\1]+\1port=[0-9]+\1auth=Bearer ([!-~]+)'
            '\1\1', self.ask('', initial))
        return self.bearer(match, 'AQ==', {'status': 'invalid_token'})

    def bearer(self, match, apology, details):
        """Whether a token is right; what is not right gets a challenge, and
        has to say this apology."""
        demand(match, '501 5.5.2 not understood')
        user = match.group(1).replace('=2C', ',').replace('=3D', '=')
        right = self.knows(user, match.group(2))
        if not right:
            self.say('334 ' + base64.b64encode(
                json.dumps(details).encode()).decode())
            said = self.read_text()
            if said != apology:
                self.server.record('violations', '%r for %r to a challenge'
                                   % (said, apology))
        return user, right

    def path(self, keyword, argument):
        """The address and the parameters behind MAIL or RCPT."""
        match = re.fullmatch(
            r'(?i)%s:<((?:"(?:[^"\\]|\\.)*"|[^>"])*)>((?: [^ ]+)*)' % keyword,
            argument)
        demand(match, '501 5.5.2 %s:<address>' % keyword)
        words = [word.partition('=') for word in match.group(2).split()]
        parameters = {key.upper(): value for key, _, value in words}
        for key in parameters:
            demand(PARAMETERS.get(key) in self.offered, '555 5.5.4 ' + key)
        return match.group(1), parameters

    def do_MAIL(self, argument):
        demand(self.hello and not self.mail, '503 5.5.1 not now')
        demand(self.user is not None or not self.server.require_auth,
               '530 5.7.0 AUTH first')
        sender, parameters = self.path('FROM', argument)
        if self.says('250 2.1.0 ok'):
            self.mail = Mail(
                sender=sender, to=[], parameters=parameters, hello=self.hello,
                user=self.user, tls=self.tls, connection=self.number)

    def do_RCPT(self, argument):
        demand(self.mail, '503 5.5.1 MAIL first')
        recipient, _ = self.path('TO', argument)
        if self.says('250 2.1.5 ok'):
            self.mail.to.append(recipient)

    def do_DATA(self, argument):
        demand(self.mail and self.mail.to, '503 5.5.1 RCPT first')
        demand(not argument, '501 5.5.4 no more words')
        if self.says('354 end it with a dot'):
            mail, self.mail = self.mail, None
            mail.raw = self.read_data()
            mail.data = (b'\r\n' + mail.raw).replace(b'\r\n.', b'\r\n')[2:]
            self.line = '.'
            reply = self.choose('250 2.0.0 taken')
            if positive(reply):
                self.server.record('mails', mail)
            self.say(reply)

    def read_data(self):
        """The bytes of a mail up to CRLF.CRLF, whatever is in between."""
        lines = [b'\r\n']
        while lines[-1] != b'.\r\n' or not lines[-2].endswith(b'\r\n'):
            lines.append(self.read_line())
        raw = b''.join(lines[1:-1])
        for fault in FAULTS:
            if re.search(FAULTS[fault], raw):
                self.server.record('violations', fault + ' in a mail')
        return raw


class FakeSMTP(Fake):
    """An SMTP server that also records mails: those it answered 250 (Mail).

    extensions and mechanisms: what it offers; PLAIN, LOGIN, CRAM-MD5, XOAUTH2
    and OAUTHBEARER work (users: {user: password or access token}), others
    need a script. require_auth: 530 at MAIL without a login."""
    TALK, AWAITED = SMTPConversation, 'mails'

    def __init__(self, script=None, extensions=EXTENSIONS,
                 mechanisms=('PLAIN', 'LOGIN'), require_auth=False, **options):
        self.mails, self.extensions = [], extensions
        self.mechanisms, self.require_auth = mechanisms, require_auth
        super().__init__(script, **options)


# --- POP3 -------------------------------------------------------------------

class POPConversation(Conversation):
    """RFC 1939 with an empty maildrop."""
    USUAL = {'CONNECT': '+OK fake', 'QUIT': '+OK bye', 'NOOP': '+OK',
             '?': '-ERR what?',
             'right': '+OK welcome', 'wrong': '-ERR [AUTH] wrong'}
    name = None

    def do_CAPA(self, _):
        offered = self.server.tls and not self.tls
        self.says('+OK\nUSER\n%s.' % ('STLS\n' if offered else ''))

    def do_STLS(self, _):
        demand(self.server.tls and not self.tls, '-ERR not now')
        if self.says('+OK go ahead'):
            self.begin_tls()

    def do_USER(self, name):
        demand(name and self.user is None, '-ERR not now')
        if self.says('+OK'):
            self.name = name

    def do_PASS(self, password):
        demand(self.name and self.user is None, '-ERR not now')
        self.verdict(self.name, self.knows(self.name, password))

    def do_STAT(self, _):
        demand(self.user, '-ERR not now')
        self.says('+OK 0 0')


class FakePOP(Fake):
    """A POP3 server; with tls from the first byte, unless implicit=False: then
    by STLS."""
    TALK, AWAITED = POPConversation, 'logins'

    def __init__(self, script=None, users=None, tls=None, implicit=True,
                 **options):
        super().__init__(script, users, tls, implicit=bool(tls and implicit),
                         **options)


# --- OAuth2 -----------------------------------------------------------------

GRANTS = {'refresh_token': 'refresh', 'authorization_code': 'code',
          'client_credentials': 'app',
          'urn:ietf:params:oauth:grant-type:device_code': 'poll'}


class Request(types.SimpleNamespace):
    """what (a key of the script), path, form (dict), headers (dict, names in
    lower case), time."""


def http(status, body, more=''):
    """A whole answer; body: bytes, or what becomes JSON."""
    kind = 'text/html'
    if not isinstance(body, bytes):
        body, kind = json.dumps(body).encode(), 'application/json'
    return ('HTTP/1.1 %d x\r\nContent-Type: %s\r\nContent-Length: %d\r\n'
            '%s\r\n' % (status, kind, len(body), more)).encode() + body


class TokenConversation(Conversation):
    """One request and its answer."""

    def run(self):
        try:
            if self.server.implicit:
                self.begin_tls()
            request = self.read_request()
            self.line = request.what
            self.server.record('requests', request)
            reply = self.choose(None)
            if reply is None:
                reply = self.server.usual(request)
            self.say(self.octets(reply))
        except OSError:
            pass
        finally:
            self.close()
            self.server.talking.remove(self)

    def read_request(self):
        method, target, _ = self.read_text().split(' ')
        headers = {}
        for line in iter(self.read_text, ''):
            name, _, value = line.partition(':')
            headers[name.lower()] = value.strip()
        body = self.file.read(int(headers.get('content-length', 0)))
        form = dict(urllib.parse.parse_qsl(body.decode(), True))
        if method != 'POST' or headers.get('content-type') != (
                'application/x-www-form-urlencoded'):
            self.server.record('violations', '%s %s' % (method, headers))
        what = 'start' if target == '/device' else GRANTS.get(
            form.get('grant_type'), '?')
        return Request(what=what, path=target, form=form, headers=headers,
                       time=self.server.clock())

    @staticmethod
    def octets(reply):
        if isinstance(reply, bytes):
            return reply
        if isinstance(reply, int):
            return http(reply, b'<html>%d</html>' % reply)
        if isinstance(reply, str):
            error, _, words = reply.partition(' ')
            return http(401 if error == 'invalid_client' else 400, {
                'error': error, 'error_description': words})
        return http(200, reply)


USER = 'me@example.org'     # the only one it knows


class FakeTokenServer(Fake):
    """An OAuth2 authorization server for one user: /device and /token, plain
    HTTP unless implicit. It rotates refresh tokens, and who shows an old one
    loses the grant (reused counts that).

    The script's keys: start (device authorization), poll, code, refresh, app.
    Its replies: a str is an error with its description behind a blank, an int
    a page with that status, a dict JSON, bytes a whole answer; see http().

    clients: {id: secret or ''}; expires: seconds of an access token; rotate:
    False sends no new refresh token; size: octets more in an access token.
    Records: requests (of Request), issued (of access tokens), valid ({USER:
    the newest of them}, for a FakeSMTP's users)."""
    TALK, AWAITED = TokenConversation, 'requests'

    def __init__(self, script=None, clients=None, expires=3600, rotate=True,
                 **options):
        self.clients = {'id': ''} if clients is None else clients
        self.expires, self.rotate, self.size = expires, rotate, 0
        self.valid, self.issued = {}, []
        self.requests, self.count, self.reused = [], 0, 0
        self.live, self.spent, self.codes = set(), set(), {}
        super().__init__(script, **options)

    def url(self, path):
        return '%s://%s:%d%s' % ('https' if self.implicit else 'http',
                                 'localhost' if self.implicit else self.host,
                                 self.port, path)

    def asked(self, what):
        """The requests of a kind."""
        return [r for r in self.requests if r.what == what]

    def usual(self, request):
        form = request.form
        secret = self.clients.get(form.get('client_id'))
        if secret is None or form.get('client_secret', '') != secret:
            return 'invalid_client'
        with self.changed:
            return getattr(self, 'do_' + request.what, self.do_unknown)(form)

    def do_unknown(self, _):
        return 'unsupported_grant_type'

    def do_start(self, _):
        return {'device_code': 'device-code-1', 'user_code': 'ABCD-EFGH',
                'verification_uri': self.url('/verify'), 'expires_in': 900}

    def do_poll(self, form):
        return self.issue() if form.get('device_code') == 'device-code-1' \
            else 'invalid_grant'

    def do_app(self, form):
        return self.issue(False) if form.get('client_secret') \
            else 'unauthorized_client'

    def do_refresh(self, form):
        token = form.get('refresh_token')
        if token in self.spent:
            self.reused += 1
            self.live.clear()
        if token not in self.live or not form.get('scope'):
            return 'invalid_grant no such token'
        if self.rotate:
            self.live.discard(token)
            self.spent.add(token)
        return self.issue(self.rotate)

    def do_code(self, form):
        challenge, redirect = self.codes.pop(form.get('code'), ('', ''))
        digest = hashlib.sha256(form.get('code_verifier', '').encode())
        right = base64.urlsafe_b64encode(digest.digest()).rstrip(b'=')
        if challenge != right.decode() or redirect != form['redirect_uri']:
            return 'invalid_grant'
        return self.issue()

    def issue(self, refresh=True):
        """New tokens."""
        self.count += 1
        token = 'access-%d' % self.count + secrets.token_urlsafe(
            self.size)[:self.size]
        self.valid[USER] = token
        self.issued.append(token)
        answer = {'access_token': token, 'token_type': 'Bearer',
                  'expires_in': self.expires}
        if refresh:
            answer['refresh_token'] = 'refresh-%d' % self.count
            self.live.add(answer['refresh_token'])
        return answer

    def consent(self, address, **instead):
        """What the browser is sent to once the user has said yes at the
        authorization address; instead: other parameters for it."""
        query = dict(urllib.parse.parse_qsl(
            urllib.parse.urlsplit(address).query))
        code = 'code-%d' % (len(self.codes) + 1)
        if query['code_challenge_method'] == 'S256':
            self.codes[code] = query['code_challenge'], query['redirect_uri']
        found = dict({'code': code, 'state': query['state']}, **instead)
        return query['redirect_uri'] + '?' + urllib.parse.urlencode(found)


class ProxyConversation(Conversation):
    """CONNECT, and then whatever comes, both ways."""

    def run(self):
        try:
            self.server.record('commands', self.read_text())
            headers = list(iter(self.read_text, ''))
            self.server.record('logins', [h for h in headers if 'asic' in h])
            with socket.create_connection(self.server.target, 10) as far:
                self.socket.sendall(b'HTTP/1.1 200 ok\r\n\r\n')
                self.copy(far)
        except OSError:
            pass
        finally:
            self.close()
            self.server.talking.remove(self)

    def copy(self, far):
        while True:
            for end in select.select([self.socket, far], [], [], 10)[0]:
                data = end.recv(65536)
                if not data:
                    return
                (far if end is self.socket else self.socket).sendall(data)


class FakeProxy(Fake):
    """An HTTP proxy that leads to target, wherever it is asked to."""
    TALK, AWAITED = ProxyConversation, 'commands'

    def __init__(self, target):
        self.target = target
        super().__init__()


# --- Client -----------------------------------------------------------------

class Client(Wire):
    """An SMTP client that says exactly what it is told; it waits 10 s.

    dialogue: what was said so far, a list of 'C: ...' and 'S: ...'."""

    def __init__(self, address, tls=None):
        super().__init__(socket.create_connection(address, 10))
        self.dialogue = []
        if tls:
            self.secure(tls)

    def send(self, line):
        """Sends a str with CRLF, or bytes as they are."""
        data = line if isinstance(line, bytes) else line.encode() + b'\r\n'
        self.dialogue.append('C: %s' % (
            line if isinstance(line, str) else repr(line[:60])))
        self.socket.sendall(data)

    def reply(self):
        """The next reply: its code (int), the texts of its lines (list)."""
        texts, more = [], '-'
        while more == '-':
            line = self.read_line().decode()
            self.dialogue.append('S: ' + line[:-2])
            code, more = int(line[:3]), line[3:4]
            texts.append(line[4:-2])
            if not line.endswith('\r\n'):
                raise ValueError('bare LF: %r' % line)
        return code, texts

    def command(self, line):
        """Sends a line; the reply as code (int) and text (str)."""
        self.send(line)
        code, texts = self.reply()
        return code, '\n'.join(texts)

    def data(self, content):
        """DATA and a mail (bytes, its dots get doubled): the last reply."""
        answer = self.command('DATA')
        if answer[0] != 354:
            return answer
        if content and not content.endswith(b'\r\n'):
            content += b'\r\n'
        content = (b'\r\n' + content).replace(b'\r\n.', b'\r\n..')[2:]
        return self.command(content + b'.\r\n')

    def read_until_closed(self):
        """What still comes until the other end closes (bytes)."""
        return self.file.read()

    def converse(self, transcript):
        """Follows lines 'C: what to send' and 'S: how the reply begins' (its
        last line), or 'S: closed'; fails with the dialogue."""
        for line in transcript.splitlines():
            side, _, text = line.strip().partition(':')
            if side == 'C':
                self.send(text[1:])
            elif side:
                self.expect(text.strip())

    def expect(self, beginning):
        """Reads a reply, fails unless its last line begins so."""
        try:
            self.reply()
        except (OSError, ValueError) as error:
            closed = isinstance(error, ConnectionError)
            self.dialogue.append('S: closed' if closed else 'S? %s' % error)
        if not self.dialogue[-1].startswith('S: ' + beginning):
            raise AssertionError('expected S: %s\n%s' % (
                beginning, '\n'.join(self.dialogue)))
