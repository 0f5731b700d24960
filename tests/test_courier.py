"""Advice, Sign-in and Courier: one account's way out, against servers that
follow a script. The protocol of a delivery is in test_delivery.py, what
becomes of a mail that could not be delivered in test_relay.py."""
import base64
import re
import ssl
import unittest
from unittest import mock

import smtpproxy
import smtps
from tests.case import A, B, SENDER, FolderCase
from tests.fakes import (
    CERTIFICATE, DROP, EXTENSIONS, Clock, FakePOP, FakeSMTP, server_tls,
    wait_until)

C = 'c@example.org'
USER, PASSWORD = 'me', 'geheim%%'
USERS = {USER: PASSWORD}
LOGIN = {'smtpusername': USER, 'smtppassword': PASSWORD}
TRUST = {'tlscafile': CERTIFICATE}
HELLO = b'Subject: test\r\n\r\nhello\r\n'


def said(outcome):
    """All that a report or an exception says."""
    return str(outcome) + str(vars(outcome))


def drop_after(reply):
    """An action: closes right behind this reply."""
    def action(conversation):
        conversation.say(reply)
        raise ConnectionError('dropped')
    return action


class CourierCase(FolderCase):
    """A spool, a courier and no relay; self.clock is the courier's time."""

    def setUp(self):
        super().setUp()
        self.clock = Clock()
        self.spool = smtpproxy.Spool(self.path('msgs'))
        self.spool.open()
        self.addCleanup(self.spool.close)
        self.servers = []

    def serve(self, server):
        self.servers.append(server)
        self.addCleanup(server.close)
        return server

    def smtp(self, script=None, **options):
        return self.serve(FakeSMTP(script, **options))

    def mail(self, content=HELLO, to=(A,), sender=SENDER, **parameters):
        """A Mail as it lies in the spool."""
        draft = self.spool.draft(sender, list(to), parameters)
        draft.write((b'\r\n' + content).replace(b'\r\n.', b'\r\n..')[2:])
        draft.seal()
        draft.commit()
        return self.spool.load(draft.id)

    def courier(self, server, config=None, **keys):
        """The courier of an account at a server; keys: of the ini."""
        keys = dict({'smtphost': server.host, 'smtpport': server.port,
                     'localhostname': 'box.home.lan'}, **keys)
        config = smtpproxy.Config(**dict({'waitafterpop': 0}, **config or {}))
        account = smtpproxy.Account(**keys)
        return self.another(smtpproxy.SignIn(
            account, self.clock, self.clock.sleep), config)

    def another(self, sign_in, config):
        """A courier that shares what its account asks for."""
        courier = smtpproxy.Courier(sign_in.account, sign_in, config)
        self.addCleanup(courier.close)
        return courier

    def deliver(self, courier, mail=None, following=lambda: None):
        """What comes of it: the report, or why the account can't be used."""
        try:
            return courier.deliver(mail or self.mail(), courier.account,
                                   following)
        except smtpproxy.AccountUnavailable as trouble:
            return trouble

    def assertSent(self, report, *to):
        """All is well: these have it, nobody else is left."""
        self.assertIsInstance(report, smtps.Report, report)
        self.assertEqual((sorted(to or (A,)), {}, {}, []), (
            sorted(report.sent), report.later, report.never, report.open))
        for server in self.servers:
            self.assertEqual([], server.violations)

    def assertUnavailable(self, trouble, *words):
        """The account can't be used now, and the reason names all these."""
        self.assertIsInstance(trouble, smtpproxy.AccountUnavailable)
        for word in words:
            self.assertIn(word, str(trouble))

    def verbs(self, server):
        return [line.split()[0].upper() for line in server.commands]


class ByPOP(CourierCase):

    def pop(self, **options):
        return self.serve(FakePOP(users=USERS, clock=self.clock, **options))

    def keys(self, pop, **keys):
        return dict({'popbeforesmtp': True, 'pophost': pop.host,
                     'popport': pop.port, 'popssl': bool(pop.tls),
                     'popusername': USER, 'poppassword': PASSWORD,
                     'tlscafile': CERTIFICATE}, **keys)

    def test_the_login_comes_before_the_mail_plain_or_ssl(self):
        for tls in None, server_tls():
            with self.subTest(tls=tls):
                pop, smtp = self.pop(tls=tls), self.smtp()

                report = self.deliver(self.courier(smtp, **self.keys(pop)))

                self.assertSent(report)
                self.assertEqual(['USER', 'PASS', 'QUIT'], self.verbs(pop))
                self.assertEqual([(USER, 1000.0)], pop.logins)

    def test_it_waits_between_login_and_smtp(self):
        pop, smtp, connections = self.pop(), self.smtp(), []
        self.clock.sleep = lambda seconds: connections.append(
            (seconds, len(pop.logins), smtp.connections))
        courier = self.courier(smtp, {'waitafterpop': 5}, **self.keys(pop))

        self.deliver(courier)

        self.assertEqual([(5, 1, 0)], connections)

    def test_a_login_is_good_for_popcheckdelay(self):
        pop, smtp = self.pop(), self.smtp()
        courier = self.courier(smtp, **self.keys(pop, popcheckdelay=60))
        for seconds, logins, connections in (
                (0, 1, 1), (59, 1, 1), (1, 2, 2), (30, 2, 2), (200, 3, 3)):
            with self.subTest(seconds=seconds):
                self.clock.advance(seconds)

                self.assertSent(self.deliver(courier))

                self.assertEqual((logins, connections),
                                 (len(pop.logins), smtp.connections))

    def test_two_connections_share_one_login(self):
        pop, smtp = self.pop(), self.smtp()
        first = self.courier(smtp, **self.keys(pop))
        second = self.another(first.sign_in, first.config)

        for courier in first, second:
            self.assertSent(self.deliver(courier))

        self.assertEqual((1, 2), (len(pop.logins), smtp.connections))

    def test_without_a_login_no_smtp_is_tried(self):
        smtp = self.smtp()
        for script, word in (({'': '-ERR go away'}, 'go away'),
                             ({'USER': '-ERR who?'}, 'who?'),
                             ({'PASS': '-ERR [AUTH] no'}, '[AUTH] no'),
                             ({'PASS': DROP}, 'POP login'),
                             ({'': DROP}, 'POP login')):
            with self.subTest(script=script):
                pop = self.pop(script=script)

                report = self.deliver(self.courier(smtp, **self.keys(pop)))

                self.assertUnavailable(report, 'POP login', pop.host, word)
        self.assertEqual(0, smtp.connections)

    def test_a_failed_login_is_tried_again_with_the_next_mail(self):
        pop, smtp = self.pop(script={'PASS': ['-ERR locked', None]}), (
            self.smtp())
        courier = self.courier(smtp, **self.keys(pop))

        self.assertUnavailable(self.deliver(courier), 'locked')
        self.assertSent(self.deliver(courier))

    def test_a_lost_reply_to_quit_costs_nothing(self):
        """The login counts as soon as PASS was answered +OK."""
        pop, smtp = self.pop(script={'QUIT': DROP}), self.smtp()

        report = self.deliver(self.courier(smtp, **self.keys(pop)))

        self.assertSent(report)

    def test_pop_over_ssl_is_verified(self):
        pop, smtp = self.pop(tls=server_tls()), self.smtp()

        report = self.deliver(self.courier(
            smtp, **self.keys(pop, tlscafile='')))

        self.assertUnavailable(report, 'POP login', 'certificate', 'tlscafile')
        self.assertEqual([], pop.logins)


class Secured(CourierCase):

    KINDS = (('tls', False), ('ssl', True))

    def secured(self, security='tls', old=False, keys=TRUST, **options):
        """A server with TLS, and the report of a mail sent there."""
        smtp = self.smtp(tls=server_tls(old), implicit=security == 'ssl',
                         **options)
        courier = self.courier(smtp, smtpsecurity=security, **keys)
        return smtp, self.deliver(courier)

    def test_starttls_and_implicit_tls_deliver(self):
        for security, implicit in self.KINDS:
            with self.subTest(security):
                smtp, report = self.secured(security)

                self.assertSent(report)
                self.assertIn('TLSv1', smtp.mails[0].tls)
                self.assertEqual('box.home.lan', smtp.mails[0].hello)
                self.assertEqual(not implicit,
                                 'STARTTLS' in self.verbs(smtp))

    def test_a_bad_certificate_stops_the_mail_and_says_what_to_do(self):
        other = {'host': '127.0.0.2'}
        for keys, options, words in (
                ({}, {}, ('certificate', '127.0.0.1', 'tlscafile')),
                (TRUST, other, ('certificate', '127.0.0.2', 'smtphost'))):
            for security, _ in self.KINDS:
                with self.subTest(security, words=words):
                    smtp, report = self.secured(security, False, keys,
                                                **options)

                    self.assertUnavailable(report, *words)
                    self.assertEqual([], smtp.mails)

    def test_tlsverify_false_takes_any_certificate(self):
        for keys in {}, TRUST:
            for security, _ in self.KINDS:
                with self.subTest(security, keys=keys):
                    _, report = self.secured(
                        security, False, dict(keys, tlsverify=False),
                        host='127.0.0.2')

                    self.assertSent(report)

    def test_old_tls_needs_smtpweaktls(self):
        for security, _ in self.KINDS:
            with self.subTest(security):
                _, refused = self.secured(security, True)
                smtp, report = self.secured(
                    security, True, dict(TRUST, smtpweaktls=True))

                self.assertUnavailable(refused, 'no TLS', 'smtpweaktls=true')
                self.assertSent(report)
                self.assertEqual('TLSv1', smtp.mails[0].tls)

    def test_weak_tls_is_verified_all_the_same(self):
        _, report = self.secured('ssl', True, {'smtpweaktls': True})

        self.assertUnavailable(report, 'certificate')

    def test_without_starttls_nothing_is_sent_in_plain_text(self):
        stripped = '250-fake\n250-AUTH PLAIN LOGIN\n250 SIZE 1000'
        for script in ({'EHLO': stripped}, {'EHLO': '502 5.5.1 what?'},
                       {'STARTTLS': '454 4.7.0 no'},
                       {'STARTTLS': '501 5.5.1 no'}):
            with self.subTest(script=script):
                smtp, report = self.secured(
                    keys=dict(TRUST, **LOGIN), script=script, users=USERS)

                self.assertUnavailable(report, 'STARTTLS')
                self.assertFalse({'AUTH', 'MAIL'} & set(self.verbs(smtp)))

    def test_what_came_in_clear_behind_starttls_counts_for_nothing(self):
        """Nobody in between can put a reply into the secured part."""
        smtp, report = self.secured(
            script={'STARTTLS': '220 go ahead\n250-fake\n250 AUTH EVIL'},
            keys=dict(TRUST, **LOGIN), users=USERS)

        self.assertSent(report)
        self.assertEqual(USER, smtp.mails[0].user)

    def test_tls_with_a_server_that_speaks_none_says_so(self):
        report = self.deliver(self.courier(self.smtp(), smtpsecurity='ssl'))

        self.assertUnavailable(report, 'no TLS', 'right port')

    def test_an_expired_certificate_asks_for_the_clock(self):
        """Boxes without a clock wake up in 1970."""
        error = ssl.SSLCertVerificationError(1, 'certificate has expired')
        error.verify_message = 'certificate has expired'
        error.verify_code = 10

        text = smtpproxy.explain(error, 'mail.example.org:465')

        for word in 'mail.example.org:465', 'expired', 'clock', '20':
            self.assertIn(word, text)


class SigningIn(CourierCase):

    ALL = ('CRAM-MD5', 'PLAIN', 'LOGIN')

    def test_each_mechanism_signs_in(self):
        for mechanism in self.ALL:
            for users in USERS, {USER: 'pässwörd ☃'}:
                with self.subTest(mechanism, users=users):
                    smtp = self.smtp(users=users, mechanisms=[mechanism],
                                     require_auth=True)

                    report = self.deliver(self.courier(
                        smtp, smtpusername=USER, smtppassword=users[USER]))

                    self.assertSent(report)
                    self.assertEqual(USER, smtp.mails[0].user)

    def test_the_next_mechanism_is_tried_when_one_is_refused(self):
        for refused in ('CRAM-MD5',), ('CRAM-MD5', 'PLAIN'):
            with self.subTest(refused=refused):
                smtp = self.smtp({'AUTH ' + name: '535 5.7.8 not that one'
                                  for name in refused},
                                 users=USERS, mechanisms=self.ALL)

                self.assertSent(self.deliver(self.courier(smtp, **LOGIN)))
                self.assertEqual(USER, smtp.mails[0].user)

    def test_smtpauth_forces_one_mechanism(self):
        for forced in self.ALL:
            with self.subTest(forced):
                smtp = self.smtp(users=USERS, mechanisms=self.ALL)

                report = self.deliver(self.courier(
                    smtp, smtpauth=forced.lower(), **LOGIN))

                self.assertSent(report)
                self.assertEqual([forced], [
                    line.split()[1] for line in smtp.commands
                    if line.upper().startswith('AUTH')])

    def test_a_forced_mechanism_is_not_given_up_for_another(self):
        smtp = self.smtp({'AUTH PLAIN': '504 5.5.4 no'}, users=USERS)

        report = self.deliver(self.courier(smtp, smtpauth='plain', **LOGIN))

        self.assertUnavailable(report, 'plain: 504 5.5.4 no')

    def test_without_auth_on_offer_the_mail_waits(self):
        for mechanisms, word in (((), 'none at all'),
                                 (('XOAUTH2', 'NTLM'), 'xoauth2')):
            with self.subTest(mechanisms=mechanisms):
                smtp = self.smtp(mechanisms=mechanisms)

                report = self.deliver(self.courier(smtp, **LOGIN))

                self.assertUnavailable(report, 'offers no login', word,
                                       smtp.host)
                self.assertEqual([], smtp.mails)

    def test_a_wrong_password_says_where_and_who(self):
        smtp = self.smtp(users={USER: 'other'}, mechanisms=self.ALL)

        report = self.deliver(self.courier(smtp, **LOGIN))

        self.assertUnavailable(report, smtp.host, USER, '535 5.7.8 wrong',
                           'check smtpusername and smtppassword')
        self.assertNotIn(PASSWORD, said(report))

    def test_a_refused_login_is_named_though_the_server_hangs_up(self):
        def refuse_and_drop(conversation):
            conversation.say('535 5.7.8 wrong password')
            raise ConnectionError('dropped')
        smtp = self.smtp({'AUTH PLAIN': refuse_and_drop})

        report = self.deliver(self.courier(smtp, **LOGIN))

        self.assertUnavailable(report, '535 5.7.8 wrong password')

    def test_without_a_name_or_password_there_is_no_login(self):
        for key in LOGIN:
            with self.subTest(key):
                smtp = self.smtp()
                report = self.deliver(self.courier(smtp, **{key: 'x'}))

                self.assertSent(report)
                self.assertIsNone(smtp.mails[0].user)

    def test_a_password_file_that_was_not_read_is_no_login_without_one(self):
        smtp = self.smtp()

        report = self.deliver(self.courier(
            smtp, smtpusername=USER, smtppasswordfile='/no/secret'))

        self.assertUnavailable(report, '/no/secret cannot be read')
        self.assertEqual([], smtp.mails)

    def test_a_challenge_that_is_no_base64_is_trouble(self):
        smtp = self.smtp({'AUTH': '334 !'}, mechanisms=['CRAM-MD5'])

        self.assertUnavailable(self.deliver(self.courier(smtp, **LOGIN)),
                           'login')


class Secrets(CourierCase):
    """The log may be read by anybody, at any debuglevel."""

    def secrets(self):
        text = PASSWORD.encode()
        return [PASSWORD] + [base64.b64encode(x).decode().rstrip('=') for x in
                             (text, b'\0me\0' + text)]

    def logged(self, level, *arguments, **keys):
        """All log lines, at DEBUG, of a delivery."""
        with self.assertLogs(level='DEBUG') as logs:
            courier = self.courier(*arguments, config={'debuglevel': level},
                                   **keys)
            report = self.deliver(courier)
        lines = '\n'.join(logs.output) + said(report)
        self.assertEqual([], [x for x in self.secrets() if x in lines], lines)
        return lines

    def test_the_smtp_dialogue_is_logged_without_the_login(self):
        for mechanism in SigningIn.ALL:
            for level in 1, 2:
                with self.subTest(mechanism, level=level):
                    smtp = self.smtp(users=USERS, mechanisms=[mechanism])

                    lines = self.logged(level, smtp, **LOGIN)

                    for word in 'ehlo', 'AUTH', '235', 'MAIL', 'taken':
                        self.assertIn(word, lines)

    def test_the_pop_dialogue_is_logged_without_the_password(self):
        for level in 1, 2:
            with self.subTest(level=level):
                pop = self.serve(FakePOP(users=USERS))

                lines = self.logged(
                    level, self.smtp(), popbeforesmtp=True,
                    pophost=pop.host, popport=pop.port, popssl=False,
                    popusername='me', poppassword=PASSWORD)

                for word in 'USER me', 'PASS ***', '+OK welcome':
                    self.assertIn(word, lines)

    def test_a_password_is_masked_however_short_or_strange(self):
        def echo(conversation):
            return '-ERR what is %s?' % conversation.line
        for secret in 'x', 'abc', '%%', 'pässwort', 'back\\slash', 'a b':
            users = {'me': secret}
            for script in {}, {'PASS': echo}:
                with self.subTest(secret, script=script):
                    smtp = self.smtp(users=users, mechanisms=['PLAIN'])
                    pop = self.serve(FakePOP(script, users=users))

                    lines = self.logged(
                        2, smtp, smtpusername='me',
                        smtppassword=secret, popbeforesmtp=True,
                        pophost=pop.host, popport=pop.port, popssl=False,
                        popusername='me', poppassword=secret)

                    self.assertIn('PASS ***', lines)
                    for form in secret, repr(secret.encode())[2:-1]:
                        self.assertNotRegex(
                            lines, r'(?<!\w)%s(?!\w)' % re.escape(form))

    def test_a_server_that_repeats_the_secret_does_not_give_it_away(self):
        """As in '500 command unrecognized: AUTH PLAIN ...'."""
        def echo(conversation):
            return '535 what is %s?' % conversation.line
        passwords = {'PASSWORD': '535 no line %s here' % base64.b64encode(
            PASSWORD.encode()).decode()}
        for script, mechanism in (({'AUTH': echo}, 'PLAIN'),
                                  (passwords, 'LOGIN')):
            for level in 0, 2:
                with self.subTest(mechanism, level=level):
                    smtp = self.smtp(script, mechanisms=[mechanism])

                    with self.assertLogs() as logs:
                        smtpproxy.log.info('begins')
                        report = self.deliver(self.courier(
                            smtp, config={'debuglevel': level}, **LOGIN))
                    text = ' '.join(logs.output) + said(report)
                    self.assertEqual(
                        [], [x for x in self.secrets() if x in text])

    def test_a_pop_server_that_repeats_it_does_not_either(self):
        pop = self.serve(FakePOP({'PASS': '-ERR no user with %s' % PASSWORD}))
        for level in 0, 2:
            with self.subTest(level=level), self.assertLogs() as logs:
                smtpproxy.log.info('begins')
                report = self.deliver(self.courier(
                    self.smtp(), config={'debuglevel': level},
                    popbeforesmtp=True, pophost=pop.host, popport=pop.port,
                    popssl=False, popusername='me', poppassword=PASSWORD))
            self.assertNotIn(PASSWORD, ' '.join(logs.output)
                             + said(report))


class Dressed(CourierCase):
    """What the account changes: the header's bytes, and nothing else."""

    BODY = b'\r\nFrom: in the body\r\nBcc: x\r\n\r\n.\r\n..\r\n\xff\x00end\r\n'
    RETURN, REPLY, FROM = (
        {'returnpath': 'bounce@example.org'},
        {'replyto': 'Me <me@example.org>'}, {'forcefrom': 'Box <box@isp.org>'})
    TABLE = (       # keys, header in, header out, envelope sender
        ({}, b'From: a@b\r\n', b'From: a@b\r\n', SENDER),
        ({}, b'X: 1\r\nBcc: x@y,\r\n z@y\r\nReturn-Path: <q@r>\r\n'
         b'resent-bcc : u@v\r\nY: 2\r\n', b'X: 1\r\nY: 2\r\n', SENDER),
        (RETURN, b'Return-Path: <q@r>\r\nX: 1\r\n',
         b'Return-Path: <bounce@example.org>\r\nX: 1\r\n',
         'bounce@example.org'),
        (REPLY, b'X: 1\r\nREPLY-TO: a,\r\n\tb\r\nReply-To: c\r\nY: 2\r\n',
         b'Reply-To: Me <me@example.org>\r\nX: 1\r\nY: 2\r\n', SENDER),
        (FROM, b'from: "Me\r\n too" <a@b>\r\nSender: a@b\r\nX: 1\r\n',
         b'From: Box <box@isp.org>\r\nX: 1\r\n', 'box@isp.org'),
        (dict(RETURN, **FROM), b'From: a@b\r\n',
         b'Return-Path: <bounce@example.org>\r\nFrom: Box <box@isp.org>\r\n',
         'bounce@example.org'),
        (dict(RETURN, **REPLY), b'X: \xe4\xff\r\nReply-To-Not: 1\r\n',
         b'Return-Path: <bounce@example.org>\r\n'
         b'Reply-To: Me <me@example.org>\r\nX: \xe4\xff\r\n'
         b'Reply-To-Not: 1\r\n', 'bounce@example.org'),
        ({}, b'', b'', SENDER))

    def test_the_header_changes_as_asked_and_the_body_never(self):
        smtp = self.smtp()
        for count, (keys, before, after, sender) in enumerate(self.TABLE):
            with self.subTest(keys=keys, before=before):
                report = self.deliver(self.courier(smtp, **keys),
                                      self.mail(before + self.BODY))

                self.assertSent(report)
                mail = smtp.wait(count + 1)[count]
                self.assertEqual(after + self.BODY, mail.data)
                self.assertEqual(sender, mail.sender)

    def test_the_same_in_a_large_mail(self):
        smtp, body = self.smtp(), self.BODY + b'0123456789abcde\n'.replace(
            b'\n', b'\r\n') * 8000
        keys, before, after, _ = self.TABLE[4]

        self.assertSent(self.deliver(self.courier(smtp, **keys),
                                     self.mail(before + body)))

        self.assertEqual(after + body, smtp.mails[0].data)

    def test_the_null_sender_stays_null(self):
        smtp = self.smtp()

        self.assertSent(self.deliver(self.courier(smtp), self.mail(sender='')))

        self.assertEqual('', smtp.mails[0].sender)


class Content(CourierCase):
    """Byte for byte, whatever the bytes."""

    def crossed(self, content, **options):
        """What arrives of content at a server with these options."""
        tls = options.get('tls')
        smtp = self.smtp(**options)
        courier = self.courier(
            smtp, smtpsecurity='ssl' if tls else 'none', **TRUST)
        report = self.deliver(courier, self.mail(content))
        self.assertSent(report)
        return smtp.mails[0].data

    def test_all_bytes_cross(self):
        every = bytes(x for x in range(256) if x not in b'\r\n')
        for name, body in (
                ('binary', every * 3 + b'\r\n'), ('empty', b''),
                ('dots', b'.\r\n..\r\n...\r\n.x\r\n\r\n.\r\n'),
                ('empty lines', b'\r\n\r\n\r\n'),
                ('a long line', b'x' * 5000 + b'\r\n'),
                ('8 bit', 'Grüße ☃\r\n'.encode())):
            for extensions in EXTENSIONS, ():
                with self.subTest(name, extensions=extensions):
                    content = b'Subject: x\r\n\r\n' + body
                    self.assertEqual(content, self.crossed(
                        content, extensions=extensions))

    def test_a_large_mail_is_streamed_with_and_without_tls(self):
        lines = b'.%06d \xe4 and so on to the end of the line\r\n'
        body = b''.join(lines % n for n in range(40000))        # 1.7 MB
        content = b'Subject: x\r\n\r\n' + body
        for options in {}, {'tls': server_tls(), 'implicit': True}, (
                {'extensions': ()}):
            with self.subTest(options=options):
                with mock.patch.object(smtpproxy.Mail, 'msg', None):
                    self.assertTrue(content == self.crossed(
                        content, **options))

    def test_sizes_around_the_borders_of_a_chunk(self):
        smtp, count = self.smtp(), 0
        courier = self.courier(smtp)
        for size in range(65536 - 200, 65536 + 30, 23):
            content = b'A: b\r\n\r\n' + b'x' * (size - 12) + b'\r\n'
            count += 1
            self.assertSent(self.deliver(courier, self.mail(content)))
            self.assertEqual(content, smtp.wait(count)[-1].data)

    def test_a_header_larger_than_a_chunk(self):
        content = b''.join(b'X-%d: %s\r\n' % (n, b'y' * 70)
                           for n in range(1500)) + b'\r\nbody\r\n'
        self.assertEqual(content, self.crossed(content))

    def test_helo_will_do(self):
        for script in {'EHLO': '502 5.5.1 what?'}, {'EHLO': '550 no'}:
            smtp = self.smtp(script)

            self.assertSent(self.deliver(self.courier(smtp)))

            self.assertEqual(['EHLO', 'HELO', 'MAIL'], self.verbs(smtp)[:3])

    def test_what_the_client_asked_for_is_asked_for_again(self):
        header = 'Subject: Grüße\r\n\r\n'.encode()
        for mail, parameters in (
                (self.mail(BODY='8BITMIME'), {'BODY': '8BITMIME'}),
                (self.mail(header, SMTPUTF8=''), {'SMTPUTF8': ''}),
                (self.mail(to=['grüße@example.org']), {'SMTPUTF8': ''}),
                (self.mail(header), {}), (self.mail(SMTPUTF8=''), {})):
            with self.subTest(to=mail.to, parameters=mail.parameters):
                smtp = self.smtp()

                self.assertSent(self.deliver(self.courier(smtp), mail),
                                *mail.to)

                self.assertEqual(parameters, smtp.mails[0].parameters)


class Connections(CourierCase):
    """Several mails, one connection."""

    def test_several_mails_go_over_one_connection(self):
        smtp = self.smtp()
        courier = self.courier(smtp)

        for _ in range(4):
            self.assertSent(self.deliver(courier))

        self.assertEqual((4, 1), (len(smtp.mails), smtp.connections))

    def test_the_next_mail_is_upcoming_in_its_own_dress(self):
        smtp = self.smtp()
        courier, second = self.courier(smtp), self.mail(to=[B])
        own = courier.account._replace(returnpath='bounce@example.org')

        self.assertSent(self.deliver(
            courier, following=lambda: (second, own)))
        self.assertEqual((second, own), courier.upcoming)
        self.assertSent(courier.deliver(second, own, lambda: None), B)

        self.assertIsNone(courier.upcoming)
        self.assertEqual([SENDER, 'bounce@example.org'],
                         [mail.sender for mail in smtp.mails])

    def test_the_next_mail_is_whole_whatever_became_of_the_first(self):
        """Its envelope is on its way already."""
        for reply in ('451 4.3.0 later', '552 5.3.4 never', '421 4.3.2 bye',
                      DROP, drop_after('250 2.0.0 taken')):
            for next_to in [B], [B, C]:
                with self.subTest(reply=reply, to=next_to):
                    smtp = self.smtp({'.': [reply, None]})
                    courier = self.courier(smtp)
                    second = self.mail(b'Subject: 2\r\n\r\nsecond\r\n',
                                       next_to)

                    self.deliver(courier, following=lambda: (
                        second, courier.account))
                    report = self.deliver(courier, second)

                    self.assertSent(report, *next_to)
                    self.assertEqual(b'Subject: 2\r\n\r\nsecond\r\n',
                                     smtp.mails[-1].data)

    def test_no_envelope_goes_ahead_of_a_pop_login(self):
        pop, smtp = self.serve(FakePOP(users=USERS)), self.smtp()
        courier = self.courier(
            smtp, popbeforesmtp=True, popssl=False, pophost=pop.host,
            popport=pop.port, popusername=USER, poppassword=PASSWORD)

        self.assertSent(self.deliver(courier, following=self.fail))

        self.assertIsNone(courier.upcoming)

    def test_a_connection_closed_meanwhile_is_opened_again(self):
        for extensions in EXTENSIONS, ():
            for last_word in None, '421 4.4.2 idle for too long':
                with self.subTest(extensions=extensions, word=last_word):
                    smtp = self.smtp(extensions=extensions)
                    courier = self.courier(smtp)
                    self.assertSent(self.deliver(courier))
                    self.hang_up(smtp, last_word)

                    self.assertSent(self.deliver(courier))

                    self.assertEqual((2, 2), (len(smtp.mails),
                                              smtp.connections))

    def hang_up(self, smtp, last_word):
        talk = smtp.talking[0]
        if last_word:
            talk.socket.sendall(last_word.encode() + b'\r\n')
        talk.socket.shutdown(2)
        wait_until(lambda: not smtp.open)

    def test_close_says_quit(self):
        smtp = self.smtp()
        courier = self.courier(smtp)
        self.deliver(courier)

        courier.close(politely=True)

        wait_until(lambda: not smtp.open)
        self.assertEqual('QUIT', self.verbs(smtp)[-1])


class Unavailable(CourierCase):
    """The account's server is in trouble, whatever the mail: nobody has got
    it, nothing is settled."""

    def nobody(self):
        """A server that has just gone."""
        server = self.smtp()
        server.close()
        return server

    def test_nobody_there_is_absence_and_all_else_is_not(self):
        for server, keys, absent in (
                (self.nobody(), {}, True),
                (self.smtp({'': '554 5.3.0 no'}), {}, False),
                (self.smtp({'EHLO': DROP}), {}, False),
                (self.smtp({'AUTH': '535 5.7.8 no'}, mechanisms=['PLAIN']),
                 LOGIN, False)):
            with self.subTest(server.script):
                trouble = self.deliver(self.courier(server, **keys))

                self.assertUnavailable(trouble, server.host)
                self.assertEqual(absent, trouble.absent)

    def test_a_look_finds_out_without_a_login(self):
        pop, smtp = self.serve(FakePOP(users=USERS)), self.smtp()
        keys = {'popbeforesmtp': True, 'pophost': pop.host,
                'popport': pop.port, 'popssl': False}

        self.courier(smtp, **keys).look()
        with self.assertRaises(smtpproxy.AccountUnavailable) as raised:
            self.courier(self.nobody(), **keys).look()

        self.assertTrue(raised.exception.absent)
        self.assertEqual((0, []), (pop.connections, smtp.commands))

    def test_a_421_to_the_sender_is_the_servers_trouble(self):
        """Else each mail would have its own."""
        for script, unavailable in (({'MAIL': '421 4.3.2 full'}, True),
                                    ({'RCPT': '421 4.3.2 full'}, False)):
            with self.subTest(script=script):
                outcome = self.deliver(self.courier(self.smtp(script)))

                self.assertEqual(unavailable, isinstance(
                    outcome, smtpproxy.AccountUnavailable))
                self.assertIn('421 4.3.2 full', said(outcome))

    def test_after_trouble_the_next_mail_is_tried_anew(self):
        smtp = self.smtp({'MAIL': ['421 4.3.2 full', None]})
        courier = self.courier(smtp)

        self.assertUnavailable(self.deliver(courier), 'full')

        self.assertFalse(courier.connected)
        self.assertSent(self.deliver(courier))
        self.assertTrue(courier.connected)

    def test_a_mail_whose_file_has_gone_is_not_the_servers_trouble(self):
        courier = self.courier(self.smtp())
        large = self.mail(b'A: b\r\n\r\n' + b'0123456789abcd\r\n' * 9000)
        self.spool.remove(large)

        report = self.deliver(courier, large)

        self.assertIn('No such file', report.later[A])
        self.assertSent(self.deliver(courier))


if __name__ == '__main__':
    unittest.main()
