"""Advice, Sign-in and Courier: one account's way out, against servers that
follow a script. The protocol of a delivery is in test_delivery.py, what
becomes of a mail that could not be delivered in test_relay.py."""
import base64
import email
import re
import socket
import ssl
import unittest
from email.header import decode_header, make_header
from unittest import mock

import smtpproxy
import smtps
from tests.case import A, B, SENDER, FolderCase
from tests.fakes import (
    CERTIFICATE, DROP, ENDLESS_LINE, EXTENSIONS, HANG, Clock, FakePOP,
    FakeSMTP, server_tls, wait_until)

C = 'c@example.org'
USER, PASSWORD = 'me', 'geheim%%'
USERS = {USER: PASSWORD}
LOGIN = {'smtpusername': USER, 'smtppassword': PASSWORD}
TRUST = {'tlscafile': CERTIFICATE}
HELLO = b'Subject: test\r\n\r\nhello\r\n'


def ENDLESS_LIST(conversation):
    """An answer of many lines, for as long as the client takes it."""
    conversation.say('+OK')
    ENDLESS_LINE(conversation, b'WORD\r\n' * 4096)


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
        return self.another(smtpproxy.SignIn(account, self.clock), config)

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
        pop, smtp = self.pop(), self.smtp()
        courier = self.courier(smtp, {'waitafterpop': 5}, **self.keys(pop))

        for seconds in 0, 4.5:
            self.clock.advance(seconds)
            pending = self.deliver(courier)
            self.assertEqual(1005, pending.until)
            self.assertEqual((1, 0), (len(pop.logins), smtp.connections))

        self.clock.advance(0.5)
        self.assertSent(self.deliver(courier))

    def test_a_login_that_ends_before_its_wait_is_used_all_the_same(self):
        pop, smtp = self.pop(), self.smtp()
        courier = self.courier(smtp, {'waitafterpop': 50},
                               **self.keys(pop, popcheckdelay=0))
        for count in 1, 2:
            with self.subTest(count):
                self.assertIsInstance(self.deliver(courier),
                                      smtpproxy.PopPending)
                self.clock.advance(50)

                self.assertSent(self.deliver(courier))

                self.assertEqual(count, len(pop.logins))

    def test_the_first_login_is_due_soon_after_the_box_was_started(self):
        """Its clock counts from there, and popcheckdelay may be a day."""
        self.clock.now = 3.0
        pop, smtp = self.pop(), self.smtp()

        report = self.deliver(self.courier(
            smtp, **self.keys(pop, popcheckdelay=86400)))

        self.assertSent(report)
        self.assertEqual(1, len(pop.logins))

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

    def test_who_wants_no_login_yet_knows_us_by_the_one_before(self):
        for reply in ('-ERR [LOGIN-DELAY] minimum time between logins is 900',
                      '-ERR login limit exceeded', '-ERR too many logins'):
            with self.subTest(reply):
                pop, smtp = self.pop(script={'PASS': [None, reply]}), (
                    self.smtp())
                courier = self.courier(smtp, **self.keys(pop))
                for seconds, tries in ((0, 1), (60, 2), (59, 2), (1, 3)):
                    self.clock.advance(seconds)

                    self.assertSent(self.deliver(courier))

                    self.assertEqual(tries, pop.connections)

    def test_but_not_if_there_was_none_or_mail_was_refused_behind_it(self):
        delay = '-ERR [LOGIN-DELAY] later'
        smtp = self.smtp({'RCPT': '550 5.7.1 POP first'})
        first = self.courier(smtp, **self.keys(self.pop(
            script={'PASS': delay})))
        second = self.courier(smtp, **self.keys(self.pop(
            script={'PASS': [None, delay]})))

        self.assertUnavailable(self.deliver(first), 'LOGIN-DELAY')
        self.assertTrue(self.wants_login(second))
        self.assertUnavailable(self.deliver(second), 'LOGIN-DELAY')

    def test_only_a_refusal_that_may_be_of_that_wants_a_new_login(self):
        for stage, reply, unproven, proven in (
                ('RCPT', '550 5.7.1 Relaying denied', True, True),
                ('RCPT', '554 5.7.1 authenticate with POP first', True, True),
                ('RCPT', '550 5.1.1 relay access denied', True, True),
                ('MAIL', '530 Login first', True, True),
                ('RCPT', '550 5.7.1 not today', True, False),
                ('RCPT', '550 no such user', True, False),
                ('RCPT', '550 5.1.1 no such user <login@x>', False, False),
                ('RCPT', '550 5.1.1 <b@x>: Recipient address rejected: User '
                 'unknown in relay recipient table', False, False),
                ('RCPT', '550 5.2.1 a popular mailbox', False, False),
                ('MAIL', '552 5.3.4 too big', False, False),
                ('DATA', '554 5.7.1 Relaying denied', False, False),
                ('.', '554 5.7.1 Relaying denied', False, False)):
            with self.subTest(stage + reply):
                courier = self.courier(self.smtp({stage: [
                    reply, None, reply]}), **self.keys(self.pop()))

                self.assertEqual([unproven, False, proven], [
                    self.wants_login(courier) for _ in range(3)])

    def wants_login(self, courier):
        """What becomes of the next mail."""
        mail = self.mail()
        report = self.deliver(courier, mail)
        if isinstance(report, smtpproxy.PopPending):
            self.clock.advance(5)
            report = self.deliver(courier, mail)
        return courier.wants_pop_login(mail, report)

    def test_two_connections_that_are_refused_share_a_new_login(self):
        pop, smtp = self.pop(), self.smtp({'RCPT': '550 5.7.1 POP first'})
        first = self.courier(smtp, **self.keys(pop))
        second = self.another(first.sign_in, first.config)
        mails = [(one, self.mail()) for one in (first, second)]

        reports = [self.deliver(*one) for one in mails]
        for (courier, mail), report in zip(mails, reports):
            self.assertTrue(courier.wants_pop_login(mail, report))
            self.assertIsInstance(self.deliver(courier, mail),
                                  smtpproxy.PopPending)

        self.assertEqual(2, len(pop.logins))

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

    def test_popssl_tls_encrypts_before_the_password(self):
        """With Dovecot's default there is no other login on port 110."""
        pop, smtp = self.pop(tls=server_tls(), implicit=False), self.smtp()

        report = self.deliver(self.courier(
            smtp, **self.keys(pop, popssl='tls')))

        self.assertSent(report)
        self.assertEqual(['CAPA', 'STLS', 'USER', 'PASS', 'QUIT'],
                         self.verbs(pop))

    def test_popssl_tls_shows_no_password_without_tls(self):
        smtp, listed = self.smtp(), '+OK\nUSER\nSTLS\n.'
        for script, tls, keys, word in (
                ({}, None, {}, 'popport=995'),
                ({'CAPA': '-ERR what?'}, None, {}, 'plain text'),
                ({'CAPA': listed, 'STLS': '-ERR no'}, None, {}, 'no'),
                ({}, server_tls(), {'tlscafile': ''}, 'certificate')):
            with self.subTest(word):
                pop = self.pop(script=script, tls=tls, implicit=False)

                report = self.deliver(self.courier(
                    smtp, **self.keys(pop, popssl='tls', **keys)))

                self.assertUnavailable(report, 'POP login', word)
                self.assertNotIn('PASS', self.verbs(pop))

    def test_a_list_without_end_ends(self):
        pop = self.pop(script={'CAPA': ENDLESS_LIST})

        report = self.deliver(self.courier(
            self.smtp(), **self.keys(pop, popssl='tls')))

        self.assertUnavailable(report, 'the reply does not end')


V4, V6 = '127.0.0.1', '::1'


def name_server(names):
    """socket.getaddrinfo for names: {name: its addresses, best first}."""
    real = socket.getaddrinfo

    def look_up(host, port, family=0, *more, **options):
        found = [entry for address in names.get(host, [host])
                 for entry in real(address, port, 0, *more, **options)
                 if family in (0, entry[0])]
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, 'no such address')
        return found
    return mock.patch('socket.getaddrinfo', look_up)


class IPVersions(CourierCase):
    """pop.test and smtp.test have servers at 127.0.0.1 and ::1, at one port.
    What pop and smtp hold for each is the fake that listens there."""

    def setUp(self):
        super().setUp()
        try:
            self.pop = self.both(FakePOP, users=USERS, clock=self.clock)
            self.smtp = self.both(FakeSMTP)
        except OSError as error:
            self.skipTest('no IPv6 on this box: %s' % error)
        self.names = {'pop.test': [V6, V4], 'smtp.test': [V6, V4]}
        names = name_server(self.names)
        names.start()
        self.addCleanup(names.stop)

    def both(self, kind, **options):
        """{address: a fake there}, at one port."""
        first = self.serve(kind(host=V6, **options))
        return {V6: first, V4: self.serve(kind(
            host=V4, port=first.port, **options))}

    def way(self, config=None, **keys):
        """A courier that logs in by POP."""
        return self.courier(self.smtp[V4], config, **dict({
            'smtphost': 'smtp.test', 'popbeforesmtp': True, 'popssl': False,
            'pophost': 'pop.test', 'popport': self.pop[V4].port,
            'popusername': USER, 'poppassword': PASSWORD}, **keys))

    def logins(self):
        """How many there were over IPv6, over IPv4."""
        return len(self.pop[V6].logins), len(self.pop[V4].logins)

    def sent(self):
        return len(self.smtp[V6].mails), len(self.smtp[V4].mails)

    def test_ipversion_is_that_of_smtp(self):
        for version, sent in (('any', (1, 0)), ('6', (2, 0)), ('4', (2, 1))):
            with self.subTest(version):
                report = self.deliver(self.way(
                    popbeforesmtp=False, ipversion=version))

                self.assertSent(report)
                self.assertEqual(sent, self.sent())

    def test_and_of_pop(self):
        for version, logins in (('6', (1, 0)), ('4', (1, 1))):
            with self.subTest(version):
                self.assertSent(self.deliver(self.way(ipversion=version)))
                self.assertEqual(logins, self.logins())
                self.assertEqual(logins, self.sent())

    def test_a_name_without_such_an_address_is_named_with_the_key(self):
        self.names.update({'pop.test': [V6], 'smtp.test': [V6]})
        for pop in True, False:
            with self.subTest(popbeforesmtp=pop):
                trouble = self.deliver(self.way(
                    ipversion='4', popbeforesmtp=pop))

                self.assertUnavailable(trouble, '.test', 'ipversion=4')

    def test_the_provider_sees_one_address_of_ours(self):
        """Else it opens the door for the wrong one."""
        for pop, smtp, way in (([V6, V4], [V6, V4], (1, 0)),
                               ([V6, V4], [V4], (1, 1)),
                               ([V4], [V6, V4], (1, 2)),
                               ([V4, V6], [V6, V4], (2, 2))):
            with self.subTest(pop=pop, smtp=smtp):
                self.names.update({'pop.test': pop, 'smtp.test': smtp})

                self.assertSent(self.deliver(self.way()))

                self.assertEqual((way, way), (self.logins(), self.sent()))

    def test_without_a_version_in_common_each_has_its_own(self):
        self.names.update({'pop.test': [V6], 'smtp.test': [V4]})

        self.assertSent(self.deliver(self.way()))

        self.assertEqual(((1, 0), (0, 1)), (self.logins(), self.sent()))

    def test_pop_that_is_away_in_one_goes_the_other_way_with_smtp(self):
        self.pop[V6].close()

        self.assertSent(self.deliver(self.way()))

        self.assertEqual(((0, 1), (0, 1)), (self.logins(), self.sent()))

    def test_smtp_in_the_other_needs_a_login_there(self):
        away = self.smtp[V6]
        for trouble in (lambda: away.script.update({'': '554 5.7.1 no DNS'}),
                        away.close):
            with self.subTest(trouble):
                trouble()
                courier = self.way({'waitafterpop': 5}, popcheckdelay=30)
                before = self.logins()[1]

                for _ in range(2):
                    self.assertIsInstance(self.deliver(courier),
                                          smtpproxy.PopPending)
                    self.clock.advance(5)

                self.assertSent(self.deliver(courier))
                self.assertEqual(before + 1, self.logins()[1])

    def test_that_way_is_kept(self):
        self.smtp[V6].close()
        courier = self.way(popcheckdelay=30)

        for _ in range(4):
            self.assertSent(self.deliver(courier))
            self.clock.advance(30)

        self.assertEqual((1, 4), self.logins())

    def test_where_nobody_takes_mail_each_way_costs_one_login(self):
        for server in self.smtp.values():
            server.close()

        trouble = self.deliver(self.way())

        self.assertUnavailable(trouble, 'smtp.test')
        self.assertTrue(trouble.absent)
        self.assertEqual((1, 1), self.logins())

    def test_a_way_without_pop_is_no_other_way(self):
        self.smtp[V6].close()
        self.pop[V4].close()

        trouble = self.deliver(self.way())

        self.assertUnavailable(trouble, 'connect', 'smtp.test')
        self.assertEqual((2, 0), self.logins())

    def test_too_soon_for_a_login_there_is_too_soon(self):
        self.smtp[V6].close()
        self.pop[V4].script['PASS'] = '-ERR [LOGIN-DELAY] 900'

        trouble = self.deliver(self.way())

        self.assertUnavailable(trouble, 'LOGIN-DELAY')


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

    def test_one_that_was_refused_is_not_tried_first_again(self):
        """Failed logins feed fail2ban."""
        smtp = self.smtp({'AUTH CRAM-MD5': '535 5.7.8 not that one'},
                         users=USERS, mechanisms=self.ALL)
        first = self.courier(smtp, **LOGIN)
        self.assertSent(self.deliver(first))

        for _ in range(2):
            self.assertSent(self.deliver(
                self.another(first.sign_in, first.config)))

        self.assertEqual(['CRAM-MD5', 'PLAIN', 'PLAIN', 'PLAIN'], [
            line.split()[1] for line in smtp.commands
            if line.startswith('AUTH')])

    def test_the_last_one_that_was_taken_may_be_refused_one_day(self):
        smtp = self.smtp(users=USERS, mechanisms=['PLAIN'])
        first = self.courier(smtp, **LOGIN)
        self.assertSent(self.deliver(first))
        smtp.mechanisms = ['PLAIN', 'LOGIN']
        smtp.script['AUTH PLAIN'] = '535 5.7.8 not that one'

        self.assertSent(self.deliver(
            self.another(first.sign_in, first.config)))

    def test_plain_goes_in_two_steps_where_one_is_too_much(self):
        """RFC 4954 4: 334 asks for what some servers do not take at once."""
        def ask_for_it(conversation):
            conversation.say('334 ')
            answer = base64.b64decode(conversation.read_text()).decode()
            right = answer == '\0%s\0%s' % (USER, PASSWORD)
            return '235 ok' if right else '535 no'
        smtp = self.smtp({'AUTH PLAIN': ask_for_it})

        self.assertSent(self.deliver(self.courier(smtp, **LOGIN)))

        self.assertEqual('', smtp.mails[0].user)

    def test_the_old_form_of_the_offer_counts(self):
        """AUTH=PLAIN, from before RFC 2554."""
        for offers in ['AUTH=LOGIN PLAIN'], ['AUTH=PLAIN', 'AUTH NTLM']:
            smtp = self.smtp(users=USERS, extensions=offers, mechanisms=())
            smtp.script['AUTH'] = '235 2.7.0 ok'
            with self.subTest(offers), mock.patch.object(
                    FakeSMTP.TALK, 'do_AUTH', FakeSMTP.TALK.simple):
                self.assertSent(self.deliver(self.courier(smtp, **LOGIN)))

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

    def test_what_comes_behind_a_refusal_does_not_hide_it(self):
        wrong = '535 5.7.8 Username and Password not accepted'
        for script, word in (
                ({'PLAIN': '535 5.7.139 basic authentication is disabled',
                  'LOGIN': DROP}, 'oauth=microsoft'),
                ({'PLAIN': wrong, 'LOGIN': '504 5.7.4 Unrecognized'},
                 'myaccount.google.com'),
                ({'PLAIN': '504 5.7.4 Unrecognized', 'LOGIN': wrong},
                 'myaccount.google.com'),
                ({'PLAIN': wrong, 'LOGIN': '421 4.7.0 Too many errors'},
                 'myaccount.google.com'),
                ({'PLAIN': '535 no', 'LOGIN': '454 too many login attempts'},
                 'app password'),
                ({'PLAIN': '454 Temporary authentication failure',
                  'LOGIN': '504 5.7.4 Unrecognized'}, 'this passes'),
                ({'PLAIN': '454 Temporary authentication failure',
                  'LOGIN': '432 later'}, 'this passes')):
            with self.subTest(script):
                smtp = self.smtp({'AUTH ' + name: reply
                                  for name, reply in script.items()},
                                 mechanisms=['PLAIN', 'LOGIN'])

                report = self.deliver(self.courier(smtp, **LOGIN))

                self.assertUnavailable(report, script['PLAIN'],
                                       '; advice: ', word)

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


class OurName(CourierCase):
    """In EHLO. RFC 5321 4.1.4: a full name, or else the address."""

    def test_a_box_without_a_full_name_gives_its_address(self):
        for host, key, name in (('vm', '', '[127.0.0.1]'),
                                ('vm.home.lan', '', 'vm.home.lan'),
                                ('vm', 'box', 'box')):
            with self.subTest(host=host, localhostname=key):
                smtp = self.smtp()

                with mock.patch.object(smtpproxy, 'HOST', host):
                    self.assertSent(self.deliver(self.courier(
                        smtp, localhostname=key)))

                self.assertEqual(name, smtp.mails[0].hello)

    def test_addresses_have_their_form(self):
        for address, name in (('192.0.2.1', '[192.0.2.1]'),
                              ('2001:db8::1', '[IPv6:2001:db8::1]'),
                              ('fe80::1%eth0', '[IPv6:fe80::1]')):
            self.assertEqual(name, smtps.address_literal(address))

    def test_a_refused_name_says_what_to_do(self):
        for reply in ('504 5.5.2 <vm>: Helo command rejected: need '
                      'fully-qualified hostname', '501 Syntactically invalid '
                      'EHLO argument(s)', '550 Invalid HELO name'):
            self.assertUnavailable(self.deliver(self.courier(self.smtp(
                {'EHLO': reply, 'HELO': reply}))), 'set localhostname')
        for reply in ('504 5.5.2 <a>: Sender address rejected: need '
                      'fully-qualified address', '503 EHLO first', '550 no'):
            self.assertEqual('', smtpproxy.name_advice(reply))


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
    ONCE = (        # header in, header out
        (b'From: a@b\r\nX: 1\r\nFROM: c@d\r\nSubject : s\r\n t\r\nX: 1\r\n'
         b'subject: u\r\n', b'From: a@b\r\nX: 1\r\nSubject : s\r\n t\r\n'
         b'X: 1\r\n'),
        (b'Date: 1\r\nDate: 2\r\nMessage-ID: <1>\r\nMessage-Id: <2>\r\n'
         b'Sender: a@b\r\nSender: c@d\r\nReply-To: a\r\nReply-To: b\r\n',
         b'Date: 1\r\nMessage-ID: <1>\r\nSender: a@b\r\nReply-To: a\r\n'),
        (b'To: a@b,\r\n\tc@d\r\nCC: e@f\r\nto: g@h,\r\ncc:\r\nTo: i@j\r\n',
         b'To: a@b,\r\n\tc@d,\r\n\tg@h,\r\n\ti@j\r\nCC: e@f\r\n'),
        (b'To:\r\nTo: Me <a@b>\r\n', b'To: Me <a@b>\r\n'),
        (b'Received: 1\r\nReceived: 1\r\nResent-To: a\r\nResent-To: b\r\n',
         b'Received: 1\r\nReceived: 1\r\nResent-To: a\r\nResent-To: b\r\n'),
        (b'DKIM-Signature: v=1\r\nTo: a\r\nTo: b\r\nFrom: c\r\nFrom: d\r\n',
         b'DKIM-Signature: v=1\r\nTo: a\r\nTo: b\r\nFrom: c\r\nFrom: d\r\n'))

    def test_of_what_there_may_be_one_the_first_is_sent(self):
        """RFC 5322 3.6; Gmail: 550 5.7.1 multiple 'From' headers."""
        smtp = self.smtp()
        courier = self.courier(smtp)
        for before, after in self.ONCE:
            with self.subTest(before), self.assertLogs() as logs:
                smtpproxy.log.info('begins')
                self.assertSent(self.deliver(
                    courier, self.mail(before + b'\r\nTo: x\r\nTo: y\r\n')))

                self.assertEqual(after + b'\r\nTo: x\r\nTo: y\r\n',
                                 smtp.mails[-1].data)
                self.assertEqual(before != after, len(logs.output) == 2)

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

    def test_a_name_with_letters_beyond_ascii_is_encoded(self):
        """RFC 2047."""
        for name in ('Büro', 'Büro, Süd', 'Büro ' * 30 + 'x', '☃ "am" Tor'):
            for value in name, '"%s"' % name.replace('"', '\\"'):
                smtp, value = self.smtp(), value + ' <me@example.org>'
                with self.subTest(value):
                    self.assertSent(self.deliver(self.courier(
                        smtp, forcefrom=value, replyto=value)))

                    data = smtp.mails[0].data
                    self.assertTrue(data.isascii())
                    self.assertLess(max(map(len, data.splitlines())), 79)
                    message = email.message_from_bytes(data)
                    for field in 'From', 'Reply-To':
                        self.assertEqual(
                            name + ' <me@example.org>', str(make_header(
                                decode_header(message[field]))))

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

                self.assertEqual(
                    dict(parameters, SIZE='%d' % len(smtp.mails[0].data)),
                    smtp.mails[0].parameters)

    def test_a_recipient_who_is_named_twice_gets_the_mail_once(self):
        """One verdict each: 250 and 550 for the same one would park what has
        arrived."""
        smtp = self.smtp({'RCPT TO:<a@': ['250 2.1.5 ok', '550 5.5.0 again']})

        report = self.deliver(self.courier(smtp), self.mail(to=[A, B, A]))

        self.assertSent(report, A, B)
        self.assertEqual([A, B], smtp.mails[0].to)


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


def swallow(conversation):
    """An action: what came together with this command is lost."""
    conversation.socket.settimeout(0)
    lost = conversation.file.peek()
    conversation.socket.settimeout(None)
    conversation.file.read(len(lost))
    return '250 2.0.0 ok' if conversation.line != '.' else None


class OneCommandOfAPacket(CourierCase):
    """PIPELINING is offered, and what comes together is lost. Virus scanners
    between us and the server do so."""

    def setUp(self):
        super().setUp()
        for name in 'REPLY_TIME', 'DOT_TIME':
            patch = mock.patch.object(smtps, name, .2)
            patch.start()
            self.addCleanup(patch.stop)

    def test_the_next_connections_send_one_command_at_a_time(self):
        smtp = self.smtp({'MAIL': swallow})
        courier = self.courier(smtp, {'deleteonerror': False})

        with self.assertLogs(level='INFO') as logs:
            report = self.deliver(courier)
        self.assertIn('does not answer in time', report.later[A])
        for _ in range(2):
            self.assertSent(self.deliver(self.another(
                courier.sign_in, courier.config)))

        self.assertEqual(3, smtp.connections)
        self.assertIn('PIPELINING', logs.output[0])

    def test_no_mail_is_deleted_for_it(self):
        """deleteonerror=true: there is no later try."""
        smtp = self.smtp({'MAIL': swallow})

        self.assertSent(self.deliver(self.courier(
            smtp, {'deleteonerror': True})))

        self.assertEqual(2, smtp.connections)

    def test_a_server_that_hangs_up_after_the_silence_is_one(self):
        def lose_patience(conversation):
            conversation.pause(.15)
            return DROP
        courier = self.courier(self.smtp({'MAIL': [lose_patience, None]}))

        self.assertSent(self.deliver(courier))

        self.assertFalse(courier.sign_in.trusts_pipelining())

    def test_a_connection_that_breaks_at_once_is_no_sign(self):
        smtp = self.smtp({'MAIL': DROP})
        courier = self.courier(smtp)

        with mock.patch.object(smtps, 'REPLY_TIME', 30):
            self.deliver(courier)

        self.assertEqual(1, smtp.connections)
        self.assertTrue(courier.sign_in.trusts_pipelining())

    def test_so_does_the_next_if_its_envelope_is_lost_behind_the_dot(self):
        smtp = self.smtp({'.': swallow})
        courier, second = self.courier(smtp), self.mail(to=[B])

        self.assertSent(self.deliver(
            courier, following=lambda: (second, courier.account)))
        self.assertSent(self.deliver(courier, second), B)

        self.assertEqual(2, smtp.connections)
        self.assertFalse(courier.sign_in.trusts_pipelining())

    def test_a_day_later_the_server_is_trusted_again(self):
        courier = self.courier(self.smtp({'MAIL': [swallow, None]}))
        self.deliver(courier)

        for seconds, trusted in (86399, False), (1, True):
            self.clock.advance(seconds)
            self.assertEqual(trusted, courier.sign_in.trusts_pipelining())

    def test_a_server_that_is_silent_anyway_is_trusted_again(self):
        smtp = self.smtp({'MAIL': HANG})
        courier = self.courier(smtp)

        report = self.deliver(courier)

        self.assertIn('does not answer in time', report.later[A])
        self.assertEqual(2, smtp.connections)
        self.assertTrue(courier.sign_in.trusts_pipelining())

    def test_silence_behind_the_final_dot_is_no_sign(self):
        """Nothing else was in flight. A second copy is not tried for."""
        for extensions in EXTENSIONS, ():
            smtp = self.smtp({'.': HANG}, extensions=extensions)
            courier = self.courier(smtp)

            self.assertIn('in time', self.deliver(courier).later[A])

            self.assertEqual(1, smtp.connections)
            self.assertTrue(courier.sign_in.trusts_pipelining())


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
                (self.nobody(), {}, 'connect'),
                (self.smtp(), self.by_pop(self.nobody()), 'pop'),
                (self.smtp(), self.by_pop(self.serve(FakePOP({'': DROP}))),
                 ''),
                (self.smtp({'': '554 5.3.0 no'}), {}, ''),
                (self.smtp({'EHLO': DROP}), {}, ''),
                (self.smtp({'AUTH': '535 5.7.8 no'}, mechanisms=['PLAIN']),
                 LOGIN, '')):
            with self.subTest(server.script):
                trouble = self.deliver(self.courier(server, **keys))

                self.assertUnavailable(trouble, server.host)
                self.assertEqual(absent, trouble.absent)

    def by_pop(self, pop):
        return {'popbeforesmtp': True, 'pophost': pop.host,
                'popport': pop.port, 'popssl': False}

    def test_a_look_finds_out_without_a_login(self):
        pop, smtp = self.serve(FakePOP(users=USERS)), self.smtp()
        keys = self.by_pop(pop)

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

    def test_a_421_later_on_is_a_reply_to_the_mail(self):
        for stage in 'RCPT', 'DATA':
            with self.subTest(stage):
                courier = self.courier(self.smtp({stage: '421 4.3.2 full'}))

                report = self.deliver(courier, self.mail(to=(A, B)))

                self.assertEqual(dict.fromkeys((A, B), '421 4.3.2 full'),
                                 report.later)
                self.assertEqual(dict.fromkeys((A, B), stage.lower()),
                                 report.stages)
                self.assertFalse(courier.connected)

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
