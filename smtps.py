#!/usr/bin/env python3
r"""SMTP (RFC 5321) as a library, both ends: a threaded listener that takes
mail, and a client that delivers it. It knows nothing of proxying, accounts,
ini files or spools.

To take mail, derive from Session:

    server = smtps.Server(MySession)
    server.listen('', 2525)
    server.start()                      # returns at once
    ...
    server.stop()

To deliver mail:

    delivery = smtps.Delivery('mail.example.org', 25, 'box.example.org')
    delivery.hello()
    envelope = smtps.Envelope('me@example.org', ['you@example.org'])
    report = delivery.send(
        envelope, b'Subject: hello\r\n', smtps.stuffed(b'\nIt works.\n'))
    delivery.close(politely=True)
    print('sent', report.sent, 'later', report.later, 'never', report.never)

    Server      sockets, threads and limits
    Connection  one conversation: the verbs, in the client's order
    DataReader  finds the end of DATA and makes every line end CRLF
    Session     the hooks: what the program thinks of all this
    Refused     how a hook says no
    Delivery    the client's end: one connection to a mail server
    Envelope    who sends a mail, to whom, with which parameters
    Report      what became of each recipient
    Networks    the clients that may come in

How the threads work. A thread per connection spends its time handing
CPython's interpreter lock around, and most of a conversation is waiting. So
there is one desk, with one thread at it: it waits for all clients and does
every step that cannot block. A conversation is a generator that yields what
it waits for: READ, WRITE, or before a step that may block SYNC or AWAY. SYNC
is the disk: one thread, the clerk, takes all mails that wait for it through
each step together, so that they share what a sync costs. AWAY is all else (a
large file, a password, a TLS handshake) and is done by a thread of the team.
Then the conversation goes on at the desk. So the lock changes hands only
around the disk, and an idle client costs no thread.

`python3 smtps.py 2525` prints what it receives.

Based on an idea of smtps.py by Les Smithson (1.x); written anew for 2.0.
"""
import binascii
import collections
import contextlib
import errno
import functools
import io
import logging
import os
import queue
import re
import selectors
import socket
import sys
import threading
import time
from typing import NamedTuple

log = logging.getLogger('smtps')

CHUNK = 65536           # bytes read from a socket, or kept before a write
COMMAND_LINE = 2048     # bytes; RFC 5321 4.5.3.1.4 asks for 512 and more
LONG_LINE = 1000        # bytes; RFC 5321 4.5.3.1.6; longer ones go in pieces
AUTH_LINE = 12288       # bytes; RFC 4954 section 4
RECIPIENTS = 1000       # a mail; RFC 5321 4.5.3.1.8 asks for 100 and more
ERRORS = 20             # refused commands until a session is ended
AUTH_PAUSE = 3.0        # seconds that a wrong password costs
TEAM = 32               # threads at most
BACKLOG = 512           # a short one makes clients wait a second and more
DAY = 86400.0           # seconds; a selector can't wait for a month
FOREVER = float('inf')

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
AWAY = -1               # the next step may block
SYNC = -2               # the same, and what it waits for is the disk
BACK = -3               # that step is done: on with quick ones
PAUSE = -4              # nothing to do until the patience is over
DONE = None             # the conversation is over


class Limits(NamedTuple):
    """What a server grants its clients; may be replaced while it runs."""
    maxsize: int = 100000000        # bytes of one mail
    maxconnections: int = 100
    timeout: float = 300            # seconds of silence
    allowed: object = None          # callable(address: str) -> bool
    tls: object = None              # an ssl.SSLContext: offers STARTTLS


class Client:
    """What is known of the other end: address (str, no port), port, hello
    (the name it gave), extended (it said EHLO), secure (TLS), user (str
    after AUTH, else None)."""

    def __init__(self, address, port):
        self.address, self.port = address, port
        self.hello = self.user = None
        self.extended = self.secure = False

    def __str__(self):
        return '%s:%d' % (self.address, self.port)


class Refused(Exception):
    """Raised by a hook: the client gets this reply.

    code: int, text: str that begins with the enhanced status code of
    RFC 3463, as in Refused(550, '5.7.1 not here')."""

    def __init__(self, code, text):
        super().__init__('%d %s' % (code, text))
        self.code, self.text = code, text


class Goodbye(Exception):
    """Thrown into a conversation that has to end; its text is the 421."""


class Silence(Goodbye):
    """The client said nothing for so long."""


class Gone(Exception):
    """The client is not there any more, or we are not for it. level: int,
    how much that is the owner's business."""

    def __init__(self, text, level=logging.DEBUG):
        super().__init__(text)
        self.level = level


# --- Session: the hooks -----------------------------------------------------

class Session:
    """The program's side of one conversation. These defaults accept all and
    keep nothing. To return accepts, to raise Refused refuses; any other
    exception, SystemExit included, is logged and answered 451: a bug never
    becomes a 250 and never ends the server.

    auth, flush, seal and commit may block; all else must not, since all
    clients wait for it. A session's hooks run one by one, those of different
    sessions at the same time."""

    def __init__(self, client):
        self.client = client

    def hello(self, name):
        """The client said HELO or EHLO name (str)."""

    def auth(self, user, password):
        """The client signs in with two str. May block."""

    def mail(self, sender, parameters):
        """MAIL FROM; sender is a bare address or '', parameters a dict of
        upper-case keyword -> str."""

    def rcpt(self, recipient):
        """RCPT TO, a bare address."""

    def data(self, sender, recipients, parameters):
        """DATA may begin; returns what receives it (see Receiver)."""
        return Receiver()

    def reset(self):
        """The mail that was begun is forgotten or finished."""

    def closed(self):
        """The conversation is over."""


class Receiver:
    """Takes one mail."""

    def write(self, chunk):
        """chunk: bytes as on the wire: lines end with CRLF, a dot at the
        start of a line is doubled (RFC 5321 4.5.2). Keep them in memory."""

    def flush(self):
        """The mail is large: what was written should leave the memory."""

    def seal(self):
        """The mail is complete: it sets out for the disk."""

    def commit(self):
        """The mail is safe and from here on the program's."""

    def accepted(self):
        """commit() and reset() returned; returns the text of the 250 (str).
        Whatever happens here, the client gets one."""
        return '2.0.0 thank you'

    def abort(self):
        """The mail will not be completed. Not called after commit()
        returned."""


# --- DataReader: the end of a mail ------------------------------------------

class DataReader:
    """Cuts the bytes behind DATA into the mail and what follows it.

    Only CRLF.CRLF ends a mail (RFC 5321 4.1.1.4). CR CR LF, a bare LF and a
    bare CR inside become CRLF, and a line that is then a single dot is sent
    as two: whatever another server takes for an end of data, it will not
    find it in a mail of ours (SMTP smuggling, CVE-2023-51764).

    size: int, bytes seen of the mail; rest: None, or the bytes behind it."""

    END = b'\r\n.\r\n'
    LINE_END = re.compile(rb'\r{0,2}\n|\r')
    # There are servers that drop NUL before they look. More than 199 of them
    # at the start of a line are cut, so that a line of nothing but NUL and a
    # dot is never so long that it is let go in pieces.
    NULS = re.compile(rb'([\r\n]\0{0,199})\0*(\.?\0{0,199})\0*')
    LONE_DOT = re.compile(rb'\r\n(?=\0*\.\0*(?:\r\n|\Z))')
    OPEN_END = re.compile(rb'(?:\r{1,2}\0*(?:\.[\0\r]*)?)?\Z')

    def __init__(self):
        # The line end of DATA itself counts: an empty mail is '.' CRLF. So
        # a piece always begins with a line end, which is left out once.
        self.held, self.leave_out = b'\r\n', 2
        self.pieces, self.amount = [], 0
        self.size, self.rest = -self.leave_out, None

    def feed(self, data):
        """Takes bytes until rest is not None."""
        data = self.held + data
        if b'\0' in data:
            data = self.NULS.sub(rb'\1\2', data)
        # Large mails are base64, which knows no dot: one byte is found faster.
        cut = data.find(self.END) if b'.' in data else -1
        if cut < 0:
            cut = self._undecided(data)
            piece, self.held = self._normalised(data[:cut]), data[cut:]
            self.size += cut
        else:
            piece, self.rest = data[:cut], data[cut + len(self.END):]
            self.size += cut + 2
            if piece.endswith(b'\r'):
                piece = piece[:-1]          # CR CR LF
            piece = self._normalised(piece) + b'\r\n'
        if piece:
            self.pieces.append(piece[self.leave_out:])
            self.amount += len(piece)
            self.leave_out = 0

    def take(self):
        """The mail's bytes so far, as they may go out."""
        taken, self.pieces, self.amount = b''.join(self.pieces), [], 0
        return taken

    def _undecided(self, data):
        """Where in data the last line begins, together with the line end
        before it; of a very long line only what may become a lone dot."""
        cut = data.rfind(b'\n')
        if cut < 0 or len(data) - cut > LONG_LINE:
            return self.OPEN_END.search(
                data, max(0, len(data) - LONG_LINE)).start()
        earliest = max(cut - 2, 0)
        while cut > earliest and data[cut - 1:cut] == b'\r':
            cut -= 1
        return cut

    def _normalised(self, piece):
        """piece with every line end a CRLF; most need no change."""
        # Three counts take four times as long as this, which needs a str.
        look = io.IncrementalNewlineDecoder(None, translate=False)
        look.decode(piece.decode('latin-1'), final=True)
        if (look.newlines in (None, '\r\n')
                and b'\0' not in piece and not piece.endswith(b'\n.')):
            return piece
        return self.LONE_DOT.sub(
            b'\r\n.', self.LINE_END.sub(b'\r\n', piece))


# --- Wire: addresses, headers and bytes, for both ends ----------------------

# The keywords of registered extensions: what is not offered is taken and
# ignored, since many devices send what some other server once asked for.
PARAMETERS = frozenset(
    'SIZE BODY SMTPUTF8 AUTH RET ENVID NOTIFY ORCPT BY HOLDFOR HOLDUNTIL '
    'MT-PRIORITY MTRK REQUIRETLS RRVS SOLICIT SUBMITTER TRANSID CONPERM '
    'CONNEG ALT-ADDRESS'.split())

QUOTED = r'"(?:[^"\\]|\\.)*"'
PATH = re.compile(r'''
    (?: [^<>]* < (?P<bracketed> (?: %s | [^<>"] )* ) >          # Name <
       | (?P<bare> (?: %s | [^\s<>"] )+ ) )
    (?P<parameters> (?: \s .* )? ) \Z''' % (QUOTED, QUOTED),
                  re.VERBOSE | re.DOTALL)
ROUTE = re.compile(r'\A@[^:\[\]<>"]*:\s*(?=\S)')        # @relay,@other:
# A local part is quoted as a whole or not at all.
CONTROLS = r'\x00-\x1f\x7f-\x9f\u2028\u2029'
ADDRESS = re.compile(r'''
    (?: " (?: [^"\\%s] | \\[^%s] )* " (?=@|\Z) | (?![@"]) )
    [^\s%s<>"]* \Z''' % (CONTROLS, CONTROLS, CONTROLS), re.VERBOSE)
# Quotes around what needs none: "boss"@x is boss@x (RFC 5321 4.1.2).
NEEDLESS = re.compile(r'''
    " ( (?: [^"\\\s@<>()\[\]:;,] | \\[^"\\\s@<>()\[\]:;,] )+ ) " (?=@)''',
                      re.VERBOSE)
SURROGATE = re.compile('[\ud800-\udfff]')           # was not UTF-8
SIZE, BODY = re.compile(r'[0-9]{0,20}$'), re.compile(r'[A-Za-z0-9]*$')


def parse_path(text, status):
    """('a@b', {'SIZE': '1'}) of '<a@b> SIZE=1', in any of the dialects that
    devices speak. status: the X.Y.Z of a refusal. Raises Refused.

    The address is made here, once: all that is asked, stored, logged and sent
    is this string, and parse_path('<%s>' % address) gives it again."""
    match = PATH.match(text.strip())
    if not match:
        raise Refused(501, status + ' give the address as <user@domain>')
    address = match['bare'] or match['bracketed'].strip()
    # RFC 5321 appendix C: a route is ignored. Who looked up an account for
    # '@relay:boss@x' and sent as 'boss@x' would ask for nobody's password.
    address = ROUTE.sub('', address)
    needless = NEEDLESS.match(address)
    if needless:
        address = needless[1].replace('\\', '') + address[needless.end():]
    if SURROGATE.search(address):
        raise Refused(553, '5.6.7 the address is neither ASCII nor UTF-8')
    if not ADDRESS.match(address):
        raise Refused(501, status + ' an address is user@domain, with quotes '
                      'around all of user or nowhere')
    words = match['parameters'].split()
    return address, parse_parameters(words) if words else {}


def parse_parameters(words):
    """{'SIZE': '1', 'SMTPUTF8': ''} of ['SIZE=1', 'SMTPUTF8']; raises
    Refused."""
    parameters = {}
    for word in words:
        keyword, _, value = word.partition('=')
        if keyword.upper() not in PARAMETERS:
            raise Refused(555, '5.5.4 unknown parameter ' + printable(word))
        parameters[keyword.upper()] = value
    if not SIZE.match(parameters.get('SIZE', '')):
        raise Refused(501, '5.5.4 SIZE takes a number')
    if not BODY.match(parameters.get('BODY', '')):
        raise Refused(501, '5.5.4 BODY takes a word')
    if parameters.get('SMTPUTF8'):
        raise Refused(501, '5.5.4 SMTPUTF8 takes no value')
    return parameters


def printable(text):
    """text as it may stand in a reply or a log line."""
    return ''.join(c if ' ' < c < '\x7f' else '?' for c in text)[:64]


def plain(reply):
    """A server's reply (bytes or str) in one line for the log."""
    if isinstance(reply, bytes):
        reply = reply.decode('utf-8', 'replace')
    if not reply.isprintable():
        reply = ''.join(c if c.isprintable() else ' ' for c in reply)
    return ' '.join(reply.split())[:400]


@functools.lru_cache(32)
def fields_named(*names):
    """A pattern for whole header fields, folded lines included."""
    return re.compile(rb'^(?:%s)[ \t]*:.*\r\n(?:[ \t].*\r\n)*' % '|'.join(
        names).encode(), re.IGNORECASE | re.MULTILINE)


def split_header(content):
    """Where the body of a mail (bytes) begins, at its empty line."""
    end = content.find(b'\r\n\r\n')
    return 0 if content.startswith(b'\r\n') else (
        end + 2 if end >= 0 else len(content))


def stuffed(message):
    """A message (bytes, any line ends) as on the wire, without final dot."""
    lines = DataReader.LINE_END.sub(b'\r\n', message)
    if not lines.endswith(b'\r\n'):
        lines += b'\r\n'
    return (b'\r\n' + lines).replace(b'\r\n.', b'\r\n..')[2:-2] + b'\r\n'


def unstuffed(content):
    """The message that content is on the wire."""
    return (b'\r\n' + content).replace(b'\r\n.', b'\r\n')[2:]


def encoded64(text):
    """A str in base64 (str)."""
    return binascii.b2a_base64(text.encode(), newline=False).decode()


def decode64(text):
    """The str that text stands for in base64; '=' is the empty one (RFC 4954
    section 4). Some devices leave the padding out. Raises Refused."""
    try:
        return binascii.a2b_base64(text.strip('= \t') + '==').decode(
            'utf-8', 'surrogateescape')
    except ValueError:
        raise Refused(501, '5.5.2 that is not base64')


class Networks:
    """The clients that may come in: 'address in Networks(text)'. text: str,
    networks in CIDR, separated by commas or blanks, or 'any'. Raises
    ValueError."""

    def __init__(self, text):
        import ipaddress
        self._address = functools.lru_cache(256)(ipaddress.ip_address)
        words = text.replace(',', ' ').split()
        self._all = [word.lower() for word in words] == ['any']
        if not words:
            raise ValueError('is empty')
        self._networks = [] if self._all else [
            ipaddress.ip_network(word, strict=False) for word in words]

    def __contains__(self, address):
        address = self._address(address)
        address = getattr(address, 'ipv4_mapped', None) or address
        return self._all or any(address in n for n in self._networks)


CA_FILES = ('/etc/ssl/certs/ca-certificates.crt', '/etc/ssl/cert.pem',
            '/opt/etc/ssl/certs/ca-certificates.crt',
            '/etc/pki/tls/certs/ca-bundle.crt', '/etc/ssl/ca-bundle.pem')


@functools.lru_cache(None)
def client_context(cafile='', verify=True, weak=False):
    """The ssl.SSLContext for a server. cafile: path of the PEM file of the
    CAs to trust, '' for the system's; verify: certificate and host name; weak:
    TLS 1.0 and old ciphers will do. One costs a megabyte, so there is one of a
    kind. Raises ImportError, OSError."""
    import ssl
    context = ssl.create_default_context(cafile=cafile or None)
    if cafile:
        # Private CAs often lack what Python 3.13's strict mode asks for.
        context.verify_flags &= ~getattr(ssl, 'VERIFY_X509_STRICT', 0)
    elif not context.cert_store_stats()['x509_ca']:
        for name in filter(os.path.exists, CA_FILES):
            context.load_verify_locations(name)
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if weak:
        _weaken(context)
    return context


def server_context(certificate, key, weak=False):
    """The ssl.SSLContext for clients. certificate, key: paths of PEM files.
    Raises ImportError, OSError, ValueError."""
    import ssl
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    if weak:
        _weaken(context)
    context.load_cert_chain(certificate, key, password='')
    return context


def _weaken(context):
    import ssl
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
    context.set_ciphers('DEFAULT:@SECLEVEL=0')


# --- Connection: one conversation -------------------------------------------

VERBS = ('HELO', 'EHLO', 'MAIL', 'RCPT', 'DATA', 'RSET', 'NOOP', 'VRFY',
         'EXPN', 'HELP', 'AUTH', 'STARTTLS', 'QUIT')
WEB = ('GET', 'POST', 'HEAD', 'PUT', 'OPTIONS', 'CONNECT')


class Connection:
    """One conversation. Its state is what the client has said so far:
    client.hello, client.user, sender, recipients."""

    want_read = want_write = ()     # what a TLS layer raises instead of EAGAIN

    def __init__(self, server, sock, peer, tls):
        self.server, self.sock = server, sock
        self.limits = server.limits
        self.client = Client(peer[0], peer[1])
        self.session = server.make_session(self.client)
        self.talk = self.converse(tls)
        self.patience, self.deadline = self.limits.timeout, 0.0
        self.watched, self.away = 0, None
        self.input, self.replies = b'', []
        self.errors, self.leaving = 0, False
        self.hushed = False             # what comes may be a password
        self.sender = self.parameters = None
        self.recipients = []

    # What the server calls.

    def proceed(self, thrown=None):
        """One step; returns what the next one waits for: READ, WRITE, AWAY,
        SYNC, BACK, PAUSE or DONE."""
        try:
            want = self.talk.throw(thrown) if thrown else next(self.talk)
        except StopIteration:
            want = DONE
        except BaseException:       # not even SystemExit may end a thread
            log.exception('%s: conversation ended by an error', self.client)
            want = DONE
        self.deadline = time.monotonic() + self.patience
        return want

    def close(self):
        if self.client.secure:          # tell a TLS client that this is all
            with contextlib.suppress(OSError, ValueError):
                self.sock.unwrap()
        self.sock.close()

    # The conversation as a whole.

    def converse(self, tls):
        """From the greeting to the goodbye; yields what it waits for."""
        try:
            if tls:
                yield from self.secure(tls)
            self.reply(220, '%s ESMTP ready' % self.server.hostname)
            self.input = yield from self.receive()
            if self.input[:1] == b'\x16':
                raise Gone('speaks TLS from the start: that is for tlsport; '
                           'here only STARTTLS or none', logging.WARNING)
            while not self.leaving:
                yield from self.obey()
            yield from self.flush()
        except Goodbye as goodbye:
            log.debug('%s: dismissed: %s', self.client, goodbye)
            self.reply(421, str(goodbye))
            with contextlib.suppress(OSError, ValueError):
                self.sock.send(b''.join(self.replies))
        except Gone as gone:
            log.log(gone.level, '%s: %s', self.client, gone)
        finally:
            self.call(self.session.closed)

    def obey(self):
        """One command and its reply."""
        verb = None
        try:
            line = yield from self.read_line(COMMAND_LINE)
            verb, argument = self.parse_command(line)
            waiting = getattr(self, 'do_' + verb)(argument)
            if waiting is not None:
                yield from waiting
        except Refused as no:
            self.refuse(no, verb)
        except (Goodbye, Gone, GeneratorExit):
            raise
        except BaseException:           # a hook's sys.exit() is one, too
            log.exception('%s: answered 451', self.client)
            self.refuse(Refused(451, '4.3.0 an error here; try again later'))

    def refuse(self, no, verb=None):
        log.log(logging.WARNING if verb in ('MAIL', 'RCPT', 'DATA', 'AUTH')
                else logging.DEBUG, '%s: answered %s with %s', self.client,
                verb or 'a line', no)
        self.reply(no.code, no.text)
        self.errors += no.code >= 500
        if self.errors > ERRORS:
            raise Goodbye('4.7.0 too many errors')

    def parse_command(self, line):
        verb, argument = (line.split(None, 1) + ['', ''])[:2]
        verb = verb.upper()
        if verb.startswith('AUTH'):
            self.hushed = True
        if log.isEnabledFor(logging.DEBUG):
            log.debug('%s: %s', self.client, self.shown(verb, argument))
        if verb in VERBS:
            return verb, argument.strip()
        if verb in WEB:
            raise Gone('speaks HTTP, this is for mail', logging.WARNING)
        raise Refused(500, '5.5.2 unknown command' + (
            '' if self.hushed else ' ' + printable(verb)))

    def shown(self, verb, argument):
        """A command as the log may show it. A client that is refused at AUTH
        may go on with its name and password: until it has signed in or begun
        a mail, only verbs are shown."""
        if self.hushed:
            return (verb if verb in VERBS else 'a line') + ' ...'
        return printable(verb) + ' ' + ascii(argument)[1:-1]

    # Bytes in and out.

    def read_line(self, limit):
        """The next line (str; what is not UTF-8 as surrogates), LF or CRLF.
        Raises Refused if it has more than limit bytes."""
        long = False
        while b'\n' not in self.input:
            if len(self.input) > limit:
                self.input, long = b'', True
            self.input += yield from self.receive()
        line, _, self.input = self.input.partition(b'\n')
        if long or len(line) > limit:
            raise Refused(500, '5.5.2 more than %d bytes in a line' % limit)
        return line.rstrip(b'\r').decode('utf-8', 'surrogateescape')

    def receive(self):
        """The next bytes from the client, which gets its replies first."""
        if self.replies:
            yield from self.flush()
        if not (self.want_read and self.sock.pending()):
            yield READ
        data = self.attempt(READ, self.sock.recv, CHUNK)
        while self.blocked:
            yield self.blocked
            data = self.attempt(READ, self.sock.recv, CHUNK)
        if not data:
            raise Gone('closed the connection')
        return data

    def flush(self):
        """Sends all replies of a batch at once (RFC 2920)."""
        out, self.replies = b''.join(self.replies), []
        while out:
            sent = self.attempt(WRITE, self.sock.send, out)
            if self.blocked:
                yield self.blocked
            else:
                out = out[sent:]

    def attempt(self, usual, call, *arguments):
        """What a socket method returns. If it has to wait, self.blocked says
        what for, usual or what TLS asks for; else it is None. Raises Gone."""
        self.blocked = None
        try:
            return call(*arguments)
        except BlockingIOError:
            self.blocked = usual
        except self.want_read:
            self.blocked = READ
        except self.want_write:
            self.blocked = WRITE
        except OSError as error:
            raise Gone('connection lost: %s' % error)

    def reply(self, code, *lines):
        for line in lines[:-1]:
            self.replies.append(b'%d-%s\r\n' % (code, line.encode()))
        self.replies.append(b'%d %s\r\n' % (code, lines[-1].encode()))

    def call(self, hook):
        """What a hook returns whose failure must not change the reply."""
        try:
            return hook()
        except BaseException:
            log.exception('%s: in %s', self.client, hook)

    def pause(self, seconds):
        usual, self.patience = self.patience, seconds
        try:
            yield PAUSE
        except Silence:
            self.patience = usual

    def secure(self, context):
        """Puts TLS around the socket. Every step of a handshake computes:
        none of them at the desk. Raises Gone."""
        import ssl
        try:
            self.sock.getpeername()     # gone already? wrap_socket would leak
            self.sock = context.wrap_socket(
                self.sock, server_side=True, do_handshake_on_connect=False)
            self.want_read = ssl.SSLWantReadError
            self.want_write = ssl.SSLWantWriteError
            yield AWAY
            self.attempt(READ, self.sock.do_handshake)
            while self.blocked:
                yield self.blocked
                yield AWAY
                self.attempt(READ, self.sock.do_handshake)
        except (OSError, ValueError, Gone) as error:
            raise Gone('no TLS with this client: %s' % error,
                       logging.WARNING if 'SSL' in str(error)
                       else logging.DEBUG)
        self.client.secure = True

    # The verbs.

    def do_HELO(self, name):
        self.say_hello(name, False)
        self.reply(250, self.server.hostname)

    def do_EHLO(self, name):
        self.say_hello(name, True)
        offers = [self.server.hostname, 'PIPELINING', '8BITMIME',
                  'SIZE %d' % self.limits.maxsize, 'SMTPUTF8',
                  'ENHANCEDSTATUSCODES', 'AUTH LOGIN PLAIN',
                  'AUTH=LOGIN PLAIN']       # the form before RFC 2554
        if self.limits.tls and not self.client.secure:
            offers.append('STARTTLS')
        self.reply(250, *offers)

    def say_hello(self, name, extended):
        """Any name will do, and none (RFC 5321 4.1.4): it is a device."""
        self.forget()
        self.session.hello(name)
        self.client.hello, self.client.extended = name, extended

    def do_MAIL(self, argument):
        if self.sender is not None:
            raise Refused(503, '5.5.1 one mail at a time')
        sender, parameters = parse_path(
            self.after('FROM', argument), '5.1.7')
        if int(parameters.get('SIZE') or 0) > self.limits.maxsize:
            raise self.too_large()
        self.session.mail(sender, parameters)
        self.sender, self.parameters = sender, parameters
        self.hushed = False
        self.reply(250, '2.1.0 sender ok')

    def do_RCPT(self, argument):
        if self.sender is None:
            raise Refused(503, '5.5.1 MAIL comes first')
        recipient, _ = parse_path(self.after('TO', argument), '5.1.3')
        if not recipient:
            raise Refused(550, '5.1.3 a recipient needs an address')
        if len(self.recipients) >= RECIPIENTS:
            raise Refused(452, '4.5.3 %d recipients a mail' % RECIPIENTS)
        self.session.rcpt(recipient)
        self.recipients.append(recipient)
        self.reply(250, '2.1.5 recipient ok')

    @staticmethod
    def after(word, argument):
        """What follows 'FROM:' in all its spellings."""
        said, colon, path = argument.partition(':')
        if said.strip().upper() != word or not colon:
            raise Refused(501, '5.5.4 %s:<address> is missing' % word)
        return path

    def do_DATA(self, argument):
        if not self.recipients:
            raise Refused(503, '5.5.1 no valid recipients')
        receiver = self.session.data(
            self.sender, self.recipients, self.parameters)
        try:
            yield from self.take_mail(receiver)
        except BaseException as error:
            self.call(receiver.abort)
            if isinstance(error, (Goodbye, Gone)):
                log.warning('%s: the mail from <%s> was never completed, '
                            'nothing of it is kept: %s', self.client,
                            self.sender, error)
            raise
        finally:
            self.forget()
        self.errors = 0
        # It is safe: the client must not send it again, whatever fails now.
        self.reply(250, self.call(receiver.accepted) or '2.0.0 accepted')

    def take_mail(self, receiver):
        """The bytes of one mail into receiver. After an error the rest is
        read and thrown away, then the error raised."""
        self.reply(354, 'end with <CRLF>.<CRLF>')
        reader, last_step = DataReader(), SYNC
        try:
            if self.input:
                reader.feed(self.input)
            while reader.rest is None:
                if reader.amount >= CHUNK:
                    receiver.write(self.next_piece(reader))
                    yield AWAY
                    receiver.flush()
                    last_step = AWAY        # others need not wait for it
                reader.feed((yield from self.receive()))
            receiver.write(self.next_piece(reader))
            yield last_step
            receiver.seal()
            yield last_step
            receiver.commit()
        except (Goodbye, Gone, GeneratorExit):
            raise
        except BaseException:
            while reader.rest is None:
                reader.take()
                reader.feed((yield from self.receive()))
            raise
        finally:
            self.input = reader.rest or b''
        yield BACK

    def next_piece(self, reader):
        if reader.size > self.limits.maxsize:
            raise self.too_large()
        return reader.take()

    def too_large(self):
        return Refused(552, '5.3.4 a mail may have %d bytes'
                       % self.limits.maxsize)

    def do_RSET(self, _):
        self.forget()
        self.reply(250, '2.0.0 ok')

    def forget(self):
        self.sender = self.parameters = None
        self.recipients = []
        self.call(self.session.reset)

    def do_NOOP(self, _):
        self.reply(250, '2.0.0 ok')

    def do_VRFY(self, _):
        self.reply(252, '2.1.5 send it and see')

    def do_EXPN(self, _):
        raise Refused(502, '5.5.1 no lists here')

    def do_HELP(self, _):
        self.reply(214, '2.0.0 ' + ' '.join(VERBS))

    def do_QUIT(self, _):
        self.leaving = True
        self.reply(221, '2.0.0 bye')

    def do_STARTTLS(self, _):
        if not self.limits.tls or self.client.secure:
            raise Refused(502, '5.5.1 no TLS to be had')
        self.reply(220, '2.0.0 go ahead')
        yield from self.flush()
        # What came in clear text behind the command could be anybody's, and
        # so could the name (RFC 3207 section 4.2; CVE-2011-0411).
        self.input = b''
        self.forget()
        self.client.hello = self.client.user = None
        yield from self.secure(self.limits.tls)

    def do_AUTH(self, argument):
        if self.client.user is not None:
            raise Refused(503, '5.5.1 already signed in')
        if self.sender is not None:
            raise Refused(503, '5.5.1 not during a mail')
        mechanism, _, initial = argument.partition(' ')
        if mechanism.upper() == 'PLAIN':
            user, password = yield from self.auth_plain(initial.strip())
        elif mechanism.upper() == 'LOGIN':
            user, password = yield from self.auth_login(initial.strip())
        else:
            raise Refused(504, '5.5.4 AUTH takes PLAIN or LOGIN')
        yield AWAY
        try:
            self.session.auth(user, password)
        except Refused:
            yield from self.pause(AUTH_PAUSE)       # no guessing by the score
            raise
        self.client.user, self.hushed = user, False
        self.reply(235, '2.7.0 signed in')

    def auth_plain(self, initial):
        """RFC 4616; returns (user, password)."""
        answer = decode64(initial) if initial else (
            yield from self.challenge(''))
        if answer.count('\0') != 2:
            raise Refused(501, '5.5.2 that is not AUTH PLAIN')
        return answer.split('\0')[1:]

    def auth_login(self, initial):
        """Old clients compare these challenges letter by letter."""
        user = decode64(initial) if initial else (
            yield from self.challenge('VXNlcm5hbWU6'))
        return user, (yield from self.challenge('UGFzc3dvcmQ6'))

    def challenge(self, text):
        """Asks; returns the decoded answer. The blank behind 334 is needed
        by clients that wait for a line whose fourth byte is one."""
        self.reply(334, text)
        answer = yield from self.read_line(AUTH_LINE)
        if answer.strip() == '*':
            raise Refused(501, '5.7.0 cancelled')
        return decode64(answer)


# --- Server: sockets and threads --------------------------------------------

class Server:
    """Listens, and serves every client that it has room for.

    make_session: callable(Client) -> Session; limits: Limits, read anew for
    each client, so that it may be replaced while the server runs."""

    def __init__(self, make_session=Session, limits=Limits(), hostname=None):
        self.make_session, self.limits = make_session, limits
        self.hostname = hostname or socket.gethostname()
        self.listeners = []
        self._desk = threading.Thread(
            target=self._attend, name='smtp-desk', daemon=True)
        self._clerk = threading.Thread(
            target=self._file_mails, name='smtp-disk', daemon=True)
        # What the threads talk by. While it runs all else is the desk's.
        self._slow = queue.SimpleQueue()    # connections; None: go home
        self._sync = queue.SimpleQueue()    # the same, for the clerk
        self._back = collections.deque()    # (connection, what it waits for)
        self._asleep = False                # somebody has to ring
        self._bell, self._ringer = socket.socketpair()

        self._selector = selectors.DefaultSelector()
        self._look_round = FOREVER          # when somebody may be silent
        self._connections = set()
        self._team, self._given = [], 0     # threads; steps given to them
        self._short_of_threads = self._stopping = False
        self._spare = open(os.devnull, 'rb', 0)

    def listen(self, host, port, tls=False):
        """Binds; host '' is every interface, IPv4 and IPv6; tls: clients
        begin with a handshake (RFC 8314), or get a 421 while limits.tls is
        None. Raises OSError."""
        both = (socket.AF_INET, '0.0.0.0'), (socket.AF_INET6, '::')
        one = socket.AF_INET6 if ':' in host else socket.AF_INET
        for family, address in [(one, host)] if host else both:
            try:
                sock = self._bind(family, address, port)
            except OSError as error:
                if (host or family == socket.AF_INET
                        or error.errno == errno.EADDRINUSE):
                    raise
                break                           # a box without IPv6
            port = port or sock.getsockname()[1]
            self.listeners.append(sock)
            self._selector.register(sock, READ, functools.partial(
                self._welcome, sock, tls))

    @staticmethod
    def _bind(family, address, port):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Clients' sockets inherit this one.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address, port))
            sock.listen(BACKLOG)
            sock.setblocking(False)
        except BaseException:
            sock.close()
            raise
        return sock

    def start(self):
        """Serves from now on, in threads of its own. Raises RuntimeError if
        they can't be had; then stop() is needed as well."""
        self._selector.register(self._bell, READ, functools.partial(
            self._bell.recv, 64))
        self._clerk.start()
        self._desk.start()

    def stop(self, grace=8.0):
        """No new clients; who is between the final dot and the 250 gets it,
        within grace seconds; all others a 421. Returns when done."""
        if self._stopping:
            return
        self._stopping = True
        self._ringer.send(b'.')
        if self._desk.is_alive():           # else it was never started
            self._desk.join(grace)
        for sock in self.listeners:
            sock.close()
        if self._desk.is_alive():
            return              # past its grace, it still needs the rest
        self._sync.put(None)
        for _ in self._team:
            self._slow.put(None)
        for thread in self._team + [self._clerk]:
            if thread.is_alive():
                thread.join()
        for thing in self._bell, self._ringer, self._spare, self._selector:
            thing.close()

    # The clerk and the team.

    def _file_mails(self):
        """The life of the clerk: takes all that waits as a group."""
        for connection in iter(self._sync.get, None):
            self._try(self._file_group, [connection] + [
                self._sync.get() for _ in range(self._sync.qsize())])

    def _file_group(self, group):
        """All take one step before any takes the next."""
        while group:
            steps = [(c, c.proceed()) for c in group]
            group = [c for c, want in steps if want == SYNC]
            self._bring_back([step for step in steps if step[1] != SYNC])

    def _hire(self):
        """One more thread, if it can be had."""
        thread = threading.Thread(target=self._work, daemon=True,
                                  name='smtp-%d' % (len(self._team) + 1))
        try:
            thread.start()
            self._team.append(thread)
            self._short_of_threads = False
        except RuntimeError as error:
            if not self._short_of_threads:
                log.warning('no more threads: %s; clients wait for each other',
                            error)
            self._short_of_threads = True

    def _work(self):
        """The life of a thread of the team: steps that may block."""
        for connection in iter(self._slow.get, None):
            self._bring_back([(connection, connection.proceed())])

    def _bring_back(self, steps):
        self._back.extend(steps)
        if steps and self._asleep:
            self._asleep = False
            self._ringer.send(b'.')

    # At the desk.

    def _attend(self):
        """The life of the thread at the desk."""
        while self._connections or not self._stopping:
            self._asleep = True         # first: who comes back now will ring
            events = self._selector.select(
                0 if self._back else self._leisure())
            self._asleep = False
            for key, _ in events:
                self._try(key.data)
            while self._back:
                connection, want = self._back.popleft()
                self._given -= connection.away == AWAY
                connection.away = None
                self._try(self._go_on, connection, want)
            if time.monotonic() >= self._look_round:
                self._dismiss_the_silent()
            if self._stopping:
                self._close_up()

    def _close_up(self):
        """Nobody comes in, and who waits for his client goes."""
        while self.listeners:
            sock = self.listeners.pop()
            self._selector.unregister(sock)
            sock.close()
        for connection in self._idle():
            self._try(self._step, connection, Goodbye('4.3.2 shutting down'))

    def _leisure(self):
        """Seconds until somebody may have been silent for too long."""
        if not self._connections:
            self._look_round = FOREVER
        if self._look_round == FOREVER:
            return None
        return min(max(0.0, self._look_round - time.monotonic()), DAY)

    @staticmethod
    def _try(step, *arguments):
        try:
            step(*arguments)
        except BaseException:           # without a desk nobody is served
            log.exception('a client is lost by an error')

    def _step(self, connection, thrown=None):
        """The client did what its connection waits for; or thrown it is."""
        if connection.away:
            self._watch(connection, 0)          # heard when it is back
        else:
            self._go_on(connection, connection.proceed(thrown))

    def _go_on(self, connection, want):
        """Until it has to wait. want: what its next step waits for."""
        while want in (AWAY, SYNC, BACK):
            if want != BACK and self._send_away(connection, want):
                return
            want = connection.proceed()
        self._look_round = min(self._look_round, connection.deadline)
        self._watch(connection, want if want in (READ, WRITE) else 0)
        if want is DONE:
            self._connections.discard(connection)
            connection.close()

    def _send_away(self, connection, want):
        """Gives its next step to another thread; False if that must or may as
        well be done here: alone, nobody waits but who comes just now."""
        if len(self._connections) == 1:
            return False
        if want == SYNC:
            self._sync.put(connection)
        else:
            if self._given >= len(self._team) < TEAM:
                self._hire()
            if not self._team:
                return False
            self._given += 1
            self._slow.put(connection)
        connection.away = want
        return True

    def _watch(self, connection, events):
        """Has the selector look for READ or WRITE, or 0 for neither."""
        if events == connection.watched:
            return
        if connection.watched:
            self._selector.unregister(connection.sock)
            connection.watched = 0
        if events:
            self._selector.register(connection.sock, events, connection.step)
            connection.watched = events

    def _idle(self):
        """The connections that wait for their clients."""
        return [c for c in self._connections if not c.away]

    def _dismiss_the_silent(self):
        now = time.monotonic()
        for connection in self._idle():
            if connection.deadline <= now:
                self._try(self._step, connection, Silence(
                    '4.4.2 silent for %d seconds' % connection.patience))
        self._look_round = min(
            (c.deadline if c.deadline > now else now + c.patience
             for c in self._connections), default=FOREVER)

    # New clients.

    def _welcome(self, listener, tls):
        """Accepts a client."""
        try:
            sock, peer = listener.accept()
        except (BlockingIOError, ConnectionError):
            return                              # gone again
        except OSError as error:
            self._turn_away(listener, error)
            return
        address = peer[0].partition('%')[0]     # fe80::1%eth0
        context = self.limits.tls if tls else None
        refusal = self._refusal(address)
        if tls and not context:         # never clear text where TLS is meant
            refusal = '421 4.7.0 this port has no certificate any more'
        if refusal:
            log.warning('%s: refused: %s', address, refusal)
            with contextlib.suppress(OSError, ValueError):
                sock.send(b'%s\r\n' % refusal.encode())
            sock.close()
            return
        sock.setblocking(False)
        try:
            connection = Connection(self, sock, (address, peer[1]),
                                    context)
        except BaseException:
            log.exception('%s: no session for this client', address)
            sock.close()
            return
        connection.step = functools.partial(self._step, connection)
        self._connections.add(connection)
        log.debug('%s: connected', connection.client)
        self._step(connection)

    def _refusal(self, address):
        """The reply that keeps this address out, or None."""
        limits = self.limits
        if limits.allowed and not limits.allowed(address):
            return '554 5.7.1 %s is not in the allowed networks' % address
        if (len(self._connections) >= limits.maxconnections
                and not self._make_room(address)):
            return '421 4.7.0 %d connections are all' % limits.maxconnections

    def _make_room(self, address):
        """One client may have all the places, but has to give them back: if
        address has fewer, the greediest one's most silent connection goes.
        So a camera that hangs can't shut out the rest."""
        held = collections.Counter(
            c.client.address for c in self._connections)
        greedy, most = held.most_common(1)[0] if held else ('', 0)
        if most <= held[address] + 1:
            return False
        idle = [c for c in self._idle() if c.client.address == greedy]
        if not idle:
            return False
        self._step(min(idle, key=lambda c: c.deadline), Goodbye(
            '4.7.0 too many connections of yours, another client waits'))
        return True

    def _turn_away(self, listener, error):
        """No descriptor left for a client: the spare one serves to say so.
        Else it would wait unanswered, and we would spin."""
        log.error('a client is turned away: %s', error)
        self._spare.close()
        try:
            sock, _ = listener.accept()
            with sock:
                sock.send(b'421 4.3.2 no room for you, try again later\r\n')
        except OSError:
            time.sleep(0.1)
        with contextlib.suppress(OSError):
            self._spare = open(os.devnull, 'rb', 0)


# --- Delivery: the client's end ---------------------------------------------

CONNECT_TIME = 30       # seconds; so long a server has to answer a connection
REPLY_TIME = 60         # seconds for a whole reply
DOT_TIME = 600          # seconds; RFC 5321 4.5.3.2.6: no second copies
QUIT_TIME = 5           # seconds for a goodbye that nothing depends on
REPLY_SIZE = 65536      # bytes of a whole reply

NOT_ASKED = 503, 'not asked for'


class ServiceUnavailable(OSError):
    """The server said 421 before it knew more of a mail than the sender: it
    has trouble of its own."""


class Envelope(NamedTuple):
    """sender: str, '' for the null sender; recipients: list of str, both
    bare addresses; parameters of MAIL: dict of upper-case keyword -> str. BODY
    goes along if the server offers 8BITMIME. SMTPUTF8 says that the header
    needs it; that an address does is seen."""
    sender: str
    recipients: list
    parameters: dict = {}

    def needs_utf8(self):
        """RFC 6531: something that only an SMTPUTF8 server understands."""
        return 'SMTPUTF8' in self.parameters or not (
            self.sender + ''.join(self.recipients)).isascii()


class FilePart(NamedTuple):
    """The bytes from start to end (int) of a binary file that is open."""
    file: object
    start: int
    end: int


class Report:
    """What became of each recipient at one attempt.

    sent, later, never: {recipient: reply (str)}: accepted; refused for now;
    refused for good. stages: {recipient: the command that the reply answered,
    'mail', 'rcpt', 'data' or 'dot'}. open: list of those without a verdict
    yet. error: None, or the OSError that ended the connection before all had
    theirs."""

    def __init__(self, recipients):
        self.open, self.error = list(recipients), None
        self.sent, self.later, self.never, self.stages = {}, {}, {}, {}

    def settle(self, recipient, code, text, stage=''):
        """Files a recipient under what the code means."""
        verdict = self.sent if 200 <= code < 300 else (
            self.never if 500 <= code < 600 else self.later)
        verdict[recipient] = '%d %s' % (code, text)
        self.stages[recipient] = stage
        self.open.remove(recipient)

    def settle_all(self, code, text, stage=''):
        """The same for all that are open."""
        for recipient in self.open[:]:
            self.settle(recipient, code, text, stage)

    def give_up(self, text):
        """What is still open has to be tried again."""
        for recipient in self.open:
            self.later[recipient] = text
        self.open = []


class BoundedReader:
    """A server's lines, bounded in time and size. It takes the place of the
    socket's file in smtplib, and in poplib as well: their own waits for each
    byte anew, so a server that trickles would keep them for ever."""

    def __init__(self, sock):
        self._sock, self._buffer = sock, b''
        self.expect(REPLY_TIME)

    def expect(self, seconds):
        """A whole reply has to be there in so many seconds."""
        self._deadline = time.monotonic() + seconds
        self._budget = REPLY_SIZE

    def readline(self, limit=8192):
        """The next line (bytes) with its end; without one if it has more than
        limit bytes or the connection ends. Raises OSError: socket.timeout, or
        the reply is too large."""
        while b'\n' not in self._buffer and len(self._buffer) < limit:
            received = self._receive()
            if not received:
                break
            self._buffer += received
        end = self._buffer.find(b'\n') + 1 or len(self._buffer)
        line, self._buffer = self._buffer[:end], self._buffer[end:]
        self._budget -= len(line)
        if self._budget < 0:
            raise OSError('the reply does not end')
        return line

    def _receive(self):
        """The next bytes; b'' is the end of the connection."""
        while True:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise socket.timeout('timed out')
            limit_wait(self._sock, min(left, REPLY_TIME))
            try:
                return self._sock.recv(4096)
            except socket.timeout as error:
                if error.errno:         # the system's: the other end is gone
                    raise

    def close(self):
        """The socket is closed by its owner."""


def limit_wait(sock, seconds):
    """A call to the socket may wait about so long: to be exact to a second
    would cost a system call each time."""
    if abs(sock.gettimeout() - seconds) > 1:
        sock.settimeout(seconds)


class SmtpDialogue:
    """Mixed into smtplib's classes: replies are bounded, and the dialogue
    goes to our log, without secrets."""

    def __init__(self, host, port, name, redact, debuglevel, **tls):
        # The constructor of smtplib connects, and that uses these.
        self.redact, self.debuglevel = redact, debuglevel
        self.secret, self.reply_time = False, None
        super().__init__(host, port, name, timeout=CONNECT_TIME, **tls)

    def getreply(self):
        if self.file is None:
            self.file = BoundedReader(self.sock)
        self.file.expect(self.reply_time or REPLY_TIME)
        code, text = super().getreply()
        if not 200 <= code < 600:
            self.close()
            raise OSError('the reply is not SMTP: %s'
                          % self.redact(plain(text))[:80])
        return code, text

    def _print_debug(self, *arguments):
        if self.secret and arguments[0] == 'send:':
            arguments = 'send:', '***'
        log.info('smtp %s: %s', self._host, self.redact(
            ' '.join(map(str, arguments))))


@functools.lru_cache(None)
def dialogue_class(secure):
    """Made when first needed, since smtplib alone costs a small box nine
    megabytes. secure: TLS from the first byte."""
    import smtplib
    return type('Smtp', (SmtpDialogue, smtplib.SMTP_SSL if secure
                         else smtplib.SMTP), {})


class Delivery:
    """One connection to a mail server, for one mail after the other. In this
    order: hello(), start_tls() and ask() for a login if needed, send() for
    each mail, close().

    What it promises on failure. Each recipient of a mail has one verdict, and
    only the server's replies make one. If send() raises OSError, the
    connection ended before any of the content was sent: nobody has got the
    mail, and another connection may try at once. A server likes to close one
    that was idle (see used). If it ends later, the Report has the verdicts
    that were heard, and error: the rest is open, and the server may have taken
    the mail all the same; a second try may be a second copy. After any
    exception the connection is closed; close() is right at any time. No reply
    is waited for longer than REPLY_TIME seconds, that to the final dot
    DOT_TIME, and none may be larger than REPLY_SIZE bytes.

    If the server offers PIPELINING (RFC 2920), the envelope is one packet, and
    that of the next mail goes right behind the final dot of this one: a mail
    costs one round trip instead of four. An envelope that is under way can't
    be taken back. So what following() returned must be sent next.

    used: bool, a mail has gone this way, be it refused."""

    def __init__(self, host, port, name, tls=None, redact=str, debuglevel=0):
        """Connects and hears the greeting. host, name (for EHLO): str; tls:
        an ssl.SSLContext if TLS begins at once; redact: callable(str) -> str,
        takes secrets out of what the server says; debuglevel: 1 or more logs
        the dialogue at INFO. Raises OSError, ValueError or LookupError (an
        impossible host name), ImportError."""
        self._host, self._port = host, port
        self._redact, self._debuglevel = redact, debuglevel
        extra = {'context': tls} if tls else {}
        self._smtp = dialogue_class(tls is not None)(
            host, port, name, redact, debuglevel, **extra)
        self._smtp.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._under_way = None      # the Envelope behind the last final dot
        self._unfinished = False    # a transaction needs RSET
        self.used = False

    @property
    def connected(self):
        return self._smtp is not None

    # Before the mail.

    def hello(self):
        """EHLO, or HELO if it must be. Raises OSError."""
        code, text = self._smtp.ehlo()
        if code >= 500:
            code, text = self._smtp.helo()
        if code >= 300:
            raise OSError('%d %s' % (code, plain(text)))

    def offers(self, extension):
        """What EHLO said behind that word (str), or None."""
        return self._smtp.esmtp_features.get(extension.lower())

    def start_tls(self, context):
        """STARTTLS and a new EHLO. Raises OSError if it is not to be had:
        never go on in plain text then."""
        self._smtp.starttls(context=context)
        self._smtp.ehlo()

    def ask(self, line):
        """Sends one line (str) of a login, never shown in the log; returns
        the reply's (code, text as bytes). Raises OSError."""
        self._smtp.secret = True
        try:
            return self._smtp.docmd(line)
        finally:
            self._smtp.secret = False

    # The mail.

    def send(self, envelope, header, body, following=None):
        """Sends one mail; returns its Report, raises OSError (see above).

        header: bytes, its lines as on the wire; body: bytes or FilePart, as
        on the wire (dots doubled, no final dot), from the empty line on.
        following: callable() -> the Envelope of the mail that will be sent
        next, or None; asked once, when the server wants this mail's content.
        """
        if not self.connected:
            raise OSError('the connection is closed')
        report = Report(envelope.recipients)
        if not self._understands(envelope):
            report.settle_all(550, '5.6.7 needs SMTPUTF8, which %s:%d does '
                              'not offer' % (self._host, self._port))
            return report
        replies = self._begin(envelope)
        try:
            if self._wants_content(report, *replies):
                self._unfinished = False
                self._finish(report, header, body, following)
            self.used = True
        except OSError as error:
            self.close()
            report.error = error
        except Exception:
            self.close()
            raise
        return report

    def _understands(self, envelope):
        return (not envelope.needs_utf8()
                or self.offers('smtputf8') is not None)

    def _begin(self, envelope):
        """MAIL, RCPT, DATA; returns the replies: MAIL's, a list of RCPT's,
        DATA's. Raises OSError."""
        try:
            if self._under_way not in (None, envelope):
                raise ValueError('the envelope of another mail is under way')
            if self._unfinished:
                self._command(b'RSET\r\n', ServiceUnavailable)
            self._unfinished = True
            if self.offers('pipelining') is None:
                return self._one_by_one(*self._commands(envelope))
            if self._under_way is None:
                self._send(self._packet(envelope))
            self._under_way = None
            return (self._reply(ServiceUnavailable),
                    [self._reply() for _ in envelope.recipients],
                    self._reply())
        except Exception:
            self.close()
            raise

    def _one_by_one(self, mail, recipients, data):
        """Without PIPELINING. What makes no sense after a refusal is not
        asked for."""
        reply = self._command(mail, ServiceUnavailable)
        if reply[0] >= 300:
            return reply, [], NOT_ASKED
        replies = [self._command(recipient) for recipient in recipients]
        if all(code >= 300 for code, _ in replies):
            return reply, replies, NOT_ASKED
        return reply, replies, self._command(data)

    def _commands(self, envelope):
        """The envelope as command lines (bytes): MAIL, [RCPT], DATA."""
        mail = 'MAIL FROM:<%s>' % envelope.sender
        body = envelope.parameters.get('BODY')
        if body is not None and self.offers('8bitmime') is not None:
            mail += ' BODY=' + body.upper()
        if envelope.needs_utf8():
            mail += ' SMTPUTF8'
        lines = [mail] + ['RCPT TO:<%s>' % address
                          for address in envelope.recipients]
        if any('\r' in line or '\n' in line for line in lines):
            raise ValueError('an address with a line end')
        mail, *recipients = [line.encode() + b'\r\n' for line in lines]
        return mail, recipients, b'DATA\r\n'

    @staticmethod
    def _wants_content(report, mail, recipients, data):
        """Files those who were refused; True if the server waits for the
        content. Raises OSError if the replies make no sense."""
        if mail[0] >= 300:
            report.settle_all(*mail, 'mail')
        for recipient, reply in zip(report.open[:], recipients):
            if reply[0] >= 300:
                report.settle(recipient, *reply, 'rcpt')
        if data[0] == 354:
            return True
        if data[0] < 400:
            raise OSError('DATA was answered %d %s' % data)
        report.settle_all(*data, 'data')
        return False

    def _finish(self, report, header, body, following):
        """The content and its verdict. Raises OSError."""
        if not report.open:             # RFC 2920 3.1: 354 for nobody
            self._send(b'.\r\n')
            self._reply()
            return
        ahead = self._ask_ahead(following)
        try:
            self._send_content(header, body, b'.\r\n' + ahead)
        except ConnectionError as error:
            self._hear_why(report, error)
            return
        reply = self._any_reply(DOT_TIME)
        if 300 <= reply[0] < 400:
            raise OSError('the final dot was answered %d %s' % reply)
        report.settle_all(*reply, 'dot')
        if reply[0] == 421:
            self.close()

    def _ask_ahead(self, following):
        """The next envelope (bytes), to go behind the final dot."""
        if following is None or self.offers('pipelining') is None:
            return b''
        envelope = following()
        if envelope is None or not self._understands(envelope):
            return b''
        packet, self._under_way = self._packet(envelope), envelope
        return packet

    def _send_content(self, header, body, end):
        if not isinstance(body, FilePart):
            self._send(header + body + end)
            return
        self._send(header)
        size = body.end - body.start
        if self._smtp.sock.sendfile(body.file, body.start, size) < size:
            raise OSError('the file of this mail has become shorter')
        self._send(end)

    def _hear_why(self, report, error):
        """A server that refuses in the middle of a mail says so first; else
        raises error."""
        try:
            code, text = self._any_reply(CONNECT_TIME)
        except OSError:
            raise error
        if code < 400:
            raise error
        report.settle_all(code, text, 'dot')
        self.close()

    # Bytes out and in.

    def _packet(self, envelope):
        """The whole envelope (bytes)."""
        mail, recipients, data = self._commands(envelope)
        packet = b''.join([mail, *recipients, data])
        self._show(packet)
        return packet

    def _command(self, line, closing=OSError):
        self._show(line)
        self._send(line)
        return self._reply(closing)

    def _show(self, commands):
        if self._debuglevel:
            log.info('smtp %s: send: %s', self._host, plain(commands))

    def _send(self, data):
        limit_wait(self._smtp.sock, REPLY_TIME)
        self._smtp.sock.sendall(data)

    def _reply(self, closing=OSError):
        """(code, text in one line). Raises OSError; closing on a 421."""
        code, text = self._any_reply()
        if code == 421:
            raise closing('421 ' + text)
        return code, text

    def _any_reply(self, seconds=None):
        self._smtp.reply_time = seconds
        code, text = self._smtp.getreply()
        return code, self._redact(plain(text))

    def close(self, politely=False):
        """politely: with QUIT, and a short wait for the answer."""
        smtp, self._smtp, self._under_way = self._smtp, None, None
        if smtp is None:
            return
        try:
            if politely:
                smtp.reply_time = QUIT_TIME
                smtp.quit()
        except OSError:
            pass
        smtp.close()


# --- Alone: print what comes ------------------------------------------------

class Printer(Session):
    """Shows every mail on the terminal."""

    def data(self, sender, recipients, parameters):
        print('--- from <%s> to %s, client %s' % (
            sender, ', '.join(recipients), self.client), flush=True)
        return PrintedMail()


class PrintedMail(Receiver):

    def __init__(self):
        self.content = []

    def write(self, chunk):
        self.content.append(chunk)

    def accepted(self):
        text = b'\r\n' + b''.join(self.content)
        print(text.replace(b'\r\n.', b'\r\n').replace(b'\r\n', b'\n').decode(
            'utf-8', 'replace'), flush=True)
        return '2.0.0 printed'


def main(arguments):
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    server = Server(Printer)
    server.listen('', int(arguments[0]) if arguments else 25)
    server.start()
    print('printing what port %d receives; Ctrl-C ends it'
          % server.listeners[0].getsockname()[1], flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        server.stop()


if __name__ == '__main__':
    main(sys.argv[1:])
