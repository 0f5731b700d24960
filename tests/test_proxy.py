"""The whole of it: start, reload and stop, as its owner sees them."""
import contextlib
import errno
import fcntl
import io
import os
import pwd
import socket
import ssl
import subprocess
import sys
import threading
import unittest
from unittest import mock

import smtpproxy
from tests.case import A, OTHER, SENDER, ProxyCase
from tests.fakes import CERTIFICATE, Client, wait_until

# A second certificate for localhost, good until 2081. Made with
#   openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes
#     -days 20000 -subj /CN=localhost -addext
#     subjectAltName=DNS:localhost,IP:127.0.0.1
RENEWED = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgtxryARCPmJZX0bfY
2p4uDc1JZNqX43d9cP7kwsEwBLuhRANCAARoqrEQADw1KGb5KNy6ZEYLs5uUDDW9
dUNKtQ1QKvMlXfodIGEgEJAOBpVrH+bkfZN4Xb14OkIj4N0uSuY2le7/
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBnDCCAUGgAwIBAgIUfWoBKjks0UE0iwyJ5EA8zn4Gw/cwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMjIxMzgwMloYDzIwODEwODI1
MjEzODAyWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAARoqrEQADw1KGb5KNy6ZEYLs5uUDDW9dUNKtQ1QKvMlXfodIGEgEJAO
BpVrH+bkfZN4Xb14OkIj4N0uSuY2le7/o28wbTAdBgNVHQ4EFgQUIehkGw0Y+shb
AmO6AbkY2Hs8uR8wHwYDVR0jBBgwFoAUIehkGw0Y+shbAmO6AbkY2Hs8uR8wDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDSQAwRgIhAPbtD3czCrzb/zvHN95qxIHvljKcfOTVuXBRVf7Oo5mPAiEA
neOnTVAb1YxyJnQgj7BffqXVugH52ZSHHlzobDCqLwo=
-----END CERTIFICATE-----
"""


class Reload(ProxyCase):

    def reload(self, config=None, accounts=None, more=''):
        """Writes another ini and reloads it."""
        self.ini(config, accounts, more)
        self.proxy.reload()

    def code(self, sender):
        return self.greeted().command('MAIL FROM:<%s>' % sender)[0]

    def test_a_new_account_works_at_once(self):
        self.start()
        self.assertEqual(550, self.code(OTHER))

        self.reload(accounts={OTHER: self.account()})

        self.assertEqual((250, 550), (self.code(OTHER), self.code(SENDER)))
        self.submit(sender=OTHER)
        self.assertEqual(OTHER, self.assertDelivered([A]).sender)
        self.assertLogged('INFO', 'reloaded', 'smtpproxy.ini', '1 accounts')

    def test_a_bad_ini_leaves_the_old_one_in_force(self):
        self.start()
        for name, bad in (('values', {'config': {'port': 'x', 'prot': '1'}}),
                          ('tls', {'config': {'tlscert': self.write(
                              'bad.pem', 'no'), 'tlskey': CERTIFICATE}})):
            with self.subTest(name):
                self.reload(accounts=bad)
                self.assertLogged('ERROR', 'not reloaded', '[config]')
                self.assertEqual(250, self.code(SENDER))
        self.submit()
        self.assertDelivered([A])

    def test_an_ini_that_is_gone_leaves_the_old_one_in_force(self):
        self.start()
        os.unlink(self.path('smtpproxy.ini'))

        self.proxy.reload()

        self.assertLogged('ERROR', 'not reloaded', 'smtpproxy.ini')
        self.assertEqual(250, self.code(SENDER))

    def with_password_file(self):
        """{section: keys} with a password that is in a file."""
        self.upstream.users = {'me': 'hush'}
        self.upstream.require_auth = True
        self.write('secret', 'wrong\n')
        return {SENDER: self.account(
            smtpusername='me', smtppasswordfile='secret')}

    def test_a_password_file_is_read_again(self):
        self.start({'sleeptime': 600}, self.with_password_file())
        self.assertLogged(self.submit(), 'not delivered')
        self.write('secret', 'hush\n')

        self.proxy.reload()

        self.assertDelivered([A])
        self.assertNotLogged('hush')

    def test_a_password_file_that_is_gone_leaves_the_old_one_in_force(self):
        self.start(accounts=self.with_password_file())
        os.unlink(self.path('secret'))

        self.proxy.reload()

        self.assertLogged('ERROR', 'not reloaded', 'smtppasswordfile')
        self.assertEqual(250, self.code(SENDER))

    def test_an_ini_that_its_user_may_not_read_is_told_with_its_mend(self):
        def refuse(path, *arguments):
            if path == self.path('smtpproxy.ini'):
                raise PermissionError(errno.EACCES, 'Permission denied', path)
            return real(path, *arguments)
        real = os.open
        with mock.patch.object(os, 'open', refuse):
            self.start()
        with mock.patch.object(os, 'open', refuse), mock.patch.object(
                smtpproxy, 'load', side_effect=PermissionError(13, 'no')):
            self.proxy.reload()

        for level in 'WARNING', 'ERROR not reloaded:':
            self.assertLogged(level, 'smtpproxy.ini: user', 'may not: chgrp')

    def test_without_a_password_file_it_does_not_start(self):
        with self.assertRaisesRegex(
                smtpproxy.StartError, r'\[%s\] localpasswordfile = .*secret '
                'cannot be read: No such file' % SENDER):
            self.start(accounts={SENDER: self.account(
                localpasswordfile='secret')})

        self.assertFalse(os.path.exists(self.path('msgs')))

    def test_what_needs_a_restart_is_named_and_service_goes_on(self):
        self.start()
        port = self.address[1]

        self.reload({'port': port + 1 if port < 65535 else 1024,
                     'msgdir': self.path('elsewhere')})

        for key in 'port', 'msgdir':
            self.assertLogged('WARNING', key, 'restart')
        self.submit()
        self.assertDelivered([A])
        self.assertFalse(os.path.exists(self.path('elsewhere')))

    def test_waiting_mail_is_tried_at_once(self):
        self.upstream.script['MAIL'] = ['451 4.3.0 later', None]
        self.start({'sleeptime': 600})
        self.assertLogged(self.submit(), 'not delivered')

        self.proxy.reload()

        self.assertDelivered([A])
        self.assertSpooled(0)

    def test_the_log_changes_its_level_and_its_file(self):
        self.start()
        self.reload(accounts={SENDER: self.account(), 'logging': {
            'file': 'new.log', 'level': 'WARNING'}})
        self.greeted().command('MAIL FROM:<stranger@x>')

        with open(self.path('new.log')) as file:
            content = file.read()
        self.assertIn('WARNING', content)
        self.assertNotIn('INFO', content)

    def test_limits_change_for_new_clients(self):
        self.start()
        self.reload({'maxsize': 1234, 'allow': '127.0.0.0/8'})
        self.assertIn('SIZE 1234', self.client().command('EHLO x')[1])

        self.reload({'allow': '192.0.2.0/24'})

        with Client(self.address) as client:
            self.assertEqual(554, client.reply()[0])
        self.assertLogged('WARNING', '127.0.0.1', 'allow')

    def test_warnings_come_again(self):
        self.start()
        self.reload(accounts={SENDER: self.account(
            smtpusername='x', smtppassword='50%%')})

        self.assertLogged('WARNING', 'smtppassword has %%')


class Certificate(ProxyCase):

    def serve_tls(self):
        """A proxy on two ports whose certificate is a file of the test."""
        with open(CERTIFICATE) as file:
            self.pem = self.write('tls.pem', file.read())
        self.start({'tlscert': self.pem, 'tlskey': self.pem,
                    'tlsport': free_port()})

    def certificate(self):
        """What a client that begins with a handshake is shown (PEM)."""
        port = self.proxy.server.listeners[1].getsockname()[1]
        return ssl.get_server_certificate(('127.0.0.1', port))

    def test_a_renewed_certificate_is_shown_after_a_reload(self):
        self.serve_tls()
        before = self.certificate()
        self.write('tls.pem', RENEWED)
        self.assertEqual(before, self.certificate())

        self.proxy.reload()

        self.assertNotEqual(before, self.certificate())
        self.assertIn(self.certificate().strip(), RENEWED)

    def test_a_broken_one_leaves_the_old_one_in_force(self):
        self.serve_tls()
        before = self.certificate()
        self.write('tls.pem', 'half a cert')

        self.proxy.reload()

        self.assertEqual(before, self.certificate())
        self.assertLogged('ERROR', 'not reloaded', 'tls.pem')

    def test_a_tls_port_whose_certificate_is_gone_refuses(self):
        self.serve_tls()
        address = self.proxy.server.listeners[1].getsockname()
        self.ini()

        self.proxy.reload()

        with Client(address) as client:
            self.assertEqual(421, client.reply()[0])
        self.assertLogged('WARNING', 'tlscert is gone', '421', address[1])
        self.submit()
        self.assertDelivered([A])

    def test_starttls_and_the_tls_port_take_mail(self):
        self.serve_tls()
        trust = ssl.create_default_context(cafile=CERTIFICATE)
        client = self.greeted()
        self.assertEqual(220, client.command('STARTTLS')[0])
        client.secure(trust)
        client.command('EHLO x')
        self.submit(client=client)
        address = self.proxy.server.listeners[1].getsockname()
        with Client(address, trust) as other:
            other.reply()
            self.submit(client=other)
        self.upstream.wait(2)


class Flawed(ProxyCase):
    """A mail of an earlier version whose envelope is refused today."""

    def leave(self, sender, to):
        """Such a mail in msgs/; returns its id."""
        self.stop()
        spool = smtpproxy.Spool(self.path('msgs'))
        spool.open()
        draft = spool.draft(sender, [to], {})
        draft.write(b'Subject: old\r\n\r\nhello\r\n')
        draft.seal()
        draft.commit()
        spool.close()
        return draft.id

    def restart(self, **config):
        self.stop()
        self.write('smtpproxy.log', '')
        self.start(config)

    def assertParked(self, id, bad):
        line = self.assertLogged('ERROR', id, 'refused for good', '<%s>' % bad)
        self.assertIn('subject old', line)
        self.assertIn(bad, self.command('--queue'))
        self.assertIn('parked', self.command('--queue'))

    def command(self, *arguments):
        """stdout of a command of the owner."""
        out = io.TextIOWrapper(io.BytesIO(), 'utf-8')
        with contextlib.redirect_stdout(out):
            self.assertEqual(0, smtpproxy.main(
                ['--config', self.path('smtpproxy.ini'), *arguments]))
        out.flush()
        return out.buffer.getvalue().decode()

    def test_it_is_parked_and_said_and_never_sent(self):
        for bad, sender, to in (('@r:' + SENDER, '@r:' + SENDER, A),
                                ('a"b@x', 'a"b@x', A),
                                ('a@x"', SENDER, 'a@x"')):
            with self.subTest(bad):
                id = self.leave(sender, to)
                self.restart(deleteonerror='true')
                self.assertParked(id, bad)
        self.assertFalse(os.path.exists(self.path('msgs', 'corrupt')))
        self.assertSpooled(3)
        self.submit()
        self.upstream.wait(1)
        self.assertEqual([SENDER], [m.sender for m in self.upstream.mails])

    def test_the_owner_may_look_at_it_ask_again_and_delete_it(self):
        id = self.leave('@r:' + SENDER, A)
        self.restart()
        self.assertParked(id, '@r:' + SENDER)
        self.assertIn('hello', self.command('--show', id))
        self.write('smtpproxy.log', '')

        self.command('--retry', id)
        self.assertParked(id, '@r:' + SENDER)
        self.command('--delete', id)

        self.assertSpooled(0)
        self.assertEqual([], self.upstream.mails)

    def test_a_restart_is_silent_about_it(self):
        id = self.leave(SENDER, 'a@x"')
        self.restart()
        self.assertParked(id, 'a@x"')

        self.restart()

        self.submit()
        self.upstream.wait(1)
        self.assertNotLogged(id)


class SecondStart(ProxyCase):

    def setUp(self):
        super().setUp()
        patch = mock.patch.object(        # it need not wait for a command
            smtpproxy.Spool.open, '__defaults__', (0,))
        patch.start()
        self.addCleanup(patch.stop)
        self.pauses = []

    def refusal(self, **config):
        """What a second start beside self.proxy says."""
        second = smtpproxy.Proxy(smtpproxy.load(self.ini(config)),
                                 self.pauses.append)
        with self.assertRaises(smtpproxy.StartError) as caught, \
                contextlib.redirect_stderr(io.StringIO()) as self.said:
            second.start()
        return str(caught.exception)

    def test_on_the_same_msgs_is_refused(self):
        self.upstream.script['MAIL'] = '451 4.3.0 later'
        self.start()
        self.assertLogged(self.submit(), 'not delivered')
        before = sorted(os.listdir(self.path('msgs')))

        refusal = self.refusal()

        self.assertIn(self.path('msgs'), refusal)
        self.assertIn('another smtpproxy', refusal)
        self.assertEqual(1, len(refusal.splitlines()))
        self.assertEqual(before, sorted(os.listdir(self.path('msgs'))))

    def test_on_the_same_port_is_refused_and_touches_nothing(self):
        self.start()

        refusal = self.refusal(port=self.address[1],
                               msgdir=self.path('second'))

        self.assertIn(str(self.address[1]), refusal)
        self.assertIn('taken', refusal)
        self.assertFalse(os.path.exists(self.path('second')))

    def test_an_address_of_another_box_is_named(self):
        self.assertIn('192.0.2.1', self.refusal(host='192.0.2.1'))

    def test_a_name_that_can_have_no_address_is_named(self):
        self.assertIn('cannot listen on ü..x', self.refusal(host='ü..x'))

    def test_only_an_address_that_may_still_come_is_waited_for(self):
        for host, seconds in (('192.0.2.1', 60), ('2001:db8::1', 60),
                              ('no.such.name.invalid', 0), ('[::1]', 0),
                              ('127.0.0.1 ::1', 0), ('eth9', 0)):
            with self.subTest(host):
                self.pauses.clear()
                self.refusal(host=host)
                self.assertEqual(seconds, sum(self.pauses))
                self.assertEqual(bool(seconds),
                                 'waiting' in self.said.getvalue())

    def test_an_address_that_comes_while_we_wait_is_listened_on(self):
        bind = socket.socket.bind

        def bind_later(sock, address):
            if len(self.pauses) < 3:
                raise OSError(errno.EADDRNOTAVAIL, 'not there yet')
            bind(sock, address)
        proxy = smtpproxy.Proxy(smtpproxy.load(self.ini()),
                                self.pauses.append)
        self.addCleanup(self.stop)
        with mock.patch.object(socket.socket, 'bind', bind_later), \
                contextlib.redirect_stderr(io.StringIO()):
            proxy.start()
        self.proxy = proxy
        self.submit()

        self.assertDelivered([A])
        self.assertEqual([1, 1, 1], self.pauses)

    def test_msgs_that_cannot_be_used_are_named(self):
        refusal = self.refusal(msgdir=self.write('file', ''))

        self.assertIn(self.path('file'), refusal)

    def test_a_stopped_one_leaves_all_free(self):
        self.start()
        port = self.address[1]
        self.stop()

        self.start({'port': port})

        self.submit()
        self.assertDelivered([A])


class Stop(ProxyCase):

    def test_what_is_between_dot_and_250_is_finished(self):
        self.upstream.script['MAIL'] = '451 4.3.0 later'
        self.start()
        client = self.greeted()
        client.command('MAIL FROM:<%s>' % SENDER)
        client.command('RCPT TO:<%s>' % A)
        client.command('DATA')

        with self.slow_disk() as (reached, go_on):
            client.send(b'Subject: x\r\n\r\n.\r\n')
            self.assertTrue(reached.wait(5))
            with self.stopping():
                go_on.set()
                code, text = client.reply()

        self.assertEqual(250, code)
        self.assertEqual([text[0].split()[-1] + '.mail'], self.spooled())

    @contextlib.contextmanager
    def slow_disk(self):
        """fsync tells the first event and waits for the second."""
        reached, go_on, sync = threading.Event(), threading.Event(), os.fsync

        def slow(file):
            reached.set()
            go_on.wait(5)
            sync(file)
        with mock.patch.object(os, 'fsync', slow):
            yield reached, go_on

    @contextlib.contextmanager
    def stopping(self):
        """self.stop() runs meanwhile."""
        stopper = threading.Thread(target=self.stop, name='stopper')
        stopper.start()
        yield
        stopper.join()

    def test_who_waits_is_told_and_nobody_new_comes_in(self):
        self.start()
        client, address = self.greeted(), self.address

        self.stop()

        self.assertEqual(421, client.reply()[0])
        self.assertEqual(b'', client.read_until_closed())
        with self.assertRaises(OSError):
            socket.create_connection(address, 1)

    def test_a_delivery_under_way_is_finished(self):
        self.upstream.delay = 0.05
        self.start()
        self.submit()
        wait_until(lambda: self.upstream.commands)

        self.stop()

        self.assertDelivered([A])
        self.assertSpooled(0)

    def test_no_thread_of_ours_is_left(self):
        self.start()
        self.submit()
        self.assertDelivered([A])
        self.stop()

        wait_until(lambda: not [
            thread for thread in threading.enumerate()
            if thread.name.startswith(('smtp-', 'relay', 'listen'))])


@unittest.skipUnless(os.getuid() == 0, 'needs root')
class Root(ProxyCase):
    """What root hands over to user= lies where that user may write."""

    def setUp(self):
        super().setUp()
        self.user = pwd.getpwnam('nobody')
        os.mkdir(self.path('msgs'), 0o700)
        os.mkdir(self.path('roots'), 0o700)
        self.write('roots/mail', 'secret')

    def hand_over(self, file='smtpproxy.log'):
        proxy = smtpproxy.Proxy(smtpproxy.load(self.ini(
            {'user': 'nobody'}, {'logging': {'file': file}})))
        self.addCleanup(proxy.server.stop)
        proxy._hand_over_files()

    def assertOwner(self, uid, *names):
        for name in names:
            with self.subTest(name):
                self.assertEqual(uid, os.stat(self.path(name)).st_uid)

    def test_what_root_made_belongs_to_the_user(self):
        for name in 'msgs/1.mail', 'smtpproxy.log.1', 'smtpproxy.log.bak':
            self.write(name, '')
        os.mkdir(self.path('msgs/asked'))

        self.hand_over()

        self.assertOwner(self.user.pw_uid, 'msgs', 'msgs/1.mail', 'msgs/asked',
                         'smtpproxy.log', 'smtpproxy.log.1')
        self.assertOwner(0, 'smtpproxy.log.bak', '.', 'roots', 'roots/mail')

    def test_no_file_is_given_away_through_a_link(self):
        os.chown(self.folder, self.user.pw_uid, -1)
        os.symlink(self.path('roots/mail'), self.path('msgs/link'))
        os.link(self.path('roots/mail'), self.path('msgs/second'))
        os.symlink(self.path('roots/mail'), self.path('smtpproxy.log.1'))
        os.mkfifo(self.path('msgs/pipe'))

        self.hand_over()

        self.assertOwner(0, 'roots', 'roots/mail')

    def test_no_folder_is_given_away_through_a_link(self):
        os.chown(self.folder, self.user.pw_uid, -1)
        os.rmdir(self.path('msgs'))
        self.write('logs/smtpproxy.log', '')
        for link, folder in ('msgs', 'roots'), ('log', 'logs'):
            os.symlink(self.path(folder), self.path(link))

        self.hand_over('log/smtpproxy.log')

        self.assertOwner(0, 'roots', 'roots/mail', 'logs',
                         'logs/smtpproxy.log')

    def test_no_file_is_made_through_a_link(self):
        os.symlink(self.path('roots/new'), self.path('smtpproxy.log'))

        self.hand_over()

        self.assertFalse(os.path.exists(self.path('roots/new')))

    def test_a_msgs_on_another_disk_works_if_the_link_is_roots(self):
        os.rmdir(self.path('msgs'))
        os.symlink(self.path('roots'), self.path('msgs'))

        self.hand_over()

        self.assertOwner(self.user.pw_uid, 'roots', 'roots/mail')

    def test_a_file_system_without_owners_is_named_once_and_used(self):
        self.write('msgs/1.mail', '')
        for number in errno.EPERM, errno.ENOTSUP, errno.EINVAL:
            smtpproxy.named.clear()
            with mock.patch('os.fchown', side_effect=OSError(number, 'no')), \
                    self.assertLogs('smtpproxy', 'WARNING') as logged:
                self.hand_over()
            self.assertEqual(1, len(logged.output))
            self.assertIn(self.path('msgs') + ': its file system cannot change '
                          'owners', logged.output[0])

    def test_a_log_that_can_not_begin_anew_is_named(self):
        with mock.patch.object(os, 'access', return_value=False):
            self.start()

        self.assertLogged('WARNING', self.folder + ': ',
                          'file=log/smtpproxy.log')

    def test_a_python_that_the_user_may_not_read_is_named(self):
        error = ModuleNotFoundError(name='json')
        with mock.patch.object(sys, 'base_prefix', self.path('none')):
            self.assertIn('module json cannot be read by user',
                          smtpproxy.missing_module(error))
        with mock.patch.object(sys, 'base_prefix', self.folder):
            self.assertIn('module json is missing on this box',
                          smtpproxy.missing_module(error))

    def test_a_log_without_its_folder_stops_nothing(self):
        self.hand_over('nowhere/smtpproxy.log')

        self.assertOwner(self.user.pw_uid, 'msgs')

    def start_as_nobody(self, **logs):
        """A start that hands over and, as these tests go on as root, gives up
        nothing."""
        with mock.patch.object(smtpproxy, 'become') as self.become:
            self.start({'user': 'nobody'}, {
                SENDER: self.account(), 'logging': logs})

    def test_a_start_that_is_refused_touches_nothing_of_the_first(self):
        self.start()
        first, self.proxy = self.proxy, None
        self.addCleanup(first.stop)
        self.write('msgs/1.mail', '')

        with mock.patch.object(smtpproxy.Spool.open, '__defaults__', (0,)), \
                self.assertRaisesRegex(smtpproxy.StartError, 'another'):
            self.start_as_nobody(file='second.log')

        self.assertOwner(0, 'msgs', 'msgs/1.mail')
        self.assertFalse(os.path.exists(self.path('second.log')))

    def test_the_lock_that_root_took_in_a_file_is_the_users(self):
        real = fcntl.flock

        def files_only(file, operation):
            if os.path.isdir(file):
                raise OSError(errno.EINVAL, 'Invalid argument')
            real(file, operation)
        smtpproxy.named.clear()
        with mock.patch.object(fcntl, 'flock', files_only):
            self.start_as_nobody()

        self.assertOwner(self.user.pw_uid, 'msgs', 'msgs/.lock')
        self.assertLogged('WARNING', 'cannot lock folders')

    def test_a_share_that_keeps_root_out_is_opened_by_the_user(self):
        real = smtpproxy.Spool.open

        def open_by_user(spool):
            if not self.become.called:
                raise PermissionError(errno.EACCES, 'Permission denied')
            real(spool)
        with mock.patch.object(smtpproxy.Spool, 'open', open_by_user):
            self.start_as_nobody()

        self.submit()
        self.assertDelivered([A])

    def test_a_command_gives_up_all_groups_of_root(self):
        os.chown(self.path('msgs'), self.user.pw_uid, self.user.pw_gid)

        told = subprocess.check_output(
            [sys.executable, '-c', GROUPS, self.ini()], text=True,
            cwd=os.path.dirname(smtpproxy.__file__))

        self.assertEqual('%d %d [%d]\n' % (
            self.user.pw_uid, self.user.pw_gid, self.user.pw_gid), told)


GROUPS = '''\
import os, sys, smtpproxy
os.setgroups([0, 1, 2])
smtpproxy.command_spool(smtpproxy.load(sys.argv[1]))
print(os.getuid(), os.getgid(), os.getgroups())
'''


def free_port():
    with socket.create_server(('127.0.0.1', 0)) as server:
        return server.getsockname()[1]


if __name__ == '__main__':
    unittest.main()
