"""What the owner asks on the command line, with and without a service."""
import contextlib
import errno
import fcntl
import grp
import io
import json
import os
import pwd
import shutil
import subprocess
import sys
import time
import unittest
from unittest import mock

import smtpproxy
from tests.case import A, B, OTHER, SENDER, ProxyCase
from tests.fakes import FakeSMTP

LATER = '451 4.3.0 come again'
REWRITE = '''\
from MailHandler import MailHandler

class Rewrite(MailHandler):
    def isEnabled(self):
        return True
    def setLogger(self, logger):
        self.logger = logger
    def handleMessage(self, message, mail, callback):
        self.logger.log('at work')
        if 'drop' in message['subject']:
            return False
        callback.setTo('new@example.org')
        mail.msg = mail.msg.replace(b'hello', b'good bye')
        return True
'''


class CommandCase(ProxyCase):

    on_terminal = False         # is stdout one?

    def command(self, *arguments):
        """Runs a command; returns (exit code, stdout, stderr)."""
        out = io.TextIOWrapper(io.BytesIO(), 'utf-8', newline='\n')
        out.isatty = lambda: self.on_terminal
        err = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = smtpproxy.main(
                ['--config', self.path('smtpproxy.ini'), *arguments])
        out.flush()
        return code, out.buffer.getvalue().decode(), err.getvalue()

    def succeed(self, *arguments):
        """stdout of a command that does what it is asked."""
        code, out, err = self.command(*arguments)
        self.assertEqual((0, ''), (code, err), out)
        return out

    def fail_with(self, *arguments):
        """The one line of a command that can't."""
        code, out, err = self.command(*arguments)
        self.assertEqual((1, '', 1), (code, out, err.count('\n')), err)
        return err

    def waiting(self, reply=LATER, **options):
        """A service with a mail that could not be delivered: its id."""
        self.upstream.script['RCPT TO:<b@'] = reply
        self.start(**options)
        id = self.submit(b'Subject: x\r\nBcc: c@d\r\n\r\n..hello\r\n',
                         to=(A, B))
        self.assertLogged(id, 'come again')
        self.upstream.script.clear()
        return id

    def queue(self):
        return json.loads(self.succeed('--queue', '--json'))


class Queue(CommandCase):

    def test_what_waits_is_shown_with_and_without_the_service(self):
        id = self.waiting(config={'sleeptime': 600})

        for running in True, False:
            with self.subTest(running=running):
                if not running:
                    self.stop()
                table = self.succeed('--queue')
                self.assertRegex(table, (
                    r'(?m)^%s +00:00:0\d +\d+ +1 +\d{4}-\d\d-\d\d '
                    r'\d\d:\d\d:\d\d +<%s> -> <%s>: .*451 4.3.0 come again'
                    % (id, SENDER, B)))
                self.assertIn('1 mails', table)
                self.assertNotIn(A, table)

    def test_a_script_gets_the_same_as_json(self):
        id = self.waiting(config={'sleeptime': 600})

        for running in True, False:
            with self.subTest(running=running):
                if not running:
                    self.stop()
                row, = self.queue()
                self.assertEqual((id, SENDER, [B], 1, False), (
                    row['id'], row['sender'], row['recipients'],
                    row['tries'], row['parked']))
                self.assertIn('come again', row['error'])
                self.assertLess(row['age'], 60)
                self.assertRegex(row['next'], r'^\d{4}-\d\d-\d\d ')

    def test_where_nobody_is_there_the_next_try_is_each_sleeptime(self):
        self.upstream.close()
        self.start({'sleeptime': 600})

        self.assertLogged(self.submit(), 'each 600 seconds')

        self.assertRegex(self.succeed('--queue'), r' 1  each 600 s +<')
        self.assertIsNone(self.queue()[0]['next'])

    def test_what_is_parked_says_so(self):
        self.waiting('550 5.1.1 never come again')

        self.assertIn(' parked ', self.succeed('--queue'))
        row, = self.queue()
        self.assertEqual((True, None), (row['parked'], row['next']))

    def test_json_alone_does_not_start_a_service(self):
        self.ini()

        with mock.patch.object(smtpproxy, 'serve') as serve, \
                contextlib.redirect_stderr(io.StringIO()) as err, \
                self.assertRaises(SystemExit) as caught:
            smtpproxy.main(['--json', '--config', self.path('smtpproxy.ini')])

        self.assertEqual(2, caught.exception.code)
        self.assertIn('--json goes with --queue', err.getvalue())
        self.assertFalse(serve.called)

    def test_nothing_waits(self):
        self.ini()

        self.assertIn('0 mails', self.succeed('--queue'))
        self.assertEqual([], self.queue())

    def test_looking_changes_nothing(self):
        self.waiting()
        self.stop()
        self.write('msgs/junk.mail', 'not ours')
        before = sorted(os.listdir(self.path('msgs')))

        self.succeed('--queue')

        self.assertEqual(before, sorted(os.listdir(self.path('msgs'))))

    def test_ids_are_oldest_first(self):
        self.upstream.script['MAIL'] = LATER
        self.start()
        ids = [self.submit() for _ in range(3)]

        self.assertEqual(ids, [row['id'] for row in self.queue()])


    def test_the_age_is_the_mails_whatever_was_written_to_its_file(self):
        id = self.waiting(config={'sleeptime': 600})
        self.stop()
        older = '%08x%s' % (int(id[:8], 16) - 1000, id[8:])
        os.rename(self.path('msgs', id + '.mail'),
                  self.path('msgs', older + '.mail'))

        row, = self.queue()

        self.assertEqual(older, row['id'])
        self.assertTrue(1000 <= row['age'] < 1060, row)

    def test_a_clock_that_has_jumped_makes_no_mail_older_than_the_box(self):
        id = self.waiting(config={'sleeptime': 600})
        os.utime(self.path('msgs', id + '.mail'), (0, 0))

        row, = self.queue()

        self.assertLessEqual(row['age'], time.monotonic() + 60)

    def test_a_mail_that_is_sent_meanwhile_ends_no_command(self):
        self.waiting(config={'sleeptime': 600})
        load = smtpproxy.Spool.load

        def load_and_send(spool, id):
            mail = load(spool, id)
            os.unlink(mail.path)
            return mail
        with mock.patch.object(smtpproxy.Spool, 'load', load_and_send):
            self.assertIn('1 mails', self.succeed('--queue'))
        self.assertIn('0 mails', self.succeed('--queue'))


class Terminal(CommandCase):
    """Nobody but the owner gives it orders."""

    EVIL = 'a\x9b2J\x85\u202e@home.lan'     # as any client may say it

    def store(self):
        """A mail of an evil sender; its id."""
        self.ini(accounts={self.EVIL: self.account()})
        spool = smtpproxy.Spool(self.path('msgs'))
        os.mkdir(spool.folder)
        draft = spool.draft(self.EVIL, [self.EVIL], {})
        draft.write(b'From: me\r\n\r\nhello %s\r\n' % self.EVIL.encode())
        draft.seal()
        draft.commit()
        return draft.id

    def test_nothing_that_a_command_prints_is_obeyed_by_a_terminal(self):
        self.on_terminal, id = True, self.store()
        mail = self.write('x.eml', ('To: %s\n\nx\n' % self.EVIL).encode())
        for arguments in (['--queue'], ['--queue', '--json'], ['--check'],
                          ['--show', id], ['--show', self.EVIL],
                          ['--retry', self.EVIL], ['--handler-test', mail]):
            with self.subTest(arguments):
                _, out, err = self.command(*arguments)
                self.assertTrue((out + err).replace('\n', '').isprintable(),
                                ascii(out + err))

    def test_a_script_gets_every_byte_all_the_same(self):
        id = self.store()

        self.assertIn(self.EVIL, self.succeed('--show', id))
        self.assertEqual(self.EVIL, self.queue()[0]['sender'])


class Retry(CommandCase):

    def setUp(self):
        """The service looks for requests at once, not after sleeptime."""
        super().setUp()
        ask = smtpproxy.Spool.ask

        def ask_at_once(spool, id, what):
            path = ask(spool, id, what)
            if self.proxy:
                self.proxy.relay.wake()
            return path
        patch = mock.patch.object(smtpproxy.Spool, 'ask', ask_at_once)
        patch.start()
        self.addCleanup(patch.stop)

    def test_a_running_service_tries_a_parked_mail_now(self):
        for what in 'ID', 'all':
            with self.subTest(what):
                count = len(self.upstream.mails)
                id = self.waiting('550 5.1.1 never come again')
                self.assertLogged(id, 'kept in msgs/')
                self.assertIn('now', self.succeed(
                    '--retry', id if what == 'ID' else 'all'))
                self.assertDelivered([B], count + 2)
                self.assertSpooled(0)
                self.stop()

    def test_without_a_service_the_next_start_tries_it(self):
        id = self.waiting('550 5.1.1 never come again')
        self.stop()
        for what in id, 'all':
            self.assertIn('starts', self.succeed('--retry', what))

        self.start({'sleeptime': 600})

        self.assertDelivered([B], 2)
        self.assertSpooled(0)

    def test_a_parked_mail_stays_parked_over_a_restart(self):
        self.waiting('550 5.1.1 never come again')
        self.stop()
        self.start()
        self.submit()
        self.assertDelivered([A], 2)
        self.assertSpooled(1)

        self.assertEqual([True], [row['parked'] for row in self.queue()])

    def test_an_id_that_is_not_there_is_named(self):
        self.waiting()
        for option in '--retry', '--delete', '--show':
            for id in '00000000-00000', '../../x', '', 'x.mail':
                with self.subTest(option + id):
                    self.assertIn('no mail "%s"' % id,
                                  self.fail_with(option, id))
        self.assertSpooled(1)

    def test_several_are_tried_in_one_wait(self):
        self.start()
        self.upstream.script['MAIL'] = '550 5.7.1 no'
        ids = [self.submit(), self.submit()]
        for id in ids:
            self.assertLogged(id, 'kept in msgs/')
        self.upstream.script.clear()

        self.succeed('--retry', *ids)

        self.upstream.wait(2)
        self.assertSpooled(0)

    def test_all_stands_alone(self):
        id = self.waiting()

        self.assertIn('"all"', self.fail_with('--retry', 'all', id))

    def test_before_the_first_start_nothing_is_made(self):
        self.ini()

        self.assertIn('nothing waits', self.succeed('--retry', 'all'))
        self.fail_with('--delete', '00000000-00000')

        self.assertEqual(['smtpproxy.ini'], os.listdir(self.folder))


class Delete(CommandCase):

    def test_a_running_service_deletes_a_mail(self):
        id = self.waiting(config={'sleeptime': 1})

        self.assertIn('deleted', self.succeed('--delete', id))

        self.assertEqual([], self.spooled())
        self.assertLogged('INFO', id, 'deleted', SENDER, B)

    def test_several_are_deleted_or_none(self):
        self.upstream.script['MAIL'] = LATER
        self.start()
        ids = [self.submit() for _ in range(3)]

        for running in True, False:
            with self.subTest(running=running):
                if not running:
                    self.stop()
                self.assertIn('"x"', self.fail_with('--delete', ids[0], 'x'))
                self.assertSpooled(3 if running else 2)
                self.succeed('--delete', *ids[:1 if running else 2])
                self.assertSpooled(2 if running else 0)
                ids = ids[1:]

    def test_without_a_service_it_is_deleted_at_once(self):
        id = self.waiting()
        self.stop()

        self.assertIn('deleted', self.succeed('--delete', id))

        self.assertEqual([], [name for name in os.listdir(self.path('msgs'))
                              if name.startswith(id)])

    def test_never_all_at_once(self):
        self.waiting()

        self.assertIn('all', self.fail_with('--delete', 'all'))
        self.assertSpooled(1)


class NoService(CommandCase):
    """What a command does to msgs/ while no service runs."""

    def setUp(self):
        super().setUp()
        self.ids = [self.waiting('550 5.1.1 never come again')]
        self.ids.append(self.submit())
        self.assertSpooled(1)
        self.stop()
        self.id = self.ids[0]

    def test_a_box_that_was_off_for_a_month_makes_no_mail_old(self):
        month = time.time() + 30 * 86400
        with mock.patch('time.time', lambda: month):
            self.succeed('--retry', self.id)
            self.succeed('--retry', 'all')
        self.upstream.script['RCPT'] = LATER

        self.start()

        self.assertLogged(self.id, 'try 2, the next one')
        self.assertLess(self.proxy.spool.age(self.id), 3600)

    def test_no_mail_is_loaded_for_it(self):
        for arguments in (['--retry', self.id], ['--retry', 'all'],
                          ['--delete', self.id]):
            with self.subTest(arguments), mock.patch.object(
                    smtpproxy.Mail, '_read', side_effect=AssertionError):
                self.succeed(*arguments)

    def test_only_the_mail_that_is_shown_is_loaded(self):
        shutil.copy(self.path('msgs', self.id + '.mail'),
                    self.path('msgs', '00000000-00000.mail'))
        with mock.patch.object(smtpproxy.Mail, '_read', autospec=True,
                               side_effect=smtpproxy.Mail._read) as read:
            self.succeed('--show', self.id)

        self.assertEqual(1, read.call_count)

    def test_a_service_that_starts_meanwhile_need_not_wait(self):
        self.succeed('--retry', 'all')
        with mock.patch.object(smtpproxy.Spool.open, '__defaults__', (0,)):
            self.start()

        self.assertDelivered([B], 3)

    def test_what_a_running_service_left_undone_comes_before_all_mail(self):
        spool = smtpproxy.Spool(self.path('msgs'))
        spool.ask(self.id, 'retry')
        spool.ask(self.id, 'delete')

        self.start({'sleeptime': 600})

        self.assertLogged('INFO', self.id, 'deleted as asked for')
        self.assertSpooled(0)
        self.assertEqual(2, len(self.upstream.mails))

    def test_a_mail_that_cannot_be_deleted_is_not_said_to_be(self):
        with mock.patch('os.unlink', side_effect=OSError(
                errno.EROFS, 'Read-only file system', 'msgs/x')):
            self.assertIn('Read-only', self.fail_with('--delete', self.id))


class Show(CommandCase):

    def test_the_mail_is_shown_as_it_would_be_sent(self):
        id = self.waiting(accounts={SENDER: self.account(
            returnpath='bounce@me', replyto='me@me',
            smtpusername='x', smtppassword='secret')})

        shown = self.succeed('--show', id)

        sent = self.upstream.wait()[0].data.decode()
        self.assertEqual(sent, shown)
        self.assertIn('\r\nReply-To: me@me\r\n', shown)
        self.assertTrue(shown.endswith('\r\n\r\n..hello\r\n'), shown)
        self.assertNotIn('Bcc', shown)


class Check(CommandCase):

    def test_a_good_ini_shows_its_accounts_without_secrets(self):
        self.ini(accounts={SENDER: self.account(
            smtpusername='me', smtppassword='hush', localpassword='hush'),
            OTHER: {'use': SENDER}})

        out = self.succeed('--check')

        for word in ('[%s]' % SENDER, '[%s]' % OTHER, "smtpusername = 'me'",
                     'smtppassword = ***', 'would start'):
            self.assertIn(word, out)
        self.assertEqual(2, out.count('smtphost'))
        self.assertNotIn('hush', out)

    def test_a_password_file_is_named_and_its_content_is_not(self):
        path = self.write('secret', 'hush')
        self.ini(accounts={SENDER: self.account(
            smtpusername='me', smtppasswordfile=path)})

        self.assertIn("smtppasswordfile = '%s'" % path,
                      self.succeed('--check'))
        self.assertNotIn('hush', self.succeed('--check'))
        os.unlink(path)

        self.assertIn('warning: %s: [%s] smtppasswordfile = %s cannot be '
                      'read' % (self.path('smtpproxy.ini'), SENDER, path),
                      self.succeed('--check'))

    def test_every_mistake_is_named_and_nothing_is_touched(self):
        self.ini({'port': 'x', 'allow': 'y'}, {SENDER: {'smtport': 1}})

        code, _, err = self.command('--check')

        self.assertEqual(1, code)
        for word in ('[config] port', '[config] allow', 'smtpport?',
                     '[%s] smtphost is missing' % SENDER):
            self.assertIn(word, err)
        self.assertEqual(['smtpproxy.ini'], os.listdir(self.folder))

    def test_what_would_not_start_is_no_success(self):
        broken, taken = self.write('x.pem', 'x'), self.write('file', '')
        for name, config in (
                ('tls', {'tlscert': broken, 'tlskey': broken}),
                ('msgs is a file', {'msgdir': taken}),
                ('msgs in a file', {'msgdir': taken + '/msgs'})):
            with self.subTest(name):
                self.ini(config)
                code, out, err = self.command('--check')
                self.assertEqual(1, code, out)
                self.assertIn(broken if name == 'tls' else taken, err)
                self.assertNotIn('Traceback', err)

    def test_handlers_and_warnings_are_named(self):
        self.write('handlers/bad.py', '1 / 0')
        self.write('handlers/good.py', REWRITE)
        self.write('handlers/shared.py', 'WORD = 1')
        self.write('handlers/picky.py', REWRITE + '''
    def setConfig(self, config):
        return ['it wants colour=red', 'and size=9']
''')
        self.ini(accounts={SENDER: self.account(
            smtphost='mx:25', smtpusername='me', smtppassword='50%%')})

        with mock.patch.object(smtpproxy, 'HOME', self.folder), \
                mock.patch.object(sys, 'dont_write_bytecode', True):
            code, out, _ = self.command('--check')

        self.assertEqual(0, code)
        for word in ('handler good is enabled', 'handler bad',
                     'handlers/shared.py is no handler',
                     'warning: handler picky: it wants colour=red\n',
                     'warning: handler picky: and size=9\n',
                     'smtppassword has %%', 'write only mx; 25 has a key'):
            self.assertIn(word, out)

    def test_a_mistake_hides_nothing_else(self):
        self.write('handlers/bad.py', '1 / 0')
        taken, broken = self.serve(FakeSMTP()).port, self.write('x.pem', 'x')
        self.ini({'port': taken, 'msgdir': broken + '/msgs'}, {
            SENDER: {'smtport': 1, 'tlscafile': broken}, 'logging': {
                'file': 'nowhere/x.log'}})

        with mock.patch.object(smtpproxy, 'HOME', self.folder), \
                mock.patch.object(sys, 'dont_write_bytecode', True):
            code, out, err = self.command('--check')

        self.assertEqual(1, code)
        for word in ('smtpport?', 'smtphost is missing', 'is taken', '/msgs'):
            self.assertIn(word, err)
        for word in ('handler bad', 'tlscafile = ' + broken,
                     'nowhere/x.log cannot be written'):
            self.assertIn('warning: ', out)
            self.assertIn(word, out)

    def test_a_wrong_config_is_not_guessed_at(self):
        self.ini({'port': 'x', 'msgdir': self.write('file', '') + '/msgs'})

        code, _, err = self.command('--check')

        self.assertEqual((1, 1), (code, err.count('\n')), err)

    def test_folders_that_the_start_makes_are_no_mistake(self):
        self.ini({'msgdir': self.path('a', 'b', 'msgs')})

        self.succeed('--check')

        self.assertEqual(['smtpproxy.ini'], os.listdir(self.folder))

    def test_works_beside_a_running_service(self):
        self.waiting()
        free = FakeSMTP()
        free.close()
        for port in self.address[1], free.port:     # of a new ini
            with self.subTest(port):
                self.ini({'port': port})
                self.assertIn('another smtpproxy', self.succeed('--check'))

        self.assertSpooled(1)

    def test_a_port_of_another_program_is_named(self):
        self.ini({'port': self.serve(FakeSMTP()).port})

        code, _, err = self.command('--check')

        self.assertEqual((1, 1), (code, err.count('is taken')), err)

    def test_where_there_are_no_locks_it_would_not_start(self):
        self.ini()
        os.mkdir(self.path('msgs'), 0o700)
        for number, code in (errno.ENOLCK, 1), (errno.EINVAL, 0):
            with mock.patch.object(fcntl, 'flock', side_effect=OSError(
                    number, 'no locks')), self.subTest(number):
                found, _, err = self.command('--check')
                self.assertEqual((code, bool(code)), (
                    found, 'cannot be locked' in err), err)
        self.assertEqual([], os.listdir(self.path('msgs')))

    def test_who_it_can_not_become_is_named(self):
        group = next(group.gr_name for group in grp.getgrall()
                     if group.gr_gid not in os.getgroups() + [os.getgid()])
        for key, name in ('user', pwd.getpwuid(0).pw_name), ('group', group):
            path = self.ini({key: name})
            with mock.patch('os.getuid', return_value=12345), \
                    self.subTest(key):
                code, _, err = self.command('--check')
                self.assertEqual((1, 1), (code, err.count('user= and')), err)
                with self.assertRaisesRegex(smtpproxy.StartError, 'user= and'):
                    smtpproxy.Proxy(smtpproxy.load(path)).start()

        self.assertEqual(['smtpproxy.ini'], os.listdir(self.folder))

    @unittest.skipUnless(os.getuid() == 0, 'needs root')
    def test_a_folder_that_the_user_may_not_enter_is_named(self):
        os.mkdir(self.path('roots'), 0o700)
        os.chmod(self.folder, 0o755)
        for folder, code in ('roots', 1), ('.', 0):
            ini = self.ini({'user': 'nobody',
                            'msgdir': self.path(folder, 'msgs')})
            with self.subTest(folder):
                done = subprocess.run(
                    [sys.executable, smtpproxy.__file__, '--config', ini,
                     '--check'], stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE, universal_newlines=True)
                self.assertEqual(code, done.returncode, done.stderr)
                self.assertEqual(bool(code), 'may not enter %s' % self.path(
                    'roots') in done.stderr)

    @unittest.skipUnless(os.getuid() == 0, 'needs root')
    def test_an_ini_that_its_user_may_not_read_at_a_reload_is_named(self):
        ini, group = self.ini({'user': 'nobody'}), pwd.getpwnam(
            'nobody').pw_gid
        os.mkdir(self.path('roots'), 0o700)
        os.chmod(self.folder, 0o755)
        shutil.copy(ini, self.path('roots'))
        for path, mode, words in (
                (ini, 0o600, 'may not: chgrp %d %s; chmod 640 %s' % (
                    group, ini, ini)),
                (self.path('roots', 'smtpproxy.ini'), 0o644,
                 'nor may it enter ' + self.path('roots')),
                (ini, 0o644, '')):
            os.chmod(path, mode)
            with self.subTest(words):
                told = subprocess.check_output(
                    [sys.executable, smtpproxy.__file__, '--config', path,
                     '--check'], universal_newlines=True)
                self.assertEqual(bool(words), 'at a reload' in told, told)
                self.assertIn(words, told)


class HandlerTest(CommandCase):

    def run_test(self, mail):
        self.write('handlers/rewrite.py', REWRITE)
        path = self.write('test.eml', mail)
        self.ini()
        with mock.patch.object(smtpproxy, 'HOME', self.folder), \
                mock.patch.object(sys, 'dont_write_bytecode', True):
            out = self.succeed('--handler-test', path)
        self.stop()
        return out

    def test_what_handlers_would_change_is_shown(self):
        out = self.run_test(b'From: Me <me@home.lan>\nTo: a@example.org\n'
                            b'Subject: x\n\nhello\n')

        for line in ('enabled: rewrite', '-To: a@example.org',
                     '+To: new@example.org', '-hello', '+good bye'):
            self.assertIn('\n%s\n' % line, '\n' + out)
        for word in 'at work', '<me@home.lan>', 'go on', 'nothing was sent':
            self.assertIn(word, out)
        self.assertFalse(os.path.exists(self.path('msgs')))

    def test_what_would_be_discarded_is_said(self):
        out = self.run_test(b'Subject: drop me\r\n\r\n\xff\r\n')

        self.assertIn('be discarded', out)

    def test_a_file_that_is_not_there_is_named(self):
        self.ini()

        self.assertIn('no.eml', self.fail_with(
            '--handler-test', self.path('no.eml')))


if __name__ == '__main__':
    unittest.main()
