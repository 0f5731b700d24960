#!/usr/bin/env python3
"""smtpproxy - hands on the mail of devices that can't talk to mail servers.

Printers, cameras and old programs speak plain SMTP to this box; it keeps
their mail safe in msgs/, lets handlers look at it, and delivers it through
the account that belongs to the sender, with all that the account needs.

    client -> smtps.Server -> Intake -> Spool -> Relay -> Courier -> server
                                                   |
                                                Handlers

The sections are in the order of a mail's journey, each uses only those
above it: Settings, Log, Spool, Front door, Handlers, Advice, Sign-in,
Courier, Alerts, Relay, Proxy, Commands, Main. The keys of the ini are
explained in smtpproxy.ini.example.
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
    alert: bare_addresses = ''
    alertfrom: one_address = ''
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
    smtprate: Number(0, 100000) = 0
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

    def __repr__(self):
        return 'Account(%s)' % ', '.join(
            '%s=%s' % (key, masked(key, value))
            for key, value in self._asdict().items())


@functools.lru_cache(1000)      # asked for each mail
def connection_of(account):
    return account._replace(returnpath='', replyto='', forcefrom='',
                            localpassword='', use='')


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
        self._check_alerts(config, accounts)
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
            smtps.Networks(config.allow)
        except ValueError as error:
            self.complain('config', 'allow', '%s: use networks such as '
                          '192.168.1.0/24, or any' % error)
        try:
            identity(config)
        except KeyError as error:
            self.complain('config', 'user or group', '%s is not known on '
                          'this box' % error)
        return config, logs

    def _check_alerts(self, config, accounts):
        """Who sends the alerts has to have a way out."""
        if config.alert and not config.alertfrom:
            self.complain('config', 'alertfrom', 'is missing: alert needs the '
                          'address of an account as sender')
        elif config.alertfrom and not Settings(
                self.path, config, None, accounts, {}, []).account_for(
                    config.alertfrom):
            self.complain('config', 'alertfrom', '= %s: there is no account '
                          'for it' % config.alertfrom)

    def divided(self, accounts):
        """Warnings about one login at one server whose sections differ in
        what a connection needs: connections are then counted for each."""
        ways = {}
        for name, account in accounts.items():
            if account.smtpusername:
                login = account.server.lower(), account.smtpusername
                ways.setdefault(login, {}).setdefault(
                    account.connection, name)
        return ['%s: [%s] have the same smtphost and smtpusername, but other '
                'settings: their connections count apart; with use= they '
                'would share them' % (self.path, '], ['.join(names.values()))
                for names in ways.values() if len(names) > 1]

    def careless(self, config, accounts):
        """Warnings: what works, but may not be what the owner wants."""
        passwords = [(section, key, value)
                     for section in self.parser.sections()
                     for key, value in self.parser[section].items()
                     if key.endswith('password')]
        found = ['%s: [%s] %s has %%%%: smtpproxy 1.x read it as one %%, 2.0 '
                 'takes it as it stands' % (self.path, section, key)
                 for section, key, value in passwords if '%%' in value]
        found += self.divided(accounts)
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
FRESH, FRESH_SIZE = 32, 16384   # mails kept in memory as well; bytes of one
PUSH = 4 << 20                  # bytes of a large mail between two pushes


class Mail:
    """One mail in the spool.

    For handlers: to (list of Address), frm (Address), msg (bytes, read when
    asked for; assign to change it). id: str; handled: bool; tries: int; due:
    seconds since 1970, for people; problem: str, why it is still here; parked:
    bool; holds: bool, its problem is its account's, other mails wait for it;
    since: when that began, in the spool's time, or 0; flaw: str, why its
    envelope must not be sent, or ''. start, body, dot: offsets of the header,
    of the empty line behind it, and of what follows the final dot's line."""

    # What is kept while it is in trouble, and its types. What is new has a
    # line of its own: an earlier version passes over that line only.
    STATES = ({'to': list, 'refused': dict, 'tries': int, 'due': float,
               'problem': str, 'handled': bool, 'parked': bool},
              {'holds': bool, 'since': float})

    def __init__(self, id, path, data=None):
        self.id, self.path, self.data = id, path, data
        self.tries, self.due, self.problem = 0, 0.0, ''
        self.handled = self.parked = self.holds = False
        self.since = 0.0
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
        self.body = self.start + smtps.split_header(
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
        if any(all(type(value) is kinds.get(name)
                   for name, value in state.items())
               for kinds in self.STATES):
            vars(self).update(state)
            self.to = [Address(to) for to in self.to]

    def state(self):
        return {name: kind(getattr(self, name))
                for kinds in self.STATES for name, kind in kinds.items()}

    def state_lines(self, now):
        """What has changed since it was stored (bytes)."""
        import json
        state, lines = self.state(), b''
        for kinds in self.STATES:
            new = {name: state[name] for name in kinds
                   if state[name] != self.saved.get(name)}
            if new or not lines:
                line = json.dumps(dict(new, seen=now)).encode()
                lines += b'NOOP state=%s crc32=%08x\r\n' % (
                    line, zlib.crc32(line))
        return lines

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
        match = smtps.fields_named(name).search(self.header())
        value = match[0].partition(b':')[2] if match else b''
        return ' '.join(value.decode('utf-8', 'replace').split())[:100]

    @property
    def is_alert(self):
        """Is it ours, to the owner? What clients say is stored without that
        parameter."""
        return self.parameters.get('ENVID') == ALERT

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
        if ALERT in (parameters or ()):     # never a client's: not upper case
            first, options = HANDLED, options + ' ENVID=' + ALERT
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
    queue commands (ID.retry, ID.delete), alerts/ for what was told to the
    owner. Only the process that holds the lock on the folder changes anything
    but asked/.

    Time: ids and ages count seconds that this spool has seen with a service
    running, not the box's clock, which may begin in 1970 and jump. They go on
    where they were: each state says when it was saved."""

    ID = re.compile(r'[0-9a-f]{8}-[0-9a-f]{5}')
    OURS = ('corrupt', 'asked', 'alerts')

    @staticmethod
    def alert(line, about=''):
        """Told of what needs a person; see Alerts.tell."""

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
        state = mail.state()
        try:
            self.append(mail.path, mail.state_lines(int(self.now())))
            mail.saved = state
            self.unsaved.pop(mail.id, None)
        except OSError as error:
            self.unsaved[mail.id] = state
            log.error('%s: its state cannot be saved: %s; remembered until '
                      'the next stop', mail.id, error)

    @staticmethod
    def append(path, line):
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
        draft = Draft(self, mail.id, 'new', mail.frm, mail.to,
                      mail.parameters, HANDLED)
        try:
            os.unlink(draft.path)
        except FileNotFoundError:
            pass
        try:
            draft.write(smtps.stuffed(mail.msg))
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
            line = '%s: cannot be read: %s; it is kept as %s' % (
                name.rpartition('.')[0] or name, why, target)
            log.error('%s', line)
            self.alert(line)
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

    # Notes of ours, that have to last.

    def note(self, name):
        """The text (str) that was kept under that name. Raises OSError."""
        with open(os.path.join(self.folder, name, 'note')) as file:
            return file.read()

    def keep_note(self, name, text):
        """name: one of OURS. Raises OSError, then the old one is there."""
        folder = os.path.join(self.folder, name)
        self.make_folder(folder)
        path = os.path.join(folder, 'note')
        file = os.open(path + '.new', os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
                       0o600)
        try:
            os.write(file, text.encode())
            os.fsync(file)
        finally:
            os.close(file)
        os.rename(path + '.new', path)
        sync_folder(folder)

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
    may still change who it is from, so nobody is refused; alert: callable(
    line, about), see Alerts.tell."""

    told = set()        # unknown senders whose ini block is in the log

    def __init__(self, client, spool, settings, relay, any_sender, alert):
        super().__init__(client)
        self.spool, self.settings, self.relay = spool, settings, relay
        self.alert = alert
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
            self.alert('client %s was refused: wrong password for [%s]' % (
                self.client, section), 'password %s %s' % (
                    self.client.address, section))
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
        self.alert('client %s was refused: there is no account for its sender '
                   '<%s>; to take its mail add a section for it to the ini'
                   % (self.client, sender), 'sender ' + sender)
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
            relay.alerts.works_again('storing', 'mail can be stored again')
            relay.announce(
                self.id, self.sender, '%s: accepted from <%s> to %s, %d bytes,'
                ' client %s (%s)' % (
                    self.id, self.sender, listed(self.recipients),
                    self.draft.size, self.client,
                    self.client.hello or 'gave no name'))
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
            line = ('%s: not taken from <%s>, client %s: it cannot be stored:'
                    ' %s; answered 452, the client may try again' % (
                        self.id, self.sender, self.client, error))
            log.error('%s', line)
            self.intake.alert(line, 'storing')
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
        end = smtps.split_header(message)
        self.mail.msg = smtps.fields_named(name.lower()).sub(
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
    if isinstance(error, socket.timeout) or isinstance(
            error.__context__, socket.timeout):
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
    Advice('', GREETED, r'^5\d\d .*client host \[[^]]*\] blocked using|'
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
    Advice('', SENDING, r'^5\d\d 5\.(7\.0|4\.\d+) (?!.*\b(hops?|loop|size|'
           r"recipients?|user|mailbox)\b).*(limit\b.* exceeded|exceeded\b.* "
           r'limit|try again later)', 'account', LIMIT),
    Advice('', 'connect hello login mail', r'^5\d\d (?!.*\bsize\b).*'
           r'(limit\b.* (exceeded|reached)|exceeded\b.* limit|'
           r'try again later)', 'account', LIMIT),
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
           r'large)|message size limits?)', '',
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

NO_ADVICE = Advice()


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
    for row in KNOWN_REPLIES:
        # re keeps what it has compiled: who never fails pays nothing.
        if (stage in (row.stages or stage).split()
                and re.search(row.where, host.lower())
                and re.search(row.pattern, text)):
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
    is for the owner. advice: what is known of it; absent: nobody is there at
    all (refused, unreachable, unknown name)."""

    absent = False

    def __init__(self, text, advice=NO_ADVICE):
        super().__init__(with_advice(text, advice))
        self.advice = advice

    @property
    def takes_long(self):
        """Whether a try each few minutes would only make it worse."""
        return self.advice.kind in ('account', 'person')

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
    trouble.absent = stage == 'connect' and is_absence(error)
    return trouble


def weigh(report, host):
    """Puts each refused recipient of a smtps.Report where KNOWN_REPLIES says
    that it belongs, and the advice behind its reply. Returns None, or an
    AccountUnavailable if a reply is about the account."""
    refused = dict(report.later, **report.never)
    trouble = None
    for recipient, reply in refused.items():
        advice = advise(host, report.stages.get(recipient, ''), reply)
        if advice.kind:
            report.later.pop(recipient, None)
            report.never.pop(recipient, None)
        verdict = report.never if advice.kind == 'never' or (
            recipient in report.never) else report.later
        verdict[recipient] = with_advice(reply, advice)
        if advice.kind in ('account', 'person'):
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
    """RFC 4616."""
    return ask('AUTH PLAIN ' + smtps.encoded64('\0%s\0%s' % (user, password)))


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


class PopDialogue:
    """Mixed into poplib's classes: replies are bounded, and the dialogue goes
    to our log, without secrets."""

    def __init__(self, host, port, redact, debuglevel, **tls):
        # The constructor of poplib connects, and that uses these.
        self.redact, self.debuglevel = redact, debuglevel
        super().__init__(host, port, timeout=smtps.CONNECT_TIME, **tls)

    def _getline(self):
        if not isinstance(self.file, smtps.BoundedReader):
            self.file.close()
            self.file = smtps.BoundedReader(self.sock)
        self.file.expect(smtps.REPLY_TIME)
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
            log.info('pop %s: %s', self.host, self.redact(smtps.plain(line)))


@functools.lru_cache(None)
def pop_class(secure):
    """Made when first needed: most accounts never need poplib."""
    import poplib
    return type('Pop', (PopDialogue, poplib.POP3_SSL if secure
                        else poplib.POP3), {})


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


class SignIn:
    """What one account asks before it takes mail. All connections of the
    account share it, each from a thread of its own. The lock lets one of them
    sign in by POP at a time; the time of the last login is set only under it.

    clock: callable() -> seconds; pause: callable(seconds)."""

    def __init__(self, account, clock=time.monotonic, pause=time.sleep):
        self.account = account
        self._clock, self._pause = clock, pause
        self._pop_lock = threading.Lock()
        self._pop_time = None       # of the last login
        self._secrets = secrets_of(account)

    # Secrets.

    def redact(self, text):
        """text without the account's passwords: some servers repeat what they
        were told."""
        return self._secrets.sub('***', text)

    # POP before SMTP.

    def pop_is_due(self):
        """Whether a new POP login has to come before the next mail."""
        return self.account.popbeforesmtp and (
            self._pop_time is None
            or self._clock() - self._pop_time >= self.account.popcheckdelay)

    def by_pop(self, config):
        """One login for all connections of the account, if it is due. Waits
        config.waitafterpop seconds. Raises AccountUnavailable."""
        with self._pop_lock:
            if not self.pop_is_due():
                return
            try:
                self._pop_login(config.debuglevel)
            except Exception as error:
                raise unavailable(
                    'pop', error, self.account.pophost, self.account.popport,
                    self.redact) from error
            log.info('%s: POP login as %s; waiting %d s before SMTP',
                     self.account.pophost, self.account.popusername,
                     config.waitafterpop)
            self._pop_time = self._clock()
            self._pause(config.waitafterpop)

    def _pop_login(self, debuglevel):
        account = self.account
        tls = {'context': context_of(account)} if account.popssl else {}
        pop = pop_class(account.popssl)(account.pophost, account.popport,
                                        self.redact, debuglevel, **tls)
        try:
            pop.user(account.popusername)
            pop.pass_(account.poppassword)
            try:
                pop.quit()
            except Exception:
                pass                    # we are known there, that is enough
        finally:
            pop.close()

    # SMTP AUTH.

    def by_auth(self, delivery):
        """One mechanism after the other until one is taken. delivery: a
        smtps.Delivery behind its hello(). Raises AccountUnavailable,
        OSError."""
        account, answers = self.account, []
        if not (account.smtpusername and account.smtppassword):
            return
        for name in self._mechanisms(delivery):
            code, text = MECHANISMS[name](
                delivery.ask, account.smtpusername, account.smtppassword)
            if code == 235:
                return
            answers.append('%s: %d %s' % (
                name, code, self.redact(smtps.plain(text))))
            try:
                delivery.hello()
            except OSError:
                break                   # it has hung up
        advice = advise(account.smtphost, 'login', '%d %s' % (
            code, smtps.plain(text)))
        raise AccountUnavailable('login at %s as %s refused (%s)%s' % (
            account.server, account.smtpusername, '; '.join(answers),
            '' if advice.sentence else
            ': check smtpusername and smtppassword'), advice)

    def _mechanisms(self, delivery):
        """Names, best first. Raises AccountUnavailable."""
        if self.account.smtpauth != 'auto':
            return [self.account.smtpauth]
        offered = (delivery.offers('auth') or '').lower().split()
        names = [name for name in MECHANISMS if name in offered]
        if not names:
            raise AccountUnavailable(
                '%s offers no login that we know (%s)%s' % (
                    self.account.server, ' '.join(offered) or 'none at all',
                    '; smtpsecurity=tls, perhaps?'
                    if self.account.smtpsecurity == 'none' else ''))
        return names


# --- Courier: takes mails to an account's server ----------------------------

def envelope_sender(mail, account):
    """The address (str) that the server is told as the sender."""
    return account.returnpath and bare_address(account.returnpath) or (
        account.forcefrom and bare_address(account.forcefrom) or mail.frm)


def envelope_of(mail, account):
    """The smtps.Envelope of mail as this account sends it."""
    parameters = {}
    if 'BODY' in mail.parameters:
        parameters['BODY'] = mail.parameters['BODY']
    if 'SMTPUTF8' in mail.parameters and not mail.header().isascii():
        parameters['SMTPUTF8'] = ''
    return smtps.Envelope(envelope_sender(mail, account), mail.to, parameters)


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
    return new.encode() + smtps.fields_named(*unwanted).sub(
        b'', mail.header())


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


class Courier:
    """Takes mails to one account's server, over one connection that it makes
    as the account asks for and keeps for the next mail. One thread uses it;
    sign_in is shared with the account's other couriers.

    upcoming: None, or the (Mail, Account) whose envelope is under way: it
    must be delivered next."""

    def __init__(self, account, sign_in, config):
        self.account, self.sign_in, self.config = account, sign_in, config
        self.upcoming = None
        self._delivery = None

    @property
    def connected(self):
        return self._delivery is not None and self._delivery.connected

    def look(self):
        """Is somebody there at smtphost? Raises AccountUnavailable."""
        try:
            socket.create_connection(
                (self.account.smtphost, self.account.smtpport),
                smtps.CONNECT_TIME).close()
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
                report = self._send(envelope_of(mail, account),
                                    dress(mail, account), body, following)
        except AccountUnavailable:
            self.close()
            raise
        except Exception as error:
            self.close()
            if not isinstance(error, OSError):
                log.exception('%s: an error of ours', mail.id)
            report = smtps.Report(mail.to)
            report.error = error
        if report.error:
            report.give_up(explain(report.error, self.account.server))
        return report

    def _send(self, envelope, header, body, following):
        """On the connection we have or, if the server has closed that
        meanwhile, on a new one. Raises AccountUnavailable, OSError."""
        while True:
            self._connect()
            is_new = not self._delivery.used
            try:
                return self._delivery.send(
                    envelope, header, body, self._ahead(following))
            except smtps.ServiceUnavailable as error:
                if is_new:
                    raise self._unavailable('mail', error) from error
            except OSError:
                if is_new:
                    raise

    def _ahead(self, following):
        """following() in the words of smtps. A POP login may have to come
        before the next mail, so then no envelope goes ahead."""
        def next_envelope():
            self.upcoming = following()
            return self.upcoming and envelope_of(*self.upcoming)
        return None if self.account.popbeforesmtp else next_envelope

    # Getting there.

    def _connect(self):
        """Raises AccountUnavailable."""
        if self.connected and not self.sign_in.pop_is_due():
            return
        self.close()
        self.sign_in.by_pop(self.config)
        for stage, step in (('connect', self._open), ('hello', self._hello),
                            ('tls', self._start_tls),
                            ('login', self._log_in)):
            try:
                step()
            except AccountUnavailable:
                raise
            except Exception as error:
                raise self._unavailable(stage, error) from error

    def _open(self):
        account = self.account
        # Without a name of its own smtplib looks one up, which can take long.
        self._delivery = smtps.Delivery(
            account.smtphost, account.smtpport, account.localhostname or HOST,
            context_of(account) if account.smtpsecurity == 'ssl' else None,
            self.sign_in.redact, self.config.debuglevel)

    def _hello(self):
        self._delivery.hello()

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

    def _log_in(self):
        self.sign_in.by_auth(self._delivery)

    def _unavailable(self, stage, error):
        """An AccountUnavailable that says what happened where."""
        return unavailable(stage, error, self.account.smtphost,
                           self.account.smtpport,
                           hint=port_advice(self.account))

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
TWO_WEEKS = 14 * DAY


class Alerts:
    """Mails to the owner about what needs a person: one at once, then at most
    one an hour with all that came together. They go through the spool and the
    account of alertfrom; Mail.is_alert knows them.

    Any thread may tell. The relay's thread makes mails of it, and the one
    that stops it. The lock guards what was collected and _told, what the owner
    knows already. msgs/alerts/ keeps _told, the time of the last alert and
    the ids of those that wait over restarts, so that nothing begins anew.

    ids: of alerts that may still be in the spool."""

    def __init__(self, spool, settings):
        self.settings, self.wake = settings, lambda: None
        self._spool, self._lock = spool, threading.Lock()
        self._lines, self._left_out = [], 0
        self._told, self._last, self.ids = self._recall()
        self._next_look = 0.0       # at the certificate
        self._complaint = ''

    def tell(self, line, about=''):
        """line: str, for the owner. about: what it is about, told once until
        works_again() or forget()."""
        if not self.settings.config.alert:
            return
        with self._lock:
            if about in self._told:
                return
            if about and len(self._told) < MOST_SUBJECTS:
                self._told[about] = True
            self._collect(line)
        if self._is_due():
            self.wake()

    def works_again(self, about, line):
        """line: for the owner, if that was told."""
        if about in self._told:
            self.forget(about)
            self.tell(line)

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

    def post(self, announce, at_a_stop=False):
        """Makes a mail of what was collected, if it is time. announce:
        callable(id, sender), told of it. Returns its id, or None."""
        if not (self._lines and self.settings.config.alert) or not (
                at_a_stop or self._is_due()):
            return None
        with self._lock:
            lines, self._lines = self._lines, []
            left_out, self._left_out = self._left_out, 0
        try:
            id = self._store(lines, left_out)
        except OSError as error:
            self._take_back(lines, left_out, error)
            return None
        self._last = self._spool.now()
        self.ids = [one for one in self.ids if os.path.exists(
            self._spool.path(one, 'mail'))] + [id]
        self._remember()
        announce(id, self.settings.config.alertfrom)
        self._spool.drafts.discard(id)
        return id

    # With the lock held.

    def _collect(self, line):
        if len(self._lines) < ALERT_LINES - 3:
            self._lines.append(line)
        else:
            self._left_out += 1

    # When.

    def _is_due(self):
        """Also if the spool's time was set back."""
        return bool(self._lines) and not (
            0 <= self._spool.now() - self._last < HOUR)

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
        """Keeps over restarts what the next alert depends on."""
        import json
        with self._lock:
            memory = {'last': int(self._last), 'told': list(self._told),
                      'ids': self.ids}
        try:
            self._spool.keep_note('alerts', json.dumps(memory))
        except OSError as error:
            log.error('what was told to %s cannot be kept: %s; it may be told '
                      'again after a restart', self.settings.config.alert,
                      error)

    def _recall(self):
        """({about: True}, time of the last alert, ids) of _remember."""
        import json
        try:
            memory = json.loads(self._spool.note('alerts'))
            return (dict.fromkeys(memory['told'], True), int(memory['last']),
                    list(memory['ids']))
        except (OSError, ValueError, KeyError, TypeError):
            return {}, -FOREVER, []     # there was none, or it is damaged

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
            'MIME-Version: 1.0',
            'Content-Type: text/plain; charset=utf-8',
            'Content-Transfer-Encoding: 8bit', '']
        text += ['- ' + in_one_line(line) for line in lines]
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


def in_one_line(text):
    """text as a line of a mail: RFC 5322 2.1.1 allows 998 bytes."""
    line = printable(text).encode('utf-8', 'replace')
    return line[:900].decode('utf-8', 'ignore') + '...' * (len(line) > 900)


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
BACKLOG = 8                 # mails that wait per connection before one more


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
            self.in_hand.pop(id, None)
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
            self.in_hand.pop(id, None)
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
    nothing is tried before `not_before`.

    With smtprate the mails are taken evenly, none before `_next_slot`. What
    waits for that waits in `due`, and the connection is kept for it.
    """

    def __init__(self, account, clock, deliver, began=0.0):
        """account: Account.connection; deliver: callable(Destination), the
        life of a delivery thread; began: when the relay was started, which
        may have sent one just before."""
        super().__init__(clock)
        self._pace = 60 / account.smtprate if account.smtprate else 0.0
        self._next_slot = began + self._pace
        self.account, self._deliver = account, deliver
        self.sign_in = SignIn(account, clock)
        self.not_before, self.why = 0.0, ''
        self.absent = False         # nobody was there: see AccountUnavailable
        self._advice = NO_ADVICE    # of what it is deferred for
        self.since = 0.0            # when that began, in the spool's time
        self.failures = 0           # of the account, one after the other
        self._threads = 0
        self._most_threads = account.smtpconnections
        self._gets_through = False  # more connections are worth a try

    # For who has mail for it.

    def outlook(self):
        """Why a mail that comes now has to wait, for its log line, or ''."""
        if self.not_before:
            return '; it waits with %d more for %s: %s' % (
                len(self.due), self.account.server, self.why)
        if self._pace and self.due:
            return '; with smtprate=%d its turn comes in about %d seconds' % (
                self.account.smtprate, len(self.due) * self._pace)
        return ''

    def retry(self, id=None):
        """A mail, or all that wait here, may be tried now, and the account
        too, whatever it was deferred for."""
        with self.changed:
            for one in [id] if id else list(self.due):
                if one in self.due:
                    self._schedule(one, 0.0, first=bool(id))
            self.not_before, self.absent = 0.0, False
            self.start_threads()
            self.changed.notify_all()

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
            if id:
                self._next_slot = self.clock() + self._pace
            return id

    def wait(self):
        """Sleeps until a mail may be tried. False: there is nothing more to
        do for this thread, which is not counted any more."""
        with self.changed:
            while not self._is_ready():
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
            self.failures, self.why, self.absent = 0, '', False
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
            if not others or not self.give_back(id):
                return 0
            self._threads = self._most_threads = others
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
        return self._next_slot <= self.clock() and super()._is_ready()

    def _has_next(self):
        """Whether mail could go now, or as soon as its turn comes."""
        return (not self.closed and not self.not_before
                and super()._is_ready())

    def _until_next(self):
        blocked = max(self.not_before, self._next_slot) - self.clock()
        return blocked if blocked > 0 else super()._until_next()

    def _wants_thread(self):
        if not self._threads:
            return bool(self.due) and not self.closed
        missed_turn = self._next_slot + self._pace <= self.clock()
        return (self._gets_through and not self.not_before and missed_turn
                and not self.closed and self._threads < self._most_threads
                and len(self._ready) > self._threads * BACKLOG)

    def _leave(self):
        self._threads -= 1
        if not self._threads:
            self._most_threads = self.account.smtpconnections
            self._gets_through = False


def back_off(tries, config):
    """Seconds until the next try: sleeptime, doubled up to an hour, and a
    little more, so that not all come back at the same moment."""
    first = max(1, config.sleeptime)
    return min(first * 2 ** min(tries - 1, 20) * (
        1 + os.urandom(1)[0] / 2560), longest_wait(config))


def longest_wait(config):
    """Seconds: an hour, or a sleeptime that is longer."""
    return max(config.sleeptime, LONGEST_WAIT)


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

    def __init__(self, clock, deliver):
        """deliver: callable(Destination), the life of a delivery thread."""
        self._clock, self._deliver, self._began = clock, deliver, clock()
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
        return found or self.destinations.setdefault(
            account.connection, Destination(
                account.connection, self._clock, self._deliver, self._began))

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

    def __init__(self, spool, clock, alert):
        """alert: callable(line), see Alerts.tell."""
        self._spool, self._clock, self._alert = spool, clock, alert

    def settle(self, mail, report, server, settings, wait=0,
               level=logging.WARNING):
        """Acts on the verdict of one attempt. Returns when the mail may be
        tried again, None if it is delivered, deleted or parked. wait: least
        seconds until then; level: of the log line that says so."""
        for reply, recipients in grouped(report.sent):
            log.info('%s: sent to %s by %s: %s', mail.id, listed(recipients),
                     server, reply)
        mail.to = [Address(a) for a in report.later]
        mail.refused.update(report.never)
        if report.later or mail.refused:
            return self._settle_failure(mail, report, server, settings, wait,
                                        level)
        self._spool.remove(mail)
        return None

    def _settle_failure(self, mail, report, server, settings, wait, level):
        failed = dict(mail.refused, **report.later)
        why = problems(failed)
        if server not in why:
            why = '%s said %s' % (server, why)
        mail.tries += 1
        mail.problem, mail.handled, mail.parked = why, True, False
        self.note_trouble(mail)
        mail.holds = bool(wait)
        if settings.config.deleteonerror and not mail.is_alert:
            self._tell_owner(mail, settings, (
                '%s: deleted (deleteonerror=true), not delivered: %s; %s' % (
                    mail.id, why, describe(mail, failed))))
            self._spool.remove(mail)
            return None
        if not mail.to or self._is_expired(mail, settings):
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

    def _is_expired(self, mail, settings):
        account = settings.account_for(mail.frm)
        return self.is_expired(mail.id, settings, mail.since if account
                               and account.smtprate else 0.0)

    def note_trouble(self, mail):
        """Keeps when the trouble of a mail began; returns when that of its
        account did, if it is that. In the spool's time."""
        now = self._spool.now()
        mail.since = mail.since or now
        return mail.since if mail.holds else now

    def note_deferral(self, mail, destination, wait, level):
        """Why its account waits, in the mail that was tried and in the log.
        Where nobody was there no time is kept: each sleeptime."""
        mail.tries = destination.failures or mail.tries + 1
        mail.problem, mail.handled = destination.why, True
        mail.holds = True
        mail.due = 0.0 if destination.absent else time.time() + wait
        self._spool.save(mail)
        log.log(level, '%s: not delivered: %s; try %d, the next one %s %d '
                'seconds, %d more mails wait for it', mail.id, mail.problem,
                mail.tries, 'each' if destination.absent else 'in', wait,
                len(destination.due))

    def park(self, mail, why, settings):
        """Keeps a mail until the owner asks for another try."""
        what = 'refused for good' if not mail.to else (
            'not delivered in %d days' % settings.config.retrydays)
        mail.to += [Address(a) for a in mail.refused]
        mail.refused, mail.parked, mail.due = {}, True, 0.0
        mail.problem, mail.handled = why, True
        self._spool.save(mail)
        self._tell_owner(mail, settings, (
            '%s: %s, kept in msgs/ but not tried again by itself: %s; %s; '
            '--retry %s sends it again, --delete %s removes it' % (
                mail.id, what, mail.problem, describe(mail, mail.to),
                mail.id, mail.id)))

    def _tell_owner(self, mail, settings, line):
        """That a mail needs a person: in the log and, but for trouble with an
        alert, by mail. An alert may have come back to us as a client's."""
        log.error('%s', line)
        returned = (mail.frm.lower() == settings.config.alertfrom.lower()
                    and mail.field('auto-submitted') not in ('', 'no'))
        if not mail.is_alert and not returned:
            self._alert(line)

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


class DeliveryAgent:
    """Delivers one destination's mail, in a thread of its own: the relay's
    hands. Whatever comes of a mail, it gives the id back, says that it is
    done with it, or has it rerouted."""

    def __init__(self, relay, destination):
        self._relay, self._destination = relay, destination
        self._server = destination.account.server

    def run(self):
        """The life of the thread."""
        goes_on = True
        while goes_on and self._destination.wait():
            courier = Courier(self._destination.account,
                              self._destination.sign_in,
                              self._relay.settings.config)
            try:
                goes_on = self._deliver_ready(courier)
            except Exception:
                log.exception('%s: an error in a delivery; the mail is tried '
                              'again later', self._server)
                self._relay.queues.let_all_go(
                    self._destination, self._relay.in_a_while())
            courier.close(politely=True)

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
            except AccountUnavailable as error:
                return self._settle_unavailable(mail, error, settings)
            trouble = weigh(report, self._destination.account.smtphost)
            if trouble and not settings.config.deleteonerror:
                courier.close()     # the next envelope may be under way
                self._settle_limit(mail, report, trouble, settings)
                return True
            self._note_success()
            self._settle(mail, report, settings)
            at_hand = courier.upcoming or self._next_mail(LINGER)
        return True

    def _deliver(self, courier, mail, account):
        """Raises AccountUnavailable."""
        destination = self._destination
        if destination.absent and destination.account.popbeforesmtp:
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

    def _note_success(self):
        """The account's server took our login."""
        if self._destination.absent:
            log.info('%s is there again: %d mails are tried now',
                     self._server, len(self._destination.due))
        way = self._destination.account.way
        self._relay.alerts.works_again(way, '%s works again' % way)
        self._destination.succeed()

    def _settle(self, mail, report, settings, wait=0, level=logging.WARNING):
        when = self._relay.policy.settle(mail, report, self._server, settings,
                                         wait, level)
        self._relay.queues.let_go(mail.id, self._destination, when)

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
        elif settings.config.deleteonerror:
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
        self._park_expired(settings)

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
        if error.takes_long:
            wait = longest_wait(settings.config)
        policy = self._relay.policy
        level = self._hold(mail, error, wait, failures)
        self._park_expired(settings)
        when = 0.0
        if self._is_expired(mail.id, settings):
            policy.park(mail, why, settings)
            when = None
        elif is_news:
            policy.note_deferral(mail, destination, wait, level)
        self._relay.queues.let_go(mail.id, destination, when)

    def _hold(self, mail, error, wait, failures):
        """Nothing of the account is tried for so long. Returns the level of
        the log line about it."""
        destination = self._destination
        if error.advice.kind == 'person':
            self._relay.alerts.tell('%s: no mail passes before you act, %d '
                                    'wait: %s' % (
                                        destination.account.way,
                                        len(destination.due) + 1, error),
                                    destination.account.way)
        return destination.defer(wait, error, failures,
                                 self._relay.policy.note_trouble(mail))

    def _park_expired(self, settings):
        """What has waited too long for its account."""
        policy, destination = self._relay.policy, self._destination
        for id in destination.withdraw(
                lambda id: self._is_expired(id, settings)):
            mail = self._relay.load(id, destination)
            if mail:
                policy.park(mail, destination.why, settings)
                destination.done(id)

    def _is_expired(self, id, settings):
        """Has it waited too long for its account?"""
        destination = self._destination
        return self._relay.policy.is_expired(
            id, settings,
            destination.since if destination.account.smtprate else 0.0)


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
                 alerts=None):
        self._spool, self._clock = spool, clock
        self.settings, self._handlers = settings, handlers
        self.alerts = alerts or Alerts(spool, settings)
        self.alerts.wake = self.wake
        self.policy = FailurePolicy(spool, clock, self.alerts.tell)
        self.queues = Queues(clock, self._deliver)
        self._last_round = -FOREVER
        self._reloaded = False          # the relay thread has to rescan
        self._last_errno = None
        self._thread = threading.Thread(target=self._run, name='relay',
                                        daemon=True)

    # For other threads.

    def start(self, found):
        """found: ids of mails in the spool."""
        for id in found:
            self.queues.unrouted.add(id, urgent=id in self.alerts.ids)
        self._thread.start()

    def announce(self, id, sender, line):
        """A mail is safe on disk. line: what the log says of that; what the
        mail has to wait for comes behind it."""
        destination = None
        if not self._handlers.enabled:
            destination = self._destination_of(sender)
        log.info('%s%s', line, destination.outlook() if destination else '')
        if destination is None or not destination.add(id):
            self.queues.unrouted.add(id)

    def reload(self, settings, handlers):
        """New settings; all that waits is tried at once, parked or not."""
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
            self._thread.join(grace)
        left = self.queues.join(end - time.monotonic())
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
                self.queues.let_all_go(self.queues.unrouted, self.in_a_while())

    def _do_next(self):
        if self._reloaded:
            self._reloaded = False
            self._rescan()
        next_round = self._last_round + self.settings.config.sleeptime
        id = self.queues.unrouted.take(max(0.0, next_round - self._clock()))
        if id:
            self._route(id)
        if self._clock() >= next_round:
            self._make_round()

    def _make_round(self):
        """What is left over, and what the owner has asked for."""
        self._last_round = self._clock()
        self._spool.bury()
        for path, id, what in self._spool.asked():
            self._serve_request(path, id, what)
        self.queues.tidy()
        for destination in list(self.queues.destinations.values()):
            self._watch(destination)
        self.alerts.make_round(self._announce_alert)

    def _watch(self, destination):
        """Has an account been in trouble for too long?"""
        account, waiting = destination.account, len(destination.due)
        if destination.since and (
                self._spool.now() - destination.since >= HOUR):
            self.alerts.tell('%s could not be used for an hour, %d mails wait:'
                             ' %s' % (account.way, waiting, destination.why),
                             account.way)
        backlog = 'backlog of ' + account.way
        if account.smtprate and waiting > 60 * account.smtprate:
            self.alerts.tell('%s: %d mails wait for their turn, with smtprate='
                             '%d for more than an hour' % (
                                 account.way, waiting, account.smtprate),
                             backlog)
        elif not waiting:
            self.alerts.forget(backlog)

    def _announce_alert(self, id, sender):
        """An alert goes before other mail, and no handler sees it."""
        destination = self._destination_of(sender)
        if destination is None or not destination.add(id, urgent=True):
            self.queues.unrouted.add(id)

    def _route(self, id):
        """Gives a mail that this thread has in hand to its destination."""
        mail = self.load(id, self.queues.unrouted, bool(self._handlers.enabled))
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
        waits = destination.outlook()
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
        except OSError as error:
            # Once, if all of msgs/ is away.
            log.log(logging.DEBUG if error.errno == self._last_errno
                    else logging.ERROR, '%s: cannot be read: %s; it is tried '
                    'again later', id, error)
            self._last_errno = error.errno
            self.queues.let_go(id, queue_, self.in_a_while())
            return None
        queue_.done(id)
        return None

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
            log.error('%s: handlers cannot be run on it, or what they made '
                      'of it not stored: %r; tried again later', mail.id,
                      error)
            self.queues.unrouted.give_back(mail.id, self.in_a_while())
            return False

    def _rescan(self):
        """After a reload: every mail finds its way anew, and what is parked
        is tried once more. What a thread has in hand just now may fail in the
        next moment: for that the owner's wish is left as a request."""
        found = self._spool.scan()       # first: if it fails nothing is lost
        recalled, in_hand = self.queues.recall({
            account.connection for account in self.settings.accounts.values()})
        self.queues.retry_all()
        for id in set(found) - recalled - in_hand:
            if not self.queues.unrouted.closed:
                self._revive(id)
        for id in in_hand:
            self._spool.ask(id, 'retry')

    def _revive(self, id):
        """A mail that no destination has: if it is parked, it is tried again,
        and goes on with that after a crash."""
        self.queues.unrouted.add(id)
        if not self.queues.unrouted.claim(id):
            return                      # we are closed
        mail = self.load(id, self.queues.unrouted, to_send=False)
        if mail is None:
            return
        if mail.parked:
            mail.parked = False
            self._spool.save(mail)
        self.queues.unrouted.give_back(id)

    # The owner's requests. A request's file goes when it has been done, so
    # that a crash forgets none.

    def _serve_request(self, path, id, what):
        if id == 'all' and what == 'retry':
            self._retry_all()
        elif Spool.ID.fullmatch(id) and not self._serve(id, what):
            return                          # the next time we look
        try:
            os.unlink(path)
        except OSError as error:
            log.error('%s cannot be removed: %s', path, error)

    def _retry_all(self):
        found = self._spool.scan()
        self.queues.retry_all()
        for id in found:
            queue_ = self.queues.holder(id)
            if queue_ in (None, self.queues.unrouted):
                self._revive(id)
            elif id in queue_.in_hand:
                self._spool.ask(id, 'retry')

    def _serve(self, id, what):
        """Whether it could be done: a mail that a thread has in hand, or that
        is still being received, has to wait."""
        queue_ = self.queues.holder(id) or self.queues.unrouted
        if id in self._spool.drafts or id in queue_.in_hand:
            return False
        if what == 'delete':
            return self._discard(id, queue_)
        if what == 'retry' and queue_ is self.queues.unrouted:
            self._revive(id)
            if self.queues.unrouted.claim(id):
                self._route(id)
            queue_ = self.queues.holder(id)
        if what == 'retry' and isinstance(queue_, Destination):
            queue_.retry(id)
        return True

    def _discard(self, id, queue_):
        if queue_ is self.queues.unrouted:
            queue_.add(id)
        if not queue_.claim(id):
            return False                    # a thread has just taken it
        mail = self.load(id, queue_)
        if mail:
            log.info('%s: deleted as asked for; %s', id,
                     describe(mail, mail.to))
            self._spool.remove(mail)
            queue_.done(id)
        return id not in queue_             # it may be unreadable for now

    def in_a_while(self):
        """When something that went wrong by itself may be tried again."""
        return self._clock() + back_off(1, self.settings.config)


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
        self.alerts = Alerts(self.spool, settings)
        self.spool.alert = self.alerts.tell
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
        self.relay = Relay(self.spool, self.settings, self.handlers,
                           alerts=self.alerts)
        log.info('smtpproxy %s listens on %s; accounts: %d, mails in %s: %d',
                 VERSION, self.ports(), len(self.settings.accounts),
                 config.msgdir, len(self.found))

    def ports(self):
        return 'port ' + ', '.join(sorted({
            str(sock.getsockname()[1]) for sock in self.server.listeners}))

    def make_session(self, client):
        return Intake(client, self.spool, self.settings, self.relay,
                      bool(self.handlers.enabled), self.alerts.tell)

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
        smtps.client_context.cache_clear()
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
        return smtps.server_context(config.tlscert, config.tlskey,
                                    config.tlsweak)
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
    """--queue: what waits in msgs/, and what each account waits for."""
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
                     row['tries'], next_try(row, settings),
                     '<%s> -> %s%s' % (row['sender'], listed(
                         row['recipients']), row['error'] and (
                             ': ' + row['error']))))
    tell('%d mails' % len(rows))
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


def next_try(row, settings):
    """When a mail is tried again, for people. Where nobody was there at all
    that is each sleeptime, and no time of its own is stored."""
    if row['parked']:
        return 'parked'
    return row['next'] or ('each %d s' % settings.config.sleeptime
                           if row['tries'] else 'soon')


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
            show_message(smtps.unstuffed(dress(mail, account))
                         + mail.msg[smtps.split_header(mail.msg):])
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
        self.id, self.data, self.start = 'test', smtps.stuffed(message), 0
        self.body, self.dot = smtps.split_header(self.data), len(self.data) + 3
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
    for line in smtps.unstuffed(arrived).decode().splitlines():
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
                tell('  pop: ' + smtps.plain(line))
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
