"""What file systems do wrong, call by call: CIFS, FUSE, NFS, FAT, full disks.

One table: a system call on msgs/, what it is about, what it says, and what
follows. The calls are those that smtpproxy makes there; it changes no modes,
makes no links and asks for no times."""
import builtins
import contextlib
import errno
import fcntl
import os
import re
import shutil
import unittest
from typing import NamedTuple
from unittest import mock

import smtpproxy
from tests.case import A, B, ProxyCase

FOLDER, MAIL, NEW, ANY = r'/msgs$', r'\.mail$', r'\.new$', r'/msgs'
ASKED, CORRUPT, JUNK = r'/asked', r'/corrupt', r'/junk$'
UNABLE = 'EINVAL ENOSYS ENOTSUP EOPNOTSUPP EISDIR'
BROKEN = 'EIO ENOSPC EDQUOT EROFS ESTALE'
CONTENT = b'Subject: x\r\n\r\n' + b'0123456789abcd\r\n' * 2000


class Row(NamedTuple):
    """on: a pattern of paths; said: in the log or the refusal."""
    call: tuple
    on: str
    errors: str
    follows: str
    said: str = ''


ROWS = (
    Row((os, 'mkdir'), FOLDER, 'EACCES ' + BROKEN, 'is_refused', 'be used'),
    Row((os, 'listdir'), FOLDER, 'EACCES ENOTDIR ' + BROKEN, 'is_refused',
        'cannot be used'),
    Row((os, 'open'), FOLDER, 'EACCES ' + BROKEN, 'is_refused', 'be used'),
    # The lock.
    Row((fcntl, 'flock'), FOLDER, UNABLE + ' EBADF', 'is_used_without',
        'cannot lock folders'),
    Row((fcntl, 'flock'), ANY, UNABLE + ' EBADF ENOLCK EIO', 'is_refused',
        'a second service could send all mail twice'),
    Row((fcntl, 'flock'), ANY, 'EAGAIN EACCES', 'is_refused',
        'another smtpproxy'),
    # A mail comes.
    Row((os, 'fsync'), FOLDER, UNABLE, 'is_used_without',
        'cannot sync folders'),
    Row((os, 'fsync'), FOLDER, BROKEN, 'is_a_452'),
    Row((os, 'fsync'), MAIL, UNABLE + ' ' + BROKEN, 'is_a_452'),
    Row((os, 'open'), MAIL, 'EACCES EMFILE ' + BROKEN, 'is_a_452'),
    Row((os, 'write'), MAIL, 'EFBIG ' + BROKEN, 'is_a_452'),
    Row((os, 'close'), MAIL, BROKEN, 'is_a_452'),
    Row((os, 'posix_fadvise'), MAIL, UNABLE + ' EIO', 'does_no_harm'),
    Row((os, 'stat'), FOLDER, BROKEN, 'is_a_452'),
    # It goes.
    Row((builtins, 'open'), MAIL, 'EACCES EMFILE ' + BROKEN, 'waits'),
    Row((os, 'unlink'), MAIL, 'EACCES EPERM EBUSY ETXTBSY ' + BROKEN,
        'is_sent_once', 'cannot be removed'),
    # Its state changes.
    Row((os, 'open'), MAIL, 'EACCES EMFILE ' + BROKEN, 'is_remembered'),
    Row((os, 'lseek'), MAIL, 'EIO', 'is_remembered'),
    Row((os, 'read'), MAIL, 'EIO', 'is_remembered'),
    Row((os, 'write'), MAIL, BROKEN, 'is_remembered'),
    Row((os, 'fsync'), MAIL, UNABLE + ' ' + BROKEN, 'is_remembered'),
    # Handlers changed it.
    Row((os, 'open'), NEW, BROKEN, 'stays_as_it_was'),
    Row((os, 'fsync'), NEW, UNABLE + ' ' + BROKEN, 'stays_as_it_was'),
    Row((os, 'rename'), NEW, 'EACCES EEXIST EXDEV ' + BROKEN,
        'stays_as_it_was'),
    # Beside the mails.
    Row((os, 'listdir'), ASKED, 'EACCES ' + BROKEN, 'does_no_harm'),
    Row((os, 'rename'), JUNK, 'EACCES EXDEV ' + BROKEN, 'starts',
        'nor set aside'),
    Row((os, 'mkdir'), CORRUPT, 'EACCES ' + BROKEN, 'starts',
        'nor set aside'))


def path_of(what):
    """Of a path or a descriptor."""
    return os.readlink('/proc/self/fd/%d' % what) if isinstance(
        what, int) else str(what)


class FileSystemCase(ProxyCase):

    def setUp(self):
        super().setUp()
        for patch in (mock.patch.object(smtpproxy, 'named', {}),
                      mock.patch.object(     # it need not wait for a command
                          smtpproxy.Spool.open, '__defaults__', (0,))):
            patch.start()
            self.addCleanup(patch.stop)


@unittest.skipUnless(os.path.exists('/proc/self/fd'), 'needs Linux')
class FileSystems(FileSystemCase):

    @contextlib.contextmanager
    def fault(self):
        """The row's call fails; a descriptor is closed all the same."""
        (module, name), number = self.row.call, getattr(errno, self.error)
        pattern, real = re.compile(self.row.on), getattr(module, name)

        def failing(what, *arguments, **options):
            path = path_of(what)
            error = pattern.search(path) and OSError(
                number, os.strerror(number), path)
            if error and name != 'close':
                raise error
            result = real(what, *arguments, **options)
            if error:
                raise error
            return result
        with mock.patch.object(module, name, failing):
            yield

    def test_every_call_that_fails_has_its_consequence(self):
        for self.row in ROWS:
            for self.error in self.row.errors.split():
                with self.subTest(self.row.call[1], on=self.row.on,
                                  error=self.error,
                                  follows=self.row.follows):
                    self.forget()
                    getattr(self, self.row.follows)()

    def forget(self):
        """As if nothing had been before."""
        self.stop()
        smtpproxy.named.clear()
        shutil.rmtree(self.path('msgs'), ignore_errors=True)
        self.upstream.mails.clear()
        self.upstream.script.clear()
        self.write('smtpproxy.log', '')

    def hand_in(self):
        """The code of the reply to a mail."""
        client = self.greeted()
        for command in 'MAIL FROM:<printer@home.lan>', 'RCPT TO:<%s>' % A:
            self.assertEqual(250, client.command(command)[0])
        code, _ = client.data(CONTENT)
        client.close()
        return code

    # What follows.

    def is_refused(self):
        if self.row.call[1] != 'mkdir':
            os.mkdir(self.path('msgs'), 0o700)
        with self.fault(), self.assertRaises(smtpproxy.StartError) as caught:
            self.start()
        self.assertIn(self.path('msgs'), str(caught.exception))
        self.assertIn(self.row.said, str(caught.exception))

    def is_used_without(self):
        with self.fault():
            self.start()
            for _ in range(2):
                self.assertEqual(250, self.hand_in())
            self.upstream.wait(2)
            self.assertSpooled(0)
        self.assertLogged('WARNING', self.path('msgs'), self.row.said)
        self.assertEqual(1, self.log().count(self.row.said))

    def is_a_452(self):
        self.start()
        with self.fault():
            self.assertEqual(452, self.hand_in())
        self.assertLogged('ERROR', 'cannot be stored')
        self.assertSpooled(0)

        self.assertEqual(250, self.hand_in())
        self.upstream.wait(1)

    def does_no_harm(self):
        self.start()
        with self.fault():
            self.proxy.relay.wake()
            self.assertEqual(250, self.hand_in())
            self.upstream.wait(1)
            self.assertSpooled(0)

    def waits(self):
        self.start()
        with self.fault():
            self.assertEqual(250, self.hand_in())
            self.assertLogged('ERROR', 'cannot be read', 'tried again later')
        self.proxy.reload()
        self.upstream.wait(1)
        self.assertSpooled(0)

    def is_sent_once(self):
        self.start()
        with self.fault():
            self.assertEqual(250, self.hand_in())
            self.assertLogged('ERROR', self.row.said)
            self.proxy.reload()
            self.assertLogged('reloaded')
        self.proxy.relay.wake()
        self.assertSpooled(0)
        self.assertEqual(1, len(self.upstream.mails))

    def is_remembered(self):
        self.upstream.script.update({
            'RCPT TO:<b@': '451 4.3.0 later', 'DATA': self.begin_fault})
        self.start({'sleeptime': 600})
        with contextlib.ExitStack() as self.faults:
            id = self.submit(to=(A, B))
            self.assertLogged('ERROR', id, 'its state cannot be saved')
        self.assertEqual([B], self.proxy.spool.load(id).to)

    def begin_fault(self, _):
        """An action: the mail is stored, from now on there is the fault."""
        self.faults.enter_context(self.fault())

    def stays_as_it_was(self):
        self.start()
        spool = self.proxy.spool
        draft = spool.draft('x@y', [A], {})
        draft.write(CONTENT)
        draft.seal()
        draft.commit()
        mail = spool.load(draft.id)
        mail.to, mail.msg = [B], b'new'
        with self.fault(), self.assertRaises(OSError):
            spool.replace(mail)
        self.assertEqual([A], spool.load(draft.id).to)
        self.assertEqual(1, len(self.spooled()))

    def starts(self):
        self.write('msgs/junk', 'no mail')
        os.chmod(self.path('msgs'), 0o700)
        with self.fault():
            self.start()
        self.assertLogged('ERROR', 'junk', self.row.said)
        self.assertTrue(os.path.exists(self.path('msgs/junk')))
        self.assertEqual(250, self.hand_in())


class LockFile(FileSystemCase):
    """Where the file system can't lock folders."""

    def setUp(self):
        super().setUp()
        real = fcntl.flock

        def files_only(file, operation):
            if os.path.isdir(file):
                raise OSError(errno.EINVAL, 'Invalid argument')
            return real(file, operation)
        patch = mock.patch.object(fcntl, 'flock', files_only)
        patch.start()
        self.addCleanup(patch.stop)

    def test_a_second_service_is_refused_all_the_same(self):
        self.start()

        second = smtpproxy.Proxy(smtpproxy.load(self.ini()))
        with self.assertRaises(smtpproxy.StartError) as caught:
            second.start()

        self.assertIn('another smtpproxy', str(caught.exception))

    def test_the_file_stays_and_the_next_start_takes_it(self):
        for _ in range(2):
            self.start()
            self.submit()
            self.assertSpooled(0)
            self.stop()

        self.assertEqual(['.lock'], os.listdir(self.path('msgs')))


if __name__ == '__main__':
    unittest.main()
