#!/usr/bin/env python3
r"""SMTP (RFC 5321) as a library, both ends: a threaded listener that takes
mail, and a client that delivers it. It knows nothing of proxying, accounts,
ini files or spools.

    client ~~~> Server                              Delivery ~~~> mail server
                   |  Conversation                     ^     Report
                   v                                   |
                Session, Message ---- your program ---- Envelope

To take mail, say what receives it; what else a Session may refuse and a
Message may do has a default:

    import smtps

    mails = []

    class Letter(smtps.Message):
        content = b''

        def write(self, chunk):
            self.content += chunk

        def commit(self):
            mails.append(smtps.unstuffed(self.content))
            return '2.0.0 thank you'

    class Inbox(smtps.Session):
        def data(self, sender, recipients, parameters):
            return Letter()

    server = smtps.Server(Inbox)
    server.listen('', 2525)
    server.start()                      # returns at once; server.stop()

To deliver mail:

    delivery = smtps.Delivery('mail.example.org', 25, 'box.example.org')
    delivery.hello()
    envelope = smtps.Envelope('me@example.org', ['you@example.org'])
    report = delivery.send(
        envelope, b'Subject: hello\r\n', smtps.stuffed(b'\nIt works.\n'))
    delivery.close(politely=True)
    print('sent', report.sent, 'later', report.later, 'never', report.never)

For the program that takes mail:

    Session     the hooks: what the program thinks of a client and its mails
    Message     receives one mail and makes it safe
    Refused     how a hook says no
    Client      what is known of the other end
    Limits      what a server grants its clients
    Networks    the clients that may come in

The listener:

    Server      listens; its event loop waits for all clients
    DiskThread  makes mails safe, all that wait at once
    WorkerPool  threads for what else may take long
    Connection  one client's socket: bytes in and out, never waiting
    Conversation, Authentication    what is said over it: the verbs
    DataReader  finds the end of DATA and makes every line end CRLF
    Closing, IdleTimeout, Disconnected      how a conversation ends early

The client's end:

    Delivery    one connection to a mail server
    Envelope    who sends a mail, to whom, with which parameters
    FilePart    the content of a mail that is in a file
    Report      what became of each recipient
    ServiceClosing, ServiceUnavailable      the server said 421
    BoundedReader, SmtpDialogue     replies have an end

By itself, as a program:

    Printer, PrintedMessage     show what comes

Where the listener's threads meet. A thread for each client would spend its
time handing CPython's interpreter lock around, and most of a conversation is
waiting. So a conversation is a generator: resume() does its next step and
returns what the step after that waits for.

    READ WRITE SLEEP    the client, or time. One thread, the event loop
                        ('smtp-loop'), waits for all of that.
    COMMIT              the disk. The disk thread ('smtp-disk') takes all
                        mails that wait for it through each step together:
                        first each is sealed, then each committed. So one
                        sync may serve them all.
    OFFLOAD             what may take long otherwise: a large piece of a mail,
                        a password, a TLS handshake. That is for a worker
                        ('smtp-1' and so on).
    RESUME              nothing: that was it, on with it in the event loop.
    None                nothing: the conversation is over.

The event loop gives a conversation away through the queue of the disk thread
or of the workers, and gets it back through _handed_back and the wake-up pipe.
Between the two it does not touch it. So a conversation, with its Session and
its Message, is in the hands of one thread at a time and needs no lock. All
else of a Server is the event loop's alone, but for limits and make_session,
which anybody may replace, and stopping, which stop() sets once.

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
TEXT_LINE = 998         # bytes; the same without its CRLF
AUTH_LINE = 12288       # bytes; RFC 4954 section 4
RECIPIENTS = 1000       # a mail; RFC 5321 4.5.3.1.8 asks for 100 and more
ERRORS = 20             # refused commands until a session is ended
AUTH_PAUSE = 3.0        # seconds that a wrong password costs
LF_SILENCE = 1.0        # seconds behind LF.LF that make it the end of a mail
WORKERS = 32            # threads at most
TURN = 64               # pieces of a large mail, then it is another's turn
BACKLOG = 512           # a short one makes clients wait a second and more
DAY = 86400.0           # seconds; a selector can't wait for a month
FOREVER = float('inf')

# What the next step of a conversation waits for; see above. None: it is over.
SLEEP, READ, WRITE = 0, selectors.EVENT_READ, selectors.EVENT_WRITE
OFFLOAD, COMMIT, RESUME = 'offload', 'commit', 'resume'


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


class Closing(Exception):
    """Thrown into a conversation that has to end; its text is the 421."""


class IdleTimeout(Closing):
    """The client said nothing for so long."""


class Disconnected(Exception):
    """The client is not there any more, or we are not for it. level: int,
    how much that is the owner's business."""

    def __init__(self, text, level=logging.DEBUG):
        super().__init__(text)
        self.level = level


# --- Session and Message: the hooks -----------------------------------------

class Session:
    """The program's side of one conversation. These defaults accept all and
    keep nothing. To return accepts, to raise Refused refuses; any other
    exception, SystemExit included, is logged and answered 451: a bug never
    becomes a 250 and never ends the server.

    auth and the steps of a Message may block; all else must not, since all
    clients wait for it. The hooks of a session and its messages run one by
    one, those of different sessions at the same time.

    mechanisms: what AUTH offers; XOAUTH2 is known as well."""

    mechanisms = 'LOGIN', 'PLAIN'


    def __init__(self, client):
        self.client = client

    def hello(self, name):
        """The client said HELO or EHLO name (str)."""

    def auth(self, user, password):
        """The client signs in with two str; by XOAUTH2 the password is a
        token. May block."""

    def mail(self, sender, parameters):
        """MAIL FROM; sender is a bare address or '', parameters a dict of
        upper-case keyword -> str (see parse_parameters)."""

    def rcpt(self, recipient):
        """RCPT TO, a bare address that is new to this mail. A client may name
        several at once: if one is refused, none of them is kept. What counts
        is what data() gets."""

    def data(self, sender, recipients, parameters):
        """DATA may begin; returns the Message that receives it."""
        return Message()

    def reset(self):
        """The mail that was begun is forgotten or finished."""

    def closed(self):
        """The conversation is over."""


class Message:
    """Receives one mail: write() for each piece, seal(), commit(). To raise
    Refused in one of them refuses the mail, and then, or if the client goes
    away, comes abort(). Who only wants to receive overrides write and commit.

    All of them may block: none runs in the event loop. A mail of less than
    CHUNK bytes is written and sealed in the disk thread, then committed there
    with all others that wait. What comes of a larger one is written by a
    worker, so a disk that is slow for one mail is not for the others."""

    def write(self, chunk):
        """chunk: bytes as on the wire: lines end with CRLF, a dot at the
        start of a line is doubled (RFC 5321 4.5.2)."""

    def seal(self):
        """The mail is complete: it sets out for the disk."""

    def commit(self):
        """The mail is safe and from here on the program's. Returns the text
        of the 250 (str). Whatever fails behind this, the client hears it: a
        451 for a mail that is kept would bring it a second time."""
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
    find it in a mail of ours (SMTP smuggling, CVE-2023-51764). No client
    doubles a dot behind a bare CR, which is no line end for it: we do.

    There are devices that never send a CR. Only for them LF.LF is an end, too,
    and only if nothing or QUIT is behind it: may_be_over() says that it is
    so until now, end() that it stays so. No mail server sends so, and what
    is smuggled in a mail has bytes behind it.

    lf_only: bool, the client has sent no CR yet, neither before DATA (the
    argument) nor in it; false_end: bool, there was a line of a single dot
    that is not the end.
    size: int, bytes seen of the mail; amount: those that take() would return
    now; rest: None, or the bytes behind the mail."""

    END = b'\r\n.\r\n'
    LINE_END = re.compile(rb'\r{0,2}\n|\r')
    # QUIT may come in pieces; at most LF_TAIL bytes.
    _LF_END = re.compile(rb'\n\.\n(?:(?P<over>(?:QUIT\n?)?)|QUI?|Q)\Z',
                         re.IGNORECASE)
    _LF_TAIL = 8
    _DATA_LINE_END = re.compile(rb'\r{0,2}\n|\r(\.?)')
    # There are servers that drop NUL before they look. More than 199 of them
    # at the start of a line are cut, so that a line of nothing but NUL and a
    # dot is never so long that it is let go in pieces.
    _NULS = re.compile(rb'([\r\n]\0{0,199})\0*(\.?\0{0,199})\0*')
    _LONE_DOT = re.compile(rb'\r\n(?=\0*\.\0*(?:\r\n|\Z))')
    _OPEN_END = re.compile(rb'(?:\r{1,2}\0*(?:\.[\0\r]*)?)?\Z')

    def __init__(self, lf_only=False):
        self.lf_only, self.false_end = lf_only, False
        # The line end of DATA itself counts: an empty mail is '.' CRLF. So
        # a piece always begins with a line end, which is left out once.
        self._held, self._leave_out = b'\r\n', 2
        self._pieces, self.amount = [], 0
        self.size, self.rest = -self._leave_out, None

    def feed(self, data):
        """Takes bytes until rest is not None."""
        if b'\r' in data:
            self.lf_only = False
        self._take_in(self._held + data)

    def may_be_over(self):
        """Is the mail over if nothing more comes?"""
        match = self._LF_END.search(self._held) if self.lf_only else None
        return match is not None and match['over'] is not None

    def end(self):
        """Nothing more came: it is over."""
        behind, self._held = self._held.partition(b'\n.\n')[2], b''
        self._take_in(self.END + behind)

    def _take_in(self, data):
        """data: what was held and what is new."""
        if b'\0' in data:
            data = self._NULS.sub(rb'\1\2', data)
        # Large mails are base64, which knows no dot: one byte is found faster.
        cut = data.find(self.END) if b'.' in data else -1
        if cut < 0:
            cut = self._undecided(data)
            piece, self._held = self._normalised(data[:cut]), data[cut:]
            self.size += cut
        else:
            piece, self.rest = data[:cut], data[cut + len(self.END):]
            self.size += cut + 2
            if piece.endswith(b'\r'):
                piece = piece[:-1]          # CR CR LF
            piece = self._normalised(piece) + b'\r\n'
        if piece:
            self._pieces.append(piece[self._leave_out:])
            self.amount += len(piece)
            self._leave_out = 0

    def take(self):
        """The mail's bytes so far, as they may go out."""
        taken, self._pieces, self.amount = b''.join(self._pieces), [], 0
        return taken

    def _undecided(self, data):
        """Where in data the last line begins, together with the line end
        before it; of a very long line only what may become a lone dot."""
        cut = data.rfind(b'\n')
        if cut < 0 or len(data) - cut > LONG_LINE:
            return self._OPEN_END.search(
                data, max(0, len(data) - LONG_LINE)).start()
        if self.lf_only:
            tail = max(0, len(data) - self._LF_TAIL)
            end = self._LF_END.search(data, tail)
            cut = end.start() if end else cut
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
        piece, found = self._LONE_DOT.subn(
            b'\r\n.', self._DATA_LINE_END.sub(rb'\r\n\1\1', piece))
        self.false_end = self.false_end or found > 0
        return piece


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
# Several of them in one path. Where not each is a whole local@domain it is
# something else, such as the dial string of a fax gateway.
WHOLE = r'(?: %s | [^\s"@<>;,]+ ) @ [^\s"@<>;,]+' % QUOTED
EACH = re.compile(WHOLE, re.VERBOSE | re.DOTALL)
SEVERAL = re.compile(r'\s* %s (?: \s*[;,]\s* %s )+ \s* \Z' % (WHOLE, WHOLE),
                     re.VERBOSE | re.DOTALL)
SURROGATE = re.compile('[\ud800-\udfff]')           # was not UTF-8
SIZE = re.compile(r'[0-9]{0,20}\Z')
# What of these parameters may be handed on: no server has to understand what
# a client made up.
UNDERSTOOD = re.compile('BODY=(?:7BIT|8BITMIME)|SMTPUTF8',
                        re.IGNORECASE | re.ASCII)


def after(word, argument):
    """What follows 'FROM:' in all its spellings. Raises Refused."""
    said, colon, path = argument.partition(':')
    if said.strip().upper() != word or not colon:
        raise Refused(501, '5.5.4 %s:<address> is missing' % word)
    return path


def parse_path(text, status):
    """('a@b', {'SIZE': '1'}) of '<a@b> SIZE=1', in any of the dialects that
    devices speak. status: the X.Y.Z of a refusal. Raises Refused.

    The address is made here, once: all that is asked, stored, logged and sent
    is this string, and parse_path('<%s>' % address) gives it again."""
    path, words = split_path(text, status)
    return parse_address(path, status), parse_parameters(words)


def parse_recipients(text, status):
    """['a@b', 'c@d'] of '<a@b; c@d>', ['a;b@c'] of '<a;b@c>'. Raises Refused,
    also if only one of them is no address."""
    path = text
    if not SEVERAL.match(text):
        path, words = split_path(text, status)
        parse_parameters(words)
    paths = EACH.findall(path) if SEVERAL.match(path) else [path]
    return [parse_address(one, status) for one in paths]


def split_path(text, status):
    """('a@b', ['SIZE=1']) of 'Name <a@b> SIZE=1'. Raises Refused."""
    match = PATH.match(text.strip())
    if not match:
        raise Refused(501, status + ' give the address as <user@domain>')
    # RFC 5321 appendix C: a route is ignored. Who looked up an account for
    # '@relay:boss@x' and sent as 'boss@x' would ask for nobody's password.
    path = ROUTE.sub('', match['bare'] or match['bracketed'].strip())
    return path, match['parameters'].split()


def parse_address(address, status):
    """The one way to write this address. Raises Refused."""
    needless = NEEDLESS.match(address)
    if needless:
        address = needless[1].replace('\\', '') + address[needless.end():]
    if SURROGATE.search(address):
        raise Refused(553, '5.6.7 the address is neither ASCII nor UTF-8')
    if not ADDRESS.match(address):
        raise Refused(501, status + ' an address is user@domain, with quotes '
                      'around all of user or nowhere')
    return address


def parse_parameters(words):
    """{'SIZE': '1', 'SMTPUTF8': ''} of ['SIZE=1', 'SMTPUTF8']; raises
    Refused. Of BODY and SMTPUTF8 other values are taken and left out."""
    parameters = {}
    for word in words:
        keyword, _, value = word.partition('=')
        keyword = keyword.upper()
        if keyword not in PARAMETERS:
            raise Refused(555, '5.5.4 unknown parameter ' + printable(word))
        if keyword not in ('BODY', 'SMTPUTF8') or UNDERSTOOD.fullmatch(word):
            parameters[keyword] = value
    if not SIZE.match(parameters.get('SIZE', '')):
        raise Refused(501, '5.5.4 SIZE takes a number')
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


# --- Connection: one client's socket ----------------------------------------

class Connection:
    """One client's socket, which never waits. What has to wait is a
    generator: it is called by `yield from` and yields what it waits for.

    For the event loop: sock, client; resume(), close(); patience and deadline
    (seconds, and when they are over); watched (what the selector looks for),
    away (another thread has it in hand)."""

    _want_read = _want_write = ()   # what a TLS layer raises instead of EAGAIN

    def __init__(self, sock, client, patience):
        self.sock, self.client = sock, client
        self.patience, self.deadline = patience, 0.0
        self.watched, self.away = 0, False
        self._steps = self._converse()
        self._input, self._replies = b'', []
        self._lf_only = True            # no CR has come so far
        self._blocked = None

    def resume(self, thrown=None):
        """Does one step; returns what the next one waits for. thrown: a
        Closing that ends the conversation instead."""
        try:
            want = self._steps.throw(thrown) if thrown else next(self._steps)
        except StopIteration:
            want = None
        except BaseException:       # not even SystemExit may end a thread
            log.exception('%s: conversation ended by an error', self.client)
            want = None
        self.deadline = time.monotonic() + self.patience
        return want

    def close(self):
        if self.client.secure:          # tell a TLS client that this is all
            with contextlib.suppress(OSError, ValueError):
                self.sock.unwrap()
        self.sock.close()

    def _converse(self):
        """From the first byte to the last: for derived classes."""
        raise NotImplementedError

    # In.

    def _read_line(self, limit):
        """The next line (str; what is not UTF-8 as surrogates), LF or CRLF.
        Raises Refused if it has more than limit bytes."""
        too_long = False
        while b'\n' not in self._input:
            if len(self._input) > limit:
                self._input, too_long = b'', True
            self._input += yield from self._receive()
        line, _, self._input = self._input.partition(b'\n')
        if too_long or b'\r' in line:
            self._lf_only = False
        if too_long or len(line) > limit:
            raise Refused(500, '5.5.2 more than %d bytes in a line' % limit)
        return line.rstrip(b'\r').decode('utf-8', 'surrogateescape')

    def _receive(self):
        """The next bytes from the client, which gets its replies first."""
        if self._replies:
            yield from self._flush()
        data = yield from self._wait_for_bytes()
        if not data:
            raise Disconnected('closed the connection')
        return data

    def _receive_within(self, seconds):
        """The next bytes, but b'' or None if none come so soon, or ever."""
        yield from self._flush()
        usual, self.patience = self.patience, seconds
        try:
            return (yield from self._wait_for_bytes())
        except IdleTimeout:             # of a loop that may have been busy
            return self._receive_now()
        finally:
            self.patience = usual

    def _wait_for_bytes(self):
        """The next bytes, b'' if there will be none."""
        if not (self._want_read and self.sock.pending()):
            yield READ
        data = self._receive_now()
        while data is None:
            yield self._blocked
            data = self._receive_now()
        return data

    def _receive_now(self):
        """What is there of the next bytes, None if that is nothing yet, b''
        if there will be none."""
        return self._attempt(READ, self.sock.recv, CHUNK)

    def _attempt(self, usual, call, *arguments):
        """What a socket method returns. None if it has to wait: _blocked says
        what for, usual or what TLS asks for. Raises Disconnected."""
        self._blocked = None
        try:
            return call(*arguments)
        except BlockingIOError:
            self._blocked = usual
        except self._want_read:
            self._blocked = READ
        except self._want_write:
            self._blocked = WRITE
        except OSError as error:
            raise Disconnected('connection lost: %s' % error)

    # Out.

    def _reply(self, code, *lines):
        for line in lines[:-1]:
            self._replies.append(b'%d-%s\r\n' % (code, line.encode()))
        self._replies.append(b'%d %s\r\n' % (
            code, lines[-1].encode('utf-8', 'replace')))

    def _flush(self):
        """Sends all replies of a batch at once (RFC 2920)."""
        out, self._replies = b''.join(self._replies), []
        while out:
            sent = self._attempt(WRITE, self.sock.send, out)
            if self._blocked:
                yield self._blocked
            else:
                out = out[sent:]

    def _send_last(self, code, text):
        """Sends what still can be sent without waiting."""
        self._reply(code, text)
        with contextlib.suppress(OSError, ValueError):
            self.sock.send(b''.join(self._replies))

    # Time and TLS.

    def _pause(self, seconds):
        usual, self.patience = self.patience, seconds
        try:
            yield SLEEP
        except IdleTimeout:
            self.patience = usual

    def _secure(self, context):
        """Puts TLS around the socket. Every step of a handshake computes:
        none of them in the event loop. Raises Disconnected."""
        import ssl
        try:
            self.sock.getpeername()     # gone already? wrap_socket would leak
            self.sock = context.wrap_socket(
                self.sock, server_side=True, do_handshake_on_connect=False)
            self._want_read = ssl.SSLWantReadError
            self._want_write = ssl.SSLWantWriteError
            yield OFFLOAD
            self._attempt(READ, self.sock.do_handshake)
            while self._blocked:
                yield self._blocked
                yield OFFLOAD
                self._attempt(READ, self.sock.do_handshake)
        except (OSError, ValueError, Disconnected) as error:
            raise Disconnected('no TLS with this client: %s' % error,
                               logging.WARNING if 'SSL' in str(error)
                               else logging.DEBUG)
        self.client.secure = True


# --- Conversation: what is said over it -------------------------------------

VERBS = ('HELO', 'EHLO', 'MAIL', 'RCPT', 'DATA', 'RSET', 'NOOP', 'VRFY',
         'EXPN', 'HELP', 'AUTH', 'STARTTLS', 'QUIT')
WEB = ('GET', 'POST', 'HEAD', 'PUT', 'OPTIONS', 'CONNECT')
MAIL_ENDS = ('a mail ends with CRLF.CRLF, or with LF.LF and nothing behind it '
             'if the client sends no CR at all')


def parse_plain(answer):
    """(user, password) of AUTH PLAIN, RFC 4616. Raises Refused."""
    if answer.count('\0') != 2:
        raise Refused(501, '5.5.2 that is not AUTH PLAIN')
    return answer.split('\0')[1:]


def parse_xoauth2(answer):
    """(user, token) of Google's and Microsoft's mechanism. Raises Refused."""
    match = re.fullmatch('user=(.*)\1auth=Bearer (.*)\1\1', answer)
    if not match:
        raise Refused(501, '5.5.2 that is not AUTH XOAUTH2')
    return match.groups()


class Authentication(Connection):
    """AUTH, RFC 4954: how a client signs in. Part of a Conversation."""

    def _do_AUTH(self, argument):
        if self.client.user is not None:
            raise Refused(503, '5.5.1 already signed in')
        if self._sender is not None:
            raise Refused(503, '5.5.1 not during a mail')
        mechanism, _, initial = argument.partition(' ')
        if mechanism.upper() not in self._session.mechanisms:
            raise Refused(504, '5.5.4 AUTH takes '
                          + ' or '.join(self._session.mechanisms))
        ask = getattr(self, '_auth_' + mechanism.lower())
        user, password = yield from ask(initial.strip())
        yield OFFLOAD
        try:
            self._session.auth(user, password)
        except Refused:
            yield from self._pause(AUTH_PAUSE)      # no guessing by the score
            raise
        self.client.user, self._hushed = user, False
        self._reply(235, '2.7.0 signed in')
        yield RESUME

    def _auth_plain(self, initial):
        return parse_plain((yield from self._answer_to('', initial)))

    def _auth_login(self, initial):
        """Old clients compare these challenges letter by letter."""
        user = yield from self._answer_to('VXNlcm5hbWU6', initial)
        return user, (yield from self._challenge('UGFzc3dvcmQ6'))

    def _auth_xoauth2(self, initial):
        return parse_xoauth2((yield from self._answer_to('', initial)))

    def _answer_to(self, text, initial):
        """It may have come with the command."""
        return decode64(initial) if initial else (
            yield from self._challenge(text))

    def _challenge(self, text):
        """Asks; returns the decoded answer. The blank behind 334 is needed
        by clients that wait for a line whose fourth byte is one."""
        self._reply(334, text)
        answer = yield from self._read_line(AUTH_LINE)
        if answer.strip() == '*':
            raise Refused(501, '5.7.0 cancelled')
        return decode64(answer)


class Conversation(Authentication):
    """One client's commands and our replies. Its state is what the client has
    said so far: client.hello, client.user, _sender, _recipients."""

    def __init__(self, server, sock, client, tls):
        """tls: an ssl.SSLContext if TLS begins at once, or None."""
        super().__init__(sock, client, server.limits.timeout)
        self._server, self._limits = server, server.limits
        self._session = server.make_session(client)
        self._tls_at_once = tls
        self._errors, self._leaving = 0, False
        self._hushed = False            # what comes may be a password
        self._sender = self._parameters = None
        self._recipients = []

    # As a whole.

    def _converse(self):
        """From the greeting to the goodbye."""
        try:
            if self._tls_at_once:
                yield from self._secure(self._tls_at_once)
            self._reply(220, '%s ESMTP ready' % self._server.hostname)
            self._input = yield from self._receive()
            if self._input[:1] == b'\x16':
                raise Disconnected('speaks TLS from the start: that is for '
                                   'tlsport', logging.WARNING)
            while not self._leaving:
                yield from self._obey()
            yield from self._flush()
        except Closing as closing:
            log.debug('%s: dismissed: %s', self.client, closing)
            self._send_last(421, str(closing))
        except Disconnected as why:
            log.log(why.level, '%s: %s', self.client, why)
        finally:
            self._call(self._session.closed)

    def _obey(self):
        """One command and its reply. One empty line before it is ignored: the
        client would take a 500 for the reply to its next command."""
        verb = None
        try:
            line = yield from self._read_line(COMMAND_LINE)
            if not line:        # some send one behind a mail (ESPEasy#5121)
                line = yield from self._read_line(COMMAND_LINE)
            verb, argument = self._parse_command(line)
            waiting = getattr(self, '_do_' + verb)(argument)
            if waiting is not None:
                yield from waiting
        except Refused as no:
            self._refuse(no, verb)
        except (Closing, Disconnected, GeneratorExit):
            raise
        except BaseException:           # a hook's sys.exit() is one, too
            log.exception('%s: answered 451', self.client)
            self._refuse(Refused(451, '4.3.0 an error here; try again later'))

    def _refuse(self, no, verb=None):
        log.log(logging.WARNING if verb in ('MAIL', 'RCPT', 'DATA', 'AUTH')
                else logging.DEBUG, '%s: answered %s with %s', self.client,
                verb or 'a line', no)
        self._reply(no.code, no.text)
        self._errors += no.code >= 500
        if self._errors > ERRORS:
            raise Closing('4.7.0 too many errors')

    def _call(self, hook):
        """Calls a hook whose failure must not change the reply."""
        try:
            hook()
        except BaseException:
            log.exception('%s: in %s', self.client, hook)

    def _parse_command(self, line):
        verb, argument = (line.split(None, 1) + ['', ''])[:2]
        verb = verb.upper()
        if verb.startswith('AUTH'):
            self._hushed = True
        if log.isEnabledFor(logging.DEBUG):
            log.debug('%s: %s', self.client, self._shown(verb, argument))
        if verb in VERBS:
            return verb, argument.strip()
        if verb in WEB:
            raise Disconnected('speaks HTTP, this is for mail',
                               logging.WARNING)
        raise Refused(500, '5.5.2 unknown command' + (
            '' if self._hushed else ' ' + printable(verb)))

    def _shown(self, verb, argument):
        """A command as the log may show it. A client that is refused at AUTH
        may go on with its name and password: until it has signed in or begun
        a mail, only verbs are shown."""
        if self._hushed:
            return (verb if verb in VERBS else 'a line') + ' ...'
        return printable(verb) + ' ' + ascii(argument)[1:-1]

    # Hello, and what needs no mail.

    def _do_HELO(self, name):
        self._say_hello(name, False)
        self._reply(250, self._server.hostname)

    def _do_EHLO(self, name):
        self._say_hello(name, True)
        offers = [self._server.hostname, 'PIPELINING', '8BITMIME',
                  'SIZE %d' % self._limits.maxsize, 'SMTPUTF8',
                  'ENHANCEDSTATUSCODES']
        for form in 'AUTH ', 'AUTH=':       # the second: before RFC 2554
            offers.append(form + ' '.join(self._session.mechanisms))
        if self._limits.tls and not self.client.secure:
            offers.append('STARTTLS')
        self._reply(250, *offers)

    def _say_hello(self, name, extended):
        """Any name will do, and none (RFC 5321 4.1.4): it is a device."""
        self._forget()
        self._session.hello(name)
        self.client.hello, self.client.extended = name, extended

    def _do_NOOP(self, _):
        self._reply(250, '2.0.0 ok')

    def _do_VRFY(self, _):
        self._reply(252, '2.1.5 send it and see')

    def _do_EXPN(self, _):
        raise Refused(502, '5.5.1 no lists here')

    def _do_HELP(self, _):
        self._reply(214, '2.0.0 ' + ' '.join(VERBS))

    def _do_QUIT(self, _):
        self._leaving = True
        self._reply(221, '2.0.0 bye')

    # TLS and login.

    def _do_STARTTLS(self, _):
        if not self._limits.tls or self.client.secure:
            raise Refused(502, '5.5.1 no TLS to be had')
        self._reply(220, '2.0.0 go ahead')
        yield from self._flush()
        # What came in clear text behind the command could be anybody's, and
        # so could the name (RFC 3207 section 4.2; CVE-2011-0411).
        self._input = b''
        self._forget()
        self.client.hello = self.client.user = None
        self._lf_only = True
        yield from self._secure(self._limits.tls)

    # A mail.

    def _do_MAIL(self, argument):
        if self._sender is not None:
            raise Refused(503, '5.5.1 one mail at a time')
        sender, parameters = parse_path(after('FROM', argument), '5.1.7')
        self._check_size(int(parameters.get('SIZE') or 0))
        self._session.mail(sender, parameters)
        self._sender, self._parameters = sender, parameters
        self._hushed = False
        self._reply(250, '2.1.0 sender ok')

    def _do_RCPT(self, argument):
        if self._sender is None:
            raise Refused(503, '5.5.1 MAIL comes first')
        named = dict.fromkeys(
            parse_recipients(after('TO', argument), '5.1.3'))
        if '' in named:
            raise Refused(550, '5.1.3 a recipient needs an address')
        new = [one for one in named if one not in self._recipients]
        if len(self._recipients) + len(new) > RECIPIENTS:
            raise Refused(452, '4.5.3 %d recipients a mail' % RECIPIENTS)
        for recipient in new:
            self._session.rcpt(recipient)
        self._recipients.extend(new)
        self._reply(250, '2.1.5 recipient ok')

    def _check_size(self, size):
        if size > self._limits.maxsize:
            raise Refused(552, '5.3.4 a mail may have %d bytes'
                          % self._limits.maxsize)

    def _do_RSET(self, _):
        self._forget()
        self._reply(250, '2.0.0 ok')

    def _forget(self):
        self._sender = self._parameters = None
        self._recipients = []
        self._call(self._session.reset)

    def _do_DATA(self, _):
        if not self._recipients:
            raise Refused(503, '5.5.1 no valid recipients')
        message = self._session.data(
            self._sender, self._recipients, self._parameters)
        self._reply(354, 'end with <CRLF>.<CRLF>')
        reader = DataReader(self._lf_only)
        try:
            text = yield from self._take_mail(message, reader)
        except BaseException as error:
            yield from self._give_up(message, reader, error)
            raise
        finally:
            self._input = reader.rest or b''
            self._lf_only = reader.lf_only
            self._forget()
        self._errors = 0
        self._reply(250, str(text or '2.0.0 accepted'))

    def _take_mail(self, message, reader):
        """The bytes of a mail into message; returns the text of the 250."""
        if self._input:
            self._feed(reader, self._input)
        last_steps = COMMIT
        while reader.rest is None:
            if reader.amount < CHUNK:
                yield from self._receive_mail(reader)
                continue
            last_steps = OFFLOAD        # no small mail waits for its sync
            yield OFFLOAD
            self._write_large(message, reader)
            if reader.rest is None:
                yield from self._receive_mail(reader)
        self._check_size(reader.size)
        yield last_steps
        message.write(reader.take())
        message.seal()
        yield last_steps
        text = message.commit()
        yield RESUME
        return text

    def _receive_mail(self, reader):
        """What comes next of a mail, or the silence that ends it."""
        if not reader.may_be_over():
            self._feed(reader, (yield from self._receive()))
            return
        data = yield from self._receive_within(LF_SILENCE)
        if data:
            self._feed(reader, data)
        else:
            reader.end()

    def _feed(self, reader, data):
        """data into reader; a dot that does not end the mail is a warning."""
        known = reader.false_end
        reader.feed(data)
        if reader.false_end and not known:
            log.warning('%s: in the mail from <%s> is a line of a single dot '
                        'that is not its end: %s', self.client, self._sender,
                        MAIL_ENDS)

    def _write_large(self, message, reader):
        """By a worker: writes what is there, and on while more is there at
        once: to change threads for each piece costs a third of the speed.
        Ends when there is no more, its turn is over or the server stops."""
        for _ in range(TURN):
            self._check_size(reader.size)
            message.write(reader.take())
            while reader.amount < CHUNK:
                data = None if self._server.stopping else self._receive_now()
                if data:
                    self._feed(reader, data)
                if not data or reader.rest is not None:
                    return

    def _give_up(self, message, reader, error):
        """The mail will not be completed. What still comes of it is thrown
        away: it must not be taken for commands."""
        if isinstance(error, GeneratorExit):    # Python's: may not wait
            self._call(message.abort)
            return
        yield OFFLOAD
        self._call(message.abort)
        yield RESUME
        if isinstance(error, (Closing, Disconnected)):
            why = ('its line of a single dot is not an end'
                   if reader.false_end else 'the dot at its end is missing')
            log.warning('%s: the mail from <%s> was never completed, nothing '
                        'of it is kept: %s; %s: %s', self.client, self._sender,
                        error, why, MAIL_ENDS)
            return
        while reader.rest is None:
            reader.take()
            yield from self._receive_mail(reader)


# --- Server: sockets and threads --------------------------------------------

QUICK = 0.005           # seconds; a disk that takes longer is waited for


class DiskThread:
    """Does the steps that wait for the disk, as a group commit: all mails
    that wait take one step before any takes the next. hand_back: callable([(a
    connection, what its next step waits for)]). is_quick: bool, so was the
    disk at the last step."""

    def __init__(self, hand_back):
        self._hand_back = hand_back
        self.is_quick = False
        self._waiting = queue.SimpleQueue()     # connections; None: the end
        self._thread = threading.Thread(
            target=self._run, name='smtp-disk', daemon=True)

    def start(self):
        """Raises RuntimeError."""
        self._thread.start()

    def submit(self, connection):
        self._waiting.put(connection)

    def commit(self, connection):
        """One step, in any thread; returns what the next one waits for."""
        began = time.monotonic()
        want = connection.resume()
        self.is_quick = time.monotonic() - began < QUICK
        return want

    def close(self):
        self._waiting.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def _run(self):
        for connection in iter(self._waiting.get, None):
            self._commit_all([connection] + [
                self._waiting.get() for _ in range(self._waiting.qsize())])

    def _commit_all(self, group):
        while group:
            steps = [(c, self.commit(c)) for c in group]
            group = [c for c, want in steps if want == COMMIT]
            self._hand_back([step for step in steps if step[1] != COMMIT])


class WorkerPool:
    """Does the steps that may take long otherwise, in up to WORKERS threads:
    one more is started when all have something to do. hand_back: see
    DiskThread. The lock guards _unfinished; all else is submit()'s, which the
    event loop calls, and close()'s, when that has ended."""

    def __init__(self, hand_back):
        self._hand_back = hand_back
        self._waiting = queue.SimpleQueue()     # connections; None: the end
        self._lock = threading.Lock()
        self._threads, self._unfinished = [], 0
        self._is_short = False          # the log has it

    def submit(self, connection):
        with self._lock:
            if len(self._threads) <= min(self._unfinished, WORKERS - 1):
                self._start_thread()
            if self._threads:
                self._unfinished += 1
                self._waiting.put(connection)
                return
        # This box has no thread for us: clients wait for each other.
        self._hand_back([(connection, connection.resume())])

    def _start_thread(self):
        """One more, if it can be had."""
        thread = threading.Thread(target=self._run, daemon=True,
                                  name='smtp-%d' % (len(self._threads) + 1))
        try:
            thread.start()
            self._threads.append(thread)
            self._is_short = False
        except RuntimeError as error:
            if not self._is_short:
                log.warning('no more threads: %s; clients wait for each other',
                            error)
            self._is_short = True

    def _run(self):
        for connection in iter(self._waiting.get, None):
            want = connection.resume()
            with self._lock:
                self._unfinished -= 1
            self._hand_back([(connection, want)])

    def close(self):
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()


class Server:
    """Listens, and serves every client that it has room for.

    make_session: callable(Client) -> Session; limits: Limits, read anew for
    each client; both may be replaced while the server runs. hostname: str,
    its name in replies. listeners: the sockets; stopping: bool."""

    def __init__(self, make_session=Session, limits=Limits(), hostname=None):
        self.make_session, self.limits = make_session, limits
        self.hostname = hostname or socket.gethostname()
        self.listeners, self.stopping = [], False
        self._loop = threading.Thread(
            target=self._run, name='smtp-loop', daemon=True)
        self._disk = DiskThread(self._hand_back)
        self._workers = WorkerPool(self._hand_back)
        # How a conversation comes back to the event loop.
        self._handed_back = collections.deque()     # (connection, want)
        self._asleep = False                # somebody has to wake it
        self._wake_up, self._waker = socket.socketpair()

        self._selector = selectors.DefaultSelector()
        self._connections = set()
        self._next_expiry = FOREVER         # when one may be idle for too long
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
                self._accept, sock, tls))

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
        except TypeError as error:      # a name that has no form for DNS
            sock.close()
            raise OSError(errno.EINVAL, str(error))
        except BaseException:
            sock.close()
            raise
        return sock

    def start(self):
        """Serves from now on, in threads of its own. Raises RuntimeError if
        they can't be had; then stop() is needed as well."""
        self._selector.register(self._wake_up, READ, functools.partial(
            self._wake_up.recv, 64))
        self._disk.start()
        self._loop.start()

    def stop(self, grace=8.0):
        """No new clients; who is between the final dot and the 250 gets it,
        within grace seconds; all others a 421. Returns when done."""
        if self.stopping:
            return
        self.stopping = True
        self._waker.send(b'.')
        if self._loop.is_alive():           # else it was never started
            self._loop.join(grace)
        for sock in self.listeners:
            sock.close()
        if self._loop.is_alive():
            return              # past its grace, it still needs the rest
        self._disk.close()
        self._workers.close()
        for thing in self._wake_up, self._waker, self._spare, self._selector:
            thing.close()

    def _hand_back(self, steps):
        """Called by the threads that have done them: [(connection, want)]."""
        self._handed_back.extend(steps)
        if steps and self._asleep:
            self._asleep = False
            self._waker.send(b'.')

    # The event loop.

    def _run(self):
        while self._connections or not self.stopping:
            self._asleep = True     # first: who hands back now will wake us
            events = self._selector.select(
                0 if self._handed_back else self._timeout())
            self._asleep = False
            for key, _ in events:
                self._try(key.data)
            while self._handed_back:
                connection, want = self._handed_back.popleft()
                connection.away = False
                self._try(self._drive, connection, want)
            if time.monotonic() >= self._next_expiry:
                self._expire_idle()
            if self.stopping:
                self._close_up()

    def _timeout(self):
        """Seconds until a client may have been idle for too long."""
        if not self._connections:
            self._next_expiry = FOREVER
        if self._next_expiry == FOREVER:
            return None
        return min(max(0.0, self._next_expiry - time.monotonic()), DAY)

    @staticmethod
    def _try(step, *arguments):
        try:
            step(*arguments)
        except BaseException:           # without the loop nobody is served
            log.exception('a client is lost by an error')

    def _on_ready(self, connection, thrown=None):
        """The client did what its conversation waits for; or thrown it is."""
        if connection.away:
            self._watch(connection, 0)          # heard when it is back
        else:
            self._drive(connection, connection.resume(thrown))

    def _drive(self, connection, want):
        """Brings a conversation to whoever does its next step. want: what
        that waits for."""
        while want == RESUME or want == COMMIT and self._may_commit():
            want = (self._disk.commit(connection) if want == COMMIT
                    else connection.resume())
        connection.away = want in (OFFLOAD, COMMIT)
        if want == OFFLOAD:
            self._workers.submit(connection)
        elif want == COMMIT:
            self._disk.submit(connection)
        elif want is None:
            self._watch(connection, 0)
            self._connections.discard(connection)
            connection.close()
        else:
            self._next_expiry = min(self._next_expiry, connection.deadline)
            self._watch(connection, want)

    def _may_commit(self):
        """Whether the loop may wait for the disk by itself: to change threads
        twice costs a mail a tenth of its time, and of a lone client nobody
        else has to wait, but who comes just when the disk becomes slow."""
        return len(self._connections) == 1 and self._disk.is_quick

    def _watch(self, connection, events):
        """Has the selector look for READ or WRITE, or for neither."""
        if events == connection.watched:
            return
        if connection.watched:
            self._selector.unregister(connection.sock)
            connection.watched = 0
        if events:
            self._selector.register(
                connection.sock, events,
                functools.partial(self._on_ready, connection))
            connection.watched = events

    def _idle(self):
        """The connections that wait for their clients."""
        return [c for c in self._connections if not c.away]

    def _expire_idle(self):
        now = time.monotonic()
        for connection in self._idle():
            if connection.deadline <= now:
                self._try(self._on_ready, connection, IdleTimeout(
                    '4.4.2 silent for %d seconds' % connection.patience))
        self._next_expiry = min(
            (c.deadline if c.deadline > now else now + c.patience
             for c in self._connections), default=FOREVER)

    def _close_up(self):
        """Nobody comes in, and who waits for his client goes."""
        while self.listeners:
            sock = self.listeners.pop()
            self._selector.unregister(sock)
            sock.close()
        for connection in self._idle():
            self._try(self._on_ready, connection,
                      Closing('4.3.2 shutting down'))

    # New clients.

    def _accept(self, listener, tls):
        try:
            sock, peer = listener.accept()
        except (BlockingIOError, ConnectionError):
            return                              # gone again
        except OSError as error:
            self._turn_away(listener, error)
            return
        client = Client(peer[0].partition('%')[0], peer[1])    # fe80::1%eth0
        context = self.limits.tls if tls else None
        refusal = self._refusal(client.address)
        if tls and not context:         # never clear text where TLS is meant
            refusal = '421 4.7.0 this port has no certificate any more'
        if refusal:
            log.warning('%s: refused: %s', client.address, refusal)
            with contextlib.suppress(OSError, ValueError):
                sock.send(b'%s\r\n' % refusal.encode())
            sock.close()
            return
        sock.setblocking(False)
        try:
            connection = Conversation(self, sock, client, context)
        except BaseException:
            log.exception('%s: no session for this client', client.address)
            sock.close()
            return
        self._connections.add(connection)
        log.debug('%s: connected', client)
        self._on_ready(connection)

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
        self._on_ready(min(idle, key=lambda c: c.deadline), Closing(
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
ADDRESS_TIME = 10       # seconds of these for one of several addresses
REPLY_TIME = 60         # seconds for a whole reply
DOT_TIME = 600          # seconds; RFC 5321 4.5.3.2.6: no second copies
QUIT_TIME = 5           # seconds for a goodbye that nothing depends on
REPLY_SIZE = 65536      # bytes of a whole reply

BODIES = '7BIT', '8BITMIME'     # RFC 6152; what we can say of a mail
AHEAD = 50              # recipients of an envelope behind a dot: one that
                        # fills the send buffer may cost us the 250 of the mail
                        # before, if the server hangs up then
TOO_MANY = 452, 552             # recipients, at RCPT
NOT_ASKED = 503, 'not asked for'


def unwatched(step, found):
    """What is done on the way to a server is told to such a callable. step:
    str; found: 'name', the name and the list of its addresses (str);
    'connect', the address and port that took the connection; 'TLS', the
    socket that is secure now; 'greeting', its text (str)."""


def connect(host, port, seconds, tls=None, watch=unwatched,
            family=socket.AF_UNSPEC):
    """A socket, connected within so many seconds, and with TLS from the first
    byte if tls, an ssl.SSLContext, is given. Each address of the name gets a
    part of the time, first one of each family: an IPv6 that leads nowhere
    costs seconds only. family: AF_INET or AF_INET6 if no other will do.
    Raises as Delivery."""
    end = time.monotonic() + seconds
    found = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)
    first = {one[0]: one for one in reversed(found)}.values()
    found.sort(key=lambda one: one not in first)
    watch('name', (host, [where[0] for *_, where in found]))
    trouble = OSError('no address')
    for family, kind, protocol, _, where in found:
        left = end - time.monotonic()
        if left <= 0:
            raise socket.timeout('timed out')
        try:
            sock = connected(family, kind, protocol, where, min(
                left, ADDRESS_TIME if len(found) > 1 else left))
        except OSError as error:
            trouble = error
            continue
        watch('connect', where[:2])
        sock.settimeout(seconds)
        return secured(sock, host, tls, watch) if tls else sock
    raise trouble


def connected(family, kind, protocol, where, seconds):
    """A socket of one address. Raises OSError."""
    sock = socket.socket(family, kind, protocol)
    try:
        sock.settimeout(seconds)
        sock.connect(where)
        return sock
    except BaseException:
        sock.close()
        raise


def secured(sock, host, tls, watch=unwatched):
    """The socket with TLS around it. Raises OSError, then it is closed."""
    try:
        sock = tls.wrap_socket(sock, server_hostname=host)
    except BaseException:
        sock.close()
        raise
    watch('TLS', sock)
    return sock


class ServiceClosing(OSError):
    """The server said 421 before it got any content. stage: str, what it was
    said to: mail, rcpt or data; text: str, what is behind the code."""

    def __init__(self, stage, text):
        super().__init__('421 ' + text)
        self.stage, self.text = stage, text


class ServiceUnavailable(ServiceClosing):
    """It was said to MAIL, so it is no answer to this mail: the server has
    trouble of its own."""


class Envelope(NamedTuple):
    """sender: str, '' for the null sender; recipients: list of str, each one
    once; all are bare addresses. parameters of MAIL: dict of upper-case
    keyword -> str; those that we understand (BODY=7BIT, BODY=8BITMIME,
    SMTPUTF8) go along to a server that offers them. size: bytes of the
    message, 0 if not known."""
    sender: str
    recipients: list
    parameters: dict = {}
    size: int = 0

    def needs_utf8(self):
        """RFC 6531: an address that only an SMTPUTF8 server understands. No
        header is a reason to refuse a mail: many clients ask for SMTPUTF8
        wherever it is offered, and servers take raw UTF-8 there."""
        return not (self.sender + ''.join(self.recipients)).isascii()


class FilePart(NamedTuple):
    """The bytes from start to end (int) of a binary file that is open."""
    file: object
    start: int
    end: int


def folded(content, at_blanks=False):
    """content (bytes or FilePart, lines end with CRLF) in pieces (bytes) whose
    lines have at most TEXT_LINE bytes: longer ones go on in a new line that
    begins with a blank. at_blanks: such a line is broken before a blank of its
    own, if there is one, as a header may be (RFC 5322 2.2.3). Raises OSError.
    """
    if isinstance(content, bytes):
        content = FilePart(io.BytesIO(content), 0, len(content))
    file, left = content.file, content.end - content.start
    file.seek(content.start)
    line, piece = b'', bytearray()
    while left:
        more = file.readline(min(left, LONG_LINE - len(line)))
        if not more:
            raise OSError('the file of this mail has become shorter')
        line, left = line + more, left - len(more)
        if len(line) < LONG_LINE or line.endswith(b'\n'):
            begin, line = line, b''
        else:
            begin, line = broken(line, at_blanks)
        piece += begin
        if len(piece) >= CHUNK:
            yield bytes(piece)
            piece.clear()
    yield bytes(piece) + line


def broken(line, at_blanks):
    """A line (bytes) that is too long, in two."""
    at = max(line.rfind(b' ', 0, TEXT_LINE + 1),
             line.rfind(b'\t', 0, TEXT_LINE + 1)) if at_blanks else 0
    if line[:max(at, 0)].strip():
        return line[:at] + b'\r\n', line[at:]
    at = TEXT_LINE
    while line[at] & 0xC0 == 0x80 and at > TEXT_LINE - 3:   # inside of UTF-8
        at -= 1
    return line[:at] + b'\r\n', b' ' + line[at:]


class Report:
    """What became of each recipient at one attempt.

    sent, later, never: {recipient: reply (str)}: accepted; refused for now;
    refused for good. stages: {recipient: what the reply was to}: mail, rcpt,
    data or dot; '' if no server said it. open: list of those without a verdict
    yet. error: None, or the OSError that ended the connection before all had
    theirs. unanswered: bool, it ended behind the final dot, so those may have
    the mail. crowded: bool, some of later were too many for one transaction:
    if there are any in sent, the rest may go with the next one, at once."""

    def __init__(self, recipients):
        self.open, self.error = list(recipients), None
        self.unanswered = self.crowded = False
        self.sent, self.later, self.never, self.stages = {}, {}, {}, {}

    def settle(self, recipient, code, text, stage=''):
        """Files a recipient under what the code means."""
        verdict = self.sent if 200 <= code < 300 else (
            self.never if 500 <= code < 600 else self.later)
        verdict[recipient], self.stages[recipient] = '%d %s' % (
            code, text), stage
        self.open.remove(recipient)

    def _settle_recipients(self, replies):
        """Files who was refused at RCPT; replies: [(code, text)]. Where some
        are taken, 552 says as 452 does that these are too many for one
        transaction (RFC 5321 4.5.3.1.10). If it meant them, it will say so
        when they come without the others."""
        refused = [(recipient, reply) for recipient, reply in zip(
            self.open, replies) if reply[0] >= 300]
        some_are_taken = len(refused) < len(self.open)
        for recipient, (code, text) in refused:
            if some_are_taken and code in TOO_MANY:
                self.crowded, code = True, 452
            self.settle(recipient, code, text, 'rcpt')

    def settle_envelope(self, mail, recipients, data):
        """Files those who were refused; True if the server waits for the
        content. mail, data: (code, text), recipients: a list of them. Raises
        OSError if the replies make no sense."""
        if mail[0] >= 300:
            self.settle_all(*mail, 'mail')
        self._settle_recipients(recipients)
        if data[0] == 354:
            return True
        if data[0] < 400:
            raise OSError('DATA was answered %d %s' % data)
        self.settle_all(*data, 'data')
        return False

    def settle_all(self, code, text, stage=''):
        """One reply for all that are open."""
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


def is_silence(error):
    """Whether an exception says that the other end was silent for so long."""
    return isinstance(error, socket.timeout) or isinstance(
        getattr(error, '__context__', None), socket.timeout)


def address_literal(address):
    """An IP address (str) as a name in EHLO (RFC 5321 4.1.3)."""
    address = address.partition('%')[0]     # fe80::1%eth0
    return '[%s%s]' % ('IPv6:' if ':' in address else '', address)


class SmtpDialogue:
    """Mixed into smtplib's classes: replies are bounded, and the dialogue
    goes to our log, without secrets."""

    def __init__(self, host, port, name, tls, redact, debuglevel, watch,
                 family):
        # The constructor of smtplib connects, and that uses these.
        self.tls, self.watch = tls, watch
        self.redact, self.debuglevel = redact, debuglevel
        self.family = family
        self.secret, self.reply_time = False, None
        super().__init__(host, port, name, timeout=CONNECT_TIME)

    def connect(self, host, port):
        code, text = super().connect(host, port)
        if code == 220:
            self.watch('greeting', plain(text))
        return code, text

    def _get_socket(self, host, port, timeout):
        return connect(host, port, timeout, self.tls, self.watch, self.family)

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
def dialogue_class():
    """Made when first needed, since smtplib alone costs a small box nine
    megabytes."""
    import smtplib
    return type('Smtp', (SmtpDialogue, smtplib.SMTP), {})


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
    be taken back. So what following() returned must be sent next. Some
    servers, and virus scanners in between, offer it and read one command of a
    packet: see is_silence().

    used: bool, a mail has gone this way, be it refused. stepwise: bool, may
    be set: one command at a time, whatever the server offers."""

    def __init__(self, host, port, name, tls=None, redact=str, debuglevel=0,
                 watch=unwatched, family=socket.AF_UNSPEC):
        """Connects and hears the greeting. host: str; name: str, for EHLO, ''
        for the address of our end; tls: an ssl.SSLContext if TLS begins at
        once; redact: callable(str) -> str, takes secrets out of what the
        server says; debuglevel: 1 or more logs the dialogue at INFO; watch:
        see unwatched(); family: AF_INET or AF_INET6 if no other will do.
        Raises OSError, ValueError or LookupError (an impossible host name),
        ImportError."""
        self._host, self._port = host, port
        self._redact, self._debuglevel = redact, debuglevel
        self._smtp = dialogue_class()(
            host, port, name, tls, redact, debuglevel, watch, family)
        self._smtp.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._smtp.local_hostname = name or address_literal(
            self._smtp.sock.getsockname()[0])
        self._under_way = None      # the Envelope behind the last final dot
        self._unfinished = False    # a transaction needs RSET
        self.used = self.stepwise = False

    @property
    def connected(self):
        return self._smtp is not None

    @property
    def pipelining(self):
        """Commands are sent before the ones before them are answered."""
        return not self.stepwise and self.offers('pipelining') is not None

    # Before the mail.

    def hello(self):
        """EHLO, or HELO if it must be. Raises OSError."""
        code, text = self._smtp.ehlo()
        if code >= 500:
            with contextlib.suppress(OSError):  # it has said why it hangs up
                code, text = self._smtp.helo()
        if code >= 300:
            raise OSError('%d %s' % (code, plain(text)))

    def offers(self, extension):
        """What EHLO said behind that word (str), or None."""
        return self._smtp.esmtp_features.get(extension.lower())

    def offered(self):
        """All that EHLO said, 'SIZE 1000' and so on, a list of str."""
        return [' '.join([name.upper(), *dict.fromkeys(value.split())])
                for name, value in self._smtp.esmtp_features.items()]

    def start_tls(self, context):
        """STARTTLS and a new EHLO. Raises OSError if it is not to be had:
        never go on in plain text then."""
        self._smtp.starttls(context=context)
        self._smtp.watch('TLS', self._smtp.sock)
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

        header: bytes, its lines as on the wire; body: bytes, FilePart or an
        iterable of bytes, as on the wire (dots doubled, no final dot), from
        the empty line on.
        following: callable() -> the Envelope of the mail that will be sent
        next, or None; asked once, when the server wants this mail's content.
        """
        if not self.connected:
            raise OSError('the connection is closed')
        report = Report(envelope.recipients)
        refusal = self._refusal_of(envelope)
        if refusal:
            report.settle_all(*refusal)
            return report
        replies = self._begin(envelope)
        try:
            if report.settle_envelope(*replies):
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

    def _refusal_of(self, envelope):
        """(code, text) if the server need not be asked, else None."""
        if envelope.needs_utf8() and self.offers('smtputf8') is None:
            return 550, '5.6.7 needs SMTPUTF8, which %s:%d does not offer' % (
                self._host, self._port)
        largest = self.offers('size') or ''     # 0: it has no limit
        if largest.isdecimal() and 0 < int(largest) < envelope.size:
            return 552, '5.3.4 it has %d bytes, %s:%d takes %s at most' % (
                envelope.size, self._host, self._port, largest)
        return None

    def _begin(self, envelope):
        """MAIL, RCPT, DATA; returns the replies: MAIL's, a list of RCPT's,
        DATA's. Raises OSError."""
        try:
            if self._under_way not in (None, envelope):
                raise ValueError('the envelope of another mail is under way')
            if self._unfinished:
                self._command(b'RSET\r\n', 'mail')
            self._unfinished = True
            if not self.pipelining:
                return self._one_by_one(*self._commands(envelope))
            if self._under_way is None:
                self._send(self._packet(envelope))
            self._under_way = None
            return (self._reply('mail'),
                    [self._reply('rcpt') for _ in envelope.recipients],
                    self._reply('data'))
        except Exception:
            self.close()
            raise

    def _one_by_one(self, mail, recipients, data):
        """Without PIPELINING. What makes no sense after a refusal is not
        asked for."""
        reply = self._command(mail, 'mail')
        if reply[0] >= 300:
            return reply, [], NOT_ASKED
        replies = [self._command(recipient, 'rcpt')
                   for recipient in recipients]
        if all(code >= 300 for code, _ in replies):
            return reply, replies, NOT_ASKED
        return reply, replies, self._command(data, 'data')

    def _commands(self, envelope):
        """The envelope as command lines (bytes): MAIL, [RCPT], DATA."""
        mail = 'MAIL FROM:<%s>' % envelope.sender + self._parameters(envelope)
        lines = [mail] + ['RCPT TO:<%s>' % address
                          for address in envelope.recipients]
        if any('\r' in line or '\n' in line for line in lines):
            raise ValueError('an address with a line end')
        mail, *recipients = [line.encode() + b'\r\n' for line in lines]
        return mail, recipients, b'DATA\r\n'

    def _parameters(self, envelope):
        """What goes behind the sender (str)."""
        words, asked = '', envelope.parameters
        body = asked.get('BODY', '').upper()
        if body in BODIES and self.offers('8bitmime') is not None:
            words += ' BODY=' + body
        if envelope.needs_utf8() or asked.get('SMTPUTF8') == '' and (
                self.offers('smtputf8') is not None):
            words += ' SMTPUTF8'
        if envelope.size and self.offers('size') is not None:
            words += ' SIZE=%d' % envelope.size
        return words

    def _finish(self, report, header, body, following):
        """The content and its verdict. Raises OSError."""
        if not report.open:             # RFC 2920 3.1: 354 for nobody
            self._send(b'.\r\n')
            self._reply('data')
            return
        ahead = self._ask_ahead(following)
        try:
            self._send_content(header, body, b'.\r\n' + ahead)
        except ConnectionError as error:
            self._hear_why(report, error)
            return
        report.unanswered = True
        reply = self._any_reply(DOT_TIME)
        report.unanswered = False
        if 300 <= reply[0] < 400:
            raise OSError('the final dot was answered %d %s' % reply)
        report.settle_all(*reply, 'dot')
        if reply[0] == 421:
            self.close()

    def _ask_ahead(self, following):
        """The next envelope (bytes), to go behind the final dot."""
        if following is None or not self.pipelining:
            return b''
        envelope = following()
        if envelope is None or self._refusal_of(envelope):
            return b''
        if len(envelope.recipients) > AHEAD:
            return b''
        packet, self._under_way = self._packet(envelope), envelope
        return packet

    def _send_content(self, header, body, end):
        if isinstance(body, bytes):
            self._send(header + body + end)
            return
        self._send(header)
        if isinstance(body, FilePart):
            self._send_file(body.file, body.start, body.end - body.start)
        else:
            for piece in body:
                self._send(piece)
        self._send(end)

    def _send_file(self, file, start, size):
        if self._smtp.sock.sendfile(file, start, size) < size:
            raise OSError('the file of this mail has become shorter')

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

    def _command(self, line, stage):
        self._show(line)
        self._send(line)
        return self._reply(stage)

    def _show(self, commands):
        if self._debuglevel:
            log.info('smtp %s: send: %s', self._host, plain(commands))

    def _send(self, data):
        limit_wait(self._smtp.sock, REPLY_TIME)
        self._smtp.sock.sendall(data)

    def _reply(self, stage):
        """(code, text in one line). Raises OSError; on a 421 one that says
        so, see ServiceClosing."""
        code, text = self._any_reply()
        if code == 421:
            closing = ServiceUnavailable if stage == 'mail' else ServiceClosing
            raise closing(stage, text)
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
        return PrintedMessage()


class PrintedMessage(Message):

    def __init__(self):
        self._pieces = []

    def write(self, chunk):
        self._pieces.append(chunk)

    def commit(self):
        text = unstuffed(b''.join(self._pieces)).replace(b'\r\n', b'\n')
        print(text.decode('utf-8', 'replace'), flush=True)
        return '2.0.0 printed'


def main(arguments):
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    server, port = Server(Printer), arguments[0] if arguments else '25'
    try:
        server.listen('', int(port))
    except (ValueError, OverflowError):
        sys.exit('smtps: %s is no port: python3 smtps.py 2525' % port)
    except OSError as error:
        sys.exit('smtps: port %s cannot be used: %s; another, such as 2525, '
                 'perhaps?' % (port, error.strerror))
    server.start()
    print('printing what port %d receives; Ctrl-C ends it'
          % server.listeners[0].getsockname()[1], flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        server.stop()


if __name__ == '__main__':
    main(sys.argv[1:])
