"""The front door: who may send, and what a mail gets before it is safe."""
import base64
import errno
import hmac
import os
import re
import socket
import threading
import unittest
from unittest import mock

import smtpproxy
import smtps
from tests.case import A, B, OTHER, SENDER, ProxyCase

RECEIVED = b'Received: from x by y; Sun, 22 Nov 2026 19:58:55 +0000\r\n'


def plain(user, password):
    return 'AUTH PLAIN ' + base64.b64encode(
        ('\0%s\0%s' % (user, password)).encode()).decode()


class Senders(ProxyCase):

    def setUp(self):
        super().setUp()
        self.enterPatch(mock.patch.object(
            smtpproxy.Admission, 'announced', set()))

    def enterPatch(self, patch):
        self.addCleanup(patch.stop)
        return patch.start()

    def test_a_sender_without_account_is_refused_at_once(self):
        self.start()
        client = self.greeted()

        client.converse("""
            C: MAIL FROM:<stranger@home.lan>
            S: 550 5.7.1 no account
            C: RCPT TO:<a@example.org>
            S: 503
            C: MAIL FROM:<PRINTER@home.lan>
            S: 250""")

    def test_the_ini_block_for_a_new_device_is_in_the_log_once(self):
        self.start()
        for _ in range(3):
            self.greeted().command('MAIL FROM:<scanner@home.lan>')
        self.assertLogged('WARNING', '127.0.0.1', '<scanner@home.lan>')

        block = re.findall('WARNING     (.*)\n', self.log())
        text = re.sub('<.*>', 'x', '\n'.join(block))
        account, = smtpproxy.load(self.write(
            'new.ini', text)).accounts.items()
        self.assertEqual('scanner@home.lan', account[0])
        self.assertEqual('x:587', account[1].server)

    def test_a_bounce_needs_the_default_account(self):
        for accounts, code in (({SENDER: self.account()}, 550),
                               ({'default': self.account()}, 250)):
            with self.subTest(code):
                self.start(accounts=accounts)
                self.assertEqual(code, self.greeted().command(
                    'MAIL FROM:<>')[0])
                self.stop()
        self.assertLogged('[default]')

    def test_a_bounce_is_delivered_from_nobody(self):
        self.start(accounts={'default': self.account()})
        self.submit(sender='')

        self.assertEqual('', self.assertDelivered([A]).sender)

    def test_a_domain_and_a_default_take_their_senders(self):
        self.start(accounts={'*@home.lan': self.account()})

        self.submit(sender='anything@HOME.lan')

        self.assertDelivered([A])


class Logins(ProxyCase):
    """AUTH; OTHER has a localpassword, SENDER has none."""

    def setUp(self):
        super().setUp()
        patch = mock.patch.object(smtps, 'AUTH_PAUSE', 0.02)
        patch.start()
        self.addCleanup(patch.stop)
        self.start(accounts={
            SENDER: self.account(),
            OTHER: self.account(localpassword='sesame-é'),
            'twin@home.lan': {'use': OTHER}})

    def code(self, client, line):
        return client.command(line)[0]

    def test_any_login_is_taken_where_none_is_asked_for(self):
        for user, password in ((SENDER, 'x'), ('nobody', ''), ('', ''),
                               ('a b', 'é'), ('stranger@x', 'y')):
            with self.subTest(user):
                client = self.greeted()
                self.assertEqual(235, self.code(client, plain(user, password)))
                self.assertEqual(250, self.code(
                    client, 'MAIL FROM:<%s>' % SENDER))

    def test_a_localpassword_must_be_given(self):
        for login in (None, (SENDER, 'x'), ('nobody', 'sesame-é'),
                      ('twin@home.lan', 'sesame-é')):
            with self.subTest(login):
                client = self.greeted()
                if login:
                    self.code(client, plain(*login))
                self.assertEqual(530, self.code(
                    client, 'MAIL FROM:<%s>' % OTHER))
        self.assertLogged('WARNING', '127.0.0.1', OTHER, '530')

    def test_a_wrong_localpassword_is_refused(self):
        for password in ('', 'x', 'Sesame-é', 'sesame-é ', 'sesame'):
            with self.subTest(password):
                client = self.greeted()
                self.assertEqual(535, self.code(
                    client, plain(OTHER, password)))
                self.assertEqual(530, self.code(
                    client, 'MAIL FROM:<%s>' % OTHER))
        self.assertLogged('WARNING', '127.0.0.1', 'wrong', OTHER)
        self.assertNotLogged('Sesame')

    def test_the_right_localpassword_opens_the_door(self):
        for user in OTHER, OTHER.upper():
            with self.subTest(user):
                client = self.greeted()
                self.assertEqual(235, self.code(
                    client, plain(user, 'sesame-é')))
                self.submit(sender=OTHER, client=client)

    def test_a_refused_login_does_not_count(self):
        client = self.greeted()
        self.assertEqual(535, self.code(client, plain(OTHER, 'x')))
        self.assertEqual(235, self.code(client, plain(OTHER, 'sesame-é')))

        self.assertEqual(250, self.code(client, 'MAIL FROM:<%s>' % OTHER))

    def test_a_localpassword_is_compared_in_constant_time(self):
        compared = []

        def compare(*pair):
            compared.append(pair)
            return False
        with mock.patch.object(hmac, 'compare_digest', compare):
            code = self.code(self.greeted(), plain(OTHER, 'guess'))

        self.assertEqual(535, code)
        self.assertEqual([{'sesame-é'.encode(), b'guess'}],
                         [set(pair) for pair in compared])


class OneAddress(ProxyCase):
    """Who is looked up is who is stored, logged and sent."""

    def setUp(self):
        super().setUp()
        self.start(accounts={
            'default': self.account(),
            OTHER: self.account(localpassword='sesame')})

    def test_no_spelling_goes_round_a_localpassword(self):
        for path in ('<%s>', '%s', 'Boss <%s>', '@relay:%s', '<@relay:%s>',
                     '@a.lan,@b.lan:%s', '<@relay: %s >', 'X <@relay:%s>'):
            for sender in OTHER, OTHER.upper():
                with self.subTest(path, sender=sender):
                    self.assertEqual(530, self.greeted().command(
                        'MAIL FROM:' + path % sender)[0])
        self.assertEqual(501, self.greeted().command(
            'MAIL FROM:@relay:@relay:' + OTHER)[0])

    def test_an_address_arrives_in_the_letters_that_the_device_used(self):
        for sender in 'PrinTer@Home.Lan', 'ROOT', '"A b"@X', '':
            with self.subTest(sender):
                id = self.submit(sender=sender, to=['Ab.C@Example.ORG'])

                mail = self.assertDelivered(['Ab.C@Example.ORG'])
                self.assertEqual(sender, mail.sender)
                self.assertLogged(id, 'from <%s> to <Ab.C@Exa' % sender)
                self.upstream.mails.clear()


class Header(ProxyCase):

    def setUp(self):
        super().setUp()
        self.start()

    def delivered(self, content):
        """(header, body) as they arrive of a mail that is handed in."""
        count = len(self.upstream.mails)
        self.submit(content)
        data = self.upstream.wait(count + 1)[-1].data
        header, _, body = data.partition(b'\r\n\r\n')
        return header + b'\r\n', body

    def test_what_every_mail_needs_is_added_once(self):
        there = {b'Date': b'Thu, 01 Jan 1970 00:00:00 +0000',
                 b'Message-ID': b'<1@x>', b'From': b'Me <me@home.lan>'}
        for missing in (*there, None):
            with self.subTest(missing):
                given = b''.join(b'%s: %s\r\n' % pair for pair in
                                 there.items() if pair[0] != missing)
                header, _ = self.delivered(given + b'\r\nhello\r\n')
                for name in there:
                    self.assertEqual(1, header.count(b'\r\n%s: ' % name))
                self.assertTrue(header.endswith(given))

    def test_an_empty_one_counts_as_missing(self):
        """Gmail: 550 5.7.1 'From' header is missing."""
        header, _ = self.delivered(
            b'From: \r\nDATE:\r\n \t\r\nMessage-ID :\t\r\nSubject:\r\n'
            b'X: 1\r\nFrom:\r\n me@home.lan\r\n\r\nFrom:\r\n')

        self.assertTrue(header.endswith(
            b'>\r\nSubject:\r\nX: 1\r\nFrom:\r\n me@home.lan\r\n'), header)
        for name in b'Date: \\w', b'Message-ID: <':
            self.assertEqual(1, len(re.findall(name, header)))

    def test_what_is_signed_stays_as_it_is(self):
        own = b'From:\r\nDKIM-Signature: v=1\r\nDate: \r\n'

        header, _ = self.delivered(own + b'\r\n')

        self.assertTrue(header.endswith(own), header)

    def test_received_says_who_when_and_the_id(self):
        id = self.submit(b'subject: x\r\n\r\n')
        header = self.assertDelivered([A]).data.decode()

        self.assertRegex(header, (
            r'^Received: from printer \(\[127\.0\.0\.1\]\)\r\n'
            r'\tby \S+ with ESMTP id %s;\r\n'
            r'\t\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d \+0000\r\n' % id))
        self.assertIn('\r\nFrom: <%s>\r\n' % SENDER, header)

    def test_names_count_in_any_case_and_only_in_the_header(self):
        header, _ = self.delivered(
            b'From : z\r\nDATE: x\r\nmessage-id : y\r\nX-Date: n\r\n'
            b' From: folded\r\n\r\nDate: body\r\n')

        self.assertEqual((1, 1, 1), tuple(
            len(re.findall(rb'(?im)^%s *:' % name, header))
            for name in (b'date', b'message-id', b'from')))

    # what, the mail, its own header fields and its body as they arrive
    REPAIRS = (
        ('no blank line', b'Subject: x\r\nhello\r\n',
         b'Subject: x\r\n', b'hello\r\n'),
        ('no header', b'hello\r\nyou\r\n', b'', b'hello\r\nyou\r\n'),
        ('header only', b'Subject: x\r\n', b'Subject: x\r\n', b''),
        ('nothing', b'', b'', b''),
        ('a blank line first', b'\r\nhello\r\n', b'', b'hello\r\n'),
        ('From of a mailbox', b'From me Sun Nov 22\r\n'
         b'Subject: x\r\n\r\nhello\r\n', b'Subject: x\r\n',
         b'hello\r\n'),
        ('>From of a mailbox', b'>From me Sun Nov 22\r\n'
         b'Subject: x\r\n\r\nhello\r\n', b'Subject: x\r\n',
         b'hello\r\n'),
        ('8 bit', b'Subject: \xff\xe9\r\n\r\n\xff\r\n',
         b'Subject: \xff\xe9\r\n', b'\xff\r\n'),
        ('dots', b'Subject: x\r\n\r\n.\r\n..\r\n.a\r\n',
         b'Subject: x\r\n', b'.\r\n..\r\n.a\r\n'),
        ('folded', b'Subject: x\r\n\ty\r\n\r\nz\r\n',
         b'Subject: x\r\n\ty\r\n', b'z\r\n'))

    def test_headers_of_careless_devices_are_repaired(self):
        for name, content, header, body in self.REPAIRS:
            with self.subTest(name):
                arrived, content = self.delivered(content)
                self.assertTrue(arrived.endswith(
                    b'From: <%s>\r\n%s' % (SENDER.encode(), header)), arrived)
                self.assertEqual(body, content)

    def test_a_long_header_in_many_pieces(self):
        header = b''.join(b'X-%05d: %s\r\n' % (n, b'x' * 900)
                          for n in range(300))
        arrived, body = self.delivered(header + b'\r\n.hello\r\n')

        self.assertTrue(arrived.endswith(header))
        self.assertEqual(b'.hello\r\n', body)

    def test_a_header_without_end_is_refused(self):
        client = self.greeted()
        client.command('MAIL FROM:<%s>' % SENDER)
        client.command('RCPT TO:<%s>' % A)

        code, text = client.data(b'X: %s\r\n' % (b'x' * 990) * 600)

        self.assertEqual((552, '5.3.4'), (code, text[:5]))
        self.submit(client=client)
        self.assertEqual(set(), self.proxy.spool.drafts)

    def test_a_first_line_without_end_is_kept_whole_or_refused(self):
        for start in b'X: ', b'':
            with self.subTest(start):
                content = start + b'x' * 600000 + b'\r\nhello\r\n'
                client, count = self.greeted(), len(self.upstream.mails)
                client.command('MAIL FROM:<%s>' % SENDER)
                client.command('RCPT TO:<%s>' % A)
                if client.data(content)[0] == 250:
                    data = self.upstream.wait(count + 1)[-1].data
                    self.assertEqual(600000, data.count(b'x' * 6) * 6)
                    self.assertTrue(data.endswith(b'hello\r\n'))

    def test_a_mail_that_goes_round_is_stopped(self):
        for count, code in (100, 250), (101, 554):
            with self.subTest(count):
                client = self.greeted()
                client.command('MAIL FROM:<%s>' % SENDER)
                client.command('RCPT TO:<%s>' % A)
                reply = client.data(RECEIVED * count + b'\r\nhello\r\n')
                self.assertEqual(code, reply[0])
        self.assertIn('5.4.6', reply[1])
        self.assertLogged('ERROR', 'loop', SENDER, '127.0.0.1')

    def test_a_strange_name_of_the_client_harms_no_header(self):
        for name in ('', 'a b', '(x', '[1.2.3.4]', 'ü', '\x07', 'x' * 500):
            with self.subTest(name):
                client = self.client()
                client.command('EHLO ' + name)
                count = len(self.upstream.mails)
                self.submit(client=client)
                header = self.upstream.wait(count + 1)[-1].data
                self.assertRegex(header, (
                    rb'\AReceived: from [!-~]+ \(\[127\.0\.0\.1\]\)\r\n\tby '))


class Promise(ProxyCase):

    def test_the_id_of_the_reply_is_that_of_the_log_and_the_file(self):
        self.upstream.script['MAIL'] = '451 4.3.0 later'
        self.start()
        id = self.submit(to=(A, B))

        self.assertLogged('INFO', id + ': accepted', SENDER, A, B, '127.0.0.1')
        self.assertEqual([id + '.mail'], self.spooled())

    def test_what_was_added_stays_the_same_over_retries(self):
        self.upstream.script['.'] = ['451 4.3.0 later', None]
        self.start()
        id = self.submit(b'Subject: x\r\n\r\n')
        with open(self.path('msgs', id + '.mail'), 'rb') as file:
            stored = file.read()
        self.assertLogged(id, 'not delivered')

        self.proxy.reload()

        self.assertIn(self.assertDelivered([A]).data, stored)

    def test_a_full_disk_is_a_452_and_service_goes_on_by_itself(self):
        self.upstream.script['MAIL'] = '451 4.3.0 later'
        self.start()
        client = self.greeted()
        for call in 'write', 'fsync', 'open':
            with self.subTest(call):
                with mock.patch.object(os, call, self.failing(call)):
                    code, text = self.hand_in(client)
                self.assertEqual((452, '4.3.1'), (code, text[:5]))
                self.assertEqual([], self.spooled())
        self.assertLogged('ERROR', '452', 'No space left', SENDER)

        self.submit(client=client)
        self.assertSpooled(1)
        self.assertEqual(set(), self.proxy.spool.drafts)

    @staticmethod
    def failing(call):
        """os.call, but the disk is full for the threads of clients."""
        usual = getattr(os, call)

        def fail(*arguments, **options):
            if threading.current_thread().name.startswith('smtp-') and not (
                    str(arguments[0]).endswith('.log')):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return usual(*arguments, **options)
        return fail

    @staticmethod
    def hand_in(client, size=200000):
        client.command('MAIL FROM:<%s>' % SENDER)
        client.command('RCPT TO:<%s>' % A)
        return client.data(b'Subject: x\r\n\r\n' + b'x' * 70 + b'\r\n' * size)

    def test_a_mail_that_is_safe_is_answered_250_whatever_fails_then(self):
        """A 451 would bring it a second time."""
        self.start()
        for error in ValueError('on purpose'), SystemExit('on purpose'):
            with self.subTest(error), mock.patch.object(
                    self.proxy.relay, 'announce', side_effect=error):
                id = self.submit()
                self.assertLogged('ERROR', id, 'accepted', 'reload')
        self.assertEqual(set(), self.proxy.spool.drafts)

        self.proxy.reload()

        self.upstream.wait(2)

    def test_only_parameters_that_are_understood_are_handed_on(self):
        """Issue 17: a strict server refuses others for good."""
        self.start()
        for said, on in ((b'BODY=8bitmime', ' BODY=8BITMIME'),
                         (b'BODY=7BIT SMTPUTF8', ' BODY=7BIT'),
                         (b'BODY=BINARYMIME', ''), (b'BODY', ''),
                         (b'BODY=FOO SMTPUTF8=x', ''),
                         (b'BODY=\xff SMTPUTF8=\xff', '')):
            with self.subTest(said):
                client = self.greeted()
                client.send(b'MAIL FROM:<%s> %s\r\n' % (
                    SENDER.encode(), said))
                client.expect('250')
                client.command('RCPT TO:<%s>' % A)
                count = len(self.upstream.mails)
                self.assertEqual(250, client.data(b'\r\nhello\r\n')[0])
                self.upstream.wait(count + 1)
                self.assertRegex('\n'.join(self.upstream.commands), (
                    r'MAIL FROM:<%s>%s SIZE=\d+\n' % (SENDER, on)))
                self.upstream.commands.clear()
        self.assertEqual(set(), self.proxy.spool.drafts)

    def test_several_addresses_in_one_field_of_a_device_get_the_mail(self):
        """Issue 17: the provider got them as one address, and refused."""
        self.start()
        client = self.greeted()

        client.command('MAIL FROM:<%s>' % SENDER)
        for path in '%s; %s' % (A, B), B:
            self.assertEqual(250, client.command('RCPT TO:<%s>' % path)[0])
        client.data(b'Subject: x\r\n\r\nhello\r\n')

        self.assertDelivered([A, B])

    def test_a_device_without_any_cr_hands_in_its_mail(self):
        """Issue 17: `printf ... | nc`."""
        self.start()
        client = self.client()

        client.send(b'HELO nas\nMAIL FROM:<%s>\nRCPT TO:<%s>\nDATA\n'
                    b'Subject: disk\n\nbad\n.\nQUIT\n' % (
                        SENDER.encode(), A.encode()))
        client.socket.shutdown(socket.SHUT_WR)

        self.assertIn(b'accepted as', client.read_until_closed())
        self.assertTrue(self.assertDelivered([A]).data.endswith(
            b'Subject: disk\r\n\r\nbad\r\n'))

    def test_a_mail_that_is_broken_off_leaves_nothing(self):
        self.start()
        client = self.greeted()
        client.command('MAIL FROM:<%s>' % SENDER)
        client.command('RCPT TO:<%s>' % A)
        client.command('DATA')
        client.send(b'Subject: x\r\n\r\n' + b'x' * 200000)
        client.close()
        self.submit(sender=SENDER)

        self.assertSpooled(0)
        self.assertEqual(set(), self.proxy.spool.drafts)


if __name__ == '__main__':
    unittest.main()
