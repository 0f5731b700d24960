"""ProxyCase: a whole smtpproxy in a temporary folder, with asserts in the
words of its owner. A failed test keeps its folder and prints its log."""
import logging
import os
import shutil
import sys
import tempfile
import time
import unittest

import smtpproxy
from tests.fakes import Client, FakeSMTP, wait_until

SENDER, OTHER = 'printer@home.lan', 'camera@home.lan'
A, B = 'a@example.org', 'b@example.org'


class FolderCase(unittest.TestCase):
    """A temporary folder, and nothing else."""

    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix='smtpproxy-test-')
        self.addCleanup(self.clean)

    def clean(self):
        if self.has_failed():
            print('\nkept: %s\n%s' % (self.folder, self.log()),
                  file=sys.stderr)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    def has_failed(self):
        outcome = getattr(self, '_outcome', None)
        result = getattr(outcome, 'result', None)
        pairs = getattr(result, 'errors', []) + getattr(
            result, 'failures', []) + [
                pair for pair in getattr(outcome, 'errors', []) if pair[1]]
        return any(test is self for test, _ in pairs)

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def write(self, name, text):
        """Writes a file below the folder; returns its path."""
        path = self.path(name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'wb') as file:
            file.write(text if isinstance(text, bytes) else text.encode())
        os.chmod(path, 0o600)
        return path

    def log(self):
        try:
            with open(self.path('smtpproxy.log'), encoding='utf-8') as file:
                return file.read()
        except OSError:
            return ''

    def assertLogged(self, *words):
        """One line of the log holds all these words; returns that line."""
        def find():
            for line in self.log().splitlines():
                if all(str(word) in line for word in words):
                    return line
        try:
            return wait_until(find)
        except AssertionError:
            self.fail('no log line with %s in:\n%s' % (
                ' and '.join(map(repr, words)), self.log()))

    def assertNotLogged(self, word):
        self.assertNotIn(word, self.log())


class ProxyCase(FolderCase):
    """self.upstream is where the sender's account delivers to."""

    def setUp(self):
        super().setUp()
        self.upstream = self.serve(FakeSMTP())
        self.proxy = None

    def serve(self, server):
        """A fake that is closed at the end of the test."""
        self.addCleanup(server.close)
        return server

    def ini(self, config=None, accounts=None, more=''):
        """Writes smtpproxy.ini; returns its path. accounts: {section: {key:
        value}}, by default the sender's account at self.upstream."""
        if accounts is None:
            accounts = {SENDER: self.account()}
        sections = dict({'config': dict(
            {'port': 0, 'host': '127.0.0.1', 'sleeptime': 1,
             'waitafterpop': 0, 'deleteonerror': 'false',
             'msgdir': self.path('msgs')}, **(config or {})),
            'logging': {'level': 'DEBUG'}}, **accounts)
        text = ''.join('[%s]\n%s\n' % (name, ''.join(
            '%s=%s\n' % pair for pair in keys.items()))
            for name, keys in sections.items())
        return self.write('smtpproxy.ini', text + more)

    def account(self, server=None, **keys):
        server = server or self.upstream
        return dict({'smtphost': server.host, 'smtpport': server.port,
                     'localhostname': 'box.home.lan'}, **keys)

    def start(self, config=None, accounts=None, more=''):
        """Starts a proxy; it is stopped at the end of the test."""
        path = self.ini(config, accounts, more)
        self.proxy = smtpproxy.Proxy(smtpproxy.load(path))
        self.proxy.start()
        self.addCleanup(self.stop)
        return self.proxy

    def stop(self):
        """Stops the proxy, if it runs, and its log."""
        proxy, self.proxy = self.proxy, None
        if proxy:
            proxy.stop()
        for handler in logging.getLogger().handlers[:]:
            logging.getLogger().removeHandler(handler)
            handler.close()

    @property
    def address(self):
        return self.proxy.server.listeners[0].getsockname()[:2]

    def client(self):
        """A raw client that has read the greeting."""
        client = Client(self.address)
        self.addCleanup(client.close)
        code, _ = client.reply()
        self.assertEqual(220, code)
        return client

    def greeted(self):
        client = self.client()
        client.command('EHLO printer')
        return client

    def submit(self, content=b'Subject: test\r\n\r\nhello\r\n', sender=SENDER,
               to=(A,), client=None):
        """Hands a mail in; returns its id."""
        own = client or self.greeted()
        self.assertEqual(250, own.command('MAIL FROM:<%s>' % sender)[0])
        for recipient in to:
            self.assertEqual(250, own.command('RCPT TO:<%s>' % recipient)[0])
        code, text = own.data(content)
        self.assertEqual(250, code, text)
        if client is None:
            own.close()
        return text.split()[-1]

    def in_hand(self):
        """The ids that the relay's threads have in hand."""
        return [id for queue in self.proxy.relay.queues
                for id in list(queue.in_hand)]

    def spooled(self):
        """The names of the mail files in msgs/."""
        try:
            return sorted(name for name in os.listdir(self.path('msgs'))
                          if name.endswith('.mail'))
        except OSError:
            return []

    def assertSpooled(self, count, seconds=5):
        """So many mails wait in msgs/, at the latest after a moment."""
        end = time.monotonic() + seconds
        while len(self.spooled()) != count and time.monotonic() < end:
            time.sleep(0.01)
        self.assertEqual(count, len(self.spooled()), self.log())

    def assertDelivered(self, to, count=1, upstream=None):
        """The count-th mail at the server is to these; returns it."""
        mails = (upstream or self.upstream).wait(count)
        self.assertEqual(sorted(to), sorted(mails[count - 1].to))
        return mails[count - 1]
