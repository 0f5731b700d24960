"""Signing in by OAuth2: the token server's moods, the file that must not be
lost, one renewal at a time, and the three ways in which a person signs in."""
import base64
import contextlib
import errno
import functools
import io
import json
import logging
import os
import pwd
import socket
import subprocess
import sys
import threading
import time
import unittest
import urllib.request
from unittest import mock

import smtpproxy
import smtps
from smtpproxy import SignInNeeded, TokenDenied, TokenServerAway
from tests.case import FolderCase, OTHER, SENDER
from tests.fakes import (CERTIFICATE, Clock, DROP, FakeProxy, FakeSMTP,
                         FakeTokenServer, HANG, RESET, USER, dribble, http,
                         server_tls, wait_until)
from tests.test_alerts import lines_of
from tests.test_relay import RelayCase

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NOW = 1800000000                # seconds; some day in 2027
WEEK = 7 * 86400


class SignInCase(FolderCase):
    """self.tokens: the token server; self.grant: signed in there."""

    def setUp(self):
        super().setUp()
        self.clock, self.wall = Clock(), Clock(NOW)
        self.tokens = self.serve(FakeTokenServer())
        smtpproxy.TokenFile.complained.clear()
        self.listen_to_the_log()

    def serve(self, server):
        self.addCleanup(server.close)
        return server

    def listen_to_the_log(self):
        handler = logging.FileHandler(self.path('smtpproxy.log'))
        handler.setFormatter(logging.Formatter('%(levelname)s %(message)s'))
        root = logging.getLogger()
        level, old, root.handlers[:] = root.level, root.handlers[:], [handler]
        root.setLevel(logging.DEBUG)
        self.addCleanup(root.handlers.__setitem__, slice(None), old)
        self.addCleanup(root.setLevel, level)
        self.addCleanup(handler.close)

    def ini(self, more='', section=SENDER):
        keys = dict(oauth='other', oauthclientid='id', smtphost='127.0.0.1',
                    smtpusername='me@example.org', oauthscope='mail',
                    oauthtokenurl=self.tokens.url('/token'),
                    oauthdeviceurl=self.tokens.url('/device'),
                    oauthauthurl=self.tokens.url('/authorize?x=y'))
        text = ''.join('%s=%s\n' % pair for pair in keys.items())
        return self.write(
            'smtpproxy.ini', '[config]\nport=0\nmsgdir=msgs\n[%s]\n%s%s' % (
                section, text, more))

    def grants(self, more=''):
        return smtpproxy.Grants(smtpproxy.load(self.ini(more)), self.clock,
                                self.wall)

    def make(self, more=''):
        """A Grant, as a program that just begins has it."""
        return next(iter(self.grants(more)))

    def signed_in(self, more=''):
        """The same with tokens on disk whose access token has run out."""
        grant = self.make(more)
        with self.tokens.changed:
            grant.store(self.tokens.issue())
        self.later(4000)
        return self.make(more)

    def later(self, seconds):
        self.clock.advance(seconds)
        self.wall.advance(seconds)

    def stored(self):
        """The tokens on disk."""
        with open(self.file(), encoding='utf-8') as file:
            return json.load(file)['tokens']

    def content(self):
        with open(self.file(), 'rb') as file:
            return file.read()

    def file(self):
        names = [n for n in os.listdir(self.path('tokens'))
                 if n.endswith('.json')]
        return self.path('tokens', names[0])

    def errors(self):
        return self.log().count('ERROR')


class Strings(unittest.TestCase):

    def test_what_the_mail_server_is_told(self):
        account = smtpproxy.Account(smtpusername='a,b=c@d', smtphost='mx',
                                    smtpport=587)

        self.assertEqual('user=a,b=c@d\1auth=Bearer T\1\1',
                         smtpproxy.xoauth2(account, 'T'))
        self.assertEqual(
            'n,a=a=2Cb=3Dc@d,\1host=mx\1port=587\1auth=Bearer T\1\1',
            smtpproxy.oauthbearer(account, 'T'))


AWAY, NEEDED = TokenServerAway, SignInNeeded
GOOD = {'access_token': 'new', 'refresh_token': 'next'}
CUT = http(200, GOOD)[:-9]
MOODS = [       # what it does, what we get, state, requests of 2 tries, words
    (None, None, 'signed in', 1, ''),
    (http(200, dict(GOOD, expires_in='3600')), None, 'signed in', 1, ''),
    (http(200, dict(GOOD, expires_in=None)), None, 'signed in', 1, ''),
    (http(201, dict(GOOD, more=[1])), None, 'signed in', 1, ''),
    ('invalid_request', NEEDED, 'needed', 1, 'invalid_request'),
    ('invalid_client AADSTS7000222 x', NEEDED, 'needed', 1, 'AADSTS7000222'),
    ('invalid_grant', NEEDED, 'needed', 1, 'ended or was withdrawn'),
    ('unauthorized_client', NEEDED, 'needed', 1, 'app registration'),
    ('unsupported_grant_type', NEEDED, 'needed', 1, 'oauthflow'),
    ('invalid_scope', NEEDED, 'needed', 1, 'oauthscope'),
    ('interaction_required', NEEDED, 'needed', 1, 'see you'),
    (http(200, {'error': 'access_denied'}), NEEDED, 'needed', 1, 'declined'),
    (http(403, {'error': 'odd\r\nword'}), NEEDED, 'needed', 1, 'odd word'),
    ('temporarily_unavailable', AWAY, 'away', 2, 'no time'),
    ('server_error', AWAY, 'away', 2, 'no time'),
    (429, AWAY, 'away', 2, '429'),
    (http(429, {'error': 'invalid_grant'}), AWAY, 'away', 2, 'no time'),
    (http(429, b'', 'Retry-After: 90\r\n'), AWAY, 'away', 1, '429'),
    (500, AWAY, 'away', 2, '500'),
    (http(503, {'error': 'invalid_client'}), AWAY, 'away', 2, 'no time'),
    (http(503, GOOD), AWAY, 'away', 2, '503'),
    (http(503, b'', 'Retry-After: Fri, 15 Jan 2100 08:00:00 GMT\r\n'),
     AWAY, 'away', 1, '503'),
    (200, AWAY, 'away', 2, 'login page'),
    (404, AWAY, 'away', 2, 'address wrong'),
    (http(302, b'', 'Location: http://127.0.0.1:1/\r\n'), AWAY, 'away', 2,
     '302'),
    (http(307, {'error': 'invalid_grant'}), AWAY, 'away', 2, '307'),
    (http(200, []), AWAY, 'away', 2, 'nothing that we understand'),
    (http(200, {}), AWAY, 'away', 2, 'nothing that we understand'),
    (http(200, {'access_token': 3}), AWAY, 'away', 2, 'nothing'),
    (http(200, {'access_token': 'a\1b'}), AWAY, 'away', 2, 'nothing'),
    (http(400, {'error': {'code': 400}}), AWAY, 'away', 2, 'nothing'),
    (http(200, b'[' * 60000), AWAY, 'away', 2, 'nothing'),
    (http(200, b'{"access_token": "\xff"}'), AWAY, 'away', 2, 'nothing'),
    (http(200, dict(GOOD, x='x' * 65536)), AWAY, 'away', 2, 'nothing'),
    (b'HTTP/1.1 200 x\r\n\r\n' + b'x' * 300000, AWAY, 'away', 2, 'nothing'),
    (CUT, AWAY, 'away', 2, 'nothing'),
    (b'HTTP/1.1 200 x\r\nA: ' + b'x' * 70000, AWAY, 'away', 2, ''),
    (b'SSH-2.0-x\r\n', AWAY, 'away', 2, 'SSH'),
    (b'', AWAY, 'away', 2, 'closed'),
    (DROP, AWAY, 'away', 2, ''), (RESET, AWAY, 'away', 2, ''),
    (HANG, AWAY, 'away', 2, 'in time'),
    (dribble(http(200, GOOD), 0.02), AWAY, 'away', 2, 'in time')]


class Moods(SignInCase):

    def play(self, mood):
        """What two tries, 10 s apart, get: an exception or None, the words
        of the first."""
        self.tokens.script['refresh'] = mood
        grant, caught = self.signed_in(), []
        for _ in range(2):
            try:
                grant.access_token()
                caught.append((None, ''))
            except (TokenServerAway, SignInNeeded) as error:
                caught.append((type(error), str(error)))
            self.later(10)
        self.assertEqual(caught[0][0], caught[1][0])
        return grant, caught[0]

    def test_each_mood_of_the_token_server(self):
        for mood, kind, state, requests, words in MOODS:
            with self.subTest(str(mood)[:60]), mock.patch(
                    'smtpproxy.TOKEN_TIME', 0.25 if kind else 5):
                before = self.errors()
                del self.tokens.requests[:]
                grant, (found, text) = self.play(mood)

                self.assertIs(kind, found, text)
                self.assertEqual(state, grant.state().name)
                self.assertEqual(requests, len(self.tokens.requests))
                self.assertIn(words, text + grant.state().text)
                self.assertEqual(kind is NEEDED, self.errors() - before)
                self.assertEqual('access-%d' % self.tokens.count if (
                    kind) else grant.access_token(),
                    self.stored()['access'])

    def test_nobody_there_is_told_apart(self):
        grant = self.signed_in()
        self.tokens.close()

        with self.assertRaises(TokenServerAway) as caught:
            grant.access_token()

        self.assertTrue(caught.exception.absent)

    def test_a_box_that_lacks_a_part_of_python_deletes_no_mail(self):
        with mock.patch.dict(sys.modules, {'http.client': None}):
            self.assertRaisesRegex(AWAY, 'http.client is missing',
                                   self.signed_in().access_token)

    def test_it_is_asked_again_when_it_wants_to(self):
        self.tokens.script['refresh'] = [
            http(429, b'', 'Retry-After: 90\r\n'), None]
        grant = self.signed_in()
        for seconds in 0, 50, 39:
            self.later(seconds)
            self.assertRaises(TokenServerAway, grant.access_token)

        self.later(1)

        self.assertEqual('access-2', grant.access_token())

    def test_its_words_show_nothing_that_it_was_told(self):
        self.tokens.script['refresh'] = 'invalid_grant what is refresh-1 here?'
        grant = self.signed_in()

        with self.assertRaises(SignInNeeded) as caught:
            grant.access_token()

        self.assertIn('what is *** here', caught.exception.reason)
        self.assertNotIn('refresh-1', self.log() + str(caught.exception))

    def test_nor_does_its_error_which_may_be_long(self):
        for status in 429, 502, 400:
            with self.subTest(status):
                grant = self.signed_in()
                self.tokens.script['refresh'] = http(status, {
                    'error': 'odd: grant_type=refresh_token&refresh_token=%s '
                             '\x1b[31m%s' % (self.stored()['refresh'],
                                             99 * 'z')})

                with self.assertRaises((AWAY, NEEDED)) as caught:
                    grant.access_token()

                self.assertIn('refresh_token=***', str(caught.exception))
                self.assertNotRegex(self.log() + str(caught.exception),
                                    r'refresh-\d|\x1b|z{40}')

    def test_nor_a_piece_of_it(self):
        secret = 'M.C512_BAY.0.U.-Cv*K1x7!dGhpcyBpcyBhIHNlY3JldA$$' * 4
        grant = self.make()
        grant.store({'access_token': 'x', 'refresh_token': secret,
                     'expires_in': 0})
        self.later(1)
        self.tokens.script['refresh'] = (
            'invalid_grant token "%s..." of %s is expired (AADSTS70008)'
            % (secret[:60], urllib.parse.quote(secret)[40:90]))

        with self.assertRaises(NEEDED) as caught:
            grant.access_token()

        self.assertIn('token "***" of *** is expired (AADSTS70008)',
                      caught.exception.reason)

    def test_one_of_many_addresses_that_leads_nowhere_costs_seconds(self):
        full = self.full_listener()
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, '', address)
                 for address in (full, full, self.tokens.address)]
        grant = self.signed_in()

        with mock.patch('socket.getaddrinfo', return_value=found), mock.patch(
                'smtps.ADDRESS_TIME', 0.1):
            self.assertEqual('access-2', grant.access_token())

    def full_listener(self):
        """The address of one that takes no connection and says nothing."""
        listener = socket.socket()
        self.addCleanup(listener.close)
        listener.bind(('127.0.0.1', 0))
        listener.listen(0)
        for _ in range(3):
            waiting = socket.socket()
            self.addCleanup(waiting.close)
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        return listener.getsockname()

    def test_each_family_has_its_turn_early(self):
        six = [(socket.AF_INET6, 1, 6, '', ('::1', n, 0, 0)) for n in (1, 2)]
        four = [(socket.AF_INET, 1, 6, '', self.tokens.address)]
        tried = []

        class Socket(socket.socket):
            def connect(self, address):
                tried.append(self.family)
                super().connect(address)

        with mock.patch('socket.getaddrinfo', return_value=six + four), (
                mock.patch('socket.socket', Socket)):
            smtps.connect('x', 1, 9).close()

        self.assertEqual([socket.AF_INET6, socket.AF_INET], tried)


class OverTLS(SignInCase):

    def setUp(self):
        super().setUp()
        self.tokens = self.serve(FakeTokenServer(
            tls=server_tls(), implicit=True))
        self.addCleanup(smtpproxy.smtps.client_context.cache_clear)

    def test_its_certificate_is_always_verified(self):
        for more in '', 'tlsverify=false\n':
            with self.subTest(more), self.assertRaises(
                    TokenServerAway) as caught:
                self.signed_in(more).access_token()
            self.assertIn('certificate of localhost', str(caught.exception))
            self.assertEqual([], self.tokens.requests)

    def test_a_ca_of_the_owner_counts(self):
        grant = self.signed_in('tlscafile=%s\n' % CERTIFICATE)

        self.assertEqual('access-2', grant.access_token())

    def test_silence_in_the_middle_of_the_handshake_ends(self):
        silent = socket.create_server(('127.0.0.1', 0))
        self.addCleanup(silent.close)
        grant = self.signed_in('tlscafile=%s\n' % CERTIFICATE)
        grant.account = grant.account._replace(
            oauthtokenurl='https://localhost:%d/' % silent.getsockname()[1])

        with mock.patch('smtpproxy.TOKEN_TIME', 0.3), self.assertRaises(
                TokenServerAway) as caught:
            grant.access_token()

        self.assertIn('in time', str(caught.exception))

    def test_a_proxy_is_used_unless_it_must_not_be(self):
        proxy = self.serve(FakeProxy(self.tokens.address))
        grant = self.signed_in('tlscafile=%s\n' % CERTIFICATE)
        url = 'http://me:p%%40ss@127.0.0.1:%d' % proxy.port

        for no, count in ('', 1), ('localhost', 0):
            with self.subTest(no), mock.patch.dict('os.environ', {
                    'https_proxy': url, 'no_proxy': no}):
                del proxy.commands[:]
                grant.access_token()
                self.assertEqual(count, len(proxy.commands))
            self.later(4000)
        self.assertEqual([base64.b64encode(b'me:p@ss').decode()], [
            line.split()[-1] for line in proxy.logins[0]])

    def test_a_proxy_that_is_none_is_named(self):
        grant = self.signed_in('tlscafile=%s\n' % CERTIFICATE)

        with mock.patch.dict('os.environ', {'HTTPS_PROXY': 'http://:x'}):
            with self.assertRaises(TokenServerAway) as caught:
                grant.access_token()

        self.assertIn('HTTPS_PROXY', str(caught.exception))


class Renewal(SignInCase):

    def test_a_token_is_used_until_ten_minutes_before_its_end(self):
        grant = self.signed_in()
        first = grant.access_token()

        self.later(3000)
        self.assertEqual(first, grant.access_token())
        self.later(1)

        self.assertEqual('access-3', grant.access_token())
        self.assertEqual(2, len(self.tokens.requests))

    def test_the_scope_goes_along_and_a_secret_only_if_there_is_one(self):
        self.signed_in().access_token()
        self.tokens.clients['id'] = 'hush'
        self.signed_in('oauthclientsecret=hush\n').access_token()

        one, two = [request.form for request in self.tokens.requests]
        self.assertEqual({'client_id': 'id', 'grant_type': 'refresh_token',
                          'refresh_token': 'refresh-1', 'scope': 'mail'}, one)
        self.assertEqual('hush', two['client_secret'])

    def test_never_more_is_asked_for_than_was_granted(self):
        for provider, granted, wanted in (
                ('other', 'x mail', 'mail'), ('other', None, 'mail more'),
                ('other', 'x', 'mail more'), ('google', 'mail', 'mail more'),
                ('microsoft', 'mail', 'mail more')):
            with self.subTest(provider, granted=granted):
                grant = self.make()
                grant.store(dict(self.tokens.issue(), scope=granted))
                grant.account = grant.account._replace(
                    oauth=provider, oauthscope='mail more')
                self.later(4000)
                grant.access_token()
                self.assertEqual(wanted,
                                 self.tokens.requests[-1].form['scope'])

    def test_a_new_refresh_token_replaces_the_old_one(self):
        grant = self.signed_in()

        for _ in range(3):
            grant.access_token()
            self.later(4000)

        self.assertEqual(0, self.tokens.reused)
        self.assertEqual('refresh-4', self.stored()['refresh'])

    def test_without_a_new_one_the_old_one_stays(self):
        self.tokens.rotate = False
        grant = self.signed_in()

        grant.access_token()

        self.assertEqual(('access-2', 'refresh-1'), (
            self.stored()['access'], self.stored()['refresh']))

    def test_a_token_with_a_short_life_is_used_all_the_same(self):
        self.tokens.expires = 300
        grant = self.signed_in()

        self.assertEqual('access-2', grant.access_token())
        self.later(1)

        self.assertEqual('access-3', grant.access_token())

    def test_a_refused_token_is_renewed_once(self):
        grant = self.signed_in()
        first = grant.access_token()
        self.later(1)

        second = grant.access_token(refused=first)
        self.later(1)

        self.assertEqual('access-3', second)
        self.assertEqual(second, grant.access_token(refused=first))
        self.assertEqual(second, grant.access_token())
        self.assertEqual(2, len(self.tokens.requests))

    def test_a_restart_goes_on_with_the_token_that_is_stored(self):
        self.signed_in().access_token()
        self.later(2000)

        self.assertEqual('access-2', self.make().access_token())

    def test_a_clock_that_is_not_set_counts_for_nothing(self):
        for wall, what in ((0, 'before 2025'), (NOW - 9, 'below the file')):
            with self.subTest(what):
                self.signed_in().access_token()
                self.wall.now = wall
                again = self.make()

                first = again.access_token()

                self.assertEqual(first, 'access-%d' % self.tokens.count)
                self.later(2000)
                self.assertEqual(first, again.access_token())
                self.wall.now = NOW

    def test_a_clock_that_jumps_ahead_ends_a_token(self):
        grant = self.signed_in()
        grant.access_token()
        self.later(1)

        self.wall.advance(5000)

        self.assertEqual('access-3', grant.access_token())

    def test_a_dead_sign_in_costs_nothing_until_it_changes(self):
        self.tokens.script['refresh'] = ['invalid_grant', None]
        grant = self.signed_in()
        for _ in range(5):
            self.assertRaises(SignInNeeded, grant.access_token)
            self.later(100)
        self.assertEqual((1, 1), (len(self.tokens.requests), self.errors()))

        self.make().store(self.tokens.issue())

        self.assertEqual('access-2', grant.access_token())
        self.assertEqual('signed in', grant.state().name)

    def test_the_owner_may_ask_for_another_try(self):
        self.tokens.script['refresh'] = ['invalid_grant', None]
        grants = self.grants()
        grant = next(iter(grants))
        self.signed_in()
        self.assertRaises(SignInNeeded, grant.access_token)

        grants.reload(smtpproxy.load(self.path('smtpproxy.ini')))

        self.assertEqual('access-2', grant.access_token())

    def test_who_is_not_signed_in_is_told_what_to_do(self):
        grant = self.make()

        self.assertRaisesRegex(SignInNeeded, 'not signed in: --login '
                               + SENDER, grant.access_token)
        self.assertRaises(SignInNeeded, grant.access_token)

        self.assertEqual('not signed in', grant.state().name)
        self.assertEqual(1, self.errors())
        self.assertEqual([], self.tokens.requests)

    def test_a_sign_in_without_refresh_token_ends(self):
        self.make().store({'access_token': 'x'})

        self.assertEqual('x', self.make().access_token())
        self.later(4000)

        self.assertRaisesRegex(SignInNeeded, 'without a refresh token',
                               self.make().access_token)

    def test_without_refresh_token_a_token_is_used_to_its_end(self):
        self.make().store({'access_token': 'x', 'expires_in': 300})

        self.assertEqual('x', self.make().access_token())
        self.later(299)
        self.assertEqual('x', self.make().access_token())
        self.later(1)

        self.assertRaises(SignInNeeded, self.make().access_token)

    def test_an_app_signs_in_by_itself(self):
        self.tokens.clients['id'] = 'hush'
        app = self.make('oauthflow=app\noauthclientsecret=hush\n')

        self.assertEqual('access-1', app.access_token())
        self.later(3100)
        self.assertEqual('access-2', app.access_token())

        self.assertEqual(2, len(self.tokens.asked('app')))

    def test_seven_days_at_google_have_a_known_reason(self):
        self.tokens.script['refresh'] = 'invalid_grant'
        grant = self.signed_in()
        grant.account = grant.account._replace(oauth='google')
        self.later(WEEK - 4000)

        self.assertRaisesRegex(SignInNeeded, 'Testing', grant.access_token)

    def test_the_mail_of_all_sections_with_one_sign_in_shares_it(self):
        path = self.ini('[c@d]\nuse=%s\n' % SENDER)
        settings = smtpproxy.load(path)
        grants = smtpproxy.Grants(settings)

        one, two = [grants.of(a) for a in settings.accounts.values()]

        self.assertIs(one, two)


class Idle(SignInCase):

    def settle(self, grant):
        """A round of the relay, and its thread."""
        grant.renew_if_idle()
        wait_until(lambda: not any(t.name.startswith('sign-in-')
                                   for t in threading.enumerate()))

    def test_after_a_week_without_mail_it_is_renewed(self):
        grant = self.signed_in()

        self.later(WEEK - 4001)
        self.settle(grant)
        self.assertEqual(0, len(self.tokens.requests))
        self.later(1)
        self.settle(grant)

        self.assertEqual('refresh-2', self.stored()['refresh'])
        self.settle(grant)
        self.assertEqual(1, len(self.tokens.requests))

    def test_without_a_clock_the_time_that_it_runs_counts(self):
        self.wall.now = 0
        grant = self.signed_in()
        grant.state()

        self.clock.advance(WEEK)
        self.settle(grant)

        self.assertEqual('refresh-2', self.stored()['refresh'])

    def test_a_clock_that_was_ahead_does_not_put_it_off(self):
        """A box that is started daily has no other clock to go by."""
        self.wall.now = NOW + 40 * 86400
        self.signed_in()
        self.wall.now = NOW

        for _ in range(8):
            self.settle(self.make())
            self.later(86400)

        self.assertEqual(2, len(self.tokens.requests))

    def test_a_server_that_is_away_is_asked_each_hour(self):
        self.tokens.script['refresh'] = 503
        grant = self.signed_in()
        self.later(WEEK)

        for _ in range(4):
            self.settle(grant)
            self.later(1000)
        self.settle(grant)

        self.assertEqual(2, len(self.tokens.requests))

    def test_that_it_is_away_is_said_daily_and_by_check(self):
        self.tokens.script['refresh'] = [503] * 26 + [None]
        grant = self.signed_in()
        self.later(WEEK)

        for _ in range(26):
            self.settle(grant)
            self.later(3600)

        self.assertEqual(26, len(self.tokens.requests))
        self.assertEqual(2, self.log().count('WARNING'))
        self.assertLogged('WARNING', SENDER, '503')
        self.assertIn('has no time: 503', self.make().state().text)
        self.settle(grant)
        self.assertEqual('signed in', self.make().state().name)

    def test_the_owner_is_reminded_daily(self):
        self.tokens.script['refresh'] = 'invalid_grant'
        grant = self.signed_in()
        self.assertRaises(SignInNeeded, grant.access_token)

        for _ in range(4):
            self.settle(grant)
            self.later(43200)

        self.assertEqual(2, self.errors())
        self.assertEqual(1, len(self.tokens.requests))

    def test_who_has_not_signed_in_is_told_daily_mail_or_not(self):
        grant = self.make()

        for _ in range(4):
            self.settle(grant)
            self.later(43200)

        self.assertEqual((2, []), (self.errors(), self.tokens.requests))
        self.assertLogged('ERROR', SENDER, 'not signed in', '--login')
        self.assertEqual('not signed in', grant.person_needed())
        self.signed_in()
        self.settle(grant)
        self.assertEqual('', grant.person_needed())

    def test_a_new_file_and_none_are_seen(self):
        grant = self.make()
        self.settle(grant)
        self.assertEqual('not signed in', grant.state().name)
        self.signed_in()
        self.settle(grant)
        self.assertEqual('signed in', grant.state().name)

        self.make().forget()
        self.settle(grant)

        self.assertEqual('not signed in', grant.state().name)


class File(SignInCase):

    def test_only_its_user_can_read_it(self):
        os.umask(os.umask(0o022))
        self.signed_in()

        self.assertEqual(0o700, os.stat(self.path('tokens')).st_mode & 0o777)
        for name in os.listdir(self.path('tokens')):
            self.assertEqual(0o600, os.stat(
                self.path('tokens', name)).st_mode & 0o777)

    def test_what_is_damaged_or_not_ours_counts_as_none_and_stays(self):
        self.signed_in()
        good = self.content()
        for bad in (b'', good[:-9], b'[]', b'{"for": 3}', b'\xff' * 99,
                    good.replace(b'me@', b'you@'), b'[' * 99999,
                    good.replace(b'"refresh-1"', b'7'),
                    good.replace(b'"access"', b'"axess"')):
            with self.subTest(bad[:30]):
                with open(self.file(), 'wb') as file:
                    file.write(bad)
                grant = self.make()

                self.assertRaisesRegex(SignInNeeded, 'cannot be read',
                                       grant.access_token)
                self.assertEqual('not signed in', grant.state().name)
                self.assertEqual(bad, self.content())
        self.make().store(self.tokens.issue())
        self.assertEqual('signed in', self.make().state().name)

    def test_what_the_system_refuses_for_a_moment_is_read_again(self):
        self.signed_in()
        grant = self.make()
        with mock.patch.object(smtpproxy.TokenFile, 'read',
                               side_effect=OSError(errno.EMFILE, 'Too many')):
            self.assertRaisesRegex(SignInNeeded, 'Too many',
                                   grant.access_token)

        self.assertEqual('access-2', grant.access_token())

    def test_a_disk_that_cannot_be_read_costs_one_request_and_one_line(self):
        self.tokens.clients['id'] = 'hush'
        keys = 'oauthflow=app\noauthclientsecret=hush\n'
        self.make(keys).access_token()
        app, broken = self.make(keys), mock.patch.object(
            smtpproxy.TokenFile, 'read', side_effect=OSError(errno.EIO, 'I/O'))
        with broken:
            self.assertEqual('access-2', app.access_token())
        self.assertEqual(2, len(self.tokens.requests))

        self.signed_in()
        grant = self.make()
        with broken:
            for _ in range(10):
                grant.renew_if_idle()
        self.assertEqual(1, self.errors())

    def test_a_link_is_not_followed(self):
        self.signed_in()
        os.rename(self.file(), self.path('elsewhere'))
        path = self.make().file.path
        for target in self.path('elsewhere'), '/dev/zero':
            os.symlink(target, path)
            self.assertRaises(SignInNeeded, self.make().access_token)
            os.unlink(path)
        os.mkfifo(path)
        self.assertRaises(SignInNeeded, self.make().access_token)

    def test_a_disk_that_refuses_loses_nothing_while_we_run(self):
        grant = self.signed_in()
        with mock.patch('os.rename', side_effect=OSError(28, 'disk full')):
            self.assertEqual('access-2', grant.access_token())
            self.later(4000)
            self.assertEqual('access-3', grant.access_token())
            Idle.settle(self, grant)
        self.assertEqual(2, self.errors())
        self.assertEqual('refresh-1', self.stored()['refresh'])

        Idle.settle(self, grant)

        self.assertEqual('refresh-3', self.stored()['refresh'])
        self.assertEqual(0, self.tokens.reused)

    def test_a_disk_that_is_away_for_a_while_ends_nothing(self):
        grant = self.signed_in()
        first = grant.access_token()

        os.rename(self.path('tokens'), self.path('away'))
        self.assertEqual(first, grant.access_token())
        os.rename(self.path('away'), self.path('tokens'))

        self.assertEqual(first, grant.access_token())

    def test_a_file_system_without_locks_is_named_once(self):
        grant = self.signed_in()
        with mock.patch('fcntl.flock', side_effect=OSError(95, 'no locks')):
            for _ in range(3):
                grant.access_token()
                self.later(4000)

        self.assertEqual(1, self.log().count('without a lock: [Errno 95]'))

    def test_a_lock_that_is_refused_is_held_by_another(self):
        self.signed_in()
        with mock.patch('smtpproxy.LOCK_TIME', 0.1):
            for code in errno.EAGAIN, errno.EACCES:
                with self.subTest(errno.errorcode[code]), mock.patch(
                        'fcntl.flock', side_effect=OSError(code, 'held')):
                    self.assertRaisesRegex(AWAY, 'another process',
                                           self.make().access_token)

        self.assertEqual([], self.tokens.requests)

    @contextlib.contextmanager
    def read_only(self):
        """Inside, nothing can be written to the folder of sign-ins."""
        error = OSError(errno.EROFS, 'Read-only file system')

        def refuse(real, path, *more):
            if str(path).startswith(self.path('tokens')) and (
                    real is not os_open or more[0] & 3 != os.O_RDONLY):
                raise error
            return real(path, *more)
        os_open = os.open
        with contextlib.ExitStack() as stack:
            for name in 'open', 'unlink', 'rename':
                stack.enter_context(mock.patch('os.' + name, functools.partial(
                    refuse, getattr(os, name))))
            stack.enter_context(mock.patch('smtpproxy.LOCK_TIME', 0.1))
            yield

    def test_a_read_only_disk_has_no_token_used_twice(self):
        """A command beside the service would present the refresh token on
        disk, which is spent; some servers end the sign-in then."""
        grant, command = self.signed_in(), self.make()

        with self.read_only():
            grant.access_token()
            self.assertRaises(AWAY, command.access_token)
            self.later(4000)
            grant.access_token()
            self.tokens.script['refresh'] = 503
            self.later(4000)
            self.assertRaises(AWAY, grant.access_token)
            self.assertRaises(AWAY, command.access_token)
        self.tokens.script.clear()
        Idle.settle(self, grant)

        self.assertEqual('refresh-3', self.stored()['refresh'])
        self.assertTrue(command.access_token(refused='access-3'))
        self.assertEqual(0, self.tokens.reused)

    def test_a_lock_that_cannot_be_opened_is_not_passed_by(self):
        grant = self.signed_in()
        os.unlink(grant.file.lock)
        os.symlink('elsewhere', grant.file.lock)

        self.assertRaisesRegex(AWAY, 'lock cannot be opened',
                               grant.access_token)

    def test_a_child_that_has_the_lock_open_holds_nobody_up(self):
        """A handler may fork, and its child inherits what is open."""
        real = os.open

        def inherited(path, *more):
            file = real(path, *more)
            if path.endswith('.lock'):
                self.addCleanup(os.close, os.dup(file))
            return file
        with mock.patch('os.open', inherited):
            self.signed_in().access_token()

        with mock.patch('smtpproxy.LOCK_TIME', 0.1):
            self.assertTrue(self.make().forget())

    def test_who_changes_the_file_gets_the_lock(self):
        """The service has it while the disk refuses what it has got."""
        def remove():
            os.unlink(self.file())

        def leave():
            """The disk took it, but for the folder's sync."""
        for name, change in (('smtpproxy.TokenFile._sync', leave),
                             ('os.rename', remove)):
            with self.subTest(name):
                grant = self.signed_in()
                with mock.patch(name, side_effect=OSError(5, 'I/O error')):
                    grant.access_token()

                change()
                Idle.settle(self, grant)

                with mock.patch('smtpproxy.LOCK_TIME', 0.1):
                    self.make().store(self.tokens.issue())

    def test_what_is_in_memory_only_is_stored_at_a_stop(self):
        grants = self.grants()
        self.signed_in()
        with mock.patch('os.rename', side_effect=OSError(28, 'disk full')):
            next(iter(grants)).access_token()

        grants.finish(1)

        self.assertEqual('refresh-2', self.stored()['refresh'])

    def test_without_locks_what_another_one_stored_is_taken(self):
        for reply in 'invalid_grant', http(200, GOOD):
            with self.subTest(str(reply)[:20]):
                grant = self.signed_in()
                grant.state()

                def faster(conversation):
                    self.make().store(self.tokens.issue())
                    return reply
                self.tokens.script['refresh'] = faster
                with mock.patch('fcntl.flock', side_effect=OSError(95, '')):
                    found = grant.access_token()

                self.assertEqual(('access-%d' % self.tokens.count, 0),
                                 (found, self.errors()))
                self.assertEqual(found, self.stored()['access'])

    def test_a_login_beside_us_is_never_overwritten(self):
        grant = self.signed_in()
        grant.state()
        self.make().store({'access_token': 'x', 'refresh_token': 'y',
                           'expires_in': 1})
        self.tokens.live.add('y')

        grant.access_token()

        self.assertEqual('y', self.tokens.requests[0].form['refresh_token'])

    def test_a_folder_that_cannot_be_looked_into_is_not_an_empty_one(self):
        os.symlink('tokens', self.path('tokens'))
        with self.assertRaises(OSError):
            self.make().forget()

        for make in (lambda: None, lambda: self.write('tokens', '')):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path('tokens'))
            make()
            self.assertFalse(self.make().forget())

    def test_the_lock_is_never_removed(self):
        grant = self.signed_in()

        grant.forget()

        self.assertEqual([os.path.basename(grant.file.lock)],
                         os.listdir(self.path('tokens')))


class Death(BaseException):
    """The power goes."""


class Crash(SignInCase):

    @contextlib.contextmanager
    def dying(self, last):
        """Inside, the power goes before the last-th step on disk, and nothing
        works after it."""
        steps, opened, real = [], set(), {}

        def step(name, *arguments, **options):
            steps.append(name)
            if len(steps) >= last:
                raise Death(name)
            result = real[name](*arguments, **options)
            if name == 'open':
                opened.add(result)
            elif name == 'close':
                opened.discard(arguments[0])
            return result
        with contextlib.ExitStack() as stack:
            for name in 'open', 'unlink', 'rename', 'fsync', 'close':
                real[name] = getattr(os, name)
                stack.enter_context(mock.patch(
                    'os.' + name, functools.partial(step, name)))
            with contextlib.suppress(Death):
                yield
        for file in opened:             # its locks go with a process
            with contextlib.suppress(OSError):
                os.close(file)

    def test_the_power_may_go_at_any_step(self):
        """What is left is the old sign-in, or the new one, whole; no access
        token is in use whose refresh token is not on disk."""
        for last in range(1, 40):
            grant, got = self.signed_in(), None
            old = self.stored()['refresh']
            with self.dying(last):
                got = grant.access_token()

            new = self.stored()['refresh']
            with self.subTest(last):
                self.assertIn(new, (old, 'refresh-%d' % self.tokens.count))
                if got:
                    self.assertIn(new, self.tokens.live)
                self.tokens.spent.clear()       # it may come twice now
                self.tokens.live.add(new)
                self.later(1)
                self.assertTrue(self.make().access_token(refused='none'))
                self.assertFalse([n for n in os.listdir(self.path('tokens'))
                                  if n.endswith('.new')])
            if got:
                break
        self.assertGreater(last, 6)
        self.assertTrue(got)

    def test_before_the_server_is_asked_nothing_is_lost(self):
        asked = 0
        for last in range(1, 40):
            grant = self.signed_in()
            del self.tokens.requests[:]
            with self.dying(last):
                grant.access_token()
            asked = len(self.tokens.requests)
            if asked:
                break
            self.assertIn(self.stored()['refresh'], self.tokens.live)
        self.assertEqual(1, asked)


ONE_TOKEN = '''
import sys, smtpproxy
settings = smtpproxy.load(sys.argv[1])
grant = next(iter(smtpproxy.Grants(settings, wall=lambda: %d)))
print(grant.access_token())
'''


class Processes(SignInCase):

    def begin(self):
        return subprocess.Popen(
            [sys.executable, '-c', ONE_TOKEN % self.wall(),
             self.path('smtpproxy.ini')], cwd=TOP, stdout=subprocess.PIPE)

    def end(self, process):
        out, _ = process.communicate(timeout=30)
        return out.decode().strip()

    def test_many_threads_and_processes_make_one_request(self):
        self.tokens.delay = 1
        grant, found = self.signed_in(), []
        threads = [threading.Thread(
            target=lambda: found.append(grant.access_token()), name='t')
            for _ in range(20)]

        processes = [self.begin() for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found += [self.end(process) for process in processes]

        self.assertEqual(['access-2'] * 23, found)
        self.assertEqual(1, len(self.tokens.requests))

    def test_a_short_life_is_shared_by_those_who_waited(self):
        self.tokens.expires, self.tokens.delay = 60, 0.5
        grant, found = self.signed_in(), []
        threads = [threading.Thread(
            target=lambda: found.append(grant.access_token()), name='t')
            for _ in range(20)]

        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        self.assertEqual({'access-2'}, set(found))
        self.assertEqual(1, len(self.tokens.requests))

    def test_who_waits_for_a_failure_has_it_too(self):
        self.tokens.script['refresh'], self.tokens.delay = 503, 0.3
        grant, found = self.signed_in(), []

        def ask():
            try:
                grant.access_token()
            except TokenServerAway as away:
                found.append(str(away))
        threads = [threading.Thread(target=ask, name='t') for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        self.assertEqual((20, 1), (len(found), len(self.tokens.requests)))


class Device(SignInCase):

    def run_flow(self, **script):
        self.tokens.script.update(script)
        self.out, account = io.StringIO(), self.make().account
        with contextlib.redirect_stdout(self.out):
            return smtpproxy.sign_in_by_device(account, self.clock,
                                               self.clock.sleep)

    def test_a_code_is_shown_and_typed_somewhere(self):
        answer = self.run_flow(poll=['authorization_pending', None])

        self.assertEqual('refresh-1', answer['refresh_token'])
        self.assertRegex(self.out.getvalue(), r'Open in any browser: +http\S+/'
                         r'verify\n.*ABCD-EFGH\n')
        self.assertEqual([5, 5], self.clock.slept)
        start, poll = self.tokens.requests[0], self.tokens.requests[1]
        self.assertEqual({'client_id': 'id', 'scope': 'mail', 'login_hint':
                          'me@example.org'}, start.form)
        self.assertEqual('device-code-1', poll.form['device_code'])

    def test_slow_down_is_for_good(self):
        self.run_flow(poll=['slow_down', 'authorization_pending', 'slow_down',
                            None])

        self.assertEqual([5, 10, 10, 15], self.clock.slept)

    def test_so_it_is_in_the_answer_of_a_server_that_is_busy(self):
        slower = http(429, {'error': 'slow_down'})
        self.run_flow(poll=[slower, slower, 'authorization_pending', http(
            429, {'error': 'slow_down'}, 'Retry-After: 40\r\n'), 503, None])

        self.assertEqual([5, 10, 15, 15, 40, 60], self.clock.slept)

    def test_the_interval_of_the_server_counts(self):
        start = dict(self.tokens.do_start(None), interval='7')
        self.run_flow(start=start)

        self.assertEqual([7], self.clock.slept)

    def test_a_server_that_is_away_meanwhile_is_asked_less_often(self):
        self.run_flow(poll=[503, DROP, http(429, b'', 'Retry-After: 99\r\n'),
                            'authorization_pending', None])

        self.assertEqual([5, 10, 20, 99, 5], self.clock.slept)

    def test_whatever_else_it_says_ends_it(self):
        for error in ('access_denied', 'expired_token', 'invalid_grant',
                      'authorization_declined', 'bad_verification_code'):
            with self.subTest(error), self.assertRaises(TokenDenied):
                self.run_flow(poll=error)

    def test_it_ends_by_itself(self):
        with self.assertRaises(TokenDenied):
            self.run_flow(poll='authorization_pending')

        self.assertAlmostEqual(900, sum(self.clock.slept), delta=5)
        self.assertIn('there, 14:30 minutes left', self.out.getvalue())

    def test_no_code_to_type_is_no_sign_in(self):
        for reply, kind in ((404, TokenServerAway), ({}, TokenServerAway),
                            ('invalid_client', TokenDenied)):
            with self.subTest(reply), self.assertRaises(kind):
                self.run_flow(start=reply)

    def test_nor_is_one_without_a_place_for_it(self):
        whole = self.tokens.do_start(None)
        for lacks in 'user_code', 'verification_uri', 'device_code':
            for value in None, '', ' ', 7:
                with self.subTest(**{lacks: value}), self.assertRaisesRegex(
                        AWAY, 'nothing that we understand'):
                    self.run_flow(start=dict(whole, **{lacks: value}))
                self.assertEqual('', self.out.getvalue())


class Browser(SignInCase):
    """stdin_of: makes the descriptors of stdin and of who types there."""
    stdin_of = staticmethod(os.pipe)

    def begin(self, provider='other'):
        """A login that waits; self.address: what to open."""
        account = self.make().account._replace(oauth=provider)
        self.stdin, self.keyboard = self.stdin_of()
        self.addCleanup(os.close, self.stdin)
        self.addCleanup(self.hang_up, self.keyboard)
        self.login = smtpproxy.BrowserLogin(account, self.stdin)
        self.out, self.result = io.StringIO(), []

        def run():
            try:
                self.result.append(self.login.run())
            except Exception as error:
                self.result.append(error)
        patch = contextlib.redirect_stdout(self.out)
        patch.__enter__()
        self.addCleanup(patch.__exit__, None, None, None)
        thread = threading.Thread(target=run, daemon=True, name='login')
        thread.start()
        self.addCleanup(thread.join, 5)
        self.address = wait_until(self.shown)

    @staticmethod
    def hang_up(keyboard):
        with contextlib.suppress(OSError):
            os.close(keyboard)

    def shown(self):
        lines = self.out.getvalue().splitlines()
        return [line for line in lines if line.startswith('http')] and (
            'minutes left' in self.out.getvalue()) and [
                line for line in lines if line.startswith('http')][0]

    def finish(self):
        return wait_until(lambda: self.result)[0]

    def visit(self, address):
        """(status, page) as a browser sees it."""
        try:
            with urllib.request.urlopen(address, timeout=5) as page:
                return page.status, page.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, ''

    def type(self, text):
        os.write(self.keyboard, text.encode())

    def test_a_browser_comes_back(self):
        self.begin()
        there = self.tokens.consent(self.address)

        status, page = self.visit(there)

        self.assertEqual(200, status)
        self.assertIn('close this window', page)
        self.assertEqual('refresh-1', self.finish()['refresh_token'])
        self.assertIn('login_hint=me%40example.org', self.address)
        self.assertTrue(there.startswith('http://127.0.0.1:'))

    def test_what_google_and_microsoft_want(self):
        self.begin('google')
        self.assertIn('&access_type=offline&prompt=consent', self.address)
        self.type(self.tokens.consent(self.address) + '\n')
        self.finish()

        self.begin('microsoft')
        there = self.tokens.consent(self.address)
        self.assertRegex(there, r'^http://localhost:\d+\?code')
        for host in '127.0.0.1', '[::1]':
            status, _ = self.visit(there.replace('localhost', host).replace(
                'state=', 'state=x').replace('?', '/?'))
            self.assertEqual(404, status)
        self.visit(there.replace('?', '/?'))
        self.assertIn('access_token', self.finish())

    def test_the_address_is_pasted_back(self):
        for form in '%s\n', ' "%s#"\r\n', '<%s>\n':
            with self.subTest(form):
                self.begin()
                self.type(form % self.tokens.consent(self.address))
                self.assertIn('access_token', self.finish())

    def test_only_the_code_is_pasted_back(self):
        self.begin()
        code = self.tokens.consent(self.address).partition('?')[2]

        self.type('\n%s\n' % code.partition('&')[0])

        self.assertIn('access_token', self.finish())

    def test_others_are_answered_and_ignored(self):
        self.begin()
        there = self.tokens.consent(self.address)
        idle = socket.create_connection(('127.0.0.1', int(
            there.split(':')[2].split('/')[0])))
        self.addCleanup(idle.close)

        for other in ('favicon.ico', '?code=x&state=wrong', '?error=x',
                      '?code=x', '?state=' + self.login.state):
            status, _ = self.visit(self.login.redirect + other)
            self.assertEqual(404, status)
        self.type('nonsense\n%s\n' % there.replace('state=', 'state=x'))
        self.type(there.partition('&')[0] + '\n')
        self.visit(there)

        self.assertIn('access_token', self.finish())
        self.assertEqual(3, self.out.getvalue().count('is not the address'))

    def test_the_end_of_the_keyboard_cancels_nothing(self):
        self.begin()
        self.hang_up(self.keyboard)

        self.visit(self.tokens.consent(self.address))

        self.assertIn('access_token', self.finish())

    def test_nor_does_a_terminal_that_hangs_up_or_nohup(self):
        for name, ends in (('terminal', os.openpty),
                           ('nohup', lambda: (os.open('/dev/null', 1), -1))):
            with self.subTest(name):
                self.stdin_of = ends
                self.begin()
                self.hang_up(self.keyboard)
                wait_until(lambda: self.login.stdin is None)

                self.visit(self.tokens.consent(self.address))

                self.assertIn('access_token', self.finish())

    def test_no_is_told(self):
        self.begin()

        self.visit(self.tokens.consent(
            self.address, error='access_denied', code=''))

        self.assertIn('declined', str(self.finish()))

    def test_a_port_that_is_taken_is_named(self):
        with socket.create_server(('127.0.0.1', 0)) as taken:
            account = self.make('oauthflow=browser\noauthport=%d\n' % (
                taken.getsockname()[1])).account

            with self.assertRaisesRegex(OSError, 'another oauthport'):
                smtpproxy.BrowserLogin(account).run()


# Nobody may be unable to read this Python, so all is imported early.
LOGIN = '''
import encodings.idna, email.utils, fcntl, http.client, json, shlex, smtplib
import sys
import smtpproxy
sys.exit(smtpproxy.main(sys.argv[1:]))
'''


class Commands(SignInCase):
    """self.upstream: the account's smtphost."""

    def setUp(self):
        super().setUp()
        self.upstream = self.serve(FakeSMTP(mechanisms=['XOAUTH2']))

    def ini(self, more='', section=SENDER):
        return super().ini('smtpport=%d\n%s' % (self.upstream.port, more),
                           section)

    def command(self, *arguments):
        """(exit code, all that was said)."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = smtpproxy.main(
                ['--config', self.path('smtpproxy.ini'), *arguments])
        return code, out.getvalue()

    def login(self, address=SENDER, **script):
        self.tokens.script.update(dict({'start': dict(
            self.tokens.do_start(None), interval=1)}, **script))
        with mock.patch.dict(smtpproxy.FLOWS, device=functools.partial(
                smtpproxy.sign_in_by_device, pause=self.clock.sleep)):
            return self.command('--login', address)

    def test_a_login_is_stored_and_told(self):
        self.ini('[c@d]\nuse=%s\n' % SENDER)

        code, said = self.login('C@d')

        self.assertEqual(0, code, said)
        self.assertIn(self.file(), said)
        self.assertIn('%s, c@d' % SENDER, said)
        self.assertIn('takes this sign-in for me@example.org', said)
        self.assertEqual(1, len(self.upstream.logins))
        self.assertEqual('refresh-1', self.stored()['refresh'])

    def test_smtphost_has_the_last_word(self):
        self.ini()
        self.upstream.script['AUTH'] = '535 5.7.139 switched off'

        code, said = self.login()

        self.assertEqual(1, code)
        self.assertRegex(said, r'failed: login at .* refused .*5\.7\.139')
        self.assertEqual('refresh-1', self.stored()['refresh'])

    def test_a_login_that_fails_leaves_what_was_there(self):
        self.signed_in()
        before = self.stored()

        for reply in 'access_denied', 'invalid_client':
            code, said = self.login(poll=reply)
            self.assertEqual(1, code)
            self.assertIn('as it was', said)
        with mock.patch.object(self.clock, 'sleep',
                               side_effect=KeyboardInterrupt):
            code, said = self.login()

        self.assertEqual((1, 'interrupted'), (code, said.split()[-1]))
        self.assertEqual(before, self.stored())

    def test_who_needs_no_sign_in_is_told_so(self):
        self.ini('[c@d]\nsmtphost=mx\n')

        for address, words in (('x@y', 'no account'), ('c@d', 'no oauth'),
                               ('', 'no account')):
            for command in '--login', '--logout':
                code, said = self.command(command, address)
                self.assertEqual((1, 1), (code, said.count('\n')))
                self.assertIn(words, said)

    def test_what_was_not_granted_is_said(self):
        self.ini()
        code, said = self.login(poll={
            'access_token': 'x', 'scope': 'openid', 'expires_in': 3600})

        self.assertEqual(0, code)
        self.assertIn('was granted: openid', said)
        self.assertIn('without a refresh token', said)

    def test_a_logout_leaves_none(self):
        self.signed_in()

        first, second = [self.command('--logout', SENDER) for _ in range(2)]

        self.assertIn('forgotten', first[1])
        self.assertEqual((0, 0), (first[0], second[0]))
        self.assertEqual('not signed in', self.make().state().name)

    def test_parked_mail_is_tried_after_a_login(self):
        self.ini()
        spool = smtpproxy.Spool(self.path('msgs'))
        spool.open()
        draft = spool.draft(SENDER, ['a@b'], {})
        draft.write(b'Subject: x\r\n\r\n')
        draft.seal()
        draft.commit()
        spool.drafts.clear()
        mail = spool.load(draft.id)
        mail.parked = True
        spool.save(mail)

        for running in True, False:
            with self.subTest(running=running):
                _, said = self.login()
                self.assertIn('1 mails', said)
                asked, = os.listdir(self.path('msgs', 'asked'))
                self.assertEqual(draft.id + '.retry', asked)
                os.unlink(self.path('msgs', 'asked', asked))
                spool.close()

    def test_check_says_who_is_signed_in(self):
        self.ini()
        code, said = self.command('--check')
        self.assertIn('warning: [%s] not signed in: --login %s' % (
            SENDER, SENDER), said)

        self.signed_in()
        code, said = self.command('--check')

        self.assertRegex(said, r'signed in since \d{4}-.* renewed \d{4}-')
        self.assertEqual(0, code, said)

    def test_check_names_a_folder_that_cannot_be_written(self):
        self.signed_in()
        real = os.access

        with mock.patch('os.access', lambda path, mode: path != self.path(
                'tokens') and real(path, mode)):
            code, said = self.command('--check')

        self.assertEqual(0, code)
        self.assertRegex(said, 'warning: .*tokens cannot be written by user')

    def test_check_names_a_sign_in_that_has_run_out(self):
        self.make().store({'access_token': 'x', 'expires_in': 0})

        code, said = self.command('--check')

        self.assertRegex(said, r'warning: \[%s\] .*has run out: --login' % (
            SENDER))

    @unittest.skipUnless(os.getuid() == 0, 'needs root')
    def test_root_leaves_files_to_the_user_who_needs_them(self):
        os.chmod(self.folder, 0o755)
        path = self.ini()
        with open(path) as file:
            text = file.read().replace('msgdir=msgs\n',
                                       'msgdir=msgs\nuser=nobody\n')
        self.write('smtpproxy.ini', text)
        self.tokens.script['start'] = dict(self.tokens.do_start(None),
                                           interval=1)
        subprocess.run([sys.executable, '-c', LOGIN, '--config', path,
                        '--login', SENDER], check=True, cwd=TOP,
                       stdout=subprocess.DEVNULL)

        nobody = pwd.getpwnam('nobody').pw_uid
        self.assertEqual(nobody, os.stat(self.path('tokens')).st_uid)
        self.assertEqual(nobody, os.stat(self.file()).st_uid)


class Silence(SignInCase):

    def test_no_secret_is_in_the_log_or_said(self):
        self.tokens.clients['id'] = 'hush-secret'
        self.tokens.script['refresh'] = [None, 'invalid_grant']
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            grant = self.signed_in('oauthclientsecret=hush-secret\n')
            smtpproxy.sign_in_by_device(grant.account, self.clock,
                                        self.clock.sleep)
            grant.access_token()
            self.later(4000)
            self.assertRaises(SignInNeeded, grant.access_token)
            smtpproxy.main(['--config', self.path('smtpproxy.ini'),
                            '--check'])

        for word in ('access-', 'refresh-', 'device-code-1', 'hush-secret'):
            for form in word, base64.b64encode(word.encode())[:8].decode():
                self.assertNotIn(form, out.getvalue() + self.log())


CLOSED = '535 5.7.139 Authentication unsuccessful, '
SWITCHED_OFF = CLOSED + 'SmtpClientAuthentication is disabled for the Mailbox'
NO_OAUTH = '250-fake\n250 AUTH LOGIN PLAIN'
DAYS = 5                        # retrydays
ON_THE_WAY = [  # what the servers do, deleteonerror, state, requests,
                # log line, what becomes of the mail
    ({}, {}, False, 'signed in', 1, 'renewed', 'sent'),
    ({}, {'AUTH': ['535 5.7.3 no', None]}, False, 'signed in', 2, 'renewed',
     'sent'),
    ({}, {'AUTH': '535 5.7.3 no'}, False, 'signed in', 2,
     'xoauth2: 535 5.7.3 no); advice: is me@example.org the mailbox',
     'waits'),
    ({}, {'AUTH': '535 5.7.3 no'}, True, 'signed in', 2, 'deleted',
     'deleted'),
    ({}, {'AUTH': '454 4.7.0 later'}, False, 'signed in', 1, '454', 'waits'),
    ({}, {'AUTH': SWITCHED_OFF}, False, 'signed in', 1,
     'Set-CASMailbox -Identity me@example.org', 'waits'),
    ({}, {'AUTH': CLOSED + 'user is locked by security defaults'}, False,
     'signed in', 1, 'policy', 'waits'),
    ({}, {'EHLO': NO_OAUTH}, False, 'signed in', 1,
     'no login by OAuth2 (login plain)', 'waits'),
    ({'refresh': 'invalid_grant'}, {}, False, 'needed', 1,
     '--login ' + SENDER, 'waits'),
    ({'refresh': 'invalid_grant'}, {}, True, 'needed', 1,
     '--login ' + SENDER, 'waits'),
    ({'refresh': 503}, {}, False, 'away', 1, 'has no time', 'waits'),
    ({'refresh': 503}, {}, True, 'away', 1, 'has no time', 'waits'),
    ({'refresh': http(429, b'', 'Retry-After: 900\r\n')}, {}, False, 'away',
     1, 'the next one in 900 seconds', 'waits'),
    ({'refresh': 200}, {}, False, 'away', 1, 'login page', 'waits')]


class WireCase(RelayCase):
    """A relay whose account signs in by OAuth2, with a token that has run
    out. self.tokens: the token server."""

    def setUp(self):
        super().setUp()
        self.tokens = self.serve(FakeTokenServer())
        self.upstream.users = self.tokens.valid
        self.upstream.mechanisms = ['PLAIN', 'XOAUTH2']
        self.upstream.require_auth = True
        smtpproxy.TokenFile.complained.clear()

    def keys(self, **more):
        return self.account(**dict(
            dict(oauth='other', oauthclientid='id', smtpusername=USER,
                 oauthscope='mail', oauthtokenurl=self.tokens.url('/token'),
                 oauthauthurl=self.tokens.url('/authorize')), **more))

    def begin(self, signed_in=True, config=(), more=(), **keys):
        accounts = dict({SENDER: self.keys(**keys)}, **dict(more))
        if signed_in:
            self.sign_in(accounts)
        super().begin(dict(config), accounts)

    def sign_in(self, accounts=None):
        """As --login does; the access token has run out."""
        path = self.ini(accounts=accounts) if accounts else self.path(
            'smtpproxy.ini')
        with self.tokens.changed:
            answer = dict(self.tokens.issue(), expires_in=0)
        for grant in smtpproxy.Grants(smtpproxy.load(path)):
            grant.store(answer)

    @property
    def grant(self):
        return next(iter(self.relay.grants))

    def put_and_wait(self):
        """A mail that was tried."""
        def tried():
            mail = self.spool.load(id)
            return not mail or mail.problem
        id = self.put()
        wait_until(lambda: tried() and id not in self.in_hand())
        return id

    def lines(self, *words):
        return [line for line in self.log().splitlines()
                if all(word in line for word in words)]


class Told(WireCase):
    """That a person has to sign in reaches one by mail."""

    def setUp(self):
        super().setUp()
        self.post = self.serve(FakeSMTP(clock=self.clock))

    def begin(self, signed_in=True):
        super().begin(signed_in, {'sleeptime': 10, 'alert': USER,
                                  'alertfrom': OTHER},
                      {OTHER: self.account(self.post)})

    def assertTold(self, count, *words):
        """The last of so many alerts has a line with these words."""
        self.advance_until(lambda: len(self.post.mails) == count, 600)
        lines = lines_of(self.post.mails[-1])
        self.assertTrue([line for line in lines if all(
            word in line for word in words)], lines)

    def test_before_mail_waits_for_it(self):
        self.begin(signed_in=False)

        self.assertTold(1, 'not signed in', '--login ' + SENDER)
        self.advance(86400)
        self.sign_in()
        self.assertTold(2, SENDER, 'is signed in again')

    def test_a_renewal_of_an_unused_one_that_is_denied(self):
        self.begin()
        self.tokens.script['refresh'] = 'invalid_grant'

        self.advance(8 * 86400)

        self.assertTold(1, 'waits for a sign-in', '--login ' + SENDER)

    def test_a_reload_or_a_restart_is_no_new_sign_in(self):
        self.begin()
        self.tokens.script['refresh'] = 'invalid_grant'
        self.put_and_wait()
        self.assertTold(1, 'waits for a sign-in')

        for again in self.reload, self.restart:
            again()
            for _ in range(3):
                self.advance(3600)
                wait_until(self.at_rest)

        self.assertFalse([line for mail in self.post.mails
                          for line in lines_of(mail) if 'is signed' in line])

    def restart(self):
        self.end()
        self.begin(signed_in=False)

    def test_one_that_ends_in_an_outage_is_no_part_of_it(self):
        self.tokens.script['refresh'] = http(503, b'')
        self.begin()
        self.put_and_wait()
        self.assertTold(1, 'could not be used for an hour')

        self.tokens.script['refresh'] = 'invalid_grant'

        self.assertTold(2, 'waits for a sign-in', '--login ' + SENDER)


class OnTheWay(WireCase):

    def play(self, tokens, smtp, deletes):
        """The id of a mail that was tried once."""
        del self.tokens.requests[:], self.upstream.mails[:]
        self.tokens.script, self.upstream.script = tokens, smtp
        self.upstream.used.clear()
        self.begin(config={'deleteonerror': deletes})
        return self.put_and_wait()

    def test_what_becomes_of_a_mail(self):
        for tokens, smtp, deletes, state, requests, words, fate in ON_THE_WAY:
            with self.subTest(str((tokens, smtp))[:70], deletes=deletes):
                id = self.play(tokens, smtp, deletes)

                self.assertLogged(words)
                self.assertEqual(state, self.grant.state().name)
                self.assertEqual(requests, len(self.tokens.requests))
                self.assertEqual(fate == 'sent', bool(self.upstream.mails))
                self.assertEqual(fate == 'waits', bool(self.spool.load(id)))
                self.assertEqual([], self.upstream.violations)
            self.clear()
            os.unlink(self.path('smtpproxy.log'))

    def test_who_is_not_signed_in_hears_it_before_there_is_mail(self):
        self.begin(False)

        self.assertLogged('ERROR', 'not signed in', '--login')

    def test_who_is_not_signed_in_has_his_mail_kept(self):
        for deletes in 'false', 'true':
            with self.subTest(deleteonerror=deletes):
                self.begin(False, {'deleteonerror': deletes})
                id = self.put_and_wait()

                self.assertLogged('ERROR', 'not signed in', '--login')
                self.assertLogged('WARNING', id, 'it waits for that')
                self.assertIn('not signed in', self.spool.load(id).problem)
                self.assertEqual(0, self.upstream.connections)
                self.clear()

    def test_a_dead_sign_in_costs_nothing_and_delays_nobody(self):
        self.tokens.script['refresh'] = 'invalid_grant'
        self.begin(more={OTHER: self.account()})
        self.upstream.require_auth = False
        self.put_and_wait()
        for _ in range(20):
            self.advance(100)
            self.put()

        self.put(sender=OTHER)
        self.upstream.wait()

        self.assertEqual(1, len(self.tokens.requests))
        self.assertEqual((1, 1), (self.upstream.connections,
                                  len(self.lines('ERROR'))))

    def test_the_owner_is_reminded_daily(self):
        self.tokens.script['refresh'] = 'invalid_grant'
        self.begin()
        self.put_and_wait()

        self.advance(86400)

        wait_until(lambda: len(self.lines('ERROR', '--login')) == 2)
        self.assertEqual(1, len(self.tokens.requests))

    def test_a_new_sign_in_lets_all_mail_go_without_a_reload(self):
        self.tokens.script['refresh'] = ['invalid_grant', None]
        self.begin(config={'deleteonerror': 'true'})
        self.put_and_wait()
        self.put()

        self.sign_in()
        self.advance(1)

        self.assertEqual(2, len(self.upstream.wait(2)))
        self.assertLogged('the sign-in has changed: 2 mails')

    def test_a_logout_is_noticed(self):
        self.begin()
        with mock.patch.object(smtpproxy, 'LINGER', .01):
            self.put()
            self.upstream.wait()
            wait_until(lambda: not self.upstream.open)

        for grant in smtpproxy.Grants(self.settings):
            grant.forget()
        self.advance(1)

        self.assertLogged('WARNING', 'it is gone: --login')
        self.put_and_wait()
        self.assertLogged('ERROR', 'not signed in')

    def test_the_owner_may_ask_for_another_try(self):
        self.tokens.script['refresh'] = 'invalid_grant'
        self.begin()
        id = self.put_and_wait()

        for count, ask in enumerate((
                lambda: self.spool.ask(id, 'retry'), self.reload,
                lambda: self.spool.ask('all', 'retry')), 2):
            ask()
            self.advance(1)
            wait_until(lambda: len(self.tokens.requests) == count
                       and not self.in_hand())
        self.assertTrue(self.spool.load(id))

    def test_mail_that_waits_for_a_person_is_parked_in_the_end(self):
        self.begin(False, {'retrydays': DAYS, 'deleteonerror': 'true'})
        ids = [self.put_and_wait(), self.put()]

        self.advance(DAYS * 86400)

        for id in ids:
            self.assertLogged('ERROR', id, 'not delivered in 5 days')
            self.assertTrue(self.spool.load(id).parked)

    def test_so_it_is_with_smtprate_however_often_the_box_restarts(self):
        accounts = {SENDER: self.keys(smtprate=30)}
        id = None
        for _ in range(4):
            RelayCase.begin(self, {'retrydays': 1}, accounts)
            id = id or self.put()
            self.advance_until(lambda: [
                1 for destination in self.relay.queues.destinations.values()
                if destination.not_before == smtpproxy.FOREVER], 1)
            parked = self.spool.load(id).parked
            self.advance(.4 * 86400)
            self.put()                  # by its id the time goes on
            self.end()

        self.assertTrue(parked)

    def test_parked_mail_goes_after_a_new_sign_in(self):
        self.begin(False, {'retrydays': DAYS})
        self.put_and_wait()
        self.advance(DAYS * 86400)
        self.assertLogged('not delivered in 5 days')

        self.sign_in()
        with contextlib.redirect_stdout(io.StringIO()):
            smtpproxy.retry_mails_of(self.settings, self.grant.account)
        self.advance(1)

        self.upstream.wait()

    def test_the_wait_of_the_token_server_is_kept(self):
        self.tokens.script['refresh'] = [
            http(503, b'', 'Retry-After: 900\r\n'), None]
        self.begin()
        self.put_and_wait()

        self.advance(890)
        self.assertEqual(1, len(self.tokens.requests))
        self.advance(20)

        self.upstream.wait()

    def test_a_token_server_that_is_not_there_is_tried_each_sleeptime(self):
        self.begin()
        port, _ = self.tokens.port, self.tokens.close()
        self.put_and_wait()
        self.assertLogged('token server', 'the next one each 1 seconds')

        with FakeTokenServer(port=port) as again:
            again.live, again.count = self.tokens.live, self.tokens.count
            self.upstream.users = again.valid
            self.advance_until(lambda: self.upstream.mails, 1)

    def test_new_tokens_refused_are_asked_for_once(self):
        self.upstream.script['AUTH'] = '535 5.7.3 no'
        self.tokens.expires = DAYS * 86400
        self.begin()
        self.put_and_wait()

        self.advance_until(lambda: len(self.verbs('AUTH')) > 4, 600)

        self.assertEqual(2, len(self.tokens.requests))

    def test_each_token_that_was_good_once_is_worth_a_new_one(self):
        self.begin(smtpconnections=1)
        for count in 1, 2, 3:
            with mock.patch.object(smtpproxy, 'LINGER', .01):
                self.put()
                self.upstream.wait(count)
                wait_until(lambda: not self.upstream.open)
            self.tokens.valid.clear()           # the server forgets it

        self.assertEqual(3, len(self.tokens.requests))

    def test_a_long_token_goes_in_two_steps(self):
        for size, words in ((300, 3), (400, 2), (3000, 2)):
            for name in 'XOAUTH2', 'OAUTHBEARER':
                with self.subTest(name, size=size):
                    del self.upstream.commands[:], self.upstream.mails[:]
                    self.tokens.size = size
                    self.upstream.mechanisms = [name]
                    self.begin()
                    self.put()

                    self.upstream.wait()
                    self.assertEqual([words], [
                        len(line.split()) for line in self.verbs('AUTH')])
                    self.clear()

    def test_the_mechanism_is_xoauth2_unless_another_is_wanted(self):
        both, one = ['OAUTHBEARER', 'XOAUTH2'], ['LOGIN', 'OAUTHBEARER']
        for offered, keys, expected in (
                (both, {}, 'XOAUTH2'), (one, {}, 'OAUTHBEARER'),
                (both, {'smtpauth': 'oauthbearer'}, 'OAUTHBEARER')):
            with self.subTest(offered, **keys):
                del self.upstream.commands[:], self.upstream.mails[:]
                self.upstream.mechanisms = offered
                self.begin(**keys)
                self.put()

                self.upstream.wait()
                self.assertEqual([expected], [
                    line.split()[1] for line in self.verbs('AUTH')])
                self.clear()

    def test_queue_names_who_has_to_sign_in(self):
        self.tokens.script['refresh'] = 'invalid_grant'
        self.begin(more={OTHER: self.account()})
        self.put_and_wait()
        self.put()
        out = io.StringIO()

        with contextlib.redirect_stdout(out):
            smtpproxy.main(['--config', self.path('smtpproxy.ini'),
                            '--queue'])

        self.assertIn('2 of them wait for the sign-in of [%s]: the sign-in '
                      'has ended' % SENDER, out.getvalue())
        self.assertIn('--login ' + SENDER, out.getvalue().splitlines()[-1])
        self.assertEqual(2, out.getvalue().count('after --login '))
        self.assertEqual(1, out.getvalue().count('wait for'))

    def test_a_stop_waits_for_the_answer_of_a_renewal(self):
        self.tokens.delay = 0.5
        self.begin()
        self.put()
        wait_until(lambda: self.tokens.open)

        self.end()

        for grant in smtpproxy.Grants(self.settings):
            self.assertEqual('access-2', grant.access_token())

    def test_twenty_connections_at_expiry_make_one_request(self):
        self.tokens.delay = 0.3
        self.begin(smtpconnections=20)
        sign_in = smtpproxy.SignIn(self.settings.accounts[SENDER],
                                   grants=self.relay.grants)
        found = []
        threads = [threading.Thread(
            target=lambda: found.append(sign_in.token()), name='t')
            for _ in range(20)]

        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        self.assertEqual({self.tokens.valid[USER]}, set(found))
        self.assertEqual(1, len(self.tokens.requests))


class Whispers(WireCase):
    """No token is in the log, whatever a server repeats of it."""

    def echo(self, conversation):
        """The whole command, and the token in pieces, as long lines are."""
        token = self.tokens.valid[USER]
        return ''.join('535-5.7.8 %s\n' % token[start:start + 70]
                       for start in range(0, len(token), 70)) + (
            '535 5.7.8 what is %s?' % conversation.line)

    def forms(self, token):
        """What nobody may see of it: itself and its base64."""
        account = self.settings.accounts[SENDER]
        texts = (token, smtpproxy.xoauth2(account, token),
                 smtpproxy.oauthbearer(account, token))
        return [token] + [base64.b64encode(text.encode()).decode()
                          for text in texts]

    def whisper(self, script, **keys):
        """The log of a mail at the highest debuglevel."""
        self.upstream.script = script
        self.begin(config={'debuglevel': 2}, **keys)
        id = self.put_and_wait()
        self.assertLogged(id, '535' if script else 'sent to')
        self.clear()
        return self.log()

    def test_no_token_is_in_the_log(self):
        for name in 'xoauth2', 'oauthbearer':
            for size in 60, 400:
                for script in {}, {'AUTH': self.echo}, {'PASSWORD': self.echo}:
                    with self.subTest(name, size=size, script=list(script)):
                        self.tokens.size = size
                        self.upstream.mechanisms = [name.upper()]
                        log = self.whisper(script)

                        self.assertIn('AUTH', log)
                        for token in self.tokens.issued:
                            for form in self.forms(token):
                                self.assertEqual([], [
                                    n for n in range(0, len(form) - 10, 10)
                                    if form[n:n + 10] in log])

    def test_the_rest_of_a_reply_can_be_read(self):
        token = 'eyJ0eXAiOiJKV1QiLCJub25jZSI6Ik1PVlJ0.ZmY5-_bHk2QmJ1c2V'
        reply = ('535 5.7.3 Authentication unsuccessful [AM6PR10CA0041.EURPRD'
                 '10.PROD.OUTLOOK.COM 2026-11-26T08:00:00.000Z 08DE2C]: ')

        self.assertEqual(reply + '*** and ***', smtpproxy.without_pieces(
            reply + token[5:] + ' and ' + token[9:22], [token]))


class Memory(unittest.TestCase):

    def test_who_has_no_oauth_loads_nothing_for_it(self):
        code = ('import sys, smtpproxy; from smtpproxy import *; '
                'print(sorted(set(sys.modules) & {"ssl", "http.client", '
                '"urllib.request", "hashlib", "secrets", '
                '"email"}))')
        out = subprocess.run([sys.executable, '-c', code], cwd=TOP,
                             stdout=subprocess.PIPE, check=True).stdout

        self.assertEqual(b'[]\n', out)


if __name__ == '__main__':
    unittest.main()
