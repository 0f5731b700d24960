"""--add: an account without an editor, at a terminal and by arguments."""
import builtins
import contextlib
import getpass
import io
import os
import pty
import re
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
import unittest
from unittest import mock

import smtpproxy
from tests.case import A, OTHER, SENDER
from tests.fakes import (CERTIFICATE, FakePOP, FakeSMTP, server_tls,
                         wait_until)
from tests.test_commands import CommandCase
from tests.test_program import TOP, ProgramCase

ME, SECRET = 'me@example.org', 'se cret#%;'
INI = '[config]\nport=0\nwaitafterpop=0\n[logging]\nlevel=DEBUG\n'


class Stdin(io.StringIO):
    """What a person types, or a pipe holds."""

    def __init__(self, lines, terminal):
        super().__init__(''.join(line + '\n' for line in lines))
        self.isatty = lambda: terminal


class AddCase(CommandCase):
    """smtpproxy.ini is what --add works on; self.upstream wants a login."""

    def setUp(self):
        super().setUp()
        self.upstream.users = {ME: SECRET}
        self.upstream.require_auth = True
        patch = mock.patch.object(smtpproxy, 'HOME', self.folder)
        patch.start()
        self.addCleanup(patch.stop)
        self.asked = []

    def add(self, *arguments, typed=(), terminal=False):
        """--add with these lines on stdin: (exit code, stdout, stderr). What
        is asked at a terminal is in self.asked."""
        def ask(question=''):
            self.asked.append(question)
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            return line.rstrip('\n')
        with mock.patch.object(sys, 'stdin', Stdin(typed, terminal)), \
                mock.patch.object(builtins, 'input', ask), \
                mock.patch.object(getpass, 'getpass', ask):
            code, out, err = self.command('--add', *arguments)
        self.assertNotIn(SECRET, out + err + self.log())
        return code, out, err

    def keys(self, **more):
        """Arguments of an account at self.upstream."""
        keys = dict({'smtphost': self.upstream.host,
                     'smtpport': self.upstream.port, 'smtpsecurity': 'none',
                     'smtpusername': ME, 'smtppassword': '-'}, **more)
        return ['%s=%s' % pair for pair in keys.items() if pair[1] != '']

    def refuse(self, *arguments, **options):
        """The one line of a refusal; nothing was written."""
        before = self.content()
        code, _, err = self.add(*arguments, **options)
        self.assertEqual((1, 1), (code, err.count('\n')), err)
        self.assertEqual(before, self.content())
        return err

    def content(self):
        """The ini, None if there is none."""
        with contextlib.suppress(FileNotFoundError):
            with open(self.path('smtpproxy.ini'), 'rb') as file:
                return file.read()

    def section(self):
        """The last section of the ini, as text."""
        return '[' + self.content().decode().rpartition('\n[')[2]


class ByArguments(AddCase):

    def test_a_first_account_makes_a_small_ini(self):
        code, out, err = self.add(SENDER, 'port=0', *self.keys(),
                                  typed=[SECRET])

        self.assertEqual((0, ''), (code, err))
        self.assertEqual(
            '[%s]\nsmtphost=%s\nsmtpport=%d\nsmtpsecurity=none\n'
            'smtpusername=%s\nsmtppassword=%s\nforcefrom=%s\n' % (
                SENDER, self.upstream.host, self.upstream.port, ME, SECRET,
                ME), self.section())
        settings = smtpproxy.load(self.path('smtpproxy.ini'))
        self.assertEqual((0, False), (settings.config.port,
                                      settings.config.deleteonerror))
        self.assertEqual(0o600, stat.S_IMODE(os.stat(
            self.path('smtpproxy.ini')).st_mode))
        self.assertIn('Now start it: python3 smtpproxy.py', out)

    def test_it_logs_in_as_the_service_will_and_sends_nothing(self):
        self.add(SENDER, 'port=0', *self.keys(), typed=[SECRET])

        self.assertEqual([ME], [user for user, _ in self.upstream.logins])
        self.assertEqual(([], []), (self.upstream.mails,
                                    self.upstream.violations))

    def test_what_was_added_delivers(self):
        self.write('smtpproxy.ini', INI)
        self.add(SENDER, *self.keys(), typed=[SECRET])

        self.proxy = smtpproxy.Proxy(smtpproxy.load(
            self.path('smtpproxy.ini')))
        self.proxy.start()
        self.addCleanup(self.stop)
        self.submit()

        self.assertEqual(ME, self.assertDelivered([A]).sender)

    def test_a_trial_that_fails_writes_nothing(self):
        for ini in None, INI:
            with self.subTest(ini=ini):
                if ini:
                    self.write('smtpproxy.ini', ini)
                code, out, err = self.add(
                    SENDER, *self.keys(), *(() if ini else ('port=0',)),
                    typed=['no'])
                self.assertEqual(1, code)
                self.assertIn('535 5.7.8 wrong', out)
                self.assertIn('nothing was written', err)
                self.assertEqual(ini and ini.encode(), self.content())

    def test_pop_before_smtp(self):
        self.upstream.require_auth = False
        pop = self.serve(FakePOP(users={'me': SECRET}))
        self.write('smtpproxy.ini', INI)

        code, out, err = self.add(SENDER, *self.keys(
            smtpusername='', smtppassword='', popbeforesmtp='yes',
            pophost=pop.host, popport=pop.port, popssl='no',
            popusername='me', poppassword='-'), typed=[SECRET])

        self.assertEqual((0, ''), (code, err), out)
        self.assertEqual(1, len(pop.logins))
        self.assertIn('popbeforesmtp=true\npophost=%s\npopport=%d\n'
                      'popssl=false\npopusername=me\npoppassword=%s\n' % (
                          pop.host, pop.port, SECRET), self.section())

    def test_passwords_are_read_in_the_order_of_the_words(self):
        self.write('smtpproxy.ini', INI)

        code, _, err = self.add(
            SENDER, 'localpassword=-', *self.keys(), typed=['local', SECRET])

        self.assertEqual((0, ''), (code, err))
        self.assertIn('smtppassword=%s\n' % SECRET, self.section())
        self.assertIn('localpassword=local\n', self.section())

    def test_a_password_file_is_no_question(self):
        self.write('smtpproxy.ini', INI)
        self.write('secret', SECRET)

        code, out, err = self.add(SENDER, *self.keys(
            smtppassword='', smtppasswordfile='secret'))

        self.assertEqual((0, ''), (code, err), out)
        self.assertIn('\nsmtppasswordfile=secret\n', self.section())

    def test_a_password_file_that_is_not_there_is_named(self):
        self.write('smtpproxy.ini', INI)

        code, out, _ = self.add(SENDER, *self.keys(
            smtppassword='', smtppasswordfile='secret'))

        self.assertEqual(1, code)
        self.assertIn('smtppasswordfile = %s cannot be read'
                      % self.path('secret'), out)

    def test_another_device_takes_the_account_of_the_first(self):
        self.ini(accounts={SENDER: self.account(
            smtpusername=ME, smtppassword=SECRET)})

        code, _, err = self.add(OTHER, 'use=' + SENDER)

        self.assertEqual((0, ''), (code, err))
        self.assertEqual('[%s]\nuse=%s\n' % (OTHER, SENDER), self.section())
        self.assertEqual(1, len(self.upstream.logins))

    def test_the_device_is_told_where_to_send_and_how(self):
        self.write('smtpproxy.ini', '[config]\nhost=192.0.2.7\nport=2525\n')
        for sender, words in (
                (SENDER, (' 192.0.2.7\n', ' 2525\n', ' %s\n' % SENDER)),
                ('*@cams.lan', ('any address with @cams.lan',)),
                ('Default', ('any address\n', 'login        none'))):
            with self.subTest(sender):
                _, out, _ = self.add(sender, *self.keys(), typed=[SECRET])
                for word in words:
                    self.assertIn(word, out.partition('the device:')[2])

    def test_a_device_that_has_to_log_in_is_told_so(self):
        self.write('smtpproxy.ini', INI)

        _, out, _ = self.add(SENDER, *self.keys(), 'localpassword=-',
                             typed=[SECRET, 'x'])

        self.assertIn('%s, with its localpassword' % SENDER, out)


class Providers(AddCase):
    """Known by name. The trial is another's: there is no network here."""

    def setUp(self):
        super().setUp()
        self.write('smtpproxy.ini', INI)
        patch = mock.patch.object(smtpproxy, 'trial', return_value=True)
        patch.start()
        self.addCleanup(patch.stop)

    def test_each_provider_that_takes_a_password(self):
        for provider in smtpproxy.PROVIDERS:
            if not provider.oauth:
                with self.subTest(provider.name):
                    sender = 'printer@%s.lan' % provider.name
                    code, _, err = self.add(
                        sender, 'provider=' + provider.name,
                        'smtpusername=' + ME, 'smtppassword=-',
                        typed=[SECRET])
                    self.assertEqual((0, ''), (code, err))
                    for key in 'smtphost', 'smtpport', 'smtpsecurity':
                        self.assertIn('%s=%s\n' % (
                            key, getattr(provider, key)), self.section())

    def test_what_is_given_counts_more(self):
        code, _, _ = self.add(
            SENDER, 'provider=ionos', 'smtphost=smtp.ionos.fr',
            'smtpusername=' + ME, 'smtppassword=-', 'forcefrom=',
            typed=[SECRET])

        self.assertEqual(0, code)
        self.assertIn('smtphost=smtp.ionos.fr\nsmtpport=465\n',
                      self.section())
        self.assertNotIn('forcefrom', self.section())

    def test_a_login_of_its_own_kind(self):
        for name, address, login, more in (
                ('web.de', 'me@web.de', 'me', '\nforcefrom=me@web.de\n'),
                ('gmx', 'me@gmx.de', 'me@gmx.de', '\nforcefrom=me@gmx.de\n'),
                ('sendgrid', None, 'apikey', '')):
            with self.subTest(name):
                code, _, err = self.add(
                    'x@' + name, 'provider=' + name, 'smtppassword=-',
                    *([] if address is None else ['smtpusername=' + address]),
                    typed=[SECRET])
                self.assertEqual((0, ''), (code, err))
                self.assertIn('\nsmtpusername=%s\n' % login, self.section())
                self.assertIn(more, self.section())

    def test_a_sender_of_a_provider_is_its_own_login(self):
        code, _, err = self.add('me@gmx.net', 'smtppassword=-',
                                typed=[SECRET])

        self.assertEqual((0, ''), (code, err))
        self.assertIn('smtphost=mail.gmx.net', self.section())
        self.assertIn('\nsmtpusername=me@gmx.net\n', self.section())
        self.assertNotIn('forcefrom', self.section())

    def test_what_a_provider_wants_is_said_before_the_password(self):
        _, out, _ = self.add(typed=[SENDER, 'gmail', ME, SECRET, ''],
                             terminal=True)

        self.assertIn('myaccount.google.com/apppasswords', out)
        self.assertEqual('Password (not shown): ', self.asked[-2])

    def test_a_server_for_each_region_is_asked(self):
        self.add(typed=[SENDER, 'zoho', 'smtp.zoho.com', ME, SECRET, ''],
                 terminal=True)

        self.assertIn('smtphost=smtp.zoho.com\nsmtpport=465\n',
                      self.section())


@unittest.skipUnless('oauth' in smtpproxy.Account._fields, 'no oauth yet')
class ByOAuth(AddCase):

    def add_by_oauth(self, result, *arguments):
        self.write('smtpproxy.ini', INI)
        with mock.patch.object(smtpproxy, 'login',
                               return_value=result) as login:
            answer = self.add(SENDER, 'oauthclientid=id',
                              'smtpusername=' + ME, *arguments)
        self.assertEqual(1, login.call_count)
        self.assertEqual(SENDER, login.call_args[0][1].login)
        return answer

    def test_it_is_written_and_goes_on_with_the_sign_in(self):
        for result, said in (0, ''), (1, 'smtpproxy: go on with --login %s\n'
                                      % SENDER):
            with self.subTest(result):
                code, out, err = self.add_by_oauth(
                    result, 'provider=microsoft365')
                self.assertEqual((result, said), (code, err), out)
                self.assertIn('\noauth=microsoft\n', self.section())
                self.assertNotIn('smtppassword', self.section())

    def test_a_sign_in_that_is_broken_off_can_go_on_later(self):
        self.write('smtpproxy.ini', INI)
        with mock.patch.object(smtpproxy, 'login',
                               side_effect=KeyboardInterrupt):
            code, out, err = self.add(
                SENDER, 'oauthclientid=id', 'smtpusername=' + ME,
                'provider=microsoft365')

        self.assertEqual((1, [
            'smtpproxy: not finished: interrupted',
            'smtpproxy: go on with --login %s' % SENDER]),
            (code, err.splitlines()))
        self.assertIn('Now start it', out)

    def test_its_keys_are_asked_and_no_password(self):
        self.write('smtpproxy.ini', INI)
        with mock.patch.object(smtpproxy, 'login', return_value=0):
            code, out, err = self.add(typed=[
                SENDER, 'microsoft365', ME, 'id', 'example.org', ''],
                terminal=True)

        self.assertEqual((0, ''), (code, err), out)
        self.assertIn('\noauthclientid=id\noauthtenant=example.org\n',
                      self.section())

    def test_another_server_with_oauth(self):
        code, _, err = self.add_by_oauth(
            0, 'smtphost=127.0.0.1', 'smtpsecurity=none', 'oauth=other',
            'oauthtokenurl=http://127.0.0.1/token', 'oauthscope=mail',
            'oauthdeviceurl=http://127.0.0.1/device')

        self.assertEqual((0, ''), (code, err))


class Refusals(AddCase):

    def test_a_password_is_never_an_argument(self):
        for key in 'smtppassword', 'poppassword', 'localpassword':
            with self.subTest(key):
                self.assertIn(key + '=- reads it', self.refuse(
                    SENDER, *self.keys(**{key: SECRET}), typed=[SECRET]))
        self.assertIn('key=value', self.refuse(
            SENDER, 'smtppassword', SECRET))

    def test_a_key_that_is_none_is_named_before_anything_is_read(self):
        self.write('smtpproxy.ini', INI)
        for word, meant in (('smtphosst=a', 'smtphost'),
                            ('SMTPHOST=a', 'smtphost'),
                            ('providr=gmx', 'provider')):
            with self.subTest(word):
                self.assertIn('%s is no key of an account: do you mean %s?' % (
                    word.partition('=')[0], meant), self.refuse(
                        SENDER, 'smtppassword=-', word))

    def test_that_there_is_no_login_has_to_be_said(self):
        self.assertIn('is missing (smtpusername= for none)', self.refuse(
            SENDER, 'port=0', *self.keys(smtpusername='', smtppassword='')))

    def test_a_password_that_stdin_does_not_have(self):
        for typed in [], ['']:
            with self.subTest(typed):
                self.assertIn('smtppassword is empty', self.refuse(
                    SENDER, *self.keys(), typed=typed))

    def test_a_section_that_is_there_stays_as_it_is(self):
        self.ini(accounts={SENDER: {'use': OTHER}, OTHER: self.account()})
        for sender in SENDER, OTHER, OTHER.upper():
            with self.subTest(sender):
                self.assertIn('%s has a section' % sender, self.refuse(
                    sender, *self.keys(), typed=[SECRET]))

    def test_what_is_missing_is_named_where_nobody_can_be_asked(self):
        self.write('smtpproxy.ini', INI)
        for missing, arguments in (
                ('sender', ()),
                ('provider', (SENDER,)),
                ('smtpusername', (SENDER, 'provider=gmx')),
                ('smtppassword', (SENDER, 'provider=gmx',
                                  'smtpusername=me'))):
            with self.subTest(missing):
                self.assertIn('%s is missing' % missing,
                              self.refuse(*arguments))

    def test_what_the_ini_would_not_take_is_named(self):
        self.write('smtpproxy.ini', INI)
        for word, arguments in (
                ('must be an address', ('printer', *self.keys())),
                ('must be an address', ('a]@b', *self.keys())),
                ('smtpport must be', (SENDER, *self.keys(smtpport='x'))),
                ('do you mean replyto?', (SENDER, *self.keys(repyto='a@b'))),
                ('[config]', (SENDER, *self.keys(port='25'))),
                ('more than one line', (SENDER, *self.keys(
                    returnpath='a@b\n[default]'))),
                ('must be one of gmail', (SENDER, 'provider=gnail')),
                ('is there twice', (SENDER, 'smtphost=a', 'smtphost=b'))):
            with self.subTest(word):
                self.assertIn(word, self.refuse(*arguments, typed=[SECRET]))

    def test_a_password_that_an_ini_cannot_hold(self):
        self.write('smtpproxy.ini', INI)

        self.assertIn('use smtppasswordfile', self.refuse(
            SENDER, *self.keys(), typed=[SECRET + ' ']))

    def test_an_ini_with_mistakes_is_not_added_to(self):
        self.write('smtpproxy.ini', '[config]\nprot=1\n')

        self.assertIn('do you mean port?', self.refuse(
            SENDER, *self.keys(), typed=[SECRET]))

    def test_a_port_that_is_taken_is_named(self):
        self.assertIn('port %d is taken' % self.upstream.port, self.refuse(
            SENDER, 'port=%d' % self.upstream.port, *self.keys(),
            typed=[SECRET]))


    def test_a_folder_that_is_not_there_is_named(self):
        code, _, err = self.add('--config', self.path('no', 'x.ini'))

        self.assertEqual((1, 'smtpproxy: there is no folder %s: make it '
                          'first\n' % self.path('no')), (code, err))


class AnotherIni(AddCase):
    """What is said can be typed."""

    def test_its_start_is_told_as_a_shell_takes_it(self):
        path = self.path('my mail.ini')

        code, out, _ = self.add(SENDER, 'port=0', *self.keys(), '--config',
                                path, typed=[SECRET])

        self.assertEqual(0, code)
        self.assertIn("smtpproxy.py --config '%s'\n" % path, out)

    def test_how_to_make_it_is_told(self):
        path = self.path('x.ini')

        self.assertIn('%s is missing: make it with --config %s --add' % (
            path, path), self.fail_with('--config', path))


class Appended(AddCase):
    """What was in the ini stays, byte for byte."""

    INIS = {
        'comments': '# of the house\n[config]\n; port\nport=0\n',
        'no line end': '[config]\nport=0',
        'CRLF': '[config]\r\nport=0\r\n',
        'CRLF, no line end': '[config]\r\nport=0\r\n# end',
        'CR': '[config]\rport=0\r',
        'BOM': '\ufeff[config]\nport=0\n',
        'use': '[config]\nport=0\n[default]\nuse=x@y\n[x@y]\nsmtphost=mx\n',
        'umlauts': '[config]\nport=0\n[büro@home.lan]\nsmtphost=mx\n'
                   'replyto="Büro" <buero@home.lan>\n',
        'a value that would go on': '[config]\nport=0\nhost=\n  \n',
        'nothing': ''}

    def test_only_the_new_section_is_new(self):
        for what, ini in self.INIS.items():
            with self.subTest(what):
                self.write('smtpproxy.ini', ini)
                code, out, err = self.add(SENDER, *self.keys(),
                                          typed=[SECRET])
                self.assertEqual((0, ''), (code, err), out)
                content, before = self.content(), ini.encode()
                self.assertEqual(before, content[:len(before)])
                end = (re.findall(b'\r\n|\n|\r', before) or [b'\n'])[0]
                new = content[len(before):]
                self.assertRegex(new, b'^(%s)*\\[printer' % end)
                self.assertEqual(new.count(end), len(re.findall(
                    b'\r\n|\n|\r', new)))

    def test_the_ini_means_the_same_and_one_account_more(self):
        for what, ini in self.INIS.items():
            with self.subTest(what):
                path = self.write('smtpproxy.ini', ini)
                before = smtpproxy.load(path)
                self.add('drücker@home.lan', *self.keys(), typed=[SECRET])
                after = smtpproxy.load(path)
                self.assertEqual(before.config, after.config)
                new = after.accounts.pop('drücker@home.lan')
                self.assertEqual(before.accounts, after.accounts)
                self.assertEqual(SECRET, new.smtppassword)

    def test_file_owner_mode_and_link_stay(self):
        path = self.write('etc/real.ini', INI)
        os.symlink(path, self.path('smtpproxy.ini'))
        os.chmod(path, 0o640)
        if os.getuid() == 0:
            os.chown(path, 0, 65534)
        before = os.stat(path)

        self.assertEqual(0, self.add(SENDER, *self.keys(),
                                     typed=[SECRET])[0])

        after = os.stat(path)
        for what in 'st_ino', 'st_mode', 'st_uid', 'st_gid':
            self.assertEqual(getattr(before, what), getattr(after, what))
        self.assertTrue(os.path.islink(self.path('smtpproxy.ini')))
        self.assertIn(SENDER, self.section())

    def test_a_link_to_nowhere_makes_the_ini_there(self):
        os.mkdir(self.path('etc'))
        os.symlink(self.path('etc/real.ini'), self.path('smtpproxy.ini'))

        self.add(SENDER, 'port=0', *self.keys(), typed=[SECRET])

        self.assertTrue(os.path.isfile(self.path('etc/real.ini')))

    def on_a_full_disk(self, room):
        """--add with room for so many bytes in the ini."""
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        self.addCleanup(signal.signal, signal.SIGXFSZ, old)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_FSIZE, limit)
        before = len(self.content() or b'')
        resource.setrlimit(resource.RLIMIT_FSIZE, (before + room, limit[1]))
        return self.refuse(SENDER, *self.keys(), typed=[SECRET], *(
            ['port=0'] if not before else []))

    def test_on_a_full_disk_the_old_ini_is_untouched(self):
        self.write('smtpproxy.ini', INI)
        for room in 0, 1, 30:
            with self.subTest(room):
                self.assertRegex(self.on_a_full_disk(room),
                                 'cannot be written: .*; nothing was changed')

    def test_on_a_full_disk_there_is_no_half_ini(self):
        self.assertIn('nothing was changed', self.on_a_full_disk(30))
        self.assertEqual([], os.listdir(self.folder))

    def test_an_ini_that_cannot_be_synced_is_as_it_was(self):
        self.write('smtpproxy.ini', INI)
        with mock.patch.object(os, 'fsync', side_effect=OSError(5, 'no')):
            self.assertIn('cannot be written: no', self.refuse(
                SENDER, *self.keys(), typed=[SECRET]))

    def test_an_ini_that_has_changed_meanwhile_is_left_alone(self):
        path = self.write('smtpproxy.ini', INI)

        def change(conversation):
            with open(path, 'a') as file:
                file.write('# by another hand\n')
            conversation.say('250 fake')
        self.upstream.script['EHLO'] = change

        code, _, err = self.add(SENDER, *self.keys(
            smtpusername='', smtppassword=''), 'smtpusername=')

        self.assertEqual(1, code)
        self.assertIn('changed meanwhile', err)
        self.assertEqual((INI + '# by another hand\n').encode(),
                         self.content())

    def test_a_read_only_ini_is_named_before_anything_is_asked(self):
        os.chmod(self.write('smtpproxy.ini', INI), 0o444)
        os.chmod(self.folder, 0o755)
        code = ('import os, sys, smtpproxy\nsmtpproxy.parse([])\n'
                'if os.getuid() == 0:\n    os.setuid(65534)\n'
                'sys.exit(smtpproxy.main(sys.argv[1:]))')

        done = subprocess.run(
            [sys.executable, '-c', code, '--config',
             self.path('smtpproxy.ini'), '--add'],
            cwd=TOP, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, universal_newlines=True)

        self.assertEqual(1, done.returncode)
        self.assertRegex(done.stdout, 'smtpproxy.ini cannot be changed by '
                                      r'user \d+: nothing is asked')
        self.assertEqual(INI.encode(), self.content())


class Typed(AddCase):
    """At a terminal."""

    def setUp(self):
        super().setUp()
        self.write('smtpproxy.ini', INI)

    def answers(self, **other):
        """What is typed for an account at self.upstream, in this order."""
        return list(dict({
            'sender': SENDER, 'provider': 'other', 'host': self.upstream.host,
            'security': 'none', 'port': str(self.upstream.port), 'login': '',
            'user': ME, 'password': SECRET, 'from': ''}, **other).values())

    def type(self, *lines):
        return self.add(typed=lines, terminal=True)

    def test_every_key_is_asked_once(self):
        code, _, err = self.type(*self.answers())

        self.assertEqual((0, ''), (code, err))
        self.assertEqual(9, len(self.asked))
        self.assertIn('\nforcefrom=%s\n' % ME, self.section())

    def test_a_wrong_answer_is_asked_again_with_the_reason(self):
        for lines, reason in (
                (['printer', *self.answers()], 'must be an address'),
                ([SENDER, 'gnail', *self.answers()[1:]], 'must be one of'),
                ([*self.answers()[:3], 'maybe', *self.answers()[3:]],
                 'must be one of none, tls, ssl'),
                ([*self.answers()[:4], '99999', *self.answers()[4:]],
                 'whole number'),
                ([*self.answers()[:2], '', *self.answers()[2:]], 'is needed'),
                ([*self.answers()[:2], 'localhost:25', *self.answers()[2:]],
                 'write only localhost; 25 has a key of its own'),
                ([*self.answers()[:2], 'my server', *self.answers()[2:]],
                 'more than the name of a server'),
                ([*self.answers()[:-1], 'me', ''], 'mail address')):
            with self.subTest(reason):
                self.write('smtpproxy.ini', INI)
                self.asked.clear()
                code, out, _ = self.type(*lines)
                self.assertEqual(0, code, out)
                self.assertRegex(out, '(?m)^It .*' + reason)
                self.assertEqual(10, len(self.asked))

    def test_an_account_that_is_there_is_asked_again(self):
        self.ini(accounts={OTHER: self.account()})

        _, out, _ = self.type(OTHER, *self.answers())

        self.assertIn('It = %s has a section' % OTHER, out)
        self.assertIn('[%s]' % SENDER, self.section())

    def test_what_the_command_line_says_is_not_asked(self):
        self.add(SENDER, *self.keys(), typed=[SECRET, '-'], terminal=True)

        self.assertEqual(2, len(self.asked), self.asked)
        self.assertNotIn('forcefrom', self.section())

    def test_a_trial_that_fails_asks_whether_to_write_all_the_same(self):
        for answer, written in (('yes', True), ('no', False), ('', False),
                                ('what?', False)):
            with self.subTest(answer):
                self.write('smtpproxy.ini', INI)
                code, _, _ = self.type(*self.answers(password='wrong'),
                                       answer)
                self.assertIn('Write it all the same?', self.asked[-1])
                self.assertEqual((0 if written else 1, written), (
                    code, SENDER.encode() in self.content()))

    def test_the_end_of_the_answers_writes_nothing(self):
        for count in range(len(self.answers())):
            with self.subTest(count):
                code, _, err = self.type(*self.answers()[:count])
                self.assertEqual((1, 'smtpproxy: nothing was written\n'),
                                 (code, err))
                self.assertEqual(INI.encode(), self.content())

    def test_a_server_that_wants_a_pop_login_first(self):
        self.upstream.require_auth = False
        pop = self.serve(FakePOP(users={'me': SECRET}))

        code, out, err = self.type(
            *self.answers(login='pop')[:6], pop.host, 'false', str(pop.port),
            'me', SECRET)

        self.assertEqual((0, ''), (code, err), out)
        self.assertIn('popusername=me', self.section())

    def test_a_server_that_wants_no_login(self):
        self.upstream.require_auth = False

        code, _, err = self.type(*self.answers(login='none')[:6])

        self.assertEqual((0, ''), (code, err))
        self.assertNotIn('smtpusername', self.section())

    def test_a_port_that_cannot_be_had_is_asked(self):
        os.unlink(self.path('smtpproxy.ini'))
        listen = smtpproxy.smtps.Server.listen

        def refuse_25(server, host, port, tls=False):
            if port == 25:
                raise PermissionError(13, 'Permission denied')
            return listen(server, host, port, tls)
        with mock.patch.object(smtpproxy.smtps.Server, 'listen', refuse_25):
            code, out, err = self.type(*self.answers(), '25',
                                       str(self.upstream.port), '0')

        self.assertEqual((0, ''), (code, err), out)
        self.assertIn('port 25 may not be used', out)
        self.assertIn('port %d is taken' % self.upstream.port, out)
        self.assertEqual(0, smtpproxy.load(
            self.path('smtpproxy.ini')).config.port)


class Running(AddCase):

    def request(self):
        return smtpproxy.reload_request(self.path('smtpproxy.ini'))

    def code(self, sender):
        return self.greeted().command('MAIL FROM:<%s>' % sender)[0]

    def test_a_running_service_reads_its_ini_again(self):
        self.start()
        self.assertEqual(550, self.code(OTHER))

        code, out, err = self.add(OTHER, *self.keys(), typed=[SECRET])

        self.assertEqual((0, ''), (code, err))
        self.assertIn('the service has read it again', out)
        self.assertLogged('reloaded', '2 accounts')
        self.assertEqual(250, self.code(OTHER))
        self.assertEqual([], os.listdir(self.path('msgs/asked')))

    def test_an_ini_that_the_service_may_not_read_is_no_success(self):
        self.start({'sleeptime': 600})
        load, ask = smtpproxy.load, smtpproxy.Spool.ask

        def load_for_service(path, content=None):
            if content is None:         # not by --add
                raise PermissionError(13, 'Permission denied', path)
            return load(path, content)

        def ask_at_once(spool, id, what):
            path = ask(spool, id, what)
            self.proxy.relay.wake()
            return path
        with mock.patch.object(smtpproxy, 'load', load_for_service), \
                mock.patch.object(smtpproxy.Spool, 'ask', ask_at_once):
            code, out, err = self.add(OTHER, *self.keys(), typed=[SECRET])

        self.assertEqual((1, 1), (code, err.count('\n')), err)
        self.assertIn('not read its ini again; its log', err)
        self.assertLogged('ERROR', 'not reloaded', 'Permission denied')
        self.proxy.relay.wake()
        wait_until(lambda: not os.listdir(self.path('msgs/asked')))
        self.assertEqual(1, self.log().count('not reloaded'))

    def test_the_ini_of_another_service_is_no_success(self):
        self.start()
        path = self.write('other.ini', '[config]\nport=0\nsleeptime=1\n'
                          'msgdir=%s\n' % self.path('msgs'))

        code, out, err = self.add(OTHER, *self.keys(), '--config', path,
                                  typed=[SECRET])

        self.assertEqual((1, 1), (code, err.count('\n')), err)
        self.assertIn('uses another ini', err)
        self.assertIn(path + ' has a new section', out)
        self.assertNotIn('read it again', out)
        self.assertLogged('ERROR', 'not reloaded', 'smtpproxy.ini')
        self.assertEqual(550, self.code(OTHER))

    def test_its_ini_by_another_path_is_its_ini(self):
        self.start()
        os.symlink('smtpproxy.ini', self.path('link.ini'))

        code, _, err = self.add(OTHER, *self.keys(), '--config',
                                self.path('link.ini'), typed=[SECRET])

        self.assertEqual((0, ''), (code, err))
        self.assertEqual(250, self.code(OTHER))

    def test_nor_is_the_next_one_before_the_service_looks_again(self):
        self.start({'sleeptime': 600})
        with open(self.path('smtpproxy.ini'), 'a') as file:
            file.write('[broken]\n')
        for count in 1, 2:
            path = self.proxy.spool.ask(*self.request())
            self.proxy.relay.wake()
            wait_until(lambda: self.log().count('not reloaded') == count
                       and not os.path.exists(path))

            self.assertTrue(os.path.exists(path + smtpproxy.REFUSED))

    def test_a_reload_on_request_does_what_sighup_does(self):
        self.upstream.require_auth = False
        self.upstream.script['MAIL'] = ['451 4.3.0 later', None]
        self.start({'sleeptime': 600})
        self.assertLogged(self.submit(), 'not delivered')

        self.proxy.spool.ask(*self.request())
        self.proxy.relay.wake()

        self.assertDelivered([A])
        self.assertSpooled(0)

    def test_an_error_of_ours_stops_neither_service_nor_requests(self):
        self.start()
        with mock.patch.object(smtpproxy, 'load', side_effect=KeyError):
            path = self.proxy.spool.ask(*self.request())
            wait_until(lambda: not os.path.exists(path))

        self.assertLogged('ERROR', 'not reloaded: an error of ours')
        self.assertEqual(250, self.code(SENDER))


class FirstSession(ProgramCase):
    """README.md, Quick start: typed as it stands there, from a folder with
    nothing but the program."""

    def setUp(self):
        super().setUp()
        self.install()
        self.upstream.close()
        self.upstream = self.serve(FakeSMTP(
            users={'me@example.com': SECRET}, require_auth=True,
            tls=server_tls()))
        self.environment = dict(self.environment, SSL_CERT_FILE=CERTIFICATE)

    def session(self):
        """The commands, {question: answer} of README.md."""
        with open(os.path.join(TOP, 'README.md'), encoding='utf-8') as file:
            block = file.read().partition('\n```\n$ python3 ')
            block = '$ python3 ' + block[2].partition('\n```\n')[0]
        answers = {question: answer.strip() for question, _, answer in (
            line.rpartition(':') for line in block.splitlines())}
        answers.update({
            'Its server for outgoing mail': 'localhost',
            'Its port [587]': str(self.upstream.port),
            'Password (not shown)': SECRET,
            'The port for your devices [2525]': '0'})
        return re.findall(r'(?m)^\$ python3 (.*)$', block), answers, block

    def type(self, command, answers):
        """Runs a command at a terminal; returns what it showed."""
        master, terminal = pty.openpty()
        self.addCleanup(os.close, master)
        process = subprocess.Popen(
            [sys.executable, *command.split()], cwd=self.folder,
            stdin=terminal, stdout=terminal, stderr=terminal,
            start_new_session=True, env=self.environment)
        os.close(terminal)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        shown, end = '', time.monotonic() + 60
        while time.monotonic() < end:
            try:
                shown += os.read(master, 10000).decode()
            except OSError:
                break                       # it has ended
            question = shown.rpartition('\n')[2]
            if question.endswith(': '):
                os.write(master, answers[question[:-2]].encode() + b'\n')
                shown += '\n'
        self.assertEqual(0, process.wait(10), shown)
        return shown

    def test_an_account_and_a_first_mail_in_two_commands(self):
        (add, serve), answers, block = self.session()

        port25 = socket.socket()        # it is not to be had, as in README.md
        self.addCleanup(port25.close)
        port25.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        with contextlib.suppress(OSError):
            port25.bind(('', 25))
            port25.listen()

        shown = self.type(add, answers)

        for word in re.findall(r'(?m)^    \w+', block):
            self.assertIn(word, shown)
        self.assertNotIn(SECRET, shown)
        self.run_service(program=serve.split()[-1])
        self.submit()
        mail = self.assertDelivered([A])
        self.assertEqual(('me@example.com', 'me@example.com'),
                         (mail.user, mail.sender))
        self.assertIsNotNone(mail.tls)


if __name__ == '__main__':
    unittest.main()
