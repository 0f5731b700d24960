"""smtprate: mail leaves evenly, and what waits for its turn loses nothing."""
import os
import time
import unittest
from unittest import mock

import smtpproxy
from tests.case import B, OTHER, SENDER
from tests.fakes import FakePOP, FakeSMTP, wait_until
from tests.test_relay import DAY, LATER, RelayCase

HOUR = 3600


class PaceCase(RelayCase):

    def paced(self, count, accounts=None, rate=30, **config):
        """Starts a relay with so many mails at that rate; returns their
        ids."""
        self.begin(dict({'sleeptime': 10}, **config), accounts or {
            SENDER: self.account(smtprate=rate)})
        return [self.put() for _ in range(count)]

    def times(self, server=None):
        return [command.time for command in self.verbs('MAIL', server)]

    def assertEven(self, times, seconds):
        for before, after in zip(times, times[1:]):
            self.assertGreaterEqual(after - before, seconds)
            self.assertLessEqual(after - before, seconds + 1)


class Evenly(PaceCase):

    def test_a_backlog_leaves_evenly_over_one_connection(self):
        self.paced(100)

        self.advance_until(lambda: len(self.upstream.mails) == 100, 1)

        self.assertEven(self.times(), 2)
        self.assertEqual(1, self.upstream.connections)
        self.assertGone()

    def test_no_minute_sees_more(self):
        self.paced(30, rate=7)

        self.advance_until(lambda: len(self.upstream.mails) == 30, .5)

        times = self.times()
        for first, eighth in zip(times, times[7:]):
            self.assertGreaterEqual(eighth - first, 60)

    def test_the_connection_is_kept_for_mail_that_comes_meanwhile(self):
        self.paced(1)
        self.advance_until(lambda: self.upstream.mails, 1)

        for count in range(2, 6):
            self.put()
            self.advance_until(lambda: len(
                self.upstream.mails) == count, 1)

        self.assertEqual(1, self.upstream.connections)

    def test_sections_with_one_login_share_it(self):
        self.paced(10, {
            SENDER: self.account(smtprate=30, replyto='a@example.org'),
            OTHER: self.account(smtprate=30, returnpath='b@example.org')})
        for _ in range(10):
            self.put(sender=OTHER)

        self.advance_until(lambda: len(self.upstream.mails) == 20, 1)

        self.assertEven(self.times(), 2)

    def test_another_account_is_not_slowed(self):
        well = self.serve(FakeSMTP(clock=self.clock))
        self.paced(5, {SENDER: self.account(smtprate=1),
                       OTHER: self.account(well)})

        for _ in range(20):
            self.put(sender=OTHER)

        well.wait(20)
        self.assertEqual([], self.upstream.mails)

    def test_a_slow_way_to_the_server_brings_no_two_together(self):
        def take_time(_):
            self.clock.advance(55)
        self.upstream.script[''] = take_time
        self.paced(4, rate=1)

        self.advance_until(lambda: len(self.upstream.mails) == 4, 1)

        self.assertEven(self.times(), 60)

    def test_what_went_nowhere_has_had_no_turn(self):
        pop = self.serve(FakePOP(clock=self.clock))
        self.paced(4, {SENDER: self.account(
            smtprate=1, popbeforesmtp='true', pophost=pop.host,
            popport=pop.port, popssl='false', popusername='me',
            poppassword='pw')}, waitafterpop=5)

        self.advance_until(lambda: len(self.upstream.mails) == 4, 1)

        for before, after in zip(self.times(), self.times()[1:]):
            self.assertGreaterEqual(after - before, 60)
            self.assertLess(after - before, 70)     # a POP login before each

    def test_a_mail_that_somebody_removed_holds_up_no_other(self):
        self.upstream.script['RCPT'] = [LATER, None]
        id, = self.paced(1)
        self.advance_until(lambda: self.spool.load(id).tries, 1)
        os.unlink(self.path('msgs', id + '.mail'))
        self.advance(30)

        self.put([B])

        self.advance_until(lambda: self.upstream.mails, 1)
        self.assertDelivered([B])

    def test_a_restart_begins_no_burst(self):
        self.paced(9)
        for count in 1, 2, 3:
            self.advance_until(lambda: len(
                self.upstream.mails) == count, 1)
            self.end()
            self.begin({'sleeptime': 10}, {
                SENDER: self.account(smtprate=30)})
        self.advance_until(lambda: len(self.upstream.mails) == 9, 1)

        self.assertEven(self.times(), 2)

    def test_an_account_that_failed_goes_on_evenly(self):
        self.upstream.script['MAIL'] = [None, None, LATER, None]
        self.paced(8)

        self.advance_until(lambda: len(self.upstream.mails) == 8, 1)

        for before, after in zip(self.times(), self.times()[1:]):
            self.assertGreaterEqual(after - before, 2)

    def test_a_stop_does_not_wait_for_the_next_turn(self):
        self.paced(3, rate=1)
        self.advance_until(lambda: self.upstream.mails, 10)
        start = time.monotonic()

        self.end()

        self.assertLess(time.monotonic() - start, 2)
        self.assertEqual(2, len(self.spooled()))


class Patience(PaceCase):
    """retrydays do not run while mail waits for its turn."""

    def late(self, rate, script):
        """The id of a mail that is tried after two days of waiting."""
        self.upstream.script = script
        self.paced(0, rate=rate, retrydays=1, sleeptime=HOUR)
        with mock.patch.object(self.relay, 'announce'):
            id = self.put()
        self.clock.advance(2 * DAY)
        self.relay.announce(id, SENDER, id)
        return id

    def test_mail_whose_turn_comes_late_is_tried_for_all_its_days(self):
        for script in {'RCPT': LATER}, {'': '421 4.3.2 busy'}:
            for rate, parked in (30, False), (0, True):
                with self.subTest(script, rate=rate):
                    id = self.late(rate, script)

                    wait_until(lambda: self.spool.load(id).problem)

                    self.assertEqual(parked, self.spool.load(id).parked)
                    self.clear()

    def test_then_it_is_parked(self):
        for script in {'RCPT': LATER}, {'': '421 4.3.2 busy'}:
            with self.subTest(script):
                id = self.late(30, script)
                other = self.put()
                self.tried(id, 1)

                self.advance_until(lambda: all(
                    self.spool.load(one).parked for one in (id, other)),
                    3600)

                self.assertLogged('ERROR', id, 'not delivered in 1 days')
                self.clear()

    def test_a_limit_at_its_first_try_gives_no_more_days(self):
        self.upstream.script['RCPT'] = '550 5.4.5 Daily sending limit exceeded'
        self.paced(0, rate=30, retrydays=1)
        id = self.put()
        self.advance_until(lambda: self.spool.load(id).problem, 2)
        self.end()
        self.begin({'retrydays': 1}, {SENDER: self.account(smtprate=30)})

        self.advance_until(lambda: self.spool.load(id).parked, HOUR)

        self.assertLess(self.spool.age(id), 2 * DAY)

    def test_behind_a_backlog_it_has_all_its_days_after_a_failure(self):
        self.upstream.script['RCPT TO:<%s>' % B] = LATER
        self.paced(0, rate=1, retrydays=1)
        id = self.put([B])
        for _ in range(30):
            self.put()
        self.advance_until(lambda: self.spool.load(id).tries, 60)
        for _ in range(29):
            self.advance(HOUR)          # as if each had an hour's backlog
            wait_until(self.at_rest)

        self.advance_until(lambda: self.spool.load(id).tries > 1, 60)
        self.assertFalse(self.spool.load(id).parked)
        self.advance_until(lambda: self.spool.load(id).parked, HOUR)

        self.assertLess(self.spool.age(id), 3 * DAY)

    def test_a_restart_gives_no_more_days(self):
        id = self.late(30, {'RCPT': LATER})
        self.advance_until(lambda: self.spool.load(id).tries > 14, HOUR)
        self.end()
        self.begin({'sleeptime': HOUR, 'retrydays': 1}, {
            SENDER: self.account(smtprate=30)})

        self.advance_until(lambda: self.spool.load(id).parked, HOUR)

        self.assertLess(self.spool.age(id), 3.2 * DAY)


class Queue(PaceCase):
    """What the owner sees of it."""

    def held_up(self):
        return smtpproxy.held_up(
            smtpproxy.queue_rows(self.spool), self.settings)

    def test_the_queue_says_how_long_the_backlog_takes(self):
        self.paced(90)
        self.advance_until(lambda: len(self.upstream.mails) == 1, 1)

        line, = self.held_up()

        self.assertIn('%s: 89 mails wait, 89 for their turn: smtprate=30, so '
                      'about 3 minutes' % self.upstream.port, line)
        self.assertLogged('accepted; with smtprate=30 its turn comes in '
                          'about 20 seconds')

    def test_it_says_why_an_account_waits_and_until_when(self):
        self.upstream.script['MAIL'] = '550 5.4.5 Daily sending limit exceeded'
        self.begin()
        self.tried(self.put(), 1)
        self.put()

        line, = self.held_up()

        self.assertRegex(line, r'2 mails wait for the account, next try '
                         r'\d{4}-.*: .*550 5\.4\.5 .*within a day')

    def test_after_a_restart_it_says_the_same(self):
        self.upstream.script[''] = '421 4.3.2 busy'
        self.begin()
        self.tried(self.put(), 1)
        before = self.held_up()
        self.end()
        self.spool = smtpproxy.Spool(self.path('msgs'))

        self.assertEqual(before, self.held_up())
        self.assertIn('421 4.3.2 busy', before[0])

    def test_a_mail_in_trouble_of_its_own_holds_nobody_up(self):
        for script in {'RCPT': LATER}, {'RCPT': '550 5.1.1 no'}:
            with self.subTest(script):
                self.upstream.script = script
                self.begin()
                self.tried(self.put(), 1)

                self.assertEqual([], self.held_up())
                self.clear()


if __name__ == '__main__':
    unittest.main()
