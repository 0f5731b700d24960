"""--test: the way that mail would go, step by step, for its owner."""
import base64
import re
import unittest
from unittest import mock

import smtpproxy
from tests.case import A, B, OTHER, SENDER
from tests.fakes import (
    CERTIFICATE, USER, FakePOP, FakeSMTP, FakeTokenServer, server_tls)
from tests.test_commands import CommandCase

STEP = re.compile(r' *\d+ ms  (.*)')
LOGIN = {'smtpusername': 'me', 'smtppassword': 'geheim'}
TRUST = {'smtphost': 'localhost', 'tlscafile': CERTIFICATE}
POP = {'popbeforesmtp': 'true', 'pophost': 'localhost', 'popusername': 'pop',
       'poppassword': 'auchgeheim'}


class TrialCase(CommandCase):

    def steps(self, out):
        """What the lines with a time say."""
        return [match[1] for match in map(STEP.fullmatch, out.splitlines())
                if match]

    def assertSteps(self, begins, out):
        """These steps and no others, each with the begin of its line."""
        steps = self.steps(out)
        self.assertEqual(len(begins), len(steps), out)
        for begin, step in zip(begins, steps):
            self.assertTrue(step.startswith(begin), (begin, step))

    def fail_test(self, *arguments):
        """stdout of a --test that did not go well."""
        code, out, err = self.command('--test', *arguments)
        self.assertEqual((1, ''), (code, err), out)
        return out


class Steps(TrialCase):

    def test_each_step_of_a_plain_way_has_its_line(self):
        self.ini()
        port = self.upstream.port

        out = self.succeed('--test')

        self.assertSteps([
            'name: 127.0.0.1 is 127.0.0.1',
            'connect: 127.0.0.1 port %d' % port, 'greeting: fake ESMTP',
            'EHLO: it offers PIPELINING, 8BITMIME, SIZE 100000000, ',
            'login: none, smtpusername and smtppassword are not both '
            'set'], out)
        self.assertTrue(out.startswith('[%s]: 127.0.0.1:%d\n' % (
            SENDER, port)))
        self.assertTrue(out.endswith(
            '\nall accounts work; no mail was sent\n'))

    def test_starttls_and_the_login_have_theirs(self):
        smtp = self.serve(FakeSMTP(tls=server_tls()))
        self.ini(accounts={SENDER: self.account(
            smtp, smtpsecurity='tls', **dict(TRUST, **LOGIN))})

        out = self.succeed('--test')

        self.assertSteps(['name: ', 'connect: ', 'greeting: ', 'EHLO: ',
                          'TLS: TLSv1.', 'EHLO: ', 'login: taken by plain'],
                         out)
        self.assertRegex(out, 'certificate of localhost by localhost, '
                         r'good until 20\d\d-\d\d-\d\d\n')

    def test_pop_before_smtp_has_a_way_of_its_own(self):
        pop = self.serve(FakePOP(tls=server_tls()))
        smtp = self.serve(FakeSMTP(tls=server_tls(), implicit=True))
        self.ini({'waitafterpop': 1}, {SENDER: self.account(
            smtp, smtpsecurity='ssl', popport=pop.port, **dict(TRUST, **POP)
        )})

        self.assertSteps([
            'name: localhost', 'connect: 127.0.0.1 port %d' % pop.port,
            'TLS: ', 'POP login: taken as pop', 'waitafterpop: 1 s',
            'name: localhost', 'connect: 127.0.0.1 port %d' % smtp.port,
            'TLS: ', 'greeting: ', 'EHLO: ', 'login: none'],
            self.succeed('--test'))

    def test_a_certificate_that_nobody_looks_at_is_named(self):
        smtp = self.serve(FakeSMTP(tls=server_tls(), implicit=True))
        self.ini(accounts={SENDER: self.account(
            smtp, smtpsecurity='ssl', tlsverify='false')})

        self.assertIn('not verified (tlsverify=false)',
                      self.succeed('--test'))

    def test_a_server_that_knows_only_helo_offers_nothing(self):
        self.upstream.script['EHLO'] = '502 5.5.1 what?'
        self.ini()

        self.assertIn('EHLO: it offers nothing\n', self.succeed('--test'))

    def test_a_failure_has_its_stage_its_reason_and_what_to_do(self):
        smtp = self.serve(FakeSMTP(users={}, mechanisms=('PLAIN',)))
        self.ini(accounts={SENDER: self.account(smtp, **LOGIN)})

        out = self.fail_test(SENDER)

        self.assertIn(
            'failed: login at 127.0.0.1:%d as me refused (plain: 535 5.7.8 '
            'wrong); advice: the server refuses the login: check smtpusername '
            'and smtppassword' % smtp.port, self.steps(out)[-1])
        self.assertTrue(out.endswith('\n[%s] does not work\n' % SENDER))


class ByOAuth(TrialCase):
    """An account that signs in by OAuth2."""

    def setUp(self):
        super().setUp()
        self.tokens = self.serve(FakeTokenServer())
        self.upstream.mechanisms = ['XOAUTH2']
        self.upstream.users = self.tokens.valid
        smtpproxy.TokenFile.complained.clear()
        self.ini(accounts={SENDER: self.account(
            oauth='other', oauthclientid='id', oauthscope='mail',
            oauthtokenurl=self.tokens.url('/token'),
            oauthdeviceurl=self.tokens.url('/device'), smtpusername=USER)})

    def sign_in(self):
        settings = smtpproxy.load(self.path('smtpproxy.ini'))
        grant, = smtpproxy.Grants(settings)
        smtpproxy.make_folder(grant.file.folder)
        with self.tokens.changed:
            grant.store(self.tokens.issue())
        return grant

    def test_the_state_of_the_sign_in_has_a_line(self):
        self.sign_in()

        self.assertSteps(['sign-in: signed in since 20', 'name: ',
                          'connect: ', 'greeting: ', 'EHLO: ',
                          'login: taken by xoauth2'], self.succeed('--test'))

    def test_a_token_that_is_refused_is_replaced_and_that_is_seen(self):
        self.sign_in()
        self.tokens.valid[USER] = 'another'

        steps = self.steps(self.succeed('--test'))

        self.assertIn('refused: login at ', steps[5])
        self.assertIn('another token is asked for', steps[5])
        self.assertEqual('login: taken by xoauth2', steps[-1])
        self.assertEqual(1, len(self.tokens.asked('refresh')))

    def test_who_is_not_signed_in_is_told_the_command(self):
        out = self.fail_test()

        self.assertIn('failed: no sign-in for [%s]' % SENDER, out)
        self.assertIn('--login ' + SENDER, out)
        self.assertEqual(0, self.upstream.connections)

    def test_no_token_is_shown(self):
        self.sign_in()
        self.tokens.valid[USER] = 'another'
        self.upstream.script['AUTH'] = lambda talk: '535 5.7.8 ' + talk.line

        out = self.fail_test()

        for token in self.tokens.issued:
            self.assertNotIn(token, out)
            self.assertNotIn(base64.b64encode(token.encode()).decode()[2:-4],
                             out)


class Accounts(TrialCase):

    def test_those_that_share_a_connection_are_tested_once(self):
        self.ini(accounts={SENDER: self.account(), '*@home.lan': {
            'use': SENDER}, OTHER: self.account(replyto='me@example.org')})

        out = self.succeed('--test')

        self.assertEqual(1, self.upstream.connections)
        self.assertIn('[%s], [*@home.lan], [%s]: ' % (SENDER, OTHER), out)

    def test_all_are_tested_though_one_fails(self):
        bad = self.serve(FakeSMTP({'': '554 5.3.2 go away'}))
        self.ini(accounts={SENDER: self.account(bad), OTHER: self.account()})

        out = self.fail_test()

        self.assertIn('554 5.3.2 go away', out)
        self.assertEqual(1, self.upstream.connections)
        self.assertTrue(out.endswith(
            '\nthese do not work: [%s]\n' % SENDER))

    def test_only_that_of_the_sender_is_tested(self):
        self.ini(accounts={'*@home.lan': self.account(), 'default':
                           self.account(self.serve(FakeSMTP()))})

        for sender, section in ((SENDER, '*@home.lan'), (A, 'default'),
                                ('default', 'default')):
            with self.subTest(sender):
                out = self.succeed('--test', sender)
                self.assertTrue(out.startswith('[%s]: ' % section), out)
        self.assertEqual(1, self.upstream.connections)

    def test_what_makes_no_sense_is_said_in_one_line(self):
        self.ini()

        for arguments, words in (
                ((OTHER,), 'no account for ' + OTHER),
                ((SENDER, A, B), 'takes a sender'),
                ((SENDER, 'nobody'), 'takes a sender'),
                ((SENDER, 'a@x>\r\nRSET'), 'takes a sender'),
                (('default', A), 'takes a sender')):
            with self.subTest(arguments):
                self.assertIn(words, self.fail_with('--test', *arguments))
        self.assertEqual(0, self.upstream.connections)

    def test_an_ini_without_accounts_does_not_go_well(self):
        self.ini(accounts={})

        self.assertIn('no account in', self.fail_test())


class AMail(TrialCase):

    def test_it_is_taken_and_the_reply_is_shown(self):
        self.ini()

        out = self.succeed('--test', SENDER, A)

        self.assertEqual('sent to <%s>: 250 2.0.0 taken' % A,
                         self.steps(out)[-1])
        mail = self.assertDelivered([A])
        self.assertEqual((SENDER, []), (mail.sender,
                                        self.upstream.violations))
        for field in ('Date: ', 'Message-ID: <', 'From: <%s>' % SENDER,
                      'To: <%s>' % A, 'Subject: A test of smtpproxy',
                      'MIME-Version: 1.0'):
            self.assertIn(b'\r\n' + field.encode(), b'\r\n' + mail.data)

    def test_it_is_dressed_as_every_mail_of_its_account(self):
        self.ini(accounts={SENDER: self.account(
            replyto='me@example.org', forcefrom='box@example.org')})

        self.succeed('--test', SENDER, A)

        mail = self.assertDelivered([A])
        self.assertEqual('box@example.org', mail.sender)
        self.assertIn(b'Reply-To: me@example.org\r\n', mail.data)
        self.assertNotIn(b'From: <%s>' % SENDER.encode(), mail.data)

    def test_an_address_with_umlauts_goes_as_it_is(self):
        self.ini()

        self.succeed('--test', SENDER, 'grüße@example.org')

        self.assertIn('To: <grüße@example.org>'.encode(),
                      self.assertDelivered(['grüße@example.org']).data)

    def test_a_refusal_is_shown(self):
        self.upstream.script['RCPT'] = '550 5.1.1 nobody here'
        self.ini()

        self.assertEqual(
            'failed: 127.0.0.1:%d said 550 5.1.1 nobody here for <%s>' % (
                self.upstream.port, A),
            self.steps(self.fail_test(SENDER, A))[-1])

    def test_none_is_sent_without_a_recipient(self):
        self.ini()

        self.succeed('--test')
        self.succeed('--test', SENDER)

        self.assertFalse([line for line in self.upstream.commands
                          if line.startswith('MAIL')])


class WhatItLeavesAlone(TrialCase):

    def test_the_service_and_the_mail_that_waits(self):
        self.waiting(config={'sleeptime': 600})
        with open(self.path('msgs', self.spooled()[0]), 'rb') as file:
            before = file.read()

        self.succeed('--test', SENDER, A)

        with open(self.path('msgs', self.spooled()[0]), 'rb') as file:
            self.assertEqual(before, file.read())
        self.assertDelivered([A], 2)
        self.submit(to=(A,))
        self.assertDelivered([A], 3)

    def test_nothing_is_made_where_no_service_has_been(self):
        self.ini()

        self.succeed('--test')

        self.assertEqual([], self.spooled())
        self.assertEqual('', self.log())

    def test_no_secret_is_shown_though_a_server_repeats_it(self):
        secret, other = LOGIN['smtppassword'], POP['poppassword']
        pop = self.serve(FakePOP({'PASS': '+OK your %s is fine' % other}))
        self.upstream.script.update({
            '': '220 hello, %s' % secret, 'EHLO': '250-me\n250 X %s' % secret,
            'AUTH': '535 5.7.8 %s is wrong' % secret})
        self.ini({'debuglevel': 2}, {SENDER: self.account(
            smtpauth='plain', popport=pop.port, popssl='false',
            **dict(LOGIN, **POP))})

        out = self.fail_test()

        self.assertIn('  log: smtp ', out)
        self.assertIn('*** is wrong', out)
        self.assertNotIn(secret, out)
        self.assertNotIn(other, out)

    def test_a_terminal_finds_nothing_to_obey(self):
        self.upstream.script.update({
            '': '220 \x1b[2Jhello', 'EHLO': '250-me\n250 X-\x1b]0;x\x07'})
        self.ini()

        self.assertTrue(self.succeed('--test').replace('\n', '')
                        .isprintable())

    def test_a_reader_that_leaves_is_no_fault_of_the_server(self):
        self.ini()
        settings = smtpproxy.load(self.path('smtpproxy.ini'))
        trial = smtpproxy.Trial(settings, settings.account_for(SENDER),
                                mock.Mock(side_effect=BrokenPipeError))
        self.addCleanup(trial.close)

        self.assertTrue(trial.connect())


if __name__ == '__main__':
    unittest.main()
