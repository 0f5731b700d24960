"""The log: one line a step, nothing secret, and never in the way of mail."""
import base64
import contextlib
import io
import logging
import os
import threading
import unittest
from unittest import mock

import smtpproxy
from tests.case import A, SENDER, FolderCase, ProxyCase
from tests.fakes import FakePOP, FakeSMTP

SECRET = 'pa5sw0rd-%hush'


class LogCase(FolderCase):
    """A log of its own; stderr: what is said there."""

    def setUp(self):
        super().setUp()
        self.stderr = io.StringIO()
        redirected = contextlib.redirect_stderr(self.stderr)
        redirected.__enter__()
        self.addCleanup(redirected.__exit__, None, None, None)
        self.addCleanup(self.close_log)

    def close_log(self):
        for handler in logging.getLogger().handlers[:]:
            logging.getLogger().removeHandler(handler)
            handler.close()

    def open_log(self, **keys):
        """Opens the log with these keys of [logging]."""
        path = self.write('smtpproxy.ini', '[logging]\n' + ''.join(
            '%s=%s\n' % pair for pair in keys.items()))
        smtpproxy.open_log(smtpproxy.load(path))

    def log_files(self):
        """{name: number of lines} of all logs."""
        return {name: self.lines(name) for name in os.listdir(self.folder)
                if name.startswith('smtpproxy.log')}

    def lines(self, name):
        with open(self.path(name), encoding='utf-8', newline='\n') as file:
            return len(file.readlines())


class Levels(LogCase):

    def test_each_level_hides_what_is_below(self):
        words = ('DEBUG', 'INFO', 'WARNING', 'ERROR', 'CRITICAL')
        for level, shown in (('DEBUG', 5), ('INFO', 4), ('WARNING', 3),
                             ('ERROR', 2), ('NONE', 1)):
            with self.subTest(level):
                self.open_log(level=level, file=level)
                for word in words:
                    smtpproxy.log.log(getattr(logging, word), 'a line')
                with open(self.path(level)) as file:
                    found = [line.split()[2] for line in file]
                self.assertEqual(list(words[-shown:]), found)

    def test_on_a_terminal_the_same_lines_go_to_stderr(self):
        with mock.patch.object(self.stderr, 'isatty', lambda: True):
            self.open_log()
        smtpproxy.log.info('to be seen')

        self.assertEqual(self.log(), self.stderr.getvalue())
        self.assertIn('INFO to be seen', self.log())

    def test_a_service_says_nothing_on_stderr(self):
        self.open_log()
        smtpproxy.log.error('to be read')

        self.assertEqual('', self.stderr.getvalue())


class Rotation(LogCase):

    def write_lines(self, count):
        for number in range(count):
            smtpproxy.log.info('line %04d %s', number, 'x' * 60)  # 100 bytes

    def kept(self):
        """All lines that are kept, the oldest first."""
        text = ''
        for name in sorted(os.listdir(self.folder), reverse=True):
            if name.startswith('smtpproxy.log'):
                with open(self.path(name)) as file:
                    text += file.read()
        return text.splitlines()

    def assertSmall(self, line=100):
        """No log is larger than its size and one line."""
        for name in self.log_files():
            self.assertLessEqual(os.path.getsize(self.path(name)), 1000 + line)

    def test_a_full_log_starts_anew_and_count_old_ones_are_kept(self):
        self.open_log(size=1000, count=2)
        self.write_lines(45)

        self.assertEqual({'smtpproxy.log', 'smtpproxy.log.1',
                          'smtpproxy.log.2'}, set(self.log_files()))
        numbers = [int(line.split()[4]) for line in self.kept()]
        self.assertEqual(list(range(numbers[0], 45)), numbers)
        self.assertSmall()

    def test_a_restart_goes_on_in_the_same_log(self):
        for _ in range(3):
            self.open_log(size=1000)
            self.write_lines(6)

        self.assertEqual(18, len(self.kept()))
        self.assertSmall()

    def test_count_0_keeps_no_old_log(self):
        self.open_log(size=1000, count=0)
        self.write_lines(25)

        self.assertEqual(['smtpproxy.log'], list(self.log_files()))
        self.assertSmall()

    def test_size_0_never_starts_anew(self):
        self.open_log(size=0)
        self.write_lines(40)

        self.assertEqual({'smtpproxy.log': 40}, self.log_files())

    def test_a_device_is_never_renamed(self):
        os.symlink('/dev/null', self.path('smtpproxy.log'))
        self.open_log(size=1000)

        self.write_lines(25)

        self.assertEqual(['smtpproxy.log'], list(self.log_files()))
        self.assertEqual('', self.stderr.getvalue())

    def test_a_size_is_in_bytes_whatever_the_letters(self):
        self.open_log(size=1000, count=9)
        for _ in range(20):
            smtpproxy.log.info('é' * 200)

        self.assertSmall(line=430)


class OneLine(LogCase):

    def test_nobody_can_fake_a_second_line(self):
        for text in ('a\nb', 'a\rb', 'a\r\nb', 'a\n', '\n'):
            with self.subTest(repr(text)):
                self.open_log(file='smtpproxy.log%d' % hash(text))
                smtpproxy.log.info('said %s', text)
                name, = set(self.log_files()) - {'smtpproxy.log'}
                with open(self.path(name), 'rb') as file:
                    content = file.read()
                os.unlink(self.path(name))
                self.assertEqual(1, len(content.splitlines()), content)

    def test_what_is_no_text_is_logged_all_the_same(self):
        """What is not UTF-8 comes as surrogates from a socket."""
        self.open_log()
        smtpproxy.log.info('hello from %s', 'box\udcff')

        self.assertLogged('hello from box')
        self.assertEqual('', self.stderr.getvalue())

    def test_a_terminal_gets_no_control_characters(self):
        self.open_log()
        smtpproxy.log.info('hello from %s', 'box\x1b[2Jgone')

        self.assertNotLogged('\x1b')

    def test_an_error_of_ours_keeps_its_traceback(self):
        self.open_log()
        try:
            raise ValueError('a fault')
        except ValueError:
            smtpproxy.log.exception('something went wrong')

        self.assertLogged('ERROR', 'something went wrong')
        self.assertLogged('ValueError: a fault')

    def test_the_text_of_an_exception_cannot_look_like_a_line_of_ours(self):
        faked = '2026-01-01 00:00:00,000 ERROR faked'
        self.open_log()
        for end in '\n', '\r', '\r\n', '\x0b', '\x85', '\u2028':
            with self.subTest(repr(end)):
                try:
                    raise ValueError('a%s%s\x1b[2J\x9b' % (end, faked))
                except ValueError:
                    smtpproxy.log.exception('went wrong')

        begins = [line[:4] for line in self.log().splitlines()
                  if 'went wrong' not in line]
        self.assertEqual({'    '}, set(begins), self.log())
        self.assertNotLogged('\x1b')
        self.assertNotLogged('\x9b')


class Reload(LogCase):
    """The descriptor of a log that is closed may be a mail's at once."""

    def test_a_line_that_comes_too_late_goes_to_the_log_all_the_same(self):
        self.open_log()
        smtpproxy.log.info('early')
        old, = logging.getLogger().handlers
        self.open_log()

        with open(self.path('mail'), 'wb', buffering=0) as mail:
            free = self.free_descriptor()
            old.handle(logging.makeLogRecord({'msg': 'late'}))

            self.assertEqual(0, os.fstat(mail.fileno()).st_size)
            self.assertEqual(free, self.free_descriptor())
        self.assertLogged('late')

    @staticmethod
    def free_descriptor():
        """The lowest number that no open file has."""
        with open(os.devnull) as file:
            return file.fileno()

    def test_a_line_that_is_being_written_keeps_its_log_open(self):
        self.open_log()
        smtpproxy.log.info('early')
        closer = threading.Thread(
            target=logging.getLogger().handlers[0].close, name='closer')
        write = os.write

        def write_slowly(file, data):
            closer.start()
            closer.join(0.1)
            return write(file, data)
        with mock.patch('os.write', write_slowly):
            smtpproxy.log.info('slow')

        closer.join()
        self.assertLogged('slow')
        self.assertEqual('', self.stderr.getvalue())


class Unwritable(LogCase):

    def fill(self):
        """A log on a full disk."""
        os.symlink('/dev/full', self.path('smtpproxy.log'))
        self.open_log()

    def test_a_log_that_cannot_be_opened_is_said_once(self):
        self.open_log(file='none/x.log')
        for _ in range(3):
            smtpproxy.log.info('a line')

        said = self.stderr.getvalue()
        self.assertEqual(1, said.count('\n'), said)
        self.assertIn(self.path('none', 'x.log'), said)
        self.assertIn('mail goes on', said)

    def test_a_log_without_its_folder_is_told_how_to_get_one(self):
        path = self.write('smtpproxy.ini', '[logging]\nfile=none/x.log\n')
        self.open_log(file='none/x.log')
        smtpproxy.log.info('a line')

        for said in (self.stderr.getvalue(), *smtpproxy.warn_of_log(
                smtpproxy.load(path).logging)):
            folder = self.path('none')
            self.assertIn('there is no folder %s: mkdir -p %s;' % (
                folder, folder), said)

    @unittest.skipUnless(os.path.exists('/dev/full'), 'needs /dev/full')
    def test_a_full_disk_is_said_once(self):
        self.fill()
        for _ in range(3):
            smtpproxy.log.info('a line')

        self.assertEqual(1, self.stderr.getvalue().count('\n'))
        self.assertIn('No space left', self.stderr.getvalue())

    @unittest.skipUnless(os.path.exists('/dev/full'), 'needs /dev/full')
    def test_a_reload_survives_a_full_disk(self):
        self.fill()
        smtpproxy.log.info('lost')
        os.unlink(self.path('smtpproxy.log'))

        self.open_log()
        smtpproxy.log.info('there is room again')

        self.assertLogged('there is room again')

    def test_a_pipe_that_nobody_reads_holds_nothing_up(self):
        os.mkfifo(self.path('smtpproxy.log'))
        self.open_log(size=1000)
        smtpproxy.log.info('lost')
        self.assertIn('mail goes on', self.stderr.getvalue())

        reader = os.open(self.path('smtpproxy.log'), os.O_RDONLY
                         | os.O_NONBLOCK)
        self.addCleanup(os.close, reader)
        smtpproxy.log.info('there is somebody')

        self.assertIn(b'there is somebody', os.read(reader, 1000))

    def test_a_log_that_can_be_written_again_goes_on_by_itself(self):
        self.open_log(file='later/smtpproxy.log')
        smtpproxy.log.info('lost')
        os.mkdir(self.path('later'))
        smtpproxy.log.info('found')

        with open(self.path('later', 'smtpproxy.log')) as file:
            self.assertIn('found', file.read())

    def test_a_log_that_cannot_be_rotated_goes_on(self):
        self.open_log(size=100, count=1)
        with mock.patch('os.replace', side_effect=PermissionError(1, 'no')):
            for _ in range(20):
                smtpproxy.log.info('a line of some length')
        smtpproxy.log.info('the last line')

        self.assertIn('mail goes on', self.stderr.getvalue())
        self.assertEqual(21, sum(self.log_files().values()))


class Journey(ProxyCase):

    def test_mail_goes_on_without_a_log(self):
        stderr = io.StringIO()
        with contextlib.redirect_stderr(stderr):
            self.start(accounts={SENDER: self.account(), 'logging': {
                'file': self.path('no', 'folder', 'x.log')}})
            self.submit()
            self.assertDelivered([A])
            self.stop()

        self.assertIn('mail goes on', stderr.getvalue())
        self.assertNotIn('Traceback', stderr.getvalue())

    def test_each_step_of_a_mail_is_one_line_that_begins_with_its_id(self):
        self.start()
        id = self.submit()
        self.assertDelivered([A])

        self.assertLogged('INFO %s: sent to <%s> by' % (id, A))
        for step in 'accepted', 'sent':
            self.assertEqual(1, self.log().count(
                'INFO %s: %s ' % (id, step)), step)

    def test_a_mail_that_has_to_wait_says_so_in_its_first_line(self):
        self.upstream.script = {'': '421 4.3.2 busy'}
        self.start()
        self.assertLogged(self.submit(), 'try 1, the next one in')

        self.assertLogged(self.submit(), 'accepted from', 'it waits with',
                          '421 4.3.2 busy')

    def test_a_client_cannot_write_into_the_log(self):
        self.start()
        client = self.client()
        client.command('EHLO box\r2026-01-01 00:00:00,000 ERROR faked')
        self.submit(client=client)

        line = self.assertLogged('accepted from')
        self.assertIn('faked', line)

    def test_passwords_are_nowhere_in_the_log(self):
        pop = self.serve(FakePOP(users={'me': SECRET}))
        for mechanism in ('PLAIN', 'LOGIN', 'CRAM-MD5'):
            with self.subTest(mechanism):
                server = self.serve(FakeSMTP(
                    users={'me': SECRET}, mechanisms=[mechanism]))
                self.deliver_with_all_passwords(server, pop)
                self.assertNothingSecret(mechanism)

    def deliver_with_all_passwords(self, server, pop):
        """One mail, with a login at each step, at the highest debuglevel."""
        self.start({'debuglevel': 2}, {SENDER: self.account(
            server, smtpusername='me', smtppassword=SECRET,
            localpassword=SECRET, popbeforesmtp='true', pophost=pop.host,
            popport=pop.port, popssl='false', popusername='me',
            poppassword=SECRET)})
        client = self.greeted()
        plain = '\0%s\0%s' % (SENDER, SECRET)
        client.command('AUTH PLAIN ' + encoded(plain))
        self.submit(client=client)
        client.close()
        server.wait()
        self.stop()

    def assertNothingSecret(self, mechanism):
        log = self.log()
        self.assertIn('AUTH', log)
        self.assertIn('pop 127.0.0.1', log)
        for form in (SECRET, SECRET[:8], encoded(SECRET),
                     encoded('\0me\0' + SECRET), encoded(
                         '\0%s\0%s' % (SENDER, SECRET))):
            self.assertNotIn(form, log)


def encoded(text):
    return base64.b64encode(text.encode()).decode()


if __name__ == '__main__':
    unittest.main()
