#!/usr/bin/env python3
"""smtpproxy - hands on the mail of devices that can't talk to mail servers.

Printers, cameras and old programs speak plain SMTP to this box; it keeps
their mail safe in msgs/, lets handlers look at it, and delivers it through
the account that belongs to the sender, with all that the account needs.

    client -> smtps.Server -> Intake -> Spool -> Relay -> Courier -> server
                                                   |
                                                Handlers

The sections are in the order of a mail's journey, each uses only those
above it: Settings, Log, Spool, Front door, Handlers, Courier, Relay, Proxy,
Commands, Main. The keys of the ini are explained in smtpproxy.ini.example.
"""
import binascii
import collections
import contextlib
import errno
import functools
import heapq
import os
import queue
import re
import signal
import socket
import stat
import sys
import threading
import time
import zlib
from typing import NamedTuple

VERSION = '2.0.0'
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
    """What is wrong with the ini: args[0] is a list of str, one a mistake."""

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


def mail_address(text, warn):
    """'a@b' or 'Name <a@b>'."""
    if text and not re.match(r'[^<>\r\n]*<[^<>@\s]+@[^<>@\s]+>$|'
                             r'[^<>@\s]+@[^<>@\s]+$', text):
        raise ValueError('must be a mail address')
    return one_line(text, warn)


def file_path(text, warn):
    return one_line(text, warn)


def pem_file(text, warn):
    file_path(text, warn)
    if text and not os.access(text, os.R_OK):
        raise ValueError('there is no such file that we may read')
    return text


port_number = Number(0, 65535)
DAY = 86400     # seconds


# In these classes: field name = ini key, annotation = how it is read, default
# = default.

class Config(NamedTuple):
    """[config]"""
    port: port_number = 25
    host: one_line = ''
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
    tlscert: pem_file = ''
    tlskey: pem_file = ''
    tlsport: port_number = 0
    tlsweak: boolean = False
    user: one_line = ''
    group: one_line = ''


class Logging(NamedTuple):
    """[logging]"""
    file: file_path = 'smtpproxy.log'
    size: Capped(0, 1000000000) = 1000000
    count: Capped(0, 1000) = 10
    level: Choice('DEBUG', 'INFO', 'WARNING', 'ERROR', 'NONE') = 'INFO'


class Account(NamedTuple):
    """One sender's way out: [<address>], [*@domain] or [default]."""
    localhostname: word = ''
    smtphost: one_line = ''
    smtpport: port_number = 0
    smtpsecurity: Choice('none', 'tls', 'ssl') = 'none'
    smtpusername: one_line = ''
    smtppassword: one_line = ''
    smtpauth: Choice('auto', 'plain', 'login', 'cram-md5') = 'auto'
    smtpweaktls: boolean = False
    smtpconnections: Number(1, 100) = 4
    tlsverify: boolean = True
    tlscafile: pem_file = ''
    popbeforesmtp: boolean = False
    pophost: one_line = ''
    popport: port_number = 995
    popssl: boolean = True
    popusername: one_line = ''
    poppassword: one_line = ''
    popcheckdelay: Capped(0, DAY) = 60
    returnpath: mail_address = ''
    replyto: mail_address = ''
    forcefrom: mail_address = ''
    localpassword: one_line = ''
    use: one_line = ''

    @property
    def server(self):
        return '%s:%d' % (self.smtphost, self.smtpport)

    def __repr__(self):
        return 'Account(%s)' % ', '.join(
            '%s=%s' % (key, masked(key, value))
            for key, value in self._asdict().items())


class Settings(NamedTuple):
    """Never changed: a reload builds a new one. accounts: {lower-case section
    name: Account}, handlers: {name: {key: value}}, warnings: [str]."""
    file: str
    config: Config
    logging: Logging
    accounts: dict
    handlers: dict
    warnings: list

    def account_for(self, sender):
        """The Account of an envelope sender (str), or None."""
        return self.accounts.get(self.section_for(sender))

    def section_for(self, sender):
        """The lower-case name of the section, or None."""
        sender = sender.lower()
        domain = sender.rpartition('@')[2] if '@' in sender else None
        for name in sender, '*@%s' % domain, 'default':
            if name in self.accounts:
                return name


def masked(key, value):
    """value as it may be shown."""
    return '***' if value and key.endswith('password') else repr(value)


def nearest(word, known):
    """A hint at the known word that was meant, or ''."""
    import difflib
    near = difflib.get_close_matches(word, known, 1, 0.6)
    return ': do you mean %s?' % near[0] if near else ''


def load(path):
    """Reads an ini file into Settings. Raises ConfigError with every mistake
    in it, or OSError."""
    return IniReader(path).settings()


class IniReader:
    """Turns an ini file into Settings and collects what is wrong with it."""

    def __init__(self, path):
        self.path, self.mistakes, self.warnings = path, [], []
        self.folder = os.path.dirname(os.path.abspath(path))
        self.parser = self.parse(self.read())

    def read(self):
        with open(self.path, encoding='utf-8-sig') as file:
            try:
                return file.read()
            except UnicodeDecodeError as error:
                raise ConfigError(['%s: byte %d is not UTF-8: save the file '
                                   'as UTF-8' % (self.path, error.start)])

    def parse(self, text):
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
                parser.read_string('\n'.join(lines), self.path)
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
                self.mistakes.append('%s line %d: %s' % (
                    self.path, number, what))

    def settings(self):
        config, logs, accounts, handlers = Config(), Logging(), {}, {}
        seen = set()
        for section in self.parser.sections():
            name = ' '.join(section.lower().split())
            if name in seen:
                self.complain(section, '', 'is there twice: letters large and '
                              'small are the same in a name')
            elif name == 'config':
                config = self.read_section(section, Config)
            elif name == 'logging':
                logs = self.read_section(section, Logging)
            elif name.startswith('handler ') and '@' not in name:
                handlers[section.split(None, 1)[1].strip()] = dict(
                    self.parser[section])
            elif not name.startswith('\1'):
                accounts[name] = self.read_section(section, Account)
            seen.add(name)
        self.resolve(accounts)
        config, logs = self.complete(config, logs)
        if self.mistakes:
            raise ConfigError(self.mistakes)
        return Settings(self.path, config, logs, accounts, handlers,
                        self.warnings + self.careless(config, accounts))

    def complain(self, section, key, what):
        self.mistakes.append('%s: [%s] %s%s' % (
            self.path, section, key and key + ' ', what))

    def warn(self, section, key, what):
        self.warnings.append('%s: [%s] %s %s' % (
            self.path, section, key, what))

    def read_section(self, section, shape):
        """A shape (Config, Logging, Account) from one section."""
        found = {}
        for key, value in self.parser[section].items():
            if key not in shape._fields:
                self.complain(section, key, 'is no key here' + self.nearest(
                    key, shape))
            elif '\n' in value:
                self.complain(section, key, 'has more than one line: does '
                              'the next one begin with a blank?')
            else:
                found[key] = self.convert(
                    section, key, value, shape.__annotations__[key])
        if shape is Account:
            self.check_account(section, found)
        return shape(**{key: value for key, value in found.items()
                        if value is not None})

    @staticmethod
    def nearest(key, shape):
        """A hint at the name that was meant."""
        if shape is Account and (key in Config._fields
                                 or key in Logging._fields):
            kind = 'config' if key in Config._fields else 'logging'
            return ': it belongs into [%s]' % kind
        if shape is not Account and key in Account._fields:
            return ': it belongs into the section of an account'
        return nearest(key, shape._fields) or (
            '; known are ' + ', '.join(shape._fields))

    def convert(self, section, key, text, kind):
        """The value of a key; None after a complaint."""
        if kind in (file_path, pem_file) and text:
            text = os.path.join(self.folder, os.path.expanduser(text))
        try:
            return kind(text, functools.partial(self.warn, section, key))
        except ValueError as error:
            self.complain(section, key, '= %s: %s' % (
                '***' if key.endswith('password') else text, error))

    def check_account(self, section, found):
        """What an account needs, and what follows from what."""
        if found.get('use'):
            if len(found) > 1:
                self.complain(section, 'use', 'must be the only key here')
            return
        for key in ('smtphost',) + (
                ('pophost', 'popusername', 'poppassword')
                if found.get('popbeforesmtp') else ()):
            if found.get(key, '') == '':
                self.complain(section, key, 'is missing')
        if not found.get('smtpport'):
            implicit = found.get('smtpsecurity') == 'ssl'
            found['smtpport'] = 465 if implicit else 25
        if bool(found.get('smtpusername')) != bool(found.get('smtppassword')):
            self.warnings.append(
                '%s: [%s] has smtpusername or smtppassword without the other: '
                'there will be no login' % (self.path, section))

    def resolve(self, accounts):
        """Puts the account that is meant in the place of each use=."""
        for name, account in list(accounts.items()):
            path = [name]
            while account is not None and account.use:
                target = account.use.lower()
                account = accounts.get(target)
                if account is None:
                    self.complain(name, 'use', '= %s: there is no such section'
                                  % target + nearest(target, accounts))
                elif target in path:
                    self.complain(name, 'use', 'goes round in a circle: '
                                  + ' -> '.join(path + [target]))
                    account = None
                path.append(target)
            if account is not None:
                accounts[name] = account

    def complete(self, config, logs):
        """Defaults that depend on something else, checks across keys."""
        if not os.path.isabs(config.msgdir):
            config = config._replace(msgdir=os.path.join(HOME, 'msgs'))
        if os.path.realpath(config.msgdir) in map(os.path.realpath, (
                HOME, self.folder)):
            self.complain('config', 'msgdir', '= %s: must be a folder of its '
                          'own: what is no mail there is moved to corrupt/'
                          % config.msgdir)
        if not os.path.isabs(logs.file):
            logs = logs._replace(file=os.path.join(self.folder, logs.file))
        if bool(config.tlscert) != bool(config.tlskey):
            self.complain('config', 'tlscert', 'and tlskey go together')
        if config.tlsport and not config.tlscert:
            self.complain('config', 'tlsport', 'needs tlscert and tlskey')
        try:
            Networks(config.allow)
        except ValueError as error:
            self.complain('config', 'allow', '%s: use networks such as '
                          '192.168.1.0/24, or any' % error)
        try:
            identity(config)
        except KeyError as error:
            self.complain('config', 'user or group', '%s is not known on '
                          'this box' % error)
        return config, logs

    def careless(self, config, accounts):
        """Warnings: what works, but may not be what the owner wants."""
        passwords = [(section, key, value)
                     for section in self.parser.sections()
                     for key, value in self.parser[section].items()
                     if key.endswith('password')]
        found = ['%s: [%s] %s has %%%%: smtpproxy 1.x read it as one %%, 2.0 '
                 'takes it as it stands' % (self.path, section, key)
                 for section, key, value in passwords if '%%' in value]
        if not accounts:
            found.append('%s: no account: all mail will be refused. Add a '
                         'section such as [default]' % self.path)
        if passwords:
            found += warn_of_secrets(self.path, service_group(config))
        return (found + warn_of_folder(config.msgdir)
                + warn_of_program(self.path))


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
        mend = 'chgrp %d %s; chmod 640 %s' % (group, path, path)
    return ['%s: others on this box can read the passwords in it: %s'
            % (path, mend)]


def warn_of_folder(path):
    """[a warning] if others than its owner may look into a folder of ours.
    We make them so that they can't, but an older one stays as it was."""
    if not os.path.isdir(path) or not os.stat(path).st_mode & 0o077:
        return []
    return ['%s: others on this box can read or change what is in it: '
            'chmod 700 %s' % (path, path)]


def warn_of_program(ini):
    """[a warning] if root runs what others may change: whoever breaks into
    the service could have root do anything at the next start."""
    if os.getuid() != 0:
        return []
    for path in [*program_files(), ini]:
        weak = changeable(path)
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


def changeable(path):
    """What lets others than root put something else in the place of path:
    itself, a link or a folder above it; None if nothing does."""
    for path in os.path.abspath(path), os.path.realpath(path):
        sticky = 0
        while os.path.lexists(path):
            info = os.lstat(path)
            writers = 0o002 if info.st_gid == 0 else 0o022
            if info.st_uid != 0 or info.st_mode & writers and not (
                    info.st_mode & sticky or stat.S_ISLNK(info.st_mode)):
                return path
            if path == os.path.dirname(path):
                break
            # In a folder such as /tmp nobody can rename what is root's.
            path, sticky = os.path.dirname(path), stat.S_ISVTX
    return None


class Networks:
    """The clients that may send: 'a in Networks(...)'. Raises ValueError."""

    def __init__(self, text):
        import ipaddress
        self.address = functools.lru_cache(256)(ipaddress.ip_address)
        words = text.replace(',', ' ').split()
        self.all = [word.lower() for word in words] == ['any']
        if not words:
            raise ValueError('is empty')
        self.networks = [] if self.all else [
            ipaddress.ip_network(word, strict=False) for word in words]

    def __contains__(self, address):
        address = self.address(address)
        address = getattr(address, 'ipv4_mapped', None) or address
        return self.all or any(address in n for n in self.networks)


# --- Log: one line a step, for the owner ------------------------------------

class LogFile(logging.Handler):
    """A file that starts anew at size bytes; count old ones are kept. What
    can't be written is said once on stderr: a full disk is the log's trouble
    and never the mail's.

    Whoever touches the descriptor holds logging's lock of this handler: its
    number is soon another file's, a mail's perhaps. A thread that looked the
    handlers up before a reload may write after close(): its line still goes
    to the log, which is open for that line only."""

    def __init__(self, path, size, count):
        super().__init__()
        self.path, self.size, self.count = path, size, count
        self.file, self.written, self.broken = None, 0, ''
        self.closed = False

    def emit(self, record):
        """Under the lock: see logging.Handler.handle."""
        line = (self.format(record) + '\n').encode('utf-8', 'replace')
        try:
            if self.file is None:
                self.open()
            if self.size and self.written + len(line) > self.size and (
                    self.written):
                self.rotate()
            os.write(self.file, line)
            self.written += len(line)
        except OSError as error:
            self.complain('written', error)
        if self.closed:
            self.close_file()

    def open(self):
        self.file = os.open(
            self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
        self.written = os.fstat(self.file).st_size

    def rotate(self):
        """smtpproxy.log becomes smtpproxy.log.1, that one .2, and so on. If
        that can't be, it goes on in the same file and tries much later."""
        self.written = 0
        names = [self.path] + [
            '%s.%d' % (self.path, n + 1) for n in range(self.count)]
        try:
            for old, new in reversed(list(zip(names, names[1:]))):
                if os.path.exists(old):
                    os.replace(old, new)
            if not self.count:
                os.unlink(self.path)
            full = self.file
            self.open()                 # if it can't, the full one goes on
            os.close(full)
        except OSError as error:
            self.complain('renamed', error)

    def complain(self, what, error):
        if self.broken != str(error):
            self.broken = str(error)
            say('the log %s cannot be %s: %s; mail goes on'
                % (self.path, what, error))

    def close_file(self):
        file, self.file = self.file, None
        if file is not None:
            os.close(file)

    def close(self):
        self.acquire()
        try:
            self.closed = True
            self.close_file()
        finally:
            self.release()
        super().close()


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

    second = clock = None

    def format(self, record):
        message = self.message_of(record)
        second = int(record.created)
        if second != self.second:       # of many lines a second, format one
            self.clock = time.strftime(
                '%Y-%m-%d %H:%M:%S', time.localtime(second))
            self.second = second
        return '%s,%03d %s %s' % (self.clock, record.msecs, record.levelname,
                                  message)

    def message_of(self, record):
        lines = [printable(record.getMessage())]
        if record.exc_info:
            lines += ['    ' + printable(line) for line in
                      self.formatException(record.exc_info).splitlines()]
        return '\n'.join(lines)


class ForCommand(OneLine):
    """The log among the lines of a command: what, but not when."""

    def format(self, record):
        return '  log: ' + self.message_of(record)


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
    folder = os.path.dirname(settings.logging.file)
    if settings.logging.size and os.path.isdir(folder) and not os.access(
            folder, os.W_OK):
        log.warning('%s: user %d may not make files there, so the log can not '
                    'begin anew and grows: set file=log/smtpproxy.log in '
                    '[logging] and give the folder log to that user',
                    folder, os.getuid())


class HandlerLog:
    """The logger that a handler gets: the names of 1.x and those of logging.
    Every line begins with the id of the mail at hand."""

    def __init__(self, name):
        self.name, self.id = name, '-'

    def write(self, level, message, *arguments, **options):
        text = str(message) % arguments if arguments else str(message)
        log.log(level, '%s: handler %s: %s', self.id, self.name, text,
                **options)

    at = functools.partialmethod
    log = info = at(write, logging.INFO)
    logerr = error = critical = at(write, logging.ERROR)
    logwarn = warning = warn = at(write, logging.WARNING)
    logdebug = debug = at(write, logging.DEBUG)
    exception = at(write, logging.ERROR, exc_info=True)


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
    lines = smtps.DataReader.LINE_END.sub(b'\r\n', message)
    if not lines.endswith(b'\r\n'):
        lines += b'\r\n'
    return (b'\r\n' + lines).replace(b'\r\n.', b'\r\n..')[2:-2] + b'\r\n'


def unstuffed(content):
    """The message that content is on the wire."""
    return (b'\r\n' + content).replace(b'\r\n.', b'\r\n')[2:]


class Unreadable(Exception):
    """A file in msgs/ that is no mail of ours; says why."""


class Unfinished(Exception):
    """A file in msgs/ whose end is missing: it was never promised."""


END = b'\r\n.\r\nNOOP crc32='     # no mail can hold this: its dots are doubled
END_SIZE = len(END) + len(b'01234567\r\n')
STATE = re.compile(rb'NOOP state=(\{[^\r\n]*\}) crc32=([0-9a-f]{8})\r\n')
HANDLED = b'NOOP handled\r\n'
STORED = re.compile(r'<([^\x00-\x1f\x7f]*)>(?: [^\x00-\x1f\x7f]*)?\Z')
FRESH, FRESH_SIZE = 32, 16384   # mails kept in memory as well; bytes of one
PUSH = 4 << 20                  # bytes of a large mail between two pushes


class Mail:
    """One mail in the spool.

    For handlers: to (list of Address), frm (Address), msg (bytes, read when
    asked for; assign to change it). id: str; handled: bool; tries: int; due:
    seconds since 1970, for people; problem: str, why it is still here; parked:
    bool; flaw: str, why its envelope must not be sent, or ''. start, body,
    dot: offsets of the header, of the empty line behind it, and of what
    follows the final dot's line."""

    # What is kept while it is in trouble, and its types.
    STATE = {'to': list, 'refused': dict, 'tries': int, 'due': float,
             'problem': str, 'handled': bool, 'parked': bool}

    def __init__(self, id, path, data=None):
        self.id, self.path, self.data = id, path, data
        self.tries, self.due, self.problem = 0, 0.0, ''
        self.handled = self.parked = False
        self.refused = {}           # {recipient: reply}, refused for good
        self.flaw = ''
        self._msg, self.seen = None, 0
        self.read()
        self.saved = self.state()

    def read(self):
        """The envelope, the header and the state, and all of it if it is
        small. Raises Unfinished, Unreadable, OSError."""
        if self.data is None:
            with open(self.path, 'rb', buffering=0) as file:
                tail, offset = self.read_file(file)
        else:
            tail, offset = self.data, 0
        at = tail.find(END)
        if at < 0 or len(tail) < at + END_SIZE:
            start = self.data.rstrip(b'\0')[:len(HANDLED)]
            raise (Unfinished('it has no end') if any(
                known.startswith(start) or start.startswith(known)
                for known in (b'MAIL FROM:', HANDLED))
                else Unreadable('it is no mail of smtpproxy'))
        self.dot = offset + at + len(b'\r\n.\r\n')
        self.parse_envelope()
        self.body = self.start + split_header(
            self.data[self.start:self.dot - 3])
        self.parse_end(tail[at + len(END):])

    def read_file(self, file):
        """Fills data; returns the end of the file, from END or earlier, and
        its offset. The file may grow meanwhile."""
        self.data, more = file.read(smtps.CHUNK), True
        while len(self.data) >= smtps.CHUNK and more and (
                b'\r\n\r\n' not in self.data.partition(b'\r\nDATA\r\n')[2]):
            more = file.read(smtps.CHUNK)
            self.data += more
        tail, offset, length = self.data, 0, 4096
        size = os.fstat(file.fileno()).st_size
        while END not in tail and length < 2 * size:
            offset = file.seek(max(0, size - length))
            tail, length = file.read(), length * 8
        return tail, offset

    def parse_end(self, text):
        """The checksum, and the states that were added: the last one that is
        whole counts, field by field. Raises Unfinished."""
        if not re.match(rb'[0-9a-f]{8}\r\n', text):
            raise Unfinished('its end is not whole')
        self.checksum = int(text[:8], 16)
        for line, checksum in STATE.findall(text):
            if zlib.crc32(line) == int(checksum, 16):
                self.apply(line)

    def apply(self, line):
        import json
        state = json.loads(line.decode())
        self.seen = state.pop('seen', 0)
        if all(type(value) is self.STATE.get(name)
               for name, value in state.items()):
            vars(self).update(state)
            self.to = [Address(to) for to in self.to]

    def state(self):
        return {name: kind(getattr(self, name))
                for name, kind in self.STATE.items()}

    def parse_envelope(self):
        envelope, data, _ = self.data.partition(b'\r\nDATA\r\n')
        self.start = len(envelope) + len(data)
        if envelope.startswith(HANDLED):
            self.handled, envelope = True, envelope[len(HANDLED):]
        try:
            lines = envelope.decode().split('\r\n')
            if not lines[0].startswith('MAIL FROM:'):
                raise ValueError('it does not begin with MAIL FROM')
            self.frm, self.parameters = self.parse_stored(lines[0][10:])
            self.to = [self.parse_stored(line[8:])[0] for line in lines[1:]
                       if line.startswith('RCPT TO:')]
            if not self.to or len(self.to) + 1 != len(lines) or not data:
                raise ValueError('its envelope is not whole')
        except ValueError as error:
            raise Unreadable(str(error))

    def parse_stored(self, text):
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
        if checksum != self.checksum:
            raise Unreadable('its checksum is wrong')

    def header(self):
        """The header, dots doubled, with its last line end."""
        return self.data[self.start:self.body]

    def field(self, name):
        """A header field's value for a log line (str)."""
        match = fields_named(name).search(self.header())
        value = match[0].partition(b':')[2] if match else b''
        return ' '.join(value.decode('utf-8', 'replace').split())[:100]

    @property
    def msg(self):
        if self._msg is None:
            with open(self.path, 'rb') as file:
                file.seek(self.start)
                self._msg = unstuffed(
                    file.read(self.dot - 3 - self.start))
        return self._msg

    @msg.setter
    def msg(self, value):
        if isinstance(value, str):
            value = value.encode('utf-8', 'surrogateescape')
        self._msg = bytes(value)


def sync_folder(path):
    """Makes names last: POSIX wants the folder synced as well."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Draft:
    """A mail file that is being written. Nothing is on disk before there is
    much of it: a small mail is one file made, written and synced at once."""

    def __init__(self, spool, id, kind, frm, to, parameters=None, first=b''):
        self.spool, self.id, self.path = spool, id, spool.path(id, kind)
        options = ''.join([
            ' %s%s' % (key, '=' + parameters[key] if parameters[key] else '')
            for key in ('BODY', 'SMTPUTF8') if key in (parameters or ())])
        lines = ['MAIL FROM:<%s>%s' % (frm, options)]
        lines += ['RCPT TO:<%s>' % address for address in to]
        self.pending = first + ('\r\n'.join(lines) + '\r\nDATA\r\n').encode()
        self.file, self.checksum, self.size = None, 0, 0
        self.written = self.pushed = 0  # bytes; see push()
        self.number = 0             # of its name; 0: not on disk yet

    def write(self, chunk):
        """chunk: bytes as on the wire; kept in memory."""
        self.pending += chunk
        self.size += len(chunk)

    def flush(self):
        """Out of the memory. Raises OSError."""
        if self.file is None:
            self.file = os.open(
                self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            self.number = self.spool.count_name()
        data, self.pending = self.pending, b''
        self.checksum = zlib.crc32(data, self.checksum)
        self.written += len(data)
        while data:
            data = data[os.write(self.file, data):]
        if self.written - self.pushed >= PUSH:
            self.push()

    def push(self):
        """Has the system begin to write to the disk what it would keep in
        memory for a while, which is what Linux does on this advice: so the
        sync of a large mail is short, and small ones that are synced one
        behind the other share the commits of a journal."""
        with contextlib.suppress(OSError, AttributeError):  # not on macOS
            os.posix_fadvise(self.file, self.pushed,
                             self.written - self.pushed,
                             os.POSIX_FADV_DONTNEED)
        self.pushed = self.written

    def seal(self):
        """Writes the end. Raises OSError."""
        self.pending += b'.\r\n'
        self.pending += b'NOOP crc32=%08x\r\n' % zlib.crc32(
            self.pending, self.checksum)
        if self.file is None:
            self.spool.remember(self.id, self.pending)
        self.flush()
        self.push()

    def commit(self):
        """The promise: after this the mail survives a crash. Raises OSError,
        then nothing was promised."""
        os.fsync(self.file)
        file, self.file = self.file, None
        os.close(file)
        self.spool.sync_names(self.number)

    def abort(self):
        """Leaves nothing behind, as far as the disk lets us."""
        file, self.file, self.pending = self.file, None, b''
        self.spool.fresh.pop(self.id, None)
        with contextlib.suppress(OSError):
            if file is not None:
                os.close(file)
        with contextlib.suppress(OSError):      # swept at the next start
            if self.number:
                os.unlink(self.path)


class Busy(Exception):
    """Another process works on this msgs/."""


class Spool:
    """msgs/, the only owner of its files. What the client said is what the
    server will be told: ID.mail is Batch SMTP, plain text.

    The legal states, who makes them, and what a crash costs (nothing that
    was promised is ever lost):

      files                   made by              a crash there costs
      ------------------------------------------------------------------
      ID.mail without END     Draft.flush          nothing: no 250 was said;
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
    queue commands (ID.retry, ID.delete). Only the process that holds the lock
    on the folder changes anything but asked/.

    Time: ids and ages count seconds that this spool has seen with a service
    running, not the box's clock, which may begin in 1970 and jump. They go on
    where they were: each state says when it was saved."""

    ID = re.compile(r'[0-9a-f]{8}-[0-9a-f]{5}')
    OURS = ('corrupt', 'asked')

    def __init__(self, folder, clock=time.monotonic):
        self.folder, self.clock = folder, clock
        self.lock = self.place = None       # a descriptor, its os.fstat()
        self.epoch = time.time() - clock()
        self.sequence = int.from_bytes(os.urandom(2), 'big')
        self.counting = threading.Lock()    # guards sequence and names
        self.names = self.lasting = 0       # names made; of these are synced
        self.drafts = set()                 # ids that are being received
        self.delivered = set()              # their file could not be removed
        self.unsaved = {}                   # id -> state that disk refused
        self.fresh = {}                     # id -> the bytes of a small mail
                                            # that was just written
        self.first_own = ''                 # older ids were found at start

    def path(self, id, kind):
        return '%s/%s.%s' % (self.folder, id, kind)

    # Who may work here.

    def open(self, patience=2.0):
        """Makes the folder if need be and locks it. Raises Busy or OSError;
        patience: seconds to wait for a queue command that has the lock."""
        import fcntl
        self.make_folder(self.folder)
        lock = os.open(self.folder, os.O_RDONLY)
        end = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > end:
                    os.close(lock)
                    raise Busy(self.folder)
                time.sleep(0.05)
        self.lock, self.place = lock, os.fstat(lock)

    @staticmethod
    def make_folder(path):
        """Makes a folder that lasts, if it is not there."""
        if not os.path.isdir(path):
            os.makedirs(path, 0o700, exist_ok=True)
            sync_folder(os.path.dirname(os.path.abspath(path)))

    def close(self):
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def is_there(self):
        """Is it still the folder that we have locked? A disk may be away."""
        try:
            return self.lock is not None and os.path.samestat(
                os.stat(self.folder), self.place)
        except OSError:
            return False

    # Time and ids.

    def now(self):
        """Seconds, in this spool's own time."""
        return self.epoch + self.clock()

    def age(self, id):
        """Seconds that a mail has been here with a service running."""
        return self.now() - int(id[:8], 16)

    def new_id(self):
        with self.counting:
            self.sequence = (self.sequence + 1) % 0x100000
            return '%08x-%05x' % (int(self.now()) % 0x100000000,
                                  self.sequence)

    # A mail's life.

    def draft(self, frm, to, parameters):
        """A new Draft."""
        id = self.new_id()
        self.drafts.add(id)
        return Draft(self, id, 'mail', frm, to, parameters)

    def load(self, id, to_send=True):
        """The Mail of an id, None if it is not there. Raises Unfinished,
        Unreadable or OSError. to_send: one found at start is verified."""
        if id in self.delivered:
            return None
        data = self.fresh.pop(id, None)
        try:
            mail = Mail(id, self.path(id, 'mail'), data)
            if data is not None:
                return mail
        except FileNotFoundError:
            if self.lock is None or self.is_there():
                return None
            raise                       # all of msgs/ is away, not this mail
        if to_send and id < self.first_own:
            mail.verify()
        vars(mail).update(self.unsaved.get(id, {}))
        self.epoch += max(0, mail.seen - self.now())
        return mail

    def remember(self, id, data):
        """Spares the relay to read what was just written."""
        if len(self.fresh) < FRESH and len(data) < FRESH_SIZE:
            self.fresh[id] = data

    def save(self, mail):
        """Keeps what is known of a mail in trouble: recipients left, tries.
        When the disk refuses it is remembered as long as we run."""
        import json
        state = mail.state()
        new = {name: value for name, value in state.items()
               if value != mail.saved.get(name)}
        line = json.dumps(dict(new, seen=int(self.now()))).encode()
        try:
            self.append(mail.path, b'NOOP state=%s crc32=%08x\r\n' % (
                line, zlib.crc32(line)))
            mail.saved = state
            self.unsaved.pop(mail.id, None)
        except OSError as error:
            self.unsaved[mail.id] = state
            log.error('%s: its state cannot be saved: %s; remembered until '
                      'the next stop', mail.id, error)

    @staticmethod
    def append(path, line):
        """Adds a line that lasts. Raises OSError; the part of a line that a
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
        draft = Draft(self, mail.id, 'new', mail.frm, mail.to,
                      mail.parameters, HANDLED)
        try:
            os.unlink(draft.path)
        except FileNotFoundError:
            pass
        try:
            draft.write(stuffed(mail.msg))
            draft.seal()
            draft.commit()
            self.fresh.pop(mail.id, None)
            os.rename(draft.path, mail.path)
        except BaseException:
            draft.abort()
            raise
        self.sync()

    def remove(self, mail):
        """Forgets a mail."""
        try:
            os.unlink(mail.path)
        except FileNotFoundError:
            pass
        except OSError as error:
            self.delivered.add(mail.id)
            log.error('%s: done, but its file cannot be removed: %s; it will '
                      'not be sent again as long as we run', mail.id, error)
            return
        self.delivered.discard(mail.id)
        self.unsaved.pop(mail.id, None)

    def set_aside(self, name, why):
        """Moves what can't be read to corrupt/: never run, never deleted."""
        if self.lock is None:
            return                      # a queue command only looks
        corrupt = os.path.join(self.folder, 'corrupt')
        try:
            self.make_folder(corrupt)
            target = os.path.join(corrupt, name)
            while os.path.exists(target):
                target += '+'
            os.rename(os.path.join(self.folder, name), target)
            sync_folder(corrupt)
            self.sync()
            log.error('%s: cannot be read: %s; it is kept as %s',
                      name.rpartition('.')[0] or name, why, target)
        except OSError as error:
            log.error('%s: cannot be read: %s; nor set aside: %s',
                      name, why, error)

    # Names that last.

    def count_name(self):
        """The number of a name that was just made."""
        with self.counting:
            self.names += 1
            return self.names

    def sync_names(self, number):
        """Makes that name last: one sync serves all that were made before
        it. Raises OSError."""
        if number > self.lasting:
            newest = self.names         # before the sync
            if self.sync():
                self.lasting = newest   # if set back: one sync more than need

    def sync(self):
        """Makes all names last; whether it was in the folder that is locked:
        then no other needs to be opened. Raises OSError."""
        if self.is_there():
            os.fsync(self.lock)
            return True
        sync_folder(self.folder)
        return False

    # All of them.

    def scan(self):
        """The ids of all mails here, oldest first. Touches no file."""
        ids = [name[:-5] for name in os.listdir(self.folder)
               if name.endswith('.mail') and self.ID.fullmatch(name[:-5])]
        return sorted(id for id in ids if id not in self.drafts)

    def start(self):
        """scan(), and goes on in the time of the newest mail: the service's
        time, if there is nothing, begins with the box's."""
        found = self.scan()
        if found:
            newest = max(int(id[:8], 16) for id in found)
            self.epoch = newest + 1 - self.clock()
        self.first_own = '%08x' % int(self.now())
        return found

    def sweep(self, found):
        """Removes what was never promised, sets aside what is not ours.
        found: ids of mails. At start, before anything else is written."""
        found = set(found)
        for name in os.listdir(self.folder):
            id, _, kind = name.rpartition('.')
            path = os.path.join(self.folder, name)
            if id in found and kind == 'mail' or (
                    name in self.OURS or not os.path.isfile(path)):
                continue
            if self.ID.fullmatch(id) and kind == 'new':
                os.unlink(path)
            elif not (self.ID.fullmatch(id) and kind == 'mail'):
                self.set_aside(name, self.suspect(path))

    @staticmethod
    def suspect(path):
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

    def bury(self):
        """Tries again to remove what is delivered."""
        for id in list(self.delivered):
            try:
                os.unlink(self.path(id, 'mail'))
            except FileNotFoundError:
                pass
            except OSError:
                continue                # said already
            self.delivered.discard(id)

    # Requests of the queue commands, which may run beside the service.

    def ask(self, id, what):
        """Leaves a request; returns its path, which is gone once done."""
        folder = os.path.join(self.folder, 'asked')
        os.makedirs(folder, 0o700, exist_ok=True)
        path = os.path.join(folder, '%s.%s' % (id, what))
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


# --- Front door: what clients hand in ---------------------------------------

MISSING = re.compile(rb'^(date|message-id|from|received)[ \t]*:',
                     re.IGNORECASE | re.MULTILINE)
HEADER = re.compile(rb'(?:[!-9;-~]+[ \t]*:.*\r\n(?:[ \t].*\r\n)*)*')
UNUSUAL = re.compile(r'[^A-Za-z0-9_.:\[\]-]')      # in a client's name
HEADER_LIMIT = 512 * 1024       # bytes
HOPS = 100                      # RFC 5321 6.3


class Intake(smtps.Session):
    """May this client send as this one? Then its mail goes to the spool.

    relay: who gets a mail once it is safe, the Relay; any_sender: a handler
    may still change who it is from, so nobody is refused."""

    told = set()        # unknown senders whose ini block is in the log

    def __init__(self, client, spool, settings, relay, any_sender):
        super().__init__(client)
        self.spool, self.settings, self.relay = spool, settings, relay
        self.any_sender, self.signed_in_as = any_sender, None

    def auth(self, user, password):
        """Any login will do (devices insist on one), but for an account with
        localpassword."""
        import hmac
        section = self.settings.section_for(user)
        account = self.settings.accounts.get(section)
        if not account or not account.localpassword or (
                section == 'default' and '@' not in user
                and user.lower() != section):
            return
        if not hmac.compare_digest(
                *(text.encode('utf-8', 'surrogateescape')
                  for text in (account.localpassword, password))):
            raise smtps.Refused(535, '5.7.8 wrong password for [%s]'
                                % smtps.printable(section))
        self.signed_in_as = user, section

    def mail(self, sender, parameters):
        section = self.settings.section_for(sender)
        if section is None:
            if not self.any_sender:
                self.explain_unknown(sender)
                raise smtps.Refused(550, '5.7.1 no account for sender <%s>'
                                    % smtps.printable(sender))
        elif self.settings.accounts[section].localpassword and (
                self.signed_in_as != (self.client.user, section)):
            raise smtps.Refused(530, '5.7.0 sign in as [%s] to send as this '
                                'one' % smtps.printable(section))

    def explain_unknown(self, sender):
        """What to add to the ini, once."""
        if sender in self.told or len(self.told) > 1000:
            return
        self.told.add(sender)
        log.warning('%s: no account for sender <%s>; to take its mail add '
                    'this to the ini and reload:', self.client, sender)
        for line in ('[%s]' % (sender or 'default'), 'smtphost=<your '
                     'provider\'s server>', 'smtpsecurity=tls',
                     'smtpport=587', 'smtpusername=<your name there>',
                     'smtppassword=<your password there>'):
            log.warning('    %s', line)

    def data(self, sender, recipients, parameters):
        return Incoming(self, sender, recipients, parameters)


class Incoming(smtps.Receiver):
    """One mail on its way from a client to its file: Received is put in
    front, and what every mail needs and this one lacks."""

    def __init__(self, intake, sender, recipients, parameters):
        self.intake, self.client = intake, intake.client
        self.sender, self.recipients = sender, recipients
        self.draft = intake.spool.draft(sender, recipients, parameters)
        self.id = self.draft.id
        self.head, self.in_header = b'', True

    def write(self, chunk):
        """Raises Refused."""
        if self.in_header:
            self.head += chunk
            chunk = self.complete_header(False)
        self.draft.write(chunk)

    def flush(self):
        self.store(self.draft.flush)

    def seal(self):
        if self.in_header:
            self.draft.write(self.complete_header(True))
        self.store(self.draft.seal)

    def commit(self):
        """The only place that makes a 250 to the final dot possible."""
        self.store(self.draft.commit)

    def accepted(self):
        relay = self.intake.relay
        try:
            log.info('%s: accepted from <%s> to %s, %d bytes, client %s (%s)'
                     '%s', self.id, self.sender, listed(self.recipients),
                     self.draft.size, self.client,
                     self.client.hello or 'gave no name',
                     relay.outlook(self.sender))
            relay.announce(self.id, self.sender)
        finally:
            # Now a scan may see it: earlier the relay might take it twice.
            self.intake.spool.drafts.discard(self.id)
        return '2.0.0 accepted as ' + self.id

    def abort(self):
        self.draft.abort()
        self.intake.spool.drafts.discard(self.id)

    def store(self, step):
        """Does step; a full disk is the client's to try again."""
        try:
            step()
        except OSError as error:
            log.error('%s: not taken from <%s>, client %s: it cannot be '
                      'stored: %s; answered 452, the client may try again',
                      self.id, self.sender, self.client, error)
            raise smtps.Refused(452, '4.3.1 no room for it now, try later')

    def complete_header(self, all_is_there):
        """What may be written of head: nothing while the header goes on.
        Raises Refused."""
        if self.head.startswith((b'From ', b'>From ')):     # of a mailbox
            self.head = self.head.partition(b'\r\n')[2]
        end = HEADER.match(self.head).end()
        rest = self.head[end:]
        if b'\r\n' not in rest and not all_is_there:
            if len(self.head) <= HEADER_LIMIT:
                return b''
        if end > HEADER_LIMIT:
            raise smtps.Refused(552, '5.3.4 the header is too large')
        if not rest.startswith(b'\r\n'):
            rest = b'\r\n' + rest
        header, self.head, self.in_header = self.head[:end], b'', False
        return self.new_fields(header) + header + rest

    def new_fields(self, header):
        """Received, and Date, Message-ID, From where missing."""
        found = [name.lower() for name in MISSING.findall(header)]
        if found.count(b'received') > HOPS:
            log.error('%s: refused, it goes round in a loop: more than %d '
                      'Received lines; from <%s>, client %s', self.id, HOPS,
                      self.sender, self.client)
            raise smtps.Refused(554, '5.4.6 mail loop')
        now = mail_date(int(time.time()))
        client = self.client
        hello = UNUSUAL.sub('?', client.hello or '')
        fields = ['Received: from %s ([%s%s])' % (
            hello[:64] or 'unknown', 'IPv6:' if ':' in client.address else '',
            client.address), '\tby %s with %s id %s;' % (
                HOST, self.protocol(), self.id), '\t' + now]
        if b'date' not in found:
            fields.append('Date: ' + now)
        if b'message-id' not in found:
            fields.append('Message-ID: <%s.%s@%s>' % (
                self.id, os.urandom(4).hex(), HOST))
        if b'from' not in found:
            fields.append('From: <%s>' % (
                self.sender or 'MAILER-DAEMON@' + HOST))
        return ('\r\n'.join(fields) + '\r\n').encode()

    def protocol(self):
        """RFC 3848: SMTP, ESMTP, ESMTPS, ESMTPA, ESMTPSA."""
        client = self.client
        return 'SMTP' if not client.extended else (
            'ESMTP' + 'S' * client.secure + 'A' * (client.user is not None))


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
        end = split_header(message)
        self.mail.msg = fields_named(name.lower()).sub(
            b'', message[:end]) + field + message[end:]
        return [Address(address) for _, address in found]


class Handlers:
    """The enabled plug-ins, in alphabetical order."""

    def __init__(self, settings):
        """Loads handlers/*.py. What can't be loaded is logged and skipped."""
        self.enabled, self.problems = [], []
        unknown = dict(settings.handlers)
        for name in self.names():
            options = unknown.pop(name, {})
            try:
                for handler in self.load(name):
                    self.prepare(name, handler, options)
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
        """Instances of the handler classes in handlers/NAME.py."""
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
        found = [kind() for kind in vars(module).values()
                 if isinstance(kind, type) and issubclass(kind, MailHandler)
                 and kind.__module__ == module.__name__]
        if not found:
            raise TypeError('it has no class derived from MailHandler')
        return found

    def prepare(self, name, handler, options):
        logger = HandlerLog(name)
        handler.setLogger(logger)
        if hasattr(handler, 'setConfig'):
            handler.setConfig(dict(options))
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


# --- Courier: one account's way out -----------------------------------------

CONNECT_TIME = 30           # seconds
REPLY_TIME = 60             # seconds for a whole reply
DOT_TIME = 600              # seconds; RFC 5321 4.5.3.2.6: no second copies
REPLY_SIZE = 65536          # bytes of a whole reply

CA_FILES = ('/etc/ssl/certs/ca-certificates.crt', '/etc/ssl/cert.pem',
            '/opt/etc/ssl/certs/ca-certificates.crt',
            '/etc/pki/tls/certs/ca-bundle.crt', '/etc/ssl/ca-bundle.pem')


class Trouble(Exception):
    """The account's server can't be used now: every mail of the account has
    to wait. Its text is for the owner; absent: there is no way to it."""

    absent = False


class Closing(OSError):
    """The server said 421: it ends the connection."""


class Report:
    """The verdict of one attempt: what became of each recipient. sent,
    later, never: {recipient: reply}; trouble: None, or the Trouble of the
    account, not the mail's."""

    def __init__(self, to):
        self.open, self.trouble = list(to), None
        self.sent, self.later, self.never = {}, {}, {}

    def settle(self, recipient, code, text):
        """Files a recipient under what the code means."""
        verdict = self.sent if 200 <= code < 300 else (
            self.never if 500 <= code < 600 else self.later)
        verdict[recipient] = '%d %s' % (code, text)
        self.open.remove(recipient)

    def settle_all(self, code, text):
        for recipient in self.open[:]:
            self.settle(recipient, code, text)

    def give_up(self, text):
        """What is still open has to be tried again."""
        for recipient in self.open:
            self.later[recipient] = text
        self.open = []


@functools.lru_cache(None)
def tls_context(cafile, verify, weak):
    """An ssl.SSLContext; one costs a megabyte, so there is one of a kind."""
    import ssl
    import warnings
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
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', DeprecationWarning)
            context.minimum_version = ssl.TLSVersion.TLSv1
        context.set_ciphers('DEFAULT:@SECLEVEL=0')
    return context


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
    if isinstance(error, socket.timeout) or isinstance(
            error.__context__, socket.timeout):
        return '%s does not answer in time' % host
    if hasattr(error, 'smtp_code'):
        return '%s said %d %s' % (host, error.smtp_code,
                                  plain(error.smtp_error))
    if isinstance(error, ImportError) or 'unknown encoding' in str(error):
        return missing_module(error)
    text = getattr(error, 'strerror', None) or (
        error.args[0] if error.args else error)
    text = plain(text if isinstance(text, bytes) else str(text))
    return '%s: %s' % (host, 'connection closed' if text == '-ERR EOF'
                       else text)


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
    context = tls_context('', True, False)
    if not context.cert_store_stats()['x509_ca']:
        return '; this box has no CA certificates at all: install ca-bundle ' \
            '(or ca-certificates), or set tlscafile'
    return '; if it is your own, set tlscafile to the PEM file of its CA'


def encoded64(text):
    return binascii.b2a_base64(text.encode(), newline=False).decode()


def plain(reply):
    """A server's reply (bytes or str) in one line for the log."""
    if isinstance(reply, bytes):
        reply = reply.decode('utf-8', 'replace')
    return ' '.join(''.join(c if c.isprintable() else ' ' for c in reply)
                    .split())[:400]


def secrets_of(account):
    """A pattern for the passwords in each form in which a server may repeat
    what it was told. A short one counts as a word only, else it would veil
    half of every line."""
    forms = {form for secret in (account.smtppassword, account.poppassword)
             if secret for form in (
                 secret, plain(secret), repr(secret.encode())[2:-1],
                 encoded64(secret), encoded64('\0%s\0%s' % (
                     account.smtpusername, secret)))}
    return re.compile('|'.join(
        ('%s' if len(form) > 3 else r'(?<!\w)%s(?!\w)') % re.escape(form)
        for form in sorted(forms, key=len, reverse=True)) or '(?!)')


class Replies:
    """A server's lines, bounded in time and size: takes the place of the
    socket's file in smtplib and poplib."""

    def __init__(self, sock):
        self.sock, self.buffer = sock, b''
        self.expect(REPLY_TIME)

    def expect(self, seconds):
        """A whole reply has to be there in so many seconds."""
        self.deadline = time.monotonic() + seconds
        self.budget = REPLY_SIZE
        if self.sock.gettimeout() < REPLY_TIME - 1:
            self.sock.settimeout(REPLY_TIME)

    def readline(self, limit=8192):
        while b'\n' not in self.buffer and len(self.buffer) < limit:
            left = self.deadline - time.monotonic()
            if left <= 0:
                raise socket.timeout('timed out')
            if left < self.sock.gettimeout() - 1:
                self.sock.settimeout(left)
            try:
                data = self.sock.recv(4096)
            except socket.timeout as error:
                if error.errno:         # the system's: the other end is gone
                    raise
                continue                # the socket's: the reply has its own
            if not data:
                break
            self.buffer += data
        end = self.buffer.find(b'\n') + 1 or len(self.buffer)
        line, self.buffer = self.buffer[:end], self.buffer[end:]
        self.budget -= len(line)
        if self.budget < 0:
            raise OSError('the reply does not end')
        return line

    def close(self):
        """The socket is closed by its owner."""


class SmtpDialogue:
    """Mixed into smtplib's classes: bounded replies, and the dialogue in our
    log, without secrets."""

    secret, reply_time = False, REPLY_TIME     # redact: see dialogue()

    def getreply(self):
        if self.file is None:
            self.file = Replies(self.sock)
        self.file.expect(self.reply_time)
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

    def ask(self, line):
        """Sends one line of a login; returns (code, text)."""
        self.secret = True
        try:
            return self.docmd(line)
        finally:
            self.secret = False


class PopDialogue:
    """The same for poplib's."""

    def _getline(self):
        if not isinstance(self.file, Replies):
            self.file.close()
            self.file = Replies(self.sock)
        self.file.expect(REPLY_TIME)
        return super()._getline()

    def _putline(self, line):
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
            log.info('pop %s: %s', self.host, self.redact(plain(line)))


@functools.lru_cache(None)
def dialogue_class(kind, secure):
    """Made when first needed, since smtplib alone costs a small box nine
    megabytes."""
    if kind == 'smtp':
        import smtplib
        return type('Smtp', (SmtpDialogue, smtplib.SMTP_SSL if secure
                             else smtplib.SMTP), {})
    import poplib
    return type('Pop', (PopDialogue, poplib.POP3_SSL if secure
                        else poplib.POP3), {})


def dialogue(kind, tls, debuglevel, redact, *arguments):
    """A connected client: kind 'smtp' or 'pop', tls: a context or None,
    redact: callable(str) -> str that takes the secrets out. It must know
    these two before its constructor connects."""
    made = dialogue_class(kind, tls is not None)
    client = made.__new__(made)
    client.debuglevel, client.redact = debuglevel, redact
    extra = {'context': tls} if tls else {}
    client.__init__(*arguments, timeout=CONNECT_TIME, **extra)
    return client


def envelope_sender(mail, account):
    return account.returnpath and bare_address(account.returnpath) or (
        account.forcefrom and bare_address(account.forcefrom) or mail.frm)


def dress(mail, account):
    """The header of mail (bytes as on the wire) as this account sends it."""
    unwanted, new = ['bcc', 'resent-bcc', 'return-path'], ''
    if account.returnpath:
        new += 'Return-Path: <%s>\r\n' % bare_address(account.returnpath)
    if account.replyto:
        unwanted.append('reply-to')
        new += 'Reply-To: %s\r\n' % account.replyto
    if account.forcefrom:
        unwanted += ['from', 'sender']
        new += 'From: %s\r\n' % account.forcefrom
    return new.encode() + fields_named(*unwanted).sub(b'', mail.header())


class Courier:
    """Delivers mails over one connection to the account's server, and makes
    that connection with all that the account asks for. lane: keeps the time
    of the account's last POP login."""

    def __init__(self, account, lane, config, pause=time.sleep):
        self.account, self.lane, self.config = account, lane, config
        self.pause, self.secrets = pause, secrets_of(account)
        self.smtp, self.used = None, False
        self.mail = self.upcoming = None    # at hand, and the one after it
        self.offered = None         # the mail whose envelope is on its way
        self.unfinished = False     # a transaction needs RSET

    # Getting there.

    def connect(self):
        """Raises Trouble."""
        if self.smtp and not self.pop_is_due():
            return
        self.close()
        if self.account.popbeforesmtp:
            self.sign_in_by_pop()
        what = 'connect'
        try:
            self.smtp = self.open_connection()
            what = 'EHLO'
            self.hello()
            if self.account.smtpsecurity == 'tls':
                what = 'STARTTLS'
                self.start_tls()
            what = 'login'
            if self.account.smtpusername and self.account.smtppassword:
                self.sign_in()
        except Exception as error:
            self.close()
            if isinstance(error, Trouble):
                raise
            trouble = Trouble('%s: %s%s' % (
                what, explain(error, self.account.server),
                self.port_advice()))
            trouble.absent = what == 'connect' and is_absence(error)
            raise trouble from error
        self.used = False
        self.pipelining = self.smtp.has_extn('pipelining')

    def port_advice(self):
        """The usual mistake: TLS where none is spoken, or the reverse."""
        port, security = self.account.smtpport, self.account.smtpsecurity
        if (port == 465) == (security == 'ssl') or port not in (25, 465, 587):
            return ''
        return '; %s is rarely right for port %d' % (
            'smtpsecurity=' + security, port)

    def open_connection(self):
        account = self.account
        # Without a name of its own smtplib looks one up, which can take long.
        smtp = dialogue(
            'smtp', self.tls() if account.smtpsecurity == 'ssl' else None,
            self.config.debuglevel, self.without_secrets, account.smtphost,
            account.smtpport, account.localhostname or HOST)
        smtp.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return smtp

    def tls(self):
        account = self.account
        return tls_context(account.tlscafile, account.tlsverify,
                           account.smtpweaktls)

    def hello(self):
        code, text = self.smtp.ehlo()
        if code >= 500:
            code, text = self.smtp.helo()
        if code >= 300:
            raise OSError('%d %s' % (code, plain(text)))

    def start_tls(self):
        """Never plain text where TLS was asked for. Raises Trouble."""
        if not self.smtp.has_extn('starttls'):
            raise Trouble('%s does not offer STARTTLS: not sent in plain '
                          'text; smtpsecurity=ssl and port 465, perhaps?'
                          % self.account.server)
        self.smtp.starttls(context=self.tls())
        self.smtp.ehlo()

    def sign_in(self):
        """One mechanism after the other until one is taken."""
        answers = []
        for name in self.mechanisms():
            code, text = getattr(self, 'auth_' + name.replace('-', '_'))()
            if code == 235:
                return
            answers.append('%s: %d %s' % (
                name, code, self.without_secrets(plain(text))))
            try:
                self.smtp.ehlo()
            except OSError:
                break                   # it has hung up
        raise Trouble('login at %s as %s refused (%s): check smtpusername and '
                      'smtppassword' % (self.account.server,
                                        self.account.smtpusername,
                                        '; '.join(answers)))

    def without_secrets(self, text):
        return self.secrets.sub('***', text)

    def mechanisms(self):
        """Names, best first. Raises Trouble."""
        if self.account.smtpauth != 'auto':
            return [self.account.smtpauth]
        offered = self.smtp.esmtp_features.get('auth', '').lower().split()
        names = [n for n in ('cram-md5', 'plain', 'login') if n in offered]
        if not names:
            raise Trouble('%s offers no login that we know (%s)%s' % (
                self.account.server, ' '.join(offered) or 'none at all',
                '; smtpsecurity=tls, perhaps?'
                if self.account.smtpsecurity == 'none' else ''))
        return names

    def auth_cram_md5(self):
        import hmac
        code, challenge = self.smtp.ask('AUTH CRAM-MD5')
        if code != 334:
            return code, challenge
        try:
            digest = hmac.new(self.account.smtppassword.encode(),
                              binascii.a2b_base64(challenge), 'md5')
        except ValueError:
            return 501, 'its challenge is not base64'
        return self.smtp.ask(encoded64(
            self.account.smtpusername + ' ' + digest.hexdigest()))

    def auth_plain(self):
        return self.smtp.ask('AUTH PLAIN ' + encoded64('\0%s\0%s' % (
            self.account.smtpusername, self.account.smtppassword)))

    def auth_login(self):
        """334 by 334: smtplib of early 3.8 mixes up name and password."""
        answer = self.smtp.ask('AUTH LOGIN')
        for text in self.account.smtpusername, self.account.smtppassword:
            if answer[0] == 334:
                answer = self.smtp.ask(encoded64(text))
        return answer

    # POP before SMTP.

    def pop_is_due(self):
        return self.account.popbeforesmtp and (
            self.lane.clock() - self.lane.pop_login
            >= self.account.popcheckdelay)

    def sign_in_by_pop(self):
        """One login for all connections of the account. Raises Trouble."""
        with self.lane.pop_lock:
            if not self.pop_is_due():
                return
            try:
                self.pop_login()
            except Exception as error:
                raise Trouble(self.without_secrets(
                    'POP login: %s' % explain(error, '%s:%d' % (
                        self.account.pophost, self.account.popport)))
                ) from error
            log.info('%s: POP login as %s; waiting %d s before SMTP',
                     self.account.pophost, self.account.popusername,
                     self.config.waitafterpop)
            self.lane.pop_login = self.lane.clock()
            self.pause(self.config.waitafterpop)

    def pop_login(self):
        account = self.account
        pop = dialogue('pop', self.tls() if account.popssl else None,
                       self.config.debuglevel, self.without_secrets,
                       account.pophost, account.popport)
        try:
            pop.user(account.popusername)
            pop.pass_(account.poppassword)
            try:
                pop.quit()
            except Exception:
                pass                    # we are known there, that is enough
        finally:
            pop.close()

    # The mail.

    def deliver(self, mail, following=lambda: None):
        """Sends mail; returns its Report. following() is asked for the next
        Mail, whose envelope then goes along behind this mail's final dot
        (RFC 2920): upcoming is that mail and must be delivered next."""
        report, self.mail, self.upcoming = Report(mail.to), mail, None
        try:
            if self.offered is not mail:
                self.connect()
            if self.transfer_envelope_somehow(mail, report):
                self.transfer_content(mail, report, following)
            self.used = True
        except Trouble as trouble:
            self.close()
            report.trouble = trouble if report.open else None
            report.give_up(str(trouble))
        except Exception as error:
            self.close()
            if not isinstance(error, OSError):
                log.exception('%s: an error of ours', mail.id)
            report.give_up(explain(error, self.account.server))
        return report

    def transfer_envelope_somehow(self, mail, report):
        """On the connection we have or, if the server has closed that
        meanwhile, on a new one. Raises Trouble, OSError."""
        try:
            return self.transfer_envelope(mail, report)
        except OSError as error:
            if not self.used or len(report.open) < len(mail.to):
                self.blame(error)
        self.close()
        self.connect()
        try:
            return self.transfer_envelope(mail, report)
        except OSError as error:
            self.blame(error)

    def blame(self, error):
        """A server that ends a fresh connection before it has seen more than
        a sender has trouble of its own; else the mail may be the cause."""
        if isinstance(error, Closing):
            raise Trouble(explain(error, self.account.server))
        raise error

    def transfer_envelope(self, mail, report):
        """MAIL, RCPT, DATA; True if the server wants the content."""
        if self.needs_utf8(mail) and not self.smtp.has_extn('smtputf8'):
            report.settle_all(550, '5.6.7 needs SMTPUTF8, which %s does not '
                              'offer' % self.account.server)
            return False
        commands, clean = self.commands(mail), not self.unfinished
        if self.pipelining:
            if self.offered is not mail:
                self.send(b''.join(commands), True)
            self.offered = None
            replies = self.replies_to(commands)
        else:
            replies = self.one_by_one(commands)
        replies = replies if clean else replies[1:]
        self.unfinished = True
        return self.judge_envelope(mail, report, replies)

    def replies_to(self, commands):
        """[(code, text)] of pipelined commands."""
        replies = []
        for command in commands:
            try:
                replies.append(self.reply())
            except Closing as error:
                if command[:4] in (b'RCPT', b'DATA'):
                    raise OSError(str(error))
                raise
        return replies

    def one_by_one(self, commands):
        """Replies to commands, for servers without PIPELINING; what makes no
        sense after a refusal is not asked for."""
        replies, refused, accepted = [], False, False
        for command in commands:
            verb = command[:4]
            if verb == b'RCPT' and refused or (
                    verb == b'DATA' and not accepted):
                replies.append((503, 'not asked'))
                continue
            self.send(command, True)
            replies += self.replies_to([command])
            fine = replies[-1][0] < 300
            refused = refused or verb == b'MAIL' and not fine
            accepted = accepted or verb == b'RCPT' and fine
        return replies

    def judge_envelope(self, mail, report, replies):
        (code, text), *recipients, data = replies
        if code >= 300:
            report.settle_all(code, text)
        for recipient, reply in zip(mail.to, recipients if code < 300 else ()):
            if reply[0] >= 300:
                report.settle(recipient, *reply)
        if data[0] == 354:
            if not report.open:         # RFC 2920 3.1: it may want nothing
                self.send(b'.\r\n')
                self.reply()
            self.unfinished = False
        elif data[0] < 400:
            raise OSError('DATA was answered %d %s' % data)
        else:
            report.settle_all(*data)
        return bool(report.open)

    def transfer_content(self, mail, report, following):
        """Header, body and final dot, then perhaps the next envelope."""
        if self.pipelining:
            self.upcoming = following()
        behind = b''
        if self.upcoming and not self.account.popbeforesmtp and (
                self.smtp.has_extn('smtputf8')
                or not self.needs_utf8(self.upcoming)):
            behind = b''.join(self.commands(self.upcoming))
        try:
            self.send_file(mail, dress(mail, self.account), behind)
        except ConnectionError as error:
            self.hear_why(report, error)
            return
        self.offered = self.upcoming if behind else None
        reply = self.reply(DOT_TIME, final=True)
        if 300 <= reply[0] < 400:
            raise OSError('the final dot was answered %d %s' % reply)
        report.settle_all(*reply)
        if reply[0] == 421:
            self.close()

    def send_file(self, mail, header, behind):
        body, dot = mail.body, mail.dot
        if dot <= len(mail.data):
            self.send(header + mail.data[body:dot] + behind)
            return
        self.send(header)
        with open(mail.path, 'rb') as file:
            if self.smtp.sock.sendfile(file, body, dot - body) < dot - body:
                raise OSError('the file of this mail has become shorter')
        self.send(behind)

    def hear_why(self, report, error):
        """A server that refuses in the middle of a mail says so first."""
        try:
            code, text = self.reply(CONNECT_TIME, final=True)
        except OSError:
            raise error
        if code < 400:
            raise error
        report.settle_all(code, text)
        self.close()

    def send(self, data, commands=False):
        if commands and self.config.debuglevel:
            log.info('smtp %s: send: %s', self.account.smtphost, plain(data))
        if self.smtp.sock.gettimeout() < REPLY_TIME - 1:
            self.smtp.sock.settimeout(REPLY_TIME)
        self.smtp.sock.sendall(data)

    def reply(self, seconds=None, final=False):
        """(code, text in one line). Raises OSError; Closing on a 421, unless
        it is final: the verdict on a mail."""
        self.smtp.reply_time = seconds or REPLY_TIME
        code, text = self.smtp.getreply()
        text = self.without_secrets(plain(text))
        if code == 421 and not final:
            raise Closing('421 ' + text)
        return code, text

    def needs_utf8(self, mail):
        """RFC 6531: something that only an SMTPUTF8 server understands."""
        addresses = ''.join([envelope_sender(mail, self.account)] + mail.to)
        return not addresses.isascii() or (
            'SMTPUTF8' in mail.parameters and not mail.header().isascii())

    def commands(self, mail):
        """The envelope as command lines (bytes)."""
        options = ''
        if 'BODY' in mail.parameters and self.smtp.has_extn('8bitmime'):
            options += ' BODY=' + mail.parameters['BODY'].upper()
        if self.needs_utf8(mail):
            options += ' SMTPUTF8'
        lines = ['RSET'] if self.unfinished else []
        lines.append('MAIL FROM:<%s>%s' % (
            envelope_sender(mail, self.account), options))
        lines += ['RCPT TO:<%s>' % address for address in mail.to]
        return [line.encode() + b'\r\n' for line in lines + ['DATA']]

    def close(self, politely=False):
        smtp, self.smtp, self.offered = self.smtp, None, None
        self.unfinished = False
        if smtp is None:
            return
        try:
            if politely:
                smtp.reply_time = 5
                smtp.quit()
        except OSError:
            pass
        smtp.close()


# --- Relay: when each mail is tried, and what a failure means ----------------

FOREVER = float('inf')
LINGER = 2.0                # seconds a connection is kept for a next mail
LONGEST_WAIT = 3600         # seconds between two tries
BACKLOG = 8                 # mails that wait per connection before one more


class Lane:
    """The mails that may go to one account now, and the threads that take
    them there."""

    def __init__(self, account, clock):
        self.account, self.clock = account, clock
        self.pop_login = -LONGEST_WAIT * 24.0
        self.pop_lock = threading.Lock()    # one POP login at a time
        self.changed = threading.Condition()    # guards the next seven
        self.ready = collections.deque()        # ids
        self.workers = 0
        self.limit = account.smtpconnections
        self.proven = self.closed = False       # proven: the server works
        self.in_trouble = False
        self.held_until = 0.0       # no try before
        self.absent = False         # its server could not be reached
        self.knock_at = FOREVER     # when to look whether it is back
        self.failures, self.problem = 0, ''

    def put(self, id, first=False):
        with self.changed:
            (self.ready.appendleft if first else self.ready.append)(id)
            self.changed.notify()

    def join(self, id):
        """put(), if somebody is there to take it and need not be helped, or
        all have to wait."""
        with self.changed:
            if self.closed or not self.held_until and (
                    not self.workers
                    or self.proven and self.workers < self.limit
                    and len(self.ready) >= self.workers * BACKLOG):
                return False
            self.ready.append(id)
            self.changed.notify()
            return True

    def take(self, patience):
        """The next id, None if there is none within patience seconds: then,
        unless patience is 0, the worker that asked is let go."""
        with self.changed:
            if patience and not self.ready and not self.closed:
                self.changed.wait(patience)
            if self.ready and not self.closed:
                return self.ready.popleft()
            self.workers -= patience > 0
            if not self.workers:
                self.limit = self.account.smtpconnections
            return None

    def leave(self, in_trouble=False):
        """A worker can't go on; True if it was the last. Then nobody else
        comes until in_trouble is settled."""
        with self.changed:
            self.workers -= 1
            self.in_trouble = in_trouble and not self.workers
            self.limit = max(1, self.workers)
            self.proven = self.proven and self.workers > 0
            return not self.workers

    def wants_worker(self):
        """Counts one more in, if the mails that wait are worth it."""
        with self.changed:
            if self.closed or self.in_trouble or (
                    self.workers >= self.limit
                    or len(self.ready) <= self.workers * BACKLOG
                    or self.workers and not self.proven):
                return False
            self.workers += 1
            return True

    def outlook(self):
        """Why a mail that comes now has to wait."""
        return 'waits with %d more for %s: %s' % (
            len(self.ready), self.account.server, self.problem)

    def release(self):
        """Its mail may be tried; the caller gives it a worker."""
        with self.changed:
            self.held_until, self.knock_at = 0.0, FOREVER
            self.absent = False

    def remove(self, id):
        """Whether id was here; now it is not."""
        with self.changed:
            if id not in self.ready:
                return False
            self.ready.remove(id)
            return True

    def empty(self):
        """Takes all ids out."""
        with self.changed:
            ids, self.ready = self.ready, collections.deque()
            return ids

    def close(self):
        """Its workers end after the mail at hand."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()


class Relay:
    """One thread that decides for every mail what happens next, and lanes
    that deliver. What others want decided they put into its inbox. What other
    threads touch as well needs no lock: waiting and in_flight change by one
    atomic step, a lane has its own lock."""

    def __init__(self, spool, settings, handlers, clock=time.monotonic):
        self.spool, self.settings, self.handlers = spool, settings, handlers
        self.clock = clock
        self.inbox = queue.SimpleQueue()
        self.unrouted = collections.deque()     # ids found on disk
        self.asked = set()          # ids to be tried even if they are parked
        self.later = []             # heap of (when, id)
        self.lanes = {}             # Account -> Lane
        # Ids in lanes or later, or in flight, so that no mail is in two
        # places. A dict, since a set of 20,000 takes three times its size.
        self.waiting = {}
        self.in_flight = set()      # ids in the hands of lanes
        self.last_look, self.last_errno = clock(), None
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.run, name='relay',
                                       daemon=True)

    # For other threads.

    def outlook(self, sender):
        """The end of a new mail's log line: that it has to wait, or ''."""
        lane = self.lane_of(sender)
        return '; it ' + lane.outlook() if lane and lane.held_until else ''

    def lane_of(self, sender):
        """The Lane of a new mail, None if that has to be found out."""
        return None if self.handlers.enabled else self.lanes.get(
            self.settings.account_for(sender))

    def announce(self, id, sender):
        """A mail is safe on disk. Where a lane is at work already it goes
        there at once, which spares two changes of threads."""
        lane = self.lane_of(sender)
        if lane:
            self.waiting[id] = None
            if lane.join(id):
                return
            self.waiting.pop(id, None)
        self.inbox.put(functools.partial(self.route, id, sender))

    def reload(self, settings, handlers):
        """New settings; all that waits is tried at once."""
        self.inbox.put(functools.partial(self.begin, settings, handlers))

    def start(self, found):
        self.unrouted.extend(found)
        self.thread.start()

    def stop(self, grace):
        """Deliveries under way end within grace seconds, or are cut off: at
        worst that is a second copy."""
        end = time.monotonic() + grace
        self.stopping.set()
        self.inbox.put(lambda: None)
        if self.thread.is_alive():          # it may never have started
            self.thread.join(grace)
        for lane in list(self.lanes.values()):
            lane.close()
        while self.in_flight and time.monotonic() < end:
            time.sleep(0.01)
            self.finish_inbox()
        if self.in_flight:
            log.warning('stopped during a delivery: %s; it will be tried '
                        'again', ', '.join(sorted(self.in_flight)))

    def finish_inbox(self):
        """What lanes reported after the relay's own thread ended."""
        try:
            while not self.thread.is_alive():
                self.inbox.get_nowait()()
        except queue.Empty:
            pass

    # The loop.

    def run(self):
        while not self.stopping.is_set():
            try:
                if self.clock() >= self.next_look():
                    self.look_round()
                event = self.next_event()
                if event:
                    event()
            except Exception:
                log.exception('relay: an error; it goes on with the next mail')

    def next_look(self):
        """When something may be due."""
        looks = [self.last_look + self.settings.config.sleeptime]
        looks += [min(lane.held_until, lane.knock_at)
                  for lane in self.lanes.values() if lane.held_until]
        looks += [when for when, _ in self.later[:1]]
        return min(looks)

    def next_event(self):
        """What to do next (callable), None if it is time to look round."""
        try:
            if not self.unrouted:
                return self.inbox.get(timeout=max(
                    0.0, self.next_look() - self.clock()))
            return self.inbox.get_nowait()
        except queue.Empty:
            if self.unrouted:
                return functools.partial(
                    self.route_found, self.unrouted.popleft())
        return None

    def look_round(self):
        """What is due, asked for or left over."""
        now = self.last_look = self.clock()
        self.spool.bury()
        for path, id, what in self.spool.asked():
            self.fulfil(path, id, what)
        while self.later and self.later[0][0] <= now:
            _, id = heapq.heappop(self.later)
            self.waiting.pop(id, None)
            self.route(id)
        for lane in self.lanes.values():
            if lane.held_until and lane.held_until <= now:
                lane.release()
                self.staff(lane)
            elif lane.knock_at <= now:
                lane.knock_at = FOREVER         # until we know
                if not self.in_background(lane, self.knock):
                    self.knocked(lane, False)

    def begin(self, settings, handlers):
        """All over: everything on disk, parked or not."""
        self.settings, self.handlers = settings, handlers
        found = set(self.spool.scan())      # first: if it fails none is lost
        freed = {id for _, id in self.later}
        for account, lane in list(self.lanes.items()):
            if account not in settings.accounts.values():
                self.lanes.pop(account).close()
            lane.release()              # both before it is emptied: nobody
            freed.update(lane.empty())  # joins an idle lane from here on
            lane.failures = 0
        self.later.clear()
        for id in freed:
            self.waiting.pop(id, None)
        self.asked = found.difference(self.waiting) | freed
        self.unrouted = collections.deque(sorted(self.asked))

    # From the spool to a lane.

    def route(self, id, sender=None):
        """Puts a mail into its account's lane. sender: known already, so
        that a fresh mail need not be read for it."""
        if id in self.waiting:
            return
        if sender is None or self.handlers.enabled:
            mail = self.load(id, to_send=bool(self.handlers.enabled))
            if mail is None or mail.parked and id not in self.asked:
                return
            if mail.flaw:
                self.park_flawed(id)
                return
            if not mail.handled and not self.handle(mail):
                return
            sender = mail.frm
        self.asked.discard(id)
        account = self.settings.account_for(sender)
        if account is None:
            self.settle_homeless(id)
            return
        lane = self.lanes.get(account)
        if lane is None:
            lane = self.lanes[account] = Lane(account, self.clock)
        self.waiting[id] = None
        if lane.held_until and not self.unrouted:
            log.info('%s: it %s', id, lane.outlook())
        lane.put(id)
        self.staff(lane)

    def route_found(self, id):
        """A mail that was listed a while ago may be delivered by now."""
        if os.path.exists(self.spool.path(id, 'mail')):
            self.route(id)

    def load(self, id, to_send=True):
        """The Mail, None if it can't be had; that is then dealt with."""
        try:
            mail = self.spool.load(id, to_send)
            self.last_errno = None
            if mail is None and id not in self.spool.delivered:
                log.warning('%s: its file is gone, somebody removed it', id)
            return mail
        except Unfinished as error:
            if id < self.spool.first_own:
                log.info('%s: %s, so it was never promised; removed', id,
                         error)
                os.unlink(self.spool.path(id, 'mail'))
            else:
                self.spool.set_aside(id + '.mail', error)
        except Unreadable as error:
            self.spool.set_aside(id + '.mail', error)
        except OSError as error:
            # Once, if all of msgs/ is away.
            log.log(logging.DEBUG if error.errno == self.last_errno
                    else logging.ERROR, '%s: cannot be read: %s; it is tried '
                    'again later', id, error)
            self.last_errno = error.errno
            self.put_off(id, self.back_off(1))
        return None

    def handle(self, mail):
        """Runs the handlers, once a mail; False if it does not go on."""
        if not self.handlers.enabled:
            return True
        try:
            before = mail.frm, list(mail.to), mail.msg
            if not self.handlers.run(mail):
                self.spool.remove(mail)
                return False
            mail.handled = True
            if before == (mail.frm, mail.to, mail.msg):
                self.spool.save(mail)
                return True
            self.spool.replace(mail)
            log.info('%s: changed by handlers, now from <%s> to %s', mail.id,
                     mail.frm, listed(mail.to))
            return True
        except (OSError, MemoryError) as error:
            log.error('%s: handlers cannot be run on it, or what they made '
                      'of it not stored: %r; tried again later', mail.id,
                      error)
            self.put_off(mail.id, self.back_off(1))
            return False

    def staff(self, lane):
        """Gives a lane the threads that it needs."""
        while not lane.held_until and not self.stopping.is_set() and (
                lane.wants_worker()):
            if not self.in_background(lane, self.work):
                lane.leave()
                lane.held_until = self.clock() + self.back_off(1)
                lane.problem = 'no thread'

    @staticmethod
    def in_background(lane, task):
        """Calls task(lane) in a thread; False if there is none to be had."""
        try:
            threading.Thread(target=task, args=(lane,), daemon=True,
                             name='relay-' + lane.account.server).start()
            return True
        except RuntimeError as error:
            log.error('no thread for %s: %s; tried again later',
                      lane.account.server, error)
            return False

    def knocked(self, lane, is_there):
        """What knock() found out."""
        if not lane.absent:
            return                      # somebody asked for a try meanwhile
        if is_there:
            log.info('%s is there again: %d mails are tried now',
                     lane.account.server, len(lane.ready))
            lane.release()
            self.staff(lane)
        else:
            lane.knock_at = self.clock() + self.settings.config.sleeptime

    # In a lane's thread.

    def knock(self, lane):
        """Is there a way to a server again that was absent? So mail goes soon
        after the internet is back, however long the next try is away."""
        try:
            socket.create_connection((
                lane.account.smtphost, lane.account.smtpport),
                CONNECT_TIME).close()
            is_there = True
        except (OSError, ValueError, LookupError):
            is_there = False
        self.inbox.put(functools.partial(self.knocked, lane, is_there))

    def work(self, lane):
        """The life of a lane's thread."""
        courier = Courier(lane.account, lane, self.settings.config)
        try:
            self.deliver_all(lane, courier)
        except Exception:
            log.exception('%s: a thread of this account ends by an error; '
                          'its mail is tried again later', lane.account.server)
            lane.leave()
            for mail in filter(None, (courier.mail, courier.upcoming)):
                if mail.id in self.in_flight:
                    self.put_off(mail.id, self.back_off(1))
                    self.in_flight.discard(mail.id)
            self.inbox.put(functools.partial(self.staff, lane))
        courier.close(politely=True)

    def deliver_all(self, lane, courier):
        """Delivers what waits in a lane over one connection."""
        mail = self.next_mail(lane, LINGER)
        while mail:
            report = courier.deliver(
                mail, functools.partial(self.next_mail, lane, 0))
            if report.trouble:
                self.report_trouble(lane, mail, report)
                return
            lane.failures = 0
            self.settle(mail, report, lane.account.server)
            if not lane.proven:
                lane.proven = True
                self.inbox.put(functools.partial(self.staff, lane))
            mail = courier.upcoming or self.next_mail(lane, LINGER)

    def next_mail(self, lane, patience):
        """The next Mail of a lane, or None."""
        while not self.stopping.is_set():
            id = lane.take(patience)
            if id is None:
                return None
            self.in_flight.add(id)
            mail = self.load(id)
            if mail:
                return mail
            self.let_go(id)
        return None

    def let_go(self, id):
        self.waiting.pop(id, None)
        self.in_flight.discard(id)

    def report_trouble(self, lane, mail, report):
        """The account's server can't be used: if it is used by another of
        its connections, this one was one too many."""
        if lane.leave(in_trouble=True):
            self.inbox.put(functools.partial(self.hold, lane, mail, report))
            return
        log.info('%s: %d connections to %s are all it takes now: %s', mail.id,
                 lane.workers, lane.account.server,
                 next(iter(report.later.values())))
        self.let_go(mail.id)
        self.inbox.put(functools.partial(self.route, mail.id, mail.frm))

    # What a failure means: the only place that knows.

    def settle(self, mail, report, server='nobody'):
        """Acts on the verdict of one attempt."""
        for reply, recipients in grouped(report.sent):
            log.info('%s: sent to %s by %s: %s', mail.id, listed(recipients),
                     server, reply)
        mail.to = [Address(a) for a in report.later]
        mail.refused.update(report.never)
        if report.later or mail.refused:
            comes_back = self.settle_failure(mail, report, server)
        else:
            comes_back = False
            self.spool.remove(mail)
        if not comes_back:
            self.waiting.pop(mail.id, None)
        self.in_flight.discard(mail.id)

    def settle_failure(self, mail, report, server):
        """Returns whether it will be tried again by itself."""
        failed = dict(mail.refused, **report.later)
        why = '; '.join('%s for %s' % (reply, listed(recipients))
                        for reply, recipients in grouped(failed))
        if server not in why:
            why = '%s said %s' % (server, why)
        mail.tries += 1
        mail.problem, mail.handled, mail.parked = why, True, False
        if self.settings.config.deleteonerror:
            log.error('%s: deleted (deleteonerror=true), not delivered: %s; '
                      '%s', mail.id, why, self.describe(mail, failed))
            self.spool.remove(mail)
        elif not mail.to:
            self.park(mail)
        elif self.is_expired(mail.id):
            self.park(mail)
        else:
            wait = self.back_off(mail.tries)
            mail.due = time.time() + wait
            self.spool.save(mail)
            log.warning('%s: not delivered: %s; try %d, the next one in %d '
                        'seconds', mail.id, why, mail.tries, wait)
            self.put_off(mail.id, wait)
            return True
        return False

    def hold(self, lane, mail, report):
        """No mail of the account can go: one of them is tried now and then,
        all others wait for that without a try of their own."""
        lane.in_trouble = False
        if self.settings.config.deleteonerror or lane.closed:
            self.settle(mail, report, lane.account.server)
            self.staff(lane)
            return
        lane.failures = max(lane.failures, mail.tries) + 1
        wait = self.back_off(lane.failures)
        lane.held_until = self.clock() + wait
        lane.absent = report.trouble.absent
        if lane.absent:
            lane.knock_at = self.clock() + self.settings.config.sleeptime
        lane.problem = mail.problem = next(iter(report.later.values()))
        mail.tries, mail.due = lane.failures, time.time() + wait
        mail.handled, mail.parked = True, False
        self.park_expired(lane)
        if self.is_expired(mail.id):
            self.park(mail)
        else:
            self.spool.save(mail)
            log.warning('%s: not delivered: %s; try %d, the next one in %d '
                        'seconds, %d more mails wait for it', mail.id,
                        mail.problem, mail.tries, wait, len(lane.ready))
            lane.put(mail.id, first=True)
        self.in_flight.discard(mail.id)

    def park_expired(self, lane):
        for id in lane.empty():
            mail = self.load(id) if self.is_expired(id) else None
            if mail:
                mail.problem = lane.problem
                self.park(mail)
            else:
                lane.put(id)

    def park(self, mail):
        """Keeps a mail until the owner asks for another try."""
        what = 'refused for good' if not mail.to else (
            'not delivered in %d days' % self.settings.config.retrydays)
        mail.to += [Address(a) for a in mail.refused]
        mail.refused, mail.parked, mail.due = {}, True, 0.0
        self.waiting.pop(mail.id, None)
        self.spool.save(mail)
        log.error('%s: %s, kept in msgs/ but not tried again by itself: %s; '
                  '%s; --retry %s sends it again, --delete %s removes it',
                  mail.id, what, mail.problem, self.describe(mail, mail.to),
                  mail.id, mail.id)

    def park_flawed(self, id):
        """No server is told such an envelope. Not even deleteonerror deletes
        it: it was promised by a version that took more."""
        self.asked.discard(id)
        mail = self.load(id)
        if mail:
            mail.problem = mail.flaw
            mail.refused = dict.fromkeys(mail.to, mail.flaw)
            mail.to = []
            self.park(mail)

    def settle_homeless(self, id):
        """No account: permanent."""
        mail = self.load(id)
        if mail:
            report = Report(mail.to)
            report.settle_all(550, 'no account for sender <%s>, add a section '
                              'for it or [default]' % mail.frm)
            self.settle(mail, report, 'the ini')

    @staticmethod
    def describe(mail, recipients):
        return 'from <%s> to %s, subject %s' % (
            mail.frm, listed(list(recipients)), mail.field('subject') or '-')

    def is_expired(self, id):
        return self.spool.age(id) >= self.settings.config.retrydays * 86400

    def back_off(self, tries):
        """Seconds until the next try: sleeptime, doubled up to an hour, and
        a little more, so that not all come back at the same moment."""
        first = max(1, self.settings.config.sleeptime)
        longest = max(first, LONGEST_WAIT)
        return min(first * 2 ** min(tries - 1, 20) * (
            1 + os.urandom(1)[0] / 2560), longest)

    def put_off(self, id, seconds):
        """Any thread may call this."""
        self.waiting[id] = None
        self.inbox.put(functools.partial(
            self.remember, self.clock() + seconds, id))

    def remember(self, when, id):
        heapq.heappush(self.later, (when, id))

    # What the queue commands ask for.

    def fulfil(self, path, id, what):
        if id == 'all' and what == 'retry':
            self.begin(self.settings, self.handlers)
        elif Spool.ID.fullmatch(id):
            if id in self.spool.drafts or not self.withdraw(id):
                return                      # the next time we look
            if what == 'retry':
                self.retry(id)
            elif what == 'delete':
                self.discard(id)
        try:
            os.unlink(path)
        except OSError as error:
            log.error('%s cannot be removed: %s', path, error)

    def retry(self, id):
        self.asked.add(id)
        self.unrouted.appendleft(id)
        for lane in self.lanes.values():
            lane.release()
            self.staff(lane)

    def discard(self, id):
        mail = self.load(id)
        if mail:
            log.info('%s: deleted as asked for; %s', id,
                     self.describe(mail, mail.to))
            self.spool.remove(mail)

    def withdraw(self, id):
        """Takes an id out of wherever it waits; False if it is in a lane's
        hands."""
        later = [entry for entry in self.later if entry[1] != id]
        if id in self.waiting and later == self.later and not any(
                [lane.remove(id) for lane in self.lanes.values()]):
            return False
        heapq.heapify(later)
        self.later = later
        self.waiting.pop(id, None)
        if id in self.unrouted:
            self.unrouted.remove(id)
        return True


def grouped(verdicts):
    """[(reply, [recipients])] of {recipient: reply}."""
    groups = {}
    for recipient, reply in verdicts.items():
        groups.setdefault(reply, []).append(recipient)
    return list(groups.items())


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
    if not changeable(os.path.dirname(folder)):
        folder = os.path.realpath(folder)
    there = open_itself(folder)
    if there is not None:
        try:
            for name in ['.'] + os.listdir(there):
                if re.fullmatch(names, name):
                    give(there, name, owner)
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


GRACE = 8.0                 # seconds for what is under way at a stop


class Proxy:
    """The only class that knows all others."""

    hint = ('. If SIGHUP was meant to stop it: that was 1.x, install the '
            'present smtpproxy.init.d')

    def __init__(self, settings):
        self.settings, self.started = settings, settings.config
        self.spool = Spool(settings.config.msgdir)
        self.server = smtps.Server(self.make_session, hostname=HOST)

    def start(self):
        """Raises StartError; then nothing was touched."""
        try:
            self.prepare()
        except BaseException:
            self.server.stop(0)
            self.spool.close()
            raise
        try:
            self.relay.start(self.found)
            del self.found
            self.server.start()
        except RuntimeError as error:
            self.stop()
            raise StartError('%s: is this box out of memory?' % error)

    def prepare(self):
        config = self.settings.config
        self.server.limits = self.limits(self.settings)
        self.listen(config.host, config.port)
        if config.tlsport:
            self.listen(config.host, config.tlsport, tls=True)
        self.hand_over_files()
        self.drop_rights()
        open_log(self.settings)
        self.found = self.open_spool()
        for warning in self.settings.warnings:
            log.warning('%s', warning)
        self.handlers = Handlers(self.settings)
        self.relay = Relay(self.spool, self.settings, self.handlers)
        log.info('smtpproxy %s listens on %s; accounts: %d, mails in %s: %d',
                 VERSION, self.ports(), len(self.settings.accounts),
                 config.msgdir, len(self.found))

    def ports(self):
        return 'port ' + ', '.join(sorted({
            str(sock.getsockname()[1]) for sock in self.server.listeners}))

    def make_session(self, client):
        return Intake(client, self.spool, self.settings, self.relay,
                      bool(self.handlers.enabled))

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
            Networks(config.allow).__contains__, tls)

    # What --check tries without starting.

    def check_ports(self):
        config = self.settings.config
        for port in filter(None, (config.port, config.tlsport)):
            try:
                self.listen(config.host, port)
            except StartError as error:
                if 'is taken' not in str(error):    # perhaps by ourselves
                    raise

    def check_folder(self):
        folder = self.settings.config.msgdir
        there = folder if os.path.exists(folder) else os.path.dirname(folder)
        if not os.access(there, os.W_OK | os.X_OK):
            raise StartError('%s cannot be used: user %d may not write to %s'
                             % (folder, os.getuid(), there))

    def hand_over_files(self):
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
            os.makedirs(folder, 0o700, exist_ok=True)
            hand_over(folder, '.*', owner)
            hand_over(os.path.dirname(file), re.escape(
                os.path.basename(file)) + r'(\.\d+)?', owner)
        except OSError as error:
            raise StartError('%s cannot be given to %s: %s' % (
                error.filename or folder, name or self.settings.config.group,
                error.strerror))

    def drop_rights(self):
        uid, gid, name = identity(self.settings.config)
        try:
            become(uid if uid != os.getuid() else None,
                   gid if os.getuid() == 0 else None, name)
        except PermissionError:
            raise StartError('user= and group= in [config] need a start as '
                             'root')

    def open_spool(self):
        folder = self.settings.config.msgdir
        try:
            self.spool.open()
            found = self.spool.start()
            self.spool.sweep(found)
            return found
        except Busy:
            raise StartError('another smtpproxy works on %s: stop that one '
                             'first, or set another msgdir=' % folder)
        except OSError as error:
            raise StartError('%s cannot be used: %s; it must be a folder that '
                             'user %s may write to' % (
                                 folder, error.strerror, os.getuid()))

    def reload(self):
        """Reads the ini anew; a bad one changes nothing."""
        try:
            new = load(self.settings.file)
            limits = self.limits(new)
        except (ConfigError, StartError, OSError) as error:
            for line in str(error).splitlines():
                log.error('not reloaded: %s', line)
            return
        for key in ('port', 'tlsport', 'host', 'msgdir', 'user', 'group'):
            if getattr(new.config, key) != getattr(self.started, key):
                log.warning('[config] %s has changed: that needs a restart',
                            key)
        if self.started.tlsport and not new.config.tlscert:
            log.warning('[config] tlscert is gone: clients at tlsport %d get '
                        'a 421 until a restart', self.started.tlsport)
        tls_context.cache_clear()
        open_log(new)
        self.settings, self.handlers = new, Handlers(new)
        self.server.limits = limits
        self.relay.reload(new, self.handlers)
        for warning in new.warnings:
            log.warning('%s', warning)
        log.info('reloaded %s: %d accounts, waiting mail is tried now%s',
                 new.file, len(new.accounts), self.hint)
        self.hint = ''

    def stop(self):
        """Within ten seconds."""
        end = time.monotonic() + GRACE
        self.server.stop(GRACE / 2)
        if hasattr(self, 'relay'):
            self.relay.stop(end - time.monotonic())
        self.spool.close()
        log.info('stopped')


def listener_tls(config):
    """The ssl.SSLContext for clients. Raises StartError."""
    try:
        import ssl
        import warnings
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        if config.tlsweak:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore', DeprecationWarning)
                context.minimum_version = ssl.TLSVersion.TLSv1
            context.set_ciphers('DEFAULT:@SECLEVEL=0')
        context.load_cert_chain(config.tlscert, config.tlskey, password='')
        return context
    except ImportError as error:
        raise StartError(missing_module(error))
    except (OSError, ValueError) as error:
        raise StartError('[config] tlscert %s and tlskey %s cannot be used: '
                         '%s' % (config.tlscert, config.tlskey, error))


# --- Commands: what the owner asks on the command line ----------------------

def check(settings, options):
    """--check: would it start?"""
    tell('%s: [config] port=%d, msgs in %s, log in %s' % (
        settings.file, settings.config.port, settings.config.msgdir,
        settings.logging.file))
    for name, account in settings.accounts.items():
        tell('[%s]' % name)
        for key, value in account._asdict().items():
            if value != Account._field_defaults[key]:
                tell('    %s = %s' % (key, masked(key, value)))
    problems = []
    proxy = Proxy(settings)
    for step in (functools.partial(proxy.limits, settings),
                 proxy.check_ports, proxy.check_folder):
        try:
            step()
        except StartError as error:
            problems.append(str(error))
    proxy.server.stop(0)
    handlers = Handlers(settings)
    for name, _, _ in handlers.enabled:
        tell('handler %s is enabled' % name)
    for line in settings.warnings + handlers.problems:
        tell('warning: ' + line)
    for line in problems:
        say(line)
    tell('this would start' if not problems else 'this would not start')
    return 1 if problems else 0


def mails(spool):
    """The mails that wait, oldest first."""
    for id in spool.scan() if os.path.isdir(spool.folder) else ():
        try:
            mail = spool.load(id)
        except (Unfinished, Unreadable, FileNotFoundError):
            continue                # being received, or the service's to judge
        if mail:
            yield mail


def show_queue(settings, options):
    """--queue: what waits in msgs/."""
    rows = queue_rows(command_spool(settings))
    if options.json:
        import json
        print(json.dumps(rows, indent=1))   # ASCII, all else is escaped
        return 0
    line = '%-14s %9s %10s %5s  %-19s  %s'
    tell(line % ('id', 'age', 'size', 'tries', 'next try',
                 'sender -> recipients: last error'))
    for row in rows:
        tell(line % (row['id'], age_of(row['age']), row['size'],
                     row['tries'], 'parked' if row['parked']
                     else row['next'] or 'soon',
                     '<%s> -> %s%s' % (row['sender'], listed(
                         row['recipients']), row['error'] and (
                             ': ' + row['error']))))
    tell('%d mails' % len(rows))
    return 0


def queue_rows(spool):
    """[{what a script gets of a mail that waits}]"""
    rows, newest = [], (0, '')
    for mail in mails(spool):       # one at a time: there may be thousands
        rows.append(queue_row(mail))
        newest = max(newest, (max(arrival(mail.id), mail.seen), mail.path))
    now = spool_time(*newest)
    for row in rows:
        row['age'] = max(0, int(now - arrival(row['id'])))
    return rows


def queue_row(mail):
    next_try = mail.due and not mail.parked and time.strftime(
        '%Y-%m-%d %H:%M:%S', time.localtime(mail.due))
    return {'id': mail.id, 'size': mail.dot - 3 - mail.start, 'age': None,
            'sender': mail.frm, 'recipients': mail.to + list(mail.refused),
            'tries': mail.tries, 'parked': mail.parked,
            'next': next_try or None, 'error': mail.problem}


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
    """--retry ID|all and --delete ID: by the service if it runs, else here."""
    what = 'retry' if options.retry else 'delete'
    id, spool = options.retry or options.delete, command_spool(settings)
    if not os.path.isdir(spool.folder) or id not in spool.scan() and not (
            id == what == 'retry' or (id, what) == ('all', 'retry')):
        say('there is no mail %s in %s; see --queue' % (id, spool.folder))
        return 1
    try:
        spool.open(patience=0)
    except Busy:
        return ask_service(spool, id, what, settings.config.sleeptime)
    for mail in list(mails(spool)):
        if mail.id == id and what == 'delete':
            spool.remove(mail)
        elif id in (mail.id, 'all') and mail.parked:
            mail.parked = False
            spool.save(mail)
    spool.close()
    tell('deleted' if what == 'delete' else
         'the service does not run; it tries it when it starts')
    return 0


def ask_service(spool, id, what, sleeptime):
    """Waits until the service has done it."""
    tell('the service is asked, it looks every %d seconds' % sleeptime)
    path = spool.ask(id, what)
    end = time.monotonic() + sleeptime + 5
    while os.path.exists(path):
        if time.monotonic() > end:
            tell('the service is asked; it is busy with that mail')
            return 0
        time.sleep(0.05)
    tell('deleted' if what == 'delete' else 'the service tries it now')
    return 0


def show(settings, options):
    """--show ID: the mail as it would be sent."""
    for mail in mails(command_spool(settings)):
        if mail.id == options.show:
            account = settings.account_for(mail.frm) or Account()
            show_message(unstuffed(dress(mail, account))
                         + mail.msg[split_header(mail.msg):])
            return 0
    say('there is no mail %s; see --queue' % options.show)
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


def log_to_stdout():
    """The log among the lines of a command."""
    console = logging.StreamHandler(sys.stdout)
    console.setFormatter(ForCommand())
    root = logging.getLogger()
    root.handlers[:] = [console]
    root.setLevel(logging.INFO)


class TestMail(Mail):
    """A mail from a file, for handlers to look at."""

    def __init__(self, message):
        from email import message_from_bytes
        from email.utils import getaddresses
        headers = message_from_bytes(message)
        self.id, self.data, self.start = 'test', stuffed(message), 0
        self.body, self.dot = split_header(self.data), len(self.data) + 3
        self._msg = message
        addresses = [[Address(a) for _, a in getaddresses(
            [str(field) for field in headers.get_all(name, [])]) if a]
            for name in ('from', 'to')]
        self.frm, self.to = (addresses[0] or [Address('')])[0], (
            addresses[1] or [Address('nobody@localhost')])


def demo(options):
    """--demo: the whole trip on loopback. Returns 0 if the mail arrived."""
    import tempfile
    from email.message import EmailMessage
    import smtplib
    with tempfile.TemporaryDirectory() as folder:
        pop = DemoPop()
        provider = smtps.Server(functools.partial(DemoProvider, pop))
        provider.listen('127.0.0.1', 0)
        provider.start()
        path = os.path.join(folder, 'smtpproxy.ini')
        with open(path, 'w') as file:
            file.write(DEMO_INI % (
                folder, provider.listeners[0].getsockname()[1], pop.port))
        proxy = Proxy(load(path))
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
            arrived = pop.mails.get(timeout=20)
        except queue.Empty:
            arrived = None
        proxy.stop()
        provider.stop()
        pop.close()
    if arrived is None:
        say('the mail did not arrive; the log above should say why')
        return 1
    tell('')
    tell('The provider took it after the POP login; what arrived:')
    tell('')
    for line in unstuffed(arrived).decode().splitlines():
        tell('  | ' + line)
    return 0


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
smtpport=%d
popbeforesmtp=true
pophost=127.0.0.1
popport=%d
popssl=false
popusername=me
poppassword=secret
replyto=me@example.org
"""


class DemoPop(threading.Thread):
    """A POP3 server for one user, who may send mail after the login."""

    def __init__(self):
        super().__init__(name='demo-pop', daemon=True)
        self.sock = socket.create_server(('127.0.0.1', 0))
        self.port = self.sock.getsockname()[1]
        self.signed_in, self.mails = False, queue.SimpleQueue()
        self.start()

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
                tell('  pop: ' + plain(line))
                self.signed_in |= line == b'PASS secret\r\n'
                file.write(b'+OK\r\n')

    def close(self):
        self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


class DemoProvider(smtps.Session):
    """A mail server that relays after a POP login only."""

    def __init__(self, pop, client):
        super().__init__(client)
        self.pop = pop

    def rcpt(self, recipient):
        if not self.pop.signed_in:
            raise smtps.Refused(550, '5.7.1 POP before SMTP, please')

    def data(self, sender, recipients, parameters):
        return DemoMail(self.pop.mails)


class DemoMail(smtps.Receiver):

    def __init__(self, mails):
        self.mails, self.content = mails, b''

    def write(self, chunk):
        self.content += chunk

    def commit(self):
        self.mails.put(self.content)


# --- Main -------------------------------------------------------------------

def parse(arguments):
    import argparse
    parser = argparse.ArgumentParser(
        prog='smtpproxy.py', description='Hands on the mail of devices that '
        'can not talk to today\'s mail servers.')
    parser.add_argument('--config', metavar='FILE', default='smtpproxy.ini',
                        help='the ini (default: ./smtpproxy.ini)')
    add = parser.add_mutually_exclusive_group().add_argument
    add('--check', action='store_true', help='look for mistakes, do not start')
    add('--demo', action='store_true', help='the whole trip of a mail, here')
    add('--queue', action='store_true', help='what waits in msgs/')
    add('--retry', metavar='ID', help='try a mail, or all, now')
    add('--delete', metavar='ID', help='remove a mail')
    add('--show', metavar='ID', help='print a mail as it would be sent')
    add('--handler-test', metavar='FILE', help='what handlers would change')
    add('--version', action='version', version='smtpproxy ' + VERSION)
    parser.add_argument('--json', action='store_true', help='with --queue')
    return parser.parse_args(arguments)


COMMANDS = {'check': check, 'queue': show_queue, 'retry': ask, 'delete': ask,
            'show': show, 'handler_test': handler_test}


class Signals:
    """What the owner asks of the service: SIGTERM and SIGINT to stop, SIGHUP
    to reload. None is missed, whenever it comes: the interpreter writes its
    number into a pipe at once. A Python function would have to wait until
    the main thread runs again, which sleeps."""

    OURS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP

    def __init__(self):
        self._reader, writer = os.pipe()    # closed in what is started
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in self.OURS:
            signal.signal(number, lambda number, frame: None)
        # A handler may fork. Who ends the child must not end the service.
        os.register_at_fork(before=self._block, after_in_parent=self._unblock,
                            after_in_child=self._leave)

    def wait(self):
        """The numbers (bytes) of those that came since the last time."""
        return os.read(self._reader, 65536)

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
    proxy = Proxy(settings)
    proxy.start()
    for warning in settings.warnings:
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
        if signal.SIGTERM in came or signal.SIGINT in came:
            return
        try:
            proxy.reload()
        except Exception:
            log.exception('not reloaded: an error of ours')


def main(arguments):
    """Returns the exit code."""
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, 'reconfigure'):      # None without a terminal
            stream.reconfigure(errors='backslashreplace')
    options = parse(arguments)
    try:
        if options.demo:
            return demo(options)
        settings = load(options.config)
        for name, command in COMMANDS.items():
            if getattr(options, name):
                return command(settings, options)
        return serve(settings)
    except FileNotFoundError as error:
        say('%s is missing%s' % (error.filename, (
            ': copy smtpproxy.ini.example to it and fill it in, or see how it '
            'works with --demo') if error.filename == options.config else ''))
    except (ConfigError, StartError) as error:
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
