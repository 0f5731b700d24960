#!/usr/bin/env python3
"""smtpproxy - hands on the mail of devices that can't talk to mail servers.

Printers, cameras and old programs speak plain SMTP to this box; it keeps
their mail safe in msgs/, lets handlers look at it, and delivers it through
the account that belongs to the sender, with all that the account needs.

    client -> smtps.Server -> Intake -> Spool
                                          |
    server <- smtps.Delivery <- Courier <- Destination <- Relay, Handlers

The sections are in the order of a mail's journey, each uses only those
above it: Settings, Log, Spool, Front door, Handlers, Advice, OAuth2, Sign-in,
Courier, Alerts, Relay, Proxy, Commands, Set-up, Main. README.md, For
developers, walks through them with a mail. The keys of the ini are explained
in smtpproxy.ini.example. The nouns:

    Settings            the whole ini at one moment
    Config, Logging     its sections [config] and [logging]
    Account             one sender's way out
    Number, Capped, Choice  how a value of the ini is read
    OAuthKeys           checks the keys for signing in by OAuth2
    IniReader           turns the file into Settings, collects mistakes
    ConfigError         what is wrong with the ini

    LogFile, OneLine, ForCommand  where log lines go, and how they look
    HandlerLog          the logger of a handler

    Mail                one mail in the spool: envelope, header, state
    Address             a bare address, as handlers of 1.x compare it
    Draft               a mail file that is being written
    Folder              msgs/ as a folder: its lock, names that last
    Spool               msgs/: the only owner of its files
    Unreadable, Unfinished, Busy, NoLocks  what is wrong there

    Admission           may this client send as this sender?
    Intake              one client's way in
    IncomingMessage     one mail on its way from a client to its Draft

    Handlers            the plug-ins that are enabled
    Callback            what a plug-in may ask for

    AccountUnavailable  why no mail of an account can go now
    Advice              what a known reply means, for its owner
    Provider            what is known of a mail provider

    Grant               one sign-in by OAuth2: its tokens, kept and renewed
    Grants              all of them, shared by accounts
    Tokens, TokenFile, Freshness, Outage, State  what it has, how it stands
    Exchange            one question to a token server
    Countdown, BrowserLogin  what a person sees while signing in
    TokenServerAway, SignInNeeded, TokenDenied  why there is no token

    SignIn              what an account asks before it takes mail
    PopDialogue, PopLogin, PopPending  a POP login and its time
    TokenRefused        the mail server takes another token, perhaps

    Courier             takes mails to one account's server

    Alerts              mails to the owner about what needs a person

    MailQueue           ids of mails, and when each may be taken
    Destination         one account's way out: its queue and its threads
    Queues              where each mail is, every move between places
    FailurePolicy       what a failure means for a mail
    DeliveryAgent       delivers one destination's mail, in its thread
    Requests            what the owner asks for with the commands
    Watch               tells the owner what no mail has said
    Relay               decides for every mail what happens next

    Proxy               builds all of it and wires it together
    StartError          why the service can't start

    Trial               goes a mail's way and tells of each step: --test
    TestMail            a mail that is in no spool
    DemoProvider, PopProvider, OAuthProvider  the servers of --demo
    DemoSession, DemoMessage, Page  what they do with a client

    Ini                 an ini that only grows
    Interview           finds the keys of one account: --add
    NotAdded            why there is no new account

    Signals, Stopped    what the owner asks of the service
"""
import binascii
import collections
import contextlib
import errno
import functools
import heapq
import io
import os
import queue
import re
import select
import signal
import socket
import stat
import sys
import threading
import time
import zlib
from typing import NamedTuple

VERSION = '2.1.0'
HOST = re.sub(r'[^A-Za-z0-9.-]', '-', socket.gethostname()) or 'localhost'
HOME = os.path.dirname(os.path.realpath(__file__))

# OpenWrt's python3-light comes in pieces: who misses one is told its name.
PACKAGES = {'logging': 'python3-logging', 'ssl': 'python3-openssl',
            '_ssl': 'python3-openssl', '_hashlib': 'python3-openssl',
            'email': 'python3-urllib (older feeds: python3-email)',
            'urllib': 'python3-urllib', 'unicodedata': 'python3-codecs',
            'idna': 'python3-codecs'}


def missing_module(error):
    """One line for the owner about an ImportError or LookupError."""
    name = getattr(error, 'name', None) or 'idna'
    if not os.access(sys.base_prefix, os.X_OK):     # after user=, perhaps
        return ('Python module %s cannot be read by user %d, nor can all of '
                '%s: start with another Python, such as /usr/bin/python3' % (
                    name, os.getuid(), sys.base_prefix))
    package = PACKAGES.get(name.partition('.')[0], 'the rest of Python')
    return ('Python module %s is missing on this box: install %s '
            '(opkg install or apk add)' % (name, package))


try:
    import logging
    import smtps
except ImportError as missing:
    sys.exit('smtpproxy: ' + missing_module(missing))

log = logging.getLogger('smtpproxy')


# --- Settings: the whole ini at one moment ----------------------------------

class ConfigError(Exception):
    """What is wrong with the ini: args[0] is a list of str, one a mistake;
    args[1] is the Settings of all else, with config None if it is not sound;
    None if nothing could be read."""

    def __str__(self):
        return '\n'.join(self.args[0])


NETWORKS = ('127.0.0.0/8 10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 '
            '169.254.0.0/16 ::1 fc00::/7 fe80::/10')


# How a value of the ini is read: each of these takes its text and warn(str),
# for what works but is not what stands there, and returns the value. Raises
# ValueError, which says what would be right.

def boolean(text, warn):
    if text.lower() in ('true', 'yes', 'on', '1'):
        return True
    if text.lower() in ('false', 'no', 'off', '0'):
        return False
    raise ValueError('must be true or false')


def boolean_or_tls(text, warn):
    """True, False or 'tls'."""
    if text.lower() == 'tls':
        return 'tls'
    try:
        return boolean(text, warn)
    except ValueError:
        raise ValueError('must be true, false or tls')


class Number:
    """A whole number from least to most."""

    def __init__(self, least, most):
        self.least, self.most = least, most

    def __call__(self, text, warn):
        digits = text.lstrip('0')[:20] or '0'   # thousands Python won't read
        if not re.fullmatch('[0-9]+', text) or int(digits) < self.least:
            self.refuse()
        if int(digits) > self.most:
            return self.too_large(text, warn)
        return int(digits)

    def refuse(self):
        raise ValueError('must be a whole number from %d to %d' % (
            self.least, self.most))

    def too_large(self, text, warn):
        self.refuse()


class Capped(Number):
    """The same for keys of 1.x, which knew no largest: an ini with more than
    that has to work on."""

    def too_large(self, text, warn):
        warn('= %s is too much: %d counts, the largest' % (text, self.most))
        return self.most


class Choice:
    """One of these words, in any case."""

    def __init__(self, *words):
        self.words = words

    def __call__(self, text, warn):
        for word in self.words:
            if text.lower() == word.lower():
                return word
        raise ValueError('must be one of ' + ', '.join(self.words))


def one_line(text, warn):
    if re.search(r'[\x00-\x08\x0b-\x1f\x7f]', text):
        raise ValueError('has control characters')
    return text


def word(text, warn):
    if re.search(r'\s', text):
        raise ValueError('must be a name without blanks')
    return one_line(text, warn)


def host_name(text, warn):
    """A name or an address. What looks like more than that stays as it is,
    but its owner is told what was probably meant."""
    found = re.match(r'''["']?(?:\w+://)?([^\s/#;,"']*)''', text)[1]
    user, at, host = found.rpartition('@')
    port = re.fullmatch(r'(\[.*\]|[^:]*):(\d+)', host)
    host = (port[1] if port else host).strip('[]')
    if at:
        warn('holds an @: a server is meant here, no mail address; %s, '
             'perhaps?' % host)
    elif host != text:
        warn('is more than the name of a server: write only %s%s' % (
            host, port and '; %s has a key of its own, the port' % port[2]
            or ''))
    return one_line(text, warn)


def mail_address(text, warn):
    """'a@b' or 'Name <a@b>'."""
    if text and not re.match(r'[^<>\r\n]*<[^<>@\s]+@[^<>@\s]+>$|'
                             r'[^<>@\s]+@[^<>@\s]+$', text):
        raise ValueError('must be a mail address')
    if not bare_address(text).isascii():
        raise ValueError('must be ASCII but for the name before the <')
    return one_line(text, warn)


def bare_addresses(text, warn):
    """'a@b c@d', separated by commas or blanks."""
    found = re.split(r'[,\s]+', text.strip(' ,')) if text else []
    for address in found:
        if not re.match(r'[!-~]+@[!-~]+$', address) or re.search(
                r'[<>"]', address):
            raise ValueError('must be addresses such as me@example.org')
    return ' '.join(found)


def one_address(text, warn):
    if ' ' in bare_addresses(text, warn):
        raise ValueError('must be one address')
    return text


def file_path(text, warn):
    return one_line(text, warn)


def pem_file(text, warn):
    file_path(text, warn)
    if text and not os.access(text, os.R_OK):
        raise ValueError('there is no such file that we may read')
    return text


port_number, server_port = Number(0, 65535), Number(1, 65535)
DAY = 86400     # seconds


# In these classes: field name = ini key, annotation = how it is read, default
# = default.

class Config(NamedTuple):
    """[config]"""
    port: port_number = 25
    host: host_name = ''
    sleeptime: Capped(1, DAY) = 30
    debuglevel: Capped(0, 2) = 0
    waitafterpop: Capped(0, 3600) = 5
    deleteonerror: boolean = True
    msgdir: file_path = 'msgs'
    allow: one_line = NETWORKS
    maxsize: Number(1, 10000000000) = 100000000
    maxconnections: Number(1, 10000) = 100
    timeout: Number(1, DAY) = 300
    retrydays: Number(0, 365) = 5
    alert: bare_addresses = ''
    alertfrom: one_address = ''
    tlscert: pem_file = ''
    tlskey: pem_file = ''
    tlsport: port_number = 0
    tlsweak: boolean = False
    user: one_line = ''
    group: one_line = ''
    tokendir: file_path = 'tokens'


class Logging(NamedTuple):
    """[logging]"""
    file: file_path = 'smtpproxy.log'
    size: Capped(0, 1000000000) = 1000000
    count: Capped(0, 1000) = 10
    level: Choice('DEBUG', 'INFO', 'WARNING', 'ERROR', 'NONE') = 'INFO'


class Account(NamedTuple):
    """One sender's way out: [<address>], [*@domain] or [default]."""
    localhostname: word = ''
    ipversion: Choice('any', '4', '6') = 'any'
    smtphost: host_name = ''
    smtpport: server_port = 0   # by smtpsecurity
    smtpsecurity: Choice('none', 'tls', 'ssl') = 'none'
    smtpusername: one_line = ''
    smtppassword: one_line = ''
    smtppasswordfile: file_path = ''
    smtpauth: Choice('auto', 'plain', 'login', 'cram-md5', 'xoauth2',
                     'oauthbearer') = 'auto'
    smtpweaktls: boolean = False
    smtpconnections: Number(1, 100) = 4
    smtprate: Number(0, 100000) = 0
    tlsverify: boolean = True
    tlscafile: pem_file = ''
    popbeforesmtp: boolean = False
    pophost: host_name = ''
    popport: server_port = 995
    popssl: boolean_or_tls = True
    popusername: one_line = ''
    poppassword: one_line = ''
    poppasswordfile: file_path = ''
    popcheckdelay: Capped(0, DAY) = 60
    oauth: one_line = ''
    oauthclientid: one_line = ''
    oauthclientsecret: one_line = ''
    oauthtenant: one_line = 'common'
    oauthflow: Choice('auto', 'device', 'browser', 'app') = 'auto'
    oauthscope: one_line = ''
    oauthtokenurl: one_line = ''
    oauthdeviceurl: one_line = ''
    oauthauthurl: one_line = ''
    oauthport: port_number = 0
    returnpath: mail_address = ''
    replyto: mail_address = ''
    forcefrom: mail_address = ''
    localpassword: one_line = ''
    localpasswordfile: file_path = ''
    use: one_line = ''

    @property
    def server(self):
        return '%s:%d' % (self.smtphost, self.smtpport)

    @property
    def way(self):
        """The server and who we are there, for people."""
        return self.server + (self.smtpusername and
                              ' as ' + self.smtpusername)

    @property
    def connection(self):
        """This Account without what a connection does not need: accounts
        that differ only in how a mail is dressed have the same."""
        return connection_of(self)

    @property
    def grant(self):
        """Accounts that agree in this share one sign-in by OAuth2."""
        return (self.smtpusername.lower(), self.oauthclientid,
                self.oauthtokenurl)

    def __repr__(self):
        return 'Account(%s)' % ', '.join(
            '%s=%s' % (key, masked(key, value))
            for key, value in self._asdict().items())


@functools.lru_cache(1000)      # asked for each mail
def connection_of(account):
    return account._replace(returnpath='', replyto='', forcefrom='',
                            localpassword='', localpasswordfile='', use='')


class Settings(NamedTuple):
    """Never changed: a reload builds a new one. accounts: {lower-case section
    name: Account}, handlers: {name: {key: value}}, warnings: [str], grants:
    {Account.grant: name of the section that holds its keys}. missing: [str],
    password files that can't be read here: the service can't do without them,
    a command beside it can."""
    file: str
    config: Config
    logging: Logging
    accounts: dict
    handlers: dict
    warnings: list
    grants: dict
    missing: list

    def account_for(self, sender):
        """The Account of an envelope sender (str), or None."""
        return self.accounts.get(self.section_for(sender))

    def section_for(self, sender):
        """The lower-case name of the section, or None."""
        return section_of_sender(sender, self.accounts)

    def section_of(self, connection):
        """The first section that goes by an Account.connection; '' if the ini
        has that no more."""
        return next((name for name, account in self.accounts.items()
                     if account.connection == connection), '')


def section_of_sender(sender, accounts):
    sender = sender.lower()
    domain = sender.rpartition('@')[2] if '@' in sender else None
    for name in sender, '*@%s' % domain, 'default':
        if name in accounts:
            return name
    return None



# What oauth=<provider> sets where the ini does not. TENANT is oauthtenant.
MICROSOFT = 'https://login.microsoftonline.com/TENANT/oauth2/v2.0/'
OAUTH_PRESETS = {
    'microsoft': {
        'smtphost': 'smtp.office365.com', 'smtpconnections': 2,
        'smtprate': 30,
        'oauthflow': 'device', 'oauthtokenurl': MICROSOFT + 'token',
        'oauthdeviceurl': MICROSOFT + 'devicecode',
        'oauthauthurl': MICROSOFT + 'authorize',
        # One scope more, and most tenants want an administrator's consent.
        'oauthscope': 'https://outlook.office.com/SMTP.Send offline_access'},
    'google': {
        'smtphost': 'smtp.gmail.com', 'oauthflow': 'browser',
        'oauthtokenurl': 'https://oauth2.googleapis.com/token',
        'oauthauthurl': 'https://accounts.google.com/o/oauth2/v2/auth',
        'oauthscope': 'https://mail.google.com/'},
    'other': {}}
MICROSOFT_APP_SCOPE = 'https://outlook.office365.com/.default'


SECRETS = 'password', 'secret'          # how the name of such a key ends


def masked(key, value):
    """value as it may be shown."""
    return '***' if value and key.endswith(SECRETS) else repr(value)


def is_loopback(host):
    """Does this name or address never leave the box?"""
    return bool(re.fullmatch(r'127(\.\d{1,3}){3}|localhost|::1', host.lower()))


def nearest(word, known):
    """A hint at the known word that was meant, or ''."""
    import difflib
    near = difflib.get_close_matches(word, known, 1, 0.6)
    return ': do you mean %s?' % near[0] if near else ''


def load(path, content=None):
    """Reads an ini file into Settings; content: bytes that it would hold.
    Raises ConfigError with every mistake in it, or OSError."""
    return IniReader(path, content).settings()


def password_in(path):
    """The password (str) that a file holds. Raises OSError, ValueError."""
    with open(path, encoding='utf-8-sig') as file:
        text = file.readline(1000)
    if not text.strip():
        raise ValueError('there is nothing in its first line')
    return one_line(text.rstrip('\n'), None)


class OAuthKeys:
    """Checks the keys of accounts that sign in by OAuth2, and sets what their
    provider sets. complain: callable(section, key, what)."""

    def __init__(self, complain):
        self._complain = complain
        self._grants = {}       # see _check_shared

    def sections(self):
        """The lower-case names of those sections that hold the keys of a
        sign-in, for all that share it."""
        return [name for name, _ in self._grants.values()]

    def check(self, section, found):
        """What an account with oauth needs; sets what its provider sets."""
        provider = found['oauth'] = found.get('oauth', '').lower()
        if not provider:
            self._check_no_oauth(section, found)
            return
        if provider not in OAUTH_PRESETS:
            self._complain(section, 'oauth', '= %s: must be one of %s' % (
                provider, ', '.join(OAUTH_PRESETS)))
            found.setdefault('smtphost', provider)  # one mistake, one line
            return
        address = found.get('oauthtokenurl') or OAUTH_PRESETS[provider].get(
            'oauthtokenurl')
        self._set_by_provider(section, found)
        needed = ['smtpusername', 'oauthclientid', 'oauthscope',
                  'oauthtokenurl', {'device': 'oauthdeviceurl',
                                    'browser': 'oauthauthurl',
                                    'app': 'oauthclientsecret'}[
                                        found['oauthflow']]]
        for key in needed:
            if not found.get(key):
                self._complain(section, key, 'is missing: oauth=%s with '
                              'oauthflow=%s needs it' % (
                                  provider, found['oauthflow']))
        for key in 'oauthtokenurl', 'oauthdeviceurl', 'oauthauthurl':
            self._check_url(section, key, found.get(key))
        self._check_company(section, found)
        if all(map(found.get, needed)):
            self._check_shared(section, found, address)

    def _set_by_provider(self, section, found):
        provider, tenant = found['oauth'], found.get('oauthtenant') or 'common'
        if not re.match(r'[A-Za-z0-9.-]+$', tenant):
            self._complain(section, 'oauthtenant', '= %s: must be common, '
                          'organizations, consumers, or the id or domain of '
                          'a tenant' % tenant)
            tenant = 'common'
        if found.get('oauthflow') == 'auto':
            del found['oauthflow']
        preset = dict(OAUTH_PRESETS[provider])
        if provider == 'microsoft' and found.get('oauthflow') == 'app':
            preset['oauthscope'] = MICROSOFT_APP_SCOPE
        if provider == 'other':
            preset['oauthflow'] = 'device' if found.get(
                'oauthdeviceurl') else 'browser'
        else:
            preset['smtpsecurity'] = 'tls'
            if found.get('smtpsecurity') != 'ssl':
                preset['smtpport'] = 587
        for key, value in preset.items():
            if found.get(key) in (None, ''):    # smtprate=0 is set
                found[key] = value.replace('TENANT', tenant) if isinstance(
                    value, str) else value

    def _check_url(self, section, key, url):
        """What is secret goes there: https, unless it stays on the box."""
        from urllib.parse import urlsplit
        try:
            parts = urlsplit(url or 'https://none')
            good = parts.hostname and parts.port != 0 and (
                parts.scheme == 'https' or parts.scheme == 'http'
                and is_loopback(parts.hostname))
            if good and '@' not in parts.netloc and not re.search(
                    '[^!-~]|#', url or ''):
                return
        except ValueError:
            pass                        # a port that is no number
        self._complain(section, key, '= %s: must be an address that begins '
                      'with https:// (http:// only for 127.0.0.1)' % url)

    def _check_company(self, section, found):
        """What does not go together with oauth."""
        flow, provider = found['oauthflow'], found['oauth']
        for key in found:
            if key.startswith('smtppassword') and found[key]:
                self._complain(section, key, 'and oauth exclude each other: '
                              'remove one of them')
        if (found.get('smtpauth') or 'auto') not in (
                'auto', 'xoauth2', 'oauthbearer'):
            self._complain(section, 'smtpauth', '= %s: with oauth it must be '
                          'auto, xoauth2 or oauthbearer' % found['smtpauth'])
        if (found.get('smtpsecurity') or 'none') == 'none' and not is_loopback(
                found.get('smtphost') or ''):
            self._complain(section, 'smtpsecurity', '= none: with oauth it '
                          'must be tls or ssl: all could read the token')
        if provider == 'google' and flow != 'browser':
            self._complain(section, 'oauthflow', '= %s: Google lets nobody '
                          'sign in for mail so; set browser' % flow)
        if provider == 'microsoft' and flow == 'app' and found.get(
                'oauthtenant', 'common') in ('', 'common', 'consumers'):
            self._complain(section, 'oauthtenant', 'must be the id or domain '
                          'of your tenant with oauthflow=app')

    def _check_no_oauth(self, section, found):
        for key in found:
            if key.startswith('oauth') and found[key] not in (
                    None, '', Account._field_defaults[key]):
                self._complain(section, key, 'needs oauth=microsoft, google '
                              'or other beside it')
        if found.get('smtpauth') in ('xoauth2', 'oauthbearer'):
            self._complain(section, 'smtpauth', '= %s: needs oauth=microsoft, '
                          'google or other beside it' % found['smtpauth'])

    def _check_shared(self, section, found, address):
        """Sections with one sign-in must mean the same. address: of the
        token server, with TENANT as it stands: those that differ in their
        tenants only are a mistake as well."""
        name = ' '.join(section.lower().split())
        others = {}
        for url in address, found['oauthtokenurl']:
            key = found['smtpusername'].lower(), found['oauthclientid'], url
            first, other = self._grants.setdefault(key, (name, found))
            others[first] = other
        for first, other in others.items():
            for key in self._different(found, other):
                self._complain(section, key, 'is not that of [%s], which has '
                              'the same sign-in (smtpusername, oauthclientid '
                              'and oauthtokenurl): they must agree; best is '
                              'use=%s' % (first, first))

    @staticmethod
    def _different(found, other):
        """The keys in which they must not differ and do."""
        return [key for key in ('oauthscope', 'oauthflow', 'oauthtenant',
                                'oauthclientsecret')
                if (found.get(key) or Account._field_defaults[key])
                != (other.get(key) or Account._field_defaults[key])]


class IniReader:
    """Turns an ini file into Settings and collects what is wrong with it."""

    def __init__(self, path, content=None):
        self._path, self._mistakes, self._warnings = path, [], []
        self._missing, self._faulty = [], set()     # sections with mistakes
        self._folder = os.path.dirname(os.path.abspath(path))
        self._oauth = OAuthKeys(self._complain)
        self._parser = self._parse(self._read(content))

    def _read(self, content):
        if content is None:
            with open(self._path, 'rb') as file:
                content = file.read()
        try:
            return io.TextIOWrapper(io.BytesIO(content), 'utf-8-sig').read()
        except UnicodeDecodeError as error:
            raise ConfigError(['%s: byte %d is not UTF-8: save the file as '
                               'UTF-8' % (self._path, error.start)], None)

    def _parse(self, text):
        """A ConfigParser of text. What it can't read is noted and blanked,
        until it can: so that all mistakes are named at once."""
        import configparser
        lines = text.split('\n')
        while True:
            instead = ''
            parser = configparser.ConfigParser(
                interpolation=None, default_section='\0',
                empty_lines_in_values=False)
            try:
                parser.read_string('\n'.join(lines), self._path)
                return parser
            except configparser.DuplicateSectionError as error:
                bad = [(error.lineno, 'section [%s] is there twice: join the '
                        'two' % error.section)]
                instead = '[\1%d]' % error.lineno
            except configparser.DuplicateOptionError as error:
                bad = [(error.lineno, '[%s] %s is there twice: remove one'
                        % (error.section, error.option))]
            except configparser.MissingSectionHeaderError as error:
                bad = [(error.lineno, 'a line before the first [section]')]
            except configparser.ParsingError as error:
                bad = [(number, 'neither key=value nor [section]')
                       for number, _ in error.errors]
            for number, what in bad:
                lines[number - 1] = instead
                self._faulty.add('config')      # it may be its line
                self._mistakes.append('%s line %d: %s' % (
                    self._path, number, what))

    def settings(self):
        config, logs, accounts, handlers = Config(), Logging(), {}, {}
        seen = set()
        for section in self._parser.sections():
            name = ' '.join(section.lower().split())
            if name in seen:
                self._complain(section, '', 'is there twice: letters large '
                               'and small are the same in a name')
            elif name == 'config':
                config = self._read_section(section, Config)
            elif name == 'logging':
                logs = self._read_section(section, Logging)
            elif name.startswith('handler ') and '@' not in name:
                handlers[section.split(None, 1)[1].strip()] = dict(
                    self._parser[section])
            elif not name.startswith('\1'):
                self._check_name(section, name)
                accounts[name] = self._read_section(section, Account)
            seen.add(name)
        self._resolve(accounts)
        config, logs = self._finish(config, logs)
        self._check_alerts(config, accounts)
        settings = Settings(
            self._path, config, logs, accounts, handlers, self._warnings,
            {accounts[name].grant: name for name in self._oauth.sections()},
            self._missing)
        if 'config' in self._faulty:
            settings = settings._replace(config=None)
        if self._mistakes:
            raise ConfigError(self._mistakes, settings)
        return settings._replace(warnings=self._warnings + (
            self._find_warnings(config, accounts)))

    def _complain(self, section, key, what):
        self._faulty.add(section.lower())
        self._mistakes.append('%s: [%s] %s%s' % (
            self._path, section, key and key + ' ', what))

    def _check_name(self, section, name):
        """Warns of a name that no sender has."""
        meant = bare_address(name).strip('"\'')
        user, at, domain = meant.rpartition('@')
        if domain == '*':
            meant = 'default'
        elif at and (not user or '*' in user):
            meant = '*@' + domain
        if meant != name:
            self._warnings.append(
                '%s: [%s] is the address of no sender: do you mean [%s]?'
                % (self._path, section, meant))

    def _warn(self, section, key, what):
        self._warnings.append('%s: [%s] %s %s' % (
            self._path, section, key, what))

    def _read_section(self, section, shape):
        """A shape (Config, Logging, Account) from one section."""
        found = {}
        for key, value in self._parser[section].items():
            if key not in shape._fields:
                self._complain(section, key, 'is no key here' + self._nearest(
                    key, shape))
            elif '\n' in value:
                self._complain(section, key, 'has more than one line: does '
                               'the next one begin with a blank?')
            else:
                found[key] = self._convert(
                    section, key, value, shape.__annotations__[key])
        if shape is Account:
            self._check_account(section, found)
        return shape(**{key: value for key, value in found.items()
                        if value is not None})

    @staticmethod
    def _nearest(key, shape):
        """A hint at the name that was meant."""
        if shape is Account and (key in Config._fields
                                 or key in Logging._fields):
            kind = 'config' if key in Config._fields else 'logging'
            return ': it belongs into [%s]' % kind
        if shape is not Account and key in Account._fields:
            return ': it belongs into the section of an account'
        return nearest(key, shape._fields) or (
            '; known are ' + ', '.join(shape._fields))

    def _convert(self, section, key, text, kind):
        """The value of a key; None after a complaint."""
        if kind in (file_path, pem_file) and text:
            text = os.path.join(self._folder, os.path.expanduser(text))
        try:
            if re.fullmatch('<your [^<>]*>', text):     # see Admission
                raise ValueError('replace this by yours')
            return kind(text, functools.partial(self._warn, section, key))
        except ValueError as error:
            self._complain(section, key, '= %s: %s' % (
                '***' if key.endswith(SECRETS) else text, error))

    def _check_account(self, section, found):
        """What an account needs, and what follows from what."""
        if found.get('use'):
            if len(found) > 1:
                self._complain(section, 'use', 'must be the only key here')
            return
        self._oauth.check(section, found)
        self._read_passwords(section, found)
        for key in ('smtphost',) + (
                ('pophost', 'popusername', 'poppassword')
                if found.get('popbeforesmtp') else ()):
            if found.get(key, '') == '' and not found.get(key + 'file'):
                self._complain(section, key, 'is missing')
        if not found.get('smtpport'):
            implicit = found.get('smtpsecurity') == 'ssl'
            found['smtpport'] = 465 if implicit else 25
        if not found.get('oauth') and bool(found.get('smtpusername')) != bool(
                found.get('smtppassword') or found.get('smtppasswordfile')):
            self._warnings.append(
                '%s: [%s] has smtpusername or smtppassword without the other: '
                'there will be no login' % (self._path, section))
        if (found.get('popssl'), found.get('popport', 995)) == ('tls', 995):
            self._warn(section, 'popssl', '= tls is for popport=110; on port '
                      '995 TLS begins at once: popssl=true')

    def _read_passwords(self, section, found):
        """Puts what a password file holds in the place of the password."""
        for key in 'smtppassword', 'poppassword', 'localpassword':
            path = found.get(key + 'file')
            if path and found.get(key):
                self._complain(section, key, 'and %sfile exclude each other: '
                              'remove one of them' % key)
            elif path:
                try:
                    found[key] = password_in(path)
                    self._warnings += warn_of_password(path)
                except (OSError, ValueError) as error:
                    self._missing.append(
                        '%s: [%s] %sfile = %s cannot be read: %s' % (
                            self._path, section, key, path,
                            getattr(error, 'strerror', None) or error))

    def _resolve(self, accounts):
        """Puts the account that is meant in the place of each use=."""
        for name, account in list(accounts.items()):
            path = [name]
            while account is not None and account.use:
                target = account.use.lower()
                account = accounts.get(target)
                if account is None:
                    self._complain(
                        name, 'use', '= %s: there is no such section' % target
                        + nearest(target, accounts))
                elif target in path:
                    self._complain(name, 'use', 'goes round in a circle: '
                                   + ' -> '.join(path + [target]))
                    account = None
                path.append(target)
            if account is not None:
                accounts[name] = account

    def _finish(self, config, logs):
        """Defaults that depend on something else, checks across keys."""
        if not os.path.isabs(config.msgdir):
            config = config._replace(msgdir=os.path.join(HOME, 'msgs'))
        if not os.path.isabs(config.tokendir):
            config = config._replace(tokendir=os.path.join(
                self._folder, config.tokendir or 'tokens'))
        if not os.path.isabs(logs.file):
            logs = logs._replace(file=os.path.join(self._folder, logs.file))
        self._check_folders(config, logs)
        if bool(config.tlscert) != bool(config.tlskey):
            self._complain('config', 'tlscert', 'and tlskey go together')
        if config.tlsport and not config.tlscert:
            self._complain('config', 'tlsport', 'needs tlscert and tlskey')
        if config.tlsport and config.tlsport == config.port:
            self._complain('config', 'tlsport', '= %d is port= already: each '
                           'needs one of its own' % config.port)
        try:
            smtps.Networks(config.allow)
        except ValueError as error:
            self._complain('config', 'allow', '%s: use networks such as '
                           '192.168.1.0/24, or any' % error)
        try:
            identity(config)
        except KeyError as error:
            self._complain('config', 'user or group', '%s is not known on '
                           'this box' % error)
        return config, logs

    def _check_folders(self, config, logs):
        """What is no mail in msgdir is moved to corrupt/ at each start."""
        real = os.path.realpath
        msgs, tokens = real(config.msgdir), real(config.tokendir)
        if msgs in (real(HOME), real(self._folder)):
            self._complain('config', 'msgdir', '= %s: must be a folder of its '
                           'own: what is no mail there is moved to corrupt/'
                           % config.msgdir)
        elif real(logs.file).startswith(msgs + os.sep):
            self._complain('logging', 'file', '= %s is in msgdir=, which is '
                           'for mail only: set another' % logs.file)
        if tokens in (real(HOME), real(self._folder), msgs):
            self._complain('config', 'tokendir', '= %s: must be a folder of '
                           'its own' % config.tokendir)

    def _check_alerts(self, config, accounts):
        """Who sends the alerts has to have a way out."""
        if config.alert and not config.alertfrom:
            self._complain('config', 'alertfrom', 'is missing: alert needs '
                           'the address of an account as sender')
        elif config.alertfrom and not section_of_sender(
                config.alertfrom, accounts):
            self._complain('config', 'alertfrom', '= %s: there is no account '
                           'for it' % config.alertfrom)

    def _find_divided(self, accounts):
        """Warnings about one user of one server whose sections differ in what
        a connection needs, be it the port: connections and pace then count
        for each, but not for the provider."""
        ways = {}
        for name, account in accounts.items():
            user = account.smtpusername or (
                account.popbeforesmtp and account.popusername)
            if user:
                login = account.smtphost.lower(), user.lower()
                ways.setdefault(login, {}).setdefault(
                    account.connection, name)
        return ['%s: [%s] have the same smtphost and user, but other '
                'settings: their connections count apart; with use= they '
                'would share them' % (self._path, '], ['.join(names.values()))
                for names in ways.values() if len(names) > 1]

    def _find_warnings(self, config, accounts):
        """What works, but may not be what the owner wants."""
        passwords = [(section, key, value)
                     for section in self._parser.sections()
                     for key, value in self._parser[section].items()
                     if key.endswith(SECRETS)]
        found = ['%s: [%s] %s has %%%%: smtpproxy 1.x read it as one %%, 2.0 '
                 'takes it as it stands' % (self._path, section, key)
                 for section, key, value in passwords if '%%' in value]
        found += self._find_divided(accounts)
        if not accounts:
            found.append('%s: no account: all mail will be refused. Make one '
                         'with --add' % self._path)
        if passwords and os.path.exists(self._path):
            found += warn_of_secrets(self._path, service_group(config))
        return (found + warn_of_folder(config.msgdir)
                + warn_of_program(self._path))


def bare_address(text):
    """'a@b' of 'Name <a@b>' or '<a@b>' or 'a@b'."""
    return text.rpartition('<')[2].rstrip('> ').strip()


def identity(config):
    """(uid, gid, user name) that the ini asks for, None for each that stays.
    Raises KeyError."""
    if not (config.user or config.group):
        return None, None, None
    import grp
    import pwd
    try:
        user = pwd.getpwnam(config.user) if config.user else None
        group = grp.getgrnam(config.group).gr_gid if config.group else None
    except KeyError:
        known = [config.user, config.group]
        raise KeyError(' or '.join(filter(None, known)))
    if user and group is None:
        group = user.pw_gid
    return user and user.pw_uid, group, user and user.pw_name


def service_group(config):
    """The gid that the service has. The ini need not say it: systemd may
    start the service as a user, whom root knows by whose msgs/ is."""
    gid = identity(config)[1]
    if gid is None and os.getuid() == 0 and os.path.isdir(config.msgdir):
        return os.stat(config.msgdir).st_gid
    return os.getgid() if gid is None else gid


def warn_of_secrets(path, group):
    """[a warning] if others than its owner and the service's group may read
    a file. A service whose ini is root's can read it by its group only."""
    info = os.stat(path)
    others = info.st_mode & 0o077
    if not others or others == 0o040 and info.st_gid == group:
        return []
    mend = 'chmod 600 ' + path
    if info.st_uid == 0 and group != 0:
        mend = for_group(group, path)
    return ['%s: others on this box can read the passwords in it: %s'
            % (path, mend)]


def for_group(group, path):
    """The commands that let a gid, and no others, read a file of root's."""
    return 'chgrp %d %s; chmod 640 %s' % (group, path, path)


def warn_of_reload(path):
    """[a warning] if we may not read our own ini: it was root who read it,
    before a start made us the user of [config]."""
    try:
        os.close(os.open(path, os.O_RDONLY))
    except PermissionError:
        folder = os.path.dirname(os.path.realpath(path))
        return ['%s: user %d, who reads it at a reload, may not: %s' % (
            path, os.getuid(), for_group(os.getgid(), path) if os.access(
                folder, os.X_OK) else 'nor may it enter ' + folder)]
    except OSError:
        pass                            # it is not there, or cannot be read
    return []


def warn_of_password(path):
    """[a warning] if anybody may read a password file. Who its group is, or
    the list that systemd gives its copy, is the owner's to know."""
    if not os.stat(path).st_mode & 0o007:
        return []
    return ['%s: others on this box can read the password in it: '
            'chmod o-rwx %s' % (path, path)]


def warn_of_folder(path):
    """[a warning] if others than its owner may look into a folder of ours.
    We make them so that they can't, but an older one stays as it was."""
    if not os.path.isdir(path) or not os.stat(path).st_mode & 0o077:
        return []
    return ['%s: others on this box can read or change what is in it: '
            'chmod 700 %s (on CIFS or FAT: options of its mount)'
            % (path, path)]


def warn_of_program(ini):
    """[a warning] if root runs what others may change: whoever breaks into
    the service could have root do anything at the next start."""
    if os.getuid() != 0:
        return []
    safe = set()
    for path in [*program_files(), ini]:
        weak = changeable(path, safe)
        if weak:
            return ['%s: others than root may change it, and root runs what '
                    'is there: who breaks into the service is root at the '
                    'next start. chown root %s; chmod go-w %s; README.md, '
                    '"Who may read it, who may change it", has all that is '
                    'to be done' % (weak, weak, weak)]
    return []


def program_files():
    """The folders that Python takes us from, and what it finds there. The
    first of its path is the current one with python3 -m."""
    handlers = os.path.join(HOME, 'handlers')
    for folder in (sys.path[0], HOME, os.path.join(HOME, '__pycache__'),
                   handlers, os.path.join(handlers, '__pycache__')):
        folder = os.path.abspath(folder)
        if os.path.isdir(folder):
            yield folder
            for name in os.listdir(folder):
                if name.endswith(('.py', '.pyc')):
                    yield os.path.join(folder, name)


def changeable(path, safe):
    """What lets others than root put something else in the place of path:
    itself, a link or a folder above it; None if nothing does. safe: a set of
    what was looked at before."""
    for path in os.path.abspath(path), os.path.realpath(path):
        sticky = 0
        while (path, sticky) not in safe and os.path.lexists(path):
            info = os.lstat(path)
            writers = 0o002 if info.st_gid == 0 else 0o022
            if info.st_uid != 0 or info.st_mode & writers and not (
                    info.st_mode & sticky or stat.S_ISLNK(info.st_mode)):
                return path
            safe.add((path, sticky))
            # In a folder such as /tmp nobody can rename what is root's.
            path, sticky = os.path.dirname(path), stat.S_ISVTX
    return None


# --- Log: one line a step, for the owner ------------------------------------

class LogFile(logging.Handler):
    """A file that starts anew at size bytes; count old ones are kept. A pipe
    or a device never does. What can't be written is said once on stderr: a
    full disk is the log's trouble and never the mail's.

    Whoever touches the descriptor holds logging's lock of this handler: its
    number is soon another file's, a mail's perhaps. A thread that looked the
    handlers up before a reload may write after close(): its line still goes
    to the log, which is open for that line only."""

    def __init__(self, path, size, count):
        super().__init__()
        self._path, self._size, self._count = path, size, count
        self._file, self._written, self._broken = None, 0, ''
        self._is_closed = False

    def emit(self, record):
        """Under the lock: see logging.Handler.handle."""
        line = (self.format(record) + '\n').encode('utf-8', 'replace')
        try:
            if self._file is None:
                self._open()
            if self._size and self._written + len(line) > self._size and (
                    self._written):
                self._rotate()
            os.write(self._file, line)
            self._written += len(line)
        except OSError as error:
            self._complain('written', error)
        if self._is_closed:
            self._close_file()

    def _open(self):
        # A pipe that nobody reads must not hold up the mail.
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT
                             | os.O_APPEND | os.O_NONBLOCK, 0o640)
        info = os.fstat(self._file)
        self._written = info.st_size
        if not stat.S_ISREG(info.st_mode):
            self._size = 0              # root would rename /dev/null

    def _rotate(self):
        """smtpproxy.log becomes smtpproxy.log.1, that one .2, and so on. If
        that can't be, it goes on in the same file and tries much later."""
        self._written = 0
        names = [self._path] + [
            '%s.%d' % (self._path, n + 1) for n in range(self._count)]
        try:
            for old, new in reversed(list(zip(names, names[1:]))):
                if os.path.exists(old):
                    os.replace(old, new)
            if not self._count:
                os.unlink(self._path)
            full = self._file
            self._open()                # if it can't, the full one goes on
            os.close(full)
        except OSError as error:
            self._complain('renamed', error)

    def _complain(self, what, error):
        if self._broken != str(error):
            self._broken = str(error)
            say('the log %s cannot be %s: %s; mail goes on' % (
                self._path, what, without_folder(self._path) or error))

    def _close_file(self):
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def close(self):
        self.acquire()
        try:
            self._is_closed = True
            self._close_file()
        finally:
            self.release()
        super().close()


def without_folder(path):
    """What is to be done if a file can't be made for want of its folder, or
    ''."""
    folder = os.path.dirname(path)
    return '' if os.path.exists(folder) else (
        'there is no folder %s: mkdir -p %s' % (folder, folder))


def printable(text):
    """text, in which a terminal finds nothing to obey and a log no other
    line: what is not to be printed is spelled out, as in \\x1b."""
    if text.isprintable():
        return text
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def tell(text):
    """One line of a command on stdout. Raises OSError."""
    print(printable(text.expandtabs()), flush=True)


def say(text, file=None):
    """One line to whoever started us, who may not be there any more."""
    with contextlib.suppress(OSError, ValueError):
        print('smtpproxy: ' + printable(text), file=file or sys.stderr,
              flush=True)


class OneLine(logging.Formatter):
    """Whatever a client or server says can't fake a line of ours: what is
    printed below a line, a traceback, stands back from the edge."""

    _second = _clock = None

    def format(self, record):
        message = self._message_of(record)
        second = int(record.created)
        if second != self._second:      # of many lines a second, format one
            self._clock = time.strftime(
                '%Y-%m-%d %H:%M:%S', time.localtime(second))
            self._second = second
        return '%s,%03d %s %s' % (self._clock, record.msecs, record.levelname,
                                  message)

    def _message_of(self, record):
        lines = [printable(record.getMessage())]
        if record.exc_info:
            lines += ['    ' + printable(line) for line in
                      self.formatException(record.exc_info).splitlines()]
        return '\n'.join(lines)


class ForCommand(OneLine):
    """The log among the lines of a command: what, but not when."""

    def format(self, record):
        return '  log: ' + self._message_of(record)


def on_terminal():
    """Does somebody watch? There is no stderr if it was closed."""
    return sys.stderr is not None and sys.stderr.isatty()


def open_log(settings):
    """Sends all log lines to the file, and to a terminal if there is one."""
    # What nobody prints need not be found out for every line.
    logging.logThreads = logging.logProcesses = False
    logging.logMultiprocessing = False
    logging._srcfile = None
    root, handlers = logging.getLogger(), [LogFile(*settings.logging[:3])]
    if on_terminal():
        handlers.append(logging.StreamHandler())
    for handler in handlers:
        handler.setFormatter(OneLine())
    old, root.handlers[:] = root.handlers[:], handlers
    for handler in old:
        handler.close()
    level = settings.logging.level
    root.setLevel(logging.CRITICAL if level == 'NONE' else level)
    for warning in warn_of_growth(settings.logging):
        log.warning('%s', warning)


def warn_of_log(logs):
    """[a warning] if the log can't be written."""
    where = logs.file if os.path.exists(logs.file) else os.path.dirname(
        logs.file)
    if os.access(where, os.W_OK):
        return []
    return ['the log %s cannot be written by user %d: %s; mail goes on '
            'without it' % (logs.file, os.getuid(), without_folder(
                logs.file) or 'no permission')]


def warn_of_growth(logs):
    """[a warning] if the log can only grow."""
    folder, file = os.path.dirname(logs.file), logs.file
    ends = logs.size and (os.path.isfile(file) or not os.path.exists(file))
    if not ends or not os.path.isdir(folder) or os.access(folder, os.W_OK):
        return []
    return ['%s: user %d may not make files there, so the log can not begin '
            'anew and grows: set file=log/smtpproxy.log in [logging] and give '
            'the folder log to that user' % (folder, os.getuid())]


class HandlerLog:
    """The logger that a handler gets: the names of 1.x and those of logging.
    Every line begins with the id of the mail at hand."""

    def __init__(self, name):
        self.name, self.id = name, '-'

    def _write(self, level, message, *arguments, **options):
        text = str(message) % arguments if arguments else str(message)
        log.log(level, '%s: handler %s: %s', self.id, self.name, text,
                **options)

    _at = functools.partialmethod
    log = info = _at(_write, logging.INFO)
    logerr = error = _at(_write, logging.ERROR)
    critical = _at(_write, logging.CRITICAL)
    logwarn = warning = warn = _at(_write, logging.WARNING)
    logdebug = debug = _at(_write, logging.DEBUG)
    exception = _at(_write, logging.ERROR, exc_info=True)


# --- Spool: what is on disk -------------------------------------------------

class Address(str):
    """'a@b', equal to '<a@b>' too: handlers of 1.x compare with that."""

    def __eq__(self, other):
        return isinstance(other, str) and str.strip(self, '<>') == (
            str.strip(other, '<>'))

    def __ne__(self, other):
        return not self == other

    def __hash__(self):
        return hash(str.strip(self, '<>'))


class Unreadable(Exception):
    """A file in msgs/ that is no mail of ours; says why."""


class Unfinished(Exception):
    """A file in msgs/ whose end is missing: it was never promised."""


END = b'\r\n.\r\nNOOP crc32='     # no mail can hold this: its dots are doubled
END_SIZE = len(END) + len(b'01234567\r\n')
STATE = re.compile(rb'NOOP state=(\{[^\r\n]*\}) crc32=([0-9a-f]{8})\r\n')
HANDLED = b'NOOP handled\r\n'
ALERT = 'smtpproxy-alert'   # RFC 3461 ENVID of our own mails to the owner
STORED = re.compile(r'<([^\x00-\x1f\x7f]*)>(?: [^\x00-\x1f\x7f]*)?\Z')
DKIM = re.compile(rb'^dkim-signature[ \t]*:', re.IGNORECASE | re.MULTILINE)
CACHED, CACHED_SIZE = 32, 16384     # mails kept in memory too; bytes of one
MOST_HEAD = 8 << 20             # bytes of envelope and header
PUSH = 4 << 20                  # bytes of a large mail between two pushes


def read_head(file):
    """The first bytes of a mail file, up to the end of its header or more; of
    one without such an end MOST_HEAD bytes."""
    head, data, more = bytearray(), -1, True
    while more and len(head) < MOST_HEAD:
        seen = max(0, len(head) - 8)        # no byte is looked at twice
        more = file.read(smtps.CHUNK)
        head += more
        if data < 0:
            data = head.find(b'\r\nDATA\r\n', seen)
        if data >= 0 and head.find(b'\r\n\r\n', max(data + 6, seen)) >= 0:
            break
    return bytes(head)


def read_tail(file, head):
    """(its last bytes, from END or earlier; their offset). head: its first
    ones. The file may grow meanwhile."""
    if END in head:
        return head, 0
    end, step = os.fstat(file.fileno()).st_size, 4096
    while end:
        begin = file.seek(max(0, end - step))
        at = file.read(end - begin + len(END) - 1).find(END)
        if at >= 0:
            file.seek(begin + at)
            return file.read(), begin + at
        end, step = begin, smtps.CHUNK
    return b'', 0


class Mail:
    """One mail in the spool.

    For handlers: to (list of Address), frm (Address), msg (bytes, read when
    asked for; assign to change it). id: str; handled: bool; tries: int; due:
    seconds since 1970, for people; problem: str, why it is still here; parked:
    bool; unanswered: int, how often a server took all of it and said nothing;
    folded: bool, a server takes no long lines, so it goes with shorter ones;
    holds: bool, its problem is its account's, other mails wait for it; since:
    when its trouble began, in the spool's time, or 0; flaw: str, why its
    envelope must not be sent, or ''; is_alert: bool, it is ours, to the owner.
    data: its first bytes, all of the header among them, and all of it if it
    is small; start, body, dot: offsets of the header, of the empty line behind
    it, and of what follows the final dot's line. seen: the spool's time when
    its state was saved."""

    # What is kept while it is in trouble, and its types.
    STATE_2_0 = {'to': list, 'refused': dict, 'tries': int, 'due': float,
                 'problem': str, 'handled': bool, 'parked': bool}
    STATE = dict(STATE_2_0, unanswered=int, folded=bool, holds=bool,
                 since=float)

    tries, due, problem, unanswered, since = 0, 0.0, '', 0, 0.0
    handled = parked = folded = holds = is_alert = False
    flaw, seen = '', 0

    def __init__(self, id, path, data=None):
        """data: all of it, if that need not be read. Raises Unfinished,
        Unreadable, OSError."""
        self.id, self.path, self.data = id, path, data
        self.refused = {}           # {recipient: reply}, refused for good
        self._msg = None
        self._read()
        self._saved = self._state()

    def _read(self):
        """The envelope, the header and the state."""
        tail, offset = self.data, 0
        if self.data is None:
            with open(self.path, 'rb', buffering=0) as file:
                self.data = read_head(file)
                tail, offset = read_tail(file, self.data)
        end = tail.find(END)
        if end < 0 or len(tail) < end + END_SIZE:
            raise self._why_unfinished()
        self.dot = offset + end + len(b'\r\n.\r\n')
        self._parse_envelope()
        self.body = self.start + smtps.split_header(
            self.data[self.start:self.dot - 3])
        self._parse_end(tail[end + len(END):])

    def _why_unfinished(self):
        """Of a file without an end: it begins as one of ours, or not."""
        start = self.data.rstrip(b'\0')[:len(HANDLED)]
        if any(known.startswith(start) or start.startswith(known)
               for known in (b'MAIL FROM:', HANDLED)):
            return Unfinished('it has no end')
        return Unreadable('it is no mail of smtpproxy')

    def _parse_end(self, text):
        """The checksum, and the states that were added: the last one that is
        whole counts, field by field. Raises Unfinished."""
        if not re.match(rb'[0-9a-f]{8}\r\n', text):
            raise Unfinished('its end is not whole')
        self._checksum = int(text[:8], 16)
        for line, checksum in STATE.findall(text):
            if zlib.crc32(line) == int(checksum, 16):
                self._apply(line)

    def _apply(self, line):
        import json
        state = json.loads(line.decode())
        self.seen = state.pop('seen', 0)
        if all(type(value) is self.STATE.get(name)
               for name, value in state.items()):
            vars(self).update(state)
            self.to = [Address(to) for to in self.to]

    def _state(self):
        return {name: kind(getattr(self, name))
                for name, kind in self.STATE.items()}

    def changes(self):
        """{name: value} of the STATE that its file does not have."""
        return {name: value for name, value in self._state().items()
                if value != self._saved[name]}

    def mark_saved(self):
        """Its file has all of the STATE."""
        self._saved = self._state()

    def _parse_envelope(self):
        envelope, data, _ = self.data.partition(b'\r\nDATA\r\n')
        self.start = len(envelope) + len(data)
        if envelope.startswith(HANDLED):
            self.handled, envelope = True, envelope[len(HANDLED):]
        try:
            lines = envelope.decode().split('\r\n')
            if not lines[0].startswith('MAIL FROM:'):
                raise ValueError('it does not begin with MAIL FROM')
            self.frm, self.parameters = self._parse_stored(lines[0][10:])
            # What a client says is stored without such a parameter.
            self.is_alert = lines[0].endswith(' ENVID=' + ALERT)
            self.to = [self._parse_stored(line[8:])[0] for line in lines[1:]
                       if line.startswith('RCPT TO:')]
            if not self.to or len(self.to) + 1 != len(lines) or not data:
                raise ValueError('its envelope is not whole')
        except ValueError as error:
            raise Unreadable(str(error))

    def _parse_stored(self, text):
        """(Address, parameters) of a path as Draft wrote it. An earlier
        version took some that would now be refused or be another address:
        that one stays as it is, with a flaw. Raises ValueError."""
        stored = STORED.match(text)
        if not stored:
            raise ValueError('its envelope is not whole')
        try:
            address, parameters = smtps.parse_path(text, '5.1.0')
            if address == stored[1]:
                return Address(address), parameters
            why = 'it would be sent as <%s>' % address
        except smtps.Refused as error:
            why = str(error)
        self.flaw = '<%s> in its envelope is no address: %s' % (
            stored[1], why)
        return Address(stored[1]), {}

    def verify(self):
        """Raises Unreadable if the bytes are not those that were stored."""
        checksum, left = 0, self.dot
        with open(self.path, 'rb', buffering=0) as file:
            while left:
                chunk = file.read(min(left, smtps.CHUNK))
                if not chunk:
                    break
                checksum, left = zlib.crc32(chunk, checksum), left - len(chunk)
        if checksum != self._checksum:
            raise Unreadable('its checksum is wrong')

    def header(self):
        """The header, dots doubled, with its last line end."""
        return self.data[self.start:self.body]

    def field(self, name):
        """A header field's value for a log line (str)."""
        match = smtps.fields_named(name).search(self.header())
        value = match[0].partition(b':')[2] if match else b''
        return ' '.join(value.decode('utf-8', 'replace').split())[:100]

    @property
    def msg(self):
        if self._msg is None:
            with open(self.path, 'rb') as file:
                file.seek(self.start)
                self._msg = smtps.unstuffed(
                    file.read(self.dot - 3 - self.start))
        return self._msg

    @msg.setter
    def msg(self, value):
        if isinstance(value, str):
            value = value.encode('utf-8', 'surrogateescape')
        self._msg = bytes(value)


# What a file system says that can't do a thing at all: CIFS, FUSE, NFS, FAT.
UNABLE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP,
          errno.EISDIR}
HELD = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}  # by another

named = {}              # what was said of that already -> its line
# Behind the name of a request: it was served, to no avail; not meant for us.
REFUSED, FOREIGN = '.refused', '.foreign'


def name_once(path, what, error):
    """Says what a file system can't do; it is used without."""
    if what not in named:
        named[what] = '%s: its file system cannot %s: %s; it is used ' \
            'without' % (path, what, error.strerror)
        log.warning('%s', named[what])


def sync_folder(path):
    """Makes names last: POSIX wants the folder synced as well. Raises
    OSError."""
    folder = os.open(path, os.O_RDONLY)
    try:
        sync_open_folder(folder, path)
    finally:
        os.close(folder)


def sync_open_folder(folder, path):
    """The same by its descriptor. Without it a power cut may cost the name
    of a file, on a file system that does not order that by itself."""
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in UNABLE:
            raise
        name_once(path, 'sync folders', error)


def envelope_text(frm, to, parameters):
    """What a mail file begins with (bytes). Raises UnicodeEncodeError."""
    options = ''.join([
        ' %s%s' % (key, '=' + parameters[key] if parameters[key] else '')
        for key in ('BODY', 'SMTPUTF8') if key in parameters])
    if ALERT in parameters:             # never a client's: not upper case
        options += ' ENVID=' + ALERT
    lines = ['MAIL FROM:<%s>%s' % (frm, options)]
    lines += ['RCPT TO:<%s>' % address for address in to]
    text = ('\r\n'.join(lines) + '\r\nDATA\r\n').encode()
    return HANDLED + text if ALERT in parameters else text


class Draft:
    """A mail file that is being written. Nothing is on disk before there is
    much of it: a small mail is one file made, written and synced at once.

    id: str; size: int, bytes of the message."""

    def __init__(self, spool, folder, id, kind, envelope, cache=None,
                 unwanted=None):
        """folder: the descriptor of msgs/ that is locked, or None; kind: of
        the file's name; envelope: see envelope_text; cache: a dict, id -> the
        bytes of a small mail; unwanted: a set of ids whose files are to be
        removed."""
        self.id, self.size = id, 0
        # By its descriptor: never into an empty folder in its place.
        self._spool, self._folder = spool, folder
        self._name = spool.path(id, kind)
        if folder is not None:
            self._name = os.path.basename(self._name)
        self._pending, self._cache = envelope, cache
        self._unwanted = unwanted
        self._file, self._checksum = None, 0
        self._written = self._pushed = 0    # bytes; see _push()
        self._number = 0            # of its name; 0: not on disk yet

    def write(self, chunk):
        """chunk: bytes as on the wire. Raises OSError."""
        self._pending += chunk
        self.size += len(chunk)
        if len(self._pending) >= smtps.CHUNK:
            self._flush()

    def _flush(self):
        """Out of the memory."""
        if self._file is None:
            self._file = os.open(
                self._name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600,
                dir_fd=self._folder)
            self._number = self._spool.count_name()
        data, self._pending = self._pending, b''
        self._checksum = zlib.crc32(data, self._checksum)
        self._written += len(data)
        while data:
            data = data[os.write(self._file, data):]
        if self._written - self._pushed >= PUSH:
            self._push()

    def _push(self):
        """Has the system begin to write to the disk what it would keep in
        memory for a while, which is what Linux does on this advice: so the
        sync of a large mail is short, and small ones that are synced one
        behind the other share the commits of a journal."""
        with contextlib.suppress(OSError, AttributeError):  # not on macOS
            os.posix_fadvise(self._file, self._pushed,
                             self._written - self._pushed,
                             os.POSIX_FADV_DONTNEED)
        self._pushed = self._written

    def seal(self):
        """Writes the end. Raises OSError."""
        self._pending += b'.\r\n'
        self._pending += b'NOOP crc32=%08x\r\n' % zlib.crc32(
            self._pending, self._checksum)
        if self._file is None and self._cache is not None and (
                len(self._cache) < CACHED
                and len(self._pending) < CACHED_SIZE):
            self._cache[self.id] = self._pending
        self._flush()
        self._push()

    def commit(self):
        """The promise: after this the mail survives a crash. Raises OSError,
        then nothing was promised."""
        os.fsync(self._file)
        file, self._file = self._file, None
        os.close(file)
        self._spool.sync_names(self._number)

    def abort(self):
        """Leaves nothing behind, as far as the disk lets us."""
        file, self._file, self._pending = self._file, None, b''
        if self._cache is not None:
            self._cache.pop(self.id, None)
        with contextlib.suppress(OSError):
            if file is not None:
                os.close(file)
        try:
            if self._number:
                os.unlink(self._name, dir_fd=self._folder)
        except OSError:                 # the next round tries again
            if self._unwanted is not None:
                self._unwanted.add(self.id)

    def release(self):
        """It is not being received any more: a scan of the spool sees it, if
        it is there."""
        self._spool.drafts.discard(self.id)


class Busy(Exception):
    """Another process works on this."""


class NoLocks(OSError):
    """Nobody can tell whether another process works on this msgs/."""


def take_lock(file, patience):
    """The lock on an open file or folder. Raises Busy if another has it for
    so many seconds, OSError if there is none to be had."""
    import fcntl
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in HELD:
                raise
        if time.monotonic() > end:
            raise Busy
        time.sleep(0.05)


def make_folder(path):
    """Makes a folder that lasts, if it is not there. Raises OSError."""
    if not os.path.isdir(path):
        os.makedirs(path, 0o700, exist_ok=True)
        sync_folder(os.path.dirname(os.path.abspath(path)))


class Folder:
    """msgs/ as a folder: one process at a time works in it, and names last.

    folder: its path. _counting guards _names."""

    @staticmethod
    def alert(line, about=''):
        """Told of what needs a person; see Alerts.tell."""

    def __init__(self, folder):
        self.folder = folder
        self._lock = self._place = None     # a descriptor, its os.fstat()
        self._lock_file = None              # another, where folders have none
        self._counting = threading.Lock()
        self._names = self._lasting = 0     # names made; of these are synced

    def path(self, id, kind):
        return '%s/%s.%s' % (self.folder, id, kind)

    def open(self, patience=2.0):
        """Makes the folder if need be and locks it. Raises Busy, NoLocks or
        OSError; patience: seconds to wait for a queue command that has the
        lock."""
        make_folder(self.folder)
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            self._take_lock(patience)
            self._place = os.fstat(self._lock)
        except BaseException:
            self.close()
            raise

    def is_locked(self):
        """Does another process work on it now? Nothing is made for that.
        Raises NoLocks or OSError."""
        if not os.path.isdir(self.folder):
            return False
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            self._take_lock(0, 0)
            return False
        except Busy:
            return True
        except NoLocks as error:
            if error.errno != errno.ENOENT:
                raise
            return False                # its lock would be a file
        finally:
            self.close()

    def _take_lock(self, patience, making=os.O_CREAT):
        """Of the folder; of a file in it where the file system can't lock
        folders. Without any lock two services could send everything twice."""
        try:
            try:
                take_lock(self._lock, patience)
            except OSError as error:
                if error.errno not in UNABLE | {errno.EBADF}:   # NFS
                    raise
                name_once(self.folder, 'lock folders', error)
                self._lock_file = os.open(
                    os.path.join(self.folder, '.lock'),
                    os.O_RDWR | os.O_NOFOLLOW | making, 0o600)
                take_lock(self._lock_file, patience)
        except OSError as error:
            raise NoLocks(error.errno, error.strerror, self.folder) from error

    def close(self):
        locks = self._lock, self._lock_file
        self._lock = self._lock_file = None     # first: see sync()
        for file in locks:
            if file is not None:
                os.close(file)

    def is_there(self):
        """Is it still the folder that we have locked? A disk may be away."""
        try:
            return self._lock is not None and os.path.samestat(
                os.stat(self.folder), self._place)
        except OSError:
            return False

    def _is_gone(self, error):
        """Does an OSError say that a file in it is gone? Not if all of msgs/
        is away: then the file may come back, and be sent again. So the folder
        is asked that we have locked, wherever it is now."""
        if not isinstance(error, FileNotFoundError):
            return False
        if self._lock is None:
            return True
        try:
            os.stat(os.path.basename(error.filename), dir_fd=self._lock,
                    follow_symlinks=False)
        except FileNotFoundError:
            return True
        except OSError:                 # EIO, ESTALE: who knows
            pass
        return False

    def count_name(self):
        """The number of a name that was just made."""
        with self._counting:
            self._names += 1
            return self._names

    def sync_names(self, number):
        """Makes that name last: one sync serves all that were made before
        it. Raises OSError."""
        if number > self._lasting:
            newest = self._names        # before the sync
            if self.sync():
                self._lasting = newest  # if set back: one sync more than need

    def sync(self):
        """Makes all names last; whether it was in the folder that is locked:
        then no other needs to be opened. Raises OSError."""
        if self._lock is None:
            sync_folder(self.folder)
            return False
        self._demand_place()
        sync_open_folder(self._lock, self.folder)
        return True

    def _demand_place(self):
        """Nothing is promised, or made, in another folder in its place: that
        one may be hidden when the disk is back. Raises OSError."""
        if self._lock is not None and not self.is_there():
            raise FileNotFoundError(errno.ENOENT, 'it is away', self.folder)

    # Notes of ours, that have to last.

    def note(self, name):
        """The text (str) that was kept under that name. Raises OSError."""
        with open(os.path.join(self.folder, name, 'note')) as file:
            return file.read()

    def keep_note(self, name, text):
        """name: one of OURS. Raises OSError, then the old one is there."""
        self._demand_place()
        folder = os.path.join(self.folder, name)
        make_folder(folder)
        path = os.path.join(folder, 'note')
        file = os.open(path + '.new', os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
                       0o600)
        data = text.encode()
        try:
            while data:
                data = data[os.write(file, data):]
            os.fsync(file)
        finally:
            os.close(file)
        os.rename(path + '.new', path)
        sync_folder(folder)

    # Requests of the queue commands, which may run beside the service.

    def ask(self, id, what):
        """Leaves a request; returns its path, which is gone once done."""
        folder = os.path.join(self.folder, 'asked')
        self._demand_place()
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        path = os.path.join(folder, '%s.%s' % (id, what))
        for answer in REFUSED, FOREIGN:     # to an earlier one
            with contextlib.suppress(OSError):
                os.unlink(path + answer)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
        return path

    def asked(self):
        """[(path, id or 'all', 'retry' or 'delete')]"""
        folder = os.path.join(self.folder, 'asked')
        try:
            names = os.listdir(folder)
        except OSError:
            return []
        return [(os.path.join(folder, name),) + name.rpartition('.')[::2]
                for name in sorted(names)]

    def set_aside(self, name, why):
        """Moves what can't be read to corrupt/: never run, never deleted."""
        if self._lock is None:
            return                      # a queue command only looks
        corrupt = os.path.join(self.folder, 'corrupt')
        try:
            make_folder(corrupt)
            target = os.path.join(corrupt, name)
            while os.path.exists(target):
                target += '+'
            os.rename(os.path.join(self.folder, name), target)
            sync_folder(corrupt)
            self.sync()
            line = '%s: cannot be read: %s; it is kept as %s' % (
                name.rpartition('.')[0] or name, why, target)
            log.error('%s', line)
            self.alert(line)
        except OSError as error:
            line = '%s: cannot be read: %s; nor set aside: %s' % (
                name, why, error)
            log.error('%s', line)
            self.alert(line, 'aside ' + name)


class Spool(Folder):
    """msgs/, the only owner of its files. What the client said is what the
    server will be told: ID.mail is Batch SMTP, plain text.

    The legal states, who makes them, and what a crash costs (nothing that
    was promised is ever lost):

      files                   made by              a crash there costs
      ------------------------------------------------------------------
      ID.mail without END     Draft.write          nothing: no 250 was said;
                                                   swept at start
      ID.mail                 Draft.seal: END      at worst a second copy,
                              commit: fsync IS     stored with its 250 unheard
                              THE PROMISE
      ID.mail with lines      save: each line has  one try more before it; an
        "NOOP state=" behind  its checksum, one    accepted recipient's second
        END                   fsync                copy, never after
      ID.mail ID.new          replace              ID.new counts for nothing;
                                                   swept at start
      ID.mail, "handled" in   replace: the rename  handlers may run twice
        its first line                             before it, never after
      nothing                 remove               a second copy before it

    Beside them: corrupt/ for what can't be read, asked/ for requests of the
    queue commands (ID.retry, ID.delete), alerts/ for what was told to the
    owner. Only the process that holds the lock on the folder (or on .lock,
    where folders have none) changes anything but asked/.

    Time: ids and ages count seconds that this spool has seen with a service
    running, not the box's clock, which may begin in 1970 and jump. They go on
    where they were: each state says when it was saved, and what was told to
    the owner."""

    ID = re.compile(r'[0-9a-f]{8}-[0-9a-f]{5}')
    _OURS = ('corrupt', 'asked', 'alerts', '.lock')

    def __init__(self, folder, clock=time.monotonic):
        super().__init__(folder)
        self.drafts = set()         # ids that are being received
        self.first_own = ''         # older ids were found at start
        self._clock = clock
        self._epoch = time.time() - clock()
        self._numbering = threading.Lock()      # guards _sequence
        self._sequence = int.from_bytes(os.urandom(2), 'big')
        self._unwanted = set()      # ids of files that could not be removed
        self._unsaved = {}          # id -> changes that the disk refused
        self._cache = {}            # id -> the bytes of a small mail that was
                                    # just written: nobody has to read it

    # Time and ids.

    def now(self):
        """Seconds, in this spool's own time."""
        return self._epoch + self._clock()

    def go_on_from(self, second):
        """It is that late at least: that time was seen."""
        self._epoch += max(0, second - self.now())

    def age(self, id):
        """Seconds that a mail has been here with a service running."""
        return self.now() - int(id[:8], 16)

    def _new_id(self):
        with self._numbering:
            self._sequence = (self._sequence + 1) % 0x100000
            return '%08x-%05x' % (int(self.now()) % 0x100000000,
                                  self._sequence)

    # A mail's life.

    def draft(self, frm, to, parameters):
        """A new Draft."""
        draft = Draft(self, self._lock, self._new_id(), 'mail',
                      envelope_text(frm, to, parameters), self._cache,
                      self._unwanted)
        self.drafts.add(draft.id)
        return draft

    def load(self, id, to_send=True):
        """The Mail of an id, None if it is not there. Raises Unfinished,
        Unreadable or OSError. to_send: one found at start is verified."""
        if id in self._unwanted:
            return None
        data = self._cache.pop(id, None)
        try:
            mail = Mail(id, self.path(id, 'mail'), data)
            if data is not None:
                return mail
        except FileNotFoundError as error:
            if self._is_gone(error):
                return None
            raise
        if to_send and id < self.first_own:
            mail.verify()
        vars(mail).update(self._unsaved.get(id, {}))
        self.go_on_from(mail.seen)
        return mail

    def may_be_parked(self, id):
        """False if it surely is not. Reads the end of its file only, where
        the state that parked it is the last."""
        try:
            with open(self.path(id, 'mail'), 'rb', buffering=0) as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
                return id in self._unsaved or b'"parked": true' in file.read()
        except OSError:
            return True

    def save(self, mail):
        """Keeps what is known of a mail in trouble: recipients left, tries.
        When the disk refuses it is remembered as long as we run.

        2.0 passes over a line with names that it does not know. Those have
        one of their own, so that after a way back to 2.0 nobody gets a mail
        again who has it, and what is parked stays so."""
        changes = mail.changes()
        known = {name: changes[name] for name in Mail.STATE_2_0
                 if name in changes}
        new = {name: value for name, value in changes.items()
               if name not in known}
        lines = self._state_line(known) + (
            self._state_line(new) if new else b'')
        try:
            self._append(mail.path, lines)
            mail.mark_saved()
            self._unsaved.pop(mail.id, None)
        except OSError as error:
            self._unsaved[mail.id] = changes
            line = ('%s: its state cannot be saved: %s; remembered until the '
                    'next stop' % (mail.id, error))
            log.error('%s', line)
            self.alert(line, 'saving ' + mail.id)

    def _state_line(self, state):
        import json
        line = json.dumps(dict(state, seen=int(self.now()))).encode()
        return b'NOOP state=%s crc32=%08x\r\n' % (line, zlib.crc32(line))

    @staticmethod
    def _append(path, line):
        """Adds lines that last. Raises OSError; the part of a line that a
        crash or a full disk has left does no harm."""
        file = os.open(path, os.O_RDWR | os.O_APPEND)
        try:
            os.lseek(file, -2, os.SEEK_END)
            if os.read(file, 2) != b'\r\n':
                line = b'\r\n' + line
            while line:
                line = line[os.write(file, line):]
            os.fsync(file)
        finally:
            os.close(file)

    def replace(self, mail):
        """Stores what handlers made of a mail: envelope and message, one
        rename is the commit. Raises OSError, then the old one is there."""
        path = self.path(mail.id, 'new')
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        draft = Draft(
            self, self._lock, mail.id, 'new', HANDLED + envelope_text(
                mail.frm, mail.to, mail.parameters))
        try:
            draft.write(smtps.stuffed(mail.msg))
            draft.seal()
            draft.commit()
            os.rename(path, mail.path)
        except BaseException:
            draft.abort()
            raise
        self.sync()

    def remove(self, mail):
        """Forgets a mail."""
        try:
            os.unlink(mail.path)
        except OSError as error:
            if not self._is_gone(error):
                self._unwanted.add(mail.id)
                log.error('%s: done, but its file cannot be removed: %s; it '
                          'will not be sent again as long as we run', mail.id,
                          error)
                return
        self._unwanted.discard(mail.id)
        self._unsaved.pop(mail.id, None)

    # All of them.

    def scan(self):
        """The ids of all mails here, oldest first. Touches no file. Raises
        OSError."""
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            names = os.listdir(folder)
            if self._lock is not None and not os.path.samestat(
                    os.fstat(folder), self._place):     # of what was listed
                raise FileNotFoundError(errno.ENOENT, 'it is away',
                                        self.folder)
        finally:
            os.close(folder)
        return sorted(name[:-5] for name in names if name.endswith('.mail')
                      and self.ID.fullmatch(name[:-5])
                      and name[:-5] not in self.drafts)

    def start(self):
        """scan(), and goes on in the time of the newest mail: the service's
        time, if there is nothing, begins with the box's. What was never
        promised is removed, what is not ours is set aside."""
        found = self.scan()
        if found:
            newest = max(int(id[:8], 16) for id in found)
            self._epoch = newest + 1 - self._clock()
        self.first_own = '%08x' % int(self.now())
        self._sweep(set(found))
        return found

    def _sweep(self, found):
        """found: ids of mails. Before anything else is written."""
        for name in os.listdir(self.folder):
            id, _, kind = name.rpartition('.')
            path = os.path.join(self.folder, name)
            if id in found and kind == 'mail' or (
                    name in self._OURS or not os.path.isfile(path)):
                continue
            if self.ID.fullmatch(id) and kind == 'new':
                os.unlink(path)
            elif not (self.ID.fullmatch(id) and kind == 'mail'):
                self.set_aside(name, self._suspect(path))

    @staticmethod
    def _suspect(path):
        """What a file that is not ours may be."""
        try:
            with open(path, 'rb') as file:
                head = file.read(2)
        except OSError as error:
            return error.strerror       # of another user
        if head[:1] in (b'\x80', b'(', b'c'):
            return ('it looks like pickled mail of smtpproxy 1.x, which is '
                    'not run: let 1.x deliver what it has before an upgrade')
        return 'it is no mail of smtpproxy'

    def retry_removals(self):
        """Tries again to remove what is delivered, or was never promised."""
        for id in list(self._unwanted):
            try:
                os.unlink(self.path(id, 'mail'))
            except OSError as error:
                if not self._is_gone(error):
                    continue            # said already
            self._unwanted.discard(id)


# --- Front door: what clients hand in ---------------------------------------

MISSING = re.compile(rb'^(date|message-id|from|received)[ \t]*:',
                     re.IGNORECASE | re.MULTILINE)
NO_VALUE = re.compile(rb':[ \t]*\r\n')
EMPTY = re.compile(rb'^(?:date|message-id|from)[ \t]*:[ \t]*\r\n'
                   rb'(?:[ \t]+\r\n)*(?![ \t])', re.IGNORECASE | re.MULTILINE)
# The first line of a mail from a mailbox ("From me Sun ...") is no field.
HEADER = re.compile(rb'''(?x) (?: >?From[ ](?![ \t]*:).*\r\n )?
    (?P<fields> (?: [!-9;-~]+[ \t]*: .*\r\n (?: [ \t].*\r\n )* )* )''')
UNUSUAL = re.compile(r'[^A-Za-z0-9_.:\[\]-]')      # in a client's name
HEADER_LIMIT = 512 * 1024       # bytes
HOPS = 100                      # RFC 5321 6.3


def without_empty(header):
    """header without a Date, Message-ID or From that is empty: it counts as
    missing. What is signed stays as it is."""
    if NO_VALUE.search(header) and not DKIM.search(header):
        return EMPTY.sub(b'', header)
    return header


class Admission:
    """May this client send as this one? Of one conversation: it knows who has
    signed in. any_sender: a handler may still change who a mail is from, so
    a sender without account is taken. alert: callable(line, about), see
    Alerts.tell."""

    announced = set()       # unknown senders whose ini block is in the log

    def __init__(self, settings, any_sender, alert):
        self._settings, self._any_sender = settings, any_sender
        self._alert = alert
        self._signed_in_as = None       # (user, section)

    def sign_in(self, client, user, password):
        """Any login will do (devices insist on one), but for an account with
        localpassword. Raises smtps.Refused."""
        import hmac
        section = self._settings.section_for(user)
        account = self._settings.accounts.get(section)
        if not account or not account.localpassword or (
                section == 'default' and '@' not in user
                and user.lower() != section):
            return
        if not hmac.compare_digest(
                *(text.encode('utf-8', 'surrogateescape')
                  for text in (account.localpassword, password))):
            self._alert('client %s was refused: wrong password for [%s]' % (
                client, section), 'password %s %s' % (
                    client.address, section))
            raise smtps.Refused(535, '5.7.8 wrong password for [%s]'
                                % smtps.printable(section))
        self._signed_in_as = user, section

    def admit(self, client, sender):
        """Raises smtps.Refused if client may not send as sender."""
        section = self._settings.section_for(sender)
        if section is None:
            if self._any_sender:
                return
            self._explain_unknown(client, sender)
            raise smtps.Refused(550, '5.7.1 no account for sender <%s>'
                                % smtps.printable(sender))
        if self._settings.accounts[section].localpassword and (
                self._signed_in_as != (client.user, section)):
            raise smtps.Refused(530, '5.7.0 sign in as [%s] to send as this '
                                'one' % smtps.printable(section))

    def _explain_unknown(self, client, sender):
        """What to add to the ini, once. Alerts remember by themselves: the
        owner may have asked for them later."""
        self._alert('client %s was refused: there is no account for its '
                    'sender <%s>; to take its mail add a section for it to '
                    'the ini' % (client, sender), 'sender ' + sender)
        if sender in self.announced or len(self.announced) > 1000:
            return
        self.announced.add(sender)
        log.warning('%s: no account for sender <%s>; to take its mail add '
                    'this to the ini and reload:', client, sender)
        for line in ('[%s]' % (sender or 'default'), 'smtphost=<your '
                     'provider\'s server>', 'smtpsecurity=tls',
                     'smtpport=587', 'smtpusername=<your name there>',
                     'smtppassword=<your password there>'):
            log.warning('    %s', line)


class Intake(smtps.Session):
    """One client's way in. admission: its Admission; open_draft: callable(
    sender, recipients, parameters) -> Draft; announce: callable(id, sender,
    line), told of each mail that is safe, with its line for the log; alert:
    callable(line, about), of what could not be stored."""

    def __init__(self, client, admission, open_draft, announce, alert):
        super().__init__(client)
        self._admission, self._alert = admission, alert
        self._open_draft, self._announce = open_draft, announce

    def auth(self, user, password):
        self._admission.sign_in(self.client, user, password)

    def mail(self, sender, parameters):
        self._admission.admit(self.client, sender)

    def data(self, sender, recipients, parameters):
        return IncomingMessage(
            self.client, sender, recipients,
            self._open_draft(sender, recipients, parameters), self._announce,
            self._alert)


class IncomingMessage(smtps.Message):
    """One mail on its way from a client to its file: Received is put in
    front, and what every mail needs and this one lacks."""

    def __init__(self, client, sender, recipients, draft, announce, alert):
        self._client, self._sender = client, sender
        self._recipients = recipients
        self._announce, self._alert = announce, alert
        self._draft, self.id = draft, draft.id
        self._head = b''            # while the header goes on; then None

    def write(self, chunk):
        """Raises smtps.Refused."""
        if self._head is None:
            self._store(self._draft.write, chunk)
            return
        self._head += chunk
        if not self._header_goes_on():
            self._write_head()

    def seal(self):
        if self._head is not None:
            self._write_head()
        self._store(self._draft.seal)

    def commit(self):
        """The only place that says the 250 to the final dot."""
        self._store(self._draft.commit)
        try:
            self._announce(
                self.id, self._sender, '%s: accepted from <%s> to %s, %d '
                'bytes, client %s (%s)' % (
                    self.id, self._sender, listed(self._recipients),
                    self._draft.size, self._client,
                    self._client.hello or 'gave no name'))
        except BaseException:           # it is safe: no second copy, please
            log.exception('%s: accepted, but an error keeps it back: a reload '
                          'or the next start sends it', self.id)
        # Now a scan may see it: earlier the relay might take it twice.
        self._draft.release()
        return '2.0.0 accepted as ' + self.id

    def abort(self):
        self._draft.abort()
        self._draft.release()

    def _store(self, step, *arguments):
        """Does step; a full disk is the client's to try again."""
        try:
            step(*arguments)
        except OSError as error:
            line = ('%s: not taken from <%s>, client %s: it cannot be stored:'
                    ' %s; answered 452, the client may try again' % (
                        self.id, self._sender, self._client, error))
            log.error('%s', line)
            self._alert(line, 'storing')
            raise smtps.Refused(452, '4.3.1 no room for it now, try later')

    def _header_goes_on(self):
        """May what comes next belong to the header, too?"""
        rest = self._head[HEADER.match(self._head).end():]
        return b'\r\n' not in rest and len(self._head) <= HEADER_LIMIT

    def _write_head(self):
        """Writes what is there, the header completed. Raises smtps.Refused.
        """
        match = HEADER.match(self._head)
        header, rest = match['fields'], self._head[match.end():]
        if len(header) > HEADER_LIMIT:
            raise smtps.Refused(552, '5.3.4 the header is too large')
        if not rest.startswith(b'\r\n'):
            rest = b'\r\n' + rest
        header = without_empty(header)
        self._head = None
        self._store(self._draft.write,
                    self._new_fields(header) + header + rest)

    def _new_fields(self, header):
        """Received, and Date, Message-ID, From where missing."""
        found = [name.lower() for name in MISSING.findall(header)]
        if found.count(b'received') > HOPS:
            log.error('%s: refused, it goes round in a loop: more than %d '
                      'Received lines; from <%s>, client %s', self.id, HOPS,
                      self._sender, self._client)
            raise smtps.Refused(554, '5.4.6 mail loop')
        now = mail_date(int(time.time()))
        fields = [self._received(now)]
        if b'date' not in found:
            fields.append('Date: ' + now)
        if b'message-id' not in found:
            fields.append('Message-ID: <%s.%s@%s>' % (
                self.id, os.urandom(4).hex(), HOST))
        if b'from' not in found:
            fields.append('From: <%s>' % (
                self._sender or 'MAILER-DAEMON@' + HOST))
        return ('\r\n'.join(fields) + '\r\n').encode()

    def _received(self, now):
        """RFC 5321 4.4; the protocol's name: RFC 3848."""
        client = self._client
        protocol = 'SMTP' if not client.extended else (
            'ESMTP' + 'S' * client.secure + 'A' * (client.user is not None))
        return ('Received: from %s ([%s%s])\r\n\tby %s with %s id %s;\r\n'
                '\t%s' % (
                    UNUSUAL.sub('?', client.hello or '')[:64] or 'unknown',
                    'IPv6:' if ':' in client.address else '', client.address,
                    HOST, protocol, self.id, now))


@functools.lru_cache(1)
def mail_date(second):
    """RFC 5322 3.3, of a time as int."""
    return time.strftime('%a, %d %b %Y %H:%M:%S +0000', time.gmtime(second))


def listed(addresses):
    """Recipients for a log line."""
    shown = '<%s>' % '>, <'.join(addresses[:5])
    return shown + (' and %d more' % (len(addresses) - 5)
                    if len(addresses) > 5 else '')


# --- Handlers: plug-ins that look at a mail ---------------------------------

class Callback:
    """What a handler may ask for: setTo, setFrom change header and envelope
    of mail; message follows."""

    def __init__(self, message, mail):
        self.message, self.mail = message, mail

    def setTo(self, string):
        self.mail.to = self.set_field('To', string)

    def setFrom(self, string):
        self.mail.frm = self.set_field('From', string)[0]

    def set_field(self, name, string):
        """Returns the bare addresses in string. Raises ValueError."""
        from email.utils import formataddr, getaddresses
        found = [pair for pair in getaddresses([str(string)]) if pair[1]]
        if not found or re.search(r'[\x00-\x1f]', string):
            raise ValueError('no address in %r' % string)
        value = ', '.join(formataddr(pair) for pair in found)
        del self.message[name]
        self.message[name] = value
        field = ('%s: %s\r\n' % (name, value)).encode()
        message = smtps.DataReader.LINE_END.sub(b'\r\n', self.mail.msg)
        end = smtps.split_header(message)
        self.mail.msg = smtps.fields_named(name.lower()).sub(
            b'', message[:end]) + field + message[end:]
        return [Address(address) for _, address in found]


class Handlers:
    """The enabled plug-ins, in alphabetical order. helpers: names of modules
    beside them that hold none; problems: [str], what the owner should mend."""

    def __init__(self, settings):
        """Loads handlers/*.py. What can't be loaded is logged and skipped."""
        self.enabled, self.helpers, self.problems = [], [], []
        unknown = dict(settings.handlers)
        self.make_neighbours()
        for name in self.names():
            options = unknown.pop(name, None)
            try:
                found = self.load(name)
                for handler in found:
                    self.prepare(name, handler, options or {})
                if not found:
                    self.note_helper(name, options)
            except BaseException as error:      # sys.exit() as well
                self.problem(name, 'cannot be loaded and is skipped: %s'
                             % (missing_module(error) if isinstance(
                                 error, ModuleNotFoundError) and
                                error.name in PACKAGES else repr(error)))
        for name in unknown:
            self.problem(name, 'is in the ini, but there is no handlers/%s.py'
                         % name)

    def problem(self, name, text):
        self.problems.append('handler %s %s' % (name, text))
        log.error('%s', self.problems[-1])

    def note_helper(self, name, options):
        """A module without a handler: others import it."""
        if options is not None:
            self.problem(name, 'is in the ini, but handlers/%s.py has no '
                         'class derived from MailHandler' % name)
            return
        self.helpers.append(name)
        log.info('handlers/%s.py is no handler: a module for others to import',
                 name)

    @staticmethod
    def make_neighbours():
        """A handler may import what lies beside it, as with 1.x. The folder
        comes last, so that nothing there takes the place of a module of
        Python; a reload reads anew what was imported from there."""
        import importlib
        folder = os.path.join(HOME, 'handlers')
        if folder not in sys.path:
            sys.path.append(folder)
        for name, module in list(sys.modules.items()):
            file = getattr(module, '__file__', None) or ''
            if os.path.dirname(file) == folder:
                del sys.modules[name]
        importlib.invalidate_caches()

    @staticmethod
    def names():
        try:
            files = sorted(os.listdir(os.path.join(HOME, 'handlers')))
        except OSError:
            return []
        return [file[:-3] for file in files
                if file.endswith('.py') and not file.startswith('_')]

    @staticmethod
    def load(name):
        """Instances of the handler classes in handlers/NAME.py; an unfinished
        one that others there are derived from is only their base."""
        import importlib.util
        import types
        from MailHandler import MailHandler
        # Handlers of 1.x begin with 'import mlogging', which is gone.
        sys.modules.setdefault('mlogging', types.ModuleType('mlogging'))
        spec = importlib.util.spec_from_file_location(
            'handlers.' + name, os.path.join(HOME, 'handlers', name + '.py'))
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        kinds = [kind for kind in vars(module).values()
                 if isinstance(kind, type) and issubclass(kind, MailHandler)
                 and kind.__module__ == module.__name__]
        bases = {base for kind in kinds for base in kind.__mro__[1:]}
        return [kind() for kind in kinds
                if kind not in bases or not kind.__abstractmethods__]

    def prepare(self, name, handler, options):
        logger = HandlerLog(name)
        handler.setLogger(logger)
        if hasattr(handler, 'setConfig'):
            complaints = handler.setConfig(dict(options))
            for text in complaints if isinstance(complaints, list) else ():
                self.problem(name + ':', text)
        if handler.isEnabled():
            self.enabled.append((name, handler, logger))

    def run(self, mail):
        """Shows mail to each; False if one discards it."""
        for name, handler, logger in self.enabled:
            logger.id = mail.id
            before = mail.frm, list(mail.to), mail.msg
            verdict = self.call(name, handler, mail)
            if verdict is None:
                mail.frm, mail.to, mail.msg = before
            elif verdict is False:
                log.info('%s: discarded by handler %s: from <%s> to %s, '
                         'subject %s', mail.id, name, mail.frm,
                         listed(mail.to), mail.field('subject'))
                return False
        return True

    def call(self, name, handler, mail):
        """What handleMessage returns; None if it failed: then the mail goes
        on as it was before."""
        import email
        try:
            message = email.message_from_bytes(mail.msg)
            verdict = handler.handleMessage(
                message, mail, Callback(message, mail))
            mail.frm, mail.to = self.checked(mail)
        except BaseException:       # a plug-in's sys.exit() ends no relay
            log.exception('%s: handler %s failed; the mail goes on as it was '
                          'before', mail.id, name)
            return None
        if verdict is not True and verdict is not False:
            log.warning('%s: handler %s returned %r, not True or False; the '
                        'mail goes on', mail.id, name, verdict)
            return True
        return verdict

    @staticmethod
    def checked(mail):
        """(frm, to) as Address, fit for an envelope. Raises ValueError."""
        if isinstance(mail.to, str) or not all(
                isinstance(a, str) for a in [mail.frm] + list(mail.to)):
            raise ValueError('mail.to must be a list of str, mail.frm a str')
        frm, *to = map(Handlers.envelope_address, [mail.frm] + list(mail.to))
        if not to or not all(to):
            raise ValueError('it left no recipient')
        return frm, to

    @staticmethod
    def envelope_address(text):
        """The Address that the listener makes of the same text: it is what
        will be read from msgs/. Raises ValueError."""
        try:
            address, parameters = smtps.parse_path(
                '<%s>' % text.strip('<>'), '5.1.3')
        except smtps.Refused as error:
            raise ValueError('%r: %s' % (text, error))
        if parameters:
            raise ValueError('%r: more than an address' % text)
        return Address(address)


# --- Advice: what a failure means to the owner ------------------------------

def explain(error, host):
    """What an exception means to the owner (str)."""
    ssl = sys.modules.get('ssl')    # not there: then it is no error of TLS
    if ssl and isinstance(error, ssl.SSLCertVerificationError):
        return 'certificate of %s: %s%s' % (
            host, error.verify_message, certificate_advice(error))
    if ssl and isinstance(error, ssl.SSLError):
        return 'no TLS with %s: %s; is it the right port, and smtpsecurity ' \
            'ssl or tls? old servers may need smtpweaktls=true' % (
                host, error.reason or error)
    if isinstance(error, socket.gaierror):
        return 'the name %s is not known: %s' % (host, error.strerror)
    if smtps.is_silence(error):
        return '%s does not answer in time' % host
    if isinstance(error, ImportError) or 'unknown encoding' in str(error):
        return missing_module(error)
    text = said(error)
    if hasattr(error, 'smtp_code'):
        return '%s said %s' % (host, text)
    return '%s: %s' % (host, 'connection closed' if text == '-ERR EOF'
                       else text)


def said(error):
    """What the server said, if it said something: 'CODE text', '-ERR text';
    else the words of the system."""
    if hasattr(error, 'smtp_code'):
        return '%d %s' % (error.smtp_code, smtps.plain(error.smtp_error))
    text = getattr(error, 'strerror', None) or (
        error.args[0] if error.args else error)
    return smtps.plain(text if isinstance(text, bytes) else str(text))


def is_absence(error):
    """Was there nobody at the other end, or no way to it?"""
    return isinstance(error, (ConnectionRefusedError, socket.gaierror)) or (
        getattr(error, 'errno', None) in (errno.ENETUNREACH,
                                          errno.EHOSTUNREACH))


def certificate_advice(error):
    """What to do about it, by OpenSSL's code."""
    if error.verify_code in (9, 10):        # not yet valid, expired
        return '; is the clock of this box right? it says ' + time.strftime(
            '%Y-%m-%d %H:%M')
    if error.verify_code in (62, 64):       # host name, IP address
        return '; set smtphost and pophost to the name in the certificate'
    if not smtps.client_context().cert_store_stats()['x509_ca']:
        return '; this box has no CA certificates at all: install ca-bundle ' \
            '(or ca-certificates), or set tlscafile'
    return '; if it is your own, set tlscafile to the PEM file of its CA'


def port_advice(account):
    """The usual mistake: TLS where none is spoken, or the reverse."""
    port, security = account.smtpport, account.smtpsecurity
    if (port == 465) == (security == 'ssl') or port not in (25, 465, 587):
        return ''
    return '; %s is rarely right for port %d' % (
        'smtpsecurity=' + security, port)


NAME_REFUSED = re.compile(
    r'\b(?:50[14]|550) .*\b(?:helo|ehlo|fqdn|fully[- ]qualified host)', re.I)


def name_advice(reply):
    """What to do if it is our name in EHLO that a server's reply (str) is
    about, or ''. Many ask for it at MAIL or RCPT only."""
    if not NAME_REFUSED.search(reply):
        return ''
    return '; it does not like the name we give in EHLO: set localhostname ' \
        'to a full one, such as mail.example.org'


# A mail's line of more than 998 bytes, in many words.
LINE_TOO_LONG = re.compile(
    r'\blines?\b.{0,40}\b(?:long|longer|length|exceeds?)\b|\b998\b', re.I)


ABOUT_RECIPIENT = re.compile(r'5\d\d 5\.(1\.[1-6]|2\.\d+|3\.4)\b')
ABOUT_LOGIN = re.compile(r'(?i)relay|auth|\blog.?in\b|\bpop3?\b')


def may_miss_login(reply, proven):
    """Whether a 5xx (str) to MAIL or RCPT may mean that the server does not
    know of our POP login. proven: it has taken a mail since; then only if the
    reply speaks of that, since a server may forget us before popcheckdelay is
    over."""
    # An address says nothing, nor does Postfix's name of a table.
    words = re.sub(r'\S*@\S*|\bin relay recipient table\b', '', reply)
    return bool(ABOUT_LOGIN.search(words)) or not (
        proven or ABOUT_RECIPIENT.match(reply))


def family_advice(account, error):
    """A name without an address may have one of the other version of IP."""
    if account.ipversion == 'any' or not isinstance(error, socket.gaierror):
        return ''
    return '; with ipversion=%s only such addresses count' % account.ipversion


def asks_too_soon(why):
    """Whether a POP server refuses only because of the login before, which
    was good: RFC 2449 8.1.1, and those who say it in words."""
    return bool(re.search(
        r'(?i)\[login-delay\]|login (limit|delay|interval)|too (often|many '
        r'log.?ins)|minimum time between|exceeded pop command', why))


def pop_advice(account, why):
    """What to do about a POP login that failed, by its text."""
    if account.popssl != 'tls' or 'not supported by server' not in why:
        return ''
    return ': no password is sent in plain text; popssl=true and ' \
        'popport=995, perhaps?'


class Advice(NamedTuple):
    """What a known reply means, a row of KNOWN_REPLIES.

    where: a pattern for the host that said it; stages: when it was said, of
    connect tls hello login pop mail rcpt data dot token, with blanks; both
    '': any. pattern: for 'CODE text' as flattened makes it; the enhanced
    code is where it belongs, behind the code.
    kind: '' as the first digit says; later: passes by itself; never: not for
    this mail; account: a limit of the account, all its mail waits an hour at
    least; person: nothing of the account passes before its owner acts.
    sentence: for the owner, what it means and what to do.
    """
    where: str = ''
    stages: str = ''
    pattern: str = ''
    kind: str = ''
    sentence: str = ''


GOOGLE = r'\b(gmail|googlemail|google|googleapis)\b'
MICROSOFT = r'\b(office365|outlook|hotmail|microsoftonline)\b'
IONOS = r'\b(gmx|ionos|1und1|1and1|kundenserver)\b|\b(web\.de|mail\.com)$'
YAHOO = r'\b(yahoo|aol|att|verizon)\b'
ICLOUD = r'\bmail\.me\.com$|\bicloud\b'
GREETED = 'connect hello mail rcpt'     # many servers say at RCPT what they
SENDING = 'mail rcpt data dot'          # hold against us, or the sender

APP_PASSWORD = ('it wants an app password, not that of the account: make one '
                'in the security settings on the web and set it as '
                'smtppassword')
GOOGLE_PASSWORD = (
    'Google wants an app password, not that of the account: switch on 2-step '
    'verification, make one at myaccount.google.com/apppasswords and set it '
    'as smtppassword; with oauth=google sign in again by --login')
OWN_ADDRESS = ('the provider takes only addresses of the account as sender: '
               'set forcefrom to the address of the account, or add the '
               'other one as an alias on the web')
USE_TLS = ('the server wants an encrypted connection: set smtpsecurity=tls '
           'and smtpport=587, or smtpsecurity=ssl and smtpport=465')
USE_LOGIN = ('the server wants a login first: set smtpusername, smtppassword '
             'and smtpsecurity=tls')
FULL_NAME = ('the server does not like the name of this box: set '
             'localhostname to a full name that exists in the DNS')
PRIVATE_LINE = ('the address of your internet line is on a block list, as '
                'most private lines are: send through the outgoing server of '
                'your provider, smtpport=587, smtpsecurity=tls, with login')
REVERSE_NAME = ('your line has no proper name in the DNS, servers for '
                'incoming mail want one: send through the outgoing server of '
                'your provider, smtpport=587, smtpsecurity=tls, with login')
EXCEEDED = r'(limit\b.* (exceeded|reached)|exceeded\b.* limit|try again later)'
LIMIT = ('the sending limit of this account is reached: its mail waits and '
         'goes by itself; if it comes often, set smtprate or ask the '
         'provider for more')
DAY_LIMIT = ('the daily sending limit of this account is reached: its mail '
             'waits and goes by itself, within a day')
BLOCKED = ('Microsoft has blocked this account or its organization from '
           'sending: change the password; the administrator finds it under '
           'Restricted entities in the Defender portal')
NOT_PROVEN = ('the domain in From does not allow this way of sending (SPF, '
              'DKIM, DMARC): send through the provider of that domain, or '
              'set forcefrom to an address of the account')
BAD_HEADER = ('the header of this mail is not as the rules say: look at '
              'From, To and Date with --show, and correct names and addresses '
              'in the device')
LOOKS_LIKE_SPAM = ('the content looks like spam to the provider: give the '
                   'device a telling subject and some text, and try again')
UNKNOWN_RECIPIENT = ('the address of the recipient does not exist: correct '
                     'it in the device')
FULL_RECIPIENT = ('the mailbox of the recipient is full: its owner has to '
                  'make room')

# Asked from top to bottom, the first that fits counts: special before
# general. A row that changes the kind needs a stage, a host or an enhanced
# code, so that the refusal of a recipient is never taken for one of ours.
KNOWN_REPLIES = (
    # POP login.
    Advice('', 'pop', r'\bweb login required', 'person',
           'Google wants to see you: sign in to the mailbox with a web '
           'browser once, and use an app password as poppassword'),
    Advice('', 'pop', r'exceeded pop command or bandwidth', 'account',
           'the mailbox is asked too often by POP: set popcheckdelay=300 or '
           'more, and let other programs ask less'),
    Advice('', 'pop', r'disallowed on non-secure', 'person',
           'the server takes no password without TLS: set popssl=true and '
           'popport=995, or popssl=tls and popport=110'),
    Advice('', 'pop', r'^-err \[in-use\]|unable to lock maildrop', '',
           'another program reads this mailbox by POP: this passes'),
    Advice('', 'pop', r'^-err \[login-delay\]', '',
           'the server wants more time between two POP logins: set '
           'popcheckdelay longer'),
    Advice('', 'pop', r'^-err \[sys/temp\]', '',
           'the POP server has trouble of its own: this passes'),
    Advice('', 'pop', r'not enabled for pop', 'person',
           'POP is switched off for this mailbox: switch it on in its '
           'settings on the web'),
    Advice('', 'pop login',
           r'tls 1\.0 and 1\.1 are not supported|^421 4\.7\.66 ', 'person',
           'the OpenSSL of this box is too old, the server wants TLS 1.2: '
           'update the system of the box'),
    Advice('', 'pop', r'^-err \[auth\]', 'person',
           'the POP server refuses the login: check popusername and '
           'poppassword; many providers want an app password'),
    Advice('', 'pop', r'\b(auth\w*|log ?[io]n|password|user ?name)\b.*'
           r'\b(failed|failure|invalid|incorrect|wrong|bad|denied)\b|'
           r'\b(invalid|incorrect|wrong|bad) (log ?in|password|user)', '',
           'the POP server refuses the login: check popusername and '
           'poppassword'),

    # Sign-in by OAuth2: error and error_description of the token server.
    Advice('', 'token', r'\baadsts(70008|700082)\b', '',
           'the sign-in was not used for 90 days and has ended: sign in '
           'again by --login'),
    Advice('', 'token', r'\baadsts50173\b', '',
           'the sign-in was withdrawn, as after a new password: sign in '
           'again by --login'),
    Advice('', 'token', r'\baadsts70043\b', '',
           'a policy of your organization ends each sign-in after some time: '
           'sign in again by --login, and ask the administrator to except '
           'this app from the sign-in frequency'),
    Advice('', 'token', r'\baadsts(50074|50076|50079)\b', '',
           'Microsoft wants a second factor now: sign in again by --login'),
    Advice('', 'token', r'\baadsts(53000|53001|53003|530032)\b', '',
           'Conditional Access of your organization blocks this sign-in, '
           'often the device code only: try oauthflow=browser, else ask the '
           'administrator'),
    Advice('', 'token', r'\baadsts(65001|90094|90095)\b|consent_required', '',
           'nobody has allowed this app to send mail yet: sign in again by '
           '--login and agree, or let the administrator grant SMTP.Send in '
           'Entra'),
    Advice('', 'token', r'\baadsts700016\b', '',
           'this organization does not know the app: check oauthclientid and '
           'oauthtenant'),
    Advice('', 'token', r'\baadsts90002\b', '',
           'Microsoft does not know this organization: check oauthtenant'),
    Advice('', 'token', r'\baadsts7000218\b', '',
           'the app is not registered as a public client: set Allow public '
           'client flows to Yes in Entra, or set oauthclientsecret'),
    Advice('', 'token', r'\baadsts700025\b', '',
           'the app is a public client, it must not send a secret: remove '
           'oauthclientsecret'),
    Advice('', 'token', r'\baadsts7000215\b', '',
           'the secret is wrong: oauthclientsecret must be the value of the '
           'secret in Entra, not its id'),
    Advice('', 'token', r'\baadsts7000222\b', '',
           'the secret of the app has expired: make a new one in Entra and '
           'set oauthclientsecret'),
    Advice('', 'token', r'\baadsts50194\b', '',
           'the app is registered for one organization only: set oauthtenant '
           'to its id or domain'),
    Advice('', 'token', r'\baadsts(50020|9002332|9001023)\b', '',
           'this account does not belong to that tenant: set oauthtenant to '
           'consumers for Outlook.com, to your domain for Microsoft 365'),
    Advice('', 'token', r'\baadsts(70019|70018)\b|\bexpired_token\b|'
           r'\bbad_verification_code\b', '',
           'the code was typed wrong or too late: start --login again'),
    Advice('', 'token', r'temporarily_unavailable|server_error|'
           r'\baadsts(90033|90024|90006|50033|70012)\b', '',
           'the token server has trouble of its own: this passes'),
    Advice('', 'token', r'device flow scope', '',
           'Google allows no mail by device code: set oauthflow=browser'),
    Advice('', 'token', r'\badmin_policy_enforced\b', '',
           'the administrator of this Google Workspace does not allow the '
           'app: ask them to trust its oauthclientid'),
    Advice('', 'token', r'\binvalid_rapt\b', '',
           'this Google Workspace ends each sign-in after some hours: sign '
           'in again by --login, and ask the administrator to except the app '
           'from the session control'),
    Advice(GOOGLE, 'token', r'\binvalid_grant\b', '',
           'Google has ended the sign-in: sign in again by --login; if that '
           'happens every 7 days, the app is still in Testing: publish it '
           'in the Google console'),
    Advice('', 'token', r'\binvalid_grant\b', '',
           'the sign-in is no longer good: sign in again by --login'),
    Advice('', 'token', r'\b(invalid_client|deleted_client)\b', '',
           'the provider does not take the app: check oauthclientid and '
           'oauthclientsecret'),
    Advice('', 'token', r'\bunauthorized_client\b', '',
           'the app may not sign in this way: check oauthclientid and '
           'oauthflow, and what the app is registered for'),
    Advice('', 'token', r'\binvalid_scope\b', '',
           'the provider does not know this right: check oauthscope'),
    Advice('', 'token', r'\b(access_denied|authorization_declined)\b', '',
           'the sign-in was refused, by the person or by a policy of the '
           'organization: start --login again, or ask the administrator'),

    # Connection and greeting: the text is our own where nobody answered.
    Advice('', 'connect', r'does not answer in time|timed out', '',
           'check smtphost and smtpport; most internet providers block port '
           '25: set smtpport=587 and smtpsecurity=tls, or smtpport=465 and '
           'smtpsecurity=ssl'),
    Advice('', 'connect', r': connection refused$', '',
           'no mail server listens there: check smtphost and smtpport'),
    Advice('', 'connect', r'^the name .* is not known', '',
           'check the spelling of smtphost, and whether this box can look up '
           'names'),
    Advice('', 'connect', r'nemesis esmtp service not available', '',
           'this host is for mail from other servers only: set smtphost to '
           'mail.gmx.net, smtp.web.de or smtp.ionos.de, smtpport=587, '
           'smtpsecurity=tls, with login'),
    Advice('', 'connect', r'tosa@rx\.t-online\.de', '',
           'this host is for mail from other servers only: set '
           'smtphost=securesmtp.t-online.de, smtpport=465 and '
           'smtpsecurity=ssl, with login'),
    Advice('', GREETED + ' data',
           r'^5\d\d .*\bclient (host )?\[[^]@]*\] blocked using|'
           r'^5\d\d .*\bclient host rejected: [^<@]*\bdynamic\b|'
           r'^5\d\d .*\bdynamic ip\b.*\bpbl\b|'
           r'^5\d\d .*\[[0-9a-f.:]+\](:\d+)? is (in an rbl|blacklisted by)\b|'
           r'^55\d .*\bmail from (ip )?[0-9a-f.:]+ (was rejected due to '
           r'listing in|not allowed - 5\.7\.1 \[bl2)|'
           r'rejected because [0-9a-f.:]+ is in a black list at|'
           r'policy block list|^550 dy-001\b|on our block list \(s3150\)|'
           r'^553 5\.7\.1 \[bl2|^550 5\.7\.6[0-4]\d .*banned sending ip',
           'later', PRIVATE_LINE),
    Advice('', GREETED, r'^4\d\d .*(reverse dns for this ip failed|'
           r'client host rejected: cannot find your (reverse )?hostname)',
           'person', REVERSE_NAME),
    Advice('', '', r'^550 5\.7\.25 .*\bptr record', '', REVERSE_NAME),
    Advice('', GREETED, r'^421 4\.7\.0 ip not in whitelist', 'person',
           'this host of Google is for mail from other servers only: set '
           'smtphost=smtp.gmail.com, smtpport=587, smtpsecurity=tls, with '
           'login'),
    Advice('', '', r'not authorized to send email directly to our servers',
           '', PRIVATE_LINE),

    # Our name.
    Advice('', 'hello', r'^421 4\.7\.0 .*closing connection\. \(ehlo\)',
           'person', FULL_NAME),
    Advice('', 'hello mail rcpt', r'helo command rejected:|'
           r'helo/ehlo argument|invalid helo name|'
           r'syntactically invalid (ehlo|helo) argument', 'person',
           FULL_NAME),
    Advice('', 'hello', r'^50[14] ', '', FULL_NAME),
    Advice('', 'rcpt', r'^550 5\.5\.1 protocol error', '',
           'the server takes this box for a spammer: set localhostname to a '
           'full name, and send through the outgoing server of your '
           'provider, with login'),

    # Limits of the account. 5xx as well: they pass by themselves.
    Advice('', 'login', r'too many (failed )?login attempts', 'account',
           'too many logins in a short time: it passes by itself; set '
           'smtpconnections=1 and look whether other programs use this '
           'account with a wrong password'),
    Advice('', SENDING, r'^5\d\d 5\.2\.\d .*(submissionquota|'
           r"sender's submission quota was exceeded)", 'account',
           'this mailbox has sent to 10000 recipients today, the most that '
           'Microsoft allows: its mail waits; if that can not be, change '
           'the password'),
    Advice('', 'dot', r'^5\d\d 5\.2\.[02] .*storedrv\..*quotaexceeded',
           'account',
           'the mailbox of the sender is full, it keeps a copy of each mail '
           'sent: empty Sent Items, or have the administrator set a '
           'retention policy'),
    Advice('', SENDING, r'^550 5\.4\.5 .*daily|^550 5\.7\.1 .*daily smtp '
           r'relay (sending )?limit exceeded|^550 5\.7\.1 .*exceeded your '
           r'daily sending limit|^462 daily send limit|'
           r'^454 throttling failure: daily', 'account', DAY_LIMIT),
    Advice('', SENDING, r'^450 4\.2\.1 peak smtp relay limit|'
           r'^450 .*mail send limit exceeded|exceeded the max emails per|'
           r'exceeded its 24-hour sending limit|sent too many messages this '
           r'hour\. ib504|^550 5\.7\.1 your mail limit has been reached|'
           r'^45\d (4\.7\.1 )?ratelimit ("[^"]*out[^"]*" )?exceeded',
           'account', LIMIT),
    Advice('', SENDING, r'exceeded the max defers and failures', 'account',
           'too many mails of this domain failed in an hour: its mail waits; '
           'correct the recipient that fails all the time, --queue shows it'),
    Advice('', SENDING, r'is not allowed to send: .*(too fast|limit exceeded)',
           'account', LIMIT),
    Advice('', SENDING, r'^5\d\d 5\.(7\.0|4\.\d+) (?!.*(<\S*@|\b(hops?|loop|'
           r'size|recipients?|users?|mailbox|inbox|(?<!ip )address)\b)).*'
           + EXCEEDED, 'account', LIMIT),
    Advice('', 'connect hello login mail',
           r'^5\d\d (?!5\.3\.4 |.*\bsize\b).*' + EXCEEDED, 'account', LIMIT),
    Advice(r'\bauthsmtp\b', '', r'^433 ', 'person',
           'the number of mails of this plan is used up: buy more at '
           'AuthSMTP'),

    # Pace: too fast or too many at a time.
    Advice('', SENDING, r'^550 5\.7\.0 too many emails per second|'
           r'^454 throttling failure: maximum sending rate|'
           r'per session\. open a new session.* ib510', 'later',
           'mails come too fast for this provider: set smtprate'),
    Advice('', '', r'too many (concurrent )?(smtp )?connections|'
           r'concurrent .*connections has exceeded|sender thread limit|'
           r'concurrent connection limit', '',
           'too many connections at a time: set smtpconnections=1; other '
           'programs may use this account as well'),
    Advice('', '', r'submission rate for this client|^450 4\.7\.1 error: '
           r'too (many|much) (auth|mail|recipients)', '',
           'mails come too fast for this server: set smtprate'),
    Advice('', '', r'with the same message-id', '',
           'the device gives all its mails one Message-ID: look for that in '
           'the device; each needs its own'),

    # Login.
    Advice('', 'login', r'maximum credits exceeded', 'person',
           'the plan at SendGrid is used up, or the trial is over: pay '
           'there, or use another provider'),
    Advice('', 'login', r'smtpclientauthentication is disabled', 'person',
           'SMTP AUTH is switched off: the administrator has to switch on '
           'Authenticated SMTP for this mailbox in the Microsoft 365 admin '
           'centre; another password does not help'),
    Advice('', 'login mail', r'basic authentication is (disabled|not '
           r'supported)', 'person',
           'Microsoft takes no passwords here any more: set oauth=microsoft '
           'and sign in by --login'),
    Advice('', 'login', r'security defaults', 'person',
           'the security defaults of your organization forbid logins with a '
           'password: set oauth=microsoft and sign in by --login, or ask the '
           'administrator'),
    Advice('', 'login', r'did not meet the criteria', 'person',
           'a policy of your organization (Conditional Access) blocks this '
           'login: ask the administrator to allow it for this mailbox'),
    Advice('', 'login', r'account (is )?(locked|disabled|suspended|blocked)',
           'person', 'the provider has closed or locked this account: sign '
           'in on the web, or ask the provider'),
    Advice('', 'login', r'^535 5\.7\.(3|139) ', 'person',
           'Exchange refuses the login: check smtpusername and smtppassword; '
           'with oauth=microsoft remove oauthscope if it is set, and sign in '
           'again by --login, as this mailbox'),
    Advice('', 'login', r'^504 5\.7\.4 ', 'person',
           'this kind of login is switched off: at Microsoft 365 the '
           'administrator has to switch on Authenticated SMTP for the '
           'mailbox; elsewhere try another smtpauth'),
    Advice('', 'login', r'log in (via|with|through) your web browser',
           'person',
           'Google doubts this login: sign in with a web browser once, or '
           'use an app password as smtppassword'),
    Advice('', 'login', r'^53[45] 5\.7\.[89] (username and password not '
           r'accepted|application-specific password required)', 'person',
           GOOGLE_PASSWORD),
    Advice('', 'login', r'application password is required|'
           r'neobhodim parol prilozheniya', 'person', APP_PASSWORD),
    Advice('', 'login', r'does not have access rights to this service',
           'person',
           'mail programs are not allowed for this mailbox: switch them on in '
           'the settings of Yandex Mail, and set an app password as '
           'smtppassword'),
    Advice('', 'login', r'#auth005', 'person',
           'Yahoo and AOL saw too many wrong logins: wait an hour; they take '
           'no passwords of accounts and hardly app passwords, so another '
           'provider may be needed'),
    Advice(YAHOO, 'login', r'^53[45] ', 'person',
           'Yahoo, AOL and AT&T are ending logins with a password: if a new '
           'app password is refused too, use an account of another '
           'provider'),
    Advice('', 'login', r'^525 |unauthorized ip address', 'person',
           'the provider takes logins from listed addresses only: switch '
           'that list off in its settings, or add the address of your line'),
    Advice('', 'login', r'^(503 5\.5\.1|503) .*authentication not enabled',
           'person',
           'this port has no login: set smtpport=587 and smtpsecurity=tls, '
           'or smtpport=465 and smtpsecurity=ssl'),
    Advice('', 'login', r'\bib401\b', 'person',
           'this host is for mail from other servers: set '
           'smtphost=smtpout.secureserver.net'),
    Advice('', 'login', r'password is too simple', 'person',
           'the provider takes no weak passwords: set a better one there and '
           'as smtppassword'),
    Advice('', 'login', r'temporary authentication failure|'
           r'unable to authenticate at present', '',
           'the login server of the provider has trouble: this passes, the '
           'password may be right'),
    Advice('', 'login', r'encryption required|starttls|without ssl/tls|'
           r'^538 ', 'person', USE_TLS),
    Advice(r'\bamazonaws\b', 'login', r'^535 ', '',
           'Amazon SES wants its SMTP credentials, not the access key; '
           'smtphost must name their region; new ones work after two '
           'minutes'),
    Advice(IONOS, 'login', r'^535 ', 'person',
           'the password is wrong, or POP3 and IMAP are not allowed in the '
           'settings of the mailbox, or it wants an app password; at IONOS it '
           'is the password of the mailbox, not of the customer'),
    Advice(ICLOUD, 'login', r'^535 ', 'person',
           'iCloud wants an app-specific password: make one at '
           'account.apple.com and set it as smtppassword; smtpusername is '
           'the Apple address, no alias'),
    Advice(r'\bt-online\.de$', 'login', r'^535 ', 'person',
           'T-Online wants the separate e-mail password: set one in the '
           'Kundencenter on the web and use it as smtppassword'),
    Advice(r'\bfreenet\.de$', 'login', r'^535 ', 'person',
           'the password is wrong, or POP3/IMAP/SMTP is not switched on in '
           'the settings of freenet'),
    Advice(r'\bzoho\b', 'login', r'^535 ', 'person',
           'check the password, smtphost must be that of your region '
           '(smtp.zoho.eu, .com, .in), and with two factors Zoho wants an '
           'app password'),
    Advice(r'\b(fastmail|yandex|mail\.ru|bluewin)\b', 'login', r'^535 ',
           'person', APP_PASSWORD),
    Advice(r'\bsendgrid\b', 'login', r'^535 ', 'person',
           'at SendGrid smtpusername is the word apikey, smtppassword an API '
           'key'),
    Advice(r'\b(brevo|sendinblue|mailgun|mailjet|postmarkapp|resend|'
           r'smtp2go)\b', 'login', r'^535 ', 'person',
           'this service has a user and a password of its own for SMTP: look '
           'them up on its SMTP page'),
    Advice('', 'login', r'^535 |\bofr_305\b', 'person',
           'the server refuses the login: check smtpusername and '
           'smtppassword; many providers want an app password, or mail '
           'programs switched on in their settings'),

    # The server wants TLS or a login.
    Advice('', 'mail rcpt', r'^530 .*\b(starttls|tls|ssl)\b|^451 5\.7\.3 '
           r'starttls is required|^450 4\.7\.1 session encryption is '
           r'required', 'person', USE_TLS),
    Advice('', 'mail rcpt', r'^530 |^5\d\d 5\.7\.57 |'
           r'^553 5\.7\.1 .*: not logged in$|'
           r'^550 must be authenticated|^550 unauthenticated senders not|'
           r'^550 relay access denied - please authenticate', 'person',
           USE_LOGIN),
    Advice('', 'rcpt', r'^550 5\.7\.64 tenantattribution', 'person',
           'the connector of your organization at Microsoft does not know '
           'this line: its address has changed, the administrator has to '
           'enter the new one'),
    Advice('', SENDING, r'^550 5\.7\.[01] (mail relay denied|invalid '
           r'credentials for relay)', 'person',
           'the relay of Google Workspace does not know this line: the '
           'administrator has to enter its address, or use smtp.gmail.com '
           'with login; From must be of your domain'),
    Advice('', 'mail rcpt', r'check for new mail before sending|\bpop3? .{0,9}'
           r'first\b|\bpop/apop authori[sz]ation', 'later',
           'the server wants a POP login first: set popbeforesmtp=true, '
           'pophost, popusername, poppassword; if they are set, a shorter '
           'popcheckdelay'),
    Advice('', 'rcpt', r'relay access denied|relay not permitted|relaying '
           r'denied|list of allowed rcpthost|unable to relay|turn on smtp '
           r'authentication|permitted to relay through this server', '',
           'the server sends to strangers for its users only: set '
           'smtpusername and smtppassword, or popbeforesmtp=true; if others '
           'get mail, look at the address of the recipient'),

    # The account may not send.
    Advice('', 'mail dot', r'please sign in (to|and validate) your', 'person',
           'Microsoft wants to see you: sign in to this account on the web '
           'once and confirm it'),
    Advice('', SENDING, r'^550 5\.1\.8 .*bad outbound sender|^550 5\.7\.705 '
           r'.*tenant has exceeded', 'person', BLOCKED),
    Advice(MICROSOFT, SENDING, r'^550 5\.7\.(708|750|50[123]|511) ',
           'person', BLOCKED),
    Advice('', 'dot', r'outboundspamexception', '',
           'Microsoft takes this mail for spam, or doubts the account: sign '
           'in on the web, look at the content, then --retry'),
    Advice('', SENDING, r'^550 5\.2\.253 ', 'person',
           'this mailbox has no licence at Microsoft 365: the administrator '
           'has to give it one'),
    Advice('', SENDING, r'message sending for this account is disabled',
           'person',
           'Mail.ru has stopped this account: sign in on the web and recover '
           'it'),
    Advice('', SENDING, r'sending paused for this account', 'person',
           'Amazon has paused this account: read its mail to you, and answer '
           'it'),
    Advice('', SENDING, r'not authorized to perform\b.*\bses:', 'person',
           'these credentials may not send: give their IAM user the right '
           'ses:SendRawEmail'),
    Advice('', SENDING, r'domain \S+ is not allowed to send:', 'person',
           'Mailgun does not let this domain send: a sandbox domain sends to '
           'authorized recipients only, so add one of your own; the text '
           'behind the colon says more'),
    Advice('', SENDING, r'^502 5\.7\.0 .*not yet activated', 'person',
           'the account is not activated yet: ask the support of Brevo to '
           'activate SMTP'),
    Advice('', SENDING, r"^550 that (smtp username's account|ip address) is "
           r'not allowed to send', 'person',
           'SMTP2GO has closed this account or user: look at its panel'),
    Advice('', SENDING, r'^550 5\.4\.6 unusual sending activity|'
           r'^554 5\.1\.8 email outgoing blocked', 'person',
           'Zoho has blocked this account: unblock it on the web page that '
           'the reply names'),
    Advice('', SENDING, r'outgoing mail suspension', 'person',
           'the host has stopped all mail of this domain: ask the host '
           'why'),

    # The sender's address.
    Advice('', 'mail', r'^451 .*invalid return path: not owned by user',
           'never', OWN_ADDRESS),
    Advice('', SENDING, r'^403 .*not authorized to send from', 'never',
           'SendGrid does not know this sender: verify it there, or set '
           'forcefrom to one that is verified'),
    Advice('', '', r'verified sender identity|email address is not verified|'
           r'sender domain not verified|domain is not verified|'
           r'from domain not trusted|from: address not verified', '',
           'the service sends for verified addresses only: verify this '
           'sender there, or set forcefrom to one that is; in a trial the '
           'recipient as well'),
    Advice('', '', r'not one of your addresses|sender address is not allowed|'
           r'not owned by (auth(orized)? )?user|mail from not owned by user|'
           r'not authori[sz]ed to send from this|relaying disallowed as|'
           r'not local sender|mail from (address )?must (equal|be same)|'
           r'sendasdenied|permissions to send as this sender|'
           r'envelope sender not allowed|must match authenticated domain|'
           r'as a sender domain|emetteur invalide|'
           r'blank from: addresses', '', OWN_ADDRESS),
    Advice(YAHOO, 'data dot', r'^550 request failed; mailbox unavailable', '',
           OWN_ADDRESS),
    Advice('', 'mail', r'^5\d\d 5\.1\.0 .*sender rejected', '',
           OWN_ADDRESS),
    Advice('', '', r'sender address rejected: access denied', '',
           'this sender needs a login here: set smtpusername, smtppassword, '
           'smtpport=587 and smtpsecurity=tls'),
    Advice('', '', r'^554 unauthorized sender address', '',
           'the name in From looks like an address: take @ and dots out of '
           'that name in the device, or set forcefrom'),
    Advice('', 'mail rcpt', r'^45\d 4\.1\.8 <([^@>]*@[^.>]+|[^>]*\.(local|lan|'
           r'home|internal|localdomain|localnet|box))>: sender address '
           r'rejected: domain not found', 'never',
           'the domain of the sender exists in your network only: set '
           'forcefrom to the address of the account'),
    Advice('', '', r'sender address rejected: domain not found|'
           r'sender verify failed', '',
           'the domain of the sender does not exist in the DNS: set forcefrom '
           'to the address of the account, or correct it in the device'),
    Advice('', '', r'^5\d\d 5\.1\.7 |sender address must contain a domain',
           '', 'the address of the sender is no mail address: set forcefrom '
           'to the address of the account, or correct it in the device'),
    Advice('', '', r'^[45]\d\d [45]\.7\.26 |^550 5\.7\.(515|509|23) |'
           r'\bdmarc policy\b|\bdmarc verification\b|\bspf[- ](check|policy)|'
           r'sender policy framework|\[cs01\]', '', NOT_PROVEN),

    # Passes by itself.
    Advice('', '', r'\bgr[ea]y-?list|^[45]\d\d .*verification in progress',
           '', 'the server lets unknown senders wait some minutes: this '
           'passes'),
    Advice('', SENDING, r'failure sending mail\. try again later|'
           r'service refuse\. veuillez essayer plus tard|'
           r'^550 5\.5\.0 .*\blpn\d*_510\b',
           'later', 'the provider says that this passes by itself'),
    Advice('', SENDING, r'^5\d\d 5\.2\.12[12] |^550 5\.2\.1 .*at a rate that '
           r'prevents', 'later',
           'the recipient gets too many mails at the moment: this passes; '
           'let the device send less'),
    Advice('', 'rcpt', r'at a rate that prevents', '',
           'the recipient gets too many mails at the moment: this passes; '
           'let the device send less'),
    Advice('', '', r'^45\d .*(insufficient system resources|space shortage|'
           r'temporary lookup error|temporary local problem|server busy|'
           r'tls not available due to local problem)|'
           r'rate limited due to ip reputation', '',
           'the server has trouble of its own: this passes'),

    # The mail itself.
    Advice('', 'data dot', r'^451 .*smtplf\.html', 'never',
           'the server does not like the line ends of this mail, and never '
           'will: send it another way, and report this line'),
    Advice('', '', r'bare <?lf\b|bare linefeeds|not crlf terminated', '',
           'the server does not like the line ends of this mail: report '
           'this line to the makers of smtpproxy'),
    Advice('', '', r'line length is|lines? too long', '',
           'this mail has lines over 998 bytes: they are folded unless the '
           'mail is signed; a signed one has to be made with shorter lines'),
    Advice('', '', r'^(552|550|554|523) (5\.3\.4 )?.*\b((message|mail) size '
           r"exceeds|exceeded google's message size|message (is )?too (big|"
           r'large)|message size limits?)|^55\d 5\.3\.4 ', '',
           'the mail is too large for this provider: let the device scan '
           'with less resolution or fewer pages, or set maxsize to the '
           'limit of the provider'),
    Advice('', '', r'illegal attachment|potential security issue|'
           r'reject, id=\S+ - banned|\(b-attach\)', '',
           'the provider does not take this kind of attachment: send another '
           'one, as PDF'),
    Advice('', '', r'header (line )?is (too long|ridiculously long)|'
           r"header syntax|duplicate header|not rfc compliant|5322 compliant|"
           r'missing a valid|multiple addresses in from|section 3\.6\.2|'
           r'rfcmessagenoncompliant|reject, id=\S+ - bad_header|'
           r'reject due to policy restrictions\b.*\bc=hi\b', '', BAD_HEADER),
    Advice('', '', r'under suspicion of spam', '',
           'Yandex takes this mail for spam: change subject or text; send '
           'nothing for 24 hours if all mails are refused, each try makes '
           'the block longer'),
    Advice('', 'data dot', r'likely unsolicited mail|spam message rejected|'
           r'spam or virus|\bofr_506\b|refused by local policy\. no spam|'
           r'reject, id=\S+ - spam|message not (allowed - \[299\]|accepted '
           r'for policy reasons)', '', LOOKS_LIKE_SPAM),
    Advice('', '', r'exceeded 50 hops|hop count exceeded|mail loop|'
           r'routing loop', '',
           'this mail goes round in a loop: look who forwards it back to '
           'this box'),
    Advice('', '', r'^553 5\.6\.7 |internationali[sz]ed mailbox', '',
           'this provider takes no letters beyond ASCII in addresses: '
           'correct the address of sender or recipient in the device'),

    # The recipient.
    Advice('', 'rcpt', r'^[45]5\d [45]\.2\.2 |over quota|quota exceeded|'
           r'mailbox (is )?full|boite du destinataire pleine', '',
           FULL_RECIPIENT),
    Advice('', 'rcpt', r'^55\d 5\.1\.(1|2|6|10) |^550 5\.4\.1 .*recipient '
           r'address rejected|user unknown|no such (user|recipient|mailbox)|'
           r"doesn't have a|\bofr_416\b|nullmx|^550 requested action not "
           r'taken: mailbox unavailable$', '', UNKNOWN_RECIPIENT),
    Advice('', 'rcpt', r'^50[13] 5\.1\.3 |^553 5\.1\.[23] ', '',
           'the address of the recipient is no mail address: correct it in '
           'the device'),
    Advice('', 'rcpt', r'^55\d 5\.2\.1 ', '',
           'the mailbox of the recipient is closed: correct the address in '
           'the device'),
    Advice('', 'rcpt', r'^550 5\.7\.(124|13[3456]) ', '',
           'the recipient is a group that takes mail of its members only: '
           'ask its owner to let this sender in'),
)

# Behind this a server repeats what the recipient's server has told it: that
# changes no kind, it is about the two of them.
QUOTE = re.compile(r'\b(?:said|refused to talk to me|response):')
NO_ADVICE = Advice()
ABOUT_ACCOUNT = 'account', 'person'     # kinds that are


def flattened(reply):
    """A reply in one line of small letters. Its enhanced code stands there
    once: Google repeats it on each line, in the middle of sentences."""
    text = re.sub(r'\n\d{3}[ -]', ' ', reply[:2000]).casefold()
    text = re.sub(r'^(\d{3})-', r'\1 ', ' '.join(text.split()))
    code = re.match(r'\d{3} ([245]\.\d{1,3}\.\d{1,3}) ', text)
    if code:
        repeated = ' %s ' % code[1]
        text = code[0] + text[code.end():].replace(repeated, ' ')
    return text


def advise(host, stage, reply):
    """The first row of KNOWN_REPLIES that fits, or NO_ADVICE. reply:
    'CODE text', in one line or several; at connect also our own words."""
    text = flattened(reply)
    own = QUOTE.split(text, 1)[0]
    for row in KNOWN_REPLIES:
        # re keeps what it has compiled: who never fails pays nothing.
        if (stage in (row.stages or stage).split()
                and re.search(row.where, host.lower())
                and re.search(row.pattern, own if row.kind else text)):
            return row
    return NO_ADVICE


BEHIND = '; advice: '


def with_advice(problem, advice):
    """A problem's text with the advice behind it, if there is one."""
    if not advice.sentence:
        return problem
    return problem + BEHIND + advice.sentence


class AccountUnavailable(Exception):
    """The account can't be used now: every mail of it has to wait. Its text
    is for the owner. advice: what is known of it; absent: the stage, as in
    Advice, at which nobody was there at all (refused, unreachable, unknown
    name), or ''; wait: seconds in which the server wants to be left alone."""

    absent, wait = '', 0

    def __init__(self, text, advice=NO_ADVICE):
        super().__init__(with_advice(text, advice))
        self.advice = advice

    @property
    def takes_long(self):
        """Whether a try each few minutes would only make it worse."""
        return self.advice.kind in ABOUT_ACCOUNT

    def log_level(self, known):
        """Of the line that says it: what needs a person is an ERROR once.
        known: the advice of the failure before."""
        if self.advice.kind != 'person':
            return logging.WARNING
        return logging.DEBUG if self.advice == known else logging.ERROR


STEPS = {'hello': 'EHLO', 'tls': 'STARTTLS', 'pop': 'POP login',
         'mail': 'MAIL'}


def unavailable(stage, error, host, port, redact=str, hint=''):
    """An AccountUnavailable that says what happened where, and what to do.
    stage: as in Advice; error: an exception; redact: callable(str) -> str;
    hint: goes before the advice."""
    text = explain(error, '%s:%d' % (host, port))
    advice = advise(host, stage, said(error))
    if advice is NO_ADVICE:             # it may know our own words, though
        advice = advise(host, stage, text)
    trouble = AccountUnavailable(redact('%s: %s%s' % (
        STEPS.get(stage, stage), text, hint)), advice)
    if stage in ('connect', 'pop') and is_absence(error):
        trouble.absent = stage
    return trouble


def weigh(report, host, passing=()):
    """Puts each refused recipient of a smtps.Report where KNOWN_REPLIES says
    that it belongs, and the advice behind its reply. Returns None, or an
    AccountUnavailable if a reply is about the account.

    passing: kinds that are about a recipient only where one can be meant. All
    are if others have got this very mail."""
    refused = dict(report.later, **report.never)
    trouble, passing = None, ABOUT_ACCOUNT if report.sent else passing
    for recipient, reply in refused.items():
        stage = report.stages.get(recipient, '')
        advice = advise(host, stage, reply)
        if advice.kind:
            report.later.pop(recipient, None)
            report.never.pop(recipient, None)
        verdict = report.never if advice.kind == 'never' or (
            recipient in report.never) else report.later
        verdict[recipient] = with_advice(reply, advice)
        if advice.kind in ABOUT_ACCOUNT and not (
                advice.kind in passing and stage in ('rcpt', 'data')):
            trouble = AccountUnavailable('%s said %s' % (host, reply), advice)
    return trouble


def problems(verdicts):
    """One text for the owner of {recipient: reply, its advice behind it}: each
    piece of advice stands there once, at the end."""
    texts, advices = [], []
    for reply, recipients in grouped(verdicts):
        text, _, advice = reply.partition(BEHIND)
        texts.append('%s for %s' % (text, listed(recipients)))
        if advice and advice not in advices:
            advices.append(advice)
    return '; '.join(texts) + (advices and BEHIND + '; '.join(advices) or '')


def grouped(verdicts):
    """[(reply, [recipients])] of {recipient: reply}."""
    groups = {}
    for recipient, reply in verdicts.items():
        groups.setdefault(reply, []).append(recipient)
    return list(groups.items())


class Provider(NamedTuple):
    """What --add knows of a provider. domains: of addresses that belong to
    it; username: what its login wants, 'address', 'local' (the part before
    the @), a fixed word, or '' (to be asked); note: for the owner, before
    the password is asked."""
    name: str
    domains: str
    smtphost: str
    smtpport: int
    smtpsecurity: str
    username: str = 'address'
    oauth: str = ''
    note: str = ''


PROVIDERS = (
    Provider('gmail', 'gmail.com googlemail.com', 'smtp.gmail.com', 587,
             'tls', note='Google wants an app password: switch on 2-step '
             'verification and make one at myaccount.google.com/apppasswords; '
             'or choose oauth=google'),
    Provider('microsoft365', '', 'smtp.office365.com', 587, 'tls',
             oauth='microsoft', note='the administrator has to switch on '
             'Authenticated SMTP for the mailbox, and you need an app '
             'registration in Entra, see README'),
    Provider('outlook', 'outlook.com hotmail.com live.com msn.com outlook.de '
             'hotmail.de', 'smtp-mail.outlook.com', 587, 'tls',
             oauth='microsoft', note='Microsoft takes no passwords here, app '
             'passwords neither; you need an app registration in Entra, see '
             'README'),
    Provider('yahoo', 'yahoo.com yahoo.de yahoo.co.uk ymail.com aol.com '
             'aol.de', 'smtp.mail.yahoo.com', 465, 'ssl',
             note='Yahoo and AOL are ending logins with a password, app '
             'passwords included: most likely you need an account of another '
             'provider for your devices'),
    Provider('icloud', 'icloud.com me.com mac.com', 'smtp.mail.me.com', 587,
             'tls', note='iCloud wants an app-specific password: make one at '
             'account.apple.com; the user is the Apple address, no alias'),
    Provider('gmx', 'gmx.de gmx.net gmx.at gmx.ch', 'mail.gmx.net', 587,
             'tls', note='allow access by POP3 and IMAP in the settings of '
             'the mailbox first, with a browser on a computer; with two '
             'factors GMX wants an app password'),
    Provider('web.de', 'web.de', 'smtp.web.de', 587, 'tls', 'local',
             note='allow access by POP3 and IMAP in the settings of the '
             'mailbox first, with a browser on a computer; with two factors '
             'WEB.DE wants an app password'),
    Provider('t-online', 't-online.de magenta.de', 'securesmtp.t-online.de',
             465, 'ssl', note='T-Online wants the separate e-mail password: '
             'set one in the Kundencenter on the web first'),
    Provider('freenet', 'freenet.de', 'mx.freenet.de', 587, 'tls',
             note='switch on POP3/IMAP/SMTP in the settings of the mailbox '
             'first'),
    Provider('ionos', 'online.de onlinehome.de', 'smtp.ionos.de', 465, 'ssl',
             note='it is the password of this mailbox, not of the customer; '
             'outside Germany set smtphost to smtp.ionos.com, .fr, .co.uk or '
             '.es'),
    Provider('strato', '', 'smtp.strato.de', 465, 'ssl',
             note='it is the password of this mailbox'),
    Provider('zoho', 'zoho.eu zohomail.eu', 'smtp.zoho.eu', 465, 'ssl',
             note='outside Europe set smtphost to smtp.zoho.com, .in, .com.au '
             'or .jp; with two factors Zoho wants an app password'),
    Provider('fastmail', 'fastmail.com fastmail.fm', 'smtp.fastmail.com', 465,
             'ssl', note='Fastmail wants an app password; the Basic plan has '
             'none'),
    Provider('sendgrid', '', 'smtp.sendgrid.net', 587, 'tls', 'apikey',
             note='the password is an API key; verify the sender there '
             'first'),
    Provider('brevo', '', 'smtp-relay.brevo.com', 587, 'tls', '',
             note='user and password are the SMTP login and the SMTP key, '
             'not the API key; validate the sender there first, it drops '
             'mail of others without a word'),
    Provider('smtp2go', '', 'mail.smtp2go.com', 587, 'tls', '',
             note='user and password are those of an SMTP user of its panel; '
             'verify the sender there first'),
)


# --- OAuth2: signing in where no password is taken --------------------------

TOKEN_TIME = 30             # seconds for a whole exchange with a token server
ANSWER_SIZE = 65536         # bytes of its answer
MARGIN = 600                # seconds; some servers refuse a token with less
LOCK_TIME = 45              # seconds: another process's renewal is over then
IDLE_TIME = 7 * 86400       # seconds; unused sign-ins end, soonest in weeks
PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE)
IDLE_RETRY = 3600           # seconds until that is tried again
AWAY = ' away'              # of a note's case: no person is needed
RUN_OUT = 'it came without a refresh token and has run out'
CLOCK_IS_SET = 1735689600   # 2025: many routers begin in 1970 at each start

# Of a form: what no message may repeat.
FORM_SECRETS = ('client_secret', 'refresh_token', 'device_code', 'code',
                'code_verifier')
DENIALS = {                 # RFC 6749 5.2, 8628 3.5, and Microsoft's own
    'invalid_grant': 'the sign-in has ended or was withdrawn',
    'invalid_client': 'oauthclientid or oauthclientsecret is wrong or has '
                      'expired',
    'unauthorized_client': 'the app registration does not allow this',
    'unsupported_grant_type': 'the provider has no such oauthflow',
    'invalid_scope': 'oauthscope is refused',
    'interaction_required': 'the provider wants to see you again',
    'consent_required': 'consent is missing',
    'access_denied': 'it was declined',
    'authorization_declined': 'it was declined',
    'expired_token': 'the time for it is over'}


class TokenServerAway(AccountUnavailable):
    """There is no token for now; that passes by itself. error: the token
    server's word for it, '' if it had none."""

    error = ''


class SignInNeeded(AccountUnavailable):
    """There is no token until a person acts. reason: why, a str; command:
    what the owner has to type."""

    def __init__(self, section, reason, command):
        super().__init__('no sign-in for [%s]: %s: %s' % (
            section, reason, command))
        self.reason = reason


class TokenDenied(Exception):
    """The token server said no. error: its word for it; str(): for the
    owner, without secrets, and with what to do if that is known of host."""

    def __init__(self, error, words='', host=''):
        meaning = DENIALS.get(error, 'the provider refuses')
        said = ': '.join(filter(None, (
            smtps.plain(error)[:80], smtps.plain(words))))
        super().__init__(with_advice('%s (%s)' % (meaning, said), advise(
            host, 'token', said)))
        self.error = error


def xoauth2(account, token):
    """The initial response of AUTH XOAUTH2, not yet in base64."""
    return 'user=%s\1auth=Bearer %s\1\1' % (account.smtpusername, token)


def oauthbearer(account, token):
    """The same of OAUTHBEARER, RFC 7628 3.1."""
    user = account.smtpusername.replace('=', '=3D').replace(',', '=2C')
    return 'n,a=%s,\1host=%s\1port=%d\1auth=Bearer %s\1\1' % (
        user, account.smtphost, account.smtpport, token)


# The token server.

def proxy_for(host):
    """(name, port, authorization or '') of the HTTPS_PROXY for this host, or
    None. Raises ValueError."""
    if not any(name.lower().endswith('_proxy') for name in os.environ):
        return None                     # urllib.request is large
    from urllib.parse import unquote, urlsplit
    from urllib.request import getproxies, proxy_bypass
    proxy = getproxies().get('https')
    if not proxy or proxy_bypass(host):
        return None
    parts = urlsplit(proxy if '//' in proxy else '//' + proxy)
    try:
        port = parts.port or 80
    except ValueError:
        port = 0
    if not parts.hostname or not port:
        raise ValueError('HTTPS_PROXY is no address of a proxy')
    login = '%s:%s' % (unquote(parts.username or ''),
                       unquote(parts.password or ''))
    return parts.hostname, port, parts.username and (
        'Basic ' + smtps.encoded64(login))


class Exchange:
    """One POST to a token server. It ends within TOKEN_TIME, whatever the
    server does: a socket's own timeout is for each piece only, and one that
    trickles would hold us for ever."""

    def __init__(self, account, url):
        from urllib.parse import urlsplit
        self.account, self.url = account, urlsplit(url)
        self.host = self.via = self.url.hostname    # via: for messages
        self.end = time.monotonic() + TOKEN_TIME
        self.timer = self.twin = None   # cuts the connection, by this socket

    def post(self, form):
        """(status, headers, body). Raises OSError, HTTPException, and
        ImportError or LookupError for what the box lacks."""
        from http.client import IncompleteRead
        from urllib.parse import urlencode
        target = (self.url.path or '/') + (
            self.url.query and '?' + self.url.query)
        connection = self._connection()
        connection._create_connection = self._connect
        try:
            connection.request('POST', target, urlencode(form), {
                'Content-Type': 'application/x-www-form-urlencoded',
                'Accept': 'application/json', 'Connection': 'close',
                'User-Agent': 'smtpproxy/' + VERSION})
            with connection.getresponse() as response:
                try:
                    body = response.read(ANSWER_SIZE + 1)
                except IncompleteRead as cut:   # its text is what did come
                    body = cut.partial
                return response.status, response.headers, body
        finally:
            self._disarm()
            connection.close()

    def _connection(self):
        """Not connected yet. http.client follows no redirects."""
        from http.client import HTTPConnection, HTTPSConnection
        port = self.url.port
        if self.url.scheme == 'http':   # it stays on this box
            return HTTPConnection(self.host, port or 80)
        tls = smtps.client_context(self.account.tlscafile)
        proxy = proxy_for(self.host)
        if proxy is None:
            return HTTPSConnection(self.host, port or 443, context=tls)
        self.via = '%s by HTTPS_PROXY %s:%d' % (self.host, *proxy[:2])
        connection = HTTPSConnection(*proxy[:2], context=tls)
        connection.set_tunnel(self.host, port or 443, {
            'Proxy-Authorization': proxy[2]} if proxy[2] else {})
        return connection

    def _connect(self, address, *_):
        sock = smtps.connect(*address, max(0, self.end - time.monotonic()))
        self.twin = sock.dup()          # sock itself goes to the TLS layer
        self.timer = threading.Timer(
            max(0, self.end - time.monotonic()), self._cut)
        self.timer.name, self.timer.daemon = 'token-deadline', True
        self.timer.start()
        return sock

    def _cut(self):
        with contextlib.suppress(OSError):      # it is closed already
            self.twin.shutdown(socket.SHUT_RDWR)

    def _disarm(self):
        if self.timer:
            self.timer.cancel()
            self.twin.close()

    def is_late(self):
        return time.monotonic() >= self.end

    def away(self, error):
        """The TokenServerAway that a failed post() means."""
        away = TokenServerAway('token server: ' + self._explain(error))
        away.absent = 'token' if is_absence(error) else ''
        return away

    def _explain(self, error):
        ssl = sys.modules.get('ssl')
        if self.is_late() or isinstance(error, socket.timeout):
            return '%s does not answer in time' % self.host
        if ssl and isinstance(error, ssl.SSLError) and getattr(
                error, 'verify_code', 62) in (62, 64):      # another's name
            return 'no TLS with %s: %s' % (self.host, getattr(
                error, 'verify_message', '') or error.reason or error)
        if type(error).__module__ == 'http.client' and not isinstance(
                error, OSError):
            return '%s: its answer is no HTTP: %s' % (     # perhaps a token
                self.via, smtps.plain(str(error))[:20])
        return explain(error, self.via)


def is_token(value):
    return isinstance(value, str) and re.fullmatch('[!-~]+', value) is not None


def has_token(answer):
    return is_token(answer.get('access_token'))


def has_code(answer):
    """Can a person do something with it? RFC 8628 3.2."""
    return is_token(answer.get('device_code')) and all(
        isinstance(text, str) and text.strip()
        for text in (answer.get('user_code'), page_of(answer)))


def page_of(answer):
    """Where the code is typed. Google's own name came before the RFC."""
    return answer.get('verification_uri') or answer.get('verification_url')


def ask_token_server(account, url, form, is_wanted=has_token):
    """Its answer to a form: a dict. is_wanted: callable(dict), is it of use?
    Raises TokenServerAway, or TokenDenied if it said no."""
    form = {key: value for key, value in form.items() if value}
    exchange = Exchange(account, url)
    try:
        from http.client import HTTPException
        status, headers, body = exchange.post(form)
    except ImportError as error:        # perhaps of HTTPException itself
        raise exchange.away(error) from error
    except (OSError, HTTPException, LookupError, ValueError,
            RuntimeError) as error:     # RuntimeError: no thread to be had
        raise exchange.away(error) from error
    answer = parsed(body) if len(body) <= ANSWER_SIZE else {}
    if not answer and exchange.is_late():
        raise exchange.away(None)
    error = answer.get('error')
    error = veiled(error, form) if isinstance(error, str) else ''
    if status == 429 or status >= 500 or error in (
            'temporarily_unavailable', 'server_error'):
        away = TokenServerAway('token server: %s has no time: %s' % (
            exchange.host, smtps.plain(error)[:80] or status))
        away.wait, away.error = retry_after(headers), error
        raise away
    if error and not 300 <= status < 400:
        raise TokenDenied(error, veiled(first_line(
            answer.get('error_description')), form), exchange.host)
    if 300 <= status < 400 or not is_wanted(answer):
        raise TokenServerAway(
            'token server: %s answered %d, but nothing that we understand; '
            'is there a login page between it and this box, or is its '
            'address wrong?' % (exchange.host, status))
    return answer


def parsed(body):
    """The JSON object in it, {} if there is none."""
    import json
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return answer if isinstance(answer, dict) else {}


def first_line(text):
    """Microsoft's further lines are numbers for its support."""
    return text.strip().partition('\n')[0] if isinstance(text, str) else ''


PIECE = 12                  # characters that are no coincidence


def without_pieces(text, secrets):
    """text without any piece of these secrets, which are so long that a
    server wraps and cuts what it repeats of them."""
    def veil(match):
        run = match[0]
        size = min(len(run), PIECE)
        pieces = {run[i:i + size] for i in range(len(run) - size + 1)}
        return '***' if any(secret in run or any(
            piece in secret for piece in pieces) for secret in secrets) \
            else run
    return re.sub(r'[\w.~+/*!$%-]{8,}', veil, text) if secrets else text


def veiled(text, form):
    """A server's words, which may repeat what it was told, whole or in
    pieces."""
    from urllib.parse import quote, quote_plus
    told = [form[key] for key in FORM_SECRETS if len(form.get(key, '')) >= 4]
    secrets = {spelt for secret in told for spelt in (
        secret, quote_plus(secret), quote(secret, safe=''))}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, '***')
    return without_pieces(text, {secret for secret in secrets
                                 if len(secret) > PIECE})


def retry_after(headers):
    """Seconds; at most a day (RFC 9110 10.2.3)."""
    from email.utils import parsedate_to_datetime
    value = headers.get('Retry-After', '').strip()
    try:
        seconds = int(value) if value.isdigit() else (
            parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0
    return min(max(0, seconds), DAY)


def seconds_in(value, default):
    """A number of seconds from JSON, where it may be a string."""
    try:
        return min(max(0, int(value)), 10 * 365 * DAY)
    except (TypeError, ValueError, OverflowError):
        return default


def client_form(account, **more):
    """What each form holds; the secret only if there is one: a public client
    must not send one."""
    return dict(client_id=account.oauthclientid,
                client_secret=account.oauthclientsecret, **more)


# A sign-in on disk and in memory.

class Tokens(NamedTuple):
    """What the token server gave us. Times are the box's clock in whole
    seconds: the end of access, the last answer, the sign-in of a person.
    scope: what was granted, '' if it did not say."""
    access: str
    refresh: str
    expires: int
    renewed: int
    signed_in: int
    scope: str

    @classmethod
    def of(cls, answer, old, now):
        """From a token server's answer; what it does not name stays."""
        refresh, scope = answer.get('refresh_token'), answer.get('scope')
        return cls(answer['access_token'],
                   refresh if is_token(refresh) else old and old.refresh or '',
                   int(now) + seconds_in(answer.get('expires_in'), 3600),
                   int(now), old.signed_in if old else int(now),
                   scope if isinstance(scope, str) else old and old.scope
                   or '')


def scope_to_renew(account, granted):
    """Never more than was granted (RFC 6749 6). Microsoft and Google want to
    hear again all that was asked for, offline_access too, which their answers
    do not name."""
    words = account.oauthscope.split()
    if account.oauth == 'other':
        words = [word for word in words if word in granted.split()]
    return ' '.join(words) or account.oauthscope


def app_form(account):
    return client_form(account, grant_type='client_credentials',
                       scope=account.oauthscope)


def form_to_renew(account, tokens):
    """What new tokens are asked for with; None: only a person gets some."""
    if account.oauthflow == 'app':
        return app_form(account)
    if not tokens or not tokens.refresh:
        return None
    return client_form(account, grant_type='refresh_token',
                       scope=scope_to_renew(account, tokens.scope),
                       refresh_token=tokens.refresh)


class TokenFile:
    """A sign-in on disk, and its lock. It is replaced as a whole:

      files             made by          a crash there costs
      ------------------------------------------------------------------
      NAME.json.new     write            nothing: NAME.json counts
      NAME.json         the rename       nothing; before the folder's sync
                                         perhaps the new tokens

    NAME.lock keeps processes apart and is never removed, since another one
    may have it open. NAME.needed says why NAME.json is of no use any more, or
    can't be renewed: for the commands, which do not ask the token server.
    key: Account.grant.
    """

    complained = set()      # folders that have no locks, said already

    def __init__(self, folder, key):
        self.folder, self.key = folder, key
        self._keeps, self._held = False, None   # the lock, behind locked()
        name = '%s-%08x' % (re.sub(r'[^a-z0-9.@_+-]', '-', key[0])[:80],
                            zlib.crc32('\n'.join(key).encode()))
        self.path = os.path.join(folder, name + '.json')
        self.new = self.path + '.new'
        self.lock = os.path.join(folder, name + '.lock')
        self.needed = os.path.join(folder, name + '.needed')

    def mark(self):
        """What changes whenever the file does; None: there is no file.
        Raises OSError if the whole folder is away."""
        try:
            found = os.lstat(self.path)
        except FileNotFoundError:
            os.stat(self.folder)
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def read(self):
        """Its Tokens. Raises OSError, or ValueError if it is damaged or not
        ours."""
        with open(os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW
                          | os.O_NONBLOCK), 'rb') as file:
            if not os.path.isfile(file.fileno()):
                raise ValueError('it is no file')
            found = parsed(file.read(4 * ANSWER_SIZE))
        if found.get('for') != list(self.key):
            raise ValueError('it is damaged, or of another sign-in')
        try:
            tokens = Tokens(**found['tokens'])
        except (KeyError, TypeError):
            raise ValueError('it is damaged')
        if any(type(value) is not Tokens.__annotations__[name]
               for name, value in tokens._asdict().items()):
            raise ValueError('it is damaged')
        if not all(0 <= second < 1 << 36 for second in tokens[2:5]):
            raise ValueError('it is damaged')
        return tokens

    def write(self, tokens):
        """Replaces the file; returns its mark. It lasts when this returns.
        Raises OSError, then the old one is there."""
        import json
        text = json.dumps({'for': self.key, 'tokens': tokens._asdict()},
                          indent=1)
        self._remove(self.new)
        try:
            with open(os.open(self.new, os.O_WRONLY | os.O_CREAT | os.O_EXCL
                              | os.O_NOFOLLOW, 0o600), 'wb') as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
            os.rename(self.new, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                self._remove(self.new)
            raise
        self._sync()
        return self.mark()

    def note(self, case, why):
        """Leaves word of what is wrong in this case (str)."""
        import json
        with contextlib.suppress(OSError):      # the log says it, too
            self._remove(self.needed)
            with open(os.open(self.needed, os.O_WRONLY | os.O_CREAT | os.O_EXCL
                              | os.O_NOFOLLOW, 0o600), 'wb') as file:
                file.write(json.dumps({'case': case, 'why': why}).encode())

    def noted(self, case):
        """What is wrong in this case; '' if nothing is."""
        try:
            with open(os.open(self.needed, os.O_RDONLY | os.O_NOFOLLOW
                              | os.O_NONBLOCK), 'rb') as file:
                found = parsed(file.read(ANSWER_SIZE))
        except OSError:
            return ''
        return smtps.plain(str(found.get('why', ''))) if (
            found.get('case') == case) else ''

    def remove(self):
        """Returns whether there was one. Raises OSError."""
        try:
            there = self.mark() is not None
        except (FileNotFoundError, NotADirectoryError):
            return False                # there is no folder
        for path in self.path, self.new, self.needed:
            self._remove(path)
        self._sync()
        return there

    @staticmethod
    def _remove(path):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def _sync(self):
        try:
            sync_folder(self.folder)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise                   # those can't sync folders (CIFS)

    @contextlib.contextmanager
    def locked(self, patience=None):
        """Inside it no other process changes the file. Raises
        TokenServerAway if one has the lock for longer than patience, in
        seconds (LOCK_TIME)."""
        lock, self._held = self._held, None
        if lock is None:
            lock = self._take_lock(patience)
        try:
            yield
        finally:
            self._held = lock
            self.keep_lock(self._keeps)

    def keep_lock(self, keeps):
        """Whether the lock stays ours behind locked(). It does while newer
        tokens are in memory only: nobody else may use up those on disk."""
        self._keeps = keeps
        if not keeps:
            lock, self._held = self._held, None
            self._release(lock)

    def _take_lock(self, patience):
        """Its descriptor; None if there is nothing to lock, or no way."""
        lock = None
        try:
            lock = self._open_lock()
            take_lock(lock, LOCK_TIME if patience is None else patience)
            return lock
        except Busy:
            self._release(lock)
            raise TokenServerAway('another process has the sign-in %s in hand '
                                  'and does not end' % self.path)
        except (FileNotFoundError, NotADirectoryError):
            return None                 # nothing is there, or a disk is away
        except OSError as error:
            self._release(lock)
            self._go_without(error)
            return None

    def _open_lock(self):
        """Where nothing can be written any more it can be locked all the
        same. Raises OSError if there is none."""
        for flags in os.O_RDWR | os.O_CREAT, os.O_RDONLY:
            try:
                return os.open(self.lock, flags | os.O_NOFOLLOW, 0o600)
            except OSError as error:
                if not os.path.lexists(self.lock):
                    raise
                why = error.strerror
        raise TokenServerAway('%s cannot be opened: %s' % (self.lock, why))

    @staticmethod
    def _release(lock):
        """A child that a handler has forked may have it open for long, so
        that closing it here would leave it locked."""
        import fcntl
        if lock is not None:
            with contextlib.suppress(OSError):      # there are no locks
                fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)

    def _go_without(self, error):
        if self.folder not in self.complained:
            self.complained.add(self.folder)
            log.warning('%s: sign-ins are renewed without a lock: %s; do not '
                        'run two programs on it', self.folder, error)


class Freshness:
    """How long tokens are good, by both clocks: that of the box may be set
    late, or jump; the other one begins with us.

    came: clock() when the access token came, from wherever."""

    def __init__(self, clock, wall):
        self._clock, self._wall = clock, wall
        self.came = float('-inf')
        self.forget()

    def forget(self):
        """These are other tokens: only they know how old they are."""
        self._known, self._until = self._clock(), None

    def begin(self, answer):
        """They have come just now, by this answer of the token server."""
        self.came = self._known = self._clock()
        self._until = self.came + seconds_in(answer.get('expires_in'), 3600)

    def left(self, tokens):
        """Seconds that the access token is good."""
        now, left = self._wall(), []
        if CLOCK_IS_SET <= tokens.renewed <= now:
            left.append(tokens.expires - now)
        if self._until is not None:
            left.append(self._until - self._clock())
        return min(left, default=0)

    def is_idle(self, tokens):
        """Has the refresh token not been used for a week?"""
        idle, now = self._clock() - self._known, self._wall()
        if CLOCK_IS_SET <= min(now, tokens.renewed):
            idle = max(idle, abs(now - tokens.renewed))     # it was ahead then
        return idle >= IDLE_TIME


class Outage:
    """The token server has not helped.

    away: the last TokenServerAway, None since it has helped; until: clock()
    before which it wants to be left alone."""

    def __init__(self, clock):
        self._clock = clock
        self.end()

    def begin(self, away):
        """Or go on."""
        self.away, self._at = away, self._clock()
        self.until = self._at + away.wait

    def end(self):
        self.away, self._at, self.until = None, 0, 0
        self._told = float('-inf')

    def is_news(self):
        """For a log that needs it once and daily."""
        news = self._clock() - self._told >= DAY
        if news:
            self._told = self._clock()
        return news

    def spare_the_server(self, asked):
        """Who waited for a failure, or asked too soon, has it, too."""
        now = self._clock()
        if self.away and (self._at >= asked or now < self.until):
            away = TokenServerAway(str(self.away))
            away.absent = self.away.absent
            away.wait = max(0, self.until - now)
            raise away


class State(NamedTuple):
    """Of a sign-in. name: 'signed in', 'not signed in', 'away' (no token for
    now) or 'needed' (a person is); text: for the owner."""
    name: str
    text: str


def why_denied(denied, account, age):
    """A TokenDenied for the owner, with the trap that is known. age: seconds
    since the sign-in."""
    if account.oauth == 'google' and 6.5 <= age / DAY <= 7.5:
        return ('%s; after seven days: is the app still in Testing? publish '
                'it (In production)' % denied)
    return str(denied)


class Grant:
    """One sign-in: whoever needs a token for an account asks here. All
    accounts that agree in Account.grant share one.

    Any thread may ask. The one that has the lock _renewing talks to the token
    server, the others wait and take what it got, token or failure; the lock
    guards all other names with an underscore. state(), person_needed() and
    retry() take no part in that: they read, or set, one name in one step.
    Other processes are kept out by the lock file; what they stored is read
    before anything is asked.

    Nothing here deletes a sign-in but forget()."""

    def __init__(self, folder, section, account, clock=time.monotonic,
                 wall=time.time):
        self.section, self.account = section, account
        self.clock, self.wall = clock, wall
        self.file = TokenFile(folder, account.grant)
        self._renewing = threading.Lock()
        self._tokens, self._problem = None, ''
        self._mark = ''             # of the file as we know it; '': unknown
        self._fresh = Freshness(clock, wall)
        self._unsaved = False       # the disk has refused _tokens
        self._again = False         # the owner has asked for another look
        self._dead = ''             # why a person is needed
        self._said = 0              # clock() when that was logged
        self._outage = Outage(clock)
        self._idle_at = 0           # no idle renewal before

    # For those who need a token.

    def access_token(self, refused=None):
        """A token to log in with. refused: the one that the server has just
        refused; then another one, renewed unless somebody did already. Raises
        TokenServerAway or SignInNeeded."""
        asked = self.clock()
        with self._renewing:
            self._look()
            self._find_lack()
            if self._dead:
                raise SignInNeeded(self.section, self._dead, self.command)
            if not self._is_good(refused, asked):
                self._outage.spare_the_server(asked)
                self._renew(refused, asked)
            return self._tokens.access

    def retry(self):
        """The owner wants another try: of a dead sign-in as well."""
        self._dead = ''
        self._outage.until = 0
        self._again = True              # what could not be read is read again

    def state(self):
        """The State of it."""
        if self._renewing.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._renewing.release()
        tokens = self._tokens
        lack = self._lack(tokens)
        if lack and not tokens:
            return State('not signed in', '%s: %s' % (lack, self.command))
        dead = self._dead or lack or self.file.noted(self._case())
        if dead:
            return State('needed', '%s: %s' % (dead, self.command))
        away = self._outage.away or self.file.noted(self._case() + AWAY)
        if away:
            return State('away', str(away))
        if not tokens:
            return State('signed in', self._problem
                         or 'the app signs in by itself when needed')
        return State('signed in', 'signed in since %s, renewed %s' % (
            shown(tokens.signed_in), shown(tokens.renewed)))

    @property
    def command(self):
        """What the owner has to type."""
        import shlex
        return '--login ' + shlex.quote(self.section)

    def person_needed(self):
        """Why a person has to sign in before there is a token (str); '' if
        nobody has to."""
        return self._dead

    # For the relay's round.

    def renew_if_idle(self):
        """Sees a new file, stores what the disk has refused, renews what was
        not used for a week, reminds the owner daily. Returns at once: what
        takes time is done by a thread."""
        if not self._renewing.acquire(blocking=False):
            return                      # it is at work
        try:
            self._look()
            self._find_lack()
            if self._dead and self.clock() - self._said >= DAY:
                self._log_dead()
            due = self._unsaved or self._is_due()
        finally:
            self._renewing.release()
        if due:
            with contextlib.suppress(RuntimeError):     # next time, then
                threading.Thread(target=self._catch_up, daemon=True,
                                 name='sign-in-' + self.section).start()

    def _catch_up(self):
        with self._renewing:
            try:
                self._save_again()
                if self._is_due():
                    self._idle_at = self.clock() + IDLE_RETRY
                    self._renew(None, self.clock())
            except TokenServerAway as away:
                if self._outage.is_news():
                    self.file.note(self._case() + AWAY, str(away))
                    log.warning('sign-in of [%s]: not renewed: %s; a try each '
                                '%d seconds', self.section, away, IDLE_RETRY)
            except SignInNeeded:
                pass                    # the log says so

    def finish(self, seconds):
        """Waits until no renewal is under way, since its answer is to be
        stored; what the disk has refused is tried once more."""
        if self._renewing.acquire(timeout=max(0, seconds)):
            try:
                self._save_again(patience=0)
            except TokenServerAway as away:
                log.error('sign-in of [%s]: the new one is lost: %s',
                          self.section, away)
            finally:
                self._renewing.release()

    def _is_due(self):
        """Is it to be renewed though nobody has asked for a token?"""
        return bool(self._tokens and self._tokens.refresh and not self._dead
                    and self._fresh.is_idle(self._tokens)
                    and self.clock() >= max(self._idle_at, self._outage.until))

    # For --login and --logout.

    def store(self, answer):
        """Keeps what a person's sign-in brought. Raises OSError, then the old
        one is there as before, or TokenServerAway (the lock)."""
        make_folder(self.file.folder)
        with self._renewing, self.file.locked():
            self._tokens = Tokens.of(answer, None, self.wall())
            self._mark = self.file.write(self._tokens)
            self._fresh.begin(answer)
            self._outage.end()

    def forget(self):
        """Returns whether there was one. Raises OSError, TokenServerAway."""
        with self._renewing, self.file.locked():
            return self.file.remove()

    # With the lock.

    def _look(self):
        """Reads the file if it is not what we know; returns whether. That
        brings a dead sign-in back to life."""
        mark, tokens, problem, passes = None, None, '', False
        try:
            mark = self.file.mark()
        except OSError as error:
            if self._tokens:
                return False            # a disk is away: not the sign-in
            if not isinstance(error, FileNotFoundError):
                problem = '%s cannot be read: %s' % (
                    self.file.folder, error.strerror)
        known = mark == self._mark
        if known and not (self._again and self._problem):
            return False
        try:
            tokens = self.file.read() if mark else None
        except (OSError, ValueError) as error:
            problem = '%s cannot be read: %s' % (
                self.file.path, getattr(error, 'strerror', None) or error)
            passes = getattr(error, 'errno', None) in PASSING
        if known and problem == self._problem:      # it is as it was
            self._again = passes
            return False
        had, self._tokens = self._tokens, tokens
        self._mark, self._problem = mark, problem
        if had and not mark:
            log.warning('sign-in of [%s]: it is gone: %s', self.section,
                        self.command)
        self._fresh.forget()
        self._outage.end()
        self._unsaved = False
        self.file.keep_lock(False)
        self.retry()
        self._again = passes
        return True

    def _lack(self, tokens):
        """Why only a person can get a token from here on (str), or ''."""
        if form_to_renew(self.account, tokens):
            return ''
        if not tokens:
            return self._problem or 'not signed in'
        return RUN_OUT if self._fresh.left(tokens) < 1 else ''

    def _find_lack(self):
        """Says so, if it is so; that takes no request."""
        if not self._dead:
            self._dead = self._lack(self._tokens)
            if self._dead:
                self._log_dead()

    def _is_good(self, refused, asked):
        """May the token be used that we have? One that has come since asked
        may, however short its life is; so may one that nothing follows."""
        if not self._tokens or self._tokens.access in ('', refused):
            return False
        need = MARGIN if refused is None and form_to_renew(
            self.account, self._tokens) else 1
        return self._fresh.came >= asked or (
            self._fresh.left(self._tokens) >= need)

    def _renew(self, refused, asked):
        if not self._tokens:            # an app, for the first time
            with contextlib.suppress(OSError):
                make_folder(self.file.folder)
        try:
            with self.file.locked():
                if self._look():        # another process was faster
                    self._fresh.came = self.clock()
                    if self._is_good(refused, asked):
                        return
                self._fetch(refused, asked)
        except TokenServerAway as away:
            self._outage.begin(away)
            raise

    def _fetch(self, refused, asked):
        """One request."""
        tokens, account = self._tokens, self.account
        form, answer, denied = form_to_renew(account, tokens), None, None
        if not form:
            self._die(self._lack(tokens) or RUN_OUT)
        try:
            answer = ask_token_server(account, account.oauthtokenurl, form)
        except TokenDenied as error:
            denied = error
        if self._look():                # no lock: another one was faster
            self._fresh.came = self.clock()
            if not self._is_good(refused, asked):
                self._fetch(refused, asked)
            return
        if denied:
            age = self.wall() - tokens.signed_in if tokens else 0
            self._die(why_denied(denied, account, age))
        self._fresh.begin(answer)
        self._outage.end()
        self._save(Tokens.of(answer, tokens, self.wall()))
        log.info('sign-in of [%s]: renewed, good for %d seconds',
                 self.section, self._fresh.left(self._tokens))

    def _save_again(self, patience=None):
        """What the disk has refused."""
        if self._unsaved:
            with self.file.locked(patience):
                if not self._look():
                    self._save(self._tokens)

    def _save(self, tokens):
        """On disk before anybody uses it; if that can't be, in memory."""
        again, self._tokens = tokens is self._tokens, tokens
        if self._problem:
            return                      # what is there is not ours
        try:
            self._mark, self._unsaved = self.file.write(tokens), False
        except OSError as error:
            if not again:
                log.error('sign-in of [%s]: the new one cannot be stored in '
                          '%s: %s; it is kept in memory until it can. If the '
                          'program ends before that: %s', self.section,
                          self.file.path, error.strerror, self.command)
            self._unsaved = True
        self.file.keep_lock(self._unsaved)

    def _die(self, why):
        """No more requests until the file changes, or retry()."""
        self._dead = why
        if not self._problem:           # that the commands see themselves
            self.file.note(self._case(), why)
        self._log_dead()
        raise SignInNeeded(self.section, self._dead, self.command)

    def _case(self):
        """What a note is about: this file, and these keys of the ini."""
        return '%s %08x' % (self._mark, zlib.crc32(
            repr(tuple(self.account)).encode()))

    def _log_dead(self):
        self._said = self.clock()
        log.error('sign-in of [%s]: a person is needed: %s; its mail waits. '
                  'To sign in: %s', self.section, self._dead, self.command)


class Grants:
    """All sign-ins of an ini. They outlive a reload, since one may be in
    memory only."""

    def __init__(self, settings, clock=time.monotonic, wall=time.time):
        self.clocks, self._all = (clock, wall), {}
        self.reload(settings)

    def reload(self, settings):
        """New settings; dead sign-ins are tried again."""
        for key, section in settings.grants.items():
            account = settings.accounts[section]
            folder, known = settings.config.tokendir, self._all.get(key)
            if known is None or known.file.folder != folder:
                known = self._all[key] = Grant(folder, section, account,
                                               *self.clocks)
            known.section, known.account = section, account
            known.retry()
        self._present = list(settings.grants)

    def of(self, account):
        """The Grant of an account with oauth."""
        return self._all[account.grant]

    def __iter__(self):
        return (self._all[key] for key in self._present)

    def needed(self):
        """{Account.grant: (section, what has to be done)} of those that need
        a person."""
        found = {}
        for grant in self:
            state = grant.state()
            if state.name in ('not signed in', 'needed'):
                found[grant.account.grant] = grant.section, state.text
        return found

    def renew_idle(self):
        """For the relay's round."""
        for grant in self:
            grant.renew_if_idle()

    def finish(self, seconds):
        """At a stop."""
        end = time.monotonic() + seconds
        for grant in self:
            grant.finish(end - time.monotonic())


def folder_warnings(settings):
    """What is wrong with tokendir, as the user that we are: a list of str."""
    folder = settings.config.tokendir
    if not settings.grants or not os.path.isdir(folder) or os.access(
            folder, os.W_OK | os.X_OK):
        return []
    return ['tokendir %s cannot be written by user %d: sign-ins are renewed '
            'in memory only, and lost when the service ends'
            % (folder, os.getuid())]


def shown(second):
    """A time of the box's clock."""
    return time.strftime('%Y-%m-%d %H:%M', time.localtime(second))


# How a person signs in. Each flow returns the token server's answer, and
# raises TokenServerAway, or TokenDenied with the provider's reason.

PROGRESS = 30               # seconds between two lines while we wait
BROWSER_TIME = 900          # seconds to sign in there
POLL_TIME = 5               # seconds; RFC 8628 3.5
SLOWEST_POLL = 60
PAGE = ('<!DOCTYPE html><meta charset="utf-8"><title>smtpproxy</title>'
        '<p>%s</p>\n')


class Countdown:
    """Says now and then what we wait for, and how long still."""

    def __init__(self, what, seconds, clock=time.monotonic):
        self.what, self.clock = what, clock
        self.end, self.next = clock() + seconds, clock()

    def left(self):
        """Seconds."""
        left = self.end - self.clock()
        if left > 0 and self.clock() >= self.next:
            self.next = self.clock() + PROGRESS
            tell('%s, %d:%02d minutes left (Ctrl-C gives up)' % (
                (self.what,) + divmod(int(left), 60)))
        return left


def sign_in_by_app(account):
    """Client credentials: nobody needs to do anything."""
    return ask_token_server(account, account.oauthtokenurl, app_form(account))


def sign_in_by_device(account, clock=time.monotonic, pause=time.sleep):
    """RFC 8628: a code is typed in any browser of the world."""
    start = ask_token_server(account, account.oauthdeviceurl, client_form(
        account, scope=account.oauthscope, login_hint=account.smtpusername),
        has_code)
    tell('Open in any browser:   %s' % page_of(start))
    tell('and type the code:     %s' % start['user_code'])
    form = client_form(
        account, device_code=start['device_code'],
        grant_type='urn:ietf:params:oauth:grant-type:device_code')
    countdown = Countdown('Waiting until you have signed in there',
                          seconds_in(start.get('expires_in'), 900), clock)
    interval = wait = seconds_in(start.get('interval'), POLL_TIME) or POLL_TIME
    while countdown.left() > 0:
        pause(min(wait, max(0, countdown.left())))
        try:
            return ask_token_server(account, account.oauthtokenurl, form)
        except TokenServerAway as away:
            wait = min(2 * wait, SLOWEST_POLL)
            if away.error == 'slow_down':
                wait = interval = interval + 5
            wait = max(interval, away.wait, wait)
        except TokenDenied as denied:
            if denied.error == 'slow_down':
                interval += 5           # RFC 8628 3.5: for good
            elif denied.error != 'authorization_pending':
                raise
            wait = interval
    raise TokenDenied('expired_token')


class BrowserLogin:
    """The authorization code flow with PKCE (RFC 7636, 8252): a browser on
    this box comes back to us, or the owner pastes where it ended. stdin: a
    descriptor or None."""

    def __init__(self, account, stdin=None):
        import secrets
        self.account, self.stdin = account, stdin
        self.state = secrets.token_urlsafe(24)
        self.verifier = secrets.token_urlsafe(48)
        self.listeners, self.visits, self.typed = [], {}, b''

    def run(self):
        """The token server's answer."""
        try:
            self._listen()
            for line in ('Open this address in a browser:', '',
                         self._address(), '', 'If the browser then shows an '
                         'error page, since it is not on this box: copy the '
                         'address of that page and paste it here.', ''):
                tell(line)
            code = self._wait()
        finally:
            for sock in self.listeners + list(self.visits):
                sock.close()
        return ask_token_server(
            self.account, self.account.oauthtokenurl, client_form(
                self.account, grant_type='authorization_code', code=code,
                redirect_uri=self.redirect, code_verifier=self.verifier))

    def _listen(self):
        """On loopback only. Microsoft knows this box as localhost, which may
        be ::1 to a browser."""
        localhost = self.account.oauth == 'microsoft'
        try:
            self.listeners.append(socket.create_server(
                ('127.0.0.1', self.account.oauthport)))
        except OSError as error:
            raise OSError(error.errno, 'port %d of 127.0.0.1 cannot be used: '
                          '%s; set another oauthport'
                          % (self.account.oauthport, error.strerror))
        port = self.listeners[0].getsockname()[1]
        if localhost:
            with contextlib.suppress(OSError):      # a box without IPv6
                self.listeners.append(socket.create_server(
                    ('::1', port), family=socket.AF_INET6))
        self.redirect = 'http://%s:%d%s' % (
            ('localhost', port, '') if localhost else ('127.0.0.1', port, '/'))

    def _address(self):
        import hashlib
        from urllib.parse import urlencode
        account = self.account
        digest = hashlib.sha256(self.verifier.encode()).digest()
        query = {'response_type': 'code', 'client_id': account.oauthclientid,
                 'redirect_uri': self.redirect, 'scope': account.oauthscope,
                 'state': self.state, 'code_challenge_method': 'S256',
                 'code_challenge': binascii.b2a_base64(
                     digest, newline=False).decode().translate(
                         {ord('+'): '-', ord('/'): '_', ord('='): None}),
                 'login_hint': account.smtpusername}
        if account.oauth == 'google':   # else no refresh token the next time
            query.update(access_type='offline', prompt='consent')
        elif account.oauth == 'other' and (
                'offline_access' in account.oauthscope.split()):
            query['prompt'] = 'consent'     # OpenID Connect Core 11
        url = account.oauthauthurl
        return url + ('&' if '?' in url else '?') + urlencode(query)

    def _wait(self):
        """The authorization code."""
        import select
        countdown = Countdown('Waiting until you have signed in there',
                              BROWSER_TIME)
        code = None
        while not code:
            left = countdown.left()
            if left <= 0:
                raise TokenDenied('expired_token', 'nobody came back')
            ends = self.listeners + list(self.visits)
            if self.stdin is not None:
                ends.append(self.stdin)
            for end in select.select(ends, [], [], min(left, PROGRESS))[0]:
                code = code or self._serve(end)
        return code

    def _serve(self, end):
        """What came: a code, or None."""
        if end == self.stdin:
            return self._read_typed()
        if end in self.listeners:
            visit, _ = end.accept()
            visit.settimeout(5)
            self.visits[visit] = b''
            return None
        return self._read_visit(end)

    def _read_typed(self):
        try:
            data = os.read(self.stdin, 65536)
        except OSError:                 # nohup's is for writing only, and a
            data = b''                  # terminal may hang up
        if not data:
            self.stdin = None           # its end cancels nothing
        *lines, self.typed = (self.typed + data).split(b'\n')
        if not data:
            lines.append(self.typed)
        for line in lines:
            text = line.decode('utf-8', 'replace').strip(' \t\r\'"<>')
            if not text:
                continue
            address = text.partition('#')[0]
            query = address.partition('?')[2] or address
            code = self._code_of(query, query.startswith('code=')
                                 and '?' not in text)
            if code:
                return code
            tell('This is not the address that belongs to this sign-in: it '
                 'begins with %s and holds code= and state=' % self.redirect)
        return None

    def _read_visit(self, visit):
        try:
            data = visit.recv(65536)
        except OSError:
            data = b''                  # it has gone
        self.visits[visit] += data
        head = self.visits[visit]
        if data and b'\r\n\r\n' not in head and len(head) <= ANSWER_SIZE:
            return None
        del self.visits[visit]
        with visit:
            return self._hear(visit, head.partition(b'\r\n')[0])

    def _hear(self, visit, line):
        """A browser asks; others too, and it for an icon."""
        method, _, target = line.decode('latin-1').partition(' ')
        is_ours = True
        try:
            code = None
            if method == 'GET':
                code = self._code_of(
                    target.rpartition(' ')[0].partition('?')[2])
            is_ours = code is not None
            return code
        finally:
            with contextlib.suppress(OSError):
                self._answer(visit, is_ours)

    @staticmethod
    def _answer(visit, is_ours):
        page = PAGE % ('Thank you. You may close this window: it goes on '
                       'where you called smtpproxy.' if is_ours else
                       'Nothing here.')
        visit.sendall(('HTTP/1.1 %s\r\nContent-Type: text/html\r\n'
                       'Content-Length: %d\r\nCache-Control: no-store\r\n'
                       'Connection: close\r\n\r\n%s' % (
                           '200 OK' if is_ours else '404 Not Found',
                           len(page), page)).encode())

    def _code_of(self, query, without_state=False):
        """The code in an address's query, None if it is not for us. Raises
        TokenDenied if the provider said no."""
        import hmac
        from urllib.parse import parse_qsl
        fields = dict(parse_qsl(query))
        if not (without_state and 'state' not in fields
                or hmac.compare_digest(fields.get('state', '').encode(),
                                       self.state.encode())):
            return None
        if 'error' in fields:
            raise TokenDenied(fields['error'], first_line(
                fields.get('error_description')))
        return fields.get('code')


def sign_in_by_browser(account):
    try:
        stdin = sys.stdin.fileno()
    except (AttributeError, OSError, ValueError):
        stdin = None                    # there is none
    return BrowserLogin(account, stdin).run()


FLOWS = {'device': sign_in_by_device, 'browser': sign_in_by_browser,
         'app': sign_in_by_app}


# --- Sign-in: what an account asks before it takes mail ---------------------

def auth_cram_md5(ask, user, password):
    """RFC 2195."""
    import hmac
    code, challenge = ask('AUTH CRAM-MD5')
    if code != 334:
        return code, challenge
    try:
        digest = hmac.new(password.encode(),
                          binascii.a2b_base64(challenge), 'md5')
    except ValueError:
        return 501, 'its challenge is not base64'
    return ask(smtps.encoded64(user + ' ' + digest.hexdigest()))


def auth_plain(ask, user, password):
    """RFC 4616. A server that takes no response in the same line says 334
    (RFC 4954 4)."""
    response = smtps.encoded64('\0%s\0%s' % (user, password))
    answer = ask('AUTH PLAIN ' + response)
    return ask(response) if answer[0] == 334 else answer


def auth_login(ask, user, password):
    """334 by 334: smtplib of early 3.8 mixes up name and password."""
    answer = ask('AUTH LOGIN')
    for text in user, password:
        if answer[0] == 334:
            answer = ask(smtps.encoded64(text))
    return answer


# Name of the SASL mechanism -> function(ask, user, password) that returns the
# last reply, (code, text). ask: smtps.Delivery.ask. Best first.
MECHANISMS = {'cram-md5': auth_cram_md5, 'plain': auth_plain,
              'login': auth_login}


AUTH_LINE = 512             # octets of a command, RFC 5321 4.5.3.1.4


def auth_xoauth2(ask, account, token):
    """Google's own; Microsoft has no other."""
    return present(ask, 'AUTH XOAUTH2', xoauth2(account, token), '')


def auth_oauthbearer(ask, account, token):
    """RFC 7628."""
    return present(ask, 'AUTH OAUTHBEARER', oauthbearer(account, token),
                   smtps.encoded64('\1'))


def present(ask, command, response, apology):
    """A token, in two steps where one line would be too long: Dovecot takes
    no longer one. A 334 behind it is a refusal with details, which wants to
    hear the apology before it says 535."""
    response = smtps.encoded64(response)
    line = command + ' ' + response
    if len(line) + 2 <= AUTH_LINE:
        code, text = ask(line)
    else:
        code, text = ask(command)
        if code == 334:
            code, text = ask(response)
    if code != 334:
        return code, text
    try:
        code, text = ask(apology)
    except OSError:
        return 535, text                # it has hung up, which says the same
    return code if 400 <= code < 500 else 535, text


# The same for accounts with oauth: function(ask, account, token).
TOKEN_MECHANISMS = {'xoauth2': auth_xoauth2, 'oauthbearer': auth_oauthbearer}


def login_advice(host, replies):
    """The Advice on a refused login; replies: what each mechanism was told
    ('CODE text'). The one that needs a person counts, since what comes behind
    it is often about too many tries. 504 says only that this mechanism is
    none, so it counts if there is nothing else."""
    replies = [reply for reply in replies
               if not reply.startswith('504')] or replies
    advices = [advise(host, 'login', reply) for reply in replies]
    persons = [advice for advice in advices if advice.kind == 'person']
    known = [advice for advice in advices if advice is not NO_ADVICE]
    return (persons[:1] or known[-1:] or [NO_ADVICE])[0]


class TokenRefused(AccountUnavailable):
    """The server does not take this token; perhaps it takes a new one."""

    def __init__(self, text, token, advice):
        super().__init__(text, advice)
        self.token = token


def token_advice(reply, account, command):
    """The Advice on a refused token. command: what signs in again."""
    if 'smtpclientauthentication is disabled' in reply.lower():
        sentence = (
            'SMTP AUTH is switched off there, no other sign-in helps; the '
            'administrator switches it on in Exchange Online PowerShell: '
            'Set-CASMailbox -Identity %s -SmtpClientAuthenticationDisabled '
            '$false' % account.smtpusername)
    elif '5.7.139' in reply:
        sentence = (
            'a policy of the organization forbids this login, no other '
            'sign-in helps; the administrator has to allow it for this '
            'mailbox (Conditional Access, security defaults, a locked '
            'account)')
    else:
        sentence = (
            'is %s the mailbox of whom signed in, and may the app send mail '
            'for it? to sign in again: %s' % (account.smtpusername, command))
    return Advice(kind='person', sentence=sentence)


class PopDialogue:
    """Mixed into poplib's classes: replies are bounded, and the dialogue goes
    to our log, without secrets."""

    def __init__(self, host, port, tls, redact, debuglevel, watch, family):
        # The constructor of poplib connects, and that uses these.
        self.tls, self.watch = tls, watch
        self.redact, self.debuglevel = redact, debuglevel
        self.family = family
        super().__init__(host, port, timeout=smtps.CONNECT_TIME)

    def _create_socket(self, timeout):
        return smtps.connect(self.host, self.port, timeout, self.tls,
                             self.watch, self.family)

    def _bounded(self):
        """self.file, bounded: with each socket poplib makes a plain one."""
        if not isinstance(self.file, smtps.BoundedReader):
            self.file.close()
            self.file = smtps.BoundedReader(self.sock)
        return self.file

    def _getline(self):
        self._bounded()
        return super()._getline()

    def _putline(self, line):
        self._bounded().expect(smtps.REPLY_TIME)
        self.show(b'PASS ***' if line.startswith(b'PASS ') else line)
        super()._putline(line)

    def _getresp(self):
        try:
            answer = super()._getresp()
        except Exception as error:
            self.show(error.args[0] if error.args else b'')
            self.close()            # poplib would leave it to the collector
            raise
        self.show(answer)
        return answer

    def show(self, line):
        if self.debuglevel:
            log.info('pop %s: %s', self.host, self.redact(smtps.plain(line)))


@functools.lru_cache(None)
def pop_class():
    """Made when first needed: most accounts never need poplib."""
    import poplib
    return type('Pop', (PopDialogue, poplib.POP3), {})


def secrets_of(account):
    """A pattern for the passwords in each form in which a server may repeat
    what it was told. A short one counts as a word only, else it would veil
    half of every line."""
    forms = {form for secret in (account.smtppassword, account.poppassword)
             if secret for form in (
                 secret, smtps.plain(secret), repr(secret.encode())[2:-1],
                 smtps.encoded64(secret), smtps.encoded64('\0%s\0%s' % (
                     account.smtpusername, secret)))}
    return re.compile('|'.join(
        ('%s' if len(form) > 3 else r'(?<!\w)%s(?!\w)') % re.escape(form)
        for form in sorted(forms, key=len, reverse=True)) or '(?!)')


def context_of(account):
    """The ssl.SSLContext for an account's servers."""
    return smtps.client_context(account.tlscafile, account.tlsverify,
                                account.smtpweaktls)


FAMILIES = {'any': socket.AF_UNSPEC, '4': socket.AF_INET,
            '6': socket.AF_INET6}


def common_families(account):
    """The address families to reach an account's POP and SMTP server in: the
    provider lets the address in that it has seen at the POP login. Those that
    both names have, best first; else [AF_UNSPEC], each server in any."""
    if account.ipversion != 'any':
        return [FAMILIES[account.ipversion]]
    try:
        pop, smtp = [
            [address[0] for address in socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM)]
            for host, port in ((account.pophost, account.popport),
                               (account.smtphost, account.smtpport))]
    except (OSError, ValueError, LookupError):
        return [socket.AF_UNSPEC]       # who connects hears what is wrong
    return [family for family in dict.fromkeys(smtp) if family in pop] or [
        socket.AF_UNSPEC]


UNUSED = 60                 # seconds that a POP login waits for its first use
RENEWALS = 3                # POP logins more, for a mail that was refused
RENEWAL_WAIT = 5            # seconds at least from the first of them to SMTP


class PopLogin:
    """A POP login that was good. SMTP may be tried from opens on; the next
    login is due from ends on (both: seconds of the clock). family: that of
    our address, SMTP needs the same. proven: bool, the server has taken a mail
    since."""

    def __init__(self, family, now, wait, lasts):
        """wait: seconds until SMTP may be tried; lasts: popcheckdelay."""
        self.family, self.made, self.opens = family, now, now + wait
        self._lasts = lasts
        self.proven = False
        # Where lasts is less than wait it would be over before its use.
        self.ends = self.opens + max(lasts, UNUSED)

    def prolong(self, now):
        """The server wants no new one yet: this one counts as made now."""
        self.made = now

    def use(self):
        """SMTP is tried with it."""
        self.ends = self.made + self._lasts


SINKS_IN = 'the POP login has to sink in'


class PopPending(AccountUnavailable):
    """The POP login was good, SMTP has to wait a moment. until: seconds of
    the clock."""

    def __init__(self, until):
        super().__init__(SINKS_IN)
        self.until = until


class SignIn:
    """What one account asks before it takes mail. All connections of the
    account share it, each from a thread of its own. The lock lets one of them
    sign in by POP at a time, and guards what is known of that. All else is
    set in one step.

    clock: callable() -> seconds; grants: the Grants that an account with
    oauth is in."""

    def __init__(self, account, clock=time.monotonic, grants=None):
        self.account, self._grants, self._clock = account, grants, clock
        self._pop_lock = threading.Lock()
        self._pop_login = None      # the last PopLogin
        self._without_smtp = set()  # families, since SMTP was tried in them
        self._renewals = {}         # {id: how many more a mail has asked for}
        self._renewal = 0           # which one of those is due, 0: none
        self._last_taken = None     # the mechanism
        self._stepwise_until = 0.0  # as if PIPELINING were not offered
        self._secrets = secrets_of(account)
        self._told = ()             # of tokens: what nobody may see
        self._renewed = None        # the token that replaced a refused one,
                                    # as long as it was not taken itself

    # Secrets.

    def redact(self, text):
        """text without the account's passwords and tokens: some servers
        repeat what they were told."""
        return without_pieces(self._secrets.sub('***', text), self._told)

    def _remember(self, token):
        """Has redact() veil a token, as long as two more take its place."""
        account = self.account
        forms = [token] + [smtps.encoded64(form) for form in (
            token, xoauth2(account, token), oauthbearer(account, token))]
        if token not in self._told:
            self._told = tuple(forms) + self._told[:2 * len(forms)]

    # OAuth2.

    def token(self, refused=None):
        """The token to log in with, None without oauth. refused: the one that
        the server has just refused. Raises TokenServerAway, SignInNeeded."""
        if not self.account.oauth:
            return None
        token = self._grant().access_token(refused)
        self._remember(token)
        if refused is not None:
            self._renewed = token
        return token

    def state(self):
        """The State of the grant."""
        return self._grant().state()

    def is_dead(self):
        """Whether a person has to sign in before a token can be had."""
        return bool(self.account.oauth and self._grant().person_needed())

    def retry(self):
        """The owner wants another try, whatever we know."""
        self._renewed = None
        if self.account.oauth:
            self._grant().retry()

    def _grant(self):
        return self._grants.of(self.account)    # a reload may replace it

    # POP before SMTP.

    def pop_is_due(self):
        """Whether a new POP login has to come before the next mail."""
        return self.account.popbeforesmtp and (
            self._pop_login is None or self._clock() >= self._pop_login.ends)

    def by_pop(self, config, watch=smtps.unwatched):
        """One login for all connections of the account, if it is due. Returns
        the PopLogin, None if the account wants none. watch: see Courier.
        Raises AccountUnavailable, and PopPending while config.waitafterpop
        lasts."""
        if not self.account.popbeforesmtp:
            return None
        with self._pop_lock:
            if self.pop_is_due():
                self._pop_login = self._new_pop_login(config, watch)
            login = self._pop_login
            if self._clock() < login.opens:
                raise PopPending(login.opens)
            login.use()
            return login

    def _new_pop_login(self, config, watch):
        """Raises AccountUnavailable."""
        account, wait = self.account, config.waitafterpop
        if self._renewal:               # the last wait was too short
            wait = max(wait, RENEWAL_WAIT) * 2 ** (self._renewal - 1)
        try:
            family = self._talk_pop(config.debuglevel, watch)
        except Exception as error:
            unavailable = self._pop_unavailable(error)
            if not self._is_still_known(str(unavailable)):
                raise unavailable from error
            log.info('%s; the login before it was good, so SMTP is tried',
                     unavailable)
            self._pop_login.prolong(self._clock())
            return self._pop_login
        log.info('%s: POP login as %s; waiting %d s before SMTP',
                 account.pophost, account.popusername, wait)
        watch('POP login', account.popusername)
        self._renewal = 0
        return PopLogin(family, self._clock(), wait, account.popcheckdelay)

    def _is_still_known(self, why):
        """Whether the server refuses a login only because of the one before,
        and that one has not failed us."""
        return bool(self._pop_login and not self._renewal
                    and self._pop_login.family not in self._without_smtp
                    and asks_too_soon(why))

    def renew_pop(self, login, id):
        """A mail was refused behind this PopLogin, perhaps since the server
        does not know of it. True: a new one comes first, and a longer wait,
        then the mail is worth another try. False: it had all of that, so its
        refusal counts."""
        with self._pop_lock:
            if login is not self._pop_login:
                return True             # another connection had it renewed
            renewal = self._renewals.pop(id, 0) + 1
            if renewal > RENEWALS:
                return False
            self._renewals[id] = renewal
            self._renewal = max(self._renewal, renewal)
            login.ends = self._clock()
            return True

    def leave_family(self, login):
        """SMTP is not to be had in the family of this PopLogin. True: the
        other one comes next, with a login of its own. False: there is no
        other, or it was tried."""
        with self._pop_lock:
            if login is not self._pop_login:
                return True             # another connection has seen to that
            known = login.family in self._without_smtp
            self._without_smtp.add(login.family)
            if known or self._without_smtp >= set(
                    common_families(self.account)):
                self._without_smtp.clear()
                return False
            log.info('%s cannot be reached from the address that the POP '
                     'server knows; a POP login over the other version of IP '
                     'comes first', self.account.server)
            login.ends = self._clock()
            return True

    def forget_renewals(self, id):
        """A mail is done with."""
        self._renewals.pop(id, None)

    def _pop_unavailable(self, error):
        """An AccountUnavailable that says what is wrong with the login."""
        account = self.account
        why = explain(error, '%s:%d' % (account.pophost, account.popport))
        return unavailable(
            'pop', error, account.pophost, account.popport, self.redact,
            pop_advice(account, why) + family_advice(account, error))

    def _talk_pop(self, debuglevel, watch):
        """One login; returns the family of our address."""
        account = self.account
        pop = self._open_pop(debuglevel, watch)
        try:
            if account.popssl == 'tls':
                pop.stls(context_of(account))
            pop.user(account.popusername)
            pop.pass_(account.poppassword)
            try:
                pop.quit()
            except Exception:
                pass                    # we are known there, that is enough
            return pop.family
        finally:
            with contextlib.suppress(OSError):  # TLS that failed has closed it
                pop.close()

    def _open_pop(self, debuglevel, watch):
        """In a family in which SMTP is to be had, if that can be."""
        account = self.account
        tls = context_of(account) if account.popssl is True else None
        *families, last = sorted(
            common_families(account),
            key=lambda family: family in self._without_smtp)
        connect = functools.partial(pop_class(), account.pophost,
                                    account.popport, tls, self.redact,
                                    debuglevel, watch)
        for family in families:
            with contextlib.suppress(OSError):
                return connect(family)
        return connect(last)

    # PIPELINING.

    def trusts_pipelining(self):
        """Whether commands may go out in packets where that is offered."""
        return self._clock() >= self._stepwise_until

    def note_silence(self, in_packets):
        """The server said nothing in the middle of a mail. in_packets: to
        commands that were sent together. Then the next connections send one
        at a time, for a day; if one of them meets silence too, it was
        something else."""
        if not in_packets:
            self._stepwise_until = 0.0
            return
        self._stepwise_until = self._clock() + DAY
        log.info('%s offers PIPELINING, but says nothing when it is used: one '
                 'command at a time from now on', self.account.server)

    # SMTP AUTH.

    def by_auth(self, delivery, token=None):
        """The login, if the account has one: returns the name of the
        mechanism that was taken, or ''. delivery: a smtps.Delivery behind its
        hello(); token: for an account with oauth. Raises TokenRefused,
        AccountUnavailable, OSError."""
        if token is not None:
            return self._by_token(delivery, token)
        account = self.account
        if account.smtppasswordfile and not account.smtppassword:
            raise AccountUnavailable('there is no password: %s cannot be read'
                                     % account.smtppasswordfile)
        if account.smtpusername and account.smtppassword:
            return self._by_password(delivery)
        return ''

    def _by_token(self, delivery, token):
        """A token that was refused is worth a new one, but not one after the
        other: providers call that a loop and close the door."""
        account = self.account
        name = self._mechanisms(delivery, TOKEN_MECHANISMS)[0]
        code, text = TOKEN_MECHANISMS[name](delivery.ask, account, token)
        if code == 235:
            self._renewed = None
            return name
        reply = '%s: %d %s' % (name, code, self.redact(smtps.plain(text)))
        why = 'login at %s as %s refused (%s)' % (
            account.server, account.smtpusername, reply)
        if code != 535:
            raise AccountUnavailable(why, advise(
                account.smtphost, 'login', '%d %s' % (
                    code, smtps.plain(text))))
        advice = token_advice(reply, account, self._grant().command)
        if '5.7.139' not in reply and token != self._renewed:
            raise TokenRefused(why, token, advice)
        raise AccountUnavailable(why, advice)

    def _by_password(self, delivery):
        """One mechanism after the other until one is taken."""
        account, replies = self.account, {}
        for name in self._mechanisms(delivery, MECHANISMS):
            try:
                if replies:
                    delivery.hello()
                code, text = MECHANISMS[name](
                    delivery.ask, account.smtpusername, account.smtppassword)
            except OSError:
                if not replies:
                    raise
                break           # it has hung up, but said something before
            if code == 235:
                self._last_taken = name
                return name
            replies[name] = '%d %s' % (code, smtps.plain(text))
        advice = login_advice(account.smtphost, list(replies.values()))
        raise AccountUnavailable('login at %s as %s refused (%s)%s' % (
            account.server, account.smtpusername, self.redact('; '.join(
                '%s: %s' % reply for reply in replies.items())),
            '' if advice.sentence else
            ': check smtpusername and smtppassword'), advice)

    def _mechanisms(self, delivery, known):
        """Names: the one that was taken last time, then best first: some
        servers offer what they refuse, and count failed logins. Raises
        AccountUnavailable."""
        if self.account.smtpauth != 'auto':
            return [self.account.smtpauth]
        offered = (delivery.offers('auth') or '').lower().split()
        names = [name for name in known if name in offered]
        if not names:
            raise AccountUnavailable(
                '%s offers no login %s (%s)%s' % (
                    self.account.server, 'by OAuth2' if self.account.oauth
                    else 'that we know', ' '.join(offered) or 'none at all',
                    '; smtpsecurity=tls, perhaps?'
                    if self.account.smtpsecurity == 'none' else ''))
        return sorted(names, key=lambda name: name != self._last_taken)


# --- Courier: takes mails to an account's server ----------------------------

def envelope_sender(mail, account):
    """The address (str) that the server is told as the sender."""
    return account.returnpath and bare_address(account.returnpath) or (
        account.forcefrom and bare_address(account.forcefrom) or mail.frm)


def envelope_of(mail, account):
    """The smtps.Envelope of mail as this account sends it. A recipient who
    is named twice gets it once."""
    parameters = mail.parameters
    if 'SMTPUTF8' in parameters and mail.header().isascii():
        parameters = {keyword: value for keyword, value in
                      parameters.items() if keyword != 'SMTPUTF8'}
    return smtps.Envelope(
        envelope_sender(mail, account), list(dict.fromkeys(mail.to)),
        parameters, mail.dot - len(b'.\r\n') - mail.start)


def our_name(account):
    """The name for EHLO; '' stands for the address of the connection. Many
    servers refuse a name without a dot, which says nothing out there."""
    return account.localhostname or (HOST if '.' in HOST else '')


@functools.lru_cache(1000)      # asked for each mail
def encoded_name(address):
    """'Name <a@b>' as a header may have it: RFC 2047."""
    if address.isascii():
        return address
    from email.header import Header
    from email.utils import unquote
    name, bracket, rest = address.rpartition('<')
    header = Header(unquote(name.strip()), 'utf-8', header_name='Reply-To')
    header.append(bracket + rest, 'us-ascii')
    return header.encode(linesep='\r\n')


# RFC 5322 3.6 allows one of each; servers refuse a mail with more.
ONE_OF_EACH = re.compile(
    rb'\n(date|message-id|from|sender|reply-to|subject|to|cc)[ \t]*:')


def singular(header):
    """The names (lower-case bytes) in header of which there may be one."""
    return ONE_OF_EACH.findall(b'\n' + header.lower())


def has_one_twice(header):
    names = singular(header)
    return len(set(names)) < len(names)


def one_of_each(header):
    """header (bytes) with the first field of each of these names; what else
    is in a To or Cc joins the first."""
    for name in set(singular(header)):
        pattern = smtps.fields_named(name.decode())
        fields = pattern.findall(header)
        if name in (b'to', b'cc'):
            fields = [joined(fields)]
        kept = fields[:1]
        header = pattern.sub(lambda _: kept.pop() if kept else b'', header)
    return header


def joined(fields):
    """One field (bytes) of several with lists of addresses."""
    name = fields[0].partition(b':')[0]
    lists = [field.partition(b':')[2].strip(b', \t\r\n') for field in fields]
    return name + b': ' + b',\r\n\t'.join(filter(None, lists)) + b'\r\n'


def dress(mail, account):
    """The header of mail (bytes as on the wire) as this account sends it."""
    unwanted, new = ['bcc', 'resent-bcc', 'return-path'], ''
    if account.returnpath:
        new += 'Return-Path: <%s>\r\n' % bare_address(account.returnpath)
    if account.replyto:
        unwanted.append('reply-to')
        new += 'Reply-To: %s\r\n' % encoded_name(account.replyto)
    if account.forcefrom:
        unwanted += ['from', 'sender']
        new += 'From: %s\r\n' % encoded_name(account.forcefrom)
    header = new.encode() + smtps.fields_named(*unwanted).sub(
        b'', mail.header())
    if has_one_twice(header) and not DKIM.search(header):
        log.info('%s: of several Date, From, Subject and the like the first '
                 'is sent, To and Cc are joined', mail.id)
        header = one_of_each(header)
    if mail.folded:
        header = b''.join(smtps.folded(header, at_blanks=True))
    return header


@contextlib.contextmanager
def body_of(mail):
    """What follows the header: bytes of a small mail, else a smtps.FilePart.
    Raises OSError."""
    end = mail.dot - len(b'.\r\n')
    if mail.dot <= len(mail.data):
        yield mail.data[mail.body:end]
        return
    with open(mail.path, 'rb') as file:
        yield smtps.FilePart(file, mail.body, end)


# Of a mail whose bytes must stay as they are.
SIGNED = re.compile(DKIM.pattern + rb'|multipart/(?:signed|encrypted)|'
                    rb'application/(?:x-)?pkcs7-mime|^-----BEGIN PGP ',
                    re.IGNORECASE | re.MULTILINE)


def may_be_folded(mail):
    """Whether a mail has lines that a server may find too long, and stays
    whole if they are broken. Raises OSError."""
    if mail.folded or SIGNED.search(mail.data, mail.start):
        return False
    with body_of(mail) as body:
        size = sum(len(piece) for part in (mail.header(), body)
                   for piece in smtps.folded(part))
    return size > mail.dot - len(b'.\r\n') - mail.start


class Courier:
    """Takes mails to one account's server, over one connection that it makes
    as the account asks for and keeps for the next mail. One thread uses it;
    sign_in is shared with the account's other couriers.

    watch: callable(step, found), told of each step there: those of
    smtps.unwatched, and 'POP login' with the user, 'EHLO' with the
    smtps.Delivery, 'login' with the name of the mechanism ('': none); with
    oauth 'sign-in' with its State, 'refused' with a TokenRefused. begins:
    callable(id), told when the envelope of a mail goes out.

    upcoming: None, or the (Mail, Account) whose envelope is under way: it
    must be delivered next."""

    def __init__(self, account, sign_in, config, watch=smtps.unwatched,
                 begins=lambda id: None):
        self.account, self.sign_in, self.config = account, sign_in, config
        self.upcoming = None
        self._delivery = self._token = None
        self._pop_login = None          # the PopLogin that comes before it
        self._watch, self._begins = watch, begins
        self._stepwise = False          # silence was met, see SignIn

    @property
    def connected(self):
        return self._delivery is not None and self._delivery.connected

    def look(self):
        """Is somebody there at smtphost? Raises AccountUnavailable."""
        try:
            smtps.connect(
                self.account.smtphost, self.account.smtpport,
                smtps.CONNECT_TIME, family=self._family()).close()
        except (OSError, ValueError, LookupError) as error:
            raise self._unavailable('connect', error) from error

    def deliver(self, mail, account, following):
        """Sends mail; returns its smtps.Report, in which nobody is open.
        account: that of the mail's own section, for envelope and dress.
        following: callable() -> (Mail, Account) that can come next, or None.

        Raises AccountUnavailable: then nobody has got it, nothing is settled
        and nothing is upcoming."""
        self.upcoming = None
        try:
            with body_of(mail) as body:
                if mail.folded:
                    body = smtps.folded(body)
                report = self._send(mail, account, body, following)
        except AccountUnavailable:
            self.close()
            raise
        except smtps.ServiceClosing as error:
            self.close()
            report = smtps.Report(mail.to)
            report.settle_all(421, error.text, error.stage)
        except Exception as error:
            self.close()
            if not isinstance(error, OSError):
                log.exception('%s: an error of ours', mail.id)
            report = smtps.Report(mail.to)
            report.error = error
        if report.error:
            report.give_up(explain(report.error, self.account.server) + (
                ' behind the final dot, without a reply: it may have arrived'
                if report.unanswered else ''))
        return report

    def _send(self, mail, account, body, following):
        """On the connection we have or, if the server has closed that
        meanwhile, on a new one. Raises AccountUnavailable, OSError."""
        envelope, header = envelope_of(mail, account), dress(mail, account)
        while True:
            self.connect()
            self._begins(mail.id)
            is_new, in_packets = (
                not self._delivery.used, self._delivery.pipelining)
            began = time.monotonic()
            try:
                report = self._delivery.send(
                    envelope, header, body, self._ahead(following))
                if smtps.is_silence(report.error) and (
                        self.upcoming or not in_packets):
                    self._note_silence(in_packets)
                return report
            except smtps.ServiceUnavailable as error:
                if is_new:
                    raise self._unavailable('mail', error) from error
            except OSError as error:
                # The server may lose patience a little sooner than we do.
                silent = smtps.is_silence(error) or (
                    time.monotonic() - began > smtps.REPLY_TIME / 2)
                if silent:
                    self._note_silence(in_packets)
                there_is_a_next_try = not self.config.deleteonerror
                if is_new and (there_is_a_next_try or not (
                        silent and in_packets)):
                    raise

    def _note_silence(self, in_packets):
        """For the connections that come, this courier's and others'."""
        self._stepwise = in_packets
        self.sign_in.note_silence(in_packets)

    def _ahead(self, following):
        """following() in the words of smtps. A POP login may have to come
        before the next mail, so then no envelope goes ahead."""
        def next_envelope():
            self.upcoming = following()
            return self.upcoming and envelope_of(*self.upcoming)
        return None if self.account.popbeforesmtp else next_envelope

    def wants_pop_login(self, mail, report):
        """Whether the server may have refused mail only since it does not
        know of the POP login. Then a new login comes before the next mail,
        and that refusal is none for good: report says so."""
        login = self._pop_login
        if login is None:
            return False
        doubtful = [recipient for recipient, reply in report.never.items()
                    if report.stages[recipient] in ('mail', 'rcpt')
                    and may_miss_login(reply, login.proven)]
        if report.sent:
            login.proven = True
        if not doubtful or not self.sign_in.renew_pop(login, mail.id):
            self.sign_in.forget_renewals(mail.id)
            return False
        self.close(politely=True)
        for recipient in doubtful:
            report.later[recipient] = report.never.pop(recipient)
        return True

    # Getting there.

    def connect(self):
        """Gets the connection ready for a mail, if it is not. Raises
        AccountUnavailable."""
        if self.connected and not self.sign_in.pop_is_due():
            return
        self.close()
        try:
            self._get_there()
        except TokenRefused as error:   # it may have ended before its time
            self._watch('refused', error)
            self.close()
            self._get_there(error.token)

    def _get_there(self, refused=None):
        """refused: a token that the server does not take any more. Raises
        AccountUnavailable."""
        for stage, step in (
                ('sign-in', functools.partial(self._get_token, refused)),
                ('connect', self._open), ('hello', self._hello),
                ('tls', self._start_tls), ('login', self._log_in)):
            try:
                step()
            except AccountUnavailable:
                raise
            except Exception as error:
                raise self._unavailable(stage, error) from error
        self._delivery.stepwise = (
            self._stepwise or not self.sign_in.trusts_pipelining())

    def _get_token(self, refused):
        """First of all: no server waits for another one."""
        self._token = self.sign_in.token(refused)
        if self._token is not None:
            self._watch('sign-in', self.sign_in.state())

    def _open(self):
        """With a POP login first, where the account wants that."""
        while True:
            self._pop_login = self.sign_in.by_pop(self.config, self._watch)
            try:
                self._delivery = self._dial()
                return
            except OSError:
                if self._pop_login is None or not self.sign_in.leave_family(
                        self._pop_login):
                    raise

    def _dial(self):
        account = self.account
        return smtps.Delivery(
            account.smtphost, account.smtpport, our_name(account),
            context_of(account) if account.smtpsecurity == 'ssl' else None,
            self.sign_in.redact, self.config.debuglevel, self._watch,
            self._family())

    def _family(self):
        return self._pop_login.family if self._pop_login else FAMILIES[
            self.account.ipversion]

    def _hello(self):
        self._delivery.hello()
        self._watch('EHLO', self._delivery)

    def _start_tls(self):
        """Never plain text where TLS was asked for."""
        if self.account.smtpsecurity != 'tls':
            return
        if self._delivery.offers('starttls') is None:
            raise AccountUnavailable(
                '%s does not offer STARTTLS: not sent in plain text; '
                'smtpsecurity=ssl and port 465, perhaps?'
                % self.account.server)
        self._delivery.start_tls(context_of(self.account))
        self._watch('EHLO', self._delivery)

    def _log_in(self):
        self._watch('login', self.sign_in.by_auth(
            self._delivery, self._token))

    def _unavailable(self, stage, error):
        """An AccountUnavailable that says what happened where."""
        account, what = self.account, explain(error, self.account.server)
        return unavailable(
            stage, error, account.smtphost, account.smtpport,
            hint=family_advice(account, error) + port_advice(account)
            + name_advice(what))

    def close(self, politely=False):
        """Ends the connection; may be called at any time."""
        delivery, self._delivery = self._delivery, None
        if delivery:
            delivery.close(politely)


# --- Alerts: what needs a person reaches one --------------------------------

FOREVER = float('inf')
HOUR = 3600                 # seconds, the least between two alerts
ALERT_LINES = 100           # of one, at most
ALERT_GRACE = 2.0           # seconds of a stop in which the last one may go
ALERT_PATIENCE = 60         # seconds until one that can't be stored is again
MOST_SUBJECTS = 1000        # that were told, and are remembered
ALERT_FIELD = 'X-Smtpproxy-Alert'       # holds what only ours can know
OF_CLIENTS = 'sender ', 'password '     # how those begin that any can cause
NEEDS_PERSON = 'person '    # how those begin that only a person can mend
OF_ONE_MAIL = 'saving ', 'handlers ', 'aside '
TWO_WEEKS = 14 * DAY


def in_one_line(text):
    """text as a line of a mail: RFC 5322 2.1.1 allows 998 bytes. Of more the
    middle goes: at the end stands who is meant, and what to do."""
    line = printable(text).encode('utf-8', 'replace')
    if len(line) > 980:
        line = line[:230] + b' ... ' + line[-740:]
    return line.decode('utf-8', 'ignore')


class Alerts:
    """Mails to the owner about what needs a person: one at once, then at most
    one an hour with all that came together. They go through the spool and the
    account of alertfrom; Mail.is_alert knows them.

    Any thread may tell. The relay's thread makes mails of it, and the one
    that stops it. The lock guards what was collected and _told, what the owner
    knows already. msgs/alerts/ keeps all that over restarts, so that nothing
    begins anew.

    ids: of alerts that may still be in the spool."""

    def __init__(self, spool, settings):
        self.settings, self.wake = settings, lambda: None
        self._spool, self._lock = spool, threading.Lock()
        self._writing = threading.Lock()    # the note: two threads may
        self._recall()
        self._next_look = 0.0       # at the certificate
        self._complaint = ''

    def start(self):
        """The spool's time has begun; it goes on where we have seen it."""
        self._spool.go_on_from(self._seen)
        self._last = min(self._last, self._spool.now())

    def tell(self, line, about=''):
        """line: str, for the owner. about: what it is about, told once until
        works_again() or forget(), and not at all of an account that is known
        to need a person."""
        if not self.settings.config.alert:
            return
        with self._lock:
            if not self._told.keys().isdisjoint([about, NEEDS_PERSON + about]):
                return
            if about and not self._has_room():
                return
            if about:
                self._told[about] = True
            self._collect(line, about)
        if self._is_due():
            self.wake()

    def works_again(self, line, *subjects):
        """line: for the owner, if one of these was told."""
        if not self._told.keys().isdisjoint(subjects):
            for about in subjects:
                self.forget(about)
            self.tell(line)

    def is_one(self, mail):
        """Is a Mail one of these? It may come back to us as a client's mail,
        or within a notice that it could not be delivered."""
        return mail.is_alert or self._mark.encode() in mail.data

    def forget(self, about):
        """It may be told again."""
        with self._lock:
            self._told.pop(about, None)

    def make_round(self, announce):
        """What is due; see post."""
        now = self._spool.now()
        if now >= self._next_look:
            self._next_look = now + DAY
            self._look_at_certificate()
        self.post(announce)
        self._remember()

    def post(self, announce, at_a_stop=False):
        """Makes a mail of what was collected, if it is time. announce:
        callable(id, sender), told of it. Returns its id, or None."""
        if not self.settings.config.alert or not (
                at_a_stop or self._is_due()):
            return None
        with self._lock:
            lines, self._lines = self._lines, []
            left_out, self._left_out = self._left_out, 0
        if not lines:                   # nothing, or the other thread has it
            return None
        try:
            id = self._store(lines, left_out)
        except OSError as error:
            self._take_back(lines, left_out, error)
            self._remember()
            return None
        self._last = self._spool.now()
        self.ids = [one for one in self.ids if os.path.exists(
            self._spool.path(one, 'mail'))] + [id]
        self._remember()
        announce(id, self.settings.config.alertfrom)
        self._spool.drafts.discard(id)
        return id

    # With the lock held.

    def _has_room(self):
        """Whether one subject more can be remembered: what is not would be
        told again and again. The oldest that is about no account gives way.
        """
        if len(self._told) < MOST_SUBJECTS:
            return True
        oldest = next(filter(lambda about: about.startswith(
            OF_CLIENTS + OF_ONE_MAIL), self._told), None)
        return self._told.pop(oldest, False)

    def _collect(self, line, about=''):
        """Clients get half of the lines."""
        share = 2 if about.startswith(OF_CLIENTS) else 1
        if len(self._lines) < (ALERT_LINES - 3) // share:
            self._lines.append(in_one_line(line))
        else:
            self._left_out += 1

    # When.

    def _is_due(self):
        return bool(self._lines) and (
            self._spool.now() - self._last >= HOUR)

    def _take_back(self, lines, left_out, error):
        """They can't be stored: no alert says that, it could not either."""
        if self._complaint != str(error):
            self._complaint = str(error)
            log.error('an alert to %s cannot be stored: %s; tried again',
                      self.settings.config.alert, error)
        self._last = self._spool.now() - HOUR + ALERT_PATIENCE
        with self._lock:
            new, self._lines = self._lines, lines
            self._left_out += left_out
            for line in new:
                self._collect(line)

    def _remember(self):
        """Keeps what is to be known after a restart, if it is news."""
        with self._writing:
            self._write_note()

    def _write_note(self):
        import json
        with self._lock:
            memory = {'last': int(self._last), 'told': list(self._told),
                      'ids': self.ids, 'mark': self._mark,
                      'lines': list(self._lines), 'left_out': self._left_out}
        if memory == self._kept or not self.settings.config.alert:
            return
        try:
            self._spool.keep_note('alerts', json.dumps(
                dict(memory, seen=int(self._spool.now()))))
        except OSError as error:
            log.log(logging.ERROR if self._kept is not None else logging.DEBUG,
                    'what is told to %s cannot be kept: %s; after a restart '
                    'it may be told again, or not at all',
                    self.settings.config.alert, error)
            memory = None               # said already, and tried again
        self._kept = memory

    def _recall(self):
        """What _remember has kept."""
        import json
        self._kept = {}             # as it stands in the note
        try:
            memory = json.loads(self._spool.note('alerts'))
            self._told = dict.fromkeys(map(str, memory['told']), True)
            self._last, self.ids = int(memory['last']), list(memory['ids'])
            self._mark = re.fullmatch('[0-9a-f]{16}', memory['mark'])[0]
            self._lines = [str(line) for line in memory['lines']]
            self._left_out = int(memory['left_out'])
            self._seen, self._kept = int(memory.pop('seen')), memory
        except (OSError, ValueError, KeyError, TypeError):
            # There was none, or it is damaged.
            self._told, self._last, self.ids = {}, -HOUR, []
            self._mark = os.urandom(8).hex()
            self._lines, self._left_out, self._seen = [], 0, 0

    # The mail.

    def _store(self, lines, left_out):
        """Returns its id. Raises OSError."""
        config = self.settings.config
        to = config.alert.split()
        draft = self._spool.draft(config.alertfrom, to, {
            'BODY': '8BITMIME', ALERT: ''})
        try:
            draft.write(smtps.stuffed(self._message(draft.id, lines,
                                                    left_out)))
            draft.seal()
            draft.commit()
        except OSError:
            draft.abort()
            self._spool.drafts.discard(draft.id)
            raise
        log.info('%s: an alert to %s, %d lines: %s', draft.id, listed(to),
                 len(lines) + left_out, lines[0])
        return draft.id

    def _message(self, id, lines, left_out):
        """Bytes."""
        config, count = self.settings.config, len(lines) + left_out
        text = [
            'From: smtpproxy on %s <%s>' % (HOST, config.alertfrom),
            'To: ' + ', '.join(config.alert.split()),
            'Subject: smtpproxy on %s: %d message%s' % (
                HOST, count, 's' * (count > 1)),
            'Date: ' + mail_date(int(time.time())),
            'Message-ID: <%s.%s@%s>' % (id, os.urandom(4).hex(), HOST),
            'Auto-Submitted: auto-generated',
            '%s: %s' % (ALERT_FIELD, self._mark),
            'MIME-Version: 1.0',
            'Content-Type: text/plain; charset=utf-8',
            'Content-Transfer-Encoding: 8bit', '']
        text += ['- ' + line for line in lines]
        if left_out:
            text.append('- and %d more: see --queue and the log' % left_out)
        text += ['', 'More is in the log. There is at most one such mail an '
                 'hour.', '']
        return '\r\n'.join(text).encode()

    def _look_at_certificate(self):
        """Is tlscert about to expire?"""
        path = self.settings.config.tlscert
        if not path or not self.settings.config.alert:
            return
        try:
            end = certificate_end(path)
        except (OSError, ValueError, ImportError) as error:
            log.warning('%s: when it expires cannot be seen: %s', path, error)
            return
        if end - time.time() < TWO_WEEKS:
            day = time.strftime('%Y-%m-%d', time.localtime(end))
            self.tell('tlscert %s expires on %s: devices may refuse it then; '
                      'put a new one there and reload' % (path, day),
                      '%s %s' % (path, day))


def certificate_end(path):
    """When the first certificate of a PEM file expires, in seconds since
    1970. Raises OSError, ValueError, ImportError."""
    import calendar
    import ssl
    with open(path, encoding='latin-1') as file:
        pem = re.search('-----BEGIN CERTIFICATE-----.*?'
                        '-----END CERTIFICATE-----', file.read(), re.DOTALL)
    der = ssl.PEM_cert_to_DER_cert(pem[0]) if pem else b''
    # RFC 5280 4.1.2.5: a sequence of two times, in one of two forms each.
    validity = re.search(rb'0[\x1e\x20\x22](?:\x17\x0d\d{12}Z|\x18\x0f\d{14}Z)'
                         rb'(?:\x17\x0d(\d{12})|\x18\x0f(\d{14}))Z', der)
    if not validity:
        raise ValueError('no certificate in it')
    short, long = validity.groups()
    if short:
        long = (b'19' if short >= b'50' else b'20') + short
    return calendar.timegm(time.strptime(long.decode(), '%Y%m%d%H%M%S'))


# --- Relay: when each mail is tried, and what a failure means ----------------

LINGER = 2.0                # seconds a connection is kept for a next mail
LONGEST_WAIT = 3600         # seconds between two tries
UNANSWERED = 3              # copies at most, where each may have arrived
BACKLOG = 8                 # mails that wait per connection before one more


def reload_request(ini):
    """The request of --add, (id, what): to the service that goes by this very
    file, whatever its path is there. Raises OSError."""
    info = os.stat(ini)
    return 'ini-%d-%d' % (info.st_dev, info.st_ino), 'reload'


class MailQueue:
    """Mails, by their ids, that wait for a thread to take them.

    The invariant of the relay: an id is in one queue's `due`, or in one
    thread's hands, which `in_hand` of that queue tells. Whoever has an id in
    hand gives it back, says that it is done, or hands it over to another
    queue. A mail that is parked, or still being received, is in no queue.

    `changed` guards all of it, and what Destination adds: nobody writes any of
    it without. It is notified when a thread may have something to do.
    """

    def __init__(self, clock):
        self.clock = clock
        self.changed = threading.Condition()
        self.due = {}               # {id: when it may be taken, 0: at once}
        self.in_hand = {}           # {id: the thread that has it}
        self.closed = False
        self._urgent = set()        # ids that go before others
        # Only an index: an id that due does not hold, or holds with a later
        # time, is passed over.
        self._ready = collections.deque()       # ids whose time has come
        self._later = []                        # heap of (when, id)

    def add(self, id, when=0.0, urgent=False):
        """A mail waits here from now on; when: seconds of clock; urgent: it
        goes before others. Returns False if the queue is closed: then it has
        to wait elsewhere."""
        with self.changed:
            if self.closed:
                return False
            if urgent:
                self._urgent.add(id)
            self._schedule(id, when)
            return True

    def take(self, patience=0.0):
        """The next id whose time has come, in the hands of this thread. None
        if there is none; that takes patience seconds at most, or less: when
        the queue has changed."""
        with self.changed:
            if patience > 0 and not self.closed and not self._is_ready():
                self.changed.wait(min(patience, self._until_next()))
            if self.closed or not self._is_ready():
                return None
            return self._hand_out(self._ready.popleft())

    def claim(self, id):
        """Takes one id out of the turn, into the hands of this thread; False
        if it does not wait here."""
        with self.changed:
            return id in self.due and bool(self._hand_out(id))

    def withdraw(self, chosen=lambda id: True):
        """Takes all that wait here and are chosen (callable(id) -> bool);
        returns their ids."""
        with self.changed:
            return [self._hand_out(id) for id in list(self.due) if chosen(id)]

    def give_back(self, id, when=0.0):
        """What this thread has in hand waits here again, at the head if it
        may be taken at once. Returns False if the queue is closed: then it
        has to wait elsewhere."""
        with self.changed:
            if self.closed:
                self.done(id)
                return False
            self._put_down(id)
            self._schedule(id, when, first=True)
            return True

    def mine(self):
        """The ids that this thread has in hand."""
        with self.changed:
            me = threading.get_ident()
            return [id for id, thread in self.in_hand.items() if thread == me]

    def done(self, id):
        """An id leaves this queue: delivered, parked, deleted, handed over."""
        with self.changed:
            self._put_down(id)
            self._urgent.discard(id)
            if self.closed:
                self.changed.notify_all()       # for join()

    def close(self):
        """Nobody takes anything from here any more."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def join(self, seconds):
        """Waits until no thread has anything in hand; returns the ids that
        are in hand all the same."""
        with self.changed:
            self.changed.wait_for(lambda: not self.in_hand, max(0.0, seconds))
            return sorted(self.in_hand)

    def __contains__(self, id):
        with self.changed:
            return id in self.due or id in self.in_hand

    # With the lock held.

    def _schedule(self, id, when, first=False):
        self.due[id] = when
        if when:
            heapq.heappush(self._later, (when, id))
        else:
            self._make_ready(id, first)
        self.changed.notify()

    def _make_ready(self, id, first=False):
        if first or id in self._urgent:
            self._ready.appendleft(id)
        else:
            self._ready.append(id)

    def _hand_out(self, id):
        del self.due[id]
        self.in_hand[id] = threading.get_ident()
        return id

    def _put_down(self, id):
        self.in_hand.pop(id, None)

    def _is_ready(self):
        """Whether the first of _ready may be taken."""
        if self._later:
            self._bring_forward()
        while self._ready and self.due.get(self._ready[0], 1.0):
            self._ready.popleft()
        return bool(self._ready)

    def _bring_forward(self):
        """From _later to _ready, as time goes by."""
        now = self.clock()
        while self._later and self._later[0][0] <= now:
            when, id = heapq.heappop(self._later)
            if self.due.get(id) == when:
                self.due[id] = 0.0
                self._make_ready(id)

    def _until_next(self):
        """Seconds until the next id's time has come."""
        if self._later:
            return max(0.0, self._later[0][0] - self.clock())
        return threading.TIMEOUT_MAX


class Destination(MailQueue):
    """One account's way out: its mails and its delivery threads.

    A destination is what a connection needs, not a section of the ini:
    sections that differ only in how a mail is dressed share one, with its
    connections, its POP login and its pace.

    Its threads deliver while there is something to deliver. Then the last one
    sleeps until the next mail's time comes, and ends when there is none. More
    than one connection is made only while a backlog lasts, and only after the
    first one has got through. When the account can't be used (`why` says it)
    nothing is tried before `not_before`; that is FOREVER if a person has to
    sign in first.

    With smtprate the mails leave evenly: none is taken before `_next_slot`,
    nor while another has its turn (`_turn`), from when it is taken until its
    envelope goes out. What waits for that waits in `due`, and the connection
    is kept for it.
    """

    def __init__(self, account, clock, deliver, grants, began=0.0):
        """account: Account.connection; deliver: callable(Destination), the
        life of a delivery thread; grants: the Grants, for its SignIn; began:
        when the relay was started, which may have sent one just before."""
        super().__init__(clock)
        self._pace = 60 / account.smtprate if account.smtprate else 0.0
        self._next_slot = began + self._pace
        self._turn = None           # with smtprate: an id in hand
        self.account, self._deliver = account, deliver
        self.sign_in = SignIn(account, clock, grants=grants)
        self.not_before, self.why = 0.0, ''
        self.absent = ''            # nobody was there: see AccountUnavailable
        self._advice = NO_ADVICE    # of what it is deferred for
        self.since = 0.0            # when that began, in the spool's time
        self.failures = 0           # of the account, one after the other
        self._threads = 0
        self._most_threads = account.smtpconnections
        self._gets_through = False  # more connections are worth a try

    # For who has mail for it.

    def retry(self, id=None):
        """A mail, or all that wait here, may be tried now, and the account
        too, whatever it was deferred for. Returns whether the mail waits
        here."""
        with self.changed:
            waits = not id or id in self.due
            for one in [id] if id else [
                    one for one, when in self.due.items() if when]:
                if one in self.due:
                    self._schedule(one, 0.0, first=bool(id))
            self.not_before, self.absent = 0.0, ''
            self.sign_in.retry()
            self.start_threads()
            self.changed.notify_all()
            return waits

    def start_threads(self):
        """As many delivery threads as what waits here is worth."""
        with self.changed:
            while self._wants_thread():
                thread = threading.Thread(
                    target=self._deliver, args=(self,), daemon=True,
                    name='relay-' + self.account.server)
                try:
                    thread.start()
                except RuntimeError as error:   # the next round tries again
                    log.error('no thread for %s: %s; tried again later',
                              self.account.server, error)
                    return
                self._threads += 1

    # For its threads.

    def take(self, patience=0.0):
        """As MailQueue.take, in the pace of the account: while mail waits for
        its turn the thread waits longer, so that it keeps its connection."""
        with self.changed:
            if patience:
                patience += self._pace
            id = super().take(patience)
            while id is None and patience and self._has_next():
                id = super().take(patience)
            if id and self._pace:
                self._turn = id
            return id

    def spend_turn(self, id):
        """The envelope of a mail goes out now."""
        if self._pace:
            with self.changed:
                self._next_slot = self.clock() + self._pace
                self._end_turn(id)

    def wait(self):
        """Sleeps until a mail may be tried. False: there is nothing more to
        do for this thread, which is not counted any more."""
        with self.changed:
            while self.closed or not self._is_ready():
                if self.closed or not self.due or self._threads > 1:
                    self._leave()
                    return False
                self.changed.wait(self._until_next())
            return True

    def succeed(self):
        """The account's server was there and took our login."""
        if self._gets_through and not self.failures and not self.why:
            return                      # the usual case needs no lock
        with self.changed:
            if self.not_before:
                return                  # it was under way when that began
            self.failures, self.why, self.absent = 0, '', ''
            self._advice, self.since = NO_ADVICE, 0.0
            self._gets_through = True
            self.start_threads()

    def retire(self, id):
        """A connection was refused. If others are at work it was one too
        many: the mail in hand waits for them, this thread is not counted any
        more. Returns how many others there are."""
        with self.changed:
            others = self._threads - 1
            self._gets_through = bool(others)
            if not others or self.closed:
                return 0
            self._threads = self._most_threads = others     # first: what is
            self.give_back(id)              # given back may start others
            return others

    def defer(self, seconds, error, failures, since):
        """The account can't be used: nothing is tried for so long. error: an
        AccountUnavailable; since: when the mail that was tried met its first
        trouble. Returns the level of the log line about it."""
        with self.changed:
            level = error.log_level(self._advice)
            self.not_before = self.clock() + seconds
            self.why, self.absent = str(error), error.absent
            self._advice, self.failures = error.advice, failures
            self.since = self.since or since
            return level

    # With the lock held.

    def _schedule(self, id, when, first=False):
        super()._schedule(id, when, first)
        if self._threads < self._most_threads:
            self.start_threads()

    def _is_ready(self):
        if self.not_before:
            if self.not_before > self.clock():
                return False
            self.not_before = 0.0
        return (self._turn is None and self._next_slot <= self.clock()
                and super()._is_ready())

    def _put_down(self, id):
        super()._put_down(id)
        self._end_turn(id)              # a turn that was not spent

    def _end_turn(self, id):
        if id == self._turn:
            self._turn = None
            self.changed.notify_all()

    def _has_next(self):
        """Whether mail could go now, or as soon as its turn comes."""
        return (not self.closed and not self.not_before
                and super()._is_ready())

    def _until_next(self):
        if self._turn is not None:
            return threading.TIMEOUT_MAX        # its end is notified
        blocked = max(self.not_before, self._next_slot) - self.clock()
        return min(blocked, threading.TIMEOUT_MAX) if blocked > 0 else (
            super()._until_next())

    def _wants_thread(self):
        if not self._threads:
            return bool(self.due) and not self.closed
        missed_turn = self._turn is None and (
            self._next_slot + self._pace <= self.clock())
        return (self._gets_through and not self.not_before and missed_turn
                and not self.closed and self._threads < self._most_threads
                and len(self._ready) > self._threads * BACKLOG)

    def _leave(self):
        self._threads -= 1
        if not self._threads:
            self._most_threads = self.account.smtpconnections
            self._gets_through = False
            self.since = 0.0            # nothing waits for that any more


def outlook(destination):
    """Why a mail that comes now has to wait, for its log line, or ''."""
    account, waiting = destination.account, len(destination.due)
    if destination.not_before:
        return '; it waits with %d more for %s: %s' % (
            waiting, account.server, destination.why or SINKS_IN)
    if account.smtprate and waiting:
        return '; with smtprate=%d its turn comes in about %d seconds' % (
            account.smtprate, waiting * 60 / account.smtprate)
    return ''


def back_off(tries, config):
    """Seconds until the next try: sleeptime, doubled up to an hour, and a
    little more, so that not all come back at the same moment."""
    first = max(1, config.sleeptime)
    return min(first * 2 ** min(tries - 1, 20) * (
        1 + os.urandom(1)[0] / 2560), longest_wait(config))


def longest_wait(config):
    """Seconds: an hour, or a sleeptime that is longer."""
    return max(config.sleeptime, LONGEST_WAIT)


def why_not(mail, report, server):
    """What was said to those who have not got it, and what to do."""
    why = problems(dict(mail.refused, **report.later))
    why = why if server in why else '%s said %s' % (server, why)
    return why if BEHIND in why else why + name_advice(why)


def describe(mail, recipients):
    """A mail in trouble, for its log line."""
    return 'from <%s> to %s, subject %s' % (
        mail.frm, listed(list(recipients)), mail.field('subject') or '-')


class Queues:
    """Where each mail is, and every move from one place to another.

    unrouted: the MailQueue of mails whose destination is not known yet, or
    not any more; only the relay's thread takes from it. destinations:
    {Account.connection: Destination}. A mail that is parked is in none of
    them. Who needs the locks of two queues takes that of unrouted first."""

    def __init__(self, clock, grants, deliver):
        """grants: Grants, for who signs in by OAuth2; deliver:
        callable(Destination), the life of a delivery thread."""
        self._clock, self._grants, self._deliver = clock, grants, deliver
        self._began = clock()
        self.unrouted = MailQueue(clock)
        self.destinations = {}
        self._dissolved = []    # Destinations that are not in the ini any
                                # more, while a thread has a mail in hand

    def __iter__(self):
        """All of them, unrouted first."""
        return iter([self.unrouted, *self.destinations.values(),
                     *self._dissolved])

    def holder(self, id):
        """The MailQueue that has this mail, None if it is parked, gone, or
        being received."""
        for queue_ in self:
            if id in queue_:
                return queue_
        return None

    def destination(self, account):
        """The Destination of an Account; it is made if there is none."""
        found = self.destinations.get(account.connection)
        if found is None:
            found = self.destinations.setdefault(
                account.connection, Destination(
                    account.connection, self._clock, self._deliver,
                    self._grants, self._began))
            if self.unrouted.closed:        # a stop has begun
                found.close()
        return found

    # Moves of what this thread has in hand.

    def hand_over(self, id, destination, urgent=False):
        """The way of an unrouted mail is known."""
        with self.unrouted.changed:
            self.unrouted.done(id)
            if not destination.add(id, urgent=urgent):  # closed just now
                self.unrouted.add(id)

    def let_go(self, id, queue_, when=0.0):
        """when: it may be tried again; None: it is done with. If that queue
        was closed meanwhile, the ini has another way for the mail now."""
        if when is None:
            queue_.done(id)
            return
        with self.unrouted.changed:
            if not queue_.give_back(id, when):
                self.unrouted.add(id, when)

    def let_all_go(self, queue_, when):
        """After an error: all that this thread has in hand, for later."""
        for id in queue_.mine():
            self.let_go(id, queue_, when)

    def reroute(self, id, destination):
        """The ini has another way for it."""
        with self.unrouted.changed:
            destination.done(id)
            self.unrouted.add(id)

    # All at once.

    def recall(self, known):
        """All that waits has to find its way anew; known: the connections
        that the ini still has. Returns the ids, and those that a thread has
        in hand: they can't be recalled."""
        for key in [key for key in self.destinations if key not in known]:
            self._dissolved.append(self.destinations[key])
            self.destinations.pop(key).close()
        recalled, in_hand = set(), set()
        for destination in list(self)[1:]:
            with self.unrouted.changed, destination.changed:
                in_hand.update(destination.in_hand)
                for id in destination.withdraw():
                    destination.done(id)
                    self.unrouted.add(id)
                    recalled.add(id)
        return recalled, in_hand

    def retry_all(self):
        """All that waits may be tried now."""
        for destination in list(self.destinations.values()):
            destination.retry()

    def tidy(self):
        """What went wrong earlier: a thread that could not be had."""
        for destination in list(self.destinations.values()):
            destination.start_threads()
        self._dissolved = [one for one in self._dissolved if one.in_hand]

    def close(self):
        """Nobody takes anything any more."""
        for queue_ in self:
            queue_.close()

    def join(self, seconds):
        """Waits for what threads have in hand; returns what is left."""
        end = time.monotonic() + seconds
        return [id for queue_ in self
                for id in queue_.join(end - time.monotonic())]


class FailurePolicy:
    """What a failure means for a mail: the only place that knows.

    Any thread that has the mail in hand may ask, with the settings that it
    has begun the mail with: what this touches in the spool is this mail's, or
    has a lock of its own."""

    def __init__(self, spool, clock, alerts):
        """alerts: the Alerts."""
        self._spool, self._clock, self._alerts = spool, clock, alerts
        self._taken = {}    # {Account.connection: when it last took a mail}

    def settle(self, mail, report, server, settings, wait=0,
               level=logging.WARNING):
        """Acts on the verdict of one attempt. Returns when the mail may be
        tried again, None if it is delivered, deleted or parked. wait: least
        seconds until then; level: of the log line that says so."""
        self._note_verdicts(mail, report, server)
        if self._gets_further(mail, report, server):
            self._spool.save(mail)
            return 0.0
        if mail.to or mail.refused:
            return self._settle_failure(mail, report, server, settings, wait,
                                        level)
        self._spool.remove(mail)
        return None

    def settle_until_login(self, mail, report, server):
        """The same if a new POP login comes first: deleteonerror does not
        count yet."""
        self._note_verdicts(mail, report, server)
        mail.unanswered += report.unanswered
        mail.problem, mail.handled = why_not(mail, report, server), True
        self._spool.save(mail)
        log.warning('%s: not delivered: %s; does the server not know of our '
                    'POP login? a new one and another try come first',
                    mail.id, mail.problem)

    @staticmethod
    def _note_verdicts(mail, report, server):
        """In the log who has got it, in the mail who has not."""
        for reply, recipients in grouped(report.sent):
            log.info('%s: sent to %s by %s: %s', mail.id, listed(recipients),
                     server, reply)
        mail.to = [Address(a) for a in report.later]
        mail.refused.update(report.never)

    @staticmethod
    def _gets_further(mail, report, server):
        """Whether another attempt, at once, may cure a refusal."""
        if report.crowded and report.sent:
            log.info('%s: %s takes no more recipients at a time; the next %d '
                     'follow', mail.id, server, len(mail.to))
            return True
        too_long = [recipient for recipient, reply in report.never.items()
                    if LINE_TOO_LONG.search(reply)]
        try:
            if not too_long or not may_be_folded(mail):
                return False
        except OSError:
            return False
        log.info('%s: %s takes no lines of more than %d bytes (%s): sent '
                 'again with such lines folded', mail.id, server,
                 smtps.TEXT_LINE, report.never[too_long[0]])
        mail.folded = True
        for recipient in too_long:
            del mail.refused[recipient]
            mail.to.append(Address(recipient))
        return True

    def _settle_failure(self, mail, report, server, settings, wait, level):
        why = why_not(mail, report, server)
        self._forgive_turn(mail, settings)
        mail.tries += 1
        mail.unanswered += report.unanswered
        mail.problem, mail.handled, mail.parked = why, True, False
        self.note_trouble(mail)
        mail.holds = bool(wait)
        if settings.config.deleteonerror and not mail.is_alert:
            self._tell_owner(mail, (
                '%s: deleted (deleteonerror=true), not delivered: %s; %s' % (
                    mail.id, why, describe(
                        mail, [*mail.refused, *mail.to]))))
            self._spool.remove(mail)
            return None
        if not mail.to or mail.unanswered == UNANSWERED or (
                self._is_expired(mail, settings)):
            self.park(mail, why, settings)
            return None
        wait = max(wait, back_off(mail.tries, settings.config))
        mail.due = time.time() + wait
        self._spool.save(mail)
        log.log(level, '%s: not delivered: %s; try %d, the next one in %d '
                'seconds', mail.id, why, mail.tries, wait)
        return self._clock() + wait

    def is_expired(self, id, settings, since=0.0):
        """Has it waited for retrydays? since: of an account with smtprate,
        when its trouble began: before, a mail may have waited for its turn."""
        age = min(self._spool.age(id), self._spool.now() - since)
        return age >= settings.config.retrydays * DAY

    def in_a_while(self, settings):
        """When something that went wrong by itself may be tried again."""
        return self._clock() + back_off(1, settings.config)

    def waited_too_long(self, id, destination, settings):
        """The same for one that waits for its account."""
        return self.is_expired(
            id, settings,
            destination.since if destination.account.smtprate else 0.0)

    def _is_expired(self, mail, settings):
        account = settings.account_for(mail.frm)
        return self.is_expired(mail.id, settings, mail.since if account
                               and account.smtprate else 0.0)

    def _forgive_turn(self, mail, settings):
        """With smtprate a mail that failed before was due again, and then
        waited for its turn: that was no trouble."""
        account = settings.account_for(mail.frm)
        if mail.seen and not mail.holds and account and account.smtprate:
            due = mail.seen + back_off(mail.tries, settings.config)
            mail.since += max(0.0, self._spool.now() - due)

    def note_taken(self, account):
        """Its server has taken a mail."""
        self._taken[account] = self._spool.now()

    def passing(self, mail, account):
        """Kinds of KNOWN_REPLIES that say nothing of the account when a
        recipient is refused, since it takes other mail: a server that relays
        for some only tells the others what it tells strangers. It has taken
        one since this one was first refused, or, if no limit is meant, within
        the hour."""
        taken = self._taken.get(account, -FOREVER)
        if 0 < mail.since <= taken:
            return ABOUT_ACCOUNT
        return ('person',) if self._spool.now() - taken < HOUR else ()

    def note_trouble(self, mail):
        """Keeps when the trouble of a mail began; returns when that of its
        account did, if it is that. In the spool's time."""
        now = self._spool.now()
        mail.since = min(mail.since or now, now)
        return mail.since if mail.holds else now

    def note_deferral(self, mail, destination, wait, level):
        """Why its account waits, in the mail that was tried and in the log.
        Where nobody was there, or a person is needed, no time is kept."""
        mail.problem, mail.handled, mail.due = destination.why, True, 0.0
        mail.holds = wait != FOREVER        # else --queue has its own line
        others = '%d more mails wait for it' % len(destination.due)
        if wait == FOREVER:
            self._spool.save(mail)
            log.warning('%s: not delivered: %s; it waits for that, %s',
                        mail.id, mail.problem, others)
            return
        mail.tries = destination.failures or mail.tries + 1
        if not destination.absent:
            mail.due = time.time() + wait
        self._spool.save(mail)
        log.log(level, '%s: not delivered: %s; try %d, the next one %s %d '
                'seconds, %s', mail.id, mail.problem, mail.tries,
                'each' if destination.absent else 'in', wait, others)

    def park(self, mail, why, settings):
        """Keeps a mail until the owner asks for another try."""
        what = 'refused for good' if not mail.to else (
            'not delivered in %d days' % settings.config.retrydays)
        if mail.unanswered == UNANSWERED:
            what = 'it may have arrived, %d times' % mail.unanswered
        mail.unanswered = 0
        mail.to += [Address(a) for a in mail.refused]
        mail.refused, mail.parked, mail.due = {}, True, 0.0
        mail.problem, mail.handled = why, True
        self._spool.save(mail)
        self._tell_owner(mail, (
            '%s: %s, kept in msgs/ but not tried again by itself: %s; %s; '
            '--retry %s sends it again, --delete %s removes it' % (
                mail.id, what, mail.problem, describe(mail, mail.to),
                mail.id, mail.id)))

    def _tell_owner(self, mail, line):
        """That a mail needs a person: in the log and, but for trouble with an
        alert, by mail."""
        log.error('%s', line)
        if not self._alerts.is_one(mail):
            self._alerts.tell(line)

    def park_flawed(self, mail, settings):
        """No server is told such an envelope. Not even deleteonerror deletes
        it: it was promised by a version that took more."""
        if not mail.parked:
            mail.refused, mail.to = dict.fromkeys(mail.to, mail.flaw), []
            self.park(mail, mail.flaw, settings)

    def settle_homeless(self, mail, settings):
        """No account: permanent."""
        report = smtps.Report(mail.to)
        report.settle_all(550, 'no account for sender <%s>, add a section '
                          'for it or [default]' % mail.frm)
        self.settle(mail, report, 'the ini', settings)


def title(section, account):
    """An Account for its owner. Its section is what stays the same whatever
    is mended there, and no two accounts share it."""
    return '[%s] %s' % (section, account.way)


class DeliveryAgent:
    """Delivers one destination's mail, in a thread of its own: the relay's
    hands. Whatever comes of a mail, it gives the id back, says that it is
    done with it, or has it rerouted."""

    def __init__(self, relay, destination):
        self._relay, self._destination = relay, destination
        self._server = destination.account.server
        self._section = ''          # what the owner knows it by

    def run(self):
        """The life of the thread."""
        goes_on = True
        while goes_on and self._destination.wait():
            self._section = self._relay.settings.section_of(
                self._destination.account)
            try:
                courier = Courier(self._destination.account,
                                  self._destination.sign_in,
                                  self._relay.settings.config,
                                  begins=self._destination.spend_turn)
                with contextlib.closing(courier):
                    goes_on = self._deliver_ready(courier)
                    courier.close(politely=True)
            except Exception:
                log.exception('%s: an error in a delivery; the mail is tried '
                              'again later', self._server)
                self._relay.queues.let_all_go(
                    self._destination, self._relay.policy.in_a_while(
                        self._relay.settings))

    def _deliver_ready(self, courier):
        """Delivers over one connection what may be tried now, until nothing
        has come for LINGER seconds or the connection can't be used. False if
        this thread is one too many."""
        at_hand = self._next_mail()
        while at_hand:
            mail, account = at_hand
            settings = self._relay.settings
            try:
                report = self._deliver(courier, mail, account)
            except PopPending as error:
                return self._settle_pending(mail, error)
            except AccountUnavailable as error:
                return self._settle_unavailable(mail, error, settings)
            goes_on = self._settle_report(courier, mail, report, settings)
            if report.sent:             # later than the trouble of others
                self._relay.policy.note_taken(self._destination.account)
            if not goes_on:
                return True
            at_hand = courier.upcoming or self._next_mail(LINGER)
        return True

    def _deliver(self, courier, mail, account):
        """Raises AccountUnavailable."""
        destination = self._destination
        if destination.absent == 'connect' and (
                destination.account.popbeforesmtp):
            courier.look()              # it costs no POP login
        return courier.deliver(mail, account, self._next_mail)

    def _next_mail(self, patience=0.0):
        """(Mail, its Account) in the hands of this thread, or None."""
        while True:
            id = self._destination.take(patience)
            if id is None:
                return None
            mail = self._relay.load(id, self._destination)
            if mail is None:
                continue
            account = self._relay.settings.account_for(mail.frm)
            if account and account.connection == self._destination.account:
                return mail, account
            self._relay.queues.reroute(id, self._destination)

    def _note_success(self, report):
        """The account's server took our login. That it works again is told
        when it has taken a mail, too, and not that of a connection which was
        at work before another one's refusal."""
        if self._destination.absent:
            log.info('%s is there again: %d mails are tried now',
                     self._server, len(self._destination.due))
        if report.sent and not self._destination.not_before:
            self._relay.alerts.works_again('%s works again' % title(
                self._section, self._destination.account), self._section,
                NEEDS_PERSON + self._section)
        self._destination.succeed()

    def _tell(self, mail, what):
        """That the account needs a person. Trouble that an alert meets makes
        no other."""
        if not self._relay.alerts.is_one(mail):
            self._relay.alerts.tell('%s: %s' % (
                title(self._section, self._destination.account), what),
                NEEDS_PERSON + self._section)

    def _settle_report(self, courier, mail, report, settings):
        """Whether the connection may be used for a next mail."""
        policy = self._relay.policy
        if courier.wants_pop_login(mail, report) and (
                mail.unanswered + report.unanswered < UNANSWERED):
            self._note_success(report)
            policy.settle_until_login(mail, report, self._server)
            self._relay.queues.let_go(mail.id, self._destination)
            return True
        trouble = weigh(report, self._destination.account.smtphost,
                        policy.passing(mail, self._destination.account))
        if trouble and not settings.config.deleteonerror and (
                not mail.is_alert):     # it goes first: others would not
            courier.close()         # the next envelope may be under way
            self._settle_limit(mail, report, trouble, settings)
            return False
        self._note_success(report)
        self._settle(mail, report, settings)
        return True

    def _settle(self, mail, report, settings, wait=0, level=logging.WARNING):
        when = self._relay.policy.settle(mail, report, self._server, settings,
                                         wait, level)
        self._relay.queues.let_go(mail.id, self._destination, when)

    def _settle_pending(self, mail, error):
        """No mail of the account goes before the POP login has sunk in. That
        is no failure: what is known of one stays. Returns True: this thread
        goes on."""
        destination = self._destination
        with destination.changed:       # it may be deferred for longer
            destination.not_before = max(destination.not_before, error.until)
        self._relay.queues.let_go(mail.id, destination)
        return True

    def _settle_unavailable(self, mail, error, settings):
        """The account can't be used, or takes no more connections. Returns
        whether this thread goes on."""
        others = self._destination.retire(mail.id)
        if others:
            log.info('%s: %d connections to %s are all it takes now: %s',
                     mail.id, others, self._server, error)
            return False
        if self._destination.closed and not self._relay.queues.unrouted.closed:
            self._relay.queues.reroute(mail.id, self._destination)
        elif isinstance(error, SignInNeeded):
            self._await_sign_in(mail, error, settings)
        elif settings.config.deleteonerror and not isinstance(
                error, TokenServerAway):
            report = smtps.Report(mail.to)
            report.give_up(str(error))
            self._settle(mail, report, settings)
        else:
            self._defer_account(mail, error, settings)
        return True

    def _settle_limit(self, mail, report, error, settings):
        """A reply was about the account, not about this mail, which may have
        gone to some of its recipients. The envelope of another one may be
        under way: that one waits, too."""
        destination, wait = self._destination, longest_wait(settings.config)
        level = self._hold(mail, error, wait, destination.failures + 1)
        self._settle(mail, report, settings, wait, level)
        self._relay.queues.let_all_go(destination, 0.0)
        self._relay.park_expired(destination, settings)

    def _defer_account(self, mail, error, settings):
        """No mail of the account can go: one of them is tried now and then,
        all others wait for that without a try of their own. Where nobody was
        there at all this is said once, and tried each sleeptime."""
        destination = self._destination
        why, wait = str(error), float(settings.config.sleeptime)
        is_news = why != destination.why or not error.absent
        failures = destination.failures
        if not error.absent:
            failures = max(failures, mail.tries) + 1
            wait = back_off(failures, settings.config)
        wait = max(wait, error.wait)
        if error.takes_long:
            wait = max(wait, longest_wait(settings.config))
        level = self._hold(mail, error, wait, failures)
        self._wait_with_account(mail, settings, level,
                                wait if is_news else None)

    def _await_sign_in(self, mail, error, settings):
        """No try before the sign-in changes or the owner asks for one, and
        not even deleteonerror deletes what waits for that."""
        level = self._hold(mail, error, FOREVER, 0)
        self._wait_with_account(mail, settings, level, FOREVER)
        self._relay.wake()              # its round tells the owner

    def _wait_with_account(self, mail, settings, level, news):
        """The mail that was tried waits for its account with all others.
        level: of the log line; news: seconds until the next try, None if that
        was said already."""
        destination, policy = self._destination, self._relay.policy
        self._relay.park_expired(destination, settings)
        when = 0.0
        if policy.waited_too_long(mail.id, destination, settings):
            policy.park(mail, destination.why, settings)
            when = None
        elif news is not None:
            policy.note_deferral(mail, destination, news, level)
        self._relay.queues.let_go(mail.id, destination, when)

    def _hold(self, mail, error, wait, failures):
        """Nothing of the account is tried for so long. Returns the level of
        the log line about it."""
        destination = self._destination
        if error.advice.kind == 'person':
            self._tell(mail, 'no mail passes before you act, %d wait: %s' % (
                len(destination.due) + 1, error))
        since = self._relay.policy.note_trouble(mail)
        if wait == FOREVER:             # a restart is no new beginning
            since = mail.since
        return destination.defer(wait, error, failures, since)


class Requests:
    """What the owner asks for with the commands, and with a reload. A request
    is a file in asked/; it goes when it has been done, so a crash forgets
    none. The relay's thread serves them."""

    def __init__(self, relay, spool, reload_ini):
        """reload_ini: callable(id), what SIGHUP does, if our ini is meant; ''
        if it was good, else REFUSED or FOREIGN."""
        self._relay, self._queues = relay, relay.queues
        self._spool, self._reload_ini = spool, reload_ini

    def serve_all(self):
        for path, id, what in self._spool.asked():
            self._serve_one(path, id, what)

    def ask_again(self, id):
        """Leaves the owner's wish for a new try for later."""
        try:
            self._spool.ask(id, 'retry')
        except OSError as error:
            log.error('%s: the new try that was asked for cannot be noted: '
                      '%s; ask again with --retry %s', id, error, id)

    def _serve_one(self, path, id, what):
        done, answer = True, ''
        if id == 'all' and what == 'retry':
            done = self._retry_all()
        elif what == 'reload':
            answer = self._reload_ini(id)
        elif Spool.ID.fullmatch(id):
            done = self._serve(id, what)
        if not done:
            return                          # the next time we look
        try:
            if answer:              # whoever waits for it sees that, once
                os.rename(path, path + answer)
            else:
                os.unlink(path)
        except OSError as error:
            log.error('%s cannot be removed: %s', path, error)

    def _retry_all(self):
        """Whether it could be done."""
        found = self._relay.scan()
        if found is None:
            return False
        self._queues.retry_all()
        for id in found:
            queue_ = self._queues.holder(id)
            if queue_ in (None, self._queues.unrouted):
                if not self._relay.revive(id):
                    self.ask_again(id)
            elif id in queue_.in_hand:
                self.ask_again(id)
        return True

    def _serve(self, id, what):
        """Whether it could be done: a mail that a thread has in hand, that
        is still being received, or that can't be read has to wait."""
        if id in self._spool.drafts:        # first: once it is announced
            return False                    # it is somewhere
        queue_ = self._queues.holder(id) or self._queues.unrouted
        if id in queue_.in_hand:
            return False
        if what == 'delete':
            return self._discard(id, queue_)
        if what == 'retry' and queue_ is self._queues.unrouted:
            if not self._relay.revive(id):
                return False
            if self._queues.unrouted.claim(id):
                self._relay.route(id)
            queue_ = self._queues.holder(id)
        if what == 'retry' and isinstance(queue_, Destination):
            return queue_.retry(id)         # a thread may have just taken it
        return True

    def _discard(self, id, queue_):
        if queue_ is self._queues.unrouted:
            queue_.add(id)
        if not queue_.claim(id):
            return False                    # a thread has just taken it
        mail = self._relay.load(id, queue_)
        if mail:
            log.info('%s: deleted as asked for; %s', id,
                     describe(mail, mail.to))
            self._spool.remove(mail)
            queue_.done(id)
        return id not in queue_             # it may be unreadable for now


class Watch:
    """Tells the owner what no mail has said: sign-ins that have ended, and
    accounts whose mail waits for too long. The relay's thread looks."""

    def __init__(self, spool, alerts):
        self._spool, self._alerts = spool, alerts

    def look_round(self, settings, grants, destinations):
        for grant in grants:
            self._look_at_sign_in(grant)
        for destination in destinations:
            section = settings.section_of(destination.account)
            if section:                 # else it will be recalled
                self._look_for_trouble(destination, section)
                self._look_for_backlog(destination, section)

    def _look_at_sign_in(self, grant):
        """Before mail waits for it, too: that may be urgent when it comes."""
        about = NEEDS_PERSON + 'sign-in of ' + grant.section
        why = grant.person_needed()
        if why:
            self._alerts.tell('[%s]: its mail waits for a sign-in: %s; to '
                              'sign in: %s' % (grant.section, why,
                                               grant.command), about)
        elif grant.state().name == 'signed in':     # that is known
            self._alerts.works_again('[%s] is signed in again' % grant.section,
                                     about)

    def _look_for_trouble(self, destination, section):
        waiting = len(destination.due) + len(destination.in_hand)
        has_trouble = destination.since and waiting and (
            destination.not_before != FOREVER)      # a sign-in, see above
        if has_trouble and self._spool.now() - destination.since >= HOUR:
            self._alerts.tell(
                '%s could not be used for an hour, %d mails wait: %s' % (
                    title(section, destination.account), waiting,
                    destination.why), section)

    def _look_for_backlog(self, destination, section):
        about, account = 'backlog of ' + section, destination.account
        waiting = len(destination.due) + len(destination.in_hand)
        if account.smtprate and waiting > 60 * account.smtprate:
            self._alerts.tell(
                '%s: %d mails wait for their turn, with smtprate=%d for more '
                'than an hour' % (title(section, account), waiting,
                                  account.smtprate), about)
        elif not waiting:
            self._alerts.forget(about)


class Relay:
    """Decides for every mail what happens next.

    Its own thread does what needs one thread: it looks at the mails found at
    start, lets handlers look at new ones, finds each one's destination and
    serves the owner's requests. A mail that no handler wants to see goes
    straight to its destination, from the thread that has stored it. The
    destinations' threads deliver and settle. settings and handlers are
    replaced as a whole by a reload; a thread that begins with a mail takes
    the settings of that moment and keeps to them.

    Where is a mail? queues.holder(id) tells.
    """

    def __init__(self, spool, settings, handlers, clock=time.monotonic,
                 reload_ini=None, alerts=None):
        self._spool, self._clock = spool, clock
        self.settings, self._handlers = settings, handlers
        self.alerts = alerts or Alerts(spool, settings)
        self.alerts.wake = self.wake
        self.grants = Grants(settings, clock)
        self.policy = FailurePolicy(spool, clock, self.alerts)
        self.queues = Queues(clock, self.grants, self._deliver)
        self._requests = Requests(self, spool, reload_ini)
        self._watch = Watch(spool, self.alerts)
        self._last_round = -FOREVER     # what was asked for comes first
        self._reloaded = False          # the relay thread has to rescan
        self._last_errno = None
        self._thread = threading.Thread(target=self._run, name='relay',
                                        daemon=True)

    # For other threads.

    def start(self, found):
        """found: ids of mails in the spool, whose time has begun."""
        self.alerts.start()
        for id in found:
            self.queues.unrouted.add(id, urgent=id in self.alerts.ids)
        self._thread.start()

    def announce(self, id, sender, line):
        """A mail is safe on disk. line: what the log says of that; what the
        mail has to wait for comes behind it."""
        self.alerts.works_again('mail can be stored again', 'storing')
        destination = None
        if not self._handlers.enabled:
            destination = self._destination_of(sender)
        log.info('%s%s', line, outlook(destination) if destination else '')
        if destination is None or not destination.add(id):
            self.queues.unrouted.add(id)

    def reload(self, settings, handlers):
        """New settings; all that waits is tried at once, parked or not."""
        self.grants.reload(settings)    # first: threads ask them by settings
        self.settings, self._handlers = settings, handlers
        self.alerts.settings = settings
        self._reloaded = True
        self.wake()

    def wake(self):
        """Has the relay's thread make its round at once."""
        with self.queues.unrouted.changed:
            self._last_round = -FOREVER
            self.queues.unrouted.changed.notify_all()

    def stop(self, grace):
        """Deliveries under way end within grace seconds, or are cut off: at
        worst that is a second copy."""
        end = time.monotonic() + grace
        if self._thread.is_alive():
            self._send_last_alert(min(ALERT_GRACE, grace / 4))
        self.queues.close()
        if self._thread.is_alive():         # it may never have started
            self._thread.join(max(0.0, end - time.monotonic()))
        left = self.queues.join(end - time.monotonic())
        self.grants.finish(end - time.monotonic())
        if left:
            log.warning('stopped during a delivery: %s; it will be tried '
                        'again', ', '.join(left))
        self.alerts.post(self._announce_alert, at_a_stop=True)

    def _send_last_alert(self, patience):
        """What was collected goes out at a stop, at once if it can."""
        id = self.alerts.post(self._announce_alert, at_a_stop=True)
        end = time.monotonic() + patience
        while id and self.queues.holder(id) and time.monotonic() < end:
            time.sleep(0.02)

    # The relay's thread.

    def _run(self):
        while not self.queues.unrouted.closed:
            try:
                self._do_next()
            except Exception:
                log.exception('relay: an error; it goes on with the next mail')
                for queue_ in self.queues:      # a destination's, too
                    self.queues.let_all_go(
                        queue_, self.policy.in_a_while(self.settings))

    def _do_next(self):
        unrouted = self.queues.unrouted
        with unrouted.changed:  # wake() comes before this, or ends the wait
            wait = (self._last_round + self.settings.config.sleeptime
                    - self._clock())
            id = unrouted.take(wait) if wait > 0 else None
        if wait <= 0:
            self._make_round()
        elif id:
            self.route(id)

    def _make_round(self):
        """What is left over, and what the owner has asked for."""
        self._last_round = self._clock()
        if self._reloaded:
            self._rescan()
        self._spool.retry_removals()
        self._requests.serve_all()
        self.grants.renew_idle()
        for destination in list(self.queues.destinations.values()):
            if destination.not_before == FOREVER:
                self._look_after_sign_in(destination)
        self.queues.tidy()
        self._watch.look_round(self.settings, self.grants,
                               list(self.queues.destinations.values()))
        self.alerts.make_round(self._announce_alert)

    def _announce_alert(self, id, sender):
        """An alert goes before other mail, and no handler sees it."""
        destination = self._destination_of(sender)
        if destination is None or not destination.add(id, urgent=True):
            self.queues.unrouted.add(id)

    def _look_after_sign_in(self, destination):
        """Of an account that waits for a person. Time goes on for its mail,
        and a new sign-in ends the wait."""
        self.park_expired(destination, self.settings)
        if not destination.sign_in.is_dead():
            log.info('%s: the sign-in has changed: %d mails are tried now',
                     destination.account.server, len(destination.due))
            destination.retry()

    def park_expired(self, destination, settings):
        """What has waited too long for its account."""
        for id in destination.withdraw(
                lambda id: self.policy.waited_too_long(
                    id, destination, settings)):
            mail = self.load(id, destination)
            if mail:
                self.policy.park(mail, destination.why, settings)
                destination.done(id)

    def route(self, id):
        """Gives a mail that this thread has in hand to its destination."""
        mail = self.load(id, self.queues.unrouted,
                         to_send=bool(self._handlers.enabled))
        if mail is None:
            return
        if mail.flaw:
            self.policy.park_flawed(mail, self.settings)
        if mail.parked or not self._handle(mail):
            self.queues.unrouted.done(id)
            return
        destination = self._destination_of(mail.frm)
        if destination is None:
            self.policy.settle_homeless(mail, self.settings)
            self.queues.unrouted.done(id)
            return
        waits = outlook(destination)
        if waits and not self.queues.unrouted.due:
            log.info('%s%s', id, waits.replace(';', ':', 1))
        self.queues.hand_over(id, destination, mail.is_alert)

    def _destination_of(self, sender):
        """The Destination of a sender's mail, None without an account."""
        account = self.settings.account_for(sender)
        return account and self.queues.destination(account)

    def _deliver(self, destination):
        DeliveryAgent(self, destination).run()

    def load(self, id, queue_, to_send=True):
        """The Mail of an id that this thread has in hand. None if it can't be
        had: then queue_ has it again, for later, or it is done with."""
        try:
            mail = self._spool.load(id, to_send)
            self._last_errno = None
            if mail:
                return mail
        except Unfinished as error:
            if id < self._spool.first_own:
                log.info('%s: %s, so it was never promised; removed', id,
                         error)
                os.unlink(self._spool.path(id, 'mail'))
            else:
                self._spool.set_aside(id + '.mail', error)
        except Unreadable as error:
            self._spool.set_aside(id + '.mail', error)
        except Exception as error:      # a MemoryError, too: never kept
            if isinstance(error, OSError):
                self._note_unreadable(id, error)
            else:
                log.exception('%s: an error of ours; tried again later', id)
            self.queues.let_go(id, queue_,
                               self.policy.in_a_while(self.settings))
            return None
        queue_.done(id)
        return None

    def _note_unreadable(self, what, error):
        """Once, if all of msgs/ is away."""
        log.log(logging.DEBUG if error.errno == self._last_errno
                else logging.ERROR, '%s: cannot be read: %s; it is tried '
                'again later', what, error)
        self._last_errno = error.errno

    def _handle(self, mail):
        """Runs the handlers, once a mail; False if it does not go on."""
        if mail.handled or not self._handlers.enabled:
            return True
        try:
            before = mail.frm, list(mail.to), mail.msg
            if not self._handlers.run(mail):
                self._spool.remove(mail)
                return False
            mail.handled = True
            if before == (mail.frm, mail.to, mail.msg):
                self._spool.save(mail)
                return True
            self._spool.replace(mail)
            log.info('%s: changed by handlers, now from <%s> to %s', mail.id,
                     mail.frm, listed(mail.to))
            return True
        except (OSError, MemoryError) as error:
            line = ('%s: handlers cannot be run on it, or what they made of '
                    'it not stored: %r; tried again later' % (mail.id, error))
            log.error('%s', line)
            self.alerts.tell(line, 'handlers ' + mail.id)
            self.queues.unrouted.give_back(
                mail.id, self.policy.in_a_while(self.settings))
            return False

    def _rescan(self):
        """After a reload: every mail finds its way anew, and what is parked
        is tried once more. What a thread has in hand just now may fail in the
        next moment: for that the owner's wish is left as a request."""
        found = self.scan()
        if found is None:
            return                      # the next round does it
        self._reloaded = False          # before settings are looked at
        recalled, in_hand = self.queues.recall({
            account.connection for account in self.settings.accounts.values()})
        self.queues.retry_all()
        for id in found:
            if id in in_hand or id not in recalled and not self.revive(id):
                self._requests.ask_again(id)

    def scan(self):
        """The ids of all mails; None if msgs/ can't be read just now."""
        try:
            return self._spool.scan()
        except OSError as error:
            self._note_unreadable(self._spool.folder, error)
            return None

    def revive(self, id):
        """A mail that no destination has: if it is parked, it is tried again,
        and goes on with that after a crash. False if it can't be read now."""
        if not self.queues.unrouted.add(id):
            return True                 # we are closed
        if not self._spool.may_be_parked(id):
            return True                 # its turn comes
        self.queues.unrouted.claim(id)
        mail = self.load(id, self.queues.unrouted, to_send=False)
        if mail is None:
            return id not in self.queues.unrouted
        if mail.parked:
            mail.parked = False
            self._spool.save(mail)
        self.queues.unrouted.give_back(id)
        return True


# --- Proxy: builds all of it and wires it together --------------------------

class StartError(Exception):
    """Why the service can't start, for the owner."""


def become(uid, gid, name):
    """Gives up root's rights for those of a user, for good, with all groups
    of root. uid, gid: None stays as it is; name: the user's, None if it has
    none. Raises PermissionError."""
    if gid is not None:
        if name:
            os.initgroups(name, gid)
        else:
            os.setgroups([gid])
        os.setgid(gid)
    if uid is not None:
        os.setuid(uid)


def hand_over(folder, names, owner):
    """Gives what is in folder ('.' is the folder itself) and whose name
    matches names to owner: [uid, gid], -1 for what stays. Raises OSError.

    Root does this where a user may write, who must not have root give away
    another file: so links are not followed but root's own, and what is given
    is what is open, not what may bear its name a moment later."""
    if not changeable(os.path.dirname(folder), set()):
        folder = os.path.realpath(folder)
    there = open_itself(folder)
    if there is not None:
        try:
            for name in ['.'] + os.listdir(there):
                if re.fullmatch(names, name):
                    give(there, name, owner)
        except OSError as error:        # its mount may say whose all of it is
            if error.errno not in UNABLE | {errno.EPERM}:
                raise
            name_once(folder, 'change owners', error)
        finally:
            os.close(there)


def give(folder, name, owner):
    """Gives a file or a folder; not one that has a second name elsewhere."""
    file = open_itself(name, folder)
    if file is not None:
        try:
            info = os.fstat(file)
            if stat.S_ISDIR(info.st_mode) or (
                    stat.S_ISREG(info.st_mode) and info.st_nlink == 1):
                os.fchown(file, *owner)
        finally:
            os.close(file)


def open_itself(name, folder=None):
    """A descriptor; None for a link and what can't be opened. folder: the
    descriptor of the one that name is in. Never waits for a pipe."""
    with contextlib.suppress(OSError):
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK,
                       dir_fd=folder)


def nearest_above(path):
    """The path itself or the first folder above it that is there."""
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def is_missing(host):
    """Is this an address, not a name, that this box has not got (yet)?"""
    try:        # as bytes, for str it wants the codec idna, of python3-codecs
        (family, kind, *_, address), *_ = socket.getaddrinfo(
            host.encode(), 0, type=socket.SOCK_STREAM,
            flags=socket.AI_NUMERICHOST)
        with socket.socket(family, kind) as probe:
            probe.bind(address)
    except OSError as error:
        return error.errno == errno.EADDRNOTAVAIL
    return False


GRACE = 8.0                 # seconds for what is under way at a stop
ADDRESS_WAIT = 60           # seconds; START_WAIT in smtpproxy.init.d is longer


class Proxy:
    """The only class that knows all others."""

    _hint = ('. If SIGHUP was meant to stop it: that was 1.x, install the '
            'present smtpproxy.init.d')

    def __init__(self, settings, pause=time.sleep):
        """pause: callable(seconds), may raise what ends the start."""
        self.settings, self._started = settings, settings.config
        self._pause = pause
        self.spool = Spool(settings.config.msgdir)
        self.alerts = None              # they are kept in msgs/
        self._reloading = threading.Lock()      # the main thread, the relay
        self.server = smtps.Server(self._make_session, hostname=HOST)

    def start(self):
        """Raises StartError; then nothing was touched."""
        try:
            self._prepare()
        except BaseException:
            self.server.stop(0)
            self.spool.close()
            raise
        try:
            self.relay.start(self._found)
            del self._found
            self.server.start()
        except RuntimeError as error:
            self.stop()
            raise StartError('%s: is this box out of memory?' % error)

    def _prepare(self):
        config = self.settings.config
        require_passwords(self.settings)
        require_identity(config)
        self.server.limits = self.limits(self.settings)
        self._wait_for_address(config.host)
        self.listen(config.host, config.port)
        if config.tlsport:
            self.listen(config.host, config.tlsport, tls=True)
        self._lock_folder()         # before anything there is touched
        self._hand_over_files()
        self._drop_rights()
        open_log(self.settings)
        for line in named.values():     # so far there was no log for them
            log.warning('%s', line)
        self._found = self._read_folder()
        self.handlers = Handlers(self.settings)
        self.relay = Relay(self.spool, self.settings, self.handlers,
                           reload_ini=self._reload_asked, alerts=self.alerts)
        self._warn()
        log.info('smtpproxy %s listens on %s; accounts: %d, mails in %s: %d',
                 VERSION, self.ports(), len(self.settings.accounts),
                 config.msgdir, len(self._found))

    def ports(self):
        return 'port ' + ', '.join(sorted({
            str(sock.getsockname()[1]) for sock in self.server.listeners}))

    def _make_session(self, client):
        return Intake(
            client, Admission(self.settings, bool(self.handlers.enabled),
                              self.alerts.tell),
            self.spool.draft, self.relay.announce, self.alerts.tell)

    def _wait_for_address(self, host):
        """At boot we may be faster than DHCP. Whatever else is wrong with a
        host fails at once, in listen()."""
        waited = 0
        while host and waited < ADDRESS_WAIT and is_missing(host):
            if not waited:
                say('host=%s is no address of this box yet: waiting up to %d '
                    'seconds for it' % (host, ADDRESS_WAIT))
            self._pause(1)
            waited += 1

    def listen(self, host, port, tls=False):
        try:
            self.server.listen(host, port, tls)
        except PermissionError:
            raise StartError('port %d may not be used by this user: start as '
                             'root (and set user= in [config]), or set port= '
                             'to one above 1023' % port)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise StartError('port %d is taken by another program: is '
                                 'smtpproxy running already, or a mail '
                                 'server? stop it or set another port=' % port)
            raise StartError('cannot listen on %s port %d: %s; is host= an '
                             'address of this box?' % (host, port,
                                                       error.strerror))

    @staticmethod
    def limits(settings):
        """smtps.Limits of the ini. Raises StartError."""
        config, tls = settings.config, None
        if config.tlscert:
            tls = listener_tls(config)
        return smtps.Limits(
            config.maxsize, config.maxconnections, config.timeout,
            smtps.Networks(config.allow).__contains__, tls)

    def obstacles(self):
        """What keeps it from starting, found out without a start: [str]. At
        the end we are who we would be after a start."""
        found = []
        for step in (functools.partial(self.limits, self.settings),
                     self._check_folder, self._check_ports,
                     self._drop_rights, self._check_way):
            try:
                step()
            except StartError as error:
                found += str(error).splitlines()
        self.server.stop(0)
        return found

    def _check_folder(self):
        """Is msgdir there, or can it be made?"""
        folder = self.settings.config.msgdir
        there = nearest_above(folder)
        if not os.path.isdir(there) or not os.access(
                there, os.W_OK | os.X_OK):
            raise StartError('%s cannot be used: %s must be a folder that '
                             'user %d may write to' % (
                                 folder, there, os.getuid()))
        with self._folder_needed():
            self.spool.is_locked()

    def _check_ports(self):
        """Of a port that is taken by who works on msgdir as well no word: it
        is most likely the service that is to be started anew."""
        config, found = self.settings.config, []
        for port in filter(None, (config.port, config.tlsport)):
            try:
                self.listen(config.host, port)
            except StartError as error:
                found.append(str(error))
        are_taken = all('is taken' in text for text in found)
        if found and not (are_taken and self.is_served()):
            if are_taken:
                found.append('if it is this service, and msgdir= has changed: '
                             'stop it first, then start it')
            raise StartError('\n'.join(found))

    def is_served(self):
        """Does another process work on msgdir now?"""
        with contextlib.suppress(OSError):      # said by _check_folder
            return self.spool.is_locked()
        return False

    def _check_way(self):
        """May the user that we are now come to msgdir? If it was root who
        looked at it, it will be given to that user."""
        folder = os.path.realpath(self.settings.config.msgdir)
        above = nearest_above(os.path.dirname(folder))
        if os.path.isdir(above) and not os.access(above, os.X_OK):
            raise StartError('%s cannot be used: user %d may not enter %s' % (
                folder, os.getuid(), above))

    def _hand_over_files(self):
        """What root made belongs to the user that we become."""
        uid, gid, name = identity(self.settings.config)
        if os.getuid() != 0 or uid is None and gid is None:
            return
        owner = [-1 if number is None else number for number in (uid, gid)]
        folder, file = self.settings.config.msgdir, self.settings.logging.file
        with contextlib.suppress(OSError):      # the log says what it can't
            os.close(os.open(
                file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        try:
            if self.settings.grants:
                hand_over_tokens(self.settings.config.tokendir, owner)
            hand_over(folder, '.*', owner)
            hand_over(os.path.dirname(file), re.escape(
                os.path.basename(file)) + r'(\.\d+)?', owner)
        except OSError as error:
            raise StartError('%s cannot be given to %s: %s' % (
                error.filename or folder, name or self.settings.config.group,
                error.strerror))

    def _drop_rights(self):
        require_identity(self.settings.config)
        if os.getuid() != 0:
            return
        try:
            become(*identity(self.settings.config))
        except PermissionError:         # a container's root, perhaps
            raise StartError(NEEDS_ROOT)

    def _lock_folder(self):
        with self._folder_needed():
            try:
                self.spool.open()
            except PermissionError:     # on NFS root may be nobody: later
                if os.getuid() != 0:
                    raise

    def _read_folder(self):
        """The ids of the mails that were found."""
        with self._folder_needed():
            if not self.spool.is_there():
                self.spool.open()
            self.alerts = Alerts(self.spool, self.settings)
            self.spool.alert = self.alerts.tell
            return self.spool.start()

    @contextlib.contextmanager
    def _folder_needed(self):
        """What keeps us from msgs/ becomes a StartError."""
        folder = self.settings.config.msgdir
        try:
            yield
        except Busy:
            raise StartError('another smtpproxy works on %s: stop that one '
                             'first, or set another msgdir=' % folder)
        except NoLocks as error:
            raise StartError('%s cannot be locked: %s; without a lock a '
                             'second service could send all mail twice: set '
                             'msgdir= to a folder on a disk of this box' % (
                                 folder, error.strerror))
        except OSError as error:
            raise StartError('%s cannot be used: %s; it must be a folder that '
                             'user %s may write to' % (
                                 folder, error.strerror, os.getuid()))

    def reload(self):
        """Reads the ini anew; a bad one changes nothing. Returns whether it
        was good."""
        with self._reloading:
            try:
                return self._reload()
            except Exception:
                log.exception('not reloaded: an error of ours')
                return False

    def _reload_asked(self, id):
        """Answers a reload_request(). One for another ini comes of two that
        have one msgdir=, most likely that beside the program."""
        with contextlib.suppress(OSError):      # reload() will say it
            if (id, 'reload') != reload_request(self.settings.file):
                log.error('not reloaded: --add has changed another ini than '
                          '%s, which has the same msgdir=',
                          self.settings.file)
                return FOREIGN
        return '' if self.reload() else REFUSED

    def _reload(self):
        try:
            new = load(self.settings.file)
            require_passwords(new)
            limits = self.limits(new)
        except (ConfigError, StartError, OSError) as error:
            for line in warn_of_reload(self.settings.file) or (
                    str(error).splitlines()):
                log.error('not reloaded: %s', line)
            return False
        for key in ('port', 'tlsport', 'host', 'msgdir', 'user', 'group'):
            if getattr(new.config, key) != getattr(self._started, key):
                log.warning('[config] %s has changed: that needs a restart',
                            key)
        if self._started.tlsport and not new.config.tlscert:
            log.warning('[config] tlscert is gone: clients at tlsport %d get '
                        'a 421 until a restart', self._started.tlsport)
        smtps.client_context.cache_clear()
        open_log(new)
        self.settings, self.handlers = new, Handlers(new)
        self.server.limits = limits
        self.relay.reload(new, self.handlers)
        self._warn()
        log.info('reloaded %s: %d accounts, waiting mail is tried now%s',
                 new.file, len(new.accounts), self._hint)
        self._hint = ''
        return True

    def _warn(self):
        """What is odd, or waits for a person, at a start and a reload."""
        for warning in self.settings.warnings + folder_warnings(
                self.settings) + warn_of_reload(self.settings.file):
            log.warning('%s', warning)
        for section, text in self.relay.grants.needed().values():
            log.warning('[%s] %s', section, text)

    def stop(self):
        """Within ten seconds."""
        end = time.monotonic() + GRACE
        self.server.stop(GRACE / 2)
        if hasattr(self, 'relay'):
            self.relay.stop(end - time.monotonic())
        self.spool.close()
        log.info('stopped')


def hand_over_tokens(folder, owner):
    """As root: the folder of sign-ins, made if need be, goes to the user who
    needs it. owner: [uid, gid], -1 for what stays. Raises OSError."""
    os.makedirs(folder, 0o700, exist_ok=True)
    hand_over(folder, r'\.|.*\.(json|new|lock|needed)', owner)


def become_owner(config):
    """As root, for a command that may touch sign-ins: become the user who
    needs them. Raises OSError."""
    if os.getuid() != 0:
        return
    uid, gid, name = identity(config)
    for folder in config.tokendir, config.msgdir:
        if uid is None and os.path.isdir(folder):
            owner = os.stat(folder)
            uid, gid = owner.st_uid, owner.st_gid
    if uid is None:
        return                          # nobody has been here before
    hand_over_tokens(config.tokendir, [uid, gid])
    become(uid, gid, name)


NEEDS_ROOT = 'user= and group= in [config] need a start as root'


def require_identity(config):
    """Raises StartError unless we may become, or are, who the ini names."""
    uid, gid, _ = identity(config)
    if os.getuid() != 0 and (
            uid not in (None, os.getuid()) or config.group
            and gid not in (os.getgid(), *os.getgroups())):
        raise StartError(NEEDS_ROOT)


def require_passwords(settings):
    """Raises StartError if a password file can't be read."""
    if settings.missing:
        raise StartError('\n'.join(settings.missing))


def listener_tls(config):
    """The ssl.SSLContext for clients. Raises StartError."""
    try:
        return smtps.server_context(config.tlscert, config.tlskey,
                                    config.tlsweak)
    except ImportError as error:
        raise StartError(missing_module(error))
    except (OSError, ValueError) as error:
        raise StartError('[config] tlscert %s and tlskey %s cannot be used: '
                         '%s' % (config.tlscert, config.tlskey, error))


# --- Commands: what the owner asks on the command line ----------------------

def check(options):
    """--check: would it start? A mistake in the ini hides nothing that can be
    found out all the same."""
    problems, warnings = [], []
    try:
        settings = load(options.config)
        tell_settings(settings)
        warnings += show_grants(settings)
    except ConfigError as error:
        problems, settings = error.args
    if settings:
        warnings += (settings.missing + settings.warnings
                     + warn_of_trust(settings.accounts)
                     + warn_of_log(settings.logging) + try_handlers(settings))
        problems += look_around(settings)       # as its user from now on
        warnings += warn_of_growth(settings.logging)
        warnings += warn_of_reload(settings.file)
    for line in warnings:
        tell('warning: ' + line)
    for line in problems:
        say(line)
    tell('this would start' if not problems else 'this would not start')
    return 1 if problems else 0


def tell_settings(settings):
    tell('%s: [config] port=%d, msgs in %s, log in %s' % (
        settings.file, settings.config.port, settings.config.msgdir,
        settings.logging.file))
    for name, account in settings.accounts.items():
        tell('[%s]' % name)
        for key, value in account._asdict().items():
            if value != Account._field_defaults[key]:
                tell('    %s = %s' % (key, masked(key, value)))


def look_around(settings):
    """What keeps the service from starting, if [config] can tell: [str]."""
    if not settings.config:
        return []
    proxy = Proxy(settings)
    if proxy.is_served():
        tell('another smtpproxy works on %s: it has to stop before this one '
             'starts' % settings.config.msgdir)
    return proxy.obstacles()


def warn_of_trust(accounts):
    """[a warning] for each tlscafile that holds no certificate."""
    users, warnings = {}, []        # {path: names of sections}
    for name, account in accounts.items():
        users.setdefault(account.tlscafile, []).append(name)
    for path in users.keys() - {''}:
        try:
            smtps.client_context(path)
        except ImportError as error:
            return [missing_module(error)]
        except OSError as error:
            warnings.append('[%s] tlscafile = %s cannot be used: %s' % (
                '], ['.join(users[path]), path, error))
    return warnings


def try_handlers(settings):
    """Tells which there are; returns what is wrong with them, [str]."""
    handlers = Handlers(settings)
    for name, _, _ in handlers.enabled:
        tell('handler %s is enabled' % name)
    for name in handlers.helpers:
        tell('handlers/%s.py is no handler: a module for others to import'
             % name)
    return handlers.problems


def show_grants(settings):
    """Prints who is signed in; returns who is not and what else is wrong, a
    list of str."""
    warnings = folder_warnings(settings)
    for grant in Grants(settings):
        state = grant.state()
        if state.name == 'signed in':
            tell('[%s] %s' % (grant.section, state.text))
        else:
            warnings.append('[%s] %s' % (grant.section, state.text))
    return warnings


def waiting(spool):
    """The ids of the mails that wait, oldest first."""
    return spool.scan() if os.path.isdir(spool.folder) else []


def mails(spool, ids):
    """The mails of these ids, as far as they can be read."""
    for id in ids:
        try:
            mail = spool.load(id)
        except (Unfinished, Unreadable, FileNotFoundError):
            continue                # being received, or the service's to judge
        if mail:
            yield mail


def show_queue(settings, options):
    """--queue: what waits in msgs/, and what each account waits for."""
    rows = queue_rows(command_spool(settings))
    if options.json:
        import json
        print(json.dumps(rows, indent=1))   # ASCII, all else is escaped
        return 0
    needed = Grants(settings).needed()
    waiting = collections.Counter()     # mails, by what they have to wait for
    line = '%-14s %9s %10s %5s  %-19s  %s'
    tell(line % ('id', 'age', 'size', 'tries', 'next try',
                 'sender -> recipients: last error'))
    for row in rows:
        account = settings.account_for(row['sender'])
        grant = account and account.grant
        waiting[grant] += 1
        tell(line % (row['id'], age_of(row['age']), row['size'],
                     row['tries'], next_try(row, settings, grant in needed),
                     '<%s> -> %s%s' % (row['sender'], listed(
                         row['recipients']), row['error'] and (
                             ': ' + row['error']))))
    tell('%d mails' % len(rows))
    for grant, (section, text) in needed.items():
        tell('%d of them wait for the sign-in of [%s]: %s' % (
            waiting[grant], section, text))
    for text in held_up(rows, settings):
        tell(text)
    return 0


def held_up(rows, settings):
    """What holds each account up: [a line for the owner]."""
    waiting = {}
    for row in rows:
        account = settings.account_for(row['sender'])
        if account and not row['parked']:
            waiting.setdefault(account.connection, []).append(row)
    lines = []
    for account, its in waiting.items():
        way = '%s: %d mails wait' % (account.way, len(its))
        held = max((row for row in its if row['holds']), default=None,
                   key=lambda row: row['next'] or '')
        untried = sum(not row['tries'] for row in its)
        if held:
            lines.append('%s for the account, next try %s: %s' % (
                way, next_try(held, settings), held['error']))
        elif account.smtprate and untried:
            lines.append('%s, %d for their turn: smtprate=%d, so about %d '
                         'minutes' % (way, untried, account.smtprate,
                                      -(-untried // account.smtprate)))
    return lines


def next_try(row, settings, needs_sign_in=False):
    """When a mail is tried again, for people. Where nobody was there at all
    that is each sleeptime, and no time of its own is stored."""
    if row['parked']:
        return 'parked'
    if needs_sign_in:
        return 'after --login'
    return row['next'] or ('each %d s' % settings.config.sleeptime
                           if row['tries'] else 'soon')


def queue_rows(spool):
    """[{what a script gets of a mail that waits}]"""
    rows, newest = [], (0, '')
    for mail in mails(spool, waiting(spool)):   # one at a time, of thousands
        rows.append(queue_row(mail))
        newest = max(newest, (max(arrival(mail.id), mail.seen), mail.path))
    now = spool_time(*newest)
    for row in rows:
        row['age'] = max(0, int(now - arrival(row['id'])))
    return rows


def queue_row(mail):
    due = mail.due and not mail.parked and time.strftime(
        '%Y-%m-%d %H:%M:%S', time.localtime(mail.due))
    return {'id': mail.id, 'size': mail.dot - 3 - mail.start, 'age': None,
            'sender': mail.frm, 'recipients': mail.to + list(mail.refused),
            'tries': mail.tries, 'parked': mail.parked,
            'next': due or None, 'error': mail.problem,
            'holds': mail.holds and not mail.parked}


def arrival(id):
    """When a mail came, in the spool's own time."""
    return int(id[:8], 16)


def spool_time(newest, path):
    """The spool's own time now, as far as its files tell: the newest moment
    that one of them names, and what has passed since that was written. Never
    more than since this box was started, whatever its clock says."""
    try:
        passed = time.time() - os.path.getmtime(path)
    except FileNotFoundError:
        passed = 0                  # the service has just sent it
    return newest + min(max(0, passed), time.monotonic())


def age_of(seconds):
    days, seconds = divmod(seconds, 86400)
    return ('%dd ' % days if days else '') + '%02d:%02d:%02d' % (
        seconds // 3600, seconds % 3600 // 60, seconds % 60)


def command_spool(settings):
    """The Spool, as the user who owns it: what root makes there the service
    could not read."""
    folder = settings.config.msgdir
    if os.path.isdir(folder) and os.getuid() == 0:
        owner = os.stat(folder)
        become(owner.st_uid, owner.st_gid, None)
    return Spool(folder)


def ask(settings, options):
    """--retry ID...|all and --delete ID...: by the service if it runs. Without
    it a mail is deleted here, and a retry left for the next start: that goes
    on in the spool's own time, which nobody knows meanwhile. One unknown id,
    and nothing is done."""
    what = 'retry' if options.retry else 'delete'
    ids, spool = options.retry or options.delete, command_spool(settings)
    there, means_all = waiting(spool), (ids, what) == (['all'], 'retry')
    unknown = [] if means_all else [id for id in ids if id not in there]
    for id in unknown:
        say('there is no mail "%s" in %s; see --queue' % (id, spool.folder))
    if unknown:
        return 1
    if not there:
        tell('nothing waits')       # there may not even be a msgs/
        return 0
    try:
        spool.open(patience=0)
    except Busy:
        return ask_service(spool, ids, what, settings.config.sleeptime)
    try:                            # a service that starts now waits for us
        act(spool, ids, what)
    finally:
        spool.close()
    return 0


def act(spool, ids, what):
    """What is asked for while no service runs."""
    if what == 'retry':
        for id in ids:
            spool.ask(id, what)
        tell('the service does not run; it tries it when it starts')
        return
    for id in ids:
        with contextlib.suppress(FileNotFoundError):    # sent a moment ago
            os.unlink(spool.path(id, 'mail'))
    tell('deleted')


def ask_service(spool, ids, what, sleeptime):
    """Waits until the service has done it."""
    tell('the service is asked, it looks every %d seconds' % sleeptime)
    paths = [spool.ask(id, what) for id in ids]
    end = time.monotonic() + sleeptime + 5
    while any(map(os.path.exists, paths)):
        if time.monotonic() > end:
            tell('the service is asked; it is busy')
            return 0
        time.sleep(0.05)
    if any(os.path.exists(path + FOREIGN) for path in paths):
        say('the service that works on %s uses another ini: that is the one '
            'to change' % spool.folder)
        return 1
    if any(os.path.exists(path + REFUSED) for path in paths):
        say('the service has not read its ini again; its log says why')
        return 1
    tell({'delete': 'deleted', 'reload': 'the service has read it again'}.get(
        what, 'the service tries it now'))
    return 0


def login(settings, options):
    """--login ADDRESS: signs in by OAuth2. What was there stays until the new
    sign-in is stored."""
    grant = grant_of(settings, options.login)
    if grant is None:
        return 1
    account, folder = grant.account, grant.file.folder
    try:
        make_folder(folder)
    except OSError:
        pass                            # said in the next line
    if not os.access(folder, os.W_OK | os.X_OK):
        say('%s cannot be written by user %d: run this as root, or as the '
            'user of the service' % (folder, os.getuid()))
        return 1
    tell('Signing in at %s as %s.' % (
        account.oauth if account.oauth != 'other' else
        account.oauthtokenurl, account.smtpusername))
    try:
        answer = FLOWS[account.oauthflow](account)
        try:
            grant.store(answer)
        except OSError as error:
            say('signed in, but %s cannot be stored: %s; make room, then '
                '--login again; what was stored before is as it was' % (
                    grant.file.path, error.strerror))
            return 1
    except (TokenServerAway, TokenDenied) as error:
        say('not signed in: %s; what was stored before is as it was' % error)
        return 1
    tell_stored(settings, grant, answer)
    tell('Trying it at %s:' % account.server)
    taken = trial(settings, account)
    if taken:
        tell('%s takes this sign-in for %s.' % (account.server,
                                                account.smtpusername))
    retry_mails_of(settings, account)
    return 0 if taken else 1


def grant_of(settings, address):
    """The Grant of a sender or section, as the user who owns it; None after
    a line that says why there is none."""
    section = settings.section_for(address)
    if section is None:
        say('there is no account for %s in %s' % (address, settings.file))
        return None
    account = settings.accounts[section]
    if not account.oauth:
        say('[%s] has no oauth: it needs no sign-in' % section)
        return None
    become_owner(settings.config)
    return Grants(settings).of(account)


def tell_stored(settings, grant, answer):
    account = grant.account
    tell('Signed in; stored as %s.' % grant.file.path)
    tell('Mail of these sections goes out by it: ' + ', '.join(
        name for name, other in settings.accounts.items()
        if other.grant == account.grant))
    if account.oauthflow != 'app' and not is_token(
            answer.get('refresh_token')):
        tell('warning: it came without a refresh token and ends soon: '
              'oauthscope may lack offline_access')
    granted = answer.get('scope')
    wanted = set(account.oauthscope.lower().split()) - {
        'offline_access', 'openid', 'profile', 'email'}
    if isinstance(granted, str) and wanted - set(granted.lower().split()):
        tell('warning: not all that was asked for was granted: %s'
              % smtps.plain(granted))
    if account.oauth == 'google':
        tell('If the app is still in "Testing" at Google, this ends after '
              'seven days: publish it ("In production").')


def retry_mails_of(settings, account):
    """Leaves a request to try the waiting mail that goes out by this sign-in,
    parked mail too."""
    spool = Spool(settings.config.msgdir)
    found = [mail.id for mail in mails(spool, waiting(spool))
             if (settings.account_for(mail.frm) or Account()).grant
             == account.grant]
    for id in found:
        spool.ask(id, 'retry')
    if found:
        tell('What waits is tried within %d seconds, or when the service '
             'starts: %d mails' % (settings.config.sleeptime, len(found)))


def logout(settings, options):
    """--logout ADDRESS: forgets a sign-in."""
    grant = grant_of(settings, options.logout)
    if grant is None:
        return 1
    try:
        there = grant.forget()
    except TokenServerAway as error:
        say(str(error))
        return 1
    tell('%s. The provider still knows it: you can withdraw it there, too.'
          % ('forgotten: ' + grant.file.path) if there else
          'there is no sign-in for [%s]' % grant.section)
    return 0


def show(settings, options):
    """--show ID: the mail as it would be sent."""
    spool = command_spool(settings)
    for mail in mails(spool, {options.show}.intersection(waiting(spool))):
        account = settings.account_for(mail.frm) or Account()
        show_message(smtps.unstuffed(dress(mail, account))
                     + mail.msg[smtps.split_header(mail.msg):])
        return 0
    say('there is no mail "%s"; see --queue' % options.show)
    return 1


def show_message(message):
    """Every byte of it, but on a terminal nothing that it would obey."""
    if sys.stdout.isatty():
        for line in message.decode('utf-8', 'replace').splitlines():
            tell(line)
    else:
        sys.stdout.buffer.write(message)
        sys.stdout.flush()


def handler_test(settings, options):
    """--handler-test FILE: what the enabled handlers make of a mail."""
    import difflib
    with open(options.handler_test, 'rb') as file:
        message = smtps.DataReader.LINE_END.sub(b'\r\n', file.read())
    log_to_stdout()
    handlers = Handlers(settings)
    mail = TestMail(message)
    before = ('from <%s> to %s\n' % (mail.frm, listed(mail.to))
              + message.decode('utf-8', 'replace')).splitlines()
    keep = handlers.run(mail)
    after = ('from <%s> to %s\n' % (mail.frm, listed(mail.to))
             + mail.msg.decode('utf-8', 'replace')).splitlines()
    tell('enabled: ' + (', '.join(name for name, _, _ in handlers.enabled)
                        or 'none'))
    for line in difflib.unified_diff(before, after, 'before', 'after', '', '',
                                     1, ''):
        tell(line)
    tell('the mail would %s; nothing was sent' % (
        'go on' if keep else 'be discarded'))
    return 0


def log_to_stdout(level=logging.INFO):
    """The log among the lines of a command."""
    console = logging.StreamHandler(sys.stdout)
    console.setFormatter(ForCommand())
    console.handleError = lambda record: None       # nobody listens
    root = logging.getLogger()
    root.handlers[:] = [console]
    root.setLevel(level)


class TestMail(Mail):
    """A mail that lies in no spool, from a message (bytes)."""

    def __init__(self, message):
        from email import message_from_bytes
        from email.utils import getaddresses
        headers = message_from_bytes(message)
        self.id, self.path, self.parameters = 'test', None, {}
        self.data, self.start = smtps.stuffed(message) + b'.\r\n', 0
        self.body, self.dot = smtps.split_header(self.data), len(self.data)
        self._msg = message
        addresses = [[Address(a) for _, a in getaddresses(
            [str(field) for field in headers.get_all(name, [])]) if a]
            for name in ('from', 'to')]
        self.frm, self.to = (addresses[0] or [Address('')])[0], (
            addresses[1] or [Address('nobody@localhost')])


def test(settings, options):
    """--test [SENDER [RECIPIENT]]: the way that mail would go."""
    log_to_stdout(logging.INFO if settings.config.debuglevel
                  else logging.WARNING)
    if settings.grants:
        become_owner(settings.config)
    if not options.test:
        return test_all(settings)
    if options.test[2:] or options.test[1:] and not all(
            map(is_address, options.test)):
        say('--test takes a sender, or the addresses of a sender and of a '
            'recipient')
        return 1
    section = settings.section_for(options.test[0])
    if section is None:
        say('there is no account for %s in %s' % (
            options.test[0], settings.file))
        return 1
    return test_one(settings, section, *options.test)


def is_address(text):
    """Could a mail be from or to it?"""
    try:
        return '@' in smtps.parse_path('<%s>' % text, '')[0]
    except smtps.Refused:
        return False


def test_one(settings, section, sender, recipient=None):
    account = settings.accounts[section]
    tell('[%s]: %s' % (section, account.server))
    works = trial(settings, account, recipient and test_mail(
        sender, recipient, section))
    tell('[%s] works; %s' % (section, (
        'look whether the mail has come to <%s>' % recipient
        if recipient else 'no mail was sent'))
        if works else '[%s] does not work' % section)
    return 0 if works else 1


def test_all(settings):
    """Each way out once: sections may share one."""
    sections = {}
    for name, account in settings.accounts.items():
        sections.setdefault(account.connection, []).append('[%s]' % name)
    failed = []
    for account, names in sections.items():
        tell('%s: %s' % (', '.join(names), account.server))
        if not trial(settings, account):
            failed += names
        tell('')
    tell('these do not work: ' + ', '.join(failed) if failed else
         'all accounts work; no mail was sent' if sections else
         'there is no account in ' + settings.file)
    return 1 if failed or not sections else 0


def test_mail(sender, recipient, section):
    """A TestMail as a device would send it."""
    now = int(time.time())
    mail = TestMail((TEST_MAIL % (
        mail_date(now), now, os.urandom(4).hex(), HOST, sender, recipient,
        HOST, section)).encode())
    mail.frm, mail.to = Address(sender), [Address(recipient)]
    return mail


TEST_MAIL = """\
Date: %s
Message-ID: <test.%x.%s@%s>
From: <%s>
To: <%s>
Subject: A test of smtpproxy
MIME-Version: 1.0
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: 8bit

This is a test of smtpproxy on %s. It took the way by the account
[%s], as the mail of your devices does.
"""


def trial(settings, account, mail=None):
    """Tells of each step of an account's way, that of a mail as well if there
    is one. Returns whether all went well."""
    with contextlib.closing(Trial(settings, account)) as attempt:
        return attempt.connect() and (mail is None or attempt.send(mail))


class Trial:
    """Goes the way that mail of an account goes, with the Courier that takes
    it there, and tells of each step and the time it took.

    tell: callable(str); clock: callable() -> seconds; pause:
    callable(seconds)."""

    def __init__(self, settings, account, tell=tell, clock=time.monotonic,
                 pause=time.sleep):
        self._account, self._pause = account, pause
        self._sign_in = SignIn(account, clock, grants=Grants(settings))
        self._courier = Courier(account, self._sign_in, settings.config,
                                self._show)
        self._tell, self._clock, self._since = tell, clock, clock()

    def connect(self):
        """All but the mail. Returns whether it went well."""
        while True:
            try:
                self._courier.connect()
                return True
            except PopPending as error:
                self._await(error)
            except AccountUnavailable as error:
                return self._fail(error)

    def _await(self, pending):
        """A POP login has to sink in."""
        seconds = max(0.0, pending.until - self._clock())
        self._pause(seconds)
        self._show('waitafterpop', seconds)

    def send(self, mail):
        """Returns whether all its recipients have it."""
        try:
            report = self._courier.deliver(mail, self._account, lambda: None)
        except AccountUnavailable as error:
            return self._fail(error)
        for reply, recipients in grouped(report.sent):
            self._line('sent to %s: %s' % (listed(recipients), reply))
        for reply, recipients in grouped(dict(report.never, **report.later)):
            self._fail('%s said %s for %s' % (
                self._account.server, reply, listed(recipients)))
        return not report.never and not report.later

    def close(self):
        self._courier.close(politely=True)

    def _fail(self, why):
        self._line('failed: %s' % why)
        return False

    def _show(self, step, found):
        self._line('%s: %s' % (step, SHOWN[step](found)))

    def _line(self, text):
        since, self._since = self._since, self._clock()
        with contextlib.suppress(OSError):      # of ours, not of the server
            self._tell('%6d ms  %s' % ((self._since - since) * 1000,
                                       self._sign_in.redact(text)))


def shown_name(found):
    host, addresses = found
    return '%s is %s' % (host, ', '.join(addresses))


def shown_tls(sock):
    certificate = sock.getpeercert()
    return '%s, %s, %s' % (
        sock.version(), sock.cipher()[0], shown_certificate(certificate)
        if certificate else 'certificate not verified (tlsverify=false)')


def shown_certificate(certificate):
    """Whose, by whom and until when, of what ssl tells."""
    import ssl
    subject, issuer = (
        {key: value for part in certificate.get(name, ())
         for key, value in part} for name in ('subject', 'issuer'))
    names = [value for _, value in certificate.get('subjectAltName', ())]
    return 'certificate of %s by %s, good until %s' % (
        subject.get('commonName') or ', '.join(names[:3]),
        issuer.get('organizationName') or issuer.get('commonName'),
        time.strftime('%Y-%m-%d', time.gmtime(ssl.cert_time_to_seconds(
            certificate['notAfter']))))


def shown_offers(delivery):
    return 'it offers ' + (', '.join(delivery.offered()) or 'nothing')


# What a Courier tells of its way -> how that is shown.
SHOWN = {
    'name': shown_name,
    'connect': lambda where: '%s port %d' % where,
    'TLS': shown_tls,
    'greeting': str,
    'POP login': 'taken as {}'.format,
    'waitafterpop': '{:.0f} s'.format,
    'EHLO': shown_offers,
    'sign-in': lambda state: state.text,
    'refused': '{}; another token is asked for'.format,
    'login': lambda how: 'taken by ' + how if how else (
        'none, smtpusername and smtppassword are not both set'),
}


def demo(options):
    """--demo [oauth]: the whole trip on loopback. Returns 0 if the mail
    arrived."""
    import tempfile
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(
            DEMOS[options.demo]()) as provider:
        path = os.path.join(folder, 'smtpproxy.ini')
        with open(path, 'w') as file:
            file.write(DEMO_INI % folder + provider.ini())
        settings = load(path)
        arrived = provider.sign_in(settings) and take_trip(
            settings, provider.mails)
    if not arrived:
        say('the mail did not arrive; the log above should say why')
        return 1
    tell('')
    tell('The provider took it after the %s login; what arrived:'
         % provider.login)
    tell('')
    for line in smtps.unstuffed(arrived).decode().splitlines():
        tell('  | ' + line)
    return 0


def take_trip(settings, mails):
    """Hands a mail to a proxy; returns what arrives in mails, or None."""
    from email.message import EmailMessage
    import smtplib
    proxy = Proxy(settings)
    proxy.start()
    log_to_stdout()
    port = proxy.server.listeners[0].getsockname()[1]
    tell('A mail from an old printer is handed to port %d, as plain SMTP'
         % port)
    mail = EmailMessage()
    mail['From'], mail['To'] = 'printer@home.lan', 'you@example.org'
    mail['Subject'] = 'It works'
    mail.set_content('A mail on its whole trip through smtpproxy.\n')
    with smtplib.SMTP('127.0.0.1', port, 'printer') as client:
        client.send_message(mail)
    try:
        return mails.get(timeout=20)
    except queue.Empty:
        return None
    finally:
        proxy.stop()


DEMO_INI = """
[config]
host=127.0.0.1
port=0
waitafterpop=2
deleteonerror=false
msgdir=%s/msgs
[printer@home.lan]
localhostname=localhost
smtphost=127.0.0.1
replyto=me@example.org
"""


class DemoProvider:
    """A provider that relays for who has signed in. login: the word for how;
    mails: a queue of what it took."""

    mechanisms = smtps.Session.mechanisms

    def __init__(self):
        self.signed_in, self.mails = False, queue.SimpleQueue()
        self.server = smtps.Server(functools.partial(DemoSession, self))
        self.server.listen('127.0.0.1', 0)
        self.server.start()

    def ini(self):
        """The keys of its account."""
        return 'smtpport=%d\n' % self.server.listeners[0].getsockname()[1]

    def sign_in(self, settings):
        """What a person does there before the first mail. Returns whether it
        went well."""
        return True

    def auth(self, user, password):
        """Raises smtps.Refused."""

    def close(self):
        self.server.stop()


class DemoSession(smtps.Session):
    """A client of a DemoProvider."""

    def __init__(self, provider, client):
        super().__init__(client)
        self.provider, self.mechanisms = provider, provider.mechanisms

    def auth(self, user, password):
        self.provider.auth(user, password)

    def rcpt(self, recipient):
        if not self.provider.signed_in:
            raise smtps.Refused(550, '5.7.1 a %s login first, please'
                                % self.provider.login)

    def data(self, sender, recipients, parameters):
        return DemoMessage(self.provider.mails)


class DemoMessage(smtps.Message):

    def __init__(self, mails):
        self._mails, self._content = mails, b''

    def write(self, chunk):
        self._content += chunk

    def commit(self):
        self._mails.put(self._content)
        return '2.0.0 thank you'


class PopProvider(DemoProvider):
    """POP before SMTP: a POP3 server for one user, who may send mail after
    the login."""

    login = 'POP'

    def __init__(self):
        super().__init__()
        self.sock = socket.create_server(('127.0.0.1', 0))
        threading.Thread(target=self.run, name='demo-pop', daemon=True).start()

    def ini(self):
        return super().ini() + (
            'popbeforesmtp=true\npophost=127.0.0.1\npopport=%d\npopssl=false\n'
            'popusername=me\npoppassword=secret\n'
            % self.sock.getsockname()[1])

    def run(self):
        try:
            while True:
                self.serve(self.sock.accept()[0])
        except OSError:
            pass                        # closed: the demo is over

    def serve(self, client):
        with client, client.makefile('rwb', 0) as file:
            file.write(b'+OK demo POP3 server\r\n')
            for line in file:
                tell('  pop: ' + smtps.plain(line))
                self.signed_in |= line == b'PASS secret\r\n'
                file.write(b'+OK\r\n')

    def close(self):
        super().close()
        self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


class OAuthProvider(DemoProvider):
    """OAuth2: no password is taken, a person signs in at a token server (RFC
    8628) and types the code that --login shows."""

    login, mechanisms = 'XOAUTH2', ('XOAUTH2',)
    code = 'DEMO-CODE'

    def __init__(self):
        from http.server import ThreadingHTTPServer
        super().__init__()
        self.consented, self.token = False, os.urandom(20).hex()
        self.tokens = ThreadingHTTPServer(
            ('127.0.0.1', 0), functools.partial(demo_page(), self))
        self.url = 'http://127.0.0.1:%d' % self.tokens.server_port
        threading.Thread(target=self.tokens.serve_forever, daemon=True,
                         kwargs={'poll_interval': .1},
                         name='demo-tokens').start()

    def ini(self):
        return super().ini() + (
            'oauth=other\noauthclientid=demo\noauthscope=send offline_access\n'
            'oauthtokenurl=%s/token\noauthdeviceurl=%s/device\n'
            'smtpusername=me@example.org\n' % (self.url, self.url))

    def sign_in(self, settings):
        tell('This provider takes no password. So once: --login %s'
             % 'printer@home.lan')
        import argparse
        return login(settings, argparse.Namespace(
            login='printer@home.lan')) == 0

    def auth(self, user, password):
        self.signed_in = password == self.token
        tell('  smtp: XOAUTH2 login of %s, the token is %s' % (
            user, 'good' if self.signed_in else 'wrong'))
        if not self.signed_in:
            raise smtps.Refused(535, '5.7.8 not our token')

    def answer(self, path, form):
        """(status, what a token server says) to a form, or of a page."""
        if path == '/device':
            threading.Thread(target=self.be_the_person, daemon=True,
                             name='demo-person').start()
            return 200, {'device_code': self.token[::-1], 'interval': 1,
                         'user_code': self.code, 'expires_in': 300,
                         'verification_uri': self.url}
        if path == '/' and form.get('code') == self.code:
            self.consented = True
            return 200, {'thank': 'you'}
        if path == '/token' and self.consented:
            return 200, {'access_token': self.token, 'expires_in': 3600,
                         'token_type': 'Bearer', 'scope': form.get('scope'),
                         'refresh_token': self.token[::-1]}
        return 400, {'error': 'authorization_pending'}

    def be_the_person(self):
        """Who has a browser somewhere, and a moment later the code."""
        from http.client import HTTPConnection
        time.sleep(.5)
        tell('  you, at the browser: open %s, type %s, and agree' % (
            self.url, self.code))
        browser = HTTPConnection('127.0.0.1', self.tokens.server_port)
        browser.request('POST', '/', 'code=' + self.code)
        browser.getresponse().read()
        browser.close()

    def close(self):
        super().close()
        self.tokens.shutdown()
        self.tokens.server_close()


def demo_page():
    """A class for http.server: callable(provider, ...)."""
    import json
    from http.server import BaseHTTPRequestHandler
    from urllib.parse import parse_qsl

    class Page(BaseHTTPRequestHandler):

        def __init__(self, provider, *arguments):
            self.provider = provider
            super().__init__(*arguments)

        def do_POST(self):
            form = self.rfile.read(int(self.headers['Content-Length']))
            status, answer = self.provider.answer(
                self.path, dict(parse_qsl(form.decode())))
            self.send_response(status)
            self.send_header('Content-Type', 'application/json')
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *arguments):
            """The demo shows what matters."""

    return Page


DEMOS = {'pop': PopProvider, 'oauth': OAuthProvider}


# --- Set-up: an account without an editor -----------------------------------

SMALL_INI = """\
# Settings of smtpproxy; smtpproxy.ini.example explains every key. For one
# more account: python3 smtpproxy.py --add

[config]
%s# What can't be delivered is kept and tried again.
deleteonerror=false
"""
USUAL_INI = 'smtpproxy.ini'
USUAL_PORT = {'none': 25, 'tls': 587, 'ssl': 465}
OTHER = Provider('other', '', '', 0, '', username='')   # host and port
# What may stand behind --add: answers to its questions, and keys of the ini.
KEYS = ('provider', 'login', 'port') + Account._fields


class NotAdded(Exception):
    """Why there is no new account, for the owner."""


class Ini:
    """An ini that only grows: what is in it stays, byte for byte. It may not
    be there yet. The file is never replaced: it may be a link, or mounted
    alone into a container.

    content: bytes; exists: bool."""

    def __init__(self, path):
        self.path, self.exists, self.content = path, os.path.exists(path), b''
        if self.exists:
            with open(path, 'rb') as file:
                self.content = file.read()

    def require_rights(self):
        """Raises NotAdded before the owner has answered anything."""
        where = self.path if self.exists else os.path.dirname(
            os.path.realpath(self.path))
        if not os.path.exists(where):
            raise NotAdded('there is no folder %s: make it first' % where)
        if not os.access(where, os.W_OK):
            raise NotAdded('%s cannot be changed by user %d: nothing is asked '
                           'and nothing written' % (where, os.getuid()))

    def addition(self, text):
        """The bytes that have to follow, so that text (str, with LF) is a
        part of its own, with the line ends of the file."""
        first = re.search(rb'\r\n|\n|\r', self.content)
        before = '' if not self.content else '\n' if self.content.endswith(
            (b'\n', b'\r')) else '\n\n'
        return (before + text).encode().replace(
            b'\n', first[0] if first else b'\n')

    def append(self, addition):
        """In one write; if that fails, the file is as it was. Raises
        NotAdded."""
        if Ini(self.path).content != self.content:
            raise NotAdded('%s has changed meanwhile: nothing was written, '
                           'start again' % self.path)
        try:
            self._append(os.path.realpath(self.path), addition)
        except OSError as error:
            raise NotAdded('%s cannot be written: %s; nothing was changed' % (
                self.path, error.strerror))

    def _append(self, path, addition):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | (
            0 if self.exists else os.O_CREAT | os.O_EXCL), 0o600)
        try:
            if os.write(file, addition) < len(addition):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file)
            if not self.exists:
                sync_folder(os.path.dirname(path))
        except OSError:
            os.ftruncate(file, len(self.content))
            if not self.exists:
                os.unlink(path)
            raise
        finally:
            os.close(file)


class Interview:
    """Finds the keys of one account: what the command line gives is not
    asked. Who is asked is asked until the ini would take the answer.

    given: {name: text} of the command line, what is used goes; keys: {key:
    text} of the answers; somebody: is there anybody to ask?"""

    def __init__(self, given):
        self.given, self.keys = given, {}
        self.somebody = sys.stdin is not None and sys.stdin.isatty()

    def ask(self, name, question, kind, default=None):
        """An answer, as kind (see Settings) makes it. default: what Enter
        means, and nobody; None: there has to be an answer. Raises NotAdded.
        """
        while True:
            is_given = name in self.given
            text = self.given.pop(name) if is_given else self._answer(
                name, question, default)
            try:
                if not (text or is_given or default is not None):
                    raise ValueError('is needed')
                return kind(text, tell)
            except ValueError as error:
                if is_given or not self.somebody:
                    raise NotAdded('%s %s' % (name, error))
                tell('It %s.' % error)

    def key(self, key, question='', default=None):
        """The same for a key of the account; it is kept unless empty. What an
        ini would only warn of is asked again."""
        kind = Account.__annotations__.get(key, one_line)

        def warn(what):
            if self.somebody:
                raise ValueError(what)
            tell('%s %s' % (key, what))
        value = self.ask(key, question, lambda text, _: kind(
            for_ini(key, text), warn), default)
        text = str(value).lower() if isinstance(value, bool) else str(value)
        if text:
            self.keys[key] = text
        return value

    def take_the_rest(self):
        """What is given and was not asked is the ini's to judge."""
        for key in list(self.given):
            text = self.ask(key, '', lambda text, warn: for_ini(key, text))
            if text:
                self.keys[key] = text

    def tell(self, text):
        """What helps whoever is asked, in lines as wide as a terminal."""
        if self.somebody:
            import textwrap
            for line in textwrap.wrap(text, 79, break_on_hyphens=False):
                tell(line)

    def agrees(self, question):
        """Whether there is somebody who says yes."""
        return self.ask('', question + ' yes or no', lambda text, warn:
                        text.lower() in ('y', 'yes'), 'no')

    def _answer(self, name, question, default):
        """What is typed, without the blanks around it; - for nothing."""
        if not self.somebody:
            if default is None:
                raise NotAdded('%s is missing%s: nobody can be asked here, so '
                               'it must stand behind --add' % (
                                   name, ' (smtpusername= for none)'
                                   if name == 'smtpusername' else ''))
            return str(default)
        if name.endswith(SECRETS):
            return read_secret(question)
        try:
            text = input('%s%s: ' % (question, (
                ' [%s]' % default if default else ''))).strip()
        except EOFError:
            raise NotAdded('nothing was written')
        return '' if text == '-' else text or str(default or '')


def read_secret(question):
    """A line that is not shown while it is typed."""
    if sys.stdin is not None and sys.stdin.isatty():
        import getpass
        try:
            return getpass.getpass(question + ' (not shown): ')
        except EOFError:
            raise NotAdded('nothing was written')
    return sys.stdin.readline().rstrip('\r\n') if sys.stdin else ''


def for_ini(key, text):
    """text, if an ini gives it back as it is. Raises ValueError."""
    if '\n' in text or '\r' in text:
        raise ValueError('has more than one line')
    if text != text.strip():
        raise ValueError('begins or ends with a blank, which an ini can not '
                         'hold' + (': use %sfile' % key if key.endswith(
                             'password') else ''))
    if text.encode('utf-8', 'replace').decode() != text:
        raise ValueError('has characters that are no UTF-8')
    return text


def given_keys(words):
    """{key: value} of the command line. A password is not shown there to all
    who call ps: it is read, in the order of the words. Raises NotAdded."""
    given, pairs = {}, [word.partition('=') for word in words]
    for key, equals, _ in pairs:
        if not equals:
            raise NotAdded('what stands behind --add SENDER must be key=value')
        if key not in KEYS:
            raise NotAdded('%s is no key of an account%s' % (
                key, nearest(key.lower(), KEYS)))
    for key, _, value in pairs:
        if key in given:
            raise NotAdded('%s is there twice' % key)
        if key.endswith(SECRETS):
            if value != '-':
                raise NotAdded('%s must not stand there, where others can see '
                               'it: %s=- reads it from stdin' % (key, key))
            value = read_secret(key)
            if not value:
                raise NotAdded('%s is empty on stdin: nothing was written'
                               % key)
        given[key] = value
    return given


def add(options):
    """--add [SENDER [key=value ...]]: one account more in the ini. Raises
    NotAdded."""
    ini = Ini(options.config)
    ini.require_rights()
    now = load(ini.path, ini.content)
    interview = Interview({'sender': options.add[0]} if options.add else {})
    sender = interview.ask(
        'sender', 'The address that your device sends from',
        functools.partial(new_section, now))
    interview.given = given_keys(options.add[1:])
    ask_account(interview, sender)
    text = '' if ini.exists else SMALL_INI % ask_port(interview, now) + '\n'
    interview.take_the_rest()
    addition = ini.addition(text + section_of(sender, interview.keys))
    settings = load(ini.path, ini.content + addition)
    require_trial(interview, settings, sender)
    ini.append(addition)
    tell('%s has a new section: [%s]' % (shown_path(ini.path), sender))
    options.login = sender
    signed_in = first_sign_in(settings, options, interview.keys)
    for warning in settings.warnings:
        if warning not in now.warnings:
            tell('warning: ' + warning)
    tell_device(settings, sender)
    code = wake_service(settings)
    if not signed_in:
        say('go on with --login %s' % sender)
    return code or int(not signed_in)


def first_sign_in(settings, options, keys):
    """What a new account by OAuth2 still needs; returns whether it has it.
    With use= another account may have it already."""
    account = settings.account_for(options.login)
    try:
        if 'oauth' in keys:
            return login(settings, options) == 0
        if account.oauth:
            become_owner(settings.config)
            return trial(settings, account)
    except (KeyboardInterrupt, OSError) as error:
        say('not finished: %s' % (
            getattr(error, 'strerror', None) or 'interrupted'))
        return False
    return True


def new_section(settings, text, warn):
    """The name of a section that is not there yet. Raises ValueError."""
    if text.lower() in settings.accounts:
        raise ValueError('= %s has a section in %s already: change it there'
                         % (text, settings.file))
    if text.lower() != 'default' and not (text.isprintable() and re.match(
            r'(\*|[^][<>@\s]+)@[^][<>@\s]+\Z', text)):
        raise ValueError('must be an address such as printer@home.lan, '
                         '*@home.lan for its whole domain, or default')
    return for_ini('sender', text)


def section_of(name, keys):
    """The lines of an account, in the order of the keys in README.md."""
    known = [key for key in Account._fields if key in keys]
    return '[%s]\n' % name + ''.join(
        '%s=%s\n' % (key, keys[key])
        for key in known + sorted(keys.keys() - set(known)))


def require_trial(interview, settings, sender):
    """Tries the account, but for one that has to sign in first. Raises
    NotAdded unless it works or the owner wants it all the same."""
    for problem in settings.missing:
        tell(problem)
    account = settings.account_for(sender)
    # A sign-in is not root's to use: see add().
    if not account.oauth and not trial(settings, account) and (
            not interview.agrees('It does not work. Write it all the same?')):
        raise NotAdded('it does not work: nothing was written')


# What is asked.

def ask_account(interview, sender):
    """Asks for what an account of this sender needs."""
    given = interview.given
    if 'use' in given:
        return                          # it is the only key
    provider = ask_provider(interview, sender)
    ask_server(interview, provider)
    way = ask_way(interview, provider)
    address = ''
    if way == 'pop':
        ask_pop(interview)
    if way in ('password', 'oauth') or 'smtpusername' in given:
        address = ask_user(interview, provider, sender)
    if way == 'oauth':
        ask_oauth(interview, provider)
    elif 'smtpusername' in interview.keys and 'smtppasswordfile' not in given:
        interview.key('smtppassword', 'Password')
    if address.lower() != sender.lower() and (
            address or provider is not OTHER):
        interview.key('forcefrom', 'From address of its mails; - leaves that '
                      'of the device', address)


def ask_provider(interview, sender):
    if 'smtphost' in interview.given and 'provider' not in interview.given:
        return OTHER
    known = {provider.name: provider for provider in (*PROVIDERS, OTHER)}
    domain, usual = sender.lower().rpartition('@')[2], None
    for provider in PROVIDERS:
        if domain in provider.domains.split():
            usual = provider.name
    if 'provider' not in interview.given:
        interview.tell('Providers: %s (with its server and port).'
                       % ', '.join(known))
    provider = known[interview.ask('provider', 'Your provider', Choice(
        *known), usual)]
    if provider.note:
        interview.tell('Note: %s.' % provider.note)
    return provider


def ask_server(interview, provider):
    """Of a provider all is known, unless it has a server for each region."""
    if provider is not OTHER:
        for key in 'smtphost', 'smtpport', 'smtpsecurity':
            if key not in provider.note:
                interview.given.setdefault(key, str(getattr(provider, key)))
    interview.key('smtphost', 'Its server for outgoing mail',
                  provider.smtphost or None)
    security = interview.key(
        'smtpsecurity', 'Encryption: tls (STARTTLS), ssl or none', 'tls')
    interview.key('smtpport', 'Its port', USUAL_PORT[security])


def ask_way(interview, provider):
    """How the server knows who sends: 'password', 'pop', 'oauth', 'none'."""
    given = interview.given
    if 'oauth' in given:
        return 'oauth'
    if 'popbeforesmtp' in given and interview.key('popbeforesmtp'):
        return 'pop'
    if any(key.startswith('smtppassword') for key in given):
        return 'password'
    if provider is not OTHER or 'smtpusername' in given:
        return 'oauth' if provider.oauth else 'password'
    return interview.ask(
        'login', 'It knows you by password, pop (a POP login first), oauth or '
        'none', Choice('password', 'pop', 'oauth', 'none'),
        'password')


def ask_user(interview, provider, sender):
    """The login's name. Returns the mail address that it belongs to, or ''.
    """
    wanted, usual = provider.username, None
    if wanted not in ('', 'address', 'local'):
        interview.given.setdefault('smtpusername', wanted)
    if sender.lower().rpartition('@')[2] in provider.domains.split():
        usual = sender
    user = interview.key('smtpusername', 'Your %s there' % (
        'mail address' if wanted in ('address', 'local') else 'user name'),
        usual)
    if wanted == 'local':
        interview.keys['smtpusername'] = user.partition('@')[0]
    return user if '@' in user else ''


def ask_pop(interview):
    interview.keys['popbeforesmtp'] = 'true'
    interview.key('pophost', 'Its POP server')
    secure = interview.key('popssl', 'TLS with it, true or false', 'true')
    interview.key('popport', 'Its port', 995 if secure is True else 110)
    interview.key('popusername', 'Your user name there')
    if 'poppasswordfile' not in interview.given:
        interview.key('poppassword', 'POP password')


def ask_oauth(interview, provider):
    if provider.oauth:
        interview.given.setdefault('oauth', provider.oauth)
    kind = interview.key('oauth', 'OAuth2 of microsoft, google or other',
                         'other')
    interview.key('oauthclientid', 'The id of your app registration')
    if kind == 'microsoft':
        interview.key('oauthtenant', 'The tenant: its domain or id, or common',
                      'consumers' if provider.name == 'outlook' else 'common')
    elif kind == 'google':
        interview.key('oauthclientsecret', 'The secret of your app')
    else:
        interview.key('oauthtokenurl', 'The address that gives tokens')
        interview.key('oauthscope', 'The scope to ask for')
        if not interview.key('oauthdeviceurl', 'The address for device codes',
                             ''):
            interview.key('oauthauthurl', 'The address to sign in at')


def ask_port(interview, settings):
    """The line with the port for a new ini, '' if it is the usual one."""
    def usable(text, warn):
        port, proxy = port_number(text, warn), Proxy(settings)
        try:
            proxy.listen('', port)
        except StartError as error:
            raise ValueError('can not be used: %s' % error)
        finally:
            proxy.server.stop(0)
        return port
    if 'port' not in interview.given:
        try:
            usable('25', tell)
            return ''
        except ValueError as error:
            interview.tell('Port 25 %s.' % error)
    return 'port=%d\n' % interview.ask('port', 'The port for your devices',
                                       usable, 2525)


# What the owner is told.

def tell_device(settings, sender):
    config = settings.config
    whose = {'default': 'any address'}.get(sender.lower(), sender)
    if sender.startswith('*@'):
        whose = 'any address with ' + sender[1:]
    tell('')
    tell('Set in the device:')
    for what, value in (
            ('SMTP server', config.host or own_address()),
            ('port', '%d' % config.port),
            ('encryption', 'STARTTLS or none' if config.tlscert else 'none'),
            ('sender', whose),
            ('login', '%s, with its localpassword' % sender
             if settings.accounts[sender.lower()].localpassword else 'none')):
        tell('    %-12s %s' % (what, value))
    tell('')


def shown_path(path):
    """In full, unless the file is in the current folder."""
    full = os.path.abspath(path)
    return path if os.path.dirname(full) == os.getcwd() else full


def config_option(path):
    """What a command needs to take this ini, to be typed into a shell."""
    import shlex
    return '' if path == USUAL_INI else ' --config ' + shlex.quote(path)


def own_address():
    """How devices reach this box, as far as it can know."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(('192.0.2.1', 9))      # finds the way, sends nothing
        except OSError:
            return HOST
        return sock.getsockname()[0]


def wake_service(settings):
    """Has the service read its ini again, if there is one. Returns 1 if that
    failed."""
    id, what = reload_request(settings.file)
    spool = command_spool(settings)
    try:
        if os.path.isdir(spool.folder):
            spool.open(patience=0)
            spool.close()
        tell('Now start it: python3 smtpproxy.py'
             + config_option(settings.file))
    except Busy:
        return ask_service(spool, [id], what, settings.config.sleeptime)
    except OSError as error:
        tell('%s: %s; if the service runs, have it reload (SIGHUP)' % (
            spool.folder, error.strerror))
    return 0


# --- Main -------------------------------------------------------------------

def parse(arguments):
    import argparse
    parser = argparse.ArgumentParser(
        prog='smtpproxy.py', description='Hands on the mail of devices that '
        'can not talk to today\'s mail servers.')
    parser.add_argument('--config', metavar='FILE', default=USUAL_INI,
                        help='the ini (default: ./smtpproxy.ini)')
    add = parser.add_mutually_exclusive_group().add_argument
    add('--check', action='store_true', help='look for mistakes, do not start')
    add('--demo', nargs='?', const='pop', choices=sorted(DEMOS),
        metavar='oauth', help='the whole trip of a mail, here')
    add('--test', nargs='*', metavar=('SENDER', 'RECIPIENT'),
        help='go the way that mail would go')
    add('--login', metavar='ADDRESS', help='sign in by OAuth2')
    add('--logout', metavar='ADDRESS', help='forget a sign-in')
    add('--add', nargs='*', metavar=('SENDER', 'key=value'),
        help='ask for an account, try it, put it into the ini')
    add('--queue', action='store_true', help='what waits in msgs/')
    add('--retry', metavar='ID', nargs='+', help='try mails, or all, now')
    add('--delete', metavar='ID', nargs='+', help='remove mails')
    add('--show', metavar='ID', help='print a mail as it would be sent')
    add('--handler-test', metavar='FILE', help='what handlers would change')
    add('--version', action='version', version='smtpproxy ' + VERSION)
    parser.add_argument('--json', action='store_true', help='with --queue')
    options = parser.parse_args(arguments)
    if options.json and not options.queue:      # or the service would start
        parser.error('--json goes with --queue')
    return options


COMMANDS = {'queue': show_queue, 'retry': ask, 'delete': ask, 'show': show,
            'handler_test': handler_test, 'login': login, 'logout': logout,
            'test': test}


class Stopped(Exception):
    """The owner has stopped the service before all was up."""


def asks_to_stop(came):
    """Is SIGTERM or SIGINT among these numbers (bytes)?"""
    return signal.SIGTERM in came or signal.SIGINT in came


class Signals:
    """What the owner asks of the service: SIGTERM and SIGINT to stop, SIGHUP
    to reload. None is missed, whenever it comes: the interpreter writes its
    number into a pipe at once. A Python function would have to wait until
    the main thread runs again, which sleeps."""

    OURS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP

    def __init__(self):
        self._reader, writer = os.pipe()    # closed in what is started
        self._kept = b''
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in self.OURS:
            signal.signal(number, lambda number, frame: None)
        # A handler may fork. Who ends the child must not end the service.
        os.register_at_fork(before=self._block, after_in_parent=self._unblock,
                            after_in_child=self._leave)

    def wait(self):
        """The numbers (bytes) of those that came since the last time."""
        came, self._kept = self._kept, b''
        return came or os.read(self._reader, 65536)

    def pause(self, seconds):
        """Sleeps, less if a signal comes. Raises Stopped; any other signal
        is kept for wait()."""
        if select.select([self._reader], [], [], seconds)[0]:
            self._kept += os.read(self._reader, 65536)
        if asks_to_stop(self._kept):
            raise Stopped

    def ignore(self):
        """From now on. While the interpreter goes down it would not, and
        exit code 0 would be lost."""
        # Python complains of a signal that comes just between the two states.
        sys.unraisablehook = lambda unraisable: None
        for number in self.OURS:
            signal.signal(number, signal.SIG_IGN)

    def _block(self):
        signal.pthread_sigmask(signal.SIG_BLOCK, self.OURS)

    def _unblock(self):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.OURS)

    def _leave(self):
        """In a child: it is a program of its own."""
        signal.set_wakeup_fd(-1)
        for number in self.OURS:
            signal.signal(number, signal.SIG_DFL)
        self._unblock()


def serve(settings):
    """Until SIGTERM or SIGINT, also if that comes before all is up. Raises
    StartError."""
    signals = Signals()
    proxy = Proxy(settings, signals.pause)
    try:
        proxy.start()
    except Stopped:
        signals.ignore()
        return 0
    for warning in settings.warnings + proxy.handlers.problems:
        if not on_terminal():           # there the log has shown it
            say(warning)
    say('%s listens on %s' % (VERSION, proxy.ports()), sys.stdout)
    serve_until_stopped(proxy, signals)
    proxy.stop()
    signals.ignore()
    return 0


def serve_until_stopped(proxy, signals):
    while True:
        came = signals.wait()
        if asks_to_stop(came):
            return
        proxy.reload()


def main(arguments):
    """Returns the exit code."""
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, 'reconfigure'):      # None without a terminal
            stream.reconfigure(errors='backslashreplace')
    options = parse(arguments)
    try:
        if options.demo:
            return demo(options)
        if options.add is not None:
            return add(options)
        if options.check:
            return check(options)
        settings = load(options.config)
        for name, command in COMMANDS.items():
            if getattr(options, name) not in (None, False):
                return command(settings, options)
        return serve(settings)
    except FileNotFoundError as error:
        say('%s is missing%s' % (os.path.abspath(error.filename), (
            ': make it with%s --add, or of smtpproxy.ini.example, or see how '
            'it works with --demo' % config_option(options.config))
            if error.filename == options.config else ''))
    except (ConfigError, StartError, NotAdded) as error:
        for line in str(error).splitlines():
            say(line)
    except OSError as error:
        say('%s: %s' % (error.filename or 'error', error.strerror or error))
    except (ImportError, LookupError) as error:
        if isinstance(error, (KeyError, IndexError)):
            raise                       # an error of ours
        say(missing_module(error))
    except KeyboardInterrupt:
        say('interrupted')
    return 1


if __name__ == '__main__':
    if HOME not in sys.path:
        sys.path.insert(0, HOME)
    sys.exit(main(sys.argv[1:]))
